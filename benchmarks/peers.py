"""Side by side with the peers on the CPU: the same gate, the same weights, the same random numbers, rounds interleaved.

    python -m topn_gating bench [--shapes 1,8192,512,64,8 …] [--rounds 7] [--malloc default|keep] [--json PATH]

What is timed
    gate      from x to the routing and back to the gradients of x and of the gate's weight
    products  what both gates compute by torch: the logits and the gradients of x and of the gate's weight; no gate is faster
    full path the same through dispatch, identity experts and combine; the peers' dispatch and combine are their two einsums
    dense     the (b, n, e, C) dispatch and combine tensors alone, without gradients
The gradients that a loss would send are handed in ready-made, so no loss function is timed. "Extra memory" is the peak of
what the full path allocates above what stood before it: inputs, parameters and the handed-in gradients are not counted, the
output and the gradients that it returns are.

Memory fresh from the kernel costs page faults, which on many machines outweigh the arithmetic. ``--malloc keep`` (the
default) has glibc keep what was freed, for both sides, as an allocator for training would; ``--malloc default`` leaves
glibc as it is. The setting is read when a process starts, so this file starts itself again.
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import topn_gating
from topn_gating.demo.cost import peak_bytes

Step = Callable[[], Sequence[Tensor]]

PRODUCTS = "the gate's three matrix products alone"
GATE = "gate forward+backward, compact"
FULL = "full path forward+backward, compact"
DENSE = "gate forward, dense"
MEMORY = "full path, extra memory"
WARM_UP = 2
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}  # never mmap a block, never give the heap back


class Shape(NamedTuple):
    """Groups, tokens of a group, features, experts, experts of a token."""

    b: int
    n: int
    d: int
    e: int
    k: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """A shape from ``b,n,d,e,k``."""
        sizes = tuple(map(int, text.split(",")))
        if len(sizes) != 5 or min(sizes) < 1:
            raise argparse.ArgumentTypeError(f"a shape is five counts b,n,d,e,k, got {text!r}")
        return cls(*sizes)


class Sample(NamedTuple):
    """One round: seconds and page faults a call."""

    seconds: float
    faults: float


def st_moe_gating() -> type[nn.Module]:
    """TopNGating of st-moe-pytorch."""
    from st_moe_pytorch.st_moe_pytorch import TopNGating

    return TopNGating


def zeta_gating() -> type[nn.Module]:
    """TopNGating of zeta, its one file alone: ``import zeta`` loads dozens of packages."""
    file = next(f for f in importlib.metadata.files("zetascale") or () if str(f) == "zeta/nn/modules/top_n_gating.py")
    spec = importlib.util.spec_from_file_location("zeta_top_n_gating", file.locate())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TopNGating


PEERS = {"st-moe-pytorch": st_moe_gating, "zetascale": zeta_gating}


def our_steps(gate: topn_gating.TopNGating, x: Tensor) -> dict[str, Step]:
    """What is timed of topn_gating."""

    def route() -> Sequence[Tensor]:
        routing = gate.route(x)
        return routing.weight, routing.balance_loss, routing.router_z_loss

    def full() -> Sequence[Tensor]:
        routing = gate.route(x)
        out = topn_gating.combine(topn_gating.dispatch(x, routing), routing)
        return out, routing.balance_loss, routing.router_z_loss

    logits_grad = torch.randn(*x.shape[:-1], gate.num_gates, dtype=x.dtype)

    def products() -> Sequence[Tensor]:
        return torch.autograd.grad(gate.to_gates(x), (x, gate.to_gates.weight), logits_grad)

    return {PRODUCTS: products, **steps(gate, x, route, full)}


def peer_steps(gate: nn.Module, x: Tensor) -> dict[str, Step]:
    """The same of a peer."""

    def full() -> Sequence[Tensor]:
        dispatch, combine, *losses = gate(x)
        y = torch.einsum("bnd,bnec->becd", x, dispatch)
        return torch.einsum("becd,bnec->bnd", y, combine), *losses

    return steps(gate, x, lambda: gate(x), full)


def steps(gate: nn.Module, x: Tensor, route: Step, full: Step) -> dict[str, Step]:
    """The timed steps: ``route`` and ``full`` each with its backward, and the dense forward."""

    def with_backward(forward: Step) -> Step:
        grads = [torch.randn_like(t) if t.dim() else torch.ones_like(t) for t in forward()]

        def step() -> Sequence[Tensor]:
            outputs = forward()
            return outputs[0].detach(), *torch.autograd.grad(outputs, (x, gate.to_gates.weight), grads)

        return step

    return {GATE: with_backward(route), FULL: with_backward(full), DENSE: torch.no_grad()(lambda: gate(x))}


def sample(step: Step, calls: int = 1) -> Sample:
    """Times ``calls`` calls of ``step`` under one seed."""
    torch.manual_seed(0)
    faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
    for _ in range(calls):
        step()
    seconds = time.perf_counter() - start
    return Sample(seconds / calls, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults) / calls)


def interleave(steps: dict[str, Step], rounds: int) -> dict[str, list[Sample]]:
    """``rounds`` samples of every contender, each round all of them, in an order that turns."""
    calls = {}
    for name, step in steps.items():
        seconds = min(sample(step).seconds for _ in range(WARM_UP))
        calls[name] = max(1, round(0.05 / seconds))
    samples = {name: [] for name in steps}
    for i in range(rounds):
        for name in list(steps)[:: 1 if i % 2 else -1]:
            samples[name].append(sample(steps[name], calls[name]))
    return samples


def peak_mebibytes(step: Step) -> float:
    """Extra memory of one call under the seed of all."""
    torch.manual_seed(0)
    return peak_bytes(step) / 2**20


def contenders(shape: Shape, peers: dict[str, type[nn.Module]], dtype: torch.dtype) -> dict[str, dict[str, Step]]:
    """Everyone's steps for one input and one weight."""
    torch.manual_seed(1)
    gate = topn_gating.TopNGating(shape.d, shape.e, top_n=shape.k, dtype=dtype)
    x = torch.randn(shape.b, shape.n, shape.d, dtype=dtype, requires_grad=True)
    all_steps = {"topn_gating": our_steps(gate, x)}
    for name, peer in peers.items():
        module = peer(shape.d, shape.e, top_n=shape.k).to(dtype)
        module.load_state_dict(gate.state_dict())
        all_steps[name] = peer_steps(module, x)
    return all_steps


def share_unlike(ours: Step, theirs: Step) -> float:
    """Share of tokens whose full-path outputs differ: the two must compute the same for their times to compare."""
    rows = []
    for step in (ours, theirs):
        torch.manual_seed(0)
        rows.append(step()[0])
    return (~torch.isclose(*rows, rtol=1e-2, atol=1e-4)).any(-1).double().mean().item()


def measure(shape: Shape, peers: dict[str, type[nn.Module]], dtype: torch.dtype, rounds: int) -> list[dict]:
    """The table's rows of one shape, and the raw samples behind them."""
    all_steps, rows = contenders(shape, peers, dtype), []
    for metric in track((PRODUCTS, GATE, FULL, DENSE, MEMORY), description=str(tuple(shape)), transient=True):
        if metric == MEMORY:
            values, faults = {name: [peak_mebibytes(steps[FULL])] for name, steps in all_steps.items()}, {}
        else:
            samples = interleave({name: steps[metric] for name, steps in all_steps.items() if metric in steps}, rounds)
            values = {name: [1e3 * s.seconds for s in those] for name, those in samples.items()}
            faults = {name: statistics.median(s.faults for s in those) for name, those in samples.items()}
        unit = "MiB" if metric == MEMORY else "ms"
        rows.append({"shape": shape, "metric": metric, "unit": unit, "values": values, "median_page_faults": faults})
    for name in peers:
        unlike = share_unlike(all_steps["topn_gating"][FULL], all_steps[name][FULL])
        if unlike > 1e-3:
            raise RuntimeError(f"{name} and topn_gating differ in {100 * unlike:.2f} % of the tokens of {shape}: no comparison")
    return rows


def cell(values: list[float]) -> str:
    """Median and quartiles."""
    if len(values) < 2:
        return f"{values[0]:,.1f}"
    low, middle, high = statistics.quantiles(values, method="inclusive")
    return f"{middle:,.2f} [dim]({low:,.2f} to {high:,.2f})[/dim]"


def table(rows: list[dict], names: list[str], caption: str) -> Table:
    """The rows as a rich table."""
    shown = Table(title="topn_gating and its peers: median (quartiles)", caption=caption, caption_justify="left")
    shown.add_column("metric")
    shown.add_column()
    shown.add_column(names[0], justify="right")
    for name in names[1:]:
        shown.add_column(name, justify="right")
        shown.add_column("ratio", justify="right")
    for row in rows:
        if row["metric"] == PRODUCTS:
            shown.add_row("[bold]" + ", ".join(f"{name}={size}" for name, size in row["shape"]._asdict().items()))
        ours = statistics.median(row["values"][names[0]])
        cells = [cell(row["values"][names[0]])]
        for name in names[1:]:
            if name in row["values"]:
                cells += [cell(row["values"][name]), f"{statistics.median(row['values'][name]) / ours:,.1f}×"]
        shown.add_row(row["metric"], row["unit"], *cells, end_section=row["metric"] == MEMORY)
    return shown


def machine(threads: int) -> dict[str, str]:
    """What the figures hold for."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    facts = {"cpu": names[0] if names else platform.processor(), "threads": f"{threads} of {os.cpu_count()}"}
    facts |= {"libc": " ".join(platform.libc_ver()), "torch": torch.__version__, "topn_gating": topn_gating.__version__}
    return facts | {key: str(value) for key, value in topn_gating.build_info().items() if key != "torch"}


def restart_with(malloc: str) -> None:
    """Starts this very command again with the environment that the measurement needs, unless it is there already."""
    wanted = {"OMP_WAIT_POLICY": "passive", "KINETO_LOG_LEVEL": "99"} | (KEEP if malloc == "keep" else {})
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | wanted)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m topn_gating bench", description=__doc__.splitlines()[0])
    default = [Shape(1, 8192, 512, 64, 8), Shape(2, 4096, 512, 16, 2)]
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, default=default, metavar="b,n,d,e,k")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=["st-moe-pytorch"])
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="the peers fail on half types")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--malloc", choices=("keep", "default"), default="keep")
    parser.add_argument("--json", type=Path, metavar="PATH", help="writes machine, options and every sample there")
    options = parser.parse_args(arguments)
    restart_with(options.malloc)

    console, peers = Console(width=None if sys.stdout.isatty() else 120), {}
    for name in options.peers:
        try:
            peers[name] = PEERS[name]()
        except ImportError as error:
            console.print(f"{name} is left out: {error}. To compare with it: pip install --no-deps {name}")
    torch.set_num_threads(options.threads)
    facts = machine(options.threads)
    console.print("\n".join(f"{key:>18}  {value}" for key, value in facts.items()), highlight=False)
    rows = []
    for shape in options.shapes:
        rows += measure(shape, peers, getattr(torch, options.dtype), options.rounds)
        gc.collect()
    kept = ", ".join(f"{name}={value}" for name, value in KEEP.items())
    malloc = f"keep ({kept})" if options.malloc == "keep" else "default"
    caption = f"{options.dtype}, {options.rounds} rounds, OMP_WAIT_POLICY=passive, --malloc {malloc}"
    console.print(table(rows, ["topn_gating", *peers], caption))
    if options.json:
        options.json.write_text(json.dumps({"machine": facts, "options": vars(options), "rows": rows}, indent=1, default=str))


if __name__ == "__main__":
    main()
