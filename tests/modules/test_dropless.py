"""The dropless layout above the operators: from logits, from choices made elsewhere, from a routing with a capacity."""

import pytest
import torch
import torch.nn.functional as F
from compare import assert_near, assert_same_bits, assert_same_for_any_schedule

import topn_gating
from topn_gating import Routing, TopNGating, reference, route
from topn_gating.ops import POLICIES

DOUBLE = torch.float64
aligns = pytest.mark.parametrize("align", [1, 8, 16])


def choices(lead=(2, 30), num_gates=5, top_n=3, dtype=torch.float32):
    """Experts with some -1 among them, and weights."""
    expert = torch.randn(*lead, num_gates).topk(top_n).indices
    return expert.where(torch.rand(expert.shape) < 0.8, -1), torch.rand(expert.shape, dtype=dtype)


def by_hand(expert, weight, x, matrices):
    """Each token's sum over its experts: a matrix product and a tanh, times the weight."""
    chosen = F.one_hot(expert.clamp(min=0), len(matrices)) * (expert >= 0).unsqueeze(-1)  # (…, n, k, e)
    outputs = torch.einsum("...d,edf->...ef", x, matrices).tanh()
    return torch.einsum("...nk,...nke,...nef->...nf", weight, chosen.to(weight.dtype), outputs)


def experts(routing: Routing, x, matrices):
    rows = routing.dispatch(x)
    if routing.offsets is None:
        return routing.combine((rows @ matrices).tanh())
    starts, ends = [0, *routing.offsets.tolist()[:-1]], routing.offsets.tolist()
    parts = [rows[start:end] @ matrix for start, end, matrix in zip(starts, ends, matrices, strict=True)]
    parts.append(rows.new_zeros(len(rows) - ends[-1], matrices.shape[-1]))
    return routing.combine(torch.cat(parts).tanh())


def assert_same_routing(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        if isinstance(b, torch.Tensor):
            torch.testing.assert_close(a, b)
        else:
            assert a == b


@pytest.mark.parametrize("policy", POLICIES)
@aligns
@pytest.mark.parametrize("lead", [(40,), (2, 30), (1,), (0,), (2, 0)], ids=str)
def test_route_equals_the_reference(policy, align, lead):
    logits, draws, mask = torch.randn(*lead, 6, dtype=DOUBLE), torch.rand(*lead, 3, dtype=DOUBLE), torch.rand(lead) < 0.8
    options = {"top_n": 3, "policy": policy, "draws": draws, "token_mask": mask, "align": align}
    threshold = torch.tensor([0, 0.3, 0.2], dtype=DOUBLE)
    routing = route(logits, dropless=True, threshold=threshold, **options)
    assert_same_routing(routing, reference.route(logits, capacity=None, threshold=threshold, **options))
    assert routing.capacity is None
    assert routing.load is routing.demand
    assert routing.drop_fraction.shape == ()
    assert routing.drop_fraction.dtype == torch.float32
    assert routing.drop_fraction == 0


def test_a_dropless_gate_has_no_capacity():
    assert TopNGating(4, 3, dropless=True).capacity(5) is None
    assert TopNGating(4, 3).capacity(5) == 4


def test_nothing_is_dropped():
    routing = route(torch.randn(2, 40, 6) + 5 * torch.eye(6)[0], 2, dropless=True)
    assert (routing.slot >= 0).all()
    assert routing.demand[0] == 80
    assert routing.demand.sum() == 160


def test_the_random_policy_where_draws_are_given():
    logits, draws = torch.randn(40, 6), torch.ones(40, 2)
    for options in ({"draws": draws}, {"policy": "random"}):
        assert (route(logits, dropless=True, threshold=0.9, **options).slot[:, 1] == -1).any()
    assert (route(logits, dropless=True, threshold=0.9).slot[:, 1] >= 0).all()


def test_the_balance_loss_of_kept_pairs_is_that_of_routed_ones():
    logits = torch.randn(40, 6)
    assert_same_routing(route(logits, dropless=True, balance_on="kept"), route(logits, dropless=True))


@pytest.mark.parametrize("layout", [{"capacity": 40}, {"dropless": True}, {"dropless": True, "align": 8}], ids=str)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.bfloat16, torch.float16], ids=str)
def test_given_choices(layout, index, dtype):
    """Outputs, and the gradients of x, of the experts and of the weights, against plain torch in float64."""
    expert, weight = choices(dtype=dtype)
    x, matrices = torch.randn(2, 30, 7, dtype=DOUBLE), torch.randn(5, 7, 4, dtype=DOUBLE)
    x, matrices = (t.to(DOUBLE if dtype == DOUBLE else torch.float32) for t in (x, matrices))
    leaves = [t.requires_grad_() for t in (x, weight, matrices)]
    routing = route(expert=expert.to(index), weight=weight, num_gates=5, **layout)
    assert routing.straight_through is False
    assert routing.expert.dtype == torch.int32
    assert routing.weight.dtype == (DOUBLE if dtype == DOUBLE else torch.float32)
    assert not any((routing.balance_loss, routing.router_z_loss))
    assert_same_bits(routing.slot >= 0, expert >= 0)
    out = experts(routing, x, matrices)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    expected = by_hand(expert, exact[1], exact[0], exact[2])
    tolerance = 1e-12 if dtype == DOUBLE else 1e-5
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    grad = torch.randn_like(expected)
    actual = torch.autograd.grad(out, leaves, grad.to(out.dtype))
    rounding = tolerance if dtype in (DOUBLE, torch.float32) else torch.finfo(dtype).eps
    for a, e in zip(actual, torch.autograd.grad(expected, exact, grad), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=max(tolerance, rounding), atol=10 * tolerance)


@pytest.mark.parametrize("layout", [{"capacity": 9}, {"dropless": True, "align": 4}], ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_given_choices_go_the_way_of_logits(layout, policy):
    """The choices of a routing from logits, given again with its weights before the policy: the same slots."""
    logits, draws, mask = torch.randn(2, 30, 5), torch.rand(2, 30, 3), torch.rand(2, 30) < 0.8
    options = {"policy": policy, "draws": draws, "token_mask": mask, "threshold": (0.3, 0.2), **layout}
    expected = route(logits, 3, **options)
    every = route(logits, 3, policy="all", dropless=True)
    routing = route(expert=every.expert, weight=every.weight, num_gates=5, straight_through=True, **options)
    assert_same_routing(routing[:5], expected[:5])
    assert_same_routing(routing[7:], expected[7:])


def test_the_default_capacity_of_given_choices():
    expert, weight = choices((2, 200))
    routing = route(expert=expert, weight=weight, num_gates=5)
    assert routing.capacity == topn_gating.expert_capacity(200, 5, 1.25)
    assert route(expert=expert, weight=weight, num_gates=5, capacity_factor=0.1).capacity == 4
    assert (routing.slot == -2).any()


def test_an_index_that_does_not_fit_int32_is_not_another_expert():
    """Where values are not read, as by a compiler, an index out of range is not routed."""
    expert, weight = choices()
    wrong = torch.rand(expert.shape) < 0.3
    evil = torch.tensor([2**32, 2**32 + 1, -(2**32), 5, -2, 2**63 - 1, -(2**63), 2**31 + 2])
    bad = torch.where(wrong, evil[torch.randint(len(evil), expert.shape)], expert)

    def function(expert, weight):
        return route(expert=expert, weight=weight, num_gates=5, dropless=True)

    torch._dynamo.reset()
    routing = torch.compile(function, fullgraph=True, backend="aot_eager")(bad, weight)
    expected = function(expert.where(~wrong, -1), weight)
    assert_same_routing(routing[1:], expected[1:])


@aligns
@pytest.mark.parametrize("straight_through", [False, True])
def test_as_dropless_is_the_same_decision(align, straight_through):
    logits = (torch.randn(2, 30, 5, dtype=DOUBLE) + torch.arange(5) / 2).requires_grad_()
    capacity = route(logits, 3, capacity=9, policy="threshold", straight_through=straight_through)
    assert (capacity.slot == -2).any()
    routing = capacity.as_dropless(align)
    assert_same_bits(routing.slot >= 0, capacity.slot >= 0)
    assert_same_bits(routing.demand, capacity.load.sum(0).int())
    assert_same_bits([routing.weight, routing.expert], [capacity.weight, capacity.expert])
    assert routing.balance_loss is capacity.balance_loss
    assert routing.straight_through is straight_through
    assert (routing.offsets % align == 0).all()
    x, matrices = torch.randn(2, 30, 7, dtype=DOUBLE), torch.randn(5, 7, 4, dtype=DOUBLE)
    leaves = [logits, x.requires_grad_(), matrices.requires_grad_()]
    outputs = [experts(r, x, matrices) for r in (routing, capacity)]
    assert_near(*outputs)
    grads = [torch.autograd.grad(out.square().sum(), leaves, retain_graph=True) for out in outputs]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_as_dropless_of_a_dropless_routing():
    routing = route(torch.randn(2, 30, 5), 3, dropless=True)
    assert routing.as_dropless() is routing
    aligned = routing.as_dropless(8)
    expected = route(expert=routing.expert, weight=routing.weight, num_gates=5, dropless=True, align=8)
    assert_same_routing(aligned[:5], expected[:5])
    assert_same_bits(aligned.offsets, expected.offsets)
    assert_same_routing(aligned.as_dropless(8), aligned)
    assert_same_routing(aligned.as_dropless(), routing)


@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)], ids=str)
@aligns
def test_as_dropless_of_nothing(lead, align):
    routing = route(torch.randn(*lead, 5), 3, policy="all").as_dropless(align)
    assert routing.offsets.tolist() == [0] * 5
    rows = routing.dispatch(torch.zeros(*lead, 7))
    assert rows.shape == (*routing.source.shape, 7)
    assert not rows.any()
    assert routing.combine(rows).shape == (*lead, 7)


@aligns
def test_offsets_fit_grouped_mm(align):
    x, matrices = torch.randn(2, 30, 16), torch.randn(5, 16, 8)
    routing = route(torch.randn(2, 30, 5) + torch.tensor([0, 0, -50, 0, 0]), 2, dropless=True, align=align)  # one stays empty
    assert routing.demand[2] == 0
    rows = F.grouped_mm(routing.dispatch(x), matrices, offs=routing.offsets)
    expected = by_hand(routing.expert.long(), routing.weight.double(), x.double(), matrices.double())
    torch.testing.assert_close(routing.combine(rows.tanh()).double(), expected, rtol=1e-5, atol=1e-5)


@aligns
def test_grouped_linear_takes_the_rows(align):
    x, matrices = torch.randn(2, 30, 16), torch.randn(5, 16, 8)
    routing = route(torch.randn(2, 30, 5), 2, dropless=True, align=align)
    rows = topn_gating.grouped_linear(routing.dispatch(x), matrices.mT, routing.offsets)
    expected = by_hand(routing.expert.long(), routing.weight.double(), x.double(), matrices.double())
    torch.testing.assert_close(routing.combine(rows.tanh()).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, DOUBLE], ids=str)
def test_topn_gating(dtype, training):
    gate = TopNGating(7, 5, top_n=2, dropless=True, align=8, dtype=dtype).train(training)
    x = torch.randn(2, 30, 7).to(dtype)
    mask = torch.rand(2, 30) < 0.8
    options = {"dropless": True, "align": 8, "losses": training, "token_mask": mask}
    assert_same_routing(gate.route(x, token_mask=mask), route(gate.logits(x), 2, **options))
    assert (gate.policy_train, gate.policy_eval) == ("all", "all")
    assert "dropless, align=8" in repr(gate)
    other = TopNGating(7, 5, top_n=2, dropless=True, policy_train="random", policy_eval="none")
    assert (other.policy_train, other.policy_eval) == ("random", "none")


def test_policies_of_a_gate_with_a_capacity():
    gate = TopNGating(7, 5)
    assert (gate.policy_train, gate.policy_eval) == ("random", "random")
    assert "dropless" not in repr(gate)


def test_repr():
    routing = route(torch.randn(2, 24, 5), 3, dropless=True, align=8)
    text = "Routing(groups=(2,), tokens=24, experts=5, top_n=3, dropless, rows=184, dtype=torch.float32, device='cpu')"
    assert repr(routing) == text


def test_a_dropless_routing_is_saved_and_loaded(tmp_path):
    routing = route(torch.randn(2, 24, 5), 3, dropless=True)
    torch.save(routing, tmp_path / "routing")
    assert_same_routing(torch.load(tmp_path / "routing"), routing)


def test_same_for_any_number_of_threads():
    logits, x = torch.randn(3, 4000, 9, requires_grad=True), torch.randn(3, 4000, 33, requires_grad=True)

    def run():
        routing = route(logits, 3, dropless=True, align=16)
        out = routing.combine(routing.dispatch(x).sin())
        return [*(t for t in routing if isinstance(t, torch.Tensor)), out, *torch.autograd.grad(out.sum(), (logits, x))]

    assert_same_for_any_schedule(lambda: [t.detach() for t in run()])
