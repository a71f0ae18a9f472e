// Exponential, logarithms and square root in float, for a scalar or a SIMD vector V. Every backend computes the same bits, except
// where its compiler contracts a product and a sum into one instruction.
//
// `Bits` has static functions that reinterpret and convert V: as_int(V) and as_float(I) keep the bits, to_float(I) the value,
// where I has an int32_t for each float of V.
#pragma once

#include <cstdint>
#include <limits>

#include "inline.h"

namespace topn_gating {

// Moves the low bits of an integer to the place of a float's exponent. The integer may be anything where the float is NaN.
template <class I>
TOPN_INLINE I to_exponent(I n) {
  return n << 23;
}
TOPN_INLINE int32_t to_exponent(int32_t n) { return int32_t(uint32_t(n) << 23); }

// Returns exp(d + error) for d <= 0 or NaN, where |error| is much smaller than |d|: what the subtraction that gave d rounded
// away. It is within 2 ulp down to the smallest denormal: Cody-Waite reduction, then the Taylor series to the 7th order, whose
// remainder is below float's precision for |r| <= ln(2)/2.
template <class Bits, class V>
TOPN_INLINE V exp_float(V d, V error) {
  const V magic = V{} + 12582912.0f;  // 1.5 * 2^23: the sum with it is rounded to an integer, which its low bits hold
  error = d > -104.0f ? error : V{};
  d = d < -104.0f ? V{} - 104.0f : d;
  const V shifted = d * 1.44269504f + magic;
  const V n = shifted - magic;
  const V r = ((d - n * 0.693145752f) - n * 1.42860677e-6f) + error;
  V p = V{} + 1.98412698e-4f;
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = (p * r) * r + r;
  // 2^n in two factors, since 2^n itself may be denormal. The low bits of `shifted` hold n; those of `magic` are zero.
  const V scale = Bits::as_float(to_exponent(Bits::as_int(shifted)) + ((127 + 64) << 23));
  return ((p + 1.0f) * scale) * 5.42101086e-20f;  // 2^-64
}

// Returns the natural logarithm of a normal positive float, within 2 ulp: u = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)),
// then log(1 + f) = 2 atanh(f / (2 + f)).
template <class Bits, class V>
TOPN_INLINE V log_float(V u) {
  const auto bits = Bits::as_int(u) - 0x3f3504f3;
  const auto k = bits >> 23;
  const V f = Bits::as_float((bits & 0x007fffff) + 0x3f3504f3) - 1.0f;
  const V s = f / (f + 2.0f);
  const V s2 = s * s;
  V p = V{} + 0.2222222222f;  // 2/9
  p = p * s2 + 0.2857142857f;
  p = p * s2 + 0.4f;
  p = p * s2 + 0.6666666667f;
  const V half_f2 = f * f * 0.5f;
  const V n = Bits::to_float(k);
  // log(1 + f) = f - (f²/2 - s (f²/2 + s² p)): this order of the terms keeps the result exact to an ulp near 1.
  return n * 0.693145752f + (f - (half_f2 - (s * (half_f2 + s2 * p) + n * 1.42860677e-6f)));
}

// Returns log(1 + t) for 0 <= t <= 1 or NaN, within 3 ulp however small t is: 2 atanh(t / (2 + t)) by its series to the 15th
// order.
template <class V>
TOPN_INLINE V log1p_float(V t) {
  const V s = t / (t + 2.0f);
  const V s2 = s * s;
  V p = V{} + 0.1333333333f;  // 2/15
  p = p * s2 + 0.1538461538f;
  p = p * s2 + 0.1818181818f;
  p = p * s2 + 0.2222222222f;
  p = p * s2 + 0.2857142857f;
  p = p * s2 + 0.4f;
  p = p * s2 + 0.6666666667f;
  return s * 2.0f + s * (s2 * p);
}

// Returns the square root of x >= 0, infinity or NaN, within 2 ulp: Newton's iteration for 1 / sqrt(x) from an estimate by the
// exponent's bits, then a step for the root itself.
template <class Bits, class V>
TOPN_INLINE V sqrt_float(V x) {
  const auto small = x < 1e-30f;  // may be denormal: the estimate needs an exponent
  const V scaled = small ? x * 1.8446744e19f : x;  // 2^64
  V y = Bits::as_float(0x5f3759df - (Bits::as_int(scaled) >> 1));
  const V half = scaled * 0.5f;
  for (int i = 0; i < 3; ++i) y = y * (1.5f - half * y * y);
  V root = scaled * y;
  root = root + 0.5f * y * (scaled - root * root);
  root = small ? root * 2.3283064e-10f : root;  // 2^-32
  return x < std::numeric_limits<float>::infinity() ? root : x;
}

}  // namespace topn_gating
