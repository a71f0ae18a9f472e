// Gradients of docs/spec.md, steps 4 to 6 and 10, on a GPU. The gates of each token are computed again, which costs less than
// keeping them from the forward pass.
#include "cuda/kernels.h"
#include "cuda/token.cuh"

namespace topn_gating::cuda {
namespace {

struct GateBackwardTask {
  GateBackward gate;
  TilePlan plan;
  double* valid_tokens;  // (g) number of valid tokens of each group, where they are counted
  char* rows;
};

// Returns whether valid tokens are counted: where there is a mask, and a gradient of a mean over valid tokens.
__host__ __device__ inline bool counts_valid_tokens(const GateBackward& a) {
  return a.token_mask != nullptr &&
         (a.grad_importance != nullptr || a.grad_balance_loss != nullptr || a.grad_router_z_loss != nullptr);
}

// Returns the bytes that valid_tokens takes of the workspace.
int64_t valid_tokens_bytes(const GateBackward& a) {
  return counts_valid_tokens(a) ? (a.groups + 1) / 2 * 2 * int64_t(sizeof(double)) : 0;
}

// Counts the valid tokens of a group in each block.
__global__ void count_valid_tokens(GateBackwardTask task) {
  const GateBackward& a = task.gate;
  const int64_t group = blockIdx.x;
  SIMT_DYN_SMEM(double, shared);
  double count = 0;
  for (int64_t i = threadIdx.x; i < a.tokens && group < a.groups; i += blockDim.x) {
    count += a.token_mask[group * a.tokens + i] ? 1.0 : 0.0;
  }
  count = warp_sum(count);
  if (lane_id() == 0) shared[warp_id()] = count;
  __syncthreads();
  if (threadIdx.x == 0 && group < a.groups) task.valid_tokens[group] = sum_warps(shared);
}

// Differentiates tokens; `Softmax` is whether that is the score.
template <class T, class RowLayout, bool Softmax>
class Gradient {
 public:
  using Scalar = typename RowLayout::Scalar;
  using Weight = ComputeType<T>;
  using Row = typename RowLayout::template Row<Scalar>;

  __device__ Gradient(const GateBackwardTask& task, char* memory)
      : layout(task.gate.experts), s(memory, layout.count), task_(task), a_(task.gate), q_(memory, layout.count),
        grad_p_(memory, layout.count), importance_(memory, layout.count), slope_(memory, Softmax ? 0 : layout.count),
        z_scale_(scalar_gradient(a_.grad_router_z_loss)) {
    if (z_scale_ != 0) z_scale_ = z_loss_scale(z_scale_, valid_tokens_of_all());
  }

  __device__ void start_group(int64_t group) {
    const auto* const grad_importance = static_cast<const Weight*>(a_.grad_importance);
    const double valid_tokens = counts_valid_tokens(a_) ? task_.valid_tokens[group] : double(a_.tokens);
    double counted = 0;  // counts may be made up
    for (int64_t e = lane_id(); e < a_.experts; e += kWarp) counted += a_.counts[group * a_.experts + e];
    const ImportanceGradient gradient(scalar_gradient(a_.grad_balance_loss), a_.experts, a_.groups,
                                      GroupShares(valid_tokens, warp_sum(counted)));
    TOPN_UNROLL_BY(RowLayout::unroll)
    for (int i = 0; i < layout.count; ++i) {
      importance_[i] = 0;
      if (!layout.valid(i)) continue;
      const int64_t at = group * a_.experts + layout.index(i);
      importance_[i] = Scalar(gradient(grad_importance == nullptr ? 0.0 : double(grad_importance[at]), a_.counts[at]));
    }
  }

  // Differentiates a token whose scores are in s, and writes its gradient where in_tile.
  __device__ __forceinline__ void differentiate(int64_t token, bool in_tile) {
    const bool valid = is_valid(a_, token);
    const bool blank = a_.token_mask != nullptr && !has_gradient(token) && !valid;
    LogSumExp<Scalar> lse{};
    Scalar sum{};
    if constexpr (Softmax) {
      lse = softmax(layout, s);
    } else {
      sum = score_gates_of(a_.score, layout, s, [&](int i, Scalar slope) { slope_[i] = slope; });
    }
    if (a_.grad_weight == nullptr) {
      clear(grad_p_);
    } else if constexpr (std::is_same_v<Scalar, float>) {
      through_gates(token);
    } else if (kSoftOnly<T, RowLayout> || a_.soft) {
      through_soft(token);
    } else {
      through_gates(token);
    }
    const auto importance = [&](int i) { return valid ? importance_[i] : Scalar(0); };
    if constexpr (Softmax) {
      softmax_backward(layout, s, importance, grad_p_);
    } else {
      score_gates_backward(layout, s, slope_, sum, a_.eps, importance, grad_p_);
    }
    if (z_scale_ != 0) {
      if (!Softmax || a_.noise != nullptr) {
        layout.load(logits_of<T>(a_, token), task_.plan.aligned16, s);
        lse = softmax(layout, s);
      }
      const Scalar scale = Scalar(z_scale_ * value_of(lse));
      TOPN_UNROLL_BY(RowLayout::unroll)
      for (int i = 0; i < layout.count; ++i) grad_p_[i] += valid ? scale * s[i] : Scalar(0);
    }
    if (blank) clear(grad_p_);  // even where the token holds NaN
    if (in_tile) layout.store(grad_p_, task_.plan.aligned16, static_cast<T*>(a_.grad_logits) + token * a_.experts);
  }

  const RowLayout layout;
  Row s;  // the token's scores, later its gates

 private:
  __device__ __forceinline__ void clear(Row& row) {
    TOPN_UNROLL_BY(RowLayout::unroll)
    for (int i = 0; i < layout.count; ++i) row[i] = 0;
  }

  // Returns the number of valid tokens of all groups.
  __device__ double valid_tokens_of_all() const {
    if (!counts_valid_tokens(a_)) return double(a_.groups * a_.tokens);
    double count = 0;
    for (int64_t group = lane_id(); group < a_.groups; group += kWarp) count += task_.valid_tokens[group];
    return warp_sum(count);
  }
  // Returns the value of a loss's gradient; 0 where it is null.
  static __device__ __forceinline__ double scalar_gradient(const void* gradient) {
    return gradient == nullptr ? 0.0 : double(*static_cast<const Weight*>(gradient));
  }
  __device__ __forceinline__ double grad_weight(int64_t token, int64_t k) const {
    return double(static_cast<const Weight*>(a_.grad_weight)[token * a_.top_n + k]);
  }
  // Returns the expert of a rank, -1 where there is none.
  __device__ __forceinline__ int expert(int64_t token, int64_t k) const {
    const int32_t given = a_.expert[token * a_.top_n + k];
    return given >= 0 && given < layout.experts ? given : -1;
  }

  __device__ __forceinline__ bool has_gradient(int64_t token) const {
    int any = 0;
    if (a_.grad_weight != nullptr) {
      for (int64_t k = layout.thread; k < a_.top_n; k += RowLayout::width) any |= grad_weight(token, k) != 0;
    }
    return RowLayout::reduce(any, [](int x, int y) { return x | y; }) != 0;
  }

  // Returns the gradient of v_k = score(k) as a function of that of w_k.
  template <class Score>
  __device__ __forceinline__ WeightGradient<double> through_weights(int64_t token, const Score& score) const {
    double sum = 0, dot = 0;
    for (int64_t k = 0; k < a_.top_n; ++k) {
      const double v = score(k);
      sum += v;
      dot += grad_weight(token, k) * v;
    }
    return weight_gradient(sum, dot, a_);
  }

  __device__ void through_gates(int64_t token) {
    const auto to_v = through_weights(token, [&](int64_t k) {
      const int chosen = expert(token, k);
      const Scalar v = layout.at(s, chosen < 0 ? 0 : chosen);
      return chosen < 0 ? 0.0 : double(v);
    });
    clear(grad_p_);
    for (int64_t k = 0; k < a_.top_n; ++k) {
      const int chosen = expert(token, k);
      if (chosen >= 0) layout.add(grad_p_, chosen, Scalar(to_v(grad_weight(token, k))));
    }
  }

  __device__ void through_soft(int64_t token) {
    if constexpr (std::is_same_v<Scalar, double>) {
      TOPN_UNROLL_BY(RowLayout::unroll)
      for (int i = 0; i < layout.count; ++i) q_[i] = s[i];
      const SoftTopN<double> soft(layout, layout.experts, int(a_.top_n), q_);
      const auto in_row = [&](int64_t k) { return expert(token, k) < 0 ? 0 : expert(token, k); };
      const auto to_v = through_weights(token, [&](int64_t k) {
        const double score = soft.score(layout.at(q_, in_row(k)));
        return expert(token, k) < 0 ? 0.0 : score;
      });
      soft.backward(layout, q_, int(a_.top_n), in_row,
                    [&](int k) { return expert(token, k) < 0 ? 0.0 : to_v(grad_weight(token, k)); }, grad_p_);
    }
  }

  const GateBackwardTask& task_;
  const GateBackward& a_;
  Row q_, grad_p_;
  Row importance_;  // the group's ImportanceGradient
  Row slope_;       // derivatives of gates other than a softmax
  double z_scale_;  // z_loss_scale of all groups
};

template <class T, class RowLayout, bool Softmax>
__global__ void __launch_bounds__(kBlockThreads<RowLayout>, kResidentBlocks<RowLayout>)
    gate_backward_tokens(GateBackwardTask task) {
  const GateBackward& a = task.gate;
  Gradient<T, RowLayout, Softmax> gradient(task, task.rows + blockIdx.x * task.plan.row_bytes);
  for (int64_t index = blockIdx.x; index < task.plan.count; index += gridDim.x) {
    const Tile tile(task.plan, index, a.tokens);
    gradient.start_group(tile.group);
    for (TokenRows<T, RowLayout> rows(gradient.layout, a, task.plan, tile); rows.more();) {
      rows.next(gradient.s);
      gradient.differentiate(rows.token, rows.in_tile);
    }
  }
}

template <class T, class RowLayout, bool General>
GateBackwardTask task_of(const GateBackward& a, T* /*element*/, RowLayout* /*layout*/, std::bool_constant<General> /*general*/) {
  const bool aligned16 = is_aligned16(a.experts * sizeof(T), a.logits, a.grad_logits);
  const int64_t bytes_per_expert = (General ? 5 : 4) * sizeof(typename RowLayout::Scalar);
  GateBackwardTask task{a, plan_tiles<RowLayout>(a, bytes_per_expert, aligned16), nullptr, nullptr};
  task.valid_tokens = static_cast<double*>(a.workspace);
  task.rows = static_cast<char*>(a.workspace) + valid_tokens_bytes(a);
  return task;
}

template <class T, class RowLayout, bool General>
cudaError_t launch_gate_backward(const GateBackward& a, cudaStream_t stream, T* element, RowLayout* layout,
                                 std::bool_constant<General> general) {
  const GateBackwardTask task = task_of(a, element, layout, general);
  if (counts_valid_tokens(a)) {
    if (a.groups > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
    const unsigned warps = SIMT_BLOCK_THREADS / kWarp, blocks = unsigned(std::max<int64_t>(a.groups, 1));
    const auto count = count_valid_tokens;
    const cudaError_t error = SIMT_LAUNCH(count, blocks, warps * kWarp, warps * sizeof(double), stream, task);
    if (error != cudaSuccess) return error;
  }
  const auto kernel = gate_backward_tokens<T, RowLayout, !General>;
  return SIMT_LAUNCH(kernel, task.plan.grid, task.plan.block, 0, stream, task);
}

}  // namespace

int64_t workspace_bytes(const GateBackward& a) {
  int64_t bytes = valid_tokens_bytes(a);
  with_row(a, a.score != Score::Softmax, [&](auto* element, auto* layout, auto general) {
    bytes += task_of(a, element, layout, general).plan.memory_bytes();
    return cudaSuccess;
  });
  return bytes;
}

cudaError_t run(const GateBackward& a, cudaStream_t stream) {
  return with_row(a, a.score != Score::Softmax, [&](auto* element, auto* layout, auto general) {
    return launch_gate_backward(a, stream, element, layout, general);
  });
}

}  // namespace topn_gating::cuda
