// A lambda over the caller's threads.
#pragma once

#include "cpu/level.h"

namespace TOPN_NAMESPACE {

// Elements of work below which a second thread costs more than it saves.
constexpr int64_t kGrain = 16384;

// Runs f(begin, end) over [0, count), where one item is about `cost` elements of work.
template <class F>
void parallel(ParallelFor parallel_for, int64_t count, int64_t cost, const F& f) {
  if (count == 0) return;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cost));
  if (count <= grain) return f(0, count);
  parallel_for(
      0, count, grain,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace TOPN_NAMESPACE
