"""The gate's matrix product."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from .dtypes import autocast_dtype


def _slow_types() -> frozenset[torch.dtype]:
    """Half types whose products torch computes on this CPU number by number: up to a hundred times slower than float32's."""
    mkldnn = torch.ops.mkldnn if torch.backends.mkldnn.is_available() else None
    fast = {
        torch.bfloat16: mkldnn is not None and mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: mkldnn is not None and mkldnn._is_mkldnn_fp16_supported(),
    }
    return frozenset(dtype for dtype in fast if not fast[dtype])


SLOW_TYPES = _slow_types()


class FloatLinear(Function):
    """``F.linear`` of half types as products of float32, each result rounded once. Keeps no float32 copy for the backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight):
        return F.linear(x.float(), weight.float()).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            grad, grad_x, grad_weight = grad.float(), None, None
            if ctx.needs_input_grad[0]:
                grad_x = (grad @ weight.float()).to(x.dtype)
            if ctx.needs_input_grad[1]:
                grad_weight = (grad.flatten(0, -2).t() @ x.float().flatten(0, -2)).to(weight.dtype)
        return grad_x, grad_weight


class GateLinear(nn.Linear):
    """``nn.Linear`` without a bias, also fast for half types on a CPU that has no instructions for them.

    Args:
        dim: features of a token.
        num_gates: number of experts.
        device: of the weight.
        dtype: of the weight.
    """

    def __init__(
        self, dim: int, num_gates: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(dim, num_gates, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(…, n, e)`` of tokens ``(…, n, dim)``, of the type that autocast asks for or of ``x``'s."""
        autocast = autocast_dtype(x.device)
        dtype = autocast or x.dtype
        if x.device.type != "cpu" or dtype not in SLOW_TYPES or not (autocast or self.weight.dtype == dtype):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return FloatLinear.apply(x.to(dtype), self.weight.to(dtype))
