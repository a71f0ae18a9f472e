"""The router in plain torch operations: the readable definition, and the oracle of the tests.

Every function takes and returns what its namesake in :mod:`topn_gating` does, random numbers as tensors. Autograd
gives the gradients, of any order. It costs what such code costs, a ``(…, n, k, e)`` one-hot and more; nothing but tests,
benchmarks and ``differentiable_topk_fused=False`` uses it.

Symbols in shapes: ``n`` tokens of a group, ``e`` experts, ``k`` ranks (``top_n``), ``C`` slots (capacity), ``R`` rows of all
experts in the dropless layout, ``d`` features.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .dtypes import compute_dtype
from .ops import GroupScore, Policy, Score, dropless_rows
from .routing import Routing

BalanceRanks = Literal["first", "all"]
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


def gates(s: Tensor, score: Score = "softmax") -> Tensor:
    """Gates ``(…, e)`` of scores: their softmax, or each one's sigmoid, or ``sqrt(softplus(s))``."""
    if score == "softmax":
        return s.softmax(-1)
    if score == "sigmoid":
        return s.sigmoid()
    softplus = torch.logaddexp(s, torch.zeros_like(s))
    zero = softplus == 0  # where the square root has no derivative
    return torch.where(zero, 1, softplus).sqrt().where(~zero, 0)


def group_scores(q: Tensor, groups: int, group_score: GroupScore = "top2") -> Tensor:
    """Scores of equal groups of neighbouring experts: the sum of the two largest ``q`` ``(…, e)`` of each, or the largest."""
    of_group = q.unflatten(-1, (groups, -1))
    best: Tensor = of_group.topk(min(2 if group_score == "top2" else 1, of_group.shape[-1]), -1).values.sum(-1)
    return best


def closed_experts(q: Tensor, groups: int, top_groups: int, group_score: GroupScore = "top2") -> Tensor:
    """Which experts ``(…, e)`` are not in the ``top_groups`` groups of the largest scores; of equal groups the lower is."""
    best = group_scores(q, groups, group_score)
    order = best.sort(dim=-1, descending=True, stable=True).indices
    closed = torch.zeros_like(best, dtype=torch.bool).scatter(-1, order[..., top_groups:], True)
    return closed.repeat_interleave(q.shape[-1] // groups, -1)


def select(q: Tensor, closed: Tensor, top_n: int) -> Tensor:
    """The experts ``(…, n, k)`` of largest selection scores ``q`` ``(…, n, e)`` that are not closed, the lower index first."""
    order = q.sort(dim=-1, descending=True, stable=True).indices
    open_first = closed.gather(-1, order).long().sort(dim=-1, stable=True).indices
    return order.gather(-1, open_first)[..., :top_n]


def topn_weight(
    p: Tensor, expert: Tensor, eps: float, *, normalize: bool = True, scale: float = 1.0, soft: bool = False
) -> Tensor:
    """Weights ``(…, n, k)`` of the chosen experts, 0 where there is none (-1)."""
    routed = expert >= 0
    v = (soft_topn(p, expert.shape[-1]) if soft else p).gather(-1, expert.long().clamp(min=0)).where(routed, 0)
    w = v / v.sum(-1, keepdim=True).clamp(min=eps) if normalize else v
    return scale * w.where(routed, 0)


def gate(
    logits: Tensor,
    *,
    top_n: int,
    eps: float = 1e-9,
    noise: Tensor | None = None,
    noise_mult: float = 1.0,
    token_mask: Tensor | None = None,
    differentiable_topk: bool = False,
    score: Score = "softmax",
    select_bias: Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    group_score: GroupScore = "top2",
    normalize: bool | None = None,
    scale: float = 1.0,
    expert: Tensor | None = None,
    balance_ranks: BalanceRanks = "first",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """From logits ``(…, n, e)``, in this order:

    ``weight, expert (…, n, k), importance, counts (…, e), balance_loss, router_z_loss (), statistics (3,)``, where the last are
    the entropy, and the largest magnitude and the root mean square of the logits.
    """
    z, s = scores(logits), scores(logits, noise, noise_mult)
    num_gates, p = z.shape[-1], gates(s, score)
    if expert is not None:
        expert = expert.where((expert >= 0) & (expert < num_gates), -1)
    elif select_bias is None and groups == 1:
        expert = select(s.detach(), torch.zeros_like(s, dtype=torch.bool), top_n)
    else:
        q = p.detach() if select_bias is None else p.detach() + select_bias.detach()
        expert = select(q, closed_experts(q, groups, top_groups, group_score), top_n)
    normalize = top_n > 1 if normalize is None else normalize
    weight = topn_weight(p, expert, eps, normalize=normalize, scale=scale, soft=differentiable_topk)

    valid = torch.ones(z.shape[:-1], dtype=torch.bool, device=z.device) if token_mask is None else token_mask
    share = p if score == "softmax" else p / p.sum(-1, keepdim=True).clamp(min=eps)
    importance = torch.where(valid.unsqueeze(-1), share, 0).sum(-2) / valid.sum(-1, keepdim=True).clamp(min=1)
    counts = count(expert, num_gates, valid.unsqueeze(-1), balance_ranks)

    def mean(t: Tensor) -> Tensor:
        return torch.where(valid, t, 0).sum() / valid.sum().clamp(min=1)

    with torch.no_grad():
        largest = torch.where(valid.unsqueeze(-1), z, 0).abs().flatten()
        logit_max = largest.amax() if largest.numel() else largest.sum()
        statistics = torch.stack([mean(torch.special.entr(share).sum(-1)), logit_max, mean(z.square().mean(-1)).sqrt()])
    z_loss = mean(z.logsumexp(-1).square())
    return weight, expert.int(), importance, counts, balance(importance, counts), z_loss, statistics


def count(expert: Tensor, num_gates: int, counted: Tensor, balance_ranks: BalanceRanks = "first") -> Tensor:
    """How many of the ``counted`` pairs ``(…, n, k)``, of the first rank or of all, chose each expert: ``(…, e)`` int32."""
    ranks = expert.shape[-1] if balance_ranks == "all" else 1
    chosen = expert[..., :ranks].long()
    pairs = (chosen >= 0) & counted[..., :ranks]
    return (F.one_hot(chosen.clamp(min=0), num_gates) * pairs.unsqueeze(-1)).sum((-3, -2)).int()


def balance(importance: Tensor, counts: Tensor, counted: Tensor | None = None) -> Tensor:
    """Load-balancing loss ``e · mean over groups of Σ importance · counts / counted``; 0 where there are no groups.

    Both are ``(…, e)``; ``counted``, ``(…, 1)``, is by default the sum of a group's counts.
    """
    counted = counts.sum(-1, keepdim=True) if counted is None else counted
    product = importance * (counts / counted.clamp(min=1).to(importance.dtype))
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
    keys: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``kept weight, slot (…, n, k), source (…, e, C), demand (…, e), offsets (0,)``: threshold masking, then the slots.

    Without a capacity in the dropless layout, where the last three are ``source (R,), demand (e,), offsets (e,)``. An expert
    out of range is not routed. ``keys`` ``(…, n, k)`` give slots to the pairs of the largest keys, by default to the first.
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

    demand = pairs.sum((-3, -2))
    if keys is not None:
        pairs = pairs * has_largest(pairs, keys, capacity)
    earlier = pairs.cumsum(-3) - pairs
    routed_per_rank = pairs.sum(-3)  # (…, k, e)
    first = torch.zeros_like(routed_per_rank)
    for k in range(1, top_n):
        first[..., k, :] = (first[..., k - 1, :] + routed_per_rank[..., k - 1, :]).clamp(max=capacity)
    slot = ((earlier + first.unsqueeze(-3)) * pairs).sum(-1)
    held = (slot < capacity) & pairs.any(-1)
    slot = torch.where(held, slot, -2).where(routed, -1)

    kept = slot >= 0
    held = torch.where(kept, expert * capacity + slot, num_gates * capacity).flatten(-2)
    pair = torch.arange(n * top_n, device=weight.device).expand(*lead, -1)
    source = torch.full((*lead, num_gates * capacity + 1), -1, device=weight.device)
    source = source.scatter(-1, held, pair)[..., :-1].unflatten(-1, (num_gates, capacity))
    offsets = torch.empty(0, dtype=torch.int32, device=weight.device)
    return torch.where(kept, weight, 0), slot.int(), source.int(), demand.int(), offsets


def has_largest(pairs: Tensor, keys: Tensor, capacity: int) -> Tensor:
    """Which pairs' keys ``(…, n, k)`` are among the ``capacity`` largest of each expert: ``(…, n, k, e)``, of ``pairs``' shape.

    Of equal keys those of the lower rank, then of the earlier token. NaN is below all numbers.
    """
    ranks_first = keys.transpose(-1, -2).flatten(-2).unsqueeze(-1)  # in the order of slots: (…, k · n, 1)
    routed = pairs.transpose(-2, -3).flatten(-3, -2).bool()
    number = ranks_first.nan_to_num(-torch.inf, torch.inf, -torch.inf).expand(routed.shape)
    order = number.sort(dim=-2, descending=True, stable=True).indices
    for goes_last in (ranks_first.isnan().expand(routed.shape), ~routed):
        order = order.gather(-2, goes_last.gather(-2, order).int().sort(dim=-2, stable=True).indices)
    largest: Tensor = torch.zeros_like(routed).scatter(-2, order[..., :capacity, :], True)
    largest = largest.unflatten(-2, (keys.shape[-1], keys.shape[-2]))
    return largest.transpose(-2, -3)


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
    token_mask: Tensor | None = None,
    priority: Literal["weight"] | Tensor | None = None,
    straight_through: bool = True,
    balance_on: Literal["routed", "kept"] = "routed",
    balance_ranks: BalanceRanks = "first",
    balance_over: Literal["group", "batch"] = "group",
    counts: Tensor | None = None,
    stats: bool = False,
    **gate_options: Any,
) -> Routing:
    """All steps from logits ``(…, n, e)`` to a :class:`topn_gating.Routing`, in train mode; more options as of ``gate``."""
    *lead, n, num_gates = logits.shape
    gate_options |= {"top_n": top_n, "eps": eps, "balance_ranks": balance_ranks}
    weight, expert, importance, counted, balance_loss, z_loss, statistics = gate(logits, token_mask=token_mask, **gate_options)
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
        keys=weight.detach() if isinstance(priority, str) else priority,
    )
    if balance_over == "batch":
        tokens = counted.new_full(lead, n) if token_mask is None else token_mask.sum(-1)
        importance = (importance * tokens.unsqueeze(-1)).reshape(-1, num_gates).sum(0) / tokens.sum().clamp(min=1)
        counted = counted.reshape(-1, num_gates).sum(0)
        balance_loss = balance(importance, counted)
    if counts is not None:
        balance_loss = balance(importance, counts)
    if balance_on == "kept":
        held = count(expert, num_gates, slot >= 0, balance_ranks)
        held = held.reshape(-1, num_gates).sum(0) if balance_over == "batch" else held
        balance_loss = balance(importance, held, counted.sum(-1, keepdim=True))
    where = None if capacity is not None else offsets
    asked_for = statistics if stats else None
    return Routing(expert, kept, slot, source, demand, balance_loss, z_loss, straight_through, where, asked_for)


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
