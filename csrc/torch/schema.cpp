// The library of the operators.
#include "schema.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(topn_gating, m) { topn_gating::binding::define_operators(m); }
