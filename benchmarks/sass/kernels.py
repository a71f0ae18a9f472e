"""The kernels that are counted: one row each."""

from collections.abc import Mapping
from dataclasses import dataclass, field

DTYPES = {"bfloat16": ("__nv_bfloat16", 2), "float32": ("float", 4)}


@dataclass(frozen=True)
class Row:
    """A kernel of a translation unit, at a size.

    Patterns in ``trips`` and ``rare`` are compared with ``function: text after the text of the line before`` of the source
    lines that an instruction comes from, the calls into which it was inlined included.
    """

    name: str
    unit: str  # path of the .cu file
    kernel: str  # pattern of the demangled name, without namespaces
    tokens: float  # tokens that a warp processes in an iteration of its token loop
    moved: float  # bytes that must be read and written for a token
    trips: Mapping[str, float] = field(default_factory=dict)  # iterations of the loops inside the token loop
    rare: Mapping[str, float] = field(default_factory=dict)  # share of the iterations in which conditional code is executed
    threads: int = 256  # of a block
    shared: int = 0  # bytes of dynamic shared memory of a block
    depth: int | None = None  # of the token loop; None: the tool finds it


# Code that the rows' calls do not execute, or not for each token.
RARE = {
    r"^add_noise:|^gumbel:": 0.0,  # with noise
    r": return a\.token_mask == nullptr": 0.0,  # with a mask
    r"^(fetch|store): .*row\[index": 0.0,  # rows that are not aligned
}
GATE_RARE = RARE | {
    r"^gate_tile: : choose_sorted<Key64": 0.0,  # with noise
    r"^gate_tile: (layout\.load|.* after layout\.load)": 0.0,  # losses with noise
    r"^flush:": 1 / 8,
}
GRADIENT_RARE = RARE | {
    r"^has_gradient:|: if \(blank\)": 0.0,  # with a mask
    r"^differentiate: (layout\.load|.* after layout\.load)": 0.0,  # losses with noise
}


def gate(dtype: str, e: int, k: int) -> Row:
    """Returns the row of the forward pass of a softmax gate with its losses."""
    element, size = DTYPES[dtype]
    width = e // 8
    return Row(
        name=f"gate, e={e}, k={k}, {dtype}",
        unit="csrc/cuda/gate.cu",
        kernel=rf"^gate_tokens<{element}, WarpLayout<float, {width}, 8, \d>, false>",
        tokens=32 / width,
        moved=e * size + k * 8,
        trips={r"^pop_sorted:": k},
        # A thread of a narrow row has registers for two ranks, of which it computes one.
        rare=GATE_RARE | {r"^choose_sorted: (v\[i\]|out\.)": k / 16 if width < 16 else 1.0},
        shared=(256 * 8 + 8) * 8 + (e + 1) * 4,
    )


def gate_backward(dtype: str, e: int, k: int) -> Row:
    """Returns the row of its gradient, with those of the losses."""
    element, size = DTYPES[dtype]
    width = e // 8
    return Row(
        name=f"gate_backward, e={e}, k={k}, {dtype}",
        unit="csrc/cuda/gate_backward.cu",
        kernel=rf"^gate_backward_tokens<{element}, WarpLayout<float, {width}, 8, \d>, true>",
        tokens=32 / width,
        moved=2 * e * size + k * 8,
        trips={r"^through_(gates|weights):": k},
        rare=GRADIENT_RARE,
    )


ROWS = [
    *(gate(dtype, e, 8) for dtype in DTYPES for e in (64, 128, 256)),
    *(gate_backward(dtype, e, 8) for dtype in DTYPES for e in (64, 256)),
]
