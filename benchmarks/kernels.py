"""Times every operator on a CPU or a GPU and compares it with a copy that moves as many bytes.

    python benchmarks/kernels.py [--device cuda] [--shapes 8,4096,4096,8,2 …] [--dtypes bfloat16 float32] [--out FOLDER]
    python benchmarks/kernels.py --packages build/old .     # two versions of topn_gating, measured alternately
    python benchmarks/kernels.py --dropless                 # assign, dispatch and combine in the dropless layout

A time is a median; on a GPU it is that of calls in a replayed CUDA graph, without Python. The bytes are those of the tensors
that the operator must read and write; of a tensor that it gathers from, only the rows that it needs. The percentage after a
time is the time of a copy that reads and writes as many bytes, divided by the operator's: 100 % is as fast as memory allows.
For comparison, the table also has torch.softmax and torch.topk on the same logits, dispatch and combine as einsums over the
dense tensors, and the routing of topn_gating.reference, eager and compiled, timed as Python calls it.

Every shape is measured in a process of its own, and every line is printed as soon as it is measured. A process that crashes or
hangs loses the line that it was measuring; the other lines follow in a new process. An interrupt (SIGINT) ends the measurement,
and the tables of what was measured are still printed.
"""

import argparse
import datetime
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import clock
import torch
from operators import COMPARISONS, COMPILED, EAGER, ROUTE, TOPK, TRAFFIC, Problem, names, operator, results_of
from shapes import Shape
from tables import markdown_table

import topn_gating

SHAPES = {
    "cpu": [
        Shape(1, 1024, 512, 8, 2),
        Shape(4, 1024, 512, 16, 2),
        Shape(2, 4096, 512, 16, 2),
        Shape(8, 2048, 256, 64, 4),
        Shape(1, 8192, 512, 64, 8),
    ],
    "cuda": [
        Shape(4, 8192, 4096, 64, 8),
        Shape(1, 1000000, 512, 256, 8),
        Shape(1, 8192, 512, 64, 8),
        Shape(1, 128, 4096, 256, 8),
        Shape(8, 4096, 4096, 8, 2),
        Shape(1, 131072, 2048, 128, 8),
        Shape(1024, 128, 1024, 16, 2),
    ],
}
DTYPES = {"cpu": ["float32", "bfloat16"], "cuda": ["bfloat16", "float32"]}
# More than one tile, rows that are no multiple of a vector, more experts than a warp and a block have threads, more ranks than
# a warp has threads.
SMALL = [
    Shape(2, 70, 24, 5, 2),
    Shape(1, 700, 33, 40, 3),
    Shape(3, 40, 16, 300, 8),
    Shape(1, 20, 8, 48, 40),
    Shape(2, 9, 7, 1, 1),
]
TOO_LARGE, NOT_MEASURED = "does not fit", "not measured"
START_SECONDS = 60  # allowed for importing torch, in addition to the time of the first line
MARK = "@@ "  # starts the lines that a child process writes for its parent
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}  # threads that spin at a barrier would slow other work down
CHILD = [sys.executable, str(Path(__file__).resolve())]


class Line(NamedTuple):
    """A line of the table: a version of the package, a shape, a type, and the operator or what it is compared with."""

    package: str
    shape: Shape
    dtype: str
    name: str


class Figure(NamedTuple):
    """A line's time in seconds, the bytes that it must move and the time of their copy, or why it has no time."""

    seconds: float | None = None
    bytes: int | None = None
    copy: float | None = None
    why: str = NOT_MEASURED

    def __str__(self) -> str:
        """Returns the time, and the copy's time as a percentage of it."""
        if self.seconds is None:
            return self.why
        return f"{1e6 * self.seconds:,.1f} µs" + (f" {100 * self.copy / self.seconds:.0f}%" if self.copy else "")


@torch.no_grad()
def measure(problem: Problem, name: str, rounds: int) -> Figure:
    """Measures one line."""
    device = problem.device
    # Checked before the call: an operator of torch's stable ABI reports an allocation that failed as an error without a type.
    if problem.large_bytes(name) > 0.95 * clock.free_bytes(device):
        return Figure(why=TOO_LARGE)
    try:
        if name not in TRAFFIC:
            return Figure(clock.seconds_of(problem.comparison(name), device, rounds, graph=name not in (EAGER, COMPILED)))
        op, arguments = operator(name), problem.arguments(name)
        moved = TRAFFIC[name].bytes(arguments | results_of(name, op(**arguments)), problem.slot)
        seconds = clock.seconds_of(lambda: op(**arguments), device, rounds)
        arguments.clear()
        clock.release(device)
        return Figure(seconds, moved, clock.copy_seconds(moved, device, rounds))
    except Exception as error:
        # If a capture fails inside, its end raises another error, whose context is the first one.
        if any(isinstance(e, torch.OutOfMemoryError) for e in (error, error.__context__)):
            return Figure(why=TOO_LARGE)
        return Figure(why=f"failed: {type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}")


def child(shape: Shape, lines: Sequence[tuple[str, str]], options: argparse.Namespace) -> None:
    """Measures lines ``(dtype, name)`` of a shape and reports to the parent when each begins and ends."""

    def tell(**message: object) -> None:
        print(MARK + json.dumps(message), flush=True)

    problem = None
    for dtype, name in lines:
        tell(begins=[dtype, name])
        try:
            if problem is None or problem.dtype != getattr(torch, dtype):
                problem = None
                clock.release(options.device)
                problem = Problem(shape, getattr(torch, dtype), options.device, options.dropless)
            figure = measure(problem, name, options.rounds)
        except torch.OutOfMemoryError:
            figure = Figure(why=TOO_LARGE)
        tell(ends=[dtype, name], figure=figure)
        clock.release(options.device)


def figures_of(shape: Shape, package: str, lines: Sequence[tuple[str, str]], options: argparse.Namespace) -> Iterator:
    """Runs children until every line of a shape has a figure; yields each line with it."""
    waiting = list(lines)
    while waiting:
        asked = json.dumps({"shape": shape, "lines": waiting})
        command = [*CHILD, "--child", asked, "--device", options.device, "--rounds", str(options.rounds)]
        command += ["--dropless"] * options.dropless
        environment = ENVIRONMENT | os.environ | {"PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}
        begun = why = None
        for message in messages(command, environment, options.seconds):
            if "figure" in message:
                begun = None
                waiting.remove(message["ends"])
                yield Line(package, shape, *message["ends"]), Figure(*message["figure"])
            else:
                begun = message.get("begins", begun)
                why = message.get("why")
        if waiting:  # the child ended early, at a line or before the first
            lost = begun or waiting[0]
            waiting.remove(lost)
            yield Line(package, shape, *lost), Figure(why=why or "ended early")


def messages(command: list[str], environment: dict[str, str], seconds: float) -> Iterator[dict]:
    """Runs a child and yields its messages, and last why it ended if it failed or was silent for ``seconds``."""
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    found: queue.Queue = queue.Queue()

    def read() -> None:
        for line in process.stdout:
            found.put(line)
        found.put(None)

    threading.Thread(target=read, daemon=True).start()
    allowed = seconds + START_SECONDS
    try:
        while (line := found.get(timeout=allowed)) is not None:
            if line.startswith(MARK):
                allowed = seconds
                yield json.loads(line.removeprefix(MARK))
        if process.wait():
            yield {"why": f"crashed: signal {-process.returncode}" if process.returncode < 0 else "failed: see the log"}
    except queue.Empty:
        yield {"why": f"took longer than {seconds:.0f} s"}
    finally:
        process.kill()
        process.wait()


def measure_all(options: argparse.Namespace) -> Iterator:
    """Yields each line with its figure: the operators of all shapes first, then the comparisons while there is time.

    Several packages are measured alternately, ``--turns`` times each; a line's figure is the best.
    """
    until = time.monotonic() + options.budget
    passes = [[*options.names, *(() if options.dropless or options.named else (ROUTE, TOPK))]]
    if not options.dropless and not options.named and len(options.packages) == 1:
        passes.append(list(COMPARISONS))
    for asked in passes:
        for shape in options.shapes:
            if asked is not passes[0] and time.monotonic() > until:
                return
            lines = [[dtype, name] for dtype in options.dtypes for name in asked]
            for _ in range(options.turns):
                for package in options.packages:
                    yield from figures_of(shape, package, lines, options)


def tables(figures: dict[Line, Figure], options: argparse.Namespace) -> str:
    """Returns a table for each type, with a row for each name and a column for each shape; packages share a cell."""
    text = []
    for dtype in options.dtypes:
        heads = [",".join(map(str, shape)) for shape in options.shapes]
        rows = [[dtype, *heads]]
        for name in [*names(options.device), ROUTE, TOPK, *COMPARISONS]:
            found = [[figures.get(Line(p, shape, dtype, name)) for p in options.packages] for shape in options.shapes]
            if any(figure for each in found for figure in each):
                rows.append([name, *map(cell, found)])
        text.append(markdown_table(rows))
    return "\n\n".join(text)


def cell(figures: Sequence[Figure | None]) -> str:
    """Returns the figures of the packages, and the last one's time as a share of the first's."""
    shown = " → ".join(str(figure) if figure else NOT_MEASURED for figure in figures)
    times = [figure.seconds if figure else None for figure in figures]
    return f"{shown} ({times[-1] / times[0]:.2f})" if len(times) > 1 and None not in times else shown


def machine(device: str) -> dict[str, str]:
    """Returns the machine and the versions on which the figures were measured."""
    build = topn_gating.build_info()
    facts = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "topn_gating": topn_gating.__version__}
    if device == "cpu":
        return facts | {"cpu_level": build["cpu_level"], "threads": str(torch.get_num_threads())}
    card = torch.cuda.get_device_properties(0)
    facts["card"] = f"{card.name}, {card.total_memory / 2**30:.0f} GiB, L2 cache {card.L2_cache_size / 2**20:.0f} MiB"
    return facts | {"CUDA": f"{build['cuda']} of the build, {torch.version.cuda} of torch"}


def once(options: argparse.Namespace) -> None:
    """Runs operators once without timing them, for the smoke test, the sanitizers and the profiler.

    The profiler records only the operators, not the setup of their inputs.
    """
    calls = 0
    for shape in options.shapes:
        for dtype in options.dtypes:
            problem = Problem(shape, getattr(torch, dtype), options.device, options.dropless)
            for name, arguments in variants(problem, options.names):
                clock.synchronize(options.device)
                if options.device == "cuda":
                    torch.cuda.cudart().cudaProfilerStart()
                operator(name)(**arguments)
                clock.synchronize(options.device)
                if options.device == "cuda":
                    torch.cuda.cudart().cudaProfilerStop()
                calls += 1
    print(f"{calls} calls of {len(options.names)} operators ended")


def variants(problem: Problem, asked: Sequence[str]) -> Iterator[tuple[str, dict]]:
    """Yields calls of the operators; of gate and assign also with noise, a mask and the soft top-n."""
    for name in asked:
        arguments = problem.arguments(name)
        yield name, arguments
        if name in ("gate", "gate_backward", "assign") and problem.shape in SMALL:
            torch.manual_seed(1)
            mask = torch.rand(problem.shape[:2], device=problem.device) < 0.7
            noise = torch.rand(problem.logits.shape, device=problem.device, dtype=problem.compute_dtype)
            extra = {"token_mask": mask} | ({} if name == "assign" else {"noise": noise, "soft": True})
            yield name, arguments | extra


def smoke(options: argparse.Namespace) -> int:
    """Runs each operator in a process of its own, so that a failure can be attributed; returns the number that failed."""

    def run(name: str) -> bool:
        command = [*CHILD, "--once", "--names", name, "--device", options.device, "--dtypes", *options.dtypes]
        command += ["--dropless"] * options.dropless
        environment = ENVIRONMENT | os.environ | {"CUDA_LAUNCH_BLOCKING": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        said = (done.stdout + done.stderr).strip().splitlines()
        verdict = f"FAILED ({done.returncode})" if done.returncode else "well"
        print(f"{name}: {verdict}, {said[-1] if said else ''}", flush=True)
        return done.returncode != 0

    with ThreadPoolExecutor(4) as pool:
        return sum(pool.map(run, options.names))


def list_launches(options: argparse.Namespace) -> None:
    """Prints the time of each kernel that an operator launches."""
    for shape in options.shapes:
        for dtype in options.dtypes:
            problem = Problem(shape, getattr(torch, dtype), options.device, options.dropless)
            for name in options.names:
                arguments = problem.arguments(name)
                for kernel, seconds in clock.launches(lambda n=name, a=arguments: operator(n)(**a), options.device).items():
                    where = ",".join(map(str, shape))
                    print(f"{where} {dtype} {name}: {1e6 * seconds:,.1f} µs {kernel[:100]}", flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, metavar="b,n,d,e,k")
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32", "float16", "float64"))
    parser.add_argument("--names", nargs="+", choices=list(TRAFFIC), metavar="OPERATOR", help=", ".join(TRAFFIC))
    parser.add_argument("--dropless", action="store_true", help="the dropless layout, and the operators that know it alone")
    parser.add_argument("--packages", nargs="+", default=["."], metavar="FOLDER", help="folders with a built topn_gating")
    parser.add_argument("--turns", type=int, default=1, help="times that each package is measured; the best counts")
    parser.add_argument("--rounds", type=int, default=20, help="samples, of which the median counts")
    parser.add_argument("--seconds", type=float, default=90, help="after which a line that has no figure is given up")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which the comparisons are left out")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="writes RESULTS.md and lines.jsonl there")
    parser.add_argument("--smoke", action="store_true", help="runs each operator in a process of its own, untimed")
    parser.add_argument("--once", action="store_true", help="runs the operators once, untimed, for sanitizers and profilers")
    parser.add_argument("--launches", action="store_true", help="times each kernel launch of the operators")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.dtypes = options.dtypes or DTYPES[options.device]
    options.named = options.names is not None
    options.names = options.names or names(options.device, options.dropless)
    options.shapes = options.shapes or (SMALL if options.once else SHAPES[options.device])
    return options


def report(options: argparse.Namespace) -> int:
    """Measures everything, and prints and writes the tables; returns the exit code."""
    facts = "\n".join(f"- {name}: {value}" for name, value in machine(options.device).items())
    print(facts, flush=True)
    figures: dict[Line, Figure] = {}
    code = 0

    def write(folder: Path | None) -> None:
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            rows = [{**line._asdict(), **figure._asdict()} for line, figure in figures.items()]
            (folder / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            (folder / "RESULTS.md").write_text(f"# Times on {options.device}\n\n{facts}\n\n{tables(figures, options)}\n")

    try:
        for line, figure in measure_all(options):
            best = figures.get(line)
            if not (best and best.seconds and not (figure.seconds and figure.seconds < best.seconds)):
                figures[line] = figure
            size = f" of {figure.bytes / 1e6:,.2f} MB" if figure.bytes else ""
            package = "" if line.package == "." else f" in {line.package}"
            print(f"{','.join(map(str, line.shape))} {line.dtype} {line.name}{package}: {figure}{size}", flush=True)
            write(options.out)
    except KeyboardInterrupt:
        print("interrupted: the tables hold what was measured", flush=True)
        code = 130
    print("\n" + tables(figures, options), flush=True)
    failed = sum(figure.seconds is None and figure.why != TOO_LARGE for figure in figures.values())
    return code or (1 if failed else 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    options = parse(arguments)
    if options.child:
        child(Shape(*options.child["shape"]), options.child["lines"], options)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda needs a GPU, and torch sees none.", file=sys.stderr)
        return 1
    if options.device == "cuda" and topn_gating.build_info()["cuda"] is None:
        print("This build of topn_gating has no CUDA kernels: TOPN_GATING_CUDA=1 builds them.", file=sys.stderr)
        return 1
    if options.smoke:
        return smoke(options)
    if options.once:
        once(options)
    elif options.launches:
        list_launches(options)
    else:
        return report(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
