"""From logits to a :class:`topn_gating.Routing`, and its two uses as functions.

Symbols in shapes: ``n`` tokens of a group, ``e`` experts, ``k`` ranks (``top_n``), ``C`` slots (capacity), ``R`` rows of all
experts in the dropless layout, ``d`` features; ``…`` are the groups.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from . import ops, reference
from .checks import (
    check_choice,
    check_chosen,
    check_count,
    check_counts,
    check_expert,
    check_generator,
    check_groups,
    check_instance,
    check_logits,
    check_number,
    check_positive,
    check_priority,
    check_score,
    check_tensor,
    check_threshold,
    threshold_per_rank,
)
from .dtypes import compute_dtype
from .routing import Routing

BalanceOn = Literal["routed", "kept"]
BalanceOver = Literal["group", "batch"]
BALANCE_ON: tuple[BalanceOn, ...] = get_args(BalanceOn)
BALANCE_OVER: tuple[BalanceOver, ...] = get_args(BalanceOver)
BALANCE_RANKS: tuple[reference.BalanceRanks, ...] = get_args(reference.BalanceRanks)


def expert_capacity(tokens: int, num_gates: int, capacity_factor: float, min_expert_capacity: int = 4) -> int:
    """Computes the slots of an expert for a group of ``tokens`` (GShard, arXiv 2006.16668), symbolic ones too."""
    if isinstance(tokens, int):
        return max(min(tokens, int((tokens * capacity_factor) / num_gates)), min_expert_capacity)
    share = torch.sym_int((tokens * capacity_factor) / num_gates)  # a guard-free form for export
    capacity: int = torch.sym_max(torch.sym_min(tokens, share), min_expert_capacity)
    return capacity


def route(
    logits: Tensor | None = None,
    top_n: int | None = None,
    *,
    expert: Tensor | None = None,
    weight: Tensor | None = None,
    num_gates: int | None = None,
    capacity: int | None = None,
    capacity_factor: float | None = None,
    min_expert_capacity: int | None = None,
    dropless: bool = False,
    align: int = 1,
    score: ops.Score = "softmax",
    select_bias: Tensor | None = None,
    groups: int | None = None,
    top_groups: int | None = None,
    group_score: ops.GroupScore = "top2",
    normalize: bool | None = None,
    scale: float = 1.0,
    policy: ops.Policy | None = None,
    threshold: float | Sequence[float] | Tensor = 0.2,
    priority: Literal["weight"] | Tensor | None = None,
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
    balance_ranks: reference.BalanceRanks = "first",
    balance_over: BalanceOver = "group",
    counts: Tensor | Callable[[Tensor], Tensor] | None = None,
    losses: bool = True,
    stats: bool = False,
) -> Routing:
    """Routes tokens by their gate logits (GShard, arXiv 2006.16668; ST-MoE, arXiv 2202.08906), or to experts chosen elsewhere.

    Args:
        logits: ``(…, n, e)`` float32, float64, bfloat16 or float16. Half types are computed in float32.
        top_n: experts of a token, 1 to ``e``, by default 2, or as many as ``expert`` has.
        expert: the chosen experts ``(…, n, k)``, int32 or int64, in place of those that ``logits`` would choose: of a
            routing to replay (:attr:`Routing.chosen`), or of a hash. -1 is a pair that is not routed; its token's weights are
            normalised without it. In a CUDA tensor, which is not read back, any other index out of range is not routed
            either. Without ``logits`` both losses are 0.
        weight: beside ``expert``, without ``logits``, the weights ``(…, n, k)``, which keep their gradient. They are read in
            float32 (float64 for float64), and not normalised.
        num_gates: beside ``weight``, the number of experts.
        capacity: slots ``C`` of an expert in a group; by default from ``capacity_factor`` and ``min_expert_capacity``.
        capacity_factor: slots an expert has over the tokens it would get if all experts got the same, for one rank; by default
            1.25.
        min_expert_capacity: the least that ``capacity_factor`` gives, by default 4.
        dropless: the dropless layout (MegaBlocks, arXiv 2211.15841): no capacity, and no pair is dropped (:class:`Routing`).
        align: divisor of each expert's number of rows when dropless: grouped products of 8-bit types ask for 16 to 128.
        score: the gates of the logits: ``"softmax"``, ``"sigmoid"`` (DeepSeek-V3, arXiv 2412.19437) or ``"sqrtsoftplus"``, the
            square root of the softplus.
        select_bias: ``(e,)`` float32, added to the gates for the choice of the experts alone (loss-free balancing, arXiv
            2408.15664): no weight, loss or gradient depends on it.
        groups: number of equal groups of neighbouring experts, of which ``top_groups`` are open to a token (DeepSeek-V2, arXiv
            2405.04434); by default one.
        top_groups: number of open groups, those with the largest scores; by default all.
        group_score: ``"top2"``, the sum of a group's two largest gates with their bias, or ``"max"``, the largest.
        normalize: divides a token's weights by their sum; by default unless ``top_n`` is 1.
        scale: factor of the weights.
        policy: which ranks after the first are routed. ``"random"``: those with ``draws < weight / threshold``;
            ``"threshold"``: those with ``weight > threshold``; ``"all"``; ``"none"``. By default ``"random"`` where logits
            choose and there is a capacity, or where draws are given; else ``"all"``.
        threshold: a float, one float per rank from rank 1 on, or a tensor of shape ``(top_n,)`` whose first entry is not read.
            In a CUDA tensor, which is not read back, NaN routes nothing.
        priority: which pairs hold the slots of an expert that has too few for its routed pairs. By default the first, by rank
            and then by token (GShard); ``"weight"``: those with the largest weights, whatever their rank (the drop policy
            ``probs`` of Megatron-core and DeepSpeed); a tensor of keys ``(…, n, k)``, float32 (float64 for float64): those with
            the largest keys, which may be random for a random choice. Of equal keys the first win, and NaN loses to any
            number. Slots are counted in the order of ranks and tokens in any case.
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
        balance_ranks: the pairs that ``balance_loss`` counts: ``"first"``, those of rank 0 (GShard), or ``"all"``.
        balance_over: ``"group"``: ``balance_loss`` is the mean of one for each group; ``"batch"``: all tokens are one group.
        counts: for ``balance_loss``, how many pairs chose each expert, ``(…, e)`` or, for all groups alike, ``(e,)``, in place
            of those that are counted here: for example those of all ranks of a data-parallel group. Or a function that takes
            the counted ones, ``(…, e)``, or ``(e,)`` over the batch, and returns them: one that adds them up over the ranks.
        losses: False gives zeros for both losses, as evaluation does.
        stats: computes what :meth:`Routing.stats` returns.

    Returns:
        A :class:`Routing`, which has first derivatives by reverse mode alone.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument has the wrong value, shape or device.
    """
    if policy is None:
        policy = "all" if draws is None and (dropless or expert is not None) else "random"
    check_choice("policy", policy, ops.POLICIES)
    check_choice("balance_on", balance_on, BALANCE_ON)
    check_choice("balance_ranks", balance_ranks, BALANCE_RANKS)
    check_choice("balance_over", balance_over, BALANCE_OVER)
    eps, noise_mult = check_positive("eps", eps), check_number("noise_mult", noise_mult)
    chosen: Any = None
    if logits is not None:
        for name, given in (("weight", weight), ("num_gates", num_gates)):
            if given is not None:
                raise ValueError(f"{name} must be None beside logits, which give the weights")
        top_n = check_logits(logits, top_n, expert)
        *lead, n, num_gates = logits.shape
        dtype, device = compute_dtype(logits.dtype), logits.device
        if expert is not None:
            chosen = check_expert(expert, num_gates, (*lead, n, top_n), device)
        check_score(score, differentiable_topk)
        expert_groups, open_groups = check_groups(num_gates, top_n, groups, top_groups, group_score)
        scale = check_positive("scale", scale)
        if select_bias is not None:
            check_tensor("select_bias", select_bias, (num_gates,), torch.float32, device)
        if counts is not None:
            check_counts(counts, (num_gates,) if balance_over == "batch" else (*lead, num_gates), device, balance_on)
    else:
        of_logits = {
            **{"score": None if score == "softmax" else score, "select_bias": select_bias, "groups": groups},
            **{"top_groups": top_groups, "normalize": normalize, "scale": None if scale == 1 else scale, "counts": counts},
            **{"noise_gates": noise_gates or None, "noise": noise, "stats": stats or None},
            **{"differentiable_topk": differentiable_topk or None},
        }
        for name, option in of_logits.items():
            if option is not None:
                raise ValueError(f"{name} must be left out without logits, which alone it changes")
        chosen, weights, num_gates = check_chosen(expert, weight, num_gates, top_n)
        *lead, n, top_n = chosen.shape
        dtype, device = weights.dtype, weights.device
    capacity = _capacity(n, num_gates, dropless, capacity, capacity_factor, min_expert_capacity)
    align = check_count("align", align)
    if align != 1 and not dropless:
        raise ValueError(f"align must be 1 unless dropless, got {align}")
    if token_mask is not None:
        check_tensor("token_mask", token_mask, (*lead, n), torch.bool, device)
    check_priority(priority, dropless, (*lead, n, top_n), dtype, device)
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

    statistics = None
    if logits is not None:
        options = ops.GateOptions(
            eps,
            noise_mult,
            differentiable_topk and differentiable_topk_fused,
            ops.SCORES.index(score),
            expert_groups,
            open_groups,
            ops.GROUP_SCORES.index(group_score),
            top_n > 1 if normalize is None else normalize,
            scale,
            balance_ranks == "all",
        )
        inputs: list[Tensor | None] = [logits, noise, token_mask, chosen]
        if balance_over == "batch":
            inputs = [_one_group(t) for t in inputs]
        weights, chosen, importance, counted, balance_loss, router_z_loss, statistics = ops.Gate.call(
            *inputs[:3], select_bias, inputs[3], top_n, *options, losses, stats
        )
        if balance_over == "batch":
            weights, chosen = weights.view(*lead, n, top_n), chosen.view(*lead, n, top_n)
        if differentiable_topk and not differentiable_topk_fused:
            gates = reference.scores(logits, noise, noise_mult).softmax(-1)
            weights = reference.topn_weight(gates, chosen, eps, normalize=options.normalize, scale=scale, soft=True)
    else:
        balance_loss, router_z_loss = torch.zeros(2, dtype=dtype, device=device).unbind()
    keys = weights if isinstance(priority, str) else priority
    kept, slot, source, demand, offsets = ops.Assign.call(
        weights, chosen, draws, least, token_mask, keys, num_gates, capacity, align, ops.POLICIES.index(policy), eps
    )
    if logits is not None and losses:
        if counts is not None:
            balance_loss = reference.balance(importance, counts(counted) if callable(counts) else counts)
        elif balance_on == "kept" and not dropless:
            held = _held(source, top_n if balance_ranks == "first" else 1)
            held = held.reshape(-1, num_gates).sum(0) if balance_over == "batch" else held
            balance_loss = reference.balance(importance, held, counted.sum(-1, keepdim=True))
    if straight_through is None:
        straight_through = logits is not None
    where = offsets if dropless else None
    statistics = statistics if stats else None
    return Routing(chosen, kept, slot, source, demand, balance_loss, router_z_loss, straight_through, where, statistics)


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


def _one_group(t: Tensor | None) -> Tensor | None:
    """A tensor ``(…, n, k)``, or a mask ``(…, n)``, of all tokens in one group."""
    if t is None:
        return None
    return t.reshape(-1) if t.dtype == torch.bool else t.reshape(-1, t.shape[-1])


def _held(source: Tensor, every: int) -> Tensor:
    """How many pairs hold a slot of each expert ``(…, e)``, of ``source`` ``(…, e, C)``: all, or each ``every``-th."""
    return ((source >= 0) & (source % every == 0)).sum(-1)


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
