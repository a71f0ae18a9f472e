"""Tables of the figures, for the terminal and in Markdown."""

import statistics
from collections.abc import Iterator, Sequence

from rich.table import Table
from tables import number

from .contenders import Contender, Ours
from .harness import METRICS, UNITS

Section = tuple[tuple, dict[tuple[str, str], dict], list[str]]  # shape and type, cells by contender and metric, contenders


def sections(cells: Sequence[dict], order: Sequence[str]) -> Iterator[Section]:
    """Yields the section of each shape and type, with the contenders in the given order."""
    for key in dict.fromkeys((cell["shape"], cell["dtype"]) for cell in cells):
        mine = {(c["contender"], c["metric"]): c for c in cells if (c["shape"], c["dtype"]) == key}
        yield key, mine, [name for name in order if any((name, metric) in mine for metric in METRICS)]


def cell_texts(cell: dict | None, ours: dict | None) -> tuple[str, str, str]:
    """Returns a cell's median, quartiles, and ratio to topn_gating's median; each may be empty."""
    if cell is None or not cell["values"]:
        return (cell["word"] if cell else ""), "", ""
    middle, values = statistics.median(cell["values"]), cell["values"]
    low, _, high = statistics.quantiles(values, method="inclusive") if len(values) > 1 else (None, None, None)
    spread = "" if low is None else f"{number(low)} to {number(high)}"
    ratio = "" if cell is ours or not (ours and ours["values"]) else f"{number(middle / statistics.median(ours['values']))}×"
    return number(middle), spread, ratio


def columns(cells: Sequence[dict]) -> list[str]:
    """Returns the metrics that were measured, in the order of METRICS."""
    return [metric for metric in METRICS if any(cell["metric"] == metric for cell in cells)]


def rich_table(cells: Sequence[dict], order: Sequence[str], caption: str) -> Table:
    """Returns the table for the terminal."""
    title = "topn_gating and its peers: median, ratio to topn_gating, quartiles"
    shown = Table(title=title, caption=caption, caption_justify="left")
    shown.add_column()
    for metric in columns(cells):
        shown.add_column(f"{metric} ({UNITS[metric]})", justify="right")
    for (shape, dtype), mine, names in sections(cells, order):
        shown.add_section()
        shown.add_row(f"[bold]{shape}, {dtype}")
        for name in names:
            row = []
            for metric in columns(cells):
                middle, spread, ratio = cell_texts(mine.get((name, metric)), mine.get((Ours.name, metric)))
                row.append(f"{middle} [bold]{ratio}[/bold]\n[dim]{spread}[/dim]" if spread or ratio else middle)
            shown.add_row(name, *row)
    return shown


def markdown(cells: Sequence[dict], order: Sequence[str], caption: str) -> str:
    """Returns the table in Markdown."""
    metrics = columns(cells)
    lines = [f"| | {' | '.join(f'{metric} ({UNITS[metric]})' for metric in metrics)} |", f"| --- |{' ---: |' * len(metrics)}"]
    for (shape, dtype), mine, names in sections(cells, order):
        lines.append(f"| **{shape}, {dtype}** |{' |' * len(metrics)}")
        for name in names:
            row = []
            for metric in metrics:
                middle, spread, ratio = cell_texts(mine.get((name, metric)), mine.get((Ours.name, metric)))
                row.append(" ".join(filter(None, (middle, f"({spread})" if spread else "", f"**{ratio}**" if ratio else ""))))
            lines.append(f"| {name} | {' | '.join(row)} |")
    return "\n".join([*lines, "", f"Median (quartiles) **ratio to topn_gating**; {caption}.", ""])


def notes(cells: Sequence[dict], kinds: Sequence[type[Contender]]) -> str:
    """Describes each contender, and gives the reason of each word in the table once."""
    lines = [f"{kind.name}: {kind.about}" for kind in kinds]
    reasons = {}
    for cell in cells:
        if cell["word"]:
            where = reasons.setdefault((cell["contender"], cell["word"], cell["reason"]), {})
            where[f"({', '.join(map(str, cell['shape']))}) {cell['dtype']}"] = None
    lines += [f"{name} {word}: {reason} [{'; '.join(where)}]" for (name, word, reason), where in reasons.items()]
    return "\n".join(lines)
