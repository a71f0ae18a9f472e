// docs/spec.md, step 5, for several tokens at once, one in each lane.
#pragma once

#include "cpu/simd.h"

namespace topn_gating::cpu::TOPN_LEVEL {

// Finds the experts of the highest scores, best first, ties to the lower index: inserts each score in turn into a sorted list of
// top_n entries. `Ranks` is the length of the list where it is known to the compiler, which then keeps it in registers, or 0.
template <int Ranks, class RowLayout>
TOPN_INLINE void insert_scores(const RowLayout& layout, const typename RowLayout::V* s, int top_n,
                               typename RowLayout::Key* keys, typename RowLayout::Key* experts) {
  using Key = typename RowLayout::Key;
  using Int = typename RowLayout::Int;
  const int ranks = Ranks > 0 ? Ranks : top_n;
#pragma GCC unroll 8
  for (int r = 0; r < ranks; ++r) {
    keys[r] = Key{} + std::numeric_limits<Int>::min();
    experts[r] = Key{};
  }
  for (int i = 0; i < layout.count; ++i) {
    const Key key = score_key<RowLayout>(s[i]), expert = Key{} + Int(i);
    Key higher = key > keys[ranks - 1];
#pragma GCC unroll 8
    for (int r = ranks - 1; r > 0; --r) {
      const Key above = key > keys[r - 1];
      const Key moved = keys[r - 1] < key ? keys[r - 1] : key;
      keys[r] = keys[r] > moved ? keys[r] : moved;
      experts[r] = above ? experts[r - 1] : higher ? expert : experts[r];
      higher = above;
    }
    keys[0] = higher ? key : keys[0];
    experts[0] = higher ? expert : experts[0];
  }
}

template <int Ranks, class RowLayout>
TOPN_INLINE void insert_in_registers(const RowLayout& layout, const typename RowLayout::V* s, int top_n,
                                     typename RowLayout::Key* experts) {
  typename RowLayout::Key keys[Ranks], found[Ranks];
  insert_scores<Ranks>(layout, s, Ranks, keys, found);
  for (int r = 0; r < top_n; ++r) experts[r] = found[r];
}

// Writes the experts of the top_n highest scores, best first, ties to the lower index. `keys` is scratch memory of top_n
// elements.
template <class RowLayout>
void stable_topn(const RowLayout& layout, const typename RowLayout::V* s, int top_n, typename RowLayout::Key* keys,
                 typename RowLayout::Key* experts) {
  if (top_n == 1) return insert_in_registers<1>(layout, s, top_n, experts);
  if (top_n == 2) return insert_in_registers<2>(layout, s, top_n, experts);
  if (top_n <= 4) return insert_in_registers<4>(layout, s, top_n, experts);
  if (top_n <= 8) return insert_in_registers<8>(layout, s, top_n, experts);
  insert_scores<0>(layout, s, top_n, keys, experts);
}

}  // namespace topn_gating::cpu::TOPN_LEVEL
