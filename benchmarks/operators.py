"""The operators of ``torch.ops.topn_gating`` on a shape: their arguments, and the bytes that they must read and write."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from shapes import Shape
from torch import Tensor

import topn_gating
from topn_gating import reference
from topn_gating.ops import POLICIES, GateOptions

EPS, THRESHOLD, POLICY, CAPACITY_FACTOR = 1e-9, 0.2, "random", 1.25  # the module's defaults
SECTOR = 32  # bytes that a GPU reads at least, however few of them are asked for


class Traffic(NamedTuple):
    """Names, in the schema, of the tensors that an operator must read or write: entirely, or only elements or rows of them."""

    whole: str
    pair_elements: str = ""  # one element for each pair that holds a slot
    pair_sectors: str = ""  # one element for each of those pairs, scattered, so that a sector is read for each
    pair_rows: str = ""  # one row for each of those pairs
    token_rows: str = ""  # one row for each token that holds a slot

    def bytes(self, tensors: dict[str, Tensor | None], slot: Tensor | None) -> int:
        """Returns the bytes of one call; ``slot`` shows which pairs hold a slot, and a tensor that is None counts 0."""
        pairs, tokens = (0, 0) if slot is None else (int((slot >= 0).sum()), int((slot >= 0).any(-1).sum()))
        sizes: tuple[tuple[str, Callable[[Tensor], int]], ...] = (
            (self.whole, lambda t: t.numel() * t.element_size()),
            (self.pair_elements, lambda t: pairs * t.element_size()),
            (self.pair_sectors, lambda t: pairs * SECTOR),
            (self.pair_rows, lambda t: pairs * t.shape[-1] * t.element_size()),
            (self.token_rows, lambda t: tokens * t.shape[-1] * t.element_size()),
        )
        found = [(tensors.get(name), size) for names, size in sizes for name in names.split()]
        return sum(size(t) for t, size in found if t is not None)


TRAFFIC = {
    "gate": Traffic("logits weight expert importance counts balance_loss router_z_loss"),
    "gate_backward": Traffic("grad_weight grad_balance_loss grad_router_z_loss logits expert counts grad_logits"),
    "assign": Traffic("weight expert draws threshold kept slot source demand offsets"),
    "assign_backward": Traffic("grad_kept slot grad_weight"),
    "dense": Traffic("weight expert slot dispatch combine", pair_elements="source"),
    "dense_backward": Traffic("expert slot grad_weight", pair_elements="source", pair_sectors="grad_dispatch grad_combine"),
    "dispatch": Traffic("source offsets y", pair_elements="expert slot", token_rows="x"),
    "dispatch_backward": Traffic(
        "expert slot offsets grad_x grad_weight", pair_elements="source", pair_rows="grad_y", token_rows="x"
    ),
    "combine": Traffic("expert slot offsets out", pair_elements="weight source", pair_rows="y"),
    "combine_backward": Traffic(
        "source offsets grad_y grad_weight", pair_elements="weight expert slot", pair_rows="y", token_rows="grad_out"
    ),
    "linear": Traffic("x weight logits"),
    "linear_backward": Traffic("grad_logits x weight grad_x grad_weight"),
    "grouped_linear": Traffic("rows weight bias offsets out"),
    "grouped_linear_backward": Traffic("grad rows weight offsets grad_rows grad_weight grad_bias"),
}
ON_CPU_ALONE = ("linear", "linear_backward", "grouped_linear", "grouped_linear_backward")
ROUTE, TOPK = "gate and assign", "torch.softmax and torch.topk"
PRODUCTS = "torch.mm for each expert"  # what grouped_linear computes, without its bias
EAGER, COMPILED = "reference route, eager", "reference route, compiled"
EINSUMS = {"einsum of dispatch": "...nd,...nec->...ecd", "einsum of combine": "...ecd,...nec->...nd"}
COMPARISONS = (*EINSUMS, PRODUCTS, EAGER, COMPILED)


def names(device: str, dropless: bool = False) -> list[str]:
    """Returns the operators of a device; ``dropless``: those that the layout of the experts' rows changes."""
    found = [name for name in TRAFFIC if device == "cpu" or name not in ON_CPU_ALONE]
    return [name for name in found if name.startswith(("assign", "dispatch", "combine"))] if dropless else found


def operator(name: str):
    """Returns the operator's overload, which knows its schema."""
    return getattr(torch.ops.topn_gating, name).default


def results_of(name: str, results: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
    """Returns an operator's results by the names of its schema."""
    results = (results,) if isinstance(results, Tensor) else results
    return dict(zip((r.name for r in operator(name)._schema.returns), results, strict=True))


class Problem:
    """The inputs of a shape. It keeps logits and routing; token rows and dense tensors are allocated at each call.

    In the dropless layout every pair is routed, and there are no dense tensors.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str, dropless: bool = False) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        b, n, _, e, k = shape
        self.capacity = None if dropless else topn_gating.expert_capacity(n, e, CAPACITY_FACTOR)
        torch.manual_seed(0)
        self.logits = self.normal(b, n, e)
        self.draws = torch.rand(b, n, k, device=device, dtype=self.compute_dtype)
        self.threshold = torch.full((k,), THRESHOLD, device=device, dtype=self.compute_dtype)
        self.weight, self.expert, _, self.counts, *_ = operator("gate")(**self.arguments("gate"))
        self.kept, self.slot, self.source, _, *offsets = operator("assign")(**self.arguments("assign"))
        self.offsets = offsets[0] if dropless else None

    def normal(self, *shape: int) -> Tensor:
        """Returns random numbers of the problem's type."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def route(self) -> Sequence[Tensor]:
        """Runs gate and assign."""
        weight, expert, *_ = operator("gate")(**self.arguments("gate"))
        return operator("assign")(**self.arguments("assign") | {"weight": weight, "expert": expert})

    def tokens(self) -> Tensor:
        """Returns token rows ``(b, n, d)``."""
        return self.normal(self.shape.b, self.shape.n, self.shape.d)

    def slots(self) -> Tensor:
        """Returns the experts' rows ``(b, e, C, d)``, or dropless ``(R, d)``."""
        return self.normal(*self.source.shape, self.shape.d)

    def dense(self) -> Sequence[Tensor]:
        """Returns both dense tensors."""
        return operator("dense")(**self.arguments("dense"))

    def groups(self) -> dict:
        """Returns rows of experts in equal groups, a matrix ``(d, d)`` for each, and where the groups end."""
        b, n, d, e, k = self.shape
        rows = b * n * k
        ends = torch.arange(1, e + 1, device=self.device) * rows // e
        return {"rows": self.normal(rows, d), "weight": self.normal(e, d, d), "offsets": ends.int()}

    def arguments(self, name: str) -> dict:
        """Returns the operator's arguments by the names of its schema.

        An older build of the package, measured beside this one, may call optional arguments by other names: they are None.
        """
        given = self._arguments(name)
        return {argument.name: given.get(argument.name) for argument in operator(name)._schema.arguments}

    def _arguments(self, name: str) -> dict:
        e, options = self.shape.e, GateOptions(EPS)._asdict()
        optional = {"noise": None, "token_mask": None}
        if name == "gate":
            optional |= {"select_bias": None, "given": None}
            return {"logits": self.logits, "top_n": self.shape.k, "losses": True, "statistics": False, **optional, **options}
        if name == "gate_backward":
            one = torch.ones((), device=self.device, dtype=self.compute_dtype)
            grads = {"grad_weight": self.weight, "grad_importance": None, "grad_balance_loss": one, "grad_router_z_loss": one}
            return {**grads, "logits": self.logits, "expert": self.expert, "counts": self.counts, **optional, **options}
        if name == "assign":
            policy, draws, threshold = POLICY, self.draws, self.threshold
            if self.capacity is None:
                policy, draws, threshold = "all", None, None
            arguments = {"weight": self.weight, "expert": self.expert, "draws": draws, "threshold": threshold}
            sizes = {"num_gates": e, "capacity": self.capacity, "align": 1, "policy": POLICIES.index(policy), "eps": EPS}
            return {**arguments, "token_mask": None, "keys": None, **sizes}
        if name == "assign_backward":
            return {"grad_kept": self.weight, "slot": self.slot}
        rows = {"expert": self.expert, "slot": self.slot, "source": self.source}
        if name == "dense":
            return {"weight": self.kept, **rows, "dtype": self.dtype, "straight_through": True}
        if name == "dense_backward":
            grad_dispatch, grad_combine = self.dense()
            return {"grad_dispatch": grad_dispatch, "grad_combine": grad_combine, **rows}
        rows["offsets"] = self.offsets
        if name == "dispatch":
            return {"x": self.tokens(), "weight": self.kept, **rows, "straight_through": True}
        if name == "dispatch_backward":
            return {"grad_y": self.slots(), "x": self.tokens(), **rows}
        if name == "combine":
            return {"y": self.slots(), "weight": self.kept, **rows}
        if name == "combine_backward":
            return {"grad_out": self.tokens(), "y": self.slots(), "weight": self.kept, **rows}
        if name == "grouped_linear":
            return {**self.groups(), "bias": self.normal(e, self.shape.d)}
        if name == "grouped_linear_backward":
            groups = self.groups()
            wanted = {"wants_rows": True, "wants_weight": True, "wants_bias": True}
            return {"grad": torch.randn_like(groups["rows"]), **groups, **wanted}
        product = {"x": self.tokens(), "weight": self.normal(e, self.shape.d)}
        if name == "linear":
            return product
        return {"grad_logits": self.logits, **product, "wants_x": True, "wants_weight": True}

    def large_bytes(self, name: str) -> int:
        """Returns the bytes of the dense tensors and of the rows that a line of the table allocates; all else is small."""
        b, n, d, e, k = self.shape
        dense, rows = 2 * b * n * e * (self.capacity or 0), (b * n + self.source.numel()) * d
        if name in EINSUMS:
            count = dense + rows
        elif name.startswith("grouped_linear") or name == PRODUCTS:
            count = (4 if name.endswith("backward") else 2) * (b * n * k * d + e * d * d)
        elif name.startswith("dense"):
            count = dense
        else:
            count = rows * {"dispatch": 1, "combine": 1, "dispatch_backward": 2, "combine_backward": 2}.get(name, 0)
        return count * self.dtype.itemsize

    def comparison(self, name: str) -> Callable[[], object]:
        """Returns the call of a line of the table that is not an operator."""
        if name == ROUTE:
            return self.route
        if name == TOPK:
            return lambda: torch.topk(torch.softmax(self.logits, -1), self.shape.k)
        if name == PRODUCTS:
            groups = self.groups()
            rows, weight, ends = groups["rows"], groups["weight"], groups["offsets"].tolist()
            out = torch.empty_like(rows)
            parts = [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
            return lambda: [torch.mm(rows[part], w.t(), out=out[part]) for part, w in zip(parts, weight, strict=True)]
        if name in EINSUMS:
            rows, dense = (self.tokens(), self.dense()[0]) if "dispatch" in name else (self.slots(), self.dense()[1])
            return lambda: torch.einsum(EINSUMS[name], rows, dense)
        options = {"top_n": self.shape.k, "capacity": self.capacity, "policy": POLICY, "threshold": self.threshold}
        function = reference.route
        if name == COMPILED:
            torch._dynamo.reset()  # a shape seen before would make the sizes of this one symbolic
            function = torch.compile(function)
        return lambda: function(self.logits, draws=self.draws, **options)
