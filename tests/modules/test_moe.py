"""MoE: against st_moe_pytorch.MoE with copied weights, and as any torch module has to behave."""

import copy
import functools
import inspect
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import topn_gating
from topn_gating import GLUExperts, MoE

DIM, EXPERTS = 12, 4


def copied(theirs, **options):
    """Our MoE with the weights of st-moe-pytorch's."""
    ours = MoE(theirs.dim, theirs.num_experts, gating_top_n=theirs.gate.top_n, balance_on="kept", **options)
    ours.gate.load_state_dict(theirs.gate.state_dict())
    ours.experts.load_state_dict(stacked(theirs, lambda p: p.detach()))
    return ours


def stacked(theirs, of):
    """``of`` every parameter of their experts, stacked and laid out as those of our ``Experts``."""
    layers = [expert.net for expert in theirs.experts.experts]  # Linear, GEGLU, Linear
    return {
        "weight_in": torch.stack([of(net[0].weight).T for net in layers]),
        "bias_in": torch.stack([of(net[0].bias)[None] for net in layers]),
        "mult_bias": torch.stack([of(net[1].mult_bias)[None] for net in layers]),
        "weight_out": torch.stack([of(net[2].weight).T for net in layers]),
        "bias_out": torch.stack([of(net[2].bias)[None] for net in layers]),
    }


class PerRow(nn.Module):
    """A module of rows as experts of a dropless layer."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x, offsets):
        return self.module(x)


class Hidden(nn.Module):
    """Experts that a layer does not know to be built in: they get buffers whole."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, x):
        return self.experts(x)


def glu_experts(dtype=None):
    return {"experts": GLUExperts(DIM, EXPERTS, 10, bias=True, dtype=dtype)}


def both_experts(dtype=None):
    """GLUExperts, and a shared one."""
    return {
        **glu_experts(dtype),
        "shared_experts": nn.Sequential(nn.Linear(DIM, 5, dtype=dtype), nn.Linear(5, DIM, dtype=dtype)),
    }


def run(moe, x, *, seed=1, call=None, **kwargs):
    """Outputs, and the gradient of x; those of the parameters are left in ``.grad``."""
    x = x.clone().requires_grad_()
    moe.zero_grad()
    torch.manual_seed(seed)
    out = call(x) if call else moe(x, **kwargs)
    outputs, aux = out[:2]
    weight = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(5)).to(outputs.dtype)
    ((outputs * weight).sum().float() + aux).backward()
    return [t.detach() for t in out], x.grad


@pytest.fixture(params=[False, True], ids=["capacity", "dropless"])
def dropless(request):
    return request.param


@pytest.fixture
def moe(dropless):
    return MoE(DIM, EXPERTS, gating_top_n=3, dropless=dropless)


@pytest.fixture
def x():
    return torch.randn(2, 20, DIM)


@pytest.mark.parametrize("noise", [{}, {"noise_gates": True, "noise_mult": 0.5}], ids=["", "noise"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("top_n", "soft"), [(2, False), (3, True), (4, False)])
def test_same_numbers_as_st_moe(x, top_n, soft, training, noise):
    st_moe = pytest.importorskip("st_moe_pytorch.st_moe_pytorch")
    theirs = st_moe.MoE(DIM, EXPERTS, gating_top_n=top_n, differentiable_topk=soft).train(training)
    for expert in theirs.experts.experts:
        nn.init.normal_(expert.net[1].mult_bias)
    ours = copied(theirs, differentiable_topk=soft).train(training)
    expected, expected_grad = run(theirs, x, **noise)
    actual, grad = run(ours, x, **noise)
    close = {"rtol": 1e-4, "atol": 1e-4 if soft else 1e-5}
    torch.testing.assert_close(actual, [expected[0], *(t.reshape(()) for t in expected[1:])], **close)
    torch.testing.assert_close(grad, expected_grad, **close)
    torch.testing.assert_close(ours.gate.to_gates.weight.grad, theirs.gate.to_gates.weight.grad, **close)
    expected_grads = stacked(theirs, lambda p: torch.zeros_like(p) if p.grad is None else p.grad)
    torch.testing.assert_close({name: p.grad for name, p in ours.experts.named_parameters()}, expected_grads, **close)


def test_signature_is_st_moes_but_for_distribution():
    st_moe = pytest.importorskip("st_moe_pytorch.st_moe_pytorch")

    def arguments(function):
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.default) for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]

    expected = [(n, d) for n, d in arguments(st_moe.MoE.__init__) if n not in ("is_distributed", "allow_var_seq_len")]
    assert arguments(MoE.__init__) == expected
    assert arguments(MoE.forward) == arguments(st_moe.MoE.forward)
    assert topn_gating.MixtureOfExpertsReturn._fields == st_moe.MixtureOfExpertsReturn._fields


def test_total_is_the_weighted_sum_of_the_losses(x):
    moe = MoE(DIM, EXPERTS, balance_loss_coef=0.3, router_z_loss_coef=0.07)
    out = moe(x)
    torch.testing.assert_close(out.total_aux_loss, 0.3 * out.balance_loss + 0.07 * out.router_z_loss)
    assert moe.eval()(x).total_aux_loss == 0


class Scale(nn.Module):
    """Experts that multiply by their number."""

    def forward(self, x, offsets=None):
        if offsets is None:
            return x * torch.arange(1.0, x.shape[-3] + 1).view(-1, 1, 1)
        return x * torch.searchsorted(offsets, torch.arange(len(x), dtype=torch.int32), right=True).add(1.0).unsqueeze(1)


def test_custom_experts_of_a_dropless_layer(x):
    moe = MoE(DIM, EXPERTS, gating_top_n=3, experts=Scale(), dropless=True)
    routing = moe.gate.route(x)
    assert routing.demand.sum() == 3 * 2 * 20
    expected = (routing.weight * (routing.expert + 1)).sum(-1, keepdim=True) * x
    torch.testing.assert_close(moe(x).outputs, expected)


def test_custom_experts(x):
    moe = MoE(DIM, EXPERTS, gating_top_n=3, experts=Scale())
    torch.manual_seed(2)
    _, combine, *_ = moe.gate(x)
    torch.manual_seed(2)
    expected = torch.einsum("bnec,e,bnd->bnd", combine, torch.arange(1.0, EXPERTS + 1), x)
    torch.testing.assert_close(moe(x).outputs, expected)


@pytest.mark.parametrize("identity", [nn.Identity(), nn.Sequential()], ids=["Identity", "empty Sequential"])
def test_custom_experts_are_never_replaced(identity):
    assert MoE(DIM, EXPERTS, experts=identity).experts is identity


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,)], ids=str)
def test_leading_dimensions(lead, dropless):
    moe = MoE(DIM, EXPERTS, policy_train="all", dropless=dropless).double()
    x = torch.randn(*lead, 10, DIM, dtype=torch.float64)
    outputs = moe(x).outputs
    assert outputs.shape == x.shape
    for group, expected in zip(x.reshape(-1, 10, DIM), outputs.reshape(-1, 10, DIM), strict=True):
        torch.testing.assert_close(moe(group).outputs, expected)


def saved_and_loaded(moe):
    file = io.BytesIO()
    torch.save(moe, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_state_dict(moe):
    file = io.BytesIO()
    torch.save(moe.state_dict(), file)
    file.seek(0)
    other = MoE(DIM, EXPERTS, gating_top_n=3, dropless=moe.gate.dropless)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    return other


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda moe: pickle.loads(pickle.dumps(moe)), saved_and_loaded, through_state_dict]
)
def test_copies_compute_the_same(moe, x, clone):
    run(moe, x)  # leaves gradients, which must not hinder
    other = clone(moe)
    assert other is not moe
    expected, actual = run(moe, x), run(other, x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    grads = [{name: p.grad for name, p in m.named_parameters()} for m in (other, moe)]
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_routing_can_be_copied_and_pickled(moe, x):
    with torch.no_grad():
        routing = moe.gate.route(x)
    file = io.BytesIO()
    torch.save(routing, file)
    file.seek(0)
    for other in (copy.deepcopy(routing), pickle.loads(pickle.dumps(routing)), torch.load(file, weights_only=True)):
        assert type(other) is topn_gating.Routing
        assert all(torch.equal(a, b) for a, b in zip(other[:7], routing[:7], strict=True))
        assert other.straight_through is routing.straight_through
        assert torch.equal(other.offsets, routing.offsets) if moe.gate.dropless else other.offsets is None


@pytest.mark.parametrize("make_experts", [None, glu_experts, both_experts], ids=["Experts", "GLUExperts", "shared"])
def test_autocast(x, dropless, make_experts):
    options = make_experts() if make_experts else {}
    moe = MoE(DIM, EXPERTS, gating_top_n=3, router_dtype=torch.float32, dropless=dropless, **options)
    (expected, *losses), expected_grad = run(moe, x)
    expected_grads = [p.grad.clone() for p in moe.parameters()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (outputs, *autocast_losses), grad = run(moe, x)
    assert outputs.dtype == torch.bfloat16
    assert grad.dtype == torch.float32
    torch.testing.assert_close(autocast_losses, losses)
    grads = [p.grad for p in moe.parameters()]
    for actual, exact in zip([outputs, grad, *grads], [expected, expected_grad, *expected_grads], strict=True):
        assert (actual.float() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("experts", [None, nn.Linear(DIM, DIM)], ids=["ours", "custom"])
def test_float64_stays_float64_under_autocast(x, experts, dropless):
    if experts and dropless:
        experts = PerRow(experts)
    moe, x = MoE(DIM, EXPERTS, experts=experts, policy_train="all", dropless=dropless).double(), x.double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = moe(x)
    assert [t.dtype for t in actual] == [torch.float64] * 4
    torch.testing.assert_close(actual, moe(x), rtol=0, atol=0)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(moe, x, use_reentrant):
    """The recomputation draws the same numbers, so it routes every token as the first time."""
    routings = []
    route = moe.gate.route
    moe.gate.route = lambda *args, **kwargs: routings.append(route(*args, **kwargs)) or routings[-1]

    expected = run(moe, x, noise_gates=True)
    expected_grads = {name: p.grad.clone() for name, p in moe.named_parameters()}
    forward = functools.partial(moe, noise_gates=True)
    actual = run(moe, x, call=lambda x: checkpoint(forward, x, use_reentrant=use_reentrant))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    torch.testing.assert_close({name: p.grad for name, p in moe.named_parameters()}, expected_grads, rtol=0, atol=0)

    plain, first, recomputed = routings
    assert torch.equal(first.slot, plain.slot)
    for name in ("expert", "slot", "source", "demand", "weight"):
        assert torch.equal(getattr(recomputed, name), getattr(first, name)), name


def test_padding(moe, x):
    moe.gate.policy_train = "all"
    mask = torch.rand(2, 20) < 0.6
    (outputs, *losses), grad = run(moe, x, token_mask=mask)
    assert not outputs[~mask].any()
    assert not grad[~mask].any()
    other = torch.where(mask.unsqueeze(-1), x, 1e3 * torch.randn(x.shape))
    torch.testing.assert_close(run(moe, other, token_mask=mask), ([outputs, *losses], grad), rtol=0, atol=0)


def test_training_lowers_the_loss(moe, x):
    target = torch.randn(x.shape)
    optimizer = torch.optim.Adam(moe.parameters(), lr=1e-2)
    history = []
    for _ in range(60):
        out = moe(x, noise_gates=True, noise_mult=0.1)
        error = (x + out.outputs - target).square().mean()
        optimizer.zero_grad()
        (error + out.total_aux_loss).backward()
        optimizer.step()
        history.append(error.item())
    assert sum(history[-5:]) < 0.5 * sum(history[:5])


TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 5e-2, torch.float16: 5e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
EXPERTS_OF = pytest.mark.parametrize(
    "make_experts", [lambda dtype: {}, glu_experts, both_experts], ids=["Experts", "GLUExperts", "shared"]
)


def assert_same_run(actual, expected, moe, other, dtype):
    """Two of :func:`run` and the gradients they left, equal but for roundings, relative to each tensor's norm."""
    (outputs, grad), (other_outputs, other_grad) = actual, expected
    pairs = zip(
        [*outputs, grad, *(p.grad for p in moe.parameters())],
        [*other_outputs, other_grad, *(p.grad for p in other.parameters())],
        strict=True,
    )
    for a, b in pairs:
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert (a.double() - b.double()).norm() <= TOLERANCE[dtype] * b.double().norm()


@DTYPES
@EXPERTS_OF
def test_layouts_agree_where_nothing_is_dropped(make_experts, dtype):
    """On the CPU a layer with capacity computes no empty slot; hidden behind another module, its experts get them."""
    options = {"gating_top_n": 3, "policy_train": "all", "capacity_factor_train": 100.0, "dtype": dtype}
    dropless = MoE(DIM, EXPERTS, dropless=True, **options, **make_experts(dtype))
    capacity = MoE(DIM, EXPERTS, **options, **make_experts(dtype))
    capacity.load_state_dict(dropless.state_dict())
    x = torch.randn(2, 20, DIM).to(dtype)
    expected = run(dropless, x)
    assert_same_run(run(capacity, x), expected, capacity, dropless, dtype)
    whole = copy.deepcopy(capacity)
    whole.experts = Hidden(whole.experts)
    assert_same_run(run(whole, x), expected, whole, dropless, dtype)


@DTYPES
@EXPERTS_OF
@pytest.mark.parametrize("straight_through", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_computing_no_empty_slot_changes_nothing(make_experts, dtype, straight_through, training):
    """The same pairs are dropped, by threshold and by capacity, in groups and beside padding."""
    options = {"gating_top_n": 3, "capacity_factor_train": 0.7, "capacity_factor_eval": 0.9, "min_expert_capacity": 1}
    options |= {"straight_through_dispatch_tensor": straight_through, "dtype": dtype}
    moe = MoE(DIM, EXPERTS, **options, **make_experts(dtype)).train(training)
    whole = copy.deepcopy(moe)
    whole.experts = Hidden(whole.experts)
    x, mask = torch.randn(3, 2, 20, DIM).to(dtype), torch.rand(3, 2, 20) < 0.9
    torch.manual_seed(1)
    routing = moe.gate.route(x, token_mask=mask)
    assert (routing.slot == -1).any()
    assert 0.05 < routing.drop_fraction < 0.9
    actual, expected = run(moe, x, token_mask=mask), run(whole, x, token_mask=mask)
    assert_same_run(actual, expected, moe, whole, dtype)


def test_shared_experts(x, dropless):
    shared = nn.Sequential(nn.Linear(DIM, 5), nn.Tanh(), nn.Linear(5, DIM))
    moe = MoE(DIM, EXPERTS, gating_top_n=3, dropless=dropless, shared_experts=shared)
    assert {name.split(".")[0] for name in moe.state_dict()} == {"gate", "experts", "shared_experts"}
    (outputs, *losses), grad = run(moe, x)
    shared_grads = [p.grad.clone() for p in shared.parameters()]
    grads = [p.grad.clone() for p in (*moe.gate.parameters(), *moe.experts.parameters())]
    moe.shared_experts = None
    (routed, *other_losses), routed_grad = run(moe, x)
    torch.testing.assert_close(outputs, routed + shared(x))
    torch.testing.assert_close(losses, other_losses)
    torch.testing.assert_close(grads, [p.grad for p in (*moe.gate.parameters(), *moe.experts.parameters())])
    leaf = x.clone().requires_grad_()
    weight = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(5))
    expected = torch.autograd.grad((shared(leaf) * weight).sum(), (leaf, *shared.parameters()))
    torch.testing.assert_close([grad - routed_grad, *shared_grads], list(expected))


@pytest.mark.parametrize("make_experts", [dict, glu_experts, both_experts], ids=["Experts", "GLUExperts", "shared"])
@pytest.mark.parametrize("shape", [(0,), (1,), (2, 0), (1, 1), (0, 3)], ids=str)
def test_no_token_and_one(shape, make_experts, dropless):
    moe, x = MoE(DIM, EXPERTS, dropless=dropless, policy_train="all", **make_experts()), torch.randn(*shape, DIM)
    (outputs, *losses), grad = run(moe, x)
    assert outputs.shape == grad.shape == x.shape
    assert all(t.isfinite().all() for t in (outputs, *losses, grad, *(p.grad for p in moe.parameters())))
    assert outputs.any() == (x.numel() > 0)


def test_dropless_computes_every_pair(x):
    """Even where all tokens choose the same experts, whose capacity they would exceed."""
    moe = MoE(DIM, EXPERTS, dropless=True).double()
    x = x[:1, :1].double().expand(2, 20, DIM)
    outputs = moe(x).outputs
    torch.testing.assert_close(outputs, moe(x[:1, :1]).outputs.expand_as(outputs))
    assert outputs.any()
    assert moe.gate.route(x).drop_fraction == 0
