"""Functions of torch between layers that networks have: each is part of the network, and computes what torch does."""

import copy
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastnn
from fastnn.graph import stretches
from fastnn.ops.network import InferenceNetwork

Function = Callable[["Between", Tensor, Tensor, Tensor], Tensor]


class Between(nn.Module):
    """A function of what two linear layers give, and of classes, before an activation."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Linear(6, 8), nn.Linear(8, 8), function
        self.bilinear, self.norm = nn.Bilinear(8, 8, 4), nn.LocalResponseNorm(3)
        self.classes, self.squares, self.logits = nn.CrossEntropyLoss(), nn.MSELoss(), nn.BCEWithLogitsLoss()
        self.drops, self.attends = nn.AlphaDropout(0.4), nn.MultiheadAttention(8, 2, batch_first=True)
        self.register_buffer("places", torch.tensor([[3, 0], [1, 1]]))
        self.register_buffer("hidden", torch.full((5, 5), float("-inf")).triu(1))

    def forward(self, x: Tensor, classes: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        return torch.tanh(self.function(self, h, self.second(h), classes))


def drop_path(x: Tensor, keep: float = 0.7) -> Tensor:
    """As timm has it."""
    mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
    if keep > 0.0:
        mask.div_(keep)
    return x * mask


def stochastic_depth(x: Tensor, keep: float = 0.7) -> Tensor:
    """As torchvision has it."""
    noise = torch.empty([x.shape[0]] + [1] * (x.dim() - 1), dtype=x.dtype, device=x.device)
    noise = noise.bernoulli_(keep)
    noise.div_(keep)
    return x * noise


def unpacked(x: Tensor) -> Tensor:
    first, second = x.view(5, 2, 4).permute(1, 0, 2)
    return first * second


FUNCTIONS: dict[str, Function] = {
    "reciprocal": lambda m, h, k, t: torch.reciprocal(h + 1) + (h + 2).reciprocal(),
    "negative powers": lambda m, h, k, t: (h + 1) ** -1 + (h + 2).pow(-1),
    "clone": lambda m, h, k, t: h.clone() * 2,
    "ravel": lambda m, h, k, t: h.ravel() + torch.ravel(k),
    "narrow": lambda m, h, k, t: h.narrow(1, 1, 4) + torch.narrow(k, -1, 0, 4),
    "movedim": lambda m, h, k, t: h.view(5, 2, 4).movedim(0, 2) + torch.moveaxis(k.view(5, 2, 4), 0, 2),
    "movedim back": lambda m, h, k, t: h.view(5, 2, 4).movedim(-1, -3),
    "amin": lambda m, h, k, t: k.amin(1) + torch.amin(h, (0, 1)),
    "min": lambda m, h, k, t: k.min(1)[0] + torch.min(h, -1).values,
    "addcmul": lambda m, h, k, t: torch.addcmul(h, k, h, value=0.5) + h.addcmul(k, k),
    "addcdiv": lambda m, h, k, t: torch.addcdiv(h, k, h + 9),
    "lerp by a number": lambda m, h, k, t: torch.lerp(h, k, 0.3) + h.lerp(k, 0.8),
    "lerp by a tensor": lambda m, h, k, t: torch.lerp(h, k, torch.sigmoid(h * 3 - k)),
    "softmin": lambda m, h, k, t: F.softmin(k, 1),
    "round": lambda m, h, k, t: (5 * k).round() + h,
    "floor and ceil": lambda m, h, k, t: torch.floor(3 * k) + torch.ceil(5 * h),
    "straight through": lambda m, h, k, t: k + ((4 * k).round() / 4 - k).detach(),
    "local response norm": lambda m, h, k, t: m.norm(h[None]) + F.local_response_norm(k[None], 2, 0.5, 0.6, 2.0),
    "local response norm of images": lambda m, h, k, t: F.local_response_norm(h.view(1, 5, 2, 4), 4, 1.0),
    "cumsum": lambda m, h, k, t: k.cumsum(1) + torch.cumsum(h, -2),
    "bilinear": lambda m, h, k, t: m.bilinear(h, k) + F.bilinear(k, h, m.bilinear.weight),
    "huber loss": lambda m, h, k, t: F.huber_loss(h, k, delta=0.3),
    "squares": lambda m, h, k, t: F.mse_loss(h, k) + m.squares(k, h) + F.mse_loss(h, k, reduction="none").sum(),
    "absolute differences": lambda m, h, k, t: F.l1_loss(h, k, reduction="sum") / 100,
    "smooth differences": lambda m, h, k, t: F.smooth_l1_loss(h, k) + F.smooth_l1_loss(h, k, beta=0.2),
    "logits": lambda m, h, k, t: m.logits(k, h) + F.binary_cross_entropy_with_logits(h, k.sigmoid()),
    "classes": lambda m, h, k, t: m.classes(k, t) + F.cross_entropy(h, t, ignore_index=-1, reduction="sum") / 9,
    "classes as language models have them": lambda m, h, k, t: F.cross_entropy(k.view(-1, 8), t.view(-1)),
    "classes of logarithms": lambda m, h, k, t: F.nll_loss(k.log_softmax(1), t, reduction="none"),
    "parts of a split": lambda m, h, k, t: h.split(4, 1)[0] * k.split(4, -1)[1],
    "parts in another order": lambda m, h, k, t: h.split(2, 1)[3] * k.unbind(1)[2][:, None] + k.split(2, 1)[1],
    "windows": lambda m, h, k, t: h.unfold(-1, 3, 2) * 2,
    "windows of the last dimension but one": lambda m, h, k, t: h.view(5, 4, 2).unfold(-2, 2, 1),
    "unpacked": lambda m, h, k, t: unpacked(h),
    "a power of a size": lambda m, h, k, t: (h @ k.t()) * (k.shape[-1] // 2) ** -0.5,
    "sizes": lambda m, h, k, t: h.sum(1) / h.size(1) + k.mean(1) * k.size(0),
    "an index of other sizes": lambda m, h, k, t: k[m.places.view(-1)] + m.second.weight[m.places.flatten()],
    "rows by numbers": lambda m, h, k, t: h[t % 5] + k.index_select(0, (t + 1) % 5),
    "rows by a matrix of numbers": lambda m, h, k, t: k[(t % 5).view(1, 5)],
    "messages": lambda m, h, k, t: torch.zeros_like(h).index_add_(0, t % 5, k) + h.index_add(0, t % 2, k),
    "counts": lambda m, h, k, t: torch.zeros(9).index_add_(0, t, k[:, 0]),
    "alpha dropout": lambda m, h, k, t: F.alpha_dropout(h, 0.3, True) + m.drops(k),
    "attention to another sequence": lambda m, h, k, t: m.attends(h[None], k[None], k[None], need_weights=False)[0],
    "a linear layer of a part of a weight": lambda m, h, k, t: F.linear(h, m.second.weight[2:6], m.second.bias[2:6]),
    "a mask that is a buffer": lambda m, h, k, t: F.scaled_dot_product_attention(h[None], k[None], k[None], m.hidden),
    "random numbers like others": lambda m, h, k, t: h * torch.rand_like(h) + torch.randn_like(k),
    "random numbers": lambda m, h, k, t: h * torch.rand(8) + torch.randn(5, 1),
    "random numbers in place": lambda m, h, k, t: h + torch.empty_like(h).normal_() + k.new_empty(5, 8).uniform_(),
    "random numbers like a copy": lambda m, h, k, t: h * torch.rand_like(h.t().clone()).t() + k.t().flip(0).t(),
    "random numbers like what is turned around": lambda m, h, k, t: h * torch.rand_like(k.t().flip(0)).t(),
    "whole rows that drop": lambda m, h, k, t: drop_path(h) + stochastic_depth(k.view(5, 2, 4)).view(5, 8),
    "rows that an older form drops": lambda m, h, k, t: h.div(0.7) * (0.7 + torch.rand(h.shape[0], 1)).floor_(),
}
_DRAW = ("random", "drop")


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stretches, "_LEAST_COST", 1)
    monkeypatch.setattr(stretches, "_LEAST_CALLS", 1)


def run(model: nn.Module, x: Tensor, classes: Tensor) -> Tensor:
    torch.manual_seed(1)
    result: Tensor = model(x, classes)
    return result


@pytest.mark.usefixtures("float64_by_default")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_is_part_of_a_network(name: str) -> None:
    model, x, classes = Between(FUNCTIONS[name]), torch.randn(5, 6), torch.randint(8, (5,))
    fused = fastnn.fuse(copy.deepcopy(model))
    expected, actual = run(model, x, classes), run(fused, x, classes)
    torch.testing.assert_close(actual, expected)
    gradient = torch.randn_like(expected)
    expected.backward(gradient)
    actual.backward(gradient)
    for (which, want), got in zip(model.named_parameters(), fused.parameters(), strict=True):
        if want.grad is not None:
            torch.testing.assert_close(got.grad, want.grad, msg=lambda text, which=which: f"{which}: {text}")
    assert str(fastnn.explain(fused)).count("one function") == 1
    with torch.no_grad():
        torch.testing.assert_close(run(fused, x, classes), expected.detach())
    draws = any(word in name for word in _DRAW)  # which no network does in inference
    assert str(fastnn.explain(fused)).count("one call") == (0 if draws else 1)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_is_part_of_a_step(name: str) -> None:
    model, x, classes = Between(FUNCTIONS[name]), torch.randn(5, 6), torch.randint(8, (5,))
    stepped = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = fastnn.training_step(stepped, lambda y, _: y.square().sum(), torch.optim.SGD(stepped.parameters(), lr=0.1))
    for seed in range(3):
        torch.manual_seed(seed)
        actual = step((x, classes), x)
        torch.manual_seed(seed)
        optimizer.zero_grad()
        expected = model(x, classes).square().sum()
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert "autograd" not in step.explain()


# Each is left to torch, at least for these sizes.
LEFT: dict[str, Function] = {
    "a part that is not whole": lambda m, h, k, t: h.split(3, 1)[2] + k.split(5, 1)[1][:, :2],
    "a part of the batch that is not whole": lambda m, h, k, t: h.split(4)[1] * 2,
    "the last part": lambda m, h, k, t: h.split(4, 1)[-1],
    "a power of a size as a size": lambda m, h, k, t: h.reshape(-1)[: h.size(1) ** 2 // 2].view(h.size(1) ** 1, -1),
    "a power of a power": lambda m, h, k, t: h * ((h.size(0) ** 0.5) ** 2 - h.size(0)) * 1e14,
    "a power times a size": lambda m, h, k, t: h * (h.size(0) ** -0.5 * h.size(1)),
    "integers times a power": lambda m, h, k, t: h + torch.arange(8) * h.size(0) ** -0.5,
    "no noise": lambda m, h, k, t: h * h.new_empty(() + (1,) * (h.ndim - -1)).uniform_(),
    "a norm without a power": lambda m, h, k, t: F.local_response_norm((h * 1e30)[None], 3, beta=0.0) * 1e-30,
    "no windows": lambda m, h, k, t: h + h.unfold(-1, 0, 1).sum(),
    "rows of several dimensions": lambda m, h, k, t: m.bilinear(h[None], k[None]),
    "a power that is neither a square nor a root": lambda m, h, k, t: (h * 0 + 1) ** -0.5 * k,
}


@pytest.mark.usefixtures("float64_by_default")
@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_to_torch(name: str) -> None:
    model, x, classes = Between(LEFT[name]), torch.randn(5, 6), torch.randint(8, (5,))
    fused = fastnn.fuse(copy.deepcopy(model))
    for _ in range(5):  # operators that refuse are asked three times
        expected, actual = run(model, x, classes), run(fused, x, classes)
        torch.testing.assert_close(actual, expected)
        with torch.no_grad():
            torch.testing.assert_close(run(fused, x, classes), expected.detach())
    expected.sum().backward()
    actual.sum().backward()
    torch.testing.assert_close(fused.first.weight.grad, model.first.weight.grad)


REFUSED: dict[str, Function] = {
    "a split without parts": lambda m, h, k, t: h.split(0, 1)[0],
    "a place that is not there": lambda m, h, k, t: h.movedim(5, 5),
    "an index of another dtype": lambda m, h, k, t: h[m.places.view(torch.float64)],
    "a tuple and a list": lambda m, h, k, t: h * h.new_empty([5] + (1,) * (h.ndim - 1)).uniform_(),
    "operands of other rows": lambda m, h, k, t: m.bilinear(h[:1], k),
    "a size where a tensor should be": lambda m, h, k, t: torch.maximum(h, h.size(0) ** -0.5),
    "a row beyond the tensor": lambda m, h, k, t: h[t + 5],
    "rows by a matrix in index_select": lambda m, h, k, t: h.index_select(0, (t % 5).view(1, 5)),
    "more rows to add than indices": lambda m, h, k, t: h.index_add(0, (t % 5)[:3], k),
    "a part beyond the tensor": lambda m, h, k, t: h.narrow(1, 5, 4),
    "a part of a split that is not there": lambda m, h, k, t: h.split(4, 1)[2],
    "windows that are too large": lambda m, h, k, t: h.unfold(-1, 9, 1),
    "a sum along a dimension that is not there": lambda m, h, k, t: h.cumsum(2),
    "classes of several dimensions": lambda m, h, k, t: F.cross_entropy(k.view(5, 2, 4), t),
    "more classes than rows": lambda m, h, k, t: F.cross_entropy(k[:3], t),
    "a class beyond the last": lambda m, h, k, t: F.cross_entropy(k[:, :2], t.clamp_min(5)),
    "a norm of one row": lambda m, h, k, t: F.local_response_norm(h, 3),
    "more tensors than there are": lambda m, h, k, t: sum(unpacked(h[:, :6].reshape(3, 2, 5))),
    "other operands of a loss": lambda m, h, k, t: F.smooth_l1_loss(h, k[:3]),
}


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("name", REFUSED)
def test_what_stock_refuses_is_refused(name: str) -> None:
    model, x, classes = Between(REFUSED[name]), torch.randn(5, 6), torch.randint(8, (5,))
    errors = (RuntimeError, ValueError, IndexError, TypeError)
    with pytest.raises(errors):
        model(x, classes)
    fastnn.fuse(model)
    for records in (True, False):
        with torch.set_grad_enabled(records), pytest.raises(errors):
            model(x, classes)


def test_classes_that_are_ignored() -> None:
    """A network refuses them, and the model computes its loss by itself: also where they count from the end."""
    model = Between(lambda m, h, k, t: F.cross_entropy(k.repeat(1, 20), t))
    x, classes = torch.randn(5, 6), torch.tensor([3, -100, 159, 0, -100])
    fused = fastnn.fuse(copy.deepcopy(model))
    torch.testing.assert_close(fused(x, classes), model(x, classes))


@pytest.mark.parametrize("name", ["reciprocal", "amin"])
def test_a_result_that_backward_needs_may_not_change(name: str) -> None:
    model = Between(lambda m, h, k, t: getattr(h + 1, name)().mul_(2) * 3)
    for one in (model, fastnn.fuse(copy.deepcopy(model))):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            one(torch.randn(5, 6), torch.zeros(5, dtype=torch.int64)).sum().backward()


def test_a_power_of_a_size_stays_a_number() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, float]:
            return torch.tanh(self.layer(x)) * x.size(-1) ** -0.5, x.size(-1) ** -0.5

    model = fastnn.fuse(Scaled())
    for records in (True, False):
        with torch.set_grad_enabled(records):
            assert type(model(torch.randn(2, 6))[1]) is float
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        fastnn.fuse(Between(lambda m, h, k, t: h * h.size(0) ** -1))(torch.randn(0, 6), torch.zeros(0).long())


def test_an_infinite_end_of_an_interpolation() -> None:
    ends = torch.tensor([[float("inf"), 1.0, -1.0, 2.0]], requires_grad=True)
    for weights in (torch.tensor([[0.0, 0.3, 0.9, 1.0]]), torch.tensor([[0.7, 1.0, 0.2, 0.0]])):
        results = []
        for fuses in (False, True):
            model = Between(lambda m, h, k, t, w=weights: torch.lerp(ends, k[:, :4], w))
            torch.manual_seed(3)
            for parameter in model.parameters():
                nn.init.normal_(parameter)
            ends.grad = None
            (fastnn.fuse(model) if fuses else model)(torch.ones(5, 6), torch.zeros(5).long()).sum().backward()
            results.append((ends.grad.clone(), model.second.weight.grad.clone()))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, equal_nan=True)


def test_rows_that_are_counted_from_the_end() -> None:
    model = Between(lambda m, h, k, t: h[t % 5 - 5] * k[t % 5 > 2].sum())
    x, numbers = torch.randn(5, 6), torch.randint(8, (5,))
    torch.testing.assert_close(fastnn.fuse(copy.deepcopy(model))(x, numbers), model(x, numbers))


def test_an_operand_that_a_loss_broadcasts_is_warned_of() -> None:
    model = fastnn.fuse(Between(lambda m, h, k, t: F.mse_loss(h, k[:1])))
    for _ in range(2):
        with pytest.warns(UserWarning, match="Using a target size"):
            model(torch.randn(5, 6), torch.zeros(5, dtype=torch.int64))


def test_a_mask_of_a_buffer_may_change() -> None:
    model = Between(FUNCTIONS["a mask that is a buffer"])
    fused, x, classes = fastnn.fuse(copy.deepcopy(model)), torch.randn(5, 6), torch.randint(8, (5,))
    for _ in range(2):
        torch.testing.assert_close(run(fused, x, classes), run(model, x, classes))
        for one in (model, fused):
            one.hidden.zero_()


def test_a_loop_over_steps_that_is_no_network_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its trace is for inputs of certain sizes. Steps on inputs of these sizes do not trace it again."""

    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h, total = torch.tanh(self.layer(x)), 0.0
            for step in range(h.size(1)):
                total = total + torch.cumprod(h[:, step], -1)
            return self.head(total)

    model = Products()
    step = fastnn.training_step(model, F.mse_loss, torch.optim.SGD(model.parameters(), lr=0.1))
    x, target = torch.randn(6, 5, 3), torch.randn(6, 2)
    step(x, target)
    assert "cumprod" in step.explain()

    def read(*_: object) -> None:
        raise AssertionError("the model is read again")

    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["fastnn.training_step"], "Reading", read)
        for _ in range(3):
            step(x, target)
    step(torch.randn(6, 4, 3), target)  # other sizes


class Viewed(nn.Module):
    def __init__(self, views: bool) -> None:
        super().__init__()
        self.layer, self.views = nn.Linear(6, 8), views

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.layer(x))
        return y.flatten() * x.unsqueeze(0).view(-1)[0] if self.views else y * 2


def test_parts_of_tensors_go_into_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where stock's results would be contiguous; but no view may be of what torch refuses to view."""
    whole, calls = torch.randn(5, 9), []
    run_network = InferenceNetwork.run

    def run(self: InferenceNetwork, tensors: list[Tensor]) -> list[Tensor]:
        calls.append(tensors)
        return run_network(self, tensors)

    monkeypatch.setattr(InferenceNetwork, "run", run)
    with torch.no_grad():
        for x, is_taken in ((whole[:, :6], True), (whole[::2, 1:7], True), (whole[:1].t()[:6].t(), True),
                            (torch.randn(6, 5).t(), False), (torch.randn(6).expand(5, 6), False)):  # fmt: skip
            model = Viewed(False)
            calls.clear()
            torch.testing.assert_close(fastnn.fuse(copy.deepcopy(model))(x), model(x))
            assert bool(calls) == is_taken
        for x in (whole[:, :6], torch.randn(5, 6)):
            model = Viewed(True)
            fused = fastnn.fuse(copy.deepcopy(model))
            if x.is_contiguous():
                torch.testing.assert_close(fused(x), model(x))
            else:
                for one in (model, fused):
                    with pytest.raises(RuntimeError, match="view size is not compatible"):
                        one(x)


class StridedWeights(nn.Module):
    """A layer whose weight is the transpose of another's, and a norm whose weight and bias are columns of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.pairs = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6, 2))
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(torch.sigmoid(F.linear(x, self.weight)), self.weight.t())
        return self.last(F.group_norm(x, 2, self.pairs[:, 0], self.pairs[:, 1]))


def test_weights_that_are_views() -> None:
    model, x, y = StridedWeights().double(), torch.randn(5, 6).double(), torch.randn(5, 3).double()
    mine = copy.deepcopy(model)
    theirs, ours = (torch.optim.SGD(one.parameters(), 0.1) for one in (model, mine))
    step = fastnn.training_step(mine, F.mse_loss, ours, strict=True)
    for _ in range(3):
        theirs.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        theirs.step()
        torch.testing.assert_close(step(x, y), loss.detach())
    torch.testing.assert_close(list(mine.parameters()), list(model.parameters()))
