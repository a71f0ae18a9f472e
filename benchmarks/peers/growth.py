"""Measures and plots time and memory of the full path, forward and backward, as functions of the number of tokens."""

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.progress import track
from rounds import fresh
from shapes import Shape

from . import harness
from .contenders import Contender, Ours, Problem
from .harness import FULL, MEMORY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TOKENS = [1024 << i for i in range(8)]
DIM, EXPERTS, TOP_N = 64, 64, 8
COLORS = ("#d62728", "#1f77b4", "#ff7f0e", "#17becf", "#9467bd", "#2ca02c", "#8c564b", "#e377c2", "#555555")


def measure(tokens: Sequence[int], kinds: Sequence[type[Contender]], options: argparse.Namespace) -> list[dict]:
    """Returns cells of time and memory; one that is too large or slow or fails is not measured on more tokens."""
    cells, kinds = [], list(kinds)
    for n in track(tokens, description="growth", transient=True):
        fresh()
        problem = Problem.make(Shape(1, n, DIM, EXPERTS, TOP_N), torch.float32)
        admitted, words = harness.admit(kinds, problem, options.gibibytes * 2**30)
        times = harness.measure_metric(FULL, admitted, options.rounds, options.seconds)
        out = {name for name, f in times.items() if f.word or min(f.values) > 1e3 * options.seconds} | words.keys()
        sizes = harness.measure_metric(MEMORY, [c for c in admitted if not times[c.name].word], options.rounds, options.seconds)
        cells += harness.cells(problem.shape, "float32", FULL, times | words)
        cells += harness.cells(problem.shape, "float32", MEMORY, sizes)
        kinds = [kind for kind in kinds if kind.name not in out]
    return cells


def medians(cells: Sequence[dict], metric: str) -> dict[str, dict[int, float]]:
    """Returns the medians of a metric by contender, then by number of tokens."""
    found = {}
    for cell in cells:
        if cell["metric"] == metric and cell["values"]:
            found.setdefault(cell["contender"], {})[cell["shape"].n] = statistics.median(cell["values"])
    return found


def markdown(cells: Sequence[dict]) -> str:
    """Returns a table of milliseconds and MiB."""
    times, sizes = medians(cells, FULL), medians(cells, MEMORY)
    tokens = sorted({cell["shape"].n for cell in cells})
    lines = [f"| ms / MiB at n = | {' | '.join(f'{n:,}' for n in tokens)} |", f"| --- |{' ---: |' * len(tokens)}"]
    for name, by_n in times.items():
        row = [f"{by_n[n]:,.1f} / {sizes[name][n]:,.0f}" if n in by_n and n in sizes.get(name, {}) else "" for n in tokens]
        lines.append(f"| {name} | {' | '.join(row)} |")
    return "\n".join([*lines, ""])


def draw(cells: Sequence[dict], path: Path, caption: str) -> None:
    """Draws time and memory in two log-log panels, with each line labelled at its end."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    names = list(medians(cells, FULL))
    color = dict(zip(names, COLORS * len(names), strict=False))
    style = {"font.size": 12, "axes.spines.top": False, "axes.spines.right": False, "font.family": "DejaVu Sans"}
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, 2, figsize=(13, 5.6), layout="constrained")
        for ax, metric, label in zip(axes, (FULL, MEMORY), ("milliseconds", "peak memory, MiB"), strict=True):
            panel(ax, medians(cells, metric), color)
            ax.set_ylabel(label)
        figure.suptitle("Gate, dispatch, combine: forward and backward", fontsize=15, fontweight="bold")
        sizes = f"one group of n tokens, {DIM} features, {EXPERTS} experts, {TOP_N} of them to a token, float32"
        figure.supxlabel(f"tokens n\n{sizes}\n{caption}", fontsize=10, color="#444444")
        figure.savefig(path, dpi=110, facecolor="white")
        plt.close(figure)


def panel(ax: "Axes", lines: dict[str, dict[int, float]], color: dict[str, str]) -> None:
    """Draws the labelled lines of a metric, and lines proportional to n and n² for comparison."""
    for name, by_n in lines.items():
        line = "--o" if name.endswith("compiled") else "-o"
        ax.plot(by_n.keys(), by_n.values(), line, color=color[name], linewidth=3 if name == Ours.name else 1.6, markersize=4)
    tokens = sorted({n for by_n in lines.values() for n in by_n})
    ax.set(xscale="log", yscale="log")
    ax.set_xlim(tokens[0] / 1.3, tokens[-1] * (1.5 * tokens[-1] / tokens[0]) ** 0.6)  # room for the names
    ax.set_xticks(tokens, [f"{n // 1024}k" if n >= 1024 else str(n) for n in tokens])
    ax.minorticks_off()
    ax.grid(color="#e5e5e5")
    by_start = sorted(lines.values(), key=lambda by_n: by_n[min(by_n)])
    guide(ax, by_start[0], 1, 0.6, "∝ n")
    guide(ax, by_start[-1], 2, 1.8, "∝ n²")
    label_ends(ax, lines, color)


def guide(ax: "Axes", by_n: dict[int, float], power: int, factor: float, name: str) -> None:
    """Draws a line of slope ``power`` near a contender's."""
    last = max(by_n)
    values = [factor * by_n[last] * (n / last) ** power for n in by_n]
    ax.plot(by_n.keys(), values, ":", color="#888888", linewidth=1.5, zorder=1)
    middle = len(values) // 2
    offset, side = ((6, -4), {"va": "top"}) if factor < 1 else ((-6, 4), {"va": "bottom", "ha": "right"})
    ax.annotate(name, (list(by_n)[middle], values[middle]), offset, textcoords="offset points", color="#666666", **side)


def label_ends(ax: "Axes", lines: dict[str, dict[int, float]], color: dict[str, str]) -> None:
    """Writes each line's name right of its last point; names that would overlap are moved apart."""
    least = 0.052 * math.log(ax.get_ylim()[1] / ax.get_ylim()[0])  # height of a line of text
    for last in {max(by_n) for by_n in lines.values()}:
        below = -math.inf
        for name, by_n in sorted(lines.items(), key=lambda item: item[1].get(last, 0)):
            if max(by_n) == last:
                below = max(math.log(by_n[last]), below + least)
                weight = "bold" if name == Ours.name else "normal"
                ax.text(last * 1.15, math.exp(below), name, color=color[name], va="center", fontsize=11, fontweight=weight)
