"""Torch's modes, and what a call must leave alone: determinism, threads, inference_mode, no_grad, the caller's tensors."""

import functools

import pytest
import torch

import topn_gating
from topn_gating import MoE, TopNGating

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def setting(dtype=torch.float32, **options):
    """A gate whose experts overflow, and a long enough input that threads share it."""
    torch.manual_seed(0)
    gate = TopNGating(16, 8, top_n=3, capacity_factor_train=0.8, dtype=dtype, **options)
    return gate, torch.randn(3, 1500, 16).to(dtype).requires_grad_()


def everything(gate, x, *, seed=1, mask=None, leaves=None):
    """All that the package computes from x: dense form, compact path, losses, and the gradients of ``leaves``."""
    torch.manual_seed(seed)
    routing = gate.route(x, True, 0.5, token_mask=mask)
    dispatch, combine = routing.dense(x.dtype)
    expert_inputs = topn_gating.dispatch(x, routing)
    out = topn_gating.combine(2 * expert_inputs, routing)
    outputs = [dispatch, combine, out, routing.balance_loss, routing.router_z_loss]
    grads = [torch.randn(t.shape).to(t.dtype) for t in outputs]
    leaves = leaves or (x, gate.to_gates.weight)
    return [*outputs, *routing[:5], expert_inputs, *torch.autograd.grad(outputs, leaves, grads)]


def assert_same_bits(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) if a.dim() else a == b


@pytest.fixture
def threads():
    """Sets the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_number_of_threads(threads, dtype, soft):
    gate, x = setting(dtype, differentiable_topk=soft)
    logits = gate.logits(x).detach().requires_grad_()
    gate.logits = lambda _: logits  # the matrix product is torch's, whose bits may depend on the number of threads
    threads(1)
    expected = everything(gate, x, leaves=(x, logits))
    for count in (2, 3, 5):
        threads(count)
        assert_same_bits(everything(gate, x, leaves=(x, logits)), expected)


def test_same_bits_under_the_same_seed():
    gate, x = setting()
    mask = torch.rand(3, 1500) < 0.9
    expected = everything(gate, x, mask=mask)
    for _ in range(3):
        assert_same_bits(everything(gate, x, mask=mask), expected)
    assert not torch.equal(everything(gate, x, seed=2, mask=mask)[0], expected[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_algorithms(dtype):
    """Torch refuses no operation of ours there, and fills new memory with NaN: what a kernel forgets to write would show."""
    gate, x = setting(dtype, balance_on="kept")
    expected = everything(gate, x)
    torch.use_deterministic_algorithms(True)
    try:
        actual = everything(gate, x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(actual, expected)
    assert all(t.isfinite().all() for t in actual)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("make", [TopNGating, MoE, functools.partial(MoE, dropless=True)], ids=["gate", "moe", "dropless moe"])
def test_without_gradients(make, mode, training):
    module, x = make(16, 4).train(training), torch.randn(2, 40, 16)
    torch.manual_seed(1)
    expected = module(x)
    torch.manual_seed(1)
    with mode():
        actual = module(x)
    assert_same_bits(actual, [t.detach() for t in expected])
    assert not any(t.requires_grad for t in actual)
    assert all(t.is_inference() == (mode is torch.inference_mode) for t in actual)


def test_compact_path_in_inference_mode():
    gate, x = setting()
    with torch.inference_mode():
        routing = gate.route(x)
        out = topn_gating.combine(topn_gating.dispatch(x, routing), routing)
    assert not out.requires_grad
    assert "tokens=1500" in repr(routing)


def test_no_argument_is_written_to():
    gate, x = setting()
    mask, noise, draws = torch.rand(3, 1500) < 0.9, torch.rand(3, 1500, 8), torch.rand(3, 1500, 3)
    threshold, y = torch.rand(3), torch.randn(3, 8, 30, 16)
    logits = gate.logits(x)
    tensors = [x, gate.to_gates.weight, mask, noise, draws, threshold, y, logits]
    before, versions = [t.detach().clone() for t in tensors], [t._version for t in tensors]
    for policy in ("random", "threshold", "all", "none"):
        routing = topn_gating.route(
            logits, 3, capacity=30, policy=policy, threshold=threshold, noise=noise, draws=draws, token_mask=mask
        )
        fields = [t.detach().clone() for t in routing[:7]]
        out = topn_gating.combine(y, routing).sum() + topn_gating.dispatch(x, routing).square().sum()
        dispatch, combine = routing.dense()
        loss = out + dispatch.square().sum() + combine.square().sum() + routing.balance_loss + routing.router_z_loss
        torch.autograd.grad(loss, (x, gate.to_gates.weight), retain_graph=True)
        assert_same_bits([t.detach() for t in routing[:7]], fields)
    assert_same_bits([t.detach() for t in tensors], before)
    assert [t._version for t in tensors] == versions


def test_gradients_add_up_over_calls():
    """Two backward passes through one graph, and one through two graphs, give the same sums."""
    gate, x = setting(torch.float64, policy_train="all")
    routing = gate.route(x)
    first, second = topn_gating.dispatch(x, routing), routing.dense()[1]
    separate = [
        sum(grads)
        for grads in zip(
            *(torch.autograd.grad(t.square().sum(), (x, gate.to_gates.weight), retain_graph=True) for t in (first, second)),
            strict=True,
        )
    ]
    together = torch.autograd.grad(first.square().sum() + second.square().sum(), (x, gate.to_gates.weight))
    torch.testing.assert_close(together, tuple(separate))


@pytest.mark.parametrize("through", ["saved tensors", "incoming gradients"])
def test_second_derivative_is_an_error(through):
    z = torch.randn(1, 6, 4, dtype=torch.float64, requires_grad=True)
    routing = topn_gating.route(z * z if through == "saved tensors" else z, 2, policy="all")
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(routing.router_z_loss * scale, z, create_graph=True)
    with pytest.raises(RuntimeError, match="topn_gating has first derivatives alone"):
        torch.autograd.grad(grad.sum(), z if through == "saved tensors" else scale)
