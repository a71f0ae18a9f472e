"""Beside the rest of torch: DistributedDataParallel, FSDP2, clipping, losses and statistics of all ranks, checkpoints."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from layers import DIM, EXPERTS, TOKENS, Traffic, load_part, tokens_of, weighted
from ranks import errors, results
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from topn_gating import MoE, stack_stats
from topn_gating.distributed import (
    clip_grad_norm_,
    ddp_ignore,
    expert_parameters,
    sharded_state_dict,
    sum_counts,
    sum_stats,
)

OPTIONS = {"policy_train": "all", "gating_top_n": 2, "capacity_factor_train": 1.0}


class Model(nn.Module):
    """Two layers with experts between dense ones."""

    def __init__(self, group=None, **options):
        super().__init__()
        self.inputs = nn.Linear(DIM, DIM)
        self.layers = nn.ModuleList(MoE(DIM, EXPERTS, expert_group=group, **OPTIONS, **options) for _ in range(2))
        self.outputs = nn.Linear(DIM, 3)

    def forward(self, x):
        x, aux = self.inputs(x), 0
        for layer in self.layers:
            out = layer(x)
            x, aux = x + out.outputs, aux + out.total_aux_loss
        return self.outputs(x), aux


def whole_model(**options):
    torch.manual_seed(2)
    return Model(**options)


def model_of(rank, world, group="0", **options):
    """The same model on one rank."""
    whole, model = whole_model(**options), Model(group, **options)
    for mine, theirs in zip(model.children(), whole.children(), strict=True):
        if isinstance(mine, nn.Linear):
            mine.load_state_dict(theirs.state_dict())
    for mine, theirs in zip(model.layers, whole.layers, strict=True):
        load_part(mine, theirs, rank, world)
    return model


def loss_of(model, x):
    outputs, aux = model(x)
    return weighted(outputs) / 10 + aux


def gradients(model):
    return {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()}


def same_gradients(ranks, whole, tolerance=1e-5):
    """Those of the mean of the ranks' losses: rank by rank, or stacked in the case of experts."""
    whole.zero_grad()
    (sum(loss_of(whole, tokens_of(rank)) for rank in range(len(ranks))) / len(ranks)).backward()
    for name, parameter in whole.named_parameters():
        if "experts" in name:
            torch.testing.assert_close(
                torch.cat([grads[name] for grads in ranks]), parameter.grad, rtol=tolerance, atol=tolerance
            )
        else:
            for grads in ranks:
                torch.testing.assert_close(grads[name], parameter.grad, rtol=tolerance, atol=tolerance)


def with_ddp(rank, world, options):
    model = model_of(rank, world, **options)
    names = [name for name, _ in expert_parameters(model)]
    ddp_ignore(model)
    model = DistributedDataParallel(model)
    for _ in range(2):  # the second pass finds what the first has left
        model.zero_grad()
        loss_of(model, tokens_of(rank)).backward()
    return gradients(model), names


@pytest.mark.parametrize("options", [{}, {"dropless": True}], ids=str)
@pytest.mark.parametrize("world", [2, 4])
def test_ddp(world, options):
    ranks = results(world, with_ddp, world, options)
    same_gradients([grads for grads, _ in ranks], whole_model(**options))
    names = [f"layers.{i}.experts.{name}" for i in range(2) for name, _ in whole_model().layers[0].experts.named_parameters()]
    assert ranks[0][1] == names


def with_data_parallel_groups(rank):
    """Two groups of experts, each of two ranks, side by side: the caller averages the experts over their copies."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "expert"))
    model = model_of(mesh["expert"].get_local_rank(), 2, mesh["expert"])
    ddp_ignore(model)
    ddp = DistributedDataParallel(model)
    loss_of(ddp, tokens_of(rank)).backward()
    for _, parameter in expert_parameters(model):
        dist.all_reduce(parameter.grad, group=mesh["data"].get_group())
        parameter.grad /= 2
    return gradients(model)


def test_ddp_beside_two_groups_of_experts():
    ranks = results(4, with_data_parallel_groups)
    whole = whole_model()
    (sum(loss_of(whole, tokens_of(rank)) for rank in range(4)) / 4).backward()
    for name, parameter in whole.named_parameters():
        for pair in (ranks[:2], ranks[2:]):
            mine = torch.cat([g[name] for g in pair]) if "experts" in name else pair[0][name]
            torch.testing.assert_close(mine, parameter.grad, rtol=1e-5, atol=1e-5)


def with_fsdp(rank):
    """Experts sharded over the ranks that hold the same ones, all else over all ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "expert"))
    model = model_of(mesh["expert"].get_local_rank(), 2, mesh["expert"])
    for layer in model.layers:
        experts = fully_shard(layer.experts, mesh=mesh["data"])
        experts.set_gradient_divide_factor(4)  # as all else, by the number of all ranks
        experts.set_force_sum_reduction_for_comms(True)  # gloo has no sum with a factor
    fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
    loss_of(model, tokens_of(rank)).backward()
    grads = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    norm = clip_grad_norm_(model, 0.5)
    return grads, norm, {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def test_fsdp_on_a_mesh_of_two_dimensions():
    ranks = results(4, with_fsdp)
    whole = whole_model()
    (sum(loss_of(whole, tokens_of(rank)) for rank in range(4)) / 4).backward()
    for clipped in (0, 2):
        if clipped:
            norm = nn.utils.clip_grad_norm_(whole.parameters(), 0.5)
            for rank in ranks:
                torch.testing.assert_close(rank[1], norm)
        for name, parameter in whole.named_parameters():
            for pair in (ranks[:2], ranks[2:]):
                mine = torch.cat([rank[clipped][name] for rank in pair]) if "experts" in name else pair[0][clipped][name]
                torch.testing.assert_close(mine, parameter.grad, rtol=1e-5, atol=1e-5)


def clipped(rank, norm_type, max_norm):
    model = model_of(rank, 2)
    ddp_ignore(model)
    ddp = DistributedDataParallel(model)
    loss_of(ddp, tokens_of(rank)).backward()
    if rank == 1:
        for parameter in model.layers[1].experts.parameters():
            parameter.grad = None  # a rank may have none: the others do not wait for it
    return clip_grad_norm_(model, max_norm, norm_type), gradients_or_none(model)


def gradients_or_none(model):
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(("norm_type", "max_norm"), [(2.0, 0.1), (2.0, 1e6), (1.0, 0.1), (float("inf"), 1e-3)])
def test_clipping_sees_all_experts_once(norm_type, max_norm):
    ranks = results(2, clipped, norm_type, max_norm)
    whole = whole_model()
    (sum(loss_of(whole, tokens_of(rank)) for rank in range(2)) / 2).backward()
    for parameter in whole.layers[1].experts.parameters():
        parameter.grad[EXPERTS // 2 :] = 0
    norm = nn.utils.clip_grad_norm_(whole.parameters(), max_norm, norm_type)
    for rank in ranks:
        torch.testing.assert_close(rank[0], norm)
    for name, parameter in whole.named_parameters():
        mine = ranks[0][1][name]
        if name.startswith("layers.1.experts"):
            assert ranks[1][1][name] is None
            mine = torch.cat([mine, torch.zeros_like(mine)])
        elif "experts" in name:
            mine = torch.cat([mine, ranks[1][1][name]])
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-5, atol=1e-7)


def not_finite(rank):
    model = model_of(rank, 2)
    loss_of(model, tokens_of(rank)).backward()
    if rank == 1:
        model.layers[0].experts.bias_in.grad.fill_(float("nan"))
    clip_grad_norm_(model, 1.0, error_if_nonfinite=True)


def test_a_norm_that_is_not_finite_raises_on_every_rank():
    assert errors(2, not_finite) == ["RuntimeError: the gradients cannot be clipped: their norm of order 2.0 is nan"] * 2


# Losses and statistics


def with_counts(rank, compiled, over):
    torch.manual_seed(2)
    moe = MoE(DIM, EXPERTS, balance_over=over, **OPTIONS)
    call = torch.compile(moe, backend="aot_eager", fullgraph=True) if compiled else moe
    loss = call(tokens_of(rank), counts=sum_counts("0")).balance_loss
    loss.backward()
    return loss.detach(), moe.gate.to_gates.weight.grad


@pytest.mark.parametrize("over", ["batch", "group"])
@pytest.mark.parametrize("compiled", [False, True])
def test_balance_loss_of_the_global_batch(compiled, over):
    ranks = results(2, with_counts, compiled, over)
    torch.manual_seed(2)
    moe = MoE(DIM, EXPERTS, balance_over="batch", **OPTIONS)
    loss = moe(torch.cat([tokens_of(rank) for rank in range(2)])).balance_loss
    loss.backward()
    torch.testing.assert_close(sum(rank[0] for rank in ranks) / 2, loss.detach())
    torch.testing.assert_close(sum(rank[1] for rank in ranks) / 2, moe.gate.to_gates.weight.grad)


@pytest.mark.parametrize(("n", "options"), [((TOKENS, TOKENS), {}), ((5, TOKENS), {"dropless": True})], ids=str)
def test_statistics_of_all_ranks(n, options):
    ranks = results(len(n), with_stats, n, options)
    model = whole_model(stats=True, **options)
    model.eval()
    x = torch.cat([tokens_of(rank, n=m).flatten(0, 1) for rank, m in enumerate(n)])
    if not options:
        x = x.unflatten(0, (-1, TOKENS))
    model.train()
    model(x)
    whole = stack_stats([layer.stats for layer in model.layers])
    for stats, calls in ranks:
        assert calls == 2  # an all-reduce and the wait for it
        torch.testing.assert_close(stats, whole, rtol=1e-5, atol=1e-6)


def with_stats(rank, n, options):
    model = model_of(rank, len(n), stats=True, **options)
    model(tokens_of(rank, n=n[rank]))
    with Traffic() as seen:
        stats = sum_stats([layer.stats for layer in model.layers], "0")
    return stats, seen.calls


# Checkpoints


def saved(rank, world, folder, options):
    model = model_of(rank, world, **options)
    state = model.state_dict()
    dcp.save(sharded_state_dict(model), checkpoint_id=folder)
    return {name: tuple(t.shape) for name, t in state.items()}


def loaded(rank, world, folder, options):
    torch.manual_seed(99)
    model = Model("0", **options)
    dcp.load(sharded_state_dict(model), checkpoint_id=folder)
    return model.state_dict()


def assert_loads(folder, world, options):
    whole = whole_model(**options).state_dict()
    for rank, state in enumerate(results(world, loaded, world, folder, options)):
        assert state.keys() == whole.keys()
        for name, tensor in state.items():
            theirs = whole[name]
            if "experts" in name:
                theirs = theirs.chunk(world)[rank]
            assert torch.equal(tensor, theirs), name


@pytest.mark.parametrize("options", [{}, {"select_bias": True, "bias": True}], ids=str)
def test_checkpoints_load_on_other_numbers_of_ranks(tmp_path, options):
    shapes = results(4, saved, 4, tmp_path / "four", options)
    assert shapes[0]["layers.0.experts.weight_in"] == (EXPERTS // 4, DIM, 64)
    for world in (4, 2, 8):
        assert_loads(tmp_path / "four", world, options)
    results(2, resaved, 2, tmp_path / "four", tmp_path / "two", options)
    results(1, resaved, 1, tmp_path / "two", tmp_path / "one", options)
    assert_loads(tmp_path / "one", 4, options)


def resaved(rank, world, source, folder, options):
    model = Model("0", **options)
    dcp.load(sharded_state_dict(model), checkpoint_id=source)
    dcp.save(sharded_state_dict(model), checkpoint_id=folder)


def test_checkpoints_of_one_process(tmp_path):
    """Without torch.distributed at all, both ways."""
    dcp.save(whole_model().state_dict(), checkpoint_id=tmp_path / "one", no_dist=True)
    assert_loads(tmp_path / "one", 2, {})
    results(2, saved, 2, tmp_path / "two", {})
    torch.manual_seed(99)
    model = Model()
    dcp.load(model.state_dict(), checkpoint_id=tmp_path / "two", no_dist=True)
    for name, tensor in whole_model().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))


def with_a_scalar(rank):
    sharded_state_dict(MoE(DIM, EXPERTS, experts=Counted(), expert_group="0"))


def test_experts_that_cannot_be_divided():
    message = "ValueError: experts.calls must have this rank's 4 experts first, got ()"
    assert errors(2, with_a_scalar) == [message] * 2


def sharded_twice(rank, source=None, folder=None):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "expert"))
    model = model_of(mesh["expert"].get_local_rank(), 2, mesh["expert"]) if source is None else Model(mesh["expert"])
    for layer in model.layers:
        fully_shard(layer.experts, mesh=mesh["data"])
    fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
    if source is None:
        dcp.save(sharded_state_dict(model), checkpoint_id=folder)
        return None
    dcp.load(sharded_state_dict(model), checkpoint_id=source)
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in model.state_dict().items()}


def test_checkpoints_of_experts_that_fsdp_shards(tmp_path):
    results(4, sharded_twice, None, tmp_path / "four")
    assert_loads(tmp_path / "four", 2, {})
    dcp.save(whole_model().state_dict(), checkpoint_id=tmp_path / "one", no_dist=True)
    whole = whole_model().state_dict()
    for rank, state in enumerate(results(4, sharded_twice, tmp_path / "one")):
        for name, tensor in state.items():
            assert torch.equal(tensor, whole[name].chunk(2)[rank % 2] if "experts" in name else whole[name]), name
