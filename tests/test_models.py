"""The three models against their twins on stock layers."""

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastnn import models
from fastnn import nn as fused_nn
from fastnn.reference import models as reference_models
from fastnn.testing import assert_close_to_reference, using_threads

CASES = {
    "Conv2DNet": ("Conv2DNet", {"num_classes": 7}, (32, 3, 20, 20)),
    "RNN": ("RNN", {"input_size": 10, "hidden_size": 32, "num_layers": 2, "output_size": 5}, (8, 20, 10)),
    "RNN-GRU": (
        "RNN",
        {"input_size": 6, "hidden_size": 17, "num_layers": 2, "output_size": 3, "cell": "GRU"},
        (3, 9, 6),
    ),
    "RNN-LSTM": (
        "RNN",
        {"input_size": 6, "hidden_size": 17, "num_layers": 1, "output_size": 3, "cell": "LSTM"},
        (3, 9, 6),
    ),
    "Autoencoder": ("Autoencoder", {"input_size": 10, "reduced_size": 8, "encoding_size": 5}, (32, 10)),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, Tensor]:
    """The fused model, the stock one with the same weights, and an input."""
    name, arguments, shape = CASES[request.param]
    fused = getattr(models, name)(**arguments)
    stock = getattr(reference_models, name)(**arguments)
    stock.load_state_dict(fused.state_dict())
    return fused, stock, torch.randn(shape)


def outputs_and_gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    output = model(x)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    return [output, *torch.autograd.grad((output * weight).sum(), [x, *model.parameters()])]


def test_batches_of_gradients(case: tuple[nn.Module, nn.Module, Tensor]) -> None:
    model, _, x = case
    output = model(x)
    batch = torch.randn(3, *output.shape)
    call = functools.partial(torch.autograd.grad, output, list(model.parameters()), retain_graph=True)
    rows = [call(grad_outputs=row) for row in batch]
    stacked = [torch.stack(parts) for parts in zip(*rows, strict=True)]
    torch.testing.assert_close(list(call(grad_outputs=batch, is_grads_batched=True)), stacked)


@pytest.mark.parametrize("name", CASES)
def test_same_seed_gives_the_same_initial_weights(name: str) -> None:
    class_name, arguments, _ = CASES[name]
    states = []
    for module in (models, reference_models):
        torch.manual_seed(3)
        states.append(getattr(module, class_name)(**arguments).state_dict())
    assert list(states[0]) == list(states[1])
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], rtol=0, atol=0)


def test_state_dict_goes_both_ways(case: tuple[nn.Module, nn.Module, Tensor]) -> None:
    fused, stock, _ = case
    fresh = copy.deepcopy(fused)
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    fresh.load_state_dict(stock.state_dict())
    stock.load_state_dict(fresh.state_dict())
    for ours, theirs in zip(fresh.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_and_gradients(case: tuple[nn.Module, nn.Module, Tensor], dtype: torch.dtype) -> None:
    fused, stock, x = case
    x = x.to(dtype)
    ours = outputs_and_gradients(fused.to(dtype), x)
    theirs = outputs_and_gradients(stock.to(dtype), x)
    assert_close_to_reference(ours, theirs, outputs_and_gradients(stock.double(), x.double()))


def test_inference_is_repeatable_bit_by_bit(case: tuple[nn.Module, nn.Module, Tensor]) -> None:
    fused, _, x = case
    with torch.inference_mode():
        first = fused(x)
        for _ in range(3):
            torch.testing.assert_close(fused(x), first, rtol=0, atol=0)


def test_training_follows_stock(case: tuple[nn.Module, nn.Module, Tensor]) -> None:
    losses = []
    fused, stock, x = case
    with torch.no_grad():
        target = torch.zeros_like(stock(x))
    for model in (fused, stock):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        history = []
        for _ in range(8):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), target)
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        assert history[-1] < 0.8 * history[0]
        losses.append(history)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-7)


def test_pickle_and_copy(case: tuple[nn.Module, nn.Module, Tensor]) -> None:
    fused, _, x = case
    expected = fused(x)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)


def test_compiles_in_one_graph(case: tuple[nn.Module, nn.Module, Tensor]) -> None:
    fused, _, x = case
    torch.compiler.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), fused(x))
    for ours, theirs in zip(outputs_and_gradients(compiled, x), outputs_and_gradients(fused, x), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["Conv2DNet", "RNN", "Autoencoder"])
def test_compiles_with_inductor(name: str) -> None:
    class_name, arguments, shape = CASES[name]
    model, x = getattr(models, class_name)(**arguments), torch.randn(shape)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_exports(case: tuple[nn.Module, nn.Module, Tensor]) -> None:
    fused, _, x = case
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(fused.eval(), (x,), dynamic_shapes=({0: batch},)).module()
    with torch.no_grad():
        for rows in (x, x[:2]):
            torch.testing.assert_close(exported(rows), fused(rows))


# ---- Conv2DNet in inference: one operator, unless somebody could tell ---------------------------------------


class Operators(TorchDispatchMode):
    """Writes down fastnn's operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastnn":
            self.called.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


AT_ONCE = ["network_of_parameters"]


def infer(model: nn.Module, x: Tensor) -> tuple[Tensor, list[str]]:
    with torch.no_grad(), Operators() as operators:
        return model(x), operators.called


def twins() -> tuple[nn.Module, nn.Module]:
    fused, stock = models.Conv2DNet(7), reference_models.Conv2DNet(7)
    stock.load_state_dict(fused.state_dict())
    return fused, stock


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [0, 1, 2, 15, 33, 64])
def test_conv_net_infers_at_once(batch: int, dtype: torch.dtype, every_instruction_set: str) -> None:
    fused, stock = twins()
    x = torch.randn(batch, 3, 20, 20, dtype=dtype)
    output, called = infer(fused.to(dtype), x)
    assert called == AT_ONCE
    theirs, exact = stock.to(dtype)(x), stock.double()(x.double())
    assert_close_to_reference([output], [theirs.detach()], [exact.detach()])
    with using_threads(2):
        assert torch.equal(infer(fused, x)[0], output)


def test_conv_net_infers_other_sizes_at_once() -> None:
    fused, _ = twins()
    fused.conv1 = fused_nn.ConvReLUMaxPool2d(3, 10, 3, padding=1, bias=False, pool_kernel_size=3, pool_stride=2)
    fused.output = nn.Linear(10 * 2 * 2, 4, bias=False)
    x = torch.randn(5, 3, 20, 20)
    output, called = infer(fused, x)
    assert called == AT_ONCE
    expected = F.max_pool2d(F.conv2d(x, fused.conv1.weight, padding=1).relu(), 3, 2)
    expected = F.max_pool2d(F.conv2d(expected, fused.conv2.weight, fused.conv2.bias, 2, 1).relu(), 2)
    torch.testing.assert_close(output, F.linear(expected.flatten(1), fused.output.weight).detach())


def test_conv_net_after_an_input_that_it_refuses() -> None:
    fused, _ = twins()
    x = torch.randn(1, 3, 20, 20)
    expected, called = infer(fused, x)
    assert called == AT_ONCE
    for _ in range(3):
        with torch.no_grad(), pytest.raises(RuntimeError):
            fused(torch.randn(1, 3, 40, 40))  # refused by the last layer alone
        assert torch.equal(infer(fused, x)[0], expected)


def add_hook(model: nn.Module, name: str, seen: list[str]) -> None:
    getattr(model, name).register_forward_hook(lambda *_: seen.append(name))


@pytest.mark.parametrize("name", ["conv1", "conv2", "output"])
def test_hooks_of_layers_run(name: str) -> None:
    fused, stock = twins()
    seen: list[str] = []
    add_hook(fused, name, seen)
    x = torch.randn(4, 3, 20, 20)
    output, called = infer(fused, x)
    assert seen == [name]
    assert name == "output" or called != AT_ONCE  # else the convolutions are one operator, and the layer is called
    torch.testing.assert_close(output, stock(x).detach())


def test_hooks_of_all_modules_run() -> None:
    fused, _ = twins()
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        infer(fused, torch.randn(4, 3, 20, 20))
    finally:
        handle.remove()
    assert seen == [fused.conv1, fused.conv2, fused.output, fused]


LAYERS: dict[str, Callable[[nn.Module], Any]] = {
    "stock layers": lambda model: setattr(
        model, "conv1", nn.Sequential(nn.Conv2d(3, 10, 5, 2, 2), nn.ReLU(), nn.MaxPool2d(2))
    ),
    "no linear layer": lambda model: setattr(model, "output", nn.Identity()),
    "parametrised": lambda model: nn.utils.parametrizations.weight_norm(model.conv2),
    "parametrised linear layer": lambda model: nn.utils.parametrizations.spectral_norm(model.output),
    "padding in words": lambda model: setattr(model, "conv2", fused_nn.ConvReLUMaxPool2d(10, 10, 2, padding="same")),
    "channels last": lambda model: model.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("change", LAYERS)
def test_conv_net_with_other_layers(change: str) -> None:
    fused, _ = twins()
    LAYERS[change](fused)
    if change == "padding in words":
        fused.output = nn.Linear(40, 3)
    fused.eval()
    x = torch.randn(4, 3, 20, 20)
    by_layers = fused.conv2(fused.conv1(x)).flatten(1)
    torch.testing.assert_close(infer(fused, x)[0], fused.output(by_layers).detach())


@pytest.mark.parametrize("attribute", ["stride", "padding", "dilation"])
def test_conv_net_after_a_layer_was_changed(attribute: str) -> None:
    fused, _ = twins()
    x = torch.randn(4, 3, 20, 20)
    before, _ = infer(fused, x)
    value = {"stride": (3, 3), "padding": (1, 1), "dilation": (2, 2)}[attribute]
    setattr(fused.conv1, attribute, value)
    fused.output = nn.Linear(fused.conv2(fused.conv1(x)).flatten(1).shape[1], 2)
    output, called = infer(fused, x)
    assert called == AT_ONCE
    torch.testing.assert_close(output, fused.output(fused.conv2(fused.conv1(x)).flatten(1)).detach())
    assert output.shape != before.shape


def test_conv_net_after_its_weights_were_changed() -> None:
    fused, stock = twins()
    x = torch.randn(4, 3, 20, 20)
    infer(fused, x)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.mul_(-0.7)
    stock.load_state_dict(fused.state_dict())
    torch.testing.assert_close(infer(fused, x)[0], stock(x).detach())
    replaced = {name: torch.randn_like(value) / 8 for name, value in fused.state_dict().items()}
    with torch.no_grad():
        ours = torch.func.functional_call(fused, replaced, x)
    torch.testing.assert_close(ours, torch.func.functional_call(stock, replaced, x))


BAD_INPUTS: dict[str, Callable[[], Any]] = {
    "channels": lambda: torch.randn(4, 2, 20, 20),
    "rank": lambda: torch.randn(20, 20),
    "not batched": lambda: torch.randn(3, 20, 20),
    "too small": lambda: torch.randn(4, 3, 1, 1),
    "too large": lambda: torch.randn(4, 3, 60, 60),
    "dtype": lambda: torch.randn(4, 3, 20, 20, dtype=torch.float64),
    "integers": lambda: torch.ones(4, 3, 20, 20, dtype=torch.int64),
    "not a tensor": lambda: [1.0],
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_conv_net_raises_what_its_layers_do(name: str) -> None:
    fused, watched = models.Conv2DNet(7), models.Conv2DNet(7)
    add_hook(watched, "conv1", [])
    errors = []
    for model in (fused, watched):
        with torch.no_grad(), pytest.raises((RuntimeError, AttributeError)) as error:
            model(BAD_INPUTS[name]())
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]


def test_other_layers_in_the_recurrent_model() -> None:
    model, x = models.RNN(6, 9, 1, 4), torch.randn(3, 5, 6)
    seen: list[str] = []
    add_hook(model, "fc", seen)
    expected = model.fc(model.rnn(x)[0][:, -1])
    torch.testing.assert_close(model(x), expected)
    assert seen == ["fc", "fc"]
    model.fc = nn.Identity()
    torch.testing.assert_close(model(x), model.rnn(x)[0][:, -1])


def test_autoencoder_scores_each_row() -> None:
    fused = models.Autoencoder(10, 8, 5)
    stock = reference_models.Autoencoder(10, 8, 5)
    stock.load_state_dict(fused.state_dict())
    for shape in ((32, 10), (10,), (2, 3, 10), (0, 10)):
        x = torch.randn(shape)
        torch.testing.assert_close(fused.encode(x), stock.encode(x))
        torch.testing.assert_close(fused.decode(fused.encode(x)), fused(x))
        assert fused.reconstruction_error(x).shape == shape[:-1]
        torch.testing.assert_close(fused.reconstruction_error(x), stock.reconstruction_error(x))


def test_rnn_refuses_an_unknown_cell() -> None:
    for module in (models, reference_models):
        with pytest.raises(ValueError, match="cell must be one of RNN, GRU, LSTM"):
            module.RNN(2, 3, 1, 1, cell="Elman")


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "old weight norm": lambda model: nn.utils.weight_norm(model.encoder_2),
    "old spectral norm": lambda model: nn.utils.spectral_norm(model.encoder_1),
    "pruning": lambda model: nn.utils.prune.l1_unstructured(model.decoder_1, "weight", 0.5),
    "parametrization": lambda model: nn.utils.parametrizations.weight_norm(model.decoder_2),
    "hook": lambda model: model.encoder_2.register_forward_hook(lambda module, args, output: 2 * output),
    "another layer": lambda model: setattr(model, "encoder_2", nn.Sequential(nn.Linear(8, 5), nn.Tanh())),
    "no bias": lambda model: setattr(model, "decoder_1", nn.Linear(5, 8, bias=False)),
    "one layer more": lambda model: setattr(model, "head", nn.Linear(5, 2)),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("change", CHANGES)
def test_autoencoder_trains_with_other_layers(change: str) -> None:
    fused, stock = models.Autoencoder(10, 8, 5), reference_models.Autoencoder(10, 8, 5)
    x = torch.randn(32, 10)
    histories = []
    for model in (fused, stock):
        torch.manual_seed(1)
        CHANGES[change](model)
    stock.load_state_dict(fused.state_dict())
    for model in (fused, stock):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        history = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), x) + model.reconstruction_error(x).mean() + model.decode(model.encode(x)).mean()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        histories.append(history)
    torch.testing.assert_close(*histories, rtol=1e-5, atol=1e-6)
