// The maths of one token, the same on every backend.
//
// A row is the e values of one token: `lanes.count` values of type V. On a GPU the threads of a warp share a row, V is a
// scalar, and the lanes are threads. On the CPU V is a SIMD vector whose lanes are tokens: a row is those of as many tokens,
// and all that is said here of one token is done to each. `Row` holds the values: anything with an operator[]. `Lanes` says
// how they lie:
//
//   V                     float or double, or a vector of them
//   R                     one number of a token: a scalar on a GPU, V on the CPU
//   Key                   the ordered integers of V's shape
//   count, unroll         values of type V in a row; how often a GPU repeats the body of a loop over them
//   sums                  partial sums that a loop over them keeps
//   max(V), sum(V)        reductions over a row's lanes, in a fixed order
//   real(i)               whether value i is of an expert
//   at(Row, j)            the entry of expert j
//   add(Row, j, R)        adds to it
//
// Entries past the last expert hold -inf as scores and so 0 as gates. Whoever includes this has declared, for V,
// `exp_value(d, error)` (see elementary.h) and `log_value(u)`, and as_int, which gives a value's bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "elementary.h"

namespace TOPN_NAMESPACE {

// SPEC step 3: standard Gumbel noise from a uniform number.
template <class R, class V>
TOPN_INLINE V gumbel(V u) {
  const V least = V{} + R(1e-20);
  const V once = -log_value(u < least ? least : u);
  return -log_value(once < least ? least : once);
}

// Integers in the order of the scores, for step 5: NaN above everything, -0 equal to 0.
template <class Lanes>
TOPN_INLINE typename Lanes::Key score_key(typename Lanes::V s) {
  using Key = typename Lanes::Key;
  using Int = typename Lanes::Int;
  constexpr Int highest = std::numeric_limits<Int>::max();
  const Key bits = as_int(typename Lanes::V(s + 0.0f));
  const Key ordered = bits ^ ((bits >> (8 * sizeof(Int) - 1)) & highest);
  return s == s ? ordered : Key{} + highest;
}

// exp(s - max), with what the subtraction rounds away (Knuth's two-sum).
template <class V, class R>
TOPN_INLINE V exp_below(V s, R max) {
  const V d = s - max;
  const V back = d - s;
  const V lost = (s - (d - back)) + (V{} - max - back);
  return exp_value(d, lost);
}

// The scores' maximum, and the sum of exp(score - max): their logsumexp in two parts.
template <class R>
struct LogSumExp {
  R max, sum;
};
TOPN_INLINE double value_of(const LogSumExp<float>& lse) { return double(lse.max) + std::log(double(lse.sum)); }
TOPN_INLINE double value_of(const LogSumExp<double>& lse) { return lse.max + std::log(lse.sum); }

// SPEC step 4, in place: scores become gates. Returns the logsumexp of the scores.
template <class Lanes, class Row>
TOPN_INLINE LogSumExp<typename Lanes::R> softmax(const Lanes& lanes, Row&& s) {
  using V = typename Lanes::V;
  using R = typename Lanes::R;
  V highest = s[0];
  TOPN_UNROLL_BY(Lanes::unroll)
  for (int i = 1; i < lanes.count; ++i) highest = s[i] > highest ? s[i] : highest;
  const R max = lanes.max(highest);
  V total[Lanes::sums] = {};
  TOPN_UNROLL_BY(Lanes::unroll)
  for (int i = 0; i < lanes.count; ++i) {
    s[i] = exp_below(s[i], max);
    total[i % Lanes::sums] += s[i];
  }
  for (int i = 1; i < Lanes::sums; ++i) total[0] += total[i];
  const R sum = lanes.sum(total[0]);
  const R scale = (R{} + 1.0f) / sum;
  TOPN_UNROLL_BY(Lanes::unroll)
  for (int i = 0; i < lanes.count; ++i) s[i] *= scale;
  return {max, sum};
}

// Soft top-n by coordinate descent (SPEC; arXiv 1502.04759), on q = exp(p / ε).
//
// With A = exp(-a / ε) one iteration, a = ε (log K - logsumexp((p + b) / ε)) and b = -relu(p + a), is
// A' = Σ min(q, A) / K, since p + b = min(p, -a); the start b = -p makes the first A = e / K. The result is
// min(q / A, 1).
template <class R>
struct SoftTopN {
  static constexpr int iterations = 20;
  static constexpr double epsilon = 0.1;
  double k;
  R cap[iterations];  // A after each iteration

  // Makes q of the gates p, in place.
  template <class Lanes, class Row>
  TOPN_INLINE SoftTopN(const Lanes& lanes, int experts, int top_n, Row&& p) {
    using V = typename Lanes::V;
    k = top_n * 9.0 / 8.0 < experts ? top_n * 9.0 / 8.0 : experts;
    TOPN_UNROLL_BY(Lanes::unroll)
    for (int i = 0; i < lanes.count; ++i) p[i] = lanes.real(i) ? exp_value(V(p[i] / epsilon), V{}) : V{};
    cap[0] = R{} + experts / k;
    for (int t = 1; t < iterations; ++t) {
      const V least = V{} + cap[t - 1];
      V total{};
      TOPN_UNROLL_BY(Lanes::unroll)
      for (int i = 0; i < lanes.count; ++i) total += p[i] > least ? least : p[i];
      cap[t] = lanes.sum(total) / k;
    }
  }

  TOPN_INLINE R score(R q) const { return q > cap[iterations - 1] ? R{} + 1.0 : q / cap[iterations - 1]; }

  // The gradient of p, where q = exp(p / ε), from the chosen experts expert(j) and the gradients grad(j) of their scores.
  template <class Lanes, class Row, class Expert, class Grad>
  TOPN_INLINE void backward(const Lanes& lanes, Row&& q, int top_n, const Expert& expert, const Grad& grad,
                            Row&& grad_p) const {
    using V = typename Lanes::V;
    TOPN_UNROLL_BY(Lanes::unroll)
    for (int i = 0; i < lanes.count; ++i) grad_p[i] = V{};
    R grad_log_cap{};
    for (int j = 0; j < top_n; ++j) {
      const auto chosen = expert(j);
      const R value = lanes.at(q, chosen);
      const R term = value > cap[iterations - 1] ? R{} : grad(j) * score(value);
      lanes.add(grad_p, chosen, term);
      grad_log_cap -= term;
    }
    for (int t = iterations - 1; t > 0; --t) {
      const V least = V{} + cap[t - 1];
      const R scale = grad_log_cap / (k * cap[t]);
      V capped{};
      TOPN_UNROLL_BY(Lanes::unroll)
      for (int i = 0; i < lanes.count; ++i) {
        const auto over = q[i] > least;
        grad_p[i] += over ? V{} : q[i] * scale;
        capped += over ? V{} + 1.0 : V{};
      }
      grad_log_cap = scale * lanes.sum(capped) * cap[t - 1];
    }
    TOPN_UNROLL_BY(Lanes::unroll)
    for (int i = 0; i < lanes.count; ++i) grad_p[i] /= epsilon;
  }
};

}  // namespace TOPN_NAMESPACE
