// docs/spec.md, steps 3 to 6 and 10, on a GPU, for up to 512 experts and 16 ranks: the threads of a warp, or of a part of one,
// share a token, whose row is in registers. gate_any.cu has the kernel for all other routers and sizes.
#include "cuda/choice.cuh"
#include "cuda/exponential.cuh"
#include "cuda/gate.cuh"
#include "cuda/kernels.h"

namespace topn_gating::cuda {
namespace {

// Logsumexps of a row's tokens on their way to the sums. Each thread in turn keeps that of a token, and all take their
// logarithms at once.
template <class RowLayout>
class PendingLogs {
 public:
  __device__ explicit PendingLogs(int thread) : thread_(thread) {}

  // Adds the logsumexp of scores, where `counted`. All threads of the warp call it.
  template <class Sums>
  __device__ __forceinline__ void add(Sums& sums, bool counted, const RowExponentials<RowLayout>& of) {
    if (counted && turn_ == thread_) exponent_ = of.exponent, sum_ = of.sum;
    if (++turn_ == RowLayout::width) take_logarithms(sums);
  }
  template <class Sums>
  __device__ __forceinline__ void take_logarithms(Sums& sums) {
    constexpr double log_of_2 = 0.693147180559945309;
    sums.add_logsumexp(double(exponent_) * log_of_2 + ::log(double(sum_)));
    exponent_ = 0;
    sum_ = 1;
    turn_ = 0;
  }

 private:
  const int thread_;
  int turn_ = 0;
  float exponent_ = 0, sum_ = 1;  // of a token whose logsumexp is not taken yet; none has 0
};

// Routes tokens.
template <class T, class RowLayout, Kind kind>
class RowRouter {
 public:
  static constexpr bool Plain = kind == Kind::Plain;
  using Choice = RowChoice<T, RowLayout, kind>;
  using Row = typename RowLayout::template Row<float>;
  using Exponentials = RowExponentials<RowLayout>;
  static constexpr int kRanks = Choice::kRanks, kRowFloats = Choice::kRowFloats;

  // What choices need, and a row for the bias.
  static constexpr size_t shared_bytes(unsigned block) {
    return Choice::shared_bytes(block) + (kind == Kind::Gates ? kRowFloats * sizeof(float) : 0);
  }

  __device__ RowRouter(const GateTask& task, const RowLayout& layout, float* shared)
      : task_(task), a_(task.gate), layout_(layout), choice_(task.gate, layout, shared),
        bias_(shared + int(blockDim.x) / RowLayout::width * kRowFloats), top_n_(int(a_.top_n)), eps_(float(a_.eps)),
        scale_(float(a_.scale)) {
    keep(eps_);
    keep(scale_);
    if constexpr (kind == Kind::Gates) {
      for (int j = int(threadIdx.x); j < kRowFloats; j += int(blockDim.x)) {
        bias_[j] = a_.select_bias != nullptr && j < layout.experts ? a_.select_bias[j] : 0.0f;
      }
      __syncthreads();
    }
  }

  __device__ __forceinline__ void run(TileSums<RowLayout>& sums, int64_t index) {
    const Tile tile(task_.plan, index, a_.tokens);
    int32_t* experts = a_.expert + tile.first * top_n_;
    float* weights = static_cast<float*>(a_.weight) + tile.first * top_n_;
    keep(experts);
    keep(weights);
    PendingLogs<RowLayout> logs(layout_.thread);
    for (TokenRows<T, RowLayout> rows(layout_, a_, task_.plan, tile); rows.more();) {
      Row s;
      rows.next_logits(s);
      bool counted = rows.in_tile;
      bool has_logs = true;  // whether the logits' logsumexp comes with the gates
      if constexpr (!Plain) {
        counted = counted && is_valid(a_, rows.token);
        has_logs = a_.noise == nullptr && a_.score == Score::Softmax;
        if (a_.losses && !has_logs) add_logits(sums, logs, s, counted);
        add_noise<T>(layout_, a_, rows.token, s);
      }
      TOPN_UNROLL
      for (int i = 0; i < RowLayout::count; ++i) s[i] = canonical(s[i]);
      float share;  // of the gates in the sums
      if constexpr (!Plain) choice_.read_given(rows.token);
      if constexpr (kind == Kind::Gates) {
        share = choose_by_gates(sums, logs, s, counted && has_logs);
      } else {
        choice_.choose(s);
        const bool best_is_known = Plain || a_.given == nullptr;
        const Exponentials exponentials(s, best_is_known ? RowLayout::from(0, choice_.score[0]) : highest_of<RowLayout>(s));
        share = reciprocal(exponentials.sum);
        TOPN_UNROLL
        for (int j = 0; j < kRanks; ++j) value_[j] = exponentials.of(choice_.score[j]) * share;
        if (a_.losses && has_logs) logs.add(sums, counted, exponentials);
      }
      weigh();
      if (rows.in_tile) write(experts, weights, rows.index);
      if (a_.losses) {
        if (counted) {
          sums.add_gates(s, share);
          count(sums);
          if (!Plain && a_.given != nullptr && layout_.thread == 0) sums.count_valid();
        }
        sums.next_token();
      }
    }
    if (a_.losses) logs.take_logarithms(sums);
  }

 private:
  // Turns scores into gates, in place, and chooses by either. Returns what the gates are multiplied by in the sums.
  __device__ __forceinline__ float choose_by_gates(TileSums<RowLayout>& sums, PendingLogs<RowLayout>& logs, Row& s,
                                                   bool adds_log) {
    Row selection = s;
    float share = 1;
    if (a_.score == Score::Softmax) {
      const Exponentials exponentials(s, highest_of<RowLayout>(s));
      const float scale = reciprocal(exponentials.sum);
      TOPN_UNROLL
      for (int i = 0; i < RowLayout::count; ++i) s[i] *= scale;
      if (a_.losses && a_.noise == nullptr) logs.add(sums, adds_log, exponentials);
    } else {
      float sum = 0;
      TOPN_UNROLL
      for (int i = 0; i < RowLayout::count; ++i) {
        s[i] = sigmoid(s[i]).value;
        sum += s[i];
      }
      sum = RowLayout::reduce(sum, [](float a, float b) { return a + b; });
      share = reciprocal(sum < eps_ ? eps_ : sum);
    }
    if (selects_by_gates(a_)) {
      TOPN_UNROLL
      for (int i = 0; i < RowLayout::count; i += 4) {
        const float4 bias = *reinterpret_cast<const float4*>(bias_ + layout_.index(i));
        selection[i] = canonical(s[i] + bias.x);
        selection[i + 1] = canonical(s[i + 1] + bias.y);
        selection[i + 2] = canonical(s[i + 2] + bias.z);
        selection[i + 3] = canonical(s[i + 3] + bias.w);
      }
      TOPN_UNROLL
      for (int i = 0; i < RowLayout::count; ++i) {
        if (!layout_.valid(i)) selection[i] = RowLayout::lowest;
      }
      if (a_.expert_groups > 1 && a_.given == nullptr) choice_.close_groups(selection);
    }
    choice_.choose(selection);
    choice_.look_up(s, value_);
    return share;
  }

  // docs/spec.md, step 6.
  __device__ __forceinline__ void weigh() {
    float sum = 0;
    TOPN_UNROLL
    for (int j = 0; j < kRanks; ++j) {
      if (choice_.rank(j) >= top_n_ || (!Plain && choice_.expert[j] < 0)) value_[j] = 0;
      sum += value_[j];
    }
    if (!a_.normalize) {
      TOPN_UNROLL
      for (int j = 0; j < kRanks; ++j) value_[j] *= scale_;
      return;
    }
    TOPN_UNROLL
    for (int by = 1; by < std::min(RowLayout::width, 8); by *= 2) sum += shuffle_xor(sum, by);
    const float factor = scale_ * reciprocal(sum < eps_ ? eps_ : sum);
    TOPN_UNROLL
    for (int j = 0; j < kRanks; ++j) value_[j] *= factor;
  }

  __device__ __forceinline__ void write(int32_t* experts, float* weights, int index) const {
    TOPN_UNROLL
    for (int j = 0; j < kRanks; ++j) {
      if (choice_.rank(j) >= top_n_) continue;
      const int at = index * top_n_ + choice_.rank(j);
      experts[at] = choice_.expert[j];
      weights[at] = value_[j];
    }
  }

  __device__ __forceinline__ void count(TileSums<RowLayout>& sums) const {
    TOPN_UNROLL
    for (int j = 0; j < kRanks; ++j) {
      if (choice_.rank(j) < (a_.all_ranks ? top_n_ : 1) && (Plain || choice_.expert[j] >= 0)) sums.count(choice_.expert[j]);
    }
  }

  // Adds the logsumexp of a token's logits, where it does not come with the gates.
  __device__ __forceinline__ void add_logits(TileSums<RowLayout>& sums, PendingLogs<RowLayout>& logs, const Row& z,
                                             bool counted) {
    Row logits = z;
    logs.add(sums, counted, Exponentials(logits, highest_of<RowLayout>(z)));
  }

  const GateTask& task_;
  const Gate& a_;
  const RowLayout& layout_;
  Choice choice_;
  float* const bias_;  // in shared memory
  const int top_n_;
  float eps_, scale_;
  float value_[kRanks];  // gates, then weights, of the token's chosen experts
};

template <class T, class RowLayout, Kind kind>
__global__ void __launch_bounds__(kBlockThreads<RowLayout>, kResidentBlocks<RowLayout>) gate_rows(GateTask task) {
  using Router = RowRouter<T, RowLayout, kind>;
  const RowLayout layout(task.gate.experts);
  SIMT_DYN_SMEM(char, shared);
  double* const of_sums = reinterpret_cast<double*>(shared + Router::shared_bytes(blockDim.x));
  wait_for_stream();
  let_next_start();
  Router router(task, layout, reinterpret_cast<float*>(shared));
  const int counted_ranks = task.gate.given != nullptr ? 0 : task.gate.all_ranks ? int(task.gate.top_n) : 1;
  for_tiles<float>(task, layout, of_sums, counted_ranks,
                   [&](TileSums<RowLayout>& sums, int64_t index) { router.run(sums, index); });
}

// Returns whether `gate_rows` has the router.
bool in_rows(const Gate& a) {
  if (a.dtype == DType::F64 || a.experts > kMostExperts || a.top_n > kMostRanks || a.score == Score::SqrtSoftplus) return false;
  if (a.statistics != nullptr || a.soft) return false;
  const auto fit = [&](auto* layout) { return groups_fit<std::remove_pointer_t<decltype(layout)>>(a); };
  return element_bytes(a.dtype) == 2 ? with_layout<BFloat16>(a.experts, fit) : with_layout<float>(a.experts, fit);
}

Kind kind_of(const Gate& a) {
  if (a.score != Score::Softmax || selects_by_gates(a)) return Kind::Gates;
  return a.noise == nullptr && a.token_mask == nullptr && a.given == nullptr && a.top_n <= 8 ? Kind::Plain : Kind::Scores;
}

GateLaunch launch_of(const Gate& a) {
  if (!in_rows(a)) return any_launch(a);
  return launch_of_rows<GateLaunch>(a, kind_of(a), [&](auto* element, auto* layout, auto kind) {
    using T = std::remove_pointer_t<decltype(element)>;
    using RowLayout = std::remove_pointer_t<decltype(layout)>;
    constexpr Kind K = decltype(kind)::value;
    const size_t shared = RowRouter<T, RowLayout, K>::shared_bytes(kBlockThreads<RowLayout>);
    return GateLaunch(a, gate_rows<T, RowLayout, K>, layout, 0, shared);
  });
}

}  // namespace

int64_t workspace_bytes(const Gate& a) { return launch_of(a).task.space.bytes; }

cudaError_t run(const Gate& a, cudaStream_t stream) {
  const GateLaunch launch = launch_of(a);
  const cudaError_t error = launch.run(stream);
  return error == cudaSuccess && a.statistics != nullptr ? launch_statistics(launch.task, stream) : error;
}

}  // namespace topn_gating::cuda
