"""Bad input (docs/spec.md): an error of the right type that names the argument, what it got, what it takes; never a crash."""

import re

import numpy as np
import pytest
import torch

import topn_gating
from topn_gating import GLUExperts, MoE, TopNGating, route, stack_stats, update_select_bias_, with_loss
from topn_gating.ops import GateOptions

INF, NAN = float("inf"), float("nan")


def gate(*args, **kwargs):
    return TopNGating(*(args or (8, 4)), **kwargs)


def routed(**kwargs):
    return route(torch.zeros(2, 6, 4), **{"policy": "all", **kwargs})


def check(call, error, *fragments):
    """``call()`` raises ``error`` with every fragment in its message."""
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    for fragment in fragments:
        assert re.search(rf"(?<!\w){re.escape(fragment)}(?!\w)", str(caught.value)), (fragment, str(caught.value))


COUNTS = [(0, ValueError, "at least 1", "0"), (-3, ValueError, "at least 1", "-3"), (2.0, TypeError, "int", "float")]
COUNTS += [(bad, ValueError, "below 2^31", str(bad)) for bad in (2**31, 2**63)]
COUNTS += [
    (torch.tensor(4), TypeError, "int", "Tensor"),
    (True, TypeError, "int", "bool"),
    ("4", TypeError, "int", "str"),
    (None, TypeError, "int", "NoneType"),
]
POSITIVES = [(bad, ValueError, "finite", "above 0", str(float(bad))) for bad in (0.0, -1.5, INF, -INF, NAN, 1e300)]
POSITIVES += [("2", TypeError, "number", "str"), (True, TypeError, "number", "bool"), (None, TypeError, "number", "NoneType")]
THRESHOLDS = [
    (-0.1, ValueError, "negative", "-0.1"),
    (NAN, ValueError, "NaN", "nan"),
    ((0.1, -0.2), ValueError, "negative", "-0.2"),
    ((NAN, 0.2), ValueError, "NaN", "nan"),
    ((0.1,), ValueError, "2", "1"),  # top_n - 1 = 2 floats, got 1
    ((0.1,) * 4, ValueError, "3", "4"),  # at most num_gates - 1 = 3, got 4
    ((), ValueError, "2", "0"),
    ("0.2", TypeError, "float", "'0.2'"),
    ((0.1, None), TypeError, "float", "None"),
    (True, TypeError, "float", "True"),
]


def rows(name, values):
    return [pytest.param(name, *value, id=f"{name}={value[0]!r}") for value in values]


@pytest.mark.parametrize(
    ("name", "value", "error", "takes", "got"),
    [
        *(row for name in ("dim", "num_gates", "min_expert_capacity", "top_n") for row in rows(name, COUNTS)),
        pytest.param("top_n", 5, ValueError, "num_gates (4", "5", id="top_n=5"),
    ],
)
def test_counts_of_the_gate(name, value, error, takes, got):
    check(lambda: TopNGating(**{"dim": 8, "num_gates": 4, name: value}), error, name, takes, got)


@pytest.mark.parametrize(("value", "error", "fragments"), [(v, e, f) for v, e, *f in POSITIVES])
@pytest.mark.parametrize("name", ["eps", "capacity_factor_train", "capacity_factor_eval"])
def test_positive_numbers_of_the_gate(name, value, error, fragments):
    check(lambda: gate(**{name: value}), error, name, *fragments)


@pytest.mark.parametrize(("value", "error", "fragments"), [(v, e, f) for v, e, *f in THRESHOLDS], ids=str)
@pytest.mark.parametrize("name", ["threshold_train", "threshold_eval"])
def test_thresholds_of_the_gate(name, value, error, fragments):
    check(lambda: gate(top_n=3, **{name: value}), error, name, *fragments)


@pytest.mark.parametrize("name", ["policy_train", "policy_eval"])
def test_policies_of_the_gate(name):
    check(lambda: gate(**{name: "sometimes"}), ValueError, name, "random", "threshold", "all", "none", "'sometimes'")


def test_choices_of_the_gate():
    check(lambda: gate(balance_on="all"), ValueError, "balance_on", "routed", "kept", "'all'")
    check(lambda: gate(router_dtype="float32"), TypeError, "router_dtype", "torch.dtype", "str")
    check(lambda: gate(router_dtype=torch.int32), ValueError, "router_dtype", "floating point", "torch.int32")


OFFSETS = torch.tensor([1, 2, 3, 4], dtype=torch.int32)
NESTED = torch.nested.nested_tensor([torch.zeros(6, 8), torch.zeros(5, 8)], layout=torch.jagged)


@pytest.mark.parametrize("method", ["forward", "route"])
@pytest.mark.parametrize(
    ("x", "error", "fragments"),
    [
        ([[1.0] * 8], TypeError, ["tensor", "list"]),
        (torch.zeros(2, 6, 8, dtype=torch.int64), TypeError, ["float32", "torch.int64"]),
        (torch.zeros(2, 6, 8, dtype=torch.complex64), TypeError, ["bfloat16", "torch.complex64"]),
        (torch.zeros(2, 6, 7), ValueError, ["tokens, 8", "(2, 6, 7)"]),
        (torch.zeros(8), ValueError, ["tokens, 8", "(8,)"]),
        (torch.zeros(()), ValueError, ["tokens, 8", "()"]),
        (torch.zeros(2, 6, 8, device="meta"), ValueError, ["cpu", "meta"]),
        (torch.zeros(2, 6, 8).to_sparse(), TypeError, ["dense", "torch.sparse_coo"]),
        (NESTED, TypeError, ["dense", "nested"]),
    ],
    ids=lambda value: None if isinstance(value, torch.Tensor) else str(value),
)
def test_x(method, x, error, fragments):
    with pytest.raises(error) as caught:
        getattr(gate(), method)(x)
    assert str(caught.value).startswith("x must ")
    assert all(fragment in str(caught.value) for fragment in fragments)


@pytest.mark.parametrize(
    ("mask", "error", "fragments"),
    [
        (torch.ones(2, 6), TypeError, ["torch.bool", "torch.float32"]),
        ([True] * 6, TypeError, ["torch.bool", "list"]),
        (torch.ones(6, dtype=torch.bool), ValueError, ["(2, 6)", "(6,)"]),
        (torch.ones(2, 6, 1, dtype=torch.bool), ValueError, ["(2, 6)", "(2, 6, 1)"]),
        (torch.ones(2, 6, dtype=torch.bool, device="meta"), ValueError, ["cpu", "meta"]),
        (torch.ones(2, 6, dtype=torch.bool).to_sparse(), TypeError, ["dense", "torch.sparse_coo"]),
    ],
)
def test_token_mask(mask, error, fragments):
    for call in (gate(), gate().route, MoE(8, 4)):
        with pytest.raises(error) as caught:
            call(torch.zeros(2, 6, 8), token_mask=mask)
        assert all(fragment in str(caught.value) for fragment in ["token_mask", *fragments])


@pytest.mark.parametrize(
    ("logits", "error", "fragments"),
    [
        ([0.0], TypeError, ["tensor", "list"]),
        (torch.zeros(2, 6, 4, dtype=torch.int32), TypeError, ["float32", "torch.int32"]),
        (torch.zeros(4), ValueError, ["tokens, experts", "(4,)"]),
        (torch.zeros(2, 6, 0), ValueError, ["expert", "(2, 6, 0)"]),
    ],
)
def test_logits_of_route(logits, error, fragments):
    with pytest.raises(error) as caught:
        route(logits, 1)
    assert all(fragment in str(caught.value) for fragment in ["logits", *fragments])


@pytest.mark.parametrize(
    ("name", "value", "error", "fragments"),
    [
        *((name, v, e, f) for name in ("top_n", "capacity", "min_expert_capacity") for v, e, *f in COUNTS if v is not None),
        *((name, v, e, f) for name in ("eps", "capacity_factor") for v, e, *f in POSITIVES if v is not None),
        ("eps", None, TypeError, ["number", "NoneType"]),
        ("top_n", 5, ValueError, ["num_gates", "4", "5"]),
        ("policy", "ALL", ValueError, ["random", "threshold", "all", "none", "'ALL'"]),
        ("balance_on", None, ValueError, ["routed", "kept", "None"]),
        ("noise", torch.zeros(2, 6, 3), ValueError, ["(2, 6, 4)", "(2, 6, 3)"]),
        ("noise", torch.zeros(2, 6, 4, dtype=torch.float64), TypeError, ["torch.float32", "torch.float64"]),
        ("noise", 0.5, TypeError, ["torch.float32", "float"]),
        ("noise", torch.zeros(2, 6, 4, device="meta"), ValueError, ["cpu", "meta"]),
        ("draws", torch.zeros(2, 6, 4), ValueError, ["(2, 6, 2)", "(2, 6, 4)"]),
        ("draws", torch.zeros(2, 6, 2).bfloat16(), TypeError, ["torch.float32", "torch.bfloat16"]),
        ("noise_mult", NAN, ValueError, ["finite", "nan"]),
        ("noise_mult", INF, ValueError, ["finite", "inf"]),
        ("noise_mult", "1", TypeError, ["number", "str"]),
        ("generator", 3, TypeError, ["torch.Generator", "int"]),
    ],
)
def test_arguments_of_route(name, value, error, fragments):
    with pytest.raises(error) as caught:
        routed(**{name: value})
    assert type(caught.value) is error
    assert all(fragment in str(caught.value) for fragment in [name, *fragments])


@pytest.mark.parametrize("policy", ["random", "threshold"])
@pytest.mark.parametrize(
    ("threshold", "error", "fragments"),
    [
        *((v, e, f) for v, e, *f in THRESHOLDS),
        (torch.zeros(2), ValueError, ["(3,)", "(2,)"]),
        (torch.ones(3, dtype=torch.int64), ValueError, ["float", "torch.int64"]),
        (torch.zeros(3, device="meta"), ValueError, ["cpu", "meta"]),
        (torch.tensor([0.2, NAN, 0.2]), ValueError, ["NaN", "nan"]),
        (torch.tensor([0.2, 0.2, -0.5]), ValueError, ["negative", "-0.5"]),
    ],
    ids=str,
)
def test_thresholds_of_route(threshold, error, fragments, policy):
    with pytest.raises(error) as caught:
        routed(top_n=3, threshold=threshold, policy=policy)
    assert all(fragment in str(caught.value) for fragment in ["threshold", *fragments])


@pytest.mark.parametrize(
    ("function", "name", "good"), [(topn_gating.dispatch, "x", (2, 6, 5)), (topn_gating.combine, "y", (2, 4, 4, 5))]
)
def test_rows_of_dispatch_and_combine(function, name, good):
    routing = routed()
    function(torch.zeros(good), routing)
    for shape in ((), (5,), good[1:], (3, *good[1:]), (2, good[1] + 1, *good[2:]), (1, *good)):
        with pytest.raises(ValueError, match=re.escape(str(tuple(shape)))) as caught:
            function(torch.zeros(shape), routing)
        assert str(caught.value).startswith(f"{name} must have shape ({', '.join(map(str, good[:-1]))}, features)")
    check(lambda: function(torch.zeros(good, dtype=torch.int32), routing), TypeError, name, "float32", "torch.int32")
    check(lambda: function(None, routing), TypeError, name, "tensor", "NoneType")
    check(lambda: function(torch.zeros(good, device="meta"), routing), ValueError, name, "cpu", "meta")
    check(lambda: function(torch.zeros(good).to_sparse(), routing), TypeError, name, "dense", "torch.sparse_coo")
    for bad in (tuple(routing), None):
        check(lambda bad=bad: function(torch.zeros(good), bad), TypeError, "routing", "topn_gating.Routing", type(bad).__name__)


def test_dtype_of_the_dense_form():
    check(lambda: routed().dense("float32"), TypeError, "dtype", "torch.dtype", "str")
    check(lambda: routed().dense(torch.int32), ValueError, "dtype", "float32", "torch.int32")


def test_first_entry_of_a_threshold_tensor_is_not_read():
    for first in (NAN, -1.0):
        routed(policy="threshold", threshold=torch.tensor([first, 0.2]))


def test_generator_of_another_device():
    with pytest.raises(ValueError, match=r"^generator must be on meta, got cpu$"):
        route(torch.zeros(2, 6, 4, device="meta"), generator=torch.Generator())


def test_numpy_scalars_are_numbers():
    module = TopNGating(
        np.int64(8), np.int32(4), top_n=np.int8(2), min_expert_capacity=np.uint8(4), capacity_factor_train=np.float32(1.25)
    )
    sizes = module.dim, module.num_gates, module.top_n, module.min_expert_capacity, module.capacity_factor_train
    assert sizes == (8, 4, 2, 4, 1.25)
    assert [type(size) for size in sizes] == [int, int, int, int, float]
    routing = routed(top_n=np.int64(2), capacity=np.int16(5), eps=np.float32(1e-9), noise_mult=np.float64(1))
    assert routing.source.shape == (2, 4, 5)
    assert MoE(np.int64(8), np.int64(4), expert_hidden_mult=np.float32(2))(torch.zeros(3, 8)).outputs.shape == (3, 8)


def test_largest_numbers_of_float32_are_finite():
    largest = torch.finfo(torch.float32).max
    for noise_mult in (largest, -largest):
        routed(noise_mult=noise_mult)
    routed(capacity_factor=largest)


def test_arguments_of_moe():
    check(lambda: MoE(8, 4, experts=lambda x: x), TypeError, "experts", "torch.nn.Module", "function")
    check(lambda: MoE(8, 4, shared_experts=[]), TypeError, "shared_experts", "torch.nn.Module", "list")
    check(lambda: MoE(8, 4, gating_top_n=5), ValueError, "top_n", "4", "5")
    check(lambda: MoE(8, 0), ValueError, "at least 1", "0")
    check(lambda: MoE(8, 4, expert_hidden_mult=0), ValueError, "hidden_mult", "above 0", "0")
    check(lambda: topn_gating.Experts(8, 1.5), TypeError, "num_experts", "int", "float")
    for experts in (topn_gating.Experts(8, 5), GLUExperts(9, 4, 6)):
        got = f"dim={experts.dim}, num_experts={experts.num_experts}"
        check(lambda experts=experts: MoE(8, 4, experts=experts), ValueError, "experts", "dim=8, num_experts=4", got)


@pytest.mark.parametrize(
    ("name", "value", "error", "fragments"),
    [
        *((name, v, e, f) for name in ("dim", "num_experts", "hidden") for v, e, *f in COUNTS),
        *(("limit", v, e, f) for v, e, *f in POSITIVES if v is not None),
        ("alpha", NAN, ValueError, ["finite", "nan"]),
        ("alpha", "1", TypeError, ["number", "str"]),
        ("activation", "swish", ValueError, ["callable", "gelu_tanh", "relu", "silu", "'swish'"]),
        ("activation", None, TypeError, ["callable", "str", "NoneType"]),
    ],
)
def test_arguments_of_glu_experts(name, value, error, fragments):
    check(lambda: GLUExperts(**{"dim": 8, "num_experts": 4, "hidden": 6, name: value}), error, name, *fragments)


def test_a_limit_beside_another_activation():
    check(lambda: GLUExperts(8, 4, 6, activation="gelu", limit=7.0), ValueError, "activation", "'silu'", "limit", "'gelu'")


@pytest.mark.parametrize("experts", [topn_gating.Experts(8, 4), GLUExperts(8, 4, 6)], ids=["Experts", "GLUExperts"])
@pytest.mark.parametrize(
    ("args", "error", "fragments"),
    [
        ((None,), TypeError, ["x", "tensor", "NoneType"]),
        ((torch.zeros(4, 5, 8, dtype=torch.int32),), TypeError, ["x", "float32", "torch.int32"]),
        ((torch.zeros(4, 5, 8).bfloat16(),), TypeError, ["x", "torch.float32", "torch.bfloat16"]),
        ((torch.zeros(4, 5, 7),), ValueError, ["x", "(..., 4, capacity, 8)", "offsets", "(4, 5, 7)"]),
        ((torch.zeros(3, 5, 8),), ValueError, ["x", "(..., 4, capacity, 8)", "(3, 5, 8)"]),
        ((torch.zeros(5, 8),), ValueError, ["x", "(..., 4, capacity, 8)", "offsets", "(5, 8)"]),
        ((torch.zeros(5, 7), OFFSETS), ValueError, ["x", "(rows, 8)", "offsets", "(5, 7)"]),
        ((torch.zeros(4, 5, 8), OFFSETS), ValueError, ["x", "(rows, 8)", "offsets", "(4, 5, 8)"]),
        ((torch.zeros(5, 8).bfloat16(), OFFSETS), TypeError, ["x", "torch.float32", "torch.bfloat16"]),
        ((torch.zeros(5, 8), OFFSETS[:3]), ValueError, ["offsets", "(4,)", "(3,)"]),
        ((torch.zeros(5, 8), OFFSETS.long()), TypeError, ["offsets", "torch.int32", "torch.int64"]),
        ((torch.zeros(5, 8), [1, 2, 3, 4]), TypeError, ["offsets", "torch.int32", "list"]),
        ((torch.zeros(5, 8), OFFSETS.to("meta")), ValueError, ["offsets", "cpu", "meta"]),
    ],
)
def test_inputs_of_experts(experts, args, error, fragments):
    with pytest.raises(error) as caught:
        experts(*args)
    assert type(caught.value) is error
    assert all(fragment in str(caught.value) for fragment in fragments)


@pytest.mark.parametrize("options", [{}, {"router_dtype": torch.float32}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_x_of_another_type_than_the_parameters(dtype, options):
    x = torch.zeros(2, 6, 8, dtype=dtype)
    check(lambda: MoE(8, 4, **options)(x), TypeError, "x", "weight", "torch.float32", str(dtype))
    if not options:
        check(lambda: gate()(x), TypeError, "x", "weight", "torch.float32", str(dtype))


def test_a_refused_call_draws_nothing_and_leaves_the_gate_as_it_is():
    module = gate()
    before, state = {k: v.clone() for k, v in module.state_dict().items()}, torch.get_rng_state()
    with pytest.raises(ValueError, match="x must"):
        module(torch.zeros(2, 6, 7), noise_gates=True)
    with pytest.raises(ValueError, match="token_mask must"):
        module(torch.zeros(2, 6, 8), token_mask=torch.ones(3, dtype=torch.bool))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


CHOSEN = {"expert": torch.zeros(2, 6, 3, dtype=torch.int64), "weight": torch.zeros(2, 6, 3), "num_gates": 4}


@pytest.mark.parametrize("dropless", [False, True])
@pytest.mark.parametrize(
    ("options", "error", "fragments"),
    [
        ({"expert": None}, ValueError, ["logits", "expert", "weight", "num_gates"]),
        ({"weight": None}, ValueError, ["weight", "expert"]),
        ({"expert": [[0]]}, TypeError, ["expert", "int32", "int64", "list"]),
        ({"expert": torch.zeros(2, 6, 3)}, TypeError, ["expert", "int32", "int64", "torch.float32"]),
        ({"expert": torch.zeros(2, 6, 3, dtype=torch.int64).to_sparse()}, TypeError, ["expert", "dense", "torch.sparse_coo"]),
        ({"expert": torch.zeros(3, dtype=torch.int32)}, ValueError, ["expert", "(..., tokens, top_n)", "(3,)"]),
        ({"expert": torch.zeros(6, 0, dtype=torch.int32)}, ValueError, ["expert", "rank", "(6, 0)"]),
        ({"expert": torch.full((2, 6, 3), 4)}, ValueError, ["expert", "-1", "3", "num_gates", "4"]),
        ({"expert": torch.full((2, 6, 3), -2)}, ValueError, ["expert", "-1", "3", "num_gates", "-2"]),
        ({"expert": torch.full((2, 6, 3), 2**32 + 1)}, ValueError, ["expert", "-1", "3", "num_gates", str(2**32 + 1)]),
        ({"weight": torch.zeros(2, 6, 2)}, ValueError, ["weight", "(2, 6, 3)", "(2, 6, 2)"]),
        ({"weight": torch.zeros(2, 6, 3, dtype=torch.int32)}, TypeError, ["weight", "float32", "torch.int32"]),
        ({"weight": torch.zeros(2, 6, 3, device="meta")}, ValueError, ["weight", "cpu", "meta"]),
        ({"noise_gates": True}, ValueError, ["noise_gates", "logits"]),
        ({"noise": torch.zeros(2, 6, 4)}, ValueError, ["noise", "logits"]),
        ({"differentiable_topk": True}, ValueError, ["differentiable_topk", "logits"]),
        ({"token_mask": torch.ones(2, 5, dtype=torch.bool)}, ValueError, ["token_mask", "(2, 6)", "(2, 5)"]),
        ({"num_gates": None}, ValueError, ["num_gates", "expert"]),
        *(({"num_gates": v}, e, ["num_gates", *f]) for v, e, *f in COUNTS if v is not None),
    ],
)
def test_given_choices(options, error, fragments, dropless):
    check(lambda: route(**{**CHOSEN, "dropless": dropless, **options}), error, *fragments)


@pytest.mark.parametrize("name", ["weight", "num_gates"])
def test_logits_beside_given_choices(name):
    check(lambda: routed(**{name: CHOSEN[name]}), ValueError, name, "None", "logits")


OF_LOGITS = {"score": "sigmoid", "select_bias": torch.zeros(4), "groups": 2, "top_groups": 1, "normalize": True, "scale": 2.0}


@pytest.mark.parametrize("name", [*OF_LOGITS, "counts", "stats"])
def test_options_of_logits_beside_weights(name):
    value = OF_LOGITS.get(name, True)
    check(lambda: route(**CHOSEN, **{name: value}), ValueError, name, "logits")


@pytest.mark.parametrize(
    ("options", "error", "fragments"),
    [
        ({"score": "tanh"}, ValueError, ["score", "softmax", "sigmoid", "sqrtsoftplus", "'tanh'"]),
        ({"score": "sigmoid", "differentiable_topk": True}, ValueError, ["score", "differentiable_topk", "'sigmoid'"]),
        ({"group_score": "mean"}, ValueError, ["group_score", "top2", "max", "'mean'"]),
        ({"groups": 3}, ValueError, ["groups", "num_gates (4)", "3"]),
        ({"groups": 2, "top_groups": 3}, ValueError, ["top_groups", "groups (2)", "3"]),
        ({"groups": 4, "top_groups": 1}, ValueError, ["top_groups", "top_n (2)", "1"]),
        ({"priority": "first"}, ValueError, ["priority", "'weight'", "None", "'first'"]),
        ({"priority": 3}, TypeError, ["priority", "int"]),
        ({"priority": "weight", "dropless": True}, ValueError, ["priority", "dropless"]),
        ({"balance_ranks": "last"}, ValueError, ["balance_ranks", "first", "all", "'last'"]),
        ({"balance_over": "ranks"}, ValueError, ["balance_over", "group", "batch", "'ranks'"]),
        *(({name: v}, e, [name, *f]) for name in ("groups", "top_groups") for v, e, *f in COUNTS if v is not None),
        *(({"scale": v}, e, ["scale", *f]) for v, e, *f in POSITIVES if v is not None),
    ],
)
def test_options_of_the_router(options, error, fragments):
    check(lambda: routed(**options), error, *fragments)
    check(lambda: gate(**options), error, *fragments)


@pytest.mark.parametrize(
    ("options", "error", "fragments"),
    [
        ({"select_bias": [0.0] * 4}, TypeError, ["select_bias", "torch.float32", "list"]),
        ({"select_bias": torch.zeros(4).double()}, TypeError, ["select_bias", "torch.float32", "torch.float64"]),
        ({"select_bias": torch.zeros(5)}, ValueError, ["select_bias", "(4,)", "(5,)"]),
        ({"select_bias": torch.zeros(4, device="meta")}, ValueError, ["select_bias", "cpu", "meta"]),
        ({"expert": torch.zeros(2, 6, 2)}, TypeError, ["expert", "int32", "torch.float32"]),
        ({"expert": torch.zeros(2, 5, 2, dtype=torch.int32)}, ValueError, ["expert", "(2, 6, 2)", "(2, 5, 2)"]),
        ({"expert": torch.full((2, 6, 2), 4)}, ValueError, ["expert", "-1", "3", "4"]),
        ({"expert": torch.zeros(2, 6, 2, dtype=torch.int32, device="meta")}, ValueError, ["expert", "cpu", "meta"]),
        ({"priority": torch.zeros(2, 6, 3)}, ValueError, ["priority", "(2, 6, 2)", "(2, 6, 3)"]),
        ({"priority": torch.zeros(2, 6, 2).double()}, TypeError, ["priority", "torch.float32", "torch.float64"]),
        ({"priority": torch.zeros(2, 6, 2, device="meta")}, ValueError, ["priority", "cpu", "meta"]),
        ({"priority": torch.zeros(2, 6, 2), "dropless": True}, ValueError, ["priority", "dropless"]),
        ({"counts": [1] * 4}, TypeError, ["counts", "tensor", "list"]),
        ({"counts": torch.ones(2, 5)}, ValueError, ["counts", "(2, 4)", "(4,)", "(2, 5)"]),
        ({"counts": torch.ones(4, device="meta")}, ValueError, ["counts", "cpu", "meta"]),
        ({"counts": torch.ones(4), "balance_on": "kept"}, ValueError, ["counts", "None", "kept"]),
    ],
)
def test_tensors_of_the_router(options, error, fragments):
    check(lambda: routed(**options), error, *fragments)


def test_balancing():
    check(lambda: update_select_bias_(torch.zeros(4).double(), torch.ones(4)), TypeError, "bias", "torch.float32")
    check(lambda: update_select_bias_(torch.zeros(2, 4), torch.ones(4)), ValueError, "bias", "(experts,)")
    check(lambda: update_select_bias_(torch.zeros(4), torch.ones(5)), ValueError, "load", "(4,)", "(5,)")
    check(lambda: update_select_bias_(torch.zeros(4), [1.0] * 4), TypeError, "load", "list")
    check(lambda: update_select_bias_(torch.zeros(4), torch.ones(4), 0.0), ValueError, "rate", "0")
    check(lambda: with_loss([1.0], torch.ones(())), TypeError, "tensor", "list")
    check(lambda: with_loss(torch.ones(3), torch.ones(2)), ValueError, "loss", "()", "(2,)")
    check(lambda: with_loss(torch.ones(3), torch.ones(()), -1.0), ValueError, "scale", "-1")


def test_statistics():
    check(lambda: routed().stats(), ValueError, "stats()", "stats=True")
    check(lambda: stack_stats([]), ValueError, "layers", "none")
    check(lambda: stack_stats([routed()]), TypeError, "layers", "RoutingStats", "Routing")


@pytest.mark.parametrize("name", ["capacity", "capacity_factor", "min_expert_capacity"])
def test_a_capacity_beside_dropless(name):
    check(lambda: routed(dropless=True, **{name: 4}), ValueError, name, "dropless", "4")


@pytest.mark.parametrize(("value", "error", "fragments"), [(v, e, f) for v, e, *f in COUNTS])
def test_align(value, error, fragments):
    check(lambda: routed(dropless=True, align=value), error, "align", *fragments)
    check(lambda: gate(dropless=True, align=value), error, "align", *fragments)
    check(lambda: routed().as_dropless(value), error, "align", *fragments)


def test_align_without_dropless():
    check(lambda: routed(align=8), ValueError, "align", "dropless", "8")
    check(lambda: gate(align=8), ValueError, "align", "dropless", "8")


def test_dropless_has_no_dense_form():
    check(lambda: routed(dropless=True).dense(), ValueError, "dense", "dropless", "dispatch", "combine")
    check(lambda: gate(dropless=True)(torch.zeros(6, 8)), ValueError, "forward", "dropless", "route")


@pytest.mark.parametrize("shape", [(35, 5), (1, 36, 5), (36,)])
def test_rows_of_a_dropless_routing(shape):
    routing = routed(dropless=True, top_n=3)
    check(lambda: routing.combine(torch.zeros(shape)), ValueError, "y", "(36, features)", str(shape))


# The raw operators, torch.ops.topn_gating.*: valid arguments, then one of them spoilt.

PAIRS, SLOTS = torch.zeros(2, 6, 3, dtype=torch.int32), torch.full((2, 4, 5), -1, dtype=torch.int32)
LOGITS, WEIGHT, X, Y = torch.zeros(2, 6, 4), torch.zeros(2, 6, 3), torch.zeros(2, 6, 7), torch.zeros(2, 4, 5, 7)
MASK, DENSE, SUMS, COUNT = torch.ones(2, 6, dtype=torch.bool), torch.zeros(2, 6, 4, 5), torch.zeros(2, 4), SLOTS[..., 0].clone()
SCALAR, ROWS, ENDS = torch.zeros(()), torch.full((64,), -1, dtype=torch.int32), torch.tensor([8, 8, 16, 24], dtype=torch.int32)
Y_ROWS = torch.zeros(64, 7)
OPERATORS = {  # by name; after it the layout, if it is not the first
    "gate": (LOGITS, LOGITS.clone(), MASK, torch.zeros(4), PAIRS, 3, *GateOptions(1e-9), True, True),
    "gate_backward": (WEIGHT, SUMS, SCALAR, SCALAR, LOGITS, LOGITS.clone(), MASK, PAIRS, COUNT, *GateOptions(1e-9)),
    "assign": (WEIGHT, PAIRS, WEIGHT.clone(), torch.zeros(3), MASK, WEIGHT.clone(), 4, 5, 1, 0, 1e-9),
    "assign dropless": (WEIGHT, PAIRS, WEIGHT.clone(), torch.zeros(3), MASK, None, 4, None, 8, 0, 1e-9),
    "assign_backward": (WEIGHT, PAIRS),
    "dense": (WEIGHT, PAIRS, PAIRS, SLOTS, torch.float32, True),
    "dense_backward": (DENSE, DENSE, PAIRS, PAIRS, SLOTS),
    "dispatch": (X, WEIGHT, PAIRS, PAIRS, SLOTS, None, True),
    "dispatch dropless": (X, WEIGHT, PAIRS, PAIRS, ROWS, ENDS, True),
    "dispatch_backward": (Y, X, PAIRS, PAIRS, SLOTS, None),
    "dispatch_backward dropless": (Y_ROWS, X, PAIRS, PAIRS, ROWS, ENDS),
    "combine": (Y, WEIGHT, PAIRS, PAIRS, SLOTS, None),
    "combine dropless": (Y_ROWS, WEIGHT, PAIRS, PAIRS, ROWS, ENDS),
    "combine_backward": (X, Y, WEIGHT, PAIRS, PAIRS, SLOTS, None),
    "combine_backward dropless": (X, Y_ROWS, WEIGHT, PAIRS, PAIRS, ROWS, ENDS),
}


# Sizes that nothing else fixes: features, experts, slots and rows of `dense` and `dispatch`, (operator, argument, dimension).
FREE = {("dense", 3, 1), ("dense", 3, 2), ("dispatch", 0, 2), ("dispatch", 4, 1), ("dispatch", 4, 2), ("combine", 0, 3)}
FREE |= {("dispatch dropless", 0, 2), ("dispatch dropless", 4, 0), ("dispatch dropless", 5, 0), ("combine dropless", 0, 1)}
FREE |= {("dispatch_backward dropless", 5, 0), ("combine dropless", 5, 0), ("combine_backward dropless", 6, 0)}


def spoilt(name, i):
    """Tensors in the place of argument ``i`` that do not fit the others: type, number of dimensions, each size."""
    t = OPERATORS[name][i]
    yield t.to(torch.int64 if t.dtype == torch.int32 else torch.int32)
    yield t.to(torch.complex64)
    yield t.unsqueeze(0)
    for dim in range(t.dim()):
        yield t.select(dim, 0)
        if (name, i, dim) not in FREE:
            yield torch.cat([t, t.narrow(dim, 0, 1)], dim)


def overload(name):
    return getattr(torch.ops.topn_gating, name.removesuffix(" dropless")).default


def operator_with(name, i, value, device):
    """Calls the operator with argument ``i`` replaced."""
    args = OPERATORS[name]
    args = (a.to(device) if isinstance(a, torch.Tensor) else a for a in (*args[:i], value, *args[i + 1 :]))
    return overload(name)(*args)


# On the meta device run the operators without data, which compilers ask for shapes.
kernels_and_fakes = pytest.mark.parametrize("device", ["cpu", "meta"])


@kernels_and_fakes
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_refuse_tensors_that_do_not_fit(name, device):
    for i, t in enumerate(OPERATORS[name]):
        if isinstance(t, torch.Tensor):
            operator_with(name, i, t, device)
            for bad in spoilt(name, i):
                with pytest.raises(RuntimeError, match=r" must | shape"):
                    operator_with(name, i, bad, device)


@pytest.mark.parametrize("name", OPERATORS)
def test_results_without_data_have_the_shapes_and_types_of_the_kernels(name):
    results = [operator_with(name, 0, OPERATORS[name][0], device) for device in ("cpu", "meta")]
    for t, meta in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in results), strict=True):
        assert (meta.shape, meta.dtype, meta.device.type) == (t.shape, t.dtype, "meta")


@kernels_and_fakes
@pytest.mark.parametrize(
    ("name", "i", "values", "message"),
    [
        ("gate", 5, (0, -1, 5, 2**40), "top_n"),
        ("gate", 9, (-1, 3, 2**40), "score"),
        ("gate", 10, (0, -1, 3, 5, 2**40), "expert_groups"),
        ("gate", 11, (0, -1, 2, 2**40), "top_groups"),
        ("gate", 12, (-1, 2, 2**40), "group_score"),
        ("assign", 6, (0, -1), "num_gates"),
        ("assign", 7, (0, -1, 2**31, 2**62), "capacity"),
        ("assign", 8, (0, -1, 2**31), "align"),
        ("assign dropless", 8, (0, -1, 2**31, 2**62), "align must be from 1 to"),
        ("assign dropless", 8, (2**30, 2**31 - 1), "must be below 2.31, rounded up"),
        ("assign dropless", 6, (0, -1, 2**31), "num_gates"),
        ("assign", 9, (-1, 4), "policy"),
        ("assign dropless", 5, (WEIGHT,), "keys must be left out"),
        ("assign", 2, (None,), "draws"),
        ("assign", 3, (None,), "threshold"),
        ("dense", 4, (torch.int32, torch.complex64), "float"),
    ],
)
def test_operators_refuse_numbers_out_of_range(name, i, values, message, device):
    for value in values:
        with pytest.raises(RuntimeError, match=message):
            operator_with(name, i, value, device)


@pytest.mark.parametrize("name", [name for name in OPERATORS if "expert" in str(overload(name)._schema)])
def test_operators_survive_any_index(name):
    args = [
        torch.randint(-(2**31), 2**31 - 1, a.shape, dtype=torch.int32)
        if isinstance(a, torch.Tensor) and a.dtype == torch.int32
        else a
        for a in OPERATORS[name]
    ]
    overload(name)(*args)
