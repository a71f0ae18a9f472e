"""Against the gates of DeepSpeed on the CPU: the same experts, slots, weights, loss and gradients, or how the two differ.

All its gates for two and more experts drop first and then normalise over the experts that are left: their weights are those of
the same choice replayed, ``route(logits, expert=routing.chosen)``. Ours are normalised before, as GShard and other peers have
it, so that a dropped expert's share of the output is missing rather than given to the others.
"""

import importlib
import logging
import math
import warnings

import pytest
import torch

from topn_gating import route
from topn_gating.functional import expert_capacity

pytest.importorskip("deepspeed.moe", reason="pip install --no-deps deepspeed==0.19.8")

EXPERTS, TOKENS, LEAST = 8, 60, 4

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
factors = pytest.mark.parametrize("factor", [0.05, 0.5, 1.0, 20.0])  # the first gives the least capacity


@pytest.fixture(scope="module")
def moe():
    """``deepspeed.moe.sharded_moe``, without its warnings about missing accelerators."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module("deepspeed.moe.sharded_moe")
    logging.disable(logging.NOTSET)
    return module


@pytest.fixture
def given(moe, monkeypatch):
    """Has DeepSpeed draw the numbers that it is given: ``given("gumbel_map", tensor)``."""

    def give(name, numbers):
        monkeypatch.setitem(getattr(moe, name), numbers.device, lambda shape: numbers.view(shape))

    return give


def logits_of(dtype=torch.float32):
    """Logits of which the first experts are the best, so that these overflow."""
    return (torch.randn(TOKENS, EXPERTS, dtype=dtype) + torch.linspace(1, 0, EXPERTS, dtype=dtype)).requires_grad_()


def assert_near(actual, expected, tolerance=None):
    tolerance = tolerance or {torch.float32: 2e-6, torch.float64: 1e-14}[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_same_gradients(actual, expected, logits, tolerance=None):
    """Gradients of two functions of the same logits, for the same random gradient into each."""
    into = torch.randn(expected.shape, dtype=expected.dtype)
    ours, theirs = (torch.autograd.grad(t, logits, into, retain_graph=True)[0] for t in (actual, expected))
    assert theirs.any()
    assert_near(ours, theirs, tolerance)


def by_index(gate, logits, *arguments, **options):
    """Their ``sparse_routes``: the loss, the capacity, and ``(n, k)`` experts (-1 where dropped), slots and weights."""
    loss, capacity, _, expert, slot, weight, demand = gate(logits, *arguments, sparse_routes=True, **options)
    return loss, int(capacity), expert.T, slot.T, weight.T, demand


def assert_same(routing, loss, expert, slot, weight, logits):
    """The same pairs in the same slots, weights, loss, and gradients of both; a dropped pair has slot 0 in theirs."""
    held = routing.slot >= 0
    assert torch.equal(routing.chosen, expert)
    assert torch.equal(routing.slot.where(held, 0), slot)
    # The shares of tokens in their loss are float32 even for float64 logits.
    for ours, theirs, tolerance in ((routing.weight, weight, None), (routing.balance_loss, loss, 2e-6)):
        assert_near(ours, theirs, tolerance)
        assert_same_gradients(ours, theirs, logits, tolerance)


def replayed(logits, routing, **options):
    """Those pairs alone that hold a slot, so that their weights are normalised without the others."""
    again = route(logits, expert=routing.chosen, capacity=routing.capacity, **options)
    assert torch.equal(again.source, routing.source)
    return again


def assert_dense(theirs, routing, logits):
    """Their dense tensors ``(n, e, c)`` are ours, gradients of the weights included."""
    combine, dispatch = theirs
    ours, where = routing._replace(straight_through=False).dense()[::-1]
    assert torch.equal(dispatch, where > 0)
    assert_near(ours, combine)
    assert_same_gradients(ours, combine, logits)


# Top-1: the raw probability, and random token selection


@dtypes
@factors
def test_top_1_with_random_token_selection(moe, given, factor, dtype):
    """It is a priority of random keys."""
    logits, uniform = logits_of(dtype), torch.rand(TOKENS, EXPERTS)
    given("exp_selection_uniform_map", uniform)
    loss, capacity, expert, slot, weight, demand = by_index(moe.top1gating, logits, factor, LEAST)
    keys = uniform.to(dtype).gather(1, logits.argmax(-1, keepdim=True))
    routing = route(logits, 1, capacity=capacity, priority=keys)
    assert_same(routing, loss, expert, slot, weight, logits)
    assert torch.equal(routing.demand.long(), demand)
    assert (routing.drop_fraction > 0) == (factor < 20)
    _, combine, dispatch, _ = moe.top1gating(logits, factor, LEAST)
    assert_dense((combine, dispatch), routing, logits)


@factors
def test_top_1_without_it_keeps_any_tokens(moe, factor):
    """``torch.topk`` of ones and zeros promises no order among the ones. As many are kept; with keys that say which, these."""
    logits = logits_of()
    loss, capacity, expert, slot, weight, _ = by_index(moe.top1gating, logits, factor, LEAST, use_rts=False)
    kept = expert >= 0
    assert torch.equal(route(logits, 1, capacity=capacity).load, torch.bincount(expert[kept], minlength=EXPERTS).int())
    assert_same(route(logits, 1, capacity=capacity, priority=kept.float()), loss, expert, slot, weight, logits)


@dtypes
def test_top_1_without_drops(moe, dtype):
    """Their buffers have as many slots as the busiest expert asks for; dropless, every expert has its own number."""
    logits = logits_of(dtype)
    loss, capacity, expert, slot, weight, _ = by_index(moe.top1gating, logits, 0.5, LEAST, drop_tokens=False)
    routing = route(logits, 1, dropless=True)
    assert capacity == routing.demand.max()
    assert_same(routing, loss, expert, slot, weight, logits)


def test_top_1_with_noise(moe, given):
    """Theirs is for the choice alone, ours also in the weights: the choice is the same, and so are the weights of a replay."""
    logits, u = logits_of(), torch.rand(TOKENS, EXPERTS)
    given("gumbel_map", -torch.log(-torch.log(u)))
    loss, capacity, expert, slot, weight, _ = by_index(
        moe.top1gating, logits, 20.0, LEAST, noisy_gate_policy="RSample", use_rts=False
    )
    noisy = route(logits, 1, capacity=capacity, noise=u)
    assert torch.equal(noisy.chosen, expert)
    assert not torch.equal(noisy.chosen, route(logits, 1, capacity=capacity).chosen)
    assert_same(replayed(logits, noisy), loss, expert, slot, weight, logits)


def test_top_1_of_used_tokens(moe):
    """Padding takes no slot in either; but it stays in the means of their loss, that of the gates and that of the counts."""
    logits, used = logits_of(), torch.rand(TOKENS) < 0.7
    loss, capacity, expert, slot, weight, demand = by_index(
        moe.top1gating, logits, 20.0, LEAST, used_token=used.long(), use_rts=False
    )
    routing = route(logits, 1, capacity=capacity, token_mask=used)
    assert_same(routing._replace(balance_loss=loss), loss, expert, slot, weight, logits)
    assert torch.equal(routing.demand.long(), demand)
    of_all = route(logits, 1, capacity=capacity, counts=demand).balance_loss * used.sum() / TOKENS
    assert_near(of_all, loss)
    assert_same_gradients(of_all, loss, logits)
    assert (routing.balance_loss - loss).abs() > 0.01


# Top-2: slots rank by rank


@factors
def test_top_2(moe, factor):
    """In float32: their einsum takes no other type. The loss counts first ranks, as ours, before the drop."""
    logits, options = logits_of(), {"top2_2nd_expert_sampling": False}
    loss, capacity, expert, slot, weight, demand = by_index(moe.top2gating, logits, factor, LEAST, **options)
    before = route(logits, 2, capacity=capacity, policy="all")
    routing = replayed(logits, before)
    assert torch.equal(before.demand.long(), demand)
    assert_same(routing._replace(balance_loss=before.balance_loss), loss, expert, slot, weight, logits)
    one_left = (before.slot >= 0).sum(-1) == 1
    assert one_left.any() == (factor < 20)
    assert (weight.sum(-1)[one_left] == 1).all()
    assert (before.weight.sum(-1)[one_left] < 1).all()
    _, combine, dispatch, _ = moe.top2gating(logits, factor, LEAST, **options)
    assert_dense((combine, dispatch), routing, logits)


def test_top_2_without_drops(moe):
    logits = logits_of()
    loss, capacity, expert, slot, weight, _ = by_index(
        moe.top2gating, logits, 0.5, LEAST, drop_tokens=False, top2_2nd_expert_sampling=False
    )
    routing = route(logits, 2, capacity=capacity, policy="all")
    assert capacity == routing.demand.max()
    assert_same(routing, loss, expert, slot, weight, logits)


@factors
def test_top_2_with_a_second_expert_by_lot(moe, given, factor):
    """Gumbel noise for the second choice alone, which ours takes as given experts. (Theirs adds it to the caller's logits.)"""
    logits, gumbel = logits_of(), -torch.log(-torch.log(torch.rand(TOKENS, EXPERTS)))
    given("gumbel_map", gumbel)
    loss, capacity, expert, slot, weight, demand = by_index(moe.top2gating, logits.clone(), factor, LEAST)
    first = logits.argmax(-1, keepdim=True)
    second = (logits + gumbel).scatter(1, first, -math.inf).argmax(-1, keepdim=True)
    before = route(logits, expert=torch.cat([first, second], 1), capacity=capacity)
    assert torch.equal(before.demand.long(), demand)
    routing = replayed(logits, before)._replace(balance_loss=before.balance_loss)
    assert_same(routing, loss, expert, slot, weight, logits)


# Top-k: slots by token, the loss of all ranks


@dtypes
@pytest.mark.parametrize("policy", ["probs", "position"])
@factors
@pytest.mark.parametrize("k", [2, 3, 6])
def test_top_k(moe, k, factor, policy, dtype):
    """Their policies are priorities: of the gates before they are normalised, or of the tokens' order, whatever the rank.

    Slots are counted by token alone, as in our dropless layout of what was kept.
    """
    logits = logits_of(dtype)
    loss, capacity, expert, slot, weight, demand = by_index(moe.topkgating, logits, k, factor, LEAST, drop_policy=policy)
    gates = logits.softmax(-1).detach().topk(k).values
    order = -torch.arange(TOKENS, dtype=dtype).unsqueeze(-1).expand(-1, k)
    options = {"capacity": capacity, "policy": "all", "balance_ranks": "all"}
    before = route(logits, k, priority=gates if policy == "probs" else order, **options)
    assert torch.equal(before.demand.long(), demand)
    if policy == "probs":
        assert torch.equal(route(logits, k, normalize=False, priority="weight", **options).source, before.source)
    routing = replayed(logits, before).as_dropless()._replace(balance_loss=before.balance_loss)
    assert_same(routing, loss, expert, slot, weight, logits)
    assert (expert < 0).any() == (factor < 20)


@factors
@pytest.mark.parametrize("k", [2, 3])
def test_top_k_by_position_is_not_by_rank(moe, k, factor):
    """By default ours gives the slots to better ranks first. As many are taken."""
    logits = logits_of()
    _, capacity, expert, _, _, _ = by_index(moe.topkgating, logits, k, factor, LEAST, drop_policy="position")
    routing = route(logits, k, capacity=capacity, policy="all")
    assert torch.equal(routing.load, torch.bincount(expert[expert >= 0], minlength=EXPERTS).int())
    assert torch.equal(routing.chosen, expert) == (factor == 20)
    firsts = [(t[:, 0] >= 0).sum() for t in (routing.chosen, expert)]
    assert firsts[0] > firsts[1] or factor == 20


@dtypes
def test_top_k_without_drops(moe, dtype):
    logits = logits_of(dtype)
    loss, capacity, expert, slot, weight, _ = by_index(moe.topkgating, logits, 3, 0.5, LEAST, drop_tokens=False)
    routing = route(logits, 3, dropless=True, balance_ranks="all")
    assert capacity == routing.demand.max()
    assert_same(routing, loss, expert, slot, weight, logits)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25])
def test_capacity_is_rounded_up_there_and_down_here(moe, factor):
    for tokens in range(LEAST, 200):
        exact = tokens * factor / EXPERTS
        gates = torch.empty(tokens, EXPERTS)
        assert moe._capacity(gates, torch.tensor(factor), torch.tensor(LEAST)) == max(math.ceil(exact), LEAST)
        assert expert_capacity(tokens, EXPERTS, factor, LEAST) == max(math.floor(exact), LEAST)
