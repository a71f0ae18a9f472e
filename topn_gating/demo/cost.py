"""What the gating costs beside its plain torch definition, on the same tensors."""

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .. import reference
from ..routing import combine, dispatch, expert_capacity, route

ROUNDS = 7
WARM_UP = 2
TOP_N = 2
THRESHOLD = 0.2

Step = Callable[[], tuple[Tensor, ...]]


class Cost(NamedTuple):
    """Of one forward and backward pass."""

    milliseconds: float
    peak_mebibytes: float


class Comparison(NamedTuple):
    """Costs on ``groups`` sequences of ``tokens`` tokens, and the largest difference of outputs and gradients."""

    groups: int
    tokens: int
    ours: Cost
    reference: Cost
    difference: float


def compare(groups: int, tokens: int, dim: int, experts: int) -> Comparison:
    """Routing, dispatch and combine, without experts between them, forward and backward."""
    ours, theirs = steps(groups, tokens, dim, experts)
    difference = max((a - b).abs().max().item() for a, b in zip(ours(), theirs(), strict=True))
    costs = [Cost(ms, peak_bytes(step) / 2**20) for ms, step in zip(median_ms(ours, theirs), (ours, theirs), strict=True)]
    return Comparison(groups, tokens, *costs, difference)


def steps(groups: int, tokens: int, dim: int, experts: int) -> tuple[Step, Step]:
    """Ours and the reference, each from the same logits, tokens, draws and output gradient to outputs and gradients."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(groups, tokens, experts, generator=generator, requires_grad=True)
    x = torch.randn(groups, tokens, dim, generator=generator, requires_grad=True)
    grad = torch.randn(groups, tokens, dim, generator=generator)
    top_n = min(TOP_N, experts)
    draws = torch.rand(groups, tokens, top_n, generator=generator)
    threshold = torch.full((top_n,), THRESHOLD)
    capacity = expert_capacity(tokens, experts, 1.25 * top_n)
    one = torch.ones(())

    def backward(out: Tensor, *losses: Tensor) -> tuple[Tensor, ...]:
        return out.detach(), *torch.autograd.grad((out, *losses), (logits, x), (grad, one, one))

    def ours() -> tuple[Tensor, ...]:
        routing = route(logits, top_n, capacity=capacity, draws=draws, threshold=threshold)
        out = combine(dispatch(x, routing), routing)
        return backward(out, routing.balance_loss, routing.router_z_loss)

    def theirs() -> tuple[Tensor, ...]:
        routing = reference.route(logits, top_n=top_n, capacity=capacity, draws=draws, threshold=threshold)
        dispatch_tensor, combine_tensor = reference.dense(routing)
        y = torch.einsum("...nd,...nec->...ecd", x, dispatch_tensor)
        out = torch.einsum("...ecd,...nec->...nd", y, combine_tensor)
        return backward(out, routing.balance_loss, routing.router_z_loss)

    return ours, theirs


def median_ms(*contenders: Step) -> list[float]:
    """Median time of each, the contenders taking turns."""
    times: list[list[float]] = [[] for _ in contenders]
    for _ in range(WARM_UP + ROUNDS):
        for step, samples in zip(contenders, times, strict=True):
            start = time.perf_counter()
            step()
            samples.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(samples[WARM_UP:]) for samples in times]


def memory_changes(step: Step) -> list[int]:
    """What the allocator did during ``step``, in order: bytes taken (positive) and given back (negative)."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = [event["args"] for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    return [event["Bytes"] for event in sorted(events, key=lambda event: event["Ev Idx"])]


def peak_bytes(step: Step) -> int:
    """The most that ``step`` held at a time above what stood before it."""
    return max(itertools.accumulate(memory_changes(step), initial=0))
