"""The build: what it says without torch, and what it tells of itself."""

import subprocess
import sys
from pathlib import Path

import torch

import topn_gating

ROOT = Path(__file__).parents[1]


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


def test_build_info():
    info = topn_gating.build_info()
    assert set(info) == {"compiler", "torch", "cpu_level", "cuda", "cuda_architectures"}
    assert info["torch"] == torch.__version__
    assert info["cpu_level"] in ("baseline", "avx2")
    assert (info["cuda"], info["cuda_architectures"]) == (None, [])
