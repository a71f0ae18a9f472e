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
#include "cuda/counts.cuh"
#include "cuda/kernels.h"
#include "cuda/select.cuh"

namespace topn_gating::cuda {
namespace {

// Gives the pairs of a tile their slots.
template <class T, Slots S, Memory M>
struct TileSlots : TileCounts<T, S, M> {
  using Base = TileCounts<T, S, M>;
  using Key = typename Base::Key;
  using Base::a, Base::codes, Base::counters, Base::demand, Base::experts, Base::first, Base::group, Base::kByKeys,
      Base::kDropless, Base::kNone, Base::keys, Base::pairs_of, Base::place_of, Base::queues, Base::scalars_of, Base::slots,
      Base::start_of, Base::starts, Base::task, Base::tile, Base::TileCounts;

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
      Selected<Key> least{std::numeric_limits<Key>::min(), count};
      if (count > a.capacity) least = select_largest(key, count, a.capacity, counters + warp_id() * kDigits);
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
};

template <class T, Slots S, Memory M>
__global__ void __launch_bounds__(most_threads(M, sizeof(T) == 8), 1) assign_pairs(AssignTask task) {
  SIMT_DYN_SMEM(int32_t, shared);
  const TileSlots<T, S, M> block(task, shared);
  if constexpr (M == Memory::Workspace) wait_for_stream();  // the counters are in global memory
  block.clear();
  if constexpr (M != Memory::Workspace) wait_for_stream();
  let_next_start();
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
  wait_for_stream();
  let_next_start();
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < a.pairs; i += step) {
    static_cast<T*>(a.grad_weight)[i] = a.slot[i] >= 0 ? static_cast<const T*>(a.grad_kept)[i] : T(0);
  }
}

// Calls f with the kernel for the task.
template <class F>
auto with_kernel(const AssignTask& task, const F& f) {
  const auto with_memory = [&](auto scalar, auto slots) {
    using T = decltype(scalar);
    constexpr Slots S = decltype(slots)::value;
    switch (task.memory) {
      case Memory::Shared: return f(assign_pairs<T, S, Memory::Shared>);
      case Memory::SharedInts: return f(assign_pairs<T, S, Memory::SharedInts>);
      case Memory::Workspace: break;
    }
    return f(assign_pairs<T, S, Memory::Workspace>);
  };
  const auto with_slots = [&](auto scalar) {
    if (task.assign.dropless()) return with_memory(scalar, std::integral_constant<Slots, Slots::Dropless>());
    if (task.assign.keys != nullptr) return with_memory(scalar, std::integral_constant<Slots, Slots::ByKeys>());
    return with_memory(scalar, std::integral_constant<Slots, Slots::InOrder>());
  };
  return task.assign.is_double ? with_slots(double()) : with_slots(float());
}

// Returns the task, with clusters where the device can run them.
AssignTask plan(const Assign& a) {
  const AssignTask task = task_of(a, has_clusters());
  if (!task.clustered || task.tiles == 1) return task;
  const bool has_room = with_kernel(task, [&](auto kernel) {
    return has_room_for_cluster(kernel, task.tiles, task.warps * kWarp, task.shared_bytes());
  });
  return has_room ? task : task_of(a, false);
}

}  // namespace

int64_t workspace_bytes(const Assign& a) { return plan(a).bytes; }

cudaError_t run(const Assign& a, cudaStream_t stream) {
  if (!fits(a)) return cudaErrorInvalidValue;
  const AssignTask task = plan(a);
  const int64_t blocks = a.groups * task.tiles;
  if (blocks == 0) return cudaSuccess;
  if (blocks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  return with_kernel(task, [&](auto kernel) {
    const unsigned grid = unsigned(blocks), block = task.warps * kWarp;
    const size_t shared = task.shared_bytes();
    return task.tiles == 1  ? SIMT_LAUNCH_DEPENDENT(kernel, grid, block, shared, stream, task)
           : task.clustered ? SIMT_LAUNCH_CLUSTERS(kernel, grid, task.tiles, block, shared, stream, task)
                            : SIMT_LAUNCH_COOPERATIVE(kernel, grid, block, shared, stream, task);
  });
}

cudaError_t run(const AssignBackward& a, cudaStream_t stream) {
  if (a.pairs == 0) return cudaSuccess;
  const auto kernel = a.is_double ? assign_backward_pairs<double> : assign_backward_pairs<float>;
  const unsigned grid = grid_of(ceil_div<int64_t>(a.pairs, SIMT_BLOCK_THREADS));
  return SIMT_LAUNCH_DEPENDENT(kernel, grid, SIMT_BLOCK_THREADS, 0, stream, a);
}

}  // namespace topn_gating::cuda
