"""Compares topn_gating with other routers on the CPU: same tokens, gate weight and capacity, in interleaved rounds.

    python benchmarks/peers [--shapes 1,8192,512,64,8 …] [--dtypes float32 bfloat16] [--malloc keep|default]
    python benchmarks/peers --growth growth.png

What is timed
    gate        from x to the routing and its losses; backward: to the gradients of x and of the gate's weight
    full path   the same through dispatch, identity experts and combine
    dense gate  to the (b, n, e, C) dispatch and combine tensors, for contenders that have them
Forward alone runs without gradients. The gradients of the outputs are computed beforehand, so no loss function is timed. Peak
memory is the most that the full path, forward and backward, holds in addition to what was allocated before: inputs, parameters
and the gradients of the outputs are not counted; the output and the returned gradients are.

Contenders with thresholds apply them randomly, the default of st-moe-pytorch (the "random" policy). DeepSpeed and Megatron have
none, route every pair and so fill more slots. Below the table, each contender and the differences of its work are described.
Before a contender is timed, its results are compared with those of topn_gating (harness.difference).

New memory from the operating system costs page faults, which on many machines take longer than the arithmetic. ``--malloc
keep`` (the default) makes glibc keep freed memory, for all contenders, as an allocator for training would; ``--malloc default``
keeps glibc's defaults, and returns what the others freed to the system before each contender's turn. glibc reads the setting
when a process starts, so the benchmark restarts itself.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import command
import torch
from rich.console import Console
from rich.progress import track
from rounds import fresh
from shapes import Shape

from . import growth, harness, tables
from .contenders import Contender, Ours, Problem, Products, Zeros, compiled
from .dense_peers import StMoe, Zeta
from .flat_peers import DeepSpeedDense, DeepSpeedSparse, Megatron
from .plain_torch import PlainTorch

PEERS = (
    StMoe,
    compiled(StMoe),
    Zeta,
    DeepSpeedDense,
    DeepSpeedSparse,
    Megatron,
    PlainTorch,
    compiled(PlainTorch),
)
NOT_HERE = "Tutel is not compared: it is on no package index, and its CPU kernels are built from its repository."
SHAPES = [
    Shape(1, 1024, 512, 8, 2),
    Shape(4, 1024, 512, 16, 2),
    Shape(2, 4096, 512, 16, 2),
    Shape(8, 2048, 256, 64, 4),
    Shape(1, 8192, 512, 64, 8),
]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command's options."""
    names = [peer.name for peer in PEERS]
    parser = command.options("python benchmarks/peers", __doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, default=SHAPES, metavar="b,n,d,e,k")
    parser.add_argument("--peers", nargs="*", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--metrics", nargs="+", choices=harness.METRICS, default=harness.METRICS, metavar="METRIC")
    parser.add_argument("--gibibytes", type=float, default=6, help="of dense tensors, above which a peer is left out")
    parser.add_argument("--growth", type=Path, metavar="PNG", help="draws time and memory against tokens there, instead")
    tokens = "of --growth; a router that takes longer than --seconds gets no more tokens"
    parser.add_argument("--tokens", nargs="+", type=int, default=growth.TOKENS, help=tokens)
    return parser.parse_args(arguments)


def measure(shape: Shape, dtype: str, kinds: Sequence[type[Contender]], options: argparse.Namespace) -> list[dict]:
    """Returns the cells of one shape and type, a dict each."""
    fresh()
    problem = Problem.make(shape, getattr(torch, dtype))
    admitted, words = harness.admit(kinds, problem, options.gibibytes * 2**30)
    cells = []
    for metric in track(options.metrics, description=f"{shape}, {dtype}", transient=True):
        figures = harness.measure_metric(metric, admitted, options.rounds, options.seconds) | words
        cells += harness.cells(shape, dtype, metric, figures)
    return cells


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    options = parse(arguments)
    command.restart_with(options.malloc)
    console = Console(width=None if sys.stdout.isatty() else 160)
    torch.set_num_threads(options.threads)
    torch._logging.set_logs(all=logging.CRITICAL)  # the table shows what fails to compile
    facts = command.machine(options.threads)
    console.print("\n".join(f"{key:>18}  {value}" for key, value in facts.items()), highlight=False)
    kinds = (Ours, *command.installed(PEERS, options.peers, console), Products, Zeros)

    how = command.conditions(options)
    if options.growth:
        kinds = [kind for kind in kinds if kind.full]
        cells = growth.measure(options.tokens, kinds, options)
        growth.draw(cells, options.growth, how)
        text = growth.markdown(cells)
    else:
        cells = [c for shape in options.shapes for dtype in options.dtypes for c in measure(shape, dtype, kinds, options)]
        console.print(tables.rich_table(cells, [kind.name for kind in kinds], how))
        text = tables.markdown(cells, [kind.name for kind in kinds], how)
    console.print(tables.notes(cells, kinds), NOT_HERE, sep="\n", highlight=False)
    command.write(options, facts, cells, text)
