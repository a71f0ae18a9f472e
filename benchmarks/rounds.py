"""Interleaved rounds: the samples of several calls under the same conditions; or their memory."""

import ctypes
import gc
import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

FAILS, TOO_LARGE, DIFFERS = "fails", "too large", "differs"

WARM_UP = (1, 2)  # calls of each warm-up; after the second draw of random numbers some code is compiled again
ROUND_SECONDS = 0.05  # least time of a contender in a round

KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}  # never mmap a block, never shrink the heap

Step = Callable[[], Sequence[Tensor]]


class Figure(NamedTuple):
    """A cell of a table: each round's value and page faults per call, or a word in place of them and its reason."""

    values: Sequence[float] = ()
    faults: Sequence[float] = ()
    word: str = ""
    reason: str = ""


def sample(step: Step, calls: int = 1) -> tuple[float, float]:
    """Returns the milliseconds and page faults of a call, from a fixed seed."""
    torch.manual_seed(0)
    faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
    for _ in range(calls):
        step()
    milliseconds = 1e3 * (time.perf_counter() - start)
    return milliseconds / calls, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults) / calls


def interleave(steps: Mapping[str, Step], rounds: int) -> dict[str, Figure]:
    """Returns ``rounds`` samples of every step; each round runs all steps, in alternating order."""
    calls = {}
    for name, step in steps.items():
        milliseconds = min(sample(step, count)[0] for count in WARM_UP)
        calls[name] = max(1, round(1e3 * ROUND_SECONDS / milliseconds))
    figures = {name: Figure([], []) for name in steps}
    for i in range(rounds):
        for name in list(steps)[:: 1 if i % 2 else -1]:
            if not memory_is_kept():
                forget_others_memory(steps[name])
            milliseconds, faults = sample(steps[name], calls[name])
            figures[name].values.append(milliseconds)
            figures[name].faults.append(faults)
    return figures


def memory_is_kept() -> bool:
    """Returns whether glibc keeps freed memory, which then serves all contenders alike."""
    return all(os.environ.get(name) == value for name, value in KEEP.items())


def forget_others_memory(step: Step) -> None:
    """Returns freed memory to the system and calls the step once, so that it then finds the pages that it freed itself.

    It still finds the address space that others freed, so that it may have fewer page faults than in a process of its own.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    step()


def measure(
    makers: Mapping[str, Callable[[], Step | None]],
    rounds: int,
    seconds: float,
    *,
    memory: Callable[[Step], int] | None = None,
) -> dict[str, Figure]:
    """Returns the figures of the steps that ``makers`` make, by name: milliseconds, or with ``memory`` what it gives, in MiB.

    An error is recorded as a figure; a maker that returns None has no figure. A call that takes longer than ``seconds`` is
    not repeated.
    """
    figures, steps = {}, {}
    for name, make in makers.items():
        try:
            step = make()
            if step is None:
                continue
            milliseconds, faults = sample(step)
            if memory:
                figures[name] = Figure([memory(partial(one_seed, step)) / 2**20])
            elif milliseconds > 1e3 * seconds:
                figures[name] = Figure([milliseconds], [faults])
            else:
                steps[name] = step
        except Exception as error:
            figures[name] = failed(error)
    return figures | interleave(steps, rounds)


def one_seed(step: Step) -> Sequence[Tensor]:
    """Calls the step with the seed that all contenders get."""
    torch.manual_seed(0)
    return step()


def failed(error: Exception) -> Figure:
    """Returns the cell of a contender that raised an error."""
    return Figure(word=FAILS, reason=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")


def admit(kinds: Sequence[type], problem: Any, difference: Callable[[Any], str | None]) -> tuple[list[Any], dict[str, Figure]]:
    """Returns a contender of each kind for the problem, and the cells of those that fail or compute something else.

    ``difference`` says how a contender's results differ from what they should be, None if they do not.
    """
    admitted, words = [], {}
    for kind in kinds:
        try:
            contender = kind(problem)
            why = difference(contender)
        except Exception as error:
            words[kind.name] = failed(error)
            continue
        if why:
            words[kind.name] = Figure(word=DIFFERS, reason=why)
        else:
            admitted.append(contender)
    return admitted, words


def fresh() -> None:
    """Discards compiled code and garbage of earlier sizes, so that each size is compiled separately."""
    torch._dynamo.reset()
    gc.collect()
