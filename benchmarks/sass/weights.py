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
OF_A_CALL = 12  # instructions of a call with its arguments and result, at most
# A loop that has so much of the loop around it is what that one is there for: the tokens of a tile.
MOST = 0.5
END = -1  # stands for the end of an iteration


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
        total: dict[str, float] = {}
        for w in self.blocks:
            for instruction in w.block.instructions:
                for pipe, cycles in cycles_of(instruction).items():
                    total[pipe] = total.get(pipe, 0.0) + w.weight * cycles
        return total


def share_of(instructions: Sequence[Instruction], rare: Mapping[str, float]) -> tuple[float, str]:
    """Returns how often a conditional block is executed, by the lines of most of its instructions, and the reason."""
    if len(instructions) <= OF_A_CALL and any(i.name == "CALL" and SUBROUTINE in i.operands for i in instructions):
        return 0.0, "subroutine"
    shares = []
    for instruction in instructions:
        if instruction.places:
            shares.append(min(((rare[p], p) for p in matched(instruction.places, rare)), default=(1.0, "")))
    return sorted(shares)[len(shares) // 2] if shares else (1.0, "")


def size(loop: Loop, blocks: Sequence[Block]) -> int:
    """Returns the number of a loop's instructions."""
    return sum(len(blocks[b].instructions) for b in loop.blocks)


def token_loop(loops: Sequence[Loop], blocks: Sequence[Block], depth: int | None = None) -> Loop | None:
    """Returns the loop over tokens: the largest of that depth, or else the largest, as far in as one has most of the other."""
    found = max((loop for loop in loops if loop.depth == (depth or 1)), key=lambda loop: size(loop, blocks), default=None)
    while found is not None and depth is None:
        inner = [loop for loop in loops if loop.depth == found.depth + 1 and loop.blocks < found.blocks]
        largest = max(inner, key=lambda loop: size(loop, blocks), default=None)
        if largest is None or size(largest, blocks) <= MOST * size(found, blocks):
            break
        found = largest
    return found


def named_loops(loops: Sequence[Loop], blocks: Sequence[Block], pattern: str) -> list[Loop]:
    """Returns the outermost loops of which most instructions come from source lines that match a pattern."""
    found: list[Loop] = []
    for loop in loops:  # outer ones first
        instructions = [i for b in loop.blocks for i in blocks[b].instructions]
        if majority(instructions, {pattern: 1.0}) and not any(loop.blocks < other.blocks for other in found):
            found.append(loop)
    return found


class Weights:
    """How often an iteration of a token loop executes its blocks.

    ``trips`` has the iterations of inner loops and ``rare`` the share of the iterations that execute conditional blocks, both
    by patterns of ``function: text`` of source lines.
    """

    def __init__(
        self,
        graph: nx.DiGraph,
        blocks: Sequence[Block],
        outer: Loop,
        inner: Sequence[Loop],
        trips: Mapping[str, float],
        rare: Mapping[str, float],
    ) -> None:
        self.blocks, self.header, self.inner, self.trips, self.rare = blocks, outer.header, inner, trips, rare
        self.iteration = graph.subgraph(outer.blocks).copy()
        self.iteration.remove_edges_from([(tail, outer.header) for tail in tails(graph, outer)])
        self.dominator = nx.immediate_dominators(self.iteration, outer.header)
        to_end = self.iteration.reverse()
        to_end.add_edges_from((END, tail) for tail in tails(graph, outer))
        self.post_dominator = nx.immediate_dominators(to_end, END)
        self.patterns = {loop.header: self.pattern(loop) for loop in inner}
        self.unrolled = {loop.header: step(graph, blocks, loop) for loop in inner}
        self.shares: dict[int, tuple[float, str]] = {}

    def pattern(self, loop: Loop) -> str | None:
        """Returns the pattern of a loop's trips: of its jump back, or else of most instructions outside of its inner loops."""
        jumps = [self.blocks[tail].instructions[-1] for tail in self.iteration.predecessors(loop.header) if tail in loop.blocks]
        within = [other.blocks for other in self.inner if other.blocks < loop.blocks]
        own = [i for b in loop.blocks.difference(*within) for i in self.blocks[b].instructions]
        for instructions in (jumps, own):
            found = Counter(next(iter(matched(i.places, self.trips)), None) for i in instructions)
            del found[None]
            if found:
                return found.most_common(1)[0][0]
        return None

    def around(self, number: int) -> list[Loop]:
        """Returns the inner loops that a block is in, outer ones first."""
        return [loop for loop in self.inner if number in loop.blocks]

    def count(self, loop: Loop) -> float:
        """Returns the iterations of an inner loop, as it was unrolled."""
        pattern, unrolled = self.patterns[loop.header], self.unrolled[loop.header]
        if pattern is None:
            return 1.0
        rest = self.rest(loop.header, pattern)
        times = self.trips[pattern] if rest is None else rest
        return times // unrolled if unrolled > 1 else times

    def rest(self, number: int, pattern: str | None) -> float | None:
        """Returns the trips that are left to a block by a loop of that pattern that comes before it and was unrolled more."""
        before = [
            self.unrolled[loop.header]
            for loop in self.inner
            if self.patterns[loop.header] == pattern is not None
            and self.unrolled[loop.header] > self.unrolled.get(number, 1)
            and number not in loop.blocks
            and nx.has_path(self.iteration, loop.header, number)
        ]
        return self.trips[pattern] % max(before) if before and pattern is not None else None

    def share(self, number: int) -> tuple[float, str]:
        """Returns the share of the iterations that execute a block, and the reason.

        That is the share of the block's dominator where no path from there to the end avoids the block, and no more elsewhere.
        """
        if number not in self.shares:
            root = self.root(number)
            if root == self.header:
                self.shares[number] = 1.0, ""
            elif root == number:
                self.shares[number] = min(self.share(self.dominator[root]), self.own_share(root), key=lambda share: share[0])
            else:
                self.shares[number] = self.share(root)
        return self.shares[number]

    def root(self, number: int) -> int:
        """Returns the first of the blocks that are executed as often as this one, but for the trips of loops."""
        while number != self.header and dominates(self.post_dominator, number, self.dominator[number]):
            number = self.dominator[number]
        return number

    def own_share(self, root: int) -> tuple[float, str]:
        """Returns the share of conditional blocks by the source lines of all that are executed as often."""
        equal = [number for number in self.iteration if self.root(number) == root]
        instructions = [i for number in equal for i in self.blocks[number].instructions]
        if not self.around(root) and self.rest(root, majority(instructions, self.trips)) == 0:
            return 0.0, "rest of an unrolled loop"
        return share_of(instructions, self.rare)

    def weighted(self, number: int) -> Weighted:
        """Returns a block with its weight."""
        times = prod(self.count(loop) for loop in self.around(number))
        share, reason = self.share(number)
        return Weighted(self.blocks[number], times * share, reason or (f"{times:g} trips" if times != 1 else ""))


def body_of(
    blocks: Sequence[Block],
    trips: Mapping[str, float],
    rare: Mapping[str, float],
    depth: int | None = None,
    named: str | None = None,
) -> Body | None:
    """Returns the token loop, or the loops of which most lines match ``named``; None where there is none."""
    graph = flow_graph(list(blocks))
    loops = natural_loops(graph)
    if named is not None:
        outer = named_loops(loops, blocks, named)
    else:
        largest = token_loop(loops, blocks, depth)
        outer = [] if largest is None else [largest]
    weighted, warnings = [], []
    for loop in outer:
        weights = Weights(graph, blocks, loop, [other for other in loops if other.blocks < loop.blocks], trips, rare)
        weighted += [weights.weighted(number) for number in sorted(loop.blocks)]
        executed = {w.block.number for w in weighted if w.weight}
        warnings += [
            f"the loop at {start.address:#x} has no trip count: {words(start)}"
            for header, pattern in weights.patterns.items()
            for start in blocks[header].instructions[:1]
            if pattern is None and header in executed
        ]
    return Body(weighted, warnings) if outer else None


def majority(instructions: Sequence[Instruction], patterns: Mapping[str, float]) -> str | None:
    """Returns the pattern that most of the instructions with a source line match, or None."""
    found = Counter(next(iter(matched(i.places, patterns)), None) for i in instructions if i.places)
    pattern, count = found.most_common(1)[0] if found else (None, 0)
    return pattern if 2 * count > found.total() else None


def words(instruction: Instruction) -> str:
    """Returns the source line of an instruction."""
    return described(instruction.places[0]).partition(" after ")[0] if instruction.places else "no source line"
