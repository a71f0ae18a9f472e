// The operators' schemas: the face of csrc/router.h to torch.
#pragma once

namespace topn_gating::binding {

// `m` is what STABLE_TORCH_LIBRARY hands out: the host-run CUDA kernels of simt have a library of their own.
template <class Library>
void define_operators(Library& m) {
  m.def(
      "gate(Tensor logits, Tensor? noise, Tensor? token_mask, int top_n, float eps, float noise_mult, bool soft, "
      "bool losses) -> (Tensor weight, Tensor expert, Tensor importance, Tensor top_count, Tensor balance_loss, "
      "Tensor router_z_loss)");
  m.def(
      "gate_backward(Tensor? grad_weight, Tensor? grad_importance, Tensor? grad_balance_loss, "
      "Tensor? grad_router_z_loss, Tensor logits, Tensor? noise, Tensor? token_mask, Tensor expert, Tensor top_count, "
      "float eps, float noise_mult, bool soft) -> Tensor grad_logits");
  m.def(
      "assign(Tensor weight, Tensor expert, Tensor? draws, Tensor? threshold, Tensor? token_mask, int num_gates, "
      "SymInt capacity, int policy, float eps) -> (Tensor kept, Tensor slot, Tensor source, Tensor demand)");
  m.def("assign_backward(Tensor grad_kept, Tensor slot) -> Tensor grad_weight");
  m.def(
      "dense(Tensor weight, Tensor expert, Tensor slot, int num_gates, SymInt capacity, ScalarType dtype, "
      "bool straight_through) -> (Tensor dispatch, Tensor combine)");
  m.def(
      "dense_backward(Tensor? grad_dispatch, Tensor? grad_combine, Tensor expert, Tensor slot) -> Tensor grad_weight");
  m.def(
      "dispatch(Tensor x, Tensor weight, Tensor expert, Tensor slot, Tensor source, bool straight_through) -> Tensor y");
  m.def(
      "dispatch_backward(Tensor grad_y, Tensor? x, Tensor expert, Tensor slot, Tensor source) -> (Tensor grad_x, "
      "Tensor grad_weight)");
  m.def("combine(Tensor y, Tensor weight, Tensor expert, Tensor slot, Tensor source) -> Tensor out");
  m.def(
      "combine_backward(Tensor grad_out, Tensor y, Tensor weight, Tensor expert, Tensor slot, Tensor source) -> "
      "(Tensor grad_y, Tensor grad_weight)");
}

}  // namespace topn_gating::binding
