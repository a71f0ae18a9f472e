// Chooses the level at run time.
#include "cpu/level.h"

namespace topn_gating::cpu {
namespace {

const Kernels& choose() {
#if defined(__x86_64__)
  const char* asked = std::getenv("TOPN_GATING_CPU_LEVEL");
  const bool lower = asked != nullptr && std::strcmp(asked, "baseline") == 0;
  if (!lower && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    return avx2_kernels;
  }
#endif
  return baseline_kernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace topn_gating::cpu
