"""Checks that kernels wait for the stream before they access global memory, since they may start before it is done."""

import re
from pathlib import Path

from .build import compile_unit, run
from .listing import Block, flow_graph, functions

WAIT = "ACQBULK"  # griddepcontrol.wait
ACCESSES = re.compile(r"(LD|ST|LDG|STG|ATOM|ATOMG|RED|REDG|LDGSTS|UBLK\w+|UTMA\w+)$")  # of global, or of any memory


def early(blocks: list[Block]) -> list[str]:
    """Returns the accesses of a kernel, and its ends, that a thread can reach without a wait: addresses and opcodes."""
    graph = flow_graph(blocks)
    found, seen, left = [], {0}, [0]
    while left:
        block = blocks[left.pop()]
        for i in block.instructions:
            if i.name == WAIT and not i.predicate:
                break
            if ACCESSES.match(i.name) or i.name == "EXIT":
                found.append(f"{i.address:#x} {i.opcode}")
        else:
            following = set(graph.successors(block.number)) - seen
            seen |= following
            left += following
    return sorted(found)


def problems(nvcc: str, root: Path, disassembler: str, arch: str) -> list[str]:
    """Returns a line for each kernel of the checkout with an early access or end."""
    lines = []
    for unit in sorted(path.relative_to(root) for path in root.glob("csrc/cuda/*.cu")):
        listing = run([disassembler, "-c", str(compile_unit(nvcc, root, str(unit), arch))]).stdout
        for name, blocks in functions(listing.splitlines(), {}).items():
            if places := early(blocks):
                lines.append(f"{unit}: {name} does not wait for the stream before {', '.join(places[:3])}")
    return lines
