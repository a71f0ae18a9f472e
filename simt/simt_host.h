// The part of CUDA that kernels use, for g++ to compile them to run on the host: every thread is a fiber, and warp operations
// and barriers call the scheduler (scheduler.h), which checks them.
#pragma once

#include "simt_control.h"
#include "simt_types.h"

#ifndef SIMT_BLOCK_THREADS
#define SIMT_BLOCK_THREADS 64  // threads of a block, for kernels that run with any number of them
#endif

// The indices of the running thread and the sizes of its launch.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge = 720,
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
                      cudaDevAttrClusterLaunch = 120 };
using cudaStream_t = struct CUstream_st*;

const char* cudaGetErrorString(cudaError_t);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device);

namespace simt {

enum class Op : unsigned char {
  ShuffleIndex, ShuffleUp, ShuffleDown, ShuffleXor, Ballot, Any, All, Match,
  Add, MinInt, MinUnsigned, MaxInt, MaxUnsigned, SyncWarp,
  SyncThreads, SyncThreadsOr, SyncThreadsCount, SyncGrid, SyncCluster, WaitForStream,
};

// Waits until every lane of the mask has called the same operation from the same place; returns the running thread's result.
uint64_t meet_warp(Op, unsigned mask, uint64_t value, int argument, int width, const char* file, int line);
// Waits for all threads of the block; returns the result of __syncthreads_or and __syncthreads_count.
int meet_block(Op, int predicate, const char* file, int line);
// Waits for all threads of the grid.
void meet_grid(const char* file, int line);
// Waits for all threads of the running thread's cluster.
void meet_cluster(const char* file, int line);
// Waits for the kernels before this one; each thread of a dependent launch must do so once.
void wait_for_stream(const char* file, int line);
// Returns where block `rank` of the running thread's cluster has what the running thread's block has at an address.
void* shared_of(void* address, unsigned rank);

extern void* shared_memory;  // dynamic shared memory of the running thread's block

struct Request {
  const char* kernel;              // name, for reports
  void (*body)(const void* call);  // runs one thread: calls the kernel
  const void* call;                // argument of body: the kernel and its arguments
  size_t call_bytes;
  uint64_t grid, block;            // blocks, and threads of a block
  size_t shared_bytes;
  bool cooperative;
  unsigned cluster;  // blocks of a cluster; 0: the launch has no clusters
  bool dependent;    // whether the kernel may start while the one before it runs
};
// Runs a kernel and returns when it has ended.
cudaError_t launch(const Request&);

// Keeps a parameter out of template argument deduction.
template <class T>
struct Same {
  using Type = T;
};

template <class Args>
cudaError_t launch(const char* name, void (*kernel)(Args), uint64_t grid, uint64_t block, size_t shared_bytes, cudaStream_t,
                   const typename Same<Args>::Type& args, bool cooperative, unsigned cluster = 0, bool dependent = false) {
  static_assert(__is_trivially_copyable(Args));
  struct Call {
    void (*kernel)(Args);
    Args args;
  };
  const Call call{kernel, args};
  const auto body = [](const void* call) { static_cast<const Call*>(call)->kernel(static_cast<const Call*>(call)->args); };
  return launch({name, body, &call, sizeof call, grid, block, shared_bytes, cooperative, cluster, dependent});
}

// Returns the bytes of a value of at most 8 bytes, followed by zeros.
template <class T>
inline uint64_t to_bits(T value) {
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof value);
  return bits;
}

// Returns the value whose bytes to_bits gave.
template <class T>
inline T from_bits(uint64_t bits) {
  T value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace simt

#define SIMT_DYN_SMEM(T, name) T* const name = static_cast<T*>(::simt::shared_memory)
#define SIMT_LAUNCH(kernel, grid, block, smem, stream, args) \
  ::simt::launch(#kernel, kernel, grid, block, smem, stream, args, false)
#define SIMT_LAUNCH_COOPERATIVE(kernel, grid, block, smem, stream, args) \
  ::simt::launch(#kernel, kernel, grid, block, smem, stream, args, true)
// The two below are dependent launches.
#define SIMT_LAUNCH_DEPENDENT(kernel, grid, block, smem, stream, args) \
  ::simt::launch(#kernel, kernel, grid, block, smem, stream, args, false, 0, true)
#define SIMT_LAUNCH_CLUSTERS(kernel, grid, cluster, block, smem, stream, args) \
  ::simt::launch(#kernel, kernel, grid, block, smem, stream, args, false, cluster, true)

// A function that wraps one of the operations below declares SIMT_CALLER after its last parameter and passes SIMT_PASS after
// the last argument, so that reports name the line of its caller, and calls from different lines count as different operations.
#define SIMT_CALLER , const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define SIMT_PASS , file, line
#define SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

#define SIMT_SHUFFLE(T, name, Argument, op)                                                                 \
  inline T name(unsigned mask, T value, Argument argument, int width = 32, SIMT_SITE) {                     \
    return simt::from_bits<T>(simt::meet_warp(op, mask, simt::to_bits(value), int(argument), width, file, line)); \
  }
#define SIMT_EXCHANGE(T)                                           \
  SIMT_SHUFFLE(T, __shfl_sync, int, simt::Op::ShuffleIndex)        \
  SIMT_SHUFFLE(T, __shfl_up_sync, unsigned, simt::Op::ShuffleUp)   \
  SIMT_SHUFFLE(T, __shfl_down_sync, unsigned, simt::Op::ShuffleDown) \
  SIMT_SHUFFLE(T, __shfl_xor_sync, int, simt::Op::ShuffleXor)      \
  inline unsigned __match_any_sync(unsigned mask, T value, SIMT_SITE) { \
    return unsigned(simt::meet_warp(simt::Op::Match, mask, simt::to_bits(value), 0, 32, file, line)); \
  }
SIMT_EXCHANGE(int)
SIMT_EXCHANGE(unsigned)
SIMT_EXCHANGE(long)
SIMT_EXCHANGE(unsigned long)
SIMT_EXCHANGE(long long)
SIMT_EXCHANGE(unsigned long long)
SIMT_EXCHANGE(float)
SIMT_EXCHANGE(double)
#undef SIMT_EXCHANGE
#undef SIMT_SHUFFLE

#define SIMT_WARP(Result, name, Value, op)                                                   \
  inline Result name(unsigned mask, Value value, SIMT_SITE) {                                \
    return Result(simt::meet_warp(op, mask, simt::to_bits(value), 0, 32, file, line)); \
  }
SIMT_WARP(unsigned, __ballot_sync, int, simt::Op::Ballot)
SIMT_WARP(int, __any_sync, int, simt::Op::Any)
SIMT_WARP(int, __all_sync, int, simt::Op::All)
SIMT_WARP(int, __reduce_add_sync, int, simt::Op::Add)
SIMT_WARP(int, __reduce_min_sync, int, simt::Op::MinInt)
SIMT_WARP(int, __reduce_max_sync, int, simt::Op::MaxInt)
SIMT_WARP(unsigned, __reduce_add_sync, unsigned, simt::Op::Add)
SIMT_WARP(unsigned, __reduce_min_sync, unsigned, simt::Op::MinUnsigned)
SIMT_WARP(unsigned, __reduce_max_sync, unsigned, simt::Op::MaxUnsigned)
#undef SIMT_WARP

inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_SITE) {
  simt::meet_warp(simt::Op::SyncWarp, mask, 0, 0, 32, file, line);
}
inline void __syncthreads(SIMT_SITE) { simt::meet_block(simt::Op::SyncThreads, 0, file, line); }
inline int __syncthreads_or(int predicate, SIMT_SITE) {
  return simt::meet_block(simt::Op::SyncThreadsOr, predicate, file, line);
}
inline int __syncthreads_count(int predicate, SIMT_SITE) {
  return simt::meet_block(simt::Op::SyncThreadsCount, predicate, file, line);
}
inline void simt_grid_sync(SIMT_SITE) { simt::meet_grid(file, line); }
inline void simt_cluster_sync(SIMT_SITE) { simt::meet_cluster(file, line); }
inline void simt_wait_for_stream(SIMT_SITE) { simt::wait_for_stream(file, line); }
#undef SIMT_SITE

// Do nothing: one thread runs at a time.
inline void __threadfence() {}
inline void __threadfence_block() {}

// Atomics are relaxed, as on the GPU: they order no other accesses. Floats have none, since sums would depend on the schedule.
#define SIMT_ATOMICS(T)                                                                              \
  inline T atomicAdd(T* p, T v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }               \
  SIMT_ORDERED_ATOMICS(T)
#define SIMT_ORDERED_ATOMICS(T)                                                                      \
  inline T atomicExch(T* p, T v) { return __atomic_exchange_n(p, v, __ATOMIC_RELAXED); }             \
  inline T atomicCAS(T* p, T expected, T v) {                                                        \
    __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);         \
    return expected;                                                                                 \
  }                                                                                                  \
  inline T atomicMin(T* p, T v) {                                                                    \
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);                                                    \
    while (!__atomic_compare_exchange_n(p, &old, v < old ? v : old, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {} \
    return old;                                                                                      \
  }                                                                                                  \
  inline T atomicMax(T* p, T v) {                                                                    \
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);                                                    \
    while (!__atomic_compare_exchange_n(p, &old, old < v ? v : old, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {} \
    return old;                                                                                      \
  }
SIMT_ATOMICS(int)
SIMT_ATOMICS(unsigned)
SIMT_ATOMICS(unsigned long long)
SIMT_ORDERED_ATOMICS(long long)
#undef SIMT_ATOMICS
#undef SIMT_ORDERED_ATOMICS

// Returns what stands for cudaOccupancyMaxActiveClusters: whether the device has room for a cluster.
bool simt_has_room_for_cluster();

// Counts an event for tests: simt_control.h.
void simt_event();

// Adds 1 to the counter and returns its value before. Accesses before an earlier caller's ticket are visible after this one.
inline unsigned simt_ticket(unsigned* counter) { return __atomic_fetch_add(counter, 1u, __ATOMIC_ACQ_REL); }
