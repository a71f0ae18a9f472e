// Tensors in host memory, of every type that the kernels use, read and written as double; and random numbers.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "router.h"

namespace topn_gating::harness {

enum class Type { Bool, I32, F32, F64, BF16, F16 };
Type type_of(DType);
Type compute_type_of(DType);  // see router.h
int64_t bytes_of(Type);

// The distance from a number of a floating-point type to the next, whose magnitude is larger; 0 for integers.
double ulp(Type, double value);

// A tensor that is only read; where it is null, its elements are 0.
struct View {
  Type type;
  const void* data;

  double operator[](int64_t i) const;
};

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits();
  int64_t below(int64_t bound) { return int64_t(bits() >> 11) % bound; }
  bool chance(double p) { return uniform() < p; }
  double uniform();  // in [0, 1), exact in float
  double normal();   // approximately

 private:
  uint64_t state_;
};

// Owns exactly `count` elements, so that AddressSanitizer sees an overrun by one. Every byte starts as `fill`. An unaligned
// buffer is aligned to its elements and no more.
class Buffer {
 public:
  Buffer() : Buffer(Type::Bool, 0) {}
  Buffer(Type type, int64_t count, bool aligned = true, int fill = 0xff);
  template <class F>  // elements f(i)
  static Buffer of(Type type, int64_t count, bool aligned, const F& f) {
    Buffer buffer(type, count, aligned);
    for (int64_t i = 0; i < count; ++i) buffer.set(i, f(i));
    return buffer;
  }

  void* data() const { return data_; }
  template <class T>
  T* as() const { return static_cast<T*>(data()); }
  Type type() const { return type_; }
  int64_t count() const { return count_; }
  int64_t bytes() const { return count_ * bytes_of(type_); }
  double get(int64_t i) const { return View{type_, data_}[i]; }
  void set(int64_t i, double value);
  bool all_ones(int64_t i) const;                       // whether all bits of element i are 1
  int64_t first_difference(const Buffer& other) const;  // first element whose bits differ; -1: none

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  Type type_;
  int64_t count_;
  std::unique_ptr<void, Free> memory_;
  void* data_;
};

}  // namespace topn_gating::harness
