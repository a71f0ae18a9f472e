// Tensors in host memory whose elements, of any type that the kernels use, are read and written as double; and random numbers.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "router.h"

namespace topn_gating::harness {

enum class Type { Bool, I32, F32, F64, BF16, F16 };
Type type_of(DType);
// Returns the type in which kernels compute: F64 for F64, F32 for others (router.h).
Type compute_type_of(DType);
// Returns the size of an element in bytes.
int64_t bytes_of(Type);

// Returns the distance from a floating-point number to the next one of larger magnitude; 0 for integers.
double ulp(Type, double value);

// A read-only tensor. All elements are 0 if `data` is null.
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
  double uniform();  // uniform in [0, 1), exact in float
  double normal();   // standard normal, approximately

 private:
  uint64_t state_;
};

// A tensor that owns exactly `count` elements, so that AddressSanitizer reports an access one element past the end. Every byte
// is initially `fill`. An unaligned buffer is aligned only to the size of an element.
class Buffer {
 public:
  Buffer() : Buffer(Type::Bool, 0) {}
  Buffer(Type type, int64_t count, bool aligned = true, int fill = 0xff);
  // Returns a buffer whose elements are f(i).
  template <class F>
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
  bool all_ones(int64_t i) const;                       // returns whether all bits of element i are 1
  int64_t first_difference(const Buffer& other) const;  // returns the first element whose bits differ, or -1

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
