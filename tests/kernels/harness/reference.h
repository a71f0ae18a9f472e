// The kernels as plain loops in double, with whose results theirs are compared. Every overload reads its inputs in the kernel's
// types, and writes floating-point results as double. Workspaces are ignored, and the soft top-n is not implemented.
#pragma once

#include "router.h"

namespace topn_gating::reference {

#define TOPN_GATING_RUN(Args, name) void run(const Args&);
TOPN_GATING_KERNELS(TOPN_GATING_RUN)
TOPN_GATING_CPU_KERNELS(TOPN_GATING_RUN)
#undef TOPN_GATING_RUN

}  // namespace topn_gating::reference
