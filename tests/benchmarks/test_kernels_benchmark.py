"""Tests of benchmarks/kernels.py and gpu_check.sh on the CPU: byte counts, the table, crashes, hangs and time limits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import clock
import kernels
import operators
import pytest
import torch
from operators import COMPARISONS, EAGER, EINSUMS, PRODUCTS, ROUTE, TOPK, TRAFFIC, Problem
from shapes import Shape

import topn_gating
from topn_gating.registry import OPERATORS

ROOT = Path(__file__).parents[2]
TINY = ["2,40,8,4,2", "1,9,3,2,1"]
# Source of a child process that fails when it measures `dense`, and measures the other lines as usual.
FAULTY_CHILD = """
import os, sys, time
sys.path.insert(0, {benchmarks!r})
import kernels
measure = kernels.measure
def faulty(problem, name, rounds):
    if name == "dense":
        {fault}
    return measure(problem, name, rounds)
kernels.measure = faulty
sys.exit(kernels.main())
"""


@pytest.fixture
def environment(monkeypatch):
    """Makes child processes import the package that is tested."""
    monkeypatch.setenv("PYTHONPATH", str(Path(topn_gating.__file__).parents[1]))
    monkeypatch.setattr(clock, "SECONDS", 0)
    return os.environ


def schema_tensors(name):
    schema = operators.operator(name)._schema
    return [a.name for a in (*schema.arguments, *schema.returns) if "Tensor" in str(a.type)]


def test_traffic_is_told_of_each_operator_by_names_of_its_schema():
    assert set(TRAFFIC) == {name + suffix for name in OPERATORS for suffix in ("", "_backward")}
    for name, traffic in TRAFFIC.items():
        told = " ".join(traffic).split()
        assert len(set(told)) == len(told)
        assert set(told) <= set(schema_tensors(name))


@pytest.mark.parametrize("name", TRAFFIC)
def test_arguments_are_those_of_the_schema(name):
    problem = Problem(Shape(2, 40, 8, 4, 2), torch.float32, "cpu")
    assert set(problem._arguments(name)) == {argument.name for argument in operators.operator(name)._schema.arguments}


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)], ids=["float32", "bfloat16"])
def test_bytes(dtype, size):
    b, n, d, e, k = shape = Shape(2, 30, 5, 6, 3)
    problem = Problem(shape, dtype, "cpu")
    pairs, tokens = (problem.slot >= 0).sum().item(), (problem.slot >= 0).any(-1).sum().item()
    slots, all_pairs = b * e * problem.capacity, b * n * k
    assert 0 < pairs < all_pairs
    expected = {
        "gate": b * n * e * size + all_pairs * 8 + b * e * 8 + 8,
        "gate_backward": 2 * b * n * e * size + all_pairs * 8 + b * e * 4 + 8,
        "assign": all_pairs * 20 + k * 4 + slots * 4 + b * e * 4,
        "assign_backward": all_pairs * 12,
        "dense": all_pairs * 12 + pairs * 4 + 2 * b * n * e * problem.capacity * size,
        "dense_backward": all_pairs * 12 + pairs * 4 + 2 * pairs * 32,
        "dispatch": slots * (4 + d * size) + pairs * 8 + tokens * d * size,
        "dispatch_backward": all_pairs * 12 + b * n * d * size + pairs * (4 + d * size) + tokens * d * size,
        "combine": all_pairs * 8 + b * n * d * size + pairs * (8 + d * size),
        "combine_backward": slots * (4 + d * size) + all_pairs * 4 + pairs * (12 + d * size) + tokens * d * size,
        "linear": (b * n * (d + e) + e * d) * size,
        "linear_backward": (b * n * (2 * d + e) + 2 * e * d) * size,
        "grouped_linear": (2 * all_pairs * d + e * d * (d + 1)) * size + e * 4,
        "grouped_linear_backward": (3 * all_pairs * d + e * d * (2 * d + 1)) * size + e * 4,
    }
    assert set(expected) == set(TRAFFIC)
    for name, count in expected.items():
        arguments = problem.arguments(name)
        results = operators.results_of(name, operators.operator(name)(**arguments))
        assert TRAFFIC[name].bytes(arguments | results, problem.slot) == count, name


def test_bytes_of_the_dropless_layout():
    b, n, d, e, k = shape = Shape(2, 30, 5, 6, 3)
    problem, tokens, pairs = Problem(shape, torch.float32, "cpu", True), b * n, b * n * k
    expected = {
        "assign": pairs * 20 + e * 8,
        "assign_backward": pairs * 12,
        "dispatch": pairs * (12 + d * 4) + tokens * d * 4 + e * 4,
        "dispatch_backward": pairs * (16 + d * 4) + 2 * tokens * d * 4 + e * 4,
        "combine": pairs * (16 + d * 4) + tokens * d * 4 + e * 4,
        "combine_backward": pairs * (20 + 2 * d * 4) + tokens * d * 4 + e * 4,
    }
    assert list(expected) == operators.names("cpu", dropless=True)
    for name, count in expected.items():
        arguments = problem.arguments(name)
        results = operators.results_of(name, operators.operator(name)(**arguments))
        assert TRAFFIC[name].bytes(arguments | results, problem.slot) == count, name


@pytest.mark.parametrize("name", [*TRAFFIC, ROUTE, TOPK, *EINSUMS, PRODUCTS, EAGER])
def test_every_line_is_measured(name, environment):
    figure = kernels.measure(Problem(kernels.SMALL[0], torch.float32, "cpu"), name, 1)
    assert figure.seconds > 0
    assert (figure.copy is not None) == (name in TRAFFIC)


def test_what_does_not_fit_is_said(monkeypatch):
    monkeypatch.setattr(clock, "free_bytes", lambda device: 10_000)
    problem = Problem(Shape(2, 40, 8, 4, 2), torch.float32, "cpu")
    names = [*TRAFFIC, PRODUCTS, *EINSUMS]
    too_large = {name for name in names if kernels.measure(problem, name, 1) == kernels.Figure(why=kernels.TOO_LARGE)}
    grouped = {"grouped_linear", "grouped_linear_backward", PRODUCTS}
    assert too_large == {"dense", "dense_backward", "dispatch_backward", "combine_backward", *grouped, *EINSUMS}


def test_a_comparison_may_run_out_of_memory(monkeypatch):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(operators.reference, "route", out_of_memory)
    problem = Problem(kernels.SMALL[0], torch.float32, "cpu")
    assert kernels.measure(problem, EAGER, 1) == kernels.Figure(why=kernels.TOO_LARGE)


def test_launches_are_listed():
    x = torch.ones(1000)
    found = clock.launches(lambda: x + x, "cpu")
    assert found.keys() == {"aten::add"}
    assert found["aten::add"] > 0


def rows(text, name):
    """Returns the cells of the rows of that name, one row for each table."""
    lines = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line[1:]] for line in lines if line[0].strip() == name]


def test_tables_hold_every_line_and_leave_out_comparisons_when_time_is_up(environment, tmp_path, capsys):
    arguments = ["--device", "cpu", "--shapes", *TINY, "--rounds", "1", "--budget", "0", "--out", str(tmp_path)]
    assert kernels.main(arguments) == 0
    printed, written = capsys.readouterr().out, (tmp_path / "RESULTS.md").read_text()
    for text in (printed, written):
        for name in [*TRAFFIC, ROUTE, TOPK]:
            assert len(rows(text, name)) == 2
            assert all("µs" in cell for row in rows(text, name) for cell in row)
        assert not any(rows(text, name) for name in COMPARISONS)
    found = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert len(found) == 2 * 2 * (len(TRAFFIC) + 2)
    assert all(line["seconds"] > 0 for line in found)


@pytest.mark.parametrize(
    ("fault", "why"),
    [("os.abort()", "crashed: signal 6"), ("sys.exit(3)", "failed: see the log"), ("time.sleep(60)", "took longer than 3 s")],
    ids=["crash", "error", "hang"],
)
def test_a_child_that_ends_early_costs_one_line(fault, why, environment, tmp_path, monkeypatch, capsys):
    script = tmp_path / "child.py"
    script.write_text(FAULTY_CHILD.format(benchmarks=str(ROOT / "benchmarks"), fault=fault))
    monkeypatch.setattr(kernels, "CHILD", [sys.executable, str(script)])
    names = ["gate", "dense", "combine"]
    options = ["--device", "cpu", "--shapes", TINY[0], "--dtypes", "float32", "--rounds", "1", "--seconds", "3"]
    assert kernels.main([*options, "--names", *names]) == 1
    out = capsys.readouterr().out
    assert rows(out, "dense") == [[why]]
    assert "µs" in rows(out, "gate")[0][0]
    assert "µs" in rows(out, "combine")[0][0]


def test_two_packages_take_turns(environment, capsys):
    folders = [".", environment["PYTHONPATH"]]
    options = ["--device", "cpu", "--shapes", TINY[0], "--dtypes", "float32", "--rounds", "1", "--packages", *folders]
    assert kernels.main([*options, "--turns", "2", "--names", "gate"]) == 0
    out = capsys.readouterr().out
    measured = [line for line in out.splitlines() if " gate" in line and line.startswith(TINY[0])]
    assert [f" in {folders[1]}" in line for line in measured] == [False, True, False, True]
    old, new = rows(out, "gate")[0][0].split(" → ")
    assert "µs" in old
    assert new.endswith(")")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert kernels.main(["--device", "cuda"]) == 1
    assert capsys.readouterr().err == "--device cuda needs a GPU, and torch sees none.\n"


@pytest.fixture
def gpu_check(environment, tmp_path):
    """Runs the script on the CPU; returns its exit code, its output, and the folder that it wrote."""

    def run(*steps, **settings):
        found = {"DEVICE": "cpu", "PYTHON": sys.executable, "OUT": str(tmp_path / "out")} | settings
        command = ["bash", str(ROOT / "benchmarks" / "gpu_check.sh"), *steps]
        done = subprocess.run(command, env=environment | found, capture_output=True, text=True, cwd=tmp_path)
        return done.returncode, done.stdout + done.stderr, tmp_path / "out"

    return run


def test_gpu_check_writes_logs_and_results(gpu_check):
    table = f"--shapes {TINY[0]} --rounds 1 --names gate --dtypes float32"
    code, said, out = gpu_check("tests", "table", TESTS="tests/test_build.py -k test_build_info -p no:xdist", TABLE=table)
    assert code == 1  # pytest without xdist does not know the option -n
    assert "== tests: FAILED with 4" in said
    assert "== table: ended well" in said
    assert said.splitlines()[-1] == "== failed: tests"
    assert {path.name for path in out.iterdir()} == {"tests.log", "table.log", "RESULTS.md", "lines.jsonl"}
    assert "µs" in rows(said, "gate")[0][0]
    assert "µs" in rows((out / "RESULTS.md").read_text(), "gate")[0][0]


def test_gpu_check_keeps_what_was_measured_when_its_limit_strikes(gpu_check):
    code, said, out = gpu_check("table", LIMIT="9", TABLE="--shapes 1,60,8,4,2 8,2048,256,64,4 --rounds 1000000")
    assert code == 1
    assert "interrupted: the tables hold what was measured" in said
    assert "at its limit" in said
    assert "µs" in rows((out / "RESULTS.md").read_text(), "gate")[0][0]
    assert "µs" in rows(said, "gate")[0][0]


@pytest.mark.parametrize("steps", [[], ["no_such_step"]])
def test_gpu_check_without_a_step_says_what_there_is(gpu_check, steps):
    code, said, _ = gpu_check(*steps)
    assert code == 2
    assert "no_such_step" in said if steps else "bash benchmarks/gpu_check.sh 1" in said
