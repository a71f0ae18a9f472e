"""As models are deployed: made on the meta device, sharded by FSDP 1 and 2; and whatever stands for ``to_gates`` is called."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from topn_gating import MoE, TopNGating
from topn_gating.linear import GateLinear

DIM, EXPERTS = 8, 4
LAYOUTS = pytest.mark.parametrize("dropless", [False, True], ids=["capacity", "dropless"])
ROUTER_TYPES = pytest.mark.parametrize("router_dtype", [None, torch.float32, torch.float64], ids=str)


def some_moe(**options) -> MoE:
    options = {"policy_train": "threshold", "threshold_train": (0.3, 0.2), "threshold_eval": 0.4, "gating_top_n": 3, **options}
    return MoE(DIM, EXPERTS, **options)


def some_tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 12, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)


def train(moe: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs of a step, whose gradients are left in ``.grad``."""
    out = moe(x)
    (out.outputs.float().square().sum() + out.total_aux_loss).backward()
    return [t.detach() for t in out]


# Parameters made on the meta device


@LAYOUTS
def test_reset_parameters_writes_the_thresholds_after_to_empty(dropless):
    expected, moe = some_moe(dropless=dropless).state_dict(), some_moe(device="meta", dropless=dropless)
    moe.to_empty(device="cpu")
    for t in (*moe.parameters(), *moe.buffers()):
        t.data.fill_(torch.nan)
    for module in moe.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    state = moe.state_dict()
    for name in ("gate.threshold_train", "gate.threshold_eval"):
        torch.testing.assert_close(state[name], expected[name], rtol=0, atol=0)
    assert all(t.isfinite().all() for t in state.values())
    assert all(t.isfinite().all() for t in moe(some_tokens()))


def test_reset_parameters_leaves_the_weight_to_its_own_module():
    gate = TopNGating(DIM, EXPERTS)
    before, rng = gate.to_gates.weight.clone(), torch.get_rng_state()
    gate.threshold_train.fill_(9)
    gate.reset_parameters()
    torch.testing.assert_close(gate.threshold_train, torch.tensor([1e-9, 0.2]))
    assert torch.equal(gate.to_gates.weight, before)
    assert torch.equal(torch.get_rng_state(), rng)


# What stands in the place of to_gates, or around it


@ROUTER_TYPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hooks_see_every_call(router_dtype, dtype):
    gate, x = TopNGating(DIM, EXPERTS, router_dtype=router_dtype, dtype=dtype), some_tokens(dtype)
    seen = []
    gate.to_gates.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    plain = gate.logits(x)
    gate.to_gates.register_forward_hook(lambda module, args, output: 2 * output)
    assert torch.equal(gate.logits(x), 2 * plain)
    assert plain.dtype == (router_dtype or dtype)
    assert len(seen) == 2
    assert all(torch.equal(t, x) for t in seen)


@ROUTER_TYPES
def test_a_parametrised_weight_is_used(router_dtype):
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    gate, x = TopNGating(DIM, EXPERTS, router_dtype=router_dtype), some_tokens()
    plain = gate.logits(x)
    parametrize.register_parametrization(gate.to_gates, "weight", Double())
    torch.testing.assert_close(gate.logits(x), 2 * plain)
    gate.logits(x).sum().backward()
    torch.testing.assert_close(gate.to_gates.parametrizations.weight.original.grad, 2 * x.sum((0, 1)).expand(EXPERTS, DIM))


@ROUTER_TYPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bias_is_added(router_dtype, dtype):
    gate, x, bias = TopNGating(DIM, EXPERTS, router_dtype=router_dtype, dtype=dtype), some_tokens(dtype), torch.randn(EXPERTS)
    plain = gate.logits(x)
    gate.to_gates.bias = nn.Parameter(bias.to(dtype))
    torch.testing.assert_close(gate.logits(x).double(), plain.double() + bias.to(dtype).double(), rtol=1e-2, atol=1e-2)
    assert gate.logits(x).dtype == (router_dtype or dtype)


class LoRA(nn.Module):
    """A wrapper as LoRA's (arXiv 2106.09685): the module that it wraps, and a product of low rank of its own."""

    def __init__(self, base: nn.Module, dtype: torch.dtype, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = (nn.Linear(*sizes, bias=False, dtype=dtype) for sizes in ((DIM, rank), (rank, EXPERTS)))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@ROUTER_TYPES
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrapper_as_of_lora(router_dtype, dtype, autocast):
    """Both products are there and learn; the wrapped one is computed in ``router_dtype``."""
    gate = TopNGating(DIM, EXPERTS, router_dtype=router_dtype, policy_train="all", dtype=dtype)
    x, base = some_tokens(dtype), gate.to_gates
    gate.to_gates = LoRA(base, dtype)
    computed = []
    base.register_forward_hook(lambda module, args, output: computed.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits, routing = gate.logits(x), gate.route(x)
    expected = [base.weight, gate.to_gates.up.weight @ gate.to_gates.down.weight]
    torch.testing.assert_close(logits.double(), F.linear(x.double(), sum(w.double() for w in expected)), rtol=0.05, atol=0.05)
    own = torch.bfloat16 if autocast else dtype
    assert set(computed) == {router_dtype or own}
    assert logits.dtype == (router_dtype or own)
    (routing.weight.square().sum() + routing.router_z_loss).backward()
    assert all(p.grad.any() for p in gate.parameters())


class Constant(nn.Module):
    """A module without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return x[..., :EXPERTS]


@ROUTER_TYPES
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize(
    "other",
    [
        nn.Linear(DIM, EXPERTS),
        nn.Linear(DIM, EXPERTS, dtype=torch.bfloat16),
        nn.Sequential(nn.Linear(DIM, 5), nn.Tanh(), nn.Linear(5, EXPERTS)),
        GateLinear(DIM, EXPERTS),
        Constant(),
    ],
    ids=["Linear", "bfloat16", "Sequential", "GateLinear", "no parameters"],
)
def test_any_module_in_its_place(router_dtype, other, autocast):
    """It is called with x in its own type where ``router_dtype`` is set, and its logits come in that."""
    gate = TopNGating(DIM, EXPERTS, router_dtype=router_dtype, policy_train="all")
    gate.to_gates = copy.deepcopy(other)
    own = next((p.dtype for p in other.parameters()), router_dtype or torch.float32)
    x = some_tokens(torch.float32 if router_dtype else own)
    expected = other(x.to(own))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits, outputs = gate.logits(x), gate(x)
    assert outputs[0].shape == (2, 12, EXPERTS, gate.capacity(12))
    if router_dtype is not None:
        assert logits.dtype == router_dtype
        torch.testing.assert_close(logits, expected.to(router_dtype))
    else:
        torch.testing.assert_close(logits.float(), expected.float(), rtol=0.05, atol=0.05)


def test_compiled_with_another_module_in_its_place():
    gate, x = TopNGating(DIM, EXPERTS, router_dtype=torch.float64, policy_train="all"), some_tokens()
    gate.to_gates = nn.Linear(DIM, EXPERTS)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(gate, fullgraph=True, backend="aot_eager")(x), gate(x))


# Sharded parameters, over gloo in a group of this process alone: what FSDP does to a module does not depend on the group's size


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def materialised(moe: MoE, expected: MoE) -> None:
    """Data for a sharded model made on the meta device, as torchtitan gives it; then the weights of ``expected``."""
    moe.to_empty(device="cpu")
    for module in moe.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    with torch.no_grad():
        for p, other in zip(moe.parameters(), expected.parameters(), strict=True):
            p.copy_(dist.tensor.distribute_tensor(other, p.device_mesh, p.placements))


WRAPPED = {
    "all at once": lambda moe: [moe],
    "gate and experts": lambda moe: [moe.gate, moe.experts, moe],
    "to_gates alone": lambda moe: [moe.gate.to_gates, moe],
}


@LAYOUTS
@ROUTER_TYPES
@pytest.mark.parametrize("wrapped", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("made_on", ["cpu", "meta"])
def test_fsdp2(group, made_on, wrapped, router_dtype, dropless):
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    torch.manual_seed(0)
    options = {"router_dtype": router_dtype, "dropless": dropless}
    expected = some_moe(**options)
    moe = copy.deepcopy(expected) if made_on == "cpu" else some_moe(**options, device="meta")
    for module in wrapped(moe):
        fully_shard(module, mesh=group)
    register_fsdp_forward_method(
        moe.gate, "route"
    )  # as its docstring says; it does nothing where the gate is not sharded alone
    if made_on == "meta":
        materialised(moe, expected)
    x = some_tokens()
    torch.testing.assert_close(train(moe, x), train(expected, x))
    for p, other in zip(moe.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), other.grad)


@LAYOUTS
@ROUTER_TYPES
def test_fsdp2_in_mixed_precision(group, router_dtype, dropless):
    """Logits are computed in ``router_dtype`` from the bfloat16 that FSDP gathers."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    moe = some_moe(router_dtype=router_dtype, dropless=dropless)
    expected = copy.deepcopy(moe).bfloat16()
    for module in WRAPPED["gate and experts"](moe):
        fully_shard(module, mesh=group, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    register_fsdp_forward_method(moe.gate, "route")
    computed = []
    moe.gate.to_gates.register_forward_hook(lambda module, args, output: computed.append(output.dtype))
    actual = moe(some_tokens())
    assert computed == [router_dtype or torch.bfloat16]
    torch.testing.assert_close(actual, expected(some_tokens(torch.bfloat16)), rtol=1e-2, atol=1e-2)


@LAYOUTS
@ROUTER_TYPES
@pytest.mark.parametrize("made_on", ["cpu", "meta"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "every module"])
def test_fsdp1(group, made_on, router_dtype, whole, dropless):
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import always_wrap_policy

    options = {"router_dtype": router_dtype, "dropless": dropless}
    expected = some_moe(**options)
    moe = copy.deepcopy(expected) if made_on == "cpu" else some_moe(**options, device="meta")
    policy = None if whole else always_wrap_policy
    moe = FullyShardedDataParallel(moe, device_id=torch.device("cpu"), auto_wrap_policy=policy, use_orig_params=True)
    if made_on == "meta":
        with FullyShardedDataParallel.summon_full_params(moe), torch.no_grad():
            for p, other in zip(moe.parameters(), expected.parameters(), strict=True):
                p.copy_(other)
    x = some_tokens()
    torch.testing.assert_close(train(moe, x), train(expected, x))
    grads = [p.grad for p in moe.parameters()]
    torch.testing.assert_close([g.flatten() for g in grads], [p.grad.flatten() for p in expected.parameters()])
