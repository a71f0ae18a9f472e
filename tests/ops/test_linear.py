"""``linear``: the gate's product and its gradients, against float64; and what of it ``GateLinear`` uses when."""

import pytest
import torch
import torch.nn.functional as F
from cases import dtypes
from compare import assert_near, assert_same_bits, assert_same_for_any_schedule, spread

from topn_gating import TopNGating, linear
from topn_gating.linear import GateLinear
from topn_gating.ops import Linear

ops = torch.ops.topn_gating

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def slow_types(monkeypatch):
    """As on a CPU without instructions for half types, whatever this one has."""
    monkeypatch.setattr(linear, "SLOW_TYPES", frozenset({torch.bfloat16, torch.float16}))


def operands(dtype, shape=(3, 20, 40), num_gates=7):
    gate = GateLinear(shape[-1], num_gates, dtype=dtype)
    return gate, torch.randn(shape, dtype=dtype, requires_grad=True), torch.randn(*shape[:-1], num_gates, dtype=dtype)


def tensors(lead, dim, experts, dtype=torch.float32):
    """Random ``x``, ``weight`` and gradient of the logits."""
    return tuple(torch.randn(s, dtype=torch.float64).to(dtype) for s in ((*lead, dim), (experts, dim), (*lead, experts)))


def gradients(x, weight, grad, wants_x=True, wants_weight=True):
    return ops.linear_backward(grad, x, weight, wants_x, wants_weight)


@dtypes
@pytest.mark.parametrize(
    ("lead", "dim", "experts"),
    [
        ((2, 29), 17, 6),
        ((200,), 64, 8),
        ((1, 1), 1, 1),
        ((67,), 3, 70),
        ((1300,), 33, 5),
        ((3, 70), 1100, 19),
        ((40,), 40, 1100),
    ],
    ids=str,
)
def test_equals_the_product(nan_memory, dtype, lead, dim, experts):
    x, weight, grad = tensors(lead, dim, experts, dtype)
    exact = run(F.linear, *(t.double().requires_grad_() for t in (x, weight)), grad.double())
    for actual, expected in zip((ops.linear(x, weight), *gradients(x, weight, grad)), exact, strict=True):
        assert (actual.dtype, actual.shape) == (dtype, expected.shape)
        assert_near(actual, expected)


@pytest.mark.parametrize("lead", [(), (0,), (2, 0), (0, 3)])
def test_no_token_or_no_leading_dimension(lead):
    x, weight, grad = tensors(lead, 5, 3)
    assert_near(ops.linear(x, weight), F.linear(x.double(), weight.double()))
    grad_x, grad_weight = gradients(x, weight, grad)
    assert_near(grad_x, grad.double() @ weight.double())
    assert grad_weight.any() == (lead == ())


def test_gradients_that_are_not_wanted_are_empty():
    x, weight, grad = tensors((90,), 40, 7)
    both = gradients(x, weight, grad)
    assert_same_bits(gradients(x, weight, grad, wants_weight=False)[0], both[0])
    assert_same_bits(gradients(x, weight, grad, wants_x=False)[1], both[1])
    assert gradients(x, weight, grad, False, False)[0].shape == gradients(x, weight, grad, False, False)[1].shape == (0,)


def test_a_bad_token_reaches_itself_alone():
    x, weight, grad = tensors((150,), 40, 7)
    bad_x, bad_grad = x.clone(), grad.clone()
    bad_x[70, 3] = bad_grad[70, 2] = float("nan")
    rest = torch.arange(150) != 70
    assert_same_bits(ops.linear(bad_x, weight)[rest], ops.linear(x, weight)[rest])
    assert_same_bits(gradients(x, weight, bad_grad)[0][rest], gradients(x, weight, grad)[0][rest])
    grad_weight = gradients(bad_x, weight, bad_grad)[1]
    assert grad_weight[:, 3].isnan().all()
    assert grad_weight[2].isnan().all()
    assert not grad_weight[torch.arange(7) != 2][:, torch.arange(40) != 3].isnan().any()


@dtypes
def test_any_layout(dtype):
    x, weight, grad = tensors((3, 20), 7, 5, dtype)
    assert_same_bits(ops.linear(spread(x), spread(weight)), ops.linear(x, weight))
    assert_same_bits(gradients(spread(x), spread(weight), spread(grad)), gradients(x, weight, grad))
    one = grad.flatten()[0].expand_as(grad)
    assert_same_bits(gradients(x, weight, one), gradients(x, weight, one.contiguous()))


@pytest.mark.parametrize(("tokens", "dim", "experts"), [(9000, 40, 12), (700, 1500, 70)])
def test_same_for_any_schedule(tokens, dim, experts):
    x, weight, grad = tensors((tokens,), dim, experts)
    assert_same_for_any_schedule(lambda: (ops.linear(x, weight), *gradients(x, weight, grad)))


@dtypes
@pytest.mark.parametrize("wanted", ["both", "x", "weight"])
def test_opcheck(dtype, wanted):
    x, weight, _ = tensors((2, 6), 5, 3, dtype)
    args = x.requires_grad_(wanted != "weight"), weight.requires_grad_(wanted != "x")
    torch.library.opcheck(ops.linear.default, args)


@pytest.mark.parametrize("function", [ops.linear, Linear.apply, linear.TorchLinear.apply], ids=["op", "ours", "torch"])
def test_gradcheck(function):
    x, weight, _ = (t.requires_grad_() for t in tensors((2, 6), 5, 3, torch.float64))
    assert torch.autograd.gradcheck(function, (x, weight))
    assert torch.autograd.gradgradcheck(function, (x, weight))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 6)}, "x must have shape"),
        ({"x": torch.zeros(())}, "x must have shape"),
        ({"x": torch.zeros(4, 5, dtype=torch.int32)}, "x must be float32"),
        ({"weight": torch.zeros(5)}, "weight must have shape"),
        ({"weight": torch.zeros(0, 5)}, "weight must have shape"),
        ({"weight": torch.zeros(3, 5, dtype=torch.float64)}, "weight must be Float"),
        ({"grad": torch.zeros(4, 2)}, "grad_logits has a shape"),
        ({"grad": torch.zeros(4, 3, dtype=torch.float64)}, "grad_logits must be Float"),
    ],
    ids=str,
)
def test_bad_arguments(change, message):
    given = dict(zip(("x", "weight", "grad"), tensors((4,), 5, 3), strict=True)) | change
    with pytest.raises(RuntimeError, match=message):
        gradients(**given)
    if "grad" not in change:
        with pytest.raises(RuntimeError, match=message):
            ops.linear(given["x"], given["weight"])


def run(function, x, weight, grad):
    out = function(x, weight)
    return out.detach(), *torch.autograd.grad(out, (x, weight), grad)


@HALVES
def test_each_result_is_rounded_once(dtype):
    gate, x, grad = operands(dtype)
    exact = run(F.linear, *(t.detach().double().requires_grad_() for t in (x, gate.weight)), grad.double())
    for actual, expected in zip(run(lambda x, _: gate(x), x, gate.weight, grad), exact, strict=True):
        assert actual.dtype == dtype
        rounding = torch.finfo(dtype).eps / 2
        torch.testing.assert_close(actual.double(), expected, rtol=1.01 * rounding, atol=1e-5)


@HALVES
def test_any_leading_dimensions_and_none(dtype):
    for shape in ((20, 40), (2, 3, 20, 40), (0, 20, 40)):
        gate, x, grad = operands(dtype, shape)
        out, grad_x, grad_weight = run(lambda x, _, gate=gate: gate(x), x, gate.weight, grad)
        assert (out.shape, grad_x.shape, grad_weight.shape) == (grad.shape, x.shape, gate.weight.shape)
        torch.testing.assert_close(out, F.linear(x.float(), gate.weight.float()).to(dtype))


def test_autocast_asks_for_the_type():
    gate, x, _ = operands(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = gate(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, F.linear(x.bfloat16().float(), gate.weight.bfloat16().float()).bfloat16(), rtol=0, atol=0)
    grads = torch.autograd.grad(out.sum(), (x, gate.weight))
    assert [g.dtype for g in grads] == [torch.float32, torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_other_types_have_torchs_logits_and_the_kernels_gradients(dtype):
    gate, x, grad = operands(dtype)
    logits, *grads = run(lambda x, _: gate(x), x, gate.weight, grad)
    with torch.no_grad():
        assert_same_bits((logits, gate(x)), (F.linear(x, gate.weight),) * 2)
        assert_same_bits(grads, gradients(x, gate.weight, grad))
    (alone,) = torch.autograd.grad(gate(x.detach()), gate.weight, grad)
    assert_same_bits(alone, grads[1])


def test_types_that_do_not_fit_are_an_error():
    gate, x, _ = operands(torch.bfloat16)
    for bad in (x.float(), x.double()):
        with pytest.raises(TypeError, match=r"^x must be torch.bfloat16 like the gate's weight, .* got torch.float"):
            gate(bad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gate(x.float()).dtype == torch.bfloat16
        with pytest.raises(TypeError, match=r"^x must be torch.bfloat16 .* got torch.float64"):
            gate(x.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_bias_is_added(dtype):
    gate, x, grad = operands(dtype)
    gate.bias = torch.nn.Parameter(torch.randn(7, dtype=dtype))
    out = gate(x)
    torch.testing.assert_close(
        out, F.linear(x.double(), gate.weight.double(), gate.bias.double()).to(dtype), rtol=1e-2, atol=1e-2
    )
    (grad_bias,) = torch.autograd.grad(out, gate.bias, grad)
    torch.testing.assert_close(grad_bias.double(), grad.double().flatten(0, -2).sum(0), rtol=1e-2, atol=0.2)


def test_float64_stays_float64_under_autocast():
    gate, x, _ = operands(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(gate(x).detach(), F.linear(x, gate.weight).detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_forward_mode_is_torchs(dtype):
    gate, x, _ = operands(dtype)
    x, tangent = x.detach(), torch.randn_like(x)
    out, out_tangent = torch.func.jvp(gate, (x,), (tangent,))
    torch.testing.assert_close(out, F.linear(x, gate.weight))
    torch.testing.assert_close(out_tangent, F.linear(tangent, gate.weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_one_graph_and_the_same_numbers(dtype):
    gate, x, grad = operands(dtype)
    compiled = torch.compile(gate, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(
        run(lambda x, _: compiled(x), x, gate.weight, grad), run(lambda x, _: gate(x), x, gate.weight, grad), strict=True
    ):
        tolerance = {"rtol": 0, "atol": 0} if dtype == torch.bfloat16 else {}  # float32: torch's own gradients
        torch.testing.assert_close(actual, expected, **tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_vmap_and_second_derivative(dtype):
    gate, x, _ = operands(dtype)
    torch.testing.assert_close(torch.vmap(gate)(x), gate(x), rtol=0, atol=0)
    (grad,) = torch.autograd.grad(gate(x).float().square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.float().sum(), x)
    weight = gate.weight.double()
    expected = 2 * torch.ones_like(x, dtype=torch.double) @ (weight.T @ weight)
    torch.testing.assert_close(second.double(), expected, rtol=0.05, atol=0.05)


def test_the_gate_has_it_under_the_peers_name():
    gate = TopNGating(8, 4)
    assert type(gate.to_gates) is GateLinear
    assert isinstance(gate.to_gates, torch.nn.Linear)
    assert gate.to_gates.bias is None
    assert set(gate.state_dict()) == {"to_gates.weight", "threshold_train", "threshold_eval"}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_one_feature_and_one_expert(device):
    x, weight = torch.ones(3, 1, device=device), torch.ones(1, 1, device=device)
    assert torch.ops.topn_gating.linear(x, weight).shape == (3, 1)
    grads = torch.ops.topn_gating.linear_backward(x, x, weight, True, True)
    assert [g.shape for g in grads] == [x.shape, weight.shape]
