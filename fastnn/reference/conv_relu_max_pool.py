"""What ``conv_relu_max_pool`` means, in plain PyTorch."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
POOL: dict[int, Any] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


class Geometry(NamedTuple):
    """What a call has besides its tensors, one value a dimension."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    pool_kernel_size: Sequence[int]
    pool_stride: Sequence[int]
    pool_padding: Sequence[int]
    pool_dilation: Sequence[int]
    ceil_mode: bool

    def flat(self) -> tuple[int, ...]:
        """As the operators take it: the sequences, one after another, then groups and ceil_mode."""
        stride, padding, dilation, groups, *pool, ceil_mode = self
        return (*stride, *padding, *dilation, *(value for values in pool for value in values), groups, int(ceil_mode))

    @classmethod
    def of_flat(cls, flat: Sequence[int], dims: int) -> "Geometry":
        if len(flat) != 7 * dims + 2:
            raise RuntimeError(f"expected geometry to have {7 * dims + 2} values, got {len(flat)}")
        stride, padding, dilation, *pool = (flat[i * dims : (i + 1) * dims] for i in range(7))
        fields: tuple[Any, ...] = (stride, padding, dilation, flat[-2], *pool, bool(flat[-1]))
        return cls._make(fields)


def conv_relu_max_pool(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int,
    pool_kernel_size: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
    pool_dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    """``max_pool(relu(conv(input, weight, bias)))``, in as many dimensions as ``stride`` has values.

    input (batch, in_channels, ...) or (in_channels, ...), weight (out_channels, in_channels / groups, ...), bias
    (out_channels) -> (batch, out_channels, ...).
    """
    dims = len(stride)
    activated = F.relu(CONV[dims](input, weight, bias, stride, padding, dilation, groups))
    return max_pool(activated, pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode)


def max_pool(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    """``torch.nn.functional.max_pool{1,2,3}d``, safe to differentiate.

    Stock's backward writes outside its memory where a window holds nothing but padding. Such windows get their
    padding as values here.
    """
    pool = POOL[len(kernel_size)]
    sizes = input.shape[-len(kernel_size) :]
    geometry = list(zip(sizes, kernel_size, stride, padding, dilation, strict=False))
    valid = all(min(k, s, d) > 0 and 0 <= p <= k // 2 for _, k, s, p, d in geometry)
    valid = valid and all(pooled_size(*g, ceil_mode) > 0 for g in geometry)
    if not valid or not any(_has_empty_window(*g, ceil_mode) for g in geometry):
        return pool(input, kernel_size, stride, padding, dilation, ceil_mode)
    pads: list[int] = []
    for size, k, s, p, d in reversed(geometry):
        past = (pooled_size(size, k, s, p, d, ceil_mode) - 1) * s - p + (k - 1) * d + 1
        pads += [p, max(past - size, 0)]
    padded = F.pad(input, pads, value=float("-inf"))
    pooled = pool(padded, kernel_size, stride, 0, dilation)
    for dim, (size, k, s, p, d) in enumerate(geometry, start=-len(geometry)):
        pooled = pooled.narrow(dim, 0, pooled_size(size, k, s, p, d, ceil_mode))
    return pooled


def pooled_size(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """How many windows ``max_pool`` has along a dimension of ``size`` elements."""
    room = size + 2 * padding - dilation * (kernel - 1) - 1 + (stride - 1 if ceil_mode else 0)
    windows = room // stride + 1
    # With ceil_mode the last window must still begin inside the input or its left padding.
    return windows - 1 if ceil_mode and (windows - 1) * stride >= size + padding else windows


def _has_empty_window(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> bool:
    for window in range(pooled_size(size, kernel, stride, padding, dilation, ceil_mode)):
        first = window * stride - padding
        first += max(0, -(first // dilation)) * dilation if first < 0 else 0
        if first >= size or first > window * stride - padding + (kernel - 1) * dilation:
            return True
    return False
