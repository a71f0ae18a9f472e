// The tokens that `gate` and its gradient work on at a time: as many as a vector has lanes.
#pragma once

#include "cpu/columns.h"
#include "cpu/scratch.h"
#include "cpu/workspace.h"

namespace TOPN_NAMESPACE {

// Tokens are counted over all groups.
struct GateTile {
  int64_t group, first, last;

  template <class Args>
  GateTile(const Args& a, int64_t tile) {
    const int64_t of_group = gate_tiles(a.tokens), start = tile % of_group * kGateTile;
    group = tile / of_group;
    first = group * a.tokens + start;
    last = group * a.tokens + std::min(a.tokens, start + kGateTile);
  }
};

// What a tile takes a core, in nanoseconds: see `parallel`.
template <class Args>
double gate_tile_cost(const Args& a) {
  return double(kGateTile * a.experts) * (a.soft ? 50 : 2.5);
}

// The scores of a few tokens, expert by expert. Lanes past `count` hold copies of the last token: they are computed with the
// others and left unwritten.
template <class R, class T, class Args>
struct Tokens {
  using V = Vector<R>;
  using Lanes = TokenLanes<R>;
  using Key = typename Lanes::Key;
  using Real = RealOf<T>;

  const Args& a;
  Lanes lanes;
  Scratch<V> s, z;  // scores; logits, where noise makes them others
  int64_t first = 0;
  int count = 0;

  explicit Tokens(const Args& args)
      : a(args), lanes(a.experts), s(a.experts + Lanes::w), z(a.noise == nullptr ? 0 : a.experts + Lanes::w) {}

  void take(int64_t token, int64_t last) {
    first = token;
    count = int(std::min<int64_t>(Lanes::w, last - token));
  }

  // SPEC step 3.
  void read_scores() {
    load<T>(a.logits, a.noise == nullptr ? s : z);
    if (a.noise == nullptr) return;
    load<Real>(a.noise, s);
    for (int i = 0; i < lanes.count; ++i) s[i] = z[i] + R(a.noise_mult) * gumbel<R>(s[i]);
  }

  // Lanes that have a real token: all bits set.
  Key real() const {
    Key mask{};
    for (int l = 0; l < count; ++l) mask[l] = a.token_mask == nullptr || a.token_mask[first + l] ? -1 : 0;
    return mask;
  }

 private:
  template <class Element>
  void load(const void* tensor, V* columns) {
    const Element* elements = static_cast<const Element*>(tensor);
    load_columns<R>(elements + first * a.experts, count, lanes.experts, elements + a.groups * a.tokens * a.experts, columns);
  }
};

// v where the mask's bits are set, else 0, whatever v is.
template <class V, class Key>
TOPN_INLINE V masked(Key mask, V v) {
  return (V)((Key)v & mask);
}

// The logsumexps; NaN is the sum of a token with NaN.
template <class R>
TOPN_INLINE Wide<R> value_of(const LogSumExp<Vector<R>>& lse) {
  const auto max = Wide<R>::of(lse.max), log = Wide<R>::of(lse.sum == lse.sum ? log_value(lse.sum) : lse.sum);
  return Wide<R>::map([&](int i) { return max.part[i] + log.part[i]; });
}

}  // namespace TOPN_NAMESPACE
