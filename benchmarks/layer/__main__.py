"""Runs the comparison: ``python benchmarks/layer``; ``--help`` lists the options."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from layer.run import main

    main()
