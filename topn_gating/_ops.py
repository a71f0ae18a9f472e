"""The namespace of the operators. A build for the Kernels Hub has another file in this one's place (setup.py)."""

import torch

ops = torch.ops.topn_gating


def add_op_namespace_prefix(name: str) -> str:
    """The whole name of an operator."""
    return f"topn_gating::{name}"
