"""Figures of training: for each step one tensor and one copy to the host, whatever the number of layers."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from topn_gating import Routing, RoutingStats

from .ranks import OneProcess

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

BLOCK_FIGURES = ("balance_loss", "router_z_loss", *RoutingStats._fields[2:])


def step_figures(loss: Tensor, routings: list[Routing], ranks: OneProcess) -> Tensor:
    """Returns the loss, then for each block :data:`BLOCK_FIGURES` and each expert's demand: ``(1 + layers * (7 + e),)``.

    They are those of all ranks' tokens.
    """
    losses = torch.stack([loss, *(value for r in routings for value in (r.balance_loss, r.router_z_loss))]).detach()
    loss, *losses = (ranks.total(losses) / ranks.size).split([1, *[2] * len(routings)])
    blocks = torch.cat([torch.stack(losses), ranks.statistics([r.stats() for r in routings])], 1)
    return torch.cat([loss, blocks.flatten()])


@dataclass
class History:
    """Figures of training, one for each step; ``held_out`` has one for each evaluation.

    ``blocks`` has for each step and block :data:`BLOCK_FIGURES` and then each expert's demand.
    """

    loss: list[float] = field(default_factory=list)
    blocks: list[list[list[float]]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)  # step, loss
    ranks: OneProcess = field(default_factory=OneProcess)

    def add(self, loss: Tensor, routings: list[Routing]) -> None:
        """Appends the figures of a step, which waits for the device once."""
        first, *rest = step_figures(loss, routings, self.ranks).tolist()
        width = len(rest) // len(routings)
        self.loss.append(first)
        self.blocks.append([rest[i : i + width] for i in range(0, len(rest), width)])

    def figure(self, name: str) -> Tensor:
        """Returns one of :data:`BLOCK_FIGURES`, ``(steps, layers)``."""
        return torch.tensor(self.blocks)[..., BLOCK_FIGURES.index(name)]

    @property
    def load(self) -> Tensor:
        """Each expert's share of the block's routed pairs, ``(steps, layers, e)``."""
        demand = torch.tensor(self.blocks)[..., len(BLOCK_FIGURES) :]
        return demand / demand.sum(-1, keepdim=True)

    def dropped(self) -> float:
        """Returns the share of the routed pairs that the last step dropped, the mean of the blocks'."""
        column = BLOCK_FIGURES.index("drop_fraction")
        return sum(block[column] for block in self.blocks[-1]) / len(self.blocks[-1])


def write_step(writer: "SummaryWriter", history: History) -> None:
    """Writes the last step's figures to a TensorBoard log, from numbers that are on the host already."""
    step = len(history.loss)
    writer.add_scalar("loss/training", history.loss[-1], step)
    if history.held_out and history.held_out[-1][0] == step:
        writer.add_scalar("loss/held_out", history.held_out[-1][1], step)
    for index, block in enumerate(history.blocks[-1]):
        figures, demand = block[: len(BLOCK_FIGURES)], block[len(BLOCK_FIGURES) :]
        for name, value in zip(BLOCK_FIGURES, figures, strict=True):
            writer.add_scalar(f"block_{index}/{name}", value, step)
        for expert, pairs in enumerate(demand):
            writer.add_scalar(f"block_{index}_demand/expert_{expert}", pairs, step)
