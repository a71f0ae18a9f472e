// SIMD vectors of one level by the compiler's vector extension (GCC and Clang, any architecture), and the lanes of row.h
// over them.
#pragma once

#include "cpu/level.h"
#include "inline.h"

namespace TOPN_NAMESPACE {

template <class T>
constexpr int width = TOPN_VECTOR_BYTES / int(sizeof(T));

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T, int N = width<T>>
using Vector = typename VectorOf<T, N>::type;

using Floats = Vector<float>;
using Doubles = Vector<double>;
using Ints = Vector<int32_t>;
using Longs = Vector<int64_t>;

TOPN_INLINE Ints as_int(Floats v) { return (Ints)v; }
TOPN_INLINE Longs as_int(Doubles v) { return (Longs)v; }
TOPN_INLINE Floats as_float(Ints v) { return (Floats)v; }
TOPN_INLINE Floats to_float(Ints v) { return __builtin_convertvector(v, Floats); }

// Unaligned loads and stores; a memcpy of a constant size is one instruction.
template <class V, class T>
TOPN_INLINE V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
TOPN_INLINE void store(T* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

template <class V, class F>
TOPN_INLINE V map_lanes(V v, F f) {
  for (int i = 0; i < int(sizeof v / sizeof v[0]); ++i) v[i] = f(v[i]);
  return v;
}

}  // namespace TOPN_NAMESPACE

#include "elementary.h"

namespace TOPN_NAMESPACE {

TOPN_INLINE Floats exp_value(Floats d, Floats error) { return exp_float(d, error); }
TOPN_INLINE Floats log_value(Floats u) { return log_float(u); }
// float64 input is rare enough that libm, lane by lane, does.
inline Doubles exp_value(Doubles d, Doubles error) {
  const Doubles e = map_lanes(d, [](double x) { return std::exp(x); });
  return error == error ? e + e * error : e;
}
inline Doubles log_value(Doubles u) {
  return map_lanes(u, [](double x) { return std::log(x); });
}

}  // namespace TOPN_NAMESPACE

#include "row.h"

namespace TOPN_NAMESPACE {

template <class Real>
struct CpuLanes {
  using R = Real;
  using Int = std::conditional_t<sizeof(R) == 4, int32_t, int64_t>;
  using V = Vector<R>;
  using Key = Vector<Int>;
  static constexpr int w = width<R>;

  int experts;
  int count;

  explicit CpuLanes(int64_t e) : experts(int(e)), count(int((e + w - 1) / w)) {}

  TOPN_INLINE Key index(int i) const {
    Key first;
    for (int j = 0; j < w; ++j) first[j] = j;
    return first + Int(i * w);
  }
  TOPN_INLINE Key real(int i) const { return index(i) < Int(experts); }

  // Halves the vector until one lane is left.
  template <class T, int N, class F>
  static TOPN_INLINE T reduce(Vector<T, N> v, F f) {
    if constexpr (N == 1) {
      return v[0];
    } else {
      Vector<T, N / 2> low, high;
      std::memcpy(&low, &v, sizeof low);
      std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
      return reduce<T, N / 2>(f(low, high), f);
    }
  }
  TOPN_INLINE R max(V v) const {
    return reduce<R, w>(v, [](auto a, auto b) { return a > b ? a : b; });
  }
  TOPN_INLINE R sum(V v) const {
    return reduce<R, w>(v, [](auto a, auto b) { return a + b; });
  }
  TOPN_INLINE Int max(Key v) const {
    return reduce<Int, w>(v, [](auto a, auto b) { return a > b ? a : b; });
  }
  TOPN_INLINE Int min(Key v) const {
    return reduce<Int, w>(v, [](auto a, auto b) { return a < b ? a : b; });
  }
  TOPN_INLINE R at(const V* v, int j) const { return v[j / w][j % w]; }
  TOPN_INLINE void add(V* v, int j, R value) const { v[j / w][j % w] += value; }
  TOPN_INLINE void drop(Key* keys, int j) const { keys[j / w][j % w] = std::numeric_limits<Int>::min(); }
};

}  // namespace TOPN_NAMESPACE
