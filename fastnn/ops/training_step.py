"""The Python side of the operators that make a whole training step, in one call or in two with the loss between."""

from typing import Any

import torch
from torch import Tensor

from fastnn._extension import load_extension
from fastnn._torch import direct_call
from fastnn.ops._autograd import check_same_device
from fastnn.ops._raw_operator import raw_operator

step = direct_call(torch.ops.fastnn.training_step.default)
bind = direct_call(torch.ops.fastnn.bind_training_step.default)
bound_step = direct_call(torch.ops.fastnn.bound_training_step.default)
bound_step_of_several = direct_call(torch.ops.fastnn.bound_training_step_of_several.default)
bound_epoch = direct_call(torch.ops.fastnn.bound_training_epoch.default)
bound_gradients = direct_call(torch.ops.fastnn.bound_training_gradients.default)
bound_update = direct_call(torch.ops.fastnn.bound_training_update.default)
step_backward = direct_call(torch.ops.fastnn.training_step_backward.default)
release_training_step = load_extension().release_training_step


@raw_operator("training_step")
def _(
    inputs: list[Tensor],
    target: Tensor,
    parameters: list[Tensor],
    state: list[Tensor],
    program: str,
    weight: Tensor | None,
    layout: list[int],
    numbers: Tensor,
    keep_gradients: bool,
) -> tuple[Tensor, list[Tensor]]:
    check_same_device(*inputs, target, *parameters, *state, weight, numbers)
    gradients = [parameter.new_empty(parameter.shape) for parameter in parameters] if keep_gradients else []
    return _like(inputs, parameters).new_empty(()), gradients


@raw_operator("bind_training_step")
def _(parameters: list[Tensor], state: list[Tensor], program: str, weight: Tensor | None, layout: list[int]) -> Tensor:
    check_same_device(*parameters, *state, weight)
    return parameters[0].new_empty(1, dtype=torch.int64)


@raw_operator("bound_training_step")
def _(input: Tensor, target: Tensor, bound: Tensor, numbers: Tensor) -> Tensor:
    check_same_device(input, target, bound, numbers)
    return input.new_empty(())


@raw_operator("bound_training_step_of_several")
def _(inputs: list[Tensor], target: Tensor, bound: Tensor, numbers: Tensor) -> Tensor:
    check_same_device(*inputs, target, bound, numbers)
    return _like(inputs, []).new_empty(())


@raw_operator("bound_training_gradients")
def _(inputs: list[Tensor], target: Tensor, bound: Tensor, numbers: Tensor, gradients: list[Tensor]) -> Tensor:
    check_same_device(*inputs, target, bound, numbers, *gradients)
    return _like(inputs, gradients).new_empty(())


@raw_operator("bound_training_update")
def _(gradients: list[Tensor], bound: Tensor, numbers: Tensor) -> Tensor:
    check_same_device(*gradients, bound, numbers)
    return gradients[0].new_empty(())


@raw_operator("bound_training_epoch")
def _(
    inputs: list[Tensor],
    target: Tensor,
    order: Tensor | None,
    first: int,
    last: int,
    batch_size: int,
    bound: Tensor,
    numbers: Tensor,
) -> Tensor:
    check_same_device(*inputs, target, order, bound, numbers)
    return _like(inputs, []).new_empty(-(-(last - first) // batch_size))


@raw_operator("training_step_backward")
def _(
    gradients: list[Tensor | None],
    number: Tensor,
    parameters: list[Tensor],
    state: list[Tensor],
    layout: list[int],
    numbers: Tensor,
    keep_gradients: bool,
) -> list[Tensor]:
    check_same_device(*gradients, number, *parameters, *state, numbers)
    return [parameter.new_empty(parameter.shape) for parameter in parameters] if keep_gradients else []


def _like(inputs: list[Tensor], parameters: list[Tensor]) -> Any:
    """A tensor that has the dtype of the step."""
    return next(tensor for tensor in (*parameters, *inputs) if tensor.is_floating_point())
