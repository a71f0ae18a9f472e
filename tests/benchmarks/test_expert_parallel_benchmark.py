"""Tests of benchmarks/expert_parallel.py: its table for a small layer on two processes."""

import json

import expert_parallel
import pytest

pytestmark = pytest.mark.usefixtures("restarted")


def test_the_table(capsys, tmp_path):
    sizes = ["--ranks=2", "--tokens=64", "--dim=16", "--experts=4", "--rounds=2", "--threads=1", "--malloc=default"]
    layers = ["--layers", "topn_gating", "topn_gating, dropless", "st-moe-pytorch"]
    paths = [f"--json={tmp_path / 'cells.json'}", f"--markdown={tmp_path / 'table.md'}"]
    expert_parallel.main([*sizes, *layers, *paths])
    lines = (tmp_path / "table.md").read_text().splitlines()[2:]
    rows = {cells[1]: cells for cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)}
    assert list(rows) == ["topn_gating", "topn_gating, dropless", "st-moe-pytorch", expert_parallel.ALONE]
    assert rows[expert_parallel.ALONE][3] == "1.00×"
    # Slots for 1.25 times two choices of a token, there and back and for the gradients; half of them stay.
    assert rows["topn_gating"][5] == f"{4 * 1.25 * 2 * 16 * 4 // 2:,.0f}"
    assert rows["topn_gating"][6] == rows["topn_gating, dropless"][6] == "equal"
    # st-moe-pytorch's gradients are those of a rank's own experts alone.
    assert rows["st-moe-pytorch"][6].startswith("off by")
    cells = json.loads((tmp_path / "cells.json").read_text())["cells"]
    assert all(len(cell["ms"]) == 2 for cell in cells)
    assert "64 tokens, d 16, 4 experts" in capsys.readouterr().out
