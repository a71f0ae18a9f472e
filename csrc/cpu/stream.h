// Large outputs: stores that pass the caches by, since what is written so is not read first, and huge pages.
#pragma once

#include "cpu/simd.h"

namespace TOPN_NAMESPACE {

constexpr int64_t kLine = 64;  // bytes of a cache line

// Outputs from here on pass the caches by; smaller ones stay in them for whoever reads them next.
constexpr int64_t kStreamBytes = int64_t(4) << 20;

// Writes of one output. `stream`: past the caches; addresses are then multiples of the vector's size.
#if defined(__SSE2__)
template <class V>
TOPN_INLINE void store_past_caches(void* p, V v) {
  if constexpr (sizeof v < sizeof(__m128i)) {
    std::memcpy(p, &v, sizeof v);
  } else {
    __m128i part[sizeof v / sizeof(__m128i)];
    std::memcpy(part, &v, sizeof v);
    for (size_t i = 0; i < sizeof v / sizeof(__m128i); ++i) _mm_stream_si128(static_cast<__m128i*>(p) + i, part[i]);
  }
}
// What was written so is there for other threads.
inline void end_stores_past_caches() { _mm_sfence(); }
#else
template <class V>
TOPN_INLINE void store_past_caches(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}
inline void end_stores_past_caches() {}
#endif

// Zeros to [begin, end), both multiples of a line.
inline void clear_lines(char* begin, char* end, bool stream) {
  if (!stream) {
    std::memset(begin, 0, end - begin);
    return;
  }
  for (char* p = begin; p < end; p += sizeof(Ints)) store_past_caches(p, Ints{});
}

// Copies lines to [to, to + bytes).
inline void copy_lines(char* to, const char* from, int64_t bytes, bool stream) {
  if (!stream) {
    std::memcpy(to, from, bytes);
    return;
  }
  for (int64_t i = 0; i < bytes; i += sizeof(Ints)) store_past_caches(to + i, load<Ints>(from + i));
}

// Asks for huge pages: where an output is fresh memory, a page fault costs more than the page's zeros.
inline void advise_huge_pages(void* begin, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t(1) << 21;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + bytes) / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace TOPN_NAMESPACE
