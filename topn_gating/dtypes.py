"""Types: what the kernels read, what a type is computed in, and what autocast makes of it."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

FLOAT_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
COMPUTE_TYPES = (torch.float32, torch.float64)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that ``dtype`` is computed in: float64 for float64, float32 for every other."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast(t: Tensor) -> Tensor:
    """``t`` as a product under the current autocast would read it: a float type but float64 becomes the autocast type."""
    dtype = autocast_dtype(t.device)
    return t if dtype is None or t.dtype == torch.float64 or not t.is_floating_point() else t.to(dtype)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _has_autocast(kind: str) -> bool:
    """Whether a kind of device has autocast, in a form that torch 2.10 compiles."""
    return torch.amp.is_autocast_available(kind)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The type that products are computed in on ``device``, None where autocast is off."""
    kind = device.type
    if not _has_autocast(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast is off on ``device``."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)
