// How the CPU kernels divide their work into tiles, and how much memory the tiles' results take.
//
// Tile sizes do not depend on the number of threads, so sums over tiles have the same bits for any number.
#pragma once

#include <algorithm>

#include "router.h"

namespace topn_gating::cpu {

// Returns the smallest integer that is not below count / size.
constexpr int64_t ceil_div(int64_t count, int64_t size) { return (count + size - 1) / size; }
// Returns the smallest multiple of `step` that is not below count.
constexpr int64_t round_up(int64_t count, int64_t step) { return ceil_div(count, step) * step; }

constexpr int64_t kGateTile = 128;  // tokens of a tile of `gate`

// Returns the number of tiles of a group.
inline int64_t gate_tiles(int64_t tokens) { return ceil_div(tokens, kGateTile); }

// Sums over valid tokens, for the z-loss and the statistics.
struct TokenSums {
  double valid_tokens = 0;  // their number
  double z_loss = 0;        // logsumexp²
  double entropy = 0;       // entropy of the gates
  double squares = 0;       // squares of the logits
  double largest = 0;       // the largest magnitude of a logit, not counting NaN

  void operator+=(const TokenSums& other) {
    valid_tokens += other.valid_tokens;
    z_loss += other.z_loss;
    entropy += other.entropy;
    squares += other.squares;
    largest = std::max(largest, other.largest);
  }
};

// A group's sums.
struct GroupSums {
  double balance = 0;  // sum of balance_term over experts
  TokenSums tokens;
};

// Returns the bytes of the sums of all tiles of `gate`. The GroupSums follow them in the workspace.
inline int64_t gate_tile_bytes(const GateInputs& a) {
  const int64_t tiles = a.groups * gate_tiles(a.tokens);
  return tiles * int64_t(sizeof(TokenSums)) + (tiles * a.experts + (tiles * a.experts + 1) / 2) * int64_t(sizeof(double));
}

// Returns the number of tokens of a tile of `assign`: enough that a tile's k·e counters do not outnumber its pairs.
inline int64_t assign_tile(int64_t experts) { return experts > 512 ? experts : 512; }
// Returns the number of counters of a tile: one for each rank and expert, or for each expert in the dropless layout.
inline int64_t assign_counters(const Assign& a) { return (a.dropless() ? 1 : a.top_n) * a.experts; }
// Returns the number of tiles of a group of `assign`.
inline int64_t assign_tiles(int64_t tokens, int64_t experts) { return ceil_div(tokens, assign_tile(experts)); }
// Returns the number of counters of all tiles, rounded up so that the queues, which follow them, are aligned.
inline int64_t assign_counts(const Assign& a) {
  return round_up(a.groups * assign_tiles(a.tokens, a.experts) * assign_counters(a), 2);
}

constexpr int64_t kLinearBlock = 512;  // upper limit of the features of a block of `linear`

// How the gradients of `linear` are divided: into blocks of features, so that a block of the weight and its gradient fit a core's
// second-level cache, and into chunks of tokens, each with a sum of its own for the weight's gradient.
struct LinearPlan {
  int64_t block, blocks;  // features of a block, number of blocks
  int64_t chunk, chunks;  // tokens of a chunk, number of chunks
  int64_t columns;        // features, rounded up to a multiple of every panel width

  explicit LinearPlan(const LinearSizes& a) {
    constexpr int64_t widest_panel = 32, weights_of_block = 1 << 15, shortest_chunk = 512, most_items = 32;
    block = std::min(kLinearBlock, std::max(widest_panel, weights_of_block / a.experts / widest_panel * widest_panel));
    blocks = std::max<int64_t>(1, ceil_div(a.dim, block));
    columns = round_up(a.dim, widest_panel);
    const int64_t wanted = std::max<int64_t>(1, std::min(most_items / blocks, a.tokens / shortest_chunk));
    chunk = std::max<int64_t>(1, ceil_div(a.tokens, wanted));
    chunks = ceil_div(a.tokens, chunk);
  }
};

}  // namespace topn_gating::cpu
