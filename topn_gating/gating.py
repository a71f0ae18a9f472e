"""The gating module, drop-in for ``zeta.nn.TopNGating`` and ``st_moe_pytorch.TopNGating``."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .checks import (
    check_choice,
    check_count,
    check_dtype,
    check_groups,
    check_positive,
    check_priority,
    check_score,
    check_tokens,
    check_top_n,
    threshold_per_rank,
)
from .dtypes import without_autocast
from .functional import BALANCE_ON, BALANCE_OVER, BALANCE_RANKS, BalanceOn, BalanceOver, expert_capacity, route
from .linear import GateLinear
from .ops import POLICIES, GroupScore, Policy, Score
from .reference import BalanceRanks
from .routing import Routing


class TopNGating(nn.Module):
    r"""Sends each token to its best ``top_n`` experts.

    ``forward`` returns the dense tensors that the peers return; :meth:`route` returns the same decision in the compact
    form (:class:`topn_gating.Routing`), at linear cost: train on that.

    Args:
        dim: features of a token.
        num_gates: number of experts.
        eps: least denominator of weights and thresholds.
        top_n: experts of a token, 1 to ``num_gates``. With 1 the weight is the raw probability (Switch Transformer,
            arXiv 2101.03961).
        threshold_train: rank ``k ≥ 1`` is routed with probability ``min(1, weight_k / threshold)``; a float, or one float
            per rank from rank 1 on (a longer tuple is cut).
        threshold_eval: the same in eval mode.
        capacity_factor_train: an expert has ``n · factor / num_gates`` slots for a group of ``n`` tokens.
        capacity_factor_eval: the same in eval mode.
        straight_through_dispatch_tensor: the dispatch tensor passes its gradient on to the weights.
        differentiable_topk: weights from a soft top-n by coordinate descent (arXiv 1502.04759, as CoLT5 uses it,
            arXiv 2303.09752).
        differentiable_topk_fused: computes it in one kernel; False composes it of torch operations. Same numbers.
        min_expert_capacity: the least number of slots.
        dropless: the dropless layout (MegaBlocks, arXiv 2211.15841), where no token is dropped and nothing has a capacity
            (:class:`topn_gating.Routing`). It has no dense form: :meth:`route` alone gives it.
        align: divisor of each expert's number of rows when dropless.
        max_tokens: the most tokens of a group. Experts have the slots of that many, so that buffers have one shape whatever the
            number of tokens, as ranks that share experts need; by default those of the group's own number.
        score: the gates of the logits, see :func:`topn_gating.route`, as the next five.
        select_bias: gives the module a float32 buffer ``select_bias`` ``(num_gates,)``, added to the gates for the choice of
            the experts alone, which stays float32 whatever the module is converted to.
            :func:`topn_gating.update_select_bias_` moves it. Without it there is no such entry in the ``state_dict``.
        groups: number of groups of experts.
        top_groups: number of groups that are open to a token.
        group_score: what decides which.
        normalize: divides a token's weights by their sum; by default unless ``top_n`` is 1.
        scale: factor of the weights.
        bias: gives ``to_gates`` a bias (gpt-oss).
        policy_train: ``"random"`` (as above), ``"threshold"`` (``weight_k > threshold``), ``"all"`` or ``"none"``; by default
            ``"random"``, or ``"all"`` when dropless.
        policy_eval: the same in eval mode.
        priority: ``"weight"``: the pairs with the largest weights hold the slots of an expert that has too few; by default the
            first, by rank and then by token.
        balance_on: ``"routed"``: the balance loss counts tokens before the capacity drop; ``"kept"``: after it, as the
            peers do.
        balance_ranks: ``"first"``: it counts the pairs of rank 0; ``"all"``: those of all ranks.
        balance_over: ``"group"``: the mean of one loss for each group; ``"batch"``: all tokens are one group.
        stats: computes what :meth:`topn_gating.Routing.stats` returns.
        router_dtype: type of the gate's matrix product and of the logits, with autocast off; None leaves it to torch's rules.
            It belongs to the :class:`topn_gating.linear.GateLinear` that the constructor makes, wherever that stands: behind
            hooks or a parametrisation, or inside a wrapper as of LoRA. Any other module in the place of ``to_gates`` is called
            with autocast off on an ``x`` of its first parameter's type, computes as it does, and its logits are converted.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument has a value out of its range.

    Example::

        >>> gate = TopNGating(dim=512, num_gates=16, top_n=2)
        >>> x = torch.randn(4, 1024, 512)
        >>> dispatch, combine, balance_loss, router_z_loss = gate(x)  # dense, as the peers
        >>> routing = gate.route(x)                                   # compact
        >>> expert_inputs = topn_gating.dispatch(x, routing)          # (4, 16, capacity, 512)
        >>> y = topn_gating.combine(expert_inputs, routing)           # (4, 1024, 512)
    """

    threshold_train: Tensor
    threshold_eval: Tensor
    select_bias: Tensor | None

    def __init__(
        self,
        dim: int,
        num_gates: int,
        eps: float = 1e-9,
        top_n: int = 2,
        threshold_train: float | Sequence[float] = 0.2,
        threshold_eval: float | Sequence[float] = 0.2,
        capacity_factor_train: float = 1.25,
        capacity_factor_eval: float = 2.0,
        straight_through_dispatch_tensor: bool = True,
        differentiable_topk: bool = False,
        differentiable_topk_fused: bool = True,
        min_expert_capacity: int = 4,
        *,
        dropless: bool = False,
        align: int = 1,
        max_tokens: int | None = None,
        score: Score = "softmax",
        select_bias: bool = False,
        groups: int | None = None,
        top_groups: int | None = None,
        group_score: GroupScore = "top2",
        normalize: bool | None = None,
        scale: float = 1.0,
        bias: bool = False,
        policy_train: Policy | None = None,
        policy_eval: Policy | None = None,
        priority: Literal["weight"] | None = None,
        balance_on: BalanceOn = "routed",
        balance_ranks: BalanceRanks = "first",
        balance_over: BalanceOver = "group",
        stats: bool = False,
        router_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        default: Policy = "all" if dropless else "random"
        policy_train = default if policy_train is None else policy_train
        policy_eval = default if policy_eval is None else policy_eval
        check_choice("policy_train", policy_train, POLICIES)
        check_choice("policy_eval", policy_eval, POLICIES)
        check_priority(priority, dropless)
        check_choice("balance_on", balance_on, BALANCE_ON)
        check_choice("balance_ranks", balance_ranks, BALANCE_RANKS)
        check_choice("balance_over", balance_over, BALANCE_OVER)
        check_score(score, differentiable_topk)
        check_dtype("router_dtype", router_dtype)

        self.dim = check_count("dim", dim)
        self.num_gates = check_count("num_gates", num_gates)
        self.eps = check_positive("eps", eps)
        self.top_n = check_top_n(top_n, self.num_gates)
        self.capacity_factor_train = check_positive("capacity_factor_train", capacity_factor_train)
        self.capacity_factor_eval = check_positive("capacity_factor_eval", capacity_factor_eval)
        self.straight_through_dispatch_tensor = straight_through_dispatch_tensor
        self.differentiable_topk = differentiable_topk
        self.differentiable_topk_fused = differentiable_topk_fused
        self.min_expert_capacity = check_count("min_expert_capacity", min_expert_capacity)
        self.dropless = dropless
        self.align = check_count("align", align)
        if self.align != 1 and not dropless:
            raise ValueError(f"align must be 1 unless dropless, got {align}")
        self.max_tokens = None if max_tokens is None else check_count("max_tokens", max_tokens)
        if self.max_tokens is not None and dropless:
            raise ValueError(f"max_tokens must be None when dropless, which has no capacity, got {max_tokens}")
        check_groups(self.num_gates, self.top_n, groups, top_groups, group_score)
        self.score = score
        self.groups = groups
        self.top_groups = top_groups
        self.group_score = group_score
        self.normalize = self.top_n > 1 if normalize is None else normalize
        self.scale = check_positive("scale", scale)
        self.policy_train = policy_train
        self.policy_eval = policy_eval
        self.priority = priority
        self.balance_on = balance_on
        self.balance_ranks = balance_ranks
        self.balance_over = balance_over
        self.stats = stats
        self.router_dtype = router_dtype
        self._thresholds = {
            "threshold_train": threshold_per_rank("threshold_train", threshold_train, self.top_n, self.num_gates),
            "threshold_eval": threshold_per_rank("threshold_eval", threshold_eval, self.top_n, self.num_gates),
        }

        self.to_gates: nn.Module = GateLinear(
            self.dim, self.num_gates, bias=bias, router_dtype=router_dtype, device=device, dtype=dtype
        )
        for name in self._thresholds:
            self.register_buffer(name, torch.empty(self.top_n, device=device, dtype=dtype))
        empty = torch.empty(self.num_gates, device=device, dtype=torch.float32)
        self.register_buffer("select_bias", empty if select_bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Writes the constructor's thresholds into their buffers, and zeros into the bias, for example after ``to_empty``.

        As torch expects of this method, it leaves the submodules alone: ``to_gates`` has one of its own.
        """
        with torch.no_grad():
            for name, per_rank in self._thresholds.items():
                self.get_buffer(name).copy_(torch.tensor([self.eps, *per_rank], dtype=torch.float64))
            if self.select_bias is not None:
                self.select_bias.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TopNGating":
        """Applies what ``to`` and its like do, but leaves ``select_bias`` in float32: half types would lose its small steps."""
        bias = self.select_bias
        super()._apply(fn, recurse)
        if bias is not None and self.select_bias is not None and self.select_bias.dtype != bias.dtype:
            self.select_bias = bias.to(self.select_bias.device)
        return self

    def extra_repr(self) -> str:
        """What ``repr`` shows between the parentheses."""
        options: dict[str, Any] = {"score": self.score, "scale": self.scale, "normalize": self.normalize}
        options |= {"priority": self.priority, "max_tokens": self.max_tokens}
        if self.groups is not None:
            options |= {"groups": self.groups, "top_groups": self.top_groups, "group_score": self.group_score}
        plain = {"score": "softmax", "scale": 1.0, "normalize": self.top_n > 1}
        shown = "".join(f", {name}={value}" for name, value in options.items() if plain.get(name) != value)
        factors = f"capacity_factor=({self.capacity_factor_train}, {self.capacity_factor_eval})"
        return (
            f"dim={self.dim}, num_gates={self.num_gates}, top_n={self.top_n}, "
            f"{f'dropless, align={self.align}' if self.dropless else factors}, "
            f"policy=({self.policy_train}, {self.policy_eval}){shown}"
        )

    def capacity(self, tokens: int) -> int | None:
        """Slots an expert has for a group of ``tokens``, in the module's present mode; None when dropless."""
        if self.dropless:
            return None
        if self.max_tokens is not None:
            if tokens > self.max_tokens:
                raise ValueError(f"x must have at most max_tokens={self.max_tokens} tokens in a group, got {tokens}")
            tokens = self.max_tokens
        factor = self.capacity_factor_train if self.training else self.capacity_factor_eval
        return expert_capacity(tokens, self.num_gates, factor, self.min_expert_capacity)

    def logits(self, x: Tensor) -> Tensor:
        """Gate logits ``(…, n, e)`` of tokens ``x`` ``(…, n, dim)``: those of ``to_gates``."""
        logits: Tensor
        if self.router_dtype is None or getattr(self.to_gates, "router_dtype", None) == self.router_dtype:
            logits = self.to_gates(x)
            return logits
        dtypes = (p.dtype for p in self.to_gates.parameters() if p.is_floating_point())
        with without_autocast(x.device):
            logits = self.to_gates(x.to(next(dtypes, self.router_dtype)))
        return logits.to(self.router_dtype)

    def route(
        self,
        x: Tensor,
        noise_gates: bool = False,
        noise_mult: float = 1.0,
        *,
        token_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        expert: Tensor | None = None,
        counts: Tensor | Callable[[Tensor], Tensor] | None = None,
        priority: Tensor | None = None,
    ) -> Routing:
        """The routing of tokens ``x``, in the compact form.

        A gate that FSDP2 shards apart from the module around it gathers its weight in ``forward`` alone:
        ``torch.distributed.fsdp.register_fsdp_forward_method(gate, "route")`` has it do so here.

        Args:
            x: ``(…, n, dim)``, any number of leading dimensions.
            noise_gates: adds Gumbel noise to the logits.
            noise_mult: its factor.
            token_mask: ``(…, n)`` bool, True where the token is real.
            generator: draws the random numbers, first the noise's, then the random policy's; by default torch's own.
            expert: ``(…, n, top_n)``, experts in place of those that the logits would choose, all of which are routed; see
                :func:`topn_gating.route`, as for the next.
            counts: how many pairs chose each expert, for the balance loss.
            priority: keys ``(…, n, top_n)`` in place of the module's ``priority``.

        Raises:
            TypeError: an argument is of the wrong type.
            ValueError: an argument has the wrong value, shape or device.
        """
        threshold = self.threshold_train if self.training else self.threshold_eval
        check_tokens(x, self.dim, threshold.device)
        return route(
            self.logits(x),
            self.top_n,
            expert=expert,
            capacity=self.capacity(x.shape[-2]),
            dropless=self.dropless,
            align=self.align,
            score=self.score,
            select_bias=self.select_bias,
            groups=self.groups,
            top_groups=self.top_groups,
            group_score=self.group_score,
            normalize=self.normalize,
            scale=self.scale,
            policy="all" if expert is not None else self.policy_train if self.training else self.policy_eval,
            threshold=threshold,
            priority=self.priority if priority is None else priority,
            eps=self.eps,
            noise_gates=noise_gates,
            noise_mult=noise_mult,
            token_mask=token_mask,
            generator=generator,
            differentiable_topk=self.differentiable_topk,
            differentiable_topk_fused=self.differentiable_topk_fused,
            straight_through=self.straight_through_dispatch_tensor,
            balance_on=self.balance_on,
            balance_ranks=self.balance_ranks,
            balance_over=self.balance_over,
            counts=counts,
            losses=self.training,
            stats=self.stats,
        )

    def forward(
        self,
        x: Tensor,
        noise_gates: bool = False,
        noise_mult: float = 1.0,
        *,
        token_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``dispatch, combine, balance_loss, router_z_loss`` of tokens ``x``; arguments as :meth:`route`.

        Returns:
            ``dispatch`` and ``combine``, ``(…, n, e, C)`` of x's type, and the two losses, ``()`` in float32 (float64 for
            float64), which are 0 in eval mode.

        Raises:
            ValueError: the module is dropless, which has no dense form; or as :meth:`route`.
            TypeError: as :meth:`route`.
        """
        if self.dropless:
            raise ValueError("forward() gives dense tensors, which a dropless module does not have: use route()")
        routing = self.route(x, noise_gates, noise_mult, token_mask=token_mask, generator=generator)
        dispatch, combine = routing.dense(x.dtype)
        return dispatch, combine, routing.balance_loss, routing.router_z_loss
