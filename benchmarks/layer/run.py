"""Compares whole Mixture-of-Experts layers on the CPU, router included: same tokens and weights, in interleaved rounds.

    python benchmarks/layer [--models Mixtral-like …] [--loads even Zipf] [--dtypes float32 bfloat16] [--malloc keep|default]
    python benchmarks/layer --json cells.json --picture layer.png
    python benchmarks/layer --cells cells.json --picture layer.png      # the figures of an earlier run, or of several

The layers have the routers and experts of the models that they are named after, with fewer features. What is timed:
    training step    2048 tokens, forward, and backward to the gradients of the tokens and of all weights
    prefill          2048 tokens, forward without gradients
    decode           64, 8 and 1 tokens, forward without gradients
The tokens are one sequence. Their gates' logits are drawn so that all experts are equally popular, or the i-th in proportion to
1/i (Zipf). "Training: peak memory" is the most that the step holds in addition to inputs and weights, the gradients of the
weights included, which are as large for all; "saved for backward" is what the forward pass keeps for the backward pass, the
outputs included. "Pairs left out" are those below a threshold or over an expert's capacity, in the training step.

The floor is the time of the layer's matrix products alone, into memory allocated beforehand. The outputs and gradients of every
other contender are compared with those of transformers' block, or with what its description says, before it is timed.

Megatron-core's grouped experts need a GPU (grouped_gemm or Transformer Engine), and its layer moves its router to one; so its
SequentialMLP is run, between its router functions, permute and unpermute.

New memory from the operating system costs page faults, which on many machines take longer than the arithmetic. ``--malloc
keep`` (the default) makes glibc keep freed memory, for all contenders, as an allocator for training would; ``--malloc default``
keeps glibc's defaults, and returns what the others freed to the system before each contender's turn. glibc reads the setting
when a process starts, so the benchmark restarts itself.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import command
import torch
from rich.console import Console

from . import measure, picture, tables
from .contenders import LOADS, BatchedMm, Eager, GroupedMm
from .floor import Floor
from .measure import CASES, Section
from .models import MODELS
from .others import Megatron, StMoe
from .ours import Capacity, CapacityForAll, Ours, OursInTransformers

CONTENDERS = (Ours, OursInTransformers, Capacity, CapacityForAll, GroupedMm, BatchedMm, Eager, Megatron, StMoe, Floor)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command's options."""
    parser = command.options("python benchmarks/layer", __doc__.splitlines()[0])
    models, names = [model.name for model in MODELS], [kind.name for kind in CONTENDERS]
    parser.add_argument("--models", nargs="+", choices=models, default=models, metavar="MODEL", help=", ".join(models))
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=LOADS)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--contenders", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--tokens", type=count, default=2048, help="of a training step and of prefill")
    parser.add_argument("--decode", type=count, nargs="+", default=[64, 8, 1], help="numbers of tokens to decode")
    parser.add_argument("--gibibytes", type=float, default=4, help="of copied weights, above which a contender is left out")
    parser.add_argument("--quick", action="store_true", help="few features, to try the command")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draws the times over the floor there")
    parser.add_argument("--cells", type=Path, nargs="+", metavar="JSON", help="shows what --json wrote, without measuring")
    options = parser.parse_args(arguments)
    if max(options.decode) > options.tokens:
        parser.error(f"--decode must be at most --tokens, {options.tokens}, got {max(options.decode)}")
    return options


def count(text: str) -> int:
    """Returns the positive number that a text describes."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number of tokens is at least 1, got {text!r}")
    return int(text)


def sections(options: argparse.Namespace) -> list[Section]:
    """Returns the sections of the table that the options ask for."""
    models = [model.shrunk() if options.quick else model for model in MODELS if model.name in options.models]
    return [Section(*key) for key in itertools.product(models, options.loads, options.dtypes)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 200)
    if options.cells:
        runs = [json.loads(path.read_text()) for path in options.cells]
        facts, cells, kinds = runs[0]["machine"], [cell for run in runs for cell in run["cells"]], CONTENDERS
    else:
        command.restart_with(options.malloc)
        torch.set_num_threads(options.threads)
        facts = command.machine(options.threads) | {"measured": command.conditions(options)}
        kinds = command.installed(CONTENDERS, options.contenders, console)
        cells = [cell for section in sections(options) for cell in measure.measure_section(section, kinds, options)]
    console.print("\n".join(f"{key:>18}  {value}" for key, value in facts.items()), highlight=False)
    order, how = [kind.name for kind in kinds], facts["measured"]
    console.print(tables.rich_table(cells, order, how))
    console.print(tables.notes(cells, kinds), highlight=False)
    command.write(options, facts, cells, tables.markdown(cells, order, how))
    if options.picture:
        picture.draw(cells, order, options.picture, how)
