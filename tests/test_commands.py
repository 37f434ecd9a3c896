"""``python -m fastnn``: what it prints, measures and refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastnn
from fastnn import bench
from fastnn.__main__ import main
from fastnn.loading import load_model, random_inputs

MODELS = """
import torch
from torch import nn

def images():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3))

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.rnn, self.head = nn.Embedding(20, 6), nn.GRU(6, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, words, scale):
        return self.head(self.rnn(self.embedding(words))[0][:, -1]) * scale

made = nn.Linear(3, 4)
number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "models_of_mine.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "models_of_mine", raising=False)
    return tmp_path


def test_models_and_inputs(folder: Path) -> None:
    assert isinstance(load_model("models_of_mine:images"), nn.Sequential)
    assert isinstance(load_model("models_of_mine:made"), nn.Linear)
    assert isinstance(load_model(f"{folder / 'models_of_mine.py'}:Words"), nn.Module)
    floats, words = random_inputs(["2,3", "4,5:int64:7"])
    assert floats.shape == (2, 3)
    assert floats.dtype is torch.float32
    assert words.dtype is torch.int64
    assert words.max() < 7
    assert random_inputs(["3:float64"])[0].dtype is torch.float64


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["explain", "models_of_mine", "--input", "2"], "expected package.module:factory"),
        (["explain", "nowhere:x", "--input", "2"], "there is no nowhere:x"),
        (["explain", "models_of_mine:nothing", "--input", "2"], "there is no models_of_mine:nothing"),
        (["explain", "models_of_mine:number", "--input", "2"], "gives a int"),
        (["explain", "models_of_mine:images", "--input", "2,x"], "expected sizes such as"),
        (["explain", "models_of_mine:images", "--input", "2:zebra"], "expected sizes such as"),
        (["explain", "nowhere.py:x", "--input", "2"], "there is no nowhere.py:x"),
        (["bench", "models_of_mine:images", "--input", "2,3"], "the model does not take these inputs"),
        (["bench", "models_of_mine:Words", "--input", "2,7:int64:99", "--input", "1"], "does not take these inputs"),
    ],
)
def test_what_is_refused(folder: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_explain(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "models_of_mine:images", "--input", "2,2,9,9"]) == 0
    assert "conv_relu_max_pool" in capsys.readouterr().out
    assert main(["explain", "models_of_mine:Words", "--input", "2,7:int64:20", "--input", "1"]) == 0
    assert "rnn" in capsys.readouterr().out


def test_information(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out.strip() == str(fastnn.backend_info())


@pytest.mark.parametrize("train", [False, True])
def test_every_contender_is_checked_and_timed(folder: Path, train: bool) -> None:
    model, inputs = load_model("models_of_mine:images"), random_inputs(["4,2,9,9"])
    rows = bench.measure(model, inputs, train, threads=1, seconds=0.01)
    ran = {row.name: row for row in rows if row.median}
    assert {"stock", "stock, channels last", "torch.compile", "fastnn.fuse"} <= ran.keys()
    assert ("fastnn.training_step" if train else "fastnn.freeze") in ran
    for row in ran.values():
        assert row.low <= row.median <= row.high
        assert row.error < 1e-4
    assert max(row.times_stock for row in rows if row.name.startswith("stock")) == 1
    text = "\n".join(bench.as_table(rows))
    assert all(name in text for name in ran)
    assert "stock" in bench.advice(rows, train)


def test_wrong_results_are_not_timed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "fuse", lambda model: lambda x: model(x) * 1.1)
    rows = bench.measure(load_model("models_of_mine:made"), random_inputs(["2,3"]), False, 1, 0.01)
    (fused,) = [row for row in rows if row.name == "fastnn.fuse"]
    assert not fused.median
    assert "differ from float64" in fused.why_not


def test_where_the_time_goes(folder: Path) -> None:
    layers = bench.layer_times(load_model("models_of_mine:images"), random_inputs(["4,2,9,9"]))
    assert [layer.seconds for layer in layers] == sorted((layer.seconds for layer in layers), reverse=True)
    assert sum(layer.share for layer in layers) == pytest.approx(1)
    becomes = {layer.layer: layer.becomes for layer in layers}
    assert becomes["0"].startswith("conv_relu_max_pool")
    assert becomes["3"] == ""  # a flattening


def test_the_command(folder: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "fastnn",
        "bench",
        "models_of_mine:images",
        "--input",
        "4,2,9,9",
        "--seconds",
        "0.01",
        "--no-compile",  # which the test above measures
    ]
    subprocess.run([*command, "--json", "figures.json"], check=True, cwd=folder)
    figures = json.loads((folder / "figures.json").read_text())
    names = {row["name"] for row in figures["rows"]}
    assert names >= {"stock", "fastnn.fuse", "fastnn.freeze"}
    assert "torch.compile" not in names
    if sys.platform == "linux":
        assert any(row["peak"] for row in figures["rows"])


def test_a_drawing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [bench.Row("stock", 1, 2.0, 1.9, 2.1, 1.0), bench.Row("fastnn.fuse", 2, 1.0, 0.9, 1.1, 2.0)]
    bench.draw(rows, str(tmp_path / "drawing.png"))
    assert (tmp_path / "drawing.png").stat().st_size > 1000
