"""``fastnn::conv_relu_max_pool`` on a GPU: one launch where the convolution is short enough for its output to be worth
keeping on chip; else stock's convolution with ReLU, max-pool and their gradient in one launch behind or before it."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnn.kernels import _launch
from fastnn.kernels._check import check, check_same_kind, check_sizes
from fastnn.kernels._conv_geometry import (
    MOST_PLACES,
    Geometry,
    Problem,
    channels_last,
    check_problem,
    memory_format,
)
from fastnn.kernels._conv_kernels import (
    conv_forward,
    conv_input_gradient,
    conv_weight_gradient,
    pool_forward,
    spread_gradient,
)

# ---- choice of kernel and configuration -------------------------------------------------------------------


class Config(NamedTuple):
    block_pixels: int
    block_out: int
    block_k: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        """As the kernels and the launch take them."""
        return {
            "BLOCK_PIXELS": self.block_pixels,
            "BLOCK_OUT": self.block_out,
            "BLOCK_K": self.block_k,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


# The sum's length up to which what the fused kernel saves, about 14 bytes of traffic a 16-bit value of the
# convolution, outweighs a GEMM at half of cuDNN's speed (a quarter without matrix units).
_DEEPEST_FUSED = {"forward": 1300, "backward": 300}
_DEEPEST_WITHOUT_MATRIX_UNITS = {"forward": 220, "backward": 60}
_LAUNCH_BOUND_WORK = 100e6
_FEW_CHANNELS = 16


def is_fused(problem: Problem, direction: str, precision: str, target: _launch.Target) -> bool:
    """Whether the convolution is computed here; else by stock's kernel. ``direction``: "forward" or "backward"."""
    if problem.kind.dtype is torch.float64:
        return False
    if problem.groups > 1 and min(problem.channels, problem.out_channels) < _FEW_CHANNELS:
        return False  # tiles would stay empty
    fast = _launch.uses_matrix_units(problem.kind.dtype, precision, target)
    deepest = (_DEEPEST_FUSED if fast else _DEEPEST_WITHOUT_MATRIX_UNITS)[direction]
    repeated = max(problem.recomputed, 1.0)
    if direction == "backward":
        # The input's gradient visits every tap, also those that a stride leaves out.
        repeated = max(repeated, math.prod(problem.geometry[1]))
    return problem.depth * (2 * repeated - 1) <= deepest or problem.work * repeated <= _LAUNCH_BOUND_WORK


def is_tap_by_tap(problem: Problem) -> bool:
    return problem.channels >= _FEW_CHANNELS


def conv_config(problem: Problem, precision: str, target: _launch.Target) -> Config:
    """The fused kernels' tiles, as large as registers hold without spilling (tools/gpu_check.py)."""
    wide = problem.kind.dtype.itemsize == 2
    fast = _launch.uses_matrix_units(problem.kind.dtype, precision, target)
    block_out = min(64, _launch.padded(problem.out_channels))
    if is_tap_by_tap(problem):
        most, block_k = (128 if wide else 64), min(64 if wide else 32, _launch.padded(problem.channels))
    else:  # every element of a step has a place of its own, and places fill registers
        most, block_k = 64, min(32 if wide else 16, _launch.padded(problem.depth))
    pixels = problem.images * math.prod(problem.out_size)
    block_pixels = min(most if fast else 32, _launch.padded(triton.cdiv(pixels, target.processors)))
    num_warps = 8 if block_pixels * block_out * problem.kind.dtype.itemsize >= 8192 else 4
    return Config(block_pixels, block_out, block_k, num_warps, num_stages=3 if target.shared_memory > 65536 else 2)


# ---- forward ----------------------------------------------------------------------------------------------


def conv_relu_max_pool(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Sequence[int]) -> Tensor:
    """``fastnn::conv_relu_max_pool``: input (images, in channels, ...), weight (out channels, in channels / groups,
    ...), bias (out channels) or None, geometry as Geometry.flat gives it -> (images, out channels, ...)."""
    return _forward("conv_relu_max_pool", input, weight, bias, geometry, False)[0]


def conv_relu_max_pool_with_winners(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Sequence[int]
) -> tuple[Tensor, Tensor | None]:
    """``fastnn::conv_relu_max_pool_with_winners``: the output, and each window's winner by its place, uint8."""
    return _forward("conv_relu_max_pool_with_winners", input, weight, bias, geometry, True)


def _forward(
    op: str, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Sequence[int], with_winners: bool
) -> tuple[Tensor, Tensor | None]:
    arguments = Geometry.of_flat(geometry, input.dim() - 2)
    problem = check_problem(op, input, weight, bias, arguments)
    check(not with_winners or problem.places <= MOST_PLACES, op, ": a winner's place is one byte, so a window may have "
          "at most ", MOST_PLACES, " elements, got ", problem.places)  # fmt: skip
    format = memory_format(input, weight)
    output = torch.empty(problem.sizes(problem.out_size), dtype=input.dtype, device=input.device, memory_format=format)
    winners = torch.empty_like(output, dtype=torch.uint8) if with_winners else None
    if output.numel() > 0:
        target = _launch.target_of(input.device)
        precision = _launch.dot_precision(input.dtype, "conv", target)
        if is_fused(problem, "forward", precision, target):
            _run_fused(problem, input, weight, bias, output, winners, precision, target)
        else:
            _run_stock(problem, input, weight, bias, arguments, output, winners)
    return output, winners


def _is_last(tensor: Tensor) -> bool:
    return memory_format(tensor) is not torch.contiguous_format


def _steps(problem: Problem, config: Config) -> int:
    if is_tap_by_tap(problem):
        return problem.taps * triton.cdiv(problem.channels, config.block_k)
    return triton.cdiv(problem.depth, config.block_k)


def _kernel_input(problem: Problem, input: Tensor) -> tuple[Tensor, bool]:
    """The input dense, and whether channels last, as a sum tap by tap needs it. (1-d tensors have no such format: they
    get one as images of height 1.)"""
    if not is_tap_by_tap(problem):
        return input.contiguous(memory_format=memory_format(input)), _is_last(input)
    if problem.dims == 1:
        return input.unsqueeze(2).contiguous(memory_format=torch.channels_last), True
    return input.contiguous(memory_format=channels_last(problem.dims)), True


def _kernel_weight(problem: Problem, weight: Tensor) -> Tensor:
    """The weight as (out, taps, channels) where the sum runs tap by tap, else (out, channels, taps)."""
    if not is_tap_by_tap(problem):
        return weight.contiguous()
    return weight.flatten(2).transpose(1, 2).contiguous()


def _shape_constexprs(problem: Problem) -> dict[str, Any]:
    return {
        "GROUPS": problem.groups,
        "CHANNELS": problem.channels,
        "OUT_CHANNELS": problem.out_channels,
        "GEOMETRY": problem.geometry,
        "TAP_BY_TAP": is_tap_by_tap(problem),
        "OPERAND": _launch.operand_dtype(problem.kind.dtype),
    }


def _run_fused(
    problem: Problem, input: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor, winners: Tensor | None,
    precision: str, target: _launch.Target,
) -> None:  # fmt: skip
    config = conv_config(problem, precision, target)
    dense_input, in_last = _kernel_input(problem, input)
    pixels = problem.images * math.prod(problem.out_size)
    _launch.launch(
        conv_forward,
        (
            triton.cdiv(pixels, config.block_pixels),
            problem.groups * triton.cdiv(problem.out_channels, config.block_out),
        ),
        input.device,
        *(dense_input, _kernel_weight(problem, weight), None if bias is None else bias.contiguous(), output, winners),
        *(pixels, problem.in_size, problem.conv_size, problem.out_size),
        IN_LAST=in_last,
        OUT_LAST=_is_last(output),
        STEPS=_steps(problem, config),
        PRECISION=precision,
        **_shape_constexprs(problem),
        **config.options(),
    )


def _pool_options(problem: Problem, last: bool) -> dict[str, Any]:
    """Tiles as long as the memory is contiguous."""
    channels = problem.groups * problem.out_channels
    block_out = min(64, triton.next_power_of_2(channels)) if last else 1
    return {
        "OUT_CHANNELS": channels,
        "GEOMETRY": problem.geometry,
        "BLOCK_PIXELS": max(1024 // block_out, 16),
        "BLOCK_OUT": block_out,
        "COMPUTE": tl.float64 if problem.kind.dtype is torch.float64 else tl.float32,
        "num_warps": 4,
        "num_stages": 1,
    }


def _tiles(pixels: int, options: dict[str, Any]) -> tuple[int, int]:
    return triton.cdiv(pixels, options["BLOCK_PIXELS"]), triton.cdiv(options["OUT_CHANNELS"], options["BLOCK_OUT"])


def _run_stock(
    problem: Problem, input: Tensor, weight: Tensor, bias: Tensor | None, arguments: Geometry, output: Tensor,
    winners: Tensor | None,
) -> None:  # fmt: skip
    with _launch.without_autocast(input.device):
        conv = torch.convolution(
            input, weight, bias, arguments.stride, arguments.padding, arguments.dilation, False, [0] * problem.dims,
            arguments.groups,
        )  # fmt: skip
    pixels = problem.images * math.prod(problem.out_size)
    options = _pool_options(problem, _is_last(output))
    _launch.launch(
        pool_forward,
        _tiles(pixels, options),
        input.device,
        *(conv.contiguous(memory_format=memory_format(output)), output, winners, pixels),
        *(problem.conv_size, problem.out_size),
        LAST=_is_last(output),
        **options,
    )


# ---- backward ---------------------------------------------------------------------------------------------


def conv_relu_max_pool_backward(
    grad_output: Tensor,
    winners: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: Sequence[int],
    input_wanted: bool,
    weight_wanted: bool,
    bias_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``fastnn::conv_relu_max_pool_backward``: the gradients of input, weight and bias; one that is not wanted comes
    back empty."""
    op = "conv_relu_max_pool_backward"
    arguments = Geometry.of_flat(geometry, input.dim() - 2)
    problem = check_problem(op, input, weight, None, arguments)
    check(problem.places <= MOST_PLACES, op, ": a window may have at most ", MOST_PLACES, " elements")
    check_same_kind(problem.kind, grad_output, "grad_output")
    check_sizes(op, grad_output, problem.sizes(problem.out_size), "grad_output")
    check_same_kind(problem.kind, winners, "winners", torch.uint8)
    check_sizes(op, winners, problem.sizes(problem.out_size), "winners")
    wanted = (input_wanted, weight_wanted, bias_wanted)
    if problem.images == 0:
        gradients: Sequence[Tensor | None] = (input.new_empty(input.shape), torch.zeros_like(weight),
                                              weight.new_zeros(weight.shape[0]))  # fmt: skip
    else:
        target = _launch.target_of(input.device)
        precision = _launch.dot_precision(input.dtype, "conv", target)
        # With a pooled volume's channels last, tiles of channels are read whole.
        grad_output, winners = _pooled_last(problem, grad_output), _pooled_last(problem, winners)
        run = _fused_gradients if is_fused(problem, "backward", precision, target) else _stock_gradients
        gradients = run(problem, grad_output, winners, input, weight, arguments, wanted, precision, target)
    like = (input, weight, weight.new_empty(weight.shape[0]))
    grad_input, grad_weight, grad_bias = (
        tensor.new_empty((0, *tensor.shape[1:])) if not is_wanted or gradient is None else gradient
        for gradient, is_wanted, tensor in zip(gradients, wanted, like, strict=True)
    )
    return (
        grad_input.contiguous(memory_format=memory_format(input)),
        grad_weight.contiguous(memory_format=memory_format(weight)),
        grad_bias,
    )


def _pooled_last(problem: Problem, tensor: Tensor) -> Tensor:
    """A pooled tensor with its channels last in memory, as images of height 1 where it is 1-d."""
    if problem.dims == 1:
        return tensor.unsqueeze(2).contiguous(memory_format=torch.channels_last)
    return tensor.contiguous(memory_format=channels_last(problem.dims))


def _stock_gradients(
    problem: Problem, grad_output: Tensor, winners: Tensor, input: Tensor, weight: Tensor, arguments: Geometry,
    wanted: Sequence[bool], *_: Any,
) -> Sequence[Tensor | None]:  # fmt: skip
    sizes = problem.sizes(problem.conv_size)
    if problem.dims == 1:
        sizes.insert(2, 1)
    grad_conv = torch.empty(sizes, dtype=input.dtype, device=input.device,
                            memory_format=channels_last(max(problem.dims, 2)))  # fmt: skip
    pixels = problem.images * math.prod(problem.conv_size)
    options = _pool_options(problem, last=True)
    _launch.launch(
        spread_gradient,
        _tiles(pixels, options),
        input.device,
        *(grad_output, winners, grad_conv, pixels, problem.conv_size, problem.out_size),
        **options,
    )
    if problem.dims == 1:
        grad_conv = grad_conv.squeeze(2)
    with _launch.without_autocast(input.device):
        return torch.ops.aten.convolution_backward(
            grad_conv, input, weight, [weight.shape[0]], arguments.stride, arguments.padding, arguments.dilation,
            False, [0] * problem.dims, arguments.groups, list(wanted),
        )  # fmt: skip


def _fused_gradients(
    problem: Problem, grad_output: Tensor, winners: Tensor, input: Tensor, weight: Tensor, arguments: Geometry,
    wanted: Sequence[bool], precision: str, target: _launch.Target,
) -> Sequence[Tensor | None]:  # fmt: skip
    input_wanted, weight_wanted, bias_wanted = wanted
    config = conv_config(problem, precision, target)
    grad_input = grad_weight = grad_bias = None
    if input_wanted:
        grad_input = _input_gradient(problem, grad_output, winners, input, weight, config, precision)
    if weight_wanted:
        grad_weight, grad_bias = _weight_gradient(
            problem, grad_output, winners, input, weight, config, precision, target, bias_wanted
        )
    elif bias_wanted:
        alive = torch.where(winners < problem.places, grad_output, 0.0)
        grad_bias = alive.flatten(2).sum((0, 2), dtype=torch.float32).to(weight.dtype)
    return grad_input, grad_weight, grad_bias


def _input_gradient(
    problem: Problem, grad_output: Tensor, winners: Tensor, input: Tensor, weight: Tensor, config: Config,
    precision: str,
) -> Tensor:  # fmt: skip
    grad_input = torch.empty_like(input, memory_format=memory_format(input))
    pixels = problem.images * math.prod(problem.in_size)
    block_k = min(64, _launch.padded(problem.channels))
    config = config._replace(block_k=block_k, block_out=min(config.block_out, 32))
    _launch.launch(
        conv_input_gradient,
        (triton.cdiv(pixels, config.block_pixels), problem.groups * triton.cdiv(problem.channels, block_k)),
        input.device,
        *(grad_output, winners, _kernel_weight(problem, weight), grad_input, pixels),
        *(problem.in_size, problem.conv_size, problem.out_size),
        IN_LAST=_is_last(grad_input),
        PRECISION=precision,
        **_shape_constexprs(problem),
        **config.options(),
    )
    return grad_input


def _weight_gradient(
    problem: Problem, grad_output: Tensor, winners: Tensor, input: Tensor, weight: Tensor, config: Config,
    precision: str, target: _launch.Target, bias_wanted: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    out_channels, steps = weight.shape[0], _steps(problem, config)
    blocks = problem.groups * triton.cdiv(problem.out_channels, config.block_out)
    config = config._replace(block_pixels=min(config.block_pixels, 64))
    pixels = problem.images * math.prod(problem.out_size)
    tiles = triton.cdiv(pixels, config.block_pixels)
    # Enough parts for two programs a processor; they are added up in a fixed order, so results repeat bit for bit.
    parts = max(1, min(tiles, triton.cdiv(2 * target.processors, blocks * steps)))
    weight_parts = weight.new_empty(parts, out_channels, problem.depth, dtype=torch.float32)
    bias_parts = weight.new_empty(parts, out_channels, dtype=torch.float32) if bias_wanted else None
    dense_input, in_last = _kernel_input(problem, input)
    _launch.launch(
        conv_weight_gradient,
        (parts, blocks, steps),
        input.device,
        *(grad_output, winners, dense_input, weight_parts, bias_parts, pixels, triton.cdiv(tiles, parts)),
        *(problem.in_size, problem.conv_size, problem.out_size),
        IN_LAST=in_last,
        PRECISION=precision,
        **_shape_constexprs(problem),
        **config.options(),
    )
    summed = weight_parts.sum(0).to(weight.dtype)
    if is_tap_by_tap(problem):
        summed = summed.view(out_channels, problem.taps, problem.channels).transpose(1, 2)
    return summed.reshape(weight.shape), None if bias_parts is None else bias_parts.sum(0).to(weight.dtype)
