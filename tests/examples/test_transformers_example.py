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
    pytest.importorskip("transformers", minversion="5")
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    monkeypatch.syspath_prepend(FOLDER)
    names = ("training", "report")
    yield [importlib.import_module(name) for name in names]
    for name in names:
        del sys.modules[name]


def test_both_implementations_train_alike(tmp_path):
    pytest.importorskip("transformers", minversion="5")
    pytest.importorskip("matplotlib")
    picture = tmp_path / "picture.png"
    options = ["--seconds=0.1", "--batch=2", "--context=32", "--dim=64", f"--out={picture}"]
    environment = os.environ | {"PYTHONPATH": str(Path(topn_gating.__file__).parents[1]), "COLUMNS": "160"}
    command = [sys.executable, str(FOLDER), *options]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    for name in ("Mixtral", "DeepSeek-V3"):
        for what in ("training, steps a second", "decoding, tokens a second", "peak memory of a step", "loss after"):
            assert f"{name}: {what}" in done.stdout


def test_losses_that_differ(modules):
    training, report = modules

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
    training, _ = modules
    from transformers import AutoModelForCausalLM

    for config in training.configurations(training.Settings(60, 0, 8, 256, 256)).values():
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        assert 5e6 < parameters < 2e7
