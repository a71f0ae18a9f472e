// Rows of several tokens to and from columns, in which each token has a lane of its own.
#pragma once

#include "cpu/half.h"

namespace TOPN_NAMESPACE {

// Of two rows whose numbers differ in the bit `By`, a without it: lanes with the bit change places with b's without it. High:
// what becomes of b.
template <int By, bool High, class V, int... Lane>
TOPN_INLINE V exchange(V a, V b, std::integer_sequence<int, Lane...>) {
  constexpr int w = sizeof...(Lane);
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (Lane & By ? w + Lane - !High * By : Lane + High * By)...);
#else
  using Int = std::conditional_t<sizeof(a[0]) == 4, int32_t, int64_t>;
  return __builtin_shuffle(a, b, Vector<Int, w>{(Lane & By ? w + Lane - !High * By : Lane + High * By)...});
#endif
}

// Of as many rows as lanes.
template <int By, class V>
TOPN_INLINE void transpose(V* rows) {
  constexpr int w = int(sizeof(V) / sizeof(rows[0][0]));
  constexpr std::make_integer_sequence<int, w> lanes{};
  if constexpr (By > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < w; ++i) {
      if (i & By) continue;
      const V low = exchange<By, false>(rows[i], rows[i + By], lanes);
      rows[i + By] = exchange<By, true>(rows[i], rows[i + By], lanes);
      rows[i] = low;
    }
    transpose<By / 2>(rows);
  }
}

// Column i gets element i of each of `count` rows of `size` elements, side by side from `rows` on; lanes without a row repeat
// the last. `columns` has room for a multiple of the width, `end` is where the tensor ends.
template <class R, class T>
TOPN_INLINE void load_columns(const T* rows, int count, int size, const T* end, Vector<R>* columns) {
  constexpr int w = width<R>;
  const T* row[w];
  for (int l = 0; l < w; ++l) row[l] = rows + std::min(l, count - 1) * int64_t(size);
  if constexpr (std::is_same_v<R, RealOf<T>>) {
    int i = 0;
    // Past the row's end lies the next row, whose elements go to columns that nobody reads.
    for (; i < size && end - row[w - 1] >= i + w; i += w) {
      Vector<R> block[w];
#pragma GCC unroll 16
      for (int l = 0; l < w; ++l) block[l] = load_real(row[l] + i);
      transpose<w / 2>(block);
#pragma GCC unroll 16
      for (int l = 0; l < w; ++l) columns[i + l] = block[l];
    }
    for (; i < size; ++i) {
      for (int l = 0; l < w; ++l) columns[i][l] = load_one(row[l] + i);
    }
  } else {
    for (int i = 0; i < size; ++i) {
      for (int l = 0; l < w; ++l) columns[i][l] = load_one(row[l] + i);
    }
  }
}

// The way back, to `count` rows.
template <class R, class T>
TOPN_INLINE void store_columns(const Vector<R>* columns, int count, int size, T* rows) {
  constexpr int w = width<R>;
  if constexpr (std::is_same_v<R, RealOf<T>>) {
    for (int i = 0; i < size; i += w) {
      Vector<R> block[w];
#pragma GCC unroll 16
      for (int l = 0; l < w; ++l) block[l] = columns[i + l];
      transpose<w / 2>(block);
      const int part = std::min(w, size - i);
      for (int l = 0; l < count; ++l) {
        T* to = rows + l * int64_t(size) + i;
        if (part == w) {
          store_real(to, block[l]);
        } else {
          T whole[w];
          store_real(whole, block[l]);
          std::memcpy(to, whole, part * sizeof(T));
        }
      }
    }
  } else {
    for (int i = 0; i < size; ++i) {
      for (int l = 0; l < count; ++l) store_one(rows + l * int64_t(size) + i, RealOf<T>(columns[i][l]));
    }
  }
}

}  // namespace TOPN_NAMESPACE
