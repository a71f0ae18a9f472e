"""Where the operators' tests run."""

import ctypes
import os
from pathlib import Path

import torch
from cases import Backend, SimtBackend

from topn_gating import build_info

# What `make` builds of tests/kernels; a machine with a GPU may do without.
SIMT = Path(os.environ.get("TOPN_GATING_SIMT", Path(__file__).parents[1] / "build/cmake/libtopn_gating_simt.so"))


def backends() -> dict[str, Backend]:
    """Where the operator tests run: the CPU, the CUDA kernels on the host, a GPU where there is one."""
    found = {"cpu": Backend("topn_gating", "cpu")}
    if SIMT.exists():
        torch.ops.load_library(str(SIMT))
        # Sanitizers of memory ask for one schedule: an access is in bounds in all of them, or the results differ.
        schedules = int(os.environ.get("TOPN_GATING_SIMT_SCHEDULES", 3))
        found["simt"] = SimtBackend("topn_gating_simt", "cpu", ctypes.CDLL(str(SIMT)), schedules)
    if torch.cuda.is_available() and build_info()["cuda"] is not None:
        found["cuda"] = Backend("topn_gating", "cuda")
    return found


BACKENDS = backends()
DEVICES = sorted({b.device for b in BACKENDS.values() if b.namespace == "topn_gating"})
