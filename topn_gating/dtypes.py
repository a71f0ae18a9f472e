"""Types: what a type is computed in, and what autocast makes of it."""

import torch
from torch import Tensor


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that ``dtype`` is computed in: float64 for float64, float32 for every other."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast(t: Tensor) -> Tensor:
    """``t`` as an einsum under the current autocast would read it: a float type but float64 becomes the autocast type."""
    dtype = autocast_dtype(t.device)
    return t if dtype is None or t.dtype == torch.float64 or not t.is_floating_point() else t.to(dtype)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The type that products are computed in on ``device``, None where autocast is off."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)
