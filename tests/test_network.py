"""Networks: what csrc/network computes from a program is what the reference computes, layer by layer."""

import pytest
import torch
import torch.nn.functional as F
from random_networks import check
from torch import Tensor
from torch.testing import assert_close

from fastnn.network_program import KINDS
from fastnn.reference.network import LAYERS


def test_the_reference_has_every_layer() -> None:
    assert LAYERS.keys() == KINDS.keys()


@pytest.mark.parametrize("seed", range(300))
def test_random_networks(seed: int) -> None:
    check(seed)


def run(text: str, inputs: list[Tensor], weights: list[Tensor], packed_for: list[int] | None = None) -> list[Tensor]:
    joined = torch.cat([weight.reshape(-1) for weight in weights] or [torch.empty(0)])
    packed = torch.empty(0, dtype=torch.uint8)
    if packed_for is not None:
        packed = torch.ops.fastnn.network_packed(joined, text, packed_for)
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


@pytest.mark.parametrize("rows", [1, 50, 5000])
def test_softmax_of_long_rows(rows: int) -> None:
    text = """fastnn.network 1
input -> x sizes=:,:
softmax input=x -> y
softmax input=x -> z logarithm=1
output input=y,z"""
    x = torch.randn(3, rows)
    x[0, 0] = -torch.inf
    exact = [F.softmax(x.double(), -1), F.log_softmax(x.double(), -1)]
    for found, wanted in zip(run(text, [x], []), exact, strict=True):
        assert_close(found.double(), wanted, rtol=2e-6, atol=1e-7, equal_nan=True)
