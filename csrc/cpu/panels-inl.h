// Products of matrices on the CPU, for sizes and types whose products are slow in torch. The second matrix is packed into
// panels: the columns that are processed at once, row after row, with zeros past the last column.
#pragma once

#include "cpu/element.h"
#include "cpu/scratch.h"
#include "cpu/transpose.h"

namespace topn_gating::cpu::TOPN_LEVEL {
namespace {

constexpr int kVectors = 2;  // vectors of a panel
constexpr int kRows = 6;     // rows processed at once: kRows * kVectors sums hide an addition's latency and fit the registers
template <class R>
constexpr int panel = kVectors * width<R>;

constexpr int64_t kTile = 11 * kRows;  // rows whose operands fit a core's second-level cache beside panels
constexpr double kTermCost = 0.013;    // of a product of two numbers, for `parallel`

// Writes out[r * out_stride + column] = Σ_i a[r * stride + i * step] b[i][column] for r < Rows and the columns of a panel b, or
// with Add adds the sums to it. It is not inlined, so that the sums stay in registers whatever the caller does with them.
template <int Rows, bool Add, class R>
__attribute__((noinline)) void multiply_rows(const R* a, int64_t stride, int64_t step, const R* b, int64_t terms, R* out,
                                             int64_t out_stride) {
  using V = Vector<R>;
  V total[Rows][kVectors] = {};
  if constexpr (Add) {
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) total[r][v] = load<V>(out + r * out_stride + v * width<R>);
    }
  }
  for (int64_t i = 0; i < terms; ++i) {
    V column[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) column[v] = load<V>(b + i * panel<R> + v * width<R>);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const V factor = a[r * stride + i * step] - V{};  // a broadcast; adding a zero would take an instruction
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) total[r][v] += factor * column[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(out + r * out_stride + v * width<R>, total[r][v]);
  }
}

// Does the same for r < rows, where rows <= kRows.
template <bool Add, class R>
void multiply(int64_t rows, const R* a, int64_t stride, int64_t step, const R* b, int64_t terms, R* out, int64_t out_stride) {
  switch (rows) {
    case 1: return multiply_rows<1, Add>(a, stride, step, b, terms, out, out_stride);
    case 2: return multiply_rows<2, Add>(a, stride, step, b, terms, out, out_stride);
    case 3: return multiply_rows<3, Add>(a, stride, step, b, terms, out, out_stride);
    case 4: return multiply_rows<4, Add>(a, stride, step, b, terms, out, out_stride);
    case 5: return multiply_rows<5, Add>(a, stride, step, b, terms, out, out_stride);
    default: return multiply_rows<kRows, Add>(a, stride, step, b, terms, out, out_stride);
  }
}

// Runs f(first, rows) on parts of at most kRows rows that are about equally large: a small part would wait for its additions.
template <class F>
TOPN_INLINE void for_rows(int64_t count, const F& f) {
  int64_t first = 0;
  for (int64_t parts = ceil_div(count, kRows); parts > 0; --parts) {
    const int64_t rows = ceil_div(count - first, parts);
    f(first, rows);
    first += rows;
  }
}

// Packs `count` rows of `columns` elements, `stride` elements apart, into panels. A panel has room for `room` rows.
template <class R, class T>
void pack(const T* rows, int64_t count, int64_t stride, int64_t columns, R* panels, int64_t room) {
  for (int64_t i = 0; i < count; ++i) {
    const T* row = rows + i * stride;
    R* to = panels + i * panel<R>;
    int64_t j = 0;
    for (; j + panel<R> <= columns; j += panel<R>, to += room * panel<R>) {
      for (int v = 0; v < kVectors; ++v) store(to + v * width<R>, load_elements(row + j + v * width<R>));
    }
    if (j == columns) continue;
    for (int v = 0; v < kVectors; ++v) store(to + v * width<R>, load_padded<R>(row + j, v, columns - j));
  }
}

// Does the same with a matrix whose columns are contiguous, `stride` elements apart: packs `count` rows of `columns` elements.
template <class R, class T>
void pack_columns(const T* matrix, int64_t count, int64_t stride, int64_t columns, R* panels, int64_t room) {
  constexpr int w = width<R>;
  for (int64_t j = 0; j < round_up(columns, panel<R>); j += w) {
    R* to = panels + j / panel<R> * room * panel<R> + j % panel<R>;
    for (int64_t i = 0; i < count; i += w) {
      Vector<R> block[w];
#pragma GCC unroll 16
      for (int l = 0; l < w; ++l) {
        block[l] = j + l < columns ? load_padded<R>(matrix + (j + l) * stride + i, 0, count - i) : Vector<R>{};
      }
      transpose<w / 2>(block);
      for (int l = 0; l < std::min<int64_t>(w, count - i); ++l) store(to + (i + l) * panel<R>, block[l]);
    }
  }
}

}  // namespace
}  // namespace topn_gating::cpu::TOPN_LEVEL
