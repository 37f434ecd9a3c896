"""The Triton kernels of ``fastnn::rnn`` for all layers at once, as a wavefront: a program has a layer and a batch tile,
and begins a chunk of steps when the layer below (in backward, above) has finished it.

Programs are (batch tile, 1, layer), the layers from ``first_layer`` on in the order in which they wait for each other;
all of them must run at once, which a cooperative launch makes sure of. A launch of one layer finds what it waits for
done by the launch before it: so goes the interpreter, which runs programs one after another.

Shapes as in _rnn_tile for D = 1, with L layers in front where a tensor is of all of them. gates: the first layer's
are filled in, the others' are for the programs to fill; hidden_outputs (L - 1, rows, H), of all layers but the last;
weights and biases are tuples, one a layer; masks (L - 1, rows, H) or None; progress (L, batch tiles) int32 zeros, the
steps that are done. ``chunk`` is a multiple of PRODUCT_STEPS, the steps of one product of a layer with its input.
"""

import triton
import triton.language as tl

from fastnn.kernels.rnn.backward_kernels import Kept, backward_steps, load_weights_back
from fastnn.kernels.rnn.cells import GRU, LSTM
from fastnn.kernels.rnn.kernels import RUN_TIME_SIZES, forward_steps, load_weights
from fastnn.kernels.rnn.tile import (
    Gates,
    Tile,
    extent_of,
    load,
    load_or_zero,
    rows_at,
    state_offset,
    store,
    wait_until,
)

_RUN_TIME_SIZES = ["first_layer", "chunk", *RUN_TIME_SIZES]


@triton.jit
def _pick(tensors, layer, LAYERS: tl.constexpr):
    """A layer's tensor."""
    tensor = tensors[0]
    for i in tl.static_range(1, LAYERS):
        if layer == i:
            tensor = tensors[i]
    return tensor


@triton.jit
def _announce(progress_ptr, steps):
    tl.debug_barrier()  # the release below is one thread's, for what all threads have written
    tl.atomic_xchg(progress_ptr, steps, sem="release")


@triton.jit
def _product_rows(first, last, tile, PRODUCT_STEPS: tl.constexpr):
    """The rows of the batch tile in PRODUCT_STEPS steps, and which of them exist before ``last``."""
    BLOCK_BATCH: tl.constexpr = tile.sequence.shape[0]
    part = tl.arange(0, PRODUCT_STEPS * BLOCK_BATCH)
    sequence = tl.program_id(0) * BLOCK_BATCH + part % BLOCK_BATCH
    return rows_at(first + part // BLOCK_BATCH, last, sequence, tile.schedule_ptr, tile.batch_size)


@triton.jit
def _load_fresh(ptr, row, offs_k, runs, STRIDE: tl.constexpr, HIDDEN: tl.constexpr):
    """(rows, columns) of another program's; past the first-level cache, which knows nothing of what others write."""
    mask = runs[:, None] & (offs_k < HIDDEN)[None, :]
    return tl.load(ptr + row[:, None] * STRIDE + offs_k[None, :], mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def _fill_gates(
    gates_ptr, below_ptr, masks_ptr, weight_ih_ptr, bias_ih_ptr, first, last, tile, GATES: tl.constexpr,
    HIDDEN: tl.constexpr, PRODUCT_STEPS: tl.constexpr, BLOCK_K: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The share in the gates, from step ``first`` to ``last``, of the layer below's output (rows, H)."""
    unit = tile.unit
    for step in range(first, last, PRODUCT_STEPS):
        row, runs = _product_rows(step, last, tile, PRODUCT_STEPS)
        mask = runs[:, None] & (unit < HIDDEN)[None, :]
        for gate in range(GATES):
            sums = tl.zeros([runs.shape[0], unit.shape[0]], tl.float32)
            for start in range(0, HIDDEN, BLOCK_K):
                offs_k = start + tl.arange(0, BLOCK_K)
                x = _load_fresh(below_ptr, row, offs_k, runs, HIDDEN, HIDDEN)
                if masks_ptr is not None:
                    scale = _load_fresh(masks_ptr, row, offs_k, runs, HIDDEN, HIDDEN)
                    x = (x.to(tl.float32) * scale.to(tl.float32)).to(x.dtype)
                w = tl.load(weight_ih_ptr + (gate * HIDDEN + unit[None, :]) * HIDDEN + offs_k[:, None],
                            mask=(unit < HIDDEN)[None, :] & (offs_k < HIDDEN)[:, None], other=0.0)  # fmt: skip
                sums = tl.dot(x.to(OPERAND), w.to(OPERAND), sums, input_precision=PRECISION)
            if bias_ih_ptr is not None:
                sums += load(bias_ih_ptr + gate * HIDDEN + unit, unit < HIDDEN)[None, :]
            store(gates_ptr + row[:, None] * (GATES * HIDDEN) + gate * HIDDEN + unit[None, :], sums, mask)
    tl.debug_barrier()  # a thread reads what others have stored


@triton.jit(do_not_specialize=_RUN_TIME_SIZES)
def wave_forward(
    x_ptr, weights_ih, weights_hh, biases_ih, biases_hh, masks_ptr, h0_ptr, c0_ptr, hidden_outputs_ptr, output_ptr,
    saved_ptr, h_n_ptr, c_n_ptr, progress_ptr, schedule_ptr, first_layer, chunk, steps, batch_size, rows, stride_time,
    stride_batch, MODE: tl.constexpr, GATES: tl.constexpr, LAYERS: tl.constexpr, HIDDEN: tl.constexpr,
    TILE: tl.constexpr, PRODUCT_STEPS: tl.constexpr, BLOCK_BATCH: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, MATH: tl.constexpr, SPIN_LIMIT: tl.constexpr,
):  # fmt: skip
    """c0 and c_n are LSTM's, else None."""
    layer = first_layer + tl.program_id(2)
    extent = extent_of(schedule_ptr, steps, batch_size, 0, HIDDEN, TILE, BLOCK_BATCH)
    tile = Tile(*extent, schedule_ptr, batch_size, rows)
    one_layer = rows.to(tl.int64) * HIDDEN
    weight_hh_ptr, weight_ih_ptr = _pick(weights_hh, layer, LAYERS), _pick(weights_ih, layer, LAYERS)
    bias_hh_ptr, bias_ih_ptr = None, None
    if biases_hh is not None:
        bias_hh_ptr, bias_ih_ptr = _pick(biases_hh, layer, LAYERS), _pick(biases_ih, layer, LAYERS)
    below_ptr = hidden_outputs_ptr + tl.maximum(layer - 1, 0) * one_layer
    own_output_ptr = hidden_outputs_ptr + layer * one_layer
    if layer == LAYERS - 1:
        own_output_ptr = output_ptr
    if layer > 0:  # the programs' own rows of gates lie step by step
        stride_time, stride_batch = batch_size, 1
    gates = Gates(x_ptr + layer * one_layer * GATES, stride_time, stride_batch)
    if masks_ptr is not None:
        masks_ptr += tl.maximum(layer - 1, 0) * one_layer
    if saved_ptr is not None:
        saved_ptr += layer * one_layer * (5 if MODE == LSTM else 4)
    state = layer * batch_size.to(tl.int64) * HIDDEN + state_offset(tile, HIDDEN)
    h, c = load_or_zero(h0_ptr, state, tile.mask), load_or_zero(c0_ptr, state, tile.mask)
    w = load_weights(weight_hh_ptr, tile.unit, MODE, HIDDEN, OPERAND)
    own_progress_ptr = progress_ptr + layer * tl.num_programs(0) + tl.program_id(0)
    for first in range(0, tile.steps, chunk):
        last = tl.minimum(first + chunk, tile.steps)
        if layer > 0:
            wait_until(own_progress_ptr - tl.num_programs(0), last, SPIN_LIMIT)
            _fill_gates(gates.x_ptr, below_ptr, masks_ptr, weight_ih_ptr, bias_ih_ptr, first, last, tile, GATES, HIDDEN,
                        PRODUCT_STEPS, BLOCK_K, OPERAND, PRECISION)  # fmt: skip
        h, c = forward_steps(first, last, h, c, w, gates, bias_hh_ptr, own_output_ptr, saved_ptr, tile, MODE, HIDDEN, 1,
                             PRECISION, MATH)  # fmt: skip
        _announce(own_progress_ptr, last)
    store(h_n_ptr + state, h, tile.mask)
    if MODE == LSTM:
        store(c_n_ptr + state, c, tile.mask)


@triton.jit
def _fill_gradient(
    grad_ptr, above_ptr, masks_ptr, weight_ih_ptr, first, last, tile, MODE: tl.constexpr, GATES: tl.constexpr,
    HIDDEN: tl.constexpr, PRODUCT_STEPS: tl.constexpr, BLOCK_K: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient (rows, H) of a layer's output, from step ``first`` to ``last``, from that of the gates above it
    (rows, kinds, H) and the weights that lead there."""
    KINDS: tl.constexpr = 1 if GATES == 1 else 4
    unit = tile.unit
    if MODE == GRU:  # the kinds that the input's weights take follow the first
        above_ptr += HIDDEN
    for step in range(first, last, PRODUCT_STEPS):
        row, runs = _product_rows(step, last, tile, PRODUCT_STEPS)
        sums = tl.zeros([runs.shape[0], unit.shape[0]], tl.float32)
        for gate in range(GATES):
            for start in range(0, HIDDEN, BLOCK_K):
                offs_k = start + tl.arange(0, BLOCK_K)
                g = _load_fresh(above_ptr + gate * HIDDEN, row, offs_k, runs, KINDS * HIDDEN, HIDDEN)
                w = tl.load(weight_ih_ptr + (gate * HIDDEN + offs_k[:, None]) * HIDDEN + unit[None, :],
                            mask=(unit < HIDDEN)[None, :] & (offs_k < HIDDEN)[:, None], other=0.0)  # fmt: skip
                sums = tl.dot(g.to(OPERAND), w.to(OPERAND), sums, input_precision=PRECISION)
        mask = runs[:, None] & (unit < HIDDEN)[None, :]
        offset = row[:, None] * HIDDEN + unit[None, :]
        if masks_ptr is not None:
            # Rounded before it is scaled, as a tensor would be.
            sums = sums.to(grad_ptr.dtype.element_ty).to(tl.float32) * load(masks_ptr + offset, mask)
        store(grad_ptr + offset, sums, mask)
    tl.debug_barrier()  # a thread reads what others have stored


@triton.jit(do_not_specialize=_RUN_TIME_SIZES[:-2])
def wave_backward(
    grad_output_ptr, grads_ptr, weights_ih, weights_hh, masks_ptr, h0_ptr, c0_ptr, hidden_outputs_ptr, output_ptr,
    saved_ptr, grad_h_n_ptr, grad_c_n_ptr, grad_gates_ptr, grad_h0_ptr, grad_c0_ptr, progress_ptr, schedule_ptr,
    first_layer, chunk, steps, batch_size, rows, MODE: tl.constexpr, GATES: tl.constexpr, LAYERS: tl.constexpr,
    HIDDEN: tl.constexpr, TILE: tl.constexpr, PRODUCT_STEPS: tl.constexpr, BLOCK_BATCH: tl.constexpr,
    BLOCK_K: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, MATH: tl.constexpr,
    SPIN_LIMIT: tl.constexpr,
):  # fmt: skip
    """The last layer comes first. grads (L - 1, rows, H): of hidden_outputs, for the programs to fill."""
    KINDS: tl.constexpr = 1 if GATES == 1 else 4
    layer = LAYERS - 1 - first_layer - tl.program_id(2)
    extent = extent_of(schedule_ptr, steps, batch_size, 0, HIDDEN, TILE, BLOCK_BATCH)
    tile = Tile(*extent, schedule_ptr, batch_size, rows)
    one_layer = rows.to(tl.int64) * HIDDEN
    weight_hh_ptr, weight_above_ptr = _pick(weights_hh, layer, LAYERS), _pick(weights_ih, layer + 1, LAYERS)
    own_grad_ptr, own_output_ptr = grads_ptr + layer * one_layer, hidden_outputs_ptr + layer * one_layer
    if layer == LAYERS - 1:
        own_grad_ptr, own_output_ptr = grad_output_ptr, output_ptr
    own_gates_ptr = grad_gates_ptr + layer * one_layer * KINDS
    if masks_ptr is not None:
        masks_ptr += tl.minimum(layer, LAYERS - 2) * one_layer
    if saved_ptr is not None:
        saved_ptr += layer * one_layer * (5 if MODE == LSTM else 4)
    state = layer * batch_size.to(tl.int64) * HIDDEN + state_offset(tile, HIDDEN)
    grad_h, grad_c = load_or_zero(grad_h_n_ptr, state, tile.mask), load_or_zero(grad_c_n_ptr, state, tile.mask)
    start = load_or_zero(c0_ptr if MODE == LSTM else h0_ptr, state, tile.mask).to(output_ptr.dtype.element_ty)
    w = load_weights_back(weight_hh_ptr, tile.unit, MODE, HIDDEN, OPERAND)
    kept = Kept(own_grad_ptr, own_output_ptr, saved_ptr)
    own_progress_ptr = progress_ptr + layer * tl.num_programs(0) + tl.program_id(0)
    for first in range(0, tile.steps, chunk):
        last = tl.minimum(first + chunk, tile.steps)
        if layer < LAYERS - 1:
            wait_until(own_progress_ptr + tl.num_programs(0), last, SPIN_LIMIT)
            _fill_gradient(own_grad_ptr, own_gates_ptr + one_layer * KINDS, masks_ptr, weight_above_ptr,
                           tile.steps - last, tile.steps - first, tile, MODE, GATES, HIDDEN, PRODUCT_STEPS, BLOCK_K,
                           OPERAND, PRECISION)  # fmt: skip
        grad_h, grad_c = backward_steps(first, last, grad_h, grad_c, w, start, kept, own_gates_ptr, tile, MODE, HIDDEN,
                                        1, PRECISION, MATH)  # fmt: skip
        _announce(own_progress_ptr, last)
    store(grad_h0_ptr + state, grad_h, tile.mask)
    if MODE == LSTM:
        store(grad_c0_ptr + state, grad_c, tile.mask)
