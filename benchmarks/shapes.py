"""The sizes of a measurement."""

import argparse
from typing import NamedTuple


class Shape(NamedTuple):
    """Numbers of groups, tokens of a group, features, experts, and experts per token."""

    b: int
    n: int
    d: int
    e: int
    k: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Returns the shape that ``b,n,d,e,k`` describes."""
        try:
            sizes = tuple(map(int, text.split(",")))
        except ValueError:
            sizes = ()
        if len(sizes) != 5 or min(sizes) < 1 or sizes[4] > sizes[3]:
            raise argparse.ArgumentTypeError(f"a shape is five counts b,n,d,e,k with k at most e, got {text!r}")
        return cls(*sizes)

    def __str__(self) -> str:
        return ", ".join(f"{name}={size}" for name, size in self._asdict().items())
