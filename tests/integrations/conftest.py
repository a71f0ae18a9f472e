"""Fixtures of Megatron-core, which several files use."""

import importlib
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist


@pytest.fixture(scope="module")
def core():
    """The modules of Megatron-core, without its warnings about missing accelerators."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = {"moe_utils", "router", "router_replay"}
        modules = {name: importlib.import_module(f"megatron.core.transformer.moe.{name}") for name in names}
        config = importlib.import_module("megatron.core.transformer.transformer_config")
    return SimpleNamespace(**modules, config=config.TransformerConfig)


@pytest.fixture(scope="module")
def group():
    """A process group of this process alone, which is gone at the end: a process has one at a time."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def router(core, group, monkeypatch):
    """Makes a router on the CPU; its keywords are those of the configuration, those of ``moe_router_`` without that."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    core.moe_utils.get_moe_layer_wise_logging_tracker().clear()

    def make(topk, num_experts=16, moe_z_loss_coeff=None, moe_aux_loss_coeff=0.0, *, kind=core.router.TopKRouter, **options):
        options = {name if name.startswith("moe_") else f"moe_router_{name}": option for name, option in options.items()}
        with warnings.catch_warnings():  # about CUDA graphs
            warnings.simplefilter("ignore")
            config = core.config(
                num_layers=1,
                num_attention_heads=1,
                hidden_size=4,
                num_moe_experts=num_experts,
                moe_router_topk=topk,
                moe_z_loss_coeff=moe_z_loss_coeff,
                moe_aux_loss_coeff=moe_aux_loss_coeff,
                use_cpu_initialization=True,
                add_bias_linear=False,
                **options,
            )
        made = kind(config, SimpleNamespace(tp=group, cp=group, tp_cp=group, tp_dp_cp=group))
        made.set_layer_number(1)
        return made

    with torch.compiler.set_stance("force_eager"):  # it compiles a count of tokens
        yield make
    core.moe_utils.get_moe_layer_wise_logging_tracker().clear()
