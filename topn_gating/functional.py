"""From logits to a :class:`topn_gating.Routing`, and its two uses as functions.

Symbols in shapes: ``n`` tokens of a group, ``e`` experts, ``k`` ranks (``top_n``), ``C`` slots (capacity), ``R`` rows of all
experts in the dropless layout, ``d`` features; ``…`` are the groups.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from . import ops, reference
from .checks import (
    check_choice,
    check_chosen,
    check_count,
    check_generator,
    check_instance,
    check_logits,
    check_number,
    check_positive,
    check_tensor,
    check_threshold,
    threshold_per_rank,
)
from .dtypes import compute_dtype
from .routing import Routing

BalanceOn = Literal["routed", "kept"]
BALANCE_ON: tuple[BalanceOn, ...] = get_args(BalanceOn)


def expert_capacity(tokens: int, num_gates: int, capacity_factor: float, min_expert_capacity: int = 4) -> int:
    """Computes the slots of an expert for a group of ``tokens`` (GShard, arXiv 2006.16668), symbolic ones too."""
    share = torch.sym_int((tokens * capacity_factor) / num_gates)
    capacity: int = torch.sym_max(torch.sym_min(tokens, share), min_expert_capacity)
    return capacity


def route(
    logits: Tensor | None = None,
    top_n: int = 2,
    *,
    expert: Tensor | None = None,
    weight: Tensor | None = None,
    num_gates: int | None = None,
    capacity: int | None = None,
    capacity_factor: float | None = None,
    min_expert_capacity: int | None = None,
    dropless: bool = False,
    align: int = 1,
    policy: ops.Policy | None = None,
    threshold: float | Sequence[float] | Tensor = 0.2,
    eps: float = 1e-9,
    noise_gates: bool = False,
    noise_mult: float = 1.0,
    noise: Tensor | None = None,
    draws: Tensor | None = None,
    generator: torch.Generator | None = None,
    token_mask: Tensor | None = None,
    differentiable_topk: bool = False,
    differentiable_topk_fused: bool = True,
    straight_through: bool | None = None,
    balance_on: BalanceOn = "routed",
    losses: bool = True,
) -> Routing:
    """Routes tokens by their gate logits (GShard, arXiv 2006.16668; ST-MoE, arXiv 2202.08906), or to experts chosen elsewhere.

    Args:
        logits: ``(…, n, e)`` float32, float64, bfloat16 or float16. Half types are computed in float32.
        top_n: experts of a token, 1 to ``e``, which ``logits`` choose.
        expert: in place of ``logits``, the chosen experts ``(…, n, k)``, int32 or int64; -1 is a pair that is not routed. Both
            losses are 0. In a CUDA tensor, which is not read back, any other index out of range is not routed either.
        weight: beside ``expert``, the weights ``(…, n, k)``, which keep their gradient. They are read in float32 (float64 for
            float64), and not normalised.
        num_gates: beside ``expert``, the number of experts.
        capacity: slots ``C`` of an expert in a group; by default from ``capacity_factor`` and ``min_expert_capacity``.
        capacity_factor: slots an expert has over the tokens it would get if all experts got the same, for one rank; by default
            1.25.
        min_expert_capacity: the least that ``capacity_factor`` gives, by default 4.
        dropless: the dropless layout (MegaBlocks, arXiv 2211.15841): no capacity, and no pair is dropped (:class:`Routing`).
        align: divisor of each expert's number of rows when dropless: grouped products of 8-bit types ask for 16 to 128.
        policy: which ranks after the first are routed. ``"random"``: those with ``draws < weight / threshold``;
            ``"threshold"``: those with ``weight > threshold``; ``"all"``; ``"none"``. By default ``"random"`` with logits and a
            capacity, or where draws are given; else ``"all"``.
        threshold: a float, one float per rank from rank 1 on, or a tensor of shape ``(top_n,)`` whose first entry is not read.
            In a CUDA tensor, which is not read back, NaN routes nothing.
        eps: least denominator of the weights and thresholds.
        noise_gates: adds Gumbel noise to the logits.
        noise_mult: its factor.
        noise: the uniform numbers in [0, 1) behind the Gumbel noise, shaped as ``logits``, float32 (float64 for float64
            logits); drawn by default. Given, it implies ``noise_gates``.
        draws: the uniform numbers of ``policy="random"``, ``(…, n, k)``, same type; drawn by default, after the noise.
        generator: draws both; by default torch's own of the logits' device.
        token_mask: ``(…, n)`` bool, True where the token is real. Others get no slot and add to no loss.
        differentiable_topk: weights from the soft top-n (arXiv 1502.04759) in place of the gates.
        differentiable_topk_fused: the soft top-n in one kernel; False composes it of torch operations.
        straight_through: gives the dispatch tensor's gradient to the weights; by default with logits alone.
        balance_on: ``"routed"``: ``balance_loss`` counts tokens before the capacity drop; ``"kept"``: after, as
            st-moe-pytorch and zeta do. Dropless, both are the same.
        losses: False gives zeros for both losses, as evaluation does.

    Returns:
        A :class:`Routing`, which has first derivatives by reverse mode alone.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument has the wrong value, shape or device.
    """
    if policy is None:
        policy = "all" if draws is None and (dropless or logits is None) else "random"
    check_choice("policy", policy, ops.POLICIES)
    check_choice("balance_on", balance_on, BALANCE_ON)
    eps, noise_mult = check_positive("eps", eps), check_number("noise_mult", noise_mult)
    if logits is not None:
        for name, given in (("expert", expert), ("weight", weight), ("num_gates", num_gates)):
            if given is not None:
                raise ValueError(f"{name} must be None beside logits, which choose the experts and their weights")
        top_n = check_logits(logits, top_n)
        *lead, n, num_gates = logits.shape
        dtype, device = compute_dtype(logits.dtype), logits.device
    else:
        for name, given in (("noise_gates", noise_gates), ("noise", noise), ("differentiable_topk", differentiable_topk)):
            if given is not None and given is not False:
                raise ValueError(f"{name} must be left out without logits, which alone it changes")
        chosen, weights, num_gates = check_chosen(expert, weight, num_gates)
        *lead, n, top_n = chosen.shape
        dtype, device = weights.dtype, weights.device
    capacity = _capacity(n, num_gates, dropless, capacity, capacity_factor, min_expert_capacity)
    align = check_count("align", align)
    if align != 1 and not dropless:
        raise ValueError(f"align must be 1 unless dropless, got {align}")
    if token_mask is not None:
        check_tensor("token_mask", token_mask, (*lead, n), torch.bool, device)
    check_generator(generator, device)

    if noise is not None:
        check_tensor("noise", noise, (*lead, n, num_gates), dtype, device)
    if draws is not None:
        check_tensor("draws", draws, (*lead, n, top_n), dtype, device)
    least = _threshold_tensor(threshold, top_n, num_gates, dtype, device) if policy in ("random", "threshold") else None
    if noise is None and noise_gates:
        noise = _uniform((*lead, n, num_gates), generator, dtype, device)
    if policy != "random":
        draws = None
    elif draws is None:
        draws = _uniform((*lead, n, top_n), generator, dtype, device)

    if logits is not None:
        fused = differentiable_topk and differentiable_topk_fused
        options = ops.GateOptions(eps, noise_mult, fused, normalize=top_n > 1)
        weights, chosen, importance, counts, balance_loss, router_z_loss, _ = ops.Gate.call(
            logits, noise, token_mask, None, None, top_n, *options, losses, False
        )
        if differentiable_topk and not fused:
            gates = reference.scores(logits, noise, noise_mult).softmax(-1)
            weights = reference.topn_weight(gates, chosen, eps, normalize=top_n > 1, soft=True)
    else:
        balance_loss, router_z_loss = torch.zeros(2, dtype=dtype, device=device).unbind()
    kept, slot, source, demand, offsets = ops.Assign.call(
        weights, chosen, draws, least, token_mask, num_gates, capacity, align, ops.POLICIES.index(policy), eps
    )
    if logits is not None and losses and balance_on == "kept" and not dropless:
        balance_loss = _balance_on_kept(importance, source, top_n, counts)
    if straight_through is None:
        straight_through = logits is not None
    where = offsets if dropless else None
    return Routing(chosen, kept, slot, source, demand, balance_loss, router_z_loss, straight_through, where)


def dispatch(x: Tensor, routing: Routing) -> Tensor:
    """``routing.dispatch(x)``: see :meth:`Routing.dispatch`."""
    check_instance("routing", routing, Routing, "topn_gating.Routing")
    return routing.dispatch(x)


def combine(y: Tensor, routing: Routing) -> Tensor:
    """``routing.combine(y)``: see :meth:`Routing.combine`."""
    check_instance("routing", routing, Routing, "topn_gating.Routing")
    return routing.combine(y)


def _capacity(
    n: int,
    num_gates: int,
    dropless: bool,
    capacity: int | None,
    capacity_factor: float | None,
    min_expert_capacity: int | None,
) -> int | None:
    """Slots of an expert for a group of ``n`` tokens, None when dropless."""
    if dropless:
        options = {"capacity": capacity, "capacity_factor": capacity_factor, "min_expert_capacity": min_expert_capacity}
        for name, given in options.items():
            if given is not None:
                raise ValueError(f"{name} must be left out when dropless, where nothing is dropped, got {given}")
        return None
    if capacity is not None:
        return check_count("capacity", capacity)
    factor = check_positive("capacity_factor", 1.25 if capacity_factor is None else capacity_factor)
    least = check_count("min_expert_capacity", 4 if min_expert_capacity is None else min_expert_capacity)
    return expert_capacity(n, num_gates, factor, least)


def _balance_on_kept(importance: Tensor, source: Tensor, top_n: int, counts: Tensor) -> Tensor:
    kept = ((source >= 0) & (source % top_n == 0)).sum(-1)  # rank-0 pairs that hold a slot of the expert
    return reference.balance(importance, kept, counts.sum(-1, keepdim=True))


def _uniform(shape: Sequence[int], generator: torch.Generator | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    if generator is None:  # with symbolic sizes torch.compile cannot trace `generator=None`
        return torch.rand(shape, dtype=dtype, device=device)
    return torch.rand(shape, generator=generator, dtype=dtype, device=device)


def _threshold_tensor(
    threshold: float | Sequence[float] | Tensor, top_n: int, num_gates: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    if isinstance(threshold, Tensor):
        check_threshold(threshold, top_n, device)
        return threshold.detach().to(dtype)
    per_rank = threshold_per_rank("threshold", threshold, top_n, num_gates)
    # Filled on the device: a tensor built from a list would wait for its copy there. The first entry is not read.
    if not isinstance(threshold, Sequence):
        return torch.full((top_n,), float(threshold), dtype=dtype, device=device)
    return torch.cat([torch.full((1,), t, dtype=dtype, device=device) for t in (0.0, *per_rank)])
