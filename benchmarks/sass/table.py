"""The table of the counts in docs/benchmarks.md: the one that a check compares with."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tables import markdown_table

PAGE = Path("docs", "benchmarks.md")
SECTION = "## Predicted from the machine code"
HEAD = ["kernel", "slots", "ALU cycles", "busiest pipe", "registers", "spilled", "warps", "ns / 1000 tokens", "bound", "share"]
CHECKED = ("slots", "ALU cycles")
GROWTH = 1.1


def section(page: str) -> tuple[int, int]:
    """Returns where the lines of the table start and end in the page's lines."""
    lines = page.splitlines()
    if SECTION not in lines:
        raise SystemExit(f"{PAGE} has no section {SECTION!r}.")
    start = next((n for n in range(lines.index(SECTION), len(lines)) if lines[n].startswith("| kernel")), None)
    if start is None:
        raise SystemExit(f"The section {SECTION!r} of {PAGE} has no table.")
    return start, next((n for n in range(start, len(lines)) if not lines[n].startswith("|")), len(lines))


def read(page: str) -> dict[str, dict[str, str]]:
    """Returns the table's cells by the kernel and the column."""
    start, end = section(page)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()[start:end]]
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


def written(page: str, rows: Sequence[Sequence[str]]) -> str:
    """Returns the page with these rows as its table."""
    start, end = section(page)
    lines = page.splitlines()
    return "\n".join([*lines[:start], markdown_table([HEAD, *rows]), *lines[end:], ""])


def problems(committed: Mapping[str, Mapping[str, str]], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns a line for each count that has grown by more than a tenth, each spill, and each row that one side alone has."""
    now = {row[0]: dict(zip(HEAD, row, strict=True)) for row in rows}
    lines = [f"{name}: in the table alone" for name in committed if name not in now]
    for name, cells in now.items():
        if int(cells["spilled"]):
            lines.append(f"{name}: spills {cells['spilled']} bytes")
        if name not in committed:
            lines.append(f"{name}: not in the table")
            continue
        for column in CHECKED:
            before, count = float(committed[name][column]), float(cells[column])
            if count > GROWTH * before:
                lines.append(f"{name}: {column} grew from {before:.0f} to {count:.0f}")
    return lines
