"""Comparisons of the operator tests: to the bit, relative, near, and for any schedule; and other layouts of a tensor."""

import torch
from torch import Tensor

from topn_gating.dtypes import compute_dtype


def assert_same_bits(actual, expected) -> None:
    """Equal to the bit, NaN and the sign of zero included; tensors or sequences of them."""
    if not isinstance(actual, Tensor):
        for a, b in zip(actual, expected, strict=True):
            assert_same_bits(a, b)
        return
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.itemsize]
    torch.testing.assert_close(actual.contiguous().view(bits), expected.contiguous().view(bits), rtol=0, atol=0)


def assert_relative(actual: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """docs/spec.md, numerics: relative error of each element, 1e-6 for float32 and 1e-12 for float64."""
    tolerance = tolerance or (1e-12 if actual.dtype == torch.float64 else 1e-6)
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=0, equal_nan=True)


def assert_near(actual: Tensor, expected: Tensor, largest: float | None = None) -> None:
    """Sums that may cancel: error within a few roundings of the type, relative to ``largest``: the largest element."""
    computed, info = 1e-12 if actual.dtype == torch.float64 else 2e-6, torch.finfo(actual.dtype)
    rounding = 0.0 if compute_dtype(actual.dtype) == actual.dtype else info.eps
    if largest is None:
        largest = expected.abs().max().item() if expected.numel() else 0.0
    least = info.smallest_normal * info.eps  # denormals are its multiples
    torch.testing.assert_close(actual.double(), expected, rtol=computed + rounding, atol=computed * largest + least)


def assert_same_for_any_schedule(run) -> None:
    """``run()`` gives the same bits again, for any number of threads, and under deterministic algorithms."""
    expected = run()
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        for count, flag in ((1, False), (2, False), (2, False), (3, False), (2, True)):
            torch.set_num_threads(count)
            torch.use_deterministic_algorithms(flag)
            assert_same_bits(run(), expected)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


def spread(t: Tensor) -> Tensor:
    """The same values in a layout with no stride of a contiguous tensor."""
    if t.dim() == 0:
        return t
    view = torch.stack([t, torch.ones_like(t)], -1).transpose(0, -2).contiguous()[..., 0].transpose(0, -1)  # and gaps of 2
    assert t.numel() < 2 or not view.is_contiguous()
    return view
