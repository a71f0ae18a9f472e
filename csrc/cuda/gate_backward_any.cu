// Gradients of docs/spec.md, steps 4 to 6 and 10, on a GPU, for any router and any size: a warp processes a token, whose row is
// in registers or in global memory. The gates of each token are computed again, which costs less than keeping them from the
// forward pass.
#include "cuda/gate_backward.cuh"

namespace topn_gating::cuda {
namespace {

// Counts the valid tokens of a group in each block, 16 at a time where they are aligned.
__global__ void count_valid_tokens(GateBackwardTask task) {
  const GateBackward& a = task.gate;
  const int64_t group = blockIdx.x;
  SIMT_DYN_SMEM(double, shared);
  const bool* const mask = a.token_mask + group * a.tokens;
  const int64_t tokens = group < a.groups ? a.tokens : 0, before = (16 - reinterpret_cast<uintptr_t>(mask) % 16) % 16;
  const int64_t first = before < tokens ? before : tokens, packs = (tokens - first) / 16, rest = first + packs * 16;
  int64_t count = 0;
  wait_for_stream();
  let_next_start();
  for (int64_t i = threadIdx.x; i < packs; i += blockDim.x) {
    const uint4 pack = reinterpret_cast<const uint4*>(mask + first)[i];
    constexpr unsigned ones = 0x01010101u;
    count += __popc(pack.x & ones) + __popc(pack.y & ones) + __popc(pack.z & ones) + __popc(pack.w & ones);
  }
  for (int64_t i = threadIdx.x; i < tokens - packs * 16; i += blockDim.x) count += mask[i < first ? i : rest + i - first];
  const double sum = warp_sum(double(count));
  if (lane_id() == 0) shared[warp_id()] = sum;
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
        losses_(task) {}

  __device__ void start_group(int64_t group) { losses_.of_group(layout, group, importance_); }

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
    if (losses_.z_scale() != 0) {
      if (!Softmax || a_.noise != nullptr) {
        layout.load(logits_of<T>(a_, token), task_.plan.aligned16, s);
        lse = softmax(layout, s);
      }
      const Scalar scale = Scalar(losses_.z_scale() * value_of(lse));
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
  const LossGradients<Weight> losses_;
};

template <class T, class RowLayout, bool Softmax>
__global__ void __launch_bounds__(kBlockThreads<RowLayout>, kResidentBlocks<RowLayout>)
    gate_backward_any(GateBackwardTask task) {
  const GateBackward& a = task.gate;
  wait_for_stream();
  let_next_start();
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

}  // namespace

cudaError_t launch_count(const GateBackwardTask& task, cudaStream_t stream) {
  if (task.gate.groups > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  const unsigned warps = 4 * SIMT_BLOCK_THREADS / kWarp, blocks = unsigned(std::max<int64_t>(task.gate.groups, 1));
  const auto kernel = count_valid_tokens;
  return SIMT_LAUNCH_DEPENDENT(kernel, blocks, warps * kWarp, warps * sizeof(double), stream, task);
}

GateBackwardLaunch any_launch(const GateBackward& a) {
  return launch_of_any<GateBackwardLaunch>(a, [&](auto* element, auto* layout) {
    using T = std::remove_pointer_t<decltype(element)>;
    using RowLayout = std::remove_pointer_t<decltype(layout)>;
    const bool softmax = a.score == Score::Softmax;
    const auto kernel = softmax ? gate_backward_any<T, RowLayout, true> : gate_backward_any<T, RowLayout, false>;
    return GateBackwardLaunch(a, kernel, layout, (softmax ? 4 : 5) * sizeof(typename RowLayout::Scalar), 0);
  });
}

}  // namespace topn_gating::cuda
