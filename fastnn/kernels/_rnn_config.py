"""Which kernels run a recurrent network on a GPU, in which configuration, and which networks are left to stock's."""

from typing import NamedTuple

import torch
import triton

from fastnn.kernels import _precision, _target
from fastnn.kernels._rnn_problem import Problem


class Config(NamedTuple):
    block_batch: int
    num_warps: int
    units: int = 0  # hidden units of a program where programs share out the recurrent weights; 0: each has them all
    chunk: int = 0  # steps that a layer is behind the one below it where all run at once; 0: one layer after another


_WIDEST_WITHOUT_MATRIX_UNITS = 32
# Up to here cuDNN has kernels that keep the weights on chip too, and needs no barrier between processors.
_WIDEST_OF_CUDNN = {1: 384, 3: 192, 4: 192}
_WIDEST_SPREAD = 2048
_FEWEST_SPREAD_STEPS = 4  # fewer, a cell's one among them, do not make up for its launches
_LARGEST_SPREAD_BATCH = 64  # beyond it cuDNN's product a step keeps the processors busy


def rnn_config(
    mode: str, hidden: int, batch: int, directions: int, dtype: torch.dtype, precision: str, target: _target.Target,
    packed: bool = False,
) -> Config | None:  # fmt: skip
    """The configuration, or None where stock's kernels are at least as fast.

    Where the recurrent weights fit on one processor, each program keeps them all and has a tile of the batch. Where
    they don't, programs share them out and meet after each step, if that beats cuDNN: not where it has kernels for such
    a size, which it has not for packed sequences.
    """
    if dtype is torch.float64 or hidden == 0:
        return None
    tile = _target.padded(hidden)
    gates = {"GRU": 3, "LSTM": 4}.get(mode, 1)
    fast = _precision.uses_matrix_units(dtype, precision, target)
    # Without matrix units LSTM's four dots at a step are more than Triton 3.9 compiles: LLVM aborts.
    if not fast and (gates == 4 or tile > _WIDEST_WITHOUT_MATRIX_UNITS):
        return None
    exchanged = 2 * 16 * tile * dtype.itemsize  # the state, on its way from a step's result to the next's operand
    weights = gates * tile * tile * dtype.itemsize
    # On AMD's cards the weights of several gates are kept in registers.
    if weights + exchanged > target.shared_memory or (target.backend == "hip" and gates > 1 and weights > 24576):
        return _spread_config(gates, hidden, batch, directions, dtype, target, packed) if fast else None
    # Enough sequences for two programs a processor: the weights are shared by more rows.
    many = batch * directions >= 64 * target.processors and gates == 1
    block_batch = 32 if many else 16
    num_warps = 16 if tile >= 128 and gates == 4 else 8 if tile >= 128 or (tile >= 64 and gates > 1) else 4
    return _target.tuned(Config(block_batch, num_warps), target, "rnn", gates, dtype.itemsize, precision, tile, many)


def _spread_config(
    gates: int, hidden: int, batch: int, directions: int, dtype: torch.dtype, target: _target.Target, packed: bool
) -> Config | None:
    if target.backend == "hip" or hidden > _WIDEST_SPREAD or batch > _LARGEST_SPREAD_BATCH:
        return None
    # cuDNN keeps float16 weights on chip at any width, float32 ones up to some.
    if not packed and (dtype is torch.float16 or hidden <= _WIDEST_OF_CUDNN[gates]):
        return None
    tile, block_batch = _target.padded(hidden), 16
    for units in (16, 32, 64):
        on_chip = dtype.itemsize * tile * (gates * units + 2 * block_batch)
        programs = triton.cdiv(hidden, units) * triton.cdiv(batch, block_batch) * directions
        # All programs run at once, one a processor.
        if on_chip <= target.shared_memory and programs <= target.processors:
            config = Config(block_batch, 8 if tile > 512 else 4, units)
            return _target.tuned(config, target, "rnn spread", gates, dtype.itemsize, tile, units)
    return None


PRODUCT_STEPS = 8  # of a product of a layer with the output of the one below it, while both run
_WIDEST_WAVE = 128
# In steps: a launch; the meeting at the end of a chunk, with the product of the next.
_LAUNCH_STEPS = 6
CHUNK_STEPS = 4


def wave_chunk(
    config: Config, layers: int, directions: int, steps: int, batch: int, hidden: int, gates: int, itemsize: int,
    target: _target.Target,
) -> int:  # fmt: skip
    """Steps that each layer is behind the one below it where that is faster than one layer after another, else 0."""
    tile, programs = _target.padded(hidden), layers * triton.cdiv(batch, config.block_batch)
    if config.units or layers == 1 or directions > 1 or target.backend == "hip" or tile > _WIDEST_WAVE:
        return 0
    # Beside the weights, two operands of the product and its sum on its way to memory.
    product = PRODUCT_STEPS * config.block_batch
    on_chip = itemsize * gates * tile * tile + (product + tile) * 128 + 4 * product * tile
    if programs > target.processors or on_chip > target.shared_memory:
        return 0
    chunk = PRODUCT_STEPS * (2 if steps >= 64 else 1)
    one_by_one = layers * steps + (layers - 1) * 2 * _LAUNCH_STEPS
    at_once = steps + (layers - 1) * chunk + triton.cdiv(steps, chunk) * CHUNK_STEPS + _LAUNCH_STEPS
    return chunk if 1.1 * at_once < one_by_one else 0


def config_of(problem: Problem) -> Config | None:
    if "config" not in problem.kept:
        config = None if problem.is_projected else rnn_config(
            problem.mode, problem.hidden, problem.batch, problem.directions, problem.kind.dtype, problem.precision,
            problem.target, problem.batch_sizes is not None,
        )  # fmt: skip
        if config is not None and config.units:
            most = 2**31 // problem.hidden  # the programs' meetings are counted with 32 bits
            config = config if _FEWEST_SPREAD_STEPS <= problem.steps < most else None
        problem.kept["config"] = None if config is None else _with_wavefront(problem, config)
    return problem.kept["config"]


def _with_wavefront(problem: Problem, config: Config) -> Config:
    gates, itemsize, target = problem.gates, problem.kind.dtype.itemsize, problem.target
    chunk = wave_chunk(config, problem.layers, problem.directions, problem.steps, problem.batch, problem.hidden, gates,
                       itemsize, target)  # fmt: skip
    if not chunk:
        return config
    if target.arch in (100, 103):  # with the product in the same kernel, 16 warps have too few registers each
        config = config._replace(num_warps=min(config.num_warps, 8))
    shape_class = (gates, itemsize, problem.precision, _target.padded(problem.hidden), problem.layers, chunk)
    return _target.tuned(config._replace(chunk=chunk), target, "rnn wave", *shape_class)
