"""Checks that the tests notice if any barrier of the CUDA kernels, or wait for the stream, is missing.

Each barrier is left out in turn, and ``kernels_test --quick`` must fail, by a wrong result in some schedule or by a race that
ThreadSanitizer reports. The kernels are compiled once, with a condition around each barrier that leaves it out if its number is
that of the environment variable DELETED_BARRIER.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

ROOT = pathlib.Path(__file__).resolve().parents[2]
BARRIER = re.compile(r"(?<!void )\b(?:__syncthreads|__syncwarp|sync_grid|sync_cluster|wait_for_stream)\(\)")
ANY_BARRIER = re.compile(r"(?<!void )\b(?:__sync\w+|sync_grid|sync_cluster|wait_for_stream) *\(")
SCHEDULER = ["scheduler", "fiber", "meet", "launch", "report"]
TESTS = [ROOT / "tests/kernels/kernels_test.cpp", *sorted((ROOT / "tests/kernels/harness").glob("*.cpp"))]
CPU = ["level", "level_avx2", "level_avx512", "level_baseline", "workspace"]
TOOLS = {"plain": [], "tsan": ["-fsanitize=thread"]}
PROCESSES = 2
SECONDS = 120  # after which a run counts as failed

DELETED_H = "extern const int deleted_barrier;\n"
DELETED_CPP = """#include <cstdlib>
#include "deleted.h"
const int deleted_barrier = std::getenv("DELETED_BARRIER") ? std::atoi(std::getenv("DELETED_BARRIER")) : 0;
"""


def number_barriers(folder):
    """Copies the sources into the folder with a condition around each barrier; returns the barriers' names by number."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / "deleted.h").write_text(DELETED_H)
    (folder / "deleted.cpp").write_text(DELETED_CPP)
    names = {}
    for path in sorted((folder / "csrc/cuda").glob("*.cu*")):
        lines = path.read_text().split("\n")
        for i, line in enumerate(lines):
            code, *comment = line.split("//", 1)
            if len(ANY_BARRIER.findall(code)) != len(BARRIER.findall(code)):
                sys.exit(f"{path.relative_to(folder)}:{i + 1}: a barrier of an unknown kind: {code.strip()}")

            def condition(match, i=i, path=path):
                names[len(names) + 1] = f"{path.relative_to(folder)}:{i + 1}  {match[0]}"
                return f"(deleted_barrier == {len(names)} ? void() : {match[0]})"

            lines[i] = "//".join([BARRIER.sub(condition, code), *comment])
        path.write_text("\n".join(lines))
    return names


def compile_all(folder):
    """Compiles the test program without and with ThreadSanitizer."""
    compiler = [os.environ.get("CXX", "g++"), "-std=c++17", "-O1", "-g", "-w"]
    includes = [f"-I{folder}/csrc", f"-I{ROOT}/simt"]
    host = ["-DTOPN_SIMT_HOST", *includes, "-include", str(folder / "deleted.h")]
    commands = []
    objects = {tool: [] for tool in TOOLS}

    def add(name, tools, arguments):
        target = folder / f"{name}.o"
        commands.append([*compiler, *arguments, "-c", "-o", str(target)])
        for tool in tools:
            objects[tool].append(str(target))

    # The files that take longest to compile come first.
    sources = sorted((folder / "csrc/cuda").glob("*.cu"), key=lambda path: -path.stat().st_size)
    for tool, flags in reversed(TOOLS.items()):
        for source in sources:
            add(f"{tool}.{source.stem}", [tool], [*host, *flags, "-x", "c++", str(source)])
    for tool, flags in TOOLS.items():
        for path in TESTS:
            add(f"{tool}.{path.stem}", [tool], [*host, *flags, str(path)])
    for name in SCHEDULER:
        add(name, TOOLS, [*host, str(ROOT / f"simt/{name}.cpp")])
    for name in CPU:
        add(f"cpu.{name}", TOOLS, [f"-I{folder}/csrc", str(folder / f"csrc/cpu/{name}.cpp")])
    add("deleted", TOOLS, [str(folder / "deleted.cpp")])

    def run(command):
        return subprocess.run(command, check=True)

    with ThreadPoolExecutor(PROCESSES) as pool:
        list(pool.map(run, commands))
    for tool, flags in TOOLS.items():
        run([compiler[0], *flags, *objects[tool], "-lpthread", "-o", str(folder / tool)])


def complaint(folder, tool, barrier):
    """Returns a line of what the program reports with the barrier left out; None if it ends without an error."""
    environment = {**os.environ, "DELETED_BARRIER": str(barrier), "TSAN_OPTIONS": "halt_on_error=1:atexit_sleep_ms=0"}
    try:
        done = subprocess.run([folder / tool, "--quick"], capture_output=True, text=True, timeout=SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        return f"no end after {SECONDS} s"
    if done.returncode == 0:
        return None
    lines = (done.stdout + done.stderr).splitlines()
    for start in ("FAILED ", "SUMMARY: "):
        for line in lines:
            if line.startswith(start):
                return line.removeprefix(start).replace(f"{folder}/", "")
    return f"exit status {done.returncode}"


def judge(folder, barrier):
    """Returns the tool that notices that the barrier is missing, and its report; None if no tool does."""
    for tool in TOOLS:
        said = complaint(folder, tool, barrier)
        if said is not None:
            return tool, said
    return None


def main():
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        names = number_barriers(folder)
        if not names:
            return "no barrier was found"
        compile_all(folder)
        with ThreadPoolExecutor(PROCESSES) as pool:
            verdicts = list(pool.map(lambda barrier: judge(folder, barrier), range(len(names) + 1)))
    if verdicts[0] is not None:
        return f"without a deletion: {': '.join(verdicts[0])}"
    survivors = []
    for barrier, what in names.items():
        verdict = verdicts[barrier]
        print(f"{what:<46} {'NOT CAUGHT' if verdict is None else f'{verdict[0]:<5} {verdict[1][:110]}'}")
        if verdict is None:
            survivors.append(what)
    print(f"{len(names)} barriers, {len(survivors)} deletions not caught")
    return "not caught: " + ", ".join(survivors) if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
