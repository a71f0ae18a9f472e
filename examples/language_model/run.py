"""The command line: trains a small Mixture-of-Experts language model and shows what its experts did."""

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .data import even_windows, load_corpus, unigram_entropy
from .ranks import started_by_torchrun

if TYPE_CHECKING:
    from rich.console import Console

    from .report import Results
    from .train import Settings

PACKAGES = ("matplotlib", "rich", "tqdm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, prints the tables and writes the picture.

    Returns:
        The exit code: 0 if the model learned and every expert is alive.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        print(f'The demo needs {", ".join(missing)}: pip install "topn_gating[demo]"', file=sys.stderr)
        return 1
    if options.tensorboard is not None and importlib.util.find_spec("tensorboard") is None:
        print("--tensorboard needs tensorboard: pip install tensorboard", file=sys.stderr)
        return 1
    from rich.console import Console

    from .train import Settings

    sizes = {name: value for name, value in vars(options).items() if name not in ("out", "tensorboard")}
    try:
        settings = Settings(**sizes)
    except ValueError as error:
        parser.error(str(error))
    console = Console()
    if started_by_torchrun():
        return _compare(settings, console, options.out)
    from .report import draw, show

    results = measure(settings, console, options.tensorboard)
    show(results, console)
    draw(results, options.out)
    console.print(f"Picture: {options.out}", highlight=False, soft_wrap=True)
    return 0 if results.passed else 1


def _compare(settings: "Settings", console: "Console", out: Path) -> int:
    """Trains on the ranks of torchrun, and in one process; shows and draws both. Returns the exit code."""
    from .distributed import compare

    runs = compare(settings)
    if runs is None:
        return 0
    from .distributed_report import draw, same_losses, show

    show(*runs, settings, console)
    draw(*runs, settings, out)
    console.print(f"Picture: {out}", highlight=False, soft_wrap=True)
    return 0 if same_losses(*runs) else 1


def measure(settings: "Settings", console: "Console", log: Path | None = None) -> "Results":
    """Trains a model and evaluates it before and after training. The same seed gives the same losses.

    With a folder ``log`` there is a TensorBoard log of training in it.
    """
    from .report import Results
    from .train import LanguageModel, evaluate, train

    torch.manual_seed(settings.seed)
    corpus = load_corpus()
    held_out = even_windows(corpus.held_out, settings.windows, settings.context + 1)
    model = LanguageModel(settings)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(f"{parameters / 1e6:.1f} M parameters, {len(corpus.train) / 1e6:.1f} MB of text", highlight=False)
    before = evaluate(model, held_out)
    with contextlib.ExitStack() as stack:
        writer = None
        if log is not None:
            from torch.utils.tensorboard import SummaryWriter

            writer = stack.enter_context(SummaryWriter(str(log)))
        history = train(model, corpus.train, held_out, settings, writer)
    after = evaluate(model, held_out)
    return Results(settings, history, before, after, unigram_entropy(held_out[:, 1:]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python examples/language_model",
        description="Trains a small MoE language model on the standard library's source and draws a picture.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=_file_to_write, default=Path("demo.png"), help="the picture")
    parser.add_argument("--tensorboard", type=Path, metavar="DIR", help="log each training step there for TensorBoard")
    parser.add_argument("--seed", type=int, default=0, help="two runs under one seed give the same losses")
    parser.add_argument("--steps", type=_count, default=800, help="optimizer steps")
    parser.add_argument("--batch", type=_count, default=8, help="sequences in a step")
    parser.add_argument("--context", type=_count, default=128, help="bytes in a sequence")
    parser.add_argument("--dim", type=_count, default=128, help="features of a token, a multiple of 32")
    parser.add_argument("--layers", type=_count, default=2, help="transformer blocks, each with its experts")
    parser.add_argument("--experts", type=_count, default=8, help="experts of a block")
    parser.add_argument("--windows", type=_count, default=256, help="held-out sequences that the loss is computed over")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _file_to_write(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    return path
