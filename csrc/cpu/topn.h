// docs/spec.md, step 5, for several tokens at once, one in each lane.
#pragma once

#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace topn_gating::cpu::TOPN_LEVEL {

// Finds the indices of the highest of the keys key_of(0) … key_of(count - 1), best first, ties to the lower index: inserts each
// key in turn into a sorted list of top_n entries. `Ranks` is the length of the list where it is known to the compiler, which then
// keeps it in registers, or 0.
template <int Ranks, class Key, class KeyOf>
TOPN_INLINE void insert_keys(const KeyOf& key_of, int count, int top_n, Key* keys, Key* indices) {
  using Int = std::remove_reference_t<decltype(keys[0][0])>;
  const int ranks = Ranks > 0 ? Ranks : top_n;
#pragma GCC unroll 8
  for (int r = 0; r < ranks; ++r) {
    keys[r] = Key{} + std::numeric_limits<Int>::min();
    indices[r] = Key{};
  }
  for (int i = 0; i < count; ++i) {
    const Key key = key_of(i), index = Key{} + Int(i);
    Key higher = key > keys[ranks - 1];
#pragma GCC unroll 8
    for (int r = ranks - 1; r > 0; --r) {
      const Key above = key > keys[r - 1];
      const Key moved = keys[r - 1] < key ? keys[r - 1] : key;
      keys[r] = keys[r] > moved ? keys[r] : moved;
      indices[r] = above ? indices[r - 1] : higher ? index : indices[r];
      higher = above;
    }
    keys[0] = higher ? key : keys[0];
    indices[0] = higher ? index : indices[0];
  }
}

template <int Ranks, class Key, class KeyOf>
TOPN_INLINE void insert_in_registers(const KeyOf& key_of, int count, int top_n, Key* indices) {
  Key keys[Ranks], found[Ranks];
  insert_keys<Ranks>(key_of, count, Ranks, keys, found);
  for (int r = 0; r < top_n; ++r) indices[r] = found[r];
}

// Writes the indices of the top_n highest of `count` keys, best first, ties to the lower index. `keys` is scratch memory of top_n
// elements.
template <class Key, class KeyOf>
void stable_topn(const KeyOf& key_of, int count, int top_n, Key* keys, Key* indices) {
  if (top_n == 1) return insert_in_registers<1>(key_of, count, top_n, indices);
  if (top_n == 2) return insert_in_registers<2>(key_of, count, top_n, indices);
  if (top_n <= 4) return insert_in_registers<4>(key_of, count, top_n, indices);
  if (top_n <= 8) return insert_in_registers<8>(key_of, count, top_n, indices);
  insert_keys<0>(key_of, count, top_n, keys, indices);
}

// Selection by gates (docs/spec.md, step 5): with a bias, by expert groups, or both.
template <class Scalar>
class GateSelection {
 public:
  using RowLayout = VectorLayout<Scalar>;
  using V = Vector<Scalar>;
  using Key = typename RowLayout::Key;

  explicit GateSelection(const Gate& args)
      : a_(args), keys_(selects_by_gates(a_) ? a_.experts : 0), groups_(a_.expert_groups), open_(a_.top_groups),
        scratch_(std::max(a_.top_groups, a_.top_n)) {}

  // Writes the experts that the gates p select.
  void select(const V* p, Key* experts) {
    for (int64_t i = 0; i < a_.experts; ++i) {
      keys_[i] = score_key<RowLayout>(a_.select_bias == nullptr ? p[i] : p[i] + Scalar(a_.select_bias[i]));
    }
    if (a_.expert_groups > 1) close_groups();
    stable_topn([&](int i) { return keys_[i]; }, int(a_.experts), int(a_.top_n), static_cast<Key*>(scratch_), experts);
  }

 private:
  static constexpr auto kLowest = std::numeric_limits<typename RowLayout::Int>::min();

  // Gives the experts of closed groups the lowest key.
  void close_groups() {
    const int64_t size = a_.experts / a_.expert_groups;
    for (int64_t group = 0; group < a_.expert_groups; ++group) groups_[group] = group_key(keys_ + group * size, size);
    stable_topn([&](int i) { return groups_[i]; }, int(a_.expert_groups), int(a_.top_groups), static_cast<Key*>(scratch_),
                static_cast<Key*>(open_));
    for (int64_t group = 0; group < a_.expert_groups; ++group) {
      Key is_open{};
      for (int64_t r = 0; r < a_.top_groups; ++r) is_open |= open_[r] == Key{} + typename RowLayout::Int(group);
      for (int64_t i = group * size; i < (group + 1) * size; ++i) keys_[i] = is_open ? keys_[i] : Key{} + kLowest;
    }
  }

  Key group_key(const Key* keys, int64_t size) const {
    Key first = Key{} + kLowest, second = first;
    for (int64_t i = 0; i < size; ++i) {
      const Key lower = keys[i] < first ? keys[i] : first;
      second = lower > second ? lower : second;
      first = keys[i] > first ? keys[i] : first;
    }
    if (a_.group_score == GroupScore::Max || size == 1) return first;
    return score_key<RowLayout>(score_of_key<RowLayout>(first) + score_of_key<RowLayout>(second));
  }

  const Gate& a_;
  Scratch<Key> keys_;     // (e) of the selection scores
  Scratch<Key> groups_;   // (expert groups) of their scores
  Scratch<Key> open_;     // (top_groups) indices of the open groups
  Scratch<Key> scratch_;  // of stable_topn
};

}  // namespace topn_gating::cpu::TOPN_LEVEL
