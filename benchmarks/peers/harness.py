"""Measures contenders: the calls of each metric, and the check that all contenders compute the same."""

from collections.abc import Sequence
from functools import partial

import rounds
import torch
from memory import peak_bytes
from rounds import TOO_LARGE, Figure, Step, measure, one_seed
from shapes import Shape
from torch import Tensor

from .contenders import Contender, Ours, Problem

GATE_FORWARD, GATE = "gate, forward", "gate, forward + backward"
FULL_FORWARD, FULL = "full path, forward", "full path, forward + backward"
DENSE = "dense gate, forward"
MEMORY = "full path, forward + backward: peak memory"
METRICS = (GATE_FORWARD, GATE, FULL_FORWARD, FULL, DENSE, MEMORY)
UNITS = dict.fromkeys(METRICS, "ms") | {MEMORY: "MiB"}

ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # largest share of tokens that may differ


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


def measure_metric(metric: str, contenders: Sequence[Contender], rounds: int, seconds: float) -> dict[str, Figure]:
    """Returns the cells of a column by name; contenders without the metric have none."""
    makers = {contender.name: partial(step_of, contender, metric) for contender in contenders}
    return measure(makers, rounds, seconds, memory=peak_bytes if metric == MEMORY else None)


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
    words, small = {}, []
    for kind in kinds:
        size = kind.dense_tensors * problem.dense_bytes * (1 if kind.same else problem.shape.b)
        if size > limit:
            words[kind.name] = Figure(word=TOO_LARGE, reason=f"about {size / 2**30:.0f} GiB of dense tensors")
        else:
            small.append(kind)
    admitted, others = rounds.admit(small, problem, lambda c: None if c.full is None else difference(c))
    return admitted, words | others


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
