"""``GateLinear``: half types as products of float32 where torch has none of their own, and ``nn.Linear`` everywhere else."""

import pytest
import torch
import torch.nn.functional as F

from topn_gating import TopNGating, linear
from topn_gating.linear import GateLinear

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def slow_types(monkeypatch):
    """As on a CPU without instructions for half types, whatever this one has."""
    monkeypatch.setattr(linear, "SLOW_TYPES", frozenset({torch.bfloat16, torch.float16}))


def operands(dtype, shape=(3, 20, 40), num_gates=7):
    gate = GateLinear(shape[-1], num_gates, dtype=dtype)
    return gate, torch.randn(shape, dtype=dtype, requires_grad=True), torch.randn(*shape[:-1], num_gates, dtype=dtype)


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


def test_other_types_are_torchs_own():
    for dtype in (torch.float32, torch.float64):
        gate, x, _ = operands(dtype)
        assert torch.equal(gate(x), F.linear(x, gate.weight))
    gate, x, _ = operands(torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtype"):
        gate(x.float())


def test_one_graph_and_the_same_numbers():
    gate, x, grad = operands(torch.bfloat16)
    compiled = torch.compile(gate, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(
        run(lambda x, _: compiled(x), x, gate.weight, grad), run(lambda x, _: gate(x), x, gate.weight, grad), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_vmap_and_second_derivative():
    gate, x, _ = operands(torch.bfloat16)
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
