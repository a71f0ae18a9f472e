// The operator `dense` and its gradient: see operators.h.
#pragma once

#include <tuple>

#include "tensors.h"

namespace topn_gating::binding {

template <class Backend>
std::tuple<Tensor, Tensor> dense(const Tensor& weight, const Tensor& expert, const Tensor& slot, const Tensor& source,
                                 ScalarType dtype, bool /*straight_through*/) {
  const Backend backend(weight);
  const CheckedAssignment assignment(expert, slot, source);
  const Tensor w = checked("weight", weight, expert, assignment.pairs(), compute_type(dtype));
  const Tensor dispatch = empty(weight, assignment.dense(), dtype);
  const Tensor combine = empty(weight, assignment.dense(), dtype);
  backend.run(Dense{dtype_of("dtype", dtype), assignment.arguments, const_data(w), mutable_data(dispatch), mutable_data(combine)});
  return {dispatch, combine};
}

// A gradient (…, n, e, C) as a tensor (g, n, e, C), whose strides the kernel reads. It is copied only where the groups have no
// common stride.
inline std::optional<Tensor> with_groups(const char* name, const std::optional<Tensor>& grad, const CheckedAssignment& assignment,
                                         ScalarType type, int64_t* strides) {
  if (!grad.has_value()) return std::nullopt;
  STD_TORCH_CHECK(grad->scalar_type() == type, name, " must have the type of the other gradient");
  STD_TORCH_CHECK(shape_of(*grad) == assignment.dense(), name, " has a shape that does not fit the other arguments");
  STD_TORCH_CHECK(grad->device() == assignment.slot.device(), name, " must be on the device of the other arguments");
  const Assignment& a = assignment.arguments;
  const Tensor flat = torch::stable::reshape(*grad, Shape{a.groups, a.tokens, a.experts, a.capacity});
  for (int i = 0; i < 4; ++i) strides[i] = flat.stride(i);
  return flat;
}

template <class Backend>
Tensor dense_backward(const std::optional<Tensor>& grad_dispatch, const std::optional<Tensor>& grad_combine,
                      const Tensor& expert, const Tensor& slot, const Tensor& source) {
  const Backend backend(slot);
  STD_TORCH_CHECK(grad_dispatch.has_value() || grad_combine.has_value(), "grad_dispatch or grad_combine must be given");
  const CheckedAssignment assignment(expert, slot, source);
  const ScalarType type = (grad_combine.has_value() ? *grad_combine : *grad_dispatch).scalar_type();
  DenseBackward a{dtype_of("grad_combine", type), assignment.arguments};
  const auto gd = with_groups("grad_dispatch", grad_dispatch, assignment, type, a.dispatch_strides);
  const auto gc = with_groups("grad_combine", grad_combine, assignment, type, a.combine_strides);
  const Tensor grad_weight = empty(slot, assignment.pairs(), compute_type(type));
  a.grad_dispatch = const_data(gd);
  a.grad_combine = const_data(gc);
  a.grad_weight = mutable_data(grad_weight);
  backend.run(a);
  return grad_weight;
}

}  // namespace topn_gating::binding
