"""Process groups, by their names: torch's collectives take these, and compiled code and copies of a module keep them."""

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh

Group = dist.ProcessGroup | DeviceMesh | str


def group_name(group: Group) -> str:
    """The name of a group.

    Raises:
        TypeError: ``group`` is of the wrong type.
        ValueError: this process is no rank of it, there is no such group, or a mesh has several dimensions.
    """
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"expert_group must be a DeviceMesh of one dimension, got {group.ndim}: take mesh['name']")
        group = group.get_group()
    if isinstance(group, int):  # what dist.new_group returns to the others
        raise ValueError("expert_group must be a group of which this process is a rank")
    if not isinstance(group, (str, dist.ProcessGroup)):
        raise TypeError(f"expert_group must be a ProcessGroup, a DeviceMesh or a str, got {type(group).__name__}")
    name: str = group if isinstance(group, str) else group.group_name
    try:
        group_of(name)
    except (RuntimeError, LookupError) as error:
        raise ValueError(f"expert_group must be the name of a process group, got {name!r}") from error
    return name


def group_of(name: str) -> dist.ProcessGroup:
    """The group of a name."""
    group: dist.ProcessGroup = distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type, unused-ignore]
    return group
