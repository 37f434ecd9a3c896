"""The Triton kernels of ``fastnn::conv_relu_max_pool``, for 1 to 3 dimensions and both memory formats.

Pixels are places in a (depth, height, width) volume, numbered through all images; a problem of fewer dimensions has
ones in front. A ``_LAST`` constant says that a tensor is channels last in memory. ``GEOMETRY`` is (kernel, stride,
padding, dilation, pool kernel, pool stride, pool padding, pool dilation), each (depth, height, width).

The sum of a convolution runs over steps: with TAP_BY_TAP over the kernel's taps and BLOCK_K channels of each, the
weight being (out, taps, channels) and the input channels last; else, for few channels, over BLOCK_K elements of
(channels, taps) as a weight has them.
"""

import triton
import triton.language as tl

KERNEL = tl.constexpr(0)
STRIDE = tl.constexpr(1)
PADDING = tl.constexpr(2)
DILATION = tl.constexpr(3)
POOL = tl.constexpr(4)
POOL_STRIDE = tl.constexpr(5)
POOL_PADDING = tl.constexpr(6)
POOL_DILATION = tl.constexpr(7)
DEAD = tl.constexpr(255)  # the winner of a window whose output has no gradient


@triton.jit
def _split(index, size):
    """(depth, height, width) of a flat index into a volume, and what is left: the number of the volume."""
    rest = index // size[2]
    return rest // size[1] % size[0], rest % size[1], index % size[2], rest // size[1] // size[0]


@triton.jit
def _inside(d, h, w, size):
    return (d >= 0) & (d < size[0]) & (h >= 0) & (h < size[1]) & (w >= 0) & (w < size[2])


@triton.jit
def _offset(image, pixel, channel, size, CHANNELS: tl.constexpr, LAST: tl.constexpr):
    """Where an element lies in a dense tensor of images of CHANNELS channels of ``size``."""
    pixels = size[0] * size[1] * size[2]
    start = image.to(tl.int64) * pixels * CHANNELS
    if LAST:
        return start + pixel * CHANNELS + channel
    else:
        return start + channel * pixels + pixel


@triton.jit
def _window_place(place, d, h, w, conv_size, GEOMETRY: tl.constexpr):
    """The convolution's pixel at a place of the windows of pooled pixels (d, h, w), and whether there is one."""
    place_w = place % GEOMETRY[POOL][2]
    place_h = place // GEOMETRY[POOL][2] % GEOMETRY[POOL][1]
    place_d = place // GEOMETRY[POOL][2] // GEOMETRY[POOL][1]
    conv_d = d * GEOMETRY[POOL_STRIDE][0] - GEOMETRY[POOL_PADDING][0] + place_d * GEOMETRY[POOL_DILATION][0]
    conv_h = h * GEOMETRY[POOL_STRIDE][1] - GEOMETRY[POOL_PADDING][1] + place_h * GEOMETRY[POOL_DILATION][1]
    conv_w = w * GEOMETRY[POOL_STRIDE][2] - GEOMETRY[POOL_PADDING][2] + place_w * GEOMETRY[POOL_DILATION][2]
    return conv_d, conv_h, conv_w, _inside(conv_d, conv_h, conv_w, conv_size)


@triton.jit
def _take_larger(best, winner, value, inside, place):
    """The running maximum: the first of equals wins, and the last NaN over all else."""
    take = inside[:, None] & ((value > best) | (value != value))
    return tl.where(take, value, best), tl.where(take, place, winner)


@triton.jit
def _store_pooled(output, winners, best, winner, any_inside, offset, mask):
    """relu(best), or -inf where the window holds nothing but padding, and the winners unless they are None."""
    value = tl.where(best <= 0, 0.0, best)
    value = tl.where(any_inside[:, None], value, float("-inf"))
    tl.store(output + offset, value.to(output.dtype.element_ty), mask=mask)
    if winners is not None:
        winner = tl.where(best <= 0, DEAD, winner)
        tl.store(winners + offset, winner.to(tl.uint8), mask=mask)


@triton.jit
def _step(step, CHANNELS: tl.constexpr, GEOMETRY: tl.constexpr, TAP_BY_TAP: tl.constexpr, BLOCK_K: tl.constexpr):
    """A step of the sum: its channels, its taps (scalar where TAP_BY_TAP), its columns of the weight, and which of
    them exist."""
    TAPS: tl.constexpr = GEOMETRY[KERNEL][0] * GEOMETRY[KERNEL][1] * GEOMETRY[KERNEL][2]
    CHUNKS: tl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K
    if TAP_BY_TAP:
        tap = step // CHUNKS
        channel = step % CHUNKS * BLOCK_K + tl.arange(0, BLOCK_K)
        return channel, tap, tap * CHANNELS + channel, channel < CHANNELS
    else:
        column = step * BLOCK_K + tl.arange(0, BLOCK_K)
        return column // TAPS, column % TAPS, column, column < CHANNELS * TAPS


@triton.jit
def _load_patch(
    input, image, conv_d, conv_h, conv_w, mask, channel, tap, channel_mask, first_channel, in_size,
    IN_CHANNELS: tl.constexpr, GEOMETRY: tl.constexpr, TAP_BY_TAP: tl.constexpr, IN_LAST: tl.constexpr,
):  # fmt: skip
    """The input under a step's taps for a column of the convolution's pixels: (pixels, BLOCK_K), zero outside."""
    tap_d = tap // GEOMETRY[KERNEL][2] // GEOMETRY[KERNEL][1]
    tap_h = tap // GEOMETRY[KERNEL][2] % GEOMETRY[KERNEL][1]
    tap_w = tap % GEOMETRY[KERNEL][2]
    d = conv_d * GEOMETRY[STRIDE][0] - GEOMETRY[PADDING][0]
    h = conv_h * GEOMETRY[STRIDE][1] - GEOMETRY[PADDING][1]
    w = conv_w * GEOMETRY[STRIDE][2] - GEOMETRY[PADDING][2]
    if TAP_BY_TAP:
        d += tap_d * GEOMETRY[DILATION][0]
        h += tap_h * GEOMETRY[DILATION][1]
        w += tap_w * GEOMETRY[DILATION][2]
        inside = (mask & _inside(d, h, w, in_size))[:, None]
        pixel = ((d * in_size[1] + h) * in_size[2] + w)[:, None]
    else:
        d = d[:, None] + tap_d[None, :] * GEOMETRY[DILATION][0]
        h = h[:, None] + tap_h[None, :] * GEOMETRY[DILATION][1]
        w = w[:, None] + tap_w[None, :] * GEOMETRY[DILATION][2]
        inside = mask[:, None] & _inside(d, h, w, in_size)
        pixel = (d * in_size[1] + h) * in_size[2] + w
    offset = _offset(image[:, None], pixel, first_channel + channel[None, :], in_size, IN_CHANNELS, IN_LAST)
    return tl.load(input + offset, mask=inside & channel_mask[None, :], other=0.0)


@triton.jit
def _add_products(
    sums, step, first_place, input, weight, image, d, h, w, pixel_mask, channel_out, out_mask, group, in_size,
    conv_size, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, GEOMETRY: tl.constexpr, IN_LAST: tl.constexpr,
    TAP_BY_TAP: tl.constexpr, BLOCK_K: tl.constexpr, TOGETHER: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A step's products, added to the sums of TOGETHER places, which share the weight's tile."""
    depth: tl.constexpr = CHANNELS * GEOMETRY[KERNEL][0] * GEOMETRY[KERNEL][1] * GEOMETRY[KERNEL][2]
    channel, tap, column, column_mask = _step(step, CHANNELS, GEOMETRY, TAP_BY_TAP, BLOCK_K)
    k = tl.load(weight + channel_out[None, :] * depth + column[:, None],
                mask=out_mask[None, :] & column_mask[:, None], other=0.0).to(OPERAND)  # fmt: skip
    added = ()
    for i in tl.static_range(TOGETHER):
        conv_d, conv_h, conv_w, inside = _window_place(first_place + i, d, h, w, conv_size, GEOMETRY)
        x = _load_patch(input, image, conv_d, conv_h, conv_w, inside & pixel_mask, channel, tap, column_mask,
                        group * CHANNELS, in_size, GROUPS * CHANNELS, GEOMETRY, TAP_BY_TAP, IN_LAST)  # fmt: skip
        added += (tl.dot(x.to(OPERAND), k, sums[i], input_precision=PRECISION),)
    return added


@triton.jit(do_not_specialize=["pooled_pixels"])
def conv_forward(
    input, weight, bias, output, winners, pooled_pixels, in_size, conv_size, out_size, steps, GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr, GEOMETRY: tl.constexpr, IN_LAST: tl.constexpr,
    OUT_LAST: tl.constexpr, TAP_BY_TAP: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_K: tl.constexpr, TOGETHER: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """input (images, GROUPS * CHANNELS, *in_size), weight (GROUPS * OUT_CHANNELS, CHANNELS, taps) or (.., taps,
    CHANNELS) -> output and winners (images, GROUPS * OUT_CHANNELS, *out_size); bias and winners may be None.

    A program computes BLOCK_PIXELS pooled pixels by BLOCK_OUT channels: TOGETHER places of the windows at a time, a
    divisor of their number, each with its own sums and all with the same tiles of the weight; the maximum stays in
    registers.
    """
    blocks: tl.constexpr = (OUT_CHANNELS + BLOCK_OUT - 1) // BLOCK_OUT
    group = tl.program_id(1) // blocks
    channel_out = tl.program_id(1) % blocks * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    out_mask = channel_out < OUT_CHANNELS
    channel_out += group * OUT_CHANNELS
    index = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    pixel_mask = index < pooled_pixels
    d, h, w, image = _split(index, out_size)

    start = tl.zeros([BLOCK_PIXELS, BLOCK_OUT], tl.float32)
    if bias is not None:
        start += tl.load(bias + channel_out, mask=out_mask, other=0.0).to(tl.float32)[None, :]
    best = tl.full([BLOCK_PIXELS, BLOCK_OUT], float("-inf"), tl.float32)
    winner = tl.full([BLOCK_PIXELS, BLOCK_OUT], DEAD, tl.int32)
    any_inside = index < 0
    for first_place in range(0, GEOMETRY[POOL][0] * GEOMETRY[POOL][1] * GEOMETRY[POOL][2], TOGETHER):
        sums = (start,) * TOGETHER
        for step in range(steps):
            sums = _add_products(sums, step, first_place, input, weight, image, d, h, w, pixel_mask, channel_out,
                                 out_mask, group, in_size, conv_size, GROUPS, CHANNELS, GEOMETRY, IN_LAST, TAP_BY_TAP,
                                 BLOCK_K, TOGETHER, OPERAND, PRECISION)  # fmt: skip
        for i in tl.static_range(TOGETHER):
            _, _, _, inside = _window_place(first_place + i, d, h, w, conv_size, GEOMETRY)
            best, winner = _take_larger(best, winner, sums[i], inside & pixel_mask, first_place + i)
            any_inside = any_inside | (inside & pixel_mask)

    pixel = (d * out_size[1] + h) * out_size[2] + w
    offset = _offset(image[:, None], pixel[:, None], channel_out[None, :], out_size, GROUPS * OUT_CHANNELS, OUT_LAST)
    _store_pooled(output, winners, best, winner, any_inside, offset, pixel_mask[:, None] & out_mask[None, :])


@triton.jit(do_not_specialize=["pooled_pixels"])
def pool_forward(
    conv, output, winners, pooled_pixels, conv_size, out_size, OUT_CHANNELS: tl.constexpr, GEOMETRY: tl.constexpr,
    LAST: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_OUT: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """ReLU and max-pool alone: conv (images, OUT_CHANNELS, *conv_size) -> output and winners (.., *out_size)."""
    channel = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    out_mask = channel < OUT_CHANNELS
    index = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    pixel_mask = index < pooled_pixels
    d, h, w, image = _split(index, out_size)
    best = tl.full([BLOCK_PIXELS, BLOCK_OUT], float("-inf"), COMPUTE)
    winner = tl.full([BLOCK_PIXELS, BLOCK_OUT], DEAD, tl.int32)
    any_inside = index < 0
    for place in range(GEOMETRY[POOL][0] * GEOMETRY[POOL][1] * GEOMETRY[POOL][2]):
        conv_d, conv_h, conv_w, inside = _window_place(place, d, h, w, conv_size, GEOMETRY)
        inside = inside & pixel_mask
        pixel = (conv_d * conv_size[1] + conv_h) * conv_size[2] + conv_w
        offset = _offset(image[:, None], pixel[:, None], channel[None, :], conv_size, OUT_CHANNELS, LAST)
        value = tl.load(conv + offset, mask=inside[:, None] & out_mask[None, :], other=0.0).to(COMPUTE)
        best, winner = _take_larger(best, winner, value, inside, place)
        any_inside = any_inside | inside
    pixel = (d * out_size[1] + h) * out_size[2] + w
    offset = _offset(image[:, None], pixel[:, None], channel[None, :], out_size, OUT_CHANNELS, LAST)
    _store_pooled(output, winners, best, winner, any_inside, offset, pixel_mask[:, None] & out_mask[None, :])


@triton.jit
def _conv_gradient(
    grad_output, winners, image, conv_d, conv_h, conv_w, mask, channel, channel_mask, out_size,
    OUT_CHANNELS: tl.constexpr, GEOMETRY: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The gradient of the convolution's output at a column of its pixels: (pixels, channels), gathered from the
    windows that each pixel may have won. grad_output and winners are channels last."""
    POOLS: tl.constexpr = GEOMETRY[POOL]
    DISJOINT: tl.constexpr = (
        (GEOMETRY[POOL_DILATION][0] == 1) & (GEOMETRY[POOL_DILATION][1] == 1) & (GEOMETRY[POOL_DILATION][2] == 1)
        & (GEOMETRY[POOL_STRIDE][0] >= POOLS[0]) & (GEOMETRY[POOL_STRIDE][1] >= POOLS[1])
        & (GEOMETRY[POOL_STRIDE][2] >= POOLS[2])
    )  # fmt: skip
    shifted_d = conv_d + GEOMETRY[POOL_PADDING][0]
    shifted_h = conv_h + GEOMETRY[POOL_PADDING][1]
    shifted_w = conv_w + GEOMETRY[POOL_PADDING][2]
    total = tl.zeros([mask.shape[0], channel.shape[0]], COMPUTE)
    # A pixel is in one window at most where windows do not overlap, else at one place at most of every window.
    for turn in range(1 if DISJOINT else POOLS[0] * POOLS[1] * POOLS[2]):
        if DISJOINT:
            place_d = shifted_d % GEOMETRY[POOL_STRIDE][0]
            place_h = shifted_h % GEOMETRY[POOL_STRIDE][1]
            place_w = shifted_w % GEOMETRY[POOL_STRIDE][2]
            exists = mask & (place_d < POOLS[0]) & (place_h < POOLS[1]) & (place_w < POOLS[2])
            from_d, from_h, from_w = shifted_d, shifted_h, shifted_w
        else:
            place_d = turn // (POOLS[1] * POOLS[2])
            place_h = turn // POOLS[2] % POOLS[1]
            place_w = turn % POOLS[2]
            from_d = shifted_d - place_d * GEOMETRY[POOL_DILATION][0]
            from_h = shifted_h - place_h * GEOMETRY[POOL_DILATION][1]
            from_w = shifted_w - place_w * GEOMETRY[POOL_DILATION][2]
            exists = mask & (from_d >= 0) & (from_h >= 0) & (from_w >= 0)
            exists = exists & (from_d % GEOMETRY[POOL_STRIDE][0] == 0)
            exists = exists & (from_h % GEOMETRY[POOL_STRIDE][1] == 0)
            exists = exists & (from_w % GEOMETRY[POOL_STRIDE][2] == 0)
        place = (place_d * POOLS[1] + place_h) * POOLS[2] + place_w
        d = from_d // GEOMETRY[POOL_STRIDE][0]
        h = from_h // GEOMETRY[POOL_STRIDE][1]
        w = from_w // GEOMETRY[POOL_STRIDE][2]
        exists = exists & (d < out_size[0]) & (h < out_size[1]) & (w < out_size[2])
        pixel = (d * out_size[1] + h) * out_size[2] + w
        offset = _offset(image[:, None], pixel[:, None], channel[None, :], out_size, OUT_CHANNELS, True)
        both = exists[:, None] & channel_mask[None, :]
        winner = tl.load(winners + offset, mask=both, other=255).to(tl.int32)
        grad = tl.load(grad_output + offset, mask=both, other=0.0).to(COMPUTE)
        if DISJOINT:
            place = place[:, None]
        total += tl.where(winner == place, grad, 0.0)
    return total


@triton.jit(do_not_specialize=["conv_pixels"])
def spread_gradient(
    grad_output, winners, grad_conv, conv_pixels, conv_size, out_size, OUT_CHANNELS: tl.constexpr,
    GEOMETRY: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_OUT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """grad_output and winners (images, OUT_CHANNELS, *out_size) -> grad_conv (.., *conv_size), all channels last."""
    channel = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    out_mask = channel < OUT_CHANNELS
    index = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    pixel_mask = index < conv_pixels
    d, h, w, image = _split(index, conv_size)
    grad = _conv_gradient(grad_output, winners, image, d, h, w, pixel_mask, channel, out_mask, out_size, OUT_CHANNELS,
                          GEOMETRY, COMPUTE)  # fmt: skip
    pixel = (d * conv_size[1] + h) * conv_size[2] + w
    offset = _offset(image[:, None], pixel[:, None], channel[None, :], conv_size, OUT_CHANNELS, True)
    tl.store(grad_conv + offset, grad.to(grad_conv.dtype.element_ty), mask=pixel_mask[:, None] & out_mask[None, :])


@triton.jit(do_not_specialize=["in_pixels"])
def conv_input_gradient(
    grad_output, winners, weight, grad_input, in_pixels, in_size, conv_size, out_size, GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr, GEOMETRY: tl.constexpr, IN_LAST: tl.constexpr,
    TAP_BY_TAP: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_output and winners (images, GROUPS * OUT_CHANNELS, *out_size), channels last -> grad_input (images,
    GROUPS * CHANNELS, *in_size), a program BLOCK_PIXELS pixels by BLOCK_K channels. The gradient of the convolution's
    output is rebuilt from the winners tap by tap and never written."""
    TAPS: tl.constexpr = GEOMETRY[KERNEL][0] * GEOMETRY[KERNEL][1] * GEOMETRY[KERNEL][2]
    blocks: tl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K
    group = tl.program_id(1) // blocks
    channel_in = tl.program_id(1) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    in_mask = channel_in < CHANNELS
    index = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    pixel_mask = index < in_pixels
    d, h, w, image = _split(index, in_size)
    sums = tl.zeros([BLOCK_PIXELS, BLOCK_K], tl.float32)
    CHUNKS: tl.constexpr = (OUT_CHANNELS + BLOCK_OUT - 1) // BLOCK_OUT
    for step in range(TAPS * CHUNKS):
        tap = step // CHUNKS
        channel_out = step % CHUNKS * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        out_mask = channel_out < OUT_CHANNELS
        channel_out += group * OUT_CHANNELS
        from_d = d + GEOMETRY[PADDING][0] - tap // GEOMETRY[KERNEL][2] // GEOMETRY[KERNEL][1] * GEOMETRY[DILATION][0]
        from_h = h + GEOMETRY[PADDING][1] - tap // GEOMETRY[KERNEL][2] % GEOMETRY[KERNEL][1] * GEOMETRY[DILATION][1]
        from_w = w + GEOMETRY[PADDING][2] - tap % GEOMETRY[KERNEL][2] * GEOMETRY[DILATION][2]
        conv_d, conv_h, conv_w = (
            from_d // GEOMETRY[STRIDE][0], from_h // GEOMETRY[STRIDE][1], from_w // GEOMETRY[STRIDE][2]
        )  # fmt: skip
        exists = pixel_mask & (from_d >= 0) & (from_h >= 0) & (from_w >= 0)
        exists = exists & (conv_d * GEOMETRY[STRIDE][0] == from_d) & (conv_h * GEOMETRY[STRIDE][1] == from_h)
        exists = exists & (conv_w * GEOMETRY[STRIDE][2] == from_w) & _inside(conv_d, conv_h, conv_w, conv_size)
        grad = _conv_gradient(grad_output, winners, image, conv_d, conv_h, conv_w, exists, channel_out, out_mask,
                              out_size, GROUPS * OUT_CHANNELS, GEOMETRY, tl.float32)  # fmt: skip
        column = tap * CHANNELS + channel_in if TAP_BY_TAP else channel_in * TAPS + tap
        k = tl.load(weight + channel_out[:, None] * (CHANNELS * TAPS) + column[None, :],
                    mask=out_mask[:, None] & in_mask[None, :], other=0.0)  # fmt: skip
        grad = grad.to(grad_output.dtype.element_ty).to(OPERAND)
        sums = tl.dot(grad, k.to(OPERAND), sums, input_precision=PRECISION)
    pixel = (d * in_size[1] + h) * in_size[2] + w
    channel_in += group * CHANNELS
    offset = _offset(image[:, None], pixel[:, None], channel_in[None, :], in_size, GROUPS * CHANNELS, IN_LAST)
    tl.store(grad_input + offset, sums.to(grad_input.dtype.element_ty), mask=pixel_mask[:, None] & in_mask[None, :])


@triton.jit(do_not_specialize=["pooled_pixels"])
def conv_weight_gradient(
    grad_output, winners, input, weight_parts, bias_parts, pooled_pixels, in_size, conv_size, out_size,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr, GEOMETRY: tl.constexpr,
    IN_LAST: tl.constexpr, TAP_BY_TAP: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_K: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_output and winners (images, GROUPS * OUT_CHANNELS, *out_size), channels last, input (images, GROUPS *
    CHANNELS, *in_size) -> weight_parts (parts, GROUPS * OUT_CHANNELS, CHANNELS * taps), the columns as a step has
    them, and bias_parts (parts, GROUPS * OUT_CHANNELS), unless that is None.

    Program (part, group and block of out channels, step) adds up its share of the tiles of pooled pixels: each window
    has one pixel of the convolution that has a gradient, at its winner's place.
    """
    TAPS: tl.constexpr = GEOMETRY[KERNEL][0] * GEOMETRY[KERNEL][1] * GEOMETRY[KERNEL][2]
    blocks: tl.constexpr = (OUT_CHANNELS + BLOCK_OUT - 1) // BLOCK_OUT
    group = tl.program_id(1) // blocks
    channel_out = tl.program_id(1) % blocks * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    out_mask = channel_out < OUT_CHANNELS
    channel_out += group * OUT_CHANNELS
    channel, tap, column, column_mask = _step(tl.program_id(2), CHANNELS, GEOMETRY, TAP_BY_TAP, BLOCK_K)
    sums = tl.zeros([BLOCK_OUT, BLOCK_K], tl.float32)
    bias_sums = tl.zeros([BLOCK_OUT], tl.float32)
    PLACES: tl.constexpr = GEOMETRY[POOL][0] * GEOMETRY[POOL][1] * GEOMETRY[POOL][2]
    tiles_each = tl.cdiv(tl.cdiv(pooled_pixels, BLOCK_PIXELS), tl.num_programs(0))
    for tile in range(tl.program_id(0) * tiles_each, (tl.program_id(0) + 1) * tiles_each):
        index = tile * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
        pixel_mask = index < pooled_pixels
        d, h, w, image = _split(index, out_size)
        pixel = (d * out_size[1] + h) * out_size[2] + w
        offset = _offset(image[None, :], pixel[None, :], channel_out[:, None], out_size, GROUPS * OUT_CHANNELS, True)
        both = out_mask[:, None] & pixel_mask[None, :]
        winner = tl.load(winners + offset, mask=both, other=255).to(tl.int32)
        grad = tl.load(grad_output + offset, mask=both, other=0.0).to(OPERAND)
        for place in range(PLACES):
            conv_d, conv_h, conv_w, inside = _window_place(place, d, h, w, conv_size, GEOMETRY)
            x = _load_patch(input, image, conv_d, conv_h, conv_w, inside & pixel_mask, channel, tap, column_mask,
                            group * CHANNELS, in_size, GROUPS * CHANNELS, GEOMETRY, TAP_BY_TAP, IN_LAST)  # fmt: skip
            won = tl.where(winner == place, grad, 0.0).to(OPERAND)
            sums = tl.dot(won, x.to(OPERAND), sums, input_precision=PRECISION)
        bias_sums += tl.sum(tl.where(winner < PLACES, grad.to(tl.float32), 0.0), 1)
    row = tl.program_id(0).to(tl.int64) * (GROUPS * OUT_CHANNELS) + channel_out
    tl.store(weight_parts + row[:, None] * (CHANNELS * TAPS) + column[None, :], sums,
             mask=out_mask[:, None] & column_mask[None, :])  # fmt: skip
    if bias_parts is not None:  # noqa: SIM102 (this is known at compile time, the next is not)
        if tl.program_id(2) == 0:
            tl.store(bias_parts + row, bias_sums, mask=out_mask)
