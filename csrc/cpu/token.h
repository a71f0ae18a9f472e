// The row of one token in scratch memory.
#pragma once

#include "cpu/half.h"
#include "cpu/scratch.h"

namespace TOPN_NAMESPACE {

// The row of one token: z the logits, s the scores.
template <class R, class T>
struct Row {
  using V = Vector<R>;
  using Noise = RealOf<T>;
  static constexpr R lowest = -std::numeric_limits<R>::infinity();

  CpuLanes<R> lanes;
  Scratch<V> z, s;

  explicit Row(int64_t experts) : lanes(experts), z(lanes.count), s(lanes.count) {}

  // SPEC step 3. Without noise s is z.
  void read(const void* logits, const void* noise, double noise_mult, int64_t token) {
    const int e = lanes.experts;
    load_row<R>(static_cast<const T*>(logits) + token * e, e, lowest, z);
    if (noise == nullptr) {
      std::memcpy(s, z, lanes.count * sizeof(V));
      return;
    }
    load_row<R>(static_cast<const Noise*>(noise) + token * e, e, R(0.5), s);
    for (int i = 0; i < lanes.count; ++i) s[i] = z[i] + R(noise_mult) * gumbel<R>(s[i]);
  }
};

}  // namespace TOPN_NAMESPACE
