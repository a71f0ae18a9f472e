// docs/spec.md, steps 7 and 8, on a GPU.
//
// The pairs of a group are a sequence that is divided into tiles, one for each block, and these into runs, one for each warp. A
// bin is a rank and an expert, or in the dropless layout an expert. Each run counts its routed pairs by bin; sums of the counts
// over lower ranks, earlier tiles and earlier runs are the run's first slots, from which it gives its pairs their slots in order.
// Where keys decide which pairs hold a slot, these numbers are instead the pairs' places in the queues of their experts, and a
// warp for each expert then gives its slots to the pairs of its queue that have the largest keys. All of this is in integers, so
// every schedule gives the same bits.
#include "assignment.h"
#include "cuda/kernels.h"
#include "cuda/pairs.cuh"

namespace topn_gating::cuda {
namespace {

constexpr int64_t kNoBin = -1;

enum class Slots { InOrder, ByKeys, Dropless };

template <class T>
__device__ __forceinline__ bool is_routed(const Assign& a, int64_t at, int rank) {
  if (rank == 0) return true;
  const T *weight = static_cast<const T*>(a.weight), *threshold = static_cast<const T*>(a.threshold);
  switch (a.policy) {
    case Policy::Random: {
      const T draw = static_cast<const T*>(a.draws)[at];
      return is_below_probability(draw, weight[at], threshold[rank], T(a.eps));
    }
    case Policy::Threshold: return is_above_threshold(weight[at], threshold[rank]);
    case Policy::All: return true;
    case Policy::None: return false;
  }
  return false;
}

// A block's tile of its group.
template <class T, Slots S>
struct Block {
  using Key = decltype(order_of(T()));
  static constexpr bool kDropless = S == Slots::Dropless, kByKeys = S == Slots::ByKeys;

  const AssignTask& task;
  const Assign& a;
  const int64_t group;
  const unsigned tile;
  int32_t* counters;  // (warps, warp_ints) routed pairs of each run; later the number of those before the pairs that follow
  int32_t* first;     // (bins) the tile's first slot
  int32_t* demand;    // (e) routed pairs of the group
  int32_t* starts;    // (e + 1) dropless the first row of each expert, with keys that of its queue, and the end of the last

  __device__ Block(const AssignTask& t, int32_t* memory)
      : task(t), a(t.assign), group(blockIdx.x / t.tiles), tile(blockIdx.x % t.tiles), counters(memory),
        first(counters + t.warps * t.warp_ints), demand(first + t.bins), starts(demand + t.assign.experts) {}

  __device__ int32_t* own_counters() const { return counters + warp_id() * task.warp_ints; }
  __device__ uint32_t* routed() const { return task.routed + group * task.words(); }
  __device__ int32_t* counts(unsigned t) const { return task.counts + (group * task.tiles + t) * task.bins; }
  __device__ int32_t* totals() const { return task.totals + group * task.bins; }
  __device__ Key* keys() const { return static_cast<Key*>(task.keys) + group * task.pairs; }
  __device__ int32_t* queues() const { return task.queues + group * task.pairs; }

  __device__ void clear() const {
    for (int64_t i = threadIdx.x; i < task.warps * task.warp_ints; i += blockDim.x) counters[i] = 0;
  }

  __device__ __forceinline__ int64_t bin_of(int rank, int64_t expert) const {
    return kDropless ? expert : rank * a.experts + expert;
  }

  // Returns the pair's bin, or kNoBin where it is not routed.
  __device__ __forceinline__ int64_t routed_bin(const Pair& pair) const {
    if (!pair.in_run) return kNoBin;
    const int64_t at = group * task.pairs + pair.index;
    const int64_t expert = a.expert[at];
    if (expert < 0 || expert >= a.experts) return kNoBin;
    if (a.token_mask != nullptr && !a.token_mask[group * a.tokens + pair.token]) return kNoBin;
    return is_routed<T>(a, at, pair.rank) ? bin_of(pair.rank, expert) : kNoBin;
  }

  // Counts the routed pairs of this warp's run by bin, and notes which pairs are routed.
  __device__ void count() const {
    int32_t* const own = own_counters();
    for (Run run(task, tile); run.more();) {
      Pair pair[kStepsAtOnce];
      int64_t bin[kStepsAtOnce];
      TOPN_UNROLL
      for (int u = 0; u < kStepsAtOnce; ++u) {
        pair[u] = run.next();
        bin[u] = routed_bin(pair[u]);
      }
      TOPN_UNROLL
      for (int u = 0; u < kStepsAtOnce; ++u) {
        const unsigned word = ballot(bin[u] != kNoBin);
        if (lane_id() == 0 && pair[u].in_run) routed()[pair[u].word()] = word;
        if (bin[u] != kNoBin) atomicAdd(&own[bin[u]], 1);
      }
    }
  }

  // Replaces each warp's counts by the sum of those of earlier warps, and writes the sum of all to `sums`.
  __device__ void scan_warps(int32_t* sums) const {
    for (int64_t bin = threadIdx.x; bin < task.bins; bin += blockDim.x) {
      int32_t sum = 0;
      for (unsigned w = 0; w < task.warps; ++w) {
        int32_t& counter = counters[w * task.warp_ints + bin];
        const int32_t own = counter;
        counter = sum;
        sum += own;
      }
      sums[bin] = sum;
    }
  }

  // Does the same over the group's tiles. The bins are divided among all warps of all tiles.
  __device__ void scan_tiles() const {
    for (int64_t bin = tile * task.warps + warp_id(); bin < task.bins; bin += task.tiles * task.warps) {
      int32_t before = 0;
      for (unsigned start = 0; start < task.tiles; start += kWarp) {
        const unsigned t = start + lane_id();
        const int32_t own = t < task.tiles ? counts(t)[bin] : 0;
        const int32_t sum = warp_scan(own);
        if (t < task.tiles) counts(t)[bin] = before + sum - own;
        before += shuffle(sum, kWarp - 1);
      }
      if (lane_id() == 0) totals()[bin] = before;
    }
  }

  // Computes the tile's first slot of each bin, which follows the slots of lower ranks and of earlier tiles, and the demand.
  __device__ void scan_ranks() const {
    const bool one = task.tiles == 1;  // in that case `first` holds the totals
    for (int64_t e = threadIdx.x; e < a.experts; e += blockDim.x) {
      int32_t lower = 0;
      for (int64_t bin = e; bin < task.bins; bin += a.experts) {
        const int32_t total = one ? first[bin] : totals()[bin];
        first[bin] = lower + (one ? 0 : counts(tile)[bin]);
        lower += total;
      }
      demand[e] = lower;
      if (tile == 0) a.demand[group * a.experts + e] = lower;
    }
  }

  // Computes, in one warp, the first row of each expert in the dropless layout, or the start of its queue.
  __device__ void scan_experts() const {
    if (warp_id() != 0) return;
    const int32_t align = kDropless ? int32_t(a.align) : 1;
    int32_t before = 0;
    for (int64_t start = 0; start < a.experts; start += kWarp) {
      const int64_t e = start + lane_id();
      const int32_t sum = before + warp_scan(e < a.experts ? ceil_div(demand[e], align) * align : 0);
      if (e < a.experts) {
        starts[e + 1] = sum;
        if (kDropless && tile == 0) a.offsets[e] = sum;
      }
      before = shuffle(sum, kWarp - 1);
    }
    if (lane_id() == 0) starts[0] = 0;
  }

  // Returns the first row of an expert in the group.
  __device__ __forceinline__ int64_t start_of(int64_t e) const { return kDropless ? starts[e] : e * a.capacity; }

  // Writes -1 to the sources of the rows that no pair gets. The experts are divided among all warps of all tiles.
  __device__ void free_rows() const {
    int32_t* const source = a.source + group * a.rows;
    for (int64_t e = tile * task.warps + warp_id(); e < a.experts; e += task.tiles * task.warps) {
      for (int64_t row = start_of(e) + demand[e] + lane_id(); row < start_of(e + 1); row += kWarp) source[row] = -1;
    }
    if constexpr (kDropless) {
      const int64_t threads = int64_t(task.tiles) * blockDim.x, own = int64_t(tile) * blockDim.x + threadIdx.x;
      for (int64_t row = starts[a.experts] + own; row < a.rows; row += threads) source[row] = -1;
    }
  }

  // Gives the pairs of this warp's run their slots, or their places in the queues.
  __device__ void give_slots() const {
    const T* const values = static_cast<const T*>(kByKeys ? a.keys : a.weight);
    int32_t* const own = own_counters();
    for (Run run(task, tile); run.more();) {
      Pair pair[kStepsAtOnce];
      int64_t bin[kStepsAtOnce];
      T value[kStepsAtOnce];
      TOPN_UNROLL
      for (int u = 0; u < kStepsAtOnce; ++u) {
        pair[u] = run.next();
        const int64_t at = group * task.pairs + pair[u].index;
        const bool routed_pair = pair[u].in_run && (routed()[pair[u].word()] >> lane_id() & 1);
        bin[u] = routed_pair ? bin_of(pair[u].rank, a.expert[at]) : kNoBin;
        value[u] = routed_pair ? values[at] : T(0);
      }
      TOPN_UNROLL
      for (int u = 0; u < kStepsAtOnce; ++u) {
        const unsigned peers = match(unsigned(bin[u]));
        const int before = __popc(peers & lanes_below());
        const bool routed_pair = bin[u] != kNoBin;
        const int32_t slot = routed_pair ? first[bin[u]] + own[bin[u]] + before : kBelowThreshold;
        __syncwarp();
        if (routed_pair && before == 0) own[bin[u]] += __popc(peers);
        __syncwarp();
        if (!pair[u].in_run) continue;
        if (kByKeys && bin[u] != kNoBin) {
          const int64_t place = starts[bin[u] - bin_of(pair[u].rank, 0)] + slot;
          keys()[place] = order_of(value[u]);
          queues()[place] = int32_t(pair[u].index);
        } else {
          write(pair[u], bin[u], slot, value[u]);
        }
      }
    }
  }

  // Gives the slots of each expert to the pairs of its queue with the largest keys; of equal keys the first. The experts are
  // divided among all warps of all tiles.
  __device__ void give_slots_by_keys() const {
    for (int64_t e = tile * task.warps + warp_id(); e < a.experts; e += task.tiles * task.warps) {
      const Key* const key = keys() + starts[e];
      const int32_t* const queue = queues() + starts[e];
      const int32_t count = demand[e];
      Selected least{std::numeric_limits<Key>::min(), count};
      if (count > a.capacity) least = select_largest(key, count);
      int32_t next = 0;  // the first free slot
      for (int32_t start = 0; start < count; start += int32_t(kWarp)) {
        const int32_t i = start + int32_t(lane_id());
        const bool in_queue = i < count, above = in_queue && key[i] > least.key, equal = in_queue && key[i] == least.key;
        const unsigned equals = ballot(equal);
        const bool held = above || (equal && __popc(equals & lanes_below()) < least.equal);
        const unsigned holders = ballot(held);
        if (in_queue) {
          const int64_t at = group * task.pairs + queue[i];
          const int32_t slot = next + __popc(holders & lanes_below());
          a.slot[at] = held ? slot : kOverCapacity;
          static_cast<T*>(a.kept)[at] = held ? static_cast<const T*>(a.weight)[at] : T(0);
          if (held) a.source[group * a.rows + start_of(e) + slot] = queue[i];
        }
        least.equal -= __popc(equals);
        next += __popc(holders);
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
    int32_t* const counts = own_counters();
    Bits prefix = 0, known = 0;  // the digits that were selected, and the mask of their bits
    int32_t rest = int32_t(a.capacity);  // slots that are left for keys that begin with these digits
    for (int shift = 8 * (int(sizeof(Key)) - 1); shift >= 0; shift -= 8) {
      for (int digit = int(lane_id()); digit < kDigits; digit += int(kWarp)) counts[digit] = 0;
      __syncwarp();
      for (int32_t i = int32_t(lane_id()); i < count; i += int32_t(kWarp)) {
        const Bits bits = Bits(key[i]) ^ sign;
        if (((bits ^ prefix) & known) == 0) atomicAdd(&counts[bits >> shift & (kDigits - 1)], 1);
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

  __device__ __forceinline__ void write(const Pair& pair, int64_t bin, int32_t slot, T weight) const {
    const int64_t at = group * task.pairs + pair.index;
    const bool held = bin != kNoBin && (kDropless || slot < a.capacity);
    if (held) a.source[group * a.rows + start_of(bin - bin_of(pair.rank, 0)) + slot] = int32_t(pair.index);
    a.slot[at] = bin == kNoBin || held ? slot : kOverCapacity;
    static_cast<T*>(a.kept)[at] = held ? weight : T(0);
  }
};

template <class T, Slots S>
__global__ void assign_pairs(AssignTask task) {
  SIMT_DYN_SMEM(int32_t, shared);
  const Block<T, S> block(task, task.shared ? shared : task.block_memory + blockIdx.x * task.block_ints);
  block.clear();
  __syncthreads();
  block.count();
  __syncthreads();
  block.scan_warps(task.tiles == 1 ? block.first : block.counts(block.tile));
  if (task.tiles == 1) {
    __syncthreads();
  } else {
    sync_grid();
    block.scan_tiles();
    sync_grid();
  }
  block.scan_ranks();
  __syncthreads();
  if constexpr (S != Slots::InOrder) {
    block.scan_experts();
    __syncthreads();
  }
  block.free_rows();
  block.give_slots();
  if constexpr (S == Slots::ByKeys) {
    if (task.tiles == 1) {
      __syncthreads();
    } else {
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

}  // namespace

int64_t workspace_bytes(const Assign& a) { return task_of(a).bytes; }

cudaError_t run(const Assign& a, cudaStream_t stream) {
  const AssignTask task = task_of(a);
  const int64_t blocks = a.groups * task.tiles;
  if (blocks == 0) return cudaSuccess;
  if (blocks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  if (task.bins >= std::numeric_limits<uint32_t>::max()) return cudaErrorInvalidValue;  // `match` compares 32 bits
  const auto kernel_of = [&](auto scalar) {
    using T = decltype(scalar);
    if (a.dropless()) return assign_pairs<T, Slots::Dropless>;
    return a.keys != nullptr ? assign_pairs<T, Slots::ByKeys> : assign_pairs<T, Slots::InOrder>;
  };
  const auto kernel = a.is_double ? kernel_of(double()) : kernel_of(float());
  const size_t shared = task.shared ? task.block_ints * sizeof(int32_t) : 0;
  const unsigned grid = unsigned(blocks), block = task.warps * kWarp;
  return task.tiles == 1 ? SIMT_LAUNCH(kernel, grid, block, shared, stream, task)
                         : SIMT_LAUNCH_COOPERATIVE(kernel, grid, block, shared, stream, task);
}

cudaError_t run(const AssignBackward& a, cudaStream_t stream) {
  if (a.pairs == 0) return cudaSuccess;
  const auto kernel = a.is_double ? assign_backward_pairs<double> : assign_backward_pairs<float>;
  return SIMT_LAUNCH(kernel, grid_of(ceil_div<int64_t>(a.pairs, SIMT_BLOCK_THREADS)), SIMT_BLOCK_THREADS, 0, stream, a);
}

}  // namespace topn_gating::cuda
