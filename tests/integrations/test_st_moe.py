"""topn_gating.integrations.st_moe against st-moe-pytorch: ways in which people use it, with the import changed alone."""

import copy
import functools
import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from topn_gating import GLUExperts
from topn_gating.integrations import st_moe as ours

theirs = pytest.importorskip("st_moe_pytorch.st_moe_pytorch")

DIM, EXPERTS = 12, 4
NAMES = ("MoE", "SparseMoEBlock", "Expert", "Experts", "TopNGating", "GEGLU", "RMSNorm")
LIBRARIES = [SimpleNamespace(**{name: getattr(module, name) for name in NAMES}) for module in (theirs, ours)]


class LoRA(nn.Module):
    """Adds a low-rank product to a linear layer."""

    def __init__(self, linear, rank=2):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Linear(linear.in_features, rank, bias=False)
        self.up = nn.Linear(rank, linear.out_features, bias=False)

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x))


class Stack(nn.Module):
    """Blocks one after the other, whose losses are added up."""

    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x, **kwargs):
        losses = 0
        for block in self.blocks:
            x, *more = block(x, **kwargs)
            losses = losses + torch.stack(more)
        return x, *losses


def readme(lib):
    return lib.MoE(
        dim=DIM,
        num_experts=16,
        gating_top_n=2,
        threshold_train=0.2,
        threshold_eval=0.2,
        capacity_factor_train=1.25,
        capacity_factor_eval=2.0,
        balance_loss_coef=1e-2,
        router_z_loss_coef=1e-3,
    )


def readme_block(lib):
    return lib.SparseMoEBlock(lib.MoE(dim=DIM, num_experts=EXPERTS), add_ff_before=True, add_ff_after=True)


def default_block(lib):
    return lib.SparseMoEBlock(lib.MoE(DIM, EXPERTS))


def two_blocks(lib):
    return Stack(readme_block(lib), lib.SparseMoEBlock(lib.MoE(DIM, EXPERTS), add_ff_after=False))


def one_block_in_two_layers(lib):
    block = default_block(lib)
    return Stack(block, block)


def partial(lib):
    make = functools.partial(lib.MoE, num_experts=EXPERTS, gating_top_n=3, threshold_train=(0.1, 0.3))
    return make(DIM, expert_hidden_mult=2)


def experts_in_a_module_list(lib):
    return lib.MoE(DIM, EXPERTS, experts=nn.ModuleList([nn.Linear(DIM, DIM) for _ in range(EXPERTS)]))


def their_experts_in_a_module_list(lib):
    return lib.MoE(DIM, EXPERTS, experts=nn.ModuleList([lib.Expert(DIM, prenorm=i == 1) for i in range(EXPERTS)]))


def without_mult_bias(lib):
    return lib.MoE(DIM, EXPERTS, experts=nn.ModuleList([lib.Expert(DIM, mult_bias=False) for _ in range(EXPERTS)]))


def one_expert_several_times(lib):
    return lib.MoE(DIM, EXPERTS, experts=nn.ModuleList([lib.Expert(DIM)] * EXPERTS))


def lora(lib):
    moe = lib.MoE(DIM, EXPERTS)
    moe.gate.to_gates = LoRA(moe.gate.to_gates)
    return moe


def lora_on_an_expert(lib):
    moe = lib.MoE(DIM, EXPERTS)
    net = moe.experts.experts[1].net
    net[0] = LoRA(net[0])
    return moe


def subclass_with_experts_of_its_own(lib):
    class Mine(lib.MoE):
        def __init__(self):
            super().__init__(DIM, EXPERTS)
            self.experts = lib.Experts([lib.Expert(DIM, hidden_mult=2) for _ in range(EXPERTS)])

        def forward(self, x, **kwargs):
            out = super().forward(x, **kwargs)
            return out._replace(outputs=2 * out.outputs)

    return Mine()


def experts_replaced_by_a_module(lib):
    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(DIM, DIM)

        def forward(self, x):
            return self.linear(x)

    moe = lib.MoE(DIM, EXPERTS)
    moe.experts = Same()
    return moe


def subclass_of_an_expert(lib):
    class Doubled(lib.Expert):
        def forward(self, x):
            return 2 * super().forward(x)

    return lib.MoE(DIM, EXPERTS, experts=nn.ModuleList([Doubled(DIM) for _ in range(EXPERTS)]))


def gate_with_a_patched_forward(lib):
    moe = lib.MoE(DIM, EXPERTS)
    forward = moe.gate.forward

    def patched(x, **kwargs):
        dispatch, combine, *losses = forward(x, **kwargs)
        return dispatch, 2 * combine, *losses

    moe.gate.forward = patched
    return moe


def expert_with_a_patched_forward(lib):
    moe = lib.MoE(DIM, EXPERTS)
    expert = moe.experts.experts[2]
    expert.forward = lambda x: 3 * expert.net(x)
    return moe


def hooks(lib):
    moe = lib.MoE(DIM, EXPERTS)
    moe.gate.register_forward_hook(lambda module, args, out: (out[0], 2 * out[1], *out[2:]))
    moe.experts.experts[0].register_forward_hook(lambda module, args, out: out + 1)
    moe.experts.experts[1].net[1].register_forward_hook(lambda module, args, out: 2 * out)
    moe.experts.register_forward_hook(lambda module, args, out: out * 0.5)
    return moe


def coordinate_descent(lib):
    return lib.MoE(DIM, EXPERTS, differentiable_topk=True, straight_through_dispatch_tensor=False)


def frozen_experts(lib):
    moe = lib.MoE(DIM, EXPERTS)
    moe.experts.experts[0].requires_grad_(False)
    moe.experts.experts[1].net[0].bias.requires_grad_(False)
    return moe


def variable_lengths(lib):
    return lib.MoE(DIM, EXPERTS, is_distributed=False, allow_var_seq_len=True)


def converted(lib):
    return lib.SparseMoEBlock(lib.MoE(DIM, EXPERTS)).double().float()


def copied(lib):
    return copy.deepcopy(readme_block(lib))


PATTERNS = [
    readme,
    readme_block,
    default_block,
    two_blocks,
    one_block_in_two_layers,
    partial,
    experts_in_a_module_list,
    their_experts_in_a_module_list,
    without_mult_bias,
    one_expert_several_times,
    lora,
    lora_on_an_expert,
    subclass_with_experts_of_its_own,
    experts_replaced_by_a_module,
    subclass_of_an_expert,
    gate_with_a_patched_forward,
    expert_with_a_patched_forward,
    hooks,
    coordinate_descent,
    frozen_experts,
    variable_lengths,
    converted,
    copied,
]


def call(module, x, **kwargs):
    """All outputs, the gradient of ``x``, and those of the parameters by name."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    torch.manual_seed(3)
    outputs, *losses = module(x, **kwargs)
    loss = (outputs * torch.linspace(-1, 1, outputs.numel(), dtype=x.dtype).view_as(outputs)).sum() + losses[0].sum()
    loss.backward()
    losses = [t.detach().reshape(()) for t in losses]
    return outputs.detach(), losses, x.grad, {name: p.grad for name, p in module.named_parameters()}


def pair(pattern):
    """The same module of both libraries, from one seed."""
    made = []
    for lib in LIBRARIES:
        torch.manual_seed(1)
        made.append(pattern(lib))
    return made


@pytest.mark.parametrize("n", [1, 7, 90])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_same_numbers(pattern, training, n):
    modules = [module.train(training) for module in pair(pattern)]
    x = torch.randn(3, n, DIM)
    expected, actual = (call(module, x) for module in modules)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_same_parameters_and_checkpoints_both_ways(pattern):
    peer, mine = pair(pattern)
    assert [(n, p.shape) for n, p in mine.named_parameters()] == [(n, p.shape) for n, p in peer.named_parameters()]
    for name, tensor in peer.state_dict().items():
        assert torch.equal(mine.state_dict()[name], tensor), name  # the same numbers under the same seed
    for source, target in ((peer, mine), (mine, peer)):
        torch.manual_seed(9)
        for parameter in source.parameters():
            nn.init.normal_(parameter)
        target.load_state_dict(source.state_dict(), strict=True)
        for name, tensor in target.state_dict().items():
            assert torch.equal(source.state_dict()[name], tensor)


@pytest.mark.parametrize("pattern", [readme, two_blocks, hooks])
@pytest.mark.parametrize("noise_mult", [1.0, 0.5])
def test_noise(pattern, noise_mult):
    x = torch.randn(2, 20, DIM)
    expected, actual = (call(module, x, noise_gates=True, noise_mult=noise_mult) for module in pair(pattern))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_types(dtype):
    peer, mine = (module.to(dtype) for module in pair(lambda lib: lib.MoE(DIM, EXPERTS)))
    x = torch.randn(2, 20, DIM, dtype=dtype)
    outputs, _, grad, grads = call(mine, x)
    assert {t.dtype for t in (outputs, grad, *grads.values())} == {dtype}
    if dtype == torch.float64:  # in bfloat16 their einsum fails (docs/spec.md, D4)
        torch.testing.assert_close((outputs, grad, grads), (lambda t: (t[0], t[2], t[3]))(call(peer, x)))


def test_several_lengths_and_no_tokens():
    _, mine = pair(variable_lengths)
    for n in (5, 31, 0, 5):
        assert mine(torch.randn(2, n, DIM)).outputs.shape == (2, n, DIM)


def test_training_is_the_same():
    """Weights after some steps of an optimizer, which changes the parameters in place."""
    weights = []
    for module in pair(two_blocks):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        for step in range(5):
            torch.manual_seed(step)
            outputs, aux, *_ = module(torch.randn(2, 16, DIM))
            optimizer.zero_grad()
            (outputs.square().mean() + aux.sum()).backward()
            optimizer.step()
        weights.append(module.state_dict())
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-5)


def test_histogram_of_one_expert():
    """What a logger reads."""
    for module in pair(readme):
        call(module, torch.randn(2, 40, DIM))
        read = {name: (p.shape, p.grad.shape) for name, p in module.named_parameters() if name.startswith("experts.experts.0")}
        assert list(read) == [f"experts.experts.0.net.{name}" for name in NAMES_OF_ONE]
        assert torch.histc(module.experts.experts[0].net[0].weight.detach(), 4).sum() == DIM * 2 * 32


NAMES_OF_ONE = ("0.weight", "0.bias", "1.mult_bias", "2.weight", "2.bias")


def attributes(module):
    """What people read of a layer."""
    gate, experts = module.gate, module.experts
    return (
        *(module.dim, module.num_experts, module.balance_loss_coef, module.router_z_loss_coef),
        *(gate.top_n, gate.num_gates, gate.eps, gate.differentiable_topk, gate.straight_through_dispatch_tensor),
        *(gate.capacity_factor_train, gate.capacity_factor_eval, gate.zero.tolist(), gate.zero.shape),
        *(gate.threshold_train.tolist(), gate.threshold_eval.tolist()),
        *(experts.num_experts, experts.is_distributed, experts.allow_var_seq_len, experts.device, len(experts.experts)),
        sorted(name for name, _ in module.named_buffers()),
    )


def test_attributes():
    peer, mine = pair(readme)
    assert attributes(mine) == attributes(peer)


@pytest.mark.parametrize("differentiable", [False, True])
def test_topk_of_the_gate(differentiable):
    peer, mine = pair(lambda lib: lib.TopNGating(DIM, EXPERTS, differentiable_topk=differentiable))
    x = torch.randn(2, 5, EXPERTS).softmax(-1)
    expected, actual = peer.topk(x, k=2), mine.topk(x, k=2)
    assert actual._fields == expected._fields
    torch.testing.assert_close(tuple(actual), tuple(expected))


def test_gate_and_experts_alone():
    x, buffers = torch.randn(2, 9, DIM), torch.randn(2, EXPERTS, 5, DIM)
    gates = pair(lambda lib: lib.TopNGating(DIM, EXPERTS))
    torch.testing.assert_close(list(gates[1](x)), list(gates[0](x)))
    for make in (lambda lib: lib.Expert(DIM), lambda lib: nn.Linear(DIM, DIM)):
        peer, mine = pair(lambda lib, make=make: lib.Experts([make(lib) for _ in range(EXPERTS)]))
        torch.testing.assert_close(mine(buffers), peer(buffers))


@pytest.mark.parametrize("name", NAMES)
def test_signatures(name):
    def arguments(function):
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values() if p.kind != p.VAR_KEYWORD]

    peer, mine = (getattr(lib, name) for lib in LIBRARIES)
    assert arguments(mine.forward) == arguments(peer.forward) or name == "TopNGating"
    if name != "TopNGating":  # which takes all that topn_gating.TopNGating takes
        assert arguments(mine.__init__) == arguments(peer.__init__)


def test_hub(tmp_path):
    mixin = pytest.importorskip("huggingface_hub").PyTorchModelHubMixin
    made = []
    for lib in LIBRARIES:
        torch.manual_seed(1)
        cls = type("Hub", (lib.MoE, mixin), {})
        module = cls(dim=DIM, num_experts=EXPERTS, gating_top_n=2)
        module.save_pretrained(tmp_path / lib.MoE.__module__)
        made.append((cls, module))
    for cls, _ in made:  # each reads what both have saved
        for (_, saved), folder in zip(made, sorted(tmp_path.iterdir(), key=lambda f: "topn" in f.name), strict=True):
            loaded = cls.from_pretrained(folder)
            for name, tensor in saved.state_dict().items():
                assert torch.equal(loaded.state_dict()[name], tensor)


def test_experts_of_this_package():
    moe = ours.MoE(DIM, EXPERTS, experts=GLUExperts(DIM, EXPERTS, 8))
    assert call(moe, torch.randn(2, 9, DIM))[0].shape == (2, 9, DIM)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="experts must have num_experts=4 modules, got 3"):
        ours.MoE(DIM, EXPERTS, experts=[nn.Linear(DIM, DIM)] * 3)
    with pytest.raises(TypeError, match=r"moe must be a torch\.nn\.Module"):
        ours.SparseMoEBlock(None)


# What is fast about it


@pytest.mark.parametrize("mult_bias", [True, False])
def test_parameters_lie_one_after_the_other(mult_bias, tmp_path):
    """So that no step copies them: also after a conversion, a checkpoint, a step of an optimizer and a copy."""
    moe = ours.MoE(DIM, 5, experts=[ours.Expert(DIM, mult_bias=mult_bias) for _ in range(5)])

    def assert_packed(moe):
        experts = moe.experts
        assert len(experts._packed) == 4 + mult_bias
        for name, parameters in experts._by_name():
            stacked = experts._stacked(name, parameters)
            assert stacked.data_ptr() == parameters[0].data_ptr()
            assert torch.equal(stacked, torch.stack(parameters))

    optimizer = torch.optim.AdamW(moe.parameters())
    for change in (
        lambda: None,
        lambda: moe.double(),
        lambda: moe.load_state_dict(ours.MoE(DIM, 5, experts=copy.deepcopy(moe.experts.experts)).double().state_dict()),
        lambda: optimizer.step(),
        lambda: moe.bfloat16().float(),
    ):
        change()
        call(moe, torch.randn(2, 9, DIM, dtype=moe.gate.to_gates.weight.dtype))
        assert_packed(moe)
    assert_packed(copy.deepcopy(moe))
    torch.save(moe, tmp_path / "moe.pt")
    assert (tmp_path / "moe.pt").stat().st_size < 1.5 * sum(p.nbytes for p in moe.parameters()) + 20_000
    assert_packed(torch.load(tmp_path / "moe.pt", weights_only=False))


def test_a_parameter_that_was_moved_counts():
    moe, other = (pair(readme)[1] for _ in range(2))
    x = torch.randn(2, 20, DIM)
    with torch.no_grad():
        weight = moe.experts.experts[3].net[0].weight
        weight.data = 2 * weight.data
        other.experts.experts[3].net[0].weight.mul_(2)
    torch.testing.assert_close(call(moe, x), call(other, x))


def test_a_parameter_that_changes_before_the_backward_pass():
    moe = pair(readme)[1]
    outputs = moe(torch.randn(2, 20, DIM)).outputs
    with torch.no_grad():
        moe.experts.experts[3].net[0].bias.mul_(2)
    with pytest.raises(RuntimeError, match="modified in"):
        outputs.sum().backward()


@pytest.mark.parametrize("pattern", [readme, two_blocks, hooks])
def test_compile(pattern):
    module, x = pair(pattern)[1], torch.randn(2, 20, DIM)
    expected = call(module, x)
    compiled = torch.compile(module, backend="aot_eager")
    outputs, losses, grad, _ = call(compiled, x)
    torch.testing.assert_close((outputs, losses, grad), expected[:3])


def test_one_graph():
    module, x = pair(readme)[1], torch.randn(2, 20, DIM)
    expected = call(module, x)
    torch.testing.assert_close(call(torch.compile(module, backend="aot_eager", fullgraph=True), x)[0], expected[0])


def test_functional_gradients():
    module, x = pair(readme)[1], torch.randn(2, 20, DIM)
    *_, grads = call(module, x)

    def loss(parameters):
        outputs, aux, *_ = torch.func.functional_call(module, parameters, (x,))
        return (outputs * torch.linspace(-1, 1, outputs.numel()).view_as(outputs)).sum() + aux

    torch.manual_seed(3)
    torch.testing.assert_close(torch.func.grad(loss)(dict(module.named_parameters())), grads)
