"""Convolution layers of published networks against stock PyTorch: where is fastnn slower?

``make bench-layers``. The images are contiguous, as a model has them unless its owner thought of memory formats; stock
may have them in either format, and the better one counts. With ``--isa avx2`` both are limited to AVX2.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastnn
from benchmarks.cases import Case, conv_case
from benchmarks.compare import times
from benchmarks.problem import DIRECTIONS, Problem
from benchmarks.stored import OUTPUT, save
from benchmarks.sweep import TOLERATED
from fastnn.testing import using_instruction_set

LAYERS = Path(__file__).parent / "published_layers.json"
_LOOK_AGAIN = 4  # times as long, where the first look shows a loss
# What limits the libraries that stock calls: they read it once, when they are loaded.
_LIMITS = {"avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}}


def layer_cases() -> Iterator[tuple[str, Case]]:
    """The name and the case of each layer of the file."""
    for layer in json.loads(LAYERS.read_text()):
        case = conv_case(
            (layer["batch"], layer["channels"], *layer["size"]),
            layer["out"],
            layer["kernel"],
            layer["pool"],
            stride=layer["stride"],
            padding=layer["padding"],
            groups=layer["groups"],
            pool_stride=layer["pool_stride"],
            pool_padding=layer["pool_padding"],
            ceil_mode=layer["ceil"],
        )
        yield layer["name"], case


def measure(name: str, case: Case, direction: str, threads: int, seconds: float) -> dict[str, Any]:
    """Microseconds of fastnn and of stock's better format, and how many times faster the first is."""
    problem = Problem(case, direction)
    for longer in (1, _LOOK_AGAIN):
        timings = times(problem, threads, ["eager", "channels_last", "fastnn"], longer * seconds, rounds=5 * longer)
        microseconds = {provider: timing.median * 1e6 for provider, timing in timings.items()}
        speedup = min(time for provider, time in microseconds.items() if provider != "fastnn") / microseconds["fastnn"]
        if speedup >= TOLERATED:
            break
    call = fastnn.explain(problem.fused, problem.input).calls[0]
    return {
        "case": name,
        "layer": case.name,
        "direction": direction,
        "threads": threads,
        "algorithm": call.forward if direction == "inference" else f"{call.forward}, {call.backward}",
        "microseconds": microseconds,
        "speedup": speedup,
    }


def as_text(rows: list[dict[str, Any]]) -> str:
    lines = []
    for direction in DIRECTIONS:
        for threads in sorted({row["threads"] for row in rows}):
            speedups = [r["speedup"] for r in rows if (r["direction"], r["threads"]) == (direction, threads)]
            if speedups:
                losses = sum(speedup < TOLERATED for speedup in speedups)
                mean = statistics.geometric_mean(speedups)
                lines.append(
                    f"{direction}, {threads} thread(s): {len(speedups)} layers, {losses} below {TOLERATED}; "
                    f"stock / fastnn: least {min(speedups):.2f}, geometric mean {mean:.2f}"
                )
    lines += [as_line(row) for row in sorted(rows, key=lambda row: row["speedup"])]
    return "\n".join(lines) + "\n"


def as_line(row: dict[str, Any]) -> str:
    kind, time = f"{row['direction']} {row['threads']}", row["microseconds"]["fastnn"]
    return f"{row['speedup']:6.2f} {time:11.1f} us  {kind:12} {row['algorithm']!s:20} {row['case']}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layers", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="the layers whose name contains this text")
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--isa", choices=list(_LIMITS), help="limit both to this instruction set")
    parser.add_argument("--seconds", type=float, default=0.3, help="measuring time of a row (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of layers.json")
    arguments = parser.parse_args()
    limits = _LIMITS.get(arguments.isa, {})
    if any(os.environ.get(name) != value for name, value in limits.items()):
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.layers", *sys.argv[1:]], {**os.environ, **limits})
    rows = []
    with using_instruction_set(arguments.isa or fastnn.backend_info().instruction_set):
        for name, case in layer_cases():
            if arguments.only not in name:
                continue
            for direction in arguments.directions:
                for threads in arguments.threads:
                    rows.append(measure(name, case, direction, threads, arguments.seconds))
                    print(as_line(rows[-1]), flush=True)
        print(f"\n{as_text(rows)}")
        if not arguments.only:
            name = f"layers_{arguments.isa}" if arguments.isa else "layers"
            save(arguments.output, name, rows, arguments.seconds)


if __name__ == "__main__":
    main()
