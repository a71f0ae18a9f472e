"""The time of a call on a CPU or a GPU, beside the time of a copy that moves as many bytes."""

import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]

SECONDS = 0.3  # approximate duration of one measurement
BATCH_SECONDS = 1e-3  # calls are timed in batches at least this long
LARGEST_COPY = {"cpu": 2**27, "cuda": 2**30}  # bytes of each of a copy's two buffers; time grows linearly above


def seconds_of(call: Call, device: str, rounds: int, *, graph: bool = True) -> float:
    """Returns the median time of a call.

    On a GPU the calls of a batch are replayed as a CUDA graph, so that the time holds no launch overhead of the host;
    ``graph=False`` measures them as Python launches them.
    """
    if device == "cpu":
        call()
        batch, run = _batch(call, _clock(call))
        return statistics.median(_samples(lambda: _clock(run), rounds)) / batch
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
        batch, run = _batch(call, _events(call))
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured, stream=stream):
                run()
            run = captured.replay
        run()
        median = statistics.median(_samples(lambda: _events(run, queued=graph), rounds)) / batch
    torch.cuda.current_stream().wait_stream(stream)
    return median


def _batch(call: Call, once: float) -> tuple[int, Call]:
    calls = min(max(1, round(BATCH_SECONDS / once)), 50)

    def run() -> None:
        for _ in range(calls):
            call()

    return calls, run


def _samples(sample: Callable[[], float], rounds: int) -> list[float]:
    samples = [sample()]
    while len(samples) < min(rounds, 3) or (len(samples) < rounds and sum(samples) < SECONDS):
        samples.append(sample())
    return samples


def _clock(call: Call) -> float:
    start = time.perf_counter()
    call()
    return max(time.perf_counter() - start, 1e-7)


def _events(call: Call, *, queued: bool = False) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if queued:
        torch.cuda._sleep(200_000)  # keeps the GPU busy until the call is in the queue, so that its launch does not count
    start.record()
    call()
    end.record()
    end.synchronize()
    return max(1e-3 * start.elapsed_time(end), 1e-7)


@functools.cache
def copy_seconds(size: int, device: str, rounds: int) -> float:
    """Returns the time of a copy that reads and writes ``size`` bytes in all."""
    half = min(max(size // 2, 1), LARGEST_COPY[device])
    source = torch.ones(half, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return seconds_of(lambda: target.copy_(source), device, rounds) * size / (2 * half)


def launches(call: Call, device: str) -> dict[str, float]:
    """Returns the mean seconds of each kernel that ``call`` launches, by name; on the CPU of each dispatched operator."""
    activity = ProfilerActivity.CPU if device == "cpu" else ProfilerActivity.CUDA
    call()
    with profile(activities=[activity]) as profiler:
        for _ in range(5):
            call()
        synchronize(device)
    averages = profiler.key_averages()
    time_of = {"cpu": "cpu_time_total", "cuda": "device_time_total"}[device]
    return {event.key: 1e-6 * getattr(event, time_of) / event.count for event in averages if getattr(event, time_of) > 0}


def synchronize(device: str) -> None:
    """Waits until the device has finished."""
    if device == "cuda":
        torch.cuda.synchronize()


def free_bytes(device: str) -> float:
    """Returns the bytes of memory that are free on a GPU; infinity on the CPU, where nothing is refused beforehand."""
    return float("inf") if device == "cpu" else torch.cuda.mem_get_info()[0]


def release(device: str) -> None:
    """Returns torch's cached memory to the device."""
    if device == "cuda":
        torch.cuda.empty_cache()
