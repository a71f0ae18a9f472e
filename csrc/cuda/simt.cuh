// Launches and warp operations: kernels include no other header of CUDA. nvcc compiles them for the GPU; g++, with the
// emulator's header (simt) in place of the CUDA runtime, for a run on the CPU.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/launch.cuh"
#include "inline.h"

#ifndef TOPN_SIMT_HOST
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// Parameters with which a wrapper of a warp operation tells the emulator where it was called.
#define SIMT_CALLER
#define SIMT_PASS
#define SIMT_BLOCK_THREADS 256  // threads of a block, where a kernel does not need a particular number; the emulator has fewer
// Declares the block's dynamic shared memory as an array of T.
#define SIMT_DYN_SMEM(T, name)                  \
  extern __shared__ uint4 simt_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(simt_dynamic_shared)
#endif

namespace topn_gating::cuda {

constexpr unsigned kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

#ifndef TOPN_SIMT_HOST
// Waits until all earlier kernels of the stream have ended and their writes are visible. Every thread of a dependent launch
// calls it once, before it accesses global memory, on every path: whatever follows in the stream waits for this kernel alone.
__device__ __forceinline__ void wait_for_stream() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel of the stream start, if it is a dependent launch, once all blocks of this one have called this or ended.
// So none of these still needs room on the device, and the next kernel can only wait for them: nothing depends on the call.
__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// A barrier for all threads of a cooperative launch.
__device__ __forceinline__ void sync_grid() { cooperative_groups::this_grid().sync(); }

// A barrier for all threads of a cluster.
__device__ __forceinline__ void sync_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#endif
}

// Returns where block `rank` of the cluster has what this block has at an address in shared memory.
template <class T>
__device__ __forceinline__ T* in_block_of_cluster(T* address, [[maybe_unused]] unsigned rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(address, int(rank));
#else
  return address;
#endif
}
#else
__device__ __forceinline__ void sync_grid() { simt_grid_sync(); }
__device__ __forceinline__ void sync_cluster() { simt_cluster_sync(); }
__device__ __forceinline__ void wait_for_stream() { simt_wait_for_stream(); }
__device__ __forceinline__ void let_next_start() {}

template <class T>
__device__ __forceinline__ T* in_block_of_cluster(T* address, unsigned rank) {
  return static_cast<T*>(::simt::shared_of(address, rank));
}
#endif

__device__ __forceinline__ unsigned lane_id() { return threadIdx.x % kWarp; }
__device__ __forceinline__ unsigned warp_id() { return threadIdx.x / kWarp; }

// Exchanges between the threads of a warp, all of which must take part. Exchanges stay inside groups of `width` neighbouring
// threads.
template <class T>
__device__ __forceinline__ T shuffle(T value, int lane, int width = kWarp SIMT_CALLER) {
  return __shfl_sync(kAllLanes, value, lane, width SIMT_PASS);
}
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask SIMT_CALLER) {
  return __shfl_xor_sync(kAllLanes, value, mask, kWarp SIMT_PASS);
}
template <class T>
__device__ __forceinline__ T shuffle_up(T value, int by SIMT_CALLER) {
  return __shfl_up_sync(kAllLanes, value, by, kWarp SIMT_PASS);
}
__device__ __forceinline__ unsigned ballot(bool vote SIMT_CALLER) { return __ballot_sync(kAllLanes, vote SIMT_PASS); }
// Returns the mask of the lanes that have the caller's value.
__device__ __forceinline__ unsigned match(unsigned value SIMT_CALLER) { return __match_any_sync(kAllLanes, value SIMT_PASS); }
__device__ __forceinline__ int warp_max(int value SIMT_CALLER) { return __reduce_max_sync(kAllLanes, value SIMT_PASS); }
__device__ __forceinline__ unsigned warp_max(unsigned value SIMT_CALLER) {
  return __reduce_max_sync(kAllLanes, value SIMT_PASS);
}
__device__ __forceinline__ int warp_add(int value SIMT_CALLER) { return __reduce_add_sync(kAllLanes, value SIMT_PASS); }
__device__ __forceinline__ unsigned lanes_below() { return (1u << lane_id()) - 1u; }

// Returns the sum over a warp in every lane, by a butterfly reduction: the order is fixed.
template <class T>
__device__ __forceinline__ T warp_sum(T value SIMT_CALLER) {
  TOPN_UNROLL
  for (int by = kWarp / 2; by > 0; by /= 2) value += shuffle_xor(value, by SIMT_PASS);
  return value;
}

// Returns the sum over the warp's lanes up to this one.
template <class T>
__device__ __forceinline__ T warp_scan(T value SIMT_CALLER) {
  for (unsigned by = 1; by < kWarp; by *= 2) {
    const T lower = shuffle_up(value, int(by) SIMT_PASS);
    if (lane_id() >= by) value += lower;
  }
  return value;
}

// Returns the sum of one value for each warp of the block, `stride` elements apart, in the order of the warps.
template <class T>
__device__ __forceinline__ T sum_warps(const T* values, unsigned stride = 1) {
  T sum{};
  for (unsigned w = 0; w < blockDim.x / kWarp; ++w) sum += values[w * stride];
  return sum;
}

// Returns a counter's value and increments it. Whatever a block wrote before its call is visible to a block that gets a larger
// value: the block that gets the largest sees what all have written.
__device__ __forceinline__ unsigned next_ticket(unsigned* counter) {
#ifdef TOPN_SIMT_HOST
  return simt_ticket(counter);
#else
  __threadfence();
  const unsigned number = atomicAdd(counter, 1u);
  __threadfence();
  return number;
#endif
}

// Tells tests on the emulator that rare code runs.
__device__ __forceinline__ void count_event() {
#ifdef TOPN_SIMT_HOST
  simt_event();
#endif
}

// Keeps a value in its register: the compiler must not compute it again in a loop. Pointers are to global memory.
template <class T>
__device__ __forceinline__ void keep([[maybe_unused]] T& value) {
#ifndef TOPN_SIMT_HOST
  if constexpr (std::is_pointer_v<T>) {
    asm volatile("" : "+l"(value));
    __builtin_assume(__isGlobal(value));
  } else if constexpr (std::is_floating_point_v<T>) {
    asm volatile("" : "+f"(value));
  } else {
    asm volatile("" : "+r"(value));
  }
#endif
}

// Returns the larger number, in one instruction; of a number and a NaN, the number.
__device__ __forceinline__ float larger(float a, float b) {
#ifdef TOPN_SIMT_HOST
  return max(a, b);
#else
  return fmaxf(a, b);
#endif
}

// Returns the bytes of two numbers that a selector names, as the intrinsic __byte_perm does.
__device__ __forceinline__ unsigned select_bytes(unsigned low, unsigned high, unsigned selector) {
#ifdef TOPN_SIMT_HOST
  const uint64_t both = uint64_t(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= unsigned(both >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return result;
#else
  return __byte_perm(low, high, selector);
#endif
}

// Returns a / b for 0 <= a < 2^52 and 0 < b < 2^52. The division of 64-bit integers is a function call, around which a kernel
// would have to save its registers.
TOPN_INLINE int64_t quotient(int64_t a, int64_t b) {
#ifdef __CUDA_ARCH__
  const float estimate = __fdividef(1.0f, float(b));
#else
  const float estimate = 1.0f / float(b);
#endif
  const double divisor = double(b);
  double reciprocal = double(estimate);
  reciprocal = reciprocal * (2.0 - divisor * reciprocal);
  reciprocal = reciprocal * (2.0 - divisor * reciprocal);
  const int64_t q = int64_t(double(a) * reciprocal), rest = a - q * b;
  return rest < 0 ? q - 1 : rest >= b ? q + 1 : q;
}

// Stores a value that is not read soon: its cache line is evicted first.
__device__ __forceinline__ void store_streaming(uint4* to, uint4 value) { __stcs(to, value); }

}  // namespace topn_gating::cuda
