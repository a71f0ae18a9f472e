// Products of groups of rows with one matrix each, and their gradients, on the CPU.
//
// Groups of few rows are thin_groups-inl.h's. The others are multiplied by blocks of a matrix that fit a core's second-level
// cache, packed into panels. Each thread takes the same share of the work, and packs a block once for all of its share.
#pragma once

#include "cpu/panels-inl.h"
#include "cpu/parallel.h"
#include "cpu/thin_groups-inl.h"

namespace topn_gating::cpu::TOPN_LEVEL {
namespace {

constexpr int64_t kBlockTerms = 256;         // rows of a packed block
constexpr int64_t kBlockColumns = 512;       // and its columns, a multiple of every panel
constexpr int64_t kKeptRows = 4 * kTile;     // rows of results that wait to be rounded
constexpr int64_t kUnitTerms = 16;           // terms that take as long as writing a tile of results
constexpr double kSumCost = 0.05;            // of adding a number, for `parallel`

template <class R>
struct Factor {
  const R* data;
  int64_t stride, step;  // from a row to the next, and from a term to the next
};

// Writes the products of `rows` rows with a packed block to `out`, or with `add` adds them. `factor(first, count)` is the
// operand of as many rows.
template <class R, class F>
void multiply_block(int64_t rows, int64_t terms, int64_t columns, const R* block, bool add, R* out, int64_t stride,
                    const F& factor) {
  for (int64_t j = 0; j < columns; j += panel<R>) {
    for_rows(rows, [&](int64_t first, int64_t count) {
      const Factor<R> a = factor(first, count);
      R* to = out + first * stride + j;
      add ? multiply<true>(count, a.data, a.stride, a.step, block + j * kBlockTerms, terms, to, stride)
          : multiply<false>(count, a.data, a.stride, a.step, block + j * kBlockTerms, terms, to, stride);
    });
  }
}

// Calls f(sums, stride, first, count), which computes rows of a block of results that starts at `to`: in place where they are
// whole panels of the compute type, and elsewhere in `kept`, from where they are rounded.
template <class T, class F>
void with_sums(T* to, int64_t stride, int64_t rows, int64_t columns, ComputeType<T>* kept, const F& f) {
  using R = ComputeType<T>;
  if constexpr (std::is_same_v<R, T>) {
    if (columns % panel<R> == 0) return f(to, stride, 0, rows);
  }
  for (int64_t first = 0; first < rows; first += kKeptRows) {
    const int64_t count = std::min(kKeptRows, rows - first);
    f(kept, kBlockColumns, first, count);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t c = 0; c < columns; c += width<R>) {
        store_padded(to + (first + r) * stride + c, 0, columns - c, load<Vector<R>>(kept + r * kBlockColumns + c));
      }
    }
  }
}

// Computes tiles of rows of results in a block of columns.
template <class T>
class RowsProduct {
 public:
  using R = ComputeType<T>;

  explicit RowsProduct(const GroupedLinear& args)
      : a_(args), block_(kBlockTerms * kBlockColumns), x_(kTile * kBlockTerms), kept_(kKeptRows * kBlockColumns) {}

  static int64_t tiles(const GroupedLinear& a, int64_t group) {
    const int64_t rows = a.start[group + 1] - a.start[group];
    return rows > most_thin_rows(a) && rows <= a.most_rows ? ceil_div(rows, kTile) : 0;
  }
  static int64_t terms(const GroupedLinear& a, int64_t) { return a.in; }

  void run(int64_t group, int64_t column, int64_t first_tile, int64_t last_tile) {
    const int64_t columns = std::min(kBlockColumns, a_.out - column), begin = a_.start[group] + first_tile * kTile;
    const int64_t rows = std::min<int64_t>(a_.start[group + 1] - begin, (last_tile - first_tile) * kTile);
    T* to = static_cast<T*>(a_.result) + begin * a_.out + column;
    with_sums(to, a_.out, rows, columns, static_cast<R*>(kept_), [&](R* sums, int64_t stride, int64_t first, int64_t count) {
      if (a_.bias != nullptr) {
        const T* bias = static_cast<const T*>(a_.bias) + group * a_.out + column;
        for (int64_t r = 0; r < count; ++r) {
          for (int64_t c = 0; c < columns; c += width<R>) {
            store(sums + r * stride + c, load_padded<R>(bias + c, 0, columns - c));
          }
        }
      }
      for (int64_t term = 0; term < a_.in; term += kBlockTerms) {
        const int64_t terms = std::min(kBlockTerms, a_.in - term);
        pack_weight(group, term, terms, column, columns);
        for (int64_t t = 0; t < count; t += kTile) {
          const int64_t tile = std::min(kTile, count - t);
          const Factor<R> x = rows_from(begin + first + t, tile, term, terms);
          multiply_block<R>(tile, terms, columns, block_, term > 0 || a_.bias != nullptr, sums + t * stride, stride,
                            [&](int64_t row, int64_t) { return Factor<R>{x.data + row * x.stride, x.stride, x.step}; });
        }
      }
    });
  }

 private:
  void pack_weight(int64_t group, int64_t term, int64_t terms, int64_t column, int64_t columns) {
    const int64_t* stride = a_.weight_strides;
    const T* weight = static_cast<const T*>(a_.weight) + group * stride[0] + term * stride[1] + column * stride[2];
    if (stride[2] == 1) {
      pack(weight, terms, stride[1], columns, static_cast<R*>(block_), kBlockTerms);
    } else {
      pack_columns(weight, terms, stride[2], columns, static_cast<R*>(block_), kBlockTerms);
    }
  }

  Factor<R> rows_from(int64_t row, int64_t count, int64_t term, int64_t terms) {
    const T* rows = static_cast<const T*>(a_.rows) + row * a_.row_stride + term;
    if constexpr (std::is_same_v<R, T>) {
      return {rows, a_.row_stride, 1};
    } else {
      for (int64_t r = 0; r < count; ++r) convert(rows + r * a_.row_stride, terms, x_ + r * kBlockTerms);
      return {x_, kBlockTerms, 1};
    }
  }

  const GroupedLinear& a_;
  Scratch<R> block_;  // panels of (terms, columns)
  Scratch<R> x_;      // (tile, terms)
  Scratch<R> kept_;   // (rows, columns)
};

// Computes tiles of rows of the sums of outer products in a block of columns.
template <class T>
class OuterProduct {
 public:
  using R = ComputeType<T>;

  explicit OuterProduct(const GroupedOuter& args)
      : a_(args), block_(kBlockTerms * kBlockColumns), left_(kTile * kBlockTerms), row_(round_up(kTile, width<R>)),
        kept_(kKeptRows * kBlockColumns) {}

  static int64_t tiles(const GroupedOuter& a, int64_t) { return ceil_div(a.in, kTile); }
  static int64_t terms(const GroupedOuter& a, int64_t group) { return a.start[group + 1] - a.start[group] + kUnitTerms; }

  void run(int64_t group, int64_t column, int64_t first_tile, int64_t last_tile) {
    const int64_t columns = std::min(kBlockColumns, a_.out - column), begin = first_tile * kTile;
    const int64_t rows = std::min(a_.in, last_tile * kTile) - begin, end_term = a_.start[group + 1];
    T* to = static_cast<T*>(a_.result) + (group * a_.in + begin) * a_.out + column;
    with_sums(to, a_.out, rows, columns, static_cast<R*>(kept_), [&](R* sums, int64_t stride, int64_t first, int64_t count) {
      for (int64_t r = 0; r < count; ++r) std::fill_n(sums + r * stride, columns, R(0));
      for (int64_t term = a_.start[group]; term < end_term; term += kBlockTerms) {
        const int64_t terms = std::min(kBlockTerms, end_term - term);
        const T* right = static_cast<const T*>(a_.right) + term * a_.right_stride + column;
        pack(right, terms, a_.right_stride, columns, static_cast<R*>(block_), kBlockTerms);
        for (int64_t t = 0; t < count; t += kTile) {
          const int64_t tile = std::min(kTile, count - t);
          pack_left(term, terms, begin + first + t, tile);
          multiply_block<R>(tile, terms, columns, block_, true, sums + t * stride, stride, [&](int64_t row, int64_t at_once) {
            return Factor<R>{left_ + row * terms, 1, at_once};
          });
        }
      }
    });
  }

 private:
  // Packs columns of the left rows, in the parts that are multiplied at once: the numbers of a term and part are contiguous.
  void pack_left(int64_t term, int64_t terms, int64_t column, int64_t columns) {
    int64_t part[kTile / kRows + 1] = {}, parts = 0;
    for_rows(columns, [&](int64_t first, int64_t count) { part[++parts] = first + count; });
    for (int64_t i = 0; i < terms; ++i) {
      const T* elements = static_cast<const T*>(a_.left) + (term + i) * a_.left_stride + column;
      const R* from = row_;
      if constexpr (std::is_same_v<R, T>) {
        from = elements;
      } else {
        convert(elements, columns, static_cast<R*>(row_));
      }
      for (int64_t p = 0; p < parts; ++p) {
        const int64_t first = part[p], count = part[p + 1] - first;
        R* to = left_ + first * terms + i * count;
        if (count == kRows) {
          std::memcpy(to, from + first, kRows * sizeof(R));  // of a constant size: two instructions
        } else {
          std::copy_n(from + first, count, to);
        }
      }
    }
  }

  const GroupedOuter& a_;
  Scratch<R> block_;  // panels of (terms, columns)
  Scratch<R> left_;   // (tile, terms), as pack_left writes it
  Scratch<R> row_;    // (tile)
  Scratch<R> kept_;   // (rows, columns)
};

// Divides the tiles of all groups and blocks among threads, in equal shares by the number of terms, and runs them.
template <class Product, class Args>
void run_tiles(const Args& a, ParallelFor parallel_for) {
  const int64_t blocks = ceil_div(a.out, kBlockColumns);
  Scratch<int64_t> end(a.groups + 1);  // terms of the tiles of all groups before each
  end[0] = 0;
  for (int64_t g = 0; g < a.groups; ++g) end[g + 1] = end[g] + Product::tiles(a, g) * blocks * Product::terms(a, g);
  const double cost = kTermCost * double(kTile * std::min(a.out, kBlockColumns));
  parallel(parallel_for, end[a.groups], cost, [&](int64_t first_term, int64_t last_term) {
    Product product(a);
    for (int64_t g = 0; g < a.groups; ++g) {
      if (end[g + 1] <= first_term || end[g] >= last_term) continue;
      // A tile is of the share in which it starts.
      const int64_t tiles = Product::tiles(a, g), terms = Product::terms(a, g);
      int64_t tile = ceil_div(std::max<int64_t>(0, first_term - end[g]), terms);
      const int64_t last = ceil_div(std::min(last_term, int64_t(end[g + 1])) - end[g], terms);
      while (tile < last) {
        const int64_t block = tile / tiles, count = std::min(last, (block + 1) * tiles) - tile;
        product.run(g, block * kBlockColumns, tile % tiles, tile % tiles + count);
        tile += count;
      }
    }
  });
}

}  // namespace

void run(const GroupedLinear& a, ParallelFor parallel_for) {
  with_type(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    run_thin<T>(a, parallel_for);
    run_tiles<RowsProduct<T>>(a, parallel_for);
  });
}

void run(const GroupedOuter& a, ParallelFor parallel_for) {
  with_type(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    run_tiles<OuterProduct<T>>(a, parallel_for);
  });
}

void run(const GroupedSum& a, ParallelFor parallel_for) {
  with_type(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    using R = ComputeType<T>;
    const double rows = double(a.start[a.groups] - a.start[0]) / double(a.groups);
    parallel(parallel_for, a.groups, kSumCost * (rows + 1) * double(a.columns), [&](int64_t begin, int64_t end) {
      Scratch<R> sum(round_up(a.columns, width<R>));
      for (int64_t g = begin; g < end; ++g) {
        std::fill_n(static_cast<R*>(sum), round_up(a.columns, width<R>), R(0));
        for (int64_t row = a.start[g]; row < a.start[g + 1]; ++row) {
          const T* elements = static_cast<const T*>(a.rows) + row * a.row_stride;
          for (int64_t c = 0; c < a.columns; c += width<R>) {
            store(sum + c, load<Vector<R>>(sum + c) + load_padded<R>(elements + c, 0, a.columns - c));
          }
        }
        T* to = static_cast<T*>(a.result) + g * a.columns;
        for (int64_t c = 0; c < a.columns; c += width<R>) store_padded(to + c, 0, a.columns - c, load<Vector<R>>(sum + c));
      }
    });
  });
}

}  // namespace topn_gating::cpu::TOPN_LEVEL
