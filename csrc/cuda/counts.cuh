// docs/spec.md, step 7 and the counts of step 8, on a GPU: which pairs of a tile are routed, and how many of each bin.
#pragma once

#include "assignment.h"
#include "cuda/pairs.cuh"

namespace topn_gating::cuda {

enum class Slots { InOrder, ByKeys, Dropless };

// A lane's pair in a step.
struct Place {
  unsigned pair;   // token * top_n + rank in the group; beyond its end, there is no pair
  unsigned rank;
  unsigned unit;   // unit of the pair's line
  unsigned entry;  // of the pair in the step
};

// The counts of the routed pairs of a block's tile of its group, and the memory where a block keeps what it knows of its pairs.
template <class T, Slots S, Memory M>
struct TileCounts {
  using Key = decltype(order_of(T()));
  static constexpr bool kDropless = S == Slots::Dropless, kByKeys = S == Slots::ByKeys;
  static constexpr Code<M> kNone = kNotRouted<M>;

  const AssignTask& task;
  const Assign& a;
  const unsigned experts;
  const int64_t group;
  const unsigned tile;
  int32_t* const counters;  // (units, e) routed pairs; later the number of those before the pairs that follow
  int32_t* const first;     // (bins) routed pairs of earlier tiles, then the tile's first slot
  int32_t* const totals;    // (bins) routed pairs of the group
  int32_t* const sums;      // (bins) routed pairs of the tile
  int32_t* const demand;    // (e) routed pairs of the group, of all lines
  int32_t* const starts;    // (e + 1) dropless each expert's first row, with keys that of its queue, and the end of the last
  int32_t* const slots;     // (steps at once, units, pitch) slots, or places in the queues
  Code<M>* const codes;     // (steps, units, pitch)

  __device__ TileCounts(const AssignTask& t, int32_t* shared)
      : task(t), a(t.assign), experts(unsigned(t.assign.experts)), group(blockIdx.x / t.tiles), tile(blockIdx.x % t.tiles),
        counters(M == Memory::Workspace ? t.block_memory + blockIdx.x * t.block_ints : shared), first(counters + t.counters),
        totals(first + t.bins), sums(totals + t.bins), demand(sums + t.bins), starts(demand + experts),
        slots(starts + experts + 1),
        codes(M == Memory::Shared ? reinterpret_cast<Code<M>*>(shared + t.block_ints)
                                  : static_cast<Code<M>*>(t.codes) + blockIdx.x * t.entries()) {}

  __device__ int32_t* counts(unsigned t) const { return task.counts + (group * task.tiles + t) * task.bins; }
  __device__ int32_t* group_totals() const { return task.totals + group * task.bins; }
  __device__ Key* keys() const { return static_cast<Key*>(task.keys) + group * task.pairs; }
  __device__ int32_t* queues() const { return task.queues + group * task.pairs; }

  // Returns the group's part of a tensor (g, n, k).
  template <class Element>
  __device__ __forceinline__ Element* pairs_of(Element* tensor) const {
    return tensor + group * task.pairs;
  }
  __device__ __forceinline__ const T* scalars_of(const void* tensor) const { return pairs_of(static_cast<const T*>(tensor)); }

  // Returns a lane's pair in the first step of a unit, whose 32 pairs are those that lie side by side in memory.
  __device__ __forceinline__ Place place_of(unsigned unit) const {
    const unsigned team = unit / task.lines, top_n = unsigned(a.top_n);
    const unsigned item = (tile * task.teams + team) * task.steps * kWarp;  // place in a line of the run's first pairs
    Place place;
    place.pair = item * task.lines + unit % task.lines * kWarp + lane_id();
    place.rank = place.pair % top_n;
    place.unit = kDropless ? unit : team * task.lines + place.rank;
    place.entry = place.unit * kPitch + (kDropless ? lane_id() : place.pair / top_n - item);
    return place;
  }
  __device__ __forceinline__ void move_on(Place& place) const {
    place.pair += kWarp * task.lines;
    if constexpr (kDropless) {
      const unsigned top_n = unsigned(a.top_n);
      place.rank += kWarp % top_n;
      if (place.rank >= top_n) place.rank -= top_n;
    }
  }

  __device__ void clear() const {
    const unsigned count = task.units() * experts;
    for (unsigned i = threadIdx.x; i < count; i += blockDim.x) counters[i] = 0;
  }

  // A lane's pairs in several steps, and what decides whether they are routed.
  struct Operands {
    unsigned pair[kStepsAtOnce];
    bool first_rank[kStepsAtOnce];
    int32_t expert[kStepsAtOnce];  // out of range where there is no valid pair
    T weight[kStepsAtOnce], draw[kStepsAtOnce], threshold[kStepsAtOnce];
  };

  // Reads them, where there is no pair of the group's last, and moves the place on.
  __device__ __forceinline__ Operands read(Place& place) const {
    const auto for_steps = [](const auto& f) {
      TOPN_UNROLL
      for (unsigned u = 0; u < kStepsAtOnce; ++u) f(u);
    };
    const bool compares = a.policy == Policy::Random || a.policy == Policy::Threshold;
    const T* const thresholds = static_cast<const T*>(a.threshold);
    Operands o{};
    bool valid[kStepsAtOnce];
    T threshold = compares ? thresholds[place.rank] : T(0);
    for_steps([&](unsigned u) {
      valid[u] = place.pair < task.pairs;
      o.pair[u] = valid[u] ? place.pair : task.pairs - 1;
      o.first_rank[u] = place.rank == 0;
      o.threshold[u] = threshold;
      move_on(place);
      if (kDropless && compares) threshold = thresholds[place.rank];
    });
    for_steps([&](unsigned u) {
      o.expert[u] = pairs_of(a.expert)[o.pair[u]];
      if (!valid[u]) o.expert[u] = -1;
    });
    if (compares) for_steps([&](unsigned u) { o.weight[u] = scalars_of(a.weight)[o.pair[u]]; });
    if (a.policy == Policy::Random) for_steps([&](unsigned u) { o.draw[u] = scalars_of(a.draws)[o.pair[u]]; });
    if (a.token_mask != nullptr) {
      const bool* const mask = a.token_mask + group * a.tokens;
      for_steps([&](unsigned u) { o.expert[u] = mask[o.pair[u] / unsigned(a.top_n)] ? o.expert[u] : -1; });
    }
    return o;
  }

  // Calls f(u, whether the pair of step u is routed). Without a comparison, the operands are 0.
  template <class F>
  __device__ __forceinline__ void for_routed(const Operands& o, const F& f) const {
    const auto for_steps = [&](const auto& passes) {
      TOPN_UNROLL
      for (unsigned u = 0; u < kStepsAtOnce; ++u) f(u, unsigned(o.expert[u]) < experts && (o.first_rank[u] || passes(u)));
    };
    if (a.policy == Policy::Random) {
      for_steps([&](unsigned u) { return is_below_probability(o.draw[u], o.weight[u], o.threshold[u], T(a.eps)); });
    } else {
      const bool all = a.policy == Policy::All;
      for_steps([&](unsigned u) { return all || is_above_threshold(o.weight[u], o.threshold[u]); });
    }
  }

  // Counts the routed pairs of the runs by bin, and notes their experts.
  __device__ void count() const {
    for (unsigned unit = warp_id(); unit < task.units(); unit += task.warps) {
      Place place = place_of(unit);
      int32_t* const own = counters + int64_t(place.unit) * experts;
      Code<M>* code = codes + place.entry;
      for (unsigned step = 0; step < task.steps; step += kStepsAtOnce) {
        const Operands operands = read(place);
        Code<M> expert[kStepsAtOnce];
        for_routed(operands, [&](unsigned u, bool routed) { expert[u] = routed ? Code<M>(operands.expert[u]) : kNone; });
        TOPN_UNROLL
        for (unsigned u = 0; u < kStepsAtOnce; ++u) {
          if (step + u >= task.steps) break;
          *code = expert[u];
          code += task.step_entries();
          if (expert[u] != kNone) atomicAdd(&own[expert[u]], 1);
        }
      }
    }
  }

  // Replaces each team's counts by the sum of those of earlier teams, and writes the sums of all.
  __device__ void scan_teams() const {
    for (unsigned bin = threadIdx.x; bin < task.bins; bin += blockDim.x) {
      const int32_t sum = scan(
          task.teams, [&](unsigned team) { return counters[int64_t(team) * task.bins + bin]; },
          [&](unsigned team, int32_t before) { counters[int64_t(team) * task.bins + bin] = before; });
      first[bin] = 0;
      (task.tiles == 1 ? totals : task.clustered ? sums : counts(tile))[bin] = sum;
    }
  }

  // Does the same over the group's tiles. The bins are divided among all warps of all tiles.
  __device__ void scan_tiles() const {
    for (unsigned bin = tile * task.warps + warp_id(); bin < task.bins; bin += task.tiles * task.warps) {
      int32_t before = 0;
      for (unsigned start = 0; start < task.tiles; start += kWarp) {
        const unsigned t = start + lane_id();
        const int32_t own = t < task.tiles ? counts(t)[bin] : 0;
        const int32_t sum = warp_scan(own);
        if (t < task.tiles) counts(t)[bin] = before + sum - own;
        before += shuffle(sum, kWarp - 1);
      }
      if (lane_id() == 0) group_totals()[bin] = before;
    }
  }

  // Reads what scan_tiles wrote.
  __device__ void read_sums() const {
    for (unsigned bin = threadIdx.x; bin < task.bins; bin += blockDim.x) {
      first[bin] = counts(tile)[bin];
      totals[bin] = group_totals()[bin];
    }
  }

  // Does what both do, in each block of a cluster, from the sums in the shared memory of all.
  __device__ void read_cluster() const {
    for (unsigned bin = threadIdx.x; bin < task.bins; bin += blockDim.x) {
      int32_t before = 0;
      const int32_t total = scan(
          task.tiles, [&](unsigned t) { return *in_block_of_cluster(&sums[bin], t); },
          [&](unsigned t, int32_t lower) { before = t == tile ? lower : before; });
      first[bin] = before;
      totals[bin] = total;
    }
  }

  // Adds the slots of lower ranks to the tile's first slots, and computes the demand.
  __device__ void scan_ranks() const {
    for (unsigned e = threadIdx.x; e < experts; e += blockDim.x) {
      const int32_t sum = scan(
          task.lines, [&](unsigned line) { return totals[line * experts + e]; },
          [&](unsigned line, int32_t lower) { first[line * experts + e] += lower; });
      demand[e] = sum;
      if (tile == 0) a.demand[group * experts + e] = sum;
    }
  }

  // Computes, in one warp, the first row of each expert in the dropless layout, or the start of its queue.
  __device__ void scan_experts() const {
    if (warp_id() != 0) return;
    const int32_t align = kDropless ? int32_t(a.align) : 1;
    int32_t before = 0;
    for (unsigned start = 0; start < experts; start += kWarp) {
      const unsigned e = start + lane_id();
      const int32_t sum = before + warp_scan(e < experts ? ceil_div(demand[e], align) * align : 0);
      if (e < experts) {
        starts[e + 1] = sum;
        if (kDropless && tile == 0) a.offsets[e] = sum;
      }
      before = shuffle(sum, kWarp - 1);
    }
    if (lane_id() == 0) starts[0] = 0;
  }

  // Returns the first row of an expert in the group.
  __device__ __forceinline__ int64_t start_of(unsigned e) const { return kDropless ? starts[e] : e * a.capacity; }
};

}  // namespace topn_gating::cuda
