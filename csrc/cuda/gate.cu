// SPEC steps 3 to 6 and 10 on a GPU: a warp, or a part of one, a token, its row in registers.
//
// A block adds up what its tile of tokens gives to the losses; a second kernel adds up the tiles. Both in a fixed order.
#include "cuda/launch.h"
#include "cuda/token.cuh"
#include "cuda/topn.cuh"

namespace topn_gating::cuda {
namespace {

// Sums of tiles and groups, and rows.
struct GateSpace {
  double* importance;  // (tiles, e)
  double* z_loss;      // (tiles)
  double* balance;     // (blocks of gate_losses)
  double* group_z_loss;  // (g)
  double* group_real;    // (g) real tokens
  int32_t* top_count;    // (tiles, e)
  int32_t* real;         // (tiles)
  unsigned* ticket;
  char* rows;
  int64_t bytes;
};

constexpr int64_t kExpertsPerBlock = kWarp;  // of gate_losses

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

struct GateTask {
  Gate gate;
  Tiles tiles;
  GateSpace space;
};

// What a tile's tokens give to the losses, summed over the block that goes through them.
template <class Lanes>
class TileSums {
 public:
  using R = typename Lanes::R;

  static size_t shared_bytes(unsigned block, int64_t experts) {
    return (block * Lanes::count + block / kWarp) * sizeof(double) + experts * sizeof(int32_t);
  }

  __device__ TileSums(const Lanes& lanes, double* shared)
      : lanes_(lanes), shared_(shared), importance_(shared + warp_id() * kWarp * Lanes::count),
        z_losses_(shared + blockDim.x * Lanes::count),
        top_count_(reinterpret_cast<int32_t*>(z_losses_ + blockDim.x / kWarp)) {}

  __device__ void start(const GateSpace& /*space*/, int64_t /*tile*/) {
    TOPN_UNROLL
    for (int i = 0; i < Lanes::count; ++i) run_[i] = 0, total(i) = 0;
    for (int j = int(threadIdx.x); j < lanes_.experts; j += int(blockDim.x)) top_count_[j] = 0;
    __syncthreads();
  }

  // A token's gates, its first expert, its logsumexp.
  __device__ __forceinline__ void add(const typename Lanes::template Row<R>& p, int expert, const LogSumExp& lse) {
    TOPN_UNROLL
    for (int i = 0; i < Lanes::count; ++i) run_[i] += p[i];
    if (++run_length_ == kRun) fold();
    if (lanes_.thread == 0) {
      atomicAdd(&top_count_[expert], 1);
      z_loss_ += lse.value() * lse.value();
    }
  }

  __device__ void finish(const GateSpace& space, int64_t tile) {
    double sums[Lanes::count];
    TOPN_UNROLL
    for (int i = 0; i < Lanes::count; ++i) sums[i] = total(i) + double(run_[i]);
    TOPN_UNROLL
    for (int by = Lanes::width; by < int(kWarp); by *= 2) {
      TOPN_UNROLL
      for (int i = 0; i < Lanes::count; ++i) sums[i] += shuffle_xor(sums[i], by);
    }
    __syncwarp();  // the warp's totals make room for its sums, in the order of the experts
    if (lane_id() < Lanes::width) {
      TOPN_UNROLL
      for (int i = 0; i < Lanes::count; ++i) importance_[lanes_.index(i)] = sums[i];
    }
    z_loss_ = warp_sum(z_loss_);
    if (lane_id() == 0) z_losses_[warp_id()] = z_loss_;
    __syncthreads();
    const unsigned warps = blockDim.x / kWarp;
    for (int j = int(threadIdx.x); j < lanes_.experts; j += int(blockDim.x)) {
      double sum = 0;
      for (unsigned w = 0; w < warps; ++w) sum += shared_[w * kWarp * Lanes::count + j];
      space.importance[tile * lanes_.experts + j] = sum;
      space.top_count[tile * lanes_.experts + j] = top_count_[j];
    }
    int real = 0;
    if (warp_id() == 0) {
      for (int j = int(lane_id()); j < lanes_.experts; j += int(kWarp)) real += top_count_[j];
      real = warp_add(real);
    }
    if (threadIdx.x == 0) {
      double sum = 0;
      for (unsigned w = 0; w < warps; ++w) sum += z_losses_[w];
      space.z_loss[tile] = sum;
      space.real[tile] = real;
    }
  }

 private:
  // Tokens summed in R before they go to double: a few roundings of float at most, and few conversions.
  static constexpr int kRun = 8;

  __device__ __forceinline__ void fold() {
    TOPN_UNROLL
    for (int i = 0; i < Lanes::count; ++i) total(i) += double(run_[i]), run_[i] = 0;
    run_length_ = 0;
  }
  // Of this thread, in shared memory: it is seldom wanted.
  __device__ __forceinline__ double& total(int i) { return importance_[i * kWarp + lane_id()]; }

  const Lanes& lanes_;
  double* shared_;
  double* importance_;  // the warp's
  double* z_losses_;    // (warps)
  int32_t* top_count_;  // (e)
  R run_[Lanes::count];
  double z_loss_ = 0;
  int run_length_ = 0;
};

// The same where rows are in memory and a warp is a block: the sums are where they are wanted.
template <class Real>
class TileSums<WarpLanes<Real, int(kWarp), 0, 1>> {
 public:
  using Lanes = WarpLanes<Real, int(kWarp), 0, 1>;

  static size_t shared_bytes(unsigned /*block*/, int64_t /*experts*/) { return 0; }

  __device__ TileSums(const Lanes& lanes, double* /*shared*/) : lanes_(lanes) {}

  __device__ void start(const GateSpace& space, int64_t tile) {
    importance_ = space.importance + tile * lanes_.experts;
    top_count_ = space.top_count + tile * lanes_.experts;
    z_loss_ = real_ = 0;
    for (int j = int(lane_id()); j < lanes_.experts; j += int(kWarp)) importance_[j] = 0, top_count_[j] = 0;
    __syncwarp();
  }

  __device__ __forceinline__ void add(const Values<Real, 0>& p, int expert, const LogSumExp& lse) {
    for (int i = 0; i < lanes_.count; ++i) {
      if (lanes_.real(i)) importance_[lanes_.index(i)] += p[i];
    }
    if (lanes_.thread == 0) top_count_[expert] += 1;
    z_loss_ += lse.value() * lse.value();
    real_ += 1;
  }

  __device__ void finish(const GateSpace& space, int64_t tile) {
    if (lane_id() != 0) return;
    space.z_loss[tile] = z_loss_;
    space.real[tile] = real_;
  }

 private:
  const Lanes& lanes_;
  double* importance_ = nullptr;
  int32_t* top_count_ = nullptr;
  double z_loss_ = 0;
  int32_t real_ = 0;
};

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

struct FirstExpert {
  int expert;
  LogSumExp lse;
};

// SPEC steps 4 to 6 of a row in registers: scores become gates; rank k goes to the row's thread k % width, which writes it.
template <class KeyOf, class T, class Lanes>
__device__ __forceinline__ FirstExpert choose_sorted(const Gate& a, const Lanes& lanes,
                                                     typename Lanes::template Row<float>& s, bool live, int64_t token) {
  using Key = typename KeyOf::Key;
  constexpr int ranks = parts(std::min(kRanks, Lanes::width * Lanes::count), Lanes::width);  // of a thread
  char* none = nullptr;
  typename Lanes::template Row<Key> keys(none, Lanes::count);
  TOPN_UNROLL
  for (int i = 0; i < Lanes::count; ++i) {
    keys[i] = lanes.real(i) ? KeyOf::template pack<Lanes>(s[i], lanes.index(i)) : std::numeric_limits<Key>::min();
  }
  sort_descending<0, Lanes::count>(keys);
  const LogSumExp lse = softmax(lanes, s);

  Values<Key, ranks> kept(none, ranks);
  int first = 0;
  take_sorted<KeyOf, Lanes>(keys, int(a.top_n), [&](int k, Key key) {
    if (k == 0) first = KeyOf::expert(key);
    if (lanes.thread == k % Lanes::width) kept.set(k / Lanes::width, key);
  });
  const float max = float(lse.max), scale = 1.0f / float(lse.sum);
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

// The same for any row that a warp shares, by row.h's steps alone. Rank k is written, and later read, by thread k % 32.
template <class T, class Lanes, class Keys>
__device__ __forceinline__ FirstExpert choose(const Gate& a, const Lanes& lanes,
                                              typename Lanes::template Row<typename Lanes::R>& s, Keys& keys, int64_t token,
                                              double& sum) {
  using R = typename Lanes::R;
  TOPN_UNROLL_BY(Lanes::unroll)
  for (int i = 0; i < lanes.count; ++i) {
    keys[i] = lanes.real(i) ? score_key<Lanes>(s[i]) : std::numeric_limits<typename Lanes::Key>::min();
  }
  const LogSumExp lse = softmax(lanes, s);
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
  const SoftTopN soft(lanes, lanes.experts, int(a.top_n), p);
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
    FirstExpert chosen;
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
      if (rows.live && (a.padding_mask == nullptr || a.padding_mask[token])) sums.add(s, chosen.expert, chosen.lse);
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

// One of a value per warp, added up in order by whoever asks.
template <class T>
__device__ __forceinline__ T sum_warps(const T* values) {
  T sum{};
  for (unsigned w = 0; w < blockDim.x / kWarp; ++w) sum += values[w];
  return sum;
}

// Adds up the tiles: a block takes 32 experts of a group, a warp of it every so many tiles. The block that is done last adds
// up the blocks.
template <class Real>
__global__ void gate_losses(GateTask task) {
  const Gate& a = task.gate;
  const GateSpace& space = task.space;
  const unsigned warps = blockDim.x / kWarp;
  SIMT_DYN_SMEM(double, shared);
  double* const importances = shared;                      // (warps, 32)
  double* const z_losses = importances + warps * kWarp;    // (warps)
  double* const reals = z_losses + warps;                  // (warps)
  int32_t* const counts = reinterpret_cast<int32_t*>(reals + warps);  // (warps, 32)
  unsigned* const number = reinterpret_cast<unsigned*>(counts + warps * kWarp);

  const int64_t chunks = parts(a.experts, kExpertsPerBlock), blocks = a.groups * chunks;
  const int64_t group = blockIdx.x / chunks, expert = blockIdx.x % chunks * kExpertsPerBlock + lane_id();
  const int64_t first = group * task.tiles.of_group, last = group < a.groups ? first + task.tiles.of_group : first;
  double importance = 0, z_loss = 0;
  int32_t count = 0, real = 0;
  for (int64_t tile = first + warp_id(); tile < last && expert < a.experts; tile += warps) {
    importance += space.importance[tile * a.experts + expert];
    count += space.top_count[tile * a.experts + expert];
  }
  for (int64_t tile = first + threadIdx.x; tile < last; tile += blockDim.x) {
    z_loss += space.z_loss[tile];
    real += space.real[tile];
  }
  importances[threadIdx.x] = importance;
  counts[threadIdx.x] = count;
  z_loss = warp_sum(z_loss);
  real = warp_add(real);
  if (lane_id() == 0) z_losses[warp_id()] = z_loss, reals[warp_id()] = real;
  __syncthreads();

  if (warp_id() == 0) {
    const double of_group = sum_warps(reals), share = 1.0 / (of_group > 1 ? of_group : 1.0);
    for (unsigned w = 1; w < warps; ++w) importance += importances[w * kWarp + lane_id()];
    for (unsigned w = 1; w < warps; ++w) count += counts[w * kWarp + lane_id()];
    if (group < a.groups && expert < a.experts) {
      static_cast<Real*>(a.importance)[group * a.experts + expert] = Real(importance * share);
      a.top_count[group * a.experts + expert] = count;
    }
    const double balance = warp_sum(importance * share * (count * share));
    if (lane_id() == 0) {
      if (group < a.groups) space.balance[blockIdx.x] = balance;
      if (group < a.groups && blockIdx.x % chunks == 0) {
        space.group_z_loss[group] = sum_warps(z_losses);
        space.group_real[group] = of_group;
      }
      *number = take_ticket(space.ticket);
    }
  }
  __syncthreads();
  if (*number + 1 != gridDim.x) return;

  double balance = 0, all_z_loss = 0, all_real = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += blockDim.x) balance += space.balance[i];
  for (int64_t g = threadIdx.x; g < a.groups; g += blockDim.x) {
    all_z_loss += space.group_z_loss[g];
    all_real += space.group_real[g];
  }
  balance = warp_sum(balance);
  all_z_loss = warp_sum(all_z_loss);
  all_real = warp_sum(all_real);
  if (lane_id() == 0) importances[warp_id()] = balance, z_losses[warp_id()] = all_z_loss, reals[warp_id()] = all_real;
  __syncthreads();
  if (threadIdx.x != 0) return;
  // e² · mean over groups and experts
  const double groups = a.groups > 1 ? double(a.groups) : 1.0, tokens = sum_warps(reals);
  *static_cast<Real*>(a.balance_loss) = Real(sum_warps(importances) * double(a.experts) / groups);
  *static_cast<Real*>(a.router_z_loss) = Real(sum_warps(z_losses) / (tokens > 1 ? tokens : 1.0));
}

template <class Real>
cudaError_t launch_losses(const GateTask& task, cudaStream_t stream) {
  constexpr int64_t most = 4 * SIMT_BLOCK_THREADS / kWarp;
  const Gate& a = task.gate;
  const int64_t blocks = std::max<int64_t>(1, a.groups * parts(a.experts, kExpertsPerBlock));
  const unsigned warps = unsigned(std::clamp(std::max(task.tiles.of_group, parts<int64_t>(blocks, kWarp)), int64_t(1), most));
  const size_t shared = warps * ((kWarp + 2) * sizeof(double) + kWarp * sizeof(int32_t)) + sizeof(unsigned);
  return SIMT_LAUNCH(gate_losses<Real>, unsigned(blocks), warps * kWarp, shared, stream, task);
}

template <class T, class Lanes>
GateTask task_of(const Gate& a) {
  using R = typename Lanes::R;
  GateTask task{a, plan_tiles<Lanes>(a, 2 * sizeof(R) + sizeof(typename Lanes::Key), is_wide(a.experts * sizeof(T), a.logits)), {}};
  task.space = carve(a, task.tiles);
  return task;
}

template <class T, class Lanes>
cudaError_t launch_gate(const Gate& a, cudaStream_t stream) {
  const GateTask task = task_of<T, Lanes>(a);
  const size_t shared = a.losses ? TileSums<Lanes>::shared_bytes(task.tiles.block, a.experts) : 0;
  const auto kernel = gate_tokens<T, Lanes>;
  const cudaError_t error = SIMT_LAUNCH(kernel, task.tiles.grid, task.tiles.block, shared, stream, task);
  return error != cudaSuccess || !a.losses ? error : launch_losses<RealOf<T>>(task, stream);
}

}  // namespace

int64_t workspace_bytes(const Gate& a) {
  int64_t bytes = 0;
  with_type(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    with_lanes<T>(a.experts, a.top_n, a.soft, [&](auto* lanes) {
      bytes = task_of<T, std::remove_pointer_t<decltype(lanes)>>(a).space.bytes;
    });
    return cudaSuccess;
  });
  return bytes;
}

cudaError_t gate(const Gate& a, cudaStream_t stream) {
  return with_type(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    return with_lanes<T>(a.experts, a.top_n, a.soft, [&](auto* lanes) {
      return launch_gate<T, std::remove_pointer_t<decltype(lanes)>>(a, stream);
    });
  });
}

}  // namespace topn_gating::cuda
