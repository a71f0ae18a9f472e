"""Times what the router's options cost, and DeepSeek-V3's router beside the one of transformers, on the CPU.

    PYTHONPATH=. python benchmarks/options.py [--tokens 16384] [--experts 256] [--top-n 8] [--rounds 15] [--dtypes float32]

All calls start from the same logits, and are timed in interleaved rounds in one process. Results that differ are not timed.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from types import FunctionType, SimpleNamespace

import torch
from command import conditions, machine, options, restart_with, write
from operators import Problem, operator
from rich.console import Console
from rounds import Step, fresh, interleave
from shapes import Shape
from tables import markdown_table, number
from torch import Tensor

import topn_gating
from topn_gating.ops import GROUP_SCORES, SCORES

GROUPS, OPEN, SCALE = 8, 4, 2.5
DEFAULT, OURS, THEIRS = "default", "topn_gating", "transformers"


def deepseek_v3(shape: Shape, bias: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The router of transformers' DeepSeek-V3 from its logits on: weights and experts ``(n, k)``."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as modeling

    config = {"n_routed_experts": shape.e, "num_local_experts": shape.e, "num_experts_per_tok": shape.k, "hidden_size": shape.e}
    config |= {"n_group": GROUPS, "topk_group": OPEN, "norm_topk_prob": True, "routed_scaling_factor": SCALE}
    router = modeling.DeepseekV3TopkRouter(SimpleNamespace(**config))
    router.e_score_correction_bias.copy_(bias)
    without_product = {**vars(modeling), "F": SimpleNamespace(linear=lambda x, weight: x)}
    forward = FunctionType(type(router).forward.__code__, without_product)
    return lambda logits: forward(router, logits)[1:3]


def beside_transformers(shape: Shape, dtype: torch.dtype) -> dict[str, Step]:
    """The steps, by what they compute and whose they are."""
    torch.manual_seed(0)
    logits, bias = torch.randn(shape.n, shape.e, dtype=dtype), 0.1 * torch.rand(shape.e)
    theirs = deepseek_v3(shape, bias)
    given = {"score": "sigmoid", "select_bias": bias, "groups": GROUPS, "top_groups": OPEN, "scale": SCALE, "eps": 1e-20}

    def ours(logits: Tensor) -> tuple[Tensor, Tensor]:
        routing = topn_gating.route(logits, shape.k, dropless=True, losses=False, **given)
        return routing.weight, routing.expert

    grad = torch.randn(shape.n, shape.k)
    found = []
    for router in (ours, theirs):
        x = logits.clone().requires_grad_()
        weight, expert = router(x)
        dense = torch.zeros(shape.n, shape.e).scatter(1, expert.long(), weight.float())
        order = expert.long().sort(-1).indices
        found.append(
            (dense, torch.autograd.grad(weight, x, torch.empty_like(grad).scatter(1, order, grad).to(weight.dtype))[0])
        )
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-2 if dtype != torch.float32 else 1e-4)

    leaf = logits.requires_grad_()
    steps: dict[str, Step] = {}
    for name, router in ((OURS, ours), (THEIRS, theirs)):
        steps[f"{name}: forward"] = torch.no_grad()(lambda router=router: router(leaf))
        steps[f"{name}: forward + backward"] = lambda router=router: torch.autograd.grad(router(leaf)[0], leaf, grad)
    return steps


def of_operator(problem: Problem, name: str, variants: dict[str, dict]) -> dict[str, Step]:
    """Steps of an operator with its default arguments and with others."""
    arguments = problem.arguments(name)
    return {f"{name}: {title}": lambda more=more: operator(name)(**arguments | more) for title, more in variants.items()}


def costs(shape: Shape, dtype: torch.dtype) -> dict[str, Step]:
    """Steps of ``gate`` and ``assign`` with each option, the default first."""
    problem = Problem(shape, dtype, "cpu")
    bias, sigmoid = 0.1 * torch.rand(shape.e), {"score": SCORES.index("sigmoid")}
    groups = {"expert_groups": GROUPS, "top_groups": OPEN, "group_score": GROUP_SCORES.index("top2")}
    router = {**sigmoid, "select_bias": bias, **groups}
    return {
        **of_operator(
            problem,
            "gate",
            {
                DEFAULT: {},
                "statistics": {"statistics": True},
                "all ranks counted": {"all_ranks": True},
                "no losses": {"losses": False},
                "bias": {"select_bias": bias},
                "groups": groups,
                "sigmoid": sigmoid,
                "sqrtsoftplus": {"score": SCORES.index("sqrtsoftplus")},
                "sigmoid, bias, groups": router,
                "sigmoid, bias, groups, statistics": {**router, "statistics": True},
                "given experts": {"given": problem.expert},
            },
        ),
        **of_operator(problem, "assign", {DEFAULT: {}, "priority by weight": {"keys": problem.weight}}),
    }


def compared_with(call: str) -> str:
    """The call whose time is 1."""
    whose, _, what = call.partition(": ")
    return f"{OURS}: {what}" if whose in (OURS, THEIRS) else f"{whose}: {DEFAULT}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = options("options.py", __doc__.splitlines()[0])
    parser.set_defaults(dtypes=["float32"], rounds=15)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--top-n", type=int, default=8)
    given = parser.parse_args(arguments)
    restart_with(given.malloc)
    torch.set_num_threads(given.threads)
    shape, console, rows, cells = Shape(1, given.tokens, 8, given.experts, given.top_n), Console(soft_wrap=True), [], []
    for name in given.dtypes:
        fresh()
        for steps in (beside_transformers(shape, getattr(torch, name)), costs(shape, getattr(torch, name))):
            figures = interleave(steps, given.rounds)
            cells += [{"call": call, "dtype": name, "ms": figure.values} for call, figure in figures.items()]
            medians = {call: statistics.median(figure.values) for call, figure in figures.items()}
            rows += [[call, name, number(ms), f"{ms / medians[compared_with(call)]:.2f}"] for call, ms in medians.items()]
    table, facts = markdown_table([["call", "type", "ms", "ratio"], *rows]), machine(given.threads)
    console.print(table, markup=False, highlight=False)
    console.print(f"{given.tokens} tokens, {given.experts} experts, top {given.top_n}; {conditions(given)}")
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()), highlight=False)
    write(given, facts, cells, table)


if __name__ == "__main__":
    main(sys.argv[1:])
