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
  const bool keeps_logits;  // whether `logits` has them: where there is noise, and where they are wanted beside the scores
  RowLayout layout;
  Scratch<V> scores;  // (e)
  Scratch<V> logits;  // (e)
  int64_t first = 0;  // index over all groups of the token in lane 0
  int count = 0;

  Tokens(const GateInputs& inputs, bool wants_logits)
      : a(inputs), keeps_logits(wants_logits || a.noise != nullptr), layout(a.experts), scores(a.experts + RowLayout::tokens),
        logits(keeps_logits ? a.experts + RowLayout::tokens : 0) {}

  // Moves on to the tokens from `token` on, before `last`.
  void move_to(int64_t token, int64_t last) {
    first = token;
    count = int(std::min<int64_t>(RowLayout::tokens, last - token));
  }

  // docs/spec.md, step 3.
  void read_scores() {
    read<T>(a.logits, keeps_logits ? logits : scores);
    if (!keeps_logits) return;
    if (a.noise == nullptr) {
      std::memcpy(static_cast<V*>(scores), static_cast<V*>(logits), layout.count * sizeof(V));
      return;
    }
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

// Turns the scores of a token in each lane into gates other than a softmax, in place, and returns their sums.
template <class Scalar, class Slope>
TOPN_INLINE Vector<Scalar> score_gates_of(Score score, const VectorLayout<Scalar>& layout, Vector<Scalar>* s,
                                          const Slope& slope) {
  return score == Score::Sigmoid ? score_gates<Score::Sigmoid>(layout, s, slope)
                                 : score_gates<Score::SqrtSoftplus>(layout, s, slope);
}

// Returns the values of the experts of a rank in a row, 0 where there is no expert.
template <class Scalar>
TOPN_INLINE Vector<Scalar> at_chosen(const VectorLayout<Scalar>& layout, const Vector<Scalar>* row,
                                     typename VectorLayout<Scalar>::Key expert) {
  const auto chosen = expert >= 0;
  return masked(chosen, layout.at(row, expert & chosen));
}

// Returns the logsumexps in double; NaN where a token has a NaN.
template <class Scalar>
TOPN_INLINE InDouble<Scalar> value_of(const LogSumExp<Vector<Scalar>>& lse) {
  const auto max = InDouble<Scalar>::of(lse.max);
  const auto log = InDouble<Scalar>::of(lse.sum == lse.sum ? VectorLayout<Scalar>::log(lse.sum) : lse.sum);
  return InDouble<Scalar>::map([&](int i) { return max.vectors[i] + log.vectors[i]; });
}

}  // namespace topn_gating::cpu::TOPN_LEVEL
