"""benchmarks/sass: pipes, occupancy, the prediction, and the table with its check."""

from pathlib import Path

import pytest
from sass import build, run, table
from sass.kernels import ROWS
from sass.machine import HERTZ, PROCESSORS, SCHEDULERS, cycles_of, predict, resident_warps

ROOT = Path(__file__).parents[2]


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
