"""The router of Megatron-core by :func:`topn_gating.route`: a ``TopKRouter`` for the ``router`` of a layer's ``MoESubmodules``.

::

    from topn_gating.integrations.megatron import TopKRouter

    spec = get_gpt_layer_local_spec(num_experts=64)
    spec.submodules.mlp.submodules.router = TopKRouter  # MoESubmodules(experts=…, router=TopKRouter)

Importing this module imports Megatron-core.
"""

from typing import Any

import torch
from torch import Tensor

from ..functional import route

try:
    from megatron.core import __version__ as megatron_version
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.router import TopKRouter as MegatronTopKRouter
except ImportError as error:
    raise ImportError(
        "topn_gating.integrations.megatron needs the router of Megatron-core: pip install megatron-core==0.16.1"
    ) from error
if not megatron_version.startswith("0.16."):  # what is not computed here is known of these versions alone
    raise ImportError(f"topn_gating.integrations.megatron knows the router of Megatron-core 0.16, found {megatron_version}")

__all__ = ["TopKRouter"]

HALF = (torch.bfloat16, torch.float16)


class TopKRouter(MegatronTopKRouter):
    """Megatron-core's ``TopKRouter``, whose experts, weights and drops by probability come from :func:`topn_gating.route`.

    The constructor, the parameters, ``state_dict`` and what is returned are Megatron-core's, and so is the code of its
    auxiliary losses, its z-loss, its jitter, its random logits and its count of tokens for the expert bias.

    Computed here: ``moe_router_score_function`` ``"softmax"``, before and behind the choice, and ``"sigmoid"``;
    ``moe_router_enable_expert_bias``; ``moe_router_num_groups`` with a score before the choice and one or two experts of a
    group (``topk // group_topk``); ``moe_router_topk_scaling_factor``; ``moe_expert_capacity_factor`` with the policy
    ``"probs"``.

    All else is left to Megatron-core's code: ``"sinkhorn"``, a routing replay, groups by logits or by the sum of more than two
    scores, a negative scaling factor and another score function; and, where logits are of a half type, an expert bias and
    groups by the sum of two scores, because Megatron-core rounds what it adds up and compares. The policy ``"position"``,
    ``moe_pad_expert_input_to_capacity`` and drops of half types are its code behind the choice that is made here.

    Where experts have the same score, ``torch.topk`` chooses any of them; here it is the lower index, or of scores that are
    rounded to a half type the one that is larger before. The weights of sigmoids in float32 and float64 are divided by
    ``max(sum, 1e-20)``, in Megatron-core by ``sum + 1e-20``.

    Raises:
        ValueError: ``moe_router_fusion`` is on, which asks for Transformer Engine's router.
    """

    def __init__(self, config: Any, pg_collection: Any = None) -> None:
        super().__init__(config, pg_collection)
        self._check_fusion()

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Routes tokens by their logits.

        Args:
            logits: ``(s, b, e)``, float32, float64, bfloat16 or float16.
            padding_mask: ``(s, b)`` bool, True where a token is padding, which is routed but counts in no loss.

        Returns:
            The weights ``(s * b, e)`` of the logits' type, 0 where an expert is not chosen; and which are chosen, bool.

        Raises:
            ValueError: ``moe_router_fusion`` is on.
        """
        self._check_fusion()
        options = self._options(logits.dtype)
        if options is None:
            result: tuple[Tensor, Tensor] = super().routing(logits, padding_mask)
            return result
        length, batch, num_experts = logits.shape
        logits = logits.reshape(-1, num_experts)
        mask = None if padding_mask is None else padding_mask.reshape(-1)
        logits = self.apply_z_loss(logits, padding_mask=mask)
        probs, routing_map = self._choose(logits, options)
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            counted, scores = moe_utils.compute_routing_scores_for_aux_loss(
                logits, self.topk, self.score_function, padding_mask=mask
            )
            masked = mask is not None
            probs = self._apply_aux_loss(probs, scores, counted, with_padding_mask=masked)
            probs = self._apply_seq_aux_loss(probs, scores, counted, length, batch, with_padding_mask=masked)
            probs = self._apply_global_aux_loss(probs, scores, counted, with_padding_mask=masked)
        self._apply_expert_bias(routing_map, padding_mask=mask)
        return probs, routing_map

    def _check_fusion(self) -> None:
        if self.config.moe_router_fusion:
            raise ValueError("moe_router_fusion must be off: it asks for Transformer Engine's router in place of this one")

    def _options(self, dtype: torch.dtype) -> dict[str, Any] | None:
        """The options of ``route`` for logits of ``dtype``; None where Megatron-core's own code must compute."""
        config, half, sigmoid = self.config, dtype in HALF, self.score_function == "sigmoid"
        scale, group_topk = config.moe_router_topk_scaling_factor or 1.0, config.moe_router_group_topk
        if self.routing_type == "sinkhorn" or self.router_replay is not None or scale < 0:
            return None
        if self.score_function not in ("softmax", "sigmoid"):
            return None
        normalize = self.topk > 1 if sigmoid else not config.moe_router_pre_softmax
        options: dict[str, Any] = {"score": self.score_function, "normalize": normalize, "scale": scale, "eps": 1e-20}
        if sigmoid and self.expert_bias is not None:  # Megatron-core's softmax ignores it
            if half:
                return None
            options["select_bias"] = self.expert_bias.detach().float()
        if group_topk:
            groups, summed = config.moe_router_num_groups, self.topk // group_topk
            by_logits = not sigmoid and normalize
            too_few = group_topk * (config.num_moe_experts // groups) < self.topk
            if by_logits or too_few or summed not in (1, 2) or (half and summed == 2):
                return None
            options |= {"groups": groups, "top_groups": group_topk, "group_score": "max" if summed == 1 else "top2"}
        return options

    def _choose(self, logits: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Weights and choice ``(n, e)`` of logits ``(n, e)``, after the drop."""
        config, (tokens, num_experts) = self.config, logits.shape
        factor, slots = config.moe_expert_capacity_factor, tokens
        layout: dict[str, Any] = {"dropless": True}
        if factor is not None:
            slots = moe_utils.get_capacity(tokens * self.topk, num_experts, factor)
        policy, pads = config.moe_token_drop_policy, config.moe_pad_expert_input_to_capacity
        by_weight = policy == "probs" and not pads and slots > 0 and logits.dtype not in HALF
        if by_weight and slots < tokens:
            layout = {"capacity": slots, "policy": "all", "priority": "weight"}
        weight, expert, held = self._route(logits, options | layout)
        probs = torch.zeros_like(logits).scatter_(1, expert, weight)
        routing_map = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, expert, held)
        if factor is not None and not by_weight:
            probs, routing_map = moe_utils.apply_router_token_dropping(
                probs, routing_map, router_topk=self.topk, capacity_factor=factor, drop_policy=policy, pad_to_capacity=pads
            )
        return probs, routing_map

    def _route(self, logits: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Weights of the logits' type, experts, and which pairs hold a slot, ``(n, k)`` each."""
        options = {"losses": False, "straight_through": False, **options}
        if logits.dtype not in HALF:
            routing = route(logits, self.topk, **options)
            return routing.weight, routing.expert.long(), routing.slot >= 0
        # Megatron-core computes with gates that are rounded to the logits' type, and rounds after each step.
        sums, scale = options["normalize"] and options["score"] == "sigmoid", options["scale"]
        routing = route(logits, self.topk, **options | {"normalize": options["normalize"] and not sums, "scale": 1.0})
        weight = routing.weight.to(logits.dtype)
        if sums:
            weight = weight / (weight.sum(-1, keepdim=True) + options["eps"])
        return weight * scale, routing.expert.long(), routing.slot >= 0
