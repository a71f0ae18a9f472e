"""Layers of other packages: st-moe-pytorch and Megatron-core."""

import importlib
import types
import warnings
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import topn_gating

from .contenders import Contender, Layer
from .models import Model, router


class StMoe(Contender):
    """st-moe-pytorch's layer, and the same of this package as what it is compared with."""

    name = "st-moe-pytorch"
    about = (
        "st_moe_pytorch.MoE: dense dispatch, one module an expert with GEGLU, biases and a multiplicative bias, capacity 1.25 "
        "in training and 2 else, random threshold 0.2; checked against topn_gating.MoE with its weights"
    )
    install = "pip install st-moe-pytorch"

    @classmethod
    def load(cls) -> None:
        importlib.import_module("st_moe_pytorch")

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        from st_moe_pytorch import MoE

        model = layer.model
        self.options = {
            "num_experts": model.num_experts,
            "expert_hidden_mult": (model.hidden + 0.5) * 1.5 / model.dim,  # of which it takes two thirds, rounded down
            "gating_top_n": model.top_k,
        }
        self.module = MoE(model.dim, **self.options).to(layer.dtype)
        self.module.gate.to_gates.weight = router(layer.block).weight

    @property
    def weights(self) -> Mapping[str, Tensor]:
        own = dict(self.module.named_parameters())
        return {"gate.weight": own.pop("gate.to_gates.weight")} | own

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)[0]

    def expected(self, tokens: int) -> Mapping[str, Tensor]:
        """Returns the outputs and the gradients of tokens and gate of :class:`topn_gating.MoE`."""
        same = SameOfOurs(self)
        return {name: result for name, result in same.results(tokens).items() if name in ("outputs", "x", "gate.weight")}

    def difference(self) -> str | None:
        try:
            return super().difference()
        except RuntimeError:  # it does not support this type, which the table will show
            return None

    @torch.no_grad()
    def left_out(self) -> float:
        self.module.train()
        torch.manual_seed(0)
        dispatch, *_ = self.module.gate(self.layer.x)
        return 1 - dispatch.sum().item() / (self.layer.x.shape[1] * self.layer.model.top_k)


class SameOfOurs(Contender):
    """:class:`topn_gating.MoE` with the weights of st-moe-pytorch's layer."""

    def __init__(self, other: StMoe) -> None:
        super().__init__(other.layer)
        nets = [expert.net for expert in other.module.experts.experts]
        self.module = topn_gating.MoE(other.layer.model.dim, **other.options, dtype=other.layer.dtype)
        experts = self.module.experts
        with torch.no_grad():
            for ours, theirs in (
                (experts.weight_in, [net[0].weight.T for net in nets]),
                (experts.bias_in, [net[0].bias[None] for net in nets]),
                (experts.mult_bias, [net[1].mult_bias[None] for net in nets]),
                (experts.weight_out, [net[2].weight.T for net in nets]),
                (experts.bias_out, [net[2].bias[None] for net in nets]),
            ):
                ours.copy_(torch.stack(theirs))
        self.module.gate.to_gates.weight = other.module.gate.to_gates.weight

    @property
    def weights(self) -> Mapping[str, Tensor]:
        return {"gate.weight": self.module.gate.to_gates.weight}

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x).outputs


def group_of_one() -> object:
    """Returns the process group of this process alone, which Megatron's layers ask for."""
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return dist.group.WORLD


MEGATRON = {
    "functions": "megatron.core.transformer.moe.moe_utils",
    "experts": "megatron.core.transformer.moe.experts",
    "linear": "megatron.core.tensor_parallel.layers",
    "mlp": "megatron.core.transformer.mlp",
    "config": "megatron.core.transformer.transformer_config",
}


class Megatron(Contender):
    """Megatron-core's router functions, permute, SequentialMLP, and unpermute, as its layer joins them."""

    name = "Megatron-core"
    about = (
        "its router functions, permute and unpermute in torch, SequentialMLP, and transformers' shared expert; its grouped "
        "experts need CUDA"
    )
    install = "pip install --no-deps megatron-core"

    @classmethod
    def load(cls) -> None:
        with warnings.catch_warnings():  # about missing accelerators
            warnings.simplefilter("ignore")
            cls.core = types.SimpleNamespace(**{k: importlib.import_module(v) for k, v in MEGATRON.items()})

    @classmethod
    def takes(cls, model: Model) -> bool:
        return model.name.startswith(("Mixtral", "Qwen3", "DeepSeek"))

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        core, model, group = self.core, layer.model, group_of_one()
        with warnings.catch_warnings():  # about the number of experts and CUDA graphs
            warnings.simplefilter("ignore")
            config = core.config.TransformerConfig(
                num_layers=1,
                num_attention_heads=1,
                hidden_size=model.dim,
                ffn_hidden_size=model.hidden,
                moe_ffn_hidden_size=model.hidden,
                num_moe_experts=model.num_experts,
                moe_router_topk=model.top_k,
                gated_linear_unit=True,
                activation_func=F.silu,
                add_bias_linear=False,
                bias_activation_fusion=False,
                gradient_accumulation_fusion=False,
                use_cpu_initialization=True,
                perform_initialization=False,
                params_dtype=layer.dtype,
            )
        linears = core.mlp.MLPSubmodules(linear_fc1=core.linear.ColumnParallelLinear, linear_fc2=core.linear.RowParallelLinear)
        groups = types.SimpleNamespace(ep=group, expt_tp=group, expt_dp=group)
        self.module = core.experts.SequentialMLP(model.num_experts, config, linears, groups)
        names = {"linear_fc1": "experts.gate_up_proj", "linear_fc2": "experts.down_proj"}
        self.per_expert = {name: [] for name in names.values()}
        for i, expert in enumerate(self.module.local_experts):
            for linear, name in names.items():
                weight = nn.Parameter(layer.weights[name].detach()[i])
                getattr(expert, linear).weight = weight
                self.per_expert[name].append(weight)

    @property
    def weights(self) -> Mapping[str, Tensor]:
        own = {f"{name}.{i}": w for name, weights in self.per_expert.items() for i, w in enumerate(weights)}
        shared = {name: w for name, w in self.layer.weights.items() if name.startswith(("gate.", "shared_experts."))}
        return shared | own

    def forward(self, x: Tensor) -> Tensor:
        functions, flat, gate = self.core.functions, x.flatten(0, 1), self.layer.model.gate
        router_dtype = gate.get("router_dtype", flat.dtype)
        logits = F.linear(flat.to(router_dtype), self.layer.weights["gate.weight"].to(router_dtype))
        weight, chosen = functions.topk_routing_with_score_function(
            logits,
            self.layer.model.top_k,
            num_groups=gate.get("groups"),
            group_topk=gate.get("top_groups"),
            scaling_factor=gate.get("scale"),
            score_function=gate.get("score", "softmax"),
            expert_bias=router(self.layer.block).e_score_correction_bias if gate.get("select_bias") else None,
        )
        rows, weight, pairs, *_ = functions.permute(flat, chosen, probs=weight)
        rows, _ = self.module(rows, chosen.sum(0), weight)
        outputs = functions.unpermute(rows, pairs, flat.shape, routing_map=chosen).view_as(x)
        if hasattr(self.layer.block, "shared_experts"):
            outputs = outputs + self.layer.block.shared_experts(x)
        return outputs

    def results(self, tokens: int) -> Mapping[str, Tensor]:
        results = dict(super().results(tokens))
        for name, weights in self.per_expert.items():
            results[name] = torch.stack([results.pop(f"{name}.{i}") for i in range(len(weights))])
        return results
