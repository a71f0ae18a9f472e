"""The five operators: what torch has to know of each beside its kernels.

Importing this module loads the extension, which defines ``torch.ops.topn_gating.*`` (schemas in
``csrc/torch/schema.cpp``, meaning in ``csrc/router.h``). For each operator there stand here its fake (shapes and dtypes
without data) and its autograd Function. The Function's ``setup_context`` and ``backward`` also serve whoever calls
``torch.ops.topn_gating.*`` directly.

Symbols in shapes: ``n`` tokens of a group, ``e`` experts, ``k`` ranks (``top_n``), ``C`` slots (capacity), ``d`` features;
``…`` are the groups, any number of leading dimensions.
"""

import functools

import torch
from torch import Tensor
from torch.autograd import Function

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        "topn_gating._C, the compiled extension, is missing or does not fit this torch; "
        "build it with `pip install --no-build-isolation -e .` in the source tree"
    ) from error

build_info = _C.build_info

_ops = torch.ops.topn_gating

POLICIES = ("random", "threshold", "all", "none")


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that ``dtype`` is computed in: float64 for float64, float32 for every other."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def apply(name: str, *args):
    """Runs the operator ``name`` on a full list of arguments, with its gradient.

    A compiler sees the operator itself. In eager mode its Function below is the shorter way: ``Function.apply`` would first
    inspect ``forward``'s signature for defaults, and a call through the dispatcher would look for a gradient twice; each of
    these takes longer than a small kernel.
    """
    if torch.compiler.is_compiling():
        return getattr(_ops, name).default(*args)
    if torch._C._are_functorch_transforms_active():
        return FUNCTIONS[name].apply(*args)
    return super(Function, FUNCTIONS[name]).apply(*args)


def _forward(op, *args):
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


class SecondOrder(Function):
    """Stands between the results of a backward and what they depend on, to say that the way ends here."""

    @staticmethod
    def forward(ctx, count, *tensors):
        return tensors[:count]

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("topn_gating has first derivatives alone: its backward cannot be differentiated")


def _first_order(backward):
    """Makes a second derivative an error: these gradients are kernels, through which autograd sees nothing.

    ``torch.autograd.function.once_differentiable`` looks at the incoming gradients alone, not at the saved tensors.
    ``backward`` takes these after ``ctx``: activation checkpointing lets them be unpacked once.
    """

    @functools.wraps(backward)
    def wrapper(ctx, *grads):
        saved = ctx.saved_tensors
        with torch.no_grad():
            outputs = backward(ctx, saved, *grads)
        if torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
            return SecondOrder.apply(len(outputs), *outputs, *grads, *saved)
        return outputs

    return wrapper


class Gate(Function):
    """``gate``: noise, softmax, stable top-n, weights, and the losses' sums (SPEC steps 3 to 6 and 10)."""

    @staticmethod
    def forward(logits, noise, padding_mask, top_n, eps, noise_mult, soft, losses):
        return _forward(_ops.gate.default, logits, noise, padding_mask, top_n, eps, noise_mult, soft, losses)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, noise, padding_mask, _, ctx.eps, ctx.noise_mult, ctx.soft, ctx.losses = inputs
        _, expert, _, top_count, _, _ = output
        ctx.save_for_backward(logits, noise, padding_mask, expert, top_count)
        ctx.set_materialize_grads(False)

    @staticmethod
    @_first_order
    def backward(ctx, saved, grad_weight, _expert, grad_importance, _top_count, grad_balance_loss, grad_router_z_loss):
        logits, noise, padding_mask, expert, top_count = saved
        if not ctx.losses:  # constants
            grad_importance = grad_balance_loss = grad_router_z_loss = None
        grad_logits = _ops.gate_backward.default(
            grad_weight,
            grad_importance,
            grad_balance_loss,
            grad_router_z_loss,
            logits,
            noise,
            padding_mask,
            expert,
            top_count,
            ctx.eps,
            ctx.noise_mult,
            ctx.soft,
        )
        return grad_logits, None, None, None, None, None, None, None


class Assign(Function):
    """``assign``: threshold masking and capacity assignment (SPEC steps 7 and 8)."""

    @staticmethod
    def forward(weight, expert, draws, threshold, padding_mask, num_gates, capacity, policy, eps):
        return _forward(_ops.assign.default, weight, expert, draws, threshold, padding_mask, num_gates, capacity, policy, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, slot, _, _ = output
        ctx.save_for_backward(slot)
        ctx.set_materialize_grads(False)

    @staticmethod
    @_first_order
    def backward(ctx, saved, grad_kept, _slot, _source, _demand):
        (slot,) = saved
        grad_weight = None if grad_kept is None else _ops.assign_backward.default(grad_kept, slot)
        return grad_weight, None, None, None, None, None, None, None, None


class Dense(Function):
    """``dense``: the two ``(…, n, e, C)`` tensors (SPEC step 9)."""

    @staticmethod
    def forward(weight, expert, slot, num_gates, capacity, dtype, straight_through):
        return _forward(_ops.dense.default, weight, expert, slot, num_gates, capacity, dtype, straight_through)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, expert, slot, _, _, _, ctx.straight_through = inputs
        ctx.save_for_backward(expert, slot)
        ctx.set_materialize_grads(False)

    @staticmethod
    @_first_order
    def backward(ctx, saved, grad_dispatch, grad_combine):
        expert, slot = saved
        grad_weight = None
        if not ctx.straight_through:
            grad_dispatch = None
        if grad_dispatch is not None or grad_combine is not None:
            grad_weight = _ops.dense_backward.default(grad_dispatch, grad_combine, expert, slot)
        return grad_weight, None, None, None, None, None, None


class Dispatch(Function):
    """``dispatch``: token rows to expert buffers."""

    @staticmethod
    def forward(x, weight, expert, slot, source, straight_through):
        return _forward(_ops.dispatch.default, x, weight, expert, slot, source, straight_through)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, _, expert, slot, source, straight_through = inputs
        needs_weight = straight_through and ctx.needs_input_grad[1]
        ctx.save_for_backward(x if needs_weight else None, expert, slot, source)

    @staticmethod
    @_first_order
    def backward(ctx, saved, grad_y):
        x, expert, slot, source = saved
        grad_x, grad_weight = _ops.dispatch_backward.default(grad_y, x, expert, slot, source)
        return grad_x, None if x is None else grad_weight, None, None, None, None


class Combine(Function):
    """``combine``: expert buffers back to token rows, weighted."""

    @staticmethod
    def forward(y, weight, expert, slot, source):
        return _forward(_ops.combine.default, y, weight, expert, slot, source)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @_first_order
    def backward(ctx, saved, grad_out):
        grad_y, grad_weight = _ops.combine_backward.default(grad_out, *saved)
        return grad_y, grad_weight, None, None, None


def _vmap_rule(call):
    """``torch.vmap`` over an operator: one call for each sample, since each has losses of its own."""

    def rule(info, in_dims, *args):
        def sample(i):
            return call(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))

        outputs = [sample(i) for i in range(info.batch_size)]
        if isinstance(outputs[0], Tensor):
            return torch.stack(outputs), 0
        return tuple(torch.stack(t) for t in zip(*outputs, strict=True)), (0,) * len(outputs[0])

    return rule


FUNCTIONS: dict[str, type[Function]] = {
    "gate": Gate,
    "assign": Assign,
    "dense": Dense,
    "dispatch": Dispatch,
    "combine": Combine,
}

for _name, _function in FUNCTIONS.items():
    _function.vmap = staticmethod(_vmap_rule(_function.apply))
    torch.library.register_autograd(f"topn_gating::{_name}", _function.backward, setup_context=_function.setup_context)
    torch.library.register_vmap(f"topn_gating::{_name}", _function.vmap)
    torch.library.register_vmap(f"topn_gating::{_name}_backward", _vmap_rule(getattr(_ops, f"{_name}_backward")))


def _fake(function):
    """Registers the shapes and dtypes of the operator that ``function`` is named after, which take tensors of one device."""

    @functools.wraps(function)
    def checked(*args):
        devices = {str(t.device) for t in args if isinstance(t, Tensor)}
        if len(devices) > 1:
            raise RuntimeError(f"{function.__name__} takes tensors of one device, got {', '.join(sorted(devices))}")
        return function(*args)

    torch.library.register_fake(f"topn_gating::{function.__name__}")(checked)


@_fake
def gate(logits, noise, padding_mask, top_n, eps, noise_mult, soft, losses):
    *lead, n, e = logits.shape
    dtype = real_dtype(logits.dtype)
    return (
        logits.new_empty((*lead, n, top_n), dtype=dtype),
        logits.new_empty((*lead, n, top_n), dtype=torch.int32),
        logits.new_empty((*lead, e), dtype=dtype),
        logits.new_empty((*lead, e), dtype=torch.int32),
        logits.new_empty((), dtype=dtype),
        logits.new_empty((), dtype=dtype),
    )


@_fake
def gate_backward(gw, gi, gb, gz, logits, noise, padding_mask, expert, top_count, eps, noise_mult, soft):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@_fake
def assign(weight, expert, draws, threshold, padding_mask, num_gates, capacity, policy, eps):
    lead = weight.shape[:-2]
    return (
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape, dtype=torch.int32),
        weight.new_empty((*lead, num_gates, capacity), dtype=torch.int32),
        weight.new_empty((*lead, num_gates), dtype=torch.int32),
    )


@_fake
def assign_backward(grad_kept, slot):
    return grad_kept.new_empty(grad_kept.shape)


@_fake
def dense(weight, expert, slot, num_gates, capacity, dtype, straight_through):
    shape = (*weight.shape[:-1], num_gates, capacity)
    return weight.new_empty(shape, dtype=dtype), weight.new_empty(shape, dtype=dtype)


@_fake
def dense_backward(grad_dispatch, grad_combine, expert, slot):
    grad = grad_combine if grad_dispatch is None else grad_dispatch
    return slot.new_empty(slot.shape, dtype=real_dtype(grad.dtype))


@_fake
def dispatch(x, weight, expert, slot, source, straight_through):
    return x.new_empty((*source.shape, x.shape[-1]))


@_fake
def dispatch_backward(grad_y, x, expert, slot, source):
    grad_x = grad_y.new_empty((*slot.shape[:-1], grad_y.shape[-1]))
    return grad_x, grad_y.new_empty((0,) if x is None else slot.shape, dtype=real_dtype(grad_y.dtype))


@_fake
def combine(y, weight, expert, slot, source):
    return y.new_empty((*slot.shape[:-1], y.shape[-1]))


@_fake
def combine_backward(grad_out, y, weight, expert, slot, source):
    return y.new_empty(y.shape), weight.new_empty(weight.shape)


def autocast(t: Tensor) -> Tensor:
    """``t`` as an einsum under the current autocast would read it: a float type but float64 becomes the autocast type."""
    dtype = autocast_dtype(t.device)
    return t if dtype is None or t.dtype == torch.float64 or not t.is_floating_point() else t.to(dtype)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The type that products are computed in on ``device``, None where autocast is off."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)
