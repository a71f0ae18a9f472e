// SPEC steps 3 to 6 on a GPU: a warp, or a part of one, a token, its row in registers. What the tokens give to the losses is
// added up on the way, tile by tile.
#include "cuda/gate_sums.cuh"
#include "cuda/kernels.h"
#include "cuda/topn.cuh"

namespace topn_gating::cuda {
namespace {

// SPEC step 6: of v_k, of which `sum` is the sum, to w_k.
template <class R>
__device__ __forceinline__ R normalised(R v, double sum, int64_t top_n, double eps) {
  return top_n == 1 ? v : v / R(sum < eps ? eps : sum);
}

// A token's place in the outputs.
template <class T>
struct Chosen {
  int32_t* expert;
  RealOf<T>* weight;

  __device__ Chosen(const Gate& a, int64_t token)
      : expert(a.expert + token * a.top_n), weight(static_cast<RealOf<T>*>(a.weight) + token * a.top_n) {}
};

template <class R>
struct FirstExpert {
  int expert;
  LogSumExp<R> lse;
};

// SPEC steps 4 to 6 of a row in registers: scores become gates; rank k goes to the row's thread k % width, which writes it.
template <class KeyOf, class T, class Lanes>
__device__ __forceinline__ FirstExpert<float> choose_sorted(const Gate& a, const Lanes& lanes,
                                                            typename Lanes::template Row<float>& s, bool live,
                                                            int64_t token) {
  using Key = typename KeyOf::Key;
  constexpr int ranks = parts(std::min(kRanks, Lanes::width * Lanes::count), Lanes::width);  // of a thread
  char* none = nullptr;
  typename Lanes::template Row<Key> keys(none, Lanes::count);
  TOPN_UNROLL
  for (int i = 0; i < Lanes::count; ++i) {
    keys[i] = lanes.real(i) ? KeyOf::template pack<Lanes>(s[i], lanes.index(i)) : std::numeric_limits<Key>::min();
  }
  sort_descending<0, Lanes::count>(keys);
  const auto lse = softmax(lanes, s);

  Values<Key, ranks> kept(none, ranks);
  int first = 0;
  take_sorted<KeyOf, Lanes>(keys, int(a.top_n), [&](int k, Key key) {
    if (k == 0) first = KeyOf::expert(key);
    if (lanes.thread == k % Lanes::width) kept.set(k / Lanes::width, key);
  });
  const float max = lse.max, scale = 1.0f / lse.sum;
  float v[ranks];
  double sum = 0;
  TOPN_UNROLL
  for (int i = 0; i < ranks; ++i) {
    const bool real = i * Lanes::width + lanes.thread < a.top_n;
    v[i] = real ? exp_below(KeyOf::score(kept[i]), max) * scale : 0.0f;
    sum += double(v[i]);
  }
  sum = Lanes::reduce(sum, [](double x, double y) { return x + y; });
  const Chosen<T> to(a, token);
  TOPN_UNROLL
  for (int i = 0; i < ranks; ++i) {
    const int k = i * Lanes::width + lanes.thread;
    if (live && k < a.top_n) {
      to.expert[k] = KeyOf::expert(kept[i]);
      to.weight[k] = normalised(v[i], sum, a.top_n, a.eps);
    }
  }
  return {first, lse};
}

// The same for any row that a warp shares. Rank k is written, and later read, by thread k % 32.
template <class T, class Lanes, class Keys>
__device__ __forceinline__ FirstExpert<typename Lanes::R> choose(const Gate& a, const Lanes& lanes,
                                                                 typename Lanes::template Row<typename Lanes::R>& s,
                                                                 Keys& keys, int64_t token, double& sum) {
  using R = typename Lanes::R;
  TOPN_UNROLL_BY(Lanes::unroll)
  for (int i = 0; i < lanes.count; ++i) {
    keys[i] = lanes.real(i) ? score_key<Lanes>(s[i]) : std::numeric_limits<typename Lanes::Key>::min();
  }
  const auto lse = softmax(lanes, s);
  const Chosen<T> to(a, token);
  int first = 0;
  stable_topn(lanes, keys, int(a.top_n), [&](int k, int expert) {
    const R v = lanes.at(s, expert);
    sum += double(v);
    if (k == 0) first = expert;
    if (lanes.thread == k % Lanes::width) to.expert[k] = expert, to.weight[k] = RealOf<T>(v);
  });
  return {first, lse};
}

// The soft top-n's scores in place of the gates that `choose` has written; uses up the gates p.
template <class T, class Lanes>
__device__ __forceinline__ double soften(const Gate& a, const Lanes& lanes, typename Lanes::template Row<double>& p,
                                         int64_t token) {
  const SoftTopN<double> soft(lanes, lanes.experts, int(a.top_n), p);
  const Chosen<T> to(a, token);
  double sum = 0;
  for (int k = 0; k < a.top_n; ++k) {
    const bool mine = lanes.thread == k % Lanes::width;
    const double v = soft.score(lanes.at(p, lanes.from(k % Lanes::width, mine ? to.expert[k] : 0)));
    sum += v;
    if (mine) to.weight[k] = RealOf<T>(v);
  }
  return sum;
}

template <class T, class Lanes>
__device__ __forceinline__ void gate_tile(const GateTask& task, int64_t index) {
  using R = typename Lanes::R;
  const Gate& a = task.gate;
  const Lanes lanes(a.experts);
  const Tile tile(task.tiles, index, a.tokens);
  char* memory = task.space.rows + blockIdx.x * task.tiles.row_bytes;
  typename Lanes::template Row<R> s(memory, lanes.count), z(memory, lanes.count);
  typename Lanes::template Row<typename Lanes::Key> keys(memory, lanes.count);
  SIMT_DYN_SMEM(double, shared);
  TileSums<Lanes> sums(lanes, shared);
  if (a.losses) sums.start(task.space, index);

  for (TokenRows<T, Lanes, Gate> rows(lanes, a, task.tiles, tile); rows.more();) {
    rows.take(s);
    const int64_t token = rows.token;
    FirstExpert<R> chosen;
    double sum = 0;
    if constexpr (!kSorted<Lanes>) {
      chosen = choose<T>(a, lanes, s, keys, token, sum);
    } else if constexpr (sizeof(T) == 2) {
      chosen = a.noise == nullptr ? choose_sorted<NarrowKey<T>, T>(a, lanes, s, rows.live, token)
                                  : choose_sorted<WideKey, T>(a, lanes, s, rows.live, token);
    } else {
      chosen = choose_sorted<WideKey, T>(a, lanes, s, rows.live, token);
    }
    if (a.losses) {
      if (a.noise != nullptr) {
        lanes.load(logits_of<T>(a, token), task.tiles.wide, z);
        chosen.lse = softmax(lanes, z);
      }
      const bool real = a.token_mask == nullptr || a.token_mask[token];
      if (rows.live && real) sums.add(s, chosen.expert, value_of(chosen.lse));
    }
    if constexpr (!kSorted<Lanes>) {
      if constexpr (std::is_same_v<R, double>) {
        if (a.soft) sum = soften<T>(a, lanes, s, token);
      }
      const Chosen<T> to(a, token);
      for (int64_t k = lanes.thread; k < a.top_n; k += Lanes::width) {
        to.weight[k] = RealOf<T>(normalised(R(to.weight[k]), sum, a.top_n, a.eps));
      }
    }
  }
  if (a.losses) sums.finish(task.space, index);
}

// What `losses == false` promises.
template <class Real>
__device__ void write_no_losses(const Gate& a) {
  const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = first; i < a.groups * a.experts; i += step) {
    static_cast<Real*>(a.importance)[i] = 0;
    a.top_count[i] = 0;
  }
  if (first == 0) *static_cast<Real*>(a.balance_loss) = *static_cast<Real*>(a.router_z_loss) = 0;
}

template <class T, class Lanes>
__global__ void __launch_bounds__(kBlockThreads<Lanes>, kResidentBlocks<Lanes>) gate_tokens(GateTask task) {
  if (!task.gate.losses) {
    write_no_losses<RealOf<T>>(task.gate);
  } else if (blockIdx.x == 0 && threadIdx.x == 0) {
    *task.space.ticket = 0;
  }
  // Where rows are in registers there is a block for each tile.
  for (int64_t tile = blockIdx.x; tile < task.tiles.count; tile += gridDim.x) gate_tile<T, Lanes>(task, tile);
}

GateSpace carve(const Gate& a, const Tiles& tiles) {
  char* const begin = static_cast<char*>(a.workspace);
  int64_t at = 0;
  const auto take = [&](auto*& to, int64_t count) {
    to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(begin + at);
    at += (count * int64_t(sizeof *to) + 15) / 16 * 16;
  };
  GateSpace space{};
  take(space.rows, tiles.memory_bytes());
  if (a.losses) {
    take(space.importance, tiles.count * a.experts);
    take(space.z_loss, tiles.count);
    take(space.balance, a.groups * parts(a.experts, kExpertsPerBlock));
    take(space.group_z_loss, a.groups);
    take(space.group_real, a.groups);
    take(space.top_count, tiles.count * a.experts);
    take(space.real, tiles.count);
    take(space.ticket, 1);
  }
  space.bytes = at;
  return space;
}

template <class T, class Lanes>
GateTask task_of(const Gate& a, T* /*element*/, Lanes* /*lanes*/) {
  using R = typename Lanes::R;
  const int64_t row_bytes = 2 * sizeof(R) + sizeof(typename Lanes::Key);  // for an expert
  GateTask task{a, plan_tiles<Lanes>(a, row_bytes, is_wide(a.experts * sizeof(T), a.logits)), {}};
  task.space = carve(a, task.tiles);
  return task;
}

template <class T, class Lanes>
cudaError_t launch_gate(const Gate& a, cudaStream_t stream, T* element, Lanes* lanes) {
  const GateTask task = task_of(a, element, lanes);
  const size_t shared = a.losses ? TileSums<Lanes>::shared_bytes(task.tiles.block, a.experts) : 0;
  const auto kernel = gate_tokens<T, Lanes>;
  const cudaError_t error = SIMT_LAUNCH(kernel, task.tiles.grid, task.tiles.block, shared, stream, task);
  return error != cudaSuccess || !a.losses ? error : launch_losses(task, stream);
}

}  // namespace

int64_t workspace_bytes(const Gate& a) {
  int64_t bytes = 0;
  with_row(a, [&](auto* element, auto* lanes) {
    bytes = task_of(a, element, lanes).space.bytes;
    return cudaSuccess;
  });
  return bytes;
}

cudaError_t run(const Gate& a, cudaStream_t stream) {
  return with_row(a, [&](auto* element, auto* lanes) { return launch_gate(a, stream, element, lanes); });
}

}  // namespace topn_gating::cuda
