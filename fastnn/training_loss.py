"""A model and the caller's own loss as one module, so that a training step reads both as one network."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from fastnn.graph.forward import FusedForward
from fastnn.graph.tracing import listed

# What a loss's target is: "tensor", or "tuple" or "list" and how many tensors are in it.
Form = tuple[str, int]
ONE_TENSOR: Form = ("tensor", 1)


def form_of(target: Any) -> Form | None:
    """The form of a target; None where it holds anything but tensors."""
    kind = type(target)
    if issubclass(kind, Tensor):
        return ONE_TENSOR
    if kind in (tuple, list) and target and all(isinstance(one, Tensor) for one in target):
        return kind.__name__, len(target)
    return None


def tensors_of_target(target: Any, form: Form) -> Sequence[Tensor]:
    return (target,) if form == ONE_TENSOR else target


def with_loss(model: nn.Module, loss: Callable[[Any, Any], Tensor], inputs: int, form: Form) -> nn.Module:
    """A module that takes a fused model's inputs and the tensors of a target, and gives the loss. What stays unfused in
    the model stays so in it."""
    whole: Any = _class_of(inputs, form)()
    whole.model, whole.loss = model, loss
    FusedForward(whole, model.__dict__["forward"].left_by_mode)
    return whole


@functools.cache
def _class_of(inputs: int, form: Form) -> type[nn.Module]:
    """The class has one argument for each tensor, since a trace takes tensors by the names of a forward's arguments."""
    kind, count = form
    given = [f"input_{i}" for i in range(inputs)]
    wanted = [f"target_{i}" for i in range(count)]
    several = ", ".join(wanted)
    target = {"tensor": several, "tuple": f"({several},)", "list": f"listed({several})"}[kind]
    names: dict[str, Any] = {"__name__": __name__, "listed": listed}
    exec(
        f"def forward(self, {', '.join([*given, *wanted])}):\n"
        f"    return self.loss(self.model({', '.join(given)}), {target})\n",
        names,
    )
    return type("ModelWithLoss", (nn.Module,), {"__module__": __name__, "forward": names["forward"]})
