"""Who is measured: stock PyTorch in its fastest forms, the inference engines that are installed, and fastnn."""

import contextlib
import copy
import importlib.util
import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.problem import Problem
from fastnn import freeze

Runner = Callable[[], Any]

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by rank


def eager(problem: Problem) -> Runner | None:
    return problem.runner(problem.stock, problem.input)


def channels_last(problem: Problem) -> Runner | None:
    return in_channels_last(problem, problem.stock)


def compiled(problem: Problem) -> Runner | None:
    return problem.runner(torch.compile(problem.stock), problem.input)


def compiled_frozen(problem: Problem) -> Runner | None:
    return _frozen(problem, problem.stock, problem.input)


def compiled_frozen_channels_last(problem: Problem) -> Runner | None:
    if len(problem.case.shape) not in _CHANNELS_LAST:
        return None
    model = copy.deepcopy(problem.stock).to(memory_format=_CHANNELS_LAST[len(problem.case.shape)])
    return _frozen(problem, model, _channels_last_tensor(problem.input))


def onnx_runtime(problem: Problem) -> Runner | None:
    import onnxruntime

    if not _fits_engines(problem) or problem.input.dtype is not torch.float32:
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(_as_onnx(problem), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: problem.input.numpy()}
    return lambda: session.run(None, feed)


def openvino(problem: Problem) -> Runner | None:
    import openvino

    if not _fits_engines(problem):
        return None
    core = openvino.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[problem.input.dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    model = core.read_model(_as_onnx(problem))
    model.reshape(list(problem.case.shape))
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    feed = {0: problem.input.float().numpy()}
    return lambda: request.infer(feed, share_inputs=True, share_outputs=True)


def fastnn(problem: Problem) -> Runner | None:
    return problem.runner(problem.fused, problem.input)


def fastnn_frozen(problem: Problem) -> Runner | None:
    if not _fits_engines(problem):
        return None
    try:
        frozen = freeze(problem.fused, problem.input)
    except ValueError:
        return None  # a layer with two results, or a cell
    return lambda: frozen(problem.input)


PROVIDERS: dict[str, Callable[[Problem], Runner | None]] = {
    "eager": eager,
    "channels_last": channels_last,
    "compile": compiled,
    "compile frozen": compiled_frozen,
    "compile frozen channels_last": compiled_frozen_channels_last,
    "fastnn": fastnn,
    "fastnn frozen": fastnn_frozen,
}
for _module, _provider in (("onnxruntime", onnx_runtime), ("openvino", openvino)):
    if importlib.util.find_spec(_module) and importlib.util.find_spec("onnx"):
        PROVIDERS[_provider.__name__] = _provider


def prepare(provider: str, problem: Problem) -> Runner | None:
    """The provider's runner, warmed up and checked; None where it doesn't serve the case."""
    torch.compiler.reset()
    with warnings.catch_warnings(), problem.context():
        warnings.simplefilter("ignore")  # about other people's software
        runner = PROVIDERS[provider](problem)
        if runner is None:
            return None
        for _ in range(2):
            result = runner()
        _check(provider, problem, result)
    return runner


def _check(provider: str, problem: Problem, result: Any) -> None:
    """A rival may round as it likes, but must have computed the same thing."""
    if provider == "fastnn":
        return problem.check_fused()
    if provider == "fastnn frozen":
        return problem.check(lambda: result)
    ours = problem.results(lambda: _as_tensors(result))
    stock = problem.results(problem.runner(problem.stock, problem.input))
    for a, b in zip(ours, stock, strict=True):
        close = 1e-3 if b.dtype is torch.float32 else 2 * torch.finfo(b.dtype).eps
        torch.testing.assert_close(
            a.to(b.dtype), b, rtol=1e-2, atol=close * float(b.abs().max()), msg=lambda m: f"{provider}: {m}"
        )


def _as_tensors(result: Any) -> Any:
    if isinstance(result, Tensor) or not hasattr(result, "__getitem__"):
        return result
    first = result[0]
    return [torch.from_numpy(np.array(first))] if isinstance(first, np.ndarray) else result


def in_channels_last(problem: Problem, model: nn.Module) -> Runner | None:
    """The problem's runner for a copy of the model with everything in channels-last format; None in one dimension."""
    rank = len(problem.case.shape)
    if rank not in _CHANNELS_LAST:
        return None
    model = copy.deepcopy(model).to(memory_format=_CHANNELS_LAST[rank])
    return problem.runner(model, _channels_last_tensor(problem.input), _channels_last_tensor(problem.grad_output))


def _channels_last_tensor(tensor: Tensor) -> Tensor:
    return tensor.to(memory_format=_CHANNELS_LAST.get(tensor.dim(), torch.preserve_format))


def _frozen(problem: Problem, model: nn.Module, input: Any) -> Runner | None:
    if problem.direction != "inference":
        return None
    import torch._inductor.config

    with torch._inductor.config.patch(freezing=True):
        run = torch.compile(model.eval())
        run(input)
    return lambda: run(input)


def _fits_engines(problem: Problem) -> bool:
    return problem.direction == "inference" and problem.case.lengths is None


def _as_onnx(problem: Problem) -> bytes:
    """The stock model with its weights as constants."""
    file = io.BytesIO()
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(copy.deepcopy(problem.stock).float(), (problem.input.float(),), file, dynamo=False)
    return file.getvalue()
