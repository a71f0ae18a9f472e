"""Every class of models of transformers whose experts take an implementation: topn_gating's against eager, whole models."""

import pytest
import torch
from whole_models import (
    ANOTHER_NAME,
    CLASSES,
    EXPERTS_CLASSES,
    NOT_RUN,
    RUN,
    SEED,
    assert_same,
    experts_classes,
    experts_in,
    inputs,
    make,
    run,
    table,
)

from topn_gating.integrations.transformers import NAME, experts_forward, register


@pytest.fixture
def called():
    """The modules that ran topn_gating's experts."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    modules = []

    def record(module, *arguments):
        modules.append(module)
        return experts_forward(module, *arguments)

    ALL_EXPERTS_FUNCTIONS.register(NAME, record)
    yield modules
    register()


@pytest.mark.parametrize("name", RUN)
def test_equals_eager(name, called):
    torch.manual_seed(SEED)
    model, arguments = make(CLASSES[name]), inputs(name)
    experts = experts_in(model)
    model.set_experts_implementation("eager")
    expected = run(model, arguments)
    assert not called
    model.set_experts_implementation(NAME)
    actual = run(model, arguments)
    assert experts
    assert {id(m) for m in called} == {id(m) for m in experts.values()}
    assert_same(actual, expected)
    assert any(expected[f"{where}.down_proj"].any() for where in experts if f"{where}.down_proj" in expected)


def test_every_class_of_experts_is_in_a_model():
    found = {type(m).__name__ for name in RUN for m in experts_in(make(CLASSES[name])).values()}
    assert found == EXPERTS_CLASSES


@pytest.mark.parametrize("name", NOT_RUN)
def test_classes_that_are_not_run(name):
    reason, model_class = NOT_RUN[name], CLASSES[name]
    if reason == "no forward":
        assert model_class.forward is torch.nn.Module.forward
    elif reason == "no experts":
        assert not experts_in(make(model_class))
    else:
        other = reason.removeprefix(ANOTHER_NAME)
        assert other in RUN
        assert issubclass(model_class, CLASSES[other])
        assert model_class.forward is CLASSES[other].forward


def test_the_list_of_the_docs():
    """Fails when a class of models is new or gone."""
    assert table() in experts_classes.DOCS.read_text()


def test_there_are_as_many_as_the_docs_say():
    assert f"{len(RUN)} whole models" in experts_classes.DOCS.read_text()
