"""Compiles a translation unit and disassembles kernels of it."""

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

from ptxas_spills import Function
from ptxas_spills import functions as reported

from .listing import Block, functions
from .sources import places_of

CACHE = Path(__file__).parents[2] / "build" / "sass"


class Kernel(NamedTuple):
    """A kernel: what ptxas reports of it, by its demangled name, and its code."""

    report: Function
    blocks: list[Block]


def find_nvcc() -> str | None:
    """Returns the path of nvcc, searched for where setup.py searches; None if there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=f"{home}/bin")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def find_disassembler() -> str | None:
    """Returns the path of nvdisasm: of the development requirements, or of a toolkit."""
    site = Path(sysconfig.get_path("purelib"))
    return next((str(path) for path in sorted(site.glob("nvidia/cu*/bin/nvdisasm"))), shutil.which("nvdisasm"))


def nvcc_flags(root: Path) -> list[str]:
    """Returns the flags with which setup.py compiles the kernels."""
    match = re.search(r'"nvcc": (\[[^\]]*\])', (root / "setup.py").read_text())
    if match is None:
        raise SystemExit("setup.py has no flags of nvcc where they are looked for.")
    return [str(flag) for flag in ast.literal_eval(match[1])]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command; ends the program with what it printed if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done


def release(nvcc: str) -> str:
    """Returns the version of nvcc."""
    match = re.search(r"release (\d+\.\d+)", run([nvcc, "--version"]).stdout)
    return match[1] if match else "of an unknown version"


def compile_unit(nvcc: str, root: Path, unit: str, arch: str) -> Path:
    """Returns the cubin of a translation unit, beside which ptxas' report is kept. Compiles only what has changed."""
    flags = [f"-arch={arch}", *nvcc_flags(root), "-lineinfo", "-cubin", "-Xptxas", "-v", f"-I{root / 'csrc'}"]
    sources = sorted(path for path in (root / "csrc").rglob("*") if path.suffix in (".h", ".cu", ".cuh"))
    environment = [os.environ.get(name, "") for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")]
    key = hashlib.sha256("\0".join([run([nvcc, "--version"]).stdout, unit, *flags, *environment]).encode())
    for path in [path for path in sources if path.suffix != ".cu"] + [root / unit]:
        key.update(path.read_bytes())
    cubin = CACHE / f"{Path(unit).stem}-{arch}-{key.hexdigest()[:12]}.cubin"
    if not cubin.with_suffix(".log").exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        for old in CACHE.glob(f"{Path(unit).stem}-{arch}-*"):
            old.unlink()
        with tempfile.TemporaryDirectory(dir=CACHE) as kept:
            done = run([nvcc, *flags, "--keep", f"--keep-dir={kept}", "-o", str(cubin), str(root / unit)])
            Path(kept, Path(unit).stem + ".ptx").replace(cubin.with_suffix(".ptx"))
        cubin.with_suffix(".log").write_text(done.stderr)
    return cubin


def kernels(cubin: Path, disassembler: str, wanted: re.Pattern[str]) -> list[Kernel]:
    """Returns the kernels of a cubin whose demangled names match."""
    symbols = [line.split() for line in run(["readelf", "-sW", str(cubin)]).stdout.splitlines() if " FUNC " in line]
    index = {fields[-1]: fields[0].rstrip(":") for fields in symbols}
    log = cubin.with_suffix(".log").read_text()
    mangled = re.findall(r"Function properties for (\w+)", log)
    found = [(name, f) for name, f in zip(mangled, reported(log), strict=True) if f.registers and wanted.search(f.name)]
    if not found:
        return []
    chosen = ",".join(index[name] for name, _ in found)
    listing = run([disassembler, "-c", "-gp", "-fun", chosen, str(cubin)]).stdout
    with cubin.with_suffix(".ptx").open() as ptx:
        blocks = functions(listing.splitlines(), places_of(ptx))
    return [Kernel(f, blocks[name]) for name, f in found]
