"""fastnn.functional.mlp and linear_relu, their operators and modules, against plain PyTorch."""

import copy
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlp_chains import OF_CHAINS, assert_like_stock, between, make_chain, split
from torch import nn
from torch.testing import assert_close

import fastnn.nn
from fastnn.activations import NAMES
from fastnn.functional import linear_relu, mlp, mlp_reconstruction_error
from fastnn.ops.mlp import join_parameters
from fastnn.reference import mlp as reference
from fastnn.testing import compare_with_stock, using_threads

# Around every vector width and register tile, and beyond a block of rows.
SIZES = (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 65)


class TestValues:
    @pytest.mark.parametrize("width", SIZES)
    def test_widths(self, instruction_set: str, dtype: torch.dtype, width: int) -> None:
        assert_like_stock(make_chain(13, (width, 9, width, 17), dtype), between(3))
        assert_like_stock(make_chain(1, (3, width), dtype, bias=False), ["relu"])

    @pytest.mark.parametrize("rows", [*SIZES, 129])
    def test_rows(self, instruction_set: str, dtype: torch.dtype, rows: int) -> None:
        assert_like_stock(make_chain(rows, (10, 8, 5, 8, 10), dtype), ["relu", "identity", "relu", "identity"])

    @pytest.mark.parametrize("activation", OF_CHAINS)
    def test_activations(self, instruction_set: str, dtype: torch.dtype, activation: str) -> None:
        tensors = make_chain(19, (13, 21, 6), dtype)
        assert_like_stock(tensors, [activation, activation])
        tensors[0] = tensors[0] * 20  # the flat ends
        assert_like_stock(tensors, [activation, activation])

    @pytest.mark.parametrize("threads", [1, 2, 5])
    def test_large_enough_for_threads(self, dtype: torch.dtype, threads: int) -> None:
        with using_threads(threads):
            assert_like_stock(make_chain(301, (130, 128, 65), dtype), between(2))

    def test_sums_over_many_rows_stay_accurate(self, instruction_set: str) -> None:
        assert_like_stock(make_chain(5000, (24, 16, 8)), between(2))

    def test_deep(self) -> None:
        assert_like_stock(make_chain(12, (16,) * 13), between(12, "tanh"))

    @pytest.mark.parametrize("layers", [20, 21, 45])
    @pytest.mark.parametrize("bias", [True, False])
    def test_deeper_than_a_call_of_the_operator(self, layers: int, bias: bool) -> None:
        # In float64, since single precision's errors grow over so many layers, stock's and ours alike.
        tensors = [
            t.requires_grad_() for t in make_chain(12, (16,) * (layers + 1), torch.float64, bias) if t is not None
        ]
        x, weights, biases = split([*tensors, *(() if bias else [None] * layers)])
        expected = reference.mlp(x, weights, biases, between(layers, "tanh"))
        errors = torch.mean((expected - x) ** 2, dim=-1)
        for recompute in (False, True):
            output = mlp(x, weights, biases, "tanh", recompute=recompute)
            assert_close(output, expected)
            for ours, stock in zip(
                torch.autograd.grad(output.sum(), tensors),
                torch.autograd.grad(expected.sum(), tensors, retain_graph=True),
                strict=True,
            ):
                assert_close(ours, stock)
        with torch.no_grad():
            assert_close(mlp(x, weights, biases, "tanh"), expected)
            assert_close(mlp_reconstruction_error(x, weights, biases, "tanh"), errors)

    @given(
        rows=st.integers(0, 70),
        widths=st.lists(st.integers(0, 40), min_size=2, max_size=5),
        bias=st.booleans(),
        data=st.data(),
    )
    @settings(
        max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    def test_any_shape(self, rows: int, widths: list[int], bias: bool, data: st.DataObject) -> None:
        layers = len(widths) - 1
        activations = data.draw(st.lists(st.sampled_from(OF_CHAINS), min_size=layers, max_size=layers))
        torch.manual_seed(0)  # a shape fails or passes for itself, whatever came before it
        assert_like_stock(make_chain(rows, widths, bias=bias), activations)

    def test_leading_dimensions(self) -> None:
        for shape in ((), (4,), (2, 3), (2, 1, 5), (0,), (2, 0)):
            assert_like_stock(make_chain(shape, (6, 7, 3)), between(2))
        assert mlp(*split(make_chain((2, 0), (6, 7, 3)))).shape == (2, 0, 3)
        assert mlp(*split(make_chain((2, 3), (0, 4)))).shape == (2, 3, 4)

    def test_strides(self) -> None:
        _, *parameters = make_chain(1, (6, 7, 3))
        transposed = [p.t().contiguous().t() if p.dim() == 2 else p for p in parameters]
        assert not transposed[0].is_contiguous()
        inputs = {
            "transposed": torch.randn(6, 11).t(),
            "expanded": torch.randn(6).expand(11, 6),
            "stepped": torch.randn(22, 12)[::2, ::2],
            "offset": torch.randn(12, 7)[1:, 1:],
        }
        for x in inputs.values():
            assert_like_stock([x, *parameters], between(2))
            assert_like_stock([x, *transposed], between(2))

    def test_some_layers_without_bias(self) -> None:
        x, first, second, bias, _ = make_chain(5, (6, 7, 3))
        assert_like_stock([x, first, second, bias, None], between(2))

    def test_linear_relu(self, dtype: torch.dtype) -> None:
        for rows in ((), (9,), (2, 3)):
            compare_with_stock(linear_relu, reference.linear_relu, make_chain(rows, (5, 12), dtype))

    def test_linear_relu_of_one_feature_without_dimension(self) -> None:
        x, weight, bias = torch.randn(2, 3, 5), torch.randn(5), torch.randn(())
        for arguments in ((x, weight), (x, weight, bias)):
            compare_with_stock(linear_relu, reference.linear_relu, arguments)

    def test_empty_chain_is_the_input(self) -> None:
        x = torch.randn(3, 4)
        assert_close(mlp(x, [], []), x, rtol=0, atol=0)


class TestWays:
    """The ways that forward has (csrc/kernels/mlp.h), and what backward does with narrow layers."""

    @pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 11, 20, 33, 150])
    def test_from_dot_products_to_panels(self, instruction_set: str, dtype: torch.dtype, rows: int) -> None:
        assert_like_stock(make_chain(rows, (131, 70, 37), dtype), ["relu", "silu"])

    @pytest.mark.parametrize("rows", [30, 100])  # few numbers would be compared by their luck in rounding
    def test_narrow_layers(self, instruction_set: str, dtype: torch.dtype, rows: int) -> None:
        assert_like_stock(make_chain(rows, (1, 70, 3, 90, 8, 40, 1), dtype), between(6))

    @pytest.mark.parametrize("activation", OF_CHAINS)
    def test_large_enough_to_be_handed_over(self, dtype: torch.dtype, activation: str) -> None:
        tensors = make_chain(40, (300, 260, 300), dtype)
        assert_like_stock(tensors, [activation, activation])
        compare_with_stock(
            lambda *t: mlp_reconstruction_error(*split(t), activation),
            lambda *t: torch.mean((reference.mlp(*split(t), between(2, activation)) - t[0]) ** 2, dim=-1),
            tensors,
            gradients=False,
        )

    def test_hand_over_with_strides_and_some_gradients_alone(self) -> None:
        x, first, second, *biases = make_chain(40, (300, 260, 300), torch.float64)
        strided = [t.t().contiguous().t() for t in (x, first, second)] + biases
        assert_like_stock(strided, ["gelu", "relu"])
        for wanted in range(len(strided)):
            leaves = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(strided)]
            ours, stock = (
                torch.autograd.grad(f(*split(leaves), ["gelu", "relu"]).square().sum(), leaves[wanted])[0]
                for f in (mlp, reference.mlp)
            )
            assert_close(ours, stock)

    def test_hand_over_keeps_its_dtype_under_autocast(self, dtype: torch.dtype) -> None:
        x, weights, biases = split(make_chain(40, (300, 260, 300), dtype))
        arguments = (x, join_parameters(weights, biases), "sigmoid|identity")

        def results() -> list[torch.Tensor]:
            output, hidden = torch.ops.fastnn.mlp_with_hidden(*arguments)
            grads = torch.ops.fastnn.mlp_backward(x, x, weights, "sigmoid|identity", output, hidden, True, True, True)
            return [output, *hidden, grads[0], *grads[1], *grads[2]]

        plain = results()
        with torch.autocast("cpu", dtype=torch.float16):
            cast = results()
        if dtype is torch.bfloat16:  # forward's products are taken by torch there, as autocast would have them
            assert {t.dtype for t in cast} == {dtype}
            assert_close(cast[0], plain[0], rtol=2e-2, atol=2e-2)
        else:
            assert_close(cast, plain, rtol=0, atol=0)

    # Threads share out the weights of few rows, and panels that one core's cache does not hold (the last).
    @pytest.mark.parametrize(
        ("rows", "widths"),
        [
            *[(rows, (300, 290, 31)) for rows in (1, 2, 5, 9, 21, 45, 301)],
            *[(rows, (1201, 703, 1201)) for rows in (1, 2, 3)],
            (130, (600, 600, 601)),
        ],
    )
    def test_threads_change_nothing(self, instruction_set: str, rows: int, widths: tuple[int, ...]) -> None:
        x, weights, biases = split(make_chain(rows, widths))
        results = []
        for threads in (1, 2, 5, 5):
            with using_threads(threads):
                output, hidden = torch.ops.fastnn.mlp_with_hidden(x, join_parameters(weights, biases), "silu|relu")
                results.append([output, *hidden, mlp(x, weights, biases, ["silu", "relu"])])
        for result in results[1:]:
            assert_close(result, results[0], rtol=0, atol=0)

    @pytest.mark.parametrize("rows", [1, 2, 4])
    @pytest.mark.parametrize("activation", ["relu", "gelu"])
    def test_threads_change_no_gradient_of_few_rows(self, instruction_set: str, rows: int, activation: str) -> None:
        tensors = make_chain(rows, (703, 601, 3, 517, 601))
        results = []
        for threads in (1, 2, 5, 5):
            with using_threads(threads):
                leaves = [t.clone().requires_grad_() for t in tensors]
                results.append(torch.autograd.grad(mlp(*split(leaves), activation).square().sum(), leaves))
        for result in results[1:]:
            assert_close(result, results[0], rtol=0, atol=0)


class TestSpecialValues:
    @pytest.mark.parametrize("activation", NAMES)
    def test_nan_and_infinity_go_where_float64_has_them(
        self, instruction_set: str, dtype: torch.dtype, activation: str
    ) -> None:
        # Not where stock's float32 has them: its vectorised gelu makes NaN of infinity.
        x = torch.randn(8, 17, dtype=dtype)
        x[0, 3], x[2, 16], x[5, 0] = float("nan"), float("inf"), float("-inf")
        weight = torch.eye(17, dtype=dtype)[:1]  # zeros, too: infinity times zero
        ours = mlp(x, [weight], [None], [activation])
        stock = reference.mlp(x.double(), [weight.double()], [None], [activation])
        assert torch.equal(ours.isnan(), stock.isnan())
        assert torch.equal(ours.isinf(), stock.isinf())

    def test_relu_gradient_is_one_at_nan_and_zero_at_zero(self, instruction_set: str) -> None:
        x = torch.tensor([[float("nan")], [0.0], [-0.0], [1.0], [-1.0]], requires_grad=True)
        linear_relu(x, torch.ones(1, 1)).sum().backward()
        assert x.grad.flatten().tolist() == [1, 0, 0, 1, 0]

    def test_denormals_stay(self, instruction_set: str) -> None:
        tiny = torch.full((1, 1), 1e-40)
        assert linear_relu(tiny, torch.ones(1, 1)).item() == tiny.item()

    def test_repeats_bit_by_bit(self) -> None:
        tensors = make_chain(257, (64, 96, 32))
        results = []
        for threads in (1, 2, 2):
            with using_threads(threads):
                leaves = [t.clone().requires_grad_() for t in tensors]
                output = mlp(*split(leaves))
                results.append((output, *torch.autograd.grad(output.sum(), leaves)))
        assert_close(results[1], results[2], rtol=0, atol=0)
        assert_close(results[0][0], results[1][0], rtol=0, atol=0)


class TestStockPaths:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.complex64])
    def test_other_dtypes(self, dtype: torch.dtype) -> None:
        tensors = make_chain(5, (6, 7, 3), dtype)
        assert_close(
            mlp(*split(tensors), between(2, "tanh")), reference.mlp(*split(tensors), between(2, "tanh")), rtol=0, atol=0
        )

    def test_autocast(self) -> None:
        tensors = make_chain(5, (6, 7, 3))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours, stock = (f(*split(tensors), between(2)) for f in (mlp, reference.mlp))
        assert ours.dtype == stock.dtype == torch.bfloat16
        assert_close(ours, stock, rtol=2e-2, atol=2e-2)
        leaves = [t.requires_grad_() for t in tensors]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = mlp(*split(leaves))
        output.sum().backward()
        assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)

    def test_meta(self) -> None:
        output = mlp(*split([t.to("meta") for t in make_chain((2, 5), (6, 7, 3))]))
        assert output.device.type == "meta"
        assert output.shape == (2, 5, 3)


class TestModules:
    def test_mlp_is_a_chain_of_stock_modules(self) -> None:
        torch.manual_seed(1)
        ours = fastnn.nn.MLP([6, 7, 3], activation="tanh")
        torch.manual_seed(1)
        stock = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))
        assert_close(dict(ours.state_dict()), dict(stock.state_dict()), rtol=0, atol=0)
        stock.load_state_dict(ours.state_dict())
        x = torch.randn(4, 6)
        assert_close(ours(x), stock(x))

    def test_linear_relu_is_a_linear(self) -> None:
        ours, stock = fastnn.nn.LinearReLU(6, 7), nn.Linear(6, 7)
        assert isinstance(ours, nn.Linear)
        stock.load_state_dict(ours.state_dict())
        x = torch.randn(4, 6)
        assert_close(ours(x), stock(x).relu())
        assert fastnn.nn.LinearReLU(6, 7, bias=False, dtype=torch.float64).weight.dtype == torch.float64

    @pytest.mark.parametrize("make", [lambda: fastnn.nn.LinearReLU(6, 7), lambda: fastnn.nn.MLP([6, 7, 3])])
    def test_pickle_and_copy(self, make: object) -> None:
        module, x = make(), torch.randn(4, 6)
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert_close(twin(x), module(x), rtol=0, atol=0)

    def test_reads_weights_anew_at_each_call(self) -> None:
        module, x = fastnn.nn.MLP([6, 7, 3]), torch.randn(4, 6)
        before = module(x)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.data.mul_(2)
        assert not torch.allclose(module(x), before)
        zeros = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
        assert not torch.func.functional_call(module, zeros, x).any()
        nn.utils.parametrizations.weight_norm(module[0])
        assert_close(module(x), nn.Sequential.forward(module, x))

    def test_bad_arguments(self) -> None:
        with pytest.raises(ValueError, match="sizes"):
            fastnn.nn.MLP([3])
        with pytest.raises(ValueError, match="activation must be one of"):
            fastnn.nn.MLP([3, 4], activation=["swish"])


class TestReconstructionError:
    @pytest.mark.parametrize("rows", [0, 1, 7, 65, 129])
    @pytest.mark.parametrize("width", [1, 9, 16, 33])
    def test_values(self, instruction_set: str, dtype: torch.dtype, rows: int, width: int) -> None:
        compare_with_stock(
            lambda *t: mlp_reconstruction_error(*split(t)),
            lambda *t: torch.mean((reference.mlp(*split(t), between(2)) - t[0]) ** 2, dim=-1),
            make_chain(rows, (width, 5, width), dtype),
            gradients=False,
        )

    def test_gradient_and_leading_dimensions(self) -> None:
        x, weights, biases = split(make_chain((2, 3), (6, 4, 6), torch.float64))
        leaves = [t.requires_grad_() for t in (x, *weights)]
        assert torch.autograd.gradcheck(lambda x, *w: mlp_reconstruction_error(x, w, biases, "tanh"), leaves)
        with torch.no_grad():
            assert mlp_reconstruction_error(x, weights, biases).shape == (2, 3)

    def test_other_widths(self) -> None:
        x, weights, biases = split(make_chain(5, (6, 4, 1)))
        with pytest.raises(RuntimeError, match="expected as many outputs of the last layer as features"):
            mlp_reconstruction_error(x, weights, biases)
