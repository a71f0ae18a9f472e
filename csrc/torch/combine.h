// The operator `combine` and its gradient: see operators.h.
#pragma once

#include <tuple>

#include "tensors.h"

namespace topn_gating::binding {

template <class Backend>
Tensor combine(const Tensor& y, const Tensor& weight, const Tensor& expert, const Tensor& slot, const Tensor& source,
               const std::optional<Tensor>& offsets) {
  const Backend backend(expert);
  const CheckedAssignment assignment(expert, slot, source, offsets);
  const ScalarType type = y.scalar_type();
  const int64_t dim = dim_of("y", y);
  const Tensor rows = checked("y", y, expert, assignment.slot_rows(dim), type);
  const Tensor w = checked("weight", weight, expert, assignment.pairs(), compute_type(type));
  const Tensor out = empty(y, assignment.token_rows(dim), type);
  backend.run(Combine{{dtype_of("y", type), assignment.arguments, dim}, const_data(rows), const_data(w), mutable_data(out)});
  return out;
}

template <class Backend>
std::tuple<Tensor, Tensor> combine_backward(const Tensor& grad_out, const Tensor& y, const Tensor& weight,
                                            const Tensor& expert, const Tensor& slot, const Tensor& source,
                                            const std::optional<Tensor>& offsets) {
  const Backend backend(expert);
  const CheckedAssignment assignment(expert, slot, source, offsets);
  const ScalarType type = y.scalar_type();
  const int64_t dim = dim_of("y", y);
  const Tensor grad = checked("grad_out", grad_out, expert, assignment.token_rows(dim), type);
  const Tensor rows = checked("y", y, expert, assignment.slot_rows(dim), type);
  const Tensor w = checked("weight", weight, expert, assignment.pairs(), compute_type(type));
  const Tensor grad_y = empty(y, assignment.slot_rows(dim), type);
  const Tensor grad_weight = empty(weight, assignment.pairs(), compute_type(type));
  backend.run(CombineBackward{{dtype_of("y", type), assignment.arguments, dim}, const_data(grad), const_data(rows), const_data(w),
                              mutable_data(grad_y), mutable_data(grad_weight)});
  return {grad_y, grad_weight};
}

}  // namespace topn_gating::binding
