// Rows of d features on a GPU, a warp a row: what `dispatch` and `combine` share.
#pragma once

#include "cuda/element.cuh"

#ifndef TOPN_NAMESPACE
#define TOPN_NAMESPACE topn_gating::cuda
#endif
#include "held.h"

namespace topn_gating::cuda {

// Vectors of a row that a lane reads before it goes on, for enough bytes under way.
constexpr int kVectorsAtOnce = 4;

// How warps share out rows: each takes `at_once`, whose indices its lanes look up side by side.
struct RowPlan {
  int64_t rows;
  int at_once;
  unsigned grid;
};
constexpr unsigned kWarpsPerBlock = SIMT_BLOCK_THREADS / kWarp;

inline RowPlan plan_rows(int64_t rows, int most_at_once) {
  const int64_t warps = 64 * int64_t(device_attribute(cudaDevAttrMultiProcessorCount));
  const int64_t at_once = rows / warps < 1 ? 1 : rows / warps < most_at_once ? rows / warps : most_at_once;
  return {rows, int(at_once), grid_of(parts(parts(rows, at_once), int64_t(kWarpsPerBlock)))};
}

// Calls f(first, last) for each run of `at_once` rows of this warp; the last run has what is left.
template <class F>
__device__ __forceinline__ void for_rows(const RowPlan& plan, const F& f) {
  const int64_t warp = int64_t(blockIdx.x) * kWarpsPerBlock + warp_id();
  const int64_t step = int64_t(gridDim.x) * kWarpsPerBlock * plan.at_once;
  for (int64_t first = warp * plan.at_once; first < plan.rows; first += step) {
    f(first, first + plan.at_once < plan.rows ? first + plan.at_once : plan.rows);
  }
}

// Calls f(at) for each part of a row in turn, once for an empty row; lane l has the vectors at part + (32 u + l) · Count.
template <int Count, class F>
__device__ __forceinline__ void for_parts(int64_t dim, const F& f) {
  constexpr int64_t part = int64_t(kWarp) * Count * kVectorsAtOnce;
  int64_t first = 0;
  do {
    f(first + int64_t(lane_id()) * Count);
  } while ((first += part) < dim);
}

// A lane's vectors of one part of a row; zero past the row's end. They stay as they are read until they are used: half types
// would take twice the registers.
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
__device__ __forceinline__ RealOf<T> dot(const Part<T, Count>& a, const Part<T, Count>& b) {
  RealOf<T> sum = 0;
  for_elements<Count>([&](int u, int j) { sum += RealOf<T>(to_real(a.packs[u].v[j])) * to_real(b.packs[u].v[j]); });
  return sum;
}

// Sums of the rows in the slots that a token's pairs hold, in rank order: `combine`, and the gradient of `dispatch`.
struct SumRows {
  Assignment assignment;
  RowPlan plan;  // rows: tokens
  int64_t dim;
  const void* rows;    // (g, e, C, d)
  const void* weight;  // (g, n, k) Real; null: 1
  void* out;           // (g, n, d)
  const void* x;       // (g, n, d) or null
  void* dots;          // (g, n, k) Real: x · row, 0 where no slot is held; null with x
};

cudaError_t launch_sum_rows(DType dtype, SumRows a, cudaStream_t stream);

}  // namespace topn_gating::cuda
