// Element types of tensors, and their elements to and from the type they are computed in.
#pragma once

#include "cpu/simd.h"

namespace TOPN_NAMESPACE {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
using RealOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls f with a null pointer to the element type.
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

// Floats of the 16 bits in the lower halves of words, and back: rounded to nearest, ties to even, in the lower halves.
TOPN_INLINE Floats decode(const BFloat16*, Words half) { return (Floats)(half << 16); }
TOPN_INLINE Floats decode(const Float16*, Words half) {
  const Words magnitude = (half & 0x7fffu) << 13;
  // Times 2^112 moves the exponent's bias, and makes denormals normal on the way; infinity and NaN keep the top exponent.
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
  // Below 2^-14: adding 0.5 leaves the half's denormal in the low bits, rounded by the addition.
  const Words denormal = (Words)((Floats)magnitude + 0.5f) - 0x3f000000u;
  Words half = magnitude < 0x38800000u ? denormal : normal;
  half = magnitude >= 0x477ff000u ? Words{} + 0x7c00u : half;  // 65520 and above round to infinity
  half = magnitude > 0x7f800000u ? Words{} + 0x7e00u : half;
  return half | sign;
}

// A vector of what is computed in from that many elements, and the elements of one, for the memory that the pointer is to.
template <class T>
TOPN_INLINE Floats load_real(const T* p) {
  return decode(p, __builtin_convertvector(load<Halves>(p), Words));
}
TOPN_INLINE Floats load_real(const float* p) { return load<Floats>(p); }
TOPN_INLINE Doubles load_real(const double* p) { return load<Doubles>(p); }
template <class T>
TOPN_INLINE Halves elements(const T* p, Floats v) {
  return __builtin_convertvector(encode(p, v), Halves);
}
TOPN_INLINE Floats elements(const float*, Floats v) { return v; }
TOPN_INLINE Doubles elements(const double*, Doubles v) { return v; }
template <class T, class V>
TOPN_INLINE void store_real(T* p, V v) {
  store(p, elements(p, v));
}

template <class T>
TOPN_INLINE RealOf<T> load_one(const T* p) {
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
    return *p;
  } else {
    T padded[width<float>] = {*p};
    return load_real(padded)[0];
  }
}
template <class T>
TOPN_INLINE void store_one(T* p, RealOf<T> value) {
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
    *p = value;
  } else {
    T padded[width<float>];
    store_real(padded, Floats{} + value);
    *p = padded[0];
  }
}

}  // namespace TOPN_NAMESPACE
