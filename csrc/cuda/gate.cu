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

// Routes tokens.
template <class T, class RowLayout, Kind kind>
class RowRouter {
 public:
  static constexpr bool Plain = kind == Kind::Plain;
  // Scores from 16-bit elements fit into keys.
  static constexpr bool kExact = Plain && sizeof(T) == 2;
  static constexpr int kRounds = Plain ? 1 : 2;  // of eight ranks
  using Key = PackedKeys<RowLayout, kExact>;
  using Top = Top8<RowLayout::width, RowLayout::count>;
  using Row = typename RowLayout::template Row<float>;
  using Exponentials = RowExponentials<RowLayout>;
  static constexpr int kRanks = Top::ranks * kRounds;
  static constexpr int kRowFloats = RowLayout::width * RowLayout::count;

  // A row in shared memory for each row of the block, and one for the bias.
  static constexpr size_t shared_bytes(unsigned block) {
    const size_t rows = kExact ? 0 : block / RowLayout::width;
    return (rows + (kind == Kind::Gates)) * kRowFloats * sizeof(float);
  }

  __device__ RowRouter(const GateTask& task, const RowLayout& layout, float* shared)
      : task_(task), a_(task.gate), layout_(layout), top_(layout.thread), keys_(layout),
        row_(shared + int(threadIdx.x) / RowLayout::width * kRowFloats),
        bias_(shared + int(blockDim.x) / RowLayout::width * kRowFloats), top_n_(int(a_.top_n)) {
    eps_ = float(a_.eps);
    scale_ = float(a_.scale);
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
      if constexpr (!Plain) read_given(rows.token);
      if constexpr (kind == Kind::Gates) {
        share = choose_by_gates(sums, logs, s, counted && has_logs);
      } else {
        choose(s);
        const bool best_is_known = Plain || a_.given == nullptr;
        const Exponentials exponentials(s, best_is_known ? RowLayout::from(0, score_[0]) : highest_of<RowLayout>(s));
        share = reciprocal(exponentials.sum);
        TOPN_UNROLL
        for (int j = 0; j < kRanks; ++j) value_[j] = exponentials.of(score_[j]) * share;
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
  __device__ __forceinline__ int rank(int j) const { return top_.first_rank + j % Top::ranks + j / Top::ranks * 8; }

  // Turns scores into gates, in place, and chooses by either. Returns what the gates are multiplied by in the sums.
  __device__ __forceinline__ float choose_by_gates(TileSums<RowLayout>& sums, PendingLogs<RowLayout>& logs, Row& s, bool adds_log) {
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
    open_ = -1;
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
      if (a_.expert_groups > 1 && a_.given == nullptr) close_groups(selection);
    }
    choose(selection);
    look_up(s, value_);
    return share;
  }

  // Closes the groups of experts that are not among the best. A chunk of a thread's values is in one group, which so many
  // neighbouring threads share: see `in_rows`.
  __device__ __forceinline__ void close_groups(const Row& selection) {
    constexpr int chunk = RowLayout::chunk, columns = RowLayout::count / chunk;
    const int size = layout_.experts / int(a_.expert_groups), threads = size / chunk, in_column = RowLayout::width / threads;
    int32_t group[columns];
    TOPN_UNROLL
    for (int c = 0; c < columns; ++c) {
      int32_t best = kClosed, second = kClosed;
      TOPN_UNROLL
      for (int i = c * chunk; i < (c + 1) * chunk; ++i) {
        const int32_t key = score_key<RowLayout>(selection[i]), lower = key < best ? key : best;
        second = lower > second ? lower : second;
        best = key > best ? key : best;
      }
      for (int by = 1; by < threads; by *= 2) {
        const int32_t other = shuffle_xor(best, by), other_second = shuffle_xor(second, by);
        const int32_t lower = other < best ? other : best, higher_second = other_second > second ? other_second : second;
        second = lower > higher_second ? lower : higher_second;
        best = other > best ? other : best;
      }
      const float sum = score_of_key<RowLayout>(best) + score_of_key<RowLayout>(second);
      group[c] = a_.group_score == GroupScore::Max ? best : score_key<RowLayout>(sum);
    }
    // A group is open if fewer than top_groups others are better.
    int better[columns] = {};
    const int own = layout_.thread / threads;
    for (int q = 0; q < in_column; ++q) {
      TOPN_UNROLL
      for (int c = 0; c < columns; ++c) {
        const int32_t other = RowLayout::from(q * threads, group[c]);
        if (c * in_column + q >= a_.expert_groups) continue;
        TOPN_UNROLL
        for (int d = 0; d < columns; ++d) {
          const bool before = c < d || (c == d && q < own);
          better[d] += other > group[d] || (other == group[d] && before);
        }
      }
    }
    open_ = 0;
    TOPN_UNROLL
    for (int d = 0; d < columns; ++d) open_ |= int(better[d] < a_.top_groups) << d;
  }
  // Returns whether value i of this thread is in an open group.
  __device__ __forceinline__ bool is_open(int i) const { return kind != Kind::Gates || (open_ >> i / RowLayout::chunk & 1) != 0; }

  // Reads the experts that a caller chose for a token; -1 stands for none.
  __device__ __forceinline__ void read_given(int64_t token) {
    if (a_.given == nullptr) return;
    TOPN_UNROLL
    for (int j = 0; j < kRanks; ++j) {
      expert_[j] = -1;
      if (rank(j) >= top_n_) continue;
      const int32_t given = a_.given[token * top_n_ + rank(j)];
      if (unsigned(given) < unsigned(layout_.experts)) expert_[j] = given;
    }
  }

  // docs/spec.md, step 5: chooses by selection scores, unless the experts are given.
  __device__ __forceinline__ void choose(const Row& s) {
    if (!Plain && a_.given != nullptr) return look_up(s, score_);
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
        if ((round > 0 && keys[i] >= last) || !is_open(i)) keys[i] = kClosed;
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
      look_up(s, score_);
      if (ballot(misplaced(s)) != 0) choose_exactly(s);
    }
  }

  // Looks up the values that the chosen experts have in a row.
  __device__ __forceinline__ void look_up(const Row& s, float (&values)[kRanks]) {
    TOPN_UNROLL
    for (int i = 0; i < RowLayout::count; i += 4) {
      *reinterpret_cast<float4*>(row_ + layout_.index(i)) = make_float4(s[i], s[i + 1], s[i + 2], s[i + 3]);
    }
    __syncwarp();
    TOPN_UNROLL
    for (int j = 0; j < kRanks; ++j) values[j] = row_[Plain || expert_[j] >= 0 ? expert_[j] : 0];
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
    const unsigned first = bits >= 0 ? unsigned(bits) + 1 : unsigned(bits & ~Key::kMask);
    const unsigned count = (bits >= 0 ? ~bits : bits) & Key::kMask;
    TOPN_UNROLL
    for (int i = 0; i < RowLayout::count; ++i) wrong |= unsigned(__float_as_int(s[i])) - first < count && is_open(i);
    return wrong;
  }

  // Chooses the experts by their scores and indices, rank by rank.
  __device__ __forceinline__ void choose_exactly(const Row& s) {
    if (lane_id() == 0) count_event();
    int32_t last = std::numeric_limits<int32_t>::max();
    int after = -1;  // candidates with the last key have a larger index
    for (int k = 0; k < top_n_; ++k) {
      int32_t best = kClosed;
      int where = std::numeric_limits<int32_t>::max();
      float score = 0;
      TOPN_UNROLL
      for (int i = 0; i < RowLayout::count; ++i) {
        const int32_t key = score_key<RowLayout>(s[i]);
        const int expert = layout_.index(i);
        const bool left = is_open(i) && (key < last || (key == last && expert > after));
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
  __device__ __forceinline__ void weigh() {
    float sum = 0;
    TOPN_UNROLL
    for (int j = 0; j < kRanks; ++j) {
      if (rank(j) >= top_n_ || (!Plain && expert_[j] < 0)) value_[j] = 0;
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
      if (rank(j) < (a_.all_ranks ? top_n_ : 1) && (Plain || expert_[j] >= 0)) sums.count(expert_[j]);
    }
  }

  // Adds the logsumexp of a token's logits, where it does not come with the gates.
  __device__ __forceinline__ void add_logits(TileSums<RowLayout>& sums, PendingLogs<RowLayout>& logs, const Row& z, bool counted) {
    Row logits = z;
    logs.add(sums, counted, Exponentials(logits, highest_of<RowLayout>(z)));
  }

  static constexpr int32_t kClosed = std::numeric_limits<int32_t>::min();  // lower than the key of any score

  const GateTask& task_;
  const Gate& a_;
  const RowLayout& layout_;
  Top top_;
  const Key keys_;
  float* const row_;   // in shared memory
  float* const bias_;  // in shared memory
  const int top_n_;
  float eps_, scale_;

  // Of the current token.
  int expert_[kRanks];
  float score_[kRanks];  // selection scores
  int open_ = -1;        // a bit for each chunk of this thread: whether its group is open
  float value_[kRanks];  // gates, then weights, of the chosen experts
};

template <class T, class RowLayout, Kind kind>
__global__ void __launch_bounds__(kBlockThreads<RowLayout>, kResidentBlocks<RowLayout>) gate_rows(GateTask task) {
  using Router = RowRouter<T, RowLayout, kind>;
  const RowLayout layout(task.gate.experts);
  SIMT_DYN_SMEM(char, shared);
  double* const of_sums = reinterpret_cast<double*>(shared + Router::shared_bytes(blockDim.x));
  Router router(task, layout, reinterpret_cast<float*>(shared));
  const int counted_ranks = task.gate.given != nullptr ? 0 : task.gate.all_ranks ? int(task.gate.top_n) : 1;
  for_tiles<float>(task, layout, of_sums, counted_ranks,
                   [&](TileSums<RowLayout>& sums, int64_t index) { router.run(sums, index); });
}

// Returns whether groups of experts are as RowRouter::close_groups needs them.
template <class RowLayout>
bool groups_fit(const Gate& a) {
  const int64_t size = a.experts / a.expert_groups, threads = size / RowLayout::chunk;
  return a.expert_groups == 1 || (size % RowLayout::chunk == 0 && (threads & (threads - 1)) == 0 && threads <= RowLayout::width);
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

template <Kind kind, class T, class RowLayout>
GateLaunch launch_of(const Gate& a, T* /*element*/, RowLayout* layout) {
  const size_t shared = RowRouter<T, RowLayout, kind>::shared_bytes(kBlockThreads<RowLayout>);
  return GateLaunch(a, gate_rows<T, RowLayout, kind>, layout, 0, shared);
}

template <class T, class RowLayout>
GateLaunch rows_launch(const Gate& a, T* element, RowLayout* layout) {
  switch (kind_of(a)) {
    case Kind::Plain: return launch_of<Kind::Plain>(a, element, layout);
    case Kind::Scores: return launch_of<Kind::Scores>(a, element, layout);
    default: return launch_of<Kind::Gates>(a, element, layout);
  }
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
