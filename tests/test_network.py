"""Networks: what csrc/network computes from a program is what the reference computes, layer by layer."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_networks import check
from torch import Tensor
from torch.testing import assert_close

from fastnn.activations import parse_one
from fastnn.network_program import KINDS
from fastnn.reference.network import LAYERS
from fastnn.testing import using_threads


def test_the_reference_has_every_layer() -> None:
    assert LAYERS.keys() == KINDS.keys()


@pytest.mark.parametrize("seed", range(300))
def test_random_networks(seed: int) -> None:
    check(seed)


def run(text: str, inputs: list[Tensor], weights: list[Tensor], packed_for: list[int] | None = None) -> list[Tensor]:
    joined = torch.cat([weight.reshape(-1) for weight in weights] or [torch.empty(0)])
    packed = torch.empty(0, dtype=torch.uint8)
    if packed_for is not None:
        packed = torch.ops.fastnn.pack_network(joined, text, packed_for)
    return list(torch.ops.fastnn.network(inputs, joined, packed, text))


def test_packed_phases_of_other_sizes() -> None:
    """Of a transposed convolution, other phases exist for other sizes of the input."""
    text = """fastnn.network 1
input -> x sizes=1,1,:
weight -> w sizes=1,1,3
conv_transpose input=x weight=w -> y stride=2 padding=1
output input=y"""
    weight = torch.randn(1, 1, 3)
    for packed_for in (1, 2, 8):
        for length in (1, 2, 5, 8):
            x = torch.randn(1, 1, length)
            (found,) = run(text, [x], [weight], [1, 1, packed_for])
            assert_close(found, F.conv_transpose1d(x, weight, None, 2, 1))


def test_values_without_elements() -> None:
    text = """fastnn.network 1
input -> x sizes=2,0,3,4
mean input=x -> y dims=1,3
mean input=x -> z dims=1,3 sums=1
output input=y,z"""
    mean, total = run(text, [torch.empty(2, 0, 3, 4)], [])
    assert bool(mean.isnan().all())
    assert_close(total, torch.zeros(2, 3))
    text = """fastnn.network 1
input -> x sizes=3
weight -> w sizes=0
binary input=x other=w -> y function=add
output input=y"""
    with pytest.raises(RuntimeError, match="cannot be broadcast"):
        run(text, [torch.randn(3)], [torch.empty(0)])


@pytest.mark.parametrize("channels", [1, 20])
def test_infinities_stay(channels: int) -> None:
    text = f"""fastnn.network 1
input -> x sizes=:,{channels},:
upsample input=x -> y factors=2 linear=1
avg_pool input=x -> z kernel=2
max_pool input=x -> m kernel=2
output input=y,z,m"""
    row = torch.tensor([1.0, torch.inf, 3e38, -3e38, -torch.inf, torch.nan, 0.0, -torch.inf])
    x = row.expand(2, channels, 8).contiguous()
    wanted = [F.interpolate(x, scale_factor=2, mode="linear"), F.avg_pool1d(x, 2), F.max_pool1d(x, 2)]
    for found, expected in zip(run(text, [x], []), wanted, strict=True):
        assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("factors", [(1, 2), (2, 1), (1, 1), (3, 2)])
@pytest.mark.parametrize("align_corners", [False, True])
def test_infinities_stay_in_their_row(factors: tuple[int, int], align_corners: bool) -> None:
    text = f"""fastnn.network 1
input -> x sizes=1,1,4,5
upsample input=x -> y factors={factors[0]},{factors[1]} linear=1 align_corners={int(align_corners)}
output input=y"""
    x = torch.zeros(1, 1, 4, 5)
    x[0, 0, 2, 1] = torch.inf
    wanted = F.interpolate(x, scale_factor=tuple(map(float, factors)), mode="bilinear", align_corners=align_corners)
    assert_close(run(text, [x], [])[0], wanted, equal_nan=True)


def test_no_size_is_negative() -> None:
    text = """fastnn.network 1
input -> x sizes=2,3
slice input=x -> e dim=0 start=0 stop=0
reshape input=e -> n sizes=-1,0,2,3
mean input=n -> m dims=1,2 sums=1
cat inputs=x,m -> c dim=0
output input=c"""
    with pytest.raises(RuntimeError, match="is invalid for input of size 0"):
        run(text, [torch.randn(2, 3)], [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inner", [1, 3, 16, 300])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 16, 17, 33, 64, 65, 600, 5000])
@pytest.mark.parametrize("outer", [0, 1, 4, 35])
def test_softmax(outer: int, count: int, inner: int, dtype: torch.dtype) -> None:
    """Along rows that fill less than a vector and many of them, and along columns. The differences to the largest
    element reach some 60. Rounding them is the largest error, relative in softmax and absolute in its logarithm."""
    outer = min(outer, 2) if count * inner > 1e6 else outer
    text = """fastnn.network 1
input -> x sizes=:,:,:
softmax input=x -> y dim=1
softmax input=x -> z dim=1 logarithm=1
output input=y,z"""
    x = 9 * torch.randn(outer, count, inner, dtype=dtype)
    if outer > 1 and count > 1:
        x[0, 0], x[1, 1] = -torch.inf, torch.nan
    joined = torch.empty(0, dtype=dtype)
    y, z = torch.ops.fastnn.network([x], joined, torch.empty(0, dtype=torch.uint8), text)
    eps = torch.finfo(dtype).eps
    assert_close(y.double(), F.softmax(x.double(), 1), rtol=100 * eps, atol=eps, equal_nan=True)
    assert_close(z.double(), F.log_softmax(x.double(), 1), rtol=0, atol=200 * eps, equal_nan=True)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9])
def test_sizes_at_the_ends_of_a_convolution(size: int) -> None:
    """More zeros on one side than on the other, and a crop: results without elements, and the errors, are torch's."""
    text = """fastnn.network 1
input -> x sizes=:,3,:
weight -> w sizes=4,3,3
conv input=x weight=w -> y dilation=2 padding=2 padding_end=1 crop=3
output input=y"""
    x, weight = torch.randn(2, 3, size), torch.randn(4, 3, 3)
    padded = F.pad(x, (2, 1))
    if size + 3 < 5:
        for call in (lambda: F.conv1d(padded, weight, dilation=2), lambda: run(text, [x], [weight])[0]):
            with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
                call()
    else:
        assert_close(run(text, [x], [weight])[0], F.conv1d(padded, weight, dilation=2)[:, :, :-3])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [6, 32])
@pytest.mark.parametrize("length", [1, 50, 3000])
def test_parts_are_read_where_they_lie(length: int, channels: int, dtype: torch.dtype, threads: int) -> None:
    """Parts of a value, and parts of parts, by every layer that reads them in place, in the format that the convolution
    makes likely."""
    text = f"""fastnn.network 1
input -> x sizes=:,{channels},:
weight -> w sizes={channels},{channels},1
conv input=x weight=w -> y
split input=y -> a b dim=1 chunks=2
binary input=a other=b -> g function=mul input_activation=tanh other_activation=sigmoid
slice input=b -> c dim=1 start=1 stop=3
activation input=c -> d activation=relu
binary input=c other=d -> e function=sub reverses=1 activation=silu
binary input=a -> n function=div number=3.0
slice input=x -> s dim=0 start=1
binary input=s other=s -> q function=add input_activation=elu(1.0)
cat inputs=b,a -> k dim=1
output input=g,e,n,q,k,b"""
    x = torch.randn(3, channels, length, dtype=dtype)
    weight = torch.randn(channels, channels, 1, dtype=dtype)
    a, b = F.conv1d(x.double(), weight.double()).chunk(2, 1)
    c, s = b[:, 1:3], x.double()[1:]
    wanted = [
        torch.tanh(a) * torch.sigmoid(b), F.silu(F.relu(c) - c), a / 3, F.elu(s) + s, torch.cat([b, a], 1), b,
    ]  # fmt: skip
    with using_threads(threads):
        found = run(text, [x], [weight])
    limit = 1e-12 if dtype == torch.float64 else 2e-5
    for one, other in zip(found, wanted, strict=True):
        assert_close(one.double(), other, rtol=limit, atol=limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ["relu", "hardtanh(0.0,6.0)", "hardtanh(-0.5,0.25)", "gelu"])
@pytest.mark.parametrize(
    "case", ["linear", "direct", "pixels", "winograd", "product", "depthwise", "strided", "dilated", "deep padding"]
)
def test_bounds_of_sums(case: str, activation: str, dtype: torch.dtype, instruction_set: str) -> None:
    """Activations that keep sums between two bounds, NaN among them, by every algorithm and in either format."""
    sizes, weight_sizes, settings = {
        "linear": ((33, 20), (19, 20), {}),
        "direct": ((2, 20, 9, 11), (24, 20, 3, 2), {}),
        "pixels": ((2, 3, 17, 19), (5, 3, 3, 3), {"padding": 1}),
        "winograd": ((2, 64, 12, 13), (64, 64, 3, 3), {"padding": 1}),
        "product": ((2, 40, 9, 11), (24, 40, 1, 1), {}),
        "depthwise": ((2, 64, 9, 11), (64, 1, 3, 3), {"padding": 1, "groups": 64}),
        "strided": ((1, 32, 12, 10), (32, 1, 3, 5), {"padding": 2, "stride": 2, "groups": 32}),
        "dilated": ((2, 48, 3, 4), (48, 1, 3, 3), {"padding": 3, "dilation": 3, "groups": 48}),
        "deep padding": ((1, 32, 1, 6, 7), (32, 1, 1, 3, 3), {"padding": 1, "groups": 32}),
    }[case]
    x, weight, bias = (torch.randn(*size, dtype=dtype) for size in (sizes, weight_sizes, weight_sizes[:1]))
    x.view(-1)[7] = torch.nan
    words = "".join(f" {name}={value}" for name, value in settings.items())
    line = f"linear input=a weight=w bias=b -> y activation={activation}"
    if case != "linear":  # a layer of its own in front, so that the format is the network's choice
        line = f"conv input=a weight=w bias=b -> y{words} activation={activation}"
    text = f"""fastnn.network 1
input -> x sizes={",".join(":" if d != 1 else str(size) for d, size in enumerate(sizes))}
weight -> w sizes={",".join(map(str, weight_sizes))}
weight -> b sizes={weight_sizes[0]}
activation input=x -> a activation=relu
{line}
output input=y"""
    (found,) = run(text, [x], [weight, bias])
    given = F.relu(x.double())
    function: Any = F.linear if case == "linear" else F.conv3d if case == "deep padding" else F.conv2d
    y = function(given, weight.double(), bias.double(), **settings)
    wanted = parse_one(activation)(y)
    limit = 1e-11 if dtype == torch.float64 else 1e-4
    assert_close(found.double(), wanted, rtol=limit, atol=limit, equal_nan=True)


def test_a_pool_needs_pixels_that_are_left() -> None:
    text = """fastnn.network 1
input -> x sizes=1,1,4
weight -> w sizes=1,1,1
conv input=x weight=w -> y crop=9 pool=2 pool_padding=1 activation=relu
output input=y"""
    with pytest.raises(RuntimeError, match="output size"):
        run(text, [torch.randn(1, 1, 4)], [torch.randn(1, 1, 1)])


@pytest.mark.parametrize("line", [
    "conv input=x0 weight=w0 -> v0 crop=1",
    "conv input=x0 weight=w0 -> v0 padding_end=1",
    "binary input=x0 other=x0 -> v0 function=mul other_activation=tanh",
])  # fmt: skip
def test_training_refuses_what_it_would_leave_out(line: str) -> None:
    text = f"""fastnn.network 1
input -> x0 sizes=:,:,:
weight -> w0 sizes=1,1,1
{line}
conv input=v0 weight=w0 -> v1
output input=v1"""
    with pytest.raises(RuntimeError, match="in training"):
        torch.ops.fastnn.network_with_pass([torch.randn(1, 1, 4)], [torch.randn(1, 1, 1)], text)


@pytest.mark.parametrize("linear", [0, 1])
def test_images_that_shrink_to_one_pixel(linear: int) -> None:
    """One pixel is the same in both memory formats, but the image that it is made of is not."""
    text = f"""fastnn.network 1
input -> x sizes=:,8,8,4
weight -> w sizes=8,8,3,3
conv input=x weight=w -> y padding=1
mean input=y -> like dims=2,3 keepdim=1
upsample input=y like=like -> z sizes=0.2,0.3 linear={linear}
output input=z"""
    x, weight = torch.randn(3, 8, 8, 4), torch.randn(8, 8, 3, 3)
    size = {"mode": "bilinear", "align_corners": False} if linear else {}
    expected = F.interpolate(F.conv2d(x, weight, padding=1), (1, 1), **size)
    assert_close(run(text, [x], [weight], list(x.shape))[0], expected, rtol=1e-4, atol=1e-4)
