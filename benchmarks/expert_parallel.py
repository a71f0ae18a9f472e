"""Times a layer whose experts are divided among W processes of this machine, and counts the bytes that they send.

    PYTHONPATH=. python benchmarks/expert_parallel.py [--ranks 1 2 4] [--tokens 4096] [--dim 512] [--experts 16] [--rounds 7]

All contenders have the same gate, experts and tokens. Outputs that differ are not timed; gradients that differ are told. The
layer in one process, with all threads on all tokens, takes its turn in the same rounds. A time is that of the slowest rank.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from command import conditions, machine, options, restart_with, write
from rich.console import Console
from tables import markdown_table, number
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from topn_gating import Experts, MoE

MIB = 2**20
ALONE = "topn_gating in one process"


@dataclass(frozen=True)
class Problem:
    """Sizes of a layer, and of the work that the ranks share."""

    tokens: int
    dim: int
    experts: int
    top_n: int
    slack: float
    dtype: torch.dtype

    @property
    def capacity_factor(self) -> float:
        """As :class:`MoE` counts it, in slots for one rank of choices."""
        return self.slack * self.top_n


class Layer:
    """A contender on one rank: makes its layer from the weights of all experts."""

    name: str

    def __init__(self, problem: Problem, gate: Tensor, experts: Experts, rank: int, size: int) -> None:
        raise NotImplementedError

    def __call__(self, x: Tensor) -> Tensor:
        """The outputs ``(1, n, dim)`` of tokens."""
        return self.layer(x)[0]


class Ours(Layer):
    """The capacity layout."""

    name = "topn_gating"
    options: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, problem: Problem, gate: Tensor, experts: Experts, rank: int, size: int) -> None:
        group = {"expert_group": dist.group.WORLD, **self.options} if size > 1 else {}
        group |= {name: value for name, value in self.options.items() if name == "dropless"}
        here = slice(rank * problem.experts // size, (rank + 1) * problem.experts // size)
        part = Experts(problem.dim, problem.experts // size, dtype=problem.dtype)
        part.load_state_dict({name: tensor[here] for name, tensor in experts.state_dict().items()})
        self.layer = MoE(
            problem.dim,
            problem.experts,
            gating_top_n=problem.top_n,
            capacity_factor_train=problem.capacity_factor,
            policy_train="all",
            straight_through_dispatch_tensor=False,
            experts=part,
            dtype=problem.dtype,
            **group,
        )
        with torch.no_grad():
            self.layer.gate.to_gates.weight.copy_(gate)


class OursInChunks(Ours):
    """One half of the buffers travels while the experts compute the other."""

    name, options = "topn_gating, chunks=2", {"chunks": 2}


class OursDropless(Ours):
    """The dropless layout."""

    name, options = "topn_gating, dropless", {"dropless": True}


class StMoe(Layer):
    """Every rank gathers all tokens of all ranks, and computes its own experts."""

    name = "st-moe-pytorch"

    def __init__(self, problem: Problem, gate: Tensor, experts: Experts, rank: int, size: int) -> None:
        import st_moe_pytorch

        self.layer = st_moe_pytorch.MoE(
            problem.dim,
            problem.experts,
            gating_top_n=problem.top_n,
            capacity_factor_train=problem.capacity_factor,
            threshold_train=1e-9,  # all pairs are routed
            straight_through_dispatch_tensor=False,
            is_distributed=size > 1,
        ).to(problem.dtype)
        with torch.no_grad():
            self.layer.gate.to_gates.weight.copy_(gate)
            for i, expert in enumerate(self.layer.experts.experts):
                copy_expert(expert, experts, i)


class DeepSpeed(Layer):
    """DeepSpeed's layer: its gate on all tokens of a rank, and an all_to_all each way."""

    name = "DeepSpeed"

    def __init__(self, problem: Problem, gate: Tensor, experts: Experts, rank: int, size: int) -> None:
        from deepspeed import comm
        from deepspeed.moe.layer import MoE as DeepSpeedMoE
        from st_moe_pytorch.st_moe_pytorch import Expert

        comm.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
        expert = Expert(problem.dim)
        self.layer = DeepSpeedMoE(
            problem.dim,
            expert,
            problem.experts,
            ep_size=size,
            k=problem.top_n,
            capacity_factor=problem.slack,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        ).to(problem.dtype)
        self.layer.deepspeed_moe._set_ep_group(dist.group.WORLD)
        with torch.no_grad():
            self.layer.deepspeed_moe.gate.wg.weight.copy_(gate)
            for i, expert in enumerate(self.layer.deepspeed_moe.experts.deepspeed_experts):
                copy_expert(expert, experts, rank * problem.experts // size + i)


LAYERS: tuple[type[Layer], ...] = (Ours, OursInChunks, OursDropless, StMoe, DeepSpeed)


def copy_expert(theirs: nn.Module, experts: Experts, i: int) -> None:
    """Copies one expert's weights into st-moe-pytorch's module of it."""
    first, unit, last = theirs.net[0], theirs.net[1], theirs.net[-1]
    pairs = [(first.weight, experts.weight_in[i].T), (first.bias, experts.bias_in[i, 0])]
    pairs += (
        (unit.mult_bias, experts.mult_bias[i, 0]),
        (last.weight, experts.weight_out[i].T),
        (last.bias, experts.bias_out[i, 0]),
    )
    for mine, given in pairs:
        mine.copy_(given)


class Traffic(TorchDispatchMode):
    """Counts the bytes that leave a rank, where an all_gather sends its input to every other rank."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.bytes = size, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith(("_c10d_functional.all_to_all", "c10d.alltoall_base_")):
            rows = args[0] if name.startswith("_") else args[1]
            self.bytes += rows.nbytes * (self.size - 1) / self.size
        elif name.startswith("c10d.allgather_"):
            self.bytes += sum(t.nbytes for t in args[1]) * (self.size - 1)
        elif name.startswith("c10d.allreduce_"):
            self.bytes += sum(t.nbytes for t in args[0]) * 2 * (self.size - 1) / self.size
        elif "c10d" in name and "wait" not in name:
            raise NotImplementedError(f"{name} is not counted")
        return func(*args, **(kwargs or {}))


def train(layer: Layer, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """A forward and a backward pass; returns the outputs and the gradient of ``x``."""
    x = x.detach().requires_grad_()
    outputs = layer(x)
    outputs.backward(grad)
    return outputs.detach(), x.grad


def on_rank(
    rank: int, size: int, port: int, problem: Problem, names: Sequence[str], rounds: int, threads: int, queue: Any
) -> None:
    """Measures all contenders on one rank; rank 0 puts the figures into the queue."""
    torch.set_num_threads(max(1, threads // size))
    store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}  # DeepSpeed reads them
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    torch.manual_seed(0)
    experts = Experts(problem.dim, problem.experts, dtype=problem.dtype)
    gate = torch.randn(problem.experts, problem.dim, dtype=problem.dtype) * problem.dim**-0.5
    x, grad = torch.randn(2, size, problem.tokens // size, problem.dim, dtype=problem.dtype)
    mine, my_grad = x[rank : rank + 1], grad[rank : rank + 1]

    alone = Ours(problem, gate, experts, 0, 1)
    expected = tuple(t[rank : rank + 1] for t in train(alone, x, grad))
    steps: dict[str, Callable[[], Any]] = {}
    figures: dict[str, dict[str, Any]] = {}
    for kind in LAYERS:
        if kind.name not in names:
            continue
        layer = kind(problem, gate, experts, rank, size)
        reasons: list[Any] = [None] * size
        dist.all_gather_object(reasons, differences(train(layer, mine, my_grad), expected, alone, problem, mine))
        outputs, gradients = (max(values) for values in zip(*reasons, strict=True))
        figures[kind.name] = {"outputs": outputs, "gradients": gradients, "ms": []}
        if outputs:
            continue
        with Traffic(size) as traffic:
            train(layer, mine, my_grad)
        figures[kind.name]["bytes"] = traffic.bytes
        steps[kind.name] = lambda layer=layer: train(layer, mine, my_grad)
    figures[ALONE] = {"outputs": 0.0, "gradients": 0.0, "bytes": 0.0, "ms": []}
    steps[ALONE] = lambda: all_threads(threads, lambda: train(alone, x, grad)) if rank == 0 else None
    for i in range(rounds):
        for name in list(steps)[:: 1 if i % 2 else -1]:
            dist.barrier()
            start = time.perf_counter()
            steps[name]()
            slowest = torch.tensor(time.perf_counter() - start)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            figures[name]["ms"].append(1e3 * slowest.item())
    if rank == 0:
        queue.put(figures)
    dist.barrier()
    dist.destroy_process_group()


def all_threads(threads: int, step: Callable[[], Any]) -> None:
    """Runs a step with as many threads as all ranks have together."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    step()
    torch.set_num_threads(before)


def differences(
    got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], alone: Ours, problem: Problem, x: Tensor
) -> list[float]:
    """How far outputs and gradients of tokens are from those of one process, 0 where they are the same but for rounding.

    Only of tokens whose every choice found a slot: the dropless layer drops none, and DeepSpeed normalises after the drop.
    """
    kept = (alone.layer.gate.route(x).slot >= 0).all(-1)
    tolerance = 1e-4 if problem.dtype == torch.float32 else 5e-2
    apart = []
    for one, other in zip(got, expected, strict=True):
        same = torch.allclose(one[kept], other[kept], rtol=tolerance, atol=tolerance)
        apart.append(0.0 if same else (one[kept] - other[kept]).abs().max().item())
    return apart


def measure(size: int, problem: Problem, given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Returns the figures of all contenders on ``size`` ranks."""
    spawn = mp.get_context("spawn")
    queue, port = spawn.SimpleQueue(), free_port()
    names = given.layers if size > 1 else [Ours.name, OursDropless.name, StMoe.name]
    mp.spawn(on_rank, (size, port, problem, names, given.rounds, given.threads, queue), size)
    return queue.get()


def free_port() -> int:
    """A port on which nothing listens yet."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port


def rows_of(size: int, problem: Problem, figures: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The table's rows, and below each name's time its share of that in one process."""
    floor = statistics.median(figures[ALONE]["ms"])
    tokens = problem.tokens // size
    rows = []
    for name, figure in figures.items():
        if figure["outputs"]:
            rows.append([str(size), name, "differs", "", "", "", ""])
            continue
        ms = statistics.median(figure["ms"])
        sent = figure["bytes"]
        row = [str(size), name, number(ms), f"{ms / floor:.2f}×"]
        gradients = f"off by {figure['gradients']:.1g}" if figure["gradients"] else "equal"
        rows.append([*row, f"{sent / MIB:.1f}", f"{sent / tokens:,.0f}", gradients])
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = options("expert_parallel.py", __doc__.splitlines()[0])
    parser.set_defaults(dtypes=["float32"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tokens", type=int, default=4096, help="of all ranks together")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--slack", type=float, default=1.25, help="slots over routed pairs")
    parser.add_argument("--layers", nargs="+", choices=[kind.name for kind in LAYERS], default=[kind.name for kind in LAYERS])
    given = parser.parse_args(arguments)
    restart_with(given.malloc)
    console, rows, cells = Console(soft_wrap=True), [], []
    for dtype in given.dtypes:
        problem = Problem(given.tokens, given.dim, given.experts, 2, given.slack, getattr(torch, dtype))
        for size in given.ranks:
            figures = measure(size, problem, given)
            rows += rows_of(size, problem, figures)
            cells += [{"ranks": size, "layer": name, "dtype": dtype, **figure} for name, figure in figures.items()]
    head = ["ranks", "layer", "ms", "of one process", "MiB sent by a rank", "bytes a token", "gradients"]
    table, facts = markdown_table([head, *rows]), machine(given.threads)
    console.print(table, markup=False, highlight=False)
    bound = 4 * 2 * given.dim * given.slack
    console.print(f"{given.tokens} tokens, d {given.dim}, {given.experts} experts, top 2; {conditions(given)}")
    console.print(
        f"4 · k · d · slack elements a token, of which (W - 1) / W leave a rank: {bound:,.0f} elements", highlight=False
    )
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()), highlight=False)
    write(given, facts, cells, table)


if __name__ == "__main__":
    main(sys.argv[1:])
