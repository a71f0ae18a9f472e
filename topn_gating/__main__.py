"""``python -m topn_gating info``: how the extension was built."""

import argparse
import importlib.util
import sys
from collections.abc import Sequence

import topn_gating


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m topn_gating", description=topn_gating.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="how the extension was built")
    parser.parse_args(arguments)
    return info()


def info() -> int:
    """Prints how the extension was built."""
    facts = {"topn_gating": topn_gating.__version__} | topn_gating.build_info()
    shown = {name: " ".join(value) if isinstance(value, list) else value for name, value in facts.items()}
    shown = {name: value or "none" for name, value in shown.items()}
    if importlib.util.find_spec("rich") is None:
        print("\n".join(f"{name}: {value}" for name, value in shown.items()))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(title="topn_gating: the build", show_header=False)
    for row in shown.items():
        table.add_row(*row)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
