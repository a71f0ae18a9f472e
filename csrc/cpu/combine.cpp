// Expert buffers back to token rows on the CPU, a token at a time.
#include "cpu/rows.h"

namespace TOPN_NAMESPACE {
namespace {

template <class T>
void combine_tokens(const Combine& a, int64_t begin, int64_t end) {
  Held held(a.assignment.top_n);
  for (int64_t token = begin; token < end; ++token) {
    held.find(a.assignment, token);
    sum_rows<T>(static_cast<const T*>(a.y), held, static_cast<const RealOf<T>*>(a.weight), a.dim,
                static_cast<T*>(a.out) + token * a.dim);
  }
}

template <class T>
void combine_backward_tokens(const CombineBackward& a, int64_t begin, int64_t end) {
  using Real = RealOf<T>;
  const T* y = static_cast<const T*>(a.y);
  const Real* weight = static_cast<const Real*>(a.weight);
  T* grad_y = static_cast<T*>(a.grad_y);
  Real* grad_weight = static_cast<Real*>(a.grad_weight);
  Held held(a.assignment.top_n);
  for (int64_t token = begin; token < end; ++token) {
    const T* grad = static_cast<const T*>(a.grad_out) + token * a.dim;
    held.find(a.assignment, token);
    std::fill_n(grad_weight + token * a.assignment.top_n, a.assignment.top_n, Real(0));
    for (int64_t i = 0; i < held.count; ++i) {
      const int64_t row = held.slot[i] * a.dim;
      grad_weight[held.pair[i]] = dot(y + row, grad, a.dim);
      scale_row(grad, weight[held.pair[i]], a.dim, grad_y + row);
    }
  }
}

}  // namespace

void combine(const Combine& a, ParallelFor parallel_for) {
  with_type(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const int64_t tokens = a.assignment.groups * a.assignment.tokens;
    parallel(parallel_for, tokens, a.dim * (a.assignment.top_n + 1),
             [&](int64_t begin, int64_t end) { combine_tokens<T>(a, begin, end); });
  });
}

void combine_backward(const CombineBackward& a, ParallelFor parallel_for) {
  with_type(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    parallel_tokens_slots(
        a.assignment, a.dim, parallel_for,
        [&](int64_t begin, int64_t end) { combine_backward_tokens<T>(a, begin, end); },
        [&](int64_t begin, int64_t end) {
          clear_free_rows(a.assignment, a.grad_y, a.dim * int64_t(sizeof(T)), begin, end);
        });
  });
}

}  // namespace TOPN_NAMESPACE
