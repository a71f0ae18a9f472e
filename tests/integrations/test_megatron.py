"""Against the router of Megatron-core on the CPU: the same experts, weights, losses and gradients, or how the two differ.

Megatron-core computes softmax and sigmoid of float64 logits in float32, so that float64 is compared within float32's rounding.
It has the shape ``(n, groups, e)``, one capacity for the tokens of all groups, no ``sqrtsoftplus`` in this version, and an
expert bias for the sigmoid alone.
"""

import math

import pytest
import torch

from topn_gating import route, update_select_bias_, with_loss
from topn_gating.functional import expert_capacity

pytest.importorskip("megatron.core", reason="pip install --no-deps megatron-core==0.16.1")

EXPERTS, TOKENS, GROUPS = 16, 40, 3
TINY = 1e-20  # Megatron-core adds it to a sum of gates, where route has `eps` as the least sum

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def logits_of(shape=(TOKENS, EXPERTS), dtype=torch.float32):
    return (2 * torch.randn(shape, dtype=dtype)).requires_grad_()


def table(routing, weight=None, num_experts=EXPERTS):
    """``(…, n, e)``: the weights of a routing, or what is given of each of its pairs, and which pairs hold a slot."""
    expert, held = routing.expert.long().clamp(min=0), routing.slot >= 0
    weight = routing.weight if weight is None else weight
    empty = weight.new_zeros((*expert.shape[:-1], num_experts))
    return empty.scatter_add(-1, expert, weight.where(held, 0)), empty.scatter_add(-1, expert, held.to(empty.dtype)) > 0


def assert_near(actual, expected):
    """Within float32's rounding, relative to the largest value."""
    largest = expected.detach().abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=1e-6 * max(largest, 1e-3))


def assert_same_gradients(actual, expected, logits, constant=False):
    """Gradients of two functions of the same logits, for the same random gradient into each; 0 if they are constant."""
    into = torch.randn(expected.shape, dtype=expected.dtype)
    ours, theirs = (torch.autograd.grad(t, logits, into, retain_graph=True)[0] for t in (actual, expected))
    assert theirs.any() != constant
    assert_near(ours, theirs)


# Selection and weights. Keywords of theirs; of ours.

SIGMOID = {"score_function": "sigmoid"}, {"score": "sigmoid", "eps": TINY}


def both(pair, theirs=None, ours=None):
    return {**pair[0], **(theirs or {})}, {**pair[1], **(ours or {})}


ROUTERS = {
    "softmax of the chosen": ({}, {"normalize": True}),
    "softmax of all": ({"use_pre_softmax": True}, {"normalize": False}),
    "sigmoid": SIGMOID,
    "scaled": ({"scaling_factor": 2.5}, {"normalize": True, "scale": 2.5}),
    "scaled sigmoid": both(SIGMOID, {"scaling_factor": 2.5}, {"scale": 2.5}),
}
# A group's score is in theirs the sum of its best topk // group_topk.
GROUPED = {
    "DeepSeek-V2": (6, {"use_pre_softmax": True, "scaling_factor": 16.0}, {"normalize": False, "scale": 16.0}, 5, "max"),
    "DeepSeek-V3": (8, *both(SIGMOID, {"scaling_factor": 2.5}, {"scale": 2.5}), 4, "top2"),
    "softmax of the chosen, one each": (3, {}, {"normalize": True}, 3, "max"),
    "softmax of all, two each": (4, {"use_pre_softmax": True}, {"normalize": False}, 2, "top2"),
}


def assert_same_routing(core, logits, topk, theirs, ours, constant=False):
    probs, chosen = core.moe_utils.topk_routing_with_score_function(logits, topk, **theirs)
    routing = route(logits, topk, dropless=True, **ours)
    weight, held = table(routing)
    assert torch.equal(held, chosen)
    assert_near(weight, probs)
    assert_same_gradients(weight, probs, logits, constant)
    return routing


@dtypes
@pytest.mark.parametrize("topk", [1, 2, 8, EXPERTS])
@pytest.mark.parametrize("name", ROUTERS)
def test_routers(core, name, topk, dtype):
    constant = topk == 1 and name in ("softmax of the chosen", "scaled")
    assert_same_routing(core, logits_of(dtype=dtype), topk, *ROUTERS[name], constant=constant)


@dtypes
@pytest.mark.parametrize("topk", [1, 4])
def test_expert_bias(core, topk, dtype):
    """It chooses experts, other ones than without it, and is in no weight."""
    bias, logits = torch.randn(EXPERTS), logits_of(dtype=dtype)
    theirs, ours = both(SIGMOID, {"expert_bias": bias}, {"select_bias": bias})
    with_bias = assert_same_routing(core, logits, topk, theirs, ours)
    assert not torch.equal(table(with_bias)[1], table(route(logits, topk, dropless=True, **SIGMOID[1]))[1])


def test_expert_bias_of_a_softmax_is_theirs_to_ignore(core):
    bias, logits = torch.randn(EXPERTS), logits_of()
    _, chosen = core.moe_utils.topk_routing_with_score_function(logits, 4, use_pre_softmax=True, expert_bias=bias)
    assert torch.equal(table(route(logits, 4, dropless=True))[1], chosen)
    assert not torch.equal(table(route(logits, 4, dropless=True, select_bias=bias))[1], chosen)


@dtypes
@pytest.mark.parametrize("name", GROUPED)
def test_groups_of_experts(core, name, dtype):
    topk, theirs, ours, group_topk, group_score = GROUPED[name]
    theirs = theirs | {"num_groups": 8, "group_topk": group_topk}
    ours = ours | {"groups": 8, "top_groups": group_topk, "group_score": group_score}
    logits = logits_of(dtype=dtype)
    assert_same_routing(core, logits, topk, theirs, ours)
    if "score" in ours:
        bias = 3 * torch.randn(EXPERTS)  # so that open experts have scores below 0, where a closed one has none
        assert_same_routing(core, logits, topk, theirs | {"expert_bias": bias}, ours | {"select_bias": bias})


def test_groups_by_the_sum_of_logits(core):
    """A softmax behind the choice adds up a group's logits in theirs, its gates in ours. The weights of their choice agree."""
    logits, theirs = logits_of(), {"num_groups": 4, "group_topk": 2}
    probs, chosen = core.moe_utils.topk_routing_with_score_function(logits, 4, **theirs)
    assert not torch.equal(table(route(logits, 4, dropless=True, groups=4, top_groups=2))[1], chosen)
    replayed = route(logits, expert=chosen.nonzero()[:, 1].view(-1, 4), dropless=True)
    weight, held = table(replayed)
    assert torch.equal(held, chosen)
    assert_near(weight, probs)
    assert_same_gradients(weight, probs, logits)


@pytest.mark.parametrize("name", ["softmax of the chosen", "softmax of all", "scaled sigmoid"])
def test_replay(core, name):
    """``expert=`` is their ``RouterReplay``."""
    theirs, ours = ROUTERS[name]
    replay, before = core.router_replay.RouterReplay(), route(logits_of(), 4, dropless=True)
    try:
        replay.set_target_indices(before.expert.long())
        replay.set_router_replay_action(core.router_replay.RouterReplayAction.REPLAY_FORWARD)
        replayed = assert_same_routing(
            core, logits_of(), 4, theirs | {"router_replay": replay}, ours | {"expert": before.chosen}
        )
        assert torch.equal(replayed.expert, before.expert)
    finally:
        replay.clear_global_router_replay_instances()


# The router with its losses, which it adds to the gradient of its weights

LOSSES = {  # their type; the name they log it under; ours
    "aux_loss": ("load_balancing_loss", {"balance_over": "batch"}),
    "seq_aux_loss": ("seq_load_balancing_loss", {"balance_over": "group"}),
}


def logged(core, name):
    return core.moe_utils.get_moe_layer_wise_logging_tracker()[name]["values"][0]


def ours_and_theirs(core, made, logits, mask=None, **ours):
    """Runs both on logits ``(groups, n, e)``; returns our routing, and theirs: weights ``(groups, n, e)`` and the map."""
    padding = None if mask is None else ~mask.T
    probs, chosen = made.routing(logits.transpose(0, 1).contiguous(), padding)
    probs, chosen = (t.view(-1, *logits.shape[::2]).transpose(0, 1) for t in (probs, chosen))
    routing = route(logits, made.topk, dropless=True, balance_ranks="all", token_mask=mask, **ours)
    return routing, probs, chosen


@dtypes
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("topk", [1, 3])
def test_losses(core, router, topk, kind, score, dtype):
    name, over = LOSSES[kind]
    made = router(topk, 8, 0.01, 0.5, load_balancing_type=kind, score_function=score, pre_softmax=True)
    logits = logits_of((GROUPS, TOKENS, 8), dtype)
    ours = {"score": score, "normalize": score == "sigmoid" and topk > 1, **over}
    routing, probs, chosen = ours_and_theirs(core, made, logits, **ours)
    weight, held = table(routing, num_experts=8)
    assert torch.equal(held, chosen)
    assert_near(logged(core, name).to(dtype), routing.balance_loss)
    assert_near(logged(core, "z_loss").to(dtype), routing.router_z_loss)
    weight = with_loss(with_loss(weight, routing.balance_loss, 0.5), routing.router_z_loss, 0.01)
    assert_same_gradients(weight, probs, logits)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_loss_of_all_microbatches(core, router, score):
    """Their global loss has the mean counts of the step's microbatches so far; ours takes counts of any scale."""
    made = router(2, 8, None, 0.5, load_balancing_type="global_aux_loss", score_function=score, pre_softmax=True)
    so_far, before = torch.zeros(8), torch.zeros(())

    def add(counts):
        return so_far.add_(counts)

    for _ in range(3):
        logits = logits_of((GROUPS, TOKENS, 8))
        ours = {"score": score, "normalize": score == "sigmoid", "balance_over": "batch", "counts": add}
        routing, probs, _ = ours_and_theirs(core, made, logits, **ours)
        total = logged(core, "global_load_balancing_loss").clone()
        assert_near(total - before, routing.balance_loss)
        before = total
        assert_same_gradients(with_loss(table(routing, num_experts=8)[0], routing.balance_loss, 0.5), probs, logits)


def test_loss_of_all_ranks(core):
    """Theirs is to be added up over the ranks, ours is a mean: each rank's loss is theirs times the number of ranks."""
    ranks, topk = [logits_of((TOKENS, 8)) for _ in range(3)], 2
    maps, scores = zip(*(core.moe_utils.compute_routing_scores_for_aux_loss(z, topk, "softmax") for z in ranks), strict=True)
    counts = sum(m.sum(0) for m in maps)
    for logits, p in zip(ranks, scores, strict=True):
        theirs = core.moe_utils.switch_load_balancing_loss_func(p, counts, 3 * TOKENS, topk, 8, 1.0)
        ours = route(logits, topk, dropless=True, balance_ranks="all", counts=counts).balance_loss
        assert_near(ours, 3 * theirs)
        assert_same_gradients(ours, 3 * theirs, logits)


def test_losses_behind_a_bias_or_groups(core, router):
    """Theirs count the experts that the best scores alone would choose, ours those that are chosen."""
    made = router(4, EXPERTS, None, 0.5, load_balancing_type="aux_loss", score_function="sigmoid", enable_expert_bias=True)
    made.expert_bias.copy_(torch.randn(EXPERTS))
    logits = logits_of((GROUPS, TOKENS, EXPERTS))
    ours = {"score": "sigmoid", "eps": TINY, "select_bias": made.expert_bias, "balance_over": "batch"}
    routing, probs, chosen = ours_and_theirs(core, made, logits, **ours)
    assert torch.equal(table(routing)[1], chosen)
    theirs = logged(core, "load_balancing_loss").clone()
    assert abs(theirs - routing.balance_loss) > 0.01

    plain, gates = core.moe_utils.compute_routing_scores_for_aux_loss(logits.flatten(0, 1), 4, "sigmoid")
    counted, *_ = ours_and_theirs(core, made, logits, counts=plain.sum(0), **ours)
    assert_near(counted.balance_loss, theirs)
    assert_same_gradients(with_loss(table(counted)[0], counted.balance_loss, 0.5), probs, logits)

    chosen_here = chosen.flatten(0, 1).sum(0)
    of_chosen = core.moe_utils.switch_load_balancing_loss_func(gates, chosen_here, len(gates), 4, EXPERTS, 1.0)
    assert_near(routing.balance_loss, of_chosen)


@pytest.mark.parametrize("kind", LOSSES)
def test_padding_counts_for_no_loss(core, router, kind):
    """Ours routes no token of the padding either, theirs does: it is for the losses alone."""
    name, over = LOSSES[kind]
    made = router(3, 8, 0.01, 0.5, load_balancing_type=kind, pre_softmax=True)
    mask = torch.rand(GROUPS, TOKENS).argsort(-1) < TOKENS - 9  # as many in every group
    logits = logits_of((GROUPS, TOKENS, 8))
    routing, probs, chosen = ours_and_theirs(core, made, logits, mask, normalize=False, **over)
    weight, held = table(routing, num_experts=8)
    assert torch.equal(held[mask], chosen[mask])
    assert chosen[~mask].any()
    assert not held[~mask].any()
    assert_near(logged(core, name), routing.balance_loss)
    assert_near(logged(core, "z_loss"), routing.router_z_loss)
    weight = with_loss(with_loss(weight, routing.balance_loss, 0.5), routing.router_z_loss, 0.01)
    assert_same_gradients(weight, torch.where(mask.unsqueeze(-1), probs, 0), logits)


def test_groups_with_unlike_padding(core, router):
    """Theirs divides each group's loss by the mean length squared, ours by the group's own length squared."""
    made = router(3, 8, None, 1.0, load_balancing_type="seq_aux_loss", pre_softmax=True)
    lengths, logits = torch.tensor([TOKENS, 25, 7]), logits_of((GROUPS, TOKENS, 8))
    mask = torch.arange(TOKENS) < lengths.unsqueeze(1)
    routing, *_ = ours_and_theirs(core, made, logits, mask)
    alone = torch.stack(
        [route(z[:n], 3, dropless=True, balance_ranks="all").balance_loss for z, n in zip(logits, lengths, strict=True)]
    )
    assert_near(routing.balance_loss, alone.mean())
    shares = (lengths / lengths.double().mean()).square().float()
    assert_near(logged(core, "seq_load_balancing_loss"), (alone * shares).mean())


# The step of the expert bias


def test_steps_of_the_expert_bias(core, router, group, monkeypatch):
    """The same steps, but that ours takes the mean away: the same choice in every step, and no drift."""
    monkeypatch.setattr(core.moe_utils.parallel_state, "_TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP", group)
    made = router(2, 8, score_function="sigmoid", enable_expert_bias=True)
    bias, rate, even = torch.zeros(8), 0.05, 0
    for step in range(40):
        load = torch.zeros(8, dtype=torch.int64)
        for _ in range(2):
            logits = torch.randn(GROUPS, 4, 8) + torch.linspace(-1, 1, 8)
            routing, _, chosen = ours_and_theirs(core, made, logits.requires_grad_(), score="sigmoid", select_bias=bias)
            assert torch.equal(table(routing, num_experts=8)[1], chosen)
            load += routing.demand
        assert torch.equal(made.local_tokens_per_expert.long(), load)
        made.expert_bias.copy_(core.moe_utils.get_updated_expert_bias(made.local_tokens_per_expert, made.expert_bias, rate))
        made.local_tokens_per_expert.zero_()
        even += int((load == 6).sum())  # an expert with the mean load stays where it is
        update_select_bias_(bias, load, rate)
        torch.testing.assert_close(bias, made.expert_bias - made.expert_bias.mean(), rtol=0, atol=1e-6 * (step + 1))
    assert even > 0
    assert made.expert_bias.mean().abs() > rate / 8 > bias.mean().abs()


# Dropping tokens. Theirs has one capacity for all tokens, and rounds it up.


def dropped(core, logits, topk, factor, policy, pad=False):
    """Their weights and map ``(n, e)`` before and after the drop, and the capacity."""
    probs, chosen = core.moe_utils.topk_routing_with_score_function(logits, topk, use_pre_softmax=True)
    capacity = core.moe_utils.get_capacity(len(logits) * topk, EXPERTS, factor)
    after = core.moe_utils.apply_router_token_dropping(probs, chosen, topk, factor, policy, pad)
    return chosen, *after, capacity


@dtypes
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0, 100.0])
@pytest.mark.parametrize("topk", [1, 4])
def test_drop_policy_probs(core, topk, factor, pad, dtype):
    """``priority="weight"``. With padding, their map also names tokens of weight 0 that fill the expert's slots."""
    logits = logits_of(dtype=dtype)
    chosen, probs, kept, capacity = dropped(core, logits, topk, factor, "probs", pad)
    routing = route(logits, topk, capacity=capacity, policy="all", normalize=False, priority="weight")
    weight, held = table(routing)
    assert torch.equal(held, kept & chosen if pad else kept)
    assert (routing.drop_fraction > 0) == (factor < 100)
    assert_near(weight, probs)
    assert_same_gradients(weight, probs, logits)


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0, 100.0])
def test_drop_policy_position(core, factor):
    """Theirs keeps any ``C`` of an expert's tokens: ``torch.topk`` of ones and zeros promises no order among the ones.

    As many are kept as here. With keys that say which, the same.
    """
    logits, topk = logits_of(), 4
    _, probs, kept, capacity = dropped(core, logits, topk, factor, "position")
    first = route(logits, topk, capacity=capacity, policy="all", normalize=False)
    assert torch.equal(first.load.long(), kept.sum(0))
    keys = kept.float().gather(1, first.expert.long())
    weight, held = table(route(logits, topk, capacity=capacity, policy="all", normalize=False, priority=keys))
    assert torch.equal(held, kept)
    assert_near(weight, probs)
    assert_same_gradients(weight, probs, logits)


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_drops_leave_the_losses_alone(core, router, policy):
    made = router(3, 8, 0.01, 0.5, load_balancing_type="aux_loss", pre_softmax=True)
    made.config.moe_expert_capacity_factor, made.config.moe_token_drop_policy = 0.5, policy
    logits = logits_of((1, TOKENS, 8))
    probs, kept = made.routing(logits.transpose(0, 1))
    capacity = core.moe_utils.get_capacity(3 * TOKENS, 8, 0.5)
    expert = route(logits, 3, dropless=True).expert
    keys = kept.float().gather(1, expert[0].long()).unsqueeze(0)
    options = {"capacity": capacity, "policy": "all", "normalize": False, "balance_ranks": "all"}
    routing = route(logits, 3, priority="weight" if policy == "probs" else keys, **options)
    weight, held = table(routing, num_experts=8)
    assert torch.equal(held[0], kept)
    assert routing.drop_fraction > 0.1
    assert_near(logged(core, "load_balancing_loss"), routing.balance_loss)
    weight = with_loss(with_loss(weight, routing.balance_loss, 0.5), routing.router_z_loss, 0.01)
    assert_same_gradients(weight[0], probs, logits)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.3])
def test_capacity_is_rounded_up_there_and_down_here(core, factor):
    """And theirs counts the pairs of all ranks, ours, as GShard, those of one: the factor has the other scale."""
    for tokens in range(1, 200):
        exact = tokens * 2 * factor / 8
        assert core.moe_utils.get_capacity(tokens * 2, 8, factor) == math.ceil(exact)
        assert expert_capacity(tokens, 8, 2 * factor, 1) == max(1, math.floor(exact))


# The experts' rows


@dtypes
@pytest.mark.parametrize("topk", [1, 3])
def test_permute_and_unpermute(core, topk, dtype):
    """They are ``dispatch`` and ``combine`` of the dropless layout, to the bit on the way to the experts."""
    x, logits = torch.randn(TOKENS, 8, dtype=dtype, requires_grad=True), logits_of(dtype=dtype)
    probs, chosen = core.moe_utils.topk_routing_with_score_function(logits, topk, use_pre_softmax=True)
    routing = route(logits, topk, dropless=True, normalize=False, straight_through=False)
    theirs, _, order, *_ = core.moe_utils.permute(x, chosen)
    ours = routing.dispatch(x)
    assert torch.equal(ours, theirs)
    gain = torch.randn(len(ours), 1, dtype=dtype)  # of each row, as experts that differ give it
    theirs = core.moe_utils.unpermute(theirs * gain, order, x.shape, probs=probs, routing_map=chosen)
    ours = routing.combine(ours * gain)
    assert_near(ours, theirs)
    for leaf in (x, logits):
        assert_same_gradients(ours, theirs, leaf)
