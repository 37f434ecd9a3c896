"""A convolution by itself: by Winograd's algorithm where that pays, depthwise, and as torch has it everywhere."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastnn
from fastnn.ops.conv_relu_max_pool import flat_geometry
from fastnn.ops.convolution import convolution
from fastnn.testing import assert_close_to_reference, using_threads

RAW = torch.ops.fastnn.convolution.default
RAW_BACKWARD = torch.ops.fastnn.convolution_backward.default
ALGORITHM = torch.ops.fastnn.convolution_algorithm.default


def geometry(padding: int = 1, groups: int = 1) -> tuple[int, ...]:
    found = flat_geometry(2, 1, padding, 1, groups, 1, None, 0, 1, False)
    assert found is not None
    return found


def call(input: Tensor, weight: Tensor, bias: Tensor | None, padding: int = 1, groups: int = 1) -> Tensor:
    return convolution(input, weight, bias, geometry=geometry(padding, groups), dims=2)


def stock(input: Tensor, weight: Tensor, bias: Tensor | None, padding: int = 1, groups: int = 1) -> Tensor:
    return F.conv2d(input, weight, bias, padding=padding, groups=groups)


CASES = {
    "few channels": ((2, 16, 17, 13), (24, 16, 3, 3), 1, 1),
    "many channels": ((3, 64, 20, 21), (70, 64, 3, 3), 1, 1),
    "no padding": ((2, 40, 19, 18), (33, 40, 3, 3), 0, 1),
    "groups": ((2, 64, 14, 14), (64, 32, 3, 3), 1, 2),
    "small images": ((8, 48, 5, 7), (48, 48, 3, 3), 2, 1),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_values_and_gradients(name: str, bias: bool, last: bool, threads: int, instruction_set: str) -> None:
    sizes, weight_sizes, padding, groups = CASES[name]
    tensors = [torch.randn(sizes), torch.randn(weight_sizes)] + [torch.randn(weight_sizes[0])] * bias
    if last:
        tensors[0] = tensors[0].to(memory_format=torch.channels_last)

    def outputs(function: Any, dtype: torch.dtype) -> list[Tensor]:
        given = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
        result = function(given[0], given[1], given[2] if bias else None, padding, groups)
        grad = torch.linspace(-1, 1, result.numel(), dtype=dtype).reshape(result.shape)
        return [result, *torch.autograd.grad(result, given, grad)]

    with using_threads(threads):
        ours, theirs = outputs(call, torch.float32), outputs(stock, torch.float32)
        exact = outputs(stock, torch.float64)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert_close_to_reference(a, b, c)
    assert ours[0].stride() == theirs[0].stride()
    assert ours[1].stride() == theirs[1].stride()


def test_winograd_is_what_runs() -> None:
    input, weight = torch.randn(4, 64, 28, 28), torch.randn(64, 64, 3, 3)
    assert ALGORITHM(input, weight, None, geometry()) == ("winograd", "winograd")
    assert ALGORITHM(input.double(), weight.double(), None, geometry()) == ("direct", "winograd")


# Sizes, outputs, kernel, stride, padding, dilation.
DEPTHWISE: dict[str, tuple[tuple[int, ...], int, tuple[int, ...], int, int, int]] = {
    "3x3": ((2, 19, 9, 11), 19, (3, 3), 1, 1, 1),
    "stride of 2": ((3, 32, 12, 13), 32, (3, 3), 2, 1, 1),
    "7x7": ((2, 17, 10, 8), 17, (7, 7), 1, 3, 1),
    "5x5 dilated": ((2, 16, 14, 15), 16, (5, 5), 1, 4, 2),
    "two outputs a channel": ((4, 8, 22, 30), 16, (22, 1), 1, 0, 1),
    "three outputs a channel": ((1, 5, 7, 7), 15, (4, 3), 1, 2, 1),
    "1-d": ((3, 33, 40), 33, (31,), 1, 15, 1),
    "1-d, stride of 3": ((2, 4, 31), 8, (5,), 3, 2, 1),
    "3-d": ((2, 6, 5, 6, 7), 6, (3, 3, 3), 1, 1, 1),
    "one pixel": ((3, 20, 1, 1), 20, (3, 3), 1, 1, 1),
    "no images": ((0, 20, 5, 5), 20, (3, 3), 1, 1, 1),
}


@pytest.mark.parametrize("name", DEPTHWISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_depthwise(name: str, dtype: torch.dtype, instruction_set: str) -> None:
    sizes, outputs, kernel, *settings = DEPTHWISE[name]
    for algorithms, memory_format in check_values(sizes, outputs, kernel, *settings, sizes[1], dtype):
        is_stock = memory_format == torch.channels_last and max(kernel) == 3
        assert not sizes[0] or is_stock or "depthwise" in algorithms


# The same of images that have few channels.
FEW: dict[str, tuple[tuple[int, ...], int, tuple[int, ...], int, int, int]] = {
    "long kernel": ((3, 1, 5, 40), 8, (1, 24), 1, (0, 11), 1),
    "tall kernel, few outputs": ((2, 2, 33, 9), 3, (17, 3), 1, 0, 1),
    "many outputs": ((2, 3, 19, 18), 37, (3, 3), 1, 1, 1),
    "dilated": ((2, 4, 15, 16), 17, (5, 3), 1, 2, 2),
    "1-d": ((3, 2, 70), 6, (16,), 1, 8, 1),
    "3-d": ((2, 3, 5, 8, 7), 5, (2, 3, 3), 1, 1, 1),
    "stride of 2": ((2, 3, 17, 16), 16, (3, 3), 2, 1, 1),
    "one pixel": ((3, 4, 1, 1), 20, (3, 3), 1, 1, 1),
    "no images": ((0, 3, 5, 5), 20, (3, 3), 1, 1, 1),
}


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_few_channels(name: str, dtype: torch.dtype, instruction_set: str) -> None:
    sizes, outputs, kernel, stride, *settings = FEW[name]
    for (forward, backward), memory_format in check_values(sizes, outputs, kernel, stride, *settings, 1, dtype):
        if sizes[0] and memory_format == torch.contiguous_format and dtype is torch.float32:
            assert (forward == "stock") == (backward == "stock") == (stride > 1)


# The same of signals and of narrow groups: the algorithms are forward's, and backward's for input and weight.
NARROW: dict[str, tuple[tuple[int, ...], int, tuple[int, ...], int, int, int, int]] = {
    "signals": ((3, 24, 70), 25, (5,), 1, 8, 4, 1),
    "no padding": ((2, 17, 45), 33, (4,), 1, 0, 1, 1),
    "more padding than the kernel reaches": ((2, 17, 45), 19, (3,), 1, 4, 1, 1),
    "many channels": ((2, 140, 64), 96, (3,), 1, 1, 1, 1),
    "stride of 2": ((3, 24, 70), 25, (5,), 2, 2, 1, 1),
    "kernel of one": ((2, 31, 99), 24, (1,), 1, 0, 1, 1),
    "images of one row": ((2, 18, 1, 60), 20, (1, 7), 1, (0, 3), 1, 1),
    "groups of images": ((2, 32, 17, 19), 48, (3, 3), 1, 1, 1, 8),
    "groups of signals": ((4, 24, 50), 24, (7,), 1, 3, 1, 6),
}


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_signals_and_narrow_groups(name: str, dtype: torch.dtype, instruction_set: str) -> None:
    for (forward, backward), memory_format in check_values(*NARROW[name], dtype):
        own = memory_format == torch.contiguous_format and instruction_set == "avx512" and dtype is torch.float32
        if own and NARROW[name][3] == 1:
            assert forward in ("pixels", "phases", "direct", "pointwise")
            assert backward.split(", ")[0] == "stock" if "more padding" in name else forward


# Kernels of one pixel: sizes, outputs. Contiguous images are multiplied as they lie.
POINTWISE: dict[str, tuple[tuple[int, ...], int]] = {
    "fewer inputs, in whole vectors": ((2, 32, 20, 21), 70),
    "fewer inputs, not a vector of them": ((3, 5, 17, 19), 29),
    "fewer outputs, in whole vectors": ((2, 75, 13, 11), 33),
    "fewer outputs, not a vector of them": ((2, 40, 9, 15), 3),
    "as many": ((1, 13, 6, 6), 13),
    "many slices of pixels": ((5, 18, 31, 33), 20),
    "few pixels": ((3, 24, 4, 8), 40),
    "one output": ((2, 17, 12, 12), 1),
    "1-d": ((2, 31, 199), 24),
    "3-d": ((2, 9, 5, 6, 7), 14),
}


@pytest.mark.parametrize("name", POINTWISE)
def test_kernels_of_one_pixel(name: str, instruction_set: str) -> None:
    sizes, outputs = POINTWISE[name]
    kernel = (1,) * (len(sizes) - 2)
    ((algorithms, _),) = check_values(sizes, outputs, kernel, 1, 0, 1, 1, torch.float32, contiguous_alone=True)
    of_weight = "pointwise, stock" if name == "one output" else "pointwise"
    assert algorithms == ("pointwise", of_weight)


def check_values(
    sizes: tuple[int, ...], outputs: int, kernel: tuple[int, ...], stride: int, padding: Any, dilation: int,
    groups: int, dtype: torch.dtype, contiguous_alone: bool = False,
) -> list[tuple[tuple[str, str], torch.memory_format]]:  # fmt: skip
    """Compares values and gradients with stock's in float64 -> the algorithms in each memory format."""
    dims, seen = len(kernel), []
    flat = flat_geometry(dims, stride, padding, dilation, groups, 1, None, 0, 1, False)
    assert flat is not None
    tensors = [torch.randn(sizes), torch.randn(outputs, sizes[1] // groups, *kernel), torch.randn(outputs)]
    function = getattr(F, f"conv{dims}d")
    expected = function(*tensors, stride, padding, dilation, groups)
    grad = torch.randn_like(expected)
    formats = [torch.contiguous_format, *([torch.channels_last] if dims == 2 else [])]

    def of_stock(dtype: torch.dtype, x: Tensor, given: Tensor) -> list[Tensor]:
        leaves = [one.to(dtype).requires_grad_() for one in (x, *tensors[1:])]
        result = function(*leaves, stride, padding, dilation, groups)
        return [result, *torch.autograd.grad(result, leaves, given.to(dtype))]

    for memory_format in formats[:1] if contiguous_alone else formats:
        x = tensors[0].to(memory_format=memory_format)
        for given in (grad, grad.to(memory_format=formats[-1]), grad.flatten()[:1].sum().expand(grad.shape)):
            exact, theirs = of_stock(torch.float64, x, given), of_stock(dtype, x, given)
            for threads in (1, 2):
                with using_threads(threads):
                    own = [one.detach().to(dtype) for one in (x, *tensors[1:])]
                    ours = [RAW(*own, flat), *RAW_BACKWARD(given.to(dtype), *own[:2], flat, True, True, True)]
                    alone = RAW_BACKWARD(given.to(dtype), *own[:2], flat, False, True, False)
                for a, b, c in zip(ours, theirs, exact, strict=True):
                    assert_close_to_reference(a, b, c)
                assert_close_to_reference(alone[1], theirs[2], exact[2])
                assert not alone[0].numel()
                assert not alone[2].numel()
            assert ours[0].stride() == theirs[0].stride()
        seen.append((ALGORITHM(*own, flat), memory_format))
    return seen


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("of", [0, 1, 2])
@pytest.mark.parametrize(("channels", "groups"), [(18, 18), (2, 1), (18, 6)])
def test_special_values(channels: int, groups: int, special: float, of: int, instruction_set: str) -> None:
    flat = flat_geometry(2, 1, 3, 1, groups, 1, None, 0, 1, False)
    tensors = [torch.randn(2, channels, 9, 8), torch.randn(18, channels // groups, 7, 7), torch.randn(2, 18, 9, 8)]
    tensors[of][1, 0, 2, 1] = special

    def outputs(x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
        x, weight = x.requires_grad_(), weight.requires_grad_()
        result = F.conv2d(x, weight, padding=3, groups=groups)
        return [result, *torch.autograd.grad(result, (x, weight), grad)]

    ours = [RAW(tensors[0], tensors[1], None, flat), *RAW_BACKWARD(tensors[2], *tensors[:2], flat, True, True, False)]
    # The zeros around images are multiplied in float64 and by us, but torch's library for float32, which has the
    # gradients where these are not finite, leaves them out.
    stock = outputs(*(one.clone() if groups == 1 and of == 2 else one.double() for one in tensors))
    for one, reference in zip(ours, stock, strict=False):
        assert torch.equal(one.isnan(), reference.isnan())
        assert torch.equal(one.isinf(), reference.isinf())


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("sizes", [(4, 64, 20, 20), (1, 96, 10, 10)])
def test_same_bits_for_any_number_of_threads(kernel: int, sizes: tuple[int, ...]) -> None:
    input, weight, grad = torch.randn(sizes), torch.randn(sizes[1], sizes[1], kernel, kernel), torch.randn(sizes)
    flat = geometry(kernel // 2)
    results = []
    for threads in (1, 2, 3):
        with using_threads(threads):
            results.append([RAW(input, weight, None, flat), *RAW_BACKWARD(grad, input, weight, flat, True, True, True)])
    for one in results[1:]:
        for a, b in zip(one, results[0], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 1e38])
def test_infinities_are_those_of_torch(value: float) -> None:
    input, weight = torch.randn(2, 32, 12, 12), torch.randn(32, 32, 3, 3)
    input[0, 3, 4, 5] = value
    ours, theirs = call(input, weight, None), stock(input, weight, None)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3, equal_nan=True)


def test_second_derivative() -> None:
    input, weight = torch.randn(1, 32, 9, 9), torch.randn(32, 32, 3, 3)

    def second(function: Any) -> Tensor:
        x, w = input.clone().requires_grad_(), weight.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(x, w, None).square().sum(), w, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    torch.testing.assert_close(second(call), second(stock), rtol=1e-3, atol=1e-1)


@pytest.mark.parametrize(
    ("sizes", "weight_sizes", "bias"),
    [((2, 16, 8, 8), (16, 15, 3, 3), 16), ((2, 16, 2, 2), (16, 16, 5, 5), 16), ((2, 16, 8, 8), (16, 16, 3, 3), 15)],
)
def test_errors_are_those_of_torch(sizes: tuple[int, ...], weight_sizes: tuple[int, ...], bias: int) -> None:
    given = torch.randn(sizes), torch.randn(weight_sizes, requires_grad=True), torch.randn(bias)
    with pytest.raises(RuntimeError) as theirs:
        stock(*given, padding=0)
    with pytest.raises(RuntimeError) as ours:
        call(*given, padding=0)
    assert str(ours.value) == str(theirs.value)


def test_raw_operators_refuse_what_they_do_not_take() -> None:
    input, weight, grad = torch.randn(2, 16, 8, 8), torch.randn(16, 16, 3, 3), torch.randn(2, 16, 8, 8)
    pooled = flat_geometry(2, 1, 1, 1, 1, 2, None, 0, 1, False)
    for bad in (
        lambda: RAW(input, weight, None, pooled),
        lambda: RAW(input.bfloat16(), weight.bfloat16(), None, geometry()),
        lambda: RAW(input, weight.double(), None, geometry()),
        lambda: RAW_BACKWARD(grad[:, :8], input, weight, geometry(), True, True, True),
        lambda: RAW_BACKWARD(grad.double(), input, weight, geometry(), True, True, True),
        lambda: RAW_BACKWARD(grad, input, weight, geometry()[:-1], True, True, True),
    ):
        with pytest.raises(RuntimeError):
            bad()


def test_opcheck() -> None:
    input, weight, bias = torch.randn(2, 16, 8, 8), torch.randn(16, 16, 3, 3), torch.randn(16)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(RAW, (input, weight, bias, geometry()), test_utils=tests)
    grad = torch.randn(2, 16, 8, 8)
    torch.library.opcheck(RAW_BACKWARD, (grad, input, weight, geometry(), True, False, True), test_utils=tests)


class Block(nn.Module):
    """ResNet's block, in which no convolution has a ReLU of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(y)) + x)


@pytest.mark.parametrize("training", [True, False])
def test_fused_model(training: bool) -> None:
    model = Block(32).train(training)
    x = torch.randn(4, 32, 14, 14)

    def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        y = model(x)
        y.square().sum().backward()
        return [y.detach(), x.grad, *(p.grad for p in model.parameters())]  # type: ignore[list-item]

    fused, exact = fastnn.fuse(copy.deepcopy(model)), copy.deepcopy(model).double()
    for a, b, c in zip(outputs(fused, x), outputs(model, x), outputs(exact, x.double()), strict=True):
        assert_close_to_reference(a, b, c)
    assert [row.operator for row in fastnn.explain(fused, x).calls].count("convolution") == (2 if training else 1)


def test_training_step_of_a_fused_model_is_one_call() -> None:
    model = nn.Sequential(Block(16), nn.Flatten(), nn.Linear(16 * 64, 3))
    step = fastnn.training_step(model, F.mse_loss, torch.optim.SGD(model.parameters(), 0.01), strict=True)
    assert step(torch.randn(4, 16, 8, 8), torch.randn(4, 3)).isfinite()


def test_autocast_and_other_dtypes_are_torchs() -> None:
    layer = fastnn.fuse(nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)))
    x = torch.randn(2, 16, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer[0](x).dtype is torch.bfloat16
        assert layer(x).dtype is torch.bfloat16
    assert layer.double()(x.double()).dtype is torch.float64
