"""The CUDA kernels against the CPU's, on operands with NaN, infinities, zeros and negative numbers anywhere; by Hypothesis.

Integers are equal to the bit; NaN and infinities stand in the same places; the rest is within rounding.
"""

import pytest
import torch
from backends import BACKENDS
from cases import Backend, assign_case, assignment, gate_case
from compare import assert_near, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from topn_gating.ops import POLICIES, SCORES

INF, NAN = float("inf"), float("nan")
COMPUTE_TYPES = st.sampled_from([torch.float32, torch.float64])
TYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
BOTH = st.booleans()

CPU = BACKENDS["cpu"]
others = pytest.mark.parametrize(
    "other", [b for b in BACKENDS.values() if b is not CPU], ids=[n for n in BACKENDS if n != "cpu"]
)


UNUSUAL = [[NAN], [INF], [-INF], [0.0, -0.0], [-1.0], [NAN, INF, -INF, 0.0, -0.0, -1.0, 1.0]]


def spoil(t: Tensor) -> Tensor:
    """Special numbers here and there in a float tensor, of one kind or of all, few or many or none; at times negative ones."""
    special = torch.tensor(UNUSUAL[torch.randint(len(UNUSUAL), ())])
    chosen = torch.rand(t.shape) < torch.tensor([0.0, 0.05, 0.5])[torch.randint(3, ())]
    t = torch.where(chosen, special[torch.randint(len(special), t.shape)].to(t.dtype), t)
    return t * torch.randn(t.shape).sign().to(t.dtype) if torch.rand(()) < 0.2 else t


@st.composite
def sizes(draw, tokens: int, experts: int, top_n: int) -> tuple[tuple[int, ...], int, int]:
    """Groups and tokens, experts, and top_n, up to these; seeds torch, whose numbers Hypothesis does not simplify."""
    torch.manual_seed(draw(st.integers(0, 2**32)))
    lead = *draw(st.lists(st.integers(1, 3), max_size=2)), draw(st.integers(1, tokens))
    experts = draw(st.integers(2, experts))
    return lead, experts, draw(st.integers(1, min(experts, top_n)))


def run(backend: Backend, name: str, *args) -> tuple[Tensor, ...]:
    out = backend(name, *args)
    return out if isinstance(out, tuple) else (out,)


def assert_agree(other: Backend, name: str, *args, linear: bool = False) -> None:
    """Runs an operator on both and compares. Results of a linear one are sums, as large as those of absolute values."""
    expected, actual = run(CPU, name, *args), run(other, name, *args)
    magnitudes = [None] * len(expected)
    if linear:
        floats = [isinstance(a, Tensor) and a.is_floating_point() for a in args]
        finite = (a.nan_to_num(0, 0, 0).abs() if f else a for a, f in zip(args, floats, strict=True))
        magnitudes = [m.max().item() if m.numel() else None for m in run(CPU, name, *finite)]
    for e, a, largest in zip(expected, actual, magnitudes, strict=True):
        if not e.is_floating_point():
            assert_same_bits(a, e)
            continue
        assert (a.dtype, a.shape) == (e.dtype, e.shape)
        assert_same_bits(a.isnan(), e.isnan())
        finite = e.isfinite()
        assert_same_bits(a.where(~finite, 0).nan_to_num(0), e.where(~finite, 0).nan_to_num(0))
        assert_near(a.where(finite, 0), e.where(finite, 0).double(), largest)


@others
@given(data=st.data())
def test_gate(other, data):
    lead, experts, top_n = data.draw(sizes(20, 40, 6))
    options = {option: data.draw(BOTH) for option in ("noise", "mask", "soft", "losses")}
    case = gate_case((*lead, experts), top_n, dtype=data.draw(TYPES), statistics=False, **options)
    case.logits, case.noise = spoil(case.logits), None if case.noise is None else spoil(case.noise)
    assert_agree(other, "gate", *case.args)
    grads = [spoil(g) if data.draw(BOTH) else None for g in case.random_gradients()]
    out = case.run(CPU)
    saved = case.logits, case.noise, case.mask, out.expert, out.counts
    assert_agree(other, "gate_backward", *grads, *saved, *case.options)


@others
@given(data=st.data())
def test_gate_of_any_router(other, data):
    """Bit-equal experts where selection scores are those of the logits or are given: elsewhere rounding may make ties."""
    lead, experts, top_n = data.draw(sizes(20, 40, 6))
    options = {option: data.draw(BOTH) for option in ("noise", "mask", "given", "normalize", "losses", "statistics")}
    options |= {"score": data.draw(st.sampled_from(SCORES)), "ranks": data.draw(st.sampled_from(["first", "all"]))}
    case = gate_case((*lead, experts), top_n, dtype=data.draw(TYPES), **options)
    assert_agree(other, "gate", *case.args)
    grads = [spoil(g) if data.draw(BOTH) else None for g in case.random_gradients()]
    out = case.run(CPU)
    assert_agree(other, "gate_backward", *grads, case.logits, case.noise, case.mask, out.expert, out.counts, *case.options)


@others
@given(data=st.data())
def test_assign(other, data):
    lead, experts, top_n = data.draw(sizes(60, 20, 5))
    capacity, policy = data.draw(st.integers(1, 62)), data.draw(st.sampled_from(POLICIES))
    case = assign_case(
        lead, experts, top_n, capacity, policy, dtype=data.draw(COMPUTE_TYPES), mask=data.draw(BOTH), keys=data.draw(BOTH)
    )
    for operand in ("weight", "draws", "threshold"):
        if getattr(case, operand) is not None:
            setattr(case, operand, spoil(getattr(case, operand)))
    if case.keys is None and data.draw(BOTH):
        case.capacity, case.align = None, data.draw(st.integers(1, 20))
    assert_agree(other, "assign", *case.args)
    assert_agree(other, "assign_backward", spoil(case.weight), case.run(CPU).slot)


@others
@given(data=st.data())
def test_slots(other, data):
    """``dense``, ``dispatch`` and ``combine``."""
    lead, experts, top_n = data.draw(sizes(20, 12, 5))
    capacity, dim, dtype = data.draw(st.integers(1, 31)), data.draw(st.integers(1, 70)), data.draw(TYPES)
    a = assignment(lead, experts, top_n, capacity, dtype=dtype)
    weight = spoil(a.weight)
    x, y = (spoil(torch.randn((*shape, dim)).to(dtype)) for shape in (lead, a.source.shape))
    grad_dispatch, grad_combine = (spoil(torch.randn((*lead, experts, capacity)).to(dtype)) for _ in range(2))
    assert_agree(other, "dense", weight, *a.slots, dtype, True)
    assert_agree(other, "dense_backward", grad_dispatch, grad_combine, *a.slots, linear=True)
    if data.draw(BOTH):
        a = assignment(lead, experts, top_n, None, dtype=dtype, align=data.draw(st.integers(1, 20)))
        y = spoil(torch.randn((*a.source.shape, dim)).to(dtype))
    assert_agree(other, "dispatch", x, weight, *a.indices, True)
    assert_agree(other, "dispatch_backward", y, x, *a.indices, linear=True)
    assert_agree(other, "combine", y, weight, *a.indices, linear=True)
    assert_agree(other, "combine_backward", x, y, weight, *a.indices, linear=True)
