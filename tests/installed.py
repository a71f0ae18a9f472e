"""Checks an installed package, from outside of the checkout: a training step, and the same in one compiled graph.

python tests/installed.py
"""

import torch

import topn_gating
from topn_gating import reference


def step(layer, x):
    """Outputs, and all gradients."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(1)
    out = layer(x)
    (out.outputs.square().sum() + out.total_aux_loss).backward()
    return out.outputs.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())


def main():
    for dropless in (False, True):
        torch.manual_seed(0)
        layer, x = topn_gating.MoE(16, 4, dropless=dropless), torch.randn(2, 9, 16)
        logits = layer.gate.logits(x)
        routing = topn_gating.route(logits, 2, policy="all", dropless=dropless)
        exact = reference.route(logits.double(), top_n=2, capacity=routing.capacity, policy="all")
        assert torch.equal(routing.slot, exact.slot)
        torch.testing.assert_close(routing.balance_loss.double(), exact.balance_loss, rtol=1e-5, atol=1e-5)
        expected = step(layer, x)
        torch.testing.assert_close(step(torch.compile(layer, backend="aot_eager", fullgraph=True), x), expected)
    print(f"torch {torch.__version__}, topn_gating {topn_gating.__version__} of {topn_gating.__path__[0]}: works")


if __name__ == "__main__":
    main()
