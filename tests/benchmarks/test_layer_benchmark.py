"""Tests of benchmarks/layer on few features: every contender computes the same, table and picture, and what is marked."""

import json

import pytest
import rounds
import torch

pytest.importorskip("rich")
pytest.importorskip("st_moe_pytorch")
pytest.importorskip("transformers", minversion="5")
from layer import contenders, measure
from layer import run as layer_run
from layer.contenders import EVEN, ZIPF, BatchedMm, Contender, Eager, GroupedMm, Layer, Transformers
from layer.floor import Floor
from layer.measure import LEFT_OUT, PEAK, PREFILL, SAVED, TRAINING
from layer.models import MODELS
from layer.others import Megatron, StMoe
from layer.ours import Capacity, CapacityForAll, Ours, OursInTransformers

METRICS = [TRAINING, PREFILL, "decode 5", "decode 1", PEAK, SAVED, LEFT_OUT]
TOKENS = 40

pytestmark = pytest.mark.usefixtures("restarted")


@pytest.fixture(scope="module", autouse=True)
def no_process_group_left():
    """Ends the process group that Megatron-core asks for: a process has one at a time, and other tests make their own."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def bench(tmp_path):
    """Runs the tool on few features; returns its cells and its Markdown table."""

    def run(*arguments):
        files = ["--json", str(tmp_path / "cells.json"), "--markdown", str(tmp_path / "table.md")]
        sizes = ["--quick", "--tokens", str(TOKENS), "--decode", "5", "1", "--rounds", "2", "--threads", "1"]
        layer_run.main(["--malloc", "default", *sizes, *files, *arguments])
        cells = json.loads((tmp_path / "cells.json").read_text())["cells"]
        return cells, (tmp_path / "table.md").read_text()

    return run


def quick(model):
    """Returns the model of that name with few features."""
    return next(m for m in MODELS if m.name == model).shrunk()


@pytest.fixture
def loaded():
    """Imports a contender's package; skips the test if it is not installed."""

    def load(kind):
        try:
            kind.load()
        except ImportError as error:
            pytest.skip(f"{kind.name}: {error}")
        return kind

    return load


def test_table_has_every_case_of_every_contender(bench, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "layer.png"
    models = ["Mixtral-like", "DeepSeek-V3-like"]
    cells, markdown = bench("--models", *models, "--dtypes", "float32", "--picture", str(picture))
    named = {(c["section"], c["contender"], c["metric"]): c for c in cells}
    for model in models:
        kinds = [k for k in layer_run.CONTENDERS if k.takes(quick(model)) and k is not Megatron]
        for load in (EVEN, ZIPF):
            section = f"{model}, {load} load, float32"
            for kind in kinds:
                for metric in METRICS[: 4 if kind is Floor else None]:
                    assert named[section, kind.name, metric]["word"] == ""
                    assert all(value >= 0 for value in named[section, kind.name, metric]["values"])
            rows = markdown.split(f"**{section}**")[1].split("| **")[0].split("\n\n")[0].strip().splitlines()[1:]
            rows = [row for row in rows if Megatron.name not in row]
            assert [row.split("|")[1].strip() for row in rows] == [kind.name for kind in kinds]
            assert all(row.count("|") == len(METRICS) + 2 for row in rows)
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(kind.about[:40] in printed for kind in layer_run.CONTENDERS if kind is not Megatron)

    layer_run.main(["--cells", str(tmp_path / "cells.json"), "--markdown", str(tmp_path / "again.md")])
    assert (tmp_path / "again.md").read_text() == markdown


@pytest.mark.parametrize("load", [EVEN, ZIPF])
@pytest.mark.parametrize(
    ("kind", "model"),
    [(kind, model) for kind in layer_run.CONTENDERS for model in MODELS if kind is not Floor and kind.takes(model)],
    ids=lambda it: it.name,
)
def test_contenders_agree(kind, model, load, loaded):
    contender = loaded(kind)(Layer(model.shrunk(), load, torch.float32, TOKENS))
    assert contender.difference() is None
    assert contender.left_out() == 0 or kind in (Capacity, StMoe)


@pytest.mark.parametrize("kind", [Ours, OursInTransformers, GroupedMm, BatchedMm, Megatron], ids=lambda kind: kind.name)
@pytest.mark.parametrize("model", ["Qwen3-like", "DeepSeek-V3-like"])
def test_contenders_agree_in_bfloat16(model, kind, loaded):
    assert loaded(kind)(Layer(quick(model), EVEN, torch.bfloat16, TOKENS)).difference() is None


def test_deepseek_chooses_by_its_bias_in_four_of_eight_groups():
    layer = Layer(quick("DeepSeek-V3-like"), EVEN, torch.float32, TOKENS)
    gate = Ours(layer).module.gate
    expert = gate.route(layer.x).expert
    assert all(len(set((chosen // 8).tolist())) <= 4 for chosen in expert.flatten(0, -2))
    gate.select_bias.zero_()
    assert not torch.equal(gate.route(layer.x).expert, expert)


def test_every_result_is_compared(monkeypatch):
    layer = Layer(quick("Mixtral-like"), EVEN, torch.float32, TOKENS)
    results = Eager(layer).results(TOKENS)
    assert set(results) == {"outputs", "x", "gate.weight", "experts.gate_up_proj", "experts.down_proj"}
    for name in results:
        for other in (results[name] * 1.01, torch.full_like(results[name], torch.nan)):
            changed = {**results, name: other}
            monkeypatch.setattr(GroupedMm, "results", lambda self, tokens, changed=changed: changed)
            assert GroupedMm(layer).difference().startswith(f"{name} by ")


@pytest.mark.parametrize("kind", [GroupedMm, StMoe, OursInTransformers], ids=lambda kind: kind.name)
def test_one_that_computes_something_else_is_marked(kind, bench, capsys, monkeypatch):
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 1.1 * forward(self, x))
    cells, markdown = bench("--models", "Qwen3-like", "--loads", EVEN, "--dtypes", "float32", "--cases", PREFILL)
    assert [c["word"] for c in cells if c["contender"] == kind.name] == [rounds.DIFFERS]
    assert {c["word"] for c in cells if c["contender"] != kind.name} == {""}
    assert f"{kind.name} differs: outputs by " in capsys.readouterr().out
    assert f"| {kind.name} | differs |" in markdown


def test_one_that_fails_is_marked(bench, capsys, monkeypatch):
    def fail(self, x):
        raise RuntimeError("it has no kernel")

    monkeypatch.setattr(GroupedMm, "forward", fail)
    cells, _ = bench("--models", "Mixtral-like", "--loads", EVEN, "--dtypes", "float32", "--cases", PREFILL)
    assert [c["word"] for c in cells if c["contender"] == GroupedMm.name] == [rounds.FAILS]
    assert f"{GroupedMm.name} fails: RuntimeError: it has no kernel" in capsys.readouterr().out


def test_missing_packages_are_named(bench, capsys, monkeypatch):
    def missing():
        raise ModuleNotFoundError("No module named 'it'")

    monkeypatch.setattr(Megatron, "load", missing)
    cells, _ = bench("--models", "Mixtral-like", "--loads", EVEN, "--dtypes", "float32", "--cases", PREFILL)
    assert f"{Megatron.name} is left out (ModuleNotFoundError: No module named 'it')" in capsys.readouterr().out
    assert Megatron.name not in {c["contender"] for c in cells}


def test_too_large_copies_of_weights_are_not_made(bench):
    only = ["--contenders", BatchedMm.name, Floor.name]
    cells, _ = bench("--models", "Mixtral-like", "--loads", EVEN, "--dtypes", "float32", "--gibibytes", "2e-4", *only)
    words = {c["metric"]: c["word"] for c in cells if c["contender"] == BatchedMm.name}
    assert words == dict.fromkeys((TRAINING, PREFILL, PEAK, SAVED), rounds.TOO_LARGE) | dict.fromkeys(
        ("decode 5", "decode 1", LEFT_OUT), ""
    )


def test_one_that_copies_weights_is_compared_on_few_tokens(monkeypatch):
    monkeypatch.setattr(contenders, "FEW_TOKENS", 3)
    seen = []
    monkeypatch.setattr(BatchedMm, "results", lambda self, tokens: seen.append(tokens) or self.expected(tokens))
    assert BatchedMm(Layer(quick("Mixtral-like"), EVEN, torch.float32, TOKENS)).difference() is None
    assert seen == [3]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_floor_has_the_products_of_the_layer(model):
    layer = Layer(model.shrunk(), ZIPF, torch.float32, TOKENS)
    sizes = layer.group_sizes(TOKENS)
    assert len(sizes) == model.num_experts
    assert sum(sizes) == TOKENS * model.top_k
    linears = list(Floor(layer).layers(TOKENS))
    multiplied = sum(linear.x.shape[0] * linear.weight.numel() for linear in linears)
    shared = 3 * TOKENS * 32 * 16 if model.name.startswith("DeepSeek") else 0
    assert multiplied == TOKENS * 32 * model.num_experts + 3 * sum(sizes) * 32 * 16 + shared


def test_zipf_load_is_uneven():
    largest = {load: max(Layer(quick("Qwen3-like"), load, torch.float32, 400).group_sizes(400)) for load in (EVEN, ZIPF)}
    assert largest[EVEN] < 2 * 400 * 8 / 64 < largest[ZIPF]


def test_capacity_leaves_out_what_its_buffers_cannot_hold():
    layer = Layer(quick("Mixtral-like"), ZIPF, torch.float32, 64)
    slots = int(64 * 1.25 / 8)
    left_out = sum(max(0, size - slots) for size in layer.group_sizes(64)) / 128
    assert Capacity(layer).left_out() == pytest.approx(left_out)
    assert left_out > 0
    for_all = CapacityForAll(layer)
    for_all.step(64, training=True)
    assert for_all.left_out() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--decode", "9", "--tokens", "8"], "--decode must be at most --tokens, 8, got 9"),
        (["--tokens", "0"], "a number of tokens is at least 1, got '0'"),
        (["--decode", "x"], "a number of tokens is at least 1, got 'x'"),
        (["--models", "GPT-2"], "invalid choice: 'GPT-2'"),
        (["--cases", "sleep"], "invalid choice: 'sleep'"),
        (["--loads", "odd"], "invalid choice: 'odd'"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        layer_run.main(arguments)
    assert message in capsys.readouterr().err


def test_every_contender_says_what_it_is():
    assert len({kind.name for kind in layer_run.CONTENDERS}) == len(layer_run.CONTENDERS)
    assert all(kind.about and issubclass(kind, Contender) for kind in layer_run.CONTENDERS)
    assert all(kind.install for kind in layer_run.CONTENDERS if kind in (Megatron, StMoe) or issubclass(kind, Transformers))
    assert len({str(measure.Section(model, EVEN, "float32")) for model in MODELS}) == len(MODELS)
