"""topn_gating as a contender: its own layer in both layouts, and its experts inside transformers' block."""

import torch
from rounds import Step
from torch import Tensor, nn

import topn_gating

from .contenders import Contender, Layer, Transformers
from .models import router


class Ours(Contender):
    """``topn_gating.MoE`` with the block's weights."""

    name = "topn_gating"
    about = "this package: MoE(dropless=True) with GLUExperts; in training it computes both losses too"
    dropless = True

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        model, weights = layer.model, layer.weights
        clamped = "experts.gate_up_proj_bias" in weights
        options = {"bias": True, "interleaved": True, "limit": layer.block.experts.limit, "transposed": True} if clamped else {}
        experts = topn_gating.GLUExperts(
            model.dim, model.num_experts, model.hidden, dtype=layer.dtype, device="meta", **options
        )
        for name in dict(experts.named_parameters()):
            setattr(experts, name, weights[f"experts.{name}"])
        self.module = topn_gating.MoE(
            model.dim,
            model.num_experts,
            gating_top_n=model.top_k,
            experts=experts,
            dropless=self.dropless,
            policy_train="all",
            policy_eval="all",
            straight_through_dispatch_tensor=False,
            shared_experts=getattr(layer.block, "shared_experts", None),
            dtype=layer.dtype,
            **model.gate,
        )
        gate = router(layer.block)
        if getattr(gate, "bias", None) is not None:
            self.module.gate.to_gates = nn.Linear(model.dim, model.num_experts, device="meta")
            self.module.gate.to_gates.bias = gate.bias
        self.module.gate.to_gates.weight = gate.weight
        if self.module.gate.select_bias is not None:
            self.module.gate.select_bias.copy_(gate.e_score_correction_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x).outputs


class OursInTransformers(Transformers):
    """transformers' block with this package's experts."""

    name = "topn_gating in transformers"
    about = "transformers' block with experts_implementation='topn_gating'"
    implementation = "topn_gating"

    @classmethod
    def load(cls) -> None:
        from topn_gating.integrations.transformers import register

        register()


class Capacity(Ours):
    """The same layer with a capacity that drops."""

    name = "topn_gating, capacity 1.25"
    about = "MoE with n · 1.25 / e slots an expert in training, n · 2 / e else, the defaults; checked with enough for all pairs"
    dropless = False

    def difference(self) -> str | None:
        return CapacityForAll(self.layer).difference()

    @torch.no_grad()
    def left_out(self) -> float:
        self.module.train()
        routing = self.module.gate.route(self.layer.x)
        return 1 - routing.load.sum().item() / routing.demand.sum().item()


class CapacityForAll(Ours):
    """The same layer with as many slots as the most popular expert needs."""

    name = "topn_gating, capacity for all"
    about = "MoE with as many slots an expert as the largest load, so that no pair is dropped"
    dropless = False

    def step(self, tokens: int, training: bool) -> Step:
        gate, largest = self.module.gate, max(self.layer.group_sizes(tokens))
        # Half a slot more: the number of slots is rounded down.
        gate.capacity_factor_train = gate.capacity_factor_eval = (largest + 0.5) * self.layer.model.num_experts / tokens
        return super().step(tokens, training)
