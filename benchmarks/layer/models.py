"""The models whose layers are compared: sizes, and the block of each as transformers has it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DeepseekV3Config, GptOssConfig, MixtralConfig, PreTrainedConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock


class Model(NamedTuple):
    """The sizes of a model's layer: features, experts, experts of a token, and hidden features of an expert.

    ``gate`` has keywords of :class:`topn_gating.TopNGating`, where a token's weights are not the softmax of its chosen logits.
    """

    name: str
    dim: int
    num_experts: int
    top_k: int
    hidden: int
    make_config: Callable[["Model"], PreTrainedConfig]
    block_class: Callable[[PreTrainedConfig], nn.Module]
    gate: Mapping[str, Any] = {}

    @property
    def sizes(self) -> str:
        """The sizes, with the symbols of the tables."""
        return f"d {self.dim}, e {self.num_experts}, k {self.top_k}, f {self.hidden}"

    def shrunk(self) -> "Model":
        """Returns the model with few features, to try the comparison."""
        return self._replace(dim=32, hidden=16)

    def block(self, implementation: str) -> nn.Module:
        """Returns transformers' block with that implementation of the experts, on the meta device."""
        config = self.make_config(self)
        config._experts_implementation = implementation
        with torch.device("meta"):
            return self.block_class(config)


def router(block: nn.Module) -> nn.Module:
    """Returns the block's router, whose results are logits, weights and experts."""
    return block.gate if hasattr(block, "gate") else block.router


def mixtral(model: Model) -> PreTrainedConfig:
    """Returns the configuration of Mixtral at the model's sizes."""
    return MixtralConfig(
        hidden_size=model.dim,
        intermediate_size=model.hidden,
        num_local_experts=model.num_experts,
        num_experts_per_tok=model.top_k,
    )


def qwen3(model: Model) -> PreTrainedConfig:
    """Returns the configuration of Qwen3-MoE at the model's sizes, with normalised weights as its checkpoints have them."""
    return Qwen3MoeConfig(
        hidden_size=model.dim,
        moe_intermediate_size=model.hidden,
        num_experts=model.num_experts,
        num_experts_per_tok=model.top_k,
        norm_topk_prob=True,
    )


def deepseek_v3(model: Model) -> PreTrainedConfig:
    """Returns the configuration of DeepSeek-V3 at the model's sizes, with its router and one shared expert."""
    return DeepseekV3Config(
        hidden_size=model.dim,
        moe_intermediate_size=model.hidden,
        n_routed_experts=model.num_experts,
        num_experts_per_tok=model.top_k,
        n_group=model.gate["groups"],
        topk_group=model.gate["top_groups"],
        routed_scaling_factor=model.gate["scale"],
        norm_topk_prob=model.gate["normalize"],
        n_shared_experts=1,
    )


def gpt_oss(model: Model) -> PreTrainedConfig:
    """Returns the configuration of gpt-oss at the model's sizes."""
    return GptOssConfig(
        hidden_size=model.dim,
        intermediate_size=model.hidden,
        num_local_experts=model.num_experts,
        num_experts_per_tok=model.top_k,
    )


DEEPSEEK_V3 = {
    **{"score": "sigmoid", "select_bias": True, "groups": 8, "top_groups": 4, "normalize": True, "scale": 2.5, "eps": 1e-20},
    "router_dtype": torch.float32,
}
MODELS = (
    Model("Mixtral-like", 512, 8, 2, 1024, mixtral, MixtralSparseMoeBlock),
    Model("Qwen3-like", 512, 64, 8, 256, qwen3, Qwen3MoeSparseMoeBlock),
    Model("Qwen3-like, 128 experts", 512, 128, 8, 256, qwen3, Qwen3MoeSparseMoeBlock),
    Model("DeepSeek-V3-like", 512, 64, 8, 256, deepseek_v3, DeepseekV3MoE, DEEPSEEK_V3),
    Model("gpt-oss-like", 512, 32, 4, 512, gpt_oss, GptOssMLP),
)
