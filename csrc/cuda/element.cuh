// Element types of tensors, the types in which they are computed, and vectorised loads and stores of 16 bytes.
#pragma once

#include "cuda/simt.cuh"
#include "router.h"

namespace topn_gating::cuda {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

template <class T>
using ComputeType = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ float to_compute(float v) { return v; }
__device__ __forceinline__ double to_compute(double v) { return v; }
__device__ __forceinline__ float to_compute(BFloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_compute(Float16 v) { return __half2float(v); }

// Rounds to nearest, ties to even.
template <class T>
__device__ __forceinline__ T from_compute(ComputeType<T> v) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return __float2bfloat16_rn(v);
  } else if constexpr (std::is_same_v<T, Float16>) {
    return __float2half_rn(v);
  } else {
    return v;
  }
}

// Calls f with a null pointer whose type is the element type.
template <class F>
cudaError_t with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::F32: return f(static_cast<float*>(nullptr));
    case DType::F64: return f(static_cast<double*>(nullptr));
    case DType::BF16: return f(static_cast<BFloat16*>(nullptr));
    case DType::F16: return f(static_cast<Float16*>(nullptr));
  }
  return cudaErrorInvalidValue;
}

// Contiguous elements that are loaded and stored at once: 16 bytes of them where rows are aligned to 16 bytes, or one.
template <class T, int Count>
struct alignas(sizeof(T) * Count) Pack {
  T v[Count];
};
template <class T>
constexpr int kPackSize = 16 / int(sizeof(T));  // elements of 16 bytes

// Returns whether all rows are aligned to 16 bytes: `rows` are the addresses of the first ones, and others follow without gaps.
template <class... Pointers>
bool is_aligned16(int64_t row_bytes, Pointers... rows) {
  const uintptr_t bits = uintptr_t(row_bytes) | (uintptr_t(0) | ... | reinterpret_cast<uintptr_t>(rows));
  return bits % 16 == 0;
}

// Load and store 16 bytes in one instruction, which the compiler might split for a struct of small members.
template <class T, int Count>
__device__ __forceinline__ Pack<T, Count> load_pack(const T* from) {
  Pack<T, Count> pack;
  if constexpr (sizeof pack == 16) {
    const uint4 bits = *reinterpret_cast<const uint4*>(from);
    memcpy(&pack, &bits, sizeof pack);
  } else {
    pack.v[0] = *from;
    static_assert(Count == 1);
  }
  return pack;
}
template <class T, int Count>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, Count>& pack) {
  if constexpr (sizeof pack == 16) {
    uint4 bits;
    memcpy(&bits, &pack, sizeof bits);
    *reinterpret_cast<uint4*>(to) = bits;
  } else {
    *to = pack.v[0];
    static_assert(Count == 1);
  }
}

// Returns the smallest integer that is not below count / size.
template <class T>
constexpr T ceil_div(T count, T size) {
  return (count + size - 1) / size;
}

// Returns the grid of a kernel with grid-stride loops: `blocks`, but no more than keep the device busy.
inline unsigned grid_of(int64_t blocks) {
  const int64_t most = 32 * int64_t(device_attribute(cudaDevAttrMultiProcessorCount));
  return unsigned(blocks < 1 ? 1 : blocks < most ? blocks : most);
}

}  // namespace topn_gating::cuda
