"""``combine``: expert buffers back to token rows, against the einsum with the reference's dense tensor."""

import pytest
import torch
from cases import Assignment, assignment, dtypes, honest, layouts, tampered, two_layouts
from compare import assert_near, assert_same_bits, assert_same_for_any_schedule, spread

from topn_gating import reference

pytestmark = pytest.mark.usefixtures("nan_memory")

dims = pytest.mark.parametrize("dim", [1, 3, 17, 64, 513])


def combine(backend, a: Assignment, y):
    return backend("combine", y, a.weight, *a.indices)


def backward(backend, a: Assignment, y, grad_out):
    return backend("combine_backward", grad_out, y, a.weight, *a.indices)


def rows(a: Assignment, dim: int, dtype=torch.float32):
    """Random ``y`` and gradient of the output."""
    y = torch.randn((*a.source.shape, dim), dtype=torch.float64)
    return y.to(dtype), torch.randn((*a.slot.shape[:-1], dim), dtype=torch.float64).to(dtype)


def oracle(a: Assignment, y):
    return reference.combine(y.double(), a.routing(a.weight.double()))


def oracle_gradients(a: Assignment, y, grad_out):
    """Of y and of the weight, in float64."""
    y, weight = y.double().requires_grad_(), a.weight.double().requires_grad_()
    return torch.autograd.grad(reference.combine(y, a.routing(weight)), (y, weight), grad_out.double())


@dtypes
@dims
@layouts
@pytest.mark.parametrize("top_n", [1, 2, 4])
def test_equals_the_einsum(backend, dtype, dim, top_n, layout):
    a = assignment((2, 29), 6, top_n, **{"capacity": 5, **layout}, dtype=dtype)
    y, grad_out = rows(a, dim, dtype)
    out = combine(backend, a, y)
    assert out.dtype == dtype
    assert_near(out, oracle(a, y))
    grad_y, grad_weight = backward(backend, a, y, grad_out)
    assert (grad_y.dtype, grad_weight.dtype) == (dtype, a.weight.dtype)
    for actual, expected in zip((grad_y, grad_weight), oracle_gradients(a, y, grad_out), strict=True):
        assert_near(actual, expected)


@layouts
@pytest.mark.parametrize("lead", [(1,), (7,), (2, 3, 7), (0,), (3, 0), (0, 4), (2, 0, 4)])
def test_leading_dimensions_and_nothing(backend, lead, layout):
    a = assignment(lead, 5, 2, **{"capacity": 3, **layout})
    y, grad_out = rows(a, 4)
    out = combine(backend, a, y)
    assert out.shape == (*lead, 4)
    assert_near(out, oracle(a, y))
    assert [g.shape for g in backward(backend, a, y, grad_out)] == [y.shape, a.slot.shape]
    assert not backward(backend, a, y, grad_out)[0][a.source < 0].any()  # rows that no pair holds


def test_dropped_tokens_are_zero(backend):
    a = assignment((60,), 4, 2, 3)
    dropped = (a.slot < 0).all(-1)
    assert dropped.any()
    out = combine(backend, a, rows(a, 5)[0])
    assert not out[dropped].any()
    assert out[~dropped].all()


@layouts
def test_empty_slots_are_not_read(backend, layout):
    a = assignment((2, 9), 6, 2, **{"capacity": 5, **layout})
    y, grad_out = rows(a, 8)
    empty = (a.source < 0).unsqueeze(-1)
    assert empty.any()
    bad, zero = y.where(~empty, float("nan")), y.where(~empty, 0)
    assert_same_bits(combine(backend, a, bad), combine(backend, a, zero))
    assert_same_bits(backward(backend, a, bad, grad_out), backward(backend, a, zero, grad_out))


def test_a_bad_row_reaches_its_own_token_alone(backend):
    a = assignment((2, 29), 6, 2, 5)
    y, grad_out = rows(a, 8)
    token = int(a.source[1, 2, 0]) // 2
    rest = torch.ones(2, 29, dtype=torch.bool)
    rest[1, token] = False
    bad_y, bad_grad = y.clone(), grad_out.clone()
    bad_y[1, 2, 0] = bad_grad[1, token] = float("nan")
    out = combine(backend, a, bad_y)
    assert out[1, token].isnan().all()
    assert_same_bits(out[rest], combine(backend, a, y)[rest])
    (grad_y, grad_weight), (clean_y, clean_weight) = backward(backend, a, y, bad_grad), backward(backend, a, y, grad_out)
    others = torch.ones(2, 6, 5, dtype=torch.bool)
    others[1] = a.source[1] // 2 != token
    assert_same_bits(grad_y[others], clean_y[others])
    assert_same_bits(grad_weight[rest], clean_weight[rest])
    assert grad_y[~others].isnan().all()


@dtypes
@layouts
@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_tampered_indices_count_as_not_routed(backend, dtype, share, layout):
    a = tampered(assignment((3, 40), 7, 3, **{"capacity": 5, **layout}, dtype=dtype), share)
    a.weight[torch.rand(a.weight.shape) < 0.2] = 0.5  # a caller's own weights need not be 0 where no slot is held
    y, grad_out = rows(a, 9, dtype)
    assert_same_bits(combine(backend, a, y), combine(backend, honest(a), y))
    assert_same_bits(backward(backend, a, y, grad_out), backward(backend, honest(a), y, grad_out))
    assert_near(combine(backend, a, y), oracle(honest(a), y))
    for actual, expected in zip(backward(backend, a, y, grad_out), oracle_gradients(honest(a), y, grad_out), strict=True):
        assert_near(actual, expected)


@dtypes
@layouts
def test_any_layout_of_memory(backend, dtype, layout):
    a = assignment((3, 20), 5, 2, **{"capacity": 6, **layout}, dtype=dtype)
    strided = a.map(spread)
    y, grad_out = rows(a, 7, dtype)
    assert_same_bits(combine(backend, strided, spread(y)), combine(backend, a, y))
    assert_same_bits(backward(backend, strided, spread(y), spread(grad_out)), backward(backend, a, y, grad_out))
    expanded, one = y.flatten(0, -2)[0].expand_as(y), grad_out.flatten()[0].expand_as(grad_out)
    assert_same_bits(combine(backend, a, expanded), combine(backend, a, expanded.contiguous()))
    assert_same_bits(backward(backend, a, expanded, one), backward(backend, a, expanded.contiguous(), one.contiguous()))


@layouts
def test_gradcheck(entry_point, device, layout):
    a = assignment((2, 6), 4, 2, **{"capacity": 2, **layout}, dtype=torch.float64)
    y = rows(a, 3, torch.float64)[0].to(device).requires_grad_()
    weight, indices = a.weight.to(device).requires_grad_(), a.map(lambda t: t.to(device)).indices
    assert torch.autograd.gradcheck(lambda y, w: entry_point("combine")(y, w, *indices), (y, weight))
    entry_point("combine")(y, weight, *indices).sum().backward()
    expected = oracle_gradients(a, y.detach().cpu(), torch.ones(2, 6, 3))
    assert_near(y.grad.cpu(), expected[0])
    assert_near(weight.grad.cpu(), expected[1])


@dtypes
@two_layouts
@pytest.mark.parametrize("wanted", ["both", "y", "weight"])
def test_opcheck(device, dtype, wanted, layout):
    a = assignment((2, 6), 4, 2, **{"capacity": 3, **layout}, dtype=dtype)
    y = rows(a, 5, dtype)[0].to(device).requires_grad_(wanted != "weight")
    args = y, a.weight.to(device).requires_grad_(wanted != "y"), *a.map(lambda t: t.to(device)).indices
    torch.library.opcheck(torch.ops.topn_gating.combine.default, args)


@pytest.mark.parametrize(("lead", "dim"), [((1, 3000), 65), ((100, 30), 33), ((1, 50), 4099)])
@two_layouts
def test_same_for_any_schedule(backend, lead, dim, layout):
    a = assignment(lead, 9, 3, **{"capacity": max(4, lead[-1] // 7), **layout})
    y, grad_out = rows(a, dim)
    assert_same_for_any_schedule(lambda: (combine(backend, a, y), *backward(backend, a, y, grad_out)))
