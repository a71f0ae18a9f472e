"""Counts the instructions of the kernels' token loops and predicts their time on an H100; nothing is run on a GPU.

python -m benchmarks.sass [--only gate] [--unit csrc/cuda/gate.cu] [--root CHECKOUT] [--arch sm_90]
python -m benchmarks.sass --only "gate, e=64" --listing bfloat16     # the token loops of the rows with that in their names
"""

import argparse
import re
import sys
from pathlib import Path
from typing import NamedTuple

from ptxas_spills import Function
from tables import markdown_table

from .build import compile_unit, find_disassembler, find_nvcc, kernels
from .kernels import ROWS, Row
from .machine import WARPS, Prediction, predict, resident_warps
from .weights import Body, body_of, words

ROOT = Path(__file__).parents[2]
HEAD = [
    "kernel",
    "slots",
    "ALU cycles",
    "busiest pipe",
    "registers",
    "spilled bytes",
    "warps",
    "ns / 1000 tokens",
    "bound",
    "share",
]


class Count(NamedTuple):
    """What was counted for a row."""

    row: Row
    report: Function
    body: Body
    slots: float  # of a token, like all that follows
    cycles: dict[str, float]
    prediction: Prediction

    @property
    def spilled(self) -> int:
        """Bytes that ptxas stores and loads again."""
        return self.report.stores + self.report.loads

    @property
    def warps(self) -> int:
        """Warps of a multiprocessor."""
        return resident_warps(self.report.registers, self.row.threads, self.row.shared)

    def cells(self) -> list[str]:
        """Returns the row of the table."""
        busiest = max(self.cycles, key=lambda pipe: self.cycles[pipe])
        return [
            self.row.name,
            f"{self.slots:.0f}",
            f"{self.cycles.get('alu', 0):.0f}",
            f"{busiest} {self.cycles[busiest]:.0f}",
            str(self.report.registers),
            str(self.spilled),
            f"{self.warps} of {WARPS}",
            f"{self.prediction.seconds * 1e12:.0f}",
            self.prediction.bound,
            f"{self.prediction.share:.0%}",
        ]


def count(rows: list[Row], root: Path, arch: str, nvcc: str, disassembler: str) -> list[Count]:
    """Counts the rows; prints which have no kernel or no loop."""
    found = []
    for unit in dict.fromkeys(row.unit for row in rows):
        of_unit = [row for row in rows if row.unit == unit]
        cubin = compile_unit(nvcc, root, unit, arch)
        compiled = kernels(cubin, disassembler, lambda name: any(re.search(row.kernel, name) for row in of_unit))  # noqa: B023
        for row in of_unit:
            of_row = [kernel for kernel in compiled if re.search(row.kernel, kernel.report.name)]
            if len(of_row) != 1:
                raise SystemExit(f"{row.name}: {len(of_row)} kernels match {row.kernel}")
            body = body_of(of_row[0].blocks, row.trips, row.rare, row.depth, row.loops)
            if body is None:
                raise SystemExit(f"{row.name}: {of_row[0].report.name} has no loop")
            slots = body.slots / row.tokens
            cycles = {pipe: cycles / row.tokens for pipe, cycles in body.cycles.items()}
            found.append(Count(row, of_row[0].report, body, slots, cycles, predict(slots, cycles, row.moved)))
    return found


def listing(count: Count) -> str:
    """Returns the token loop, block by block: weight, instructions, the reason of the weight, and what it costs."""
    lines = [f"{count.row.name}: {count.report.name}", *(f"  {warning}" for warning in count.body.warnings)]
    for block, weight, reason in count.body.blocks:
        lines.append(f"block {block.number}: {weight:g} x {len(block.instructions)} instructions {reason}")
        previous = ""
        for i in block.instructions:
            place = words(i)
            text = f"{i.predicate:5}{i.opcode} {i.operands}"
            lines.append(f"    {i.address:6x} {text:60.60} {'' if place == previous else place.partition(' after ')[0]}")
            previous = place
    total = ", ".join(f"{pipe} {cycles:.0f}" for pipe, cycles in sorted(count.cycles.items(), key=lambda item: -item[1]))
    lines.append(f"a token: {count.slots:.1f} issue slots; cycles of its pipes: {total}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sass", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="PATTERN", help="rows whose names match")
    parser.add_argument("--unit", metavar="FILE", help="rows of this translation unit")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout whose kernels are counted")
    parser.add_argument("--arch", default="sm_90", choices=("sm_80", "sm_90", "sm_100"))
    parser.add_argument("--listing", metavar="PATTERN", help="prints the token loops of the rows whose names match")
    options = parser.parse_args(arguments)
    nvcc, disassembler = find_nvcc(), find_disassembler()
    if nvcc is None or disassembler is None:
        print(f"There is no {'nvcc' if nvcc is None else 'nvdisasm'} on this machine, so no machine code was counted.")
        return 0
    rows = [row for row in ROWS if re.search(options.only, row.name) and options.unit in (None, row.unit)]
    counts = count(rows, options.root.resolve(), options.arch, nvcc, disassembler)
    if options.listing is not None:
        print("\n\n".join(listing(c) for c in counts if re.search(options.listing, c.row.name)))
    for c in counts:
        for warning in c.body.warnings:
            print(f"{c.row.name}: {warning}", file=sys.stderr)
    print(markdown_table([HEAD, *(c.cells() for c in counts)]))
    return 0
