#include "cpu/workspace.h"

#include "cpu/kernels.h"

namespace topn_gating::cpu {

int64_t workspace_bytes(const Gate& a) { return gate_tile_bytes(a) + a.groups * int64_t(sizeof(GroupSums)); }

int64_t workspace_bytes(const Assign& a) {
  if (assign_tiles(a.tokens, a.experts) < 2) return 0;
  const int64_t queued = a.keys == nullptr ? 0 : a.groups * a.tokens * a.top_n, key_bytes = a.is_double ? 8 : 4;
  return (assign_counts(a) + queued) * int64_t(sizeof(int32_t)) + queued * key_bytes;
}

int64_t workspace_bytes(const LinearBackward& a) {
  const LinearPlan plan(a);
  const int64_t bytes = a.dtype == DType::F64 ? sizeof(double) : sizeof(float);
  return a.grad_weight == nullptr ? 0 : plan.chunks * a.experts * plan.columns * bytes;
}

}  // namespace topn_gating::cpu
