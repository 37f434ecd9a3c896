"""The Triton kernels of ``fastnn::conv_relu_max_pool``, for 1 to 3 dimensions and both memory formats.

Pixels are places in a (depth, height, width) volume, numbered through all images; a problem of fewer dimensions has
ones in front. Constants that many functions take:

- ``GEOMETRY``: (kernel, stride, padding, dilation, pool kernel, pool stride, pool padding, pool dilation), each (depth,
  height, width).
- ``CHANNELS``: (groups, input channels of a group, output channels of a group).
- ``LAYOUT``: how input and weight lie in memory, and the order in which a sum takes their products (see its indices).

A sum runs over columns in steps of BLOCK_K: the kernel's taps, and LAYOUT[TAP_COLUMNS] input channels of each.
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

GROUPS = tl.constexpr(0)
IN = tl.constexpr(1)
OUT = tl.constexpr(2)

X_LAST = tl.constexpr(0)  # whether the input's channels are last
W_LAST = tl.constexpr(1)  # whether the weight is (out, taps, in), not (out, in, taps)
# Columns of a tap: at least the channels of a group; divides BLOCK_K, or is a multiple of it.
TAP_COLUMNS = tl.constexpr(2)

DEAD = tl.constexpr(255)  # the winner of a window whose output has no gradient


@triton.jit
def _divide(index, size, multiplier, shift):
    """index // size and index % size, of 0 <= index < 2**31, by a product: see _conv_geometry.divisors."""
    multiplier = tl.full([1], multiplier, tl.int32).to(tl.uint32, bitcast=True)
    quotient = (tl.umulhi(index.to(tl.uint32), multiplier) >> shift).to(tl.int32)
    quotient = tl.where(size == 1, index, quotient)
    return quotient, index - quotient * size


@triton.jit
def _split(index, size, divisors):
    """(image, depth, height, width) of a flat index into the volumes of all images."""
    rest, w = _divide(index, size[2], divisors[4], divisors[5])
    rest, h = _divide(rest, size[1], divisors[2], divisors[3])
    image, d = _divide(rest, size[0], divisors[0], divisors[1])
    return image, d, h, w


@triton.jit
def _inside(d, h, w, size):
    return (d >= 0) & (d < size[0]) & (h >= 0) & (h < size[1]) & (w >= 0) & (w < size[2])


@triton.jit
def _offset(pixel, channel, size, CHANNELS: tl.constexpr, LAST: tl.constexpr):
    """Where elements lie in a dense tensor of images of CHANNELS channels of ``size``: (pixels, channels)."""
    image, d, h, w = pixel
    pixels = size[0] * size[1] * size[2]
    start = image.to(tl.int64) * (pixels * CHANNELS)
    place = (d * size[1] + h) * size[2] + w
    if LAST:
        return (start + place * CHANNELS)[:, None] + channel[None, :]
    else:
        return (start + place)[:, None] + (channel * pixels)[None, :]


@triton.jit
def _window_start(d, h, w, GEOMETRY: tl.constexpr):
    """The convolution's pixel at the first place of the windows of pooled pixels (d, h, w)."""
    return (
        d * GEOMETRY[POOL_STRIDE][0] - GEOMETRY[POOL_PADDING][0],
        h * GEOMETRY[POOL_STRIDE][1] - GEOMETRY[POOL_PADDING][1],
        w * GEOMETRY[POOL_STRIDE][2] - GEOMETRY[POOL_PADDING][2],
    )


@triton.jit
def _from_first(index, GEOMETRY: tl.constexpr, SIZE: tl.constexpr, APART: tl.constexpr):
    """How far an element of a window or a kernel lies from its first one. SIZE and APART are the indices of size and
    dilation in GEOMETRY: Triton 3.5 takes no part of a tuple for an argument."""
    d = index // GEOMETRY[SIZE][2] // GEOMETRY[SIZE][1] * GEOMETRY[APART][0]
    h = index // GEOMETRY[SIZE][2] % GEOMETRY[SIZE][1] * GEOMETRY[APART][1]
    w = index % GEOMETRY[SIZE][2] * GEOMETRY[APART][2]
    return d, h, w


@triton.jit
def _window_place(place, window, conv_size, GEOMETRY: tl.constexpr):
    """The convolution's pixel at a place of the windows that begin at ``window``, and whether there is one."""
    place_d, place_h, place_w = _from_first(place, GEOMETRY, POOL, POOL_DILATION)
    d, h, w = window[0] + place_d, window[1] + place_h, window[2] + place_w
    return d, h, w, _inside(d, h, w, conv_size)


@triton.jit
def _take_larger(best, winner, value, inside, place):
    """The running maximum, at first -inf, and its place, at first any: the first of equals wins, and the last NaN over
    all else. ``inside``: (pixels), or None where all of them are."""
    take = (value > best) | (value != value)
    if inside is not None:
        take = take & inside[:, None]
    return tl.where(take, value, best), tl.where(take, place, winner)


@triton.jit
def _store_pooled(y_ptr, winners_ptr, best, winner, any_inside, pixel, channel, mask, size, CHANNELS: tl.constexpr,
                  LAST: tl.constexpr):  # fmt: skip
    """relu(best), or -inf where the window holds nothing but padding, and the winners unless they are None: (pixels,
    channels)."""
    value = tl.where(best <= 0, 0.0, best)
    if any_inside is not None:
        value = tl.where(any_inside[:, None], value, float("-inf"))
    value = value.to(y_ptr.dtype.element_ty)
    winner = tl.where(best <= 0, DEAD, winner).to(tl.uint8)
    offset = _offset(pixel, channel, size, CHANNELS, LAST)
    if not LAST:
        # The compiler does not see that pixels follow each other, and has a warp's lanes go along the last dimension.
        offset, mask, value, winner = tl.trans(offset), tl.trans(mask), tl.trans(value), tl.trans(winner)
    tl.store(y_ptr + offset, value, mask=mask)
    if winners_ptr is not None:
        tl.store(winners_ptr + offset, winner, mask=mask)


@triton.jit(do_not_specialize=["packed_pixels"])
def pack_channels(
    x_ptr, packed_ptr, packed_pixels, in_size, packed_size, divisors, CHANNELS: tl.constexpr, PADDING: tl.constexpr,
    X_LAST: tl.constexpr, PACKED_CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
):  # fmt: skip
    """x (images, CHANNELS, *in_size) -> packed (images, *packed_size, PACKED_CHANNELS): zeros around the image and in
    the channels beyond CHANNELS. A weight is packed as the images that its output channels are."""
    index = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    image, d, h, w = _split(index, packed_size, divisors)
    d, h, w = d - PADDING[0], h - PADDING[1], w - PADDING[2]
    mask = (index < packed_pixels) & _inside(d, h, w, in_size)
    channel = tl.arange(0, PACKED_CHANNELS)
    offset = _offset((image, d, h, w), channel, in_size, CHANNELS, X_LAST)
    x = tl.load(x_ptr + offset, mask=mask[:, None] & (channel < CHANNELS)[None, :], other=0.0)
    offset = index.to(tl.int64)[:, None] * PACKED_CHANNELS + channel[None, :]
    tl.store(packed_ptr + offset, x, mask=(index < packed_pixels)[:, None])


@triton.jit
def _step(step, CHANNELS: tl.constexpr, GEOMETRY: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_K: tl.constexpr):
    """A step's columns: the tap and channel of each, and whether they exist."""
    TAPS: tl.constexpr = GEOMETRY[KERNEL][0] * GEOMETRY[KERNEL][1] * GEOMETRY[KERNEL][2]
    if LAYOUT[TAP_COLUMNS] >= BLOCK_K:
        CHUNKS: tl.constexpr = LAYOUT[TAP_COLUMNS] // BLOCK_K
        tap = tl.full([BLOCK_K], step // CHUNKS, tl.int32)
        channel = step % CHUNKS * BLOCK_K + tl.arange(0, BLOCK_K)
        return tap, channel, channel < CHANNELS[IN]
    else:
        column = step * BLOCK_K + tl.arange(0, BLOCK_K)
        tap = column // LAYOUT[TAP_COLUMNS]
        channel = column % LAYOUT[TAP_COLUMNS]
        if LAYOUT[TAP_COLUMNS] == CHANNELS[IN]:
            return tap, channel, tap < TAPS
        else:
            return tap, channel, (tap < TAPS) & (channel < CHANNELS[IN])


@triton.jit
def _weight_offset(tap, channel, CHANNELS: tl.constexpr, GEOMETRY: tl.constexpr, LAST: tl.constexpr):
    TAPS: tl.constexpr = GEOMETRY[KERNEL][0] * GEOMETRY[KERNEL][1] * GEOMETRY[KERNEL][2]
    if LAST:
        return tap * CHANNELS[IN] + channel
    else:
        return channel * TAPS + tap


@triton.jit
def _first_patch(image, window, group, in_size, CHANNELS: tl.constexpr, GEOMETRY: tl.constexpr, LAYOUT: tl.constexpr):
    """The input's pixel under the first tap, at the first place of windows: its offset (pixels, 1), and where it lies,
    which may be in the padding."""
    d = window[0] * GEOMETRY[STRIDE][0] - GEOMETRY[PADDING][0]
    h = window[1] * GEOMETRY[STRIDE][1] - GEOMETRY[PADDING][1]
    w = window[2] * GEOMETRY[STRIDE][2] - GEOMETRY[PADDING][2]
    first_channel = tl.full([1], group * CHANNELS[IN], tl.int32)
    offset = _offset((image, d, h, w), first_channel, in_size, CHANNELS[GROUPS] * CHANNELS[IN], LAYOUT[X_LAST])
    return offset, d, h, w


@triton.jit
def _load_patch(x_ptr, first, place, mask, columns, in_size, CHANNELS: tl.constexpr, GEOMETRY: tl.constexpr,
                LAYOUT: tl.constexpr):  # fmt: skip
    """The input under a step's taps at a place of windows: (pixels, BLOCK_K), zero outside. ``first``: the windows'
    first patches. ``mask``: which of the windows have such a place, or None for all."""
    offset, d, h, w = first
    tap, channel, exists = columns
    place_d, place_h, place_w = _from_first(place, GEOMETRY, POOL, POOL_DILATION)
    tap_d, tap_h, tap_w = _from_first(tap, GEOMETRY, KERNEL, DILATION)
    tap_d += place_d * GEOMETRY[STRIDE][0]
    tap_h += place_h * GEOMETRY[STRIDE][1]
    tap_w += place_w * GEOMETRY[STRIDE][2]
    pixel = (tap_d * in_size[1] + tap_h) * in_size[2] + tap_w
    if LAYOUT[X_LAST]:
        column = pixel * (CHANNELS[GROUPS] * CHANNELS[IN]) + channel
    else:
        column = pixel + channel * (in_size[0] * in_size[1] * in_size[2])
    both = exists[None, :] if mask is None else exists[None, :] & mask[:, None]
    # Without padding a patch lies inside wherever its pixel of the convolution does.
    if GEOMETRY[PADDING][0] > 0:
        at_d = d[:, None] + tap_d[None, :]
        both = both & (at_d >= 0) & (at_d < in_size[0])
    if GEOMETRY[PADDING][1] > 0:
        at_h = h[:, None] + tap_h[None, :]
        both = both & (at_h >= 0) & (at_h < in_size[1])
    if GEOMETRY[PADDING][2] > 0:
        at_w = w[:, None] + tap_w[None, :]
        both = both & (at_w >= 0) & (at_w < in_size[2])
    return tl.load(x_ptr + (offset + column[None, :]), mask=both, other=0.0)


@triton.jit
def _add_products(
    sums, step, first_place, x_ptr, w_ptr, window, first, out, in_size, conv_size, CHANNELS: tl.constexpr,
    GEOMETRY: tl.constexpr, LAYOUT: tl.constexpr, WHOLE: tl.constexpr, BLOCK_K: tl.constexpr, TOGETHER: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A step's products, added to the sums of TOGETHER places, which share the weight's tile."""
    TAPS: tl.constexpr = GEOMETRY[KERNEL][0] * GEOMETRY[KERNEL][1] * GEOMETRY[KERNEL][2]
    channel_out, out_mask = out
    tap, channel, exists = _step(step, CHANNELS, GEOMETRY, LAYOUT, BLOCK_K)
    column = _weight_offset(tap, channel, CHANNELS, GEOMETRY, LAYOUT[W_LAST])
    k = tl.load(w_ptr + channel_out[None, :] * (CHANNELS[IN] * TAPS) + column[:, None],
                mask=out_mask[None, :] & exists[:, None], other=0.0).to(OPERAND)  # fmt: skip
    added = ()
    for i in tl.static_range(TOGETHER):
        _, _, _, inside = _window_place(first_place + i, window, conv_size, GEOMETRY)
        x = _load_patch(x_ptr, first, first_place + i, None if WHOLE else inside, (tap, channel, exists), in_size,
                        CHANNELS, GEOMETRY, LAYOUT)  # fmt: skip
        added += (tl.dot(x.to(OPERAND), k, sums[i], input_precision=PRECISION),)
    return added


@triton.jit(do_not_specialize=["pooled_pixels"])
def conv_forward(
    x_ptr, w_ptr, bias_ptr, y_ptr, winners_ptr, pooled_pixels, in_size, conv_size, out_size, divisors, steps,
    CHANNELS: tl.constexpr, GEOMETRY: tl.constexpr, LAYOUT: tl.constexpr, WHOLE: tl.constexpr, Y_LAST: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_K: tl.constexpr, TOGETHER: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x (images, channels, *in_size), w (GROUPS * OUT, IN, taps) -> y and winners (images, GROUPS * OUT, *out_size);
    bias and winners may be None. WHOLE: no window reaches beyond the convolution.

    A program computes BLOCK_PIXELS pooled pixels by BLOCK_OUT channels: TOGETHER places of the windows at a time, a
    divisor of their number, each with its own sums and all with the same tiles of the weight; the maximum stays in
    registers.
    """
    blocks: tl.constexpr = (CHANNELS[OUT] + BLOCK_OUT - 1) // BLOCK_OUT
    group = tl.program_id(1) // blocks
    channel_out = tl.program_id(1) % blocks * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    out_mask = channel_out < CHANNELS[OUT]
    channel_out += group * CHANNELS[OUT]
    index = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    pixel_mask = index < pooled_pixels
    # Beyond the last pixel the last one again, so that whole windows can be loaded without asking.
    image, d, h, w = _split(tl.minimum(index, pooled_pixels - 1), out_size, divisors)
    window = _window_start(d, h, w, GEOMETRY)
    first = _first_patch(image, window, group, in_size, CHANNELS, GEOMETRY, LAYOUT)

    start = tl.zeros([BLOCK_PIXELS, BLOCK_OUT], tl.float32)
    if bias_ptr is not None:
        start += tl.load(bias_ptr + channel_out, mask=out_mask, other=0.0).to(tl.float32)[None, :]
    best = tl.full([BLOCK_PIXELS, BLOCK_OUT], float("-inf"), tl.float32)
    winner = tl.zeros([BLOCK_PIXELS, BLOCK_OUT], tl.int32)
    any_inside = index < 0
    for first_place in range(0, GEOMETRY[POOL][0] * GEOMETRY[POOL][1] * GEOMETRY[POOL][2], TOGETHER):
        sums = (start,) * TOGETHER
        for step in range(steps):
            sums = _add_products(sums, step, first_place, x_ptr, w_ptr, window, first, (channel_out, out_mask), in_size,
                                 conv_size, CHANNELS, GEOMETRY, LAYOUT, WHOLE, BLOCK_K, TOGETHER, OPERAND,
                                 PRECISION)  # fmt: skip
        for i in tl.static_range(TOGETHER):
            _, _, _, inside = _window_place(first_place + i, window, conv_size, GEOMETRY)
            best, winner = _take_larger(best, winner, sums[i], None if WHOLE else inside, first_place + i)
            any_inside = any_inside | inside

    _store_pooled(y_ptr, winners_ptr, best, winner, None if WHOLE else any_inside, (image, d, h, w), channel_out,
                  pixel_mask[:, None] & out_mask[None, :], out_size, CHANNELS[GROUPS] * CHANNELS[OUT],
                  Y_LAST)  # fmt: skip


@triton.jit(do_not_specialize=["pooled_pixels"])
def pool_forward(
    conv_ptr, y_ptr, winners_ptr, pooled_pixels, conv_size, out_size, divisors, CHANNELS: tl.constexpr,
    GEOMETRY: tl.constexpr, LAST: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_OUT: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """ReLU and max-pool alone: conv (images, CHANNELS, *conv_size) -> y and winners (.., *out_size)."""
    channel = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    out_mask = channel < CHANNELS
    index = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    pixel_mask = index < pooled_pixels
    image, d, h, w = _split(index, out_size, divisors)
    window = _window_start(d, h, w, GEOMETRY)
    best = tl.full([BLOCK_PIXELS, BLOCK_OUT], float("-inf"), COMPUTE)
    winner = tl.zeros([BLOCK_PIXELS, BLOCK_OUT], tl.int32)
    any_inside = index < 0
    for place in range(GEOMETRY[POOL][0] * GEOMETRY[POOL][1] * GEOMETRY[POOL][2]):
        conv_d, conv_h, conv_w, inside = _window_place(place, window, conv_size, GEOMETRY)
        inside = inside & pixel_mask
        offset = _offset((image, conv_d, conv_h, conv_w), channel, conv_size, CHANNELS, LAST)
        value = tl.load(conv_ptr + offset, mask=inside[:, None] & out_mask[None, :], other=0.0).to(COMPUTE)
        best, winner = _take_larger(best, winner, value, inside, place)
        any_inside = any_inside | inside
    _store_pooled(y_ptr, winners_ptr, best, winner, any_inside, (image, d, h, w), channel,
                  pixel_mask[:, None] & out_mask[None, :], out_size, CHANNELS, LAST)  # fmt: skip


@triton.jit
def _conv_gradient(
    grad_y_ptr, winners_ptr, conv_pixel, mask, channel, channel_mask, out_size, CHANNELS: tl.constexpr,
    GEOMETRY: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The gradient of the convolution's output at a column of its pixels: (pixels, channels), gathered from the
    windows that each pixel may have won. grad_y and winners have CHANNELS channels, which are last."""
    image, conv_d, conv_h, conv_w = conv_pixel
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
        offset = _offset((image, d, h, w), channel, out_size, CHANNELS, True)
        both = exists[:, None] & channel_mask[None, :]
        winner = tl.load(winners_ptr + offset, mask=both, other=DEAD).to(tl.int32)
        grad = tl.load(grad_y_ptr + offset, mask=both, other=0.0).to(COMPUTE)
        if DISJOINT:
            place = place[:, None]
        total += tl.where(winner == place, grad, 0.0)
    return total


@triton.jit(do_not_specialize=["conv_pixels"])
def spread_gradient(
    grad_y_ptr, winners_ptr, grad_conv_ptr, conv_pixels, conv_size, out_size, divisors, CHANNELS: tl.constexpr,
    GEOMETRY: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_OUT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """grad_y and winners (images, CHANNELS, *out_size) -> grad_conv (.., *conv_size), all channels last."""
    channel = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    out_mask = channel < CHANNELS
    index = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    pixel_mask = index < conv_pixels
    pixel = _split(index, conv_size, divisors)
    grad = _conv_gradient(grad_y_ptr, winners_ptr, pixel, pixel_mask, channel, out_mask, out_size, CHANNELS, GEOMETRY,
                          COMPUTE)  # fmt: skip
    offset = _offset(pixel, channel, conv_size, CHANNELS, True)
    mask = pixel_mask[:, None] & out_mask[None, :]
    tl.store(grad_conv_ptr + offset, grad.to(grad_conv_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["in_pixels"])
def conv_input_gradient(
    grad_y_ptr, winners_ptr, w_ptr, grad_x_ptr, in_pixels, in_size, conv_size, out_size, divisors,
    CHANNELS: tl.constexpr, GEOMETRY: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_K: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_y and winners (images, GROUPS * OUT, *out_size), channels last -> grad_x (images, GROUPS * IN, *in_size), a
    program BLOCK_PIXELS pixels by BLOCK_K channels. The gradient of the convolution's output is rebuilt from the
    winners tap by tap and never written. LAYOUT: of grad_x and the weight."""
    TAPS: tl.constexpr = GEOMETRY[KERNEL][0] * GEOMETRY[KERNEL][1] * GEOMETRY[KERNEL][2]
    blocks: tl.constexpr = (CHANNELS[IN] + BLOCK_K - 1) // BLOCK_K
    group = tl.program_id(1) // blocks
    channel_in = tl.program_id(1) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    in_mask = channel_in < CHANNELS[IN]
    index = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    pixel_mask = index < in_pixels
    image, d, h, w = _split(index, in_size, divisors)
    sums = tl.zeros([BLOCK_PIXELS, BLOCK_K], tl.float32)
    CHUNKS: tl.constexpr = (CHANNELS[OUT] + BLOCK_OUT - 1) // BLOCK_OUT
    for step in range(TAPS * CHUNKS):
        tap = step // CHUNKS
        channel_out = step % CHUNKS * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        out_mask = channel_out < CHANNELS[OUT]
        channel_out += group * CHANNELS[OUT]
        tap_d, tap_h, tap_w = _from_first(tap, GEOMETRY, KERNEL, DILATION)
        from_d = d + GEOMETRY[PADDING][0] - tap_d
        from_h = h + GEOMETRY[PADDING][1] - tap_h
        from_w = w + GEOMETRY[PADDING][2] - tap_w
        conv_d, conv_h, conv_w = (
            from_d // GEOMETRY[STRIDE][0], from_h // GEOMETRY[STRIDE][1], from_w // GEOMETRY[STRIDE][2]
        )  # fmt: skip
        exists = pixel_mask & (from_d >= 0) & (from_h >= 0) & (from_w >= 0)
        exists = exists & (conv_d * GEOMETRY[STRIDE][0] == from_d) & (conv_h * GEOMETRY[STRIDE][1] == from_h)
        exists = exists & (conv_w * GEOMETRY[STRIDE][2] == from_w) & _inside(conv_d, conv_h, conv_w, conv_size)
        grad = _conv_gradient(grad_y_ptr, winners_ptr, (image, conv_d, conv_h, conv_w), exists, channel_out, out_mask,
                              out_size, CHANNELS[GROUPS] * CHANNELS[OUT], GEOMETRY, tl.float32)  # fmt: skip
        column = _weight_offset(tap, channel_in, CHANNELS, GEOMETRY, LAYOUT[W_LAST])
        k = tl.load(w_ptr + channel_out[:, None] * (CHANNELS[IN] * TAPS) + column[None, :],
                    mask=out_mask[:, None] & in_mask[None, :], other=0.0)  # fmt: skip
        grad = grad.to(grad_y_ptr.dtype.element_ty).to(OPERAND)
        sums = tl.dot(grad, k.to(OPERAND), sums, input_precision=PRECISION)
    channel_in += group * CHANNELS[IN]
    offset = _offset((image, d, h, w), channel_in, in_size, CHANNELS[GROUPS] * CHANNELS[IN], LAYOUT[X_LAST])
    mask = pixel_mask[:, None] & in_mask[None, :]
    tl.store(grad_x_ptr + offset, sums.to(grad_x_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["pooled_pixels"])
def conv_weight_gradient(
    grad_y_ptr, winners_ptr, x_ptr, w_parts_ptr, bias_parts_ptr, pooled_pixels, in_size, conv_size, out_size,
    divisors, CHANNELS: tl.constexpr, GEOMETRY: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_K: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_y and winners (images, GROUPS * OUT, *out_size), channels last, x (images, GROUPS * IN, *in_size) -> w_parts
    (parts, GROUPS * OUT, IN, taps), and bias_parts (parts, GROUPS * OUT), unless that is None.

    Program (part, group and block of out channels, step) adds up its share of the tiles of pooled pixels: each window
    has one pixel of the convolution that has a gradient, at its winner's place.
    """
    TAPS: tl.constexpr = GEOMETRY[KERNEL][0] * GEOMETRY[KERNEL][1] * GEOMETRY[KERNEL][2]
    blocks: tl.constexpr = (CHANNELS[OUT] + BLOCK_OUT - 1) // BLOCK_OUT
    group = tl.program_id(1) // blocks
    channel_out = tl.program_id(1) % blocks * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    out_mask = channel_out < CHANNELS[OUT]
    channel_out += group * CHANNELS[OUT]
    tap, channel, exists = _step(tl.program_id(2), CHANNELS, GEOMETRY, LAYOUT, BLOCK_K)
    sums = tl.zeros([BLOCK_OUT, BLOCK_K], tl.float32)
    bias_sums = tl.zeros([BLOCK_OUT], tl.float32)
    PLACES: tl.constexpr = GEOMETRY[POOL][0] * GEOMETRY[POOL][1] * GEOMETRY[POOL][2]
    tiles_each = tl.cdiv(tl.cdiv(pooled_pixels, BLOCK_PIXELS), tl.num_programs(0))
    for tile in range(tl.program_id(0) * tiles_each, (tl.program_id(0) + 1) * tiles_each):
        index = tile * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
        pixel_mask = index < pooled_pixels
        image, d, h, w = _split(index, out_size, divisors)
        window = _window_start(d, h, w, GEOMETRY)
        first = _first_patch(image, window, group, in_size, CHANNELS, GEOMETRY, LAYOUT)
        offset = tl.trans(_offset((image, d, h, w), channel_out, out_size, CHANNELS[GROUPS] * CHANNELS[OUT], True))
        both = out_mask[:, None] & pixel_mask[None, :]
        winner = tl.load(winners_ptr + offset, mask=both, other=DEAD).to(tl.int32)
        grad = tl.load(grad_y_ptr + offset, mask=both, other=0.0).to(OPERAND)
        for place in range(PLACES):
            _, _, _, inside = _window_place(place, window, conv_size, GEOMETRY)
            x = _load_patch(x_ptr, first, place, inside & pixel_mask, (tap, channel, exists), in_size, CHANNELS,
                            GEOMETRY, LAYOUT)  # fmt: skip
            won = tl.where(winner == place, grad, 0.0).to(OPERAND)
            sums = tl.dot(won, x.to(OPERAND), sums, input_precision=PRECISION)
        bias_sums += tl.sum(tl.where(winner < PLACES, grad.to(tl.float32), 0.0), 1)
    row = tl.program_id(0).to(tl.int64) * (CHANNELS[GROUPS] * CHANNELS[OUT]) + channel_out
    column = _weight_offset(tap, channel, CHANNELS, GEOMETRY, False)
    tl.store(w_parts_ptr + row[:, None] * (CHANNELS[IN] * TAPS) + column[None, :], sums,
             mask=out_mask[:, None] & exists[None, :])  # fmt: skip
    if bias_parts_ptr is not None:  # noqa: SIM102 (this is known at compile time, the next is not)
        if tl.program_id(2) == 0:
            tl.store(bias_parts_ptr + row, bias_sums, mask=out_mask)
