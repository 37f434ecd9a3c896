"""fastnn.fuse on what real models do: which layers become one operator, which stay and why, and what users do after."""

import copy
import functools
import inspect
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fusing import Calls, fused_copy, run_and_list
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing import assert_close

import fastnn
from fastnn.graph import trial


def conv() -> nn.Conv2d:
    return nn.Conv2d(3, 8, 3)


def image() -> Tensor:
    return torch.randn(2, 3, 12, 13)


def operators(model: nn.Module, x: Any, training: bool = False) -> list[str]:
    """Of a fused model, checked against the stock one, outputs and gradients."""
    torch.manual_seed(0)
    model.train(training)
    fused = fused_copy(model)
    results = []
    for one in (model, fused):
        torch.manual_seed(0)
        output = one(x)
        results.append((output, torch.autograd.grad(output.square().sum(), list(one.parameters()), allow_unused=True)))
    assert_close(results[1], results[0], rtol=2e-4, atol=2e-4)
    return [row.operator for row in fastnn.explain(fused, x).calls]


# ---- what is fused --------------------------------------------------------------------------------------------------

CONV = "conv_relu_max_pool"
FUSED: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "functions": (lambda: Calls(lambda x, c: F.max_pool2d(F.relu(c(x)), 2), conv()), [CONV]),
    "torch's functions": (lambda: Calls(lambda x, c: torch.max_pool2d(torch.relu(c(x)), 2), conv()), [CONV]),
    "methods": (lambda: Calls(lambda x, c: F.max_pool2d(c(x).relu(), 2), conv()), [CONV]),
    "in place": (lambda: Calls(lambda x, c: F.max_pool2d(c(x).relu_(), 2), conv()), [CONV]),
    "in place, a function": (lambda: Calls(lambda x, c: F.max_pool2d(F.relu(c(x), inplace=True), 2), conv()), [CONV]),
    "weights of its own": (
        lambda: Calls(lambda x, c: F.max_pool2d(F.relu(F.conv2d(x, c.weight, c.bias, padding=1)), 2), conv()),
        [CONV],
    ),
    "no bias": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)),
        [CONV],
    ),
    "nested": (lambda: nn.Sequential(nn.Sequential(conv(), nn.ReLU()), nn.Sequential(nn.MaxPool2d(2))), [CONV]),
    "one object twice": (
        lambda: Calls(
            lambda x, c, d, r, p: p(r(d(p(r(c(x)))))), conv(), nn.Conv2d(8, 4, 2), nn.ReLU(), nn.MaxPool2d(2)
        ),
        [CONV, CONV],
    ),
    "pool before ReLU": (lambda: nn.Sequential(conv(), nn.MaxPool2d(3, 2, 1), nn.ReLU()), [CONV]),
    "no pool": (lambda: nn.Sequential(conv(), nn.ReLU()), [CONV]),
    "uneven pool": (lambda: nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d((2, 1), (2, 1), (1, 0))), [CONV]),
    "stem": (lambda: nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1)), [CONV]),
    "same": (lambda: nn.Sequential(nn.Conv2d(3, 8, 5, padding="same"), nn.ReLU(), nn.MaxPool2d(2)), [CONV]),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.ReLU(), nn.MaxPool2d(2)), [CONV]),
    "batch norm": (lambda: nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)), [CONV]),
    "batch norm, nothing to learn": (
        lambda: nn.Sequential(conv(), nn.BatchNorm2d(8, affine=False), nn.ReLU(), nn.MaxPool2d(2)),
        [CONV],
    ),
    "batch norm after a sum": (
        lambda: Calls(lambda x, c, b: F.max_pool2d(F.relu(b(c(x) + 1)), 2), conv(), nn.BatchNorm2d(8)),
        [CONV],  # of one pixel, in groups of one channel
    ),
    "padding by name": (
        lambda: nn.Sequential(
            *(
                nn.Conv2d(3, 4, 3, padding="same", dilation=2),
                nn.ReLU(),
                nn.Conv2d(4, 5, (2, 3), padding="same", dilation=2),
            ),
            *(nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 2, 3, padding="valid"), nn.ReLU()),
        ),
        [CONV, CONV, CONV],
    ),
    "identity and dropout": (
        lambda: nn.Sequential(conv(), nn.Identity(), nn.ReLU(), nn.Dropout(), nn.MaxPool2d(2)),
        [CONV],
    ),
    "a chain": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(468, 9), nn.Tanh(), nn.Dropout(), nn.Linear(9, 5), nn.GELU()),
        ["mlp"],
    ),
    "a chain of which some have a bias": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(468, 9, bias=False), nn.SiLU(), nn.Linear(9, 5)),
        ["mlp"],
    ),
    "a head": (
        lambda: Calls(lambda x, a, b: F.log_softmax(b(F.relu(a(x.flatten(1)))), 1), nn.Linear(468, 9), nn.Linear(9, 4)),
        ["mlp"],
    ),
    "fastnn's own": (
        lambda: nn.Sequential(fastnn.nn.ConvReLUMaxPool2d(3, 8, 3), nn.Flatten(), fastnn.nn.LinearReLU(200, 4)),
        [CONV, "mlp"],
    ),
}


@pytest.mark.parametrize("name", FUSED)
def test_what_is_fused(name: str) -> None:
    model, expected = FUSED[name]
    assert operators(model(), image()) == expected


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_dimensions(dims: int) -> None:
    layers = [getattr(nn, f"{kind}{dims}d") for kind in ("Conv", "BatchNorm", "MaxPool")]
    x = torch.randn(2, 3, *(9,) * dims)
    model = nn.Sequential(layers[0](3, 5, 3), layers[1](5), nn.ReLU(), layers[2](2), nn.Flatten())
    assert operators(model, x) == [CONV]
    assert operators(model, x, training=True) == [CONV + "_with_winners"]
    assert operators(nn.Sequential(layers[0](3, 5, 3), nn.ReLU(), layers[2](2)), x, training=True) == [CONV]


def test_dropout_is_a_border_in_training() -> None:
    model = nn.Sequential(
        nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.Dropout(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)
    )
    assert operators(model, torch.randn(3, 6)) == ["mlp"]
    assert operators(model, torch.randn(3, 6), training=True) == ["mlp", "mlp"]

    def run(x: Tensor, a: Any, b: Any, c: Any) -> Tensor:
        return c(F.dropout(b(a(x).tanh()), training=a.training))

    with_function = Calls(run, nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 4))
    assert operators(with_function, torch.randn(3, 6)) == ["mlp"]
    # The last has nothing to be fused with.
    assert operators(with_function, torch.randn(3, 6), training=True) == ["mlp"]


def test_one_linear_layer_that_is_trained_stays_stocks() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 4))
    assert operators(model, torch.randn(3, 6), training=True) == []


def test_a_small_network_is_one_operator() -> None:
    model = nn.Sequential(
        conv(), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(200, 5), nn.ReLU(), nn.Linear(5, 2)
    )
    fused = fused_copy(model.eval())
    with torch.no_grad():
        result, calls = run_and_list(lambda: fused(image()))
    assert calls == ["fastnn::network_of_parameters"]
    assert result.shape == (2, 2)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"), torch.no_grad():
        fused(torch.randn(2, 3, 20, 20))


VIEWS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x.view(x.size(0), -1),
    lambda x: x.reshape((x.shape[0], -1)),
    lambda x: torch.reshape(x, (x.size()[0], -1)),
    lambda x: x.view(x.shape[0], -1) * x.shape[1],
)


@pytest.mark.parametrize("view", VIEWS)
def test_a_small_network_that_flattens_by_view_is_one_operator(view: Callable[[Tensor], Tensor]) -> None:
    def function(x: Tensor, block: nn.Module, head: nn.Module) -> Tensor:
        return head(view(block(x)))

    block, head = nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2)), nn.Linear(200, 5)
    model, x = Calls(function, block, head).eval(), image()
    fused = fused_copy(model)
    with torch.no_grad():
        result, calls = run_and_list(lambda: fused(x))
    assert_close(result, model(x))
    assert calls == ["fastnn::network_of_parameters"]


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("last", ["output", "state"])
def test_a_recurrent_network_with_a_head_trains_as_one_function(kind: str, last: str) -> None:
    def run(x: Tensor, rnn: Any, head: Any) -> Tensor:
        output, state = rnn(x)
        h = state[0] if kind == "LSTM" else state
        return head(output[:, -1] if last == "output" else h[-1])

    layers = getattr(nn, kind)(4, 6, 2, batch_first=True), nn.Linear(6, 3)
    model = Calls(run, *layers)
    assert operators(model, torch.randn(3, 5, 4), training=True)[:1] == ["rnn"]
    fused = fused_copy(model)
    assert fused(torch.randn(3, 5, 4)).grad_fn.name() == "RnnWithHeadBackward"


def test_hooks_of_a_recurrent_layer_with_a_head() -> None:
    for make in (lambda: nn.GRU(4, 6, batch_first=True), lambda: fastnn.nn.GRU(4, 6, batch_first=True)):
        model = Calls(lambda x, rnn, head: head(rnn(x)[0][:, -1]), make(), nn.Linear(6, 40))
        fused, x = fused_copy(model), torch.randn(3, 5, 4)
        assert_close(fused(x), model(x))
        seen: list[int] = []
        for one in (model, fused):
            one.layers[0].register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(1))
            one.layers[0].register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
        assert_close(fused(x), model(x))
        assert seen == [1, 1]


# ---- what is left ---------------------------------------------------------------------------------------------------


def hooked() -> nn.Module:
    layer = conv()
    layer.register_forward_hook(lambda module, inputs, output: output + 1)
    return layer


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def pool_with_indices(x: Tensor, c: Any) -> Tensor:
    values, indices = F.max_pool2d(F.relu(c(x)), 2, return_indices=True)
    return values + indices


def changed_in_place(x: Tensor, c: Any) -> Tensor:
    y = c(x)
    F.relu(y, inplace=True)
    return F.max_pool2d(y, 2)


def both(x: Tensor, c: Any) -> Tensor:
    y = F.relu(c(x))
    return F.max_pool2d(y, 2).sum() + y.sum()


def twice(x: Tensor, c: Any, b: Any) -> Tensor:
    return F.max_pool2d(F.relu(b(c(x))), 2) + F.max_pool2d(F.relu(b(c(x + 1))), 2)


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "ReLU has a second user": (lambda: Calls(both, conv()), "its ReLU has 2 users"),
    "convolution has a second user": (lambda: Calls(lambda x, c: (y := c(x)) + F.relu(y), conv()), "it has 2 users"),
    "changed in place": (lambda: Calls(changed_in_place, conv()), "it has 2 users"),
    "ReLU6": (lambda: nn.Sequential(conv(), nn.ReLU6(), nn.MaxPool2d(2)), "no ReLU follows, but hardtanh"),
    "no ReLU": (lambda: nn.Sequential(conv(), nn.MaxPool2d(2)), "no ReLU beside its max-pool"),
    "average": (lambda: nn.Sequential(conv(), nn.AvgPool2d(2)), "no ReLU follows, but other pool"),
    "indices": (lambda: Calls(pool_with_indices, conv()), "returns indices"),
    "all padding": (
        lambda: nn.Sequential(conv(), nn.MaxPool2d(3, 2, 1, dilation=2), nn.ReLU()),
        "may be all padding",
    ),
    "padding mode": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), nn.ReLU()),
        "reflect",
    ),
    "hooks": (lambda: nn.Sequential(hooked(), nn.ReLU(), nn.MaxPool2d(2)), "it has hooks"),
    "a forward of its own": (lambda: nn.Sequential(Doubled(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2)), ""),
    "batch norm used twice": (lambda: Calls(twice, conv(), nn.BatchNorm2d(8)), "batch norm is used twice"),
    "batch norm without statistics": (
        lambda: nn.Sequential(conv(), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(), nn.MaxPool2d(2)),
        "no running statistics",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_and_why(name: str) -> None:
    model = LEFT[name][0]().eval()
    torch.manual_seed(0)
    x = image()
    fused = fused_copy(model)
    assert_close(fused(x), model(x))
    report = fastnn.explain(fused, x)
    if LEFT[name][1]:
        assert any(LEFT[name][1] in row.why for row in report.left), report
        if any(row.is_candidate for row in report.left):
            with pytest.raises(ValueError, match=r"fuse: .* stays as it is: "):
                fused_copy(model, strict=True)


def test_a_pool_with_a_second_user_of_its_relu_leaves_a_fused_convolution() -> None:
    report = fastnn.explain(fastnn.fuse(Calls(both, conv())), image())
    assert [row.layer for row in report.calls] == ["layers.0, relu"]
    assert "has 2 users" in report.left[0].why


def test_transformers_and_subclasses_are_untouched() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3)).eval()
    x = torch.randn(2, 5, 8)
    fused = fused_copy(model)
    assert_close(fused(x), model(x))
    assert not any("forward" in module.__dict__ for module in fused[0].modules())
    why = {row.layer: row.why for row in fastnn.explain(fused, x).left}
    assert why["0.linear1"] == "TransformerEncoderLayer is torch's"


class Branches(nn.Module):
    """Control flow that depends on values: its children are fused one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = (
            nn.Sequential(nn.Conv2d(3, c, 3), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)) for c in (8, 8)
        )
        self.rnn = nn.GRU(8, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        features = (self.small if x.mean() < 0 else self.large)(x)
        return self.head(self.rnn(features.flatten(1))[0])


def test_what_cannot_be_traced_is_fused_module_by_module() -> None:
    model = Branches()
    fused = fused_copy(model)
    for x in (image() + 5, image() - 5):
        assert_close(fused(x), model(x))
    report = fastnn.explain(fused, image() + 5)
    assert [row.layer for row in report.calls] == ["large.0, large.1, large.2", "rnn"]
    left = {row.layer: row.why for row in report.left}
    assert left["head"].startswith("in Branches: it decides by the values, or the sizes, of a tensor (line ")
    assert "small.0, small.1, small.2" not in left


def depends_on_kind(x: Any, c: Any) -> Tensor:
    return F.relu(c(x)) if isinstance(x, Tensor) else c(x)


class TakesAnOption(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        y = torch.relu(self.linear(x)) * scale
        return y if mask is None else y * mask


class Counts(nn.Module):
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 4), 0
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.total.add_(1)
        return torch.relu(self.linear(x))


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x)) + torch.randn(4)


def test_traces_that_would_not_be_what_the_model_does() -> None:
    model = Calls(depends_on_kind, conv())
    assert_close(fused_copy(model)(image()).min(), torch.tensor(0.0))
    option, x = TakesAnOption(), torch.randn(3, 4)
    fused, mask = fused_copy(option), torch.rand(3, 4)
    for args, kwargs in (((x,), {}), ((x, mask), {}), ((x,), {"mask": mask}), ((x, None, 2.0), {}), ((), {"x": x})):
        assert_close(fused(*args, **kwargs), option(*args, **kwargs))
    counts = fastnn.fuse(Counts())
    for number in range(1, 4):
        counts(x)
        assert counts.calls == counts.total == number
    noisy = fastnn.fuse(Noisy())
    assert not torch.equal(noisy(x), noisy(x))
    before = torch.get_rng_state()
    fastnn.fuse(Noisy())(x)
    torch.set_rng_state(before)
    torch.manual_seed(3)
    expected = fastnn.unfuse(noisy)(x)
    torch.manual_seed(3)
    assert_close(fastnn.fuse(noisy)(x), expected)


class Backbone(nn.Module):
    """Of which one half is not trained: no gradient is recorded for it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.body = nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
        self.head = nn.Linear(200, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "no_grad":
            with torch.no_grad():
                features = self.body(x)
        elif self.how == "detach":
            features = self.body(x).detach()
        else:
            with torch.autocast("cpu", torch.bfloat16):
                features = self.body(x).float()
        return self.head(features)


@pytest.mark.parametrize("how", ["no_grad", "detach", "autocast"])
def test_modes_inside_of_a_forward(how: str) -> None:
    model, x = Backbone(how), image()
    fused = fused_copy(model)
    for one in (model, fused):
        one(x).sum().backward()
    for p, q in zip(fused.parameters(), model.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            assert_close(p.grad, q.grad, rtol=5e-2, atol=5e-2)
    assert len(fastnn.explain(fused, x).calls) >= 1


def test_children_of_a_model_whose_entry_is_another_method() -> None:
    class TwoHalves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
            self.decoder = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 6))

        def encode(self, x: Tensor) -> Tensor:
            return self.encoder(x)

    model = TwoHalves()
    fused, x = fused_copy(model), torch.randn(3, 6)
    assert_close(fused.encode(x), model.encode(x))
    _, calls = run_and_list(lambda: fused.encode(x))
    assert sum(name.startswith("fastnn::mlp") for name in calls) == 1


# ---- recurrent layers ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_recurrent_layers_in_every_way() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 3, 4)
    packed = nn.utils.rnn.pack_sequence([torch.randn(n, 4) for n in (2, 5, 3)], enforce_sorted=False)
    for kind, options in (
        ("GRU", {"bidirectional": True, "num_layers": 2}),
        ("LSTM", {"proj_size": 3}),
        ("RNN", {"nonlinearity": "relu"}),
    ):
        stock = getattr(nn, kind)(4, 6, **options)
        fused = fused_copy(stock)
        assert type(fused) is type(stock)
        assert_close(fused(x), stock(x))
        assert_close(fused(packed)[0].data, stock(packed)[0].data)
        state = stock(x)[1]
        assert_close(fused(x, state), stock(x, state))
        assert_close(fused(x[:, 0]), stock(x[:, 0]))
        with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size"):
            fused(torch.randn(5, 3, 9))
        assert [row.operator for row in fastnn.explain(fused, x).rows] == ["rnn"]
    for kind in ("RNNCell", "GRUCell", "LSTMCell"):
        stock = getattr(nn, kind)(4, 6)
        assert_close(fused_copy(stock)(x[0]), stock(x[0]))


# ---- what users do with a fused model -----------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(conv(), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(200, 6), nn.ReLU()),
        nn.Linear(6, 2),
    )


def check(fused: nn.Module, model: nn.Module, x: Tensor | None = None) -> None:
    x = image() if x is None else x
    with torch.no_grad():
        assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


def test_statistics_that_change() -> None:
    model = network()
    fused = fused_copy(model)
    for training in (True, False, True, False):
        model.train(training)
        fused.train(training)
        check(fused, model)
    other = network().eval()
    with torch.no_grad():
        for tensor in (*other.parameters(), other[1].running_mean, other[1].running_var):
            tensor.add_(torch.rand_like(tensor))
    fused.load_state_dict(other.state_dict())
    check(fused, other)
    with torch.no_grad():
        for one in (fused, other):
            one[1].weight.data.mul_(-2)
            one[1].running_mean.data.add_(1)
    check(fused, other)
    fused[1].train()
    other[1].train()
    check(fused, other)


def test_states_and_places() -> None:
    model = network().eval()
    fused = fused_copy(model)
    fused.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    check(fused, model)
    check(fused.double(), copy.deepcopy(model).double(), image().double())
    check(fused.float(), model)
    with torch.device("meta"):
        empty = fastnn.fuse(network())
    empty = empty.to_empty(device="cpu").eval()
    empty.load_state_dict(model.state_dict())
    check(empty, model)
    weights = {name: torch.rand_like(value) for name, value in model.named_parameters()}
    with torch.no_grad():
        x = image()
        assert_close(torch.func.functional_call(fused, weights, x), torch.func.functional_call(model, weights, x))
    assert_close(
        torch.func.grad(lambda w: torch.func.functional_call(fused, w, x).sum())(weights),
        torch.func.grad(lambda w: torch.func.functional_call(model, w, x).sum())(weights),
        rtol=1e-3,
        atol=1e-3,
    )


def test_edits_after_fuse() -> None:
    model = network().eval()
    fused = fused_copy(model)
    for one in (fused, model):
        one[0].stride = (2, 2)
        one[5] = nn.Linear(48, 6)
    fused.load_state_dict(model.state_dict())
    check(fused, model)
    for one in (fused, model):
        one[3] = nn.AvgPool2d(2)
        one.append(nn.Tanh())
    check(fused, model)
    seen: list[int] = []
    fused[2].register_forward_hook(lambda *_: seen.append(1))
    check(fused, model)
    assert seen == [1]
    nn.utils.parametrizations.weight_norm(fused[0])
    check(fused, model)
    prune.l1_unstructured(fused[5], "weight", 0.5)
    prune.l1_unstructured(model[5], "weight", 0.5)
    check(fused, model)
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(2))
    try:
        fused(image())
    finally:
        handle.remove()
    assert seen.count(2) >= len(fused)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.scale, self.flag = nn.Linear(4, 4), 2.0, True

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.linear(x)) * self.scale
            return y if self.flag else -y

    stock = Scaled()
    scaled, x = fused_copy(stock), torch.randn(2, 4)
    for scale, flag in ((3.0, True), (0.5, False), (2.0, True)):
        for one in (scaled, stock):
            one.scale, one.flag = scale, flag
        check(scaled, stock, x)


def test_a_function_around_that_of_the_forward() -> None:
    """As accelerate puts one into a model for autocast, and takes it out again."""
    model = network()
    fused, seen = fused_copy(model), []
    function = fused.forward.__func__

    @functools.wraps(function)
    def around(module: nn.Module, *args: Any) -> Any:
        seen.append(module)
        return function(module, *args)

    assert inspect.signature(around) == inspect.signature(type(model).forward)
    assert inspect.unwrap(around) is function
    fused.forward = types.MethodType(around, fused)
    x = image()

    def calls(one: nn.Module) -> list[str]:
        result, names = run_and_list(lambda: one(x))
        assert_close(result, model(x), rtol=1e-4, atol=1e-5)
        return names

    assert calls(fused)
    assert not calls(copy.deepcopy(fused))
    assert not calls(fastnn.unfuse(fused))
    assert len(seen) == 3


def test_weight_norm_and_pruning_as_they_were_before_parametrizations() -> None:
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(nn.Linear(6, 5))
    prune.random_unstructured(other := nn.Linear(5, 4), "weight", 0.5)
    model = nn.Sequential(layer, nn.ReLU(), other)
    fused = fused_copy(model)
    optimizers = [torch.optim.SGD(one.parameters(), 0.1) for one in (model, fused)]
    for _ in range(3):
        x = torch.randn(3, 6)
        for one, optimizer in zip((model, fused), optimizers, strict=True):
            optimizer.zero_grad()
            one(x).square().sum().backward()
            optimizer.step()
        check(fused, model, x)
    assert any("hooks" in row.why for row in fastnn.explain(fused, torch.randn(3, 6)).left)


def test_scripted_lazy_and_compiled_models() -> None:
    with pytest.warns((DeprecationWarning, FutureWarning), match="jit"):
        scripted = torch.jit.trace(nn.Linear(4, 3), torch.randn(2, 4))
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), scripted)
    fused, x = fastnn.fuse(model), torch.randn(2, 4)
    assert fused(x).shape == (2, 3)
    lazy = nn.Sequential(nn.LazyLinear(5), nn.ReLU(), nn.Linear(5, 2))
    fused = fastnn.fuse(lazy)
    assert fused(x).shape == (2, 2)
    stock = fastnn.unfuse(copy.deepcopy(fused))
    check(fused, stock, x)
    assert len(fastnn.explain(fused, x).calls) == 1
    check(torch.compile(fused, backend="aot_eager", fullgraph=True), stock, x)
    exported = torch.export.export(fastnn.fuse(network().eval()), (image(),)).module()
    check(exported, network().eval())


def test_bad_calls() -> None:
    with pytest.raises(TypeError, match=r"expected a model that is a torch\.nn\.Module, got a list"):
        fastnn.fuse([nn.Linear(2, 2)])  # type: ignore[arg-type]
    model = network()
    with pytest.raises(ValueError, match="does not take the example inputs"):
        fused_copy(model, torch.randn(2, 5))
    with pytest.raises(ValueError, match="does not take the example inputs"):
        fused_copy(model, (image(), image()))
    fused = fused_copy(model)
    for bad in (None, "image", [image()]):
        with pytest.raises((TypeError, AttributeError)) as ours:
            fused(bad)
        with pytest.raises(type(ours.value)):
            model(bad)
    assert fastnn.unfuse(nn.Linear(2, 2)) is not None


def test_what_is_not_faster_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastnn.graph import trial

    times = [[1.0, 2.0], [3e-3, 2e-3], [1.0, 1.0, 2.0]]  # of both candidates, and of the whole model
    monkeypatch.setattr(trial, "_time", lambda ours, *_: times[len(seen) - 1] if not seen.append(ours()) else None)
    seen: list[Any] = []
    model = nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(200, 4)).eval()
    fused = fused_copy(model, image())
    assert len(seen) == 3
    report = fastnn.explain(fused, image())
    assert [row.layer for row in report.calls] == ["0, 1, 2"]
    assert report.left[0].why == "stock is as fast here: 2.00 ms, fused 3.00 ms (inference)"
    check(fused, model)
    again = fastnn.explain(copy.deepcopy(fused), image())
    assert again == report
    with pytest.raises(ValueError, match=r"4 stays as it is: stock is as fast here"):
        fastnn.fuse(fused, strict=True)


def test_a_whole_model_that_is_not_faster_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastnn.graph import trial

    times = iter([[1.0, 2.0], [1.0, 2.0], [3e-3, 3e-3, 2e-3]])
    monkeypatch.setattr(trial, "_time", lambda ours, *_: (ours(), next(times))[1])
    model = nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(200, 4)).eval()
    fused = fused_copy(model, image())
    report = fastnn.explain(fused, image())
    assert not report.calls
    assert all("the whole model is as fast without it: 2.00 ms, 3.00 ms fused" in row.why for row in report.left)
    check(fused, model)
    assert fastnn.explain(fused.train(), image()).calls  # no trial has seen this mode
    check(fused, model.train())
    assert fastnn.explain(copy.deepcopy(fused).eval(), image()) == report


def test_a_trial_of_what_cannot_run_twice() -> None:
    class KeepsResults(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = network()
            self.maps: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.maps.append(self.block(x))
            if len(self.maps) > 2:
                raise OverflowError("a cache of two results is full")
            return self.maps[-1].sum(-1)

    model = KeepsResults()
    fastnn.fuse(model, image())
    assert not model.maps
    assert len(fastnn.explain(model, image()).calls) + len(fastnn.explain(model, image()).left)


def test_threads_that_run_other_models_while_one_is_traced() -> None:
    other, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4)
    expected, stop, wrong = other(x), threading.Event(), []

    def run() -> None:
        while not stop.is_set():
            if not torch.equal(other(x), expected):
                wrong.append(1)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(10):
            fastnn.fuse(network())(image())
    finally:
        stop.set()
        thread.join()
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_and_autocast(dtype: torch.dtype) -> None:
    model = network().eval()
    fused, x = fused_copy(model), image()
    with torch.no_grad():
        close = {"rtol": 5e-2, "atol": 5e-2} if dtype is torch.bfloat16 else {}
        assert_close(copy.deepcopy(fused).to(dtype)(x.to(dtype)), copy.deepcopy(model).to(dtype)(x.to(dtype)), **close)
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(fused(x), model(x), rtol=5e-2, atol=5e-2)
            model.train()
            fused.train()
            assert_close(fused(x), model(x), rtol=5e-2, atol=5e-2)


def test_few_elements_of_a_gradient_may_differ_in_a_trial() -> None:
    """Rounding decides at ReLU's kink, whose few elements must not put a layer back to stock; results must agree."""
    exact = torch.linspace(-1, 1, 1000)
    flipped, wrong = exact.clone(), exact.clone()
    flipped[500:505] += 0.3
    wrong[500:550] += 0.3
    for other, few, agrees in (
        *((exact, False, True), (exact * (1 + 1e-6), False, True), (flipped, False, False)),
        *((flipped, True, True), (wrong, True, False), (exact * 1.01, True, False), (exact * torch.nan, True, False)),
        *((exact.clone().fill_(torch.inf), True, False), (exact * (1 + 1e-6), True, True)),
    ):
        assert trial._agree([other], [exact], few=few) is agrees
    special = torch.tensor([1.0, torch.inf, torch.nan, -torch.inf])
    assert trial._agree([special.clone()], [special], few=False)
    assert not trial._agree([special.nan_to_num(0.0)], [special], few=True)


# ---- recurrent layers whose weights are computed ------------------------------------------------------------------


class _Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5


PARAMETRIZATIONS: dict[str, Callable[[nn.Module, str], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "spectral_norm": parametrizations.spectral_norm,
    "own": lambda module, name: parametrize.register_parametrization(module, name, _Half()),
}


def _recurrent_call(kind: str) -> Callable[[nn.Module], nn.Module]:
    if kind.endswith("Cell"):
        return lambda layer: Calls(lambda x, r: r(x[0])[0] if kind == "LSTMCell" else r(x[0]), layer)
    return lambda layer: Calls(lambda x, r: r(x)[0][-1], layer)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", PARAMETRIZATIONS)
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"])
def test_recurrent_layers_with_parametrizations(kind: str, name: str, first: bool) -> None:
    """The weights are those that the parametrization computes at each call, whether it came before `fuse` or later."""
    weight = "weight_hh" if kind.endswith("Cell") else "weight_hh_l0"
    x, models = torch.randn(5, 3, 4, dtype=torch.float64), []
    for is_fused in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(_recurrent_call(kind)(getattr(nn, kind)(4, 8)), nn.Linear(8, 2)).double()
        layer = next(one for one in model.modules() if isinstance(one, (nn.RNNBase, nn.RNNCellBase)))
        if is_fused and not first:
            fastnn.fuse(model)
            model(x)
        torch.manual_seed(1)
        PARAMETRIZATIONS[name](layer, weight)
        model.train(name != "spectral_norm")  # which torch computes once more, at times, when it trains
        models.append(fastnn.fuse(model) if is_fused and first else model)
    models.append(copy.deepcopy(models[1]))
    for _ in range(2):
        results = []
        for model in models:
            y = model(x)
            results.append((y.detach(), torch.autograd.grad(y.square().sum(), list(model.parameters()))))
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.5)
        for found in results[1:]:
            assert_close(found, results[0])


class _Noted(Tensor):
    """A tensor that carries a note along."""

    note = "none"

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(function, types, args, kwargs or {})
        notes = [one.note for one in args if isinstance(one, _Noted)]
        if isinstance(result, _Noted) and notes:
            result.note = notes[0]
        return result


@pytest.mark.parametrize("records", [True, False])
def test_inputs_of_a_class_of_their_own(records: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(200, 8), nn.ReLU())
    fused = fused_copy(model)
    x: Any = torch.randn(2, 3, 12, 12).as_subclass(_Noted)
    x.note = "kept"
    with torch.set_grad_enabled(records):
        result, expected = fused(x), model(x)
    assert type(result) is type(expected) is _Noted
    assert result.note == expected.note == "kept"
    assert_close(result, expected)
    assert type(fused(torch.randn(2, 3, 12, 12))) is Tensor


class ByName(nn.Module):
    """Layers as functions whose input is given by name."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.max_pool2d(input=F.relu(input=F.conv2d(input=x, weight=self.kernel)), kernel_size=2)
        return F.relu(F.linear(weight=self.weight, input=pooled.mean((2, 3))))


def test_a_trial_of_functions_whose_input_is_given_by_name() -> None:
    model = ByName()
    check(fused_copy(model, image()), model)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("made_there", [False, True])
def test_a_trial_in_inference_mode(training: bool, made_there: bool) -> None:
    model = network().train(training)
    with torch.inference_mode():
        own = copy.deepcopy(model) if made_there else model
        fused = fused_copy(own, image())
        check(fused, own)
        assert torch.is_inference_mode_enabled()


class Widened(nn.Module):
    """A chain of linear functions of which torch takes more tensors than operators do."""

    def __init__(self, weight: tuple[int, ...], bias: tuple[int, ...] | None, first_bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(16, 8))
        self.first_bias = nn.Parameter(torch.randn(16)) if first_bias else None
        self.weight = nn.Parameter(torch.randn(weight))
        self.bias = None if bias is None else nn.Parameter(torch.randn(bias))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, self.first, self.first_bias)), self.weight, self.bias)


@pytest.mark.parametrize("sizes", [((16,), None), ((4, 16), (1, 4)), ((4, 16), (5, 4)), ((4, 16), ()), ((4, 16), (1,))])
@pytest.mark.parametrize("first_bias", [False, True])
def test_linear_functions_of_other_tensors(sizes: tuple[Any, Any], first_bias: bool) -> None:
    model, x = Widened(*sizes, first_bias), torch.randn(5, 8)
    fused = fused_copy(model)
    for records in (True, False):
        with torch.set_grad_enabled(records):
            assert_close(fused(x), model(x))


class _WithLock(nn.Sequential):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.lock = threading.Lock()


@pytest.mark.parametrize("was_fused", [False, True])
@pytest.mark.parametrize("reason", ["lock", "index", "sizes"])
def test_a_trial_that_fails_leaves_the_model_as_it_was(reason: str, was_fused: bool) -> None:
    made = _WithLock if reason == "lock" else nn.Sequential
    model = made(nn.Embedding(4, 8), nn.Flatten(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 2))
    if was_fused:
        fastnn.fuse(model)
    x = torch.tensor([[0, 1, 7 if reason == "index" else 3] + [0] * (reason == "sizes")])
    with pytest.raises(
        ValueError, match="cannot be copied" if reason == "lock" else "does not take the example inputs"
    ):
        fastnn.fuse(model, x)
    assert ("forward" in model.__dict__) is was_fused
    assert ("forward" in model[2].__dict__) is False


def test_a_trial_of_a_model_that_transforms_a_part() -> None:
    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.energy = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))
            self.scale = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.func.vmap(torch.func.grad(lambda z: self.energy(z).squeeze()))(x) * self.scale(x)

    model, x = Field(), torch.randn(4, 2)
    expected = model(x)
    fused = fastnn.fuse(model, x)
    assert_close(fused(x), expected)
    assert "it runs within a transform of torch.func here" in str(fastnn.explain(fused, x))
