"""Each algorithm of csrc/kernels/conv, forced by ``algorithm=``, on every kind of geometry that it applies to."""

import functools
from typing import Any

import hypothesis
import pytest
import torch
from conv_cases import (
    CASES,
    RAW,
    RAW_ALGORITHM,
    RAW_WITH_WINNERS,
    channels_last,
    flat,
    geometry,
    given,
    integers,
    make,
    outputs_and_winners,
)
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from fastnn import _C
from fastnn.functional import conv_relu_max_pool2d
from fastnn.ops.conv_relu_max_pool import flat_geometry
from fastnn.reference import conv_relu_max_pool as reference
from fastnn.testing import (
    DTYPES,
    assert_close_to_reference,
    instruction_sets,
    using_instruction_set,
    using_threads,
)

ALGORITHMS = ("winograd", "phases", "pixels", "depthwise", "direct", "stock")


def applies(
    algorithm: str,
    dtype: torch.dtype,
    size: tuple[int, ...],
    outputs: int,
    kernel: tuple[int, ...],
    arguments: tuple[Any, ...],
) -> bool:
    """What each algorithm is for."""
    stride, padding, dilation, groups, *_ = arguments
    if algorithm in ("winograd", "phases", "pixels") and dtype is torch.float64:
        return False
    if algorithm == "winograd":
        return kernel[-2:] == (3, 3) and stride[-2:] == [1, 1] and dilation[-2:] == [1, 1]
    if algorithm == "phases":
        columns = (size[-1] + 2 * padding[-1] - dilation[-1] * (kernel[-1] - 1) - 1) // stride[-1] + 1
        taps = -(-kernel[-1] // stride[-1])  # of a phase, of which pieces of up to 4 are transformed, 8 in all
        pieces = -(-taps // 4) * stride[-1]
        return dilation[-1] == 1 and stride[-1] <= 4 and taps > 1 and pieces <= 8 and columns > 1
    if algorithm == "depthwise":
        return groups > 1 and size[1] == outputs == groups
    return True


def kernels(algorithm: str) -> list[tuple[str, torch.dtype]]:
    """Instruction sets and dtypes of which the algorithm's kernels differ: the sets for bfloat16 have other
    instructions for direct convolution in it alone, and ``stock``'s own kernels are those of others."""
    names, plain = instruction_sets(), instruction_sets(bfloat16=False)
    if algorithm == "stock":
        return [(names[-1], dtype) for dtype in DTYPES]
    dtypes = DTYPES if algorithm in ("depthwise", "direct") else (torch.float32, torch.bfloat16)
    found = [(name, dtype) for name in plain for dtype in dtypes]
    if algorithm == "direct":
        found += [(name, torch.bfloat16) for name in names if name not in plain]
    return found


KERNELS = [(algorithm, *kernel) for algorithm in ALGORITHMS for kernel in kernels(algorithm)]
of_each_kernel = pytest.mark.parametrize(
    ("algorithm", "instructions", "dtype"), KERNELS, ids=lambda value: str(value).removeprefix("torch.")
)


def formats(dims: int) -> list[bool]:
    """Whether input and weight are channels last."""
    return [False, True] if dims > 1 else [False]


def assert_exact(
    algorithm: str,
    tensors: list[Tensor | None],
    arguments: tuple[Any, ...],
    expected: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Output and winners, by one thread and by two."""
    doubles = [None if tensor is None else tensor.double().contiguous() for tensor in tensors]
    output, winners = expected or outputs_and_winners(doubles, arguments)
    alone = RAW(*tensors, flat(arguments), algorithm)
    with using_threads(2):
        together, chosen = RAW_WITH_WINNERS(*tensors, flat(arguments), algorithm)
    assert_close(alone, output.to(alone.dtype), rtol=0, atol=0, equal_nan=True)
    assert_close(together, alone, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(chosen, winners)


def factor_of(algorithm: str, dtype: torch.dtype) -> int:
    """Of the weight's integers, so that all is exact."""
    if algorithm == "stock":  # which rounds to bfloat16 before it pools
        return 1
    return 576 if algorithm == "winograd" and dtype is torch.bfloat16 else 12


@functools.cache
def exact_case(name: str, factor: int) -> tuple[list[Tensor | None], tuple[Tensor, Tensor]]:
    case = CASES[name]
    tensors = integers(*case[:3], case.arguments[3], case.bias, factor)
    return tensors, outputs_and_winners(tensors, case.arguments)


@functools.cache
def random_case(name: str, dtype: torch.dtype, last: bool) -> tuple[list[Tensor | None], Tensor, Tensor]:
    """Tensors, with stock's output of them in this dtype and in float64."""
    case = CASES[name]
    torch.manual_seed(0)
    tensors = make(*case[:3], case.arguments[3], dtype, case.bias, last)
    doubles = [None if tensor is None else tensor.double() for tensor in tensors]
    stock, exact = (reference.conv_relu_max_pool(*t, *case.arguments) for t in (tensors, doubles))
    return tensors, stock, exact


@pytest.mark.parametrize(
    ("algorithm", "instructions", "dtype", "name"),
    [(*kernel, name) for kernel in KERNELS for name, case in CASES.items() if applies(kernel[0], kernel[2], *case[:4])],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_geometries(algorithm: str, instructions: str, dtype: torch.dtype, name: str) -> None:
    case = CASES[name]
    tensors, expected = exact_case(name, factor_of(algorithm, dtype))
    with using_instruction_set(instructions):
        for last in formats(len(case.kernel)):
            assert_exact(algorithm, given(tensors, dtype, last), case.arguments, expected)
            drawn, stock, exact = random_case(name, dtype, last)
            ours, winners = RAW_WITH_WINNERS(*drawn, flat(case.arguments), algorithm)
            assert_close_to_reference(ours, stock, exact, f"channels last {last}")
            assert torch.equal(RAW(*drawn, flat(case.arguments), algorithm), ours)
            if algorithm == "stock":  # whose sums depend on the number of threads
                continue
            with using_threads(2):
                again = RAW_WITH_WINNERS(*drawn, flat(case.arguments), algorithm)
            assert torch.equal(again[0], ours)
            assert torch.equal(again[1], winners)


# About the number of a vector's lanes, of two, and of a register tile's pixels.
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15, 16, 17, 27, 28, 29, 31, 32, 33, 47, 49, 64, 65)


def small_call(
    algorithm: str,
    dtype: torch.dtype,
    channels: int,
    outputs: int,
    batch: int = 2,
    rows: int = 5,
    columns: int = 9,
    **options: Any,
) -> tuple[list[Tensor | None], tuple[Any, ...]]:
    kernel = {"winograd": (3, 3), "phases": (2, 4)}.get(algorithm, (2, 3))
    groups = channels = outputs if algorithm == "depthwise" else channels
    groups = groups if algorithm == "depthwise" else 1
    size = (batch, channels, rows, columns)
    tensors = integers(size, outputs, kernel, groups, factor=factor_of(algorithm, dtype))
    return tensors, geometry(2, padding=1, groups=groups, **options)


class TestSizes:
    @of_each_kernel
    def test_columns(self, algorithm: str, instructions: str, dtype: torch.dtype) -> None:
        with using_instruction_set(instructions):
            for columns in SIZES:
                for pool in ((2, 1), (1, 2)):
                    columns = max(columns, pool[1], 2 if algorithm == "phases" else 1)  # of the convolution
                    tensors, arguments = small_call(algorithm, dtype, 3, 19, 2, 3, columns + 1, pool=pool)
                    for last in formats(2):
                        assert_exact(algorithm, given(tensors, dtype, last), arguments)

    @of_each_kernel
    def test_columns_in_bands(self, algorithm: str, instructions: str, dtype: torch.dtype) -> None:
        """Rows that are cut, about the sizes of a band, so that the last band has few columns or nearly all."""
        with using_instruction_set(instructions):
            for columns in (207, 208, 209, 333, 400, 447, 449, 690):
                for pool in (1, (1, 3)):
                    tensors, arguments = small_call(algorithm, dtype, 3, 24, 1, 2, columns, pool=pool)
                    for last in formats(2):
                        assert_exact(algorithm, given(tensors, dtype, last), arguments)

    @of_each_kernel
    def test_channels(self, algorithm: str, instructions: str, dtype: torch.dtype) -> None:
        with using_instruction_set(instructions):
            for count in SIZES:
                for channels, outputs in ((count, 5), (3, max(count, 2)), (count, count + 1)):
                    tensors, arguments = small_call(algorithm, dtype, channels, outputs)
                    for last in formats(2):
                        assert_exact(algorithm, given(tensors, dtype, last), arguments)

    @of_each_kernel
    def test_images(self, algorithm: str, instructions: str, dtype: torch.dtype) -> None:
        with using_instruction_set(instructions):
            for batch in SIZES:
                for options in ({"pool": 2}, {"pool": 3, "pool_stride": 1, "pool_padding": 1}):
                    tensors, arguments = small_call(algorithm, dtype, 3, 6, batch, 4, 5, **options)
                    for last in formats(2):
                        assert_exact(algorithm, given(tensors, dtype, last), arguments)


class TestLayouts:
    @of_each_kernel
    def test_formats_that_differ_and_views(self, algorithm: str, instructions: str, dtype: torch.dtype) -> None:
        outputs, channels = (20, 20) if algorithm == "depthwise" else (18, 10)
        (input, weight, bias), arguments = small_call(algorithm, dtype, 2 * channels, 2 * outputs, 4, 12, 14)
        if algorithm == "depthwise":
            arguments = geometry(2, padding=1, groups=outputs)
        else:
            weight = weight[:, :channels]
        weight, bias = weight[:outputs], bias[:outputs]
        first, last = input.to(dtype), channels_last(input.to(dtype))
        inputs = [
            last[:, :channels].contiguous(memory_format=torch.channels_last),
            channels_last(last[:, channels:]),
            channels_last(last[:, :channels])[1::2],
            first[:, channels:],
            first[1::2, ::2, ::2],
            first[:, :channels].mT,
            first[:1, :channels].expand(3, -1, -1, -1),
            first[:, :channels, :, :1].expand(-1, -1, -1, 9),
            last[:, channels:, 1:, 2:],
        ]
        weight, bias = weight.to(dtype), bias.to(dtype)
        weights = [weight, channels_last(weight), weight.mT.contiguous().mT, weight[:1].expand(outputs, -1, -1, -1)]
        with using_instruction_set(instructions):
            for i in inputs:
                for w in weights:
                    assert_exact(algorithm, [i, w, bias[:1].expand(outputs)], arguments)
            assert_exact(algorithm, [inputs[0], weight, None], arguments)


def special_calls(algorithm: str, dtype: torch.dtype) -> list[tuple[list[Tensor | None], tuple[Any, ...]]]:
    """Of random numbers, in both memory formats."""
    names = {
        "winograd": ("winograd_groups", "3d"),
        "phases": ("5x5", "first_layer", "deep_in_parts"),
        "depthwise": ("depthwise", "depthwise_strided"),
    }.get(algorithm, ("3x3", "groups_of_many", "3x3_strided", "deep_1x1"))
    return [
        (random_case(name, dtype, last)[0], CASES[name].arguments)
        for name in names
        for last in formats(len(CASES[name].kernel))
    ]


def assert_each_close(ours: Tensor, tensors: list[Tensor | None], arguments: tuple[Any, ...]) -> None:
    """Each number by what its own sum may have lost in any order of summation: one that is huge, infinite or NaN must
    not reach those beside."""
    doubles = [None if tensor is None else tensor.double() for tensor in tensors]
    exact = reference.conv_relu_max_pool(*doubles, *arguments)
    magnitudes = [t if t is None else t.nan_to_num(0, 0, 0).abs() for t in doubles]
    magnitude = reference.conv_relu_max_pool(*magnitudes, *arguments)
    step = torch.finfo(torch.float64 if ours.dtype is torch.float64 else torch.float32).eps
    allowed = tensors[1][0].numel() * step * magnitude + torch.finfo(ours.dtype).eps * exact.abs()
    finite = exact.isfinite()
    assert torch.equal(finite, ours.isfinite())
    assert_close(ours[~finite].double(), exact[~finite], rtol=0, atol=0, equal_nan=True)
    assert ((ours.double() - exact).abs() <= allowed)[finite].all()


# Of which stock's bfloat16 carries some into windows beside.
of_each_kernel_of_ours = pytest.mark.parametrize(
    ("algorithm", "instructions", "dtype"),
    [kernel for kernel in KERNELS if kernel[0] != "stock" or kernel[2] is not torch.bfloat16],
    ids=lambda value: str(value).removeprefix("torch."),
)


class TestSpecialValues:
    @of_each_kernel_of_ours
    @pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf"), 1e30])
    def test_stay_in_their_windows(self, algorithm: str, instructions: str, dtype: torch.dtype, special: float) -> None:
        with using_instruction_set(instructions):
            for (input, weight, bias), arguments in special_calls(algorithm, dtype):
                middle = tuple(size // 2 for size in input.shape)
                for place in ((0,) * input.dim(), middle, (-1,) * input.dim()):
                    changed = input.clone()
                    changed[place] = special
                    ours = RAW(changed, weight, bias, flat(arguments), algorithm)
                    assert_each_close(ours, [changed, weight, bias], arguments)
                # Whether a sum has the product of padding and an infinite weight, which is NaN, depends on the kernel,
                # as it does in torch. With so little padding, the middle of the kernel meets none.
                changed = weight.clone()
                changed[(1, 0, *(size // 2 for size in weight.shape[2:]))] = special
                paddings = [min(have, size // 2) for have, size in zip(arguments[1], weight.shape[2:], strict=True)]
                others = (arguments[0], paddings, *arguments[2:])
                ours = RAW(input, changed, bias, flat(others), algorithm)
                assert_each_close(ours, [input, changed, bias], others)

    @pytest.mark.parametrize("large", [1e4, -1e6, 1e9])
    def test_large_numbers_do_not_reach_far(self, large: float) -> None:
        """F(4x4) adds what is beside a window and takes it away again."""
        x, weight, bias = make((1, 64, 32, 32), 64, (3, 3), 1, torch.bfloat16, True)
        x[..., 14:] = large
        ours, exact = (
            RAW(*tensors, flat(geometry(2, padding=1)), "winograd" if tensors[0] is x else None)[..., :6].double()
            for tensors in ([x, weight, bias], [t.double() for t in (x, weight, bias)])
        )
        assert ((ours - exact).abs() <= 2**-7 * exact.abs() + 2**-8).all()

    @of_each_kernel_of_ours
    def test_winners_among_nan(self, algorithm: str, instructions: str, dtype: torch.dtype) -> None:
        """The last NaN of a window."""
        with using_instruction_set(instructions):
            for options in ({"pool": 2}, {"pool": 3, "pool_stride": 1, "pool_padding": 1}):
                (input, weight, bias), arguments = small_call(algorithm, dtype, 4, 17, rows=12, columns=20, **options)
                input[torch.rand_like(input) < 0.02] = torch.nan
                for last in formats(2):
                    assert_exact(algorithm, given([input, weight, bias], dtype, last), arguments)

    @of_each_kernel
    def test_negative_zeros_stay(self, algorithm: str, instructions: str, dtype: torch.dtype) -> None:
        # Transforms subtract zeros, a matrix unit begins with 0, and stock's sign depends on the size.
        if algorithm in ("winograd", "phases", "stock") or instructions == "amx_bf16":
            return
        channels = 20 if algorithm == "depthwise" else 1
        tensors = [torch.full((2, 20, 5, 6), -0.0), torch.ones(20, 20 // channels, 1, 1), torch.full((20,), -0.0)]
        with using_instruction_set(instructions):
            for last in formats(2):
                arguments = flat(geometry(2, groups=channels))
                ours, winners = RAW_WITH_WINNERS(*given(tensors, dtype, last), arguments, algorithm)
                assert (ours == 0).all()
                assert ours.signbit().all()
                assert (winners == 255).all()

    @of_each_kernel
    def test_denormals_stay(self, algorithm: str, instructions: str, dtype: torch.dtype) -> None:
        if dtype is torch.bfloat16:  # whose instructions take them for zeros
            return
        tensors, arguments = small_call(algorithm, dtype, 5, 18)
        info = torch.finfo(dtype)
        tensors = [tensors[0] * info.tiny / 64, tensors[1] / 12, None]
        with using_instruction_set(instructions):
            for last in formats(2):
                ours = RAW(*given(tensors, dtype, last), flat(arguments), algorithm)
                exact = reference.conv_relu_max_pool(*tensors, *arguments)
                assert exact.count_nonzero() > exact.numel() / 2
                assert_close(ours.double(), exact, rtol=0, atol=16 * tensors[1][0].numel() * info.tiny * info.eps)


def draw_call(algorithm: str, data: st.DataObject) -> tuple[tuple[int, ...], int, tuple[int, ...], tuple[Any, ...]]:
    dims = data.draw(st.integers(2 if algorithm == "winograd" else 1, 3))

    def each(least: int, most: int) -> list[int]:
        return data.draw(st.lists(st.integers(least, most), min_size=dims, max_size=dims))

    kernel, stride, dilation = each(1, 4), each(1, 3), each(1, 2)
    if algorithm == "winograd":
        kernel[-2:], stride[-2:], dilation[-2:] = [3, 3], [1, 1], [1, 1]
    if algorithm == "phases":
        kernel[-1], dilation[-1] = stride[-1] + data.draw(st.integers(1, 6)), 1
    channels, outputs, groups = (data.draw(st.integers(1, most)) for most in (20, 40, 3))
    if algorithm == "depthwise":
        groups, channels, outputs = data.draw(st.integers(2, 40)), 1, 1
    pool = each(1, 3)
    arguments = geometry(
        dims, stride, each(0, 3), dilation, groups, pool, each(1, 3),
        [data.draw(st.integers(0, size // 2)) for size in pool], each(1, 2), data.draw(st.booleans()),
    )  # fmt: skip
    size = (data.draw(st.integers(1, 20)), groups * channels, *each(3, 40 if dims == 1 else 20 if dims == 2 else 8))
    return size, groups * outputs, tuple(kernel), arguments


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@hypothesis.given(data=st.data())
def test_random_geometries(algorithm: str, data: st.DataObject) -> None:
    torch.manual_seed(0)
    size, outputs, kernel, arguments = draw_call(algorithm, data)
    instructions, dtype = data.draw(st.sampled_from(kernels(algorithm)))
    last = data.draw(st.sampled_from(formats(len(kernel))))
    bias = data.draw(st.booleans())
    tensors = integers(size, outputs, kernel, arguments[3], bias, factor_of(algorithm, dtype))
    try:
        expected = outputs_and_winners(tensors, arguments)
    except RuntimeError:  # there is no pixel, or no window
        return
    if applies(algorithm, dtype, size, outputs, kernel, arguments):
        with using_instruction_set(instructions):
            assert_exact(algorithm, given(tensors, dtype, last), arguments, expected)


@pytest.mark.parametrize("instructions", instruction_sets())
@pytest.mark.parametrize("padding", [0, 1, 2, 4])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_depthwise_at_the_edges(stride: int, padding: int, instructions: str) -> None:
    """Rows of every width, read where they lie: pixels at both ends have columns of the kernel on the padding."""
    for width in range(1, 20):
        for kernel in (2, 3, 5):
            if width + 2 * padding < kernel:
                continue
            arguments = geometry(2, stride, padding, groups=32, pool=1)
            tensors = integers((2, 32, 3, width), 32, (3, kernel), arguments[3], True, 12)
            expected = outputs_and_winners(tensors, arguments)
            with using_instruction_set(instructions):
                assert_exact("depthwise", given(tensors, torch.float32, True), arguments, expected)


class TestChoice:
    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_does_not_apply(self, algorithm: str) -> None:
        for name, case in CASES.items():
            for dtype in (torch.float32, torch.float64):
                if applies(algorithm, dtype, *case[:4]):
                    continue
                for last in formats(len(case.kernel)):
                    tensors = random_case(name, dtype, last)[0]
                    for operator in (RAW, RAW_WITH_WINNERS, RAW_ALGORITHM):
                        with pytest.raises(RuntimeError, match=f"algorithm '{algorithm}' does not apply to this call"):
                            operator(*tensors, flat(case.arguments), algorithm)

    @pytest.mark.parametrize("name", ["", "fast", "Direct", "direct\0", "winograd " * 99])
    @pytest.mark.parametrize("batch", [0, 2])
    def test_unknown(self, name: str, batch: int) -> None:
        tensors = make((batch, 3, 8, 8), 4, (3, 3))
        for operator in (RAW, RAW_WITH_WINNERS, RAW_ALGORITHM):
            with pytest.raises(RuntimeError, match="there is no algorithm '"):
                operator(*tensors, flat(geometry(2)), algorithm=name)

    def test_on_a_gpu(self) -> None:
        pytest.importorskip("triton")
        from fastnn.kernels.conv import launch as gpu

        tensors = make((2, 3, 8, 8), 4, (3, 3))
        for operator in (gpu.conv_relu_max_pool, gpu.conv_relu_max_pool_with_winners):
            with pytest.raises(RuntimeError, match="algorithm 'direct' does not apply to a GPU"):
                operator(*tensors, flat(geometry(2)), "direct")

    def test_of_no_images(self) -> None:
        tensors = make((0, 3, 8, 8), 4, (3, 3))
        assert RAW(*tensors, flat(geometry(2)), "direct").shape == (0, 4, 3, 3)
        with pytest.raises(RuntimeError, match="does not apply"):
            RAW(*tensors, flat(geometry(2)), "depthwise")

    @pytest.mark.parametrize(
        ("size", "outputs", "kernel", "options", "dtype", "chosen"),
        [
            ((8, 64, 56, 56), 64, (3, 3), {"padding": 1}, torch.float32, "winograd"),
            ((8, 3, 64, 64), 64, (7, 7), {"stride": 2, "padding": 3}, torch.float32, "phases"),
            ((8, 1, 32, 32), 2, (3, 3), {"padding": 1}, torch.float32, "pixels"),
            ((8, 64, 28, 28), 64, (3, 3), {"groups": 64, "padding": 1, "last": True}, torch.float32, "depthwise"),
            ((8, 64, 28, 28), 64, (3, 3), {"stride": 2, "padding": 1}, torch.float64, "direct"),
            ((8, 256, 28, 28), 256, (1, 1), {}, torch.float32, "stock"),
        ],
    )
    def test_chosen(
        self,
        size: tuple[int, ...],
        outputs: int,
        kernel: tuple[int, ...],
        options: dict[str, Any],
        dtype: torch.dtype,
        chosen: str,
    ) -> None:
        """Where each is at its best, with every instruction set."""
        options = dict(options)
        tensors = make(size, outputs, kernel, options.get("groups", 1), dtype, last=options.pop("last", False))
        for name in instruction_sets():
            with using_instruction_set(name):
                assert RAW_ALGORITHM(*tensors, flat(geometry(2, **options)))[0] == chosen, name


@pytest.mark.parametrize("isa", instruction_sets(bfloat16=False))
@pytest.mark.parametrize(
    ("image", "weight", "stride", "padding"),
    [
        ((3, 20, 20), (10, 3, 5, 5), 2, 2),  # the two of models.Conv2DNet
        ((10, 5, 5), (10, 10, 2, 2), 2, 1),
        ((1, 12, 12), (6, 1, 3, 3), 1, 1),
        ((2, 40), (8, 2, 5), 1, 2),
    ],
)
def test_more_images_never_cost_less(
    isa: str, image: tuple[int, ...], weight: tuple[int, ...], stride: int, padding: int
) -> None:
    """Images that share a vector cost no more than a full vector of them."""
    geometry = flat_geometry(len(image) - 1, stride, padding, 1, 1, 2, None, 0, 1, False)
    with using_instruction_set(isa):
        costs = [_C.conv_forward_cost((batch, *image), weight, geometry) for batch in range(1, 66)]
    for batch, cost in enumerate(costs[:-1]):
        assert cost <= 1.05 * min(costs[batch + 1 :]), f"{batch + 1} images"


@pytest.mark.parametrize("images", [7, 9, 15, 17, 31])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_lanes_without_an_image_are_clear(images: int, memory_format: torch.memory_format) -> None:
    """Scratch that an earlier call has left NaN in does not come back."""
    weight, bias = torch.randn(10, 3, 5, 5), torch.randn(10)
    for size in (20, 9, 11):
        poison = torch.full((32, 3, size, size), torch.nan).to(memory_format=memory_format)
        x = torch.randn(images, 3, size, size).to(memory_format=memory_format)
        settings = {"stride": 2, "padding": 2}
        conv_relu_max_pool2d(poison, weight, bias, **settings)
        found = conv_relu_max_pool2d(x, weight, bias, **settings)
        expected = torch.nn.functional.max_pool2d(
            torch.nn.functional.conv2d(x.double(), weight.double(), bias.double(), **settings).relu(), 2
        )
        assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
