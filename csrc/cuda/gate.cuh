// What the kernels of `gate` share: the walk over tiles, their results, and their launch.
#pragma once

#include "cuda/gate_sums.cuh"

namespace topn_gating::cuda {

// Writes the zeros that Gate promises for losses == false.
template <class Weight>
__device__ void write_no_losses(const Gate& a) {
  const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = first; i < a.groups * a.experts; i += step) {
    static_cast<Weight*>(a.importance)[i] = 0;
    a.counts[i] = 0;
  }
  if (first == 0) *static_cast<Weight*>(a.balance_loss) = *static_cast<Weight*>(a.router_z_loss) = 0;
}

// Processes all tiles by one_tile(sums, index), and what follows from their sums. The launch is cooperative where losses are
// wanted.
template <class Weight, class RowLayout, class OneTile>
__device__ __forceinline__ void for_tiles(const GateTask& task, const RowLayout& layout, double* shared, int counted_ranks,
                                          const OneTile& one_tile) {
  const bool losses = task.gate.losses;
  if (!losses) write_no_losses<Weight>(task.gate);
  if (losses && blockIdx.x == 0 && threadIdx.x == 0) *task.space.ticket = 0;
  TileSums<RowLayout> sums(layout, shared);
  for (int64_t tile = blockIdx.x; tile < task.plan.count; tile += gridDim.x) {
    if (losses) sums.start(task.space, tile);
    one_tile(sums, tile);
    if (losses) sums.finish(task.space, tile, counted_ranks);
  }
  if (!losses) return;
  sync_grid();
  finish_losses<Weight>(task, shared);
}

// Where a token's results belong in the outputs.
template <class T>
struct Outputs {
  int32_t* expert;
  ComputeType<T>* weight;

  __device__ Outputs(const Gate& a, int64_t token)
      : expert(a.expert + token * a.top_n), weight(static_cast<ComputeType<T>*>(a.weight) + token * a.top_n) {}
};

// A kernel of `gate`, with its tiles and its workspace.
struct GateLaunch {
  void (*kernel)(GateTask) = nullptr;
  size_t shared_bytes = 0;
  GateTask task{};

  GateLaunch() = default;

  // `row_bytes` is the global memory for an expert of a row, and `own_shared` what the kernel needs beside the sums of a tile.
  template <class RowLayout>
  GateLaunch(const Gate& a, void (*kernel_in)(GateTask), RowLayout* /*layout*/, int64_t row_bytes, size_t own_shared)
      : kernel(kernel_in), shared_bytes(own_shared), task{a, {}, {}} {
    constexpr unsigned block = kBlockThreads<RowLayout>;
    if (a.losses) {
      shared_bytes += std::max(TileSums<RowLayout>::shared_bytes(block, a.experts), LossSums::shared_bytes(block));
    }
    const bool aligned16 = is_aligned16(a.experts * element_bytes(a.dtype), a.logits);
    task.plan = plan_tiles<RowLayout>(a, row_bytes, aligned16, resident_blocks(kernel, block, shared_bytes));
    divide_workspace();
  }

  cudaError_t run(cudaStream_t stream) const {
    return task.gate.losses ? SIMT_LAUNCH_COOPERATIVE(kernel, task.plan.grid, task.plan.block, shared_bytes, stream, task)
                            : SIMT_LAUNCH_DEPENDENT(kernel, task.plan.grid, task.plan.block, shared_bytes, stream, task);
  }

 private:
  void divide_workspace() {
    const Gate& a = task.gate;
    GateSpace& space = task.space;
    int64_t used = 0;
    const auto reserve = [&](auto*& to, int64_t count) {
      to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(static_cast<char*>(a.workspace) + used);
      used += (count * int64_t(sizeof *to) + 15) / 16 * 16;
    };
    reserve(space.rows, task.plan.memory_bytes());
    if (a.losses) {
      reserve(space.importance, task.plan.count * a.experts);
      reserve(space.z_loss, task.plan.count);
      reserve(space.balance, a.groups * LossSums::chunks(a));
      reserve(space.group_z_loss, a.groups);
      reserve(space.group_valid, a.groups);
      reserve(space.counts, task.plan.count * a.experts);
      reserve(space.counted, task.plan.count);
      reserve(space.valid_tokens, task.plan.count);
      reserve(space.ticket, 1);
    }
    if (a.statistics != nullptr) reserve(space.statistics, task.plan.count * (task.plan.block / kWarp));
    space.bytes = used;
  }
};

// Returns the launch of the kernel for any router (gate_any.cu).
GateLaunch any_launch(const Gate& a);
// Adds up what all warps have written to GateSpace::statistics and writes the statistics (gate_any.cu).
cudaError_t launch_statistics(const GateTask& task, cudaStream_t stream);

}  // namespace topn_gating::cuda
