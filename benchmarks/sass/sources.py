"""Which source lines the lines of a PTX file come from, the functions around them included.

nvdisasm can print source lines itself, but ptxas mixes up the files of inlined calls; it keeps the lines of the PTX right.
"""

import re
import subprocess
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

LOCATION = re.compile(r"\s*\.loc\s+(\d+) (\d+) (\d+)(?:, function_name (\S+), inlined_at (\d+) (\d+) (\d+))?")
FILE = re.compile(r'\s*\.file\s+(\d+) "([^"]+)"')
ENTRY = re.compile(r"\.(?:entry|func)\s+(?:\([^)]*\)\s*)?(\w+)")
BYTES = re.compile(r"\s*\.b8 ([\d,]+)")


class Place(NamedTuple):
    """A line of a source file and the function, without its scope and arguments, that it belongs to."""

    function: str
    file: str
    line: int


Places = tuple[Place, ...]  # a line and the lines of the calls into which that was inlined, innermost first


def short_name(demangled: str) -> str:
    """Returns a function's name alone; of a lambda's call the name of the function around it."""
    name, previous = demangled.replace("(anonymous namespace)::", "").replace("operator()", "operator "), ""
    while name != previous:
        name, previous = re.sub(r"<[^<>]*>", "", name), name
    return name.partition("(")[0].rpartition("::")[2].split(" ")[-1]


def short_names(mangled: Iterable[str]) -> dict[str, str]:
    """Returns the short names of functions."""
    names = list(dict.fromkeys(mangled))
    said = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return dict(zip(names, map(short_name, said.splitlines()), strict=True))


def places_of(ptx: Iterable[str]) -> dict[int, Places]:
    """Returns the places of each line of a PTX file that starts a new one; they hold up to the next such line."""
    files: dict[str, str] = {}
    strings: dict[str, list[int]] = {}
    found: dict[int, tuple[tuple[str, str, int], ...]] = {}
    by_position: dict[tuple[str, str, str], tuple[tuple[str, str, int], ...]] = {}
    entry, string = "", ""
    for number, line in enumerate(ptx, 1):
        text = line.lstrip()
        if text.startswith(".loc"):
            match = LOCATION.match(line)
            if match is None:
                continue
            file, at, column, function, *caller = match.groups()
            around = by_position.get((caller[0], caller[1], caller[2]), ()) if function else ()
            found[number] = ((function or entry, file, int(at)), *around)
            by_position[file, at, column] = found[number]
        elif text.startswith(".b8"):
            if string and (match := BYTES.match(line)):
                strings[string] += map(int, match[1].split(","))
        elif line.startswith("$L__info_string"):
            string = line.strip().rstrip(":")
            strings[string] = []
        elif text.startswith(".file") and (match := FILE.match(line)):
            files[match[1]] = match[2]
        elif (".entry" in line or ".func" in line) and (match := ENTRY.search(line)):
            entry = match[1]
            by_position.clear()
            found[number] = ()
    mangled = {name: bytes(values).rstrip(b"\0").decode() for name, values in strings.items()}
    frames = {frame for chain in found.values() for frame in chain}
    names = short_names(mangled.get(function, function) for function, _, _ in frames)
    places = {f: Place(names[mangled.get(f[0], f[0])], files.get(f[1], ""), f[2]) for f in frames}
    return {number: tuple(places[frame] for frame in chain) for number, chain in found.items()}


@cache
def lines_of(file: str) -> list[str]:
    """Returns the lines of a file from index 1 on."""
    path = Path(file)
    return ["", *path.read_text(errors="replace").splitlines()] if path.is_file() else [""]


@cache
def described(place: Place) -> str:
    """Returns ``function: text after the text of the line before``, which the patterns of kernels.py are compared with."""
    lines = lines_of(place.file)
    text, before = (lines[n].strip() if 0 <= n < len(lines) else "" for n in (place.line, place.line - 1))
    return f"{place.function}: {text} after {before}"


def matched(places: Places, patterns: Mapping[str, float]) -> list[str]:
    """Returns the patterns that one of the lines matches, those of inner lines first."""
    return [p for place in places for p in patterns if re.search(p, described(place))]
