"""Derivatives by every way that torch has: right against finite differences, or an error that says so. Never silently 0.

Rows are functions of float64 tensors: each operator by ``torch.ops``, and the functions and modules above them; for each, which
of their inputs ask for the gradient. Columns are the ways to a first derivative, and to one that the kernels do not have.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from cases import assign_case, assignment, gate_case
from torch import Tensor
from torch.autograd import forward_ad

import topn_gating
from topn_gating import GLUExperts, MoE, TopNGating

DOUBLE = torch.float64
O = torch.ops.topn_gating  # noqa: E741


@dataclass
class Case:
    """A scalar function of some tensors, all of which may ask for a gradient."""

    function: Callable[..., Tensor]
    inputs: Sequence[Tensor]


def weighted(outputs: Sequence[Tensor]) -> Tensor:
    """A scalar that depends on every element of ``outputs`` in another way, twice differentiable."""
    return sum(((t + 1) ** 2 * torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in outputs)


def gate_operator(**options) -> Case:
    case = gate_case((2, 5, 4), 3, dtype=DOUBLE, **options)

    def function(logits):
        weight, _, importance, _, balance_loss, z_loss, _ = O.gate(logits, *case.args[1:])
        return weighted((weight, importance, balance_loss, z_loss))

    return Case(function, (case.logits,))


def assign_operator() -> Case:
    case = assign_case((2, 6), 4, 3, 2, "all", dtype=DOUBLE)
    return Case(lambda weight: weighted(O.assign(weight, *case.args[1:])[:1]), (case.weight,))


def an_assignment():
    return assignment((2, 6), 4, 2, 3, dtype=DOUBLE, straight_through=False)


def dense_operator() -> Case:
    a = an_assignment()
    return Case(lambda w: weighted(O.dense(w, *a.slots, DOUBLE, False)), (a.weight,))


def dispatch_operator() -> Case:
    a = an_assignment()
    return Case(lambda x: weighted([O.dispatch(x, a.weight, *a.indices, False)]), (torch.randn(2, 6, 5, dtype=DOUBLE),))


def combine_operator() -> Case:
    a = an_assignment()
    y = torch.randn(2, 4, 3, 5, dtype=DOUBLE)
    return Case(lambda y, w: weighted([O.combine(y, w, *a.indices)]), (y, a.weight))


def grouped_linear_operator() -> Case:
    offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
    shapes = (6, 4), (3, 2, 4), (3, 2)
    return Case(lambda x, w, b: weighted([O.grouped_linear(x, w, b, offsets)]), [torch.randn(s, dtype=DOUBLE) for s in shapes])


def dropless_assign_operator() -> Case:
    case = assign_case((2, 6), 4, 3, None, "all", dtype=DOUBLE, align=4)
    return Case(lambda weight: weighted(O.assign(weight, *case.args[1:])[:1]), (case.weight,))


def a_dropless_assignment():
    return assignment((2, 6), 4, 2, None, dtype=DOUBLE, straight_through=False, align=4)


def dropless_dispatch_operator() -> Case:
    a = a_dropless_assignment()
    return Case(lambda x: weighted([O.dispatch(x, a.weight, *a.indices, False)]), (torch.randn(2, 6, 5, dtype=DOUBLE),))


def dropless_combine_operator() -> Case:
    a = a_dropless_assignment()
    y = torch.randn(len(a.source), 5, dtype=DOUBLE)
    return Case(lambda y, w: weighted([O.combine(y, w, *a.indices)]), (y, a.weight))


def given_choices() -> Case:
    expert = torch.randn(2, 6, 4).topk(3).indices

    def function(weight, x):
        routing = topn_gating.route(expert=expert, weight=weight, num_gates=4, dropless=True)
        return weighted((routing.combine(routing.dispatch(x).tanh()), routing.as_dropless(4).weight))

    return Case(function, (torch.rand(2, 6, 3, dtype=DOUBLE), torch.randn(2, 6, 5, dtype=DOUBLE)))


def route_function() -> Case:
    def function(logits):
        routing = topn_gating.route(logits, 3, policy="all")
        return weighted((routing.weight, routing.balance_loss, routing.router_z_loss))

    return Case(function, (torch.randn(2, 6, 4, dtype=DOUBLE),))


def module(made: torch.nn.Module) -> Case:
    """A module as a function of x and of the gate's weight."""
    name = next(n for n, _ in made.named_parameters() if n.endswith("to_gates.weight"))

    def function(x, weight):
        outputs = torch.func.functional_call(made, {name: weight}, (x,))
        return weighted(outputs[1 if isinstance(made, TopNGating) else 0 :])

    return Case(function, (torch.randn(2, 6, 5, dtype=DOUBLE), dict(made.named_parameters())[name].detach()))


def swiglu() -> GLUExperts:
    return GLUExperts(5, 4, 3, bias=True, dtype=DOUBLE)


OPTIONS = {"policy_train": "all", "straight_through_dispatch_tensor": False, "dtype": DOUBLE}
CASES = {
    "gate": gate_operator,
    "gate, noise, padding, soft": lambda: gate_operator(noise=True, mask=True, soft=True),
    "gate, sigmoid, bias, groups": lambda: gate_operator(score="sigmoid", bias=True, groups=2, ranks="all"),
    "gate, given experts": lambda: gate_operator(score="sqrtsoftplus", given=True, mask=True),
    "assign": assign_operator,
    "dense": dense_operator,
    "dispatch": dispatch_operator,
    "combine": combine_operator,
    "grouped_linear": grouped_linear_operator,
    "assign, dropless": dropless_assign_operator,
    "dispatch, dropless": dropless_dispatch_operator,
    "combine, dropless": dropless_combine_operator,
    "given choices, dropless": given_choices,
    "route": route_function,
    "TopNGating": lambda: module(TopNGating(5, 4, top_n=3, **OPTIONS)),
    "MoE": lambda: module(MoE(5, 4, gating_top_n=3, **OPTIONS)),
    "MoE, dropless": lambda: module(MoE(5, 4, gating_top_n=3, dropless=True, experts=swiglu(), **OPTIONS)),
}
ROWS = [(name, wanted) for name, make in CASES.items() for wanted in [*range(len(make().inputs)), "all"]]
rows = pytest.mark.parametrize(("name", "wanted"), [row for row in ROWS if row[1] != "all" or (row[0], 1) in ROWS])


def setting(name: str, wanted) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The function of those inputs alone that ask for a gradient, and these."""
    case = CASES[name]()
    chosen = range(len(case.inputs)) if wanted == "all" else [wanted]

    def function(*leaves):
        given = dict(zip(chosen, leaves, strict=True))
        return case.function(*(given.get(i, t) for i, t in enumerate(case.inputs)))

    return function, [case.inputs[i] for i in chosen]


def finite_differences(function, leaves: Sequence[Tensor], step: float = 1e-6) -> list[Tensor]:
    grads = []
    for i, leaf in enumerate(leaves):
        grad = torch.empty(leaf.numel(), dtype=DOUBLE)
        for j in range(leaf.numel()):
            shift = torch.zeros(leaf.numel(), dtype=DOUBLE)
            shift[j] = step
            shift = shift.view(leaf.shape)
            up, down = (function(*leaves[:i], leaf + s * shift, *leaves[i + 1 :]) for s in (1, -1))
            grad[j] = (up - down) / (2 * step)
        grads.append(grad.view(leaf.shape))
    return grads


def all_of(leaves):
    return tuple(range(len(leaves)))


def by_autograd(function, leaves, create_graph=False):
    leaves = [t.clone().requires_grad_() for t in leaves]
    return torch.autograd.grad(function(*leaves), leaves, create_graph=create_graph)


def by_vmap_of_grad(function, leaves):
    stacked = [torch.stack([t, t]) for t in leaves]
    return [g[1] for g in torch.vmap(torch.func.grad(function, all_of(leaves)))(*stacked)]


def by_grad_of_vmap(function, leaves):
    def both(*leaves):
        return torch.vmap(function)(*(torch.stack([t, t]) for t in leaves)).sum() / 2

    return torch.func.grad(both, all_of(leaves))(*leaves)


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


FIRST = {
    "autograd": by_autograd,
    "autograd, for more": lambda f, leaves: by_autograd(f, leaves, create_graph=True),
    "func.grad": lambda f, leaves: torch.func.grad(f, all_of(leaves))(*leaves),
    "func.vjp": lambda f, leaves: torch.func.vjp(f, *leaves)[1](torch.ones((), dtype=DOUBLE)),
    "jacrev": lambda f, leaves: torch.func.jacrev(f, all_of(leaves))(*leaves),
    "vmap of grad": by_vmap_of_grad,
    "grad of vmap": by_grad_of_vmap,
    "autograd of compiled": lambda f, leaves: by_autograd(compiled(f), leaves),
    "compiled grad": lambda f, leaves: compiled(torch.func.grad(f, all_of(leaves)))(*leaves),
}


@rows
def test_first_derivatives(name, wanted):
    function, leaves = setting(name, wanted)
    expected = finite_differences(function, leaves)
    assert any(g.abs().max() > 1e-3 for g in expected)
    for way, gradients in FIRST.items():
        actual = [g.detach() for g in gradients(function, leaves)]
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7, msg=lambda m, way=way: f"{way}: {m}")


def squared(function):
    """The sum of the squares of a function's gradients, whose own gradient is a second derivative."""
    return lambda *leaves: sum((g**2).sum() for g in torch.func.grad(function, all_of(leaves))(*leaves))


def of_autograd_twice(function, leaves):
    leaves = [t.clone().requires_grad_() for t in leaves]
    grads = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(sum((g**2).sum() for g in grads), leaves)


def of_dual_numbers(function, leaves):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(*(forward_ad.make_dual(t, torch.ones_like(t)) for t in leaves))).tangent


def of_jvp(function, leaves):
    return torch.func.jvp(function, tuple(leaves), tuple(map(torch.ones_like, leaves)))


SECOND = r"topn_gating has first derivatives alone: its backward cannot be differentiated"
FORWARD = r"topn_gating has no forward-mode derivatives .*: use reverse mode"
REFUSED = {
    "autograd twice": (of_autograd_twice, SECOND),
    "grad of grad": (lambda f, leaves: torch.func.grad(squared(f), all_of(leaves))(*leaves), SECOND),
    "jacrev of jacrev": (lambda f, leaves: torch.func.jacrev(torch.func.jacrev(f))(*leaves), SECOND),
    "vmap of grad of grad": (
        lambda f, leaves: torch.vmap(torch.func.grad(squared(f), all_of(leaves)))(*(t.unsqueeze(0) for t in leaves)),
        SECOND,
    ),
    "jvp of grad": (lambda f, leaves: of_jvp(squared(f), leaves), f"{SECOND}|{FORWARD}"),
    "jvp": (of_jvp, FORWARD),
    "jacfwd": (lambda f, leaves: torch.func.jacfwd(f)(*leaves), FORWARD),
    "dual numbers": (of_dual_numbers, FORWARD),
}


@rows
def test_what_the_kernels_do_not_have_is_an_error(name, wanted):
    function, leaves = setting(name, wanted)
    for way, (derivative, message) in REFUSED.items():
        with pytest.raises(RuntimeError, match=message):
            pytest.fail(f"{way} gave {derivative(function, leaves)}")


@pytest.mark.parametrize("name", ["gate", "TopNGating"])
@pytest.mark.parametrize("way", ["grad of grad", "jvp"])
def test_a_compiler_does_not_hide_the_error(name, way):
    function, leaves = setting(name, 0)
    derivative, message = REFUSED[way]
    with pytest.raises(Exception, match=message):
        compiled(lambda *leaves: derivative(function, leaves))(*leaves)


def test_gate_linear_has_every_derivative():
    """The gate's product alone is torch's, or has a second derivative of its own."""
    layer, x = topn_gating.linear.GateLinear(5, 4, dtype=DOUBLE), torch.randn(3, 5, dtype=DOUBLE)

    def function(x):
        return (layer(x) ** 3).sum()

    weight = layer.weight.detach()
    expected = torch.func.hessian(lambda x: (torch.nn.functional.linear(x, weight) ** 3).sum())(x)
    torch.testing.assert_close(torch.func.hessian(function)(x), expected)
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacrev(function))(x), expected)
    torch.testing.assert_close(torch.autograd.functional.hessian(function, x), expected)


def test_a_compiled_gradient_may_ask_for_more_until_it_is_asked():
    """A compiler traces the second derivative of leaves that require a gradient; the error waits until somebody wants it."""
    function, leaves = setting("route", 0)
    expected = by_autograd(function, leaves)
    leaf = leaves[0].clone().requires_grad_()
    grad = compiled(torch.func.grad(function))(leaf)
    torch.testing.assert_close(grad.detach(), expected[0])
    with pytest.raises(RuntimeError, match=SECOND):
        grad.sum().backward()
