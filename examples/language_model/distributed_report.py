"""Tables and picture of the run on several ranks, beside the run in one process."""

from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from .distributed import Run
from .report import ACCENT, FAINT, INK, STEP_TICKS, STYLE
from .train import TOP_N, Settings

SAME_STEPS = 10  # rounding grows from step to step, as in any two runs that add in different orders
SAME = 1e-4  # nats per byte
MIB = 2**20
COLORS = ("#d1495b", "#f28e2b", "#4e79a7", "#59a14f", "#c3ccd5")


def differences(together: Run, alone: Run) -> torch.Tensor:
    """Returns how far the losses of each step are apart, in nats per byte."""
    return (torch.tensor(together.history.loss) - torch.tensor(alone.history.loss)).abs()


def same_losses(together: Run, alone: Run) -> bool:
    """Whether both runs have the same losses before training and in its first steps."""
    first = differences(together, alone)[:SAME_STEPS].max().item()
    return max(first, abs(together.before.loss - alone.before.loss)) < SAME


def show(together: Run, alone: Run, settings: Settings, console: Console) -> None:
    """Prints the tables."""
    size = together.history.ranks.size
    for table in (_losses(together, alone, size), _parts(together, alone, size), _traffic(together, settings)):
        console.print(table)


def _losses(together: Run, alone: Run, size: int) -> Table:
    table = _table("Loss, nats per byte", f"{size} ranks", "one process", "apart")
    first, last = together.history.loss, alone.history.loss
    rows = {
        "held-out text before training": (together.before.loss, alone.before.loss),
        "first step": (first[0], last[0]),
        f"step {min(SAME_STEPS, len(first))}": (first[:SAME_STEPS][-1], last[:SAME_STEPS][-1]),
        "last step": (first[-1], last[-1]),
        "held-out text after training": (together.after.loss, alone.after.loss),
    }
    for name, (a, b) in rows.items():
        table.add_row(name, f"{a:.4f}", f"{b:.4f}", f"{abs(a - b):.1e}")
    return table


def _parts(together: Run, alone: Run, size: int) -> Table:
    table = _table("Time of a step, ms", f"{size} ranks", "one process")
    for part in together.parts:
        table.add_row(part, f"{together.parts[part]:.1f}", f"{alone.parts[part]:.1f}")
    table.add_section()
    table.add_row("a step, without the profiler", f"{together.step:.1f}", f"{alone.step:.1f}")
    return table


def _traffic(together: Run, settings: Settings) -> Table:
    tokens = settings.batch * settings.context // together.history.ranks.size
    table = _table("Sent by each rank", "MiB a step", "bytes a token")
    for what, sent in together.traffic.items():
        table.add_row(what, f"{sent / MIB:.2f}", f"{sent / tokens:,.0f}")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def draw(together: Run, alone: Run, settings: Settings, path: Path) -> None:
    """Writes the picture: both runs' losses and how far they are apart, the time of a step, and what a rank sends."""
    size = together.history.ranks.size
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 9), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12, rect=(0, 0.03, 1, 0.97))
        panels = figure.subplot_mosaic([["loss", "apart"], ["parts", "traffic"]])
        _draw_losses(panels["loss"], together, alone, size)
        _draw_apart(panels["apart"], together, alone)
        _draw_parts(panels["parts"], together, alone, size)
        _draw_traffic(panels["traffic"], together)
        figure.suptitle(f"The same training on {size} ranks and in one process", fontsize=17, weight="bold")
        figure.text(
            0.5,
            0.012,
            f"{settings.layers} blocks of {settings.experts} experts, top-{min(TOP_N, settings.experts)}, "
            f"{settings.steps} steps of {settings.batch * settings.context:,} bytes. "
            f"Each rank holds {settings.experts // size} experts of a block.",
            ha="center",
        )
        figure.savefig(path, format="png", dpi=110)


def _draw_losses(axes: Axes, together: Run, alone: Run, size: int) -> None:
    steps = range(1, len(alone.history.loss) + 1)
    axes.plot(steps, alone.history.loss, color=FAINT, linewidth=4, label="one process")
    axes.plot(steps, together.history.loss, color=INK, linewidth=1, label=f"{size} ranks")
    axes.set(title="Loss of the training batches", xlabel="step", ylabel="nats per byte", xlim=(1, len(steps)), ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(**STEP_TICKS))
    axes.legend()


def _draw_apart(axes: Axes, together: Run, alone: Run) -> None:
    apart = differences(together, alone).clamp(min=1e-8)
    axes.semilogy(range(1, len(apart) + 1), apart, color=ACCENT, linewidth=1)
    axes.set(title="How far the losses are apart", xlabel="step", ylabel="nats per byte (0 at the bottom)")
    axes.set(xlim=(1, len(apart)), ylim=(1e-8, 10))
    axes.xaxis.set_major_locator(MaxNLocator(**STEP_TICKS))


def _draw_parts(axes: Axes, together: Run, alone: Run, size: int) -> None:
    names = ["one process", f"{size} ranks"]
    left = torch.zeros(2)
    for (part, time), color in zip(together.parts.items(), COLORS, strict=True):
        both = torch.tensor([alone.parts[part], time])
        axes.barh(names, both.tolist(), left=left.tolist(), color=color, label=part)
        left += both
    axes.set(title="Time of a step on a rank, under the profiler", xlabel="ms")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, fontsize=10)


def _draw_traffic(axes: Axes, together: Run) -> None:
    names = [
        name.replace(": ", ":\n").replace(" and ", " and\n").replace("average of ", "average of\n") for name in together.traffic
    ]
    sent = [value / MIB for value in together.traffic.values()]
    bars = axes.barh(names[::-1], sent[::-1], color=[FAINT, COLORS[1], COLORS[0]])
    axes.bar_label(bars, [f"{value:.1f}" for value in sent[::-1]], padding=4)
    axes.set(title="Sent by each rank in a step", xlabel="MiB")
