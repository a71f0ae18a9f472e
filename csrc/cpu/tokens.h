// The tokens that `gate` and its gradient process at once, one in each lane of a vector.
#pragma once

#include "cpu/scratch.h"
#include "cpu/transpose.h"

namespace topn_gating::cpu::TOPN_LEVEL {

struct GateTile {
  int64_t group;
  int64_t first, last;  // range of tokens, indices over all groups

  GateTile(const GateInputs& a, int64_t tile) {
    const int64_t tiles = gate_tiles(a.tokens), start = tile % tiles * kGateTile;
    group = tile / tiles;
    first = group * a.tokens + start;
    last = group * a.tokens + std::min(a.tokens, start + kGateTile);
  }
};

// Returns the cost of a tile for `parallel`.
inline double gate_tile_cost(const GateInputs& a) { return double(kGateTile * a.experts) * (a.soft ? 50 : 2.5); }

// The scores of a few tokens, of element type T, computed in Scalar. Lanes from `count` on hold copies of the last token: they
// are computed like the others, and not written.
template <class Scalar, class T>
struct Tokens {
  using V = Vector<Scalar>;
  using RowLayout = VectorLayout<Scalar>;
  using Key = typename RowLayout::Key;

  const GateInputs& a;
  RowLayout layout;
  Scratch<V> scores;  // (e)
  Scratch<V> logits;  // (e) where noise makes them differ from the scores
  int64_t first = 0;  // index over all groups of the token in lane 0
  int count = 0;

  explicit Tokens(const GateInputs& inputs)
      : a(inputs), layout(a.experts), scores(a.experts + RowLayout::tokens),
        logits(a.noise == nullptr ? 0 : a.experts + RowLayout::tokens) {}

  // Moves on to the tokens from `token` on, before `last`.
  void move_to(int64_t token, int64_t last) {
    first = token;
    count = int(std::min<int64_t>(RowLayout::tokens, last - token));
  }

  // docs/spec.md, step 3.
  void read_scores() {
    read<T>(a.logits, a.noise == nullptr ? scores : logits);
    if (a.noise == nullptr) return;
    read<ComputeType<T>>(a.noise, scores);
    for (int i = 0; i < layout.count; ++i) scores[i] = logits[i] + Scalar(a.noise_mult) * gumbel<RowLayout>(scores[i]);
  }

  // Returns a mask of the lanes that have a valid token: all bits set.
  Key valid() const {
    Key mask{};
    for (int l = 0; l < count; ++l) mask[l] = a.token_mask == nullptr || a.token_mask[first + l] ? -1 : 0;
    return mask;
  }

 private:
  template <class Element>
  void read(const void* tensor, V* columns) {
    const Element* elements = static_cast<const Element*>(tensor);
    const Element* end = elements + a.groups * a.tokens * a.experts;
    load_columns<Scalar>(elements + first * a.experts, count, layout.experts, end, columns);
  }
};

// Returns the logsumexps in double; NaN where a token has a NaN.
template <class Scalar>
TOPN_INLINE InDouble<Scalar> value_of(const LogSumExp<Vector<Scalar>>& lse) {
  const auto max = InDouble<Scalar>::of(lse.max);
  const auto log = InDouble<Scalar>::of(lse.sum == lse.sum ? VectorLayout<Scalar>::log(lse.sum) : lse.sum);
  return InDouble<Scalar>::map([&](int i) { return max.vectors[i] + log.vectors[i]; });
}

}  // namespace topn_gating::cpu::TOPN_LEVEL
