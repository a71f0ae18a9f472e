"""What is measured: the cases of a layer, on every contender that computes what it should."""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from memory import held_bytes, peak_bytes
from rich.progress import track
from rounds import TOO_LARGE, Figure, Step, admit, failed, fresh, measure

from .contenders import Contender, Layer
from .floor import Floor
from .models import Model

TRAINING, PREFILL, DECODE = "training step", "prefill", "decode"
PEAK, SAVED, LEFT_OUT = "training: peak memory", "saved for backward", "pairs left out"
CASES = (TRAINING, PREFILL, DECODE, PEAK, SAVED, LEFT_OUT)
UNITS = {PEAK: "MiB", SAVED: "MiB", LEFT_OUT: "%"}  # of the others ms


class Section(NamedTuple):
    """A part of the table: a layer, the load of its experts, and its type."""

    model: Model
    load: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.model.name}, {self.load} load, {self.dtype}"


def measure_section(section: Section, kinds: Sequence[type[Contender]], options: argparse.Namespace) -> list[dict]:
    """Returns the cells of a section, a dict each."""
    fresh()
    layer = Layer(section.model, section.load, getattr(torch, section.dtype), options.tokens)
    admitted, words = admit([kind for kind in kinds if kind.takes(layer.model)], layer, lambda c: c.difference())
    cells = []
    metrics = [
        metric for case in options.cases for metric in ([f"{case} {n}" for n in options.decode] if case == DECODE else [case])
    ]
    for metric in track(metrics, description=str(section), transient=True):
        figures = measure_metric(metric, admitted, options) | words
        cells += [
            {"section": str(section), "model": section.model.name, "sizes": section.model.sizes, "load": section.load}
            | {"dtype": section.dtype, "metric": metric, "contender": name, **figure._asdict()}
            for name, figure in figures.items()
        ]
    return cells


def measure_metric(metric: str, contenders: Sequence[Contender], options: argparse.Namespace) -> dict[str, Figure]:
    """Returns the cells of a column by contender."""
    if metric == LEFT_OUT:
        return {contender.name: left_out(contender) for contender in contenders if not isinstance(contender, Floor)}
    tokens = int(metric.removeprefix(DECODE)) if metric.startswith(DECODE) else options.tokens
    limit = options.gibibytes * 2**30
    small = [contender for contender in contenders if contender.bytes(tokens) <= limit]
    figures = {
        contender.name: Figure(word=TOO_LARGE, reason=f"{contender.bytes(tokens) / 2**30:.0f} GiB of copied weights")
        for contender in contenders
        if contender not in small
    }
    if metric in (PEAK, SAVED):
        small = [contender for contender in small if not isinstance(contender, Floor)]
    makers = {contender.name: partial(make_step, contender, metric, tokens) for contender in small}
    memory = {PEAK: peak_bytes, SAVED: held_bytes}.get(metric)
    return figures | measure(makers, options.rounds, options.seconds, memory=memory)


def make_step(contender: Contender, metric: str, tokens: int) -> Step:
    """Returns the call that a metric measures."""
    if metric == SAVED:
        contender.module.train()
        return lambda: (contender.forward(contender.layer.x),)
    return contender.step(tokens, training=metric in (TRAINING, PEAK))


def left_out(contender: Contender) -> Figure:
    """Returns the share of the pairs that a training step leaves out, in percent."""
    try:
        return Figure([100 * contender.left_out()])
    except Exception as error:
        return failed(error)
