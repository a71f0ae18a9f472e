// SPEC step 5 where each lane has a token.
#pragma once

#include "cpu/simd.h"

namespace TOPN_NAMESPACE {

// The experts of the highest scores, best first, ties to the lower index: each score in turn goes into a sorted list. Ranks:
// the length of the list where it shall lie in registers, 0: top_n, in memory.
template <int Ranks, class Lanes>
TOPN_INLINE void insert_scores(const Lanes& lanes, const typename Lanes::V* s, int top_n, typename Lanes::Key* keys,
                               typename Lanes::Key* experts) {
  using Key = typename Lanes::Key;
  using Int = typename Lanes::Int;
  const int ranks = Ranks > 0 ? Ranks : top_n;
#pragma GCC unroll 8
  for (int r = 0; r < ranks; ++r) {
    keys[r] = Key{} + std::numeric_limits<Int>::min();
    experts[r] = Key{};
  }
  for (int i = 0; i < lanes.count; ++i) {
    const Key key = score_key<Lanes>(s[i]), expert = Key{} + Int(i);
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

template <int Ranks, class Lanes>
TOPN_INLINE void insert_in_registers(const Lanes& lanes, const typename Lanes::V* s, int top_n,
                                     typename Lanes::Key* experts) {
  typename Lanes::Key keys[Ranks], found[Ranks];
  insert_scores<Ranks>(lanes, s, Ranks, keys, found);
  for (int r = 0; r < top_n; ++r) experts[r] = found[r];
}

// `experts` and the scratch `keys` have top_n elements.
template <class Lanes>
void stable_topn(const Lanes& lanes, const typename Lanes::V* s, int top_n, typename Lanes::Key* keys,
                 typename Lanes::Key* experts) {
  if (top_n == 1) return insert_in_registers<1>(lanes, s, top_n, experts);
  if (top_n == 2) return insert_in_registers<2>(lanes, s, top_n, experts);
  if (top_n <= 4) return insert_in_registers<4>(lanes, s, top_n, experts);
  if (top_n <= 8) return insert_in_registers<8>(lanes, s, top_n, experts);
  insert_scores<0>(lanes, s, top_n, keys, experts);
}

}  // namespace TOPN_NAMESPACE
