// `dispatch` on a GPU: a warp for each row of the experts copies the row of the token that holds its slot, or writes zeros.
#include "cuda/kernels.h"
#include "cuda/rows.cuh"

namespace topn_gating::cuda {
namespace {

struct CopyRows {
  Assignment assignment;
  RowPlan plan;       // of the experts' rows
  int64_t row_bytes;
  const void* from;   // (g, n) rows
  void* to;           // (g, e, C) or (R) rows
};

// `Unit` is the integer type in whose size rows are copied.
template <class Unit>
__global__ void __launch_bounds__(SIMT_BLOCK_THREADS) copy_rows(CopyRows a) {
  const int64_t units = a.row_bytes / int64_t(sizeof(Unit));
  for_rows(a.plan, [&](int64_t first, int64_t last) {
    const int64_t own = first + lane_id();
    const int64_t pair = own < last ? holding_pair(a.assignment, own) : -1;
    const int64_t token = pair < 0 ? -1 : quotient(pair, a.assignment.top_n);
    for (int64_t row = first; row < last; ++row) {
      const int64_t holder = shuffle(token, int(row - first));
      const Unit* const from = holder < 0 ? nullptr : static_cast<const Unit*>(a.from) + holder * units;
      Unit* const to = static_cast<Unit*>(a.to) + row * units;
      for_parts<1>(units, [&](int64_t at) {
        Unit part[kVectorsAtOnce];
        TOPN_UNROLL
        for (int u = 0; u < kVectorsAtOnce; ++u) {
          part[u] = Unit{};
          if (holder >= 0 && at + u * kWarp < units) part[u] = from[at + u * kWarp];
        }
        TOPN_UNROLL
        for (int u = 0; u < kVectorsAtOnce; ++u) {
          if (at + u * kWarp < units) to[at + u * kWarp] = part[u];
        }
      });
    }
  });
}

}  // namespace

cudaError_t run(const Dispatch& a, cudaStream_t stream) {
  const Assignment& s = a.assignment;
  const int64_t rows = s.groups * s.rows, bytes = element_bytes(a.dtype);
  if (rows == 0 || a.dim == 0) return cudaSuccess;
  const CopyRows task{s, plan_rows(rows, 4), a.dim * bytes, a.x, a.y};
  const auto kernel = is_aligned16(task.row_bytes, a.x, a.y) ? copy_rows<uint4>
                      : bytes == 8                      ? copy_rows<uint64_t>
                      : bytes == 4                      ? copy_rows<uint32_t>
                                                        : copy_rows<uint16_t>;
  return SIMT_LAUNCH(kernel, task.plan.grid, SIMT_BLOCK_THREADS, 0, stream, task);
}

cudaError_t run(const DispatchBackward& a, cudaStream_t stream) {
  return launch_sum_rows(a.dtype, {a.assignment, {}, a.dim, a.grad_y, nullptr, a.grad_x, a.x, a.grad_weight}, stream);
}

}  // namespace topn_gating::cuda
