"""The kernels that are counted: one row each."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import log2

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
    loops: str | None = None  # pattern of the lines of the token loops, where there are several


# Code that the rows' calls do not execute, or not for each token.
RARE = {
    r"^add_noise:|^gumbel:": 0.0,  # with noise
    r": return a\.token_mask == nullptr": 0.0,  # with a mask
    r"^fetch_elements:|^store: .*row\[index": 0.0,  # rows that are not aligned
    r"^subtract:": 0.0,  # scores above a million
}


def row_layout(e: int) -> tuple[int, int, int]:
    """Returns the threads of a row of so many experts, the values of each, and the threads of a block."""
    width, count = {64: (8, 8), 128: (8, 16), 256: (16, 16)}[e]
    return width, count, 256 if count == 8 else 128


def gate(dtype: str, e: int, k: int) -> Row:
    """Returns the row of the forward pass of a softmax gate with its losses."""
    element, size = DTYPES[dtype]
    width, count, threads = row_layout(e)
    looked_up = 4 * count * threads if size == 4 else 0
    return Row(
        name=f"gate, e={e}, k={k}, {dtype}",
        unit="csrc/cuda/gate.cu",
        kernel=rf"^gate_rows<{element}, WarpLayout<float, {width}, {count}, \d>, \(Kind\)0>",
        tokens=32 / width,
        moved=e * size + k * 8,
        trips={r"^choose_exactly: for \(int k": k},
        # The second path: about one token in 400 of 256 experts, and a warp processes several.
        rare=RARE | {r"^flush:": 1 / 8, r"^take_logarithms:": 1 / width, r"^choose_exactly:": 1 / 100},
        threads=threads,
        shared=(threads * count + threads // 32) * 8 + (e + 1) * 4 + looked_up,
        depth=2,
    )


def gate_backward(dtype: str, e: int, k: int) -> Row:
    """Returns the row of its gradient, with those of the losses."""
    element, size = DTYPES[dtype]
    width, count, threads = row_layout(e)
    return Row(
        name=f"gate_backward, e={e}, k={k}, {dtype}",
        unit="csrc/cuda/gate_backward.cu",
        kernel=rf"^gate_backward_rows<{element}, WarpLayout<float, {width}, {count}, \d>, \(Kind\)0>",
        tokens=32 / width,
        moved=2 * e * size + k * 8,
        trips={r"^add_in_order:": k},
        rare=RARE | {r"^add_in_order:": 0.0},  # experts that were made up
        threads=threads,
        shared=threads // width * (width * count + 4) * 4,
        depth=2,
    )


def gate_deepseek(dtype: str) -> Row:
    """Returns the row of DeepSeek-V3's router: sigmoids and a bias, the best 4 of 8 groups, 8 of 256 experts."""
    element, size = DTYPES[dtype]
    e, k, groups = 256, 8, 8
    width, count, threads = row_layout(e)
    of_group = e // groups * size // 16  # threads that share a group
    return Row(
        name=f"gate, DeepSeek-V3, {dtype}",
        unit="csrc/cuda/gate.cu",
        kernel=rf"^gate_rows<{element}, WarpLayout<float, {width}, {count}, \d>, \(Kind\)2>",
        tokens=32 / width,
        moved=e * size + k * 8,
        trips={
            r"^close_groups: for \(int by": log2(of_group),
            r"^close_groups: (for \(int q|const int32_t other = Row|if \(c \*)|: better\[d\] \+=": width / of_group,
            r"^choose_exactly: for \(int k": k,
        },
        # The second path: about one token in 190, where logits are normal with variance 1.
        rare=RARE
        | {r"^flush:": 1 / 8, r"^take_logarithms:": 1 / width, r"^choose_exactly:": 1 / 100}
        | {r"^choose_by_gates: .*(exponentials|reciprocal\(exp|s\[i\] \*= scale)": 0.0}  # a softmax's gates
        | {r"^read_given:|^choose: .*a_\.given|^run: .*count_valid": 0.0},  # experts that are given
        threads=threads,
        shared=(threads * count + threads // 32) * 8 + (e + 1) * 4 + 4 * count * threads + 4 * count * width,
        depth=2,
    )


def gate_backward_sigmoid(dtype: str, e: int, k: int) -> Row:
    """Returns the row of the gradient of any sigmoid gate: it does not ask how the experts were chosen."""
    row = gate_backward(dtype, e, k)
    return replace(
        row,
        name=f"gate_backward, sigmoid, e={e}, k={k}, {dtype}",
        kernel=row.kernel.replace("0>", "2>"),
        rare={**row.rare, r"^clear_padding:": 0.0},  # with a mask
    )


# Of benchmarks/shapes.py: slots for 1.25 times the tokens, so that a token has so many rows of the experts.
ROWS_PER_TOKEN = 1.25
PART = 4 * 32 * 16  # bytes of a row that a warp reads at once
SUMMED_PART = PART / 2  # the same, where it sums rows


def assign(e: int, k: int) -> Row:
    """Returns the row of the loops over the pairs; the scans and barriers between them do not depend on tokens."""
    pairs = 4 * 32  # of an iteration
    warps, pitch, steps = 32, 36, 8
    ints = warps * e + 3 * k * e + 2 * e + 1 + 4 * warps * pitch
    return Row(
        name=f"assign, e={e}, k={k}",
        unit="csrc/cuda/assign.cu",
        kernel=r"^assign_pairs<float, \(Slots\)0, \(Memory\)0>",
        tokens=pairs / k,
        moved=k * 5 * 4 + ROWS_PER_TOKEN * 4,
        trips={r"^give: .*(place_of\(unit\)|write\(place)": 0},  # with more than 32 ranks
        rare={r": if \(a\.token_mask != nullptr\)|valid\[u\] = mask": 0.0, r"is_above_threshold|Policy::All": 0.0},
        threads=32 * warps,
        shared=ints * 4 + steps * warps * pitch * 2,
        loops=r"^(count|give):",
    )


def dense(dtype: str, e: int, k: int, tokens: int) -> Row:
    """Returns the row of the dense form of groups of so many tokens: a chunk of both outputs is an iteration."""
    element, size = DTYPES[dtype]
    chunks = e * (ROWS_PER_TOKEN * tokens / e) * size / 512  # of a token, in each output
    return Row(
        name=f"dense, n={tokens}, e={e}, k={k}, {dtype}",
        unit="csrc/cuda/dense.cu",
        kernel=rf"^dense_chunks<{element}, {16 // size}>",
        tokens=1 / chunks,
        moved=2 * chunks * 512 + 12 * k,
        trips={
            r"^dense_chunks: for \(unsigned left": ROWS_PER_TOKEN / chunks,
            r"^dense_chunks: (for \(int64_t pairs|if \(found)": 1,
        },
        # A token's row is longer than the chunks of a block.
        rare={r"^find:": k / 32 / chunks, r"^token_of: .*quotient|^quotient:": 0.0, r"^store_part: .*out\[at \+ j\]": 0.0},
        depth=2,
    )


def dispatch(dtype: str, d: int) -> Row:
    """Returns the row of the copies of tokens' rows to the experts' buffers: four tokens are an iteration."""
    _, size = DTYPES[dtype]
    return Row(
        name=f"dispatch, d={d}, {dtype}",
        unit="csrc/cuda/dispatch.cu",
        kernel=r"^copy_rows<uint4>",
        tokens=4,
        moved=(1 + ROWS_PER_TOKEN) * d * size + 12 * 8,
        trips={
            r"^copy_rows: for \(unsigned of_token": ROWS_PER_TOKEN,
            r"^for_parts:": max(1, d * size / PART),
            r"^copy_rows: for \(unsigned left": 4,
            r"^copy_rows: for \(int64_t pair": 1,
        },
        depth=1,
    )


def combine(dtype: str, d: int, k: int, gradient_of_dispatch: bool = False) -> Row:
    """Returns the row of the sums of experts' rows: four tokens are an iteration."""
    element, size = DTYPES[dtype]
    rows = 2 + ROWS_PER_TOKEN if gradient_of_dispatch else 1 + ROWS_PER_TOKEN
    return Row(
        name=f"{'dispatch_backward' if gradient_of_dispatch else 'combine'}, d={d}, k={k}, {dtype}",
        unit="csrc/cuda/rows.cu",
        kernel=rf"^sum_rows<{element}, {16 // size}, {str(gradient_of_dispatch).lower()}>",
        tokens=4,
        moved=rows * d * size + 12 * k,
        trips={r"^use: while": ROWS_PER_TOKEN, r"^for_parts:": max(1, d * size / SUMMED_PART), r"^sum_rows: for \(": 4},
        depth=1,
    )


def combine_backward(dtype: str, d: int, k: int) -> Row:
    """Returns the row of its gradient: four tokens are an iteration."""
    element, size = DTYPES[dtype]
    return Row(
        name=f"combine_backward, d={d}, k={k}, {dtype}",
        unit="csrc/cuda/combine.cu",
        kernel=rf"^combine_backward_rows<{element}, {16 // size}>",
        tokens=4,
        moved=(1 + 2 * ROWS_PER_TOKEN) * d * size + 12 * k,
        trips={
            r"^for_parts:": max(1, d * size / SUMMED_PART),
            r"^combine_backward_rows: for \(unsigned left": 4 * ROWS_PER_TOKEN,
            r"^combine_backward_rows: for \(int64_t pair": 1,
        },
        depth=1,
    )


ROWS = [
    *(gate(dtype, e, 8) for dtype in DTYPES for e in (64, 128, 256)),
    *(gate_deepseek(dtype) for dtype in DTYPES),
    *(gate_backward(dtype, e, 8) for dtype in DTYPES for e in (64, 256)),
    *(gate_backward_sigmoid(dtype, 256, 8) for dtype in DTYPES),
    assign(64, 8),
    *(dense(dtype, 64, 8, 8192) for dtype in DTYPES),
    *(dispatch("bfloat16", d) for d in (512, 4096)),
    *(combine("bfloat16", d, 8) for d in (512, 4096)),
    *(combine("bfloat16", d, 8, gradient_of_dispatch=True) for d in (512, 4096)),
    *(combine_backward("bfloat16", d, 8) for d in (512, 4096)),
]
