"""The memory that a call allocates, as torch's profiler reports it."""

import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile


def memory_changes(call: Callable[[], object]) -> list[int]:
    """Returns the size in bytes of every allocation (positive) and release (negative) during ``call``, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = [event["args"] for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    return [event["Bytes"] for event in sorted(events, key=lambda event: event["Ev Idx"])]


def peak_bytes(call: Callable[[], object]) -> int:
    """Returns the largest number of bytes that ``call`` held at once above what was allocated before it."""
    return max(itertools.accumulate(memory_changes(call), initial=0))


def held_bytes(call: Callable[[], object]) -> int:
    """Returns the number of bytes that the result of ``call`` keeps allocated."""
    results = []
    return sum(memory_changes(lambda: results.append(call())))
