"""Every class of transformers whose experts take an implementation: topn_gating's against eager, outputs and all gradients."""

import experts_classes
import pytest
import torch
from experts_classes import DIM, EXPERTS

from topn_gating.integrations.transformers import register

NAME = register()
CLASSES = [pytest.param(where, id=where[2]) for where in experts_classes.found()]


def run(experts, implementation, x, index, weight):
    """The output, and the gradients of the tokens, weights and parameters."""
    experts.config._experts_implementation = implementation
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = experts(x, index, weight)
    leaves = [x, weight, *experts.parameters()]
    grads = torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel()).view_as(out), materialize_grads=True)
    return [out.detach(), *grads]


def assert_near(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * max(1.0, b.abs().max().item() if b.numel() else 0.0))


@pytest.mark.parametrize("where", CLASSES)
@pytest.mark.parametrize("tokens", [1, 40])
def test_equals_eager(where, tokens):
    experts = experts_classes.make(*where)
    x, weight = torch.randn(tokens, DIM), torch.rand(tokens, 3)
    index = torch.rand(tokens, EXPERTS).argsort()[:, :3]
    inputs = x, index, weight
    assert_near(run(experts, NAME, *inputs), run(experts, "eager", *inputs))


@pytest.mark.parametrize("where", CLASSES)
def test_experts_elsewhere(where):
    """The index one past the experts, which expert parallelism gives to those of other ranks."""
    experts = experts_classes.make(*where)
    experts._is_expert_parallel = True
    x, weight = torch.randn(40, DIM), torch.rand(40, 3)
    index = torch.rand(40, EXPERTS).argsort()[:, :3]
    index[::3, 1] = EXPERTS
    expected = run(experts, "eager", x, index.clamp(max=EXPERTS - 1), weight.masked_fill(index == EXPERTS, 0))
    actual = run(experts, NAME, x, index, weight)
    expected[2].masked_fill_(index == EXPERTS, 0)
    assert_near(actual, expected)


def test_the_table_of_the_docs():
    assert experts_classes.table() in experts_classes.DOCS.read_text()


def test_there_are_as_many_as_the_docs_say():
    assert f"all {len(CLASSES)} classes" in experts_classes.DOCS.read_text()
