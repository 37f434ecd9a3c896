"""The Triton kernels of ``fastnn::rnn``: one direction of one layer over the whole sequence in one program a batch
tile, the recurrent weights staying on chip.

Shapes, with D directions, G gates and H hidden units: gates (D, rows, G * H), the input's share of them; weight_hh
(D, G * H, H); bias_hh (D, G * H) or None; h0, c0 (D, batch, H) or None for zeros; output (rows, D * H); saved (D, rows,
kept, H) or None; h_n, c_n (D, batch, H). Rows are time-major: time * batch + sequence; in a packed batch, whose
sequences are sorted by length, step ``time`` has the rows from schedule[time] to schedule[time + 1], and schedule goes
on with each sequence's length, int64. ``schedule`` is None where nothing is packed.

A step's gates are loaded while the step before is computed: nothing waits for memory but the recurrence itself.

What is carried from step to step stays zero in the tile's lanes beyond H. The weights are zero there too, but that is
not enough: a state with an inf gives inf * 0 = NaN in every such lane, and the next product would spread it.
"""

import triton
import triton.language as tl

from fastnn.kernels._activation import activate, sigmoid, tanh

# Sizes that differ from batch to batch: one compiled kernel serves them all.
_RUN_TIME = ["steps", "batch_size", "rows", "stride_time", "stride_batch"]


@triton.jit
def _wait_until(place, count, SPIN_LIMIT: tl.constexpr):
    """Until other programs have brought the number at ``place`` to ``count``. SPIN_LIMIT: see _launch."""
    looked = 0
    while tl.atomic_add(place, 0, sem="acquire") < count:
        if SPIN_LIMIT > 0:
            looked += 1
            tl.device_assert(looked < SPIN_LIMIT, "a program waits for one that does not come")
    tl.debug_barrier()


@triton.jit
def _tile(batch_size, HIDDEN: tl.constexpr, TILE: tl.constexpr, BLOCK_BATCH: tl.constexpr):
    """This program's sequences and hidden units, and the mask of those that exist."""
    sequence = tl.program_id(0) * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)
    unit = tl.arange(0, TILE)
    return sequence, unit, (sequence < batch_size)[:, None] & (unit < HIDDEN)[None, :]


@triton.jit
def _steps_of_tile(schedule, steps, BLOCK_BATCH: tl.constexpr):
    """How many steps the tile's longest sequence, its first, has."""
    if schedule is None:
        return steps
    else:
        return tl.load(schedule + steps + 1 + tl.program_id(0) * BLOCK_BATCH).to(tl.int32)


@triton.jit
def _rows_at(step, steps, sequence, schedule, batch_size):
    """Rows, in time-major tensors, of a direction's step, and which sequences run there: none outside [0, steps)."""
    time = step + tl.program_id(1) * (steps - 1 - 2 * step)
    exists = (time >= 0) & (time < steps)
    if schedule is None:
        return time.to(tl.int64) * batch_size + sequence, sequence < tl.where(exists, batch_size, 0)
    else:
        row = tl.load(schedule + time, mask=exists, other=0) + sequence
        return row, row < tl.load(schedule + time + 1, mask=exists, other=0)


@triton.jit
def _gates_at(
    gates, step, steps, sequence, unit, mask, schedule, batch_size, rows, stride_time, stride_batch,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Where the first of a step's gates lies, and which of it exists. Rows of gates are stride_time and stride_batch
    apart where nothing is packed."""
    row, runs = _rows_at(step, steps, sequence, schedule, batch_size)
    if schedule is None:
        time = step + tl.program_id(1) * (steps - 1 - 2 * step)
        row = time.to(tl.int64) * stride_time + sequence.to(tl.int64) * stride_batch
    place = gates + (tl.program_id(1) * rows.to(tl.int64) + row[:, None]) * WIDTH + unit[None, :]
    return place, mask & runs[:, None]


@triton.jit
def _load(place, mask):
    return tl.load(place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(place, value, mask):
    tl.store(place, value.to(place.dtype.element_ty), mask=mask)


@triton.jit
def _load_weight(weight_hh, unit, gate, GATES: tl.constexpr, HIDDEN: tl.constexpr, TRANSPOSED: tl.constexpr):
    """A gate's recurrent weight, (from, to) as h @ W^T takes it, or with TRANSPOSED (to, from)."""
    base = weight_hh + (tl.program_id(1) * GATES + gate) * HIDDEN * HIDDEN
    mask = (unit < HIDDEN)[:, None] & (unit < HIDDEN)[None, :]
    if TRANSPOSED:
        return tl.load(base + unit[:, None] * HIDDEN + unit[None, :], mask=mask, other=0.0)
    else:
        return tl.load(base + unit[None, :] * HIDDEN + unit[:, None], mask=mask, other=0.0)


@triton.jit
def _load_gru_weights(weight_hh, unit, HIDDEN: tl.constexpr, TRANSPOSED: tl.constexpr, OPERAND: tl.constexpr):
    """Of r, z and n."""
    w_r = _load_weight(weight_hh, unit, 0, 3, HIDDEN, TRANSPOSED).to(OPERAND)
    w_z = _load_weight(weight_hh, unit, 1, 3, HIDDEN, TRANSPOSED).to(OPERAND)
    w_n = _load_weight(weight_hh, unit, 2, 3, HIDDEN, TRANSPOSED).to(OPERAND)
    return w_r, w_z, w_n


@triton.jit
def _load_lstm_weights(weight_hh, unit, HIDDEN: tl.constexpr, TRANSPOSED: tl.constexpr, OPERAND: tl.constexpr):
    """Of i, f, g and o."""
    w_i = _load_weight(weight_hh, unit, 0, 4, HIDDEN, TRANSPOSED).to(OPERAND)
    w_f = _load_weight(weight_hh, unit, 1, 4, HIDDEN, TRANSPOSED).to(OPERAND)
    w_g = _load_weight(weight_hh, unit, 2, 4, HIDDEN, TRANSPOSED).to(OPERAND)
    w_o = _load_weight(weight_hh, unit, 3, 4, HIDDEN, TRANSPOSED).to(OPERAND)
    return w_i, w_f, w_g, w_o


@triton.jit
def _load_bias(bias_hh, unit, gate, GATES: tl.constexpr, HIDDEN: tl.constexpr):
    place = bias_hh + (tl.program_id(1) * GATES + gate) * HIDDEN + unit
    return tl.load(place, mask=unit < HIDDEN, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _state_offset(sequence, unit, batch_size, HIDDEN: tl.constexpr):
    return (tl.program_id(1).to(tl.int64) * batch_size + sequence[:, None]) * HIDDEN + unit[None, :]


@triton.jit
def _load_state(state, sequence, unit, mask, batch_size, HIDDEN: tl.constexpr, TILE: tl.constexpr,
                BLOCK_BATCH: tl.constexpr):  # fmt: skip
    if state is None:
        return tl.zeros([BLOCK_BATCH, TILE], tl.float32)
    else:
        place = state + _state_offset(sequence, unit, batch_size, HIDDEN)
        return tl.load(place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _output_offset(row, unit, HIDDEN: tl.constexpr, DIRECTIONS: tl.constexpr):
    return row[:, None] * (DIRECTIONS * HIDDEN) + tl.program_id(1) * HIDDEN + unit[None, :]


@triton.jit
def _saved_offset(row, unit, rows, HIDDEN: tl.constexpr, KEPT: tl.constexpr):
    return (tl.program_id(1) * rows.to(tl.int64) + row[:, None]) * (KEPT * HIDDEN) + unit[None, :]


@triton.jit
def simple_steps(
    first, last, own_steps, h, w, gates, bias_hh, output, sequence, unit, mask, schedule, batch_size, rows, stride_time,
    stride_batch, ACTIVATION: tl.constexpr, HIDDEN: tl.constexpr, DIRECTIONS: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The steps from ``first`` to ``last`` of h = act(gates + W h + b) -> h."""
    place, exists = _gates_at(gates, first, own_steps, sequence, unit, mask, schedule, batch_size, rows, stride_time,
                              stride_batch, HIDDEN)  # fmt: skip
    x = _load(place, exists)
    if bias_hh is not None:
        bias = _load_bias(bias_hh, unit, 0, 1, HIDDEN)
    for step in range(first, last):
        place, exists = _gates_at(gates, step + 1, own_steps, sequence, unit, mask, schedule, batch_size, rows,
                                  stride_time, stride_batch, HIDDEN)  # fmt: skip
        next_x = _load(place, exists)
        if bias_hh is not None:
            x += bias
        sums = tl.dot(h.to(output.dtype.element_ty).to(OPERAND), w, x, input_precision=PRECISION)
        row, runs = _rows_at(step, own_steps, sequence, schedule, batch_size)
        store_mask = mask & runs[:, None]
        h = tl.where(store_mask, activate(sums, ACTIVATION), h)
        _store(output + _output_offset(row, unit, HIDDEN, DIRECTIONS), h, store_mask)
        x = next_x
    return h


@triton.jit(do_not_specialize=_RUN_TIME)
def simple_forward(
    gates, weight_hh, bias_hh, h0, output, h_n, schedule, steps, batch_size, rows, stride_time, stride_batch,
    ACTIVATION: tl.constexpr, HIDDEN: tl.constexpr, DIRECTIONS: tl.constexpr, TILE: tl.constexpr,
    BLOCK_BATCH: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    sequence, unit, mask = _tile(batch_size, HIDDEN, TILE, BLOCK_BATCH)
    own_steps = _steps_of_tile(schedule, steps, BLOCK_BATCH)
    w = _load_weight(weight_hh, unit, 0, 1, HIDDEN, False).to(OPERAND)
    h = _load_state(h0, sequence, unit, mask, batch_size, HIDDEN, TILE, BLOCK_BATCH)
    h = simple_steps(0, own_steps, own_steps, h, w, gates, bias_hh, output, sequence, unit, mask, schedule, batch_size,
                     rows, stride_time, stride_batch, ACTIVATION, HIDDEN, DIRECTIONS, OPERAND, PRECISION)  # fmt: skip
    _store(h_n + _state_offset(sequence, unit, batch_size, HIDDEN), h, mask)


@triton.jit
def gru_steps(
    first, last, own_steps, h, w_r, w_z, w_n, gates, bias_hh, output, saved, sequence, unit, mask, schedule, batch_size,
    rows, stride_time, stride_batch, HIDDEN: tl.constexpr, DIRECTIONS: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The steps from ``first`` to ``last`` of torch.nn.GRU's r, z, n -> h. saved: r, z, n and the hidden half of n."""
    b_n = tl.zeros([1, unit.shape[0]], tl.float32)
    if bias_hh is not None:
        b_r = _load_bias(bias_hh, unit, 0, 3, HIDDEN)
        b_z = _load_bias(bias_hh, unit, 1, 3, HIDDEN)
        b_n = _load_bias(bias_hh, unit, 2, 3, HIDDEN)
    place, exists = _gates_at(gates, first, own_steps, sequence, unit, mask, schedule, batch_size, rows, stride_time,
                              stride_batch, 3 * HIDDEN)  # fmt: skip
    x_r, x_z, x_n = _load(place, exists), _load(place + HIDDEN, exists), _load(place + 2 * HIDDEN, exists)
    for step in range(first, last):
        place, exists = _gates_at(gates, step + 1, own_steps, sequence, unit, mask, schedule, batch_size, rows,
                                  stride_time, stride_batch, 3 * HIDDEN)  # fmt: skip
        next_r, next_z, next_n = _load(place, exists), _load(place + HIDDEN, exists), _load(place + 2 * HIDDEN, exists)
        if bias_hh is not None:
            x_r += b_r
            x_z += b_z
        operand = h.to(output.dtype.element_ty).to(OPERAND)
        r = sigmoid(tl.dot(operand, w_r, x_r, input_precision=PRECISION))
        z = sigmoid(tl.dot(operand, w_z, x_z, input_precision=PRECISION))
        hidden_n = tl.dot(operand, w_n, input_precision=PRECISION) + b_n
        n = tanh(x_n + r * hidden_n)
        row, runs = _rows_at(step, own_steps, sequence, schedule, batch_size)
        store_mask = mask & runs[:, None]
        h = tl.where(store_mask, n + z * (h - n), h)
        _store(output + _output_offset(row, unit, HIDDEN, DIRECTIONS), h, store_mask)
        if saved is not None:
            kept = saved + _saved_offset(row, unit, rows, HIDDEN, 4)
            _store(kept, r, store_mask)
            _store(kept + HIDDEN, z, store_mask)
            _store(kept + 2 * HIDDEN, n, store_mask)
            _store(kept + 3 * HIDDEN, hidden_n, store_mask)
        x_r, x_z, x_n = next_r, next_z, next_n
    return h


@triton.jit(do_not_specialize=_RUN_TIME)
def gru_forward(
    gates, weight_hh, bias_hh, h0, output, saved, h_n, schedule, steps, batch_size, rows, stride_time, stride_batch,
    HIDDEN: tl.constexpr, DIRECTIONS: tl.constexpr, TILE: tl.constexpr, BLOCK_BATCH: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    sequence, unit, mask = _tile(batch_size, HIDDEN, TILE, BLOCK_BATCH)
    own_steps = _steps_of_tile(schedule, steps, BLOCK_BATCH)
    w_r, w_z, w_n = _load_gru_weights(weight_hh, unit, HIDDEN, False, OPERAND)
    h = _load_state(h0, sequence, unit, mask, batch_size, HIDDEN, TILE, BLOCK_BATCH)
    h = gru_steps(0, own_steps, own_steps, h, w_r, w_z, w_n, gates, bias_hh, output, saved, sequence, unit, mask,
                  schedule, batch_size, rows, stride_time, stride_batch, HIDDEN, DIRECTIONS, OPERAND,
                  PRECISION)  # fmt: skip
    _store(h_n + _state_offset(sequence, unit, batch_size, HIDDEN), h, mask)


@triton.jit
def lstm_steps(
    first, last, own_steps, h, c, w_i, w_f, w_g, w_o, gates, bias_hh, output, saved, sequence, unit, mask, schedule,
    batch_size, rows, stride_time, stride_batch, HIDDEN: tl.constexpr, DIRECTIONS: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The steps from ``first`` to ``last`` of torch.nn.LSTM's i, f, g, o -> h and c. saved: i, f, g, o and c."""
    if bias_hh is not None:
        b_i = _load_bias(bias_hh, unit, 0, 4, HIDDEN)
        b_f = _load_bias(bias_hh, unit, 1, 4, HIDDEN)
        b_g = _load_bias(bias_hh, unit, 2, 4, HIDDEN)
        b_o = _load_bias(bias_hh, unit, 3, 4, HIDDEN)
    place, exists = _gates_at(gates, first, own_steps, sequence, unit, mask, schedule, batch_size, rows, stride_time,
                              stride_batch, 4 * HIDDEN)  # fmt: skip
    x_i, x_f = _load(place, exists), _load(place + HIDDEN, exists)
    x_g, x_o = _load(place + 2 * HIDDEN, exists), _load(place + 3 * HIDDEN, exists)
    for step in range(first, last):
        place, exists = _gates_at(gates, step + 1, own_steps, sequence, unit, mask, schedule, batch_size, rows,
                                  stride_time, stride_batch, 4 * HIDDEN)  # fmt: skip
        next_i, next_f = _load(place, exists), _load(place + HIDDEN, exists)
        next_g, next_o = _load(place + 2 * HIDDEN, exists), _load(place + 3 * HIDDEN, exists)
        if bias_hh is not None:
            x_i += b_i
            x_f += b_f
            x_g += b_g
            x_o += b_o
        operand = h.to(output.dtype.element_ty).to(OPERAND)
        i = sigmoid(tl.dot(operand, w_i, x_i, input_precision=PRECISION))
        f = sigmoid(tl.dot(operand, w_f, x_f, input_precision=PRECISION))
        g = tanh(tl.dot(operand, w_g, x_g, input_precision=PRECISION))
        o = sigmoid(tl.dot(operand, w_o, x_o, input_precision=PRECISION))
        row, runs = _rows_at(step, own_steps, sequence, schedule, batch_size)
        store_mask = mask & runs[:, None]
        c = tl.where(store_mask, f * c + i * g, c)
        h = tl.where(store_mask, o * tanh(c), h)
        _store(output + _output_offset(row, unit, HIDDEN, DIRECTIONS), h, store_mask)
        if saved is not None:
            kept = saved + _saved_offset(row, unit, rows, HIDDEN, 5)
            _store(kept, i, store_mask)
            _store(kept + HIDDEN, f, store_mask)
            _store(kept + 2 * HIDDEN, g, store_mask)
            _store(kept + 3 * HIDDEN, o, store_mask)
            _store(kept + 4 * HIDDEN, c, store_mask)
        x_i, x_f, x_g, x_o = next_i, next_f, next_g, next_o
    return h, c


@triton.jit(do_not_specialize=_RUN_TIME)
def lstm_forward(
    gates, weight_hh, bias_hh, h0, c0, output, saved, h_n, c_n, schedule, steps, batch_size, rows, stride_time,
    stride_batch, HIDDEN: tl.constexpr, DIRECTIONS: tl.constexpr, TILE: tl.constexpr, BLOCK_BATCH: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    sequence, unit, mask = _tile(batch_size, HIDDEN, TILE, BLOCK_BATCH)
    own_steps = _steps_of_tile(schedule, steps, BLOCK_BATCH)
    w_i, w_f, w_g, w_o = _load_lstm_weights(weight_hh, unit, HIDDEN, False, OPERAND)
    h = _load_state(h0, sequence, unit, mask, batch_size, HIDDEN, TILE, BLOCK_BATCH)
    c = _load_state(c0, sequence, unit, mask, batch_size, HIDDEN, TILE, BLOCK_BATCH)
    h, c = lstm_steps(0, own_steps, own_steps, h, c, w_i, w_f, w_g, w_o, gates, bias_hh, output, saved, sequence, unit,
                      mask, schedule, batch_size, rows, stride_time, stride_batch, HIDDEN, DIRECTIONS, OPERAND,
                      PRECISION)  # fmt: skip
    state = _state_offset(sequence, unit, batch_size, HIDDEN)
    _store(h_n + state, h, mask)
    _store(c_n + state, c, mask)
