// Who holds which slot, the same on every backend: see Assignment.
//
// Whoever includes this names a TOPN_NAMESPACE and has declared there quotient(a, b), which is a / b for indices.
#pragma once

#include "inline.h"
#include "router.h"

namespace TOPN_NAMESPACE {

// The slot (over all groups) that a pair of a group holds, or -1.
TOPN_INLINE int64_t held_slot(const Assignment& a, int64_t group, int64_t pair_of_group) {
  const int64_t pair = group * a.tokens * a.top_n + pair_of_group;
  const int64_t e = a.expert[pair], c = a.slot[pair];
  if (c < 0 || c >= a.capacity || e < 0 || e >= a.experts) return -1;
  const int64_t slot = (group * a.experts + e) * a.capacity + c;
  return a.source[slot] == pair_of_group ? slot : -1;
}

// The same of a pair over all groups.
TOPN_INLINE int64_t held_slot(const Assignment& a, int64_t pair) {
  const int64_t of_group = a.tokens * a.top_n, group = quotient(pair, of_group);
  return held_slot(a, group, pair - group * of_group);
}

// The pair (over all groups) that holds a slot, or -1.
TOPN_INLINE int64_t holding_pair(const Assignment& a, int64_t slot) {
  const int64_t of_group = a.tokens * a.top_n, pair = a.source[slot];
  if (pair < 0 || pair >= of_group) return -1;
  const int64_t group = quotient(slot, a.experts * a.capacity);
  return held_slot(a, group, pair) == slot ? group * of_group + pair : -1;
}

}  // namespace TOPN_NAMESPACE
