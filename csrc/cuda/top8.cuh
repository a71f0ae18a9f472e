// docs/spec.md, step 5, on a GPU: the eight best experts of a row whose values are in registers.
//
// A score and its expert are packed into one 32-bit key, so that one comparison orders both. Each thread sorts its keys. Then
// neighbours merge theirs and share the best eight: pairs of threads have four keys each, then four threads two, then eight
// threads one. From there on, eight threads meet eight others.
#pragma once

#include "cuda/layout.cuh"

namespace topn_gating::cuda {

// Packs the scores of a row into keys in the order of score_key. The low bits of a key hold the complement of the expert, and
// the others the upper bits of the score's key: all that matter where scores were 16-bit elements (`Exact`). Otherwise scores
// that agree in those bits are ordered by their experts alone.
template <class RowLayout, bool Exact>
class PackedKeys {
 public:
  static constexpr int kPlaces = RowLayout::width * RowLayout::count;
  static constexpr int kBits = kPlaces <= 256 ? 8 : 9;
  static constexpr int kMask = (1 << kBits) - 1;
  static_assert(kPlaces <= 512);  // 16-bit elements leave 13 bits free

  __device__ explicit PackedKeys(const RowLayout& layout) {
    TOPN_UNROLL
    for (int i = 0; i < RowLayout::count; i += kPerWord) {
      unsigned word = 0;
      TOPN_UNROLL
      for (int j = 0; j < kPerWord; ++j) word |= unsigned(kMask - layout.index(i + j)) << (j * 32 / kPerWord);
      keep(word);
      places_[i / kPerWord] = word;
    }
  }
  // Packs value i, a score without a sign at zero: see `canonical`.
  __device__ __forceinline__ int32_t pack(float score, int i) const {
    const int32_t bits = __float_as_int(score);
    const int32_t ordered = bits ^ ((bits >> 31) & 0x7fffffff);
    const unsigned word = places_[i / kPerWord];
    if constexpr (kBits == 8) return int32_t(select_bytes(unsigned(ordered), word, 0x3214 + i % kPerWord));
    return (ordered & ~kMask) | int32_t(i % kPerWord == 0 ? word & 0xffffu : word >> 16);
  }
  // Returns the expert: for any integer one of a row's places.
  static __device__ __forceinline__ int expert(int32_t key) { return ~key & (kPlaces - 1); }
  // Returns the score; where keys are not exact, its upper bits followed by zeros.
  static __device__ __forceinline__ float score(int32_t key) {
    return __int_as_float((key ^ ((key >> 31) & 0x7fffffff)) & (Exact ? 0xffffe000 : ~kMask));
  }

 private:
  static constexpr int kPerWord = kBits == 8 ? 4 : 2;
  unsigned places_[RowLayout::count / kPerWord];  // the complements of the experts, some in each word
};

// Returns a score's representative among those that are equal in step 5: 0 for -0, and one NaN for all.
__device__ __forceinline__ float canonical(float score) {
#ifdef TOPN_SIMT_HOST
  return score == score ? score + 0.0f : __int_as_float(0x7fffffff);
#else
  return score + 0.0f;  // a GPU's sums have one NaN
#endif
}

// Sorts `Size` keys from `First` on in descending order (Batcher's odd-even merge sort; `Step` is the distance of the keys that
// a merge looks at). These are templates because registers can only be indexed by compile-time constants.
__device__ __forceinline__ void order(int32_t& a, int32_t& b) {
  const int32_t higher = a > b ? a : b;
  b = a > b ? b : a;
  a = higher;
}
template <int First, int Size, int Step, int Count>
__device__ __forceinline__ void merge_sorted(int32_t (&keys)[Count]) {
  if constexpr (2 * Step < Size) {
    merge_sorted<First, Size, 2 * Step>(keys);
    merge_sorted<First + Step, Size, 2 * Step>(keys);
    TOPN_UNROLL
    for (int i = First + Step; i + Step < First + Size; i += 2 * Step) order(keys[i], keys[i + Step]);
  } else {
    order(keys[First], keys[First + Step]);
  }
}
template <int First, int Size, int Count>
__device__ __forceinline__ void sort_descending(int32_t (&keys)[Count]) {
  if constexpr (Size > 1) {
    sort_descending<First, Size / 2>(keys);
    sort_descending<First + Size / 2, Size / 2>(keys);
    merge_sorted<First, Size, 1>(keys);
  }
}

// Finds the eight highest of the keys that `Width` threads hold, `Count` each.
template <int Width, int Count>
class Top8 {
 public:
  static_assert(Count == 8 || Count == 16);
  static constexpr int ranks = Width < 8 ? 8 / Width : 1;  // of a thread
  static constexpr int kNoRank = 64;

  __device__ explicit Top8(int thread) {
    const int low = thread & 1, high = thread >> 1 & 1, upper = thread >> 2 & 1;
    const int quarter = high ? (low ? 1 : 3) : low ? 2 : 0;
    first_rank = Width == 1   ? 0
                 : Width == 2 ? 4 * low
                 : Width == 4 ? 2 * quarter
                 : thread >= 8 ? kNoRank
                 : upper       ? 7 - 2 * quarter
                               : 2 * quarter;
    const int octet = thread >> 3;
    higher_ = !low << kOf8Pair | (high == low) << kOf4Pair | !high << kOf4;
    for (int i = 0; i < 3; ++i) {
      // Octets alternate in direction, so that the two that meet next rise and fall.
      const int ascending = __popc(unsigned(octet & ((1 << i) - 1))) & 1;
      const int by4 = upper ? quarter >= 2 : quarter < 2, by2 = (quarter & 1) == upper, by1 = !upper;
      higher_ |= (by4 ^ ascending) << (kOfOctet + 3 * i) | (by2 ^ ascending) << (kOfOctet + 3 * i + 1) |
                 (by1 ^ ascending) << (kOfOctet + 3 * i + 2);
    }
    keep(higher_);
    keep(first_rank);
  }
  // Returns the thread that has a rank, one of the eight.
  static __device__ __forceinline__ int thread_of(int rank) {
    if constexpr (Width < 8) {
      return Width == 1 ? 0 : Width == 2 ? rank >> 2 & 1 : 0x2130 >> ((rank >> 1 & 3) << 2) & 3;
    } else {
      return 0x42715360 >> ((rank & 7) << 2) & 7;
    }
  }

  // Overwrites the keys. This thread has the ranks from first_rank on; kNoRank and higher ones are none.
  __device__ __forceinline__ void find(int32_t (&keys)[Count], int32_t (&best)[ranks]) {
    sort_descending<0, 8>(keys);
    if constexpr (Count == 16) {
      sort_descending<8, 8>(keys);
      TOPN_UNROLL
      for (int i = 0; i < 8; ++i) keys[i] = keys[i] > keys[15 - i] ? keys[i] : keys[15 - i];
      TOPN_UNROLL
      for (int step = 4; step > 0; step /= 2) {
        TOPN_UNROLL
        for (int i = 0; i < 8; ++i) {
          if ((i & step) == 0) order(keys[i], keys[i + step]);
        }
      }
    }
    merge(keys, best);
  }

  int first_rank;

 private:
  // Returns the higher key or the lower one, in one instruction, as that bit of higher_ says.
  __device__ __forceinline__ int32_t pick(int bit, int32_t a, int32_t b) const {
    return higher_ >> bit & 1 ? (a > b ? a : b) : (a > b ? b : a);
  }
  static __device__ __forceinline__ int32_t highest(int32_t a, int32_t b) { return a > b ? a : b; }

  __device__ __forceinline__ void merge(const int32_t (&keys)[Count], int32_t (&best)[ranks]) {
    if constexpr (Width == 1) {
      TOPN_UNROLL
      for (int i = 0; i < 8; ++i) best[i] = keys[i];
      return;
    } else {
      // The best eight of a pair rise and fall; its first thread takes the higher half of them, the second one the lower.
      int32_t pair[4], half[4];
      TOPN_UNROLL
      for (int i = 0; i < 4; ++i) pair[i] = highest(keys[i], shuffle_xor(keys[7 - i], 1));
      TOPN_UNROLL
      for (int i = 0; i < 4; ++i) half[i] = pick(kOf8Pair, pair[i], shuffle_xor(pair[3 - i], 1));
      order(half[0], half[2]);
      order(half[1], half[3]);
      order(half[0], half[1]);
      order(half[2], half[3]);
      if constexpr (Width == 2) {
        TOPN_UNROLL
        for (int i = 0; i < 4; ++i) best[i] = half[i];
        return;
      } else {
        int32_t four[2] = {highest(half[0], shuffle_xor(half[3], 3)), highest(half[1], shuffle_xor(half[2], 3))};
        four[0] = pick(kOf4Pair, four[0], shuffle_xor(four[0], 1));
        four[1] = pick(kOf4Pair, four[1], shuffle_xor(four[1], 1));
        const int32_t other = shuffle_xor(four[1], 3);
        four[1] = pick(kOf4, four[1], shuffle_xor(four[0], 3));
        four[0] = pick(kOf4, four[0], other);
        order(four[0], four[1]);
        if constexpr (Width == 4) {
          best[0] = four[0];
          best[1] = four[1];
        } else {
          int32_t key = in_order(highest(four[0], shuffle_xor(four[1], 6)), 0);
          TOPN_UNROLL
          for (int i = 0; 8 << i < Width; ++i) key = in_order(highest(key, shuffle_xor(key, 8 << i | 4)), i + 1);
          best[0] = key;
        }
      }
    }
  }
  // Sorts eight keys that rise and fall, one for each thread of an octet.
  __device__ __forceinline__ int32_t in_order(int32_t key, int level) {
    keep(higher_);  // its bits are looked up where they are needed: together they are more than there are predicates
    key = pick(kOfOctet + 3 * level, key, shuffle_xor(key, 1));
    key = pick(kOfOctet + 3 * level + 1, key, shuffle_xor(key, 3));
    return pick(kOfOctet + 3 * level + 2, key, shuffle_xor(key, 6));
  }

  // Bits of higher_: whether this thread keeps the higher key of a comparison.
  enum { kOf8Pair, kOf4Pair, kOf4, kOfOctet };
  int higher_ = 0;
};

}  // namespace topn_gating::cuda
