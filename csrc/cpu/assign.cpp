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

template <class Real>
bool is_routed(const Assign& a, int64_t pair, int64_t k) {
  if (k == 0) return true;
  const Real w = static_cast<const Real*>(a.weight)[pair];
  switch (a.policy) {
    case Policy::Random: {
      const Real least = static_cast<const Real*>(a.threshold)[k];
      return static_cast<const Real*>(a.draws)[pair] < w / std::max(least, Real(a.eps));
    }
    case Policy::Threshold: return w > static_cast<const Real*>(a.threshold)[k];
    case Policy::All: return true;
    case Policy::None: return false;
  }
  return false;
}

// Counts the tile's routed pairs; `slot` holds 0 for them until `hand_out`.
template <class Real>
void count(const Assign& a, const Tile& tile) {
  std::fill_n(tile.counts, a.top_n * a.experts, 0);
  for (int64_t token = tile.first; token < tile.last; ++token) {
    const bool real = a.padding_mask == nullptr || a.padding_mask[token];
    for (int64_t k = 0; k < a.top_n; ++k) {
      const int64_t pair = token * a.top_n + k;
      const int64_t e = a.expert[pair];
      const bool routed = real && e >= 0 && e < a.experts && is_routed<Real>(a, pair, k);
      a.slot[pair] = routed ? 0 : kBelowThreshold;
      if (routed) tile.counts[k * a.experts + e] += 1;
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

template <class Real>
void hand_out(const Assign& a, const Tile& tile) {
  const int32_t capacity = int32_t(a.capacity);
  const int64_t group = tile.first / a.tokens;
  for (int64_t token = tile.first; token < tile.last; ++token) {
    for (int64_t k = 0; k < a.top_n; ++k) {
      const int64_t pair = token * a.top_n + k;
      Real kept = 0;
      if (a.slot[pair] == 0) {
        const int64_t e = a.expert[pair];
        const int32_t slot = tile.counts[k * a.experts + e]++;
        if (slot < capacity) {
          a.slot[pair] = slot;
          a.source[(group * a.experts + e) * a.capacity + slot] = int32_t(pair - group * a.tokens * a.top_n);
          kept = static_cast<const Real*>(a.weight)[pair];
        } else {
          a.slot[pair] = kOverCapacity;
        }
      }
      static_cast<Real*>(a.kept)[pair] = kept;
    }
  }
}

template <class Real>
void assign_short_groups(const Assign& a, ParallelFor parallel_for) {
  const int64_t ranks = a.top_n * a.experts;
  parallel(parallel_for, a.groups, a.tokens * a.top_n + ranks, [&](int64_t begin, int64_t end) {
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
    parallel(parallel_for, a.groups * of_group, assign_tile(a.experts) * a.top_n, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) step(a, Tile(a, tile, counts + tile * ranks));
    });
  };
  for_tiles(count<Real>);
  parallel(parallel_for, a.groups, of_group * ranks, [&](int64_t begin, int64_t end) {
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
  parallel(parallel_for, a.pairs, 1, [&](int64_t begin, int64_t end) {
    const Real* grad_kept = static_cast<const Real*>(a.grad_kept);
    Real* grad_weight = static_cast<Real*>(a.grad_weight);
    for (int64_t i = begin; i < end; ++i) grad_weight[i] = a.slot[i] >= 0 ? grad_kept[i] : Real(0);
  });
}

}  // namespace

void assign(const Assign& a, ParallelFor parallel_for) {
  a.is_double ? assign_as<double>(a, parallel_for) : assign_as<float>(a, parallel_for);
}

void assign_backward(const AssignBackward& a, ParallelFor parallel_for) {
  a.is_double ? assign_backward_as<double>(a, parallel_for) : assign_backward_as<float>(a, parallel_for);
}

}  // namespace TOPN_NAMESPACE
