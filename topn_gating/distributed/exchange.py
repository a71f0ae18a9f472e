"""The exchange of experts' rows between the ranks that hold the experts.

Symbols in shapes: ``W`` ranks of the group, ``e`` experts, ``C`` slots (capacity), ``R`` rows in the dropless layout, ``d``
features; ``…`` are the groups of tokens.
"""

import itertools
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ..checks import check_choice, check_count
from .agreement import agree, agree_always, described
from .groups import Group, group_name, group_of

# Sends `input_splits[r]` of the rows to rank r, and returns those that the ranks sent, `output_splits[r]` of rank r, in order.
Exchange = Callable[[Tensor, list[int], list[int]], Tensor]
Check = Literal["first", "always"]
CHECKS = ("first", "always")


class ExpertGroup:
    """The ranks that share a layer's experts: rank ``r`` holds the experts ``r · e / W`` to ``(r + 1) · e / W - 1``.

    :class:`topn_gating.MoE` makes one; its arguments are described there.
    """

    _made = itertools.count()

    def __init__(
        self,
        group: Group,
        num_experts: int,
        exchange: Exchange | None = None,
        chunks: int = 1,
        check: Check = "first",
    ) -> None:
        self.name = group_name(group)
        members = group_of(self.name)
        self.rank, self.size = members.rank(), members.size()
        self.num_experts = num_experts
        if num_experts % self.size:
            raise ValueError(f"num_experts must be a multiple of the ranks of expert_group ({self.size}), got {num_experts}")
        if exchange is not None and not callable(exchange):
            raise TypeError(f"exchange must be a callable or None, got {type(exchange).__name__}")
        self.exchange = exchange
        self.chunks = check_count("chunks", chunks)
        check_choice("check", check, CHECKS)
        self.check = check
        self.layer = next(self._made)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.layer = next(self._made)  # a copy agrees on its own shapes

    @property
    def num_local(self) -> int:
        """Experts of this rank."""
        return self.num_experts // self.size

    def compute(self, experts: Callable[..., Tensor], rows: Tensor, demand: Tensor | None, training: bool) -> Tensor:
        """The experts' outputs of the rows of this rank's tokens, each computed by the rank that holds the expert.

        Args:
            experts: this rank's, from buffers ``(…, e / W, C, d)``, or from rows ``(R, d)`` and their offsets, to the same.
            rows: of all experts, ``(…, e, C, d)``, or ``(R, d)`` when dropless.
            demand: how many of the rows each expert has, ``(e,)``, when dropless.
            training: whether the layer is in train mode. The ranks agree on each mode's shapes apart.
        """
        agreement = described(rows, self.num_experts, demand is not None)
        (agree_always if self.check == "always" else agree)((self.name, self.layer, training), agreement, rows.device)
        return self._buffers(experts, rows) if demand is None else self._rows(experts, rows, demand)

    def _buffers(self, experts: Callable[..., Tensor], buffers: Tensor) -> Tensor:
        """As :meth:`compute`, in the capacity layout: all parts are equal, so that no count is exchanged.

        The buffers are sent in chunks of their slots: while the experts compute one, the others travel.
        """
        chunks = min(self.chunks, max(buffers.shape[-2], 1))
        sent = [self._start(self._by_rank(part)) for part in buffers.tensor_split(chunks, -2)]
        returned = [self._start(experts(self._finish(part))) for part in sent]
        lead = buffers.shape[:-3]
        parts = []
        for part in returned:
            received = self._finish(part)
            by_rank = received.view(self.size, lead.numel(), *received.shape[1:])
            parts.append(by_rank.transpose(0, 1).reshape(*lead, self.num_experts, *received.shape[2:]))
        return torch.cat(parts, -2) if len(parts) > 1 else parts[0]

    def _by_rank(self, buffers: Tensor) -> Tensor:
        """From ``(…, e, C, d)`` to ``(W · groups, e / W, C, d)``."""
        groups, (capacity, dim) = buffers.shape[:-3].numel(), buffers.shape[-2:]
        return buffers.reshape(groups, self.size, self.num_local, capacity, dim).transpose(0, 1).flatten(0, 1)

    def _rows(self, experts: Callable[..., Tensor], rows: Tensor, demand: Tensor) -> Tensor:
        """As :meth:`compute`, in the dropless layout: counts are exchanged first, and read on the host."""
        equal = [self.num_local] * self.size
        counts = _wait(_send(demand.long(), equal, equal, self.name))
        counts = counts.view(self.size, self.num_local)  # rows that each rank sends to each expert here
        sent, received = torch.stack([demand.view(self.size, -1).sum(1), counts.sum(1)]).tolist()

        by_rank = self._all_to_all(rows[: sum(sent)], received, sent)
        expert = torch.arange(self.num_local, device=rows.device).repeat(self.size)
        expert = expert.repeat_interleave(counts.flatten(), output_size=sum(received))
        order = expert.argsort(stable=True)
        outputs = experts(by_rank.index_select(0, order), counts.sum(0).cumsum(0).int())

        back = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=rows.device))
        returned = self._all_to_all(outputs.index_select(0, back), sent, received)
        return F.pad(returned, (0, 0, 0, rows.shape[0] - returned.shape[0]))

    def _start(self, rows: Tensor) -> Tensor:
        """Starts an exchange in equal parts, whose result is not to be read before :meth:`_finish`."""
        equal = [rows.shape[0] // self.size] * self.size
        return self._all_to_all(rows, equal, equal) if self.exchange is not None else _Start.apply(rows, equal, self.name)

    def _finish(self, rows: Tensor) -> Tensor:
        return rows if self.exchange is not None else _Finish.apply(rows, [rows.shape[0] // self.size] * self.size, self.name)

    def _all_to_all(self, rows: Tensor, output_splits: list[int], input_splits: list[int]) -> Tensor:
        received: Tensor
        if self.exchange is None:
            received = _AllToAll.apply(rows, output_splits, input_splits, self.name)
            return received
        received = self.exchange(rows, output_splits, input_splits)
        if not isinstance(received, Tensor):
            raise TypeError(f"exchange must return a tensor, got {type(received).__name__}")
        expected = (sum(output_splits), *rows.shape[1:])
        if received.shape != expected or received.dtype != rows.dtype:
            got = f"{tuple(received.shape)}, {received.dtype}"
            raise ValueError(f"exchange must return a tensor of shape {tuple(expected)}, {rows.dtype}, got {got}")
        return received

    def __repr__(self) -> str:
        return f"ExpertGroup(name={self.name!r}, rank={self.rank}, size={self.size}, num_experts={self.num_experts})"


class _AllToAll(Function):
    """``all_to_all_single`` along the first dimension, and the way back for the gradient."""

    @staticmethod
    def forward(rows: Tensor, output_splits: list[int], input_splits: list[int], name: str) -> Tensor:
        return _wait(_send(rows, output_splits, input_splits, name))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _rows, ctx.output_splits, ctx.input_splits, ctx.name = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _AllToAll.apply(grad, ctx.input_splits, ctx.output_splits, ctx.name), None, None, None


# The two halves of an exchange in equal parts. The gradient's exchange starts in the backward pass of _Finish and ends in that
# of _Start. Autograd runs what was finished last first, so that exchanges overlap with the experts' products there as well.


class _Start(Function):
    @staticmethod
    def forward(rows: Tensor, equal: list[int], name: str) -> Tensor:
        return _send(rows, equal, equal, name)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _rows, ctx.equal, ctx.name = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Finish.apply(grad, ctx.equal, ctx.name), None, None


class _Finish(Function):
    @staticmethod
    def forward(rows: Tensor, equal: list[int], name: str) -> Tensor:
        return _wait(rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _rows, ctx.equal, ctx.name = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Start.apply(grad, ctx.equal, ctx.name), None, None


def _send(rows: Tensor, output_splits: list[int], input_splits: list[int], name: str) -> Tensor:
    """Starts a collective, which :func:`_wait` ends."""
    received: Tensor = torch.ops._c10d_functional.all_to_all_single(rows.contiguous(), output_splits, input_splits, name)
    return received


def _wait(rows: Tensor) -> Tensor:
    """Waits for a collective. An error of the transport says nothing of this layer, so that one that does is put before it."""
    received: Tensor
    if torch.compiler.is_compiling():
        received = torch.ops._c10d_functional.wait_tensor(rows)
        return received
    try:
        received = torch.ops._c10d_functional.wait_tensor(rows)
    except RuntimeError as error:
        message = (
            "the exchange of experts' rows over expert_group failed: a rank has died, or is later than the group's timeout"
        )
        raise RuntimeError(f"{message} ({error})") from error
    return received
