// The operator `dispatch` and its gradient: see operators.h.
#pragma once

#include <tuple>

#include "tensors.h"

namespace topn_gating::binding {

template <class Backend>
Tensor dispatch(const Tensor& x, const Tensor& weight, const Tensor& expert, const Tensor& slot, const Tensor& source,
                const std::optional<Tensor>& offsets, bool /*straight_through*/) {
  const Backend backend(expert);
  const CheckedAssignment assignment(expert, slot, source, offsets);
  const ScalarType type = x.scalar_type();
  const int64_t dim = dim_of("x", x);
  checked("weight", weight, x, assignment.pairs(), compute_type(type));
  const Tensor rows = checked("x", x, expert, assignment.token_rows(dim), type);
  const Tensor y = empty(x, assignment.slot_rows(dim), type);
  backend.run(Dispatch{{dtype_of("x", type), assignment.arguments, dim}, const_data(rows), mutable_data(y)});
  return y;
}

template <class Backend>
std::tuple<Tensor, Tensor> dispatch_backward(const Tensor& grad_y, const std::optional<Tensor>& x, const Tensor& expert,
                                             const Tensor& slot, const Tensor& source,
                                             const std::optional<Tensor>& offsets) {
  const Backend backend(expert);
  const CheckedAssignment assignment(expert, slot, source, offsets);
  const ScalarType type = grad_y.scalar_type();
  const int64_t dim = dim_of("grad_y", grad_y);
  const Tensor grad = checked("grad_y", grad_y, expert, assignment.slot_rows(dim), type);
  const auto rows = checked("x", x, expert, assignment.token_rows(dim), type);
  const Tensor grad_x = empty(grad_y, assignment.token_rows(dim), type);
  const Tensor grad_weight = empty(grad_y, x.has_value() ? assignment.pairs() : Shape{0}, compute_type(type));
  backend.run(DispatchBackward{{dtype_of("grad_y", type), assignment.arguments, dim}, const_data(grad), const_data(rows),
                               mutable_data(grad_x), x.has_value() ? mutable_data(grad_weight) : nullptr});
  return {grad_x, grad_weight};
}

}  // namespace topn_gating::binding
