"""The Triton kernels, under the same operators as the C++ ones, for CUDA (and ROCm, which torch calls CUDA too).

Registering costs microseconds: Triton and the kernels are imported by the first call on a GPU.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from fastnn.ops import rnn as rnn_operators
from fastnn.ops._raw_operator import refuse_gradients

_OPERATORS = {
    "conv": (
        "conv_relu_max_pool",
        "conv_relu_max_pool_with_winners",
        "conv_relu_max_pool_backward",
    ),
    "mlp": ("mlp", "mlp_with_hidden", "mlp_backward"),
    "rnn": ("rnn", "rnn_cell", "rnn_with_reserve", "rnn_backward"),
}
_library = torch.library.Library("fastnn", "IMPL")


def _implementation(module: str, name: str) -> Callable[..., Any]:
    loaded: Callable[..., Any] | None = None

    def call(*args: Any) -> Any:
        nonlocal loaded
        if loaded is None:
            try:
                loaded = getattr(importlib.import_module(f"fastnn.kernels.{module}.launch"), name)
            except ModuleNotFoundError as error:
                raise ImportError(f"fastnn on a GPU needs Triton ({error}): pip install triton") from error
        if not torch.is_grad_enabled():
            return loaded(*args)
        with torch.no_grad():
            result = loaded(*args)
        return refuse_gradients(result, args)

    return call


def _with_stocks_gradient(*arguments: Any) -> Any:
    return importlib.import_module("fastnn.kernels.rnn.launch").with_stocks_gradient(*arguments)


rnn_operators.run_with_stocks_gradient = _with_stocks_gradient

for _module, _names in _OPERATORS.items():
    for _name in _names:
        _library.impl(_name, _implementation(_module, _name), "CUDA")
