// `dispatch` on the CPU: reads each token's row once and writes it to each slot that the token's pairs hold.
#pragma once

#include "cpu/rows.h"

namespace topn_gating::cpu::TOPN_LEVEL {
namespace {

template <class T>
void dispatch_backward_tokens(const DispatchBackward& a, const OutputRows& grad_x, int64_t begin, int64_t end) {
  using Weight = ComputeType<T>;
  const T* grad_y = static_cast<const T*>(a.grad_y);
  HeldRows held(a.assignment.top_n);
  for (int64_t token = begin; token < end; ++token) {
    held.find(a.assignment, token);
    sum_rows<T>(grad_y, held, nullptr, a.dim, grad_x.row<T>(token), grad_x.nontemporal);
    if (a.x == nullptr) continue;
    Weight* grad_weight = static_cast<Weight*>(a.grad_weight);
    std::fill_n(grad_weight + token * a.assignment.top_n, a.assignment.top_n, Weight(0));
    for (int64_t i = 0; i < held.count; ++i) {
      grad_weight[held.pair[i]] = dot(static_cast<const T*>(a.x) + token * a.dim, grad_y + held.row[i] * a.dim, a.dim);
    }
  }
}

}  // namespace

void run(const Dispatch& a, ParallelFor parallel_for) {
  const int64_t row_bytes = a.dim * element_bytes(a.dtype);
  const char* x = static_cast<const char*>(a.x);
  const OutputRows y(a.y, num_rows(a.assignment), row_bytes);
  parallel_tokens_and_rows(
      a.assignment, row_bytes, parallel_for,
      [&](int64_t begin, int64_t end) {
        HeldRows held(a.assignment.top_n);
        for (int64_t token = begin; token < end; ++token) {
          held.find(a.assignment, token);
          for (int64_t i = 0; i < held.count; ++i) y.copy(held.row[i], x + token * row_bytes);
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

}  // namespace topn_gating::cpu::TOPN_LEVEL
