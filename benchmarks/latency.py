"""How long single steps of recurrent networks take, as a stream needs them, and how long the slowest of a thousand.

A part of ``make bench-frozen``. A step takes one sample and the state before it, and gives an answer and the state
after it. The contenders take turns call by call, so that what the machine does meanwhile meets all of them.
"""

import argparse
import importlib.util
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import torch
from torch import Tensor, nn

import fastnn
from benchmarks.stored import OUTPUT, save
from benchmarks.zoo import as_onnx, in_engine
from fastnn.testing import using_threads

STEPS = [(cell, hidden) for cell in ("GRU", "LSTM") for hidden in (32, 128)]
FEATURES, WARM_UP = 6, 200


class Step(nn.Module):
    """sample (1, 1, FEATURES), state (1, 1, hidden) -> an answer (1, 1), the next state. LSTM has a pair of states."""

    def __init__(self, cell: str, hidden: int) -> None:
        super().__init__()
        self.layer = getattr(nn, cell)(FEATURES, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 1)

    def forward(self, sample: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        is_pair = len(state) > 1
        output, after = self.layer(sample, state if is_pair else state[0])
        return self.head(output[:, -1]), *(after if is_pair else (after,))


def measure(cell: str, hidden: int, calls: int) -> dict[str, Any]:
    """The median and the time that one call of a thousand exceeds, of each contender."""
    torch.manual_seed(0)
    model = Step(cell, hidden).eval()
    inputs = (torch.randn(1, 1, FEATURES), *(torch.zeros(1, 1, hidden) for _ in range(2 if cell == "LSTM" else 1)))
    frozen = fastnn.freeze(model, inputs)
    runners: dict[str, Callable[[], Any]] = {"stock": lambda: model(*inputs), "frozen": lambda: frozen(*inputs)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about how torch exports
        onnx = as_onnx(model, inputs) if importlib.util.find_spec("onnxruntime") else None
    if onnx is not None:
        runners["onnxruntime"] = in_engine("onnxruntime", onnx, inputs, 1)
    with using_threads(1), torch.inference_mode():
        torch.testing.assert_close(runners["frozen"](), runners["stock"](), rtol=1e-4, atol=1e-5)
        times: dict[str, list[float]] = {name: [] for name in runners}
        for _ in range(WARM_UP + calls):
            for name, run in runners.items():
                begin = perf_counter_ns()
                run()
                times[name].append((perf_counter_ns() - begin) / 1e3)
    counted = {name: some[WARM_UP:] for name, some in times.items()}
    return {
        "case": f"{cell} h{hidden}, one step",
        "direction": "inference",
        "threads": 1,
        "microseconds": {name: statistics.median(some) for name, some in counted.items()},
        "slow_microseconds": {name: statistics.quantiles(some, n=1000)[-1] for name, some in counted.items()},
    }


def as_line(row: dict[str, Any]) -> str:
    cells = [
        f"{name} {median:.1f} us, 99.9 of 100 in {row['slow_microseconds'][name]:.1f} us"
        for name, median in row["microseconds"].items()
    ]
    return f"{row['case']:20} {'; '.join(cells)}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=20_000, help="calls of each contender (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of latency.json")
    given = parser.parse_args()
    rows = []
    for cell, hidden in STEPS:
        rows.append(measure(cell, hidden, given.calls))
        print(as_line(rows[-1]), flush=True)
    save(given.output, "latency", rows, 0.0)


if __name__ == "__main__":
    main()
