"""The experts' feedforwards, for both layouts of their rows.

Symbols in shapes: ``e`` experts, ``C`` slots (capacity), ``R`` rows, ``d`` features of a token, ``f`` hidden features; ``…``
are the groups.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_count, check_floating, check_number, check_positive, check_same_type
from .dtypes import autocast
from .gated import ACTIVATIONS, Clamp, gated_unit
from .grouped import grouped_linear

Layer = tuple[Tensor, Tensor | None]  # the experts' weights (e, out, in) and biases (e, out) of a linear layer


class FeedForwards(nn.Module):
    """The base of the built-in experts: two linear layers an expert, and a gated unit between them."""

    dim: int
    num_experts: int
    hidden: int

    def forward(self, x: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Outputs of the experts, of the shape of their inputs ``x``.

        Args:
            x: buffers ``(…, e, C, dim)``; with ``offsets``, rows ``(R, dim)``, expert after expert. Of the parameters' type, or
                any that autocast converts.
            offsets: ``(e)`` int32, where each expert's rows end, as :func:`topn_gating.grouped_linear` takes them. Rows
                from the last of them on give 0.

        Raises:
            TypeError: ``x`` or ``offsets`` is of the wrong type.
            ValueError: ``x`` or ``offsets`` has the wrong shape or device.
        """
        return feed_forwards(x, offsets, *self._layers(), self._unit)

    def _layers(self) -> tuple[Layer, Layer]:
        """Weight ``(e, out, in)`` and bias ``(e, out)`` of each linear layer."""
        raise NotImplementedError

    def _unit(self, u: Tensor, offsets: Tensor | None) -> Tensor:
        """The gated unit ``(…, f)`` of rows ``(R, 2f)`` beside ``offsets``, or of ``(e, rows, 2f)``."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """What ``repr`` shows between the parentheses."""
        return f"dim={self.dim}, num_experts={self.num_experts}, hidden={self.hidden}"


class Experts(FeedForwards):
    r"""``num_experts`` two-matrix feedforwards with a gated GELU.

    ``y = (u · gelu(v) · mult_bias) W_out + b_out`` with ``u, v = x W_in + b_in`` (GEGLU, arXiv 2002.05202; the
    multiplicative bias as in ST-MoE, arXiv 2202.08906, appendix A).

    Args:
        dim: features of a token.
        num_experts: number of experts.
        hidden_mult: the hidden size is ``int(dim · hidden_mult · 2 / 3)``.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument has a value out of its range.

    Example::

        >>> experts = Experts(dim=512, num_experts=16)
        >>> buffers = experts(torch.randn(4, 16, 80, 512))   # (…, e, C, dim), as routing.dispatch(x) gives with a capacity
        >>> rows = experts(routing.dispatch(x), routing.offsets)  # (R, dim), of a dropless routing
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        hidden_mult: float = 4,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim = check_count("dim", dim)
        self.num_experts = num_experts = check_count("num_experts", num_experts)
        hidden = max(1, int(dim * check_positive("hidden_mult", hidden_mult) * 2 / 3))
        self.hidden = hidden = check_count("dim * hidden_mult", hidden)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight_in = parameter(num_experts, dim, 2 * hidden)
        self.bias_in = parameter(num_experts, 1, 2 * hidden)
        self.mult_bias = parameter(num_experts, 1, hidden)
        self.weight_out = parameter(num_experts, hidden, dim)
        self.bias_out = parameter(num_experts, 1, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weights and biases as ``nn.Linear`` does, uniform within ``fan_in ** -0.5``."""
        for weight, bias in ((self.weight_in, self.bias_in), (self.weight_out, self.bias_out)):
            _reset_linear(weight, bias, weight.shape[1])
        nn.init.ones_(self.mult_bias)

    def _layers(self) -> tuple[Layer, Layer]:
        return (self.weight_in.mT, self.bias_in.squeeze(1)), (self.weight_out.mT, self.bias_out.squeeze(1))

    def _unit(self, u: Tensor, offsets: Tensor | None) -> Tensor:
        return scaled_geglu(u, self.mult_bias.squeeze(1), offsets)


class GLUExperts(FeedForwards):
    r"""``num_experts`` feedforwards with a gated linear unit (arXiv 2002.05202), in the layout of transformers.

    ``y = (activation(g) · u) W_downᵀ + b_down`` with ``g, u = x W_gate_upᵀ + b_gate_up``. With ``limit`` the unit is gpt-oss's
    (arXiv 2508.10925): ``(u' + 1) · g' · sigmoid(alpha · g')`` with ``g' = min(g, limit)`` and ``u'`` clamped to ``±limit``.
    The ``state_dict`` of transformers' MixtralExperts, Qwen3MoeExperts, OlmoeExperts and DeepseekV3Experts loads unchanged, and
    GptOssExperts' with ``bias=True, interleaved=True, limit=7.0, transposed=True``.

    Args:
        dim: features of a token, ``d``.
        num_experts: number of experts, ``e``.
        hidden: features between the two products, ``f``.
        activation: name of an activation of ``torch.nn.functional`` ("silu", "gelu", "relu", …) or "gelu_tanh"; or a callable,
            such as a module, from a tensor to one of its shape and type.
        bias: adds ``gate_up_proj_bias (e, 2f)`` and ``down_proj_bias (e, d)``.
        interleaved: the outputs of ``gate_up_proj`` are ``g_0, u_0, g_1, u_1, …`` in place of all of ``g``, then all of ``u``.
        limit: clamps as gpt-oss does, above 0; None does not clamp.
        alpha: slope of the clamped unit's sigmoid; without ``limit`` it is not used.
        transposed: ``gate_up_proj (e, d, 2f)`` and ``down_proj (e, f, d)`` in place of ``(e, 2f, d)`` and ``(e, d, f)``.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument has a value out of its range, the activation is unknown, or ``limit`` comes with another than
            ``"silu"``, of which its unit is a kind.

    Example::

        >>> moe = MoE(dim=512, num_experts=16, dropless=True, experts=GLUExperts(512, 16, 1024))
    """

    gate_up_proj_bias: nn.Parameter | None
    down_proj_bias: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        num_experts: int,
        hidden: int,
        *,
        activation: str | Callable[[Tensor], Tensor] = "silu",
        bias: bool = False,
        interleaved: bool = False,
        limit: float | None = None,
        alpha: float = 1.702,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim = check_count("dim", dim)
        self.num_experts = num_experts = check_count("num_experts", num_experts)
        self.hidden = hidden = check_count("hidden", hidden)
        if isinstance(activation, str) and activation not in ACTIVATIONS:
            raise ValueError(f"activation must be a callable or one of {', '.join(sorted(ACTIVATIONS))}, got {activation!r}")
        if not isinstance(activation, str) and not callable(activation):
            raise TypeError(f"activation must be a str or a callable, got {type(activation).__name__}")
        if limit is not None and activation != "silu":
            raise ValueError(f"activation must be 'silu' where limit is given, got {activation!r}")
        self.activation = activation
        self.interleaved = interleaved
        self.limit = None if limit is None else check_positive("limit", limit)
        self.alpha = check_number("alpha", alpha)
        self.transposed = transposed

        def linear(inputs: int, outputs: int) -> tuple[nn.Parameter, nn.Parameter | None]:
            shape = (inputs, outputs) if transposed else (outputs, inputs)
            weight = torch.empty((num_experts, *shape), device=device, dtype=dtype)
            vector = torch.empty((num_experts, outputs), device=device, dtype=dtype) if bias else None
            return nn.Parameter(weight), None if vector is None else nn.Parameter(vector)

        self.gate_up_proj, self.gate_up_proj_bias = linear(dim, 2 * hidden)
        self.down_proj, self.down_proj_bias = linear(hidden, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weights and biases as ``nn.Linear`` does, uniform within ``fan_in ** -0.5``."""
        _reset_linear(self.gate_up_proj, self.gate_up_proj_bias, self.dim)
        _reset_linear(self.down_proj, self.down_proj_bias, self.hidden)

    def extra_repr(self) -> str:
        """What ``repr`` shows between the parentheses."""
        what = f"{super().extra_repr()}, activation={self.activation!r}, bias={self.down_proj_bias is not None}"
        what += f", interleaved={self.interleaved}, transposed={self.transposed}"
        return what if self.limit is None else f"{what}, limit={self.limit}, alpha={self.alpha}"

    def _layers(self) -> tuple[Layer, Layer]:
        weights = (w.mT if self.transposed else w for w in (self.gate_up_proj, self.down_proj))
        return (next(weights), self.gate_up_proj_bias), (next(weights), self.down_proj_bias)

    def _unit(self, u: Tensor, offsets: Tensor | None) -> Tensor:
        clamp = None if self.limit is None else Clamp(self.limit, self.alpha)
        return gated_unit(u, self.activation, "in turn" if self.interleaved else "gate first", clamp)


def feed_forwards(
    x: Tensor, offsets: Tensor | None, first: Layer, last: Layer, unit: Callable[[Tensor, Tensor | None], Tensor]
) -> Tensor:
    """What :meth:`FeedForwards.forward` computes, of the layers before and after the ``unit``."""
    (weight_in, bias_in), (weight_out, bias_out) = first, last
    num_experts, _, dim = weight_in.shape
    check_floating("x", x)
    if x.dtype != weight_in.dtype:
        check_same_type(autocast(x), autocast(weight_in), "experts'")
    if offsets is not None:
        if x.dim() != 2 or x.shape[1] != dim:
            raise ValueError(f"x must have shape (rows, {dim}) beside offsets, got {tuple(x.shape)}")
        hidden = unit(grouped_linear(x, weight_in, offsets, bias_in), offsets)
        rows: Tensor = grouped_linear(hidden, weight_out, offsets, bias_out)
        return rows
    if x.dim() < 3 or (x.shape[-3], x.shape[-1]) != (num_experts, dim):
        shape = f"(..., {num_experts}, capacity, {dim})"
        raise ValueError(f"x must have shape {shape}, or be rows beside offsets, got {tuple(x.shape)}")
    x, weight_in, weight_out = autocast(x), autocast(weight_in), autocast(weight_out)
    bias_in, bias_out = (None if bias is None else autocast(bias) for bias in (bias_in, bias_out))
    by_slot = x.movedim((-3, -2), (0, 1))  # (e, C, …, dim): with the slots before the groups, export needs no guard
    rows = by_slot.flatten(1, -2)  # one product an expert, whatever the number of groups
    rows = _batched_linear(unit(_batched_linear(rows, weight_in, bias_in), None), weight_out, bias_out)
    outputs: Tensor = rows.unflatten(1, by_slot.shape[1:-1]).movedim((0, 1), (-3, -2))
    return outputs


def scaled_geglu(u: Tensor, scale: Tensor, offsets: Tensor | None) -> Tensor:
    """The gated GELU of ``u``, ``(e, rows, 2f)`` or ``(R, 2f)`` beside ``offsets``, times each expert's ``scale (e, f)``."""
    if offsets is None:
        scale = scale.unsqueeze(1)
    else:
        row = torch.arange(u.shape[0], dtype=torch.int32, device=u.device)
        expert = torch.searchsorted(offsets, row, right=True).clamp(max=scale.shape[0] - 1)
        # The gradient of an embedding adds in one order on every device; that of an index does not.
        scale = F.embedding(expert, scale)
    return (gated_unit(u, "gelu", "gate last") * scale).to(u.dtype)


def _batched_linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``(e, rows, out)`` of ``(e, rows, in)``."""
    return torch.bmm(rows, weight.mT) if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, weight.mT)


def _reset_linear(weight: Tensor, bias: Tensor | None, fan_in: int) -> None:
    bound = fan_in**-0.5
    for t in (weight, bias):
        if t is not None:
            nn.init.uniform_(t, -bound, bound)
