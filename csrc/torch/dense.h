// The operator `dense` and its gradient: see operators.h.
#pragma once

#include <tuple>

#include "tensors.h"

namespace topn_gating::binding {

template <class Backend>
std::tuple<Tensor, Tensor> dense(const Tensor& weight, const Tensor& expert, const Tensor& slot, int64_t num_gates,
                                 int64_t capacity, ScalarType dtype, bool /*straight_through*/) {
  const Backend backend(weight);
  const Shape shape = shape_of(weight);
  Dense a{};
  a.dtype = dtype_of("dtype", dtype);
  a.assignment = assignment_sizes("weight", weight, num_gates, capacity);
  const Tensor w = checked("weight", weight, weight, shape, compute_type(dtype));
  const Tensor chosen = checked("expert", expert, weight, shape, ScalarType::Int);
  const Tensor slots = checked("slot", slot, weight, shape, ScalarType::Int);
  a.weight = const_data(w);
  a.assignment.expert = const_data<int32_t>(chosen);
  a.assignment.slot = const_data<int32_t>(slots);
  const Tensor dispatch = empty(weight, replace_last(shape, 1, {num_gates, capacity}), dtype);
  const Tensor combine = empty(weight, replace_last(shape, 1, {num_gates, capacity}), dtype);
  a.dispatch = mutable_data(dispatch);
  a.combine = mutable_data(combine);
  backend.run(a);
  return {dispatch, combine};
}

// A gradient (…, n, e, C) as (g, n, e, C) with strides; copied only where the groups have no common stride.
inline Tensor by_strides(const char* name, const Tensor& grad, const Tensor& slot, const Assignment& s, const Shape& shape,
                         ScalarType type, int64_t* strides) {
  STD_TORCH_CHECK(grad.scalar_type() == type, name, " must have the type of the other gradient");
  STD_TORCH_CHECK(shape_of(grad) == shape, name, " has a shape that does not fit the other arguments");
  STD_TORCH_CHECK(grad.device() == slot.device(), name, " must be on the device of the other arguments");
  const Tensor flat = torch::stable::reshape(grad, Shape{s.groups, s.tokens, s.experts, s.capacity});
  for (int i = 0; i < 4; ++i) strides[i] = flat.stride(i);
  return flat;
}

template <class Backend>
Tensor dense_backward(const std::optional<Tensor>& grad_dispatch, const std::optional<Tensor>& grad_combine,
                      const Tensor& expert, const Tensor& slot) {
  const Backend backend(slot);
  STD_TORCH_CHECK(grad_dispatch.has_value() || grad_combine.has_value(), "grad_dispatch or grad_combine must be given");
  const Tensor& some = grad_combine.has_value() ? *grad_combine : *grad_dispatch;
  const Shape shape = shape_of(some), pairs = shape_of(slot);
  STD_TORCH_CHECK(shape.size() >= 3 && pairs.size() + 1 == shape.size(),
                  "a gradient must have shape (..., tokens, experts, capacity)");
  const ScalarType type = some.scalar_type();

  DenseBackward a{};
  a.dtype = dtype_of("grad_combine", type);
  a.assignment = assignment_sizes("slot", slot, shape[shape.size() - 2], shape.back());
  const Shape expected = replace_last(pairs, 1, {a.assignment.experts, a.assignment.capacity});
  const Tensor chosen = checked("expert", expert, slot, pairs, ScalarType::Int);
  const Tensor slots = checked("slot", slot, slot, pairs, ScalarType::Int);
  a.assignment.expert = const_data<int32_t>(chosen);
  a.assignment.slot = const_data<int32_t>(slots);
  std::optional<Tensor> gd, gc;
  if (grad_dispatch.has_value()) {
    gd = by_strides("grad_dispatch", *grad_dispatch, slot, a.assignment, expected, type, a.dispatch_strides);
  }
  if (grad_combine.has_value()) {
    gc = by_strides("grad_combine", *grad_combine, slot, a.assignment, expected, type, a.combine_strides);
  }
  a.grad_dispatch = const_data(gd);
  a.grad_combine = const_data(gc);
  const Tensor grad_weight = empty(slot, pairs, compute_type(type));
  a.grad_weight = mutable_data(grad_weight);
  backend.run(a);
  return grad_weight;
}

}  // namespace topn_gating::binding
