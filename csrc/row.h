// The maths of one token, its gradient and the formulas of the losses, the same on every backend.
//
// A row is the e values of one token. Backends differ in where they lie. On a GPU the threads of a warp share a row, and each
// thread holds some of its values. On the CPU value i of a row is a SIMD vector with one lane for each of several tokens, so
// that every statement here is executed for all of these tokens at once. `Row` is any type with operator[]; a `RowLayout` has
//
//   Scalar          float or double
//   V               an element of a row: a Scalar on a GPU, a vector of Scalars on the CPU
//   PerToken        one number of each token: a Scalar on a GPU, a vector on the CPU
//   Int, Key        the signed integer that is as large as a Scalar, and such integers in the shape of V
//   count, unroll   how many elements of the row this thread has, and how often a GPU unrolls loops over them
//   accumulators    number of partial sums that a loop over the elements keeps
//   max(V), sum(V)  reductions over the threads that share a row, in a fixed order; the CPU has nothing to reduce
//   valid(i)        whether element i belongs to an expert; elements past the last one hold -inf as scores and so 0 as gates
//   at(Row, j)      the value of expert j
//   add(Row, j, x)  adds to the value of expert j
//   exp(d, error)   exp(d + error): see exp_float in elementary.h
//   log(u)          natural logarithm of a normal number
//   log1p(t)        log(1 + t), 0 <= t <= 1
//   sqrt(x)         square root
//   as_int(V)       the bits of V as a Key
//
// D stands for double or a vector of doubles.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "elementary.h"
#include "router.h"

namespace topn_gating {

// docs/spec.md, step 3: returns standard Gumbel noise of a uniform number.
template <class RowLayout, class V>
TOPN_INLINE V gumbel(V u) {
  const V least = V{} + typename RowLayout::Scalar(1e-20);
  const V inner = -RowLayout::log(u < least ? least : u);
  return -RowLayout::log(inner < least ? least : inner);
}

// docs/spec.md, step 5: returns integers in the order of the scores, NaN above everything and -0 equal to 0.
template <class RowLayout>
TOPN_INLINE typename RowLayout::Key score_key(typename RowLayout::V s) {
  using Key = typename RowLayout::Key;
  using Int = typename RowLayout::Int;
  constexpr Int highest = std::numeric_limits<Int>::max();
  const Key bits = RowLayout::as_int(typename RowLayout::V(s + 0.0f));
  const Key ordered = bits ^ ((bits >> (8 * sizeof(Int) - 1)) & highest);
  return s == s ? ordered : Key{} + highest;
}

// Inverts score_key; 0 for both zeros, and a NaN for NaN.
template <class RowLayout>
TOPN_INLINE typename RowLayout::V score_of_key(typename RowLayout::Key key) {
  using Int = typename RowLayout::Int;
  return RowLayout::as_float(key ^ ((key >> (8 * sizeof(Int) - 1)) & std::numeric_limits<Int>::max()));
}

// Returns exp(s - max), corrected by what the subtraction rounds away (Knuth's two-sum).
template <class RowLayout>
TOPN_INLINE typename RowLayout::V exp_below(typename RowLayout::V s, typename RowLayout::PerToken max) {
  using V = typename RowLayout::V;
  const V d = s - max;
  const V back = d - s;
  const V lost = (s - (d - back)) + (V{} - max - back);
  return RowLayout::exp(d, lost);
}

// The logsumexp of a token's scores in two parts: their maximum, and the sum of exp(score - maximum).
template <class PerToken>
struct LogSumExp {
  PerToken max, sum;
  PerToken moment{};  // sum of (score - maximum) exp(score - maximum), where it is asked for
};

// docs/spec.md, step 4: turns scores into gates, in place, and returns the logsumexp of the scores, with its moment if `Moment`.
template <bool Moment = false, class RowLayout, class Row>
TOPN_INLINE LogSumExp<typename RowLayout::PerToken> softmax(const RowLayout& layout, Row&& s) {
  using V = typename RowLayout::V;
  using PerToken = typename RowLayout::PerToken;
  V highest = s[0];
  TOPN_UNROLL_BY(RowLayout::unroll)
  for (int i = 1; i < layout.count; ++i) highest = s[i] > highest ? s[i] : highest;
  const PerToken max = layout.max(highest);
  V total[RowLayout::accumulators] = {}, moment{};
  TOPN_UNROLL_BY(RowLayout::unroll)
  for (int i = 0; i < layout.count; ++i) {
    const V below = s[i] - max;
    s[i] = exp_below<RowLayout>(s[i], max);
    total[i % RowLayout::accumulators] += s[i];
    if constexpr (Moment) moment += s[i] * (below < -1e3f ? V{} - 1e3f : below);  // finite where the exponential is 0
  }
  for (int i = 1; i < RowLayout::accumulators; ++i) total[0] += total[i];
  const PerToken sum = layout.sum(total[0]);
  const PerToken scale = (PerToken{} + 1.0f) / sum;
  TOPN_UNROLL_BY(RowLayout::unroll)
  for (int i = 0; i < layout.count; ++i) s[i] *= scale;
  return {max, sum, Moment ? layout.sum(moment) : PerToken{}};
}

// docs/spec.md, step 11: returns the entropy of a softmax, from the logsumexp of its scores and that one's logarithm, in double.
template <class D>
TOPN_INLINE D softmax_entropy(D log_sum, D sum, D moment) {
  return log_sum - moment / sum;
}

// A gate that depends on its own score alone, and its derivative.
template <class V>
struct ScoreGate {
  V value, slope;
};

// docs/spec.md, step 4: the gate of a score. Exponents are negative, so that nothing overflows and no small gate loses digits.
template <Score score, class RowLayout, class V>
TOPN_INLINE ScoreGate<V> score_gate(V s) {
  const V t = RowLayout::exp(s < 0.0f ? s : -s, V{});
  const V share = 1.0f / (1.0f + t);
  const V sigmoid = s < 0.0f ? t * share : share;
  if constexpr (score == Score::Sigmoid) return {sigmoid, t * share * share};
  const V root = RowLayout::sqrt((s > 0.0f ? s : V{}) + RowLayout::log1p(t));
  return {root, root == 0.0f ? V{} : 0.5f * sigmoid / root};
}

// Turns scores into gates other than a softmax, in place, and returns their sum. Writes each derivative by slope(i, value).
template <Score score, class RowLayout, class Row, class Slope>
TOPN_INLINE typename RowLayout::PerToken score_gates(const RowLayout& layout, Row&& s, const Slope& slope) {
  using V = typename RowLayout::V;
  V total{};
  TOPN_UNROLL_BY(RowLayout::unroll)
  for (int i = 0; i < layout.count; ++i) {
    const ScoreGate<V> gate = score_gate<score, RowLayout>(s[i]);
    slope(i, gate.slope);
    s[i] = gate.value;
    total += gate.value;
  }
  return layout.sum(total);
}

// Returns what divides such gates by their sum, for the losses and the entropy.
template <class RowLayout>
TOPN_INLINE typename RowLayout::PerToken gate_divisor(typename RowLayout::PerToken sum, double eps) {
  const typename RowLayout::PerToken least = typename RowLayout::PerToken{} + typename RowLayout::Scalar(eps);
  return sum < least ? least : sum;
}

// Turns the gradient of such gates p into that of the scores, in place, where `extra` is the gradient of p / gate_divisor.
template <class RowLayout, class Row, class Extra>
TOPN_INLINE void score_gates_backward(const RowLayout& layout, const Row& p, const Row& slope, typename RowLayout::PerToken sum,
                                      double eps, const Extra& extra, Row& grad) {
  using V = typename RowLayout::V;
  using PerToken = typename RowLayout::PerToken;
  V dot{};
  TOPN_UNROLL_BY(RowLayout::unroll)
  for (int i = 0; i < layout.count; ++i) dot += p[i] * extra(i);
  const PerToken divisor = gate_divisor<RowLayout>(sum, eps), all = layout.sum(dot);
  const PerToken mean = sum < divisor ? PerToken{} : all / divisor;
  TOPN_UNROLL_BY(RowLayout::unroll)
  for (int i = 0; i < layout.count; ++i) grad[i] = slope[i] * (grad[i] + (extra(i) - mean) / divisor);
}

// docs/spec.md, step 11: returns a gate's term of the entropy of such gates, which `score_entropy` sums up, in double.
template <class RowLayout>
TOPN_INLINE typename RowLayout::V entropy_term(typename RowLayout::V p) {
  using V = typename RowLayout::V;
  return p < 1e-37f ? V{} : p * RowLayout::log(p);
}
template <class D>
TOPN_INLINE D score_entropy(D terms, D sum, D divisor, D log_divisor) {
  return (log_divisor * sum - terms) / divisor;
}

// Turns the gradient of the gates p into that of the scores, in place: p_i (g_i - Σ_j p_j g_j), where g_i = grad[i] + extra(i).
template <class RowLayout, class Row, class Extra>
TOPN_INLINE void softmax_backward(const RowLayout& layout, const Row& p, const Extra& extra, Row& grad) {
  using V = typename RowLayout::V;
  V dot{};
  TOPN_UNROLL_BY(RowLayout::unroll)
  for (int i = 0; i < layout.count; ++i) {
    grad[i] += extra(i);
    dot += p[i] * grad[i];
  }
  const typename RowLayout::PerToken mean = layout.sum(dot);
  TOPN_UNROLL_BY(RowLayout::unroll)
  for (int i = 0; i < layout.count; ++i) grad[i] = p[i] * (grad[i] - mean);
}

// docs/spec.md, step 6: w_k = scale v_k / max(Σ v, eps) from the gates v_k of the chosen experts, or scale v_k. Returns what
// divides v_k.
template <class D>
TOPN_INLINE D weight_divisor(D sum, const GateOptions& options) {
  const D least = D{} + options.eps;
  return (options.normalize ? (sum < least ? least : sum) : D{} + 1.0) / options.scale;
}

// The gradient of v_k as a function of that of w_k.
template <class D>
struct WeightGradient {
  D offset, divisor;
  TOPN_INLINE D operator()(D grad_w) const { return (grad_w - offset) / divisor; }
};
// Returns it, where sum = Σ v and dot = Σ grad_w v.
template <class D>
TOPN_INLINE WeightGradient<D> weight_gradient(D sum, D dot, const GateOptions& options) {
  const D least = D{} + options.eps;
  return {options.normalize ? (sum < least ? D{} : dot / sum) : D{}, weight_divisor(sum, options)};
}

// The soft top-n of a token by coordinate descent (docs/spec.md, "Soft top-n"; arXiv 1502.04759), on q = exp(p / ε).
//
// With A = exp(-a / ε), one iteration, a = ε (log K - logsumexp((p + b) / ε)) and b = -relu(p + a), is A' = Σ min(q, A) / K,
// since p + b = min(p, -a). The start b = -p makes the first A = e / K. The score is min(q / A, 1) with the last A.
template <class PerToken>
struct SoftTopN {
  static constexpr int iterations = 20;
  static constexpr double epsilon = 0.1;
  double k;                  // K
  PerToken cap[iterations];  // A after each iteration

  // Turns the gates p into q, in place, and iterates.
  template <class RowLayout, class Row>
  TOPN_INLINE SoftTopN(const RowLayout& layout, int experts, int top_n, Row&& p) {
    using V = typename RowLayout::V;
    k = top_n * 9.0 / 8.0 < experts ? top_n * 9.0 / 8.0 : experts;
    TOPN_UNROLL_BY(RowLayout::unroll)
    for (int i = 0; i < layout.count; ++i) p[i] = layout.valid(i) ? RowLayout::exp(V(p[i] / epsilon), V{}) : V{};
    cap[0] = PerToken{} + experts / k;
    for (int t = 1; t < iterations; ++t) {
      const V most = V{} + cap[t - 1];
      V total{};
      TOPN_UNROLL_BY(RowLayout::unroll)
      for (int i = 0; i < layout.count; ++i) total += p[i] > most ? most : p[i];
      cap[t] = layout.sum(total) / k;
    }
  }

  TOPN_INLINE PerToken score(PerToken q) const {
    return q > cap[iterations - 1] ? PerToken{} + 1.0 : q / cap[iterations - 1];
  }

  // Writes the gradient of the gates p to grad_p, where grad(j) is the gradient of the score of the chosen expert(j).
  template <class RowLayout, class Row, class Expert, class Grad>
  TOPN_INLINE void backward(const RowLayout& layout, Row&& q, int top_n, const Expert& expert, const Grad& grad,
                            Row&& grad_p) const {
    using V = typename RowLayout::V;
    TOPN_UNROLL_BY(RowLayout::unroll)
    for (int i = 0; i < layout.count; ++i) grad_p[i] = V{};
    PerToken grad_log_cap{};
    for (int j = 0; j < top_n; ++j) {
      const auto chosen = expert(j);
      const PerToken value = layout.at(q, chosen);
      const PerToken term = value > cap[iterations - 1] ? PerToken{} : grad(j) * score(value);
      layout.add(grad_p, chosen, term);
      grad_log_cap -= term;
    }
    for (int t = iterations - 1; t > 0; --t) {
      const V most = V{} + cap[t - 1];
      const PerToken scale = grad_log_cap / (k * cap[t]);
      V capped{};
      TOPN_UNROLL_BY(RowLayout::unroll)
      for (int i = 0; i < layout.count; ++i) {
        const auto over = q[i] > most;
        grad_p[i] += over ? V{} : q[i] * scale;
        capped += over ? V{} + 1.0 : V{};
      }
      grad_log_cap = scale * layout.sum(capped) * cap[t - 1];
    }
    TOPN_UNROLL_BY(RowLayout::unroll)
    for (int i = 0; i < layout.count; ++i) grad_p[i] /= epsilon;
  }
};

// The losses, docs/spec.md, step 10: sums over valid tokens of a group, then over groups, in double.

// Returns a number of valid tokens to divide by: 1 where there are none.
TOPN_INLINE double at_least_one(double count) { return count > 1.0 ? count : 1.0; }

// What the sums of a group are multiplied by.
struct GroupShares {
  double of_tokens;  // 1 / at_least_one(valid tokens)
  double of_counts;  // 1 / at_least_one(sum of the group's counts)

  TOPN_INLINE GroupShares(double valid_tokens, double counted)
      : of_tokens(1.0 / at_least_one(valid_tokens)), of_counts(1.0 / at_least_one(counted)) {}
};

// Returns an expert's term of the balance loss from the group's sum of its gates.
TOPN_INLINE double balance_term(double gate_sum, int32_t count, GroupShares shares) {
  return gate_sum * shares.of_tokens * (count * shares.of_counts);
}

// Returns e times the mean over groups of the sums of their terms.
TOPN_INLINE double balance_loss(double terms, int64_t experts, int64_t groups) {
  return terms * double(experts) / at_least_one(double(groups));
}

// Returns the mean over valid tokens of logsumexp².
TOPN_INLINE double router_z_loss(double squares, double valid_tokens) { return squares / at_least_one(valid_tokens); }

// The gradient that the two sums over tokens, importance and the balance loss, give to each gate of a group's valid tokens.
struct ImportanceGradient {
  double balance;  // gradient of the sum of a group's terms of the balance loss
  GroupShares shares;

  TOPN_INLINE ImportanceGradient(double grad_balance_loss, int64_t experts, int64_t groups, GroupShares of_group)
      : balance(grad_balance_loss * double(experts) / double(groups)), shares(of_group) {}
  TOPN_INLINE double operator()(double grad_importance, int32_t count) const {
    return (balance * (count * shares.of_counts) + grad_importance) * shares.of_tokens;
  }
};

// docs/spec.md, step 11: returns the root mean square of the logits of valid tokens.
TOPN_INLINE double logit_rms(double squares, double valid_tokens, int64_t experts) {
  return std::sqrt(squares / (at_least_one(valid_tokens) * double(experts)));
}

// Returns the factor of a token's logsumexp in the gradient of its scores that the z-loss gives, before the gates.
TOPN_INLINE double z_loss_scale(double grad_router_z_loss, double valid_tokens) {
  return 2.0 * grad_router_z_loss / at_least_one(valid_tokens);
}

}  // namespace topn_gating
