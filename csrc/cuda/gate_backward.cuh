// What the kernels of the gradient of `gate` share: their arguments, their workspace and their launch.
#pragma once

#include "cuda/token.cuh"

namespace topn_gating::cuda {

struct GateBackwardTask {
  GateBackward gate;
  TilePlan plan;
  double* valid_tokens;  // (g) number of valid tokens of each group, where they are counted
  char* rows;            // rows that do not fit registers
};

// Returns whether valid tokens are counted: where there is a mask, and a gradient of a mean over valid tokens.
__host__ __device__ inline bool counts_valid_tokens(const GateBackward& a) {
  return a.token_mask != nullptr &&
         (a.grad_importance != nullptr || a.grad_balance_loss != nullptr || a.grad_router_z_loss != nullptr);
}

// Counts the valid tokens of each group into the task's valid_tokens (gate_backward_any.cu).
cudaError_t launch_count(const GateBackwardTask& task, cudaStream_t stream);

// What the losses and importance give to the gradient of a token.
template <class Weight>
class LossGradients {
 public:
  __device__ explicit LossGradients(const GateBackwardTask& task)
      : task_(task), a_(task.gate), z_scale_(value_of(a_.grad_router_z_loss)) {
    if (z_scale_ != 0) z_scale_ = z_loss_scale(z_scale_, valid_tokens_of_all());
  }

  // Returns the factor of a token's logsumexp in the gradient of its scores, before the gates.
  __device__ __forceinline__ double z_scale() const { return z_scale_; }

  // Writes the gradient of each gate of a group's valid tokens. All threads of a warp call it.
  template <class RowLayout, class Row>
  __device__ void of_group(const RowLayout& layout, int64_t group, Row& importance) const {
    const auto* const grad_importance = static_cast<const Weight*>(a_.grad_importance);
    const double valid_tokens = counts_valid_tokens(a_) ? task_.valid_tokens[group] : double(a_.tokens);
    double counted = 0;  // counts may be made up
    for (int64_t e = lane_id(); e < a_.experts; e += kWarp) counted += a_.counts[group * a_.experts + e];
    const ImportanceGradient gradient(value_of(a_.grad_balance_loss), a_.experts, a_.groups,
                                      GroupShares(valid_tokens, warp_sum(counted)));
    TOPN_UNROLL_BY(RowLayout::unroll)
    for (int i = 0; i < layout.count; ++i) {
      importance[i] = 0;
      if (!layout.valid(i)) continue;
      const int64_t at = group * a_.experts + layout.index(i);
      const double own = grad_importance == nullptr ? 0.0 : double(grad_importance[at]);
      importance[i] = typename RowLayout::Scalar(gradient(own, a_.counts[at]));
    }
  }

 private:
  // Returns the value of a loss's gradient; 0 where it is null.
  static __device__ __forceinline__ double value_of(const void* gradient) {
    return gradient == nullptr ? 0.0 : double(*static_cast<const Weight*>(gradient));
  }
  // Returns the number of valid tokens of all groups.
  __device__ double valid_tokens_of_all() const {
    if (!counts_valid_tokens(a_)) return double(a_.groups * a_.tokens);
    double count = 0;
    for (int64_t group = lane_id(); group < a_.groups; group += kWarp) count += task_.valid_tokens[group];
    return warp_sum(count);
  }

  const GateBackwardTask& task_;
  const GateBackward& a_;
  double z_scale_;
};

// A kernel of the gradient, with its tiles and its workspace.
struct GateBackwardLaunch {
  void (*kernel)(GateBackwardTask) = nullptr;
  size_t shared_bytes = 0;
  GateBackwardTask task{};
  int64_t bytes = 0;  // of the workspace

  GateBackwardLaunch() = default;

  // `row_bytes` is the global memory for an expert of a row.
  template <class RowLayout>
  GateBackwardLaunch(const GateBackward& a, void (*kernel_in)(GateBackwardTask), RowLayout* /*layout*/, int64_t row_bytes,
                     size_t shared)
      : kernel(kernel_in), shared_bytes(shared), task{a, {}, nullptr, nullptr} {
    const bool aligned16 = is_aligned16(a.experts * element_bytes(a.dtype), a.logits, a.grad_logits);
    task.plan = plan_tiles<RowLayout>(a, row_bytes, aligned16, resident_blocks(kernel, kBlockThreads<RowLayout>, shared));
    task.valid_tokens = static_cast<double*>(a.workspace);
    bytes = counts_valid_tokens(a) ? (a.groups + 1) / 2 * 2 * int64_t(sizeof(double)) : 0;
    task.rows = static_cast<char*>(a.workspace) + bytes;
    bytes += task.plan.memory_bytes();
  }

  cudaError_t run(cudaStream_t stream) const {
    if (counts_valid_tokens(task.gate)) {
      const cudaError_t error = launch_count(task, stream);
      if (error != cudaSuccess) return error;
    }
    return SIMT_LAUNCH_DEPENDENT(kernel, task.plan.grid, task.plan.block, shared_bytes, stream, task);
  }
};

// Returns the launch of the kernel for any router (gate_backward_any.cu).
GateBackwardLaunch any_launch(const GateBackward& a);

}  // namespace topn_gating::cuda
