"""Recurrent networks: the Python side of the operators' schema, autograd, and the functions that the modules call."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastnn._torch import direct_call, onednn_dtypes
from fastnn.ops._autograd import (
    autocast_is_on,
    call_kernel,
    check_same_device,
    differentiate_twice,
    eager_recorder,
    gradients_by_reference,
    is_exporting,
    is_plain,
    needs_autograd,
    needs_reference,
    recorder,
    wants_gradient,
    wants_graph,
)
from fastnn.ops._random import draw_ones
from fastnn.ops._raw_operator import raw_operator
from fastnn.recurrent_modes import MODE_OF, MODES, NUMBER_OF
from fastnn.reference import rnn as reference

_rnn_op = torch.ops.fastnn.rnn.default
_rnn_call = direct_call(_rnn_op)  # see is_plain
_cell_op = torch.ops.fastnn.rnn_cell.default
_cell_call = direct_call(_cell_op)
_with_reserve_op = torch.ops.fastnn.rnn_with_reserve.default
_with_reserve_call = direct_call(_with_reserve_op)
_backward_op = torch.ops.fastnn.rnn_backward.default


# For a GPU, set by fastnn.kernels: see _with_stocks_gradient.
run_with_stocks_gradient: Callable[..., tuple[Tensor, Sequence[Tensor]] | None] | None = None
RnnConfig = tuple[int, int, bool, bool]  # mode, num_layers, bidirectional, batch_first
_CELL_CONFIGS = [(number, 1, False, False) for number in range(len(MODES))]


def rnn(
    input: Tensor,
    batch_sizes: Tensor | None,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    mode: str,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
) -> tuple[Tensor, Sequence[Tensor]]:
    """Run all layers, directions and steps of a recurrent network in one call.

    Args:
        input: (length, batch, in), or (batch, length, in) if ``batch_first``, or (rows, in) with ``batch_sizes``.
        batch_sizes: of a ``PackedSequence``: int64, how many sequences run at each step; or None.
        state: [] for zeros, [h], or for LSTM [h, c], each (num_layers * directions, batch, hidden).
        weights: ``weight_ih, weight_hh, bias_ih, bias_hh``, or the first two, and for LSTM maybe ``weight_hr``, a
            projection of h, for each direction of each layer, as ``torch.nn.LSTM`` has them in ``_flat_weights``.
        mode: RNN_TANH, RNN_RELU, GRU or LSTM.
        dropout: probability of an element between layers being zeroed; give 0 outside training.

    Returns:
        The last layer's output, shaped as the input with ``directions * hidden`` features, and the final state, shaped
        as ``state``. With a projection, h has as many features as that has rows.

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit together.
    """
    dtypes = _autocast_dtypes(input, batch_sizes, state, mode, len(weights) // (num_layers * (1 + bidirectional)))
    if dtypes is None:
        return _rnn(input, batch_sizes, state, weights, mode, num_layers, bidirectional, batch_first, dropout)
    input, state, weights = _cast(dtypes, input, state, weights)
    with torch.autocast(input.device.type, enabled=False):
        output, final_state = _rnn(
            input, batch_sizes, state, weights, mode, num_layers, bidirectional, batch_first, dropout
        )
        return output.to(dtypes[0]), [part.to(dtype) for part, dtype in zip(final_state, dtypes, strict=False)]


def _rnn(
    input: Tensor,
    batch_sizes: Tensor | None,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    mode: str,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    dropout: float,
) -> tuple[Tensor, Sequence[Tensor]]:
    """:func:`rnn` after autocast has cast the tensors."""
    masks = None
    number = NUMBER_OF[mode]
    if not state and batch_sizes is None and is_exporting():
        state = _zero_state(input, weights, mode, num_layers, bidirectional, batch_first)
    if dropout > 0 and num_layers > 1:
        masks = dropout_masks(input, weights, num_layers, bidirectional, dropout)
    if is_plain(input):
        return plain_rnn(input, batch_sizes, state, weights, masks, number, num_layers, bidirectional, batch_first)
    if needs_reference(input):
        return reference.rnn(input, batch_sizes, state, weights, masks, mode, num_layers, bidirectional, batch_first)
    config = number, num_layers, bidirectional, batch_first
    if not needs_autograd(input, *state, *weights):
        return call_kernel(_rnn_op, input, batch_sizes, state, weights, masks, *config)
    output, *final_state = _record(input, batch_sizes, masks, config, len(state), *state, *weights)
    return output, final_state


def _autocast_dtypes(
    input: Tensor, batch_sizes: Tensor | None, state: Sequence[Tensor], mode: str, weights: int
) -> tuple[torch.dtype, torch.dtype] | None:
    """The dtypes that stock returns under autocast: one of h and the output, one of c. None outside autocast. Stock's
    cell is meant where the input has two dimensions and no batch sizes. weights: how many there are for a direction.

    On a GPU autocast casts everything. On the CPU it casts the products, and in oneDNN's LSTM everything; elsewhere GRU
    and LSTM keep a state in the wider of its own dtype and the input's."""
    device = input.device.type
    if not autocast_is_on() or not torch.is_autocast_enabled(device) or input.dtype is torch.float64:
        return None
    low = torch.get_autocast_dtype(device)
    if device != "cpu" or mode.startswith("RNN"):
        return low, low
    wide = torch.promote_types(low, state[-1].dtype if state else input.dtype)
    if mode == "GRU":
        return wide, wide
    if weights % 2:  # a projection, which is one more product, gives h
        return low, wide
    return (low, low) if input.dim() == 3 and _stock_has_onednn(input) else (wide, wide)


_ONEDNN_DTYPES = onednn_dtypes()


def _stock_has_onednn(input: Tensor) -> bool:
    dtype = torch.float32 if input.dtype is torch.float32 else torch.bfloat16
    return bool(dtype in _ONEDNN_DTYPES and torch.backends.mkldnn.enabled and input.numel() > 0)


def _cast(
    dtypes: tuple[torch.dtype, torch.dtype], input: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Casts all tensors to the wider dtype. What autocast does not cast keeps its dtype, and the operator refuses
    it."""
    dtype = torch.promote_types(*dtypes)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype is not torch.float64 else tensor

    return cast(input), list(map(cast, state)), list(map(cast, weights))


def plain_rnn(
    input: Tensor,
    batch_sizes: Tensor | None,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    masks: Tensor | None,
    mode: int,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Sequence[Tensor]]:
    """:func:`rnn` for callers that know that the call is plain (:func:`is_plain`). The mode is given by its number, and
    the dropout masks have been drawn."""
    if not wants_gradient(input, *state, *weights):
        return _rnn_call(input, batch_sizes, state, weights, masks, mode, num_layers, bidirectional, batch_first)
    config = mode, num_layers, bidirectional, batch_first
    if input.is_cuda:
        recorded = _with_stocks_gradient(input, batch_sizes, state, weights, masks, config)
        if recorded is not None:
            return recorded
    output, *final_state = _record_plain(input, batch_sizes, masks, config, len(state), *state, *weights)
    return output, final_state


def rnn_cell(input: Tensor, mode: str, h: Tensor | None, c: Tensor | None, *weights: Tensor) -> Sequence[Tensor]:
    """One step of one layer: input (batch, in), h and for LSTM c (batch, hidden) or None for zeros, weights as for
    :func:`rnn` -> the new state, [h] or [h, c]."""
    state = _given((h, c))
    dtypes = _autocast_dtypes(input, None, state, mode, 4)
    if dtypes is None:
        return _rnn_cell(input, mode, h, c, weights)
    input, state, given = _cast(dtypes, input, state, weights)
    h, c = (*state, None, None)[:2]
    with torch.autocast(input.device.type, enabled=False):
        new_state = _rnn_cell(input, mode, h, c, given)
        return [part.to(dtype) for part, dtype in zip(new_state, dtypes, strict=False)]


def _rnn_cell(
    input: Tensor, mode: str, h: Tensor | None, c: Tensor | None, weights: Sequence[Tensor]
) -> Sequence[Tensor]:
    """:func:`rnn_cell` after autocast has cast the tensors."""
    number = NUMBER_OF[mode]
    if is_plain(input):
        return plain_rnn_cell(input, number, h, c, *weights)
    state = _given((h, c))
    if needs_reference(input):
        return reference.rnn_cell(input, tuple(state), weights, mode)
    if not needs_autograd(input, *state, *weights):
        return call_kernel(_cell_op, input, number, h, c, *weights)
    if not state and is_exporting():
        state = [s[0] for s in _zero_state(input.unsqueeze(0), weights, mode)]
    return _record(input, None, None, _CELL_CONFIGS[number], len(state), *state, *weights)[1:]


def plain_rnn_cell(
    input: Tensor, mode: int, h: Tensor | None, c: Tensor | None, *weights: Tensor | None
) -> Sequence[Tensor]:
    """:func:`rnn_cell` for callers that know that the call is plain (:func:`is_plain`). The mode is given by its
    number, and biases may be None."""
    if not wants_gradient(input, h, c, *weights):
        return _cell_call(input, mode, h, c, *weights)
    state, given, config = _given((h, c)), _given(weights), _CELL_CONFIGS[mode]
    if input.is_cuda:
        recorded = _with_stocks_gradient(input, None, state, given, None, config)
        if recorded is not None:
            return recorded[1]
    return _record_plain(input, None, None, config, len(state), *state, *given)[1:]


def _zero_state(
    input: Tensor,
    weights: Sequence[Tensor],
    mode: str,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
) -> list[Tensor]:
    """The zeros that a missing state stands for. An exported program gives them, because AOTInductor drops an empty
    list."""
    count = num_layers * (2 if bidirectional else 1)
    outputs, hidden = reference.state_sizes(weights[: len(weights) // count])
    batch = input.shape[0 if batch_first else 1]
    return [input.new_zeros(count, batch, size) for size in (outputs, hidden)[: MODE_OF[mode].states]]


def _given(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _with_stocks_gradient(
    input: Tensor,
    batch_sizes: Tensor | None,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    masks: Tensor | None,
    config: RnnConfig,
) -> tuple[Tensor, Sequence[Tensor]] | None:
    """On a GPU, runs stock's layer with its own gradient, where the operator would run stock's kernels: these save for
    backward what the operator cannot return. Else None."""
    if run_with_stocks_gradient is None:
        return None
    return run_with_stocks_gradient(input, batch_sizes, state, weights, masks, *config)


def dropout_masks(
    input: Tensor, weights: Sequence[Tensor], num_layers: int, bidirectional: bool, dropout: float
) -> Tensor:
    """(num_layers - 1, rows, directions * hidden), drawn as ``torch.dropout`` on the layers' outputs draws them, so
    that the same seed drops the same elements."""
    rows = input.shape[0] if input.dim() == 2 else input.shape[0] * input.shape[1]
    sizes = (num_layers - 1, rows, weights[1].shape[1] * (2 if bidirectional else 1))
    if dropout == 1:
        return input.new_zeros(sizes)
    return draw_ones(input.new_empty(sizes), 1 - dropout).div_(1 - dropout)


class Rnn(torch.autograd.Function):
    """``fastnn::rnn_with_reserve`` with its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor,
        batch_sizes: Tensor | None,
        masks: Tensor | None,
        config: RnnConfig,
        states: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        output, final_state, reserve = _with_reserve_op(
            input, batch_sizes, tensors[:states], tensors[states:], masks, *config
        )
        return (output, *final_state, output.clone(), reserve)  # the caller may change its output in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, batch_sizes, masks, config, states, *tensors = inputs
        ctx.mark_non_differentiable(*output[-2:])
        ctx.call = (config, states, len(output) - 2)
        ctx.originals = {}
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[-2:], input, batch_sizes, masks, *tensors)

    @staticmethod
    def record(
        ctx: Any,
        input: Tensor,
        batch_sizes: Tensor | None,
        masks: Tensor | None,
        config: RnnConfig,
        states: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        output, final_state, reserve = _with_reserve_call(
            input, batch_sizes, tensors[:states], tensors[states:], masks, *config
        )
        ctx.call = (config, states, 1 + len(final_state))
        ctx.set_materialize_grads(False)
        # Stock saves what is multiplied by a trained weight, or a copy of the input where the batch is first. The rest
        # may change in place, so that it is saved without a check of its version: the input, whose values matter only
        # to the gradients of its weights, and h, whose values matter to others, as a copy. `originals` has the tensors
        # themselves, for second derivatives, by their places among the input and `tensors`.
        ctx.originals = {}
        each = len(tensors[states:]) // (config[1] * (2 if config[2] else 1))  # weights of a direction
        of_input, of_h = tensors[states::each][: 2 if config[2] else 1], tensors[states + 1 :: each]
        trains_input_weights = any(weight.requires_grad for weight in of_input)
        if config[3] or not trains_input_weights:
            if input.requires_grad or not trains_input_weights:
                ctx.originals[0] = (input, input._version)
            input = input.clone() if trains_input_weights else input.data
        if states and not any(weight.requires_grad for weight in of_h):
            ctx.originals[1] = (tensors[0], tensors[0]._version)
            tensors = (tensors[0].clone(), *tensors[1:])
        ctx.save_for_backward(output, reserve, input, batch_sizes, masks, *tensors)
        is_cell = batch_sizes is None and input.dim() == 2
        # The caller may change a network's output in place, as with stock, so backward gets a copy of it. A cell's
        # output must not be changed, as with stock.
        return (output if is_cell else output.clone(), *final_state)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        config, states, results = ctx.call
        needed, first_weight, grads = ctx.needs_input_grad, 5 + states, grads[:results]
        if all(grad is None for grad in grads):
            return (None,) * len(needed)
        if wants_graph():
            _, _, input, batch_sizes, masks, *rest = ctx.saved_tensors
            differentiated = [input, *rest]
            for i, (original, version) in ctx.originals.items():
                if original._version != version:
                    raise RuntimeError(
                        "one of the variables needed for gradient computation has been modified by an inplace "
                        f"operation: the {'state' if i else 'input'} of a recurrent layer, for a second derivative"
                    )
                differentiated[i] = original
            own = [needed[0], *needed[5:]]
            by_reference = functools.partial(_by_reference, config, states, batch_sizes, masks)
            found = gradients_by_reference(by_reference, differentiated, own, grads)
            return (found[0], None, None, None, None, *found[1:])
        wanted = (needed[0], True in needed[5:first_weight], True in needed[first_weight:])
        compute = RnnBackward.apply if torch.is_grad_enabled() else RnnBackward.forward
        grad_input, *others = compute(config, states, wanted, *grads, *ctx.saved_tensors)
        return (grad_input, None, None, None, None, *others)


def _by_reference(
    config: RnnConfig, states: int, batch_sizes: Tensor | None, masks: Tensor | None, *tensors: Tensor
) -> tuple[Tensor, ...]:
    """Computes the network by the reference. tensors: the input, the states and the weights."""
    (input, *rest), (mode, layers, bidirectional, batch_first) = tensors, config
    state, weights = rest[:states], rest[states:]
    if input.dim() == 2 and batch_sizes is None:
        final_state = reference.rnn_cell(input, tuple(state), weights, MODES[mode].name)
        return (final_state[0], *final_state)
    output, final_state = reference.rnn(
        input, batch_sizes, state, weights, masks, MODES[mode].name, layers, bidirectional, batch_first
    )
    return (output, *final_state)


_record_plain = eager_recorder(Rnn)
_record = recorder(Rnn, _record_plain, results=-2)


class RnnBackward(torch.autograd.Function):
    """``fastnn::rnn_backward``, differentiable through the reference."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        config: RnnConfig, states: int, wanted: tuple[bool, bool, bool], *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        grads = 1 + MODES[config[0]].states
        output, reserve, input, batch_sizes, masks, *rest = tensors[grads:]
        grad_input, grad_state, grad_weights = _backward_op(
            tensors[0],
            tensors[1:grads],
            input,
            batch_sizes,
            rest[:states],
            rest[states:],
            masks,
            output,
            reserve,
            *config,
            wanted[0],
            wanted[1] and states > 0,
            wanted[2],
        )
        return (
            grad_input if wanted[0] else None,
            *(grad_state if wanted[1] and states else (None,) * states),
            *(grad_weights if wanted[2] else (None,) * (len(rest) - states)),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        ctx.config, ctx.states, _, *tensors = inputs
        ctx.grads = 1 + MODES[ctx.config[0]].states
        ctx.given = [gradient is not None for gradient in output]
        ctx.set_materialize_grads(False)
        # The output and the reserve are not saved, because the reference computes its own.
        ctx.save_for_backward(*tensors[: ctx.grads], *tensors[ctx.grads + 2 :])

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Any, ...]:
        grads, inputs = ctx.saved_tensors[: ctx.grads], ctx.saved_tensors[ctx.grads :]
        input, batch_sizes, masks, *rest = inputs
        arrived = [i for i, grad in enumerate(grads) if grad is not None]
        places = ctx.needs_input_grad[3 + ctx.grads + 2 :]  # of the input, batch_sizes, masks, the states and weights
        needed = [places[0], *places[3:]]

        def by_reference(*tensors: Tensor) -> tuple[Tensor, ...]:
            outputs = _by_reference(ctx.config, ctx.states, batch_sizes, masks, *tensors)
            return tuple(outputs[i] for i in arrived)

        of_grads, found = differentiate_twice(
            by_reference, tuple(grads[i] for i in arrived), [input, *rest], ctx.given, needed, grad_grads
        )
        grad_of_grads: list[Tensor | None] = [None] * ctx.grads
        for i, gradient in zip(arrived, of_grads, strict=True):
            grad_of_grads[i] = gradient
        return (None, None, None, *grad_of_grads, None, None, found[0], None, None, *found[1:])


def _check_devices(batch_sizes: Tensor | None, *tensors: Tensor | None) -> None:
    """Checks that the tensors are on one device. batch_sizes is on the CPU, or on ``meta`` if the others are."""
    check_same_device(*tensors, None if batch_sizes is None or batch_sizes.is_cpu else batch_sizes)


def _fake_results(
    input: Tensor,
    batch_sizes: Tensor | None,
    state: list[Tensor],
    weights: list[Tensor],
    masks: Tensor | None,
    *config: Any,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Empty tensors of the sizes of the output, the final state and the reserve."""
    _check_devices(batch_sizes, input, *state, *weights, masks)
    torch._check(input.shape[-1] == weights[0].shape[1], lambda: "rnn: the input does not fit the weights")
    mode, layers, bidirectional, batch_first = config
    directions = 2 if bidirectional else 1
    count = layers * directions
    outputs, hidden = reference.state_sizes(weights[: len(weights) // count])
    state_sizes: tuple[Any, ...]
    if batch_sizes is not None:
        state_sizes = count, torch.library.get_ctx().new_dynamic_size()
        output = input.new_empty(input.shape[0], directions * outputs)
    elif input.dim() == 2:  # a cell's
        state_sizes = (input.shape[0],)
        output = input.new_empty(input.shape[0], outputs)
    else:
        batch, length = input.shape[:2] if batch_first else (input.shape[1], input.shape[0])
        state_sizes = count, batch
        output = input.new_empty(length, batch, directions * outputs)
        if batch_first:
            output = output.transpose(0, 1)
    final_state = [input.new_empty(*state_sizes, size) for size in (outputs, hidden)[: MODES[mode].states]]
    kept = (layers - 1) * outputs + layers * MODES[mode].saved * hidden
    return output, final_state, input.new_empty(output.numel() // outputs * kept)


@raw_operator("rnn")
def _(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
    return _fake_results(*arguments)[:2]


@raw_operator("rnn_with_reserve")
def _(*arguments: Any) -> tuple[Tensor, list[Tensor], Tensor]:
    return _fake_results(*arguments)


@raw_operator("rnn_backward")
def _(
    grad_output: Tensor | None,
    grad_state: list[Tensor | None],
    input: Tensor,
    batch_sizes: Tensor | None,
    state: list[Tensor],
    weights: list[Tensor],
    masks: Tensor | None,
    output: Tensor,
    reserve: Tensor,
    mode: int,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    input_wanted: bool,
    state_wanted: bool,
    weights_wanted: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    _check_devices(batch_sizes, grad_output, *grad_state, input, *state, *weights, masks, output, reserve)
    return (
        input.new_empty(input.shape if input_wanted else (0,)),
        [s.new_empty(s.shape) for s in state] if state_wanted else [],
        [w.new_empty(w.shape) for w in weights] if weights_wanted else [],
    )


@raw_operator("rnn_cell")
def _(
    input: Tensor,
    mode: int,
    h: Tensor | None,
    c: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
) -> list[Tensor]:
    check_same_device(input, h, c, weight_ih, weight_hh, bias_ih, bias_hh)
    sizes = (input.shape[0], weight_hh.shape[1])
    return [input.new_empty(sizes) for _ in range(MODES[mode].states)]
