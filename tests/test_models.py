"""The three models against their twins on stock layers."""

import copy
import functools
import pickle

import pytest
import torch
from torch import Tensor, nn

from fastnn import models
from fastnn.reference import models as reference_models
from fastnn.testing import assert_close_to_reference

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
