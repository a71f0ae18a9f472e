"""Fixtures of the benchmarks' tests."""

import pytest
import rounds
import torch


@pytest.fixture
def restarted(monkeypatch):
    """Sets the environment that a benchmark sets when it restarts itself, for short rounds on one thread."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
    monkeypatch.setattr(rounds, "ROUND_SECONDS", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
