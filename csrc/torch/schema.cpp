// Defines the library torch.ops.topn_gating.
#include "schema.h"

#include <torch/csrc/stable/library.h>

TOPN_LIBRARY(m) {
  TOPN_GATING_OPERATORS(TOPN_GATING_DEFINE)
  TOPN_GATING_CPU_OPERATORS(TOPN_GATING_DEFINE)
}
