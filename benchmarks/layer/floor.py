"""The lower bound of a layer's time: its matrix products alone."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from rounds import Step
from torch import Tensor

from .contenders import Contender
from .models import router

Product = tuple[Tensor, Tensor, Tensor]  # factors, and where the product goes


class Linear(NamedTuple):
    """A linear layer: its input ``(rows, in)``, weight ``(out, in)``, and output ``(rows, out)``."""

    x: Tensor
    weight: Tensor
    out: Tensor

    @classmethod
    def make(cls, x: Tensor, weight: Tensor) -> "Linear":
        """Returns the layer with memory for its output."""
        return cls(x, weight, torch.randn(x.shape[0], weight.shape[0], dtype=x.dtype))


class Floor(Contender):
    """The matrix products of router, experts and shared experts, one after another."""

    name = "floor: matrix products"
    about = (
        "the layer's matrix products by torch, an expert at a time, at the same group sizes, into memory allocated beforehand; "
        "where groups are small, products of several experts at once can be faster"
    )

    def step(self, tokens: int, training: bool) -> Step:
        linears = list(self.layers(tokens))
        products = [forward(linear) for linear in linears]
        if training:
            products += [product for linear in reversed(linears) for product in backward(linear)]

        def step() -> tuple[()]:
            for a, b, out in products:
                torch.mm(a, b, out=out)
            return ()

        return step

    def difference(self) -> None:
        return None

    @torch.no_grad()
    def layers(self, tokens: int) -> Iterator[Linear]:
        """Yields every linear layer; each expert with pairs has two."""
        block, dtype = self.layer.block, self.layer.dtype
        x = self.layer.x.detach()[0, :tokens]
        in_float = router(block)(x)[0].dtype  # DeepSeek-V3's router computes in float32
        yield Linear.make(x.to(in_float), router(block).weight.detach().to(in_float))

        sizes = self.layer.group_sizes(tokens)
        ends = [0, *itertools.accumulate(sizes)]
        up, down = block.experts.gate_up_proj.detach(), block.experts.down_proj.detach()
        if "experts.gate_up_proj_bias" in self.layer.weights:  # gpt-oss has its weights transposed
            up, down = up.mT, down.mT
        for weight in (up, down):
            rows = torch.randn(ends[-1], weight.shape[2], dtype=dtype)
            for i, (start, end) in enumerate(itertools.pairwise(ends)):
                if end > start:
                    yield Linear.make(rows[start:end], weight[i])

        if hasattr(block, "shared_experts"):
            for module in (block.shared_experts.gate_proj, block.shared_experts.up_proj, block.shared_experts.down_proj):
                weight = module.weight.detach()
                yield Linear.make(torch.randn(tokens, weight.shape[1], dtype=dtype), weight)


def forward(linear: Linear) -> Product:
    """Returns the product of a linear layer."""
    return linear.x, linear.weight.T, linear.out


def backward(linear: Linear) -> Iterator[Product]:
    """Yields the products that give the gradients of a linear layer's input and weight, from that of its output."""
    yield linear.out, linear.weight, torch.empty_like(linear.x)
    if linear.weight.is_contiguous():
        yield linear.out.T, linear.x, torch.empty_like(linear.weight)
    else:
        yield linear.x.T, linear.out, torch.empty_like(linear.weight.T)
