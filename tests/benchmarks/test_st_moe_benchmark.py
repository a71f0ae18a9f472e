"""Tests of benchmarks/st_moe.py: its table on small cases, and that it compares results before it times them."""

import json

import pytest
import st_moe
import torch

pytestmark = pytest.mark.usefixtures("restarted")
CASES = [st_moe.Case("the demo's model", 2, 8, 32, 4, 1.5), st_moe.Case("layer", 2, 8, 32, 4, 4)]


def test_the_table(capsys, tmp_path):
    paths = [f"--json={tmp_path / 'cells.json'}", f"--markdown={tmp_path / 'table.md'}"]
    st_moe.main(["--rounds=2", "--threads=1", "--malloc=default", *paths], CASES)
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in (tmp_path / "table.md").read_text().splitlines()[2:]]
    assert [row[:5] for row in rows] == [["the demo's model", "2", "8", "32", "4"], ["layer", "2", "8", "32", "4"]]
    cells = json.loads((tmp_path / "cells.json").read_text())["cells"]
    assert all(len(cell[name]) == 2 for cell in cells for name in (st_moe.OURS, st_moe.THEIRS))
    assert "milliseconds of a training step" in capsys.readouterr().out


def test_layers_that_differ_are_not_timed(monkeypatch):
    make = st_moe.layer_of

    def other(library, case):
        layer = make(library, case)
        if library is not st_moe.st_moe:
            torch.nn.init.zeros_(layer.experts.experts[0].net[0].bias)
        return layer

    monkeypatch.setattr(st_moe, "layer_of", other)
    with pytest.raises(AssertionError, match="close"):
        st_moe.steps_of(CASES[1])
