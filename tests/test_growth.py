"""Memory grows linearly with the tokens, to a million of them: allocations are counted, not seconds."""

import itertools
import json
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

import topn_gating

DIM, EXPERTS, TOP_N = 4, 16, 4
CONSTANT = 4096  # bytes that may come on top, for any number of tokens


class Allocations(NamedTuple):
    """How many a step made, their bytes, and the most bytes that it held at a time."""

    count: int
    total: int
    peak: int


def allocations(step, path):
    """What the allocator saw of ``step``; the trace is written to ``path``."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    profiler.export_chrome_trace(str(path))
    events = [event["args"] for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    changes = [event["Bytes"] for event in sorted(events, key=lambda event: event["Ev Idx"])]
    made, held = [size for size in changes if size > 0], torch.tensor([0, *changes]).cumsum(0)
    return Allocations(len(made), sum(made), int(held.max()))


def compact(x, gate):
    """Gate, dispatch, combine, with the losses."""
    routing = gate.route(x)
    out = topn_gating.combine(topn_gating.dispatch(x, routing), routing)
    return out, routing.balance_loss, routing.router_z_loss


def dense(x, gate):
    """The same through the dense tensors."""
    dispatch, combine, *losses = gate(x)
    rows = torch.einsum("bnd,bnec->becd", x, dispatch)
    return torch.einsum("becd,bnec->bnd", rows, combine), *losses


def forward_and_backward(path, tokens):
    """A step of ``path``: to the gradients of the tokens and of the gate's weight."""
    gate = topn_gating.TopNGating(DIM, EXPERTS, top_n=TOP_N)
    x = torch.randn(1, tokens, DIM, requires_grad=True)
    grads = [torch.randn(1, tokens, DIM), torch.ones(()), torch.ones(())]
    return lambda: torch.autograd.grad(path(x, gate), (x, gate.to_gates.weight), grads)


def growth(path, sizes, folder):
    """Allocations for each number of tokens, after a first call that may set up what stays."""
    forward_and_backward(path, sizes[0])()
    return [allocations(forward_and_backward(path, n), folder / f"{n}.json") for n in sizes]


def test_memory_of_the_compact_path_is_linear_to_a_million_tokens(tmp_path):
    found = growth(compact, [1 << i for i in range(12, 21)], tmp_path)
    assert len({step.count for step in found}) == 1
    for before, after in itertools.pairwise(found):
        assert 1.9 * before.total < after.total <= 2 * before.total + CONSTANT
        assert 1.9 * before.peak < after.peak <= 2 * before.peak + CONSTANT


def test_the_dense_path_is_not_linear(tmp_path):
    found = growth(dense, [1 << i for i in range(9, 13)], tmp_path)
    assert all(after.peak > 3 * before.peak + CONSTANT for before, after in itertools.pairwise(found))
