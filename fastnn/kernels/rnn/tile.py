"""What the recurrent kernels have in common: a program's tile of units and sequences, the rows of a step, loads and
stores, and how programs wait for each other.

A tile of values is (units, sequences): the recurrent weights, (units to, units from), are the left operand of the dots
and the sequences the columns, of which a matrix instruction takes eight; as rows there would be sixteen of them, and
twice the arithmetic for a batch that fills few programs. Tiles of several gates are stacked in the first dimension, so
that one dot computes them all.

Shapes, with D directions, G gates and H hidden units: gates (D, rows, G * H), the input's share of them; weight_hh
(D, G * H, H); bias_hh (D, G * H) or None; h0, c0 (D, batch, H) or None for zeros; output (rows, D * H); saved (D, rows,
kept, H) or None; h_n, c_n (D, batch, H). Rows are time-major: time * batch + sequence; in a packed batch, whose
sequences are sorted by length, step ``time`` has the rows from schedule[time] to schedule[time + 1], and schedule goes
on with each sequence's length, int64. ``schedule`` is None where nothing is packed.

What is carried from step to step stays zero in the tile's lanes beyond H. The weights are zero there too, but that is
not enough: a state with an inf gives inf * 0 = NaN in every such lane, and the next product would spread it.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Tile(NamedTuple):
    """A program's part of the network; a tuple, because that is what a kernel can hand to a function."""

    unit: Any  # (units,) int32
    sequence: Any  # (sequences,) int32
    mask: Any  # (units, sequences), those that exist
    steps: Any  # of the tile's longest sequence
    schedule_ptr: Any
    batch_size: Any
    rows: Any


class Gates(NamedTuple):
    """The input's share of the gates. Rows are stride_time and stride_batch apart where nothing is packed."""

    x_ptr: Any
    stride_time: Any
    stride_batch: Any


@triton.jit
def extent_of(schedule_ptr, steps, batch_size, first_unit, HIDDEN: tl.constexpr, UNITS: tl.constexpr,
              BLOCK_BATCH: tl.constexpr):  # fmt: skip
    """A tile's first fields, of UNITS units from ``first_unit`` on and the sequences that are this program's in
    dimension 0. Kernels add the others: in Triton 3.5 no function returns None, as the schedule may be."""
    unit = first_unit + tl.arange(0, UNITS)
    sequence = tl.program_id(0) * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)
    mask = (unit < HIDDEN)[:, None] & (sequence < batch_size)[None, :]
    if schedule_ptr is not None:  # the tile's first sequence is its longest
        steps = tl.load(schedule_ptr + steps + 1 + tl.program_id(0) * BLOCK_BATCH).to(tl.int32)
    return unit, sequence, mask, steps


@triton.jit
def rows_at(step, steps, sequence, schedule_ptr, batch_size):
    """Rows, in time-major tensors, of a direction's step, and which sequences run there: none outside [0, steps)."""
    time = step + tl.program_id(1) * (steps - 1 - 2 * step)
    exists = (time >= 0) & (time < steps)
    if schedule_ptr is None:
        return time.to(tl.int64) * batch_size + sequence, sequence < tl.where(exists, batch_size, 0)
    else:
        row = tl.load(schedule_ptr + time, mask=exists, other=0) + sequence
        return row, row < tl.load(schedule_ptr + time + 1, mask=exists, other=0)


@triton.jit
def rows_of(step, tile):
    return rows_at(step, tile.steps, tile.sequence, tile.schedule_ptr, tile.batch_size)


# ---- stacks of gates --------------------------------------------------------------------------------------


@triton.jit
def stack_offset(unit, FIRST: tl.constexpr, COUNT: tl.constexpr, GATES: tl.constexpr, HIDDEN: tl.constexpr):
    """Where, among all gates' units, those of COUNT gates from FIRST on lie, one gate after the other, and which of
    them exist. ``unit``: (units,), a gate's."""
    UNITS: tl.constexpr = unit.shape[0]
    gate = FIRST + tl.arange(0, COUNT)
    offset = tl.reshape(gate[:, None] * HIDDEN + unit[None, :], [COUNT * UNITS])
    exists = tl.reshape(tl.broadcast_to((unit < HIDDEN)[None, :], [COUNT, UNITS]), [COUNT * UNITS])
    if FIRST + COUNT > GATES:  # one more, to make a power of two
        exists &= offset < GATES * HIDDEN
    return offset, exists


@triton.jit
def stack_2(a, b):
    SHAPE: tl.constexpr = [2 * a.shape[0], a.shape[1]]
    return tl.reshape(tl.permute(tl.join(a, b), 2, 0, 1), SHAPE)


@triton.jit
def stack_4(a, b, c, d):
    SHAPE: tl.constexpr = [4 * a.shape[0], a.shape[1]]
    return tl.reshape(tl.permute(tl.join(tl.join(a, c), tl.join(b, d)), 2, 3, 0, 1), SHAPE)


@triton.jit
def unstack_2(stack):
    SHAPE: tl.constexpr = [2, stack.shape[0] // 2, stack.shape[1]]
    return tl.split(tl.permute(tl.reshape(stack, SHAPE), 1, 2, 0))


@triton.jit
def unstack_4(stack):
    SHAPE: tl.constexpr = [2, 2, stack.shape[0] // 4, stack.shape[1]]
    even, odd = tl.split(tl.permute(tl.reshape(stack, SHAPE), 2, 3, 0, 1))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


# ---- loads and stores -------------------------------------------------------------------------------------


@triton.jit
def load(ptrs, mask):
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_stored(ptrs, mask):
    """In the dtype of memory."""
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def load_or_zero(ptr, offset, mask):
    if ptr is None:
        return tl.zeros(offset.shape, tl.float32)
    else:
        return load(ptr + offset, mask)


@triton.jit
def store(ptrs, value, mask):
    tl.store(ptrs, value.to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def load_weight(weight_hh_ptr, unit, FIRST: tl.constexpr, COUNT: tl.constexpr, GATES: tl.constexpr,
                HIDDEN: tl.constexpr, OPERAND: tl.constexpr):  # fmt: skip
    """The recurrent weights of COUNT gates from FIRST on, stacked: (gates and units to, units from)."""
    to, exists = stack_offset(unit, FIRST, COUNT, GATES, HIDDEN)
    ptrs = weight_hh_ptr + (tl.program_id(1) * GATES * HIDDEN + to[:, None]) * HIDDEN + unit[None, :]
    return tl.load(ptrs, mask=exists[:, None] & (unit < HIDDEN)[None, :], other=0.0).to(OPERAND)


@triton.jit
def load_weight_back(weight_hh_ptr, unit, FIRST: tl.constexpr, COUNT: tl.constexpr, GATES: tl.constexpr,
                     HIDDEN: tl.constexpr, OPERAND: tl.constexpr):  # fmt: skip
    """The same for backward: (units from, gates and units to)."""
    to, exists = stack_offset(unit, FIRST, COUNT, GATES, HIDDEN)
    ptrs = weight_hh_ptr + (tl.program_id(1) * GATES * HIDDEN + to[None, :]) * HIDDEN + unit[:, None]
    return tl.load(ptrs, mask=exists[None, :] & (unit < HIDDEN)[:, None], other=0.0).to(OPERAND)


@triton.jit
def load_bias(bias_hh_ptr, unit, FIRST: tl.constexpr, COUNT: tl.constexpr, GATES: tl.constexpr,
              HIDDEN: tl.constexpr):  # fmt: skip
    """(gates and units, 1), zeros where there is no bias."""
    to, exists = stack_offset(unit, FIRST, COUNT, GATES, HIDDEN)
    return load_or_zero(bias_hh_ptr, tl.program_id(1) * GATES * HIDDEN + to, exists)[:, None]


@triton.jit
def gate_rows(gates, step, tile, WIDTH: tl.constexpr):
    """Where a step's gates begin, WIDTH a row, and which sequences run there."""
    row, runs = rows_of(step, tile)
    if tile.schedule_ptr is None:
        time = step + tl.program_id(1) * (tile.steps - 1 - 2 * step)
        row = time.to(tl.int64) * gates.stride_time + tile.sequence.to(tl.int64) * gates.stride_batch
    return (tl.program_id(1) * tile.rows.to(tl.int64) + row) * WIDTH, runs


@triton.jit
def load_gates(gates, step, tile, FIRST: tl.constexpr, COUNT: tl.constexpr, GATES: tl.constexpr, HIDDEN: tl.constexpr):
    """COUNT of a step's gates from FIRST on, stacked; as they are stored: a step ahead, they take registers."""
    start, runs = gate_rows(gates, step, tile, GATES * HIDDEN)
    offset, exists = stack_offset(tile.unit, FIRST, COUNT, GATES, HIDDEN)
    return load_stored(gates.x_ptr + start[None, :] + offset[:, None], exists[:, None] & runs[None, :])


@triton.jit
def state_offset(tile, HIDDEN: tl.constexpr):
    sequence = tl.program_id(1).to(tl.int64) * tile.batch_size + tile.sequence
    return sequence[None, :] * HIDDEN + tile.unit[:, None]


@triton.jit
def output_offset(row, unit, HIDDEN: tl.constexpr, DIRECTIONS: tl.constexpr):
    return row[None, :] * (DIRECTIONS * HIDDEN) + tl.program_id(1) * HIDDEN + unit[:, None]


@triton.jit
def kinds_offset(row, unit, rows, HIDDEN: tl.constexpr, KINDS: tl.constexpr):
    """Of the first kind, of what is kept or of the gates' gradients."""
    return (tl.program_id(1) * rows.to(tl.int64) + row)[None, :] * (KINDS * HIDDEN) + unit[:, None]


@triton.jit
def kinds_ptrs(ptr, row, runs, tile, HIDDEN: tl.constexpr, KINDS: tl.constexpr):
    """Of the first four kinds, stacked, with the mask of those that exist."""
    offset, exists = stack_offset(tile.unit, 0, 4, 4, HIDDEN)
    return ptr + kinds_offset(row, offset, tile.rows, HIDDEN, KINDS), exists[:, None] & runs[None, :]


# ---- programs that wait for each other --------------------------------------------------------------------


@triton.jit
def wait_until(count_ptr, count, SPIN_LIMIT: tl.constexpr):
    """Until other programs have brought the number at ``count_ptr`` to ``count``. SPIN_LIMIT: see _launch."""
    looked = 0
    while tl.atomic_add(count_ptr, 0, sem="acquire") < count:
        if SPIN_LIMIT > 0:
            looked += 1
            tl.device_assert(looked < SPIN_LIMIT, "a program waits for one that does not come")
    tl.debug_barrier()
