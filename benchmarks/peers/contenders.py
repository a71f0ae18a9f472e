"""The interface of the contenders; topn_gating as a contender; and the floors, lower bounds of a router's time."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from shapes import Shape
from torch import Tensor, nn

import topn_gating

Forward = Callable[[], Sequence[Tensor]]

EPS, THRESHOLD, CAPACITY_FACTOR = 1e-9, 0.2, 1.25  # the defaults of topn_gating, st-moe-pytorch and zeta


class Problem(NamedTuple):
    """The tokens, gate weight and number of slots that every contender gets.

    ``policy`` "random" applies the thresholds; "all" applies none, to compare with peers that have no thresholds.
    """

    shape: Shape
    x: Tensor
    weight: nn.Parameter
    capacity_factor: float = CAPACITY_FACTOR
    policy: str = "random"

    @classmethod
    def make(cls, shape: Shape, dtype: torch.dtype, **options) -> "Problem":
        """Returns random tokens, and a weight initialised as in ``nn.Linear``."""
        torch.manual_seed(1)
        weight = nn.Linear(shape.d, shape.e, bias=False, dtype=dtype).weight
        x = torch.randn(shape.b, shape.n, shape.d, dtype=dtype, requires_grad=True)
        return cls(shape, x, weight, **options)

    @property
    def capacity(self) -> int:
        """Number of slots of an expert for a group."""
        return topn_gating.expert_capacity(self.shape.n, self.shape.e, self.capacity_factor)

    @property
    def dense_bytes(self) -> int:
        """Size in bytes of one ``(b, n, e, C)`` float32 tensor."""
        return 4 * self.shape.b * self.shape.n * self.shape.e * self.capacity


class Contender:
    """A router, on a problem.

    Attributes:
        name: its name in the table.
        about: what is run, and how its work differs from that of topn_gating.
        install: the command that installs it.
        same: whether it computes the same as topn_gating under the same seed; else it does so only if nothing is dropped.
        dense_tensors: the approximate number of ``(b, n, e, C)`` float32 tensors that it holds at once.
    """

    name = about = install = ""
    same = True
    dense_tensors: float = 0

    dense: Forward | None = None  # returns both (b, n, e, C) tensors; None: it has no dense form

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    @classmethod
    def load(cls) -> None:
        """Imports the package that it needs; raises what the import raises."""

    def gate(self) -> Sequence[Tensor]:
        """Returns the differentiable results of the router: the weights and the losses."""
        raise NotImplementedError

    def full(self, gain: Tensor | None = None) -> Sequence[Tensor]:
        """Routes the tokens through the experts; returns the outputs ``(b, n, d)`` and the losses.

        Each expert is the identity, or multiplies by its element of ``gain`` ``(e,)``.
        """
        raise NotImplementedError


def scaled(rows: Tensor, gain: Tensor | None) -> Tensor:
    """Returns the experts' outputs of their inputs ``(…, e, C, d)``."""
    return rows if gain is None else rows * gain[:, None, None]


class Ours(Contender):
    """topn_gating in its compact form."""

    name = "topn_gating"
    about = "this package: TopNGating.route, dispatch, combine; dense: TopNGating.forward"

    def __init__(self, problem: Problem, straight_through: bool = True) -> None:
        super().__init__(problem)
        shape = problem.shape
        self.module = topn_gating.TopNGating(
            shape.d,
            shape.e,
            EPS,
            shape.k,
            THRESHOLD,
            capacity_factor_train=problem.capacity_factor,
            straight_through_dispatch_tensor=straight_through,
            policy_train=problem.policy,
            dtype=problem.x.dtype,
        )
        self.module.to_gates.weight = problem.weight

    def gate(self) -> Sequence[Tensor]:
        routing = self.module.route(self.problem.x)
        return routing.weight, routing.balance_loss, routing.router_z_loss

    def full(self, gain: Tensor | None = None) -> Sequence[Tensor]:
        routing = self.module.route(self.problem.x)
        rows = scaled(topn_gating.dispatch(self.problem.x, routing), gain)
        return topn_gating.combine(rows, routing), routing.balance_loss, routing.router_z_loss

    def dense(self) -> Sequence[Tensor]:
        return self.module(self.problem.x)


class Floor(Contender):
    """Not a router, but a part of the work that every router must do."""

    full = None


class Products(Floor):
    """The gate's matrix products."""

    name = "floor: matrix products"
    about = "the gate's logits alone; backward, the gradients of x and of the gate's weight: three matrix products by torch"

    def gate(self) -> Sequence[Tensor]:
        return (F.linear(self.problem.x, self.problem.weight),)


class Zeros(Floor):
    """The allocation of the dense tensors, without their values."""

    name = "floor: compact gate, two torch.zeros"
    about = "topn_gating's compact gate, then two torch.zeros of the dense tensors' size"
    gate = None

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.compact = Ours(problem)

    def dense(self) -> Sequence[Tensor]:
        routing = self.compact.gate()
        b, n, _, e, _ = self.problem.shape
        size = b, n, e, self.problem.capacity
        return *routing, *(torch.zeros(size, dtype=self.problem.x.dtype) for _ in range(2))


def compiled(eager: type[Contender]) -> type[Contender]:
    """Returns ``eager`` with all timed functions under ``torch.compile``, in its default mode.

    torch.rand gives the same numbers as in eager mode, so that the same seed gives the same routing.
    """

    functions: dict[Callable, list[str]] = {}
    for name in ("gate", "full", "dense"):
        if getattr(eager, name) is not None:
            functions.setdefault(getattr(eager, name), []).append(name)

    class Compiled(eager):
        name = f"{eager.name}, compiled"
        about = f"{eager.name} under torch.compile, default mode"

        def __init__(self, problem: Problem) -> None:
            super().__init__(problem)
            for function, timed in functions.items():
                step = partial(torch.compile(function, options={"fallback_random": True}), self)
                for name in timed:
                    setattr(self, name, step)

    return Compiled
