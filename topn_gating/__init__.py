"""Mixture-of-Experts routing: top-n gating with capacity, exact, deterministic and fast, forward and backward."""

from .balancing import update_select_bias_, with_loss
from .experts import Experts, GLUExperts
from .functional import combine, dispatch, expert_capacity, route
from .gating import TopNGating
from .grouped import grouped_linear
from .moe import MixtureOfExpertsReturn, MoE
from .ops import build_info
from .routing import Routing
from .statistics import RoutingStats, stack_stats

__version__ = "0.1.0"

__all__ = [
    "Experts",
    "GLUExperts",
    "MixtureOfExpertsReturn",
    "MoE",
    "Routing",
    "RoutingStats",
    "TopNGating",
    "build_info",
    "combine",
    "dispatch",
    "expert_capacity",
    "grouped_linear",
    "route",
    "stack_stats",
    "update_select_bias_",
    "with_loss",
]
