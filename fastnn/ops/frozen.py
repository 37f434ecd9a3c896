"""A whole network in one operator: its Python side."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastnn.ops._autograd import check_same_device
from fastnn.ops._raw_operator import raw_operator
from fastnn.ops.conv_relu_max_pool import output_sizes as conv_output_sizes

frozen_op = torch.ops.fastnn.frozen.default
frozen_packed = torch.ops.fastnn.frozen_packed.default
frozen_unpacked = torch.ops.fastnn.frozen_unpacked.default


def conv_numbers(weight: Sequence[int], biased: bool, geometry: Iterable[int]) -> list[int]:
    """What describes a "conv" stage, given its weight's sizes."""
    return [len(weight) - 2, int(biased), *weight, *geometry]


def write_program(stages: Iterable[tuple[str, Iterable[int | str]]]) -> str:
    """The program of these stages: each a name and the words that describe it (csrc/ops/frozen_stages.h), which are
    numbers but for activations."""
    return "".join(" ".join(map(str, (name, *numbers))) + ";" for name, numbers in stages)


def read_program(program: str) -> Iterator[tuple[str, list[Any]]]:
    """The stages that :func:`write_program` was given."""
    for stage in program.removesuffix(";").split(";"):
        name, *words = stage.split()
        yield name, [int(word) if word.isdecimal() else word for word in words]


def output_sizes(program: str, sizes: list[int]) -> list[int]:
    """What becomes of an input of ``sizes``. (Whether they fit is the operator's to check.)"""
    for name, numbers in read_program(program):
        if name == "mlp":
            sizes = [*sizes[:-1], numbers[-2]]
        elif name == "conv":
            rank = numbers[0] + 2
            sizes = conv_output_sizes(sizes, numbers[2 : 2 + rank], numbers[2 + rank :])
        elif name == "rnn":
            _, _, directions, batch_first, _, last, _, hidden, projected = numbers
            steps_left = [sizes[1 - batch_first]] if last else sizes[:2]
            sizes = [*steps_left, directions * (projected or hidden)]
        elif name == "flatten":
            features = 1
            for size in sizes[1:]:
                features = features * size
            sizes = [sizes[0], features]
    return sizes


@raw_operator("frozen")
def _(input: Tensor, weights: Tensor, packed: Tensor, program: str) -> Tensor:
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            "a frozen model cannot be exported to ONNX, which has none of its operators: export the model that it was "
            "made of"
        )
    check_same_device(input, weights, packed)
    return input.new_empty(output_sizes(program, list(input.shape)))


@raw_operator("frozen_unpacked")
def _(input: Tensor, parameters: list[Tensor], program: str) -> Tensor:
    check_same_device(input, *parameters)
    return input.new_empty(output_sizes(program, list(input.shape)))


@raw_operator("frozen_packed")
def _(weights: Tensor, program: str, sizes: list[int]) -> Tensor:
    return weights.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)
