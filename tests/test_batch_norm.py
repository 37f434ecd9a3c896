"""Batch norm, ReLU and max-pool in one pass: numbers, gradients of gradients, statistics, special values."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastnn
from fastnn.ops.batch_norm import batch_norm_relu_max_pool, conv_batch_norm_relu_max_pool, relu_max_pool
from fastnn.reference.conv_relu_max_pool import POOL
from fastnn.testing import assert_close_to_reference, compare_with_stock

POOLS: list[dict[str, Any]] = [
    {"pool_kernel_size": 2},
    {"pool_kernel_size": 3, "pool_stride": 2, "pool_padding": 1, "ceil_mode": True},
    {"pool_kernel_size": 1},
]
NAMES = {
    "pool_kernel_size": "kernel_size",
    "pool_stride": "stride",
    "pool_padding": "padding",
    "ceil_mode": "ceil_mode",
}


def stock_pool(x: Tensor, pool: dict[str, Any]) -> Tensor:
    return POOL[x.dim() - 2](F.relu(x), **{NAMES[name]: value for name, value in pool.items()})


def tensors(channels: int, dtype: torch.dtype) -> list[Tensor]:
    """Mean, variance, gamma of both signs, beta."""
    mean, gamma, beta = (torch.randn(channels, dtype=dtype) for _ in range(3))
    return [mean, torch.rand(channels, dtype=dtype) + 0.5, gamma, beta]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [False, True])
def test_against_stock(pool: dict[str, Any], dims: int, dtype: torch.dtype, training: bool) -> None:
    torch.manual_seed(dims)
    x = torch.randn(3, 5, *(9, 8, 7)[:dims], dtype=dtype) * 3 + 2

    def ours(x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        running = (mean.detach().clone(), var.detach().clone())
        return batch_norm_relu_max_pool(x, *running, gamma, beta, dims=dims, training=training, **pool)

    def stock(x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        running = (mean.detach().clone(), var.detach().clone())
        return stock_pool(F.batch_norm(x, *running, gamma, beta, training), pool)

    mean, var, gamma, beta = tensors(5, dtype)

    def given(function: Any) -> Any:
        return lambda x, gamma, beta: function(x, mean.to(x.dtype), var.to(x.dtype), gamma, beta)

    compare_with_stock(given(ours), given(stock), [x, gamma, beta])
    if dims > 1:
        formats = {2: torch.channels_last, 3: torch.channels_last_3d}
        last = x.contiguous(memory_format=formats[dims])
        compare_with_stock(given(ours), given(stock), [last, gamma, beta])


def test_statistics_move_as_stocks() -> None:
    x = torch.randn(4, 3, 6, 6)
    layers = [torch.nn.BatchNorm2d(3, momentum=0.3) for _ in range(2)]
    for _ in range(3):
        layers[0](x)
        one = layers[1]
        arguments = (one.running_mean, one.running_var, one.weight, one.bias, one.num_batches_tracked)
        batch_norm_relu_max_pool(x, *arguments, dims=2, training=True, momentum=0.3, pool_kernel_size=2)
    torch.testing.assert_close(layers[1].state_dict(), layers[0].state_dict())


def test_gradients_of_gradients() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    mean, var, gamma, beta = tensors(2, torch.float64)
    gamma.requires_grad_()
    beta.requires_grad_()

    def function(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        running = (mean.clone(), var.clone())
        return batch_norm_relu_max_pool(x, *running, gamma, beta, dims=2, training=True, pool_kernel_size=2)

    assert torch.autograd.gradcheck(function, (x, gamma, beta))
    assert torch.autograd.gradgradcheck(function, (x, gamma, beta))


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (40, 3, 9, 9)], ids=["few pixels", "many"])
@pytest.mark.parametrize("pool", POOLS)
def test_after_a_convolution(shape: tuple[int, ...], pool: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape), torch.randn(6, 3, 3, 3), torch.randn(6)
    mean, var, gamma, beta = tensors(6, torch.float32)

    def ours(x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor, beta: Tensor) -> Tensor:
        statistics = (mean.to(x.dtype), var.to(x.dtype))
        return conv_batch_norm_relu_max_pool(x, weight, bias, *statistics, gamma, beta, padding=1, **pool)

    def stock(x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor, beta: Tensor) -> Tensor:
        normed = F.batch_norm(F.conv2d(x, weight, bias, padding=1), mean.to(x.dtype), var.to(x.dtype), gamma, beta)
        return stock_pool(normed, pool)

    compare_with_stock(ours, stock, [x, weight, bias, gamma, beta])
    compare_with_stock(ours, stock, [x, weight, None, gamma, beta])


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_scales_and_shifts(pool: dict[str, Any], dims: int) -> None:
    x, scale, shift = torch.randn(3, 5, *(9, 8, 7)[:dims]), torch.randn(5), torch.randn(5)
    sizes = (-1, *(1,) * dims)
    relu_max_pool = fastnn.functional.relu_max_pool
    compare_with_stock(
        lambda x, scale, shift: relu_max_pool(x, scale, shift, **pool),
        lambda x, scale, shift: stock_pool(x * scale.reshape(sizes) + shift.reshape(sizes), pool),
        [x, scale, shift],
    )
    compare_with_stock(
        lambda x, scale: relu_max_pool(x, scale, **pool),
        lambda x, s: stock_pool(x * s.reshape(sizes), pool),
        [x, scale],
    )
    compare_with_stock(
        lambda x, shift: relu_max_pool(x, None, shift, **pool),
        lambda x, shift: stock_pool(x + shift.reshape(sizes), pool),
        [x, shift],
    )
    arguments = [t.double().requires_grad_() for t in (x, scale, shift)]
    assert torch.autograd.gradcheck(lambda *t: relu_max_pool(*t, **pool), arguments, fast_mode=True)
    with pytest.raises(ValueError, match=r"expected a 3D, 4D or 5D input \(got 2D input\)"):
        relu_max_pool(torch.ones(2, 2))
    with pytest.raises(RuntimeError):
        relu_max_pool(x, scale[:3])


def test_special_values_and_empty() -> None:
    x = torch.randn(2, 3, 4, 4)
    x[0, 0, 0, 0], x[0, 1, 0, 0], x[1, 2, 0, 0] = float("nan"), float("inf"), -float("inf")
    pool = {"pool_kernel_size": 2}
    assert_close_to_reference(relu_max_pool(x, dims=2, **pool), stock_pool(x, pool), stock_pool(x.double(), pool))
    minus = torch.full((1, 1, 2, 2), -0.0)
    assert torch.equal(torch.signbit(relu_max_pool(minus, dims=2, **pool)), torch.signbit(stock_pool(minus, pool)))
    mean, var, gamma, beta = tensors(3, torch.float32)
    for training in (False, True):
        arguments = (mean.clone(), var.clone(), gamma, beta)
        ours = batch_norm_relu_max_pool(x, *arguments, dims=2, training=training, **pool)
        stock = stock_pool(F.batch_norm(x, mean.clone(), var.clone(), gamma, beta, training), pool)
        assert torch.equal(ours.isnan(), stock.isnan())
    assert relu_max_pool(torch.randn(0, 3, 4, 4), dims=2, **pool).shape == (0, 3, 2, 2)
    rows = torch.randn(5, 3)
    ours = batch_norm_relu_max_pool(rows, mean, var, gamma, beta, dims=1, training=False, **pool)
    torch.testing.assert_close(ours, F.max_pool1d(F.relu(F.batch_norm(rows, mean, var, gamma, beta)), 2))
    with pytest.raises(ValueError, match=r"expected 4D input \(got 3D input\)"):
        conv_batch_norm_relu_max_pool(torch.randn(3, 4, 4), torch.randn(3, 3, 1, 1), None, mean, var, gamma, beta)
    for bad in (torch.randn(1, 3, 1, 1), torch.randn(3, 4, 4)):
        with pytest.raises((ValueError, RuntimeError)):
            batch_norm_relu_max_pool(bad, mean, var, gamma[:2], beta, dims=2, training=True, **pool)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(2, 3, 4, 4), (40, 3, 9, 9)], ids=["few pixels", "many"])
def test_a_norm_of_another_dtype_than_the_convolution(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval().to(dtype)
    model[1].float()
    x = torch.randn(sizes, dtype=dtype)
    torch.testing.assert_close(fastnn.fuse(copy.deepcopy(model))(x), model(x))


@pytest.mark.parametrize("pool", [None, torch.nn.MaxPool1d(2)])
def test_a_signal_without_a_batch(pool: torch.nn.Module | None) -> None:
    """BatchNorm1d takes its channels for a batch, and its steps for features."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv1d(8, 8, 3, padding=1), torch.nn.BatchNorm1d(8), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers, *([] if pool is None else [pool])).eval()
    model[1].running_mean = torch.randn(8)
    fused = fastnn.fuse(copy.deepcopy(model))
    x = torch.randn(8, 8)
    torch.testing.assert_close(fused(x), model(x))
    with pytest.raises(RuntimeError):
        fused(torch.randn(8, 7))
