"""Trains the model and draws its picture: ``python examples/language_model``; ``--help`` lists the options."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # OpenMP threads that spin while they wait make a busy machine several times slower. torch reads this when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from language_model.run import main

    sys.exit(main())
