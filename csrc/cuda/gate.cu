// docs/spec.md, steps 3 to 6, on a GPU: a warp, or a part of one, processes a token, whose row is in registers. The tokens'
// sums for the losses are accumulated on the way, tile by tile.
#include "cuda/gate_sums.cuh"
#include "cuda/kernels.h"
#include "cuda/topn.cuh"

namespace topn_gating::cuda {
namespace {

// docs/spec.md, step 6: returns w_k from v_k and the sum of all v.
template <class Scalar>
__device__ __forceinline__ Scalar normalised(Scalar v, double sum, const GateOptions& options) {
  return v / Scalar(weight_divisor(sum, options));
}

// Where a token's results belong in the outputs.
template <class T>
struct Outputs {
  int32_t* expert;
  ComputeType<T>* weight;

  __device__ Outputs(const Gate& a, int64_t token)
      : expert(a.expert + token * a.top_n), weight(static_cast<ComputeType<T>*>(a.weight) + token * a.top_n) {}
};

// What a token contributes to the losses, apart from its gates.
template <class Scalar>
struct FirstChoice {
  int expert;
  LogSumExp<Scalar> lse;
};

// docs/spec.md, steps 4 to 6, for a row in registers: turns scores into gates, and writes the token's experts and weights where
// in_tile. Thread k % width of the row has rank k.
template <class KeyOf, class T, class RowLayout>
__device__ __forceinline__ FirstChoice<float> choose_sorted(const Gate& a, const RowLayout& layout,
                                                            typename RowLayout::template Row<float>& s, bool in_tile,
                                                            int64_t token) {
  using Key = typename KeyOf::Key;
  constexpr int ranks = ceil_div(std::min(kRanks, RowLayout::width * RowLayout::count), RowLayout::width);  // of a thread
  char* no_memory = nullptr;
  typename RowLayout::template Row<Key> keys(no_memory, RowLayout::count);
  TOPN_UNROLL
  for (int i = 0; i < RowLayout::count; ++i) {
    keys[i] = layout.valid(i) ? KeyOf::template pack<RowLayout>(s[i], layout.index(i)) : std::numeric_limits<Key>::min();
  }
  sort_descending<0, RowLayout::count>(keys);
  const auto lse = softmax(layout, s);

  Values<Key, ranks> chosen(no_memory, ranks);
  int first = 0;
  pop_sorted<KeyOf, RowLayout>(keys, int(a.top_n), [&](int k, Key key) {
    if (k == 0) first = KeyOf::expert(key);
    if (layout.thread == k % RowLayout::width) chosen.set(k / RowLayout::width, key);
  });
  const float max = lse.max, scale = 1.0f / lse.sum;
  float v[ranks];
  double sum = 0;
  TOPN_UNROLL
  for (int i = 0; i < ranks; ++i) {
    const bool valid = i * RowLayout::width + layout.thread < a.top_n;
    v[i] = valid ? exp_below<RowLayout>(KeyOf::score(chosen[i]), max) * scale : 0.0f;
    sum += double(v[i]);
  }
  sum = RowLayout::reduce(sum, [](double x, double y) { return x + y; });
  const Outputs<T> out(a, token);
  TOPN_UNROLL
  for (int i = 0; i < ranks; ++i) {
    const int k = i * RowLayout::width + layout.thread;
    if (in_tile && k < a.top_n) {
      out.expert[k] = KeyOf::expert(chosen[i]);
      out.weight[k] = normalised(v[i], sum, a);
    }
  }
  return {first, lse};
}

// The same for any row that a whole warp shares, without step 6: writes v_k and returns their sum in `sum`. Thread k % 32
// writes, and later reads, rank k.
template <class T, class RowLayout, class Keys>
__device__ __forceinline__ FirstChoice<typename RowLayout::Scalar> choose(
    const Gate& a, const RowLayout& layout, typename RowLayout::template Row<typename RowLayout::Scalar>& s, Keys& keys,
    int64_t token, double& sum) {
  using Scalar = typename RowLayout::Scalar;
  TOPN_UNROLL_BY(RowLayout::unroll)
  for (int i = 0; i < layout.count; ++i) {
    keys[i] = layout.valid(i) ? score_key<RowLayout>(s[i]) : std::numeric_limits<typename RowLayout::Key>::min();
  }
  const auto lse = softmax(layout, s);
  const Outputs<T> out(a, token);
  int first = 0;
  stable_topn(layout, keys, int(a.top_n), [&](int k, int expert) {
    const Scalar v = layout.at(s, expert);
    sum += double(v);
    if (k == 0) first = expert;
    if (layout.thread == k % RowLayout::width) out.expert[k] = expert, out.weight[k] = ComputeType<T>(v);
  });
  return {first, lse};
}

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
  template <class Sums>
  __device__ __forceinline__ void add_to(Sums& sums, const Row& p, Row& z, int64_t token) {
    LogSumExp<Scalar> lse = lse_;
    if (a_.score != Score::Softmax || a_.noise != nullptr) {
      layout_.load(logits_of<T>(a_, token), task_.plan.aligned16, z);
      lse = softmax(layout_, z);
    }
    const Scalar share = a_.score == Score::Softmax ? Scalar(1) : Scalar(1) / gate_divisor<RowLayout>(sum_, a_.eps);
    sums.add(p, share, value_of(lse));
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

// Divides the v_k of a token.
template <class T, class RowLayout>
__device__ __forceinline__ void normalise(const Gate& a, const RowLayout& layout, int64_t token, double sum) {
  const Outputs<T> out(a, token);
  for (int64_t k = layout.thread; k < a.top_n; k += RowLayout::width) {
    out.weight[k] = ComputeType<T>(normalised(typename RowLayout::Scalar(out.weight[k]), sum, a));
  }
}

template <class T, class RowLayout>
__device__ __forceinline__ void gate_tile_of_any_router(const GateTask& task, int64_t index) {
  using Scalar = typename RowLayout::Scalar;
  const Gate& a = task.gate;
  const RowLayout layout(a.experts);
  const Tile tile(task.plan, index, a.tokens);
  char* memory = task.space.rows + blockIdx.x * task.plan.row_bytes;
  typename RowLayout::template Row<Scalar> s(memory, layout.count), z(memory, layout.count);
  AnyRouter<T, RowLayout> router(task, layout, memory);
  SIMT_DYN_SMEM(double, shared);
  TileSums<RowLayout, true> sums(layout, shared);
  if (a.losses) sums.start(task.space, index);
  for (TokenRows<T, RowLayout> rows(layout, a, task.plan, tile); rows.more();) {
    rows.next(s);
    double sum = router.choose(s, z, rows.token);
    if (a.losses && is_valid(a, rows.token)) router.add_to(sums, s, z, rows.token);
    if constexpr (std::is_same_v<Scalar, double>) {
      if (a.soft) sum = soften<T>(a, layout, s, rows.token);
    }
    normalise<T>(a, layout, rows.token, sum);
  }
  if (a.losses) sums.finish(task.space, index);
  if (a.statistics != nullptr) router.finish_statistics(index);
}

template <class T, class RowLayout>
__device__ __forceinline__ void gate_tile(const GateTask& task, int64_t index) {
  using Scalar = typename RowLayout::Scalar;
  const Gate& a = task.gate;
  const RowLayout layout(a.experts);
  const Tile tile(task.plan, index, a.tokens);
  char* memory = task.space.rows + blockIdx.x * task.plan.row_bytes;
  typename RowLayout::template Row<Scalar> s(memory, layout.count), z(memory, layout.count);
  typename RowLayout::template Row<typename RowLayout::Key> keys(memory, layout.count);
  SIMT_DYN_SMEM(double, shared);
  TileSums<RowLayout, false> sums(layout, shared);
  if (a.losses) sums.start(task.space, index);

  for (TokenRows<T, RowLayout> rows(layout, a, task.plan, tile); rows.more();) {
    rows.next(s);
    const int64_t token = rows.token;
    FirstChoice<Scalar> first;
    double sum = 0;
    if constexpr (!kSorted<RowLayout>) {
      first = choose<T>(a, layout, s, keys, token, sum);
    } else if constexpr (sizeof(T) == 2) {
      first = a.noise == nullptr ? choose_sorted<Key32<T>, T>(a, layout, s, rows.in_tile, token)
                                 : choose_sorted<Key64, T>(a, layout, s, rows.in_tile, token);
    } else {
      first = choose_sorted<Key64, T>(a, layout, s, rows.in_tile, token);
    }
    if (a.losses) {
      if (a.noise != nullptr) {
        layout.load(logits_of<T>(a, token), task.plan.aligned16, z);
        first.lse = softmax(layout, z);
      }
      if (rows.in_tile && is_valid(a, token)) {
        sums.add(s, Scalar(1), value_of(first.lse));
        if (layout.thread == 0) sums.count(first.expert);
      }
    }
    if constexpr (!kSorted<RowLayout>) {
      if constexpr (std::is_same_v<Scalar, double>) {
        if (a.soft) sum = soften<T>(a, layout, s, token);
      }
      normalise<T>(a, layout, token, sum);
    }
  }
  if (a.losses) sums.finish(task.space, index);
}

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

template <class T, class RowLayout, bool General>
__global__ void __launch_bounds__(kBlockThreads<RowLayout>, kResidentBlocks<RowLayout>) gate_tokens(GateTask task) {
  if (!task.gate.losses) {
    write_no_losses<ComputeType<T>>(task.gate);
  } else if (blockIdx.x == 0 && threadIdx.x == 0) {
    *task.space.ticket = 0;
  }
  // Where rows are in registers, there is a block for each tile.
  for (int64_t tile = blockIdx.x; tile < task.plan.count; tile += gridDim.x) {
    if constexpr (General) {
      gate_tile_of_any_router<T, RowLayout>(task, tile);
    } else {
      gate_tile<T, RowLayout>(task, tile);
    }
  }
}

// Divides the workspace.
GateSpace divide_workspace(const Gate& a, const TilePlan& plan) {
  char* const begin = static_cast<char*>(a.workspace);
  int64_t used = 0;
  const auto reserve = [&](auto*& to, int64_t count) {
    to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(begin + used);
    used += (count * int64_t(sizeof *to) + 15) / 16 * 16;
  };
  GateSpace space{};
  reserve(space.rows, plan.memory_bytes());
  if (a.losses) {
    reserve(space.importance, plan.count * a.experts);
    reserve(space.z_loss, plan.count);
    reserve(space.balance, a.groups * ceil_div(a.experts, kExpertsPerBlock));
    reserve(space.group_z_loss, a.groups);
    reserve(space.group_valid, a.groups);
    reserve(space.counts, plan.count * a.experts);
    reserve(space.counted, plan.count);
    reserve(space.valid_tokens, plan.count);
    reserve(space.ticket, 1);
  }
  if (a.statistics != nullptr) reserve(space.statistics, plan.count * (plan.block / kWarp));
  space.bytes = used;
  return space;
}

// Returns whether experts are not the best of a softmax, or more is asked for than the losses of these.
bool is_general(const Gate& a) {
  return a.score != Score::Softmax || selects_by_gates(a) || a.given != nullptr || a.statistics != nullptr || a.all_ranks;
}

template <class T, class RowLayout, bool General>
GateTask task_of(const Gate& a, T* /*element*/, RowLayout* /*layout*/, std::bool_constant<General> /*general*/) {
  const int64_t plain = 2 * sizeof(typename RowLayout::Scalar) + sizeof(typename RowLayout::Key);
  const int64_t bytes_per_expert = General ? AnyRouter<T, RowLayout>::row_bytes_per_expert : plain;
  GateTask task{a, plan_tiles<RowLayout>(a, bytes_per_expert, is_aligned16(a.experts * sizeof(T), a.logits)), {}};
  task.space = divide_workspace(a, task.plan);
  return task;
}

template <class T, class RowLayout, bool General>
cudaError_t launch_gate(const Gate& a, cudaStream_t stream, T* element, RowLayout* layout, std::bool_constant<General> general) {
  const GateTask task = task_of(a, element, layout, general);
  const size_t shared = a.losses ? TileSums<RowLayout, General>::shared_bytes(task.plan.block, a.experts) : 0;
  const auto kernel = gate_tokens<T, RowLayout, General>;
  cudaError_t error = SIMT_LAUNCH(kernel, task.plan.grid, task.plan.block, shared, stream, task);
  if (error == cudaSuccess && a.losses) error = launch_losses(task, stream);
  if (error == cudaSuccess && a.statistics != nullptr) error = launch_statistics(task, stream);
  return error;
}

}  // namespace

int64_t workspace_bytes(const Gate& a) {
  int64_t bytes = 0;
  with_row(a, is_general(a), [&](auto* element, auto* layout, auto general) {
    bytes = task_of(a, element, layout, general).space.bytes;
    return cudaSuccess;
  });
  return bytes;
}

cudaError_t run(const Gate& a, cudaStream_t stream) {
  return with_row(a, is_general(a), [&](auto* element, auto* layout, auto general) {
    return launch_gate(a, stream, element, layout, general);
  });
}

}  // namespace topn_gating::cuda
