"""tests/mutants.py: which tokens change, and into what."""

import mutants
import pytest


def changed(tokens, text):
    """Every mutant of a text, in order."""
    lines, found = text.split("\n"), []
    for number, column, token in tokens(text):
        line = lines[number - 1]
        found += [line[:column] + new + line[column + len(token) :] for new in mutants.replacements(token)]
    return found


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("x = a < b;", ["x = a <= b;"]),
        ("x = a - 1;", ["x = a + 1;", "x = a - 2;", "x = a - 0;"]),
        ("if (!f(x)) x += y;", ["if (f(x)) x += y;", "if (!f(x)) x -= y;"]),
        ("x = std::min<int64_t>(a, b);", ["x = std::max<int64_t>(a, b);"]),
        ('g("1 < 2");  // 1 < 2', []),
        ("/* a < b\n c < d */", []),
        ('#include "a.h"  // < 1', []),
        ('STD_TORCH_CHECK(a < b, "no");', []),
        ("const std::vector<int>& x, const T* y;", []),
        ("float x = 1.5f + y0;", ["float x = 1.5f - y0;"]),
    ],
)
def test_mutants_of_cpp(line, expected):
    assert changed(mutants.cpp_tokens, line) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("x = a and not b", ["x = a or not b", "x = a and  b"]),
        ("x = a[-1]", ["x = a[-2]", "x = a[-0]"]),
        ("f(*a, **b)", []),
        ("for i in x: pass", []),
        ("x = y in z", ["x = y not in z"]),
        ('x = "1 + 2"  # 3', []),
        ("raise ValueError(1)", []),
        ("def f(x: int = 1) -> int: pass", []),
    ],
)
def test_mutants_of_python(line, expected):
    assert changed(mutants.python_tokens, line) == expected


def test_every_stratum_has_mutants_whose_lines_stand_in_their_files():
    for patterns in mutants.STRATA.values():
        found = [m for path in mutants.stratum_files(patterns) for m in mutants.mutants(path)]
        assert len(found) > 50
        for m in found[::37]:
            assert (mutants.ROOT / m.path).read_text().split("\n")[m.line - 1] == m.before != m.after


def test_listed_equivalents_are_mutants_still():
    every = set()
    for patterns in mutants.STRATA.values():
        for m in (m for path in mutants.stratum_files(patterns) for m in mutants.mutants(path)):
            every |= {(m.path, m.before.strip(), after) for after in (m.after.strip(), "*")}
    assert mutants.equivalents() <= every
