// Sums of rows on a GPU, a warp for each token: `combine`, and the gradient of `dispatch`.
#include "cuda/rows.cuh"

namespace topn_gating::cuda {
namespace {

// Up to 32 pairs, one in each lane: those of a few tokens, or some of one token.
template <class R>
struct HeldPairs {
  int64_t row, pair;
  R weight, dot = 0;

  // Reads the pairs from `first` on, before `end`.
  __device__ __forceinline__ void find(const SumRows& a, int64_t first, int64_t end) {
    pair = first + lane_id() < end ? first + lane_id() : -1;
    row = pair < 0 ? -1 : held_row(a.assignment, pair);
    weight = row >= 0 && a.weight != nullptr ? static_cast<const R*>(a.weight)[pair] : R(1);
  }
};

// The sum of one part of the rows whose slots some lanes hold.
template <class T, int Count>
struct PartSum {
  using R = ComputeType<T>;
  R v[kVectorsAtOnce][Count] = {};

  template <bool Dots>
  __device__ __forceinline__ void add(const SumRows& a, HeldPairs<R>& held, unsigned lanes, const Part<T, Count>& x,
                                      int64_t at) {
    for (unsigned left = ballot(held.row >= 0) & lanes; left != 0; left &= left - 1) {
      const int lane = __ffs(left) - 1;
      const int64_t row = shuffle(held.row, lane);
      const R weight = shuffle(held.weight, lane);
      Part<T, Count> part;
      part.load(static_cast<const T*>(a.rows) + row * a.dim, at, a.dim);
      for_elements<Count>([&](int u, int j) { v[u][j] += weight * to_compute(part.packs[u].v[j]); });
      if constexpr (Dots) {
        const R product = warp_sum(dot(x, part));
        if (int(lane_id()) == lane) held.dot += product;
      }
    }
  }
  __device__ __forceinline__ void store(T* row, int64_t at, int64_t dim) const {
    Part<T, Count> part;
    for_elements<Count>([&](int u, int j) { part.packs[u].v[j] = from_compute<T>(v[u][j]); });
    part.store(row, at, dim);
  }
};

// For at most 32 ranks: the lanes hold all pairs of a few tokens.
template <class T, int Count, bool Dots>
__global__ void __launch_bounds__(SIMT_BLOCK_THREADS, 2) sum_rows(SumRows a) {
  using R = ComputeType<T>;
  const int top_n = int(a.assignment.top_n);
  const unsigned of_first = top_n < int(kWarp) ? (1u << top_n) - 1u : kAllLanes;
  for_rows(a.plan, [&](int64_t first, int64_t last) {
    HeldPairs<R> held;
    held.find(a, first * top_n, last * top_n);
    for (int64_t token = first; token < last; ++token) {
      const unsigned lanes = of_first << (int(token - first) * top_n);
      for_parts<Count>(a.dim, [&](int64_t at) {
        PartSum<T, Count> sum;
        Part<T, Count> x{};
        if constexpr (Dots) x.load(static_cast<const T*>(a.x) + token * a.dim, at, a.dim);
        sum.template add<Dots>(a, held, lanes, x, at);
        sum.store(static_cast<T*>(a.out) + token * a.dim, at, a.dim);
      });
    }
    if (Dots && held.pair >= 0) static_cast<R*>(a.dots)[held.pair] = held.dot;
  });
}

// For any number of ranks: the lanes hold 32 pairs of a token at a time. Between parts of the row the products are in global
// memory.
template <class T, bool Dots>
__global__ void __launch_bounds__(SIMT_BLOCK_THREADS, 2) sum_rows_of_many_ranks(SumRows a) {
  using R = ComputeType<T>;
  const int64_t top_n = a.assignment.top_n;
  R* const dots = static_cast<R*>(a.dots);
  for_rows(a.plan, [&](int64_t token, int64_t /*last*/) {
    bool first_part = true;
    for_parts<1>(a.dim, [&](int64_t at) {
      PartSum<T, 1> sum;
      Part<T, 1> x{};
      if constexpr (Dots) x.load(static_cast<const T*>(a.x) + token * a.dim, at, a.dim);
      for (int64_t k = 0; k < top_n; k += kWarp) {
        HeldPairs<R> held;
        held.find(a, token * top_n + k, (token + 1) * top_n);
        const bool own = Dots && held.pair >= 0;
        if (own && !first_part) held.dot = dots[held.pair];
        sum.template add<Dots>(a, held, kAllLanes, x, at);
        if (own) dots[held.pair] = held.dot;
      }
      sum.store(static_cast<T*>(a.out) + token * a.dim, at, a.dim);
      first_part = false;
    });
  });
}

template <bool Dots>
cudaError_t launch_with(DType dtype, const SumRows& a, cudaStream_t stream) {
  return with_type(dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const bool aligned16 = is_aligned16(a.dim * sizeof(T), a.rows, a.out, a.x);
    const auto kernel = a.assignment.top_n > kWarp ? sum_rows_of_many_ranks<T, Dots>
                        : aligned16                     ? sum_rows<T, kPackSize<T>, Dots>
                                                   : sum_rows<T, 1, Dots>;
    return SIMT_LAUNCH(kernel, a.plan.grid, SIMT_BLOCK_THREADS, 0, stream, a);
  });
}

}  // namespace

cudaError_t launch_sum_rows(DType dtype, SumRows a, cudaStream_t stream) {
  const int64_t tokens = a.assignment.groups * a.assignment.tokens, top_n = a.assignment.top_n;
  if (tokens == 0) return cudaSuccess;
  a.plan = plan_rows(tokens, top_n < 8 ? 4 : top_n < kWarp ? int(kWarp / top_n) : 1);
  return a.x == nullptr ? launch_with<false>(dtype, a, stream) : launch_with<true>(dtype, a, stream);
}

}  // namespace topn_gating::cuda
