"""What training takes besides time: the memory by which a process grows in five steps with Adam, at most.

``make bench-memory``. Each contender's memory is measured in a process of its own, by ``python -m fastnn bench``.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.stored import OUTPUT, ROOT, save
from benchmarks.timing import interleave
from fastnn.bench import training_contenders
from fastnn.loading import load_model, random_inputs
from fastnn.reference import models
from fastnn.testing import using_threads

CONTENDERS = ("stock", "fastnn.fuse", "fastnn.training_step")


def lenet() -> nn.Module:
    """As tutorials have it: LeNet's layers, with 32 and 64 channels."""
    features = [nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 5), nn.ReLU()]
    head = [nn.Flatten(), nn.Linear(1600, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)]
    return nn.Sequential(*features, nn.MaxPool2d(2), *head)


def lstm() -> nn.Module:
    return models.RNN(64, 128, 2, 10, cell="LSTM")


MODELS = {
    "LeNet-like, 32 and 64 channels": ("benchmarks.memory:lenet", "256,1,28,28"),
    "U-Net": ("zoo.images:UNet", "2,1,128,128"),
    "LSTM of two layers, h128": ("benchmarks.memory:lstm", "32,128,64"),
}


def peak_bytes(model: str, input: str, contender: str) -> int | None:
    """None where the contender does not take the model."""
    command = [sys.executable, "-m", "fastnn", "bench", model, "--input", input, "--train", "--threads", "1"]
    folders = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    run = subprocess.run(
        [*command, "--peak-of", contender],
        env={**os.environ, "PYTHONPATH": folders},
        capture_output=True,
        text=True,
        check=False,
    )
    return int(run.stdout.split()[-1]) if run.returncode == 0 else None


def measure(name: str, seconds: float) -> dict[str, Any]:
    """Bytes, and microseconds of a step, of each contender that takes the model."""
    factory, input = MODELS[name]
    peaks = {contender: peak_bytes(factory, input, contender) for contender in CONTENDERS}
    makers = training_contenders(load_model(factory), random_inputs([input]))
    with using_threads(1):
        timings = interleave({one: makers[one]() for one, peak in peaks.items() if peak is not None}, seconds, rounds=5)
    return {
        "case": f"{name} ({input.replace(',', ', ')})",
        "direction": "step",
        "threads": 1,
        "microseconds": {contender: timing.median * 1e6 for contender, timing in timings.items()},
        "bytes": {contender: peak for contender, peak in peaks.items() if peak is not None},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2, help="measuring time of a model (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of memory.json")
    arguments = parser.parse_args()
    sys.path.append(str(ROOT / "tests"))
    rows = []
    for name in MODELS:
        rows.append(measure(name, arguments.seconds))
        peaks = ", ".join(f"{contender} {peak / 1e6:.1f} MB" for contender, peak in rows[-1]["bytes"].items())
        print(f"{rows[-1]['case']}: {peaks}", flush=True)
    save(arguments.output, "memory", rows, arguments.seconds)


if __name__ == "__main__":
    main()
