"""The compact form of a routing decision.

``Routing`` carries in ``O(n·k)`` numbers what the dense ``(…, n, e, C)`` tensors carry in ``O(n²)``. Symbols in shapes: ``n``
tokens of a group, ``e`` experts, ``k`` ranks (``top_n``), ``C`` slots (capacity), ``R`` rows of all experts in the dropless
layout, ``d`` features; ``…`` are the groups.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .checks import check_count, check_dtype, check_rows
from .dtypes import autocast, compute_dtype
from .eager import readable
from .statistics import RoutingStats


class Routing(NamedTuple):
    """Which tokens go to which slots of which experts, and with what weight.

    The experts' rows have one of two layouts. In the capacity layout each expert has ``C`` rows in each group, and pairs of a
    token and a rank that find them taken are dropped. In the dropless layout (MegaBlocks, arXiv 2211.15841) all tokens are one
    sequence, each expert has as many rows as it needs, and one expert's rows follow the other's: a row's index is the expert's
    start plus the slot. Their number ``R`` depends on no value: it is ``k`` times the number of tokens, and with ``align = A``
    that plus ``e · (A - 1)``, rounded up to a multiple of ``A``.

    A ``NamedTuple``, so that pytrees, ``torch.compile`` and activation checkpointing need nothing more. ``torch.load`` reads it
    under ``weights_only=True`` wherever ``topn_gating`` was imported.

    Attributes:
        expert: ``(…, n, k)`` int32, the chosen experts, best first.
        weight: ``(…, n, k)`` float32 (float64 for float64 logits), 0 where no slot is held. Differentiable.
        slot: ``(…, n, k)`` int32, the slot in the expert's buffer; -1 below the threshold (or padding), -2 over capacity.
        source: ``(…, e, C)`` int32, the inverse: ``token * top_n + rank`` of the pair in the slot, -1 where empty. Dropless:
            ``(R,)``, where ``token`` counts the tokens of all groups.
        demand: ``(…, e)`` int32, pairs routed to the expert before the capacity drop. Dropless: ``(e,)``.
        balance_loss: ``()``, the load-balancing loss (GShard, arXiv 2006.16668). Differentiable.
        router_z_loss: ``()``, the router z-loss (ST-MoE, arXiv 2202.08906). Differentiable.
        straight_through: whether :meth:`dispatch` and :meth:`dense` pass the dispatch gradient on to ``weight``.
        offsets: dropless ``(e,)`` int32, where each expert's rows end, a multiple of ``align``, as
            ``torch.nn.functional.grouped_mm`` takes them; None in the capacity layout.
        statistics: ``(3,)`` of ``weight``'s type, for :meth:`stats`, or None where they were not asked for.
    """

    expert: Tensor
    weight: Tensor
    slot: Tensor
    source: Tensor
    demand: Tensor
    balance_loss: Tensor
    router_z_loss: Tensor
    straight_through: bool = True
    offsets: Tensor | None = None
    statistics: Tensor | None = None

    @property
    def capacity(self) -> int | None:
        """Slots of an expert in a group, None when dropless. A shape, so reading it never waits for the device."""
        return self.source.shape[-1] if self.offsets is None else None

    @property
    def load(self) -> Tensor:
        """Slots held, ``(…, e)`` int32, or ``(e,)`` when dropless."""
        return _load(self)

    @property
    def drop_fraction(self) -> Tensor:
        """Share of the routed pairs that found their expert full, a ``()`` float32 tensor; 0 where none was routed."""
        demand = self.demand.sum()
        return (demand - _load(self).sum()) / demand.clamp(min=1)

    @property
    def chosen(self) -> Tensor:
        """``expert`` with -1 for every pair that holds no slot, ``(…, n, k)`` int32: what :func:`topn_gating.route` replays.

        ``route(logits, expert=routing.chosen)`` with the same capacity gives the same ``slot`` (-1 where a pair holds none) and
        ``source`` to the bit. It gives the same weights where no pair of a token was dropped, or weights are not normalised.
        """
        return self.expert.where(self.slot >= 0, -1)

    @property
    def max_violation(self) -> Tensor:
        """How far the busiest expert's demand is above the mean, ``max / mean - 1`` over all groups, a ``()`` float32 tensor.

        MaxVio of loss-free balancing (arXiv 2408.15664). 0 where no pair is routed.
        """
        demand = self.demand.reshape(-1, self.demand.shape[-1]).sum(0)
        total = demand.sum()
        return torch.where(total > 0, demand.amax() * demand.shape[0] / total - 1, 0)

    def stats(self) -> RoutingStats:
        """The health of the router, in tensors of the device and without a gradient.

        Raises:
            ValueError: the routing was computed without ``stats=True``.
        """
        if self.statistics is None:
            raise ValueError("stats() takes a routing that was computed with stats=True")
        entropy, logit_max, logit_rms = self.statistics.unbind()
        return RoutingStats(self.load, self.demand, self.drop_fraction, self.max_violation, entropy, logit_max, logit_rms)

    def as_dropless(self, align: int = 1) -> "Routing":
        """The same decision in the dropless layout; itself if it is that already, with ``align = 1``.

        Pairs that hold no slot have no row there. The weights keep their gradient.

        Args:
            align: divisor of each expert's number of rows: grouped products of 8-bit types ask for 16 to 128.
        """
        align, (num_gates,) = check_count("align", align), self.demand.shape[-1:]
        if self.offsets is not None and align == 1 and self.source.shape[0] == self.weight.numel():
            return self
        held = torch.where(self.slot < 0, self.slot, self.expert)  # a negative index is not routed
        _, slot, source, demand, offsets = ops.Assign.call(
            self.weight.detach(), held, None, None, None, None, num_gates, None, align, ops.POLICIES.index("all"), 1.0
        )
        return self._replace(slot=slot, source=source, demand=demand, offsets=offsets)

    def dispatch(self, x: Tensor) -> Tensor:
        """Copies token rows to the experts' rows, ``einsum('…nd,…nec->…ecd', x, dispatch)`` at ``O(n·k·d)``.

        Args:
            x: ``(…, n, d)`` floating point. Under autocast it is read in the autocast type, as the einsum would.

        Returns:
            ``(…, e, C, d)`` of x's type, or ``(R, d)`` when dropless; rows that no pair holds are 0.
        """
        check_rows("x", x, self.expert.shape[:-1], self.expert.device)
        x = autocast(x)
        weight = self.weight.to(compute_dtype(x.dtype))
        result: Tensor = ops.Dispatch.call(x, weight, self.expert, self.slot, self.source, self.offsets, self.straight_through)
        return result

    def combine(self, y: Tensor) -> Tensor:
        """Brings expert outputs back to their tokens, ``einsum('…ecd,…nec->…nd', y, combine)`` at ``O(n·k·d)``.

        Args:
            y: ``(…, e, C, d)``, or ``(R, d)`` when dropless, floating point. Under autocast it is read in the autocast type, as
                the einsum would.

        Returns:
            ``(…, n, d)`` of y's type: for each token the weighted sum over its experts, 0 where it was dropped by all.
        """
        check_rows("y", y, self.source.shape, self.source.device)
        y = autocast(y)
        weight = self.weight.to(compute_dtype(y.dtype))
        result: Tensor = ops.Combine.call(y, weight, self.expert, self.slot, self.source, self.offsets)
        return result

    def dense(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """The dense form: ``dispatch`` and ``combine``, both ``(…, n, e, C)``, as GShard (arXiv 2006.16668) has them.

        Args:
            dtype: type of both, by default that of ``weight``.

        Raises:
            ValueError: the routing is dropless, where an expert has no fixed number of slots.
        """
        if self.offsets is not None:
            raise ValueError("dense() takes a routing in the capacity layout, got a dropless one: use dispatch() and combine()")
        check_dtype("dtype", dtype)
        dtype = dtype or self.weight.dtype
        weight = self.weight.to(compute_dtype(dtype))
        dispatch, combine = ops.Dense.call(weight, self.expert, self.slot, self.source, dtype, self.straight_through)
        return dispatch, combine

    def __repr__(self) -> str:
        *groups, tokens, top_n = self.expert.shape
        what = f"groups={tuple(groups)}, tokens={tokens}, experts={self.demand.shape[-1]}, top_n={top_n}"
        if self.offsets is not None:
            what += f", dropless, rows={self.source.shape[0]}"
        else:
            what += f", capacity={self.capacity}"
        if self.offsets is None and readable(self.demand):
            what += f", dropped={100 * self.drop_fraction.item():.1f}%"
        return f"Routing({what}, dtype={self.weight.dtype}, device='{self.weight.device}')"


def _load(routing: Routing) -> Tensor:
    """:attr:`Routing.load`, where torch 2.10 does not compile a property of a NamedTuple inside another."""
    return routing.demand if routing.offsets is not None else routing.demand.clamp(max=routing.source.shape[-1])


torch.serialization.add_safe_globals([Routing])
