"""The demo's model, a byte-level transformer whose feedforwards are Mixtures of Experts, and its training."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from topn_gating import MoE, Routing

from .data import BYTE_KINDS, byte_kinds, random_windows
from .history import History, write_step
from .ranks import OneProcess

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.utils.tensorboard import SummaryWriter

ONE_PROCESS = OneProcess()
BYTES = 256
RECENT = 4
HEAD_DIM = 32
TOP_N = 2

LEARNING_RATE = 2e-3
WARM_UP = 0.25
HELD_OUT_POINTS = 8
EVAL_BATCH = 16


@dataclass(frozen=True)
class Settings:
    """The sizes of the model, and the length and seed of its training."""

    steps: int
    seed: int
    batch: int
    context: int
    dim: int
    layers: int
    experts: int
    windows: int

    def __post_init__(self) -> None:
        if self.dim % HEAD_DIM:
            raise ValueError(f"dim must be a multiple of {HEAD_DIM}, got {self.dim}")


class Embedding(nn.Module):
    """The sum of one vector for each of the last four bytes.

    It encodes the order of nearby bytes, so that attention needs no position encoding.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(RECENT * BYTES, dim)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, data: Tensor) -> Tensor:
        """Returns embeddings ``(…, n, dim)`` of bytes ``(…, n)``."""
        recent = F.pad(data, (RECENT - 1, 0)).unfold(-1, RECENT, 1)  # (…, n, RECENT)
        return self.table(recent + BYTES * torch.arange(RECENT, device=data.device)).sum(-2)


class Attention(nn.Module):
    """Causal self-attention, ``(…, n, dim)`` to ``(…, n, dim)``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.to_qkv(x).unflatten(-1, (3, -1, HEAD_DIM)).transpose(-2, -4)  # (…, heads, 3, n, HEAD_DIM)
        q, k, v = heads.unbind(-3)
        return self.to_out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-3, -2).flatten(-2))


class Block(nn.Module):
    """Attention, then a Mixture of Experts, each applied to its normalised input and added to the input."""

    def __init__(self, dim: int, experts: int, expert_group: "ProcessGroup | None" = None) -> None:
        super().__init__()
        top_n = min(TOP_N, experts)
        self.attention = nn.Sequential(nn.RMSNorm(dim), Attention(dim))
        self.norm = nn.RMSNorm(dim)
        self.moe = MoE(
            dim,
            experts,
            expert_hidden_mult=1.5,
            gating_top_n=top_n,
            capacity_factor_train=1.25 * top_n,
            capacity_factor_eval=experts,  # room for the whole sequence: no drops, so no token depends on a later one
            policy_train="all",
            policy_eval="all",
            stats=True,
            expert_group=expert_group,
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """Returns tokens ``(…, n, dim)`` and their routing.

        ``self.moe(tokens)`` computes the same outputs in one call, but does not return the routing.
        """
        x = x + self.attention(x)
        tokens = self.norm(x)
        routing = self.moe.gate.route(tokens)
        return x + self.moe.run_experts(tokens, routing), routing


class LanguageModel(nn.Module):
    """Predicts the next byte."""

    def __init__(self, settings: Settings, expert_group: "ProcessGroup | None" = None) -> None:
        super().__init__()
        dim = settings.dim
        self.embedding = Embedding(dim)
        self.blocks = nn.ModuleList(Block(dim, settings.experts, expert_group) for _ in range(settings.layers))
        self.to_logits = nn.Sequential(nn.RMSNorm(dim), nn.Linear(dim, BYTES, bias=False))

    def forward(self, data: Tensor) -> tuple[Tensor, list[Routing]]:
        """Returns the logits ``(batch, n, 256)`` of the byte after each byte of ``data``, and a routing for each block."""
        x = self.embedding(data)
        routings = []
        for block in self.blocks:
            x, routing = block(x)
            routings.append(routing)
        return self.to_logits(x), routings

    def aux_loss(self, routings: list[Routing]) -> Tensor:
        """Returns the sum of the blocks' balance and router z losses, weighted as ``MoE.forward`` weights them."""
        return sum(
            block.moe.balance_loss_coef * routing.balance_loss + block.moe.router_z_loss_coef * routing.router_z_loss
            for block, routing in zip(self.blocks, routings, strict=True)
        )


class Evaluation(NamedTuple):
    """The loss in nats per byte, and the number of tokens of each kind that each expert received ``(layers, e, kinds)``."""

    loss: float
    received: Tensor

    @property
    def load(self) -> Tensor:
        """Each expert's share of its layer's work, ``(layers, e)``."""
        received = self.received.sum(-1)
        return received / received.sum(-1, keepdim=True)


def next_byte_loss(model: LanguageModel, windows: Tensor) -> tuple[Tensor, list[Routing]]:
    """Returns the cross-entropy in nats per byte of windows ``(batch, n + 1)``, and the routings."""
    logits, routings = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, -2), windows[:, 1:].flatten()), routings


@torch.no_grad()
def evaluate(model: LanguageModel, windows: Tensor, ranks: OneProcess = ONE_PROCESS) -> Evaluation:
    """Evaluates the model, in eval mode, on windows ``(batch, n + 1)``, of which each rank has its share."""
    model.eval()
    windows = ranks.share(windows)
    # Equal batches, as ranks that share experts agree on one size.
    batch = next(size for size in range(EVAL_BATCH, 0, -1) if len(windows) % size == 0)
    total, received = torch.zeros(()), 0
    for part in windows.split(batch):
        loss, routings = next_byte_loss(model, part)
        total += loss * len(part)
        kinds = byte_kinds(part[:, :-1])
        received = received + torch.stack([received_by_kind(routing, kinds) for routing in routings])
    model.train()
    total = ranks.total(total) / (ranks.size * len(windows))
    return Evaluation(total.item(), ranks.total(received))


def received_by_kind(routing: Routing, kinds: Tensor) -> Tensor:
    """Returns the number of tokens of each kind that each expert received ``(e, kinds)``, from their kinds ``(…, n)``."""
    shape = routing.source.shape[-2], len(BYTE_KINDS)
    cell = routing.expert * shape[1] + kinds.unsqueeze(-1)
    return torch.bincount(cell[routing.slot >= 0], minlength=math.prod(shape)).view(shape)


def train(
    model: LanguageModel,
    text: Tensor,
    held_out: Tensor,
    settings: Settings,
    writer: "SummaryWriter | None" = None,
    ranks: OneProcess = ONE_PROCESS,
) -> History:
    """Trains on random windows of ``text`` with AdamW, and evaluates at regular steps on ``held_out``.

    The figures of each step go to a TensorBoard log, if there is one.
    """
    history = History(ranks=ranks)
    training = Training(model, settings, ranks)
    evaluate_every = max(1, settings.steps // HELD_OUT_POINTS)
    tokens = settings.batch * settings.context
    with tqdm(total=settings.steps * tokens, unit=" tokens", unit_scale=True, desc="training", disable=ranks.rank > 0) as bar:
        for step in range(1, settings.steps + 1):
            loss, routings = training.step(random_windows(text, settings.batch, settings.context + 1))
            history.add(loss, routings)
            if step % evaluate_every == 0 and step < settings.steps:
                history.held_out.append((step, evaluate(model, held_out, ranks).loss))
            if writer is not None:
                write_step(writer, history)
            bar.set_postfix(loss=f"{history.loss[-1]:.2f}", dropped=f"{100 * history.dropped():.1f}%", refresh=False)
            bar.update(tokens)
    return history


class Training:
    """The optimizer of a model, and a step of it."""

    def __init__(self, model: LanguageModel, settings: Settings, ranks: OneProcess) -> None:
        self.model, self.ranks = model, ranks
        self.averaging = ranks.averaging(model)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=LEARNING_RATE, weight_decay=0.1, betas=(0.9, 0.99), fused=True
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: warm_up_and_cosine(step / settings.steps)
        )

    def step(self, windows: Tensor) -> tuple[Tensor, list[Routing]]:
        """Trains on this rank's share of windows ``(batch, n + 1)``; returns its loss and routings."""
        loss, routings = next_byte_loss(self.averaging, self.ranks.share(windows))
        self.optimizer.zero_grad()
        (loss + self.model.aux_loss(routings)).backward()
        self.ranks.clip(self.model)
        self.optimizer.step()
        self.schedule.step()
        return loss, routings


def warm_up_and_cosine(progress: float) -> float:
    """Returns the share of the full learning rate at a progress from 0 to 1: linear warm-up, then a cosine to 0."""
    if progress < WARM_UP:
        return (progress + 0.01) / (WARM_UP + 0.01)
    return 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))
