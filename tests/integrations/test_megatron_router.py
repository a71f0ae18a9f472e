"""``topn_gating.integrations.megatron.TopKRouter`` beside the router of Megatron-core that it is a subclass of."""

import copy
import importlib
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

import topn_gating

pytest.importorskip("megatron.core", reason="pip install --no-deps megatron-core==0.16.1")

EXPERTS, LENGTH, BATCH = 16, 12, 3
NEAR = {
    torch.float32: {"rtol": 2e-6, "atol": 1e-6},
    torch.float64: {"rtol": 2e-6, "atol": 1e-6},  # softmax and sigmoid are float32 there
    torch.bfloat16: {"rtol": 2**-7, "atol": 2**-9},
}


@pytest.fixture(scope="module")
def ours(core):
    return importlib.import_module("topn_gating.integrations.megatron")


@pytest.fixture
def pair(ours, router):
    """Makes both routers of one configuration, with the same parameters and the same bias of experts."""

    def make(*args, **options):
        theirs, here = router(*args, **options), router(*args, kind=ours.TopKRouter, **options)
        if theirs.expert_bias is not None:
            theirs.expert_bias.copy_(0.3 * torch.randn(theirs.num_experts))
        here.load_state_dict(theirs.state_dict())
        return theirs, here

    return make


@pytest.fixture
def routes_here(ours, monkeypatch):
    """The options of each call of ``route``."""
    calls = []

    def recorded(logits, top_n, **options):
        calls.append(options)
        return topn_gating.route(logits, top_n, **options)

    monkeypatch.setattr(ours, "route", recorded)
    return calls


def logits_of(dtype=torch.float32, length=LENGTH, batch=BATCH, num_experts=EXPERTS):
    """Logits ``(length, batch, e)`` of which no two of a token, nor their gates, are the same when they are rounded."""
    order = torch.rand(length, batch, num_experts).argsort(-1)
    return (order / num_experts * 6 - 3).add_(0.02 * torch.rand(length, batch, num_experts)).to(dtype)


def run(router, logits, padding=None):
    """What it returns, the gradient of the logits, and what it logged and counted."""
    logged = importlib.import_module("megatron.core.transformer.moe.moe_utils").get_moe_layer_wise_logging_tracker()
    logged.clear()
    logits = logits.clone().requires_grad_()
    probs, chosen = router.routing(logits, padding)
    into = torch.linspace(-1, 1, probs.numel(), dtype=probs.dtype).view_as(probs)
    (grad,) = torch.autograd.grad(probs, logits, into)
    values = {name: entry["values"].clone() for name, entry in logged.items()}
    counts = router.local_tokens_per_expert
    return probs.detach(), chosen, grad, values, None if counts is None else counts.clone()


def assert_same(pair, logits, padding=None):
    """Both return the same, and have the same gradients, losses and counts; returns theirs."""
    theirs, here = (run(router, logits, padding) for router in pair)
    near = NEAR[logits.dtype]
    assert [t.dtype for t in here[:3]] == [t.dtype for t in theirs[:3]]
    assert torch.equal(here[1], theirs[1])
    if logits.dtype == torch.bfloat16:  # as often rounded, so that but for float32's rounding the weights are equal
        assert (here[0] != theirs[0]).sum() <= 0.01 * here[1].sum()
    for one, other in zip(here[:1] + here[2:], theirs[:1] + theirs[2:], strict=True):
        torch.testing.assert_close(one, other, **near)
    return theirs


SIGMOID = {"score_function": "sigmoid"}
BIAS = {**SIGMOID, "enable_expert_bias": True}
HERE = {  # topk and the configuration; whether it is computed here where logits are of a half type
    "softmax of the chosen": (4, {}, True),
    "softmax of all": (4, {"pre_softmax": True}, True),
    "softmax of all, one": (1, {"pre_softmax": True}, True),
    "sigmoid": (4, SIGMOID, True),
    "sigmoid, one": (1, SIGMOID, True),
    "all experts": (EXPERTS, {"pre_softmax": True}, True),
    "scaled": (4, {"topk_scaling_factor": 2.5}, True),
    "scaled sigmoid": (4, {**SIGMOID, "topk_scaling_factor": 2.5}, True),
    "bias": (4, BIAS, False),
    "bias, one": (1, BIAS, False),
    "groups, one each": (3, {**SIGMOID, "num_groups": 8, "group_topk": 3}, True),
    "DeepSeek-V2": (6, {"pre_softmax": True, "num_groups": 8, "group_topk": 3, "topk_scaling_factor": 16.0}, False),
    "DeepSeek-V3": (8, {**BIAS, "num_groups": 8, "group_topk": 4, "topk_scaling_factor": 2.5}, False),
    "drops": (2, {"moe_expert_capacity_factor": 0.5}, True),
    "drops, softmax of all": (3, {"pre_softmax": True, "moe_expert_capacity_factor": 0.5}, True),
    "drops, sigmoid": (3, {**SIGMOID, "moe_expert_capacity_factor": 0.5}, True),
    "slots for all": (2, {"moe_expert_capacity_factor": 100.0}, True),
    "any tokens drop": (2, {"moe_expert_capacity_factor": 0.5, "moe_token_drop_policy": "position"}, True),
}
LOSSES = {"load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.5, "moe_z_loss_coeff": 0.1}


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("name", HERE)
def test_equals_the_class(pair, routes_here, name, dtype):
    """With a balance loss and a z-loss on top, which are in the gradients."""
    topk, options, half_too = HERE[name]
    routers = pair(topk, **LOSSES, **options)
    probs, chosen, _, losses, counts = assert_same(routers, logits_of(dtype))
    assert len(routes_here) == (half_too or dtype != torch.bfloat16)
    assert set(losses) == {"load_balancing_loss", "z_loss"}
    assert all(values.all() for values in losses.values())
    assert probs.count_nonzero() == chosen.sum()
    assert (chosen.sum() < LENGTH * BATCH * topk) == ("drop" in name)
    if counts is not None:
        assert torch.equal(counts, chosen.sum(0).float())


@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss", "global_aux_loss"])
@pytest.mark.parametrize("padded", [False, True])
def test_losses(pair, kind, padded):
    routers = pair(3, load_balancing_type=[kind, "aux_loss"], moe_aux_loss_coeff=[0.5, 0.25], moe_z_loss_coeff=0.1)
    padding = torch.rand(LENGTH, BATCH) < 0.3 if padded else None
    assert_same(routers, logits_of(), padding)
    theirs = assert_same(routers, logits_of(), padding)  # a global loss has counts of both steps
    assert len(theirs[3]) == (2 if kind == "aux_loss" else 3)


def test_no_losses_in_evaluation_and_without_gradients(pair):
    routers = pair(3, **LOSSES, enable_expert_bias=True, **SIGMOID)
    with torch.no_grad():
        for router in routers:
            router.routing(logits_of())
            assert not router.local_tokens_per_expert.any()
    assert assert_same([router.eval() for router in routers], logits_of())[3] == {}


LEFT = {
    "sinkhorn": (2, {"load_balancing_type": "sinkhorn"}),
    "negative scale": (2, {"topk_scaling_factor": -1.0}),
    "groups by logits": (4, {"num_groups": 4, "group_topk": 2}),
    "sum of four": (4, {**SIGMOID, "num_groups": 4, "group_topk": 1}),
    "sum of none": (2, {**SIGMOID, "num_groups": 4, "group_topk": 3}),
    "more than open experts": (7, {**BIAS, "num_groups": 8, "group_topk": 3}),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_to_megatron(pair, routes_here, name):
    topk, options = LEFT[name]
    assert_same(pair(topk, **options), logits_of())
    assert routes_here == []


def test_replay_is_left_to_megatron(core, pair, routes_here):
    theirs, here = pair(2, moe_enable_routing_replay=True)
    try:
        expert = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(LENGTH * BATCH)])
        for router in (theirs, here):
            router.router_replay.set_target_indices(expert)
            router.router_replay.set_router_replay_action(core.router_replay.RouterReplayAction.REPLAY_FORWARD)
        _, chosen, *_ = assert_same((theirs, here), logits_of())
        assert torch.equal(chosen, torch.zeros_like(chosen).scatter(1, expert, True))
        assert routes_here == []
    finally:
        core.router_replay.RouterReplay.clear_global_router_replay_instances()


def test_a_score_function_of_another_version_is_left_to_megatron(pair, routes_here):
    for router in pair(2):
        router.score_function = "sqrtsoftplus"
        with pytest.raises(ValueError, match="Invalid score_function: sqrtsoftplus"):
            router.routing(logits_of())
    assert routes_here == []


@pytest.mark.parametrize("factor", [0.0, 0.01, 0.5])
def test_slots_that_are_filled_up(pair, factor):
    routers = pair(2)
    for router in routers:
        router.config.moe_expert_capacity_factor = factor
        router.config.moe_pad_expert_input_to_capacity = factor > 0.1
    _, chosen, *_ = assert_same(routers, logits_of())
    assert (chosen.sum(0) <= -(-LENGTH * BATCH * 2 * factor // EXPERTS)).all()


def test_fusion_is_refused(router, ours):
    with pytest.raises(ValueError, match="moe_router_fusion must be off"):
        router(2, kind=ours.TopKRouter, fusion=True)
    made = router(2, kind=ours.TopKRouter)
    made.config.moe_router_fusion = True
    with pytest.raises(ValueError, match="moe_router_fusion must be off"):
        made.routing(logits_of())


def test_another_version_is_refused(ours, monkeypatch):
    monkeypatch.setattr("megatron.core.__version__", "0.18.0")
    with pytest.raises(ImportError, match=r"Megatron-core 0\.16, found 0\.18\.0"):
        importlib.reload(ours)


def test_without_megatron(ours, monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.core.transformer.moe.router", None)
    with pytest.raises(ImportError, match=r"pip install megatron-core==0\.16\.1"):
        importlib.reload(ours)


@pytest.mark.parametrize("factor", [None, 0.5])
@pytest.mark.parametrize(("length", "batch"), [(0, 1), (0, 0), (1, 1)])
def test_few_tokens(pair, length, batch, factor):
    """The losses of no token divide by 0 in Megatron-core."""
    losses = LOSSES if length else {"load_balancing_type": "none"}
    _, chosen, *_ = assert_same(pair(2, moe_expert_capacity_factor=factor, **losses), logits_of(length=length, batch=batch))
    assert chosen.shape == (length * batch, EXPERTS)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
def test_scores_that_are_equal_when_rounded(pair, kind):
    """Where Megatron-core's choice is any of several, ours is one of them: the weights are the same."""
    logits = (torch.randn(200, 1, EXPERTS) * 4).round().to(kind) / 4
    if kind == torch.bfloat16:
        logits += 3  # sigmoids near 1, of which the rounded ones are few
    for topk, options in ((4, {}), (4, {"pre_softmax": True}), (4, SIGMOID)):
        (theirs, chosen, *_), (here, held, *_) = (run(router, logits) for router in pair(topk, **options))
        torch.testing.assert_close(here.sort(-1).values, theirs.sort(-1).values, **NEAR[kind])
        assert held.sum() == chosen.sum()
        assert not torch.equal(held, chosen)


@pytest.fixture
def without_transformer_engine(core, monkeypatch):
    """Gives Megatron-core's gate the name that it asks for and does not define where that package is missing."""
    monkeypatch.setattr(core.moe_utils, "te_general_gemm", None, raising=False)


@pytest.mark.usefixtures("without_transformer_engine")
def test_forward_and_checkpoints(pair):
    """From bfloat16 tokens on, under a jitter; a state_dict of either is the other's."""
    theirs, here = (router.bfloat16() for router in pair(2, dtype="fp32", moe_input_jitter_eps=0.1, **BIAS))
    theirs.expert_bias.data = 0.3 * torch.randn(EXPERTS)
    here.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert torch.equal(here.expert_bias, theirs.expert_bias)  # in float32, as both keep it
    theirs.load_state_dict(here.state_dict())
    results = []
    for router in (theirs, here):
        torch.manual_seed(1)
        x = torch.randn(LENGTH, BATCH, 4, dtype=torch.bfloat16, requires_grad=True)
        probs, chosen = router(x)
        results.append((probs, chosen, *torch.autograd.grad(probs.square().sum(), [x, router.weight])))
    assert results[1][0].dtype == torch.float32
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.usefixtures("without_transformer_engine")
def test_in_a_layer_spec(core, group, ours, router):
    """A layer of Megatron-core with this router has the outputs and gradients of the layer with its own."""
    groups = SimpleNamespace(**dict.fromkeys(["tp", "cp", "tp_cp", "tp_dp_cp", "ep", "expt_tp", "tp_ep", "expt_dp"], group))
    results, state = [], None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        specs = importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
        moe_layer = importlib.import_module("megatron.core.transformer.moe.moe_layer")
        for kind in (core.router.TopKRouter, ours.TopKRouter):
            config = router(2, 4, moe_aux_loss_coeff=0.1).config
            mlp = specs.get_gpt_layer_local_spec(num_experts=4, moe_grouped_gemm=False).submodules.mlp
            mlp.submodules.router = kind
            layer = moe_layer.MoELayer(config, mlp.submodules, layer_number=1, pg_collection=groups)
            state = state or layer.state_dict()
            layer.load_state_dict(state)
            torch.manual_seed(1)
            x = torch.randn(LENGTH, BATCH, 4, requires_grad=True)
            out, _ = layer(x)
            results.append((out, *torch.autograd.grad(out.square().sum(), [x, layer.router.weight])))
    assert type(layer.router) is ours.TopKRouter
    torch.testing.assert_close(results[1], results[0])


def test_compile(pair):
    """One graph, as Megatron-core's router is."""
    theirs, here = pair(2, num_groups=4, group_topk=1, **SIGMOID)
    logits = logits_of()
    expected = run(theirs, logits)[:3]
    for router in (theirs, here):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        router.routing = torch.compile(router.routing, backend="aot_eager", fullgraph=True)
        with torch.compiler.set_stance("default"):
            torch.testing.assert_close(run(router, logits)[:3], expected)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
