// Token rows to expert buffers on the CPU. A token's row is read once and written to each slot that it holds.
#include "cpu/rows.h"

namespace TOPN_NAMESPACE {
namespace {

template <class T>
void dispatch_backward_tokens(const DispatchBackward& a, const OutputRows& grad_x, int64_t begin, int64_t end) {
  using Real = RealOf<T>;
  const T* grad_y = static_cast<const T*>(a.grad_y);
  Held held(a.assignment.top_n);
  for (int64_t token = begin; token < end; ++token) {
    held.find(a.assignment, token);
    sum_rows<T>(grad_y, held, nullptr, a.dim, grad_x.row<T>(token), grad_x.stream);
    if (a.x == nullptr) continue;
    Real* grad_weight = static_cast<Real*>(a.grad_weight);
    std::fill_n(grad_weight + token * a.assignment.top_n, a.assignment.top_n, Real(0));
    for (int64_t i = 0; i < held.count; ++i) {
      grad_weight[held.pair[i]] = dot(static_cast<const T*>(a.x) + token * a.dim, grad_y + held.slot[i] * a.dim, a.dim);
    }
  }
}

}  // namespace

void run(const Dispatch& a, ParallelFor parallel_for) {
  const int64_t row_bytes = a.dim * element_bytes(a.dtype);
  const char* x = static_cast<const char*>(a.x);
  const OutputRows y(a.y, slots_of(a.assignment), row_bytes);
  parallel_tokens_slots(
      a.assignment, row_bytes, parallel_for,
      [&](int64_t begin, int64_t end) {
        Held held(a.assignment.top_n);
        for (int64_t token = begin; token < end; ++token) {
          held.find(a.assignment, token);
          for (int64_t i = 0; i < held.count; ++i) y.copy(held.slot[i], x + token * row_bytes);
        }
      },
      [&](int64_t begin, int64_t end) { clear_free_rows(a.assignment, y, begin, end); });
}

void run(const DispatchBackward& a, ParallelFor parallel_for) {
  with_type(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const OutputRows grad_x(a.grad_x, a.assignment.groups * a.assignment.tokens, a.dim * int64_t(sizeof(T)));
    parallel_tokens(a.assignment, grad_x.bytes, parallel_for,
                    [&](int64_t begin, int64_t end) { dispatch_backward_tokens<T>(a, grad_x, begin, end); });
  });
}

}  // namespace TOPN_NAMESPACE
