"""What a user can get wrong, said once, before anything runs: every message names the argument, what it got, what it takes."""

import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .dtypes import FLOAT_TYPES, autocast, compute_dtype
from .eager import readable
from .ops import GROUP_SCORES, SCORES

FLOAT32_MAX = torch.finfo(torch.float32).max
INT32_MAX = 2**31 - 1
SYMBOLS = (torch.SymFloat, torch.SymInt)  # numbers of a compiler, whose values are not to be asked for


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_instance(name: str, value: Any, expected: type, shown: str) -> None:
    """Raises unless ``value`` is an instance of ``expected``, which the message calls ``shown``."""
    if not isinstance(value, expected):
        raise TypeError(f"{name} must be a {shown}, got {type(value).__name__}")


def check_number(name: str, value: float) -> float:
    """Returns ``value``, which must be a finite number, in float32 too, as a float; a symbolic one as it is."""
    value = _number(name, value)
    if not (isinstance(value, SYMBOLS) or -FLOAT32_MAX <= value <= FLOAT32_MAX):
        raise ValueError(f"{name} must be finite, in float32 too, got {value}")
    return value


def check_positive(name: str, value: float) -> float:
    """Returns ``value``, which must be a finite number above 0, in float32 too, as a float; a symbolic one as it is."""
    value = _number(name, value)
    if not (value > 0 and (isinstance(value, SYMBOLS) or value <= FLOAT32_MAX)):
        raise ValueError(f"{name} must be finite, in float32 too, and above 0, got {value}")
    return value


def _number(name: str, value: float) -> float:
    if type(value) is float or isinstance(value, SYMBOLS):
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def check_count(name: str, value: int) -> int:
    """Returns ``value``, which must be an integer from 1 to 2^31 - 1, as an int; a symbolic one as it is."""
    if isinstance(value, torch.SymInt):
        return value
    if type(value) is not int:
        if isinstance(value, bool | Tensor) or not hasattr(value, "__index__"):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        value = operator.index(value)
    if not 1 <= value <= INT32_MAX:
        raise ValueError(f"{name} must be at least 1 and below 2^31, got {value}")
    return value


def check_top_n(top_n: int, num_gates: int) -> int:
    """Returns ``top_n``, which must be from 1 to ``num_gates``."""
    top_n = check_count("top_n", top_n)
    if top_n > num_gates:
        raise ValueError(f"top_n must be at most num_gates ({num_gates}), got {top_n}")
    return top_n


def threshold_per_rank(name: str, threshold: float | Sequence[float], top_n: int, num_gates: int) -> tuple[float, ...]:
    """Returns one threshold for each rank from rank 1 on; of a longer sequence of at most ``num_gates - 1``, the first."""
    per_rank = isinstance(threshold, tuple | list)
    values = tuple(threshold) if isinstance(threshold, tuple | list) else (threshold,)
    if not all(isinstance(v, Real) and not isinstance(v, bool) for v in values):
        raise TypeError(f"{name} must be a float or a tuple of floats, got {threshold!r}")
    if per_rank and not top_n - 1 <= len(values) <= num_gates - 1:
        raise ValueError(
            f"{name} must be a float or a tuple of {top_n - 1} (top_n - 1) to {num_gates - 1} (num_gates - 1) floats, "
            f"got {len(values)}"
        )
    if not all(v >= 0 for v in values):
        raise ValueError(f"{name} must not be negative or NaN, got {threshold!r}")
    floats = tuple(map(float, values))
    return floats[: top_n - 1] if per_rank else floats * (top_n - 1)


def check_threshold(threshold: Tensor, top_n: int, device: torch.device) -> None:
    """Raises unless ``threshold`` has shape ``(top_n,)`` and, where its values can be read at once, none from 1 on is bad."""
    if threshold.shape != (top_n,) or not threshold.is_floating_point():
        got = f"{tuple(threshold.shape)} {threshold.dtype}"
        raise ValueError(f"threshold must be a tensor of shape ({top_n},) and a float type, got {got}")
    _check_dense("threshold", threshold)
    if threshold.device != device:
        raise ValueError(f"threshold must be on {device}, got {threshold.device}")
    if readable(threshold):
        values = threshold.tolist()
        if not all(v >= 0 for v in values[1:]):
            raise ValueError(f"threshold must not be negative or NaN from its second entry on, got {values}")


def check_dtype(name: str, dtype: torch.dtype | None) -> None:
    """Raises unless ``dtype`` is None or a type that the kernels have."""
    if not (dtype is None or isinstance(dtype, torch.dtype)):
        raise TypeError(f"{name} must be a torch.dtype or None, got {type(dtype).__name__}")
    if not (dtype is None or dtype in FLOAT_TYPES):
        raise ValueError(f"{name} must be a floating point type, one of {_shown(FLOAT_TYPES)}, got {dtype}")


def check_floating(name: str, t: Tensor) -> None:
    """Raises unless ``t`` is a dense tensor of one of the four types that the kernels have."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dtype not in FLOAT_TYPES:
        raise TypeError(f"{name} must be one of {_shown(FLOAT_TYPES)}, got {t.dtype}")
    _check_dense(name, t)


def check_tokens(x: Tensor, dim: int, device: torch.device) -> None:
    """Raises unless ``x`` is ``(…, n, dim)`` of floats on ``device``."""
    check_floating("x", x)
    if x.dim() < 2 or x.shape[-1] != dim:
        raise ValueError(f"x must have shape (..., tokens, {dim}), got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"x must be on {device} with the gate's thresholds, got {x.device}")


def check_logits(logits: Tensor, top_n: int | None, expert: Tensor | None) -> int:
    """Returns ``top_n``, of which logits ``(…, n, e)`` must have as many experts; ``top_n``, by default 2, or expert's k."""
    check_floating("logits", logits)
    if logits.dim() < 2 or logits.shape[-1] < 1:
        raise ValueError(f"logits must have shape (..., tokens, experts) with an expert or more, got {tuple(logits.shape)}")
    if top_n is None:
        top_n = 2 if not isinstance(expert, Tensor) or expert.dim() == 0 else expert.shape[-1]
    return check_top_n(top_n, logits.shape[-1])


def check_score(score: str, differentiable_topk: bool) -> None:
    """Raises unless there is such a score, and one of which there is a soft top-n if that is asked for."""
    check_choice("score", score, SCORES)
    if differentiable_topk and score != "softmax":
        raise ValueError(f"score must be softmax with differentiable_topk, got {score!r}")


def check_groups(num_gates: int, top_n: int, groups: int | None, top_groups: int | None, group_score: str) -> tuple[int, int]:
    """Returns how many groups the experts form, by default one, and how many of them are open, by default all."""
    check_choice("group_score", group_score, GROUP_SCORES)
    groups = 1 if groups is None else check_count("groups", groups)
    if num_gates % groups:
        raise ValueError(f"groups must divide num_gates ({num_gates}), got {groups}")
    top_groups = groups if top_groups is None else check_count("top_groups", top_groups)
    if top_groups > groups:
        raise ValueError(f"top_groups must be at most groups ({groups}), got {top_groups}")
    most = top_groups * (num_gates // groups)
    if top_n > most:
        raise ValueError(f"top_groups must have top_n ({top_n}) experts or more, got {top_groups} with {most}")
    return groups, top_groups


def check_counts(counts: Any, shape: Sequence[int], device: torch.device, balance_on: str) -> None:
    """Raises unless ``counts`` is a function, or a tensor of ``shape`` or of its last dimension; and is not of kept pairs."""
    if balance_on == "kept":
        raise ValueError("counts must be None with balance_on='kept', which counts the pairs that this call keeps")
    if callable(counts):
        return
    if not isinstance(counts, Tensor):
        raise TypeError(f"counts must be a tensor or a function of one, got {type(counts).__name__}")
    if tuple(counts.shape) not in (tuple(shape), tuple(shape[-1:])):
        raise ValueError(f"counts must have shape {tuple(shape)} or {tuple(shape[-1:])}, got {tuple(counts.shape)}")
    if counts.device != device:
        raise ValueError(f"counts must be on {device}, got {counts.device}")


def check_priority(
    priority: Any, dropless: bool, shape: Sequence[int] | None = None, dtype: Any = None, device: Any = None
) -> None:
    """Raises unless ``priority`` is None, ``"weight"`` or, where there is a ``shape``, a tensor of keys."""
    if priority is None:
        return
    if dropless:
        raise ValueError("priority must be left out when dropless, where nothing is dropped")
    if isinstance(priority, str):
        if priority != "weight":
            raise ValueError(f"priority must be 'weight'{', a tensor of keys' if shape else ''} or None, got {priority!r}")
    elif shape is None:
        raise TypeError(f"priority must be 'weight' or None, got {type(priority).__name__}: keys belong to a call")
    else:
        check_tensor("priority", priority, shape, dtype, device)


def check_chosen(
    expert: Tensor | None, weight: Tensor | None, num_gates: int | None, top_n: int | None
) -> tuple[Tensor, Tensor, int]:
    """Returns chosen experts and their weights, both ``(…, n, k)``, as int32 and in the type that weights are computed in.

    An index below -1 or from ``num_gates`` on is an error where the values can be read at once.
    """
    if expert is None:
        raise ValueError("logits must be given, or expert, weight and num_gates in their place")
    if weight is None:
        raise ValueError("weight must be given beside expert")
    if num_gates is None:
        raise ValueError("num_gates must be given beside expert")
    num_gates = check_count("num_gates", num_gates)
    check_floating("weight", weight)
    expert = check_expert(expert, num_gates)
    if weight.shape != expert.shape:
        raise ValueError(f"weight must have the shape of expert, {tuple(expert.shape)}, got {tuple(weight.shape)}")
    if weight.device != expert.device:
        raise ValueError(f"weight must be on {expert.device} with expert, got {weight.device}")
    if top_n is not None and top_n != expert.shape[-1]:
        raise ValueError(f"top_n must be left out or {expert.shape[-1]}, the ranks of expert, got {top_n}")
    return expert, weight.to(compute_dtype(weight.dtype)), num_gates


def check_expert(
    expert: Tensor, num_gates: int, shape: Sequence[int] | None = None, device: torch.device | None = None
) -> Tensor:
    """Returns chosen experts ``(…, n, k)``, of that shape and device if they are given, as int32.

    An index below -1 or from ``num_gates`` on is an error where the values can be read at once.
    """
    if not isinstance(expert, Tensor) or expert.dtype not in (torch.int32, torch.int64):
        got = expert.dtype if isinstance(expert, Tensor) else type(expert).__name__
        raise TypeError(f"expert must be an int32 or int64 tensor, got {got}")
    _check_dense("expert", expert)
    if expert.dim() < 2 or expert.shape[-1] < 1:
        raise ValueError(f"expert must have shape (..., tokens, top_n) with a rank or more, got {tuple(expert.shape)}")
    if shape is not None and tuple(expert.shape) != tuple(shape):
        raise ValueError(f"expert must have shape {tuple(shape)} beside these logits, got {tuple(expert.shape)}")
    if device is not None and expert.device != device:
        raise ValueError(f"expert must be on {device} with logits, got {expert.device}")
    if readable(expert) and expert.numel():
        least, most = (int(t) for t in expert.aminmax())
        if least < -1 or most >= num_gates:
            raise ValueError(f"expert must be from -1 to {num_gates - 1} (num_gates - 1), got {least if least < -1 else most}")
    # An int64 index out of range, which is not routed, must not become another.
    return expert.clamp(-1, num_gates).int() if expert.dtype == torch.int64 else expert


def check_tensor(name: str, t: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """Raises unless ``t`` is a dense tensor of that shape, dtype and device."""
    if not isinstance(t, Tensor) or t.dtype != dtype:
        raise TypeError(f"{name} must be a {dtype} tensor, got {t.dtype if isinstance(t, Tensor) else type(t).__name__}")
    _check_dense(name, t)
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(t.shape)}")
    if t.device != device:
        raise ValueError(f"{name} must be on {device}, got {t.device}")


def check_rows(name: str, t: Tensor, shape: Sequence[int], device: torch.device) -> None:
    """Raises unless ``t`` holds rows of features for ``shape``, of a type that the kernels have, on ``device``."""
    check_floating(name, t)
    if t.dim() == 0 or tuple(t.shape[:-1]) != tuple(shape):
        rows = ", ".join(map(str, shape))
        raise ValueError(f"{name} must have shape ({rows}, features) for this routing, got {tuple(t.shape)}")
    if t.device != device:
        raise ValueError(f"{name} must be on {device} with its routing, got {t.device}")


def check_same_type(x: Tensor, weight: Tensor, owner: str) -> None:
    """Raises unless ``x`` has the type of the weight of ``owner``: only autocast converts either."""
    if x.dtype != weight.dtype:
        raise TypeError(
            f"x must be {weight.dtype} like the {owner} weight, or come where autocast converts both, got {x.dtype}"
        )


def check_grouped(rows: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None) -> None:
    """Raises unless the arguments of :func:`topn_gating.grouped_linear` fit each other."""
    check_floating("weight", weight)
    if weight.dim() != 3 or 0 in weight.shape:
        raise ValueError(f"weight must have shape (experts, out, in), one of each or more, got {tuple(weight.shape)}")
    experts, out_features, in_features = weight.shape
    check_floating("rows", rows)
    if rows.dim() != 2 or rows.shape[1] != in_features:
        raise ValueError(f"rows must have shape (rows, {in_features}) to fit weight, got {tuple(rows.shape)}")
    if rows.device != weight.device:
        raise ValueError(f"rows must be on {weight.device} with weight, got {rows.device}")
    check_tensor("offsets", offsets, (experts,), torch.int32, weight.device)
    if bias is not None:
        check_floating("bias", bias)
        check_tensor("bias", bias, (experts, out_features), bias.dtype, weight.device)
    for name, t in (("rows", rows), ("bias", bias)):
        if t is not None and t.dtype != weight.dtype and autocast(t).dtype != autocast(weight).dtype:
            raise TypeError(f"{name} must be {weight.dtype} like weight, or come where autocast converts both, got {t.dtype}")


def check_generator(generator: torch.Generator | None, device: torch.device) -> None:
    """Raises unless ``generator`` is None or draws on ``device``."""
    if generator is None:
        return
    check_instance("generator", generator, torch.Generator, "torch.Generator or None")
    if torch.empty(0, device=generator.device).device != device:
        raise ValueError(f"generator must be on {device}, got {generator.device}")


def _check_dense(name: str, t: Tensor) -> None:
    if t.is_nested or t.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got a {'nested' if t.is_nested else t.layout} one")


def _shown(types: Sequence[torch.dtype]) -> str:
    return ", ".join(str(t).removeprefix("torch.") for t in types)
