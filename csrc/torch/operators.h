// The operators on any backend: from torch's tensors to the arguments of router.h, run, and back.
//
// A backend is made of a tensor that lies where the kernels shall run, before anything else happens there. It has
// `workspace_bytes(arguments)` and `run(arguments)` for the argument structs of router.h.
#pragma once

#include <torch/csrc/stable/library.h>

#include "assign.h"
#include "combine.h"
#include "dense.h"
#include "dispatch.h"
#include "gate.h"

namespace topn_gating::binding {

// Registers the operators of one backend; `m` is what STABLE_TORCH_LIBRARY_IMPL hands out.
template <class Backend, class Library>
void implement_operators(Library& m) {
  m.impl("gate", TORCH_BOX(&gate<Backend>));
  m.impl("gate_backward", TORCH_BOX(&gate_backward<Backend>));
  m.impl("assign", TORCH_BOX(&assign<Backend>));
  m.impl("assign_backward", TORCH_BOX(&assign_backward<Backend>));
  m.impl("dense", TORCH_BOX(&dense<Backend>));
  m.impl("dense_backward", TORCH_BOX(&dense_backward<Backend>));
  m.impl("dispatch", TORCH_BOX(&dispatch<Backend>));
  m.impl("dispatch_backward", TORCH_BOX(&dispatch_backward<Backend>));
  m.impl("combine", TORCH_BOX(&combine<Backend>));
  m.impl("combine_backward", TORCH_BOX(&combine_backward<Backend>));
}

}  // namespace topn_gating::binding
