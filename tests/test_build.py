"""The build: what it says without torch, and what it tells of itself."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import ptxas_spills
import pytest
import torch

import topn_gating
from topn_gating import __main__ as cli
from topn_gating import registry

ROOT = Path(__file__).parents[1]
OPERATORS = [name + suffix for name in registry.OPERATORS if "linear" not in name for suffix in ("", "_backward")]


def setup_fails(**environment):
    """What setup.py says last where it cannot build under these environment variables; None takes one away."""
    environment = {k: v for k, v in {**os.environ, **environment}.items() if v is not None}
    command = [sys.executable, "setup.py", "--version"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    return result.stderr.splitlines()[-1]


def test_setup_without_torch_says_what_to_do():
    code = "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '--version']; runpy.run_path('setup.py')"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "install torch>=2.10 first" in result.stderr
    assert "pip install --no-build-isolation" in result.stderr
    assert "Traceback" not in result.stderr


def test_package_without_its_extension_says_what_to_do():
    code = "import sys; sys.modules['topn_gating._C'] = None; import topn_gating"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "pip install --no-build-isolation -e ." in result.stderr.splitlines()[-1]


def test_setup_takes_three_values_of_its_variable():
    assert setup_fails(TOPN_GATING_CUDA="yes") == "TOPN_GATING_CUDA must be auto, 1 or 0, got 'yes'."


def test_setup_asked_for_cuda_without_nvcc_says_what_to_do(tmp_path):
    said = setup_fails(TOPN_GATING_CUDA="1", CUDA_HOME=str(tmp_path))
    assert said.startswith("TOPN_GATING_CUDA=1 needs nvcc: install ")
    if not shutil.which("nvcc", path="/usr/local/cuda/bin"):
        assert setup_fails(TOPN_GATING_CUDA="1", CUDA_HOME=None, CUDA_PATH=None, PATH=str(tmp_path)) == said


def test_build_info():
    info = topn_gating.build_info()
    assert set(info) == {"compiler", "torch", "cpu_level", "cuda", "cuda_architectures"}
    assert info["torch"] == torch.__version__
    assert info["cpu_level"] in ("baseline", "avx2", "avx512")
    if info["cuda"] is None:
        assert info["cuda_architectures"] == []
    else:
        assert re.fullmatch(r"\d+\.\d+", info["cuda"])
        assert info["cuda_architectures"]
        assert all(re.fullmatch(r"(sm|compute)_\d+[a-z]?", name) for name in info["cuda_architectures"])


@pytest.mark.parametrize("rich", [True, False], ids=["rich", "plain"])
def test_info_prints_the_build(rich, monkeypatch, capsys):
    if rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in topn_gating.build_info())
    assert topn_gating.build_info()["compiler"] in out
    assert topn_gating.__version__ in out


@pytest.mark.parametrize(("arguments", "said"), [([], "command"), (["info", "--rounds"], "--rounds"), (["demo"], "demo")])
def test_info_is_the_only_command(arguments, said, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("key", ["CPU", "CUDA"])
@pytest.mark.parametrize("name", OPERATORS)
def test_every_build_answers_for_either_device(name, key):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"topn_gating::{name}", key)


@pytest.mark.skipif(topn_gating.build_info()["cuda"] is not None, reason="this build has CUDA kernels")
def test_cuda_tensors_without_cuda_kernels_say_what_to_do():
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)  # as a CUDA tensor would bring it
    with pytest.raises(RuntimeError, match=r"^topn_gating was built without CUDA kernels: .*TOPN_GATING_CUDA=1 pip install"):
        torch.ops.topn_gating.combine.default.redispatch(cuda, *torch.zeros(5, 2, 3), None)


PTXAS = """ptxas info    : Compiling entry function '_Z4gatePf' for 'sm_90'
ptxas info    : Function properties for _Z4gatePf
    32 bytes stack frame, {} bytes spill stores, {} bytes spill loads
ptxas info    : Used 18 registers, used 0 barriers, 32 bytes cumulative stack size
ptxas info    : Function properties for _Z6helperf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""


@pytest.mark.parametrize(
    ("log", "allowed", "expected"),
    [
        (PTXAS.format(0, 0), {}, []),
        (PTXAS.format(8, 0), {}, ["gate(float*) on sm_90 spills: 8 bytes stored, 0 loaded"]),
        (PTXAS.format(0, 16), {}, ["gate(float*) on sm_90 spills: 0 bytes stored, 16 loaded"]),
        (PTXAS.format(8, 16), {r"^gate\(": "a reason"}, []),
        (PTXAS.format(0, 0), {r"^gate\(": "a reason"}, ["'^gate\\\\(' may spill and does not"]),
        ("nothing was compiled", {}, ["the log tells of no kernel"]),
    ],
    ids=["none", "stores", "loads", "allowed", "allowed in vain", "empty"],
)
def test_report_of_spilled_registers(log, allowed, expected):
    assert ptxas_spills.problems(ptxas_spills.functions(log), allowed) == expected
