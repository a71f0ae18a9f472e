// docs/spec.md, step 5, on a GPU: a token's experts in the order of its scores.
//
// A score and its expert are packed into one integer, the score's key in the upper bits and the complement of the expert in the
// lower ones, so that one comparison orders both. Each thread sorts its keys. Then, rank by rank, the threads compare their
// highest remaining key, and the thread that had the highest of all removes it.
#pragma once

#include "cuda/layout.cuh"

namespace topn_gating::cuda {

// Returns the highest key of `Width` neighbouring threads.
template <int Width, class Key>
__device__ __forceinline__ Key group_max(Key key) {
  TOPN_UNROLL
  for (int by = Width / 2; by > 0; by /= 2) {
    const Key other = shuffle_xor(key, by);
    key = other > key ? other : key;
  }
  return key;
}

// Packs float scores into 64-bit keys.
struct Key64 {
  using Key = int64_t;
  template <class RowLayout>
  static __device__ __forceinline__ Key pack(float score, int expert) {
    return int64_t(uint64_t(uint32_t(score_key<RowLayout>(score))) << 32 | ~uint32_t(expert));
  }
  static __device__ __forceinline__ int expert(Key key) { return int(~uint32_t(key)); }
  static __device__ __forceinline__ float score(Key key) { return score_of(int32_t(key >> 32)); }
  // Inverts score_key.
  static __device__ __forceinline__ float score_of(int32_t key) {
    return __int_as_float(key ^ ((key >> 31) & std::numeric_limits<int32_t>::max()));
  }
  template <int Width>
  static __device__ __forceinline__ Key max(Key key) {
    if constexpr (Width == int(kWarp)) {
      const int32_t high = warp_max(int32_t(key >> 32));
      const uint32_t low = warp_max(int32_t(key >> 32) == high ? uint32_t(key) : 0u);
      return int64_t(uint64_t(uint32_t(high)) << 32 | low);
    } else {
      return group_max<Width>(key);
    }
  }
};

// Packs scores that were converted from 16-bit elements into 32-bit keys, whose upper half is the key of those 16 bits.
template <class T>
struct Key32 {
  using Key = int32_t;
  template <class RowLayout>
  static __device__ __forceinline__ Key pack(float score, int expert) {
    return Key(ordered(score) & 0xffff0000u) | Key(0xffff - expert);
  }
  static __device__ __forceinline__ int expert(Key key) { return 0xffff - (key & 0xffff); }
  static __device__ __forceinline__ float score(Key key) {
    const int32_t high = key >> 16;
    const uint16_t bits = uint16_t(high ^ ((high >> 15) & 0x7fff));
    if constexpr (std::is_same_v<T, BFloat16>) {
      return __bfloat162float(__ushort_as_bfloat16(bits));
    } else {
      return __half2float(__ushort_as_half(bits));
    }
  }
  template <int Width>
  static __device__ __forceinline__ Key max(Key key) {
    if constexpr (Width == int(kWarp)) {
      return warp_max(key);
    } else {
      return group_max<Width>(key);
    }
  }

 private:
  // Returns the key of the element that the score was converted from, in the upper half: in the order of score_key, that is
  // with NaN above everything and -0 equal to 0.
  static __device__ __forceinline__ uint32_t ordered(float score) {
    uint16_t bits;
    if constexpr (std::is_same_v<T, BFloat16>) {
      bits = __bfloat16_as_ushort(__float2bfloat16_rn(score + 0.0f));
    } else {
      bits = __half_as_ushort(__float2half_rn(score + 0.0f));
    }
    const uint32_t high = uint32_t(bits) << 16;
    const uint32_t key = high ^ (uint32_t(int32_t(high) >> 31) & 0x7fff0000u);
    return score == score ? key : 0x7fff0000u;
  }
};

// Sort `Size` keys from `First` on in descending order (Batcher's odd-even merge sort; `Step` is the distance of the keys that
// a merge looks at). These are templates because registers can only be indexed by compile-time constants.
template <class Keys>
__device__ __forceinline__ void order(Keys& keys, int i, int j) {
  const auto a = keys[i], b = keys[j];
  keys[i] = a > b ? a : b;
  keys[j] = a > b ? b : a;
}
template <int First, int Size, int Step, class Keys>
__device__ __forceinline__ void merge_sorted(Keys& keys) {
  if constexpr (2 * Step < Size) {
    merge_sorted<First, Size, 2 * Step>(keys);
    merge_sorted<First + Step, Size, 2 * Step>(keys);
    TOPN_UNROLL
    for (int i = First + Step; i + Step < First + Size; i += 2 * Step) order(keys, i, i + Step);
  } else {
    order(keys, First, First + Step);
  }
}
template <int First, int Size, class Keys>
__device__ __forceinline__ void sort_descending(Keys& keys) {
  if constexpr (Size > 1) {
    sort_descending<First, Size / 2>(keys);
    sort_descending<First + Size / 2, Size / 2>(keys);
    merge_sorted<First, Size, 1>(keys);
  }
}

// Calls chosen(rank, key) for ranks 0 to top_n - 1, in all of the row's threads. Removes the chosen keys from the sorted ones.
template <class KeyOf, class RowLayout, class Keys, class Chosen>
__device__ __forceinline__ void pop_sorted(Keys& keys, int top_n, const Chosen& chosen) {
  using Key = typename KeyOf::Key;
  for (int k = 0; k < top_n; ++k) {
    const Key best = KeyOf::template max<RowLayout::width>(keys[0]);
    const bool mine = keys[0] == best;
    TOPN_UNROLL
    for (int i = 0; i + 1 < RowLayout::count; ++i) keys[i] = mine ? keys[i + 1] : keys[i];
    if (mine) keys[RowLayout::count - 1] = std::numeric_limits<Key>::min();
    chosen(k, best);
  }
}

// Calls chosen(rank, expert) for the experts of the top_n highest keys, ties to the lower index, where keys are not packed with
// experts. Removes the chosen keys.
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
