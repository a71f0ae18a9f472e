// docs/spec.md, steps 3 to 6 and 10, on a GPU, for up to 512 experts and 16 ranks: the threads of a warp, or of a part of one, share a
// token, whose row is in registers. gate_any.cu has the kernel for all other routers and sizes.
#include "cuda/exponential.cuh"
#include "cuda/gate.cuh"
#include "cuda/kernels.h"
#include "cuda/top8.cuh"

namespace topn_gating::cuda {
namespace {

// Logsumexps of a row's tokens on their way to the sums. Each thread in turn keeps that of a token, and all take their logarithms at
// once.
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

// Routes tokens. `Plain`: without noise or mask, and for at most eight ranks.
template <class T, class RowLayout, bool Plain>
class RowRouter {
 public:
  // Scores from 16-bit elements fit into keys.
  static constexpr bool kExact = Plain && sizeof(T) == 2;
  static constexpr int kRounds = Plain ? 1 : 2;  // of eight ranks
  using Key = PackedKeys<RowLayout, kExact>;
  using Top = Top8<RowLayout::width, RowLayout::count>;
  using Row = typename RowLayout::template Row<float>;
  using Exponentials = RowExponentials<RowLayout>;
  static constexpr int kRanks = Top::ranks * kRounds;
  static constexpr int kRowFloats = RowLayout::width * RowLayout::count;

  static constexpr size_t shared_bytes(unsigned block) { return kExact ? 0 : block / RowLayout::width * kRowFloats * sizeof(float); }

  __device__ RowRouter(const GateTask& task, const RowLayout& layout, float* shared)
      : task_(task), a_(task.gate), layout_(layout), top_(layout.thread), keys_(layout),
        row_(shared + int(threadIdx.x) / RowLayout::width * kRowFloats), top_n_(int(a_.top_n)) {
    eps_ = float(a_.eps);
    scale_ = float(a_.scale);
    keep(eps_);
    keep(scale_);
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
      if constexpr (!Plain) {
        counted = counted && is_valid(a_, rows.token);
        if (a_.losses && a_.noise != nullptr) add_logits(sums, logs, s, counted);
        add_noise<T>(layout_, a_, rows.token, s);
      }
      TOPN_UNROLL
      for (int i = 0; i < RowLayout::count; ++i) s[i] = canonical(s[i]);
      choose(s);
      const Exponentials exponentials(s, RowLayout::from(0, score_[0]));
      const float share = reciprocal(exponentials.sum);
      weigh(exponentials, share);
      if (rows.in_tile) write(experts, weights, rows.index);
      if (a_.losses) {
        if (counted) sums.add_gates(s, share), count(sums);
        sums.next_token();
        if (Plain || a_.noise == nullptr) logs.add(sums, counted, exponentials);
      }
    }
    if (a_.losses) logs.take_logarithms(sums);
  }

 private:
  __device__ __forceinline__ int rank(int j) const { return top_.first_rank + j % Top::ranks + j / Top::ranks * 8; }

  // docs/spec.md, step 5.
  __device__ __forceinline__ void choose(const Row& s) {
    int32_t last = std::numeric_limits<int32_t>::max();
    TOPN_UNROLL
    for (int round = 0; round < kRounds; ++round) {
      if (round > 0 && top_n_ <= 8) {
        TOPN_UNROLL
        for (int j = 0; j < Top::ranks; ++j) expert_[Top::ranks + j] = 0, score_[Top::ranks + j] = 0;
        break;
      }
      int32_t keys[RowLayout::count], best[Top::ranks];
      TOPN_UNROLL
      for (int i = 0; i < RowLayout::count; ++i) {
        keys[i] = keys_.pack(s[i], i);
        if (round > 0 && keys[i] >= last) keys[i] = std::numeric_limits<int32_t>::min();
      }
      top_.find(keys, best);
      if (kRounds > 1) last = RowLayout::from(Top::thread_of(7), best[Top::ranks - 1]);
      TOPN_UNROLL
      for (int j = 0; j < Top::ranks; ++j) {
        expert_[round * Top::ranks + j] = Key::expert(best[j]);
        score_[round * Top::ranks + j] = Key::score(best[j]);
      }
    }
    if constexpr (!kExact) {
      look_up(s);
      if (ballot(misplaced(s)) != 0) choose_exactly(s);
    }
  }

  // Replaces the scores of the chosen experts, which come from keys, by exact ones.
  __device__ __forceinline__ void look_up(const Row& s) {
    TOPN_UNROLL
    for (int i = 0; i < RowLayout::count; i += 4) {
      *reinterpret_cast<float4*>(row_ + layout_.index(i)) = make_float4(s[i], s[i + 1], s[i + 2], s[i + 3]);
    }
    __syncwarp();
    TOPN_UNROLL
    for (int j = 0; j < kRanks; ++j) score_[j] = row_[expert_[j]];
    __syncwarp();
  }

  // Returns whether an expert of this thread may have a wrong rank, because others have scores with the same upper bits.
  __device__ __forceinline__ bool misplaced(const Row& s) const {
    bool wrong = false;
    TOPN_UNROLL
    for (int j = 0; j < kRanks; ++j) {
      float next = j + 1 < kRanks ? score_[j + 1] : 0.0f;
      if (j % Top::ranks + 1 == Top::ranks && RowLayout::width > 1) {
        const int round = j / Top::ranks;
        next = RowLayout::from(Top::thread_of(rank(j) + 1), score_[round * Top::ranks]);
        if (round + 1 < kRounds) {
          const float first = RowLayout::from(0, score_[(round + 1) * Top::ranks]);
          next = rank(j) == 7 ? first : next;
        }
      }
      wrong |= rank(j) + 1 < top_n_ && score_[j] < next;
    }
    // The scores above that of the last rank that have the same key but for the index are an interval of integers.
    float least = score_[0];
    TOPN_UNROLL
    for (int j = 1; j < kRanks; ++j) least = rank(j) == top_n_ - 1 ? score_[j] : least;
    const int32_t bits = __float_as_int(RowLayout::from(Top::thread_of(top_n_ - 1), least));
    const unsigned first = unsigned(bits >= 0 ? bits + 1 : bits & ~Key::kMask), count = (bits >= 0 ? ~bits : bits) & Key::kMask;
    TOPN_UNROLL
    for (int i = 0; i < RowLayout::count; ++i) wrong |= unsigned(__float_as_int(s[i])) - first < count;
    return wrong;
  }

  // Chooses the experts by their scores and indices, rank by rank.
  __device__ __forceinline__ void choose_exactly(const Row& s) {
    using Scores = RowLayout;
    int32_t last = std::numeric_limits<int32_t>::max();
    int after = -1;  // candidates with the last key have a larger index
    for (int k = 0; k < top_n_; ++k) {
      int32_t best = std::numeric_limits<int32_t>::min();
      int where = std::numeric_limits<int32_t>::max();
      float score = 0;
      TOPN_UNROLL
      for (int i = 0; i < RowLayout::count; ++i) {
        const int32_t key = score_key<Scores>(s[i]);
        const int expert = layout_.index(i);
        const bool left = key < last || (key == last && expert > after);
        if (left && key > best) best = key, where = expert, score = s[i];
      }
      last = RowLayout::max(best);
      after = RowLayout::min(best == last ? where : std::numeric_limits<int32_t>::max());
      score = RowLayout::from(RowLayout::holder(after), score);
      TOPN_UNROLL
      for (int j = 0; j < kRanks; ++j) {
        if (rank(j) == k) expert_[j] = after, score_[j] = score;
      }
    }
  }

  // docs/spec.md, step 6.
  __device__ __forceinline__ void weigh(const Exponentials& exponentials, float share) {
    float sum = 0;
    TOPN_UNROLL
    for (int j = 0; j < kRanks; ++j) {
      value_[j] = rank(j) < top_n_ ? exponentials.of(score_[j]) * share : 0.0f;
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
      if (rank(j) >= top_n_) continue;
      const int at = index * top_n_ + rank(j);
      experts[at] = expert_[j];
      weights[at] = value_[j];
    }
  }

  __device__ __forceinline__ void count(TileSums<RowLayout>& sums) const {
    TOPN_UNROLL
    for (int j = 0; j < kRanks; ++j) {
      if (rank(j) < (a_.all_ranks ? top_n_ : 1)) sums.count(expert_[j]);
    }
  }

  // Adds the logsumexp of a token's logits, where its scores have noise.
  __device__ __forceinline__ void add_logits(TileSums<RowLayout>& sums, PendingLogs<RowLayout>& logs, const Row& z,
                                             bool counted) {
    Row logits = z;
    logs.add(sums, counted, Exponentials(logits, highest_of<RowLayout>(z)));
  }

  const GateTask& task_;
  const Gate& a_;
  const RowLayout& layout_;
  Top top_;
  const Key keys_;
  float* const row_;  // in shared memory
  const int top_n_;
  float eps_, scale_;

  // Of the current token.
  int expert_[kRanks];
  float score_[kRanks];
  float value_[kRanks];  // gates, then weights, of the chosen experts
};

template <class T, class RowLayout, bool Plain>
__global__ void __launch_bounds__(kBlockThreads<RowLayout>, kResidentBlocks<RowLayout>) gate_rows(GateTask task) {
  const RowLayout layout(task.gate.experts);
  SIMT_DYN_SMEM(char, shared);
  float* const rows = reinterpret_cast<float*>(shared);
  double* const of_sums = reinterpret_cast<double*>(shared + RowRouter<T, RowLayout, Plain>::shared_bytes(blockDim.x));
  RowRouter<T, RowLayout, Plain> router(task, layout, rows);
  for_tiles<float>(task, layout, of_sums, task.gate.all_ranks ? int(task.gate.top_n) : 1,
                   [&](TileSums<RowLayout>& sums, int64_t index) { router.run(sums, index); });
}

// Returns whether `gate_rows` has the router.
bool in_rows(const Gate& a) {
  return a.dtype != DType::F64 && a.experts <= kMostExperts && a.top_n <= kMostRanks && a.score == Score::Softmax &&
         !selects_by_gates(a) && a.given == nullptr && a.statistics == nullptr && !a.soft;
}

template <class T, class RowLayout>
GateLaunch rows_launch(const Gate& a, T* /*element*/, RowLayout* layout) {
  const bool plain = a.noise == nullptr && a.token_mask == nullptr && a.top_n <= 8;
  const auto launch = [&](auto is_plain) {
    constexpr bool Plain = decltype(is_plain)::value;
    const size_t shared = RowRouter<T, RowLayout, Plain>::shared_bytes(kBlockThreads<RowLayout>);
    return GateLaunch(a, gate_rows<T, RowLayout, Plain>, layout, 0, shared);
  };
  return plain ? launch(std::true_type{}) : launch(std::false_type{});
}

// Calls f with the launch of `gate_rows`.
template <class F>
cudaError_t with_rows_launch(const Gate& a, const F& f) {
  return with_type(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    if constexpr (std::is_same_v<T, double>) {
      return cudaErrorInvalidValue;
    } else {
      return with_layout<T>(a.experts, [&](auto* layout) { return f(rows_launch(a, element, layout)); });
    }
  });
}

}  // namespace

int64_t workspace_bytes(const Gate& a) {
  if (!in_rows(a)) return workspace_bytes_any(a);
  int64_t bytes = 0;
  with_rows_launch(a, [&](const GateLaunch& launch) {
    bytes = launch.task.space.bytes;
    return cudaSuccess;
  });
  return bytes;
}

cudaError_t run(const Gate& a, cudaStream_t stream) {
  if (!in_rows(a)) return run_any(a, stream);
  return with_rows_launch(a, [&](const GateLaunch& launch) { return launch.run(stream); });
}

}  // namespace topn_gating::cuda
