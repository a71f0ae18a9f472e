#include "cpu/workspace.h"

namespace topn_gating::cpu {

int64_t workspace_bytes(const Gate& a) {
  return gate_tile_bytes(a.groups, a.tokens, a.experts) + a.groups * int64_t(sizeof(GroupSums));
}

int64_t workspace_bytes(const GateBackward&) { return 0; }

int64_t workspace_bytes(const Assign& a) {
  const int64_t tiles = assign_tiles(a.tokens, a.experts);
  return tiles < 2 ? 0 : a.groups * tiles * a.top_n * a.experts * int64_t(sizeof(int32_t));
}

}  // namespace topn_gating::cpu
