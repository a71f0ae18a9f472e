// docs/spec.md, steps 7 and 8, on the CPU.
//
// The slot of a routed pair is the number of routed pairs of its expert that come before it: in the order of ranks and then of
// tokens, or in the dropless layout in the order of tokens and then of ranks. So each tile of tokens counts its routed pairs by
// rank and expert, or by expert alone, a scan over ranks and tiles turns the counts into the first slots, and each tile then
// gives its pairs their slots alone. A group of a single tile goes through the three steps at once.
//
// Where keys decide which pairs hold a slot, that number is instead a pair's place in the queue of its expert, and each expert
// then gives its slots to the pairs of its queue that have the largest keys.
#pragma once

#include "assignment.h"
#include "cpu/element.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace topn_gating::cpu::TOPN_LEVEL {
namespace {

struct AssignTile {
  int64_t group;
  int64_t first, last;  // range of tokens, indices over all groups
  int32_t* counts;      // (k, e) or (e) number of routed pairs; after `scan` the next free slot, or place in a queue

  AssignTile(const Assign& a, int64_t tile, int32_t* counts_of_tile) : counts(counts_of_tile) {
    const int64_t size = assign_tile(a.experts), tiles = assign_tiles(a.tokens, a.experts);
    const int64_t start = tile % tiles * size;
    group = tile / tiles;
    first = group * a.tokens + start;
    last = group * a.tokens + std::min(a.tokens, start + size);
  }
};

// The queues of a group's experts, one behind the other: their routed pairs in the order of slots.
template <class T>
struct Queues {
  using Key = decltype(order_of(T()));
  Key* keys;           // (n · k)
  int32_t* pairs;      // (n · k) token * top_n + rank in the group
  int64_t first_pair;  // the group's, an index over all groups

  // Returns the queues of a group in memory for those of all groups.
  Queues of_group(const Assign& a, int64_t group) const {
    const int64_t before = group * a.tokens * a.top_n;
    return {keys + before, pairs + before, before};
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

// Turns the counts (tiles, k, e) or (tiles, e) of a group into the first slots of each tile, or its first places in the queues.
// Writes the group's demand, and frees the rows that no pair gets.
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
  for (int32_t *first = counts, *end = counts + tiles * counters; a.keys != nullptr && first < end; first += a.experts) {
    int32_t start = 0;
    for (int64_t e = 0; e < a.experts; ++e) {
      first[e] += start;
      start += demand[e];
    }
  }
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
  const int64_t pairs_before = tile.group * a.tokens * a.top_n;
  int32_t* sources = a.source + tile.group * a.rows;
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

// Writes the tile's routed pairs, with their keys, to their places in the queues of their experts.
template <class T>
void fill_queues(const Assign& a, const AssignTile& tile, const Queues<T>& queues) {
  const T* key = static_cast<const T*>(a.keys);
  for (int64_t token = tile.first; token < tile.last; ++token) {
    for (int64_t k = 0; k < a.top_n; ++k) {
      const int64_t pair = token * a.top_n + k;
      const int32_t unrouted = a.slot[pair], e = a.expert[pair] & ~unrouted;
      int32_t& next = tile.counts[k * a.experts + e];
      const int32_t place = next;
      next += 1 + unrouted;
      if (unrouted == 0) {
        queues.keys[place] = order_of(key[pair]);
        queues.pairs[place] = int32_t(pair - queues.first_pair);
      }
    }
  }
}

// Returns how many keys are at least `least`.
template <class Key>
int64_t count_keys(const Key* keys, int64_t count, Key least) {
  constexpr int64_t part = 1 << 16;  // sums of a part are of the keys' width, so that they fit the keys' vectors
  int64_t sum = 0;
  for (int64_t first = 0; first < count; first += part) {
    Key found = 0;
    for (int64_t i = first, last = std::min(count, first + part); i < last; ++i) found += keys[i] >= least;
    sum += found;
  }
  return sum;
}

// Returns the largest number that at least `rank` of the keys reach, by bisection: each step is a pass over vectors, without a
// branch on a key.
template <class Key>
Key largest_of_rank(const Key* keys, int64_t count, int64_t rank) {
  Key least = std::numeric_limits<Key>::max(), most = std::numeric_limits<Key>::min();
  for (int64_t i = 0; i < count; ++i) {
    least = std::min(least, keys[i]);
    most = std::max(most, keys[i]);
  }
  while (least < most) {
    const Key middle = (least | most) - ((least ^ most) >> 1);  // rounded up
    count_keys(keys, count, middle) >= rank ? least = middle : most = middle - 1;
  }
  return least;
}

// Gives the slots of an expert to the pairs of its queue with the largest keys; of equal keys the first. No branch depends on a
// key: a pair that gets no slot is overwritten in `source` by the next one.
template <class Key>
void give_slots_by_keys(const Key* keys, const int32_t* pairs, int64_t count, int64_t capacity, int32_t* slots, int32_t* source) {
  Key least = std::numeric_limits<Key>::min();
  int64_t equal = capacity;  // slots for keys that are `least`
  if (count > capacity) {
    least = largest_of_rank(keys, count, capacity);
    equal -= least == std::numeric_limits<Key>::max() ? 0 : count_keys(keys, count, Key(least + 1));
  }
  int32_t next = 0;
  int64_t i = 0;
  for (; i < count && next < capacity; ++i) {
    const bool is_equal = keys[i] == least, held = (keys[i] > least) | (is_equal & (equal > 0));
    equal -= is_equal;
    slots[pairs[i]] = held ? next : kOverCapacity;
    source[next] = pairs[i];
    next += held;
  }
  for (; i < count; ++i) slots[pairs[i]] = kOverCapacity;
}

// The same for the experts from `begin` to `end` - 1 of a group.
template <class T>
void give_slots_by_keys(const Assign& a, int64_t group, int64_t begin, int64_t end, Queues<T> queues) {
  const int32_t* demand = a.demand + group * a.experts;
  int64_t place = std::accumulate(demand, demand + begin, int64_t(0));
  for (int64_t e = begin; e < end; place += demand[e++]) {
    give_slots_by_keys(queues.keys + place, queues.pairs + place, demand[e], a.capacity, a.slot + queues.first_pair,
                       a.source + group * a.rows + e * a.capacity);
  }
}

// The last step where keys gave the slots.
template <class T>
void copy_held_of_tile(const Assign& a, const AssignTile& tile) {
  copy_held<T>(a.slot, a.weight, a.kept, tile.first * a.top_n, tile.last * a.top_n);
}

using StepOfTile = void (*)(const Assign&, const AssignTile&);

template <class T>
void assign_groups_of_one_tile(const Assign& a, StepOfTile last_step, ParallelFor parallel_for) {
  const int64_t counters = assign_counters(a), pairs = a.tokens * a.top_n;
  const double cost = kPairCost * double(pairs) + double(counters);
  parallel(parallel_for, a.groups, cost, [&](int64_t begin, int64_t end) {
    Scratch<int32_t> counts(counters), pairs_in_queues(a.keys == nullptr ? 0 : pairs);
    Scratch<typename Queues<T>::Key> keys(a.keys == nullptr ? 0 : pairs);
    for (int64_t group = begin; group < end; ++group) {
      const AssignTile tile(a, group, counts);
      count<T>(a, tile);
      scan(a, group, counts);
      if (a.keys != nullptr) {
        const Queues<T> queues{keys, pairs_in_queues, group * pairs};
        fill_queues(a, tile, queues);
        give_slots_by_keys(a, group, 0, a.experts, queues);
      }
      last_step(a, tile);
    }
  });
}

template <class T>
void assign_groups_of_many_tiles(const Assign& a, StepOfTile last_step, ParallelFor parallel_for) {
  const int64_t tiles = assign_tiles(a.tokens, a.experts), counters = assign_counters(a);
  int32_t* counts = static_cast<int32_t*>(a.workspace);
  const auto for_tiles = [&](const auto& step) {
    const double cost = kPairCost / 2 * double(assign_tile(a.experts) * a.top_n);
    parallel(parallel_for, a.groups * tiles, cost, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) step(a, AssignTile(a, tile, counts + tile * counters));
    });
  };
  for_tiles(count<T>);
  parallel(parallel_for, a.groups, double(tiles * counters), [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) scan(a, group, counts + group * tiles * counters);
  });
  if (a.keys != nullptr) {
    const int64_t pairs = a.tokens * a.top_n;
    auto* const keys = reinterpret_cast<typename Queues<T>::Key*>(counts + assign_counts(a));
    const Queues<T> queues{keys, reinterpret_cast<int32_t*>(keys + a.groups * pairs), 0};
    for_tiles([&](const Assign&, const AssignTile& tile) { fill_queues(a, tile, queues.of_group(a, tile.group)); });
    const double cost = kPairCost / 2 * double(pairs) / double(a.experts);
    parallel(parallel_for, a.groups * a.experts, cost, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin / a.experts; group * a.experts < end; ++group) {
        const int64_t first = group * a.experts;
        give_slots_by_keys(a, group, std::max(begin - first, int64_t(0)), std::min(end - first, a.experts),
                           queues.of_group(a, group));
      }
    });
  }
  for_tiles(last_step);
}

template <class T>
void assign_as(const Assign& a, ParallelFor parallel_for) {
  const StepOfTile in_order = a.dropless() ? give_slots<T, true> : give_slots<T, false>;
  const StepOfTile last_step = a.keys != nullptr ? copy_held_of_tile<T> : in_order;
  if (a.tokens == 0) {  // there is no tile, but all slots are free
    for (int64_t group = 0; group < a.groups; ++group) scan(a, group, nullptr);
  } else if (assign_tiles(a.tokens, a.experts) == 1) {
    assign_groups_of_one_tile<T>(a, last_step, parallel_for);
  } else {
    assign_groups_of_many_tiles<T>(a, last_step, parallel_for);
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
