// Writes of large outputs: non-temporal stores, which bypass the caches.
#pragma once

#include "cpu/simd.h"

namespace topn_gating::cpu::TOPN_LEVEL {

constexpr int64_t kLine = 64;  // bytes of a cache line

// Outputs of at least so many bytes are written with non-temporal stores; smaller ones stay in the caches for the next kernel.
constexpr int64_t kNontemporalBytes = int64_t(4) << 20;

// Stores a vector at a multiple of its size.
#if defined(__SSE2__)
template <class V>
TOPN_INLINE void store_nontemporal(void* p, V v) {
  if constexpr (sizeof v < sizeof(__m128i)) {
    std::memcpy(p, &v, sizeof v);
  } else {
    __m128i part[sizeof v / sizeof(__m128i)];
    std::memcpy(part, &v, sizeof v);
    for (size_t i = 0; i < sizeof v / sizeof(__m128i); ++i) _mm_stream_si128(static_cast<__m128i*>(p) + i, part[i]);
  }
}
// Makes this thread's non-temporal stores visible to other threads before its later stores.
inline void fence_nontemporal_stores() { _mm_sfence(); }
#else
template <class V>
TOPN_INLINE void store_nontemporal(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}
inline void fence_nontemporal_stores() {}
#endif

// Writes zeros to [begin, end), both multiples of a cache line.
inline void clear_lines(char* begin, char* end, bool nontemporal) {
  if (!nontemporal) {
    std::memset(begin, 0, end - begin);
    return;
  }
  for (char* p = begin; p < end; p += sizeof(Ints)) store_nontemporal(p, Ints{});
}

// Copies whole cache lines to [to, to + bytes).
inline void copy_lines(char* to, const char* from, int64_t bytes, bool nontemporal) {
  if (!nontemporal) {
    std::memcpy(to, from, bytes);
    return;
  }
  for (int64_t i = 0; i < bytes; i += sizeof(Ints)) store_nontemporal(to + i, load<Ints>(from + i));
}

}  // namespace topn_gating::cpu::TOPN_LEVEL
