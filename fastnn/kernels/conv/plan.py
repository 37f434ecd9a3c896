"""What ``fastnn::conv_relu_max_pool`` on a GPU makes of a call before it looks at values: checks, the choice of kernels
and their tiles, launchers."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnn.kernels import _launch, _plan_cache, _precision, _target
from fastnn.kernels._check import check, check_same_kind, check_sizes
from fastnn.kernels.conv.geometry import (
    LARGEST,
    Geometry,
    Problem,
    Triple,
    as_image,
    channels_last,
    check_problem,
    divisors,
    memory_format,
)
from fastnn.kernels.conv.kernels import (
    conv_forward,
    conv_input_gradient,
    conv_weight_gradient,
    pack_channels,
    pool_forward,
    spread_gradient,
)
from fastnn.ops.conv_relu_max_pool import MOST_PLACES

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

    def elements_of_lane(self) -> tuple[float, float, float]:
        """Of the tiles of pixels by out channels, of out channels by columns, of pixels by columns."""
        tiles = self.block_pixels * self.block_out, self.block_out * self.block_k, self.block_pixels * self.block_k
        pixels_out, out_columns, pixels_columns = (tile / (32 * self.num_warps) for tile in tiles)
        return pixels_out, out_columns, pixels_columns


class Rates(NamedTuple):
    """Products of a convolution in the time in which a byte goes to or from memory."""

    stock: float  # by cuDNN
    fused: float  # here


# Of an H100, at the shares of its limits that tools/gpu_roofline.py assumes; other cards are near.
_RATES = {
    "16-bit": Rates(110, 70),
    "tf32": Rates(55, 35),
    "tf32x3": Rates(7.5, 35 / 3),  # cuDNN does without, here three products are made of one
    "no matrix units": Rates(7.5, 4),
}
_INSTRUCTIONS = 10  # of a lane, in the time of a byte
_LAUNCH = 7e6  # The bytes that a card moves while a launch takes place, which is 2.5 us.
# The following numbers count the instructions that one lane executes. They were read from the code that the compiler
# makes for sm_90 (cuobjdump). Loops over tiles of other sizes have up to 40 % more or fewer (tools/gpu_floor.py).
# Loading one element of a patch of few channels into registers; of packed patches, one pixel.
_GATHER = 30
# tf32x3 splits each operand into two parts and adds each product up in float32. _SPLIT counts one element of an
# operand, with its way through shared memory to each warp that multiplies it. _ADD counts one sum.
_SPLIT, _ADD = 20, 4
# The gradient of the input: _TAP counts one position of the kernel. _REBUILD counts one element of the convolution's
# gradient, which is computed from the argmax of its window, by the bytes of an element.
_TAP, _REBUILD = 140, {2: 7, 4: 12}
# The gradient of the weight: _PLACE counts one position of the windows. _TAKE and _TAKE_OF_VECTOR count one element of
# the patches there, loaded alone or as part of a vector. _MATCH counts one element of the gradients.
_PLACE, _TAKE, _TAKE_OF_VECTOR, _MATCH = 70, 14, 2, 8
_ENDS = 300  # What a program of these two executes before its loop and after it.
_MOST_OUT = 64  # The most output channels of a tile.
_MOST_IN = 64  # The most input channels of a tile of the input's gradient.
_LAUNCH_BOUND_WORK = 100e6  # Below so many floating-point operations a call takes as long as its launches.
# Below so many floating-point operations it costs less to read a weight whose kernel positions come last than to launch
# a kernel that reorders it: for 64 channels a step then has 327 instructions in place of 258 on an H100.
_COPY_BOUND_WORK = 15e9
_FEW_CHANNELS = 16
_PACKED_PIXELS = 512  # of a program
_WIDEST_GRID = 65535  # in all dimensions but the first


def is_fused(problem: Problem, direction: str, precision: str, target: _target.Target) -> bool:
    """Whether the convolution is computed here; else by stock's kernel, with one launch of ours behind or before it.
    ``direction``: "forward" or "backward"."""
    if problem.kind.dtype is torch.float64:
        return False
    if problem.groups > 1 and min(problem.channels, problem.out_channels) < _FEW_CHANNELS:
        return False  # tiles would stay empty
    repeated = max(problem.recomputed, 1.0)
    if direction == "backward":
        # The input's gradient visits every tap, also those that a stride leaves out.
        repeated = max(repeated, math.prod(problem.geometry[1]))
    halves = problem.kind.dtype.itemsize == 2
    if direction == "forward" and problem.work * repeated <= _LAUNCH_BOUND_WORK:
        return True
    rates = _RATES["16-bit" if halves else precision if precision in _RATES else "no matrix units"]
    directions = 1 if direction == "forward" else 2  # products of the convolution's depth
    # In bytes of memory traffic a value of the convolution. Stock's output is written and read again; its gradient is
    # written and read by two products.
    stock = (directions + 1) * problem.kind.dtype.itemsize + directions * problem.depth / rates.stock
    if direction == "backward":
        # Stock's way has a launch more; but sums of parts in 16 bits are rounded, by two.
        stock += (-_LAUNCH if halves else _LAUNCH) / max(problem.values, 1)
    depth = problem.depth
    if not is_tap_by_tap(problem):
        depth = _few_columns(_as_packed(problem) if direction == "forward" and is_packed(problem) else problem)[1]
    fused = directions * depth * repeated / rates.fused + conversion(problem, direction)
    return fused + instructions(problem, direction, precision, target) / _INSTRUCTIONS <= stock


def conversion(problem: Problem, direction: str) -> float:
    """Bytes a value of the convolution for a copy of the input with its channels last."""
    if is_tap_by_tap(problem):
        elements = 0 if problem.in_last else problem.channels * math.prod(problem.in_size)
    else:
        is_copied = direction == "forward" and is_packed(problem)
        elements = _packed_channels(problem) * math.prod(_packed_size(problem)) if is_copied else 0
    return 2.0 * problem.kind.dtype.itemsize * elements / (problem.out_channels * math.prod(problem.conv_size))


def instructions(problem: Problem, direction: str, precision: str, target: _target.Target) -> float:
    """Of a lane, a value of the convolution, beside those that stock's way has too."""
    if direction == "forward":
        return max(problem.recomputed, 1.0) * _of_forward(problem, precision, target)
    issued = _of_input_gradient(problem, precision, target) + _of_weight_gradient(problem, precision, target)
    return issued / max(problem.values, 1)


def _of_forward(problem: Problem, precision: str, target: _target.Target) -> float:
    """To bring a value's patch on chip where that has few channels, and to split operands in tf32x3."""
    taken = _as_packed(problem) if is_packed(problem) else problem
    out_tile = min(_MOST_OUT, problem.out_channels)  # that share an element of a patch
    result = 0.0
    if not is_tap_by_tap(problem):
        loads = _few_columns(taken)[1] / (taken.channels if _loads_pixels(taken) else 1)
        result += loads * _GATHER / out_tile
    if precision == "tf32x3":
        config, together = forward_config(taken, precision, target)
        operands = config.block_k * (1 / out_tile + 1 / (together * config.block_pixels))
        result += _steps(taken, config) * (operands * _SPLIT + _ADD)
    return result


def _of_input_gradient(problem: Problem, precision: str, target: _target.Target) -> float:
    """Of the launch."""
    config, grid = _input_gradient_launch(problem, precision, target)
    gradients, weight, sums = config.elements_of_lane()
    windows = problem.places if problem.recomputed > 1 else 1  # that a pixel may have won
    turn = _TAP + gradients * windows * _REBUILD[problem.kind.dtype.itemsize]
    if precision == "tf32x3":
        turn += (gradients + weight) * _SPLIT + sums * _ADD
    turns = problem.taps * triton.cdiv(problem.out_channels, config.block_out)
    return _lanes(grid, config, target) * (_ENDS + turns * turn)


def _of_weight_gradient(problem: Problem, precision: str, target: _target.Target) -> float:
    """Of the launch."""
    config, grid = _weight_gradient_launch(problem, precision, target)
    gradients, sums, patches = config.elements_of_lane()
    turn = _PLACE + gradients * _MATCH + patches * (_TAKE_OF_VECTOR if is_tap_by_tap(problem) else _TAKE)
    if precision == "tf32x3":
        turn += (gradients + patches) * _SPLIT + sums * _ADD
    tiles = triton.cdiv(problem.pooled_pixels, config.block_pixels)
    return _lanes(grid, config, target) * (_ENDS + triton.cdiv(tiles, grid[0]) * problem.places * turn)


def _lanes(grid: tuple[int, ...], config: Config, target: _target.Target) -> int:
    """Of a launch, were all processors as busy as the one with the most programs."""
    return triton.cdiv(math.prod(grid), target.processors) * target.processors * 32 * config.num_warps


def is_tap_by_tap(problem: Problem) -> bool:
    """Whether a step of a sum is one tap's; else, for few channels, it has several taps."""
    return problem.channels >= _FEW_CHANNELS


def _packed_channels(problem: Problem) -> int:
    """Few channels, filled up so that one load brings a pixel."""
    return max(4, triton.next_power_of_2(problem.channels))


def _loads_pixels(problem: Problem) -> bool:
    """Whether one load brings the few channels of a pixel."""
    return problem.in_last and problem.channels == _packed_channels(problem)


def _few_columns(problem: Problem) -> tuple[int, int]:
    """Of a sum over few channels: the columns of a step, and of all steps."""
    columns = problem.taps * triton.next_power_of_2(problem.channels)
    # Elements that come one by one all have a place of their own, and places fill registers.
    most = 64 if _loads_pixels(problem) else 32 if problem.kind.dtype.itemsize == 2 else 16
    step = min(most, _target.padded(columns))
    return step, triton.cdiv(columns, step) * step


def _tap_columns(problem: Problem, block_k: int) -> int:
    """Columns of a tap in the fused kernels' sums."""
    if is_tap_by_tap(problem):
        return triton.cdiv(problem.channels, block_k) * block_k
    return triton.next_power_of_2(problem.channels)


def _packed_size(problem: Problem) -> Triple:
    depth, height, width = (size + 2 * pad for size, pad in zip(problem.in_size, problem.geometry[2], strict=True))
    return depth, height, width


def is_packed(problem: Problem) -> bool:
    """Whether the fused forward kernel takes a copy of the input, made by pack_channels: few channels last and filled
    up, with the padding around, so that no load asks whether it is inside."""
    channels, pixels = _packed_channels(problem), math.prod(_packed_size(problem))
    if is_tap_by_tap(problem) or problem.work <= _LAUNCH_BOUND_WORK or problem.groups > 1:
        return False
    if _loads_pixels(problem):
        return False
    return pixels <= 2 * math.prod(problem.in_size) and max(channels, problem.images) * pixels < LARGEST


def _as_packed(problem: Problem) -> Problem:
    kernel, stride, _, *others = problem.geometry
    return problem._replace(
        channels=_packed_channels(problem),
        geometry=(kernel, stride, (0, 0, 0), *others),
        in_size=_packed_size(problem),
        in_last=True,
    )


def _holds_operands(target: _target.Target) -> bool:
    """Whether a dot leaves registers to the sums."""
    return target.backend == "hip" or target.arch in _target.LARGE_TILES


def conv_config(problem: Problem, precision: str, target: _target.Target) -> Config:
    """The fused kernels' tiles, as large as registers hold without spilling (tools/gpu_check.py)."""
    wide = problem.kind.dtype.itemsize == 2
    fast = _precision.uses_matrix_units(problem.kind.dtype, precision, target)
    block_out = min(_MOST_OUT, _target.padded(problem.out_channels))
    if is_tap_by_tap(problem):
        most = 128 if wide and _holds_operands(target) else 64
        block_k = min(64 if wide else 32, _target.padded(problem.channels))
    else:
        most, block_k = 64, min(_few_columns(problem)[0], 64 if _holds_operands(target) else 32)
    pixels = problem.images * math.prod(problem.out_size)
    block_pixels = min(most if fast else 32, _target.padded(triton.cdiv(pixels, target.processors)))
    num_warps = 8 if block_pixels * block_out * problem.kind.dtype.itemsize >= 8192 else 4
    if precision == "tf32x3":
        block_k = min(block_k, _precision.MOST_PRODUCTS_IN_TF32X3)
    return Config(block_pixels, block_out, block_k, num_warps, num_stages=3 if target.shared_memory > 65536 else 2)


_MOST_TOGETHER = 8  # places: a longer program only takes longer to compile


def _registers_for_sums(problem: Problem, config: Config, precision: str, target: _target.Target) -> int:
    """Of a thread, without spilling (tools/gpu_check.py)."""
    if target.arch in (100, 103) and precision == "tf32":
        return 32  # the compiler gives eight warps 128 registers each
    # In a loop every element of a patch that comes alone has a place to be kept.
    if _holds_operands(target) and (is_tap_by_tap(problem) or _loads_pixels(problem) or _steps(problem, config) == 1):
        return 128
    return 16 if precision == "tf32x3" else 32


def forward_config(problem: Problem, precision: str, target: _target.Target) -> tuple[Config, int]:
    """conv_forward's tiles, and how many places of a window share the weight's: a divisor of their number, as many as
    registers hold the sums of. Two programs should fit a processor: one computes while the other begins or ends."""
    config = conv_config(problem, precision, target)
    if config.block_pixels == 128 and problem.out_channels >= 128 and target.arch in _target.LARGE_TILES:
        config = config._replace(block_pixels=64, block_out=128)  # the patches are brought for twice the channels
    sums = max(1, config.block_pixels * config.block_out // (32 * config.num_warps))  # registers of a place
    most = min(_MOST_TOGETHER, max(1, _registers_for_sums(problem, config, precision, target) // sums))
    together = max(n for n in range(1, most + 1) if problem.places % n == 0)
    size = problem.kind.dtype.itemsize

    def fits(stages: int) -> bool:
        stage = (together * config.block_pixels + config.block_out) * config.block_k * size
        return 2 * stages * stage <= target.shared_memory

    while not fits(stages=2) and (config.block_pixels > 64 or config.block_k > 32):
        if config.block_pixels > 64:
            config = config._replace(block_pixels=config.block_pixels // 2, num_warps=max(4, config.num_warps // 2))
        else:
            config = config._replace(block_k=config.block_k // 2)
    return config._replace(num_stages=config.num_stages if fits(config.num_stages) else 2), together


# ---- plans --------------------------------------------------------------------------------------------------


class Pack(NamedTuple):
    """A copy by pack_channels."""

    launch: _launch.Launcher
    in_size: Triple
    sizes: tuple[int, ...]  # of the copy: images, depth, height, width, channels
    divisors: tuple[int, ...]

    def __call__(self, x: Tensor) -> Tensor:
        packed = x.new_empty(self.sizes)
        self.launch(x, packed, math.prod(self.sizes[:4]), self.in_size, self.sizes[1:4], self.divisors)
        return packed


class Plan(NamedTuple):
    """What a call makes of all but the values of its tensors. ``launch`` convolves and pools where ``fused``, else
    pools what stock's convolution gives. In backward: the input's gradient, or the convolution's."""

    problem: Problem  # as ``launch`` takes it
    arguments: Geometry
    format: torch.memory_format  # of the output; in backward, of the input and its gradient
    fused: bool
    launch: _launch.Launcher
    divisors: tuple[int, ...]  # of the sizes that it splits pixels' numbers by
    # Of input and weight as the fused kernels take them.
    x_format: torch.memory_format = torch.contiguous_format
    w_format: torch.memory_format = torch.contiguous_format
    packs: tuple[Pack, Pack] | None = None  # of input and weight, copied before
    steps: int = 0  # of the fused convolution's sums
    launch_weight: _launch.Launcher | None = None  # in backward, of the fused gradient of the weight


def facts(tensor: Tensor | None) -> Any:
    return None if tensor is None else (_plan_cache.facts(tensor), tensor.stride())


def plan_forward(
    op: str, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Sequence[int], with_winners: bool,
    precision: str, target: _target.Target,
) -> Plan:  # fmt: skip
    arguments = Geometry.of_flat(geometry, input.dim() - 2)
    problem = check_problem(op, input, weight, bias, arguments)
    check(not with_winners or problem.places <= MOST_PLACES, op, ": a winner's place is one byte, so a window may have "
          "at most ", MOST_PLACES, " elements, got ", problem.places)  # fmt: skip
    format = memory_format(input, weight)
    is_last = format is not torch.contiguous_format
    if not is_fused(problem, "forward", precision, target):
        options = _pool_options(problem, is_last)
        grid = _tiles(problem.pooled_pixels, options)
        launch = _launch.Launcher(pool_forward, grid, input.device, LAST=is_last, **options)
        return Plan(problem, arguments, format, False, launch, divisors(problem.out_size))
    x_format, w_format = _x_format(problem, input), _w_format(problem, weight)
    x_last, w_last = (each is not torch.contiguous_format for each in (x_format, w_format))
    packs = None
    if is_packed(problem):
        kernel, padding, channels = problem.geometry[0], problem.geometry[2], _packed_channels(problem)
        packs = (
            _pack(problem, problem.images, problem.in_size, padding, x_last, channels),
            _pack(problem, problem.out_channels, kernel, (0, 0, 0), w_last, channels),
        )
        problem, x_last, w_last = _as_packed(problem), True, True
    launch, steps = _fused_launcher(problem, x_last, w_last, is_last, precision, target)
    return Plan(problem, arguments, format, True, launch, divisors(problem.out_size), x_format, w_format, packs, steps)


def _steps(problem: Problem, config: Config) -> int:
    return triton.cdiv(problem.taps * _tap_columns(problem, config.block_k), config.block_k)


def _x_format(problem: Problem, input: Tensor) -> torch.memory_format:
    """Of the input in the fused kernels: many channels are last, so that one load brings several."""
    return channels_last(problem.dims) if is_tap_by_tap(problem) else memory_format(input)


def copies_weight(problem: Problem) -> bool:
    """Whether the fused kernels are given a weight with many channels last, which may take a copy."""
    return is_tap_by_tap(problem) and problem.work > _COPY_BOUND_WORK


def _w_format(problem: Problem, weight: Tensor) -> torch.memory_format:
    """Of the weight in the fused kernels, which take it as it lies, unless a copy with many channels last, one launch,
    is cheaper."""
    last = channels_last(problem.dims)
    is_last = copies_weight(problem) or as_image(weight).is_contiguous(memory_format=last)
    return last if is_last else torch.contiguous_format


def _pack(problem: Problem, images: int, in_size: Triple, padding: Triple, last: bool, channels: int) -> Pack:
    depth, height, width = (size + 2 * pad for size, pad in zip(in_size, padding, strict=True))
    launch = _launch.Launcher(
        pack_channels,
        (triton.cdiv(images * depth * height * width, _PACKED_PIXELS),),
        problem.kind.device,
        CHANNELS=problem.channels,
        PADDING=padding,
        X_LAST=last,
        PACKED_CHANNELS=channels,
        BLOCK_PIXELS=_PACKED_PIXELS,
        num_warps=4,
        num_stages=1,
    )
    sizes = (images, depth, height, width, channels)
    return Pack(launch, in_size, sizes, divisors((depth, height, width)))


def _shape_constexprs(problem: Problem, x_last: bool, w_last: bool, config: Config) -> dict[str, Any]:
    return {
        "CHANNELS": (problem.groups, problem.channels, problem.out_channels),
        "GEOMETRY": problem.geometry,
        "LAYOUT": (x_last, w_last, _tap_columns(problem, config.block_k)),
        "OPERAND": _precision.operand_dtype(problem.kind.dtype),
        **config.options(),
    }


def _has_whole_windows(problem: Problem) -> bool:
    """Whether no window of the pool reaches beyond the convolution."""
    reach = zip(problem.out_size, problem.conv_size, *problem.geometry[4:], strict=True)
    return all(
        pad == 0 and (out - 1) * stride + (kernel - 1) * dilation < conv
        for out, conv, kernel, stride, pad, dilation in reach
    )


def _fused_launcher(
    problem: Problem, x_last: bool, w_last: bool, y_last: bool, precision: str, target: _target.Target
) -> tuple[_launch.Launcher, int]:
    config, together = forward_config(problem, precision, target)
    launch = _launch.Launcher(
        conv_forward,
        (
            triton.cdiv(problem.pooled_pixels, config.block_pixels),
            problem.groups * triton.cdiv(problem.out_channels, config.block_out),
        ),
        problem.kind.device,
        WHOLE=_has_whole_windows(problem),
        Y_LAST=y_last,
        TOGETHER=together,
        PRECISION=precision,
        **_shape_constexprs(problem, x_last, w_last, config),
    )
    return launch, _steps(problem, config)


def _pool_options(problem: Problem, last: bool) -> dict[str, Any]:
    """Tiles as long as the memory is contiguous; a grid is at most ``_WIDEST_GRID`` wide."""
    channels = problem.groups * problem.out_channels
    least = triton.next_power_of_2(triton.cdiv(channels, _WIDEST_GRID))
    block_out = max(least, min(64, triton.next_power_of_2(channels)) if last else 1)
    return {
        "CHANNELS": channels,
        "GEOMETRY": problem.geometry,
        "BLOCK_PIXELS": max(1024 // block_out, 16),
        "BLOCK_OUT": block_out,
        "COMPUTE": tl.float64 if problem.kind.dtype is torch.float64 else tl.float32,
        "num_warps": 4,
        "num_stages": 1,
    }


def _tiles(pixels: int, options: dict[str, Any]) -> tuple[int, int]:
    return triton.cdiv(pixels, options["BLOCK_PIXELS"]), triton.cdiv(options["CHANNELS"], options["BLOCK_OUT"])


def plan_backward(
    grad_output: Tensor, winners: Tensor, input: Tensor, weight: Tensor, geometry: Sequence[int], precision: str,
    target: _target.Target,
) -> Plan:  # fmt: skip
    op = "conv_relu_max_pool_backward"
    arguments = Geometry.of_flat(geometry, input.dim() - 2)
    problem = check_problem(op, input, weight, None, arguments)
    check(problem.places <= MOST_PLACES, op, ": a window may have at most ", MOST_PLACES, " elements")
    check_same_kind(problem.kind, grad_output, "grad_output")
    check_sizes(op, grad_output, problem.sizes(problem.out_size), "grad_output")
    check_same_kind(problem.kind, winners, "winners", torch.uint8)
    check_sizes(op, winners, problem.sizes(problem.out_size), "winners")
    format = memory_format(input)
    if not is_fused(problem, "backward", precision, target):
        options = _pool_options(problem, last=True)
        grid = _tiles(problem.images * math.prod(problem.conv_size), options)
        launch = _launch.Launcher(spread_gradient, grid, input.device, **options)
        return Plan(problem, arguments, format, False, launch, divisors(problem.conv_size))
    x_format, w_format = _x_format(problem, input), _w_format(problem, weight)
    w_last = w_format is not torch.contiguous_format
    launch = _input_gradient_launcher(problem, format is not torch.contiguous_format, w_last, precision, target)
    launch_weight = _weight_gradient_launcher(problem, x_format is not torch.contiguous_format, precision, target)
    return Plan(
        problem, arguments, format, True, launch, divisors(problem.in_size), x_format, w_format,
        launch_weight=launch_weight,
    )  # fmt: skip


def _input_gradient_launch(problem: Problem, precision: str, target: _target.Target) -> tuple[Config, tuple[int, ...]]:
    """Tiles and grid."""
    config = conv_config(problem, precision, target)
    block_k = min(_MOST_IN, _target.padded(problem.channels))
    config = config._replace(block_k=block_k, block_out=min(config.block_out, 32))
    pixels = problem.images * math.prod(problem.in_size)
    blocks = problem.groups * triton.cdiv(problem.channels, block_k)
    return config, (triton.cdiv(pixels, config.block_pixels), blocks)


def _input_gradient_launcher(
    problem: Problem, x_last: bool, w_last: bool, precision: str, target: _target.Target
) -> _launch.Launcher:
    config, grid = _input_gradient_launch(problem, precision, target)
    return _launch.Launcher(
        conv_input_gradient,
        grid,
        problem.kind.device,
        PRECISION=precision,
        **_shape_constexprs(problem, x_last, w_last, config),
    )


def _weight_gradient_launch(problem: Problem, precision: str, target: _target.Target) -> tuple[Config, tuple[int, ...]]:
    """Tiles and grid."""
    config = conv_config(problem, precision, target)
    most = _precision.MOST_PRODUCTS_IN_TF32X3 if precision == "tf32x3" else 64
    config = config._replace(block_pixels=min(config.block_pixels, most))
    if not is_tap_by_tap(problem):
        config = config._replace(block_k=min(config.block_k, 32 if problem.kind.dtype.itemsize == 2 else 16))
    steps, blocks = _steps(problem, config), problem.groups * triton.cdiv(problem.out_channels, config.block_out)
    tiles = triton.cdiv(problem.pooled_pixels, config.block_pixels)
    # Enough parts for two programs a processor; they are added up in a fixed order, so results repeat bit for bit.
    parts = max(1, min(tiles, triton.cdiv(2 * target.processors, blocks * steps)))
    return config, (parts, blocks, steps)


def _weight_gradient_launcher(
    problem: Problem, x_last: bool, precision: str, target: _target.Target
) -> _launch.Launcher:
    config, grid = _weight_gradient_launch(problem, precision, target)
    return _launch.Launcher(
        conv_weight_gradient,
        grid,
        problem.kind.device,
        PRECISION=precision,
        **_shape_constexprs(problem, x_last, False, config),
    )
