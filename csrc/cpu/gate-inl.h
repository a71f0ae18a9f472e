// docs/spec.md, steps 3 to 6 and 10, on the CPU. A vector has one token in each lane, and their rows fit the first-level cache.
#pragma once

#include "cpu/parallel.h"
#include "cpu/tokens.h"
#include "cpu/topn.h"

namespace topn_gating::cpu::TOPN_LEVEL {
namespace {

// Where the workspace holds the sums of a tile's tokens for the losses.
struct TileSums {
  double* importance;  // (e) sums of the gates of valid tokens
  double* z_loss;      // () sum of logsumexp² of valid tokens
  int32_t* top_count;  // (e) number of valid tokens whose first choice is this expert

  TileSums(void* workspace, int64_t tiles, int64_t experts, int64_t tile)
      : importance(static_cast<double*>(workspace) + tile * experts),
        z_loss(static_cast<double*>(workspace) + tiles * experts + tile),
        top_count(reinterpret_cast<int32_t*>(static_cast<double*>(workspace) + tiles * (experts + 1)) + tile * experts) {}
};

// docs/spec.md, step 6: turns v_k into w_k, in place.
template <class Scalar>
TOPN_INLINE void normalise(Vector<Scalar>* v, int64_t top_n, double eps) {
  if (top_n == 1) return;
  InDouble<Scalar> sum{};
  for (int64_t k = 0; k < top_n; ++k) sum += InDouble<Scalar>::of(v[k]);
  const auto divisor = InDouble<Scalar>::map([&](int i) { return weight_divisor(sum.vectors[i], eps); }).rounded();
  for (int64_t k = 0; k < top_n; ++k) v[k] /= divisor;
}

// Gates the tokens of one tile after another, of element type T, computed in Scalar.
template <class Scalar, class T>
class TileGating {
 public:
  explicit TileGating(const Gate& args)
      : a_(args), tokens_(args), keys_(a_.top_n), expert_(a_.top_n), v_(a_.top_n), importance_(a_.losses ? a_.experts : 0) {}

  void run(const GateTile& tile, const TileSums& sums) {
    if (a_.losses) {
      std::fill_n(static_cast<InDouble<Scalar>*>(importance_), a_.experts, InDouble<Scalar>{});
      std::fill_n(sums.top_count, a_.experts, 0);
      z_loss_ = {};
    }
    for (int64_t token = tile.first; token < tile.last; token += RowLayout::tokens) {
      tokens_.move_to(token, tile.last);
      gate(sums.top_count);
    }
    if (a_.losses) {
      for (int64_t e = 0; e < a_.experts; ++e) sums.importance[e] = importance_[e].sum();
      *sums.z_loss = z_loss_.sum();
    }
  }

 private:
  using V = Vector<Scalar>;
  using RowLayout = VectorLayout<Scalar>;
  using Key = typename RowLayout::Key;
  using Weight = ComputeType<T>;

  void gate(int32_t* top_count) {
    const RowLayout& layout = tokens_.layout;
    V* s = tokens_.scores;
    tokens_.read_scores();
    stable_topn(layout, s, int(a_.top_n), keys_, expert_);
    const LogSumExp<V> lse = softmax(layout, s);
    if (a_.losses) add_to_losses(lse, top_count);
    if constexpr (std::is_same_v<Scalar, double>) {
      if (a_.soft) {
        const SoftTopN<V> soft(layout, layout.experts, int(a_.top_n), s);
        for (int64_t k = 0; k < a_.top_n; ++k) v_[k] = soft.score(layout.at(s, expert_[k]));
      }
    }
    if (!a_.soft) {
      for (int64_t k = 0; k < a_.top_n; ++k) v_[k] = layout.at(s, expert_[k]);
    }
    normalise<Scalar>(v_, a_.top_n, a_.eps);
    for (int l = 0; l < tokens_.count; ++l) {
      const int64_t pairs = (tokens_.first + l) * a_.top_n;
      for (int64_t k = 0; k < a_.top_n; ++k) {
        static_cast<Weight*>(a_.weight)[pairs + k] = Weight(v_[k][l]);
        a_.expert[pairs + k] = int32_t(expert_[k][l]);
      }
    }
  }

  void add_to_losses(LogSumExp<V> lse, int32_t* top_count) {
    const Key valid = tokens_.valid();
    for (int i = 0; i < tokens_.layout.count; ++i) {
      importance_[i] += InDouble<Scalar>::of(masked(valid, tokens_.scores[i]));
    }
    for (int l = 0; l < tokens_.count; ++l) top_count[expert_[0][l]] -= int32_t(valid[l]);
    if (a_.noise != nullptr) lse = softmax(tokens_.layout, static_cast<V*>(tokens_.logits));
    // A masked token adds nothing: max + log(sum) = 0 + log(1).
    const auto value = value_of<Scalar>({masked(valid, lse.max), valid ? lse.sum : V{} + 1.0f});
    z_loss_ += InDouble<Scalar>::map([&](int i) { return value.vectors[i] * value.vectors[i]; });
  }

  const Gate& a_;
  Tokens<Scalar, T> tokens_;
  Scratch<Key> keys_, expert_;           // (k)
  Scratch<V> v_;                         // (k)
  Scratch<InDouble<Scalar>> importance_;  // (e)
  InDouble<Scalar> z_loss_;
};

template <class Scalar, class T>
void run_tiles(const Gate& a, int64_t begin, int64_t end) {
  TileGating<Scalar, T> gating(a);
  const int64_t tiles = a.groups * gate_tiles(a.tokens);
  for (int64_t tile = begin; tile < end; ++tile) gating.run(GateTile(a, tile), TileSums(a.workspace, tiles, a.experts, tile));
}

// Adds the sums of a group's tiles, in order, and writes the group's importance and top_count.
template <class Weight>
GroupSums finish_group(const Gate& a, int64_t group) {
  const int64_t tiles_of_group = gate_tiles(a.tokens), tiles = a.groups * tiles_of_group;
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
  int64_t valid = 0;
  for (int64_t e = 0; e < a.experts; ++e) valid += top_count[e];
  sum.valid_tokens = double(valid);
  const double share = 1.0 / at_least_one(sum.valid_tokens);
  Weight* mean = static_cast<Weight*>(a.importance) + group * a.experts;
  for (int64_t e = 0; e < a.experts; ++e) {
    mean[e] = Weight(importance[e] * share);
    sum.balance += balance_term(importance[e], top_count[e], share);
  }
  return sum;
}

template <class Weight>
void write_losses(const Gate& a, ParallelFor parallel_for) {
  Weight *balance = static_cast<Weight*>(a.balance_loss), *z = static_cast<Weight*>(a.router_z_loss);
  if (!a.losses) {
    std::fill_n(static_cast<Weight*>(a.importance), a.groups * a.experts, Weight(0));
    std::fill_n(a.top_count, a.groups * a.experts, 0);
    *balance = *z = 0;
    return;
  }
  GroupSums* sums = reinterpret_cast<GroupSums*>(static_cast<char*>(a.workspace) + gate_tile_bytes(a));
  parallel(parallel_for, a.groups, double(gate_tiles(a.tokens) * a.experts), [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) sums[group] = finish_group<Weight>(a, group);
  });
  GroupSums all{};
  for (int64_t group = 0; group < a.groups; ++group) {
    all.balance += sums[group].balance;
    all.z_loss += sums[group].z_loss;
    all.valid_tokens += sums[group].valid_tokens;
  }
  *balance = Weight(balance_loss(all.balance, a.experts, a.groups));
  *z = Weight(router_z_loss(all.z_loss, all.valid_tokens));
}

}  // namespace

void run(const Gate& a, ParallelFor parallel_for) {
  with_type(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    using Weight = ComputeType<T>;
    parallel(parallel_for, a.groups * gate_tiles(a.tokens), gate_tile_cost(a), [&](int64_t begin, int64_t end) {
      a.soft ? run_tiles<double, T>(a, begin, end) : run_tiles<Weight, T>(a, begin, end);
    });
    write_losses<Weight>(a, parallel_for);
  });
}

}  // namespace topn_gating::cpu::TOPN_LEVEL
