"""``dispatch``: token rows to expert buffers, against the einsum with the reference's dense tensor."""

import itertools

import pytest
import torch
from cases import INT_MAX, Assignment, assignment, dtypes, honest, layouts, tampered, two_layouts
from compare import assert_near, assert_same_bits, assert_same_for_any_schedule, spread

from topn_gating import reference

pytestmark = pytest.mark.usefixtures("nan_memory")

dims = pytest.mark.parametrize("dim", [1, 3, 17, 64, 513])


def dispatch(backend, a: Assignment, x):
    return backend("dispatch", x, a.weight, *a.indices, a.straight_through)


def backward(backend, a: Assignment, x, grad_y):
    return backend("dispatch_backward", grad_y, x, *a.indices)


def rows(a: Assignment, dim: int, dtype=torch.float32):
    """Random ``x`` and gradient of ``y``."""
    x = torch.randn((*a.slot.shape[:-1], dim), dtype=torch.float64)
    return x.to(dtype), torch.randn((*a.source.shape, dim), dtype=torch.float64).to(dtype)


def oracle_gradients(a: Assignment, x, grad_y):
    """Of x and of the weight, in float64."""
    x, weight = x.double().requires_grad_(), a.weight.double().requires_grad_()
    y = reference.dispatch(x, a.routing(weight))
    return torch.autograd.grad(y, (x, weight), grad_y.double(), materialize_grads=True)


@dtypes
@dims
@layouts
@pytest.mark.parametrize("top_n", [1, 2, 4])
def test_equals_the_einsum(backend, dtype, dim, top_n, layout):
    a = assignment((2, 29), 6, top_n, **{"capacity": 5, **layout}, dtype=dtype)
    x, grad_y = rows(a, dim, dtype)
    assert_same_bits(dispatch(backend, a, x), reference.dispatch(x.double(), a.routing(a.weight.double())).to(dtype))
    grad_x, grad_weight = backward(backend, a, x, grad_y)
    assert (grad_x.dtype, grad_weight.dtype) == (dtype, a.weight.dtype)
    for actual, expected in zip((grad_x, grad_weight), oracle_gradients(a, x, grad_y), strict=True):
        assert_near(actual, expected)
    assert_same_bits(backward(backend, a, None, grad_y)[0], grad_x)


@layouts
@pytest.mark.parametrize("lead", [(1,), (7,), (2, 3, 7), (0,), (3, 0), (0, 4), (2, 0, 4)])
def test_leading_dimensions_and_nothing(backend, lead, layout):
    a = assignment(lead, 5, 2, **{"capacity": 3, **layout})
    x, grad_y = rows(a, 4)
    y = dispatch(backend, a, x)
    assert y.shape == (*a.source.shape, 4)
    assert torch.equal(y, reference.dispatch(x, a.routing()))  # but for the sign of zeros
    assert [g.shape for g in backward(backend, a, x, grad_y)] == [x.shape, a.slot.shape]


@pytest.mark.parametrize(("group", "expert", "slot"), [(0, 0, 2), (0, 1, -1), (0, 3, 0), (1, -1, 1)])
def test_a_slot_just_outside_its_expert_is_not_held(backend, group, expert, slot):
    """Even where the neighbour's slot, which lies at that place in memory, names the pair as its source."""
    experts, capacity = 3, 2
    place = (group * experts + expert) * capacity + slot
    source = torch.full((2, experts, capacity), -1, dtype=torch.int32)
    source.view(-1)[place] = 0
    chosen, slots = torch.zeros(2, 1, 1, dtype=torch.int32), torch.full((2, 1, 1), -1, dtype=torch.int32)
    chosen[group], slots[group] = expert, slot
    a = Assignment(torch.ones(2, 1, 1), chosen, slots, source)
    assert not dispatch(backend, a, torch.ones(2, 1, 4)).any()
    assert not backend("combine", torch.ones(*source.shape, 4), a.weight, *a.indices).any()
    assert not any(t.any() for t in backend("dense", a.weight, *a.slots, torch.float32, True))


@pytest.mark.parametrize("ends", [(2, -1, 4), (2, 2**31 - 1, 4), (-(2**31), 3, 4), (2, 5, 4), (2, 1, 4), (4, 3, 2)], ids=str)
def test_a_slot_outside_its_experts_rows_is_not_held(backend, ends):
    """Wherever the experts' rows are said to end, and even where that row names the pair as its source."""
    rows = 4
    starts = [0, *ends[:-1]]
    for expert, slot in itertools.product(range(3), (0, 1, 2, 3, INT_MAX)):
        row = starts[expert] + slot
        held = 0 <= row < ends[expert] <= rows
        source = torch.full((rows,), -1, dtype=torch.int32)
        source[row if 0 <= row < rows else 0] = 0
        pair = [torch.full((1, 1), i, dtype=torch.int32) for i in (expert, slot)]
        a = Assignment(torch.ones(1, 1), *pair, source, torch.tensor(ends, dtype=torch.int32))
        y = dispatch(backend, a, torch.ones(1, 4))
        assert y.any() == held
        assert backend("combine", torch.ones(rows, 4), a.weight, *a.indices).any() == held
        assert y[row].all() if held else True


def test_a_bad_row_goes_to_its_own_slots_alone(backend):
    a = assignment((2, 29), 6, 2, 5)
    x, grad_y = rows(a, 8)
    clean, clean_grads = dispatch(backend, a, x), backward(backend, a, x, grad_y)
    bad = x.clone()
    bad[1, 3], bad[0, 7] = float("nan"), float("inf")
    y, others = dispatch(backend, a, bad), torch.ones(2, 6, 5, dtype=torch.bool)
    for g, n in ((1, 3), (0, 7)):
        others[g] &= a.source[g] // 2 != n
        assert_same_bits(y[g][a.source[g] // 2 == n], bad[g, n].expand((a.slot[g, n] >= 0).sum(), 8).contiguous())
    assert not others.all()
    assert_same_bits(y[others], clean[others])
    rest = torch.ones(2, 29, dtype=torch.bool)
    rest[1, 3] = rest[0, 7] = False
    grads = backward(backend, a, bad, grad_y)
    assert_same_bits([g[rest] for g in grads], [g[rest] for g in clean_grads])


@layouts
def test_gradients_of_empty_slots_are_not_read(backend, layout):
    a = assignment((2, 9), 6, 2, **{"capacity": 5, **layout})
    x, grad_y = rows(a, 8)
    empty = (a.source < 0).unsqueeze(-1)
    assert empty.any()
    bad, zero = grad_y.where(~empty, float("nan")), grad_y.where(~empty, 0)
    assert_same_bits(backward(backend, a, x, bad), backward(backend, a, x, zero))


@dtypes
@layouts
@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_tampered_indices_count_as_not_routed(backend, dtype, share, layout):
    a = tampered(assignment((3, 40), 7, 3, **{"capacity": 5, **layout}, dtype=dtype), share)
    x, grad_y = rows(a, 9, dtype)
    assert_same_bits(dispatch(backend, a, x), dispatch(backend, honest(a), x))
    assert_same_bits(backward(backend, a, x, grad_y), backward(backend, honest(a), x, grad_y))
    for actual, expected in zip(backward(backend, a, x, grad_y), oracle_gradients(honest(a), x, grad_y), strict=True):
        assert_near(actual, expected)


@dtypes
@layouts
def test_any_layout_of_memory(backend, dtype, layout):
    a = assignment((3, 20), 5, 2, **{"capacity": 6, **layout}, dtype=dtype)
    strided = a.map(spread)
    x, grad_y = rows(a, 7, dtype)
    assert_same_bits(dispatch(backend, strided, spread(x)), dispatch(backend, a, x))
    assert_same_bits(backward(backend, strided, spread(x), spread(grad_y)), backward(backend, a, x, grad_y))
    expanded, one = x[:1, :1].expand_as(x), grad_y.flatten()[0].expand_as(grad_y)
    assert_same_bits(dispatch(backend, a, expanded), dispatch(backend, a, expanded.contiguous()))
    assert_same_bits(backward(backend, a, expanded, one), backward(backend, a, expanded.contiguous(), one.contiguous()))


@layouts
@pytest.mark.parametrize("straight_through", [False, True])
def test_autograd(entry_point, device, straight_through, layout):
    """The straight-through gradient has no finite difference: x is checked by gradcheck, the weight against the reference."""
    options = {"dtype": torch.float64, "straight_through": straight_through}
    a = assignment((2, 6), 4, 2, **{"capacity": 2, **layout}, **options)
    x, grad_y = rows(a, 3, torch.float64)
    indices = a.map(lambda t: t.to(device)).indices
    x_leaf, weight = (t.to(device).requires_grad_() for t in (x.clone(), a.weight))

    def run(x, weight):
        return entry_point("dispatch")(x, weight, *indices, straight_through)

    assert torch.autograd.gradcheck(lambda x: run(x, weight.detach()), x_leaf)
    for grad in (grad_y, torch.ones((), dtype=torch.float64).expand_as(grad_y)):
        actual = torch.autograd.grad(run(x_leaf, weight), (x_leaf, weight), grad.to(device), materialize_grads=True)
        for g, expected in zip(actual, oracle_gradients(a, x, grad), strict=True):
            assert_near(g.cpu(), expected)
    run(x_leaf, weight.detach()).sum().backward()
    assert_near(x_leaf.grad.cpu(), (a.slot >= 0).sum(-1, keepdim=True).double().expand_as(x))


@layouts
def test_weight_alone_wants_a_gradient(entry_point, device, layout):
    a = assignment((2, 6), 4, 2, **{"capacity": 2, **layout}, dtype=torch.float64)
    x, grad_y = rows(a, 3, torch.float64)
    weight = a.weight.clone().to(device).requires_grad_()
    y = entry_point("dispatch")(x.to(device), weight, *a.map(lambda t: t.to(device)).indices, True)
    assert_near(torch.autograd.grad(y, weight, grad_y.to(device))[0].cpu(), oracle_gradients(a, x, grad_y)[1])


@dtypes
@pytest.mark.parametrize(
    ("wanted", "straight_through"), [("both", True), ("both", False), ("x", True), ("x", False), ("weight", True)]
)
@two_layouts
def test_opcheck(device, dtype, wanted, straight_through, layout):
    a = assignment((2, 6), 4, 2, **{"capacity": 3, **layout}, dtype=dtype)
    x = rows(a, 5, dtype)[0].to(device).requires_grad_(wanted != "weight")
    weight = a.weight.to(device).requires_grad_(wanted != "x")
    args = x, weight, *a.map(lambda t: t.to(device)).indices, straight_through
    torch.library.opcheck(torch.ops.topn_gating.dispatch.default, args)


@pytest.mark.parametrize(("lead", "dim"), [((1, 3000), 65), ((100, 30), 33), ((1, 50), 4099)])
@two_layouts
def test_same_for_any_schedule(backend, lead, dim, layout):
    a = assignment(lead, 9, 3, **{"capacity": max(4, lead[-1] // 7), **layout})
    x, grad_y = rows(a, dim)
    assert_same_for_any_schedule(lambda: (dispatch(backend, a, x), *backward(backend, a, x, grad_y)))
