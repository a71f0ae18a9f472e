// Gradients of SPEC steps 4 to 6 and 10 on the CPU: the gates of each token are computed again, which costs less than
// to keep them.
#include "cpu/parallel.h"
#include "cpu/tokens.h"

namespace TOPN_NAMESPACE {
namespace {

// Real tokens of the groups, 1 if there are none.
double real_tokens(const GateBackward& a, int64_t first, int64_t last) {
  if (a.token_mask == nullptr) return std::max(double((last - first) * a.tokens), 1.0);
  double real = 0;
  for (int64_t i = first * a.experts; i < last * a.experts; ++i) real += a.top_count[i];
  return std::max(real, 1.0);
}

template <class R, class T>
class TileGradient {
 public:
  TileGradient(const GateBackward& args, double z_scale)
      : a_(args), z_scale_(z_scale), tokens_(args), importance_(a_.experts), grad_p_(a_.experts + Lanes::w),
        q_(a_.soft ? a_.experts : 0), v_(a_.top_n), grad_v_(a_.top_n), expert_(a_.top_n) {}

  void run(const GateTile& tile) {
    if (tile.group != group_) start_group(tile.group);
    for (int64_t token = tile.first; token < tile.last; token += Lanes::w) {
      tokens_.take(token, tile.last);
      differentiate();
    }
  }

 private:
  using V = Vector<R>;
  using Lanes = TokenLanes<R>;
  using Key = typename Lanes::Key;
  using Real = RealOf<T>;

  // The gradient that every real token of the group gets at its gates, from the two sums over tokens.
  void start_group(int64_t group) {
    group_ = group;
    const int32_t* top_count = a_.top_count + group * a_.experts;
    const double share = 1.0 / real_tokens(a_, group, group + 1);
    const double balance = a_.grad_balance_loss == nullptr ? 0.0
                                                           : double(*static_cast<const Real*>(a_.grad_balance_loss)) *
                                                                 double(a_.experts) / double(a_.groups);
    for (int64_t e = 0; e < a_.experts; ++e) {
      double sum = balance * (top_count[e] * share);
      if (a_.grad_importance != nullptr) sum += double(static_cast<const Real*>(a_.grad_importance)[group * a_.experts + e]);
      importance_[e] = R(sum * share);
    }
  }

  void differentiate() {
    const Lanes& lanes = tokens_.lanes;
    T* grad_logits = static_cast<T*>(a_.grad_logits) + tokens_.first * a_.experts;
    const Key real = tokens_.real(), active = real | read_pairs();
    V *s = tokens_.s, *grad_p = grad_p_;
    tokens_.read_scores();
    LogSumExp<V> lse = softmax(lanes, s);
    for (int i = 0; i < lanes.count; ++i) grad_p[i] = V{};
    if (a_.grad_weight != nullptr) a_.soft ? through_soft() : through_gates();
    V dot{};
    for (int i = 0; i < lanes.count; ++i) {
      grad_p[i] += masked(real, V{} + importance_[i]);
      dot += s[i] * grad_p[i];
    }
    for (int i = 0; i < lanes.count; ++i) grad_p[i] = s[i] * (grad_p[i] - dot);
    if (z_scale_ != 0) {
      const V* gates = s;
      if (a_.noise != nullptr) {
        lse = softmax(lanes, static_cast<V*>(tokens_.z));
        gates = tokens_.z;
      }
      const auto value = value_of<R>(lse);
      const V scale = masked(real, Wide<R>::map([&](int i) { return z_scale_ * value.part[i]; }).rounded());
      for (int i = 0; i < lanes.count; ++i) grad_p[i] += masked(real, scale * gates[i]);
    }
    // Whatever the padding holds, NaN too.
    for (int i = 0; i < lanes.count; ++i) grad_p[i] = masked(active, grad_p[i]);
    store_columns<R>(grad_p, tokens_.count, lanes.experts, grad_logits);
  }

  // The tokens' experts, and the gradients of their weights. Returns the lanes where one of these is not 0.
  Key read_pairs() {
    Key any{};
    if (a_.grad_weight == nullptr) return any;
    for (int l = 0; l < Lanes::w; ++l) {
      const int64_t pairs = (tokens_.first + std::min(l, tokens_.count - 1)) * a_.top_n;
      for (int64_t k = 0; k < a_.top_n; ++k) {
        const int32_t given = a_.expert[pairs + k];
        // Indices made up by a caller stay inside the row.
        expert_[k][l] = given >= 0 && given < a_.experts ? given : 0;
        grad_v_[k][l] = R(static_cast<const Real*>(a_.grad_weight)[pairs + k]);
      }
    }
    for (int64_t k = 0; k < a_.top_n; ++k) any |= grad_v_[k] != R(0);
    return any;
  }

  // In place: of w_k = v_k / max(Σ v, eps) to that of v.
  void through_weights() {
    if (a_.top_n == 1) return;
    Wide<R> sum{}, dot{};
    for (int64_t k = 0; k < a_.top_n; ++k) {
      const auto v = Wide<R>::of(v_[k]), grad = Wide<R>::of(grad_v_[k]);
      sum += v;
      dot += Wide<R>::map([&](int i) { return grad.part[i] * v.part[i]; });
    }
    const Doubles eps = Doubles{} + a_.eps;
    for (int64_t k = 0; k < a_.top_n; ++k) {
      const auto grad = Wide<R>::of(grad_v_[k]);
      grad_v_[k] = Wide<R>::map([&](int i) {
                     const auto clamped = sum.part[i] < eps;
                     const Doubles off = clamped ? Doubles{} : dot.part[i] / sum.part[i];
                     return (grad.part[i] - off) / (clamped ? eps : sum.part[i]);
                   }).rounded();
    }
  }

  void through_gates() {
    const Lanes& lanes = tokens_.lanes;
    for (int64_t k = 0; k < a_.top_n; ++k) v_[k] = lanes.at(tokens_.s, expert_[k]);
    through_weights();
    for (int64_t k = 0; k < a_.top_n; ++k) lanes.add(grad_p_, expert_[k], grad_v_[k]);
  }

  void through_soft() {
    if constexpr (std::is_same_v<R, double>) {
      const Lanes& lanes = tokens_.lanes;
      V *q = q_, *grad_p = grad_p_;
      std::memcpy(q, tokens_.s, lanes.count * sizeof(V));
      const SoftTopN<V> soft(lanes, lanes.experts, int(a_.top_n), q);
      for (int64_t k = 0; k < a_.top_n; ++k) v_[k] = soft.score(lanes.at(q, expert_[k]));
      through_weights();
      soft.backward(lanes, q, int(a_.top_n), [&](int j) { return expert_[j]; }, [&](int j) { return grad_v_[j]; },
                    grad_p);
    }
  }

  const GateBackward& a_;
  double z_scale_;  // 2 · grad_router_z_loss / real tokens
  Tokens<R, T, GateBackward> tokens_;
  int64_t group_ = -1;
  Scratch<R> importance_;  // (e)
  Scratch<V> grad_p_, q_;  // (e)
  Scratch<V> v_, grad_v_;  // (k)
  Scratch<Key> expert_;    // (k)
};

template <class R, class T>
void gradient_tokens(const GateBackward& a, double z_scale, int64_t begin, int64_t end) {
  TileGradient<R, T> gradient(a, z_scale);
  for (int64_t tile = begin; tile < end; ++tile) gradient.run(GateTile(a, tile));
}

// Of each token's logsumexp: 2 · grad_router_z_loss / real tokens.
template <class Real>
double z_loss_scale(const GateBackward& a) {
  if (a.grad_router_z_loss == nullptr) return 0;
  return 2.0 * double(*static_cast<const Real*>(a.grad_router_z_loss)) / real_tokens(a, 0, a.groups);
}

}  // namespace

void run(const GateBackward& a, ParallelFor parallel_for) {
  with_type(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const double z_scale = z_loss_scale<RealOf<T>>(a);
    parallel(parallel_for, a.groups * gate_tiles(a.tokens), gate_tile_cost(a), [&](int64_t begin, int64_t end) {
      a.soft ? gradient_tokens<double, T>(a, z_scale, begin, end) : gradient_tokens<RealOf<T>, T>(a, z_scale, begin, end);
    });
  });
}

}  // namespace TOPN_NAMESPACE
