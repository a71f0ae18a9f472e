"""The five operators: what torch has to know of each beside its kernels.

Importing this module loads the extension, which defines ``torch.ops.topn_gating.*`` (schemas in
``csrc/torch/schema.cpp``, meaning in ``csrc/router.h``). For each operator there stands here its autograd Function, whose
``setup_context`` and ``backward`` also serve whoever calls ``torch.ops.topn_gating.*`` directly, and its vmap rule.
``fakes.py`` has their shapes.

Symbols in shapes: ``n`` tokens of a group, ``e`` experts, ``k`` ranks (``top_n``), ``C`` slots (capacity), ``d`` features;
``…`` are the groups, any number of leading dimensions.
"""

import functools

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        "topn_gating._C, the compiled extension, is missing or does not fit this torch; "
        "build it with `pip install --no-build-isolation -e .` in the source tree"
    ) from error

from . import fakes  # noqa: F401  registers them, once _C has defined the operators

build_info = _C.build_info

_ops = torch.ops.topn_gating

POLICIES = ("random", "threshold", "all", "none")


def apply(name: str, *args):
    """Runs the operator ``name`` on a full list of arguments, with its gradient. A compiler sees the operator itself."""
    if torch.compiler.is_compiling():
        return getattr(_ops, name).default(*args)
    return run(FUNCTIONS[name], *args)


def run(function: type[Function], *args):
    """Runs a Function on a full list of arguments, the first two of which may have a gradient.

    In eager mode this is shorter than the ways that torch has: ``Function.apply`` would first inspect ``forward``'s signature
    for defaults, and a call through the dispatcher would look for a gradient twice; each of these takes longer than a small
    kernel. Where nothing asks for a gradient there is no need of the Function either.
    """
    if torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    if _asks_for_gradient(*args[:2]):
        return super(Function, function).apply(*args)
    return function.forward(*args)


def _asks_for_gradient(*args) -> bool:
    if forward_ad._current_level >= 0:  # which a Function refuses with a message
        return True
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)


def below_autograd(op, *args):
    """Calls an operator whose gradient is the caller's affair."""
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
        if not torch.is_grad_enabled():
            return backward(ctx, saved, *grads)
        with torch.no_grad():
            outputs = backward(ctx, saved, *grads)
        if torch._C._are_functorch_transforms_active():
            return outputs
        return SecondOrder.apply(len(outputs), *outputs, *grads, *saved)

    return wrapper


class Gate(Function):
    """``gate``: noise, softmax, stable top-n, weights, and the losses' sums (SPEC steps 3 to 6 and 10)."""

    @staticmethod
    def forward(logits, noise, token_mask, top_n, eps, noise_mult, soft, losses):
        return below_autograd(_ops.gate.default, logits, noise, token_mask, top_n, eps, noise_mult, soft, losses)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, noise, token_mask, _, ctx.eps, ctx.noise_mult, ctx.soft, ctx.losses = inputs
        _, expert, _, top_count, _, _ = output
        ctx.save_for_backward(logits, noise, token_mask, expert, top_count)
        ctx.set_materialize_grads(False)

    @staticmethod
    @_first_order
    def backward(ctx, saved, grad_weight, _expert, grad_importance, _top_count, grad_balance_loss, grad_router_z_loss):
        logits, noise, token_mask, expert, top_count = saved
        if not ctx.losses:  # constants
            grad_importance = grad_balance_loss = grad_router_z_loss = None
        grad_logits = _ops.gate_backward.default(
            grad_weight,
            grad_importance,
            grad_balance_loss,
            grad_router_z_loss,
            logits,
            noise,
            token_mask,
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
    def forward(weight, expert, draws, threshold, token_mask, num_gates, capacity, policy, eps):
        return below_autograd(
            _ops.assign.default, weight, expert, draws, threshold, token_mask, num_gates, capacity, policy, eps
        )

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
        return below_autograd(_ops.dense.default, weight, expert, slot, num_gates, capacity, dtype, straight_through)

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
        return below_autograd(_ops.dispatch.default, x, weight, expert, slot, source, straight_through)

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
        return below_autograd(_ops.combine.default, y, weight, expert, slot, source)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @_first_order
    def backward(ctx, saved, grad_out):
        grad_y, grad_weight = _ops.combine_backward.default(grad_out, *saved)
        return grad_y, grad_weight, None, None, None


def vmap_rule(call):
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
    _function.vmap = staticmethod(vmap_rule(_function.apply))
    torch.library.register_autograd(f"topn_gating::{_name}", _function.backward, setup_context=_function.setup_context)
    torch.library.register_vmap(f"topn_gating::{_name}", _function.vmap)
    torch.library.register_vmap(f"topn_gating::{_name}_backward", vmap_rule(getattr(_ops, f"{_name}_backward")))
