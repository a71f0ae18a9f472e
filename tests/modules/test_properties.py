"""What holds for any input (docs/spec.md), searched by Hypothesis; and the same results from every level of the CPU kernels."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import (
    AssignCase,
    Assignment,
    Backend,
    GateCase,
    assign_case,
    assignment,
    by_group,
    check_assignment,
    gate_case,
    honest,
    tampered,
)
from compare import assert_near, assert_same_bits
from hypothesis import assume, example, given
from hypothesis import strategies as st

from topn_gating import build_info, reference
from topn_gating.ops import GROUP_SCORES, POLICIES, SCORES

INF, NAN = float("inf"), float("nan")
BOTH = st.booleans()

# What random normal scores are turned into.
FLAVOURS = {
    "plain": lambda z: z,
    "ties": lambda z: z.round(),
    "all equal": torch.zeros_like,
    "signs of zero": lambda z: torch.zeros_like(z).copysign(z),
    "denormal": lambda z: z * 1e-40,
    "close": lambda z: 1 + z * 1e-7,
    "far apart": lambda z: z * 30,
    "huge": lambda z: z * 1e37,
    "some -inf": lambda z: z.where(z > 0, -INF),
    "some inf": lambda z: z.where(z < 1, INF),
    "some nan": lambda z: z.where(z < 1, NAN),
    "infs and nans": lambda z: z.where(z < 1, NAN).where(z > -1, INF).where(z > -0.5, -INF),
    "all nan": lambda z: torch.full_like(z, NAN),
}


@st.composite
def gates(draw, soft=BOTH) -> GateCase:
    torch.manual_seed(draw(st.integers(0, 2**32)))
    experts = draw(st.integers(1, 40))
    shape = *draw(st.lists(st.integers(0, 3), max_size=2)), draw(st.integers(0, 20)), experts
    top_n = draw(st.integers(1, min(experts, 9)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    case = gate_case(shape, top_n, dtype=dtype, mask=draw(BOTH), soft=draw(soft))
    case.logits = FLAVOURS[draw(st.sampled_from(sorted(FLAVOURS)))](case.logits)
    return case


@st.composite
def assigns(draw, padded=BOTH) -> AssignCase:
    torch.manual_seed(draw(st.integers(0, 2**32)))
    experts = draw(st.integers(1, 20))
    lead = *draw(st.lists(st.integers(0, 3), max_size=2)), draw(st.integers(0, 60))
    top_n, capacity = draw(st.integers(1, min(experts, 5))), draw(st.integers(1, 62))
    policy, dtype = draw(st.sampled_from(POLICIES)), draw(st.sampled_from([torch.float32, torch.float64]))
    case = assign_case(lead, experts, top_n, capacity, policy, dtype=dtype, mask=draw(padded), keys=draw(BOTH))
    if draw(st.booleans()):
        case.expert = torch.randint(experts, case.expert.shape, dtype=torch.int32)  # one expert twice
    kinds = lambda w: w, torch.zeros_like, lambda w: w.where(w < 0.5, NAN), lambda w: w * 1e-40
    case.weight = draw(st.sampled_from(kinds))(case.weight)
    return case


@st.composite
def assignments(draw) -> tuple[Assignment, torch.Tensor, torch.Tensor]:
    """An assignment, tampered with at times, and rows x and y."""
    torch.manual_seed(draw(st.integers(0, 2**32)))
    experts = draw(st.integers(1, 12))
    lead = *draw(st.lists(st.integers(0, 3), max_size=2)), draw(st.integers(0, 30))
    a = assignment(lead, experts, draw(st.integers(1, min(experts, 5))), draw(st.integers(1, 31)))
    if draw(st.booleans()):
        a = tampered(a)
    dim = draw(st.integers(1, 70))
    return a, torch.randn(*lead, dim), torch.randn(*a.source.shape, dim)


@given(case=gates())
def test_gate_of_any_scores(backend, case):
    out, expected = case.run(backend), case.oracle()
    assert_same_bits(out.expert, expected.expert)
    assert_same_bits(out.counts, expected.counts)
    ordered = out.expert.sort(-1).values
    assert (ordered.diff(dim=-1) > 0).all()
    assert ((ordered >= 0) & (ordered < case.logits.shape[-1])).all()
    assert_same_bits(out.weight.isnan(), expected.weight.isnan())
    assert_near(out.weight.nan_to_num(), expected.weight.nan_to_num())
    fine = out.weight[~out.weight.isnan().any(-1)]
    assert ((fine >= 0) & (fine <= 1 + 1e-6)).all()
    if case.top_n > 1 and not case.soft:
        assert ((fine.sum(-1) - 1).abs() < 1e-6).all()
        assert (fine.diff(dim=-1) <= 0).all()
    assert_same_bits(out.importance.isnan(), expected.importance.isnan())
    assert_near(out.importance.nan_to_num(), expected.importance.nan_to_num())
    z_loss = expected.router_z_loss.to(out.router_z_loss.dtype).double()
    assert out.router_z_loss.isfinite() == z_loss.isfinite()
    if z_loss.isfinite():
        assert (out.router_z_loss - z_loss).abs() <= 2e-6 * (z_loss + z_loss.sqrt())
    assert out.balance_loss.isnan() == expected.balance_loss.isnan()
    assert_near(out.balance_loss.nan_to_num(), expected.balance_loss.nan_to_num())


@st.composite
def routers(draw) -> GateCase:
    """A gate of any options."""
    case = draw(gates())
    experts, normal = case.logits.shape[-1], torch.randn(case.logits.shape[-1])
    groups = draw(st.sampled_from([g for g in (1, 2, 3, 4, 8) if experts % g == 0]))
    return replace(
        case,
        score="softmax" if case.soft else draw(st.sampled_from(SCORES)),
        bias=draw(st.sampled_from([None, 0.3 * normal, torch.zeros(experts), normal.round(), -1e30 * normal.abs()])),
        groups=groups,
        top_groups=draw(st.integers(-(-case.top_n // (experts // groups)), groups)),
        group_score=draw(st.sampled_from(GROUP_SCORES)),
        normalize=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 2.5, 0.1])),
        ranks=draw(st.sampled_from(["first", "all"])),
        losses=draw(st.booleans()),
        statistics=draw(st.booleans()),
    )


@given(case=routers())
def test_gate_of_any_options(backend, case):
    """The choice is one of open groups; all else is what the reference makes of it, and replays to the bit."""
    out, experts = case.run(backend), case.logits.shape[-1]
    ordered = out.expert.sort(-1).values
    assert (ordered.diff(dim=-1) > 0).all()
    assert ((ordered >= 0) & (ordered < experts)).all()
    of_group = (out.expert // (experts // case.groups)).sort(-1).values
    assert ((of_group.diff(dim=-1) > 0).sum(-1) < case.top_groups).all()
    chosen = replace(case, given=out.expert)
    assert_same_bits(chosen.run(backend), out)
    expected = chosen.oracle()
    assert_same_bits(out.weight.isnan(), expected.weight.isnan())
    assert_near(out.weight.nan_to_num(), expected.weight.nan_to_num())
    if case.losses:
        assert_same_bits(out.counts, expected.counts)
        assert_same_bits(out.importance.isnan(), expected.importance.isnan())
        assert_near(out.importance.nan_to_num(), expected.importance.nan_to_num())
        assert out.balance_loss.isnan() == expected.balance_loss.isnan()
        assert_near(out.balance_loss.nan_to_num(), expected.balance_loss.nan_to_num())
    if case.statistics:
        entropy, largest, rms = out.statistics
        assert entropy.isnan() == expected.statistics[0].isnan()
        assert_near(entropy.nan_to_num(), expected.statistics[0].nan_to_num(), 1 + math.log(experts))
        assert largest.isnan() == expected.statistics[1].isnan()
        assert_same_bits(largest.nan_to_num(), expected.statistics[1].to(largest.dtype).nan_to_num())
        assert rms.isnan() == expected.statistics[2].isnan()


@given(case=routers())
def test_gradient_of_any_options(backend, case):
    assume(case.logits.isfinite().all() and case.logits.abs().amax(-1).nan_to_num().sum() < 1e4)
    grads, out = case.random_gradients(), case.run(backend)
    assume(case.losses)
    expected = replace(case, given=out.expert).oracle_gradient(grads)
    assert_near(case.backward(backend, grads, out), expected)


@given(row=st.lists(st.floats(width=32), min_size=1, max_size=24), data=st.data())
@example(row=[0.0, -0.0, 0.0], data=None)
@example(row=[NAN, INF, NAN, -INF], data=None)
def test_experts_of_any_row(backend, row, data):
    logits = torch.tensor([row])
    top_n = len(row) if data is None else data.draw(st.integers(1, len(row)))
    out = GateCase(logits, top_n).run(backend)
    best = sorted(range(len(row)), key=lambda i: (row[i] == row[i], -row[i] if row[i] == row[i] else 0, i))
    assert out.expert.tolist() == [best[:top_n]]


@given(case=gates(), seed=st.integers(0, 1000))
def test_gate_treats_tokens_alike(backend, case, seed):
    """A token's weights and experts do not depend on the others, nor on where it stands."""
    tokens = case.logits.shape[-2]
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))[: max(tokens // 2, 1)]
    mask = None if case.mask is None else case.mask[..., order]
    some = replace(case, logits=case.logits[..., order, :], mask=mask).run(backend)
    out = case.run(backend)
    assert_same_bits((some.weight, some.expert), (out.weight[..., order, :], out.expert[..., order, :]))


@given(case=gates(soft=st.just(False)))
def test_gradient_of_gate_stays_with_its_token(backend, case):
    """Finite scores give a finite gradient; a token that is not finite spoils no other."""
    assume(case.logits.numel() > 0)
    grads = case.random_gradients()
    grad = case.backward(backend, grads)
    fine = case.oracle().weight.isfinite().all(-1)
    expected = case.oracle_gradient(grads)
    assert grad[fine].isfinite().all()
    if fine.all():
        assert_near(grad, expected)


@given(case=assigns())
def test_assign_of_any_pairs(backend, case):
    out = case.run(backend)
    check_assignment(case, out)
    assert_same_bits(out, case.oracle())
    if case.mask is not None:
        assert (out.slot[~case.mask] == -1).all()
    valid = torch.ones(out.slot.shape[:-1], dtype=torch.bool) if case.mask is None else case.mask
    rank_0 = torch.zeros(*out.demand.shape, dtype=torch.int32)
    rank_0.scatter_add_(-1, case.expert[..., 0].long(), valid.int())
    assert (out.demand >= rank_0).all()
    assert (out.demand.sum(-1) <= out.slot.shape[-1] * valid.sum(-1)).all()


@given(case=assigns(padded=st.just(True)))
def test_real_tokens_do_not_see_padding(backend, case):
    out, masks = case.run(backend), by_group(case.mask, 1)

    def of_valid_tokens(t):
        return [None if t is None else rows[mask] for rows, mask in zip(by_group(t, 2), masks, strict=True)]

    inputs = case.weight, case.expert, case.draws, case.keys
    some = [[None] * len(masks) if t is None else of_valid_tokens(t) for t in inputs]
    outputs = of_valid_tokens(out.kept), of_valid_tokens(out.slot), by_group(out.demand, 1)
    for weight, expert, draws, keys, kept, slot, demand in zip(*some, *outputs, strict=True):
        alone = replace(case, weight=weight, expert=expert, draws=draws, keys=keys, mask=None).run(backend)
        assert_same_bits((alone.kept, alone.slot, alone.demand), (kept, slot, demand))


@given(case=assigns())
def test_more_capacity_drops_no_more(backend, case):
    out, wider = case.run(backend), replace(case, capacity=case.capacity + 1).run(backend)
    assert_same_bits(wider.demand, out.demand)
    assert ((wider.slot >= 0) | (out.slot < 0)).all()
    assert_same_bits(wider.slot == -1, out.slot == -1)


@given(given_=assignments())
def test_compact_equals_dense(backend, given_):
    a, x, y = given_
    fair = honest(a)
    double = fair.routing(a.weight.double())
    assert_near(backend("dispatch", x, a.weight, *a.indices, True), reference.dispatch(x.double(), double))
    assert_near(backend("combine", y, a.weight, *a.indices), reference.combine(y.double(), double))
    dense = backend("dense", a.weight, *a.slots, torch.float32, True)
    assert_same_bits(dense, reference.dense(fair.routing(), torch.float32))


@given(given_=assignments())
def test_there_and_back(backend, given_):
    """Identity experts: each token comes back times the sum of its kept weights."""
    a, x, _ = given_
    back = backend("combine", backend("dispatch", x, a.weight, *a.indices, True), a.weight, *a.indices)
    kept = a.weight.where(honest(a).slot >= 0, 0).double().sum(-1, keepdim=True)
    assert_near(back, x.double() * kept)


@given(given_=assignments())
def test_gradients_are_adjoint(backend, given_):
    """<dispatch(x), y> = <x, dispatch_backward(y)>, and likewise for combine: linear maps and their transposes."""
    a, x, y = given_
    x, y = x.double(), y.double()
    weight = a.weight.double()
    forward = backend("dispatch", x, weight, *a.indices, False)
    grad_x, grad_weight = backend("dispatch_backward", y, x, *a.indices)
    assert_near((forward * y).sum(), (x * grad_x).sum())
    assert_near((forward * y).sum(), grad_weight.sum())
    out = backend("combine", y, weight, *a.indices)
    grad_y, grad_weight = backend("combine_backward", x, y, weight, *a.indices)
    assert_near((out * x).sum(), (y * grad_y).sum())
    assert_near((out * x).sum(), (weight * grad_weight).sum())


# Levels of the CPU kernels


def sample() -> list[torch.Tensor]:
    """Results of every operator, forward and backward."""
    torch.manual_seed(0)
    cpu, results = Backend("topn_gating", "cpu"), []
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for experts, top_n, soft in ((16, 2, False), (33, 3, True), (257, 8, False)):
            case = gate_case((2, 29, experts), top_n, dtype=dtype, mask=True, soft=soft, statistics=True)
            results += [*case.run(cpu), case.backward(cpu, case.random_gradients())]
        for score in SCORES:
            router = {
                "score": score,
                "bias": True,
                "groups": 4,
                "top_groups": 2,
                "scale": 2.5,
                "ranks": "all",
                "statistics": True,
            }
            case = gate_case((2, 29, 32), 3, dtype=dtype, mask=True, **router)
            results += [*case.run(cpu), case.backward(cpu, case.random_gradients())]
        a = assignment((2, 40), 9, 3, 11, dtype=dtype)
        for dim in (1, 17, 64):
            x, y = torch.randn(2, 40, dim).to(dtype), torch.randn(2, 9, 11, dim).to(dtype)
            results += [cpu("dispatch", x, a.weight, *a.indices, True), *cpu("dispatch_backward", y, x, *a.indices)]
            results += [cpu("combine", y, a.weight, *a.indices), *cpu("combine_backward", x, y, a.weight, *a.indices)]
        x, weight, grad = (torch.randn(shape).to(dtype) for shape in ((2, 40, 35), (9, 35), (2, 40, 9)))
        results += [cpu("linear", x, weight), *cpu("linear_backward", grad, x, weight, True, True)]
        rows, weight, grad = (torch.randn(shape).to(dtype) for shape in ((97, 35), (3, 70, 35), (97, 70)))
        offsets = torch.tensor([80, 80, 95], dtype=torch.int32)
        results += [torch.ops.topn_gating.grouped_linear(rows, weight, None, offsets)]
        results += torch.ops.topn_gating.grouped_linear_backward(grad, rows, weight, offsets, True, True, True)
        dense = cpu("dense", a.weight, *a.slots, dtype, True)
        results += [*dense, cpu("dense_backward", *dense, *a.slots)]
    for policy in POLICIES:
        for keys in (False, True):
            results += assign_case((3, 2000), 16, 3, 90, policy, mask=True, keys=keys).run(cpu)
    return results


LEVELS = ("baseline", "avx2", "avx512")


@pytest.mark.parametrize("level", LEVELS[:-1])
def test_levels_agree(tmp_path, level):
    chosen = build_info()["cpu_level"]
    if LEVELS.index(level) >= LEVELS.index(chosen):
        pytest.skip(f"{chosen} is what runs on this processor")
    save = f"import torch, test_properties as t; torch.save((t.build_info(), t.sample()), {str(tmp_path / 'sample')!r})"
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    env = {**os.environ, "TOPN_GATING_CPU_LEVEL": level, "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", save], env=env, check=True, timeout=300)
    info, results = torch.load(tmp_path / "sample")
    assert info["cpu_level"] == level
    for actual, expected in zip(results, sample(), strict=True):
        if expected.is_floating_point():
            rounding = 4 * torch.finfo(expected.dtype).eps
            torch.testing.assert_close(actual, expected, rtol=rounding, atol=rounding * expected.abs().max().item())
        else:
            assert_same_bits(actual, expected)
