"""A compact router in plain torch operations, as one would write it well without this package.

The results are those of ``topn_gating`` under the same seed, losses, thresholds and the straight-through gradient included.
Time and memory are linear in the tokens: slots come from one stable sort of the (token, rank) pairs by expert, dispatch is one
gather of rows, combine one ``embedding_bag``. A one-hot over the experts with a cumulative sum, a gather of ``(n, k, d)`` rows
with a sum, and ``index_add`` were all slower on the CPU in float32.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .contenders import EPS, THRESHOLD, Contender, scaled


class Routing(NamedTuple):
    """The slots of pairs and the tokens of slots; row indices are over all groups."""

    weight: Tensor  # (b, n, k), 0 where no slot is held
    slot: Tensor  # (b, n, k), row of the expert buffers; b·e·C where none is held
    token: Tensor  # (b, e, C), row of x; arbitrary where the slot is empty
    one: Tensor  # (b, e, C), 1 with the weight's gradient; 0 where the slot is empty
    losses: tuple[Tensor, Tensor]


def route(logits: Tensor, top_n: int, capacity: int, policy: str = "random") -> Routing:
    """Returns the routing of logits ``(b, n, e)``."""
    logits = logits.float()
    b, n, e = logits.shape
    gates = logits.softmax(-1)
    value, expert = gates.topk(top_n)
    weight = value / value.sum(-1, keepdim=True).clamp(min=EPS)
    if policy == "random":
        routed = torch.rand(weight.shape) < weight / THRESHOLD
        routed[..., 0] = True
        choice = torch.where(routed, expert, e)
    else:
        choice = expert
    slot, pair, held = assign(choice, e, capacity)

    weight_of_pair = weight.transpose(1, 2).flatten(1)
    held_weight = weight_of_pair.gather(1, pair.flatten(1)).view_as(pair)
    one = torch.where(held, 1 + (held_weight - held_weight.detach()), 0)
    token = pair % n + torch.arange(0, b * n, n)[:, None, None]

    share = torch.zeros(b, e).scatter_add_(1, expert[..., 0], torch.ones(b, n)) / n
    losses = e * e * (gates.mean(1) * share).mean(), logits.logsumexp(-1).square().mean()
    return Routing(torch.where(slot < b * e * capacity, weight, 0), slot, token, one, losses)


def assign(choice: Tensor, e: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the slots of pairs and the pairs of slots, for the pairs' experts ``(b, n, k)``; ``e`` means none.

    Pairs go to their expert's slots rank by rank, each rank in the tokens' order, until the slots are full.
    """
    b, n, k = choice.shape
    expert, pair = choice.transpose(1, 2).flatten(1).sort(dim=-1, stable=True)
    first = torch.searchsorted(expert, torch.arange(e + 1).expand(b, -1).contiguous())  # where each expert's pairs begin
    position = torch.arange(n * k) - first.gather(1, expert)

    buffer = torch.arange(0, b * e, e)[:, None] + expert
    slot = torch.where((expert < e) & (position < capacity), buffer * capacity + position, b * e * capacity)
    slot = torch.empty_like(slot).scatter_(1, pair, slot).view(b, k, n).transpose(1, 2)

    place = first[:, :-1, None] + torch.arange(capacity)
    held = place < first[:, 1:, None]
    return slot, pair.gather(1, place.clamp(max=n * k - 1).flatten(1)).view_as(place), held


def dispatch(x: Tensor, routing: Routing) -> Tensor:
    """Returns the expert inputs ``(b, e, C, d)`` of tokens ``(b, n, d)``."""
    rows = x.flatten(0, 1).index_select(0, routing.token.flatten())
    return rows.view(*routing.token.shape, -1) * routing.one.to(x.dtype).unsqueeze(-1)


def combine(y: Tensor, routing: Routing) -> Tensor:
    """Returns the tokens ``(b, n, d)`` of expert outputs ``(b, e, C, d)``."""
    rows = y.flatten(0, 2)
    rows = torch.cat([rows, rows.new_zeros(1, rows.shape[-1])])  # the row of pairs without a slot
    slot, weight = routing.slot.flatten(0, 1), routing.weight.flatten(0, 1).to(y.dtype)
    out = F.embedding_bag(slot, rows, per_sample_weights=weight, mode="sum", padding_idx=len(rows) - 1)
    return out.view(*routing.slot.shape[:2], -1)


class PlainTorch(Contender):
    """The functions of this file."""

    name = "plain torch"
    about = "a compact router in plain torch operations (benchmarks/peers/plain_torch.py)"

    def route(self) -> Routing:
        problem = self.problem
        return route(F.linear(problem.x, problem.weight), problem.shape.k, problem.capacity, problem.policy)

    def gate(self) -> Sequence[Tensor]:
        routing = self.route()
        return routing.weight, *routing.losses

    def full(self, gain: Tensor | None = None) -> Sequence[Tensor]:
        routing = self.route()
        return combine(scaled(dispatch(self.problem.x, routing), gain), routing), *routing.losses
