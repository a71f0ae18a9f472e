"""topn_gating as an experts implementation of transformers: against its own, outputs and all gradients."""

import copy
import importlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from topn_gating import GLUExperts, MoE, route
from topn_gating.integrations.transformers import register

transformers = pytest.importorskip("transformers", minversion="5")

NAME = register()
DIM, HIDDEN = 16, 24


def config(model):
    """A small configuration. Nothing is downloaded."""
    _, _, options = MODELS[model]
    options = {
        **{
            "vocab_size": 32,
            "hidden_size": DIM,
            "num_hidden_layers": 2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": HIDDEN},
        **options,
    }
    return getattr(transformers, f"{model}Config")(**options)


QWEN3 = {"moe_intermediate_size": HIDDEN, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True}
DEEPSEEK = {"moe_intermediate_size": HIDDEN, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2}
DEEPSEEK |= {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "head_dim": 4}
DEEPSEEK |= {"first_k_dense_replace": 1, "n_shared_experts": 2}
MODELS = {  # the module of its layers, the class of its mixture of experts, what is special to its configuration
    "Mixtral": ("mixtral", "MixtralSparseMoeBlock", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen3Moe": ("qwen3_moe", "Qwen3MoeSparseMoeBlock", QWEN3),
    "Olmoe": ("olmoe", "OlmoeSparseMoeBlock", {"num_experts": 8, "num_experts_per_tok": 3}),
    "DeepseekV3": ("deepseek_v3", "DeepseekV3MoE", DEEPSEEK),
    "GptOss": ("gpt_oss", "GptOssMLP", {"num_local_experts": 4, "num_experts_per_tok": 2, "swiglu_limit": 0.7}),
}
models = pytest.mark.parametrize("model", MODELS)


def class_of(folder, name):
    return getattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), name)


def randomised(module):
    """The module with random parameters, in eval mode."""
    for name, t in (*module.named_parameters(), *module.named_buffers()):
        if isinstance(t, nn.Parameter) or name.endswith("e_score_correction_bias"):
            nn.init.normal_(t, std=0.4)
    return module.eval()


def block_of(model, dtype=torch.float32):
    """One layer's mixture of experts."""
    folder, name, _ = MODELS[model]
    return randomised(class_of(folder, name)(config(model))).to(dtype)


def choose(module, implementation):
    """Chooses the experts implementation of a module of transformers that is no model."""
    for m in module.modules():
        if hasattr(m, "config"):
            m.config._experts_implementation = implementation
    return module


def first(out):
    return out[0] if isinstance(out, tuple) else out


def gradients(module, call, *inputs):
    """The output of a call, and the gradients of its floating inputs and of all parameters."""
    inputs = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    module.zero_grad()
    out = first(call(*inputs))
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(out.dtype))
    leaves = [*(t for t in inputs if t.requires_grad), *module.parameters()]
    return [out.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in leaves)]


def run(module, implementation, *inputs):
    """The same of a module of transformers that is no model."""
    return gradients(module, choose(module, implementation), *inputs)


def assert_near(actual, expected, tolerance=1e-5):
    """Equal but for ``tolerance``, relative to the largest value of each tensor."""
    for a, b in zip(actual, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        largest = b.abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * largest)


def tokens(kind, dtype=torch.float32):
    """Tokens in several shapes; ``alike`` all go to the same experts, as padding does."""
    shape = {"some": (2, 9), "one": (1, 1), "alike": (2, 9), "many": (2, 150)}[kind]
    return torch.randn(1, 1, DIM, dtype=dtype).repeat(*shape, 1) if kind == "alike" else torch.randn(*shape, DIM, dtype=dtype)


@pytest.mark.parametrize("kind", ["some", "one", "alike", "many"])
@models
def test_blocks(model, kind):
    block, x = block_of(model), tokens(kind)
    actual = run(block, NAME, x)
    for theirs in ("eager", "grouped_mm"):
        assert_near(actual, run(block, theirs, x))


@pytest.mark.parametrize("kind", ["some", "one", "alike"])
@models
def test_experts_in_float64(model, kind):
    """The experts alone, since the routers compute in float32."""
    experts, x = block_of(model, torch.float64).experts, tokens(kind, torch.float64).flatten(0, 1)
    weight = torch.rand(len(x), 2, dtype=torch.float64)
    index = torch.rand(len(x), experts.down_proj.shape[0]).argsort()[:, :2]
    inputs = x, index, weight
    assert_near(run(experts, NAME, *inputs), run(experts, "eager", *inputs), 1e-13)


@models
def test_experts_in_bfloat16(model):
    """As near to exact results as transformers' own."""
    experts = block_of(model, torch.bfloat16).experts
    x, weight = tokens("many", torch.bfloat16).flatten(0, 1), torch.rand(300, 2).bfloat16()
    index = torch.rand(len(x), experts.down_proj.shape[0]).argsort()[:, :2]
    exact = run(copy.deepcopy(experts).double(), "eager", x.double(), index, weight.double())
    errors = []
    for implementation in (NAME, "eager", "grouped_mm"):
        actual = run(experts, implementation, x, index, weight)
        assert [t.dtype for t in actual] == [torch.bfloat16] * len(actual)
        errors.append([(a.double() - e).norm() / e.norm() for a, e in zip(actual, exact, strict=True)])
    for ours, *theirs in zip(*errors, strict=True):
        assert ours <= 1.1 * max(theirs)


@models
def test_empty_input(model):
    assert first(choose(block_of(model), NAME)(torch.zeros(2, 0, DIM))).shape == (2, 0, DIM)


@pytest.mark.parametrize("autocast", [True, False])
@models
def test_models(model, autocast):
    made, ids = randomised(transformers.AutoModelForCausalLM.from_config(config(model))), torch.randint(3, 32, (2, 13))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0

    def results(implementation):
        made.set_experts_implementation(implementation)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return gradients(made, lambda ids: made(input_ids=ids, attention_mask=mask).logits, ids)

    if autocast:
        assert all(t.isfinite().all() for t in results(NAME))
    else:
        assert_near(results(NAME), results("eager"))
        assert_near(results(NAME), results("grouped_mm"))


def test_from_config_and_generation():
    made = randomised(transformers.AutoModelForCausalLM.from_config(config("Mixtral"), experts_implementation=NAME))
    assert made.config._experts_implementation == NAME
    ids = torch.randint(3, 32, (2, 5))
    text = made.generate(ids, max_new_tokens=6, do_sample=False)
    made.set_experts_implementation("eager")
    assert torch.equal(made.generate(ids, max_new_tokens=6, do_sample=False), text)


@models
def test_compiled(model):
    experts, x = block_of(model).experts, tokens("some").flatten(0, 1)
    inputs = x, torch.rand(len(x), experts.down_proj.shape[0]).argsort()[:, :2], torch.rand(len(x), 2)
    expected = run(experts, "eager", *inputs)
    torch._dynamo.reset()
    compiled = torch.compile(choose(experts, NAME), fullgraph=True, backend="aot_eager")
    assert_near(gradients(experts, compiled, *inputs), expected)


def experts_of(folder, name):
    """Experts of other models, which have what the five do not."""
    settings = {"_experts_implementation": "eager", "hidden_act": "silu", "mlp_hidden_act": "relu2", "post_norm_eps": 1e-6}
    settings |= {
        "n_routed_experts": 4,
        "num_local_experts": 4,
        "hidden_size": DIM,
        "moe_hidden_size": DIM,
        "moe_latent_size": None,
    }
    settings |= {"moe_intermediate_size": HIDDEN, "intermediate_size": HIDDEN}
    return randomised(class_of(folder, name)(SimpleNamespace(**settings)))


def choices(count=11):
    """Tokens, and two of four experts for each, with weights."""
    return torch.randn(count, DIM), torch.rand(count, 4).argsort()[:, :2], torch.rand(count, 2)


@pytest.mark.parametrize(
    ("folder", "name"), [("muse_spark", "MuseSparkExperts"), ("nemotron_h", "NemotronHExperts")], ids=["norm", "no gate"]
)
def test_a_norm_behind_the_experts_and_experts_without_a_gate(folder, name):
    experts, inputs = experts_of(folder, name), choices()
    assert_near(run(experts, NAME, *inputs), run(experts, "eager", *inputs))


def test_an_activation_that_learns():
    experts, inputs = experts_of("mixtral", "MixtralExperts"), choices()
    experts.act_fn = nn.PReLU()
    assert_near(run(experts, NAME, *inputs), run(experts, "eager", *inputs))
    assert experts.act_fn.weight.grad.any()


def test_experts_of_another_process_are_not_routed():
    """Under expert parallelism, indices from the number of experts on stand for them."""
    experts, (x, index, weight) = experts_of("mixtral", "MixtralExperts"), choices()
    elsewhere = torch.rand(index.shape) < 0.4
    elsewhere[3] = True
    index[elsewhere] = 4  # which transformers' eager path leaves out
    expected = run(experts, "eager", x, index, weight)
    experts._is_expert_parallel = True
    for sentinel in (4, 9, 2**40):
        index[elsewhere] = sentinel
        assert_near(run(experts, NAME, x, index, weight), expected)
        assert (index[elsewhere] == sentinel).all()


def test_weights_of_all_experts():
    """As transformers 5.0 has them of some models."""
    experts, (x, index, weight) = experts_of("mixtral", "MixtralExperts"), choices()
    expected = run(experts, "eager", x, index, weight)
    actual = run(experts, NAME, x, index, torch.zeros(len(x), 4).scatter(1, index, weight))
    actual[2] = actual[2].gather(1, index)
    assert_near(actual, expected)


# Layers of this package with the weights of theirs

LAYOUTS = {"GptOss": {"bias": True, "interleaved": True, "limit": 0.7, "transposed": True}}


def glu_experts(block, model, dtype=torch.float32):
    """GLUExperts with the ``state_dict`` of a block's experts."""
    num_experts = block.experts.down_proj.shape[0]
    experts = GLUExperts(DIM, num_experts, HIDDEN, dtype=dtype, **LAYOUTS.get(model, {}))
    experts.load_state_dict(block.experts.state_dict(), strict=True)
    return experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@models
def test_glu_experts_load_their_weights(model, dtype):
    block = block_of(model, dtype)
    experts, x = glu_experts(block, model, dtype), tokens("some", dtype).flatten(0, 1)
    index, weight = torch.rand(len(x), experts.num_experts).argsort()[:, :2], torch.rand(len(x), 2, dtype=dtype)

    def call(x, index, weight):
        routing = route(expert=index, weight=weight, num_gates=experts.num_experts, dropless=True)
        return routing.combine(experts(routing.dispatch(x), routing.offsets))

    inputs = x, index, weight
    expected = run(block.experts, "eager", *inputs)
    assert_near(gradients(experts, call, *inputs), expected, 1e-5 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("kind", ["some", "one", "alike", "many"])
@pytest.mark.parametrize("dropless", [True, False])
@pytest.mark.parametrize("model", ["Mixtral", "Qwen3Moe", "GptOss"])
def test_moe_is_their_block(model, dropless, kind):
    """With weights normalised over the chosen experts, as these three have them."""
    block, x = block_of(model), tokens(kind)
    router = block.router if model == "GptOss" else block.gate
    experts = glu_experts(block, model)
    moe = MoE(
        DIM,
        experts.num_experts,
        gating_top_n=router.top_k,
        experts=experts,
        dropless=dropless,
        straight_through_dispatch_tensor=False,
        policy_train="all",
        policy_eval="all",
        capacity_factor_eval=100.0,
    ).eval()
    moe.gate.to_gates.weight.data.copy_(router.weight)
    if model == "GptOss":
        moe.gate.to_gates.bias = nn.Parameter(router.bias.detach().clone())
    expected = run(block, "eager", x)
    actual = gradients(moe, lambda x: moe(x).outputs, x)
    assert_near(actual[:2], expected[:2])
    ours, theirs = (
        [p.grad for m in modules for p in m.parameters()] for modules in ((moe.gate, experts), (router, block.experts))
    )
    assert_near(ours, theirs)


def test_shared_experts_are_those_of_deepseek():
    block, x = block_of("DeepseekV3"), tokens("some")
    experts = glu_experts(block, "DeepseekV3")

    class Router(nn.Module):
        """Its scores, which are not this package's, in the place of a gate's routing."""

        def route(self, x, *args, **kwargs):
            _, weight, index = block.gate(x)
            shape = (*x.shape[:-1], -1)
            return route(expert=index.view(shape), weight=weight.view(shape), num_gates=experts.num_experts, dropless=True)

    moe = MoE(DIM, experts.num_experts, experts=experts, dropless=True, shared_experts=block.shared_experts)
    moe.gate = Router()
    expected = run(block, "eager", x)
    actual = gradients(block, lambda x: moe(x).outputs, x)
    names = [name for name, _ in block.named_parameters()]
    for a, e, name in zip(actual[2:], expected[2:], names, strict=True):
        assert_near([experts.get_parameter(name.removeprefix("experts.")).grad if name.startswith("experts.") else a], [e])
    assert_near(actual[:2], expected[:2])


def test_register_again():
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    before = dict(ALL_EXPERTS_FUNCTIONS)
    assert register() == register() == NAME == "topn_gating"
    assert dict(ALL_EXPERTS_FUNCTIONS) == before


def test_without_a_transformers_that_fits(monkeypatch):
    expected = r"topn_gating\.integrations\.transformers needs transformers 5 or later"
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", SimpleNamespace())  # a version without the interface
    with pytest.raises(ImportError, match=expected):
        register()
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    with pytest.raises(ImportError, match=expected):
        register()


def test_imported_on_request_alone():
    script = "import sys, topn_gating; assert 'topn_gating.integrations' not in sys.modules"
    script += "; import topn_gating.integrations.transformers; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
