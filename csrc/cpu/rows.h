// Rows of d features: what `dispatch` and `combine` share.
#pragma once

#include "cpu/half.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace TOPN_NAMESPACE {
TOPN_INLINE int64_t quotient(int64_t a, int64_t b) { return a / b; }
}  // namespace TOPN_NAMESPACE

#include "held.h"

namespace TOPN_NAMESPACE {

// Runs tokens(begin, end) over all tokens and slots(begin, end) over all slots, as one parallel loop.
template <class Tokens, class Slots>
void parallel_tokens_slots(const Assignment& a, int64_t dim, ParallelFor parallel_for, const Tokens& tokens,
                           const Slots& slots) {
  const int64_t num_tokens = a.groups * a.tokens, num_slots = a.groups * a.experts * a.capacity;
  // An item is a token and its share of the slots, so that every part of the loop gets its share of both.
  const int64_t slots_per_item = std::max<int64_t>(1, (num_slots + num_tokens - 1) / std::max<int64_t>(1, num_tokens));
  const int64_t items = std::max(num_tokens, (num_slots + slots_per_item - 1) / slots_per_item);
  parallel(parallel_for, items, dim * (a.top_n + 1), [&](int64_t begin, int64_t end) {
    tokens(std::min(begin, num_tokens), std::min(end, num_tokens));
    slots(std::min(begin * slots_per_item, num_slots), std::min(end * slots_per_item, num_slots));
  });
}

// Writes zeros to the rows of slots that no pair holds.
inline void clear_free_rows(const Assignment& a, void* rows, int64_t row_bytes, int64_t begin, int64_t end) {
  for (int64_t slot = begin; slot < end; ++slot) {
    if (holding_pair(a, slot) < 0) std::memset(static_cast<char*>(rows) + slot * row_bytes, 0, row_bytes);
  }
}

// The slots that a token's pairs hold, in rank order.
struct Held {
  int64_t count = 0;
  Scratch<int64_t> slot, pair;

  explicit Held(int64_t top_n) : slot(top_n), pair(top_n) {}

  void find(const Assignment& a, int64_t token) {
    count = 0;
    for (int64_t i = token * a.top_n; i < (token + 1) * a.top_n; ++i) {
      const int64_t s = held_slot(a, i);
      if (s < 0) continue;
      slot[count] = s;
      pair[count++] = i;
    }
  }
};

// out[j] = Σ_i scale_i rows[slot_i][j], in rank order; a null scale is 1.
template <class T>
void sum_rows(const T* rows, const Held& held, const RealOf<T>* scale, int64_t dim, T* out) {
  using R = RealOf<T>;
  using V = Vector<R>;
  constexpr int w = width<R>;
  const auto factor = [&](int64_t i) { return scale == nullptr ? R(1) : scale[held.pair[i]]; };
  int64_t j = 0;
  for (; j + w <= dim; j += w) {
    V total{};
    for (int64_t i = 0; i < held.count; ++i) total += factor(i) * load_real(rows + held.slot[i] * dim + j);
    store_real(out + j, total);
  }
  for (; j < dim; ++j) {
    R total = 0;
    for (int64_t i = 0; i < held.count; ++i) total += factor(i) * load_one(rows + held.slot[i] * dim + j);
    store_one(out + j, total);
  }
}

// Σ_j a[j] b[j], in a fixed order.
template <class T>
RealOf<T> dot(const T* a, const T* b, int64_t dim) {
  using R = RealOf<T>;
  using V = Vector<R>;
  constexpr int w = width<R>;
  V total[4] = {};
  int64_t j = 0;
  for (; j + 4 * w <= dim; j += 4 * w) {
    for (int u = 0; u < 4; ++u) total[u] += load_real(a + j + u * w) * load_real(b + j + u * w);
  }
  for (; j + w <= dim; j += w) total[0] += load_real(a + j) * load_real(b + j);
  R rest = 0;
  for (; j < dim; ++j) rest += load_one(a + j) * load_one(b + j);
  return sum_lanes((total[0] + total[1]) + (total[2] + total[3])) + rest;
}

// out[j] = scale * row[j].
template <class T>
void scale_row(const T* row, RealOf<T> scale, int64_t dim, T* out) {
  constexpr int w = width<RealOf<T>>;
  int64_t j = 0;
  for (; j + w <= dim; j += w) store_real(out + j, scale * load_real(row + j));
  for (; j < dim; ++j) store_one(out + j, scale * load_one(row + j));
}

}  // namespace TOPN_NAMESPACE
