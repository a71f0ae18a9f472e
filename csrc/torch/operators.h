// The operators as functions of torch's tensors, for any backend: each checks its tensors, fills the arguments of router.h,
// allocates the outputs, and runs the kernel.
//
// A backend is constructed from the tensor that decides where the kernels run, before anything else happens. It has
// `workspace_bytes(arguments)` and `run(arguments)` for the argument structs of router.h.
#pragma once

#include <torch/csrc/stable/library.h>

#include "assign.h"
#include "combine.h"
#include "dense.h"
#include "dispatch.h"
#include "gate.h"
#include "schema.h"
