"""The dropless path as an experts implementation of transformers 5 and later.

::

    from topn_gating.integrations.transformers import register

    model = AutoModelForCausalLM.from_pretrained("mistralai/Mixtral-8x7B-v0.1", experts_implementation=register())

:func:`patch_routers` also has its routers decide by this package.
"""

from typing import Any, cast

from torch import Tensor

from ..functional import route
from ..gated import gated_unit
from ..grouped import grouped_linear
from .transformers_routers import PatchedRouters, patch_routers

__all__ = ["NAME", "PatchedRouters", "experts_forward", "patch_routers", "register"]

NAME = "topn_gating"


def register() -> str:
    """Makes this package known to transformers as ``experts_implementation="topn_gating"``, and returns that name.

    It serves every model whose experts go through transformers' ``use_experts_implementation`` (Mixtral, Qwen3-MoE, OLMoE,
    DeepSeek-V3, gpt-oss, …), by ``from_pretrained(…, experts_implementation=…)``, ``from_config`` or
    ``model.set_experts_implementation(…)``. To register twice is harmless. Models of transformers up to 5.3 take no names but
    their own there; ``model.config._experts_implementation = register()`` works with these too.

    Raises:
        ImportError: transformers is missing, or older than version 5.
    """
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise ImportError(
            "topn_gating.integrations.transformers needs transformers 5 or later, whose integrations.moe lets others "
            "register experts: pip install 'transformers>=5'"
        ) from error
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    return NAME


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of a module of transformers' experts: ``(N, d)`` of tokens ``(N, d)``, experts and weights ``(N, k)``.

    Under expert parallelism, an index from the number of experts on stands for an expert elsewhere, and is not routed.
    """
    num_experts = self.down_proj.shape[0]
    if top_k_weights.shape != top_k_index.shape:  # transformers 5.0 also has weights of all experts
        top_k_weights = top_k_weights.gather(-1, top_k_index)
    if getattr(self, "_is_expert_parallel", True):
        top_k_index = top_k_index.masked_fill(top_k_index >= num_experts, -1)
    routing = route(expert=top_k_index, weight=top_k_weights, num_gates=num_experts, dropless=True)
    offsets = cast(Tensor, routing.offsets)  # which a dropless routing has

    def linear(rows: Tensor, name: str) -> Tensor:
        weight, bias = getattr(self, name), getattr(self, f"{name}_bias") if self.has_bias else None
        return grouped_linear(rows, weight.mT if self.is_transposed else weight, offsets, bias)

    rows = routing.dispatch(hidden_states.to(self.down_proj.dtype))
    if not getattr(self, "has_gate", True):
        rows = self.act_fn(linear(rows, "up_proj"))
    elif _is_swiglu(self):
        rows = gated_unit(linear(rows, "gate_up_proj"))
    else:
        rows = self._apply_gate(linear(rows, "gate_up_proj"))
    rows = linear(rows, "down_proj")
    if getattr(self, "has_post_expert_norm", False):
        rows = self.post_expert_norm(rows)
    return routing.combine(rows).to(hidden_states.dtype)


def _is_swiglu(experts: Any) -> bool:
    """Whether the gated unit of these experts is transformers' own, with SiLU: ours keeps less for the backward pass."""
    own = type(experts)._apply_gate.__name__ == "_default_apply_gate"
    return own and type(experts.act_fn).__name__ in ("SiLU", "SiLUActivation")
