"""benchmarks/sass: machine code becomes blocks with places in the source, of which every path waits for the stream."""

import pytest
from sass import waits
from sass.listing import flow_graph, functions
from sass.loops import natural_loops, step
from sass.sources import Place, places_of, short_name

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


def opcodes(block):
    return [i.opcode for i in block.instructions]


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
