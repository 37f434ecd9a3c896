"""Which kernels run a recurrent network on a GPU, in which configuration, and which networks are left to stock's."""

from typing import NamedTuple

import torch
import triton

from fastnn.kernels import _precision, _target
from fastnn.kernels.rnn.problem import Problem
from fastnn.recurrent_modes import MODE_OF


class Config(NamedTuple):
    block_batch: int
    num_warps: int
    units: int = 0  # hidden units of a program where programs share out the recurrent weights; 0: each has them all
    chunk: int = 0  # steps that a layer is behind the one below it where all run at once; 0: one layer after another


class RnnNetwork(NamedTuple):
    """What the choice of kernels depends on."""

    mode: str
    hidden: int
    batch: int
    dtype: torch.dtype
    precision: str = "ieee"
    inputs: int = 0  # features of the input
    layers: int = 1
    directions: int = 1
    packed: bool = False
    training: bool = False  # a forward whose backward follows, or that backward

    @property
    def gates(self) -> int:
        return MODE_OF[self.mode].gates


def cudnn_keeps_weights(network: RnnNetwork, target: _target.Target, forward: bool) -> bool:
    """Whether torch asks cuDNN for an algorithm that keeps the recurrent weights on chip (``get_algo`` in its
    ATen/native/cudnn/RNN.cpp); else each step is a product that reads them again.

    On cards of sm_80 and later, which are all that Triton supports: PERSIST_STATIC_SMALL_H for any dtype but float64,
    whose backward ends at narrower networks than forward; PERSIST_STATIC for float16 alone, never for GRU.
    """
    if target.backend != "cuda" or network.packed or network.dtype is torch.float64:
        return False
    simple, hidden, batch = network.gates == 1, network.hidden, network.batch
    if hidden <= ((384 if forward else 256) if simple else (192 if forward else 128)):
        return True
    if network.dtype is not torch.float16 or network.mode == "GRU":
        return False
    one_by_one = network.layers == 1 and network.directions == 1
    in_blocks = hidden <= 1024 and hidden % 128 == 0 and network.inputs % 128 == 0 and batch <= 128 and batch % 8 == 0
    large_card = target.processors >= 98 and int(target.arch) % 10 != 6
    return one_by_one and in_blocks and large_card and not (simple and batch >= 96 and hidden >= 896)


_WIDEST_WITHOUT_MATRIX_UNITS = 32
# Cards whose matrix units add up in memory of their own. Of several gates, Triton 3.9 brings the sums to so many
# registers that kernels with wide weights spill.
_TENSOR_MEMORY = (100, 103)
# Bytes of such weights up to which they don't (tools/gpu_check.py), by eight sequences; in a wave, whose programs
# multiply the input too, fewer.
_WIDEST_GATES, _WIDEST_GATES_IN_WAVE = 131072, 98304
_WIDEST_SPREAD = 2048
# Bytes of a program's weights that fill half of four warps' registers, 128 of 4 bytes a lane. Each step reads them all,
# and the compiler loads them ahead of the products: with twice as many LSTM's inference spills (sm_90, sm_100).
_MOST_WEIGHTS_OF_FOUR_WARPS = 4 * 32 * 128 * 4
_FEWEST_SPREAD_STEPS = 4  # fewer, a cell's one among them, do not make up for its launches
_LARGEST_SPREAD_BATCH = 64  # beyond it cuDNN's product a step keeps the processors busy


def rnn_config(network: RnnNetwork, target: _target.Target) -> Config | None:
    """The configuration, or None where stock's kernels are at least as fast.

    Where the recurrent weights fit on one processor, each program keeps them all and has a tile of the batch. Where
    they don't, programs share them out and meet after each step, unless cuDNN too keeps them on chip: its kernels need
    no barrier between processors. Forward and backward of one training are chosen together, since cuDNN hands over
    nothing that ours could read: by backward, which takes the greater part of the time, and where cuDNN's way ends
    earlier. Inference goes by forward.
    """
    hidden, gates, dtype = network.hidden, network.gates, network.dtype
    if dtype is torch.float64 or hidden == 0:
        return None
    tile = _target.padded(hidden)
    fast = _precision.uses_matrix_units(dtype, network.precision, target)
    # Without matrix units LSTM's four dots at a step are more than Triton 3.9 compiles: LLVM aborts.
    if not fast and (gates == 4 or tile > _WIDEST_WITHOUT_MATRIX_UNITS):
        return None
    weights = gates * tile * tile * dtype.itemsize
    # Beside the weights, a sequence's float32 gates on their way to another layout, and its state on that to a dot.
    most = (target.shared_memory - weights) // (tile * (4 * (1 if gates == 1 else 4) + dtype.itemsize))
    if target.arch in _TENSOR_MEMORY and gates > 1:
        most = min(most, 8 if weights <= _WIDEST_GATES else 0)
    block_batch = _block_batch(network, target, most)
    # On AMD's cards the weights of several gates are kept in registers.
    if block_batch > most or (target.backend == "hip" and gates > 1 and weights > 24576):
        return _spread_config(network, target) if fast else None
    # Four warps issue the fewest instructions in all; of more weights they have too few registers.
    num_warps = 4 if gates * tile * tile <= 16384 and tile * dtype.itemsize <= 256 else 8
    return Config(block_batch, num_warps)


def _block_batch(network: RnnNetwork, target: _target.Target, most: int) -> int:
    """Sequences of a program: the fewest with which all programs run at once, since a step's arithmetic grows with
    them; of a large batch more, which share the weights, but not more than ``most`` if there is a choice."""
    fewest = 8 if target.backend == "cuda" else 16  # columns of a matrix instruction
    # Enough sequences for two programs a processor, and few enough sums and operands for the registers.
    many = network.batch * network.directions >= 64 * target.processors
    many = many and network.gates == 1 and network.dtype.itemsize == 2
    if many and most >= 32:
        return 32
    at_once = triton.cdiv(network.batch, fewest) * network.directions <= target.processors
    return fewest if at_once or most < 16 else 16


def _spread_config(network: RnnNetwork, target: _target.Target) -> Config | None:
    hidden, batch, gates, dtype = network.hidden, network.batch, network.gates, network.dtype
    if target.backend == "hip" or hidden > _WIDEST_SPREAD or batch > _LARGEST_SPREAD_BATCH:
        return None
    if cudnn_keeps_weights(network, target, forward=not network.training):
        return None
    tile = _target.padded(hidden)
    stacked = 1 if gates == 1 else 4  # GRU's three gates as well
    for units in (16, 32, 64):
        for block_batch in (8, 16):
            weights = dtype.itemsize * tile * stacked * units
            on_chip = weights + dtype.itemsize * tile * 2 * block_batch
            programs = triton.cdiv(hidden, units) * triton.cdiv(batch, block_batch) * network.directions
            # All programs run at once, one a processor.
            if on_chip <= target.shared_memory and programs <= target.processors:
                num_warps = 8 if tile > 512 or weights > _MOST_WEIGHTS_OF_FOUR_WARPS else 4
                return Config(block_batch, num_warps, units)
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
    weights = itemsize * gates * tile * tile
    if target.arch in _TENSOR_MEMORY and weights * config.block_batch > 8 * _WIDEST_GATES_IN_WAVE:
        return 0
    # Beside the weights, two operands of the product and its sum on its way to memory.
    product = PRODUCT_STEPS * config.block_batch
    on_chip = weights + (product + tile) * 128 + 4 * product * tile
    if programs > target.processors or on_chip > target.shared_memory:
        return 0
    chunk = PRODUCT_STEPS * (2 if steps >= 64 else 1)
    one_by_one = layers * steps + (layers - 1) * 2 * _LAUNCH_STEPS
    at_once = steps + (layers - 1) * chunk + triton.cdiv(steps, chunk) * CHUNK_STEPS + _LAUNCH_STEPS
    return chunk if 1.1 * at_once < one_by_one else 0


def config_of(problem: Problem, training: bool) -> Config | None:
    if ("config", training) not in problem.kept:
        config = None if problem.is_projected else rnn_config(_network(problem, training), problem.target)
        if config is not None and config.units:
            most = 2**31 // problem.hidden  # the programs' meetings are counted with 32 bits
            config = config if _FEWEST_SPREAD_STEPS <= problem.steps < most else None
        problem.kept["config", training] = None if config is None else _with_wavefront(problem, config)
    return problem.kept["config", training]


def _network(problem: Problem, training: bool) -> RnnNetwork:
    return RnnNetwork(
        problem.mode, problem.hidden, problem.batch, problem.kind.dtype, problem.precision, problem.input.shape[-1],
        problem.layers, problem.directions, problem.batch_sizes is not None, training,
    )  # fmt: skip


def _with_wavefront(problem: Problem, config: Config) -> Config:
    gates, itemsize, target = problem.gates, problem.kind.dtype.itemsize, problem.target
    for block_batch in (config.block_batch, 16):  # more sequences a program: fewer programs
        wide = config._replace(block_batch=block_batch)
        chunk = wave_chunk(wide, problem.layers, problem.directions, problem.steps, problem.batch, problem.hidden,
                           gates, itemsize, target)  # fmt: skip
        if chunk:
            if gates > 1 or block_batch > 8:  # with the product in the same kernel, four have too few registers
                wide = wide._replace(num_warps=8)
            return wide._replace(chunk=chunk)
    return config
