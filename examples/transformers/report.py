"""Table and picture of both implementations."""

from pathlib import Path

import matplotlib
import torch
from language_model.report import ACCENT, FAINT, INK, STYLE
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from training import OURS, STOCK, Measured

FIRST = 10  # steps, before rounding has grown
SAME_FIRST, SAME_LAST = 1e-3, 0.05  # nats per byte
Results = dict[str, dict[str, Measured]]


def same_losses(measured: dict[str, Measured]) -> bool:
    """Whether both curves are the same: in the first steps, and in the mean of the last tenth."""
    ours, stock = (torch.tensor(measured[name].loss) for name in (OURS, STOCK))
    last = max(1, len(ours) // 10)
    first_apart = (ours - stock)[:FIRST].abs().max().item()
    return first_apart < SAME_FIRST and abs(ours[-last:].mean() - stock[-last:].mean()).item() < SAME_LAST


def show(results: Results, console: Console) -> None:
    """Prints the table."""
    table = Table(title="The same training, with both implementations of the experts")
    for heading in ("", STOCK, OURS, f"{OURS} / {STOCK}"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, measured in results.items():
        stock, ours = measured[STOCK], measured[OURS]
        last = max(1, len(ours.loss) // 10)
        losses = [sum(m.loss[-last:]) / last for m in (stock, ours)]
        rows = {
            "training, steps a second": (stock.steps_a_second, ours.steps_a_second),
            "decoding, tokens a second": (stock.tokens_a_second, ours.tokens_a_second),
            "peak memory of a step, MiB": (stock.peak / 2**20, ours.peak / 2**20),
            f"loss after {len(ours.loss)} steps, nats a byte": (losses[0], losses[1]),
        }
        for what, (a, b) in rows.items():
            table.add_row(f"{name}: {what}", f"{a:.3g}", f"{b:.3g}", f"{b / a:.2f}")
        table.add_section()
    console.print(table)


def draw(results: Results, path: Path) -> None:
    """Writes the picture: for each model both loss curves over time, and steps and tokens a second."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 4.5 * len(results)), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
        rows = figure.subplots(len(results), 2, squeeze=False, width_ratios=(2, 1))
        for (name, measured), (curves, bars) in zip(results.items(), rows, strict=True):
            _draw_curves(curves, name, measured)
            _draw_speeds(bars, measured)
        figure.suptitle("Models of transformers, stock and with topn_gating's experts", fontsize=17, weight="bold")
        figure.savefig(path, format="png", dpi=110)


def _draw_curves(axes: Axes, name: str, measured: dict[str, Measured]) -> None:
    for (implementation, m), color, width in zip(measured.items(), (FAINT, INK), (4, 1), strict=True):
        axes.plot(range(1, len(m.loss) + 1), m.loss, color=color, linewidth=width, label=implementation)
    axes.set(title=f"{name}: loss", xlabel="step", ylabel="nats per byte", xlim=(1, None), ylim=(0, None))
    axes.legend()


def _draw_speeds(axes: Axes, measured: dict[str, Measured]) -> None:
    stock, ours = measured[STOCK], measured[OURS]
    speeds = {
        "training": ours.steps_a_second / stock.steps_a_second,
        "decoding": ours.tokens_a_second / stock.tokens_a_second,
        "peak memory": ours.peak / stock.peak,
    }
    bars = axes.bar(list(speeds), list(speeds.values()), color=[ACCENT, ACCENT, FAINT])
    axes.bar_label(bars, [f"{value:.2f}×" for value in speeds.values()], padding=3)
    axes.axhline(1, color=INK, linewidth=1)
    axes.set(title="Speed and memory over stock's", ylim=(0, 1.15 * max(speeds.values())))
