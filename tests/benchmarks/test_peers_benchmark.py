"""Tests of benchmarks/peers and overhead.py on tiny shapes: the contenders, the reasons for missing ones, table and plot."""

import json

import pytest
import rounds
import torch
from memory import peak_bytes
from peers import harness
from peers.contenders import Contender, Ours, Problem, compiled
from peers.dense_peers import StMoe, Zeta
from peers.flat_peers import DeepSpeedDense, DeepSpeedSparse, Megatron
from peers.plain_torch import PlainTorch
from shapes import Shape

pytest.importorskip("st_moe_pytorch")
pytest.importorskip("rich")
import overhead
from peers import run as peers_run

FLAT = [DeepSpeedSparse, DeepSpeedDense, Megatron]
SHAPES = ["1,60,16,4,2", "2,40,16,8,3"]

pytestmark = pytest.mark.usefixtures("restarted")


@pytest.fixture
def bench(tmp_path):
    """Runs the tool on tiny shapes; returns its cells and its Markdown table."""

    def run(*arguments, names, shapes=SHAPES):
        files = ["--json", str(tmp_path / "cells.json"), "--markdown", str(tmp_path / "table.md")]
        always = ["--malloc", "default", "--rounds", "2", "--threads", "1", "--shapes", *shapes, "--peers", *names]
        peers_run.main([*always, *files, *arguments])
        cells = json.loads((tmp_path / "cells.json").read_text())["cells"]
        return cells, (tmp_path / "table.md").read_text()

    return run


def load(peer):
    """Imports the peer's package; skips the test if it is not installed."""
    try:
        peer.load()
    except Exception as error:
        pytest.skip(f"{peer.name}: {error}")


def words(cells, **where):
    """Returns the words in the matching cells; a figure counts as ""."""
    return {c["word"] for c in cells if all(c[key] == value for key, value in where.items())}


def test_table_has_every_metric_of_every_contender(bench, capsys):
    cells, markdown = bench(names=[StMoe.name, PlainTorch.name])
    for dtype in ("float32", "bfloat16"):
        for metric in harness.METRICS:
            assert words(cells, contender=Ours.name, dtype=dtype, metric=metric) == {""}
    for metric in set(harness.METRICS) - {harness.DENSE}:
        assert words(cells, contender=PlainTorch.name, metric=metric) == {""}
    assert words(cells, contender=StMoe.name, dtype="float32") == {""}
    assert words(cells, contender=StMoe.name, dtype="bfloat16", metric=harness.GATE) == {""}
    assert words(cells, contender=StMoe.name, dtype="bfloat16", metric=harness.FULL) == {rounds.FAILS}
    assert all(c["values"] and min(c["values"]) > 0 for c in cells if not c["word"])

    printed = capsys.readouterr().out
    assert "dtype" in printed.split(f"{StMoe.name} fails: ")[1].splitlines()[0]  # the reason, once
    assert printed.count(f"{StMoe.name} fails: ") == 1
    rows = [line.split("|")[1].strip() for line in markdown.splitlines() if line.startswith("| ")]
    names = [Ours.name, StMoe.name, PlainTorch.name, peers_run.Products.name, peers_run.Zeros.name]
    assert [row for row in rows if row in names] == names * 4
    assert sum(row.startswith("**b=") for row in rows) == 4


def test_missing_peers_are_named(bench, capsys, monkeypatch):
    def missing():
        raise ModuleNotFoundError("No module named 'it'")

    monkeypatch.setattr(Megatron, "load", missing)
    cells, markdown = bench("--metrics", harness.GATE, "--dtypes", "float32", names=[Megatron.name])
    assert f"{Megatron.name} is left out (ModuleNotFoundError: No module named 'it')" in capsys.readouterr().out
    assert {c["contender"] for c in cells} == {Ours.name, peers_run.Products.name}
    assert Megatron.name not in markdown


def test_one_that_computes_something_else_is_caught(bench, capsys, monkeypatch):
    monkeypatch.setattr("peers.plain_torch.THRESHOLD", 0.9)
    cells, _ = bench("--metrics", harness.FULL, "--dtypes", "float32", "bfloat16", names=[PlainTorch.name])
    assert words(cells, contender=PlainTorch.name) == {rounds.DIFFERS}
    assert f"{PlainTorch.name} differs: " in capsys.readouterr().out


@pytest.mark.parametrize("peer", FLAT, ids=lambda peer: peer.name)
def test_one_of_other_semantics_that_computes_something_else_is_caught(peer, monkeypatch):
    load(peer)
    problem = Problem.make(Shape(2, 70, 8, 5, 3), torch.float32)
    assert harness.difference(peer(problem)) is None
    full = peer.full

    def one_expert_in_place_of_another(self, gain=None):
        return full(self, None if gain is None else gain.flip(0))

    monkeypatch.setattr(peer, "full", one_expert_in_place_of_another)
    assert harness.difference(peer(problem))


@pytest.mark.parametrize("peer", FLAT, ids=lambda peer: peer.name)
def test_peers_without_groups_have_the_same_number_of_slots(peer):
    load(peer)
    problem = Problem.make(Shape(3, 70, 8, 5, 2), torch.float32)
    with torch.no_grad():
        problem.x.abs_()
        problem.weight.zero_()[:2] = 1  # all tokens choose the same two experts
    contender = peer(problem)
    with torch.no_grad():
        weight = contender.gate()[0]
    assert (weight != 0).sum() == 2 * 3 * problem.capacity


@pytest.mark.parametrize("peer", FLAT, ids=lambda peer: peer.name)
def test_peers_without_groups_in_the_table(peer, bench):
    load(peer)
    cells, _ = bench(names=[peer.name])
    assert words(cells, contender=peer.name) == {""}
    assert peer.dense is None or any(c["metric"] == harness.DENSE for c in cells if c["contender"] == peer.name)


def test_zeta_differs_for_three_and_more(bench):
    load(Zeta)
    cells, _ = bench("--metrics", harness.FULL, "--dtypes", "float32", names=[Zeta.name])
    assert [c["word"] for c in cells if c["contender"] == Zeta.name] == ["", rounds.DIFFERS]


@pytest.mark.parametrize("shape", [Shape(1, 50, 8, 4, 2), Shape(3, 40, 8, 6, 4), Shape(2, 30, 8, 40, 3), Shape(1, 5, 8, 3, 3)])
@pytest.mark.parametrize("policy", ["random", "all"])
def test_plain_torch_has_our_numbers_and_gradients(shape, policy):
    problem = Problem.make(shape, torch.float32, policy=policy)
    results = []
    for contender in (Ours(problem), PlainTorch(problem)):
        outputs = rounds.one_seed(contender.full)
        grads = [torch.ones_like(t) if t.dim() == 0 else torch.linspace(-1, 1, t.numel()).view_as(t) for t in outputs]
        results.append((*outputs, *torch.autograd.grad(outputs, (problem.x, problem.weight), grads)))
        results[-1] += tuple(rounds.one_seed(contender.gate))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_compiled(bench):
    name = compiled(PlainTorch).name
    assert name in {peer.name for peer in peers_run.PEERS}
    cells, _ = bench("--metrics", harness.FULL, "--dtypes", "float32", names=[name], shapes=SHAPES[:1])
    assert words(cells, contender=name) == {""}


def test_too_large_dense_tensors_are_not_made(bench):
    cells, _ = bench("--gibibytes", "1e-5", "--metrics", harness.GATE, names=[StMoe.name, PlainTorch.name])
    assert words(cells, contender=StMoe.name) == {rounds.TOO_LARGE}
    assert words(cells, contender=PlainTorch.name) == {""}


@pytest.mark.parametrize("peer", [StMoe, DeepSpeedDense], ids=lambda peer: peer.name)
def test_estimate_of_dense_memory(peer):
    load(peer)
    problem = Problem.make(Shape(1, 512, 8, 8, 2), torch.float32)
    held = peak_bytes(harness.step_of(peer(problem), harness.FULL))
    assert 0.5 * peer.dense_tensors < held / problem.dense_bytes < 1.1 * peer.dense_tensors


def test_slow_calls_are_not_repeated(bench):
    for seconds, samples in (("0", 1), ("60", 2)):
        cells, _ = bench("--seconds", seconds, "--metrics", harness.FULL, "--dtypes", "float32", names=[PlainTorch.name])
        assert {len(c["values"]) for c in cells} == {samples}


@pytest.mark.parametrize("kept", [False, True])
def test_each_contender_has_its_own_freed_memory_unless_memory_is_kept(kept, monkeypatch):
    for name, value in rounds.KEEP.items():
        monkeypatch.setenv(name, value) if kept else monkeypatch.delenv(name, raising=False)
    calls = []
    rounds.interleave({name: lambda name=name: calls.append(name) for name in "ab"}, 2)
    warm_up = [*"aaa", *"bbb"]
    assert calls == warm_up + ([*"baab"] if kept else [*"bbaaaabb"])


def test_growth(bench, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "growth.png"
    arguments = ["--growth", str(picture), "--tokens", "32", "64", "128", "--gibibytes", "0.001"]
    cells, markdown = bench(*arguments, names=[StMoe.name, PlainTorch.name])
    assert picture.read_bytes().startswith(b"\x89PNG")
    tokens = {c["contender"]: c["shape"][1] for c in cells if c["values"]}  # the last value of each contender is its largest
    assert tokens[Ours.name] == 128 > tokens[StMoe.name]
    assert {c["metric"] for c in cells} == {harness.FULL, harness.MEMORY}
    assert f"| {PlainTorch.name} |" in markdown
    assert f"{StMoe.name} too large" in capsys.readouterr().out


def test_every_contender_says_what_it_is():
    everyone = (Ours, *peers_run.PEERS, peers_run.Products, peers_run.Zeros)
    assert len({kind.name for kind in everyone}) == len(everyone)
    assert all(kind.about for kind in everyone)
    assert all(issubclass(kind, Contender) and kind.install for kind in (StMoe, Zeta, *FLAT))


def test_overhead_of_every_call_is_measured(capsys):
    overhead.main(["--seconds", "0.001", "--tokens", "4"])
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [row[0].strip() for row in rows] == [*(name for name, _, _ in overhead.calls()), "4 tokens"]
    assert all(float(figure) > 0 for row in rows for figure in row[1:])
