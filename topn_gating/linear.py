"""The gate's matrix product (docs/spec.md, step 2) and, on the CPU, its gradients in one pass over the tokens.

The operator ``linear`` (``csrc/cpu/linear-inl.h``) computes products of half types in float32 where this CPU has no
instructions for them. Logits of every other type are those of ``F.linear``, to the bit, so that tokens go where the peers
send them; their gradients come from ``linear_backward`` all the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_same_type
from .dtypes import autocast_dtype, without_autocast
from .eager import forward_mode_active, run, transforms_active
from .ops import Linear


def _slow_types() -> frozenset[torch.dtype]:
    """Half types whose products torch computes on this CPU number by number: up to a hundred times slower than float32's."""
    mkldnn = torch.ops.mkldnn if torch.backends.mkldnn.is_available() else None
    fast = {
        torch.bfloat16: mkldnn is not None and mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: mkldnn is not None and mkldnn._is_mkldnn_fp16_supported(),
    }
    return frozenset(dtype for dtype in fast if not fast[dtype])


SLOW_TYPES = _slow_types()


class TorchLinear(Linear):
    """The same with logits by torch."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)


class GateLinear(nn.Linear):
    """The gate's ``nn.Linear``.

    On a CPU it is also fast for half types that the processor has no instructions for, and its gradients are one kernel. A
    compiler gets torch's own product where there is a fast one.

    Args:
        dim: features of a token.
        num_gates: number of experts.
        bias: whether the logits have a bias, as those of gpt-oss.
        router_dtype: type that the product is computed in and the logits have, whatever autocast and the types of the
            operands are; by default that of autocast, or of ``x`` and the weight, which then must be the same.
        device: of the weight.
        dtype: of the weight.
    """

    def __init__(
        self,
        dim: int,
        num_gates: int,
        *,
        bias: bool = False,
        router_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_gates, bias=bias, device=device, dtype=dtype)
        self.router_dtype = router_dtype

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(…, n, e)`` of tokens ``(…, n, dim)``."""
        weight, bias = self.weight, self.bias
        if self.router_dtype is not None:
            operands = (None if t is None else t.to(self.router_dtype) for t in (x, weight, bias))
            with without_autocast(x.device):
                return _product(*operands)
        autocast = None if x.dtype == torch.float64 else autocast_dtype(x.device)
        if autocast is None or weight.dtype == torch.float64:
            check_same_type(x, weight, "gate's")
        if autocast is None:
            return _product(x, weight, bias)
        if x.is_cpu and autocast in SLOW_TYPES:
            return _product(x.to(autocast), weight.to(autocast), None if bias is None else bias.to(autocast))
        return F.linear(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` of operands of one type, by the fastest way."""
    logits: Tensor
    if x.is_cpu and x.dtype in SLOW_TYPES and not forward_mode_active():
        logits = Linear.call(x, weight)
        return logits if bias is None else logits + bias
    special = torch.compiler.is_compiling() or transforms_active() or forward_mode_active()
    if not x.is_cpu or bias is not None or special:
        logits = F.linear(x, weight, bias)
        return logits
    logits = run(TorchLinear, x, weight)
    return logits
