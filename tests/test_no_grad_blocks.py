"""Forwards with ``torch.no_grad()`` blocks: what comes out of a block has no gradient, and whatever else such a block
changes ends the trace."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.testing import assert_close

import fastnn
from fastnn.graph import stretches

pytestmark = pytest.mark.usefixtures("float64_by_default")


class Blocks(nn.Module):
    """Layers, and a function of the module and the input."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.lstm = nn.Linear(6, 6), nn.Linear(6, 6), nn.LSTM(6, 6, batch_first=True)
        self.norm, self.drop = nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Linear(8, 6))
        self.attention = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.register_buffer("mean", torch.zeros(6))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


@torch.no_grad()
def _nearest(rows: Tensor, codes: Tensor) -> Tensor:
    """The number of the nearest code for each row, as where vectors are quantized."""
    return ((rows[:, None] - codes) ** 2).sum(-1).argmin(1)


def _backbone(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        features = m.backbone(x)
    return m.b(torch.tanh(features))


def _weights(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    with torch.no_grad():
        scale = h.abs().amax(1, keepdim=True)
        shares = torch.softmax(h * scale, 1)
    return m.b(h * shares) / scale


def _codes(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    chosen = F.embedding(_nearest(h, m.b.weight), m.b.weight)
    return h + (chosen - h).detach() + F.mse_loss(chosen, h.detach())


def _result_of_a_block(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    h = m.a(x)
    with torch.no_grad():
        return m.b(h), m.lstm(x[:, None])[0][:, 0]


def _nested(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    with torch.no_grad(), torch.no_grad():
        with torch.no_grad():
            k = h * 2
        k = k + (1.0 if torch.is_grad_enabled() else 3.0)
    with torch.no_grad():
        k = k * h
    return m.b(h * k) + (5.0 if torch.is_grad_enabled() else 7.0)


def _tuples(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        out, (h, c) = m.lstm(m.a(x)[:, None])
        best = torch.max(x, dim=1)
        some = (x * 2).split(2, dim=1)
        rows = x.size(0)
    return m.b(out[:, 0] * best.values[:, None] + h[0] - c[0]) * some[1].sum() / rows


def _sizes(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        n, shape = x.size(0), x.shape
    return m.a(x).view(n, 2, -1).sum(1).repeat(1, 2) / shape[0]


def _in_place_of_its_own(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    with torch.no_grad():
        k = h * 2
        k.clamp_(min=0.1)
        k[:, 0] = 1.0
        k += x
    k = k + 1
    return m.b(h / k)


def _later_in_place(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    with torch.no_grad():
        k = h * 2
    k.mul_(h)  # now the gradient of h goes through it
    return m.b(k) + k


def _in_place(m: Any, x: Tensor) -> Tensor:
    h = m.a(x) * 1.5
    with torch.no_grad():
        h.mul_(2)
    return m.b(h)


def _view_in_place(m: Any, x: Tensor) -> Tensor:
    h = m.a(x) * 1.5
    with torch.no_grad():
        view = h[:, :3]
        view += 1
    return m.b(h)


def _same_tensor(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    with torch.no_grad():
        same = h.contiguous()  # It is h itself, so that its gradient is recorded.
        k = F.dropout(h, 0.5, training=False)
    return m.b(same * x) + k


def _view(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    with torch.no_grad():
        view = h.view(-1)
        doubled = view * 2
    return m.b(doubled.view(5, 6) * x)


def _view_that_leaves(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    with torch.no_grad():
        view = h[:, 1:]
    return m.b(h) * view[:, :1]


def _new_leaf(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        k = (x * 2).requires_grad_()
    return m.b(k)


def _the_second_of_two(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(m.a(x))
    with torch.no_grad():
        p, q = torch.atleast_1d(x * 2, h)  # q is h itself
    return m.b(q) * p


def _the_second_in_place(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    with torch.no_grad():
        p, q = torch.broadcast_tensors(x * 2, h)
        q.mul_(2)
    return m.b(h) * p


def _tuples_that_are_added(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    with torch.no_grad():
        both = torch.atleast_1d(h, x) + torch.atleast_1d(h, x)
    return m.b(both[0])


def _written_by_position(m: Any, x: Tensor) -> Tensor:
    h, out = m.a(x), torch.zeros(5, 1)
    with torch.no_grad():
        torch.norm(h, 2, 1, True, out)
    return m.b(h) * out


def _a_part_in_place_later(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        first, _ = m.a(x).split(3, dim=1)
    first += 1
    return m.b(x)[:, :3] * first


def _rounds_down(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        steps = m.a(x) * (m.b.bias // 0.01 * 0.01)
    return m.b(x + steps)


def _a_leaf(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        leaf = torch.zeros(6, requires_grad=True)
        leaf.add_(1)
    return m.b(m.a(x)) * leaf, leaf * 2


def _asks_for_the_class(m: Any, x: Tensor) -> Tensor:
    block = torch.no_grad()
    return m.b(m.a(x)) * (2.0 if isinstance(block, torch.no_grad) else 3.0)


def _average(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    with torch.no_grad():
        m.mean.lerp_(h.mean(0), 0.1)
    return m.b(h - m.mean)


def _asks_a_result(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        k = m.a(x)
        factor = 2.0 if k.requires_grad else 3.0
    return m.b(x * factor) + (2.0 if k.requires_grad else 3.0)


def _attention(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        k = m.attention(x[:, None])
    return m.b(k[:, 0])


def _raises_and_goes_on(m: Any, x: Tensor) -> Tensor:
    try:
        with torch.no_grad():
            k = m.a(x)
            raise KeyError
    except KeyError:
        k = m.a(x)
    return m.b(k)


def _other_blocks(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        k = m.a(x)
        with torch.enable_grad():
            h = m.b(x)
    with torch.set_grad_enabled(False):
        return_value = m.b(k)
    return h * k + return_value


# The function, and whether it is traced.
FUNCTIONS: dict[str, tuple[Callable[[Any, Tensor], Any], bool]] = {
    "a backbone": (_backbone, True),
    "weights": (_weights, True),
    "codes": (_codes, True),
    "a result of a block": (_result_of_a_block, True),
    "nested blocks": (_nested, True),
    "tuples": (_tuples, True),
    "sizes": (_sizes, True),
    "in place, its own": (_in_place_of_its_own, True),
    "in place, later": (_later_in_place, True),
    "in place": (_in_place, False),
    "in place, a view": (_view_in_place, False),
    "the same tensor": (_same_tensor, False),
    "a view": (_view, True),
    "a view that leaves": (_view_that_leaves, False),
    "a new leaf": (_new_leaf, False),
    "the second of two": (_the_second_of_two, False),
    "the second, in place": (_the_second_in_place, False),
    "tuples that are added": (_tuples_that_are_added, False),
    "written by position": (_written_by_position, False),
    "a part, in place later": (_a_part_in_place_later, False),
    "rounds down": (_rounds_down, False),
    "a leaf": (_a_leaf, False),
    "the class of a block": (_asks_for_the_class, False),
    "a moving average": (_average, False),
    "a result that is asked": (_asks_a_result, False),
    "attention": (_attention, False),
    "an exception": (_raises_and_goes_on, False),
    "other blocks": (_other_blocks, False),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_as_stock(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stretches, "_LEAST_COST", 1)
    monkeypatch.setattr(stretches, "_LEAST_CALLS", 1)
    function, is_traced = FUNCTIONS[name]
    stock = Blocks(function)
    fused = fastnn.fuse(copy.deepcopy(stock))
    for number in range(4):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(number))
        found: list[Any] = []
        for model in (stock, fused):
            model.train(number < 3)
            model.zero_grad()
            given = x.clone().requires_grad_()
            results = model(given)
            loss = sum(one.square().sum() for one in (results if isinstance(results, tuple) else (results,)))
            if loss.requires_grad:
                loss.backward()
            with torch.no_grad():
                alone = model(x)
            found.append((results, alone, given.grad, *[p.grad for p in model.parameters()], *model.buffers()))
        for ours, theirs in zip(found[1], found[0], strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        requires = [[one.requires_grad for one in torch.utils._pytree.tree_leaves(some[0])] for some in found]
        assert requires[0] == requires[1]
    forward = fused.__dict__["forward"]
    assert (bool(forward.traces[True]) and forward.why is None) == is_traced, forward.why


def _sizes_alone(m: Any, x: Tensor) -> Tensor:
    return m.b(x) + torch.zeros_like(m.a(x))


@pytest.mark.parametrize("function", [_backbone, _sizes_alone])
@pytest.mark.parametrize("loss", [nn.MSELoss(), lambda y, t: F.mse_loss(y, t) * 2, lambda y, t: (y - t).erfc().mean()])
@pytest.mark.parametrize("keep_gradients", [False, True])
def test_steps_leave_alone_what_has_no_gradient(function: Any, loss: Any, keep_gradients: bool) -> None:
    """A backbone that is not trained has neither gradients nor states, whatever decays the others; nor has a layer of
    whose result only the sizes are taken."""
    stock = Blocks(function)
    model = copy.deepcopy(stock)
    ours, theirs = (torch.optim.SGD(m.parameters(), 0.01, momentum=0.9, weight_decay=0.1) for m in (model, stock))
    step = fastnn.training_step(model, loss, ours, keep_gradients=keep_gradients)
    x, y = torch.randn(5, 6), torch.randn(5, 6)
    for _ in range(3):
        theirs.zero_grad()
        expected = loss(stock(x), y)
        expected.backward()
        theirs.step()
        assert_close(step(x, y), expected.detach())
        assert "ordinary" not in step.explain(), step.explain()
        assert "operator call" in step.explain()
    assert_close(model.state_dict(), stock.state_dict())
    found = [[p in optimizer.state for p in m.parameters()] for m, optimizer in ((model, ours), (stock, theirs))]
    assert found[0] == found[1]
    assert all((p.grad is not None) == (keep_gradients and p in ours.state) for p in model.parameters())


def test_a_step_of_what_has_no_gradient_at_all() -> None:
    def none(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            return m.a(x)

    model = Blocks(none)
    step = fastnn.training_step(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), 0.1))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="does not require grad"):
            step(torch.randn(5, 6), torch.randn(5, 6))


def test_a_step_whose_trained_weights_are_frozen() -> None:
    """What is left has no gradient, as its results are detached."""
    model = Blocks(_backbone)
    step = fastnn.training_step(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), 0.1))
    step(torch.randn(5, 6), torch.randn(5, 6))
    model.b.requires_grad_(False)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="does not require grad"):
            step(torch.randn(5, 6), torch.randn(5, 6))


def test_a_weight_of_a_block_may_change_before_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a teacher, which is an average of the student."""
    monkeypatch.setattr(stretches, "_LEAST_COST", 1)
    monkeypatch.setattr(stretches, "_LEAST_CALLS", 1)
    stock = Blocks(_weights_of_a_teacher)
    fused, x = fastnn.fuse(copy.deepcopy(stock)), torch.randn(5, 6)
    for _ in range(3):
        for model in (stock, fused):
            model.zero_grad()
            loss = model(x).square().sum()
            with torch.no_grad():
                model.a.weight.lerp_(model.b.weight, 0.1)
            loss.backward()
        for ours, theirs in zip(fused.parameters(), stock.parameters(), strict=True):
            assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


def _weights_of_a_teacher(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        target = torch.tanh(m.a(x))
    return m.b(x) * target


def test_forward_mode() -> None:
    """Tangents pass through blocks, as in stock."""
    stock = Blocks(_weights)
    fused = fastnn.fuse(copy.deepcopy(stock))
    x, tangent = torch.randn(5, 6), torch.randn(5, 6)
    for _ in range(2):
        assert_close(fused(x), stock(x))
        assert_close(torch.func.jvp(fused, (x,), (tangent,)), torch.func.jvp(stock, (x,), (tangent,)))
    first = fastnn.fuse(copy.deepcopy(stock))  # whose first call is in forward mode
    assert_close(torch.func.jvp(first, (x,), (tangent,)), torch.func.jvp(stock, (x,), (tangent,)))
    assert_close(torch.func.vmap(torch.func.grad(lambda z: first(z[None]).sum()))(x),
                 torch.func.vmap(torch.func.grad(lambda z: stock(z[None]).sum()))(x))  # fmt: skip


def test_a_weight_that_hooks_set_in_a_block() -> None:
    """Its gradient is not recorded, and the results are stock's."""
    stock = Blocks(_backbone)
    own = copy.deepcopy(stock)  # A pruned model cannot be copied.
    for model in (stock, own):
        prune.l1_unstructured(model.backbone[0], "weight", 0.3)
    fused = fastnn.fuse(own)
    x = torch.linspace(-1, 1, 30).reshape(5, 6)
    assert_close(fused(x), stock(x))
    for model in (stock, fused):
        assert not model.backbone[0].weight.requires_grad
