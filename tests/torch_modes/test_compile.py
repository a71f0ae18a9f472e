"""torch.compile, torch.export and torch.func: one graph, the numbers of eager, no recompilation for another length."""

import functools
import re

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch._inductor.utils import run_and_get_code
from torch.export import Dim, export

import topn_gating
from topn_gating import GLUExperts, MoE, TopNGating
from topn_gating.registry import OPERATORS

DIM, EXPERTS, TOP_N = 8, 4, 3


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(tokens=20, top_n=TOP_N):
    return {
        "x": torch.randn(2, tokens, DIM, requires_grad=True),
        "weight": torch.randn(EXPERTS, DIM, requires_grad=True),
        "noise": torch.rand(2, tokens, EXPERTS),
        "draws": torch.rand(2, tokens, top_n),
        "token_mask": torch.rand(2, tokens) < 0.8,
    }


def full_path(x, weight, noise, draws, token_mask, **options):
    """Runs route, dispatch, an expert and combine, with every input that they have."""
    routing = topn_gating.route(
        F.linear(x, weight), TOP_N, noise=noise, noise_mult=0.3, draws=draws, token_mask=token_mask, **options
    )
    out = topn_gating.combine(torch.tanh(topn_gating.dispatch(x, routing)), routing)
    return out, routing.balance_loss, routing.router_z_loss, routing.slot, routing.source, routing.drop_fraction


def with_gradients(function, leaves, *args, **kwargs):
    """Outputs, and the gradients of ``leaves`` for random gradients into the differentiable ones."""
    outputs = function(*args, **kwargs)
    torch.manual_seed(7)
    roots = [t for t in outputs if t.requires_grad]
    grads = torch.autograd.grad(roots, leaves, [torch.randn_like(t) for t in roots], materialize_grads=True)
    return [t.detach() for t in outputs], grads


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def gate(**options):
    return TopNGating(DIM, EXPERTS, top_n=TOP_N, policy_train="threshold", **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"policy": "all", "straight_through": False},
        {"balance_on": "kept", "threshold": (0.1, 0.4)},
        {"differentiable_topk": True},
        {"differentiable_topk": True, "differentiable_topk_fused": False},
        {"capacity": 3, "losses": False},
        {"dropless": True},
        {"dropless": True, "align": 8, "policy": "random", "balance_on": "kept"},
    ],
    ids=str,
)
def test_full_path(options):
    tensors = inputs()
    leaves = tensors["x"], tensors["weight"]
    compiled = torch.compile(full_path, fullgraph=True, backend="aot_eager")
    actual = with_gradients(compiled, leaves, **tensors, **options)
    assert_same(actual, with_gradients(full_path, leaves, **tensors, **options))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"straight_through_dispatch_tensor": False}, {"router_dtype": torch.float64}], ids=str)
def test_dense_forward(options, training):
    module, x = gate(**options).train(training), inputs()["x"]
    torch.manual_seed(3)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    leaves = x, module.to_gates.weight
    module.policy_eval = "threshold"
    assert_same(with_gradients(compiled, leaves, x), with_gradients(module, leaves, x))


@pytest.mark.parametrize("dynamic", [False, True])
def test_random_policy_draws_as_eager_does(dynamic):
    module, x = TopNGating(DIM, EXPERTS, top_n=TOP_N), inputs()["x"]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    torch.manual_seed(3)
    expected = module(x, True, 0.5)
    torch.manual_seed(3)
    assert_same(compiled(x, True, 0.5), expected)


def test_routing_leaves_the_graph_as_it_is():
    module, x = gate(), inputs()["x"]
    compiled = torch.compile(module.route, fullgraph=True, backend="aot_eager")
    routing, expected = compiled(x), module.route(x)
    assert isinstance(routing, topn_gating.Routing)
    assert routing.capacity == expected.capacity
    assert_same(routing[:7], expected[:7])
    assert_same(routing.dense(), expected.dense())


LAYOUTS = pytest.mark.parametrize("dropless", [False, True], ids=["capacity", "dropless"])


@LAYOUTS
def test_moe_by_inductor(dropless):
    moe, x = MoE(DIM, EXPERTS, gating_top_n=TOP_N, policy_train="threshold", dropless=dropless), inputs()["x"]
    leaves = x, *moe.parameters()
    compiled = torch.compile(moe, fullgraph=True)
    assert_same(with_gradients(compiled, leaves, x), with_gradients(moe, leaves, x))


def test_inductor_calls_the_kernels_without_a_look_at_gradients():
    tensors = inputs()
    leaves = tensors["x"], tensors["weight"]
    compiled = torch.compile(full_path, fullgraph=True)
    with torch._inductor.config.patch(force_disable_caches=True):
        actual, code = run_and_get_code(with_gradients, compiled, leaves, **tensors)
    called = set(re.findall(r"= torch\.ops\.topn_gating\.(\w+)", "".join(code)))
    names = "gate", "assign", "dispatch", "combine"
    assert called == {f"{name}{way}_kernel" for name in names for way in ("", "_backward")}
    assert_same(actual, with_gradients(full_path, leaves, **tensors))


@pytest.mark.parametrize("key", ["CPU", "CUDA", "Meta"])
def test_what_inductor_calls_has_a_kernel_wherever_the_operator_has_one(key):
    for name in OPERATORS:
        for operator in (f"topn_gating::{name}", f"topn_gating::{name}_backward"):
            found = [torch._C._dispatch_has_kernel_for_dispatch_key(o, key) for o in (operator, f"{operator}_kernel")]
            assert found[0] == found[1], operator


@LAYOUTS
@pytest.mark.parametrize("autocast", [True, False])
def test_moe(autocast, dropless):
    options = {"policy_train": "all", "router_dtype": torch.float32, "dropless": dropless}
    shared, x = torch.nn.Linear(DIM, DIM), inputs()["x"]
    moe = MoE(DIM, EXPERTS, gating_top_n=TOP_N, experts=GLUExperts(DIM, EXPERTS, 5), shared_experts=shared, **options)
    leaves = x, *moe.parameters()
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        actual, expected = with_gradients(compiled, leaves, x), with_gradients(moe, leaves, x)
    torch.testing.assert_close(actual, expected, rtol=2e-2 if autocast else 1e-5, atol=2e-2 if autocast else 1e-6)


LENGTHS = (40, 63, 120)


@pytest.mark.parametrize(
    ("which", "dynamic"),
    [
        *(("full path", True), ("full path", None), ("gate", None), ("dropless", True), ("dropless", None)),
        *(("moe", True), ("dropless moe", True)),
    ],
    ids=str,
)
def test_no_recompilation_for_another_length(which, dynamic):
    moe = MoE(DIM, EXPERTS, policy_train="all", dropless=which == "dropless moe")
    module = {"full path": None, "gate": gate(), "dropless": Dropless()}.get(which, moe)
    compiled = torch.compile(module or full_path, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in LENGTHS:
        tensors = inputs(tokens)
        leaves = tensors["x"], *(module.parameters() if module else (tensors["weight"],))
        if module:
            tensors = {"x": tensors["x"]}
        expected = with_gradients(module or full_path, leaves, **tensors)
        for name, t in tensors.items():
            if name != "weight" and dynamic is None:
                torch._dynamo.mark_dynamic(t, 1)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert_same(with_gradients(compiled, leaves, **tensors), expected)


class Dropless(torch.nn.Module):
    """The compact path in the dropless layout, from logits and then from its own choices, and from a capacity to dropless."""

    def __init__(self, align=8):
        super().__init__()
        self.align, self.gate = align, gate(dropless=True, align=align)

    def forward(self, x, token_mask=None):
        routing = self.gate.route(x, token_mask=token_mask)
        options = {"expert": routing.expert, "weight": routing.weight, "num_gates": EXPERTS}
        again = topn_gating.route(**options, dropless=True, align=self.align, token_mask=token_mask)
        other = topn_gating.route(**options, token_mask=token_mask).as_dropless(self.align)
        outputs = [r.combine(r.dispatch(x).tanh()) for r in (routing, again, other)]
        return *outputs, routing.balance_loss, *routing[2:5], routing.offsets, again.offsets, other.offsets, other.slot


@pytest.mark.parametrize("align", [1, 8])
def test_dropless(align):
    module, tensors = Dropless(align), inputs()
    x, mask = tensors["x"], tensors["token_mask"]
    leaves = x, module.gate.to_gates.weight
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_same(with_gradients(compiled, leaves, x, mask), with_gradients(module, leaves, x, mask))


@pytest.mark.parametrize("align", [1, 8])
def test_dropless_by_inductor(align):
    module, x = Dropless(align), inputs()["x"]
    leaves = x, module.gate.to_gates.weight
    assert_same(with_gradients(torch.compile(module, fullgraph=True), leaves, x), with_gradients(module, leaves, x))


@pytest.mark.parametrize("align", [1, 8])
def test_export_of_dropless_for_any_number_of_tokens(align):
    module, shapes = Dropless(align), {"x": {1: Dim("tokens", min=8, max=4096)}}
    exported = export(module, (inputs()["x"].detach(),), dynamic_shapes=shapes).module()
    for length in LENGTHS:
        x = inputs(length)["x"].detach()
        assert_same(exported(x), module(x))


@pytest.mark.parametrize("align", [1, 8])
def test_dropless_by_vmap(align):
    module, xs = Dropless(align), torch.randn(3, 2, 20, DIM)
    assert_same(list(torch.vmap(module)(xs)), [torch.stack(t) for t in zip(*(module(x) for x in xs), strict=True)])

    def loss(x):
        return sum(t.square().sum() for t in module(x)[:4])

    expected = [torch.autograd.grad(loss(x), x)[0] for x in (x.clone().requires_grad_() for x in xs)]
    assert_same(torch.vmap(torch.func.grad(loss))(xs), torch.stack(expected))


@pytest.mark.parametrize("align", [1, 8])
def test_dropless_under_checkpointing(align):
    module, x = Dropless(align), inputs()["x"]
    leaves = x, module.gate.to_gates.weight

    def checkpointed(x):
        return torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)

    assert_same(with_gradients(checkpointed, leaves, x), with_gradients(module, leaves, x))


@pytest.mark.parametrize("align", [1, 8])
def test_dropless_without_data(align):
    expected, meta = Dropless(align)(inputs()["x"]), Dropless(align).to("meta")(inputs()["x"].to("meta"))
    assert [(t.shape, t.dtype) for t in meta] == [(t.shape, t.dtype) for t in expected]
    assert all(t.is_meta for t in meta)


class FullPath(torch.nn.Module):
    """The compact path as a module, for export."""

    def __init__(self):
        super().__init__()
        self.gate = gate()

    def forward(self, x, token_mask):
        routing = self.gate.route(x, token_mask=token_mask)
        return topn_gating.combine(topn_gating.dispatch(x, routing), routing), routing.balance_loss, routing.slot


@pytest.mark.parametrize("training", [True, False])
def test_export(training):
    module, tensors = FullPath().train(training), inputs()
    module.gate.policy_eval = "threshold"
    args = tensors["x"].detach(), tensors["token_mask"]
    exported = export(module, args)
    assert any("topn_gating" in str(node.target) for node in exported.graph.nodes)
    assert_same(exported.module()(*args), module(*args))


def test_export_for_any_number_of_tokens():
    module, tokens = FullPath(), Dim("tokens", min=8, max=4096)
    tensors = inputs()
    shapes = {"x": {1: tokens}, "token_mask": {1: tokens}}
    exported = export(module, (tensors["x"].detach(), tensors["token_mask"]), dynamic_shapes=shapes).module()
    for length in LENGTHS:
        tensors = inputs(length)
        args = tensors["x"].detach(), tensors["token_mask"]
        assert_same(exported(*args), module(*args))


def test_export_of_the_dense_form():
    module, x = gate(), inputs()["x"].detach()
    exported = export(module, (x,), dynamic_shapes={"x": {1: Dim("tokens", min=8, max=4096)}}).module()
    other = torch.randn(2, 33, DIM)
    assert_same(exported(other), module(other))


@LAYOUTS
@pytest.mark.parametrize("lead", [(), (1,), (2,), (2, 3)], ids=str)
def test_export_of_moe_for_any_number_of_tokens(lead, dropless):
    moe = MoE(DIM, EXPERTS, policy_train="all", dropless=dropless)
    shapes = {"x": {len(lead): Dim("tokens", min=8, max=4096)}}
    exported = export(moe, (torch.randn(*lead, 20, DIM),), dynamic_shapes=shapes).module()
    for length in (9, 63):
        x = torch.randn(*lead, length, DIM)
        assert_same(exported(x), moe(x))


@pytest.mark.parametrize("router_dtype", [None, torch.float32])
@pytest.mark.parametrize("make", [TopNGating, MoE, functools.partial(MoE, dropless=True)], ids=["gate", "moe", "dropless moe"])
def test_meta_tensors_have_the_shapes_and_types_of_others(make, router_dtype):
    x = torch.randn(2, 20, DIM).bfloat16()
    expected, meta = (
        make(DIM, EXPERTS, router_dtype=router_dtype, device=device, dtype=x.dtype)(x.to(device)) for device in ("cpu", "meta")
    )
    for t, m in zip(expected, meta, strict=True):
        assert (m.shape, m.dtype, m.device.type) == (t.shape, t.dtype, "meta")


def loss(x, weight, noise, draws, token_mask):
    out, balance_loss, z_loss, *_ = full_path(x, weight, noise, draws, token_mask)
    return out.square().sum() + balance_loss + z_loss


def test_functional_gradient():
    tensors = inputs()
    leaves = tensors["x"], tensors["weight"]
    expected = torch.autograd.grad(loss(**tensors), leaves)
    assert_same(torch.func.grad(loss, argnums=(0, 1))(*tensors.values()), expected)


@pytest.mark.parametrize("function", [full_path, torch.func.grad(loss, argnums=(0, 1))], ids=["values", "gradients"])
def test_vmap(function):
    samples = [tuple(inputs().values()) for _ in range(3)]
    stacked = [torch.stack(t).detach() for t in zip(*samples, strict=True)]
    expected = [torch.stack(t) for t in zip(*(function(*sample) for sample in samples), strict=True)]
    assert_same(list(torch.vmap(function)(*stacked)), expected)


def test_vmap_over_no_sample():
    sample = tuple(t.detach() for t in inputs().values())
    expected = full_path(*sample)
    for function in (full_path, torch.func.grad(loss, argnums=(0, 1))):
        outputs = torch.vmap(function)(*(t.new_empty((0, *t.shape)) for t in sample))
        assert all(t.shape[0] == 0 for t in outputs)
        if function is full_path:
            assert [(t.shape[1:], t.dtype) for t in outputs] == [(t.shape, t.dtype) for t in expected]


def test_vmap_can_print_a_routing():
    shown = []
    torch.vmap(lambda z: shown.append(repr(topn_gating.route(z, policy="all"))) or z)(torch.randn(3, 6, 4))
    assert shown[0].startswith("Routing(groups=(), tokens=6, experts=4, top_n=2, capacity=4, dtype=")


def test_ensemble():
    """The recipe of torch.func: several gates of one input by vmap over their stacked parameters."""
    gates, x = [gate() for _ in range(3)], torch.randn(2, 20, DIM)
    params, buffers = torch.func.stack_module_state(gates)
    outputs = torch.vmap(lambda p, b: torch.func.functional_call(gates[0], (p, b), (x,)))(params, buffers)
    assert_same(list(outputs), [torch.stack(t) for t in zip(*(g(x) for g in gates), strict=True)])
