"""The classes of transformers whose experts take an implementation by name.

Run as a program, it writes the table of docs/transformers.md::

    python tests/integrations/experts_classes.py
"""

import importlib
import re
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

transformers = pytest.importorskip("transformers", minversion="5.24")

DOCS = Path(__file__).parents[2] / "docs/transformers.md"
EXPERTS, DIM, HIDDEN = 8, 16, 24

CONFIG = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_top_k", "moe_k"), 3),
    **dict.fromkeys(("hidden_size", "d_model", "hidden_dim", "moe_latent_size"), DIM),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "ffn_hidden_size", "expert_ffn_hidden_size"), HIDDEN),
    **{"moe_ffn_hidden_size": HIDDEN, "moe_hidden_size": DIM},
    **dict.fromkeys(("hidden_act", "hidden_activation", "activation_function", "moe_hidden_act"), "silu"),
    **{"mlp_hidden_act": "relu2", "rms_norm_eps": 1e-6, "layer_norm_eps": 1e-6, "swiglu_limit": 0.7, "swiglu_alpha": 1.702},
    **{"mlp_gate_softcap": 2.0, "mlp_up_softcap": 1.5, "post_norm_eps": 1e-6, "_experts_implementation": "eager"},
}


def found() -> list[tuple[str, str, str]]:
    """Folder, module and name of each class that transformers decorates with ``use_experts_implementation``."""
    decorated = re.compile(r"^@use_experts_implementation(?:\([^)]*\))?\nclass (\w+)", re.MULTILINE)
    files = sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"))
    return [(file.parent.name, file.stem, name) for file in files for name in decorated.findall(file.read_text())]


def make(folder: str, module: str, name: str) -> nn.Module:
    """An instance with a small configuration and random parameters."""
    experts = getattr(importlib.import_module(f"transformers.models.{folder}.{module}"), name)(SimpleNamespace(**CONFIG))
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.4)
    return experts


def kind(experts: nn.Module) -> str:
    """What is special to a class, as the table says it."""
    own = type(experts)._apply_gate.__name__ != "_default_apply_gate"
    facts = {
        "no gate": not experts.has_gate,
        "a gated unit of its own": experts.has_gate and own,
        "biases": experts.has_bias,
        "transposed weights": experts.is_transposed,
        "a norm after each expert": experts.has_post_expert_norm,
    }
    return ", ".join(name for name, is_so in facts.items() if is_so) or "SwiGLU"


def table() -> str:
    """The table of docs/transformers.md: the classes of each kind."""
    by_kind = defaultdict(list)
    for where in found():
        by_kind[kind(make(*where))].append(where[2].removesuffix("Experts"))
    rows = [f"| {name} | {len(classes)} | {', '.join(classes)} |" for name, classes in by_kind.items()]
    return "\n".join(["| experts | classes | |", "| --- | ---: | --- |", *rows]) + "\n"


if __name__ == "__main__":
    text = DOCS.read_text()
    DOCS.write_text(re.sub(r"\| experts \| classes \|.*?\n\n", table() + "\n", text, flags=re.DOTALL))
