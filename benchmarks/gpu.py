"""Every kernel on a GPU: its time, the bytes that it must move, and the share of the card's copy bandwidth that it reaches.

    python3 benchmarks/gpu.py [--shapes 8,4096,4096,8,2 …] [--dtype bfloat16 float32] [--rounds 20] [--out FILE]

A kernel's time is the median of replays of a CUDA graph of several calls, so that it holds no time of Python. The bytes are
those of the tensors that the kernel has to read and to write; of a tensor that it gathers from, the rows that it needs. What
fits the second-level cache twice over is marked: from call to call it may not reach memory at all. What stands beside the
kernels: torch.softmax and torch.topk on the same logits, in a graph too; the routing by topn_gating.reference, eager and
compiled, as Python calls it; dispatch and combine as einsums over the dense tensors, in a graph.

``--device cpu`` measures calls by the clock: it tries out this file, and its times are no figures of a GPU.
"""

import argparse
import datetime
import importlib.util
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from shapes import Shape
from torch import Tensor

import topn_gating
from topn_gating import reference
from topn_gating.dtypes import real_dtype
from topn_gating.ops import POLICIES

EPS, THRESHOLD, POLICY = 1e-9, 0.2, "random"  # the module's defaults
SECONDS = 0.3  # of one measurement, about
NOT_MEASURED, TOO_LARGE = "not measured", "does not fit"


SHAPES = [
    Shape(8, 4096, 4096, 8, 2),
    Shape(4, 8192, 4096, 64, 8),
    Shape(1, 131072, 2048, 128, 8),
    Shape(1, 1000000, 512, 256, 8),
    Shape(1024, 128, 1024, 16, 2),
    Shape(1, 128, 4096, 256, 8),
]
# For the sanitizers: more than one tile, rows of no whole vector, experts above a warp and a block, ranks above a warp.
SMALL = [
    Shape(2, 70, 24, 5, 2),
    Shape(1, 700, 33, 40, 3),
    Shape(3, 40, 16, 300, 8),
    Shape(1, 20, 8, 48, 40),
    Shape(2, 9, 7, 1, 1),
]


class Traffic(NamedTuple):
    """What an operator must move, by the names of its schema: whole tensors, and parts of those that it gathers from."""

    whole: str
    pair_elements: str = ""  # an element for each pair that holds a slot
    pair_rows: str = ""  # a row for each of them
    token_rows: str = ""  # a row for each token that holds a slot

    def bytes(self, tensors: dict[str, Tensor | None], slot: Tensor) -> int:
        """Bytes of one call; a tensor that is None is none."""
        pairs, tokens = int((slot >= 0).sum()), int((slot >= 0).any(-1).sum())
        parts = (
            (self.whole, Tensor.numel),
            (self.pair_elements, lambda t: pairs),
            (self.pair_rows, lambda t: pairs * t.shape[-1]),
            (self.token_rows, lambda t: tokens * t.shape[-1]),
        )
        found = [(tensors[name], count) for names, count in parts for name in names.split()]
        return sum(count(t) * t.element_size() for t, count in found if t is not None)


TRAFFIC = {
    "gate": Traffic("logits weight expert importance top_count balance_loss router_z_loss"),
    "gate_backward": Traffic("grad_weight grad_balance_loss grad_router_z_loss logits expert top_count grad_logits"),
    "assign": Traffic("weight expert draws threshold kept slot source demand"),
    "assign_backward": Traffic("grad_kept slot grad_weight"),
    "dense": Traffic("weight expert slot dispatch combine"),
    "dense_backward": Traffic("expert slot grad_weight", pair_elements="grad_dispatch grad_combine"),
    "dispatch": Traffic("source y", pair_elements="expert slot", token_rows="x"),
    "dispatch_backward": Traffic("expert slot grad_x grad_weight", pair_elements="source", pair_rows="grad_y", token_rows="x"),
    "combine": Traffic("expert slot out", pair_elements="weight source", pair_rows="y"),
    "combine_backward": Traffic(
        "source grad_y grad_weight", pair_elements="weight expert slot", pair_rows="y", token_rows="grad_out"
    ),
}
ROUTE, TOPK = "gate and assign", "torch.softmax and torch.topk"
EAGER, COMPILED = "reference route, eager", "reference route, compiled"
EINSUMS = {"einsum of dispatch": "...nd,...nec->...ecd", "einsum of combine": "...ecd,...nec->...nd"}
ROWS = [*TRAFFIC, ROUTE, TOPK, *EINSUMS, EAGER, COMPILED]


def operator(name: str):
    """The operator's overload, which knows its schema."""
    return getattr(torch.ops.topn_gating, name).default


class Problem:
    """A shape's inputs. Routing is kept; token rows and dense tensors are made for whoever asks, and freed after."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str) -> None:
        self.shape, self.dtype, self.device, self.real = shape, dtype, device, real_dtype(dtype)
        b, n, _, e, k = shape
        self.capacity = topn_gating.expert_capacity(n, e, 1.25)
        torch.manual_seed(0)
        self.logits = self.normal(b, n, e)
        self.draws = torch.rand(b, n, k, device=device, dtype=self.real)
        self.threshold = torch.full((k,), THRESHOLD, device=device, dtype=self.real)
        self.weight, self.expert, _, self.top_count, *_ = operator("gate")(**self.arguments("gate"))
        self.kept, self.slot, self.source, _ = operator("assign")(**self.arguments("assign"))

    def normal(self, *shape: int) -> Tensor:
        """Random numbers of the problem's type."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def route(self) -> Sequence[Tensor]:
        """From logits to slots."""
        weight, expert, *_ = operator("gate")(**self.arguments("gate"))
        return operator("assign")(**self.arguments("assign") | {"weight": weight, "expert": expert})

    def tokens(self) -> Tensor:
        """Rows of tokens."""
        return self.normal(self.shape.b, self.shape.n, self.shape.d)

    def slots(self) -> Tensor:
        """Rows of the experts' buffers."""
        return self.normal(*self.source.shape, self.shape.d)

    def dense(self) -> Sequence[Tensor]:
        """Both dense tensors."""
        return operator("dense")(**self.arguments("dense"))

    def arguments(self, name: str) -> dict:
        """The operator's arguments, by the names of its schema."""
        e, options = self.shape.e, {"eps": EPS, "noise_mult": 1.0, "soft": False}
        given = {"noise": None, "token_mask": None}
        if name == "gate":
            return {"logits": self.logits, "top_n": self.shape.k, "losses": True, **given, **options}
        if name == "gate_backward":
            one = torch.ones((), device=self.device, dtype=self.real)
            grads = {"grad_weight": self.weight, "grad_importance": None, "grad_balance_loss": one, "grad_router_z_loss": one}
            return {**grads, "logits": self.logits, "expert": self.expert, "top_count": self.top_count, **given, **options}
        if name == "assign":
            arguments = {"weight": self.weight, "expert": self.expert, "draws": self.draws, "threshold": self.threshold}
            sizes = {"num_gates": e, "capacity": self.capacity, "policy": POLICIES.index(POLICY), "eps": EPS}
            return {**arguments, "token_mask": None, **sizes}
        if name == "assign_backward":
            return {"grad_kept": self.weight, "slot": self.slot}
        held = {"expert": self.expert, "slot": self.slot}
        if name == "dense":
            options = {"num_gates": e, "capacity": self.capacity, "dtype": self.dtype, "straight_through": True}
            return {"weight": self.kept, **held, **options}
        if name == "dense_backward":
            grad_dispatch, grad_combine = self.dense()
            return {"grad_dispatch": grad_dispatch, "grad_combine": grad_combine, **held}
        held["source"] = self.source
        if name == "dispatch":
            return {"x": self.tokens(), "weight": self.kept, **held, "straight_through": True}
        if name == "dispatch_backward":
            return {"grad_y": self.slots(), "x": self.tokens(), **held}
        if name == "combine":
            return {"y": self.slots(), "weight": self.kept, **held}
        return {"grad_out": self.tokens(), "y": self.slots(), "weight": self.kept, **held}

    def large_bytes(self, name: str) -> int:
        """Memory that the dense tensors and the rows of a row of the table take: all else is small beside it."""
        b, n, d, e, _ = self.shape
        dense, rows = 2 * b * n * e * self.capacity, (b * n + b * e * self.capacity) * d
        if name in EINSUMS:
            count = dense + rows
        elif name.startswith("dense"):
            count = dense
        else:
            count = rows * {"dispatch": 1, "combine": 1, "dispatch_backward": 2, "combine_backward": 2}.get(name, 0)
        return count * self.dtype.itemsize

    def compared(self, name: str) -> Callable[[], object]:
        """What stands beside the operators."""
        if name == ROUTE:
            return self.route
        if name == TOPK:
            return lambda: torch.topk(torch.softmax(self.logits, -1), self.shape.k)
        if name in EINSUMS:
            rows, dense = (self.tokens(), self.dense()[0]) if "dispatch" in name else (self.slots(), self.dense()[1])
            return lambda: torch.einsum(EINSUMS[name], rows, dense)
        options = {"top_n": self.shape.k, "capacity": self.capacity, "policy": POLICY, "threshold": self.threshold}
        function = reference.route
        if name == COMPILED:
            torch._dynamo.reset()  # a shape seen before would make this one's sizes symbolic
            function = torch.compile(function)
        return lambda: function(self.logits, draws=self.draws, **options)


class Figure(NamedTuple):
    """A row's time in seconds, the bytes that it must move where that is known, or why there is no time."""

    seconds: float | None = None
    bytes: int | None = None
    why: str = NOT_MEASURED


def seconds_of(call: Callable[[], object], device: str, rounds: int, *, graph: bool = True) -> float:
    """Median time of a call."""
    if device == "cpu":
        call()
        return statistics.median(_timed(call) for _ in range(rounds))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
        once = _elapsed(call)
        calls = min(max(1, round(1e-3 / once)), 50)
        rounds = max(3, min(rounds, round(SECONDS / (calls * once))))

        def run() -> None:
            for _ in range(calls):
                call()

        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured, stream=stream):
                run()
            run = captured.replay
        run()
        median = statistics.median(_elapsed(run, ahead=graph) for _ in range(rounds)) / calls
    torch.cuda.current_stream().wait_stream(stream)
    return median


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _elapsed(call: Callable[[], object], *, ahead: bool = False) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if ahead:
        torch.cuda._sleep(200_000)  # the call is in the queue before the GPU comes to it: no time of its launch counts
    start.record()
    call()
    end.record()
    end.synchronize()
    return max(1e-3 * start.elapsed_time(end), 1e-7)


def bytes_of(name: str, arguments: dict, results: Tensor | Sequence[Tensor], slot: Tensor) -> int:
    """Bytes that an operator must move, for the pairs that hold a slot."""
    results = (results,) if isinstance(results, Tensor) else results
    names = [r.name for r in operator(name)._schema.returns]
    return TRAFFIC[name].bytes(arguments | dict(zip(names, results, strict=True)), slot)


def copy_bandwidth(device: str, rounds: int) -> float:
    """Bytes a second that a large copy reads and writes."""
    size = 2**24 if device == "cpu" else min(2**31, int(free_bytes(device)) // 4)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: target.copy_(source), device, rounds)


@torch.no_grad()
def measure(problem: Problem, name: str, rounds: int) -> Figure:
    """One row of one problem."""
    # Asked before: torch's stable ABI makes an error without a name of a lack of memory inside an operator.
    if problem.large_bytes(name) > 0.95 * free_bytes(problem.device):
        return Figure(why=TOO_LARGE)
    try:
        if name not in TRAFFIC:
            call = problem.compared(name)
            return Figure(seconds_of(call, problem.device, rounds, graph=name not in (EAGER, COMPILED)))
        op, arguments = operator(name), problem.arguments(name)
        moved = bytes_of(name, arguments, op(**arguments), problem.slot)
        return Figure(seconds_of(lambda: op(**arguments), problem.device, rounds), moved)
    except Exception as error:
        # The end of a capture reports again what went wrong inside.
        if any(isinstance(e, torch.OutOfMemoryError) for e in (error, error.__context__)):
            return Figure(why=TOO_LARGE)
        if name in TRAFFIC or name == ROUTE:
            raise
        return Figure(why=f"failed: {type(error).__name__}")


def free_bytes(device: str) -> float:
    """Memory that is left; on the CPU nobody asks."""
    return float("inf") if device == "cpu" else torch.cuda.mem_get_info()[0]


def free(device: str) -> None:
    """Hands cached memory back."""
    if device == "cuda":
        torch.cuda.empty_cache()


def measure_all(shapes: list[Shape], dtypes: list[torch.dtype], device: str, rounds: int, budget: float) -> dict:
    """Figures by shape, type and row. What stands beside the kernels comes last, and goes without when time is out."""
    until, figures = time.monotonic() + budget, {}
    for names in ([*TRAFFIC, ROUTE, TOPK], [*EINSUMS, EAGER], [COMPILED]):
        for shape in shapes:
            for dtype in dtypes:
                if time.monotonic() > until and ROUTE not in names:
                    continue
                try:
                    problem = Problem(shape, dtype, device)
                except torch.OutOfMemoryError:
                    figures |= {(shape, dtype, name): Figure(why=TOO_LARGE) for name in names}
                    continue
                for name in names:
                    figures[shape, dtype, name] = measure(problem, name, rounds)
                    free(device)
                del problem
                free(device)
    return figures


def cells(figure: Figure, bandwidth: float | None, cache: int) -> list[str]:
    """Time, bytes and share of the bandwidth."""
    if figure.seconds is None:
        return [figure.why, "", ""]
    time_shown = f"{1e6 * figure.seconds:,.1f} µs"
    if figure.bytes is None:
        return [time_shown, "", ""]
    share = f"{100 * figure.bytes / figure.seconds / bandwidth:.0f} %"
    return [time_shown, f"{figure.bytes / 1e6:,.2f} MB", share + (" in cache" if figure.bytes <= 2 * cache else "")]


def table(
    figures: dict, shapes: list[Shape], dtypes: list[torch.dtype], bandwidth: float | None, cache: int
) -> list[list[str]]:
    """The table's rows, its head first; a figure that is not there was not measured."""
    head = ["(b, n, d, e, k)", ""]
    for dtype in dtypes:
        head += [str(dtype)[6:], "bytes", "of copy"]
    rows = [head]
    for shape in shapes:
        for name in ROWS:
            row = [str(tuple(shape)) if name == ROWS[0] else "", name]
            for dtype in dtypes:
                row += cells(figures.get((shape, dtype, name), Figure()), bandwidth, cache)
            rows.append(row)
    return rows


def markdown(rows: list[list[str]]) -> str:
    """The rows as a table of Markdown, whose columns stand below each other in plain text, too."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]

    def line(row: list[str]) -> str:
        padded = (c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return "| " + " | ".join(padded) + " |"

    return "\n".join(map(line, [rows[0], rule, *rows[1:]]))


def show(rows: list[list[str]], facts: dict[str, str]) -> None:
    """Prints all, by rich where it is installed and the terminal has the room."""
    print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    if not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        print(markdown(rows))
        return
    from rich.console import Console
    from rich.table import Table

    shown = Table()
    for i, name in enumerate(rows[0]):
        shown.add_column(name, justify="left" if i < 2 else "right")
    for row in rows[1:]:
        shown.add_row(*row, end_section=row[1] == ROWS[-1])
    Console().print(shown)


def machine(device: str, bandwidth: float) -> dict[str, str]:
    """What the figures hold for."""
    build = topn_gating.build_info()
    facts = {"date": datetime.date.today().isoformat(), "copy": f"{bandwidth / 1e9:,.0f} GB/s, read and written"}
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split()
        card = torch.cuda.get_device_properties(0)
        facts["card"] = f"{card.name}, {card.total_memory / 2**30:.0f} GiB, L2 cache {card.L2_cache_size / 2**20:.0f} MiB"
        facts["driver"] = driver[0] if driver else "unknown"
    cuda = f"{build['cuda']} of the build, {torch.version.cuda} of torch"
    return facts | {"torch": torch.__version__, "CUDA": cuda, "topn_gating": topn_gating.__version__}


def sanitize(device: str) -> None:
    """Every operator once on small shapes, nothing timed: for compute-sanitizer to look at."""
    calls = 0
    for shape in SMALL:
        for dtype in (torch.float32, torch.bfloat16):
            problem = Problem(shape, dtype, device)
            for name in TRAFFIC:
                operator(name)(**problem.arguments(name))
                calls += 1
            mask = torch.rand(shape.b, shape.n, device=device) < 0.7
            noise = torch.rand(problem.logits.shape, device=device)
            extra = {"noise": noise, "token_mask": mask, "soft": True}
            for name in ("gate", "gate_backward"):
                operator(name)(**problem.arguments(name) | extra)
            operator("assign")(**problem.arguments("assign") | {"token_mask": mask})
            calls += 3
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{calls} calls of {len(TRAFFIC)} operators ended")


def append(path: Path, rows: list[list[str]], facts: dict[str, str]) -> None:
    """Adds a section to a file of results."""
    lines = [f"## {facts['date']}, {facts.get('card', 'CPU, a trial of the script')}", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" + "\n".join([*lines, "", markdown(rows)]) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, default=SHAPES, metavar="b,n,d,e,k")
    types = ("bfloat16", "float32", "float16", "float64")
    parser.add_argument("--dtype", nargs="+", choices=types, default=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=20, help="replays, of which the median counts")
    parser.add_argument("--budget", type=float, default=100, help="seconds after which the comparisons are left out")
    parser.add_argument("--out", type=Path, metavar="FILE", help="appends the table to this file of Markdown")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--sanitize", action="store_true", help="runs every operator on small shapes, and times nothing")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("This benchmark needs a GPU, and torch sees none.", file=sys.stderr)
        return 1
    if options.device == "cuda" and topn_gating.build_info()["cuda"] is None:
        print("This build of topn_gating has no CUDA kernels: TOPN_GATING_CUDA=1 builds them.", file=sys.stderr)
        return 1
    if options.sanitize:
        sanitize(options.device)
        return 0
    dtypes = [getattr(torch, name) for name in options.dtype]
    bandwidth = copy_bandwidth(options.device, options.rounds)
    free(options.device)
    figures = measure_all(options.shapes, dtypes, options.device, options.rounds, options.budget)
    cache = torch.cuda.get_device_properties(0).L2_cache_size if options.device == "cuda" else 0
    rows, facts = table(figures, options.shapes, dtypes, bandwidth, cache), machine(options.device, bandwidth)
    show(rows, facts)
    if options.out:
        append(options.out, rows, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
