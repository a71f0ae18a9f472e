"""The presets of docs/routers.md: each line makes the router of the model's own class, or of its paper."""

import re

import pytest
import torch
from router_classes import DIM, DOCS, build, of_outputs
from st_moe_pytorch.st_moe_pytorch import TopNGating as StMoeGating

from topn_gating import TopNGating

TOKENS = 48
LINES = dict(re.findall(r"^\| ([^|]+?) \| `(TopNGating\(.*?\))` \|", DOCS.read_text(), re.MULTILINE))
# The class of transformers, and the settings of its configuration that differ from those of router_classes.CONFIG.
CLASSES = {
    "Mixtral": ("MixtralTopKRouter", {}),
    "Qwen3-MoE": ("Qwen3MoeTopKRouter", {"norm_topk_prob": True}),
    "OLMoE": ("OlmoeTopKRouter", {"norm_topk_prob": False}),
    "DeepSeek-V2": ("DeepseekV2TopkRouter", {"n_group": 8, "topk_group": 3, "routed_scaling_factor": 16.0}),
    "DeepSeek-V3": ("DeepseekV3TopkRouter", {"n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5}),
    "gpt-oss": ("GptOssTopKRouter", {}),
    "Llama 4": ("Llama4Router", {}),
    "ERNIE 4.5": ("Ernie4_5_MoeTopKRouter", {"moe_norm_min": 1e-12}),
    "GLM-4.5": ("Glm4MoeTopkRouter", {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}),
    "LongCat-Flash": (
        "LongcatFlashTopkRouter",
        {"n_routed_experts": 512, "zero_expert_num": 256, "routed_scaling_factor": 6.0},
    ),
    "Switch Transformer": ("SwitchTransformersTop1Router", {}),
}
BY_PAPER = ("GShard", "ST-MoE")


def gate_of(model: str) -> TopNGating:
    return eval(LINES[model], {"TopNGating": TopNGating, "dim": DIM})


def test_every_preset_is_tested():
    assert set(LINES) == {*CLASSES, *BY_PAPER}


def of_class(model: str):
    """The gate with the parameters of the model's router, and that router."""
    gate, (name, settings) = gate_of(model), CLASSES[model]
    sizes = dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok"), gate.num_gates)
    sizes |= {"num_experts_per_tok": gate.top_n, "expert_capacity": gate.capacity(TOKENS)}
    router = build(name, sizes | settings)
    parameters = dict(router.named_parameters()) | dict(router.named_buffers())
    weight = [t for key, t in parameters.items() if t.shape == (gate.num_gates, DIM)]
    with torch.no_grad():
        gate.to_gates.weight.copy_(weight[0])
        if gate.to_gates.bias is not None:
            gate.to_gates.bias.copy_(parameters["bias"])
        if gate.select_bias is not None:
            gate.select_bias.copy_(next(t for key, t in parameters.items() if "e_score_correction_bias" in key).flatten())
    return gate, router


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("model", sorted(CLASSES))
def test_of_a_class(model, training):
    gate, router = of_class(model)
    x = torch.randn(TOKENS, DIM)
    gate.train(training)
    with torch.no_grad():
        routing = gate.route(x)
        dense = torch.zeros(TOKENS, gate.num_gates)
        ours = dense.scatter(1, routing.expert.long(), routing.weight)
        if model == "Llama 4":
            theirs = router(x)[0].where(ours > 0, 0)
        elif model == "Switch Transformer":
            router.expert_capacity = gate.capacity(TOKENS)
            chosen, best, _ = router(x.unsqueeze(0))
            theirs = (chosen * best)[0]
        else:
            theirs = of_outputs(router, x).weights.where(ours > 0, 0)  # but for the pairs over capacity
    assert (ours > 0).sum() == (routing.slot >= 0).sum() > TOKENS / 2
    assert (ours - theirs).abs().max() <= 1e-6 * max(gate.scale, 1)


def test_gshard():
    gate, x = gate_of("GShard"), torch.randn(TOKENS, DIM)
    torch.manual_seed(3)
    routing = gate.route(x)
    torch.manual_seed(3)
    draws = torch.rand(TOKENS, 2)
    best = gate.logits(x).double().softmax(-1).topk(2)
    weight = best.values / best.values.sum(-1, keepdim=True)
    routed = torch.stack([torch.ones(TOKENS, dtype=torch.bool), 2 * weight[:, 1] > draws[:, 1]], -1)
    assert torch.equal(routing.expert.long(), best.indices)
    assert torch.equal(routing.slot != -1, routed)
    assert 0 < routed[:, 1].sum() < TOKENS
    torch.testing.assert_close(routing.weight.double(), weight.where(routing.slot >= 0, 0), atol=1e-6, rtol=0)


def test_st_moe():
    """The gate of st-moe-pytorch with its defaults, on the same draws."""
    gate = gate_of("ST-MoE")
    theirs = StMoeGating(DIM, gate.num_gates)
    theirs.load_state_dict(gate.state_dict())
    x = torch.randn(2, TOKENS, DIM)
    for training in (True, False):
        results = []
        for module in (gate.train(training), theirs.train(training)):
            torch.manual_seed(3)
            results.append(module(x)[:2])
        for mine, peer in zip(*results, strict=True):
            torch.testing.assert_close(mine, peer, atol=1e-6, rtol=1e-6)
