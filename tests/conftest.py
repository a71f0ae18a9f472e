"""Fixtures of every test file, and Hypothesis' profile."""

import ctypes
import os
from pathlib import Path

# As make does: on a machine with few cores, threads that spin at a barrier slow the others down. torch reads it when imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from cases import Backend, SimtBackend
from hypothesis import settings

from topn_gating import build_info
from topn_gating.registry import OPERATORS

settings.register_profile("same every time", derandomize=True, deadline=None, max_examples=200, database=None)
settings.load_profile("same every time")

# What `make` builds of tests/kernels; a machine with a GPU may do without.
SIMT = Path(os.environ.get("TOPN_GATING_SIMT", Path(__file__).parents[1] / "build/cmake/libtopn_gating_simt.so"))


def backends() -> dict[str, Backend]:
    """Where the operator tests run: the CPU, the CUDA kernels on the host, a GPU where there is one."""
    found = {"cpu": Backend("topn_gating", "cpu")}
    if SIMT.exists():
        torch.ops.load_library(str(SIMT))
        # Sanitizers of memory ask for one schedule: an access is in bounds in all of them, or the results differ.
        schedules = int(os.environ.get("TOPN_GATING_SIMT_SCHEDULES", 4))
        found["simt"] = SimtBackend("topn_gating_simt", "cpu", ctypes.CDLL(str(SIMT)), schedules)
    if torch.cuda.is_available() and build_info()["cuda"] is not None:
        found["cuda"] = Backend("topn_gating", "cuda")
    return found


BACKENDS = backends()
DEVICES = sorted({b.device for b in BACKENDS.values() if b.namespace == "topn_gating"})

ENTRY_POINTS = {
    "torch.ops": lambda name: getattr(torch.ops.topn_gating, name),
    "Function.apply": lambda name: OPERATORS[name].apply,
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", params=BACKENDS.values(), ids=BACKENDS.keys())
def backend(request):
    """The operators, forward and ``*_backward``, without autograd."""
    return request.param


@pytest.fixture(scope="session", params=DEVICES)
def device(request):
    """Devices for what goes through autograd."""
    return request.param


@pytest.fixture(scope="session", params=ENTRY_POINTS.values(), ids=ENTRY_POINTS.keys())
def entry_point(request):
    """The two ways to an operator that autograd knows: ``entry_point(name)`` is callable."""
    return request.param


@pytest.fixture
def nan_memory():
    """New tensors start as NaN, or the largest integer: an element that a kernel forgets shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def restarted(monkeypatch):
    """Sets the environment that a benchmark sets when it restarts itself, for short rounds on one thread."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
    monkeypatch.setattr("rounds.ROUND_SECONDS", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
