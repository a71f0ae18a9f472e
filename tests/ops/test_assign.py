"""``assign``: threshold masking and slots, bit for bit against the reference and against the walk of docs/spec.md."""

import math
from dataclasses import replace

import pytest
import torch
from cases import (
    INT_MAX,
    INT_MIN,
    LAYOUTS,
    AssignCase,
    AssignResult,
    assign_case,
    check_assignment,
    check_dropless,
    layouts,
    random_keys,
)
from compare import assert_same_bits, assert_same_for_any_schedule, spread

from topn_gating.ops import POLICIES

pytestmark = pytest.mark.usefixtures("nan_memory")

policies = pytest.mark.parametrize("policy", POLICIES)
compute_types = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def walk(case: AssignCase) -> AssignResult:
    """docs/spec.md, steps 7 and 8, as they read, pair by pair; experts out of range are not routed. One group."""
    tokens, top_n = case.weight.shape
    queues: list[list[tuple[int, int]]] = [[] for _ in range(case.num_gates)]
    for k in range(top_n):
        for n in range(tokens):
            w, e = case.weight[n, k], int(case.expert[n, k])
            if k == 0 or case.policy == "all":
                routed = True
            elif case.policy == "random":
                routed = bool(case.draws[n, k] < w / case.threshold[k].clamp(min=case.eps))
            else:
                routed = case.policy == "threshold" and bool(w > case.threshold[k])
            if not routed or not 0 <= e < case.num_gates or (case.mask is not None and not case.mask[n]):
                continue
            queues[e].append((n, k))
    slot, source = torch.full((tokens, top_n), -1), torch.full((case.num_gates, case.capacity), -1)
    for e, queue in enumerate(queues):
        held = queue[: case.capacity]
        if case.keys is not None:
            key = {pair: float(case.keys[pair]) for pair in queue}
            first_the_largest = sorted(queue, key=lambda pair: (math.isnan(key[pair]), -key[pair]))  # stable
            held = [pair for pair in queue if pair in set(first_the_largest[: case.capacity])]
        for n, k in queue:
            slot[n, k] = -2
        for c, (n, k) in enumerate(held):
            slot[n, k], source[e, c] = c, n * top_n + k
    kept = case.weight.where(slot >= 0, 0)
    integers = slot, source, torch.tensor([len(queue) for queue in queues]), torch.empty(0)
    return AssignResult(kept, *(t.int() for t in integers))


aligns = pytest.mark.parametrize("align", [1, 8, 16])
any_layout = pytest.mark.parametrize("layout", [*LAYOUTS.values(), {"keys": True}], ids=[*LAYOUTS, "by keys"])
some_layouts = pytest.mark.parametrize(
    "layout", [{}, LAYOUTS["dropless 8"], {"keys": True}], ids=["capacity", "dropless 8", "by keys"]
)
by_keys = pytest.mark.parametrize("keys", [False, True], ids=["in order", "by keys"])


@policies
@compute_types
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("top_n", [1, 2, 3, 4, 5])
@by_keys
def test_equals_the_reference(backend, policy, dtype, mask, top_n, keys):
    for tokens, experts, capacity in ((1, 5, 1), (7, 5, 2), (33, 6, 33), (64, 9, 8), (130, 16, 5), (257, 40, 11)):
        case = assign_case((3, tokens), experts, top_n, capacity, policy, dtype=dtype, mask=mask, keys=keys)
        out = case.run(backend)
        assert_same_bits(out, case.oracle())
        check_assignment(case, out)


@policies
@pytest.mark.parametrize(
    ("groups", "tokens", "experts", "top_n", "capacity"),
    [
        (1, 5000, 16, 2, 390),
        (1, 5000, 3, 3, 5000),
        (1, 4999, 1, 1, 7),
        (1, 5001, 64, 5, 1),
        (1, 2048, 1024, 2, 4),
        (2, 4096, 257, 3, 20),
        (300, 17, 8, 2, 4),
        (300, 1, 4, 4, 1),
        (40, 129, 12, 3, 14),
    ],
)
def test_one_long_group_and_many_short_ones(backend, policy, groups, tokens, experts, top_n, capacity):
    case = assign_case((groups, tokens), experts, top_n, capacity, policy, mask=True)
    assert_same_bits(case.run(backend), case.oracle())


@compute_types
@pytest.mark.parametrize(
    ("groups", "tokens", "experts", "top_n", "capacity"),
    [
        (1, 5000, 16, 2, 390),
        (1, 4999, 1, 1, 7),
        (1, 5001, 40, 5, 1),
        (1, 600, 601, 2, 1),
        (2, 1025, 30, 3, 20),
        (300, 17, 8, 2, 4),
        (300, 1, 4, 4, 1),
    ],
)
def test_keys_of_one_long_group_and_many_short_ones(backend, dtype, groups, tokens, experts, top_n, capacity):
    case = assign_case((groups, tokens), experts, top_n, capacity, "random", dtype=dtype, mask=True, keys=True)
    assert_same_bits(case.run(backend), case.oracle())


@policies
@compute_types
@aligns
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("top_n", [1, 2, 5])
def test_dropless_equals_the_reference(backend, policy, dtype, align, mask, top_n):
    for tokens, experts in ((1, 5), (7, 5), (33, 6), (130, 16), (257, 40), (90, 300)):
        case = assign_case((3, tokens), experts, top_n, None, policy, dtype=dtype, mask=mask, align=align)
        out = case.run(backend)
        assert_same_bits(out, case.oracle())
        check_dropless(case, out)


@pytest.mark.parametrize(("policy", "align"), [("random", 1), ("all", 1), ("threshold", 16)])
@pytest.mark.parametrize(
    ("lead", "experts", "top_n"),
    [((5000,), 16, 2), ((1, 4999), 1, 1), ((2, 2500), 64, 5), ((2048,), 1024, 2), ((300, 17), 8, 2), ((4000, 1), 4, 4)],
)
def test_dropless_has_one_long_group(backend, policy, align, lead, experts, top_n):
    case = assign_case(lead, experts, top_n, None, policy, mask=True, align=align)
    out = case.run(backend)
    assert_same_bits(out, case.oracle())
    check_dropless(case, out)


@policies
@compute_types
@pytest.mark.parametrize("capacity", [1, 2, 9, 40])
@by_keys
def test_equals_the_walk(backend, policy, dtype, capacity, keys):
    case = assign_case((40,), 5, 4, capacity, policy, dtype=dtype, mask=True, keys=keys)
    assert_same_bits(case.run(backend), walk(case))


@policies
@any_layout
def test_any_expert_in_a_direct_call(backend, policy, layout):
    case = assign_case((60,), 6, 3, **{"capacity": 7, **layout}, policy=policy, mask=True)
    case.expert = torch.randint(6, (60, 3), dtype=torch.int32)  # a token may name one expert twice
    wrong = torch.rand(60, 3) < 0.4
    evil = torch.tensor([INT_MIN, INT_MIN + 1, -2, -1, 6, 7, 2**24, INT_MAX], dtype=torch.int32)
    case.expert[wrong] = evil[torch.randint(len(evil), (int(wrong.sum()),))]
    out = case.run(backend)
    assert_same_bits(out, case.oracle() if case.capacity is None else walk(case))
    assert (out.slot[wrong] == -1).all()


def test_every_token_wants_one_expert(backend):
    case = AssignCase(torch.rand(1, 3000, 1), torch.full((1, 3000, 1), 2, dtype=torch.int32), 4, 2500)
    out = case.run(backend)
    assert_same_bits(out.slot[0, :, 0], torch.cat([torch.arange(2500), torch.full((500,), -2)]).int())
    assert out.demand.tolist() == [[0, 0, 3000, 0]]
    out = replace(case, capacity=None, align=8).run(backend)
    assert_same_bits(out.slot[0, :, 0], torch.arange(3000).int())
    assert out.demand.tolist() == [0, 0, 3000, 0]
    assert out.offsets.tolist() == [0, 0, 3000, 3000]


def test_later_ranks_queue_behind_all_earlier_ones(backend):
    """Peers that offset a rank by the one before it alone put three tokens in one slot here (docs/spec.md, deviation D2)."""
    expert = torch.tensor([[0, 1, 2], [1, 0, 2], [1, 2, 0]], dtype=torch.int32)
    out = AssignCase(torch.rand(3, 3), expert, 3, 4).run(backend)
    assert out.slot.tolist() == [[0, 2, 1], [0, 1, 2], [1, 0, 2]]
    assert out.source.tolist() == [[0, 4, 8, -1], [3, 6, 1, -1], [7, 2, 5, -1]]


def test_the_largest_keys_hold_the_slots(backend):
    """Slots stay in the order of ranks and tokens; of equal keys the lower rank's is kept, then the earlier token's."""
    expert = torch.tensor([[0, 1], [0, 1], [1, 0], [0, 1]], dtype=torch.int32)
    keys = torch.tensor([[0.1, 0.5], [0.9, 0.5], [0.5, 0.5], [0.5, 0.9]])
    out = AssignCase(torch.rand(4, 2), expert, 2, 2, keys=keys).run(backend)
    assert out.slot.tolist() == [[-2, -2], [0, -2], [0, -2], [1, 1]]
    assert out.source.tolist() == [[2, 6], [4, 7]]
    assert out.demand.tolist() == [[4], [4]] or out.demand.tolist() == [4, 4]


@compute_types
def test_keys_of_every_size(backend, dtype):
    """Every binade decides, and both signs; -0 is 0, and a NaN comes after all numbers."""
    big = torch.finfo(dtype).max
    tiny = torch.finfo(dtype).tiny / 4
    ladder = [*(float("nan"), -math.inf, -big, -2.0, -1.0, -tiny, 0.0, -0.0, tiny, 1e-5, 1.0, 1.5, 2.0, big, math.inf)]
    keys = torch.tensor(ladder, dtype=dtype)[:, None]
    for order in (torch.arange(15), torch.arange(15).flip(0), torch.randperm(15)):
        for capacity in range(1, 15):
            case = AssignCase(
                torch.rand(15, 1, dtype=dtype), torch.zeros(15, 1, dtype=torch.int32), 1, capacity, keys=keys[order]
            )
            assert_same_bits(case.run(backend), walk(case))


def test_keys_do_nothing_where_there_is_room(backend):
    case = assign_case((2, 300), 5, 3, 300, "random", mask=True, keys=True)
    assert_same_bits(case.run(backend), replace(case, keys=None).run(backend))


def test_dropless_ranks_queue_with_their_token(backend):
    expert = torch.tensor([[0, 1, 2], [1, 0, 2], [1, 2, 0]], dtype=torch.int32)
    out = AssignCase(torch.rand(3, 3), expert, 3, None, align=4).run(backend)
    assert out.slot.tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]
    assert out.source.tolist() == [*(0, 4, 8, -1), *(1, 3, 6, -1), *(2, 5, 7, -1), *(-1,) * 8]
    assert out.offsets.tolist() == [4, 8, 12]


def test_comparisons_are_strict(backend):
    weight, expert = torch.tensor([[0.5, 0.25], [0.5, 0.25]]), torch.tensor([[0, 1], [0, 1]], dtype=torch.int32)
    at, above = torch.tensor([0.0, 0.25]), torch.tensor([0.0, 0.25]).nextafter(torch.tensor(-1.0))
    assert AssignCase(weight, expert, 2, 4, "threshold", threshold=at).run(backend).slot[:, 1].tolist() == [-1, -1]
    assert AssignCase(weight, expert, 2, 4, "threshold", threshold=above).run(backend).slot[:, 1].tolist() == [0, 1]
    draws = torch.tensor([[0.9, 0.5], [0.9, 0.5 - 2**-25]])
    case = AssignCase(weight, expert, 2, 4, "random", draws=draws, threshold=torch.tensor([9.0, 0.5]))
    assert case.run(backend).slot.tolist() == [[0, -1], [1, 0]]


def test_threshold_of_zero_is_eps(backend):
    case = assign_case((50,), 4, 3, 20, "random")
    case.weight *= torch.tensor([1, 1e-9, 0])
    case.threshold = torch.tensor([0, 0, 0.0])
    out = case.run(backend)
    assert_same_bits(out, case.oracle())
    assert (out.slot[:, 1] >= 0).any()
    assert (out.slot[:, 1] == -1).any()
    assert (out.slot[:, 2] == -1).all()


@policies
def test_weights_that_are_no_numbers(backend, policy):
    """Rank 0 is routed whatever its weight; a NaN passes no threshold, and no other token notices."""
    case = assign_case((30,), 5, 3, 4, policy)
    case.weight[torch.rand(30) < 0.3] = float("nan")
    case.weight[7] = float("inf")
    out = case.run(backend)
    assert_same_bits(out, walk(case))
    assert (out.slot[:, 0] != -1).all()


@pytest.mark.parametrize(
    ("policy", "operand"),
    [("random", "draws"), ("random", "weight"), ("random", "threshold"), ("threshold", "weight"), ("threshold", "threshold")],
)
@compute_types
def test_nan_is_not_routed(backend, policy, operand, dtype):
    """A NaN in any operand of the comparison: ranks above 0 are not routed."""
    case = assign_case((40,), 5, 3, 20, policy, dtype=dtype)
    tensor = getattr(case, operand)
    tensor[..., 1] = float("nan")
    tensor[..., 2] = {"draws": 0, "weight": 1, "threshold": 0}[operand]
    out = case.run(backend)
    assert_same_bits(out, walk(case))
    assert_same_bits(out, case.oracle())
    assert (out.slot[:, 1] == -1).all()
    assert (out.slot[:, 2] != -1).all()


def test_policies_ignore_what_they_do_not_need(backend):
    case = assign_case((2, 30), 5, 3, 4, "random")
    for policy in ("all", "none"):
        lean = replace(case, policy=policy, draws=None, threshold=None)
        assert_same_bits(replace(case, policy=policy).run(backend), lean.run(backend))


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3)])
def test_dropless_leading_dimensions_are_one_sequence(backend, lead):
    case = assign_case((*lead, 20), 5, 3, None, "random", mask=True)
    out = case.run(backend)
    names = "weight", "expert", "draws"
    flat = replace(case, **{name: getattr(case, name).flatten(0, -2) for name in names}, mask=case.mask.flatten()).run(backend)
    assert_same_bits([t.flatten() for t in out], [t.flatten() for t in flat])


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3)])
def test_leading_dimensions_are_groups(backend, lead):
    case = assign_case((*lead, 20), 5, 3, 4, "random", mask=True)
    out = case.run(backend)
    assert out.source.shape == (*lead, 5, 4)
    assert out.demand.shape == (*lead, 5)
    assert_same_bits(out, case.oracle())


@policies
@any_layout
@pytest.mark.parametrize("lead", [(0,), (3, 0), (0, 4), (2, 0, 4)])
def test_nothing_to_assign(backend, policy, lead, layout):
    case = assign_case(lead, 5, 2, **{"capacity": 3, **layout}, policy=policy, mask=True)
    assert_same_bits(case.run(backend), case.oracle())


@any_layout
def test_all_padding(backend, layout):
    case = replace(assign_case((2, 20), 5, 3, **{"capacity": 4, **layout}), mask=torch.zeros(2, 20, dtype=torch.bool))
    kept, slot, source, demand, offsets = case.run(backend)
    assert (slot == -1).all()
    assert (source == -1).all()
    assert not kept.any()
    assert not demand.any()
    assert not offsets.any()


@layouts
def test_any_layout_of_memory(backend, layout):
    case = assign_case((3, 20), 5, 3, **{"capacity": 4, **layout}, policy="random", mask=True)
    if case.capacity is not None:
        case.keys = random_keys(case.weight.shape, case.weight.dtype)
    names = "weight", "expert", "draws", "threshold", "mask", "keys"
    strided = replace(case, **{name: spread(getattr(case, name)) for name in names if getattr(case, name) is not None})
    assert_same_bits(strided.run(backend), case.run(backend))
    expanded = replace(case, weight=case.weight[:1].expand(3, -1, -1), expert=case.expert[:1].expand(3, -1, -1))
    full = replace(case, weight=expanded.weight.contiguous(), expert=expanded.expert.contiguous())
    assert_same_bits(expanded.run(backend), full.run(backend))


@compute_types
def test_gradient_reaches_kept_weights_alone(backend, dtype):
    case = assign_case((3, 40), 5, 3, 4, "threshold", dtype=dtype)
    slot = case.run(backend).slot
    grad = torch.randn(slot.shape, dtype=dtype)
    grad[slot < 0] = float("nan")
    expected = grad.where(slot >= 0, 0)
    assert expected.any()
    assert_same_bits(backend("assign_backward", grad, slot), expected)
    assert_same_bits(backend("assign_backward", spread(grad), spread(slot)), expected)
    one = torch.ones((), dtype=dtype).expand(slot.shape)
    assert_same_bits(backend("assign_backward", one, slot), (slot >= 0).to(dtype))


@policies
@any_layout
def test_gradcheck(entry_point, device, policy, layout):
    case = assign_case((2, 6), 4, 3, **{"capacity": 2, **layout}, policy=policy, dtype=torch.float64)
    weight, *rest = (a.to(device) if isinstance(a, torch.Tensor) else a for a in case.args)
    assert torch.autograd.gradcheck(lambda w: entry_point("assign")(w, *rest)[0], weight.requires_grad_())
    assert [t.requires_grad for t in entry_point("assign")(weight, *rest)] == [True, False, False, False, False]


@policies
@compute_types
@pytest.mark.parametrize("mask", [False, True])
@some_layouts
def test_opcheck(device, policy, dtype, mask, layout):
    case = assign_case((2, 6), 4, 3, **{"capacity": 2, **layout}, policy=policy, dtype=dtype, mask=mask)
    weight, *rest = (a.to(device) if isinstance(a, torch.Tensor) else a for a in case.args)
    torch.library.opcheck(torch.ops.topn_gating.assign.default, (weight.requires_grad_(), *rest))


@pytest.mark.parametrize("lead", [(1, 40001), (7, 6000), (900, 50)])
@some_layouts
def test_same_for_any_schedule(backend, lead, layout):
    case = assign_case(lead, 16, 3, **{"capacity": max(4, lead[-1] // 8), **layout}, policy="random", mask=True)
    grad = torch.randn_like(case.weight)
    assert_same_for_any_schedule(lambda: (*(out := case.run(backend)), backend("assign_backward", grad, out.slot)))
