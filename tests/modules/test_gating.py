"""TopNGating and route against the reference in float64: constructor, steps, compact form and padding (docs/spec.md)."""

import pytest
import torch
import torch.nn.functional as F

import topn_gating
from topn_gating import Routing, TopNGating, reference, route

DOUBLE = torch.float64
POLICIES = ["random", "threshold", "all", "none"]
INTEGERS = ("expert", "slot", "source", "demand")


def capacity(tokens, num_gates, factor, least=4):
    return max(min(tokens, int((tokens * factor) / num_gates)), least)


def oracle(gate, x, *, seed, noise_mult=None, mask=None):
    """The reference's routing of what ``gate`` does to the float64 ``x``, random numbers drawn in the order of docs/spec.md."""
    torch.manual_seed(seed)
    logits = F.linear(x, gate.to_gates.weight)
    mode = "train" if gate.training else "eval"
    policy = getattr(gate, f"policy_{mode}")
    routing = reference.route(
        logits,
        top_n=gate.top_n,
        capacity=capacity(x.shape[-2], gate.num_gates, getattr(gate, f"capacity_factor_{mode}"), gate.min_expert_capacity),
        noise=None if noise_mult is None else torch.rand(logits.shape, dtype=DOUBLE),
        noise_mult=noise_mult or 1.0,
        policy=policy,
        draws=torch.rand((*x.shape[:-1], gate.top_n), dtype=DOUBLE) if policy == "random" else None,
        threshold=getattr(gate, f"threshold_{mode}"),
        eps=gate.eps,
        token_mask=mask,
        differentiable_topk=gate.differentiable_topk,
        straight_through=gate.straight_through_dispatch_tensor,
        balance_on=gate.balance_on,
    )
    zero = x.new_zeros(())
    return routing if gate.training else routing._replace(balance_loss=zero, router_z_loss=zero)


def assert_same_routing(actual, expected):
    for name in INTEGERS:
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    for name in ("weight", "balance_loss", "router_z_loss"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=1e-11, atol=1e-13, msg=name)


def gradients(outputs, leaves):
    """Gradients of ``leaves`` for the same random gradients into every output, those that take none left out."""
    torch.manual_seed(99)
    pairs = [(t, grad) for t, grad in [(t, torch.randn_like(t)) for t in outputs] if t.requires_grad]
    outputs, grads = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, leaves, grads)


# The examples of zeta's documentation, as they stand there but for the import.


def test_documented_example_1():
    x = torch.randn(1, 2, 3)
    model = TopNGating(3, 4)
    out, _, _, _ = model(x)
    assert out.shape == (1, 2, 4, 4)


def test_documented_example_2():
    x = torch.randn(2, 3, 4)
    model = TopNGating(4, 3, top_n=3)
    out, _, _, _ = model(x, noise_gates=True, noise_mult=0.7)
    assert out.shape == (2, 3, 3, 4)


def test_documented_example_3():
    x = torch.randn(2, 5, 6)
    model = TopNGating(6, 5, threshold_train=(0.2, 0.3, 0.4, 0.35), threshold_eval=(0.21, 0.31, 0.41, 0.36))
    out, _, _, _ = model(x, noise_gates=True, noise_mult=0.8)
    assert out.shape == (2, 5, 5, 4)


GATES = {
    "default": {},
    "top-1": {"top_n": 1},
    "all experts": {"top_n": 5, "capacity_factor_train": 0.7},
    "no straight-through": {"top_n": 3, "straight_through_dispatch_tensor": False},
    "soft": {"top_n": 3, "differentiable_topk": True},
    "soft composed": {"top_n": 3, "differentiable_topk": True, "differentiable_topk_fused": False},
    "balance on kept": {"top_n": 2, "balance_on": "kept", "capacity_factor_train": 0.5, "min_expert_capacity": 1},
    "thresholds": {"top_n": 4, "threshold_train": (0.1, 0.3, 0.9), "threshold_eval": 0.6, "eps": 1e-6},
    "ample": {"top_n": 2, "capacity_factor_train": 9.0, "min_expert_capacity": 40},
}


@pytest.mark.parametrize("noise_mult", [None, 0.7])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("options", GATES.values(), ids=GATES.keys())
def test_module_is_the_reference(options, policy, training, noise_mult):
    gate = TopNGating(7, 5, **options, policy_train=policy, policy_eval=policy, dtype=DOUBLE).train(training)
    x = torch.randn(2, 23, 7, dtype=DOUBLE, requires_grad=True)
    noise = () if noise_mult is None else (True, noise_mult)
    expected = oracle(gate, x, seed=1, noise_mult=noise_mult)
    torch.manual_seed(1)
    assert_same_routing(gate.route(x, *noise), expected)

    torch.manual_seed(1)
    outputs = gate(x, *noise)
    expected = (*reference.dense(expected), expected.balance_loss, expected.router_z_loss)
    torch.testing.assert_close(outputs, expected, rtol=1e-11, atol=1e-13)
    leaves = (x, gate.to_gates.weight)
    torch.testing.assert_close(gradients(outputs, leaves), gradients(expected, leaves), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_types_of_the_outputs(dtype):
    gate = TopNGating(8, 4, top_n=3, dtype=dtype)
    x = torch.randn(2, 16, 8, dtype=dtype, requires_grad=True)
    outputs, routing = gate(x), gate.route(x)
    assert [t.dtype for t in outputs] == [dtype, dtype, torch.float32, torch.float32]
    assert routing.weight.dtype == torch.float32
    y = topn_gating.combine(topn_gating.dispatch(x, routing), routing)
    assert y.dtype == dtype
    grads = torch.autograd.grad(y.sum() + routing.balance_loss + routing.router_z_loss, (x, gate.to_gates.weight))
    assert [g.dtype for g in grads] == [dtype, dtype]


def test_capacity_multiplies_before_it_divides():
    assert (5 * 1.2) / 3 == 2.0 > 5 * (1.2 / 3)
    assert topn_gating.expert_capacity(5, 3, 1.2, 1) == 2
    assert TopNGating(4, 3, capacity_factor_train=1.2, min_expert_capacity=1).capacity(5) == 2


def test_policies_differ_by_mode():
    gate = TopNGating(6, 4, top_n=3, policy_train="all", policy_eval="none")
    x = torch.randn(2, 12, 6)
    assert gate.route(x).demand.sum() == 2 * 12 * 3
    assert gate.eval().route(x).demand.sum() == 2 * 12


@pytest.mark.parametrize("policy", ["threshold", "all", "none"])
def test_policies_without_randomness_draw_nothing(policy):
    gate = TopNGating(6, 4, policy_train=policy)
    state = torch.get_rng_state()
    gate(torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)


def test_route_draws_what_it_is_not_given():
    logits = torch.randn(2, 12, 5)
    options = {"top_n": 3, "noise_mult": 0.4}
    torch.manual_seed(5)
    expected = route(logits, noise_gates=True, **options)
    torch.manual_seed(5)
    noise, draws = torch.rand(2, 12, 5), torch.rand(2, 12, 3)
    actual = route(logits, noise=noise, draws=draws, **options)
    for name in Routing._fields[:7]:
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name


@pytest.mark.parametrize("noise_gates", [True, False])
def test_a_generator_draws_in_place_of_torchs_own(noise_gates):
    """The noise, then the draws, each of the same shape: as torch's own generator under the same seed."""
    gate, moe, x, logits = TopNGating(6, 5, top_n=3), topn_gating.MoE(6, 5), torch.randn(2, 12, 6), torch.randn(2, 12, 5)
    calls = (
        lambda **options: route(logits, 3, noise_gates=noise_gates, **options)[:7],
        lambda **options: gate.route(x, noise_gates, **options)[:7],
        lambda **options: gate(x, noise_gates, **options),
        lambda **options: moe(x, noise_gates, **options),
    )
    for call in calls:
        torch.manual_seed(5)
        expected = call()
        torch.manual_seed(6)
        state = torch.get_rng_state()
        actual = call(generator=torch.Generator().manual_seed(5))
        assert torch.equal(torch.get_rng_state(), state)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("threshold", "per_rank"),
    [
        (0.3, (0.3, 0.3)),
        ((0.1, 0.4), (0.1, 0.4)),
        ((0.1, 0.4, 0.9), (0.1, 0.4)),  # a longer one is cut
        (torch.tensor([9.0, 0.1, 0.4]), (0.1, 0.4)),  # rank 0 is not read
    ],
)
def test_thresholds_of_route(threshold, per_rank):
    logits = torch.randn(2, 40, 5)
    weight = route(logits, 3, capacity=40, policy="all").weight
    routing = route(logits, 3, capacity=40, policy="threshold", threshold=threshold)
    assert (routing.slot[..., 0] >= 0).all()
    assert torch.equal(routing.slot[..., 1:] >= 0, weight[..., 1:] > torch.tensor(per_rank))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("balance_on", ["routed", "kept"])
def test_padding_is_as_if_it_were_not_there(balance_on, policy):
    lengths, top_n, num_gates, slots = (17, 9, 0, 24), 3, 5, 6
    mask = torch.stack([torch.randperm(24) < length for length in lengths])
    logits = torch.randn(4, 24, num_gates, dtype=DOUBLE)
    logits[~mask] = torch.nan
    draws, noise = torch.rand(4, 24, top_n, dtype=DOUBLE), torch.rand(4, 24, num_gates, dtype=DOUBLE)
    options = {"top_n": top_n, "capacity": slots, "policy": policy, "balance_on": balance_on, "noise_mult": 0.3}
    actual = route(logits, threshold=0.3, draws=draws, noise=noise, token_mask=mask, **options)

    assert (actual.slot[~mask] == -1).all()
    assert (actual.weight[~mask] == 0).all()
    balance, z = 0.0, 0.0
    for g, length in enumerate(lengths):
        valid = mask[g]
        alone = reference.route(
            logits[g, valid],
            threshold=torch.full((top_n,), 0.3, dtype=DOUBLE),
            draws=draws[g, valid],
            noise=noise[g, valid],
            **options,
        )
        for name in ("expert", "slot"):
            assert torch.equal(getattr(actual, name)[g, valid], getattr(alone, name)), name
        torch.testing.assert_close(actual.weight[g, valid], alone.weight)
        assert torch.equal(actual.demand[g], alone.demand)
        pair = (torch.nonzero(valid) * top_n + torch.arange(top_n)).flatten().int()
        source = pair[alone.source.clamp(min=0)] if length else alone.source
        assert torch.equal(actual.source[g], source.where(alone.source >= 0, -1))
        balance, z = balance + alone.balance_loss / len(lengths), z + alone.router_z_loss * length / sum(lengths)
    torch.testing.assert_close(actual.balance_loss, balance)
    torch.testing.assert_close(actual.router_z_loss, z)


def test_padding_gets_no_gradient_and_no_output():
    gate = TopNGating(6, 4, top_n=2, policy_train="all", dtype=DOUBLE)
    x = torch.randn(2, 12, 6, dtype=DOUBLE, requires_grad=True)
    mask = torch.rand(2, 12) < 0.6
    dispatch, combine, balance_loss, z_loss = gate(x, token_mask=mask)
    assert not dispatch[~mask].any()
    assert not combine[~mask].any()
    (grad,) = gradients((dispatch, combine, balance_loss, z_loss), x)
    assert not grad[~mask].any()
    assert grad[mask].any(-1).all()


def test_nothing_but_padding():
    gate, x = TopNGating(6, 4), torch.randn(2, 5, 6, requires_grad=True)
    dispatch, combine, balance_loss, z_loss = gate(x, token_mask=torch.zeros(2, 5, dtype=torch.bool))
    assert not dispatch.any()
    assert not combine.any()
    assert balance_loss == z_loss == 0
    (grad,) = torch.autograd.grad(combine.sum() + balance_loss + z_loss, x)
    assert not grad.any()


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3)], ids=str)
def test_leading_dimensions(lead):
    gate = TopNGating(6, 4, top_n=3, policy_train="threshold", dtype=DOUBLE)
    x = torch.randn(*lead, 10, 6, dtype=DOUBLE)
    mask = torch.rand(*lead, 10) < 0.8
    flat = gate(x.reshape(-1, 10, 6), token_mask=mask.reshape(-1, 10))
    expected = [t.reshape(*lead, *t.shape[1:]) for t in flat[:2]]
    torch.testing.assert_close(gate(x, token_mask=mask), (*expected, *flat[2:]), rtol=0, atol=0)


@pytest.mark.parametrize("balance_on", ["routed", "kept"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 6), (3, 0, 6), (0, 5, 6), (2, 0, 5, 6), (0, 0, 6)], ids=str)
def test_empty(shape, training, balance_on):
    gate, x = TopNGating(6, 4, balance_on=balance_on).train(training), torch.randn(shape, requires_grad=True)
    dispatch, combine, balance_loss, z_loss = gate(x, noise_gates=True)
    assert dispatch.shape == combine.shape == (*shape[:-1], 4, 4)
    assert balance_loss == z_loss == 0
    routing = gate.route(x)
    out = topn_gating.combine(topn_gating.dispatch(x, routing), routing)
    assert out.shape == shape
    loss = out.sum() + dispatch.sum() + combine.sum() + balance_loss + z_loss
    grad_x, grad_weight = torch.autograd.grad(loss, (x, gate.to_gates.weight))
    assert grad_x.shape == shape
    assert not grad_weight.any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("soft", [True, False])
def test_a_broken_token_keeps_to_itself(soft, policy, bad):
    logits = torch.randn(2, 24, 5, dtype=DOUBLE)
    broken = torch.rand(2, 24) < 0.3
    logits[broken] = torch.where(torch.rand(5) < 0.5, bad, logits[broken])
    options = {
        "top_n": 3,
        "capacity": 6,
        "policy": policy,
        "differentiable_topk": soft,
        "draws": torch.rand(2, 24, 3, dtype=DOUBLE),
    }
    actual = route(logits, threshold=0.3, **options)
    expected = reference.route(logits, threshold=torch.full((3,), 0.3, dtype=DOUBLE), **options)
    for name in INTEGERS:
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    assert actual.weight[~broken].isfinite().all()
    torch.testing.assert_close(actual.weight[~broken], expected.weight[~broken], rtol=1e-11, atol=1e-13)
    assert all(len(set(token.tolist())) == 3 for token in actual.expert.flatten(0, 1))
    assert 0 <= actual.expert.min() <= actual.expert.max() < 5


def test_strided_input():
    gate = TopNGating(6, 4, policy_train="all", dtype=DOUBLE)
    x = torch.randn(6, 10, 2, dtype=DOUBLE).permute(2, 1, 0)
    torch.testing.assert_close(gate(x), gate(x.contiguous()))
    logits, mask = torch.randn(2, 4, 10).mT, (torch.rand(10, 2) < 0.5).T
    for actual, expected in zip(
        route(logits, policy="all", token_mask=mask),
        route(logits.contiguous(), policy="all", token_mask=mask.contiguous()),
        strict=True,
    ):
        assert actual is expected or torch.equal(actual, expected)


def test_state_dict():
    gate = TopNGating(6, 5, eps=1e-7, top_n=3, threshold_train=0.3, threshold_eval=(0.1, 0.4))
    state = gate.state_dict()
    assert sorted(state) == ["threshold_eval", "threshold_train", "to_gates.weight"]
    torch.testing.assert_close(state["threshold_train"], torch.tensor([1e-7, 0.3, 0.3]))
    torch.testing.assert_close(state["threshold_eval"], torch.tensor([1e-7, 0.1, 0.4]))
    assert state["to_gates.weight"].shape == (5, 6)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_router_dtype(dtype, autocast):
    x = torch.randn(2, 32, 64, dtype=dtype)
    plain, exact = TopNGating(64, 8, dtype=dtype), TopNGating(64, 8, dtype=dtype, router_dtype=torch.float32)
    exact.load_state_dict(plain.state_dict())
    expected = F.linear(x.float(), plain.to_gates.weight.float())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert plain.logits(x).dtype == (torch.bfloat16 if autocast else dtype)
        torch.testing.assert_close(exact.logits(x), expected, rtol=1e-6, atol=1e-6)
        dispatch, combine, *_ = exact(x)
    assert dispatch.dtype == combine.dtype == dtype


@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
def test_soft_top_n_fused_is_composed(dtype, noise):
    logits = torch.randn(2, 16, 8, dtype=dtype, requires_grad=True)
    results = []
    for fused in (True, False):
        torch.manual_seed(2)
        routing = route(logits, 3, differentiable_topk=True, differentiable_topk_fused=fused, noise_gates=noise)
        outputs = routing.weight, routing.balance_loss, routing.router_z_loss
        results.append((outputs, gradients(outputs, logits)))
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if dtype == DOUBLE else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(*results, **tolerance)


def test_gradcheck():
    gate = TopNGating(5, 4, top_n=3, policy_train="all", straight_through_dispatch_tensor=False, dtype=DOUBLE)
    x = torch.randn(2, 6, 5, dtype=DOUBLE, requires_grad=True)

    def outputs(x, weight):
        return torch.func.functional_call(gate, {"to_gates.weight": weight}, x)[1:]

    assert torch.autograd.gradcheck(outputs, (x, gate.to_gates.weight.detach().requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
@pytest.mark.parametrize("straight_through", [True, False])
@pytest.mark.parametrize(("top_n", "lead"), [(1, (2,)), (3, (2,)), (2, ()), (4, (2, 2))])
def test_compact_is_dense_with_einsums(top_n, lead, straight_through, dtype):
    gate = TopNGating(6, 4, top_n=top_n, straight_through_dispatch_tensor=straight_through, dtype=dtype)
    scale = torch.randn(4, 1, 6, dtype=dtype, requires_grad=True)
    x = torch.randn(*lead, 21, 6, dtype=dtype, requires_grad=True)
    leaves = (x, gate.to_gates.weight, scale)

    torch.manual_seed(3)
    routing = gate.route(x)
    out = topn_gating.combine(torch.tanh(topn_gating.dispatch(x, routing) * scale), routing)
    actual = out, routing.balance_loss, routing.router_z_loss

    torch.manual_seed(3)
    dispatch, combine, *losses = gate(x)
    y = torch.tanh(torch.einsum("...nd,...nec->...ecd", x, dispatch) * scale)
    expected = torch.einsum("...ecd,...nec->...nd", y, combine), *losses

    close = {"rtol": 1e-10, "atol": 1e-12} if dtype == DOUBLE else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(actual, expected, **close)
    torch.testing.assert_close(gradients(actual, leaves), gradients(expected, leaves), **close)
