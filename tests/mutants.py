"""Changes single tokens of the kernels, operators and Python package, and checks that the tests fail for each such mutant.

    python tests/mutants.py [--count 200] [--seed 0] [--jobs 2] [--only csrc/cpu] [--list]

Mutants are sampled evenly over the folders of STRATA. Only files that include the changed one are compiled, at -O1 and for one
instruction set, and linked with the object files of `make test`; the quickest tests that can fail run first. A mutant that does
not compile is not counted; one that exceeds a time limit counts as killed. tests/mutants_equivalent.txt lists
mutants that no test can tell from the original. The exit code is 1 if less than --least percent are killed or listed.

universalmutator also changes strings and assertions, mutmut supports only Python, and both would compile more than needed.
"""

import argparse
import io
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import tokenize
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
EQUIVALENT = ROOT / "tests" / "mutants_equivalent.txt"
STRATA = {
    "csrc/cpu": ["csrc/cpu/*"],
    "csrc/cuda": ["csrc/cuda/*"],
    "csrc/*.h": ["csrc/*.h"],
    "csrc/torch": ["csrc/torch/*"],
    "topn_gating": ["topn_gating/*.py"],
}
# Files that the tests of a machine without a GPU do not run, or whose changes they need not notice.
LEFT_OUT = {
    "csrc/cuda/launch.cuh",
    "csrc/torch/cuda_backend.cpp",
    "csrc/torch/no_cuda_backend.cpp",
    "topn_gating/__main__.py",
    "csrc/inline.h",
}
OPERATORS = ("gate_backward", "gate", "assign", "dense", "dispatch", "combine", "grouped_linear", "linear")
# Files of an operator under other names.
PARTS = {
    "gate": ("gate_sums", "choice", "top8", "topn", "exponential"),
    "assign": ("pairs", "counts", "select"),
    "grouped_linear": ("thin_groups",),
}

# Flags that make unaligned accesses fail, as on a GPU; x86 would allow them.
TRAPS = ("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error")
STILLBORN, SURVIVED = "stillborn", "SURVIVED"
NO_TESTS = 5  # pytest's exit code if no test is selected

SWAPS = {
    **{"<": ["<="], "<=": ["<"], ">": [">="], ">=": [">"], "==": ["!="], "!=": ["=="]},
    **{"+": ["-"], "-": ["+"], "*": ["+"], "/": ["*"], "%": ["/"], "//": ["*"], "**": ["*"]},
    **{"+=": ["-="], "-=": ["+="], "*=": ["/="], "<<": [">>"], ">>": ["<<"], "&&": ["||"], "||": ["&&"], "&": ["|"]},
    **{"and": ["or"], "or": ["and"], "not": [""], "!": [""], "is": ["is not"], "in": ["not in"]},
    **{"true": ["false"], "false": ["true"], "True": ["False"], "False": ["True"], "min": ["max"], "max": ["min"]},
}
# Only operators between spaces are changed; others belong to a type, a template or a sign.
CPP_TOKEN = re.compile(
    r"(?<= )(?:<<|>>|<=|>=|==|!=|&&|\|\||[+*-]=|[<>+*/%&-])(?= )|!(?=[\w(])|\b(?:true|false|min|max)\b|(?<![\w.'])\d+(?![\w.'])"
)
CPP_SKIPPED = re.compile(
    r"^\s*(?:#|//|namespace|using|template|static_assert|extern|TOPN_GATING_|bool \w+ = (?:true|false);)"
    r"|STD_TORCH_CHECK|\\$|m\.def|throw"
)
PYTHON_SKIPPED = re.compile(r"^\s*(?:raise|import|from|assert|@|class|__all__)|_check|message")


class Mutant(NamedTuple):
    """A file's line before and after the change."""

    path: str
    line: int  # from 1
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.before.strip()}  =>  {self.after.strip()}"


def replacements(token: str) -> list[str]:
    """Returns the tokens that replace a token."""
    if token.isdigit():
        return [str(int(token) + 1)] + ([str(int(token) - 1)] if token != "0" else [])
    return SWAPS.get(token, [])


def cpp_tokens(text: str) -> Iterator[tuple[int, int, str]]:
    """Yields line, column and text of the C++ tokens to change, which are none in comments, strings and messages."""
    blank = re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\n])*"', lambda m: re.sub(r"[^\n]", "~", m[0]), text, flags=re.S)
    for number, line in enumerate(blank.split("\n"), 1):
        if not CPP_SKIPPED.search(line):
            for match in CPP_TOKEN.finditer(line):
                yield number, match.start(), match[0]


def python_tokens(text: str) -> Iterator[tuple[int, int, str]]:
    """Yields the same for Python, except for lines that define functions or annotated fields."""
    lines, kinds = text.split("\n"), (tokenize.OP, tokenize.NAME, tokenize.NUMBER)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in kinds:
            continue
        line = lines[token.start[0] - 1]
        skipped = PYTHON_SKIPPED.search(line) or "def " in line or re.match(r"\s*\w+: ", line)
        between_spaces = line[token.start[1] - 1 : token.end[1] + 1] == f" {token.string} "
        if skipped or (token.string in "+-*/**" and not between_spaces) or (token.string == "in" and "for " in line):
            continue
        yield *token.start, token.string


def mutants(path: str) -> Iterator[Mutant]:
    """Yields every mutant of a file."""
    text = (ROOT / path).read_text()
    lines = text.split("\n")
    for number, column, token in (python_tokens if path.endswith(".py") else cpp_tokens)(text):
        before = lines[number - 1]
        for new in replacements(token):
            yield Mutant(path, number, before, before[:column] + new + before[column + len(token) :])


def stratum_files(patterns: Sequence[str]) -> list[str]:
    """Returns a stratum's files."""
    found = (p for pattern in patterns for p in sorted(ROOT.glob(pattern)))
    names = [str(p.relative_to(ROOT)) for p in found if p.is_file() and p.suffix in (".h", ".cpp", ".cu", ".cuh", ".py")]
    return [name for name in names if name not in LEFT_OUT]


def equivalents() -> set[tuple[str, str, str]]:
    """Returns path, line before and line after of the mutants that are equivalent to the original; "*" is any change."""
    blocks = re.findall(r"^(\S+)\n- (.*)\n\+ (.*)\n# .+", EQUIVALENT.read_text(), flags=re.M) if EQUIVALENT.exists() else []
    return {tuple(part.strip() for part in block) for block in blocks}


def included(tree: Path, source: Path) -> set[str]:
    """Returns the source itself and the files of csrc that it includes, relative to the tree."""
    found, waiting = set(), [source]
    while waiting:
        file = waiting.pop()
        name = str(file.relative_to(tree))
        if name not in found:
            found.add(name)
            for include in re.findall(r'#include "([^"]+)"', file.read_text()):
                places = (tree / "csrc" / include, file.parent / include)
                waiting += [place for place in places if place.exists()][:1]
    return found


class Object(NamedTuple):
    """A source file, its object file in the existing build, its flags, and the programs that it is linked into."""

    source: str
    built: Path
    flags: tuple[str, ...]
    programs: tuple[str, ...]


class Workshop:
    """A copy of the sources in which one mutant at a time is built and tested."""

    def __init__(self, folder: Path, level: str, base: Path | None = None) -> None:
        self.folder, self.level, self.base = folder, level, base
        for name in ("csrc", "simt", "tests", "topn_gating", "benchmarks", "examples"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "setup.py", "Makefile"):
            shutil.copy(ROOT / name, folder)
        text = (folder / f"csrc/cpu/level_{level}.cpp").read_text()
        for unit in sorted((folder / "csrc/cpu").glob("*-inl.h")):
            if unit.name != "kernels-inl.h":
                (folder / f"unit_{unit.stem}.cpp").write_text(text.replace("cpu/kernels-inl.h", f"cpu/{unit.name}"))
        (self.extension,) = (ROOT / "topn_gating").glob("_C*.so")
        self.objects = self._objects()
        self.includes = {o.source: included(folder, folder / o.source) for o in self.objects}

    def _objects(self) -> list[Object]:
        import pybind11
        import torch

        include = Path(torch.__file__).parent / "include"
        folders = (include, include / "torch/csrc/api/include", sysconfig.get_path("include"), pybind11.get_include())
        cpu = ("-O1", *TRAPS, "-ffp-contract=fast", "-Wno-psabi")
        host = ("-O1", *TRAPS, "-DTOPN_SIMT_HOST", "-Isimt", "-Itests/kernels", "-fvisibility=hidden")
        bound = (
            "-O0",
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
            f'-DTOPN_BUILD_TORCH="{torch.__version__}"',
            "-Icsrc/torch",
        )
        bound += (*(f"-I{folder}" for folder in folders), "-DTORCH_EXTENSION_NAME=_C", "-fvisibility=hidden")
        units = sorted(self.folder.glob("unit_*.cpp"))
        found = [Object(p.name, (self.base or self.folder) / f"{p.name}.o", cpu, ("kernels_test", "_C")) for p in units]

        objects = list((ROOT / "build").rglob("*.o"))

        def add(pattern: str, built: str, flags: tuple[str, ...], *programs: str) -> None:
            for p in sorted(ROOT.glob(pattern)):
                if p.name not in (f"level_{self.level}.cpp", "cuda_backend.cpp"):
                    fits = re.compile(rf"{built}/(?:.*/)?(?:{p.name}|{p.stem})\.o$")
                    newest = max((o for o in objects if fits.search(str(o))), key=lambda o: o.stat().st_mtime)
                    found.append(Object(str(p.relative_to(ROOT)), newest, flags, programs))

        add("csrc/cpu/*.cpp", "build/cmake/.*topn_gating_cpu.dir", cpu, "kernels_test", "_C")
        add("csrc/cuda/*.cu", "build/cmake/.*simt_kernels.dir", (*host, "-x", "c++"), "kernels_test", "simt")
        add("tests/kernels/kernels_test.cpp", "build/cmake/.*kernels_test.dir", host, "kernels_test")
        add("tests/kernels/harness/*.cpp", "build/cmake/.*kernels_test.dir/harness", host, "kernels_test")
        add("csrc/torch/*.cpp", "build/cpu/temp.*/csrc/torch", bound, "_C")
        add("tests/kernels/simt_backend.cpp", "build/cmake/.*topn_gating_simt.dir", (*bound, *host), "simt")
        libraries = [f"-L{include.parent / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch"]
        simt = [str(ROOT / "build/cmake/simt/libsimt.a"), "-lpthread"]
        self.link = {
            "kernels_test": simt,
            "_C": ["-shared", *libraries, "-ltorch_python"],
            "simt": ["-shared", *simt, *libraries],
        }
        return found

    def compile(self, o: Object) -> bool:
        """Compiles an object in this folder; returns whether it compiled."""
        command = ["g++", "-std=c++17", "-w", "-fPIC", "-Icsrc", *o.flags, "-c", "-o", str(self.own(o)), o.source]
        return subprocess.run(command, cwd=self.folder, capture_output=True).returncode == 0

    def own(self, o: Object) -> Path:
        """Returns the path to which this workshop compiles an object."""
        return self.folder / f"{o.source.replace('/', '_')}.o" if self.base else o.built

    def build(self, program: str, changed: str, within: str = "") -> Path | None:
        """Compiles the files that include the changed one and links a program; returns None if that fails.

        Only sources whose names start with ``within`` are compiled.
        """
        objects = []
        for o in (o for o in self.objects if program in o.programs):
            new = changed in self.includes[o.source] and not o.source.startswith("csrc/cpu/level_")
            new = new and o.source.startswith(within)
            if new and not self.own(o).exists() and not self.compile(o):
                return None
            objects.append(str(self.own(o) if new else o.built))
        out = self.folder / f"{program}.out"
        done = subprocess.run(["g++", "-o", str(out), *objects, *self.link[program]], capture_output=True)
        return out if done.returncode == 0 else None

    def judge(self, mutant: Mutant) -> str:
        """Returns STILLBORN, SURVIVED, or the test that killed the mutant."""
        path = self.folder / mutant.path
        original = path.read_text()
        lines = original.split("\n")
        lines[mutant.line - 1] = mutant.after
        path.write_text("\n".join(lines))
        try:
            return self._judge(mutant.path)
        finally:
            path.write_text(original)
            shutil.copy(self.extension, self.folder / "topn_gating")
            for o in self.objects:
                self.own(o).unlink(missing_ok=True)

    def _judge(self, changed: str) -> str:
        environment = os.environ | {"OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(self.folder)}
        environment["TOPN_GATING_SIMT"] = str(ROOT / "build/cmake/libtopn_gating_simt.so")
        folder = str(Path(changed).parent)
        for options in self.kernel_runs(folder, operator_of(changed)):
            program = self.build("kernels_test", changed, "unit_" if "--cpu" in options else "")
            if program is None:
                return STILLBORN
            if self.fails([str(program), *options], environment, 150):
                return " ".join(["kernels_test", *options])
        if folder != "topn_gating":
            library = self.build("simt" if folder == "csrc/cuda" else "_C", changed)
            if library is None:
                return STILLBORN
            if folder == "csrc/cuda":
                environment["TOPN_GATING_SIMT"] = str(library)
            else:
                shutil.copy(library, self.folder / "topn_gating" / self.extension.name)
        selected = "simt" if folder == "csrc/cuda" else "not simt"
        pytest = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", selected]
        for tests in python_tests(changed):
            if self.fails([*pytest, tests], environment, 400):
                return tests
        return SURVIVED

    @staticmethod
    def kernel_runs(folder: str, operator: str | None) -> list[list[str]]:
        """Returns the arguments of kernels_test, the quickest run first."""
        pattern = [] if operator is None else [{"gate": "gate ", "grouped_linear": "grouped"}.get(operator, operator)]
        whole = {"csrc/cpu": [["--cpu", *pattern]], "csrc/cuda": [["--quick"], pattern], "csrc": [["--cpu"], []]}
        return whole.get(folder, [])

    def fails(self, command: list[str], environment: dict[str, str], seconds: float) -> bool:
        """Returns whether a command fails, or does not end in time."""
        try:
            done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return True
        return done.returncode not in (0, NO_TESTS)


def operator_of(path: str) -> str | None:
    """Returns the operator that a file is named after."""
    stem = Path(path).stem
    parts = {name: operator for operator, names in PARTS.items() for name in names}
    return parts.get(stem) or next((name for name in OPERATORS if re.match(rf"{name}(?!\w)|{name}_any", stem)), None)


def python_tests(path: str) -> list[str]:
    """Returns the tests in Python that may kill a mutant of a file, the quickest first."""
    operator = operator_of(path) if path.startswith("csrc") else None
    own = [f"tests/modules/test_{Path(path).stem}.py"]
    own += [f"tests/ops/test_{operator.removesuffix('_backward')}.py"] if operator else []
    found = [name for name in own if (ROOT / name).exists()]
    if path.startswith("topn_gating"):
        return [*found, "tests/modules", "tests/ops", "tests/torch_modes"]
    checks = ["tests/modules/test_bad_input.py"] if path.startswith("csrc/torch") else []
    return checks + (found or ["tests/ops"])


def main() -> int:
    """Samples, judges and prints; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="mutants that compile")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--least", type=float, default=95, help="percent that must be killed or listed as equivalent")
    parser.add_argument("--only", choices=list(STRATA), action="append", help="only this folder; may be repeated")
    parser.add_argument("--list", action="store_true", help="prints every mutant and tests none")
    options = parser.parse_args()
    strata = {name: [m for f in stratum_files(STRATA[name]) for m in mutants(f)] for name in options.only or STRATA}
    if options.list:
        print("\n".join(str(m) for found in strata.values() for m in found))
        return 0
    generator = random.Random(options.seed)
    queues = [iter(generator.sample(found, len(found))) for found in strata.values()]
    tasks = list(itertools.islice(itertools.cycle(queues), options.count))
    known, lock, start = equivalents(), threading.Lock(), time.monotonic()
    survivors, verdicts = [], []
    sys.path.insert(0, str(ROOT))
    import topn_gating

    with tempfile.TemporaryDirectory() as name:
        level = topn_gating.build_info()["cpu_level"]
        base = Workshop(Path(name, "base"), level)
        units = [o for o in base.objects if o.source.startswith("unit_")]
        with ThreadPoolExecutor(options.jobs) as pool:
            if not all(pool.map(base.compile, units)):
                print("the kernels do not compile", file=sys.stderr)
                return 2
        idle = [Workshop(Path(name, str(i)), level, base.folder) for i in range(options.jobs)]

        def work(queue: Iterator[Mutant]) -> None:
            with lock:
                workshop = idle.pop()
            verdict = STILLBORN
            while verdict == STILLBORN:
                with lock:
                    mutant = next(queue, None)
                if mutant is None:
                    break
                verdict = workshop.judge(mutant)
            with lock:
                idle.append(workshop)
                if mutant is None:
                    return
                listed = {(mutant.path, mutant.before.strip(), after) for after in (mutant.after.strip(), "*")}
                if verdict == SURVIVED and listed & known:
                    verdict = "equivalent"
                verdicts.append(verdict)
                survivors.extend([mutant] if verdict == SURVIVED else [])
                print(f"{time.monotonic() - start:6.0f} s  {len(verdicts):3}  {verdict:<34} {mutant}", flush=True)

        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(work, tasks))
    share = 100 * (len(verdicts) - len(survivors)) / max(len(verdicts), 1)
    equivalent = verdicts.count("equivalent")
    print(f"{len(verdicts)} mutants, {equivalent} equivalent, {len(survivors)} survived: {share:.1f} % killed or equivalent")
    for mutant in survivors:
        print(f"SURVIVED {mutant}")
    return int(share < options.least)


if __name__ == "__main__":
    sys.exit(main())
