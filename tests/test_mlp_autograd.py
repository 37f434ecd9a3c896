"""Gradients of fastnn.functional.mlp and linear_relu, under torch.func, torch.compile and torch.export too."""

import copy

import pytest
import torch
from mlp_chains import OF_CHAINS, between, make_chain, split
from torch import Tensor
from torch.testing import assert_close

import fastnn.nn
from fastnn.functional import linear_relu, mlp
from fastnn.ops.mlp import join_parameters
from fastnn.reference import mlp as reference
from fastnn.testing import compare_with_stock


class TestAutograd:
    @pytest.mark.parametrize("activation", OF_CHAINS)
    def test_gradcheck(self, activation: str) -> None:
        leaves = [t.requires_grad_() for t in make_chain(3, (4, 5, 2), torch.float64)]

        def function(*tensors: Tensor) -> Tensor:
            return mlp(*split(tensors), [activation, activation])

        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)

    def test_only_what_is_wanted(self) -> None:
        for wanted in range(5):
            tensors = make_chain(7, (4, 5, 2))
            tensors[wanted].requires_grad_()
            output, stock = (f(*split(tensors), between(2)) for f in (mlp, reference.mlp))
            assert_close(*(torch.autograd.grad(o.sum(), tensors[wanted]) for o in (output, stock)))

    @pytest.mark.parametrize("rows", [0, 3, 9, 400])
    @pytest.mark.parametrize("bias", [True, False])
    def test_a_single_linear_layer(self, rows: int, bias: bool) -> None:
        """Small ones are left to stock in training."""
        tensors = make_chain(rows, (7, 9))[: 3 if bias else 2]
        ours, stock = (lambda x, w, *b, f=f: f(x, [w], b or [None], ["identity"]) for f in (mlp, reference.mlp))
        compare_with_stock(ours, stock, tensors)

    def test_no_graph_without_a_wanted_gradient(self) -> None:
        assert mlp(*split(make_chain(7, (4, 5, 2)))).grad_fn is None

    def test_saved_tensors_that_change_are_noticed(self) -> None:
        x, weight, bias = make_chain(3, (4, 5))
        output = mlp(x, [weight.requires_grad_()], [bias], ["tanh"])
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()

    def test_func_transforms(self) -> None:
        tensors = make_chain(6, (4, 5, 2))

        def loss(function: object, x: Tensor, *parameters: Tensor) -> Tensor:
            return function(*split([x, *parameters]), between(2, "tanh")).square().sum()

        for transform in (
            lambda f: torch.func.grad(f, argnums=(0, 1, 3))(*tensors),
            lambda f: torch.func.jacrev(torch.func.grad(f))(*tensors),
            lambda f: torch.func.vmap(torch.func.grad(f, argnums=1), in_dims=(0, *[None] * 4))(*tensors),
            lambda f: torch.func.vmap(f, in_dims=(0, *[None] * 4))(*tensors),
            lambda f: torch.func.jvp(f, tuple(tensors), tuple(torch.ones_like(t) for t in tensors)),
        ):
            ours, stock = (transform(lambda *t, f=f: loss(f, *t)) for f in (mlp, reference.mlp))
            assert_close(ours, stock, rtol=1e-4, atol=1e-4)

    def test_vmap_over_weights(self) -> None:
        x, weight = torch.randn(5, 4), torch.randn(3, 6, 4)
        ours = torch.func.vmap(lambda w: linear_relu(x, w))(weight)
        assert_close(ours, torch.stack([reference.linear_relu(x, w) for w in weight]))

    @pytest.mark.parametrize("dim", [0, 1])
    def test_vmap_over_nothing(self, dim: int) -> None:
        x, weight = torch.randn((0, 2, 4) if dim == 0 else (2, 0, 4)), torch.randn(6, 4)
        for call in (linear_relu, torch.func.grad(lambda x, weight: linear_relu(x, weight).sum())):
            ours = torch.func.vmap(call, in_dims=(dim, None))(x, weight)
            assert ours.shape == (0, 2, 6 if call is linear_relu else 4)

    def test_forward_mode(self) -> None:
        x, weight, bias = make_chain(3, (4, 5))
        tangent = torch.randn_like(x)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, tangent)
            ours, stock = (
                torch.autograd.forward_ad.unpack_dual(f(dual, weight, bias))
                for f in (linear_relu, reference.linear_relu)
            )
        assert_close(ours.tangent, stock.tangent)


class TestRecompute:
    def test_same_gradients(self, instruction_set: str, dtype: torch.dtype) -> None:
        tensors = make_chain(19, (13, 21, 6, 9), dtype)
        for activation in ("relu", "gelu"):
            compare_with_stock(
                lambda *t, name=activation: mlp(*split(t), name, recompute=True),
                lambda *t, name=activation: reference.mlp(*split(t), between(3, name)),
                tensors,
            )

    def test_keeps_the_input_alone(self) -> None:
        x, weights, biases = split(make_chain(64, (8, 128, 128, 8)))
        leaves = [w.requires_grad_() for w in weights]
        kept: list[int] = []

        def pack(t: Tensor) -> Tensor:
            kept.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            mlp(x, leaves, biases, recompute=True)
        assert sum(kept) == x.numel() + sum(t.numel() for t in (*leaves, *biases))

    def test_double_backward(self) -> None:
        x, weights, biases = split(make_chain(3, (4, 5, 2), torch.float64))
        leaves = [t.requires_grad_() for t in (x, *weights)]
        assert torch.autograd.gradgradcheck(lambda x, *w: mlp(x, w, biases, "tanh", recompute=True), leaves)


class TestCompilation:
    def test_opcheck(self, dtype: torch.dtype) -> None:
        x, weights, biases = split(make_chain(5, (6, 7, 3), dtype))
        for activations in ("relu|identity", "gelu_tanh|gelu_tanh"):
            arguments = (x, join_parameters(weights, biases), activations)
            torch.library.opcheck(torch.ops.fastnn.mlp, arguments)
            torch.library.opcheck(torch.ops.fastnn.mlp_with_hidden, arguments)
            output, hidden = torch.ops.fastnn.mlp_with_hidden(*arguments)
            backward = (torch.randn_like(output), x, weights, activations, output, hidden, True, True, True)
            torch.library.opcheck(torch.ops.fastnn.mlp_backward, backward)

    def test_compiles_in_one_graph(self) -> None:
        tensors = make_chain(5, (6, 7, 3))
        torch.compiler.reset()
        compiled = torch.compile(lambda *t: mlp(*split(t)), fullgraph=True, backend="aot_eager")
        assert_close(compiled(*tensors), mlp(*split(tensors)))
        results = []
        for function in (compiled, lambda *t: mlp(*split(t))):
            leaves = [t.clone().requires_grad_() for t in tensors]
            results.append(torch.autograd.grad(function(*leaves).square().sum(), leaves))
        assert_close(*results)

    def test_exports_with_any_number_of_rows(self) -> None:
        module = fastnn.nn.MLP([6, 7, 3]).requires_grad_(False)
        rows = torch.export.Dim("rows", min=1, max=100)
        exported = torch.export.export(module, (torch.randn(5, 6),), dynamic_shapes=({0: rows},)).module()
        for count in (5, 2, 40):
            x = torch.randn(count, 6)
            assert_close(exported(x), module(x))


def test_what_a_second_derivative_leaves_alone_has_no_gradient() -> None:
    """The last bias has no part in the slope, so that an optimizer leaves it alone, as with stock."""
    torch.manual_seed(0)
    stock = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
    mine = fastnn.fuse(copy.deepcopy(stock))
    x = torch.randn(5, 3).double()
    for model in (stock, mine):
        own = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(own).sum(), own, create_graph=True)
        slope.square().sum().backward()
    for name, parameter in stock.named_parameters():
        torch.testing.assert_close(mine.get_parameter(name).grad, parameter.grad)
    assert mine.get_parameter("2.bias").grad is None
