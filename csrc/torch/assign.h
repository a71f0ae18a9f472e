// The operator `assign` and its gradient: see operators.h.
#pragma once

#include <tuple>

#include "tensors.h"

namespace topn_gating::binding {

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> assign(const Tensor& weight, const Tensor& expert,
                                                  const std::optional<Tensor>& draws, const std::optional<Tensor>& threshold,
                                                  const std::optional<Tensor>& token_mask, int64_t num_gates,
                                                  int64_t capacity, int64_t policy, double eps) {
  const Backend backend(weight);
  const Assignment s = assignment_sizes("weight", weight, num_gates, capacity);
  const Shape shape = shape_of(weight);
  const ScalarType type = weight.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "weight must be float32 or float64, got ",
                  torch::headeronly::toString(type));
  STD_TORCH_CHECK(policy >= 0 && policy <= int64_t(Policy::None), "policy must be from 0 to 3, got ", policy);

  Assign a{s, {capacity, Policy(policy), eps}};
  a.is_double = type == ScalarType::Double;
  const bool random = a.policy == Policy::Random;
  STD_TORCH_CHECK(!random || draws.has_value(), "draws must be given for the random policy");
  STD_TORCH_CHECK(threshold.has_value() || !(random || a.policy == Policy::Threshold),
                  "threshold must be given for the random and threshold policies");
  const Tensor w = checked("weight", weight, weight, shape, type);
  const Tensor chosen = checked("expert", expert, weight, shape, ScalarType::Int);
  const auto u = checked("draws", draws, weight, shape, type);
  const auto least = checked("threshold", threshold, weight, {s.top_n}, type);
  const auto mask = checked("token_mask", token_mask, weight, replace_last(shape, 1, {}), ScalarType::Bool);
  a.weight = const_data(w);
  a.expert = const_data<int32_t>(chosen);
  a.draws = const_data(u);
  a.threshold = const_data(least);
  a.token_mask = const_data<bool>(mask);

  const Tensor kept = empty(weight, shape, type);
  const Tensor slot = empty(weight, shape, ScalarType::Int);
  const Tensor source = empty(weight, replace_last(shape, 2, {num_gates, capacity}), ScalarType::Int);
  const Tensor demand = empty(weight, replace_last(shape, 2, {num_gates}), ScalarType::Int);
  const auto space = reserve_workspace(backend, a, weight);
  a.kept = mutable_data(kept);
  a.slot = mutable_data<int32_t>(slot);
  a.source = mutable_data<int32_t>(source);
  a.demand = mutable_data<int32_t>(demand);
  a.workspace = mutable_data(space);
  backend.run(a);
  return {kept, slot, source, demand};
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
