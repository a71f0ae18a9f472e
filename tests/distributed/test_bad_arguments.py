"""What the constructor of a layer with an expert_group refuses, on the rank that asked for it."""

import re

import pytest
import torch
import torch.distributed as dist
from layers import DIM, EXPERTS, tokens_of
from ranks import results
from torch.distributed.device_mesh import init_device_mesh

from topn_gating import Experts, MoE, TopNGating

WITHOUT_GROUP = {
    "exchange must be left out without expert_group": {"exchange": print},
    "chunks must be left out without expert_group, got 2": {"chunks": 2},
    "check must be left out without expert_group, got 'always'": {"check": "always"},
    "expert_group must be the name of a process group, got 'none'": {"expert_group": "none"},
    "max_tokens must be None when dropless, which has no capacity, got 3": {"max_tokens": 3, "dropless": True},
    "max_tokens must be at least 1 and below 2^31, got 0": {"max_tokens": 0},
}


@pytest.mark.parametrize("message", WITHOUT_GROUP)
def test_in_one_process(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MoE(DIM, EXPERTS, **WITHOUT_GROUP[message])


def test_more_tokens_than_max_tokens():
    gate = TopNGating(DIM, EXPERTS, max_tokens=4)
    assert gate.capacity(1) == gate.capacity(4) == TopNGating(DIM, EXPERTS).capacity(4)
    assert gate.route(torch.randn(2, 0, DIM)).source.shape == (2, EXPERTS, gate.capacity(4))
    with pytest.raises(ValueError, match="x must have at most max_tokens=4 tokens in a group, got 5"):
        gate(torch.randn(1, 5, DIM))


WITH_GROUP = {
    "ValueError: num_experts must be a multiple of the ranks of expert_group (2), got 7": lambda: {"num_experts": 7},
    "TypeError: expert_group must be a ProcessGroup, a DeviceMesh or a str, got list": lambda: {"expert_group": [0, 1]},
    "ValueError: expert_group must be a DeviceMesh of one dimension, got 2: take mesh['name']": lambda: {
        "expert_group": init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "expert"))
    },
    "ValueError: expert_group must be a group of which this process is a rank": lambda: {
        "expert_group": [dist.new_group([1]), dist.new_group([0])][dist.get_rank()]
    },
    "TypeError: exchange must be a callable or None, got int": lambda: {"exchange": 3},
    "ValueError: chunks must be at least 1 and below 2^31, got 0": lambda: {"chunks": 0},
    "ValueError: chunks must be 1 when dropless, got 2": lambda: {"chunks": 2, "dropless": True},
    "ValueError: check must be one of first, always, got 'never'": lambda: {"check": "never"},
    "ValueError: align must be 1 with expert_group, got 16": lambda: {"dropless": True, "align": 16},
    "ValueError: experts must have dim=12, num_experts=4 as this rank of expert_group, got dim=12, num_experts=8": lambda: {
        "experts": Experts(DIM, EXPERTS)
    },
}


def refused(rank, message):
    try:
        MoE(**({"dim": DIM, "num_experts": EXPERTS, "expert_group": dist.group.WORLD} | WITH_GROUP[message]()))
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("message", WITH_GROUP)
def test_on_each_rank(message):
    assert results(2, refused, message) == [message] * 2


BAD_EXCHANGES = {
    "shape": lambda rows, output_splits, input_splits: rows[1:],
    "dtype": lambda rows, output_splits, input_splits: rows.double(),
    "nothing": lambda rows, output_splits, input_splits: None,
}


def bad_exchange(rank, kind):
    try:
        MoE(DIM, EXPERTS, expert_group="0", exchange=BAD_EXCHANGES[kind])(tokens_of(rank))
    except (TypeError, ValueError) as error:
        return str(error)


@pytest.mark.parametrize(
    ("kind", "got"), [("shape", "(3, 4, 4, 12), torch.float32"), ("dtype", "(4, 4, 4, 12), torch.float64")]
)
def test_exchange_that_returns_something_else(kind, got):
    message = f"exchange must return a tensor of shape (4, 4, 4, 12), torch.float32, got {got}"
    assert results(2, bad_exchange, kind) == [message] * 2


def test_exchange_that_returns_no_tensor():
    assert results(2, bad_exchange, "nothing") == ["exchange must return a tensor, got NoneType"] * 2
