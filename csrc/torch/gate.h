// The operator `gate` and its gradient, on any backend (operators.h).
#pragma once

#include <tuple>

#include "tensors.h"

namespace topn_gating::binding {

// What Gate and GateBackward have in common.
template <class Args>
Args gate_sizes(const Tensor& logits, int64_t top_n, double eps, double noise_mult, bool soft) {
  const Shape shape = shape_of(logits);
  STD_TORCH_CHECK(shape.size() >= 2, "logits must have shape (..., tokens, experts)");
  STD_TORCH_CHECK(top_n >= 1 && top_n <= shape.back(), "top_n must be from 1 to the number of experts (", shape.back(),
                  "), got ", top_n);
  Args a{};
  a.dtype = dtype_of("logits", logits.scalar_type());
  a.groups = product(shape, 0, shape.size() - 2);
  a.tokens = shape[shape.size() - 2];
  a.experts = shape.back();
  a.top_n = top_n;
  a.eps = eps;
  a.noise_mult = noise_mult;
  a.soft = soft;
  return a;
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gate(
    const Tensor& logits, const std::optional<Tensor>& noise, const std::optional<Tensor>& token_mask, int64_t top_n,
    double eps, double noise_mult, bool soft, bool losses) {
  const Backend backend(logits);
  Gate a = gate_sizes<Gate>(logits, top_n, eps, noise_mult, soft);
  const Shape shape = shape_of(logits);
  const int64_t experts = a.experts;
  const ScalarType type = logits.scalar_type();
  a.losses = losses;
  const Tensor z = take("logits", logits, logits, shape, type);
  const auto u = take("noise", noise, logits, shape, real(type));
  const auto mask = take("token_mask", token_mask, logits, with_last(shape, 1, {}), ScalarType::Bool);
  a.logits = pointer(z);
  a.noise = pointer(u);
  a.token_mask = pointer<bool>(mask);

  const Tensor weight = make(logits, with_last(shape, 1, {top_n}), real(type));
  const Tensor expert = make(logits, with_last(shape, 1, {top_n}), ScalarType::Int);
  const Tensor importance = make(logits, with_last(shape, 2, {experts}), real(type));
  const Tensor top_count = make(logits, with_last(shape, 2, {experts}), ScalarType::Int);
  const Tensor balance_loss = make(logits, {}, real(type));
  const Tensor router_z_loss = make(logits, {}, real(type));
  const auto space = workspace(backend, a, logits);
  a.weight = written(weight);
  a.expert = written<int32_t>(expert);
  a.importance = written(importance);
  a.top_count = written<int32_t>(top_count);
  a.balance_loss = written(balance_loss);
  a.router_z_loss = written(router_z_loss);
  a.workspace = written(space);
  backend.run(a);
  return {weight, expert, importance, top_count, balance_loss, router_z_loss};
}

template <class Backend>
Tensor gate_backward(const std::optional<Tensor>& grad_weight, const std::optional<Tensor>& grad_importance,
                     const std::optional<Tensor>& grad_balance_loss, const std::optional<Tensor>& grad_router_z_loss,
                     const Tensor& logits, const std::optional<Tensor>& noise, const std::optional<Tensor>& token_mask,
                     const Tensor& expert, const Tensor& top_count, double eps, double noise_mult, bool soft) {
  const Backend backend(logits);
  STD_TORCH_CHECK(expert.dim() >= 2, "expert must have shape (..., tokens, top_n)");
  const int64_t top_n = expert.size(expert.dim() - 1);
  GateBackward a = gate_sizes<GateBackward>(logits, top_n, eps, noise_mult, soft);
  const Shape shape = shape_of(logits);
  const int64_t experts = a.experts;
  const ScalarType type = logits.scalar_type();
  const Shape weights = with_last(shape, 1, {top_n}), sums = with_last(shape, 2, {experts});
  const auto gw = take("grad_weight", grad_weight, logits, weights, real(type));
  const auto gi = take("grad_importance", grad_importance, logits, sums, real(type));
  const auto gb = take("grad_balance_loss", grad_balance_loss, logits, {}, real(type));
  const auto gz = take("grad_router_z_loss", grad_router_z_loss, logits, {}, real(type));
  const Tensor z = take("logits", logits, logits, shape, type);
  const auto u = take("noise", noise, logits, shape, real(type));
  const auto mask = take("token_mask", token_mask, logits, with_last(shape, 1, {}), ScalarType::Bool);
  const Tensor chosen = take("expert", expert, logits, weights, ScalarType::Int);
  const Tensor count = take("top_count", top_count, logits, sums, ScalarType::Int);
  a.grad_weight = pointer(gw);
  a.grad_importance = pointer(gi);
  a.grad_balance_loss = pointer(gb);
  a.grad_router_z_loss = pointer(gz);
  a.logits = pointer(z);
  a.noise = pointer(u);
  a.token_mask = pointer<bool>(mask);
  a.expert = pointer<int32_t>(chosen);
  a.top_count = pointer<int32_t>(count);
  const Tensor grad_logits = make(logits, shape, type);
  const auto space = workspace(backend, a, logits);
  a.grad_logits = written(grad_logits);
  a.workspace = written(space);
  backend.run(a);
  return grad_logits;
}

}  // namespace topn_gating::binding
