"""Draws each contender's time over the floor's: a panel for each case, a bar for each contender, a dot for each layer."""

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tables import number

from .contenders import ZIPF
from .floor import Floor
from .measure import LEFT_OUT, UNITS
from .ours import Ours
from .tables import columns, heading, medians

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS, OTHERS, DROPS = "#d62728", "#1f77b4", "#9a9a9a"
MARKERS = ("o", "s", "D", "^", "v")

Dots = dict[str, list[tuple[str, str, float]]]  # by contender: model, load, time over the floor's


def ratios(cells: Sequence[dict], metric: str) -> Dots:
    """Returns each contender's times over the floor's in float32, or in the type that was measured first."""
    dtypes = {cell["dtype"] for cell in cells}
    dtype = "float32" if "float32" in dtypes else cells[0]["dtype"]
    layers = {cell["section"]: (cell["model"], cell["load"]) for cell in cells if cell["dtype"] == dtype}
    found: Dots = {}
    for section, (model, load) in layers.items():
        times = medians(cells, section, metric)
        if Floor.name in times:
            for name in times.keys() - {Floor.name}:
                found.setdefault(name, []).append((model, load, times[name] / times[Floor.name]))
    return found


def droppers(cells: Sequence[dict]) -> set[str]:
    """Returns the contenders that leave pairs out."""
    return {cell["contender"] for cell in cells if cell["metric"] == LEFT_OUT and any(cell["values"])}


def draw(cells: Sequence[dict], order: Sequence[str], path: Path, caption: str) -> None:
    """Draws a panel for each timed case; bars are geometric means over the layers."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    panels = {metric: ratios(cells, metric) for metric in columns(cells) if metric not in UNITS}
    names = [name for name in order if any(name in dots for dots in panels.values())]
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    marker = dict(zip(models, itertools.cycle(MARKERS), strict=False))
    style = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "font.family": "DejaVu Sans"}
    with plt.rc_context(style):
        size = (3 + 2.9 * len(panels), 2.4 + 0.5 * len(names))
        figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", sharey=True, squeeze=False)
        for ax, (metric, dots) in zip(axes[0], panels.items(), strict=True):
            panel(ax, dots, names, marker, droppers(cells))
            ax.set_title(heading(metric).rsplit(" (", 1)[0], fontsize=12)
        for label in axes[0][0].get_yticklabels():
            label.set_fontweight("bold" if label.get_text().startswith(Ours.name) else "normal")
        shapes = [Line2D([], [], color="#333333", marker=marker[m], linestyle="", markersize=5, label=m) for m in models]
        shapes.append(Line2D([], [], color="#333333", marker="o", fillstyle="none", linestyle="", label="Zipf load (hollow)"))
        legend = {"handles": shapes, "loc": "outside upper center", "ncols": len(shapes), "frameon": False, "fontsize": 10}
        # Of the legend: a figure's title would lie on it.
        title = "A whole MoE layer's time over that of its matrix products by torch"
        figure.legend(title=title, title_fontproperties={"size": 15, "weight": "bold"}, **legend)
        figure.supxlabel(
            f"bar: geometric mean over the layers; grey: it leaves pairs of token and expert out\n{caption}",
            fontsize=9,
            color="#444444",
        )
        figure.savefig(path, dpi=110, facecolor="white")
        plt.close(figure)


def panel(ax: "Axes", dots: Dots, names: Sequence[str], marker: dict[str, str], drops: set[str]) -> None:
    """Draws a case: a bar for each contender from the floor to its mean, and a dot for each layer."""
    ax.set_xscale("log", base=2)
    for y, name in enumerate(names):
        if name not in dots:
            continue
        mean = statistics.geometric_mean(ratio for *_, ratio in dots[name])
        color = DROPS if name in drops else OURS if name.startswith(Ours.name) else OTHERS
        ax.barh(y, mean - 1, left=1, height=0.62, color=color, alpha=0.45)
        for model, load, ratio in dots[name]:
            fill = "none" if load == ZIPF else "full"
            ax.plot(ratio, y, marker[model], color=color, fillstyle=fill, markersize=4.5, markeredgewidth=0.9)
        furthest = max(1.0, mean, *(ratio for *_, ratio in dots[name]))
        ax.annotate(f"{number(mean)}×", (furthest, y), (6, 0), textcoords="offset points", va="center", fontsize=10)
    ax.axvline(1, color="#333333", linewidth=1)
    low, high = ax.get_xlim()
    ax.set_xlim(min(low, 0.8), high * (high / low) ** 0.22)  # room for the numbers
    ticks = [2.0**i for i in range(-6, 12) if ax.get_xlim()[0] <= 2.0**i <= high]
    ticks = ticks[:: 1 + len(ticks) // 7]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=9)
    ax.minorticks_off()
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(axis="x", color="#ececec")
    ax.set_axisbelow(True)
