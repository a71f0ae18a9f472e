// `combine` on the CPU: sums of the rows of expert buffers, a token at a time.
#pragma once

#include "cpu/rows.h"

namespace topn_gating::cpu::TOPN_LEVEL {
namespace {

template <class T>
void combine_tokens(const Combine& a, const OutputRows& out, int64_t begin, int64_t end) {
  HeldRows held(a.assignment.top_n);
  for (int64_t token = begin; token < end; ++token) {
    held.find(a.assignment, token);
    sum_rows<T>(static_cast<const T*>(a.y), held, static_cast<const ComputeType<T>*>(a.weight), a.dim, out.row<T>(token),
                out.nontemporal);
  }
}

template <class T>
void combine_backward_tokens(const CombineBackward& a, const OutputRows& grad_y, int64_t begin, int64_t end) {
  using Weight = ComputeType<T>;
  const T* y = static_cast<const T*>(a.y);
  const Weight* weight = static_cast<const Weight*>(a.weight);
  Weight* grad_weight = static_cast<Weight*>(a.grad_weight);
  HeldRows held(a.assignment.top_n);
  for (int64_t token = begin; token < end; ++token) {
    const T* grad = static_cast<const T*>(a.grad_out) + token * a.dim;
    held.find(a.assignment, token);
    std::fill_n(grad_weight + token * a.assignment.top_n, a.assignment.top_n, Weight(0));
    for (int64_t i = 0; i < held.count; ++i) {
      const int64_t row = held.row[i], pair = held.pair[i];
      grad_weight[pair] =
          dot_and_scale(y + row * a.dim, grad, a.dim, weight[pair], grad_y.row<T>(row), grad_y.nontemporal);
    }
  }
}

}  // namespace

void run(const Combine& a, ParallelFor parallel_for) {
  with_type(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const OutputRows out(a.out, a.assignment.groups * a.assignment.tokens, a.dim * int64_t(sizeof(T)));
    parallel_tokens(a.assignment, out.bytes, parallel_for,
                    [&](int64_t begin, int64_t end) { combine_tokens<T>(a, out, begin, end); });
  });
}

void run(const CombineBackward& a, ParallelFor parallel_for) {
  with_type(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const OutputRows grad_y(a.grad_y, num_rows(a.assignment), a.dim * int64_t(sizeof(T)));
    parallel_tokens_and_rows(
        a.assignment, grad_y.bytes, parallel_for,
        [&](int64_t begin, int64_t end) { combine_backward_tokens<T>(a, grad_y, begin, end); },
        [&](int64_t begin, int64_t end) { clear_free_rows(a.assignment, grad_y, begin, end); });
  });
}

}  // namespace topn_gating::cpu::TOPN_LEVEL
