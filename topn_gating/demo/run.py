"""The demo: trains a small Mixture-of-Experts language model and shows what its experts did and what routing cost."""

from pathlib import Path

import torch
from rich.console import Console

from .cost import compare
from .data import even_windows, load_corpus, unigram_entropy
from .report import Results, draw, show
from .train import LanguageModel, Settings, evaluate, train

LONG = 16


def run(settings: Settings, out: Path) -> int:
    """Trains, measures, prints the tables and writes the picture to ``out``.

    Returns:
        The exit code: 0 if the model learned and every expert is alive.
    """
    console = Console()
    results = measure(settings, console)
    show(results, console)
    draw(results, out)
    console.print(f"Picture: {out}", highlight=False, soft_wrap=True)
    return 0 if results.passed else 1


def measure(settings: Settings, console: Console) -> Results:
    """Everything that is random hangs on the seed, so two calls give the same losses."""
    torch.manual_seed(settings.seed)
    corpus = load_corpus()
    held_out = even_windows(corpus.held_out, settings.windows, settings.context + 1)
    model = LanguageModel(settings)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(f"{parameters / 1e6:.1f} M parameters, {len(corpus.train) / 1e6:.1f} MB of text", highlight=False)
    before = evaluate(model, held_out)
    history = train(model, corpus.train, held_out, settings)
    after = evaluate(model, held_out)
    costs = [
        compare(settings.batch, settings.context, settings.dim, settings.experts),
        compare(1, LONG * settings.context, settings.dim, settings.experts),
    ]
    return Results(settings, history, before, after, unigram_entropy(held_out[:, 1:]), costs)
