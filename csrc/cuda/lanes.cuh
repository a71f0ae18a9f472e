// The row of a token over the threads of a warp, or of a part of one: the lanes of row.h on a GPU.
#pragma once

#include <cmath>
#include <limits>

#include "cuda/element.cuh"

#define TOPN_NAMESPACE topn_gating::cuda

namespace topn_gating::cuda {

__device__ __forceinline__ int32_t as_int(float v) { return __float_as_int(v); }
__device__ __forceinline__ int64_t as_int(double v) { return __double_as_longlong(v); }
__device__ __forceinline__ float as_float(int32_t v) { return __int_as_float(v); }
__device__ __forceinline__ float to_float(int32_t v) { return float(v); }

}  // namespace topn_gating::cuda

#include "elementary.h"

namespace topn_gating::cuda {

__device__ __forceinline__ float exp_value(float d, float error) { return exp_float(d, error); }
__device__ __forceinline__ float log_value(float u) { return log_float(u); }
__device__ __forceinline__ double exp_value(double d, double error) {
  const double e = exp(d);
  return error == error ? e + e * error : e;
}
__device__ __forceinline__ double log_value(double u) { return log(u); }

}  // namespace topn_gating::cuda

#include "row.h"

namespace topn_gating::cuda {

// What a thread holds of a row: `Count` values in registers or, where Count is 0, as many as it takes in memory, those of a
// warp's threads side by side.
template <class T, int Count>
class Values {
 public:
  __device__ explicit Values(char*&, int /*count*/) {}
  __device__ __forceinline__ T& operator[](int i) { return v_[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return v_[i]; }
  // By an index that the compiler does not know.
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
  // Takes its part of the warp's memory.
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

// How a row lies over `Width` threads: `Chunk` experts side by side to each thread in turn, `Count` values in all to each;
// Count 0: as many as the row takes, in memory.
template <class Real, int Width, int Count, int Chunk>
struct WarpLanes : ValueCount<Count> {
  using R = Real;
  using V = R;
  using Int = std::conditional_t<sizeof(R) == 4, int32_t, int64_t>;
  using Key = Int;
  template <class T>
  using Row = Values<T, Count>;
  static constexpr int width = Width;
  static constexpr int unroll = Count > 0 ? Count : 1, sums = 1;
  static constexpr R lowest = -std::numeric_limits<R>::infinity();
  static_assert(Count > 0 || (Width == int(kWarp) && Chunk == 1));

  int experts;
  int thread;  // of the row's threads

  __device__ explicit WarpLanes(int64_t e)
      : ValueCount<Count>(int(e)), experts(int(e)), thread(int(threadIdx.x) % Width) {}

  __device__ __forceinline__ int index(int i) const { return (i / Chunk * Width + thread) * Chunk + i % Chunk; }
  __device__ __forceinline__ bool real(int i) const { return index(i) < experts; }
  // The thread that holds an expert, and where it holds it.
  __device__ __forceinline__ static int holder(int expert) { return expert / Chunk % Width; }
  __device__ __forceinline__ static int place(int expert) { return expert / (Chunk * Width) * Chunk + expert % Chunk; }

  template <class T, class F>
  static __device__ __forceinline__ T reduce(T value, const F& f) {
    TOPN_UNROLL
    for (int by = Width / 2; by > 0; by /= 2) value = f(value, shuffle_xor(value, by));
    return value;
  }
  __device__ __forceinline__ R max(R v) const {
    return reduce(v, [](R a, R b) { return a > b ? a : b; });
  }
  __device__ __forceinline__ R sum(R v) const {
    return reduce(v, [](R a, R b) { return a + b; });
  }
  __device__ __forceinline__ static Int max(Int v) {
    return reduce(v, [](Int a, Int b) { return a > b ? a : b; });
  }
  __device__ __forceinline__ static Int min(Int v) {
    return reduce(v, [](Int a, Int b) { return a < b ? a : b; });
  }
  // A value of one of the row's threads, in all of them.
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

  // A row as it lies in memory, on its way into registers.
  template <class T>
  struct Fetched {
    Pack<T, Chunk> packs[Count > 0 ? Count / Chunk : 1];
  };
  // A wide row is aligned to 16 bytes, as is its size.
  template <class T>
  __device__ __forceinline__ void fetch(const T* row, bool wide, Fetched<T>& to) const {
    TOPN_UNROLL
    for (int c = 0; c < Count / Chunk; ++c) {
      if (!real(c * Chunk)) continue;
      if (Chunk == kWide<T> && wide) {
        to.packs[c] = load_pack<T, Chunk>(row + index(c * Chunk));
      } else {
        TOPN_UNROLL
        for (int j = 0; j < Chunk; ++j) {
          if (real(c * Chunk + j)) to.packs[c].v[j] = row[index(c * Chunk + j)];
        }
      }
    }
  }
  // Entries past the last expert hold -inf.
  template <class T>
  __device__ __forceinline__ void unpack(const Fetched<T>& from, Row<R>& to) const {
    TOPN_UNROLL
    for (int i = 0; i < Count; ++i) to[i] = real(i) ? R(to_real(from.packs[i / Chunk].v[i % Chunk])) : lowest;
  }
  template <class T>
  __device__ __forceinline__ void load(const T* row, bool wide, Row<R>& to) const {
    if constexpr (Count > 0) {
      Fetched<T> fetched;
      fetch(row, wide, fetched);
      unpack(fetched, to);
    } else {
      for (int i = 0; i < this->count; ++i) to[i] = real(i) ? R(to_real(row[index(i)])) : lowest;
    }
  }
  template <class T>
  __device__ __forceinline__ void store(const Row<R>& from, bool wide, T* row) const {
    if constexpr (Chunk == kWide<T>) {
      if (wide) {
        TOPN_UNROLL_BY(unroll)
        for (int i = 0; i < this->count; i += Chunk) {
          Pack<T, Chunk> pack;
          TOPN_UNROLL
          for (int j = 0; j < Chunk; ++j) pack.v[j] = from_real<T>(RealOf<T>(from[i + j]));
          if (real(i)) store_pack(row + index(i), pack);
        }
        return;
      }
    }
    TOPN_UNROLL_BY(unroll)
    for (int i = 0; i < this->count; ++i) {
      if (real(i)) row[index(i)] = from_real<T>(RealOf<T>(from[i]));
    }
  }
};

}  // namespace topn_gating::cuda
