"""Masks: comparisons, choices between two values, attention that some keys are hidden from, and what torch computes
from the inputs alone before a network runs."""

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import fastnn
from fastnn.network_program import COMPARISONS
from fastnn.reference.network import network

# ---- layers ---------------------------------------------------------------------------------------------------------


def run(text: str, *inputs: Tensor) -> list[Tensor]:
    empty = torch.empty(0, dtype=next(one.dtype for one in inputs if one.is_floating_point()))
    return list(torch.ops.fastnn.network(list(inputs), empty, torch.empty(0, dtype=torch.uint8), text))


WHERE = """fastnn.network 1
input -> m sizes={} dtype=bool
input -> x sizes={}
input -> y sizes={}
cast input=m -> c
where condition=c input=x other=y -> a
where condition=c other=y -> b number=-inf
where condition=c input=x -> d number=2.5
output input=a,b,d"""


@pytest.mark.parametrize(
    "sizes",
    [((5,), (5,), (5,)), ((1,), (33,), (33,)), ((3, 1, 1, 7), (3, 4, 5, 7), (3, 4, 5, 7)), ((2, 5, 1), (5, 9), (1,))],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where(sizes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> None:
    mask = torch.rand(sizes[0]) > 0.5
    x, y = (torch.randn(one, dtype=dtype) for one in sizes[1:])
    for tensor in (x, y):
        tensor.view(-1)[::3] = torch.tensor([torch.nan, torch.inf, -0.0], dtype=dtype).repeat(len(tensor.view(-1)))[
            : len(tensor.view(-1)[::3])
        ]
    text = WHERE.format(*(",".join(map(str, one)) for one in sizes))
    found = run(text, mask, x, y)
    wanted = [torch.where(mask, x, y), torch.where(mask, -torch.inf, y), torch.where(mask, x, 2.5)]
    assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("function", COMPARISONS)
def test_comparisons(function: str) -> None:
    text = f"""fastnn.network 1
input -> x sizes=:
input -> y sizes=:
binary input=x other=y -> a function={function}
binary input=x -> b function={function} number=0.5
output input=a,b"""
    x, y = torch.tensor([1.0, torch.nan, torch.inf, -0.0, 0.5, torch.nan, 3.0]), torch.randn(7)
    y[0], y[3], y[5] = 1.0, 0.0, torch.nan
    wanted = [getattr(torch, function)(x, other).float() for other in (y, torch.tensor(0.5))]
    assert_close(run(text, x, y), wanted, rtol=0, atol=0)


def test_inputs_of_other_dtypes_are_refused() -> None:
    text = WHERE.format("3", "3", "3")
    x = torch.randn(3)
    for mask in (torch.randn(3), torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.uint8)):
        with pytest.raises(RuntimeError, match="expected input 0 to be bool"):
            run(text, mask, x, x)
    with pytest.raises(RuntimeError, match="expected a floating-point input"):
        run(text.replace("condition=c other", "condition=m other"), x > 0, x, x)
    with pytest.raises(RuntimeError, match="expected a cast's input to be bool"):
        run(text.replace("input=m -> c", "input=x -> c"), x > 0, x, x)
    with pytest.raises(RuntimeError, match=r"expected input=\.\.\. or other="):
        run(text.replace(" other=y -> b", " -> b"), x > 0, x, x)
    with pytest.raises(RuntimeError, match="dtype=int64, dtype=bool, or none"):
        run(text.replace("dtype=bool", "dtype=int8"), x > 0, x, x)


@pytest.mark.parametrize("mask_sizes", [(5, 7), (3, 1, 1, 7), (3, 2, 5, 7), (1, 2, 1, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_with_a_mask(mask_sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    sizes = [(3, 2, 5, 8), (3, 2, 7, 8), (3, 2, 7, 8), mask_sizes]
    lines = "\n".join(
        f"input -> {name} sizes={','.join(map(str, size))}" for name, size in zip("qkvm", sizes, strict=True)
    )
    text = f"fastnn.network 1\n{lines}\nattention query=q key=k value=v mask=m -> y\noutput input=y"
    q, k, v, m = (torch.randn(size, dtype=dtype) for size in sizes)
    m[torch.rand(mask_sizes) > 0.6] = -torch.inf
    m[..., 0, :] = -torch.inf  # a query that sees no key
    exact = network([one.double() for one in (q, k, v, m)], [], text)
    assert_close([one.double() for one in run(text, q, k, v, m)], exact, rtol=1e-5, atol=1e-6)


# ---- models ---------------------------------------------------------------------------------------------------------


class Causal(nn.Module):
    """Attention as many write it by hand, with a mask that the module holds."""

    def __init__(self, boolean: bool) -> None:
        super().__init__()
        self.embedding, self.place = nn.Embedding(50, 16), nn.Embedding(12, 16)
        self.qkv, self.out, self.head = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 50)
        mask = torch.tril(torch.ones(12, 12)).view(1, 1, 12, 12)
        self.register_buffer("mask", mask.bool() if boolean else mask)
        self.boolean = boolean

    def attend(self, x: Tensor) -> Tensor:
        batch, steps, features = x.size()
        q, k, v = (
            one.view(batch, steps, 4, features // 4).transpose(1, 2) for one in self.qkv(x).split(features, dim=2)
        )
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        shown = self.mask[:, :, :steps, :steps]  # type: ignore[index]
        scores = scores.masked_fill(~shown if self.boolean else shown == 0, float("-inf"))
        y = F.softmax(scores, dim=-1) @ v
        return self.out(y.transpose(1, 2).contiguous().view(batch, steps, features))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.place(torch.arange(0, tokens.size(1)))
        return self.head(x + self.attend(x))


class Function(nn.Module):
    """A function of an input and of some layers."""

    def __init__(self, function: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)
        self.register_buffer("offsets", torch.tensor([0, 10, 25]))
        self.register_buffer("hidden", torch.tensor([False, True, False, True, False]))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, self.layers, x)


class FunctionOfTwo(Function):
    """A function of two inputs and of some layers."""

    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        return self.function(self, self.layers, x, y)


def _heads(x: Tensor) -> Tensor:
    return x.view(x.size(0), x.size(1), 4, -1).transpose(1, 2)


def _padded(self: Any, layers: Any, tokens: Tensor) -> Tensor:
    embedding, q, k, v, head = layers
    x, mask = embedding(tokens), tokens != 0
    scores = (q(x) @ k(x).transpose(1, 2) / 4.0).masked_fill(~mask.unsqueeze(1), -1e9)
    y, shown = scores.softmax(-1) @ v(x), mask.unsqueeze(-1).float()
    return head((y * shown).sum(1) / shown.sum(1).clamp(min=1))


def _shown(self: Any, layers: Any, tokens: Tensor) -> Tensor:
    embedding, q, k, v, head = layers
    x, mask = embedding(tokens), tokens != 0
    y = F.scaled_dot_product_attention(_heads(q(x)), _heads(k(x)), _heads(v(x)), attn_mask=mask[:, None, None, :])
    y = y.transpose(1, 2).flatten(2)
    return head(torch.where(mask.unsqueeze(-1), y, torch.zeros_like(y)).sum(1))


def _set(self: Any, layers: Any, x: Tensor, mask: Tensor) -> Tensor:
    first, last = layers
    h = torch.relu(first(x)).masked_fill(~mask.unsqueeze(-1), 0.0)
    return last(h.sum(1) / mask.sum(1, keepdim=True))


def _thresholds(self: Any, layers: Any, x: Tensor) -> Tensor:
    first, last = layers
    h = first(x)
    h = torch.where((h > -0.5) & ~(h > 0.5) | (h < -1.0), h, 0.25 * h)
    return last(h * (h >= 0.1) + (h != 2.0).float())


def _lengths(self: Any, layers: Any, x: Tensor, lengths: Tensor) -> Tensor:
    rnn, last = layers
    y, _ = rnn(x)
    mask = torch.arange(x.size(1))[None, :] < lengths[:, None]
    return last((y * mask.unsqueeze(-1)).sum(1) / lengths.unsqueeze(1))


def _columns(self: Any, layers: Any, x: Tensor) -> Tensor:
    embedding, last = layers
    return last(embedding(x + self.offsets).flatten(1))


def _conditional(self: Any, layers: Any, x: Tensor, label: Tensor) -> Tensor:
    first, last = layers
    return last(torch.tanh(first(torch.cat([x, F.one_hot(label, 10).float()], 1))))


def _bytes(self: Any, layers: Any, x: Tensor) -> Tensor:
    conv, last = layers
    return last(torch.relu(conv(x.float() / 255.0)).mean((2, 3)))


def _in_place(self: Any, layers: Any, x: Tensor) -> Tensor:
    first, last = layers
    h = first(x) * 2.0
    return last(h.masked_fill_(self.hidden, 3.0))


def _by_method(self: Any, layers: Any, x: Tensor) -> Tensor:
    first, last = layers
    h = first(x)
    return last(h.where(self.hidden.logical_not(), -h))


def _last_steps(self: Any, layers: Any, x: Tensor, lengths: Tensor) -> Tensor:
    rnn, last = layers
    y, _ = rnn(x)
    return last(y[torch.arange(y.size(0)), lengths - 1])


def _picked_steps(self: Any, layers: Any, x: Tensor, places: Tensor) -> Tensor:
    first, last = layers
    y = torch.tanh(first(x))
    return last(y[places % 4, places - 2])  # some are taken several times, and some are counted from the end


def _functions(self: Any, layers: Any, x: Tensor) -> Tensor:
    first, last = layers
    h = first(x)
    h = torch.maximum(h, x) + torch.minimum(h, 0.5 * x[:1]) + h.maximum(x.flip(1))
    return last(F.threshold(h, 0.1, -0.2) + F.hardshrink(h, 0.3) + F.celu(h, 0.7))


TOKENS = torch.randint(1, 50, (4, 9), generator=torch.Generator().manual_seed(0))
TOKENS[:2, 6:] = 0
ATTENTION = (
    lambda: nn.Embedding(50, 16, padding_idx=0),
    *(lambda: nn.Linear(16, 16) for _ in range(3)),
    lambda: nn.Linear(16, 3),
)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "causal": (lambda: Causal(False), (TOKENS,)),
    "causal, of booleans": (lambda: Causal(True), (TOKENS,)),
    "padded": (lambda: Function(_padded, *(make() for make in ATTENTION)), (TOKENS,)),
    "shown": (lambda: Function(_shown, *(make() for make in ATTENTION)), (TOKENS,)),
    "a set": (
        lambda: FunctionOfTwo(_set, nn.Linear(5, 16), nn.Linear(16, 3)),
        (torch.randn(4, 6, 5), torch.arange(24).view(4, 6) % 3 != 1),
    ),
    "thresholds": (lambda: Function(_thresholds, nn.Linear(5, 16), nn.Linear(16, 3)), (torch.randn(4, 5),)),
    "lengths": (
        lambda: FunctionOfTwo(_lengths, nn.GRU(5, 8, batch_first=True), nn.Linear(8, 3)),
        (torch.randn(4, 6, 5), torch.tensor([6, 2, 4, 1])),
    ),
    "columns": (
        lambda: Function(_columns, nn.Embedding(40, 6), nn.Linear(18, 3)),
        (torch.tensor([[1, 9, 3], [0, 2, 14]]),),
    ),
    "a label": (
        lambda: FunctionOfTwo(_conditional, nn.Linear(15, 16), nn.Linear(16, 3)),
        (torch.randn(4, 5), torch.tensor([3, 9, 0, 0])),
    ),
    "bytes": (
        lambda: Function(_bytes, nn.Conv2d(3, 8, 3), nn.Linear(8, 3)),
        (torch.arange(2 * 3 * 81, dtype=torch.uint8).view(2, 3, 9, 9),),
    ),
    "in place": (lambda: Function(_in_place, nn.Linear(5, 5), nn.Linear(5, 3)), (torch.randn(4, 5),)),
    "a method": (lambda: Function(_by_method, nn.Linear(5, 5), nn.Linear(5, 3)), (torch.randn(4, 5),)),
}


def gradients(model: nn.Module, inputs: tuple[Tensor, ...], target: Tensor) -> list[Tensor | None]:
    model.zero_grad()
    F.mse_loss(model(*inputs), target).backward()
    return [p.grad for p in model.parameters()]


def check(model: nn.Module, inputs: tuple[Tensor, ...], steps: int = 3) -> fastnn.TrainingStep:
    """Holds fuse, in inference and under autograd, and a training step against stock -> the step."""
    fused = fastnn.fuse(copy.deepcopy(model))
    for own in (model, fused):
        own.eval()
    with torch.no_grad():
        wanted = model(*inputs)
        assert_close(fused(*inputs), wanted)
    target = torch.randn_like(wanted)
    for own in (model, fused):
        own.train()
    torch.manual_seed(1)
    expected = gradients(model, inputs, target)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert_close(gradients(fused, inputs, target), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.get_rng_state(), state)
    trained = copy.deepcopy(model)
    stock = torch.optim.SGD(model.parameters(), lr=0.1)
    step = fastnn.training_step(trained, nn.MSELoss(), torch.optim.SGD(trained.parameters(), lr=0.1))
    for seed in range(steps):
        torch.manual_seed(seed)
        stock.zero_grad()
        loss = F.mse_loss(model(*inputs), target)
        loss.backward()
        stock.step()
        torch.manual_seed(seed)
        assert_close(step(inputs if len(inputs) > 1 else inputs[0], target), loss.detach(), rtol=1e-4, atol=1e-5)
    assert_close(list(trained.parameters()), list(model.parameters()), rtol=1e-4, atol=1e-5)
    return step


def check_is_one_call(step: fastnn.TrainingStep) -> None:
    said = step.explain()
    assert said.startswith("one operator call"), said
    assert "ordinary" not in said, said


@pytest.mark.parametrize("name", MODELS)
def test_models_with_masks(name: str) -> None:
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model = make()
    frozen = fastnn.freeze(copy.deepcopy(model), inputs)
    with torch.no_grad():
        assert_close(frozen(*inputs), copy.deepcopy(model).eval()(*inputs))
    check_is_one_call(check(model, inputs))


def test_a_frozen_model_takes_its_causal_mask_in_one_call() -> None:
    for boolean in (False, True):
        model = Causal(boolean).eval()
        frozen = fastnn.freeze(model, TOKENS)
        assert isinstance(frozen, fastnn.FrozenModel)
        with torch.no_grad():
            for tokens in (TOKENS, TOKENS[:1, :4], TOKENS.repeat(3, 1), TOKENS.repeat(1, 2)[:, :12]):
                assert_close(frozen(tokens), model(tokens))
            whole = TOKENS.repeat(1, 2)[:, :12]  # as many steps as the mask has
            assert_close(fastnn.freeze(model, whole)(whole), model(whole))


def test_a_mask_is_read_anew() -> None:
    """A buffer that changes, and a mask of other sizes, are seen."""
    model = Function(_in_place, nn.Linear(5, 5), nn.Linear(5, 3))
    fused = fastnn.fuse(copy.deepcopy(model))
    step_model = copy.deepcopy(model)
    step = fastnn.training_step(step_model, nn.MSELoss(), torch.optim.SGD(step_model.parameters(), lr=0.0))
    x, target = torch.randn(4, 5), torch.randn(4, 3)
    for hidden in ([True] * 5, [False] * 5, [True, False, True, True, False]):
        for own in (model, fused, step_model):
            own.hidden.copy_(torch.tensor(hidden))  # type: ignore[operator]
        assert_close(fused(x), model(x))
        assert_close(step(x, target), F.mse_loss(model(x), target))
    model = MODELS["a set"][0]()
    fused = fastnn.fuse(copy.deepcopy(model))
    for sizes in ((4, 6), (2, 3), (1, 1)):
        x, mask = torch.randn(*sizes, 5), torch.rand(sizes) > 0.3
        mask[:, 0] = True
        assert_close(fused(x, mask), model(x, mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_a_mask_of_numbers_raises_as_stock_does(dtype: torch.dtype) -> None:
    model = FunctionOfTwo(lambda self, layers, x, mask: layers[1](layers[0](x).masked_fill(mask, 0.0)), *_two())
    x, mask = torch.randn(4, 5), torch.ones(4, 5, dtype=dtype)
    with pytest.raises(RuntimeError, match="only supports boolean masks"):
        model(x, mask)
    fused = fastnn.fuse(copy.deepcopy(model))
    step = fastnn.training_step(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1))
    for call in (lambda: fused(x, mask), lambda: step((x, mask), torch.randn(4, 3))):
        with pytest.raises(RuntimeError, match="only supports boolean masks"):
            call()
    assert_close(fused(x, mask > 0), model(x, mask > 0))


@pytest.mark.parametrize("bad", [[6, 0, 1, 2], [0, -7, 1, 2]])
def test_an_index_beyond_the_steps_raises_as_stock_does(bad: list[int]) -> None:
    model = FunctionOfTwo(lambda self, layers, x, at: layers[1](layers[0](x)[torch.arange(x.size(0)), at]), *_two())
    fused = fastnn.fuse(copy.deepcopy(model))
    trained = copy.deepcopy(model)
    step = fastnn.training_step(trained, nn.MSELoss(), torch.optim.SGD(trained.parameters(), lr=0.1))
    x, places = torch.randn(4, 6, 5), torch.tensor(bad)
    for call in (lambda: model(x, places), lambda: fused(x, places), lambda: step((x, places), torch.randn(4, 3))):
        with pytest.raises(IndexError, match="is out of bounds for dimension"):
            call()
    assert_close(fused(x, torch.tensor([2])), model(x, torch.tensor([2])))  # one place for all rows
    assert_close(fused(x, places % 5), model(x, places % 5))


def test_operands_that_are_equal_share_the_gradient() -> None:
    model = Function(lambda self, layers, x: layers[1](torch.maximum(layers[0](x), layers[0](x).detach())), *_two())
    fused = fastnn.fuse(copy.deepcopy(model))
    x, target = torch.randn(4, 5), torch.randn(4, 3)
    assert_close(gradients(fused, (x,), target), gradients(model, (x,), target))


def _two() -> tuple[nn.Module, nn.Module]:
    return nn.Linear(5, 5), nn.Linear(5, 3)


OTHERS: dict[str, Callable[..., Any]] = {
    "a sum of masks": lambda self, layers, x: layers[1](layers[0](x) * ((layers[0](x) > -1) + (x > 0))),
    "a product of masks": lambda self, layers, x: layers[1](layers[0](x) * ~((layers[0](x) > -1) * (layers[0](x) < 1))),
    "one less a mask": lambda self, layers, x: layers[1](layers[0](x) * (1 - (layers[0](x) > 0))),
    "a mask with its sign turned": lambda self, layers, x: layers[1](layers[0](x) * -(layers[0](x) > 0)),
    "a mask that is filled": lambda self, layers, x: layers[1](
        layers[0](x) * (layers[0](x) > 0).masked_fill(layers[0](x) > 1, 0.5)
    ),
    "masks side by side": lambda self, layers, x: layers[1](
        layers[0](x) * ~torch.cat([layers[0](x) > 0, layers[0](x) > 1], 1)[:, 2:7]
    ),
    "rows that a mask chooses": lambda self, layers, x: layers[1](layers[0](x)[(layers[0](x) > 0)[:, 0]]),
    "a count that is returned": lambda self, layers, x: (layers[1](layers[0](x)), (layers[0](x) > 0).sum()),
    "a mask times a number": lambda self, layers, x: (layers[1](layers[0](x)), (layers[0](x) > 0) * 2),
    "a choice between masks": lambda self, layers, x: (
        layers[1](layers[0](x)),
        torch.where(layers[0](x) > 0, layers[0](x) > 1, layers[0](x) < 2),
    ),
    "a mean of a mask": lambda self, layers, x: layers[1](layers[0](x)) * (layers[0](x) > 0).mean(),
    "a layer of a mask": lambda self, layers, x: layers[1](layers[0](x) > 0),
    "a conversion to integers": lambda self, layers, x: layers[1](layers[0](x).type_as(self.offsets)),
    "a conversion to another's dtype": lambda self, layers, x: layers[1](layers[0](x).to(self.offsets.dtype).float()),
    "integers that wrap": lambda self, layers, x: layers[1](layers[0](x) * (x * 50).to(torch.uint8).neg()),
    "whole numbers beyond float32": lambda self, layers, x: layers[1](
        layers[0](x) * (x.long() + 16777217 - 16777216 * (x < 9))
    ),
    "booleans that are converted, and a layer's own dtype": lambda self, layers, x: (
        (layers[0](x) > 0).double(),
        layers[1](layers[0](x)),
    ),
    "a number that float32 does not have": lambda self, layers, x: layers[1](layers[0](x).clamp(0).where(x > 0, 1e300)),
    "a tensor to fill with": lambda self, layers, x: layers[1](layers[0](x).masked_fill(x > 0, torch.tensor(2.0))),
    "two numbers": lambda self, layers, x: layers[1](layers[0](x) * torch.where(layers[0](x) > 0, 1.0, 0.5)),
    "a mask that is returned": lambda self, layers, x: (h := layers[0](x), m := h > 0, layers[1](h * m))[1:],
    "a mask that a mask hides": lambda self, layers, x: layers[1](layers[0](x) * (x > 0).masked_fill(x > 1, True)),
    "an integer of numbers": lambda self, layers, x: layers[1](layers[0](x) * (~(x > 0).long()).float()),
    "no mask at all": lambda self, layers, x: torch.where(layers[1](layers[0](x)) > 0)[0].float(),
    "another dtype": lambda self, layers, x: layers[1](layers[0](x).double().float()),
    "a sum of booleans": lambda self, layers, x: layers[1](layers[0](x)) + (x > 0).sum(1, keepdim=True),
    "booleans of activations, summed": lambda self, layers, x: (h := layers[0](x), layers[1](h) + (h > 0).sum())[1],
    "a choice by dimensions": lambda self, layers, x: layers[1](
        layers[0](x)[:, None].masked_fill(x[None] > 0, 0).mean(0)
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_no_network_has_stays_right(name: str) -> None:
    model = Function(OTHERS[name], *_two())
    fused = fastnn.fuse(copy.deepcopy(model))
    x = torch.randn(4, 5)
    for records in (False, True):
        with torch.set_grad_enabled(records):
            try:
                wanted = model(x)
            except RuntimeError as error:
                with pytest.raises(RuntimeError, match=re.escape(str(error).partition("\n")[0])):
                    fused(x)
                continue
            assert_close(fused(x), wanted)


class NormThenMask(nn.Module):
    """A mask that depends on what the norm before it has just written."""

    def __init__(self, read: Callable[[nn.BatchNorm1d], Tensor]) -> None:
        super().__init__()
        self.norm, self.last, self.read = nn.BatchNorm1d(5), nn.Linear(5, 3), read

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.last(h.masked_fill(self.read(self.norm), 0.0))


@pytest.mark.parametrize(
    "read",
    [lambda norm: norm.running_mean > 0, lambda norm: norm.num_batches_tracked % 2 == 0],
    ids=["a mean", "a counter"],
)
def test_a_mask_sees_what_a_norm_has_written(read: Callable[[nn.BatchNorm1d], Tensor]) -> None:
    torch.manual_seed(0)
    check(NormThenMask(read), (torch.randn(6, 5),))


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: torch.binomial(torch.ones_like(x) * 9, torch.ones_like(x) / 2) > 4,
        lambda x: torch.rand_like(x) > 0.5,
        lambda x: torch.bernoulli(x * 0 + 0.5),
    ],
)
def test_numbers_are_drawn_in_turn(draw: Callable[[Tensor], Tensor]) -> None:
    model = Function(lambda self, layers, x: layers[1](F.dropout(layers[0](x), 0.5, self.training) * draw(x)), *_two())
    torch.manual_seed(0)
    fused, trained, (x, target) = copy.deepcopy(model), copy.deepcopy(model), (torch.randn(4, 5), torch.randn(4, 3))
    step = fastnn.training_step(trained, nn.MSELoss(), torch.optim.SGD(trained.parameters(), lr=0.1))
    fastnn.fuse(fused)
    states = []
    for call in (model, fused):
        torch.manual_seed(1)
        states.append((call(x), torch.get_rng_state()))
    assert_close(states[1], states[0])
    torch.manual_seed(1)
    assert_close(step((x), target), F.mse_loss(states[0][0], target).detach())
    assert torch.equal(torch.get_rng_state(), states[0][1])


def test_a_refusal_draws_no_numbers() -> None:
    """A mask (batch * heads, queries, keys) is none that a network takes."""
    model = Attends(
        nn.MultiheadAttention(WIDTH, 4, 0.3, batch_first=True),
        lambda a, x, y, h, o: a(*[F.dropout(x, 0.5)] * 3, attn_mask=h, need_weights=False)[0],
    )
    fused, x = fastnn.fuse(copy.deepcopy(model)), torch.randn(3, 7, WIDTH)
    mask = torch.rand(12, 7, 7) > 0.7
    for _ in range(5):
        results = []
        for call in (model, fused):
            torch.manual_seed(1)
            results.append((call(x, x, mask, mask), torch.rand(1)))
        assert_close(results[1], results[0])


@pytest.mark.parametrize("sizes", [(1, 7), (7,), (1, 1, 7, 7), (1, 7, 7), (4, 7, 7), (3, 8)])
def test_masks_of_other_sizes_raise_as_stock_does(sizes: tuple[int, ...]) -> None:
    model = Attends(*(ATTENTIONS["later steps"][0](), lambda a, x, y, h, o: a(x, x, x, o, False, h)[0]))
    fused, x = fastnn.fuse(copy.deepcopy(model)), torch.randn(3, 7, WIDTH)
    right, no_padding = torch.zeros(7, 7, dtype=torch.bool), torch.zeros(3, 7, dtype=torch.bool)
    assert_close(fused.eval()(x, x, right, no_padding), model.eval()(x, x, right, no_padding))
    for own in (model.train(), fused.train()):
        with pytest.raises((RuntimeError, AssertionError)):
            own(x, x, torch.zeros(sizes, dtype=torch.bool), no_padding)
        with pytest.raises((RuntimeError, AssertionError)):
            own(x, x, right, torch.zeros(1, 7, dtype=torch.bool))


def test_a_mask_that_requires_a_gradient_gets_it() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 24), nn.Linear(8, 3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            q, k, v = (one.unflatten(-1, (2, 4)).transpose(1, 2) for one in self.first(x).chunk(3, -1))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return self.last(y.transpose(1, 2).flatten(2))

    model = Masked()
    fused, x = fastnn.fuse(copy.deepcopy(model)), torch.randn(3, 6, 8)
    for _ in range(3):
        found = []
        bias = torch.randn(6, 6, requires_grad=True)
        for own in (model, fused):
            bias.grad = None
            own(x, bias * 2).square().sum().backward()
            found.append(bias.grad)
        assert_close(found[1], found[0])
    assert_close(fused(x, bias.detach()), model(x, bias.detach()))


def test_a_learned_bias_of_attention_gets_its_gradient() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 24), nn.Linear(8, 3)
            self.bias = nn.Parameter(torch.randn(2, 6, 6))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (one.view(-1, 6, 2, 4).transpose(1, 2) for one in self.first(x).chunk(3, -1))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias.expand(x.size(0), -1, -1, -1))
            return self.last(y.transpose(1, 2).flatten(2))

    model, x = Biased(), torch.randn(3, 6, 8)
    check(model, (x,))
    assert model.bias.grad is not None
    assert float(model.bias.grad.abs().max()) > 0


def test_second_derivatives_pass_masks() -> None:
    model = Function(_thresholds, nn.Linear(5, 6), nn.Linear(6, 3)).double()
    fused = fastnn.fuse(copy.deepcopy(model))
    x = torch.randn(4, 5, dtype=torch.float64)
    found = []
    for own in (model, fused):
        (first,) = torch.autograd.grad(own(x).tanh().square().sum(), own.layers[0].weight, create_graph=True)  # type: ignore[index, union-attr]
        found.append(torch.autograd.grad(first.square().sum(), own.layers[0].weight)[0])  # type: ignore[index, union-attr]
    assert_close(found[1], found[0])


# ---- torch's own modules --------------------------------------------------------------------------------------------

WIDTH = 16


class Attends(nn.Module):
    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.call, self.last = module, call, nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, y: Tensor, hidden: Tensor, other: Tensor) -> Tensor:
        return self.last(self.call(self.module, x, y, hidden, other))


def _later(steps: int) -> Tensor:
    return torch.triu(torch.ones(steps, steps), 1).bool()


def _multihead(**settings: Any) -> Callable[[], nn.Module]:
    return lambda: nn.MultiheadAttention(WIDTH, 4, 0.2, batch_first=True, **settings)


def _encoder(**settings: Any) -> Callable[[], nn.Module]:
    layer = lambda: nn.TransformerEncoderLayer(WIDTH, 4, 24, 0.2, batch_first=True, **settings)  # noqa: E731
    return lambda: nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False)


def _decoder(**settings: Any) -> Callable[[], nn.Module]:
    layer = lambda: nn.TransformerDecoderLayer(WIDTH, 4, 24, 0.2, batch_first=True, **settings)  # noqa: E731
    return lambda: nn.TransformerDecoder(layer(), 2, norm=nn.LayerNorm(WIDTH))


def _transformer(**settings: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Transformer(WIDTH, 4, 1, 1, 24, 0.2, batch_first=True, **settings)


square_mask = nn.Transformer.generate_square_subsequent_mask
ATTENTIONS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any]]] = {
    "weights": (_multihead(), lambda a, x, y, h, o: a(x, x, x, key_padding_mask=h)[0]),
    "no weights": (_multihead(bias=False), lambda a, x, y, h, o: a(x, x, x, h, need_weights=False)[0]),
    "to another": (_multihead(), lambda a, x, y, h, o: a(y, x, x, key_padding_mask=h)[0]),
    "to two others": (_multihead(bias=False), lambda a, x, y, h, o: a(y, x, x * 2, h, False)[0]),
    "keys and queries": (_multihead(), lambda a, x, y, h, o: a(x, x, x * 2, h, False)[0]),
    "later steps": (_multihead(), lambda a, x, y, h, o: a(x, x, x, None, False, _later(x.size(1)))[0]),
    "both": (
        _multihead(),
        lambda a, x, y, h, o: a(x, x, x, h, need_weights=False, attn_mask=_later(x.size(1)), is_causal=True)[0],
    ),
    "both, of two kinds": (_multihead(), lambda a, x, y, h, o: a(x, x, x, h, False, square_mask(x.size(1)))[0]),
    "encoder": (_encoder(), lambda a, x, y, h, o: a(x, src_key_padding_mask=h)),
    "encoder, norm first": (
        _encoder(norm_first=True, activation="gelu"),
        lambda a, x, y, h, o: a(x, mask=square_mask(x.size(1)), src_key_padding_mask=h),
    ),
    "causal encoder": (_encoder(), lambda a, x, y, h, o: a(x, square_mask(x.size(1)), is_causal=True)),
    "decoder": (_decoder(), lambda a, x, y, h, o: a(y, x)),
    "decoder, norm first": (
        _decoder(norm_first=True, bias=False),
        lambda a, x, y, h, o: a(y, x, square_mask(y.size(1)), None, o, h),
    ),
    "decoder's layer": (
        lambda: nn.TransformerDecoderLayer(WIDTH, 2, 24, 0.2, batch_first=True),
        lambda a, x, y, h, o: a(y, x, tgt_mask=_later(y.size(1)), tgt_is_causal=True, memory_key_padding_mask=h),
    ),
    "transformer": (
        _transformer(),
        lambda a, x, y, h, o: a(
            x, y, tgt_mask=square_mask(y.size(1)), src_key_padding_mask=h, memory_key_padding_mask=h
        ),
    ),
    "transformer, norm first": (_transformer(norm_first=True), lambda a, x, y, h, o: a(x, y)),
}


@pytest.mark.filterwarnings("ignore:Support for mismatched", "ignore:.*nested")
@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attentions_of_torch(name: str, dtype: torch.dtype) -> None:
    make, call = ATTENTIONS[name]
    torch.manual_seed(0)
    model = Attends(make(), call).to(dtype)
    x, y = torch.randn(3, 7, WIDTH, dtype=dtype), torch.randn(3, 5, WIDTH, dtype=dtype)
    hidden = torch.arange(7)[None] >= torch.tensor([7, 4, 1])[:, None]
    other = torch.arange(5)[None] >= torch.tensor([2, 5, 3])[:, None]
    step = check(model, (x, y, hidden, other))
    check_is_one_call(step)


def test_a_query_that_sees_no_key() -> None:
    """Where torch computes weights, they are NaN; else the result is 0."""
    x, y = torch.randn(2, 4, WIDTH), torch.randn(2, 3, WIDTH)
    hidden, other = torch.tensor([[True] * 4, [False] * 4]), torch.zeros(2, 3, dtype=torch.bool)
    for name in ("weights", "no weights", "to another", "encoder"):
        make, call = ATTENTIONS[name]
        model = Attends(make(), call).train()
        fused = fastnn.fuse(copy.deepcopy(model))
        torch.manual_seed(0)
        wanted = model(x, y, hidden, other)
        torch.manual_seed(0)
        assert_close(fused(x, y, hidden, other), wanted, equal_nan=True)


def test_celu_of_large_numbers() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.CELU(0.1), nn.Linear(5, 3))
    model[0].weight.data.mul_(200)
    check(model, (torch.randn(8, 5),), steps=0)
    with pytest.raises(RuntimeError, match="alpha cannot be 0"):
        fastnn.fuse(nn.Sequential(nn.Linear(5, 5), nn.CELU(0.0)))(torch.randn(2, 5))
