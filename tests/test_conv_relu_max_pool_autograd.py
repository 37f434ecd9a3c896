"""Gradients of conv_relu_max_pool, its operators under transforms and compilation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conv_cases import FUSED, RAW, RAW_BACKWARD, RAW_WITH_WINNERS, channels_last, flat, geometry, make
from torch import Tensor
from torch.testing import assert_close

import fastnn.nn
from fastnn.reference import conv_relu_max_pool as reference


class TestAutograd:
    @pytest.mark.parametrize("dims", [1, 2, 3])
    def test_gradcheck(self, dims: int) -> None:
        tensors = make((2, 2, *[6] * dims), 3, (3,) * dims, dtype=torch.float64)
        tensors = [t[..., :5] if t.dim() > 4 and t.shape[-1] == 6 else t for t in tensors]
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        fused = FUSED[dims]
        assert torch.autograd.gradcheck(lambda *t: fused(*t, padding=1), leaves, fast_mode=dims == 3)
        assert torch.autograd.gradgradcheck(lambda *t: fused(*t, padding=1), leaves, fast_mode=True)

    @pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize(
        ("channels", "kernel", "options"),
        [
            ((3, 17), 3, {"padding": 1}),
            ((4, 33), 1, {"stride": 2}),
            ((6, 8), 5, {"padding": 2, "dilation": 2, "groups": 2}),
            ((16, 16), 3, {"padding": 1, "groups": 16, "pool": 3, "pool_stride": 2, "pool_padding": 1}),
            ((33, 4), 2, {"pool": (3, 2), "ceil_mode": True}),
        ],
    )
    def test_bfloat16_is_exact_on_integers(
        self,
        every_instruction_set: str,
        channels: tuple[int, int],
        kernel: int,
        options: dict[str, Any],
        format: torch.memory_format,
    ) -> None:
        """All sums are exact in float32, so that output and gradients are the exact ones, rounded once."""
        in_channels, out_channels = channels
        weight_shape = (out_channels, in_channels // options.get("groups", 1), kernel, kernel)
        exact = [
            torch.randint(-2, 3, shape).double() for shape in ((2, in_channels, 13, 11), weight_shape, channels[1:])
        ]

        def results(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
            leaves = [t.to(dtype).requires_grad_() for t in exact]
            leaves[0] = exact[0].to(dtype).to(memory_format=format).requires_grad_()
            output = function(*leaves, *geometry(2, **options))
            torch.manual_seed(0)
            grad_output = torch.randint(-2, 3, output.shape).to(dtype)
            return [output, *torch.autograd.grad(output, leaves, grad_output)]

        expected = [t.to(torch.bfloat16) for t in results(reference.conv_relu_max_pool, torch.float64)]
        for ours, stock in zip(results(FUSED[2], torch.bfloat16), expected, strict=True):
            assert_close(ours, stock, rtol=0, atol=0)

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
            torch.library.opcheck(RAW, (x, w, bias, flat(arguments), "stock"))
            torch.library.opcheck(RAW_WITH_WINNERS, (x, w, bias, flat(arguments)))
            torch.library.opcheck(RAW_WITH_WINNERS, (x, w, bias, flat(arguments)), {"algorithm": "direct"})
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
