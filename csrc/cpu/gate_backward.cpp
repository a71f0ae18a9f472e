// Gradients of SPEC steps 4 to 6 and 10 on the CPU: the gates of each token are computed again, which costs less than
// to keep them.
#include "cpu/parallel.h"
#include "cpu/token.h"

namespace TOPN_NAMESPACE {
namespace {

// Real tokens of the groups, 1 if there are none.
double real_tokens(const GateBackward& a, int64_t first, int64_t last) {
  if (a.padding_mask == nullptr) return std::max(double((last - first) * a.tokens), 1.0);
  double real = 0;
  for (int64_t i = first * a.experts; i < last * a.experts; ++i) real += a.top_count[i];
  return std::max(real, 1.0);
}

template <class R, class T>
struct Gradient {
  using V = Vector<R>;
  using Real = RealOf<T>;
  const GateBackward& a;
  double z_scale;  // 2 · grad_router_z_loss / real tokens
  Row<R, T> row;
  Scratch<V> importance, grad_p;
  Scratch<R> v, grad_v;
  Scratch<int32_t> expert;  // of the token

  Gradient(const GateBackward& args, double z)
      : a(args), z_scale(z), row(args.experts), importance(row.lanes.count), grad_p(row.lanes.count), v(args.top_n),
        grad_v(args.top_n), expert(args.top_n) {}

  // The gradient that every real token of the group gets at its gates, from the two sums over tokens.
  void start_group(int64_t group) {
    auto& lanes = row.lanes;
    const int32_t* top_count = a.top_count + group * a.experts;
    const double share = 1.0 / real_tokens(a, group, group + 1);
    const double balance = a.grad_balance_loss == nullptr
                               ? 0.0
                               : double(*static_cast<const Real*>(a.grad_balance_loss)) * double(a.experts) / double(a.groups);
    for (int i = 0; i < lanes.count; ++i) importance[i] = V{};
    for (int e = 0; e < lanes.experts; ++e) {
      double sum = balance * (top_count[e] * share);
      if (a.grad_importance != nullptr) sum += double(static_cast<const Real*>(a.grad_importance)[group * a.experts + e]);
      lanes.add(importance, e, R(sum * share));
    }
  }

  // Of w_k = v_k / max(Σ v, eps) for v.
  void weights(const Real* grad_w) {
    if (a.top_n == 1) {
      grad_v[0] = R(grad_w[0]);
      return;
    }
    double sum = 0, dot = 0;
    for (int64_t k = 0; k < a.top_n; ++k) sum += double(v[k]);
    const bool clamped = sum < a.eps;
    const double denominator = clamped ? a.eps : sum;
    if (!clamped) {
      for (int64_t k = 0; k < a.top_n; ++k) dot += double(grad_w[k]) * (double(v[k]) / denominator);
    }
    for (int64_t k = 0; k < a.top_n; ++k) grad_v[k] = R((double(grad_w[k]) - dot) / denominator);
  }

  // Indices made up by a caller stay inside the row.
  void read_experts(int64_t token) {
    const int32_t* given = a.expert + token * a.top_n;
    for (int64_t k = 0; k < a.top_n; ++k) expert[k] = given[k] >= 0 && given[k] < a.experts ? given[k] : 0;
  }

  void through_soft(const Real* grad_w) {
    if constexpr (std::is_same_v<R, double>) {
      auto& lanes = row.lanes;
      Scratch<V> q(lanes.count);
      std::memcpy(q, row.s, lanes.count * sizeof(V));
      const SoftTopN soft(lanes, lanes.experts, int(a.top_n), static_cast<V*>(q));
      for (int64_t k = 0; k < a.top_n; ++k) v[k] = soft.score(lanes.at(q, expert[k]));
      weights(grad_w);
      soft.backward(lanes, static_cast<V*>(q), int(a.top_n), [&](int j) { return expert[j]; },
                    [&](int j) { return grad_v[j]; }, static_cast<V*>(grad_p));
    }
  }

  void through_gates(const Real* grad_w) {
    auto& lanes = row.lanes;
    for (int i = 0; i < lanes.count; ++i) grad_p[i] = V{};
    for (int64_t k = 0; k < a.top_n; ++k) v[k] = lanes.at(row.s, expert[k]);
    weights(grad_w);
    for (int64_t k = 0; k < a.top_n; ++k) lanes.add(grad_p, expert[k], grad_v[k]);
  }

  void token(int64_t token) {
    auto& lanes = row.lanes;
    T* grad = static_cast<T*>(a.grad_logits) + token * a.experts;
    const bool real = a.padding_mask == nullptr || a.padding_mask[token];
    const Real* grad_w = a.grad_weight == nullptr ? nullptr : static_cast<const Real*>(a.grad_weight) + token * a.top_n;
    if (!real && (grad_w == nullptr || std::all_of(grad_w, grad_w + a.top_n, [](Real g) { return g == 0; }))) {
      std::memset(grad, 0, a.experts * sizeof(T));  // whatever the padding holds, NaN too
      return;
    }
    row.read(a.logits, a.noise, a.noise_mult, token);
    softmax(lanes, static_cast<V*>(row.s));
    if (grad_w != nullptr) {
      read_experts(token);
      a.soft ? through_soft(grad_w) : through_gates(grad_w);
    } else {
      for (int i = 0; i < lanes.count; ++i) grad_p[i] = V{};
    }
    if (real) {
      for (int i = 0; i < lanes.count; ++i) grad_p[i] += importance[i];
    }
    V dot{};
    for (int i = 0; i < lanes.count; ++i) dot += row.s[i] * grad_p[i];
    const R mean = lanes.sum(dot);
    for (int i = 0; i < lanes.count; ++i) grad_p[i] = row.s[i] * (grad_p[i] - mean);
    if (real && z_scale != 0) {
      const LogSumExp lse = softmax(lanes, static_cast<V*>(row.z));
      const R scale = R(z_scale * lse.value());
      for (int i = 0; i < lanes.count; ++i) grad_p[i] += scale * row.z[i];
    }
    store_row<R>(grad, lanes.experts, static_cast<const V*>(grad_p));
  }
};

template <class R, class T>
void gate_backward_tokens(const GateBackward& a, double z_scale, int64_t begin, int64_t end) {
  Gradient<R, T> gradient(a, z_scale);
  for (int64_t token = begin; token < end; ++token) {
    if (token == begin || token % a.tokens == 0) gradient.start_group(token / a.tokens);
    gradient.token(token);
  }
}

// Of each token's logsumexp: 2 · grad_router_z_loss / real tokens.
template <class Real>
double z_loss_scale(const GateBackward& a) {
  if (a.grad_router_z_loss == nullptr) return 0;
  return 2.0 * double(*static_cast<const Real*>(a.grad_router_z_loss)) / real_tokens(a, 0, a.groups);
}

}  // namespace

void gate_backward(const GateBackward& a, ParallelFor parallel_for) {
  with_type(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const double z_scale = z_loss_scale<RealOf<T>>(a);
    parallel(parallel_for, a.groups * a.tokens, a.experts, [&](int64_t begin, int64_t end) {
      a.soft ? gate_backward_tokens<double, T>(a, z_scale, begin, end)
             : gate_backward_tokens<RealOf<T>, T>(a, z_scale, begin, end);
    });
  });
}

}  // namespace TOPN_NAMESPACE
