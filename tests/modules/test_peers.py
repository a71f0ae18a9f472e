"""Against the installed peers: the same numbers under the same seed, and docs/spec.md's deviations, shown on both sides."""

import importlib.metadata
import importlib.util
import inspect
import random
import warnings

import pytest
import torch

import topn_gating
from topn_gating import TopNGating

st_moe = pytest.importorskip("st_moe_pytorch.st_moe_pytorch")


def load_zeta():
    """zeta's TopNGating from its one file: ``import zeta`` would load dozens of packages."""
    try:
        files = importlib.metadata.files("zetascale") or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    file = next(f for f in files if str(f) == "zeta/nn/modules/top_n_gating.py")
    spec = importlib.util.spec_from_file_location("zeta_top_n_gating", file.locate())
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():  # beartype dislikes their typing.Tuple
        warnings.simplefilter("ignore")
        spec.loader.exec_module(module)
    return module.TopNGating


Zeta = load_zeta()
needs_zeta = pytest.mark.skipif(Zeta is None, reason="zetascale is not installed: pip install --no-deps zetascale==2.8.8")
PEERS = [
    pytest.param(st_moe.TopNGating, id="st-moe-pytorch"),
    pytest.param(Zeta, id="zetascale", marks=needs_zeta),
]
ST_MOE_ALONE = PEERS[:1]


def pair(peer, *args, dtype=torch.float32, **kwargs):
    """A peer's gate and ours with the same weight; ``balance_on="kept"`` undoes D1."""
    theirs = peer(*args, **kwargs).to(dtype)
    ours = TopNGating(*args, **kwargs, balance_on="kept").to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def run(gate, x, seed, noise=()):
    """Outputs, and the gradients of x and of the gate's weight for random gradients into every output."""
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    dispatch, combine, *losses = gate(x, *noise)
    loss = sum(t.sum() for t in losses)
    for out in (dispatch, combine):
        loss = loss + (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)).sum()
    grads = torch.autograd.grad(loss, (x, gate.to_gates.weight), materialize_grads=True)
    return dispatch, combine, [t.reshape(()) for t in losses], grads


def configuration(seed):
    """Random arguments of the gate, an input, and arguments of forward."""
    rng = random.Random(seed)
    top_n = rng.randint(2, 5)
    num_gates, dim = rng.randint(top_n, 12), rng.randint(3, 16)

    def threshold():
        return rng.uniform(0, 0.5) if rng.random() < 0.5 else tuple(rng.uniform(0, 0.5) for _ in range(top_n - 1))

    gate = {
        "dim": dim,
        "num_gates": num_gates,
        "top_n": top_n,
        "threshold_train": threshold(),
        "threshold_eval": threshold(),
        "capacity_factor_train": rng.uniform(0.3, 3),
        "capacity_factor_eval": rng.uniform(0.3, 3),
        "straight_through_dispatch_tensor": rng.random() < 0.5,
        "differentiable_topk": rng.random() < 0.5,
        "differentiable_topk_fused": rng.random() < 0.5,
    }
    training, noise = rng.random() < 0.7, rng.choice([(), (True,), (True, rng.uniform(0.1, 2))])
    return gate, (rng.randint(1, 3), rng.randint(1, 48), dim), training, noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", range(64))
def test_same_numbers_as_st_moe(seed, dtype):
    kwargs, shape, training, noise = configuration(seed)
    torch.manual_seed(seed)
    theirs, ours = pair(st_moe.TopNGating, dtype=dtype, **kwargs)
    theirs.train(training), ours.train(training)
    x = torch.randn(shape, dtype=dtype)

    expected_dispatch, expected_combine, expected_losses, expected_grads = run(theirs, x, seed, noise)
    dispatch, combine, losses, grads = run(ours, x, seed, noise)

    exact, soft = dtype == torch.float64, kwargs["differentiable_topk"]  # their soft top-n in float32 loses ten times more
    close = {"rtol": 1e-10, "atol": 1e-10} if exact else {"rtol": 1e-6, "atol": 1e-5 if soft else 1e-6}
    assert torch.equal(dispatch != 0, expected_dispatch.round() != 0)
    torch.testing.assert_close(dispatch, expected_dispatch, **close)
    torch.testing.assert_close(combine, expected_combine, **close)
    torch.testing.assert_close(losses, expected_losses, rtol=2e-6, atol=1e-6)  # their density is float32 even for float64
    torch.testing.assert_close(grads, expected_grads, rtol=1e-6 if exact else 1e-4, atol=1e-6 if exact else 20 * close["atol"])


@needs_zeta
@pytest.mark.parametrize("min_expert_capacity", [1, 4, 9])
@pytest.mark.parametrize("training", [True, False])
def test_same_numbers_as_zeta_up_to_top_2(training, min_expert_capacity):
    theirs, ours = pair(Zeta, 8, 6, min_expert_capacity=min_expert_capacity)
    theirs.train(training), ours.train(training)
    x = torch.randn(2, 24, 8)
    torch.testing.assert_close(run(ours, x, 1, (True, 0.5)), run(theirs, x, 1, (True, 0.5)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 16, 100])
@pytest.mark.parametrize("factor", [0.1, 1.0, 1.25, 3.7, 50.0])
@pytest.mark.parametrize("peer", PEERS)
def test_same_capacity(peer, factor, tokens):
    theirs, ours = pair(peer, 4, 5, capacity_factor_train=factor, capacity_factor_eval=2 * factor)
    x = torch.randn(1, tokens, 4)
    assert ours(x)[0].shape == theirs(x)[0].shape
    assert ours.eval()(x)[0].shape == theirs.eval()(x)[0].shape


@pytest.mark.parametrize("peer", PEERS)
def test_signature_begins_with_the_peers(peer):
    def arguments(function):
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values() if p.kind != p.KEYWORD_ONLY]

    expected = arguments(peer.__init__)
    assert arguments(TopNGating.__init__)[: len(expected)] == expected
    assert arguments(TopNGating.forward) == arguments(peer.forward)
    assert (
        len(arguments(TopNGating.__init__)) == 13
    )  # self, and what docs/spec.md lists: all that this project adds is keyword-only


@needs_zeta
def test_drop_in_with_positional_arguments():
    args = 6, 5, 1e-8, 2, (0.3,), 0.1, 1.5, 2.5, False, True, False, 3
    theirs, ours = Zeta(*args), TopNGating(*args, balance_on="kept")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 20, 6)
    torch.testing.assert_close(run(ours, x, 3, (True, 0.7)), run(theirs, x, 3, (True, 0.7)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("threshold", [0.3, (0.1, 0.4)])
def test_checkpoints_load_both_ways(peer, threshold):
    theirs = peer(6, 5, top_n=3, threshold_train=threshold, threshold_eval=threshold)
    ours = TopNGating(6, 5, top_n=3)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    back = peer(6, 5, top_n=3)
    back.load_state_dict(ours.state_dict(), strict=True)
    for name, value in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], value)


def overflowing(gate, x):
    """``gate`` with a weight that sends every token of the positive ``x`` to expert 0 first."""
    with torch.no_grad():
        gate.to_gates.weight.zero_()[0] = 1
    return gate, x.abs()


@pytest.mark.parametrize("peer", PEERS)
def test_d1_balance_loss_counts_what_capacity_drops(peer):
    torch.manual_seed(0)
    x = torch.randn(2, 32, 4)
    theirs, x = overflowing(peer(4, 4), x)
    ours, kept = TopNGating(4, 4), TopNGating(4, 4, balance_on="kept")
    ours.load_state_dict(theirs.state_dict()), kept.load_state_dict(theirs.state_dict())

    gates = theirs.to_gates(x).softmax(-1)
    first = torch.nn.functional.one_hot(gates.argmax(-1), 4).float()
    defined = 16 * (gates.mean(1) * first.mean(1)).mean()

    assert theirs(x)[2] < 0.5 * defined
    torch.testing.assert_close(ours(x)[2], defined)
    torch.testing.assert_close(kept(x)[2], theirs(x)[2])


def most_in_a_slot(gate, x):
    """The largest number of tokens that share one slot of one expert."""
    torch.manual_seed(0)
    return int((gate(x)[0] > 0.5).sum(1).max())


@needs_zeta
@pytest.mark.parametrize("top_n", [3, 4, 5])
def test_d2_zeta_puts_several_tokens_in_a_slot(top_n):
    theirs, ours = pair(Zeta, 8, 6, top_n=top_n, capacity_factor_train=4.0)
    x = torch.randn(2, 64, 8)
    assert most_in_a_slot(theirs, x) > 1
    assert most_in_a_slot(ours, x) == 1


@pytest.mark.parametrize("peer", PEERS)
def test_d3_documented_threshold_tuple(peer):
    kwargs = {"threshold_train": (0.2, 0.3, 0.4, 0.35), "threshold_eval": (0.21, 0.31, 0.41, 0.36)}
    with pytest.raises(AssertionError):
        peer(6, 5, **kwargs)
    gate = TopNGating(6, 5, **kwargs)
    torch.testing.assert_close(gate.threshold_train, torch.tensor([1e-9, 0.2]))
    torch.testing.assert_close(gate.threshold_eval, torch.tensor([1e-9, 0.21]))


@pytest.mark.parametrize("peer", PEERS)
def test_d4_bfloat16_keeps_its_type(peer):
    theirs, ours = pair(peer, 8, 4, dtype=torch.bfloat16)
    x = torch.randn(2, 16, 8, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="same dtype"):
        torch.einsum("bnd,bnec->becd", x, theirs(x)[0])
    dispatch, combine, *_ = ours(x)
    assert dispatch.dtype == combine.dtype == torch.bfloat16
    torch.einsum("becd,bnec->bnd", torch.einsum("bnd,bnec->becd", x, dispatch), combine)


@pytest.mark.parametrize("peer", PEERS)
def test_d5_losses_are_scalars_in_eval_too(peer):
    theirs, ours = (gate.eval() for gate in pair(peer, 8, 4))
    x = torch.randn(2, 16, 8)
    assert [t.shape for t in theirs(x)[2:]] == [(1,), (1,)]
    assert [t.shape for t in ours(x)[2:]] == [(), ()]


@pytest.mark.parametrize("peer", PEERS)
def test_d6_dispatch_is_exactly_zero_or_one(peer):
    theirs, ours = pair(peer, 8, 4)
    x = torch.randn(4, 64, 8)

    def off(gate):
        dispatch = gate(x)[0]
        return ((dispatch != 0) & (dispatch != 1)).any()

    assert off(theirs)
    assert not off(ours)


@pytest.mark.parametrize(
    ("shape", "top_n"),
    [((5, 8), 2), ((3, 2, 5, 8), 2), ((2, 3, 2, 5, 8), 2), ((2, 0, 8), 2), ((0, 5, 8), 2), ((2, 5, 8), 1)],
)
@pytest.mark.parametrize("peer", PEERS)
def test_d7_any_leading_dimensions_no_tokens_top_1(peer, shape, top_n):
    x = torch.randn(shape)
    with pytest.raises((AssertionError, IndexError, RuntimeError, ValueError)):  # each trips over another of their lines
        peer(8, 4, top_n=top_n)(x)
    dispatch, combine, *losses = TopNGating(8, 4, top_n=top_n)(x)
    assert dispatch.shape == combine.shape == (*shape[:-1], 4, 4)
    assert all(t.shape == () and t.isfinite() for t in losses)


def test_d7_top_1_weight_is_the_raw_probability():
    gate, x = TopNGating(8, 4, top_n=1, capacity_factor_train=4.0), torch.randn(2, 16, 8)
    best = gate.to_gates(x).softmax(-1).amax(-1)
    torch.testing.assert_close(gate(x)[1].sum((-1, -2)), best)
    torch.testing.assert_close(topn_gating.route(gate.to_gates(x), 1, capacity=16).weight[..., 0], best)
