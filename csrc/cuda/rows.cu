// Sums of rows on a GPU, a warp for each token: `combine`, and the gradient of `dispatch`.
#include "cuda/rows.cuh"

namespace topn_gating::cuda {
namespace {

// The sum of one part of some rows.
template <class T, int Count>
struct PartSum {
  static constexpr int Vectors = kSumVectors<Count>;
  using R = ComputeType<T>;
  using Row = Part<T, Count, Vectors>;
  R v[Vectors][Count] = {};

  __device__ __forceinline__ void add(R weight, const Row& row) {
    for_elements<Count, Vectors>([&](int u, int j) { v[u][j] += weight * to_compute(row.packs[u].v[j]); });
  }
  __device__ __forceinline__ void store(T* row, int64_t at, int64_t dim) const {
    Row part;
    for_elements<Count, Vectors>([&](int u, int j) { part.packs[u].v[j] = from_compute<T>(v[u][j]); });
    part.store(row, at, dim);
  }
};

// The rows of the held pairs of some lanes, part by part: while one is used, the next is read.
template <class T, int Count>
struct HeldRows {
  using Row = typename PartSum<T, Count>::Row;
  const SumRows& a;
  const HeldPairs& held;
  const int64_t at;
  unsigned left;  // lanes whose rows are still to be used
  Row next{};

  __device__ __forceinline__ HeldRows(const SumRows& task, const HeldPairs& pairs, int64_t position)
      : a(task), held(pairs), at(position), left(pairs.holders) {
    read();
  }
  __device__ __forceinline__ int lane() const { return __ffs(int(left)) - 1; }
  __device__ __forceinline__ void read() {
    if (left == 0) return;
    const int64_t row = shuffle(held.row, lane());
    next.load(static_cast<const T*>(a.rows) + row * a.dim, at, a.dim);
  }
  // Calls f(lane, its part) for those of the lanes.
  template <class F>
  __device__ __forceinline__ void use(unsigned lanes, const F& f) {
    while ((left & lanes) != 0) {
      const int own = lane();
      const Row row = next;
      left &= left - 1;
      read();
      f(own, row);
    }
  }
};

// For at most 32 ranks: the lanes hold all pairs of a few tokens.
template <class T, int Count, bool Dots>
__global__ void __launch_bounds__(SIMT_BLOCK_THREADS, Dots ? 2 : 3) sum_rows(SumRows a) {
  using R = ComputeType<T>;
  constexpr int Vectors = kSumVectors<Count>;
  const int top_n = int(a.assignment.top_n);
  const unsigned of_first = top_n < int(kWarp) ? (1u << top_n) - 1u : kAllLanes;
  wait_for_stream();
  let_next_start();
  for_rows(a.plan, [&](int64_t first, int64_t last) {
    const HeldPairs held(a.assignment, first * top_n, last * top_n);
    const R own_weight = held.weight<R>(a.weight);
    R own_dot = 0;
    for_parts<Count, Vectors>(a.dim, [&](int64_t at) {
      HeldRows<T, Count> rows(a, held, at);
      Part<T, Count, Vectors> next_x{};
      const auto read_x = [&](int64_t token) {
        if (Dots && token < last) next_x.load(static_cast<const T*>(a.x) + token * a.dim, at, a.dim);
      };
      read_x(first);
      for (int64_t token = first; token < last; ++token) {
        const Part<T, Count, Vectors> x = next_x;
        read_x(token + 1);
        PartSum<T, Count> sum;
        rows.use(of_first << (int(token - first) * top_n), [&](int lane, const auto& row) {
          sum.add(shuffle(own_weight, lane), row);
          if constexpr (Dots) {
            const R product = warp_sum(dot(x, row));
            if (int(lane_id()) == lane) own_dot += product;
          }
        });
        sum.store(static_cast<T*>(a.out) + token * a.dim, at, a.dim);
      }
    });
    if (Dots && held.pair >= 0) static_cast<R*>(a.dots)[held.pair] = own_dot;
  });
}

// For any number of ranks: the lanes hold 32 pairs of a token at a time. Between parts of the row the products are in global
// memory.
template <class T, bool Dots>
__global__ void __launch_bounds__(SIMT_BLOCK_THREADS, 3) sum_rows_of_many_ranks(SumRows a) {
  using R = ComputeType<T>;
  const int64_t top_n = a.assignment.top_n;
  R* const dots = static_cast<R*>(a.dots);
  wait_for_stream();
  let_next_start();
  for_rows(a.plan, [&](int64_t token, int64_t /*last*/) {
    bool first_part = true;
    for_parts<1>(a.dim, [&](int64_t at) {
      PartSum<T, 1> sum;
      Part<T, 1> x{};
      if constexpr (Dots) x.load(static_cast<const T*>(a.x) + token * a.dim, at, a.dim);
      for (int64_t k = 0; k < top_n; k += kWarp) {
        const HeldPairs held(a.assignment, token * top_n + k, (token + 1) * top_n);
        const R own_weight = held.weight<R>(a.weight);
        const bool own = Dots && held.pair >= 0;
        R own_dot = own && !first_part ? dots[held.pair] : R(0);
        HeldRows<T, 1>(a, held, at).use(kAllLanes, [&](int lane, const auto& row) {
          sum.add(shuffle(own_weight, lane), row);
          if constexpr (Dots) {
            const R product = warp_sum(dot(x, row));
            if (int(lane_id()) == lane) own_dot += product;
          }
        });
        if (own) dots[held.pair] = own_dot;
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
    return SIMT_LAUNCH_DEPENDENT(kernel, a.plan.grid, SIMT_BLOCK_THREADS, 0, stream, a);
  });
}

}  // namespace

cudaError_t launch_sum_rows(DType dtype, SumRows a, cudaStream_t stream) {
  if (a.assignment.groups * a.assignment.tokens == 0) return cudaSuccess;
  a.plan = plan_tokens(a.assignment);
  return a.x == nullptr ? launch_with<false>(dtype, a, stream) : launch_with<true>(dtype, a, stream);
}

}  // namespace topn_gating::cuda
