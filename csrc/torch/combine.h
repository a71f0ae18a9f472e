// The operator `combine` and its gradient, on any backend (operators.h).
#pragma once

#include <tuple>

#include "tensors.h"

namespace topn_gating::binding {

template <class Backend>
Tensor combine(const Tensor& y, const Tensor& weight, const Tensor& expert, const Tensor& slot, const Tensor& source) {
  const Backend backend(expert);
  const Assigned assigned(expert, slot, source);
  const ScalarType type = y.scalar_type();
  const int64_t dim = dim_of("y", y);
  const Tensor rows = take("y", y, expert, assigned.slot_rows(dim), type);
  const Tensor w = take("weight", weight, expert, assigned.pairs(), real(type));
  const Tensor out = make(y, assigned.token_rows(dim), type);
  backend.run(Combine{dtype_of("y", type), assigned.sizes, dim, pointer(rows), pointer(w), written(out)});
  return out;
}

template <class Backend>
std::tuple<Tensor, Tensor> combine_backward(const Tensor& grad_out, const Tensor& y, const Tensor& weight,
                                            const Tensor& expert, const Tensor& slot, const Tensor& source) {
  const Backend backend(expert);
  const Assigned assigned(expert, slot, source);
  const ScalarType type = y.scalar_type();
  const int64_t dim = dim_of("y", y);
  const Tensor grad = take("grad_out", grad_out, expert, assigned.token_rows(dim), type);
  const Tensor rows = take("y", y, expert, assigned.slot_rows(dim), type);
  const Tensor w = take("weight", weight, expert, assigned.pairs(), real(type));
  const Tensor grad_y = make(y, assigned.slot_rows(dim), type);
  const Tensor grad_weight = make(weight, assigned.pairs(), real(type));
  backend.run(CombineBackward{dtype_of("y", type), assigned.sizes, dim, pointer(grad), pointer(rows), pointer(w),
                              written(grad_y), written(grad_weight)});
  return {grad_y, grad_weight};
}

}  // namespace topn_gating::binding
