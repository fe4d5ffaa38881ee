#include "pool.h"

#include <dlfcn.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <tvm/ffi/c_api.h>
#include <unistd.h>

namespace {

constexpr int kLine = 64;          // bytes between what different threads write
constexpr int kJobs = 16;          // launches at the same time that get help; further ones run on their caller alone
constexpr int kMaxThreads = 256;   // of one launch
constexpr int kLooks = 32;         // looks for work between two looks at the clock
constexpr int64_t kSpin = 100000;       // nanoseconds for which a thread looks for work before it sleeps
constexpr int64_t kWait = 50000;        // the same of a caller that looks for its last task to be done
constexpr int64_t kRetry = 1000000000;  // nanoseconds from a thread that could not be made to the next attempt
constexpr int kFaults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT};
constexpr int kBlocks = 16;             // of memory that a thread keeps
constexpr size_t kLargest = 64 << 20;   // bytes of such a block

template <typename T>
T Load(const T* from) {
  return __atomic_load_n(from, __ATOMIC_ACQUIRE);
}

template <typename T>
void Store(T* to, T value) {
  __atomic_store_n(to, value, __ATOMIC_RELEASE);
}

template <typename T>
bool Swap(T* at, T before, T after) {
  return __atomic_compare_exchange_n(at, &before, after, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}

void Relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__) || defined(__arm__)
  __asm__ __volatile__("yield" ::: "memory");
#else
  __asm__ __volatile__("" ::: "memory");
#endif
}

int64_t Now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<int64_t>(time.tv_sec) * 1000000000 + time.tv_nsec;
}

// Sleep while *word is `value`; other returns than by Wake are possible.
void Sleep(uint32_t* word, uint32_t value) {
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

void Wake(uint32_t* word) {
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
}

// One launch. A task is free where its word in `claims` is the launch's number, and taken by whoever makes it one
// more. Numbers are even and grow: nobody takes a task of a launch that has ended, and words of larger launches before
// are nobody's. `task`, `data` and `count` are only read by who has taken a task, which keeps the launch from ending.
struct alignas(kLine) Job {
  uint32_t busy;    // 1: belongs to a caller
  uint32_t count;   // tasks
  uint64_t number;  // of the launch
  ParallelTask task;
  void* data;
  uint64_t claims[kMaxThreads];
  alignas(kLine) uint32_t left;  // tasks that are not done
  uint32_t asleep;               // 1: the caller sleeps until `left` is 0
  TVMFFIObjectHandle error;      // of the first task that failed
};

// A thread of the pool. The first `wanted` of them take part.
struct alignas(kLine) Worker {
  uint32_t asleep;  // 1: it sleeps until this is 0
};

Job jobs[kJobs];
Worker crew[kMaxThreads];         // by the thread's number, from 1 on
alignas(kLine) uint32_t posted;   // launches so far
alignas(kLine) uint32_t wanted;   // threads that the launches of this moment could use
uint32_t workers;                 // threads that have been started
int64_t start_again;              // when to make threads again after one could not be made
uint32_t processors = 1;          // that this process may use
thread_local int threads_of_caller = 1;

void Run(Job* job, uint32_t index) {
  ParallelGroup group = {nullptr, static_cast<int32_t>(job->count)};
  if (job->task(static_cast<int>(index), &group, job->data) != 0) {
    TVMFFIObjectHandle error = nullptr, none = nullptr;
    TVMFFIErrorMoveFromRaised(&error);
    if (!__atomic_compare_exchange_n(&job->error, &none, error, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
      TVMFFIObjectDecRef(error);
    }
  }
}

bool Claim(Job* job, uint32_t index, uint64_t number) {
  return Load(&job->claims[index]) == number && Swap(&job->claims[index], number, number + 1);
}

// Run the task, if it is free. Returns whether it was.
bool Help(Job* job, uint32_t index, uint64_t number) {
  if (!Claim(job, index, number)) return false;
  Run(job, index);
  if (__atomic_sub_fetch(&job->left, 1, __ATOMIC_SEQ_CST) != 0) return true;
  // The caller may be gone by now and the job another's, who then is woken once, looks and sleeps on.
  if (__atomic_load_n(&job->asleep, __ATOMIC_SEQ_CST)) Wake(&job->left);
  return true;
}

// All tasks of a launch that are free, the thread's own first: from launch to launch it then works on the same part
// of the data. Returns whether there were any.
bool HelpWithAll(Job* job, uint32_t own) {
  uint64_t number = Load(&job->number);
  if (number == 0) return false;  // no launch yet, and all words are 0
  bool helped = Help(job, own, number);
  for (uint32_t index = 1; index < kMaxThreads; ++index) {
    if (Load(&job->claims[index]) / 2 != number / 2) break;  // behind the last task, or the launch has ended
    helped |= Help(job, index, number);
  }
  return helped;
}

// Wait until there were other launches than the `seen` first, looking for them until `end` and sleeping then until one
// wants this thread. Returns how many there were.
uint32_t Next(Worker* self, uint32_t seen, int64_t end) {
  for (int look = 1; Load(&posted) == seen; ++look) {
    Relax();
    if (look % kLooks != 0 || Now() <= end) continue;
    // A launch that does not see this was posted before, and is seen here.
    __atomic_store_n(&self->asleep, 1u, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&posted, __ATOMIC_SEQ_CST) == seen) {
      while (__atomic_load_n(&self->asleep, __ATOMIC_SEQ_CST)) Sleep(&self->asleep, 1);
    }
    __atomic_store_n(&self->asleep, 0u, __ATOMIC_SEQ_CST);
  }
  return Load(&posted);
}

void* Work(void* argument) {
  uint32_t own = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(argument));
  pthread_setname_np(pthread_self(), "graphwright");
  uint32_t seen = Load(&posted) - 1;
  int64_t end = 0;  // launches that want fewer threads do not keep this one from sleeping
  for (;; seen = Next(&crew[own], seen, end)) {
    bool helped = false;
    for (Job& job : jobs) {
      if (own <= Load(&wanted) && Load(&job.busy)) helped |= HelpWithAll(&job, own);
    }
    if (helped) end = Now() + kSpin;
  }
  return nullptr;
}

// Make threads until there are `count`.
void Start(uint32_t count) {
  if (int64_t again = Load(&start_again); again != 0 && Now() < again) return;
  for (uint32_t have; (have = Load(&workers)) < count;) {
    if (!Swap(&workers, have, have + 1)) continue;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    sigset_t all, before;
    sigfillset(&all);  // signals are for the program's own threads, but for those of a thread's own faults
    for (int fault : kFaults) sigdelset(&all, fault);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    void* own = reinterpret_cast<void*>(static_cast<uintptr_t>(have + 1));
    bool made = pthread_create(&thread, &attributes, Work, own) == 0;
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_attr_destroy(&attributes);
    if (made) continue;
    __atomic_sub_fetch(&workers, 1, __ATOMIC_SEQ_CST);
    Store(&start_again, Now() + kRetry);
    return;
  }
}

// A forked process has none of the threads, and launches of other threads than the one that forked never end there.
void AfterFork() {
  memset(jobs, 0, sizeof(jobs));
  memset(crew, 0, sizeof(crew));
  wanted = workers = 0;
  start_again = 0;
}

// Memory that tasks of a thread work in, kept from kernel to kernel.
struct Block {
  void* at;
  size_t size;
  bool used;
};

struct Memory {
  Block blocks[kBlocks];
};

pthread_key_t memory_key;
thread_local Memory* memory_of_thread = nullptr;

void ReleaseMemory(void* argument) {
  auto* memory = static_cast<Memory*>(argument);
  for (Block& block : memory->blocks) free(block.at);
  free(memory);
  memory_of_thread = nullptr;
}

Memory* MemoryOfThread() {
  if (memory_of_thread == nullptr) {
    memory_of_thread = static_cast<Memory*>(calloc(1, sizeof(Memory)));
    if (memory_of_thread != nullptr) pthread_setspecific(memory_key, memory_of_thread);
  }
  return memory_of_thread;
}

// The smallest free block that is large enough; else a new one in the place of the largest free one. So a thread keeps
// no more blocks than were used at the same time, of the largest sizes that were asked for.
void* Take(Memory* memory, size_t size) {
  Block* best = nullptr;
  Block* place = nullptr;
  for (Block& block : memory->blocks) {
    if (block.used) continue;
    if (block.size >= size && (best == nullptr || block.size < best->size)) best = &block;
    if (place == nullptr || block.size > place->size) place = &block;
  }
  if (best == nullptr) {
    if (place != nullptr) {
      free(place->at);
      *place = {};
    }
    void* at = nullptr;
    if (posix_memalign(&at, kLine, size) != 0) return nullptr;
    if (place == nullptr) return at;  // more at the same time than are kept
    *place = {at, size, false};
    best = place;
  }
  best->used = true;
  return best->at;
}

__attribute__((constructor)) void Begin() {
  cpu_set_t usable;
  if (sched_getaffinity(0, sizeof(usable), &usable) == 0) processors = static_cast<uint32_t>(CPU_COUNT(&usable));
  pthread_atfork(nullptr, nullptr, AfterFork);
  pthread_key_create(&memory_key, ReleaseMemory);
}

Job* TakeJob() {
  for (Job& job : jobs) {
    if (!Load(&job.busy) && Swap(&job.busy, 0u, 1u)) return &job;
  }
  return nullptr;
}

void Await(Job* job) {
  int64_t end = 0;
  uint32_t left;
  for (int look = 1; (left = __atomic_load_n(&job->left, __ATOMIC_SEQ_CST)) != 0; ++look) {
    Relax();
    if (look % kLooks != 0) continue;
    int64_t time = Now();
    if (end == 0) {
      end = time + kWait;
    } else if (time > end) {
      __atomic_store_n(&job->asleep, 1u, __ATOMIC_SEQ_CST);
      while ((left = __atomic_load_n(&job->left, __ATOMIC_SEQ_CST)) != 0) Sleep(&job->left, left);
    }
  }
}

int Alone(ParallelTask task, void* data, int count) {
  ParallelGroup group = {nullptr, count};
  for (int index = 0; index < count; ++index) {
    if (int status = task(index, &group, data)) return status;
  }
  return 0;
}

}  // namespace

extern "C" {

void graphwright_pool_use(int threads) {
  threads_of_caller = threads < 1 ? 1 : threads > kMaxThreads ? kMaxThreads : threads;
}

int graphwright_pool_launch(ParallelTask task, void* data, int asked) {
  int count = asked > 0 ? asked : threads_of_caller;
  if (count > kMaxThreads || threads_of_caller == 1) return Alone(task, data, count);
  Job* job = count > 1 ? TakeJob() : nullptr;
  if (job == nullptr) return Alone(task, data, count);
  uint32_t helpers = static_cast<uint32_t>(count) - 1;
  uint32_t demand = __atomic_add_fetch(&wanted, helpers, __ATOMIC_SEQ_CST);
  uint32_t most = helpers > processors ? helpers : processors;
  if (most > kMaxThreads - 1) most = kMaxThreads - 1;
  if (demand < most) most = demand;
  if (Load(&workers) < most) Start(most);

  uint64_t number = job->number + 2;
  job->task = task;
  job->data = data;
  job->count = static_cast<uint32_t>(count);
  job->error = nullptr;
  __atomic_store_n(&job->asleep, 0u, __ATOMIC_RELAXED);
  __atomic_store_n(&job->left, helpers, __ATOMIC_RELAXED);
  job->claims[0] = number + 1;
  for (int index = 1; index < count; ++index) Store(&job->claims[index], number);
  Store(&job->number, number);
  __atomic_add_fetch(&posted, 1, __ATOMIC_SEQ_CST);
  for (uint32_t index = 1; index <= most; ++index) {
    uint32_t* asleep = &crew[index].asleep;
    if (__atomic_load_n(asleep, __ATOMIC_SEQ_CST) && Swap(asleep, 1u, 0u)) Wake(asleep);
  }

  Run(job, 0);
  for (int index = 1; index < count; ++index) {
    if (!Claim(job, static_cast<uint32_t>(index), number)) continue;
    Run(job, static_cast<uint32_t>(index));
    __atomic_sub_fetch(&job->left, 1, __ATOMIC_SEQ_CST);
  }
  Await(job);
  __atomic_sub_fetch(&wanted, helpers, __ATOMIC_SEQ_CST);
  TVMFFIObjectHandle error = job->error;
  Store(&job->busy, 0u);
  if (error == nullptr) return 0;
  TVMFFIErrorSetRaised(error);
  TVMFFIObjectDecRef(error);
  return -1;
}

void* graphwright_pool_take(int, int, uint64_t size, int, int) {
  Memory* memory = MemoryOfThread();
  void* at = memory == nullptr || size > PTRDIFF_MAX ? nullptr : Take(memory, size == 0 ? 1 : size);
  if (at == nullptr) TVMFFIErrorSetRaisedFromCStr("MemoryError", "no memory for a kernel to work in");
  return at;
}

int graphwright_pool_give_back(int, int, void* at) {
  if (memory_of_thread != nullptr) {
    for (Block& block : memory_of_thread->blocks) {
      if (block.at != at) continue;
      block.used = false;
      if (block.size <= kLargest) return 0;
      block = {};
      break;
    }
  }
  free(at);
  return 0;
}

int graphwright_pool_adopt(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) return -1;
  bool fits = dlsym(library, "__TVMBackendParallelBarrier") == nullptr;
  auto take_over = [library, fits](const char* name, void* ours) {
    auto* own = static_cast<void**>(dlsym(library, name));
    if (fits && own != nullptr) Store(own, ours);
  };
  take_over("__TVMBackendParallelLaunch", reinterpret_cast<void*>(graphwright_pool_launch));
  take_over("__TVMBackendAllocWorkspace", reinterpret_cast<void*>(graphwright_pool_take));
  take_over("__TVMBackendFreeWorkspace", reinterpret_cast<void*>(graphwright_pool_give_back));
  dlclose(library);
  return fits ? 0 : -1;
}
}
