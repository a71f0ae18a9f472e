"""Tests of benchmarks/sass on machine code that is written by hand: blocks, loops, weights, pipes, the table and its check."""

import re
from pathlib import Path

import pytest
from sass import build, run, sources, table, waits
from sass.kernels import ROWS
from sass.listing import flow_graph, functions
from sass.loops import natural_loops, step
from sass.machine import HERTZ, PROCESSORS, SCHEDULERS, cycles_of, predict, resident_warps
from sass.sources import Place, places_of, short_name
from sass.weights import body_of, token_loop

ROOT = Path(__file__).parents[2]
PTX = """\
.version 9.0
.visible .entry _Z6kernelPf(
)
{
	.loc	1 9 3
	ld.param.u64 %rd1;
	.loc	1 3 5, function_name $L__info_string0, inlined_at 1 9 3
	add.f32 %f1;
	.loc	2 7 1, function_name $L__info_string1, inlined_at 1 3 5
	mul.f32 %f2;
	mul.f32 %f3;
	.loc	1 10 3
	ret;
}
	.file	1 "/src/kernel.cu"
	.file	2 "/src/math.cuh"
	.section	.debug_str
	{
$L__info_string0:
.b8 95,90,53,115,104
.b8 97,114,101,102,0
$L__info_string1:
.b8 95,90,78,51,111,110,101,52,104,97,108,102,73,105,69,69,84,95,83,49,95,0
	}
"""
# A token loop with a loop in it, as nvdisasm prints it.
LISTING = """\
	.section	.text._Z6kernelPf,"ax",@progbits
.text._Z6kernelPf:
        .type           _Z6kernelPf,@function
	//## File ".nv_debug_ptx_txt", line 6
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
	//## File ".nv_debug_ptx_txt", line 11
        /*0010*/                   MOV R2, 0x8 ;
.L_x_1:
        /*0020*/                   FADD R1, R1, R1 ;
        /*0030*/                   VIADD R2, R2, 0xfffffffe ;
        /*0040*/                   ISETP.NE.AND P0, PT, R2, RZ, PT ;
        /*0050*/               @P0 BRA `(.L_x_1) ;
	//## File ".nv_debug_ptx_txt", line 8
        /*0060*/                   IADD3 R0, P1, R0, 0x100, RZ ;
        /*0070*/                   BRA.U UP0, `(.L_x_0) ;
        /*0080*/                   EXIT ;
.L_x_2:
        /*0090*/                   BRA `(.L_x_2);
"""


@pytest.fixture
def code(tmp_path):
    """Returns a function that turns instructions into blocks: ``label:`` starts one, and ``| 3`` tells the source line."""

    def blocks(text, source=""):
        file = tmp_path / "kernel.cu"
        file.write_text(source)
        sources.lines_of.cache_clear()
        sources.described.cache_clear()
        lines = [".text.kernel:"]
        for line in text.strip().splitlines():
            instruction, _, at = (part.strip() for part in line.partition("|"))
            if at:
                lines.append(f'	//## File ".nv_debug_ptx_txt", line {at}')
            instruction = re.sub(r"^L(\d):", r".L_x_\1:", instruction)
            instruction = re.sub(r"\bL(\d)", r"`(.L_x_\1)", instruction)
            lines.append(instruction if instruction.startswith(".") else f"  /*{16 * len(lines):04x}*/  {instruction} ;")
        places = {n: (Place("work", str(file), n),) for n in range(1, 20)}
        return functions(lines, places)["kernel"]

    return blocks


def opcodes(block):
    return [i.opcode for i in block.instructions]


def weights(body):
    """Returns the weights of a body's blocks by the name of their first instruction's opcode."""
    return {w.block.instructions[0].opcode: w.weight for w in body.blocks}


def test_places_are_the_lines_of_all_inlined_calls():
    found = places_of(PTX.splitlines())
    kernel, shared = Place("kernel", "/src/kernel.cu", 9), Place("share", "/src/kernel.cu", 3)
    assert found[5] == (kernel,)
    assert found[7] == (shared, kernel)
    assert found[9] == (Place("half", "/src/math.cuh", 7), shared, kernel)
    assert found[12] == (Place("kernel", "/src/kernel.cu", 10),)


@pytest.mark.parametrize(
    ("demangled", "name"),
    [
        ("topn_gating::cuda::quotient(long, long)", "quotient"),
        ("int one::(anonymous namespace)::find<float, Row<int, 8> >(Row<int, 8>&) const", "find"),
        ("void a::Sums<Row<int>, true>::flush()", "flush"),
        ("a::rows<uint4>(Rows)::{lambda(long, long)#1}::operator()(long, long) const", "rows"),
        ("kernel", "kernel"),
    ],
)
def test_short_names(demangled, name):
    assert short_name(demangled) == name


def test_listing_becomes_blocks_with_places():
    blocks = functions(LISTING.splitlines(), places_of(PTX.splitlines()))["_Z6kernelPf"]
    assert [opcodes(block) for block in blocks] == [
        ["S2R"],
        ["MOV"],
        ["FADD", "VIADD", "ISETP.NE.AND", "BRA"],
        ["IADD3", "BRA.U"],
        ["EXIT"],
        ["BRA"],
    ]
    assert blocks[2].instructions[3].predicate == "@P0"
    assert [place.function for place in blocks[2].instructions[0].places] == ["half", "share", "kernel"]
    assert [place.function for place in blocks[3].instructions[0].places] == ["share", "kernel"]
    graph = flow_graph(blocks)
    assert set(graph.edges) == {(0, 1), (1, 2), (2, 2), (2, 3), (3, 1), (3, 4)}  # block 5 cannot be reached
    outer, inner = natural_loops(graph)
    assert (outer.header, outer.blocks, outer.depth) == (1, {1, 2, 3}, 1)
    assert (inner.header, inner.blocks, inner.depth) == (2, {2}, 2)
    assert step(graph, blocks, inner) == 2
    assert step(graph, blocks, outer) == 1  # 256 is the step of the source


@pytest.mark.parametrize(
    ("branch", "edges"),
    [
        ("BRA L0", {(0, 2)}),
        ("@!P3 BRA L0", {(0, 1), (0, 2), (1, 2)}),
        ("BRA P4, L0", {(0, 1), (0, 2), (1, 2)}),
        ("BRA.U !UP0, L0", {(0, 1), (0, 2), (1, 2)}),
        ("BRA.DIV UR4, L0", {(0, 1), (1, 2)}),  # a warp of which all threads are there does not take it
        ("@P0 EXIT", {(0, 1), (1, 2)}),
        ("EXIT", set()),
        ("@P0 CALL.REL.NOINC L0", {(0, 1), (0, 2), (1, 2)}),
        ("CALL.REL.NOINC `($__internal_0_$__cuda_rcp)", {(0, 1), (1, 2)}),
    ],
)
def test_edges(code, branch, edges):
    assert set(flow_graph(code(f"{branch}\nL1:\nMOV R1, R2\nL0:\nEXIT")).edges) == edges


def test_targets_of_a_table_of_branches(code):
    blocks = code('BRX R2 -0x10 (*"BRANCH_TARGETS .L0,.L1"*)\nL0:\nEXIT\nL1:\nEXIT')
    assert set(flow_graph(blocks).edges) == {(0, 1), (0, 2)}


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


@pytest.mark.parametrize(
    ("before", "found"),
    [
        ("STS [R1], R2\nACQBULK", []),
        ("LDG.E R2, desc[UR4][R2.64]\nACQBULK", ["LDG.E"]),
        ("@P0 ACQBULK", ["STG.E", "EXIT"]),
        ("@P0 EXIT\nACQBULK", ["EXIT"]),
        ("@P0 BRA L1\nACQBULK\nL1:", ["STG.E", "EXIT"]),
        ("@P0 BRA L1\nACQBULK\nBRA L2\nL1:\nACQBULK\nL2:", []),
    ],
    ids=["shared memory", "an access", "a predicate", "an end", "one path", "both paths"],
)
def test_every_path_waits_before_it_accesses_memory(code, before, found):
    blocks = code(f"MOV R1, R2\n{before}\nSTG.E desc[UR4][R2.64], R1\nEXIT")
    assert [place.split()[1] for place in waits.early(blocks)] == found


def test_a_kernel_without_a_loop_has_no_body(code):
    assert body_of(code("MOV R1, R2\nEXIT"), {}, {}) is None


@pytest.mark.parametrize(
    ("instruction", "cycles"),
    [
        ("FFMA R1, R2, R3, R4", {"fma": 1}),
        ("IMAD.MOV.U32 R1, RZ, RZ, R2", {"imad": 2, "fma": 1}),
        ("DSETP.GT.AND P0, PT, R2, R4, PT", {"fp64": 2}),
        ("VIMNMX R1, R2, R3, !PT", {"alu": 2}),
        ("MUFU.EX2 R1, R2", {"xu": 8}),
        ("F2F.F64.F32 R2, R4", {"xu": 8}),
        ("SHFL.IDX PT, R1, R2, R3, 0x1f", {"lsu": 4}),
        ("REDUX.MAX.S32 UR4, R2", {"lsu": 8}),
        ("LDG.E.128 R4, desc[UR4][R2.64]", {"lsu": 16}),
        ("STS.64 [R10], R2", {"lsu": 8}),
        ("UIADD3 UR4, UR4, 0x1, URZ", {"uniform": 2}),
        ("BSYNC B0", {"branch": 2}),
    ],
)
def test_pipes(code, instruction, cycles):
    assert cycles_of(code(instruction)[0].instructions[0]) == cycles


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "warps"),
    [
        (32, 256, 0, 64),
        (128, 256, 0, 16),
        (129, 256, 0, 8),
        (32, 1024, 100 << 10, 64),
        (32, 256, 120 << 10, 8),
        (16, 32, 0, 32),
    ],
)
def test_resident_warps(registers, threads, shared, warps):
    assert resident_warps(registers, threads, shared) == warps


def test_the_slowest_bounds_a_kernel():
    second = PROCESSORS * SCHEDULERS * HERTZ  # cycles of all schedulers
    assert predict(850, {"alu": 400}, 0) == (pytest.approx(1000 / second), "slots", 0)
    assert predict(100, {"alu": 400, "xu": 500}, 0)[:2] == (pytest.approx(500 / second), "xu")
    assert predict(0, {}, 3000) == (pytest.approx(1e-9), "memory", 1)
    assert predict(0, {"alu": 2e-9 * second}, 3000).share == pytest.approx(0.5)


PAGE = f"""# Title

| kernel | of another table |
| --- | --- |

{table.SECTION}

text

| {" | ".join(table.HEAD)} |
| {" | ".join("---" for _ in table.HEAD)} |
| a, e=64 | 100 | 50 | alu 50 | 32 | 0 | 64 of 64 | 10 | slots | 20% |
| b | 100 | 50 | alu 50 | 32 | 0 | 64 of 64 | 10 | slots | 20% |

## Another section
"""


def cells(name, slots=100, alu=50, spilled=0):
    return [name, str(slots), str(alu), "alu 50", "32", str(spilled), "64 of 64", "10", "slots", "20%"]


def test_the_check_tells_what_grew_or_spills():
    committed = table.read(PAGE)
    assert table.problems(committed, [cells("a, e=64", 110, 10), cells("b")]) == []
    assert table.problems(committed, [cells("a, e=64", 111), cells("b", alu=56, spilled=8)]) == [
        "a, e=64: slots grew from 100 to 111",
        "b: spills 8 bytes",
        "b: ALU cycles grew from 50 to 56",
    ]
    assert table.problems(committed, [cells("b"), cells("c")]) == ["a, e=64: in the table alone", "c: not in the table"]


def test_the_table_is_written_in_its_place():
    page = table.written(PAGE, [cells("c", 123)])
    assert table.read(page)["c"]["slots"] == "123"
    assert list(table.read(page)) == ["c"]
    assert page.startswith(PAGE[: PAGE.index("| kernel | slots")])
    assert page.endswith("\n\n## Another section\n")
    with pytest.raises(SystemExit, match="has no table"):
        table.read(f"{table.SECTION}\n\ntext\n")
    with pytest.raises(SystemExit, match="has no section"):
        table.read("text\n")


def test_docs_have_a_row_for_each_kernel():
    assert list(table.read((ROOT / table.PAGE).read_text())) == [row.name for row in ROWS]
    assert all((ROOT / row.unit).exists() for row in ROWS)


def test_flags_are_those_of_setup():
    assert {"-O3", "-std=c++17"} <= set(build.nvcc_flags(ROOT))


def test_without_a_compiler_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(run, "find_nvcc", lambda: None)
    assert run.main(["--check"]) == 0
    assert "no nvcc" in capsys.readouterr().out


def test_a_kernel_without_a_row():
    options = run.parse(
        ["--unit", "a.cu", "--kernel", "^copy<", "--tokens", "4", "--trips", "^a: for=8", "^b=c:=2", "--rare", "^d:=0.125"]
    )
    (row,) = run.rows_of(options)
    assert (row.unit, row.kernel, row.tokens) == ("a.cu", "^copy<", 4)
    assert (row.trips, row.rare) == ({"^a: for": 8, "^b=c:": 2}, {"^d:": 0.125})
    with pytest.raises(SystemExit):
        run.parse(["--kernel", "^copy<"])
    with pytest.raises(SystemExit):
        run.parse(["--check", "--only", "gate"])
