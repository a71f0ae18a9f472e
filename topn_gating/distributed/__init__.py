"""Experts on many machines: expert parallelism on ``torch.distributed`` (GShard, arXiv 2006.16668).

``MoE(..., expert_group=group)`` divides a layer's experts among the ranks of a group. This package has what the training loop
around such layers needs; docs/distributed.md says how they go together.
"""

from .checkpoint import sharded_state_dict
from .exchange import Exchange, ExpertGroup
from .training import clip_grad_norm_, ddp_ignore, expert_parameters, sum_counts, sum_stats

__all__ = [
    "Exchange",
    "ExpertGroup",
    "clip_grad_norm_",
    "ddp_ignore",
    "expert_parameters",
    "sharded_state_dict",
    "sum_counts",
    "sum_stats",
]
