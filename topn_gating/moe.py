"""A Mixture-of-Experts layer on the compact form, with the names of ``st_moe_pytorch.MoE``."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_count, check_instance, check_positive, check_same_type
from .dtypes import autocast
from .functional import BalanceOn
from .gating import TopNGating
from .ops import Policy


class MixtureOfExpertsReturn(NamedTuple):
    """What :class:`MoE` returns: ``outputs`` ``(…, n, dim)`` and three scalars."""

    outputs: Tensor
    total_aux_loss: Tensor
    balance_loss: Tensor
    router_z_loss: Tensor


class Experts(nn.Module):
    r"""``num_experts`` two-matrix feedforwards with a gated GELU, computed as two batched matrix products.

    ``y = (u · gelu(v) · mult_bias) W_out + b_out`` with ``u, v = x W_in + b_in`` (GEGLU, arXiv 2002.05202; the
    multiplicative bias as in ST-MoE, arXiv 2202.08906, appendix A).

    Args:
        dim: features of a token.
        num_experts: number of experts.
        hidden_mult: the hidden size is ``int(dim · hidden_mult · 2 / 3)``.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        hidden_mult: float = 4,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dim = check_count("dim", dim)
        num_experts = check_count("num_experts", num_experts)
        hidden = check_count("dim * hidden_mult", max(1, int(dim * check_positive("hidden_mult", hidden_mult) * 2 / 3)))

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight_in = parameter(num_experts, dim, 2 * hidden)
        self.bias_in = parameter(num_experts, 1, 2 * hidden)
        self.mult_bias = parameter(num_experts, 1, hidden)
        self.weight_out = parameter(num_experts, hidden, dim)
        self.bias_out = parameter(num_experts, 1, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weights and biases as ``nn.Linear`` does, uniform within ``fan_in ** -0.5``."""
        for weight, bias in ((self.weight_in, self.bias_in), (self.weight_out, self.bias_out)):
            bound = weight.shape[1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)
        nn.init.ones_(self.mult_bias)

    def extra_repr(self) -> str:
        """What ``repr`` shows between the parentheses."""
        num_experts, hidden, dim = self.weight_out.shape
        return f"dim={dim}, num_experts={num_experts}, hidden={hidden}"

    def forward(self, x: Tensor) -> Tensor:
        """Expert outputs ``(…, e, C, dim)`` of expert inputs ``(…, e, C, dim)``."""
        x, weight_in = autocast(x), autocast(self.weight_in)
        check_same_type(x, weight_in, "experts'")
        by_slot = x.movedim((-3, -2), (0, 1))  # (e, C, …, dim): with the slots before the groups, export needs no guard
        rows = by_slot.flatten(1, -2)  # one product an expert, whatever the number of groups
        u, v = torch.baddbmm(autocast(self.bias_in), rows, weight_in).chunk(2, dim=-1)
        hidden = autocast(u * F.gelu(v) * self.mult_bias)
        rows = torch.baddbmm(autocast(self.bias_out), hidden, autocast(self.weight_out))
        outputs: Tensor = rows.unflatten(1, by_slot.shape[1:-1]).movedim((0, 1), (-3, -2))
        return outputs


class MoE(nn.Module):
    r"""Mixture of Experts: gate, experts, and the two losses, through the compact path.

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
        experts: a module from ``(…, e, C, dim)`` to ``(…, e, C, dim)``; by default :class:`Experts`.
        straight_through_dispatch_tensor: see :class:`TopNGating`, as all that follow.
        differentiable_topk: weights from the soft top-n.
        differentiable_topk_fused: in one kernel.
        min_expert_capacity: the least number of slots.
        policy_train: threshold policy in train mode.
        policy_eval: threshold policy in eval mode.
        balance_on: what the balance loss counts.
        router_dtype: type of the gate's matrix product.
        device: of the parameters.
        dtype: of the parameters.

    Example::

        >>> moe = MoE(dim=512, num_experts=16)
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
        min_expert_capacity: int = 4,
        policy_train: Policy = "random",
        policy_eval: Policy = "random",
        balance_on: BalanceOn = "routed",
        router_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = check_count("dim", dim)
        self.num_experts = check_count("num_experts", num_experts)
        if experts is not None:
            check_instance("experts", experts, nn.Module, "torch.nn.Module or None")
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
            min_expert_capacity=min_expert_capacity,
            policy_train=policy_train,
            policy_eval=policy_eval,
            balance_on=balance_on,
            router_dtype=router_dtype,
            device=device,
            dtype=dtype,
        )
        if experts is None:
            experts = Experts(dim, num_experts, expert_hidden_mult, device=device, dtype=dtype)
        self.experts = experts

    def forward(
        self,
        x: Tensor,
        noise_gates: bool = False,
        noise_mult: float = 1.0,
        *,
        token_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> MixtureOfExpertsReturn:
        """``outputs, total_aux_loss, balance_loss, router_z_loss`` of tokens ``x`` ``(…, n, dim)``.

        Arguments as :meth:`TopNGating.route`. A token that every expert dropped has output 0: add the residual outside.
        """
        routing = self.gate.route(x, noise_gates, noise_mult, token_mask=token_mask, generator=generator)
        outputs = routing.combine(self.experts(routing.dispatch(x)))
        total_aux_loss = routing.balance_loss * self.balance_loss_coef + routing.router_z_loss * self.router_z_loss_coef
        return MixtureOfExpertsReturn(outputs, total_aux_loss, routing.balance_loss, routing.router_z_loss)
