"""Models that are alike have one trace, and one that differs in anything that a trace may rest on has its own."""

import copy
import gc
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import fastnn
from fastnn import models
from fastnn.graph import alike
from fastnn.graph import forward as forwards
from fastnn.graph.alike import Parts
from fastnn.reference import models as reference

FACTOR = 2.0
# The models' gains make rounding errors of float32 larger than what is compared here.
pytestmark = pytest.mark.usefixtures("float64_by_default")


class Net(nn.Module):
    """Layers and settings of all kinds that a forward may read."""

    GAIN = 1.0

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, hidden), nn.Linear(hidden, 8)
        self.act: Any = nn.ReLU()
        self.norm, self.drop = nn.LayerNorm(8), nn.Dropout(0.0)
        self.function: Any = F.relu
        self.scale: Any = 1.0
        self.flag = False
        self.sizes, self.table, self.pair = [1.0, 2.0], {"k": 1.0, "l": 2.0}, (1.0, [2.0])
        self.register_buffer("shift", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.act(self.first(x)))
        h = self.norm(self.drop(h)) * self.scale + self.shift
        for size in self.sizes:
            h = h * size
        for name, value in self.table.items():
            h = h + value if name == "k" else h * value
        if self.flag:
            h = self.function(h)
        return h * FACTOR * self.GAIN + self.pair[0]


class Other(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Twice(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def net(**settings: Any) -> Net:
    torch.manual_seed(0)
    return Net(**settings)


def program_of(model: nn.Module) -> Any:
    return model.__dict__["forward"].trace(now=True)


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules that are traced."""
    traced: list[nn.Module] = []
    trace = forwards.trace

    def noting(module: nn.Module, *inputs: Any) -> Any:
        traced.append(module)
        return trace(module, *inputs)

    monkeypatch.setattr(forwards, "trace", noting)
    monkeypatch.setattr(alike, "_kinds", OrderedDict())  # nothing is kept as yet
    return traced


def check(model: nn.Module, stock: nn.Module) -> None:
    """That a fused model computes what a stock model does, in inference and in training."""
    x, target = torch.randn(4, 8), torch.randn(4, 8)
    for mode in (True, False):
        model.train(mode), stock.train(mode)
        assert_close(model(x), stock(x))
        with torch.no_grad():
            assert_close(model(x), stock(x))
    model.train(), stock.train()
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (model, stock)]
    loss = fastnn.training_step(model, F.mse_loss, optimizers[0])(x, target)
    expected = F.mse_loss(stock(x), target)
    expected.backward()
    optimizers[1].step()
    assert_close(loss, expected.detach())
    for ours, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("kind", [models, reference], ids=["fastnn", "reference"])
@pytest.mark.parametrize("name", ["conv", "rnn", "autoencoder"])
def test_the_second_model_is_not_traced(kind: Any, name: str, traces: list[nn.Module]) -> None:
    make = {
        "conv": lambda: kind.Conv2DNet(4),
        "rnn": lambda: kind.RNN(10, 12, 2, 5),
        "autoencoder": lambda: kind.Autoencoder(10, 8, 5),
    }[name]
    x = torch.randn({"conv": (4, 3, 20, 20), "rnn": (4, 7, 10), "autoencoder": (4, 10)}[name])
    made = []
    for number in range(3):
        torch.manual_seed(number)
        model = make()
        stock = fastnn.unfuse(copy.deepcopy(model))
        target = torch.randn_like(stock(x))
        optimizers = [torch.optim.Adam(one.parameters()) for one in (model, stock)]
        step = fastnn.training_step(model, F.mse_loss, optimizers[0], strict=True)
        for _ in range(3):
            expected = F.mse_loss(stock(x), target)
            optimizers[1].zero_grad()
            expected.backward()
            optimizers[1].step()
            assert_close(step(x, target), expected.detach())
        assert_close(model(x), stock(x), rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            assert_close(model.eval()(x), stock.eval()(x), rtol=1e-4, atol=1e-5)
        made.append(model)
    assert len(traces) == 2  # in training and in inference
    assert len({str(fastnn.explain(model, x)) for model in made}) == 1


def test_models_of_other_sizes_have_the_same_trace(traces: list[nn.Module]) -> None:
    for hidden in (16, 12, 16, 4):
        check(fastnn.fuse(net(hidden=hidden)), net(hidden=hidden))
    assert len(traces) == 2  # in training and in inference
    for hidden in (3, 7):
        model = reference.RNN(10, hidden, 2, 5)
        stock, x = copy.deepcopy(model), torch.randn(2, 7, 10)
        assert_close(fastnn.fuse(model)(x), stock(x))
    assert len(traces) == 3


def test_a_layer_that_stays_stock_in_one_model_is_fused_in_the_next() -> None:
    def blocks(mode: str) -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, padding_mode=mode), nn.ReLU(), nn.MaxPool2d(2))

    x = torch.randn(2, 1, 8, 8)
    for mode, fused in (("reflect", "1, 2"), ("zeros", "0, 1, 2"), ("reflect", "1, 2")):
        model = blocks(mode)
        stock = copy.deepcopy(model)
        assert_close(fastnn.fuse(model)(x), stock(x))
        assert [call.layer for call in fastnn.explain(model, x).calls] == [fused]


def _tie(m: Any) -> None:
    m.first, m.second = nn.Linear(8, 8), nn.Linear(8, 8)
    m.second.weight = m.first.weight


def _reorder(m: Any) -> None:
    m.table = {"l": 2.0, "k": 1.0}


def _own_forward(m: Any) -> None:
    m.forward = lambda x: 3 * type(m).forward(m, x)


def _layers_forward(m: Any) -> None:
    m.second.forward = lambda x: 3 * F.linear(x, m.second.weight)


EDITS: dict[str, Callable[[Any], Any]] = {
    "other sizes": lambda m: m.__init__(hidden=12),
    "another activation": lambda m: setattr(m, "act", nn.Tanh()),
    "a setting of the activation": lambda m: setattr(m, "act", nn.LeakyReLU(0.3)),
    "another setting of the activation": lambda m: setattr(m, "act", nn.LeakyReLU(0.4)),
    "another layer": lambda m: setattr(m, "second", Twice(16, 8)),
    "no bias": lambda m: setattr(m, "first", nn.Linear(8, 16, bias=False)),
    "a flag": lambda m: setattr(m, "flag", True),
    "a number": lambda m: setattr(m, "scale", 3.0),
    "a whole number": lambda m: setattr(m, "scale", 1),
    "True": lambda m: setattr(m, "scale", True),
    "a zero": lambda m: setattr(m, "scale", 0.0),
    "a zero's sign": lambda m: setattr(m, "scale", -0.0),
    "a tensor": lambda m: setattr(m, "scale", torch.tensor(3.0)),
    "an item of a list": lambda m: m.sizes.__setitem__(0, 3.0),
    "a longer list": lambda m: m.sizes.append(3.0),
    "an item of a dict": lambda m: m.table.update(k=3.0),
    "a dict's order": _reorder,
    "an item of a tuple": lambda m: setattr(m, "pair", (3.0, [2.0])),
    "a deep item": lambda m: setattr(m, "pair", (1.0, [3.0])),
    "one list twice": lambda m: setattr(m, "more", m.pair[1]),
    "another function": lambda m: (setattr(m, "flag", True), setattr(m, "function", torch.tanh)),
    "a function of its own": lambda m: (setattr(m, "flag", True), setattr(m, "function", lambda h: h * m.scale)),
    "a hook": lambda m: m.second.register_forward_hook(lambda layer, args, result: 3 * result),
    "a pre-hook": lambda m: m.first.register_forward_pre_hook(lambda layer, args: (3 * args[0],)),
    "a hook of its own": lambda m: m.register_forward_hook(lambda layer, args, result: 3 * result),
    "a layer's forward": _layers_forward,
    "a forward of its own": _own_forward,
    "a probability": lambda m: setattr(m.drop, "p", 1.0),
    "a layer in eval mode": lambda m: (setattr(m.drop, "p", 1.0), m.drop.eval()),
    "tied weights": _tie,
    "one layer twice": lambda m: (setattr(m, "first", nn.Linear(8, 8)), setattr(m, "second", m.first)),
    "a buffer that is a parameter": lambda m: (delattr(m, "shift"), setattr(m, "shift", nn.Parameter(torch.ones(8)))),
    "a parametrization": lambda m: nn.utils.parametrizations.weight_norm(m.second),
    "another class": lambda m: setattr(m, "__class__", Other),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_model_that_differs_has_its_own_trace(name: str) -> None:
    for _ in range(2):
        first = net()
        check(fastnn.fuse(copy.deepcopy(first)), first)
    model = net()
    EDITS[name](model)
    torch.manual_seed(1)
    stock = net()
    EDITS[name](stock)
    stock.load_state_dict(model.state_dict())
    assert Parts(model).key is None or Parts(model).key != Parts(net()).key
    check(fastnn.fuse(model), stock)


def test_equal_models_have_equal_keys() -> None:
    torch.manual_seed(0)
    assert Parts(Net()).key == Parts(Net()).key is not None


CHANGES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a global": lambda patch: patch.setitem(globals(), "FACTOR", 5.0),
    "a class's forward": lambda patch: patch.setattr(Net, "forward", lambda self, x: self.second(self.first(x))),
    "a class's attribute": lambda patch: patch.setattr(Net, "GAIN", 3.0),
    "torch's forward": lambda patch: patch.setattr(nn.ReLU, "forward", lambda self, x: x.clamp(-1.0, 1.0)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_no_model_holds_is_compared(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(fastnn.fuse(net()), net())
    CHANGES[name](monkeypatch)
    check(fastnn.fuse(net()), net())


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x))
        return h * 2 if self.a == CHOSEN[0] else h


CHOSEN: list[Any] = [None]


def test_a_part_of_one_model_that_others_see(monkeypatch: pytest.MonkeyPatch) -> None:
    """A global list holds a layer of the first model, and the forward asks whether it is the model's own."""
    first, second = Reads(), Reads()
    monkeypatch.setitem(globals(), "CHOSEN", [first.a])
    x = torch.randn(2, 8)
    for model, factor in ((first, 2), (second, 1)):
        assert_close(fastnn.fuse(model)(x), factor * model.b(model.a(x)))


def test_tensors_of_other_sizes_after_the_trace() -> None:
    """The trace still holds, what was read of sizes does not."""
    for _ in range(2):
        model = net()
        fastnn.fuse(model)(torch.randn(4, 8))
        model.first.weight, model.first.bias = nn.Parameter(torch.randn(12, 8)), nn.Parameter(torch.randn(12))
        model.second.weight = nn.Parameter(torch.randn(8, 12))
        check(model, fastnn.unfuse(copy.deepcopy(model)))


def test_what_is_kept_holds_no_model() -> None:
    gone = []
    for make in (lambda: models.RNN(10, 12, 2, 5), lambda: reference.RNN(10, 12, 2, 5)):
        model = make()
        gone += [weakref.ref(model), weakref.ref(next(model.parameters()))]
        x = torch.randn(4, 7, 10)
        step = fastnn.training_step(model, F.mse_loss, torch.optim.Adam(model.parameters()))
        step(x, torch.randn(4, 5))
        model(x), model.eval()(x), fastnn.explain(model, x)
        assert program_of(model).kind is not None
        del model, step
    gc.collect()
    assert [one() for one in gone] == [None] * 4


def test_models_of_many_kinds_are_not_kept() -> None:
    for hidden in range(1, 2 * alike._MOST_KEPT):
        fastnn.fuse(net(hidden=hidden))(torch.randn(2, 8))
        assert len(alike._kinds) <= alike._MOST_KEPT


def test_threads_that_make_steps_of_models_alike() -> None:
    x, target = torch.randn(4, 8), torch.randn(4, 8)
    stock = net()
    expected = F.mse_loss(stock(x), target).detach()
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                model = Net()
                model.load_state_dict(stock.state_dict())
                step = fastnn.training_step(model, F.mse_loss, torch.optim.SGD(model.parameters(), lr=0.1))
                assert_close(step(x, target), expected)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
