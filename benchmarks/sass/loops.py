"""Natural loops of a flow graph, and how often the compiler unrolled them."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import networkx as nx

from .listing import Block

REGISTER = re.compile(r"\bU?R\d+\b")
STEP = re.compile(r"(U?R\d+), (?:U?P\w+, )*\1(?:\.reuse)?, (-?0x[0-9a-f]+)\b")

MOST_UNROLLED = (
    8  # a counter that grows by more does so in the source: the compiler unrolls less where it does not know the end
)


def dominates(dominator: Mapping[int, int | None], a: int, b: int) -> bool:
    """Returns whether every path to block b goes through block a, from each block's immediate dominator."""
    while b != a:
        above = dominator.get(b)
        if above is None or above == b:
            return False
        b = above
    return True


class Loop(NamedTuple):
    """A loop: its first block, all its blocks, and how many loops contain it, itself included."""

    header: int
    blocks: frozenset[int]
    depth: int


def natural_loops(graph: nx.DiGraph) -> list[Loop]:
    """Returns the loops, outer ones first. Back edges to the same header make one loop."""
    dominator = nx.immediate_dominators(graph, 0)
    bodies: dict[int, set[int]] = {}
    for tail, header in graph.edges:
        if dominates(dominator, header, tail):
            inside = graph.subgraph(set(graph) - {header})
            before = nx.ancestors(inside, tail) | {tail} if tail != header else set()
            bodies.setdefault(header, {header}).update(before)
    found = [
        Loop(header, frozenset(body), sum(header in other for other in bodies.values())) for header, body in bodies.items()
    ]
    return sorted(found, key=lambda loop: (loop.depth, loop.header))


def tails(graph: nx.DiGraph, loop: Loop) -> list[int]:
    """Returns the blocks that jump back to a loop's first."""
    return [block for block in graph.predecessors(loop.header) if block in loop.blocks]


def step(graph: nx.DiGraph, blocks: Sequence[Block], loop: Loop) -> int:
    """Returns how often a loop over consecutive numbers was unrolled: what an iteration adds to its counter.

    The counter is a register that the loop increases by a constant and that is compared before the jump back, or decreases and
    compares with zero, maybe earlier.
    """
    ends = [blocks[tail].instructions for tail in tails(graph, loop)]
    jumps = {end[-1].predicate.lstrip("@!") for end in ends}
    compared = {
        register
        for instructions in [*ends, *(blocks[block].instructions for block in loop.blocks)]
        for i in instructions
        if i.name in ("ISETP", "UISETP")
        and (instructions in ends or (i.operands.partition(",")[0] in jumps and i.has("NE") and " RZ," in i.operands))
        for register in REGISTER.findall(i.operands)
    }
    steps = [1]
    for block in loop.blocks:
        for instruction in blocks[block].instructions:
            match = STEP.match(instruction.operands)
            if match and match[1] in compared and instruction.name in ("IADD3", "VIADD", "UIADD3", "UVIADD", "IADD"):
                value = int(match[2], 16)
                steps.append(min(abs(value), 2**32 - value))
    return max(value for value in steps if value <= MOST_UNROLLED)
