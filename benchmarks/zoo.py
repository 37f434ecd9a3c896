"""The real models of tests/zoo: stock in both memory formats, compiled, fused, frozen, in ONNX Runtime and OpenVINO.

``make bench-zoo``. Whole models as their authors would write them, taken as they are; ``fuse`` has the example inputs
with which it may try each layer. A training step is forward and backward.
"""

import argparse
import contextlib
import copy
import importlib.util
import io
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fastnn
from benchmarks.problem import DIRECTIONS
from benchmarks.stored import OUTPUT, save
from benchmarks.sweep import TOLERATED
from benchmarks.timing import interleave
from fastnn.testing import using_threads

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from zoo import ZOO

_LOOK_AGAIN = 4  # times as long, where the first look shows a loss
CONTENDERS = ("stock", "channels_last", "compile", "compile frozen", "fused", "frozen", "onnxruntime", "openvino")
ENGINES = ("onnxruntime", "openvino")


def _tensors(output: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]


def _runner(model: Callable[..., Any], inputs: tuple[Any, ...], parameters: list[Tensor]) -> Callable[[], Any]:
    """A call: of inference without parameters, else of a training step."""
    if not parameters:
        return lambda: model(*inputs)

    def step() -> Any:
        outputs = _tensors(model(*inputs))
        return torch.autograd.grad(outputs, parameters, [torch.ones_like(o) for o in outputs], allow_unused=True)

    return step


def as_onnx(model: nn.Module, inputs: tuple[Any, ...]) -> bytes | None:
    file = io.BytesIO()
    try:
        torch.onnx.export(copy.deepcopy(model), inputs, file, dynamo=False)
    except Exception:  # of whatever kind: not every model has a counterpart in ONNX
        return None
    return file.getvalue()


def in_engine(engine: str, onnx: bytes, inputs: tuple[Any, ...], threads: int) -> Callable[[], Any]:
    if engine == "openvino":
        import openvino

        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        core = openvino.Core()
        request = core.compile_model(core.read_model(onnx), "CPU", settings).create_infer_request()
        values = {i: value.numpy() for i, value in enumerate(inputs)}
        return lambda: request.infer(values, share_inputs=True, share_outputs=True)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    feed = {node.name: value.numpy() for node, value in zip(session.get_inputs(), inputs, strict=False)}
    return lambda: session.run(None, feed)


def _in_channels_last(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[nn.Module, tuple[Any, ...]] | None:
    """A copy of the model and of its images in the other memory format; None where there are no images."""
    if not any(isinstance(x, Tensor) and x.dim() == 4 for x in inputs):
        return None
    formatted = tuple(
        x.to(memory_format=torch.channels_last) if isinstance(x, Tensor) and x.dim() == 4 else x for x in inputs
    )
    return copy.deepcopy(model).to(memory_format=torch.channels_last), formatted


def _compiled_frozen(model: nn.Module, inputs: tuple[Any, ...]) -> Callable[..., Any]:
    import torch._inductor.config

    torch.compiler.reset()
    with torch._inductor.config.patch(freezing=True):
        run = torch.compile(copy.deepcopy(model))
        run(*inputs)
    return run


def runners_of(name: str, direction: str, threads: int, contenders: list[str]) -> dict[str, Callable[[], Any]]:
    torch.manual_seed(0)
    entry = ZOO[name]
    model, inputs = entry.real(), entry.real_inputs()
    training = direction == "training"
    model.train(training)
    fused = fastnn.fuse(copy.deepcopy(model), inputs)
    runners: dict[str, Callable[[], Any]] = {}

    def add(contender: str, run: nn.Module, given: tuple[Any, ...] = inputs) -> None:
        runners[contender] = _runner(run, given, list(run.parameters()) if training else [])
        runners[contender]()

    add("stock", model)
    add("fused", fused)
    formatted = _in_channels_last(model, inputs)
    if "channels_last" in contenders and formatted:
        add("channels_last", *formatted)
    if "compile" in contenders:
        torch.compiler.reset()
        add("compile", torch.compile(copy.deepcopy(model)))
    if not training:
        if "compile frozen" in contenders:
            frozen = _compiled_frozen(model, inputs)
            runners["compile frozen"] = lambda: frozen(*inputs)
        if "frozen" in contenders:
            with contextlib.suppress(ValueError):  # what freeze cannot take, it says in tests
                add("frozen", fastnn.freeze(model, inputs))
        engines = [name for name in ENGINES if name in contenders and importlib.util.find_spec(name)]
        onnx = as_onnx(model, inputs) if engines else None
        runners |= {name: in_engine(name, onnx, inputs, threads) for name in engines if onnx}
        expected = _tensors(model(*inputs))
        for contender, run in runners.items():
            result = run()
            if contender not in ENGINES:
                for a, b in zip(_tensors(result), expected, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max() + 1e-6))
    return runners


def measure(name: str, direction: str, threads: int, seconds: float, contenders: list[str]) -> dict[str, Any]:
    context = torch.no_grad() if direction == "inference" else torch.enable_grad()
    with using_threads(threads), context, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about other people's software
        runners = runners_of(name, direction, threads, contenders)
        for longer in (1, _LOOK_AGAIN):
            timings = interleave(runners, longer * seconds, rounds=5 * longer)
            medians = {contender: timing.median * 1e6 for contender, timing in timings.items()}
            if medians["stock"] / medians["fused"] >= TOLERATED:
                break
    return {"case": name, "direction": direction, "threads": threads, "microseconds": medians}


def as_line(row: dict[str, Any]) -> str:
    times = row["microseconds"]
    cells = [f"{name} {times['stock'] / times[name]:.2f}x" for name in CONTENDERS[1:] if name in times]
    stock = f"stock {times['stock'] / 1e3:.3f} ms"
    return f"{row['case']:21} {row['direction']:9} {row['threads']} thread(s)  {', '.join([stock, *cells])}"


def as_text(rows: list[dict[str, Any]]) -> str:
    lines = []
    for direction in DIRECTIONS:
        for threads in sorted({row["threads"] for row in rows}):
            some = [r["microseconds"] for r in rows if (r["direction"], r["threads"]) == (direction, threads)]
            for contender in CONTENDERS[1:]:
                ratios = [times["stock"] / times[contender] for times in some if contender in times]
                if ratios:
                    mean = statistics.geometric_mean(ratios)
                    lines.append(
                        f"{direction}, {threads} thread(s), {contender}: {len(ratios)} models, least "
                        f"{min(ratios):.2f}, geometric mean {mean:.2f}"
                    )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="the models whose name contains this text")
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--seconds", type=float, default=0.5, help="measuring time of a row (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of zoo.json")
    arguments = parser.parse_args()
    rows = []
    for name in ZOO:
        if arguments.only not in name:
            continue
        for direction in arguments.directions:
            for threads in arguments.threads:
                rows.append(measure(name, direction, threads, arguments.seconds, arguments.contenders))
                print(as_line(rows[-1]), flush=True)
    print(f"\n{as_text(rows)}")
    if not arguments.only:
        save(arguments.output, "zoo", rows, arguments.seconds)


if __name__ == "__main__":
    main()
