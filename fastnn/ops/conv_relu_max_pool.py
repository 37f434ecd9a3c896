"""Convolution, ReLU and max-pool in one operator: the public functions, the gradients and the shapes for tracing."""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnn._extension import load_extension
from fastnn._torch import direct_call, onednn_dtypes, suggest_memory_format
from fastnn.ops._autograd import (
    autocast,
    call_kernel,
    check_same_device,
    differentiate_twice,
    eager_recorder,
    gradients_by_reference,
    in_torchs_words,
    is_plain,
    needs_autograd,
    needs_reference,
    recorder,
    wants_gradient,
    wants_graph,
)
from fastnn.ops._raw_operator import raw_operator
from fastnn.reference import conv_relu_max_pool as reference
from fastnn.reference.conv_relu_max_pool import Geometry

# In three dimensions, only the convolutions that torch leaves to oneDNN keep channels last.
_CHANNELS_LAST_3D = onednn_dtypes()
load_extension().set_onednn_dtypes(torch.float32 in _CHANNELS_LAST_3D, torch.bfloat16 in _CHANNELS_LAST_3D)

MOST_PLACES: int = load_extension().most_places  # the most elements of a window, whose argmax is saved in one byte

_op = torch.ops.fastnn.conv_relu_max_pool.default
_call = direct_call(_op)
_with_winners_op = torch.ops.fastnn.conv_relu_max_pool_with_winners.default
_with_winners_call = direct_call(_with_winners_op)
_backward_op = torch.ops.fastnn.conv_relu_max_pool_backward.default

Size = int | Sequence[int]
FlatGeometry = tuple[int, ...]


def conv_relu_max_pool1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    pool_kernel_size: Size = 2,
    pool_stride: Size | None = None,
    pool_padding: Size = 0,
    pool_dilation: Size = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """``max_pool1d(relu(conv1d(input, weight, bias)))`` without the convolution's output in memory.

    Args:
        input: (batch, in_channels, length) or (in_channels, length), float32, float64 or bfloat16; other dtypes take
            PyTorch's own path.
        weight: (out_channels, in_channels / groups, kernel length).
        bias: (out_channels) or None.
        stride, padding, dilation, groups: as ``torch.nn.functional.conv1d`` has them.
        pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode: as ``torch.nn.functional.max_pool1d``
            has them; ``pool_stride`` is ``pool_kernel_size`` unless given.

    Returns:
        (batch, out_channels, pooled length), or the same without batch.

    Raises:
        RuntimeError: the error that PyTorch's convolution or pooling raises for these arguments.
    """
    return _conv_relu_max_pool(
        1, input, weight, bias, stride, padding, dilation, groups,
        pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode,
    )  # fmt: skip


def conv_relu_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    pool_kernel_size: Size = 2,
    pool_stride: Size | None = None,
    pool_padding: Size = 0,
    pool_dilation: Size = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """``max_pool2d(relu(conv2d(input, weight, bias)))`` without the convolution's output in memory.

    input (batch, in_channels, height, width) or without batch, weight (out_channels, in_channels / groups, kernel
    height, kernel width) -> (batch, out_channels, pooled height, pooled width); channels_last if input or weight is.
    The other arguments are those of :func:`conv_relu_max_pool1d`, each one number or one number per dimension.
    """
    return _conv_relu_max_pool(
        2, input, weight, bias, stride, padding, dilation, groups,
        pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode,
    )  # fmt: skip


def conv_relu_max_pool3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    pool_kernel_size: Size = 2,
    pool_stride: Size | None = None,
    pool_padding: Size = 0,
    pool_dilation: Size = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """``max_pool3d(relu(conv3d(input, weight, bias)))`` without the convolution's output in memory.

    input (batch, in_channels, depth, height, width) or without batch, weight (out_channels, in_channels / groups,
    kernel depth, kernel height, kernel width) -> (batch, out_channels, pooled depth, pooled height, pooled width);
    channels_last_3d if input or weight is. The other arguments are those of :func:`conv_relu_max_pool1d`, each one
    number or one number per dimension.
    """
    return _conv_relu_max_pool(
        3, input, weight, bias, stride, padding, dilation, groups,
        pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode,
    )  # fmt: skip


def _conv_relu_max_pool(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
    pool_kernel_size: Size,
    pool_stride: Size | None,
    pool_padding: Size,
    pool_dilation: Size,
    ceil_mode: bool,
) -> Tensor:
    if isinstance(padding, str):
        _check_rank(input, dims)
        input, padding = _named_padding(padding, dims, input, weight, stride, dilation)
    geometry = flat_geometry(
        dims, stride, padding, dilation, groups, pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode
    )
    if geometry is None:  # PyTorch raises its own error
        activated = F.relu(reference.CONV[dims](input, weight, bias, stride, padding, dilation, groups))
        return reference.POOL[dims](activated, pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode)
    return conv_relu_max_pool(input, weight, bias, geometry, dims)


def conv_relu_max_pool(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: FlatGeometry, dims: int) -> Tensor:
    """What the function of ``dims`` dimensions computes, for callers that have the :func:`flat_geometry` already."""
    batched = input.dim() == dims + 2
    if not batched:
        _check_rank(input, dims)
        input = input.unsqueeze(0)
    try:
        if not is_plain(input):
            input, weight, bias = autocast(input, weight, bias)
            output = _not_plain(input, weight, bias, geometry, dims)
        elif wants_gradient(input, weight, bias):
            output = _differentiable(_record_plain, input, weight, bias, geometry, dims)
        else:
            output = _call(input, weight, bias, geometry)
    except NotImplementedError:  # only PyTorch computes with such tensors, DTensor for example
        output = reference.conv_relu_max_pool(input, weight, bias, *Geometry.of_flat(geometry, dims))
    except RuntimeError as error:
        if len({tensor.dtype for tensor in (input, weight, bias) if tensor is not None}) == 1:
            raise  # the reference is not called, since it would try to compute with sizes that are too large
        arguments = (input, weight, bias, *Geometry.of_flat(geometry, dims))
        raise in_torchs_words(error, reference.conv_relu_max_pool, *arguments) from None
    return output if batched else output.squeeze(0).contiguous()


def _not_plain(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: FlatGeometry, dims: int) -> Tensor:
    """Computes a call whose input is not plain (:func:`is_plain`), after autocast has cast the tensors."""
    if needs_reference(input):
        return reference.conv_relu_max_pool(input, weight, bias, *Geometry.of_flat(geometry, dims))
    if needs_autograd(input, weight, bias):
        return _differentiable(_record, input, weight, bias, geometry, dims)
    return call_kernel(_op, input, weight, bias, geometry)


def _differentiable(
    record: Callable[..., tuple[Tensor, ...]],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: FlatGeometry,
    dims: int,
) -> Tensor:
    if math.prod(geometry[3 * dims : 4 * dims]) > MOST_PLACES:
        return reference.conv_relu_max_pool(input, weight, bias, *Geometry.of_flat(geometry, dims))
    return record(input, weight, bias, geometry)[0]


def _check_rank(input: Tensor, dims: int) -> None:
    if not dims < input.dim() < dims + 3:
        raise RuntimeError(
            f"Expected {dims + 1}D (unbatched) or {dims + 2}D (batched) input to conv{dims}d, but got input of size: "
            f"{list(input.shape)}"
        )


# The geometries of earlier calls: finding one takes half of the time of building it again. Calls with tuples are not
# stored, because (2.0, 2.0), which must raise, would find the entry of (2, 2).
_geometry_of_numbers: dict[Any, FlatGeometry] = {}
_TYPES_OF_NUMBERS = (*(int,) * 9, bool)


def flat_geometry(
    dims: int,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
    pool_kernel_size: Size,
    pool_stride: Size | None,
    pool_padding: Size,
    pool_dilation: Size,
    ceil_mode: bool,
) -> FlatGeometry | None:
    """The public functions' arguments in one flat tuple, as the operators take them (:meth:`Geometry.flat`). None where
    an argument has neither one number nor one number per dimension."""
    if pool_stride is None or (isinstance(pool_stride, Sequence) and not pool_stride):  # PyTorch takes () for None
        pool_stride = pool_kernel_size
    sizes = (stride, padding, dilation, pool_kernel_size, pool_stride, pool_padding, pool_dilation)
    call: Any = (*sizes, groups, dims, bool(ceil_mode))
    numbers = tuple(map(type, call)) == _TYPES_OF_NUMBERS
    if numbers and (known := _geometry_of_numbers.get(call)):
        return known
    flat: list[int] = []
    for value, count in (*((size, dims) for size in sizes), (groups, 1)):
        values = _numbers(value, count)
        if values is None:
            return None
        flat += values
    geometry = (*flat, int(bool(ceil_mode)))
    if numbers:
        _geometry_of_numbers[call] = geometry
    return geometry


def _numbers(value: Any, count: int) -> list[int] | None:
    """``value``, one integer or ``count`` of them, as ``count`` ints; None where PyTorch would not take it."""
    values = value if isinstance(value, (list, tuple)) else (value,)
    if len(values) not in (1, count) or bool in map(type, values):
        return None
    try:
        numbers = [operator.index(v) for v in values]
    except TypeError:
        return None
    return numbers if len(numbers) == count else numbers * count


def same_padding(kernel: Sequence[int], dilation: Sequence[int]) -> tuple[list[int], list[int]]:
    """What the padding "same" means in each dimension: how many elements on both sides, and how many more behind."""
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=False)]
    return [t // 2 for t in total], [t % 2 for t in total]


def pad_of_ends(ends: Sequence[int]) -> list[int]:
    """The argument of ``F.pad`` that adds so many elements behind each of the last dimensions."""
    return [side for end in reversed(ends) for side in (0, end)]


def _named_padding(
    name: str, dims: int, input: Tensor, weight: Tensor, stride: Size, dilation: Size
) -> tuple[Tensor, list[int] | str]:
    """Turns a padding's name into numbers -> the input and the padding. Where "same" pads one side more than the other,
    the returned input already has the additional padding. The padding stays a name where PyTorch rejects the other
    arguments."""
    if name == "valid":
        return input, [0] * dims
    if name != "same":
        raise RuntimeError(f"Invalid padding string: '{name}'")
    strides, dilations = _numbers(stride, dims), _numbers(dilation, dims)
    if strides is None or dilations is None:
        return input, name
    if any(s != 1 for s in strides):
        raise RuntimeError("padding='same' is not supported for strided convolutions")
    both, ends = same_padding(weight.shape[2:], dilations)
    return (F.pad(input, pad_of_ends(ends)) if any(ends) else input), both


class ConvReluMaxPool(torch.autograd.Function):
    """``fastnn::conv_relu_max_pool_with_winners`` with its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: FlatGeometry) -> tuple[Tensor, Tensor]:
        return _with_winners_op(input, weight, bias, geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, weight, bias, ctx.geometry = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(input, weight, bias, output[1])

    @staticmethod
    def record(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: FlatGeometry) -> tuple[Tensor]:
        output, winners = _with_winners_call(input, weight, bias, geometry)
        ctx.geometry = geometry
        ctx.save_for_backward(input, weight, bias, winners)
        return (output,)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Any, ...]:
        input, weight, bias, winners = ctx.saved_tensors
        if wants_graph():
            needed = [*ctx.needs_input_grad[:2], bias is not None and ctx.needs_input_grad[2]]
            both = (input, weight, bias)
            by_reference = functools.partial(_by_reference, ctx.geometry)
            return (*gradients_by_reference(by_reference, both, needed, [grad_output]), None)
        compute = ConvReluMaxPoolBackward.apply if torch.is_grad_enabled() else ConvReluMaxPoolBackward.forward
        wanted = ctx.needs_input_grad[:3]
        gradients = compute(grad_output, winners, input, weight, bias, ctx.geometry, wanted)
        return (*(g if w else None for g, w in zip(gradients, wanted, strict=True)), None)


def _by_reference(geometry: FlatGeometry, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return reference.conv_relu_max_pool(input, weight, bias, *Geometry.of_flat(geometry, input.dim() - 2))


_record_plain = eager_recorder(ConvReluMaxPool)
_record = recorder(ConvReluMaxPool, _record_plain, results=1)


class ConvReluMaxPoolBackward(torch.autograd.Function):
    """``fastnn::conv_relu_max_pool_backward``, differentiable through the reference."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_output: Tensor,
        winners: Tensor,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: FlatGeometry,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, ...]:
        gradients = _backward_op(grad_output, winners, input, weight, geometry, *wanted)
        return tuple(g if w else None for g, w in zip(gradients, wanted, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        grad_output, _, input, weight, bias, ctx.geometry, _ = inputs
        ctx.given = [gradient is not None for gradient in output]
        ctx.save_for_backward(grad_output, input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Any, ...]:
        grad_output, *inputs = ctx.saved_tensors
        by_reference = functools.partial(_by_reference, ctx.geometry)
        needed = ctx.needs_input_grad[2:5]
        of_grad_output, found = differentiate_twice(by_reference, grad_output, inputs, ctx.given, needed, grad_grads)
        return (of_grad_output, None, *found, None, None)


def output_sizes(input: Sequence[int], weight: Sequence[int], geometry: Sequence[int]) -> list[int]:
    """The output's sizes for an input and a weight of these sizes."""
    stride, padding, dilation, _, kernel, pool_stride, pool_padding, pool_dilation, ceil_mode = Geometry.of_flat(
        geometry, len(input) - 2
    )
    sizes = [input[0], weight[0]]
    for d in range(len(stride)):
        conv = (input[d + 2] + 2 * padding[d] - dilation[d] * (weight[d + 2] - 1) - 1) // stride[d] + 1
        sizes.append(
            reference.pooled_size(conv, kernel[d], pool_stride[d], pool_padding[d], pool_dilation[d], ceil_mode)
        )
    return sizes


def output_like(input: Tensor, weight: Tensor, geometry: Sequence[int], dtype: torch.dtype) -> Tensor:
    sizes = output_sizes(input.shape, weight.shape, geometry)
    formats = {_channels_format(input), _channels_format(weight)} - {torch.contiguous_format}
    if input.device.type == "cpu" and input.dtype not in _CHANNELS_LAST_3D and input.dim() == 5:
        formats = set()
    return input.new_empty(sizes, dtype=dtype).to(memory_format=formats.pop() if formats else torch.contiguous_format)


def _channels_format(tensor: Tensor) -> torch.memory_format:
    return suggest_memory_format(tensor) if tensor.dim() > 3 else torch.contiguous_format


@raw_operator("conv_relu_max_pool")
def _(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Sequence[int], algorithm: str | None = None
) -> Tensor:
    check_same_device(input, weight, bias)
    return output_like(input, weight, geometry, input.dtype)


@raw_operator("conv_relu_max_pool_with_winners")
def _(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Sequence[int], algorithm: str | None = None
) -> tuple[Tensor, Tensor]:
    check_same_device(input, weight, bias)
    return output_like(input, weight, geometry, input.dtype), output_like(input, weight, geometry, torch.uint8)


@raw_operator("conv_relu_max_pool_backward")
def _(
    grad_output: Tensor,
    winners: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: Sequence[int],
    input_wanted: bool,
    weight_wanted: bool,
    bias_wanted: bool,
    algorithm: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_same_device(grad_output, winners, input, weight)
    return gradients_like(input, weight, input_wanted, weight_wanted, bias_wanted)


def gradients_like(
    input: Tensor, weight: Tensor, input_wanted: bool, weight_wanted: bool, bias_wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors of the sizes and formats that the gradients of input, weight and bias have."""

    def gradient(of: Tensor, wanted: bool) -> Tensor:
        sizes = of.shape if wanted else (0, *of.shape[1:])
        return of.new_empty(sizes).to(memory_format=_channels_format(of))

    return (
        gradient(input, input_wanted),
        gradient(weight, weight_wanted),
        weight.new_empty(weight.shape[0] if bias_wanted else 0),
    )
