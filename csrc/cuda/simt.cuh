// Launches, and what the threads of a warp do together: the only header of the device that kernels include. nvcc compiles it
// for the GPU; g++, with the host header of simt in place of the CUDA runtime, for a run on the CPU.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/runtime.h"
#include "inline.h"

#ifndef TOPN_SIMT_HOST
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// A wrapper of a warp operation hands its caller's place in the source to the host run.
#define SIMT_CALLER
#define SIMT_PASS
#define SIMT_BLOCK_THREADS 256  // of kernels that may choose; the host run takes fewer
// A block's dynamic shared memory as an array of T.
#define SIMT_DYN_SMEM(T, name)                  \
  extern __shared__ uint4 simt_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(simt_dynamic_shared)
#define SIMT_LAUNCH(kernel, grid, block, smem, stream, args) \
  ::topn_gating::cuda::launch(kernel, grid, block, smem, stream, args, false)
// All blocks run at once, so that `sync_grid` can join them.
#define SIMT_LAUNCH_COOPERATIVE(kernel, grid, block, smem, stream, args) \
  ::topn_gating::cuda::launch(kernel, grid, block, smem, stream, args, true)
#endif

namespace topn_gating::cuda {

constexpr unsigned kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kDefaultShared = 48 << 10;  // bytes of shared memory that a kernel gets without asking

#ifndef TOPN_SIMT_HOST
template <class Args>
cudaError_t launch(void (*kernel)(Args), unsigned grid, unsigned block, size_t smem, cudaStream_t stream, Args args,
                   bool cooperative) {
  if (smem > kDefaultShared) {
    const cudaError_t refused =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, int(smem));
    if (refused != cudaSuccess) return refused;
  }
  void* parameters[] = {&args};
  const void* function = reinterpret_cast<const void*>(kernel);
  return cooperative ? cudaLaunchCooperativeKernel(function, dim3(grid), dim3(block), parameters, smem, stream)
                     : cudaLaunchKernel(function, dim3(grid), dim3(block), parameters, smem, stream);
}

// Every thread of every block of a cooperative launch waits for all the others.
__device__ __forceinline__ void sync_grid() { cooperative_groups::this_grid().sync(); }
#else
__device__ __forceinline__ void sync_grid() { simt_grid_sync(); }
#endif

// An attribute of the current device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 1;
  if (cudaGetDevice(&device) == cudaSuccess) cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

__device__ __forceinline__ unsigned lane_id() { return threadIdx.x % kWarp; }
__device__ __forceinline__ unsigned warp_id() { return threadIdx.x / kWarp; }

// Exchanges between the threads of a warp, all of which must come; `width` threads side by side make a group.
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
// The lanes whose value is the caller's.
__device__ __forceinline__ unsigned match(unsigned value SIMT_CALLER) { return __match_any_sync(kAllLanes, value SIMT_PASS); }
__device__ __forceinline__ int warp_max(int value SIMT_CALLER) { return __reduce_max_sync(kAllLanes, value SIMT_PASS); }
__device__ __forceinline__ unsigned warp_max(unsigned value SIMT_CALLER) {
  return __reduce_max_sync(kAllLanes, value SIMT_PASS);
}
__device__ __forceinline__ int warp_add(int value SIMT_CALLER) { return __reduce_add_sync(kAllLanes, value SIMT_PASS); }
__device__ __forceinline__ unsigned lanes_below() { return (1u << lane_id()) - 1u; }

// The sum over a warp, in a fixed order, in every lane.
template <class T>
__device__ __forceinline__ T warp_sum(T value SIMT_CALLER) {
  TOPN_UNROLL
  for (int by = kWarp / 2; by > 0; by /= 2) value += shuffle_xor(value, by SIMT_PASS);
  return value;
}

// The sum of what the warps of a block have left, a value each, `stride` apart: in their order, by whoever asks.
template <class T>
__device__ __forceinline__ T sum_warps(const T* values, unsigned stride = 1) {
  T sum{};
  for (unsigned w = 0; w < blockDim.x / kWarp; ++w) sum += values[w * stride];
  return sum;
}

// Takes a number of a counter that starts at 0. What a block wrote before it took its number is seen by whoever takes a
// later one: the block that takes the last number sees what all have written.
__device__ __forceinline__ unsigned take_ticket(unsigned* counter) {
#ifdef TOPN_SIMT_HOST
  return simt_ticket(counter);
#else
  __threadfence();
  const unsigned number = atomicAdd(counter, 1u);
  __threadfence();
  return number;
#endif
}

// a / b for 0 <= a < 2^52 and 0 < b < 2^52, without the call that a division of 64-bit integers is, around which a kernel
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

// Stores that no one reads soon: they leave the caches first.
__device__ __forceinline__ void store_streaming(uint4* to, uint4 value) { __stcs(to, value); }

}  // namespace topn_gating::cuda
