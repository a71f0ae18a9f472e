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

// Vectors of a row that a lane reads before it uses them, so that enough bytes are in flight.
constexpr int kVectorsAtOnce = 4;

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

// Calls f(at) for each part of a row in turn, once for an empty row. In a part this lane has vectors of Count elements at at +
// 32 u Count for u < kVectorsAtOnce.
template <int Count, class F>
__device__ __forceinline__ void for_parts(int64_t dim, const F& f) {
  constexpr int64_t part = int64_t(kWarp) * Count * kVectorsAtOnce;
  int64_t first = 0;
  do {
    f(first + int64_t(lane_id()) * Count);
  } while ((first += part) < dim);
}

// A lane's vectors of one part of a row; zero past the row's end. They are converted where they are used, since converted
// 16-bit elements would take twice the registers.
template <class T, int Count>
struct Part {
  static constexpr int64_t step = int64_t(kWarp) * Count;
  Pack<T, Count> packs[kVectorsAtOnce];

  __device__ __forceinline__ void load(const T* row, int64_t at, int64_t dim) {
    TOPN_UNROLL
    for (int u = 0; u < kVectorsAtOnce; ++u) {
      packs[u] = {};
      if (at + u * step < dim) packs[u] = load_pack<T, Count>(row + at + u * step);
    }
  }
  __device__ __forceinline__ void store(T* row, int64_t at, int64_t dim) const {
    TOPN_UNROLL
    for (int u = 0; u < kVectorsAtOnce; ++u) {
      if (at + u * step < dim) store_pack(row + at + u * step, packs[u]);
    }
  }
};

// Calls f(u, j) for the elements of a lane's vectors.
template <int Count, class F>
__device__ __forceinline__ void for_elements(const F& f) {
  TOPN_UNROLL
  for (int u = 0; u < kVectorsAtOnce; ++u) {
    TOPN_UNROLL
    for (int j = 0; j < Count; ++j) f(u, j);
  }
}

template <class T, int Count>
__device__ __forceinline__ ComputeType<T> dot(const Part<T, Count>& a, const Part<T, Count>& b) {
  ComputeType<T> sum = 0;
  for_elements<Count>([&](int u, int j) { sum += ComputeType<T>(to_compute(a.packs[u].v[j])) * to_compute(b.packs[u].v[j]); });
  return sum;
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
