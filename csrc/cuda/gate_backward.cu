// Gradients of docs/spec.md, steps 4 to 6 and 10, on a GPU, for up to 512 experts and 16 ranks: the threads of a warp, or of a
// part of one, share a token, whose row is in registers. Each rank has a thread. The gates of each token are computed again,
// which costs less than keeping them from the forward pass. gate_backward_any.cu has the kernel for all other routers and
// sizes.
#include "cuda/exponential.cuh"
#include "cuda/gate_backward.cuh"
#include "cuda/kernels.h"

namespace topn_gating::cuda {
namespace {

// The most ranks of a kernel. Two threads have no registers for 16.
template <class RowLayout>
constexpr int most_ranks(Kind kind) {
  return kind == Kind::Plain || RowLayout::width <= 2 ? 8 : int(kMostRanks);
}

// Differentiates tokens. `Kind::Gates` stands for sigmoids alone: a softmax that chooses by its gates has the same gradient as
// others.
template <class T, class RowLayout, Kind kind>
class RowGradient {
 public:
  static constexpr bool Plain = kind == Kind::Plain, Sigmoid = kind == Kind::Gates;
  using Row = typename RowLayout::template Row<float>;
  using Exponentials = RowExponentials<RowLayout>;
  static constexpr int kWidth = RowLayout::width, kCount = RowLayout::count;
  static constexpr int kMostRanks = most_ranks<RowLayout>(kind);
  static constexpr int kRanks = kWidth < kMostRanks ? kMostRanks / kWidth : 1;  // of a thread
  static constexpr bool kOnePerThread = kRanks == 1;
  static constexpr int kRowFloats = kWidth * kCount + 4;  // and a gap, against bank conflicts

  static size_t shared_bytes(unsigned block) { return block / kWidth * kRowFloats * sizeof(float); }

  __device__ RowGradient(const GateBackwardTask& task, float* shared)
      : task_(task), a_(task.gate), layout_(task.gate.experts), losses_(task),
        row_(shared + int(threadIdx.x) / kWidth * kRowFloats),
        ranks_(a_.grad_weight == nullptr || is_constant() ? 0 : int(a_.top_n)), scale_(float(a_.scale)),
        row_id_(lane_id() / kWidth) {
    keep(scale_);
    keep(row_id_);
    clear_row();
    __syncwarp();
  }

  __device__ __forceinline__ void run(int64_t index) {
    const Tile tile(task_.plan, index, a_.tokens);
    losses_.of_group(layout_, tile.group, importance_);
    if (is_constant()) importance_ = Row();
    const int32_t* experts = a_.expert + tile.first * ranks_;
    const float* grads = static_cast<const float*>(a_.grad_weight) + tile.first * ranks_;
    T* out = static_cast<T*>(a_.grad_logits) + tile.first * a_.experts;
    keep(experts);
    keep(grads);
    keep(out);
    const float z_scale = float(losses_.z_scale());
    TokenRows<T, RowLayout> rows(layout_, a_, task_.plan, tile);
    read_ranks(experts, grads, rows.upcoming());
    while (rows.more()) {
      Row s;
      rows.next_logits(s);
      int expert[kRanks];
      float grad[kRanks], score[kRanks];
      TOPN_UNROLL
      for (int j = 0; j < kRanks; ++j) {
        expert[j] = expert_[j];
        grad[j] = grad_[j];
        score[j] = expert[j] >= 0 ? score_of(rows, expert[j]) : 0.0f;
      }
      read_ranks(experts, grads, rows.upcoming());
      if constexpr (!Plain) add_noise<T>(layout_, a_, rows.token, s);
      const bool valid = Plain || is_valid(a_, rows.token);
      if constexpr (Sigmoid) {
        differentiate_sigmoids(s, valid, expert, grad, score);
      } else {
        differentiate_softmax(s, valid, z_scale, expert, grad, score);
      }
      if constexpr (!Plain) {
        if (z_scale != 0 && (Sigmoid || a_.noise != nullptr)) add_z_loss(rows, valid, z_scale, s);
        if (a_.token_mask != nullptr) clear_padding(valid, grad, s);
      }
      if (rows.in_tile) layout_.store(s, task_.plan.aligned16, out + rows.index * layout_.experts);
    }
  }

 private:
  // Returns whether the gates depend on no logit, as those of a single expert: rounding must not show.
  __device__ __forceinline__ bool is_constant() const { return !Sigmoid && layout_.experts == 1; }
  __device__ __forceinline__ int rank(int j) const { return layout_.thread + j * kWidth; }

  // Turns the scores of a token into their gradient, in place.
  __device__ __forceinline__ void differentiate_softmax(Row& s, bool valid, float z_scale, const int (&expert)[kRanks],
                                                        const float (&grad)[kRanks], const float (&score)[kRanks]) {
    const Exponentials exponentials(s, highest_of<RowLayout>(s));
    const float share = reciprocal(exponentials.sum);
    float gate[kRanks];
    TOPN_UNROLL
    for (int j = 0; j < kRanks; ++j) gate[j] = expert[j] >= 0 ? exponentials.of(score[j]) * share : 0.0f;
    scatter(gate, expert, grad);
    Row q;
    gather(q);
    float dot = 0;
    TOPN_UNROLL
    for (int i = 0; i < kCount; ++i) {
      if (valid) q[i] += importance_[i];
      dot += s[i] * q[i];
    }
    float offset = -(layout_.sum(dot) * share);
    if (z_scale != 0 && valid && (Plain || a_.noise == nullptr)) offset += z_scale * logsumexp(exponentials);
    offset *= share;
    TOPN_UNROLL
    for (int i = 0; i < kCount; ++i) s[i] *= __fmaf_rn(q[i], share, offset);
  }

  // The same for sigmoids: csrc/row.h, score_gates_backward.
  __device__ __forceinline__ void differentiate_sigmoids(Row& s, bool valid, const int (&expert)[kRanks],
                                                         const float (&grad)[kRanks], const float (&score)[kRanks]) {
    float gate[kRanks];
    TOPN_UNROLL
    for (int j = 0; j < kRanks; ++j) gate[j] = expert[j] >= 0 ? sigmoid(score[j]).value : 0.0f;
    scatter(gate, expert, grad);
    float sum = 0, dot = 0;
    TOPN_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const ScoreGate<float> p = sigmoid(s[i]);
      sum += p.value;
      dot += p.value * importance_[i];
      s[i] = p.slope;
    }
    sum = layout_.sum(sum);
    const float eps = float(a_.eps), share = reciprocal(sum < eps ? eps : sum);
    const float mean = sum < eps ? 0.0f : layout_.sum(dot) * share;
    Row q;
    gather(q);
    TOPN_UNROLL
    for (int i = 0; i < kCount; ++i) {
      if (valid) q[i] += (importance_[i] - mean) * share;
      s[i] *= q[i];
    }
  }

  // Reads the expert, -1 where there is none, and the gradient of the weight of each rank of this thread.
  __device__ __forceinline__ void read_ranks(const int32_t* experts, const float* grads, int index) {
    TOPN_UNROLL
    for (int j = 0; j < kRanks; ++j) {
      expert_[j] = -1;
      grad_[j] = 0;
      if (rank(j) >= ranks_) continue;
      const int at = index * ranks_ + rank(j);
      const int given = experts[at];
      grad_[j] = grads[at];
      expert_[j] = unsigned(given) < unsigned(layout_.experts) ? given : -1;
    }
  }

  // docs/spec.md, step 3, for one expert.
  __device__ __forceinline__ float score_of(const TokenRows<T, RowLayout>& rows, int expert) const {
    const float logit = to_compute(rows.logits()[expert]);
    if (Plain || a_.noise == nullptr) return logit;
    const float u = static_cast<const float*>(a_.noise)[rows.token * a_.experts + expert];
    return logit + float(a_.noise_mult) * gumbel<RowLayout>(u);
  }

  // Adds the gradient of the gates of the chosen experts to the row in shared memory, which holds zeros.
  __device__ __forceinline__ void scatter(const float (&gate)[kRanks], const int (&expert)[kRanks],
                                          const float (&grad)[kRanks]) {
    if (ranks_ == 0) return;
    double sum = 0, dot = 0;
    TOPN_UNROLL
    for (int j = 0; j < kRanks; ++j) {
      sum += double(gate[j]);
      dot += double(gate[j]) * double(grad[j]);
    }
    TOPN_UNROLL
    for (int by = 1; by < std::min(kWidth, kMostRanks); by *= 2) sum += shuffle_xor(sum, by), dot += shuffle_xor(dot, by);
    // That of v: csrc/row.h, weight_gradient.
    double offset = 0;
    float factor = scale_;
    if (a_.normalize) {
      offset = sum < a_.eps ? 0.0 : dot / sum;
      factor *= reciprocal(float(sum < a_.eps ? a_.eps : sum));
    }
    float grad_v[kRanks];
    TOPN_UNROLL
    for (int j = 0; j < kRanks; ++j) grad_v[j] = float(double(grad[j]) - offset) * factor;
    if (!kOnePerThread || ballot(repeats(expert[0])) != 0) return add_in_order(expert, grad_v);
    if (expert[0] >= 0) row_[expert[0]] = grad_v[0];
  }
  // Returns whether another rank of the token has this expert: experts may be made up.
  __device__ __forceinline__ bool repeats(int expert) const {
    const unsigned peers = match(expert >= 0 ? unsigned(expert) << 5 | row_id_ : ~lane_id());
    return (peers & (peers - 1)) != 0;
  }
  __device__ __forceinline__ void add_in_order(const int (&expert)[kRanks], const float (&grad_v)[kRanks]) {
    for (int k = 0; k < ranks_; ++k) {
      TOPN_UNROLL
      for (int j = 0; j < kRanks; ++j) {
        if (rank(j) == k && expert[j] >= 0) row_[expert[j]] += grad_v[j];
      }
      __syncwarp();
    }
  }

  // Reads this thread's part of the row in shared memory and leaves zeros there.
  __device__ __forceinline__ void gather(Row& q) {
    __syncwarp();
    TOPN_UNROLL
    for (int i = 0; i < kCount; i += 4) {
      const float4 part = *reinterpret_cast<const float4*>(row_ + layout_.index(i));
      q[i] = part.x;
      q[i + 1] = part.y;
      q[i + 2] = part.z;
      q[i + 3] = part.w;
    }
    clear_row();
    __syncwarp();
  }
  __device__ __forceinline__ void clear_row() {
    TOPN_UNROLL
    for (int i = 0; i < kCount; i += 4) *reinterpret_cast<float4*>(row_ + layout_.index(i)) = make_float4(0, 0, 0, 0);
  }

  static __device__ __forceinline__ float logsumexp(const Exponentials& of) {
    return (of.exponent + binary_logarithm(of.sum)) * 0.693147181f;
  }
  // Adds the gradient of the z-loss, which is computed of logits without noise.
  __device__ __forceinline__ void add_z_loss(const TokenRows<T, RowLayout>& rows, bool valid, float z_scale, Row& grad) const {
    Row z;
    layout_.load(rows.logits(), task_.plan.aligned16, z);
    const Exponentials exponentials(z, highest_of<RowLayout>(z));
    const float factor = z_scale * logsumexp(exponentials) * reciprocal(exponentials.sum);
    TOPN_UNROLL
    for (int i = 0; i < kCount; ++i) {
      if (valid) grad[i] += factor * z[i];
    }
  }
  // Padding has no gradient, even where it holds NaN, unless its weights have one.
  __device__ __forceinline__ void clear_padding(bool valid, const float (&grad)[kRanks], Row& out) const {
    int any = 0;
    TOPN_UNROLL
    for (int j = 0; j < kRanks; ++j) any |= grad[j] != 0;
    any = RowLayout::reduce(any, [](int x, int y) { return x | y; });
    TOPN_UNROLL
    for (int i = 0; i < kCount; ++i) {
      if (!valid && any == 0) out[i] = 0;
    }
  }

  const GateBackwardTask& task_;
  const GateBackward& a_;
  const RowLayout layout_;
  const LossGradients<float> losses_;
  float* const row_;   // in shared memory
  const int ranks_;    // ranks whose weights have a gradient
  float scale_;
  unsigned row_id_;    // index of the row in the warp
  Row importance_;     // the group's ImportanceGradient

  // Of the next token.
  int expert_[kRanks];
  float grad_[kRanks];
};

template <class T, class RowLayout, Kind kind>
__global__ void __launch_bounds__(kBlockThreads<RowLayout>, kResidentBlocks<RowLayout>)
    gate_backward_rows(GateBackwardTask task) {
  SIMT_DYN_SMEM(float, shared);
  wait_for_stream();
  let_next_start();
  RowGradient<T, RowLayout, kind> gradient(task, shared);
  for (int64_t tile = blockIdx.x; tile < task.plan.count; tile += gridDim.x) gradient.run(tile);
}

// Returns whether `gate_backward_rows` has the router.
bool in_rows(const GateBackward& a) {
  if (a.dtype == DType::F64 || a.experts > kMostExperts || a.score == Score::SqrtSoftplus || a.soft) return false;
  return with_layout<float>(a.experts, [&](auto* layout) {
    return a.top_n <= most_ranks<std::remove_pointer_t<decltype(layout)>>(Kind::Gates);
  });
}

Kind kind_of(const GateBackward& a) {
  if (a.score != Score::Softmax) return Kind::Gates;
  return a.noise == nullptr && a.token_mask == nullptr && a.top_n <= 8 ? Kind::Plain : Kind::Scores;
}

GateBackwardLaunch launch_of(const GateBackward& a) {
  if (!in_rows(a)) return any_launch(a);
  return launch_of_rows<GateBackwardLaunch>(a, kind_of(a), [&](auto* element, auto* layout, auto kind) {
    using T = std::remove_pointer_t<decltype(element)>;
    using RowLayout = std::remove_pointer_t<decltype(layout)>;
    constexpr Kind K = decltype(kind)::value;
    const size_t shared = RowGradient<T, RowLayout, K>::shared_bytes(kBlockThreads<RowLayout>);
    return GateBackwardLaunch(a, gate_backward_rows<T, RowLayout, K>, layout, 0, shared);
  });
}

}  // namespace

int64_t workspace_bytes(const GateBackward& a) { return launch_of(a).bytes; }

cudaError_t run(const GateBackward& a, cudaStream_t stream) { return launch_of(a).run(stream); }

}  // namespace topn_gating::cuda
