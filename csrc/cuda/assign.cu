// docs/spec.md, steps 7 and 8, on a GPU.
//
// A bin is a line and an expert (pairs.cuh). Each team counts the routed pairs of its run by bin; sums of the counts over lower
// ranks, earlier tiles and earlier runs are the run's first slots, from which its warps, one for each line, give the pairs
// their slots in order. Tensors are read and written pair by pair, as they lie in memory, and once: in between, a block keeps
// the pairs' experts, and whether they are routed, transposed: a warp finds 32 pairs of a line side by side.
//
// Where keys decide which pairs hold a slot, the slots are instead the pairs' places in the queues of their experts, and a warp
// for each expert then gives its slots to the pairs of its queue that have the largest keys. All of this is in integers, so
// every schedule gives the same bits.
#include "assignment.h"
#include "cuda/kernels.h"
#include "cuda/pairs.cuh"

namespace topn_gating::cuda {
namespace {

enum class Slots { InOrder, ByKeys, Dropless };

// A lane's pair in a step.
struct Place {
  unsigned pair;   // token * top_n + rank in the group; beyond its end, there is no pair
  unsigned rank;
  unsigned unit;   // unit of the pair's line
  unsigned entry;  // of the pair in the step
};

// Pairs of a queue that a warp reads at once.
constexpr int32_t kOfQueue = int32_t(kStepsAtOnce * kWarp);

// Returns whether a lane that starts there has a pair of the queue in a step.
__device__ __forceinline__ bool in_queue(int32_t start, unsigned step, int32_t count) {
  return start + int32_t(step * kWarp) < count;
}

// A block's tile of its group.
template <class T, Slots S, Memory M>
struct Block {
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

  __device__ Block(const AssignTask& t, int32_t* shared)
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

  // Writes -1 to the sources of the rows that no pair gets. The experts are divided among all warps of all tiles.
  __device__ void free_rows() const {
    int32_t* const source = a.source + group * a.rows;
    for (unsigned e = tile * task.warps + warp_id(); e < experts; e += task.tiles * task.warps) {
      for (int64_t row = start_of(e) + demand[e] + lane_id(); row < start_of(e + 1); row += kWarp) source[row] = -1;
    }
    if constexpr (kDropless) {
      const int64_t threads = int64_t(task.tiles) * blockDim.x, own = int64_t(tile) * blockDim.x + threadIdx.x;
      for (int64_t row = starts[experts] + own; row < a.rows; row += threads) source[row] = -1;
    }
  }

  // Computes the slots of a unit's pairs, or their places in the queues, in several steps from `step` on.
  __device__ void give_slots(unsigned unit, unsigned step) const {
    int32_t* const own = counters + int64_t(unit) * experts;
    const int32_t* const before_tile = first + unit % task.lines * experts;
    const Code<M>* const code = codes + unit * kPitch + lane_id();
    int32_t* slot = slots + unit * kPitch + lane_id();
    Code<M> expert[kStepsAtOnce];
    TOPN_UNROLL
    for (unsigned u = 0; u < kStepsAtOnce; ++u) {
      expert[u] = code[int64_t(step + u < task.steps ? step + u : task.steps - 1) * task.step_entries()];
    }
    TOPN_UNROLL
    for (unsigned u = 0; u < kStepsAtOnce; ++u) {
      if (step + u >= task.steps) break;
      const unsigned peers = match(unsigned(expert[u]));
      const int before = __popc(peers & lanes_below());
      const bool routed = expert[u] != kNone;
      const int32_t of_tile = routed ? before_tile[expert[u]] : 0;
      int32_t of_run = 0;  // of the first of the lanes that have the expert, which alone uses the counter
      if (routed && before == 0) {
        of_run = own[expert[u]];
        own[expert[u]] = of_run + __popc(peers);
      }
      of_run = shuffle(of_run, __ffs(int(peers)) - 1);
      *slot = routed ? of_tile + of_run + before : kBelowThreshold;
      slot += task.step_entries();
      __syncwarp();
    }
  }

  // The weights, or the keys, of a lane's pairs in several steps.
  struct Values {
    T v[kStepsAtOnce];
  };
  __device__ __forceinline__ Values read_values(const Place& place, unsigned step) const {
    Values values;
    TOPN_UNROLL
    for (unsigned u = 0; u < kStepsAtOnce; ++u) {
      const unsigned pair = place.pair + (step + u) * kWarp * task.lines;
      values.v[u] = scalars_of(kByKeys ? a.keys : a.weight)[pair < task.pairs ? pair : task.pairs - 1];
    }
    return values;
  }

  // Writes what give_slots computed, or with keys puts the pairs into the queues.
  __device__ __forceinline__ void write(const Place& place, unsigned step, const Values& values) const {
    TOPN_UNROLL
    for (unsigned u = 0; u < kStepsAtOnce; ++u) {
      const unsigned pair = place.pair + (step + u) * kWarp * task.lines;
      if (step + u >= task.steps || pair >= task.pairs) break;
      const Code<M> expert = codes[int64_t(step + u) * task.step_entries() + place.entry];
      const int32_t slot = slots[u * task.step_entries() + place.entry];
      const bool routed = expert != kNone;
      if (kByKeys && routed) {
        const int64_t at = int64_t(starts[expert]) + slot;
        keys()[at] = order_of(values.v[u]);
        queues()[at] = int32_t(pair);
        continue;
      }
      const bool held = routed && (kDropless || slot < a.capacity);
      if (held) a.source[group * a.rows + start_of(expert) + slot] = int32_t(pair);
      pairs_of(a.slot)[pair] = !routed || held ? slot : kOverCapacity;
      pairs_of(static_cast<T*>(a.kept))[pair] = held ? values.v[u] : T(0);
    }
  }

  // Gives the pairs of the tile their slots, or their places in the queues.
  __device__ void give() const {
    const Place own = place_of(warp_id());
    for (unsigned step = 0; step < task.steps; step += kStepsAtOnce) {
      Values values = read_values(own, step);  // which takes as long as what follows
      for (unsigned unit = warp_id(); unit < task.units(); unit += task.warps) give_slots(unit, step);
      __syncthreads();
      write(own, step, values);
      for (unsigned unit = warp_id() + task.warps; unit < task.units(); unit += task.warps) {
        const Place place = place_of(unit);
        write(place, step, read_values(place, step));
      }
      __syncthreads();
    }
  }

  // Gives the slots of each expert to the pairs of its queue with the largest keys; of equal keys the first. The experts are
  // divided among all warps of all tiles.
  __device__ void give_slots_by_keys() const {
    for (unsigned e = tile * task.warps + warp_id(); e < experts; e += task.tiles * task.warps) {
      const Key* const key = keys() + starts[e];
      const int32_t* const queue = queues() + starts[e];
      const int32_t count = demand[e];
      Selected least{std::numeric_limits<Key>::min(), count};
      if (count > a.capacity) least = select_largest(key, count);
      int32_t next = 0;  // the first free slot
      for (int32_t start = int32_t(lane_id()); start - int32_t(lane_id()) < count; start += kOfQueue) {
        Key own[kStepsAtOnce];
        int32_t pair[kStepsAtOnce];
        T weight[kStepsAtOnce];
        TOPN_UNROLL
        for (unsigned u = 0; u < kStepsAtOnce; ++u) {
          const int32_t i = in_queue(start, u, count) ? start + int32_t(u * kWarp) : count - 1;
          own[u] = key[i];
          pair[u] = queue[i];
        }
        TOPN_UNROLL
        for (unsigned u = 0; u < kStepsAtOnce; ++u) weight[u] = scalars_of(a.weight)[pair[u]];
        TOPN_UNROLL
        for (unsigned u = 0; u < kStepsAtOnce; ++u) {
          const bool there = in_queue(start, u, count);
          const unsigned equals = ballot(there && own[u] == least.key);
          const bool equal = equals >> lane_id() & 1;
          const bool held = (there && own[u] > least.key) || (equal && __popc(equals & lanes_below()) < least.equal);
          const unsigned holders = ballot(held);
          if (there) {
            const int32_t slot = next + __popc(holders & lanes_below());
            pairs_of(a.slot)[pair[u]] = held ? slot : kOverCapacity;
            pairs_of(static_cast<T*>(a.kept))[pair[u]] = held ? weight[u] : T(0);
            if (held) a.source[group * a.rows + start_of(e) + slot] = pair[u];
          }
          least.equal -= __popc(equals);
          next += __popc(holders);
        }
      }
    }
  }

  // The least key of the pairs that hold a slot, and how many of the pairs that have it do.
  struct Selected {
    Key key;
    int32_t equal;
  };

  // Selects the largest keys of a queue, as many as an expert has slots, digit by digit from the highest on.
  __device__ Selected select_largest(const Key* key, int32_t count) const {
    using Bits = std::make_unsigned_t<Key>;
    constexpr Bits sign = Bits(1) << (8 * sizeof(Key) - 1);  // flipped, it makes the order that of unsigned integers
    constexpr int of_lane = kDigits / int(kWarp);
    int32_t* const counts = counters + warp_id() * kDigits;
    Bits prefix = 0, known = 0;  // the digits that were selected, and the mask of their bits
    int32_t rest = int32_t(a.capacity);  // slots that are left for keys that begin with these digits
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
};

template <class T, Slots S, Memory M>
__global__ void __launch_bounds__(most_threads(M, sizeof(T) == 8), 1) assign_pairs(AssignTask task) {
  SIMT_DYN_SMEM(int32_t, shared);
  const Block<T, S, M> block(task, shared);
  block.clear();
  __syncthreads();
  block.count();
  __syncthreads();
  block.scan_teams();
  if (M != Memory::Workspace && task.tiles > 1 && task.clustered) {
    sync_cluster();
    block.read_cluster();
    sync_cluster();
  } else if (task.tiles > 1) {
    sync_grid();
    block.scan_tiles();
    sync_grid();
    block.read_sums();
  }
  __syncthreads();
  block.scan_ranks();
  __syncthreads();
  if constexpr (S != Slots::InOrder) {
    block.scan_experts();
    __syncthreads();
  }
  block.free_rows();
  block.give();
  if constexpr (S == Slots::ByKeys) {
    if (M != Memory::Workspace && task.tiles > 1 && task.clustered) {
      sync_cluster();
    } else if (task.tiles > 1) {
      sync_grid();
    }
    block.give_slots_by_keys();
  }
}

template <class T>
__global__ void __launch_bounds__(SIMT_BLOCK_THREADS) assign_backward_pairs(AssignBackward a) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < a.pairs; i += step) {
    static_cast<T*>(a.grad_weight)[i] = a.slot[i] >= 0 ? static_cast<const T*>(a.grad_kept)[i] : T(0);
  }
}

AssignTask plan(const Assign& a) { return task_of(a, has_clusters(assign_pairs<float, Slots::InOrder, Memory::Shared>)); }

}  // namespace

int64_t workspace_bytes(const Assign& a) { return plan(a).bytes; }

cudaError_t run(const Assign& a, cudaStream_t stream) {
  if (!fits(a)) return cudaErrorInvalidValue;
  const AssignTask task = plan(a);
  const int64_t blocks = a.groups * task.tiles;
  if (blocks == 0) return cudaSuccess;
  if (blocks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  const auto launch = [&](auto kernel) {
    const unsigned grid = unsigned(blocks), block = task.warps * kWarp;
    const size_t shared = task.shared_bytes();
    return task.tiles == 1  ? SIMT_LAUNCH(kernel, grid, block, shared, stream, task)
           : task.clustered ? SIMT_LAUNCH_CLUSTERS(kernel, grid, task.tiles, block, shared, stream, task)
                            : SIMT_LAUNCH_COOPERATIVE(kernel, grid, block, shared, stream, task);
  };
  const auto with_memory = [&](auto scalar, auto slots) {
    using T = decltype(scalar);
    constexpr Slots S = decltype(slots)::value;
    switch (task.memory) {
      case Memory::Shared: return launch(assign_pairs<T, S, Memory::Shared>);
      case Memory::SharedInts: return launch(assign_pairs<T, S, Memory::SharedInts>);
      case Memory::Workspace: return launch(assign_pairs<T, S, Memory::Workspace>);
    }
    return cudaErrorInvalidValue;
  };
  const auto with_slots = [&](auto scalar) {
    if (a.dropless()) return with_memory(scalar, std::integral_constant<Slots, Slots::Dropless>());
    if (a.keys != nullptr) return with_memory(scalar, std::integral_constant<Slots, Slots::ByKeys>());
    return with_memory(scalar, std::integral_constant<Slots, Slots::InOrder>());
  };
  return a.is_double ? with_slots(double()) : with_slots(float());
}

cudaError_t run(const AssignBackward& a, cudaStream_t stream) {
  if (a.pairs == 0) return cudaSuccess;
  const auto kernel = a.is_double ? assign_backward_pairs<double> : assign_backward_pairs<float>;
  return SIMT_LAUNCH(kernel, grid_of(ceil_div<int64_t>(a.pairs, SIMT_BLOCK_THREADS)), SIMT_BLOCK_THREADS, 0, stream, a);
}

}  // namespace topn_gating::cuda
