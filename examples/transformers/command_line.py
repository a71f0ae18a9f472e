"""The command line."""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

PACKAGES = ("matplotlib", "rich", "tqdm", "transformers")


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, prints the table and writes the picture.

    Returns:
        The exit code: 0 if both implementations have the same losses.
    """
    options = _parser().parse_args(arguments)
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        print(f'It needs {", ".join(missing)}: pip install "topn_gating[demo,transformers]"', file=sys.stderr)
        return 1
    from report import draw, same_losses, show
    from rich.console import Console
    from tqdm import tqdm
    from training import Settings, configurations, train

    settings = Settings(options.seconds, options.seed, options.batch, options.context, options.dim)
    console, results = Console(), {}
    for name, config in configurations(settings).items():
        with tqdm(total=100, unit="%", desc=name) as bar:

            def progress(share: float, loss: float, bar: tqdm = bar) -> None:
                bar.set_postfix(loss=f"{loss:.2f}", refresh=False)
                bar.update(round(100 * share) - bar.n)

            results[name] = train(config, settings, progress)
    show(results, console)
    draw(results, options.out)
    console.print(f"Picture: {options.out}", highlight=False, soft_wrap=True)
    return 0 if all(map(same_losses, results.values())) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python examples/transformers",
        description="Trains small models of transformers on Python source, stock and with topn_gating's experts.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("demo-transformers.png"), help="the picture")
    parser.add_argument("--seconds", type=float, default=60, help="of training for each model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8, help="sequences in a step")
    parser.add_argument("--context", type=int, default=256, help="bytes in a sequence")
    parser.add_argument("--dim", type=int, default=256, help="features of a token, a multiple of 64")
    return parser
