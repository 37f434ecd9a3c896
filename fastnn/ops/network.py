"""A whole network in one operator: its Python side. (csrc/network/infer.cpp)"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnn.network_program import TextLine
from fastnn.ops._autograd import check_same_device
from fastnn.ops._raw_operator import raw_operator
from fastnn.recurrent_modes import MODE_OF
from fastnn.reference.network import Taken, layers_of_rnn, network

network_op = torch.ops.fastnn.network.default
network_of_one = torch.ops.fastnn.network_of_one.default
network_packed = torch.ops.fastnn.network_packed.default
network_unpacked = torch.ops.fastnn.network_unpacked.default


def _rnn_sizes(line: TextLine, taken: Taken) -> list[Tensor]:
    """Empty tensors of the sizes of a recurrent layer's results. No step runs, because their number may be unknown."""
    (x,) = taken["input"]
    directions = 2 if line["bidirectional"] else 1
    weights = taken["weights"]
    outputs = weights[1].shape[1]
    hidden = weights[1].shape[0] // MODE_OF[line["mode"]].gates
    batch = x.shape[0 if line["batch_first"] else 1]
    sizes = [batch, directions * outputs] if line["last"] else [*x.shape[:2], directions * outputs]
    count = layers_of_rnn(line, taken) * directions
    return [x.new_empty(sizes), x.new_empty(count, batch, outputs), x.new_empty(count, batch, hidden)]


def _empty_outputs(inputs: Sequence[Tensor], weights: Any, program: str) -> list[Tensor]:
    results = network(inputs, weights, program, {"rnn": _rnn_sizes})
    return [result.new_empty(result.shape) for result in results]


def _refuse_onnx() -> None:
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            "a frozen model cannot be exported to ONNX, which has none of its operators: export the model that it was "
            "made of"
        )


@raw_operator("network")
def _(inputs: list[Tensor], weights: Tensor, packed: Tensor, program: str) -> list[Tensor]:
    _refuse_onnx()
    check_same_device(*inputs, weights, packed)
    return _empty_outputs(inputs, weights, program)


@raw_operator("network_of_one")
def _(input: Tensor, weights: Tensor, packed: Tensor, program: str) -> Tensor:
    _refuse_onnx()
    check_same_device(input, weights, packed)
    return _empty_outputs([input], weights, program)[0]


@raw_operator("network_unpacked")
def _(input: Tensor, parameters: list[Tensor], program: str) -> Tensor:
    check_same_device(input, *parameters)
    return _empty_outputs([input], parameters, program)[0]


@raw_operator("network_packed")
def _(weights: Tensor, program: str, sizes: list[int]) -> Tensor:
    return weights.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)
