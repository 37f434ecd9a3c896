"""A whole training step in one operator: its Python side."""

import torch
from torch import Tensor

from fastnn.ops._autograd import check_same_device
from fastnn.ops._raw_operator import raw_operator

training_step_op = torch.ops.fastnn.training_step.default


@raw_operator("training_step")
def _(
    input: Tensor,
    target: Tensor,
    parameters: list[Tensor],
    state: list[Tensor],
    program: str,
    weight: Tensor | None,
    numbers: Tensor,
    keep_gradients: bool,
) -> tuple[Tensor, list[Tensor]]:
    check_same_device(input, target, *parameters, *state, weight, numbers)
    gradients = [parameter.new_empty(parameter.shape) for parameter in parameters] if keep_gradients else []
    return input.new_empty(()), gradients
