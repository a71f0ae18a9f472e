// Which pair holds which slot, the same on every backend: see Assignment in router.h.
#pragma once

#include <cstring>
#include <limits>

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

// docs/spec.md, step 8: a key as an integer of the same order. 0 and -0 are equal, and NaN is below all numbers.
TOPN_INLINE int32_t order_of(float key) {
  const float number = key + 0.0f;  // -0 becomes 0
  int32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  return key == key ? bits ^ (bits >> 31 & 0x7fffffff) : std::numeric_limits<int32_t>::min();
}
TOPN_INLINE int64_t order_of(double key) {
  const double number = key + 0.0;
  int64_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  return key == key ? bits ^ (bits >> 63 & 0x7fffffffffffffff) : std::numeric_limits<int64_t>::min();
}

// Returns the index over all groups of the row of an expert's slot in a group, or -1 where the expert has no such slot.
TOPN_INLINE int64_t row_of_slot(const Assignment& a, int64_t group, int64_t expert, int64_t slot) {
  if (slot < 0 || expert < 0 || expert >= a.experts) return -1;
  if (a.offsets == nullptr) return slot < a.capacity ? (group * a.experts + expert) * a.capacity + slot : -1;
  const int64_t row = (expert == 0 ? 0 : int64_t(a.offsets[expert - 1])) + slot, end = a.offsets[expert];
  return row >= 0 && row < end && end <= a.rows ? row : -1;
}

// Returns the index over all groups of the row whose slot a pair of a group holds, or -1. `pair` is token * top_n + rank in the
// group.
TOPN_INLINE int64_t held_row(const Assignment& a, int64_t group, int64_t pair) {
  const int64_t index = group * a.tokens * a.top_n + pair;
  const int64_t row = row_of_slot(a, group, a.expert[index], a.slot[index]);
  return row >= 0 && a.source[row] == pair ? row : -1;
}

// Returns the index over all groups of the pair that holds the slot of a row, or -1. `row` is an index over all groups, too.
TOPN_INLINE int64_t holding_pair(const Assignment& a, int64_t group, int64_t row) {
  const int64_t pairs = a.tokens * a.top_n, pair = a.source[row];
  if (pair < 0 || pair >= pairs) return -1;
  return held_row(a, group, pair) == row ? group * pairs + pair : -1;
}

}  // namespace topn_gating
