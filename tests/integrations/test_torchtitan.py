"""``topn_gating.integrations.torchtitan`` beside the modules of torchtitan that its classes are subclasses of."""

import importlib
import sys
import warnings
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import topn_gating

pytest.importorskip("torchtitan", reason="pip install --no-deps torchtitan==0.3.0, from Python 3.11 on")
pytest.importorskip("triton", reason="torchtitan imports triton, of which there are packages for Linux alone")

EXPERTS, DIM, BATCH, LENGTH, HIDDEN = 16, 8, 2, 12, 16
SIGMOID, SOFTMAX = {"score_func": "sigmoid"}, {"score_func": "softmax"}
DEEPSEEK = {**SIGMOID, "route_norm": True, "route_scale": 2.5, "num_expert_groups": 8, "num_limited_groups": 4}

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")  # torchtitan asks for float32


@pytest.fixture(scope="module")
def titan():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = {"moe", "token_dispatcher", "linear"}
        modules = {name: importlib.import_module(f"torchtitan.models.common.{name}") for name in names}
        override, utils = (importlib.import_module(f"torchtitan.{name}") for name in ("config.override", "distributed.utils"))
    backend = utils.get_spmd_backend()
    utils.set_spmd_backend("partial_dtensor")  # the only one that takes a dispatcher's mesh as it is
    yield SimpleNamespace(**modules, override=override)
    utils.set_spmd_backend(backend)


@pytest.fixture(scope="module")
def ours(titan):
    return importlib.import_module("topn_gating.integrations.torchtitan")


@pytest.fixture(scope="module")
def mesh():
    """A mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("ep",))
    dist.destroy_process_group()


@pytest.fixture
def routes_here(ours, monkeypatch):
    """The options of each call of ``route``."""
    calls = []

    def recorded(*args, **options):
        calls.append(options)
        return topn_gating.route(*args, **options)

    monkeypatch.setattr(ours, "route", recorded)
    return calls


@pytest.fixture
def routers(titan, ours):
    """Makes torchtitan's router and ours, with the same weights."""

    def make(top_k, bias=False, **options):
        gate = titan.linear.Linear.Config(in_features=DIM, out_features=EXPERTS, bias=bias)
        kinds = (titan.moe.TokenChoiceTopKRouter, ours.TokenChoiceTopKRouter)
        theirs, here = (kind.Config(num_experts=EXPERTS, gate=gate, top_k=top_k, **options).build() for kind in kinds)
        assert type(here) is ours.TokenChoiceTopKRouter
        here.load_state_dict(theirs.state_dict())
        return theirs, here

    return make


@pytest.fixture
def dispatchers(titan, ours):
    """Makes torchtitan's dispatcher of a kind and ours."""

    def make(kind, top_k):
        return tuple(getattr(m, kind).Config(num_experts=EXPERTS, top_k=top_k).build() for m in (titan.token_dispatcher, ours))

    return make


def tokens(dtype=torch.float32, batch=BATCH, length=LENGTH):
    return (3 * torch.randn(batch, length, DIM)).to(dtype)


def table(values, expert):
    """``(…, E)``: the values of the chosen experts, whose order torchtitan leaves open, and which they are."""
    empty = torch.zeros(*expert.shape[:-1], EXPERTS, dtype=values.dtype)
    return empty.scatter(-1, expert, values), empty.scatter(-1, expert, 1) > 0


def run(router, x, bias=None):
    """The table of its results, all scores, and the gradients of tokens and parameters."""
    x = x.clone().requires_grad_()
    values, expert, scores = router(x, bias)
    assert expert.dtype == torch.int64
    assert values.shape == expert.shape == (*x.shape[:2], router.top_k)
    dense, chosen = table(values, expert)
    loss = (dense * torch.linspace(-1, 1, dense.numel()).view_as(dense)).sum() + scores.square().sum()
    return dense, chosen, scores, *torch.autograd.grad(loss, [x, *router.parameters()])


def assert_same(routers, x, bias=None):
    theirs, here = (run(router, x, bias) for router in routers)
    assert [t.dtype for t in here] == [t.dtype for t in theirs]
    assert torch.equal(here[1], theirs[1])
    torch.testing.assert_close(here, theirs, rtol=1e-5, atol=1e-6)
    return here


ROUTERS = {
    "sigmoid": (4, SIGMOID),
    "sigmoid of one": (1, SIGMOID),
    "normalised sigmoid": (4, {**SIGMOID, "route_norm": True}),
    "normalised sigmoid of one": (1, {**SIGMOID, "route_norm": True}),
    "softmax": (4, SOFTMAX),
    "normalised softmax": (3, {**SOFTMAX, "route_norm": True, "route_scale": 0.5}),
    "all experts": (EXPERTS, SOFTMAX),
    "gpt-oss": (4, {**SOFTMAX, "route_norm": True, "bias": True}),
    "DeepSeek-V3": (8, DEEPSEEK),
    "groups of gates of a softmax": (3, {**SOFTMAX, "num_expert_groups": 4, "num_limited_groups": 2}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", ROUTERS)
def test_router(routers, routes_here, name, biased, dtype):
    top_k, options = ROUTERS[name]
    pair = [router.to(dtype) for router in routers(top_k, **options)]
    bias = 0.3 * torch.randn(EXPERTS) if biased else None
    _, chosen, *_ = assert_same(pair, tokens(dtype), bias)
    assert len(routes_here) == 1
    if biased and top_k < EXPERTS:
        assert not torch.equal(chosen, run(pair[1], tokens(dtype))[1])


def test_the_best_experts_come_first(routers):
    values, expert, scores = routers(4, **SIGMOID)[1](tokens())
    assert torch.equal(values, values.sort(-1, descending=True).values)
    torch.testing.assert_close(scores.gather(-1, expert), values)


@pytest.mark.parametrize(("batch", "length"), [(0, 3), (2, 0), (1, 1)])
@pytest.mark.parametrize("name", ["normalised sigmoid", "DeepSeek-V3"])
def test_few_tokens(routers, name, batch, length):
    top_k, options = ROUTERS[name]
    assert_same(routers(top_k, **options), tokens(batch=batch, length=length), torch.randn(EXPERTS))


LEFT = {
    "forced balance": {"_debug_force_load_balance": True},
    "a negative scale": {"route_scale": -1.0},
    "fewer open experts than are chosen": {"num_expert_groups": 8, "num_limited_groups": 1},
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_to_torchtitan(routers, routes_here, name):
    assert_same(routers(4, **SIGMOID, **LEFT[name]), tokens())
    assert routes_here == []


@pytest.mark.parametrize("biased", [False, True])
def test_half_types_are_left_to_torchtitan(routers, routes_here, biased):
    pair = [router.bfloat16() for router in routers(4, **DEEPSEEK)]
    bias = 0.3 * torch.randn(EXPERTS) if biased else None
    values, *_ = assert_same(pair, tokens(torch.bfloat16), bias)
    assert values.dtype == torch.bfloat16
    assert routes_here == []


WRONG = {
    "no limit": ({"num_expert_groups": 4}, ValueError, "num_limited_groups must be set"),
    "unlike groups": ({"num_expert_groups": 3, "num_limited_groups": 2}, ValueError, "must be divisible"),
    "small groups": ({"num_expert_groups": 16, "num_limited_groups": 8}, ValueError, "must be >= 2"),
    "a score": ({"score_func": "relu"}, NotImplementedError, "Unknown score function relu"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_those_of_torchtitan(routers, name):
    options, kind, message = WRONG[name]
    for router in routers(4, **options):
        with pytest.raises(kind, match=message):
            router(tokens())


@pytest.mark.parametrize("placement", [Replicate(), Shard(0), Shard(1), Shard(2)], ids=str)
def test_dtensors(routers, routes_here, mesh, placement):
    """Each rank routes its tokens. Logits that are sharded over experts are torchtitan's, which has no groups of these."""
    theirs, here = routers(4, **DEEPSEEK if placement != Shard(2) else SIGMOID)
    x, bias = tokens(), 0.3 * torch.randn(EXPERTS)
    expected = run(theirs, x, bias)
    for name, parameter in list(here.gate.named_parameters()):
        split = Shard(0) if placement == Shard(2) else Replicate()  # the gate's rows are the logits' columns
        setattr(here.gate, name, torch.nn.Parameter(distribute_tensor(parameter.detach(), mesh, [split])))
    leaf = distribute_tensor(x, mesh, [Replicate() if placement == Shard(2) else placement]).requires_grad_()
    results = here(leaf, distribute_tensor(bias, mesh, [Replicate()]))
    assert all(isinstance(t, DTensor) for t in results)
    assert len(routes_here) == (placement != Shard(2))
    if placement != Shard(2):
        assert all(t.placements == (placement,) for t in results)
    values, expert, scores = (t.full_tensor() for t in results)
    dense, chosen = table(values, expert)
    loss = (dense * torch.linspace(-1, 1, dense.numel()).view_as(dense)).sum() + scores.square().sum()
    grads = torch.autograd.grad(loss, [leaf, *here.parameters()])
    torch.testing.assert_close((dense, chosen, scores, *(g.full_tensor() for g in grads)), expected, rtol=1e-5, atol=1e-6)


KINDS = ["LocalTokenDispatcher", "AllToAllTokenDispatcher"]


def choices(top_k, count=BATCH * LENGTH, dtype=torch.float32):
    """Tokens, scores, experts and their counts, as a dispatcher takes them."""
    expert = torch.rand(count, EXPERTS).argsort(-1)[:, :top_k].contiguous()
    return torch.randn(count, DIM).to(dtype), torch.rand(count, top_k), expert, expert.flatten().bincount(minlength=EXPERTS)


def send(dispatcher, x, scores, expert, counts, autocast=False):
    """The rows and counts, the tokens after experts that differ, and the gradients of tokens and scores."""
    x, scores = x.clone().requires_grad_(), scores.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        rows, counted, metadata = dispatcher.dispatch(x, scores, expert, counts)
        gain = torch.linspace(0.5, 1.5, len(rows)).to(rows.dtype).unsqueeze(1)
        out = dispatcher.combine(rows * gain, metadata, x)
    return rows, counted, out, *torch.autograd.grad(out.float().square().sum(), [x, scores])


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_dispatcher(dispatchers, routes_here, mesh, kind, top_k, dtype, autocast, parallel):
    """The rows are the same to the bit, with expert parallelism too, where torchtitan exchanges and sums up."""
    pair, given = dispatchers(kind, top_k), choices(top_k, dtype=dtype)
    for dispatcher in pair:
        dispatcher.wire_meshes(ep_mesh=mesh if parallel else None)
    theirs, here = (send(dispatcher, *given, autocast) for dispatcher in pair)
    assert len(routes_here) == 1
    assert [t.dtype for t in here] == [t.dtype for t in theirs]
    assert torch.equal(here[0], theirs[0])
    assert torch.equal(here[1], theirs[1])
    near = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-5, "atol": 2**-6}
    torch.testing.assert_close(here[2:], theirs[2:], **near)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 1])
def test_dispatcher_of_few_tokens(dispatchers, kind, count):
    given = choices(2, count)
    theirs, here = (send(dispatcher, *given) for dispatcher in dispatchers(kind, 2))
    torch.testing.assert_close(here, theirs)


def test_a_sum_is_rounded_once(dispatchers):
    """A token's sum over its experts in bfloat16 is nearer to the exact one than torchtitan's, which rounds each summand."""
    x, scores, expert, counts = choices(8, 200, torch.bfloat16)
    exact, errors = x.double() * scores.double().sum(1, keepdim=True), []
    for dispatcher in dispatchers("LocalTokenDispatcher", 8):
        rows, _, metadata = dispatcher.dispatch(x, scores, expert, counts)
        errors.append((dispatcher.combine(rows, metadata, x) - exact).square().mean())
    assert errors[1] < errors[0]


def layer(titan, router, dispatcher, **options):
    """The configuration of a layer of torchtitan."""
    gate = titan.linear.Linear.Config(in_features=DIM, out_features=EXPERTS)
    experts = titan.moe.GroupedExperts.Config(dim=DIM, hidden_dim=HIDDEN, num_experts=EXPERTS)
    return titan.moe.MoE.Config(
        num_experts=EXPERTS,
        router=router.Config(num_experts=EXPERTS, gate=gate, top_k=4, **options),
        routed_experts=titan.moe.RoutedExperts.Config(
            inner_experts=experts, token_dispatcher=dispatcher.Config(num_experts=EXPERTS, top_k=4)
        ),
    )


@pytest.fixture
def layers(titan, ours):
    """A layer of torchtitan, and one of the same configuration after the overrides, with the same parameters."""
    kinds = titan.moe.TokenChoiceTopKRouter, titan.token_dispatcher.AllToAllTokenDispatcher
    configs = [layer(titan, *kinds, **DEEPSEEK) for _ in range(2)]
    targets = [f"{ours.__name__}.{name}" for name in ("router", "token_dispatcher")]
    lines = titan.override.apply_overrides(titan.override.OverrideConfig(imports=targets), configs[1])
    assert len(lines) == 2
    theirs, here = (config.build() for config in configs)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.expert_bias_E.copy_(0.1 * torch.randn(EXPERTS))
    here.load_state_dict(theirs.state_dict())
    return theirs, here


def test_layer(layers, ours):
    """Outputs, gradients and the tokens that each expert is seen to have; a checkpoint of either is the other's."""
    theirs, here = layers
    assert type(here.router) is ours.TokenChoiceTopKRouter
    assert type(here.routed_experts.token_dispatcher) is ours.AllToAllTokenDispatcher
    theirs.load_state_dict(here.state_dict())
    results = []
    x = tokens()
    for moe in layers:
        leaf = x.clone().requires_grad_()
        out = moe(leaf)
        grads = torch.autograd.grad(out.square().sum(), [leaf, *moe.parameters()])
        results.append((out, moe.tokens_per_expert_E.clone(), *grads))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)  # products in bfloat16, whatever the type
    assert torch.equal(results[1][1], results[0][1])


def test_overrides_leave_other_classes_alone(titan, ours):
    class Other(titan.moe.TokenChoiceTopKRouter):
        @dataclass(kw_only=True, slots=True)
        class Config(titan.moe.TokenChoiceTopKRouter.Config):
            pass

    kinds = titan.token_dispatcher
    config = layer(titan, Other, kinds.LocalTokenDispatcher)
    padded = kinds.TorchAOTokenDispatcher.Config(num_experts=EXPERTS, top_k=4, pad_multiple=16)
    config.routed_experts.token_dispatcher = padded
    targets = [f"{ours.__name__}.{name}" for name in ("router", "token_dispatcher")]
    assert titan.override.apply_overrides(titan.override.OverrideConfig(imports=targets), config) == []


def test_without_torchtitan(ours, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchtitan.config.override", None)
    with pytest.raises(ImportError, match=r"needs torchtitan .* pip install torchtitan==0\.3\.0"):
        importlib.reload(ours)


@pytest.mark.parametrize("part", ["router", "routed_experts"])
def test_compile(layers, part):
    """One graph each, as torchtitan's are."""
    x, bias, (_, scores, expert, counts) = tokens(), torch.randn(EXPERTS), choices(4)
    given = (x, bias) if part == "router" else (x, *(t.unflatten(0, (BATCH, LENGTH)) for t in (scores, expert)), counts)
    for layer in layers:
        module = getattr(layer, part)
        expected = module(*given)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        actual = torch.compile(module, backend="aot_eager", fullgraph=True)(*given)
        torch.testing.assert_close(actual, expected)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
