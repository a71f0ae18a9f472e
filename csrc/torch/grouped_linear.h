// The operator `grouped_linear` and its gradient: see operators.h. The CPU alone has them in C++. Products of types for which
// torch's are slow, and of groups of few rows, are kernels; the others are torch's, into slices of one output.
#pragma once

#include <atomic>
#include <cstring>
#include <exception>
#include <numeric>
#include <tuple>

#include "matrix.h"

namespace topn_gating::binding {

// The checked arguments that the operator and its gradient share.
struct GroupedArguments {
  int64_t rows, in, out, experts, element_bytes;
  ScalarType type;
  bool transposed;  // whether the weight's matrices are stored column after column
  std::vector<int32_t> start;  // of each expert's rows, and the end of the last
  Tensor weight;

  GroupedArguments(const Tensor& rows_in, const Tensor& weight_in, const Tensor& offsets_in)
      : type(rows_in.scalar_type()), weight(weight_in) {
    STD_TORCH_CHECK(rows_in.dim() == 2, "rows must have shape (rows, in)");
    STD_TORCH_CHECK(weight.dim() == 3 && weight.size(0) >= 1 && weight.size(1) >= 1 && weight.size(2) >= 1,
                    "weight must have shape (experts, out, in), one of each or more");
    rows = rows_in.size(0), in = rows_in.size(1), experts = weight.size(0), out = weight.size(1);
    STD_TORCH_CHECK(in == weight.size(2), "rows must have shape (rows, in) with ", weight.size(2), " features, as weight has");
    element_bytes = topn_gating::element_bytes(dtype_of("rows", type));
    STD_TORCH_CHECK(weight.scalar_type() == type, "weight must be ", torch::headeronly::toString(type), ", got ",
                    torch::headeronly::toString(weight.scalar_type()));
    STD_TORCH_CHECK(weight.device() == rows_in.device(), "weight must be on the device of the other arguments");
    transposed = weight.stride(1) == 1 && weight.stride(2) != 1;
    if (!has_product_layout(out, in, weight.stride(1), weight.stride(2))) {
      weight = torch::stable::contiguous(weight);
      transposed = false;
    }
    const Tensor ends = checked("offsets", offsets_in, rows_in, {experts}, ScalarType::Int);
    start.reserve(experts + 1);
    start.push_back(0);
    for (int64_t e = 0; e < experts; ++e) {  // whatever the offsets are, the rows exist
      const int32_t end = std::max(start.back(), const_data<int32_t>(ends)[e]);
      start.push_back(int32_t(std::min<int64_t>(rows, end)));
    }
  }

  bool kernels_alone() const { return !has_fast_products(type); }
  // Returns the most rows of a group whose product is a kernel. Where torch's products are fast, up to so many rows a product
  // takes the time of reading the weight; torch's use the processor's instructions for half types.
  int64_t most_rows(const Tensor& t) const {
    if (kernels_alone()) return rows;
    if (t.stride(1) != 1) return 0;
    return element_bytes == 2 ? 8 : 32;
  }
  int64_t count(int64_t expert) const { return start[expert + 1] - start[expert]; }
  int64_t end() const { return start.back(); }

  Matrix expert_weight(int64_t expert) const {
    char* data = memory_of(weight) + expert * weight.stride(0) * element_bytes;
    return {data, type, element_bytes, out, in, weight.stride(1), weight.stride(2)};
  }

  // Checks a tensor (rows, columns), and returns it in a layout that a product reads without a copy.
  Tensor checked_rows(const char* name, const Tensor& t, int64_t columns) const {
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name,
                    " has a shape that does not fit the other arguments");
    STD_TORCH_CHECK(t.scalar_type() == type, name, " must be ", torch::headeronly::toString(type), ", got ",
                    torch::headeronly::toString(t.scalar_type()));
    STD_TORCH_CHECK(t.device() == weight.device(), name, " must be on the device of the other arguments");
    const bool as_it_is = has_product_layout(rows, columns, t.stride(0), t.stride(1)) && (t.stride(1) == 1 || !kernels_alone());
    return as_it_is ? t : torch::stable::contiguous(t);
  }
  Matrix matrix(const Tensor& t) const {
    return {memory_of(t), type, element_bytes, t.size(0), t.size(1), t.stride(0), t.stride(1)};
  }
};

// The least multiplications of a group whose product runs on all threads. The products of smaller groups run on one thread
// each, side by side.
constexpr int64_t kThreadedProduct = int64_t(1) << 27;

// Runs f(expert) for each expert with more than `above` rows: one after the other on the caller's thread those whose groups are
// large, then the others in parallel. If a call throws, rethrows one of the exceptions after all calls have ended.
template <class F>
void for_experts(const GroupedArguments& a, int64_t above, const F& f) {
  std::vector<int64_t> small;
  const int64_t threads = torch::stable::get_num_threads();
  for (int64_t e = 0; e < a.experts; ++e) {
    if (a.count(e) <= above) continue;  // so that no thread is woken for groups that have a kernel of their own
    if (threads > 1 && a.count(e) * a.in < kThreadedProduct / a.out) {
      small.push_back(e);
    } else {
      f(e);
    }
  }
  if (small.size() < 2) {
    for (const int64_t e : small) f(e);
    return;
  }
  // The largest first, so that the threads end at about the same time.
  std::stable_sort(small.begin(), small.end(), [&](int64_t i, int64_t j) { return a.count(i) > a.count(j); });
  std::atomic<size_t> next{0};
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  std::exception_ptr exception;
  torch::stable::parallel_for(0, std::min<int64_t>(threads, small.size()), 1, [&](int64_t, int64_t) {
    try {
      for (size_t i; (i = next++) < small.size();) f(small[i]);
    } catch (...) {
      if (!failed.test_and_set()) exception = std::current_exception();
    }
  });
  if (exception) std::rethrow_exception(exception);
}

inline void clear_rows(const Tensor& t, int64_t begin, int64_t end, int64_t row_bytes) {
  if (end > begin) std::memset(memory_of(t) + begin * row_bytes, 0, (end - begin) * row_bytes);
}

// Runs the kernel of the groups that have one: the products of `rows` with matrices whose rows and columns are `in_stride` and
// `out_stride` elements apart.
template <class Backend>
void run_products(const Backend& backend, const GroupedArguments& a, const Tensor& rows, int64_t in_stride, int64_t out_stride,
                  const void* bias, const Tensor& result) {
  if (a.most_rows(rows) == 0) return;
  GroupedLinear g{dtype_of("rows", a.type), a.experts, rows.size(1), result.size(1), a.most_rows(rows), rows.stride(0)};
  g.weight_strides[0] = a.weight.stride(0), g.weight_strides[1] = in_stride, g.weight_strides[2] = out_stride;
  g.start = a.start.data();
  g.rows = const_data(rows);
  g.weight = const_data(a.weight);
  g.bias = bias;
  g.result = mutable_data(result);
  backend.run(g);
}

template <class Backend>
Tensor grouped_linear(const Tensor& rows_in, const Tensor& weight, const std::optional<Tensor>& bias_in,
                      const Tensor& offsets) {
  const Backend backend(rows_in);
  const GroupedArguments a(rows_in, weight, offsets);
  const Tensor rows = a.checked_rows("rows", rows_in, a.in);
  const auto bias = checked("bias", bias_in, rows_in, {a.experts, a.out}, a.type);
  const Tensor out = empty_output(rows, {a.rows, a.out}, {a.out, 1}, a.type, a.element_bytes);
  run_products(backend, a, rows, a.weight.stride(2), a.weight.stride(1), const_data(bias), out);
  for_experts(a, a.most_rows(rows), [&](int64_t e) {
    const Matrix to = a.matrix(out).row_range(a.start[e], a.start[e + 1]);
    if (bias.has_value()) {
      Matrix row = a.matrix(*bias).row_range(e, e + 1);
      row.row_stride = 0;
      row.rows = to.rows;
      copy(to, row);
    }
    const Matrix group = a.matrix(rows).row_range(a.start[e], a.start[e + 1]);
    multiply(to, group, a.expert_weight(e).transposed(), bias.has_value());
  });
  clear_rows(out, a.end(), a.rows, a.out * a.element_bytes);
  return out;
}

// Runs the kernel of the weights' gradient, for all groups. It has the layout of the weights.
template <class Backend>
void run_weight_gradient(const Backend& backend, const GroupedArguments& a, const Tensor& grad, const Tensor& rows,
                         const Tensor& grad_weight) {
  const Tensor &left = a.transposed ? rows : grad, &right = a.transposed ? grad : rows;
  GroupedOuter g{dtype_of("rows", a.type), a.experts, left.size(1), right.size(1), left.stride(0), right.stride(0)};
  g.start = a.start.data();
  g.left = const_data(left);
  g.right = const_data(right);
  g.result = mutable_data(grad_weight);
  backend.run(g);
}

template <class Backend>
void run_bias_gradient(const Backend& backend, const GroupedArguments& a, const Tensor& grad_in, const Tensor& grad_bias) {
  const Tensor grad = grad_in.stride(1) == 1 ? grad_in : torch::stable::contiguous(grad_in);
  GroupedSum g{dtype_of("rows", a.type), a.experts, a.out, grad.stride(0)};
  g.start = a.start.data();
  g.rows = const_data(grad);
  g.result = mutable_data(grad_bias);
  backend.run(g);
}

// A gradient that is not wanted is empty.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor> grouped_linear_backward(const Tensor& grad_in, const Tensor& rows_in, const Tensor& weight,
                                                           const Tensor& offsets, bool wants_rows, bool wants_weight,
                                                           bool wants_bias) {
  const Backend backend(rows_in);
  const GroupedArguments a(rows_in, weight, offsets);
  const Tensor rows = a.checked_rows("rows", rows_in, a.in);
  const Tensor grad = a.checked_rows("grad", grad_in, a.out);
  const auto output = [&](bool wanted, const Shape& shape, const Shape& strides) {
    if (!wanted) return empty(rows, {0}, a.type);
    return empty_output(rows, shape, strides, a.type, a.element_bytes);
  };
  const int64_t row_stride = a.transposed ? 1 : a.in, column_stride = a.transposed ? a.out : 1;
  const Tensor grad_rows = output(wants_rows, {a.rows, a.in}, {a.in, 1});
  const Tensor grad_weight = output(wants_weight, {a.experts, a.out, a.in}, {a.out * a.in, row_stride, column_stride});
  const Tensor grad_bias = output(wants_bias, {a.experts, a.out}, {a.out, 1});
  if (wants_rows) run_products(backend, a, grad, a.weight.stride(1), a.weight.stride(2), nullptr, grad_rows);
  if (wants_bias) run_bias_gradient(backend, a, grad, grad_bias);
  if (a.kernels_alone()) {
    if (wants_weight) run_weight_gradient(backend, a, grad, rows, grad_weight);
  } else {
    for_experts(a, wants_weight ? -1 : a.most_rows(grad), [&](int64_t e) {
      const int64_t begin = a.start[e], end = a.start[e + 1];
      const Matrix g = a.matrix(grad).row_range(begin, end);
      if (wants_rows && g.rows > a.most_rows(grad)) {
        multiply(a.matrix(grad_rows).row_range(begin, end), g, a.expert_weight(e), false);
      }
      if (!wants_weight) return;
      const int64_t bytes = a.out * a.in * a.element_bytes;
      if (g.rows == 0) return clear_rows(grad_weight, e, e + 1, bytes);
      const Matrix to{memory_of(grad_weight) + e * bytes, a.type, a.element_bytes, a.out, a.in, row_stride, column_stride};
      multiply(to, g.transposed(), a.matrix(rows).row_range(begin, end), false);
    });
  }
  if (wants_rows) clear_rows(grad_rows, a.end(), a.rows, a.in * a.element_bytes);
  return {grad_rows, grad_weight, grad_bias};
}

}  // namespace topn_gating::binding
