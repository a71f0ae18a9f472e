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

// Σ of a vector's lanes: halves it until one is left.
template <class V>
TOPN_INLINE auto sum_lanes(V v) {
  using T = std::remove_reference_t<decltype(v[0])>;
  constexpr int half = int(sizeof v / sizeof v[0]) / 2;
  if constexpr (half == 0) {
    return v[0];
  } else {
    Vector<T, half> low, high;
    std::memcpy(&low, &v, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    return sum_lanes(low + high);
  }
}

// A vector of R in double, in as many vectors as that takes.
template <class R>
struct Wide {
  static constexpr int parts = int(sizeof(double) / sizeof(R));
  Doubles part[parts];

  static TOPN_INLINE Wide of(Vector<R> v) {
    Wide wide;
    for (int i = 0; i < parts; ++i) {
      Vector<R, width<double>> some;
      std::memcpy(&some, reinterpret_cast<const char*>(&v) + i * sizeof some, sizeof some);
      wide.part[i] = __builtin_convertvector(some, Doubles);
    }
    return wide;
  }
  TOPN_INLINE Vector<R> rounded() const {
    Vector<R> v;
    for (int i = 0; i < parts; ++i) {
      const auto some = __builtin_convertvector(part[i], Vector<R, width<double>>);
      std::memcpy(reinterpret_cast<char*>(&v) + i * sizeof some, &some, sizeof some);
    }
    return v;
  }
  template <class F>
  static TOPN_INLINE Wide map(const F& f) {  // part i is f(i)
    Wide wide;
    for (int i = 0; i < parts; ++i) wide.part[i] = f(i);
    return wide;
  }
  TOPN_INLINE void operator+=(const Wide& other) {
    for (int i = 0; i < parts; ++i) part[i] += other.part[i];
  }
  TOPN_INLINE double sum() const {
    Doubles total = part[0];
    for (int i = 1; i < parts; ++i) total += part[i];
    return sum_lanes(total);
  }
};

// The lanes of row.h on the CPU: each lane has a token, and value i of a row is expert i of them all. So nothing is reduced
// across lanes, and what row.h calls one number of a token is a vector, too.
template <class Real>
struct TokenLanes {
  using V = Vector<Real>;
  using R = V;
  using Int = std::conditional_t<sizeof(Real) == 4, int32_t, int64_t>;
  using Key = Vector<Int>;
  static constexpr int w = width<Real>;
  static constexpr int unroll = 1, sums = 8;

  int experts;
  int count;

  explicit TokenLanes(int64_t e) : experts(int(e)), count(int(e)) {}

  TOPN_INLINE bool real(int) const { return true; }
  TOPN_INLINE R max(V v) const { return v; }
  TOPN_INLINE R sum(V v) const { return v; }
  TOPN_INLINE R at(const V* row, Key expert) const {
    R value;
    for (int l = 0; l < w; ++l) value[l] = row[expert[l]][l];
    return value;
  }
  TOPN_INLINE void add(V* row, Key expert, R value) const {
    for (int l = 0; l < w; ++l) row[expert[l]][l] += value[l];
  }
};

}  // namespace TOPN_NAMESPACE
