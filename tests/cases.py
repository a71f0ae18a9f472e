"""What the operator tests share: backends, random cases with their oracle, and tampered indices.

A case knows its inputs, runs an operator on a backend, and evaluates ``topn_gating.reference`` on the same inputs. Results
come back on the CPU whatever the backend.
"""

import math
from ctypes import CDLL, c_uint64
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from compare import assert_same_bits
from torch import Tensor

from topn_gating import Routing, reference
from topn_gating.dtypes import compute_dtype
from topn_gating.ops import GROUP_SCORES, POLICIES, SCORES, GateOptions, dropless_rows

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
# Options of `assign_case` and `assignment`: the capacity that a test names, or no capacity and an alignment.
LAYOUTS = {"capacity": {}, **{f"dropless {align}": {"capacity": None, "align": align} for align in (1, 8)}}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
# Each layout once, for tests that take long.
two_layouts = pytest.mark.parametrize("layout", [LAYOUTS["capacity"], LAYOUTS["dropless 8"]], ids=["capacity", "dropless 8"])
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
EPS = 1e-9


@dataclass(frozen=True)
class Backend:
    """Where an operator runs: ``torch.ops.<namespace>`` on tensors of ``device``."""

    namespace: str
    device: str

    def __call__(self, name: str, *args):
        out = getattr(getattr(torch.ops, self.namespace), name)(*to(self.device, args))
        return out.cpu() if isinstance(out, Tensor) else to("cpu", out)

    def size(self, count: int) -> int:
        """Returns how many tokens or groups a test uses that has ``count`` of them for the sake of their number."""
        return count


@dataclass(frozen=True)
class SimtBackend(Backend):
    """The CUDA kernels on the host: each call runs under every schedule, and all must give the same bits."""

    library: CDLL

    # (kind, seed) of simt_control.h: random, last in first out, first in first out, random
    SCHEDULES = (2, 1), (1, 0), (0, 0), (2, 2)
    schedules: int = 3  # of these; kernels_test runs more

    def __call__(self, name: str, *args):
        results = []
        for kind, seed in self.SCHEDULES[: self.schedules]:
            self.library.simt_set_schedule(kind, c_uint64(seed))
            results.append(super().__call__(name, *args))
        for other in results[1:]:
            assert_same_bits(other, results[0])
        return results[0]

    def size(self, count: int) -> int:
        """Fewer: one core plays the GPU. Its two or three multiprocessors make several tiles of few tokens too."""
        return min(count, 10 + count // 50)


def to(device: str, args: tuple) -> tuple:
    return tuple(a.to(device) if isinstance(a, Tensor) else a for a in args)


class GateResult(NamedTuple):
    weight: Tensor
    expert: Tensor
    importance: Tensor
    counts: Tensor
    balance_loss: Tensor
    router_z_loss: Tensor
    statistics: Tensor

    @property
    def floats(self) -> tuple[Tensor, ...]:
        """The differentiable outputs, in the order of their gradients in ``gate_backward``."""
        return self.weight, self.importance, self.balance_loss, self.router_z_loss


@dataclass
class GateCase:
    logits: Tensor
    top_n: int
    noise: Tensor | None = None
    mask: Tensor | None = None
    eps: float = EPS
    noise_mult: float = 1.0
    soft: bool = False
    score: str = "softmax"
    bias: Tensor | None = None
    given: Tensor | None = None
    groups: int = 1
    top_groups: int = 1
    group_score: str = "top2"
    normalize: bool | None = None
    scale: float = 1.0
    ranks: str = "first"
    losses: bool = True
    statistics: bool = False

    @property
    def options(self) -> GateOptions:
        return GateOptions(
            self.eps,
            self.noise_mult,
            self.soft,
            SCORES.index(self.score),
            self.groups,
            self.top_groups,
            GROUP_SCORES.index(self.group_score),
            self.top_n > 1 if self.normalize is None else self.normalize,
            self.scale,
            self.ranks == "all",
        )

    @property
    def args(self) -> tuple:
        tensors = self.logits, self.noise, self.mask, self.bias, self.given
        return *tensors, self.top_n, *self.options, self.losses, self.statistics

    def run(self, backend: Backend) -> GateResult:
        return GateResult(*backend("gate", *self.args))

    def backward(self, backend: Backend, grads: tuple[Tensor | None, ...], out: GateResult | None = None) -> Tensor:
        """The gradient after the forward pass, or after one with other results."""
        out = out or self.run(backend)
        saved = self.logits, self.noise, self.mask, out.expert, out.counts
        return backend("gate_backward", *grads, *saved, *self.options)

    def scores(self) -> Tensor:
        """The scores ``s`` of docs/spec.md, step 3, in float64."""
        s = self.logits.detach().double()
        return s if self.noise is None else s + self.noise_mult * reference.gumbel(self.noise.double())

    def selection_scores(self) -> Tensor:
        """The selection scores ``q`` of docs/spec.md, step 5, in float64."""
        if self.bias is None and self.groups == 1:
            return self.scores()
        return reference.gates(self.scores(), self.score) + (0 if self.bias is None else self.bias)

    def oracle(self, logits: Tensor | None = None) -> GateResult:
        """The reference in float64."""
        return GateResult(
            *reference.gate(
                self.logits.double() if logits is None else logits,
                top_n=self.top_n,
                eps=self.eps,
                noise=None if self.noise is None else self.noise.double(),
                noise_mult=self.noise_mult,
                token_mask=self.mask,
                differentiable_topk=self.soft,
                score=self.score,
                select_bias=self.bias,
                groups=self.groups,
                top_groups=self.top_groups,
                group_score=self.group_score,
                normalize=self.normalize,
                scale=self.scale,
                expert=self.given,
                balance_ranks=self.ranks,
            )
        )

    def oracle_gradient(self, grads: tuple[Tensor | None, ...]) -> Tensor:
        """Autograd of the float64 reference."""
        logits = self.logits.detach().double().requires_grad_()
        outputs = self.oracle(logits).floats
        wanted = [(out, grad.double()) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
        return torch.autograd.grad([out for out, _ in wanted], logits, [grad for _, grad in wanted])[0]

    def random_gradients(self) -> tuple[Tensor, ...]:
        *lead, e = self.logits.shape
        shapes = (*lead, self.top_n), (*lead[:-1], e), (), ()
        return tuple(torch.randn(s, dtype=compute_dtype(self.logits.dtype)) for s in shapes)


def gate_case(
    shape: tuple[int, ...],
    top_n: int,
    *,
    dtype=torch.float32,
    noise=False,
    mask=False,
    bias=False,
    given=False,
    groups=1,
    top_groups=1,
    **options,
) -> GateCase:
    """Random scores. Of the groups there are as many as divide the experts, and as many open as ``top_n`` needs."""
    *lead, experts = shape
    groups = math.gcd(groups, experts)
    pairs = torch.randint(-2, experts + 1, (*lead, top_n), dtype=torch.int32)  # some out of range, and some twice in a token
    return GateCase(
        torch.randn(shape, dtype=torch.float64).to(dtype),
        top_n,
        torch.rand(shape, dtype=compute_dtype(dtype)) if noise else None,
        torch.rand(lead) < 0.7 if mask else None,
        bias=0.3 * torch.randn(experts) if bias else None,
        given=pairs if given else None,
        groups=groups,
        top_groups=max(min(top_groups, groups), -(-top_n // (experts // groups))),
        **options,
    )


class AssignResult(NamedTuple):
    kept: Tensor
    slot: Tensor
    source: Tensor
    demand: Tensor
    offsets: Tensor


@dataclass
class AssignCase:
    weight: Tensor
    expert: Tensor
    num_gates: int
    capacity: int | None  # None: the dropless layout
    policy: str = "all"
    draws: Tensor | None = None
    threshold: Tensor | None = None
    mask: Tensor | None = None
    keys: Tensor | None = None
    eps: float = EPS
    align: int = 1

    @property
    def args(self) -> tuple:
        policy = POLICIES.index(self.policy)
        tensors = self.weight, self.expert, self.draws, self.threshold, self.mask, self.keys
        return *tensors, self.num_gates, self.capacity, self.align, policy, self.eps

    def run(self, backend: Backend) -> AssignResult:
        return AssignResult(*backend("assign", *self.args))

    def oracle(self) -> AssignResult:
        """The reference in the weight's own type: the comparisons of docs/spec.md, step 7, are exact."""
        options = dict(vars(self))
        weight, expert, mask = (options.pop(name) for name in ("weight", "expert", "mask"))
        return AssignResult(*reference.assign(weight, expert, token_mask=mask, **options))


def assign_case(
    lead: tuple[int, ...],
    num_gates: int,
    top_n: int,
    capacity: int | None,
    policy: str = "all",
    *,
    dtype=torch.float32,
    mask=False,
    keys=False,
    align=1,
) -> AssignCase:
    """Tokens ``lead`` (groups and positions) on experts of uneven popularity, so that some overflow and some stay empty.

    ``keys``: some of them equal, negative, zero of either sign or no numbers.
    """
    scores = torch.randn((*lead, num_gates), dtype=dtype) + 2 * torch.rand(num_gates, dtype=dtype)
    weight, expert = scores.softmax(-1).topk(top_n, dim=-1)
    return AssignCase(
        weight / weight.sum(-1, keepdim=True),
        expert.int(),
        num_gates,
        capacity,
        policy,
        draws=torch.rand(weight.shape, dtype=dtype) if policy == "random" else None,
        threshold=torch.rand(top_n, dtype=dtype) if policy in ("random", "threshold") else None,
        mask=torch.rand(lead) < 0.7 if mask else None,
        keys=random_keys(weight.shape, dtype) if keys else None,
        align=align,
    )


def random_keys(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Keys of any kind, many of them equal."""
    keys = torch.randn(shape, dtype=dtype)
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-40, -1e-40, math.inf, -math.inf, math.nan, -math.nan], dtype=dtype)
    return torch.where(torch.rand(shape) < 0.5, keys, special[torch.randint(len(special), shape)])


def by_group(t: Tensor, dims: int) -> Tensor:
    """All but the last ``dims`` dimensions as one."""
    return t.reshape(t.shape[:-dims].numel(), *t.shape[-dims:])


def check_assignment(case: AssignCase, out: AssignResult) -> None:
    """What docs/spec.md promises of any assignment, whatever the order in which it is computed."""
    tokens, top_n = out.slot.shape[-2:]
    experts, capacity, held = case.num_gates, case.capacity, out.slot >= 0
    assert ((out.slot >= -2) & (out.slot < capacity)).all()
    assert_same_bits(out.kept, case.weight.where(held, 0))
    assert out.offsets.shape == (0,)
    place = torch.where(held, case.expert.long() * capacity + out.slot, -1)
    for pairs, source, demand in zip(by_group(place, 2), by_group(out.source, 2), by_group(out.demand, 1), strict=True):
        pairs, source = pairs.flatten(), source.flatten()
        taken = pairs[pairs >= 0]
        assert len(taken.unique()) == len(taken)  # no two pairs of a group in one slot
        back = torch.full_like(source, -1).scatter(0, taken, (pairs >= 0).nonzero()[:, 0].int())
        assert_same_bits(source, back)  # source is the inverse
        source = source.view(experts, capacity)
        filled = source >= 0
        assert_same_bits(filled.sum(-1).int(), demand.clamp(max=capacity))  # conservation
        assert (filled.int().diff(dim=-1) <= 0).all()  # slots fill from the front
        order = source % top_n * tokens + source // top_n
        assert (order.diff(dim=-1)[filled[:, 1:]] > 0).all()  # first by rank, then by token


def check_dropless(case: AssignCase, out: AssignResult) -> None:
    """The same for the dropless layout."""
    held, pairs, rows = out.slot >= 0, case.expert.numel(), dropless_rows(case.expert.numel(), case.num_gates, case.align)
    assert out.source.shape == (rows,)
    assert rows >= pairs
    assert rows % case.align == 0
    assert ((out.slot >= -1) & (out.slot < max(pairs, 1))).all()  # none is over capacity
    assert_same_bits(out.kept, case.weight.where(held, 0))
    assert_same_bits(out.demand, torch.bincount(case.expert[held], minlength=case.num_gates).int())  # conservation
    ends = out.offsets.tolist()
    for expert, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        demand, found = int(out.demand[expert]), out.source[start:end]
        assert end % case.align == 0
        assert 0 <= end - start - demand < case.align
        chose = ((case.expert == expert) & held).flatten().nonzero()[:, 0].int()
        assert_same_bits(found[:demand], chose)  # first by token, then by rank
        assert_same_bits(out.slot.flatten()[chose], torch.arange(demand).int())
        assert (found[demand:] == -1).all()
    assert (out.source[ends[-1] :] == -1).all()


@dataclass
class Assignment:
    """Inputs of ``dense``, ``dispatch`` and ``combine``."""

    weight: Tensor
    expert: Tensor
    slot: Tensor
    source: Tensor
    offsets: Tensor | None = None  # None: the capacity layout
    straight_through: bool = True

    @property
    def slots(self) -> tuple[Tensor, Tensor, Tensor]:
        """The indices that ``dense`` takes."""
        return self.expert, self.slot, self.source

    @property
    def indices(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The indices that ``dispatch`` and ``combine`` take."""
        return *self.slots, self.offsets

    def map(self, function) -> "Assignment":
        """The assignment with ``function`` of each tensor."""
        tensors = {name: function(t) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **tensors)

    def routing(self, weight: Tensor | None = None) -> Routing:
        weight = self.weight if weight is None else weight
        fields = self.expert, weight, self.slot, self.source, None, None, None, self.straight_through, self.offsets
        return Routing(*fields)


def assignment(
    lead: tuple[int, ...],
    num_gates: int,
    top_n: int,
    capacity: int | None,
    *,
    dtype=torch.float32,
    straight_through=True,
    align=1,
) -> Assignment:
    """Returns a random assignment, computed by the reference; a third of the later ranks is below the threshold."""
    case = assign_case(lead, num_gates, top_n, capacity, "threshold", dtype=compute_dtype(dtype), align=align)
    case.threshold = case.weight.flatten(0, -2).quantile(1 / 3, dim=0) if case.weight.numel() else case.threshold
    out = case.oracle()
    offsets = None if capacity is not None else out.offsets
    return Assignment(out.kept, case.expert, out.slot, out.source, offsets, straight_through)


def places(a: Assignment) -> tuple[Tensor, int]:
    """The row of each pair's slot ``(…, n, k)``, or where there is no such slot the number of rows; and that number."""
    known = (a.expert >= 0) & (a.slot >= 0)
    if a.offsets is None:
        num_gates, capacity = a.source.shape[-2:]
        size, known = num_gates * capacity, known & (a.expert < num_gates) & (a.slot < capacity)
        return torch.where(known, a.expert.long() * capacity + a.slot, size), size
    size, known = a.source.shape[0], known & (a.expert < len(a.offsets))
    expert, ends = a.expert.long().where(known, 0), a.offsets.long()
    row, end = torch.cat([ends.new_zeros(1), ends[:-1]])[expert] + a.slot, ends[expert]
    return torch.where(known & (row >= 0) & (row < end) & (end <= size), row, size), size


def in_range(a: Assignment) -> Tensor:
    """Pairs whose expert and slot exist, ``(…, n, k)``: those that ``dense`` shows."""
    place, size = places(a)
    return place < size


def honest(a: Assignment) -> Assignment:
    """What is left of tampered indices: pairs that hold a slot in range which names them as its source."""
    place, size = places(a)
    per_group = -2 if a.offsets is None else 0
    place, source = place.flatten(per_group), a.source.flatten(per_group)
    pair = torch.arange(place.shape[-1]).expand_as(place)
    named = torch.cat([source, source.new_full((*source.shape[:-1], 1), -1)], -1).gather(-1, place) == pair
    place = place.where(named, size)
    source = torch.full((*source.shape[:-1], size + 1), -1).scatter(-1, place, pair)[..., :-1]
    return replace(a, slot=a.slot.where(named.view(a.slot.shape), -1), source=source.view(a.source.shape).int())


def tampered(a: Assignment, share: float = 0.3) -> Assignment:
    """Indices replaced here and there by others, in range or far out of it."""

    def tamper(t: Tensor, size: int) -> Tensor:
        evil = torch.tensor([INT_MIN, INT_MIN + 1, -3, -2, -1, 0, size - 1, size, size + 1, 2**30, INT_MAX - 1, INT_MAX])
        outside, inside = evil[torch.randint(len(evil), t.shape)], torch.randint(max(size, 1), t.shape)
        new = torch.where(torch.rand(t.shape) < 0.5, outside, inside)
        return torch.where(torch.rand(t.shape) < share, new.int(), t)

    if a.offsets is None:
        (num_gates, capacity), pairs, offsets = a.source.shape[-2:], a.slot.shape[-2:].numel(), None
    else:
        num_gates, capacity, pairs = len(a.offsets), len(a.source) // len(a.offsets), a.slot.numel()
        offsets = tamper(a.offsets, len(a.source))
    expert, slot, source = tamper(a.expert, num_gates), tamper(a.slot, capacity), tamper(a.source, pairs)
    return replace(a, expert=expert, slot=slot, source=source, offsets=offsets)
