"""Tables and picture of the demo's results."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .data import BYTE_KINDS
from .history import History
from .train import TOP_N, Evaluation, Settings

DEAD = 0.1
SHOWN_BLOCK = 0
RARE = 0.2
SMOOTH = 80
STEP_TICKS = {"nbins": 8, "steps": [1, 2, 5, 10], "integer": True}

INK, FAINT, ACCENT = "#1f2933", "#c3ccd5", "#d1495b"
EXPERT_COLORS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#76b7b2", "#9c755f", "#c79a00")
STYLE = {
    "font.size": 12,
    "axes.titlesize": 14,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
} | dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)


@dataclass(frozen=True)
class Results:
    """The results of a run.

    ``entropy`` is the unigram entropy, in nats per byte, of the bytes that ``before`` and ``after`` predict.
    """

    settings: Settings
    history: History
    before: Evaluation
    after: Evaluation
    entropy: float

    @property
    def learned(self) -> bool:
        """Whether the held-out loss is lower than a model without context can reach."""
        return self.after.loss < self.entropy

    @property
    def dead(self) -> list[tuple[int, int]]:
        """Block and expert of each expert that received less than a tenth of an even share of the held-out text."""
        return [tuple(where) for where in (self.after.load < DEAD / self.settings.experts).nonzero().tolist()]

    @property
    def passed(self) -> bool:
        """Whether the model has learned and every expert is used."""
        return self.learned and not self.dead


def show(results: Results, console: Console) -> None:
    """Prints the tables and the verdict."""
    for table in (_learning(results), _load(results)):
        console.print(table)
    console.print(*_verdict(results), sep="\n", highlight=False)


def _learning(results: Results) -> Table:
    table = Table(title=f"Held-out text, {results.settings.windows * results.settings.context:,} bytes of unseen files")
    for heading in ("", "nats / byte", "bits / byte"):
        table.add_column(heading, justify="right" if heading else "left")
    rows = {
        "loss before training": results.before.loss,
        "unigram entropy": results.entropy,
        "loss after training": results.after.loss,
    }
    for name, nats in rows.items():
        table.add_row(name, f"{nats:.3f}", f"{nats / math.log(2):.3f}")
    return table


def _load(results: Results) -> Table:
    load = results.after.load
    table = Table(title=f"Work on held-out text, %\n(an even share is {100 / results.settings.experts:.1f})")
    table.add_column("expert", justify="right")
    for block in range(len(load)):
        table.add_column(f"block {block}", justify="right")
    for expert, shares in enumerate(load.T.tolist()):
        cells = [f"{100 * share:.1f}" + (" dead" if (b, expert) in results.dead else "") for b, share in enumerate(shares)]
        table.add_row(str(expert), *cells)
    return table


def _verdict(results: Results) -> Iterator[str]:
    last = results.history.figure("drop_fraction")[-50:]
    yield f"Dropped in training: {100 * last.mean():.1f} % of the routed pairs, mean of the last {len(last)} steps."
    yield "Dead experts: " + (", ".join(f"{e} of block {b}" for b, e in results.dead) or "none") + "."
    if not results.learned:
        yield "It did not learn: the held-out loss is not below the unigram entropy."


def draw(results: Results, path: Path) -> None:
    """Writes the picture: losses, the router's health over time, and what one block's experts received."""
    s = results.settings
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 14), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12, rect=(0, 0.03, 1, 0.97))
        rows = [["loss", "load"], ["violation", "entropy"], ["kinds", "kinds"]]
        panels = figure.subplot_mosaic(rows, height_ratios=(1, 0.75, 1))
        _draw_losses(panels["loss"], results)
        _draw_load(panels["load"], results.history.load[:, SHOWN_BLOCK])
        _draw_violation(panels["violation"], results.history.figure("max_violation"))
        _draw_entropy(panels["entropy"], results.history.figure("entropy"), s.experts)
        _draw_kinds(panels["kinds"], results.after.received[SHOWN_BLOCK])
        figure.suptitle("A Mixture-of-Experts language model learns Python, routed by topn_gating", fontsize=17, weight="bold")
        figure.text(
            0.5,
            0.012,
            f"{s.layers} blocks of {s.experts} experts, top-{min(TOP_N, s.experts)}, trained for {s.steps} steps of "
            f"{s.batch * s.context:,} bytes of the standard library's source. Experts shown: block {SHOWN_BLOCK}. "
            f"Seed {s.seed}.",
            ha="center",
        )
        figure.savefig(path, format="png", dpi=110)


def _draw_losses(axes: Axes, results: Results) -> None:
    loss = torch.tensor(results.history.loss, dtype=torch.double)
    end = len(loss)
    steps = range(1, end + 1)
    axes.plot(steps, loss, color=FAINT, linewidth=0.8)
    axes.plot(steps, _moving_average(loss, end // SMOOTH), color=INK, linewidth=2, label="training batches")
    points = [(0, results.before.loss), *results.history.held_out, (end, results.after.loss)]
    axes.plot(*zip(*points, strict=True), "o", color=ACCENT, clip_on=False, zorder=3, label="held-out files")
    axes.axhline(results.entropy, color=ACCENT, linestyle="--", linewidth=1.2, label="unigram entropy of the held-out bytes")
    for value in (results.entropy, results.after.loss):
        _beside(axes, (end, value), f"{value:.2f}", ACCENT)
    axes.set(title="Loss", xlabel="step", ylabel="nats per byte", xlim=(0, end), ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(**STEP_TICKS))
    axes.legend()


def _draw_load(axes: Axes, load: Tensor) -> None:
    steps, experts = load.shape
    shares = 100 * _moving_average(load.double(), steps // SMOOTH).flip(-1)  # the last expert at the bottom, the first on top
    colors = [EXPERT_COLORS[expert % len(EXPERT_COLORS)] for expert in reversed(range(experts))]
    axes.stackplot(range(1, steps + 1), shares.T.tolist(), colors=colors, edgecolor="white", linewidth=0.8)
    middles = shares[-1].cumsum(0) - shares[-1] / 2
    for expert, middle, color in zip(reversed(range(experts)), middles.tolist(), colors, strict=True):
        _beside(axes, (steps, middle), f"expert {expert}", color)
    axes.set(title="Demand for each expert in training", xlabel="step", ylabel="share of the routed pairs, %")
    axes.set(xlim=(1, max(2, steps)), ylim=(0, 100))
    axes.xaxis.set_major_locator(MaxNLocator(**STEP_TICKS))


def _draw_violation(axes: Axes, violation: Tensor) -> None:
    _draw_blocks(axes, violation)
    axes.set(title="Imbalance of the experts (MaxVio)", xlabel="step", ylabel="max demand / mean demand − 1")
    axes.set_ylim(0, None)
    if violation.shape[1] <= 4:  # more names are in the next panel, which has room for them
        axes.legend()


def _draw_entropy(axes: Axes, entropy: Tensor, experts: int) -> None:
    _draw_blocks(axes, entropy)
    axes.axhline(math.log(experts), color=ACCENT, linestyle="--", linewidth=1.2, label=f"all {experts} experts alike")
    _beside(axes, (len(entropy), math.log(experts)), f"{math.log(experts):.2f}", ACCENT)
    axes.set(title="Entropy of a token's gates", xlabel="step", ylabel="nats")
    axes.set_ylim(0, None)
    axes.legend(ncols=1 + entropy.shape[1] // 5)


def _draw_blocks(axes: Axes, values: Tensor) -> None:
    """Draws figures ``(steps, layers)``, a line for each block."""
    steps, layers = values.shape
    smooth = _moving_average(values.double(), steps // SMOOTH)
    colors = matplotlib.colormaps["viridis"](torch.linspace(0.1, 0.75, layers).tolist())
    for block, color in enumerate(colors):
        axes.plot(range(1, steps + 1), values[:, block], color=color, alpha=0.25, linewidth=0.8)
        axes.plot(range(1, steps + 1), smooth[:, block], color=color, linewidth=2, label=f"block {block}")
    axes.set_xlim(1, max(2, steps))
    axes.xaxis.set_major_locator(MaxNLocator(**STEP_TICKS))


def _beside(axes: Axes, point: tuple[float, float], text: str, color: str) -> None:
    """Writes to the right of a point at the panel's right edge."""
    axes.annotate(text, point, (7, 0), textcoords="offset points", va="center", color=color)


def _draw_kinds(axes: Axes, received: Tensor) -> None:
    of_text = 100 * received.sum(0) / received.sum()
    kinds = [kind for kind, share in enumerate(of_text.tolist()) if share > RARE]
    top_n = min(TOP_N, len(received))
    share = 100 * top_n * (received / received.sum(0))[:, kinds]  # of the tokens; each is received top_n times
    axes.imshow(share.tolist(), cmap="Blues", vmin=0, aspect="auto")
    for expert, row in enumerate(share.tolist()):
        for column, value in enumerate(row):
            color = "white" if value > 0.55 * share.max() else INK
            axes.text(column, expert, f"{value:.0f}", ha="center", va="center", color=color)
    names = list(BYTE_KINDS)
    axes.set_xticks(range(len(kinds)), [f"{names[kind]}\n{of_text[kind]:.1f} % of text" for kind in kinds], fontsize=11)
    axes.set_yticks(range(len(share)), [f"expert {expert}" for expert in range(len(share))])
    for label, expert in zip(axes.get_yticklabels(), range(len(share)), strict=True):
        label.set_color(EXPERT_COLORS[expert % len(EXPERT_COLORS)])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    even = f"{top_n} experts a byte: {100 * top_n / len(received):.0f} if even"
    axes.set_title(f"How much of each kind of held-out byte each expert receives, % ({even})")


def _moving_average(values: Tensor, reach: int) -> Tensor:
    """Returns the mean of ``values`` ``(steps, …)`` over ``reach`` steps to each side, fewer at the ends."""
    total = torch.cat([torch.zeros_like(values[:1]), values.cumsum(0)])
    steps = torch.arange(len(values))
    low, high = (steps - reach).clamp(min=0), (steps + reach + 1).clamp(max=len(values))
    return (total[high] - total[low]) / (high - low).view(-1, *[1] * (values.dim() - 1))
