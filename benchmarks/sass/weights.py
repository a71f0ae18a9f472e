"""How often each block of a token loop is executed, and what an iteration costs."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

import networkx as nx

from .listing import Block, Instruction, flow_graph
from .loops import Loop, natural_loops
from .machine import cycles_of
from .sources import described

SUBROUTINE = "$__internal_"  # what the compiler calls for operands such as denormals
# A loop that has so much of the loop around it is what that one is there for: the tokens of a tile.
MOST = 0.5


class Weighted(NamedTuple):
    """A block of the token loop with how often an iteration executes it, and why that is not 1."""

    block: Block
    weight: float
    reason: str


class Body(NamedTuple):
    """The token loop of a kernel, and what is unusual about it."""

    blocks: list[Weighted]
    warnings: list[str]

    @property
    def slots(self) -> float:
        """The instructions of an iteration of a warp."""
        return sum(w.weight * len(w.block.instructions) for w in self.blocks)

    @property
    def cycles(self) -> dict[str, float]:
        """The cycles for which an iteration keeps each pipe busy."""
        total: Counter[str] = Counter()
        for w in self.blocks:
            for instruction in w.block.instructions:
                for pipe, cycles in cycles_of(instruction).items():
                    total[pipe] += w.weight * cycles
        return dict(total)


def matched(instruction: Instruction, patterns: Mapping[str, float]) -> str | None:
    """Returns the first pattern that one of the instruction's lines matches, innermost lines first."""
    for place in instruction.places:
        for pattern in patterns:
            if re.search(pattern, described(place)):
                return pattern
    return None


def share_of(instructions: Sequence[Instruction], rare: Mapping[str, float]) -> tuple[float, str]:
    """Returns how often a conditional block is executed, by the lines of most of its instructions, and the reason."""
    if any(i.name == "CALL" and SUBROUTINE in i.operands for i in instructions):
        return 0.0, "subroutine"
    found = {pattern: min((rare[p], p) for p in rare if p == pattern) for pattern in rare}
    shares = []
    for instruction in instructions:
        if instruction.places:
            hits = [p for p in rare if any(re.search(p, described(place)) for place in instruction.places)]
            shares.append(min((found[p] for p in hits), default=(1.0, "")))
    if not shares:
        return 1.0, ""
    middle = median(share for share, _ in shares)
    return next(((s, p) for s, p in sorted(shares) if s == middle), (1.0, ""))


def token_loop(loops: Sequence[Loop], blocks: Sequence[Block], depth: int | None) -> Loop | None:
    """Returns the loop over tokens: the largest of that depth, or else the largest, as far in as one has most of the other."""

    def size(loop: Loop) -> int:
        return sum(len(blocks[b].instructions) for b in loop.blocks)

    if depth is not None:
        return max((loop for loop in loops if loop.depth == depth), key=size, default=None)
    found = max((loop for loop in loops if loop.depth == 1), key=size, default=None)
    while found is not None:
        inner = [loop for loop in loops if loop.depth == found.depth + 1 and loop.blocks < found.blocks]
        largest = max(inner, key=size, default=None)
        if largest is None or size(largest) <= MOST * size(found):
            break
        found = largest
    return found


def body_of(
    blocks: Sequence[Block], trips: Mapping[str, float], rare: Mapping[str, float], depth: int | None = None
) -> Body | None:
    """Returns the token loop, or None where the kernel has no loop.

    ``trips`` has the iterations of inner loops and ``rare`` the share of the iterations in which conditional blocks are
    executed, both by patterns of ``function: text`` of source lines.
    """
    graph = flow_graph(list(blocks))
    loops = natural_loops(graph)
    outer = token_loop(loops, blocks, depth)
    if outer is None:
        return None
    dominator = nx.immediate_dominators(graph, 0)
    warnings, counts = [], {}
    inner = [loop for loop in loops if loop.blocks < outer.blocks]
    for loop in inner:
        instructions = [i for b in sorted(loop.blocks) for i in blocks[b].instructions]
        found = Counter(matched(i, trips) for i in instructions)
        pattern = found.most_common(1)[0][0]
        counts[loop.header] = 1.0 if pattern is None else trips[pattern]
        if pattern is None:
            warnings.append(f"the loop at {instructions[0].address:#x} has no trip count: {place_in_words(instructions[0])}")
    weighted = []
    for number in sorted(outer.blocks):
        around = [loop for loop in inner if number in loop.blocks]
        times = 1.0
        for loop in around:
            times *= counts[loop.header]
        share, reason = 1.0, f"{times:g} trips" if around else ""
        # A loop that is not on every path lends that to its blocks.
        if any(is_conditional(graph, dominator, loop, number) for loop in [outer, *around]):
            share, why = share_of(blocks[number].instructions, rare)
            reason = why or reason
        weighted.append(Weighted(blocks[number], times * share, reason))
    unknown = [w for w in warnings if not any(x.weight == 0 and f"{x.block.instructions[0].address:#x} " in w for x in weighted)]
    return Body(weighted, unknown)


def is_conditional(graph: nx.DiGraph, dominator: Mapping[int, int], loop: Loop, number: int) -> bool:
    """Returns whether an iteration of the loop can leave the block out."""
    tails = [tail for tail in graph.predecessors(loop.header) if tail in loop.blocks]

    def dominates(block: int) -> bool:
        while block != number and dominator.get(block) not in (None, block):
            block = dominator[block]
        return block == number

    return not all(dominates(tail) for tail in tails)


def place_in_words(instruction: Instruction) -> str:
    """Returns the source line of an instruction."""
    return described(instruction.places[0]) if instruction.places else "no source line"
