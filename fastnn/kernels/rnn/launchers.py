"""Launchers of the recurrent kernels, and the products with a layer's input."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from fastnn.kernels import _launch, _precision, _target
from fastnn.kernels._activation import PORTABLE, PTX, PTX_ROUGH
from fastnn.kernels.rnn.plan import PRODUCT_STEPS, Config
from fastnn.kernels.rnn.problem import Problem
from fastnn.recurrent_modes import NUMBER_OF


def launcher(problem: Problem, kernel: Any, config: Config, *optional: Tensor | None) -> _launch.Launcher:
    """``optional``: the arguments that may be None, for each combination of which a kernel is compiled."""
    key = (kernel, *(tensor is None for tensor in optional))
    launcher = problem.kept.get(key)
    if launcher is None:
        grid: tuple[int, ...] = (triton.cdiv(problem.batch, config.block_batch), problem.directions)
        if config.units:
            grid = (*grid, triton.cdiv(problem.hidden, config.units))
        if config.chunk:
            grid = (grid[0], 1, 1 if _target.INTERPRETED else problem.layers)
        constexprs = _constexprs(problem, config)
        launcher = problem.kept[key] = _launch.Launcher(kernel, grid, problem.kind.device, **constexprs)
    return launcher


def _constexprs(problem: Problem, config: Config) -> dict[str, Any]:
    own: dict[str, Any] = {}
    if config.units or config.chunk:
        own = {"GATES": problem.gates, **_launch.meeting_options()}
    if config.units:
        own |= {"UNITS": config.units, "PARTS": min(config.num_warps, _target.padded(problem.hidden) // 16)}
    if config.chunk:
        own |= {"LAYERS": problem.layers, "PRODUCT_STEPS": PRODUCT_STEPS,
                "BLOCK_K": min(_target.padded(problem.hidden), 128 // problem.kind.dtype.itemsize)}  # fmt: skip
    else:
        own["DIRECTIONS"] = problem.directions
    return {
        **own,
        "MODE": NUMBER_OF[problem.mode],
        "HIDDEN": problem.hidden,
        "TILE": _target.padded(problem.hidden),
        "BLOCK_BATCH": config.block_batch,
        "OPERAND": _precision.operand_dtype(problem.kind.dtype),
        "PRECISION": problem.precision,
        "MATH": _math(problem),
        "num_warps": config.num_warps,
        "num_stages": 1,
    }


def _math(problem: Problem) -> int:
    """How the kernels compute tanh and sigmoid."""
    if _target.INTERPRETED or problem.target.backend == "hip":
        return PORTABLE.value
    return (PTX_ROUGH if problem.kind.dtype.itemsize == 2 else PTX).value


def run_spread(launch: _launch.Launcher, steps: int, tensors: Sequence[Tensor | None], sizes: Sequence[int]) -> None:
    """``steps`` steps in one launch. Under the interpreter, which runs programs one after another, each step has a
    launch of its own, or the first program would wait for the others for ever."""
    each = 1 if _target.INTERPRETED and launch.grid[2] > 1 else steps
    for first in range(0, steps, each):
        launch(*tensors, first, first + each, *sizes)


def run_wave(launch: _launch.Launcher, layers: int, chunk: int, tensors: Sequence[Any], sizes: Sequence[int]) -> None:
    """All layers in one launch; under the interpreter each in one of its own, for the same reason."""
    for first in range(0, layers, launch.grid[2]):
        launch(*tensors, first, chunk, *sizes)


def input_products(problem: Problem, layer: int, x: Tensor, gates: Tensor) -> None:
    """What x (rows, in), or in the first layer the input as given, contributes to gates (directions, rows, ..)."""
    flat = x.reshape(problem.rows, x.shape[-1])
    with _launch.without_autocast(x.device):
        for direction in range(problem.directions):
            w_ih, _, b_ih, _ = problem.weights_of(layer, direction)
            if b_ih is None:
                torch.mm(flat, w_ih.t(), out=gates[direction])
            else:
                torch.addmm(b_ih, flat, w_ih.t(), out=gates[direction])


def both(states: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    """Of h and c; None for what there is not."""
    h, c = (*states, None, None)[:2]
    return h, c


def strides_of_gates(problem: Problem, layer: int) -> tuple[int, int]:
    """From step to step and from sequence to sequence: rows of gates lie as those of x."""
    return (1, problem.steps) if layer == 0 and problem.batch_first else (problem.batch, 1)
