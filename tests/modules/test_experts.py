"""Experts and GLUExperts: both forms of call against a loop over the experts in float64, and as any module has to behave."""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same_bits, assert_same_for_any_schedule
from torch import nn
from torch.export import Dim, export
from torch.utils.checkpoint import checkpoint

from topn_gating import Experts, GLUExperts
from topn_gating.gated import ACTIVATIONS

DIM, EXPERTS, HIDDEN = 6, 4, 5
OFFSETS = (3, 3, 10, 11)  # the second expert has no row
ROWS = 14  # the last three belong to no expert
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 6e-2, torch.float16: 8e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
GPT_OSS = {"bias": True, "interleaved": True, "limit": 0.7, "transposed": True}


class Learned(nn.Module):
    """An activation with a parameter."""

    def __init__(self, dtype=None, **kwargs):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.3, dtype=dtype))

    def forward(self, x):
        return torch.where(x > 0, x, x * self.slope.to(x.dtype))


MAKERS = {
    "geglu": lambda **kw: Experts(DIM, EXPERTS, 1.25, **kw),  # hidden = 5
    "swiglu": lambda **kw: GLUExperts(DIM, EXPERTS, HIDDEN, **kw),
    "biases": lambda **kw: GLUExperts(DIM, EXPERTS, HIDDEN, bias=True, activation="gelu_tanh", **kw),
    "interleaved": lambda **kw: GLUExperts(DIM, EXPERTS, HIDDEN, interleaved=True, activation="relu", **kw),
    "transposed": lambda **kw: GLUExperts(DIM, EXPERTS, HIDDEN, transposed=True, activation=torch.tanh, **kw),
    "gpt-oss": lambda **kw: GLUExperts(DIM, EXPERTS, HIDDEN, **GPT_OSS, **kw),
    "learned": lambda **kw: GLUExperts(DIM, EXPERTS, HIDDEN, activation=Learned(**kw), **kw),
}
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
forms = pytest.mark.parametrize("form", ["buffers", "rows"])


def made(make, dtype=torch.float32):
    """Experts whose parameters are all random."""
    experts = make(dtype=dtype)
    for name, p in experts.named_parameters():
        if name != "activation.slope":
            nn.init.normal_(p, std=0.5)
    return experts


def arguments(form, dtype=torch.float32):
    """Arguments of a call."""
    if form == "buffers":
        return (torch.randn(2, 3, EXPERTS, 7, DIM).to(dtype),)
    return torch.randn(ROWS, DIM).to(dtype), torch.tensor(OFFSETS, dtype=torch.int32)


def one_expert(experts, index, x):
    """The definition: expert ``index`` of rows ``x``."""
    p = {name: t[index] for name, t in experts.named_parameters() if t.dim()}
    if isinstance(experts, Experts):
        value, gate = (x @ p["weight_in"] + p["bias_in"]).split(experts.hidden, -1)
        return (value * F.gelu(gate) * p["mult_bias"]) @ p["weight_out"] + p["bias_out"]

    def linear(name, x):
        weight = p[name] if experts.transposed else p[name].T
        return x @ weight + p.get(f"{name}_bias", 0)

    columns = torch.arange(2 * experts.hidden)
    columns = columns.view(-1, 2).T if experts.interleaved else columns.view(2, -1)
    gate, up = linear("gate_up_proj", x)[..., columns].unbind(-2)
    if experts.limit is not None:
        gate, up = gate.clamp(max=experts.limit), up.clamp(-experts.limit, experts.limit)
        return linear("down_proj", gate * torch.sigmoid(1.702 * gate) * (up + 1))
    functions = {"silu": F.silu, "relu": F.relu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}
    return linear("down_proj", functions.get(experts.activation, experts.activation)(gate) * up)


def loop(experts, x, offsets=None):
    """The definition: one expert after the other."""
    if offsets is None:
        return torch.stack([one_expert(experts, i, x[..., i, :, :]) for i in range(EXPERTS)], -3)
    starts = [0, *offsets.tolist()]
    parts = [one_expert(experts, i, x[starts[i] : starts[i + 1]]) for i in range(EXPERTS)]
    return torch.cat([*parts, torch.zeros(len(x) - starts[-1], DIM, dtype=x.dtype)])


def with_gradients(function, experts, x, *offsets):
    """The output, the gradient of x, and those of all parameters."""
    x = x.detach().clone().requires_grad_()
    y = function(x, *offsets)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, (x, *experts.parameters()), grad)]


def assert_near(actual, expected, tolerance):
    """Equal but for ``tolerance``, relative to the norm of each tensor: a rounding may cross the limit of a clamp."""
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm()


@DTYPES
@forms
@makers
def test_same_as_a_loop_over_the_experts(make, form, dtype):
    experts = made(make, dtype)
    args = arguments(form, dtype)
    exact = copy.deepcopy(experts).double()
    expected = with_gradients(functools.partial(loop, exact), exact, args[0].double(), *args[1:])
    assert_near(with_gradients(experts, experts, *args), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,)], ids=str)
@makers
def test_leading_dimensions_of_buffers(make, lead):
    experts, x = made(make, torch.float64), torch.randn(*lead, EXPERTS, 7, DIM, dtype=torch.float64)
    torch.testing.assert_close(experts(x), loop(experts, x))


@makers
def test_rows_of_no_expert(make, nan_memory):
    """They give 0 and get gradient 0, whatever they hold; and there may be none, or no other."""
    experts, (x, offsets) = made(make), arguments("rows")
    expected = with_gradients(experts, experts, x, offsets)
    x[11:] = torch.nan
    actual = with_gradients(experts, experts, x, offsets)
    assert not actual[0][11:].any()
    assert not actual[1][11:].any()
    assert_same_bits(actual, expected)
    nothing = with_gradients(experts, experts, x, torch.zeros_like(offsets))
    assert not any(t.any() for t in nothing)
    assert experts(x[:0], torch.zeros_like(offsets)).shape == (0, DIM)


@forms
@makers
def test_empty_experts_have_gradient_0(make, form, nan_memory):
    experts = made(make)
    x, *offsets = arguments(form)
    if form == "buffers":
        x[..., 1, :, :] = 0
        grads = torch.autograd.grad(experts(x)[..., [0, 2, 3], :, :].sum(), experts.parameters())
    else:
        grads = torch.autograd.grad(experts(x, *offsets).sum(), experts.parameters())
    for grad in grads:
        assert grad.dim() == 0 or not grad[1].any()


@pytest.mark.parametrize("offsets", [(-5, 3, 2, 100), (2**31 - 1,) * 4, (-(2**31),) * 4, (9, 1, 5, 2)], ids=str)
@makers
def test_any_offsets_are_safe(make, offsets):
    experts, (x, _) = made(make), arguments("rows")
    assert all(t.isfinite().all() for t in with_gradients(experts, experts, x, torch.tensor(offsets, dtype=torch.int32)))


@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS) - {"gelu_tanh"}))
@forms
def test_activations_by_name(name, form):
    by_name, callable_ = (GLUExperts(DIM, EXPERTS, HIDDEN, activation=a) for a in (name, getattr(F, name)))
    callable_.load_state_dict(by_name.state_dict())
    args = arguments(form)
    torch.testing.assert_close(with_gradients(by_name, by_name, *args), with_gradients(callable_, callable_, *args))


def test_frozen_parameters_get_no_gradient():
    for make in MAKERS.values():
        experts, args = made(make), arguments("rows")
        expected = with_gradients(experts, experts, *args)
        names = [name for name, _ in experts.named_parameters()]
        for frozen in names:
            experts.requires_grad_(True).get_parameter(frozen).requires_grad_(False)
            experts.zero_grad()
            x = args[0].clone().requires_grad_()
            y = experts(x, args[1])
            y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).float())
            assert experts.get_parameter(frozen).grad is None
            others = [(p.grad, e) for (n, p), e in zip(experts.named_parameters(), expected[2:], strict=True) if n != frozen]
            torch.testing.assert_close([x.grad, *(a for a, _ in others)], [expected[1], *(e for _, e in others)])
        x = args[0].clone().requires_grad_()
        experts.requires_grad_(False)(x, args[1]).sum().backward()
        assert x.grad.any()


@makers
def test_second_derivative_of_buffers(make):
    """Buffers go through torch's own products, which have every derivative."""
    experts, (x,) = made(make, torch.float64), arguments("buffers", torch.float64)
    x = x[0, 0, :, :3].clone().requires_grad_()
    grads = []
    for function in (experts, functools.partial(loop, experts)):
        (grad,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        grads.append(torch.autograd.grad(grad.square().sum(), (x, *experts.parameters()), materialize_grads=True))
    torch.testing.assert_close(*grads)


def kept_bytes(experts, *args):
    """Bytes that autograd keeps between the passes beside parameters and arguments."""
    known = {t.untyped_storage().data_ptr() for t in (*args, *experts.parameters())}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            kept[t.untyped_storage().data_ptr()] = t  # which keeps its memory from being used again
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = experts(*args)
    assert result.requires_grad
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize("options", [{}, {"bias": True, "interleaved": True, "limit": 7.0}], ids=["swiglu", "gpt-oss"])
def test_autograd_keeps_the_products_alone(options):
    """Of ``f`` hidden features: the first product's ``2f`` and the unit's ``f``, whatever the unit computes in between."""
    rows, hidden = 512, 32
    experts = GLUExperts(DIM, EXPERTS, hidden, **options)
    x, offsets = torch.randn(rows, DIM), torch.tensor([100, 200, 400, rows], dtype=torch.int32)
    assert kept_bytes(experts, x, offsets) == 4 * rows * 3 * hidden


@DTYPES
@makers
def test_rows_are_the_same_bits_for_any_number_of_threads(make, dtype):
    experts, args = made(make, dtype), arguments("rows", dtype)
    assert_same_for_any_schedule(lambda: with_gradients(experts, experts, *args))


@forms
@makers
def test_autocast(make, form):
    experts, args = made(make), arguments(form)
    expected = with_gradients(experts, experts, *args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = with_gradients(experts, experts, *args)
    assert actual[0].dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for t in actual[1:])
    assert_near(actual, expected, 4e-2)
    exact, args = experts.double(), (args[0].double(), *args[1:])
    expected = with_gradients(exact, exact, *args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(with_gradients(exact, exact, *args), expected)


@forms
@makers
def test_compiled(make, form):
    experts, args = made(make), arguments(form)
    torch._dynamo.reset()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    assert_near(with_gradients(compiled, experts, *args), with_gradients(experts, experts, *args), 2e-6)


@forms
def test_no_recompilation_for_another_number_of_rows(form):
    experts = GLUExperts(DIM, EXPERTS, HIDDEN)
    torch._dynamo.reset()
    compiled = torch.compile(experts, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (40, 63, 120):
        args = (torch.randn(2, EXPERTS, rows, DIM),) if form == "buffers" else (torch.randn(rows, DIM), arguments("rows")[1])
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert_near(with_gradients(compiled, experts, *args), with_gradients(experts, experts, *args), 2e-6)


@forms
@makers
def test_export_for_any_number_of_rows(make, form):
    experts, args = made(make), arguments(form)
    dynamic = {"x": {len(args[0].shape) - 2: Dim("rows", min=2, max=4096)}, "offsets": None}
    shapes = {name: dynamic[name] for name, _ in zip(dynamic, args, strict=False)}
    exported = export(experts, args, dynamic_shapes=shapes).module()
    x = torch.cat([args[0], args[0]], -2)
    torch.testing.assert_close(exported(x, *args[1:]), experts(x, *args[1:]))


@forms
@makers
def test_functional_transforms(make, form):
    experts = made(make, torch.float64)
    x, *offsets = arguments(form, torch.float64)

    def loss(x):
        return experts(x, *offsets).square().sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    stacked = torch.stack([x, x])
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(stacked), torch.stack([expected, expected]))
    torch.testing.assert_close(torch.vmap(lambda x: experts(x, *offsets))(stacked), experts(x, *offsets).expand_as(stacked))


@pytest.mark.parametrize("use_reentrant", [False, True])
@forms
@makers
def test_activation_checkpointing(make, form, use_reentrant):
    experts, args = made(make), arguments(form)

    def recomputed(*args):
        return checkpoint(experts, *args, use_reentrant=use_reentrant)

    def run(function):
        x = args[0].clone().requires_grad_()
        experts.zero_grad()
        function(x, *args[1:]).square().sum().backward()
        return [x.grad, *(p.grad for p in experts.parameters())]

    assert_same_bits(run(recomputed), run(experts))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda experts: pickle.loads(pickle.dumps(experts))], ids=["copy", "pickle"])
@makers
def test_copies_compute_the_same(make, clone):
    experts = made(make)
    other = clone(experts)
    for form in ("buffers", "rows"):
        args = arguments(form)
        assert_same_bits(with_gradients(other, other, *args), with_gradients(experts, experts, *args))


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_start_as_linear_layers_do(transposed):
    geglu, glu = Experts(16, 8), GLUExperts(16, 8, 40, bias=True, transposed=transposed)
    for weight, bias, fan_in in (
        (geglu.weight_in, geglu.bias_in, 16),
        (geglu.weight_out, geglu.bias_out, 42),
        (glu.gate_up_proj, glu.gate_up_proj_bias, 16),
        (glu.down_proj, glu.down_proj_bias, 40),
    ):
        for t in (weight, bias):
            assert 0.9 < t.abs().max() * fan_in**0.5 <= 1 + 1e-6
    assert (geglu.mult_bias == 1).all()


def test_made_on_the_meta_device():
    for make in MAKERS.values():
        experts = make(device="meta")
        for form in ("buffers", "rows"):
            args = [t.to("meta") for t in arguments(form)]
            assert experts(*args).shape == args[0].shape
        experts = experts.to_empty(device="cpu")
        for p in experts.parameters():
            p.data.fill_(torch.nan)
        experts.reset_parameters()
        assert all(p.isfinite().all() for name, p in experts.named_parameters() if name != "activation.slope")


def test_repr_says_what_it_is():
    assert repr(Experts(6, 4, 1.25)) == "Experts(dim=6, num_experts=4, hidden=5)"
    shown = "dim=6, num_experts=4, hidden=5, activation='silu', bias=False, interleaved=False, transposed=False"
    assert repr(GLUExperts(6, 4, 5)) == f"GLUExperts({shown})"
    shown = shown.replace("False", "True")
    assert repr(GLUExperts(6, 4, 5, **GPT_OSS)) == f"GLUExperts({shown}, limit=0.7, alpha=1.702)"
