"""What people do around a stock layer works around ours: in-place operations on its output, tensors of other kinds."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastnn

# Layer, stock's twin, and an input's sizes.
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP": (
        lambda: fastnn.nn.MLP([4, 6, 5]),
        lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5)),
        (3, 4),
    ),
    "MLP of many rows": (
        lambda: fastnn.nn.MLP([64, 256, 256]),
        lambda: nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256)),
        (512, 64),
    ),
    "MLP of one layer": (lambda: fastnn.nn.MLP([40, 50]), lambda: nn.Sequential(nn.Linear(40, 50)), (30, 40)),
    "MLP, gelu last": (
        lambda: fastnn.nn.MLP([4, 6, 5], activation=["relu", "gelu"]),
        lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.GELU()),
        (3, 4),
    ),
    "MLP, silu last": (
        lambda: fastnn.nn.MLP([4, 6, 5], activation=["relu", "silu"]),
        lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.SiLU()),
        (3, 4),
    ),
    "MLP, leaky_relu last": (
        lambda: fastnn.nn.MLP([4, 6, 5], activation=["relu", "leaky_relu"]),
        lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.LeakyReLU()),
        (3, 4),
    ),
    "RNN": (lambda: fastnn.nn.RNN(4, 5), lambda: nn.RNN(4, 5), (6, 3, 4)),
    "GRU": (lambda: fastnn.nn.GRU(4, 5, 2), lambda: nn.GRU(4, 5, 2), (6, 3, 4)),
    "GRU, batch first": (
        lambda: fastnn.nn.GRU(4, 5, batch_first=True),
        lambda: nn.GRU(4, 5, batch_first=True),
        (6, 3, 4),
    ),
    "LSTM": (lambda: fastnn.nn.LSTM(4, 5, bidirectional=True), lambda: nn.LSTM(4, 5, bidirectional=True), (6, 3, 4)),
    "GRUCell": (lambda: fastnn.nn.GRUCell(4, 5), lambda: nn.GRUCell(4, 5), (3, 4)),
    "conv": (
        lambda: fastnn.nn.ConvReLUMaxPool2d(2, 3, 3),
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2)),
        (2, 2, 9, 9),
    ),
    "recurrent model": (
        lambda: fastnn.models.RNN(4, 6, 1, 5),
        lambda: fastnn.reference.models.RNN(4, 6, 1, 5),
        (3, 6, 4),
    ),
    "Autoencoder": (
        lambda: fastnn.models.Autoencoder(6, 5, 4),
        lambda: fastnn.reference.models.Autoencoder(6, 5, 4),
        (3, 6),
    ),
}
IN_PLACE: dict[str, Callable[[Tensor], Any]] = {
    "ReLU(inplace=True)": nn.ReLU(inplace=True),
    "mul_": lambda y: y.mul_(2),
    "a part set to zero": lambda y: y[1:].zero_(),
}


@pytest.fixture(params=LAYERS)
def twins(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, Tensor]:
    """The fused layer, the stock one with the same weights, and an input."""
    make, make_stock, sizes = LAYERS[request.param]
    ours, stock = make(), make_stock()
    with torch.no_grad():
        for mine, theirs in zip(ours.parameters(), stock.parameters(), strict=True):
            theirs.copy_(mine)
    return ours, stock, torch.randn(sizes)


def first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else first(result[0])


@pytest.mark.parametrize("change", IN_PLACE)
def test_outputs_may_change_in_place(twins: tuple[nn.Module, nn.Module, Tensor], change: str) -> None:
    gradients = []
    for module in twins[:2]:
        x = twins[2].clone().requires_grad_()
        output = first(module(x))
        IN_PLACE[change](output)
        gradients.append(torch.autograd.grad(output.square().sum(), [x, *module.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["MLP", "MLP, leaky_relu last", "GRU", "LSTM", "conv", "LinearReLU"])
def test_outputs_may_change_in_place_when_compiled_and_transformed(name: str) -> None:
    """Where there is no version of a tensor to tell that it has changed."""
    if name == "LinearReLU":
        module, x = fastnn.nn.LinearReLU(4, 5), torch.randn(3, 4)
    else:
        module, x = LAYERS[name][0](), torch.randn(LAYERS[name][2])
    parameters = dict(module.named_parameters())

    def loss(parameters: dict[str, Tensor], change: Callable[[Tensor], Tensor] = lambda y: y.mul_(2)) -> Tensor:
        output = first(torch.func.functional_call(module, parameters, x))
        return change(output).square().sum()

    expected = torch.autograd.grad(loss(parameters, lambda y: 2 * y), list(parameters.values()))
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(parameters), list(parameters.values()))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    transformed = torch.func.grad(loss)({name: value.detach() for name, value in parameters.items()})
    torch.testing.assert_close(tuple(transformed.values()), expected, rtol=1e-4, atol=1e-5)


def test_what_backward_needs_may_not_change() -> None:
    layer, x = fastnn.nn.LinearReLU(4, 5), torch.randn(3, 4)
    output = layer(x)
    output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_second_derivative_after_a_change_in_place() -> None:
    for make, make_stock, sizes in (LAYERS["MLP"], LAYERS["GRU"]):
        ours, stock = make().double(), make_stock().double()
        stock.load_state_dict(dict(zip(stock.state_dict(), ours.state_dict().values(), strict=True)))
        results = []
        for module in (ours, stock):
            torch.manual_seed(1)
            x = torch.randn(sizes, dtype=torch.float64, requires_grad=True)
            output = first(module(x))
            output.mul_(2)
            (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
            results.append(torch.autograd.grad(gradient.square().sum(), x))
        torch.testing.assert_close(*results)


@pytest.fixture
def mesh() -> Any:
    """Of this process alone."""
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield distributed.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # torch's, of its own code
def test_dtensor(twins: tuple[nn.Module, nn.Module, Tensor], mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Replicate, distribute_module, distribute_tensor

    ours, stock, x = twins
    answers = []
    for module in (stock, ours):
        module = distribute_module(module, mesh)
        input = distribute_tensor(x, mesh, [Replicate()])
        try:
            output = first(module(input))
            gradients = torch.autograd.grad(output.square().sum(), list(module.parameters()))
        except (NotImplementedError, RuntimeError) as error:  # of the recurrent layers
            answers.append((type(error), str(error)))
            continue
        assert isinstance(output, DTensor)
        answers.append([tensor.full_tensor() for tensor in (output, *gradients)])
    if isinstance(answers[0], tuple):
        assert answers[1] == answers[0]
    else:
        torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)


def test_sparse_input() -> None:
    layer, x = fastnn.nn.MLP([4, 6, 5]), torch.randn(3, 4).relu()
    torch.testing.assert_close(layer(x.to_sparse()), layer(x))


def test_weights_of_another_kind() -> None:
    """As quantization libraries put them into a Linear."""

    class Halved(Tensor):
        __torch_function__ = torch._C._disabled_torch_function_impl

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "fastnn":
                raise NotImplementedError(f"{cls.__name__} has no {func}")
            if func is torch.ops.aten.detach.default:
                return Halved(args[0].inner)
            unwrapped = torch.utils._pytree.tree_map_only(Halved, lambda t: t.inner / 2, (args, kwargs or {}))
            return func(*unwrapped[0], **unwrapped[1])

        @staticmethod
        def __new__(cls, inner: Tensor) -> "Halved":
            return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        def __init__(self, inner: Tensor) -> None:
            self.inner = inner

    layer, x = fastnn.nn.MLP([4, 5], bias=False), torch.randn(30, 4)
    weight = layer[0].weight.detach()
    layer[0].weight = nn.Parameter(Halved(weight), requires_grad=False)
    torch.testing.assert_close(layer(x), F.linear(x, weight) / 2)
    with torch.no_grad():
        torch.testing.assert_close(fastnn.functional.linear_relu(x, layer[0].weight), F.linear(x, weight).relu() / 2)
        square = torch.randn(4, 4)
        error = fastnn.functional.mlp_reconstruction_error(x, [Halved(square)], [None])
        torch.testing.assert_close(error, (F.linear(x, square) / 2 - x).square().mean(1))
