"""The benchmark programs work, and give no time for a wrong result."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks import compare, lengths, report
from benchmarks.cases import CASES, first_tensor
from benchmarks.problem import DIRECTIONS, Problem
from benchmarks.timing import Timing, bandwidth, environment, interleave, peak_flops, speedups

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
    rows = [report.measure(SMALL, direction, 1, seconds=0.01) for direction in DIRECTIONS]
    assert all(row["stock_us"] > 0 and row["fused_us"] > 0 for row in rows)
    assert report.as_table(rows).row_count == 2
    json.dumps({"environment": environment(), "rows": rows})
    report.plot(rows, environment(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_compare() -> None:
    row = compare.measure(SMALL, "inference", 1, ["eager", "fastnn"], seconds=0.01, peak=peak_flops())
    assert row["best_rival"] == "eager"
    assert row["bound"] == "multiply-adds"
    twice = row | {"threads": 2, "microseconds": {name: time / 2 for name, time in row["microseconds"].items()}}
    assert compare.thread_speedup(row, [row, twice]) is None
    assert compare.thread_speedup(twice, [row, twice]) == 2
    text = compare.as_markdown([row, twice], environment() | {"peak": {1: 1e9}})
    assert SMALL.name in text


def test_small_recurrent_steps_are_bound_by_the_cache() -> None:
    case = next(case for case in CASES["rnn"] if case.name == "LSTM (1, 128, 64) h128")
    row = compare.measure(case, "inference", 1, ["eager", "fastnn"], seconds=0.01, peak=peak_flops())
    assert row["bound"] == "cache"


def test_lengths() -> None:
    row = lengths.measure("RNN", "training", (3, 30), seconds=0.01)
    assert all(row["microseconds_a_step"][length] > 0 for length in (3, 30))


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
