"""patch_routers in whole models: no router is missed, and outputs, router logits and gradients stay the same."""

import pytest
import torch
from whole_models import (
    CLASSES,
    OTHERS,
    RUN,
    SEED,
    assert_same,
    experts_classes,
    experts_in,
    inputs,
    make,
    router_classes,
    routers_in,
    run,
)

from topn_gating.integrations.transformers import patch_routers

MODELS = [*RUN, *OTHERS]
LEFT = {*router_classes.UNEQUAL, *router_classes.LEFT}
# All of whose routers are left.
NOTHING_REPLACED = ("DogeForCausalLM", "NllbMoeForConditionalGeneration", "PhimoeForCausalLM")
NOTHING_REPLACED += ("InklingForCausalLM", "InklingForConditionalGeneration", "SwitchTransformersForConditionalGeneration")


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_model_before(name):
    torch.manual_seed(SEED)
    model, arguments = make(CLASSES[name]), inputs(name)
    for config in (model.config, model.config.get_text_config()):
        config.output_router_logits = True
    if name in RUN:
        model.set_experts_implementation("eager")
    expected, state = run(model, arguments), {key: t.clone() for key, t in model.state_dict().items()}
    replaced, left = patch_routers(model)
    assert replaced | left == routers_in(model)
    assert set(left.values()) <= LEFT
    assert bool(replaced) == (name not in NOTHING_REPLACED)
    for where in experts_in(model):
        block = where.rpartition(".")[0]
        assert any(router.startswith(block) for router in replaced | left)
    ran = set()
    for module in replaced:
        model.get_submodule(module).register_forward_hook(lambda *_, module=module: ran.add(module))
    assert_same(run(model, arguments), expected)
    assert ran == set(replaced)
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)


def test_there_are_as_many_as_the_docs_say():
    assert f"{len(MODELS)} whole models, those above and {len(OTHERS)} " in experts_classes.DOCS.read_text()


def test_every_class_is_in_a_model():
    """But for one that transformers has for no model, and ViTPose's experts, which are given."""
    found = {kind for name in MODELS for kind in routers_in(make(CLASSES[name])).values()}
    others = {"Qwen3OmniMoeTextTopKRouter", "VitPoseBackboneMoeMLP"}
    assert found == router_classes.found().keys() - router_classes.NO_ROUTERS - others
