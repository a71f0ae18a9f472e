"""How often each block of a token loop is executed, and what an iteration costs."""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple

import networkx as nx

from .listing import Block, Instruction, flow_graph
from .loops import Loop, dominates, natural_loops, step, tails
from .machine import cycles_of
from .sources import described, matched

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


def share_of(instructions: Sequence[Instruction], rare: Mapping[str, float]) -> tuple[float, str]:
    """Returns how often a conditional block is executed, by the lines of most of its instructions, and the reason."""
    if any(i.name == "CALL" and SUBROUTINE in i.operands for i in instructions):
        return 0.0, "subroutine"
    shares = []
    for instruction in instructions:
        if instruction.places:
            shares.append(min(((rare[p], p) for p in matched(instruction.places, rare)), default=(1.0, "")))
    return sorted(shares)[len(shares) // 2] if shares else (1.0, "")


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
    inner = [loop for loop in loops if loop.blocks < outer.blocks]
    patterns = {loop.header: majority([i for b in loop.blocks for i in blocks[b].instructions], trips) for loop in inner}
    unrolled = {loop.header: step(graph, blocks, loop) for loop in inner}
    after = nx.restricted_view(graph, [], [(tail, outer.header) for tail in tails(graph, outer)])

    def rest(number: int, pattern: str | None, itself: int | None = None) -> bool:
        """Returns whether a block comes after a loop of that pattern that was unrolled more, and leaves no iterations to it."""
        return pattern is not None and any(
            patterns[loop.header] == pattern
            and unrolled[loop.header] > unrolled.get(itself, 1)
            and trips[pattern] % unrolled[loop.header] == 0
            and number not in loop.blocks
            and nx.has_path(after, loop.header, number)
            for loop in inner
        )

    counts = {}
    for header, pattern in patterns.items():
        counts[header] = 1.0 if pattern is None else 0.0 if rest(header, pattern, header) else trips[pattern] / unrolled[header]
    weighted = []
    for number in sorted(outer.blocks):
        instructions = blocks[number].instructions
        around = [loop for loop in inner if number in loop.blocks]
        times = prod(counts[loop.header] for loop in around)
        share, reason = 1.0, f"{times:g} trips" if around else ""
        # A block is left out by some iterations if one of the loops around it can leave it out.
        if not all(dominates(dominator, number, tail) for loop in around[-1:] or [outer] for tail in tails(graph, loop)) or any(
            not all(dominates(dominator, loop.header, tail) for tail in tails(graph, outer)) for loop in around[:1]
        ):
            share, why = share_of(instructions, rare)
            if not around and rest(number, majority(instructions, trips)):
                share, why = 0.0, "rest of an unrolled loop"
            reason = why or reason
        weighted.append(Weighted(blocks[number], times * share, reason))
    executed = {w.block.number for w in weighted if w.weight}
    warnings = [
        f"the loop at {blocks[header].instructions[0].address:#x} has no trip count: {words(blocks[header].instructions[-1])}"
        for header, pattern in patterns.items()
        if pattern is None and header in executed
    ]
    return Body(weighted, warnings)


def majority(instructions: Sequence[Instruction], patterns: Mapping[str, float]) -> str | None:
    """Returns the pattern that most of the instructions with a source line match, or None."""
    found = Counter(next(iter(matched(i.places, patterns)), None) for i in instructions if i.places)
    pattern, count = found.most_common(1)[0] if found else (None, 0)
    return pattern if 2 * count > found.total() else None


def words(instruction: Instruction) -> str:
    """Returns the source line of an instruction."""
    return described(instruction.places[0]) if instruction.places else "no source line"
