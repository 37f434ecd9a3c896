"""fastnn.kernels.conv.launch against stock's layers in float64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from fastnn.kernels import _launch, _plan_cache, _precision, _target
from fastnn.kernels.conv import launch as kernels
from fastnn.kernels.conv import plan as _conv_plan
from fastnn.kernels.conv.geometry import Geometry, check_problem

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def arguments(dims, stride=1, padding=0, dilation=1, groups=1, pool=2, pool_stride=None, pool_padding=0,
              pool_dilation=1, ceil_mode=False):  # fmt: skip
    def per_dimension(value):
        return [value] * dims if isinstance(value, int) else list(value)

    return Geometry(
        *map(per_dimension, (stride, padding, dilation)), groups, per_dimension(pool),
        per_dimension(pool if pool_stride is None else pool_stride), per_dimension(pool_padding),
        per_dimension(pool_dilation), ceil_mode,
    )  # fmt: skip


def reference(input, weight, bias, a):
    dims = input.dim() - 2
    conv = CONV[dims](input, weight, bias, a.stride, a.padding, a.dilation, a.groups)
    return POOL[dims](F.relu(conv), a.pool_kernel_size, a.pool_stride, a.pool_padding, a.pool_dilation, a.ceil_mode)


def make(sizes, out_channels, kernel, a, dtype, device):
    channels = sizes[1] // a.groups
    kernels_size = [kernel] * (len(sizes) - 2) if isinstance(kernel, int) else kernel
    input = torch.randn(sizes).to(device, dtype)
    weight = (torch.randn(out_channels, channels, *kernels_size) / (channels * 3) ** 0.5).to(device, dtype)
    return input, weight, torch.randn(out_channels).to(device, dtype)


def check(input, weight, bias, a, assert_near, grad=None):
    """Forward and every gradient."""
    exact = [t.double().cpu().contiguous().requires_grad_() for t in (input, weight, bias)]
    expected = reference(*exact, a)
    output, winners = kernels.conv_relu_max_pool_with_winners(input, weight, bias, a.flat())
    assert_near(output, expected.detach(), factor=2)
    again = kernels.conv_relu_max_pool(input, weight, bias, a.flat())
    torch.testing.assert_close(again, output, rtol=0, atol=0, equal_nan=True)
    if grad is None:
        grad = torch.randn(output.shape).to(output)
    gradients = torch.autograd.grad(expected, exact, grad.double().cpu())
    actual = kernels.conv_relu_max_pool_backward(grad, winners, input, weight, a.flat(), True, True, True)
    for got, want in zip(actual, gradients, strict=True):
        assert_near(got, want, factor=4)
    return output, winners


CASES = {
    "1d": ((2, 3, 21), 5, 3, {}),
    "1d, many channels": ((2, 18, 13), 5, 3, {"padding": 1}),
    "2d": ((2, 3, 8, 9), 5, 3, {}),
    "2d, many channels": ((1, 17, 7, 6), 5, 3, {"padding": 1}),
    "2d, overlapping": ((1, 3, 9, 10), 4, 3, {"stride": 2, "padding": 1, "pool": 3, "pool_stride": 2,
                                              "pool_padding": 1}),
    "2d, odd": ((1, 2, 11, 9), 3, (2, 3), {"dilation": (2, 1), "pool": (2, 3), "pool_stride": (3, 2),
                                           "pool_dilation": (2, 1), "ceil_mode": True}),
    "2d, gaps": ((1, 2, 9, 8), 3, 2, {"pool": 2, "pool_stride": 3}),
    "2d, groups": ((1, 32, 5, 5), 32, 2, {"groups": 2}),
    "3d": ((1, 2, 5, 4, 6), 3, 2, {"padding": 1}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in CASES for dtype in (torch.float32, torch.float16)] + [("2d", torch.bfloat16)],
)
def test_fused(name, dtype, device, assert_near, monkeypatch):
    case = CASES[name]
    sizes, out_channels, kernel, options = case
    a = arguments(len(sizes) - 2, **options)
    input, weight, bias = make(sizes, out_channels, kernel, a, dtype, device)
    problem = check_problem("", input, weight, bias, a)
    assert _conv_plan.is_fused(problem, "forward", "ieee", _target.TARGETS[2])
    monkeypatch.setattr(_conv_plan, "is_fused", lambda *_: True)  # backward too, which is stock's of some
    check(input, weight, bias, a, assert_near)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_around_stocks_convolution(case, device, assert_near, monkeypatch):
    monkeypatch.setattr(_conv_plan, "is_fused", lambda *_: False)
    sizes, out_channels, kernel, options = case
    a = arguments(len(sizes) - 2, **options)
    check(*make(sizes, out_channels, kernel, a, torch.float32, device), a, assert_near)


INF, NAN = float("inf"), float("nan")
OFF_EVERY_TILE = pytest.mark.parametrize("name", ["1d, many channels", "2d"])


@OFF_EVERY_TILE
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_not_finite(name, value, fused, device, assert_near, monkeypatch):
    """In an element of the first image's gradient and in one of the second image."""
    monkeypatch.setattr(_conv_plan, "is_fused", lambda *_: fused)
    sizes, out_channels, kernel, options = CASES[name]
    a = arguments(len(sizes) - 2, **options)
    input, weight, bias = make(sizes, out_channels, kernel, a, torch.float16, device)
    input[(1, 1, *[2] * (len(sizes) - 2))] = value
    expected = reference(input.float(), weight.float(), bias.float(), a)
    grad = torch.randn(expected.shape).to(input)
    grad[tuple((expected[:1] > 0).nonzero()[0])] = value
    output, _ = check(input, weight, bias, a, assert_near, grad)
    assert output[0].isfinite().all()
    assert value == -INF or not output[1].isfinite().all()


@OFF_EVERY_TILE
@pytest.mark.parametrize("fused", [True, False])
def test_overflow(name, fused, device, assert_near, monkeypatch):
    """Of float16: forward, then backward."""
    monkeypatch.setattr(_conv_plan, "is_fused", lambda *_: fused)
    sizes, out_channels, kernel, options = CASES[name]
    a = arguments(len(sizes) - 2, **options)
    input, weight, bias = make(sizes, out_channels, kernel, a, torch.float16, device)
    weight.mul_(16)
    large = input.clone()
    large[(1, 1, *[2] * (len(sizes) - 2))] = 65504
    output = kernels.conv_relu_max_pool(large, weight, bias, a.flat())
    assert_near(output, reference(*(t.double().cpu() for t in (large, weight, bias)), a), factor=2)
    assert output.isinf().any()
    grad = torch.randn(output.shape).to(output)
    grad[tuple((output[:1] > 0).nonzero()[0])] = 65504
    check(input, weight, bias, a, assert_near, grad)


def test_float64(device):
    a = arguments(2, pool=3, pool_stride=2, pool_padding=1)
    input, weight, bias = make((2, 3, 9, 8), 4, 3, a, torch.float64, device)
    expected = reference(input, weight, bias, a)
    torch.testing.assert_close(kernels.conv_relu_max_pool(input, weight, bias, a.flat()), expected)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("channels", [3, 16])
def test_channels_last_comes_out_as_it_goes_in(channels, fused, device, assert_near, monkeypatch):
    monkeypatch.setattr(_conv_plan, "is_fused", lambda *_: fused)
    a = arguments(2)
    input, weight, bias = make((2, channels, 7, 8), 6, 2, a, torch.float32, device)
    last = input.contiguous(memory_format=torch.channels_last)
    output, winners = check(last, weight, bias, a, assert_near)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert winners.is_contiguous(memory_format=torch.channels_last)
    grad = kernels.conv_relu_max_pool_backward(output, winners, last, weight, a.flat(), True, False, False)[0]
    assert grad.is_contiguous(memory_format=torch.channels_last)
    assert kernels.conv_relu_max_pool(input, weight, bias, a.flat()).is_contiguous()


@pytest.mark.parametrize("work", [0, 1e30])
@pytest.mark.parametrize("sizes", [(1, 17, 7, 6), (2, 18, 13), (1, 3, 6, 7)])
def test_weight_as_it_lies_or_copied(sizes, work, device, monkeypatch):
    """One result, whichever format the weight has and the kernels take."""
    a = arguments(len(sizes) - 2, padding=1)
    input, weight, bias = make(sizes, 5, 3, a, torch.float32, device)
    expected, winners = kernels.conv_relu_max_pool_with_winners(input, weight, bias, a.flat())
    gradients = kernels.conv_relu_max_pool_backward(expected, winners, input, weight, a.flat(), True, True, True)
    monkeypatch.setattr(_conv_plan, "_COPY_BOUND_WORK", work)
    _plan_cache.Plans.forget_all()
    for given in (weight, weight.movedim(1, -1).contiguous().movedim(-1, 1)):
        output = kernels.conv_relu_max_pool(input, given, bias, a.flat())
        torch.testing.assert_close(output, expected, rtol=0, atol=0)
        again = kernels.conv_relu_max_pool_backward(expected, winners, input, given, a.flat(), True, True, True)
        for got, want in zip(again, gradients, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("fused", [True, False])
def test_winners(fused, device, monkeypatch):
    """The first of equals, the last NaN, dead where nothing is above zero, -inf where there is nothing."""
    monkeypatch.setattr(_conv_plan, "is_fused", lambda *_: fused)
    nan = float("nan")
    input = torch.tensor([[2.0, 2.0, nan, nan, -1.0, -2.0, 0.0, 5.0, 1.0]], device=device)[None]
    weight = torch.ones(1, 1, 1, device=device)
    output, winners = kernels.conv_relu_max_pool_with_winners(input, weight, None, arguments(1).flat())
    torch.testing.assert_close(output, torch.tensor([[[2.0, nan, 0.0, 5.0]]], device=device), equal_nan=True)
    assert winners.flatten().tolist() == [0, 1, 255, 1]
    grad_input = kernels.conv_relu_max_pool_backward(
        torch.ones_like(output), winners, input.nan_to_num(), weight, arguments(1).flat(), True, False, False
    )[0]
    assert grad_input.flatten().tolist() == [1, 0, 0, 1, 0, 0, 0, 1, 0]

    sparse = arguments(1, pool=2, pool_stride=3, pool_dilation=3, pool_padding=1, ceil_mode=True)
    small = torch.ones(1, 1, 2, device=device)
    output, winners = kernels.conv_relu_max_pool_with_winners(small, weight, None, sparse.flat())
    torch.testing.assert_close(output, reference(small.cpu(), weight.cpu(), None, sparse).to(device))
    assert bool((winners[output == float("-inf")] == 255).all())


def first_larger(conv, a):
    """The maximum of each window and its place, by the rule: the first of equals, the last NaN, 255 where dead."""
    padding = [width for pad in reversed(a.pool_padding) for width in (pad, pad)]
    padded = F.pad(conv, padding, value=float("-inf"))
    sizes = POOL[conv.dim() - 2](conv, a.pool_kernel_size, a.pool_stride, a.pool_padding, a.pool_dilation).shape
    best, winner = torch.full(sizes, float("-inf"), dtype=conv.dtype), torch.full(sizes, 255)
    for place, steps in enumerate(itertools.product(*map(range, a.pool_kernel_size))):
        at = [
            slice(step * dilation, step * dilation + (size - 1) * stride + 1, stride)
            for step, dilation, size, stride in zip(steps, a.pool_dilation, sizes[2:], a.pool_stride, strict=True)
        ]
        value = padded[(..., *at)]
        take = (value > best) | value.isnan()
        best, winner = value.where(take, best), torch.where(take, place, winner)
    return best.where(~(best <= 0), 0.0), winner.where(~(best <= 0), 255)


WINDOWS = {  # input, out channels, kernel, options, and how many places are computed together
    "1d, two": ((1, 1, 11), 3, 3, {}, 2),
    "1d, seven": ((2, 65, 23), 5, 3, {"padding": 2, "pool": 7, "pool_stride": 3, "pool_padding": 3}, 7),
    "1d, eleven": ((2, 3, 29), 17, 2, {"pool": 11, "pool_stride": 4, "pool_padding": 5}, 1),
    "2d, four": ((1, 64, 7, 6), 33, 3, {"padding": 1}, 4),
    "2d, six": ((1, 15, 8, 9), 4, 3, {"pool": (2, 3), "pool_stride": (1, 2), "pool_padding": (1, 1)}, 6),
    "2d, nine": ((1, 16, 9, 8), 65, 3, {"padding": 1, "pool": 3, "pool_stride": 2, "pool_padding": 1}, 3),
    "2d, sixteen": ((1, 17, 9, 9), 3, 2, {"pool": 4, "pool_stride": 3, "pool_padding": 2}, 8),
    "2d, dilated": ((2, 33, 10, 9), 18, 2, {"pool_dilation": (2, 3), "pool_stride": 1, "pool_padding": 1}, 4),
    "2d, groups": ((1, 34, 6, 6), 36, 3, {"groups": 2, "padding": 1}, 4),
    "3d, eight": ((1, 2, 5, 4, 6), 3, 2, {"padding": 1}, 8),
    "3d, twelve": ((1, 18, 4, 5, 6), 5, 2, {"pool": (2, 2, 3), "pool_stride": 1, "pool_padding": 1}, 6),
}  # fmt: skip


def check_places(case, dtype, device):
    """On whole numbers, of which every sum is exact: many are equal, and some are NaN. 16 bits are channels last."""
    sizes, out_channels, kernel, options, *together = case
    a = arguments(len(sizes) - 2, **options)
    kernel = [kernel] * (len(sizes) - 2) if isinstance(kernel, int) else kernel
    input = torch.randint(-1, 2, sizes).double()
    input.masked_fill_(torch.rand(sizes) < 0.5 / sizes[1] / math.prod(kernel), float("nan"))
    weight = torch.randint(-1, 2, (out_channels, sizes[1] // a.groups, *kernel)).double()
    bias = torch.randint(-1, 2, (out_channels,)).double()
    conv = CONV[len(sizes) - 2](input, weight, bias, a.stride, a.padding, a.dilation, a.groups)
    expected, winner = first_larger(conv, a)
    assert len(winner.unique()) > 2
    own = [tensor.to(device, dtype) for tensor in (input, weight, bias)]
    if dtype.itemsize == 2 and len(sizes) > 3:
        own[0] = own[0].contiguous(memory_format=_conv_plan.channels_last(len(sizes) - 2))
    problem = check_problem("", *own, a)
    assert not together or _conv_plan.forward_config(problem, "ieee", _target.TARGETS[2])[1] == together[0]
    output, winners = kernels.conv_relu_max_pool_with_winners(*own, a.flat())
    torch.testing.assert_close(output.double().cpu(), expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(winners.long().cpu(), winner, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", WINDOWS.values(), ids=WINDOWS)
def test_places_together(case, dtype, device, monkeypatch):
    monkeypatch.setattr(_conv_plan, "is_fused", lambda *_: True)
    check_places(case, dtype, device)


PACKED = {  # input, out channels, kernel, options
    "1d": ((3, 1, 37), 5, 5, {"stride": 2, "padding": 3}),
    "1d, dilated": ((2, 7, 29), 3, 3, {"padding": 2, "dilation": 3, "pool": 3, "pool_stride": 1}),
    "2d": ((2, 3, 11, 14), 17, 3, {"padding": 1}),
    "2d, stem": ((2, 3, 15, 17), 6, 7, {"stride": 2, "padding": 3, "pool": 3, "pool_stride": 2, "pool_padding": 1}),
    "2d, odd": ((2, 2, 17, 13), 3, (2, 3), {"dilation": (2, 1), "padding": (3, 0), "pool": (2, 3), "ceil_mode": True,
                                            "pool_stride": (3, 2), "pool_dilation": (2, 1)}),
    "2d, many taps": ((1, 9, 9, 10), 4, 4, {"padding": 1, "pool_padding": 1}),
    "2d, 65 out": ((1, 5, 9, 8), 65, 2, {}),
    "3d": ((2, 3, 5, 4, 6), 3, 2, {"padding": (1, 0, 1), "stride": (1, 2, 1)}),
}  # fmt: skip


@pytest.fixture
def packed(monkeypatch):
    """As where much is to be computed: few channels are packed."""
    monkeypatch.setattr(_conv_plan, "_LAUNCH_BOUND_WORK", 0)
    monkeypatch.setattr(_conv_plan, "is_fused", lambda *_: True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", PACKED.values(), ids=PACKED)
def test_few_channels_packed(case, dtype, device, assert_near, packed):
    """16 bits are channels last."""
    sizes, out_channels, kernel, options = case
    a = arguments(len(sizes) - 2, **options)
    input, weight, bias = make(sizes, out_channels, kernel, a, dtype, device)
    if dtype.itemsize == 2 and len(sizes) > 3:
        format = _conv_plan.channels_last(len(sizes) - 2)
        input, weight = input.contiguous(memory_format=format), weight.contiguous(memory_format=format)
    assert _conv_plan.is_packed(check_problem("", input, weight, bias, a))
    expected = reference(*(tensor.double().cpu() for tensor in (input, weight, bias)), a)
    assert_near(kernels.conv_relu_max_pool(input, weight, bias, a.flat()), expected, factor=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", PACKED.values(), ids=PACKED)
def test_winners_of_few_channels_packed(case, dtype, device, packed):
    check_places(case, dtype, device)


@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_not_finite_packed(value, device, assert_near, packed):
    """It must not spread through lanes beyond the channels or the taps, nor to the next image."""
    sizes, out_channels, kernel, options = PACKED["2d"]
    a = arguments(2, **options)
    input, weight, bias = make(sizes, out_channels, kernel, a, torch.float16, device)
    input[0, :, -1, -1] = value
    expected = reference(*(tensor.double().cpu() for tensor in (input, weight, bias)), a)
    output = kernels.conv_relu_max_pool(input, weight, bias, a.flat())
    assert_near(output, expected, factor=2)
    assert output[1].isfinite().all()


def test_what_is_packed():
    def problem(channels, size, images=64, padding=1, last=False, kernel=3):
        with torch.device("meta"):
            input, weight = torch.empty(images, channels, size, size), torch.empty(64, channels, kernel, kernel)
        input = input.contiguous(memory_format=torch.channels_last) if last else input
        return check_problem("", input, weight, None, arguments(2, padding=padding))

    assert _conv_plan.is_packed(problem(3, 112))
    assert _conv_plan.is_packed(problem(4, 112))
    assert not _conv_plan.is_packed(problem(4, 112, last=True))  # it is as packed already
    assert not _conv_plan.is_packed(problem(16, 112))
    assert not _conv_plan.is_packed(problem(3, 20, images=1))  # a launch costs more
    assert not _conv_plan.is_packed(problem(3, 9, images=512, kernel=9, padding=8))  # nothing but padding


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 113, 226, 1000003, 2**30 + 1, 2**31 - 1025])
def test_division_by_a_product(size):
    multiplier, shift = _conv_plan.divisors((1, 1, size))[4:]
    for index in (0, 1, size - 1, size, 3 * size - 1, 3 * size, 2**31 - 1025, 2**31 - 1):
        if size > 1 and index < 2**31:
            assert index * (multiplier + 2**32) >> 32 >> shift == index // size


def test_hostile_winners_do_no_harm(device):
    a = arguments(2, pool_padding=1)
    input, weight, bias = make((1, 2, 6, 6), 3, 3, a, torch.float32, device)
    output = kernels.conv_relu_max_pool(input, weight, bias, a.flat())
    for place in (0, 3, 4, 200, 254):
        winners = torch.full_like(output, place, dtype=torch.uint8)
        gradients = kernels.conv_relu_max_pool_backward(output, winners, input, weight, a.flat(), True, True, True)
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_empty_batch_and_unwanted_gradients(device):
    a = arguments(2)
    input, weight, bias = make((0, 3, 6, 6), 4, 3, a, torch.float32, device)
    output, winners = kernels.conv_relu_max_pool_with_winners(input, weight, bias, a.flat())
    assert output.shape == (0, 4, 2, 2)
    gradients = kernels.conv_relu_max_pool_backward(output, winners, input, weight, a.flat(), True, True, True)
    assert [g.shape for g in gradients] == [input.shape, weight.shape, bias.shape]
    assert not gradients[1].any()
    input = torch.randn(1, 3, 6, 6, device=device)
    output, winners = kernels.conv_relu_max_pool_with_winners(input, weight, bias, a.flat())
    gradients = kernels.conv_relu_max_pool_backward(output, winners, input, weight, a.flat(), False, False, True)
    assert [g.shape[0] for g in gradients] == [0, 0, 4]


REFUSED = {
    "Output size is too small": {"pool": 9},
    "Kernel size can't be greater": {"dilation": 9},
    "non-positive stride": {"stride": 0},
    "negative padding": {"padding": -1},
    "non-positive groups": {"groups": 0},
    "to have 6 channels": {"groups": 2},
    "pool_stride should be greater than zero": {"pool_stride": 0},
    "at most half of kernel size": {"pool_padding": 2},
    "geometry to have 16 values": {"stride": (1,)},
    "too large": {"padding": 2**40},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refuses_geometry(message, device):
    a = arguments(2)
    input, weight, bias = make((1, 3, 6, 6), 4, 3, a, torch.float32, device)
    with pytest.raises(RuntimeError, match=message):
        kernels.conv_relu_max_pool(input, weight, bias, arguments(2, **REFUSED[message]).flat())


def test_refuses_tensors(device):
    a = arguments(2)
    input, weight, bias = make((1, 3, 6, 6), 4, 3, a, torch.float32, device)
    output, winners = kernels.conv_relu_max_pool_with_winners(input, weight, bias, a.flat())
    for changed in ((input[0], weight, bias), (input, weight.double(), bias), (input, weight, bias[1:]),
                    (input, weight[0], bias), (input.to("meta"), weight, bias), (input.int(), weight, bias),
                    (input, weight[:, :, :0], bias)):  # fmt: skip
        with pytest.raises(RuntimeError):
            kernels.conv_relu_max_pool(*changed, a.flat())
    wanted = (True, True, True)
    for changed in ((output[:, 1:], winners), (output, winners[:, 1:]), (output, winners.int()),
                    (output.double(), winners), (output, winners.to("meta"))):  # fmt: skip
        with pytest.raises(RuntimeError):
            kernels.conv_relu_max_pool_backward(*changed, input, weight, a.flat(), *wanted)
    with pytest.raises(RuntimeError, match="at most 254 elements"):
        kernels.conv_relu_max_pool_with_winners(torch.ones(1, 3, 40, 40, device=device), weight, bias,
                                                arguments(2, pool=16).flat())  # fmt: skip


def test_choice_of_path():
    def problem(images, channels, out_channels, size, dtype, kernel=3, last=True, **options):
        a = arguments(2, **options)
        with torch.device("meta"):
            input = torch.empty(images, channels, size, size, dtype=dtype)
            weight = torch.empty(out_channels, channels // a.groups, kernel, kernel, dtype=dtype)
        input = input.contiguous(memory_format=torch.channels_last) if last else input
        return check_problem("", input, weight, None, a)

    def is_fused(problem, precision="ieee", direction="forward"):
        return _conv_plan.is_fused(problem, direction, precision, _target.TARGETS[2])

    half, single = torch.bfloat16, torch.float32
    middle = problem(64, 64, 64, 112, half)
    assert is_fused(middle)
    assert not is_fused(middle, direction="backward")
    assert not is_fused(problem(8, 256, 512, 28, half))
    assert not is_fused(problem(64, 64, 64, 112, half, groups=64))
    assert not is_fused(problem(1, 3, 4, 8, torch.float64))
    assert not is_fused(problem(64, 64, 64, 112, single))
    assert is_fused(problem(64, 64, 64, 112, single), "tf32")
    assert is_fused(problem(64, 64, 64, 112, single), "tf32x3")
    assert not is_fused(problem(64, 256, 64, 112, single), "tf32x3")
    assert _conv_plan.conv_config(middle, "ieee", _target.TARGETS[2]).block_pixels == 128
    for target, tile in ((_target.TARGETS[2], (64, 128)), (_target.TARGETS[0], (64, 64))):
        config, _ = _conv_plan.forward_config(problem(64, 64, 256, 112, half), "ieee", target)
        assert (config.block_pixels, config.block_out) == tile
    # A copy with the channels last costs what is saved, unless many channels come out of few.
    assert not is_fused(problem(64, 64, 64, 112, half, last=False))
    assert is_fused(problem(64, 16, 128, 112, half, last=False))
    # What is gathered element by element: little of few channels, much where windows overlap, or backward.
    few = problem(64, 3, 64, 224, half)
    assert is_fused(few)
    assert not is_fused(few, direction="backward")
    assert all(is_fused(problem(64, channels, 64, 224, half, last=False)) for channels in range(1, 16))
    assert not is_fused(problem(64, 32, 32, 112, half), direction="backward")
    # A launch less than stock's, which is worth the instructions of one or two programs a processor; three products
    # for one have more of them, and in 16 bits there are two launches more.
    assert is_fused(problem(1, 32, 32, 28, single), "tf32", "backward")
    assert not is_fused(problem(1, 32, 32, 28, single), "tf32x3", "backward")
    assert not is_fused(problem(1, 32, 32, 56, single), "tf32", "backward")
    assert is_fused(problem(1, 3, 10, 20, single), "tf32x3", "backward")
    assert not is_fused(problem(1, 3, 10, 20, half), direction="backward")
    for dtype, precision in ((half, "ieee"), (single, "tf32"), (single, "tf32x3")):
        stem = problem(64, 3, 64, 224, dtype, 7, stride=2, padding=3, pool=3, pool_stride=2, pool_padding=1)
        assert not is_fused(stem, precision)


def test_float32_without_tf32(device, without_tf32, monkeypatch):
    """Three tf32 products where that pays, and then in short dots."""
    monkeypatch.setattr(_conv_plan, "is_fused", lambda *_: True)
    chosen = []
    monkeypatch.setattr(_launch, "Launcher", lambda *args, **constexprs: chosen.append(constexprs))
    a = arguments(2, padding=1)
    for target, precision in zip(_target.TARGETS, ("tf32x3", "ieee", "tf32x3", "tf32x3", "ieee"), strict=True):
        chosen.clear()
        with _target.assume_target(target):
            assert _precision.dot_precision(torch.float32, "conv", target) == precision
            assert _precision.dot_precision(torch.float32, "rnn", target) != "tf32x3"
            tensors = make((1, 32, 9, 9), 40, 3, a, torch.float32, device)
            _conv_plan.plan_forward("", *tensors, a.flat(), False, precision, target)
            pooled = torch.empty(1, 40, 4, 4, device=device)
            _conv_plan.plan_backward(pooled, pooled.byte(), *tensors[:2], a.flat(), precision, target)
        assert [each["PRECISION"] for each in chosen] == [precision] * 3
        if precision == "tf32x3":
            forward, of_input, of_weight = chosen
            assert max(forward["BLOCK_K"], of_input["BLOCK_OUT"], of_weight["BLOCK_PIXELS"]) <= 32


def test_three_tf32_products(device, assert_near, without_tf32):
    with _target.assume_target(_target.TARGETS[2]):
        a = arguments(2, padding=1)
        check(*make((1, 40, 7, 6), 5, 3, a, torch.float32, device), a, assert_near)
