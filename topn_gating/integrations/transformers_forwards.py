"""Forwards of the routers of transformers 5 that compute or return more than logits, weights and experts of ``route``."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import route
from ..routing import Routing


def routed(logits: Tensor, top_k: int, **options: Any) -> Routing:
    """The routing of logits ``(n, e)`` without losses; options that are None count as left out."""
    options = {name: value for name, value in options.items() if value is not None}
    if "select_bias" in options:
        options["select_bias"] = options["select_bias"].detach().float().flatten()
    return route(logits, top_k, dropless=True, losses=False, straight_through=False, **options)


def choose(logits: Tensor, top_k: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Weights in the type that ``route`` computes in, and experts as int64, both ``(n, k)``."""
    routing = routed(logits, top_k, **options)
    return routing.weight, routing.expert.long()


def _gemma4(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns all gates in place of the logits; each expert's weights have a factor."""
    logits = self.proj(self.norm(hidden_states) * self.scale * self.scalar_root_size)
    weight, expert = choose(logits, self.config.top_k_experts, normalize=True)
    return logits.softmax(-1, dtype=torch.float32), weight.float() * self.per_expert_scale[expert], expert


def _lfm2(self: Any, hidden_states: Tensor, expert_bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Adds 1e-6 to the sum of the gates, where ``route`` has a least sum."""
    logits = F.linear(hidden_states, self.weight)
    bias = expert_bias if self.use_expert_bias else None
    weight, expert = choose(logits, self.top_k, score="sigmoid", select_bias=bias, normalize=False)
    if self.norm_topk_prob:
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-6)
    return logits, (weight * self.routed_scaling_factor).to(logits.dtype), expert


def _llama4(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the weights of all experts, 0 where not chosen."""
    logits = F.linear(hidden_states, self.weight, self.bias)
    weight, expert = choose(logits, self.top_k, score="sigmoid", normalize=False)
    return torch.zeros_like(logits).scatter(1, expert, weight.to(logits.dtype)), logits


def _jetmoe(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, list[int], Tensor]:
    """Returns the pairs in the order of their experts, which is the dropless layout."""
    logits = self.layer(hidden_states).float()
    routing = routed(logits, self.top_k, normalize=True)
    pair = routing.source.long()
    weight = routing.weight.flatten()[pair].type_as(hidden_states)
    return pair, pair // self.top_k, weight, routing.demand.tolist(), logits


def _zaya(self: Any, hidden_states: Tensor, router_states: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Its last class is no expert: such a pair has expert 0 and the weight 0. It gives the next layer's router its states."""
    states = self.down_proj(hidden_states)
    if self.use_eda and router_states is not None:
        states = states + router_states * self.router_states_scale
    logits = self.router_mlp(states).reshape(-1, self.num_router_classes)
    weight, expert = choose(logits, self.top_k, select_bias=self.balancing_biases, normalize=False)
    skips = expert == self.num_experts
    return logits, weight.to(logits.dtype).masked_fill(skips, 0), expert.masked_fill(skips, 0), states.clone()


def _dbrx(self: Any, router_logits: Tensor) -> tuple[Tensor, Tensor]:
    """A method of the block: the weights, divided by a norm, and the experts."""
    weight, expert = choose(router_logits, self.top_k, normalize=False)
    if self.moe_normalize_expert_weights is not None:
        weight = weight / torch.norm(weight, p=self.moe_normalize_expert_weights, dim=-1, keepdim=True)
    return weight.to(router_logits.dtype), expert


# By the names of transformers 5.24, as transformers_routers.ROUTERS.
FORWARDS: dict[str, Callable[..., Any]] = {
    "Gemma4TextRouter": _gemma4,
    "DiffusionGemmaTextRouter": _gemma4,
    "Lfm2MoeTopKRouter": _lfm2,
    "Llama4Router": _llama4,
    "JetMoeTopKGating": _jetmoe,
    "ZayaRouter": _zaya,
    "DbrxFFN": _dbrx,
}
METHODS = {"DbrxFFN": "route_tokens_to_experts"}  # what is replaced where it is not the forward
