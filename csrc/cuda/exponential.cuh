// Exponentials of a row's scores on a GPU, by the instruction for powers of two.
#pragma once

#include <cmath>

#include "cuda/layout.cuh"

namespace topn_gating::cuda {

// Returns 2^x, within 2 ulp for |x| <= 1; 0 below the normal numbers.
__device__ __forceinline__ float power_of_two(float x) {
#ifdef TOPN_SIMT_HOST
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// Returns 1 / x within an ulp, for normal x whose reciprocal is normal.
__device__ __forceinline__ float reciprocal(float x) {
#ifdef TOPN_SIMT_HOST
  return 1.0f / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return __fmaf_rn(__fmaf_rn(-x, y, 1.0f), y, y);
#endif
}

// Returns log2(x), with an absolute error of 2^-22 for x within a factor of 2 of 1 and a relative one of 2^-22 elsewhere.
__device__ __forceinline__ float binary_logarithm(float x) {
#ifdef TOPN_SIMT_HOST
  return std::log2(x);
#else
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// exp(s) / 2^M, where the integer M is log2(exp(max)), rounded. With s log2(e) = n + f, for an integer n, it is 2^f 2^(n - M),
// and no digit of s - max is lost: f comes from one rounding.
class ExpBelow {
 public:
  // The largest |max|. Beyond it, scores that matter are within a factor of two of max, so that s - max is exact: callers
  // subtract it.
  static constexpr float kMost = 1048576.0f;  // 2^20

  ExpBelow() = default;
  __device__ explicit ExpBelow(float max) : offset_(kMagic - exponent_of(max)) {}
  __device__ __forceinline__ float operator()(float s) const {
    const float shifted = __fmaf_rn(s, kLog2e, offset_);
    const float bounded = shifted > kMagic - 126.0f ? shifted : kMagic - 126.0f;  // 2^-126 times 2^f, where f may be below -1
    const float f = __fmaf_rn(s, kLog2eRest, __fmaf_rn(s, kLog2e, offset_ - bounded));
    return power_of_two(f) * __int_as_float(int(unsigned(__float_as_int(bounded)) << 23) + (127 << 23));
  }
  // Returns M.
  static __device__ __forceinline__ float exponent_of(float max) { return __fmaf_rn(max, kLog2e, kMagic) - kMagic; }

 private:
  static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: the sum with it is rounded to an integer, which its low bits hold
  static constexpr float kLog2e = 1.44269502f, kLog2eRest = 1.92596299e-8f;

  float offset_ = 0;  // kMagic - M
};

// Returns 1 / (1 + exp(-s)) and its derivative: csrc/row.h, score_gate.
__device__ __forceinline__ ScoreGate<float> sigmoid(float s) {
  const float t = ExpBelow(0.0f)(s < 0.0f ? s : -s);
  const float share = reciprocal(1.0f + t);
  return {s < 0.0f ? t * share : share, t * share * share};
}

// Returns the highest of a row's values: NaN only if all are.
template <class RowLayout, class Row>
__device__ __forceinline__ float highest_of(const Row& s) {
  float highest = s[0];
  TOPN_UNROLL
  for (int i = 1; i < RowLayout::count; ++i) highest = larger(highest, s[i]);
  return RowLayout::reduce(highest, [](float a, float b) { return larger(a, b); });
}

// Exponentials of a row of scores, not divided by their sum.
template <class RowLayout>
class RowExponentials {
 public:
  using Row = typename RowLayout::template Row<float>;

  // Turns scores into exponentials, in place. `max` is the highest score.
  __device__ __forceinline__ RowExponentials(Row& s, float max) : shift_(0), exponent(ExpBelow::exponent_of(max)) {
    const bool near = max <= ExpBelow::kMost && max >= -ExpBelow::kMost;
    if (ballot(!near) != 0) subtract(s, near ? 0.0f : max);
    below_ = ExpBelow(near ? max : 0.0f);
    sum = 0;
    TOPN_UNROLL
    for (int i = 0; i < RowLayout::count; ++i) {
      s[i] = below_(s[i]);
      sum += s[i];
    }
    sum = RowLayout::reduce(sum, [](float a, float b) { return a + b; });
  }
  // Returns the exponential of a score of the row.
  __device__ __forceinline__ float of(float score) const { return below_(score - shift_); }

 private:
  __device__ __forceinline__ void subtract(Row& s, float max) {
    max = shuffle(max, int(lane_id()));  // its own value: with an exchange, this rare code is a branch, not predicated
    TOPN_UNROLL
    for (int i = 0; i < RowLayout::count; ++i) s[i] -= max;
    shift_ = max;
  }

  float shift_;  // what was subtracted from the scores
  ExpBelow below_;

 public:
  float exponent;  // the logsumexp of the scores is log(2^exponent sum)
  float sum;       // of the exponentials
};

}  // namespace topn_gating::cuda
