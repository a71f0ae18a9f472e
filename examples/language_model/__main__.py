"""``python examples/language_model``: trains the model and draws its picture; ``--help`` lists the options."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # OpenMP threads that spin while they wait slow a busy machine several times over; read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from language_model.run import main

    sys.exit(main())
