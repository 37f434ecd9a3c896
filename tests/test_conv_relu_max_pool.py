"""fastnn.functional.conv_relu_max_pool, its operators and modules, against plain PyTorch."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import fastnn.nn
from fastnn import functional
from fastnn.reference import conv_relu_max_pool as reference
from fastnn.testing import compare_with_stock, using_threads

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
FUSED = {
    1: functional.conv_relu_max_pool1d,
    2: functional.conv_relu_max_pool2d,
    3: functional.conv_relu_max_pool3d,
}
MODULES = {
    1: fastnn.nn.ConvReLUMaxPool1d,
    2: fastnn.nn.ConvReLUMaxPool2d,
    3: fastnn.nn.ConvReLUMaxPool3d,
}
RAW = torch.ops.fastnn.conv_relu_max_pool
RAW_WITH_WINNERS = torch.ops.fastnn.conv_relu_max_pool_with_winners
RAW_BACKWARD = torch.ops.fastnn.conv_relu_max_pool_backward


def geometry(
    dims: int,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    pool: Any = 2,
    pool_stride: Any = None,
    pool_padding: Any = 0,
    pool_dilation: Any = 1,
    ceil_mode: bool = False,
) -> tuple[Any, ...]:
    """The public function's arguments after the tensors."""

    def each(value: Any) -> list[int]:
        return [value] * dims if isinstance(value, int) else list(value)

    pool_stride = pool if pool_stride is None else pool_stride
    return (
        *(each(stride), each(padding), each(dilation), groups),
        *(each(pool), each(pool_stride), each(pool_padding), each(pool_dilation), ceil_mode),
    )


def flat(arguments: tuple[Any, ...]) -> tuple[int, ...]:
    """The same as the operators take them."""
    return reference.Geometry(*arguments).flat()


def make(
    input_size: tuple[int, ...],
    out_channels: int,
    kernel: tuple[int, ...],
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
) -> list[Tensor | None]:
    """Input, weight and bias."""
    channels = input_size[1] // groups
    depth = max(channels * torch.Size(kernel).numel(), 1)
    return [
        torch.randn(*input_size, dtype=dtype),
        torch.randn(out_channels, channels, *kernel, dtype=dtype) / depth**0.5,
        torch.randn(out_channels, dtype=dtype) / 2 if bias else None,
    ]


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def error_of(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> str | None:
    """The first line of the RuntimeError that the call raises."""
    try:
        function(*args, **kwargs)
    except RuntimeError as error:
        return str(error).split("\n")[0]
    return None


def assert_like_stock(tensors: list[Tensor | None], arguments: tuple[Any, ...], gradients: bool = True) -> None:
    fused = FUSED[len(arguments[0])]
    # In bfloat16, stock rounds before it compares: another winner where two round to the same.
    gradients = gradients and tensors[0].dtype is not torch.bfloat16
    compare_with_stock(
        lambda *t: fused(*t, *arguments),
        lambda *t: reference.conv_relu_max_pool(*t, *arguments),
        tensors,
        gradients,
    )


class TestValues:
    @pytest.mark.parametrize("out_channels", [1, 2, 7, 8, 10, 16, 17, 31, 32, 33, 50])
    def test_output_channels(self, instruction_set: str, dtype: torch.dtype, out_channels: int) -> None:
        assert_like_stock(make((2, 3, 13, 17), out_channels, (3, 3), dtype=dtype), geometry(2, padding=1))

    @pytest.mark.parametrize("in_channels", [1, 2, 7, 8, 9, 15, 16, 17, 33])
    def test_input_channels(self, instruction_set: str, dtype: torch.dtype, in_channels: int) -> None:
        tensors = make((2, in_channels, 9, 11), 12, (3, 2), dtype=dtype)
        assert_like_stock(tensors, geometry(2, padding=1))
        assert_like_stock([channels_last(tensors[0]), *tensors[1:]], geometry(2, padding=1))

    @pytest.mark.parametrize("width", [2, 3, 13, 14, 15, 16, 28, 29, 30, 61, 300])
    def test_widths(self, instruction_set: str, width: int) -> None:
        assert_like_stock(make((1, 2, 5, width), 18, (2, 2)), geometry(2, padding=1))

    @pytest.mark.parametrize("groups", [2, 3, 6])
    def test_groups(self, instruction_set: str, groups: int) -> None:
        assert_like_stock(make((2, 6, 8, 9), 12, (3, 3), groups), geometry(2, groups=groups))
        assert_like_stock(make((3, 6, 8, 9), 6, (3, 3), groups), geometry(2, padding=1, groups=groups))

    @pytest.mark.parametrize(
        "arguments",
        [
            geometry(2, stride=(2, 3), padding=(1, 2)),
            geometry(2, dilation=(2, 3), padding=3),
            geometry(2, pool=3, pool_stride=2, pool_padding=1),
            geometry(2, pool=(3, 2), pool_stride=(1, 3), pool_dilation=(2, 1), ceil_mode=True),
            geometry(2, pool=(4, 1), pool_stride=1, pool_padding=(2, 0), pool_dilation=3),
            geometry(2, padding=5, pool=2, pool_stride=5),
            geometry(2, pool=1, pool_stride=1),
            geometry(2, pool=2, pool_stride=3, ceil_mode=True),
        ],
    )
    def test_geometries(self, instruction_set: str, dtype: torch.dtype, arguments: tuple[Any, ...]) -> None:
        assert_like_stock(make((2, 3, 19, 21), 20, (3, 2), dtype=dtype), arguments)

    @pytest.mark.parametrize("bias", [True, False])
    def test_one_dimension(self, instruction_set: str, dtype: torch.dtype, bias: bool) -> None:
        assert_like_stock(make((3, 5, 700), 33, (5,), dtype=dtype, bias=bias), geometry(1, padding=2, pool=4))
        assert_like_stock(
            make((2, 4, 501), 8, (3,), 2, dtype, bias),
            geometry(1, stride=2, groups=2, pool=3, pool_stride=2, pool_padding=1, ceil_mode=True),
        )

    def test_three_dimensions(self, instruction_set: str, dtype: torch.dtype) -> None:
        assert_like_stock(make((2, 2, 7, 8, 9), 17, (3, 3, 3), dtype=dtype), geometry(3, padding=1))
        assert_like_stock(
            make((1, 4, 9, 6, 8), 6, (2, 1, 3), 2, dtype),
            geometry(3, stride=(1, 2, 1), groups=2, pool=3, pool_stride=(2, 1, 2), pool_padding=1),
        )

    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(data=st.data())
    def test_random_geometries(self, data: st.DataObject) -> None:
        torch.manual_seed(0)
        dims = data.draw(st.integers(1, 3))

        def each(least: int, most: int) -> list[int]:
            return data.draw(st.lists(st.integers(least, most), min_size=dims, max_size=dims))

        groups = data.draw(st.integers(1, 3))
        pool = each(1, 3)
        arguments = geometry(
            dims, each(1, 3), each(0, 3), each(1, 2), groups, pool, each(1, 3),
            [p // 2 * data.draw(st.integers(0, 1)) for p in pool], each(1, 2), data.draw(st.booleans()),
        )  # fmt: skip
        size = (data.draw(st.integers(0, 3)), groups * data.draw(st.integers(1, 18)), *each(3, 12 if dims < 3 else 7))
        # Several channels: the tolerance is a share of the largest output, which must not be small by chance.
        tensors = make(size, groups * data.draw(st.integers(4, 18)), tuple(each(1, 3)), groups)
        stock_error = error_of(reference.conv_relu_max_pool, *tensors, *arguments)
        if stock_error:
            assert error_of(FUSED[dims], *tensors, *arguments) == stock_error
            return
        tensors = [channels_last(t) if t.dim() > 2 and data.draw(st.booleans()) else t for t in tensors]
        assert_like_stock(tensors, arguments)


class TestAlgorithms:
    """Sizes at which the kernels take another way than direct convolution."""

    @pytest.mark.parametrize("last", [False, True])
    @pytest.mark.parametrize(
        ("size", "out_channels", "padding", "groups"),
        [((2, 64, 21, 26), 64, 1, 1), ((3, 40, 34, 9), 50, 0, 1), ((2, 128, 30, 30), 96, 2, 2)],
    )
    def test_many_channels(
        self, instruction_set: str, size: tuple[int, ...], out_channels: int, padding: int, groups: int, last: bool
    ) -> None:
        tensors = make(size, out_channels, (3, 3), groups)
        if last:
            tensors[:2] = map(channels_last, tensors[:2])
        assert_like_stock(tensors, geometry(2, padding=padding, groups=groups))

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
    def test_many_channels_keep_special_values_in_place(self, instruction_set: str, value: float) -> None:
        for which in (0, 1):
            tensors = make((2, 64, 20, 20), 64, (3, 3))
            tensors[which][1, 2, 1, 1] = value
            assert_like_stock(tensors, geometry(2, padding=1), gradients=False)

    @pytest.mark.parametrize("last", [False, True])
    @pytest.mark.parametrize(
        ("size", "out_channels", "kernel", "arguments"),
        [
            ((37, 3, 14, 13), 10, (5, 5), geometry(2, stride=2, padding=2)),
            ((16, 10, 5, 5), 3, (2, 2), geometry(2, stride=2, padding=1)),
            ((1, 2, 70, 15), 5, (3, 3), geometry(2, padding=1)),
            ((3, 4, 41, 9), 2, (3, 2), geometry(2, dilation=2, groups=2, pool=3, pool_stride=2)),
            ((40, 1, 12, 12), 1, (3, 3), geometry(2, padding=1, pool=3, pool_stride=2, pool_padding=1, ceil_mode=True)),
            ((2, 37, 12, 11), 37, (3, 3), geometry(2, padding=1, groups=37)),
            ((2, 33, 9, 10), 66, (3, 3), geometry(2, stride=2, padding=1, groups=33)),
            ((18, 2, 5, 6, 7), 3, (3, 2, 3), geometry(3, padding=1)),
        ],
    )
    def test_few_output_channels(
        self,
        instruction_set: str,
        dtype: torch.dtype,
        size: tuple[int, ...],
        out_channels: int,
        kernel: tuple[int, ...],
        arguments: tuple[Any, ...],
        last: bool,
    ) -> None:
        tensors = make(size, out_channels, kernel, arguments[3], dtype)
        if last:
            tensors[:2] = map(channels_last, tensors[:2])
        assert_like_stock(tensors, arguments)


class TestSpecialValues:
    def test_nan_and_infinity(self, instruction_set: str, dtype: torch.dtype) -> None:
        input = torch.randn(2, 2, 12, 12, dtype=dtype)
        input[0, 0, 3, 4] = float("nan")
        input[0, 1, 9, 9] = float("inf")
        input[1, 0, 2, 2] = float("-inf")
        weight = torch.randn(20, 2, 1, 1, dtype=dtype)
        assert_like_stock([input, weight, None], geometry(2, pool=3, pool_stride=2, pool_padding=1), gradients=False)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # stock's bfloat16 gives 0
    def test_negative_zero_stays(self, instruction_set: str, dtype: torch.dtype) -> None:
        zeros = torch.full((1, 1, 4, 4), -0.0, dtype=dtype)
        one = torch.ones(1, 1, 1, 1, dtype=dtype)
        bias = torch.full((1,), -0.0, dtype=dtype)
        arguments = geometry(2)
        result, stock = (
            FUSED[2](zeros, one, bias, *arguments),
            reference.conv_relu_max_pool(zeros, one, bias, *arguments),
        )
        assert torch.equal(result.signbit(), stock.signbit())

    def test_denormals_stay(self, instruction_set: str) -> None:
        input = torch.full((1, 1, 4, 4), 1e-40)
        assert_close(FUSED[2](input, torch.ones(1, 1, 1, 1)), input[..., :2, :2], rtol=0, atol=0)

    @pytest.mark.parametrize("dims", [1, 2, 3])
    def test_ties_go_to_the_first_and_nan_to_the_last(self, instruction_set: str, dims: int) -> None:
        weight = torch.ones(1, 1, *[1] * dims)
        for fill, expected in ((1.0, 0), (float("nan"), -1), (0.0, None)):
            input = torch.full((1, 1, *[2] * dims), fill, requires_grad=True)
            (gradient,) = torch.autograd.grad(FUSED[dims](input, weight).sum(), input)
            wanted = torch.zeros(2**dims)
            if expected is not None:
                wanted[expected] = 1
            assert_close(gradient.flatten(), wanted, rtol=0, atol=0)

    def test_windows_of_padding_alone(self, instruction_set: str, dtype: torch.dtype) -> None:
        # Dilated windows that begin in the padding and step over a short convolution.
        tensors = make((2, 3, 4, 3), 5, (1, 1), dtype=dtype)
        arguments = geometry(2, pool=2, pool_stride=1, pool_padding=1, pool_dilation=5)
        with pytest.raises(RuntimeError, match="too small"):
            FUSED[2](*tensors, *arguments)
        tensors = make((2, 3, 5, 5), 5, (1, 1), dtype=dtype)
        arguments = geometry(2, pool=2, pool_stride=1, pool_padding=1, pool_dilation=6)
        assert torch.isinf(FUSED[2](*tensors, *arguments)).any()
        compare_with_stock(
            lambda *t: FUSED[2](*t, *arguments).nan_to_num(neginf=0),
            lambda *t: reference.conv_relu_max_pool(*t, *arguments).nan_to_num(neginf=0),
            tensors,
            dtype is not torch.bfloat16,
        )

    def test_infinite_gradient_stays_in_its_place(self, instruction_set: str) -> None:
        input = torch.rand(1, 3, 8, 8, requires_grad=True)
        weight = torch.rand(4, 3, 3, 3)
        output = FUSED[2](input, weight)
        grad = torch.zeros_like(output)
        grad[0, 0, 0, 0] = float("inf")
        (gradient,) = torch.autograd.grad(output, input, grad)
        assert gradient.isinf().sum() == 27
        assert not gradient.isnan().any()


class TestLayouts:
    @pytest.mark.parametrize("which", ["input", "weight", "both"])
    def test_channels_last(self, instruction_set: str, dtype: torch.dtype, which: str) -> None:
        for dims, size in ((2, (2, 20, 9, 10)), (3, (2, 5, 4, 6, 5))):
            input, weight, bias = make(size, 18, (3,) * dims, dtype=dtype)
            input = channels_last(input) if which != "weight" else input
            weight = channels_last(weight) if which != "input" else weight
            assert_like_stock([input, weight, bias], geometry(dims, padding=1))
            with using_threads(2):  # stock's choice for three dimensions depends on it
                stock = reference.conv_relu_max_pool(input, weight, bias, *geometry(dims, padding=1))
            assert FUSED[dims](input, weight, bias, padding=1).stride() == stock.stride()

    def test_strided_expanded_and_offset(self, instruction_set: str) -> None:
        input, weight, bias = make((2, 3, 12, 14), 10, (3, 3))
        for view in (
            torch.randn(4, 6, 24, 14)[1::2, ::2, ::2],
            torch.randn(2, 3, 14, 12).transpose(2, 3),
            input[:1].expand(4, -1, -1, -1),
            input[..., :1].expand(-1, -1, -1, 9),
            torch.randn(10, 3, 12, 14)[3:5].flip(0),
        ):
            assert_like_stock([view, weight, bias], geometry(2, padding=1))
        assert_like_stock([input, weight.transpose(2, 3), bias[:1].expand(10)], geometry(2))

    def test_unbatched(self, dtype: torch.dtype) -> None:
        for dims in (1, 2, 3):
            input, weight, bias = make((1, 4, *[8] * dims), 6, (3,) * dims, dtype=dtype)
            assert_like_stock([input[0], weight, bias], geometry(dims))

    def test_empty_batch(self, dtype: torch.dtype) -> None:
        assert_like_stock(make((0, 4, 9, 9), 6, (3, 3), dtype=dtype), geometry(2))

    def test_large_windows(self) -> None:
        # More places than a byte has: no winners are kept, stock's path has the gradient.
        tensors = make((2, 3, 20, 20), 5, (3, 3))
        assert_like_stock(tensors, geometry(2, pool=16))
        with pytest.raises(RuntimeError, match="at most 254 elements, got 256"):
            RAW_WITH_WINNERS(*tensors, flat(geometry(2, pool=16)))


class TestThreads:
    @pytest.mark.parametrize(
        ("size", "out_channels", "kernel", "arguments"),
        [
            ((4, 3, 40, 44), 40, (3, 3), geometry(2, padding=1)),
            ((1, 16, 30, 30), 64, (3, 3), geometry(2, pool=3, pool_stride=2, pool_padding=1)),
            ((2, 64, 30, 30), 64, (3, 3), geometry(2, padding=1)),
            ((90, 3, 20, 20), 10, (5, 5), geometry(2, stride=2, padding=2)),
            ((1, 200, 7, 7), 100, (3, 3), geometry(2)),
            ((3, 8, 900), 16, (5,), geometry(1, pool=4)),
            ((1, 2, 12, 13, 14), 16, (3, 3, 3), geometry(3, pool=3, pool_stride=2)),
        ],
    )
    def test_any_number_gives_the_same_bits(
        self, dtype: torch.dtype, size: tuple[int, ...], out_channels: int, kernel: Any, arguments: tuple[Any, ...]
    ) -> None:
        tensors = make(size, out_channels, kernel, dtype=dtype)
        fused = FUSED[len(kernel)]
        expected = fused(*tensors, *arguments)
        for threads in (2, 3, 5):
            with using_threads(threads):
                assert torch.equal(fused(*tensors, *arguments), expected)
                assert torch.equal(RAW_WITH_WINNERS(*tensors, flat(arguments))[0], expected)
                assert_like_stock(tensors, arguments)

    def test_backward_repeats_bit_for_bit(self) -> None:
        tensors = [t.requires_grad_() for t in make((6, 8, 30, 30), 24, (3, 3))]

        def gradients() -> tuple[Tensor, ...]:
            return torch.autograd.grad(FUSED[2](*tensors, padding=1).square().sum(), tensors)

        with using_threads(2):
            for first, second in zip(gradients(), gradients(), strict=True):
                assert torch.equal(first, second)


class TestAutograd:
    @pytest.mark.parametrize("dims", [1, 2, 3])
    def test_gradcheck(self, dims: int) -> None:
        tensors = make((2, 2, *[6] * dims), 3, (3,) * dims, dtype=torch.float64)
        tensors = [t[..., :5] if t.dim() > 4 and t.shape[-1] == 6 else t for t in tensors]
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        fused = FUSED[dims]
        assert torch.autograd.gradcheck(lambda *t: fused(*t, padding=1), leaves, fast_mode=dims == 3)
        assert torch.autograd.gradgradcheck(lambda *t: fused(*t, padding=1), leaves, fast_mode=True)

    @pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
    def test_some_gradients(self, wanted: tuple[int, ...]) -> None:
        tensors = make((2, 3, 8, 8), 4, (3, 3))
        for i in wanted:
            tensors[i].requires_grad_()
        leaves = [tensors[i] for i in wanted]
        ours = torch.autograd.grad(FUSED[2](*tensors).sum(), leaves)
        stock = torch.autograd.grad(reference.conv_relu_max_pool(*tensors, *geometry(2)).sum(), leaves)
        assert_close(ours, stock)

    def test_functional_transforms(self) -> None:
        input, weight, bias = make((4, 3, 8, 8), 5, (3, 3), dtype=torch.float64)

        def loss(function: Callable[..., Tensor], weight: Tensor, image: Tensor) -> Tensor:
            return function(image.unsqueeze(0), weight, bias, *geometry(2)).square().sum()

        def per_sample(function: Callable[..., Tensor]) -> Tensor:
            return torch.func.vmap(torch.func.grad(lambda w, x: loss(function, w, x)), (None, 0))(weight, input)

        assert_close(per_sample(FUSED[2]), per_sample(reference.conv_relu_max_pool))
        jacobian = torch.func.jacrev(lambda b: FUSED[2](input[:1], weight, b, *geometry(2)))(bias)
        stock = torch.func.jacrev(lambda b: reference.conv_relu_max_pool(input[:1], weight, b, *geometry(2)))(bias)
        assert_close(jacobian, stock)
        _, tangent = torch.func.jvp(lambda x: FUSED[2](x, weight), (input,), (torch.ones_like(input),))
        _, expected = torch.func.jvp(
            lambda x: reference.conv_relu_max_pool(x, weight, None, *geometry(2)), (input,), (torch.ones_like(input),)
        )
        assert_close(tangent, expected)

    def test_raw_operator_refuses_a_gradient(self) -> None:
        tensors = make((2, 3, 8, 8), 4, (3, 3))
        for i in range(3):
            leaves = [t.clone().requires_grad_(i == j) for j, t in enumerate(tensors)]
            output = RAW(*leaves, flat(geometry(2)))
            with pytest.raises(RuntimeError, match="no gradient of its own"):
                output.sum().backward()

    def test_memory_kept_for_backward(self) -> None:
        kept: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.data_ptr()] = tensor
            return tensor

        tensors = [t.requires_grad_() for t in make((2, 3, 32, 32), 16, (3, 3))]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            output = FUSED[2](*tensors, padding=1)
        own = sum(t.nbytes for t in kept.values() if all(t is not own for own in tensors) and t.dtype is torch.uint8)
        assert len(kept) == 4
        assert own == output.numel()  # a byte an output: a quarter of one a conv pixel


class TestCompile:
    @pytest.mark.parametrize("dims", [1, 2, 3])
    def test_opcheck(self, dims: int) -> None:
        input, weight, bias = make((2, 3, *[7] * dims), 4, (3,) * dims)
        for x, w in ((input, weight), (channels_last(input), weight), (input, channels_last(weight))):
            arguments = geometry(dims, padding=1, pool=3, pool_stride=2, pool_padding=1)
            torch.library.opcheck(RAW, (x, w, bias, flat(arguments)))
            torch.library.opcheck(RAW_WITH_WINNERS, (x, w, bias, flat(arguments)))
            output, winners = RAW_WITH_WINNERS(x, w, bias, flat(arguments))
            for wanted in ((True, True, True), (False, True, False)):
                torch.library.opcheck(RAW_BACKWARD, (torch.ones_like(output), winners, x, w, flat(arguments), *wanted))

    def test_fullgraph_and_export(self) -> None:
        module = fastnn.nn.ConvReLUMaxPool2d(3, 8, 3, padding=1, pool_kernel_size=3, pool_stride=2)
        input = torch.randn(2, 3, 14, 14, requires_grad=True)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert_close(compiled(input), module(input))
        ours, eager = (torch.autograd.grad(m(input).sum(), [input, *module.parameters()]) for m in (compiled, module))
        assert_close(ours, eager)
        with torch.no_grad():
            exported = torch.export.export(module, (input.detach(),))
            assert_close(exported.module()(input), module(input))

    def test_autocast(self) -> None:
        input, weight, bias = make((2, 3, 8, 8), 4, (3, 3))
        with torch.autocast("cpu", torch.bfloat16):
            result = FUSED[2](input, weight, bias)
            stock = reference.conv_relu_max_pool(input, weight, bias, *geometry(2))
        assert result.dtype is stock.dtype is torch.bfloat16
        assert_close(result, stock)


class TestBadInput:
    @pytest.mark.parametrize("dims", [1, 2, 3])
    @pytest.mark.parametrize(
        "change",
        [
            {"input": (8,)},
            {"input": (2, 5, 8, 8, 8)},
            {"groups": 2},
            {"groups": 0},
            {"groups": -1},
            {"weight": (0, 3, 3, 3, 3)},
            {"bias": 5},
            {"bias": (4, 1)},
            {"stride": 0},
            {"stride": -1},
            {"padding": -1},
            {"dilation": 0},
            {"dilation": 5},
            {"stride": (1, 1, 1, 1)},
            {"padding": (1, 1, 1, 1)},
            {"padding": "other"},
            {"input": (2, 3, 0, 0, 0)},
            {"dtype": torch.float64},
            {"bias_dtype": torch.float64},
            {"pool_kernel_size": 0},
            {"pool_kernel_size": 9},
            {"pool_stride": 0},
            {"pool_stride": -1},
            {"pool_padding": -1},
            {"pool_padding": 2},
            {"pool_dilation": 0},
            {"pool_kernel_size": 3, "pool_padding": 2, "pool_dilation": 2},
        ],
        ids=str,
    )
    def test_stock_words(self, dims: int, change: dict[str, Any]) -> None:
        change = dict(change)
        input = torch.randn(change.pop("input", (2, 3, 8, 8, 8))[: dims + 2])
        weight = torch.randn(change.pop("weight", (4, 3, 3, 3, 3))[: dims + 2], dtype=change.pop("dtype", None))
        bias = torch.randn(change.pop("bias", 4), dtype=change.pop("bias_dtype", None))
        pool = {key.removeprefix("pool_"): change.pop(key) for key in list(change) if key.startswith("pool_")}
        pooling = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[dims]
        pool = {"kernel_size": 2, "stride": 2, **pool}
        stock = error_of(lambda: pooling(CONV[dims](input, weight, bias, **change).relu(), **pool))
        ours = error_of(FUSED[dims], input, weight, bias, **change, **{f"pool_{k}": v for k, v in pool.items()})
        assert stock
        assert ours == stock

    def test_raw_operators_are_safe(self) -> None:
        input, weight, bias = make((2, 3, 8, 8), 4, (3, 3))
        arguments = geometry(2)
        huge = 2**62
        for position, value in (
            *((0, bad) for bad in ([], [1], [0, 1], [huge, huge])),
            *((1, bad) for bad in ([], [-1, 0], [huge, huge], [2**31, 0])),
            *((2, bad) for bad in ([0, 0], [huge, 1])),
            *((3, bad) for bad in (0, -1, huge)),
            *((4, bad) for bad in ([], [0, 2], [huge, huge], [9, 9])),
            *((5, bad) for bad in ([], [0, 1], [-1, 1])),
            *((6, bad) for bad in ([], [-1, 0], [2, 2], [huge, 0])),
            *((7, bad) for bad in ([], [0, 1], [huge, 1])),
        ):
            changed = (*arguments[:position], value, *arguments[position + 1 :])
            with pytest.raises(RuntimeError):
                RAW(input, weight, bias, flat(changed))
            with pytest.raises(RuntimeError):
                RAW_BACKWARD(torch.ones(2, 4, 3, 3), torch.zeros(2, 4, 3, 3, dtype=torch.uint8), input, weight,
                             flat(changed), True, True, True)  # fmt: skip
        for geometry_of_another_rank in ([], [1], flat(arguments)[:-1], (*flat(arguments), 1), flat(geometry(3))):
            with pytest.raises(RuntimeError, match="geometry"):
                RAW(input, weight, bias, geometry_of_another_rank)
        for bad in (input.half(), input.to_sparse(), input.to("meta"), input[0], input[None, None], input[:, :2]):
            with pytest.raises((RuntimeError, NotImplementedError)):
                RAW(bad, weight, bias, flat(arguments))
            with pytest.raises((RuntimeError, NotImplementedError)):
                RAW(input, bad, bias, flat(arguments))
            with pytest.raises((RuntimeError, NotImplementedError)):
                RAW(input, weight, bad, flat(arguments))

    def test_backward_checks_what_was_saved(self) -> None:
        input, weight, bias = make((2, 3, 8, 8), 4, (3, 3))
        arguments = geometry(2, padding=1, pool=3, pool_stride=2, pool_padding=1)
        output, winners = RAW_WITH_WINNERS(input, weight, bias, flat(arguments))
        wanted = (True, True, True)
        RAW_BACKWARD(output, winners, input, weight, flat(arguments), *wanted)
        for place in (9, 77, 254):  # a window has nine
            hostile = winners.clone()
            hostile[1, 3, 2, 2] = place
            with pytest.raises(RuntimeError, match="winners has a place"):
                RAW_BACKWARD(output, hostile, input, weight, flat(arguments), *wanted)
        hostile = winners.clone()
        hostile[0, 0, 0, 0] = 0  # in the padding
        with pytest.raises(RuntimeError, match="winners has a place"):
            RAW_BACKWARD(output, hostile, input, weight, flat(arguments), *wanted)
        for bad in (winners[:1], winners.int(), winners[..., :3], winners.flatten()):
            with pytest.raises(RuntimeError, match="winners"):
                RAW_BACKWARD(output, bad, input, weight, flat(arguments), *wanted)
        for bad in (output[:1], output.double(), output[..., :3], output.flatten()):
            with pytest.raises(RuntimeError, match="grad_output"):
                RAW_BACKWARD(bad, winners, input, weight, flat(arguments), *wanted)

    def test_other_dtypes_take_stock_path(self) -> None:
        for dtype in (torch.float16, torch.complex64):
            tensors = make((2, 3, 8, 8), 4, (3, 3), dtype=dtype)
            if dtype.is_complex:
                with pytest.raises(RuntimeError):
                    FUSED[2](*tensors)
            else:
                assert_close(FUSED[2](*tensors), reference.conv_relu_max_pool(*tensors, *geometry(2)))


class TestModules:
    @pytest.mark.parametrize("dims", [1, 2, 3])
    def test_is_stock_conv(self, dims: int) -> None:
        stock_class = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        pool = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}[dims](3, 2, 1)
        torch.manual_seed(1)
        stock = stock_class(4, 6, 3, 1, 1, 1, 2)
        torch.manual_seed(1)
        ours = MODULES[dims](4, 6, 3, 1, 1, 1, 2, pool_kernel_size=3, pool_stride=2, pool_padding=1)
        assert isinstance(ours, stock_class)
        assert ours.state_dict().keys() == stock.state_dict().keys()
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), stock.parameters(), strict=True))
        input = torch.randn(2, 4, *[9] * dims)
        assert_close(ours(input), pool(stock(input).relu()))
        assert_close(copy.deepcopy(ours)(input[0]), pool(stock(input[0]).relu()))
        assert "pool_kernel_size=3, pool_stride=2, pool_padding=1" in repr(ours)

    def test_attributes_may_be_changed(self) -> None:
        module = fastnn.nn.ConvReLUMaxPool2d(3, 5, 3)
        input = torch.randn(2, 3, 12, 12)
        for name, value in (("padding", (1, 1)), ("pool_stride", 3), ("ceil_mode", True), ("stride", (2, 1))):
            setattr(module, name, value)
            stock = F.conv2d(input, module.weight, module.bias, module.stride, module.padding).relu()
            assert_close(module(input), F.max_pool2d(stock, 2, module.pool_stride, ceil_mode=module.ceil_mode))
        module.stride = (1, 1, 1)
        with pytest.raises(RuntimeError, match="expected stride to be a single integer value or a list of 2 values"):
            module(input)

    @pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
    @pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
    @pytest.mark.parametrize("padding", ["same", "valid", 1])
    @pytest.mark.parametrize("kernel_size", [3, 4])
    def test_padding(self, padding_mode: str, padding: Any, kernel_size: int) -> None:
        stock = nn.Conv2d(3, 5, kernel_size, padding=padding, padding_mode=padding_mode)
        ours = fastnn.nn.ConvReLUMaxPool2d(3, 5, kernel_size, padding=padding, padding_mode=padding_mode)
        ours.load_state_dict(stock.state_dict())
        input = torch.randn(2, 3, 9, 8)
        assert_close(ours(input), F.max_pool2d(stock(input).relu(), 2))

    def test_same_padding_refuses_a_stride(self) -> None:
        with pytest.raises(RuntimeError, match="padding='same' is not supported for strided convolutions"):
            functional.conv_relu_max_pool2d(torch.randn(1, 1, 8, 8), torch.randn(1, 1, 3, 3), stride=2, padding="same")
