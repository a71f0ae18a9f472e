"""Machine code that is written by hand, for the tests of benchmarks/sass."""

import re

import pytest
from sass import sources
from sass.listing import functions
from sass.sources import Place


@pytest.fixture
def code(tmp_path):
    """Returns a function that turns instructions into blocks: ``label:`` starts one, and ``| 3`` tells the source line."""

    def blocks(text, source=""):
        file = tmp_path / "kernel.cu"
        file.write_text(source)
        sources.lines_of.cache_clear()
        sources.described.cache_clear()
        lines = [".text.kernel:"]
        for line in text.strip().splitlines():
            instruction, _, at = (part.strip() for part in line.partition("|"))
            if at:
                lines.append(f'	//## File ".nv_debug_ptx_txt", line {at}')
            instruction = re.sub(r"^L(\d):", r".L_x_\1:", instruction)
            instruction = re.sub(r"\bL(\d)", r"`(.L_x_\1)", instruction)
            lines.append(instruction if instruction.startswith(".") else f"  /*{16 * len(lines):04x}*/  {instruction} ;")
        places = {n: (Place("work", str(file), n),) for n in range(1, 20)}
        return functions(lines, places)["kernel"]

    return blocks
