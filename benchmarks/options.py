"""Times what the router's options cost, and routers beside those of transformers, Megatron-core and torchtitan, on the CPU.

    PYTHONPATH=. python benchmarks/options.py [--tokens 16384] [--experts 256] [--top-n 8] [--rounds 15] [--dtypes float32]

All calls start from the same logits, and are timed in interleaved rounds in one process. Results that differ are not timed.
"""

import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType, SimpleNamespace
from unittest import mock

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
WHOSE = ("Megatron-core", "torchtitan")  # whose classes of routers are timed beside ours of the same interface

Router = Callable[[Tensor], Sequence[Tensor]]  # from logits to weights (n, k) and experts, or to weights (n, e) and a map


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


def side_by_side(routers: Mapping[str, Router], logits: Tensor, what: str = "") -> dict[str, Step]:
    """Steps of routers, the first of which is ours, once their weights and gradients are the same."""
    into, found = torch.randn(logits.shape), []
    for router in routers.values():
        x = logits.clone().requires_grad_()
        weight, expert = router(x)[:2]
        if expert.dtype != torch.bool:
            weight = torch.zeros(logits.shape, dtype=weight.dtype).scatter(1, expert.long(), weight)
        found.append((weight.detach().float(), torch.autograd.grad(weight, x, into.to(weight.dtype))[0]))
    for result in found[1:]:
        alike = ((found[0][0] > 0) == (result[0] > 0)).all(1)  # but for scores that differ by less than rounding
        if alike.sum() < 0.999 * len(alike):
            raise AssertionError(f"{(~alike).sum()} of {len(alike)} tokens have other experts")
        for one, other in zip(found[0], result, strict=True):
            near = {"atol": 1e-5, "rtol": 1e-2 if logits.dtype != torch.float32 else 1e-4}
            torch.testing.assert_close(one[alike], other[alike], **near)

    leaf, steps = logits.clone().requires_grad_(), {}
    for name, router in routers.items():
        grad = torch.randn_like(router(leaf)[0].detach())
        steps[f"{name}: {what}forward"] = torch.no_grad()(lambda router=router: router(leaf))
        steps[f"{name}: {what}forward + backward"] = lambda router=router, grad=grad: torch.autograd.grad(
            router(leaf)[0], leaf, grad
        )
    return steps


def beside_transformers(shape: Shape, dtype: torch.dtype) -> dict[str, Step]:
    """Steps of DeepSeek-V3's router, by ``route`` and by transformers."""
    torch.manual_seed(0)
    logits, bias = torch.randn(shape.n, shape.e, dtype=dtype), 0.1 * torch.rand(shape.e)
    given = {"score": "sigmoid", "select_bias": bias, "groups": GROUPS, "top_groups": OPEN, "scale": SCALE, "eps": 1e-20}

    def ours(logits: Tensor) -> tuple[Tensor, Tensor]:
        routing = topn_gating.route(logits, shape.k, dropless=True, losses=False, **given)
        return routing.weight, routing.expert

    return side_by_side({OURS: ours, THEIRS: deepseek_v3(shape, bias)}, logits)


def of_megatron(shape: Shape, bias: Tensor | None) -> Iterator[Router]:
    """Our subclass of Megatron-core's ``TopKRouter``, and the class: a softmax of the chosen, or with a bias DeepSeek-V3's."""
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.transformer_config import TransformerConfig

    from topn_gating.integrations import megatron

    options = {"num_moe_experts": shape.e, "moe_router_topk": shape.k, "moe_router_load_balancing_type": "none"}
    if bias is not None:
        options |= {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
        options |= {"moe_router_num_groups": GROUPS, "moe_router_group_topk": OPEN, "moe_router_topk_scaling_factor": SCALE}
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, use_cpu_initialization=True, **options)
    for kind in (megatron.TopKRouter, TopKRouter):
        with mock.patch("torch.cuda.current_device", return_value="cpu"):
            router = kind(config, mock.Mock())
        if bias is not None:
            router.expert_bias.copy_(bias)
        yield lambda logits, router=router: router.routing(logits.unsqueeze(1))


def of_torchtitan(shape: Shape, bias: Tensor | None) -> Iterator[Router]:
    """Our subclass of torchtitan's router, and the class: a normalised softmax, or with a bias DeepSeek-V3's."""
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import TokenChoiceTopKRouter

    from topn_gating.integrations import torchtitan

    options = {"score_func": "softmax"}
    if bias is not None:
        options = {"score_func": "sigmoid", "num_expert_groups": GROUPS, "num_limited_groups": OPEN, "route_scale": SCALE}
    gate = Linear.Config(in_features=1, out_features=1)
    for kind in (torchtitan.TokenChoiceTopKRouter, TokenChoiceTopKRouter):
        router = kind.Config(num_experts=shape.e, gate=gate, top_k=shape.k, route_norm=True, **options).build()
        router.gate = torch.nn.Identity()  # from the logits on
        yield lambda logits, router=router: [t[0] for t in router(logits.unsqueeze(0), bias)]


def beside_classes(shape: Shape, dtype: torch.dtype) -> dict[str, Step]:
    """Steps of two routers by the classes of :data:`WHOSE` and by ours of the same interface, in float32 alone.

    Among rounded scores many are equal, of which each class may take its own.
    """
    steps: dict[str, Step] = {}
    if dtype != torch.float32:
        return steps
    torch.manual_seed(0)
    logits, biases = torch.randn(shape.n, shape.e), {"softmax": None, "DeepSeek-V3": 0.1 * torch.rand(shape.e)}
    for peer, make in zip(WHOSE, (of_megatron, of_torchtitan), strict=True):
        for name, bias in biases.items():
            try:
                routers = dict(zip((f"{OURS} in {peer}", peer), make(shape, bias), strict=True))
            except ImportError as error:
                print(f"{peer} is left out: {error}")
                break
            steps |= side_by_side(routers, logits, f"{name}, ")
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
    if whose in (OURS, THEIRS):
        return f"{OURS}: {what}"
    peers = [peer for peer in WHOSE if whose.endswith(peer)]
    return f"{OURS} in {peers[0]}: {what}" if peers else f"{whose}: {DEFAULT}"


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
        for compared in (beside_transformers, beside_classes, costs):
            with warnings.catch_warnings():  # of packages that miss a GPU
                warnings.simplefilter("ignore")
                figures = interleave(compared(shape, getattr(torch, name)), given.rounds)
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
