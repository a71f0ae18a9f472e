"""Two ways to balance experts from outside the routing: a bias that is moved, and a loss that rides on a tensor."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .checks import check_floating, check_positive, check_tensor


@torch.no_grad()
def update_select_bias_(bias: Tensor, load: Tensor, rate: float = 1e-3) -> Tensor:
    """Moves each expert's bias by ``rate`` towards an even load, in place (loss-free balancing, arXiv 2408.15664).

    ``bias += rate * sign(mean(load) - load)``, and then its mean is taken away, which changes no choice. Call it once for an
    optimizer step, after the sum of ``load`` over microbatches and ranks. The module does not do it in ``forward``: activation
    checkpointing runs that twice, and a rank knows its own load alone.

    Args:
        bias: ``(e,)`` float32, :attr:`topn_gating.TopNGating.select_bias`.
        load: ``(e,)`` pairs routed to each expert, of any type of numbers: for example ``routing.demand`` over all groups.
        rate: how far a bias moves.

    Returns:
        ``bias``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument has the wrong value, shape or device.
    """
    rate = check_positive("rate", rate)
    if not isinstance(bias, Tensor) or bias.dim() != 1:
        raise ValueError(f"bias must be a tensor of shape (experts,), got {getattr(bias, 'shape', type(bias).__name__)}")
    check_tensor("bias", bias, bias.shape, torch.float32, bias.device)
    if not isinstance(load, Tensor):
        raise TypeError(f"load must be a tensor, got {type(load).__name__}")
    check_tensor("load", load, bias.shape, load.dtype, bias.device)
    load = load.double()
    bias += rate * torch.sign(load.mean() - load).float()
    bias -= bias.mean()
    return bias


class _WithLoss(Function):
    """Identity of ``x``, whose backward gives ``loss`` the gradient ``scale``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, loss: Tensor, scale: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        _x, loss, ctx.scale = inputs
        ctx.save_for_backward(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (loss,) = ctx.saved_tensors
        return grad, torch.full_like(loss, ctx.scale), None


def with_loss(tensor: Tensor, loss: Tensor, scale: float = 1.0) -> Tensor:
    """``tensor`` itself, whose backward adds the gradient of ``scale * loss``: for pipelines that cannot return a loss.

    Megatron-core has the same as ``MoEAuxLossAutoScaler``. Without a backward pass through the result the loss has no effect.

    Args:
        tensor: any floating point tensor on the way to the model's loss, for example the layer's output.
        loss: ``()``, for example ``routing.balance_loss``.
        scale: factor of the loss: its coefficient, times the factor of a gradient scaler if there is one.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: ``loss`` is no scalar, or ``scale`` is not positive.
    """
    check_floating("tensor", tensor)
    check_floating("loss", loss)
    if loss.dim():
        raise ValueError(f"loss must have shape (), got {tuple(loss.shape)}")
    result: Tensor = _WithLoss.apply(tensor, loss, check_positive("scale", scale))
    return result
