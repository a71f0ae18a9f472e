// Element types of tensors, the types they are computed in, and 16 bytes of them at a time.
#pragma once

#include "cuda/simt.cuh"
#include "router.h"

namespace topn_gating::cuda {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

template <class T>
using RealOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ float to_real(float v) { return v; }
__device__ __forceinline__ double to_real(double v) { return v; }
__device__ __forceinline__ float to_real(BFloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_real(Float16 v) { return __half2float(v); }

// Rounds to nearest, ties to even.
template <class T>
__device__ __forceinline__ T from_real(RealOf<T> v) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return __float2bfloat16_rn(v);
  } else if constexpr (std::is_same_v<T, Float16>) {
    return __float2half_rn(v);
  } else {
    return v;
  }
}

// Calls f with a null pointer to the element type.
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

// Elements side by side: 16 bytes of them where rows are aligned to that, else one.
template <class T, int Count>
struct alignas(sizeof(T) * Count) Pack {
  T v[Count];
};
template <class T>
constexpr int kWide = 16 / int(sizeof(T));

// Whether rows of this size, one after another from these addresses on, can be read and written 16 bytes at a time.
template <class... Pointers>
bool is_wide(int64_t row_bytes, Pointers... rows) {
  const uintptr_t bits = uintptr_t(row_bytes) | (uintptr_t(0) | ... | reinterpret_cast<uintptr_t>(rows));
  return bits % 16 == 0;
}

// 16 bytes as one instruction, which a struct of small members may not become.
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

// Parts of `size` that make up `whole`.
template <class T>
constexpr T parts(T whole, T size) {
  return (whole + size - 1) / size;
}

// A grid for kernels whose threads go on to what is a grid further: blocks of `blocks`, as many as keep the device busy.
inline unsigned grid_of(int64_t blocks) {
  const int64_t most = 32 * int64_t(device_attribute(cudaDevAttrMultiProcessorCount));
  return unsigned(blocks < 1 ? 1 : blocks < most ? blocks : most);
}

}  // namespace topn_gating::cuda
