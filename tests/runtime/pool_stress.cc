// Exercises native/pool.cc: exit status 0, or a line that names what was wrong and 1.
//
//     pool_stress SECONDS

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <tvm/ffi/c_api.h>
#include <unistd.h>

#include "pool.h"

namespace {

constexpr int kCallers = 20;  // more than launches that get help
constexpr int kTasks = 9;

double seconds = 1;
uint32_t open_gate;  // what held tasks wait for
uint32_t holding;

[[noreturn]] void Fail(const char* what) {
  printf("%s\n", what);
  fflush(stdout);
  _exit(1);
}

double Clock(clockid_t which) {
  timespec time;
  clock_gettime(which, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

struct Counts {
  int done[kTasks];  // written by whoever runs the task, read by the caller: no atomics, so a lost order would show
  int tasks;
};

int Count(int task, ParallelGroup* group, void* data) {
  auto* counts = static_cast<Counts*>(data);
  if (task < 0 || task >= counts->tasks || group->num_task != counts->tasks) Fail("a task that nobody launched");
  ++counts->done[task];
  return 0;
}

int Nested(int task, ParallelGroup* group, void* data) {
  Counts inner = {{0}, 3};
  graphwright_pool_launch(Count, &inner, 3);
  for (int i = 0; i < 3; ++i) {
    if (inner.done[i] != 1) Fail("a nested task was not done once");
  }
  return Count(task, group, data);
}

void* Caller(void* argument) {
  unsigned state = static_cast<unsigned>(reinterpret_cast<uintptr_t>(argument));
  double end = Clock(CLOCK_MONOTONIC) + seconds;
  while (Clock(CLOCK_MONOTONIC) < end) {
    for (int turn = 0; turn < 100; ++turn) {
      state = state * 1103515245u + 12345u;
      int threads = 1 + static_cast<int>(state >> 16) % kTasks;
      bool asked = (state >> 8) % 2 != 0;
      graphwright_pool_use(asked ? 2 : threads);
      Counts counts = {{0}, threads};
      if (graphwright_pool_launch(turn % 10 ? Count : Nested, &counts, asked ? threads : 0) != 0) Fail("a status");
      for (int i = 0; i < threads; ++i) {
        if (counts.done[i] != 1) Fail("a task was not done once");
      }
    }
  }
  return nullptr;
}

int Hold(int, ParallelGroup*, void*) {
  __atomic_add_fetch(&holding, 1, __ATOMIC_SEQ_CST);
  while (!__atomic_load_n(&open_gate, __ATOMIC_SEQ_CST)) usleep(100);
  return 0;
}

void* Holder(void*) {
  graphwright_pool_use(kTasks);
  graphwright_pool_launch(Hold, nullptr, 0);
  return nullptr;
}

// All threads of the pool are held in tasks of others: a launch is done by its caller.
void TakeOver() {
  pthread_t holder[64];
  uint32_t before = 0;
  int holders = 0;
  // Holders until another one makes no thread of the pool take part.
  for (; holders < 64; ++holders) {
    pthread_create(&holder[holders], nullptr, Holder, nullptr);
    usleep(50000);
    uint32_t now = __atomic_load_n(&holding, __ATOMIC_SEQ_CST);
    if (now == before + 1) break;
    before = now;
  }
  graphwright_pool_use(kTasks);
  Counts counts = {{0}, kTasks};
  graphwright_pool_launch(Count, &counts, 0);
  for (int done : counts.done) {
    if (done != 1) Fail("a task that no thread was free for was not done once");
  }
  __atomic_store_n(&open_gate, 1u, __ATOMIC_SEQ_CST);
  for (int i = 0; i <= holders && i < 64; ++i) pthread_join(holder[i], nullptr);
}

int Raise(int task, ParallelGroup*, void* data) {
  if (task != *static_cast<int*>(data)) return 0;
  TVMFFIErrorSetRaisedFromCStr("ValueError", "the third task");
  return -1;
}

// The error of a task, whoever ran it, is the caller's.
void Errors() {
  graphwright_pool_use(4);
  for (int turn = 0; turn < 1000; ++turn) {
    int which = turn % 4;
    if (graphwright_pool_launch(Raise, &which, 0) != -1) Fail("an error was lost");
    TVMFFIObjectHandle error = nullptr;
    TVMFFIErrorMoveFromRaised(&error);
    if (error == nullptr || strcmp(TVMFFIErrorGetCellPtr(error)->message.data, "the third task") != 0) {
      Fail("the error of a task is not the caller's");
    }
    TVMFFIObjectDecRef(error);
    which = -1;
    if (graphwright_pool_launch(Raise, &which, 0) != 0) Fail("an error came twice");
  }
}

// Every task writes into more blocks than a thread keeps, and gives them back in another order than it took them.
int WorkInMemory(int task, ParallelGroup*, void* data) {
  unsigned char* blocks[24];
  size_t sizes[24];
  unsigned state = static_cast<unsigned>(task) + *static_cast<unsigned*>(data);
  for (int i = 0; i < 24; ++i) {
    state = state * 1103515245u + 12345u;
    sizes[i] = (state >> 8) % 5000;
    blocks[i] = static_cast<unsigned char*>(graphwright_pool_take(1, 0, sizes[i], 2, 32));
    if (blocks[i] == nullptr || reinterpret_cast<uintptr_t>(blocks[i]) % 64 != 0) Fail("memory is missing or unaligned");
    memset(blocks[i], i + task, sizes[i]);
  }
  for (int i = 0; i < 24; ++i) {
    int one = (i * 7) % 24;
    for (size_t at = 0; at < sizes[one]; ++at) {
      if (blocks[one][at] != static_cast<unsigned char>(one + task)) Fail("two have the same memory");
    }
    graphwright_pool_give_back(1, 0, blocks[one]);
  }
  return 0;
}

int AskTooMuch(int task, ParallelGroup*, void*) {
  void* at = graphwright_pool_take(1, 0, task % 2 ? uint64_t{1} << 60 : static_cast<uint64_t>(-64), 2, 32);
  if (at != nullptr) Fail("memory that is not there");
  return -1;
}

void MemoryOfTasks() {
  graphwright_pool_use(4);
  for (unsigned turn = 0; turn < 500; ++turn) {
    if (graphwright_pool_launch(WorkInMemory, &turn, 0) != 0) Fail("no memory");
    if (turn % 10 != 0) continue;
    if (graphwright_pool_launch(AskTooMuch, nullptr, 0) != -1) Fail("missing memory is no error");
    TVMFFIObjectHandle error = nullptr;
    TVMFFIErrorMoveFromRaised(&error);
    if (error == nullptr) Fail("missing memory raises nothing");
    TVMFFIObjectDecRef(error);
  }
}

// A thread that ends gives its memory back.
void* MemoryOfThreads(void*) {
  unsigned turn = 0;
  WorkInMemory(0, nullptr, &turn);
  return nullptr;
}

size_t ResidentBytes() {
  size_t pages = 0;
  FILE* file = fopen("/proc/self/statm", "r");
  if (file == nullptr || fscanf(file, "%*s %zu", &pages) != 1) Fail("no numbers of memory");
  fclose(file);
  return pages * sysconf(_SC_PAGESIZE);
}

// Memory that is used one after the other is one block, however its size grows; large blocks are not kept.
void* MemoryThatGrows(void*) {
  size_t before = ResidentBytes();
  const size_t megabytes[] = {8, 16, 24, 32, 40, 48, 160, 8};
  for (size_t size : megabytes) {
    void* at = graphwright_pool_take(1, 0, size << 20, 2, 32);
    if (at == nullptr) Fail("no memory");
    memset(at, 1, size << 20);
    graphwright_pool_give_back(1, 0, at);
    if (ResidentBytes() > before + (64u << 20)) Fail("more memory is kept than was used at the same time");
  }
  return nullptr;
}

// A forked process, which has none of the threads, makes its own.
void Forks() {
  pid_t child = fork();
  if (child == 0) {
    seconds = 0.2;
    Caller(reinterpret_cast<void*>(uintptr_t{7}));
    _exit(0);
  }
  int status = 1;
  if (waitpid(child, &status, 0) != child || status != 0) Fail("a forked process could not launch");
}

// Threads without work sleep.
void Idle() {
  usleep(20000);
  double before = Clock(CLOCK_PROCESS_CPUTIME_ID);
  usleep(500000);
  if (Clock(CLOCK_PROCESS_CPUTIME_ID) - before > 0.05) Fail("idle threads take processor time");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2) seconds = atof(argv[1]);
  pthread_t callers[kCallers];
  for (uintptr_t i = 0; i < kCallers; ++i) {
    pthread_create(&callers[i], nullptr, Caller, reinterpret_cast<void*>(i + 1));
  }
  for (pthread_t caller : callers) pthread_join(caller, nullptr);
  Errors();
  MemoryOfTasks();
  for (int turn = 0; turn < 100; ++turn) {
    pthread_t thread;
    pthread_create(&thread, nullptr, MemoryOfThreads, nullptr);
    pthread_join(thread, nullptr);
  }
  pthread_t thread;
  pthread_create(&thread, nullptr, MemoryThatGrows, nullptr);
  pthread_join(thread, nullptr);
  Forks();
  TakeOver();
  Idle();
  _exit(0);
}
