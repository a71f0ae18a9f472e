// The library of the operators.
#include "schema.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(topn_gating, m) {
  topn_gating::binding::define_operators(m);
  // On the CPU alone.
  m.def("linear(Tensor x, Tensor weight) -> Tensor logits");
  m.def(
      "linear_backward(Tensor grad_logits, Tensor x, Tensor weight, bool wants_x, bool wants_weight) -> (Tensor grad_x, "
      "Tensor grad_weight)");
}
