// The types of tensors' elements, and their conversion to and from the type in which they are computed.
#pragma once

#include "cpu/simd.h"

namespace topn_gating::cpu::TOPN_LEVEL {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
using ComputeType = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls f with a null pointer whose type is the element type.
template <class F>
void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::F32: return f(static_cast<float*>(nullptr));
    case DType::F64: return f(static_cast<double*>(nullptr));
    case DType::BF16: return f(static_cast<BFloat16*>(nullptr));
    case DType::F16: return f(static_cast<Float16*>(nullptr));
  }
}

using Halves = Vector<uint16_t, width<float>>;
using Words = Vector<uint32_t>;

// Convert between floats and the 16-bit elements in the lower halves of words. `encode` rounds to nearest, ties to even. The
// unused pointer selects the element type.
TOPN_INLINE Floats decode(const BFloat16*, Words half) { return (Floats)(half << 16); }
TOPN_INLINE Floats decode(const Float16*, Words half) {
  const Words magnitude = (half & 0x7fffu) << 13;
  // The factor 2^112 changes the exponent's bias and makes denormals normal; infinity and NaN keep the highest exponent.
  const Floats moved = (Floats)magnitude * 5.192296858534828e33f;
  const Words special = magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : (Words)moved;
  return (Floats)(special | ((half & 0x8000u) << 16));
}
TOPN_INLINE Words encode(const BFloat16*, Floats v) {
  const Words bits = (Words)v;
  return (v == v ? bits + 0x7fffu + ((bits >> 16) & 1u) : bits | 0x400000u) >> 16;
}
TOPN_INLINE Words encode(const Float16*, Floats v) {
  const Words bits = (Words)v;
  const Words sign = (bits >> 16) & 0x8000u;
  const Words magnitude = bits & 0x7fffffffu;
  const Words normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14, adding 0.5 rounds the number and leaves the denormal of the 16-bit type in the low bits.
  const Words denormal = (Words)((Floats)magnitude + 0.5f) - 0x3f000000u;
  Words half = magnitude < 0x38800000u ? denormal : normal;
  half = magnitude >= 0x477ff000u ? Words{} + 0x7c00u : half;  // 65520 and above round to infinity
  half = magnitude > 0x7f800000u ? Words{} + 0x7e00u : half;
  return half | sign;
}

// Load a vector of the compute type from elements at p; convert one to elements of the type that p points to; and store one.
template <class T>
TOPN_INLINE Floats load_elements(const T* p) {
  return decode(p, __builtin_convertvector(load<Halves>(p), Words));
}
TOPN_INLINE Floats load_elements(const float* p) { return load<Floats>(p); }
TOPN_INLINE Doubles load_elements(const double* p) { return load<Doubles>(p); }
template <class T>
TOPN_INLINE Halves to_elements(const T* p, Floats v) {
  return __builtin_convertvector(encode(p, v), Halves);
}
TOPN_INLINE Floats to_elements(const float*, Floats v) { return v; }
TOPN_INLINE Doubles to_elements(const double*, Doubles v) { return v; }
template <class T, class V>
TOPN_INLINE void store_elements(T* p, V v) {
  store(p, to_elements(p, v));
}

template <class T>
TOPN_INLINE ComputeType<T> load_element(const T* p) {
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
    return *p;
  } else {
    T padded[width<float>] = {*p};
    return load_elements(padded)[0];
  }
}
template <class T>
TOPN_INLINE void store_element(T* p, ComputeType<T> value) {
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
    *p = value;
  } else {
    T padded[width<float>];
    store_elements(padded, Floats{} + value);
    *p = padded[0];
  }
}

// Loads vector v of the `count` elements at p, converted to R; zeros past the last one.
template <class R, class T>
TOPN_INLINE Vector<R> load_padded(const T* p, int v, int64_t count) {
  constexpr int w = width<R>;
  const int64_t left = count - v * w;
  if (left >= w) return load_elements(p + v * w);
  T padded[w] = {};
  if (left > 0) std::memcpy(padded, p + v * w, left * sizeof(T));
  return load_elements(padded);
}
// Stores vector v of the `count` elements at p; nothing past the last one.
template <class T, class V>
TOPN_INLINE void store_padded(T* p, int v, int64_t count, V values) {
  constexpr int w = width<ComputeType<T>>;
  const int64_t left = count - v * w;
  if (left >= w) return store_elements(p + v * w, values);
  T padded[w];
  store_elements(padded, values);
  if (left > 0) std::memcpy(p + v * w, padded, left * sizeof(T));
}

// Converts `count` elements.
template <class R, class T>
void convert(const T* from, int64_t count, R* to) {
  if constexpr (std::is_same_v<R, T>) {
    std::memcpy(to, from, count * sizeof(R));
  } else {
    for (int64_t i = 0; i < count; i += width<R>) store_padded(to + i, 0, count - i, load_padded<R>(from + i, 0, count - i));
  }
}

}  // namespace topn_gating::cpu::TOPN_LEVEL
