"""Counts the instructions of the kernels' token loops and predicts their time on an H100, without a GPU.

    python -m benchmarks.sass [--only gate] [--unit csrc/cuda/gate.cu] [--root CHECKOUT] [--arch sm_90]
    python -m benchmarks.sass --listing "gate, e=64"     # the token loops of the rows with that in their names, block by block
    python -m benchmarks.sass --check                    # fails where a count grew by a tenth against docs/benchmarks.md, or
                                                         # where a kernel accesses memory before it waits for the stream
    python -m benchmarks.sass --write                    # writes the table into docs/benchmarks.md
    python -m benchmarks.sass --unit csrc/cuda/gate.cu --kernel ^gate_tokens --tokens 4 --moved 320 --trips ^pop_sorted:=8

The last form counts kernels that have no row in kernels.py. Of --trips and --rare, which are patterns of source lines and
numbers, kernels.py tells more.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ptxas_spills import Function
from tables import markdown_table

from . import table, waits
from .build import Kernel, compile_unit, find_disassembler, find_nvcc, kernels, release
from .kernels import ROWS, Row
from .machine import WARPS, Prediction, predict, resident_warps
from .weights import Body, Weighted, body_of, words

ROOT = Path(__file__).parents[2]


class Count(NamedTuple):
    """What was counted for a row."""

    row: Row
    report: Function
    body: Body
    slots: float  # of a token, like all that follows
    cycles: dict[str, float]
    prediction: Prediction

    def cells(self) -> list[str]:
        """Returns the row of the table."""
        busiest = max(self.cycles, key=lambda pipe: self.cycles[pipe])
        return [
            self.row.name,
            f"{self.slots:.0f}",
            f"{self.cycles.get('alu', 0):.0f}",
            f"{busiest} {self.cycles[busiest]:.0f}",
            str(self.report.registers),
            str(self.report.stores + self.report.loads),
            f"{resident_warps(self.report.registers, self.row.threads, self.row.shared)} of {WARPS}",
            f"{self.prediction.seconds * 1e12:.0f}",
            self.prediction.bound,
            f"{self.prediction.share:.0%}",
        ]


def count(row: Row, kernel: Kernel) -> Count:
    """Counts a kernel; ends the program where it has no loop."""
    body = body_of(kernel.blocks, row.trips, row.rare, row.depth, row.loops)
    if body is None:
        raise SystemExit(f"{row.name}: {kernel.report.name} has no loop over tokens")
    slots = body.slots / row.tokens
    cycles = {pipe: cycles / row.tokens for pipe, cycles in body.cycles.items()}
    return Count(row, kernel.report, body, slots, cycles, predict(slots, cycles, row.moved))


def count_rows(rows: Sequence[Row], root: Path, arch: str, nvcc: str, disassembler: str) -> list[Count]:
    """Counts the kernels of the rows; prints which rows have none."""
    found = []
    for unit in dict.fromkeys(row.unit for row in rows):
        of_unit = [row for row in rows if row.unit == unit]
        wanted = re.compile("|".join(f"(?:{row.kernel})" for row in of_unit))
        compiled = kernels(compile_unit(nvcc, root, unit, arch), disassembler, wanted)
        for row in of_unit:
            of_row = [kernel for kernel in compiled if re.search(row.kernel, kernel.report.name)]
            found += [count(row, kernel) for kernel in of_row]
            if not of_row:
                print(f"{row.name}: no kernel of {unit} matches {row.kernel}", file=sys.stderr)
    return found


def in_words(cycles: dict[str, float]) -> str:
    """Returns the cycles of each pipe, the busiest first."""
    return ", ".join(f"{pipe} {count:g}" for pipe, count in sorted(cycles.items(), key=lambda item: -item[1]))


def listing(count: Count) -> str:
    """Returns the token loop, block by block: how often it is executed, and why, its cycles, and its instructions."""
    lines = [f"{count.row.name}: {count.report.name}"]
    for block, weight, reason in count.body.blocks:
        once = Body([Weighted(block, 1.0, "")], []).cycles
        lines.append(f"block {block.number}: {weight:g} x {len(block.instructions)} instructions ({in_words(once)}) {reason}")
        previous = ""
        for i in block.instructions:
            place = words(i)
            text = f"{i.predicate:5}{i.opcode} {i.operands}"
            lines.append(f"    {i.address:6x} {text:60.60} {'' if place == previous else place}".rstrip())
            previous = place
    cycles = {pipe: round(cycles, 1) for pipe, cycles in count.cycles.items()}
    return "\n".join([*lines, f"a token: {count.slots:.1f} slots; cycles of its pipes: {in_words(cycles)}"])


def numbers_by_pattern(pairs: Sequence[str]) -> dict[str, float]:
    """Returns the numbers of texts ``PATTERN=NUMBER``."""
    return {pattern: float(number) for pattern, _, number in (pair.rpartition("=") for pair in pairs)}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sass", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="PATTERN", help="rows whose names match")
    parser.add_argument("--unit", metavar="FILE", help="rows of this translation unit, a path in the checkout")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout whose kernels are counted")
    parser.add_argument("--arch", default="sm_90", choices=("sm_80", "sm_90", "sm_100"))
    parser.add_argument("--listing", metavar="PATTERN", help="prints the token loops of the rows whose names match")
    parser.add_argument("--check", action="store_true", help="fails where a count grew, or a kernel spills or does not wait")
    parser.add_argument("--write", action="store_true", help="writes the table into docs/benchmarks.md")
    own = parser.add_argument_group("kernels without a row")
    own.add_argument("--kernel", metavar="PATTERN", help="kernels whose demangled names match")
    own.add_argument("--tokens", type=float, default=1, help="tokens of a warp in an iteration")
    own.add_argument("--moved", type=float, default=0, help="bytes of a token")
    own.add_argument("--trips", nargs="+", default=[], metavar="PATTERN=N", help="iterations of inner loops")
    own.add_argument("--rare", nargs="+", default=[], metavar="PATTERN=SHARE", help="how often conditional code is executed")
    own.add_argument("--threads", type=int, default=256, help="threads of a block")
    own.add_argument("--shared", type=int, default=0, help="bytes of a block's dynamic shared memory")
    own.add_argument("--depth", type=int, help="depth of the token loop")
    options = parser.parse_args(arguments)
    if options.kernel and not options.unit:
        parser.error("--kernel needs --unit")
    if (options.check or options.write) and (options.only or options.unit or options.arch != "sm_90"):
        parser.error("--check and --write are about all rows, on sm_90")
    return options


def rows_of(options: argparse.Namespace) -> list[Row]:
    """Returns the rows that the options ask for."""
    if options.kernel is None:
        return [row for row in ROWS if re.search(options.only, row.name) and options.unit in (None, row.unit)]
    trips, rare = numbers_by_pattern(options.trips), numbers_by_pattern(options.rare)
    sizes = (options.tokens, options.moved, trips, rare, options.threads, options.shared, options.depth)
    return [Row(options.kernel, options.unit, options.kernel, *sizes)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command."""
    options = parse(arguments)
    nvcc, disassembler = find_nvcc(), find_disassembler()
    if nvcc is None or disassembler is None:
        print(f"There is no {'nvcc' if nvcc is None else 'nvdisasm'} on this machine, so no machine code was counted.")
        return 0
    rows = rows_of(options)
    counts = count_rows(rows, options.root.resolve(), options.arch, nvcc, disassembler)
    for c in counts:
        if options.listing is not None and re.search(options.listing, c.row.name):
            print(listing(c) + "\n")
        for warning in c.body.warnings:
            print(f"{c.row.name}: {warning}", file=sys.stderr)
    cells = [c.cells() for c in counts]
    print(markdown_table([table.HEAD, *cells]))
    print(f"Predicted for an H100 from the code of nvcc {release(nvcc)} for {options.arch}; no GPU was used.")
    wrong = ["rows without a kernel"] if len({c.row.name for c in counts}) < len(rows) else []
    page = options.root / table.PAGE
    if options.check:
        wrong += table.problems(table.read(page.read_text()), cells)
        wrong += waits.problems(nvcc, options.root.resolve(), disassembler, options.arch)
        print("\n".join(wrong) or "No count grew by more than a tenth, nothing spills, and every kernel waits for the stream.")
    if options.write:
        page.write_text(table.written(page.read_text(), cells))
    return bool(wrong)
