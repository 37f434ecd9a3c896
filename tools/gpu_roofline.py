"""What a GPU should give, before one has been asked: bytes, operations and launches of stock, torch.compile and fastnn
for the benchmark's shapes, the time that an H100's limits allow each, and the ratio to expect. A measurement
(tools/gpu_run.py) is held against this page.

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
from gpu_cases import CONV_SHAPES, MLP_SHAPES, RNN_SHAPES, conv_geometry

from fastnn.kernels import _conv_plan, _mlp_plan, _rnn_config, _target
from fastnn.kernels._conv_geometry import Problem, check_problem
from fastnn.kernels._rnn_problem import MODES

# H100 SXM: data sheet. The shares of a limit that a good kernel reaches are assumed, until they are measured.
BANDWIDTH = 3.35e12  # bytes a second
# Bytes a second from L2, where a convolution's tiles come from: their copies to shared memory pass L1 by (cp.async.cg,
# TMA). Assumed, by what is published of microbenchmarks.
L2_BANDWIDTH = 6e12
PEAK = {"16-bit": 989e12, "tf32": 494e12, "tf32x3": 494e12 / 3, "float32": 67e12}  # operations a second
REACHED = {"cuDNN and cuBLAS": 0.65, "Triton": 0.4, "memory": 0.85}
LAUNCH = 2.5e-6  # seconds from one kernel to the next in a CUDA graph
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

    def floor(self, kind: str) -> float:
        """Seconds at the card's limits."""
        return max(self.bytes / BANDWIDTH, self.flops / PEAK[kind])

    def expected(self, kind: str, library: str) -> float:
        """Seconds at the shares of the limits that kernels reach."""
        streamed, apart = ((n / (BANDWIDTH * REACHED["memory"])) for n in (self.bytes - self.apart, self.apart))
        computed = self.flops / (PEAK[kind] * REACHED[library])
        return max(streamed, computed, self.tiles / L2_BANDWIDTH, self.serial) + apart + self.launches * LAUNCH


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
            f"{self.fastnn.flops / 1e9:.2f}",
            *(str(cost.launches) for cost in (self.stock, self.compiled, self.fastnn)),
            f"{1e6 * max(self.fastnn.floor(kind), self.fastnn.serial):.1f}",
            *(f"{1e6 * seconds:.1f}" for seconds in (stock, compiled, ours)),
            f"{stock / ours:.1f}x",
            f"{compiled / ours:.1f}x",
            "one kernel" if self.fused else "around stock's",
        )


HEADER = ("operator", "shape", "dtype", "direction", "MB stock", "MB compile", "MB fastnn", "MB of tiles stock",
          "MB of tiles fastnn", "GFLOP fastnn",
          "kernels stock", "kernels compile", "kernels fastnn", "floor µs", "stock µs", "compile µs", "fastnn µs",
          "against stock", "against compile", "how")  # fmt: skip


def _kinds(op: str) -> Iterator[tuple[torch.dtype, str, str]]:
    """dtype, limit, input_precision: as torch's flags are at first, and convolutions at "highest" too."""
    yield torch.bfloat16, "16-bit", "ieee"
    if op != "mlp":
        yield torch.float32, "tf32", "tf32"
    if op == "conv":
        yield torch.float32, "tf32x3", "tf32x3"
    if op == "mlp":
        yield torch.float32, "float32", "ieee"


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


def conv_predictions() -> Iterator[Prediction]:
    for name, (sizes, out_channels, kernel, *_) in CONV_SHAPES.items():
        for dtype, kind, precision in _kinds("conv"):
            with torch.device("meta"):
                input = torch.empty(sizes, dtype=dtype)
                weight = torch.empty(out_channels, sizes[1], *[kernel] * (len(sizes) - 2), dtype=dtype)
            problem = check_problem("", input, weight, None, conv_geometry(name))
            size = dtype.itemsize
            conv_values = problem.images * out_channels * math.prod(problem.conv_size)
            pooled = problem.images * out_channels * math.prod(problem.out_size)
            ends = size * (input.numel() + weight.numel() + pooled)
            fused = _conv_plan.is_fused(problem, "forward", precision, TARGET)
            flops = problem.work
            patches, tiles = conv_tiles(problem, precision)
            # conv writes; ReLU reads and writes; pool reads; its int64 indices.
            written = conv_values * size
            apart = pooled * size
            stock = Cost(ends + written * 4 + pooled * 8, flops, 3, 0, patches, apart + written * 3 + pooled * 8)
            compiled = Cost(ends + written * 2, flops, 2, 0, patches, apart + written)
            ours = compiled
            if fused:
                ours = Cost(ends, flops * max(problem.recomputed, 1), 1, 0, tiles)
            yield Prediction("conv_relu_max_pool", name, str(dtype)[6:], "forward", stock, compiled, ours, fused, kind)
            back_fused = _conv_plan.is_fused(problem, "backward", precision, TARGET)
            # Beside the above: the pool's and ReLU's gradients written, read and read again by both products.
            both = 2 * ends + pooled * size
            convolutions = both - 2 * pooled * size + written * 3
            stock_bytes = both + written * (4 + 1 + 3 + 2) + pooled * 16
            stock = Cost(stock_bytes, 3 * flops, 3 + 4, 0, 3 * patches, stock_bytes - convolutions)
            compiled_bytes = both + written * (2 + 1 + 2) + pooled * 2
            compiled = Cost(compiled_bytes, 3 * flops, 2 + 3, 0, 3 * patches, compiled_bytes - convolutions)
            spread = 0 if back_fused else written * 3
            forward = 0 if fused else written * 2
            apart = (0 if back_fused else written + pooled * (size + 1)) + (0 if fused else written + pooled * size)
            # What the fused gradients gather comes through L1, except the patches of the weight's.
            tiles = (tiles if fused else patches) + (1 if back_fused else 2) * patches
            work = flops * (1 + 2 * problem.recomputed if back_fused else 3)
            bytes = both + forward + spread + pooled * 3
            ours = Cost(bytes, work, 4 if back_fused else 5, 0, tiles, apart)
            yield Prediction("conv_relu_max_pool", name, str(dtype)[6:], "training", stock, compiled, ours,
                             fused and back_fused, kind)  # fmt: skip


def mlp_predictions() -> Iterator[Prediction]:
    for rows, widths in MLP_SHAPES:
        for dtype, kind, precision in _kinds("mlp"):
            size, layers = dtype.itemsize, len(widths) - 1
            weights = size * sum(a * b for a, b in pairwise(widths))
            flops = 2.0 * rows * sum(a * b for a, b in pairwise(widths))
            ends = size * rows * (widths[0] + widths[-1]) + weights
            hidden = size * rows * sum(widths[1:-1])
            one = _mlp_plan.chain_config(widths, rows, dtype, precision, TARGET) is not None
            # Each layer's sum is written, read, activated, written and read by the next.
            stock = Cost(ends + 4 * hidden + 2 * size * rows * widths[-1], flops, 2 * layers)
            compiled = Cost(ends + 4 * hidden, flops, 2 * layers)
            ours = Cost(ends, flops, 1) if one else Cost(ends + 2 * hidden, flops, layers)
            shape = f"({rows}, {'-'.join(map(str, widths))}) relu"
            yield Prediction("mlp", shape, str(dtype)[6:], "forward", stock, compiled, ours, one, kind)
            stock = Cost(3 * ends + 11 * hidden, 3 * flops, 6 * layers)
            compiled = Cost(3 * ends + 9 * hidden, 3 * flops, 5 * layers)
            # hidden written, read by both backward launches; the gradients before it written and read.
            one = _mlp_plan.chain_config(widths, rows, dtype, precision, TARGET, backward=True) is not None
            ours = Cost(3 * ends + 5 * hidden, 3 * flops, 2 + 2 * layers) if one else compiled
            yield Prediction("mlp", shape, str(dtype)[6:], "training", stock, compiled, ours, one, kind)


def rnn_predictions() -> Iterator[Prediction]:
    for mode in MODES[:1] + MODES[2:]:
        gates = {"GRU": 3, "LSTM": 4}.get(mode, 1)
        for name, (length, batch, inputs, hidden, layers) in RNN_SHAPES.items():
            for dtype, kind, precision in _kinds("rnn"):
                size, rows = dtype.itemsize, length * batch
                config = _rnn_config.rnn_config(mode, hidden, batch, 1, dtype, precision, TARGET)
                if config is None:
                    continue
                flops = sum(2.0 * rows * gates * hidden * (hidden + (hidden if i else inputs)) for i in range(layers))
                ends = size * rows * (inputs + hidden)
                between = size * rows * layers * (2 * gates + 1) * hidden
                chunk = _rnn_config.wave_chunk(config, layers, 1, length, batch, hidden, gates, size, TARGET)
                steps, of_gates = WIDE_STEP if config.units else STEP, 1 + 0.25 * (gates - 1)
                serial = {who: length * layers * step * of_gates for who, step in steps.items()}
                # cuDNN: the input products and the steps in about three kernels a layer.
                # Programs that share weights need their meeting places made and their state copied.
                launches = 7 * layers if config.units else 2 * layers
                if chunk:  # each layer a chunk of steps behind the one below, and its product with a chunk's input
                    in_steps = length + (layers - 1) * chunk + math.ceil(length / chunk) * _rnn_config.CHUNK_STEPS
                    serial["fastnn"], launches = in_steps * STEP["fastnn"] * of_gates, 3
                stock = Cost(ends + between, flops, 3 * layers, serial["stock"])
                ours = Cost(ends + between, flops, launches, serial["fastnn"])
                yield Prediction("rnn", f"{mode} {name}", str(dtype)[6:], "forward", stock, stock, ours, True, kind)
                stock = Cost(3 * (ends + between), 3 * flops, 8 * layers, 2.2 * serial["stock"])
                # Of each layer three or four products and sums beside the recurrence.
                ours = Cost(3 * (ends + between), 3 * flops, 4 * layers + 2 * launches, 2.2 * serial["fastnn"])
                yield Prediction("rnn", f"{mode} {name}", str(dtype)[6:], "training", stock, stock, ours, True, kind)


def all_predictions() -> Iterator[Prediction]:
    for make in (conv_predictions, rnn_predictions, mlp_predictions):
        yield from make()


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
        "cuDNN is taken to run one layer after another, which it need not.",
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
