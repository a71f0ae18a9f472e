"""examples/transformers: a run of a few steps, and what it says of runs that differ."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import topn_gating

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "transformers"


@pytest.fixture
def modules(monkeypatch):
    """Its modules, as the command finds them."""
    for name in ("transformers", "matplotlib", "rich", "tqdm"):
        pytest.importorskip(name)
    monkeypatch.syspath_prepend(FOLDER)
    names = ("training", "report", "command_line")
    yield [importlib.import_module(name) for name in names]
    for name in names:
        del sys.modules[name]


def test_command_runs_from_another_folder(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(topn_gating.__file__).parents[1])}
    command = [sys.executable, str(FOLDER), "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "--seconds" in done.stdout


def test_both_implementations_train_alike(tmp_path, modules, monkeypatch, capsys):
    training, _, command_line = modules
    monkeypatch.setattr(training, "DECODED", 4)
    monkeypatch.setattr(training, "DECODE_ROUNDS", 1)
    monkeypatch.setenv("COLUMNS", "160")
    picture = tmp_path / "picture.png"
    sizes = ["--seconds=0.1", "--batch=2", "--context=32", "--dim=64"]
    assert command_line.main([*sizes, f"--out={picture}"]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    for name in ("Mixtral", "DeepSeek-V3"):
        for what in ("training, steps a second", "decoding, tokens a second", "peak memory of a step", "loss after"):
            assert f"{name}: {what}" in out


def test_losses_that_differ(modules):
    training, report, _ = modules

    def measured(*loss):
        return training.Measured(loss=list(loss))

    def both(ours, stock):
        return {training.STOCK: measured(*stock), training.OURS: measured(*ours)}

    assert report.same_losses(both([3.0, 2.0], [3.0, 2.0001]))
    assert not report.same_losses(both([3.0, 2.0], [3.0, 2.01]))
    same = [3.0] * report.FIRST
    assert report.same_losses(both([*same, 2.0], [*same, 2.04]))
    assert not report.same_losses(both([*same, 2.0], [*same, 2.06]))


def test_models_have_a_few_million_parameters(modules):
    training, *_ = modules
    from transformers import AutoModelForCausalLM

    for config in training.configurations(training.Settings(60, 0, 8, 256, 256)).values():
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        assert 5e6 < parameters < 2e7
