// Which pair holds which slot, the same on every backend: see Assignment in router.h.
#pragma once

#include "inline.h"
#include "router.h"

namespace topn_gating {

// docs/spec.md, step 7: whether a pair of a rank above 0 is routed. NaN in any operand: it is not.
template <class T>
TOPN_INLINE bool is_below_probability(T draw, T weight, T threshold, T eps) {
  return draw < weight / (threshold < eps ? eps : threshold);
}
template <class T>
TOPN_INLINE bool is_above_threshold(T weight, T threshold) {
  return weight > threshold;
}

// Returns the index over all groups of the slot that a pair of a group holds, or -1. `pair` is token * top_n + rank in the group.
TOPN_INLINE int64_t held_slot(const Assignment& a, int64_t group, int64_t pair) {
  const int64_t index = group * a.tokens * a.top_n + pair;
  const int64_t e = a.expert[index], c = a.slot[index];
  if (c < 0 || c >= a.capacity || e < 0 || e >= a.experts) return -1;
  const int64_t slot = (group * a.experts + e) * a.capacity + c;
  return a.source[slot] == pair ? slot : -1;
}

// Returns the index over all groups of the pair that holds a slot, or -1. `slot` is an index over all groups, too.
TOPN_INLINE int64_t holding_pair(const Assignment& a, int64_t group, int64_t slot) {
  const int64_t pairs = a.tokens * a.top_n, pair = a.source[slot];
  if (pair < 0 || pair >= pairs) return -1;
  return held_slot(a, group, pair) == slot ? group * pairs + pair : -1;
}

}  // namespace topn_gating
