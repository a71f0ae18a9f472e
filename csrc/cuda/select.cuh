// The pairs that hold an expert's slots where keys decide: the largest keys of its queue.
#pragma once

#include "cuda/pairs.cuh"

namespace topn_gating::cuda {

// Pairs of a queue that a warp reads at once.
constexpr int32_t kOfQueue = int32_t(kStepsAtOnce * kWarp);

// Returns whether a lane that starts there has a pair of the queue in a step.
__device__ __forceinline__ bool in_queue(int32_t start, unsigned step, int32_t count) {
  return start + int32_t(step * kWarp) < count;
}

// The least key of the pairs that hold a slot, and how many of the pairs that have it do.
template <class Key>
struct Selected {
  Key key;
  int32_t equal;
};

// Selects the largest of a queue's keys, as many as an expert has slots, digit by digit from the highest on. All threads of a
// warp call it; `counts` (kDigits) is scratch of theirs.
template <class Key>
__device__ Selected<Key> select_largest(const Key* key, int32_t count, int64_t capacity, int32_t* counts) {
  using Bits = std::make_unsigned_t<Key>;
  constexpr Bits sign = Bits(1) << (8 * sizeof(Key) - 1);  // flipped, it makes the order that of unsigned integers
  constexpr int of_lane = kDigits / int(kWarp);
  Bits prefix = 0, known = 0;  // the digits that were selected, and the mask of their bits
  int32_t rest = int32_t(capacity);  // slots that are left for keys that begin with these digits
  for (int shift = 8 * (int(sizeof(Key)) - 1); shift >= 0; shift -= 8) {
    for (int digit = int(lane_id()); digit < kDigits; digit += int(kWarp)) counts[digit] = 0;
    __syncwarp();
    for (int32_t start = int32_t(lane_id()); start < count; start += kOfQueue) {
      Bits bits[kStepsAtOnce];
      TOPN_UNROLL
      for (unsigned u = 0; u < kStepsAtOnce; ++u) {
        bits[u] = Bits(key[in_queue(start, u, count) ? start + int32_t(u * kWarp) : start]) ^ sign;
      }
      TOPN_UNROLL
      for (unsigned u = 0; u < kStepsAtOnce; ++u) {
        const bool counts_here = in_queue(start, u, count) && ((bits[u] ^ prefix) & known) == 0;
        if (counts_here) atomicAdd(&counts[bits[u] >> shift & (kDigits - 1)], 1);
      }
    }
    __syncwarp();
    // The largest digit that, with those above it, has as many keys as there are slots. Lane 0 has the highest digits.
    const int highest = kDigits - 1 - int(lane_id()) * of_lane;
    int32_t own = 0;
    for (int j = 0; j < of_lane; ++j) own += counts[highest - j];
    int32_t above = warp_scan(own) - own;
    int digit = -1;
    for (int j = 0; j < of_lane && digit < 0 && above < rest; ++j) {
      const int32_t more = counts[highest - j];
      if (above + more >= rest) {
        digit = highest - j;
      } else {
        above += more;
      }
    }
    const int selected = warp_max(digit);
    rest -= warp_max(digit < 0 ? 0 : above);
    prefix |= Bits(selected) << shift;
    known |= Bits(kDigits - 1) << shift;
    __syncwarp();
  }
  return {Key(prefix ^ sign), rest};
}

}  // namespace topn_gating::cuda
