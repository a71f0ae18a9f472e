// docs/spec.md, step 9, on the CPU: two large tensors of zeros with at most k entries for each token. Each cache line is
// written once.
#pragma once

#include "assignment.h"
#include "cpu/element.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/stream.h"

namespace topn_gating::cpu::TOPN_LEVEL {
namespace {

// Fills a range of memory from its start to its end: zeros, except for entries that are put in at rising addresses.
template <class T>
class Writer {
 public:
  Writer(T* begin, T* end, bool nontemporal)
      : at_(reinterpret_cast<char*>(begin)), end_(reinterpret_cast<char*>(end)), nontemporal_(nontemporal) {
    char* first_line = align_up(at_);
    if (first_line > end_) first_line = end_;
    // Another thread may write to the line before it: ordinary stores.
    std::memset(at_, 0, first_line - at_);
    at_ = first_line;
  }

  void put(T* where, T value) {
    char* p = reinterpret_cast<char*>(where);
    char* line = align_down(p);
    if (p < at_ && !in_line_) {  // before the first whole line
      *where = value;
      return;
    }
    if (!in_line_ || line != at_) {
      flush();
      if (line + kLine > end_) {  // the last, partial line
        clear_lines(at_, line, nontemporal_);
        std::memset(line, 0, end_ - line);
        at_ = end_;
        *where = value;
        return;
      }
      clear_lines(at_, line, nontemporal_);
      at_ = line;
      std::memset(line_, 0, kLine);
      in_line_ = true;
    }
    std::memcpy(line_ + (p - line), &value, sizeof value);
  }

  void finish() {
    flush();
    if (at_ >= end_) return;
    char* last_line = align_down(end_);
    clear_lines(at_, last_line, nontemporal_);
    std::memset(last_line, 0, end_ - last_line);
  }

 private:
  static char* align_down(char* p) { return p - reinterpret_cast<uintptr_t>(p) % kLine; }
  static char* align_up(char* p) { return align_down(p + kLine - 1); }

  void flush() {
    if (!in_line_) return;
    copy_lines(at_, line_, kLine, nontemporal_);
    at_ += kLine;
    in_line_ = false;
  }

  char* at_;  // everything before it is written
  char* end_;
  bool nontemporal_;
  bool in_line_ = false;  // whether line_ holds the line at at_, not yet written
  alignas(kLine) char line_[kLine];
};

template <class T>
void dense_tokens(const Dense& a, bool nontemporal, int64_t begin, int64_t end) {
  const Assignment& s = a.assignment;
  const int64_t row = s.experts * s.capacity;
  T* dispatch = static_cast<T*>(a.dispatch);
  T* combine = static_cast<T*>(a.combine);
  Writer<T> dispatch_writer(dispatch + begin * row, dispatch + end * row, nontemporal);
  Writer<T> combine_writer(combine + begin * row, combine + end * row, nontemporal);
  T one;
  store_element(&one, 1);

  struct Entry {
    int64_t position, pair;
  };
  Scratch<Entry> entries(s.top_n);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t group = token / s.tokens, first = group * s.tokens * s.top_n;
    int64_t count = 0;
    for (int64_t pair = token * s.top_n; pair < (token + 1) * s.top_n; ++pair) {
      const int64_t held = held_row(s, group, pair - first);
      if (held < 0) continue;
      const Entry entry{held - group * row, pair};
      int64_t i = count++;
      for (; i > 0 && entries[i - 1].position > entry.position; --i) entries[i] = entries[i - 1];
      entries[i] = entry;
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t where = token * row + entries[i].position;
      T value;
      store_element(&value, static_cast<const ComputeType<T>*>(a.weight)[entries[i].pair]);
      dispatch_writer.put(dispatch + where, one);
      combine_writer.put(combine + where, value);
    }
  }
  dispatch_writer.finish();
  combine_writer.finish();
}

template <class T>
void dense_backward_tokens(const DenseBackward& a, int64_t begin, int64_t end) {
  using Weight = ComputeType<T>;
  const Assignment& s = a.assignment;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t group = token / s.tokens, n = token % s.tokens, first = group * s.tokens * s.top_n;
    for (int64_t pair = token * s.top_n; pair < (token + 1) * s.top_n; ++pair) {
      const int64_t e = s.expert[pair], c = s.slot[pair];
      Weight grad = 0;
      if (held_row(s, group, pair - first) >= 0) {
        const auto at = [&](const void* tensor, const int64_t* strides) {
          const int64_t where = group * strides[0] + n * strides[1] + e * strides[2] + c * strides[3];
          return load_element(static_cast<const T*>(tensor) + where);
        };
        if (a.grad_combine != nullptr) grad += at(a.grad_combine, a.combine_strides);
        if (a.grad_dispatch != nullptr) grad += at(a.grad_dispatch, a.dispatch_strides);
      }
      static_cast<Weight*>(a.grad_weight)[pair] = grad;
    }
  }
}

}  // namespace

void run(const Dense& a, ParallelFor parallel_for) {
  const Assignment& s = a.assignment;
  const int64_t row = s.experts * s.capacity;
  const int64_t bytes = s.groups * s.tokens * row * element_bytes(a.dtype);
  const bool nontemporal = bytes >= kNontemporalBytes;
  if (nontemporal) {
    advise_huge_pages(a.dispatch, bytes);
    advise_huge_pages(a.combine, bytes);
  }
  with_type(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    parallel(parallel_for, s.groups * s.tokens, 0.1 * double(row * element_bytes(a.dtype)), [&](int64_t begin, int64_t end) {
      // Few enough tokens that writes to the two outputs alternate.
      const int64_t step = std::max<int64_t>(1, (int64_t(1) << 16) / std::max<int64_t>(1, row));
      for (int64_t token = begin; token < end; token += step) {
        dense_tokens<T>(a, nontemporal, token, std::min(end, token + step));
      }
      fence_nontemporal_stores();
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

}  // namespace topn_gating::cpu::TOPN_LEVEL
