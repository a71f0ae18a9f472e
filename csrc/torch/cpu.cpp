// The operators on CPU tensors.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "tensors.h"

namespace topn_gating::binding {
namespace {

void parallel_for(int64_t begin, int64_t end, int64_t grain, cpu::Body body, void* context) {
  torch::stable::parallel_for(begin, end, grain, [=](int64_t b, int64_t e) { body(b, e, context); });
}

Tensor workspace(const Tensor& like, int64_t bytes) { return make(like, {bytes}, ScalarType::Byte); }

// What Gate and GateBackward have in common.
template <class Args>
Args gate_sizes(const Tensor& logits, int64_t top_n, double eps, double noise_mult, bool soft) {
  const Shape shape = shape_of(logits);
  STD_TORCH_CHECK(shape.size() >= 2, "logits must have shape (..., tokens, experts)");
  STD_TORCH_CHECK(top_n >= 1 && top_n <= shape.back(), "top_n must be from 1 to the number of experts (", shape.back(),
                  "), got ", top_n);
  Args a{};
  a.dtype = dtype_of("logits", logits.scalar_type());
  a.groups = product(shape, 0, shape.size() - 2);
  a.tokens = shape[shape.size() - 2];
  a.experts = shape.back();
  a.top_n = top_n;
  a.eps = eps;
  a.noise_mult = noise_mult;
  a.soft = soft;
  return a;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gate(
    const Tensor& logits, const std::optional<Tensor>& noise, const std::optional<Tensor>& padding_mask, int64_t top_n,
    double eps, double noise_mult, bool soft, bool losses) {
  Gate a = gate_sizes<Gate>(logits, top_n, eps, noise_mult, soft);
  const Shape shape = shape_of(logits);
  const int64_t experts = a.experts;
  const ScalarType type = logits.scalar_type();
  a.losses = losses;
  const Tensor z = take("logits", logits, logits, shape, type);
  const auto u = take("noise", noise, logits, shape, real(type));
  const auto mask = take("padding_mask", padding_mask, logits, with_last(shape, 1, {}), ScalarType::Bool);
  a.logits = pointer(z);
  a.noise = pointer(u);
  a.padding_mask = pointer<bool>(mask);

  const Tensor weight = make(logits, with_last(shape, 1, {top_n}), real(type));
  const Tensor expert = make(logits, with_last(shape, 1, {top_n}), ScalarType::Int);
  const Tensor importance = make(logits, with_last(shape, 2, {experts}), real(type));
  const Tensor top_count = make(logits, with_last(shape, 2, {experts}), ScalarType::Int);
  const Tensor balance_loss = make(logits, {}, real(type));
  const Tensor router_z_loss = make(logits, {}, real(type));
  const Tensor space = workspace(logits, cpu::gate_workspace(a.groups, a.tokens, experts));
  a.weight = written(weight);
  a.expert = written<int32_t>(expert);
  a.importance = written(importance);
  a.top_count = written<int32_t>(top_count);
  a.balance_loss = written(balance_loss);
  a.router_z_loss = written(router_z_loss);
  a.workspace = written(space);
  cpu::kernels().gate(a, parallel_for);
  return {weight, expert, importance, top_count, balance_loss, router_z_loss};
}

Tensor gate_backward(const std::optional<Tensor>& grad_weight, const std::optional<Tensor>& grad_importance,
                     const std::optional<Tensor>& grad_balance_loss, const std::optional<Tensor>& grad_router_z_loss,
                     const Tensor& logits, const std::optional<Tensor>& noise, const std::optional<Tensor>& padding_mask,
                     const Tensor& expert, const Tensor& top_count, double eps, double noise_mult, bool soft) {
  STD_TORCH_CHECK(expert.dim() >= 2, "expert must have shape (..., tokens, top_n)");
  const int64_t top_n = expert.size(expert.dim() - 1);
  GateBackward a = gate_sizes<GateBackward>(logits, top_n, eps, noise_mult, soft);
  const Shape shape = shape_of(logits);
  const int64_t experts = a.experts;
  const ScalarType type = logits.scalar_type();
  const Shape weights = with_last(shape, 1, {top_n}), sums = with_last(shape, 2, {experts});
  const auto gw = take("grad_weight", grad_weight, logits, weights, real(type));
  const auto gi = take("grad_importance", grad_importance, logits, sums, real(type));
  const auto gb = take("grad_balance_loss", grad_balance_loss, logits, {}, real(type));
  const auto gz = take("grad_router_z_loss", grad_router_z_loss, logits, {}, real(type));
  const Tensor z = take("logits", logits, logits, shape, type);
  const auto u = take("noise", noise, logits, shape, real(type));
  const auto mask = take("padding_mask", padding_mask, logits, with_last(shape, 1, {}), ScalarType::Bool);
  const Tensor chosen = take("expert", expert, logits, weights, ScalarType::Int);
  const Tensor count = take("top_count", top_count, logits, sums, ScalarType::Int);
  a.grad_weight = pointer(gw);
  a.grad_importance = pointer(gi);
  a.grad_balance_loss = pointer(gb);
  a.grad_router_z_loss = pointer(gz);
  a.logits = pointer(z);
  a.noise = pointer(u);
  a.padding_mask = pointer<bool>(mask);
  a.expert = pointer<int32_t>(chosen);
  a.top_count = pointer<int32_t>(count);
  const Tensor grad_logits = make(logits, shape, type);
  a.grad_logits = written(grad_logits);
  cpu::kernels().gate_backward(a, parallel_for);
  return grad_logits;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> assign(const Tensor& weight, const Tensor& expert,
                                                  const std::optional<Tensor>& draws, const std::optional<Tensor>& threshold,
                                                  const std::optional<Tensor>& padding_mask, int64_t num_gates,
                                                  int64_t capacity, int64_t policy, double eps) {
  const Assignment s = sizes_of("weight", weight, num_gates, capacity);
  const Shape shape = shape_of(weight);
  const ScalarType type = weight.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "weight must be float32 or float64, got ",
                  torch::headeronly::toString(type));
  STD_TORCH_CHECK(policy >= 0 && policy <= int64_t(Policy::None), "policy must be from 0 to 3, got ", policy);

  Assign a{};
  a.is_double = type == ScalarType::Double;
  a.groups = s.groups;
  a.tokens = s.tokens;
  a.experts = s.experts;
  a.top_n = s.top_n;
  a.capacity = s.capacity;
  a.policy = Policy(policy);
  a.eps = eps;
  const bool random = a.policy == Policy::Random;
  STD_TORCH_CHECK(!random || draws.has_value(), "draws must be given for the random policy");
  STD_TORCH_CHECK(threshold.has_value() || !(random || a.policy == Policy::Threshold),
                  "threshold must be given for the random and threshold policies");
  const Tensor w = take("weight", weight, weight, shape, type);
  const Tensor chosen = take("expert", expert, weight, shape, ScalarType::Int);
  const auto u = take("draws", draws, weight, shape, type);
  const auto least = take("threshold", threshold, weight, {s.top_n}, type);
  const auto mask = take("padding_mask", padding_mask, weight, with_last(shape, 1, {}), ScalarType::Bool);
  a.weight = pointer(w);
  a.expert = pointer<int32_t>(chosen);
  a.draws = pointer(u);
  a.threshold = pointer(least);
  a.padding_mask = pointer<bool>(mask);

  const Tensor kept = make(weight, shape, type);
  const Tensor slot = make(weight, shape, ScalarType::Int);
  const Tensor source = make(weight, with_last(shape, 2, {num_gates, capacity}), ScalarType::Int);
  const Tensor demand = make(weight, with_last(shape, 2, {num_gates}), ScalarType::Int);
  const Tensor space = workspace(weight, cpu::assign_workspace(s.groups, s.tokens, s.experts, s.top_n));
  a.kept = written(kept);
  a.slot = written<int32_t>(slot);
  a.source = written<int32_t>(source);
  a.demand = written<int32_t>(demand);
  a.workspace = written(space);
  cpu::kernels().assign(a, parallel_for);
  return {kept, slot, source, demand};
}

Tensor assign_backward(const Tensor& grad_kept, const Tensor& slot) {
  const Shape shape = shape_of(slot);
  const ScalarType type = grad_kept.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "grad_kept must be float32 or float64, got ",
                  torch::headeronly::toString(type));
  const Tensor grad = take("grad_kept", grad_kept, slot, shape, type);
  const Tensor slots = take("slot", slot, slot, shape, ScalarType::Int);
  const Tensor grad_weight = make(grad_kept, shape, type);
  cpu::kernels().assign_backward({type == ScalarType::Double, product(shape, 0, shape.size()), pointer(grad),
                                  pointer<int32_t>(slots), written(grad_weight)},
                                 parallel_for);
  return grad_weight;
}

std::tuple<Tensor, Tensor> dense(const Tensor& weight, const Tensor& expert, const Tensor& slot, int64_t num_gates,
                                 int64_t capacity, ScalarType dtype, bool /*straight_through*/) {
  const Shape shape = shape_of(weight);
  Dense a{};
  a.dtype = dtype_of("dtype", dtype);
  a.assignment = sizes_of("weight", weight, num_gates, capacity);
  const Tensor w = take("weight", weight, weight, shape, real(dtype));
  const Tensor chosen = take("expert", expert, weight, shape, ScalarType::Int);
  const Tensor slots = take("slot", slot, weight, shape, ScalarType::Int);
  a.weight = pointer(w);
  a.assignment.expert = pointer<int32_t>(chosen);
  a.assignment.slot = pointer<int32_t>(slots);
  const Tensor dispatch = make(weight, with_last(shape, 1, {num_gates, capacity}), dtype);
  const Tensor combine = make(weight, with_last(shape, 1, {num_gates, capacity}), dtype);
  a.dispatch = written(dispatch);
  a.combine = written(combine);
  cpu::kernels().dense(a, parallel_for);
  return {dispatch, combine};
}

// A gradient (…, n, e, C) as (g, n, e, C) with strides; copied only where the groups have no common stride.
Tensor by_strides(const char* name, const Tensor& grad, const Tensor& slot, const Assignment& s, const Shape& shape,
                  ScalarType type, int64_t* strides) {
  STD_TORCH_CHECK(grad.scalar_type() == type, name, " must have the type of the other gradient");
  STD_TORCH_CHECK(shape_of(grad) == shape, name, " has a shape that does not fit the other arguments");
  STD_TORCH_CHECK(grad.device() == slot.device(), name, " must be on the device of the other arguments");
  const Tensor flat = torch::stable::reshape(grad, Shape{s.groups, s.tokens, s.experts, s.capacity});
  for (int i = 0; i < 4; ++i) strides[i] = flat.stride(i);
  return flat;
}

Tensor dense_backward(const std::optional<Tensor>& grad_dispatch, const std::optional<Tensor>& grad_combine,
                      const Tensor& expert, const Tensor& slot) {
  STD_TORCH_CHECK(grad_dispatch.has_value() || grad_combine.has_value(), "grad_dispatch or grad_combine must be given");
  const Tensor& some = grad_combine.has_value() ? *grad_combine : *grad_dispatch;
  const Shape shape = shape_of(some), pairs = shape_of(slot);
  STD_TORCH_CHECK(shape.size() >= 3 && pairs.size() + 1 == shape.size(),
                  "a gradient must have shape (..., tokens, experts, capacity)");
  const ScalarType type = some.scalar_type();

  DenseBackward a{};
  a.dtype = dtype_of("grad_combine", type);
  a.assignment = sizes_of("slot", slot, shape[shape.size() - 2], shape.back());
  const Shape expected = with_last(pairs, 1, {a.assignment.experts, a.assignment.capacity});
  const Tensor chosen = take("expert", expert, slot, pairs, ScalarType::Int);
  const Tensor slots = take("slot", slot, slot, pairs, ScalarType::Int);
  a.assignment.expert = pointer<int32_t>(chosen);
  a.assignment.slot = pointer<int32_t>(slots);
  std::optional<Tensor> gd, gc;
  if (grad_dispatch.has_value()) {
    gd = by_strides("grad_dispatch", *grad_dispatch, slot, a.assignment, expected, type, a.dispatch_strides);
  }
  if (grad_combine.has_value()) {
    gc = by_strides("grad_combine", *grad_combine, slot, a.assignment, expected, type, a.combine_strides);
  }
  a.grad_dispatch = pointer(gd);
  a.grad_combine = pointer(gc);
  const Tensor grad_weight = make(slot, pairs, real(type));
  a.grad_weight = written(grad_weight);
  cpu::kernels().dense_backward(a, parallel_for);
  return grad_weight;
}

Tensor dispatch(const Tensor& x, const Tensor& weight, const Tensor& expert, const Tensor& slot, const Tensor& source,
                bool /*straight_through*/) {
  const Assigned assigned(expert, slot, source);
  const ScalarType type = x.scalar_type();
  const int64_t dim = dim_of("x", x);
  take("weight", weight, x, assigned.pairs(), real(type));
  const Tensor rows = take("x", x, expert, assigned.token_rows(dim), type);
  const Tensor y = make(x, assigned.slot_rows(dim), type);
  cpu::kernels().dispatch({dtype_of("x", type), assigned.sizes, dim, pointer(rows), written(y)}, parallel_for);
  return y;
}

std::tuple<Tensor, Tensor> dispatch_backward(const Tensor& grad_y, const std::optional<Tensor>& x, const Tensor& expert,
                                             const Tensor& slot, const Tensor& source) {
  const Assigned assigned(expert, slot, source);
  const ScalarType type = grad_y.scalar_type();
  const int64_t dim = dim_of("grad_y", grad_y);
  const Tensor grad = take("grad_y", grad_y, expert, assigned.slot_rows(dim), type);
  const auto rows = take("x", x, expert, assigned.token_rows(dim), type);
  const Tensor grad_x = make(grad_y, assigned.token_rows(dim), type);
  const Tensor grad_weight = make(grad_y, x.has_value() ? assigned.pairs() : Shape{0}, real(type));
  cpu::kernels().dispatch_backward({dtype_of("grad_y", type), assigned.sizes, dim, pointer(grad), pointer(rows),
                                    written(grad_x), x.has_value() ? written(grad_weight) : nullptr},
                                   parallel_for);
  return {grad_x, grad_weight};
}

Tensor combine(const Tensor& y, const Tensor& weight, const Tensor& expert, const Tensor& slot, const Tensor& source) {
  const Assigned assigned(expert, slot, source);
  const ScalarType type = y.scalar_type();
  const int64_t dim = dim_of("y", y);
  const Tensor rows = take("y", y, expert, assigned.slot_rows(dim), type);
  const Tensor w = take("weight", weight, expert, assigned.pairs(), real(type));
  const Tensor out = make(y, assigned.token_rows(dim), type);
  cpu::kernels().combine({dtype_of("y", type), assigned.sizes, dim, pointer(rows), pointer(w), written(out)}, parallel_for);
  return out;
}

std::tuple<Tensor, Tensor> combine_backward(const Tensor& grad_out, const Tensor& y, const Tensor& weight,
                                            const Tensor& expert, const Tensor& slot, const Tensor& source) {
  const Assigned assigned(expert, slot, source);
  const ScalarType type = y.scalar_type();
  const int64_t dim = dim_of("y", y);
  const Tensor grad = take("grad_out", grad_out, expert, assigned.token_rows(dim), type);
  const Tensor rows = take("y", y, expert, assigned.slot_rows(dim), type);
  const Tensor w = take("weight", weight, expert, assigned.pairs(), real(type));
  const Tensor grad_y = make(y, assigned.slot_rows(dim), type);
  const Tensor grad_weight = make(weight, assigned.pairs(), real(type));
  cpu::kernels().combine_backward({dtype_of("y", type), assigned.sizes, dim, pointer(grad), pointer(rows), pointer(w),
                                   written(grad_y), written(grad_weight)},
                                  parallel_for);
  return {grad_y, grad_weight};
}

}  // namespace
}  // namespace topn_gating::binding

STABLE_TORCH_LIBRARY_IMPL(topn_gating, CPU, m) {
  using namespace topn_gating::binding;
  m.impl("gate", TORCH_BOX(&gate));
  m.impl("gate_backward", TORCH_BOX(&gate_backward));
  m.impl("assign", TORCH_BOX(&assign));
  m.impl("assign_backward", TORCH_BOX(&assign_backward));
  m.impl("dense", TORCH_BOX(&dense));
  m.impl("dense_backward", TORCH_BOX(&dense_backward));
  m.impl("dispatch", TORCH_BOX(&dispatch));
  m.impl("dispatch_backward", TORCH_BOX(&dispatch_backward));
  m.impl("combine", TORCH_BOX(&combine));
  m.impl("combine_backward", TORCH_BOX(&combine_backward));
}
