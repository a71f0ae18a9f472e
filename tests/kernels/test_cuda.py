"""Tests that need a GPU: CUDA graphs, streams, devices, no synchronisation, reproducible bits, equality with other backends.

The operators' values and gradients on a GPU are tested together with the other backends, in tests/ops.
"""

import pytest
import torch
from cases import Backend
from compare import assert_near, assert_same_bits

import topn_gating
from topn_gating import TopNGating, ops

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or ops.build_info()["cuda"] is None, reason="needs a GPU, and a build with CUDA kernels"
)

CUDA = Backend("topn_gating", "cuda")
GROUPS, TOKENS, DIM, EXPERTS, TOP_N, CAPACITY = 2, 700, 40, 24, 3, 90
EPS = 1e-9
OPTIONS = ops.GateOptions(EPS)
GIVEN = pytest.mark.parametrize("policy", ["random", "threshold", "all"])
HALF_OR_NOT = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def inputs(seed=0, dtype=torch.float32, device="cuda"):
    """Returns logits, draws, thresholds, token rows and the gradient of the result, the same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    tensors = (
        normal(GROUPS, TOKENS, EXPERTS),
        torch.rand(GROUPS, TOKENS, TOP_N, generator=generator),
        torch.rand(TOP_N, generator=generator),
        normal(GROUPS, TOKENS, DIM),
        normal(GROUPS, TOKENS, DIM),
    )
    return [t.to(device) for t in tensors]


def all_operators(logits, draws, threshold, x, grad_out, policy="random", run=None):
    """Runs the ten operators in the order of a training step, each by ``run(name, *args)``; returns all their results."""
    run = run or (lambda name, *args: getattr(torch.ops.topn_gating, name)(*args))
    gated = run("gate", logits, None, None, None, None, TOP_N, *OPTIONS, True, True)
    weight, expert, _importance, counts, balance_loss, z_loss, _statistics = gated
    sizes = EXPERTS, CAPACITY, 1, ops.POLICIES.index(policy), EPS
    assigned = run("assign", weight, expert, draws, threshold, None, None, *sizes)
    by_weight = run("assign", weight, expert, draws, threshold, None, weight, *sizes)
    kept, slot, source, *_ = assigned
    y = run("dispatch", x, kept, expert, slot, source, None, True)
    out = run("combine", y, kept, expert, slot, source, None)
    dense = run("dense", kept, expert, slot, source, x.dtype, True)
    grad_y, grad_combine = run("combine_backward", grad_out, y, kept, expert, slot, source, None)
    grad_x, grad_dispatch = run("dispatch_backward", grad_y, x, expert, slot, source, None)
    grad_dense = run("dense_backward", *dense, expert, slot, source)
    grad_weight = run("assign_backward", grad_combine + grad_dispatch + grad_dense, slot)
    losses = torch.ones_like(balance_loss), torch.ones_like(z_loss)
    grad_logits = run("gate_backward", grad_weight, None, *losses, logits, None, None, expert, counts, *OPTIONS)
    return [
        *(*gated, *assigned, *by_weight, y, out, *dense),
        *(grad_y, grad_combine, grad_x, grad_dispatch, grad_dense, grad_weight, grad_logits),
    ]


def module(dtype=torch.float32, **options):
    return TopNGating(DIM, EXPERTS, top_n=TOP_N, device="cuda", dtype=dtype, **options)


def compact(gate, x):
    """Returns the outputs of route, dispatch, a simple expert and combine, and the routing."""
    routing = gate.route(x)
    out = topn_gating.combine(torch.tanh(topn_gating.dispatch(x, routing)), routing)
    return [out, routing.balance_loss, routing.router_z_loss], routing


def step(function, gate, x, grads):
    """Returns the differentiable outputs and the gradients of x and of the gate's weight."""
    outputs = function(gate, x)
    return *outputs, *torch.autograd.grad(outputs, (x, gate.to_gates.weight), grads)


@pytest.mark.parametrize("policy", ["threshold", "all"])
def test_one_compiled_graph_equals_eager(policy):
    torch._dynamo.reset()
    gate = module(policy_train=policy)
    x = torch.randn(GROUPS, TOKENS, DIM, device="cuda", requires_grad=True)
    (outputs, routing), compiled = compact(gate, x), torch.compile(compact, fullgraph=True)
    actual, actual_routing = compiled(gate, x)
    assert_same_bits(actual_routing[2:5], routing[2:5])
    torch.testing.assert_close(actual, outputs, rtol=1e-5, atol=1e-6)
    grads, leaves = [torch.randn_like(t) for t in outputs], (x, gate.to_gates.weight)
    expected = torch.autograd.grad(outputs, leaves, grads)
    torch.testing.assert_close(torch.autograd.grad(actual, leaves, grads), expected, rtol=1e-4, atol=1e-4)


@HALF_OR_NOT
@GIVEN
def test_replayed_graph_equals_eager(policy, dtype):
    static = inputs(0, dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # loads the kernels, which is not allowed during a capture
        all_operators(*static, policy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = all_operators(*static, policy)
    for seed in (1, 2, 1):
        for t, new in zip(static, inputs(seed, dtype), strict=True):
            t.copy_(new)
        graph.replay()
        assert_same_bits(outputs, all_operators(*inputs(seed, dtype), policy))


@pytest.fixture
def no_waiting():
    """Makes every synchronisation with the device after ``no_waiting()`` raise."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("policy", ops.POLICIES)
@pytest.mark.parametrize("function", [lambda gate, x: compact(gate, x)[0], lambda gate, x: gate(x)], ids=["compact", "dense"])
def test_module_waits_for_nothing(function, policy, no_waiting):
    gate = module(policy_train=policy, balance_on="kept")
    x = torch.randn(GROUPS, TOKENS, DIM, device="cuda", requires_grad=True)
    grads = [torch.randn_like(t) for t in function(gate, x)]
    step(function, gate, x, grads)  # initialises cuBLAS and the allocator
    no_waiting()
    step(function, gate, x, grads)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"policy": "threshold", "threshold": (0.1, 0.3)},
        {"noise_gates": True, "differentiable_topk": True},
        {"differentiable_topk": True, "differentiable_topk_fused": False},
    ],
    ids=str,
)
def test_route_waits_for_nothing(options, no_waiting):
    logits = torch.randn(GROUPS, TOKENS, EXPERTS, device="cuda", requires_grad=True)
    mask = torch.rand(GROUPS, TOKENS, device="cuda") < 0.7
    no_waiting()
    routing = topn_gating.route(logits, TOP_N, token_mask=mask, **options)
    torch.autograd.grad([routing.weight.sum(), routing.balance_loss, routing.router_z_loss], logits, [None] * 3)


def test_work_is_put_on_the_current_stream():
    expected, static, new = all_operators(*inputs(1)), inputs(0), inputs(1)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # kernels on any other stream would read the old inputs
        for t, value in zip(static, new, strict=True):
            t.copy_(value)
        outputs = all_operators(*static)
    stream.synchronize()
    assert_same_bits(outputs, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_gpu_than_the_current_one():
    expected = all_operators(*inputs())
    with torch.cuda.device(0):
        outputs = all_operators(*inputs(device="cuda:1"))
        assert torch.cuda.current_device() == 0
    assert {str(t.device) for t in outputs} == {"cuda:1"}
    assert_same_bits([t.cpu() for t in outputs], [t.cpu() for t in expected])


@HALF_OR_NOT
def test_a_thousand_runs_give_the_same_bits(dtype):
    given = inputs(0, dtype)
    expected = [bits(t) for t in all_operators(*given)]
    differs = torch.zeros((), dtype=torch.bool, device="cuda")
    for _ in range(1000):
        for t, other in zip(all_operators(*given), expected, strict=True):
            differs |= (bits(t) != other).any()
    assert not differs


def bits(t):
    return t.view({2: torch.int16, 4: torch.int32}[t.itemsize])


@HALF_OR_NOT
@GIVEN
def test_other_backends_give_the_same(backend, policy, dtype):
    """Compares each operator on equal inputs: integers must be equal, floats within a few roundings (sums differ in order)."""

    def run(name, *args):
        actual, expected = CUDA(name, *args), backend(name, *args)
        pairs = [(actual, expected)] if isinstance(expected, torch.Tensor) else zip(actual, expected, strict=True)
        for ours, theirs in pairs:
            if theirs.dtype == torch.int32:
                assert_same_bits(ours, theirs)
            else:
                assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
                assert_near(ours, theirs.double())
        return expected

    all_operators(*inputs(0, dtype, "cpu"), policy, run=run)


def test_dense_outputs_beyond_31_bits():
    tokens, experts, capacity = 2**15 + 3, 64, 1024
    size = tokens * experts * capacity
    needed = 3 * 2 * size
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    expert = torch.rand(tokens, experts, device="cuda").topk(2).indices.int()
    slot = torch.randint(-2, capacity, (tokens, 2), device="cuda", dtype=torch.int32)
    weight = torch.rand(tokens, 2, device="cuda")
    source = torch.full((experts, capacity), -1, device="cuda", dtype=torch.int32)
    pair = torch.arange(2 * tokens, device="cuda", dtype=torch.int32).view(tokens, 2)
    wanted = slot >= 0
    source[expert[wanted].long(), slot[wanted].long()] = pair[wanted]
    held = wanted & (source[expert.long(), slot.clamp(min=0).long()] == pair)
    dispatch, combine = torch.ops.topn_gating.dense(weight, expert, slot, source, torch.bfloat16, True)
    token = torch.arange(tokens, device="cuda").unsqueeze(-1)
    place = ((token * experts + expert) * capacity + slot)[held]
    assert size > 2**31
    assert place.max() > 2**31
    assert (dispatch.view(-1)[place] == 1).all()
    assert_same_bits(combine.view(-1)[place], weight[held].bfloat16())
    for t in (dispatch, combine):  # all other elements are 0
        assert sum(part.count_nonzero() for part in t.split(4096)) == (t.view(-1)[place] != 0).sum()
    grad = torch.ops.topn_gating.dense_backward(dispatch, combine, expert, slot, source)
    assert_same_bits(grad, torch.where(held, weight.bfloat16().float() + 1, 0))


@pytest.mark.parametrize("on_cpu", [0, 1, 2])
def test_operator_with_tensors_of_two_devices(on_cpu):
    logits, draws, *_ = inputs()
    tensors = [logits, torch.rand_like(logits), draws[..., 0] < 0.5]
    tensors[on_cpu] = tensors[on_cpu].cpu()
    with pytest.raises(RuntimeError, match="device"):
        torch.ops.topn_gating.gate(*tensors, None, None, TOP_N, *OPTIONS, True, True)


def test_functions_with_tensors_of_two_devices():
    logits, draws, _, x, _ = inputs()
    routing = topn_gating.route(logits, TOP_N, policy="all")
    for call in (
        lambda: module()(x.cpu()),
        lambda: topn_gating.route(logits, TOP_N, draws=draws.cpu()),
        lambda: topn_gating.dispatch(x.cpu(), routing),
        lambda: topn_gating.combine(topn_gating.dispatch(x, routing).cpu(), routing),
    ):
        with pytest.raises(ValueError, match=r"cuda:0.*cpu|cpu.*cuda:0"):
            call()
