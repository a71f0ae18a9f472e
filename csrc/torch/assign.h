// The operator `assign` and its gradient: see operators.h.
#pragma once

#include <tuple>

#include "tensors.h"

namespace topn_gating::binding {

// Returns the options of an assignment to rows of the experts: without a capacity in the dropless layout.
inline AssignOptions assign_options(const RoutingSizes& s, const std::optional<int64_t>& capacity, int64_t align, int64_t policy,
                                    double eps) {
  STD_TORCH_CHECK(policy >= 0 && policy <= int64_t(Policy::None), "policy must be from 0 to 3, got ", policy);
  STD_TORCH_CHECK(align >= 1 && align <= kIntMax, "align must be from 1 to 2^31 - 1, got ", align);
  if (capacity.has_value()) {
    check_capacity(*capacity);
    return {*capacity, s.experts * *capacity, align, Policy(policy), eps};
  }
  const int64_t pairs = s.tokens * s.top_n, rows = dropless_rows(pairs, s.experts, align);
  STD_TORCH_CHECK(rows <= kIntMax, "tokens * top_n + num_gates * (align - 1) must be below 2^31, rounded up to a multiple of align,"
                  " got ", pairs, " + ", s.experts, " * ", align - 1);
  return {0, rows, align, Policy(policy), eps};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> assign(
    const Tensor& weight, const Tensor& expert, const std::optional<Tensor>& draws, const std::optional<Tensor>& threshold,
    const std::optional<Tensor>& token_mask, const std::optional<Tensor>& keys, int64_t num_gates,
    const std::optional<int64_t>& capacity, int64_t align, int64_t policy, double eps) {
  const Backend backend(weight);
  const bool dropless = !capacity.has_value();
  const RoutingSizes s = routing_sizes("weight", weight, num_gates, dropless);
  const Shape shape = shape_of(weight);
  const ScalarType type = weight.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "weight must be float32 or float64, got ",
                  torch::headeronly::toString(type));
  Assign a{s, assign_options(s, capacity, align, policy, eps)};
  a.is_double = type == ScalarType::Double;
  const bool random = a.policy == Policy::Random;
  STD_TORCH_CHECK(!random || draws.has_value(), "draws must be given for the random policy");
  STD_TORCH_CHECK(threshold.has_value() || !(random || a.policy == Policy::Threshold),
                  "threshold must be given for the random and threshold policies");
  STD_TORCH_CHECK(!dropless || !keys.has_value(), "keys must be left out without a capacity, where every pair gets a slot");
  const Tensor w = checked("weight", weight, weight, shape, type);
  const Tensor chosen = checked("expert", expert, weight, shape, ScalarType::Int);
  const auto u = checked("draws", draws, weight, shape, type);
  const auto least = checked("threshold", threshold, weight, {s.top_n}, type);
  const auto mask = checked("token_mask", token_mask, weight, replace_last(shape, 1, {}), ScalarType::Bool);
  const auto priorities = checked("keys", keys, weight, shape, type);
  a.weight = const_data(w);
  a.expert = const_data<int32_t>(chosen);
  a.draws = const_data(u);
  a.threshold = const_data(least);
  a.token_mask = const_data<bool>(mask);
  a.keys = const_data(priorities);

  const Tensor kept = empty(weight, shape, type);
  const Tensor slot = empty(weight, shape, ScalarType::Int);
  const Tensor source = empty(weight, dropless ? Shape{a.rows} : replace_last(shape, 2, {num_gates, a.capacity}), ScalarType::Int);
  const Tensor demand = empty(weight, dropless ? Shape{num_gates} : replace_last(shape, 2, {num_gates}), ScalarType::Int);
  const Tensor offsets = empty(weight, {dropless ? num_gates : 0}, ScalarType::Int);
  a.kept = mutable_data(kept);
  a.slot = mutable_data<int32_t>(slot);
  a.source = mutable_data<int32_t>(source);
  a.demand = mutable_data<int32_t>(demand);
  a.offsets = dropless ? mutable_data<int32_t>(offsets) : nullptr;
  const auto space = reserve_workspace(backend, a, weight);
  a.workspace = mutable_data(space);
  backend.run(a);
  return {kept, slot, source, demand, offsets};
}

template <class Backend>
Tensor assign_backward(const Tensor& grad_kept, const Tensor& slot) {
  const Backend backend(slot);
  const Shape shape = shape_of(slot);
  const ScalarType type = grad_kept.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "grad_kept must be float32 or float64, got ",
                  torch::headeronly::toString(type));
  const Tensor grad = checked("grad_kept", grad_kept, slot, shape, type);
  const Tensor slots = checked("slot", slot, slot, shape, ScalarType::Int);
  const Tensor grad_weight = empty(grad_kept, shape, type);
  backend.run(AssignBackward{type == ScalarType::Double, product(shape, 0, shape.size()), const_data(grad),
                             const_data<int32_t>(slots), mutable_data(grad_weight)});
  return grad_weight;
}

}  // namespace topn_gating::binding
