"""The operator calls that make a training step: one call, or two with the caller's own loss between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnn._torch import pytree
from fastnn.ops import training_step as operators
from fastnn.ops.network_training import forget_pass, network_backward, network_with_pass
from fastnn.training_binding import Binding
from fastnn.training_epoch import Batches
from fastnn.training_reading import Reading


class RefusedError(Exception):
    """The operators of the two calls do not take the model's tensors."""


class NeedsAutogradError(Exception):
    """The loss depends on more than the values of the model's outputs: on other tensors that need gradients, on the
    outputs' graph, or on the memory that several outputs share."""


_USES_PARAMETERS = "the loss uses parameters by itself"


class _OutputsOfModel(torch.autograd.Function):
    """Copies of a model's outputs whose graph leads to the model's parameters, as it does where autograd has made them.
    A loss that asks for gradients of the parameters by itself then fails, in place of finding none."""

    @staticmethod
    def forward(ctx: Any, in_loss: list[bool], count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.in_loss, ctx.others = in_loss, len(tensors) - count
        ctx.set_materialize_grads(False)
        return tuple(output.clone() for output in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        if ctx.in_loss[0]:
            raise NeedsAutogradError(_USES_PARAMETERS)
        return None, None, *gradients, *(None,) * ctx.others


def in_one_call(reading: Reading, binding: Binding, given: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
    """Runs a step on inputs and, at last, a target -> the loss, and the gradients where the binding keeps them. Of
    several processes it runs all but the update, and leaves the gradients in ``binding.flat``."""
    inputs, target = given[:-1], given[-1]
    gradients: Sequence[Tensor] = ()
    with binding.no_grad:
        loss: Tensor
        if binding.flat is not None:
            loss = operators.bound_gradients(inputs, target, binding.bound, binding.numbers, binding.flat.of_program)
        elif binding.keeps_gradients:
            loss, gradients = operators.step(
                inputs, target, binding.parameters, binding.states, reading.network.text, reading.loss_weight,
                binding.layout, binding.numbers, True,
            )  # fmt: skip
        elif len(inputs) == 1:
            loss = operators.bound_step(inputs[0], target, binding.bound, binding.numbers)
        else:
            loss = operators.bound_step_of_several(inputs, target, binding.bound, binding.numbers)
    _count_batches(reading)
    return loss, gradients


def steps_in_one_call(reading: Reading, binding: Binding, batches: Batches, first: int, last: int) -> Tensor:
    """Runs steps on the batches [first, last), or on the first of them -> their losses."""
    *inputs, target = (*batches.inputs, *batches.targets)
    with binding.no_grad:
        losses: Tensor = operators.bound_epoch(
            inputs, target, batches.order, *batches.places(first, last), batches.batch_size, binding.bound,
            binding.numbers,
        )  # fmt: skip
    _count_batches(reading, len(losses))
    return losses


def in_two_calls(
    reading: Reading,
    binding: Binding,
    inputs: Sequence[Tensor],
    target: Any,
    loss: Callable[[Any, Any], Tensor],
    still_fits: Callable[[], bool],
) -> tuple[Tensor, list[Tensor], bool]:
    """Runs a step as :func:`in_one_call` does, with the caller's own loss between two calls -> the loss, gradients, and
    whether the update has been made. It has not where the loss has changed what an update rests on, such as the
    optimizer's state, so that `still_fits` says False: then the gradients are those of the trained parameters."""
    undo = _copy_of_forward(reading, binding, loss)
    try:
        with binding.no_grad:
            outputs, saved = network_with_pass(inputs, binding.parameters, reading.network.text)
    except RuntimeError as error:
        undo()
        raise RefusedError from error
    try:
        _count_batches(reading)
        return _from_outputs(reading, binding, inputs, outputs, saved, target, loss, still_fits)
    except BaseException:
        undo()
        raise
    finally:
        forget_pass(int(saved))


def _from_outputs(
    reading: Reading,
    binding: Binding,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    saved: Tensor,
    target: Any,
    loss_of: Callable[[Any, Any], Tensor],
    still_fits: Callable[[], bool],
) -> tuple[Tensor, list[Tensor], bool]:
    """Computes the loss of a model's outputs, then backward and update."""
    network = reading.network
    for output in outputs:
        output.requires_grad_()
    # The loss gets copies, because it could not change a leaf itself in place.
    in_loss = [True]  # until the loss has returned
    weights = [p for p in binding.parameters if p.requires_grad]
    copies: Sequence[Tensor] = _OutputsOfModel.apply(in_loss, len(outputs), *outputs, *weights)
    own_node = copies[0].grad_fn
    given = pytree.tree_map(copies.__getitem__, network.outputs)
    loss = loss_of(given if network.log_softmax is None else F.log_softmax(given, network.log_softmax), target)
    if _reaches_others(loss, own_node):
        raise NeedsAutogradError(_USES_PARAMETERS)
    if len(copies) > 1 and any(copy._version for copy in copies):
        raise NeedsAutogradError("the loss changes one of several outputs, which may share memory in the model")
    in_loss[0] = False
    loss.backward()
    # A checkpoint inside the loss hides parameters from the search above.
    if not binding.keeps_gradients and any(p.grad is not None for p in binding.parameters):
        for p in binding.parameters:
            p.grad = None
        raise NeedsAutogradError(_USES_PARAMETERS)
    if all(output.grad is None for output in outputs):
        raise RuntimeError("training_step: the loss does not depend on the model's output")
    own = [output.grad for output in outputs]
    fits = still_fits()
    try:
        with binding.no_grad:
            gradients: list[Tensor]
            if binding.flat is not None or not fits:
                wanted = [len(inputs) + i for i, group in enumerate(binding.layout[::2]) if group >= 0]
                gradients = network_backward(own, saved, inputs, binding.parameters, wanted, True)
                if binding.flat is not None:
                    for view, gradient in zip(binding.flat.of_program, gradients, strict=True):
                        view.copy_(gradient)
            else:
                gradients = operators.step_backward(
                    own, saved, binding.parameters, binding.states, binding.layout, binding.numbers,
                    binding.keeps_gradients,
                )  # fmt: skip
    except RuntimeError as error:
        raise RefusedError from error
    return loss.detach(), gradients, fits


def update_in_one_call(binding: Binding, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """Clips the gradients and updates the parameters -> the clipped gradients, where the binding keeps them."""
    with binding.no_grad:
        scale = operators.bound_update(gradients, binding.bound, binding.numbers)
        return [gradient * scale for gradient in gradients] if binding.keeps_gradients else ()


def _copy_of_forward(reading: Reading, binding: Binding, loss: Any) -> Callable[[], None]:
    """Copies what a forward, and a loss that is a module, change. Calling the result restores it."""
    random = torch.get_rng_state()
    buffers = [p for p in binding.parameters if not isinstance(p, nn.Parameter)]
    if isinstance(loss, nn.Module):
        buffers += loss.buffers()
    statistics = [(buffer, buffer.clone()) for buffer in buffers]
    counters = [(own[name], own[name].clone()) for own, name in reading.network.counters if own.get(name) is not None]

    def undo() -> None:
        torch.set_rng_state(random)
        with torch.no_grad():
            for tensor, value in (*statistics, *counters):
                tensor.copy_(value)

    return undo


def _count_batches(reading: Reading, batches: int = 1) -> None:
    for own, name in reading.network.counters:
        if own.get(name) is not None:
            own[name].add_(batches)


def _reaches_others(loss: Tensor, own: Any) -> bool:
    """Whether backward would reach a leaf otherwise than by the node that made the outputs, as it does for a penalty on
    parameters."""
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
