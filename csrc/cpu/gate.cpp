// SPEC steps 3 to 6 and 10 on the CPU: as many tokens at a time as a vector has lanes, their rows in the first-level cache.
#include "cpu/parallel.h"
#include "cpu/tokens.h"
#include "cpu/topn.h"

namespace TOPN_NAMESPACE {
namespace {

// What one tile of tokens adds to its group's losses.
struct TileSums {
  double* importance;  // (e)
  double* z_loss;      // ()
  int32_t* top_count;  // (e)

  TileSums(void* workspace, int64_t tiles, int64_t experts, int64_t tile)
      : importance(static_cast<double*>(workspace) + tile * experts),
        z_loss(static_cast<double*>(workspace) + tiles * experts + tile),
        top_count(reinterpret_cast<int32_t*>(static_cast<double*>(workspace) + tiles * (experts + 1)) + tile * experts) {}
};

// SPEC step 6, in place: v_k to w_k.
template <class R>
TOPN_INLINE void normalise(Vector<R>* v, int64_t top_n, double eps) {
  if (top_n == 1) return;
  Wide<R> sum{};
  for (int64_t k = 0; k < top_n; ++k) sum += Wide<R>::of(v[k]);
  const auto denominator = Wide<R>::map([&](int i) { return sum.part[i] < eps ? Doubles{} + eps : sum.part[i]; });
  const Vector<R> rounded = denominator.rounded();
  for (int64_t k = 0; k < top_n; ++k) v[k] /= rounded;
}

template <class R, class T>
class TileGating {
 public:
  explicit TileGating(const Gate& args)
      : a_(args), tokens_(args), keys_(a_.top_n), expert_(a_.top_n), v_(a_.top_n), importance_(a_.losses ? a_.experts : 0) {}

  void run(const GateTile& tile, const TileSums& sums) {
    if (a_.losses) {
      std::fill_n(static_cast<Wide<R>*>(importance_), a_.experts, Wide<R>{});
      std::fill_n(sums.top_count, a_.experts, 0);
      z_loss_ = {};
    }
    for (int64_t token = tile.first; token < tile.last; token += Lanes::w) {
      tokens_.take(token, tile.last);
      gate(sums.top_count);
    }
    if (a_.losses) {
      for (int64_t e = 0; e < a_.experts; ++e) sums.importance[e] = importance_[e].sum();
      *sums.z_loss = z_loss_.sum();
    }
  }

 private:
  using V = Vector<R>;
  using Lanes = TokenLanes<R>;
  using Key = typename Lanes::Key;
  using Real = RealOf<T>;

  void gate(int32_t* top_count) {
    const Lanes& lanes = tokens_.lanes;
    V* s = tokens_.s;
    tokens_.read_scores();
    stable_topn(lanes, s, int(a_.top_n), keys_, expert_);
    const LogSumExp<V> lse = softmax(lanes, s);
    if (a_.losses) add_to_losses(lse, top_count);
    if constexpr (std::is_same_v<R, double>) {
      if (a_.soft) {
        const SoftTopN<V> soft(lanes, lanes.experts, int(a_.top_n), s);
        for (int64_t k = 0; k < a_.top_n; ++k) v_[k] = soft.score(lanes.at(s, expert_[k]));
      }
    }
    if (!a_.soft) {
      for (int64_t k = 0; k < a_.top_n; ++k) v_[k] = lanes.at(s, expert_[k]);
    }
    normalise<R>(v_, a_.top_n, a_.eps);
    for (int l = 0; l < tokens_.count; ++l) {
      const int64_t pairs = (tokens_.first + l) * a_.top_n;
      for (int64_t k = 0; k < a_.top_n; ++k) {
        static_cast<Real*>(a_.weight)[pairs + k] = Real(v_[k][l]);
        a_.expert[pairs + k] = int32_t(expert_[k][l]);
      }
    }
  }

  void add_to_losses(LogSumExp<V> lse, int32_t* top_count) {
    const Key real = tokens_.real();
    for (int i = 0; i < tokens_.lanes.count; ++i) importance_[i] += Wide<R>::of(masked(real, tokens_.s[i]));
    for (int l = 0; l < tokens_.count; ++l) top_count[expert_[0][l]] -= int32_t(real[l]);
    if (a_.noise != nullptr) lse = softmax(tokens_.lanes, static_cast<V*>(tokens_.z));
    // exp(0) alone adds nothing: log 1 is 0.
    const auto value = value_of<R>({masked(real, lse.max), real ? lse.sum : V{} + 1.0f});
    z_loss_ += Wide<R>::map([&](int i) { return value.part[i] * value.part[i]; });
  }

  const Gate& a_;
  Tokens<R, T, Gate> tokens_;
  Scratch<Key> keys_, expert_;  // (k)
  Scratch<V> v_;                // (k)
  Scratch<Wide<R>> importance_;  // (e)
  Wide<R> z_loss_;
};

template <class R, class T>
void gate_tokens(const Gate& a, int64_t begin, int64_t end) {
  TileGating<R, T> gating(a);
  const int64_t tiles = a.groups * gate_tiles(a.tokens);
  for (int64_t tile = begin; tile < end; ++tile) gating.run(GateTile(a, tile), TileSums(a.workspace, tiles, a.experts, tile));
}

// Adds a group's tiles up, in order.
template <class Real>
GroupSums gate_group(const Gate& a, int64_t tiles_of_group, int64_t group) {
  const int64_t tiles = a.groups * tiles_of_group;
  Scratch<double> importance(a.experts);
  std::fill_n(static_cast<double*>(importance), a.experts, 0.0);
  int32_t* top_count = a.top_count + group * a.experts;
  std::fill_n(top_count, a.experts, 0);
  GroupSums sum{};
  for (int64_t tile = group * tiles_of_group; tile < (group + 1) * tiles_of_group; ++tile) {
    const TileSums sums(a.workspace, tiles, a.experts, tile);
    for (int64_t e = 0; e < a.experts; ++e) importance[e] += sums.importance[e];
    for (int64_t e = 0; e < a.experts; ++e) top_count[e] += sums.top_count[e];
    sum.z_loss += *sums.z_loss;
  }
  int64_t real = 0;
  for (int64_t e = 0; e < a.experts; ++e) real += top_count[e];
  const double share = 1.0 / double(std::max<int64_t>(real, 1));
  Real* mean = static_cast<Real*>(a.importance) + group * a.experts;
  for (int64_t e = 0; e < a.experts; ++e) {
    mean[e] = Real(importance[e] * share);
    sum.balance += importance[e] * share * (top_count[e] * share);
  }
  sum.tokens = double(real);
  return sum;
}

template <class Real>
void gate_losses(const Gate& a, int64_t tiles_of_group, ParallelFor parallel_for) {
  if (!a.losses) {
    std::fill_n(static_cast<Real*>(a.importance), a.groups * a.experts, Real(0));
    std::fill_n(a.top_count, a.groups * a.experts, 0);
    *static_cast<Real*>(a.balance_loss) = *static_cast<Real*>(a.router_z_loss) = 0;
    return;
  }
  GroupSums* sums = gate_group_sums(a.workspace, a.groups, a.tokens, a.experts);
  parallel(parallel_for, a.groups, double(tiles_of_group * a.experts), [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) sums[group] = gate_group<Real>(a, tiles_of_group, group);
  });
  GroupSums all{};
  for (int64_t group = 0; group < a.groups; ++group) {
    all.balance += sums[group].balance;
    all.z_loss += sums[group].z_loss;
    all.tokens += sums[group].tokens;
  }
  // e² · mean over groups and experts
  *static_cast<Real*>(a.balance_loss) = Real(all.balance * double(a.experts) / double(std::max<int64_t>(a.groups, 1)));
  *static_cast<Real*>(a.router_z_loss) = Real(all.z_loss / std::max(all.tokens, 1.0));
}

}  // namespace

void run(const Gate& a, ParallelFor parallel_for) {
  const int64_t tiles_of_group = gate_tiles(a.tokens);
  with_type(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    using Real = RealOf<T>;
    parallel(parallel_for, a.groups * tiles_of_group, gate_tile_cost(a), [&](int64_t begin, int64_t end) {
      a.soft ? gate_tokens<double, T>(a, begin, end) : gate_tokens<Real, T>(a, begin, end);
    });
    gate_losses<Real>(a, tiles_of_group, parallel_for);
  });
}

}  // namespace TOPN_NAMESPACE
