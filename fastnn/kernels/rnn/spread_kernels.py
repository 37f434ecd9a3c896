"""The Triton kernels of ``fastnn::rnn`` for recurrent weights that no single processor holds: each program keeps those
of UNITS hidden units, and after a step waits for the programs that have the others.

Programs are (batch tile, direction, units); all of them must run at once, which a cooperative launch makes sure of. A
launch runs the steps from ``first`` to ``last``; one of a single step has nothing to wait for, so that the interpreter,
which runs programs one after another, goes through the whole sequence in such launches. Shapes as in _rnn_tile, and
state: (states, D, batch, H) float32, what is carried from step to step; arrived: (batch tiles * D) int32 zeros.

Sums over all units are made in PARTS, one a warp, and put together once a step.
"""

import triton
import triton.language as tl

from fastnn.kernels.rnn.backward_kernels import Kept, load_c, load_step, store_grads
from fastnn.kernels.rnn.cells import GRU, GRU_SAVED, LSTM, LSTM_SAVED, cell_back, gru_cell, lstm_cell, simple_cell
from fastnn.kernels.rnn.kernels import RUN_TIME_SIZES
from fastnn.kernels.rnn.tile import (
    Gates,
    Tile,
    extent_of,
    gate_rows,
    kinds_offset,
    load,
    load_bias,
    load_gates,
    load_or_zero,
    load_stored,
    output_offset,
    rows_of,
    stack_offset,
    state_offset,
    store,
    unstack_4,
    wait_until,
)

_RUN_TIME_SIZES = ["first", "last", *RUN_TIME_SIZES]


@triton.jit
def _count_ptr(arrived_ptr):
    """How often programs of this batch tile and direction have arrived at the end of a step."""
    return arrived_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)


@triton.jit
def _arrive(arrived_ptr):
    tl.debug_barrier()  # the release below is one thread's, for what all threads have written
    tl.atomic_add(_count_ptr(arrived_ptr), 1, sem="release")


@triton.jit
def _wait_for_all(arrived_ptr, launches_steps, SPIN_LIMIT: tl.constexpr):
    wait_until(_count_ptr(arrived_ptr), launches_steps * tl.num_programs(2), SPIN_LIMIT)


@triton.jit
def _parts_of_units(TILE: tl.constexpr, PARTS: tl.constexpr):
    """All units, (PARTS, TILE / PARTS)."""
    return tl.arange(0, PARTS)[:, None] * (TILE // PARTS) + tl.arange(0, TILE // PARTS)[None, :]


@triton.jit
def _load_weight(weight_hh_ptr, every, unit, COUNT: tl.constexpr, GATES: tl.constexpr, HIDDEN: tl.constexpr,
                 OPERAND: tl.constexpr):  # fmt: skip
    """(parts, COUNT gates and own units to, units from)"""
    to, exists = stack_offset(unit, 0, COUNT, GATES, HIDDEN)
    ptrs = weight_hh_ptr + (tl.program_id(1) * GATES * HIDDEN + to[None, :, None]) * HIDDEN + every[:, None, :]
    return tl.load(ptrs, mask=exists[None, :, None] & (every < HIDDEN)[:, None, :], other=0.0).to(OPERAND)


@triton.jit
def _load_weight_back(weight_hh_ptr, every, unit, gate, GATES: tl.constexpr, HIDDEN: tl.constexpr,
                      OPERAND: tl.constexpr):  # fmt: skip
    """A gate's: (parts, own units from, units to)"""
    base = weight_hh_ptr + (tl.program_id(1) * GATES + gate) * HIDDEN * HIDDEN
    mask = (unit < HIDDEN)[None, :, None] & (every < HIDDEN)[:, None, :]
    return tl.load(base + every[:, None, :] * HIDDEN + unit[None, :, None], mask=mask, other=0.0).to(OPERAND)


@triton.jit
def _load_weights_back(weight_hh_ptr, every, unit, GATES: tl.constexpr, HIDDEN: tl.constexpr, OPERAND: tl.constexpr):
    w_0 = _load_weight_back(weight_hh_ptr, every, unit, 0, GATES, HIDDEN, OPERAND)
    if GATES == 1:
        w = (w_0,)
    else:
        w_1 = _load_weight_back(weight_hh_ptr, every, unit, 1, GATES, HIDDEN, OPERAND)
        w_2 = _load_weight_back(weight_hh_ptr, every, unit, 2, GATES, HIDDEN, OPERAND)
        if GATES == 3:
            w = (w_0, w_1, w_2)
        else:
            w = (w_0, w_1, w_2, _load_weight_back(weight_hh_ptr, every, unit, 3, GATES, HIDDEN, OPERAND))
    return w


@triton.jit
def _load_all(ptr, start, every, exists, HIDDEN: tl.constexpr, OPERAND: tl.constexpr):
    """What all programs have left for this one's sequences, which begin at ``start``: (parts, units, sequences); past
    the first-level cache, which knows nothing of what other processors write."""
    mask = exists[None, None, :] & (every < HIDDEN)[:, :, None]
    ptrs = ptr + start[None, None, :] + every[:, :, None]
    return tl.load(ptrs, mask=mask, other=0.0, cache_modifier=".cg").to(OPERAND)


@triton.jit
def _load_gates(gates, step, tile, GATES: tl.constexpr, HIDDEN: tl.constexpr):
    """The input's share, stacked as the products are; GRU's new gate comes fourth, in the place of the products that
    there are not, since the third's are only the hidden half of it."""
    if GATES == 3:
        start, runs = gate_rows(gates, step, tile, 3 * HIDDEN)
        offset, exists = stack_offset(tile.unit, 0, 4, 4, HIDDEN)
        is_fourth = offset >= 3 * HIDDEN
        exists &= (offset < 2 * HIDDEN) | is_fourth
        offset -= tl.where(is_fourth, HIDDEN, 0)
        return load_stored(gates.x_ptr + start[None, :] + offset[:, None], exists[:, None] & runs[None, :])
    else:
        return load_gates(gates, step, tile, 0, GATES, GATES, HIDDEN)


@triton.jit
def _store_4(ptrs, a, b, c, d, mask, HIDDEN: tl.constexpr):
    """Four kinds, from the first one's pointers on."""
    store(ptrs, a, mask)
    store(ptrs + HIDDEN, b, mask)
    store(ptrs + 2 * HIDDEN, c, mask)
    store(ptrs + 3 * HIDDEN, d, mask)


@triton.jit(do_not_specialize=_RUN_TIME_SIZES)
def spread_forward(
    x_ptr, weight_hh_ptr, bias_hh_ptr, hidden_ptr, state_ptr, output_ptr, saved_ptr, arrived_ptr, schedule_ptr, first,
    last, steps, batch_size, rows, stride_time, stride_batch, MODE: tl.constexpr, GATES: tl.constexpr,
    HIDDEN: tl.constexpr, DIRECTIONS: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, UNITS: tl.constexpr,
    BLOCK_BATCH: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, MATH: tl.constexpr,
    SPIN_LIMIT: tl.constexpr,
):  # fmt: skip
    """hidden: (2, D, batch, H), where programs find the state that the step before left, h0 in the second half."""
    extent = extent_of(schedule_ptr, steps, batch_size, tl.program_id(2) * UNITS, HIDDEN, UNITS, BLOCK_BATCH)
    tile = Tile(*extent, schedule_ptr, batch_size, rows)
    every = _parts_of_units(TILE, PARTS)
    limit = tl.minimum(last, tile.steps)
    all_states = DIRECTIONS * batch_size.to(tl.int64) * HIDDEN
    at = state_offset(tile, HIDDEN)
    start = (tl.program_id(1).to(tl.int64) * batch_size + tile.sequence) * HIDDEN
    STACKED: tl.constexpr = 1 if GATES == 1 else 4  # GRU's too: one dot and one sum over the parts
    KEPT: tl.constexpr = LSTM_SAVED if MODE == LSTM else GRU_SAVED
    w = _load_weight(weight_hh_ptr, every, tile.unit, STACKED, GATES, HIDDEN, OPERAND)
    bias = load_bias(bias_hh_ptr, tile.unit, 0, STACKED, GATES, HIDDEN)
    is_product = tl.arange(0, STACKED * UNITS) < GATES * UNITS
    h = load(state_ptr + at, tile.mask)
    if MODE == LSTM:
        c = load(state_ptr + all_states + at, tile.mask)
    gates = Gates(x_ptr, stride_time, stride_batch)
    x = _load_gates(gates, first, tile, GATES, HIDDEN)
    for step in range(first, limit):
        row, runs = rows_of(step, tile)
        mask = tile.mask & runs[None, :]
        operand = _load_all(hidden_ptr + (step + 1) % 2 * all_states, start, every, tile.sequence < batch_size, HIDDEN,
                            OPERAND)  # fmt: skip
        sums = tl.sum(tl.dot(w, operand, input_precision=PRECISION), 0) + bias
        if MODE == GRU:  # the fourth product is zero times a state that may be inf
            sums = tl.where(is_product[:, None], sums, 0.0)
        sums += x.to(tl.float32)
        if MODE == GRU:
            sum_r, sum_z, hidden_n, x_n = unstack_4(sums)
            new_h, r, z, n = gru_cell(sum_r, sum_z, x_n, hidden_n, h, MATH)
        elif MODE == LSTM:
            sum_i, sum_f, sum_g, sum_o = unstack_4(sums)
            new_h, new_c, i, f, g, o = lstm_cell(sum_i, sum_f, sum_g, sum_o, c, MATH)
            c = tl.where(mask, new_c, c)
        else:
            new_h = simple_cell(sums, MODE, MATH)
        h = tl.where(mask, new_h, h)
        store(hidden_ptr + step % 2 * all_states + at, h, tile.mask)
        x = _load_gates(gates, step + 1, tile, GATES, HIDDEN)
        if step + 1 < limit:
            _arrive(arrived_ptr)
        # What no other program waits for.
        store(output_ptr + output_offset(row, tile.unit, HIDDEN, DIRECTIONS), h, mask)
        if saved_ptr is not None:
            # Not stacked: for that, all warps would compute the same.
            ptrs = saved_ptr + kinds_offset(row, tile.unit, rows, HIDDEN, KEPT)
            if MODE == GRU:
                _store_4(ptrs, hidden_n, r, z, n, mask, HIDDEN)
            elif MODE == LSTM:
                _store_4(ptrs, i, f, g, o, mask, HIDDEN)
                store(ptrs + 4 * HIDDEN, c, mask)
        if step + 1 < limit:
            _wait_for_all(arrived_ptr, step + 1 - first, SPIN_LIMIT)
    tl.store(state_ptr + at, h, mask=tile.mask)
    if MODE == LSTM:
        tl.store(state_ptr + all_states + at, c, mask=tile.mask)


@triton.jit(do_not_specialize=_RUN_TIME_SIZES[:-2])
def spread_backward(
    grad_output_ptr, output_ptr, saved_ptr, h0_ptr, c0_ptr, weight_hh_ptr, grad_gates_ptr, state_ptr, arrived_ptr,
    schedule_ptr, first, last, steps, batch_size, rows, MODE: tl.constexpr, GATES: tl.constexpr, HIDDEN: tl.constexpr,
    DIRECTIONS: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, UNITS: tl.constexpr,
    BLOCK_BATCH: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, MATH: tl.constexpr,
    SPIN_LIMIT: tl.constexpr,
):  # fmt: skip
    """Step ``first`` is the sequence's last. A step begins with the part of the state's gradient that goes through the
    gates of the step after it, which all programs have left in grad_gates; so there is one step more than in forward.
    state: the gradients of the final state, then of the initial one."""
    extent = extent_of(schedule_ptr, steps, batch_size, tl.program_id(2) * UNITS, HIDDEN, UNITS, BLOCK_BATCH)
    tile = Tile(*extent, schedule_ptr, batch_size, rows)
    every = _parts_of_units(TILE, PARTS)
    KINDS: tl.constexpr = 1 if GATES == 1 else 4
    limit = tl.minimum(last, tile.steps + 1)
    at = state_offset(tile, HIDDEN)
    at_c = DIRECTIONS * batch_size.to(tl.int64) * HIDDEN + at
    w = _load_weights_back(weight_hh_ptr, every, tile.unit, GATES, HIDDEN, OPERAND)
    kept = Kept(grad_output_ptr, output_ptr, saved_ptr)
    grad_h = load(state_ptr + at, tile.mask)
    start = load_or_zero(c0_ptr if MODE == LSTM else h0_ptr, at, tile.mask).to(output_ptr.dtype.element_ty)
    values = load_step(kept, tile.steps - 1 - first, start, tile, MODE, HIDDEN, DIRECTIONS)
    grad_c, c = grad_h, grad_h  # only LSTM has them
    if MODE == LSTM:
        grad_c, c = load(state_ptr + at_c, tile.mask), load_c(kept, tile.steps - 1 - first, tile, HIDDEN)
    for back in range(first, limit):
        later_row, later_runs = rows_of(tile.steps - back, tile)
        later = (tl.program_id(1) * rows.to(tl.int64) + later_row) * (KINDS * HIDDEN)
        sums = tl.zeros([PARTS, UNITS, BLOCK_BATCH], tl.float32)
        for gate in tl.static_range(GATES):
            # GRU's third gate is the first kind: see _rnn_cells.
            kind_ptr = grad_gates_ptr + ((gate + 1) % 3 if MODE == GRU else gate) * HIDDEN
            operand = _load_all(kind_ptr, later, every, later_runs, HIDDEN, OPERAND)
            sums = tl.dot(w[gate], operand, sums, input_precision=PRECISION)
        grad_h += tl.where(later_runs[None, :], tl.sum(sums, 0), 0.0)
        row, runs = rows_of(tile.steps - 1 - back, tile)
        mask = tile.mask & runs[None, :]
        grads, through, grad_c_before, c = cell_back(grad_h, grad_c, values, c, MODE, MATH)
        store_grads(grad_gates_ptr, grads, row, runs, tile, MODE, HIDDEN)
        grad_h, grad_c = tl.where(mask, through, grad_h), tl.where(mask, grad_c_before, grad_c)
        values = load_step(kept, tile.steps - 2 - back, start, tile, MODE, HIDDEN, DIRECTIONS)
        if back + 1 < limit:
            _arrive(arrived_ptr)
            _wait_for_all(arrived_ptr, back + 1 - first, SPIN_LIMIT)
    tl.store(state_ptr + at, grad_h, mask=tile.mask)
    if MODE == LSTM:
        tl.store(state_ptr + at_c, grad_c, mask=tile.mask)
