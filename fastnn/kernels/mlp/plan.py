"""What ``fastnn::mlp`` on a GPU makes of a call before it looks at values: checks, the choice of kernels and their
tiles, launchers."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastnn.activations import Activation, parse
from fastnn.kernels import _launch, _precision, _target
from fastnn.kernels._check import Expected, check, check_first, check_same_kind, check_sizes
from fastnn.kernels.mlp.kernels import chain_backward, chain_forward, layer_forward, resident_chain_forward
from fastnn.ops.mlp import MOST_LAYERS, split_parameters

# ---- choice of kernel and configuration -------------------------------------------------------------------


class Config(NamedTuple):
    block_rows: int
    block_in: int
    block_out: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        """As the kernels and the launch take them."""
        return {
            "BLOCK_ROWS": self.block_rows,
            "BLOCK_IN": self.block_in,
            "BLOCK_OUT": self.block_out,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


_WIDEST_HIDDEN = 256
_WIDEST_ENDS = 1024  # beyond it a first or last layer is a GEMM of its own, which cuBLAS splits better
_DEEPEST_CHAIN = 16
# Without matrix units a dot runs at a fraction of cuBLAS's speed: only what is bound by memory or by launches wins, and
# backward moves less than it computes.
_WIDEST_WITHOUT_MATRIX_UNITS = 64
_LAUNCH_BOUND_WORK = 100e6
_DEEPEST_LAYER_SUM = 512
_REGISTERS = 65536  # of a processor


def _block_rows(rows: int, most: int, target: _target.Target) -> int:
    """Few rows are spread over the processors."""
    return min(most, max(16, triton.next_power_of_2(triton.cdiv(rows, target.processors))))


def chain_config(
    widths: Sequence[int],
    rows: int,
    dtype: torch.dtype,
    precision: str,
    target: _target.Target,
    backward: bool = False,
) -> Config | None:
    """The configuration of the one-launch kernels, or None where layers run one at a time.

    Hidden widths up to 256 whose weights fit on chip; without matrix units forward up to 64, or little work.
    """
    hidden, layers = widths[1:-1], len(widths) - 1
    if not 2 <= layers <= _DEEPEST_CHAIN or rows * min(widths) == 0 or dtype is torch.float64:
        return None
    if max(hidden) > _WIDEST_HIDDEN or max(widths[0], widths[-1]) > _WIDEST_ENDS:
        return None
    fast = _precision.uses_matrix_units(dtype, precision, target)
    work = 2.0 * rows * sum(a * b for a, b in pairwise(widths))
    if not fast and (backward or max(hidden) > _WIDEST_WITHOUT_MATRIX_UNITS) and work > _LAUNCH_BOUND_WORK:
        return None
    tiles = [_target.padded(width) for width in hidden]
    # A row tile as tall as registers hold without spilling (tools/gpu_check.py).
    values = (16384 if dtype.itemsize == 2 else 8192 if fast else 2048) // (2 if backward else 1)
    if target.backend == "hip" and backward:
        values //= 2
    block_rows = _block_rows(rows, max(16, min(128, values // max(tiles))), target)
    chunk = 64 if max(tiles) <= 128 and dtype.itemsize == 2 else 32
    largest = max((a * b for a, b in pairwise(tiles)), default=0)
    on_chip = dtype.itemsize * (max(largest, 2 * chunk * max(tiles)) + block_rows * (max(tiles) + chunk))
    if on_chip > target.shared_memory:
        return None
    block_in, block_out = min(chunk, _target.padded(widths[0])), min(chunk, _target.padded(widths[-1]))
    # Without matrix units both operands of a dot are in registers as a whole.
    many_warps = block_rows * max(tiles) >= (8192 if fast else 1024)
    return Config(block_rows, block_in, block_out, num_warps=8 if many_warps else 4, num_stages=2)


def is_resident(
    widths: Sequence[int], rows: int, dtype: torch.dtype, precision: str, config: Config, target: _target.Target
) -> bool:
    """Whether the weights of all layers fit on chip, and rows are so many that a program loads them for several
    tiles."""
    tiles = [_target.padded(width) for width in widths]
    if max(tiles) > 128 or not _precision.uses_matrix_units(dtype, precision, target):
        return False
    if target.backend == "hip" or int(target.arch) >= 100:
        return False  # weights would be kept in registers, or the layers' sums overflow tensor memory
    on_chip = _resident_bytes(widths, dtype, config)
    return on_chip <= target.shared_memory and _TILES_EACH * config.block_rows * target.processors <= rows < 2**31


_TILES_EACH = 4  # for which a program's weights are worth being kept


def _resident_bytes(widths: Sequence[int], dtype: torch.dtype, config: Config) -> int:
    """Shared memory of a program: the weights, the tile that is being loaded and two of the one at work."""
    tiles = [_target.padded(width) for width in widths]
    return dtype.itemsize * (sum(a * b for a, b in pairwise(tiles)) + 3 * config.block_rows * max(tiles))


def resident_programs(
    widths: Sequence[int], rows: int, dtype: torch.dtype, config: Config, target: _target.Target
) -> int:
    """As many as the processors hold at once, each with tiles enough."""
    threads = 32 * config.num_warps
    sums = config.block_rows * max(map(_target.padded, widths)) // threads  # of a thread
    registers = max(64, sums * (3 if dtype.itemsize == 2 else 5))  # tools/gpu_check.py
    of_registers = _REGISTERS // (threads * registers)
    fit = max(1, min(target.shared_memory // _resident_bytes(widths, dtype, config), of_registers))
    tiles = triton.cdiv(rows, config.block_rows)
    return max(target.processors, min(fit * target.processors, tiles // _TILES_EACH))


def layer_config(
    rows: int,
    inputs: int,
    outputs: int,
    activation: Activation,
    dtype: torch.dtype,
    precision: str,
    target: _target.Target,
) -> Config | None:
    """The configuration of the one-layer kernel, or None where stock's GEMM and activation are at least as fast: a
    fused epilogue only pays where the sum is short."""
    if rows * inputs * outputs == 0 or dtype is torch.float64 or activation.kind.name == "identity":
        return None
    fast = _precision.uses_matrix_units(dtype, precision, target)
    if inputs > (_DEEPEST_LAYER_SUM if fast else _WIDEST_WITHOUT_MATRIX_UNITS):
        return None
    block_rows = _block_rows(rows, 128 if fast else 64, target)
    block_out = min(_target.padded(outputs), 128 if fast else 64)
    block_in = min(_target.padded(inputs), 64 if dtype.itemsize == 2 else 32)
    num_warps = 8 if block_rows * block_out >= 16384 else 4
    config = Config(block_rows, block_in, block_out, num_warps, 3 if target.shared_memory > 65536 else 2)
    return config


# ---- checks -----------------------------------------------------------------------------------------------


class Chain(NamedTuple):
    kind: Expected
    rows: int
    widths: list[int]  # the input's, then each layer's

    @property
    def layers(self) -> int:
        return len(self.widths) - 1


def _activations(op: str, text: str) -> tuple[Activation, ...]:
    try:
        activations = parse(text)
    except ValueError:
        check(False, op, ': expected an activation a layer, such as relu|leaky_relu(0.2)|identity, got "', text, '"')
    check(len(activations) <= MOST_LAYERS, op, ": expected the activations of at most ", MOST_LAYERS,
          " layers, got \"", text, "\"")  # fmt: skip
    return activations


def _check_chain(op: str, input: Tensor, weights: Sequence[Tensor], activations: Sequence[Activation]) -> Chain:
    kind = check_first(op, input, "input")
    check(input.dim() == 2, op, ": expected input to be 2D (rows, features), got ", input.dim(), "D tensor instead")
    check(len(weights) > 0, op, ": expected at least one weight")
    check(len(activations) == len(weights), op, ": expected ", len(weights), " activations, one a weight, got ",
          len(activations))  # fmt: skip
    rows, *widths = input.shape
    for i, weight in enumerate(weights):
        check_same_kind(kind, weight, "weights")
        check(weight.dim() == 2, op, ": expected weights[", i, "] to be 2D (out, in), got ", weight.dim(),
              "D tensor instead")  # fmt: skip
        out, inputs = weight.shape
        check(inputs == widths[-1], op, ": mat1 and mat2 shapes cannot be multiplied (", rows, "x", widths[-1],
              " and ", inputs, "x", out, ")")  # fmt: skip
        widths.append(out)
    return Chain(kind, rows, widths)


def _check_biases(chain: Chain, biases: Sequence[Tensor | None]) -> None:
    op = chain.kind.op
    check(len(biases) == chain.layers, op, ": expected ", chain.layers, " biases, one a weight, got ", len(biases))
    for bias, width in zip(biases, chain.widths[1:], strict=True):
        if bias is not None:
            check_same_kind(chain.kind, bias, "biases")
            check_sizes(op, bias, (width,), "biases")


def saves_input(activation: Activation) -> bool:
    """Whether a layer saves its activation's input for backward, rather than its output."""
    return activation.kind.derived_from == "input"


def parameter_of(activation: Activation, place: int) -> float:
    """An activation's first or second parameter as the kernels take it, which is 0 where it has none."""
    return activation.parameters[place] if place < len(activation.parameters) else 0.0


# ---- plans --------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What a call makes of all but the values of its tensors."""

    chain: Chain
    activations: tuple[Activation, ...]
    saves_input: tuple[bool, ...]
    launch: _launch.Launcher | None  # of all layers at once
    launches: list[_launch.Launcher | None]  # else of each layer, None where it is stock's


def plan_forward(
    op: str, input: Tensor, parameters: Sequence[Tensor], text: str, target: _target.Target, precision: str
) -> Plan:
    activations = _activations(op, text)
    layers = len(activations)
    check(len(parameters) in (layers, 2 * layers), op, ": expected ", layers, " weights and ", layers,
          " or no biases, got ", len(parameters), " parameters")  # fmt: skip
    weights, biases = split_parameters(parameters, layers)
    chain = _check_chain(op, input, weights, activations)
    _check_biases(chain, biases)
    keeps = tuple(map(saves_input, activations))
    config = chain_config(chain.widths, chain.rows, input.dtype, precision, target)
    if config is not None:
        launch = _chain_launcher(chain, activations, keeps, config, precision, target)
        return Plan(chain, activations, keeps, launch, [])
    launches = [_layer_launcher(chain, i, activation, precision, target) for i, activation in enumerate(activations)]
    return Plan(chain, activations, keeps, None, launches)


def _constexprs(chain: Chain, activations: Sequence[Activation], config: Config, precision: str) -> dict[str, Any]:
    return {
        "WIDTHS": tuple(chain.widths),
        "TILES": tuple(_target.padded(width) for width in chain.widths),
        "ACTIVATIONS": tuple(activation.kind.number for activation in activations),
        "FIRST": tuple(parameter_of(activation, 0) for activation in activations),
        "SECOND": tuple(parameter_of(activation, 1) for activation in activations),
        "LAYERS": chain.layers,
        "OPERAND": _precision.operand_dtype(chain.kind.dtype),
        "PRECISION": precision,
        **config.options(),
    }


def _chain_launcher(
    chain: Chain, activations: Sequence[Activation], saves_input: tuple[bool, ...], config: Config, precision: str,
    target: _target.Target,
) -> _launch.Launcher:  # fmt: skip
    constexprs = _constexprs(chain, activations, config, precision) | {"SAVES_INPUT": saves_input}
    tiles = triton.cdiv(chain.rows, config.block_rows)
    if not is_resident(chain.widths, chain.rows, chain.kind.dtype, precision, config, target):
        return _launch.Launcher(chain_forward, (tiles,), chain.kind.device, **constexprs)
    del constexprs["BLOCK_IN"], constexprs["BLOCK_OUT"]
    programs = resident_programs(chain.widths, chain.rows, chain.kind.dtype, config, target)
    return _launch.Launcher(resident_chain_forward, (programs,), chain.kind.device, **constexprs)


def _layer_launcher(
    chain: Chain, layer: int, activation: Activation, precision: str, target: _target.Target
) -> _launch.Launcher | None:
    inputs, outputs = chain.widths[layer : layer + 2]
    config = layer_config(chain.rows, inputs, outputs, activation, chain.kind.dtype, precision, target)
    if config is None:
        return None
    return _launch.Launcher(
        layer_forward,
        (triton.cdiv(chain.rows, config.block_rows), triton.cdiv(outputs, config.block_out)),
        chain.kind.device,
        IN=inputs,
        OUT=outputs,
        ACTIVATION=activation.kind.number,
        FIRST=parameter_of(activation, 0),
        SECOND=parameter_of(activation, 1),
        OPERAND=_precision.operand_dtype(chain.kind.dtype),
        PRECISION=precision,
        **config.options(),
    )


def plan_backward(
    grad_output: Tensor, input: Tensor, weights: Sequence[Tensor], text: str, output: Tensor, hidden: Sequence[Tensor],
    target: _target.Target, precision: str,
) -> Plan:  # fmt: skip
    op = "mlp_backward"
    activations = _activations(op, text)
    chain = _check_chain(op, input, weights, activations)
    check_same_kind(chain.kind, grad_output, "grad_output")
    check_sizes(op, grad_output, (chain.rows, chain.widths[-1]), "grad_output")
    _check_saved(chain, saved_of(activations, output, hidden), len(hidden))
    return Plan(chain, activations, (), _backward_launcher(chain, activations, precision, target), [])


def saved_of(activations: Sequence[Activation], output: Tensor, hidden: Sequence[Tensor]) -> list[Tensor]:
    """The saved tensors, one a layer, with ``output`` standing in where it serves."""
    return list(hidden) if saves_input(activations[-1]) else [*hidden, output]


def _check_saved(chain: Chain, saved: Sequence[Tensor], hidden: int) -> None:
    op = chain.kind.op
    check(len(saved) == chain.layers, op, ": expected ", chain.layers - len(saved) + hidden, " hidden tensors, got ",
          hidden)  # fmt: skip
    for tensor, width in zip(saved, chain.widths[1:], strict=True):
        check_same_kind(chain.kind, tensor, "hidden")
        check_sizes(op, tensor, (chain.rows, width), "hidden")


def _backward_launcher(
    chain: Chain, activations: Sequence[Activation], precision: str, target: _target.Target
) -> _launch.Launcher | None:
    config = chain_config(chain.widths, chain.rows, chain.kind.dtype, precision, target, backward=True)
    if config is None:
        return None
    tiles = triton.cdiv(chain.rows, config.block_rows)
    constexprs = _constexprs(chain, activations, config, precision)
    return _launch.Launcher(chain_backward, (tiles,), chain.kind.device, **constexprs)
