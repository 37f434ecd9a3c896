"""How time grows with batch, length, channels, hidden size and threads: stock's better memory format, and fastnn.

``make bench-scaling``. A sweep has lines, and a line a case for each size.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.cases import MODELS, Case, autoencoder_case, conv2dnet_case, conv_case, rnn_case, rnn_model_case
from benchmarks.compare import times
from benchmarks.problem import DIRECTIONS, Problem
from benchmarks.stored import OUTPUT, save

_BATCHES = (1, 4, 16, 64, 256, 1024)

# By sweep and line: the sizes, and the case of a size.
SWEEPS: dict[str, dict[str, tuple[tuple[int, ...], Callable[[int], Case]]]] = {
    "batch": {
        "Conv2DNet": (_BATCHES, conv2dnet_case),
        "RNN": (_BATCHES, lambda batch: rnn_model_case((batch, 20, 10), 32, 2, 5)),
        "Autoencoder": (_BATCHES, lambda batch: autoencoder_case(batch, 784, 128, 32)),
    },
    "length": {
        "LSTM (4, length, 32) h64": ((10, 30, 100, 300, 1000, 3000), lambda n: rnn_case("LSTM", (4, n, 32), 64))
    },
    "channels": {
        "3x3 convolution (8, channels, 28, 28)": (
            (1, 2, 4, 8, 16, 32, 64, 128, 256),
            lambda n: conv_case((8, n, 28, 28), n, 3, 2, padding=1),
        )
    },
    "hidden size": {
        "LSTM (8, 50, 64)": ((8, 16, 32, 64, 128, 256, 512, 1024), lambda n: rnn_case("LSTM", (8, 50, 64), n))
    },
}


def threads_of(processors: int) -> list[int]:
    """1, 2, 4 and so on, as many as there are processors."""
    return [1 << power for power in range(processors.bit_length())]


def measure(
    sweep: str, line: str, size: int, case: Case, direction: str, threads: int, seconds: float
) -> dict[str, Any]:
    timings = times(Problem(case, direction), threads, ["eager", "channels_last", "fastnn"], seconds, rounds=5)
    return {
        "sweep": sweep,
        "line": line,
        "size": size,
        "case": case.name,
        "direction": direction,
        "threads": threads,
        "microseconds": {name: timing.median * 1e6 for name, timing in timings.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.5, help="measuring time of a row (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of scaling.json")
    arguments = parser.parse_args()
    jobs = [
        (sweep, line, size, case_of(size), 1)
        for sweep, lines in SWEEPS.items()
        for line, (sizes, case_of) in lines.items()
        for size in sizes
    ]
    counts = threads_of(os.cpu_count() or 1)
    jobs += [("threads", case.name, threads, case, threads) for case in MODELS[3:] for threads in counts]
    rows = []
    for sweep, line, size, case, threads in jobs:
        for direction in DIRECTIONS:
            rows.append(measure(sweep, line, size, case, direction, threads, arguments.seconds))
            found = ", ".join(f"{name} {time:.1f} us" for name, time in rows[-1]["microseconds"].items())
            print(f"{sweep} {size}, {line}, {direction}: {found}", flush=True)
    save(arguments.output, "scaling", rows, arguments.seconds)


if __name__ == "__main__":
    main()
