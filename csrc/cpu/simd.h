// SIMD vectors of one level by the compiler's vector extension (GCC and Clang, any architecture), and row.h's layout of rows in
// them.
#pragma once

#include "cpu/level.h"
#include "elementary.h"
#include "inline.h"
#include "row.h"

namespace topn_gating::cpu::TOPN_LEVEL {

// Lanes of a vector of T.
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

// Returns the sum of a vector's lanes: adds its halves until one lane is left.
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

// Returns v where the mask's bits are set, and 0 elsewhere, even where v is NaN.
template <class V, class Key>
TOPN_INLINE V masked(Key mask, V v) {
  return (V)((Key)v & mask);
}

// The lanes of a vector of Scalars, converted to double: one or two vectors.
template <class Scalar>
struct InDouble {
  static constexpr int count = int(sizeof(double) / sizeof(Scalar));
  Doubles vectors[count];

  static TOPN_INLINE InDouble of(Vector<Scalar> v) {
    InDouble result;
    for (int i = 0; i < count; ++i) {
      Vector<Scalar, width<double>> lanes;
      std::memcpy(&lanes, reinterpret_cast<const char*>(&v) + i * sizeof lanes, sizeof lanes);
      result.vectors[i] = __builtin_convertvector(lanes, Doubles);
    }
    return result;
  }
  TOPN_INLINE Vector<Scalar> rounded() const {
    Vector<Scalar> v;
    for (int i = 0; i < count; ++i) {
      const auto lanes = __builtin_convertvector(vectors[i], Vector<Scalar, width<double>>);
      std::memcpy(reinterpret_cast<char*>(&v) + i * sizeof lanes, &lanes, sizeof lanes);
    }
    return v;
  }
  // Returns the result whose vector i is f(i).
  template <class F>
  static TOPN_INLINE InDouble map(const F& f) {
    InDouble result;
    for (int i = 0; i < count; ++i) result.vectors[i] = f(i);
    return result;
  }
  TOPN_INLINE void operator+=(const InDouble& other) {
    for (int i = 0; i < count; ++i) vectors[i] += other.vectors[i];
  }
  TOPN_INLINE double sum() const {
    Doubles total = vectors[0];
    for (int i = 1; i < count; ++i) total += vectors[i];
    return sum_lanes(total);
  }
};

// The RowLayout of row.h on the CPU: lane l of every vector belongs to the l-th of several tokens, and element i of a row has the
// values of expert i.
template <class ScalarType>
struct VectorLayout {
  using Scalar = ScalarType;
  using V = Vector<Scalar>;
  using PerToken = V;
  using Int = std::conditional_t<sizeof(Scalar) == 4, int32_t, int64_t>;
  using Key = Vector<Int>;
  static constexpr int tokens = width<Scalar>;
  static constexpr int unroll = 1, accumulators = 8;

  int experts;
  int count;

  explicit VectorLayout(int64_t e) : experts(int(e)), count(int(e)) {}

  TOPN_INLINE bool valid(int) const { return true; }
  TOPN_INLINE V max(V v) const { return v; }
  TOPN_INLINE V sum(V v) const { return v; }
  TOPN_INLINE V at(const V* row, Key expert) const {
    V value;
    for (int l = 0; l < tokens; ++l) value[l] = row[expert[l]][l];
    return value;
  }
  TOPN_INLINE void add(V* row, Key expert, V value) const {
    for (int l = 0; l < tokens; ++l) row[expert[l]][l] += value[l];
  }

  static TOPN_INLINE Key as_int(V v) { return (Key)v; }
  static TOPN_INLINE V as_float(Key bits) { return (V)bits; }
  static TOPN_INLINE V to_float(Key n) { return __builtin_convertvector(n, V); }
  // float64 logits are rare enough for libm, lane by lane.
  static TOPN_INLINE V exp(V d, V error) {
    if constexpr (std::is_same_v<Scalar, float>) {
      return exp_float<VectorLayout>(d, error);
    } else {
      const V e = exp_lanes(d);
      return error == error ? e + e * error : e;
    }
  }
  static TOPN_INLINE V log(V u) {
    if constexpr (std::is_same_v<Scalar, float>) {
      return log_float<VectorLayout>(u);
    } else {
      return log_lanes(u);
    }
  }
  static TOPN_INLINE V log1p(V t) {
    if constexpr (std::is_same_v<Scalar, float>) {
      return log1p_float(t);
    } else {
      return map_lanes(t, [](double x) { return std::log1p(x); });
    }
  }
  static TOPN_INLINE V sqrt(V x) {
    if constexpr (std::is_same_v<Scalar, float>) {
      return sqrt_float<VectorLayout>(x);
    } else {
      return map_lanes(x, [](double y) { return std::sqrt(y); });
    }
  }

 private:
  static V exp_lanes(V d) {
    return map_lanes(d, [](double x) { return std::exp(x); });
  }
  static V log_lanes(V u) {
    return map_lanes(u, [](double x) { return std::log(x); });
  }
};

}  // namespace topn_gating::cpu::TOPN_LEVEL
