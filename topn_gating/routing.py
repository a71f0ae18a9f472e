"""The compact form of a routing decision.

``Routing`` carries in ``O(n·k)`` numbers what the dense ``(…, n, e, C)`` tensors carry in ``O(n²)``. Symbols in shapes: ``n``
tokens of a group, ``e`` experts, ``k`` ranks (``top_n``), ``C`` slots (capacity), ``d`` features; ``…`` are the groups.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .checks import check_dtype, check_rows
from .dtypes import autocast, compute_dtype
from .eager import readable


class Routing(NamedTuple):
    """Which tokens go to which slots of which experts, and with what weight.

    A ``NamedTuple``, so that pytrees, ``torch.compile`` and activation checkpointing need nothing more. ``torch.load`` reads it
    under ``weights_only=True`` wherever ``topn_gating`` was imported.

    Attributes:
        expert: ``(…, n, k)`` int32, the chosen experts, best first.
        weight: ``(…, n, k)`` float32 (float64 for float64 logits), 0 where no slot is held. Differentiable.
        slot: ``(…, n, k)`` int32, the slot in the expert's buffer; -1 below the threshold (or padding), -2 over capacity.
        source: ``(…, e, C)`` int32, the inverse: ``token * top_n + rank`` of the pair in the slot, -1 where empty.
        demand: ``(…, e)`` int32, pairs routed to the expert before the capacity drop.
        balance_loss: ``()``, the load-balancing loss (GShard, arXiv 2006.16668). Differentiable.
        router_z_loss: ``()``, the router z-loss (ST-MoE, arXiv 2202.08906). Differentiable.
        straight_through: whether :meth:`dispatch` and :meth:`dense` pass the dispatch gradient on to ``weight``.
    """

    expert: Tensor
    weight: Tensor
    slot: Tensor
    source: Tensor
    demand: Tensor
    balance_loss: Tensor
    router_z_loss: Tensor
    straight_through: bool = True

    @property
    def capacity(self) -> int:
        """Slots of an expert in a group. A shape, so reading it never waits for the device."""
        return self.source.shape[-1]

    @property
    def load(self) -> Tensor:
        """Slots held, ``(…, e)`` int32."""
        return self.demand.clamp(max=self.capacity)

    @property
    def drop_fraction(self) -> Tensor:
        """Share of the routed pairs that found their expert full, a ``()`` float32 tensor; 0 where none was routed."""
        demand = self.demand.sum()
        return (demand - self.load.sum()) / demand.clamp(min=1)

    def dispatch(self, x: Tensor) -> Tensor:
        """Copies token rows into the expert buffers, ``einsum('…nd,…nec->…ecd', x, dispatch)`` at ``O(n·k·d)``.

        Args:
            x: ``(…, n, d)`` floating point. Under autocast it is read in the autocast type, as the einsum would.

        Returns:
            ``(…, e, C, d)`` of x's type; rows of empty slots are 0.
        """
        check_rows("x", x, self.expert.shape[:-1], self.expert.device)
        x = autocast(x)
        weight = self.weight.to(compute_dtype(x.dtype))
        result: Tensor = ops.Dispatch.call(x, weight, self.expert, self.slot, self.source, self.straight_through)
        return result

    def combine(self, y: Tensor) -> Tensor:
        """Brings expert outputs back to their tokens, ``einsum('…ecd,…nec->…nd', y, combine)`` at ``O(n·k·d)``.

        Args:
            y: ``(…, e, C, d)`` floating point. Under autocast it is read in the autocast type, as the einsum would.

        Returns:
            ``(…, n, d)`` of y's type: for each token the weighted sum over its experts, 0 where it was dropped by all.
        """
        check_rows("y", y, self.source.shape, self.source.device)
        y = autocast(y)
        weight = self.weight.to(compute_dtype(y.dtype))
        result: Tensor = ops.Combine.call(y, weight, self.expert, self.slot, self.source)
        return result

    def dense(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """The dense form: ``dispatch`` and ``combine``, both ``(…, n, e, C)``, as GShard (arXiv 2006.16668) has them.

        Args:
            dtype: type of both, by default that of ``weight``.
        """
        check_dtype("dtype", dtype)
        dtype = dtype or self.weight.dtype
        weight = self.weight.to(compute_dtype(dtype))
        dispatch, combine = ops.Dense.call(weight, self.expert, self.slot, self.source, dtype, self.straight_through)
        return dispatch, combine

    def __repr__(self) -> str:
        (*groups, tokens, top_n), (num_gates, capacity) = self.expert.shape, self.source.shape[-2:]
        what = f"groups={tuple(groups)}, tokens={tokens}, experts={num_gates}, top_n={top_n}, capacity={capacity}"
        if readable(self.demand):
            what += f", dropped={100 * self.drop_fraction.item():.1f}%"
        return f"Routing({what}, dtype={self.weight.dtype}, device='{self.weight.device}')"


torch.serialization.add_safe_globals([Routing])
