// Conversion between rows of several tokens in memory and vectors in which each token has a lane (VectorLayout).
#pragma once

#include "cpu/element.h"

namespace topn_gating::cpu::TOPN_LEVEL {

// One step of a transposition. a and b are the rows i and i + By, where i has not the bit By. Returns the new row i or, if
// `Upper`, the new row i + By: lanes of a with the bit By and lanes of b without it have changed places.
template <int By, bool Upper, class V, int... Lane>
TOPN_INLINE V exchange(V a, V b, std::integer_sequence<int, Lane...>) {
  constexpr int w = sizeof...(Lane);
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (Lane & By ? w + Lane - !Upper * By : Lane + Upper * By)...);
#else
  using Int = std::conditional_t<sizeof(a[0]) == 4, int32_t, int64_t>;
  return __builtin_shuffle(a, b, Vector<Int, w>{(Lane & By ? w + Lane - !Upper * By : Lane + Upper * By)...});
#endif
}

// Transposes a square matrix, one row per vector, in place. Call it with By = half the number of lanes.
template <int By, class V>
TOPN_INLINE void transpose(V* rows) {
  constexpr int w = int(sizeof(V) / sizeof(rows[0][0]));
  constexpr std::make_integer_sequence<int, w> lanes{};
  if constexpr (By > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < w; ++i) {
      if (i & By) continue;
      const V lower = exchange<By, false>(rows[i], rows[i + By], lanes);
      rows[i + By] = exchange<By, true>(rows[i], rows[i + By], lanes);
      rows[i] = lower;
    }
    transpose<By / 2>(rows);
  }
}

// Reads `count` rows of `size` elements, contiguous from `rows` on, so that lane l of columns[i] is element i of row l; lanes
// without a row repeat the last row. `columns` has room for `size` rounded up to a multiple of the width. Nothing at or past
// `end`, the end of the tensor, is read.
template <class Scalar, class T>
TOPN_INLINE void load_columns(const T* rows, int count, int size, const T* end, Vector<Scalar>* columns) {
  constexpr int w = width<Scalar>;
  const T* row[w];
  for (int l = 0; l < w; ++l) row[l] = rows + std::min(l, count - 1) * int64_t(size);
  if constexpr (std::is_same_v<Scalar, ComputeType<T>>) {
    int i = 0;
    // A vector may reach past the row's end into the next row: those elements go to columns that nobody reads.
    for (; i < size && end - row[w - 1] >= i + w; i += w) {
      Vector<Scalar> block[w];
#pragma GCC unroll 16
      for (int l = 0; l < w; ++l) block[l] = load_elements(row[l] + i);
      transpose<w / 2>(block);
#pragma GCC unroll 16
      for (int l = 0; l < w; ++l) columns[i + l] = block[l];
    }
    for (; i < size; ++i) {
      for (int l = 0; l < w; ++l) columns[i][l] = load_element(row[l] + i);
    }
  } else {
    for (int i = 0; i < size; ++i) {
      for (int l = 0; l < w; ++l) columns[i][l] = load_element(row[l] + i);
    }
  }
}

// Writes `count` rows of `size` elements: the inverse of load_columns.
template <class Scalar, class T>
TOPN_INLINE void store_columns(const Vector<Scalar>* columns, int count, int size, T* rows) {
  constexpr int w = width<Scalar>;
  if constexpr (std::is_same_v<Scalar, ComputeType<T>>) {
    for (int i = 0; i < size; i += w) {
      Vector<Scalar> block[w];
#pragma GCC unroll 16
      for (int l = 0; l < w; ++l) block[l] = columns[i + l];
      transpose<w / 2>(block);
      const int left = std::min(w, size - i);
      for (int l = 0; l < count; ++l) {
        T* to = rows + l * int64_t(size) + i;
        if (left == w) {
          store_elements(to, block[l]);
        } else {
          T padded[w];
          store_elements(padded, block[l]);
          std::memcpy(to, padded, left * sizeof(T));
        }
      }
    }
  } else {
    for (int i = 0; i < size; ++i) {
      for (int l = 0; l < count; ++l) store_element(rows + l * int64_t(size) + i, ComputeType<T>(columns[i][l]));
    }
  }
}

}  // namespace topn_gating::cpu::TOPN_LEVEL
