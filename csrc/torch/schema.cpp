// Defines the library torch.ops.topn_gating.
#include "schema.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(topn_gating, m) {
  TOPN_GATING_OPERATORS(TOPN_GATING_DEFINE)
  TOPN_GATING_CPU_OPERATORS(TOPN_GATING_DEFINE)
}
