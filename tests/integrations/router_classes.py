"""The classes of transformers that map tokens to experts by scores, and the options of ``topn_gating.route`` that equal each.

Run as a program, it writes the tables of docs/routers.md::

    python tests/integrations/router_classes.py
"""

import functools
import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

TOKENS, DIM, EXPERTS, TOP_N, GROUPS, OPEN = 64, 16, 8, 3, 4, 2
DOCS = Path(__file__).parents[2] / "docs/routers.md"

CONFIG = {
    **{"hidden_size": DIM, "rms_norm_eps": 1e-6, "vocab_size": TOKENS, "layer_idx": 0, "router_dtype": "float32"},
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_top_k"), TOP_N),
    **{"n_group": GROUPS, "topk_group": OPEN, "norm_topk_prob": True, "topk_method": "group_limited_greedy"},
    **dict.fromkeys(("routed_scaling_factor", "router_scaling_factor", "route_scale"), 2.5),
    **{"scoring_func": "sqrtsoftplus", "expert_selection_fn": "sigmoid", "use_expert_bias": True, "moe_norm_min": 1e-12},
    **{"moe_router_logit_softcapping": 2.0, "output_multiplier": 1.5, "zero_expert_num": 2, "router_bias": False},
    **{"router_jitter_noise": 0.0, "input_jitter_noise": 0.0, "moe_jitter_eps": None, "router_hidden_size": 12},
    **{"expert_capacity": 10, "router_ignore_padding_tokens": False, "second_expert_policy": "all"},
    **{"normalize_router_prob_before_dropping": True, "batch_prioritized_routing": False},
    **{"moe_eval_capacity_token_fraction": -1.0, "moe_normalize_expert_weights": 1, "n_shared_experts": 2},
}


@dataclass
class Choice:
    """What a class of transformers decides about tokens."""

    logits: Tensor  # (n, e)
    weights: Tensor  # (n, e) 0 where not chosen
    chosen: Tensor  # (n, e) bool


def of_pairs(logits: Tensor, weight: Tensor, expert: Tensor) -> Choice:
    """The choice of weights and experts ``(n, k)``."""
    logits, expert = logits.flatten(0, -2), expert.long()
    zeros = torch.zeros_like(logits, dtype=torch.float32)
    return Choice(logits, zeros.scatter(1, expert, weight.float()), zeros.bool().scatter(1, expert, True))


def of_outputs(router: nn.Module, x: Tensor) -> Choice:
    """The choice of a router that returns logits, weights and experts, and that may take the bias as an argument."""
    takes_bias = len(inspect.signature(type(router).forward).parameters) > 2
    return of_pairs(*(router(x, router.bias_of_the_block) if takes_bias else router(x))[:3])


def of_3d_outputs(router: nn.Module, x: Tensor) -> Choice:
    return of_outputs(router, x.unsqueeze(0))


def of_llama4(router: nn.Module, x: Tensor) -> Choice:
    weights, logits = router(x)
    return Choice(logits, weights, weights > 0)


def of_hash(router: nn.Module, x: Tensor) -> Choice:
    logits, weight, expert = router(x, router.tokens)
    return of_pairs(logits, weight, expert)


def of_dbrx(block: nn.Module, x: Tensor) -> Choice:
    logits = block.router(x)
    return of_pairs(logits, *block.route_tokens_to_experts(logits))


def of_jetmoe(router: nn.Module, x: Tensor) -> Choice:
    order, _token, weight, per_expert, logits = router(x)
    expert = torch.repeat_interleave(torch.arange(len(per_expert)), torch.tensor(per_expert))
    pairs = torch.empty_like(weight).scatter(0, order, weight), torch.empty_like(expert).scatter(0, order, expert)
    return of_pairs(logits, *(t.view(len(x), -1) for t in pairs))


def of_switch(router: nn.Module, x: Tensor) -> Choice:
    chosen, best, logits = router(x.unsqueeze(0))
    return Choice(logits[0], (chosen * best)[0], chosen[0].bool())


def of_nllb(router: nn.Module, x: Tensor) -> Choice:
    _first, weights, logits = router(x)
    return Choice(logits, weights, weights > 0)


def of_zaya(router: nn.Module, x: Tensor) -> Choice:
    """Its last class is no expert: tokens skip the layer, and their pair has no weight."""
    logits, weight, expert, _states = router(x.unsqueeze(0))
    skips = weight == 0
    choice = of_pairs(logits, weight, expert.where(~skips, logits.shape[-1] - 1))
    choice.chosen[:, -1] = False
    return choice


@dataclass(frozen=True)
class Attribute:
    """An option whose value is a tensor of the router, as ``path`` names it."""

    path: str

    def of(self, router: nn.Module) -> Tensor:
        found: Any = router
        for name in self.path.split("."):
            found = getattr(found, name)
        return found.detach().float().flatten()


BIAS, GIVEN_BIAS = Attribute("e_score_correction_bias"), Attribute("bias_of_the_block")


@dataclass(frozen=True)
class Formula:
    """Options of ``route`` in float32, and the classes that compute the same."""

    classes: str
    options: dict[str, Any]
    note: str = ""
    settings: dict[str, Any] = field(default_factory=dict)  # of the configuration, where they differ from CONFIG
    more: tuple[tuple[dict, dict], ...] = ()  # other settings, and the options that they change
    choice: Callable[[nn.Module, Tensor], Choice] = of_outputs
    after: Callable[[nn.Module, Tensor], Tensor] | None = None  # factors (n, e) of the weights, which the class has beside
    expert: Callable[[nn.Module, Tensor], Tensor] | None = None  # given experts (n, k), of router and logits
    priority: Callable[[Tensor], Tensor] | None = None  # keys (n, k), of the logits
    capacity: str | None = None  # setting that is the capacity; by default dropless

    def names(self) -> list[str]:
        return self.classes.split()

    def shown(self) -> str:
        """The options as the documentation shows them: values that are sizes by their names alone."""
        extra = {"expert": self.expert, "priority": self.priority, "capacity": self.capacity}
        options = self.options | {name: True for name, value in extra.items() if value is not None}
        return ", ".join(
            f'{k}="{v}"' if isinstance(v, str) else f"{k}={v}" if k == "normalize" else k for k, v in options.items()
        )


DEEPSEEK_V3 = {"score": "sigmoid", "select_bias": BIAS, "groups": GROUPS, "top_groups": OPEN, "normalize": True, "scale": 2.5}
SIGMOID_BIAS = {"score": "sigmoid", "select_bias": BIAS, "normalize": True}
NOT_NORMALIZED = ({"norm_topk_prob": False}, {"normalize": False})
JOINED = "Qwen2MoeTopKRouter Qwen3MoeTopKRouter Qwen3NextTopKRouter Qwen4ExpTextTopKRouter OlmoeTopKRouter FlexOlmoTopKRouter"

FORMULAS = (
    Formula(
        "MixtralTopKRouter MiniMaxTopKRouter AriaTextTopKRouter GptOssTopKRouter GraniteMoeTopKRouter "
        "GraniteMoeHybridTopKRouter GraniteMoeSharedTopKRouter GraniteMoeSWATopKRouter HunYuanMoEV1Gate "
        "Qwen3_5MoeTopKRouter Qwen3OmniMoeTextTopKRouter Qwen3VLMoeTextTopKRouter",
        {"normalize": True},
        "a softmax over the chosen logits is the normalised softmax; gpt-oss's bias is `to_gates.bias`",
    ),
    Formula("JetMoeTopKGating", {"normalize": True}, choice=of_jetmoe),
    Formula(
        f"{JOINED} MellumTopKRouter LaraMiniTopKRouter Qwen3OmniMoeThinkerTextTopKRouter Qwen3OmniMoeTalkerTextTopKRouter",
        {"normalize": True},
        "`normalize` is the configuration's `norm_topk_prob`",
        more=(NOT_NORMALIZED,),
    ),
    Formula("JambaTopKRouter", {"normalize": False}),
    Formula(
        "DbrxFFN",
        {"normalize": True},
        "where `moe_normalize_expert_weights` is 1; None does not normalise, and any other p divides by that norm",
        more=(({"moe_normalize_expert_weights": None}, {"normalize": False}),),
        choice=of_dbrx,
    ),
    Formula("OpenAIPrivacyFilterTopKRouter", {"normalize": True, "scale": 1 / TOP_N}, "`scale` is 1 / k"),
    Formula(
        "Gemma4TextRouter DiffusionGemmaTextRouter",
        {"normalize": True},
        "and `per_expert_scale[expert]` times the weight, outside; the logits are of a normalised token",
        choice=lambda router, x: of_gemma(router, x),
        after=lambda router, logits: router.per_expert_scale.expand_as(logits),
    ),
    Formula(
        "Ernie4_5_MoeTopKRouter Ernie4_5_VLMoeMoeTopKRouter",
        {"select_bias": Attribute("moe_statics.e_score_correction_bias"), "normalize": True},
        "`eps` is `moe_norm_min`",
    ),
    Formula(
        "LongcatFlashTopkRouter",
        {"select_bias": BIAS, "normalize": False, "scale": 2.5},
        "the zero experts are the last ones",
    ),
    Formula(
        "DeepseekV2TopkRouter DeepseekOcr2TextTopkRouter UnlimitedOcrTextTopkRouter",
        {"groups": GROUPS, "top_groups": OPEN, "group_score": "max", "normalize": False, "scale": 2.5},
        '`topk_method="greedy"` has no groups',
        more=(({"topk_method": "greedy"}, {"groups": None, "top_groups": None}),),
    ),
    Formula(
        "Mistral4TopkRouter MistralLarge4TextTopkRouter",
        {"groups": GROUPS, "top_groups": OPEN, "normalize": True, "scale": 2.5},
    ),
    Formula(
        "DeepseekV3TopkRouter DeepseekV32TopkRouter AXK1TopkRouter BailingHybridTopkRouter Dots1TopkRouter "
        "Dots3NoteTextTopkRouter ExaoneMoeTopkRouter Glm4MoeTopkRouter Glm4MoeLiteTopkRouter Glm4vMoeTextTopkRouter "
        "Glm5NextTextTopkRouter GlmMoeDsaTopkRouter HYV4TopkRouter HYV4VLTopkRouter KimiLinearTopkRouter "
        "MiMoV2FlashTopkRouter NemotronHTopkRouter SolarOpenTopkRouter",
        DEEPSEEK_V3,
        "`normalize` is the configuration's `norm_topk_prob`",
        more=(NOT_NORMALIZED,),
    ),
    Formula("BeamTopKRouter", {**DEEPSEEK_V3, "scale": 1.0}, more=(NOT_NORMALIZED,)),
    Formula(
        "AXK2TopkRouter",
        DEEPSEEK_V3,
        "closed experts have the score 0 there, and are chosen before open ones whose gate and bias are below 0",
        more=(NOT_NORMALIZED, ({"n_group": None}, {"groups": None, "top_groups": None})),
    ),
    Formula("MiniMaxM3VLTopKRouter Step3p7TopKRouter", SIGMOID_BIAS),
    Formula("MiniMaxM2TopKRouter", {**SIGMOID_BIAS, "select_bias": GIVEN_BIAS}, "the bias is the block's"),
    Formula(
        "HYV3TopKRouter Dots3NoteVisionTopKRouter",
        {**SIGMOID_BIAS, "select_bias": GIVEN_BIAS, "scale": 2.5},
        "the bias is the block's",
    ),
    Formula(
        "AfmoeTokenChoiceRouter",
        {**SIGMOID_BIAS, "select_bias": GIVEN_BIAS, "scale": 2.5},
        "the bias is the block's",
        choice=of_3d_outputs,
    ),
    Formula("LagunaTopKRouter", SIGMOID_BIAS, "of logits that are capped by a tanh before"),
    Formula("MuseSparkTopkRouter", {**SIGMOID_BIAS, "scale": 2.5}, "of logits times `output_multiplier`"),
    Formula(
        "Lfm2MoeTopKRouter",
        {**SIGMOID_BIAS, "select_bias": GIVEN_BIAS, "scale": 0.5},
        "the bias is the block's; 1e-6 is added to the sum there",
        settings={"routed_scaling_factor": 0.5},
        more=(({"use_expert_bias": False}, {"select_bias": None}), NOT_NORMALIZED),
    ),
    Formula("FlintTopKRouter", {"score": "sigmoid", "normalize": True}, more=(NOT_NORMALIZED,)),
    Formula(
        "Cohere2MoeTopKRouter",
        {"score": "sigmoid", "normalize": True},
        "`score` is the configuration's `expert_selection_fn`",
        more=(NOT_NORMALIZED, ({"expert_selection_fn": "softmax"}, {"score": "softmax"})),
    ),
    Formula(
        "Llama4Router", {"score": "sigmoid", "normalize": False}, "the weights multiply the experts' input", choice=of_llama4
    ),
    Formula(
        "DeepseekV4TopKRouter Inkling2TopKRouter Inkling2LoopTopKRouter",
        {"score": "sqrtsoftplus", "select_bias": BIAS, "normalize": True, "scale": 2.5},
        "`score` is the configuration's `scoring_func`",
        more=(({"scoring_func": "sigmoid"}, {"score": "sigmoid"}),),
    ),
    Formula(
        "DeepseekV4HashRouter",
        {"score": "sqrtsoftplus", "normalize": True, "scale": 2.5},
        "the experts come from a table of the vocabulary",
        choice=of_hash,
        expert=lambda router, logits: router.tid2eid[router.tokens],
    ),
    Formula(
        "Kolibri1TopKRouter",
        {"score": "sigmoid", "normalize": True},
        "the bias is added to the logits: `expert = (logits + bias).topk(k).indices`",
        more=(NOT_NORMALIZED,),
        expert=lambda router, logits: (logits + router.e_score_correction_bias).topk(TOP_N).indices,
    ),
    Formula(
        "ZayaRouter",
        {"select_bias": Attribute("balancing_biases"), "normalize": False},
        "its last class is no expert: give those pairs to none",
        choice=of_zaya,
    ),
    Formula(
        "SwitchTransformersTop1Router",
        {"normalize": False, "top_n": 1},
        "jitter multiplies the tokens before",
        choice=of_switch,
        capacity="expert_capacity",
    ),
    Formula(
        "NllbMoeTop2Router",
        {"normalize": True, "top_n": 2},
        '`second_expert_policy="all"` and weights normalised before the drop; keys for `batch_prioritized_routing`',
        choice=of_nllb,
        capacity="expert_capacity",
    ),
    Formula(
        "NllbMoeTop2Router",
        {"normalize": True, "top_n": 2},
        "`batch_prioritized_routing`: of each rank the tokens with the largest gates first",
        settings={"batch_prioritized_routing": True},
        choice=of_nllb,
        priority=lambda logits: logits.softmax(-1).amax(-1, keepdim=True) - 2 * torch.arange(2),
        capacity="expert_capacity",
    ),
)

UNEQUAL = {
    "InklingTopkRouter": "weights are normalised together with the gates of shared experts, which every token has",
    "PhimoeTopKRouter": "SparseMixer: the second expert's softmax leaves out the first, and a threshold closes experts",
    "DogeCDMoE": "product keys: an expert's score is the sum of two logits, of which each has a choice of its own",
    "VitPoseBackboneMoeMLP": "nothing is chosen: the caller gives one expert for each image",
}
# Classes that `route` equals and `patch_routers` leaves alone.
LEFT = {
    "SwitchTransformersTop1Router": "returns masks after a drop by capacity, and the gates of the dropped tokens too",
    "NllbMoeTop2Router": "returns masks and dense weights after a drop by capacity, of which the second expert may be sampled",
}
NO_ROUTERS = {
    **dict.fromkeys(("BailingHybridForgetGate", "Glm5NextTextForgetGate", "KimiLinearForgetGate"), "gates of recurrent states"),
    **dict.fromkeys(("DFineGate", "Deimv2Gate"), "a mixture of two streams"),
    **dict.fromkeys(("Inkling2LoopMessageGate", "MuseSparkResidualGate"), "gates of residual streams"),
    "GraniteDoclingDensityRouter": "chooses an image's resolution",
    "DbrxRouter": "logits alone: DbrxFFN chooses",
    "JetMoeAttention": "its experts, JetMoeMoA, have the router",
}


def of_gemma(router: nn.Module, x: Tensor) -> Choice:
    """It returns the softmax, of which these are logits."""
    gates, weight, expert = router(x)
    return of_pairs(gates.log(), weight, expert)


@functools.cache
def found() -> dict[str, str]:
    """The classes of transformers that choose experts, and the modules that define them.

    Those that are named like a router; the blocks with experts and none of these; and whatever else chooses experts by topk.
    """
    import transformers

    classes, named = {}, re.compile(r"(Router|Gate|Gating)$")
    for file in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        parts = re.split(r"^(?=class |def |@)", file.read_text(), flags=re.MULTILINE)
        sources = {m[1]: part for part in parts if (m := re.match(r"class (\w+)\(", part))}
        routers = [name for name in sources if named.search(name)]
        for name, source in sources.items():
            holds = "self.experts = " in source and not any(f"= {router}(" in source for router in routers)
            chooses = re.search(r"\btopk\(", source) and "expert" in source
            if name in routers or holds or chooses:
                classes[name] = f"transformers.models.{file.parent.name}.{file.stem}"
    return classes


def build(name: str, settings: dict[str, Any]) -> nn.Module:
    """A small router of the class with random parameters, and with a random bias that is the block's in some."""
    module = importlib.import_module(found()[name])
    config = SimpleNamespace(**CONFIG | settings)
    if name == "DbrxFFN":
        config.ffn_config, config.ffn_hidden_size = config, 4
        config.ffn_act_fn = {"name": "silu"}
        router = module.DbrxFFN.__new__(module.DbrxFFN)
        nn.Module.__init__(router)
        router.router, router.top_k = module.DbrxRouter(config), TOP_N
        router.moe_normalize_expert_weights = config.moe_normalize_expert_weights
    else:
        arguments = {"config": config, "layer_idx": 0, "input_size": DIM, "num_experts": EXPERTS, "top_k": TOP_N}
        wanted = inspect.signature(getattr(module, name).__init__).parameters
        router = getattr(module, name)(**{key: value for key, value in arguments.items() if key in wanted})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for t in (*router.parameters(), *router.buffers()):
            if t.is_floating_point():
                t.copy_(
                    torch.randn(t.shape, generator=generator) / (1 if t.dim() == 1 and "scale" in name else t.shape[-1] ** 0.5)
                )
        for key, t in (*router.named_parameters(), *router.named_buffers()):
            if "bias" in key and t.shape[-1] != DIM:
                t.copy_(0.1 * torch.rand(t.shape, generator=generator))
    router.bias_of_the_block = 0.1 * torch.rand(EXPERTS, generator=generator)
    if hasattr(router, "tid2eid"):
        router.tid2eid.copy_(torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOP_N).indices)
        router.tokens = torch.randperm(TOKENS, generator=generator)
    return router.eval()


def table() -> str:
    """The tables of docs/routers.md."""
    lines = ["| classes of transformers 5.24 | options of `route` | |", "| --- | --- | --- |"]
    for formula in FORMULAS:
        lines.append(f"| {', '.join(formula.names())} | `{formula.shown()}` | {formula.note} |")
    lines += ["", "| not equal, and left by `patch_routers` | why |", "| --- | --- |"]
    lines += [f"| {name} | {why} |" for name, why in UNEQUAL.items()]
    lines += ["", "| equal, and left by `patch_routers` | why |", "| --- | --- |"]
    lines += [f"| {name} | {why} |" for name, why in LEFT.items()]
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """The page with the present tables between its marks."""
    start, end = "<!-- router_classes.py -->\n", "<!-- end -->\n"
    return text[: text.index(start)] + start + "\n" + table() + "\n" + text[text.index(end) :]


if __name__ == "__main__":
    DOCS.write_text(page(DOCS.read_text()))
