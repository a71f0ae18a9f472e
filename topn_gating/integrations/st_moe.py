"""Drop-in for st-moe-pytorch 0.1.8: change the import, and nothing else.

::

    from topn_gating.integrations.st_moe import MoE, SparseMoEBlock   # from st_moe_pytorch import MoE, SparseMoEBlock

Arguments, attributes, checkpoints and, under the same seed, the numbers are that package's. What it leaves out is the dense
tensors: tokens go to the experts through :class:`topn_gating.Routing`. Each expert is a module, as there, but all are computed
together. Where a user has replaced, patched or hooked a module, that module is called as there.

Symbols in shapes: ``b`` sequences of ``n`` tokens, ``e`` experts, ``C`` slots, ``d`` features.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from ..checks import check_count, check_instance
from ..distributed.exchange import ExpertGroup
from ..eager import has_data
from ..experts import feed_forwards, scaled_geglu
from ..gated import gated_unit
from ..gating import TopNGating as _TopNGating
from ..moe import MixtureOfExpertsReturn
from ..reference import soft_topn
from ..routing import Routing

__all__ = ["GEGLU", "Expert", "Experts", "MixtureOfExpertsReturn", "MoE", "RMSNorm", "SparseMoEBlock", "TopNGating"]


class RMSNorm(nn.Module):
    """Divides by the root mean square of the features, and scales each (arXiv 1910.07467)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = dim**0.5
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """``(…, d)`` of ``(…, d)``."""
        outputs: Tensor = F.normalize(x, dim=-1) * self.gamma * self.scale
        return outputs


class GEGLU(nn.Module):
    """A gated GELU times a learned scale of each feature (arXiv 2202.08906, appendix A)."""

    mult_bias: nn.Parameter | float

    def __init__(self, dim: int, mult_bias: bool = True) -> None:
        super().__init__()
        self.mult_bias = nn.Parameter(torch.ones(dim)) if mult_bias else 1.0

    def forward(self, x: Tensor) -> Tensor:
        """``(…, f)`` of ``(…, 2f)``."""
        outputs: Tensor = gated_unit(x, "gelu", "gate last") * self.mult_bias
        return outputs


class Expert(nn.Module):
    """A feedforward of two linear layers with a GEGLU between them.

    Args:
        dim: features of a token.
        hidden_mult: the hidden size is ``int(dim · hidden_mult · 2 / 3)``.
        mult_bias: whether the GEGLU has a learned scale.
        prenorm: whether an RMSNorm comes first.
    """

    def __init__(self, dim: int, hidden_mult: float = 4, mult_bias: bool = True, prenorm: bool = False) -> None:
        super().__init__()
        hidden = int(dim * hidden_mult * 2 / 3)
        norm = [RMSNorm(dim)] if prenorm else []
        self.net = nn.Sequential(*norm, nn.Linear(dim, 2 * hidden), GEGLU(hidden, mult_bias), nn.Linear(hidden, dim))
        self.apply(self.init_)

    def init_(self, module: nn.Module) -> None:
        """Draws a linear layer's weight and bias, uniform within the root of one over its outputs, as that package does."""
        if isinstance(module, nn.Linear):
            bound = module.weight.shape[0] ** -0.5
            nn.init.uniform_(module.weight, -bound, bound)
            nn.init.uniform_(module.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """``(…, d)`` of ``(…, d)``."""
        outputs: Tensor = self.net(x)
        return outputs


class Experts(nn.Module):
    """A list of experts, each with the buffers of its tokens.

    Experts of the class :class:`Expert` that nobody has changed are computed together. On the CPU their parameters lie one
    after the other in memory, so that this copies nothing. Any other modules are called one after the other.

    Args:
        experts: modules from ``(b, C, d)`` to the same.
        is_distributed: divides the work among all ranks of torch.distributed, of which each holds all experts and computes the
            experts ``r · e / W …`` (:mod:`topn_gating.distributed`); by default if there are several ranks and W divides e.
        allow_var_seq_len: the ranks may have other numbers of tokens.

    Raises:
        ValueError: ``is_distributed`` where the number of ranks does not divide that of the experts.
    """

    def __init__(
        self, experts: Iterable[nn.Module], is_distributed: bool | None = None, allow_var_seq_len: bool = False
    ) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.num_experts = len(self.experts)
        self.is_distributed = _distributed(self.num_experts) if is_distributed is None else is_distributed
        self.allow_var_seq_len = allow_var_seq_len
        self.register_buffer("dummy", torch.ones(1), persistent=False)
        self._group: ExpertGroup | None = None
        self._packed: dict[str, Tensor] = {}
        self._pack()

    @property
    def device(self) -> torch.device:
        """That of the module."""
        return self.get_buffer("dummy").device

    def forward(self, x: Tensor, is_distributed: bool | None = None) -> Tensor:
        """Outputs of buffers ``x`` ``(b, e, C, d)``, of the same shape."""
        if not (self.is_distributed if is_distributed is None else is_distributed):
            return self._of_buffers(x, slice(None))
        group, here = self._ranks()
        if not self.allow_var_seq_len:
            return group.compute(lambda buffers: self._of_buffers(buffers, here), x, None, self.training)
        by_expert = x.movedim(-3, 0)
        demand = torch.full((self.num_experts,), by_expert[0, ..., 0].numel(), dtype=torch.int32, device=x.device)
        outputs = self._on_ranks(by_expert.flatten(0, -2), demand)
        return outputs.view(by_expert.shape).movedim(0, -3)

    def of_tokens(self, x: Tensor, routing: Routing) -> Tensor:
        """The outputs ``(b, n, d)`` of tokens ``x`` ``(b, n, d)`` under a routing of them."""
        rows_alone = self.allow_var_seq_len if self.is_distributed else x.is_cpu and self._are_own()
        if not rows_alone or not _is_own(self, Experts):
            return routing.combine(self(routing.dispatch(x)))
        routing = routing.as_dropless()  # without the empty slots
        rows, offsets = routing.dispatch(x), routing.offsets
        if self.is_distributed:
            return routing.combine(self._on_ranks(rows, routing.demand))
        return routing.combine(self._of_rows(rows, offsets, slice(None)))

    def _on_ranks(self, rows: Tensor, demand: Tensor) -> Tensor:
        """Outputs of rows ``(R, d)``, of which each expert has as many as ``demand`` says, by the ranks of the experts."""
        group, here = self._ranks()
        return group.compute(lambda rows, offsets: self._of_rows(rows, offsets, here), rows, demand, self.training)

    def _of_buffers(self, x: Tensor, here: slice) -> Tensor:
        if self._are_own():
            return self._together(x, None, here)
        outputs = [expert(buffers) for expert, buffers in zip(self.experts[here], x.unbind(-3), strict=True)]
        return self._without_others(torch.stack(outputs, -3), here)

    def _of_rows(self, rows: Tensor, offsets: Tensor | None, here: slice) -> Tensor:
        if self._are_own():
            return self._together(rows, offsets, here)
        assert offsets is not None
        counts = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
        parts = rows[: sum(counts)].split(counts)
        outputs = torch.cat([expert(part) for expert, part in zip(self.experts[here], parts, strict=True)])
        return self._without_others(F.pad(outputs, (0, 0, 0, rows.shape[0] - outputs.shape[0])), here)

    def _without_others(self, outputs: Tensor, here: slice) -> Tensor:
        """The outputs, whose gradient for the experts that other ranks compute is 0: DistributedDataParallel waits for it."""
        used = set(self.experts[here].parameters())
        unused = [p for p in self.experts.parameters() if p.requires_grad and p not in used]
        outputs = _Unused.apply(outputs, *unused) if unused else outputs
        return outputs

    def _together(self, x: Tensor, offsets: Tensor | None, here: slice) -> Tensor:
        """The outputs of buffers, or of rows beside ``offsets``, of experts that all are of the class :class:`Expert`."""
        # Of all experts, of which this rank takes its part: then the others have a gradient too, which is 0.
        stacked = {name: self._stacked(name, parameters)[here] for name, parameters in self._by_name()}
        first = stacked["net.0.weight"], stacked["net.0.bias"]
        weight, bias = stacked["net.2.weight"], stacked["net.2.bias"]
        scale = stacked.get("net.1.mult_bias")
        if scale is not None and x[..., 0].numel() < weight[..., 0].numel():
            return feed_forwards(x, offsets, first, (weight, bias), lambda u, offsets: scaled_geglu(u, scale, offsets))
        if scale is not None:  # the matrices have fewer rows than x: scale those
            weight = weight * scale.unsqueeze(1)
        return feed_forwards(x, offsets, first, (weight, bias), lambda u, _: gated_unit(u, "gelu", "gate last"))

    def _by_name(self) -> Iterator[tuple[str, tuple[nn.Parameter, ...]]]:
        """The name and the parameters of all experts, for each parameter of an expert."""
        names = [name for name, _ in self.experts[0].named_parameters()]
        return zip(names, zip(*(expert.parameters() for expert in self.experts), strict=True), strict=True)

    def _stacked(self, name: str, parameters: tuple[nn.Parameter, ...]) -> Tensor:
        """The parameters in one tensor ``(e, …)``."""
        packed = self._packed.get(name)
        if packed is None or not has_data(parameters[0]) or not _lie_in(packed, parameters):
            return torch.stack(parameters)
        stacked: Tensor = _Packed.apply(packed, *parameters)
        return stacked

    def _are_own(self) -> bool:
        """Whether the experts are those of this package, of one size, and nobody has changed or hooked them."""
        shapes = set()
        for expert in self.experts:
            if not isinstance(expert, Expert) or not _is_own(expert, Expert):
                return False
            if not _is_own(expert.net, nn.Sequential) or len(expert.net) != 3:
                return False
            first, unit, last = expert.net
            if not (_is_own(first, nn.Linear) and _is_own(unit, GEGLU) and _is_own(last, nn.Linear)):
                return False
            if first.bias is None or last.bias is None:
                return False
            shapes.add((first.weight.shape, last.weight.shape, first.weight.dtype, last.weight.dtype, type(unit.mult_bias)))
        return len(shapes) == 1

    def _ranks(self) -> tuple[ExpertGroup, slice]:
        """The ranks, and which of the experts are this one's."""
        if self._group is None:
            self._group = ExpertGroup(dist.distributed_c10d._get_default_group(), self.num_experts)
        first = self._group.rank * self._group.num_local
        return self._group, slice(first, first + self._group.num_local)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Experts":
        super()._apply(fn, recurse)
        self._pack()
        return self

    def _pack(self) -> None:
        """Lays the same parameter of all experts one after the other in memory, so that no forward pass has to.

        Each has a storage of its own there, as safetensors asks for.
        """
        self._packed = {}
        if not self._are_own():
            return
        for name, parameters in self._by_name():
            if len({id(p) for p in parameters}) == len(parameters) and all(p.is_cpu and p.numel() for p in parameters):
                packed = torch.stack([p.detach() for p in parameters])
                memory, size = packed.view(torch.uint8).numpy(), packed[0].nbytes
                for i, p in enumerate(parameters):
                    p.data = torch.frombuffer(memory, dtype=p.dtype, count=p.numel(), offset=i * size).view(p.shape)
                self._packed[name] = packed

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_packed": {}, "_group": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pack()


class TopNGating(_TopNGating):
    """:class:`topn_gating.TopNGating` with that package's balance loss, which it takes after the capacity drop."""

    def __init__(self, *args: Any, balance_on: Any = "kept", **kwargs: Any) -> None:
        super().__init__(*args, balance_on=balance_on, **kwargs)
        self.register_buffer("zero", torch.zeros(1), persistent=False)

    def topk(self, x: Tensor, k: int) -> "TopkReturn":
        """The ``k`` largest of the last dimension, times the soft top-n's gates where the module is differentiable."""
        if not self.differentiable_topk:
            return TopkReturn(*torch.topk(x, k, dim=-1), None, None)
        descent = soft_topn(x, k)
        gates = descent + (1 - descent).detach()
        values, indices = torch.topk(x * gates, k, dim=-1)
        return TopkReturn(values, indices, descent.gather(-1, indices), gates.gather(-1, indices))


class TopkReturn(NamedTuple):
    """What :meth:`TopNGating.topk` returns, ``(…, k)`` each; the last two are None without a soft top-n."""

    values: Tensor
    indices: Tensor
    coor_descent_values: Tensor | None
    gates: Tensor | None


class MoE(nn.Module):
    """Mixture of Experts. Arguments as :class:`topn_gating.MoE`, but for those of :class:`Experts`.

    Args:
        experts: a list or ModuleList of modules from ``(b, C, d)`` to the same; by default :class:`Expert`. Any other module
            takes buffers ``(b, e, C, d)``, as :class:`topn_gating.GLUExperts` does.
        is_distributed: see :class:`Experts`, as the next.
        allow_var_seq_len: the ranks may have other numbers of tokens.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument has a value out of its range.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int = 16,
        expert_hidden_mult: float = 4,
        threshold_train: float | tuple[float, ...] = 0.2,
        threshold_eval: float | tuple[float, ...] = 0.2,
        capacity_factor_train: float = 1.25,
        capacity_factor_eval: float = 2.0,
        gating_top_n: int = 2,
        balance_loss_coef: float = 1e-2,
        router_z_loss_coef: float = 1e-3,
        experts: nn.Module | Iterable[nn.Module] | None = None,
        straight_through_dispatch_tensor: bool = True,
        differentiable_topk: bool = False,
        differentiable_topk_fused: bool = True,
        is_distributed: bool | None = None,
        allow_var_seq_len: bool = False,
    ) -> None:
        super().__init__()
        self.dim = check_count("dim", dim)
        self.num_experts = check_count("num_experts", num_experts)
        self.gate = TopNGating(
            dim,
            num_experts,
            top_n=gating_top_n,
            threshold_train=threshold_train,
            threshold_eval=threshold_eval,
            capacity_factor_train=capacity_factor_train,
            capacity_factor_eval=capacity_factor_eval,
            straight_through_dispatch_tensor=straight_through_dispatch_tensor,
            differentiable_topk=differentiable_topk,
            differentiable_topk_fused=differentiable_topk_fused,
        )
        if experts is None:
            experts = [Expert(dim, expert_hidden_mult) for _ in range(num_experts)]
        if not isinstance(experts, nn.Module) or isinstance(experts, nn.ModuleList):
            experts = Experts(experts, is_distributed, allow_var_seq_len)
            if len(experts.experts) != num_experts:
                raise ValueError(f"experts must have num_experts={num_experts} modules, got {len(experts.experts)}")
        self.experts: nn.Module = experts
        self.balance_loss_coef = balance_loss_coef
        self.router_z_loss_coef = router_z_loss_coef

    def forward(self, x: Tensor, noise_gates: bool = False, noise_mult: float = 1.0) -> MixtureOfExpertsReturn:
        """``outputs, total_aux_loss, balance_loss, router_z_loss`` of tokens ``x`` ``(b, n, d)``."""
        if _is_own(self.gate, TopNGating):
            routing = self.gate.route(x, noise_gates, noise_mult)
            losses = routing.balance_loss, routing.router_z_loss
            if isinstance(self.experts, Experts):
                outputs = self.experts.of_tokens(x, routing)
            else:
                outputs = routing.combine(self.experts(routing.dispatch(x)))
        else:  # a gate of the user's own
            dispatch, combine, *losses = self.gate(x, noise_gates=noise_gates, noise_mult=noise_mult)
            buffers = torch.einsum("bnd,bnec->becd", x, dispatch)
            outputs = torch.einsum("becd,bnec->bnd", self.experts(buffers), combine)
        balance_loss, router_z_loss = losses
        total_aux_loss = balance_loss * self.balance_loss_coef + router_z_loss * self.router_z_loss_coef
        return MixtureOfExpertsReturn(outputs, total_aux_loss, balance_loss, router_z_loss)


class SparseMoEBlock(nn.Module):
    """A mixture of experts in a residual block, with a feedforward before and after it (arXiv 2202.08906).

    Args:
        moe: the layer, which has ``dim``.
        add_ff_before: whether a feedforward comes before it.
        add_ff_after: whether one comes after it.
    """

    def __init__(self, moe: nn.Module, *, add_ff_before: bool = False, add_ff_after: bool = True) -> None:
        super().__init__()
        check_instance("moe", moe, nn.Module, "torch.nn.Module")
        dim: Any = moe.dim
        self.moe = moe
        self.moe_prenorm = RMSNorm(dim)
        self.ff_before = Expert(dim, prenorm=True) if add_ff_before else None
        self.ff_after = Expert(dim, prenorm=True) if add_ff_after else None

    def forward(self, x: Tensor, noise_gates: bool = False, noise_mult: float = 1.0) -> MixtureOfExpertsReturn:
        """As :meth:`MoE.forward`."""
        if self.ff_before is not None:
            x = self.ff_before(x) + x
        out = self.moe(self.moe_prenorm(x), noise_gates=noise_gates, noise_mult=noise_mult)
        x = out[0] + x
        if self.ff_after is not None:
            x = self.ff_after(x) + x
        return MixtureOfExpertsReturn(x, *out[1:])


def _distributed(num_experts: int) -> bool:
    """Whether there are several ranks that can divide the experts equally."""
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    return ranks > 1 and num_experts % ranks == 0


def _is_own(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of a class itself, and nobody has patched or hooked it: then its ``forward`` is what we know."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) is kind and not hooks and "forward" not in vars(module)


def _lie_in(packed: Tensor, parameters: tuple[nn.Parameter, ...]) -> bool:
    """Whether the parameters are still where they were packed; a conversion or an assignment to ``.data`` moves them."""
    start, size = packed.data_ptr(), packed[0].nbytes
    return all(p.data_ptr() == start + i * size for i, p in enumerate(parameters)) and parameters[0].dtype == packed.dtype


class _Packed(Function):
    """The memory in which all parameters lie, which has their gradient."""

    @staticmethod
    def forward(packed: Tensor, *parameters: Tensor) -> Tensor:
        return packed.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _packed, *ctx.parameters = inputs
        ctx.versions = [p._version for p in ctx.parameters]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.versions != [p._version for p in ctx.parameters]:
            raise RuntimeError("an expert's parameter has been modified in place between the forward and the backward pass")
        return None, *grad.unbind()


class _Unused(Function):
    """Identity of ``outputs``, in which parameters have the gradient 0."""

    @staticmethod
    def forward(outputs: Tensor, *parameters: Tensor) -> Tensor:
        return outputs.view_as(outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.parameters = inputs[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros_like(p) for p in ctx.parameters)
