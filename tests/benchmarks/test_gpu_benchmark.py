"""benchmarks/gpu.py without a GPU: its byte counts, and its table on tiny shapes."""

import importlib.util
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("benchmarks_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_traffic_is_told_of_each_operator_by_names_of_its_schema(gpu):
    assert set(gpu.TRAFFIC) == {name + suffix for name in gpu.topn_gating.ops.FUNCTIONS for suffix in ("", "_backward")}
    for name, traffic in gpu.TRAFFIC.items():
        schema = gpu.operator(name)._schema
        known = [a.name for a in (*schema.arguments, *schema.returns) if "Tensor" in str(a.type)]
        told = " ".join(traffic).split()
        assert len(set(told)) == len(told)
        assert set(told) <= set(known)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)], ids=["float32", "bfloat16"])
def test_bytes(gpu, dtype, size):
    b, n, d, e, k = shape = gpu.Shape(2, 30, 5, 6, 3)
    problem = gpu.Problem(shape, dtype, "cpu")
    pairs, tokens = (problem.slot >= 0).sum().item(), (problem.slot >= 0).any(-1).sum().item()
    slots, all_pairs = b * e * problem.capacity, b * n * k
    assert 0 < pairs < all_pairs
    expected = {
        "gate": b * n * e * size + all_pairs * 8 + b * e * 8 + 8,
        "gate_backward": 2 * b * n * e * size + all_pairs * 8 + b * e * 4 + 8,
        "assign": all_pairs * 20 + k * 4 + slots * 4 + b * e * 4,
        "assign_backward": all_pairs * 12,
        "dense": all_pairs * 12 + 2 * b * n * e * problem.capacity * size,
        "dense_backward": all_pairs * 12 + 2 * pairs * size,
        "dispatch": slots * (4 + d * size) + pairs * 8 + tokens * d * size,
        "dispatch_backward": all_pairs * 12 + b * n * d * size + pairs * (4 + d * size) + tokens * d * size,
        "combine": all_pairs * 8 + b * n * d * size + pairs * (8 + d * size),
        "combine_backward": slots * (4 + d * size) + all_pairs * 4 + pairs * (12 + d * size) + tokens * d * size,
    }
    for name, count in expected.items():
        arguments = problem.arguments(name)
        assert gpu.bytes_of(name, arguments, gpu.operator(name)(**arguments), problem.slot) == count, name


def test_table_of_tiny_shapes(gpu, tmp_path, capsys):
    out = tmp_path / "results.md"
    arguments = ["--device", "cpu", "--shapes", "2,40,8,4,2", "1,9,3,2,1", "--rounds", "2", "--budget", "0", "--out", str(out)]
    assert gpu.main(arguments) == 0
    printed, written = capsys.readouterr().out, out.read_text()
    for name in gpu.ROWS:
        assert sum(line.split("|")[2].strip() == name for line in written.splitlines() if "|" in line) == 2
        assert name in printed
    assert written.count(gpu.NOT_MEASURED) == 2 * 2 * 4  # the einsums and the reference, out of time


def test_what_does_not_fit_is_said_and_the_rest_is_measured(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "free_bytes", lambda device: 10_000)
    problem = gpu.Problem(gpu.Shape(2, 40, 8, 4, 2), torch.float32, "cpu")
    figures = {name: gpu.measure(problem, name, 1) for name in gpu.ROWS[:-1]}
    too_large = {name for name, figure in figures.items() if figure == gpu.Figure(why=gpu.TOO_LARGE)}
    assert too_large == {"dense", "dense_backward", "dispatch_backward", "combine_backward", *gpu.EINSUMS}
    assert all(figures[name].seconds > 0 for name in figures.keys() - too_large)


def test_a_comparison_may_run_out_of_memory(gpu, monkeypatch):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(gpu.reference, "route", out_of_memory)
    problem = gpu.Problem(gpu.SMALL[0], torch.float32, "cpu")
    assert gpu.measure(problem, gpu.EAGER, 1) == gpu.Figure(why=gpu.TOO_LARGE)


@pytest.mark.parametrize("name", ["einsum of dispatch", "einsum of combine", "reference route, eager"])
def test_what_stands_beside_runs(gpu, name):
    assert gpu.measure(gpu.Problem(gpu.SMALL[0], torch.float32, "cpu"), name, 1).seconds > 0


def test_every_operator_runs_for_the_sanitizers(gpu, capsys):
    assert gpu.main(["--device", "cpu", "--sanitize"]) == 0
    assert "of 10 operators" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(gpu, capsys):
    assert gpu.main([]) == 1
    assert capsys.readouterr().err == "This benchmark needs a GPU, and torch sees none.\n"
