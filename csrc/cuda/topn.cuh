// docs/spec.md, step 5, on a GPU, for rows of any size: rank by rank, the threads compare their highest remaining key.
#pragma once

#include "cuda/layout.cuh"

namespace topn_gating::cuda {

// Calls chosen(rank, expert) for the experts of the top_n highest keys, ties to the lower index. Removes the
// chosen keys.
template <class RowLayout, class Keys, class Chosen>
__device__ __forceinline__ void stable_topn(const RowLayout& layout, Keys&& keys, int top_n, const Chosen& chosen) {
  using Key = typename RowLayout::Key;
  for (int k = 0; k < top_n; ++k) {
    Key best = keys[0];
    Key where = layout.index(0);
    TOPN_UNROLL_BY(RowLayout::unroll)
    for (int i = 1; i < layout.count; ++i) {
      const bool higher = keys[i] > best;
      best = higher ? keys[i] : best;
      where = higher ? Key(layout.index(i)) : where;
    }
    const Key top = layout.max(best);
    const Key expert = layout.min(best == top ? where : std::numeric_limits<Key>::max());
    layout.drop(keys, int(expert));
    chosen(k, int(expert));
  }
}

}  // namespace topn_gating::cuda
