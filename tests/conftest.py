"""Fixtures of every test file, and Hypothesis' profile."""

import os

# As make does: on a machine with few cores, threads that spin at a barrier slow the others down. torch reads it when imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from backends import BACKENDS, DEVICES
from hypothesis import settings

from topn_gating.registry import OPERATORS

settings.register_profile("same every time", derandomize=True, deadline=None, max_examples=200, database=None)
settings.load_profile("same every time")

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
