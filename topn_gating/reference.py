"""The router in plain torch operations: the readable definition, and the oracle of the tests.

Every function takes and returns what its namesake in :mod:`topn_gating` does, random numbers as tensors. Autograd
gives the gradients, of any order. It costs what such code costs, a ``(…, n, k, e)`` one-hot and more; nothing but tests,
benchmarks and ``differentiable_topk_fused=False`` uses it.

Symbols in shapes: ``n`` tokens of a group, ``e`` experts, ``k`` ranks (``top_n``), ``C`` slots (capacity), ``R`` rows of all
experts in the dropless layout, ``d`` features.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .dtypes import compute_dtype
from .ops import Policy, dropless_rows
from .routing import Routing

SOFT_EPS = 0.1
SOFT_ITERATIONS = 20


def gumbel(u: Tensor) -> Tensor:
    """Standard Gumbel noise from ``u ~ U[0, 1)``, both logarithms clamped at 1e-20."""

    def log(t: Tensor) -> Tensor:
        return t.clamp(min=1e-20).log()

    return -log(-log(u))


def scores(logits: Tensor, noise: Tensor | None = None, noise_mult: float = 1.0) -> Tensor:
    """Scores that the selection compares: the logits in the type that they are computed in, with Gumbel noise."""
    z = logits.to(compute_dtype(logits.dtype))
    return z if noise is None else z + noise_mult * gumbel(noise)


def soft_topn(p: Tensor, top_n: int) -> Tensor:
    """Soft top-n scores ``(…, e)`` of gates ``p`` ``(…, e)`` by coordinate descent (arXiv 1502.04759, arXiv 2303.09752)."""
    k = torch.full((), min(top_n * 9 / 8, p.shape[-1]), dtype=p.dtype, device=p.device)
    b = -p
    for _ in range(SOFT_ITERATIONS):
        a = SOFT_EPS * (k.log() - ((p + b) / SOFT_EPS).logsumexp(-1, keepdim=True))
        b = -F.relu(p + a)
    return ((p + a + b) / SOFT_EPS).exp()


def topn_weight(p: Tensor, expert: Tensor, eps: float, *, soft: bool = False) -> Tensor:
    """Weights ``(…, n, k)`` of the chosen experts, normalised over the ranks; raw for ``top_n = 1``."""
    top_n = expert.shape[-1]
    v = (soft_topn(p, top_n) if soft else p).gather(-1, expert.long())
    return v if top_n == 1 else v / v.sum(-1, keepdim=True).clamp(min=eps)


def gate(
    logits: Tensor,
    *,
    top_n: int,
    eps: float = 1e-9,
    noise: Tensor | None = None,
    noise_mult: float = 1.0,
    token_mask: Tensor | None = None,
    differentiable_topk: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``weight, expert (…, n, k), importance (…, e), balance_loss (), router_z_loss ()`` of logits ``(…, n, e)``."""
    z, s = scores(logits), scores(logits, noise, noise_mult)
    p = s.softmax(-1)
    expert = s.detach().sort(dim=-1, descending=True, stable=True).indices[..., :top_n]
    weight = topn_weight(p, expert, eps, soft=differentiable_topk)

    valid = torch.ones(z.shape[:-1], dtype=torch.bool, device=z.device) if token_mask is None else token_mask
    importance = mean_over_valid(p, valid)
    density = mean_over_valid(F.one_hot(expert[..., 0], z.shape[-1]).to(p.dtype), valid)
    z_loss = torch.where(valid, z.logsumexp(-1).square(), 0).sum() / valid.sum().clamp(min=1)
    return weight, expert.int(), importance, balance(importance, density), z_loss


def mean_over_valid(t: Tensor, valid: Tensor) -> Tensor:
    """Mean of ``t`` ``(…, n, e)`` over the tokens that are valid, 0 where a group has none."""
    total = torch.where(valid.unsqueeze(-1), t, 0).sum(-2)
    return total / valid.sum(-1, keepdim=True).clamp(min=1)


def balance(importance: Tensor, density: Tensor) -> Tensor:
    """Load-balancing loss ``e² · mean(importance · density)`` of two ``(…, e)``; 0 where there are no groups."""
    product = importance * density
    return product.sum() * (product.shape[-1] ** 2 / max(product.numel(), 1))


def assign(
    weight: Tensor,
    expert: Tensor,
    *,
    num_gates: int,
    capacity: int | None,
    align: int = 1,
    policy: Policy = "random",
    draws: Tensor | None = None,
    threshold: Tensor | None = None,
    eps: float = 1e-9,
    token_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``kept weight, slot (…, n, k), source (…, e, C), demand (…, e), offsets (0,)``: threshold masking, then the slots.

    Without a capacity in the dropless layout, where the last three are ``source (R,), demand (e,), offsets (e,)``. An expert
    out of range is not routed.
    """
    *lead, n, top_n = weight.shape
    if policy == "random":
        assert draws is not None
        assert threshold is not None
        routed = draws < weight / threshold.clamp(min=eps)
    elif policy == "threshold":
        assert threshold is not None
        routed = weight > threshold
    else:
        routed = torch.full_like(weight, policy == "all", dtype=torch.bool)
    routed = torch.cat([torch.ones_like(routed[..., :1]), routed[..., 1:]], -1)
    if token_mask is not None:
        routed = routed & token_mask.unsqueeze(-1)
    routed = routed & (expert >= 0) & (expert < num_gates)
    expert = torch.where(routed, expert, 0).long()
    pairs = F.one_hot(expert, num_gates) * routed.unsqueeze(-1)  # (…, n, k, e)

    if capacity is None:
        pairs = pairs.flatten(0, -2)
        slot = ((pairs.cumsum(0) - pairs) * pairs).sum(-1).view(weight.shape).where(routed, -1)
        demand = pairs.sum(0)
        offsets = (-(-demand // align) * align).cumsum(0)
        place = torch.where(routed, row_starts(offsets)[expert] + slot, -1).flatten()
        rows = dropless_rows(len(pairs), num_gates, align)
        source = torch.full((rows + 1,), -1, device=weight.device)  # a place of -1 is the last, which is cut off
        source = source.scatter(0, place % (rows + 1), torch.arange(len(pairs), device=weight.device))[:-1]
        return torch.where(routed, weight, 0), slot.int(), source.int(), demand.int(), offsets.int()

    earlier = pairs.cumsum(-3) - pairs
    routed_per_rank = pairs.sum(-3)  # (…, k, e)
    first = torch.zeros_like(routed_per_rank)
    for k in range(1, top_n):
        first[..., k, :] = (first[..., k - 1, :] + routed_per_rank[..., k - 1, :]).clamp(max=capacity)
    slot = ((earlier + first.unsqueeze(-3)) * pairs).sum(-1)
    slot = torch.where(slot < capacity, slot, -2).where(routed, -1)

    kept = slot >= 0
    held = torch.where(kept, expert * capacity + slot, num_gates * capacity).flatten(-2)
    pair = torch.arange(n * top_n, device=weight.device).expand(*lead, -1)
    source = torch.full((*lead, num_gates * capacity + 1), -1, device=weight.device)
    source = source.scatter(-1, held, pair)[..., :-1].unflatten(-1, (num_gates, capacity))
    offsets = torch.empty(0, dtype=torch.int32, device=weight.device)
    return torch.where(kept, weight, 0), slot.int(), source.int(), pairs.sum((-3, -2)).int(), offsets


def row_starts(offsets: Tensor) -> Tensor:
    """The first row of each expert ``(e,)`` in the dropless layout."""
    return F.pad(offsets.long(), (1, 0))[:-1]


def route(
    logits: Tensor,
    *,
    top_n: int,
    capacity: int | None,
    align: int = 1,
    policy: Policy = "random",
    draws: Tensor | None = None,
    threshold: Tensor | None = None,
    eps: float = 1e-9,
    noise: Tensor | None = None,
    noise_mult: float = 1.0,
    token_mask: Tensor | None = None,
    differentiable_topk: bool = False,
    straight_through: bool = True,
    balance_on: Literal["routed", "kept"] = "routed",
) -> Routing:
    """All steps from logits ``(…, n, e)`` to a :class:`topn_gating.Routing`, in train mode."""
    num_gates = logits.shape[-1]
    weight, expert, importance, balance_loss, z_loss = gate(
        logits,
        top_n=top_n,
        eps=eps,
        noise=noise,
        noise_mult=noise_mult,
        token_mask=token_mask,
        differentiable_topk=differentiable_topk,
    )
    kept, slot, source, demand, offsets = assign(
        weight,
        expert,
        num_gates=num_gates,
        capacity=capacity,
        align=align,
        policy=policy,
        draws=draws,
        threshold=threshold,
        eps=eps,
        token_mask=token_mask,
    )
    if balance_on == "kept":
        valid = torch.ones_like(slot[..., 0], dtype=torch.bool) if token_mask is None else token_mask
        held = F.one_hot(expert[..., 0].long(), num_gates) * (slot[..., :1] >= 0)
        balance_loss = balance(importance, mean_over_valid(held.to(importance.dtype), valid))
    where = None if capacity is not None else offsets
    return Routing(expert, kept, slot, source, demand, balance_loss, z_loss, straight_through, where)


def by_row(routing: Routing, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """``dispatch, combine`` with the experts' rows in one dimension: ``(…, n, e · C)``, or dropless ``(…, n, R)``."""
    if routing.offsets is None:
        num_gates, capacity = routing.source.shape[-2:]
        size, start = num_gates * capacity, torch.arange(num_gates, device=routing.source.device) * capacity
    else:
        size, start = routing.source.shape[0], row_starts(routing.offsets)
    kept = routing.slot >= 0
    held = torch.where(kept, start[routing.expert.long().where(kept, 0)] + routing.slot, size)
    empty = routing.weight.new_zeros(*held.shape[:-1], size + 1)
    combine = empty.scatter(-1, held, routing.weight)[..., :-1]
    dispatch = empty.scatter(-1, held, 1.0)[..., :-1]
    if routing.straight_through:
        dispatch = dispatch + (combine - combine.detach())
    dtype = dtype or combine.dtype
    return dispatch.to(dtype), combine.to(dtype)


def dense(routing: Routing, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """``dispatch, combine`` of shape ``(…, n, e, C)``."""
    dispatch, combine = by_row(routing, dtype)
    shape = routing.source.shape[-2:]
    return dispatch.unflatten(-1, shape), combine.unflatten(-1, shape)


def dispatch(x: Tensor, routing: Routing) -> Tensor:
    """Expert inputs ``(…, e, C, d)``, or dropless ``(R, d)``, of tokens ``x`` ``(…, n, d)`` through the dense tensor."""
    dispatch = by_row(routing, x.dtype)[0]
    if routing.offsets is not None:
        return torch.einsum("nd,nr->rd", x.flatten(0, -2), dispatch.flatten(0, -2))
    rows: Tensor = torch.einsum("...nd,...nr->...rd", x, dispatch).unflatten(-2, routing.source.shape[-2:])
    return rows


def combine(y: Tensor, routing: Routing) -> Tensor:
    """Tokens ``(…, n, d)`` from expert outputs ``y`` ``(…, e, C, d)``, or dropless ``(R, d)``, through the dense tensor."""
    combine = by_row(routing, y.dtype)[1]
    if routing.offsets is None:
        y = y.flatten(-3, -2)
    return torch.einsum("...rd,...nr->...nd", y, combine)
