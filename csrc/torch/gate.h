// The operator `gate` and its gradient: see operators.h.
#pragma once

#include <tuple>

#include "tensors.h"

namespace topn_gating::binding {

// Returns the enumerator of that number; `last` is the one with the largest.
template <class Enum>
Enum choice(const char* name, int64_t number, Enum last) {
  STD_TORCH_CHECK(number >= 0 && number <= int64_t(last), name, " must be from 0 to ", int64_t(last), ", got ", number);
  return Enum(number);
}

// The checked tensors of GateInputs, which it keeps alive while the kernels read them.
struct CheckedGateInputs {
  GateInputs arguments;
  Tensor logits;
  std::optional<Tensor> noise, token_mask;
  Shape shape, pairs, sums;  // shapes (…, n, e), (…, n, k) and (…, e)

  CheckedGateInputs(const Tensor& logits_in, const std::optional<Tensor>& noise_in,
                    const std::optional<Tensor>& token_mask_in, int64_t top_n, const GateOptions& options)
      : shape(shape_of(logits_in)) {
    STD_TORCH_CHECK(shape.size() >= 2, "logits must have shape (..., tokens, experts)");
    const int64_t tokens = shape[shape.size() - 2], experts = shape.back();
    STD_TORCH_CHECK(top_n >= 1 && top_n <= experts, "top_n must be from 1 to the number of experts (", experts, "), got ", top_n);
    check_options(options, experts, top_n);
    pairs = replace_last(shape, 1, {top_n});
    sums = replace_last(shape, 2, {experts});
    const ScalarType type = logits_in.scalar_type();
    const DType dtype = dtype_of("logits", type);
    logits = checked("logits", logits_in, logits_in, shape, type);
    noise = checked("noise", noise_in, logits_in, shape, compute_type(type));
    token_mask = checked("token_mask", token_mask_in, logits_in, replace_last(shape, 1, {}), ScalarType::Bool);
    arguments = {{product(shape, 0, shape.size() - 2), tokens, experts, top_n}, options, dtype,
                 const_data(logits), const_data(noise), const_data<bool>(token_mask)};
  }

 private:
  static void check_options(const GateOptions& o, int64_t experts, int64_t top_n) {
    STD_TORCH_CHECK(!o.soft || o.score == Score::Softmax, "soft must be false unless score is 0, the softmax");
    STD_TORCH_CHECK(o.expert_groups >= 1 && experts % o.expert_groups == 0, "expert_groups must divide the number of experts (",
                    experts, "), got ", o.expert_groups);
    STD_TORCH_CHECK(o.top_groups >= 1 && o.top_groups <= o.expert_groups, "top_groups must be from 1 to expert_groups (",
                    o.expert_groups, "), got ", o.top_groups);
    const int64_t most = o.top_groups * (experts / o.expert_groups);
    STD_TORCH_CHECK(top_n <= most, "top_n must be at most the number of experts of top_groups (", most, "), got ", top_n);
  }
};

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gate(
    const Tensor& logits, const std::optional<Tensor>& noise, const std::optional<Tensor>& token_mask,
    const std::optional<Tensor>& select_bias, const std::optional<Tensor>& given, int64_t top_n, double eps, double noise_mult,
    bool soft, int64_t score, int64_t expert_groups, int64_t top_groups, int64_t group_score, bool normalize, double scale,
    bool all_ranks, bool losses, bool statistics) {
  const Backend backend(logits);
  const CheckedGateInputs inputs(logits, noise, token_mask, top_n,
                                 {eps, noise_mult, soft, choice("score", score, Score::SqrtSoftplus), expert_groups, top_groups,
                                  choice("group_score", group_score, GroupScore::Max), normalize, scale, all_ranks});
  const ScalarType type = compute_type(logits.scalar_type());
  const auto bias = checked("select_bias", select_bias, logits, {inputs.arguments.experts}, ScalarType::Float);
  const auto chosen = checked("given", given, logits, inputs.pairs, ScalarType::Int);
  const Tensor weight = empty(logits, inputs.pairs, type);
  const Tensor expert = empty(logits, inputs.pairs, ScalarType::Int);
  const Tensor importance = empty(logits, inputs.sums, type);
  const Tensor counts = empty(logits, inputs.sums, ScalarType::Int);
  const Tensor balance_loss = empty(logits, {}, type);
  const Tensor router_z_loss = empty(logits, {}, type);
  const Tensor of_logits = empty(logits, {statistics ? 3 : 0}, type);
  Gate a{inputs.arguments};
  a.select_bias = const_data<float>(bias);
  a.given = const_data<int32_t>(chosen);
  a.losses = losses;
  a.statistics = statistics ? mutable_data(of_logits) : nullptr;
  const auto space = reserve_workspace(backend, a, logits);
  a.weight = mutable_data(weight);
  a.expert = mutable_data<int32_t>(expert);
  a.importance = mutable_data(importance);
  a.counts = mutable_data<int32_t>(counts);
  a.balance_loss = mutable_data(balance_loss);
  a.router_z_loss = mutable_data(router_z_loss);
  a.workspace = mutable_data(space);
  backend.run(a);
  return {weight, expert, importance, counts, balance_loss, router_z_loss, of_logits};
}

template <class Backend>
Tensor gate_backward(const std::optional<Tensor>& grad_weight, const std::optional<Tensor>& grad_importance,
                     const std::optional<Tensor>& grad_balance_loss, const std::optional<Tensor>& grad_router_z_loss,
                     const Tensor& logits, const std::optional<Tensor>& noise, const std::optional<Tensor>& token_mask,
                     const Tensor& expert, const Tensor& counts, double eps, double noise_mult, bool soft, int64_t score,
                     int64_t expert_groups, int64_t top_groups, int64_t group_score, bool normalize, double scale,
                     bool all_ranks) {
  const Backend backend(logits);
  STD_TORCH_CHECK(expert.dim() >= 2, "expert must have shape (..., tokens, top_n)");
  const int64_t top_n = expert.size(expert.dim() - 1);
  const CheckedGateInputs inputs(logits, noise, token_mask, top_n,
                                 {eps, noise_mult, soft, choice("score", score, Score::SqrtSoftplus), expert_groups, top_groups,
                                  choice("group_score", group_score, GroupScore::Max), normalize, scale, all_ranks});
  const ScalarType type = compute_type(logits.scalar_type());
  const auto gw = checked("grad_weight", grad_weight, logits, inputs.pairs, type);
  const auto gi = checked("grad_importance", grad_importance, logits, inputs.sums, type);
  const auto gb = checked("grad_balance_loss", grad_balance_loss, logits, {}, type);
  const auto gz = checked("grad_router_z_loss", grad_router_z_loss, logits, {}, type);
  const Tensor chosen = checked("expert", expert, logits, inputs.pairs, ScalarType::Int);
  const Tensor count = checked("counts", counts, logits, inputs.sums, ScalarType::Int);
  GateBackward a{inputs.arguments};
  a.grad_weight = const_data(gw);
  a.grad_importance = const_data(gi);
  a.grad_balance_loss = const_data(gb);
  a.grad_router_z_loss = const_data(gz);
  a.expert = const_data<int32_t>(chosen);
  a.counts = const_data<int32_t>(count);
  const Tensor grad_logits = empty(logits, inputs.shape, logits.scalar_type());
  const auto space = reserve_workspace(backend, a, logits);
  a.grad_logits = mutable_data(grad_logits);
  a.workspace = mutable_data(space);
  backend.run(a);
  return grad_logits;
}

}  // namespace topn_gating::binding
