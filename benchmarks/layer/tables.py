"""Tables of the figures, for the terminal and in Markdown."""

import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.markup import escape
from rich.table import Table
from tables import number

from .contenders import Contender
from .floor import Floor
from .measure import DECODE, LEFT_OUT, UNITS
from .ours import Ours, OursInTransformers


class Cell(NamedTuple):
    """The texts of a cell: the median or a word, and its ratios to the floor and to topn_gating; each may be empty."""

    middle: str
    over_floor: str
    over_ours: str


def medians(cells: Sequence[dict], section: str, metric: str) -> dict[str, float]:
    """Returns the medians of a section's column by contender."""
    found = (c for c in cells if c["section"] == section and c["metric"] == metric and c["values"])
    return {c["contender"]: statistics.median(c["values"]) for c in found}


def rows(cells: Sequence[dict], section: str, order: Sequence[str]) -> Iterator[tuple[str, list[Cell]]]:
    """Yields the contenders of a section with their cells."""
    words = {(c["contender"], c["metric"]): c["word"] for c in cells if c["section"] == section}
    values = {metric: medians(cells, section, metric) for metric in columns(cells)}
    for name in order:
        if any((name, metric) in words for metric in values):
            yield name, [cell(name, metric, values[metric], words.get((name, metric), "")) for metric in values]


def cell(name: str, metric: str, values: dict[str, float], word: str) -> Cell:
    """Returns a contender's cell of a column with the given medians."""
    if name not in values:
        return Cell(word, "", "")
    ours = next((other for other in (Ours.name, OursInTransformers.name) if other in values), None)

    def ratio(base: str | None) -> str:
        shown = base in values and base != name and metric != LEFT_OUT
        return f"{number(values[name] / values[base])}×" if shown else ""

    return Cell(number(values[name]) if values[name] or metric != LEFT_OUT else "0", ratio(Floor.name), ratio(ours))


def columns(cells: Sequence[dict]) -> list[str]:
    """Returns the metrics that were measured, in order."""
    return list(dict.fromkeys(cell["metric"] for cell in cells))


def heading(metric: str) -> str:
    """Returns the head of a column."""
    tokens = (
        " tokens" if metric.startswith(DECODE) and not metric.endswith(" 1") else " token" if metric.startswith(DECODE) else ""
    )
    return f"{metric}{tokens} ({UNITS.get(metric, 'ms')})"


def rich_table(cells: Sequence[dict], order: Sequence[str], caption: str) -> Table:
    """Returns the table for the terminal."""
    title = "Whole layers: median, ratio to the floor, (ratio to topn_gating's dropless layer)"
    shown = Table(title=title, caption=caption, caption_justify="left")
    shown.add_column()
    for metric in columns(cells):
        shown.add_column(heading(metric), justify="right")
    for section in dict.fromkeys(cell["section"] for cell in cells):
        shown.add_section()
        shown.add_row(f"[bold]{section}")
        for name, texts in rows(cells, section, order):
            shown.add_row(escape(name), *(rich_text(text) for text in texts))
    return shown


def rich_text(text: Cell) -> str:
    """Formats a cell for the terminal."""
    bold = f" [bold]{text.over_floor}[/bold]" if text.over_floor else ""
    return f"{text.middle}{bold}" + (f"\n[dim]({text.over_ours})[/dim]" if text.over_ours else "")


def markdown(cells: Sequence[dict], order: Sequence[str], caption: str) -> str:
    """Returns the table in Markdown."""
    metrics = columns(cells)
    lines = [f"| | {' | '.join(map(heading, metrics))} |", f"| --- |{' ---: |' * len(metrics)}"]
    for section in dict.fromkeys(cell["section"] for cell in cells):
        lines.append(f"| **{section}** |{' |' * len(metrics)}")
        for name, texts in rows(cells, section, order):
            lines.append(f"| {name} | {' | '.join(map(markdown_text, texts))} |")
    return "\n".join([*lines, "", f"Median **ratio to the floor** (ratio to topn_gating's dropless layer); {caption}.", ""])


def markdown_text(text: Cell) -> str:
    """Formats a cell in Markdown."""
    bold, brackets = f"**{text.over_floor}**" if text.over_floor else "", f"({text.over_ours})" if text.over_ours else ""
    return " ".join(filter(None, (text.middle, bold, brackets)))


def notes(cells: Sequence[dict], kinds: Sequence[type[Contender]]) -> str:
    """Describes each contender and model, and gives the reason of each word in the table once."""
    lines = [f"{kind.name}: {kind.about}" for kind in kinds]
    lines += dict.fromkeys(f"{c['model']}: {c['sizes']}" for c in cells)
    reasons: dict[tuple[str, str, str], dict[str, None]] = {}
    for c in cells:
        if c["word"]:
            reasons.setdefault((c["contender"], c["word"], c["reason"]), {})[c["section"]] = None
    lines += [f"{name} {word}: {reason} [{'; '.join(where)}]" for (name, word, reason), where in reasons.items()]
    return "\n".join(lines)
