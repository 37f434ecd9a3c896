"""``fastnn::mlp`` on a GPU: a chain of narrow layers in one launch, other layers one at a time, with a fused epilogue
where the sums are short and by stock's kernels where they are long."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from fastnn.kernels import _launch
from fastnn.kernels._check import Expected, check, check_first, check_same_kind, check_sizes
from fastnn.kernels._mlp_kernels import chain_backward, chain_forward, layer_forward, resident_chain_forward
from fastnn.ops.mlp import _KEEPS_INPUT, ACTIVATION_NAMES, split_parameters
from fastnn.reference.mlp import ACTIVATIONS

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
# Without matrix units a dot runs at a fraction of cuBLAS's speed: only what is bound by memory or by launches wins.
_WIDEST_WITHOUT_MATRIX_UNITS = 64
_LAUNCH_BOUND_WORK = 100e6
_DEEPEST_LAYER_SUM = 512


def _block_rows(rows: int, most: int, target: _launch.Target) -> int:
    """Few rows are spread over the processors."""
    return min(most, max(16, triton.next_power_of_2(triton.cdiv(rows, target.processors))))


def chain_config(
    widths: Sequence[int],
    rows: int,
    dtype: torch.dtype,
    precision: str,
    target: _launch.Target,
    backward: bool = False,
) -> Config | None:
    """The configuration of the one-launch kernels, or None where layers run one at a time.

    Hidden widths up to 256 whose weights fit on chip; without matrix units up to 64, or little work.
    """
    hidden, layers = widths[1:-1], len(widths) - 1
    if not 2 <= layers <= _DEEPEST_CHAIN or rows * min(widths) == 0 or dtype is torch.float64:
        return None
    if max(hidden) > _WIDEST_HIDDEN or max(widths[0], widths[-1]) > _WIDEST_ENDS:
        return None
    fast = _launch.uses_matrix_units(dtype, precision, target)
    work = 2.0 * rows * sum(a * b for a, b in pairwise(widths))
    if not fast and max(hidden) > _WIDEST_WITHOUT_MATRIX_UNITS and work > _LAUNCH_BOUND_WORK:
        return None
    tiles = [_launch.padded(width) for width in hidden]
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
    block_in, block_out = min(chunk, _launch.padded(widths[0])), min(chunk, _launch.padded(widths[-1]))
    config = Config(
        block_rows, block_in, block_out, num_warps=8 if block_rows * max(tiles) >= 8192 else 4, num_stages=2
    )
    direction = "backward" if backward else "forward"
    return _launch.tuned(config, target, "chain", direction, dtype.itemsize, precision, block_rows, max(tiles), layers)


def is_resident(
    widths: Sequence[int], rows: int, dtype: torch.dtype, precision: str, config: Config, target: _launch.Target
) -> bool:
    """Whether the weights of all layers fit on chip, and rows are so many that a program loads them for several
    tiles."""
    tiles = [_launch.padded(width) for width in widths]
    if max(tiles) > 128 or not _launch.uses_matrix_units(dtype, precision, target):
        return False
    if target.backend == "hip" or int(target.arch) >= 100:
        return False  # weights would be kept in registers, or the layers' sums overflow tensor memory
    # Beside the weights, the tile that is being loaded and two of the one at work.
    on_chip = dtype.itemsize * (sum(a * b for a, b in pairwise(tiles)) + 3 * config.block_rows * max(tiles))
    return on_chip <= target.shared_memory and 4 * config.block_rows * target.processors <= rows < 2**31


def layer_config(
    rows: int, inputs: int, outputs: int, activation: int, dtype: torch.dtype, precision: str, target: _launch.Target
) -> Config | None:
    """The configuration of the one-layer kernel, or None where stock's GEMM and activation are at least as fast: a
    fused epilogue only pays where the sum is short."""
    if rows * inputs * outputs == 0 or dtype is torch.float64 or ACTIVATION_NAMES[activation] == "identity":
        return None
    fast = _launch.uses_matrix_units(dtype, precision, target)
    if inputs > (_DEEPEST_LAYER_SUM if fast else _WIDEST_WITHOUT_MATRIX_UNITS):
        return None
    block_rows = _block_rows(rows, 128 if fast else 64, target)
    block_out = min(_launch.padded(outputs), 128 if fast else 64)
    block_in = min(_launch.padded(inputs), 64 if dtype.itemsize == 2 else 32)
    num_warps = 8 if block_rows * block_out >= 16384 else 4
    config = Config(block_rows, block_in, block_out, num_warps, 3 if target.shared_memory > 65536 else 2)
    return _launch.tuned(config, target, "layer", dtype.itemsize, precision, block_rows, block_in, block_out)


# ---- checks -----------------------------------------------------------------------------------------------


class Chain(NamedTuple):
    kind: Expected
    rows: int
    widths: list[int]  # the input's, then each layer's

    @property
    def layers(self) -> int:
        return len(self.widths) - 1


def _numbers(op: str, activations: int) -> list[int]:
    digits = f"{activations:o}"
    check(activations > 1 and digits[0] == "1", op, ": activations must be a 1 and 1 to 20 octal digits, got ",
          activations)  # fmt: skip
    return [int(digit) for digit in digits[1:]]


def _check_chain(op: str, input: Tensor, weights: Sequence[Tensor], activations: Sequence[int]) -> Chain:
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


def _keeps_input(activation: int) -> bool:
    return ACTIVATION_NAMES[activation] in _KEEPS_INPUT


def _contiguous(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


# ---- forward ----------------------------------------------------------------------------------------------


def mlp(input: Tensor, parameters: Sequence[Tensor], activations: int) -> Tensor:
    """``fastnn::mlp``: input (rows, in); parameters, the weights (out_i, in_i), then the biases (out_i) or none
    -> (rows, out of the last)."""
    return _forward("mlp", input, parameters, activations, save=False)[0]


def mlp_reconstruction_error(input: Tensor, parameters: Sequence[Tensor], activations: int) -> Tensor:
    """``fastnn::mlp_reconstruction_error``: the mean squared difference of output and input, (rows)."""
    op = "mlp_reconstruction_error"
    output = _forward(op, input, parameters, activations, save=False)[0]
    check(output.shape == input.shape, op, ": expected as many outputs of the last layer as features of the input, ",
          input.shape[1], ", got ", output.shape[1])  # fmt: skip
    return (output - input).square_().mean(dim=-1)


def mlp_with_hidden(input: Tensor, parameters: Sequence[Tensor], activations: int) -> tuple[Tensor, list[Tensor]]:
    """``fastnn::mlp_with_hidden``: the output, and what backward needs of each layer."""
    return _forward("mlp_with_hidden", input, parameters, activations, save=True)


class Plan(NamedTuple):
    """What a call makes of all but the values of its tensors."""

    chain: Chain
    activations: list[int]
    keeps_input: tuple[bool, ...]
    launch: _launch.Launcher | None  # of all layers at once
    launches: list[_launch.Launcher | None]  # else of each layer, None where it is stock's


_plans = _launch.Plans()


def _forward(
    op: str, input: Tensor, parameters: Sequence[Tensor], code: int, save: bool
) -> tuple[Tensor, list[Tensor]]:
    target = _launch.target_of(input.device)
    precision = _launch.dot_precision(input.dtype, "linear", target)
    key = (op, code, save, target, precision, _launch.facts(input), *map(_launch.facts, parameters))
    plan = _plans.get(key)
    if plan is None:
        plan = _plans.keep(key, _plan_forward(op, input, parameters, code, target, precision))
    weights, biases = split_parameters(parameters, plan.chain.layers)
    if plan.launch is not None:
        return _run_chain(plan, plan.launch, input, weights, biases, save)
    x, saved = input, []
    for i, (weight, bias, activation) in enumerate(zip(weights, biases, plan.activations, strict=True)):
        x, kept = _run_layer(plan.launches[i], x, weight, bias, activation, save and plan.keeps_input[i])
        # The output itself serves for the last layer, unless the derivative needs the activation's input.
        if save and (kept is not None or i + 1 < plan.chain.layers):
            saved.append(x if kept is None else kept)
    return x, saved


def _plan_forward(
    op: str, input: Tensor, parameters: Sequence[Tensor], code: int, target: _launch.Target, precision: str
) -> Plan:
    activations = _numbers(op, code)
    layers = len(activations)
    check(len(parameters) in (layers, 2 * layers), op, ": expected ", layers, " weights and ", layers,
          " or no biases, got ", len(parameters), " parameters")  # fmt: skip
    weights, biases = split_parameters(parameters, layers)
    chain = _check_chain(op, input, weights, activations)
    _check_biases(chain, biases)
    keeps_input = tuple(map(_keeps_input, activations))
    config = chain_config(chain.widths, chain.rows, input.dtype, precision, target)
    if config is not None:
        launch = _chain_launcher(chain, activations, keeps_input, config, precision, target)
        return Plan(chain, activations, keeps_input, launch, [])
    launches = [_layer_launcher(chain, i, activation, precision, target) for i, activation in enumerate(activations)]
    return Plan(chain, activations, keeps_input, None, launches)


def _constexprs(chain: Chain, activations: Sequence[int], config: Config, precision: str) -> dict[str, Any]:
    return {
        "WIDTHS": tuple(chain.widths),
        "TILES": tuple(_launch.padded(width) for width in chain.widths),
        "ACTIVATIONS": tuple(activations),
        "LAYERS": chain.layers,
        "OPERAND": _launch.operand_dtype(chain.kind.dtype),
        "PRECISION": precision,
        **config.options(),
    }


def _chain_launcher(
    chain: Chain, activations: Sequence[int], keeps_input: tuple[bool, ...], config: Config, precision: str,
    target: _launch.Target,
) -> _launch.Launcher:  # fmt: skip
    constexprs = _constexprs(chain, activations, config, precision) | {"KEEPS_INPUT": keeps_input}
    tiles = triton.cdiv(chain.rows, config.block_rows)
    if not is_resident(chain.widths, chain.rows, chain.kind.dtype, precision, config, target):
        return _launch.Launcher(chain_forward, (tiles,), chain.kind.device, **constexprs)
    del constexprs["BLOCK_IN"], constexprs["BLOCK_OUT"]
    return _launch.Launcher(resident_chain_forward, (target.processors,), chain.kind.device, **constexprs)


def _run_chain(
    plan: Plan, launch: _launch.Launcher, input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
    save: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    chain = plan.chain
    output = input.new_empty(chain.rows, chain.widths[-1])
    saved: list[Tensor | None] = [None] * chain.layers
    if save:
        saved[:-1] = [input.new_empty(chain.rows, width) for width in chain.widths[1:-1]]
        saved[-1] = torch.empty_like(output) if plan.keeps_input[-1] else None
    launch(input.contiguous(), _contiguous(weights), _contiguous(biases), tuple(saved), output, chain.rows)
    return output, [tensor for tensor in saved if tensor is not None]


def _layer_launcher(
    chain: Chain, layer: int, activation: int, precision: str, target: _launch.Target
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
        ACTIVATION=activation,
        OPERAND=_launch.operand_dtype(chain.kind.dtype),
        PRECISION=precision,
        **config.options(),
    )


def _run_layer(
    launch: _launch.Launcher | None, x: Tensor, weight: Tensor, bias: Tensor | None, activation: int, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """The layer's output, and with ``keep`` the activation's input."""
    if launch is None:
        with _launch.without_autocast(x.device):
            sums = F.linear(x, weight, bias)
            return ACTIVATIONS[ACTIVATION_NAMES[activation]](sums), sums if keep else None
    rows = x.shape[0]
    output = x.new_empty(rows, weight.shape[0])
    kept = torch.empty_like(output) if keep else None
    launch(x.contiguous(), *_contiguous((weight, bias)), kept, output, rows)
    return output, kept


# ---- backward ---------------------------------------------------------------------------------------------


def mlp_backward(
    grad_output: Tensor, input: Tensor, weights: Sequence[Tensor], activations: int, output: Tensor,
    hidden: Sequence[Tensor], input_wanted: bool, weights_wanted: bool, biases_wanted: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """``fastnn::mlp_backward``: grad_output and output (rows, out of the last), hidden as mlp_with_hidden gave it.
    A gradient that is not wanted comes back empty."""
    op = "mlp_backward"
    target = _launch.target_of(input.device)
    precision = _launch.dot_precision(input.dtype, "linear", target)
    tensors = (grad_output, input, *weights, output, *hidden)
    key = (op, activations, target, precision, input_wanted, biases_wanted, len(weights), *map(_launch.facts, tensors))
    plan = _plans.get(key)
    if plan is None:
        numbers = _numbers(op, activations)
        chain = _check_chain(op, input, weights, numbers)
        check_same_kind(chain.kind, grad_output, "grad_output")
        check_sizes(op, grad_output, (chain.rows, chain.widths[-1]), "grad_output")
        _check_saved(chain, _saved(numbers, output, hidden), len(hidden))
        launch = _backward_launcher(chain, numbers, precision, target)
        plan = _plans.keep(key, Plan(chain, numbers, (), launch, []))
    chain, numbers, saved = plan.chain, plan.activations, _contiguous(_saved(plan.activations, output, hidden))
    with _launch.without_autocast(input.device):
        if plan.launch is not None:
            grad_sums, grad_biases, grad_input = _chain_gradients(
                chain, plan.launch, grad_output, weights, saved, input_wanted, biases_wanted
            )
        else:
            grad_sums, grad_biases, grad_input = _layer_gradients(
                chain, grad_output, weights, numbers, saved, input_wanted, biases_wanted
            )
        grad_weights = []
        if weights_wanted:
            layer_inputs = [input, *map(_layer_output, numbers[:-1], saved[:-1])]
            grad_weights = [g.t() @ x for g, x in zip(grad_sums, layer_inputs, strict=True)]
    return input.new_empty(0, chain.widths[0]) if grad_input is None else grad_input, grad_weights, grad_biases


def _saved(activations: Sequence[int], output: Tensor, hidden: Sequence[Tensor]) -> list[Tensor]:
    """The saved tensors, one a layer, with ``output`` standing in where it serves."""
    return list(hidden) if _keeps_input(activations[-1]) else [*hidden, output]


def _check_saved(chain: Chain, saved: Sequence[Tensor], hidden: int) -> None:
    op = chain.kind.op
    check(len(saved) == chain.layers, op, ": expected ", chain.layers - len(saved) + hidden, " hidden tensors, got ",
          hidden)  # fmt: skip
    for tensor, width in zip(saved, chain.widths[1:], strict=True):
        check_same_kind(chain.kind, tensor, "hidden")
        check_sizes(op, tensor, (chain.rows, width), "hidden")


def _backward_launcher(
    chain: Chain, activations: Sequence[int], precision: str, target: _launch.Target
) -> _launch.Launcher | None:
    config = chain_config(chain.widths, chain.rows, chain.kind.dtype, precision, target, backward=True)
    if config is None:
        return None
    tiles = triton.cdiv(chain.rows, config.block_rows)
    constexprs = _constexprs(chain, activations, config, precision)
    return _launch.Launcher(chain_backward, (tiles,), chain.kind.device, **constexprs)


def _layer_output(activation: int, saved: Tensor) -> Tensor:
    return ACTIVATIONS[ACTIVATION_NAMES[activation]](saved) if _keeps_input(activation) else saved


def _chain_gradients(
    chain: Chain, launch: _launch.Launcher, grad_output: Tensor, weights: Sequence[Tensor], saved: tuple[Tensor, ...],
    input_wanted: bool, biases_wanted: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:  # fmt: skip
    """The gradients before each activation, those of the biases, and the input's."""
    grad_sums = tuple(torch.empty_like(tensor) for tensor in saved)
    bias_parts: tuple[Tensor | None, ...] = (None,) * chain.layers
    if biases_wanted:
        bias_parts = tuple(
            grad_output.new_empty(launch.grid[0], width, dtype=torch.float32) for width in chain.widths[1:]
        )
    grad_input = grad_output.new_empty(chain.rows, chain.widths[0]) if input_wanted else None
    launch(grad_output.contiguous(), _contiguous(weights), saved, grad_sums, bias_parts, grad_input, chain.rows)
    # Parts are added up in a fixed order: results repeat bit for bit.
    grad_biases = [parts.sum(0).to(grad_output.dtype) for parts in bias_parts if parts is not None]
    return list(grad_sums), grad_biases, grad_input


def _layer_gradients(
    chain: Chain, grad: Tensor, weights: Sequence[Tensor], activations: Sequence[int], saved: tuple[Tensor, ...],
    input_wanted: bool, biases_wanted: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:  # fmt: skip
    """The same by stock's kernels."""
    grad_sums: list[Tensor] = []
    for i in reversed(range(chain.layers)):
        grad = _STOCK_GRADIENTS[ACTIVATION_NAMES[activations[i]]](grad, saved[i])
        grad_sums.insert(0, grad)
        if i > 0 or input_wanted:
            grad = grad @ weights[i]
    grad_biases = [g.sum(0) for g in grad_sums] if biases_wanted else []
    return grad_sums, grad_biases, grad if input_wanted else None


_aten = torch.ops.aten
_STOCK_GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "identity": lambda grad, saved: grad,
    "relu": lambda grad, saved: _aten.threshold_backward(grad, saved, 0),
    "tanh": _aten.tanh_backward,
    "sigmoid": _aten.sigmoid_backward,
    "gelu": _aten.gelu_backward,
    "gelu_tanh": lambda grad, saved: _aten.gelu_backward(grad, saved, approximate="tanh"),
    "silu": _aten.silu_backward,
    "leaky_relu": lambda grad, saved: _aten.leaky_relu_backward(grad, saved, 0.01, True),
}
