"""A Mixture-of-Experts layer on the compact form, with the names of ``st_moe_pytorch.MoE``."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .checks import check_count, check_instance
from .experts import Experts, FeedForwards
from .gating import TopNGating
from .statistics import RoutingStats


class MixtureOfExpertsReturn(NamedTuple):
    """What :class:`MoE` returns: ``outputs`` ``(…, n, dim)`` and three scalars."""

    outputs: Tensor
    total_aux_loss: Tensor
    balance_loss: Tensor
    router_z_loss: Tensor


class MoE(nn.Module):
    r"""Mixture of Experts: gate, experts, and the two losses, through the compact path.

    With ``dropless=True`` every routed pair is computed, whatever the load of its expert (MegaBlocks, arXiv 2211.15841).
    Without it, each expert has the buffers of its capacity in each group (GShard, arXiv 2006.16668), and pairs over capacity
    are dropped. On the CPU the built-in experts multiply no row that no pair holds, in either case. On other devices, and by
    modules of yours, buffers are multiplied whole.

    Args:
        dim: features of a token.
        num_experts: number of experts.
        expert_hidden_mult: hidden size of the built-in experts over ``dim``, before the gated unit's 2/3.
        threshold_train: see :class:`TopNGating`, as the next three.
        threshold_eval: in eval mode.
        capacity_factor_train: in train mode.
        capacity_factor_eval: in eval mode.
        gating_top_n: experts of a token.
        balance_loss_coef: weight of ``balance_loss`` in ``total_aux_loss``.
        router_z_loss_coef: weight of ``router_z_loss`` in ``total_aux_loss``.
        experts: :class:`Experts`, which is the default, :class:`GLUExperts`, or a module of yours from buffers
            ``(…, e, C, dim)`` to the same; a dropless layer calls it with rows ``(R, dim)`` and :attr:`Routing.offsets`, and
            takes ``(R, dim)``.
        straight_through_dispatch_tensor: see :class:`TopNGating`, as all that follow.
        differentiable_topk: weights from the soft top-n.
        differentiable_topk_fused: in one kernel.
        dropless: no capacity, and no pair is dropped.
        shared_experts: a module from ``(…, n, dim)`` to the same, whose output is added: experts of every token (DeepSeekMoE,
            arXiv 2401.06066).
        device: of the parameters.
        dtype: of the parameters.
        gate_options: any other keyword of :class:`TopNGating`, for example ``score``.

    Attributes:
        stats: with the gate's option ``stats``, the :class:`RoutingStats` of the last forward pass; else None.

    Example::

        >>> moe = MoE(dim=512, num_experts=16, dropless=True)
        >>> outputs, total_aux_loss, balance_loss, router_z_loss = moe(torch.randn(4, 1024, 512))
    """

    def __init__(
        self,
        dim: int,
        num_experts: int = 16,
        expert_hidden_mult: float = 4,
        threshold_train: float | Sequence[float] = 0.2,
        threshold_eval: float | Sequence[float] = 0.2,
        capacity_factor_train: float = 1.25,
        capacity_factor_eval: float = 2.0,
        gating_top_n: int = 2,
        balance_loss_coef: float = 1e-2,
        router_z_loss_coef: float = 1e-3,
        experts: nn.Module | None = None,
        straight_through_dispatch_tensor: bool = True,
        differentiable_topk: bool = False,
        differentiable_topk_fused: bool = True,
        *,
        dropless: bool = False,
        shared_experts: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **gate_options: Any,
    ) -> None:
        super().__init__()
        self.dim = check_count("dim", dim)
        self.num_experts = check_count("num_experts", num_experts)
        for name, module in (("experts", experts), ("shared_experts", shared_experts)):
            if module is not None:
                check_instance(name, module, nn.Module, "torch.nn.Module or None")
        if isinstance(experts, FeedForwards) and (experts.dim, experts.num_experts) != (self.dim, self.num_experts):
            got = f"dim={experts.dim}, num_experts={experts.num_experts}"
            raise ValueError(f"experts must have dim={self.dim}, num_experts={self.num_experts} as the layer, got {got}")
        self.balance_loss_coef = balance_loss_coef
        self.router_z_loss_coef = router_z_loss_coef
        self.gate = TopNGating(
            dim,
            num_experts,
            top_n=gating_top_n,
            threshold_train=threshold_train,
            threshold_eval=threshold_eval,
            capacity_factor_train=capacity_factor_train,
            capacity_factor_eval=capacity_factor_eval,
            straight_through_dispatch_tensor=straight_through_dispatch_tensor,
            differentiable_topk=differentiable_topk,
            differentiable_topk_fused=differentiable_topk_fused,
            dropless=dropless,
            device=device,
            dtype=dtype,
            **gate_options,
        )
        self.stats: RoutingStats | None = None
        if experts is None:
            experts = Experts(dim, num_experts, expert_hidden_mult, device=device, dtype=dtype)
        self.experts = experts
        self.shared_experts = shared_experts

    def forward(
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
    ) -> MixtureOfExpertsReturn:
        """``outputs, total_aux_loss, balance_loss, router_z_loss`` of tokens ``x`` ``(…, n, dim)``.

        Arguments as :meth:`TopNGating.route`. A token that no expert computes has output 0, or that of ``shared_experts``: add
        the residual outside.
        """
        routing = self.gate.route(
            x,
            noise_gates,
            noise_mult,
            token_mask=token_mask,
            generator=generator,
            expert=expert,
            counts=counts,
            priority=priority,
        )
        self.stats = None if routing.statistics is None else routing.stats()
        if routing.offsets is None and x.is_cpu and isinstance(self.experts, FeedForwards):
            routing = routing.as_dropless()  # so that no empty slot is multiplied
        rows = routing.dispatch(x)
        rows = self.experts(rows) if routing.offsets is None else self.experts(rows, routing.offsets)
        outputs = routing.combine(rows)
        if self.shared_experts is not None:
            outputs = outputs + self.shared_experts(x)
        balance_loss = routing.balance_loss * self.balance_loss_coef
        total_aux_loss = torch.add(balance_loss, routing.router_z_loss, alpha=self.router_z_loss_coef)
        return MixtureOfExpertsReturn(outputs, total_aux_loss, routing.balance_loss, routing.router_z_loss)
