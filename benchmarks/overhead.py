"""Times calls on tensors so small that the time is the overhead of Python, autograd and the dispatcher, in microseconds.

    PYTHONPATH=. python benchmarks/overhead.py [--seconds 1]

The figures are medians on one thread; torch's own operators on the same tensors are timed for comparison.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from peers.contenders import EPS, Ours, Problem
from rich.console import Console
from rich.table import Table
from shapes import Shape
from torch import Tensor
from torch.utils.benchmark import Timer

import topn_gating
from topn_gating.ops import Assign, Gate

SHAPE = Shape(1, 8, 16, 4, 2)


Forward = Callable[[], Sequence[Tensor]]


def calls() -> Iterator[tuple[str, Forward, Sequence[Tensor]]]:
    """Yields names, forward calls, and the tensors with respect to which the backward pass differentiates."""
    ours = Ours(Problem.make(SHAPE, torch.float32))
    x, weight = ours.problem.x, ours.problem.weight
    logits = F.linear(x, weight).detach().requires_grad_()
    routing = ours.module.route(x.detach())
    rows = topn_gating.dispatch(x.detach(), routing).requires_grad_()
    ops, threshold, draws = torch.ops.topn_gating, ours.module.threshold_train, torch.rand_like(routing.weight)
    top = ops.gate(logits.detach(), None, None, SHAPE.k, EPS, 1.0, False, True)[:2]
    top[0].requires_grad_()

    yield "torch.softmax", lambda: (torch.softmax(logits, -1),), [logits]
    yield "torch.topk", lambda: torch.topk(logits, SHAPE.k), [logits]
    yield "F.linear", lambda: (F.linear(x, weight),), [x, weight]
    yield "ops.gate", lambda: Gate.call(logits, None, None, SHAPE.k, EPS, 1.0, False, True), [logits]
    yield (
        "ops.assign",
        lambda: Assign.call(*top, draws, threshold, None, SHAPE.e, ours.problem.capacity, 0, EPS),
        [top[0]],
    )
    yield "dispatch", lambda: (topn_gating.dispatch(x, routing),), [x]
    yield "combine", lambda: (topn_gating.combine(rows, routing),), [rows]
    yield "TopNGating.route", ours.gate, [x, weight]
    yield "route, dispatch, combine", ours.full, [x, weight]


def there_and_back(forward: Forward, inputs: Sequence[Tensor]) -> Forward:
    """Returns a call of ``forward`` and of its backward pass to ``inputs``, from precomputed gradients of the outputs."""
    wanted = [i for i, output in enumerate(forward()) if output.requires_grad]
    grads = [torch.ones_like(forward()[i]) for i in wanted]

    def step() -> Sequence[Tensor]:
        outputs = forward()
        return torch.autograd.grad([outputs[i] for i in wanted], inputs, grads)

    return step


def microseconds(call: Forward, seconds: float) -> str:
    """Returns the median time of a call."""
    timer = Timer("call()", globals={"call": call}, num_threads=1)
    return f"{1e6 * timer.blocked_autorange(min_run_time=seconds).median:.1f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1, help="for each figure")
    options = parser.parse_args(arguments)
    table = Table(title=f"µs a call, {SHAPE}")
    table.add_column()
    table.add_column("forward", justify="right")
    table.add_column("forward + backward", justify="right")
    for name, forward, inputs in calls():
        both = there_and_back(forward, inputs)
        table.add_row(name, *(microseconds(call, options.seconds) for call in (torch.no_grad()(forward), both)))
    Console().print(table)


if __name__ == "__main__":
    main()
