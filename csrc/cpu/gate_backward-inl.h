// Gradients of docs/spec.md, steps 4 to 6 and 10, on the CPU. The gates of each token are computed again, which costs less than
// keeping them from the forward pass.
#pragma once

#include "cpu/parallel.h"
#include "cpu/tokens.h"

namespace topn_gating::cpu::TOPN_LEVEL {
namespace {

// Returns the number of valid tokens of the groups from `first` to `last` - 1.
inline double count_valid_tokens(const GateBackward& a, int64_t first, int64_t last) {
  const int64_t begin = first * a.tokens, end = last * a.tokens;
  return double(a.token_mask == nullptr ? end - begin : std::count(a.token_mask + begin, a.token_mask + end, true));
}

// Returns the value of a loss's gradient; 0 where it is null.
template <class Weight>
double scalar_gradient(const void* gradient) {
  return gradient == nullptr ? 0.0 : double(*static_cast<const Weight*>(gradient));
}

// Differentiates the tokens of one tile after another, of element type T, computed in Scalar.
template <class Scalar, class T>
class TileGradient {
 public:
  TileGradient(const GateBackward& args, double z_scale)
      : a_(args), z_scale_(z_scale), softmax_(a_.score == Score::Softmax), tokens_(args, !softmax_ && z_scale != 0),
        importance_(a_.experts), grad_p_(a_.experts + RowLayout::tokens), q_(a_.soft ? a_.experts : 0),
        slope_(softmax_ ? 0 : a_.experts), v_(a_.top_n), grad_v_(a_.top_n), expert_(a_.top_n) {}

  void run(const GateTile& tile) {
    if (tile.group != group_) start_group(tile.group);
    for (int64_t token = tile.first; token < tile.last; token += RowLayout::tokens) {
      tokens_.move_to(token, tile.last);
      differentiate();
    }
  }

 private:
  using V = Vector<Scalar>;
  using RowLayout = VectorLayout<Scalar>;
  using Key = typename RowLayout::Key;
  using Weight = ComputeType<T>;

  void start_group(int64_t group) {
    group_ = group;
    const int32_t* counts = a_.counts + group * a_.experts;
    int64_t counted = 0;
    for (int64_t e = 0; e < a_.experts; ++e) counted += counts[e];
    const auto* grad_importance = static_cast<const Weight*>(a_.grad_importance);
    const ImportanceGradient gradient(scalar_gradient<Weight>(a_.grad_balance_loss), a_.experts, a_.groups,
                                      GroupShares(count_valid_tokens(a_, group, group + 1), double(counted)));
    for (int64_t e = 0; e < a_.experts; ++e) {
      const double given = grad_importance == nullptr ? 0.0 : double(grad_importance[group * a_.experts + e]);
      importance_[e] = Scalar(gradient(given, counts[e]));
    }
  }

  void differentiate() {
    const RowLayout& layout = tokens_.layout;
    T* grad_logits = static_cast<T*>(a_.grad_logits) + tokens_.first * a_.experts;
    const Key valid = tokens_.valid(), active = valid | read_pairs();
    V *s = tokens_.scores, *grad_p = grad_p_;
    tokens_.read_scores();
    LogSumExp<V> lse{};
    V sum{};
    if (softmax_) {
      lse = softmax(layout, s);
    } else {
      sum = score_gates_of<Scalar>(a_.score, layout, s, [&](int i, V slope) { slope_[i] = slope; });
    }
    for (int i = 0; i < layout.count; ++i) grad_p[i] = V{};
    if (a_.grad_weight != nullptr) a_.soft ? add_through_soft() : add_through_gates();
    const auto importance = [&](int i) { return masked(valid, V{} + importance_[i]); };
    if (softmax_) {
      softmax_backward(layout, s, importance, grad_p);
    } else {
      score_gates_backward(layout, s, static_cast<V*>(slope_), sum, a_.eps, importance, grad_p);
    }
    if (z_scale_ != 0) {
      const V* gates = s;
      if (tokens_.keeps_logits) {
        lse = softmax(layout, static_cast<V*>(tokens_.logits));
        gates = tokens_.logits;
      }
      const auto value = value_of<Scalar>(lse);
      const auto scales = InDouble<Scalar>::map([&](int i) { return z_scale_ * value.vectors[i]; });
      const V scale = masked(valid, scales.rounded());
      for (int i = 0; i < layout.count; ++i) grad_p[i] += masked(valid, scale * gates[i]);
    }
    // A masked token without a gradient gets zeros, even where it holds NaN.
    for (int i = 0; i < layout.count; ++i) grad_p[i] = masked(active, grad_p[i]);
    store_columns<Scalar>(grad_p, tokens_.count, layout.experts, grad_logits);
  }

  // Reads the tokens' experts and the gradients of their weights. Returns a mask of the lanes where one of these is not 0.
  Key read_pairs() {
    Key any{};
    if (a_.grad_weight == nullptr) return any;
    for (int l = 0; l < RowLayout::tokens; ++l) {
      const int64_t pairs = (tokens_.first + std::min(l, tokens_.count - 1)) * a_.top_n;
      for (int64_t k = 0; k < a_.top_n; ++k) {
        const int32_t given = a_.expert[pairs + k];
        expert_[k][l] = given >= 0 && given < a_.experts ? given : -1;
        grad_v_[k][l] = Scalar(static_cast<const Weight*>(a_.grad_weight)[pairs + k]);
      }
    }
    for (int64_t k = 0; k < a_.top_n; ++k) any |= grad_v_[k] != Scalar(0);
    return any;
  }

  // Turns the gradients of w_k into those of v_k, in place.
  void through_weights() {
    using D = InDouble<Scalar>;
    D sum{}, dot{};
    for (int64_t k = 0; k < a_.top_n; ++k) {
      const auto v = D::of(v_[k]), grad = D::of(grad_v_[k]);
      sum += v;
      dot += D::map([&](int i) { return grad.vectors[i] * v.vectors[i]; });
    }
    WeightGradient<Doubles> to_v[D::count];
    for (int i = 0; i < D::count; ++i) to_v[i] = weight_gradient(sum.vectors[i], dot.vectors[i], a_);
    for (int64_t k = 0; k < a_.top_n; ++k) {
      const auto grad = D::of(grad_v_[k]);
      grad_v_[k] = masked(expert_[k] >= 0, D::map([&](int i) { return to_v[i](grad.vectors[i]); }).rounded());
    }
  }

  void add_through_gates() {
    const RowLayout& layout = tokens_.layout;
    for (int64_t k = 0; k < a_.top_n; ++k) v_[k] = at_chosen<Scalar>(layout, tokens_.scores, expert_[k]);
    through_weights();
    for (int64_t k = 0; k < a_.top_n; ++k) layout.add(grad_p_, in_row(k), grad_v_[k]);
  }

  void add_through_soft() {
    if constexpr (std::is_same_v<Scalar, double>) {
      const RowLayout& layout = tokens_.layout;
      V *q = q_, *grad_p = grad_p_;
      std::memcpy(q, tokens_.scores, layout.count * sizeof(V));
      const SoftTopN<V> soft(layout, layout.experts, int(a_.top_n), q);
      for (int64_t k = 0; k < a_.top_n; ++k) {
        v_[k] = masked(expert_[k] >= 0, soft.score(at_chosen<Scalar>(layout, q, expert_[k])));
      }
      through_weights();
      soft.backward(layout, q, int(a_.top_n), [&](int j) { return in_row(j); }, [&](int j) { return grad_v_[j]; }, grad_p);
    }
  }

  // Returns the experts of a rank, 0 where there is none and the gradient is 0.
  Key in_row(int64_t k) const { return expert_[k] & (expert_[k] >= 0); }

  const GateBackward& a_;
  double z_scale_;  // z_loss_scale of all groups
  const bool softmax_;
  Tokens<Scalar, T> tokens_;
  int64_t group_ = -1;
  Scratch<Scalar> importance_;  // (e) the group's ImportanceGradient
  Scratch<V> grad_p_, q_;       // (e)
  Scratch<V> slope_;            // (e) derivatives of gates other than a softmax
  Scratch<V> v_, grad_v_;       // (k)
  Scratch<Key> expert_;         // (k)
};

template <class Scalar, class T>
void differentiate_tiles(const GateBackward& a, double z_scale, int64_t begin, int64_t end) {
  TileGradient<Scalar, T> gradient(a, z_scale);
  for (int64_t tile = begin; tile < end; ++tile) gradient.run(GateTile(a, tile));
}

}  // namespace

void run(const GateBackward& a, ParallelFor parallel_for) {
  with_type(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    using Weight = ComputeType<T>;
    const double grad_z = scalar_gradient<Weight>(a.grad_router_z_loss);
    const double z_scale = grad_z == 0 ? 0 : z_loss_scale(grad_z, count_valid_tokens(a, 0, a.groups));
    parallel(parallel_for, a.groups * gate_tiles(a.tokens), gate_tile_cost(a), [&](int64_t begin, int64_t end) {
      a.soft ? differentiate_tiles<double, T>(a, z_scale, begin, end) : differentiate_tiles<Weight, T>(a, z_scale, begin, end);
    });
  });
}

}  // namespace topn_gating::cpu::TOPN_LEVEL
