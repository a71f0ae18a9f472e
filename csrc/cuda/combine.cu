// `combine` on a GPU: a warp for each token, in the gradient too, where rows of free slots become zero.
#include "cuda/kernels.h"
#include "cuda/rows.cuh"

namespace topn_gating::cuda {
namespace {

struct CombineBackwardTask {
  CombineBackward combine;
  SlotPlan plan;
};

// A token's gradient is read for each of its held pairs, after the first time from the cache.
template <class T, int Count>
__global__ void __launch_bounds__(SIMT_BLOCK_THREADS, 4) combine_backward_rows(CombineBackwardTask task) {
  using R = ComputeType<T>;
  constexpr int Vectors = kSumVectors<Count>;
  const CombineBackward& a = task.combine;
  const int64_t top_n = a.assignment.top_n;
  T* const grad_y = static_cast<T*>(a.grad_y);
  R* const grad_weight = static_cast<R*>(a.grad_weight);
  wait_for_stream();
  let_next_start();
  for_rows(task.plan.tokens, [&](int64_t first, int64_t last) {
    for (int64_t pair = first * top_n; pair < last * top_n; pair += kWarp) {
      const HeldPairs held(a.assignment, pair, last * top_n);
      if (held.pair >= 0 && held.row < 0) grad_weight[held.pair] = 0;
      for (unsigned left = held.holders; left != 0; left &= left - 1) {
        const int lane = __ffs(int(left)) - 1;
        const T* const grad_out = static_cast<const T*>(a.grad_out) + quotient(pair + lane, top_n) * a.dim;
        const int64_t offset = shuffle(held.row, lane) * a.dim;
        const R weight = static_cast<const R*>(a.weight)[pair + lane];
        R products = 0;
        for_parts<Count, Vectors>(a.dim, [&](int64_t at) {
          Part<T, Count, Vectors> grad, y;
          grad.load(grad_out, at, a.dim);
          y.load(static_cast<const T*>(a.y) + offset, at, a.dim);
          R product = 0;
          for_elements<Count, Vectors>([&](int u, int j) {
            T& element = grad.packs[u].v[j];
            const R value = to_compute(element);
            product += to_compute(y.packs[u].v[j]) * value;
            element = from_compute<T>(weight * value);
          });
          products += product;
          grad.store(grad_y + offset, at, a.dim);
        });
        products = warp_sum(products);
        if (int(lane_id()) == lane) grad_weight[held.pair] = products;
      }
    }
  });
  clear_free_rows<T, Count>(a.assignment, task.plan.rows, grad_y, a.dim);
}

}  // namespace

cudaError_t run(const Combine& a, cudaStream_t stream) {
  return launch_sum_rows(a.dtype, {a.assignment, {}, a.dim, a.y, a.weight, a.out, nullptr, nullptr}, stream);
}

cudaError_t run(const CombineBackward& a, cudaStream_t stream) {
  const Assignment& s = a.assignment;
  if (s.groups == 0) return cudaSuccess;
  const CombineBackwardTask task{a, plan_slots(s)};
  return with_type(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const bool aligned16 = is_aligned16(a.dim * sizeof(T), a.grad_out, a.y, a.grad_y);
    const auto kernel = aligned16 ? combine_backward_rows<T, kPackSize<T>> : combine_backward_rows<T, 1>;
    return SIMT_LAUNCH_DEPENDENT(kernel, task.plan.grid, SIMT_BLOCK_THREADS, 0, stream, task);
  });
}

}  // namespace topn_gating::cuda
