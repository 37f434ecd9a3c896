"""The Triton kernel of ``fastnn::rnn``: one direction of one layer over the whole sequence in one program a batch tile,
the recurrent weights staying on chip. Shapes as in _rnn_tile.

A step's gates are loaded while the step before is computed: nothing waits for memory but the recurrence itself.
"""

import triton
import triton.language as tl

from fastnn.kernels.rnn.cells import GRU, GRU_SAVED, LSTM, LSTM_SAVED, gru_cell, lstm_cell, simple_cell
from fastnn.kernels.rnn.tile import (
    Gates,
    Tile,
    extent_of,
    kinds_offset,
    kinds_ptrs,
    load_bias,
    load_gates,
    load_or_zero,
    load_weight,
    output_offset,
    rows_of,
    stack_4,
    state_offset,
    store,
    unstack_2,
    unstack_4,
)

# Sizes that differ from batch to batch: one compiled kernel serves them all.
RUN_TIME_SIZES = ["steps", "batch_size", "rows", "stride_time", "stride_batch"]


@triton.jit
def load_weights(weight_hh_ptr, unit, MODE: tl.constexpr, HIDDEN: tl.constexpr, OPERAND: tl.constexpr):
    """A weight a dot: GRU's new gate apart from the others, whose sums take the input's share with them."""
    if MODE == GRU:
        w = (load_weight(weight_hh_ptr, unit, 0, 2, 3, HIDDEN, OPERAND),
             load_weight(weight_hh_ptr, unit, 2, 1, 3, HIDDEN, OPERAND))  # fmt: skip
    elif MODE == LSTM:
        w = (load_weight(weight_hh_ptr, unit, 0, 4, 4, HIDDEN, OPERAND),)
    else:
        w = (load_weight(weight_hh_ptr, unit, 0, 1, 1, HIDDEN, OPERAND),)
    return w


@triton.jit
def _load_gates(gates, step, tile, MODE: tl.constexpr, HIDDEN: tl.constexpr):
    """A tile a dot."""
    if MODE == GRU:
        x = (load_gates(gates, step, tile, 0, 2, 3, HIDDEN), load_gates(gates, step, tile, 2, 1, 3, HIDDEN))
    elif MODE == LSTM:
        x = (load_gates(gates, step, tile, 0, 4, 4, HIDDEN),)
    else:
        x = (load_gates(gates, step, tile, 0, 1, 1, HIDDEN),)
    return x


@triton.jit
def _load_biases(bias_hh_ptr, unit, MODE: tl.constexpr, HIDDEN: tl.constexpr):
    """A column a dot."""
    if MODE == GRU:
        b = (load_bias(bias_hh_ptr, unit, 0, 2, 3, HIDDEN), load_bias(bias_hh_ptr, unit, 2, 1, 3, HIDDEN))
    elif MODE == LSTM:
        b = (load_bias(bias_hh_ptr, unit, 0, 4, 4, HIDDEN),)
    else:
        b = (load_bias(bias_hh_ptr, unit, 0, 1, 1, HIDDEN),)
    return b


@triton.jit
def forward_steps(
    first, last, h, c, w, gates, bias_hh_ptr, output_ptr, saved_ptr, tile, MODE: tl.constexpr, HIDDEN: tl.constexpr,
    DIRECTIONS: tl.constexpr, PRECISION: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """The steps from ``first`` to ``last`` -> h and c, which is LSTM's: else what it was. w: see load_weights."""
    bias = _load_biases(bias_hh_ptr, tile.unit, MODE, HIDDEN)
    x = _load_gates(gates, first, tile, MODE, HIDDEN)
    KEPT: tl.constexpr = LSTM_SAVED if MODE == LSTM else GRU_SAVED
    for step in range(first, last):
        next_x = _load_gates(gates, step + 1, tile, MODE, HIDDEN)
        row, runs = rows_of(step, tile)
        mask = tile.mask & runs[None, :]
        operand = h.to(output_ptr.dtype.element_ty).to(w[0].dtype)
        sums = tl.dot(w[0], operand, x[0].to(tl.float32) + bias[0], input_precision=PRECISION)
        if MODE == GRU:
            sum_r, sum_z = unstack_2(sums)
            hidden_n = tl.dot(w[1], operand, input_precision=PRECISION) + bias[1]
            new_h, r, z, n = gru_cell(sum_r, sum_z, x[1].to(tl.float32), hidden_n, h, MATH)
            kinds = stack_4(hidden_n, r, z, n)
        elif MODE == LSTM:
            sum_i, sum_f, sum_g, sum_o = unstack_4(sums)
            new_h, new_c, i, f, g, o = lstm_cell(sum_i, sum_f, sum_g, sum_o, c, MATH)
            c = tl.where(mask, new_c, c)
            kinds = stack_4(i, f, g, o)
        else:
            new_h = simple_cell(sums, MODE, MATH)
        h = tl.where(mask, new_h, h)
        store(output_ptr + output_offset(row, tile.unit, HIDDEN, DIRECTIONS), h, mask)
        if saved_ptr is not None:
            ptrs, stack_mask = kinds_ptrs(saved_ptr, row, runs, tile, HIDDEN, KEPT)
            store(ptrs, kinds, stack_mask)
            if MODE == LSTM:
                store(saved_ptr + 4 * HIDDEN + kinds_offset(row, tile.unit, tile.rows, HIDDEN, KEPT), c, mask)
        x = next_x
    return h, c


@triton.jit(do_not_specialize=RUN_TIME_SIZES)
def forward(
    x_ptr, weight_hh_ptr, bias_hh_ptr, h0_ptr, c0_ptr, output_ptr, saved_ptr, h_n_ptr, c_n_ptr, schedule_ptr, steps,
    batch_size, rows, stride_time, stride_batch, MODE: tl.constexpr, HIDDEN: tl.constexpr, DIRECTIONS: tl.constexpr,
    TILE: tl.constexpr, BLOCK_BATCH: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """c0 and c_n are LSTM's, saved is not of simple networks: else None."""
    extent = extent_of(schedule_ptr, steps, batch_size, 0, HIDDEN, TILE, BLOCK_BATCH)
    tile = Tile(*extent, schedule_ptr, batch_size, rows)
    w = load_weights(weight_hh_ptr, tile.unit, MODE, HIDDEN, OPERAND)
    state = state_offset(tile, HIDDEN)
    h, c = load_or_zero(h0_ptr, state, tile.mask), load_or_zero(c0_ptr, state, tile.mask)
    gates = Gates(x_ptr, stride_time, stride_batch)
    h, c = forward_steps(0, tile.steps, h, c, w, gates, bias_hh_ptr, output_ptr, saved_ptr, tile, MODE, HIDDEN,
                         DIRECTIONS, PRECISION, MATH)  # fmt: skip
    store(h_n_ptr + state, h, tile.mask)
    if MODE == LSTM:
        store(c_n_ptr + state, c, tile.mask)
