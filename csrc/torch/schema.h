// The operators: name and schema of each, once. The meaning of the arguments stands in csrc/router.h.
#pragma once

// The namespace of the operators, torch.ops.<TOPN_NAMESPACE>: a build for the Kernels Hub has one of its own.
#ifndef TOPN_NAMESPACE
#define TOPN_NAMESPACE topn_gating
#endif
// STABLE_TORCH_LIBRARY and STABLE_TORCH_LIBRARY_IMPL, whose first argument is not expanded, of that namespace.
#define TOPN_LIBRARY_OF(ns, m) STABLE_TORCH_LIBRARY(ns, m)
#define TOPN_LIBRARY(m) TOPN_LIBRARY_OF(TOPN_NAMESPACE, m)
#define TOPN_LIBRARY_IMPL_OF(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)
#define TOPN_LIBRARY_IMPL(key, m) TOPN_LIBRARY_IMPL_OF(TOPN_NAMESPACE, key, m)

// The fields of GateOptions.
#define TOPN_GATING_OPTIONS                                                                                                    \
  " float eps, float noise_mult, bool soft, int score, int expert_groups, int top_groups, int group_score, bool normalize,"   \
  " float scale, bool all_ranks"

// Expands X(name, signature) for the operators that every backend has. `name` is also the function in the operator's header.
#define TOPN_GATING_OPERATORS(X)                                                                                               \
  X(gate,                                                                                                                      \
    "(Tensor logits, Tensor? noise, Tensor? token_mask, Tensor? select_bias, Tensor? given, int top_n,"                       \
    TOPN_GATING_OPTIONS ", bool losses, bool statistics)"                                                                      \
    " -> (Tensor weight, Tensor expert, Tensor importance, Tensor counts, Tensor balance_loss, Tensor router_z_loss,"         \
    " Tensor statistics)")                                                                                                     \
  X(gate_backward,                                                                                                             \
    "(Tensor? grad_weight, Tensor? grad_importance, Tensor? grad_balance_loss, Tensor? grad_router_z_loss, Tensor logits,"    \
    " Tensor? noise, Tensor? token_mask, Tensor expert, Tensor counts," TOPN_GATING_OPTIONS ") -> Tensor grad_logits")        \
  X(assign,                                                                                                                    \
    "(Tensor weight, Tensor expert, Tensor? draws, Tensor? threshold, Tensor? token_mask, Tensor? keys, int num_gates,"       \
    " SymInt? capacity, int align, int policy, float eps)"                                                                     \
    " -> (Tensor kept, Tensor slot, Tensor source, Tensor demand, Tensor offsets)")         \
  X(assign_backward, "(Tensor grad_kept, Tensor slot) -> Tensor grad_weight")                                                 \
  X(dense,                                                                                                                     \
    "(Tensor weight, Tensor expert, Tensor slot, Tensor source, ScalarType dtype, bool straight_through)"                      \
    " -> (Tensor dispatch, Tensor combine)")                                                                                   \
  X(dense_backward,                                                                                                            \
    "(Tensor? grad_dispatch, Tensor? grad_combine, Tensor expert, Tensor slot, Tensor source) -> Tensor grad_weight")          \
  X(dispatch,                                                                                                                  \
    "(Tensor x, Tensor weight, Tensor expert, Tensor slot, Tensor source, Tensor? offsets, bool straight_through)"            \
    " -> Tensor y")                                                                                                            \
  X(dispatch_backward,                                                                                                         \
    "(Tensor grad_y, Tensor? x, Tensor expert, Tensor slot, Tensor source, Tensor? offsets)"                                  \
    " -> (Tensor grad_x, Tensor grad_weight)")                                                                                 \
  X(combine, "(Tensor y, Tensor weight, Tensor expert, Tensor slot, Tensor source, Tensor? offsets) -> Tensor out")           \
  X(combine_backward,                                                                                                          \
    "(Tensor grad_out, Tensor y, Tensor weight, Tensor expert, Tensor slot, Tensor source, Tensor? offsets)"                  \
    " -> (Tensor grad_y, Tensor grad_weight)")

// The same for the operators that the CPU alone has in C++: elsewhere torch's own matrix products serve.
#define TOPN_GATING_CPU_OPERATORS(X)                                                                                           \
  X(linear, "(Tensor x, Tensor weight) -> Tensor logits")                                                                      \
  X(linear_backward,                                                                                                           \
    "(Tensor grad_logits, Tensor x, Tensor weight, bool wants_x, bool wants_weight)"                                          \
    " -> (Tensor grad_x, Tensor grad_weight)")                                                                                \
  X(grouped_linear, "(Tensor rows, Tensor weight, Tensor? bias, Tensor offsets) -> Tensor out")                                \
  X(grouped_linear_backward,                                                                                                   \
    "(Tensor grad, Tensor rows, Tensor weight, Tensor offsets, bool wants_rows, bool wants_weight, bool wants_bias)"          \
    " -> (Tensor grad_rows, Tensor grad_weight, Tensor grad_bias)")

// Statements inside STABLE_TORCH_LIBRARY(…, m) and STABLE_TORCH_LIBRARY_IMPL(…, m); `Backend` is a type of that scope.
// Beside each operator stands `name`_kernel, the same function, for which topn_gating/registry.py registers no autograd.
#define TOPN_GATING_DEFINE(name, signature) \
  m.def(#name signature);                   \
  m.def(#name "_kernel" signature);
#define TOPN_GATING_IMPLEMENT(name, signature)                    \
  m.impl(#name, TORCH_BOX(&topn_gating::binding::name<Backend>)); \
  m.impl(#name "_kernel", TORCH_BOX(&topn_gating::binding::name<Backend>));
