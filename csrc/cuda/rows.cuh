// Rows of d features on a GPU, each processed by a warp: what `dispatch` and `combine` share.
#pragma once

#include "assignment.h"
#include "cuda/element.cuh"

namespace topn_gating::cuda {

// Returns the row whose slot a pair holds, or -1; both are indices over all groups.
__device__ __forceinline__ int64_t held_row(const Assignment& a, int64_t pair) {
  const int64_t pairs = a.tokens * a.top_n, group = quotient(pair, pairs);
  return held_row(a, group, pair - group * pairs);
}

// Returns the pair that holds the slot of a row, or -1; both are indices over all groups.
__device__ __forceinline__ int64_t holding_pair(const Assignment& a, int64_t row) {
  return holding_pair(a, quotient(row, a.rows), row);
}

// How rows are divided among warps.
struct RowPlan {
  int64_t rows;
  int at_once;  // rows of a step of a warp; its lanes look up their indices in parallel
  unsigned grid;
};
constexpr unsigned kWarpsPerBlock = SIMT_BLOCK_THREADS / kWarp;

inline RowPlan plan_rows(int64_t rows, int most_at_once) {
  const int64_t warps = 64 * int64_t(device_attribute(cudaDevAttrMultiProcessorCount));
  const int64_t at_once = rows / warps < 1 ? 1 : rows / warps < most_at_once ? rows / warps : most_at_once;
  return {rows, int(at_once), grid_of(ceil_div(ceil_div(rows, at_once), int64_t(kWarpsPerBlock)))};
}

// Calls f(first, last) for each range of at most at_once rows that this warp processes.
template <class F>
__device__ __forceinline__ void for_rows(const RowPlan& plan, const F& f) {
  const int64_t warp = int64_t(blockIdx.x) * kWarpsPerBlock + warp_id();
  const int64_t step = int64_t(gridDim.x) * kWarpsPerBlock * plan.at_once;
  for (int64_t first = warp * plan.at_once; first < plan.rows; first += step) {
    f(first, first + plan.at_once < plan.rows ? first + plan.at_once : plan.rows);
  }
}

// Vectors of a row that a lane reads before it uses them, so that enough bytes are in flight.
constexpr int kVectors = 4;

// The same where several rows are computed with: shorter parts take fewer registers, so that more warps hide latency.
template <int Count>
constexpr int kSumVectors = Count == 1 ? kVectors : 2;

// Calls f(at) for each part of a row in turn, once for an empty row. In a part this lane has vectors of Count elements at at +
// 32 u Count for u < Vectors.
template <int Count, int Vectors = kVectors, class F>
__device__ __forceinline__ void for_parts(int64_t dim, const F& f) {
  constexpr int64_t part = int64_t(kWarp) * Count * Vectors;
  int64_t first = 0;
  do {
    f(first + int64_t(lane_id()) * Count);
  } while ((first += part) < dim);
}

// A lane's vectors of one part of a row; zero past the row's end. They are converted where they are used, since converted
// 16-bit elements would take twice the registers.
template <class T, int Count, int Vectors = kVectors>
struct Part {
  static constexpr int64_t step = int64_t(kWarp) * Count;
  Pack<T, Count> packs[Vectors];

  __device__ __forceinline__ void load(const T* row, int64_t at, int64_t dim) {
    TOPN_UNROLL
    for (int u = 0; u < Vectors; ++u) {
      packs[u] = {};
      if (at + u * step < dim) packs[u] = load_pack<T, Count>(row + at + u * step);
    }
  }
  __device__ __forceinline__ void store(T* row, int64_t at, int64_t dim) const {
    TOPN_UNROLL
    for (int u = 0; u < Vectors; ++u) {
      if (at + u * step < dim) store_pack(row + at + u * step, packs[u]);
    }
  }
};

// Calls f(u, j) for the elements of a lane's vectors.
template <int Count, int Vectors = kVectors, class F>
__device__ __forceinline__ void for_elements(const F& f) {
  TOPN_UNROLL
  for (int u = 0; u < Vectors; ++u) {
    TOPN_UNROLL
    for (int j = 0; j < Count; ++j) f(u, j);
  }
}

template <class T, int Count, int Vectors>
__device__ __forceinline__ ComputeType<T> dot(const Part<T, Count, Vectors>& a, const Part<T, Count, Vectors>& b) {
  ComputeType<T> sum = 0;
  for_elements<Count, Vectors>([&](int u, int j) {
    sum += ComputeType<T>(to_compute(a.packs[u].v[j])) * to_compute(b.packs[u].v[j]);
  });
  return sum;
}

// Up to 32 pairs, one in each lane: those of a few tokens, or some of one token.
struct HeldPairs {
  int64_t pair, row;  // -1: no pair; the row whose slot the pair holds, or -1
  unsigned holders;   // the lanes whose pairs hold a slot

  // Reads the pairs from `first` on, before `end`.
  __device__ __forceinline__ HeldPairs(const Assignment& a, int64_t first, int64_t end) {
    pair = first + lane_id() < end ? first + lane_id() : -1;
    row = pair < 0 ? -1 : held_row(a, pair);
    holders = ballot(row >= 0);
  }
  // Returns the pair's weight, 1 where there are no weights.
  template <class R>
  __device__ __forceinline__ R weight(const void* weights) const {
    return row >= 0 && weights != nullptr ? static_cast<const R*>(weights)[pair] : R(1);
  }
};

// Returns the plan for tokens whose pairs the lanes of a warp hold, so many tokens at once as they can.
inline RowPlan plan_tokens(const Assignment& a) {
  const int most = a.top_n < 8 ? 4 : a.top_n < kWarp ? int(kWarp / a.top_n) : 1;
  return plan_rows(a.groups * a.tokens, most);
}

// How the rows of the experts are written, each once: token by token where a pair holds the slot, and the others as zeros.
struct SlotPlan {
  RowPlan tokens, rows;
  unsigned grid;
};
inline SlotPlan plan_slots(const Assignment& a) {
  SlotPlan plan{plan_tokens(a), plan_rows(a.groups * a.rows, int(kWarp)), 0};
  plan.grid = plan.tokens.grid > plan.rows.grid ? plan.tokens.grid : plan.rows.grid;
  return plan;
}

// Writes zeros to the rows whose slots no pair holds.
template <class T, int Count>
__device__ __forceinline__ void clear_free_rows(const Assignment& s, const RowPlan& plan, T* to, int64_t dim) {
  for_rows(plan, [&](int64_t first, int64_t last) {
    const int64_t own = first + lane_id();
    for (unsigned left = ballot(own < last && holding_pair(s, own) < 0); left != 0; left &= left - 1) {
      T* const row = to + (first + __ffs(int(left)) - 1) * dim;
      for_parts<Count>(dim, [&](int64_t at) {
        const Part<T, Count> zeros{};
        zeros.store(row, at, dim);
      });
    }
  });
}

// The sums of the rows of the slots that each token's pairs hold, in the order of the ranks: `combine`, and the gradient of
// `dispatch`.
struct SumRows {
  Assignment assignment;
  RowPlan plan;        // of the tokens
  int64_t dim;
  const void* rows;    // (g, e, C, d) or (R, d)
  const void* weight;  // (g, n, k) of the compute type; null: 1
  void* out;           // (g, n, d)
  const void* x;       // (g, n, d) or null
  void* dots;          // (g, n, k) x · row of the compute type, 0 where no slot is held; null with x
};

cudaError_t launch_sum_rows(DType dtype, SumRows a, cudaStream_t stream);

}  // namespace topn_gating::cuda
