"""What the raw operators do where no kernel is asked for: gradients, the transforms of torch.func."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastnn.ops.rnn import MODES
from fastnn.reference.conv_relu_max_pool import Geometry

_POOL_2 = Geometry([1], [0], [1], 1, [2], [2], [0], [1], False).flat()


def mlp(x: Tensor) -> Tensor:
    return torch.ops.fastnn.mlp(x, [torch.ones(5, 3), torch.ones(5)], 0o11)


def conv(x: Tensor) -> Tensor:
    return torch.ops.fastnn.conv_relu_max_pool(x[None], torch.ones(2, 4, 2), None, _POOL_2)


def rnn_cell(x: Tensor) -> Tensor:
    mode, state = MODES.index("RNN_TANH"), torch.zeros(4, 2)
    return torch.ops.fastnn.rnn_cell(x, mode, state, None, torch.ones(2, 3), torch.ones(2, 2))[0]


OPERATORS = [mlp, conv, rnn_cell]
INPUT = torch.linspace(-1, 1, 12).reshape(4, 3)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.hessian])
def test_gradients_are_refused(operator: Callable[[Tensor], Tensor], transform: Callable[..., Any]) -> None:
    with pytest.raises(RuntimeError, match="no gradient of its own"):
        transform(lambda x: operator(x).sum())(INPUT)
    with pytest.raises(RuntimeError, match="no gradient of its own"):
        torch.func.vmap(transform(lambda x: operator(x).sum()))(torch.stack([INPUT, INPUT]))


@pytest.mark.parametrize("operator", OPERATORS)
def test_tangents_are_refused(operator: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(RuntimeError, match="no gradient of its own"):
        torch.func.jvp(operator, (INPUT,), (INPUT,))


@pytest.mark.parametrize("operator", OPERATORS)
def test_under_transforms_that_do_not_ask_for_its_gradient(operator: Callable[[Tensor], Tensor]) -> None:
    factor = operator(INPUT).sum()
    torch.testing.assert_close(
        torch.func.grad(lambda x: (x * operator(x.detach()).sum()).sum())(INPUT), factor.expand(4, 3)
    )
    batch = torch.stack([INPUT, -INPUT, 2 * INPUT])
    torch.testing.assert_close(torch.func.vmap(operator)(batch), torch.stack([operator(x) for x in batch]))
    nested = torch.func.vmap(torch.func.vmap(operator))(batch[None])
    torch.testing.assert_close(nested[0], torch.stack([operator(x) for x in batch]))
