"""The interface of the contenders, the problem that they get, and transformers' blocks as contenders."""

from collections.abc import Mapping, Sequence

import torch
from rounds import Step, one_seed
from torch import Tensor, nn

from .models import Model, router

EVEN, ZIPF = "even", "Zipf"
LOADS = (EVEN, ZIPF)
LOGIT_DEVIATION = 1.28  # standard deviation of the Gumbel noise that makes a softmax's choice of the largest logits
SELECT_BIAS_DEVIATION = 0.02  # small beside that of the logits' sigmoids, 0.25, but enough to change choices
FEW_TOKENS = 64  # on which a contender that copies weights is compared
ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 0.2}  # largest relative difference of a result


class Layer:
    """A model's layer with its weights, the tokens that every contender gets, and the results that are expected.

    The first feature of every token is 1, and the router's weights of that feature add to the logits the logarithms of the
    experts' popularity: the same for all ("even"), or 1/i for the i-th of a random order ("Zipf"). DeepSeek-V3's
    bias, which is for the choice alone, is random.

    Attributes:
        block: transformers' block with its eager experts.
        weights: its parameters by name.
        x: the tokens ``(1, n, dim)``.
        grad: the gradient of the outputs.
    """

    def __init__(self, model: Model, load: str, dtype: torch.dtype, tokens: int) -> None:
        self.model, self.load, self.dtype = model, load, dtype
        torch.manual_seed(1)
        self.block = model.block("eager").to_empty(device="cpu")
        for name, weight in self.block.named_parameters():
            transposed = model.block_class.__name__ == "GptOssMLP" and weight.dim() == 3
            fan_in = model.dim if "bias" in name else weight.shape[-2 if transposed else -1]
            nn.init.normal_(weight, std=fan_in**-0.5)
        for bias in self.block.buffers():
            nn.init.normal_(bias, std=SELECT_BIAS_DEVIATION)
        popularity = torch.ones(model.num_experts)
        if load == ZIPF:
            popularity /= 1 + torch.randperm(model.num_experts)
        with torch.no_grad():
            weight = router(self.block).weight
            weight.mul_(LOGIT_DEVIATION)[:, 0] = popularity.log() - popularity.log().mean()
        self.block.to(dtype)
        self.weights = dict(self.block.named_parameters())

        x = torch.randn(1, tokens, model.dim)
        x[..., 0] = 1
        self.x = x.to(dtype).requires_grad_()
        self.grad = torch.randn(1, tokens, model.dim).to(dtype)
        self._expected: dict[int, Mapping[str, Tensor]] = {}

    def group_sizes(self, tokens: int) -> list[int]:
        """Returns the number of pairs of each expert, for the first ``tokens`` tokens."""
        with torch.no_grad():
            expert = router(self.block)(self.x[0, :tokens])[2]
        return torch.bincount(expert.flatten(), minlength=self.model.num_experts).tolist()

    def expected(self, tokens: int) -> Mapping[str, Tensor]:
        """Returns the outputs of the first ``tokens`` tokens and the gradients by name, by the block's eager experts."""
        if tokens not in self._expected:
            self._expected[tokens] = Eager(self).results(tokens)
        return self._expected[tokens]


class Contender:
    """A layer of the same sizes, on the tokens and with the weights of a :class:`Layer`.

    Attributes:
        name: its name in the table.
        about: what is run, and how its work differs from that of the others.
        install: the command that installs it.
        module: what is run.
    """

    name = about = install = ""
    module: nn.Module

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    @classmethod
    def load(cls) -> None:
        """Imports the package that it needs; raises what the import raises."""

    @classmethod
    def takes(cls, model: Model) -> bool:
        """Returns whether it has a layer for the model."""
        return True

    def bytes(self, tokens: int) -> int:
        """Returns the size of the copies of weights that it makes for so many tokens."""
        return 0

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The parameters that a training step differentiates, by name."""
        return self.layer.weights

    def forward(self, x: Tensor) -> Tensor:
        """Returns the outputs ``(1, n, dim)`` of tokens ``(1, n, dim)``."""
        return self.module(x)

    def step(self, tokens: int, training: bool) -> Step:
        """Returns a call of the layer on the first ``tokens`` tokens: forward and backward, or forward without gradients.

        The backward pass begins from a gradient made beforehand, and gives the gradients of the tokens and of all weights.
        """
        if not training:
            self.module.eval()
            x = self.layer.x[:, :tokens].detach()
            return torch.no_grad()(lambda: (self.forward(x),))
        self.module.train()
        x, grad, weights = self.layer.x[:, :tokens], self.layer.grad[:, :tokens], tuple(self.weights.values())

        def step() -> Sequence[Tensor]:
            outputs = self.forward(x)
            return outputs.detach(), *torch.autograd.grad(outputs, (x, *weights), grad)

        return step

    def results(self, tokens: int) -> Mapping[str, Tensor]:
        """Returns what a training step computes, by name; the gradient of x is that of all tokens."""
        results = one_seed(self.step(tokens, training=True))
        return dict(zip(("outputs", "x", *self.weights), results, strict=True))

    def expected(self, tokens: int) -> Mapping[str, Tensor]:
        """Returns the results that it should have; those of a name that it does not give are not compared."""
        return self.layer.expected(tokens)

    def difference(self) -> str | None:
        """Describes the results that differ from those that are expected; None if all agree."""
        tokens = self.layer.x.shape[1]
        if self.bytes(tokens):
            tokens = min(tokens, FEW_TOKENS)
        results, expected, allowed = self.results(tokens), self.expected(tokens), ALLOWED[self.layer.dtype]
        wrong = {name: relative_difference(results[name], expected[name]) for name in expected if name in results}
        # A NaN compares as neither larger nor smaller.
        described = [f"{name} by {100 * found:.2g} %" for name, found in wrong.items() if not found <= allowed]
        return ", ".join(described) or None

    def left_out(self) -> float:
        """Returns the share of the (token, expert) pairs that a training step leaves out."""
        return 0.0


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Returns the norm of the difference over that of the expected tensor."""
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm()).item()


class Transformers(Contender):
    """transformers' block with one of its implementations of the experts."""

    implementation = ""
    install = "pip install 'transformers>=5'"

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self.module = layer.model.block(self.implementation)
        self.module.load_state_dict(layer.block.state_dict(keep_vars=True), assign=True)

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.module(x)
        return outputs[0] if isinstance(outputs, tuple) else outputs  # gpt-oss returns the weights too


class Eager(Transformers):
    """A loop over the experts."""

    name = "transformers, eager"
    about = "transformers' block, its own loop over the experts"
    implementation = "eager"


class GroupedMm(Transformers):
    """One grouped product."""

    name = "transformers, grouped_mm"
    about = "transformers' block with experts_implementation='grouped_mm', its default: pairs sorted, torch's grouped_mm"
    implementation = "grouped_mm"


class BatchedMm(Transformers):
    """A batched product over pairs."""

    name = "transformers, batched_mm"
    about = "transformers' block with experts_implementation='batched_mm': a copy of the expert's weights for every pair"
    implementation = "batched_mm"

    def bytes(self, tokens: int) -> int:
        model = self.layer.model
        return tokens * model.top_k * 3 * model.hidden * model.dim * self.layer.x.element_size()
