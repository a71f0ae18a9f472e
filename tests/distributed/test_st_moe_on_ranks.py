"""topn_gating.integrations.st_moe on several ranks, each of which holds all experts and computes some."""

import pytest
import torch
from layers import DIM, EXPERTS, TOKENS, tokens_of, weighted
from ranks import errors, results
from torch.nn.parallel import DistributedDataParallel

from topn_gating.integrations.st_moe import Expert, Experts, MoE


def layer(**options):
    torch.manual_seed(1)
    return MoE(DIM, EXPERTS, threshold_train=1e-9, **options)  # every pair is routed, whatever is drawn


def gradients(module):
    return {name.removeprefix("module."): p.grad for name, p in module.named_parameters()}


def with_ddp(rank, n, options, patched):
    module = layer(**options)
    assert module.experts.is_distributed
    if patched:
        for expert in module.experts.experts:
            expert.forward = expert.net.forward
    ddp = DistributedDataParallel(module)
    out = ddp(tokens_of(rank, n=n[rank]))
    (weighted(out.outputs) + out.total_aux_loss).backward()
    return out.outputs.detach(), gradients(ddp)


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize(("n", "options"), [((TOKENS, TOKENS), {}), ((TOKENS, 7), {"allow_var_seq_len": True})], ids=str)
def test_equals_one_process(n, options, patched):
    ranks = results(2, with_ddp, n, options, patched)
    whole = layer()
    assert not whole.experts.is_distributed
    for rank, (outputs, _) in enumerate(ranks):
        out = whole(tokens_of(rank, n=n[rank]))
        torch.testing.assert_close(outputs, out.outputs.detach(), rtol=1e-6, atol=1e-6)
        ((weighted(out.outputs) + out.total_aux_loss) / 2).backward()
    for _, grads in ranks:
        torch.testing.assert_close(grads, gradients(whole), rtol=1e-5, atol=1e-5)


def experts_alone(rank, lengths, options):
    torch.manual_seed(1)
    experts = Experts([Expert(DIM) for _ in range(4)], **options)
    torch.manual_seed(7 + rank)
    buffers = torch.randn(2, 4, lengths[rank], DIM)
    return experts(buffers), experts(buffers, is_distributed=False)


@pytest.mark.parametrize(("lengths", "options"), [((5, 5), {}), ((5, 2), {"allow_var_seq_len": True})], ids=str)
def test_experts_alone(lengths, options):
    for together, alone in results(2, experts_alone, lengths, options):
        torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


def of_three(rank, is_distributed):
    module = MoE(DIM, 4, is_distributed=is_distributed)
    assert not module.experts.is_distributed or is_distributed
    return module(tokens_of(rank)).outputs.shape


def test_ranks_that_do_not_divide_the_experts():
    """By default each computes all, as it holds all; on request that is an error."""
    assert results(3, of_three, None) == [(2, TOKENS, DIM)] * 3
    message = "ValueError: num_experts must be a multiple of the ranks of expert_group (3), got 4"
    assert errors(3, of_three, True) == [message] * 3
