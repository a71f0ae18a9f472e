"""Runs the tool: ``python -m benchmarks.sass``; ``--help`` lists the options."""

import sys
from pathlib import Path

if __name__ == "__main__":
    root = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(root / "benchmarks"), str(root / "tests" / "kernels")]
    from sass.run import main

    sys.exit(main())
