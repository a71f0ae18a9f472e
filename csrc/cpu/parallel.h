// Parallel loops over lambdas.
#pragma once

#include "cpu/level.h"

namespace topn_gating::cpu::TOPN_LEVEL {

// The least work for which another thread is woken, in nanoseconds. Of 25, 50 and 100 µs, 25 was as fast as any or faster for
// every operator of 1024 tokens, on two virtual cores whose threads sleep between calls.
constexpr double kThreadWork = 2.5e4;

// Runs f(first, last) for parts that together cover [0, count), on the threads of `parallel_for`. `cost` is an estimate of the
// time that a core takes for one item, in nanoseconds. If a call of f throws, rethrows one of the exceptions after all calls
// have ended: an exception may not leave a thread of OpenMP.
template <class F>
void parallel(ParallelFor parallel_for, int64_t count, double cost, const F& f) {
  if (count == 0) return;
  if (double(count) * cost < 2 * kThreadWork) return f(0, count);
  struct Loop {
    const F& f;
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
    std::exception_ptr exception = nullptr;
  } loop{f};
  const int64_t grain = std::max<int64_t>(1, int64_t(kThreadWork / cost));
  parallel_for(
      0, count, grain,
      [](int64_t first, int64_t last, void* context) {
        Loop& loop = *static_cast<Loop*>(context);
        try {
          loop.f(first, last);
        } catch (...) {
          if (!loop.failed.test_and_set()) loop.exception = std::current_exception();
        }
      },
      &loop);
  if (loop.exception) std::rethrow_exception(loop.exception);
}

}  // namespace topn_gating::cpu::TOPN_LEVEL
