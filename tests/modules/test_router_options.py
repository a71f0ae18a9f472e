"""Scores, biases, expert groups, given experts, balance losses and statistics of ``route`` and the modules."""

import copy
from dataclasses import dataclass

import pytest
import torch
from compare import assert_near, assert_same_bits
from torch.utils.checkpoint import checkpoint

from topn_gating import MoE, TopNGating, reference, route, stack_stats, update_select_bias_, with_loss

TOKENS, EXPERTS, TOP_N = 12, 8, 3
LAYOUTS = {
    "capacity": {"capacity": 3},
    "by weight": {"capacity": 3, "priority": "weight"},
    "dropless": {"dropless": True, "align": 4},
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
OPTIONS = {
    "default": {},
    "sigmoid": {"score": "sigmoid", "scale": 2.5},
    "sqrtsoftplus": {"score": "sqrtsoftplus", "normalize": False},
    "bias": {"select_bias": True},
    "groups": {"groups": 4, "top_groups": 2, "group_score": "max", "normalize": False},
    "DeepSeek-V3": {"score": "sigmoid", "select_bias": True, "groups": 4, "top_groups": 2, "scale": 2.5},
    "noise": {"score": "sigmoid", "noise": True},
    "soft": {"differentiable_topk": True, "scale": 0.5},
    "composed soft": {"differentiable_topk": True, "differentiable_topk_fused": False, "normalize": False},
    "given": {"expert": True, "score": "sigmoid"},
}
options = pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
BALANCE = [
    {"balance_ranks": ranks, "balance_over": over, "balance_on": on}
    for ranks in ("first", "all")
    for over in ("group", "batch")
    for on in ("routed", "kept")
]
balances = pytest.mark.parametrize("balance", BALANCE, ids=lambda b: "-".join(b.values()))


@dataclass
class Problem:
    logits: torch.Tensor
    mask: torch.Tensor
    options: dict


def problem(option: dict, lead=(2, 2), dtype=torch.float64) -> Problem:
    """Logits ``(*lead, n, e)``, a mask, and the options, whose tensors are drawn where they are True."""
    made = dict(option)
    if made.pop("select_bias", False):
        made["select_bias"] = 0.3 * torch.randn(EXPERTS)
    if made.pop("noise", False):
        made["noise"] = torch.rand(*lead, TOKENS, EXPERTS, dtype=torch.promote_types(dtype, torch.float32))
    if made.pop("expert", False):
        made["expert"] = torch.randint(-1, EXPERTS, (*lead, TOKENS, TOP_N), dtype=torch.int32)
    mask = torch.rand(*lead, TOKENS) < 0.8
    return Problem(torch.randn(*lead, TOKENS, EXPERTS, dtype=torch.float64).to(dtype), mask, made)


def of_reference(p: Problem, logits, layout, **more):
    """The routing of the plain torch operations, in float64, with all that it can compute."""
    given = {k: v for k, v in {**p.options, **more}.items() if k != "differentiable_topk_fused"}
    if "noise" in given:
        given["noise"] = given["noise"].double()
    sizes = {"capacity": layout.get("capacity"), "align": layout.get("align", 1), "priority": layout.get("priority")}
    return reference.route(logits.double(), top_n=TOP_N, policy="all", token_mask=p.mask, **sizes, **given)


@layouts
@options
@balances
def test_route_equals_the_reference(option, layout, balance):
    p = problem(option)
    logits, x = p.logits.requires_grad_(), torch.randn(*p.mask.shape, 5, dtype=torch.float64)
    out = route(logits, TOP_N, policy="all", token_mask=p.mask, stats=True, **layout, **p.options, **balance)
    expected = of_reference(p, logits, layout, stats=True, **balance)
    for name in ("expert", "slot", "source", "demand"):
        assert_same_bits(getattr(out, name), getattr(expected, name))
    for name in ("weight", "balance_loss", "router_z_loss", "statistics"):
        assert_near(getattr(out, name), getattr(expected, name))
    grads = [torch.autograd.grad(loss_of(r, x), logits)[0] for r in (out, expected)]
    assert_near(grads[0], grads[1])


@options
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_keys_have_priority(option, dtype):
    p = problem(option, dtype=dtype)
    keys = torch.randn(2, 2, TOKENS, TOP_N, dtype=torch.promote_types(dtype, torch.float32))
    out = route(p.logits, TOP_N, policy="all", token_mask=p.mask, capacity=3, priority=keys, **p.options)
    for key, expert, slot in zip(*(t.flatten(0, 1) for t in (keys, out.expert, out.slot)), strict=True):
        for e in range(EXPERTS):
            mine = (slot != -1) & (expert == e)
            best = key[mine].sort(descending=True).values[:3]
            assert_same_bits(key[mine & (slot >= 0)].sort(descending=True).values, best)


def test_priority_of_modules():
    """The module's option, and keys for a call, which may come with weights from elsewhere too."""
    moe, x = (
        MoE(16, EXPERTS, gating_top_n=2, capacity_factor_train=0.5, policy_train="all", priority="weight"),
        torch.randn(3, 40, 16),
    )
    gate, logits = moe.gate, moe.gate.logits(x)
    first = route(logits, 2, capacity_factor=0.5, policy="all")
    assert not torch.equal(gate.route(x).slot, first.slot)
    by_weight = route(logits, 2, capacity_factor=0.5, policy="all", priority="weight")
    assert_same_bits(gate.route(x).slot, by_weight.slot)
    unlimited = route(logits, 2, capacity=80, policy="all")
    given = {"expert": unlimited.expert, "weight": unlimited.weight, "num_gates": EXPERTS, "capacity_factor": 0.5}
    assert_same_bits(route(**given, priority="weight").slot, by_weight.slot)
    order = -torch.arange(80.0).view(2, 40).T.expand(3, 40, 2)  # the order of ranks and tokens: the default
    assert_same_bits(gate.route(x, priority=order).slot, first.slot)
    moe.gate.priority = None
    assert_same_bits(moe(x, priority=by_weight.slot.float()).outputs, moe(x, priority=by_weight.slot.sign().float()).outputs)
    assert "priority=weight" in repr(TopNGating(16, EXPERTS, priority="weight"))


def loss_of(routing, x):
    y = routing.combine(routing.dispatch(x).square() + 1)
    return (y * y.detach().cos()).sum() + 3 * routing.balance_loss + 0.1 * routing.router_z_loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@options
def test_weights_of_each_type(option, dtype):
    p = problem(option, lead=(), dtype=dtype)
    out = route(p.logits, TOP_N, policy="all", token_mask=p.mask, capacity=6, **p.options)
    given = {**p.options, "expert": out.expert}
    expected = of_reference(Problem(p.logits, p.mask, given), p.logits, {"capacity": 6})
    assert out.weight.dtype == torch.float32
    assert_same_bits(out.slot, expected.slot)
    assert_near(out.weight, expected.weight)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (0, 4, 5), (1, 5)])
@layouts
def test_few_tokens(layout, shape):
    given = {"score": "sigmoid", "select_bias": torch.zeros(5), "stats": True, "balance_ranks": "all", "balance_over": "batch"}
    routing = route(torch.randn(shape), 2, **layout, **given)
    assert routing.expert.shape == (*shape[:-1], 2)
    assert all(t.isfinite().all() for t in (*routing.stats(), routing.balance_loss, routing.router_z_loss))


def test_top_n_is_that_of_the_given_experts():
    expert = torch.tensor([[0, 1, 2], [3, -1, 1]])
    assert route(torch.randn(2, 4), expert=expert, capacity=2).slot.tolist() == [[0, 0, 0], [0, -1, 1]]


# Replay


@layouts
@options
@pytest.mark.parametrize("policy", ["all", "random"])
def test_chosen_replays_a_routing(option, layout, policy):
    """To the bit; weights too where no pair was left out, or none is divided by a sum."""
    p = problem({**option, "normalize": False, "differentiable_topk_fused": True})
    layout = {**layout, "token_mask": p.mask}
    first = route(p.logits, TOP_N, policy=policy, **layout, **p.options)
    again = route(p.logits, **{**layout, **p.options, "expert": first.chosen})
    held = first.slot >= 0
    assert_same_bits(again.slot >= 0, held)
    assert_same_bits(again.slot[held], first.slot[held])
    assert_same_bits(again.source, first.source)
    assert_same_bits(again.weight, first.weight)
    assert_same_bits(again.chosen, first.chosen)


def test_modules_replay():
    torch.manual_seed(0)
    moe, x = MoE(16, EXPERTS, gating_top_n=2, dropless=True, score="sigmoid", normalize=False), torch.randn(2, 9, 16)
    with torch.no_grad():
        chosen = moe.gate.route(x).chosen
        other = copy.deepcopy(moe)
        other.gate.to_gates.weight.mul_(-1)
        assert not torch.equal(other.gate.route(x).expert, chosen)
        assert_same_bits(other.gate.route(x, expert=chosen).expert, chosen)
        assert_same_bits(moe(x, expert=chosen).outputs, moe(x).outputs)


# Losses


def test_counts_of_others_take_the_place_of_those_here():
    p = problem(OPTIONS["DeepSeek-V3"])
    logits, counts = p.logits.requires_grad_(), torch.randint(1, 50, (2, 2, EXPERTS))
    for given in (counts, counts[0, 0], counts.double()):
        out = route(logits, TOP_N, dropless=True, token_mask=p.mask, counts=given, **p.options).balance_loss
        expected = of_reference(p, logits, LAYOUTS["dropless"], counts=given).balance_loss
        assert_near(out, expected)
        assert_near(*(torch.autograd.grad(t, logits)[0] for t in (out, expected)))


@pytest.mark.parametrize("ranks", ["first", "all"])
def test_two_halves_of_a_batch_with_common_counts_have_the_loss_of_the_whole(ranks):
    """What a data-parallel group computes: each rank its own tokens, with the counts of all."""
    logits, given = torch.randn(6, TOKENS, EXPERTS, dtype=torch.float64), {"balance_over": "batch", "balance_ranks": ranks}
    whole, counted = route(logits, TOP_N, dropless=True, **given).balance_loss, []
    for half in logits.chunk(2):
        route(half, TOP_N, dropless=True, counts=lambda own: counted.append(own) or own, **given)
    halves = [route(half, TOP_N, dropless=True, counts=lambda own: sum(counted), **given) for half in logits.chunk(2)]
    assert_near(sum(routing.balance_loss for routing in halves) / 2, whole)


def test_with_loss_adds_the_gradient_of_a_loss():
    x, w = torch.randn(4, 5, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad((x * w).square().sum() + 0.3 * w.exp().sum(), (x, w))
    y = with_loss(x * w, w.exp().sum(), 0.3)
    assert_same_bits(y, x * w)
    assert_near(torch.cat([t.flatten() for t in torch.autograd.grad(y.square().sum(), (x, w))]), flat(expected))
    inside = torch.func.grad(lambda w: with_loss(x.detach() * w, w.exp().sum(), 0.3).square().sum())(w)
    assert_near(inside, expected[1])
    each = torch.vmap(torch.func.grad(lambda x, w: with_loss(x * w, w.exp().sum(), 0.3).square().sum(), 1), (0, None))(x, w)
    assert_near(each.sum(0), expected[1] + 3 * 0.3 * w.exp())


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def test_with_loss_in_one_graph():
    torch._dynamo.reset()
    w = torch.randn(5, requires_grad=True)

    def function(w):
        return with_loss(w * 2, w.exp().sum(), 0.3).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_near(torch.autograd.grad(compiled(w), w)[0], torch.autograd.grad(function(w), w)[0].double())


# The bias


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32])
def test_update_select_bias(dtype):
    bias, load = torch.randn(EXPERTS), torch.randint(0, 9, (EXPERTS,)).to(dtype)
    moved = bias.double() + 0.01 * (load.double().mean() - load.double()).sign()
    assert update_select_bias_(bias, load, 0.01) is bias
    assert_near(bias, moved - moved.mean())


def test_the_bias_balances_the_load():
    torch.manual_seed(0)
    gate = TopNGating(16, EXPERTS, top_n=2, dropless=True, score="sigmoid", select_bias=True)
    x = torch.randn(512, 16) + 1
    before = gate.route(x).max_violation
    for _ in range(300):
        update_select_bias_(gate.select_bias, gate.route(x).demand, 1e-2)
    assert gate.route(x).max_violation < 0.1 * before


CONVERSIONS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "double": lambda m: m.double(),
    "of a parent": lambda m: torch.nn.Sequential(m).bfloat16()[0],
}


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
def test_the_bias_stays_float32(convert):
    gate = TopNGating(16, EXPERTS, select_bias=True)
    values = torch.randn(EXPERTS)
    gate.select_bias.copy_(values)
    converted = convert(gate)
    assert_same_bits(converted.select_bias, values)
    assert converted.to_gates.weight.dtype != torch.float32
    converted.route(torch.randn(4, 16, dtype=converted.to_gates.weight.dtype))


def test_state_dict_has_what_was_asked_for():
    usual = {"to_gates.weight", "threshold_train", "threshold_eval"}
    assert set(TopNGating(16, EXPERTS).state_dict()) == usual
    assert set(TopNGating(16, EXPERTS, select_bias=True).state_dict()) == usual | {"select_bias"}
    assert set(TopNGating(16, EXPERTS, bias=True).state_dict()) == usual | {"to_gates.bias"}
    assert TopNGating(16, EXPERTS).select_bias is None


def test_a_gate_made_without_data_has_zeros_for_a_bias():
    gate = TopNGating(16, EXPERTS, select_bias=True, device="meta").to_empty(device="cpu")
    gate.reset_parameters()
    assert gate.select_bias.dtype == torch.float32
    assert not gate.select_bias.any()


# Statistics


@layouts
def test_statistics(layout):
    p = problem(OPTIONS["DeepSeek-V3"], lead=(2,))
    stats = route(p.logits, TOP_N, policy="all", token_mask=p.mask, stats=True, **layout, **p.options).stats()
    real, p_hat = p.logits[p.mask], p.logits[p.mask].sigmoid()
    p_hat = p_hat / p_hat.sum(-1, keepdim=True)
    demand = stats.demand.view(-1, EXPERTS).sum(0).double()
    assert demand.sum() == TOP_N * p.mask.sum()
    assert_near(stats.max_violation, demand.max() / demand.mean() - 1)
    assert_near(stats.drop_fraction, 1 - stats.load.sum() / demand.sum())
    assert_near(stats.entropy, -(p_hat * p_hat.log()).sum(-1).mean())
    assert_same_bits(stats.logit_max, real.abs().max())
    assert_near(stats.logit_rms, real.square().mean().sqrt())
    assert not any(t.requires_grad for t in stats)
    stacked = stack_stats([stats] * 3)
    assert stacked.shape == (3, 5 + EXPERTS)
    row = [stats.drop_fraction, stats.max_violation, stats.entropy, stats.logit_max, stats.logit_rms, *demand]
    assert_near(stacked[1], torch.stack([t.double() for t in row]))


def test_statistics_of_a_layer():
    moe, x = MoE(16, EXPERTS, stats=True), torch.randn(2, 9, 16)
    assert moe.stats is None
    moe(x)
    assert moe.stats.demand.shape == (2, EXPERTS)
    assert MoE(16, EXPERTS)(x) is not None


# Under torch's transforms

EVERYTHING = {
    **{"score": "sigmoid", "select_bias": True, "bias": True, "groups": 4, "top_groups": 2, "scale": 2.5},
    **{"balance_ranks": "all", "balance_over": "batch", "stats": True},
}


def layer(**more):
    torch.manual_seed(0)
    moe = MoE(16, EXPERTS, gating_top_n=2, policy_train="all", **EVERYTHING, **more)
    moe.gate.select_bias.normal_(0, 0.1)
    return moe, torch.randn(2, 9, 16, requires_grad=True)


def gradients(moe, x, call):
    outputs, loss, *_ = call(x)
    return torch.autograd.grad(outputs.square().sum() + loss, [x, *moe.parameters()])


layer_layouts = pytest.mark.parametrize("layout", [{}, {"priority": "weight"}, {"dropless": True}], ids=str)


@layer_layouts
def test_one_graph(layout):
    torch._dynamo.reset()
    moe, x = layer(**layout)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(moe, x, compiled), gradients(moe, x, moe))
    assert moe.stats.entropy > 0


@layer_layouts
def test_the_same_when_recomputed(layout):
    moe, x = layer(**layout)
    recomputed = gradients(moe, x, lambda x: checkpoint(moe, x, use_reentrant=False))
    assert_same_bits(recomputed, gradients(moe, x, moe))


@layer_layouts
def test_exported(layout):
    moe, x = layer(**layout)
    exported = torch.export.export(moe, (x,)).module()
    torch.testing.assert_close(exported(x), moe(x))


def test_samples_of_a_transform():
    p = problem(OPTIONS["DeepSeek-V3"], lead=(3,))

    def call(logits):
        return route(logits, TOP_N, capacity=4, policy="all", priority="weight", **p.options).weight.square().sum()

    each = torch.vmap(torch.func.grad(call))(p.logits)
    assert_near(each, torch.stack([torch.func.grad(call)(z) for z in p.logits]))
