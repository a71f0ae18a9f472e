// How the kernels cut their work into tiles, and what memory that takes.
//
// Tile sizes do not depend on the number of threads, so sums over tiles come out the same for any.
#pragma once

#include <algorithm>

#include "router.h"

namespace topn_gating::cpu {

constexpr int64_t kGateTile = 128;  // tokens

inline int64_t gate_tiles(int64_t tokens) { return (tokens + kGateTile - 1) / kGateTile; }

// What a group gives to the two losses.
struct GroupSums {
  double balance, z_loss, tokens;  // tokens: the real ones
};

// Bytes of the sums of gate's tiles; those of its groups lie behind them.
inline int64_t gate_tile_bytes(int64_t groups, int64_t tokens, int64_t experts) {
  const int64_t tiles = groups * gate_tiles(tokens);
  return (tiles * (experts + 1) + (tiles * experts + 1) / 2) * int64_t(sizeof(double));
}

inline GroupSums* gate_group_sums(void* workspace, int64_t groups, int64_t tokens, int64_t experts) {
  return reinterpret_cast<GroupSums*>(static_cast<char*>(workspace) + gate_tile_bytes(groups, tokens, experts));
}

// Tokens of assign's tiles: a tile's counters, k·e of them, must not outgrow its pairs.
inline int64_t assign_tile(int64_t experts) { return experts > 512 ? experts : 512; }

inline int64_t assign_tiles(int64_t tokens, int64_t experts) {
  return (tokens + assign_tile(experts) - 1) / assign_tile(experts);
}

constexpr int64_t kLinearBlock = 512;  // features, at most

// How the gradients of `linear` are cut: blocks of features, so that a block of the weight and of its gradient fit a core's
// second cache, and chunks of tokens, each with a sum of its own for the weight's gradient.
struct LinearCut {
  int64_t block, blocks;  // features of a block
  int64_t chunk, chunks;  // tokens of a chunk
  int64_t columns;        // of all blocks, in whole panels of any width

  explicit LinearCut(const LinearBackward& a) {
    constexpr int64_t least = 32, weights = 1 << 15, shortest = 512, items = 32;
    block = std::min(kLinearBlock, std::max(least, weights / a.experts / least * least));
    blocks = std::max<int64_t>(1, (a.dim + block - 1) / block);
    columns = (a.dim + least - 1) / least * least;
    const int64_t wanted = std::max<int64_t>(1, std::min(items / blocks, a.tokens / shortest));
    chunk = std::max<int64_t>(1, (a.tokens + wanted - 1) / wanted);
    chunks = (a.tokens + chunk - 1) / chunk;
  }
};

}  // namespace topn_gating::cpu
