"""Times calls on tensors so small that the time is the overhead of Python, autograd and the dispatcher, in microseconds.

    PYTHONPATH=. python benchmarks/overhead.py [--seconds 1] [--tokens 4 16 64 1024]

The figures are medians on one thread; torch's own operators on the same tensors are timed for comparison. A second table has
``route`` in eager mode and under ``torch.compile``, in interleaved rounds, beside a compiled graph that returns tensors of the
same shapes and computes next to nothing: what ``torch.compile`` costs by itself.
"""

import argparse
import functools
import statistics
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from peers.contenders import EPS, Ours, Problem
from rich.console import Console
from rich.table import Table
from rounds import ROUND_SECONDS, fresh, interleave
from shapes import Shape
from torch import Tensor
from torch.utils.benchmark import Timer

import topn_gating
from topn_gating.ops import Assign, Gate, GateOptions

SHAPE = Shape(1, 8, 16, 4, 2)
TOKENS = (4, 16, 64, 1024)
WAYS = ("eager", "compiled", "empty graph")

Forward = Callable[[], Sequence[Tensor]]


def calls() -> Iterator[tuple[str, Forward, Sequence[Tensor]]]:
    """Yields names, forward calls, and the tensors with respect to which the backward pass differentiates."""
    ours = Ours(Problem.make(SHAPE, torch.float32))
    x, weight = ours.problem.x, ours.problem.weight
    logits = F.linear(x, weight).detach().requires_grad_()
    routing = ours.module.route(x.detach())
    rows = topn_gating.dispatch(x.detach(), routing).requires_grad_()
    ops, threshold, draws = torch.ops.topn_gating, ours.module.threshold_train, torch.rand_like(routing.weight)
    top = ops.gate(logits.detach(), *(None,) * 4, SHAPE.k, *GateOptions(EPS), True, False)[:2]
    top[0].requires_grad_()

    yield "torch.softmax", lambda: (torch.softmax(logits, -1),), [logits]
    yield "torch.topk", lambda: torch.topk(logits, SHAPE.k), [logits]
    yield "F.linear", lambda: (F.linear(x, weight),), [x, weight]
    yield "ops.gate", lambda: Gate.call(logits, *(None,) * 4, SHAPE.k, *GateOptions(EPS), True, False), [logits]
    yield (
        "ops.assign",
        lambda: Assign.call(*top, draws, threshold, None, None, SHAPE.e, ours.problem.capacity, 1, 0, EPS),
        [top[0]],
    )
    yield "dispatch", lambda: (topn_gating.dispatch(x, routing),), [x]
    yield "combine", lambda: (topn_gating.combine(rows, routing),), [rows]
    yield "TopNGating.route", ours.gate, [x, weight]
    yield "route, dispatch, combine", ours.full, [x, weight]


def there_and_back(forward: Forward, inputs: Sequence[Tensor]) -> Forward:
    """Returns a call of ``forward`` and of its backward pass to ``inputs``, from precomputed gradients of the outputs."""
    wanted = [i for i, output in enumerate(forward()) if isinstance(output, Tensor) and output.requires_grad]
    grads = [torch.ones_like(forward()[i]) for i in wanted]

    def step() -> Sequence[Tensor]:
        outputs = forward()
        return torch.autograd.grad([outputs[i] for i in wanted], inputs, grads)

    return step


def microseconds(call: Forward, seconds: float) -> str:
    """Returns the median time of a call."""
    timer = Timer("call()", globals={"call": call}, num_threads=1)
    return f"{1e6 * timer.blocked_autorange(min_run_time=seconds).median:.1f}"


def route(logits: Tensor) -> topn_gating.Routing:
    """Routes as users do, with the default options."""
    return topn_gating.route(logits, SHAPE.k)


def empty_graph(logits: Tensor) -> topn_gating.Routing:
    """Returns tensors of the shapes and types of a routing, of which the same have a gradient."""
    weight, (balance_loss, router_z_loss) = logits[..., : SHAPE.k] + 1, (logits[0, 0, :2] + 1).unbind()
    groups, tokens, experts = logits.shape
    capacity = topn_gating.expert_capacity(tokens, experts, 1.25)
    shapes = weight.shape, weight.shape, (groups, experts, capacity), (groups, experts)
    expert, slot, source, demand = (torch.full(s, i, dtype=torch.int32, device=logits.device) for i, s in enumerate(shapes))
    return topn_gating.Routing(expert, weight, slot, source, demand, balance_loss, router_z_loss)


def compiled_rows(tokens: Sequence[int], seconds: float) -> Iterator[tuple[str, ...]]:
    """Yields for each number of tokens the median times of each of ``WAYS``, forward and with the backward pass."""
    for n in tokens:
        fresh()
        logits = torch.randn(SHAPE.b, n, SHAPE.e, requires_grad=True)
        compiled = (torch.compile(f, fullgraph=True, dynamic=False) for f in (route, empty_graph))
        calls = {way: functools.partial(f, logits) for way, f in zip(WAYS, (route, *compiled), strict=True)}
        steps = {f"{way}, forward": torch.no_grad()(call) for way, call in calls.items()}
        steps |= {f"{way}, both": there_and_back(call, [logits]) for way, call in calls.items()}
        figures = interleave(steps, max(1, round(seconds / ROUND_SECONDS)))
        yield f"{n} tokens", *(f"{1e3 * statistics.median(figure.values):.1f}" for figure in figures.values())


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1, help="for each figure")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="of route, eager and compiled")
    options = parser.parse_args(arguments)
    table = Table(title=f"µs a call, {SHAPE}")
    table.add_column()
    table.add_column("forward", justify="right")
    table.add_column("forward + backward", justify="right")
    for name, forward, inputs in calls():
        both = there_and_back(forward, inputs)
        table.add_row(name, *(microseconds(call, options.seconds) for call in (torch.no_grad()(forward), both)))
    Console().print(table)
    torch.set_num_threads(1)
    table = Table("", *WAYS, *WAYS, title="µs a call of route: forward, then forward + backward")
    for row in compiled_rows(options.tokens, options.seconds):
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
