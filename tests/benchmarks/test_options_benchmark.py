"""Tests of benchmarks/options.py: its table on a small shape, and that it compares results before it times them."""

import json

import options
import pytest
import torch
from shapes import Shape

pytestmark = pytest.mark.usefixtures("restarted")


def test_the_table(capsys, tmp_path):
    paths = [f"--json={tmp_path / 'cells.json'}", f"--markdown={tmp_path / 'table.md'}"]
    options.main(["--tokens=40", "--experts=16", "--top-n=3", "--rounds=2", "--threads=1", "--malloc=default", *paths])
    table = (tmp_path / "table.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    calls = [row[0] for row in rows]
    assert [row[3] for row in rows if row[0].endswith("default") or row[0].startswith("topn_gating")] == ["1.00"] * 4
    assert {"transformers: forward + backward", "gate: statistics", "assign: priority by weight"} < set(calls)
    cells = json.loads((tmp_path / "cells.json").read_text())["cells"]
    assert [cell["call"] for cell in cells] == calls
    assert all(len(cell["ms"]) == 2 for cell in cells)
    assert "40 tokens, 16 experts, top 3" in capsys.readouterr().out


def test_routers_that_differ_are_not_timed(monkeypatch):
    given = options.deepseek_v3

    def other_scale(shape, bias):
        router = given(shape, bias)
        return lambda logits: (1.01 * router(logits)[0], router(logits)[1])

    monkeypatch.setattr(options, "deepseek_v3", other_scale)
    with pytest.raises(AssertionError, match="close"):
        options.beside_transformers(Shape(1, 40, 8, 16, 3), torch.float32)
