// `combine` on a GPU: a warp for each token, and in the gradient a warp for each row of the experts.
#include "cuda/kernels.h"
#include "cuda/rows.cuh"

namespace topn_gating::cuda {
namespace {

struct CombineBackwardTask {
  CombineBackward combine;
  RowPlan plan;  // of the experts' rows
};

// Writes the gradients of the pairs that hold no slot, which no warp of a row writes.
template <class Weight>
__device__ __forceinline__ void clear_free_pairs(const Assignment& s, Weight* grad_weight) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x, pairs = s.groups * s.tokens * s.top_n;
  for (int64_t pair = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; pair < pairs; pair += step) {
    if (held_row(s, pair) < 0) grad_weight[pair] = 0;
  }
}

template <class T, int Count>
__global__ void __launch_bounds__(SIMT_BLOCK_THREADS, 2) combine_backward_rows(CombineBackwardTask task) {
  using R = ComputeType<T>;
  const CombineBackward& a = task.combine;
  R* const grad_weight = static_cast<R*>(a.grad_weight);
  clear_free_pairs(a.assignment, grad_weight);
  for_rows(task.plan, [&](int64_t first, int64_t last) {
    const int64_t own = first + lane_id();
    const int64_t pair = own < last ? holding_pair(a.assignment, own) : -1;
    const int64_t token = pair < 0 ? -1 : quotient(pair, a.assignment.top_n);
    const R weight = pair < 0 ? R(0) : static_cast<const R*>(a.weight)[pair];
    R own_dot = 0;
    for (int64_t row = first; row < last; ++row) {
      const int lane = int(row - first);
      const int64_t holder = shuffle(token, lane);
      const R scale = shuffle(weight, lane);
      const T* const grad_out = holder < 0 ? nullptr : static_cast<const T*>(a.grad_out) + holder * a.dim;
      R products = 0;
      for_parts<Count>(a.dim, [&](int64_t at) {
        Part<T, Count> grad{};
        if (holder >= 0) {
          Part<T, Count> y;
          grad.load(grad_out, at, a.dim);
          y.load(static_cast<const T*>(a.y) + row * a.dim, at, a.dim);
          products += dot(y, grad);
          for_elements<Count>([&](int u, int j) {
            T& element = grad.packs[u].v[j];
            element = from_compute<T>(scale * to_compute(element));
          });
        }
        grad.store(static_cast<T*>(a.grad_y) + row * a.dim, at, a.dim);
      });
      products = warp_sum(products);
      if (int(lane_id()) == lane) own_dot = products;
    }
    if (pair >= 0) grad_weight[pair] = own_dot;
  });
}

}  // namespace

cudaError_t run(const Combine& a, cudaStream_t stream) {
  return launch_sum_rows(a.dtype, {a.assignment, {}, a.dim, a.y, a.weight, a.out, nullptr, nullptr}, stream);
}

cudaError_t run(const CombineBackward& a, cudaStream_t stream) {
  const Assignment& s = a.assignment;
  if (s.groups == 0) return cudaSuccess;
  const CombineBackwardTask task{a, plan_rows(s.groups * s.rows, 4)};
  return with_type(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const bool aligned16 = is_aligned16(a.dim * sizeof(T), a.grad_out, a.y, a.grad_y);
    const auto kernel = aligned16 ? combine_backward_rows<T, kPackSize<T>> : combine_backward_rows<T, 1>;
    return SIMT_LAUNCH(kernel, task.plan.grid, SIMT_BLOCK_THREADS, 0, stream, task);
  });
}

}  // namespace topn_gating::cuda
