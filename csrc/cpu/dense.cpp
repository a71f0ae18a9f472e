// SPEC step 9 on the CPU: two large tensors of zeros with k entries a token, each cache line written once.
#include "cpu/half.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/stream.h"

namespace TOPN_NAMESPACE {
namespace {

// Writes a stretch of memory from its start to its end: zeros, and entries put in at rising addresses.
template <class T>
class Writer {
 public:
  Writer(T* begin, T* end, bool stream)
      : at_(reinterpret_cast<char*>(begin)), end_(reinterpret_cast<char*>(end)), stream_(stream) {
    char* whole = align_up(at_);
    if (whole > end_) whole = end_;
    // The first line may be shared with the stretch before: ordinary stores.
    std::memset(at_, 0, whole - at_);
    at_ = whole;
  }

  void put(T* where, T value) {
    char* p = reinterpret_cast<char*>(where);
    char* line = align_down(p);
    if (p < at_ && !in_line_) {  // in the head
      *where = value;
      return;
    }
    if (!in_line_ || line != at_) {
      flush();
      if (line + kLine > end_) {  // the last, partial line
        clear_lines(at_, line, stream_);
        std::memset(line, 0, end_ - line);
        at_ = end_;
        *where = value;
        return;
      }
      clear_lines(at_, line, stream_);
      at_ = line;
      std::memset(line_, 0, kLine);
      in_line_ = true;
    }
    std::memcpy(line_ + (p - line), &value, sizeof value);
  }

  void finish() {
    flush();
    if (at_ >= end_) return;
    char* whole = align_down(end_);
    clear_lines(at_, whole, stream_);
    std::memset(whole, 0, end_ - whole);
  }

 private:
  static char* align_down(char* p) { return p - reinterpret_cast<uintptr_t>(p) % kLine; }
  static char* align_up(char* p) { return align_down(p + kLine - 1); }

  void flush() {
    if (!in_line_) return;
    copy_lines(at_, line_, kLine, stream_);
    at_ += kLine;
    in_line_ = false;
  }

  char* at_;  // all before it is written
  char* end_;
  bool stream_;
  bool in_line_ = false;  // the line at at_ is being put together in line_
  alignas(kLine) char line_[kLine];
};

template <class T>
void dense_tokens(const Dense& a, bool stream, int64_t begin, int64_t end) {
  const Assignment& s = a.assignment;
  const int64_t row = s.experts * s.capacity;
  T* dispatch = static_cast<T*>(a.dispatch);
  T* combine = static_cast<T*>(a.combine);
  Writer<T> dispatch_writer(dispatch + begin * row, dispatch + end * row, stream);
  Writer<T> combine_writer(combine + begin * row, combine + end * row, stream);
  T one;
  store_one(&one, 1);

  struct Entry {
    int64_t position, pair;
  };
  Scratch<Entry> entries(s.top_n);
  for (int64_t token = begin; token < end; ++token) {
    int64_t count = 0;
    for (int64_t pair = token * s.top_n; pair < (token + 1) * s.top_n; ++pair) {
      const int64_t e = s.expert[pair], c = s.slot[pair];
      if (c < 0 || c >= s.capacity || e < 0 || e >= s.experts) continue;
      const Entry entry{e * s.capacity + c, pair};
      int64_t i = count++;
      for (; i > 0 && entries[i - 1].position > entry.position; --i) entries[i] = entries[i - 1];
      entries[i] = entry;
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t where = token * row + entries[i].position;
      T value;
      store_one(&value, static_cast<const RealOf<T>*>(a.weight)[entries[i].pair]);
      dispatch_writer.put(dispatch + where, one);
      combine_writer.put(combine + where, value);
    }
  }
  dispatch_writer.finish();
  combine_writer.finish();
}

template <class T>
void dense_backward_tokens(const DenseBackward& a, int64_t begin, int64_t end) {
  using Real = RealOf<T>;
  const Assignment& s = a.assignment;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t group = token / s.tokens, n = token % s.tokens;
    for (int64_t pair = token * s.top_n; pair < (token + 1) * s.top_n; ++pair) {
      const int64_t e = s.expert[pair], c = s.slot[pair];
      Real grad = 0;
      if (c >= 0 && c < s.capacity && e >= 0 && e < s.experts) {
        const auto at = [&](const void* tensor, const int64_t* strides) {
          const int64_t where = group * strides[0] + n * strides[1] + e * strides[2] + c * strides[3];
          return load_one(static_cast<const T*>(tensor) + where);
        };
        if (a.grad_combine != nullptr) grad += at(a.grad_combine, a.combine_strides);
        if (a.grad_dispatch != nullptr) grad += at(a.grad_dispatch, a.dispatch_strides);
      }
      static_cast<Real*>(a.grad_weight)[pair] = grad;
    }
  }
}

}  // namespace

void run(const Dense& a, ParallelFor parallel_for) {
  const Assignment& s = a.assignment;
  const int64_t row = s.experts * s.capacity;
  const int64_t bytes = s.groups * s.tokens * row * element_bytes(a.dtype);
  const bool stream = bytes >= kStreamBytes;
  if (stream) {
    advise_huge_pages(a.dispatch, bytes);
    advise_huge_pages(a.combine, bytes);
  }
  with_type(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    parallel(parallel_for, s.groups * s.tokens, 0.1 * double(row * element_bytes(a.dtype)), [&](int64_t begin, int64_t end) {
      // Stretches short enough that the two outputs' writes take turns.
      const int64_t step = std::max<int64_t>(1, (int64_t(1) << 16) / std::max<int64_t>(1, row));
      for (int64_t token = begin; token < end; token += step) {
        dense_tokens<T>(a, stream, token, std::min(end, token + step));
      }
      end_stores_past_caches();
    });
  });
}

void run(const DenseBackward& a, ParallelFor parallel_for) {
  with_type(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const Assignment& s = a.assignment;
    parallel(parallel_for, s.groups * s.tokens, double(s.top_n * 10),
             [&](int64_t begin, int64_t end) { dense_backward_tokens<T>(a, begin, end); });
  });
}

}  // namespace TOPN_NAMESPACE
