"""The Triton kernels of ``fastnn::rnn_backward``: one direction of one layer from the last step to the first, in one
program a batch tile, the recurrent weights staying on chip.

Shapes as in _rnn_kernels. grad_output (rows, D * H), grad_h_n and grad_c_n (D, batch, H) may be None. grad_gates (D,
rows, kinds * H) is the gradient before each activation, from which launchers make the weights' and the input's
gradients; grad_h0 and grad_c0 (D, batch, H). What a step reads is loaded while the step after it is computed. As in
forward, what is carried stays zero in lanes beyond H.
"""

import triton
import triton.language as tl

from fastnn.kernels._activation import activation_gradient, tanh
from fastnn.kernels._rnn_kernels import (
    _load,
    _load_gru_weights,
    _load_lstm_weights,
    _load_weight,
    _output_offset,
    _rows_at,
    _saved_offset,
    _state_offset,
    _steps_of_tile,
    _store,
    _tile,
)

_RUN_TIME = ["steps", "batch_size", "rows"]


@triton.jit
def _load_or_zero(tensor, offset, mask):
    if tensor is None:
        return tl.zeros(offset.shape, tl.float32)
    else:
        return tl.load(tensor + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def simple_steps_back(
    first, last, own_steps, grad_h, w, grad_output, output, grad_gates, sequence, unit, mask, schedule, batch_size,
    rows, ACTIVATION: tl.constexpr, HIDDEN: tl.constexpr, DIRECTIONS: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Back from the step ``first`` before the last one to the one ``last - 1`` before it -> the gradient of the state
    that it began with."""
    row, runs = _rows_at(own_steps - 1 - first, own_steps, sequence, schedule, batch_size)
    offset = _output_offset(row, unit, HIDDEN, DIRECTIONS)
    exists = mask & runs[:, None]
    h, grad = _load(output + offset, exists), _load_or_zero(grad_output, offset, exists)
    for back in range(first, last):
        next_row, next_runs = _rows_at(own_steps - 2 - back, own_steps, sequence, schedule, batch_size)
        next_offset = _output_offset(next_row, unit, HIDDEN, DIRECTIONS)
        next_exists = mask & next_runs[:, None]
        next_h, next_grad = (
            _load(output + next_offset, next_exists),
            _load_or_zero(grad_output, next_offset, next_exists),
        )
        before = tl.where(exists, activation_gradient(grad_h + grad, h, ACTIVATION), 0.0)
        _store(grad_gates + _saved_offset(row, unit, rows, HIDDEN, 1), before, exists)
        operand = before.to(output.dtype.element_ty).to(OPERAND)
        grad_h = tl.where(exists, tl.dot(operand, w, input_precision=PRECISION), grad_h)
        row, runs, exists, h, grad = next_row, next_runs, next_exists, next_h, next_grad
    return grad_h


@triton.jit(do_not_specialize=_RUN_TIME)
def simple_backward(
    grad_output, grad_h_n, output, weight_hh, grad_gates, grad_h0, schedule, steps, batch_size, rows,
    ACTIVATION: tl.constexpr, HIDDEN: tl.constexpr, DIRECTIONS: tl.constexpr, TILE: tl.constexpr,
    BLOCK_BATCH: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    sequence, unit, mask = _tile(batch_size, HIDDEN, TILE, BLOCK_BATCH)
    own_steps = _steps_of_tile(schedule, steps, BLOCK_BATCH)
    w = _load_weight(weight_hh, unit, 0, 1, HIDDEN, True).to(OPERAND)
    state = _state_offset(sequence, unit, batch_size, HIDDEN)
    grad_h = simple_steps_back(
        0, own_steps, own_steps, _load_or_zero(grad_h_n, state, mask), w, grad_output, output, grad_gates, sequence,
        unit, mask, schedule, batch_size, rows, ACTIVATION, HIDDEN, DIRECTIONS, OPERAND, PRECISION,
    )  # fmt: skip
    _store(grad_h0 + state, grad_h, mask)


@triton.jit
def _load_gru_step(
    grad_output, output, saved, row, runs, before_row, before_runs, first_h, unit, mask, rows, HIDDEN: tl.constexpr,
    DIRECTIONS: tl.constexpr,
):  # fmt: skip
    """What a step keeps (r, z, n, the hidden half of n), the state that it began with, and its output's gradient."""
    exists, before_exists = mask & runs[:, None], mask & before_runs[:, None]
    kept = saved + _saved_offset(row, unit, rows, HIDDEN, 4)
    r, z = _load(kept, exists), _load(kept + HIDDEN, exists)
    n, hidden_n = _load(kept + 2 * HIDDEN, exists), _load(kept + 3 * HIDDEN, exists)
    h_before = _load(output + _output_offset(before_row, unit, HIDDEN, DIRECTIONS), before_exists)
    grad = _load_or_zero(grad_output, _output_offset(row, unit, HIDDEN, DIRECTIONS), exists)
    return r, z, n, hidden_n, tl.where(before_exists, h_before, first_h), grad


@triton.jit
def gru_steps_back(
    first, last, own_steps, grad_h, w_r, w_z, w_n, first_h, grad_output, output, saved, grad_gates, sequence, unit,
    mask, schedule, batch_size, rows, HIDDEN: tl.constexpr, DIRECTIONS: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """As simple_steps_back. grad_gates: of r, z, n, and of the hidden half of n."""
    row, runs = _rows_at(own_steps - 1 - first, own_steps, sequence, schedule, batch_size)
    before_row, before_runs = _rows_at(own_steps - 2 - first, own_steps, sequence, schedule, batch_size)
    r, z, n, hidden_n, h_before, grad = _load_gru_step(
        grad_output, output, saved, row, runs, before_row, before_runs, first_h, unit, mask, rows, HIDDEN, DIRECTIONS
    )
    for back in range(first, last):
        next_row, next_runs = _rows_at(own_steps - 3 - back, own_steps, sequence, schedule, batch_size)
        next_r, next_z, next_n, next_hidden_n, next_h_before, next_grad = _load_gru_step(
            grad_output, output, saved, before_row, before_runs, next_row, next_runs, first_h, unit, mask, rows, HIDDEN,
            DIRECTIONS,
        )  # fmt: skip
        exists = mask & runs[:, None]
        total = grad_h + grad
        grad_n = total * (1.0 - z) * (1.0 - n * n)
        grad_z = total * (h_before - n) * z * (1.0 - z)
        grad_r = grad_n * hidden_n * r * (1.0 - r)
        grad_hidden_n = grad_n * r
        place = grad_gates + _saved_offset(row, unit, rows, HIDDEN, 4)
        _store(place, grad_r, exists)
        _store(place + HIDDEN, grad_z, exists)
        _store(place + 2 * HIDDEN, grad_n, exists)
        _store(place + 3 * HIDDEN, grad_hidden_n, exists)
        DTYPE: tl.constexpr = output.dtype.element_ty
        through = total * z
        through = tl.dot(grad_r.to(DTYPE).to(OPERAND), w_r, through, input_precision=PRECISION)
        through = tl.dot(grad_z.to(DTYPE).to(OPERAND), w_z, through, input_precision=PRECISION)
        through = tl.dot(grad_hidden_n.to(DTYPE).to(OPERAND), w_n, through, input_precision=PRECISION)
        grad_h = tl.where(exists, through, grad_h)
        row, runs, before_row, before_runs = before_row, before_runs, next_row, next_runs
        r, z, n, hidden_n, h_before, grad = next_r, next_z, next_n, next_hidden_n, next_h_before, next_grad
    return grad_h


@triton.jit(do_not_specialize=_RUN_TIME)
def gru_backward(
    grad_output, grad_h_n, output, saved, h0, weight_hh, grad_gates, grad_h0, schedule, steps, batch_size, rows,
    HIDDEN: tl.constexpr, DIRECTIONS: tl.constexpr, TILE: tl.constexpr, BLOCK_BATCH: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    sequence, unit, mask = _tile(batch_size, HIDDEN, TILE, BLOCK_BATCH)
    own_steps = _steps_of_tile(schedule, steps, BLOCK_BATCH)
    w_r, w_z, w_n = _load_gru_weights(weight_hh, unit, HIDDEN, True, OPERAND)
    state = _state_offset(sequence, unit, batch_size, HIDDEN)
    grad_h = gru_steps_back(
        0, own_steps, own_steps, _load_or_zero(grad_h_n, state, mask), w_r, w_z, w_n, _load_or_zero(h0, state, mask),
        grad_output, output, saved, grad_gates, sequence, unit, mask, schedule, batch_size, rows, HIDDEN, DIRECTIONS,
        OPERAND, PRECISION,
    )  # fmt: skip
    _store(grad_h0 + state, grad_h, mask)


@triton.jit
def _load_lstm_step(
    grad_output, saved, row, runs, before_row, before_runs, first_c, unit, mask, rows, HIDDEN: tl.constexpr,
    DIRECTIONS: tl.constexpr,
):  # fmt: skip
    """A step's gates (i, f, g, o), the cell state that it began with, and its output's gradient."""
    exists, before_exists = mask & runs[:, None], mask & before_runs[:, None]
    kept = saved + _saved_offset(row, unit, rows, HIDDEN, 5)
    i, f = _load(kept, exists), _load(kept + HIDDEN, exists)
    g, o = _load(kept + 2 * HIDDEN, exists), _load(kept + 3 * HIDDEN, exists)
    c_before = _load(saved + _saved_offset(before_row, unit, rows, HIDDEN, 5) + 4 * HIDDEN, before_exists)
    grad = _load_or_zero(grad_output, _output_offset(row, unit, HIDDEN, DIRECTIONS), exists)
    return i, f, g, o, tl.where(before_exists, c_before, first_c), grad


@triton.jit
def lstm_steps_back(
    first, last, own_steps, grad_h, grad_c, w_i, w_f, w_g, w_o, first_c, grad_output, saved, grad_gates, sequence, unit,
    mask, schedule, batch_size, rows, HIDDEN: tl.constexpr, DIRECTIONS: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """As simple_steps_back, and of c. grad_gates: of i, f, g, o."""
    row, runs = _rows_at(own_steps - 1 - first, own_steps, sequence, schedule, batch_size)
    c = _load(saved + _saved_offset(row, unit, rows, HIDDEN, 5) + 4 * HIDDEN, mask & runs[:, None])
    before_row, before_runs = _rows_at(own_steps - 2 - first, own_steps, sequence, schedule, batch_size)
    i, f, g, o, c_before, grad = _load_lstm_step(
        grad_output, saved, row, runs, before_row, before_runs, first_c, unit, mask, rows, HIDDEN, DIRECTIONS
    )
    for back in range(first, last):
        next_row, next_runs = _rows_at(own_steps - 3 - back, own_steps, sequence, schedule, batch_size)
        next_i, next_f, next_g, next_o, next_c_before, next_grad = _load_lstm_step(
            grad_output, saved, before_row, before_runs, next_row, next_runs, first_c, unit, mask, rows, HIDDEN,
            DIRECTIONS,
        )  # fmt: skip
        exists = mask & runs[:, None]
        total = grad_h + grad
        tanh_c = tanh(c)
        through_c = grad_c + total * o * (1.0 - tanh_c * tanh_c)
        grad_i = through_c * g * i * (1.0 - i)
        grad_f = through_c * c_before * f * (1.0 - f)
        grad_g = through_c * i * (1.0 - g * g)
        grad_o = total * tanh_c * o * (1.0 - o)
        place = grad_gates + _saved_offset(row, unit, rows, HIDDEN, 4)
        _store(place, grad_i, exists)
        _store(place + HIDDEN, grad_f, exists)
        _store(place + 2 * HIDDEN, grad_g, exists)
        _store(place + 3 * HIDDEN, grad_o, exists)
        DTYPE: tl.constexpr = saved.dtype.element_ty
        through = tl.dot(grad_i.to(DTYPE).to(OPERAND), w_i, input_precision=PRECISION)
        through = tl.dot(grad_f.to(DTYPE).to(OPERAND), w_f, through, input_precision=PRECISION)
        through = tl.dot(grad_g.to(DTYPE).to(OPERAND), w_g, through, input_precision=PRECISION)
        through = tl.dot(grad_o.to(DTYPE).to(OPERAND), w_o, through, input_precision=PRECISION)
        grad_h = tl.where(exists, through, grad_h)
        grad_c = tl.where(exists, through_c * f, grad_c)
        row, runs, before_row, before_runs = before_row, before_runs, next_row, next_runs
        c, i, f, g, o, c_before, grad = c_before, next_i, next_f, next_g, next_o, next_c_before, next_grad
    return grad_h, grad_c


@triton.jit(do_not_specialize=_RUN_TIME)
def lstm_backward(
    grad_output, grad_h_n, grad_c_n, saved, c0, weight_hh, grad_gates, grad_h0, grad_c0, schedule, steps, batch_size,
    rows, HIDDEN: tl.constexpr, DIRECTIONS: tl.constexpr, TILE: tl.constexpr, BLOCK_BATCH: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    sequence, unit, mask = _tile(batch_size, HIDDEN, TILE, BLOCK_BATCH)
    own_steps = _steps_of_tile(schedule, steps, BLOCK_BATCH)
    w_i, w_f, w_g, w_o = _load_lstm_weights(weight_hh, unit, HIDDEN, True, OPERAND)
    state = _state_offset(sequence, unit, batch_size, HIDDEN)
    grad_h, grad_c = _load_or_zero(grad_h_n, state, mask), _load_or_zero(grad_c_n, state, mask)
    grad_h, grad_c = lstm_steps_back(
        0, own_steps, own_steps, grad_h, grad_c, w_i, w_f, w_g, w_o, _load_or_zero(c0, state, mask), grad_output, saved,
        grad_gates, sequence, unit, mask, schedule, batch_size, rows, HIDDEN, DIRECTIONS, OPERAND, PRECISION,
    )  # fmt: skip
    _store(grad_h0 + state, grad_h, mask)
    _store(grad_c0 + state, grad_c, mask)
