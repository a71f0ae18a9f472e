// Chooses the level at run time.
#include "cpu/level.h"

namespace topn_gating::cpu {
namespace {

const Kernels& choose() {
#if defined(__x86_64__)
  const char* asked = std::getenv("TOPN_GATING_CPU_LEVEL");
  const auto is_asked = [&](const Kernels& level) { return asked != nullptr && std::strcmp(asked, level.level) == 0; };
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx2 || is_asked(baseline_kernels)) return baseline_kernels;
  return avx512 && !is_asked(avx2_kernels) ? avx512_kernels : avx2_kernels;
#else
  return baseline_kernels;
#endif
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace topn_gating::cpu
