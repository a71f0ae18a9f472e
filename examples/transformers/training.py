"""Mixtral and DeepSeek-V3, of a few million parameters, from transformers' own classes: both implementations side by side."""

import copy
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from language_model.data import load_corpus, random_windows
from memory import peak_bytes
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, MixtralConfig, PretrainedConfig

from topn_gating.integrations.transformers import register

STOCK, OURS = "stock", "topn_gating"
LEARNING_RATE = 1e-3
DECODED = 64
DECODE_ROUNDS = 7


@dataclass(frozen=True)
class Settings:
    """Seconds of training for each model, both implementations together, and the sizes of a step and of the models."""

    seconds: float
    seed: int
    batch: int
    context: int
    dim: int


def configurations(settings: Settings) -> dict[str, PretrainedConfig]:
    """The models, over bytes."""
    d = settings.dim
    common = {"vocab_size": 256, "hidden_size": d, "num_hidden_layers": 4, "num_attention_heads": 8}
    common["max_position_embeddings"] = settings.context + DECODED
    mixtral = {"intermediate_size": 2 * d, "num_key_value_heads": 4, "num_local_experts": 8, "num_experts_per_tok": 2}
    deepseek = {
        "intermediate_size": 2 * d,
        "moe_intermediate_size": d // 2,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 8,
    }
    deepseek |= {"n_routed_experts": 32, "n_shared_experts": 1, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2}
    deepseek |= {"q_lora_rank": d // 4, "kv_lora_rank": d // 4, "v_head_dim": d // 8}
    deepseek |= {"qk_rope_head_dim": d // 16, "qk_nope_head_dim": d // 16}
    return {"Mixtral": MixtralConfig(**common, **mixtral), "DeepSeek-V3": DeepseekV3Config(**common, **deepseek)}


@dataclass
class Measured:
    """What one implementation did."""

    loss: list[float] = field(default_factory=list)  # of each step, in nats per byte
    seconds: list[float] = field(default_factory=list)  # of each step
    peak: int = 0  # bytes of a step
    decode: list[float] = field(default_factory=list)  # seconds of a token, in each round

    @property
    def steps_a_second(self) -> float:
        """From the median step, of all but the first."""
        return 1 / statistics.median(self.seconds[1:])

    @property
    def tokens_a_second(self) -> float:
        """From the median round of decoding."""
        return 1 / statistics.median(self.decode)


class Trainer:
    """A model and its optimizer."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.measured = model.train(), Measured()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def step(self, windows: Tensor) -> Tensor:
        """Trains on windows ``(batch, n)``; returns the loss."""
        loss = self.model(input_ids=windows, labels=windows).loss
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()

    def decode(self, prompt: Tensor) -> None:
        """Generates :data:`DECODED` tokens after a prompt ``(1, n)``."""
        options = {"max_new_tokens": DECODED, "min_new_tokens": DECODED, "do_sample": False, "pad_token_id": 0}
        self.model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)


def timed(call: Callable[[Tensor], Tensor | None], data: Tensor) -> tuple[float, Tensor | None]:
    """Seconds of a call, and what it returns."""
    start = time.perf_counter()
    result = call(data)
    return time.perf_counter() - start, result


def in_turn(trainers: dict[str, Trainer], i: int) -> list[Trainer]:
    """Both, each time another first."""
    return list(trainers.values())[:: 1 if i % 2 else -1]


def train(config: PretrainedConfig, settings: Settings, progress: Callable[[float, float], None]) -> dict[str, Measured]:
    """Trains both models from the same weights on the same bytes, a step of one and a step of the other.

    ``progress`` is called with the share of the time that is over, and the loss.
    """
    torch.manual_seed(settings.seed)
    stock = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    ours = AutoModelForCausalLM.from_config(copy.deepcopy(config), experts_implementation=register())
    ours.load_state_dict(stock.state_dict())
    trainers = {STOCK: Trainer(stock), OURS: Trainer(ours)}
    text = load_corpus().train
    start = time.perf_counter()
    steps = 0
    while (passed := time.perf_counter() - start) < settings.seconds or steps < 3:
        windows = random_windows(text, settings.batch, settings.context)
        for trainer in in_turn(trainers, steps):
            seconds, loss = timed(trainer.step, windows)
            trainer.measured.seconds.append(seconds)
            trainer.measured.loss.append(loss.item())
        steps += 1
        progress(min(1.0, passed / settings.seconds), trainers[OURS].measured.loss[-1])
    for trainer in trainers.values():
        trainer.measured.peak = peak_bytes(functools.partial(trainer.step, windows))
        trainer.model.eval()
    with torch.no_grad():
        for i in range(DECODE_ROUNDS + 1):  # the first warms up
            for trainer in in_turn(trainers, i):
                seconds, _ = timed(trainer.decode, windows[:1, :8])
                trainer.measured.decode += [seconds / DECODED] if i else []
    return {name: trainer.measured for name, trainer in trainers.items()}
