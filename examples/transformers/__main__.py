"""Trains small models of transformers, stock and with topn_gating's experts: ``python examples/transformers``."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # OpenMP threads that spin while they wait make a busy machine several times slower. torch reads this when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    root = Path(__file__).resolve().parents[2]
    sys.path += [str(root / "examples"), str(root / "benchmarks")]
    from command_line import main

    sys.exit(main())
