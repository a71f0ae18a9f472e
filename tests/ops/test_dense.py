"""``dense``: the two ``(…, n, e, C)`` tensors, every element of them, and the gradient that they give the weights."""

from dataclasses import replace

import pytest
import torch
from cases import Assignment, assignment, dtypes, honest, tampered
from compare import assert_near, assert_same_bits, assert_same_for_any_schedule, spread

from topn_gating import reference
from topn_gating.dtypes import compute_dtype

pytestmark = pytest.mark.usefixtures("nan_memory")

SIZES = [(1, 1), (1, 17), (2, 2), (3, 5), (5, 16), (7, 13), (8, 4), (16, 16), (33, 3), (64, 5), (9, 200)]
sizes = pytest.mark.parametrize(("experts", "capacity"), SIZES)


def dense(backend, a: Assignment, dtype: torch.dtype):
    return backend("dense", a.weight, *a.slots, dtype, a.straight_through)


def backward(backend, a: Assignment, grad_dispatch, grad_combine):
    return backend("dense_backward", grad_dispatch, grad_combine, *a.slots)


def random_gradients(a: Assignment, dtype: torch.dtype):
    shape = (*a.slot.shape[:-1], *a.source.shape[-2:])
    return torch.randn(shape, dtype=torch.float64).to(dtype), torch.randn(shape, dtype=torch.float64).to(dtype)


def oracle_gradient(a: Assignment, grad_dispatch, grad_combine):
    weight = a.weight.double().requires_grad_()
    outputs, grads = reference.dense(a.routing(weight)), (grad_dispatch, grad_combine)
    total = sum((out * grad.double()).sum() for out, grad in zip(outputs, grads, strict=True) if grad is not None)
    return torch.autograd.grad(total, weight)[0]


@dtypes
@sizes
@pytest.mark.parametrize("top_n", [1, 2, 3, 5])
def test_equals_the_reference(backend, experts, capacity, top_n, dtype):
    a = assignment((2, 19), experts, min(top_n, experts), capacity, dtype=dtype)
    dispatch, combine = dense(backend, a, dtype)
    assert_same_bits((dispatch, combine), reference.dense(a.routing(), dtype))
    assert set(dispatch.unique().tolist()) <= {0.0, 1.0}  # exactly 1 (docs/spec.md, deviation D6)
    assert dispatch.sum() == (a.slot >= 0).sum()


@dtypes
def test_an_entry_at_each_place(backend, dtype):
    """One entry after none: whatever lies before and after it is zero, at the ends of a row and in the midst of it."""
    for place in range(5 * 29):
        expert, slot = (torch.tensor([[0], [t], [0]], dtype=torch.int32) for t in divmod(place, 29))
        slot[[0, 2]] = -1
        source = torch.full((5, 29), -1, dtype=torch.int32)
        source.view(-1)[place] = 1  # the pair of token 1
        weight = torch.full((3, 1), 0.5, dtype=compute_dtype(dtype))
        out = backend("dense", weight, expert, slot, source, dtype, True)
        expected = torch.zeros(3, 5, 29, dtype=dtype)
        expected[1].view(-1)[place] = 1
        assert_same_bits(out, (expected, expected / 2))
        last = backend("dense", weight[:2], expert[:2], slot[:2], source, dtype, True)
        assert_same_bits(last, (expected[:2], expected[:2] / 2))


@pytest.mark.parametrize("lead", [(4,), (2, 3, 4), (0,), (3, 0), (0, 4), (2, 0, 4)])
def test_leading_dimensions_and_nothing(backend, lead):
    a = assignment(lead, 5, 2, 3)
    assert_same_bits(dense(backend, a, torch.float32), reference.dense(a.routing()))
    assert backward(backend, a, *random_gradients(a, torch.float32)).shape == a.slot.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_beyond_the_caches(backend, dtype):
    experts, capacity, itemsize = 7, 1033, torch.empty(0, dtype=dtype).itemsize
    tokens = (68 << 20) // (experts * capacity * itemsize)  # 68 MiB each, rows that are no multiple of a vector
    a = assignment((tokens,), experts, 2, capacity, dtype=dtype)
    ends = {0: (0, 1031), tokens // 2: (1, 1030), tokens - 1: (2, 1032)}  # slots at the ends of a row, and of the outputs
    for token, slots in ends.items():
        a.expert[token], a.slot[token], a.weight[token] = torch.tensor([0, 6]), torch.tensor(slots), 0.25
        a.source[[0, 6], slots] = torch.tensor([2 * token, 2 * token + 1], dtype=torch.int32)
    a = honest(a)
    assert (a.slot[list(ends)] >= 0).all()
    n, k = torch.where(a.slot >= 0)
    for out, value in zip(dense(backend, a, dtype), (torch.ones_like(a.weight), a.weight), strict=True):
        assert out.shape == (tokens, experts, capacity)
        assert_same_bits(out[n, a.expert[n, k], a.slot[n, k]], value[n, k].to(dtype))
        assert out.count_nonzero() == (value[n, k] != 0).sum()


def test_weights_are_copied_whatever_they_are(backend):
    a = assignment((40,), 5, 3, 6)
    a.weight[a.slot == 0] = float("nan")
    a.weight[a.slot == 1] = float("inf")
    a.weight[a.slot < 0] = float("nan")  # of no slot: not shown
    n, k = torch.where(a.slot >= 0)
    combine = dense(backend, a, torch.float32)[1]
    assert_same_bits(combine[n, a.expert[n, k], a.slot[n, k]], a.weight[n, k])
    assert combine.count_nonzero() == len(n)


def test_any_layout(backend):
    a = assignment((3, 20), 5, 2, 6)
    strided = replace(a, weight=spread(a.weight), expert=spread(a.expert), slot=spread(a.slot), source=spread(a.source))
    assert_same_bits(dense(backend, strided, torch.float32), dense(backend, a, torch.float32))
    grads = random_gradients(a, torch.float32)
    assert_same_bits(backward(backend, strided, *grads), backward(backend, a, *grads))


@dtypes
@pytest.mark.parametrize("share", [0.02, 0.3])
def test_tampered_indices_count_as_not_routed(backend, dtype, share):
    a = tampered(assignment((3, 40), 7, 3, 5, dtype=dtype), share)
    held = honest(a)
    assert_same_bits(dense(backend, a, dtype), reference.dense(held.routing(), dtype))
    grads = random_gradients(a, dtype)
    assert_near(backward(backend, a, *grads), oracle_gradient(held, *grads))


def test_shows_what_dispatch_and_combine_use(backend):
    """A slot that ``source`` gives to another pair is empty for all of them."""
    a = assignment((1, 8), 2, 1, 8)
    held = a.slot >= 0
    a = replace(a, slot=torch.where(held, (a.slot + 1) % 8, a.slot))
    dispatch, combine = dense(backend, a, torch.float32)
    assert not dispatch.any()
    assert not combine.any()
    assert not backward(backend, a, *random_gradients(a, torch.float32)).any()
    x = torch.randn(1, 8, 4)
    assert_same_bits(backend("dispatch", x, a.weight, *a.indices, True), torch.zeros(1, 2, 8, 4))


# Gradients


@dtypes
@sizes
@pytest.mark.parametrize("given", ["both", "dispatch", "combine"])
def test_gradient(backend, experts, capacity, dtype, given):
    a = assignment((2, 19), experts, min(3, experts), capacity, dtype=dtype)
    grad_dispatch, grad_combine = random_gradients(a, dtype)
    grads = grad_dispatch if given != "combine" else None, grad_combine if given != "dispatch" else None
    grad = backward(backend, a, *grads)
    assert grad.dtype == a.weight.dtype
    assert_near(grad, oracle_gradient(a, *grads))


LAYOUTS = {
    "einsum of dispatch": lambda g: g.movedim(1, -1).contiguous().movedim(-1, 1),
    "einsum of combine": lambda g: g.transpose(1, 2).contiguous().transpose(1, 2),
    "every other": spread,
    "slice": lambda g: torch.nn.functional.pad(g, (1, 2, 1, 0))[..., 1:, 1:-2],
    "expanded": lambda g: g[:1, :1, :1, :1].expand_as(g),
    "expanded slots": lambda g: g[..., :1].expand_as(g),
    "flipped": lambda g: g.flip(-1),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("other", ["same layout", "contiguous", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_by_strides(backend, layout, other, dtype):
    a = assignment((3, 20), 5, 2, 6, dtype=dtype)
    grad_dispatch, grad_combine = random_gradients(a, dtype)
    grad_dispatch = layout(grad_dispatch)
    grad_combine = {"same layout": layout(grad_combine), "contiguous": grad_combine, "none": None}[other]
    plain = (None if g is None else g.contiguous() for g in (grad_dispatch, grad_combine))
    assert_same_bits(backward(backend, a, grad_dispatch, grad_combine), backward(backend, a, *plain))
    assert_near(backward(backend, a, grad_dispatch, grad_combine), oracle_gradient(a, grad_dispatch, grad_combine))


def test_gradients_of_no_slot_are_not_read(backend):
    a = assignment((3, 20), 5, 2, 6)
    held = dense(backend, a, torch.float32)[0] > 0
    grads = [g.where(held, float("nan")) for g in random_gradients(a, torch.float32)]
    assert_same_bits(backward(backend, a, *grads), backward(backend, a, *(g.where(held, 0) for g in grads)))


@pytest.mark.parametrize("straight_through", [False, True])
def test_gradcheck(entry_point, device, straight_through):
    """The straight-through gradient of ``dispatch`` has no finite difference: it is compared to the reference's."""
    a = assignment((2, 6), 4, 2, 2, dtype=torch.float64, straight_through=straight_through)
    weight, *indices = (t.to(device) for t in (a.weight, *a.slots))

    def dense(weight):
        return entry_point("dense")(weight, *indices, torch.float64, straight_through)

    assert torch.autograd.gradcheck(lambda w: dense(w)[1], weight.requires_grad_())
    grads = random_gradients(a, torch.float64)
    actual = torch.autograd.grad(dense(weight), weight, tuple(g.to(device) for g in grads))[0]
    assert_near(actual.cpu(), oracle_gradient(a, *grads))
    one = torch.autograd.grad(dense(weight)[0].sum(), weight, allow_unused=True)[0]
    expected = (a.slot >= 0).double() * straight_through
    assert_same_bits(torch.zeros_like(expected) if one is None else one.cpu(), expected)


@dtypes
@pytest.mark.parametrize("straight_through", [False, True])
def test_opcheck(device, dtype, straight_through):
    a = assignment((2, 6), 4, 2, 3, dtype=dtype)
    args = a.weight.to(device).requires_grad_(), *(t.to(device) for t in a.slots), dtype, straight_through
    torch.library.opcheck(torch.ops.topn_gating.dense.default, args)


@pytest.mark.parametrize(("lead", "experts", "capacity"), [((1, 4000), 9, 33), ((300, 16), 8, 5)])
def test_same_for_any_schedule(backend, lead, experts, capacity):
    a = assignment(lead, experts, 2, capacity)
    grads = random_gradients(a, torch.float32)
    assert_same_for_any_schedule(lambda: (*dense(backend, a, torch.float32), backward(backend, a, *grads)))
