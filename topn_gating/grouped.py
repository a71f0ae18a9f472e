"""Products of groups of rows with one matrix each: what experts compute of the rows that a dropless routing gives them.

The operator ``grouped_linear`` has a kernel of its own on the CPU (``csrc/torch/grouped_linear.h``). On CUDA its kernels are
the functions here: ``torch.nn.functional.grouped_mm`` for the types and layouts that it takes, and a loop over the experts for
all others, which reads the offsets on the host.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_grouped
from .dtypes import autocast
from .ops import GroupedLinear, stored_by_columns
from .registry import implement_on_cuda

ALIGNMENT = 16  # bytes: of the matrices that grouped_mm takes, and of their strides


def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiplies groups of rows, one group for each expert, by the experts' matrices (MegaBlocks, arXiv 2211.15841).

    Row ``i`` of the group of expert ``g`` becomes ``rows[i] @ weight[g].T + bias[g]``. Rows from ``offsets[-1]`` on belong to
    no expert: they become 0, and their gradient is 0.

    Nothing is copied where ``weight`` is stored row after row or column after column, as a transposed view is; its gradient
    has the same layout. On the CPU, each result of a half type is rounded once. On CUDA, types other than bfloat16, and sizes
    that are no multiple of 16 bytes, are computed expert by expert, for which the offsets are copied to the host.

    Args:
        rows: ``(R, in)`` float32, float64, bfloat16 or float16, group after group.
        weight: ``(e, out, in)`` of the same type.
        offsets: ``(e,)`` int32: where each expert's rows end, as in :func:`torch.nn.functional.grouped_mm`. They must not
            decrease, and not exceed ``R``; what exceeds the limits is moved to them.
        bias: ``(e, out)`` of the same type.

    Returns:
        ``(R, out)``, which has first derivatives by reverse mode alone. Under autocast, the type is that of autocast.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument has the wrong shape or device.
    """
    check_grouped(rows, weight, offsets, bias)
    out: Tensor = GroupedLinear.call(autocast(rows), autocast(weight), None if bias is None else autocast(bias), offsets)
    return out


def forward(rows: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """``grouped_linear`` in torch's operations."""
    ends = _ends(offsets, rows)
    out = _product(rows, weight.transpose(1, 2), ends)
    if bias is not None:
        out += bias[_expert_of_row(ends, rows)]
    return _clear_rest(out, ends)


def backward(
    grad: Tensor, rows: Tensor, weight: Tensor, offsets: Tensor, wants_rows: bool, wants_weight: bool, wants_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``grouped_linear_backward`` in torch's operations. A gradient that is not wanted is empty."""
    ends = _ends(offsets, rows)
    return (
        _clear_rest(_product(grad, weight, ends), ends) if wants_rows else rows.new_empty(0),
        _weight_gradient(grad, rows, weight, ends) if wants_weight else weight.new_empty(0),
        _bias_gradient(grad, weight, ends) if wants_bias else weight.new_empty(0),
    )


def _ends(offsets: Tensor, rows: Tensor) -> Tensor:
    """``offsets`` within ``[0, R]``, and none below the one before."""
    return offsets.clamp(0, rows.shape[0]).cummax(0).values


def _ranges(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, and their rows, on the host."""
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        if end > begin:
            yield expert, slice(begin, end)
        begin = end


def _grouped_mm_takes(*operands: Tensor) -> bool:
    """Whether ``torch.nn.functional.grouped_mm`` has a kernel for operands of this type and layout."""

    def aligned(t: Tensor) -> bool:
        *_, first, second = t.stride()
        leading = first if second == 1 else second
        matrix = min(first, second) == 1 and leading >= t.shape[-1 if second == 1 else -2]
        return matrix and leading * t.itemsize % ALIGNMENT == 0 and t.data_ptr() % ALIGNMENT == 0

    return all(t.dtype == torch.bfloat16 and t.numel() > 0 and aligned(t) for t in operands)


def _product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Products of each group with its matrix ``(in, out)``; rows past the last group are undefined."""
    if _grouped_mm_takes(rows, matrices):
        return F.grouped_mm(rows, matrices, offs=ends)
    out = rows.new_empty((rows.shape[0], matrices.shape[2]))
    for expert, group in _ranges(ends):
        torch.mm(rows[group], matrices[expert], out=out[group])
    return out


def _weight_gradient(grad: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    by_columns = stored_by_columns(weight)
    left, right = (rows, grad) if by_columns else (grad, rows)
    if _grouped_mm_takes(grad, rows):
        gradient = F.grouped_mm(left.t(), right, offs=ends)
    else:
        gradient = left.new_zeros((len(ends), left.shape[1], right.shape[1]))
        for expert, group in _ranges(ends):
            torch.mm(left[group].t(), right[group], out=gradient[expert])
    return gradient.transpose(1, 2) if by_columns else gradient


def _bias_gradient(grad: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if _grouped_mm_takes(grad):  # a sum of rows is their product with ones: in float32, and rounded once
        ones = grad.new_ones((grad.shape[0], ALIGNMENT // grad.itemsize))
        return F.grouped_mm(grad.t(), ones, offs=ends)[..., 0]
    gradient = weight.new_zeros(weight.shape[:2])
    for expert, group in _ranges(ends):
        gradient[expert] = grad[group].sum(0)
    return gradient


def _row_numbers(rows: Tensor) -> Tensor:
    return torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)


def _expert_of_row(ends: Tensor, rows: Tensor) -> Tensor:
    """The expert of each row; of rows past the last group, any."""
    return torch.searchsorted(ends, _row_numbers(rows), right=True).clamp_(max=len(ends) - 1)


def _clear_rest(out: Tensor, ends: Tensor) -> Tensor:
    """Writes zeros to the rows past the last group."""
    return out.masked_fill_((_row_numbers(out) >= ends[-1]).unsqueeze(1), 0)


implement_on_cuda("grouped_linear", forward)
implement_on_cuda("grouped_linear_backward", backward)
