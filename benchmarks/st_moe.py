"""Times training steps of st-moe-pytorch's layer, and of the demo's model with it, beside topn_gating.integrations.st_moe.

    PYTHONPATH=. python benchmarks/st_moe.py [--rounds 7] [--threads 2]

Both have the same parameters and tokens. Results that differ are not timed. Rounds are interleaved in one process.
"""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from command import conditions, machine, options, restart_with, write
from rich.console import Console
from rounds import Step, interleave
from tables import markdown_table, number
from torch import Tensor, nn

from topn_gating.integrations import st_moe

OURS, THEIRS = "topn_gating", "st-moe-pytorch"


class Case(NamedTuple):
    """What is timed: sequences, tokens of each, features, experts, and the experts' hidden size over the features'."""

    name: str
    sequences: int
    tokens: int
    dim: int
    experts: int
    hidden_mult: float


CASES = (
    Case("the demo's model", 8, 128, 128, 8, 1.5),
    Case("layer", 8, 128, 128, 8, 1.5),
    Case("layer", 1, 2048, 128, 8, 1.5),
    Case("layer", 8, 2048, 128, 8, 1.5),
    Case("layer", 8, 2048, 128, 16, 1.5),
    Case("layer", 4, 2048, 512, 16, 4),
)


class Model(nn.Module):
    """The demo's model, with the layer of either package."""

    def __init__(self, library: ModuleType, case: Case) -> None:
        from language_model.train import BYTES, Attention, Embedding

        super().__init__()
        self.embedding = Embedding(case.dim)
        self.attention = nn.ModuleList(nn.Sequential(nn.RMSNorm(case.dim), Attention(case.dim)) for _ in range(2))
        self.moe = nn.ModuleList(layer_of(library, case) for _ in range(2))
        self.to_logits = nn.Sequential(nn.RMSNorm(case.dim), nn.Linear(case.dim, BYTES, bias=False))

    def forward(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits ``(b, n, 256)`` of bytes ``(b, n)``, and the auxiliary loss."""
        x, aux = self.embedding(data), 0
        for attention, moe in zip(self.attention, self.moe, strict=True):
            x = x + attention(x)
            out = moe(F.rms_norm(x, x.shape[-1:]))
            x, aux = x + out[0], aux + out[1].sum()
        return self.to_logits(x), aux


def layer_of(library: ModuleType, case: Case) -> nn.Module:
    """The layer, all of whose pairs are routed: with the default capacity, or twice as much as the demo has."""
    return library.MoE(
        case.dim,
        case.experts,
        case.hidden_mult,
        threshold_train=1e-9,
        capacity_factor_train=2.5 if "model" in case.name else 1.25,
    )


def training_step(library: ModuleType, case: Case) -> tuple[Step, nn.Module]:
    """A forward and a backward pass, and the module."""
    torch.manual_seed(0)
    module = Model(library, case) if "model" in case.name else layer_of(library, case)
    torch.manual_seed(1)
    shape = case.sequences, case.tokens
    x = torch.randint(256, shape) if "model" in case.name else torch.randn(*shape, case.dim, requires_grad=True)

    def step() -> Sequence[Tensor]:
        module.zero_grad()
        out = module(x)
        (out[0].square().mean() + out[1].sum()).backward()
        return [out[0].detach()]

    return step, module


def steps_of(case: Case) -> dict[str, Step]:
    """The steps of both packages, whose outputs and gradients are the same."""
    import st_moe_pytorch.st_moe_pytorch as peer

    steps: dict[str, Step] = {}
    found = []
    for name, library in ((OURS, st_moe), (THEIRS, peer)):
        steps[name], module = training_step(library, case)
        torch.manual_seed(2)
        (outputs,) = steps[name]()
        found.append((outputs, {n: p.grad.clone() for n, p in module.named_parameters()}))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)
    return steps


def main(arguments: Sequence[str] | None = None, cases: Sequence[Case] = CASES) -> None:
    """Measures and prints."""
    parser = options("st_moe.py", __doc__.splitlines()[0])
    given = parser.parse_args(arguments)
    restart_with(given.malloc)
    sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
    torch.set_num_threads(given.threads)
    console, cells = Console(soft_wrap=True), []
    rows = [["", "b", "n", "d", "e", OURS, THEIRS, "times"]]
    for case in cases:
        figures = interleave(steps_of(case), given.rounds)
        cells.append({**case._asdict(), **{name: figure.values for name, figure in figures.items()}})
        ours, theirs = (statistics.median(figures[name].values) for name in (OURS, THEIRS))
        sizes = (str(size) for size in (case.sequences, case.tokens, case.dim, case.experts))
        rows.append([case.name, *sizes, number(ours), number(theirs), f"{theirs / ours:.2f}×"])
    table, facts = markdown_table(rows), machine(given.threads)
    console.print(table, markup=False, highlight=False)
    console.print(f"milliseconds of a training step, float32; {conditions(given)}")
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()), highlight=False)
    write(given, facts, cells, table)


if __name__ == "__main__":
    main(sys.argv[1:])
