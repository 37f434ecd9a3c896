"""Stretches of a fused model's layers: under autograd one function each, in inference one call each."""

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import random_models
import torch
import torch.nn.functional as F
import upstream_samples
from fusing import run_and_list
from test_training_networks import CASES, MODELS, By, OfTwo
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, weight_norm
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import fastnn
from fastnn.graph import stretches
from fastnn.ops import network_training
from fastnn.testing import using_threads


@pytest.fixture(autouse=True)
def all_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a function of each stretch, however small."""
    monkeypatch.setattr(stretches, "_LEAST_COST", 1)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """The passes that wait for backward."""
    waiting: set[int] = set()
    with_pass, forget = network_training.network_with_pass, network_training.forget_pass

    def count(*args: Any) -> Any:
        outputs, number = with_pass(*args)
        waiting.add(int(number))
        return outputs, number

    def forget_and_count(number: int) -> None:
        waiting.discard(number)
        forget(number)

    monkeypatch.setattr(network_training, "network_with_pass", count)
    monkeypatch.setattr(network_training, "forget_pass", forget_and_count)
    yield waiting
    if waiting:  # in cycles of objects
        gc.collect()
    assert not waiting


def _pair(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = make().to(dtype).train()
    return copy.deepcopy(model), fastnn.fuse(model)


def _networks(model: nn.Module, trains: bool = True) -> list[str]:
    """The programs of the functions, or in inference of the calls, that the model's forward has become."""
    found = model.forward.traces[model.training][0].known_stretches.get(trains)  # type: ignore[attr-defined]
    return [] if found is None else list(found.networks)


def _tensors(nested: Any) -> list[Tensor]:
    return [one for one in torch.utils._pytree.tree_leaves(nested) if isinstance(one, Tensor)]


def _gradients(model: nn.Module, inputs: list[Tensor], twice: bool) -> tuple[list[Tensor], list[Any]]:
    """What the model gives, and gradients of it with respect to parameters and inputs: of two orders, if `twice`."""
    torch.manual_seed(5)
    own = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = [y for y in _tensors(model(*own)) if y.is_floating_point()]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in outputs]
    leaves = [*(x for x in own if x.requires_grad), *model.parameters()]
    first = torch.autograd.grad(outputs, leaves, weights, create_graph=twice, allow_unused=True)
    if not twice:
        return outputs, list(first)
    total = sum(g.square().sum() for g in first if g is not None and g.requires_grad)
    return outputs, [*first, *torch.autograd.grad(total, leaves, allow_unused=True)]


def _compare(stock: nn.Module, fused: nn.Module, inputs: list[Tensor], tolerance: float, twice: bool = False) -> None:
    for _ in range(2):
        expected, gradients = _gradients(stock, inputs, twice)
        random = torch.get_rng_state()
        found, own = _gradients(fused, inputs, twice)
        assert torch.equal(torch.get_rng_state(), random)
        assert_close(found, expected, rtol=tolerance, atol=tolerance)
        assert [one.requires_grad for one in found] == [one.requires_grad for one in expected]
        assert [one is None for one in own] == [one is None for one in gradients]
        for one, other in zip(own, gradients, strict=True):
            if one is not None:
                scale = max(float(other.detach().abs().max()), 1.0)
                assert_close(one, other, rtol=tolerance, atol=tolerance * scale)
    assert_close(fused.state_dict(), stock.state_dict(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("name", "memory_format"), CASES)
def test_models(name: str, memory_format: torch.memory_format, dtype: torch.dtype, passes: set[int]) -> None:
    make, sizes = MODELS[name]
    stock, fused = _pair(make, dtype)
    x = torch.randn(sizes, dtype=dtype).to(memory_format=memory_format)
    _compare(stock, fused, [x], 1e-9 if dtype == torch.float64 else 2e-3)
    assert len(_networks(fused)) == 1


@pytest.mark.parametrize("name", MODELS)
def test_second_derivatives(name: str, passes: set[int]) -> None:
    make, sizes = MODELS[name]
    stock, fused = _pair(make)
    x = torch.randn(sizes, dtype=torch.float64)
    has_twice = True
    try:
        _gradients(copy.deepcopy(stock), [x], twice=True)
    except RuntimeError:  # From torch 2.15 on, stock has no second derivative of attention. Ours has.
        has_twice = False
        _gradients(copy.deepcopy(fused), [x], twice=True)
    _compare(stock, fused, [x], 1e-8, twice=has_twice)


@pytest.mark.parametrize("name", ["residual", "tied", "cells"])
def test_gradcheck(name: str) -> None:
    make, sizes = MODELS[name]
    _, fused = _pair(lambda: make().to(torch.float64))
    parameters = list(fused.parameters())[-2:]

    def run(x: Tensor, *some: Tensor) -> Any:
        return fused(x)

    x = torch.randn(sizes, dtype=torch.float64, requires_grad=True)
    for module in fused.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)
    assert _networks(fused)


def _vae(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h = torch.relu(m.encoder(x))
    mean, log_variance = m.heads(h).chunk(2, 1)
    z = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
    return m.decoder(m.drop(z)), mean, log_variance


def _make_vae() -> nn.Module:
    return By(
        _vae, encoder=nn.Linear(7, 9), heads=nn.Linear(9, 6), decoder=nn.Linear(3, 7), drop=nn.Dropout(0.3)
    )  # fmt: skip


@pytest.mark.parametrize("twice", [False, True])
def test_results_that_others_are_made_of(twice: bool, passes: set[int]) -> None:
    """A caller may ask for gradients with respect to what the model returns."""
    stock, fused = _pair(_make_vae)
    x = torch.randn(4, 7, dtype=torch.float64)
    _compare(stock, fused, [x], 1e-9, twice)
    assert len(_networks(fused)) == 2
    results = []
    for model in (stock, fused):
        torch.manual_seed(2)
        y, mean, log_variance = model(x)
        mean.retain_grad()
        results.append(torch.autograd.grad(y.square().sum(), [mean, log_variance], retain_graph=True))
        y.sum().backward()
        assert mean.grad is not None
        results[-1] += (mean.grad,)
    assert_close(*results)


def test_a_result_by_another_name(passes: set[int]) -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(m.a(x))
        z = m.same(y)
        return z, m.b(torch.tanh(m.c(y)))

    stock, fused = _pair(
        lambda: By(forward, a=nn.Linear(4, 5), b=nn.Linear(5, 3), c=nn.Linear(5, 5), same=nn.Identity())
    )
    x = torch.randn(3, 4, dtype=torch.float64)
    _compare(stock, fused, [x], 1e-9)
    results = []
    for model in (stock, fused):
        z, y = model(x)
        results.append(torch.autograd.grad(y.square().sum(), z))
    assert_close(*results)


def test_states_and_a_tuple_as_a_result(passes: set[int]) -> None:
    class Agent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.rnn, self.head = nn.Linear(5, 6), nn.LSTM(6, 4, 2, dropout=0.4), nn.Linear(4, 2)

        def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
            y, state = self.rnn(torch.tanh(self.body(x)), (h, c))
            return self.head(y), state

    stock, fused = _pair(Agent)
    inputs = [torch.randn(3, 2, 5), torch.randn(2, 2, 4), torch.randn(2, 2, 4)]
    for twice in (False, True):
        _compare(stock, fused, [x.double() for x in inputs], 1e-8, twice)
    assert len(_networks(fused)) == 1
    torch.manual_seed(0)
    assert isinstance(fused(*[x.double() for x in inputs])[1], tuple)


def test_words(passes: set[int]) -> None:
    def forward(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return m.fc(torch.cat([m.words(x).mean(1), torch.relu(m.body(y))], dim=-1))

    stock, fused = _pair(
        lambda: OfTwo(forward, words=nn.Embedding(9, 4, padding_idx=0), body=nn.Linear(3, 6), fc=nn.Linear(10, 5))
    )
    x, y = torch.randint(9, (4, 7)), torch.randn(4, 3, dtype=torch.float64)
    for twice in (False, True):
        _compare(stock, fused, [x, y], 1e-9, twice)
    assert len(_networks(fused)) == 1


def test_borders(passes: set[int]) -> None:
    """Layers that no network has stand between stretches."""

    def forward(m: Any, x: Tensor) -> Any:
        y = m.drop(torch.relu(m.a(x)))
        y = m.b(torch.cummax(y, 1)[0]) + m.c(x)
        y = m.norm(m.drop(torch.relu(y)))
        values, places = torch.sort(y, dim=1)
        return m.d(values * y) + y.norm(), places

    stock, fused = _pair(
        lambda: By(
            forward, a=nn.Linear(6, 8), b=nn.Linear(8, 5), c=nn.Linear(6, 5), d=nn.Linear(5, 3), drop=nn.Dropout(0.2),
            norm=nn.BatchNorm1d(5),
        )
    )  # fmt: skip
    for twice in (False, True):
        _compare(stock, fused, [torch.randn(7, 6, dtype=torch.float64)], 1e-8, twice)
    assert len(_networks(fused)) == 4


def test_borders_that_write_or_draw_leave_the_order_alone(passes: set[int]) -> None:
    def draws(m: Any, x: Tensor) -> Tensor:
        y = m.drop(torch.relu(m.a(x)))
        z = torch.rand_like(x).sum() + m.drop(torch.relu(m.b(x)))
        return m.drop(m.c(y + z))

    def writes(m: Any, x: Tensor) -> Tensor:
        y = torch.relu(m.a(x))
        z = m.c(y)
        y[:, 0] = 0.5
        return z + m.c(torch.sigmoid(m.b(x)) + y.sum())

    for forward in (draws, writes):
        stock, fused = _pair(
            lambda forward=forward: By(
                forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4), drop=nn.Dropout(0.5)
            )
        )
        x = torch.randn(5, 4, dtype=torch.float64)
        if forward is writes:
            for model in (stock, fused):
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    model(x).sum().backward()
            assert_close(fused(x), stock(x))
        else:
            _compare(stock, fused, [x], 1e-9)


def _two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.3))


def test_backward_again(passes: set[int]) -> None:
    stock, fused = _pair(_two_layers)
    x = torch.randn(6, 4, dtype=torch.float64)
    results = []
    for model in (stock, fused):
        torch.manual_seed(0)
        y = model(x).square().sum()
        first = torch.autograd.grad(y, list(model.parameters()), retain_graph=True)
        results.append((first, torch.autograd.grad(y, list(model.parameters()))))
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            y.backward()
    assert_close(*results)


def test_saved_memory_goes_after_backward(passes: set[int]) -> None:
    _, fused = _pair(_two_layers)
    x = torch.randn(6, 4, dtype=torch.float64)
    y = fused(x)
    assert len(passes) == 1
    y.sum().backward()
    assert not passes  # although y is still there
    reference = weakref.ref(x)
    del x
    gc.collect()
    assert reference() is None
    y = fused(torch.randn(6, 4, dtype=torch.float64))
    assert len(passes) == 1
    del y
    assert not passes  # without any backward


def test_many_at_once(passes: set[int]) -> None:
    stock, fused = _pair(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.LayerNorm(4)))
    results = []
    for model in (stock, fused):
        y = torch.ones(2, 4, dtype=torch.float64)
        for _ in range(600):
            y = model(y)
        results.append((y, torch.autograd.grad(y.square().sum(), list(model.parameters()))))
    assert_close(*results, rtol=1e-6, atol=1e-6)


def test_threads(passes: set[int]) -> None:
    stock, fused = _pair(lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.LayerNorm(8)))
    x = torch.randn(16, 8, dtype=torch.float64)
    expected = torch.autograd.grad(stock(x).square().sum(), list(stock.parameters()))
    fused(x)
    failed = []

    def work() -> None:
        for _ in range(50):
            found = torch.autograd.grad(fused(x).square().sum(), list(fused.parameters()))
            failed.append(not all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failed) == 200
    assert not any(failed)


@pytest.mark.parametrize("name", ["0.weight", "2.weight", "3.weight"])
def test_weights_that_change_before_backward(name: str, passes: set[int]) -> None:
    stock, fused = _pair(_two_layers)
    for model in (stock, fused):
        y = model(torch.randn(6, 4, dtype=torch.float64, requires_grad=True))
        with torch.no_grad():
            model.get_parameter(name).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_biases_may_change_before_backward(passes: set[int]) -> None:
    models = _pair(_two_layers)
    results = []
    for model in models:
        torch.manual_seed(0)
        y = model(torch.ones(6, 4, dtype=torch.float64).cumsum(0))
        with torch.no_grad():
            for name in ("0.bias", "2.bias", "3.bias"):
                model.get_parameter(name).add_(1)
        results.append(torch.autograd.grad(y.square().sum(), list(model.parameters())))
    assert_close(*results)
    y = models[1](torch.randn(6, 4, dtype=torch.float64))
    with torch.no_grad():
        models[1].get_parameter("0.bias").add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), list(models[1].parameters()), create_graph=True)


def test_an_input_that_changes_before_backward(passes: set[int]) -> None:
    stock, fused = _pair(_two_layers)
    for model in (stock, fused):
        x = torch.randn(6, 4, dtype=torch.float64)
        y = model(x)
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


_VIEWS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "view": (lambda x: x.view(-1, 4), (2, 3, 4)),
    "flatten": (lambda x: x.flatten(1), (6, 2, 2)),
    "unflatten": (lambda x: x.unflatten(1, (1, 4)), (6, 4)),
    "squeeze": (lambda x: x.squeeze(1), (6, 1, 4)),
    "unsqueeze": (lambda x: x.unsqueeze(1), (6, 4)),
    "transpose": (lambda x: x.transpose(0, 1), (4, 6)),
    "permute": (lambda x: x.permute(1, 2, 0), (4, 3, 2)),
    "expand": (lambda x: x.expand(6, 4), (1, 4)),
    "contiguous": (lambda x: x.contiguous(), (6, 4)),
    "select": (lambda x: x[:, 1], (6, 2, 4)),
    "slice": (lambda x: x[:, 1:5], (6, 7)),
    "chunk": (lambda x: x.chunk(2, 1)[1], (6, 8)),
    "detach": (lambda x: x.detach(), (6, 4)),
    "two of them": (lambda x: x[:, 1].unsqueeze(1), (6, 2, 4)),
}


@pytest.mark.parametrize("name", list(_VIEWS))
@pytest.mark.parametrize("of_weight", [False, True])
def test_what_a_view_shows_changes_before_backward(name: str, of_weight: bool, passes: set[int]) -> None:
    """Backward would read the new elements, which stock refuses to do."""
    view, sizes = _VIEWS[name]

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(torch.tanh(m.a(x * view(m.seen)) if of_weight else m.a(view(x))))

    def make() -> nn.Module:
        return By(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 2), seen=nn.Parameter(torch.randn(sizes)))

    stock, fused = _pair(make)
    for model in (stock, fused):
        x = torch.randn(view(model.seen).shape, dtype=torch.float64) if of_weight else model.seen.detach().clone()
        y = model(x.requires_grad_(of_weight))
        with torch.no_grad():
            (model.seen if of_weight else x).add_(1)
        with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
            y.sum().backward()
    assert len(fastnn.explain(fused, x).calls) == 1


def _of(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, p: function(x)


# Layers between an input and a parameter of 6 x 4 elements, which may change before backward.
_BETWEEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{f.__name__: _of(f) for f in (torch.abs, torch.neg, torch.exp, torch.rsqrt, torch.sqrt, torch.log, torch.log1p)},
    **{f.__name__: _of(f) for f in (torch.sin, torch.cos, torch.tan, torch.tanh, torch.sigmoid, torch.square)},
    **{f.__name__: _of(f) for f in (torch.sign, torch.erf, torch.expm1, torch.floor, torch.relu, torch.atan)},
    **{f.__name__: _of(f) for f in (F.gelu, F.silu, F.mish, F.hardswish, F.softplus, F.elu, F.celu, F.relu6)},
    **{f.__name__: _of(f) for f in (F.hardtanh, F.leaky_relu, F.logsigmoid, F.softshrink)},
    "clamp": lambda x, p: x.clamp(0.5, 1.0),
    "mul": lambda x, p: x * p,
    "div": lambda x, p: x / (p + 9) + (p + 9) / x,
    "pow": lambda x, p: x**2 + x**3,
    "maximum": lambda x, p: torch.maximum(x, p) + torch.minimum(x, p),
    "where": lambda x, p: torch.where(x > 1, p, -x),
    "lerp": lambda x, p: torch.lerp(x, p, 0.3),
    "softmax": lambda x, p: F.softmax(x, -1) + F.log_softmax(x, -1) + x.logsumexp(-1, keepdim=True),
    "softmax of columns": lambda x, p: F.softmax(x, 0) * p + F.log_softmax(x, 0),
    "amax": lambda x, p: x + x.amax(-1, keepdim=True),
    "moments": lambda x, p: x.var(-1, keepdim=True) + x.mean(-1, keepdim=True) * p,
    "norms": lambda x, p: x.norm(dim=-1, keepdim=True) + x.norm(p=1, dim=-1, keepdim=True) + F.normalize(x) + p,
    "cumsum": lambda x, p: x.cumsum(-1),
    "layer_norm": lambda x, p: F.layer_norm(x, (4,), p[0], p[1]),
    "group_norm": lambda x, p: F.group_norm(x, 2, p[0], p[1]),
    "batch_norm": lambda x, p: F.batch_norm(x, None, None, p[0], p[1], True),
    "prelu": lambda x, p: F.prelu(x - 1, p[0]),
    "matmul": lambda x, p: x @ p.T @ p,
    "linear": lambda x, p: F.linear(x, p[:4], p[4]),
    "attention": lambda x, p: F.scaled_dot_product_attention(*(t.view(1, 1, 6, 4) for t in (x, p, x))).view(6, 4),
    "max_pool": lambda x, p: F.max_pool1d(x.view(1, 6, 4), 3, 1, 1).view(6, 4),
    "avg_pool": lambda x, p: F.avg_pool1d(x.view(1, 6, 4), 3, 1, 1).view(6, 4) * p,
    "conv": lambda x, p: F.conv1d(x.view(1, 6, 4), p.view(4, 6, 1))[0],
    "masked_fill": lambda x, p: x.masked_fill(x > 1, 0.5) * p,
    "losses": lambda x, p: x + F.mse_loss(x, p) + F.smooth_l1_loss(x, p),
    "entropies": lambda x, p: x + F.binary_cross_entropy_with_logits(x, torch.sigmoid(p)) + F.cross_entropy(x, p.abs()),
    "reordered": lambda x, p: torch.cat([x.flip(1), x.roll(1, 1)], 1)[:, 2:6] + F.pad(x, (1, 1))[:, 2:] * p,
}


@pytest.mark.parametrize("name", list(_BETWEEN))
@pytest.mark.parametrize("changes", ["input", "parameter"])
@pytest.mark.parametrize("wants", [False, True])
def test_what_a_layer_reads_again_changes_before_backward(name: str, changes: str, wants: bool) -> None:
    """wants: whether the input requires a gradient. The gradients are those of what forward has seen, or there are none
    where stock has none either."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(torch.tanh(m.a(_BETWEEN[name](x, m.p))))

    def make() -> nn.Module:
        return By(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 2), p=nn.Parameter(torch.rand(6, 4) + 0.5))

    def gradients(model: nn.Module, changed: bool) -> Any:
        torch.manual_seed(1)
        x = (torch.rand(6, 4, dtype=torch.float64) + 0.5).requires_grad_(wants)
        y = model(x)
        if changed:
            with torch.no_grad():
                (x if changes == "input" else model.get_parameter("p")).mul_(1.5)
        given = [*model.parameters(), *([x] if wants else [])]
        return torch.autograd.grad(y.square().sum(), given, allow_unused=True)

    stock, fused = _pair(make)
    expected = gradients(stock, False)
    try:
        assert_close(gradients(fused, True), expected)
    except RuntimeError:
        for model in (fused, stock):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                gradients(model, True)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("columns", [1, 3, 8, 21, 70])
@pytest.mark.parametrize("rows", [1, 9, 300])
def test_softmax(rows: int, columns: int, dim: int) -> None:
    """Along rows and columns that fill less than a vector and many of them."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.tanh(m.a(x))
        return m.b(F.softmax(9 * y, dim) * F.log_softmax(y, dim))

    stock, fused = _pair(lambda: By(forward, a=nn.Linear(4, columns), b=nn.Linear(columns, 2)))
    x = torch.randn(3, rows, 4, dtype=torch.float64)
    results = []
    for model in (stock, fused):
        y = model(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))])
    assert_close(results[1], results[0])
    assert any("softmax" in stretch for stretch in fastnn.explain(fused, x).stretches)


def test_an_embedding_of_a_column_twice_differentiated(passes: set[int]) -> None:
    class Energy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kind = nn.Embedding(5, 8, padding_idx=1)
            self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 1)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            h = torch.tanh(self.b(torch.tanh(self.a(x))))
            return self.c(h * self.kind(z[:, 1]) * self.kind(z[:, 0])).sum()

    stock, fused = _pair(Energy)
    z = torch.randint(0, 5, (6, 2))
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    results = []
    for model in (stock, fused):
        (force,) = torch.autograd.grad(model(z, x), x, create_graph=True)
        second = torch.autograd.grad(force.square().sum(), list(model.parameters())[:-1], allow_unused=True)
        results.append((force, second))
    assert_close(*results)


def test_two_forwards_before_backward(passes: set[int]) -> None:
    """Running statistics change in between, and are not needed."""
    stock, fused = _pair(_two_layers)
    results = []
    for model in (stock, fused):
        torch.manual_seed(3)
        some = [model(torch.randn(6, 4, dtype=torch.float64)) for _ in range(2)]
        results.append(torch.autograd.grad(some[0].sum() + some[1].square().sum(), list(model.parameters())))
    assert_close(*results)
    assert_close(fused.state_dict(), stock.state_dict())


def _tower(*more: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), *more, nn.Linear(5, 3))


def _one_by_one(m: Any, x: Tensor) -> Any:
    return m.first(x), m.second(x), m.third(x)


def _layer_by_layer(m: Any, x: Tensor) -> Any:
    y, z = x, x
    for first, second in zip(m.first, m.second, strict=True):
        y, z = first(y), second(z)
    return y, z, m.third(x)


def _behind_a_detach(m: Any, x: Tensor) -> Any:
    hidden = torch.tanh(m.first(x))
    return hidden * 2 + 1, m.third(m.second(torch.cat([hidden.detach(), x[:, :1]], 1)))


def _behind_a_cat(m: Any, x: Tensor) -> Any:
    x = torch.cat([x[:, :2], torch.sigmoid(x[:, 2:])], 1)
    return m.first(x), m.second(m.drop(x)), m.third(x * 2)


_APART: dict[str, tuple[Callable[..., Any], Callable[[], nn.Module], int]] = {
    "towers": (_one_by_one, _tower, 3),
    "dropouts, tower by tower": (_one_by_one, lambda: _tower(nn.Dropout(0.4)), 3),
    # The towers' random numbers alternate, so that two of them are one stretch, which has a single backward.
    "dropouts, layer by layer": (_layer_by_layer, lambda: _tower(nn.Dropout(0.4), nn.Tanh(), nn.Dropout(0.4)), 2),
    "norms, layer by layer": (_layer_by_layer, lambda: _tower(nn.BatchNorm1d(5), nn.Sigmoid(), nn.BatchNorm1d(5)), 2),
    # The layers in front are a network, too, although only by the least cost that these tests set.
    "behind layers without parameters": (_behind_a_cat, _tower, 4),
    "norms, tower by tower": (_one_by_one, lambda: _tower(nn.BatchNorm1d(5), nn.Sigmoid()), 3),
}


@pytest.mark.parametrize("name", _APART)
def test_parts_that_are_not_connected_go_backward_apart(name: str, passes: set[int]) -> None:
    """Two critics, or an ensemble: each has a loss and an optimizer of its own, and one steps before the next goes
    backward."""
    forward, tower, count = _APART[name]
    stock, fused = _pair(lambda: By(forward, first=tower(), second=tower(), third=tower(), drop=nn.Dropout(0.2)))
    results: list[Any] = []
    for model in (stock, fused):
        torch.manual_seed(2)
        for x in torch.randn(3, 6, 4, dtype=torch.float64):
            losses = [y.square().mean() for y in model(x)]
            if count < len(losses):
                losses = [losses[0] + losses[1], *losses[2:]]
            for loss in losses:
                loss.backward()
                with torch.no_grad():
                    for parameter in model.parameters():
                        if parameter.grad is not None:
                            parameter.sub_(parameter.grad, alpha=0.1)
                            parameter.grad = None
        results.append((model.state_dict(), torch.get_rng_state()))
    assert_close(*results)
    assert len(_networks(fused)) == count


def test_what_is_detached_goes_backward_apart(passes: set[int]) -> None:
    """A probe on features that do not learn from it."""
    stock, fused = _pair(
        lambda: By(_behind_a_detach, first=nn.Linear(4, 5), second=nn.Linear(6, 4), third=_tower(nn.Tanh()))
    )
    results = []
    for model in (stock, fused):
        torch.manual_seed(2)
        for order in (1, -1):
            for loss in [y.square().mean() for y in model(torch.randn(6, 4, dtype=torch.float64))][::order]:
                loss.backward()
        results.append([p.grad for p in model.parameters()])
    assert_close(*results)
    assert len(_networks(fused)) == 2


def test_parts_that_take_each_other_detached_are_one(passes: set[int]) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y, z = torch.tanh(m.first(x)), torch.tanh(m.second(x))
        return m.third(y + z.detach()), m.third(z * y.detach() + 1)

    stock, fused = _pair(lambda: By(forward, first=nn.Linear(4, 4), second=nn.Linear(4, 4), third=_tower()))
    _compare(stock, fused, [torch.randn(6, 4, dtype=torch.float64)], 1e-9)
    assert len(_networks(fused)) == 1


@pytest.mark.parametrize("other", ["new", "expanded", "turned"])
def test_an_input_whose_memory_is_exchanged_before_backward(other: str, passes: set[int]) -> None:
    """Its version does not change, so that backward reads what is there now, as stock does."""
    stock, fused = _pair(_tower)
    results = []
    for model in (stock, fused):
        torch.manual_seed(2)
        x = torch.randn(6, 4, dtype=torch.float64)
        y = model(x)
        memory = torch.randn(4, 6, dtype=torch.float64)
        x.data = {"new": memory.t().clone(), "expanded": memory[:, 0].expand(6, 4), "turned": memory.t()}[other]
        results.append(torch.autograd.grad(y.square().sum(), list(model.parameters())))
    assert_close(*results)


@pytest.mark.parametrize("how", ["save_on_cpu", "checkpoint", "reentrant", "copies"])
def test_hooks_of_saved_tensors(how: str, passes: set[int]) -> None:
    stock, fused = _pair(_two_layers)
    results = []
    for model in (stock, fused):
        torch.manual_seed(4)
        x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
        if how == "save_on_cpu":
            with torch.autograd.graph.save_on_cpu():
                y = model(x)
        elif how == "copies":
            with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
                y = model(x)
        else:
            y = checkpoint(model, x, use_reentrant=how == "reentrant")
        y.square().sum().backward()
        results.append([p.grad for p in (x, *model.parameters())])
    assert_close(*results)


def test_settings_and_ties_that_change_are_seen(passes: set[int]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(m.drop(torch.tanh(m.a(F.pad(m.pool(x), (0, 1))))))

    stock, fused = _pair(
        lambda: By(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4), drop=nn.Dropout(0.2), pool=nn.AvgPool1d(3, 2))
    )
    for model in (stock, fused):
        model.b.weight = model.a.weight  # type: ignore[union-attr]
    x = torch.randn(3, 5, 7, dtype=torch.float64)
    _compare(stock, fused, [x], 1e-9)
    for model in (stock, fused):
        model.drop.p = 0.7  # type: ignore[union-attr]
        model.pool.padding = 1  # type: ignore[union-attr]
        model.a.in_features = 5  # type: ignore[union-attr]
    x = torch.randn(3, 5, 5, dtype=torch.float64)
    _compare(stock, fused, [x], 1e-9)
    for model in (stock, fused):
        model.b.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.float64))  # type: ignore[union-attr]
    _compare(stock, fused, [x], 1e-9)
    assert len(_networks(fused)) == 1


def test_models_that_are_alike(passes: set[int]) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        stock = _two_layers().double()
        fused = fastnn.fuse(copy.deepcopy(stock))
        _compare(stock, fused, [torch.randn(6, 4, dtype=torch.float64)], 1e-9)
        assert len(_networks(fused)) == 1


def test_some_parameters_and_outputs_without_gradients(passes: set[int]) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = torch.relu(m.a(x))
        return m.b(y), torch.sigmoid(m.c(x)), m.d(torch.relu(m.c(x)))

    stock, fused = _pair(
        lambda: By(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4), d=nn.Linear(4, 4))
    )
    x = torch.randn(3, 4, dtype=torch.float64)
    for model in (stock, fused):
        for name in ("c", "a"):
            model.get_submodule(name).requires_grad_(False)
        outputs = model(x)
        assert [y.requires_grad for y in outputs] == [True, False, True]
        model.zero_grad()
        outputs[2].sum().backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == {"d.weight", "d.bias"}
    assert_close(fused.d.weight.grad, stock.d.weight.grad)  # type: ignore[union-attr]
    assert _networks(fused)


def test_what_operators_refuse_runs_layer_by_layer() -> None:
    stock, fused = _pair(_two_layers)
    x = torch.randn(6, 4, dtype=torch.float64)
    _compare(stock, fused, [x], 1e-9)
    for _ in range(5):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            fused(x[:, :3])
        for model in (stock, fused):
            with pytest.raises(ValueError, match="more than 1 value per channel"):
                model(x[:1])
    _compare(stock, fused, [x], 1e-9)
    stock, fused = _pair(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Dropout(0.3)))
    for model in (stock, fused):
        model.to(torch.bfloat16)
    _compare(stock, fused, [x.bfloat16()], 0.1)
    for model in (stock, fused):
        model.to("meta")
    assert fused(x.to("meta")).shape == (6, 6)
    assert fused(torch.randn(0, 3, 4, device="meta")[:, 0]).shape == (0, 6)


def test_transforms_autocast_and_no_grad() -> None:
    make: Callable[[], nn.Module] = lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2), nn.LayerNorm(2))  # noqa: E731
    stock, fused = _pair(make, torch.float32)
    x = torch.randn(6, 4)
    results: list[Any] = []
    for model in (stock, fused):
        own = dict(model.named_parameters())

        def loss(parameters: Any, x: Tensor, model: nn.Module = model) -> Tensor:
            return torch.func.functional_call(model, parameters, (x,)).square().sum()

        with torch.no_grad():
            found = [model(x)]
        with torch.autocast("cpu", torch.bfloat16):
            found.append(model(x).float())
        found += torch.func.grad(loss)(own, x).values()
        found += torch.func.vmap(torch.func.grad(loss), (None, 0))(own, x).values()
        found.append(torch.func.jvp(lambda x, model=model: model(x), (x,), (torch.ones_like(x),))[1])
        y = model(x).sum(0)
        found += torch.autograd.grad(y, list(own.values()), torch.eye(2), is_grads_batched=True)
        results.append(found)
    assert_close(*results, rtol=1e-2, atol=1e-2)


def test_copies_and_pickles_of_a_model_that_has_run() -> None:
    stock, fused = _pair(_two_layers)
    x = torch.randn(6, 4, dtype=torch.float64)
    fused(x)
    fused.load_state_dict(stock.state_dict())
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        _compare(copy.deepcopy(stock), other, [x], 1e-9)
        assert _networks(other)


def test_batch_norm_without_running_statistics_in_eval_mode(passes: set[int]) -> None:
    stock, fused = _pair(_two_layers)
    for model in (stock, fused):
        norm: Any = model.get_submodule("3")
        norm.running_mean = norm.running_var = None
        model.eval()
    _compare(stock, fused, [torch.randn(6, 4, dtype=torch.float64)], 1e-9)
    assert len(_networks(fused)) == 1
    assert int(norm.num_batches_tracked) == 0


class _OtherResults(nn.Module):
    """The places of maxima and the weights of an attention, which no network has, are read too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.heads = nn.Linear(6, 6), nn.Linear(6, 6), nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        largest, places = torch.relu(self.a(x)).max(1)
        y = torch.relu(self.b(x))
        attended, weights = self.heads(y, y, y)
        again, _ = self.heads(y, y, y)
        both = torch.relu(self.a(x)).max(1)
        return torch.relu(self.b(largest)), places, attended, weights, again, both.values, both[1]


def test_results_that_no_network_has(passes: set[int]) -> None:
    stock, fused = _pair(_OtherResults)
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    _compare(stock, fused, [x], 1e-8)
    with torch.no_grad():
        assert_close(fused(x), stock(x))


def _largest_whole(m: Any, x: Tensor) -> Any:
    return m.fc(torch.relu(m.body(x))).max(1)


def _heads_whole(m: Any, x: Tensor) -> Any:
    y = torch.relu(m.body(x))
    return {"both": m.heads(y, y, y), "sum": m.fc(y)}


@pytest.mark.parametrize("forward", [_largest_whole, _heads_whole])
def test_pairs_that_are_returned_whole(forward: Callable[..., Any], passes: set[int]) -> None:
    layers = {"heads": nn.MultiheadAttention(6, 2, batch_first=True)} if forward is _heads_whole else {}
    stock, fused = _pair(lambda: By(forward, body=nn.Linear(6, 6), fc=nn.Linear(6, 6), **layers))
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    _compare(stock, fused, [x], 1e-8)
    with torch.no_grad():
        assert_close(fused(x), stock(x))


@pytest.mark.parametrize("form", ["shape[2:]", "sizes", "shape[-2:]"])
@pytest.mark.parametrize("pool", [F.max_pool2d, F.avg_pool2d])
def test_pools_of_images_without_a_batch(pool: Callable[..., Any], form: str) -> None:
    """`x.shape[2:]` of (channels, height, width) is one number, the sides of windows."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.b(torch.relu(m.a(x)))
        if form == "sizes":
            return pool(y, (y.size(2), y.size(3)))
        return pool(y, y.shape[2:] if form == "shape[2:]" else y.shape[-2:])

    stock, fused = _pair(lambda: By(forward, a=nn.Linear(8, 8), b=nn.Linear(8, 8)))
    for sizes in ((2, 3, 4, 8), (2, 16, 8), (2, 1, 2, 4, 8), (4, 8)):
        x = torch.randn(sizes, dtype=torch.float64)
        for context in (torch.no_grad(), torch.enable_grad()):
            with context:
                try:
                    expected = stock(x)
                except (RuntimeError, IndexError):
                    with pytest.raises((RuntimeError, IndexError)):
                        fused(x)
                else:
                    assert_close(fused(x), expected)


def test_a_norm_whose_epsilon_follows_from_the_dtype() -> None:
    stock, fused = _pair(
        lambda: By(lambda m, x: m.norm(x) + m.fc(x), norm=nn.RMSNorm(8), fc=nn.Linear(8, 8)), torch.float32
    )
    x = 1e-4 * torch.randn(3, 8, dtype=torch.float64)
    with torch.no_grad():
        for dtype in (torch.float32, torch.float64, torch.float32):
            assert_close(fused.to(dtype)(x.to(dtype)), stock.to(dtype)(x.to(dtype)))


@torch.no_grad()
def test_a_norm_of_another_size() -> None:
    for norm in (nn.RMSNorm(4, 1e-6, elementwise_affine=False), nn.RMSNorm(1)):
        _, fused = _pair(lambda norm=norm: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), norm, nn.Linear(8, 8)))
        with pytest.raises(RuntimeError):
            fused(torch.randn(3, 8, dtype=torch.float64))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("slopes", [1, 5, 33])
def test_prelu(slopes: int, memory_format: torch.memory_format, threads: int, passes: set[int]) -> None:
    """Enough pixels that several threads sum the slopes' gradients, and channels that do not fill vectors."""
    channels = max(slopes, 3)
    stock, fused = _pair(
        lambda: nn.Sequential(nn.Conv2d(2, channels, 3), nn.PReLU(slopes, -0.3), nn.Conv2d(channels, 2, 1))
    )
    x = torch.randn(2, 2, 37, 41, dtype=torch.float64).to(memory_format=memory_format)
    with using_threads(threads):
        _compare(stock, fused, [x], 1e-9)
        assert len(_networks(fused)) == 1
        x[0, :, 3:9, 4:8], x[1, :, 5, 5] = torch.nan, torch.inf
        with torch.no_grad():
            assert_close(fused(x), stock(x), equal_nan=True)


def test_few_stock_layers_stay_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    _, fused = _pair(lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)))
    fused(torch.randn(6, 4, dtype=torch.float64))
    assert not _networks(fused)


def test_the_raw_operators_are_safe() -> None:
    x, parameters = torch.randn(4, 3), [torch.randn(2, 3), torch.randn(2)]
    text = "fastnn.network 1\ninput -> x\nweight -> w\nweight -> b\nlinear input=x weight=w bias=b -> y\noutput input=y"
    run, forward = torch.ops.fastnn.network_backward, torch.ops.fastnn.network_with_pass

    def arguments() -> list[Any]:
        outputs, number = forward([x], parameters, text)
        return [[torch.ones_like(outputs[0])], number, [x], parameters, [0, 1], False]

    of_x, of_weight = run(*arguments())
    assert_close(of_x, parameters[0].sum(0).expand(4, 3))
    assert_close(of_weight, x.sum(0).expand(2, 3))
    torch.library.opcheck(forward.default, ([x], parameters, text), test_utils=("test_faketensor",))
    for check in ("test_schema", "test_faketensor"):
        torch.library.opcheck(run.default, tuple(arguments()), test_utils=(check,))
    again = arguments()
    assert_close(run(*again), run(*again))
    assert torch.ops.fastnn.network_draws(again[1]) == []
    for place, value in (
        *((0, value) for value in ([], [torch.ones(4, 3)], [torch.ones(4, 2).double()])),
        *((1, value) for value in (torch.tensor([-1]), torch.tensor(1.0))),
        *((2, value) for value in ([], [x, x], [x.double()])),
        *((3, value) for value in ([], parameters[:1], [parameters[1]] * 2, [p.double() for p in parameters])),
        *((4, value) for value in ([-1], [3], [1, 0], [0, 0], [2**62])),
    ):
        bad = arguments()
        bad[place] = value
        with pytest.raises(RuntimeError):
            run(*bad)
    (nothing,) = run([None], *arguments()[1:4], [1], True)
    assert nothing.shape == (0,)
    parameters[0].resize_(3, 3)
    with pytest.raises(RuntimeError):
        run(*again)


@pytest.mark.parametrize("how", ["fuse", "training_step"])
def test_flat_weights_that_a_user_has_changed(how: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(torch.tanh(m.rnn(m.a(x))[0]))

    stock, fused = _pair(lambda: By(forward, a=nn.Linear(4, 4), rnn=nn.GRU(4, 4), b=nn.Linear(4, 4)))
    x, y = torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(3, 5, 4, dtype=torch.float64)
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (stock, fused)]
    step = fastnn.training_step(fused, F.mse_loss, optimizers[1]) if how == "training_step" else None

    def train() -> None:
        for model, optimizer in zip((stock, fused), optimizers, strict=True):
            if model is fused and step is not None:
                step(x, y)
                continue
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
        assert_close(fused.state_dict(), stock.state_dict())

    train()
    own = torch.randn(12, 4, dtype=torch.float64)
    for model in (stock, fused):
        model.rnn._flat_weights[0] = own.clone()  # type: ignore[union-attr]
    train()
    train()


@pytest.mark.parametrize("seed", range(40))
def test_random_models(seed: int) -> None:
    random_models.check(seed)


# ---- inference --------------------------------------------------------------------------------------------------


def _called(model: nn.Module, *inputs: Tensor) -> tuple[Any, list[str]]:
    """What a model gives in inference, and the operators of ours that it has run."""
    model(*inputs)
    return run_and_list(lambda: model(*inputs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("name", "memory_format"), CASES)
@torch.no_grad()
def test_inference(name: str, memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    make, sizes = MODELS[name]
    stock, fused = (model.eval() for model in _pair(make, dtype))
    close = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 2e-3, "atol": 2e-3}
    torch.manual_seed(1)
    for _ in range(3):
        for batch in (sizes[0], 1, sizes[0] + 1):
            x = torch.randn(batch, *sizes[1:], dtype=dtype).to(memory_format=memory_format)
            expected, given = stock(x), x.clone(memory_format=torch.preserve_format)
            assert_close(fused(x), expected, **close)
            assert torch.equal(x, given)
            for one, other in zip(_tensors(fused(x)), _tensors(expected), strict=True):
                assert one.is_contiguous() or not other.is_contiguous()
        for model in (stock, fused):  # in ways that no version counts
            torch.manual_seed(7)
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point():
                    tensor.data.mul_(0.5 + torch.rand(tensor.shape, dtype=dtype))
    with torch.inference_mode():
        assert_close(fused(x), stock(x), **close)


class _Norms(nn.Module):
    """Batch norms behind all that a network folds them into, and behind what it does not."""

    def __init__(self, dims: int, groups: int, bias: bool) -> None:
        super().__init__()
        conv, transposed = getattr(nn, f"Conv{dims}d"), getattr(nn, f"ConvTranspose{dims}d")
        norm, self.pool = getattr(nn, f"BatchNorm{dims}d"), getattr(nn, f"MaxPool{dims}d")(2, 1)
        self.a, self.a_norm = conv(4, 6, 3, padding=1, groups=groups, bias=bias), norm(6)
        self.b, self.b_norm = transposed(6, 8, 3, padding=1, groups=groups, bias=bias), norm(8, affine=False)
        self.c, self.c_norm = conv(8, 8, 1, groups=groups, bias=bias), norm(8, eps=0.3)
        self.d_norm, self.e_norm = norm(8), norm(8)
        self.act = nn.ELU(0.7)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.pool(F.relu(self.a_norm(self.a(x))))
        x = self.act(self.b_norm(self.b(x)))
        y = self.c(x)
        return self.pool(F.relu(self.d_norm(y))), self.e_norm(self.c_norm(y) + x)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [1, 2, 3])
@torch.no_grad()
def test_norms_in_inference(dims: int, groups: int, bias: bool) -> None:
    stock, fused = (model.eval() for model in _pair(lambda: _Norms(dims, groups, bias)))
    x = torch.randn(3, 4, *[5, 6, 7][:dims], dtype=torch.float64)
    for model in (stock, fused):
        torch.manual_seed(3)
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, dtype=torch.float64) + 0.1)
    found, called = _called(fused, x)
    assert called == ["fastnn::network_of_parameters"]
    assert_close(found, stock(x), rtol=1e-9, atol=1e-9)
    for model in (stock, fused):
        model.a_norm.running_var[0], model.d_norm.running_mean[1] = -1.0, torch.inf
    assert_close(fused(x), stock(x), rtol=1e-9, atol=1e-9, equal_nan=True)


@torch.no_grad()
def test_sums_that_broadcast_in_inference() -> None:
    """A convolution adds values of its own size; others it refuses, and then the sum is a layer."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.b(y + y.mean((2, 3), keepdim=True)) + m.c(x)

    layers = {name: nn.Conv2d(inputs, 4, 3, padding=1) for name, inputs in (("a", 3), ("b", 4), ("c", 3))}
    stock, fused = (model.eval() for model in _pair(lambda: By(forward, **layers)))
    for _ in range(3):
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        found, called = _called(fused, x)
        assert called == ["fastnn::network_of_parameters"]
        assert_close(found, stock(x))


@torch.no_grad()
def test_results_that_share_memory_in_inference() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.tanh(m.a(x))
        first, second = m.b(y).chunk(2, 1)
        return y, y[:, 1:], first * second

    stock, fused = (
        model.eval() for model in _pair(lambda: By(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 4)))
    )  # fmt: skip
    results = []
    for model in (stock, fused):
        torch.manual_seed(0)
        whole, part, rest = model(torch.randn(3, 4, dtype=torch.float64))
        part.zero_()
        results.append((whole, part, rest))
    assert_close(*results)


@torch.no_grad()
def test_training_mode_without_gradients() -> None:
    """Dropout draws and batch norms count as in stock."""
    make: Callable[[], nn.Module] = lambda: nn.Sequential(  # noqa: E731
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(64, 5), nn.Dropout()
    )
    stock, fused = _pair(make)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    results = []
    for model in (stock, fused):
        torch.manual_seed(4)
        results.append((model(x), model(x), torch.rand(2)))
    assert_close(*results)
    assert_close(fused.state_dict(), stock.state_dict())


@torch.no_grad()
def test_what_inference_refuses_runs_layer_by_layer() -> None:
    stock, fused = (model.eval() for model in _pair(_two_layers, torch.float32))
    for x in (torch.randn(6, 4), torch.randn(0, 4), torch.randn(4, 6).t(), torch.randn(2, 6, 4)[1]):
        assert_close(fused(x), stock(x))
    for bad in (torch.randn(6, 5), torch.randn(6, 4).double(), torch.randn(())):
        words = []
        for model in (stock, fused):
            with pytest.raises(RuntimeError) as raised:
                model(bad)
            words.append(str(raised.value))
        assert words[0] == words[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(fused(x), stock(x), rtol=2e-2, atol=2e-2)
    for model in (stock, fused):
        model.bfloat16()
    assert_close(fused(x.bfloat16()), stock(x.bfloat16()), rtol=2e-2, atol=2e-2)


def test_a_stale_trace_is_not_read() -> None:
    """A module that has changed since it was traced is traced anew before its stretches are read."""

    def swap(model: Any) -> None:
        model[0], model[4] = model[4], model[0]

    make: Callable[[], nn.Module] = lambda: nn.Sequential(  # noqa: E731
        nn.Linear(8, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8)
    )
    stock, fused = (model.eval() for model in _pair(make))
    x = torch.randn(3, 8, dtype=torch.float64)
    with torch.no_grad():
        assert_close(fused(x), stock(x))
    for model in (stock, fused):
        swap(model)
    for _ in range(2):
        _compare(stock, fused, [x], 1e-9)
        with torch.no_grad():
            assert_close(fused(x), stock(x))


@torch.no_grad()
def test_wrong_inputs_do_not_count_as_refusals() -> None:
    _, fused = _pair(_two_layers)
    fused.eval()
    for _ in range(5):
        with pytest.raises(RuntimeError):
            fused(torch.randn(6, 5, dtype=torch.float64))
    _, called = _called(fused, torch.randn(6, 4, dtype=torch.float64))
    assert called == ["fastnn::network_of_parameters"]


class _Computed(nn.Module):
    """Weights that torch computes at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = weight_norm(nn.Conv1d(3, 8, 3, padding=1)), weight_norm(nn.Conv1d(8, 8, 3, padding=2))
        self.norm, self.c, self.d = nn.BatchNorm1d(8), weight_norm(nn.Linear(8, 4)), orthogonal(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(F.relu(self.a(x)[:, :, 1:]), 0.2, self.training)
        y = F.dropout(torch.tanh(self.norm(self.b(y))), 0.2, self.training)
        return self.d(F.relu(self.c(y[:, :, -1])))


def test_parameters_that_are_computed(passes: set[int]) -> None:
    stock, fused = _pair(_Computed)
    inputs = [torch.randn(4, 3, 20, dtype=torch.float64)]
    for twice in (False, True):
        _compare(stock, fused, inputs, 1e-8, twice)
    assert len(_networks(fused)) == 1
    with torch.no_grad():
        for model in (stock, fused):
            model.eval()
            for parameter in model.parameters():
                parameter.data.mul_(1.3)
        found, called = _called(fused, *inputs)
        assert called == ["fastnn::network_of_parameters"]
        assert_close(found, stock(*inputs))
    _compare(stock, fused, inputs, 1e-9)


class _Causal(nn.Module):
    """Causal convolutions in the two ways that people write them, and a gate of two halves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 8, 3, padding=4, dilation=2), nn.Conv1d(8, 16, 2, dilation=3)
        self.third = nn.Conv2d(1, 4, 3, stride=2, padding=(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x)[:, :, :-4].contiguous())
        value, gate = self.second(F.pad(y, (3, 0))).chunk(2, 1)
        y = torch.tanh(value) * torch.sigmoid(gate)
        z = F.relu6(self.third(F.pad(y.unsqueeze(1), (0, 1, 2, 0)))[..., :-1, :])
        return torch.cat([z.flatten(1), F.glu(y, 1).flatten(1), self.first(x)[:, :, 1:-2].flatten(1)], 1)


@pytest.mark.parametrize("how", ["fuse", "freeze"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_causal_models_in_inference(how: str, dtype: torch.dtype) -> None:
    stock = _Causal().to(dtype).eval()
    x = torch.randn(2, 3, 30, dtype=dtype)
    model: Any = fastnn.fuse(copy.deepcopy(stock)) if how == "fuse" else fastnn.freeze(copy.deepcopy(stock), (x,))
    limit = 1e-5 if dtype == torch.float32 else 1e-12
    with torch.no_grad():
        for given in (x, x, torch.randn(3, 3, 30, dtype=dtype)):
            assert_close(model(given), stock(given), rtol=limit, atol=limit)
        if how == "fuse":
            assert_close(model(x[:, :, :7]), stock(x[:, :, :7]), rtol=limit, atol=limit)
            (program,) = _networks(model, trains=False)
        else:
            program = str(model)
    lines = [line.split() for line in program.split("\n")]
    assert not any(words and words[0] in ("pad", "contiguous", "activation") for words in lines)
    assert "crop=4" in program
    assert "padding_end=0" in program
    assert "input_activation=tanh other_activation=sigmoid" in program


class _Ends(nn.Module):
    """Convolutions of several dimensions that are padded on one side, and cut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.wide = nn.Conv2d(3, 8, 3), nn.Conv2d(64, 64, 3, padding=1)
        self.mixed, self.deep = nn.Conv2d(3, 4, 3, (1, 2)), nn.Conv3d(2, 4, 3, padding=(0, 1, 1))
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor, wide: Tensor, deep: Tensor) -> list[Tensor]:
        return [
            F.relu(self.conv(F.pad(x, (2, 0)))),
            F.relu(self.conv(F.pad(x, (0, 1, 2, 0)))),
            F.relu(self.conv(x))[:, :, :-1, :],
            F.relu(self.conv(x)[..., :-2]),
            F.relu(self.conv(x))[:, :-3],
            self.pool(F.relu(self.conv(x)[:, :, :-1])),
            self.wide(F.pad(wide, (1, 0)))[:, :, :-2],
            F.relu(self.mixed(F.pad(x, (1, 0)))),
            F.relu(self.deep(F.pad(deep, (1, 0))))[:, :-1],
            F.relu(self.deep(deep))[:, :, :, :-1],
        ]


@pytest.mark.parametrize("how", ["fuse", "freeze"])
def test_ends_of_several_dimensions(how: str) -> None:
    stock = _Ends().double().eval()
    inputs = [torch.randn(2, 3, 12, 13), torch.randn(1, 64, 9, 10), torch.randn(1, 2, 5, 6, 7)]
    inputs = [x.double() for x in inputs]
    model: Any = copy.deepcopy(stock)
    model = fastnn.fuse(model) if how == "fuse" else fastnn.freeze(model, tuple(inputs))
    with torch.no_grad():
        for _ in range(2):
            for found, wanted in zip(model(*inputs), stock(*inputs), strict=True):
                assert_close(found, wanted, rtol=1e-12, atol=1e-12)


class Unused(nn.Module):
    """A layer whose result only says its size."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(8, 8), layer, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        F.dropout(h, 0.5, self.training)
        for size in self.layer(h).shape:
            h = h * size / 8
        return F.dropout(torch.relu(self.last(h)), 0.5, self.training)


@pytest.mark.parametrize(
    "make", [lambda: torch.nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), lambda: nn.Dropout(0.3)]
)
def test_a_layer_runs_although_nobody_takes_its_result(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = Unused(make()), torch.randn(3, 8)
    fused = fastnn.fuse(copy.deepcopy(model))
    results = []
    for own in (model, fused):
        torch.manual_seed(1)
        results.append((own(x), torch.get_rng_state(), list(own.buffers())))
    assert_close(results[1], results[0])


class SharedNorms(nn.Module):
    """A batch norm is called twice, and between the calls another one that has memory in common with it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        first, second = (nn.BatchNorm1d(6, momentum=momentum) for momentum in (0.5, 0.6))
        if kind == "a dict":
            second._buffers = first._buffers
        elif kind == "both, and one reads":
            second.eval()
            second.running_mean, second.running_var = first.running_mean, first.running_var
        elif kind == "the mean":
            second.running_mean = first.running_mean
        elif kind == "the variance":
            second.running_var = first.running_var
        elif kind == "a view":
            second.running_mean = first.running_mean[:]
        self.norms = nn.ModuleList([first, first if kind == "a module" else second])

    def forward(self, x: Tensor) -> Tensor:
        first, other, last = (layer(x) for layer in self.layers)
        return self.norms[0](first.cumsum(0)) + self.norms[1](torch.relu(other)) + self.norms[0](last)


@pytest.mark.parametrize("kind", ["a dict", "a module", "both, and one reads", "the mean", "the variance", "a view"])
def test_norms_that_share_statistics(kind: str) -> None:
    torch.manual_seed(0)
    model, x, target = SharedNorms(kind), torch.randn(7, 6), torch.randn(7, 6)
    fused, trained = fastnn.fuse(copy.deepcopy(model)), copy.deepcopy(model)
    step = fastnn.training_step(trained, nn.MSELoss(), torch.optim.SGD(trained.parameters(), lr=0.0))
    for _ in range(2):
        wanted = model(x)
        assert_close(fused(x), wanted)
        assert_close(step(x, target), F.mse_loss(wanted, target).detach())
    for own in (fused, trained):
        assert_close(dict(own.named_buffers()), dict(model.named_buffers()))


class Towers(nn.Module):
    """The same tower twice, where torch runs something between the first call's layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(8, momentum=0.3), nn.Linear(8, 4)

    def tower(self, x: Tensor, between: Callable[[Tensor], Tensor]) -> Tensor:
        x = torch.relu(self.norm(between(self.first(x))))
        x = F.max_pool2d(torch.relu(self.norm(self.second(x))), 2)
        return self.head(x.mean((2, 3)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.tower(x, lambda h: h.cumsum(2)) - self.tower(y, lambda h: h)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_norm_of_several_calls_averages_in_their_order(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    model, x, y = Towers(), torch.randn(5, 3, 9, 7), torch.randn(5, 3, 9, 7) + 3
    fused, results = fastnn.fuse(copy.deepcopy(model)), []
    for own in (model, fused):
        for _ in range(2):
            given = [one.to(memory_format=layout).requires_grad_() for one in (x.clone(), y.clone())]
            output = own(*given)
            gradients = torch.autograd.grad(output.square().sum(), [*given, *own.parameters()])
            results.append((output, gradients, {name: one.clone() for name, one in own.named_buffers()}))
    assert "one function" in str(fastnn.explain(fused))
    for wanted, got in zip(results[:2], results[2:], strict=True):
        assert_close(got, wanted, rtol=1e-4, atol=1e-4)


class SkipBlock(nn.Module):
    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        return torch.tanh(h + self.second(h)) * h


def test_a_gradient_without_memory() -> None:
    """The gradient of torch.sgn, and of what it is computed from, has no memory, because it is zero everywhere."""
    torch.manual_seed(0)
    model, x, target = SkipBlock(), torch.randn(4, 6), torch.randn(4, 6)
    fused = fastnn.fuse(copy.deepcopy(model))
    for own in (model, fused):
        gradients = torch.autograd.grad(own(x).sgn().sum(), list(own.parameters()))
        assert all((gradient == 0).all() for gradient in gradients)
    assert "one function" in str(fastnn.explain(fused))
    step = fastnn.training_step(model, lambda y, t: (y.sgn() - t).sum(), torch.optim.SGD(model.parameters(), lr=1.0))
    before = copy.deepcopy(model.state_dict())
    step(x, target)
    assert "two operator calls" in step.explain()
    assert_close(model.state_dict(), before)


def test_a_gradient_whose_sign_is_turned_lazily() -> None:
    torch.manual_seed(0)
    model, x = SkipBlock(1), torch.randn(1, 1)
    gradient = torch.randn(1, 1, dtype=torch.cfloat).conj().imag
    assert gradient.is_neg()
    fused = fastnn.fuse(copy.deepcopy(model))
    results = [torch.autograd.grad(own(x), list(own.parameters()), gradient) for own in (model, fused)]
    assert "one function" in str(fastnn.explain(fused))
    assert_close(results[1], results[0])


@pytest.mark.filterwarnings("ignore")  # of torch's own functions, about their arguments
def test_functions_of_torch_on_upstreams_samples() -> None:
    networks = []
    for name, info, sample in upstream_samples.samples(every=24, most=4):
        try:
            networks.append(upstream_samples.check(info, sample))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    assert sum(networks) > 0.7 * len(networks)


@pytest.mark.parametrize("records", [True, False])
def test_a_result_that_repeats_another(records: bool) -> None:
    """It shares the other's memory, as in stock, and cannot be changed in place."""

    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.b(torch.tanh(m.a(x)))
        return y, y[:, None].expand(-1, 2, -1)

    stock, fused = _pair(lambda: By(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 4)))
    results = []
    for model in (stock, fused):
        torch.manual_seed(0)
        with torch.set_grad_enabled(records):
            y, repeated = model(torch.randn(3, 4, dtype=torch.float64))
        with torch.no_grad():
            y.add_(1)
            with pytest.raises(RuntimeError, match="single memory location"):
                repeated.add_(1)
        results.append((y, repeated, repeated.stride()))
    assert_close(*results)


def test_an_inference_tensor_changes_no_statistics() -> None:
    """Autograd refuses it before batch norms have seen it."""
    models = _pair(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
                              nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    )  # fmt: skip
    with torch.inference_mode():
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for model in models:
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            model(x)
    assert_close(models[1].state_dict(), models[0].state_dict())


def _outcome(call: Callable[[], Any]) -> Any:
    """What a call gives, or what it raises."""
    try:
        return call()
    except (IndexError, RuntimeError, ValueError) as error:
        return type(error), str(error)


def _assert_as_stock(stock: nn.Module, fused: nn.Module, *inputs: Tensor) -> None:
    """Both models give the same, or raise the same, where gradients are recorded and where they are not."""
    for records in (False, True):
        with torch.set_grad_enabled(records):
            expected, found = (_outcome(lambda model=model: model(*inputs)) for model in (stock, fused))
        if isinstance(expected, Tensor):
            assert_close(found, expected)
        else:
            assert found == expected


def _conv(dims: int) -> nn.Module:
    return getattr(nn, f"Conv{dims}d")(3, 4, 3, padding=1)


# Layers of other dimensions than those before them: torch takes the channels for a dimension, or raises.
_OTHER_DIMENSIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Conv1d, MaxPool2d": (lambda: nn.Sequential(_conv(1), nn.MaxPool2d(2)), (2, 3, 12)),
    "Conv1d, ReLU, MaxPool2d": (lambda: nn.Sequential(_conv(1), nn.ReLU(), nn.MaxPool2d(2)), (2, 3, 12)),
    "of the same sizes": (lambda: nn.Sequential(_conv(1), nn.ReLU(), nn.MaxPool2d(3, 1, 1)), (2, 3, 12)),
    "Conv2d, ReLU, MaxPool3d": (lambda: nn.Sequential(_conv(2), nn.ReLU(), nn.MaxPool3d((2, 1, 1))), (2, 3, 6, 6)),
    "Conv2d, ReLU, MaxPool1d": (lambda: nn.Sequential(_conv(2), nn.ReLU(), nn.MaxPool1d(2)), (2, 3, 6, 6)),
    "Conv1d, BatchNorm1d, ReLU, MaxPool2d": (
        lambda: nn.Sequential(_conv(1), nn.BatchNorm1d(4), nn.ReLU(), nn.MaxPool2d(2)),
        (2, 3, 12),
    ),
    "Conv1d, BatchNorm2d, ReLU": (lambda: nn.Sequential(_conv(1), nn.BatchNorm2d(4), nn.ReLU()), (2, 3, 12)),
    "Conv1d, BatchNorm2d": (lambda: nn.Sequential(_conv(1), nn.BatchNorm2d(4), nn.Tanh()), (2, 3, 12)),
    **{
        f"{kind}{dims}d of {len(sizes)} dimensions": (
            lambda kind=kind, dims=dims: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), getattr(nn, f"{kind}{dims}d")(1)),
            sizes,
        )
        for kind in ("AdaptiveMaxPool", "AdaptiveAvgPool")
        for dims in (1, 2, 3)
        for sizes in ((8,), (4, 8), (2, 4, 8), (2, 3, 4, 8), (2, 2, 3, 4, 8), (2, 2, 2, 3, 4, 8))
    },
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", _OTHER_DIMENSIONS)
def test_layers_of_other_dimensions(name: str, training: bool) -> None:
    make, sizes = _OTHER_DIMENSIONS[name]
    stock, fused = (model.train(training) for model in _pair(make))
    _assert_as_stock(stock, fused, torch.randn(sizes, dtype=torch.float64))


# A function of two linear layers, a norm or none, and sizes that torch refuses, but for the last.
_REFUSED: dict[str, tuple[Callable[..., Any], nn.Module, list[tuple[int, ...]]]] = {
    "glu": (lambda m, x: F.glu(m.a(torch.tanh(x)), dim=1), nn.Identity(), [(2, 3, 8), (2, 1, 8), (2, 5, 8), (2, 4, 8)]),
    "bmm": (lambda m, x: torch.bmm(m.a(x), m.b(x[:1]).mT), nn.Identity(), [(3, 2, 8), (1, 2, 8)]),
    "expands first": (lambda m, x: _gated(m, x, 0), nn.Identity(), [(3, 8), (3, 3, 8), (3, 1, 8)]),
    "expands second": (lambda m, x: _gated(m, x, 1), nn.Identity(), [(3, 8), (3, 3, 8), (3, 1, 8)]),
    "LayerNorm(8)": (lambda m, x: torch.tanh(m.n(torch.tanh(x))), nn.LayerNorm(8), [(3, 2, 4), (3, 1), (3, 8)]),
    "LayerNorm(4, 8)": (
        lambda m, x: torch.tanh(m.n(torch.tanh(x))),
        nn.LayerNorm((4, 8)),
        [(3, 32), (3, 8, 4), (4, 8)],
    ),
    "layer_norm": (
        lambda m, x: torch.tanh(F.layer_norm(torch.tanh(x), (4, 8))),
        nn.Identity(),
        [(3, 4, 8), (3, 32), (3, 8, 4)],
    ),
}


def _gated(m: Any, x: Tensor, place: int) -> Tensor:
    """A difference whose operand at `place` is expanded to the sizes of the other, which has one column."""
    wide, narrow = m.a(x), torch.sigmoid(m.b(x)).narrow(1, 0, 1)
    return wide.expand_as(narrow) - narrow if place == 0 else narrow - wide.expand_as(narrow)


@pytest.mark.parametrize("name", _REFUSED)
def test_sizes_that_torch_refuses(name: str) -> None:
    forward, norm, every = _REFUSED[name]
    stock, fused = _pair(lambda: By(forward, a=nn.Linear(8, 8), b=nn.Linear(8, 8), n=norm))
    for sizes in every:
        _assert_as_stock(stock, fused, torch.randn(sizes, dtype=torch.float64))


@pytest.mark.parametrize("place", [0, 1])
def test_a_difference_of_what_is_expanded(place: int) -> None:
    """An operand that is expanded stays where it is."""

    def forward(m: Any, x: Tensor) -> Tensor:
        wide, narrow = m.a(x), torch.sigmoid(m.b(x))[:, :1]
        return narrow.expand_as(wide) - wide if place == 0 else wide - narrow.expand_as(wide)

    stock, fused = _pair(lambda: By(forward, a=nn.Linear(8, 8), b=nn.Linear(8, 8)))
    x = torch.randn(3, 8, dtype=torch.float64)
    _compare(stock, fused, [x], 1e-9)
    with torch.no_grad():
        found, called = _called(fused, x)
        assert_close(found, stock(x))
    assert called == ["fastnn::network_of_parameters"]


# The sizes of a state of zeros in front of its features, and whether they are right for a batch of three.
_ZEROS: dict[str, tuple[Callable[[Tensor], tuple[int, ...]], bool]] = {
    "x.shape[0]": (lambda x: (1, x.shape[0]), True),
    "x.size(0)": (lambda x: (1, x.size(0)), True),
    "three": (lambda x: (1, 3), True),
    "four": (lambda x: (1, 4), False),
    "one": (lambda x: (1, 1), False),
    "steps": (lambda x: (1, x.size(1)), False),
    "two layers": (lambda x: (2, x.size(0)), False),
    "no batch": (lambda x: (1,), False),
}


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("cell", [False, True])
@pytest.mark.parametrize("name", _ZEROS)
def test_states_of_zeros(name: str, cell: bool, kind: str) -> None:
    """States of zeros are left out where their sizes are right, and refused in stock's words where they are not."""
    sizes_of, is_right = _ZEROS[name]

    def forward(m: Any, x: Tensor) -> Tensor:
        sizes = sizes_of(x)[1:] if cell else sizes_of(x)
        h = torch.zeros(*sizes, 6, dtype=x.dtype)
        state = (h, torch.zeros(*sizes, 6, dtype=x.dtype)) if kind == "LSTM" else h
        y = m.rnn(torch.tanh(x[:, 0] if cell else x), state)
        y = y if cell and kind != "LSTM" else y[0]
        return torch.tanh(m.fc(y if cell else y[:, -1]))

    def make() -> nn.Module:
        rnn = getattr(nn, f"{kind}Cell")(8, 6) if cell else getattr(nn, kind)(8, 6, batch_first=True)
        return By(forward, rnn=rnn, fc=nn.Linear(6, 2))

    stock, fused = _pair(make)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    _assert_as_stock(stock, fused, x)
    is_right = is_right or (cell and name == "two layers")
    assert (type(_outcome(lambda: stock(x))) is Tensor) == is_right
    if is_right:
        with torch.no_grad():
            assert _called(fused, x)[1] == ["fastnn::network_of_parameters"]
            (program,) = _networks(fused, trains=False)
            assert "full" not in program
    else:
        model = make().double()
        step = fastnn.training_step(model, F.mse_loss, torch.optim.SGD(model.parameters()))
        with pytest.raises((RuntimeError, ValueError)) as raised:
            step(x, torch.zeros(3, 2, dtype=torch.float64))
        assert _outcome(lambda: stock(x)) == (raised.type, str(raised.value))
