"""The Triton kernels of ``fastnn::mlp``: chains of narrow layers, a row tile staying on chip through all of them, and
one layer with its bias and activation in the epilogue."""

import triton
import triton.language as tl

from fastnn.kernels._activation import activate, activation_gradient


@triton.jit
def _finish_layer(sums, bias, saved, row, row_mask, column, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr,
                  KEEPS_INPUT: tl.constexpr):  # fmt: skip
    """act(sums + bias), and what backward needs of it written to ``saved`` (rows, WIDTH) unless that is None."""
    column_mask = column < WIDTH
    if bias is not None:
        sums += tl.load(bias + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    value = activate(sums, ACTIVATION)
    if saved is not None:
        kept = sums if KEEPS_INPUT else value
        place = saved + row[:, None] * WIDTH + column[None, :]
        tl.store(place, kept.to(saved.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])
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
    input, weights, biases, saved, output, rows, WIDTHS: tl.constexpr, TILES: tl.constexpr, ACTIVATIONS: tl.constexpr,
    KEEPS_INPUT: tl.constexpr, LAYERS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """input (rows, WIDTHS[0]) -> output (rows, WIDTHS[LAYERS]), a program a tile of BLOCK_ROWS rows, through
    LAYERS >= 2 layers. weights[i] (WIDTHS[i + 1], WIDTHS[i]); saved[i] (rows, WIDTHS[i + 1]) or None.

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
        x = tl.load(input + row[:, None] * WIDTHS[0] + k[None, :], mask=row_mask[:, None] & k_mask[None, :], other=0.0)
        w = tl.load(weights[0] + column[None, :] * WIDTHS[0] + k[:, None],
                    mask=(column < WIDTHS[1])[None, :] & k_mask[:, None], other=0.0)  # fmt: skip
        sums = tl.dot(x.to(OPERAND), w.to(OPERAND), sums, input_precision=PRECISION)
    value = _finish_layer(sums, biases[0], saved[0], row, row_mask, column, WIDTHS[1], ACTIVATIONS[0], KEEPS_INPUT[0])
    x = _next_operand(value, column, output.dtype.element_ty, WIDTHS[1], OPERAND)

    for layer in tl.static_range(1, LAYERS - 1):
        k = tl.arange(0, TILES[layer])
        column = tl.arange(0, TILES[layer + 1])
        w = tl.load(weights[layer] + column[None, :] * WIDTHS[layer] + k[:, None],
                    mask=(column < WIDTHS[layer + 1])[None, :] & (k < WIDTHS[layer])[:, None], other=0.0)  # fmt: skip
        sums = tl.dot(x, w.to(OPERAND), input_precision=PRECISION)
        value = _finish_layer(sums, biases[layer], saved[layer], row, row_mask, column, WIDTHS[layer + 1],
                              ACTIVATIONS[layer], KEEPS_INPUT[layer])  # fmt: skip
        x = _next_operand(value, column, output.dtype.element_ty, WIDTHS[layer + 1], OPERAND)

    LAST: tl.constexpr = LAYERS - 1
    k = tl.arange(0, TILES[LAST])
    for start in range(0, WIDTHS[LAYERS], BLOCK_OUT):
        out_column = start + tl.arange(0, BLOCK_OUT)
        out_mask = out_column < WIDTHS[LAYERS]
        out_weight = tl.load(weights[LAST] + out_column[None, :] * WIDTHS[LAST] + k[:, None],
                             mask=out_mask[None, :] & (k < WIDTHS[LAST])[:, None], other=0.0)  # fmt: skip
        out_sums = tl.dot(x, out_weight.to(OPERAND), input_precision=PRECISION)
        out_value = _finish_layer(out_sums, biases[LAST], saved[LAST], row, row_mask, out_column, WIDTHS[LAYERS],
                                   ACTIVATIONS[LAST], KEEPS_INPUT[LAST])  # fmt: skip
        place = output + row[:, None] * WIDTHS[LAYERS] + out_column[None, :]
        tl.store(place, out_value.to(output.dtype.element_ty), mask=row_mask[:, None] & out_mask[None, :])


@triton.jit(do_not_specialize=["rows"])
def resident_chain_forward(
    input, weights, biases, saved, output, rows, WIDTHS: tl.constexpr, TILES: tl.constexpr,
    ACTIVATIONS: tl.constexpr, KEEPS_INPUT: tl.constexpr, LAYERS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """chain_forward for many rows: a program keeps the weights of all layers on chip and takes tile after tile, so
    that nothing but input and output moves."""
    loaded = ()
    for layer in tl.static_range(LAYERS):
        from_unit = tl.arange(0, TILES[layer])
        to_unit = tl.arange(0, TILES[layer + 1])
        mask = (to_unit < WIDTHS[layer + 1])[None, :] & (from_unit < WIDTHS[layer])[:, None]
        place = weights[layer] + to_unit[None, :] * WIDTHS[layer] + from_unit[:, None]
        weight = tl.load(place, mask=mask, other=0.0).to(OPERAND)
        loaded = loaded + (weight,)  # type: ignore[assignment]  # noqa: RUF005 (Triton has no star here)
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0)):
        row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        row_mask = row < rows
        first = tl.arange(0, TILES[0])
        x = tl.load(input + row[:, None] * WIDTHS[0] + first[None, :],
                    mask=row_mask[:, None] & (first < WIDTHS[0])[None, :], other=0.0).to(OPERAND)  # fmt: skip
        for layer in tl.static_range(LAYERS):
            column = tl.arange(0, TILES[layer + 1])
            sums = tl.dot(x, loaded[layer], input_precision=PRECISION)
            value = _finish_layer(sums, biases[layer], saved[layer], row, row_mask, column, WIDTHS[layer + 1],
                                  ACTIVATIONS[layer], KEEPS_INPUT[layer])  # fmt: skip
            x = _next_operand(value, column, output.dtype.element_ty, WIDTHS[layer + 1], OPERAND)
        last = tl.arange(0, TILES[LAYERS])
        tl.store(output + row[:, None] * WIDTHS[LAYERS] + last[None, :], x.to(output.dtype.element_ty),
                 mask=row_mask[:, None] & (last < WIDTHS[LAYERS])[None, :])  # fmt: skip


@triton.jit
def _finish_gradient(grad, saved, grad_sums, bias_parts, row, row_mask, column, WIDTH: tl.constexpr,
                     ACTIVATION: tl.constexpr):  # fmt: skip
    """The gradient before the activation, written to ``grad_sums`` (rows, WIDTH), and this tile's part of the bias
    gradient to ``bias_parts`` (tiles, WIDTH) unless that is None."""
    column_mask = column < WIDTH
    mask = row_mask[:, None] & column_mask[None, :]
    offset = row[:, None] * WIDTH + column[None, :]
    kept = tl.load(saved + offset, mask=mask, other=0.0).to(tl.float32)
    grad = tl.where(mask, activation_gradient(grad, kept, ACTIVATION), 0.0)
    tl.store(grad_sums + offset, grad.to(grad_sums.dtype.element_ty), mask=mask)
    if bias_parts is not None:
        tl.store(bias_parts + tl.program_id(0) * WIDTH + column, tl.sum(grad, 0), mask=column_mask)
    return grad


@triton.jit(do_not_specialize=["rows"])
def chain_backward(
    grad_output, weights, saved, grad_sums, bias_parts, grad_input, rows, WIDTHS: tl.constexpr, TILES: tl.constexpr,
    ACTIVATIONS: tl.constexpr, LAYERS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The reverse of chain_forward: grad_output (rows, WIDTHS[LAYERS]) -> grad_sums[i] (rows, WIDTHS[i + 1]), the
    gradient before each activation, from which the weights' gradients are one matrix product each; and grad_input
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
        g = tl.load(grad_output + row[:, None] * WIDTHS[LAYERS] + out_column[None, :],
                    mask=row_mask[:, None] & out_mask[None, :], other=0.0).to(tl.float32)  # fmt: skip
        g = _finish_gradient(g, saved[LAST], grad_sums[LAST], bias_parts[LAST], row, row_mask, out_column,
                             WIDTHS[LAYERS], ACTIVATIONS[LAST])  # fmt: skip
        w = tl.load(weights[LAST] + out_column[:, None] * WIDTHS[LAST] + column[None, :],
                    mask=out_mask[:, None] & (column < WIDTHS[LAST])[None, :], other=0.0)  # fmt: skip
        g = g.to(grad_output.dtype.element_ty).to(OPERAND)
        grad = tl.dot(g, w.to(OPERAND), grad, input_precision=PRECISION)

    for layer in tl.static_range(LAYERS - 2, 0, -1):
        k = tl.arange(0, TILES[layer + 1])
        column = tl.arange(0, TILES[layer])
        grad = _finish_gradient(grad, saved[layer], grad_sums[layer], bias_parts[layer], row, row_mask, k,
                                WIDTHS[layer + 1], ACTIVATIONS[layer])  # fmt: skip
        w = tl.load(weights[layer] + k[:, None] * WIDTHS[layer] + column[None, :],
                    mask=(k < WIDTHS[layer + 1])[:, None] & (column < WIDTHS[layer])[None, :], other=0.0)  # fmt: skip
        g = grad.to(grad_output.dtype.element_ty).to(OPERAND)
        grad = tl.dot(g, w.to(OPERAND), input_precision=PRECISION)

    k = tl.arange(0, TILES[1])
    grad = _finish_gradient(grad, saved[0], grad_sums[0], bias_parts[0], row, row_mask, k, WIDTHS[1], ACTIVATIONS[0])
    if grad_input is not None:
        g = grad.to(grad_output.dtype.element_ty).to(OPERAND)
        for start in range(0, WIDTHS[0], BLOCK_IN):
            in_column = start + tl.arange(0, BLOCK_IN)
            in_mask = in_column < WIDTHS[0]
            in_weight = tl.load(weights[0] + k[:, None] * WIDTHS[0] + in_column[None, :],
                        mask=(k < WIDTHS[1])[:, None] & in_mask[None, :], other=0.0)  # fmt: skip
            result = tl.dot(g, in_weight.to(OPERAND), input_precision=PRECISION)
            tl.store(grad_input + row[:, None] * WIDTHS[0] + in_column[None, :], result.to(grad_input.dtype.element_ty),
                     mask=row_mask[:, None] & in_mask[None, :])  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def layer_forward(
    input, weight, bias, sums_kept, output, rows, IN: tl.constexpr, OUT: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One layer: input (rows, IN), weight (OUT, IN) -> output (rows, OUT), a program a tile of the output. sums_kept:
    the activation's input (rows, OUT), or None."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row_mask = row < rows
    column_mask = column < OUT
    sums = tl.zeros([BLOCK_ROWS, BLOCK_OUT], tl.float32)
    for start in range(0, IN, BLOCK_IN):
        k = start + tl.arange(0, BLOCK_IN)
        k_mask = k < IN
        x = tl.load(input + row[:, None] * IN + k[None, :], mask=row_mask[:, None] & k_mask[None, :], other=0.0)
        w = tl.load(weight + column[None, :] * IN + k[:, None], mask=column_mask[None, :] & k_mask[:, None], other=0.0)
        sums = tl.dot(x.to(OPERAND), w.to(OPERAND), sums, input_precision=PRECISION)
    value = _finish_layer(sums, bias, sums_kept, row, row_mask, column, OUT, ACTIVATION, True)
    tl.store(output + row[:, None] * OUT + column[None, :], value.to(output.dtype.element_ty),
             mask=row_mask[:, None] & column_mask[None, :])  # fmt: skip
