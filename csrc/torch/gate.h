// The operator `gate` and its gradient: see operators.h.
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
  const Tensor z = checked("logits", logits, logits, shape, type);
  const auto u = checked("noise", noise, logits, shape, compute_type(type));
  const auto mask = checked("token_mask", token_mask, logits, replace_last(shape, 1, {}), ScalarType::Bool);
  a.logits = const_data(z);
  a.noise = const_data(u);
  a.token_mask = const_data<bool>(mask);

  const Tensor weight = empty(logits, replace_last(shape, 1, {top_n}), compute_type(type));
  const Tensor expert = empty(logits, replace_last(shape, 1, {top_n}), ScalarType::Int);
  const Tensor importance = empty(logits, replace_last(shape, 2, {experts}), compute_type(type));
  const Tensor top_count = empty(logits, replace_last(shape, 2, {experts}), ScalarType::Int);
  const Tensor balance_loss = empty(logits, {}, compute_type(type));
  const Tensor router_z_loss = empty(logits, {}, compute_type(type));
  const auto space = reserve_workspace(backend, a, logits);
  a.weight = mutable_data(weight);
  a.expert = mutable_data<int32_t>(expert);
  a.importance = mutable_data(importance);
  a.top_count = mutable_data<int32_t>(top_count);
  a.balance_loss = mutable_data(balance_loss);
  a.router_z_loss = mutable_data(router_z_loss);
  a.workspace = mutable_data(space);
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
  const Shape weights = replace_last(shape, 1, {top_n}), sums = replace_last(shape, 2, {experts});
  const auto gw = checked("grad_weight", grad_weight, logits, weights, compute_type(type));
  const auto gi = checked("grad_importance", grad_importance, logits, sums, compute_type(type));
  const auto gb = checked("grad_balance_loss", grad_balance_loss, logits, {}, compute_type(type));
  const auto gz = checked("grad_router_z_loss", grad_router_z_loss, logits, {}, compute_type(type));
  const Tensor z = checked("logits", logits, logits, shape, type);
  const auto u = checked("noise", noise, logits, shape, compute_type(type));
  const auto mask = checked("token_mask", token_mask, logits, replace_last(shape, 1, {}), ScalarType::Bool);
  const Tensor chosen = checked("expert", expert, logits, weights, ScalarType::Int);
  const Tensor count = checked("top_count", top_count, logits, sums, ScalarType::Int);
  a.grad_weight = const_data(gw);
  a.grad_importance = const_data(gi);
  a.grad_balance_loss = const_data(gb);
  a.grad_router_z_loss = const_data(gz);
  a.logits = const_data(z);
  a.noise = const_data(u);
  a.token_mask = const_data<bool>(mask);
  a.expert = const_data<int32_t>(chosen);
  a.top_count = const_data<int32_t>(count);
  const Tensor grad_logits = empty(logits, shape, type);
  const auto space = reserve_workspace(backend, a, logits);
  a.grad_logits = mutable_data(grad_logits);
  a.workspace = mutable_data(space);
  backend.run(a);
  return grad_logits;
}

}  // namespace topn_gating::binding
