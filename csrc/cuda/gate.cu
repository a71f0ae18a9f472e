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

// Replaces the v_k that `choose` has written by scores of the soft top-n, and returns their sum. Overwrites the gates p.
template <class T, class RowLayout>
__device__ __forceinline__ double soften(const Gate& a, const RowLayout& layout,
                                         typename RowLayout::template Row<double>& p, int64_t token) {
  const SoftTopN<double> soft(layout, layout.experts, int(a.top_n), p);
  const Outputs<T> out(a, token);
  double sum = 0;
  for (int k = 0; k < a.top_n; ++k) {
    const bool mine = layout.thread == k % RowLayout::width;
    const double v = soft.score(layout.at(p, layout.from(k % RowLayout::width, mine ? out.expert[k] : 0)));
    sum += v;
    if (mine) out.weight[k] = ComputeType<T>(v);
  }
  return sum;
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
  TileSums<RowLayout> sums(layout, shared);
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
      if (rows.in_tile && is_valid(a, token)) sums.add(s, first.expert, value_of(first.lse));
    }
    if constexpr (!kSorted<RowLayout>) {
      if constexpr (std::is_same_v<Scalar, double>) {
        if (a.soft) sum = soften<T>(a, layout, s, token);
      }
      const Outputs<T> out(a, token);
      for (int64_t k = layout.thread; k < a.top_n; k += RowLayout::width) {
        out.weight[k] = ComputeType<T>(normalised(Scalar(out.weight[k]), sum, a));
      }
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

template <class T, class RowLayout>
__global__ void __launch_bounds__(kBlockThreads<RowLayout>, kResidentBlocks<RowLayout>) gate_tokens(GateTask task) {
  if (!task.gate.losses) {
    write_no_losses<ComputeType<T>>(task.gate);
  } else if (blockIdx.x == 0 && threadIdx.x == 0) {
    *task.space.ticket = 0;
  }
  // Where rows are in registers, there is a block for each tile.
  for (int64_t tile = blockIdx.x; tile < task.plan.count; tile += gridDim.x) gate_tile<T, RowLayout>(task, tile);
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
    reserve(space.valid_tokens, plan.count);
    reserve(space.ticket, 1);
  }
  space.bytes = used;
  return space;
}

template <class T, class RowLayout>
GateTask task_of(const Gate& a, T* /*element*/, RowLayout* /*layout*/) {
  const int64_t bytes_per_expert = 2 * sizeof(typename RowLayout::Scalar) + sizeof(typename RowLayout::Key);
  GateTask task{a, plan_tiles<RowLayout>(a, bytes_per_expert, is_aligned16(a.experts * sizeof(T), a.logits)), {}};
  task.space = divide_workspace(a, task.plan);
  return task;
}

template <class T, class RowLayout>
cudaError_t launch_gate(const Gate& a, cudaStream_t stream, T* element, RowLayout* layout) {
  const GateTask task = task_of(a, element, layout);
  const size_t shared = a.losses ? TileSums<RowLayout>::shared_bytes(task.plan.block, a.experts) : 0;
  const auto kernel = gate_tokens<T, RowLayout>;
  const cudaError_t error = SIMT_LAUNCH(kernel, task.plan.grid, task.plan.block, shared, stream, task);
  return error != cudaSuccess || !a.losses ? error : launch_losses(task, stream);
}

}  // namespace

int64_t workspace_bytes(const Gate& a) {
  int64_t bytes = 0;
  with_row(a, [&](auto* element, auto* layout) {
    bytes = task_of(a, element, layout).space.bytes;
    return cudaSuccess;
  });
  return bytes;
}

cudaError_t run(const Gate& a, cudaStream_t stream) {
  return with_row(a, [&](auto* element, auto* layout) { return launch_gate(a, stream, element, layout); });
}

}  // namespace topn_gating::cuda
