// The operator `dispatch` and its gradient, on any backend (operators.h).
#pragma once

#include <tuple>

#include "tensors.h"

namespace topn_gating::binding {

template <class Backend>
Tensor dispatch(const Tensor& x, const Tensor& weight, const Tensor& expert, const Tensor& slot, const Tensor& source,
                bool /*straight_through*/) {
  const Backend backend(expert);
  const Assigned assigned(expert, slot, source);
  const ScalarType type = x.scalar_type();
  const int64_t dim = dim_of("x", x);
  take("weight", weight, x, assigned.pairs(), real(type));
  const Tensor rows = take("x", x, expert, assigned.token_rows(dim), type);
  const Tensor y = make(x, assigned.slot_rows(dim), type);
  backend.run(Dispatch{dtype_of("x", type), assigned.sizes, dim, pointer(rows), written(y)});
  return y;
}

template <class Backend>
std::tuple<Tensor, Tensor> dispatch_backward(const Tensor& grad_y, const std::optional<Tensor>& x, const Tensor& expert,
                                             const Tensor& slot, const Tensor& source) {
  const Backend backend(expert);
  const Assigned assigned(expert, slot, source);
  const ScalarType type = grad_y.scalar_type();
  const int64_t dim = dim_of("grad_y", grad_y);
  const Tensor grad = take("grad_y", grad_y, expert, assigned.slot_rows(dim), type);
  const auto rows = take("x", x, expert, assigned.token_rows(dim), type);
  const Tensor grad_x = make(grad_y, assigned.token_rows(dim), type);
  const Tensor grad_weight = make(grad_y, x.has_value() ? assigned.pairs() : Shape{0}, real(type));
  backend.run(DispatchBackward{dtype_of("grad_y", type), assigned.sizes, dim, pointer(grad), pointer(rows),
                               written(grad_x), x.has_value() ? written(grad_weight) : nullptr});
  return {grad_x, grad_weight};
}

}  // namespace topn_gating::binding
