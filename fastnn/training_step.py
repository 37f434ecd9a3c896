"""``fastnn.training_step``: forward, loss, backward, clipping and update of a model in one operator call, or in two
where the loss is one of the caller's own that no network has."""

from __future__ import annotations

import inspect
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastnn._extension import load_extension
from fastnn._torch import global_optimizer_hooks, note_step_of
from fastnn.fusion import fuse
from fastnn.graph.forward import asks_for_sizes
from fastnn.graph.rehearsal import needed_inputs, signature_of
from fastnn.graph.training_program import NotANetworkError
from fastnn.nn._hooks import has_global_hooks
from fastnn.ops._autograd import autocast_is_on, is_compiling, transforms_active
from fastnn.training_binding import Binding, UpdateBinding, UsedGradients
from fastnn.training_calls import (
    NeedsAutogradError,
    RefusedError,
    in_one_call,
    in_two_calls,
    steps_in_one_call,
    update_in_one_call,
)
from fastnn.training_epoch import Batches, progress_bar
from fastnn.training_loss import ONE_TENSOR, Form, form_of, tensors_of_target
from fastnn.training_numbers import OPTIMIZERS, check_optimizer, check_parameters
from fastnn.training_ranks import FlatGradients, Ranks
from fastnn.training_reading import OtherParametersError, Reading, ReadingWithLoss

_SETTINGS = ("model", "loss", "optimizer", "max_norm", "keep_gradients", "_ranks")  # what a copy begins with
_SECONDS_TOGETHER = 0.05  # the seconds that one call of an epoch takes: as many steps as fit


class TrainingStep:
    """What :func:`training_step` returns. Call it with an input and a target; it returns the loss, without a graph. A
    model of several inputs gets them from a tuple.

    Gradients that are in ``p.grad`` when a step begins, such as those of micro-batches before it, are added to its own,
    unless the optimizer has used them already; such a step goes the ordinary way. After a step ``p.grad`` is None, or
    with ``keep_gradients`` the step's gradient, clipped, until the next step begins. Parameters of the model that the
    optimizer does not have are not trained, and a step leaves their ``p.grad`` as it was.

    What a step needs of memory it keeps for the next one, up to a quarter of the machine's memory for all steps of the
    process together. It is given back when a step is deleted.
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
        process_group: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"training_step: expected a model that is a torch.nn.Module, got a {type(model).__name__}")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"training_step: expected an optimizer of torch.optim, got a {type(optimizer).__name__}")
        if not callable(loss):
            raise TypeError(f"training_step: expected a loss that can be called, got a {type(loss).__name__}")
        _check_optimizer_call(optimizer)
        if max_norm is not None and not max_norm >= 0:
            raise ValueError(f"training_step: expected max_norm to be at least 0, got {max_norm}")
        wrapped, (model, ranks) = model, Ranks.of(model, process_group)
        self._count = _inputs_of(model)
        if ranks is not None:
            ranks.begin(model, optimizer, broadcast=model is wrapped)
        self._model = fuse(model)
        self._prepare(loss, optimizer, max_norm, keep_gradients, ranks)
        self._read()
        self._join_loss(ONE_TENSOR)
        if strict and self._why:
            raise ValueError(f"training_step: this is not one call: {self._why}")

    def _prepare(
        self,
        loss: Callable[[Any, Any], Tensor],
        optimizer: torch.optim.Optimizer,
        max_norm: Any,
        keep_gradients: bool,
        ranks: Ranks | None,
    ) -> None:
        """Sets all but the model, before anything is read."""
        self._ranks = ranks
        self._is_in_flat = False  # whether the last gradients are in the binding's flat, and not in p.grad
        self._buffers_are_due = True  # whether buffers must be broadcast before the next forward
        self.loss, self._optimizer, self.max_norm, self.keep_gradients = loss, optimizer, max_norm, keep_gradients
        self._reading: Reading | None = None
        self._binding: Binding | None = None
        self._update: UpdateBinding | None = None  # of the updates that follow autograd's backward
        self._read_loss: Any = None  # the loss that was read last
        self._why = ""  # why there is no reading, so that steps go the ordinary way
        self._last_why = ""  # why the last step went the ordinary way
        self._used = UsedGradients.of(optimizer)
        # Of a model whose forward asks for sizes: why it is no network for inputs of these sizes.
        self._why_for_sizes: dict[tuple[torch.Size, ...], str] = {}
        self._refused: dict[tuple[int, ...], int] = {}  # how often operators refused inputs of so many dimensions
        self._was_refused = False  # whether the two calls refused the last step
        self._joined: ReadingWithLoss | None = None  # the last reading of both together; the next may use its trace
        self._apart: set[Form] = set()  # targets with which the model and the loss are no one network
        self._is_unread_copy = False
        weakref.finalize(self, load_extension().release_kept_memory).atexit = False
        self._together: tuple[Any, int] = None, 1  # how many steps go in one call, and with batches of which sizes

    @property
    def model(self) -> nn.Module:
        """The model that is trained. For another model, make another step."""
        return self._model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that makes the steps."""
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        before, self._used = self._used, UsedGradients.of(optimizer)
        self._used.know(before)
        self._optimizer = optimizer
        self._read()

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _SETTINGS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy reads and binds only at its first call: the model may have its own step as an attribute, and then the
        model's copy is still empty here."""
        settings = dict(state)
        self._model = settings.pop("model")
        self._count = _inputs_of(self.model)
        self._prepare(ranks=settings.pop("_ranks"), **settings)
        self._is_unread_copy = True

    def explain(self) -> str:
        """Whether a step is one operator call, and if not, why."""
        if self._is_unread_copy:
            self._read()
        if self._reading is None:
            return f"forward and backward by autograd, {self._average()}{self._kind_of_update()}: {self._why}"
        layers = "; ".join(self._reading.network.describe())
        last = f"; but the last step went the ordinary way: {self._last_why}" if self._last_why else ""
        if self._ranks is not None:
            own_loss = f"the loss by itself ({self._reading.loss_why}), " if self._reading.loss_why else ""
            calls = f"forward and backward by operators, {own_loss}{self._average()}the update by another"
            return f"{calls}: {layers}{last}"
        if self._reading.loss_why:
            return f"two operator calls and between them the loss ({self._reading.loss_why}): {layers}{last}"
        return f"one operator call: {layers}{last}"

    def _kind_of_update(self) -> str:
        """What updates the parameters behind autograd's backward."""
        trained = [p for group in self._optimizer.param_groups for p in group["params"] if p.requires_grad]
        try:
            check_optimizer(self._optimizer)
            check_parameters(trained, self._optimizer)
        except NotANetworkError:
            return "the optimizer's own step"
        return "the optimizer's own step" if self._ranks is not None else "the update by an operator"

    def _average(self) -> str:
        return "" if self._ranks is None else f"an all-reduce over {self._ranks.size} processes, "

    def __call__(self, input: Any, target: Any) -> Tensor:
        """Makes one step on a batch -> the loss before the step. Where several processes train, the loss is that of
        this process's batch."""
        return self._step(input, target) if self._ranks is None else self._step_of_all(self._ranks, input, target)

    def _step(self, input: Any, target: Any) -> Tensor:
        """Makes a step; where several processes train, it computes the gradients only."""
        if self.keep_gradients:
            self._used.drop(self._optimizer)
        self._last_why = self._reason_for_ordinary(input, target)
        loss, self._was_refused = None, False
        if not self._last_why:
            self._join_loss(form_of(target), self._inputs(input), target)
            self._last_why = "" if self._reading is not None else self._why
        if not self._last_why:
            joined = self._reading
            loss = self._step_by_operators(input, target)
            if loss is None and isinstance(joined, ReadingWithLoss) and self._reading is joined:
                # The caller's own loss finds another way, or raises an error of its own.
                self._reading = joined.plain
                self._forget()
                loss = self._step_by_operators(input, target)
                self._apart.add(joined.form)
        if loss is None:
            loss = self._ordinary(input, target)
            if self._was_refused:  # the model takes the input, the operators do not
                dims = _dims(self._inputs(input))
                self._refused[dims] = self._refused.get(dims, 0) + 1
        return loss

    def _step_by_operators(self, input: Any, target: Any) -> Tensor | None:
        """Makes a step in one call or in two -> the loss. None where it has to go the ordinary way."""
        own = self._inputs(input)
        if self._refused.get(_dims(own), 0) >= _MOST_REFUSALS:
            self._last_why = "the operators have refused inputs of so many dimensions"
            return None
        bound = self._bind()
        if bound is None:
            return None
        reading, binding = bound
        inputs = reading.given(own, target)
        if reading.network.prologue is not None:
            try:
                inputs = reading.network.prologue.run(inputs, binding.parameters[0].dtype)
            except Exception as error:  # of any class: the model itself then raises its own
                self._last_why = str(error).partition("\n")[0]
                return None
        if isinstance(reading, ReadingWithLoss):
            return self._step_in_one_call(reading, binding, inputs)
        one_call_would_do = not reading.loss_why and (reading.network.log_softmax != -1 or target.dim() == 1)
        if one_call_would_do:
            loss = self._step_in_one_call(reading, binding, (*inputs, target))
            if loss is not None:
                return loss
            bound = self._bind()
            if bound is None:
                return None
        loss = self._step_in_two_calls(*bound, inputs, target)
        if loss is not None and one_call_would_do:
            reading.loss_why = "its target is none that the operator takes"
        return loss

    def _join_loss(self, form: Form | None, inputs: Sequence[Tensor] | None = None, target: Any = None) -> None:
        """Reads the model and the caller's own loss as one network, if they are one for targets of this form: for any
        inputs, or for inputs and a target of these sizes."""
        plain = self._reading
        if plain is None or not plain.loss_why or form is None or form in self._apart:
            return
        if inputs is not None and not all(map(_is_plain, tensors_of_target(target, form))):
            return
        try:
            self._reading = ReadingWithLoss(plain, form, self._optimizer, inputs, target, self._joined)
        except OtherParametersError as error:
            self._reading, self._why = None, str(error)
            self._forget()
            return
        except NotANetworkError:
            if inputs is not None:
                self._apart.add(form)
            return
        self._joined = self._reading
        self._forget()

    def _step_in_one_call(self, reading: Reading, binding: Binding, given: Sequence[Tensor]) -> Tensor | None:
        """Makes a step with the operator's, or the network's, own loss on inputs and, at last, a target -> the loss.
        None where the operator refuses something. That may be the target: then the caller's own loss takes it, or
        raises an error of its own."""
        random = torch.get_rng_state() if reading.network.draws else None
        try:
            loss, gradients = in_one_call(reading, binding, given)
        except RuntimeError:
            self._undo()
            if random is not None:
                torch.set_rng_state(random)
            return None
        except BaseException:
            self._undo()
            raise
        self._finish(binding, gradients)
        return loss

    def _step_in_two_calls(
        self, reading: Reading, binding: Binding, inputs: Sequence[Tensor], target: Any
    ) -> Tensor | None:
        """Makes a step with the caller's own loss -> the loss. None where it has to go the ordinary way; the reading
        is None too where all steps have to."""
        try:
            loss, gradients, is_updated = in_two_calls(
                reading, binding, inputs, target, self.loss, lambda: self._still_fits(binding)
            )
        except NeedsAutogradError as reason:
            self._undo()
            self._reading, self._why = None, str(reason)
            return None
        except RefusedError as error:
            self._undo()
            self._was_refused = True
            self._last_why = str(error.__cause__).partition("\n")[0]
            return None
        except BaseException:
            self._undo()
            raise
        if is_updated:
            self._finish(binding, gradients)
            return loss
        self._undo()
        for p, gradient in zip(binding.trained(), gradients, strict=True):
            p.grad = gradient if p.requires_grad else None
        if self._ranks is None:
            self._update_from_gradients()
        return loss

    def _still_fits(self, binding: Binding) -> bool:
        """Whether an update by this binding is what the optimizer would do now, after the caller's loss has run. Reads
        the optimizer's settings anew where they have changed."""
        try:
            return (
                binding is self._binding
                and binding.holds(self.max_norm, self.keep_gradients)
                and binding.settings_fit()
            )
        except (KeyError, NotANetworkError):
            return False

    def _finish(self, binding: Binding, gradients: Sequence[Tensor]) -> None:
        """Ends a step that operators have made. Of several processes, the update is still to come."""
        if self._ranks is None:
            self._after_update(binding, binding.trained(gradients) if gradients else ())
        else:
            self._is_in_flat = True

    def accumulate(self, input: Any, target: Any) -> Tensor:
        """Add a batch's gradient to what is in ``p.grad``, without an update -> the batch's loss.

        The next step, of another batch, adds its own gradient and updates: so n - 1 calls of ``accumulate`` and a step
        train on n batches together. Gradients add up as in ``loss.backward()``: for their mean, let the loss divide.
        Several processes do not average them before the step that follows, as in ``no_sync``.
        """
        if self._ranks is not None:
            self._share_buffers(self._ranks, before_step=False)
        model = self.model
        with model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
            return self._backward(input, target)

    def _backward(self, input: Any, target: Any) -> Tensor:
        self._used.drop(self._optimizer)
        loss = self.loss(self._outputs(input), target)
        loss.backward()
        return loss.detach()

    def epoch(
        self,
        input: Any,
        target: Any = None,
        batch_size: int | None = None,
        *,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        drop_last: bool = False,
        progress: bool | None = None,
        scheduler: Any = None,
    ) -> Tensor:
        """Makes one pass over tensors in memory, a step for each batch -> the loss of each batch (batches,).

        The batches and their order are those of ``DataLoader(TensorDataset(input, target), batch_size, shuffle=shuffle,
        generator=generator, drop_last=drop_last)`` from a generator in the same state, and leave it in the same state,
        so that a stock loop gives the same curve. An exception leaves the model after a whole step, and so does Ctrl-C,
        but for what follows the update, such as a batch norm's count of batches.

        Args:
            input: (rows, ...), or a tuple of such tensors; or, alone, an iterable of pairs of an input and a target,
                such as a DataLoader.
            target: (rows, ...), or a tuple of such tensors.
            batch_size: rows of a batch. The last batch is smaller where they do not divide the rows.
            shuffle, generator, drop_last: as DataLoader has them.
            progress: show a bar, where tqdm is installed.
            scheduler: its ``step()`` is called after each step.

        In a process group, each process takes its share of the rows, as from ``DistributedSampler(dataset, size, rank,
        shuffle, seed)``: all give the same tensors, and with ``shuffle`` a generator in the same state, such as
        ``torch.Generator().manual_seed(seed + epoch)``. An iterable of batches is taken as it is: a DataLoader may have
        a DistributedSampler of its own.

        Raises:
            TypeError: the arguments are neither tensors nor an iterable of batches.
            ValueError: there are no rows, not as many in each tensor, or batch_size is below 1; or the processes of a
                group have other rows, or generators in another state.
        """
        if target is None and batch_size is None and not isinstance(input, Tensor):
            several = isinstance(input, (tuple, list)) and any(isinstance(one, Tensor) for one in input)
            if several or shuffle or drop_last or generator is not None:
                raise TypeError("epoch: expected tensors, a target and a batch_size, or only an iterable of batches")
            return self._follow(input, progress_bar(None, progress), scheduler)
        share = None if self._ranks is None else (self._ranks.rank, self._ranks.size)
        batches = Batches(input, target, batch_size, shuffle, generator, drop_last, share)  # type: ignore[arg-type]
        bar = progress_bar(batches.count, progress)
        batches.begin()
        if self._ranks is not None:
            self._ranks.check_same(
                batches.drawn, "epoch: the processes have other rows, or generators in another state"
            )
        if batches.is_drawn_in_turn:
            return self._follow(batches.in_turn(), bar, scheduler)
        if scheduler is not None:
            return self._follow(map(batches.__getitem__, range(batches.count)), bar, scheduler)
        try:
            return self._run(batches, bar)
        finally:
            bar.close()

    def _follow(self, batches: Iterable[Any], bar: Any, scheduler: Any) -> Tensor:
        """Makes a step for each batch."""
        losses = []
        try:
            for x, y in batches:
                losses.append(self(x, y))
                if scheduler is not None:
                    scheduler.step()
                bar.update(1)
        finally:
            bar.close()
        return torch.stack(losses) if losses else torch.empty(0)

    def _run(self, batches: Batches, bar: Any) -> Tensor:
        """Makes many steps in one call, where a step is one call: as many as take `_SECONDS_TOGETHER`, so that Ctrl-C
        and the bar do not wait long. The epoch before knows how many these are, if its batches were as large."""
        losses: list[Tensor] = []
        done, sizes = 0, batches.sizes
        together = self._together[1] if self._together[0] == sizes else 1
        while done < batches.count:
            begin = time.perf_counter()
            some = self._in_one_call_for_many(batches, done, min(batches.count, done + together))
            if some is None:
                some = self(*batches[done])[None]
            losses.append(some)
            done += len(some)
            bar.update(len(some))
            each = (time.perf_counter() - begin) / len(some)
            together = max(1, min(int(_SECONDS_TOGETHER / each), 4 * together))
        self._together = sizes, together
        return torch.cat(losses) if losses else torch.empty(0)

    def _in_one_call_for_many(self, batches: Batches, first: int, last: int) -> Tensor | None:
        """Makes steps on the batches [first, last), or on some of them from the first on -> their losses. None where
        the next step needs a call of its own."""
        if self.keep_gradients or self._ranks is not None:
            return None
        if self._reading is None or not self._reading.is_for_any_sizes or self._reading.network.prologue is not None:
            return None
        if not all(tensor.is_contiguous() for tensor in (*batches.inputs, *batches.targets)):
            return None
        if self._reason_for_ordinary(*batches.rows_of_all):
            return None
        bound = self._bind()
        if bound is None:
            return None
        reading, binding = bound
        if binding.created or reading.loss_why or (reading.form is None and len(batches.targets) != 1):
            return None
        # A step that the operator refuses because of its target has drawn numbers by then, and is made in another way.
        if reading.form is not None and reading.network.draws:
            return None
        if reading.network.log_softmax == -1 and batches.targets[0].dim() != 1:
            return None
        random = torch.get_rng_state() if reading.network.draws else None
        try:
            losses = steps_in_one_call(reading, binding, batches, first, last)
        except RuntimeError:  # a single step then finds another way, or raises the error
            if random is not None:
                torch.set_rng_state(random)
            return None
        self._after_update(binding, ())
        return losses

    def _inputs(self, input: Any) -> Sequence[Tensor]:
        return (input,) if self._count == 1 else input

    def _outputs(self, input: Any) -> Any:
        if self._count == 1:
            return self.model(input)
        if not isinstance(input, (tuple, list)):
            raise TypeError(
                f"training_step: the model takes {self._count} inputs, in a tuple, got a {type(input).__name__}"
            )
        return self.model(*input)

    # ---- what the one call rests on -------------------------------------------------------------------------------

    def _read(self, anew: bool = False, inputs: Sequence[Tensor] | None = None) -> None:
        """Finds out whether operators can make steps of the model, loss and optimizer as they are now, and with inputs
        of these sizes. anew: trace the model again."""
        before = None if anew else self._reading
        if self._read_loss is not self.loss:
            self._apart, self._read_loss = set(), self.loss
        self._reading, self._why, self._is_unread_copy = None, "", False
        self._refused = {}
        if inputs is None:
            self._why_for_sizes = {}
        self._forget()
        self._forget_update()
        try:
            self._reading = Reading(self.model, self.loss, self._optimizer, before, inputs)
        except NotANetworkError as reason:
            self._why = str(reason)

    def _forget(self) -> None:
        """Drops the binding of the parameters and of the optimizer's settings and states."""
        if self._binding is not None:
            self._binding.release()
            self._binding = None

    def _undo(self) -> None:
        if self._binding is not None:
            self._binding.undo()
        self._forget()

    def _reason_for_ordinary(self, input: Any, target: Any) -> str:
        """The reason why a step has to go the ordinary way, or an empty text where it does not. Reads model and loss
        anew where they are no longer what was read."""
        if self._is_unread_copy:
            self._read()
        reading = self._reading
        if isinstance(reading, ReadingWithLoss) and reading.form != form_of(target):
            reading = self._reading = reading.plain
            self._forget()
        if reading is None and not asks_for_sizes(self.model) and self.loss is self._read_loss:
            return self._why
        inputs = (input,) if self._count == 1 else input if isinstance(input, (tuple, list)) else ()
        if len(inputs) != self._count:
            return "it was not given as many inputs as the model takes"
        given = inputs if reading is None else reading.given(inputs, target)
        for one in given:
            if not _is_plain(one):
                return "an input or a target was no plain tensor on the CPU, or one that requires a gradient"
        if autocast_is_on() or transforms_active() or is_compiling() or not torch.is_grad_enabled():
            return "autocast, torch.func, torch.compile or torch.no_grad was on"
        if has_global_hooks() or torch.is_anomaly_enabled():
            return "there were hooks of all modules, or anomalies were looked for"
        holds = reading is not None and reading.holds(self.loss)
        if reading is None or not holds or not reading.fits(given):
            if reading is not None and not holds:
                self._apart = set()
            sizes = tuple(one.shape for one in inputs)
            if sizes in self._why_for_sizes:
                return self._why_for_sizes[sizes]
            self._read(inputs=inputs)
            reading = self._reading
            if reading is None:
                if len(self._why_for_sizes) < _MOST_SIZES:
                    self._why_for_sizes[sizes] = self._why
                return self._why
            if not self.model.training:
                return "the model was in eval mode"
        if reading.form is None and not reading.loss_why and (type(target) is not Tensor or target.requires_grad):
            return "its target was no plain tensor, or one that requires a gradient"
        if self._has_hooks():
            return "the optimizer had hooks"
        if any(one.numel() == 0 for one in given):
            return "its input was empty"
        return ""

    def _bind(self) -> tuple[Reading, Binding] | None:
        """Binds what the model and the optimizer have now, where the last binding no longer holds -> the reading and
        the binding. None where the model has lost a parameter, `p.grad` has gradients that count, or the optimizer has
        what the operators do not take."""
        reading, binding, optimizer = self._reading, self._binding, self._optimizer
        assert reading is not None
        holds = binding is not None and binding.holds(self.max_norm, self.keep_gradients)
        if not holds:
            self._used.drop(optimizer)
            if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
                self._last_why = "gradients lay in p.grad, which count too"
                return None
            holds = binding is not None and binding.holds(self.max_norm, self.keep_gradients)
        try:
            if binding is not None and holds and binding.settings_fit():
                return reading, binding
            tensors = reading.tensors()
            if list(map(id, tensors)) != list(map(id, reading.tensors_when_read)):
                self._read(anew=True)  # they may be of other sizes, or be tied in another way
                return None if self._reading is None else self._bind()
            check_optimizer(optimizer)
            reading.check(tensors, optimizer)
            self._forget()
            self._binding = Binding(reading, tensors, optimizer, self.max_norm, self.keep_gradients)
            if self._ranks is not None:
                self._binding.flat = FlatGradients(optimizer, self._binding.trained())
        except (KeyError, NotANetworkError):
            self._undo()
            self._read()
            return None
        return reading, self._binding

    def _after_update(self, binding: Binding, gradients: Sequence[Tensor]) -> None:
        torch.autograd.graph.increment_version(binding.parameters)
        if self.keep_gradients:
            for p, gradient in zip(binding.trained(), gradients, strict=True):
                p.grad = gradient
            self._used(self._optimizer)
        note_step_of(self._optimizer)
        if binding.created:  # The states that this step has created are the optimizer's own from now on.
            self._forget()
            self._forget_update()

    # ---- and the ordinary one ---------------------------------------------------------------------------------------

    def _ordinary(self, input: Any, target: Any) -> Tensor:
        self._used.drop(self._optimizer)
        own = [p for group in self._optimizer.param_groups for p in group["params"]]
        known = set(map(id, own))
        # No step changes gradients of parameters that the optimizer does not have, and one that raises changes none.
        others = _gradients_of(p for p in self.model.parameters() if id(p) not in known)
        before = _gradients_of(own)
        try:
            loss = self._backward(input, target)
        except BaseException:
            _give_back(before)
            raise
        finally:
            _give_back(others)
        if self._ranks is None:
            self._update_from_gradients()
        return loss

    def _update_from_gradients(self, by_operator: bool = True) -> None:
        """Clips the gradients that lie in ``p.grad``, and updates: by an operator, or by the optimizer's own step.
        Where that raises, the gradients are dropped, because the next step would add them to its own."""
        try:
            if not (by_operator and self._update_by_operator()):
                self._update_by_optimizer()
        except BaseException:
            self._optimizer.zero_grad()
            raise

    def _update_by_operator(self) -> bool:
        """Clips the gradients that autograd has left in ``p.grad``, and updates. Returns False, and has done nothing,
        where the operator does not take the gradients, the parameters or the optimizer."""
        optimizer = self._optimizer
        if self._has_hooks() or is_compiling():
            return False
        try:
            binding = self._update
            if binding is None or not (binding.holds(self.max_norm, self.keep_gradients) and binding.settings_fit()):
                self._forget_update()
                self._update = binding = UpdateBinding(optimizer, self.max_norm, self.keep_gradients)
        except (KeyError, NotANetworkError):
            return False
        try:
            kept = update_in_one_call(binding, [p.grad.contiguous() for p in binding.parameters])  # type: ignore[union-attr]
        except RuntimeError:  # a gradient is sparse, or of another dtype, or of a subclass
            binding.undo()
            self._forget_update()
            return False
        optimizer.zero_grad()
        self._after_update(binding, kept)
        return True

    def _has_hooks(self) -> bool:
        """Whether somebody wants to be called before or after the optimizer's step."""
        optimizer = self._optimizer
        own = len(getattr(optimizer, "_optimizer_step_post_hooks", ()))  # one is UsedGradients
        return own != 1 or bool(optimizer._optimizer_step_pre_hooks) or any(global_optimizer_hooks)

    def _forget_update(self) -> None:
        if self._update is not None:
            self._update.release()
            self._update = None

    def _update_by_optimizer(self) -> None:
        if self.max_norm is not None:
            parameters = [p for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)
        self._optimizer.step()
        if self.keep_gradients:
            self._used(self._optimizer)  # since a step of the optimizer's own class may call no hooks
        else:
            self._optimizer.zero_grad()

    # ---- of several processes ---------------------------------------------------------------------------------------

    def _step_of_all(self, ranks: Ranks, input: Any, target: Any) -> Tensor:
        """Computes this process's gradients, averages them over all processes, and makes the update, which is then the
        same in all. Where one process raises before the update, all raise, and none makes it."""
        self._share_buffers(ranks, before_step=True)
        self._is_in_flat = False
        try:
            loss = self._step(input, target)
            flat = self._binding.flat if self._binding is not None and self._is_in_flat else None
            if flat is None:
                flat = FlatGradients(self._optimizer)
                flat.take()
            else:
                flat.note_program()
        except Exception:
            self._drop_gradients()
            with suppress(RuntimeError):  # the error of the step itself says more
                FlatGradients(self._optimizer).average(ranks, failed=True)
            raise
        try:
            all_by_operators = flat.average(ranks)
        except BaseException:
            self._drop_gradients()
            raise
        binding = self._binding
        if binding is None or not all_by_operators or not self._still_fits(binding):
            self._undo()
            flat.give()
            self._update_from_gradients(by_operator=False)
            return loss
        self._after_update(binding, update_in_one_call(binding, flat.of_program))
        return loss

    def _share_buffers(self, ranks: Ranks, before_step: bool) -> None:
        """Copies the first process's buffers to all processes, before the first forward after each step, as
        DistributedDataParallel does."""
        if self._buffers_are_due and ranks.shares_buffers:
            ranks.broadcast(self.model.buffers())
        self._buffers_are_due = before_step

    def _drop_gradients(self) -> None:
        self._undo()
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                p.grad = None


def training_step(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    max_norm: float | None = None,
    keep_gradients: bool = False,
    strict: bool = False,
    process_group: Any = None,
) -> TrainingStep:
    """A whole training step as one call: ``loss_value = step(input, target)`` runs forward, loss, backward, clipping
    and the optimizer's update in one operator, where model, loss and optimizer allow it; in two, with the loss between
    them, where only the loss doesn't; else the ordinary way: autograd on fused layers, then clipping and update in one
    operator, or by the optimizer where that operator has no such optimizer. ``step.explain()`` says which, and why.

    Models allow it that consist of layers which a network has, in float32 and float64 on the CPU: convolutions,
    transposed ones too, batch, layer, group, instance and RMS norms, linear and recurrent layers and cells with states,
    embeddings, activations, pools, dropouts, attention, with masks of padding and of later steps too, arithmetic,
    products, softmax, means, sums and maxima, constants, and what moves elements (views, slices, concatenations,
    repetitions, pixel shuffles, enlarged images); with branches and skips, shared layers, several inputs and several
    results, of which the loss is then the caller's own. A loss of the caller's own is part of the one call where it
    consists of the same. State and learning rates stay in the optimizer, so that going back to
    ``loss.backward(); optimizer.step()`` is possible at any step, as are schedulers and checkpoints. Where the loss
    raises, a step in one or two calls takes back what forward has changed: running statistics and torch's generator.

    Args:
        model: is fused in place (:func:`fastnn.fuse`).
        loss: a module or function of torch's: mse_loss, l1_loss, smooth_l1_loss, huber_loss, cross_entropy,
            nll_loss behind log_softmax, binary_cross_entropy_with_logits, with reduction "mean" or "sum"; or anything
            that gives one number for an output and a target (a tensor, or several in a tuple or list). It is followed
            as a forward is, anew where something that it reads has changed; where it cannot be, it is called between
            forward and backward. One that then uses parameters by itself takes the ordinary way, after a first step in
            which it is called twice.
        optimizer: SGD, Adam, AdamW, RMSprop, Adagrad, Adamax or NAdam; any other takes the ordinary way, with its own
            step.
        max_norm: clip the norm of the gradient, as ``torch.nn.utils.clip_grad_norm_`` does: that of all parameters
            which the optimizer has.
        keep_gradients: leave the gradients in ``p.grad``, where they stay None otherwise.
        strict: raise where steps would go the ordinary way.
        process_group: of torch.distributed, whose processes train the model together, each on batches of its own, as
            with DistributedDataParallel; of a model in DistributedDataParallel its own group is taken, and what is in
            it is trained. All processes begin with the first one's parameters and buffers. A step averages the
            gradients of all processes in one all-reduce, before clipping, and returns the loss of its own batch;
            buffers come from the first process before the first forward after each step. All make as many steps. Where
            a process raises within a step, all raise, none makes an update, and accumulated gradients are dropped. A
            model of FSDP2 averages by itself, and gets no process_group.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: with ``strict``, steps would go the ordinary way, and why; or ``max_norm`` is negative; or the
            processes have models or optimizers of other parameters.
        RuntimeError: by a step, where another process raises in it, or does not come within the group's timeout.
    """
    return TrainingStep(
        model, loss, optimizer, max_norm=max_norm, keep_gradients=keep_gradients, strict=strict,
        process_group=process_group,
    )  # fmt: skip


def _gradients_of(parameters: Iterable[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
    return [(p, None if p.grad is None else p.grad.clone()) for p in parameters]


def _give_back(gradients: Iterable[tuple[Tensor, Tensor | None]]) -> None:
    for parameter, gradient in gradients:
        parameter.grad = gradient


_MOST_SIZES = 256  # for at most so many sizes of inputs it is kept why a model is no network for them
_MOST_REFUSALS = 3  # after so many refusals, inputs of so many dimensions go the ordinary way at once


def _check_optimizer_call(optimizer: torch.optim.Optimizer) -> None:
    """TypeError where the optimizer's step cannot be called without a closure."""
    kind = type(optimizer)
    if kind in OPTIMIZERS:
        return
    try:
        signature = inspect.signature(kind.step)
    except (TypeError, ValueError):  # a function written in C may have no signature
        return
    try:
        signature.bind(optimizer)
    except TypeError as error:
        words = f"a step gives no closure, and {kind.__name__}.step takes {signature}: {error}"
        raise TypeError(f"training_step: {words}") from None


def _is_plain(tensor: Any) -> bool:
    """Whether a tensor is one that operators of a step take, and whose gradient nobody asks for."""
    is_cpu = type(tensor) is Tensor and tensor.is_cpu
    return is_cpu and not tensor.requires_grad and not tensor.is_inference()


def _dims(inputs: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple([one.dim() for one in inputs])


def _inputs_of(model: nn.Module) -> int:
    """How many inputs the model needs. TypeError where it takes none."""
    signature = signature_of(model)
    count = max(1, needed_inputs(signature))
    if signature is None:
        return count
    try:
        signature.bind(*(None,) * count)
    except TypeError as error:
        words = f"a step gives a model its inputs, and {type(model).__name__} takes {signature}: {error}"
        raise TypeError(f"training_step: {words}") from None
    return count
