// docs/spec.md, steps 3 to 6, 10 and 11, on the CPU. A vector has one token in each lane, and their rows fit the first-level
// cache.
#pragma once

#include "cpu/parallel.h"
#include "cpu/tokens.h"
#include "cpu/topn.h"

namespace topn_gating::cpu::TOPN_LEVEL {
namespace {

// Where the workspace holds the sums of a tile's tokens.
struct TileSums {
  TokenSums* tokens;   // ()
  double* importance;  // (e) sums of the gates of valid tokens, where losses are wanted
  int32_t* counts;     // (e) number of the counted ranks of valid tokens that chose this expert, where losses are wanted

  TileSums(void* workspace, int64_t tiles, int64_t experts, int64_t tile)
      : tokens(static_cast<TokenSums*>(workspace) + tile),
        importance(reinterpret_cast<double*>(static_cast<TokenSums*>(workspace) + tiles) + tile * experts),
        counts(reinterpret_cast<int32_t*>(importance + (tiles - tile) * experts) + tile * experts) {}
};

// docs/spec.md, step 6: turns v_k into w_k, in place.
template <class Scalar>
TOPN_INLINE void normalise(Vector<Scalar>* v, int64_t top_n, const GateOptions& options) {
  InDouble<Scalar> sum{};
  for (int64_t k = 0; k < top_n; ++k) sum += InDouble<Scalar>::of(v[k]);
  const auto divisor = InDouble<Scalar>::map([&](int i) { return weight_divisor(sum.vectors[i], options); }).rounded();
  for (int64_t k = 0; k < top_n; ++k) v[k] /= divisor;
}

// Gates the tokens of one tile after another, of element type T, computed in Scalar.
template <class Scalar, class T>
class TileGating {
 public:
  explicit TileGating(const Gate& args)
      : a_(args), softmax_(a_.score == Score::Softmax), tokens_(args, !softmax_ && a_.losses), selection_(args), keys_(a_.top_n),
        expert_(a_.top_n), v_(a_.top_n), importance_(a_.losses ? a_.experts : 0) {}

  void run(const GateTile& tile, const TileSums& sums) {
    if (a_.losses) {
      std::fill_n(static_cast<InDouble<Scalar>*>(importance_), a_.experts, InDouble<Scalar>{});
      std::fill_n(sums.counts, a_.experts, 0);
    }
    valid_tokens_ = 0;
    z_loss_ = entropy_ = squares_ = {};
    largest_ = Key{};
    for (int64_t token = tile.first; token < tile.last; token += RowLayout::tokens) {
      tokens_.move_to(token, tile.last);
      gate(sums.counts);
    }
    if (a_.losses) {
      for (int64_t e = 0; e < a_.experts; ++e) sums.importance[e] = importance_[e].sum();
    }
    *sums.tokens = {double(valid_tokens_), z_loss_.sum(), entropy_.sum(), squares_.sum(), largest_of_lanes()};
  }

 private:
  using V = Vector<Scalar>;
  using RowLayout = VectorLayout<Scalar>;
  using Key = typename RowLayout::Key;
  using Int = typename RowLayout::Int;
  using Weight = ComputeType<T>;

  // The sums of a token's gates: the logsumexp of the scores for a softmax, else the sum of the gates.
  struct GateSums {
    LogSumExp<V> lse{};
    V sum{};
  };

  void gate(int32_t* counts) {
    V* s = tokens_.scores;
    tokens_.read_scores();
    const Key valid = tokens_.valid();
    const bool by_scores = a_.given == nullptr && !selects_by_gates(a_), statistics = a_.statistics != nullptr;
    if (a_.given != nullptr) read_given();
    if (by_scores && statistics && !tokens_.keeps_logits) {  // in the same pass
      LogitSums sums;
      choose([&](int i) {
        sums.add(s[i]);
        return score_key<RowLayout>(s[i]);
      });
      add_logits(sums, valid);
    } else {
      if (by_scores) choose([&](int i) { return score_key<RowLayout>(s[i]); });
      if (statistics) add_logits(sum_logits(), valid);
    }
    const GateSums sums = gates();
    if (a_.given == nullptr && selects_by_gates(a_)) selection_.select(s, expert_);
    if (a_.losses || a_.statistics != nullptr) valid_tokens_ += valid_lanes(valid);
    if (a_.losses) add_to_losses(sums, valid, counts);
    if (a_.statistics != nullptr) add_entropy(sums, valid);
    write_weights();
  }

  // docs/spec.md, step 5, by keys of the scores.
  template <class KeyOf>
  TOPN_INLINE void choose(const KeyOf& key_of) {
    stable_topn(key_of, tokens_.layout.count, int(a_.top_n), static_cast<Key*>(keys_), static_cast<Key*>(expert_));
  }

  // docs/spec.md, step 4: turns the scores into gates.
  GateSums gates() {
    V* s = tokens_.scores;
    GateSums sums;
    if (!softmax_) {
      sums.sum = score_gates_of<Scalar>(a_.score, tokens_.layout, s, [](int, V) {});
    } else {
      sums.lse = a_.statistics != nullptr ? softmax<true>(tokens_.layout, s) : softmax(tokens_.layout, s);
    }
    return sums;
  }

  void read_given() {
    for (int l = 0; l < RowLayout::tokens; ++l) {
      const int32_t* given = a_.given + (tokens_.first + std::min(l, tokens_.count - 1)) * a_.top_n;
      for (int64_t k = 0; k < a_.top_n; ++k) expert_[k][l] = given[k] >= 0 && given[k] < a_.experts ? given[k] : -1;
    }
  }

  // docs/spec.md, step 6.
  void write_weights() {
    const RowLayout& layout = tokens_.layout;
    V* s = tokens_.scores;
    if constexpr (std::is_same_v<Scalar, double>) {
      if (a_.soft) {
        const SoftTopN<V> soft(layout, layout.experts, int(a_.top_n), s);
        for (int64_t k = 0; k < a_.top_n; ++k) {
          v_[k] = masked(expert_[k] >= 0, soft.score(at_chosen<Scalar>(layout, s, expert_[k])));
        }
      }
    }
    if (!a_.soft) {
      for (int64_t k = 0; k < a_.top_n; ++k) v_[k] = at_chosen<Scalar>(layout, s, expert_[k]);
    }
    normalise<Scalar>(v_, a_.top_n, a_);
    for (int l = 0; l < tokens_.count; ++l) {
      const int64_t pairs = (tokens_.first + l) * a_.top_n;
      for (int64_t k = 0; k < a_.top_n; ++k) {
        static_cast<Weight*>(a_.weight)[pairs + k] = Weight(v_[k][l]);
        a_.expert[pairs + k] = int32_t(expert_[k][l]);
      }
    }
  }

  int valid_lanes(Key valid) const {
    if (a_.token_mask == nullptr) return tokens_.count;
    int lanes = 0;
    for (int l = 0; l < tokens_.count; ++l) lanes -= int(valid[l]);
    return lanes;
  }

  void add_to_losses(const GateSums& sums, Key valid, int32_t* counts) {
    const V one = V{} + 1.0f, share = softmax_ ? one : one / gate_divisor<RowLayout>(sums.sum, a_.eps);
    for (int i = 0; i < tokens_.layout.count; ++i) {
      importance_[i] += InDouble<Scalar>::of(masked(valid, tokens_.scores[i] * share));
    }
    const int64_t counted = a_.all_ranks ? a_.top_n : 1;
    for (int64_t k = 0; k < counted; ++k) {
      for (int l = 0; l < tokens_.count; ++l) {
        if (expert_[k][l] >= 0) counts[expert_[k][l]] -= int32_t(valid[l]);
      }
    }
    const LogSumExp<V> lse = tokens_.keeps_logits ? softmax(tokens_.layout, static_cast<V*>(tokens_.logits)) : sums.lse;
    // A masked token adds nothing: max + log(sum) = 0 + log(1).
    const auto value = value_of<Scalar>({masked(valid, lse.max), valid ? lse.sum : one});
    z_loss_ += InDouble<Scalar>::map([&](int i) { return value.vectors[i] * value.vectors[i]; });
  }

  // Sums of a token's logits for the statistics.
  struct LogitSums {
    V squares{};
    Key largest{};  // bits of the largest magnitude

    TOPN_INLINE void add(V logit) {
      squares += logit * logit;
      const Key magnitude = RowLayout::as_int(logit) & std::numeric_limits<Int>::max();
      largest = magnitude > largest ? magnitude : largest;
    }
  };

  LogitSums sum_logits() const {
    const V* z = tokens_.keeps_logits ? tokens_.logits : tokens_.scores;
    LogitSums sums;
    for (int i = 0; i < tokens_.layout.count; ++i) sums.add(z[i]);
    return sums;
  }

  void add_logits(const LogitSums& sums, Key valid) {
    squares_ += InDouble<Scalar>::of(masked(valid, sums.squares));
    const Key largest = sums.largest & valid;
    largest_ = largest > largest_ ? largest : largest_;
  }

  void add_entropy(const GateSums& sums, Key valid) {
    using D = InDouble<Scalar>;
    const V one = V{} + 1.0f;
    if (softmax_) {
      const V sum = valid ? sums.lse.sum : one;
      const D log_sum = D::of(RowLayout::log(sum)), divisor = D::of(sum), moment = D::of(masked(valid, sums.lse.moment));
      entropy_ += D::map([&](int i) { return softmax_entropy(log_sum.vectors[i], divisor.vectors[i], moment.vectors[i]); });
      return;
    }
    V terms{};
    for (int i = 0; i < tokens_.layout.count; ++i) terms += entropy_term<RowLayout>(tokens_.scores[i]);
    const V by = valid ? gate_divisor<RowLayout>(sums.sum, a_.eps) : one;
    const D log_divisor = D::of(RowLayout::log(by)), divisor = D::of(by);
    const D all_terms = D::of(masked(valid, terms)), sum = D::of(masked(valid, sums.sum));
    entropy_ += D::map([&](int i) {
      return score_entropy(all_terms.vectors[i], sum.vectors[i], divisor.vectors[i], log_divisor.vectors[i]);
    });
  }

  double largest_of_lanes() const {
    int most = 0;
    for (int l = 1; l < RowLayout::tokens; ++l) most = largest_[l] > largest_[most] ? l : most;
    return RowLayout::as_float(largest_)[most];
  }

  const Gate& a_;
  const bool softmax_;
  Tokens<Scalar, T> tokens_;
  GateSelection<Scalar> selection_;
  Scratch<Key> keys_, expert_;            // (k)
  Scratch<V> v_;                          // (k)
  Scratch<InDouble<Scalar>> importance_;  // (e)
  int64_t valid_tokens_ = 0;
  InDouble<Scalar> z_loss_, entropy_, squares_;
  Key largest_;  // bits of the largest magnitude of a logit
};

template <class Scalar, class T>
void run_tiles(const Gate& a, int64_t begin, int64_t end) {
  TileGating<Scalar, T> gating(a);
  const int64_t tiles = a.groups * gate_tiles(a.tokens);
  for (int64_t tile = begin; tile < end; ++tile) gating.run(GateTile(a, tile), TileSums(a.workspace, tiles, a.experts, tile));
}

// Adds the sums of a group's tiles, in order. Writes the group's importance and counts where losses are wanted.
template <class Weight>
GroupSums finish_group(const Gate& a, int64_t group) {
  const int64_t tiles_of_group = gate_tiles(a.tokens), tiles = a.groups * tiles_of_group;
  const auto for_tiles = [&](const auto& add) {
    for (int64_t tile = group * tiles_of_group; tile < (group + 1) * tiles_of_group; ++tile) {
      add(TileSums(a.workspace, tiles, a.experts, tile));
    }
  };
  GroupSums sum{};
  for_tiles([&](const TileSums& tile) { sum.tokens += *tile.tokens; });
  if (!a.losses) return sum;

  Scratch<double> importance(a.experts);
  std::fill_n(static_cast<double*>(importance), a.experts, 0.0);
  int32_t* counts = a.counts + group * a.experts;
  std::fill_n(counts, a.experts, 0);
  for_tiles([&](const TileSums& tile) {
    for (int64_t e = 0; e < a.experts; ++e) importance[e] += tile.importance[e];
    for (int64_t e = 0; e < a.experts; ++e) counts[e] += tile.counts[e];
  });
  int64_t counted = 0;
  for (int64_t e = 0; e < a.experts; ++e) counted += counts[e];
  const GroupShares shares(sum.tokens.valid_tokens, double(counted));
  Weight* mean = static_cast<Weight*>(a.importance) + group * a.experts;
  for (int64_t e = 0; e < a.experts; ++e) {
    mean[e] = Weight(importance[e] * shares.of_tokens);
    sum.balance += balance_term(importance[e], counts[e], shares);
  }
  return sum;
}

// Writes importance, counts, losses and statistics.
template <class Weight>
void write_sums(const Gate& a, ParallelFor parallel_for) {
  Weight *balance = static_cast<Weight*>(a.balance_loss), *z = static_cast<Weight*>(a.router_z_loss);
  if (!a.losses) {
    std::fill_n(static_cast<Weight*>(a.importance), a.groups * a.experts, Weight(0));
    std::fill_n(a.counts, a.groups * a.experts, 0);
    *balance = *z = 0;
    if (a.statistics == nullptr) return;
  }
  GroupSums* sums = reinterpret_cast<GroupSums*>(static_cast<char*>(a.workspace) + gate_tile_bytes(a));
  parallel(parallel_for, a.groups, double(gate_tiles(a.tokens) * a.experts), [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) sums[group] = finish_group<Weight>(a, group);
  });
  GroupSums all{};
  for (int64_t group = 0; group < a.groups; ++group) {
    all.balance += sums[group].balance;
    all.tokens += sums[group].tokens;
  }
  const TokenSums& tokens = all.tokens;
  if (a.losses) {
    *balance = Weight(balance_loss(all.balance, a.experts, a.groups));
    *z = Weight(router_z_loss(tokens.z_loss, tokens.valid_tokens));
  }
  if (a.statistics != nullptr) {
    Weight* statistics = static_cast<Weight*>(a.statistics);
    statistics[0] = Weight(tokens.entropy / at_least_one(tokens.valid_tokens));
    statistics[1] = Weight(tokens.squares == tokens.squares ? tokens.largest : tokens.squares);  // NaN
    statistics[2] = Weight(logit_rms(tokens.squares, tokens.valid_tokens, a.experts));
  }
}

}  // namespace

void run(const Gate& a, ParallelFor parallel_for) {
  with_type(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    using Weight = ComputeType<T>;
    parallel(parallel_for, a.groups * gate_tiles(a.tokens), gate_tile_cost(a), [&](int64_t begin, int64_t end) {
      a.soft ? run_tiles<double, T>(a, begin, end) : run_tiles<Weight, T>(a, begin, end);
    });
    write_sums<Weight>(a, parallel_for);
  });
}

}  // namespace topn_gating::cpu::TOPN_LEVEL
