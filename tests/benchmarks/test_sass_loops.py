"""benchmarks/sass: loops, and how often their blocks run for a token."""

import pytest
from sass.listing import flow_graph
from sass.loops import natural_loops, step
from sass.weights import body_of, token_loop


def weights(body):
    """Returns the weights of a body's blocks by the name of their first instruction's opcode."""
    return {w.block.instructions[0].opcode: w.weight for w in body.blocks}


@pytest.mark.parametrize(
    ("added", "times"),
    [
        ("VIADD R2, R2, 0xfffffffc", 4),
        ("IADD3 R2, P1, R2.reuse, 0x2, RZ", 2),
        ("IADD3 R2, PT, PT, R2, 0x8, RZ", 8),
        ("IADD3 R2, R3, 0x4, RZ", 1),
        ("IADD3 R3, R3, 0x4, RZ", 1),  # not compared
        ("VIADD R2, R2, 0x400", 1),
    ],
)
def test_how_often_a_loop_was_unrolled(code, added, times):
    blocks = code(f"L0:\n{added}\nISETP.NE.AND P0, PT, R2, RZ, PT\n@P0 BRA L0\nEXIT")
    graph = flow_graph(blocks)
    assert step(graph, blocks, natural_loops(graph)[0]) == times


@pytest.mark.parametrize(
    ("compared", "times"),
    [
        ("ISETP.NE.AND P0, PT, R2, RZ, PT", 4),
        ("ISETP.NE.AND P1, PT, R2, RZ, PT", 1),  # not for the jump back
        ("ISETP.GE.AND P0, PT, R2, RZ, PT", 1),
        ("ISETP.NE.AND P0, PT, R2, R3, PT", 1),
    ],
)
def test_a_counter_may_be_compared_before_the_last_block(code, compared, times):
    blocks = code(f"L0:\nVIADD R2, R2, 0xfffffffc\n{compared}\n@P2 BRA L1\nMOV R4, R5\nL1:\n@P0 BRA L0\nEXIT")
    graph = flow_graph(blocks)
    assert step(graph, blocks, natural_loops(graph)[0]) == times


SOURCE = """\
for each token
if (rare) flush
for (k)
always
other
"""
# The conditional blocks of a token loop: FADD and DADD each if a predicate says so, then MUFU if one of FADD's does.
CONDITIONAL = """
MOV R1, R2 | 1
L0:
IADD3 R1, R1, 0x1, RZ | 1
@P0 BRA L1 | 1
FADD R1, R1, R1 | {fadd}
FMUL R1, R1, R1 | {fadd}
@P1 BRA L2 | 4
MUFU.EX2 R1, R1 | 5
L2:
BSYNC B0 | 2
L1:
SHFL.BFLY PT, R1, R1, 0x1, 0x1f | 2
@P2 BRA L3 | 2
DADD R2, R2, R2 | {dadd}
L3:
LOP3.LUT R1, R1, R2, RZ | 2
@P3 BRA L0 | 1
EXIT
"""


def test_conditional_blocks_have_the_share_of_their_source(code):
    rare = {"^work: if": 1 / 8}
    assert set(weights(body_of(code(CONDITIONAL.format(fadd=4, dadd=4), SOURCE), {}, rare)).values()) == {1}
    found = weights(body_of(code(CONDITIONAL.format(fadd=2, dadd=4), SOURCE), {}, rare))
    # What only that block leads to has its share, whatever its lines are; what all iterations execute is executed.
    assert found == {"IADD3": 1, "FADD": 1 / 8, "MUFU.EX2": 1 / 8, "BSYNC": 1 / 8, "SHFL.BFLY": 1, "DADD": 1, "LOP3.LUT": 1}
    found = weights(body_of(code(CONDITIONAL.format(fadd=4, dadd=2), SOURCE), {}, rare))
    assert [name for name, weight in found.items() if weight != 1] == ["DADD"]


def test_a_pattern_can_tell_the_line_before(code):
    found = weights(body_of(code(CONDITIONAL.format(fadd=4, dadd=5), SOURCE), {}, {"after always$": 0.0}))
    assert found["DADD"] == 0
    assert found["FADD"] == 1


def test_calls_of_the_compilers_subroutines_are_left_out(code):
    text = CONDITIONAL.format(fadd=4, dadd=4).replace("DADD R2, R2, R2", "CALL.REL.NOINC `($__internal_0_$__cuda_rcp)")
    assert weights(body_of(code(text, SOURCE), {}, {}))["CALL.REL.NOINC"] == 0


def test_slots_and_cycles_of_an_iteration(code):
    body = body_of(code(CONDITIONAL.format(fadd=2, dadd=4), SOURCE), {}, {"^work: if": 1 / 8})
    assert body.slots == 2 + 5 / 8 + 2 + 1 + 2
    assert body.cycles == {
        "alu": 2 + 2,
        "branch": 2 + (2 + 2) / 8 + 2 + 2,
        "fma": 2 / 8,
        "xu": 8 / 8,
        "lsu": 4,
        "fp64": 2,
    }


# A loop of four ranks at a time, a loop for the ranks that are left, and one of unknown length.
RANKS = """
MOV R1, R2 | 1
L0:
S2R R1, SR_TID.X | 1
L1:
SEL R1, R1, R2, P1 | 3
IADD3 R3, R3, 0x4, RZ | 3
ISETP.NE.AND P0, PT, R3, R4, PT | 3
@P0 BRA L1 | 3
@P4 BRA L4 | 1
L2:
FSEL R1, R1, R2, P1 | 3
IADD3 R3, R3, 0x1, RZ | 3
ISETP.NE.AND P0, PT, R3, R4, PT | 3
@P0 BRA L2 | 3
L4:
FMNMX R1, R1, R2, P1 | 5
@P0 BRA L4 | 5
@P3 BRA L0 | 1
EXIT
"""


@pytest.mark.parametrize(("ranks", "main", "rest"), [(8, 2, 0), (7, 1, 3), (3, 0, 3)])
def test_trips_of_inner_loops(code, ranks, main, rest):
    body = body_of(code(RANKS, SOURCE), {r"^work: for \(k": ranks}, {})
    found = weights(body)
    assert (found["SEL"], found["FSEL"], found["FMNMX"]) == (main, rest, 1)
    assert body.warnings == ["the loop at 0x1c0 has no trip count: work: other"]


def test_the_token_loop_is_the_largest_or_most_of_it(code):
    tiles = "S2R R1, SR_TID.X\nL9:\nMOV R1, R2\n" + RANKS.replace("EXIT", "@P5 BRA L9\nEXIT")
    blocks = code(tiles, SOURCE)
    loops = natural_loops(flow_graph(blocks))
    assert [loop.depth for loop in loops] == [1, 2, 3, 3, 3]
    assert token_loop(loops, blocks) == loops[1]
    assert token_loop(loops, blocks, 1) == loops[0]
    named = body_of(blocks, {}, {}, named="^work: other")
    assert set(weights(named)) == {"FMNMX"}


def test_a_kernel_without_a_loop_has_no_body(code):
    assert body_of(code("MOV R1, R2\nEXIT"), {}, {}) is None
