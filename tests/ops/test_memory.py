"""The CPU kernels at the limits of memory: a failed allocation is an exception, and nothing outside the tensors is read."""

import subprocess
import sys

import pytest

from topn_gating import ops

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits and protects memory as Linux does")

# Each call runs under growing limits of the address space until it succeeds. First its outputs cannot be allocated, then the
# memory of the kernel's threads.
FAILED_ALLOCATIONS = """
import resource
import torch
from topn_gating.ops import GateOptions

torch.set_num_threads(2)
torch.ones(1 << 20).exp()  # starts the threads
O = torch.ops.topn_gating
EXPERTS = 1 << 20
logits = torch.rand(2, 1, EXPERTS)
weight, expert, _, counts, *_ = O.gate(logits, None, None, None, None, 1, *GateOptions(1e-9), True, True)
x, w = torch.rand(2, EXPERTS), torch.rand(16, EXPERTS)
# Some processors convert half types to float32. The outputs are larger than what malloc may keep for a thread, 64 MiB.
rows, matrices = torch.rand(2000, 64).half(), torch.rand(2, 1 << 15, 64).half()
large_rows, large_matrices = torch.rand(2000, 1 << 15).half(), torch.rand(2, 64, 1 << 15).half()
ends = torch.tensor([1000, 2000], dtype=torch.int32)
calls = {
    "gate": lambda: O.gate(logits, None, None, None, None, 1, *GateOptions(1e-9), True, True),
    "gate_backward": lambda: O.gate_backward(
        weight, None, None, None, logits, None, None, expert, counts, *GateOptions(1e-9)
    ),
    "linear": lambda: O.linear(x, w),
    "grouped_linear": lambda: O.grouped_linear(rows, matrices, None, ends),
    "grouped_linear_backward": lambda: O.grouped_linear_backward(rows, large_rows, large_matrices, ends, True, True, True),
}
for name, call in calls.items():
    expected, raised = call(), set()
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    for extra in range(0, 2 << 30, (32 if "grouped" in name else 3) << 20):
        resource.setrlimit(resource.RLIMIT_AS, (used + extra, resource.RLIM_INFINITY))
        try:
            actual = call()
            break
        except (MemoryError, RuntimeError) as error:
            raised.add(type(error))
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    assert (RuntimeError if "grouped" in name else MemoryError) in raised, (name, raised)  # torch's own allocations
    as_tuple = lambda result: result if isinstance(result, tuple) else (result,)
    assert all(map(torch.equal, as_tuple(actual), as_tuple(expected))), name
print("survived")
"""

# Every tensor ends at a page that must not be touched. A read past its end ends the process.
PAST_THE_END = """
import ctypes, itertools, mmap
import torch
from topn_gating.ops import SCORES, GateOptions

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
ROOM = 1 << 18


def guarded():
    access, kind = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    start = libc.mmap(None, ROOM + mmap.PAGESIZE, access, kind, -1, 0)
    assert libc.mprotect(start + ROOM, mmap.PAGESIZE, 0) == 0
    return torch.frombuffer((ctypes.c_char * ROOM).from_address(start), dtype=torch.uint8)


ROOMS = [guarded() for _ in range(7)]


def at_the_end(tensors):
    for t, room in zip(tensors, ROOMS):
        size = t.numel() * t.itemsize
        copy = room[ROOM - size:].view(t.dtype).view(t.shape) if size else t
        yield copy.copy_(t)


O = torch.ops.topn_gating
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    sizes = [*range(1, 36), 63, 64, 65, 100], [1, 2, 3, 7, 15, 16, 17, 33]
    softmaxes = GateOptions(1e-9), GateOptions(1e-9, soft=True)
    others = [GateOptions(1e-9, score=i, all_ranks=True) for i in range(1, len(SCORES))]
    for experts, tokens, options in itertools.product(*sizes, [*softmaxes, *others]):
        logits, noise = torch.randn(tokens, experts).to(dtype), torch.rand(tokens, experts, dtype=compute)
        top_n = min(2, experts)
        for with_noise in (None, noise):
            tensors = (logits,) if with_noise is None else (logits, noise)
            moved = list(at_the_end(tensors)) + [None]
            weight, expert, importance, counts, *_ = O.gate(*moved[:2], None, None, None, top_n, *options, True, True)
            plain = O.gate(logits, with_noise, None, None, None, top_n, *options, True, True)
            assert all(map(torch.equal, (weight, expert), plain)), (dtype, experts, tokens)
            gradients = torch.ones_like(weight), torch.ones_like(importance)
            arguments = list(at_the_end((*tensors, *gradients, expert, counts)))
            if with_noise is None:
                arguments.insert(1, None)
            z, u, grad_weight, grad_importance, expert, counts = arguments
            O.gate_backward(grad_weight, grad_importance, None, None, z, u, None, expert, counts, *options)
    for dim, experts, tokens in itertools.product([1, 3, 15, 16, 17, 31, 33, 65, 130], [1, 5, 33], [1, 7, 17]):
        shapes = (tokens, dim), (experts, dim), (tokens, experts)
        x, w, grad = at_the_end([torch.randn(shape).to(dtype) for shape in shapes])
        O.linear(x, w)
        O.linear_backward(grad, x, w, True, True)
        shapes = (tokens, dim), (2, experts, dim), (2, experts), (tokens, experts)
        for ends in ([tokens // 3, tokens], [tokens + 9, -5], [0, tokens - 1]):
            made = *(torch.randn(shape).to(dtype) for shape in shapes), torch.tensor(ends, dtype=torch.int32)
            rows, matrices, bias, grad, offsets = at_the_end(made)
            O.grouped_linear(rows, matrices, bias, offsets)
            O.grouped_linear_backward(grad, rows, matrices, offsets, True, True, True)
        weight = torch.rand(tokens, 2, dtype=compute)
        expert = torch.randint(experts, (tokens, 2), dtype=torch.int32)
        kept, slot, source, *_ = O.assign(*at_the_end((weight, expert)), None, None, None, None, experts, 3, 1, 2, 1e-9)
        y = torch.randn(experts, 3, dim).to(dtype)
        x, y, kept, expert, slot, source = at_the_end((x.clone(), y, kept, expert, slot, source))
        O.dense(kept, expert, slot, source, dtype, True)
        arguments = x, y, kept, expert, slot, source
        dropless = O.assign(*at_the_end((weight, expert)), None, None, None, None, experts, None, 4, 2, 1e-9)
        kept, slot, source, _, offsets = dropless
        y = torch.randn(len(source), dim).to(dtype)
        dropless = at_the_end((x.clone(), y, kept, expert.clone(), slot, source, offsets))
        for x, y, kept, expert, slot, source, offsets in ((*arguments, None), dropless):
            O.dispatch(x, kept, expert, slot, source, offsets, True)
            O.dispatch_backward(y, x, expert, slot, source, offsets)
            O.combine(y, kept, expert, slot, source, offsets)
            O.combine_backward(x, y, kept, expert, slot, source, offsets)
print("survived")
"""


def run(script, monkeypatch, level):
    monkeypatch.setenv("TOPN_GATING_CPU_LEVEL", level)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # freed memory does not serve the next call
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "survived"), done.stderr[-2000:]


LEVELS = ["baseline", "avx2", "avx512"]


CHOSEN = str(ops.build_info()["cpu_level"])
# Every level allocates alike, and reads by instructions of its own.
LIMITS = [(FAILED_ALLOCATIONS, CHOSEN), *((PAST_THE_END, level) for level in LEVELS[: LEVELS.index(CHOSEN) + 1])]


@pytest.mark.parametrize(
    ("script", "level"), LIMITS, ids=["failed allocations", *(f"past the end, {level}" for _, level in LIMITS[1:])]
)
def test_limits(script, level, monkeypatch):
    run(script, monkeypatch, level)
