// The operator `linear` and its gradient: see operators.h. The CPU alone has them.
#pragma once

#include <tuple>

#include "tensors.h"

namespace topn_gating::binding {

// Returns the sizes of x (…, n, d) and weight (e, d).
inline LinearSizes linear_sizes(const Tensor& x, const Tensor& weight) {
  const Shape shape = shape_of(x);
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) >= 1 && weight.size(1) >= 1,
                  "weight must have shape (experts, features), one of each or more");
  STD_TORCH_CHECK(shape.size() >= 1 && shape.back() == weight.size(1), "x must have shape (..., features) with ",
                  weight.size(1), " features, as weight has");
  return {dtype_of("x", x.scalar_type()), product(shape, 0, shape.size() - 1), shape.back(), weight.size(0)};
}

template <class Backend>
Tensor linear(const Tensor& x, const Tensor& weight) {
  const Backend backend(x);
  Linear a{linear_sizes(x, weight)};
  const ScalarType type = x.scalar_type();
  const Tensor rows = checked("x", x, x, shape_of(x), type);
  const Tensor w = checked("weight", weight, x, shape_of(weight), type);
  const Tensor logits = empty(x, replace_last(shape_of(x), 1, {a.experts}), type);
  a.x = const_data(rows);
  a.weight = const_data(w);
  a.logits = mutable_data(logits);
  backend.run(a);
  return logits;
}

// A gradient that is not wanted is empty.
template <class Backend>
std::tuple<Tensor, Tensor> linear_backward(const Tensor& grad_logits, const Tensor& x, const Tensor& weight, bool wants_x,
                                           bool wants_weight) {
  const Backend backend(x);
  LinearBackward a{linear_sizes(x, weight)};
  const Shape shape = shape_of(x);
  const ScalarType type = x.scalar_type();
  const Tensor grad = checked("grad_logits", grad_logits, x, replace_last(shape, 1, {a.experts}), type);
  const Tensor rows = checked("x", x, x, shape, type);
  const Tensor w = checked("weight", weight, x, shape_of(weight), type);
  const Tensor grad_x = empty(x, wants_x ? shape : Shape{0}, type);
  const Tensor grad_weight = empty(x, wants_weight ? shape_of(weight) : Shape{0}, type);
  a.grad_logits = const_data(grad);
  a.x = const_data(rows);
  a.weight = const_data(w);
  a.grad_x = wants_x ? mutable_data(grad_x) : nullptr;
  a.grad_weight = wants_weight ? mutable_data(grad_weight) : nullptr;
  const auto space = reserve_workspace(backend, a, x);
  a.workspace = mutable_data(space);
  backend.run(a);
  return {grad_x, grad_weight};
}

}  // namespace topn_gating::binding
