"""The Triton kernels of ``fastnn::mlp``: chains of narrow layers, a row tile staying on chip through all of them, and
one layer with its bias and activation in the epilogue."""

import triton
import triton.language as tl

from fastnn.kernels._activation import activate, activation_gradient


@triton.jit
def _finish_layer(sums, bias_ptr, saved_ptr, row, row_mask, column, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr,
                  FIRST: tl.constexpr, SECOND: tl.constexpr, SAVES_INPUT: tl.constexpr):  # fmt: skip
    """act(sums + bias), and what backward needs of it written to ``saved`` (rows, WIDTH) unless that is None."""
    column_mask = column < WIDTH
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    value = activate(sums, ACTIVATION, FIRST=FIRST, SECOND=SECOND)
    if saved_ptr is not None:
        kept = sums if SAVES_INPUT else value
        place = saved_ptr + row[:, None] * WIDTH + column[None, :]
        tl.store(place, kept.to(saved_ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])
    return value


@triton.jit
def _next_operand(value, column, DTYPE: tl.constexpr, WIDTH: tl.constexpr, OPERAND: tl.constexpr):
    """A layer's output (rows, tile) as the next product takes it, rounded as a tensor would be. Lanes beyond WIDTH are
    made zero: a row with an inf has NaN there (inf * 0), which the product would spread to the whole row."""
    if column.shape[0] > WIDTH:
        value = tl.where((column < WIDTH)[None, :], value, 0.0)
    return value.to(DTYPE).to(OPERAND)


@triton.jit(do_not_specialize=["rows"])
def chain_forward(
    x_ptr, w_ptrs, bias_ptrs, saved_ptrs, y_ptr, rows, WIDTHS: tl.constexpr, TILES: tl.constexpr,
    ACTIVATIONS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, SAVES_INPUT: tl.constexpr,
    LAYERS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x (rows, WIDTHS[0]) -> y (rows, WIDTHS[LAYERS]), a program a tile of BLOCK_ROWS rows, through LAYERS >= 2 layers.
    w[i] (WIDTHS[i + 1], WIDTHS[i]); saved[i] (rows, WIDTHS[i + 1]) or None.

    The input's and the output's width are walked in chunks; the widths between are whole tiles (TILES).
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = row < rows
    FIRST_TILE: tl.constexpr = TILES[1]
    column = tl.arange(0, FIRST_TILE)
    sums = tl.zeros([BLOCK_ROWS, FIRST_TILE], tl.float32)
    for start in range(0, WIDTHS[0], BLOCK_IN):
        k = start + tl.arange(0, BLOCK_IN)
        k_mask = k < WIDTHS[0]
        x = tl.load(x_ptr + row[:, None] * WIDTHS[0] + k[None, :], mask=row_mask[:, None] & k_mask[None, :], other=0.0)
        w = tl.load(w_ptrs[0] + column[None, :] * WIDTHS[0] + k[:, None],
                    mask=(column < WIDTHS[1])[None, :] & k_mask[:, None], other=0.0)  # fmt: skip
        sums = tl.dot(x.to(OPERAND), w.to(OPERAND), sums, input_precision=PRECISION)
    value = _finish_layer(sums, bias_ptrs[0], saved_ptrs[0], row, row_mask, column, WIDTHS[1], ACTIVATIONS[0],
                          FIRST[0], SECOND[0], SAVES_INPUT[0])  # fmt: skip
    x = _next_operand(value, column, y_ptr.dtype.element_ty, WIDTHS[1], OPERAND)

    for layer in tl.static_range(1, LAYERS - 1):
        k = tl.arange(0, TILES[layer])
        column = tl.arange(0, TILES[layer + 1])
        w = tl.load(w_ptrs[layer] + column[None, :] * WIDTHS[layer] + k[:, None],
                    mask=(column < WIDTHS[layer + 1])[None, :] & (k < WIDTHS[layer])[:, None], other=0.0)  # fmt: skip
        sums = tl.dot(x, w.to(OPERAND), input_precision=PRECISION)
        value = _finish_layer(sums, bias_ptrs[layer], saved_ptrs[layer], row, row_mask, column, WIDTHS[layer + 1],
                              ACTIVATIONS[layer], FIRST[layer], SECOND[layer], SAVES_INPUT[layer])  # fmt: skip
        x = _next_operand(value, column, y_ptr.dtype.element_ty, WIDTHS[layer + 1], OPERAND)

    LAST: tl.constexpr = LAYERS - 1
    k = tl.arange(0, TILES[LAST])
    for start in range(0, WIDTHS[LAYERS], BLOCK_OUT):
        out_column = start + tl.arange(0, BLOCK_OUT)
        out_mask = out_column < WIDTHS[LAYERS]
        out_weight = tl.load(w_ptrs[LAST] + out_column[None, :] * WIDTHS[LAST] + k[:, None],
                             mask=out_mask[None, :] & (k < WIDTHS[LAST])[:, None], other=0.0)  # fmt: skip
        out_sums = tl.dot(x, out_weight.to(OPERAND), input_precision=PRECISION)
        out_value = _finish_layer(out_sums, bias_ptrs[LAST], saved_ptrs[LAST], row, row_mask, out_column,
                                  WIDTHS[LAYERS], ACTIVATIONS[LAST], FIRST[LAST], SECOND[LAST],
                                  SAVES_INPUT[LAST])  # fmt: skip
        place = y_ptr + row[:, None] * WIDTHS[LAYERS] + out_column[None, :]
        tl.store(place, out_value.to(y_ptr.dtype.element_ty), mask=row_mask[:, None] & out_mask[None, :])


@triton.jit(do_not_specialize=["rows"])
def resident_chain_forward(
    x_ptr, w_ptrs, bias_ptrs, saved_ptrs, y_ptr, rows, WIDTHS: tl.constexpr, TILES: tl.constexpr,
    ACTIVATIONS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, SAVES_INPUT: tl.constexpr,
    LAYERS: tl.constexpr, BLOCK_ROWS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """chain_forward for many rows: a program keeps the weights of all layers on chip and takes tile after tile, so
    that nothing but input and output moves."""
    loaded = ()
    for layer in tl.static_range(LAYERS):
        from_unit = tl.arange(0, TILES[layer])
        to_unit = tl.arange(0, TILES[layer + 1])
        mask = (to_unit < WIDTHS[layer + 1])[None, :] & (from_unit < WIDTHS[layer])[:, None]
        place = w_ptrs[layer] + to_unit[None, :] * WIDTHS[layer] + from_unit[:, None]
        weight = tl.load(place, mask=mask, other=0.0).to(OPERAND)
        loaded = loaded + (weight,)  # type: ignore[assignment]  # noqa: RUF005 (Triton has no star here)
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0)):
        row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        row_mask = row < rows
        first = tl.arange(0, TILES[0])
        x = tl.load(x_ptr + row[:, None] * WIDTHS[0] + first[None, :],
                    mask=row_mask[:, None] & (first < WIDTHS[0])[None, :], other=0.0).to(OPERAND)  # fmt: skip
        for layer in tl.static_range(LAYERS):
            column = tl.arange(0, TILES[layer + 1])
            sums = tl.dot(x, loaded[layer], input_precision=PRECISION)
            value = _finish_layer(sums, bias_ptrs[layer], saved_ptrs[layer], row, row_mask, column, WIDTHS[layer + 1],
                                  ACTIVATIONS[layer], FIRST[layer], SECOND[layer], SAVES_INPUT[layer])  # fmt: skip
            x = _next_operand(value, column, y_ptr.dtype.element_ty, WIDTHS[layer + 1], OPERAND)
        last = tl.arange(0, TILES[LAYERS])
        tl.store(y_ptr + row[:, None] * WIDTHS[LAYERS] + last[None, :], x.to(y_ptr.dtype.element_ty),
                 mask=row_mask[:, None] & (last < WIDTHS[LAYERS])[None, :])  # fmt: skip


@triton.jit
def _finish_gradient(grad, saved_ptr, grad_sums_ptr, bias_parts_ptr, row, row_mask, column, WIDTH: tl.constexpr,
                     ACTIVATION: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):  # fmt: skip
    """The gradient before the activation, written to ``grad_sums`` (rows, WIDTH), and this tile's part of the bias
    gradient to ``bias_parts`` (tiles, WIDTH) unless that is None."""
    column_mask = column < WIDTH
    mask = row_mask[:, None] & column_mask[None, :]
    offset = row[:, None] * WIDTH + column[None, :]
    kept = tl.load(saved_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    grad = tl.where(mask, activation_gradient(grad, kept, ACTIVATION, FIRST, SECOND), 0.0)
    tl.store(grad_sums_ptr + offset, grad.to(grad_sums_ptr.dtype.element_ty), mask=mask)
    if bias_parts_ptr is not None:
        tl.store(bias_parts_ptr + tl.program_id(0) * WIDTH + column, tl.sum(grad, 0), mask=column_mask)
    return grad


@triton.jit(do_not_specialize=["rows"])
def chain_backward(
    grad_y_ptr, w_ptrs, saved_ptrs, grad_sums_ptrs, bias_parts_ptrs, grad_x_ptr, rows, WIDTHS: tl.constexpr,
    TILES: tl.constexpr, ACTIVATIONS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, LAYERS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The reverse of chain_forward: grad_y (rows, WIDTHS[LAYERS]) -> grad_sums[i] (rows, WIDTHS[i + 1]), the
    gradient before each activation, from which the weights' gradients are one matrix product each; and grad_x
    (rows, WIDTHS[0]) unless that is None."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = row < rows
    LAST: tl.constexpr = LAYERS - 1
    LAST_TILE: tl.constexpr = TILES[LAST]
    column = tl.arange(0, LAST_TILE)
    grad = tl.zeros([BLOCK_ROWS, LAST_TILE], tl.float32)
    for start in range(0, WIDTHS[LAYERS], BLOCK_OUT):
        out_column = start + tl.arange(0, BLOCK_OUT)
        out_mask = out_column < WIDTHS[LAYERS]
        g = tl.load(grad_y_ptr + row[:, None] * WIDTHS[LAYERS] + out_column[None, :],
                    mask=row_mask[:, None] & out_mask[None, :], other=0.0).to(tl.float32)  # fmt: skip
        g = _finish_gradient(g, saved_ptrs[LAST], grad_sums_ptrs[LAST], bias_parts_ptrs[LAST], row, row_mask,
                             out_column, WIDTHS[LAYERS], ACTIVATIONS[LAST], FIRST[LAST], SECOND[LAST])  # fmt: skip
        w = tl.load(w_ptrs[LAST] + out_column[:, None] * WIDTHS[LAST] + column[None, :],
                    mask=out_mask[:, None] & (column < WIDTHS[LAST])[None, :], other=0.0)  # fmt: skip
        g = g.to(grad_y_ptr.dtype.element_ty).to(OPERAND)
        grad = tl.dot(g, w.to(OPERAND), grad, input_precision=PRECISION)

    for layer in tl.static_range(LAYERS - 2, 0, -1):
        k = tl.arange(0, TILES[layer + 1])
        column = tl.arange(0, TILES[layer])
        grad = _finish_gradient(grad, saved_ptrs[layer], grad_sums_ptrs[layer], bias_parts_ptrs[layer], row, row_mask,
                                k, WIDTHS[layer + 1], ACTIVATIONS[layer], FIRST[layer], SECOND[layer])  # fmt: skip
        w = tl.load(w_ptrs[layer] + k[:, None] * WIDTHS[layer] + column[None, :],
                    mask=(k < WIDTHS[layer + 1])[:, None] & (column < WIDTHS[layer])[None, :], other=0.0)  # fmt: skip
        g = grad.to(grad_y_ptr.dtype.element_ty).to(OPERAND)
        grad = tl.dot(g, w.to(OPERAND), input_precision=PRECISION)

    k = tl.arange(0, TILES[1])
    grad = _finish_gradient(grad, saved_ptrs[0], grad_sums_ptrs[0], bias_parts_ptrs[0], row, row_mask, k, WIDTHS[1],
                            ACTIVATIONS[0], FIRST[0], SECOND[0])  # fmt: skip
    if grad_x_ptr is not None:
        g = grad.to(grad_y_ptr.dtype.element_ty).to(OPERAND)
        for start in range(0, WIDTHS[0], BLOCK_IN):
            in_column = start + tl.arange(0, BLOCK_IN)
            in_mask = in_column < WIDTHS[0]
            in_weight = tl.load(w_ptrs[0] + k[:, None] * WIDTHS[0] + in_column[None, :],
                        mask=(k < WIDTHS[1])[:, None] & in_mask[None, :], other=0.0)  # fmt: skip
            result = tl.dot(g, in_weight.to(OPERAND), input_precision=PRECISION)
            tl.store(grad_x_ptr + row[:, None] * WIDTHS[0] + in_column[None, :], result.to(grad_x_ptr.dtype.element_ty),
                     mask=row_mask[:, None] & in_mask[None, :])  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def layer_forward(
    x_ptr, w_ptr, bias_ptr, sums_ptr, y_ptr, rows, IN: tl.constexpr, OUT: tl.constexpr, ACTIVATION: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One layer: x (rows, IN), w (OUT, IN) -> y (rows, OUT), a program a tile of y. sums: the activation's input (rows,
    OUT), or None."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row_mask = row < rows
    column_mask = column < OUT
    sums = tl.zeros([BLOCK_ROWS, BLOCK_OUT], tl.float32)
    for start in range(0, IN, BLOCK_IN):
        k = start + tl.arange(0, BLOCK_IN)
        k_mask = k < IN
        x = tl.load(x_ptr + row[:, None] * IN + k[None, :], mask=row_mask[:, None] & k_mask[None, :], other=0.0)
        w = tl.load(w_ptr + column[None, :] * IN + k[:, None], mask=column_mask[None, :] & k_mask[:, None], other=0.0)
        sums = tl.dot(x.to(OPERAND), w.to(OPERAND), sums, input_precision=PRECISION)
    value = _finish_layer(sums, bias_ptr, sums_ptr, row, row_mask, column, OUT, ACTIVATION, FIRST, SECOND, True)
    tl.store(y_ptr + row[:, None] * OUT + column[None, :], value.to(y_ptr.dtype.element_ty),
             mask=row_mask[:, None] & column_mask[None, :])  # fmt: skip
