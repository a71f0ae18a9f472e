"""Routing: what it tells of itself, as a pytree, and that the compact path allocates nothing of the dense form's size."""

import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree

import topn_gating
from topn_gating import Routing, TopNGating, route


def some_routing(**options):
    return route(torch.randn(2, 24, 5) + torch.arange(5) / 2, 3, capacity=7, threshold=0.4, **options)


def test_routing_properties():
    routing = some_routing()
    held = routing.slot >= 0
    assert routing.capacity == 7
    assert torch.equal(routing.load, (routing.source >= 0).sum(-1).int())
    assert routing.drop_fraction.shape == ()
    assert routing.drop_fraction.dtype == torch.float32
    dropped = (routing.slot == -2).sum()
    assert 0 < dropped < held.sum()
    torch.testing.assert_close(routing.drop_fraction, dropped / (dropped + held.sum()))
    assert routing.demand.sum() == dropped + held.sum()


def test_drop_fraction_of_nothing_is_zero():
    assert some_routing(token_mask=torch.zeros(2, 24, dtype=torch.bool)).drop_fraction == 0


def test_routing_repr():
    routing = some_routing()
    percent = 100 * routing.drop_fraction.item()
    assert repr(routing) == (
        f"Routing(groups=(2,), tokens=24, experts=5, top_n=3, capacity=7, dropped={percent:.1f}%, "
        "dtype=torch.float32, device='cpu')"
    )
    assert "experts=5" in repr(Routing(*(t.to("meta") for t in routing[:7])))


def test_methods_are_the_functions():
    routing, x = some_routing(), torch.randn(2, 24, 6)
    rows = routing.dispatch(x)
    assert torch.equal(rows, topn_gating.dispatch(x, routing))
    assert torch.equal(routing.combine(rows), topn_gating.combine(rows, routing))


def test_routing_is_a_pytree():
    routing = some_routing(straight_through=False)
    leaves, spec = pytree.tree_flatten(routing)
    back = pytree.tree_unflatten(leaves, spec)
    assert isinstance(back, Routing)
    assert all(a is b for a, b in zip(back, routing, strict=True))
    doubled = pytree.tree_map_only(torch.Tensor, lambda t: t.double(), routing)
    assert doubled.weight.dtype == torch.float64
    assert doubled.straight_through is False


def largest_allocation(step, folder):
    """Bytes of the largest piece of memory that torch's allocator gave to ``step``."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    trace = folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    return max(event["args"]["Bytes"] for event in events if event.get("name") == "[memory]")


@pytest.mark.parametrize("soft", [True, False])
def test_compact_path_never_makes_a_dense_tensor(soft, tmp_path):
    tokens, dim, num_gates = 512, 16, 8
    gate = TopNGating(dim, num_gates, policy_train="all", differentiable_topk=soft)
    x = torch.randn(tokens, dim, requires_grad=True)
    dense_bytes = 4 * tokens * num_gates * gate.capacity(tokens)

    def compact():
        routing = gate.route(x)
        out = topn_gating.combine(topn_gating.dispatch(x, routing), routing)
        (out.sum() + routing.balance_loss + routing.router_z_loss).backward()

    assert largest_allocation(lambda: gate(x), tmp_path) >= dense_bytes
    assert largest_allocation(compact, tmp_path) < dense_bytes / 8
