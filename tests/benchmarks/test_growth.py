"""Tests that memory grows linearly with the number of tokens, up to a million, by counting allocations."""

import itertools
from typing import NamedTuple

import torch
from memory import memory_changes, peak_bytes

import topn_gating

DIM, EXPERTS, TOP_N = 4, 16, 4
CONSTANT = 4096  # bytes of additional growth that are allowed, for any number of tokens


class Allocations(NamedTuple):
    """The number of a step's allocations, their total bytes, and the most bytes that it held at once."""

    count: int
    total: int
    peak: int


def allocations(step):
    """Returns the allocations of ``step``."""
    changes = memory_changes(step)
    sizes = [size for size in changes if size > 0]
    return Allocations(len(sizes), sum(sizes), max(itertools.accumulate(changes, initial=0)))


def compact(x, gate):
    """Returns the outputs of gate, dispatch and combine, and the losses."""
    routing = gate.route(x)
    out = topn_gating.combine(topn_gating.dispatch(x, routing), routing)
    return out, routing.balance_loss, routing.router_z_loss


def dense(x, gate):
    """Returns the same, computed with the dense tensors."""
    dispatch, combine, *losses = gate(x)
    rows = torch.einsum("bnd,bnec->becd", x, dispatch)
    return torch.einsum("becd,bnec->bnd", rows, combine), *losses


def forward_and_backward(path, tokens):
    """Returns a step of ``path``, which computes the gradients of the tokens and of the gate's weight."""
    gate = topn_gating.TopNGating(DIM, EXPERTS, top_n=TOP_N)
    x = torch.randn(1, tokens, DIM, requires_grad=True)
    grads = [torch.randn(1, tokens, DIM), torch.ones(()), torch.ones(())]
    return lambda: torch.autograd.grad(path(x, gate), (x, gate.to_gates.weight), grads)


def growth(path, sizes):
    """Returns the allocations for each number of tokens, after a first call, which may allocate what is kept."""
    forward_and_backward(path, sizes[0])()
    return [allocations(forward_and_backward(path, n)) for n in sizes]


def test_memory_of_the_compact_path_is_linear_to_a_million_tokens():
    found = growth(compact, [1 << i for i in range(12, 21)])
    assert len({step.count for step in found}) == 1
    for before, after in itertools.pairwise(found):
        assert 1.9 * before.total < after.total <= 2 * before.total + CONSTANT
        assert 1.9 * before.peak < after.peak <= 2 * before.peak + CONSTANT


def test_the_dense_path_is_not_linear():
    found = growth(dense, [1 << i for i in range(9, 13)])
    assert all(after.peak > 3 * before.peak + CONSTANT for before, after in itertools.pairwise(found))


def test_peak_is_the_most_that_was_held_at_once():
    def two_at_a_time():
        for _ in range(3):
            a = torch.empty(1000, dtype=torch.uint8)
            b = torch.empty(5000, dtype=torch.uint8)
            del a, b

    assert peak_bytes(two_at_a_time) == 6000
