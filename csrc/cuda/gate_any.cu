// docs/spec.md, steps 3 to 6, on a GPU, for any router and any size: a warp processes a token, whose row is in registers or in
// global memory. gate.cu has the kernel for the routers of most models.
#include "cuda/gate.cuh"
#include "cuda/topn.cuh"

namespace topn_gating::cuda {
namespace {

// docs/spec.md, steps 4 to 6, 10 and 11, for any router, where a whole warp shares a row.
template <class T, class RowLayout>
class AnyRouter {
 public:
  using Scalar = typename RowLayout::Scalar;
  using Key = typename RowLayout::Key;
  using Row = typename RowLayout::template Row<Scalar>;
  using Keys = typename RowLayout::template Row<Key>;
  static constexpr int64_t row_bytes_per_expert = 2 * sizeof(Scalar) + 3 * sizeof(Key);

  __device__ AnyRouter(const GateTask& task, const RowLayout& layout, char* memory)
      : task_(task), a_(task.gate), layout_(layout), keys_(memory, layout.count), groups_(memory, layout.count),
        open_(memory, layout.count) {}

  // Turns scores s into gates. Writes the token's experts and their gates v_k, and returns the sum of these. Row z is scratch.
  // Thread k % 32 writes, and later reads, rank k.
  __device__ __forceinline__ double choose(Row& s, Row& z, int64_t token) {
    const bool valid = is_valid(a_, token);
    if (a_.statistics != nullptr && valid) add_logits(s, z, token);
    if (a_.given == nullptr && !selects_by_gates(a_)) {
      for_values([&](int i) { keys_[i] = score_key<RowLayout>(s[i]); });
    }
    gates(s);
    if (a_.statistics != nullptr && valid) add_entropy(s);
    if (a_.given == nullptr && selects_by_gates(a_)) {
      const float* const bias = a_.select_bias;
      for_values([&](int i) {
        keys_[i] = score_key<RowLayout>(bias == nullptr ? s[i] : s[i] + Scalar(bias[layout_.index(i)]));
      });
      if (a_.expert_groups > 1) close_groups();
    }
    double sum = 0;
    const auto write = [&](int k, int expert) {
      const Scalar v = expert < 0 ? Scalar(0) : layout_.at(s, expert);
      sum += double(v);
      const Outputs<T> out(a_, token);
      if (layout_.thread == k % RowLayout::width) out.expert[k] = expert, out.weight[k] = ComputeType<T>(v);
    };
    if (a_.given == nullptr) {
      stable_topn(layout_, keys_, int(a_.top_n), write);
    } else {
      for (int k = 0; k < a_.top_n; ++k) {
        const int32_t given = a_.given[token * a_.top_n + k];
        write(k, given >= 0 && given < layout_.experts ? given : -1);
      }
    }
    return sum;
  }

  // Adds a valid token with gates p to the sums of the losses. Row z is scratch.
  __device__ __forceinline__ void add_to(TileSums<RowLayout>& sums, const Row& p, Row& z, int64_t token) {
    LogSumExp<Scalar> lse = lse_;
    if (a_.score != Score::Softmax || a_.noise != nullptr) {
      layout_.load(logits_of<T>(a_, token), task_.plan.aligned16, z);
      lse = softmax(layout_, z);
    }
    const Scalar share = a_.score == Score::Softmax ? Scalar(1) : Scalar(1) / gate_divisor<RowLayout>(sum_, a_.eps);
    sums.add_gates(p, share);
    sums.next_token();
    if (layout_.thread == 0) sums.add_logsumexp(value_of(lse)), sums.count_valid();
    const Outputs<T> out(a_, token);
    for (int64_t k = layout_.thread; k < (a_.all_ranks ? a_.top_n : 1); k += RowLayout::width) {
      if (out.expert[k] >= 0) sums.count(out.expert[k]);
    }
  }

  // Writes what this warp has added up of a tile's tokens, and starts anew.
  __device__ void finish_statistics(int64_t tile) {
    if (lane_id() == 0) task_.space.statistics[tile * (blockDim.x / kWarp) + warp_id()] = statistics_;
    statistics_ = TokenStatistics{};
  }

 private:
  // Calls write(i) for the values of experts. Gives the keys of the others, past the last one, the lowest value.
  template <class Write>
  __device__ __forceinline__ void for_values(const Write& write) {
    TOPN_UNROLL_BY(RowLayout::unroll)
    for (int i = 0; i < layout_.count; ++i) {
      keys_[i] = kLowest;
      if (layout_.valid(i)) write(i);
    }
  }

  // docs/spec.md, step 4.
  __device__ __forceinline__ void gates(Row& s) {
    if (a_.score == Score::Softmax) {
      lse_ = a_.statistics != nullptr ? softmax<true>(layout_, s) : softmax(layout_, s);
    } else {
      sum_ = score_gates_of(a_.score, layout_, s, [](int, Scalar) {});
    }
  }

  // Gives the keys of experts in closed groups the lowest value.
  __device__ void close_groups() {
    const int size = int(a_.experts / a_.expert_groups);
    TOPN_UNROLL_BY(RowLayout::unroll)
    for (int i = 0; i < layout_.count; ++i) groups_[i] = open_[i] = kLowest;
    for (int group = 0; group < a_.expert_groups; ++group) {
      const Key key = group_key(group * size, size);
      if (RowLayout::holder(group) == layout_.thread) groups_.set(RowLayout::place(group), key);
    }
    stable_topn(layout_, groups_, int(a_.top_groups), [&](int, int group) {
      TOPN_UNROLL_BY(RowLayout::unroll)
      for (int i = 0; i < layout_.count; ++i) {
        if (in_group(i, group * size, size)) open_[i] = keys_[i];
      }
    });
    TOPN_UNROLL_BY(RowLayout::unroll)
    for (int i = 0; i < layout_.count; ++i) keys_[i] = open_[i];
  }

  __device__ __forceinline__ bool in_group(int i, int first, int size) const {
    return layout_.index(i) >= first && layout_.index(i) < first + size;
  }

  // Returns the key of the score of the group whose experts are those from `first` on.
  __device__ Key group_key(int first, int size) const {
    Key best = kLowest, second = kLowest;
    TOPN_UNROLL_BY(RowLayout::unroll)
    for (int i = 0; i < layout_.count; ++i) {
      const Key key = in_group(i, first, size) ? keys_[i] : kLowest;
      const Key lower = key < best ? key : best;
      second = lower > second ? lower : second;
      best = key > best ? key : best;
    }
    const Key top = layout_.max(best);
    if (a_.group_score == GroupScore::Max || size == 1) return top;
    const Key owner = layout_.min(best == top ? Key(layout_.thread) : std::numeric_limits<Key>::max());
    const Key next = layout_.max(owner == Key(layout_.thread) ? second : best);
    return score_key<RowLayout>(score_of_key<RowLayout>(top) + score_of_key<RowLayout>(next));
  }

  __device__ void add_logits(const Row& s, Row& z, int64_t token) {
    if (a_.noise != nullptr) layout_.load(logits_of<T>(a_, token), task_.plan.aligned16, z);
    Scalar squares = 0, largest = 0;
    TOPN_UNROLL_BY(RowLayout::unroll)
    for (int i = 0; i < layout_.count; ++i) {
      if (!layout_.valid(i)) continue;
      const Scalar logit = a_.noise != nullptr ? z[i] : s[i], magnitude = logit < 0 ? -logit : logit;
      squares += logit * logit;
      largest = magnitude > largest ? magnitude : largest;
    }
    statistics_.valid_tokens += 1;
    statistics_.squares += double(layout_.sum(squares));
    largest = layout_.max(largest);
    if (double(largest) > statistics_.largest) statistics_.largest = double(largest);
  }

  __device__ void add_entropy(const Row& p) {
    if (a_.score == Score::Softmax) {
      statistics_.entropy += softmax_entropy(::log(double(lse_.sum)), double(lse_.sum), double(lse_.moment));
      return;
    }
    Scalar terms = 0;
    TOPN_UNROLL_BY(RowLayout::unroll)
    for (int i = 0; i < layout_.count; ++i) terms += entropy_term<RowLayout>(p[i]);
    const double divisor = double(gate_divisor<RowLayout>(sum_, a_.eps));
    statistics_.entropy += score_entropy(double(layout_.sum(terms)), double(sum_), divisor, ::log(divisor));
  }

  static constexpr Key kLowest = std::numeric_limits<Key>::min();

  const GateTask& task_;
  const Gate& a_;
  const RowLayout& layout_;
  Keys keys_;    // of the selection scores
  Keys groups_;  // of the scores of expert groups
  Keys open_;    // of the selection scores in open groups
  LogSumExp<Scalar> lse_{};  // of the scores, for a softmax
  Scalar sum_{};             // of the gates, for other scores
  TokenStatistics statistics_{};
};

// Replaces the v_k that `choose` has written by scores of the soft top-n, and returns their sum. Overwrites the gates p.
template <class T, class RowLayout>
__device__ __forceinline__ double soften(const Gate& a, const RowLayout& layout,
                                         typename RowLayout::template Row<double>& p, int64_t token) {
  const SoftTopN<double> soft(layout, layout.experts, int(a.top_n), p);
  const Outputs<T> out(a, token);
  double sum = 0;
  for (int k = 0; k < a.top_n; ++k) {
    const bool mine = layout.thread == k % RowLayout::width;
    const int expert = layout.from(k % RowLayout::width, mine ? int(out.expert[k]) : 0);
    const double v = expert < 0 ? 0.0 : soft.score(layout.at(p, expert));
    sum += v;
    if (mine) out.weight[k] = ComputeType<T>(v);
  }
  return sum;
}

// docs/spec.md, step 6: divides the v_k of a token.
template <class T, class RowLayout>
__device__ __forceinline__ void normalise(const Gate& a, const RowLayout& layout, int64_t token, double sum) {
  using Scalar = typename RowLayout::Scalar;
  const Outputs<T> out(a, token);
  for (int64_t k = layout.thread; k < a.top_n; k += RowLayout::width) {
    out.weight[k] = ComputeType<T>(Scalar(out.weight[k]) / Scalar(weight_divisor(sum, a)));
  }
}

template <class T, class RowLayout>
__global__ void __launch_bounds__(kBlockThreads<RowLayout>, kResidentBlocks<RowLayout>) gate_any(GateTask task) {
  using Scalar = typename RowLayout::Scalar;
  const Gate& a = task.gate;
  const RowLayout layout(a.experts);
  wait_for_stream();
  let_next_start();
  char* memory = task.space.rows + blockIdx.x * task.plan.row_bytes;
  typename RowLayout::template Row<Scalar> s(memory, layout.count), z(memory, layout.count);
  AnyRouter<T, RowLayout> router(task, layout, memory);
  SIMT_DYN_SMEM(double, shared);
  for_tiles<ComputeType<T>>(task, layout, shared, 0, [&](TileSums<RowLayout>& sums, int64_t index) {
    for (TokenRows<T, RowLayout> rows(layout, a, task.plan, Tile(task.plan, index, a.tokens)); rows.more();) {
      rows.next(s);
      double sum = router.choose(s, z, rows.token);
      if (a.losses && is_valid(a, rows.token)) router.add_to(sums, s, z, rows.token);
      if constexpr (std::is_same_v<Scalar, double>) {
        if (a.soft) sum = soften<T>(a, layout, s, rows.token);
      }
      normalise<T>(a, layout, rows.token, sum);
    }
    if (a.statistics != nullptr) router.finish_statistics(index);
  });
}

// Adds up what all warps have written to GateSpace::statistics and writes the statistics. Runs in a single block.
template <class Weight>
__global__ void gate_statistics(GateTask task) {
  const Gate& a = task.gate;
  const unsigned warps = blockDim.x / kWarp;
  SIMT_DYN_SMEM(double, shared);
  double* const valids = shared;              // (warps)
  double* const entropies = valids + warps;   // (warps)
  double* const squares = entropies + warps;  // (warps)
  double* const largests = squares + warps;   // (warps)
  wait_for_stream();
  let_next_start();
  TokenStatistics sum{};
  const int64_t entries = task.plan.count * (task.plan.block / kWarp);
  for (int64_t i = threadIdx.x; i < entries; i += blockDim.x) {
    const TokenStatistics& of_warp = task.space.statistics[i];
    sum.valid_tokens += of_warp.valid_tokens;
    sum.entropy += of_warp.entropy;
    sum.squares += of_warp.squares;
    sum.largest = of_warp.largest > sum.largest ? of_warp.largest : sum.largest;
  }
  sum.valid_tokens = warp_sum(sum.valid_tokens);
  sum.entropy = warp_sum(sum.entropy);
  sum.squares = warp_sum(sum.squares);
  TOPN_UNROLL
  for (int by = int(kWarp) / 2; by > 0; by /= 2) {
    const double other = shuffle_xor(sum.largest, by);
    sum.largest = other > sum.largest ? other : sum.largest;
  }
  if (lane_id() == 0) {
    valids[warp_id()] = sum.valid_tokens;
    entropies[warp_id()] = sum.entropy;
    squares[warp_id()] = sum.squares;
    largests[warp_id()] = sum.largest;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  double largest = 0;
  for (unsigned w = 0; w < warps; ++w) largest = largests[w] > largest ? largests[w] : largest;
  const double valid = sum_warps(valids), all_squares = sum_warps(squares);
  Weight* const statistics = static_cast<Weight*>(a.statistics);
  statistics[0] = Weight(sum_warps(entropies) / at_least_one(valid));
  statistics[1] = Weight(all_squares == all_squares ? largest : all_squares);  // NaN
  statistics[2] = Weight(logit_rms(all_squares, valid, a.experts));
}

}  // namespace

GateLaunch any_launch(const Gate& a) {
  return launch_of_any<GateLaunch>(a, [&](auto* element, auto* layout) {
    using T = std::remove_pointer_t<decltype(element)>;
    using RowLayout = std::remove_pointer_t<decltype(layout)>;
    return GateLaunch(a, gate_any<T, RowLayout>, layout, AnyRouter<T, RowLayout>::row_bytes_per_expert, 0);
  });
}

cudaError_t launch_statistics(const GateTask& task, cudaStream_t stream) {
  const unsigned warps = SIMT_BLOCK_THREADS / kWarp;
  const auto kernel = task.gate.dtype == DType::F64 ? gate_statistics<double> : gate_statistics<float>;
  return SIMT_LAUNCH_DEPENDENT(kernel, 1u, warps * kWarp, warps * 4 * sizeof(double), stream, task);
}

}  // namespace topn_gating::cuda
