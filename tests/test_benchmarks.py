"""The benchmark programs work, and give no time for a wrong result."""

import dataclasses
import io
import queue
import random
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from rich.console import Console

from benchmarks import (
    bounds,
    compare,
    curves,
    epoch,
    latency,
    memory,
    overhead,
    processes,
    report,
    scaling,
    stored,
    sweep,
)
from benchmarks.cases import CASES, Case, first_tensor
from benchmarks.problem import DIRECTIONS, Problem
from benchmarks.timing import Timing, bandwidth, interleave, is_reliable, peak_flops, speedups

SMALL = CASES["mlp"][0]


@pytest.mark.parametrize("op", CASES)
def test_cases_are_built_alike_on_stock_and_fused_layers(op: str) -> None:
    names = [case.name for case in CASES[op]]
    assert len(set(names)) == len(names)
    for case in CASES[op]:
        fused, stock = case.fused(), case.stock()
        assert [p.shape for p in fused.parameters()] == [p.shape for p in stock.parameters()]
        if case.flops < 3e7:
            problem = Problem(case, "inference")
            assert first_tensor(problem.fused(problem.input)).shape == problem.grad_output.shape


def test_report(tmp_path: Path) -> None:
    rows = [report.measure(SMALL, direction, 1, seconds=0.01) for direction in report.DIRECTIONS]
    assert all(min(row["microseconds"].values()) > 0 for row in rows)
    assert report.as_table(rows).row_count == 3
    stored.save(tmp_path, "models", rows, 0.01)
    found = stored.load(tmp_path)["models"]
    assert found["environment"]["threads"] == [1]
    assert found["rows"][0]["microseconds"]["stock"] == pytest.approx(rows[0]["microseconds"]["stock"], rel=1e-3)


def test_report_is_whole_in_a_pipe_and_says_what_is_worthless() -> None:
    row = {
        "case": "Autoencoder (256, 784) 128-32",
        "direction": "inference",
        "threads": 1,
        "microseconds": {"stock": 123456.7, "fused": 999999.9},
        "ratio": 6.1,
        "ratio_quartiles": (5.9, 6.3),
    }
    rows = []
    for ratio, ratio_quartiles in ((6.1, (5.9, 6.3)), (6013.2, (1.3, 10480.5)), (40.0, (5.9, 6.3))):
        reliable = is_reliable(ratio, ratio_quartiles)
        rows.append(row | {"ratio": ratio, "ratio_quartiles": ratio_quartiles, "reliable": reliable})
    assert [row["reliable"] for row in rows] == [True, False, False]
    piped = io.StringIO()
    report.print_table(rows, Console(file=piped, width=80))
    text = piped.getvalue()
    assert text.count("123.46 ms") == text.count("1000.00 ms") == 3
    assert "…" not in text
    assert "6.1x" in text
    assert "6013.2" not in text
    assert "1.3-10480.5" in text
    assert "2 of 3 rows are worthless" in " ".join(text.split())
    piped = io.StringIO()
    report.print_table(rows[:1], Console(file=piped, width=80))
    assert "worthless" not in piped.getvalue()


def test_compare() -> None:
    row = compare.measure(SMALL, "inference", 1, ["eager", "fastnn"], seconds=0.01, peak=peak_flops())
    assert row["best_rival"] == "eager"
    assert row["bound"] == "multiply-adds"
    parameters = sum(parameter.numel() for parameter in SMALL.stock().parameters())
    assert row["bytes_of_inference"] == 4 * (2 * SMALL.shape[0] * SMALL.shape[1] + parameters)


def test_small_recurrent_steps_are_bound_by_the_cache() -> None:
    case = next(case for case in CASES["rnn"] if case.name == "LSTM (1, 128, 64) h128")
    row = compare.measure(case, "inference", 1, ["eager", "fastnn"], seconds=0.01, peak=1e12)  # (not a busy machine's)
    assert row["bound"] == "cache"


def test_scaling() -> None:
    assert [scaling.threads_of(count) for count in (1, 2, 6)] == [[1], [1, 2], [1, 2, 4]]
    for lines in scaling.SWEEPS.values():
        assert all(len({case_of(size).name for size in sizes}) == len(sizes) for sizes, case_of in lines.values())
    row = scaling.measure("batch", "Autoencoder", 32, SMALL, "training", 1, seconds=0.01)
    assert row["microseconds"].keys() == {"eager", "fastnn"}


def test_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = next(loop for loop in epoch.LOOPS if loop.name.startswith("SkipNet"))
    row = epoch.measure(loop, 1, list(epoch.CONTENDERS), seconds=0.001)
    assert row["microseconds"].keys() == set(epoch.CONTENDERS) - {"jax scan"}
    assert min(row["microseconds"].values()) > 0
    assert f"{row['microseconds']['epoch'] / 100:.1f} us" in epoch.as_line(row)
    monkeypatch.setattr(epoch, "_by_stock", lambda model, batches: lambda: torch.zeros(loop.batches))
    with pytest.raises(AssertionError):
        epoch.measure(loop, 1, ["stock, DataLoader", "epoch"], seconds=0.001)


def test_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    task = curves.TASKS[2]
    row = curves.measure(task, seconds=0.05)
    stock, ours = row["losses"].values()
    assert len(stock) == len(ours) > 1
    assert stock[-1] < stock[0]
    assert all(len(ends) == len(stock) and ends == sorted(ends) for ends in row["seconds"].values())
    monkeypatch.setattr(curves, "_by_stock", lambda *given: lambda generator: torch.zeros(1))
    with pytest.raises(AssertionError):
        curves.measure(task, seconds=0.001)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak")
def test_memory() -> None:
    """Stock keeps at least the convolution's output, which `training_step` does not."""
    stock, step = (memory.peak_bytes("benchmarks.memory:lenet", "64,1,28,28", name) for name in memory.CONTENDERS[::2])
    assert stock is not None
    assert step is not None
    assert stock - step > 4 * 64 * 32 * 28 * 28
    assert memory.peak_bytes("zoo.images:MobileNetV2", "1,3,64,64", "fastnn.training_step") is None


def test_processes() -> None:
    """With one process, which is this one, and which is as fast beside no others."""
    results: queue.Queue[dict[tuple[str, str], list[list[tuple[float, float]]]]] = queue.Queue()
    processes.work(0, threading.Barrier(1), results, seconds=0.001, rounds=3)
    rows = results.get()
    assert len(rows) == 12
    assert all(0 < used < 2 * passed for samples in rows.values() for turn in samples for used, passed in turn)
    table = processes.as_table({("model", "step"): [[(2e-6, 2e-6), (3e-6, 4e-6)]]})
    assert table.endswith("| model | step | 2.0 | 3.0 | 1.50 | 2.00 |")


def test_latency() -> None:
    row = latency.measure("LSTM", 8, calls=50)
    for name, median in row["microseconds"].items():
        assert 0 < median <= row["slow_microseconds"][name]
    assert "frozen" in latency.as_line(row)


def test_wrong_results_are_not_measured() -> None:
    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = SMALL.stock()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 1.01 * self.model(x)

    wrong = dataclasses.replace(SMALL, fused=Wrong)
    for direction in DIRECTIONS:
        with pytest.raises(AssertionError, match="error"):
            report.measure(wrong, direction, 1, seconds=0.01)


def test_timing() -> None:
    x = torch.ones(400, 400)
    timings = interleave({"short": lambda: x.sum(), "long": lambda: [x.sum() for _ in range(20)]}, seconds=0.05)
    assert len(timings["short"].samples) >= 7
    ratios = speedups(timings["short"], timings["long"])
    assert sorted(ratios)[len(ratios) // 2] > 2
    assert Timing((1.0, 2.0, 10.0)).median == 2.0
    assert bandwidth(1) > 1e8


def test_sweep() -> None:
    draw = random.Random(0)
    cases = [sweep.random_mlp(draw) for _ in range(20)]
    assert cases[3].name == sweep_case(3).name
    (outcome,) = sweep.measure(min(cases, key=lambda case: case.flops), "training", torch.float32, seconds=0.01)
    assert outcome.speedup > 0
    lost = dataclasses.replace(outcome, speedup=0.5)
    assert sweep.summary([lost]).count(outcome.case.name) == 1
    won = dataclasses.replace(outcome, provider="fastnn channels_last", speedup=2.0)
    assert "the better format of each: 1 cases, 0 losses" in sweep.summary([lost, won])
    image = sweep.conv_case((2, 3, 9, 9), 4, 3, 2)
    assert [o.provider for o in sweep.measure(image, "inference", torch.float32, seconds=0.01)] == [
        "fastnn",
        "fastnn channels_last",
    ]


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_bounds(dims: int) -> None:
    """Of 1x1 kernels of stride 2 over lines of 16 numbers: every second row of pixels, and every second pixel of it."""
    case = sweep.conv_case((1, 16, *[32] * dims), 4, 1, 1, stride=2)
    problem = Problem(case, "inference")
    met = bounds._pixels_met(problem.stock[0], problem.input)
    lines = 16 * 32**dims // 16
    assert bounds._lines(met, 4) == lines // 2 ** (dims - 1)
    assert bounds._lines(met.movedim(0, -1), 4) == lines // 2**dims
    assert bounds.describe_bounds(problem).count(" us of ") == 3
    assert bounds.describe_bounds(Problem(sweep.mlp_case(4, [3, 2]), "inference")) == ""


def sweep_case(place: int) -> Case:
    draw = random.Random(0)
    return [sweep.random_mlp(draw) for _ in range(place + 1)][-1]


def test_overhead() -> None:
    overhead.load_bare_operators()
    rows = [overhead.linear_row(0.01), *(overhead.measure(calls, 0.01) for calls in overhead.all_calls())]
    assert all(row["microseconds"]["module with grad"] > 0 for row in rows)
