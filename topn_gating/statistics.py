"""The health of routers: what one routing says of it, and the layers' in one tensor.

Symbols in shapes: ``e`` experts; ``…`` are the groups.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_instance


class RoutingStats(NamedTuple):
    """What :meth:`topn_gating.Routing.stats` returns: tensors of the routing's device, without a gradient.

    Tokens that are not real count for nothing.

    Attributes:
        load: ``(…, e)`` int32, slots held, or ``(e,)`` when dropless.
        demand: ``(…, e)`` int32, pairs routed to the expert before the capacity drop, or ``(e,)`` when dropless.
        drop_fraction: ``()``, share of the routed pairs that found their expert full.
        max_violation: ``()``, how far the busiest expert's demand is above the mean (MaxVio, arXiv 2408.15664).
        entropy: ``()``, mean over tokens of the entropy of their gates, which are divided by their sum, in nats.
        logit_max: ``()``, the largest magnitude of a logit.
        logit_rms: ``()``, the root mean square of the logits.
    """

    load: Tensor
    demand: Tensor
    drop_fraction: Tensor
    max_violation: Tensor
    entropy: Tensor
    logit_max: Tensor
    logit_rms: Tensor


SCALARS = RoutingStats._fields[2:]


def stack_stats(layers: Sequence[RoutingStats]) -> Tensor:
    """One tensor of the layers' statistics, so that one all-reduce and one copy to the host serve a training step.

    Args:
        layers: one for each layer, all of the same number of experts.

    Returns:
        ``(layers, 5 + e)`` float32: ``drop_fraction``, ``max_violation``, ``entropy``, ``logit_max`` and ``logit_rms``, then
        each expert's demand, over all groups.
    """
    for layer in layers:
        check_instance("layers", layer, RoutingStats, "sequence of topn_gating.RoutingStats")
    if not layers:
        raise ValueError("layers must have one or more, got none")
    return torch.stack(
        [
            torch.cat([torch.stack([getattr(layer, name).float() for name in SCALARS]), _demand(layer).float()])
            for layer in layers
        ]
    )


def _demand(stats: RoutingStats) -> Tensor:
    """Each expert's demand over all groups, ``(e,)``."""
    return stats.demand.reshape(-1, stats.demand.shape[-1]).sum(0)
