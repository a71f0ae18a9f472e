"""What the commands that compare contenders share: options, environment, facts of the machine, and files written."""

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from rich.console import Console
from rounds import KEEP

import topn_gating


class Peer(Protocol):
    """A contender whose package may be missing."""

    name: str
    install: str

    @classmethod
    def load(cls) -> None:
        """Imports the package that it needs; raises what the import raises."""


P = TypeVar("P", bound=type[Peer])


def options(prog: str, description: str) -> argparse.ArgumentParser:
    """Returns a parser with the options that the commands share."""
    parser = argparse.ArgumentParser(prog=prog, description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--malloc", choices=("keep", "default"), default="keep")
    parser.add_argument("--seconds", type=float, default=10, help="a call that takes longer is not repeated")
    parser.add_argument("--json", type=Path, metavar="PATH", help="writes machine, options and every sample there")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="writes the table there")
    return parser


def restart_with(malloc: str) -> None:
    """Restarts this command with the environment that the measurement needs, unless it is already set."""
    wanted = {"OMP_WAIT_POLICY": "passive", "KINETO_LOG_LEVEL": "99"} | (KEEP if malloc == "keep" else {})
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | wanted)


def conditions(options: argparse.Namespace) -> str:
    """Describes how the figures were measured, for the table's caption."""
    kept = ", ".join(f"{name}={value}" for name, value in KEEP.items())
    malloc = f"keep ({kept})" if options.malloc == "keep" else "default"
    return f"medians of {options.rounds} rounds, {options.threads} threads, OMP_WAIT_POLICY=passive, --malloc {malloc}"


def installed(peers: Sequence[P], names: Sequence[str], console: Console) -> list[P]:
    """Returns the peers of those names whose packages are installed; prints why the others are left out."""
    found = []
    for peer in peers:
        if peer.name in names:
            try:
                peer.load()
                found.append(peer)
            except Exception as error:
                console.print(f"{peer.name} is left out ({type(error).__name__}: {error}); {peer.install}", highlight=False)
    return found


def machine(threads: int) -> dict[str, str]:
    """Returns the machine and the versions on which the figures were measured."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    facts = {"cpu": names[0] if names else platform.processor(), "threads": f"{threads} of {os.cpu_count()}"}
    facts |= {"libc": " ".join(platform.libc_ver()), "torch": torch.__version__, "topn_gating": topn_gating.__version__}
    return facts | {key: str(value) for key, value in topn_gating.build_info().items() if key != "torch"}


def write(options: argparse.Namespace, facts: dict[str, str], cells: Sequence[dict], table: str) -> None:
    """Writes the files that the options ask for: the facts and every sample as JSON, and the table in Markdown."""
    if options.markdown:
        options.markdown.write_text(table)
    if options.json:
        options.json.write_text(json.dumps({"machine": facts, "options": vars(options), "cells": cells}, indent=1, default=str))
