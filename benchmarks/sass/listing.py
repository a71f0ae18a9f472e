"""Reads what ``nvdisasm -c -gp`` prints: instructions with the source lines that they come from, and basic blocks."""

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import networkx as nx

from .sources import Places

START = re.compile(r"\.text\.(\S+):$")
LABEL = re.compile(r"(\.L_\w+):")
PTX_LINE = re.compile(r'//## File "\.nv_debug_ptx_txt", line (\d+)')
INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]+)\*/\s+(?:(@!?U?P\w+)\s+)?([\w.]+)\s*(.*?)\s*;")
TARGET = re.compile(r"`\((\.L_\w+)\)|\"(\.L_\w+)\"")
JUMPS, ENDS = ("BRA", "BRX", "JMP"), ("EXIT", "RET")
PREDICATE = re.compile(r"!?U?P[0-6]\b")


class Instruction(NamedTuple):
    """An instruction, and where in the source it comes from."""

    address: int
    predicate: str
    opcode: str
    operands: str
    places: Places

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    def has(self, modifier: str) -> bool:
        """Returns whether the opcode has a modifier."""
        return modifier in self.opcode.split(".")[1:]

    @property
    def jumps(self) -> bool:
        """Whether it may go on elsewhere. Calls of the function's own labels, which do not return, are jumps too."""
        return self.name in JUMPS or (self.name == "CALL" and bool(self.targets))

    @property
    def ends(self) -> bool:
        """Whether the next instruction is executed only where a predicate says so."""
        return self.jumps or self.name in ENDS

    @property
    def targets(self) -> list[str]:
        """The labels that the operands name."""
        return [a or b for a, b in TARGET.findall(self.operands)]


class Block(NamedTuple):
    """A basic block, named by its number in the order of addresses."""

    number: int
    labels: tuple[str, ...]
    instructions: tuple[Instruction, ...]


def functions(lines: Iterable[str], places: Mapping[int, Places]) -> dict[str, list[Block]]:
    """Returns the basic blocks of each function by its mangled name. Subroutines of the compiler are part of their caller.

    ``places`` are those of the PTX file's lines, each up to the next one.
    """
    found: dict[str, list[Block]] = {}
    blocks: list[Block] = []
    labels: list[str] = []
    instructions: list[Instruction] = []
    starts = sorted(places)
    here: Places = ()

    def end() -> None:
        if instructions:
            blocks.append(Block(len(blocks), tuple(labels), tuple(instructions)))
            labels.clear()
            instructions.clear()

    for line in lines:
        if match := PTX_LINE.search(line):
            before = bisect_right(starts, int(match[1]))
            here = places[starts[before - 1]] if before else ()
        elif match := INSTRUCTION.match(line):
            address, predicate, opcode, operands = match.groups()
            instructions.append(Instruction(int(address, 16), predicate or "", opcode, operands, here))
            if instructions[-1].ends:
                end()
        elif match := LABEL.match(line):
            end()
            labels.append(match[1])
        elif match := START.match(line):
            end()
            labels.clear()
            blocks = found[match[1]] = []
            here = ()
    end()
    return found


def successors(block: Block, by_label: dict[str, int], next_block: int | None) -> list[int]:
    """Returns the blocks that may follow. The branch of a warp whose threads have diverged is left out."""
    last = block.instructions[-1]
    conditional = bool(last.predicate) or (last.jumps and bool(PREDICATE.match(last.operands)))
    if last.jumps and last.has("DIV"):
        return [] if next_block is None else [next_block]
    found = [by_label[label] for label in last.targets if label in by_label] if last.jumps else []
    if next_block is not None and (conditional or not last.ends):
        found.append(next_block)
    return found


def flow_graph(blocks: list[Block]) -> nx.DiGraph:
    """Returns the graph of the blocks that can be reached from the first."""
    by_label = {label: block.number for block in blocks for label in block.labels}
    graph = nx.DiGraph()
    graph.add_node(0)
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        for successor in successors(block, by_label, following and following.number):
            graph.add_edge(block.number, successor)
    return graph.subgraph({0} | nx.descendants(graph, 0)).copy()
