"""The program of ``make bench-overhead``: what a call of each op costs on a nearly empty input.

Beside the module, the function and the raw operator stands a bare operator: the same arguments and results, and nothing
done (``bare_operators.cpp``, compiled on the spot). ``F.linear`` on one number is the yardstick.
"""

import argparse
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn import functional as F

import fastnn
from benchmarks.stored import OUTPUT, save
from benchmarks.timing import interleave
from fastnn.functional import conv_relu_max_pool2d, mlp
from fastnn.ops.mlp import join_activations
from fastnn.ops.rnn import rnn, rnn_cell
from fastnn.testing import using_threads

# How far, in microseconds, a call may be above the one that it comes to.
TARGETS = {
    "raw operator - bare": 1.0,
    "function - raw operator": 1.5,
    "module - function": 1.5,
    "function with grad - without": 4.0,
    "module with grad - without": 4.0,
}


@dataclass(frozen=True)
class Calls:
    """One op, called in every way with the same meaning."""

    name: str
    bare: Callable[[], Any]
    raw: Callable[[], Any]
    function: Callable[[], Any]
    module: Callable[[], Any]


def load_bare_operators() -> None:
    source = Path(__file__).with_name("bare_operators.cpp")
    root = Path(torch.__file__).parent
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "bare_operators.so"
        where = ["-isystem", root / "include", source, "-o", library, f"-L{root / 'lib'}", "-ltorch_cpu"]
        subprocess.run([*shlex.split(os.environ.get("CXX", "g++")), *flags, *where], check=True)
        torch.ops.load_library(str(library))


def mlp_calls(layers: int) -> Calls:
    module = fastnn.nn.MLP([1] * (layers + 1))
    linears = [child for child in module if isinstance(child, torch.nn.Linear)]
    weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
    x, activations = torch.ones(1, 1), join_activations("relu", layers)
    parameters = [*weights, *biases]
    bare, raw = operators("mlp")
    return Calls(
        f"mlp, {layers} layer" + ("s" if layers > 1 else ""),
        lambda: bare(x, parameters, activations),
        lambda: raw(x, parameters, activations),
        lambda: mlp(x, weights, biases),
        lambda: module(x),
    )


def conv_calls() -> Calls:
    module = fastnn.nn.ConvReLUMaxPool2d(1, 1, 1)
    x, weight, bias = torch.ones(1, 1, 2, 2), module.weight, module.bias
    geometry = captured("conv_relu_max_pool", lambda: module(x))[3]
    bare, raw = operators("conv_relu_max_pool")
    return Calls(
        "conv_relu_max_pool",
        lambda: bare(x, weight, bias, geometry),
        lambda: raw(x, weight, bias, geometry),
        lambda: conv_relu_max_pool2d(x, weight, bias),
        lambda: module(x),
    )


def rnn_calls(cell: str) -> Calls:
    module = getattr(fastnn.nn, cell)(1, 1, batch_first=True)
    x, state = torch.ones(1, 1, 1), [torch.zeros(1, 1, 1)] * (2 if cell == "LSTM" else 1)
    weights, mode, given = module._flat_weights, module.mode, tuple(state) if cell == "LSTM" else state[0]
    arguments = captured("rnn", lambda: module(x, given))
    bare, raw = operators("rnn")
    return Calls(
        cell,
        lambda: bare(*arguments),
        lambda: raw(*arguments),
        lambda: rnn(x, None, state, weights, mode, batch_first=True),
        lambda: module(x, given),
    )


def cell_calls(cell: str) -> Calls:
    module = getattr(fastnn.nn, f"{cell}Cell")(1, 1)
    x, state = torch.ones(1, 1), [torch.zeros(1, 1)] * (2 if cell == "LSTM" else 1)
    weights, given = list(module.parameters()), tuple(state) if cell == "LSTM" else state[0]
    mode = "RNN_TANH" if cell == "RNN" else cell
    arguments = captured("rnn_cell", lambda: module(x, given))
    bare, raw = operators("rnn_cell")
    return Calls(
        f"{cell}Cell",
        lambda: bare(*arguments),
        lambda: raw(*arguments),
        lambda: rnn_cell(x, mode, state[0], state[1] if len(state) > 1 else None, *weights),
        lambda: module(x, given),
    )


def operators(op: str) -> tuple[Any, Any]:
    """The bare operator and the raw one."""
    bare, raw = (getattr(library, op).default for library in (torch.ops.fastnn_bare, torch.ops.fastnn))
    schemas = [str(each._schema).partition("::")[2] for each in (bare, raw)]
    assert schemas[0] == schemas[1], f"bare_operators.cpp must follow fastnn::{schemas[1]}, has {schemas[0]}"
    return bare, raw


def captured(op: str, call: Callable[[], Any]) -> tuple[Any, ...]:
    """The arguments with which ``call`` calls the raw operator: they are no part of the public interface."""

    class Capture(torch.utils._python_dispatch.TorchDispatchMode):
        arguments: tuple[Any, ...] = ()

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is getattr(torch.ops.fastnn, op).default:
                self.arguments = args
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Capture() as capture:
        call()
    assert capture.arguments, f"fastnn::{op} was not called"
    return capture.arguments


def all_calls() -> list[Calls]:
    cells = ("RNN", "GRU", "LSTM")
    return [
        conv_calls(),
        *(rnn_calls(cell) for cell in cells),
        *(cell_calls(cell) for cell in cells),
        mlp_calls(1),
        mlp_calls(4),
    ]


def measure(calls: Calls, seconds: float) -> dict[str, Any]:
    """Microseconds a call, medians, and what each costs above the one below it."""
    with torch.no_grad():
        quiet = interleave(
            {
                "bare": calls.bare,
                "raw operator": calls.raw,
                "function": calls.function,
                "module": calls.module,
            },
            seconds,
        )
    recorded = interleave({"function with grad": calls.function, "module with grad": calls.module}, seconds)
    times = {name: timing.median * 1e6 for name, timing in (quiet | recorded).items()}
    above = {
        "raw operator - bare": times["raw operator"] - times["bare"],
        "function - raw operator": times["function"] - times["raw operator"],
        "module - function": times["module"] - times["function"],
        "function with grad - without": times["function with grad"] - times["function"],
        "module with grad - without": times["module with grad"] - times["module"],
    }
    return {"case": calls.name, "threads": 1, "microseconds": times, "above": above}


def linear_row(seconds: float) -> dict[str, Any]:
    module = torch.nn.Linear(1, 1)
    x, weight, bias = torch.ones(1, 1), module.weight, module.bias
    runners = {"function": lambda: F.linear(x, weight, bias), "module": lambda: module(x)}
    with torch.no_grad():
        times = {name: timing.median * 1e6 for name, timing in interleave(runners, seconds).items()}
    recorded = interleave({f"{name} with grad": run for name, run in runners.items()}, seconds)
    times |= {name: timing.median * 1e6 for name, timing in recorded.items()}
    return {"case": "F.linear and nn.Linear", "threads": 1, "microseconds": times, "above": {}}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1, help="measuring time of each group (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of overhead.json")
    arguments = parser.parse_args()
    console = Console()
    load_bare_operators()
    with using_threads(1):
        rows = [linear_row(arguments.seconds)]
        for calls in all_calls():
            rows.append(measure(calls, arguments.seconds))
            times = ", ".join(f"{name} {us:.1f}" for name, us in rows[-1]["microseconds"].items())
            console.print(f"[bold]{calls.name}[/bold]: {times}", highlight=False, soft_wrap=True)
    save(arguments.output, "overhead", rows, arguments.seconds, targets=TARGETS)


if __name__ == "__main__":
    main()
