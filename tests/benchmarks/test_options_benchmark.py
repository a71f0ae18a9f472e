"""Tests of benchmarks/options.py: its table on a small shape, and that it compares results before it times them."""

import json
import sys

import options
import pytest
import torch
from shapes import Shape

pytestmark = pytest.mark.usefixtures("restarted", "eager")


@pytest.fixture
def eager():
    """Compiles nothing: Megatron-core compiles a count of tokens."""
    with torch.compiler.set_stance("force_eager"):
        yield


def test_the_table(capsys, tmp_path):
    paths = [f"--json={tmp_path / 'cells.json'}", f"--markdown={tmp_path / 'table.md'}"]
    options.main(["--tokens=40", "--experts=32", "--top-n=8", "--rounds=2", "--threads=1", "--malloc=default", *paths])
    table = (tmp_path / "table.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    calls = [row[0] for row in rows]
    assert {row[3] for row in rows if row[0].endswith("default") or row[0].startswith("topn_gating")} == {"1.00"}
    assert {"transformers: forward + backward", "gate: statistics", "assign: priority by weight"} < set(calls)
    cells = json.loads((tmp_path / "cells.json").read_text())["cells"]
    assert [cell["call"] for cell in cells] == calls
    assert all(len(cell["ms"]) == 2 for cell in cells)
    assert "40 tokens, 32 experts, top 8" in capsys.readouterr().out


def test_routers_that_differ_are_not_timed(monkeypatch):
    given = options.deepseek_v3

    def other_scale(shape, bias):
        router = given(shape, bias)
        return lambda logits: (1.01 * router(logits)[0], router(logits)[1])

    monkeypatch.setattr(options, "deepseek_v3", other_scale)
    with pytest.raises(AssertionError, match="close"):
        options.beside_transformers(Shape(1, 40, 8, 16, 3), torch.float32)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of packages that miss a GPU
@pytest.mark.parametrize(("peer", "packages"), [("Megatron-core", ["megatron.core"]), ("torchtitan", ["torchtitan", "triton"])])
def test_classes_of_routers(capsys, peer, packages):
    for package in packages:
        pytest.importorskip(package)
    steps = options.beside_classes(Shape(1, 40, 8, 32, 8), torch.float32)
    for whose in (peer, f"topn_gating in {peer}"):
        for what in ("softmax", "DeepSeek-V3"):
            for passes in ("forward", "forward + backward"):
                steps[f"{whose}: {what}, {passes}"]()
    assert f"{peer} is left out" not in capsys.readouterr().out
    assert options.beside_classes(Shape(1, 40, 8, 32, 8), torch.bfloat16) == {}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_classes_that_are_missing_are_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchtitan.models.common.moe", None)
    steps = options.beside_classes(Shape(1, 40, 8, 32, 8), torch.float32)
    assert not any("torchtitan" in name for name in steps)
    assert "torchtitan is left out: " in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("factor", "why"), [(1.01, "close"), (-1, "40 of 40 tokens have other experts")])
def test_classes_of_routers_that_differ_are_not_timed(monkeypatch, factor, why):
    given = options.of_megatron

    def other_weights(shape, bias):
        ours, theirs = given(shape, bias)
        return ours, lambda logits: (factor * theirs(logits)[0], theirs(logits)[1])

    monkeypatch.setattr(options, "of_megatron", other_weights)
    with pytest.raises(AssertionError, match=why):
        options.beside_classes(Shape(1, 40, 8, 32, 8), torch.float32)
