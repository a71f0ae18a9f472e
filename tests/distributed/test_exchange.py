"""MoE(expert_group=...) against the same layer in one process: outputs, gradients, both layouts."""

import copy
import functools
import io
import itertools

import pytest
import torch
import torch.distributed as dist
from layers import (
    DIM,
    EXPERTS,
    GROUPS,
    TOKENS,
    Traffic,
    backward,
    compare,
    load_part,
    part_of,
    tokens_of,
    weighted,
    whole_layer,
)
from ranks import results
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from topn_gating import Experts, GLUExperts, MixtureOfExpertsReturn, MoE
from topn_gating.distributed import ExpertGroup

HALF = {"rtol": 3e-2, "atol": 3e-2}


def on_rank(rank, world, dtype, layer_options, options):
    part = part_of(whole_layer(dtype, **layer_options), rank, world, dtype=dtype, **layer_options, **options)
    return backward(part, tokens_of(rank, dtype))


@pytest.mark.parametrize("world", [2, 4])
def test_outputs_equal_those_of_one_process_to_the_bit(world):
    ranks = results(world, on_rank, world, None, {}, {})
    outputs = whole_layer()(torch.cat([tokens_of(rank) for rank in range(world)])).outputs
    assert torch.equal(torch.cat([rank[0] for rank in ranks]), outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dropless", [False, True])
@pytest.mark.parametrize("world", [2, 4])
def test_equals_one_process(world, dropless, dtype):
    ranks = results(world, on_rank, world, dtype, {"dropless": dropless}, {})
    xs = [tokens_of(rank, dtype) for rank in range(world)]
    compare(ranks, whole_layer(dtype, dropless=dropless), xs, HALF if dtype.itemsize == 2 else None)


@pytest.mark.parametrize("chunks", [2, 3, 1000])
def test_chunks(chunks):
    ranks = results(2, on_rank, 2, None, {}, {"chunks": chunks})
    compare(ranks, whole_layer(), [tokens_of(rank) for rank in range(2)])


def of_torch(rows, output_splits, input_splits):
    """An exchange that is not ours."""
    output = rows.new_empty(sum(output_splits), *rows.shape[1:])
    return dist.nn.all_to_all_single(output, rows.contiguous(), output_splits, input_splits)


@pytest.mark.parametrize(("layer_options", "chunks"), [({}, 1), ({}, 2), ({"dropless": True}, 1)], ids=str)
def test_other_exchange(layer_options, chunks):
    ranks = results(2, on_rank, 2, None, layer_options, {"exchange": of_torch, "chunks": chunks})
    compare(ranks, whole_layer(**layer_options), [tokens_of(rank) for rank in range(2)])


# Options and inputs, each in both layouts.

OPTIONS = {
    "router of DeepSeek-V3": {"score": "sigmoid", "select_bias": True, "groups": 4, "top_groups": 2, "scale": 2.5},
    "drops": {"capacity_factor_train": 0.5, "min_expert_capacity": 1},
    "priority": {"priority": "weight", "capacity_factor_train": 0.5, "min_expert_capacity": 1},
    "eight of eight": {"gating_top_n": 8},
    "one expert": {"gating_top_n": 1},
    "soft top-n": {"differentiable_topk": True},
}


def with_options(rank, options):
    return backward(part_of(whole_layer(**options), rank, 2, **options), tokens_of(rank))


@pytest.mark.parametrize(("name", "dropless"), [*itertools.product(OPTIONS, (False, True))])
def test_router_options(name, dropless):
    options = {n: v for n, v in OPTIONS[name].items() if not dropless or n not in ("priority",)} | {"dropless": dropless}
    compare(results(2, with_options, options), whole_layer(**options), [tokens_of(rank) for rank in range(2)])


SHAPES = {
    "one token": [((), 1)] * 2,
    "no group": [((), TOKENS)] * 2,
    "groups of groups": [((2, 3), 5)] * 2,
    "without groups": [((0,), TOKENS)] * 2,
    "without tokens": [((GROUPS,), 0)] * 2,
}
UNEQUAL = {
    "a rank without tokens": [((GROUPS,), 0), ((GROUPS,), TOKENS)],
    "unequal tokens": [((GROUPS,), 3), ((GROUPS,), TOKENS)],
}
UNEQUAL_GROUPS = {"unequal groups": [((3,), TOKENS), ((), 7)], "a rank without groups": [((0,), TOKENS), ((GROUPS,), TOKENS)]}


def with_shapes(rank, shapes, options):
    lead, n = shapes[rank]
    return backward(part_of(whole_layer(**options), rank, 2, **options), tokens_of(rank, lead=lead, n=n))


def compare_shapes(shapes, options):
    xs = [tokens_of(rank, lead=lead, n=n) for rank, (lead, n) in enumerate(shapes)]
    compare(results(2, with_shapes, shapes, options), whole_layer(**options), xs)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name):
    compare_shapes(SHAPES[name], {})


@pytest.mark.parametrize("name", UNEQUAL)
def test_max_tokens(name):
    compare_shapes(UNEQUAL[name], {"max_tokens": TOKENS})


@pytest.mark.parametrize("name", SHAPES | UNEQUAL | UNEQUAL_GROUPS)
def test_dropless_shapes(name):
    compare_shapes((SHAPES | UNEQUAL | UNEQUAL_GROUPS)[name], {"dropless": True})


def padding(rank, kind):
    if kind == "all of rank 0":
        return torch.full((GROUPS, TOKENS), rank == 1)
    return torch.arange(TOKENS).expand(GROUPS, -1) < 5 + 9 * rank


def with_padding(rank, kind, options):
    return backward(part_of(whole_layer(**options), rank, 2, **options), tokens_of(rank), token_mask=padding(rank, kind))


@pytest.mark.parametrize("kind", ["some", "all of rank 0"])
@pytest.mark.parametrize("options", [{}, {"dropless": True}], ids=str)
def test_padding(kind, options):
    ranks = results(2, with_padding, kind, options)
    masks = [padding(rank, kind) for rank in range(2)]
    compare(ranks, whole_layer(**options), [tokens_of(rank) for rank in range(2)], masks=masks)


def one_way(rank, options):
    """All tokens go to the experts of rank 0: rank 1 computes nothing."""
    part = part_of(whole_layer(**options), rank, 2, **options)
    x = tokens_of(rank)
    expert = torch.arange(2).expand(GROUPS, TOKENS, 2).contiguous()
    return backward(part, x, expert=expert)


@pytest.mark.parametrize("options", [{}, {"dropless": True}], ids=str)
def test_a_rank_whose_experts_have_no_rows(options):
    whole = whole_layer(**options)
    expert = torch.arange(2).expand(GROUPS, TOKENS, 2).contiguous()
    compare(
        results(2, one_way, options),
        whole,
        [tokens_of(rank) for rank in range(2)],
        call=functools.partial(whole, expert=expert),
    )


# Modes of torch


def called(kind, moe):
    if kind == "checkpoint":
        return lambda x: checkpoint(moe, x, use_reentrant=False)
    if kind == "checkpoint, reentrant":
        return lambda x: MixtureOfExpertsReturn(*checkpoint(moe, x, use_reentrant=True))
    if kind == "eval":
        moe.eval()
    if kind == "autocast":
        return torch.autocast("cpu", dtype=torch.bfloat16)(moe)
    return moe


def in_mode(rank, kind, options):
    part = part_of(whole_layer(**options), rank, 2, **options)
    return backward(part, tokens_of(rank), call=called(kind, part))


@pytest.mark.parametrize("kind", ["checkpoint", "checkpoint, reentrant", "eval", "autocast"])
@pytest.mark.parametrize("options", [{}, {"dropless": True}], ids=str)
def test_modes(kind, options):
    whole = whole_layer(**options)
    xs = [tokens_of(rank) for rank in range(2)]
    compare(results(2, in_mode, kind, options), whole, xs, HALF if kind == "autocast" else None, call=called(kind, whole))


def compiled(rank, backend, options):
    part = part_of(whole_layer(), rank, 2, **options)
    call = torch.compile(part, backend=backend, fullgraph=True)
    backward(part, tokens_of(rank), call=call)
    part.zero_grad()
    with torch.compiler.set_stance("fail_on_recompile"):
        return backward(part, tokens_of(rank), call=call)


@pytest.mark.parametrize(("backend", "options"), [("aot_eager", {}), ("aot_eager", {"chunks": 2}), ("inductor", {"chunks": 2})])
def test_compile_makes_one_graph(backend, options):
    compare(results(2, compiled, backend, options, timeout=100), whole_layer(), [tokens_of(rank) for rank in range(2)])


def compiled_in_parts(rank, dropless, options):
    part = part_of(whole_layer(dropless=dropless), rank, 2, dropless=dropless, **options)
    return backward(part, tokens_of(rank), call=torch.compile(part, backend="aot_eager"))


@pytest.mark.parametrize(("dropless", "options"), [(True, {}), (False, {"check": "always"})])
def test_compile_with_a_break_where_the_host_waits(dropless, options):
    ranks = results(2, compiled_in_parts, dropless, options, timeout=100)
    compare(ranks, whole_layer(dropless=dropless), [tokens_of(rank) for rank in range(2)])


def by_functional_grad(rank):
    part = part_of(whole_layer(), rank, 2)
    names, x = [name for name, _ in part.named_parameters()], tokens_of(rank)

    def loss(parameters, x):
        out = torch.func.functional_call(part, parameters, (x,))
        return weighted(out.outputs) + out.total_aux_loss, out

    (grads, x_grad), out = torch.func.grad(loss, (0, 1), has_aux=True)(dict(part.named_parameters()), x)
    return out.outputs.detach(), x_grad.detach(), {name: grads[name].detach() for name in names}, out.total_aux_loss.detach()


def test_functional_gradients():
    compare(results(2, by_functional_grad), whole_layer(), [tokens_of(rank) for rank in range(2)])


def in_inference_mode(rank, options):
    part = part_of(whole_layer(**options), rank, 2, **options)
    with torch.inference_mode():
        return part(tokens_of(rank)).outputs.clone()


@pytest.mark.parametrize("options", [{}, {"dropless": True}], ids=str)
def test_inference_mode(options):
    for rank, outputs in enumerate(results(2, in_inference_mode, options)):
        torch.testing.assert_close(outputs, whole_layer(**options)(tokens_of(rank)).outputs.detach(), rtol=1e-6, atol=1e-6)


def copied(rank, way):
    part = part_of(whole_layer(), rank, 2)
    if way == "deepcopy":
        return backward(copy.deepcopy(part), tokens_of(rank))
    data = io.BytesIO()
    torch.save(part, data)
    data.seek(0)
    return backward(torch.load(data, weights_only=False), tokens_of(rank))


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies(way):
    compare(results(2, copied, way), whole_layer(), [tokens_of(rank) for rank in range(2)])


# Experts of other kinds


def glu(count):
    return GLUExperts(DIM, count, 10, bias=True)


class Squares(nn.Module):
    """A module that this package does not know."""

    def __init__(self, experts):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, EXPERTS)[:experts].clone())

    def forward(self, x, offsets=None):
        if offsets is None:
            return x.square() * self.weight[:, None, None]
        return (
            x.square() * self.weight.repeat_interleave(offsets.diff(prepend=offsets.new_zeros(1)), output_size=len(x))[:, None]
        )


def with_experts(rank, kind, options):
    torch.manual_seed(3)
    shared = nn.Linear(DIM, DIM)
    whole = whole_layer(experts=kind(EXPERTS), shared_experts=shared, **options)
    part = part_of(whole, rank, 2, experts=kind(EXPERTS // 2), shared_experts=copy.deepcopy(shared), **options)
    return backward(part, tokens_of(rank))


@pytest.mark.parametrize("kind", [glu, Squares])
@pytest.mark.parametrize("options", [{}, {"dropless": True}], ids=str)
def test_experts(kind, options):
    ranks = results(2, with_experts, kind, options)
    torch.manual_seed(3)
    shared = nn.Linear(DIM, DIM)
    whole = whole_layer(experts=kind(EXPERTS), shared_experts=shared, **options)
    compare(ranks, whole, [tokens_of(rank) for rank in range(2)])


def default_experts(rank):
    moe = MoE(DIM, EXPERTS, expert_group=dist.group.WORLD)
    return moe.experts.weight_in.detach(), moe.gate.to_gates.weight.detach(), torch.rand(1)


def test_ranks_draw_other_experts_and_the_same_gate():
    (experts0, gate0, after0), (experts1, gate1, after1) = results(2, default_experts)
    assert experts0.shape == (EXPERTS // 2, DIM, 64)
    assert not torch.equal(experts0, experts1)
    assert torch.equal(gate0, gate1)
    assert torch.equal(after0, after1)


# Groups


def of_group(rank, kind):
    if kind == "mesh":
        group = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "expert"))["expert"]
    else:
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        group = groups[rank // 2] if kind == "group" else groups[rank // 2].group_name
    return backward(part_of(whole_layer(), rank % 2, 2, group=group), tokens_of(rank))


@pytest.mark.parametrize("kind", ["mesh", "group", "name"])
def test_two_groups_side_by_side(kind):
    ranks = results(4, of_group, kind)
    for pair in (0, 2):
        compare(ranks[pair : pair + 2], whole_layer(), [tokens_of(pair), tokens_of(pair + 1)])


def traffic(rank, world, dtype, options):
    part = part_of(whole_layer(dtype, **options), rank, world, dtype=dtype, **options)
    with Traffic() as seen:
        out = part(tokens_of(rank, dtype).requires_grad_())
        forward = len(seen.bytes)
        weighted(out.outputs).backward()
    return seen.bytes[:forward], seen.bytes[forward:], seen.calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_traffic_with_a_capacity(dtype):
    slots = GROUPS * EXPERTS * (TOKENS // EXPERTS)  # of one rank's tokens, one each
    for there_and_back, gradients, _ in results(2, traffic, 2, dtype, {"capacity_factor_train": 1.0, "min_expert_capacity": 1}):
        assert there_and_back == gradients == [slots * DIM * dtype.itemsize] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_traffic_when_dropless(dtype):
    ranks = results(2, traffic, 2, dtype, {"dropless": True})
    rows = GROUPS * TOKENS * 2 * DIM * dtype.itemsize  # two for each token
    for (counts, there, back), gradients, _ in ranks:
        assert (counts, there) == (EXPERTS * 8, rows)
        assert gradients == [there, back]
    assert sum(there_and_back[2] for there_and_back, _, _ in ranks) == 2 * rows


def test_one_rank_exchanges_nothing():
    for options in ({}, {"dropless": True}):
        ((forward, backward, calls),) = results(1, traffic, 1, None, options)
        assert (forward, backward, calls) == ([], [], 0)


def one_rank(rank, options):
    torch.manual_seed(5)
    part = MoE(DIM, EXPERTS, expert_group="0", **options)
    torch.manual_seed(5)
    plain = MoE(DIM, EXPERTS, **options)
    x = tokens_of(0)
    torch.manual_seed(6)
    outputs = part(x).outputs
    torch.manual_seed(6)
    return torch.equal(outputs, plain(x).outputs), isinstance(part.experts, Experts), load_part(part, plain, 0, 1)


def test_one_rank_is_the_plain_layer():
    for options in ({}, {"dropless": True}):
        assert results(1, one_rank, options) == [(True, True, None)]


def through_the_exchange(rank, device, options):
    """A group of one rank sends all to itself here, which the layer would leave out."""
    whole = whole_layer(**options).to(device)
    group = ExpertGroup("0", EXPERTS, chunks=2)
    x = tokens_of(0).to(device)
    routing = whole.gate.route(x)
    rows = routing.dispatch(x)
    demand = None if routing.offsets is None else routing.demand
    outputs = routing.combine(group.compute(whole.experts, rows, demand, True))
    gradient = torch.autograd.grad(weighted(outputs.cpu()), rows)[0]
    plain = routing.combine(whole.experts(rows) if routing.offsets is None else whole.experts(rows, routing.offsets))
    return torch.equal(outputs, plain), torch.equal(gradient, torch.autograd.grad(weighted(plain.cpu()), rows)[0])


@pytest.mark.parametrize("options", [{}, {"dropless": True}], ids=str)
def test_each_backend_of_torch(device, options):
    """Gloo, and NCCL where there is a GPU."""
    backend = "gloo" if device == "cpu" else "nccl"
    assert results(1, through_the_exchange, device, options, backend=backend) == [(True, True)]
