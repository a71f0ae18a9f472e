"""A tiny model of each class of models of transformers whose experts take an implementation.

Run as a program, it writes the list of these models into docs/transformers.md::

    python tests/models/whole_models.py
"""

import dataclasses
import importlib
import re
import sys
from collections import defaultdict
from pathlib import Path

import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "integrations"))
import experts_classes
import router_classes
from experts_classes import transformers

EXPERTS_CLASSES = {name for _, _, name in experts_classes.found()}
DIM, VOCABULARY, EXPERTS = 16, 32, 4
SEED = 7
IMAGE = VOCABULARY - 1  # the token that stands for a piece of an image, where a model is shown one

# Values of the fields that a configuration has, whatever its class; a field that is not here keeps its default.
SMALL = {
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False},
    **dict.fromkeys(("hidden_size", "out_hidden_size", "text_hidden_size", "moe_hidden_size"), DIM),
    **dict.fromkeys(("d_model", "output_dim", "adapter_in_dim", "adapter_out_dim", "adapter_input_size"), DIM),
    **dict.fromkeys(("num_hidden_layers", "depth", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "num_key_value_heads", "encoder_attention_heads"), 2),
    **dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "mlp_dim"), 24),
    **dict.fromkeys(("shared_intermediate_size", "dense_intermediate_size", "projector_hidden_size"), 24),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), 24),
    **dict.fromkeys(("encoder_ffn_dim", "prefix_dense_intermediate_size"), 24),
    **dict.fromkeys(("projection_intermediate_size", "projection_hidden_dim"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k"), 2),
    **{"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "o_lora_rank": 8},
    **{"index_n_heads": 2, "index_head_dim": 8, "index_topk": 4},
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 2),
    **dict.fromkeys(("num_position_embeddings", "position_embedding_size"), 16),
    **{"image_size": 32, "patch_size": 8, "max_position_embeddings": 64, "posemb_grid_size": 4, "rel_extent": 16},
    **{"downsample_channels": [8, 8], "output_channels": 8, "downsample_hidden_size": 8, "feature_size": 16},
}

# What single classes of configurations need besides: a layer of each kind, and sizes of their own.
DENSE_AND_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
SLIDING_AND_FULL = {"layer_types": ["sliding_attention", "full_attention"]}
LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention"]}
OWN = {
    "BailingHybridConfig": LINEAR_AND_FULL,
    "BeamConfig": DENSE_AND_SPARSE,
    "DeepseekOcr2TextConfig": DENSE_AND_SPARSE,
    "DeepseekV4Config": {
        **{"layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"]},
        **{"mlp_layer_types": ["hash_moe", "moe"], "num_key_value_heads": 1},
    },
    "DiffusionGemmaConfig": {"canvas_length": 8},
    "DiffusionGemmaTextConfig": SLIDING_AND_FULL | {"global_head_dim": 8},
    "Dots1Config": {"n_shared_experts": 1},
    "Dots3NoteConfig": {"image_token_id": IMAGE},
    "Dots3NoteVisionConfig": DENSE_AND_SPARSE,
    "Ernie4_5_VLMoeTextConfig": {
        **{"moe_intermediate_size": [24, 24], "head_dim": 8},
        **{"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
    },
    "FlintConfig": {"mlp_only_layers": [0]},
    "Gemma4TextConfig": SLIDING_AND_FULL | {"enable_moe_block": True, "global_head_dim": 8, "hidden_size_per_layer_input": 8},
    "Glm4vMoeTextConfig": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}
    },
    "Glm5NextTextConfig": {
        **{"layer_types": ["linear_attention", "indexed_attention"], "mlp_layer_types": ["dense", "sparse"]},
        **{"indexer_types": ["full", "full"], "index_kpool": 2, "qk_rope_head_dim": 0},
    },
    "GraniteMoeHybridConfig": LINEAR_AND_FULL | {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_chunk_size": 8},
    "HYV4VLTextConfig": {
        **{"qk_rope_head_dim": 8},
        **{"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    },
    "InklingVisionConfig": {"num_hidden_layers": 5},  # with fewer it needs scipy
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 0},
    "KimiLinearConfig": LINEAR_AND_FULL,
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "MiMoV2FlashConfig": {"head_dim": 12, "num_attention_heads": 4},
    "MuseSparkTextConfig": {"qk_scale_factor": 1.0},
    "MuseSparkAudioConfig": {"patch_sizes": [4, 4], "hidden_sizes": [8, 16], "depths": [1, 1]},
    "NemotronHConfig": {
        **{"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
        **{"mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8, "chunk_size": 8},
    },
    "Qwen3_5MoeTextConfig": LINEAR_AND_FULL,
    "Qwen3NextConfig": LINEAR_AND_FULL,
    "Qwen3OmniMoeAudioEncoderConfig": {"num_mel_bins": 16, "max_source_positions": 32},
    "Qwen3OmniMoeTalkerConfig": {"spatial_merge_size": 2},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": 24},
    "Qwen4ExpTextConfig": {
        **{
            "layer_types": ["linear_attention", "indexed_attention"],
            "hc_lowrank": 8,
            "ple_layer_ids": [1],
            "ngram_vocab_size_base": 8,
        },
        **{
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 4,
            "indexer_compress_ratio": 2,
        },
    },
    "DbrxAttentionConfig": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
    "DbrxConfig": {"n_heads": 2, "n_layers": 2},
    "DbrxFFNConfig": {"ffn_hidden_size": 24, "moe_top_k": 2},
    "DogeConfig": {"is_moe": True, "num_experts": 16},
    "JetMoeConfig": {"kv_channels": 8, "num_key_value_heads": 2},
    "LongcatFlashConfig": {
        **{"head_dim": 4, "num_layers": 2, "ffn_hidden_size": 24, "expert_ffn_hidden_size": 24, "zero_expert_num": 2},
    },
    "NllbMoeConfig": {"encoder_sparse_step": 1, "decoder_sparse_step": 1, "decoder_layers": 2, "decoder_ffn_dim": 24},
    "Step3p7TextConfig": DENSE_AND_SPARSE | {"sliding_window": 8, "share_expert_dim": 24},
    "SwitchTransformersConfig": {
        **{"num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2, "num_decoder_layers": 2, "d_kv": 8, "d_ff": 24},
    },
    "ZayaConfig": {"num_experts_per_tok": 1, "router_hidden_size": 8},
}


# Models with routers whose experts take no implementation, by module.
OTHERS = {
    "DbrxForCausalLM": "dbrx",
    "DogeForCausalLM": "doge",
    "JetMoeForCausalLM": "jetmoe",
    "Llama4ForCausalLM": "llama4",
    "LongcatFlashForCausalLM": "longcat_flash",
    "NllbMoeForConditionalGeneration": "nllb_moe",
    "Step3p7ForConditionalGeneration": "step3p7",
    "SwitchTransformersForConditionalGeneration": "switch_transformers",
}

ANOTHER_NAME = "a deprecated name of "

# Classes that are not run, and why: a test asserts the reason.
NOT_RUN = {
    "Ernie4_5_VL_MoeForConditionalGeneration": f"{ANOTHER_NAME}Ernie4_5_VLMoeForConditionalGeneration",
    "Qwen3OmniMoePreTrainedModelForConditionalGeneration": "no forward",
    "Qwen3OmniMoeForConditionalGeneration": "no forward",
    "Qwen3OmniMoeTalkerCodePredictorModelForConditionalGeneration": "no experts",
}


def model_classes() -> dict[str, type[transformers.PreTrainedModel]]:
    """The classes of models in the modules that have experts, by name: with a head for text, else with any head."""
    classes = {}
    for folder, module in dict.fromkeys(where[:2] for where in experts_classes.found()):
        module = importlib.import_module(f"transformers.models.{folder}.{module}")
        own = {n: c for n, c in vars(module).items() if isinstance(c, type) and c.__module__ == module.__name__}
        heads = {n: c for n, c in own.items() if issubclass(c, transformers.PreTrainedModel) and re.search(r"\wFor[A-Z]", n)}
        text = {n: c for n, c in heads.items() if n.endswith(("ForCausalLM", "ForConditionalGeneration"))}
        classes |= text or heads
    return classes


def small(config_class: type[transformers.PreTrainedConfig]) -> transformers.PreTrainedConfig:
    """A configuration of a class with small values, and so of the configurations in it."""
    names = {field.name for field in dataclasses.fields(config_class)}
    values = {name: value for name, value in SMALL.items() if name in names}
    for name in config_class.sub_configs or {}:
        default = getattr(config_class(), name)
        if default is not None:
            values[name] = small(type(default))
    return config_class(**values | OWN.get(config_class.__name__, {}))


def make(model_class: type[transformers.PreTrainedModel]) -> transformers.PreTrainedModel:
    """A tiny model with random parameters, in eval mode."""
    model = model_class(small(model_class.config_class)).eval()
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(t, nn.Parameter) or name.endswith("e_score_correction_bias"):
            nn.init.normal_(t, std=0.4)
        elif name.endswith("tid2eid"):  # the experts of each token of the vocabulary, which transformers leaves at zero
            t.copy_(torch.rand(t.shape[0], EXPERTS).argsort()[:, : t.shape[1]])
    return model


def inputs(name: str) -> dict[str, torch.Tensor]:
    """The arguments of a model's call: two rows of tokens, and what reaches experts that text alone does not."""
    ids = torch.randint(3, IMAGE, (2, 13))
    if name == "Qwen3OmniMoeTalkerForConditionalGeneration":  # takes no tokens
        return {"inputs_embeds": torch.randn(2, 13, DIM), "position_ids": torch.arange(13).expand(3, 2, 13)}
    if name == "Ernie4_5_VLMoeForConditionalGeneration":  # has experts for the tokens of images
        return {"input_ids": ids, "moe_mm_token_type_ids": (ids > VOCABULARY // 2).int()}
    if name == "Dots3NoteForConditionalGeneration":  # has experts in the tower for images: of 4 × 4 patches, 2 × 2 to a token
        ids[:, 3:7] = IMAGE
        return {
            "input_ids": ids,
            "pixel_values": torch.randn(2 * 16, 3 * 8 * 8),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        }
    if name in ("NllbMoeForConditionalGeneration", "SwitchTransformersForConditionalGeneration"):
        return {"input_ids": ids, "decoder_input_ids": ids}
    return {"input_ids": ids}


def run(model: nn.Module, arguments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The output, the router logits that it records, and the gradients of all parameters, by name."""
    model.zero_grad()
    torch.manual_seed(SEED)  # DiffusionGemma draws the tokens that it starts from
    out = model(**arguments)
    out.logits.backward(torch.randn(out.logits.shape))
    recorded = [t for t in out.get("router_logits") or () if isinstance(t, torch.Tensor)]
    tensors = {"the output": out.logits} | {f"router logits {i}": t for i, t in enumerate(recorded)}
    tensors = {name: t.detach() for name, t in tensors.items()}
    return tensors | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Within 1e-5 of the largest element of each tensor, or the rounding of the model's largest gradient, 4 times.

    The second is for single numbers whose gradient is a sum over all tokens that cancels.
    """
    assert actual.keys() == expected.keys()
    largest = {tensor: e.abs().max().item() for tensor, e in expected.items()}
    rounding = 4 * torch.finfo(torch.float32).eps * max(largest.values())
    for tensor, e in expected.items():
        atol = max(1e-5 * largest[tensor], rounding)
        torch.testing.assert_close(actual[tensor], e, rtol=0, atol=atol, msg=lambda text, t=tensor: f"{t}: {text}")


def experts_in(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model whose experts take an implementation."""
    return {name: m for name, m in model.named_modules() if type(m).__name__ in EXPERTS_CLASSES}


def routers_in(model: nn.Module) -> dict[str, str]:
    """The modules of a model that choose experts, by the classes of docs/routers.md, and their classes."""
    kinds = router_classes.found().keys() - router_classes.NO_ROUTERS
    return {name: type(m).__name__ for name, m in model.named_modules() if type(m).__name__ in kinds}


def table() -> str:
    """The list of docs/transformers.md: the models that are run, by their heads."""
    by_head = defaultdict(list)
    for name in RUN:
        head = re.search(r"For(CausalLM|ConditionalGeneration|[A-Z]\w+)$", name).group()
        by_head[head].append(name.removesuffix(head))
    rows = [f"| `…{head}` | {len(names)} | {', '.join(names)} |" for head, names in by_head.items()]
    return "\n".join(["| whole models | number | |", "| --- | ---: | --- |", *rows]) + "\n"


CLASSES = model_classes()
RUN = [name for name in CLASSES if name not in NOT_RUN]
for name, folder in OTHERS.items():
    CLASSES[name] = getattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), name)

if __name__ == "__main__":
    text = experts_classes.DOCS.read_text()
    experts_classes.DOCS.write_text(re.sub(r"\| whole models \|.*?\n\n", table() + "\n", text, flags=re.DOTALL))
