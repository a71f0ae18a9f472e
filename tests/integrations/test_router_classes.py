"""``route`` gives the numbers of transformers' router classes (docs/routers.md): the same experts, the same weights."""

import pytest
import torch
from router_classes import (
    CONFIG,
    DIM,
    DOCS,
    FORMULAS,
    NO_ROUTERS,
    TOKENS,
    TOP_N,
    UNEQUAL,
    Attribute,
    Formula,
    build,
    found,
    page,
)

from topn_gating import route

CASES = [
    pytest.param(formula, name, settings, options, id="-".join([name, *(f"{k}={v}" for k, v in settings.items())]))
    for formula in FORMULAS
    for name in formula.names()
    for settings, options in (({}, {}), *formula.more)
]


@pytest.mark.parametrize(("formula", "name", "settings", "options"), CASES)
def test_equals(formula: Formula, name, settings, options):
    settings = formula.settings | settings
    router, x = build(name, settings), torch.randn(TOKENS, DIM)
    with torch.no_grad():
        choice = formula.choice(router, x)
    given = {"top_n": TOP_N, "eps": 1e-20} | formula.options | options
    given = {key: value.of(router) if isinstance(value, Attribute) else value for key, value in given.items()}
    if formula.expert is not None:
        given["expert"] = formula.expert(router, choice.logits)
    if formula.priority is not None:
        given["priority"] = formula.priority(choice.logits)
    given |= {"dropless": True} if formula.capacity is None else {"capacity": (CONFIG | settings)[formula.capacity]}
    routing = route(choice.logits, policy="all", **given)

    place = routing.expert.long()
    weights = torch.zeros_like(choice.weights).scatter(1, place, routing.weight)
    chosen = torch.zeros_like(choice.chosen).scatter(1, place, routing.slot >= 0)
    if formula.after is not None:
        weights = weights * formula.after(router, choice.logits)
    if name == "ZayaRouter":
        chosen[:, -1] = False
        weights[:, -1] = 0
    assert choice.chosen.any(0).sum() > 1
    assert torch.equal(chosen, choice.chosen)
    assert (weights - choice.weights).abs().max() <= 1e-6
    if formula.capacity is not None:
        assert (routing.slot == -2).any()  # so that the drop is seen


def test_every_class_is_in_the_table():
    """A new release of transformers: see CONTRIBUTING.md."""
    named = [name for formula in FORMULAS for name in formula.names()]
    assert set(found()) == {*named, *UNEQUAL, *NO_ROUTERS}
    assert not set(named) & {*UNEQUAL, *NO_ROUTERS}


def test_at_least_nine_in_ten_are_equal():
    equal = {name for formula in FORMULAS for name in formula.names()}
    assert len(equal) >= 0.9 * (len(equal) + len(UNEQUAL))


def test_the_page_has_the_table():
    assert DOCS.read_text() == page(DOCS.read_text())
