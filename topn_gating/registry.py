"""How an operator becomes known to torch: what the operators' classes share, and the decorator that registers one."""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NoReturn, TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import Function

from ._ops import add_op_namespace_prefix, ops
from .dtypes import without_autocast
from .eager import asks_for_gradient, below_autograd, run, transforms_active


class Operator(Function):
    """The autograd Function of an operator. Its arguments are all of the schema, in the schema's order.

    A class under :func:`operator` has ``setup_context(ctx, inputs, output)``; ``backward(ctx, *grads)``, which returns the
    gradients of the first arguments, in a tuple; ``fake(*inputs)`` and ``fake_backward(*inputs)``, which check what the
    kernels would and return empty results of ``<name>`` and ``<name>_backward``. The decorator adds ``forward``, ``vmap``,
    ``call(*inputs)``, which runs the operator with its gradient and which a compiler sees as the operator itself, and
    ``run_backward(*inputs)``, which runs ``<name>_backward``.
    """

    call: ClassVar[Callable[..., Any]]
    run_backward: ClassVar[Callable[..., Any]]
    fake: ClassVar[Callable[..., Any]]
    fake_backward: ClassVar[Callable[..., Any]]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        """Refuses forward mode."""
        raise RuntimeError(
            "topn_gating has no forward-mode derivatives (forward_ad, torch.func.jvp, jacfwd, hessian): "
            "use reverse mode (backward, torch.func.vjp, grad, jacrev)"
        )


class NoSecondDerivative(Function):
    """A call of ``<name>_backward`` whose results somebody may differentiate: an error, since they are a kernel's.

    ``torch.compile`` traces the derivative of a gradient whether or not it is ever wanted. So the error is an operator of its
    own: a graph that holds it raises when it is run.
    """

    @staticmethod
    def forward(overload: OpOverload, *args: Any) -> Any:
        return below_autograd(overload, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(a if isinstance(a, Tensor) else None for a in inputs))
        ctx.set_materialize_grads(False)  # the error belongs to a gradient that comes in

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        refuse, some_grad = ops.no_second_derivative, next(g for g in grads if g is not None)
        return tuple(None if t is None else refuse(some_grad, t) for t in ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        _no_second_derivative()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return vmap_rule(NoSecondDerivative.apply)(info, in_dims, *args)


def _no_second_derivative(*args: Any) -> NoReturn:
    raise RuntimeError(
        "topn_gating has first derivatives alone: its backward cannot be differentiated "
        "(topn_gating.reference has the same functions in torch operations, which can)"
    )


def _run_backward(overload: OpOverload, *args: Any) -> Any:
    if transforms_active() or asks_for_gradient(*args):
        return NoSecondDerivative.apply(overload, *args)
    return below_autograd(overload, *args)


def vmap_rule(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the rule of ``torch.vmap`` for ``function``: one call for each sample, since each has losses of its own."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        if info.batch_size == 0:  # the results of one sample of zeros have the right shapes
            args = tuple(
                a if d is None else torch.cat([a, a.new_zeros((*a.shape[:d], 1, *a.shape[d + 1 :]))], d)
                for a, d in zip(args, in_dims, strict=True)
            )

        def sample(i: int) -> Any:
            return function(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))

        outputs = [sample(i) for i in range(max(info.batch_size, 1))]
        if isinstance(outputs[0], Tensor):
            return torch.stack(outputs)[: info.batch_size], 0
        return tuple(torch.stack(t)[: info.batch_size] for t in zip(*outputs, strict=True)), (0,) * len(outputs[0])

    return rule


OPERATORS: dict[str, type[Operator]] = {}
_library = torch.library.Library(add_op_namespace_prefix("").removesuffix("::"), "FRAGMENT")
_library.define("no_second_derivative(Tensor grad, Tensor input) -> Tensor grad_input")
for _key in ("CPU", "CUDA", "FuncTorchDynamicLayerFrontMode"):
    _library.impl("no_second_derivative", _no_second_derivative, _key)
torch.library.register_fake(add_op_namespace_prefix("no_second_derivative"), lambda grad, input: torch.empty_like(input))
_Class = TypeVar("_Class", bound=type[Operator])


def operator(name: str) -> Callable[[_Class], _Class]:
    """Registers a class as ``torch.ops.topn_gating.<name>`` and ``<name>_backward``: autograd, vmap, results without data."""

    def register(function: _Class) -> _Class:
        forward: OpOverload = getattr(ops, name).default
        backward: OpOverload = getattr(ops, f"{name}_backward").default
        members: dict[str, Callable[..., Any]] = {
            "call": _caller(function, forward),
            "forward": _kernel(forward),
            "backward": _with_nones(function.backward, len(forward._schema.arguments)),
            "run_backward": functools.partial(_run_backward, backward),
            "vmap": vmap_rule(function.apply),
        }
        for attribute, value in members.items():
            setattr(function, attribute, staticmethod(value))
        for overload, eager, transformed, fake in (
            (forward, functools.partial(run, function), function.apply, function.fake),
            (backward, function.run_backward, functools.partial(NoSecondDerivative.apply, backward), function.fake_backward),
        ):
            _library.impl(overload, eager, "Autograd")
            _library.impl(overload, transformed, "FuncTorchDynamicLayerFrontMode")
            torch.library.register_fake(overload, _of_one_device(overload, fake))
            torch.library.register_fake(_without_gradient(overload), fake)
        OPERATORS[name] = function
        return function

    return register


def implement_on_cuda(name: str, function: Callable[..., Any]) -> None:
    """Makes ``function``, of torch's operations, the kernel of an operator that has none in CUDA."""

    @functools.wraps(function)
    def kernel(*args: Any) -> Any:
        with without_autocast(args[0].device):
            return function(*args)

    for twin in (name, f"{name}_kernel"):
        _library.impl(twin, kernel, "CUDA")


def _caller(function: type[Operator], overload: OpOverload) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        return overload(*args) if torch.compiler.is_compiling() else run(function, *args)

    return call


def _kernel(overload: OpOverload) -> Callable[..., Any]:
    def forward(*args: Any) -> Any:
        return below_autograd(overload, *args)

    return forward


def _without_gradient(overload: OpOverload) -> OpOverload:
    """Returns ``<name>_kernel``, the operator without a kernel of its own for autograd."""
    kernel: OpOverload = getattr(ops, f"{overload._opname}_kernel").default
    return kernel


def _lower_to_kernel(overload: OpOverload) -> None:
    """Has the code that inductor generates call ``<name>_kernel`` in place of ``<name>``.

    Nothing asks for a gradient there, and the way through the operator's autograd, which is Python, takes 4 µs more. Inductor
    takes seconds to import, so this waits until others have done so: a graph that inductor lowers has asked for fake results.
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    if lowering is None or overload in lowering.lowerings:
        return
    kernel = _without_gradient(overload)
    lowering.make_fallback(kernel, warn=False)
    lowering.lowerings[overload] = lowering.lowerings[kernel]


def _with_nones(backward: Callable[..., tuple[Any, ...]], count: int) -> Callable[..., tuple[Any, ...]]:
    """Returns ``backward`` with a None for each of the ``count`` inputs to which it gives no gradient."""

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        given = backward(ctx, *grads)
        return *given, *(None,) * (count - len(given))

    return wrapper


def _of_one_device(overload: OpOverload, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Returns ``fake`` with a check that all tensors are on one device."""

    @functools.wraps(fake)
    def wrapper(*args: Any) -> Any:
        _lower_to_kernel(overload)
        devices = {str(t.device) for t in args if isinstance(t, Tensor)}
        if len(devices) > 1:
            raise RuntimeError(f"{overload} must have its tensors on one device, got {', '.join(sorted(devices))}")
        return fake(*args)

    return wrapper


def expect(condition: Any, message: str) -> None:
    """Raises a RuntimeError unless ``condition``, which may depend on symbolic sizes."""
    torch._check(condition, lambda: message)


def expect_tensor(name: str, t: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Raises a RuntimeError unless ``t`` is None or has that shape and dtype."""
    if t is None:
        return
    expect(t.dtype == dtype, f"{name} must be {dtype}, got {t.dtype}")
    message = f"{name} must have shape {tuple(shape)} to fit the other arguments, got {tuple(t.shape)}"
    expect(t.dim() == len(shape), message)
    for size, expected in zip(t.shape, shape, strict=True):
        expect(size == expected, message)
