// Rows of d features: what `dispatch`, `combine` and `dense` share.
#pragma once

#include "assignment.h"
#include "cpu/element.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/stream.h"

namespace topn_gating::cpu::TOPN_LEVEL {

// The rows of an output. They are written with non-temporal stores where the output is large and each row begins at a cache line.
struct OutputRows {
  char* data;
  int64_t bytes;  // bytes of a row
  bool nontemporal;

  OutputRows(void* rows, int64_t count, int64_t row_bytes)
      : data(static_cast<char*>(rows)), bytes(row_bytes),
        nontemporal(count * row_bytes >= kNontemporalBytes && row_bytes % kLine == 0 &&
                    reinterpret_cast<uintptr_t>(rows) % kLine == 0) {
    if (nontemporal) advise_huge_pages(rows, count * row_bytes);
  }

  template <class T>
  T* row(int64_t i) const {
    return reinterpret_cast<T*>(data + i * bytes);
  }
  void clear(int64_t i) const { clear_lines(row<char>(i), row<char>(i + 1), nontemporal); }
  void copy(int64_t i, const char* from) const { copy_lines(row<char>(i), from, bytes, nontemporal); }
};

inline int64_t num_rows(const Assignment& a) { return a.groups * a.rows; }

// Runs f(first, last) on ranges of tokens, in parallel. A token's cost is that of its row and of one row for each slot that it
// may hold.
template <class F>
void parallel_tokens(const Assignment& a, int64_t row_bytes, ParallelFor parallel_for, const F& f) {
  const int64_t tokens = a.groups * a.tokens;
  const double slots = double(num_rows(a)) / double(std::max<int64_t>(1, tokens));
  const double rows = 1 + std::min(slots, double(a.top_n));
  parallel(parallel_for, tokens, 0.03 * double(row_bytes) * rows + 5 * double(a.top_n), [&](int64_t begin, int64_t end) {
    f(begin, end);
    fence_nontemporal_stores();
  });
}

// Does the same, and runs rows(first, last) on ranges of the experts' rows: each part of the loop gets its share of both.
template <class F, class Rows>
void parallel_tokens_and_rows(const Assignment& a, int64_t row_bytes, ParallelFor parallel_for, const F& f, const Rows& rows) {
  const int64_t tokens = a.groups * a.tokens, count = num_rows(a);
  if (tokens == 0) return rows(0, count);
  parallel_tokens(a, row_bytes, parallel_for, [&](int64_t begin, int64_t end) {
    f(begin, end);
    rows(begin * count / tokens, end * count / tokens);
  });
}

// Writes zeros to the rows of free slots.
inline void clear_free_rows(const Assignment& a, const OutputRows& rows, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (a.source[row] < 0 || holding_pair(a, row / a.rows, row) < 0) rows.clear(row);
  }
}

// The rows whose slots a token's pairs hold, in the order of the ranks.
struct HeldRows {
  int64_t count = 0;
  Scratch<int64_t> row, pair;  // indices over all groups

  explicit HeldRows(int64_t top_n) : row(top_n), pair(top_n) {}

  // `token` is an index over all groups.
  void find(const Assignment& a, int64_t token) {
    count = 0;
    const int64_t group = token / a.tokens, first = group * a.tokens * a.top_n;
    for (int64_t i = token * a.top_n; i < (token + 1) * a.top_n; ++i) {
      const int64_t held = held_row(a, group, i - first);
      if (held < 0) continue;
      row[count] = held;
      pair[count++] = i;
    }
  }
};

// `Count` vectors of features. Of two vectors of a 16-bit type, the first has the features of even index and the second those
// of odd index, as they lie in 32-bit words: no kernel here depends on which feature is where.
template <class T, int Count>
struct Features {
  using V = Vector<ComputeType<T>>;
  static constexpr int w = width<ComputeType<T>>, count = Count;
  V v[Count];  // zeros in `Features{}`

  TOPN_INLINE void load(const T* p) {
    if constexpr (sizeof(T) == 2 && Count % 2 == 0) {
      for (int u = 0; u < Count; u += 2) {
        const Words words = TOPN_LEVEL::load<Words>(p + u * w);
        v[u] = decode(p, words & 0xffffu);
        v[u + 1] = decode(p, words >> 16);
      }
    } else {
      for (int u = 0; u < Count; ++u) v[u] = load_elements(p + u * w);
    }
  }
  TOPN_INLINE void store(T* p, bool nontemporal) const {
    if constexpr (sizeof(T) == 2 && Count % 2 == 0) {
      for (int u = 0; u < Count; u += 2) store_vector(p + u * w, encode(p, v[u]) | encode(p, v[u + 1]) << 16, nontemporal);
    } else {
      for (int u = 0; u < Count; ++u) store_vector(p + u * w, to_elements(p, v[u]), nontemporal);
    }
  }

 private:
  template <class Elements>
  static TOPN_INLINE void store_vector(T* p, Elements elements, bool nontemporal) {
    if (nontemporal) {
      store_nontemporal(p, elements);
    } else {
      TOPN_LEVEL::store(p, elements);
    }
  }
};

// Runs f(features, load, store) on successive features of a row: four vectors at a time, then one, then the rest, padded with
// zeros. load(row) returns the features of a row as a type F, store(row, F) writes them, and `features` is an F of zeros.
template <class T, class F>
TOPN_INLINE void for_features(int64_t dim, bool nontemporal, const F& f) {
  constexpr int w = width<ComputeType<T>>;
  int64_t j = 0;
  const auto run_on = [&](auto zeros) {
    using Some = decltype(zeros);
    f(
        Some{},
        [&](const T* row) {
          Some features;
          features.load(row + j);
          return features;
        },
        [&](T* row, const Some& features) { features.store(row + j, nontemporal); });
  };
  for (; j + 4 * w <= dim; j += 4 * w) run_on(Features<T, 4>{});
  for (; j + w <= dim; j += w) run_on(Features<T, 1>{});
  if (j == dim) return;
  using One = Features<T, 1>;
  const int64_t bytes = (dim - j) * int64_t(sizeof(T));
  f(
      One{},
      [&](const T* row) {
        T padded[w] = {};
        std::memcpy(padded, row + j, bytes);
        One features;
        features.load(padded);
        return features;
      },
      [&](T* row, const One& features) {
        T padded[w];
        features.store(padded, false);
        std::memcpy(row + j, padded, bytes);
      });
}

// Writes out[j] = Σ_i scale[pair_i] rows[row_i][j], in the order of the ranks. A null scale is 1.
template <class T>
void sum_rows(const T* rows, const HeldRows& held, const ComputeType<T>* scale, int64_t dim, T* out, bool nontemporal) {
  for_features<T>(dim, nontemporal, [&](auto total, const auto& load, const auto& store) {
    for (int64_t i = 0; i < held.count; ++i) {
      const auto row = load(rows + held.row[i] * dim);
      const ComputeType<T> factor = scale == nullptr ? ComputeType<T>(1) : scale[held.pair[i]];
      for (int u = 0; u < total.count; ++u) total.v[u] += factor * row.v[u];
    }
    store(out, total);
  });
}

// Σ_j a[j] b[j], in a fixed order: four vectors of partial sums.
template <class T>
class Dot {
 public:
  template <class Some>
  TOPN_INLINE void add(const Some& a, const Some& b) {
    for (int u = 0; u < a.count; ++u) total_[u] += a.v[u] * b.v[u];
  }
  ComputeType<T> sum() const { return sum_lanes((total_[0] + total_[1]) + (total_[2] + total_[3])); }

 private:
  Vector<ComputeType<T>> total_[4] = {};
};

template <class T>
ComputeType<T> dot(const T* a, const T* b, int64_t dim) {
  Dot<T> dot;
  for_features<T>(dim, false, [&](auto, const auto& load, const auto&) { dot.add(load(a), load(b)); });
  return dot.sum();
}

// Returns the same, and writes scaled[j] = scale · b[j].
template <class T>
ComputeType<T> dot_and_scale(const T* a, const T* b, int64_t dim, ComputeType<T> scale, T* scaled, bool nontemporal) {
  Dot<T> dot;
  for_features<T>(dim, nontemporal, [&](auto, const auto& load, const auto& store) {
    auto features = load(b);
    dot.add(load(a), features);
    for (int u = 0; u < features.count; ++u) features.v[u] *= scale;
    store(scaled, features);
  });
  return dot.sum();
}

}  // namespace topn_gating::cpu::TOPN_LEVEL
