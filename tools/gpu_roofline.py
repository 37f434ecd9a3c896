"""What a GPU should give, before one has been asked: bytes, operations and launches of stock, torch.compile and fastnn
for the shapes of tools/gpu_cases.py, the time that an H100's limits allow each, and the ratio to expect. A measurement
(tools/gpu_run.py) is held against this page, and the machine code's issue floor (tools/gpu_check.py).

    python tools/gpu_roofline.py [--write benchmarks/results/gpu_roofline.md]
"""

import argparse
import math
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from gpu_cases import CONV_SHAPES, RNN_SHAPES, Case, all_cases, conv_geometry, float32_precision

from fastnn.kernels import _precision, _target
from fastnn.kernels.conv import plan as _conv_plan
from fastnn.kernels.conv.geometry import Problem, check_problem
from fastnn.kernels.mlp import plan as _mlp_plan
from fastnn.kernels.rnn import plan as _rnn_config

# H100 SXM: data sheet. The shares of a limit that a good kernel reaches are assumed, until they are measured.
BANDWIDTH = 3.35e12  # bytes a second
# Bytes a second from L2, where a convolution's tiles come from: their copies to shared memory pass L1 by (cp.async.cg,
# TMA). Assumed, by what is published of microbenchmarks.
L2_BANDWIDTH = 6e12
PEAK = {"16-bit": 989e12, "tf32": 494e12, "tf32x3": 494e12 / 3, "float32": 67e12}  # operations a second
REACHED = {"cuDNN and cuBLAS": 0.65, "Triton": 0.4, "memory": 0.85, "issue": 0.8}
LAUNCH = 2.5e-6  # seconds from one kernel to the next in a CUDA graph
ISSUE = 4 * 132 * 1.755e9  # instructions of a warp that all schedulers issue a second
ACTIVATION = {"gelu": 34}  # instructions an element, where they are more than a few; of the same machine code
# Seconds that a recurrent step of one gate takes, by its latencies: with the weights on chip; and beyond that, in cuDNN
# a product a step, here a barrier a step.
STEP = {"stock": 1.3e-6, "fastnn": 0.4e-6}
WIDE_STEP = {"stock": 9e-6, "fastnn": 2.5e-6}
TARGET = _target.TARGETS[2]


class Cost(NamedTuple):
    """Of one call: bytes to and from memory, floating-point operations, kernels."""

    bytes: float
    flops: float
    launches: int
    serial: float = 0.0  # seconds that steps take one after another, whatever the limits
    tiles: float = 0.0  # bytes from L2
    apart: float = 0.0  # of ``bytes``, those of kernels that only move them
    issued: float = 0.0  # instructions that are counted, of a thread

    def plus(self, other: "Cost") -> "Cost":
        return Cost(*map(sum, zip(self, other, strict=True)))

    def floor(self, kind: str) -> float:
        """Seconds at the card's limits."""
        return max(self.bytes / BANDWIDTH, self.flops / PEAK[kind])

    def expected(self, kind: str, library: str) -> float:
        """Seconds at the shares of the limits that kernels reach."""
        streamed, apart = ((n / (BANDWIDTH * REACHED["memory"])) for n in (self.bytes - self.apart, self.apart))
        computed = self.flops / (PEAK[kind] * REACHED[library])
        issued = self.issued / 32 / (ISSUE * REACHED["issue"])
        return max(streamed, computed, self.tiles / L2_BANDWIDTH, issued, self.serial) + apart + self.launches * LAUNCH


class Prediction(NamedTuple):
    op: str
    shape: str
    dtype: str
    direction: str
    stock: Cost
    compiled: Cost
    fastnn: Cost
    fused: bool
    kind: str  # of the limit; cuDNN and cuBLAS do without tf32x3

    def seconds(self) -> tuple[float, float, float]:
        """Expected of stock, compile and fastnn."""
        kind = "float32" if self.kind == "tf32x3" else self.kind
        stock, compiled = (cost.expected(kind, "cuDNN and cuBLAS") for cost in (self.stock, self.compiled))
        if self.fused:
            return stock, compiled, self.fastnn.expected(self.kind, "Triton")
        return stock, compiled, self.fastnn.expected(kind, "cuDNN and cuBLAS")

    def row(self) -> tuple[str, ...]:
        kind = "float32" if self.kind == "tf32x3" and not self.fused else self.kind
        stock, compiled, ours = self.seconds()
        return (
            *(self.op, self.shape, f"{self.dtype}{', ' + kind if self.dtype == 'float32' else ''}", self.direction),
            *(f"{cost.bytes / 1e6:.2f}" for cost in (self.stock, self.compiled, self.fastnn)),
            *(f"{cost.tiles / 1e6:.0f}" if cost.tiles else "" for cost in (self.stock, self.fastnn)),
            f"{self.fastnn.issued / 1e6:.0f}" if self.fastnn.issued else "",
            f"{self.fastnn.flops / 1e9:.2f}",
            *(str(cost.launches) for cost in (self.stock, self.compiled, self.fastnn)),
            f"{1e6 * max(self.fastnn.floor(kind), self.fastnn.serial):.1f}",
            *(f"{1e6 * seconds:.1f}" for seconds in (stock, compiled, ours)),
            f"{stock / ours:.1f}x",
            f"{compiled / ours:.1f}x",
            "one kernel" if self.fused else "around stock's",
        )


HEADER = ("operator", "shape", "dtype", "direction", "MB stock", "MB compile", "MB fastnn", "MB of tiles stock",
          "MB of tiles fastnn", "M counted instructions fastnn", "GFLOP fastnn",
          "kernels stock", "kernels compile", "kernels fastnn", "floor µs", "stock µs", "compile µs", "fastnn µs",
          "against stock", "against compile", "how")  # fmt: skip


def conv_tiles(problem: Problem, precision: str) -> tuple[float, float]:
    """Bytes of tiles from L2 in a forward convolution: of a library, whose tiles are as wide as the channels and
    whose clusters share weights, so that the patches are left; and here. Few channels come through L1."""
    if not _conv_plan.is_tap_by_tap(problem):
        return 0.0, 0.0
    column = problem.depth * problem.kind.dtype.itemsize
    patches = float(problem.images * math.prod(problem.conv_size) * column)
    config, together = _conv_plan.forward_config(problem, precision, TARGET)
    blocks = math.ceil(problem.out_channels / config.block_out) * math.ceil(problem.pooled_pixels / config.block_pixels)
    places = problem.places * config.block_pixels
    return patches, float(blocks * column * (places + problem.places // together * config.block_out))


def _copy(values: float, size: int, times: int = 1) -> Cost:
    """Of a kernel that only copies, as to another memory format: read and written."""
    moved = 2.0 * values * size * times
    return Cost(moved, 0.0, times, apart=moved)


def conv_predictions(case: Case) -> Iterator[Prediction]:
    """Stock in a memory format of its own, without what cuDNN converts. Here with all that the launchers copy: few
    channels are packed, a sum tap by tap reads channels last, and so does backward."""
    name, last = case.sizes  # type: ignore[misc]
    precision, kind = _precision_of(case, "conv")
    sizes, out_channels, kernel, *_ = CONV_SHAPES[name]
    with torch.device("meta"):
        format = torch.channels_last if last else torch.contiguous_format
        input = torch.empty(sizes, dtype=case.dtype, memory_format=format)
        weight = torch.empty(out_channels, sizes[1], *[kernel] * (len(sizes) - 2), dtype=case.dtype)
    problem = check_problem("", input, weight, None, conv_geometry(name))
    size = case.dtype.itemsize
    pooled = problem.images * out_channels * math.prod(problem.out_size)
    ends = size * (input.numel() + weight.numel() + pooled)
    fused = _conv_plan.is_fused(problem, "forward", precision, TARGET)
    flops = problem.work
    patches, tiles = conv_tiles(problem, precision)
    tap_by_tap = _conv_plan.is_tap_by_tap(problem)
    input_last = _copy(input.numel(), size, int(tap_by_tap and not last))
    weight_last = _copy(weight.numel(), size, int(_conv_plan.copies_weight(problem)))
    # conv writes; the bias is added, reading and writing; so does ReLU; pool reads, and writes its int64 indices.
    # compile's conv writes and its one kernel behind reads.
    values = problem.images * out_channels * math.prod(problem.conv_size)
    written = values * size
    apart = pooled * size
    stock = Cost(ends + written * 6 + pooled * 8, flops, 4, 0, patches, apart + written * 5 + pooled * 8)
    compiled = Cost(ends + written * 2, flops, 2, 0, patches, apart + written)
    ours = Cost(ends + written * 4, flops, 3, 0, patches, apart + written * 3)
    if fused:
        repeated = max(problem.recomputed, 1)
        issued = values * _conv_plan.instructions(problem, "forward", precision, TARGET)
        ours = Cost(ends, flops * repeated, 1, 0, tiles, issued=issued).plus(input_last).plus(weight_last)
        if _conv_plan.is_packed(problem):
            moved = values * _conv_plan.conversion(problem, "forward")
            ours = ours.plus(Cost(moved, 0.0, 2, apart=moved))
    about = (case.op, case.shape, str(case.dtype)[6:])
    yield Prediction(*about, "forward", stock, compiled, ours, fused, kind)
    # Beside forward: the pool's and ReLU's gradients written, read and read again by both products and the bias's sum.
    convolutions = ends + written * 3
    backward = ends + written * (1 + 3 + 3) + pooled * (size + 8)
    stock = stock.plus(Cost(backward, 2 * flops, 5, 0, 2 * patches, backward - convolutions))
    backward = ends + written * (1 + 2) + pooled * (size + 2)
    compiled = compiled.plus(Cost(backward, 2 * flops, 3, 0, 2 * patches, backward - convolutions))
    gradients_last = _copy(pooled, size, int(not last)).plus(_copy(pooled, 1, int(not last)))
    fused_back = _conv_plan.is_fused(problem, "backward", precision, TARGET)
    if fused_back:
        # What the fused gradients load comes through L1, except the patches of the weight's.
        issued = values * _conv_plan.instructions(problem, "backward", precision, TARGET)
        back = Cost(ends + pooled * (size + 2), 2 * flops * problem.recomputed, 2, 0, patches, issued=issued)
        # Weight and bias are sums over parts, then rounded, and the weight's brought into its own order.
        with torch.device("meta"):
            grad = torch.empty(problem.sizes(problem.out_size), dtype=case.dtype)
        plan = _conv_plan.plan_backward(
            grad, grad.to(torch.uint8), input, weight, conv_geometry(name).flat(), precision, TARGET
        )
        parts = 0 if plan.launch_weight is None else plan.launch_weight.grid[0]
        moved = 2.0 * parts * (weight.numel() + out_channels) * 4
        sums = Cost(moved, 0.0, 2 * (1 + (size == 2)), apart=moved).plus(_copy(weight.numel(), size, int(tap_by_tap)))
        back = back.plus(sums).plus(input_last).plus(weight_last)
    else:
        spread = pooled * (size + 1) + written
        back = Cost(ends + spread + written * 3, 2 * flops, 4, 0, 2 * patches, spread + written)
        # Ours is channels last, and stock's convolution brings it into the input's format.
        back = back.plus(_copy(values, size, int(not last)))
    yield Prediction(*about, "training", stock, compiled, ours.plus(back).plus(gradients_last), fused and fused_back,
                     kind)  # fmt: skip


def mlp_predictions(case: Case) -> Iterator[Prediction]:
    rows, widths, activation = case.sizes  # type: ignore[misc]
    precision, kind = _precision_of(case, "linear")
    size, layers = case.dtype.itemsize, len(widths) - 1
    weights = size * sum(a * b for a, b in pairwise(widths))
    flops = 2.0 * rows * sum(a * b for a, b in pairwise(widths))
    ends = size * rows * (widths[0] + widths[-1]) + weights
    hidden = size * rows * sum(widths[1:-1])
    one = _mlp_plan.chain_config(widths, rows, case.dtype, precision, TARGET) is not None
    # Each layer's sum is written, read, activated, written and read by the next.
    stock = Cost(ends + 4 * hidden + 2 * size * rows * widths[-1], flops, 2 * layers)
    compiled = Cost(ends + 4 * hidden, flops, 2 * layers)
    issued = float(rows * sum(widths[1:]) * ACTIVATION.get(activation, 0))
    ours = Cost(ends, flops, 1, issued=issued) if one else Cost(ends + 2 * hidden, flops, layers, issued=issued)
    about = (case.op, case.shape, str(case.dtype)[6:])
    yield Prediction(*about, "forward", stock, compiled, ours, one, kind)
    stock = Cost(3 * ends + 11 * hidden, 3 * flops, 6 * layers)
    compiled = Cost(3 * ends + 9 * hidden, 3 * flops, 5 * layers)
    # hidden written, read by both backward launches; the gradients before it written and read. Of each layer a product
    # and a sum over parts, which is then rounded.
    one = _mlp_plan.chain_config(widths, rows, case.dtype, precision, TARGET, backward=True) is not None
    fused = Cost(3 * ends + 5 * hidden, 3 * flops, 2 + (2 + (size == 2)) * layers, issued=2 * issued)
    ours = fused if one else compiled
    yield Prediction(*about, "training", stock, compiled, ours, one, kind)


def rnn_predictions(case: Case) -> Iterator[Prediction]:
    """None of networks that stock's kernels run."""
    name, mode, packed = case.sizes  # type: ignore[misc]
    precision, kind = _precision_of(case, "rnn")
    length, batch, inputs, hidden, layers = RNN_SHAPES[name]
    gates = {"GRU": 3, "LSTM": 4}.get(mode, 1)
    size, rows = case.dtype.itemsize, length * batch
    network = _rnn_config.RnnNetwork(mode, hidden, batch, case.dtype, precision, inputs, layers, packed=packed)
    flops = sum(2.0 * rows * gates * hidden * (hidden + (hidden if i else inputs)) for i in range(layers))
    ends = size * rows * (inputs + hidden)
    between = size * rows * layers * (2 * gates + 1) * hidden
    of_gates = 1 + 0.25 * (gates - 1)
    about = (case.op, case.shape, str(case.dtype)[6:])
    for direction in ("forward", "training"):
        config = _rnn_config.rnn_config(network._replace(training=direction == "training"), TARGET)
        if config is None:
            continue
        chunk = _rnn_config.wave_chunk(config, layers, 1, length, batch, hidden, gates, size, TARGET)
        steps = WIDE_STEP if config.units else STEP
        serial = {who: length * layers * step * of_gates for who, step in steps.items()}
        # cuDNN: the input products and the steps in about three kernels a layer.
        # Programs that share weights need their meeting places made and their state copied.
        launches = 7 * layers if config.units else 2 * layers
        if chunk:  # each layer a chunk of steps behind the one below, and its product with a chunk's input
            in_steps = length + (layers - 1) * chunk + math.ceil(length / chunk) * _rnn_config.CHUNK_STEPS
            serial["fastnn"], launches = in_steps * STEP["fastnn"] * of_gates, 3
        if direction == "forward":
            stock = Cost(ends + between, flops, 3 * layers, serial["stock"])
            ours = Cost(ends + between, flops, launches, serial["fastnn"])
        else:
            stock = Cost(3 * (ends + between), 3 * flops, 8 * layers, 2.2 * serial["stock"])
            # Of each layer three or four products and sums beside the recurrence.
            ours = Cost(3 * (ends + between), 3 * flops, 4 * layers + 2 * launches, 2.2 * serial["fastnn"])
        yield Prediction(*about, direction, stock, stock, ours, True, kind)


_OF = {"conv_relu_max_pool": conv_predictions, "mlp": mlp_predictions, "rnn": rnn_predictions}


def _precision_of(case: Case, layer: str) -> tuple[str, str]:
    """A dot's precision, and the limit that it has."""
    with float32_precision(case):
        precision = _precision.dot_precision(case.dtype, layer, TARGET)
    kind = "16-bit" if case.dtype.itemsize == 2 else "float32" if precision == "ieee" else precision
    return precision, kind


def predictions(case: Case) -> dict[str, Prediction]:
    """By direction; none where nothing is predicted."""
    if case.sizes is None:
        return {}
    return {prediction.direction: prediction for prediction in _OF[case.op](case)}


def all_predictions() -> Iterator[Prediction]:
    for case in all_cases():
        yield from predictions(case).values()


def page() -> str:
    rows = [prediction.row() for prediction in all_predictions()]
    assumed = ", ".join(f"{share:.0%} of its limit for {who}" for who, share in REACHED.items())
    peaks = ", ".join(f"{peak / 1e12:.0f} TFLOP/s {kind}" for kind, peak in PEAK.items())
    steps = [f"{1e6 * step[who]:.1f} µs" for step in (STEP, WIDE_STEP) for who in ("stock", "fastnn")]
    lines = [
        "# What an H100 should give",
        "",
        "Predictions, not measurements: `make gpu-roofline` computes them, `make gpu` measures. Bytes and operations",
        f"are counted. The limits are the data sheet's: {BANDWIDTH / 1e12:.2f} TB/s, {peaks}.",
        f"Assumed: {assumed};",
        f"{L2_BANDWIDTH / 1e12:.0f} TB/s from L2, which a convolution's tiles come from;",
        f"{LAUNCH * 1e6:.1f} µs from kernel to kernel in a CUDA graph; {steps[0]} a recurrent step of one gate in",
        f"cuDNN and {steps[1]} here, and where one processor cannot hold the weights {steps[2]} and {steps[3]}.",
        "cuDNN is taken to run one layer after another, which it need not, and to convert no memory format.",
        "The floor is the time at the limits themselves, or of the steps.",
        "",
        *(f"| {' | '.join(line)} |" for line in (HEADER, ["---"] * len(HEADER), *rows)),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    text = page()
    if options.write:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
