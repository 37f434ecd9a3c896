"""A case made ready to run in one direction: models with equal weights, input, and a check of what comes out."""

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from benchmarks.cases import Case, first_tensor
from fastnn.testing import assert_close_to_reference

DIRECTIONS = ("inference", "training")


def _near_ties(stock: nn.Sequential, input: Tensor) -> Tensor:
    """The windows of Conv -> ReLU -> MaxPool whose two largest values lie closer than its dtype tells apart: which of
    the two takes the gradient is chance there, in stock as in a fused layer. (of the output's shape, bool)"""
    exact = copy.deepcopy(stock).double()
    pool = exact[-1]
    dims = input.dim() - 2
    kernel, stride, padding = (
        (value,) * dims if isinstance(value, int) else tuple(value)
        for value in (pool.kernel_size, pool.stride, pool.padding)
    )
    with torch.no_grad():
        values = exact[:-1](input.double())
        shape = pool(values).shape
        # Room for a last window that ceil_mode lets begin inside and end outside.
        room = [side for k, p in zip(reversed(kernel), reversed(padding), strict=True) for side in (p, p + k)]
        padded = nn.functional.pad(values, room, value=-torch.inf)
        largest = torch.full(shape, -torch.inf, dtype=torch.float64)
        second = torch.zeros(shape, dtype=torch.float64)  # a largest value near ReLU's kink is as close a call
        for place in itertools.product(*map(range, kernel)):
            spans = (
                slice(first, first + (size - 1) * step + 1, step)
                for first, step, size in zip(place, stride, shape[2:], strict=True)
            )
            pixels = padded[(slice(None), slice(None), *spans)]
            second = torch.maximum(second, torch.minimum(largest, pixels))
            largest = torch.maximum(largest, pixels)
    return largest - second < max(1e-5, torch.finfo(input.dtype).eps) * largest.max()


def _near_kinks(stock: nn.Sequential, input: Tensor) -> Tensor:
    """The rows of Linear -> ReLU -> ... for which a ReLU's input lies closer to zero than float32 tells it apart:
    whether it passes the gradient is chance there, in stock as in a fused chain. (rows, bool)"""
    near = torch.zeros(input.shape[0], dtype=torch.bool)
    values = input.double()
    with torch.no_grad():
        for layer in copy.deepcopy(stock).double():
            if isinstance(layer, nn.ReLU):
                near |= (values.abs() < 1e-5 * values.abs().max()).any(dim=1)
            values = layer(values)
    return near


class Problem:
    """A case with its models and numbers, for "inference" (forward) or "training" (forward and backward)."""

    def __init__(self, case: Case, direction: str, dtype: torch.dtype = torch.float32) -> None:
        self.case = case
        self.direction = direction
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        self.input = case.make_input(generator).to(dtype)
        self.stock = case.stock().to(dtype)
        self.fused = case.fused().to(dtype)
        with torch.no_grad():
            for ours, theirs in zip(self.fused.parameters(), self.stock.parameters(), strict=True):
                ours.copy_(theirs)
            shape = first_tensor(self.stock(self.input)).shape
        self.grad_output = torch.randn(shape, generator=generator).to(dtype)
        if direction == "training" and isinstance(self.stock, nn.Sequential):
            convolves = hasattr(self.stock[-1], "dilation")
            self.grad_output[(_near_ties if convolves else _near_kinks)(self.stock, self.input)] = 0

    @property
    def flops(self) -> float:
        """Of one run: a backward does each product of the forward twice, for its two factors."""
        return self.case.flops * (3 if self.direction == "training" else 1)

    @property
    def bytes(self) -> float:
        """That one run must read from cache, because each step needs the one before: backward as many as forward."""
        return self.case.step_bytes * self.case.serial_steps * (2 if self.direction == "training" else 1)

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """What to prepare and time in."""
        return torch.inference_mode() if self.direction == "inference" else contextlib.nullcontext()

    def runner(self, model: nn.Module, input: Any, grad_output: Tensor | None = None) -> Callable[[], Any]:
        """What is timed: a call that returns the output, or the gradients that a training step wants."""
        if self.direction == "inference":
            return lambda: model(input)
        grad_output = self.grad_output if grad_output is None else grad_output
        leaves = list(model.parameters())
        if self.case.input_gradient:
            data = first_tensor(input).detach().requires_grad_()
            leaves.append(data)
            input = input._replace(data=data) if isinstance(input, PackedSequence) else data
        return lambda: torch.autograd.grad(first_tensor(model(input)), leaves, grad_output)

    def results(self, run: Callable[[], Any]) -> list[Tensor]:
        """One run's tensors, for comparison."""
        result = run()
        return [first_tensor(result)] if self.direction == "inference" else list(result)

    @functools.cached_property
    def _exact(self) -> list[Tensor]:
        """What a run gives in float64."""
        input = (
            self.input.double()
            if isinstance(self.input, Tensor)
            else self.input._replace(data=self.input.data.double())
        )
        return self.results(self.runner(copy.deepcopy(self.stock).double(), input, self.grad_output.double()))

    def check(self, run: Callable[[], Any], stock: Callable[[], Any] | None = None) -> None:
        """Assert that a run of fastnn is as close to float64 as the table of tolerances asks, beside a run of stock:
        the problem's, or one in another memory format, where torch's own kernel is another (its sums of some thousand
        products, channels last, have five times the errors)."""
        stock = stock or self.runner(self.stock, self.input)
        assert_close_to_reference(self.results(run), self.results(stock), self._exact)

    def check_fused(self) -> None:
        """The same of the fused model on the problem's input."""
        self.check(self.runner(self.fused, self.input))
