"""Ranks that differ, die or come late: each other rank gets an error that says so, before it sends rows or in bounded time."""

import copy
import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from layers import DIM, EXPERTS, TOKENS, Traffic, backward, compare, part_of, tokens_of, whole_layer
from ranks import RankError, errors, results, run_ranks

import topn_gating
from topn_gating import MoE


def differing(rank, field):
    options, shape, dtype, count = {}, {}, None, EXPERTS
    if field == "capacity":
        options["capacity_factor_train"] = 1.25 if rank else 4.0
    if field == "groups":
        shape["lead"] = (3 if rank else 2,)
    if field == "dtype":
        dtype = torch.float64 if rank else torch.float32
    if field == "num_experts":
        count = 8 if rank else 6
    if field == "layout":
        options["dropless"] = rank == 1
    if field == "version" and rank:
        topn_gating.__version__ = "0.0.0"
    moe = MoE(DIM, count, expert_group="0", dtype=dtype, **options)
    with Traffic() as seen:
        try:
            moe(tokens_of(rank, dtype or torch.float32, **shape))
        except ValueError as error:
            raise ValueError(f"{error} after {seen.calls} collectives") from error


DIFFERENCES = {
    "capacity": "capacity must be the same on all ranks of expert_group: rank 1 has 4, rank 0 has 12",
    "groups": "groups must be the same on all ranks of expert_group: rank 1 has 3, rank 0 has 2",
    "dtype": "dtype must be the same on all ranks of expert_group: rank 1 has torch.float64, rank 0 has torch.float32",
    "num_experts": "num_experts must be the same on all ranks of expert_group: rank 1 has 8, rank 0 has 6",
    "layout": "groups must be the same on all ranks of expert_group: rank 1 has None, rank 0 has 2",
    "version": f"version must be the same on all ranks of expert_group: rank 1 has 0.0.0, rank 0 has {topn_gating.__version__}",
}


@pytest.mark.parametrize("field", DIFFERENCES)
def test_a_difference_raises_on_every_rank_before_anything_is_sent(field):
    assert errors(2, differing, field) == [f"ValueError: {DIFFERENCES[field]} after 0 collectives"] * 2


def features(rank):
    dim = DIM + 2 * (rank == 1)
    MoE(dim, 9, expert_group="0")(torch.randn(2, TOKENS, dim))


def test_the_rank_that_differs_is_named():
    message = "ValueError: dim must be the same on all ranks of expert_group: rank 1 has 14, rank 0 has 12"
    assert errors(3, features) == [message] * 3


def change(rank, options, first, then):
    moe = part_of(whole_layer(**options), rank, 2, **options)
    moe(tokens_of(rank, n=first))
    return backward(moe, tokens_of(rank, n=then))


def test_a_change_raises_on_the_rank_that_changed():
    message = (
        "ValueError: capacity must stay 5, which the ranks of expert_group agreed on, got 6: "
        "give the layer max_tokens, or check='always'"
    )
    assert errors(2, change, {}, 32, 40) == [message] * 2


def test_max_tokens_lets_lengths_change():
    options = {"max_tokens": 40}
    compare(results(2, change, options, 32, 40), whole_layer(**options), [tokens_of(rank, n=40) for rank in range(2)])


def test_more_than_max_tokens():
    message = "ValueError: x must have at most max_tokens=39 tokens in a group, got 40"
    assert errors(2, change, {"max_tokens": 39}, 32, 40) == [message] * 2


def modes(rank):
    """The capacity of train mode and that of eval mode are agreed on apart."""
    moe = part_of(whole_layer(), rank, 2)
    moe(tokens_of(rank))
    moe.eval()
    moe(tokens_of(rank))
    moe.train()
    return backward(moe, tokens_of(rank))


def test_each_mode_has_its_own_agreement():
    compare(results(2, modes), whole_layer(), [tokens_of(rank) for rank in range(2)])


def lengths_of(rank, lengths):
    moe = part_of(whole_layer(), rank, 2, check="always")
    for n in lengths[rank][:-1]:
        moe(tokens_of(rank, n=n))
    return backward(moe, tokens_of(rank, n=lengths[rank][-1]))


def test_check_always_lets_all_ranks_change_together():
    ranks = results(2, lengths_of, [(24, 40, 8, 32)] * 2)
    compare(ranks, whole_layer(), [tokens_of(rank, n=32) for rank in range(2)])


def test_check_always_raises_on_every_rank():
    message = "ValueError: capacity must be the same on all ranks of expert_group: rank 1 has 10, rank 0 has 7"
    assert errors(2, lengths_of, [(64, 48), (64, 64)]) == [message] * 2


def copied(rank):
    moe = part_of(whole_layer(), rank, 2)
    moe(tokens_of(rank, n=32))
    return backward(copy.deepcopy(moe), tokens_of(rank, n=40))


def test_a_copy_agrees_on_its_own_shapes():
    compare(results(2, copied), whole_layer(), [tokens_of(rank, n=40) for rank in range(2)])


def with_one_layer_more(rank):
    if rank == 1:
        MoE(DIM, EXPERTS, expert_group="0")
    first, second = (part_of(whole_layer(**options), rank, 2, **options) for options in ({}, {"max_tokens": 40}))
    first(tokens_of(rank))
    return backward(second, tokens_of(rank))


def test_a_rank_may_make_a_layer_that_it_does_not_call():
    options = {"max_tokens": 40}
    compare(results(2, with_one_layer_more), whole_layer(**options), [tokens_of(rank) for rank in range(2)])


def again(rank):
    """After a difference, the ranks may try again."""
    moe = MoE(DIM, EXPERTS, expert_group="0")
    for lead in ((2 + rank,), (2,)):
        try:
            moe(tokens_of(rank, lead=lead))
        except ValueError as error:
            first = str(error)
    return first


def test_ranks_may_try_again():
    message = "groups must be the same on all ranks of expert_group: rank 1 has 3, rank 0 has 2"
    assert results(2, again) == [message] * 2


# Ranks that die or are late. The group's timeout is two seconds.


def fails(rank, how, when):
    dist.barrier()  # all have started, however long that took
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2), dist.group.WORLD)
    torch.manual_seed(0)
    moe = MoE(DIM, EXPERTS, expert_group="0")
    if when != "before the first call":
        moe(tokens_of(rank))
    x = tokens_of(rank).requires_grad_()
    if when == "before the backward pass":
        loss = moe(x).outputs.sum()
    if rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(4)
    start = time.monotonic()
    try:
        loss.backward() if when == "before the backward pass" else moe(x)
    except RuntimeError as error:
        raise type(error)(f"{error} [{time.monotonic() - start:.0f} s]") from error


STORE = "rank 1 of expert_group did not come to a layer's exchange within the group's timeout: it has died or is late"
EXCHANGE = "the exchange of experts' rows over expert_group failed: a rank has died, or is later than the group's timeout"


@pytest.mark.parametrize("how", ["killed", "late"])
@pytest.mark.parametrize("when", ["before the first call", "before a later call", "before the backward pass"])
def test_a_lost_rank_ends_the_others(how, when):
    answers = run_ranks(4, fails, how, when, lost=(1,))
    for rank, answer in enumerate(answers):
        if rank != 1:
            assert isinstance(answer, RankError)
            assert (STORE if when == "before the first call" else EXCHANGE) in str(answer)
            assert int(str(answer).split("[")[-1].split(" s]")[0]) <= 6
        elif how == "late":
            assert isinstance(answer, RankError)
            assert EXCHANGE in str(answer)
