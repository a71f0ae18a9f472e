// docs/spec.md, steps 7 and 8, on the CPU.
//
// The slot of a routed pair is the number of routed pairs of its expert that come before it: in the order of ranks and then of
// tokens, or in the dropless layout in the order of tokens and then of ranks. So each tile of tokens counts its routed pairs by
// rank and expert, or by expert alone, a scan over ranks and tiles turns the counts into the first slots, and each tile then
// gives its pairs their slots alone. A group of a single tile goes through the three steps at once.
#pragma once

#include "assignment.h"
#include "cpu/element.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace topn_gating::cpu::TOPN_LEVEL {
namespace {

struct AssignTile {
  int64_t first, last;  // range of tokens, indices over all groups
  int32_t* counts;      // (k, e) or (e) number of routed pairs; after `scan` the next free slot

  AssignTile(const Assign& a, int64_t tile, int32_t* counts_of_tile) : counts(counts_of_tile) {
    const int64_t size = assign_tile(a.experts), tiles = assign_tiles(a.tokens, a.experts);
    const int64_t group = tile / tiles, start = tile % tiles * size;
    first = group * a.tokens + start;
    last = group * a.tokens + std::min(a.tokens, start + size);
  }
};

constexpr double kPairCost = 7;  // of a pair, for `parallel`

// Which pairs are routed cannot be predicted, so no branch depends on it. Until `give_slots`, slot is 0 for a routed pair and
// -1, that is kBelowThreshold, for another; both serve as masks.
static_assert(kBelowThreshold == -1 && kOverCapacity == -2);

// Marks which of a tile's pairs the policy routes, whatever their expert and token. is_routed(weight, draw, threshold) decides
// for ranks above 0. `draws` is any tensor of the weights' shape where the policy has none.
template <class T, class IsRouted>
void mark_by(const Assign& a, const AssignTile& tile, const T* draws, const IsRouted& is_routed) {
  const int64_t begin = tile.first * a.top_n, end = tile.last * a.top_n;
  const T* weight = static_cast<const T*>(a.weight);
  for (int64_t k = 1; k < a.top_n; ++k) {
    const T threshold = a.threshold == nullptr ? T(0) : static_cast<const T*>(a.threshold)[k];
    for (int64_t pair = begin + k; pair < end; pair += a.top_n) {
      a.slot[pair] = int32_t(is_routed(weight[pair], draws[pair], threshold)) - 1;
    }
  }
  for (int64_t pair = begin; pair < end; pair += a.top_n) a.slot[pair] = 0;
}

template <class T>
void mark(const Assign& a, const AssignTile& tile) {
  const T *weight = static_cast<const T*>(a.weight), *draws = static_cast<const T*>(a.draws);
  switch (a.policy) {
    case Policy::Random:
      return mark_by(a, tile, draws, [eps = T(a.eps)](T w, T draw, T threshold) {
        return is_below_probability(draw, w, threshold, eps);
      });
    case Policy::Threshold:
      return mark_by(a, tile, weight, [](T w, T, T threshold) { return is_above_threshold(w, threshold); });
    case Policy::All: return mark_by(a, tile, weight, [](T, T, T) { return true; });
    case Policy::None: return mark_by(a, tile, weight, [](T, T, T) { return false; });
  }
}

// Marks and counts the tile's routed pairs.
template <class T>
void count(const Assign& a, const AssignTile& tile) {
  mark<T>(a, tile);
  const int64_t counters = assign_counters(a), of_rank = counters == a.experts ? 0 : a.experts;
  std::fill_n(tile.counts, counters, 0);
  for (int64_t token = tile.first; token < tile.last; ++token) {
    const bool valid = a.token_mask == nullptr || a.token_mask[token];
    for (int64_t k = 0; k < a.top_n; ++k) {
      const int64_t pair = token * a.top_n + k;
      const int32_t e = a.expert[pair], in_range = -int32_t(uint32_t(e) < uint64_t(a.experts));
      const int32_t unrouted = a.slot[pair] | ~in_range | (int32_t(valid) - 1);
      a.slot[pair] = unrouted;
      tile.counts[k * of_rank + (e & ~unrouted)] += 1 + unrouted;
    }
  }
}

// Writes where each expert's rows end, in the dropless layout, and -1 to the source of each row that no pair gets.
void free_rows(const Assign& a, int64_t group, const int32_t* demand) {
  int32_t* source = a.source + group * a.rows;
  int64_t end = 0;
  for (int64_t e = 0; e < a.experts; ++e) {
    const int64_t start = end, rows = a.dropless() ? round_up(demand[e], a.align) : a.capacity;
    end += rows;
    if (a.dropless()) a.offsets[e] = int32_t(end);
    std::fill(source + start + std::min<int64_t>(demand[e], rows), source + end, -1);
  }
  std::fill(source + end, source + a.rows, -1);
}

// Turns the counts (tiles, k, e) or (tiles, e) of a group into the first slots of each tile. Writes the group's demand, and frees
// the rows that no pair gets.
void scan(const Assign& a, int64_t group, int32_t* counts) {
  const int64_t tiles = assign_tiles(a.tokens, a.experts), counters = assign_counters(a);
  int32_t* demand = a.demand + group * a.experts;
  std::fill_n(demand, a.experts, 0);
  for (int64_t of_rank = 0; of_rank < counters; of_rank += a.experts) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      int32_t* first_slot = counts + tile * counters + of_rank;
      for (int64_t e = 0; e < a.experts; ++e) {
        const int32_t routed = first_slot[e];
        first_slot[e] = demand[e];
        demand[e] += routed;
      }
    }
  }
  free_rows(a, group, demand);
}

// Copies the values of the pairs from `begin` to `end` - 1 that hold a slot, and writes 0 for the others.
template <class T>
void copy_held(const int32_t* slot, const void* values, void* kept, int64_t begin, int64_t end) {
  const T* from = static_cast<const T*>(values);
  T* to = static_cast<T*>(kept);
  for (int64_t i = begin; i < end; ++i) to[i] = slot[i] >= 0 ? from[i] : T(0);
}

template <class T, bool Dropless>
void give_slots(const Assign& a, const AssignTile& tile) {
  const int32_t capacity = Dropless ? std::numeric_limits<int32_t>::max() : int32_t(a.capacity);
  const int64_t group = tile.first / a.tokens, pairs_before = group * a.tokens * a.top_n;
  int32_t* sources = a.source + group * a.rows;
  const int64_t of_rank = Dropless ? 0 : a.experts;
  const auto start = [&](int64_t e) -> int64_t {
    return Dropless ? a.offsets[e - (e != 0)] & -int32_t(e != 0) : e * a.capacity;  // without a branch
  };
  for (int64_t token = tile.first; token < tile.last; ++token) {
    for (int64_t k = 0; k < a.top_n; ++k) {
      const int64_t pair = token * a.top_n + k;
      const int32_t unrouted = a.slot[pair], e = a.expert[pair] & ~unrouted;
      int32_t& next = tile.counts[k * of_rank + e];
      const int32_t slot = next;
      next += 1 + unrouted;
      const bool held = (unrouted == 0) & (slot < capacity);
      a.slot[pair] = held ? slot : kOverCapacity - unrouted;
      if (held) sources[start(e) + slot] = int32_t(pair - pairs_before);
    }
  }
  copy_held<T>(a.slot, a.weight, a.kept, tile.first * a.top_n, tile.last * a.top_n);
}

using StepOfTile = void (*)(const Assign&, const AssignTile&);

template <class T>
void assign_groups_of_one_tile(const Assign& a, StepOfTile give_slots_of, ParallelFor parallel_for) {
  const int64_t counters = assign_counters(a);
  const double cost = kPairCost * double(a.tokens * a.top_n) + double(counters);
  parallel(parallel_for, a.groups, cost, [&](int64_t begin, int64_t end) {
    Scratch<int32_t> counts(counters);
    for (int64_t group = begin; group < end; ++group) {
      const AssignTile tile(a, group, counts);
      count<T>(a, tile);
      scan(a, group, counts);
      give_slots_of(a, tile);
    }
  });
}

template <class T>
void assign_groups_of_many_tiles(const Assign& a, StepOfTile give_slots_of, ParallelFor parallel_for) {
  const int64_t tiles = assign_tiles(a.tokens, a.experts), counters = assign_counters(a);
  int32_t* counts = static_cast<int32_t*>(a.workspace);
  const auto for_tiles = [&](StepOfTile step) {
    const double cost = kPairCost / 2 * double(assign_tile(a.experts) * a.top_n);
    parallel(parallel_for, a.groups * tiles, cost, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) step(a, AssignTile(a, tile, counts + tile * counters));
    });
  };
  for_tiles(count<T>);
  parallel(parallel_for, a.groups, double(tiles * counters), [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) scan(a, group, counts + group * tiles * counters);
  });
  for_tiles(give_slots_of);
}

template <class T>
void assign_as(const Assign& a, ParallelFor parallel_for) {
  const StepOfTile give_slots_of = a.dropless() ? give_slots<T, true> : give_slots<T, false>;
  if (a.tokens == 0) {  // there is no tile, but all slots are free
    for (int64_t group = 0; group < a.groups; ++group) scan(a, group, nullptr);
  } else if (assign_tiles(a.tokens, a.experts) == 1) {
    assign_groups_of_one_tile<T>(a, give_slots_of, parallel_for);
  } else {
    assign_groups_of_many_tiles<T>(a, give_slots_of, parallel_for);
  }
}

template <class T>
void assign_backward_as(const AssignBackward& a, ParallelFor parallel_for) {
  parallel(parallel_for, a.pairs, 0.2, [&](int64_t begin, int64_t end) {
    copy_held<T>(a.slot, a.grad_kept, a.grad_weight, begin, end);
  });
}

}  // namespace

void run(const Assign& a, ParallelFor parallel_for) {
  a.is_double ? assign_as<double>(a, parallel_for) : assign_as<float>(a, parallel_for);
}

void run(const AssignBackward& a, ParallelFor parallel_for) {
  a.is_double ? assign_backward_as<double>(a, parallel_for) : assign_backward_as<float>(a, parallel_for);
}

}  // namespace topn_gating::cpu::TOPN_LEVEL
