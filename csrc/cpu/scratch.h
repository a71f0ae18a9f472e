// Aligned memory for one thread's intermediate values.
#pragma once

#include "cpu/level.h"

namespace topn_gating::cpu::TOPN_LEVEL {

// An uninitialised array. Throws std::bad_alloc where there is no memory for it.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t size) : data_(static_cast<T*>(std::aligned_alloc(64, (size * sizeof(T) + 127) / 64 * 64))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

}  // namespace topn_gating::cpu::TOPN_LEVEL
