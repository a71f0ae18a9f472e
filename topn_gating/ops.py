"""The operators: for each one class, with all that torch has to know of it beside its kernels (:mod:`topn_gating.registry`).

Importing this module loads the extension, which defines ``torch.ops.topn_gating.*`` (schemas in ``csrc/torch/schema.h``,
meaning in ``csrc/router.h``).

Symbols in shapes: ``n`` tokens of a group, ``e`` experts, ``k`` ranks (``top_n``), ``C`` slots (capacity), ``R`` rows of all
experts in the dropless layout, ``d`` features; ``…`` are the groups, any number of leading dimensions.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .dtypes import COMPUTE_TYPES, FLOAT_TYPES, compute_dtype
from .registry import Operator, expect, expect_tensor, operator

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        "topn_gating._C, the compiled extension, is missing or does not fit this torch; "
        "build it with `pip install --no-build-isolation -e .` in the source tree"
    ) from error

build_info = _C.build_info

Policy = Literal["random", "threshold", "all", "none"]
Score = Literal["softmax", "sigmoid", "sqrtsoftplus"]
GroupScore = Literal["top2", "max"]
# In the order of the enums in csrc/router.h.
POLICIES: tuple[Policy, ...] = get_args(Policy)
SCORES: tuple[Score, ...] = get_args(Score)
GROUP_SCORES: tuple[GroupScore, ...] = get_args(GroupScore)
INT_MAX = 2**31 - 1


def dropless_rows(pairs: int, num_gates: int, align: int) -> int:
    """Rows ``R`` of all experts in the dropless layout: the most that ``pairs`` can take, a multiple of ``align``."""
    return pairs if align == 1 else (pairs + (num_gates + 1) * (align - 1)) // align * align


# What the fakes refuse: what csrc/torch refuses of tensors with data.


def _expect_dtype(name: str, dtype: torch.dtype, types: Sequence[torch.dtype] = FLOAT_TYPES) -> None:
    expect(dtype in types, f"{name} must be one of {', '.join(map(str, types))}, got {dtype}")


def _logits_shape(logits: Tensor, top_n: int) -> torch.Size:
    """Checks the logits, and returns their shape."""
    _expect_dtype("logits", logits.dtype)
    expect(logits.dim() >= 2, "logits must have shape (..., tokens, experts)")
    experts = logits.shape[-1]
    expect(1 <= top_n <= experts, f"top_n must be from 1 to the number of experts ({experts}), got {top_n}")
    return logits.shape


def _expect_count(name: str, count: int) -> None:
    for in_range in (count >= 1, count <= INT_MAX):  # each alone: together they would be a Python branch on a symbol
        expect(in_range, f"{name} must be from 1 to 2^31 - 1, got {count}")


def _expect_pairs(name: str, t: Tensor, num_gates: int, capacity: int | None) -> None:
    """Checks the sizes of ``(…, n, k)`` tensors beside the experts' rows, without a capacity those of the dropless layout."""
    expect(t.dim() >= 2, f"{name} must have shape (..., tokens, top_n)")
    top_n = t.shape[-1]
    tokens = math.prod(t.shape[:-1]) if capacity is None else t.shape[-2]
    _expect_count("num_gates", num_gates)
    if capacity is not None:
        _expect_count("capacity", capacity)
    expect(top_n >= 1, "top_n must be at least 1, got 0")
    expect(tokens * top_n <= INT_MAX, f"tokens * top_n must be below 2^31, got {tokens} * {top_n}")


def _expect_assigned(expert: Tensor, slot: Tensor, source: Tensor, offsets: Tensor | None = None) -> None:
    """Checks ``expert`` and ``slot`` ``(…, n, k)`` beside ``source`` ``(…, e, C)``, or ``(R,)`` and ``offsets`` ``(e,)``."""
    expect(expert.dim() >= 2, "expert must have shape (..., tokens, top_n)")
    if offsets is None:
        expect(source.dim() == expert.dim(), "source must have shape (..., experts, capacity), like expert")
        _expect_pairs("expert", expert, *source.shape[-2:])
        expect_tensor("source", source, (*expert.shape[:-2], *source.shape[-2:]), torch.int32)
    else:
        expect(source.dim() == 1, "source must have shape (rows) beside offsets")
        expect(offsets.dim() == 1, "offsets must have shape (experts)")
        _expect_pairs("expert", expert, offsets.shape[0], None)
        expect_tensor("source", source, source.shape, torch.int32)
        expect_tensor("offsets", offsets, offsets.shape, torch.int32)
    expect_tensor("expert", expert, expert.shape, torch.int32)
    expect_tensor("slot", slot, expert.shape, torch.int32)


def _expect_rows(name: str, t: Tensor, shape: Sequence[int]) -> None:
    """Checks rows of features, one for each place of ``shape``."""
    _expect_dtype(name, t.dtype)
    expect(t.dim() >= 1, f"{name} must have a dimension of features")
    expect_tensor(name, t, (*shape, t.shape[-1]), t.dtype)


class GateOptions(NamedTuple):
    """What ``gate`` and ``gate_backward`` have in common, in the schema's order (``csrc/router.h``, GateOptions)."""

    eps: float
    noise_mult: float = 1.0
    soft: bool = False
    score: int = SCORES.index("softmax")
    expert_groups: int = 1
    top_groups: int = 1
    group_score: int = GROUP_SCORES.index("top2")
    normalize: bool = True
    scale: float = 1.0
    all_ranks: bool = False


def _expect_options(options: GateOptions, experts: int, top_n: int) -> None:
    expect(0 <= options.score < len(SCORES), f"score must be from 0 to {len(SCORES) - 1}, got {options.score}")
    expect(not options.soft or options.score == 0, "soft must be false unless score is 0, the softmax")
    groups, open_groups = options.expert_groups, options.top_groups
    message = f"expert_groups must divide the number of experts ({experts}), got {groups}"
    expect(groups >= 1, message)
    expect(experts % groups == 0, message)
    expect(1 <= open_groups <= groups, f"top_groups must be from 1 to expert_groups ({groups}), got {open_groups}")
    most = open_groups * (experts // groups)
    expect(top_n <= most, f"top_n must be at most the number of experts of top_groups ({most}), got {top_n}")
    in_range = 0 <= options.group_score < len(GROUP_SCORES)
    expect(in_range, f"group_score must be from 0 to {len(GROUP_SCORES) - 1}, got {options.group_score}")


@operator("gate")
class Gate(Operator):
    """``gate``: noise, gates, stable top-n, weights, losses and statistics (docs/spec.md, steps 3 to 6, 10 and 11)."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, noise, token_mask, _select_bias, _given, _top_n, *ctx.options, ctx.losses, _statistics = inputs
        _weight, expert, _importance, counts, _balance_loss, _router_z_loss, statistics = output
        ctx.mark_non_differentiable(statistics)
        ctx.save_for_backward(logits, noise, token_mask, expert, counts)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any,
        grad_weight: Tensor | None,
        _expert: None,
        grad_importance: Tensor | None,
        _counts: None,
        grad_balance_loss: Tensor | None,
        grad_router_z_loss: Tensor | None,
        _statistics: None,
    ) -> tuple[Tensor]:
        if not ctx.losses:  # constants
            grad_importance = grad_balance_loss = grad_router_z_loss = None
        grads = grad_weight, grad_importance, grad_balance_loss, grad_router_z_loss
        return (Gate.run_backward(*grads, *ctx.saved_tensors, *ctx.options),)

    @staticmethod
    def fake(
        logits: Tensor,
        noise: Tensor | None,
        token_mask: Tensor | None,
        select_bias: Tensor | None,
        given: Tensor | None,
        top_n: int,
        *options: Any,
    ) -> tuple[Tensor, ...]:
        *common, _losses, statistics = options
        *lead, n, e = _logits_shape(logits, top_n)
        _expect_options(GateOptions(*common), e, top_n)
        dtype = compute_dtype(logits.dtype)
        expect_tensor("noise", noise, logits.shape, dtype)
        expect_tensor("token_mask", token_mask, logits.shape[:-1], torch.bool)
        expect_tensor("select_bias", select_bias, (e,), torch.float32)
        expect_tensor("given", given, (*lead, n, top_n), torch.int32)
        return (
            logits.new_empty((*lead, n, top_n), dtype=dtype),
            logits.new_empty((*lead, n, top_n), dtype=torch.int32),
            logits.new_empty((*lead, e), dtype=dtype),
            logits.new_empty((*lead, e), dtype=torch.int32),
            logits.new_empty((), dtype=dtype),
            logits.new_empty((), dtype=dtype),
            logits.new_empty((3 if statistics else 0,), dtype=dtype),
        )

    @staticmethod
    def fake_backward(
        grad_weight: Tensor | None,
        grad_importance: Tensor | None,
        grad_balance_loss: Tensor | None,
        grad_router_z_loss: Tensor | None,
        logits: Tensor,
        noise: Tensor | None,
        token_mask: Tensor | None,
        expert: Tensor,
        counts: Tensor,
        *options: Any,
    ) -> Tensor:
        expect(expert.dim() >= 2, "expert must have shape (..., tokens, top_n)")
        top_n = expert.shape[-1]
        *lead, n, e = _logits_shape(logits, top_n)
        _expect_options(GateOptions(*options), e, top_n)
        dtype = compute_dtype(logits.dtype)
        expect_tensor("grad_weight", grad_weight, (*lead, n, top_n), dtype)
        expect_tensor("grad_importance", grad_importance, (*lead, e), dtype)
        expect_tensor("grad_balance_loss", grad_balance_loss, (), dtype)
        expect_tensor("grad_router_z_loss", grad_router_z_loss, (), dtype)
        expect_tensor("noise", noise, logits.shape, dtype)
        expect_tensor("token_mask", token_mask, logits.shape[:-1], torch.bool)
        expect_tensor("expert", expert, (*lead, n, top_n), torch.int32)
        expect_tensor("counts", counts, (*lead, e), torch.int32)
        return logits.new_empty(logits.shape)


@operator("assign")
class Assign(Operator):
    """``assign``: threshold masking and the assignment of slots (docs/spec.md, steps 7 and 8)."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _kept, slot, *_ = output
        ctx.save_for_backward(slot)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_kept: Tensor | None, *_integers: None) -> tuple[Tensor | None]:
        return (None if grad_kept is None else Assign.run_backward(grad_kept, *ctx.saved_tensors),)

    @staticmethod
    def fake(
        weight: Tensor,
        expert: Tensor,
        draws: Tensor | None,
        threshold: Tensor | None,
        token_mask: Tensor | None,
        keys: Tensor | None,
        num_gates: int,
        capacity: int | None,
        align: int,
        policy: int,
        eps: float,
    ) -> tuple[Tensor, ...]:
        _expect_pairs("weight", weight, num_gates, capacity)
        _expect_count("align", align)
        _expect_dtype("weight", weight.dtype, COMPUTE_TYPES)
        expect(0 <= policy < len(POLICIES), f"policy must be from 0 to {len(POLICIES) - 1}, got {policy}")
        chosen = POLICIES[policy]
        expect(draws is not None or chosen != "random", "draws must be given for the random policy")
        needs_threshold = chosen in ("random", "threshold")
        expect(threshold is not None or not needs_threshold, "threshold must be given for the random and threshold policies")
        *lead, n, top_n = weight.shape
        expect_tensor("expert", expert, weight.shape, torch.int32)
        expect_tensor("draws", draws, weight.shape, weight.dtype)
        expect_tensor("threshold", threshold, (top_n,), weight.dtype)
        expect_tensor("token_mask", token_mask, (*lead, n), torch.bool)
        expect_tensor("keys", keys, weight.shape, weight.dtype)
        if capacity is None:
            expect(keys is None, "keys must be left out without a capacity, where every pair gets a slot")
            rows = dropless_rows(weight.numel(), num_gates, align)
            message = "tokens * top_n + num_gates * (align - 1) must be below 2^31, rounded up to a multiple of align"
            expect(rows <= INT_MAX, f"{message}, got {weight.numel()} + {num_gates} * {align - 1}")
            shapes: tuple[tuple[int, ...], ...] = (rows,), (num_gates,), (num_gates,)
        else:
            shapes = (*lead, num_gates, capacity), (*lead, num_gates), (0,)
        return (
            weight.new_empty(weight.shape),
            weight.new_empty(weight.shape, dtype=torch.int32),
            *(weight.new_empty(shape, dtype=torch.int32) for shape in shapes),
        )

    @staticmethod
    def fake_backward(grad_kept: Tensor, slot: Tensor) -> Tensor:
        _expect_dtype("grad_kept", grad_kept.dtype, COMPUTE_TYPES)
        expect_tensor("grad_kept", grad_kept, slot.shape, grad_kept.dtype)
        expect_tensor("slot", slot, slot.shape, torch.int32)
        return grad_kept.new_empty(grad_kept.shape)


@operator("dense")
class Dense(Operator):
    """``dense``: the two ``(…, n, e, C)`` tensors (docs/spec.md, step 9)."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _weight, *indices, _dtype, ctx.straight_through = inputs
        ctx.save_for_backward(*indices)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_dispatch: Tensor | None, grad_combine: Tensor | None) -> tuple[Tensor | None]:
        if not ctx.straight_through:
            grad_dispatch = None
        if grad_dispatch is None and grad_combine is None:
            return (None,)
        return (Dense.run_backward(grad_dispatch, grad_combine, *ctx.saved_tensors),)

    @staticmethod
    def fake(
        weight: Tensor, expert: Tensor, slot: Tensor, source: Tensor, dtype: torch.dtype, straight_through: bool
    ) -> tuple[Tensor, Tensor]:
        _expect_dtype("dtype", dtype)
        _expect_assigned(expert, slot, source)
        expect_tensor("weight", weight, expert.shape, compute_dtype(dtype))
        shape = (*expert.shape[:-1], *source.shape[-2:])
        return weight.new_empty(shape, dtype=dtype), weight.new_empty(shape, dtype=dtype)

    @staticmethod
    def fake_backward(
        grad_dispatch: Tensor | None, grad_combine: Tensor | None, expert: Tensor, slot: Tensor, source: Tensor
    ) -> Tensor:
        grad = grad_dispatch if grad_combine is None else grad_combine
        if grad is None:
            raise RuntimeError("grad_dispatch or grad_combine must be given")
        _expect_assigned(expert, slot, source)
        _expect_dtype("grad_combine", grad.dtype)
        shape = (*slot.shape[:-1], *source.shape[-2:])
        expect_tensor("grad_dispatch", grad_dispatch, shape, grad.dtype)
        expect_tensor("grad_combine", grad_combine, shape, grad.dtype)
        return slot.new_empty(slot.shape, dtype=compute_dtype(grad.dtype))


@operator("dispatch")
class Dispatch(Operator):
    """``dispatch``: token rows to the experts' rows."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _weight, *indices, straight_through = inputs
        ctx.save_for_backward(x if straight_through and ctx.needs_input_grad[1] else None, *indices)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor | None]:
        x, *indices = ctx.saved_tensors
        grad_x, grad_weight = Dispatch.run_backward(grad_y, x, *indices)
        return grad_x, None if x is None else grad_weight

    @staticmethod
    def fake(
        x: Tensor,
        weight: Tensor,
        expert: Tensor,
        slot: Tensor,
        source: Tensor,
        offsets: Tensor | None,
        straight_through: bool,
    ) -> Tensor:
        _expect_assigned(expert, slot, source, offsets)
        _expect_rows("x", x, expert.shape[:-1])
        expect_tensor("weight", weight, expert.shape, compute_dtype(x.dtype))
        return x.new_empty((*source.shape, x.shape[-1]))

    @staticmethod
    def fake_backward(
        grad_y: Tensor, x: Tensor | None, expert: Tensor, slot: Tensor, source: Tensor, offsets: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        _expect_assigned(expert, slot, source, offsets)
        _expect_rows("grad_y", grad_y, source.shape)
        tokens = (*slot.shape[:-1], grad_y.shape[-1])
        expect_tensor("x", x, tokens, grad_y.dtype)
        weights = (0,) if x is None else slot.shape
        return grad_y.new_empty(tokens), grad_y.new_empty(weights, dtype=compute_dtype(grad_y.dtype))


@operator("combine")
class Combine(Operator):
    """``combine``: the experts' rows back to token rows, weighted."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor]:
        grad_y, grad_weight = Combine.run_backward(grad_out, *ctx.saved_tensors)
        return grad_y, grad_weight

    @staticmethod
    def fake(y: Tensor, weight: Tensor, expert: Tensor, slot: Tensor, source: Tensor, offsets: Tensor | None) -> Tensor:
        _expect_assigned(expert, slot, source, offsets)
        _expect_rows("y", y, source.shape)
        expect_tensor("weight", weight, expert.shape, compute_dtype(y.dtype))
        return y.new_empty((*slot.shape[:-1], y.shape[-1]))

    @staticmethod
    def fake_backward(
        grad_out: Tensor,
        y: Tensor,
        weight: Tensor,
        expert: Tensor,
        slot: Tensor,
        source: Tensor,
        offsets: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        out = Combine.fake(y, weight, expert, slot, source, offsets)
        expect_tensor("grad_out", grad_out, out.shape, y.dtype)
        return y.new_empty(y.shape), weight.new_empty(weight.shape)


@operator("linear")
class Linear(Operator):
    """``linear``: logits ``(…, e)`` of tokens ``(…, d)`` and a weight ``(e, d)`` (docs/spec.md, step 2). On the CPU alone."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad
        if not torch.is_grad_enabled():
            grad_x, grad_weight = Linear.run_backward(grad, x, weight, wants_x, wants_weight)
            return grad_x if wants_x else None, grad_weight if wants_weight else None
        grad, rows, matrix = (t.to(compute_dtype(x.dtype)) for t in (grad, x, weight))
        with torch.autocast("cpu", enabled=False):  # torch's own products, which have a second derivative
            return (
                (grad @ matrix).to(x.dtype) if wants_x else None,
                (grad.flatten(0, -2).t() @ rows.flatten(0, -2)).to(x.dtype) if wants_weight else None,
            )

    @staticmethod
    def fake(x: Tensor, weight: Tensor) -> Tensor:
        matrix = weight.dim() == 2 and weight.shape[0] >= 1 and weight.shape[1] >= 1
        expect(matrix, "weight must have shape (experts, features), one of each or more")
        expect(x.dim() >= 1, "x must have shape (..., features)")
        _expect_rows("x", x, x.shape[:-1])
        expect_tensor("weight", weight, (weight.shape[0], x.shape[-1]), x.dtype)
        return x.new_empty((*x.shape[:-1], weight.shape[0]))

    @staticmethod
    def fake_backward(
        grad_logits: Tensor, x: Tensor, weight: Tensor, wants_x: bool, wants_weight: bool
    ) -> tuple[Tensor, Tensor]:
        logits = Linear.fake(x, weight)
        expect_tensor("grad_logits", grad_logits, logits.shape, x.dtype)
        return x.new_empty(x.shape if wants_x else (0,)), weight.new_empty(weight.shape if wants_weight else (0,))


@operator("grouped_linear")
class GroupedLinear(Operator):
    """``grouped_linear``: the products of groups of rows with one matrix each (:mod:`topn_gating.grouped`)."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        rows, weight, _bias, offsets = inputs
        ctx.save_for_backward(rows, weight, offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *wanted, _offsets = ctx.needs_input_grad
        grads = GroupedLinear.run_backward(grad, *ctx.saved_tensors, *wanted)
        return tuple(g if wants else None for g, wants in zip(grads, wanted, strict=True))

    @staticmethod
    def fake(rows: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
        _expect_dtype("rows", rows.dtype)
        expect(rows.dim() == 2, "rows must have shape (rows, in)")
        matrices = weight.dim() == 3 and all(size >= 1 for size in weight.shape)
        expect(matrices, "weight must have shape (experts, out, in), one of each or more")
        experts, out_features, in_features = weight.shape
        expect_tensor("rows", rows, (rows.shape[0], in_features), weight.dtype)
        expect_tensor("bias", bias, (experts, out_features), weight.dtype)
        expect_tensor("offsets", offsets, (experts,), torch.int32)
        return rows.new_empty((rows.shape[0], out_features))

    @staticmethod
    def fake_backward(
        grad: Tensor, rows: Tensor, weight: Tensor, offsets: Tensor, wants_rows: bool, wants_weight: bool, wants_bias: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        out = GroupedLinear.fake(rows, weight, None, offsets)
        expect_tensor("grad", grad, out.shape, rows.dtype)
        return (
            rows.new_empty(rows.shape if wants_rows else (0,)),
            empty_like_weight(weight) if wants_weight else weight.new_empty((0,)),
            weight.new_empty(weight.shape[:2] if wants_bias else (0,)),
        )


def empty_like_weight(weight: Tensor) -> Tensor:
    """Returns memory for the gradient of a weight ``(e, out, in)``, whose matrices are stored in the same way."""
    if stored_by_columns(weight):
        return weight.new_empty(weight.transpose(1, 2).shape).transpose(1, 2)
    return weight.new_empty(weight.shape)


def stored_by_columns(weight: Tensor) -> bool:
    """Whether the matrices of ``weight`` are stored column after column, as in a transposed view."""
    return weight.stride(1) == 1 and weight.stride(2) != 1 and weight.stride(2) >= weight.shape[1]
