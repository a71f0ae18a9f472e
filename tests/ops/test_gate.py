"""``gate``: noise, softmax, stable top-n, weights, losses and their gradients, against the float64 reference."""

from dataclasses import replace

import pytest
import torch
from backends import BACKENDS
from cases import FLOATS, GateCase, SimtBackend, dtypes, gate_case
from compare import assert_near, assert_relative, assert_same_bits, assert_same_for_any_schedule, spread

from topn_gating import reference
from topn_gating.dtypes import compute_dtype

pytestmark = pytest.mark.usefixtures("nan_memory")

INF, NAN = float("inf"), float("nan")
SIZES = [(e, k) for e in (1, 2, 3, 7, 8, 16, 33, 64, 144, 160, 257, 1024) for k in sorted({1, 2, 3, 8, e}) if k <= e]
VARIANTS = {
    "plain": {},
    "noise": {"noise": True, "noise_mult": 0.7},
    "mask": {"mask": True},
    "soft": {"soft": True},
    "large_eps": {"eps": 0.5},
    "all": {"noise": True, "mask": True, "soft": True},
    "sigmoid": {"score": "sigmoid"},
    "sqrtsoftplus": {"score": "sqrtsoftplus", "mask": True, "normalize": False},
    "scale": {"scale": 2.5, "normalize": True, "ranks": "all"},
    "bias": {"bias": True, "noise": True, "noise_mult": 0.5},
    "groups": {"groups": 4, "top_groups": 2, "group_score": "max", "normalize": False, "mask": True},
    "sigmoid, bias, groups": {
        **{"score": "sigmoid", "bias": True, "groups": 8, "top_groups": 3, "scale": 2.5, "ranks": "all", "mask": True},
    },
    "given": {"given": True, "mask": True},
    "given, sqrtsoftplus": {"given": True, "score": "sqrtsoftplus", "ranks": "all", "noise": True},
    "given, soft": {"given": True, "soft": True, "mask": True},
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
sizes = pytest.mark.parametrize(("experts", "top_n"), SIZES)


def settled(case: GateCase) -> torch.Tensor:
    """Ranks that rounding cannot change: their score differs from those beside it by more, or not at all."""
    everywhere = torch.ones((*case.logits.shape[:-1], case.top_n), dtype=torch.bool)
    if case.given is not None or (case.noise is None and case.bias is None and case.groups == 1):
        return everywhere
    q = case.selection_scores()
    closed = torch.zeros_like(q, dtype=torch.bool)
    if case.groups > 1:
        best = reference.group_scores(q, case.groups, case.group_score).sort(-1, descending=True).values
        everywhere &= ~close_to_next(best)[..., case.top_groups - 1 : case.top_groups].any(-1, keepdim=True)
        closed = reference.closed_experts(q, case.groups, case.top_groups, case.group_score)
    close = close_to_next(q.where(~closed, -INF).sort(-1, descending=True).values)
    before, after = torch.nn.functional.pad(close, (1, 0)), torch.nn.functional.pad(close, (0, 1))
    return everywhere & ~(before | after)[..., : case.top_n]


def close_to_next(ordered: torch.Tensor) -> torch.Tensor:
    gap = -ordered.diff(dim=-1)
    return (gap > 0) & (gap < 4e-6 * ordered[..., :1].abs())


def check(case: GateCase, backend) -> None:
    out, expected, sure = case.run(backend), case.oracle(), settled(case)
    computed = compute_dtype(case.logits.dtype)
    tolerance = 1e-12 if computed == torch.float64 else 1e-6
    if case.noise is not None and case.scores().numel():  # noisy scores are rounded (step 3), and their exponential with them
        tolerance += torch.finfo(computed).eps * case.scores().abs().max().item()
    results = 7 if case.statistics else 6
    assert [t.dtype for t in out[:results]] == [computed, torch.int32, computed, torch.int32, computed, computed, computed][
        :results
    ]
    assert [t.shape for t in out[:results]] == [t.shape for t in expected[:results]]
    assert sure.double().mean() > 0.5
    assert_same_bits(out.expert[sure], expected.expert[sure])
    assert_relative(out.weight[sure], expected.weight[sure], tolerance)
    assert_relative(out.importance, expected.importance, tolerance)
    if sure[..., : case.top_n if case.ranks == "all" else 1].all():
        assert_same_bits(out.counts, expected.counts)
        assert_relative(out.balance_loss, expected.balance_loss, tolerance)
    assert_relative(out.router_z_loss, expected.router_z_loss)
    if case.statistics:
        torch.testing.assert_close(out.statistics.double(), expected.statistics, rtol=4 * tolerance, atol=tolerance)


@dtypes
@sizes
def test_values(backend, experts, top_n, dtype):
    check(gate_case((2, 23, experts), top_n, dtype=dtype), backend)


@variants
@sizes
def test_values_of_each_variant(backend, experts, top_n, options):
    tokens = 5 if experts > 512 else 11  # the emulator takes milliseconds for a token with so many
    check(gate_case((2, tokens, experts), top_n, **options), backend)


@variants
@dtypes
def test_values_of_each_variant_and_type(backend, dtype, options):
    check(gate_case((3, 31, 12), 3, dtype=dtype, **options), backend)
    check(gate_case((3, 31, 12), 3, dtype=dtype, statistics=True, **options), backend)


@sizes
def test_statistics_of_each_size(backend, experts, top_n):
    check(gate_case((2, 11, experts), top_n, statistics=True, mask=True), backend)


@pytest.mark.parametrize("shape", [(1, 5000, 16), (3, 1025, 33), (300, 5, 8), (2, 700, 1)])
@pytest.mark.parametrize("mask", [False, True])
def test_one_long_group_and_many_short_ones(backend, shape, mask):
    case = gate_case((*map(backend.size, shape[:2]), shape[2]), min(shape[-1], 2), mask=mask)
    check(case, backend)
    grads = case.random_gradients()
    assert_near(case.backward(backend, grads), case.oracle_gradient(grads))


@pytest.mark.parametrize("offset", [0.0, 1000.0, -1000.0, 3e6, -2e7])
@pytest.mark.parametrize(("top_n", "soft"), [(8, False), (16, False), (33, False), (4, True)])
def test_scores_far_apart(backend, offset, top_n, soft):
    logits = torch.rand(3, 40, 33) * 80 + offset
    logits[..., 0], logits[..., 1] = offset, offset + 80
    check(GateCase(logits, top_n, soft=soft), backend)


def test_given_experts_far_below_the_best(backend):
    logits = torch.randn(2, 9, 20)
    logits[..., 0] += 300
    given = 1 + torch.rand(2, 9, 19).argsort(-1)[..., :3].int()
    case = GateCase(logits, 3, given=given, normalize=False)
    out, expected = case.run(backend), case.oracle()
    torch.testing.assert_close(out.weight.double(), expected.weight, rtol=0, atol=1e-37)
    torch.testing.assert_close(out.importance.double(), expected.importance, rtol=1e-6, atol=1e-37)
    assert_relative(out.router_z_loss, expected.router_z_loss)


@pytest.mark.parametrize("u", [0.0, 1e-38, 1e-20, 1e-3, 0.5, 1 - 2**-24])
def test_noise_at_the_ends_of_its_range(backend, u):
    case = gate_case((2, 5, 7), 2)
    case.noise = torch.rand(2, 5, 7)
    case.noise[..., ::2] = u
    check(case, backend)


@pytest.mark.parametrize("noise_mult", [0.0, 0.3, -1.0, 3.0])
def test_noise_mult(backend, noise_mult):
    check(gate_case((2, 11, 9), 3, noise=True, noise_mult=noise_mult), backend)


@dtypes
@pytest.mark.parametrize("top_n", [1, 3, 12])
def test_equal_scores_choose_the_lower_expert(backend, dtype, top_n):
    logits = torch.randn(6, 12).to(dtype)
    logits[0] = 0.25
    logits[1, ::2] = 3
    logits[2] = torch.tensor([0.0, -0.0] * 6)
    logits[3] = torch.tensor([-0.0, 0.0] * 6)
    logits[4, 3:] = -INF
    logits[5] = (logits[5] * 2).round()
    check(GateCase(logits, top_n), backend)


@pytest.mark.parametrize("experts", [8, 33, 300])
def test_coarse_scores_keep_the_stable_order(backend, experts):
    check(GateCase(torch.randint(-2, 3, (200, experts)).float(), min(experts, 40)), backend)


def last_bits(experts: int, tokens: int = 24) -> torch.Tensor:
    """Scores that differ in their last bits alone, of either sign; some are equal, and the last rows are zeros."""
    steps = torch.stack([torch.randperm(experts) % (experts // 2 + 1) for _ in range(tokens)])
    scale = torch.tensor([1.0, -1.0, 0.75, -3.0, 1e-3, -2e4]).repeat(tokens // 6).unsqueeze(-1)
    bits = scale.view(torch.int32) + steps.to(torch.int32)
    logits = bits.view(torch.float32)
    logits[-2:] = torch.where(steps[-2:] % 2 == 0, 0.0, -0.0)
    logits[-1, ::3] = 1e-45
    return logits


@pytest.mark.parametrize(
    ("experts", "top_n"), [(8, 3), (16, 8), (20, 11), (64, 8), (100, 16), (128, 8), (256, 8), (256, 13), (512, 16)]
)
@pytest.mark.parametrize("kind", ["all", "some", "below"])
def test_scores_that_differ_in_their_last_bits(backend, experts, top_n, kind):
    logits = last_bits(experts)
    if kind == "some":  # the rest is lower
        logits = torch.where(torch.rand(24, experts) < 0.2, logits, -3e4)
    elif kind == "below":  # the rest is higher, so that the last ranks alone are close
        logits = torch.where(torch.arange(experts) % experts < top_n - 2, torch.randn(24, experts).abs() + 4, logits)
    check(GateCase(logits, top_n), backend)


EMULATORS = {name: backend for name, backend in BACKENDS.items() if isinstance(backend, SimtBackend)}


@pytest.mark.parametrize("backend", EMULATORS.values(), ids=EMULATORS)
@pytest.mark.parametrize(("experts", "tokens"), [(32, 480), (64, 320), (128, 320), (256, 160), (512, 80)])
def test_second_path_is_taken_where_it_must_and_rarely(backend, experts, tokens):
    """Counts the warps that choose by whole scores, which the emulator alone can: a warp has at most eight tokens here."""
    normal = torch.randn(1, tokens, experts)

    def warps(logits):
        case = GateCase(logits, 8)
        case.run(backend)
        return backend.library.simt_events()

    assert warps(normal) <= 4  # of at least 60
    assert warps(normal.bfloat16().float()) <= 4  # many scores are equal: their order is that of the experts
    assert warps(normal.bfloat16()) == 0
    assert warps(torch.zeros_like(normal)) == 0
    close = normal.clone()
    order = normal.argsort(-1, descending=True)[..., :9]
    for first, second in ((0, 1), (3, 4), (7, 8)):  # two ranks, or the last one and the first that is left out
        best, next_best = order[..., first : first + 1], order[..., second : second + 1]
        score = normal.gather(-1, best)
        close = normal.scatter(-1, torch.maximum(best, next_best), score).scatter(
            -1, torch.minimum(best, next_best), torch.nextafter(score, torch.tensor(-INF))
        )
        assert warps(close) >= tokens / 8 / 2  # about half of the pairs differ in a key's upper bits after all


GROUPED = {
    "sigmoid": {"score": "sigmoid", "bias": True, "group_score": "top2"},
    "softmax": {"group_score": "max", "mask": True},
    "noise": {"score": "sigmoid", "bias": True, "group_score": "top2", "noise": True, "ranks": "all"},
}


@pytest.mark.parametrize(
    ("options", "dtype"),
    [("sigmoid", torch.bfloat16), ("sigmoid", torch.float32), ("softmax", torch.bfloat16), ("noise", torch.float32)],
)
@pytest.mark.parametrize(
    ("experts", "top_n", "groups", "top_groups"),
    [
        (16, 4, 2, 1),
        (64, 8, 8, 2),
        (64, 6, 4, 2),
        (128, 8, 2, 1),
        (160, 6, 8, 3),
        (256, 8, 8, 4),
        (256, 12, 2, 1),
        (512, 16, 16, 5),
    ],
)
def test_groups_of_many_experts(backend, experts, top_n, groups, top_groups, dtype, options):
    case = gate_case((1, 13, experts), top_n, dtype=dtype, groups=groups, top_groups=top_groups, **GROUPED[options])
    check(case, backend)
    grads = case.random_gradients()
    assert_near(case.backward(backend, grads), case.oracle_gradient(grads))


def test_groups_with_equal_scores_and_nan(backend):
    case = gate_case((1, 12, 64), 8, groups=8, top_groups=2, group_score="top2")
    case.logits[0, :4] = case.logits[0, :4, :8].repeat(1, 8)  # all groups are equal: the first two are open
    case.logits[0, 4, 40] = NAN
    case.logits[0, 5, 17] = INF
    expert = case.run(backend).expert[0]
    assert (expert[:4] < 16).all()
    assert_same_bits(expert[4:6], torch.arange(8).expand(2, 8).int())  # all gates of these tokens are NaN


def test_closed_groups_lose_to_experts_that_a_bias_excludes(backend):
    case = gate_case((1, 5, 32), 8, bias=True, groups=4, top_groups=1, group_score="max")
    case.bias[4:8] = -INF
    case.bias[8:] = -4
    expert = case.run(backend).expert[0]
    assert (expert < 8).all()
    assert_same_bits(expert[:, 4:], torch.arange(4, 8).expand(5, 4).int())


BAD_TOKENS = {
    "nan": lambda row: row.fill_(NAN),
    "one nan": lambda row: row[3].fill_(NAN),
    "negative nan": lambda row: row[2:5].copy_(-torch.tensor(NAN).abs()),
    "inf": lambda row: row.fill_(INF),
    "one inf": lambda row: row[4].fill_(INF),
    "-inf": lambda row: row.fill_(-INF),
    "nan and infs": lambda row: row[:4].copy_(torch.tensor([INF, NAN, -INF, NAN])),
}
bad_tokens = pytest.mark.parametrize("spoil", BAD_TOKENS.values(), ids=BAD_TOKENS)


@bad_tokens
@dtypes
@pytest.mark.parametrize("soft", [False, True])
def test_bad_token_poisons_itself_alone(backend, spoil, dtype, soft):
    case = gate_case((2, 9, 7), 3, dtype=dtype, soft=soft)
    clean, others = case.run(backend), torch.arange(18) != 5
    spoil(case.logits.view(18, 7)[5])
    out = case.run(backend)
    assert_same_bits(out.weight.view(18, 3)[others], clean.weight.view(18, 3)[others])
    assert_same_bits(out.expert, case.oracle().expert)
    assert out.weight.view(18, 3)[5].isnan().all()
    assert_same_bits(out.importance[1], clean.importance[1])
    assert out.importance[0].isnan().any()
    assert out.balance_loss.isnan()
    assert not out.router_z_loss.isfinite()


@bad_tokens
def test_bad_token_has_its_own_gradient(backend, spoil):
    case, others = gate_case((2, 9, 7), 3), torch.arange(18) != 5
    weight, importance, _, z_loss = case.random_gradients()
    grads = weight, importance, None, z_loss  # the balance loss's depends on how often each expert is chosen
    clean = case.backward(backend, grads).view(18, 7)
    spoil(case.logits.view(18, 7)[5])
    assert_same_bits(case.backward(backend, grads).view(18, 7)[others], clean[others])


@bad_tokens
def test_bad_token_that_is_padding_adds_nothing(backend, spoil):
    case = gate_case((2, 9, 7), 3, mask=True)
    case.mask.view(18)[5] = False
    clean = case.run(backend)
    weight, *grads = case.random_gradients()
    grads = weight.where(case.mask.unsqueeze(-1), 0), *grads  # as assign gives them
    clean_grad = case.backward(backend, grads)
    spoil(case.logits.view(18, 7)[5])
    assert_same_bits(case.run(backend)[2:], clean[2:])
    assert_same_bits(case.backward(backend, grads), clean_grad)
    assert not clean_grad[~case.mask].any()


def test_minus_inf_beside_finite_scores_is_no_bad_token(backend):
    case = gate_case((3, 8, 10), 4)
    case.logits[..., torch.randperm(10)[:7]] = -INF
    check(case, backend)
    assert_near(case.backward(backend, grads := case.random_gradients()), case.oracle_gradient(grads))


def test_without_losses_they_are_zero_and_the_rest_stays(backend):
    case = gate_case((2, 9, 7), 3, statistics=True)
    out, quiet = case.run(backend), replace(case, losses=False).run(backend)
    assert_same_bits(quiet[:2], out[:2])
    assert all(not t.any() for t in quiet[2:6])
    assert_same_bits(quiet.statistics, out.statistics)


def test_without_losses_they_have_no_gradient(entry_point, device):
    logits = torch.randn(2, 9, 7, device=device, requires_grad=True)
    _, _, importance, _, balance_loss, router_z_loss, _ = entry_point("gate")(*GateCase(logits, 2, losses=False).args)
    total = importance.sum() + balance_loss + router_z_loss
    grad = torch.autograd.grad(total, logits, allow_unused=True)[0] if total.requires_grad else None
    assert grad is None or not grad.any()


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3)])
def test_leading_dimensions_are_groups(backend, lead):
    case = gate_case((*lead, 11, 6), 2, noise=True, mask=True)
    flat = GateCase(case.logits.reshape(-1, 11, 6), 2, case.noise.reshape(-1, 11, 6), case.mask.reshape(-1, 11))
    check(case, backend)
    assert_same_bits([t.flatten() for t in case.run(backend)], [t.flatten() for t in flat.run(backend)])
    assert case.run(backend).importance.shape == (*lead, 6)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (0, 4, 5), (2, 0, 4, 5), (0, 0, 1)])
@pytest.mark.parametrize("statistics", [False, True])
def test_nothing_to_route(backend, shape, statistics):
    case = gate_case(shape, 1, noise=True, mask=True, statistics=statistics)
    out = case.run(backend)
    assert [t.shape for t in out[:6]] == [t.shape for t in case.oracle()[:6]]
    assert out.statistics.numel() == 3 * statistics
    assert all(not t.any() for t in out)
    assert case.backward(backend, case.random_gradients()).shape == shape


def test_all_padding(backend):
    case = replace(gate_case((2, 9, 7), 3), mask=torch.zeros(2, 9, dtype=torch.bool))
    assert all(not t.any() for t in case.run(backend)[2:])
    none, *grads = case.random_gradients()
    assert not case.backward(backend, (torch.zeros_like(none), *grads)).any()


def test_padding_counts_for_nothing(backend):
    case = gate_case((1, 40, 6), 2, mask=True)
    alone = GateCase(case.logits[:, case.mask[0]], 2)
    assert_near(case.run(backend).importance, alone.run(backend).importance.double())
    assert_near(case.run(backend).balance_loss, alone.run(backend).balance_loss.double())
    assert_near(case.run(backend).router_z_loss, alone.run(backend).router_z_loss.double())


@dtypes
def test_any_layout(backend, dtype):
    case = gate_case((2, 13, 10), 3, dtype=dtype, noise=True, mask=True)
    strided = replace(case, logits=spread(case.logits), noise=spread(case.noise), mask=spread(case.mask))
    grads = case.random_gradients()
    assert_same_bits(strided.run(backend), case.run(backend))
    assert_same_bits(strided.backward(backend, tuple(map(spread, grads))), case.backward(backend, grads))


def test_expanded_inputs(backend):
    row, grad = torch.randn(1, 1, 6), torch.randn(())
    expanded = GateCase(row.expand(3, 7, 6), 2, mask=torch.ones(1, 1, dtype=torch.bool).expand(3, 7))
    full = GateCase(row.repeat(3, 7, 1), 2, mask=torch.ones(3, 7, dtype=torch.bool))
    assert_same_bits(expanded.run(backend), full.run(backend))
    grads = [grad.expand(s) for s in ((3, 7, 2), (3, 6), (), ())]
    assert_same_bits(expanded.backward(backend, grads), full.backward(backend, [g.contiguous() for g in grads]))


# Gradients


@variants
@pytest.mark.parametrize(("experts", "top_n"), [(e, k) for e, k in SIZES if k <= 8 or e <= 64])
def test_gradient(backend, experts, top_n, options):
    case = gate_case((2, 11, experts), top_n, **options)
    grads, out = case.random_gradients(), case.run(backend)
    assert_near(case.backward(backend, grads, out), replace(case, given=out.expert).oracle_gradient(grads))


@dtypes
@variants
def test_gradient_of_each_type(backend, dtype, options):
    case = gate_case((3, 31, 12), 3, dtype=dtype, **options)
    grads, out = case.random_gradients(), case.run(backend)
    grad = case.backward(backend, grads, out)
    assert grad.dtype == dtype
    assert_near(grad, replace(case, given=out.expert).oracle_gradient(grads))


@pytest.mark.parametrize("given", range(1, 16))
def test_gradient_of_each_output(backend, given):
    case = gate_case((2, 9, 7), 2, dtype=torch.float64, mask=True)
    grads = tuple(g if given >> i & 1 else None for i, g in enumerate(case.random_gradients()))
    assert_near(case.backward(backend, grads), case.oracle_gradient(grads))


def test_gradient_of_one_times_the_z_loss(backend):
    """Of two tokens, where the factor of a token's logsumexp is exactly 1."""
    case = gate_case((1, 2, 7), 2, dtype=torch.float64)
    grads = None, None, None, torch.ones((), dtype=torch.float64)
    assert_near(case.backward(backend, grads), case.oracle_gradient(grads))


def test_gradient_of_nothing_is_zero(backend):
    assert not gate_case((2, 9, 7), 2).backward(backend, (None,) * 4).any()


@variants
@pytest.mark.parametrize("top_n", [1, 2, 3, 5])
def test_gradcheck(entry_point, device, top_n, options):
    case = gate_case((2, 4, 5), top_n, dtype=torch.float64, **options)
    logits, *rest = (a.to(device) if isinstance(a, torch.Tensor) else a for a in case.args)

    def floats(logits):
        weight, _, importance, _, balance_loss, router_z_loss, _ = entry_point("gate")(logits, *rest)
        return weight, importance, balance_loss, router_z_loss

    assert torch.autograd.gradcheck(floats, logits.requires_grad_())


def test_integers_carry_no_gradient(entry_point, device):
    out = entry_point("gate")(*GateCase(torch.randn(4, 5, device=device, requires_grad=True), 2).args)
    assert [t.requires_grad for t in out] == [True, False, True, False, True, True, False]


# As an operator of torch


@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
@variants
def test_opcheck(device, dtype, options):
    case = gate_case((2, 6, 5), 2, dtype=dtype, **options)
    args = [a.to(device) if isinstance(a, torch.Tensor) else a for a in case.args]
    torch.library.opcheck(torch.ops.topn_gating.gate.default, (args[0].requires_grad_(), *args[1:]))


@pytest.mark.parametrize("shape", [(3, 4000, 16), (1, 9001, 33), (500, 40, 8)])
@pytest.mark.parametrize("soft", [False, True])
def test_same_for_any_schedule(backend, shape, soft):
    case = gate_case((*map(backend.size, shape[:2]), shape[2]), 3, noise=True, mask=True, soft=soft)
    grads = case.random_gradients()
    assert_same_for_any_schedule(lambda: (*case.run(backend), case.backward(backend, grads)))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("index", [-(2**31), -1, 7, 8, 2**20, 2**31 - 1])
def test_backward_of_made_up_experts_stays_inside_its_rows(backend, index, soft):
    case = gate_case((2, 9, 7), 3, soft=soft)
    out, grads = case.run(backend), case.random_gradients()
    expected = case.backward(backend, grads, out)
    expert = out.expert.clone()
    expert[1, 4, 1] = index
    grad = case.backward(backend, grads, out._replace(expert=expert))
    others = torch.arange(18) != 13
    assert_same_bits(grad.view(18, 7)[others], expected.view(18, 7)[others])
