"""What conv_relu_max_pool refuses, and its modules."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conv_cases import (
    CONV,
    FUSED,
    MODULES,
    RAW,
    RAW_ALGORITHM,
    RAW_BACKWARD,
    RAW_WITH_WINNERS,
    assert_like_stock,
    error_of,
    flat,
    geometry,
    make,
)
from torch import nn
from torch.testing import assert_close

import fastnn.nn
from fastnn import functional
from fastnn.reference import conv_relu_max_pool as reference


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

    @pytest.mark.parametrize(
        "change",
        [
            # Products of three dimensions that are zero in 64 bits.
            {"dims": 3, "padding": 2**21 - 1, "pool": 1, "pool_stride": 1398101},
            {"dims": 3, "padding": 2**21 - 1, "pool": 1, "pool_stride": 1398101, "last": True},
            {"dims": 2, "stride": 2147483647, "padding": 2147483646, "pool": 1},
            {"dims": 2, "kernel": 3, "padding": 2**30 - 1, "dilation": 2**30 - 1, "pool": 1},
            {"dims": 3, "kernel": 3, "padding": 2**30 - 1, "dilation": 2**30 - 1, "pool": 1},
            # Padding whose pixels plans would go through for minutes.
            {"dims": 1, "padding": 715827883, "dilation": 3, "pool": 3, "pool_stride": 1},
            {"dims": 1, "padding": 2**30, "pool": 2**31 - 1, "pool_stride": 1},
        ],
        ids=str,
    )
    def test_extents(self, change: dict[str, Any]) -> None:
        change = dict(change)
        dims, kernel, last = change.pop("dims"), change.pop("kernel", 1), change.pop("last", False)
        input, weight, _ = make((1, 16, *[2] * dims), 16, (kernel,) * dims, bias=False, last=last)
        arguments = geometry(dims, **change)
        for operator in (RAW, RAW_WITH_WINNERS, RAW_ALGORITHM):
            with pytest.raises(RuntimeError, match="too large"):
                operator(input, weight, None, flat(arguments))
        with pytest.raises(RuntimeError, match="too large"):
            FUSED[dims](input, weight, None, *arguments)

    def test_stride_beyond_the_image(self) -> None:
        """A stride that leaves one pixel needs no memory, though a window of the pool reaches over two strides."""
        input, weight, bias = make((1, 2, 9, 9), 4, (3, 3))
        arguments = geometry(2, stride=(2**30, 1), padding=1, pool=(2, 2), pool_stride=1, pool_padding=(1, 0))
        assert_like_stock([input, weight, bias], arguments)

    def test_elements_without_memory(self) -> None:
        """Tensors that are expanded take no more time than there is memory to copy them to."""
        input, weight, bias = make((1, 3, 8, 8), 4, (3, 3))
        expanded = [input[:1].expand(5, -1, -1, -1), weight[:1].expand(4, -1, -1, -1), bias[:1].expand(4)]
        output, winners = RAW_WITH_WINNERS(*expanded, flat(geometry(2)))
        assert_close(output, FUSED[2](*(tensor.contiguous() for tensor in expanded)))
        rest = [flat(geometry(2)), True, True, True]
        dense = [tensor.contiguous() for tensor in expanded[:2]]
        gradients = RAW_BACKWARD(output[:1].expand(5, -1, -1, -1), winners, *expanded[:2], *rest)
        assert_close(gradients, RAW_BACKWARD(output, winners, *dense, *rest))
        huge = input.expand(2**40, -1, -1, -1)
        with pytest.raises(RuntimeError):
            RAW_ALGORITHM(huge, weight, bias, flat(geometry(2)))
        with pytest.raises(RuntimeError):
            RAW_BACKWARD(
                torch.zeros(1).expand(2**40, 4, 3, 3), torch.zeros(1, dtype=torch.uint8).expand(2**40, 4, 3, 3),
                huge, weight, flat(geometry(2)), False, False, True,
            )  # fmt: skip

    def test_no_images_take_no_algorithm(self) -> None:
        input, weight, bias = make((0, 3, 17, 33), 64, (3, 3))
        assert RAW_ALGORITHM(input, weight, bias, flat(geometry(2))) == ("none", "none")

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


NAMES = (
    *("stride", "padding", "dilation", "groups"),
    *("pool_kernel_size", "pool_stride", "pool_padding", "pool_dilation"),
)
NUMBERS = [np.int64, np.int32, torch.tensor, lambda number: torch.tensor([number])]


class TestNumbers:
    """What stock takes for a number, it is here; whatever way a call takes, ReLU is on it."""

    @pytest.mark.parametrize("dims", [1, 2, 3])
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("number", NUMBERS)
    def test_of_numpy_and_tensors(self, dims: int, name: str, number: Any) -> None:
        input, weight, bias = make((2, 4, *[9] * dims), 4, (3,) * dims, groups=2 if name == "groups" else 1)
        arguments = {"pool_kernel_size": 3, name: 1 if name == "pool_padding" else 2}
        expected = FUSED[dims](input, weight, bias, **arguments)
        forms = [number(arguments[name])] if name == "groups" else [number(arguments[name])] * dims
        for given in (forms[0], forms, tuple(forms)):
            if name == "groups" and given is not forms[0]:
                continue
            assert torch.equal(FUSED[dims](input, weight, bias, **{**arguments, name: given}), expected)
            if name != "groups":  # torch.nn.Conv2d itself takes no such thing for it
                module = MODULES[dims](4, 4, 3, pool_kernel_size=3)
                module.weight.data, module.bias.data = weight, bias
                setattr(module, name, given)
                if name == "pool_kernel_size":
                    module.pool_stride = given
                assert torch.equal(module(input), expected)

    @pytest.mark.parametrize("stride", [np.int64(1), torch.tensor(1), [np.int64(1)] * 2])
    def test_beside_padding_same(self, stride: Any) -> None:
        input, weight, bias = make((2, 3, 8, 8), 4, (5, 3))
        expected = F.max_pool2d(F.conv2d(input, weight, bias, padding="same").relu(), 2)
        assert_close(FUSED[2](input, weight, bias, stride, "same"), expected)
        with pytest.raises(RuntimeError, match="padding='same' is not supported for strided convolutions"):
            FUSED[2](input, weight, bias, np.int64(2), "same")

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("value", [1.0, True, torch.tensor(1.0), np.array([1, 1]), [1.0, 1.0], [True, True], "1"])
    def test_what_is_none(self, name: str, value: Any) -> None:
        with pytest.raises((RuntimeError, TypeError)):
            FUSED[2](*make((2, 3, 8, 8), 3, (3, 3)), **{name: value})

    def test_rectified_where_stock_answers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Were stock to take what nobody expects it to."""
        from fastnn.ops import conv_relu_max_pool as op

        input, weight, _ = make((1, 3, 8, 8), 4, (3, 3), bias=False)
        expected = FUSED[2](input, weight)
        monkeypatch.setattr(op, "flat_geometry", lambda *arguments: None)
        assert_close(FUSED[2](input, weight), expected)


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
