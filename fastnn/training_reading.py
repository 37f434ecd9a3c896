"""What a training step reads from its model and loss before it can be one call, and whether that still holds; and what
an update alone reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import getitem
from typing import Any

import torch
from torch import Tensor, nn

from fastnn._torch import HOOKS
from fastnn.graph.forward import FusedForward, Trace
from fastnn.graph.training_program import NotANetworkError, TrainingProgram, training_program_of
from fastnn.ops.network_training import weights_with_gradients
from fastnn.training_loss import Form, tensors_of_target, with_loss
from fastnn.training_numbers import (
    LOSS_OF_PROGRAM,
    check_optimizer,
    check_parameters,
    numbers_of_loss,
    settings_of_loss,
)


class Reading:
    """A model as a network, and its loss in numbers. Raises NotANetworkError where the model is none, or where the
    operators do not support its parameters or the optimizer.

    before: the last reading, whose trace is used again if it still holds. inputs: with them, a model whose forward asks
    for sizes is read for inputs of these sizes.
    """

    form: Form | None = None  # of the target, where the network gives the loss (ReadingWithLoss)
    _forward: Any  # the model's own forward when it was read
    _trace: Trace  # of that forward

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        optimizer: torch.optim.Optimizer,
        before: Reading | None,
        inputs: Sequence[Tensor] | None = None,
    ) -> None:
        forward: Any = model.__dict__.get("forward")
        if any(model.__dict__[name] for name in HOOKS):
            raise NotANetworkError("the model has hooks")
        self._loss, self._loss_settings = loss, settings_of_loss(loss)
        self._read(model, optimizer, before if before is not None and forward is before._forward else None, inputs)
        self.loss_numbers: list[float] = [0.0] * 4
        self.loss_weight: Tensor | None = None
        self.loss_why = ""  # why the operator does not compute the loss
        try:
            self.loss_numbers, self.loss_weight = numbers_of_loss(loss, self.network.log_softmax is not None)
            if not self.network.gives_one:
                raise NotANetworkError("the model returns several tensors")
        except NotANetworkError as reason:
            self.loss_why = str(reason)

    def _read(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        before: Reading | None,
        inputs: Sequence[Tensor] | None,
    ) -> None:
        """Reads a fused module as a network. before: an earlier reading of the same forward."""
        forward: Any = model.__dict__.get("forward")
        trace: Trace | None
        if before is not None and before.fits(inputs or ()) and before._trace.holds():
            trace = before._trace
        elif isinstance(forward, FusedForward):
            trace = forward.trace(now=inputs is None, inputs=inputs)
        else:
            trace = None
        if trace is None:
            raise NotANetworkError(getattr(forward, "why", None) or "the model cannot be traced")
        check_optimizer(optimizer)
        self.network: TrainingProgram = training_program_of(model, trace)
        self.has_gradients = weights_with_gradients(self.network.text)  # whether each weight of the program has one
        self._model, self._forward, self._trace = model, forward, trace
        self.owners = [own for own, _ in self.network.sources]
        self._names = [name for _, name in self.network.sources]
        self.tensors_when_read = self.tensors()
        self.check(self.tensors_when_read, optimizer)

    def check(self, tensors: list[Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Raises NotANetworkError where the operators do not support the parameters."""
        check_parameters(self.of_program(tensors), optimizer)

    def has_gradient(self, weights: Sequence[Tensor]) -> bool:
        """Whether the network's result requires a gradient. weights: the program's."""
        return any(one.requires_grad and has for one, has in zip(weights, self.has_gradients, strict=True))

    def given(self, inputs: Sequence[Tensor], target: Any) -> Sequence[Tensor]:
        """What the network takes."""
        return inputs

    @property
    def program(self) -> str:
        return self.network.text

    @property
    def is_for_any_sizes(self) -> bool:
        return self._trace.sizes is None

    def fits(self, inputs: Sequence[Tensor]) -> bool:
        """Whether the network is the model for inputs of these sizes."""
        return self._trace.fits(inputs)

    def tensors(self) -> list[Tensor]:
        """The tensors that the network reads, as the model has them now. Raises KeyError where one is gone."""
        return list(map(getitem, self.owners, self._names))

    def of_program(self, tensors: list[Tensor]) -> list[Tensor]:
        """Of these, the ones that the program takes: each once, in the program's order."""
        return [tensors[place] for place in self.network.parameters]

    def holds(self, loss: Any) -> bool:
        """Whether the model is in training mode and still computes what was read, and the loss is as it was."""
        own = self._model.__dict__
        return (
            own["training"]
            and own.get("forward") is self._forward
            and self._trace.holds()
            and self.network.guard.holds()
            and self._loss_holds(loss)
        )

    def _loss_holds(self, loss: Any) -> bool:
        settings = self._loss_settings
        try:
            return loss is self._loss and (not settings or settings == settings_of_loss(loss))
        except RuntimeError:  # two tensors were compared
            return False


class OtherParametersError(NotANetworkError):
    """The loss gives gradients to parameters that neither the model nor the optimizer has."""


class ReadingWithLoss(Reading):
    """A model and the caller's own loss as one network, which gives the loss. `plain`: the reading of the model
    alone."""

    form: Form

    def __init__(
        self,
        plain: Reading,
        form: Form,
        optimizer: torch.optim.Optimizer,
        inputs: Sequence[Tensor] | None,
        target: Any,
        before: ReadingWithLoss | None,
    ) -> None:
        self.plain, self.form, self._loss = plain, form, plain._loss
        is_same = before is not None and (before.form, before.plain._model) == (form, plain._model)
        if before is not None and is_same and before._loss is plain._loss:
            whole = before._model
        else:
            before, whole = None, with_loss(plain._model, plain._loss, plain.network.inputs, form)
        self._own = {id(p) for p in plain._model.parameters()}
        self._read(whole, optimizer, before, None if inputs is None else self.given(inputs, target))
        if not self.network.gives_one or self.network.log_softmax is not None:
            raise NotANetworkError("the loss is not one number")
        if not self.has_gradient(self.of_program(self.tensors())):
            raise NotANetworkError("the loss depends on no parameter")
        self.loss_numbers, self.loss_weight, self.loss_why = [LOSS_OF_PROGRAM, 0.0, 0.0, 0.0], None, ""

    def check(self, tensors: list[Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Refuses, too, what autograd would leave a gradient in for others than this optimizer."""
        super().check(tensors, optimizer)
        known = {id(p) for group in optimizer.param_groups for p in group["params"]} | self._own
        if any(tensor.requires_grad and id(tensor) not in known for tensor in tensors):
            raise OtherParametersError("the loss uses parameters that the optimizer does not have")

    def given(self, inputs: Sequence[Tensor], target: Any) -> Sequence[Tensor]:
        return (*inputs, *tensors_of_target(target, self.form))

    def holds(self, loss: Any) -> bool:
        # The trace goes through the model's forward and the loss, so that its guard has all that these read.
        is_same = loss is self._loss and self.plain._model.training
        return is_same and self._trace.holds() and self.network.guard.holds()


class UpdateReading:
    """What an update alone rests on: the parameters of the optimizer that have gradients. Raises NotANetworkError where
    the operators do not support them or the optimizer."""

    program = ""
    owners: Sequence[Any] = ()
    loss_numbers = (0.0,) * 4
    loss_weight = None

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        check_optimizer(optimizer)
        self._parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        check_parameters(self._parameters, optimizer)
        self.has_gradients = [True] * len(self._parameters)

    def tensors(self) -> list[Tensor]:
        return self._parameters

    def of_program(self, tensors: list[Tensor]) -> list[Tensor]:
        return tensors
