// The kernels on a problem.
#pragma once

#include <vector>

#include "call.h"
#include "problem.h"

namespace topn_gating::bench {

struct Kernel {
  const char* name;
  void (*set_up)(Call&, const Problem&);  // the problem outlives the call
  bool on_cpu_alone = false;
};
extern const std::vector<Kernel> kKernels;

}  // namespace topn_gating::bench
