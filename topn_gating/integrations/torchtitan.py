"""torchtitan's router and token dispatchers by this package: drop-ins for those of a model's configuration.

::

    --override.imports topn_gating.integrations.torchtitan.router,topn_gating.integrations.torchtitan.token_dispatcher

has torchtitan build these classes in place of its own. In Python: ``TokenChoiceTopKRouter.Config(…)`` for the router of a
``MoE.Config``, ``AllToAllTokenDispatcher.Config(…)`` for the dispatcher of a ``RoutedExperts.Config``.

Importing this module imports torchtitan. Symbols in shapes are torchtitan's: ``B`` batch, ``L`` length, ``D`` features, ``E``
experts, ``K`` experts of a token, ``T`` tokens, ``R`` rows of all experts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..functional import route
from ..routing import Routing

try:
    from torchtitan.config.override import derive, override
    from torchtitan.models.common import moe
    from torchtitan.models.common import token_dispatcher as dispatchers
except ImportError as error:
    raise ImportError(
        "topn_gating.integrations.torchtitan needs torchtitan with configurable routers and dispatchers: "
        f"pip install torchtitan==0.3.0 ({error})"
    ) from error

__all__ = ["AllToAllTokenDispatcher", "LocalTokenDispatcher", "TokenChoiceTopKRouter", "router", "token_dispatcher"]


class TokenChoiceTopKRouter(moe.TokenChoiceTopKRouter):
    """torchtitan's router, whose experts and their scores come from :func:`topn_gating.route`.

    The configuration, the gate, ``state_dict`` and what is returned are torchtitan's. The experts of a token come best first;
    torchtitan promises no order. Where experts have the same score, ``torch.topk`` chooses any of them; here it is the one with
    the larger logit, then the lower index. Normalised scores are divided by ``max(sum, 1e-20)``, there by ``sum + 1e-20``.

    torchtitan's own code computes ``_debug_force_load_balance``, a ``route_scale`` that is not positive, groups with fewer
    open experts than ``top_k``, whatever is an error there, logits of a half type (which only a CPU has, where autocast to
    float32 does nothing), and DTensors that are partial or sharded over experts.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(moe.TokenChoiceTopKRouter.Config):
        """The fields of torchtitan's."""

    def forward(self, x_BLD: Tensor, expert_bias_E: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Routes tokens.

        Args:
            x_BLD: tokens ``(B, L, D)``.
            expert_bias_E: ``(E,)``, added to the scores for the choice alone (arXiv 2408.15664).

        Returns:
            The scores ``(B, L, K)`` of the chosen experts; the experts, ``(B, L, K)`` int64; all scores ``(B, L, E)``.
        """
        logits: Tensor | None = None
        options = self._options()
        if options is not None:
            with torch.autocast(x_BLD.device.type, dtype=torch.float32):
                logits = self.gate(x_BLD)
        if options is None or logits is None or not _can_route(logits):
            result: tuple[Tensor, Tensor, Tensor] = super().forward(x_BLD, expert_bias_E)
            return result
        scores = logits.sigmoid() if self.score_func == "sigmoid" else logits.softmax(-1)
        if expert_bias_E is not None:
            bias = expert_bias_E.full_tensor() if isinstance(expert_bias_E, DTensor) else expert_bias_E
            options["select_bias"] = bias.detach().float()
        local = logits.to_local() if isinstance(logits, DTensor) else logits
        routing = route(local, self.top_k, dropless=True, losses=False, straight_through=False, **options)
        weight, expert = routing.weight.to(logits.dtype), routing.expert.long()
        if isinstance(logits, DTensor):
            weight, expert = _as_sharded(weight, logits), _as_sharded(expert, logits)
        return weight, expert, scores

    def _options(self) -> dict[str, Any] | None:
        """The options of ``route``; None where torchtitan's own code must compute."""
        if self._debug_force_load_balance or self.score_func not in ("sigmoid", "softmax") or not self.route_scale > 0:
            return None
        options: dict[str, Any] = {
            "score": self.score_func,
            "normalize": self.route_norm,
            "scale": self.route_scale,
            "eps": 1e-20,
        }
        groups, open_groups = self.num_expert_groups, self.num_limited_groups
        if groups is None:
            return options
        size, rest = divmod(self.num_experts, groups)
        if open_groups is None or rest or size < 2 or open_groups > groups or open_groups * size < self.top_k:
            return None
        return options | {"groups": groups, "top_groups": open_groups, "group_score": "top2"}


def _can_route(logits: Tensor) -> bool:
    """Whether the kernels give torchtitan's choice of these logits, and each rank has whole rows of them."""
    if logits.dtype not in (torch.float32, torch.float64):
        return False
    last = logits.ndim - 1
    return not isinstance(logits, DTensor) or not any(p.is_partial() or p.is_shard(last) for p in logits.placements)


def _as_sharded(t: Tensor, like: DTensor) -> Tensor:
    """This rank's part ``(…, K)`` of a tensor that lies on the ranks as ``like`` ``(…, E)`` does."""
    shape = torch.Size((*like.shape[:-1], t.shape[-1]))
    stride = torch.empty(shape, device="meta").stride()
    whole: Tensor = DTensor.from_local(t, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)
    return whole


def _sort(dispatcher: Any, x: Tensor, scores: Tensor, expert: Tensor) -> tuple[Tensor, Routing]:
    """The rows of all experts, and where they come from."""
    with torch.autocast(x.device.type, enabled=False):  # under which torchtitan keeps the tokens' type
        routing = route(expert=expert, weight=scores, num_gates=dispatcher.num_experts, dropless=True)
        return routing.dispatch(x), routing


def _sum_up(rows: Tensor, routing: Routing) -> Tensor:
    """The sums of each token's rows times their scores."""
    with torch.autocast(rows.device.type, enabled=False):
        return routing.combine(rows)


class LocalTokenDispatcher(dispatchers.LocalTokenDispatcher):
    """torchtitan's dispatcher without expert parallelism, by :meth:`Routing.dispatch` and :meth:`Routing.combine`.

    The rows are torchtitan's, in its order. A token's sum over its experts is computed in float32 and rounded once; torchtitan
    rounds each summand first.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(dispatchers.LocalTokenDispatcher.Config):
        """The fields of torchtitan's."""

    def dispatch(
        self, x_TD: Tensor, topk_scores_TK: Tensor, topk_expert_ids_TK: Tensor, num_local_tokens_per_expert_E: Tensor
    ) -> tuple[Tensor, Tensor, Routing]:
        """Copies tokens to the rows of their experts.

        Args:
            x_TD: tokens ``(T, D)``.
            topk_scores_TK: scores ``(T, K)``, which :meth:`combine` multiplies with.
            topk_expert_ids_TK: experts ``(T, K)``, int64 or int32.
            num_local_tokens_per_expert_E: how many rows each expert has, ``(E,)``.

        Returns:
            The rows ``(R, D)``, expert after expert; the counts as they were given; what :meth:`combine` takes.
        """
        rows, routing = _sort(self, x_TD, topk_scores_TK, topk_expert_ids_TK)
        return rows, num_local_tokens_per_expert_E, routing

    def combine(self, routed_output_RD: Tensor, metadata: Routing, x_TD: Tensor) -> Tensor:
        """Sums up, for each token, its experts' rows ``(R, D)`` times their scores: ``(T, D)`` of the rows' type."""
        return _sum_up(routed_output_RD, metadata)


class AllToAllTokenDispatcher(dispatchers.AllToAllTokenDispatcher):
    """torchtitan's standard dispatcher: without expert parallelism it is :class:`LocalTokenDispatcher`.

    With it, this package sorts the rows that are sent. The exchange and the sum over what comes back are torchtitan's.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(dispatchers.AllToAllTokenDispatcher.Config):
        """The fields of torchtitan's."""

    def dispatch(
        self, x_TD: Tensor, topk_scores_TK: Tensor, topk_expert_ids_TK: Tensor, num_local_tokens_per_expert_E: Tensor
    ) -> tuple[Tensor, Tensor, Any]:
        """As :meth:`LocalTokenDispatcher.dispatch`; with expert parallelism, the rows and counts of this rank's experts."""
        if self.ep_mesh is None:
            rows, routing = _sort(self, x_TD, topk_scores_TK, topk_expert_ids_TK)
            return rows, num_local_tokens_per_expert_E, routing
        result: tuple[Tensor, Tensor, Any] = super().dispatch(
            x_TD, topk_scores_TK, topk_expert_ids_TK, num_local_tokens_per_expert_E
        )
        return result

    def _local_reorder(self, x_TD: Tensor, topk_scores_TK: Tensor, topk_expert_ids_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows ``(N, D)``, their tokens and their scores ``(N,)``, expert after expert."""
        rows, routing = _sort(self, x_TD, topk_scores_TK, topk_expert_ids_TK)
        pair = routing.source.long()
        return rows, pair // self.top_k, topk_scores_TK.reshape(-1)[pair]

    def combine(self, routed_output_RD: Tensor, metadata: Any, x_TD: Tensor) -> Tensor:
        """As :meth:`LocalTokenDispatcher.combine`."""
        if self.ep_mesh is None:
            return _sum_up(routed_output_RD, metadata)
        result: Tensor = super().combine(routed_output_RD, metadata, x_TD)
        return result


@override(target=moe.TokenChoiceTopKRouter.Config, exact=True, description="topn_gating's")  # type: ignore[untyped-decorator, unused-ignore]
def router(config: Any) -> Any:
    """The configuration of this module's router with the fields of torchtitan's."""
    return derive(config, TokenChoiceTopKRouter.Config)


@override(target=dispatchers.AllToAllTokenDispatcher.Config, exact=True, description="topn_gating's")  # type: ignore[untyped-decorator, unused-ignore]
def token_dispatcher(config: Any) -> Any:
    """The configuration of this module's dispatcher with the fields of torchtitan's standard one."""
    return derive(config, AllToAllTokenDispatcher.Config)
