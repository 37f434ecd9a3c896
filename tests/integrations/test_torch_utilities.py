"""torch.utils.checkpoint, torch.optim.swa_utils, autocast and gradients of several batches, each and all together."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from beside_stock import MODELS, Batches, both, check_training, train_plainly
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint

import fastnn


def checkpointed(model: nn.Module, batches: Batches) -> list[Tensor]:
    return train_plainly(model, batches, partial(checkpoint, model, use_reentrant=False))


def checkpointed_reentrant(model: nn.Module, batches: Batches) -> list[Tensor]:
    """It runs backward inside of backward, and needs an input that requires a gradient."""
    return train_plainly(model, batches, lambda x: checkpoint(model, x.requires_grad_(), use_reentrant=True))


def accumulating(model: nn.Module, batches: Batches) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for number, (x, y) in enumerate(batches):
        loss = nn.functional.mse_loss(model(x), y) / 3
        loss.backward()
        losses.append(loss.detach())
        if number % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def averaging(model: nn.Module, batches: Batches, average: Callable[[nn.Module], nn.Module]) -> list[Tensor]:
    """Trains, with an average of all weights beside the model, and gives the average's losses."""
    averaged, losses = average(model), []
    for batch in batches:
        train_plainly(model, [batch])
        averaged.update_parameters(model)
        losses += train_plainly(copy.deepcopy(averaged), [batch])
    swa_utils.update_bn([x for x, _ in batches], averaged)
    model.load_state_dict(averaged.module.state_dict())
    return losses


WAYS = {
    "checkpoint": checkpointed,
    "reentrant checkpoint": checkpointed_reentrant,
    "accumulation": accumulating,
    "stochastic weight averaging": partial(averaging, average=swa_utils.AveragedModel),
    "exponential moving average": partial(
        averaging,
        average=partial(swa_utils.AveragedModel, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True),
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_each(name: str, way: str) -> None:
    train = WAYS[way]
    check_training(name, lambda model, batches: train(fastnn.fuse(model), batches), train)


@pytest.mark.parametrize("name", MODELS)
def test_autocast(name: str) -> None:
    def train(model: nn.Module, batches: Batches) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):  # of float32 alone, so that the reference stays in float64
            return train_plainly(model, batches, lambda x: model(x).to(x.dtype))

    check_training(name, lambda model, batches: train(fastnn.fuse(model), batches), train, torch.bfloat16)


@pytest.mark.parametrize("name", MODELS)
def test_the_recipe(name: str) -> None:
    check_training(name, *both("PyTorch's own tools"), torch.bfloat16)
