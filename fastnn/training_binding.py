"""Binds the tensors of a model and its optimizer for the operators of a training step, tells whether they are still the
same, and notes which gradients an optimizer has used."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor

from fastnn._torch import TENSOR_HOOKS
from fastnn.graph.guard import ABSENT, Guard
from fastnn.graph.training_program import NotANetworkError
from fastnn.ops import training_step as operators
from fastnn.training_numbers import IS_FIRST, OPTIMIZERS, check_optimizer, kept_by, new_number, numbers_of_group
from fastnn.training_ranks import FlatGradients
from fastnn.training_reading import Reading, UpdateReading

_get_flags = attrgetter("requires_grad", *TENSOR_HOOKS)
_get_all_flags = attrgetter("requires_grad", *TENSOR_HOOKS, "grad")


class Binding:
    """The parameters, the optimizer's states and its settings, which the operators find by one number, ``bound``.
    :meth:`undo` removes what the binding itself has created in the optimizer's state.

    Raises KeyError where the optimizer's state lacks something.
    """

    def __init__(
        self,
        reading: Reading | UpdateReading,
        tensors: list[Tensor],
        optimizer: torch.optim.Optimizer,
        max_norm: float | None,
        keep_gradients: bool,
    ) -> None:
        self.parameters = parameters = reading.of_program(tensors)
        self.states: list[Tensor] = []  # the optimizer's states, in the order in which the operators take them
        self.layout: list[int] = []  # for each parameter, its group and the bits of the states that it has
        # The parameters whose state was created here, each with the state that the optimizer had before, and that one.
        self.created: list[tuple[Tensor, dict[str, Any], dict[str, Any]]] = []
        self.flat: FlatGradients | None = None  # where several processes average their gradients
        self.no_grad = torch.no_grad()  # made once: 0.5 us
        self.keeps_gradients = keep_gradients
        self._optimizer, self._max_norm, self._loss_numbers = optimizer, max_norm, reading.loss_numbers
        # The optimizer's parameters that the program does not have. Gradients in them count in a step, too.
        in_program = set(map(id, parameters))
        self._others = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in in_program]
        self._kept = [kept_by(optimizer, group) for group in optimizer.param_groups]
        places = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        try:
            for p, has_gradient in zip(parameters, reading.has_gradients, strict=True):
                group = places.get(id(p), -1) if p.requires_grad and has_gradient else -1
                self.layout += [group, self._take_states(p, self._kept[group]) if group >= 0 else 0]
            if isinstance(reading, Reading) and not reading.has_gradient(parameters):
                raise NotANetworkError("what the model returns depends on no parameter that requires a gradient")
        except BaseException:
            self.undo()
            raise
        self._write_numbers()
        with torch.no_grad():
            self.bound = operators.bind(parameters, self.states, reading.program, reading.loss_weight, self.layout)
        self.release = weakref.finalize(self, operators.release_training_step, int(self.bound))
        self.release.atexit = False
        self._read_flags = _get_all_flags if isinstance(reading, Reading) and not keep_gradients else _get_flags
        self._flags = [
            tuple(dict(f) if isinstance(f, dict) else f for f in flags) for flags in map(self._read_flags, parameters)
        ]
        self._guard = Guard(by_value=False)
        own: dict[str, Any] = optimizer.__dict__
        for name in ("param_groups", "state", "step"):  # a scheduler puts a step there
            self._guard.note_item(own, name, own.get(name, ABSENT))
        for group_of_settings in optimizer.param_groups:
            self._guard.note_item(group_of_settings, "params", group_of_settings["params"])
            self._guard.note_contents(group_of_settings["params"])
        for container in (*reading.owners, optimizer.param_groups, optimizer.state, *optimizer.state.values()):
            self._guard.note_contents(container)
        self._guard.seal()
        self._class_step = type(optimizer).step

    def trained(self, each: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The parameters that are trained; or, from a list with an element for each parameter, their elements."""
        each = self.parameters if each is None else each
        return [one for one, group in zip(each, self.layout[::2], strict=True) if group >= 0]

    def holds(self, max_norm: float | None, keep_gradients: bool) -> bool:
        """Whether the model's and the optimizer's tensors are those that were bound, and no gradients lie in them.
        (:meth:`settings_fit` tells the same of the optimizer's settings.)"""
        # Without keep_gradients, the flags of the program's parameters tell whether these have gradients.
        may_have_gradients = (*self._others, *self.parameters) if keep_gradients else self._others
        return self._tensors_hold(max_norm, keep_gradients) and not any(p.grad is not None for p in may_have_gradients)

    def _tensors_hold(self, max_norm: float | None, keep_gradients: bool) -> bool:
        return (
            self._guard.holds()
            and type(self._optimizer).step is self._class_step
            and self._flags == list(map(self._read_flags, self.parameters))
            and (self._max_norm, self.keeps_gradients) == (max_norm, keep_gradients)
        )

    def settings_fit(self) -> bool:
        """Whether the present settings need the same states as those that were bound. Reads them anew where they have
        changed. Raises NotANetworkError where the operators do not support them."""
        if self._settings == self._settings_now():
            return True
        check_optimizer(self._optimizer)
        if self._kept != [kept_by(self._optimizer, group) for group in self._optimizer.param_groups]:
            return False
        self._write_numbers()
        return True

    def _write_numbers(self) -> None:
        """Reads the optimizer's settings anew."""
        groups, row = self._optimizer.param_groups, OPTIMIZERS[type(self._optimizer)]
        max_norm = -1.0 if self._max_norm is None else float(self._max_norm)
        numbers = [*self._loss_numbers, float(row.kind), max_norm]
        for group in groups:
            numbers += numbers_of_group(row, group)
        self.numbers = torch.tensor(numbers, dtype=torch.float64)
        self._get_settings = [itemgetter(*filter(group.__contains__, row.group_settings)) for group in groups]
        self._settings = list(map(_with_own_lists, self._settings_now()))

    def undo(self) -> None:
        """Removes what this binding has created in the optimizer's state, as far as it is still there."""
        for parameter, before, created in self.created:
            if self._optimizer.state.get(parameter) is not created:
                continue
            if before:
                self._optimizer.state[parameter] = before
            else:
                del self._optimizer.state[parameter]
        self.created = []

    def _settings_now(self) -> list[Any]:
        return [get(group) for get, group in zip(self._get_settings, self._optimizer.param_groups, strict=True)]

    def _take_states(self, parameter: Tensor, kept: tuple[str, ...]) -> int:
        """Appends a parameter's state to `states`, creating it where there is none; returns its bits of the layout."""
        state = self._optimizer.state.get(parameter, {})
        before, names = dict(state), [name for name in kept if name]
        bits = sum(1 << i for i, name in enumerate(kept) if name)
        row = OPTIMIZERS[type(self._optimizer)]
        if row.name == "SGD":
            if names and state.get(names[0]) is None:
                state[names[0]] = torch.zeros_like(parameter)
                bits |= IS_FIRST
        elif not state and row.name != "Adagrad":  # Adagrad creates its states in its constructor
            state.update({name: new_number(value) for name, value in row.numbers})
            state.update({name: torch.zeros_like(parameter) for name in names})
        self.states += [state[name] for name in (*[name for name, _ in row.numbers], *names)]
        if any(before.get(name) is not tensor for name, tensor in state.items()):
            self._optimizer.state[parameter] = state
            self.created.append((parameter, before, state))
        return bits


def _with_own_lists(settings: Any) -> Any:
    """The same settings, with copies of the lists in them: `betas` may be a list, and be changed in place."""
    return tuple(list(one) if type(one) is list else one for one in settings) if type(settings) is tuple else settings


class UpdateBinding(Binding):
    """The same for an update alone, of the parameters that have gradients in ``p.grad``."""

    def __init__(self, optimizer: torch.optim.Optimizer, max_norm: float | None, keep_gradients: bool) -> None:
        reading = UpdateReading(optimizer)
        super().__init__(reading, reading.tensors(), optimizer, max_norm, keep_gradients)

    def holds(self, max_norm: float | None, keep_gradients: bool) -> bool:
        """Whether the parameters that have gradients, and the optimizer's tensors, are those that were bound."""
        groups = self._optimizer.param_groups
        with_gradients = sum(p.grad is not None for group in groups for p in group["params"])
        return (
            with_gradients == len(self.parameters)
            and self._tensors_hold(max_norm, keep_gradients)
            and all(p.grad is not None for p in self.parameters)
        )


class UsedGradients:
    """A hook of an optimizer that notes which gradients its last step has used. A loop that calls ``zero_grad`` before
    ``backward`` leaves such gradients, which must not be used once more."""

    def __init__(self) -> None:
        self._noted: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # by a parameter's id: gradient and version

    @staticmethod
    def of(optimizer: torch.optim.Optimizer) -> UsedGradients:
        """The hook of this kind that the optimizer has, or else a new one."""
        hooks = getattr(optimizer, "_optimizer_step_post_hooks", None)
        for hook in (hooks or {}).values():
            if isinstance(hook, UsedGradients):
                return hook
        made = UsedGradients()
        if hooks is not None:  # which an optimizer lacks whose class does not call torch's constructor
            optimizer.register_step_post_hook(made)
        if optimizer.state:  # it has made steps
            made(optimizer)
        return made

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._noted = {
            id(p): (weakref.ref(p.grad), p.grad._version)
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        }

    def know(self, other: UsedGradients) -> None:
        """Notes the gradients that another optimizer has used, too."""
        self._noted = {**other._noted, **self._noted}

    def drop(self, optimizer: torch.optim.Optimizer) -> None:
        """Sets ``p.grad`` to None where the gradient has been used and has not changed since."""
        if not self._noted:
            return
        for group in optimizer.param_groups:
            for p in group["params"]:
                noted, version = self._noted.get(id(p), (None, 0))
                gradient = None if noted is None else noted()
                if gradient is None or gradient is not p.grad:
                    continue
                if gradient._version != version and (gradient.layout != torch.strided or gradient.any()):  # not zeroed
                    raise RuntimeError(
                        "training_step: backward has added to gradients that the optimizer has used already, or they "
                        "have been changed in place: call optimizer.zero_grad() before the next backward or step"
                    )
                p.grad = None
        self._noted = {}
