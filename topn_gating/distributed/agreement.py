"""The agreement of all ranks on a layer's shapes, through torch's store, before any of them sends a row.

A store is read by every process of the group, also one whose GPU is busy, and tells who has not come. It is asked once for a
layer and mode; after that a rank compares its shapes with what was agreed, on its own.
"""

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from .groups import group_of

# What all ranks must have alike. Groups and capacity are None in the dropless layout, where they may differ.
FIELDS = ("version", "num_experts", "dim", "dtype", "groups", "capacity")
Agreement = tuple[str, int, int, str, int | None, int | None]  # plain, so that torch.compile takes it for a constant

Key = tuple[str, int, bool]  # a group's name, the layer's number in this process, and whether it is in train mode

_agreed: dict[Key, Agreement] = {}
_calls: dict[Key, tuple[int, int]] = {}  # the key's number in its group, in the order of first calls, and its calls so far


def described(rows: Tensor, num_experts: int, dropless: bool) -> Agreement:
    """The :data:`FIELDS` of experts' rows, ``(…, e, C, d)`` or ``(R, d)``."""
    from .. import __version__

    groups, capacity = (None, None) if dropless else (rows.shape[:-3].numel(), rows.shape[-2])
    return __version__, num_experts, rows.shape[-1], str(rows.dtype), groups, capacity


def agree(key: Key, mine: Agreement, device: torch.device) -> None:
    """Compares with the other ranks at the first call of ``key``, and with what was agreed then at all others.

    Raises:
        ValueError: the ranks differ, on each of them; or ``mine`` has changed, on this one alone.
        RuntimeError: a rank did not come within the group's timeout.
    """
    for field, agreed, now in zip(FIELDS, _agreement(key, mine, device.type), mine, strict=True):
        if agreed != now:
            raise ValueError(
                f"{field} must stay {agreed}, which the ranks of expert_group agreed on, got {now}: "
                "give the layer max_tokens, or check='always'"
            )


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def agree_always(key: Key, mine: Agreement, device: torch.device) -> None:
    """Compares with the other ranks at every call, and raises as :func:`agree`."""
    _compare(key, mine, device.type)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _agreement(key: Key, mine: Agreement, device_type: str) -> Agreement:
    if key not in _agreed:  # torch.compile may trace a call several times
        _compare(key, mine, device_type)
        _agreed[key] = mine
    return _agreed[key]


def _compare(key: Key, mine: Agreement, device_type: str) -> None:
    group = group_of(key[0])
    ranks, me = dist.get_process_group_ranks(group), dist.get_rank()
    store = distributed_c10d._get_process_group_store(group)
    # All ranks call their layers in one order, though one may have made more of them.
    number, call = _calls.get(key, (sum(other[0] == key[0] for other in _calls), 0))
    _calls[key] = number, call + 1

    def entry(call: int, rank: int) -> str:
        return f"topn_gating/{number}/call {call}/rank {rank}"

    try:
        entries = [entry(call, rank) for rank in ranks]
        store.set(entry(call, me), json.dumps(mine))
        store.wait(entries, group._get_backend(torch.device(device_type)).options._timeout)
        others = [json.loads(value) for value in store.multi_get(entries)]
        if call > 1:  # every rank has read those of two calls ago, or it would not have come to the last
            store.delete_key(entry(call - 2, me))
    except dist.DistError as error:
        raise RuntimeError(_who_is_late(store, dict(zip(ranks, entries, strict=True)))) from error
    for i, field in enumerate(FIELDS):
        for rank, other in zip(ranks, others, strict=True):
            if other[i] != others[0][i]:
                values = f"rank {rank} has {other[i]}, rank {ranks[0]} has {others[0][i]}"
                raise ValueError(f"{field} must be the same on all ranks of expert_group: {values}")


def _who_is_late(store: Any, entries: dict[int, str]) -> str:
    try:
        late = ", ".join(str(rank) for rank, entry in entries.items() if not store.check([entry]))
    except dist.DistError:
        return "the ranks of expert_group could not compare their shapes: the process that holds torch's store is gone"
    who = f"rank {late}" if late else "a rank"
    return f"{who} of expert_group did not come to a layer's exchange within the group's timeout: it has died or is late"
