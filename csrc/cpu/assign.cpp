// SPEC steps 7 and 8 on the CPU.
//
// A slot is a count of earlier routed pairs of the same rank and expert, past the slots that lower ranks took: tiles of
// tokens are counted, the counts scanned over tiles and ranks, and every tile then hands out its slots alone. A group of one
// tile goes through the three steps at once.
#include "cpu/half.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/workspace.h"

namespace TOPN_NAMESPACE {
namespace {

struct Tile {
  int64_t first, last;  // tokens, over all groups
  int32_t* counts;      // (k, e)

  Tile(const Assign& a, int64_t tile, int32_t* counts_of_tile) : counts(counts_of_tile) {
    const int64_t size = assign_tile(a.experts), of_group = assign_tiles(a.tokens, a.experts);
    const int64_t group = tile / of_group, start = tile % of_group * size;
    first = group * a.tokens + start;
    last = group * a.tokens + std::min(a.tokens, start + size);
  }
};

constexpr double kPairCost = 7;  // nanoseconds of a core: see `parallel`

// Which pairs are routed is a matter of chance, so no branch depends on it: `slot` holds 0 for a routed pair and -1, that is
// kBelowThreshold, for another until `hand_out`, and both serve as masks.
static_assert(kBelowThreshold == -1 && kOverCapacity == -2);

// Of a tile's pairs, by the policy; is_routed(weight, draw, threshold) is that of ranks above 0. Whatever `draws` is, it has
// the shape of the weights.
template <class Real, class IsRouted>
void mark_by(const Assign& a, const Tile& tile, const Real* draws, const IsRouted& is_routed) {
  const int64_t begin = tile.first * a.top_n, end = tile.last * a.top_n;
  const Real* weight = static_cast<const Real*>(a.weight);
  for (int64_t k = 1; k < a.top_n; ++k) {
    const Real threshold = a.threshold == nullptr ? Real(0) : static_cast<const Real*>(a.threshold)[k];
    for (int64_t pair = begin + k; pair < end; pair += a.top_n) {
      a.slot[pair] = int32_t(is_routed(weight[pair], draws[pair], threshold)) - 1;
    }
  }
  for (int64_t pair = begin; pair < end; pair += a.top_n) a.slot[pair] = 0;
}

template <class Real>
void mark(const Assign& a, const Tile& tile) {
  const Real* weight = static_cast<const Real*>(a.weight);
  switch (a.policy) {
    case Policy::Random:
      return mark_by(a, tile, static_cast<const Real*>(a.draws), [eps = Real(a.eps)](Real w, Real draw, Real threshold) {
        return draw < w / std::max(threshold, eps);
      });
    case Policy::Threshold: return mark_by(a, tile, weight, [](Real w, Real, Real threshold) { return w > threshold; });
    case Policy::All: return mark_by(a, tile, weight, [](Real, Real, Real) { return true; });
    case Policy::None: return mark_by(a, tile, weight, [](Real, Real, Real) { return false; });
  }
}

// Marks and counts the tile's routed pairs.
template <class Real>
void count(const Assign& a, const Tile& tile) {
  mark<Real>(a, tile);
  std::fill_n(tile.counts, a.top_n * a.experts, 0);
  for (int64_t token = tile.first; token < tile.last; ++token) {
    const bool real = a.token_mask == nullptr || a.token_mask[token];
    for (int64_t k = 0; k < a.top_n; ++k) {
      const int64_t pair = token * a.top_n + k;
      const int32_t e = a.expert[pair], known = -int32_t(uint32_t(e) < uint64_t(a.experts));
      const int32_t unrouted = a.slot[pair] | ~known | (int32_t(real) - 1);
      a.slot[pair] = unrouted;
      tile.counts[k * a.experts + (e & ~unrouted)] += 1 + unrouted;
    }
  }
}

// Turns the counts (tiles, k, e) of a group into the first slot of each tile, rank and expert; empties the slots that stay
// free.
void scan(const Assign& a, int64_t group, int32_t* counts) {
  const int64_t tiles = assign_tiles(a.tokens, a.experts), ranks = a.top_n * a.experts;
  int32_t* demand = a.demand + group * a.experts;
  std::fill_n(demand, a.experts, 0);
  const int32_t capacity = int32_t(a.capacity);
  for (int64_t k = 0; k < a.top_n; ++k) {
    // demand is the running total of routed pairs; the slots that lower ranks took are min(C, demand).
    for (int64_t tile = 0; tile < tiles; ++tile) {
      int32_t* of_tile = counts + tile * ranks + k * a.experts;
      for (int64_t e = 0; e < a.experts; ++e) {
        const int32_t routed = of_tile[e];
        of_tile[e] = demand[e];
        demand[e] += routed;
      }
    }
  }
  for (int64_t e = 0; e < a.experts; ++e) {
    int32_t* source = a.source + (group * a.experts + e) * a.capacity;
    std::fill(source + std::min(demand[e], capacity), source + capacity, -1);
  }
}

// The values of pairs that hold a slot, 0 for the others.
template <class Real>
void keep_held(const int32_t* slot, const void* values, void* kept, int64_t begin, int64_t end) {
  const Real* from = static_cast<const Real*>(values);
  Real* to = static_cast<Real*>(kept);
  for (int64_t i = begin; i < end; ++i) to[i] = slot[i] >= 0 ? from[i] : Real(0);
}

template <class Real>
void hand_out(const Assign& a, const Tile& tile) {
  const int32_t capacity = int32_t(a.capacity);
  const int64_t group = tile.first / a.tokens, pairs_before = group * a.tokens * a.top_n;
  int32_t* sources = a.source + group * a.experts * a.capacity;
  for (int64_t token = tile.first; token < tile.last; ++token) {
    for (int64_t k = 0; k < a.top_n; ++k) {
      const int64_t pair = token * a.top_n + k;
      const int32_t unrouted = a.slot[pair], e = a.expert[pair] & ~unrouted;
      int32_t& next = tile.counts[k * a.experts + e];
      const int32_t slot = next;
      next += 1 + unrouted;
      const bool held = (unrouted == 0) & (slot < capacity);
      a.slot[pair] = held ? slot : kOverCapacity - unrouted;
      if (held) sources[e * a.capacity + slot] = int32_t(pair - pairs_before);
    }
  }
  keep_held<Real>(a.slot, a.weight, a.kept, tile.first * a.top_n, tile.last * a.top_n);
}

template <class Real>
void assign_short_groups(const Assign& a, ParallelFor parallel_for) {
  const int64_t ranks = a.top_n * a.experts;
  parallel(parallel_for, a.groups, kPairCost * double(a.tokens * a.top_n) + double(ranks), [&](int64_t begin, int64_t end) {
    Scratch<int32_t> counts(ranks);
    for (int64_t group = begin; group < end; ++group) {
      const Tile whole(a, group, counts);
      count<Real>(a, whole);
      scan(a, group, counts);
      hand_out<Real>(a, whole);
    }
  });
}

template <class Real>
void assign_long_groups(const Assign& a, ParallelFor parallel_for) {
  const int64_t of_group = assign_tiles(a.tokens, a.experts), ranks = a.top_n * a.experts;
  int32_t* counts = static_cast<int32_t*>(a.workspace);
  const auto for_tiles = [&](void (*step)(const Assign&, const Tile&)) {
    const double cost = kPairCost / 2 * double(assign_tile(a.experts) * a.top_n);
    parallel(parallel_for, a.groups * of_group, cost, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) step(a, Tile(a, tile, counts + tile * ranks));
    });
  };
  for_tiles(count<Real>);
  parallel(parallel_for, a.groups, double(of_group * ranks), [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) scan(a, group, counts + group * of_group * ranks);
  });
  for_tiles(hand_out<Real>);
}

template <class Real>
void assign_as(const Assign& a, ParallelFor parallel_for) {
  if (a.tokens == 0) {  // no tile, but slots to empty
    for (int64_t group = 0; group < a.groups; ++group) scan(a, group, nullptr);
  } else if (assign_tiles(a.tokens, a.experts) == 1) {
    assign_short_groups<Real>(a, parallel_for);
  } else {
    assign_long_groups<Real>(a, parallel_for);
  }
}

template <class Real>
void assign_backward_as(const AssignBackward& a, ParallelFor parallel_for) {
  parallel(parallel_for, a.pairs, 0.2, [&](int64_t begin, int64_t end) {
    keep_held<Real>(a.slot, a.grad_kept, a.grad_weight, begin, end);
  });
}

}  // namespace

void run(const Assign& a, ParallelFor parallel_for) {
  a.is_double ? assign_as<double>(a, parallel_for) : assign_as<float>(a, parallel_for);
}

void run(const AssignBackward& a, ParallelFor parallel_for) {
  a.is_double ? assign_backward_as<double>(a, parallel_for) : assign_backward_as<float>(a, parallel_for);
}

}  // namespace TOPN_NAMESPACE
