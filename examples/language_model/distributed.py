"""The model on the ranks that torchrun has started, beside the same model in one process."""

import math
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .data import even_windows, load_corpus, random_windows
from .history import History
from .ranks import OneProcess, Ranks
from .train import Evaluation, LanguageModel, Settings, Training, evaluate, train

PROFILED_STEPS = 10

# What a step's time goes into, by the beginnings of the profiler's names; the first that fits counts.
PARTS = {
    "experts' rows to the other ranks and back": (
        "_c10d_functional::all_to_all",
        "_c10d_functional::wait_tensor",
        "c10d::alltoall",
        "_Start",
        "_Finish",
    ),
    "average of all other gradients": (
        "c10d::allreduce",
        "c10d::broadcast",
        "_c10d_functional::all_reduce",
        "DistributedDataParallel",
    ),
    "matrix products and attention": (
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::baddbmm",
        "aten::_scaled_dot_product",
        "topn_gating::grouped_linear",
    ),
    "router, dispatch and combine": ("topn_gating::",),
}
OTHER = "all else"
EXCHANGE = "_c10d_functional::all_to_all_single"


@dataclass(frozen=True)
class Run:
    """A training run, and what it costs.

    Attributes:
        history: of training.
        before: the model on held-out text before training.
        after: and after it.
        step: milliseconds of a step.
        parts: milliseconds of processor time of a step on this rank, by :data:`PARTS`, under the profiler.
        traffic: bytes that a rank sends in a step.
    """

    history: History
    before: Evaluation
    after: Evaluation
    step: float
    parts: dict[str, float]
    traffic: dict[str, int]


def run(settings: Settings, ranks: OneProcess) -> Run:
    """Trains the model, and measures some steps more."""
    for name in ("batch", "windows"):
        if getattr(settings, name) % ranks.size:
            raise ValueError(f"{name} must be a multiple of the number of ranks ({ranks.size}), got {getattr(settings, name)}")
    torch.manual_seed(settings.seed)
    corpus = load_corpus()
    held_out = even_windows(corpus.held_out, settings.windows, settings.context + 1)
    model = ranks.build(LanguageModel, settings)
    before = evaluate(model, held_out, ranks)
    history = train(model, corpus.train, held_out, settings, ranks=ranks)
    after = evaluate(model, held_out, ranks)
    return Run(history, before, after, *_profiled(model, corpus.train, settings, ranks))


def compare(settings: Settings) -> tuple[Run, Run] | None:
    """Returns the run on all ranks and that in one process with as many threads as they have together; None on other ranks."""
    ranks = Ranks()
    try:
        together = run(settings, ranks)
        if ranks.rank > 0:
            dist.barrier()
            return None
        torch.set_num_threads(ranks.size * torch.get_num_threads())
        alone = run(settings, OneProcess())
        dist.barrier()
        return together, alone
    finally:
        dist.destroy_process_group()


def _profiled(
    model: LanguageModel, text: Tensor, settings: Settings, ranks: OneProcess
) -> tuple[float, dict[str, float], dict[str, int]]:
    training = Training(model, settings, ranks)

    def steps() -> None:
        for _ in range(PROFILED_STEPS):
            training.step(random_windows(text, settings.batch, settings.context + 1))

    steps()
    start = time.perf_counter()
    steps()
    step = 1e3 * (time.perf_counter() - start) / PROFILED_STEPS
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        steps()
    parts = dict.fromkeys([*PARTS, OTHER], 0.0)
    for event in profiler.key_averages():
        part = next((part for part, names in PARTS.items() if event.key.startswith(names)), OTHER)
        parts[part] += event.self_cpu_time_total / 1e3 / PROFILED_STEPS
    sent = [4 * math.prod(event.input_shapes[0]) for event in profiler.events() if event.name == EXCHANGE]
    return step, parts, _traffic(model, sum(sent) / PROFILED_STEPS, ranks.size)


def _traffic(model: LanguageModel, exchanged: float, size: int) -> dict[str, int]:
    """Bytes that leave a rank in a step, where ``exchanged`` are those that it gives to exchanges."""
    if size == 1:
        return {}
    of_experts = {name: p.nbytes for name, p in model.named_parameters() if ".experts." in name}
    others = sum(p.nbytes for name, p in model.named_parameters() if name not in of_experts)
    leaves = (size - 1) / size  # of equal parts, one stays here
    average = 2 * leaves  # a ring adds each part up on its way round, and tells the sum on a second
    return {
        "experts' rows and their gradients": round(leaves * exchanged),
        "average of all other gradients": round(average * others),
        "not sent: average of the experts' gradients": round(average * size * sum(of_experts.values())),
    }
