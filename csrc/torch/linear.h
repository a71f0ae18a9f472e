// The operator `linear` and its gradient, on any backend that has them (router.h).
#pragma once

#include <tuple>

#include "tensors.h"

namespace topn_gating::binding {

// Linear's or LinearBackward's sizes, of x (…, n, d) and weight (e, d).
template <class Args>
Args linear_sizes(const Tensor& x, const Tensor& weight) {
  const Shape shape = shape_of(x);
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) >= 1 && weight.size(1) >= 1,
                  "weight must have shape (experts, features), one of each or more");
  STD_TORCH_CHECK(shape.size() >= 1 && shape.back() == weight.size(1), "x must have shape (..., features) with ",
                  weight.size(1), " features, as weight has");
  Args a{};
  a.dtype = dtype_of("x", x.scalar_type());
  a.tokens = product(shape, 0, shape.size() - 1);
  a.dim = shape.back();
  a.experts = weight.size(0);
  return a;
}

template <class Backend>
Tensor linear(const Tensor& x, const Tensor& weight) {
  const Backend backend(x);
  Linear a = linear_sizes<Linear>(x, weight);
  const ScalarType type = x.scalar_type();
  const Tensor rows = take("x", x, x, shape_of(x), type);
  const Tensor w = take("weight", weight, x, shape_of(weight), type);
  const Tensor logits = make(x, with_last(shape_of(x), 1, {a.experts}), type);
  a.x = pointer(rows);
  a.weight = pointer(w);
  a.logits = written(logits);
  backend.run(a);
  return logits;
}

// A gradient that is not wanted is empty.
template <class Backend>
std::tuple<Tensor, Tensor> linear_backward(const Tensor& grad_logits, const Tensor& x, const Tensor& weight, bool wants_x,
                                           bool wants_weight) {
  const Backend backend(x);
  LinearBackward a = linear_sizes<LinearBackward>(x, weight);
  const Shape shape = shape_of(x);
  const ScalarType type = x.scalar_type();
  const Tensor grad = take("grad_logits", grad_logits, x, with_last(shape, 1, {a.experts}), type);
  const Tensor rows = take("x", x, x, shape, type);
  const Tensor w = take("weight", weight, x, shape_of(weight), type);
  const Tensor grad_x = make(x, wants_x ? shape : Shape{0}, type);
  const Tensor grad_weight = make(x, wants_weight ? shape_of(weight) : Shape{0}, type);
  a.grad_logits = pointer(grad);
  a.x = pointer(rows);
  a.weight = pointer(w);
  a.grad_x = wants_x ? written(grad_x) : nullptr;
  a.grad_weight = wants_weight ? written(grad_weight) : nullptr;
  const auto space = workspace(backend, a, x);
  a.workspace = written(space);
  backend.run(a);
  return {grad_x, grad_weight};
}

}  // namespace topn_gating::binding
