"""What a trace of a forward rests on: what each fault that was found in it has become. (tests/test_semantics.py draws
forwards at random.)"""

import copy
import enum
import functools
import gc
import random
import threading
import time
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fusing import fused_copy
from torch import Tensor, nn
from torch.testing import assert_close

import fastnn
from fastnn.graph.forward import FusedForward


class Chain(nn.Module):
    """Two linear layers, and a number or a tensor that `read` gives."""

    LIMIT = 1.0

    def __init__(self, read: Callable[[Any], Any] = lambda self: 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)
        self.drop, self.child = nn.Dropout(0.0), nn.Module()
        self.child.on, self._on, self.flag, self.items = False, False, False, [1.0, 2.0]
        self.config = types.SimpleNamespace(k=1.0, deep=types.SimpleNamespace(k=1.0))
        self.table, self.pair = {"k": 1.0}, (1, [2])
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.ReLU()])
        self.array, self.generator, self.mode = np.array([1.0, 2.0]), random.Random(0), Mode.A
        self.scale, self.function = np.float64(1.0), functools.partial(scaled, by=1.0)
        self.register_buffer("mask", None)
        self.register_buffer("total", torch.tensor(1.0))
        self.read = read

    @property
    def doubled(self) -> float:
        return 2 * self.config.k

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(torch.relu(self.a(x)))
        for layer in self.layers:
            h = layer(h)
        return h * self.read(self)


class Mode(enum.Enum):
    A = 1.0
    B = 3.0

    def factor(self) -> float:
        return FACTORS["k"] * self.value


FACTORS = {"k": 1.0}


def scaled(value: float, by: float = 1.0, *, plus: float = 0.0) -> float:
    return value * by + plus


def rows() -> Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def is_traced(model: nn.Module) -> bool:
    forward = model.__dict__["forward"]
    assert isinstance(forward, FusedForward)
    return bool(forward.traces[model.training]) and forward.why is None


Change = Callable[[Any], Any]
# What is read, how it changes, and whether such a forward is traced.
READS: dict[str, tuple[Callable[[Any], Any], Change, bool]] = {
    "an attribute with an underscore": (lambda s: 2.0 if s._on else 1.0, lambda m: setattr(m, "_on", True), True),
    "a dict": (lambda s: s.table["k"], lambda m: m.table.update(k=3.0), True),
    "a list": (lambda s: s.items[1], lambda m: m.items.__setitem__(1, 5.0), True),
    "a list's length": (lambda s: len(s.items), lambda m: m.items.append(0.0), True),
    "a list within a tuple": (lambda s: s.pair[1][0], lambda m: m.pair[1].__setitem__(0, 7), True),
    "a config object": (lambda s: s.config.deep.k, lambda m: setattr(m.config.deep, "k", 4.0), True),
    "a property": (lambda s: s.doubled, lambda m: setattr(m.config, "k", 4.0), True),
    "a child's attribute": (lambda s: 2.0 if s.child.on else 1.0, lambda m: setattr(m.child, "on", True), True),
    "a child's mode": (lambda s: 2.0 if s.a.training else 1.0, lambda m: m.a.eval(), True),
    "a setting of a child": (lambda s: 2.0 if s.drop.p else 1.0, lambda m: setattr(m.drop, "p", 0.5), True),
    "an attribute that is not there yet": (lambda s: getattr(s, "late", 1.0), lambda m: setattr(m, "late", 2.0), True),
    "a buffer that was None": (
        lambda s: 1.0 if s.mask is None else s.mask,
        lambda m: setattr(m, "mask", torch.tensor(3.0)),
        True,
    ),
    "a number of NumPy": (lambda s: s.scale, lambda m: setattr(m, "scale", np.float64(2.0)), True),
    "the sign of zero": (lambda s: 1.0 + 1.0 / (s.config.k or -0.5), lambda m: setattr(m.config, "k", -0.0), True),
    "a number that becomes a bool": (
        lambda s: 1.0 if isinstance(s.config.k, bool) else 2.0,
        lambda m: setattr(m.config, "k", True),
        True,
    ),
    "an enum's method": (lambda s: s.mode.factor(), lambda m: setattr(m, "mode", Mode.B), True),
    "a class that a child is of": (
        lambda s: 2.0 if isinstance(s.layers[1], nn.ReLU) else 1.0,
        lambda m: m.layers.__setitem__(1, nn.Tanh()),
        True,
    ),
    "a partial": (
        lambda s: s.function(2.0),
        lambda m: setattr(m, "function", functools.partial(scaled, by=3.0)),
        True,
    ),
    "a tensor's value": (lambda s: s.total.item(), lambda m: m.total.fill_(3.0), True),
    "a tensor's value that decides": (lambda s: 2.0 if s.total > 2 else 1.0, lambda m: m.total.fill_(3.0), False),
    "an array": (lambda s: s.array[0], lambda m: m.array.__setitem__(0, 5.0), False),
    "random numbers of Python": (lambda s: s.generator.random(), lambda m: m.generator.seed(3), False),
    "grad mode": (lambda s: 2.0 if torch.is_grad_enabled() else 1.0, lambda m: torch.set_grad_enabled(False), True),
}


@pytest.mark.parametrize("name", READS)
def test_what_is_read_is_compared(name: str) -> None:
    read, change, traced = READS[name]
    stock = Chain(read)
    fused, x = fused_copy(stock), rows()
    before = torch.is_grad_enabled()
    try:
        for _ in range(2):
            assert_close(fused(x), stock(x))
            assert is_traced(fused) == traced
            change(stock)
            change(fused)
            assert_close(fused(x), stock(x))
    finally:
        torch.set_grad_enabled(before)


def test_globals_defaults_and_classes_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [
        Chain(read)
        for read in (lambda s: FACTORS["k"], lambda s: type(s).LIMIT, lambda s: scaled(1.0), lambda s: s.LIMIT)
    ]
    pairs, x = [(model, fused_copy(model)) for model in models], rows()

    def check() -> None:
        for stock, fused in pairs:
            assert_close(fused(x), stock(x))
            assert is_traced(fused)

    check()
    monkeypatch.setitem(FACTORS, "k", 2.0)
    monkeypatch.setattr(Chain, "LIMIT", 3.0)
    monkeypatch.setattr(scaled, "__kwdefaults__", {"plus": 4.0})
    check()
    scaled.__kwdefaults__["plus"] = 5.0  # type: ignore[index]
    check()
    monkeypatch.setattr(scaled, "__code__", (lambda value, by=1.0, *, plus=0.0: value - 9).__code__)
    check()


STRUCTURE: dict[str, Change] = {
    "replaced": lambda m: m.layers.__setitem__(0, nn.Linear(8, 8)),
    "appended": lambda m: m.layers.append(nn.Tanh()),
    "deleted": lambda m: m.layers.__delitem__(1),
    "hooked": lambda m: m.layers[0].register_forward_hook(lambda module, inputs, output: output * 2),
    "a forward of its own": lambda m: setattr(m.layers[1], "forward", torch.tanh),
    "without a bias": lambda m: setattr(m.b, "bias", None),
    "with another bias": lambda m: setattr(m.b, "bias", nn.Parameter(torch.ones(8))),
    "parametrized": lambda m: nn.utils.parametrizations.weight_norm(m.a),
    "of another class": lambda m: setattr(m.layers[1], "__class__", nn.Tanh),
}


@pytest.mark.parametrize("name", STRUCTURE)
def test_edits_of_the_structure_are_seen(name: str) -> None:
    stock = Chain()
    fused, x = fused_copy(stock), rows()
    assert_close(fused(x), stock(x))
    for model in (stock, fused):
        torch.manual_seed(3)
        STRUCTURE[name](model)
    assert_close(fused(x), stock(x))


def _images(bias: bool = False, **norm: Any) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=bias), nn.BatchNorm2d(4, **norm), nn.ReLU(), nn.MaxPool2d(2))


def _without_statistics(m: Any) -> None:
    m[1].running_mean = m[1].running_var = None


OPTIONAL: dict[str, tuple[Callable[[], nn.Module], Change]] = {
    "convolution's bias": (_images, lambda m: setattr(m[0], "bias", nn.Parameter(torch.ones(4)))),
    "batch norm's bias": (lambda: _images(affine=False), lambda m: setattr(m[1], "bias", nn.Parameter(torch.ones(4)))),
    "no statistics": (_images, _without_statistics),
    "no weight": (_images, lambda m: setattr(m[1], "weight", None)),
}


@pytest.mark.parametrize("name", OPTIONAL)
def test_parameters_that_come_and_go(name: str) -> None:
    make, change = OPTIONAL[name]
    stock, x = make().eval(), torch.randn(2, 3, 12, 12)
    fused = fused_copy(stock)
    assert_close(fused(x), stock(x))
    change(stock)
    change(fused)
    assert_close(fused(x), stock(x), rtol=1e-4, atol=1e-5)


def test_a_bias_that_is_deleted_is_missed_as_stock_misses_it() -> None:
    stock = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    fused = fused_copy(stock)
    fused(rows())
    for model in (stock, fused):
        del model[2].bias
        with pytest.raises(AttributeError, match="bias"):
            model(rows())


class Slices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
        self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh())
        self.first = 0

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[self.first : -1]:
            x = torch.relu(layer(x))
        for layer in reversed(self.layers):
            x = torch.tanh(layer(x))
        part = self.head[1:]
        return part[:2](self.head[:-1](x)) * len(part) + self.layers[::2][1](x)


SLICES: dict[str, Change] = {
    "another layer": lambda m: m.layers.append(nn.Linear(8, 8)),
    "one less": lambda m: m.layers.__delitem__(1),
    "a layer in another's place": lambda m: m.head.__setitem__(1, nn.Sigmoid()),
    "where the part begins": lambda m: setattr(m, "first", 2),
    "a weight": lambda m: setattr(m.layers[2], "weight", nn.Parameter(torch.eye(8))),
    "a hook": lambda m: m.head[2].register_forward_hook(lambda layer, args, result: result * 2),
    "other layers": lambda m: setattr(m, "head", nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])),
}


@pytest.mark.parametrize("name", SLICES)
def test_parts_of_lists_of_layers(name: str) -> None:
    stock = Slices()
    fused, x = fused_copy(stock), rows()
    fastnn.fuse(Slices())(x)  # a model that is alike
    for number in range(4):
        for model in (stock, fused):
            model.zero_grad()
            model(x).square().sum().backward()
        assert_close(fused(x), stock(x), rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(fused.parameters(), stock.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None)
            if ours.grad is not None:
                assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)
        if number == 1:
            assert is_traced(fused)
            for model in (stock, fused):
                torch.manual_seed(1)
                SLICES[name](model)


class Penalty(nn.Module):
    """A module that a forward finds by a name, and which is none of its submodules."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loss, self.drop, self.fc = nn.HuberLoss(reduction="none"), nn.Dropout(0.5), nn.Linear(8, 8)
        self.register_buffer("scale", torch.ones(8))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.drop(self.fc(self.loss(x, y)) * self.scale)


PENALTIES: dict[str, Any] = {"k": Penalty()}
OTHERS: dict[str, Change] = {
    "another module": lambda m: setattr(m, "fc", nn.Linear(8, 8, bias=False)),
    "a setting": lambda m: setattr(m.loss, "delta", 0.1),
    "its mode": lambda m: m.eval(),
    "a buffer": lambda m: setattr(m, "scale", torch.arange(8.0)),
    "a buffer in place": lambda m: m.scale.mul_(3),
    "a weight": lambda m: setattr(m.fc, "weight", nn.Parameter(torch.eye(8))),
    "no bias": lambda m: setattr(m.fc, "bias", None),
    "a hook": lambda m: m.fc.register_forward_hook(lambda layer, args, result: result * 2),
    "a forward of its own": lambda m: setattr(m.loss, "forward", lambda x, y: x - y),
    "a parametrization": lambda m: nn.utils.parametrizations.spectral_norm(m.fc),
    "another that the name finds": lambda m: PENALTIES.update(k=nn.L1Loss(reduction="none")),
}


@pytest.mark.parametrize("name", OTHERS)
def test_modules_that_are_no_submodules(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    penalty = Penalty()
    monkeypatch.setitem(PENALTIES, "k", penalty)

    class Uses(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + PENALTIES["k"](self.a(x)[:, :8], x) + nn.MSELoss()(x, x.roll(1))

    stock = Uses()
    fused, x = fused_copy(stock), rows()
    for number in range(4):
        results = []
        for model in (stock, fused):
            torch.manual_seed(number)
            result = model(x)
            model.zero_grad(), penalty.zero_grad()
            result.square().sum().backward()
            results.append((result, [p.grad for p in (*model.parameters(), *penalty.parameters())]))
        assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
        if number == 1:
            assert is_traced(fused)
            OTHERS[name](penalty)


class Writes(nn.Module):
    def __init__(self, write: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.write = nn.Linear(8, 8), nn.Linear(8, 8), write
        self.steps, self.acts, self.losses = 0, {}, []  # type: ignore[var-annotated]
        self.register_buffer("n", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        changed = self.write(self, h)
        return self.b(h if changed is None else changed)


def _assign(name: str, value: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    return lambda s, h: setattr(s, name, value(s, h))


def _add_in_place(s: Any, h: Tensor) -> Tensor:
    skip = h
    h += 1.0
    return h + skip


def _write_a_view(s: Any, h: Tensor) -> Tensor:
    view = h.view(-1)
    view *= 2.0
    h[:, 1:3] = 0.5
    return h


WRITES: dict[str, Callable[[Any, Tensor], Any]] = {
    "a number": _assign("steps", lambda s, h: s.steps + 1),
    "a buffer": _assign("n", lambda s, h: s.n + 1),
    "a buffer in place": lambda s, h: s.n.add_(1) and None,
    "a moving average": _assign("mean", lambda s, h: 0.9 * s.mean + 0.1 * h.detach().mean(0)),
    "a dict": lambda s, h: s.acts.update(h=h.detach()),
    "a list": lambda s, h: s.losses.append(h.detach().mean()),
    "a result in place": _add_in_place,
    "a view of a result": _write_a_view,
    "an activation in place": lambda s, h: F.relu(h, inplace=True) + h,
}


@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_is_written_at_every_call(name: str) -> None:
    stock = Writes(WRITES[name]).double()
    fused = fused_copy(stock)
    for number in range(3):
        with torch.no_grad():
            x = torch.randn(3, 8, generator=torch.Generator().manual_seed(number)).double()
            assert_close(fused(x), stock(x))
        assert fused.steps == stock.steps
        assert_close(dict(fused.named_buffers()), dict(stock.named_buffers()))
        assert_close(fused.acts, stock.acts)
        assert_close(fused.losses, stock.losses)
        assert all(type(value) is Tensor for value in (*fused.acts.values(), *fused.losses))
    pickled = copy.deepcopy(fused).state_dict()
    assert pickled.keys() == stock.state_dict().keys()


def test_an_input_that_is_changed_in_place() -> None:
    class Adds(Chain):
        def forward(self, x: Tensor) -> Tensor:
            x += 1
            return super().forward(x)

    stock = Adds()
    fused, x, y = fused_copy(stock), rows(), rows()
    assert_close(fused(y), stock(x))
    assert_close(y, x)
    assert is_traced(fused)


def test_a_weight_that_is_computed_between_two_blocks() -> None:
    class Computes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w2 = (nn.Parameter(torch.randn(4, c, 3, 3)) for c in (3, 4))

        def forward(self, x: Tensor) -> Tensor:
            x = F.max_pool2d(F.relu(F.conv2d(x, self.w1)), 2)
            return F.max_pool2d(F.relu(F.conv2d(x, torch.tanh(self.w2))), 2)

    stock, x = Computes().eval(), torch.randn(2, 3, 16, 16)
    fused = fused_copy(stock)
    with torch.no_grad():
        assert_close(fused(x), stock(x), rtol=1e-4, atol=1e-4)
    assert len(fastnn.explain(fused, x).calls) == 2


def test_shallow_copies_run_themselves() -> None:
    class Scales(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.k = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.k

    x = rows()
    for kind in (copy.copy, lambda m: m._replicate_for_data_parallel()):
        stock = Scales()
        fused = fused_copy(stock)
        fused(x)
        mine, theirs = kind(fused), kind(stock)
        mine.k = theirs.k = 5.0
        for _ in range(2):
            assert_close(mine(x), theirs(x))
            assert_close(fused(x), stock(x))
        assert_close(copy.copy(mine)(x), theirs(x))
    recurrent = nn.GRU(8, 4)
    mine, theirs = copy.copy(fused_copy(recurrent)), copy.copy(recurrent)
    for one in (mine, theirs):
        one._parameters = {k: nn.Parameter(2 * v.detach()) for k, v in one._parameters.items()}
        one._flat_weights = [one._parameters[name] for name in one._flat_weights_names]
    assert_close(mine(x)[0], theirs(x)[0])


def test_a_shallow_copy_is_called_and_not_its_forward() -> None:
    model, x = fastnn.fuse(Chain()), rows()
    shallow = copy.copy(model)
    with pytest.raises(RuntimeError, match="call the module"):
        _call(shallow.forward, x)
    assert_close(shallow(x), model(x))
    assert_close(_call(shallow.forward, x), model(x))


def _call(function: Callable[[Tensor], Any], x: Tensor) -> Any:
    return function(x)


def test_a_forward_that_its_owner_wraps() -> None:
    stock = Chain()
    fused, x = fused_copy(stock), rows()
    for model in (stock, fused):
        model.forward = lambda x, old=model.forward: old(x) * 2  # type: ignore[method-assign]
    for mine, theirs in ((fused, stock), (copy.copy(fused), copy.copy(stock))):
        assert_close(mine(x), theirs(x))


def test_fused_models_are_let_go_of() -> None:
    model = fastnn.fuse(Chain())
    model(rows())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_setting_that_changes_at_every_call_costs_no_trace_each_time() -> None:
    stock = Chain(lambda s: s.config.k)
    fused, x = fused_copy(stock), rows()
    for number in range(200):
        stock.config.k = fused.config.k = float(number)
        assert_close(fused(x), stock(x))
    assert fused.__dict__["forward"].tries < 60


def test_a_module_whose_code_is_not_known_ends_a_trace() -> None:
    """What it changes is read at the same call."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.n = 0

        def forward(self, x: Tensor) -> Tensor:
            self.n += 1
            return x

    class Model(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.count = Counts()

        def forward(self, x: Tensor) -> Tensor:
            h = super().forward(self.count(x))
            return h * 2 if self.count.n % 2 else h

    stock = Model()
    fused, x = fused_copy(stock), rows()
    for _ in range(4):
        assert_close(fused(x), stock(x))
    assert "count (it sets the attribute n of a Counts (line " in fused.__dict__["forward"].why


def test_a_forward_that_cannot_be_traced_yet() -> None:
    stock = Chain(lambda s: s.array[0])
    fused, x = fused_copy(stock), rows()
    assert_close(fused(x), stock(x))
    assert not is_traced(fused)
    stock.read = fused.read = lambda s: 1.5  # type: ignore[assignment]
    end = time.monotonic() + 20
    while not is_traced(fused) and time.monotonic() < end:  # it is tried again, after a while
        assert_close(fused(x), stock(x))
    assert is_traced(fused)


def test_several_threads_call_one_model() -> None:
    model, x, wrong = fastnn.fuse(Chain()), rows(), []
    expected = model(x)

    def run() -> None:
        for _ in range(200):
            if not torch.equal(model.forward(x), expected):
                wrong.append(1)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_names_of_nodes_and_of_further_inputs() -> None:
    """A call of torch.tensor makes a node of that name."""
    stock = Chain(lambda s: torch.tensor(1.0) * torch.tensor(2.0) * s.items[0])
    stock.items = [torch.tensor(3.0), torch.tensor(4.0)]  # type: ignore[list-item]
    fused, x = fused_copy(stock), rows()
    assert_close(fused(x), stock(x))
    assert is_traced(fused)
