"""What a training loop does with the gradients, losses and statistics of layers whose experts are on many ranks."""

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..moe import MoE
from ..statistics import RoutingStats, stack_stats
from .exchange import ExpertGroup
from .groups import Group, group_name, group_of


def distributed_layers(module: nn.Module) -> Iterator[tuple[str, MoE, ExpertGroup]]:
    """Names, layers and groups of the layers of ``module`` whose experts are on several ranks."""
    for name, layer in module.named_modules():
        if isinstance(layer, MoE) and layer.expert_group is not None and layer.expert_group.size > 1:
            yield name, layer, layer.expert_group


def expert_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of the experts that this rank alone holds, in all layers of ``module``."""
    for prefix, layer, _ in distributed_layers(module):
        yield from layer.experts.named_parameters(f"{prefix}.experts" if prefix else "experts")


def ddp_ignore(module: nn.Module) -> None:
    """Leaves this rank's experts out of DistributedDataParallel's averaging; call it before that, once.

    An expert sees the tokens of all ranks of its group, so its gradient is a sum over their losses. It is divided by their
    number here: all gradients are then those of the mean of the ranks' losses, as DistributedDataParallel's are. Where a group
    is not all ranks, average the gradients of its experts over the ranks that hold the same ones.
    """
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        module, [name for name, _ in expert_parameters(module)]
    )
    for _, layer, group in distributed_layers(module):
        for parameter in layer.experts.parameters():
            parameter.register_hook(functools.partial(_divide, size=group.size))


def _divide(grad: Tensor, size: int) -> Tensor:
    return grad / size


@torch.no_grad()
def clip_grad_norm_(module: nn.Module, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
    """As :func:`torch.nn.utils.clip_grad_norm_` of all parameters of ``module``, where each rank's experts count once.

    Parameters that are no experts count as this rank has them: call it after their gradients are averaged, on all ranks.

    Returns:
        ``()``, the norm of all gradients before clipping, the same on all ranks.

    Raises:
        RuntimeError: the norm is not finite, with ``error_if_nonfinite``.
    """
    of_group: dict[str | None, list[Tensor]] = {None: []}  # gradients by the group over which their experts are divided
    names = {p: group.name for _, layer, group in distributed_layers(module) for p in layer.experts.parameters()}
    for _, _, group in distributed_layers(module):
        of_group.setdefault(group.name, [])  # also without a gradient on this rank, as all ranks have to meet
    for parameter in module.parameters():
        if parameter.grad is not None:
            of_group[names.get(parameter)].append(parameter.grad)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    norms = [_norm(grads, norm_type, name, device) for name, grads in of_group.items()]
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in norms]), norm_type)
    if error_if_nonfinite and not bool(total.isfinite()):
        raise RuntimeError(f"the gradients cannot be clipped: their norm of order {norm_type} is {total.item()}")
    share = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for grads in of_group.values():
        for grad in grads:
            local = grad.to_local() if isinstance(grad, DTensor) else grad
            local.mul_(share.to(local.device))
    return total


def _norm(grads: list[Tensor], norm_type: float, name: str | None, device: torch.device) -> Tensor:
    """The norm of the gradients of all ranks of a group, or of this rank alone; on ``device`` where there are none."""
    by_mesh: dict[DeviceMesh | None, list[Tensor]] = {}  # FSDP2's gradients are DTensors; torch does not mix their meshes
    for grad in grads:
        by_mesh.setdefault(grad.device_mesh if isinstance(grad, DTensor) else None, []).append(grad)
    norms = [nn.utils.get_total_norm(same, norm_type) for same in by_mesh.values()]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type) if norms else torch.zeros((), device=device)
    if name is None:
        return norm
    if norm_type == float("inf"):
        return _all_reduce(norm, "max", name)
    return _all_reduce(norm**norm_type, "sum", name) ** (1 / norm_type)


def sum_counts(group: Group) -> Callable[[Tensor], Tensor]:
    """For ``counts=`` of :class:`topn_gating.MoE` and :func:`topn_gating.route`: adds up those of all groups of all ranks.

    The mean over the ranks of the balance losses is then that of the global batch (arXiv 2501.11873), where the ranks have
    equally many tokens.
    """
    name = group_name(group)
    return lambda counts: _all_reduce(counts.reshape(-1, counts.shape[-1]).sum(0), "sum", name)


@torch.no_grad()
def sum_stats(layers: Sequence[RoutingStats], group: Group) -> Tensor:
    """:func:`topn_gating.stack_stats` over the tokens of all ranks of ``group``, in one all-reduce for all layers.

    Args:
        layers: one for each layer, as of :attr:`topn_gating.MoE.stats`.
        group: the ranks, which have the same layers.

    Returns:
        ``(layers, 5 + e)`` float32, as :func:`topn_gating.stack_stats`. A mean over tokens is one over ranks, weighted by their
        routed pairs.
    """
    members = group_of(group_name(group))
    drop_fraction, _, entropy, logit_max, logit_rms, *by_expert = stack_stats(layers).double().unbind(1)
    demand = torch.stack(by_expert, 1)
    pairs = demand.sum(1)
    sums = torch.stack([drop_fraction * pairs, entropy * pairs, logit_rms.square() * pairs], 1)
    largest = demand.new_zeros(len(layers), members.size())  # a column of each rank: the sum keeps them apart
    largest[:, members.rank()] = logit_max
    widths = [3, demand.shape[1], members.size()]
    sums, demand, largest = _all_reduce(torch.cat([sums, demand, largest], 1), "sum", members.group_name).split(widths, 1)
    pairs = demand.sum(1)
    dropped, entropy, squares = (sums / pairs.clamp(min=1).unsqueeze(1)).unbind(1)
    violation = torch.where(pairs > 0, demand.amax(1) * demand.shape[1] / pairs.clamp(min=1) - 1, 0)
    figures = torch.stack([dropped, violation, entropy, largest.amax(1), squares.sqrt()], 1)
    return torch.cat([figures, demand], 1).float()


def _all_reduce(tensor: Tensor, operation: str, name: str) -> Tensor:
    c10d = torch.ops._c10d_functional
    result: Tensor = c10d.wait_tensor(c10d.all_reduce(tensor.contiguous(), operation, name))
    return result
