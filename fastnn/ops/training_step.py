"""A whole training step in one operator, or in two with the loss between them: their Python side."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastnn._extension import load_extension
from fastnn.ops._autograd import check_same_device
from fastnn.ops._raw_operator import raw_operator

training_step_op = torch.ops.fastnn.training_step.default
bind_training_step_op = torch.ops.fastnn.bind_training_step.default
bound_training_step_op = torch.ops.fastnn.bound_training_step.default
training_step_forward_op = torch.ops.fastnn.training_step_forward.default
_extension = load_extension()
release_training_step = _extension.release_training_step
training_step_backward_op = torch.ops.fastnn.training_step_backward.default


def write_program(stages: Iterable[tuple[str, Iterable[int | str]]]) -> str:
    """The program of these stages: each a name and the words that describe it (csrc/ops/training_stages.h), which are
    numbers but for activations."""
    return "".join(" ".join(map(str, (name, *numbers))) + ";" for name, numbers in stages)


def read_program(program: str) -> Iterator[tuple[str, list[Any]]]:
    """The stages that :func:`write_program` was given."""
    for stage in program.removesuffix(";").split(";"):
        name, *words = stage.split()
        yield name, [int(word) if word.isdecimal() else word for word in words]


@raw_operator("training_step")
def _(
    input: Tensor,
    target: Tensor,
    parameters: list[Tensor],
    state: list[Tensor],
    program: str,
    weight: Tensor | None,
    layout: list[int],
    numbers: Tensor,
    keep_gradients: bool,
) -> tuple[Tensor, list[Tensor]]:
    check_same_device(input, target, *parameters, *state, weight, numbers)
    gradients = [parameter.new_empty(parameter.shape) for parameter in parameters] if keep_gradients else []
    return input.new_empty(()), gradients


@raw_operator("bind_training_step")
def _(parameters: list[Tensor], state: list[Tensor], program: str, weight: Tensor | None, layout: list[int]) -> Tensor:
    check_same_device(*parameters, *state, weight)
    return parameters[0].new_empty(1, dtype=torch.int64)


@raw_operator("bound_training_step")
def _(input: Tensor, target: Tensor, bound: Tensor, numbers: Tensor) -> Tensor:
    check_same_device(input, target, bound, numbers)
    return input.new_empty(())


@raw_operator("training_step_forward")
def _(input: Tensor, parameters: list[Tensor], program: str) -> tuple[Tensor, list[Tensor]]:
    check_same_device(input, *parameters)
    saved: list[Tensor] = []
    input, rest = input.contiguous(), list(parameters)
    for name, numbers in read_program(program):
        count = _parameters_of(name, numbers)
        input, kept = _stage(name, numbers, input, rest[:count])
        del rest[:count]
        saved += kept
    return input.new_empty(input.shape), saved


@raw_operator("training_step_backward")
def _(
    gradient: Tensor,
    input: Tensor,
    parameters: list[Tensor],
    state: list[Tensor],
    saved: list[Tensor],
    program: str,
    layout: list[int],
    numbers: Tensor,
    keep_gradients: bool,
) -> list[Tensor]:
    check_same_device(gradient, input, *parameters, *state, *saved, numbers)
    return [parameter.new_empty(parameter.shape) for parameter in parameters] if keep_gradients else []


def _parameters_of(name: str, numbers: Sequence[int]) -> int:
    """How many parameters a stage has; its numbers: csrc/ops/training_stages.h."""
    if name == "conv":
        return 1 + numbers[0]
    if name == "plain_conv":
        return 1 + numbers[1]
    if name == "batch_norm":
        return 2 * numbers[0] + numbers[1] + numbers[2]
    if name == "mlp":
        return numbers[0] * (1 + numbers[1])
    return numbers[0] if name == "rnn" else 0


def _stage(name: str, numbers: list[int], input: Tensor, parameters: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The output of a stage, and what backward needs of it, in sizes alone."""
    ops = torch.ops.fastnn
    if name == "conv":
        bias = parameters[1] if numbers[0] else None
        output, winners = ops.conv_relu_max_pool_with_winners(input, parameters[0], bias, numbers[1:])
        return output, [output, winners]
    if name == "plain_conv":
        dims, biased, *rest = numbers
        stride, padding, dilation = (rest[i * dims : (i + 1) * dims] for i in range(3))
        bias = parameters[1] if biased else None
        output = torch.convolution(
            input, parameters[0], bias, stride, padding, dilation, False, [0] * dims, rest[3 * dims]
        )
        return output, [output]
    if name == "batch_norm":
        channels = input.shape[1]
        if len(numbers) == 5:
            output = input.new_empty(input.shape)
            return output, [output, *(input.new_empty(channels) for _ in range(3))]
        ones = input.new_empty(channels, 1, *(1 for _ in input.shape[2:]))
        output, winners = ops.conv_relu_max_pool_with_winners(input, ones, None, numbers[5:])
        return output, [output, winners, *(input.new_empty(channels) for _ in range(3))]
    if name == "mlp":
        rows = input.reshape(-1, input.shape[-1])
        output, hidden = ops.mlp_with_hidden(rows, parameters, numbers[2])
        kept = sum(tensor.numel() for tensor in (output, *hidden))
        return output.reshape(*input.shape[:-1], output.shape[1]), [input.new_empty(kept)]
    if name == "rnn":
        _, mode, layers, bidirectional, batch_first, last, drops = numbers
        output, state, reserve = ops.rnn_with_reserve(
            input, None, [], parameters, None, mode, layers, bool(bidirectional), bool(batch_first)
        )
        saved = [output, reserve, *state[: int(last)]]
        if drops and layers > 1:
            saved.append(input.new_empty(layers - 1, input.shape[0] * input.shape[1], output.shape[2]))
        return (state[0][-1] if last else output), saved
    if name == "average":
        dims, *parts = numbers
        output = input.new_empty([*input.shape[:2], *parts])
        return output, [output[:, :, None] if dims == 1 else output]
    if name == "last":
        return input.select(numbers[0], -1).contiguous(), []
    if name == "activation":
        return input, [input.new_empty(input.shape)]
    if name == "dropout":
        return input, [torch.empty_like(input) for _ in range(2)]
    return (input.reshape(-1, numbers[0]) if numbers else input.flatten(1)), []
