"""The Triton kernel of ``fastnn::rnn_backward``: one direction of one layer from the last step to the first, in one
program a batch tile, the recurrent weights staying on chip.

Shapes as in _rnn_tile. grad_output (rows, D * H), grad_h_n and grad_c_n (D, batch, H) may be None. grad_gates (D,
rows, kinds * H) is the gradient before each activation (its kinds: _rnn_cells), from which launchers make the weights'
and the input's gradients; grad_h0 and grad_c0 (D, batch, H). What a step reads is loaded while the step after it is
computed. As in forward, what is carried stays zero in lanes beyond H.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastnn.kernels.rnn.cells import GRU, GRU_SAVED, LSTM, LSTM_SAVED, cell_back
from fastnn.kernels.rnn.kernels import RUN_TIME_SIZES
from fastnn.kernels.rnn.tile import (
    Tile,
    extent_of,
    kinds_offset,
    kinds_ptrs,
    load,
    load_or_zero,
    load_stored,
    load_weight_back,
    output_offset,
    rows_of,
    stack_2,
    stack_4,
    state_offset,
    store,
)


class Kept(NamedTuple):
    """What backward reads of forward, and the gradient of its output."""

    grad_output_ptr: Any
    output_ptr: Any
    saved_ptr: Any


@triton.jit
def load_weights_back(weight_hh_ptr, unit, MODE: tl.constexpr, HIDDEN: tl.constexpr, OPERAND: tl.constexpr):
    """A weight a dot; of GRU's three gates two are stacked."""
    if MODE == GRU:
        w = (load_weight_back(weight_hh_ptr, unit, 0, 2, 3, HIDDEN, OPERAND),
             load_weight_back(weight_hh_ptr, unit, 2, 1, 3, HIDDEN, OPERAND))  # fmt: skip
    elif MODE == LSTM:
        w = (load_weight_back(weight_hh_ptr, unit, 0, 4, 4, HIDDEN, OPERAND),)
    else:
        w = (load_weight_back(weight_hh_ptr, unit, 0, 1, 1, HIDDEN, OPERAND),)
    return w


@triton.jit
def load_step(kept, step, start, tile, MODE: tl.constexpr, HIDDEN: tl.constexpr, DIRECTIONS: tl.constexpr):
    """The gradient of a step's output, and what the step kept: of a simple network h; of GRU its kinds, stacked, and
    the state that the step began with; of LSTM the same of c. ``start``: the state that the first step began with.
    All as stored: a step ahead, they take registers."""
    row, runs = rows_of(step, tile)
    mask = tile.mask & runs[None, :]
    offset = output_offset(row, tile.unit, HIDDEN, DIRECTIONS)
    if kept.grad_output_ptr is None:
        grad = tl.zeros(offset.shape, kept.output_ptr.dtype.element_ty)
    else:
        grad = load_stored(kept.grad_output_ptr + offset, mask)
    if MODE >= GRU:
        KEPT: tl.constexpr = LSTM_SAVED if MODE == LSTM else GRU_SAVED
        ptrs, stack_mask = kinds_ptrs(kept.saved_ptr, row, runs, tile, HIDDEN, KEPT)
        row_before, runs_before = rows_of(step - 1, tile)
        mask_before = tile.mask & runs_before[None, :]
        if MODE == LSTM:
            before_ptrs = kept.saved_ptr + 4 * HIDDEN + kinds_offset(row_before, tile.unit, tile.rows, HIDDEN, KEPT)
        else:
            before_ptrs = kept.output_ptr + output_offset(row_before, tile.unit, HIDDEN, DIRECTIONS)
        before = tl.where(mask_before, load_stored(before_ptrs, mask_before), start)
        values = (grad, load_stored(ptrs, stack_mask), before)
    else:
        values = (grad, load_stored(kept.output_ptr + offset, mask))
    return values


@triton.jit
def load_c(kept, step, tile, HIDDEN: tl.constexpr):
    """LSTM's c at the end of a step."""
    row, runs = rows_of(step, tile)
    ptrs = kept.saved_ptr + 4 * HIDDEN + kinds_offset(row, tile.unit, tile.rows, HIDDEN, 5)
    return load(ptrs, tile.mask & runs[None, :])


@triton.jit
def store_grads(grad_gates_ptr, grads, row, runs, tile, MODE: tl.constexpr, HIDDEN: tl.constexpr):
    """Those of a step's kinds."""
    if MODE >= GRU:
        ptrs, mask = kinds_ptrs(grad_gates_ptr, row, runs, tile, HIDDEN, 4)
        store(ptrs, stack_4(grads[0], grads[1], grads[2], grads[3]), mask)
    else:
        ptrs = grad_gates_ptr + kinds_offset(row, tile.unit, tile.rows, HIDDEN, 1)
        store(ptrs, grads[0], tile.mask & runs[None, :])


@triton.jit
def backward_steps(
    first, last, grad_h, grad_c, w, start, kept, grad_gates_ptr, tile, MODE: tl.constexpr, HIDDEN: tl.constexpr,
    DIRECTIONS: tl.constexpr, PRECISION: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """Back from the step ``first`` before the last one to the one ``last - 1`` before it -> the gradients of the states
    that it began with; that of c is LSTM's: else what it was. w: see load_weights_back; start: see load_step."""
    values = load_step(kept, tile.steps - 1 - first, start, tile, MODE, HIDDEN, DIRECTIONS)
    c = grad_c
    if MODE == LSTM:
        c = load_c(kept, tile.steps - 1 - first, tile, HIDDEN)
    for back in range(first, last):
        next_values = load_step(kept, tile.steps - 2 - back, start, tile, MODE, HIDDEN, DIRECTIONS)
        row, runs = rows_of(tile.steps - 1 - back, tile)
        mask = tile.mask & runs[None, :]
        DTYPE: tl.constexpr = grad_gates_ptr.dtype.element_ty
        OPERAND: tl.constexpr = w[0].dtype
        grads, through, grad_c_before, c = cell_back(grad_h, grad_c, values, c, MODE, MATH)
        if MODE == GRU:
            operands = (stack_2(grads[1], grads[2]), grads[0])
        elif MODE == LSTM:
            operands = (stack_4(grads[0], grads[1], grads[2], grads[3]),)
        else:
            operands = grads
        for i in tl.static_range(len(operands)):
            through = tl.dot(w[i], operands[i].to(DTYPE).to(OPERAND), through, input_precision=PRECISION)
        store_grads(grad_gates_ptr, grads, row, runs, tile, MODE, HIDDEN)
        grad_h, grad_c = tl.where(mask, through, grad_h), tl.where(mask, grad_c_before, grad_c)
        values = next_values
    return grad_h, grad_c


@triton.jit(do_not_specialize=RUN_TIME_SIZES[:3])
def backward(
    grad_output_ptr, output_ptr, saved_ptr, h0_ptr, c0_ptr, weight_hh_ptr, grad_h_n_ptr, grad_c_n_ptr, grad_gates_ptr,
    grad_h0_ptr, grad_c0_ptr, schedule_ptr, steps, batch_size, rows, MODE: tl.constexpr, HIDDEN: tl.constexpr,
    DIRECTIONS: tl.constexpr, TILE: tl.constexpr, BLOCK_BATCH: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """c0, grad_c_n and grad_c0 are LSTM's, saved is not of simple networks: else None."""
    extent = extent_of(schedule_ptr, steps, batch_size, 0, HIDDEN, TILE, BLOCK_BATCH)
    tile = Tile(*extent, schedule_ptr, batch_size, rows)
    w = load_weights_back(weight_hh_ptr, tile.unit, MODE, HIDDEN, OPERAND)
    state = state_offset(tile, HIDDEN)
    start = load_or_zero(c0_ptr if MODE == LSTM else h0_ptr, state, tile.mask).to(output_ptr.dtype.element_ty)
    grad_h, grad_c = load_or_zero(grad_h_n_ptr, state, tile.mask), load_or_zero(grad_c_n_ptr, state, tile.mask)
    kept = Kept(grad_output_ptr, output_ptr, saved_ptr)
    grad_h, grad_c = backward_steps(0, tile.steps, grad_h, grad_c, w, start, kept, grad_gates_ptr, tile, MODE, HIDDEN,
                                    DIRECTIONS, PRECISION, MATH)  # fmt: skip
    store(grad_h0_ptr + state, grad_h, tile.mask)
    if MODE == LSTM:
        store(grad_c0_ptr + state, grad_c, tile.mask)
