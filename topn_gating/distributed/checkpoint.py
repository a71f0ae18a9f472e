"""Checkpoints that load on another number of ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard

from .groups import group_of
from .training import distributed_layers


def sharded_state_dict(module: nn.Module) -> dict[str, Any]:
    """``module.state_dict()``, with this rank's part of each expert tensor as a DTensor of all experts ``(e, …)``.

    ``torch.distributed.checkpoint`` saves and loads it: a checkpoint of any number of ranks, or of one process without an
    ``expert_group``, loads on any other number. Its tensors share the memory of the module's, so that loading fills the module.
    Experts that FSDP2 shards further, on a mesh of one dimension, are DTensors on a mesh of two. All ranks call it together.

    Example::

        >>> torch.distributed.checkpoint.save(sharded_state_dict(model), checkpoint_id=folder)
        >>> torch.distributed.checkpoint.load(sharded_state_dict(model), checkpoint_id=folder)  # on 2, 4 or 8 ranks

    Raises:
        ValueError: a tensor of the experts does not have this rank's experts as its first dimension.
    """
    state = module.state_dict()
    meshes: dict[Any, DeviceMesh] = {}
    for prefix, layer, group in distributed_layers(module):
        for key in layer.experts.state_dict(prefix=f"{prefix}.experts." if prefix else "experts."):
            part: Tensor = state[key]
            if part.dim() == 0 or part.shape[0] != group.num_local:
                raise ValueError(f"{key} must have this rank's {group.num_local} experts first, got {tuple(part.shape)}")
            shape, stride = torch.Size((group.num_experts, *part.shape[1:])), part.stride()
            placements: list[Placement] = [Shard(0)]
            inner = None
            if isinstance(part, DTensor):
                placements, inner, part = [*placements, *part.placements], part.device_mesh, part.to_local()
            where = group.name, part.device.type, inner
            if where not in meshes:
                meshes[where] = _mesh(group.name, part.device.type, inner)
            state[key] = DTensor.from_local(part, meshes[where], placements, shape=shape, stride=stride)
    return state


def _mesh(name: str, device_type: str, inner: DeviceMesh | None) -> DeviceMesh:
    """The group as a mesh; each rank of it with the ranks of its ``inner`` mesh, if there is one, as a second dimension."""
    if inner is None:
        return DeviceMesh.from_group(group_of(name), device_type)
    rows: list[Any] = [None] * group_of(name).size()
    dist.all_gather_object(rows, inner.mesh.flatten().tolist(), group_of(name))
    return DeviceMesh(device_type, torch.tensor(rows), _init_backend=False)  # coordinates alone: nothing is sent over it
