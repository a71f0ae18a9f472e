"""Natural loops of a flow graph."""

from typing import NamedTuple

import networkx as nx


class Loop(NamedTuple):
    """A loop: its first block, all its blocks, and how many loops contain it, itself included."""

    header: int
    blocks: frozenset[int]
    depth: int


def natural_loops(graph: nx.DiGraph) -> list[Loop]:
    """Returns the loops, outer ones first. Back edges to the same header make one loop."""
    dominator = nx.immediate_dominators(graph, 0)

    def dominates(a: int, b: int) -> bool:
        while b != a and dominator.get(b) not in (None, b):
            b = dominator[b]
        return a == b

    bodies: dict[int, set[int]] = {}
    for tail, header in graph.edges:
        if dominates(header, tail):
            inside = graph.subgraph(set(graph) - {header})
            before = nx.ancestors(inside, tail) | {tail} if tail != header else set()
            bodies.setdefault(header, {header}).update(before)
    found = [
        Loop(header, frozenset(body), sum(header in other for other in bodies.values())) for header, body in bodies.items()
    ]
    return sorted(found, key=lambda loop: (loop.depth, loop.header))
