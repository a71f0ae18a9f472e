#include "cpu/workspace.h"

#include "cpu/kernels.h"

namespace topn_gating::cpu {

int64_t workspace_bytes(const Gate& a) { return gate_tile_bytes(a) + a.groups * int64_t(sizeof(GroupSums)); }

int64_t workspace_bytes(const Assign& a) {
  const int64_t tiles = assign_tiles(a.tokens, a.experts);
  return tiles < 2 ? 0 : a.groups * tiles * assign_counters(a) * int64_t(sizeof(int32_t));
}

int64_t workspace_bytes(const LinearBackward& a) {
  const LinearPlan plan(a);
  const int64_t bytes = a.dtype == DType::F64 ? sizeof(double) : sizeof(float);
  return a.grad_weight == nullptr ? 0 : plan.chunks * a.experts * plan.columns * bytes;
}

}  // namespace topn_gating::cpu
