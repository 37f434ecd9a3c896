"""What a case cannot be faster than: its products at the multipliers' peak, and its bytes at the speed at which that
much is read."""

import functools

import torch
from torch import Tensor, nn
from torch.nn.grad import conv1d_input, conv2d_input, conv3d_input

from benchmarks.cases import first_tensor
from benchmarks.problem import Problem
from benchmarks.timing import bandwidth, peak_flops

BUFFERS = (0.2, 8, 200)  # megabytes: read over and over, they come from a core's cache, the shared one and memory
_LINE = 64  # bytes
_INPUT_GRADIENT = {3: conv1d_input, 4: conv2d_input, 5: conv3d_input}  # by rank


def traffic(problem: Problem) -> float:
    """The bytes that one inference moves at least: its input and its result once, its parameters once or, where each
    step needs the one before, at every step."""
    case, size = problem.case, problem.grad_output.element_size()
    parameters = sum(parameter.numel() for parameter in problem.stock.parameters())
    images = first_tensor(problem.input).numel() + problem.grad_output.numel()
    return size * images + max(size * parameters, case.step_bytes * case.serial_steps)


def describe_bounds(problem: Problem) -> str:
    """Microseconds of one thread for the products of one inference and for the input's lines in either memory format;
    nothing for other ops."""
    layers = list(problem.stock) if isinstance(problem.stock, nn.Sequential) else []
    if not layers or problem.input.dim() not in _INPUT_GRADIENT or not hasattr(layers[0], "kernel_size"):
        return ""
    met = _pixels_met(layers[0], problem.input)
    size, images = problem.input.element_size(), len(problem.input)
    lines = {
        "contiguous": _lines(met, size),
        "channels last": _lines(met.movedim(0, -1), size),
    }
    texts = [f"{1e6 * problem.flops / _peak():.0f} us of products at the float32 peak"]
    for name, count in lines.items():
        read = images * count * _LINE
        texts.append(f"{1e6 * read / bandwidth(read / 1e6):.0f} us of lines {name}")
    return ", ".join(texts)


@functools.lru_cache
def _peak() -> float:
    return peak_flops()


def _pixels_met(conv: nn.Module, input: Tensor) -> Tensor:
    """The elements of an image that have a product. (channels, ..., bool)"""
    image = input[:1]
    weight, outputs = torch.ones(conv.weight.shape), torch.ones(conv(image).shape)
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return _INPUT_GRADIENT[input.dim()](image.shape, weight, outputs, *geometry)[0] != 0


def _lines(met: Tensor, element: int) -> int:
    """How many lines have such an element, where they follow one another in memory as in `met`."""
    elements = _LINE // element
    flat = met.flatten()
    padded = nn.functional.pad(flat, (0, -len(flat) % elements))
    return int(padded.view(-1, elements).any(dim=1).sum())
