"""Losses of a derivative by the input, as Hamiltonian networks, networks that know physics and gradient penalties have
them, differentiated by the weights."""

import copy
from collections.abc import Callable

import pytest
import torch
from fusing import Calls, fused_copy
from rnn_common import plain_cell, plain_network
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import fastnn.nn

Model = Callable[[Tensor], Tensor]


def _image(x: Tensor, first: nn.Module, norm: nn.Module, second: nn.Module, head: nn.Module) -> Tensor:
    """Convolutions with and without a pool, and a linear layer."""
    pooled = torch.max_pool2d(torch.relu(first(x)), 2)
    return head(torch.tanh(second(norm(pooled))).flatten(1))


def _image_net() -> nn.Module:
    first, second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 3, 2, bias=False)
    return Calls(_image, first, nn.BatchNorm2d(4).eval(), second, nn.Linear(3, 2))


def _residual(x: Tensor, first: nn.Module, second: nn.Module, head: nn.Module) -> Tensor:
    hidden = torch.tanh(first(x))
    return head(hidden + torch.sigmoid(second(hidden)) * hidden)


class _PlainPool(fastnn.nn.ConvReLUMaxPool2d):
    """The layer by the reference, with the same parameters."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.max_pool2d(torch.relu(torch.conv2d(input, self.weight, self.bias)), 2)


def _pool() -> nn.Module:
    return nn.Sequential(fastnn.nn.ConvReLUMaxPool2d(2, 3, 2, pool_kernel_size=2), nn.Flatten(), nn.Linear(3, 2))


def _of_reference(model: nn.Module) -> nn.Module:
    """A copy of a model of our layers that computes by the reference, which every transform of torch can take."""
    model = copy.deepcopy(model)
    for name, layer in model.named_children():
        if isinstance(layer, fastnn.nn.ConvReLUMaxPool2d):
            layer.__class__ = _PlainPool
        elif isinstance(layer, fastnn.nn.MLP):
            layer.__class__ = nn.Sequential
        elif isinstance(layer, nn.RNNBase):
            setattr(model, name, plain_network(layer))
        elif isinstance(layer, nn.RNNCellBase):
            setattr(model, name, plain_cell(layer))
        else:
            setattr(model, name, _of_reference(layer))
    return model


def _last_step(x: Tensor, network: nn.Module, head: nn.Module) -> Tensor:
    return head(network(x)[0][:, -1])


def _recurrent(kind: type, **settings: bool) -> nn.Module:
    directions = 2 if settings.get("bidirectional") else 1
    return Calls(_last_step, kind(3, 4, batch_first=True, **settings), nn.Linear(4 * directions, 2))


def _two_steps(x: Tensor, cell: nn.Module, head: nn.Module) -> Tensor:
    state = cell(x[:, 1], cell(x[:, 0]))
    return head(state[0] if isinstance(state, tuple) else state)


# A model, and the sizes of one example. The first are stock's, to be fused; the others consist of our own layers.
STOCK: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(3, 2)), (3,)),
    "linear, tanh": (lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh()), (3,)),
    "chain": (lambda: nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)), (3,)),
    "chain without biases": (
        lambda: nn.Sequential(nn.Linear(3, 8, bias=False), nn.SiLU(), nn.Linear(8, 5), nn.Softplus(), nn.Linear(5, 2)),
        (3,),
    ),
    "gate": (lambda: Calls(_residual, nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)), (3,)),
    "layer norm": (lambda: nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 2)), (3,)),
    "images": (_image_net, (2, 4, 4)),
}
OURS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP": (lambda: nn.Sequential(fastnn.nn.MLP([3, 7, 2], "tanh")), (3,)),
    "ConvReLUMaxPool2d": (_pool, (2, 3, 3)),
    "RNN": (lambda: _recurrent(fastnn.nn.RNN), (4, 3)),
    "GRU": (lambda: _recurrent(fastnn.nn.GRU, bidirectional=True), (4, 3)),
    "LSTM": (lambda: _recurrent(fastnn.nn.LSTM), (4, 3)),
    "RNNCell": (lambda: Calls(_two_steps, fastnn.nn.RNNCell(3, 4), nn.Linear(4, 2)), (2, 3)),
    "GRUCell": (lambda: Calls(_two_steps, fastnn.nn.GRUCell(3, 4), nn.Linear(4, 2)), (2, 3)),
    "LSTMCell": (lambda: Calls(_two_steps, fastnn.nn.LSTMCell(3, 4), nn.Linear(4, 2)), (2, 3)),
}


def _of_one(model: Model) -> Model:
    """The model of one example, as a sum."""
    return lambda z: model(z[None]).square().sum()


DERIVATIVES: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "grad": lambda model, x: grad(lambda z: model(z).square().sum())(x),
    "grad of grad": lambda model, x: grad(lambda z: grad(_of_one(model))(z).square().sum())(x[0]),
    "vmap of grad": lambda model, x: vmap(grad(_of_one(model)))(x),
    "vjp": lambda model, x: vjp(model, x)[1](torch.ones_like(x.flatten(1)[:, :2]))[0],
    "jacrev": lambda model, x: jacrev(lambda z: model(z[None])[0])(x[0]),
    "vmap of jacrev": lambda model, x: vmap(jacrev(lambda z: model(z[None])[0]))(x),
    "jacfwd": lambda model, x: jacfwd(lambda z: model(z[None])[0])(x[0]),
    "jvp": lambda model, x: jvp(model, (x,), (torch.ones_like(x),))[1],
    "hessian": lambda model, x: hessian(_of_one(model))(x[0]),
    "vmap of hessian": lambda model, x: vmap(hessian(_of_one(model)))(x[:2]),
}


def _gradients(model: nn.Module, derivative: Callable[[Model, Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """What a loss of the derivative gives: the derivative itself, the gradients of the weights by a backward outside of
    it, and those by another transform around it."""
    weights = dict(model.named_parameters())
    found = derivative(model, x)
    found.square().sum().backward()

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return derivative(lambda z: functional_call(model, weights, (z,)), x).square().sum()

    around = grad(loss)({name: weight.detach() for name, weight in weights.items()})
    outside = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights.values()]
    return [found.detach(), *outside, *around.values()]


@pytest.mark.parametrize("name", [*STOCK, *OURS])
def test_a_loss_of_a_derivative(name: str) -> None:
    torch.manual_seed(1)
    make, sizes = (STOCK | OURS)[name]
    model = make().double()
    expected_of, ours = (model, fused_copy(model)) if name in STOCK else (_of_reference(model), model)
    x = torch.randn(3, *sizes, dtype=torch.float64)
    kinds = dict(DERIVATIVES)
    if any(isinstance(layer, (nn.RNNBase, nn.RNNCellBase)) for layer in model.modules()):
        del kinds["vmap of hessian"]  # forward mode is torch's own, whose recurrent layers refuse a vmap
    for kind, derivative in kinds.items():
        for one in (expected_of, ours):
            one.zero_grad()
        expected = _gradients(expected_of, derivative, x)
        assert sum(bool(gradient.any()) for gradient in expected) > len(expected) // 2 or kind != "grad"
        torch.testing.assert_close(_gradients(ours, derivative, x), expected, msg=lambda m, k=kind: f"{k}: {m}")
