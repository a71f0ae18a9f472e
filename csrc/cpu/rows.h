// Rows of d features: what `dispatch` and `combine` share.
#pragma once

#include "cpu/half.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/stream.h"

namespace TOPN_NAMESPACE {
TOPN_INLINE int64_t quotient(int64_t a, int64_t b) { return a / b; }
}  // namespace TOPN_NAMESPACE

#include "held.h"

namespace TOPN_NAMESPACE {

// Rows of an output. `stream` tells whether they go past the caches, for which each must begin at a line.
struct OutputRows {
  char* data;
  int64_t bytes;  // of a row
  bool stream;

  OutputRows(void* rows, int64_t count, int64_t row_bytes)
      : data(static_cast<char*>(rows)), bytes(row_bytes),
        stream(count * row_bytes >= kStreamBytes && row_bytes % kLine == 0 && reinterpret_cast<uintptr_t>(rows) % kLine == 0) {
    if (stream) advise_huge_pages(rows, count * row_bytes);
  }

  template <class T>
  T* row(int64_t i) const {
    return reinterpret_cast<T*>(data + i * bytes);
  }
  void clear(int64_t i) const { clear_lines(row<char>(i), row<char>(i + 1), stream); }
  void copy(int64_t i, const char* from) const { copy_lines(row<char>(i), from, bytes, stream); }
};

inline int64_t slots_of(const Assignment& a) { return a.groups * a.experts * a.capacity; }

// Runs f(begin, end) over all tokens. Its work is in moving a token's row, and one for each slot that it may hold.
template <class F>
void parallel_tokens(const Assignment& a, int64_t row_bytes, ParallelFor parallel_for, const F& f) {
  const int64_t tokens = a.groups * a.tokens;
  const double slots = double(slots_of(a)) / double(std::max<int64_t>(1, tokens));
  const double rows = 1 + std::min(slots, double(a.top_n));
  parallel(parallel_for, tokens, 0.03 * double(row_bytes) * rows + 5 * double(a.top_n), [&](int64_t begin, int64_t end) {
    f(begin, end);
    end_stores_past_caches();
  });
}

// The same, and slots(begin, end) over all slots: each part of the loop gets its share of both.
template <class F, class Slots>
void parallel_tokens_slots(const Assignment& a, int64_t row_bytes, ParallelFor parallel_for, const F& f, const Slots& slots) {
  const int64_t tokens = a.groups * a.tokens, num_slots = slots_of(a);
  if (tokens == 0) return slots(0, num_slots);
  parallel_tokens(a, row_bytes, parallel_for, [&](int64_t begin, int64_t end) {
    f(begin, end);
    slots(begin * num_slots / tokens, end * num_slots / tokens);
  });
}

// Writes zeros to the rows of slots that no pair holds.
inline void clear_free_rows(const Assignment& a, const OutputRows& rows, int64_t begin, int64_t end) {
  for (int64_t slot = begin; slot < end; ++slot) {
    if (holding_pair(a, slot) < 0) rows.clear(slot);
  }
}

// The slots that a token's pairs hold, in rank order.
struct Held {
  int64_t count = 0;
  Scratch<int64_t> slot, pair;

  explicit Held(int64_t top_n) : slot(top_n), pair(top_n) {}

  void find(const Assignment& a, int64_t token) {
    count = 0;
    for (int64_t i = token * a.top_n; i < (token + 1) * a.top_n; ++i) {
      const int64_t s = held_slot(a, i);
      if (s < 0) continue;
      slot[count] = s;
      pair[count++] = i;
    }
  }
};

// `Count` vectors of features. Of two vectors of a half type, the first holds the even features and the second the odd ones, as
// they lie in words: no kernel here asks which feature is where.
template <class T, int Count>
struct Features {
  using V = Vector<RealOf<T>>;
  static constexpr int w = width<RealOf<T>>, count = Count;
  V v[Count];  // zeros as `Features{}`

  TOPN_INLINE void load(const T* p) {
    if constexpr (sizeof(T) == 2 && Count % 2 == 0) {
      for (int u = 0; u < Count; u += 2) {
        const Words words = TOPN_NAMESPACE::load<Words>(p + u * w);
        v[u] = decode(p, words & 0xffffu);
        v[u + 1] = decode(p, words >> 16);
      }
    } else {
      for (int u = 0; u < Count; ++u) v[u] = load_real(p + u * w);
    }
  }
  TOPN_INLINE void store(T* p, bool stream) const {
    if constexpr (sizeof(T) == 2 && Count % 2 == 0) {
      for (int u = 0; u < Count; u += 2) put(p + u * w, encode(p, v[u]) | encode(p, v[u + 1]) << 16, stream);
    } else {
      for (int u = 0; u < Count; ++u) put(p + u * w, elements(p, v[u]), stream);
    }
  }

 private:
  template <class Some>
  static TOPN_INLINE void put(T* p, Some some, bool stream) {
    if (stream) {
      store_past_caches(p, some);
    } else {
      TOPN_NAMESPACE::store(p, some);
    }
  }
};

// Runs f(features, load, store) over the features of rows. `features` is of the kind that load(row) gives and store(row,
// features) takes: four vectors, then one, then what is left, beyond which is 0.
template <class T, class F>
TOPN_INLINE void for_features(int64_t dim, bool stream, const F& f) {
  constexpr int w = width<RealOf<T>>;
  int64_t j = 0;
  const auto whole = [&](auto some) {
    using Some = decltype(some);
    f(
        Some{},
        [&](const T* row) {
          Some features;
          features.load(row + j);
          return features;
        },
        [&](T* row, const Some& features) { features.store(row + j, stream); });
  };
  for (; j + 4 * w <= dim; j += 4 * w) whole(Features<T, 4>{});
  for (; j + w <= dim; j += w) whole(Features<T, 1>{});
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

// out[j] = Σ_i scale_i rows[slot_i][j], in rank order; a null scale is 1.
template <class T>
void sum_rows(const T* rows, const Held& held, const RealOf<T>* scale, int64_t dim, T* out, bool stream) {
  for_features<T>(dim, stream, [&](auto total, const auto& load, const auto& store) {
    for (int64_t i = 0; i < held.count; ++i) {
      const auto row = load(rows + held.slot[i] * dim);
      const RealOf<T> factor = scale == nullptr ? RealOf<T>(1) : scale[held.pair[i]];
      for (int u = 0; u < total.count; ++u) total.v[u] += factor * row.v[u];
    }
    store(out, total);
  });
}

// Σ_j a[j] b[j], in a fixed order: four vectors of sums.
template <class T>
class Dot {
 public:
  template <class Some>
  TOPN_INLINE void add(const Some& a, const Some& b) {
    for (int u = 0; u < a.count; ++u) total_[u] += a.v[u] * b.v[u];
  }
  RealOf<T> sum() const { return sum_lanes((total_[0] + total_[1]) + (total_[2] + total_[3])); }

 private:
  Vector<RealOf<T>> total_[4] = {};
};

template <class T>
RealOf<T> dot(const T* a, const T* b, int64_t dim) {
  Dot<T> dot;
  for_features<T>(dim, false, [&](auto, const auto& load, const auto&) { dot.add(load(a), load(b)); });
  return dot.sum();
}

// The same, and scaled[j] = scale · b[j] on the way.
template <class T>
RealOf<T> dot_and_scale(const T* a, const T* b, int64_t dim, RealOf<T> scale, T* scaled, bool stream) {
  Dot<T> dot;
  for_features<T>(dim, stream, [&](auto, const auto& load, const auto& store) {
    auto features = load(b);
    dot.add(load(a), features);
    for (int u = 0; u < features.count; ++u) features.v[u] *= scale;
    store(scaled, features);
  });
  return dot.sum();
}

}  // namespace TOPN_NAMESPACE
