// The RowLayout of row.h on a GPU: a token's row is distributed over the threads of a warp, or of a part of one.
#pragma once

#include <cmath>
#include <limits>

#include "cuda/element.cuh"
#include "row.h"

namespace topn_gating::cuda {

// The values of a row that a thread holds: `Count` of them in registers or, where Count is 0, any number in global memory,
// interleaved with those of the warp's other threads.
template <class T, int Count>
class Values {
 public:
  Values() = default;
  __device__ explicit Values(char*&, int /*count*/) {}
  __device__ __forceinline__ T& operator[](int i) { return v_[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return v_[i]; }
  // Access by an index that is not known at compile time.
  __device__ __forceinline__ T get(int index) const {
    T value{};
    TOPN_UNROLL
    for (int i = 0; i < Count; ++i) value = i == index ? v_[i] : value;
    return value;
  }
  __device__ __forceinline__ void set(int index, T value) {
    TOPN_UNROLL
    for (int i = 0; i < Count; ++i) v_[i] = i == index ? value : v_[i];
  }

 private:
  T v_[Count] = {};
};

template <class T>
class Values<T, 0> {
 public:
  // Reserves the row's part of the warp's memory.
  __device__ explicit Values(char*& memory, int count) : v_(reinterpret_cast<T*>(memory) + lane_id()) {
    memory += count * kWarp * sizeof(T);
  }
  __device__ __forceinline__ T& operator[](int i) { return v_[i * int64_t(kWarp)]; }
  __device__ __forceinline__ const T& operator[](int i) const { return v_[i * int64_t(kWarp)]; }
  __device__ __forceinline__ T get(int i) const { return (*this)[i]; }
  __device__ __forceinline__ void set(int i, T value) { (*this)[i] = value; }

 private:
  T* v_;
};

// Some consecutive elements of a row as they are in memory: one, or 16 bytes, which stay whole so that they are loaded and
// stored at once.
template <class T, int Count>
class RowPart {
 public:
  static_assert(Count == kPackSize<T>);
  __device__ __forceinline__ void load(const T* from) { words_ = *reinterpret_cast<const uint4*>(from); }
  __device__ __forceinline__ void store(T* to) const { *reinterpret_cast<uint4*>(to) = words_; }
  // Access to element i, a compile-time constant, in its compute type.
  __device__ __forceinline__ ComputeType<T> get(int i) const {
    return from_word(word_of(words_, i), i);
  }
  __device__ __forceinline__ void set(int i, ComputeType<T> value) {
    unsigned& word = word_of(words_, i);
    word = with_element(word, i, value);
  }

 private:
  template <class Words>
  static __device__ __forceinline__ auto& word_of(Words& words, int i) {
    const int index = i * int(sizeof(T)) / 4;
    return index == 0 ? words.x : index == 1 ? words.y : index == 2 ? words.z : words.w;
  }
  static __device__ __forceinline__ float from_word(unsigned word, int i) {
    if constexpr (sizeof(T) == 4) {
      return __int_as_float(int(word));
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      return __int_as_float(int(i % 2 == 0 ? word << 16 : word & 0xffff0000u));
    } else {
      return to_compute(__ushort_as_half(uint16_t(i % 2 == 0 ? word : word >> 16)));
    }
  }
  static __device__ __forceinline__ unsigned with_element(unsigned word, int i, float value) {
    if constexpr (sizeof(T) == 4) {
      return unsigned(__float_as_int(value));
    } else {
      const T element = from_compute<T>(value);
      uint16_t bits;
      memcpy(&bits, &element, sizeof bits);
      return i % 2 == 0 ? (word & 0xffff0000u) | bits : (word & 0xffffu) | unsigned(bits) << 16;
    }
  }

  uint4 words_;
};

template <class T>
class RowPart<T, 1> {
 public:
  __device__ __forceinline__ void load(const T* from) { element_ = *from; }
  __device__ __forceinline__ ComputeType<T> get(int /*i*/) const { return to_compute(element_); }
  __device__ __forceinline__ void set(int /*i*/, ComputeType<T> value) { element_ = from_compute<T>(value); }

 private:
  T element_;
};

template <int Count>
struct ValueCount {
  static constexpr bool in_registers = true;
  static constexpr int count = Count;
  __device__ explicit ValueCount(int /*experts*/) {}
};
template <>
struct ValueCount<0> {
  static constexpr bool in_registers = false;
  int count;
  __device__ explicit ValueCount(int experts) : count((experts + int(kWarp) - 1) / int(kWarp)) {}
};

// A row over `Width` threads: each thread in turn has a chunk of `Chunk` consecutive experts, and `Count` values in all. Count
// 0: as many values as the row needs, in global memory.
template <class ScalarType, int Width, int Count, int Chunk>
struct WarpLayout : ValueCount<Count> {
  using Scalar = ScalarType;
  using V = Scalar;
  using PerToken = Scalar;
  using Int = std::conditional_t<sizeof(Scalar) == 4, int32_t, int64_t>;
  using Key = Int;
  template <class T>
  using Row = Values<T, Count>;
  static constexpr int width = Width, chunk = Chunk;
  static constexpr int unroll = Count > 0 ? Count : 1, accumulators = 1;
  static constexpr Scalar lowest = -std::numeric_limits<Scalar>::infinity();
  static_assert(Count > 0 || (Width == int(kWarp) && Chunk == 1));

  int experts;
  int thread;  // index of this thread among those of the row

  __device__ explicit WarpLayout(int64_t e)
      : ValueCount<Count>(int(e)), experts(int(e)), thread(int(threadIdx.x) % Width) {}

  __device__ __forceinline__ int index(int i) const { return (i / Chunk * Width + thread) * Chunk + i % Chunk; }
  __device__ __forceinline__ bool valid(int i) const { return index(i) < experts; }
  // The thread that holds an expert's value, and the index of the value there.
  __device__ __forceinline__ static int holder(int expert) { return expert / Chunk % Width; }
  __device__ __forceinline__ static int place(int expert) { return expert / (Chunk * Width) * Chunk + expert % Chunk; }

  template <class T, class F>
  static __device__ __forceinline__ T reduce(T value, const F& f) {
    TOPN_UNROLL
    for (int by = Width / 2; by > 0; by /= 2) value = f(value, shuffle_xor(value, by));
    return value;
  }
  __device__ __forceinline__ Scalar max(Scalar v) const {
    return reduce(v, [](Scalar a, Scalar b) { return a > b ? a : b; });
  }
  __device__ __forceinline__ Scalar sum(Scalar v) const {
    return reduce(v, [](Scalar a, Scalar b) { return a + b; });
  }
  __device__ __forceinline__ static Int max(Int v) {
    return reduce(v, [](Int a, Int b) { return a > b ? a : b; });
  }
  __device__ __forceinline__ static Int min(Int v) {
    return reduce(v, [](Int a, Int b) { return a < b ? a : b; });
  }
  // Broadcasts the value of one of the row's threads to all of them.
  template <class T>
  static __device__ __forceinline__ T from(int thread, T value) {
    return Width == 1 ? value : shuffle(value, thread, Width);
  }
  template <class T>
  __device__ __forceinline__ T at(const Row<T>& row, int expert) const {
    const bool mine = holder(expert) == thread;
    return from(holder(expert), mine ? row.get(place(expert)) : T{});
  }
  template <class T>
  __device__ __forceinline__ void add(Row<T>& row, int expert, T value) const {
    if (holder(expert) == thread) row.set(place(expert), row.get(place(expert)) + value);
  }
  template <class T>
  __device__ __forceinline__ void drop(Row<T>& keys, int expert) const {
    if (holder(expert) == thread) keys.set(place(expert), std::numeric_limits<T>::min());
  }

  // A row as it is in memory, loaded before it is needed. Entries past the last expert hold -inf.
  template <class T>
  struct Fetched {
    RowPart<T, Chunk> parts[Count > 0 ? Count / Chunk : 1];
  };
  template <class T>
  __device__ __forceinline__ void start(Fetched<T>& row) const {
    TOPN_UNROLL
    for (int i = 0; i < Count; ++i) row.parts[i / Chunk].set(i % Chunk, ComputeType<T>(lowest));
  }
  // Reads a row into one that was started or fetched before. `aligned16`: whether every row is aligned to 16 bytes.
  template <class T>
  __device__ __forceinline__ void fetch(const T* row, bool aligned16, Fetched<T>& to) const {
    if (Chunk == kPackSize<T> && aligned16) {
      TOPN_UNROLL
      for (int c = 0; c < Count / Chunk; ++c) {
        if (valid(c * Chunk)) to.parts[c].load(row + index(c * Chunk));
      }
    } else {
      fetch_elements(row, to);
    }
  }
  template <class T>
  __device__ __forceinline__ void fetch_elements(const T* row, Fetched<T>& to) const {
    TOPN_UNROLL
    for (int i = 0; i < Count; ++i) {
      if (valid(i)) to.parts[i / Chunk].set(i % Chunk, to_compute(row[index(i)]));
    }
  }
  template <class T>
  __device__ __forceinline__ void unpack(const Fetched<T>& from, Row<Scalar>& to) const {
    TOPN_UNROLL
    for (int i = 0; i < Count; ++i) to[i] = Scalar(from.parts[i / Chunk].get(i % Chunk));
  }
  template <class T>
  __device__ __forceinline__ void load(const T* row, bool aligned16, Row<Scalar>& to) const {
    if constexpr (Count > 0) {
      Fetched<T> fetched;
      start(fetched);
      fetch(row, aligned16, fetched);
      unpack(fetched, to);
    } else {
      for (int i = 0; i < this->count; ++i) to[i] = valid(i) ? Scalar(to_compute(row[index(i)])) : lowest;
    }
  }
  template <class T>
  __device__ __forceinline__ void store(const Row<Scalar>& from, bool aligned16, T* row) const {
    if constexpr (Chunk == kPackSize<T>) {
      if (aligned16) {
        TOPN_UNROLL_BY(unroll)
        for (int i = 0; i < this->count; i += Chunk) {
          RowPart<T, Chunk> part;
          TOPN_UNROLL
          for (int j = 0; j < Chunk; ++j) part.set(j, ComputeType<T>(from[i + j]));
          if (valid(i)) part.store(row + index(i));
        }
        return;
      }
    }
    TOPN_UNROLL_BY(unroll)
    for (int i = 0; i < this->count; ++i) {
      if (valid(i)) row[index(i)] = from_compute<T>(ComputeType<T>(from[i]));
    }
  }

  static __device__ __forceinline__ int32_t as_int(float v) { return __float_as_int(v); }
  static __device__ __forceinline__ int64_t as_int(double v) { return __double_as_longlong(v); }
  static __device__ __forceinline__ float as_float(int32_t bits) { return __int_as_float(bits); }
  static __device__ __forceinline__ double as_float(int64_t bits) { return __longlong_as_double(bits); }
  static __device__ __forceinline__ float to_float(int32_t n) { return float(n); }
  static __device__ __forceinline__ Scalar exp(Scalar d, Scalar error) {
    if constexpr (std::is_same_v<Scalar, float>) {
      return exp_float<WarpLayout>(d, error);
    } else {
      const double e = ::exp(d);
      return error == error ? e + e * error : e;
    }
  }
  static __device__ __forceinline__ Scalar log(Scalar u) {
    if constexpr (std::is_same_v<Scalar, float>) {
      return log_float<WarpLayout>(u);
    } else {
      return ::log(u);
    }
  }
  static __device__ __forceinline__ Scalar log1p(Scalar t) {
    if constexpr (std::is_same_v<Scalar, float>) {
      return log1p_float(t);
    } else {
      return ::log1p(t);
    }
  }
  static __device__ __forceinline__ Scalar sqrt(Scalar x) {
    if constexpr (std::is_same_v<Scalar, float>) {
      return sqrt_float<WarpLayout>(x);
    } else {
      return ::sqrt(x);
    }
  }
};

}  // namespace topn_gating::cuda
