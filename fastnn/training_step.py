"""``fastnn.training_step``: forward, loss, backward, clipping and update of a model in one operator call, or in two
where the loss is the caller's own."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from operator import attrgetter, getitem, itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnn._torch import HOOKS, TENSOR_HOOKS, global_optimizer_hooks, note_step_of
from fastnn.fusion import fuse
from fastnn.graph.chain import Chain, ChainError, read_chain
from fastnn.graph.forward import FusedForward, Program
from fastnn.graph.guard import ABSENT, Guard
from fastnn.nn._hooks import has_global_hooks
from fastnn.ops._autograd import autocast_is_on, is_compiling, transforms_active
from fastnn.ops.training_step import (
    bind_training_step_op,
    bound_training_step_op,
    release_training_step,
    training_step_backward_op,
    training_step_forward_op,
    training_step_op,
)
from fastnn.training_numbers import (
    IS_FIRST,
    OPTIMIZERS,
    check_optimizer,
    check_parameters,
    kept_by,
    new_number,
    numbers_of_group,
    numbers_of_loss,
    settings_of_loss,
)

_call, _call_bound, _call_forward, _call_backward, _call_bind = (
    op._op
    for op in (
        *(training_step_op, bound_training_step_op, training_step_forward_op, training_step_backward_op),
        bind_training_step_op,
    )
)
_get_flags = attrgetter("requires_grad", *TENSOR_HOOKS)
_get_all_flags = attrgetter("requires_grad", *TENSOR_HOOKS, "grad")


class TrainingStep:
    """What :func:`training_step` returns. Call it with an input and a target; it returns the loss, without a graph.

    Gradients that lie in ``p.grad`` when a step begins, as those of micro-batches before it, count, but for those that
    the optimizer has used already; such a step goes the ordinary way. After a step ``p.grad`` is None, or with
    ``keep_gradients`` the step's gradient, clipped, until the next step begins.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        max_norm: float | None = None,
        keep_gradients: bool = False,
        strict: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"training_step: expected a model that is a torch.nn.Module, got a {type(model).__name__}")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"training_step: expected an optimizer of torch.optim, got a {type(optimizer).__name__}")
        if not callable(loss):
            raise TypeError(f"training_step: expected a loss that can be called, got a {type(loss).__name__}")
        _check_calls(model, optimizer)
        if max_norm is not None and not max_norm >= 0:
            raise ValueError(f"training_step: expected max_norm to be at least 0, got {max_norm}")
        self.model = fuse(model)
        self._prepare(loss, optimizer, max_norm, keep_gradients)
        self._read()
        if strict and self._why:
            raise ValueError(f"training_step: this is not one call: {self._why}")

    def _prepare(
        self, loss: Callable[[Any, Any], Tensor], optimizer: torch.optim.Optimizer, max_norm: Any, keep_gradients: bool
    ) -> None:
        """Sets all but the model, before anything is read."""
        self.loss, self._optimizer, self.max_norm, self.keep_gradients = loss, optimizer, max_norm, keep_gradients
        self._why = ""  # why steps go the ordinary way
        self._loss_why = ""  # the loss is not the operator's
        self._last_why = ""  # the last step went the ordinary way
        self._chain: Chain | None = None
        self._program: Program | None = None
        self._no_grad = torch.no_grad()  # made once: 0.5 us
        self._release: Any = lambda: None  # what is bound
        self._forward: Any = None  # the model's, when it was read
        self._retries = False  # a step that one call did not take
        self._used = _UsedGradients.of(optimizer)
        self._is_unread_copy = False
        self._forget()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What makes the steps."""
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        before, self._used = self._used, _UsedGradients.of(optimizer)
        self._used.know(before)
        self._optimizer = optimizer
        self._read()

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("model", "loss", "optimizer", "max_norm", "keep_gradients")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy reads and binds anew: at its first call, for a model that has its own step as an attribute is still
        empty here."""
        settings = dict(state)
        self.model = settings.pop("model")
        self._prepare(**settings)
        self._is_unread_copy = True

    def explain(self) -> str:
        """Whether a step is one operator call, and if not, why."""
        if self._is_unread_copy:
            self._read()
        if self._chain is None or self._why:
            return f"forward and backward by autograd, the optimizer's own step: {self._why}"
        stages = "; ".join(self._chain.describe())
        last = f"; but the last step went the ordinary way: {self._last_why}" if self._last_why else ""
        if self._loss_why:
            return f"two operator calls and between them the loss ({self._loss_why}): {stages}{last}"
        return f"one operator call: {stages}{last}"

    def __call__(self, input: Any, target: Any) -> Tensor:
        """One step on a batch -> the loss, as it was before the step."""
        if self.keep_gradients:
            self._used.drop(self._optimizer)
        if not (self._is_due(input, target) and self._is_bound()):
            return self._ordinary(input, target)
        assert self._chain is not None
        at_once = not self._loss_why and (self._chain.log_softmax != -1 or target.dim() == 1)
        random = torch.get_rng_state() if at_once and self._chain.draws else None
        try:
            loss, gradients = self._in_one_call(input, target) if at_once else self._in_two_calls(input, target)
        except _OtherLeavesError:
            self._undo()
            self._chain = self._program = None
            self._why = "the loss uses parameters by itself"
            return self._ordinary(input, target)
        except _RefusedError:
            self._undo()
            return self._ordinary(input, target)
        except BaseException as error:
            self._undo()
            if not (at_once and isinstance(error, RuntimeError)) or self._retries:
                raise
        else:
            self._after(gradients)
            return loss
        # A target that the operator does not take may be good for the loss itself; if not, it has words for it. What
        # else the operator does not take, the ordinary way may.
        if random is not None:
            torch.set_rng_state(random)
        self._loss_why, self._retries = _OTHER_TARGET, True
        try:
            loss = self(input, target)
            if not self._parameters:  # it was the ordinary way
                self._loss_why = ""
        except BaseException:
            self._loss_why = ""
            raise
        finally:
            self._retries = False
        return loss

    # ---- the one call ---------------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Finds out whether there is one call for the model, loss and optimizer as they are."""
        program, self._chain, self._program = self._program, None, None
        self._is_unread_copy = False
        self._why = self._loss_why = ""
        self._forget()
        try:
            forward: Any = self.model.__dict__.get("forward")
            if any(self.model.__dict__[name] for name in HOOKS):
                raise ChainError("the model has hooks")
            if program is None or forward is not self._forward or not program.holds():
                program = forward.program(now=True) if isinstance(forward, FusedForward) else None
            self._forward = forward
            if program is None:
                raise ChainError(getattr(forward, "why", None) or "the model cannot be traced")
            check_optimizer(self._optimizer)
            chain = read_chain(program)
            self._parameter_owners, self._parameter_names = (
                [own for own, _ in chain.sources],
                [name for _, name in chain.sources],
            )
            check_parameters(list(map(getitem, self._parameter_owners, self._parameter_names)), self._optimizer)
        except ChainError as reason:
            self._why = str(reason)
            return
        self._chain, self._program = chain, program
        self._loss_numbers, self._loss_weight = [0.0] * 4, None
        self._loss_read, self._loss_settings = self.loss, settings_of_loss(self.loss)
        try:
            self._loss_numbers, self._loss_weight = numbers_of_loss(self.loss, chain.log_softmax is not None)
        except ChainError as reason:
            self._loss_why = str(reason)

    def _forget(self) -> None:
        """Drops what was made of the parameters, and of the optimizer's settings and state."""
        self._release()
        # Of what it was made: tensors and what holds them, whether they require grad and have hooks, max_norm, the
        # groups' settings.
        self._guard: Guard | None = None
        self._flags: list[Any] = []
        self._bound_norm: float | None = None
        self._settings: list[Any] = []
        self._numbers: Tensor | None = None
        self._parameters: list[Tensor] = []
        self._states: list[Tensor] = []  # the optimizer's, as the operators take them
        self._kept: list[tuple[str, ...]] = []  # of each group: see kept_by
        self._layout: list[int] = []
        self._bound: Tensor | None = None  # all of these, for the one call
        self._get_settings: list[Callable[[Any], Any]] = []
        # Parameters for which this step has made some of the optimizer's state, and what there was before.
        self._created: list[tuple[Tensor, dict[str, Any]]] = []

    def _undo(self) -> None:
        for parameter, before in self._created:
            if before:
                self._optimizer.state[parameter] = before
            else:
                del self._optimizer.state[parameter]
        self._forget()

    def _is_due(self, input: Any, target: Any) -> bool:
        """Whether such a call is one for the operators at all; if not, `_last_why` says why."""
        self._last_why = self._why_not_due(input, target)
        return not self._last_why

    def _why_not_due(self, input: Any, target: Any) -> str:
        if self._is_unread_copy:
            self._read()
        if self._chain is None or self._program is None:
            return self._why
        if type(input) is not Tensor or not input.is_cpu or input.requires_grad:
            return "its input was no plain tensor on the CPU, or one that requires a gradient"
        if not self._loss_why and (type(target) is not Tensor or target.requires_grad):
            return "its target was no plain tensor, or one that requires a gradient"
        if autocast_is_on() or transforms_active() or is_compiling() or not torch.is_grad_enabled():
            return "autocast, torch.func, torch.compile or torch.no_grad was on"
        if has_global_hooks() or any(global_optimizer_hooks) or torch.is_anomaly_enabled():
            return "there were hooks of all modules or optimizers, or anomalies were looked for"
        if not (self._model_holds() and self._program.holds() and self._chain.guard.holds() and self._loss_holds()):
            self._read()
            if self._chain is None:
                return self._why
            if not self.model.training:
                return "the model was in eval mode"
        optimizer = self._optimizer
        if optimizer._optimizer_step_pre_hooks or len(optimizer._optimizer_step_post_hooks) != 1:  # _UsedGradients
            return "the optimizer had hooks"
        if input.dim() not in self._chain.dims or input.numel() == 0:
            return "its input was empty, or of other dimensions than a batch has"
        return ""

    def _model_holds(self) -> bool:
        """Whether calling the model is still what was read, and that in training."""
        own = self.model.__dict__
        return own["training"] and own.get("forward") is self._forward

    def _loss_holds(self) -> bool:
        """Whether the loss is as it was read."""
        try:
            settings = self._loss_settings
            return self.loss is self._loss_read and (not settings or settings == settings_of_loss(self.loss))
        except RuntimeError:  # a tensor compared with another
            return False

    def _is_bound(self) -> bool:
        """Sees to it that what is bound is what the model and the optimizer have; not where the model has lost a
        parameter, or the optimizer got what operators do not take."""
        optimizer = self._optimizer
        is_as_bound = self._is_as_bound()
        if not is_as_bound:
            self._used.drop(optimizer)
            if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
                self._last_why = "gradients lay in p.grad, which count too"
                return False
            is_as_bound = self._is_as_bound()
        try:
            if is_as_bound:
                if self._settings == self._settings_now():
                    return True
                check_optimizer(optimizer)
                if self._kept == [kept_by(optimizer, group) for group in optimizer.param_groups]:
                    self._write_numbers()
                    return True
            parameters = list(map(getitem, self._parameter_owners, self._parameter_names))
            if self._parameters and list(map(id, parameters)) != list(map(id, self._parameters)):
                # They may be of other sizes.
                self._program = None
                self._read()
                return self._chain is not None and self._is_bound()
            check_optimizer(optimizer)
            check_parameters(parameters, optimizer)
            self._bind(parameters)
        except (KeyError, ChainError):
            self._undo()
            self._read()
            return False
        return True

    def _is_as_bound(self) -> bool:
        """Whether the model's and the optimizer's tensors are, whatever the optimizer's settings."""
        return (
            self._guard is not None
            and self._guard.holds()
            and self._flags == self._flags_now()
            and self._bound_norm == self.max_norm
            and not (self.keep_gradients and any(p.grad is not None for p in self._parameters))
        )

    def _flags_now(self) -> list[Any]:
        return list(map(_get_flags if self.keep_gradients else _get_all_flags, self._parameters))

    def _settings_now(self) -> list[Any]:
        return [get(group) for get, group in zip(self._get_settings, self._optimizer.param_groups, strict=True)]

    def _bind(self, parameters: list[Tensor]) -> None:
        assert self._chain is not None
        optimizer = self._optimizer
        self._forget()
        self._parameters = parameters
        self._kept = [kept_by(optimizer, group) for group in optimizer.param_groups]
        places = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        for p in parameters:
            group = places[id(p)] if p.requires_grad else -1
            self._layout += [group, self._take_states(p, self._kept[group]) if p.requires_grad else 0]
        self._write_numbers()
        with self._no_grad:
            self._bound = _call_bind(parameters, self._states, self._chain.text, self._loss_weight, self._layout)
        self._release = weakref.finalize(self, release_training_step, int(self._bound))
        self._release.atexit = False
        self._bound_norm = self.max_norm
        self._flags = [tuple(dict(f) if isinstance(f, dict) else f for f in flags) for flags in self._flags_now()]
        self._guard = Guard(by_value=False)
        own: dict[str, Any] = optimizer.__dict__
        for name in ("param_groups", "state", "step"):  # a scheduler puts a step there
            self._guard.note_item(own, name, own.get(name, ABSENT))
        for group_of_settings in optimizer.param_groups:
            self._guard.note_item(group_of_settings, "params", group_of_settings["params"])
            self._guard.note_contents(group_of_settings["params"])
        for container in (*self._parameter_owners, optimizer.param_groups, optimizer.state, *optimizer.state.values()):
            self._guard.note_contents(container)
        self._guard.seal()

    def _take_states(self, parameter: Tensor, kept: tuple[str, ...]) -> int:
        """Adds a parameter's state to the rest, made where there is none yet; its bits in the layout."""
        state = self._optimizer.state.get(parameter, {})
        before, names = dict(state), [name for name in kept if name]
        bits = sum(1 << i for i, name in enumerate(kept) if name)
        row = OPTIMIZERS[type(self._optimizer)]
        if row.name == "SGD":
            if names and state.get(names[0]) is None:
                state[names[0]] = torch.zeros_like(parameter)
                bits |= IS_FIRST
        elif not state and row.name != "Adagrad":  # which makes its states when it is made
            state.update({name: new_number(value) for name, value in row.numbers})
            state.update({name: torch.zeros_like(parameter) for name in names})
        self._states += [state[name] for name in (*[name for name, _ in row.numbers], *names)]
        if any(before.get(name) is not tensor for name, tensor in state.items()):
            self._optimizer.state[parameter] = state
            self._created.append((parameter, before))
        return bits

    def _write_numbers(self) -> None:
        groups, row = self._optimizer.param_groups, OPTIMIZERS[type(self._optimizer)]
        max_norm = -1.0 if self.max_norm is None else float(self.max_norm)
        numbers = [*self._loss_numbers, float(row.kind), max_norm]
        for group in groups:
            numbers += numbers_of_group(row, group)
        self._numbers = torch.tensor(numbers, dtype=torch.float64)
        self._get_settings = [itemgetter(*filter(group.__contains__, row.group_settings)) for group in groups]
        self._settings = self._settings_now()

    def _in_one_call(self, input: Tensor, target: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        assert self._chain is not None
        with self._no_grad:
            loss: Tensor
            gradients: Sequence[Tensor] = ()
            if not self.keep_gradients:
                loss = _call_bound(input, target, self._bound, self._numbers)
            else:
                loss, gradients = _call(
                    input, target, self._parameters, self._states, self._chain.text, self._loss_weight, self._layout,
                    self._numbers, True,
                )  # fmt: skip
        self._count_batches()
        return loss, gradients

    def _in_two_calls(self, input: Tensor, target: Any) -> tuple[Tensor, list[Tensor]]:
        """With the caller's own loss."""
        assert self._chain is not None
        text = self._chain.text
        undo = self._copy_of_forward()
        try:
            with self._no_grad:
                output, saved = _call_forward(input, self._parameters, text)
        except RuntimeError as error:
            undo()
            raise _RefusedError from error
        try:
            return self._from_output(input, target, output, saved)
        except BaseException:
            undo()
            raise

    def _copy_of_forward(self) -> Callable[[], None]:
        """What a forward changes; calling the result takes that back."""
        random = torch.get_rng_state()
        statistics = [(p, p.clone()) for p in self._parameters if not isinstance(p, nn.Parameter)]
        counters = [(own[name], own[name].clone()) for own, name in self._chain.counters if own.get(name) is not None]  # type: ignore[union-attr]

        def undo() -> None:
            torch.set_rng_state(random)
            with torch.no_grad():
                for tensor, value in (*statistics, *counters):
                    tensor.copy_(value)

        return undo

    def _from_output(self, input: Tensor, target: Any, output: Tensor, saved: Any) -> tuple[Tensor, list[Tensor]]:
        """Loss, backward and update of a forward."""
        assert self._chain is not None
        text, log_softmax = self._chain.text, self._chain.log_softmax
        self._count_batches()
        output.requires_grad_()
        # Not the leaf itself, which the loss could not change in place.
        scores = output.clone() if log_softmax is None else F.log_softmax(output, log_softmax)
        loss = self.loss(scores, target)
        if _reaches_others(loss, output):
            raise _OtherLeavesError
        loss.backward()
        if not self.keep_gradients and any(p.grad is not None for p in self._parameters):  # by way of a checkpoint
            for p in self._parameters:
                p.grad = None
            raise _OtherLeavesError
        if output.grad is None:
            raise RuntimeError("training_step: the loss does not depend on the model's output")
        try:
            with self._no_grad:
                gradients = _call_backward(
                    output.grad, input, self._parameters, self._states, saved, text, self._layout, self._numbers,
                    self.keep_gradients,
                )  # fmt: skip
        except RuntimeError as error:
            raise _RefusedError from error
        return loss.detach(), gradients

    def _count_batches(self) -> None:
        for own, name in self._chain.counters:  # type: ignore[union-attr]
            if own.get(name) is not None:
                own[name].add_(1)

    def _after(self, gradients: Sequence[Tensor]) -> None:
        torch.autograd.graph.increment_version(self._parameters)
        if self.keep_gradients:
            for p, gradient in zip(self._parameters, gradients, strict=True):
                if p.requires_grad:
                    p.grad = gradient
            self._used(self._optimizer)
        note_step_of(self._optimizer)
        if self._created:  # the first step of a momentum is over
            self._forget()

    # ---- and the ordinary one ---------------------------------------------------------------------------------------

    def _ordinary(self, input: Any, target: Any) -> Tensor:
        self._used.drop(self._optimizer)
        loss = self.loss(self.model(input), target)
        loss.backward()
        if self.max_norm is not None:
            parameters = [p for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)
        self._optimizer.step()
        if not self.keep_gradients:
            self._optimizer.zero_grad()
        return loss.detach()


def training_step(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    max_norm: float | None = None,
    keep_gradients: bool = False,
    strict: bool = False,
) -> TrainingStep:
    """A whole training step as one call: ``loss_value = step(input, target)`` runs forward, loss, backward, clipping
    and the optimizer's update in one operator, where model, loss and optimizer allow it; in two, with the loss between
    them, where only the loss doesn't; else the ordinary way, on fused layers. ``step.explain()`` says which, and why.

    Models that are one chain allow it, in float32 and float64 on the CPU: convolutions, with ReLU and max-pool, batch
    norms, linear layers, activations, adaptive average pools, flattenings, Dropout, and recurrent layers, of which all
    steps or the last go on. The optimizer's state is its own, and so are its learning rates: going back to
    ``loss.backward(); optimizer.step()`` is possible at any step, as are schedulers and checkpoints.

    Args:
        model: is fused in place (:func:`fastnn.fuse`).
        loss: a module or function of torch's: mse_loss, l1_loss, smooth_l1_loss, huber_loss, cross_entropy,
            nll_loss behind log_softmax, binary_cross_entropy_with_logits, with reduction "mean" or "sum"; or anything
            that gives one number for an output and a target, which is called between forward and backward. One that
            uses parameters by itself takes the ordinary way, after a first step in which it is called twice.
        optimizer: SGD, Adam, AdamW, RMSprop, Adagrad, Adamax or NAdam; any other takes the ordinary way.
        max_norm: clip the gradient's norm, as ``torch.nn.utils.clip_grad_norm_``.
        keep_gradients: leave the gradients in ``p.grad``, where they stay None otherwise.
        strict: raise where steps would go the ordinary way.

    Raises:
        TypeError: arguments that are no such things.
        ValueError: with ``strict``, why they would.
    """
    return TrainingStep(model, loss, optimizer, max_norm=max_norm, keep_gradients=keep_gradients, strict=strict)


class _UsedGradients:
    """A hook of an optimizer that notes which gradients its last step has used. A loop that calls ``zero_grad`` before
    ``backward`` leaves such gradients, which are not to be used once more."""

    def __init__(self) -> None:
        self._noted: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # by parameters' numbers: gradient and version

    @staticmethod
    def of(optimizer: torch.optim.Optimizer) -> _UsedGradients:
        """The optimizer's one."""
        for hook in optimizer._optimizer_step_post_hooks.values():
            if isinstance(hook, _UsedGradients):
                return hook
        made = _UsedGradients()
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

    def know(self, other: _UsedGradients) -> None:
        """Counts what another optimizer has used as used."""
        self._noted = {**other._noted, **self._noted}

    def drop(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes gradients away that have been used and are as they were."""
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


_OTHER_TARGET = "its target is none that the operator takes"


def _check_calls(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """TypeError where a step can call neither the model with one input, nor the optimizer's step without a closure."""
    optimizer_class = type(optimizer)
    for called, given, what in (
        (model.forward, (None,), f"a step gives a model one input, and {type(model).__name__} takes"),
        (optimizer_class.step, (optimizer,), f"a step gives no closure, and {optimizer_class.__name__}.step takes"),
    ):
        try:
            signature = inspect.signature(called)
        except (TypeError, ValueError):  # a function of C says nothing
            continue
        try:
            signature.bind(*given)
        except TypeError as error:
            raise TypeError(f"training_step: {what} {signature}: {error}") from None


class _RefusedError(Exception):
    """Two calls do not take the model's tensors."""


class _OtherLeavesError(Exception):
    """A loss has gradients for more than the model's output."""


def _reaches_others(loss: Tensor, output: Tensor) -> bool:
    """Whether backward would reach a leaf besides the output: a penalty on parameters, for example."""
    own = torch.autograd.graph.get_gradient_edge(output).node
    nodes, seen = [loss.grad_fn], {None, own}
    while nodes:
        node = nodes.pop()
        if node in seen or node is None:
            continue
        if node.name() == "torch::autograd::AccumulateGrad":
            return True
        seen.add(node)
        nodes += [follower for follower, _ in node.next_functions]
    return False
