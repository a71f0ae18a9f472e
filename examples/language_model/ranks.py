"""Where the model trains: in one process, or on the ranks that torchrun has started, each with a part of the experts."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from topn_gating import RoutingStats, stack_stats
from topn_gating.distributed import clip_grad_norm_, ddp_ignore, expert_parameters, sum_stats

CLIP = 1.0


class OneProcess:
    """All experts and all sequences are here."""

    rank, size = 0, 1

    def build(self, model: Callable[..., nn.Module], *args: Any) -> nn.Module:
        """Returns the model of this rank."""
        return model(*args)

    def averaging(self, model: nn.Module) -> nn.Module:
        """Returns the model whose backward pass leaves the gradients of the mean of the ranks' losses."""
        return model

    def clip(self, model: nn.Module) -> None:
        """Limits the norm of the gradients of all ranks."""
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)

    def share(self, windows: Tensor) -> Tensor:
        """Returns this rank's part of windows ``(count, …)`` that all ranks have drawn alike."""
        return windows

    def total(self, values: Tensor) -> Tensor:
        """Returns the sum over the ranks."""
        return values

    def statistics(self, layers: Sequence[RoutingStats]) -> Tensor:
        """Returns :func:`topn_gating.stack_stats` over the tokens of all ranks."""
        return stack_stats(layers)


class Ranks(OneProcess):
    """A group of processes. Each trains on its share of every batch, and holds its part of every layer's experts."""

    def __init__(self) -> None:
        dist.init_process_group("gloo")
        self.group = dist.group.WORLD
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def build(self, model: Callable[..., nn.Module], *args: Any) -> nn.Module:
        """Returns this rank's part of the model that one process would have built, and draws as many random numbers as that."""
        whole = model(*args)
        with torch.random.fork_rng():
            part = model(*args, self.group)
        names = {name for name, _ in expert_parameters(part)}
        state = {name: t.chunk(self.size)[self.rank] if name in names else t for name, t in whole.state_dict().items()}
        part.load_state_dict(state)
        return part

    def averaging(self, model: nn.Module) -> nn.Module:
        ddp_ignore(model)
        return DistributedDataParallel(model)

    def clip(self, model: nn.Module) -> None:
        clip_grad_norm_(model, CLIP)

    def share(self, windows: Tensor) -> Tensor:
        return windows.chunk(self.size)[self.rank]

    def total(self, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values, group=self.group)
        return values

    def statistics(self, layers: Sequence[RoutingStats]) -> Tensor:
        return sum_stats(layers, self.group)


def started_by_torchrun() -> bool:
    """Whether this process is one of several that torchrun has started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
