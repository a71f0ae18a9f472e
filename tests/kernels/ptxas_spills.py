"""Reads the log of a build with ``NVCC_APPEND_FLAGS="-Xptxas -v"`` and fails if a kernel spills registers to memory.

A spilled register is stored to and loaded from the cache at each use, and only this report shows it.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

# Functions that may spill: a pattern of the name as this script prints it, and the reason.
ALLOWED: dict[str, str] = {}

REPORT = re.compile(
    r"(?:Compiling entry function '\w+' for '(?P<architecture>\w+)'\n.*)?Function properties for (?P<name>\w+)\n"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r"(?:.*Used (?P<registers>\d+) registers)?"
)


class Function(NamedTuple):
    """What ptxas reports of a function on one architecture: stack and spills in bytes, and registers (0 if no kernel)."""

    name: str
    architecture: str
    stack: int
    stores: int
    loads: int
    registers: int


def functions(log: str) -> list[Function]:
    """Returns the kernels of a log, each followed by the functions that it calls."""
    found, architecture = [], ""
    for match in REPORT.finditer(log):
        architecture = match["architecture"] or architecture
        numbers = (int(match[name] or 0) for name in ("stack", "stores", "loads", "registers"))
        found.append(Function(match["name"], architecture, *numbers))
    command = subprocess.run(["c++filt"], input="\n".join(f.name for f in found), capture_output=True, text=True, check=True)
    names = re.sub(r"topn_gating::cuda::|\(anonymous namespace\)::|(?m:^void )", "", command.stdout).splitlines()
    return [f._replace(name=name) for f, name in zip(found, names, strict=True)]


def problems(found: list[Function], allowed: dict[str, str]) -> list[str]:
    """Returns a line for each function that spills and may not, and for each allowance that is not needed."""
    spilling = [f for f in found if f.stores or f.loads]
    lines = [
        f"{f.name} on {f.architecture} spills: {f.stores} bytes stored, {f.loads} loaded"
        for f in spilling
        if not any(re.search(pattern, f.name) for pattern in allowed)
    ]
    lines += [f"{p!r} may spill and does not" for p in allowed if not any(re.search(p, f.name) for f in spilling)]
    return lines if found else ["the log tells of no kernel"]


def main(log: str) -> int:
    """Prints the report and returns the exit code."""
    found = functions(Path(log).read_text())
    for sm in sorted({f.architecture for f in found}, key=lambda name: (len(name), name)):
        kernels = [f for f in found if f.architecture == sm and f.registers]
        most = max(kernels, key=lambda f: f.registers)
        stacks = sum(f.stack > 0 for f in kernels)
        print(f"{sm}: {len(kernels)} kernels, {stacks} with a stack, {most.registers} registers or fewer ({most.name})")
    wrong = problems(found, ALLOWED)
    print("\n".join(wrong) or "Nothing spills.")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
