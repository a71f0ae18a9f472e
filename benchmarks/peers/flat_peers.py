"""Peers without groups: all b·n tokens share b·C slots of each expert, so that every contender has the same number of slots.

They have no thresholds and no straight-through gradient, and their balance losses count all ranks. Overflowing pairs are
dropped by position, all ranks together (``drop_policy="position"``, the policy closest to topn_gating; dropping by weight,
their default, is about as fast). DeepSpeed has no z loss and normalises the weights after the drop. Megatron's expert inputs
are not padded: they are the kept rows. If nothing is dropped, all agree with ``topn_gating`` under ``policy="all"``.
"""

import importlib
import logging
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .contenders import Contender, Problem, scaled


class FlatPeer(Contender):
    """A peer whose package is imported by ``load``."""

    same = False
    module = ""

    @classmethod
    def load(cls) -> None:
        with warnings.catch_warnings():  # about missing accelerators
            warnings.simplefilter("ignore")
            cls.package = importlib.import_module(cls.module)

    @property
    def factor(self) -> float:
        """The capacity factor that gives b·C slots for b·n·k pairs, less half a slot, since the peers round up."""
        b, n, _, e, k = self.problem.shape
        return (b * self.problem.capacity - 0.5) * e / (b * n * k)


class Experts(nn.Module):
    """The experts of :meth:`Contender.full`, for a layer that asks for a module."""

    gain: Tensor | None = None

    def forward(self, rows: Tensor) -> Tensor:
        return scaled(rows, self.gain)


class DeepSpeedGate(nn.Module):
    """``topkgating`` with the arguments that DeepSpeed's layer calls its gate with, in float32 as ``TopKGate`` has it."""

    def __init__(self, contender: FlatPeer) -> None:
        super().__init__()
        self.contender = contender

    def forward(self, x: Tensor, used_token: None = None, sparse_routes: bool = False, use_tutel: bool = False) -> tuple:
        contender = self.contender
        logits = F.linear(x.float(), contender.problem.weight.float())
        return contender.package.topkgating(
            logits,
            contender.problem.shape.k,
            contender.factor,
            min_capacity=1,
            drop_policy="position",
            sparse_routes=sparse_routes,
        )


class DeepSpeedSparse(FlatPeer):
    """``topkgating`` by indices, and the layer's gathers."""

    name = "DeepSpeed, sparse"
    about = "deepspeed.moe.sharded_moe: topkgating by indices, MOELayer; no z loss"
    install = "pip install --no-deps deepspeed && pip install hjson msgpack psutil py-cpuinfo pydantic"
    module = "deepspeed.moe.sharded_moe"

    @classmethod
    def load(cls) -> None:
        logging.disable(logging.WARNING)  # about missing accelerators
        super().load()
        logging.disable(logging.NOTSET)

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.router = DeepSpeedGate(self)
        self.layer = self.package.MOELayer(self.router, Experts(), None, ep_size=1, num_local_experts=problem.shape.e)

    def gate(self) -> Sequence[Tensor]:
        balance_loss, *_, weight, _ = self.router(self.problem.x.flatten(0, 1), sparse_routes=True)
        return weight, balance_loss

    def full(self, gain: Tensor | None = None) -> Sequence[Tensor]:
        self.layer.experts.gain = gain
        return self.layer(self.problem.x, None), self.layer.l_aux


class DeepSpeedDense(DeepSpeedSparse):
    """``topkgating`` by dense tensors, and GShard's two einsums."""

    name = "DeepSpeed, dense"
    about = "deepspeed.moe.sharded_moe: topkgating by dense tensors, two einsums; no z loss"
    dense_tensors = 4.5

    def dense(self) -> Sequence[Tensor]:
        balance_loss, combine, dispatch, _ = self.router(self.problem.x.flatten(0, 1))
        return dispatch, combine, balance_loss

    def gate(self) -> Sequence[Tensor]:
        _, combine, balance_loss = self.dense()
        return combine, balance_loss

    def full(self, gain: Tensor | None = None) -> Sequence[Tensor]:
        x = self.problem.x.flatten(0, 1)
        dispatch, combine, balance_loss = self.dense()
        rows = torch.einsum("sec,sm->ecm", dispatch.type_as(x), x)
        out = torch.einsum("sec,ecm->sm", combine.type_as(x), scaled(rows, gain))
        return out.view_as(self.problem.x), balance_loss


class Megatron(FlatPeer):
    """Megatron-core's router functions, in the order of its ``TopKRouter``, with permute and unpermute in torch."""

    name = "Megatron-core"
    about = "megatron.core.transformer.moe.moe_utils: torch router with capacity and losses, permute, unpermute"
    install = "pip install --no-deps megatron-core"
    module = "megatron.core.transformer.moe.moe_utils"

    def route(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the weights and the map ``(b·n, e)`` of the kept pairs, and the losses."""
        core, (_, _, _, e, k) = self.package, self.problem.shape
        logits = F.linear(self.problem.x.flatten(0, 1), self.problem.weight)
        router_z_loss = core.z_loss_func(logits, 1.0)
        weight, chosen = core.topk_routing_with_score_function(logits, k, use_pre_softmax=k == 1)
        weight, kept = core.apply_router_token_dropping(weight, chosen, k, self.factor, drop_policy="position")
        chosen, gates = core.compute_routing_scores_for_aux_loss(logits, k, "softmax")
        balance_loss = core.switch_load_balancing_loss_func(gates, chosen.sum(0), len(logits), k, e, 1.0)
        return weight, kept, balance_loss, router_z_loss

    def gate(self) -> Sequence[Tensor]:
        weight, _, *losses = self.route()
        return weight, *losses

    def full(self, gain: Tensor | None = None) -> Sequence[Tensor]:
        x = self.problem.x.flatten(0, 1)
        weight, kept, *losses = self.route()
        rows, _, order = self.package.permute(x, kept)
        if gain is not None:
            rows = rows * gain.repeat_interleave(kept.sum(0)).unsqueeze(-1)
        out = self.package.unpermute(rows, order, x.shape, probs=weight, routing_map=kept)
        return out.view_as(self.problem.x), *losses
