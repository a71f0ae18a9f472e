"""``python -m topn_gating info | demo | bench``."""

import argparse
import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import topn_gating

# Threads that spin while they wait slow a busy machine several times over; the profiler reports its start and stop on stderr.
DEMO_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "KINETO_LOG_LEVEL": "99"}
PEERS = Path(__file__).resolve().parents[1] / "benchmarks" / "peers.py"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if options.command == "bench":
        return bench(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return info() if options.command == "info" else demo(options, parser)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m topn_gating", description=topn_gating.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="how the extension was built")
    commands.add_parser("bench", add_help=False, help="benchmarks/peers.py of the source tree, with the arguments that follow")
    options = commands.add_parser(
        "demo",
        help="train a small MoE language model on the standard library's source, draw a picture",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    options.add_argument("--out", type=_file_to_write, default=Path("demo.png"), help="the picture")
    options.add_argument("--seed", type=int, default=0, help="two runs under one seed give the same losses")
    options.add_argument("--steps", type=_count, default=800, help="optimizer steps")
    options.add_argument("--batch", type=_count, default=8, help="sequences in a step")
    options.add_argument("--context", type=_count, default=128, help="bytes in a sequence")
    options.add_argument("--dim", type=_count, default=128, help="features of a token, a multiple of 32")
    options.add_argument("--layers", type=_count, default=2, help="transformer blocks, each with its experts")
    options.add_argument("--experts", type=_count, default=8, help="experts of a block")
    options.add_argument("--windows", type=_count, default=256, help="held-out sequences that the loss is taken over")
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


def info() -> int:
    """Prints how the extension was built."""
    facts = {"topn_gating": topn_gating.__version__} | topn_gating.build_info()
    shown = {name: " ".join(value) if isinstance(value, list) else value for name, value in facts.items()}
    shown = {name: value or "none" for name, value in shown.items()}
    if _missing("rich"):
        print("\n".join(f"{name}: {value}" for name, value in shown.items()))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(title="topn_gating: the build", show_header=False)
    for row in shown.items():
        table.add_row(*row)
    Console().print(table)
    return 0


def bench(arguments: list[str]) -> int:
    """Runs the comparison with the peers as a script."""
    if not PEERS.exists():
        print("The benchmark is benchmarks/peers.py in the source tree; this installation does not have it.", file=sys.stderr)
        return 1
    if _missing("rich"):
        print('The benchmark needs rich: pip install "topn_gating[bench]"', file=sys.stderr)
        return 1
    sys.argv = [str(PEERS), *arguments]
    sys.path.insert(0, str(PEERS.parent))  # as for a script: it imports what lies beside it
    runpy.run_path(str(PEERS), run_name="__main__")
    return 0


def demo(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Trains, reports, draws."""
    missing = _missing("matplotlib", "rich", "tqdm")
    if missing:
        print(f'The demo needs {", ".join(missing)}: pip install "topn_gating[demo]"', file=sys.stderr)
        return 1
    from .demo.run import run
    from .demo.train import Settings

    sizes = {name: value for name, value in vars(options).items() if name not in ("command", "out")}
    try:
        settings = Settings(**sizes)
    except ValueError as error:
        parser.error(str(error))
    return run(settings, options.out)


def _missing(*packages: str) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]


def _restart_with(environment: dict[str, str]) -> None:
    """Starts this very command again if ``environment`` is not set yet: such settings are read when a process starts."""
    if not environment.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment | os.environ)


if __name__ == "__main__":
    if sys.argv[1:2] == ["demo"]:
        _restart_with(DEMO_ENVIRONMENT)
    sys.exit(main())
