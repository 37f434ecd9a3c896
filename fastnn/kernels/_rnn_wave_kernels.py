"""The Triton kernels of ``fastnn::rnn`` for all layers at once, as a wavefront: a program has a layer and a batch tile,
and begins a chunk of steps when the layer below (in backward, above) has finished it.

Programs are (batch tile, 1, layer), the layers from ``first_layer`` on in the order in which they wait for each other;
all of them must run at once, which a cooperative launch makes sure of. A launch of one layer finds what it waits for
done by the launch before it: so goes the interpreter, which runs programs one after another.

Shapes as in _rnn_kernels for D = 1, with L layers in front where a tensor is of all of them. gates: the first layer's
are filled in, the others' are for the programs to fill; hidden_outputs (L - 1, rows, H), of all layers but the last;
weights and biases are tuples, one a layer; masks (L - 1, rows, H) or None; progress (L, batch tiles) int32 zeros, the
steps that are done. ``chunk`` is a multiple of PRODUCT_STEPS, the steps of one product of a layer with its input.
"""

import triton
import triton.language as tl

from fastnn.kernels._rnn_backward_kernels import _load_or_zero, gru_steps_back, lstm_steps_back, simple_steps_back
from fastnn.kernels._rnn_kernels import (
    _load,
    _load_bias,
    _load_gru_weights,
    _load_lstm_weights,
    _load_state,
    _load_weight,
    _rows_at,
    _state_offset,
    _steps_of_tile,
    _store,
    _tile,
    _wait_until,
    gru_steps,
    lstm_steps,
    simple_steps,
)

_RUN_TIME = ["first_layer", "chunk", "steps", "batch_size", "rows", "stride_time", "stride_batch"]


@triton.jit
def _pick(tensors, layer, LAYERS: tl.constexpr):
    """A layer's tensor."""
    tensor = tensors[0]
    for i in tl.static_range(1, LAYERS):
        if layer == i:
            tensor = tensors[i]
    return tensor


@triton.jit
def _announce(progress, steps):
    tl.debug_barrier()  # the release below is one thread's, for what all threads have written
    tl.atomic_xchg(progress, steps, sem="release")


@triton.jit
def _rows_of_steps(first, last, schedule, batch_size, PRODUCT_STEPS: tl.constexpr, BLOCK_BATCH: tl.constexpr):
    """The rows of the batch tile in PRODUCT_STEPS steps, and which of them exist before ``last``."""
    part = tl.arange(0, PRODUCT_STEPS * BLOCK_BATCH)
    sequence = tl.program_id(0) * BLOCK_BATCH + part % BLOCK_BATCH
    return _rows_at(first + part // BLOCK_BATCH, last, sequence, schedule, batch_size)


@triton.jit
def _load_fresh(tensor, row, column, runs, STRIDE: tl.constexpr, HIDDEN: tl.constexpr):
    """(rows, columns) of another program's; past the first-level cache, which knows nothing of what others write."""
    mask = runs[:, None] & (column < HIDDEN)[None, :]
    return tl.load(tensor + row[:, None] * STRIDE + column[None, :], mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def _fill_gates(
    gates, below, masks, weight_ih, bias_ih, first, last, schedule, batch_size, GATES: tl.constexpr,
    HIDDEN: tl.constexpr, TILE: tl.constexpr, PRODUCT_STEPS: tl.constexpr, BLOCK_BATCH: tl.constexpr,
    BLOCK_K: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The share in the gates, from step ``first`` to ``last``, of the layer below's output (rows, H)."""
    unit = tl.arange(0, TILE)
    for step in range(first, last, PRODUCT_STEPS):
        row, runs = _rows_of_steps(step, last, schedule, batch_size, PRODUCT_STEPS, BLOCK_BATCH)
        mask = runs[:, None] & (unit < HIDDEN)[None, :]
        for gate in range(GATES):
            sums = tl.zeros([PRODUCT_STEPS * BLOCK_BATCH, TILE], tl.float32)
            for start in range(0, HIDDEN, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                x = _load_fresh(below, row, k, runs, HIDDEN, HIDDEN)
                if masks is not None:
                    x = (x.to(tl.float32) * _load_fresh(masks, row, k, runs, HIDDEN, HIDDEN).to(tl.float32)).to(x.dtype)
                w = tl.load(weight_ih + (gate * HIDDEN + unit[None, :]) * HIDDEN + k[:, None],
                            mask=(unit < HIDDEN)[None, :] & (k < HIDDEN)[:, None], other=0.0)  # fmt: skip
                sums = tl.dot(x.to(OPERAND), w.to(OPERAND), sums, input_precision=PRECISION)
            if bias_ih is not None:
                sums += _load_bias(bias_ih, unit, gate, GATES, HIDDEN)
            _store(gates + row[:, None] * (GATES * HIDDEN) + gate * HIDDEN + unit[None, :], sums, mask)
    tl.debug_barrier()  # a thread reads what others have stored


@triton.jit(do_not_specialize=_RUN_TIME)
def wave_forward(
    gates, weights_ih, weights_hh, biases_ih, biases_hh, masks, h0, c0, hidden_outputs, output, saved, h_n, c_n,
    progress, schedule, first_layer, chunk, steps, batch_size, rows, stride_time, stride_batch,
    ACTIVATION: tl.constexpr, GATES: tl.constexpr, LAYERS: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr,
    PRODUCT_STEPS: tl.constexpr, BLOCK_BATCH: tl.constexpr, BLOCK_K: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, SPIN_LIMIT: tl.constexpr,
):  # fmt: skip
    """ACTIVATION is that of a simple network (GATES = 1). c0 and c_n are LSTM's (GATES = 4), else None."""
    layer = first_layer + tl.program_id(2)
    sequence, unit, mask = _tile(batch_size, HIDDEN, TILE, BLOCK_BATCH)
    own_steps = _steps_of_tile(schedule, steps, BLOCK_BATCH)
    one_layer = rows.to(tl.int64) * HIDDEN
    weight_hh, weight_ih = _pick(weights_hh, layer, LAYERS), _pick(weights_ih, layer, LAYERS)
    bias_hh, bias_ih = None, None
    if biases_hh is not None:
        bias_hh, bias_ih = _pick(biases_hh, layer, LAYERS), _pick(biases_ih, layer, LAYERS)
    own_gates = gates + layer * one_layer * GATES
    below = hidden_outputs + tl.maximum(layer - 1, 0) * one_layer
    own_output = hidden_outputs + layer * one_layer
    if layer == LAYERS - 1:
        own_output = output
    if layer > 0:  # the programs' own rows of gates lie step by step
        stride_time, stride_batch = batch_size, 1
    if masks is not None:
        masks += tl.maximum(layer - 1, 0) * one_layer
    if saved is not None:
        saved += layer * one_layer * (5 if GATES == 4 else 4)
    one_state = layer * batch_size.to(tl.int64) * HIDDEN
    if h0 is not None:
        h0 += one_state
    h = _load_state(h0, sequence, unit, mask, batch_size, HIDDEN, TILE, BLOCK_BATCH)
    if GATES == 1:
        w = _load_weight(weight_hh, unit, 0, 1, HIDDEN, False).to(OPERAND)
    elif GATES == 3:
        w_r, w_z, w_n = _load_gru_weights(weight_hh, unit, HIDDEN, False, OPERAND)
    else:
        w_i, w_f, w_g, w_o = _load_lstm_weights(weight_hh, unit, HIDDEN, False, OPERAND)
        if c0 is not None:
            c0 += one_state
        c = _load_state(c0, sequence, unit, mask, batch_size, HIDDEN, TILE, BLOCK_BATCH)
    own_progress = progress + layer * tl.num_programs(0) + tl.program_id(0)
    for first in range(0, own_steps, chunk):
        last = tl.minimum(first + chunk, own_steps)
        if layer > 0:
            _wait_until(own_progress - tl.num_programs(0), last, SPIN_LIMIT)
            _fill_gates(own_gates, below, masks, weight_ih, bias_ih, first, last, schedule, batch_size, GATES, HIDDEN,
                        TILE, PRODUCT_STEPS, BLOCK_BATCH, BLOCK_K, OPERAND, PRECISION)  # fmt: skip
        if GATES == 1:
            h = simple_steps(first, last, own_steps, h, w, own_gates, bias_hh, own_output, sequence, unit, mask,
                             schedule, batch_size, rows, stride_time, stride_batch, ACTIVATION, HIDDEN, 1, OPERAND,
                             PRECISION)  # fmt: skip
        elif GATES == 3:
            h = gru_steps(first, last, own_steps, h, w_r, w_z, w_n, own_gates, bias_hh, own_output, saved, sequence,
                          unit, mask, schedule, batch_size, rows, stride_time, stride_batch, HIDDEN, 1, OPERAND,
                          PRECISION)  # fmt: skip
        else:
            h, c = lstm_steps(first, last, own_steps, h, c, w_i, w_f, w_g, w_o, own_gates, bias_hh, own_output, saved,
                              sequence, unit, mask, schedule, batch_size, rows, stride_time, stride_batch, HIDDEN, 1,
                              OPERAND, PRECISION)  # fmt: skip
        _announce(own_progress, last)
    state = one_state + _state_offset(sequence, unit, batch_size, HIDDEN)
    _store(h_n + state, h, mask)
    if GATES == 4:
        _store(c_n + state, c, mask)


@triton.jit
def _fill_gradient(
    grad, above, masks, weight_ih, first, last, schedule, batch_size, GATES: tl.constexpr, HIDDEN: tl.constexpr,
    TILE: tl.constexpr, PRODUCT_STEPS: tl.constexpr, BLOCK_BATCH: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient (rows, H) of a layer's output, from step ``first`` to ``last``, from that of the gates above it
    (rows, kinds, H) and the weights that lead there."""
    KINDS: tl.constexpr = 1 if GATES == 1 else 4
    unit = tl.arange(0, TILE)
    for step in range(first, last, PRODUCT_STEPS):
        row, runs = _rows_of_steps(step, last, schedule, batch_size, PRODUCT_STEPS, BLOCK_BATCH)
        sums = tl.zeros([PRODUCT_STEPS * BLOCK_BATCH, TILE], tl.float32)
        for gate in range(GATES):
            for start in range(0, HIDDEN, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                g = _load_fresh(above + gate * HIDDEN, row, k, runs, KINDS * HIDDEN, HIDDEN)
                w = tl.load(weight_ih + (gate * HIDDEN + k[:, None]) * HIDDEN + unit[None, :],
                            mask=(unit < HIDDEN)[None, :] & (k < HIDDEN)[:, None], other=0.0)  # fmt: skip
                sums = tl.dot(g.to(OPERAND), w.to(OPERAND), sums, input_precision=PRECISION)
        mask = runs[:, None] & (unit < HIDDEN)[None, :]
        place = row[:, None] * HIDDEN + unit[None, :]
        if masks is not None:
            # Rounded before it is scaled, as a tensor would be.
            sums = sums.to(grad.dtype.element_ty).to(tl.float32) * _load(masks + place, mask)
        _store(grad + place, sums, mask)
    tl.debug_barrier()  # a thread reads what others have stored


@triton.jit(do_not_specialize=_RUN_TIME[:-2])
def wave_backward(
    grad_output, grads, weights_ih, weights_hh, masks, h0, c0, hidden_outputs, output, saved, grad_h_n, grad_c_n,
    grad_gates, grad_h0, grad_c0, progress, schedule, first_layer, chunk, steps, batch_size, rows,
    ACTIVATION: tl.constexpr, GATES: tl.constexpr, LAYERS: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr,
    PRODUCT_STEPS: tl.constexpr, BLOCK_BATCH: tl.constexpr, BLOCK_K: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, SPIN_LIMIT: tl.constexpr,
):  # fmt: skip
    """The last layer comes first. grads (L - 1, rows, H): of hidden_outputs, for the programs to fill."""
    KINDS: tl.constexpr = 1 if GATES == 1 else 4
    layer = LAYERS - 1 - first_layer - tl.program_id(2)
    sequence, unit, mask = _tile(batch_size, HIDDEN, TILE, BLOCK_BATCH)
    own_steps = _steps_of_tile(schedule, steps, BLOCK_BATCH)
    one_layer = rows.to(tl.int64) * HIDDEN
    weight_hh, weight_above = _pick(weights_hh, layer, LAYERS), _pick(weights_ih, layer + 1, LAYERS)
    own_grad, own_output = grads + layer * one_layer, hidden_outputs + layer * one_layer
    if layer == LAYERS - 1:
        own_grad, own_output = grad_output, output
    own_gates = grad_gates + layer * one_layer * KINDS
    above = own_gates + one_layer * KINDS
    if masks is not None:
        masks += tl.minimum(layer, LAYERS - 2) * one_layer
    if saved is not None:
        saved += layer * one_layer * (5 if GATES == 4 else 4)
    state = layer * batch_size.to(tl.int64) * HIDDEN + _state_offset(sequence, unit, batch_size, HIDDEN)
    grad_h = _load_or_zero(grad_h_n, state, mask)
    if GATES == 1:
        w = _load_weight(weight_hh, unit, 0, 1, HIDDEN, True).to(OPERAND)
    elif GATES == 3:
        w_r, w_z, w_n = _load_gru_weights(weight_hh, unit, HIDDEN, True, OPERAND)
        first_h = _load_or_zero(h0, state, mask)
    else:
        w_i, w_f, w_g, w_o = _load_lstm_weights(weight_hh, unit, HIDDEN, True, OPERAND)
        first_c, grad_c = _load_or_zero(c0, state, mask), _load_or_zero(grad_c_n, state, mask)
    own_progress = progress + layer * tl.num_programs(0) + tl.program_id(0)
    for first in range(0, own_steps, chunk):
        last = tl.minimum(first + chunk, own_steps)
        if layer < LAYERS - 1:
            _wait_until(own_progress + tl.num_programs(0), last, SPIN_LIMIT)
            _fill_gradient(own_grad, above, masks, weight_above, own_steps - last, own_steps - first, schedule,
                           batch_size, GATES, HIDDEN, TILE, PRODUCT_STEPS, BLOCK_BATCH, BLOCK_K, OPERAND,
                           PRECISION)  # fmt: skip
        if GATES == 1:
            grad_h = simple_steps_back(first, last, own_steps, grad_h, w, own_grad, own_output, own_gates, sequence,
                                       unit, mask, schedule, batch_size, rows, ACTIVATION, HIDDEN, 1, OPERAND,
                                       PRECISION)  # fmt: skip
        elif GATES == 3:
            grad_h = gru_steps_back(first, last, own_steps, grad_h, w_r, w_z, w_n, first_h, own_grad, own_output, saved,
                                    own_gates, sequence, unit, mask, schedule, batch_size, rows, HIDDEN, 1, OPERAND,
                                    PRECISION)  # fmt: skip
        else:
            grad_h, grad_c = lstm_steps_back(first, last, own_steps, grad_h, grad_c, w_i, w_f, w_g, w_o, first_c,
                                             own_grad, saved, own_gates, sequence, unit, mask, schedule, batch_size,
                                             rows, HIDDEN, 1, OPERAND, PRECISION)  # fmt: skip
        _announce(own_progress, last)
    _store(grad_h0 + state, grad_h, mask)
    if GATES == 4:
        _store(grad_c0 + state, grad_c, mask)
