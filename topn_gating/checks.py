"""What a user can get wrong, said once, before anything runs: every message names the argument, what it got, what it takes."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def threshold_per_rank(name: str, threshold: float | tuple[float, ...], top_n: int, num_gates: int) -> tuple[float, ...]:
    """One threshold for each rank from rank 1 on, checked; a longer tuple of at most ``num_gates - 1`` is cut."""
    per_rank = isinstance(threshold, tuple | list)
    values = tuple(threshold) if per_rank else (threshold,)
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        raise TypeError(f"{name} must be a float or a tuple of floats, got {threshold!r}")
    if per_rank and not top_n - 1 <= len(values) <= num_gates - 1:
        raise ValueError(
            f"{name} must be a float or a tuple of {top_n - 1} (top_n - 1) to {num_gates - 1} (num_gates - 1) floats, "
            f"got {len(values)}"
        )
    if not all(v >= 0 for v in values):
        raise ValueError(f"{name} must not be negative or NaN, got {threshold!r}")
    return values[: top_n - 1] if per_rank else values * (top_n - 1)


def check_positive(name: str, value: float) -> None:
    """Raises unless ``value`` is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymFloat | torch.SymInt):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be finite and above 0, got {value}")


def check_count(name: str, value: int) -> None:
    """Raises unless ``value`` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_top_n(top_n: int, num_gates: int) -> None:
    """Raises unless ``1 <= top_n <= num_gates``."""
    check_count("top_n", top_n)
    if top_n > num_gates:
        raise ValueError(f"top_n must be at most num_gates ({num_gates}), got {top_n}")


def check_floating(name: str, t: Tensor) -> None:
    """Raises unless ``t`` is a tensor of one of the four types that the kernels take."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {t.dtype}")


def check_logits(logits: Tensor, top_n: int) -> None:
    """Raises unless ``logits`` is ``(…, n, e)`` with ``top_n`` experts or more."""
    check_floating("logits", logits)
    if logits.dim() < 2 or logits.shape[-1] < 1:
        raise ValueError(f"logits must have shape (..., tokens, experts) with an expert or more, got {tuple(logits.shape)}")
    check_top_n(top_n, logits.shape[-1])


def check_tensor(name: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raises unless ``t`` is a tensor of that shape, dtype and device."""
    if not isinstance(t, Tensor) or t.dtype != dtype:
        raise TypeError(f"{name} must be a {dtype} tensor, got {t.dtype if isinstance(t, Tensor) else type(t).__name__}")
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(t.shape)}")
    if t.device != device:
        raise ValueError(f"{name} must be on {device}, got {t.device}")


def check_rows(name: str, t: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raises unless ``t`` holds rows of features for ``shape``, of a type and on the device that the kernels take."""
    check_floating(name, t)
    if t.dim() == 0 or tuple(t.shape[:-1]) != tuple(shape):
        rows = ", ".join(map(str, shape))
        raise ValueError(f"{name} must have shape ({rows}, features) for this routing, got {tuple(t.shape)}")
    if t.device != device:
        raise ValueError(f"{name} must be on {device} with its routing, got {t.device}")
