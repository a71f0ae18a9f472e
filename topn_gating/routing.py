"""The compact form of a routing decision, and the three functions that make it and use it.

``Routing`` carries in ``O(n·k)`` numbers what the dense ``(…, n, e, C)`` tensors carry in ``O(n²)``. Symbols in shapes: ``n``
tokens of a group, ``e`` experts, ``k`` ranks (``top_n``), ``C`` slots (capacity), ``d`` features; ``…`` are the groups.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .checks import (
    check_choice,
    check_count,
    check_logits,
    check_positive,
    check_rows,
    check_tensor,
    threshold_per_rank,
)
from .dtypes import autocast, compute_dtype

BALANCE_ON = ("routed", "kept")


class Routing(NamedTuple):
    """Which tokens go to which slots of which experts, and with what weight.

    A ``NamedTuple``, so that pytrees, ``torch.compile`` and activation checkpointing take it as it is.

    Attributes:
        expert: ``(…, n, k)`` int32, the chosen experts, best first.
        weight: ``(…, n, k)`` float32 (float64 for float64 logits), 0 where no slot is held. Differentiable.
        slot: ``(…, n, k)`` int32, the slot in the expert's buffer; -1 below the threshold (or padding), -2 over capacity.
        source: ``(…, e, C)`` int32, the inverse: ``token * top_n + rank`` of the pair in the slot, -1 where empty.
        demand: ``(…, e)`` int32, pairs routed to the expert before the capacity drop.
        balance_loss: ``()``, the load-balancing loss (SPEC step 10; GShard, arXiv 2006.16668). Differentiable.
        router_z_loss: ``()``, the router z-loss (ST-MoE, arXiv 2202.08906). Differentiable.
        straight_through: whether :func:`dispatch` and :meth:`dense` pass the dispatch gradient on to ``weight``.
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

    def dense(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """The dense form: ``dispatch`` and ``combine``, both ``(…, n, e, C)`` (SPEC step 9).

        Args:
            dtype: type of both, by default that of ``weight``.
        """
        dtype = dtype or self.weight.dtype
        num_gates, capacity = self.source.shape[-2:]
        weight = self.weight.to(compute_dtype(dtype))
        return ops.Dense.call(weight, self.expert, self.slot, num_gates, capacity, dtype, self.straight_through)

    def __repr__(self) -> str:
        (*groups, tokens, top_n), (num_gates, capacity) = self.expert.shape, self.source.shape[-2:]
        what = f"groups={tuple(groups)}, tokens={tokens}, experts={num_gates}, top_n={top_n}, capacity={capacity}"
        if type(self.demand) is Tensor and self.demand.device.type == "cpu":
            what += f", dropped={100 * self.drop_fraction.item():.1f}%"
        return f"Routing({what}, dtype={self.weight.dtype}, device='{self.weight.device}')"


def expert_capacity(tokens: int, num_gates: int, capacity_factor: float, min_expert_capacity: int = 4) -> int:
    """Slots an expert has for a group of ``tokens`` (SPEC step 1). Takes and gives symbolic sizes, too."""
    share = torch.sym_int((tokens * capacity_factor) / num_gates)
    return torch.sym_max(torch.sym_min(tokens, share), min_expert_capacity)


def route(
    logits: Tensor,
    top_n: int = 2,
    *,
    capacity: int | None = None,
    capacity_factor: float = 1.25,
    min_expert_capacity: int = 4,
    policy: str = "random",
    threshold: float | tuple[float, ...] | Tensor = 0.2,
    eps: float = 1e-9,
    noise_gates: bool = False,
    noise_mult: float = 1.0,
    noise: Tensor | None = None,
    draws: Tensor | None = None,
    token_mask: Tensor | None = None,
    differentiable_topk: bool = False,
    differentiable_topk_fused: bool = True,
    straight_through: bool = True,
    balance_on: str = "routed",
    losses: bool = True,
) -> Routing:
    """Routes tokens by their gate logits (SPEC steps 3 to 8 and 10).

    Args:
        logits: ``(…, n, e)`` float32, float64, bfloat16 or float16. Half types are computed in float32.
        top_n: experts of a token, 1 to ``e``.
        capacity: slots ``C`` of an expert in a group; by default from ``capacity_factor`` and ``min_expert_capacity``.
        capacity_factor: slots an expert has over the tokens it would get if all experts got the same, for one rank.
        min_expert_capacity: the least that ``capacity_factor`` gives.
        policy: which ranks after the first are routed. ``"random"``: those with ``draws < weight / threshold``;
            ``"threshold"``: those with ``weight > threshold``; ``"all"``; ``"none"``.
        threshold: a float, one float per rank from rank 1 on, or a tensor of shape ``(top_n,)`` whose first entry is not read.
        eps: least denominator of the weights and thresholds.
        noise_gates: adds Gumbel noise to the logits.
        noise_mult: its factor.
        noise: the uniform numbers in [0, 1) behind the Gumbel noise, shaped as ``logits``, float32 (float64 for float64
            logits); drawn by default. Given, it implies ``noise_gates``.
        draws: the uniform numbers of ``policy="random"``, ``(…, n, k)``, same type; drawn by default.
        token_mask: ``(…, n)`` bool, True where the token is real. Others take no slot and add to no loss.
        differentiable_topk: weights from the soft top-n (arXiv 1502.04759) in place of the gates.
        differentiable_topk_fused: the soft top-n in one kernel; False composes it of torch operations.
        straight_through: gives the dispatch tensor's gradient to the weights.
        balance_on: ``"routed"``: ``balance_loss`` counts tokens before the capacity drop; ``"kept"``: after, as
            st-moe-pytorch and zeta do.
        losses: False gives zeros for both losses, as evaluation does.

    Returns:
        A :class:`Routing`.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument has the wrong value, shape or device.
    """
    check_logits(logits, top_n)
    check_choice("policy", policy, ops.POLICIES)
    check_choice("balance_on", balance_on, BALANCE_ON)
    check_positive("eps", eps)
    *lead, n, num_gates = logits.shape
    real = compute_dtype(logits.dtype)
    if capacity is None:
        check_positive("capacity_factor", capacity_factor)
        check_count("min_expert_capacity", min_expert_capacity)
        capacity = expert_capacity(n, num_gates, capacity_factor, min_expert_capacity)
    else:
        check_count("capacity", capacity)
    if token_mask is not None:
        check_tensor("token_mask", token_mask, (*lead, n), torch.bool, logits.device)

    if noise is not None:
        check_tensor("noise", noise, logits.shape, real, logits.device)
    elif noise_gates:
        noise = torch.rand(logits.shape, dtype=real, device=logits.device)
    if draws is not None:
        check_tensor("draws", draws, (*lead, n, top_n), real, logits.device)
    elif policy == "random":
        draws = torch.rand((*lead, n, top_n), dtype=real, device=logits.device)
    if policy in ("random", "threshold"):
        threshold = _threshold_tensor(threshold, top_n, num_gates, real, logits.device)
    else:
        threshold = None

    fused = differentiable_topk and differentiable_topk_fused
    weight, expert, importance, _, balance_loss, router_z_loss = ops.Gate.call(
        logits, noise, token_mask, top_n, eps, noise_mult, fused, losses
    )
    if differentiable_topk and not fused:
        weight = _composed_soft_weight(logits, noise, noise_mult, expert, eps)
    kept, slot, source, demand = ops.Assign.call(
        weight,
        expert,
        draws if policy == "random" else None,
        threshold,
        token_mask,
        num_gates,
        capacity,
        ops.POLICIES.index(policy),
        eps,
    )
    if losses and balance_on == "kept":
        balance_loss = _balance_on_kept(importance, source, top_n, n, token_mask)
    return Routing(expert, kept, slot, source, demand, balance_loss, router_z_loss, straight_through)


def dispatch(x: Tensor, routing: Routing) -> Tensor:
    """Copies token rows into the expert buffers, ``einsum('…nd,…nec->…ecd', x, dispatch)`` at ``O(n·k·d)``.

    Args:
        x: ``(…, n, d)`` floating point. Under autocast it is read in the autocast type, as the einsum would.
        routing: of the same groups and tokens.

    Returns:
        ``(…, e, C, d)`` of x's type; rows of empty slots are 0.
    """
    check_rows("x", x, routing.expert.shape[:-1], routing.expert.device)
    x = autocast(x)
    weight = routing.weight.to(compute_dtype(x.dtype))
    return ops.Dispatch.call(x, weight, routing.expert, routing.slot, routing.source, routing.straight_through)


def combine(y: Tensor, routing: Routing) -> Tensor:
    """Brings expert outputs back to their tokens, ``einsum('…ecd,…nec->…nd', y, combine)`` at ``O(n·k·d)``.

    Args:
        y: ``(…, e, C, d)`` floating point. Under autocast it is read in the autocast type, as the einsum would.
        routing: of the same groups, experts and slots.

    Returns:
        ``(…, n, d)`` of y's type: for each token the weighted sum over its experts, 0 where it was dropped by all.
    """
    check_rows("y", y, routing.source.shape, routing.source.device)
    y = autocast(y)
    weight = routing.weight.to(compute_dtype(y.dtype))
    return ops.Combine.call(y, weight, routing.expert, routing.slot, routing.source)


def _composed_soft_weight(logits: Tensor, noise: Tensor | None, noise_mult: float, expert: Tensor, eps: float) -> Tensor:
    from .reference import gumbel, topn_weight  # here, since the reference builds on Routing

    scores = logits.to(compute_dtype(logits.dtype))
    if noise is not None:
        scores = scores + noise_mult * gumbel(noise)
    return topn_weight(scores.softmax(-1), expert, eps, soft=True)


def _balance_on_kept(importance: Tensor, source: Tensor, top_n: int, n: int, token_mask: Tensor | None) -> Tensor:
    kept = ((source >= 0) & (source % top_n == 0)).sum(-1)  # rank-0 pairs that hold a slot of the expert
    tokens = n if token_mask is None else token_mask.sum(-1, keepdim=True)
    product = importance * kept / (max(tokens, 1) if token_mask is None else tokens.clamp(min=1))
    return product.sum() * (product.shape[-1] ** 2 / max(product.numel(), 1))


def _threshold_tensor(
    threshold: float | tuple[float, ...] | Tensor, top_n: int, num_gates: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    if isinstance(threshold, Tensor):
        if threshold.shape != (top_n,) or not threshold.is_floating_point():
            got = f"{tuple(threshold.shape)} {threshold.dtype}"
            raise ValueError(f"threshold must be a tensor of shape ({top_n},) and a float type, got {got}")
        if threshold.device != device:
            raise ValueError(f"threshold must be on {device}, got {threshold.device}")
        return threshold.detach().to(dtype)
    per_rank = threshold_per_rank("threshold", threshold, top_n, num_gates)
    # Filled on the device: a tensor made of a list would wait for its copy there.
    return torch.cat([torch.full((1,), t, dtype=dtype, device=device) for t in (0.0, *per_rank)])
