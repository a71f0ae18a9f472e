// The CPU kernels: one overload of `run` for each argument struct of router.h.
#pragma once

#include "router.h"

namespace topn_gating::cpu {

// A loop over [begin, end) on the caller's threads: calls body(first, last, context) for parts that together cover it, each
// of at least `grain` items unless the loop has fewer.
using Body = void (*)(int64_t first, int64_t last, void* context);
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

// Bytes that `workspace` must have: none, unless a struct has an overload below.
template <class Args>
int64_t workspace_bytes(const Args&) {
  return 0;
}
int64_t workspace_bytes(const Gate&);
int64_t workspace_bytes(const Assign&);
int64_t workspace_bytes(const LinearBackward&);

#define TOPN_GATING_RUN(Args, name) void run(const Args&, ParallelFor);
TOPN_GATING_KERNELS(TOPN_GATING_RUN)
TOPN_GATING_CPU_KERNELS(TOPN_GATING_RUN)
#undef TOPN_GATING_RUN

// The instruction set that `run` uses (baseline, avx2, avx512): the best that this processor has, or a lower one that the
// environment variable TOPN_GATING_CPU_LEVEL names. It is chosen once.
const char* level();

// Returns whether `run` uses vectors of 512 bits on a processor where MKL, torch's library of matrix products, uses 256 bits:
// any that is not Intel's.
bool has_wider_vectors_than_mkl();

}  // namespace topn_gating::cpu
