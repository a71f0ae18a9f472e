// docs/spec.md, steps 7 and 8, on a GPU.
//
// The pairs of a group are a sequence that is divided into tiles, one for each block, and these into runs, one for each warp. A
// bin is a rank and an expert, or in the dropless layout an expert. Each run counts its routed pairs by bin; sums of the counts over lower ranks, earlier tiles and
// earlier runs are the run's first slots, from which it gives its pairs their slots in order. All of this is in integers, so
// every schedule gives the same bits.
#include "assignment.h"
#include "cuda/kernels.h"
#include "cuda/pairs.cuh"

namespace topn_gating::cuda {
namespace {

constexpr int64_t kNoBin = -1;

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
template <class T, bool Dropless>
struct Block {
  const AssignTask& task;
  const Assign& a;
  const int64_t group;
  const unsigned tile;
  int32_t* counters;  // (warps, bins) routed pairs of each run; later the number of those before the pairs that follow
  int32_t* first;     // (bins) the tile's first slot
  int32_t* demand;    // (e) routed pairs of the group
  int32_t* starts;    // (e + 1) first row of each expert, and the end of the last one's rows; in the dropless layout alone

  __device__ Block(const AssignTask& t, int32_t* memory)
      : task(t), a(t.assign), group(blockIdx.x / t.tiles), tile(blockIdx.x % t.tiles), counters(memory),
        first(counters + t.warps * t.bins), demand(first + t.bins), starts(demand + t.assign.experts) {}

  __device__ int32_t* own_counters() const { return counters + warp_id() * task.bins; }
  __device__ uint32_t* routed() const { return task.routed + group * task.words(); }
  __device__ int32_t* counts(unsigned t) const { return task.counts + (group * task.tiles + t) * task.bins; }
  __device__ int32_t* totals() const { return task.totals + group * task.bins; }

  __device__ void clear() const {
    for (int64_t i = threadIdx.x; i < task.warps * task.bins; i += blockDim.x) counters[i] = 0;
  }

  __device__ __forceinline__ int64_t bin_of(int rank, int64_t expert) const {
    return Dropless ? expert : rank * a.experts + expert;
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
        const int32_t own = counters[w * task.bins + bin];
        counters[w * task.bins + bin] = sum;
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

  // Computes, in one warp, the first row of each expert in the dropless layout.
  __device__ void scan_experts() const {
    if (warp_id() != 0) return;
    const int32_t align = int32_t(a.align);
    int32_t before = 0;
    for (int64_t start = 0; start < a.experts; start += kWarp) {
      const int64_t e = start + lane_id();
      const int32_t sum = before + warp_scan(e < a.experts ? ceil_div(demand[e], align) * align : 0);
      if (e < a.experts) {
        starts[e + 1] = sum;
        if (tile == 0) a.offsets[e] = sum;
      }
      before = shuffle(sum, kWarp - 1);
    }
    if (lane_id() == 0) starts[0] = 0;
  }

  // Returns the first row of an expert in the group.
  __device__ __forceinline__ int64_t start_of(int64_t e) const { return Dropless ? starts[e] : e * a.capacity; }

  // Writes -1 to the sources of the rows that no pair gets. The experts are divided among all warps of all tiles.
  __device__ void free_rows() const {
    int32_t* const source = a.source + group * a.rows;
    for (int64_t e = tile * task.warps + warp_id(); e < a.experts; e += task.tiles * task.warps) {
      for (int64_t row = start_of(e) + demand[e] + lane_id(); row < start_of(e + 1); row += kWarp) source[row] = -1;
    }
    if constexpr (Dropless) {
      const int64_t threads = int64_t(task.tiles) * blockDim.x;
      for (int64_t row = starts[a.experts] + int64_t(tile) * blockDim.x + threadIdx.x; row < a.rows; row += threads) source[row] = -1;
    }
  }

  // Gives the pairs of this warp's run their slots.
  __device__ void give_slots() const {
    int32_t* const own = own_counters();
    for (Run run(task, tile); run.more();) {
      Pair pair[kStepsAtOnce];
      int64_t bin[kStepsAtOnce];
      T weight[kStepsAtOnce];
      TOPN_UNROLL
      for (int u = 0; u < kStepsAtOnce; ++u) {
        pair[u] = run.next();
        const int64_t at = group * task.pairs + pair[u].index;
        const bool routed_pair = pair[u].in_run && (routed()[pair[u].word()] >> lane_id() & 1);
        bin[u] = routed_pair ? bin_of(pair[u].rank, a.expert[at]) : kNoBin;
        weight[u] = routed_pair ? static_cast<const T*>(a.weight)[at] : T(0);
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
        if (pair[u].in_run) write(pair[u], bin[u], slot, weight[u]);
      }
    }
  }

  __device__ __forceinline__ void write(const Pair& pair, int64_t bin, int32_t slot, T weight) const {
    const int64_t at = group * task.pairs + pair.index;
    const bool held = bin != kNoBin && (Dropless || slot < a.capacity);
    if (held) a.source[group * a.rows + start_of(bin - bin_of(pair.rank, 0)) + slot] = int32_t(pair.index);
    a.slot[at] = bin == kNoBin || held ? slot : kOverCapacity;
    static_cast<T*>(a.kept)[at] = held ? weight : T(0);
  }
};

template <class T, bool Dropless>
__global__ void assign_pairs(AssignTask task) {
  SIMT_DYN_SMEM(int32_t, shared);
  const Block<T, Dropless> block(task, task.shared ? shared : task.block_memory + blockIdx.x * task.block_ints);
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
  if constexpr (Dropless) {
    block.scan_experts();
    __syncthreads();
  }
  block.free_rows();
  block.give_slots();
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
  const auto kernel = a.dropless() ? (a.is_double ? assign_pairs<double, true> : assign_pairs<float, true>)
                                   : (a.is_double ? assign_pairs<double, false> : assign_pairs<float, false>);
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
