// The thread pool that compiled kernels run on, in place of TVM's.
//
// A kernel is launched as a number of tasks. The caller runs the first, threads of the pool take the others, and what
// none of them has begun when the caller is done with its own the caller does as well: where other programs keep the
// processors busy, a launch on several threads is no slower than one on a single thread, but for tasks that a thread
// has begun and was interrupted in. A thread that finds nothing to do looks for work for 0.1 ms, giving its processor
// to nobody, and then sleeps.

#ifndef GRAPHWRIGHT_RUNTIME_NATIVE_POOL_H_
#define GRAPHWRIGHT_RUNTIME_NATIVE_POOL_H_

#include <stdint.h>

extern "C" {

// TVMParallelGroupEnv and FTVMParallelLambda of tvm/runtime/c_backend_api.h.
struct ParallelGroup {
  void* sync_handle;
  int32_t num_task;
};
typedef int (*ParallelTask)(int task, ParallelGroup* group, void* data);

// The threads of launches from the calling thread, itself included; at first one.
void graphwright_pool_use(int threads);

// TVMBackendParallelLaunch: `count` tasks, or as many as there are threads where it is 0. Returns 0, or -1 when a task
// failed, whose error is then the one that is raised in the calling thread.
int graphwright_pool_launch(ParallelTask task, void* data, int count);

// TVMBackendAllocWorkspace and TVMBackendFreeWorkspace: memory of the calling thread, which gives it back itself. TVM's
// own throws where there is none, which ends the process if it happens in a thread of the pool; this one returns null,
// and the kernel that asked ends with an error.
void* graphwright_pool_take(int device_type, int device, uint64_t size, int type_code, int type_bits);
int graphwright_pool_give_back(int device_type, int device, void* at);

// Let the kernels of a library that TVM has loaded launch here and work in memory from here, from their first run on.
// Returns 0, or -1 where that cannot be: the library is not loaded, or its tasks wait for each other.
int graphwright_pool_adopt(const char* path);
}

#endif  // GRAPHWRIGHT_RUNTIME_NATIVE_POOL_H_
