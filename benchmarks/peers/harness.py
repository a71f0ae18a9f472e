"""Measures contenders: the calls of each metric, interleaved rounds, and the check that all contenders compute the same."""

import gc
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from memory import peak_bytes
from shapes import Shape
from torch import Tensor

from .contenders import Contender, Ours, Problem

GATE_FORWARD, GATE = "gate, forward", "gate, forward + backward"
FULL_FORWARD, FULL = "full path, forward", "full path, forward + backward"
DENSE = "dense gate, forward"
MEMORY = "full path, forward + backward: peak memory"
METRICS = (GATE_FORWARD, GATE, FULL_FORWARD, FULL, DENSE, MEMORY)
UNITS = dict.fromkeys(METRICS, "ms") | {MEMORY: "MiB"}
FAILS, TOO_LARGE, DIFFERS = "fails", "too large", "differs"

ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # largest share of tokens that may differ
WARM_UP = (1, 2)  # calls of each warm-up; after the second draw of random numbers some code is compiled again
ROUND_SECONDS = 0.05  # least time of a contender in a round
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}  # never mmap a block, never shrink the heap

Step = Callable[[], Sequence[Tensor]]


class Figure(NamedTuple):
    """A cell of the table: each round's value and page faults per call, or a word in place of them and its reason."""

    values: Sequence[float] = ()
    faults: Sequence[float] = ()
    word: str = ""
    reason: str = ""


def restart_with(malloc: str) -> None:
    """Restarts this command with the environment that the measurement needs, unless it is already set."""
    wanted = {"OMP_WAIT_POLICY": "passive", "KINETO_LOG_LEVEL": "99"} | (KEEP if malloc == "keep" else {})
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | wanted)


def step_of(contender: Contender, metric: str) -> Step | None:
    """Returns the call that a metric times; None if the contender does not have the metric."""
    kind = {GATE_FORWARD: "gate", GATE: "gate", FULL_FORWARD: "full", FULL: "full", MEMORY: "full", DENSE: "dense"}[metric]
    forward = getattr(contender, kind)
    if forward is None:
        return None
    return torch.no_grad()(forward) if metric in (GATE_FORWARD, FULL_FORWARD, DENSE) else with_backward(contender, forward)


def with_backward(contender: Contender, forward: Step) -> Step:
    """Returns a call of ``forward`` and of its backward pass to x and the gate's weight, from precomputed gradients."""
    grads = [torch.randn_like(t) if t.dim() else torch.ones_like(t) for t in one_seed(forward)]
    inputs = contender.problem.x, contender.problem.weight

    def step() -> Sequence[Tensor]:
        outputs = forward()
        return outputs[0].detach(), *torch.autograd.grad(outputs, inputs, grads)

    return step


def sample(step: Step, calls: int = 1) -> tuple[float, float]:
    """Returns the milliseconds and page faults of a call, from a fixed seed."""
    torch.manual_seed(0)
    faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
    for _ in range(calls):
        step()
    milliseconds = 1e3 * (time.perf_counter() - start)
    return milliseconds / calls, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults) / calls


def interleave(steps: dict[str, Step], rounds: int) -> dict[str, Figure]:
    """Returns ``rounds`` samples of every step; each round runs all steps, in alternating order."""
    calls = {}
    for name, step in steps.items():
        milliseconds = min(sample(step, count)[0] for count in WARM_UP)
        calls[name] = max(1, round(1e3 * ROUND_SECONDS / milliseconds))
    figures = {name: Figure([], []) for name in steps}
    for i in range(rounds):
        for name in list(steps)[:: 1 if i % 2 else -1]:
            milliseconds, faults = sample(steps[name], calls[name])
            figures[name].values.append(milliseconds)
            figures[name].faults.append(faults)
    return figures


def peak_mebibytes(step: Step) -> float:
    """Returns the most memory that a call holds in addition to what was allocated before it."""
    return peak_bytes(partial(one_seed, step)) / 2**20


def one_seed(step: Step) -> Sequence[Tensor]:
    """Calls the step with the seed that all contenders get."""
    torch.manual_seed(0)
    return step()


def failed(error: Exception) -> Figure:
    """Returns the cell of a contender that raised an error."""
    return Figure(word=FAILS, reason=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")


def measure_metric(metric: str, contenders: Sequence[Contender], rounds: int, seconds: float) -> dict[str, Figure]:
    """Returns the cells of a column by name; an error is recorded as a cell, and contenders without the metric have none.

    A call that takes longer than ``seconds`` is not repeated.
    """
    figures, steps = {}, {}
    for contender in contenders:
        try:
            step = step_of(contender, metric)
            if step is None:
                continue
            milliseconds, faults = sample(step)
            if metric == MEMORY:
                figures[contender.name] = Figure([peak_mebibytes(step)])
            elif milliseconds > 1e3 * seconds:
                figures[contender.name] = Figure([milliseconds], [faults])
            else:
                steps[contender.name] = step
        except Exception as error:
            figures[contender.name] = failed(error)
    return figures | interleave(steps, rounds)


def cells(shape: Shape, dtype: str, metric: str, figures: dict[str, Figure]) -> list[dict]:
    """Returns the figures as dicts, as they are written to a file."""
    return [
        {"shape": shape, "dtype": dtype, "metric": metric, "contender": name, **figure._asdict()}
        for name, figure in figures.items()
    ]


def admit(kinds: Sequence[type[Contender]], problem: Problem, limit: float) -> tuple[list[Contender], dict[str, Figure]]:
    """Returns the contenders to time on the problem, and the cells of the others.

    ``limit`` bounds the bytes of a contender's dense tensors.
    """
    admitted, words = [], {}
    for kind in kinds:
        size = kind.dense_tensors * problem.dense_bytes * (1 if kind.same else problem.shape.b)
        if size > limit:
            words[kind.name] = Figure(word=TOO_LARGE, reason=f"about {size / 2**30:.0f} GiB of dense tensors")
            continue
        try:
            contender = kind(problem)
            why = None if kind.full is None else difference(contender)
        except Exception as error:
            words[kind.name] = failed(error)
            continue
        if why:
            words[kind.name] = Figure(word=DIFFERS, reason=why)
        else:
            admitted.append(contender)
    return admitted, words


def difference(contender: Contender) -> str | None:
    """Describes how a contender's results differ from topn_gating's; None if they agree or the contender cannot run.

    Each expert multiplies by another number, so that equal outputs mean equal experts, weights and order of the tokens. A peer
    with the same semantics is compared on the problem itself, with one seed. In half precision many logits are equal, and
    torch.topk may choose any of them, so more tokens may differ.
    """
    problem = contender.problem
    if not contender.same:
        return difference_without_drops(type(contender), problem.shape)
    gain = torch.linspace(0.5, 2, problem.shape.e, dtype=problem.x.dtype)
    ours = one_seed(torch.no_grad()(partial(Ours(problem).full, gain)))[0]
    try:
        theirs = one_seed(torch.no_grad()(partial(contender.full, gain)))[0]
    except RuntimeError:  # it does not support this type, which the table will show
        return None
    unlike = share_unlike(ours, theirs)
    return f"{100 * unlike:.2f} % of the tokens" if unlike > ALLOWED[problem.x.dtype] else None


def difference_without_drops(kind: type[Contender], shape: Shape) -> str | None:
    """Compares a peer of other semantics: outputs and gradients of a few tokens, without thresholds and drops."""
    b, n, d, e, k = shape
    small = Problem.make(Shape(b, min(n, 64), d, e, k), torch.float32, capacity_factor=float(e), policy="all")
    gain = torch.linspace(0.5, 2, e)
    results = []
    for contender in (Ours(small, straight_through=False), kind(small)):
        out = contender.full(gain)[0]
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), (small.x, small.weight))))
    unlike = max(share_unlike(ours, theirs) for ours, theirs in zip(*results, strict=True))
    allowed = ALLOWED[torch.float32]
    return f"{100 * unlike:.2f} % of outputs or gradients where nothing is dropped" if unlike > allowed else None


def share_unlike(ours: Tensor, theirs: Tensor) -> float:
    """Returns the share of rows that differ."""
    return (~torch.isclose(ours, theirs, rtol=1e-2, atol=1e-3)).any(-1).double().mean().item()


def fresh() -> None:
    """Discards compiled code and garbage of earlier shapes, so that each shape is compiled separately."""
    torch._dynamo.reset()
    gc.collect()
