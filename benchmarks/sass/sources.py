"""Which function of the CUDA sources a line belongs to."""

import re
from functools import cache
from pathlib import Path

from .listing import Place

NO_CODE = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])'|^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", re.S | re.M)
NAME_OF_HEAD = re.compile(r"([\w~]+)\s*(?:<[^<>()]*>)?\s*\(")
NO_FUNCTIONS = {"if", "for", "while", "switch", "catch", "constexpr", "return", "alignas", "__launch_bounds__", "decltype"}


def name_of(head: str) -> str | None:
    """Returns the function whose body follows the text ``head``, or None where it is no function's."""
    head = re.sub(r"__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)", "", head)
    match = NAME_OF_HEAD.search(head)
    # A lambda's parameters follow a bracket, an initialiser an equals sign; both are part of the function around them.
    if match is None or match[1] in NO_FUNCTIONS or "=" in re.sub(r"operator\s*\W+|<[^<>]*>|[=!<>]=", "", head[: match.start()]):
        return None
    return match[1]


def function_of_lines(text: str) -> list[str]:
    """Returns for each line, from line 1 on at index 1, the name of the function around it; empty where there is none."""
    code = NO_CODE.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
    names = [""] * (code.count("\n") + 2)
    open_braces: list[tuple[str | None, int]] = []
    functions: list[tuple[int, int, str]] = []
    start, line, parentheses = 0, 1, 0
    for at, character in enumerate(code):
        if character == "\n":
            line += 1
        elif character in "()":
            parentheses += 1 if character == "(" else -1
        elif character == "{":
            head = code[start:at]
            first = line - head.lstrip().count("\n")
            inside = any(name for name, _ in open_braces)
            open_braces.append((None if inside else name_of(head), first))
            start = at + 1
        elif character == "}" and open_braces:
            name, first = open_braces.pop()
            if name:
                functions.append((first, line, name))
            start = at + 1
        elif character == ";" and parentheses == 0:
            start = at + 1
    for first, last, name in functions:
        names[first : last + 1] = [name] * (last + 1 - first)
    return names


@cache
def lines_of(file: str) -> tuple[list[str], list[str]]:
    """Returns the lines of a file and the functions that they belong to, both from index 1 on."""
    path = Path(file)
    text = path.read_text(errors="replace") if path.is_file() else ""
    return ["", *text.splitlines()], function_of_lines(text)


@cache
def described(place: Place) -> str:
    """Returns ``function: text`` of a line, which the patterns of kernels.py are compared with."""
    lines, functions = lines_of(place.file)
    if place.line >= len(lines):
        return ""
    return f"{functions[place.line]}: {lines[place.line].strip()}"
