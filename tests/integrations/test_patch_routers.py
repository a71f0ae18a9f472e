"""patch_routers: every class of router that it replaces, against the class itself; whole models."""

import copy

import pytest
import router_classes
import torch

from topn_gating.integrations.transformers import patch_routers
from topn_gating.integrations.transformers_routers import ROUTERS

transformers = pytest.importorskip("transformers", minversion="5.24")

DIM, EXPERTS = router_classes.DIM, router_classes.EXPERTS
SETTINGS = {}  # of each class, those of the table of docs/routers.md
for formula in router_classes.FORMULAS:
    for name in formula.names():
        SETTINGS.setdefault(name, []).extend([formula.settings] + [formula.settings | settings for settings, _ in formula.more])


def call(router, x):
    """What the router returns, with weights of all experts, and the gradients of tokens and parameters."""
    x = x.clone().requires_grad_()
    takes_bias = type(router).__name__ in ("MiniMaxM2TopKRouter", "HYV3TopKRouter", "Dots3NoteVisionTopKRouter")
    logits, weight, expert = router(x, router.bias_of_the_block) if takes_bias else router(x)
    dense = torch.zeros(logits.shape, dtype=weight.dtype).scatter(1, expert, weight)
    parameters = [p for p in router.parameters() if p.requires_grad]
    loss = (dense.float() * torch.linspace(-1, 1, dense.numel()).view_as(dense)).sum() + logits.float().square().sum()
    grads = torch.autograd.grad(loss, [x, *parameters], materialize_grads=True, allow_unused=True)
    return logits.detach(), dense.detach(), *grads


@pytest.mark.parametrize("name", ROUTERS)
def test_equals_the_class(name):
    x = torch.randn(24, DIM)
    for settings in SETTINGS[name]:
        router = router_classes.build(name, settings)
        expected, state = call(router, x), copy.deepcopy(router.state_dict())
        assert patch_routers(router) == ({"": name}, {})
        torch.testing.assert_close(call(router, x), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(router.state_dict(), state)
        torch.testing.assert_close(call(copy.deepcopy(router), x), expected, rtol=1e-5, atol=1e-6)
        del router.forward
        torch.testing.assert_close(call(router, x), expected, rtol=0, atol=0)


FLOAT32 = ("Inkling2TopKRouter", "Inkling2LoopTopKRouter")  # transformers keeps the parameters of these in float32


@pytest.mark.parametrize("name", [name for name in ROUTERS if name not in FLOAT32])
def test_types_of_a_bfloat16_router(name):
    router = router_classes.build(name, {}).bfloat16()
    x = torch.randn(24, DIM, dtype=torch.bfloat16)
    expected = call(router, x)
    patch_routers(router)
    actual = call(router, x)
    assert [t.dtype for t in actual] == [t.dtype for t in expected]
    torch.testing.assert_close(actual[0], expected[0])


SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SMALL |= {"num_key_value_heads": 2, "head_dim": 8, "moe_intermediate_size": 24, "pad_token_id": 0}
MODELS = {
    "Mixtral": {"num_local_experts": 4, "output_router_logits": True},
    "Qwen3Moe": {"num_experts": 8, "num_experts_per_tok": 3, "output_router_logits": True},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "DeepseekV3": {
        **{"n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "q_lora_rank": 8},
        **{"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "first_k_dense_replace": 1},
        "head_dim": 4,
    },
}


def loss_and_gradients(model, data):
    model.zero_grad()
    out = model(input_ids=data, labels=data)
    out.loss.backward()
    return out.loss.detach(), out.logits.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    """The auxiliary loss, which transformers computes of the logits that it records, included."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL | MODELS[name])
    model = transformers.AutoModelForCausalLM.from_config(config)
    data = torch.randint(1, 32, (2, 12))
    expected, state = loss_and_gradients(model, data), copy.deepcopy(model.state_dict())
    done = patch_routers(model)
    assert len(done.replaced) == (1 if name == "DeepseekV3" else 2)
    assert done.left == {}
    torch.testing.assert_close(loss_and_gradients(model, data), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.state_dict(), state)


def test_routers_that_it_leaves_alone():
    router = router_classes.build("PhimoeTopKRouter", {})
    assert patch_routers(torch.nn.ModuleDict({"router": router})) == ({}, {"router": "PhimoeTopKRouter"})
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        patch_routers("model")


def test_the_docs_say_how_many():
    assert f"for {len(ROUTERS)} classes of routers" in (router_classes.DOCS.parent / "transformers.md").read_text()


@pytest.mark.parametrize("name", ["MixtralTopKRouter", "DeepseekV3TopkRouter"])
def test_compile_makes_one_graph(name):
    router, x = router_classes.build(name, {}), torch.randn(24, DIM)
    expected = call(router, x)
    patch_routers(router)
    torch.testing.assert_close(call_compiled(router, x), expected[0])


def call_compiled(router, x):
    return torch.compile(router, backend="aot_eager", fullgraph=True)(x)[0].detach()
