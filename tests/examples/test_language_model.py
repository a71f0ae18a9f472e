"""Tests of the demo: command line, data, model, and the computation of its results."""

import importlib.util
import math
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from language_model import run
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import topn_gating

ROOT = Path(__file__).parents[2]
needs_extra = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("matplotlib", "rich", "tqdm")), reason="needs the extra `demo`"
)
TINY = {"steps": 3, "seed": 0, "batch": 2, "context": 32, "dim": 32, "layers": 2, "experts": 4, "windows": 3}


def test_command_runs_from_another_folder(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "language_model"), "--help"]
    environment = os.environ | {"PYTHONPATH": str(Path(topn_gating.__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "--experts" in done.stdout


def test_without_its_packages_it_says_how_to_get_them(monkeypatch, capsys):
    monkeypatch.setattr(run, "PACKAGES", ("matplotlib", "no_such_package"))
    assert run.main([]) == 1
    assert capsys.readouterr().err.startswith('The demo needs no_such_package: pip install "topn_gating[demo]"')


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--stepps", "3"], "--stepps"),
        (["--steps", "0"], "at least 1"),
        (["--out", "no such folder/demo.png"], "no such folder"),
        pytest.param(["--dim", "48"], "multiple of 32", marks=needs_extra),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_runs(arguments, said, capsys):
    with pytest.raises(SystemExit) as error:
        run.main(arguments)
    assert error.value.code == 2
    assert said in capsys.readouterr().err


def test_every_byte_has_one_kind():
    from language_model.data import BYTE_KINDS

    assert sorted(b for members in BYTE_KINDS.values() for b in members) == list(range(256))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (b"az", "lower case"),
        (b"AZ", "upper case"),
        (b"09", "digit"),
        (b"_", "underscore"),
        (b"([{}])", "bracket"),
        (b"\"'`", "quote"),
        (b"=.,:#\\@", "punctuation"),
        (b" \t", "space or tab"),
        (b"\r\n", "line break"),
        (b"\x00\x0c\x7f\x80\xff", "other"),
    ],
)
def test_kind_of_a_byte(text, kind):
    from language_model.data import BYTE_KINDS, byte_kinds

    assert {list(BYTE_KINDS)[i] for i in byte_kinds(torch.tensor(list(text), dtype=torch.uint8))} == {kind}


def test_no_file_is_in_both_halves():
    from language_model.data import load_corpus, source_files, split_files

    files = source_files()
    train, held_out = split_files(files)
    assert sorted(train + held_out) == files == sorted(set(files))
    assert len(held_out) > 10
    assert {f.parent for f in files} == {Path(sysconfig.get_path("stdlib"))}

    corpus = load_corpus()
    for half, names in ((corpus.train, train), (corpus.held_out, held_out)):
        text = b"".join(f.read_bytes() for f in names)
        assert bytes(half.tolist()) == text[: len(half)]
        assert len(half) > 100_000


def test_corpus_is_capped():
    from language_model.data import load_corpus

    assert sum(map(len, load_corpus(max_bytes=8000))) == 8000


def test_windows_are_runs_of_the_text():
    from language_model.data import even_windows, random_windows

    text = torch.arange(100, dtype=torch.uint8)
    random = random_windows(text, 500, 10)
    even = even_windows(text, 4, 10)
    for windows in (random, even):
        assert (windows.diff() == 1).all()
    assert (random[:, 0].min(), random[:, -1].max()) == (0, 99)
    assert even[:, 0].tolist() == [0, 30, 60, 90]


def test_unigram_entropy():
    from language_model.data import unigram_entropy

    assert unigram_entropy(torch.full((10,), 7)) == 0
    assert unigram_entropy(torch.tensor([[0, 1], [2, 255]])) == pytest.approx(math.log(4))


@pytest.fixture(scope="module")
def tiny():
    pytest.importorskip("tqdm")
    from language_model.train import Settings

    return Settings(**TINY)


def test_a_later_byte_changes_no_earlier_output(tiny):
    from language_model.train import LanguageModel

    model = LanguageModel(tiny).eval()
    data = torch.randint(256, (1, tiny.context))
    changed = data.clone()
    changed[:, 20:] = (data[:, 20:] + 1) % 256
    before, after = model(data)[0], model(changed)[0]
    torch.testing.assert_close(after[:, :20], before[:, :20])
    assert not torch.allclose(after[:, 20:], before[:, 20:])


def test_block_equals_the_moe_layer(tiny):
    from language_model.train import LanguageModel

    model = LanguageModel(tiny)
    block = model.blocks[0]
    x = torch.randn(2, tiny.context, tiny.dim)
    torch.manual_seed(1)
    out, routing = block(x)
    torch.manual_seed(1)
    attended = x + block.attention(x)
    expected = block.moe(block.norm(attended))
    torch.testing.assert_close(out, attended + expected.outputs)
    torch.testing.assert_close(model.aux_loss([routing, routing]), 2 * expected.total_aux_loss)


def test_received_tokens_add_up(tiny):
    from language_model.data import byte_kinds
    from language_model.train import LanguageModel, evaluate

    windows = torch.randint(32, 127, (tiny.windows, tiny.context + 1))
    result = evaluate(LanguageModel(tiny), windows)
    kinds = torch.bincount(byte_kinds(windows[:, :-1]).flatten(), minlength=result.received.shape[-1])
    assert (result.received.sum(1) == 2 * kinds).all()
    torch.testing.assert_close(result.load.sum(-1), torch.ones(tiny.layers))


def test_expert_and_kind_meet_in_the_right_cell():
    pytest.importorskip("tqdm")
    from language_model.train import received_by_kind

    logits = torch.tensor([[9.0, 0, 0], [9.0, 0, 0], [0, 0, 9.0]])
    routing = topn_gating.route(logits, top_n=1, capacity=1)
    received = received_by_kind(routing, torch.tensor([4, 5, 6]))
    assert received.nonzero().tolist() == [[0, 4], [2, 6]]  # the second token found expert 0 full


def test_two_runs_give_the_same_losses(tiny):
    from language_model.data import even_windows, load_corpus
    from language_model.train import LanguageModel, Settings, evaluate, train

    text = load_corpus(max_bytes=100_000).train

    def losses(settings):
        torch.manual_seed(settings.seed)
        model = LanguageModel(settings)
        held_out = even_windows(text, settings.windows, settings.context + 1)
        history = train(model, text, held_out, settings)
        return history.loss, history.blocks, history.held_out, evaluate(model, held_out).loss

    assert losses(tiny) == losses(tiny)
    assert losses(tiny) != losses(Settings(**TINY | {"seed": 1}))


def of_layers(loss, routings):
    """The figures of a step by the names of the log, each from its layer's own statistics."""
    figures = {"loss/training": loss}
    for index, routing in enumerate(routings):
        stats = routing.stats()
        figures |= {f"block_{index}/{name}": getattr(routing, name) for name in ("balance_loss", "router_z_loss")}
        figures |= {f"block_{index}/{name}": getattr(stats, name) for name in stats._fields if name not in ("load", "demand")}
        demand = stats.demand.sum(0)
        figures |= {f"block_{index}_demand/expert_{expert}": demand[expert] for expert in range(len(demand))}
    return {name: value.item() for name, value in figures.items()}


def test_log_has_the_statistics_of_every_layer_and_step(tiny, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from language_model import train
    from language_model.data import even_windows
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    expected, add = [], train.History.add
    monkeypatch.setattr(train.History, "add", lambda *args: (expected.append(of_layers(*args[1:])), add(*args)))
    text = torch.randint(256, (1000,), dtype=torch.uint8)
    with SummaryWriter(str(tmp_path)) as writer:
        held_out = even_windows(text, tiny.windows, tiny.context + 1)
        history = train.train(train.LanguageModel(tiny), text, held_out, tiny, writer)
    log = EventAccumulator(str(tmp_path)).Reload()
    assert set(log.Tags()["scalars"]) == {"loss/held_out", *expected[0]}
    assert len(expected) == tiny.steps
    for name in expected[0]:
        values = [(event.step, event.value) for event in log.Scalars(name)]
        assert values == [(step, pytest.approx(figures[name])) for step, figures in enumerate(expected, 1)]
    assert [(e.step, e.value) for e in log.Scalars("loss/held_out")] == [(s, pytest.approx(v)) for s, v in history.held_out]
    dropped = [sum(figures[f"block_{i}/drop_fraction"] for i in range(2)) / 2 for figures in expected]
    assert history.dropped() == pytest.approx(dropped[-1])
    assert history.figure("drop_fraction").mean(1).tolist() == pytest.approx(dropped)
    load = [[[f[f"block_{i}_demand/expert_{e}"] for e in range(4)] for i in range(2)] for f in expected]
    torch.testing.assert_close(history.load, torch.tensor(load) / torch.tensor(load).sum(-1, keepdim=True))


def test_training_step_is_read_once(tiny, monkeypatch):
    """Whatever asks a fake tensor for a value raises, so that the one ``tolist`` is all that a step copies to the host."""
    from language_model import train

    class Writer:
        scalars = 0

        def add_scalar(self, tag, value, step):
            self.scalars += isinstance(value, float)

    def tolist(t):
        read.append(tuple(t.shape))
        return [1.0] * t.numel()

    read, writer = [], Writer()
    monkeypatch.setattr(FakeTensor, "tolist", tolist)
    monkeypatch.setattr(train, "evaluate", lambda *args: train.Evaluation(1.0, None))
    with FakeTensorMode():
        text = torch.zeros(1000, dtype=torch.uint8)
        train.train(train.LanguageModel(tiny), text, text[:0], tiny, writer)
    figures = 1 + tiny.layers * (7 + tiny.experts)
    assert read == [(figures,)] * tiny.steps
    assert writer.scalars == tiny.steps * figures + tiny.steps - 1  # and the loss of held-out text but for the last step


def test_log_without_tensorboard_says_how_to_get_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(run, "PACKAGES", ())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run.main(["--tensorboard", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "--tensorboard needs tensorboard: pip install tensorboard\n"


def test_training_learns(tiny):
    from language_model.train import LanguageModel, Settings, train

    text = torch.tensor(list(b"abcdefgh" * 100), dtype=torch.uint8)
    settings = Settings(**TINY | {"steps": 100})
    history = train(LanguageModel(settings), text, text[: 2 * tiny.context].view(2, -1).long(), settings)
    assert history.loss[0] > 4.5
    assert history.loss[-1] < 0.5 < math.log(8)  # lower than a model without context can reach
    assert [step for step, _ in history.held_out] == list(range(12, 100, 12))


def test_learning_rate_rises_then_falls_to_nothing():
    pytest.importorskip("tqdm")
    from language_model.train import WARM_UP, warm_up_and_cosine

    rates = [warm_up_and_cosine(i / 100) for i in range(101)]
    top = rates.index(max(rates))
    assert top == round(100 * WARM_UP)
    assert rates[top] == 1
    assert 0 < rates[0] < 0.2
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] == pytest.approx(0)


@needs_extra
def test_verdict():
    from language_model.report import Results
    from language_model.train import Evaluation, History, Settings

    received = torch.full((2, 4, 10), 100)
    received[1, 2] = 1

    def results(loss, received):
        return Results(Settings(**TINY), History(), Evaluation(5.0, received), Evaluation(loss, received), 3.0)

    alive = torch.full_like(received, 100)
    assert results(2.9, received).dead == [(1, 2)]
    assert results(2.9, alive).dead == []
    assert [results(loss, alive).learned for loss in (2.9, 3.0, math.nan)] == [True, False, False]
    assert [results(*case).passed for case in ((2.9, alive), (2.9, received), (3.0, alive))] == [True, False, False]


@needs_extra
def test_moving_average():
    from language_model.report import _moving_average

    values = torch.tensor([[0.0, 1], [3, 1], [6, 1], [12, 1]])
    assert _moving_average(values, 0).equal(values)
    assert _moving_average(values, 1).tolist() == [[1.5, 1], [3, 1], [7, 1], [9, 1]]


@needs_extra
def test_demo_draws_its_picture_and_fails_where_nothing_was_learned(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    picture, log = tmp_path / "picture.png", tmp_path / "log"
    options = [f"--{name}={value}" for name, value in TINY.items()]
    assert run.main([*options, "--out", str(picture), "--tensorboard", str(log)]) == 1  # three steps are too few to learn
    assert next(log.iterdir()).name.startswith("events.out.tfevents")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000
    out = capsys.readouterr().out
    for text in ("unigram entropy", "loss after training", "Dead experts", "did not learn", "picture.png"):
        assert text in out.replace("\n", "")


@needs_extra
def test_two_ranks_train_as_one_process(tmp_path):
    """`make demo-distributed`, which fails where the losses differ, with torchrun's own start of the processes."""
    picture = tmp_path / "picture.png"
    options = [f"--{name}={value}" for name, value in (TINY | {"windows": 4}).items()]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, str(ROOT / "examples" / "language_model"), *options, f"--out={picture}"]
    environment = os.environ | {"PYTHONPATH": str(Path(topn_gating.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    for text in ("experts' rows", "one process", "held-out text after training"):
        assert text in done.stdout


@needs_extra
def test_runs_that_differ_are_told():
    from language_model.distributed import Run
    from language_model.distributed_report import same_losses
    from language_model.train import Evaluation, History

    def run(*loss, before=5.0):
        return Run(History(loss=list(loss)), Evaluation(before, None), Evaluation(1.0, None), 0.0, {}, {})

    assert same_losses(run(3.0, 2.0), run(3.0, 2.00001))
    assert not same_losses(run(3.0, 2.0), run(3.0, 2.001))
    assert not same_losses(run(3.0, before=5.001), run(3.0))


def test_ranks_divide_every_batch(tiny):
    from language_model.distributed import run as run_on
    from language_model.ranks import OneProcess

    ranks = OneProcess()
    ranks.size = 2
    with pytest.raises(ValueError, match=r"windows must be a multiple of the number of ranks \(2\), got 3"):
        run_on(tiny, ranks)
