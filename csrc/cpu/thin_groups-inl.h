// Products of groups of few rows with one matrix each, on the CPU.
//
// A matrix is read once, or once for each kThinRows rows, in the order in which it lies in memory, and multiplied by all of
// these rows while it is in registers: a product of so few rows takes the time of reading the matrix.
#pragma once

#include "cpu/element.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace topn_gating::cpu::TOPN_LEVEL {
namespace {

constexpr int64_t kMostThinRows = 32;          // of a group of few rows: up to so many, this was faster than panels
constexpr int kThinRows = 8;                   // rows multiplied at once
constexpr int kThinTerms = 8;                  // rows of a matrix that are multiplied at once where a column is strided
constexpr int64_t kThinBytes = 1 << 17;        // bytes of a part of a matrix, which a second-level cache holds
constexpr int64_t kThinColumns = 512;          // columns of a part at least where a column is strided: they are read in one go
constexpr double kThinByteCost = 0.02;         // of reading a byte of a matrix, for `parallel`
constexpr int kSums = TOPN_VECTOR_BYTES == 64 ? 24 : 10;  // vectors of sums that the registers hold beside operands

// Returns the most rows of a group that counts as one of few rows.
inline int64_t most_thin_rows(const GroupedLinear& a) { return std::min(a.most_rows, kMostThinRows); }

// Columns of a matrix that are multiplied by `rows` rows at once.
constexpr int thin_columns(int rows) { return kSums / rows < 1 ? 1 : kSums / rows > 8 ? 8 : kSums / rows; }

// Writes out[r * out_stride + c] = Σ_i rows[r * stride + i] w[c * column_stride + i] for r < Rows and c < Columns. The rows have
// zeros after the last term, up to a whole vector.
template <int Rows, int Columns, class T, class R>
__attribute__((noinline)) void dot_columns(const R* rows, int64_t stride, const T* w, int64_t column_stride, int64_t terms,
                                           R* out, int64_t out_stride) {
  using V = Vector<R>;
  V total[Rows][Columns] = {};
  const int64_t whole = terms / width<R> * width<R>;
  for (int64_t i = 0; i < whole; i += width<R>) {
    V column[Columns];
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c) column[c] = load_elements(w + c * column_stride + i);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const V row = load<V>(rows + r * stride + i);
#pragma GCC unroll 8
      for (int c = 0; c < Columns; ++c) total[r][c] += row * column[c];
    }
  }
  R lanes[Rows][Columns][width<R>];  // in memory, so that the sums above stay in registers
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c) store(lanes[r][c], total[r][c]);
  }
  for (int r = 0; r < Rows; ++r) {
    for (int c = 0; c < Columns; ++c) {
      auto sum = load<V>(lanes[r][c]);
      if (whole < terms) {
        sum += load<V>(rows + r * stride + whole) * load_padded<R>(w + c * column_stride + whole, 0, terms - whole);
      }
      out[r * out_stride + c] = sum_lanes(sum);
    }
  }
}

// Adds Σ_t rows[r * stride + t] w[t * term_stride + c] to out[r * out_stride + c] for t < Terms, r < Rows and c < columns. `out`
// has room for whole vectors.
template <int Rows, int Terms, class T, class R>
__attribute__((noinline)) void add_terms(const R* rows, int64_t stride, const T* w, int64_t term_stride, int64_t columns, R* out,
                                         int64_t out_stride) {
  using V = Vector<R>;
  R factor[Rows][Terms];  // at constant addresses
  for (int r = 0; r < Rows; ++r) std::memcpy(factor[r], rows + r * stride, sizeof factor[r]);
  const auto add = [&](int64_t c, const auto& load_term) {
    V term[Terms];
#pragma GCC unroll 8
    for (int t = 0; t < Terms; ++t) term[t] = load_term(w + t * term_stride + c);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      V total = load<V>(out + r * out_stride + c);
#pragma GCC unroll 8
      for (int t = 0; t < Terms; ++t) total += (factor[r][t] - V{}) * term[t];  // a broadcast, as in linear-inl.h
      store(out + r * out_stride + c, total);
    }
  };
  int64_t c = 0;
  for (; c + width<R> <= columns; c += width<R>) add(c, [](const T* p) { return load_elements(p); });
  if (c < columns) add(c, [=](const T* p) { return load_padded<R>(p, 0, columns - c); });
}

// How the matrices are divided among threads: into parts of columns.
struct ThinPlan {
  Scratch<int64_t> groups;  // those of few rows
  int64_t count = 0;        // of these groups
  int64_t columns, parts;   // columns of a part, parts of a matrix
  bool by_columns;          // whether a column of a matrix is contiguous

  explicit ThinPlan(const GroupedLinear& a) : groups(a.groups), by_columns(a.weight_strides[1] == 1) {
    for (int64_t g = 0; g < a.groups; ++g) {
      const int64_t rows = a.start[g + 1] - a.start[g];
      if (rows > 0 && rows <= most_thin_rows(a)) groups[count++] = g;
    }
    columns = std::max<int64_t>(by_columns ? 8 : kThinColumns, kThinBytes / (a.in * element_bytes(a.dtype)));
    parts = ceil_div(a.out, columns);
    columns = round_up(ceil_div(a.out, parts), 8);
    parts = ceil_div(a.out, columns);
  }
};

// Computes the results of a group in a part of the columns.
template <class T>
class ThinProduct {
 public:
  ThinProduct(const GroupedLinear& args, const ThinPlan& plan)
      : a_(args), plan_(plan), in_(round_up(a_.in, width<R>)), out_(round_up(plan.columns, width<R>)), rows_(kThinRows * in_),
        sums_(kThinRows * out_) {}

  void run(int64_t group, int64_t part) {
    const int64_t end = a_.start[group + 1], column = part * plan_.columns;
    const int64_t columns = std::min(plan_.columns, a_.out - column);
    const T* weight = static_cast<const T*>(a_.weight) + group * a_.weight_strides[0] + column * a_.weight_strides[2];
    int64_t row = a_.start[group];
    for (int64_t chunks = ceil_div(end - row, kThinRows); chunks > 0; --chunks) {
      const int64_t rows = ceil_div(end - row, chunks);
      for (int64_t r = 0; r < rows; ++r) {
        convert(static_cast<const T*>(a_.rows) + (row + r) * a_.row_stride, a_.in, rows_ + r * in_);
        std::fill_n(rows_ + r * in_ + a_.in, in_ - a_.in, R(0));
      }
      multiply_thin<kThinRows>(rows, weight, columns);
      for (int64_t r = 0; r < rows; ++r) finish(group, row + r, column, columns, sums_ + r * out_);
      row += rows;
    }
  }

 private:
  using R = ComputeType<T>;

  template <int Rows>
  void multiply_thin(int64_t rows, const T* weight, int64_t columns) {
    if constexpr (Rows > 1) {
      if (rows < Rows) return multiply_thin<Rows - 1>(rows, weight, columns);
    }
    if (plan_.by_columns) {
      constexpr int at_once = thin_columns(Rows);
      const int64_t stride = a_.weight_strides[2];
      int64_t c = 0;
      for (; c + at_once <= columns; c += at_once) {
        dot_columns<Rows, at_once, T, R>(rows_, in_, weight + c * stride, stride, a_.in, sums_ + c, out_);
      }
      for (; c < columns; ++c) dot_columns<Rows, 1, T, R>(rows_, in_, weight + c * stride, stride, a_.in, sums_ + c, out_);
      return;
    }
    const int64_t stride = a_.weight_strides[1];
    std::fill_n(static_cast<R*>(sums_), Rows * out_, R(0));
    int64_t t = 0;
    for (; t + kThinTerms <= a_.in; t += kThinTerms) {
      add_terms<Rows, kThinTerms, T, R>(rows_ + t, in_, weight + t * stride, stride, columns, sums_, out_);
    }
    for (; t < a_.in; ++t) add_terms<Rows, 1, T, R>(rows_ + t, in_, weight + t * stride, stride, columns, sums_, out_);
  }

  // Adds the bias to sums of a row, and writes them.
  void finish(int64_t group, int64_t row, int64_t column, int64_t columns, const R* sums) const {
    T* to = static_cast<T*>(a_.result) + row * a_.out + column;
    const T* bias = a_.bias == nullptr ? nullptr : static_cast<const T*>(a_.bias) + group * a_.out + column;
    for (int64_t c = 0; c < columns; c += width<R>) {
      auto sum = load<Vector<R>>(sums + c);
      if (bias != nullptr) sum += load_padded<R>(bias + c, 0, columns - c);
      store_padded(to + c, 0, columns - c, sum);
    }
  }

  const GroupedLinear& a_;
  const ThinPlan& plan_;
  int64_t in_, out_;  // sizes of a row and of its sums, rounded up to whole vectors
  Scratch<R> rows_;   // (kThinRows, in_)
  Scratch<R> sums_;   // (kThinRows, out_)
};

// Computes the results of the groups of few rows.
template <class T>
void run_thin(const GroupedLinear& a, ParallelFor parallel_for) {
  const ThinPlan plan(a);
  const double bytes = double(a.in * plan.columns) * sizeof(T);
  parallel(parallel_for, plan.count * plan.parts, kThinByteCost * bytes, [&](int64_t begin, int64_t end) {
    ThinProduct<T> product(a, plan);
    for (int64_t i = begin; i < end; ++i) product.run(plan.groups[i / plan.parts], i % plan.parts);
  });
}

}  // namespace
}  // namespace topn_gating::cpu::TOPN_LEVEL
