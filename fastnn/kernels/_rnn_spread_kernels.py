"""The Triton kernels of ``fastnn::rnn`` for recurrent weights that no single processor holds: each program keeps those
of UNITS hidden units, and after a step waits for the programs that have the others.

Programs are (batch tile, direction, units); all of them must run at once, which a cooperative launch makes sure of. A
launch runs the steps from ``first`` to ``last``; one of a single step has nothing to wait for, so that the interpreter,
which runs programs one after another, goes through the whole sequence in such launches. Shapes as in _rnn_kernels, and
state: (states, D, batch, H) float32, what is carried from step to step; arrived: (batch tiles * D) int32 zeros.
"""

import triton
import triton.language as tl

from fastnn.kernels._activation import RELU, TANH, activate, activation_gradient, sigmoid, tanh
from fastnn.kernels._rnn_backward_kernels import _load_gru_step, _load_lstm_step, _load_or_zero
from fastnn.kernels._rnn_kernels import (
    _gates_at,
    _load,
    _load_bias,
    _output_offset,
    _rows_at,
    _saved_offset,
    _state_offset,
    _steps_of_tile,
    _store,
    _wait_until,
)

SIMPLE_TANH = tl.constexpr(0)  # by their numbers in the operators' schema
SIMPLE_RELU = tl.constexpr(1)
GRU = tl.constexpr(2)
LSTM = tl.constexpr(3)
_RUN_TIME = ["first", "last", "steps", "batch_size", "rows", "stride_time", "stride_batch"]


@triton.jit
def _wait_for_all(arrived, launches_steps, SPIN_LIMIT: tl.constexpr):
    """Until the programs of this batch tile and direction have come here ``launches_steps`` times."""
    place = arrived + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.debug_barrier()  # the release below is one thread's, for what all threads have written
    tl.atomic_add(place, 1, sem="release")
    _wait_until(place, launches_steps * tl.num_programs(2), SPIN_LIMIT)


@triton.jit
def _own(batch_size, HIDDEN: tl.constexpr, UNITS: tl.constexpr, BLOCK_BATCH: tl.constexpr):
    """This program's sequences and units, and the mask of those that exist."""
    sequence = tl.program_id(0) * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)
    unit = tl.program_id(2) * UNITS + tl.arange(0, UNITS)
    return sequence, unit, (sequence < batch_size)[:, None] & (unit < HIDDEN)[None, :]


@triton.jit
def _every(TILE: tl.constexpr, PARTS: tl.constexpr):
    """All units, (PARTS, TILE / PARTS): sums over them are made in parts, one a warp."""
    return tl.arange(0, PARTS)[:, None] * (TILE // PARTS) + tl.arange(0, TILE // PARTS)[None, :]


@triton.jit
def _load_slice(weight_hh, every, unit, gate, GATES: tl.constexpr, HIDDEN: tl.constexpr, TRANSPOSED: tl.constexpr):
    """A gate's recurrent weight: (parts, from all, to own units), or with TRANSPOSED (.., to all, from own units)."""
    base = weight_hh + (tl.program_id(1) * GATES + gate) * HIDDEN * HIDDEN
    mask = (every < HIDDEN)[:, :, None] & (unit < HIDDEN)[None, None, :]
    if TRANSPOSED:
        return tl.load(base + every[:, :, None] * HIDDEN + unit[None, None, :], mask=mask, other=0.0)
    else:
        return tl.load(base + unit[None, None, :] * HIDDEN + every[:, :, None], mask=mask, other=0.0)


@triton.jit
def _load_all(place, start, every, exists, HIDDEN: tl.constexpr):
    """What all programs have left at ``place`` for this one's sequences, which begin at ``start``: (parts, batch,
    from all); past the first-level cache, which knows nothing of what other processors write."""
    mask = exists[None, :, None] & (every < HIDDEN)[:, None, :]
    return tl.load(place + start[None, :, None] + every[:, None, :], mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def _product(operand, w, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """(batch, own units), summed up over the parts."""
    return tl.sum(tl.dot(operand.to(OPERAND), w, input_precision=PRECISION), 0)


@triton.jit(do_not_specialize=_RUN_TIME)
def spread_forward(
    gates, weight_hh, bias_hh, hidden, state, output, saved, arrived, schedule, first, last, steps, batch_size, rows,
    stride_time, stride_batch, MODE: tl.constexpr, GATES: tl.constexpr, HIDDEN: tl.constexpr,
    DIRECTIONS: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, UNITS: tl.constexpr,
    BLOCK_BATCH: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, SPIN_LIMIT: tl.constexpr,
):  # fmt: skip
    """hidden: (2, D, batch, H), where programs find the state that the step before left, h0 in the second half."""
    sequence, unit, mask = _own(batch_size, HIDDEN, UNITS, BLOCK_BATCH)
    every = _every(TILE, PARTS)
    own_steps = _steps_of_tile(schedule, steps, BLOCK_BATCH)
    limit = tl.minimum(last, own_steps)
    all_states = DIRECTIONS * batch_size.to(tl.int64) * HIDDEN
    at = _state_offset(sequence, unit, batch_size, HIDDEN)
    start = (tl.program_id(1).to(tl.int64) * batch_size + sequence) * HIDDEN
    h = _load(state + at, mask)
    w_0 = _load_slice(weight_hh, every, unit, 0, GATES, HIDDEN, False).to(OPERAND)
    b_0 = tl.zeros([1, UNITS], tl.float32)
    if GATES > 1:
        w_1 = _load_slice(weight_hh, every, unit, 1, GATES, HIDDEN, False).to(OPERAND)
        w_2 = _load_slice(weight_hh, every, unit, 2, GATES, HIDDEN, False).to(OPERAND)
        b_1, b_2 = b_0, b_0
    if MODE == LSTM:
        w_3 = _load_slice(weight_hh, every, unit, 3, GATES, HIDDEN, False).to(OPERAND)
        b_3 = b_0
        c = _load(state + all_states + at, mask)
    if bias_hh is not None:
        b_0 = _load_bias(bias_hh, unit, 0, GATES, HIDDEN)
        if GATES > 1:
            b_1 = _load_bias(bias_hh, unit, 1, GATES, HIDDEN)
            b_2 = _load_bias(bias_hh, unit, 2, GATES, HIDDEN)
        if MODE == LSTM:
            b_3 = _load_bias(bias_hh, unit, 3, GATES, HIDDEN)
    for step in range(first, limit):
        place, exists = _gates_at(gates, step, own_steps, sequence, unit, mask, schedule, batch_size, rows,
                                  stride_time, stride_batch, GATES * HIDDEN)  # fmt: skip
        row, runs = _rows_at(step, own_steps, sequence, schedule, batch_size)
        operand = _load_all(hidden + (step + 1) % 2 * all_states, start, every, sequence < batch_size, HIDDEN)
        sums = _load(place, exists) + b_0 + _product(operand, w_0, OPERAND, PRECISION)
        kept = output
        if saved is not None:
            kept = saved + _saved_offset(row, unit, rows, HIDDEN, 5 if MODE == LSTM else 4)
        store_mask = mask & runs[:, None]
        if MODE == GRU:
            r = sigmoid(sums)
            z = sigmoid(_load(place + HIDDEN, exists) + b_1 + _product(operand, w_1, OPERAND, PRECISION))
            hidden_n = b_2 + _product(operand, w_2, OPERAND, PRECISION)
            n = tanh(_load(place + 2 * HIDDEN, exists) + r * hidden_n)
            new_h = n + z * (h - n)
            if saved is not None:
                _store(kept, r, store_mask)
                _store(kept + HIDDEN, z, store_mask)
                _store(kept + 2 * HIDDEN, n, store_mask)
                _store(kept + 3 * HIDDEN, hidden_n, store_mask)
        elif MODE == LSTM:
            i = sigmoid(sums)
            f = sigmoid(_load(place + HIDDEN, exists) + b_1 + _product(operand, w_1, OPERAND, PRECISION))
            g = tanh(_load(place + 2 * HIDDEN, exists) + b_2 + _product(operand, w_2, OPERAND, PRECISION))
            o = sigmoid(_load(place + 3 * HIDDEN, exists) + b_3 + _product(operand, w_3, OPERAND, PRECISION))
            c = tl.where(runs[:, None], f * c + i * g, c)
            new_h = o * tanh(c)
            if saved is not None:
                _store(kept, i, store_mask)
                _store(kept + HIDDEN, f, store_mask)
                _store(kept + 2 * HIDDEN, g, store_mask)
                _store(kept + 3 * HIDDEN, o, store_mask)
                _store(kept + 4 * HIDDEN, c, store_mask)
        elif MODE == SIMPLE_RELU:
            new_h = activate(sums, RELU)
        else:
            new_h = activate(sums, TANH)
        h = tl.where(runs[:, None], new_h, h)
        _store(hidden + step % 2 * all_states + at, h, mask)
        _store(output + _output_offset(row, unit, HIDDEN, DIRECTIONS), h, store_mask)
        if step + 1 < limit:
            _wait_for_all(arrived, step + 1 - first, SPIN_LIMIT)
    tl.store(state + at, h, mask=mask)
    if MODE == LSTM:
        tl.store(state + all_states + at, c, mask=mask)


@triton.jit(do_not_specialize=_RUN_TIME)
def spread_backward(
    grad_output, output, saved, h0, c0, weight_hh, grad_gates, state, arrived, schedule, first, last, steps,
    batch_size, rows, MODE: tl.constexpr, GATES: tl.constexpr, HIDDEN: tl.constexpr, DIRECTIONS: tl.constexpr,
    TILE: tl.constexpr, PARTS: tl.constexpr, UNITS: tl.constexpr, BLOCK_BATCH: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, SPIN_LIMIT: tl.constexpr,
):  # fmt: skip
    """Step ``first`` is the sequence's last. A step begins with the part of the state's gradient that goes through the
    gates of the step after it, which all programs have left in grad_gates; so there is one step more than in forward.
    state: the gradients of the final state, then of the initial one."""
    sequence, unit, mask = _own(batch_size, HIDDEN, UNITS, BLOCK_BATCH)
    every = _every(TILE, PARTS)
    KINDS: tl.constexpr = 1 if GATES == 1 else 4
    own_steps = _steps_of_tile(schedule, steps, BLOCK_BATCH)
    limit = tl.minimum(last, own_steps + 1)
    at = _state_offset(sequence, unit, batch_size, HIDDEN)
    grad_h = _load(state + at, mask)
    w_0 = _load_slice(weight_hh, every, unit, 0, GATES, HIDDEN, True).to(OPERAND)
    if GATES > 1:
        w_1 = _load_slice(weight_hh, every, unit, 1, GATES, HIDDEN, True).to(OPERAND)
        w_2 = _load_slice(weight_hh, every, unit, 2, GATES, HIDDEN, True).to(OPERAND)
    if MODE == GRU:
        first_h = _load_or_zero(h0, at, mask)
    if MODE == LSTM:
        w_3 = _load_slice(weight_hh, every, unit, 3, GATES, HIDDEN, True).to(OPERAND)
        first_c = _load_or_zero(c0, at, mask)
        at_c = DIRECTIONS * batch_size.to(tl.int64) * HIDDEN + at
        grad_c = _load(state + at_c, mask)
    for back in range(first, limit):
        later_row, later_runs = _rows_at(own_steps - back, own_steps, sequence, schedule, batch_size)
        start = (tl.program_id(1) * rows.to(tl.int64) + later_row) * (KINDS * HIDDEN)
        through = _product(_load_all(grad_gates, start, every, later_runs, HIDDEN), w_0, OPERAND, PRECISION)
        if GATES > 1:
            grads = _load_all(grad_gates + HIDDEN, start, every, later_runs, HIDDEN)
            through += _product(grads, w_1, OPERAND, PRECISION)
            # Of GRU's third gate, the hidden half, which is the last kind.
            grads = _load_all(grad_gates + (3 if MODE == GRU else 2) * HIDDEN, start, every, later_runs, HIDDEN)
            through += _product(grads, w_2, OPERAND, PRECISION)
        if MODE == LSTM:
            grads = _load_all(grad_gates + 3 * HIDDEN, start, every, later_runs, HIDDEN)
            through += _product(grads, w_3, OPERAND, PRECISION)
        grad_h += tl.where(later_runs[:, None], through, 0.0)
        row, runs = _rows_at(own_steps - 1 - back, own_steps, sequence, schedule, batch_size)
        before_row, before_runs = _rows_at(own_steps - 2 - back, own_steps, sequence, schedule, batch_size)
        exists = mask & runs[:, None]
        place = grad_gates + _saved_offset(row, unit, rows, HIDDEN, KINDS)
        if MODE == GRU:
            r, z, n, hidden_n, h_before, grad = _load_gru_step(
                grad_output, output, saved, row, runs, before_row, before_runs, first_h, unit, mask, rows, HIDDEN,
                DIRECTIONS,
            )  # fmt: skip
            total = grad_h + grad
            grad_n = total * (1.0 - z) * (1.0 - n * n)
            _store(place, grad_n * hidden_n * r * (1.0 - r), exists)
            _store(place + HIDDEN, total * (h_before - n) * z * (1.0 - z), exists)
            _store(place + 2 * HIDDEN, grad_n, exists)
            _store(place + 3 * HIDDEN, grad_n * r, exists)
            grad_h = tl.where(runs[:, None], total * z, grad_h)
        elif MODE == LSTM:
            i, f, g, o, c_before, grad = _load_lstm_step(
                grad_output, saved, row, runs, before_row, before_runs, first_c, unit, mask, rows, HIDDEN, DIRECTIONS
            )
            tanh_c = tanh(_load(saved + _saved_offset(row, unit, rows, HIDDEN, 5) + 4 * HIDDEN, exists))
            total = grad_h + grad
            through_c = grad_c + total * o * (1.0 - tanh_c * tanh_c)
            _store(place, through_c * g * i * (1.0 - i), exists)
            _store(place + HIDDEN, through_c * c_before * f * (1.0 - f), exists)
            _store(place + 2 * HIDDEN, through_c * i * (1.0 - g * g), exists)
            _store(place + 3 * HIDDEN, total * tanh_c * o * (1.0 - o), exists)
            grad_h = tl.where(runs[:, None], 0.0, grad_h)
            grad_c = tl.where(runs[:, None], through_c * f, grad_c)
        else:
            offset = _output_offset(row, unit, HIDDEN, DIRECTIONS)
            total = grad_h + _load_or_zero(grad_output, offset, exists)
            h = _load(output + offset, exists)
            if MODE == SIMPLE_RELU:
                _store(place, activation_gradient(total, h, RELU), exists)
            else:
                _store(place, activation_gradient(total, h, TANH), exists)
            grad_h = tl.where(runs[:, None], 0.0, grad_h)
        if back + 1 < limit:
            _wait_for_all(arrived, back + 1 - first, SPIN_LIMIT)
    tl.store(state + at, grad_h, mask=mask)
    if MODE == LSTM:
        tl.store(state + at_c, grad_c, mask=mask)
