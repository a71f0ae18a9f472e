// Chooses the level at run time, and runs its kernels.
#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"

namespace topn_gating::cpu {

#define TOPN_GATING_RUN(Args, name) void run(const Args&, ParallelFor);
#define TOPN_GATING_LEVEL(level)           \
  namespace level {                        \
  TOPN_GATING_KERNELS(TOPN_GATING_RUN)     \
  TOPN_GATING_CPU_KERNELS(TOPN_GATING_RUN) \
  }
TOPN_GATING_LEVEL(baseline)
#if defined(__x86_64__)
TOPN_GATING_LEVEL(avx2)
TOPN_GATING_LEVEL(avx512)
#endif
#undef TOPN_GATING_LEVEL
#undef TOPN_GATING_RUN

namespace {

enum class Level { Baseline, Avx2, Avx512 };

Level choose() {
#if defined(__x86_64__)
  const char* asked = std::getenv("TOPN_GATING_CPU_LEVEL");
  const auto is_asked = [&](const char* level) { return asked != nullptr && std::strcmp(asked, level) == 0; };
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx2 || is_asked("baseline")) return Level::Baseline;
  return avx512 && !is_asked("avx2") ? Level::Avx512 : Level::Avx2;
#else
  return Level::Baseline;
#endif
}

Level chosen() {
  static const Level level = choose();
  return level;
}

template <class Args>
void run_chosen(const Args& a, ParallelFor parallel_for) {
#if defined(__x86_64__)
  if (chosen() == Level::Avx512) return avx512::run(a, parallel_for);
  if (chosen() == Level::Avx2) return avx2::run(a, parallel_for);
#endif
  baseline::run(a, parallel_for);
}

}  // namespace

#define TOPN_GATING_RUN(Args, name) \
  void run(const Args& a, ParallelFor parallel_for) { run_chosen(a, parallel_for); }
TOPN_GATING_KERNELS(TOPN_GATING_RUN)
TOPN_GATING_CPU_KERNELS(TOPN_GATING_RUN)
#undef TOPN_GATING_RUN

const char* level() {
  constexpr const char* names[] = {"baseline", "avx2", "avx512"};
  return names[int(chosen())];
}

bool has_wider_vectors_than_mkl() {
#if defined(__x86_64__)
  return chosen() == Level::Avx512 && !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

}  // namespace topn_gating::cpu
