// The kernels in plain loops and in double: what their results are compared with. Every overload reads its inputs as the
// kernels do, and writes its floating-point results as double, whatever type the kernels write. It knows neither workspaces nor
// the soft top-n.
#pragma once

#include "router.h"

namespace topn_gating::reference {

#define TOPN_GATING_RUN(Args, name) void run(const Args&);
TOPN_GATING_KERNELS(TOPN_GATING_RUN)
TOPN_GATING_CPU_KERNELS(TOPN_GATING_RUN)
#undef TOPN_GATING_RUN

}  // namespace topn_gating::reference
