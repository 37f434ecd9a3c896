"""The launches that the GPU tools look at: the benchmark shapes, one a shape class of the kernels' tables, and the
shapes on which a test forces kernels that no rule chooses there.

Every case calls an operator's launchers, forward and backward, as a user's call does, on tensors of a given device:
"meta" is enough to see which kernels it would launch with which arguments.
"""

import contextlib
import functools
import importlib.util
import unittest.mock
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnn.activations import join
from fastnn.kernels.conv import launch as conv_relu_max_pool
from fastnn.kernels.conv import plan as _conv_plan
from fastnn.kernels.conv.geometry import Geometry
from fastnn.kernels.mlp import launch as mlp
from fastnn.kernels.mlp import plan as _mlp_plan
from fastnn.kernels.rnn import launch as rnn
from fastnn.kernels.rnn import plan as _rnn_config
from fastnn.ops.mlp import join_parameters
from fastnn.recurrent_modes import NUMBER_OF

FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16


class Calls(NamedTuple):
    """Of an operator on a case's tensors: ``forward`` alone, as in inference; ``training`` is forward and backward."""

    forward: Callable[[], object]
    training: Callable[[], object]


class Case(NamedTuple):
    op: str
    shape: str
    dtype: torch.dtype
    make: Callable[[torch.device], Calls]
    allow_tf32: bool = False
    # What the tables below say of it, for the roofline; None of a shape that only a test has.
    sizes: tuple[Any, ...] | None = None
    forced: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext

    @property
    def is_forced(self) -> bool:
        return self.forced is not contextlib.nullcontext


DIRECTIONS = Calls._fields


@contextlib.contextmanager
def as_asked(case: Case) -> Iterator[None]:
    """With torch's flags, and the kernels, that the case asks for."""
    with float32_precision(case), case.forced(), torch.no_grad():
        yield


@contextlib.contextmanager
def float32_precision(case: Case) -> Iterator[None]:
    flags = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    before = [flag.fp32_precision for flag in flags]
    try:
        for flag in flags:
            flag.fp32_precision = "tf32" if case.allow_tf32 else "ieee"
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.fp32_precision = value


def all_cases() -> Iterator[Case]:
    yield from conv_cases()
    yield from mlp_cases()
    yield from rnn_cases()


# ---- mlp --------------------------------------------------------------------------------------------------

MLP_SHAPES = [  # rows, widths
    (32, (10, 8, 5, 8, 10)),
    (256, (784, 128, 32, 128, 784)),
    (131072, (64, 64, 64, 64, 64)),
    (131072, (128, 128, 128, 128, 128)),
    (65536, (256, 256, 256, 256)),
    (65536, (256, 1024)),
]


def _mlp_case(rows: int, widths: tuple[int, ...], dtype: torch.dtype, allow_tf32: bool, name: str) -> Case:
    def make(device: torch.device) -> Calls:
        def new(*sizes: int) -> Tensor:
            return torch.randn(sizes, device=device).to(dtype)

        weights = [new(b, a) for a, b in pairwise(widths)]
        biases = [new(b) for b in widths[1:]]
        activations = join([name] * len(weights))
        input = new(rows, widths[0])
        parameters = join_parameters(weights, biases)

        def train() -> None:
            output, hidden = mlp.mlp_with_hidden(input, parameters, activations)
            mlp.mlp_backward(output, input, weights, activations, output, hidden, True, True, True)

        return Calls(lambda: mlp.mlp(input, parameters, activations), train)

    shape = f"({rows}, {'-'.join(map(str, widths))}) {name}"
    return Case("mlp", shape, dtype, make, allow_tf32, (rows, widths, name))


def mlp_cases() -> Iterator[Case]:
    for rows, widths in MLP_SHAPES:
        for dtype, allow_tf32 in [(BFLOAT, False), (FLOAT, False), (FLOAT, True)]:
            yield _mlp_case(rows, widths, dtype, allow_tf32, "relu")
    yield _mlp_case(65536, (128, 128, 128), HALF, False, "gelu")


# ---- conv_relu_max_pool -----------------------------------------------------------------------------------

CONV_SHAPES = {  # input, out channels, kernel, stride, padding, pool kernel, pool stride, pool padding
    # So few programs that float32's gradients are computed here too.
    "few pixels": ((8, 3, 16, 16), 16, 3, 1, 1, 2, 2, 0),
    "first of Conv2DNet": ((32, 3, 20, 20), 10, 5, 2, 2, 2, 2, 0),
    "MNIST": ((64, 1, 28, 28), 32, 3, 1, 1, 2, 2, 0),
    "stem": ((64, 3, 224, 224), 64, 7, 2, 3, 3, 2, 1),
    "few channels": ((64, 3, 224, 224), 64, 3, 1, 1, 2, 2, 0),
    "32 channels": ((64, 32, 112, 112), 32, 3, 1, 1, 2, 2, 0),
    "64 channels": ((64, 64, 112, 112), 64, 3, 1, 1, 2, 2, 0),
    "256 channels": ((8, 256, 28, 28), 512, 3, 1, 1, 2, 2, 0),
    "1d": ((64, 64, 4096), 64, 5, 1, 2, 2, 2, 0),
    "3d": ((4, 16, 32, 64, 64), 32, 3, 1, 1, 2, 2, 0),
}


def conv_geometry(name: str) -> Geometry:
    sizes, _, _, *values = CONV_SHAPES[name]
    dims = len(sizes) - 2
    stride, padding, pool, pool_stride, pool_padding = ([value] * dims for value in values)
    return Geometry(stride, padding, [1] * dims, 1, pool, pool_stride, pool_padding, [1] * dims, False)


def _conv_case(name: str, dtype: torch.dtype, allow_tf32: bool, last: bool) -> Case:
    sizes, out_channels, kernel, *_ = CONV_SHAPES[name]
    dims, geometry = len(sizes) - 2, conv_geometry(name).flat()

    def make(device: torch.device) -> Calls:
        input = torch.randn(sizes, device=device).to(dtype)
        if last:
            input = input.contiguous(memory_format=torch.channels_last)
        weight = torch.randn(out_channels, sizes[1], *[kernel] * dims, device=device).to(dtype)
        bias = torch.randn(out_channels, device=device).to(dtype)

        return _conv_calls(input, weight, bias, geometry)

    shape = f"{name}{', channels last' if last else ''}"
    return Case("conv_relu_max_pool", shape, dtype, make, allow_tf32, (name, last))


def _conv_calls(input: Tensor, weight: Tensor, bias: Tensor, geometry: list[int]) -> Calls:
    def train() -> None:
        output, winners = conv_relu_max_pool.conv_relu_max_pool_with_winners(input, weight, bias, geometry)
        conv_relu_max_pool.conv_relu_max_pool_backward(output, winners, input, weight, geometry, True, True, True)

    return Calls(lambda: conv_relu_max_pool.conv_relu_max_pool(input, weight, bias, geometry), train)


def conv_cases() -> Iterator[Case]:
    for name, (sizes, *_) in CONV_SHAPES.items():
        for dtype, allow_tf32 in [(BFLOAT, False), (FLOAT, False), (FLOAT, True)]:
            yield _conv_case(name, dtype, allow_tf32, last=False)
        if len(sizes) == 4:
            yield _conv_case(name, HALF, False, last=True)


# ---- rnn --------------------------------------------------------------------------------------------------

RNN_SHAPES = {  # length, batch, in, hidden, layers
    "model": (20, 8, 10, 32, 2),
    "h64": (128, 32, 64, 64, 1),
    "h128": (128, 32, 64, 128, 1),
    "h128, three layers": (128, 32, 64, 128, 3),
    "h128, large batch": (128, 16384, 64, 128, 1),
    "h256": (128, 32, 64, 256, 1),
    "h512": (128, 32, 512, 512, 1),
    "h1024": (128, 16, 512, 1024, 1),
}


def rnn_arguments(name: str, mode: str, dtype: torch.dtype, device: torch.device, packed: bool) -> dict[str, Any]:
    length, batch, inputs, hidden, layers = RNN_SHAPES[name]
    gates = {"GRU": 3, "LSTM": 4}.get(mode, 1) * hidden

    def new(*sizes: int) -> Tensor:
        return (torch.randn(sizes, device=device) / hidden**0.5).to(dtype)

    weights = []
    for layer in range(layers):
        weights += [new(gates, hidden if layer else inputs), new(gates, hidden), new(gates), new(gates)]
    # Lengths fall evenly from the longest to a single step.
    sizes = torch.linspace(batch, 1, length).ceil().long() if packed else None
    return {
        "input": new(length, batch, inputs) if sizes is None else new(int(sizes.sum()), inputs),
        "batch_sizes": sizes,
        "state": [],
        "weights": weights,
        "masks": None,
        "mode": NUMBER_OF[mode],
        "num_layers": layers,
        "bidirectional": False,
        "batch_first": False,
    }


def _rnn_case(name: str, mode: str, dtype: torch.dtype, allow_tf32: bool, packed: bool = False) -> Case:
    def make(device: torch.device) -> Calls:
        return _rnn_calls(rnn_arguments(name, mode, dtype, device, packed))

    return Case("rnn", f"{mode} {name}{', packed' if packed else ''}", dtype, make, allow_tf32, (name, mode, packed))


def _rnn_calls(arguments: dict[str, Any]) -> Calls:
    def train() -> None:
        output, final_state, reserve = rnn.rnn_with_reserve(**arguments)
        rnn.rnn_backward(output, final_state, **arguments, output=output, reserve=reserve, input_wanted=True,
                         state_wanted=False, weights_wanted=True)  # fmt: skip

    return Calls(lambda: rnn.rnn(**arguments), train)


def rnn_cases() -> Iterator[Case]:
    for mode in ("RNN_TANH", "GRU", "LSTM"):
        for name in RNN_SHAPES:
            for dtype, allow_tf32 in [(HALF, False), (FLOAT, False), (FLOAT, True)]:
                yield _rnn_case(name, mode, dtype, allow_tf32)
        for name in ("h128", "h512"):
            yield _rnn_case(name, mode, BFLOAT, False, packed=True)
        yield _rnn_case("h1024", mode, BFLOAT, False)


# ---- what tests force -------------------------------------------------------------------------------------


def forced_cases() -> Iterator[Case]:
    """The shapes of tests/gpu on which tests replace a rule, by the tests' own functions and with what they replace it
    by, so that what a card would compile for them is compiled without one. (float32 is without tf32 on a card.)"""
    yield from _forced_convs(_test_module("test_conv_relu_max_pool"))
    yield from _forced_chains(_test_module("test_mlp"))
    yield from _forced_networks(_test_module("test_rnn"))


@functools.cache
def _test_module(name: str) -> ModuleType:
    """By its path: tests/ has files of the same names."""
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", Path(__file__).parent.parent / f"tests/gpu/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _replaced(module: ModuleType, **functions: Callable[..., Any]) -> contextlib.AbstractContextManager[object]:
    return unittest.mock.patch.multiple(module, **functions)


def _forced_convs(tests: ModuleType) -> Iterator[Case]:
    def case(shape: str, sizes: Any, out: int, kernel: Any, options: dict, dtype: torch.dtype, fused: bool) -> Case:
        def make(device: torch.device) -> Calls:
            geometry = tests.arguments(len(sizes) - 2, **options)
            input, weight, bias = tests.make(sizes, out, kernel, geometry, dtype, device)
            return _conv_calls(input, weight, bias, geometry.flat())

        return Case("conv_relu_max_pool", f"forced: {shape}", dtype, make,
                    forced=lambda: _replaced(_conv_plan, is_fused=lambda *_: fused))  # fmt: skip

    for name, (*of_test, _) in tests.WINDOWS.items():
        for dtype in (FLOAT, HALF):
            yield case(name, *of_test, dtype, True)
    for name, of_test in tests.CASES.items():
        yield case(f"{name}, around stock's", *of_test, FLOAT, False)


def _forced_chains(tests: ModuleType) -> Iterator[Case]:
    def case(dtype: torch.dtype) -> Case:
        def make(device: torch.device) -> Calls:
            input, weights, biases = tests.make(150, (10, 20, 5, 12), dtype, device)
            code = "relu|gelu|tanh"
            parameters = join_parameters(weights, biases)
            return Calls(lambda: mlp.mlp(input, parameters, code), lambda: mlp.mlp_with_hidden(input, parameters, code))

        return Case("mlp", "forced: weights of all layers on chip", dtype, make,
                    forced=lambda: _replaced(_mlp_plan, is_resident=lambda *_: True))  # fmt: skip

    yield from map(case, (FLOAT, BFLOAT))


def _forced_networks(tests: ModuleType) -> Iterator[Case]:
    spread = {"_FEWEST_SPREAD_STEPS": 1, "rnn_config": lambda *_: _rnn_config.Config(16, 4, 16)}
    wave = {"wave_chunk": lambda *_: 8}
    sizes = {"spread": {"hidden": 19}, "wave": {"hidden": 19, "layers": 3, "length": 19}}

    def case(mode: str, way: str, dtype: torch.dtype) -> Case:
        def make(device: torch.device) -> Calls:
            return _rnn_calls(tests.make(mode, dtype, device, **sizes[way])[1])

        return Case("rnn", f"forced: {mode}, {way}", dtype, make,
                    forced=lambda: _replaced(_rnn_config, **(spread if way == "spread" else wave)))  # fmt: skip

    for mode in NUMBER_OF:
        for way in sizes:
            for dtype in (FLOAT, HALF):
                yield case(mode, way, dtype)
