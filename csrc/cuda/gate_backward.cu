// Gradients of SPEC steps 4 to 6 and 10 on a GPU: the gates of each token are computed again, which costs less than to keep
// them.
#include "cuda/kernels.h"
#include "cuda/token.cuh"

namespace topn_gating::cuda {
namespace {

struct GateBackwardTask {
  GateBackward gate;
  Tiles tiles;
  double* real;  // real tokens of all groups
  char* rows;
};
constexpr int64_t kRealBytes = 16;  // that `real` takes of the workspace

// Real tokens of a group, 1 if there are none.
__device__ __forceinline__ double real_tokens(const GateBackward& a, int64_t group) {
  double real = double(a.tokens);
  if (a.token_mask != nullptr) {
    int count = 0;
    for (int64_t e = lane_id(); e < a.experts; e += kWarp) count += a.top_count[group * a.experts + e];
    real = warp_add(count);
  }
  return real > 1 ? real : 1;
}

// One block.
__global__ void count_real(GateBackwardTask task) {
  const GateBackward& a = task.gate;
  SIMT_DYN_SMEM(double, counts);
  double count = 0;
  for (int64_t i = threadIdx.x; i < a.groups * a.experts; i += blockDim.x) count += a.top_count[i];
  count = warp_sum(count);
  if (lane_id() == 0) counts[warp_id()] = count;
  __syncthreads();
  if (threadIdx.x != 0) return;
  const double sum = sum_warps(counts);
  *task.real = sum > 1 ? sum : 1;
}

template <class T, class Lanes>
class Gradient {
 public:
  using R = typename Lanes::R;
  using Real = RealOf<T>;
  using Row = typename Lanes::template Row<R>;

  __device__ Gradient(const GateBackwardTask& task, char* memory)
      : lanes(task.gate.experts), s(memory, lanes.count), task_(task), a_(task.gate), q_(memory, lanes.count),
        grad_p_(memory, lanes.count), importance_(memory, lanes.count) {}

  // The gradient that every real token of the group gets at its gates, from the two sums over tokens.
  __device__ void start_group(int64_t group) {
    const double share = 1.0 / real_tokens(a_, group);
    const double balance = a_.grad_balance_loss == nullptr ? 0.0
                                                           : double(*static_cast<const Real*>(a_.grad_balance_loss)) *
                                                                 double(a_.experts) / double(a_.groups);
    TOPN_UNROLL_BY(Lanes::unroll)
    for (int i = 0; i < lanes.count; ++i) {
      importance_[i] = 0;
      if (!lanes.real(i)) continue;
      const int64_t at = group * a_.experts + lanes.index(i);
      double sum = balance * (a_.top_count[at] * share);
      if (a_.grad_importance != nullptr) sum += double(static_cast<const Real*>(a_.grad_importance)[at]);
      importance_[i] = R(sum * share);
    }
    z_scale_ = a_.grad_router_z_loss == nullptr ? 0.0 : 2.0 * double(*static_cast<const Real*>(a_.grad_router_z_loss));
    if (z_scale_ != 0) z_scale_ /= a_.token_mask == nullptr ? double(a_.groups * a_.tokens) : *task_.real;
  }

  // From the token's scores.
  __device__ __forceinline__ void token(int64_t token, bool live) {
    const bool real = a_.token_mask == nullptr || a_.token_mask[token];
    const bool blank = a_.token_mask != nullptr && !has_gradient(token) && !real;
    auto lse = softmax(lanes, s);
    if (a_.grad_weight == nullptr) {
      clear(grad_p_);
    } else if constexpr (std::is_same_v<R, float>) {
      through_gates(token);
    } else if (kSoftOnly<T, Lanes> || a_.soft) {
      through_soft(token);
    } else {
      through_gates(token);
    }
    R dot = 0;
    TOPN_UNROLL_BY(Lanes::unroll)
    for (int i = 0; i < lanes.count; ++i) {
      if (real) grad_p_[i] += importance_[i];
      dot += s[i] * grad_p_[i];
    }
    const R mean = lanes.sum(dot);
    TOPN_UNROLL_BY(Lanes::unroll)
    for (int i = 0; i < lanes.count; ++i) grad_p_[i] = s[i] * (grad_p_[i] - mean);
    if (z_scale_ != 0) {
      if (a_.noise != nullptr) {
        lanes.load(logits_of<T>(a_, token), task_.tiles.wide, s);
        lse = softmax(lanes, s);
      }
      const R scale = R(z_scale_ * value_of(lse));
      TOPN_UNROLL_BY(Lanes::unroll)
      for (int i = 0; i < lanes.count; ++i) grad_p_[i] += real ? scale * s[i] : R(0);
    }
    if (blank) clear(grad_p_);  // whatever the padding holds, NaN too
    if (live) lanes.store(grad_p_, task_.tiles.wide, static_cast<T*>(a_.grad_logits) + token * a_.experts);
  }

  const Lanes lanes;
  Row s;  // the token's scores, then its gates

 private:
  __device__ __forceinline__ void clear(Row& row) {
    TOPN_UNROLL_BY(Lanes::unroll)
    for (int i = 0; i < lanes.count; ++i) row[i] = 0;
  }

  __device__ __forceinline__ double grad_weight(int64_t token, int64_t k) const {
    return double(static_cast<const Real*>(a_.grad_weight)[token * a_.top_n + k]);
  }
  // Indices made up by a caller stay inside the row.
  __device__ __forceinline__ int expert(int64_t token, int64_t k) const {
    const int32_t given = a_.expert[token * a_.top_n + k];
    return given >= 0 && given < lanes.experts ? given : 0;
  }

  __device__ __forceinline__ bool has_gradient(int64_t token) const {
    int any = 0;
    if (a_.grad_weight != nullptr) {
      for (int64_t k = lanes.thread; k < a_.top_n; k += Lanes::width) any |= grad_weight(token, k) != 0;
    }
    return Lanes::reduce(any, [](int x, int y) { return x | y; }) != 0;
  }

  // Of w_k = v_k / max(Σ v, eps), where v_k = score(k): what is taken off a gradient of w_k, and then what divides it, to give
  // that of v_k.
  struct Normalised {
    double off, divisor;
    __device__ __forceinline__ double operator()(double grad) const { return (grad - off) / divisor; }
  };
  template <class Score>
  __device__ __forceinline__ Normalised normalised(int64_t token, const Score& score) const {
    double sum = 0, dot = 0;
    for (int64_t k = 0; k < a_.top_n; ++k) {
      const double v = score(k);
      sum += v;
      dot += grad_weight(token, k) * v;
    }
    if (a_.top_n == 1) return {0, 1};
    return sum < a_.eps ? Normalised{0, a_.eps} : Normalised{dot / sum, sum};
  }

  __device__ void through_gates(int64_t token) {
    const auto to_v = normalised(token, [&](int64_t k) { return double(lanes.at(s, expert(token, k))); });
    clear(grad_p_);
    for (int64_t k = 0; k < a_.top_n; ++k) lanes.add(grad_p_, expert(token, k), R(to_v(grad_weight(token, k))));
  }

  __device__ void through_soft(int64_t token) {
    if constexpr (std::is_same_v<R, double>) {
      TOPN_UNROLL_BY(Lanes::unroll)
      for (int i = 0; i < lanes.count; ++i) q_[i] = s[i];
      const SoftTopN<double> soft(lanes, lanes.experts, int(a_.top_n), q_);
      const auto to_v = normalised(token, [&](int64_t k) { return soft.score(lanes.at(q_, expert(token, k))); });
      soft.backward(lanes, q_, int(a_.top_n), [&](int k) { return expert(token, k); },
                    [&](int k) { return to_v(grad_weight(token, k)); }, grad_p_);
    }
  }

  const GateBackwardTask& task_;
  const GateBackward& a_;
  Row q_, grad_p_, importance_;
  double z_scale_;  // of each token's logsumexp: 2 · grad_router_z_loss / real tokens
};

template <class T, class Lanes>
__global__ void __launch_bounds__(kBlockThreads<Lanes>, kResidentBlocks<Lanes>) gate_backward_tokens(GateBackwardTask task) {
  const GateBackward& a = task.gate;
  Gradient<T, Lanes> gradient(task, task.rows + blockIdx.x * task.tiles.row_bytes);
  for (int64_t index = blockIdx.x; index < task.tiles.count; index += gridDim.x) {
    const Tile tile(task.tiles, index, a.tokens);
    gradient.start_group(tile.group);
    for (TokenRows<T, Lanes, GateBackward> rows(gradient.lanes, a, task.tiles, tile); rows.more();) {
      rows.take(gradient.s);
      gradient.token(rows.token, rows.live);
    }
  }
}

bool counts_real(const GateBackward& a) { return a.grad_router_z_loss != nullptr && a.token_mask != nullptr; }

template <class T, class Lanes>
GateBackwardTask task_of(const GateBackward& a, T* /*element*/, Lanes* /*lanes*/) {
  const bool wide = is_wide(a.experts * sizeof(T), a.logits, a.grad_logits);
  GateBackwardTask task{a, plan_tiles<Lanes>(a, 4 * sizeof(typename Lanes::R), wide), nullptr, nullptr};
  task.real = static_cast<double*>(a.workspace);
  task.rows = static_cast<char*>(a.workspace) + kRealBytes;
  return task;
}

template <class T, class Lanes>
cudaError_t launch_gate_backward(const GateBackward& a, cudaStream_t stream, T* element, Lanes* lanes) {
  const GateBackwardTask task = task_of(a, element, lanes);
  if (counts_real(a)) {
    const unsigned warps = SIMT_BLOCK_THREADS / kWarp;
    const cudaError_t error = SIMT_LAUNCH(count_real, 1u, warps * kWarp, warps * sizeof(double), stream, task);
    if (error != cudaSuccess) return error;
  }
  const auto kernel = gate_backward_tokens<T, Lanes>;
  return SIMT_LAUNCH(kernel, task.tiles.grid, task.tiles.block, 0, stream, task);
}

}  // namespace

int64_t workspace_bytes(const GateBackward& a) {
  int64_t bytes = kRealBytes;
  with_row(a, [&](auto* element, auto* lanes) {
    bytes += task_of(a, element, lanes).tiles.memory_bytes();
    return cudaSuccess;
  });
  return bytes;
}

cudaError_t run(const GateBackward& a, cudaStream_t stream) {
  return with_row(a, [&](auto* element, auto* lanes) { return launch_gate_backward(a, stream, element, lanes); });
}

}  // namespace topn_gating::cuda
