"""patch_routers: every class of router that it replaces, against the class itself; whole models."""

import copy
import functools
import importlib
import inspect
import pickle
import re

import pytest
import router_classes
import torch
from router_classes import DIM, LEFT, TOKENS, UNEQUAL

from topn_gating.integrations.transformers import patch_routers
from topn_gating.integrations.transformers_forwards import FORWARDS
from topn_gating.integrations.transformers_routers import NO_ROUTERS, ROUTERS

transformers = pytest.importorskip("transformers", minversion="5.24")

SETTINGS, CHOICE = {}, {}  # of each class: those of the table of docs/routers.md, and how its outputs are read
for formula in router_classes.FORMULAS:
    for name in formula.names():
        SETTINGS.setdefault(name, []).extend([formula.settings] + [formula.settings | settings for settings, _ in formula.more])
        CHOICE[name] = formula.choice
SETTINGS["DbrxFFN"].append({"moe_normalize_expert_weights": 2.0})
REPLACED = [name for name in SETTINGS if name not in LEFT]


def call(name, router, x):
    """What the router decides, and the gradients of tokens and parameters."""
    x = x.clone().requires_grad_()
    choice = CHOICE[name](router, x)
    loss = (choice.weights * torch.linspace(-1, 1, choice.weights.numel()).view_as(choice.weights)).sum()
    loss = loss + choice.logits.float().square().sum()
    parameters = [p for p in router.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, [x, *parameters], materialize_grads=True, allow_unused=True)
    return choice.logits.detach(), choice.weights.detach(), choice.chosen, *grads


def method_of(name):
    return "route_tokens_to_experts" if name == "DbrxFFN" else "forward"


def test_every_class_of_the_table_is_replaced_or_left():
    assert {*ROUTERS, *FORWARDS} == set(REPLACED)
    assert not ROUTERS.keys() & FORWARDS


@pytest.mark.parametrize("name", REPLACED)
def test_equals_the_class(name):
    x = torch.randn(TOKENS, DIM)
    for settings in SETTINGS[name]:
        router = router_classes.build(name, settings)
        expected, state = call(name, router, x), copy.deepcopy(router.state_dict())
        assert patch_routers(router) == ({"": name}, {})
        torch.testing.assert_close(call(name, router, x), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(router.state_dict(), state)
        for copied in (copy.deepcopy(router), pickle.loads(pickle.dumps(router))):
            torch.testing.assert_close(call(name, copied, x), expected, rtol=1e-5, atol=1e-6)
        delattr(router, method_of(name))
        torch.testing.assert_close(call(name, router, x), expected, rtol=0, atol=0)


FLOAT32 = ("Inkling2TopKRouter", "Inkling2LoopTopKRouter")  # transformers keeps the parameters of these in float32


def arguments(name, router, x):
    """The arguments of the router's method, of tokens ``(n, d)``."""
    if name == "DbrxFFN":
        return (router.router(x).detach(),)
    taken = len(inspect.signature(getattr(type(router), method_of(name))).parameters) - 1
    x = x.unsqueeze(0) if name in ("AfmoeTokenChoiceRouter", "ZayaRouter") else x
    second = {"DeepseekV4HashRouter": getattr(router, "tokens", None), "ZayaRouter": None}
    return (x, second.get(name, router.bias_of_the_block))[:taken]


@pytest.mark.parametrize("name", [name for name in REPLACED if name not in FLOAT32])
def test_types_of_a_bfloat16_router(name):
    """Shapes and types of all outputs, and the values of the logits."""
    router = router_classes.build(name, {}).bfloat16()
    x = torch.randn(TOKENS, DIM, dtype=torch.bfloat16)
    given, logits = arguments(name, router, x), CHOICE[name](router, x).logits
    expected = getattr(router, method_of(name))(*given)
    patch_routers(router)
    torch.testing.assert_close(CHOICE[name](router, x).logits, logits)
    actual = getattr(router, method_of(name))(*given)
    assert type(actual) is type(expected)
    assert [getattr(t, "dtype", type(t)) for t in actual] == [getattr(t, "dtype", type(t)) for t in expected]
    assert [getattr(t, "shape", None) for t in actual] == [getattr(t, "shape", None) for t in expected]


UNDER_AUTOCAST = [*FORWARDS, "AfmoeTokenChoiceRouter", "AXK2TopkRouter", "Kolibri1TopKRouter", "DeepseekV4HashRouter"]


@pytest.mark.parametrize("name", UNDER_AUTOCAST)
def test_types_under_autocast(name):
    """Not of the classes that are computed in float32 there: docs/transformers.md."""
    router, x = router_classes.build(name, {}), torch.randn(TOKENS, DIM)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        given = arguments(name, router, x)
        expected, choice = getattr(router, method_of(name))(*given), CHOICE[name](router, x)
        patch_routers(router)
        actual, ours = getattr(router, method_of(name))(*given), CHOICE[name](router, x)
    assert [getattr(t, "dtype", type(t)) for t in actual] == [getattr(t, "dtype", type(t)) for t in expected]
    torch.testing.assert_close(ours.logits, choice.logits)
    same = (ours.chosen == choice.chosen).all(-1)  # of bfloat16 gates some are equal
    assert same.float().mean() >= 0.95
    torch.testing.assert_close(ours.weights[same], choice.weights[same], rtol=2e-2, atol=1e-2)


def test_closed_experts_of_axk2():
    """They have the score 0, and are chosen where an open one's gate and bias are below 0."""
    router, x = router_classes.build("AXK2TopkRouter", {}), torch.randn(TOKENS, DIM)
    router.e_score_correction_bias.sub_(1.0)
    expected = call("AXK2TopkRouter", router, x)
    groups = expected[2].view(TOKENS, router_classes.GROUPS, -1).any(-1).sum(-1)
    assert (groups > router_classes.OPEN).any()
    patch_routers(router)
    torch.testing.assert_close(call("AXK2TopkRouter", router, x), expected, rtol=1e-5, atol=1e-6)


def test_sums_of_lfm2_that_are_as_small_as_its_1e_6():
    router = router_classes.build("Lfm2MoeTopKRouter", {"use_expert_bias": False})
    torch.nn.init.constant_(router.weight, -1.0)
    x = torch.full((1, DIM), 14 / DIM)  # gates of 8e-7
    expected = router(x)
    assert (expected[1].sum() - router.routed_scaling_factor).abs() > 0.01
    patch_routers(router)
    torch.testing.assert_close(router(x)[:2], expected[:2])


def test_a_hash_of_equal_experts():
    """As transformers leaves the table before a checkpoint is loaded."""
    router, x = router_classes.build("DeepseekV4HashRouter", {}), torch.randn(3, DIM, requires_grad=True)
    router.tid2eid.zero_()
    ids = torch.arange(3)
    expected = router(x, ids)
    gradient = torch.autograd.grad(expected[1].square().sum(), x)
    patch_routers(router)
    actual = router(x, ids)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual[1].square().sum(), x), gradient)
    with pytest.raises(TypeError, match="DeepseekV4HashRouter needs input_ids"):
        router(x)


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


@pytest.mark.parametrize("name", ["InklingTopkRouter", "PhimoeTopKRouter", *LEFT])
def test_routers_that_it_leaves_alone(name):
    router = router_classes.build(name, {})
    assert patch_routers(torch.nn.ModuleDict({"gate": router})) == ({}, {"gate": name})
    assert "forward" not in vars(router)


def test_vitpose_is_left():
    """Its experts are given by the caller; Doge's block is in tests/models."""
    module = importlib.import_module("transformers.models.vitpose_backbone.modeling_vitpose_backbone")
    block = module.VitPoseBackboneMoeMLP(transformers.VitPoseBackboneConfig(hidden_size=8, num_experts=2, part_features=2))
    assert patch_routers(torch.nn.ModuleDict({"mlp": block})) == ({}, {"mlp": "VitPoseBackboneMoeMLP"})


def test_blocks_whose_router_has_no_name():
    """As in transformers 4, and in models that bring their code: the block itself is named."""

    class Block(torch.nn.Module):
        def __init__(self, **modules):
            super().__init__()
            for name, module in modules.items():
                self.add_module(name, module)

    class MoEGate(torch.nn.Linear):
        pass

    experts = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    by_method = Block(gate=torch.nn.Linear(2, 2), experts=experts)
    assert patch_routers(Block(layers=torch.nn.ModuleList([Block(mlp=by_method)]))) == ({}, {"layers.0.mlp": "Block"})
    assert patch_routers(by_method) == ({}, {"": "Block"})
    assert patch_routers(Block(mlp=Block(router_gate=torch.nn.Linear(2, 2)))) == ({}, {"mlp": "Block"})
    named = Block(mlp=Block(gate=MoEGate(2, 2), experts=experts), gate=Block())
    assert patch_routers(named) == ({}, {"mlp.gate": "MoEGate"})
    mixed = Block(a=by_method, b=Block(gate=router_classes.build("MixtralTopKRouter", {}), experts=experts))
    assert patch_routers(mixed) == ({"b.gate": "MixtralTopKRouter"}, {"a": "Block"})


def test_a_class_of_the_same_name_elsewhere_is_left():
    class MixtralTopKRouter(torch.nn.Linear):
        pass

    assert patch_routers(MixtralTopKRouter(2, 2)) == ({}, {"": "MixtralTopKRouter"})


@pytest.mark.parametrize("name", ["MixtralTopKRouter", "Llama4Router"])
def test_a_router_that_something_else_has_replaced_is_left(name):
    """As accelerate does for device_map: its hooks must not be lost. Patched twice is patched."""
    router = router_classes.build(name, {})
    assert patch_routers(router) == patch_routers(router) == ({"": name}, {})
    other = router.forward = functools.partial(lambda router, x: x, router)
    assert patch_routers(router) == ({}, {"": name})
    assert router.forward is other


def test_gates_that_choose_no_experts():
    module = importlib.import_module("transformers.models.d_fine.modeling_d_fine")
    assert patch_routers(module.DFineGate(4)) == ({}, {})
    for name in router_classes.NO_ROUTERS:
        named = re.search("(Router|Gate|Gating)$", name)
        assert not named or NO_ROUTERS.search(name) or name == "DbrxRouter"
    assert not any(NO_ROUTERS.search(name) for name in (*REPLACED, *LEFT, *UNEQUAL))


def test_the_model_must_be_a_module():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        patch_routers("model")


def test_the_docs_say_how_many():
    text = (router_classes.DOCS.parent / "transformers.md").read_text()
    assert f"for {len(REPLACED)} classes of routers" in text
    assert len(LEFT | UNEQUAL) == 6
    assert "six classes are left" in text


ONE_GRAPH = ("MixtralTopKRouter", "DeepseekV3TopkRouter", "AfmoeTokenChoiceRouter", "AXK2TopkRouter", "Kolibri1TopKRouter")
ONE_GRAPH += ("Gemma4TextRouter", "Lfm2MoeTopKRouter", "Llama4Router", "ZayaRouter", "DbrxFFN", "DeepseekV4HashRouter")


@pytest.mark.parametrize("name", ONE_GRAPH)
def test_compile_and_export_make_one_graph(name):
    """All but JetMoe, whose class has lists of sizes."""
    router, x = router_classes.build(name, {}), torch.randn(TOKENS, DIM)
    patch_routers(router)
    given = arguments(name, router, x)
    expected = getattr(router, method_of(name))(*given)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *given: getattr(router, method_of(name))(*given), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), expected)
    if name != "DbrxFFN":  # of which this is a method
        torch.testing.assert_close(torch.export.export(router, given).module()(*given), expected)
