// SPEC steps 7 and 8 on a GPU.
//
// The pairs of a group are one sequence, cut into runs, a warp each. A bin is a rank and an expert. Counting the routed pairs
// of each run and bin, and adding the counts up over runs, tiles (the runs of a block) and lower ranks, gives every run its
// first slots; it then hands them out alone, in order. Integers only: any schedule gives the same bits.
#include "cuda/kernels.h"
#include "cuda/pairs.cuh"

namespace topn_gating::cuda {
namespace {

constexpr int64_t kNoBin = -1;

template <class Real>
__device__ __forceinline__ bool is_routed(const Assign& a, int64_t at, int rank) {
  if (rank == 0) return true;
  switch (a.policy) {
    case Policy::Random: {
      const Real w = static_cast<const Real*>(a.weight)[at];
      const Real least = static_cast<const Real*>(a.threshold)[rank];
      return static_cast<const Real*>(a.draws)[at] < w / (least > Real(a.eps) ? least : Real(a.eps));
    }
    case Policy::Threshold:
      return static_cast<const Real*>(a.weight)[at] > static_cast<const Real*>(a.threshold)[rank];
    case Policy::All: return true;
    case Policy::None: return false;
  }
  return false;
}

// A block's part in its group.
template <class Real>
struct Block {
  const AssignTask& task;
  const Assign& a;
  const int64_t group;
  const unsigned tile;
  int32_t *counters, *first, *demand;  // (warps, bins), (bins), (e)

  __device__ Block(const AssignTask& t, int32_t* memory)
      : task(t), a(t.assign), group(blockIdx.x / t.tiles), tile(blockIdx.x % t.tiles), counters(memory),
        first(counters + t.warps * t.bins), demand(first + t.bins) {}

  __device__ int32_t* own_counters() const { return counters + warp_id() * task.bins; }
  __device__ uint32_t* routed() const { return task.routed + group * task.words(); }
  __device__ int32_t* counts(unsigned of_tile) const { return task.counts + (group * task.tiles + of_tile) * task.bins; }
  __device__ int32_t* totals() const { return task.totals + group * task.bins; }

  __device__ void clear() const {
    for (int64_t i = threadIdx.x; i < task.warps * task.bins; i += blockDim.x) counters[i] = 0;
  }

  // The pair's bin, or none where it is not routed.
  __device__ __forceinline__ int64_t routed_bin(const Pair& pair) const {
    if (!pair.inside) return kNoBin;
    const int64_t at = group * task.pairs + pair.of_group;
    const int64_t expert = a.expert[at];
    if (expert < 0 || expert >= a.experts) return kNoBin;
    if (a.token_mask != nullptr && !a.token_mask[group * a.tokens + pair.token]) return kNoBin;
    return is_routed<Real>(a, at, pair.rank) ? pair.rank * a.experts + expert : kNoBin;
  }

  __device__ void count() const {
    int32_t* const own = own_counters();
    for (Run run(task, tile); run.more();) {
      Pair pair[kStepsAtOnce];
      int64_t bin[kStepsAtOnce];
      TOPN_UNROLL
      for (int u = 0; u < kStepsAtOnce; ++u) {
        pair[u] = run.take();
        bin[u] = routed_bin(pair[u]);
      }
      TOPN_UNROLL
      for (int u = 0; u < kStepsAtOnce; ++u) {
        const unsigned word = ballot(bin[u] != kNoBin);
        if (lane_id() == 0 && pair[u].inside) routed()[pair[u].word()] = word;
        if (bin[u] != kNoBin) atomicAdd(&own[bin[u]], 1);
      }
    }
  }

  // Each warp's count becomes the count of the warps before; the sum goes to `sums`.
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

  // The same over the group's tiles, the bins shared out among all warps of all tiles.
  __device__ void scan_tiles() const {
    for (int64_t bin = tile * task.warps + warp_id(); bin < task.bins; bin += task.tiles * task.warps) {
      int32_t before = 0;
      for (unsigned start = 0; start < task.tiles; start += kWarp) {
        const unsigned of = start + lane_id();
        const int32_t own = of < task.tiles ? counts(of)[bin] : 0;
        int32_t sum = own;
        for (unsigned by = 1; by < kWarp; by *= 2) {
          const int32_t lower = shuffle_up(sum, int(by));
          if (lane_id() >= by) sum += lower;
        }
        if (of < task.tiles) counts(of)[bin] = before + sum - own;
        before += shuffle(sum, kWarp - 1);
      }
      if (lane_id() == 0) totals()[bin] = before;
    }
  }

  // The first slot of each bin in this tile: past the slots that lower ranks and earlier tiles have taken.
  __device__ void scan_ranks() const {
    const bool one = task.tiles == 1;  // `first` then holds the totals
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

  __device__ void empty_free_slots() const {
    for (int64_t e = tile * task.warps + warp_id(); e < a.experts; e += task.tiles * task.warps) {
      int32_t* const source = a.source + (group * a.experts + e) * a.capacity;
      for (int64_t slot = int64_t(demand[e]) + lane_id(); slot < a.capacity; slot += kWarp) source[slot] = -1;
    }
  }

  __device__ void hand_out() const {
    int32_t* const own = own_counters();
    for (Run run(task, tile); run.more();) {
      Pair pair[kStepsAtOnce];
      int64_t bin[kStepsAtOnce];
      Real weight[kStepsAtOnce];
      TOPN_UNROLL
      for (int u = 0; u < kStepsAtOnce; ++u) {
        pair[u] = run.take();
        const int64_t at = group * task.pairs + pair[u].of_group;
        const bool is = pair[u].inside && (routed()[pair[u].word()] >> lane_id() & 1);
        bin[u] = is ? pair[u].rank * a.experts + a.expert[at] : kNoBin;
        weight[u] = is ? static_cast<const Real*>(a.weight)[at] : Real(0);
      }
      TOPN_UNROLL
      for (int u = 0; u < kStepsAtOnce; ++u) {
        const unsigned peers = match(unsigned(bin[u]));
        const int before = __popc(peers & lanes_below());
        const bool is = bin[u] != kNoBin;
        const int32_t slot = is ? first[bin[u]] + own[bin[u]] + before : kBelowThreshold;
        __syncwarp();
        if (is && before == 0) own[bin[u]] += __popc(peers);
        __syncwarp();
        if (pair[u].inside) write(pair[u], bin[u], slot, weight[u]);
      }
    }
  }

  __device__ __forceinline__ void write(const Pair& pair, int64_t bin, int32_t slot, Real weight) const {
    const int64_t at = group * task.pairs + pair.of_group;
    const bool kept = bin != kNoBin && slot < a.capacity;
    if (kept) {
      const int64_t expert = bin - pair.rank * a.experts;
      a.source[(group * a.experts + expert) * a.capacity + slot] = int32_t(pair.of_group);
    }
    a.slot[at] = bin == kNoBin || kept ? slot : kOverCapacity;
    static_cast<Real*>(a.kept)[at] = kept ? weight : Real(0);
  }
};

template <class Real>
__global__ void assign_pairs(AssignTask task) {
  SIMT_DYN_SMEM(int32_t, shared);
  const Block<Real> block(task, task.shared ? shared : task.block_memory + blockIdx.x * task.block_ints);
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
  block.empty_free_slots();
  block.hand_out();
}

template <class Real>
__global__ void __launch_bounds__(SIMT_BLOCK_THREADS) assign_backward_pairs(AssignBackward a) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < a.pairs; i += step) {
    static_cast<Real*>(a.grad_weight)[i] = a.slot[i] >= 0 ? static_cast<const Real*>(a.grad_kept)[i] : Real(0);
  }
}

}  // namespace

int64_t workspace_bytes(const Assign& a) { return task_of(a).bytes; }

cudaError_t run(const Assign& a, cudaStream_t stream) {
  const AssignTask task = task_of(a);
  const int64_t blocks = a.groups * task.tiles;
  if (blocks == 0) return cudaSuccess;
  if (blocks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  if (task.bins >= std::numeric_limits<uint32_t>::max()) return cudaErrorInvalidValue;  // lanes are matched by 32 bits
  const auto kernel = a.is_double ? assign_pairs<double> : assign_pairs<float>;
  const size_t shared = task.shared ? task.block_ints * sizeof(int32_t) : 0;
  const unsigned grid = unsigned(blocks), block = task.warps * kWarp;
  return task.tiles == 1 ? SIMT_LAUNCH(kernel, grid, block, shared, stream, task)
                         : SIMT_LAUNCH_COOPERATIVE(kernel, grid, block, shared, stream, task);
}

cudaError_t run(const AssignBackward& a, cudaStream_t stream) {
  if (a.pairs == 0) return cudaSuccess;
  const auto kernel = a.is_double ? assign_backward_pairs<double> : assign_backward_pairs<float>;
  return SIMT_LAUNCH(kernel, grid_of(parts<int64_t>(a.pairs, SIMT_BLOCK_THREADS)), SIMT_BLOCK_THREADS, 0, stream, a);
}

}  // namespace topn_gating::cuda
