"""``python -m fastnn bench`` measures a user's own model under stock, torch.compile, fastnn and ONNX Runtime."""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import importlib.util
import io
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnn.explanation import explain
from fastnn.frozen import freeze
from fastnn.fusion import fuse
from fastnn.loading import load_model, random_inputs
from fastnn.training_step import training_step

_BLOCK = 0.02  # Seconds of one measurement: as many calls as fit, one at least.
_ALLOWED = 1e-2  # The largest error, as a share of the largest result, with which a contender is still timed.
_GREY, _ORANGE = "#8a8f98", "#e07b39"  # These colours are seen on white and on black.
Contender = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """What was measured of one contender. Times are in seconds for one call, memory in bytes."""

    name: str
    threads: int
    median: float = 0.0
    low: float = 0.0  # The quarter of the measurements that were fastest took at most so long.
    high: float = 0.0  # The quarter that were slowest took at least so long.
    times_stock: float = 0.0  # How many times as fast as stock in its better memory format.
    error: float = 0.0  # The largest difference from float64, as a share of the largest result, or of a step's loss.
    peak: int = 0  # By how much the process's memory grows in a few calls at most; 0 where that is not known.
    why_not: str = ""  # Why the contender did not run.


# ---- contenders -------------------------------------------------------------------------------------------------


def _channels_last(value: Any) -> Any:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if isinstance(value, Tensor):
        return value.to(memory_format=formats[value.dim()]) if value.dim() in formats else value
    for parameter in value.parameters():
        if parameter.dim() in formats:
            parameter.data = _channels_last(parameter.data)
    return value


def _onnx_runtime(model: nn.Module, inputs: Sequence[Tensor]) -> Contender:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    program = io.BytesIO()
    torch.onnx.export(model, tuple(inputs), program, dynamo=False, opset_version=17)  # type: ignore[arg-type]
    session = onnxruntime.InferenceSession(program.getvalue(), options, providers=["CPUExecutionProvider"])
    feed = {one.name: input.numpy() for one, input in zip(session.get_inputs(), inputs, strict=True)}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


Make = Callable[[Callable[[nn.Module], Any], Sequence[Tensor]], Contender]


def _common(make: Make, inputs: Sequence[Tensor]) -> dict[str, Callable[[], Contender]]:
    """The contenders of inference and of training alike. ``make(prepare, inputs)`` makes one, of what ``prepare`` makes
    of a copy of the model."""
    contenders = {"stock": lambda: make(lambda model: model, inputs)}
    if any(input.dim() in (4, 5) for input in inputs):
        contenders["stock, channels last"] = lambda: make(_channels_last, [_channels_last(input) for input in inputs])
    contenders["torch.compile"] = lambda: make(lambda model: torch.compile(model), inputs)
    contenders["fastnn.fuse"] = lambda: make(lambda model: fuse(model), inputs)
    return contenders


def inference_contenders(model: nn.Module, inputs: Sequence[Tensor]) -> dict[str, Callable[[], Contender]]:
    """For each contender's name, a function that makes the contender from a copy of the model."""

    def make(prepare: Callable[[nn.Module], Any], inputs: Sequence[Tensor]) -> Contender:
        run = prepare(copy.deepcopy(model).eval())
        return lambda: run(*inputs)

    contenders = _common(make, inputs)
    example: Any = tuple(inputs) if len(inputs) > 1 else inputs[0]
    contenders["fastnn.freeze"] = lambda: make(lambda model: freeze(model, example), inputs)
    if importlib.util.find_spec("onnxruntime") is not None:
        contenders["ONNX Runtime"] = lambda: _onnx_runtime(copy.deepcopy(model).eval(), inputs)
    return contenders


def training_contenders(model: nn.Module, inputs: Sequence[Tensor]) -> dict[str, Callable[[], Contender]]:
    """The same for whole steps: forward, mean squared error, backward and Adam. Each call returns the loss."""
    target = torch.zeros_like(_first(copy.deepcopy(model).train()(*inputs))).detach()

    def make(prepare: Callable[[nn.Module], Any], inputs: Sequence[Tensor]) -> Contender:
        own = copy.deepcopy(model).train()
        run = prepare(own)
        optimizer = torch.optim.Adam(own.parameters())

        def step() -> Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(_first(run(*inputs)), target)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    def in_one_call() -> Contender:
        if len(inputs) != 1:
            raise ValueError("a training step takes one input")
        own = copy.deepcopy(model).train()
        step = training_step(own, F.mse_loss, torch.optim.Adam(own.parameters()), strict=True)
        return lambda: step(inputs[0], target)

    return _common(make, inputs) | {"fastnn.training_step": in_one_call}


def _first(output: Any) -> Any:
    """The first tensor of a model's output."""
    while isinstance(output, (tuple, list)):
        output = output[0]
    if isinstance(output, dict):
        return _first(next(iter(output.values())))
    return output


# ---- measuring ---------------------------------------------------------------------------------------------------


def _reference(model: nn.Module, inputs: Sequence[Tensor], train: bool) -> Tensor:
    """The model's result in float64; in training, its first loss. From the same seed, dropout draws the same elements
    for every dtype."""
    exact = copy.deepcopy(model).double().train(train)
    given = [input.double() if input.is_floating_point() else input for input in inputs]
    torch.manual_seed(0)
    with torch.no_grad():
        output = _first(exact(*given)).double()
    return output.square().mean() if train else output


def _error(run: Contender, exact: Tensor) -> float:
    torch.manual_seed(0)
    result = _first(run()).double().cpu()
    return float((result - exact).abs().max() / exact.abs().max().clamp_min(1e-30)) if exact.numel() else 0.0


def _block(run: Contender, calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls


def _time(runs: dict[str, Contender], seconds: float) -> dict[str, list[float]]:
    """Times of one call, measured in turns, so that what disturbs the machine disturbs all alike."""
    calls = {}
    for name, run in runs.items():
        _block(run, 2)
        calls[name] = max(1, int(_BLOCK / max(_block(run, 1), 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds * len(runs)
    gc.disable()
    try:
        while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
            for name, run in runs.items():
                times[name].append(_block(run, calls[name]))
    finally:
        gc.enable()
    return times


def measure(
    model: nn.Module, inputs: Sequence[Tensor], train: bool, threads: int, seconds: float, leave_out: Sequence[str] = ()
) -> list[Row]:
    """One row for each contender, which is checked against float64 before it is timed. leave_out: names of contenders
    that are not wanted."""
    torch.set_num_threads(threads)
    try:
        exact = _reference(model, inputs, train)
    except (RuntimeError, TypeError, ValueError, IndexError) as reason:
        raise ValueError(f"the model does not take these inputs: {str(reason).splitlines()[0]}") from reason
    runs: dict[str, Contender] = {}
    rows: dict[str, Row] = {}
    every = (training_contenders if train else inference_contenders)(model, inputs)
    makers = {name: make for name, make in every.items() if name not in leave_out}
    for number, (name, make) in enumerate(makers.items()):
        _progress(f"{threads} thread(s): making {name} ({number + 1} of {len(makers)})")
        with torch.set_grad_enabled(train), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of exporters and compilers are not about the model
            try:
                run = make()
                error = _error(run, exact)
            except Exception as reason:  # whatever a contender raises, the others are still measured
                rows[name] = Row(name, threads, why_not=(str(reason).strip() or type(reason).__name__).splitlines()[0])
                continue
        if not error <= _ALLOWED:
            rows[name] = Row(name, threads, error=error, why_not=f"its results differ from float64 by {error:.1e}")
            continue
        runs[name], rows[name] = run, Row(name, threads, error=error)
    if "stock" not in runs:
        raise ValueError(f"the model itself does not run: {rows['stock'].why_not}")
    _progress(f"{threads} thread(s): timing {len(runs)} contenders")
    with torch.set_grad_enabled(train):
        times = _time(runs, seconds)
    _progress("")
    medians = {name: statistics.median(some) for name, some in times.items()}
    stock = min(seconds for name, seconds in medians.items() if name.startswith("stock"))
    for name, some in times.items():
        low, _, high = statistics.quantiles(some, n=4)
        median = medians[name]
        rows[name] = replace(rows[name], median=median, low=low, high=high, times_stock=stock / median)
    return list(rows.values())


def _peak_of(name: str, arguments: argparse.Namespace) -> int:
    """By how many bytes a process's memory grows in a few calls. A new process measures it."""
    command = [sys.executable, "-m", "fastnn", "bench", arguments.model, "--peak-of", name, "--threads"]
    command += [str(arguments.threads[0]), *(["--train"] if arguments.train else [])]
    for input in arguments.input:
        command += ["--input", input]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(run.stdout.split()[-1]) if run.returncode == 0 and run.stdout.split() else 0


def print_peak(model: nn.Module, inputs: Sequence[Tensor], train: bool, name: str) -> None:
    """Prints by how many bytes this process's memory grows in five calls, for :func:`_peak_of`. This works only on
    Linux, because it reads files in /proc."""
    makers = (training_contenders if train else inference_contenders)(model, inputs)
    with torch.set_grad_enabled(train), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = makers[name]()
        gc.collect()
        # Gives the memory that exporters and compilers have freed back to the system.
        getattr(ctypes.CDLL(None), "malloc_trim", lambda keep: None)(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
        before = _status("VmRSS")
        for _ in range(5):
            run()
    print(_status("VmHWM") - before)


def _status(name: str) -> int:
    """Reads a size in bytes from Linux's /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise ValueError(name)


@dataclass(frozen=True)
class LayerTime:
    """How long a layer of the stock model takes in inference, and what fastnn makes of the layer."""

    layer: str
    kind: str
    seconds: float
    share: float  # of the time of all layers
    becomes: str


def layer_times(model: nn.Module, inputs: Sequence[Tensor]) -> list[LayerTime]:
    """The layers of the stock model, the slowest first."""
    stock = copy.deepcopy(model).eval()
    begun: dict[str, float] = {}
    spent: dict[str, list[float]] = {}
    leaves = {name: module for name, module in stock.named_modules() if name and not list(module.children())}
    for name, module in leaves.items():
        module.register_forward_pre_hook(lambda *_, name=name: begun.__setitem__(name, time.perf_counter()))
        module.register_forward_hook(
            lambda *_, name=name: spent.setdefault(name, []).append(time.perf_counter() - begun[name])
        )
    with torch.no_grad():
        for _ in range(10):
            stock(*inputs)
    becomes: dict[str, str] = {}
    for row in explain(copy.deepcopy(model).eval(), *inputs).rows:
        for layer in row.layer.split(", "):
            is_fused = row.operator not in ("", "left")
            becomes[layer] = f"{row.operator} {row.forward}".strip() if is_fused else f"stays torch's: {row.why}"
    total = sum(map(statistics.median, spent.values()))
    found = [
        LayerTime(name, type(leaves[name]).__name__, one := statistics.median(some), one / total, becomes.get(name, ""))
        for name, some in spent.items()
    ]
    return sorted(found, key=lambda layer: -layer.seconds)


def advice(rows: Sequence[Row], train: bool) -> str:
    """A sentence that says which contender to use."""
    ran = [row for row in rows if row.median]
    best = min(ran, key=lambda row: row.median)
    ours = min((row for row in ran if row.name.startswith("fastnn")), key=lambda row: row.median, default=None)
    what = "trains" if train else "runs"
    if ours is None:
        return "Nothing of fastnn takes this model: leave it as it is."
    if best is ours and ours.times_stock > 1.03:
        return f"Use {ours.name}: this model {what} {ours.times_stock:.2f} times as fast as stock in its better format."
    if ours.times_stock > 1.03:
        return f"{best.name} is fastest here; {ours.name} is {ours.times_stock:.2f} times as fast as stock."
    return f"fastnn does not help this model here: {ours.name} is {ours.times_stock:.2f} times as fast as stock."


# ---- the command ---------------------------------------------------------------------------------------------------


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _seconds(value: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if value >= factor:
            return f"{value / factor:.2f} {unit}"
    return f"{value / 1e-6:.1f} us"


def as_table(rows: Sequence[Row]) -> Iterator[str]:
    """The rows as lines of text."""
    names = f"{'threads':>7}  {'contender':22} {'median':>10}  {'middle half':>23}  {'ratio':>7}  {'error':>8}"
    yield "The ratio says how many times as fast as stock in its better memory format."
    yield f"{names}  {'peak':>9}"
    for row in rows:
        if row.why_not:
            yield f"{row.threads:7}  {row.name:22} did not run: {row.why_not}"
            continue
        spread = f"{_seconds(row.low)} to {_seconds(row.high)}"
        peak = f"{row.peak / 1e6:.1f} MB" if row.peak else ""
        yield (
            f"{row.threads:7}  {row.name:22} {_seconds(row.median):>10}  {spread:>23}  {row.times_stock:7.2f}  "
            f"{row.error:8.1e}  {peak:>9}"
        )


def draw(rows: Sequence[Row], file: str) -> None:
    """Draws a bar for each contender: how many times as fast as stock it is."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ran = [row for row in rows if row.median]
    figure, axes = plt.subplots(figsize=(7, 0.6 + 0.38 * len(ran)), layout="constrained")
    colors = [_ORANGE if row.name.startswith("fastnn") else _GREY for row in ran]
    labels = [f"{row.name}, {row.threads} thread{'s' * (row.threads > 1)}" for row in ran]
    axes.barh(labels, [row.times_stock for row in ran], color=colors)
    for place, row in enumerate(ran):
        axes.text(row.times_stock, place, f" {row.times_stock:.2f}", va="center", color=_GREY)
    axes.axvline(1, color=_GREY, linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as stock in its better memory format", color=_GREY)
    axes.tick_params(colors=_GREY)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.margins(x=0.12)
    figure.savefig(file, transparent=True, dpi=160)


def run(arguments: argparse.Namespace) -> None:
    """Runs ``python -m fastnn bench`` with these arguments."""
    model, inputs = load_model(arguments.model), random_inputs(arguments.input)
    if arguments.peak_of:
        torch.set_num_threads(arguments.threads[0])
        print_peak(model, inputs, arguments.train, arguments.peak_of)
        return
    rows: list[Row] = []
    leave_out = ["torch.compile"] if arguments.no_compile else []
    for threads in arguments.threads:
        rows += measure(model, inputs, arguments.train, threads, arguments.seconds, leave_out)
    if not arguments.no_memory:
        peaks = {}
        for name in dict.fromkeys(row.name for row in rows if row.median):
            _progress(f"memory of {name}")
            peaks[name] = _peak_of(name, arguments)
        rows = [replace(row, peak=peaks.get(row.name, 0)) for row in rows]
        _progress("")
    layers = layer_times(model, inputs)
    print("\n".join(as_table(rows)))
    print("\nWhere stock's time goes in inference, and what fastnn makes of it:")
    for layer in layers[:8]:
        becomes = layer.becomes or "stays torch's"
        print(f"  {layer.share:5.0%}  {_seconds(layer.seconds):>9}  {layer.kind} {layer.layer}: {becomes}")
    of_threads = [row for row in rows if row.threads == arguments.threads[0]]
    print(f"\n{advice(of_threads, arguments.train)}")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"rows": [asdict(r) for r in rows], "layers": [asdict(one) for one in layers]}, file, indent=1)
    if arguments.plot:
        draw(rows, arguments.plot)
