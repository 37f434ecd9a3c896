"""fastnn.functional.mlp and linear_relu, their operators and modules, against plain PyTorch."""

import copy
import pickle
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import fastnn.nn
from fastnn.functional import linear_relu, mlp, mlp_reconstruction_error
from fastnn.ops.mlp import ACTIVATION_NAMES, join_parameters
from fastnn.reference import mlp as reference
from fastnn.testing import compare_with_stock, using_threads

# Around every vector width and register tile, and beyond a block of rows.
SIZES = (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 65)


def make_chain(
    rows: int | Sequence[int], widths: Sequence[int], dtype: torch.dtype = torch.float32, bias: bool = True
) -> list[Tensor | None]:
    """The input, the weights, then the biases of a chain whose layers have these widths."""
    shape = (rows,) if isinstance(rows, int) else tuple(rows)
    pairs = list(pairwise(widths))
    return [
        torch.randn(*shape, widths[0], dtype=dtype),
        *(torch.randn(out, into, dtype=dtype) / max(into, 1) ** 0.5 for into, out in pairs),
        *(torch.randn(out, dtype=dtype) if bias else None for _, out in pairs),
    ]


def split(tensors: Sequence[Tensor | None]) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    layers = len(tensors) // 2
    return tensors[0], list(tensors[1 : 1 + layers]), list(tensors[1 + layers :])


def assert_like_stock(tensors: Sequence[Tensor | None], activations: Sequence[str], gradients: bool = True) -> None:
    compare_with_stock(
        lambda *t: mlp(*split(t), activations), lambda *t: reference.mlp(*split(t), activations), tensors, gradients
    )


def between(layers: int, activation: str = "relu") -> list[str]:
    return [activation] * (layers - 1) + ["identity"]


class TestValues:
    @pytest.mark.parametrize("width", SIZES)
    def test_widths(self, instruction_set: str, dtype: torch.dtype, width: int) -> None:
        assert_like_stock(make_chain(13, (width, 9, width, 17), dtype), between(3))
        assert_like_stock(make_chain(1, (3, width), dtype, bias=False), ["relu"])

    @pytest.mark.parametrize("rows", [*SIZES, 129])
    def test_rows(self, instruction_set: str, dtype: torch.dtype, rows: int) -> None:
        assert_like_stock(make_chain(rows, (10, 8, 5, 8, 10), dtype), ["relu", "identity", "relu", "identity"])

    @pytest.mark.parametrize("activation", ACTIVATION_NAMES)
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
        activations = data.draw(st.lists(st.sampled_from(ACTIVATION_NAMES), min_size=layers, max_size=layers))
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

    def test_empty_chain_is_the_input(self) -> None:
        x = torch.randn(3, 4)
        assert_close(mlp(x, [], []), x, rtol=0, atol=0)


class TestSpecialValues:
    @pytest.mark.parametrize("activation", ACTIVATION_NAMES)
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


class TestAutograd:
    @pytest.mark.parametrize("activation", ACTIVATION_NAMES)
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


class TestCompilation:
    def test_opcheck(self, dtype: torch.dtype) -> None:
        x, weights, biases = split(make_chain(5, (6, 7, 3), dtype))
        for digits in ("10", "55"):
            arguments = (x, join_parameters(weights, biases), digits)
            torch.library.opcheck(torch.ops.fastnn.mlp, arguments)
            torch.library.opcheck(torch.ops.fastnn.mlp_with_hidden, arguments)
            output, hidden = torch.ops.fastnn.mlp_with_hidden(*arguments)
            backward = (torch.randn_like(output), x, weights, digits, output, hidden, True, True, True)
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


BAD = {
    "features": lambda x, w, b: (torch.randn(5, 4), w, b),
    "chain": lambda x, w, b: (x, [w[0], torch.randn(3, 8)], b),
    "bias size": lambda x, w, b: (x, w, [b[0], torch.randn(4)]),
    "bias rank": lambda x, w, b: (x, w, [b[0], torch.randn(1, 3)]),
    "weight rank 1": lambda x, w, b: (x, [w[0], torch.randn(7)], b),
    "weight rank 3": lambda x, w, b: (x, [w[0], torch.randn(3, 7, 1)], b),
    "weight dtype": lambda x, w, b: (x, [w[0].double(), w[1]], b),
    "bias dtype": lambda x, w, b: (x, w, [b[0].double(), b[1]]),
    "input dtype": lambda x, w, b: (x.double(), w, b),
    "device": lambda x, w, b: (x, [w[0].to("meta"), w[1]], b),
    "scalar": lambda x, w, b: (torch.tensor(1.0), w, b),
}


class TestBadInput:
    """One exception, from the public functions and from the raw operators, whatever they are given."""

    @pytest.mark.parametrize("case", BAD)
    def test_tensors_that_do_not_fit(self, case: str) -> None:
        arguments = BAD[case](*split(make_chain(5, (6, 7, 3))))
        with pytest.raises(RuntimeError):
            mlp(*arguments)
        with pytest.raises(RuntimeError):
            torch.ops.fastnn.mlp(*arguments, "10")
        with pytest.raises(RuntimeError):
            torch.ops.fastnn.mlp_with_hidden(*arguments, "10")

    def test_lists_that_do_not_fit(self) -> None:
        x, weights, biases = split(make_chain(5, (6, 7, 3)))
        with pytest.raises(ValueError, match="expected 2 biases"):
            mlp(x, weights, biases[:1])
        with pytest.raises(ValueError, match="expected 2 activations"):
            mlp(x, weights, biases, ["relu"])
        with pytest.raises(ValueError, match="activation must be one of"):
            mlp(x, weights, biases, "swish")
        with pytest.raises(TypeError):
            mlp(x, None, biases)
        for digits in ("", "1", "100", "1-", "18", "1\0", "1\xff"):
            with pytest.raises(RuntimeError):
                torch.ops.fastnn.mlp(x, join_parameters(weights, biases), digits)
        for lists in (([], [], []), (weights, biases[:1], "10"), (weights[:1], biases, "1")):
            with pytest.raises(RuntimeError):
                torch.ops.fastnn.mlp(x, *lists)

    def test_other_layouts_and_dtypes_in_the_raw_operator(self) -> None:
        x, weights, biases = split(make_chain(5, (6, 7, 3)))
        for bad in (x.to_sparse(), x.half(), x.long(), x.to("meta"), x[None], x.to(torch.complex64)):
            with pytest.raises((RuntimeError, NotImplementedError)):
                torch.ops.fastnn.mlp(bad, weights + biases, "10").sum().item()

    def test_hostile_backward(self) -> None:
        x, weights, biases = split(make_chain(5, (6, 7, 3)))
        output, hidden = torch.ops.fastnn.mlp_with_hidden(x, weights + biases, "10")
        good = [torch.randn_like(output), x, weights, "10", output, hidden, True, True, True]
        hostile = {
            0: [output[:4], output[:, :2], output[0], output.double(), output.to("meta"), output.to_sparse()],
            1: [x[:4], x[:, :5], x[0], x.double(), torch.empty(0, 6), x.to("meta")],
            2: [[], weights[:1], weights[::-1], [weights[0], weights[1].double()], [weights[0][0], weights[1]]],
            3: ["", "1", "19", "x0", "44"],
            4: [output[:4], output[:, :2], torch.empty(0), output.double(), output.to("meta")],
            5: [[], [hidden[0][:4]], [hidden[0].double()], [hidden[0][:, :3]], hidden * 2, [torch.empty(0)]],
        }
        torch.ops.fastnn.mlp_backward(*good)
        for place, values in hostile.items():
            for value in values:
                with pytest.raises((RuntimeError, NotImplementedError)):
                    torch.ops.fastnn.mlp_backward(*good[:place], value, *good[place + 1 :])

    def test_raw_operators_refuse_to_lose_a_gradient(self) -> None:
        x, weights, biases = split(make_chain(5, (6, 7, 3)))
        arguments = [x, weights + biases, "10"]
        for leaf in (x, weights[1], biases[0]):
            leaf.requires_grad_()
            output = torch.ops.fastnn.mlp(*arguments)
            with pytest.raises(RuntimeError, match="no gradient of its own"):
                output.sum().backward()
            with torch.no_grad():
                torch.ops.fastnn.mlp(*arguments)
            leaf.requires_grad_(False)


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

    def test_operator(self) -> None:
        x, weights, biases = split(make_chain(5, (6, 4, 6)))
        torch.library.opcheck(torch.ops.fastnn.mlp_reconstruction_error.default, (x, weights + biases, "10"))
        with pytest.raises(RuntimeError, match="expected as many outputs of the last layer as features"):
            torch.ops.fastnn.mlp_reconstruction_error(x, [weights[0], biases[0]], "0")
