"""The routers of transformers 5 by :func:`topn_gating.route`: :func:`patch_routers`."""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .transformers_forwards import FORWARDS, METHODS, choose

# Classes of transformers that are named like a router and choose no experts.
NO_ROUTERS = re.compile(r"(Forget|DFine|Deimv2|Message|Residual)Gate$|DensityRouter$")


class PatchedRouters(NamedTuple):
    """What :func:`patch_routers` did: names of modules of the model, and their classes."""

    replaced: dict[str, str]
    left: dict[str, str]


def patch_routers(model: nn.Module) -> PatchedRouters:
    """Has the routers of a model of transformers decide by :func:`topn_gating.route`, with their own parameters.

    A router is known by its class, and :data:`ROUTERS` and :data:`FORWARDS` name those that are cases of ``route``'s formula.
    Parameters, buffers and ``state_dict`` stay as they are, and so do the class and what the router returns; of experts in a
    list the best come first. ``del module.forward`` undoes it; of ``DbrxFFN``, ``del module.route_tokens_to_experts``.

    Returns:
        The modules whose method was replaced, and those that were left alone: whatever is named like a router, and the blocks
        with experts, or with a module that is called a router, in which no module is named like one. A router whose method
        something else has replaced, such as the hooks of ``device_map``, is left alone: patch the model before.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    done = PatchedRouters({}, {})
    for name, module in model.named_modules():
        kind = type(module).__name__
        ours = type(module).__module__.startswith("transformers.models.")
        named = re.search(r"(Router|Gate|Gating)$", kind) and not (ours and NO_ROUTERS.search(kind))
        forward = _forward if kind in ROUTERS else FORWARDS.get(kind)
        method = METHODS.get(kind, "forward")
        present = vars(module).get(method)  # what something else has set, such as accelerate, whose hooks must stay
        free = present is None or getattr(present, "func", None) is forward
        if ours and forward is not None and free:
            setattr(module, method, functools.partial(forward, module))
            done.replaced[name] = kind
        elif named and done.replaced.keys().isdisjoint(_outer(name)):
            done.left[name] = kind
    known = {outer for name in (*done.replaced, *done.left) for outer in (name, *_outer(name))}
    for name, module in model.named_modules():
        chooses = any(child == "experts" or child.startswith("router") for child, _ in module.named_children())
        if chooses and name not in known and done.replaced.keys().isdisjoint(_outer(name)):
            done.left[name] = type(module).__name__
    return done


def _outer(name: str) -> Iterator[str]:
    """The names of the modules that a module is in."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _forward(self: Any, hidden_states: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The forward of a router: logits ``(n, e)``, weights and experts ``(n, k)``.

    ``given`` is what the block gives besides: the bias of the selection, or for a router by hash the ids of the tokens.
    """
    rule = ROUTERS[type(self).__name__]
    logits = rule.logits(self, hidden_states.reshape(-1, hidden_states.shape[-1]))
    options = rule.options(self)
    if rule.expert is not None:
        options["expert"] = rule.expert(self, logits.detach(), given)
    elif given is not None:
        options["select_bias"] = given
    weight, expert = choose(logits, self.top_k, **options)
    dtype = {"logits": logits.dtype, "input": hidden_states.dtype, "float32": torch.float32}[rule.dtype]
    return logits, weight.to(dtype), expert


class Router(NamedTuple):
    """How a class computes: the logits of tokens ``(n, d)``, the options of ``route``, and the type of the weights."""

    logits: Callable[[Any, Tensor], Tensor]
    options: Callable[[Any], dict[str, Any]]
    dtype: str = "float32"  # or that of the "logits" or the "input"
    expert: Callable[[Any, Tensor, Tensor | None], Tensor | None] | None = None  # experts that are not route's choice, if any


def _linear(self: Any, x: Tensor) -> Tensor:
    return F.linear(x, self.weight, getattr(self, "bias", None))


def _linear_then_float32(self: Any, x: Tensor) -> Tensor:
    return _linear(self, x).float()


def _linear_in_its_type(self: Any, x: Tensor) -> Tensor:
    return F.linear(x.to(self.weight.dtype), self.weight)


def _float32(self: Any, x: Tensor) -> Tensor:
    """In float32, whatever autocast says."""
    with torch.autocast(x.device.type, enabled=False):
        bias = getattr(self, "bias", None)
        return F.linear(x.float(), self.weight.float(), None if bias is None else bias.float())


def _float32_unless_autocast(self: Any, x: Tensor) -> Tensor:
    return F.linear(x.float(), self.weight.float())


def _classifier(self: Any, x: Tensor) -> Tensor:
    return F.linear(x.float(), self.classifier.weight.float())


def _float32_tokens(self: Any, x: Tensor) -> Tensor:
    return F.linear(x.float(), self.weight)


def _wg(self: Any, x: Tensor) -> Tensor:
    logits: Tensor = self.wg(x.float() if self.wg.weight.dtype == torch.float32 else x)
    return logits


def _gate_then_float32(self: Any, x: Tensor) -> Tensor:
    logits: Tensor = self.gate(x)
    return logits.float()


def _capped(self: Any, x: Tensor) -> Tensor:
    logits, cap = _linear_then_float32(self, x), self.router_logit_softcapping
    return torch.tanh(logits / cap) * cap if cap > 0 else logits


def _multiplied(self: Any, x: Tensor) -> Tensor:
    logits: Tensor = _float32(self, x) * self.output_multiplier
    return logits


def _normalized(self: Any) -> dict[str, Any]:
    return {"normalize": True}


def _as_configured(self: Any) -> dict[str, Any]:
    return {"normalize": self.norm_topk_prob}


def _deepseek_v2(self: Any) -> dict[str, Any]:
    grouped = {"groups": self.num_group, "top_groups": self.topk_group, "group_score": "max"}
    return {"normalize": False, "scale": self.routed_scaling_factor, **(grouped if self.topk_method != "greedy" else {})}


def _grouped(self: Any) -> dict[str, Any]:
    normalize = getattr(self, "norm_topk_prob", True)
    options = {"groups": self.num_group, "top_groups": self.topk_group, "normalize": normalize, "eps": 1e-20}
    return {**options, "scale": getattr(self, "routed_scaling_factor", None)}


def _deepseek_v3(self: Any) -> dict[str, Any]:
    return {"score": "sigmoid", "select_bias": self.e_score_correction_bias, **_grouped(self)}


def _axk2(self: Any) -> dict[str, Any]:
    return {**_sigmoid(self), "select_bias": self.e_score_correction_bias, "eps": 1e-20, "scale": self.routed_scaling_factor}


def _axk2_experts(self: Any, logits: Tensor, _given: Tensor | None) -> Tensor | None:
    """With groups: those that are closed count as scores of 0, which can be more than an open one's."""
    if self.num_group is None:
        return None
    scores: Tensor = self.apply_group_scoring(logits.sigmoid() + self.e_score_correction_bias)
    return scores.topk(self.top_k).indices


def _kolibri1_experts(self: Any, logits: Tensor, _given: Tensor | None) -> Tensor:
    """The bias is added to the logits, not to the gates."""
    biased: Tensor = logits + self.e_score_correction_bias
    return biased.topk(self.top_k).indices


def _of_token(self: Any, _logits: Tensor, ids: Tensor | None) -> Tensor:
    """The experts of a token of the vocabulary, by table."""
    if ids is None:
        raise TypeError(f"{type(self).__name__} needs input_ids")
    experts: Tensor = self.tid2eid[ids.reshape(-1)]
    return experts


def _ernie(self: Any) -> dict[str, Any]:
    return {"select_bias": self.moe_statics.e_score_correction_bias, "normalize": True, "eps": self.norm_min}


def _longcat(self: Any) -> dict[str, Any]:
    return {"select_bias": self.e_score_correction_bias, "normalize": False, "scale": self.routed_scaling_factor}


def _sigmoid_bias(self: Any) -> dict[str, Any]:
    return {"score": "sigmoid", "normalize": True, "select_bias": getattr(self, "e_score_correction_bias", None)}


def _sigmoid_bias_scale(self: Any) -> dict[str, Any]:
    return {"score": "sigmoid", "normalize": True, "eps": 1e-20, "scale": self.router_scaling_factor}


def _sigmoid(self: Any) -> dict[str, Any]:
    return {"score": "sigmoid", "normalize": self.norm_topk_prob}


def _afmoe(self: Any) -> dict[str, Any]:
    return {"score": "sigmoid", "normalize": True, "eps": 1e-20, "scale": self.route_scale}


def _muse(self: Any) -> dict[str, Any]:
    return {**_sigmoid_bias(self), "eps": self.norm_topk_prob_eps, "scale": self.routed_scaling_factor}


def _cohere(self: Any) -> dict[str, Any]:
    softmax = self.expert_selection_fn == "softmax"
    return {"score": self.expert_selection_fn, "normalize": softmax or self.norm_topk_prob}


def _deepseek_v4(self: Any) -> dict[str, Any]:
    score = "sigmoid" if "sigmoid" in type(self.score_fn).__name__.lower() else "sqrtsoftplus"
    return {**_sigmoid_bias(self), "score": score, "eps": 1e-20, "scale": self.routed_scaling_factor}


def _of(classes: str, router: Router) -> dict[str, Router]:
    return dict.fromkeys(classes.split(), router)


# By the names of transformers 5.24. docs/routers.md has the formula of each.
ROUTERS: dict[str, Router] = {
    **_of("MixtralTopKRouter MiniMaxTopKRouter", Router(_linear, _normalized)),
    **_of(
        "AriaTextTopKRouter GptOssTopKRouter Qwen3_5MoeTopKRouter Qwen3OmniMoeTextTopKRouter Qwen3VLMoeTextTopKRouter",
        Router(_linear, _normalized, "logits"),
    ),
    **_of(
        "GraniteMoeTopKRouter GraniteMoeHybridTopKRouter GraniteMoeSharedTopKRouter GraniteMoeSWATopKRouter",
        Router(_linear_then_float32, _normalized, "input"),
    ),
    **_of(
        "Qwen2MoeTopKRouter Qwen3MoeTopKRouter Qwen3NextTopKRouter Qwen4ExpTextTopKRouter OlmoeTopKRouter FlexOlmoTopKRouter "
        "MellumTopKRouter Qwen3OmniMoeThinkerTextTopKRouter Qwen3OmniMoeTalkerTextTopKRouter",
        Router(_linear, _as_configured, "logits"),
    ),
    "LaraMiniTopKRouter": Router(_float32, _as_configured, "input"),
    "JambaTopKRouter": Router(_linear, lambda self: {"normalize": False}, "input"),
    "OpenAIPrivacyFilterTopKRouter": Router(_float32, lambda self: {"normalize": True, "scale": 1 / self.top_k}),
    **_of("DeepseekV2TopkRouter DeepseekOcr2TextTopkRouter UnlimitedOcrTextTopkRouter", Router(_float32, _deepseek_v2)),
    "Mistral4TopkRouter": Router(_linear, _grouped, "logits"),
    "MistralLarge4TextTopkRouter": Router(_float32, _grouped),
    **_of(
        "DeepseekV3TopkRouter DeepseekV32TopkRouter AXK1TopkRouter BailingHybridTopkRouter Dots1TopkRouter "
        "Dots3NoteTextTopkRouter ExaoneMoeTopkRouter Glm4MoeTopkRouter Glm4MoeLiteTopkRouter Glm4vMoeTextTopkRouter "
        "Glm5NextTextTopkRouter GlmMoeDsaTopkRouter HYV4TopkRouter HYV4VLTopkRouter KimiLinearTopkRouter "
        "MiMoV2FlashTopkRouter NemotronHTopkRouter SolarOpenTopkRouter BeamTopKRouter",
        Router(_float32, _deepseek_v3),
    ),
    **_of("Ernie4_5_MoeTopKRouter Ernie4_5_VLMoeMoeTopKRouter", Router(_float32, _ernie, "input")),
    "LongcatFlashTopkRouter": Router(_classifier, _longcat),
    **_of("MiniMaxM3VLTopKRouter Step3p7TopKRouter MiniMaxM2TopKRouter", Router(_linear_in_its_type, _sigmoid_bias)),
    **_of("HYV3TopKRouter Dots3NoteVisionTopKRouter", Router(_float32, _sigmoid_bias_scale)),
    "FlintTopKRouter": Router(_float32, _sigmoid),
    "AfmoeTokenChoiceRouter": Router(_gate_then_float32, _afmoe),
    "AXK2TopkRouter": Router(_float32_unless_autocast, _axk2, "logits", _axk2_experts),
    "Kolibri1TopKRouter": Router(_float32_unless_autocast, _sigmoid, "logits", _kolibri1_experts),
    "HunYuanMoEV1Gate": Router(_wg, _normalized, "logits"),
    "LagunaTopKRouter": Router(_capped, _sigmoid_bias, "input"),
    "MuseSparkTopkRouter": Router(_multiplied, _muse),
    "Cohere2MoeTopKRouter": Router(_linear, _cohere, "input"),
    "DeepseekV4TopKRouter": Router(_linear, _deepseek_v4, "logits"),
    "DeepseekV4HashRouter": Router(_linear, _deepseek_v4, "logits", _of_token),
    **_of("Inkling2TopKRouter Inkling2LoopTopKRouter", Router(_float32_tokens, _deepseek_v4, "logits")),
}
