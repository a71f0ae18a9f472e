"""The gate's matrix product (SPEC step 2) and, on the CPU, its gradients in one pass over the tokens.

The operator ``linear`` (``csrc/cpu/linear.cpp``) computes in float32 what torch has no instructions for on this CPU. Logits of
every other type are those of ``F.linear``, to the bit, so that tokens go where the peers send them; their gradients come from
``linear_backward`` all the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function, forward_ad

from . import ops
from .dtypes import autocast_dtype, real_dtype

_ops = torch.ops.topn_gating


def _slow_types() -> frozenset[torch.dtype]:
    """Half types whose products torch computes on this CPU number by number: up to a hundred times slower than float32's."""
    mkldnn = torch.ops.mkldnn if torch.backends.mkldnn.is_available() else None
    fast = {
        torch.bfloat16: mkldnn is not None and mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: mkldnn is not None and mkldnn._is_mkldnn_fp16_supported(),
    }
    return frozenset(dtype for dtype in fast if not fast[dtype])


SLOW_TYPES = _slow_types()


class Linear(Function):
    """``linear``: logits ``(…, e)`` of tokens ``(…, d)`` and a weight ``(e, d)``."""

    @staticmethod
    def forward(x, weight):
        return ops.below_autograd(_ops.linear.default, x, weight)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad
        if torch.is_grad_enabled():  # for a second derivative, which torch's own products have
            grad, rows, real_weight = (t.to(real_dtype(x.dtype)) for t in (grad, x, weight))
            with torch.autocast("cpu", enabled=False):
                grad_x = grad @ real_weight if wants_x else None
                grad_weight = grad.flatten(0, -2).t() @ rows.flatten(0, -2) if wants_weight else None
        else:
            grad_x, grad_weight = _ops.linear_backward.default(grad, x, weight, wants_x, wants_weight)
        return grad_x.to(x.dtype) if wants_x else None, grad_weight.to(x.dtype) if wants_weight else None


class TorchLinear(Linear):
    """The same with logits by torch."""

    @staticmethod
    def forward(x, weight):
        return F.linear(x, weight)


Linear.vmap = staticmethod(ops.vmap_rule(Linear.apply))
torch.library.register_autograd("topn_gating::linear", Linear.backward, setup_context=Linear.setup_context)
torch.library.register_vmap("topn_gating::linear", Linear.vmap)
torch.library.register_vmap("topn_gating::linear_backward", ops.vmap_rule(_ops.linear_backward))


class GateLinear(nn.Linear):
    """``nn.Linear`` without a bias: the gate's.

    On a CPU it is also fast for half types that the processor has no instructions for, and its gradients are one kernel. A
    compiler gets torch's own product where there is a fast one.

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
        if x.device.type != "cpu" or not (autocast or self.weight.dtype == dtype):
            return super().forward(x)
        compiles = torch.compiler.is_compiling()
        if dtype in SLOW_TYPES:
            operands = x.to(dtype), self.weight.to(dtype)
            return _ops.linear.default(*operands) if compiles else ops.run(Linear, *operands)
        transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
        if autocast or compiles or transformed:
            return super().forward(x)
        return ops.run(TorchLinear, x, self.weight)
