"""A Mixture-of-Experts layer on the compact form, with the names of ``st_moe_pytorch.MoE``."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .checks import check_count, check_instance
from .experts import Experts, FeedForwards
from .gating import TopNGating
from .routing import Routing
from .statistics import RoutingStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from .distributed.exchange import Exchange, ExpertGroup


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
        expert_group: the ranks that share the experts (:mod:`topn_gating.distributed`): a ProcessGroup, a DeviceMesh of one
            dimension or a group's name. Rank r of W holds the experts ``r · num_experts / W …``, and ``experts`` is a module of
            these alone. All ranks call their layers in the same order; with a capacity, on the same number of groups
            and slots (see ``max_tokens`` of :class:`TopNGating`), and dropless, on as many tokens as they like.
        exchange: a function in place of torch's ``all_to_all_single`` that sends rows along the first dimension, and their
            gradient: ``exchange(rows, output_splits, input_splits)``, splits as :func:`torch.distributed.all_to_all_single` has
            them.
        chunks: parts of the buffers that are sent one after the other: one travels while the experts compute another.
        check: ``"first"``: the ranks compare their shapes at the first call in each mode, and raise on all ranks where they
            differ; after that each holds itself to what was agreed. ``"always"``: they compare at every call.
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
        expert_group: "ProcessGroup | DeviceMesh | str | None" = None,
        exchange: "Exchange | None" = None,
        chunks: int = 1,
        check: Literal["first", "always"] = "first",
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
        self.expert_group = _expert_group(expert_group, self.num_experts, exchange, chunks, check)
        here = self.num_experts if self.expert_group is None else self.expert_group.num_local
        if isinstance(experts, FeedForwards) and (experts.dim, experts.num_experts) != (self.dim, here):
            whose = "the layer" if self.expert_group is None else "this rank of expert_group"
            got = f"dim={experts.dim}, num_experts={experts.num_experts}"
            raise ValueError(f"experts must have dim={self.dim}, num_experts={here} as {whose}, got {got}")
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
        if self.expert_group is not None:
            if self.gate.align != 1:
                raise ValueError(f"align must be 1 with expert_group, got {self.gate.align}")
            if dropless and chunks != 1:
                raise ValueError(f"chunks must be 1 when dropless, got {chunks}")
        if experts is None:
            with _own_random_numbers(self.expert_group, device):
                experts = Experts(dim, here, expert_hidden_mult, device=device, dtype=dtype)
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
        outputs = self.run_experts(x, routing)
        balance_loss = routing.balance_loss * self.balance_loss_coef
        total_aux_loss = torch.add(balance_loss, routing.router_z_loss, alpha=self.router_z_loss_coef)
        return MixtureOfExpertsReturn(outputs, total_aux_loss, routing.balance_loss, routing.router_z_loss)

    def run_experts(self, x: Tensor, routing: Routing) -> Tensor:
        """The outputs ``(…, n, dim)`` of tokens ``x`` ``(…, n, dim)`` under a routing of them, as :meth:`forward` has them."""
        group = self.expert_group
        if group is not None and group.size > 1:
            demand = None if routing.offsets is None else routing.demand
            rows = group.compute(self.experts, routing.dispatch(x), demand, self.training)
        else:
            if routing.offsets is None and x.is_cpu and isinstance(self.experts, FeedForwards):
                routing = routing.as_dropless()  # so that no empty slot is multiplied
            rows = routing.dispatch(x)
            rows = self.experts(rows) if routing.offsets is None else self.experts(rows, routing.offsets)
        outputs = routing.combine(rows)
        return outputs if self.shared_experts is None else outputs + self.shared_experts(x)


def _expert_group(group: Any, num_experts: int, exchange: Any, chunks: int, check: Any) -> "ExpertGroup | None":
    if group is not None:
        from .distributed.exchange import ExpertGroup  # loads torch.distributed

        return ExpertGroup(group, num_experts, exchange, chunks, check)
    for name, value, default in (("exchange", exchange, None), ("chunks", chunks, 1), ("check", check, "first")):
        if value != default:
            raise ValueError(f"{name} must be left out without expert_group, got {value!r}")
    return None


@contextlib.contextmanager
def _own_random_numbers(group: "ExpertGroup | None", device: torch.device | str | None) -> Iterator[None]:
    """Draws other numbers on each rank of the group, from a seed that ranks with the same state draw alike."""
    if group is None or group.size == 1:
        yield
        return
    seed = int(torch.randint(2**62, (), device="cpu"))
    device = torch.get_default_device() if device is None else torch.device(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed + group.rank)
        yield
