"""A layer whole and in parts, and what both give for the same tokens."""

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from topn_gating import Experts, MoE

DIM, EXPERTS, TOKENS, GROUPS = 12, 8, 24, 2


class Buffers(nn.Module):
    """Experts that a layer does not know to be built in: as on several ranks, they get buffers whole."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, x):
        return self.experts(x)


def whole_layer(dtype=None, experts=None, **options):
    """The layer in one process, whose every pair is routed."""
    torch.manual_seed(1)
    experts = Experts(DIM, EXPERTS, dtype=dtype) if experts is None else experts
    if not options.get("dropless"):
        experts = Buffers(experts)
    return MoE(DIM, EXPERTS, experts=experts, policy_train="all", policy_eval="all", dtype=dtype, **options)


def part_of(whole, rank, world, experts=None, group="0", dtype=None, **options):
    """The same layer on one rank of ``world``, with its part of the experts."""
    experts = Experts(DIM, EXPERTS // world, dtype=dtype) if experts is None else experts
    part = MoE(DIM, EXPERTS, expert_group=group, experts=experts, policy_train="all", policy_eval="all", dtype=dtype, **options)
    load_part(part, whole, rank, world)
    return part


def load_part(part, whole, rank, world):
    """Copies the rank's part of the parameters."""
    here = slice(rank * EXPERTS // world, (rank + 1) * EXPERTS // world)
    experts = getattr(whole.experts, "experts", whole.experts)
    part.gate.load_state_dict(whole.gate.state_dict())
    part.experts.load_state_dict({name: p[here] for name, p in experts.state_dict().items()})
    if whole.shared_experts is not None:
        part.shared_experts.load_state_dict(whole.shared_experts.state_dict())


def tokens_of(rank, dtype=torch.float32, lead=(GROUPS,), n=TOKENS):
    """Tokens ``(*lead, n, DIM)``, others on each rank."""
    return torch.randn(*lead, n, DIM, generator=torch.Generator().manual_seed(100 + rank), dtype=dtype)


def weighted(outputs):
    """A loss to which each output adds another share."""
    return (outputs * torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).view_as(outputs)).sum()


def backward(moe, x, call=None, **kwargs):
    """Outputs, gradient of ``x`` and of all parameters, and the total of the auxiliary losses."""
    x = x.clone().requires_grad_()
    out = (moe if call is None else call)(x, **kwargs)
    (weighted(out.outputs) + out.total_aux_loss).backward()
    return out.outputs.detach(), x.grad, {name: p.grad for name, p in moe.named_parameters()}, out.total_aux_loss.detach()


def compare(ranks, whole, xs, tolerance=None, call=None, masks=None):
    """Compares what :func:`backward` gave on the ranks with the whole layer in this process on each rank's tokens in turn.

    The gradients of the parameters are sums over the ranks: of experts, each rank has a part.
    """
    whole.zero_grad()
    for i, (x, (outputs, x_grad, _, aux)) in enumerate(zip(xs, ranks, strict=True)):
        x = x.clone().requires_grad_()
        out = (whole if call is None else call)(x, **({} if masks is None else {"token_mask": masks[i]}))
        (weighted(out.outputs) + out.total_aux_loss).backward()
        torch.testing.assert_close(outputs, out.outputs, **(tolerance or {"rtol": 1e-6, "atol": 1e-6}))
        torch.testing.assert_close(x_grad, x.grad, **(tolerance or {"rtol": 1e-5, "atol": 1e-5}))
        torch.testing.assert_close(aux, out.total_aux_loss)
    for name, parameter in whole.named_parameters():
        mine = [rank[2][name.replace("experts.experts", "experts")] for rank in ranks]
        both = torch.cat(mine) if name.startswith("experts") else sum(mine)
        torch.testing.assert_close(both, parameter.grad, **(tolerance or {"rtol": 1e-5, "atol": 1e-5}))


class Traffic(TorchDispatchMode):
    """Counts the bytes that all exchanges send, and their calls."""

    def __init__(self):
        super().__init__()
        self.bytes, self.calls = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops._c10d_functional.all_to_all_single.default:
            self.bytes.append(args[0].nbytes)
        self.calls += "c10d" in str(func)
        return func(*args, **(kwargs or {}))
