"""Layers of networks that gather elements, and functions that are several layers: statistics, norms, einsum. What stock
refuses is refused, and what changes between calls is seen."""

import copy
import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastnn


class Between(nn.Module):
    """A function between two layers of which networks are made."""

    def __init__(self, function: Callable[[Tensor], Tensor], after: nn.Module | None = None) -> None:
        super().__init__()
        self.before, self.function, self.after = nn.Linear(7, 7), function, after or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.tanh(self.function(self.before(x))))


REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "a flip of one number": lambda x: torch.flip(x, 0),
    "a flip of numbers one by one": lambda x: torch.flip(x, 0, 1),
    "a flip of nothing": lambda x: x.flip(),
    "a flip of a dimension twice": lambda x: x.flip(1, -3),
    "an index that is a list": lambda x: x.index_select(1, [1]),
    "an index beyond the tensor": lambda x: x[:, [0, 6]],
    "channels that no group divides": lambda x: F.channel_shuffle(x, 4),
    "channels of rows": lambda x: F.channel_shuffle(x.flatten(1), 2),
    "a variance over a dimension twice": lambda x: x.var((1, 1)),
    "a norm over a dimension twice": lambda x: torch.norm(x, 2, (1, -3)),
    "a mean over a dimension twice": lambda x: x.mean((1, 1)),
    "a variance with two corrections": lambda x: torch.var(x, 1, unbiased=True, correction=1),
    "a variance of two flags": lambda x: torch.var(x, True, True),
    "a matrix's norm over four dimensions": lambda x: torch.norm(x, "fro", (0, 1, 2, 3)),
    "a border that has a value": lambda x: F.pad(x, (1, 1, 1, 1), "reflect", 1.0),
    "a border of one dimension of images": lambda x: F.pad(x, (1, 1), "replicate"),
    "a border of no dimension": lambda x: F.pad(x, (), "circular"),
    "a border as wide as the image": lambda x: F.pad(x, (7, 1, 1, 1), "reflect"),
    "a module of other dimensions": lambda x: nn.ReflectionPad1d(1)(x),
}


# Stock raises each of these for some of the calls. Ours is a RuntimeError where compiled code finds the fault.
ERRORS = (RuntimeError, TypeError, IndexError, NotImplementedError, ValueError)


@pytest.mark.parametrize("name", REFUSED)
def test_what_stock_refuses_is_refused(name: str) -> None:
    x, model = torch.randn(4, 6, 5, 7), Between(REFUSED[name])
    with pytest.raises(ERRORS):
        model(x)
    fastnn.fuse(model)
    for records in (False, True):
        with (
            torch.set_grad_enabled(records),
            pytest.raises(ERRORS),
        ):
            model(x)


TAKEN: dict[str, Callable[[Tensor], Tensor]] = {
    "a flip by the method": lambda x: x.flip(1, -1),
    "a flip by name": lambda x: x.flip(dims=(2,)) + torch.flip(x, dims=[1, 2]),
    "shifts that add up": lambda x: torch.roll(x, (1, 2), (1, 1)) - x.roll(-9, 2),
    "channels shuffled": lambda x: F.channel_shuffle(x, 3),
    "images without a batch": lambda x: (
        F.pad(x.mean(0), (1, 2, 0, 1), "circular") * F.pad(x.sum(0), (2, 1, 1, 0), "reflect")
    ),
    "a border and no value": lambda x: F.pad(x, (0, 0, 2, 1), "replicate", 0),
    "lists behind an ellipsis": lambda x: x[..., [1, 0, -1], :] + x[:, None, [1, 1]].mean((1, 2))[:, None, :3],
    "variances": lambda x: x - x.var(1, True, True) + x.std(False) + torch.std(x, (1, 2), correction=2, keepdim=True),
    "cosines": lambda x: (
        F.cosine_similarity(x, x.flip(3), -1) * F.cosine_similarity(x.mean(0, keepdim=True), x, 1).sum()
    ),
    "logarithms of sums": lambda x: (
        torch.logsumexp(40 * x, (1, -1)) + x.logsumexp(dim=2, keepdim=True).squeeze(2).mean(-1)[:, :5].mean()
    ),
    "a logarithm of sums beyond what exp takes": lambda x: torch.logsumexp(900 * x, 1),
    "other activations": lambda x: F.logsigmoid(50 * x) + F.tanhshrink(x) + F.logsigmoid(-x),
    "every dimension of one": lambda x: x.mean((0, 2), True).squeeze() * x.sum((0, 1, 2)).unsqueeze(0).squeeze(),
    "sizes of another": lambda x: x.transpose(1, 3).reshape_as(x) - x.flatten(1).view_as(x),
    "matrices turned": lambda x: x.flatten(1).t() @ x.mean((2, 3)),
    "sums with products": lambda x: (
        torch.addmm(x[0, 0, 0], x[0, 0], x[0, 1].t() @ x[0, 2]) + x[:, 0].baddbmm(x[:, 1, :, :5], x[:, 2]).mean(0)
    ),
    "sums with a factor": lambda x: x.add(x.flip(1), alpha=2) * torch.sub(x, x.roll(1, 2), alpha=-0.5),
    "other names of sums and products": lambda x: (
        x.subtract(1.5).multiply(x)
        + torch.divide(x, 3)
        - x.true_divide(2)
        + torch.rsub(x, 0.5) * torch.rsub(x, x.flip(2))
    ),
    "a matrix's T": lambda x: x.mean(1)[:, 0] @ x[:, 0, 1].T + x[:, 0, 2].T.T @ x.sum((1, 2)).T,
    "parts by their places": lambda x: x.unbind(1)[0] * torch.unbind(x, 1)[-1] + x.unbind(dim=1)[2],
    "variances beside means": lambda x: (
        torch.var_mean(x, 1, keepdim=True)[0] - torch.std_mean(x, dim=(1, 2), unbiased=False, keepdim=True)[1]
    ),
    "a variance and its mean": lambda x: (both := torch.var_mean(x, (1, 3)))[0] * both[1],
    "distances": lambda x: F.pairwise_distance(x, x.flip(1)) + F.pairwise_distance(x, x[:, :1], p=1, eps=0.1),
    "inner products": lambda x: torch.inner(x, x[0, 0]),
    "softshrink": lambda x: F.softshrink(x) + F.softshrink(x, 0.1),
    "the dtype that is there": lambda x: x.double() * x.to(torch.float64) + x.type_as(x) - x.to(x.dtype),
    "norms": lambda x: x / x.norm(dim=(1, 2), keepdim=True) + torch.norm(x, 1) + torch.linalg.norm(x, 1, -1, True),
}


@pytest.mark.parametrize("name", TAKEN)
def test_in_all_three_ways(name: str) -> None:
    check_in_all_three_ways(Between(TAKEN[name]).double().eval(), torch.randn(4, 6, 5, 7, dtype=torch.float64))


def check_in_all_three_ways(model: Between, x: Tensor) -> None:
    expected = model(x)
    (of_weight,) = torch.autograd.grad(expected.square().sum(), [model.before.weight])
    torch.testing.assert_close(fastnn.freeze(model, x)(x), expected.detach())
    step = fastnn.training_step(model, F.mse_loss, torch.optim.SGD(model.parameters(), 0.0))
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected.detach())
    step.accumulate(x, torch.zeros_like(expected).detach())
    assert step.explain().startswith("one operator call"), step.explain()
    torch.testing.assert_close(model.before.weight.grad * expected.numel(), of_weight)


# Equations, of a tensor (4, 6, 5, 7) and of another that is made of it.
EINSUMS: dict[str, Callable[[Tensor], Tensor]] = {
    "abcd,abcd->ab": lambda x: x.flip(3),
    "abcd, abcd -> dcba": lambda x: x.flip(3),
    "abcd,abcd->": lambda x: x,
    "abcd,abce->abde": lambda x: x[..., :3],
    "abcd,abce->eabd": lambda x: x[..., :3],
    "abcd,de->abce": lambda x: x[0, :, 0, :].t(),
    "abcd,ed": lambda x: x[0, :, 0, :],
    "abcd,bcd->a": lambda x: x[0],
    "abcd,abefd->cfbea": lambda x: x[:, :, :, None, :] * x[:, :, None, :2, :],
    "abcd,cde->bae": lambda x: x[0, 0, :, :, None] * x[0, 1, None, None, :3, 0],
    "abcd,e->abe": lambda x: x[0, 0, 0],
    "abcd,fgd->acfg": lambda x: x[0],
    "abcd,ab->cd": lambda x: x[:, :, 0, 0],
    "abcd,dcba->": lambda x: x.permute(3, 2, 1, 0),
    "abcd,ef->abcdef": lambda x: x[0, 0, :2, :3],
}


@pytest.mark.parametrize("equation", EINSUMS)
def test_einsums_are_products(equation: str) -> None:
    other = EINSUMS[equation]
    x, model = torch.randn(4, 6, 5, 7, dtype=torch.float64), Between(lambda x: torch.einsum(equation, x, other(x)))
    check_in_all_three_ways(model.double().eval(), x)
    swapped = Between(lambda x: torch.einsum(",".join(equation.split("->")[0].split(",")[::-1]), [other(x), x]))
    check_in_all_three_ways(swapped.double().eval(), x)


@pytest.mark.parametrize(
    "equation", ["aacd,abcd->bcd", "...d,abcd->abc", "abcd,abcd,abcd->a", "abcd,abcd->ae", "abcd,abc"]
)
def test_other_einsums_are_torchs(equation: str) -> None:
    model = Between(lambda x: torch.einsum(equation, *[x[:, :4, :4, :4]] * (equation.count(",") + 1)))
    x, results = torch.randn(4, 6, 5, 7), []
    for one in (model, fastnn.fuse(model)):
        with torch.no_grad():
            try:
                results.append(one(x))
            except (RuntimeError, ValueError) as error:
                results.append(str(error))
    assert type(results[0]) is type(results[1])
    torch.testing.assert_close(*results) if isinstance(results[0], Tensor) else None


# Functions that networks take for some sizes alone: for others torch computes, or raises, as stock does.
class Behind(Between):
    """A function whose result is the model's."""

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.before(x))


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "integers converted": lambda x: x.int().float(),
    "places converted": lambda x: x.argmax(-1).to(x.dtype) * 2,
    "a sum of another dtype, converted": lambda x: x.double().cumsum(0).float(),
    "rounded and back": lambda x: x.bfloat16().float(),
    "a factor of a product": lambda x: torch.mul(x, x, alpha=2),
    "a factor of booleans": lambda x: torch.add(x, x, alpha=True),
    "a factor beyond float32": lambda x: x.add(x, alpha=10**40),
    "a sum in place that would grow": lambda x: (x[0] * 1).add_(x),
    "a product in place that would grow": lambda x: (x[:, :1] * 1).mul_(x),
    "a difference in place that would grow": lambda x: operator.isub(x[:1] * 1, x),
    "a sum in place that fits": lambda x: (x * 1).add_(x[:1]).sub_(x[0], alpha=2),
    "a number to take from": lambda x: torch.rsub(2.0, x),
    "a softshrink of infinity": lambda x: F.softshrink(x, float("inf")),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("records", [False, True])
def test_what_is_near_and_stays_torchs(name: str, records: bool) -> None:
    x, model = torch.randn(4, 6, 5, 7), Behind(OTHERS[name])
    fused = fastnn.fuse(copy.deepcopy(model))
    with torch.set_grad_enabled(records):
        try:
            expected = model(x)
        except (IndexError, OverflowError, RuntimeError, TypeError) as error:
            with pytest.raises(type(error)):
                fused(x)
        else:
            torch.testing.assert_close(fused(x), expected)


class Residual(nn.Module):
    """A norm to which something is added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.norm(self.conv(x))
        h += y
        return torch.relu(h)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_is_added_to_a_norm_in_place_may_not_grow_it(layout: torch.memory_format) -> None:
    model = Residual()
    fused, x = fastnn.fuse(copy.deepcopy(model)), torch.randn(1, 3, 7, 7).to(memory_format=layout)
    for batch, fits in ((1, True), (2, False), (1, True)):
        y = torch.randn(batch, 4, 5, 5).to(memory_format=layout)
        if fits:
            torch.testing.assert_close(fused(x, y), model(x, y))
            continue
        for own in (model, fused):
            with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
                own(x, y)


def test_an_infinite_gradient_of_a_small_element() -> None:
    x, model = torch.randn(4, 6, 5, 7), Between(lambda x: F.softshrink(x, 0.3))
    results = []
    for own in (model, fastnn.fuse(copy.deepcopy(model))):
        y = own(x)
        results.append(torch.autograd.grad(y, own.before.bias, torch.full_like(y, float("inf"))))
    torch.testing.assert_close(results[1], results[0], equal_nan=True)


OF_SOME_SIZES: dict[str, Callable[[Tensor], Tensor]] = {
    "a cosine of tensors that broadcast": lambda x: F.cosine_similarity(x, x[:, :1], 1),
    "a cosine of fewer dimensions": lambda x: F.cosine_similarity(x, x[0], 1),
    "a cosine below epsilon": lambda x: F.cosine_similarity(x, x.flip(1), 1, eps=10.0),
    "a cosine's epsilon below zero": lambda x: F.cosine_similarity(x, x, 1, eps=-1.0),
    "an einsum of letters of size one": lambda x: torch.einsum(
        "ijkl,kij->l", x[:, :1, :, :], x.mean(3).permute(2, 0, 1)
    ),
    "an einsum of other numbers of dimensions": lambda x: torch.einsum("ij,jk->ik", x, x[0, 0].t()),
    "an einsum of sizes that disagree": lambda x: torch.einsum("abcd,bd->a", x, x[0, :, :, 0]),
    "an einsum of other letters": lambda x: torch.einsum("aé,éc->ac", x[0, 0], x[0, 1].t()),
    "an einsum whose arrow is cut": lambda x: torch.einsum("ab,bc- >ac", x[0, 0], x[0, 1].t()),
    "a sum larger than the product": lambda x: torch.addmm(x[0], x[0, 0], x[0, 1].t()),
    "a product of three dimensions": lambda x: torch.addmm(x[0, 0, 0], x[0], x[0, 1].t()),
    "products of other batches": lambda x: torch.baddbmm(x[0], x[:1, 0, :, :5], x[1]),
    "a squeeze of None": lambda x: torch.squeeze(x, None),
    "logarithms of sums of one number": lambda x: torch.logsumexp(x.sum(), 0),
    "logarithms of sums of infinities": lambda x: torch.logsumexp(torch.log(torch.relu(x) * 0) + x[:1] * 0, (1, 2)),
}


@pytest.mark.parametrize("name", OF_SOME_SIZES)
def test_what_networks_take_for_some_sizes(name: str) -> None:
    x, model = torch.randn(4, 6, 5, 7, dtype=torch.float64), Between(OF_SOME_SIZES[name]).double()

    def results(model: Callable[[Tensor], Tensor], with_gradient: bool) -> list[Tensor] | None:
        try:
            with torch.set_grad_enabled(with_gradient):
                y = model(x)
            return [y.detach(), *(torch.autograd.grad(y.sum(), model.before.weight) if with_gradient else ())]
        except ERRORS:
            return None

    stock = [results(model, with_gradient) for with_gradient in (False, True)]
    fused = fastnn.fuse(copy.deepcopy(model))
    for _ in range(2):
        for expected, with_gradient in zip(stock, (False, True), strict=True):
            torch.testing.assert_close(results(fused, with_gradient), expected, equal_nan=True)
    if stock[0] is not None:
        torch.testing.assert_close(fastnn.freeze(model.eval(), x)(x), stock[0][0], equal_nan=True)


def test_parts_and_wholes_stay_in_one_memory() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(6, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = self.out(torch.tanh(self.fc(x)))
            return y.squeeze(), y.softmax(-1), y.chunk(2, 1)[0], torch.tanh(y).t(), y.t()

    model, x = Parts(), torch.randn(4, 6)
    fused = fastnn.fuse(copy.deepcopy(model))
    with torch.no_grad():
        for _ in range(3):
            stock, ours = model(x), fused(x)
            assert [one.stride() for one in ours] == [one.stride() for one in stock]
            for some in (stock, ours):
                some[0].add_(100)
            for a, b in zip(ours, stock, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_of_embeddings(mode: str) -> None:
    model = nn.Sequential(nn.EmbeddingBag(9, 4, mode=mode), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).double().eval()
    numbers = torch.randint(9, (6, 3))
    expected = model(numbers)
    torch.testing.assert_close(fastnn.freeze(model, numbers)(numbers), expected.detach())
    step = fastnn.training_step(model, F.mse_loss, torch.optim.SGD(model.parameters(), 0.0), strict=True)
    step.accumulate(numbers, torch.zeros_like(expected).detach())
    (of_table,) = torch.autograd.grad(expected.square().mean(), [model[0].weight])
    torch.testing.assert_close(model[0].weight.grad, of_table)
    fastnn.fuse(model)
    with torch.no_grad():
        for wrong in (numbers[0], numbers[:, :0], numbers + 9):
            with pytest.raises(ERRORS):
                model(wrong)
    torch.testing.assert_close(model(numbers), expected)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_a_convolution_pads_as_it_was_made(mode: str) -> None:
    """Later changes of `padding` do nothing; changes of the list that torch derives from it do."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode), nn.ReLU(), nn.Conv2d(4, 2, 3))
    x = torch.randn(2, 3, 8, 8)
    fused = fastnn.fuse(model)
    with torch.no_grad():
        for changes in ({}, {"padding": (2, 2)}, {"_reversed_padding_repeated_twice": [2, 2, 0, 1]}):
            for name, value in changes.items():
                setattr(model[0], name, value)
            torch.testing.assert_close(fused(x), nn.Sequential.forward(model, x))
        model[0]._reversed_padding_repeated_twice[0] = 1
        torch.testing.assert_close(fused(x), nn.Sequential.forward(model, x))


def test_a_shuffle_of_channels_comes_first() -> None:
    model = nn.Sequential(nn.ChannelShuffle(2), nn.ReLU(), nn.Flatten(2), nn.Linear(35, 3)).eval()
    x = torch.randn(4, 6, 5, 7)
    torch.testing.assert_close(fastnn.freeze(model, x)(x), model(x).detach())


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.L1Loss(), nn.HuberLoss(), nn.MSELoss(reduction="sum")])
@pytest.mark.parametrize("number", [torch.var, torch.std, torch.norm, torch.mean, torch.sum])
def test_steps_of_models_that_give_one_number(loss: nn.Module, number: Callable[[Tensor], Tensor]) -> None:
    model, x, target = Between(number), torch.randn(3, 7), torch.tensor(0.3)
    expected = loss(model(x), target)
    (gradient,) = torch.autograd.grad(expected, [model.before.weight])
    step = fastnn.training_step(model, loss, torch.optim.SGD(model.parameters(), 0.0))
    torch.testing.assert_close(step.accumulate(x, target), expected.detach())
    torch.testing.assert_close(model.before.weight.grad, gradient)


def test_an_infinite_gradient_stays_where_it_is() -> None:
    """Of a convolution of few channels: it is not multiplied by the zeros around the image."""
    model, images = nn.Conv2d(1, 8, 5, padding=(0, 3)), torch.randn(2, 1, 9, 9)
    target = torch.zeros_like(model(images)).detach()
    target[0, 2, 1, 0] = torch.inf
    F.mse_loss(model(images), target).backward()
    expected = model.weight.grad
    model.zero_grad()
    fastnn.training_step(model, F.mse_loss, torch.optim.SGD(model.parameters(), 0.0)).accumulate(images, target)
    assert torch.equal(model.weight.grad.isfinite(), expected.isfinite())
    assert torch.equal(model.weight.grad.isnan(), expected.isnan())


def test_a_conversion_holds_for_the_dtype_that_the_model_had() -> None:
    x, model = torch.randn(4, 6, 5, 7), Between(lambda x: x.float() * x)
    fused = fastnn.fuse(copy.deepcopy(model))
    for _ in range(2):
        torch.testing.assert_close(fused(x), model(x))
        # A double is multiplied by a float now.
        torch.testing.assert_close(fused.double()(x.double()), model.double()(x.double()))
        fused.float(), model.float()
