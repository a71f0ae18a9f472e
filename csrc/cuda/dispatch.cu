// `dispatch` on a GPU: a warp for each token copies its row to the slots that its pairs hold. Rows of free slots become zero.
#include "cuda/kernels.h"
#include "cuda/rows.cuh"

namespace topn_gating::cuda {
namespace {

struct CopyRows {
  Assignment assignment;
  SlotPlan plan;
  int64_t row_bytes;
  const void* from;  // (g, n) rows
  void* to;          // (g, e, C) or (R) rows
};

// `Unit` is the integer type in whose size rows are copied.
template <class Unit>
__global__ void __launch_bounds__(SIMT_BLOCK_THREADS) copy_rows(CopyRows a) {
  const int64_t units = a.row_bytes / int64_t(sizeof(Unit)), top_n = a.assignment.top_n;
  Unit* const to = static_cast<Unit*>(a.to);
  wait_for_stream();
  let_next_start();
  for_rows(a.plan.tokens, [&](int64_t first, int64_t last) {
    for (int64_t pair = first * top_n; pair < last * top_n; pair += kWarp) {
      const HeldPairs held(a.assignment, pair, last * top_n);
      const int64_t own_token = held.row < 0 ? -1 : quotient(held.pair, top_n);
      for (unsigned left = held.holders; left != 0;) {
        const int64_t token = shuffle(own_token, __ffs(int(left)) - 1);
        const unsigned lanes = ballot(own_token == token);
        for_parts<1>(units, [&](int64_t at) {
          Part<Unit, 1> part;
          part.load(static_cast<const Unit*>(a.from) + token * units, at, units);
          for (unsigned of_token = lanes; of_token != 0; of_token &= of_token - 1) {
            const int64_t row = shuffle(held.row, __ffs(int(of_token)) - 1);
            part.store(to + row * units, at, units);
          }
        });
        left &= ~lanes;
      }
    }
  });
  clear_free_rows<Unit, 1>(a.assignment, a.plan.rows, to, units);
}

}  // namespace

cudaError_t run(const Dispatch& a, cudaStream_t stream) {
  const Assignment& s = a.assignment;
  const int64_t rows = s.groups * s.rows, bytes = element_bytes(a.dtype);
  if (rows == 0 || a.dim == 0) return cudaSuccess;
  const CopyRows task{s, plan_slots(s), a.dim * bytes, a.x, a.y};
  const auto kernel = is_aligned16(task.row_bytes, a.x, a.y) ? copy_rows<uint4>
                      : bytes == 8                      ? copy_rows<uint64_t>
                      : bytes == 4                      ? copy_rows<uint32_t>
                                                        : copy_rows<uint16_t>;
  return SIMT_LAUNCH_DEPENDENT(kernel, task.plan.grid, SIMT_BLOCK_THREADS, 0, stream, task);
}

cudaError_t run(const DispatchBackward& a, cudaStream_t stream) {
  return launch_sum_rows(a.dtype, {a.assignment, {}, a.dim, a.grad_y, nullptr, a.grad_x, a.x, a.grad_weight}, stream);
}

}  // namespace topn_gating::cuda
