#include "cpu/workspace.h"

namespace topn_gating::cpu {

int64_t gate_workspace(int64_t groups, int64_t tokens, int64_t experts) {
  return gate_tile_bytes(groups, tokens, experts) + groups * int64_t(sizeof(GroupSums));
}

int64_t assign_workspace(int64_t groups, int64_t tokens, int64_t experts, int64_t top_n) {
  const int64_t tiles = assign_tiles(tokens, experts);
  return tiles < 2 ? 0 : groups * tiles * top_n * experts * int64_t(sizeof(int32_t));
}

}  // namespace topn_gating::cpu
