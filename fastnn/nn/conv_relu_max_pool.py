"""Layers that are a convolution, a ReLU and a max-pool in one."""

from typing import Any, Literal

import torch.nn
import torch.nn.functional as F
from torch import Tensor

from fastnn._torch import ConvNd, size_1_t, size_2_t, size_3_t
from fastnn.ops.conv_relu_max_pool import (
    conv_relu_max_pool,
    conv_relu_max_pool1d,
    conv_relu_max_pool2d,
    conv_relu_max_pool3d,
    flat_geometry,
)

_PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


_FUNCTIONS = {1: conv_relu_max_pool1d, 2: conv_relu_max_pool2d, 3: conv_relu_max_pool3d}
_GEOMETRY = (
    *("stride", "padding", "dilation", "groups"),
    *("pool_kernel_size", "pool_stride", "pool_padding", "pool_dilation", "ceil_mode"),
)


class _ConvReLUMaxPool(ConvNd):
    """The base class of the three layers, with the attributes of the pooling and the forward pass."""

    pool_kernel_size: Any
    pool_stride: Any
    pool_padding: Any
    pool_dilation: Any
    ceil_mode: bool
    _geometry: tuple[int, ...] | None  # the operators' argument; None where only a call's sizes decide it

    def _set_pool(self, kernel_size: Any, stride: Any | None, padding: Any, dilation: Any, ceil_mode: bool) -> None:
        self.pool_kernel_size = kernel_size
        self.pool_stride = kernel_size if stride is None else stride
        self.pool_padding = padding
        self.pool_dilation = dilation
        self.ceil_mode = ceil_mode

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _GEOMETRY and "ceil_mode" in self.__dict__:
            self._geometry = self._flat_geometry()

    def _flat_geometry(self) -> tuple[int, ...] | None:
        if isinstance(self.padding, str) or self.padding_mode != "zeros":
            return None
        return flat_geometry(len(self.kernel_size), *(getattr(self, name) for name in _GEOMETRY))

    def forward(self, input: Tensor) -> Tensor:
        try:
            # This takes a third of the time of `self.weight`, which Python finds only after the ordinary look-up.
            parameters = self._parameters
            weight: Any = parameters["weight"]
            bias: Any = parameters["bias"]
        except KeyError:  # a parametrization has replaced one of them
            weight, bias = self.weight, self.bias
        if self._geometry is not None:
            return conv_relu_max_pool(input, weight, bias, self._geometry, len(self.kernel_size))
        geometry = {name: getattr(self, name) for name in _GEOMETRY}
        if self.padding_mode != "zeros":
            # As in torch.nn's own layers, PyTorch's kernels pad the input first.
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            geometry["padding"] = 0
        return _FUNCTIONS[len(self.kernel_size)](input, weight, bias, **geometry)

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, pool_kernel_size={self.pool_kernel_size}, pool_stride={self.pool_stride}"
        if self.pool_padding != 0:
            text += f", pool_padding={self.pool_padding}"
        if self.pool_dilation != 1:
            text += f", pool_dilation={self.pool_dilation}"
        return text + (f", ceil_mode={self.ceil_mode}" if self.ceil_mode else "")


class ConvReLUMaxPool1d(_ConvReLUMaxPool, torch.nn.Conv1d):
    """``torch.nn.Conv1d``, ReLU and ``torch.nn.MaxPool1d`` in one layer, with Conv1d's parameters and state dict.

    The arguments are Conv1d's, and MaxPool1d's with ``pool_`` in front.
    input (batch, in_channels, length) or without batch -> (batch, out_channels, pooled length).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: size_1_t,
        stride: size_1_t = 1,
        padding: str | size_1_t = 0,
        dilation: size_1_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: _PaddingMode = "zeros",
        *,
        pool_kernel_size: size_1_t = 2,
        pool_stride: size_1_t | None = None,
        pool_padding: size_1_t = 0,
        pool_dilation: size_1_t = 1,
        ceil_mode: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        torch.nn.Conv1d.__init__(
            self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            device, dtype,
        )  # fmt: skip
        self._set_pool(pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode)


class ConvReLUMaxPool2d(_ConvReLUMaxPool, torch.nn.Conv2d):
    """``torch.nn.Conv2d``, ReLU and ``torch.nn.MaxPool2d`` in one layer, with Conv2d's parameters and state dict.

    The arguments are Conv2d's, and MaxPool2d's with ``pool_`` in front.
    input (batch, in_channels, height, width) or without batch -> (batch, out_channels, pooled height, pooled width).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: size_2_t,
        stride: size_2_t = 1,
        padding: str | size_2_t = 0,
        dilation: size_2_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: _PaddingMode = "zeros",
        *,
        pool_kernel_size: size_2_t = 2,
        pool_stride: size_2_t | None = None,
        pool_padding: size_2_t = 0,
        pool_dilation: size_2_t = 1,
        ceil_mode: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        torch.nn.Conv2d.__init__(
            self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            device, dtype,
        )  # fmt: skip
        self._set_pool(pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode)


class ConvReLUMaxPool3d(_ConvReLUMaxPool, torch.nn.Conv3d):
    """``torch.nn.Conv3d``, ReLU and ``torch.nn.MaxPool3d`` in one layer, with Conv3d's parameters and state dict.

    The arguments are Conv3d's, and MaxPool3d's with ``pool_`` in front.
    input (batch, in_channels, depth, height, width) or without batch
    -> (batch, out_channels, pooled depth, pooled height, pooled width).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: size_3_t,
        stride: size_3_t = 1,
        padding: str | size_3_t = 0,
        dilation: size_3_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: _PaddingMode = "zeros",
        *,
        pool_kernel_size: size_3_t = 2,
        pool_stride: size_3_t | None = None,
        pool_padding: size_3_t = 0,
        pool_dilation: size_3_t = 1,
        ceil_mode: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        torch.nn.Conv3d.__init__(
            self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            device, dtype,
        )  # fmt: skip
        self._set_pool(pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode)
