// SPEC steps 3 to 6 and 10 on the CPU: a token at a time, its row in the first-level cache.
#include "cpu/parallel.h"
#include "cpu/token.h"
#include "cpu/workspace.h"

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

  void clear(int64_t experts) const {
    std::fill_n(importance, experts, 0.0);
    std::fill_n(top_count, experts, 0);
    *z_loss = 0;
  }
};

void add_to(double* sums, const Doubles* row, int experts) {
  constexpr int w = width<double>;
  int j = 0;
  for (; j + w <= experts; j += w) store(sums + j, load<Doubles>(sums + j) + row[j / w]);
  for (; j < experts; ++j) sums[j] += row[j / w][j % w];
}

void add_to(double* sums, const Floats* row, int experts) {
  constexpr int w = width<float>;
  using Wide = Vector<double, w>;
  int j = 0;
  for (; j + w <= experts; j += w) {
    store(sums + j, load<Wide>(sums + j) + __builtin_convertvector(row[j / w], Wide));
  }
  for (; j < experts; ++j) sums[j] += double(row[j / w][j % w]);
}

// SPEC step 6, in place: v_k to w_k.
template <class R>
void normalise(R* v, int64_t top_n, double eps) {
  if (top_n == 1) return;
  double sum = 0;
  for (int64_t k = 0; k < top_n; ++k) sum += double(v[k]);
  const R denominator = R(sum < eps ? eps : sum);
  for (int64_t k = 0; k < top_n; ++k) v[k] /= denominator;
}

template <class R, class T>
void gate_tokens(const Gate& a, int64_t tiles_of_group, int64_t begin, int64_t end) {
  using Real = RealOf<T>;
  Row<R, T> row(a.experts);
  auto& lanes = row.lanes;
  Scratch<typename CpuLanes<R>::Key> keys(lanes.count);
  Scratch<R> v(a.top_n);
  const int64_t tiles = a.groups * tiles_of_group;

  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t group = tile / tiles_of_group;
    const int64_t first = tile % tiles_of_group * kGateTile;
    const int64_t last = std::min(a.tokens, first + kGateTile);
    const TileSums sums(a.workspace, tiles, a.experts, tile);
    if (a.losses) sums.clear(a.experts);

    for (int64_t token = group * a.tokens + first; token < group * a.tokens + last; ++token) {
      row.read(a.logits, a.noise, a.noise_mult, token);
      for (int i = 0; i < lanes.count; ++i) keys[i] = score_key<CpuLanes<R>>(row.s[i]);
      for (int64_t j = lanes.experts; j < lanes.count * lanes.w; ++j) lanes.drop(keys, int(j));
      LogSumExp lse = softmax(lanes, static_cast<typename CpuLanes<R>::V*>(row.s));

      int32_t* expert = a.expert + token * a.top_n;
      stable_topn(lanes, static_cast<typename CpuLanes<R>::Key*>(keys), int(a.top_n), [&](int k, int chosen) {
        expert[k] = chosen;
        v[k] = lanes.at(row.s, chosen);
      });
      if (a.losses && (a.padding_mask == nullptr || a.padding_mask[token])) {
        add_to(sums.importance, row.s, lanes.experts);
        sums.top_count[expert[0]] += 1;
        if (a.noise != nullptr) lse = softmax(lanes, static_cast<typename CpuLanes<R>::V*>(row.z));
        *sums.z_loss += lse.value() * lse.value();
      }
      if constexpr (std::is_same_v<R, double>) {
        if (a.soft) {
          const SoftTopN soft(lanes, lanes.experts, int(a.top_n), static_cast<Doubles*>(row.s));
          for (int64_t k = 0; k < a.top_n; ++k) v[k] = soft.score(lanes.at(row.s, expert[k]));
        }
      }
      normalise(static_cast<R*>(v), a.top_n, a.eps);
      Real* weight = static_cast<Real*>(a.weight) + token * a.top_n;
      for (int64_t k = 0; k < a.top_n; ++k) weight[k] = Real(v[k]);
    }
  }
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
  parallel(parallel_for, a.groups, tiles_of_group * a.experts, [&](int64_t begin, int64_t end) {
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

void gate(const Gate& a, ParallelFor parallel_for) {
  const int64_t tiles_of_group = gate_tiles(a.tokens);
  with_type(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    using Real = RealOf<T>;
    parallel(parallel_for, a.groups * tiles_of_group, kGateTile * a.experts, [&](int64_t begin, int64_t end) {
      a.soft ? gate_tokens<double, T>(a, tiles_of_group, begin, end) : gate_tokens<Real, T>(a, tiles_of_group, begin, end);
    });
    gate_losses<Real>(a, tiles_of_group, parallel_for);
  });
}

}  // namespace TOPN_NAMESPACE
