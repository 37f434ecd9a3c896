"""Trains models fused and stock, by whatever trains, and compares: what the tests of this folder share."""

import atexit
import copy
import importlib
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fastnn._torch import TorchDispatchMode
from fastnn.reference import models as stock_models
from fastnn.testing import assert_close_to_reference

Batches = Sequence[tuple[Tensor, Tensor]]
Train = Callable[[nn.Module, Batches], Sequence[Tensor]]  # changes the model, returns the loss of each step

# name: a stock model, the sizes of one row of its input, and the operator that runs it
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "cnn": (lambda: stock_models.Conv2DNet(4), (3, 20, 20), "conv_relu_max_pool"),
    "rnn": (lambda: stock_models.RNN(4, 6, 2, 3), (7, 4), "rnn"),
    "autoencoder": (lambda: stock_models.Autoencoder(10, 8, 5), (10,), "mlp"),
    "batch norm": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(6 * 9, 5), nn.Tanh(), nn.Linear(5, 3)),
        ),
        (3, 8, 8),
        "conv_relu_max_pool",
    ),
}
_PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
_FUSED = "fastnn.fuse(model)"
_RECIPES = tempfile.TemporaryDirectory()
atexit.register(_RECIPES.cleanup)
sys.path.append(_RECIPES.name)


def recipe(section: str, fused: bool = True) -> ModuleType:
    """The code under a heading of docs/integrations.md as a module, which other processes can import too; without its
    fusing, if not `fused`."""
    code = re.search(rf"^## {section}$.*?^```python\n(.*?)^```", _PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert code is not None, section
    assert _FUSED in code[1]
    name = re.sub(r"\W", "_", f"recipe_{section}{'' if fused else '_stock'}")
    Path(_RECIPES.name, f"{name}.py").write_text(code[1] if fused else code[1].replace(_FUSED, "model"))
    importlib.invalidate_caches()
    return importlib.import_module(name)


def both(section: str) -> tuple[Train, Train]:
    """The training of a recipe, with its fusing and without it."""
    return recipe(section).train, recipe(section, fused=False).train


def make(name: str, steps: int = 6, rows: int = 8) -> tuple[nn.Module, Batches]:
    """One of the models, and batches to train it with."""
    torch.manual_seed(0)
    make_model, sizes, _ = MODELS[name]
    model, batches = make_model(), torch.randn(steps, rows, *sizes)
    return model, [(x, torch.randn_like(model(x).detach())) for x in batches]


def check_training(name: str, ours: Train, stock: Train, dtype: torch.dtype = torch.float32) -> None:
    """Check that ``ours`` trains one of the models by fastnn's operators, and as ``stock`` does: see `compare`."""
    model, batches = make(name)

    def batches_in(precision: torch.dtype) -> Batches:
        return [(x.to(precision), y.to(precision)) for x, y in batches]

    compare(model, batches_in, ours, stock, MODELS[name][2], len(batches), dtype)


def compare(
    model: nn.Module,
    data_in: Callable[[torch.dtype], Any],
    ours: Callable[[nn.Module, Any], Sequence[Tensor]],
    stock: Callable[[nn.Module, Any], Sequence[Tensor]],
    operator: str,
    steps: int,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Check that ``ours`` trains a model with calls of an operator of fastnn in each of its steps and ``stock`` without
    any, and that the losses, the parameters and the buffers are as close to those of stock's training in float64 as the
    table of tolerances allows.

    dtype: in which the results are compared; in float64, all three trainings have it, else ours and stock's float32.
    """
    start = torch.float64 if dtype is torch.float64 else torch.float32
    results = []
    for train, precision in ((ours, start), (stock, start), (stock, torch.float64)):
        one = copy.deepcopy(model).to(precision)
        torch.manual_seed(0)
        with OwnCalls() as called:
            losses = train(one, data_in(precision))
        called.check(operator, steps if train is ours else 0)
        state = [_whole(value) for value in one.state_dict().values() if value.is_floating_point()]
        results.append([torch.stack([loss.detach() for loss in losses]), *state])
    for mine, theirs, reference in zip(*results, strict=True):
        assert_close_to_reference(mine.to(dtype), theirs.to(dtype), reference)


def _whole(value: Any) -> Tensor:
    """A parameter that FSDP2 has left in parts, put together; any other as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


class OwnCalls(TorchDispatchMode):
    """Counts the calls of fastnn's operators that a block makes, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastnn":
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    def check(self, operator: str, steps: int) -> None:
        """Check that an operator ran backward in so many steps at least; for none, that no operator was called."""
        of_all = self.counts["network_backward"] + self.counts["bound_training_step"]
        backward = self.counts[f"{operator}_backward"] + of_all
        assert backward >= steps if steps else not self.counts, self.counts


def train_plainly(
    model: nn.Module, batches: Batches, forward: Callable[[Tensor], Tensor] | None = None
) -> list[Tensor]:
    """The loop that everybody writes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss((forward or model)(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses
