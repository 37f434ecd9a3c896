"""How losses that a forward computes itself are layers of a network."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from fastnn.graph.reader import NotANetworkError, Reader, module_row, row
from fastnn.network_program import Value


def _check_reduction(reduction: Any, size_average: Any, reduce: Any) -> None:
    if size_average is not None or reduce is not None or reduction not in ("mean", "sum", "none"):
        raise NotANetworkError("a loss is reduced in a way that no network knows")


def _reduce(
    read: Reader, node: Node, losses: Value, reduction: Any, size_average: Any = None, reduce: Any = None
) -> None:
    """Adds the mean or the sum of the losses of all elements, or gives the losses themselves."""
    _check_reduction(reduction, size_average, reduce)
    if reduction == "none":
        read.values[node] = losses
    else:
        read.add(node, "mean", {"input": [losses]}, dims=[], sums=reduction == "sum")


def _pair(read: Reader, input: Any, target: Any, weight: Any) -> tuple[Value, Value]:
    """The operands of a loss, which must have the same sizes. (Of others torch warns, or raises an error.)"""
    if weight is not None:
        raise NotANetworkError("a loss has weights")
    first, second = read.operands(input, target, takes_booleans=False)
    alike = read.add(None, "check_sizes", {"input": [first], "like": [second]}, sizes=[])
    return alike, second


def _difference(read: Reader, input: Any, target: Any, weight: Any) -> Value:
    first, second = _pair(read, input, target, weight)
    return read.add(None, "binary", {"input": [first], "other": [second]}, function="sub")


@row(F.mse_loss)
def _mse_loss(
    read: Reader, node: Node, x: Any, target: Any, size_average: Any = None, reduce: Any = None,
    reduction: Any = "mean", weight: Any = None,
) -> None:  # fmt: skip
    rest = _difference(read, x, target, weight)
    squares = read.add(None, "binary", {"input": [rest], "other": [rest]}, function="mul")
    _reduce(read, node, squares, reduction, size_average, reduce)


@row(F.l1_loss)
def _l1_loss(
    read: Reader, node: Node, x: Any, target: Any, size_average: Any = None, reduce: Any = None,
    reduction: Any = "mean", weight: Any = None,
) -> None:  # fmt: skip
    sizes = read.add(None, "unary", {"input": [_difference(read, x, target, weight)]}, function="abs")
    _reduce(read, node, sizes, reduction, size_average, reduce)


@row(F.smooth_l1_loss)
def _smooth_l1_loss(
    read: Reader, node: Node, x: Any, target: Any, size_average: Any = None, reduce: Any = None,
    reduction: Any = "mean", beta: Any = 1.0,
) -> None:  # fmt: skip
    losses = _square_near_zero(read, _difference(read, x, target, None), beta)
    _reduce(read, node, read.add(None, "binary", {"input": [losses]}, function="div", number=float(beta)),
            reduction, size_average, reduce)  # fmt: skip


@row(F.huber_loss)
def _huber_loss(
    read: Reader, node: Node, x: Any, target: Any, reduction: Any = "mean", delta: Any = 1.0, weight: Any = None
) -> None:
    losses = _square_near_zero(read, _difference(read, x, target, weight), delta)
    _reduce(read, node, losses, reduction, None, None)


def _square_near_zero(read: Reader, rest: Value, bound: Any) -> Value:
    """Half the square up to a bound, and behind it the line that goes on from there."""
    if type(bound) not in (int, float) or not 0 < bound < 1e30:
        raise NotANetworkError("the bound of a loss is no number above zero")
    size = read.add(None, "unary", {"input": [rest]}, function="abs")
    within = read.add(None, "clamp", {"input": [size]}, max=float(bound))
    half = read.add(None, "binary", {"input": [within]}, function="mul", number=0.5)
    beyond = read.add(None, "binary", {"input": [size], "other": [half]}, function="sub")
    return read.add(None, "binary", {"input": [within], "other": [beyond]}, function="mul")


@row(F.binary_cross_entropy_with_logits)
def _binary_cross_entropy_with_logits(
    read: Reader, node: Node, x: Any, target: Any, weight: Any = None, size_average: Any = None, reduce: Any = None,
    reduction: Any = "mean", pos_weight: Any = None,
) -> None:  # fmt: skip
    if pos_weight is not None:
        raise NotANetworkError("a loss has weights")
    logits, wanted = _pair(read, x, target, weight)
    # -log sigmoid(x) is softplus(-x); beyond 40 it is -x, which is exact in float64, too.
    negative = read.add(None, "binary", {"input": [logits]}, function="mul", number=-1.0)
    of_one = read.add(None, "activation", {"input": [negative]}, activation="softplus(1.0,40.0)")
    rest = read.add(None, "binary", {"input": [wanted]}, function="sub", number=1.0, reverses=True)
    of_zero = read.add(None, "binary", {"input": [rest], "other": [logits]}, function="mul")
    losses = read.add(None, "binary", {"input": [of_zero], "other": [of_one]}, function="add")
    _reduce(read, node, losses, reduction, size_average, reduce)


@row(F.binary_cross_entropy)
def _binary_cross_entropy(
    read: Reader, node: Node, x: Any, target: Any, weight: Any = None, size_average: Any = None, reduce: Any = None,
    reduction: Any = "mean",
) -> None:  # fmt: skip
    given, wanted = _pair(read, x, target, weight)
    losses = read.add(None, "binary_cross_entropy", {"input": [given], "target": [wanted]})
    _reduce(read, node, losses, reduction, size_average, reduce)


@row(F.poisson_nll_loss)
def _poisson_nll_loss(
    read: Reader, node: Node, x: Any, target: Any, log_input: Any = True, full: Any = False, size_average: Any = None,
    eps: Any = 1e-8, reduce: Any = None, reduction: Any = "mean",
) -> None:  # fmt: skip
    """rate - target log rate; the input is the rate, or its logarithm."""
    if full is not False or type(log_input) is not bool or type(eps) is not float:
        raise NotANetworkError("a Poisson loss has Stirling's approximation, or settings that are tensors")
    given, wanted = _pair(read, x, target, None)
    if log_input:
        rate, logarithm = read.add(None, "activation", {"input": [given]}, activation="exp"), given
    else:
        some = read.add(None, "binary", {"input": [given]}, function="add", number=eps)
        rate, logarithm = given, read.add(None, "unary", {"input": [some]}, function="log")
    expected = read.add(None, "binary", {"input": [wanted], "other": [logarithm]}, function="mul")
    losses = read.add(None, "binary", {"input": [rate], "other": [expected]}, function="sub")
    _reduce(read, node, losses, reduction, size_average, reduce)


@row(F.cross_entropy)
def _cross_entropy(
    read: Reader, node: Node, x: Any, target: Any, weight: Any = None, size_average: Any = None,
    ignore_index: int = -100, reduce: Any = None, reduction: Any = "mean", label_smoothing: Any = 0.0,
) -> None:  # fmt: skip
    _check_reduction(reduction, size_average, reduce)
    _add_cross_entropy(read, node, x, target, read.optional(weight), ignore_index, reduction, label_smoothing)


@row(F.nll_loss)
def _nll_loss(
    read: Reader, node: Node, x: Any, target: Any, weight: Any = None, size_average: Any = None,
    ignore_index: int = -100, reduce: Any = None, reduction: Any = "mean",
) -> None:  # fmt: skip
    _check_reduction(reduction, size_average, reduce)
    _add_nll(read, node, read.data(x), target, read.optional(weight), ignore_index, reduction)


def _add_cross_entropy(
    read: Reader, node: Node, x: Any, target: Any, weight: list[Value], ignore_index: Any, reduction: str,
    smoothing: Any,
) -> None:  # fmt: skip
    logarithms = read.add(None, "softmax", {"input": [read.data(x)]}, dim=-1, logarithm=True)
    if smoothing == 0:
        return _add_nll(read, node, logarithms, target, weight, ignore_index, reduction)
    if weight or type(smoothing) is not float or not 0 < smoothing <= 1:
        raise NotANetworkError("the labels of a loss are smoothed, and classes have weights")
    of_target, _ = _losses_of_classes(read, logarithms, target, ignore_index)
    of_all = read.add(None, "mean", {"input": [logarithms]}, dims=[-1])
    first = read.add(None, "binary", {"input": [of_target]}, function="mul", number=1 - smoothing)
    second = read.add(None, "binary", {"input": [of_all]}, function="mul", number=-smoothing)
    losses = read.add(None, "binary", {"input": [first], "other": [second]}, function="add")
    _reduce(read, node, losses, reduction)


def _add_nll(
    read: Reader, node: Node, logarithms: Value, target: Any, weight: list[Value], ignore_index: Any, reduction: str
) -> None:
    """Of rows of logarithms, the negative of each row's element of the target's class, times the class's weight. A mean
    is over the weights."""
    losses, classes = _losses_of_classes(read, logarithms, target, ignore_index)
    if not weight:
        return _reduce(read, node, losses, reduction)
    weights = read.add(None, "gather_rows", {"places": [classes], "input": weight}, rank=1)
    weighted = read.add(None, "binary", {"input": [losses], "other": [weights]}, function="mul")
    if reduction != "mean":
        return _reduce(read, node, weighted, reduction)
    sums = [read.add(None, "mean", {"input": [one]}, dims=[], sums=True) for one in (weighted, weights)]
    read.add(node, "binary", {"input": [sums[0]], "other": [sums[1]]}, function="div")


def _losses_of_classes(read: Reader, logarithms: Value, target: Any, ignore_index: Any) -> tuple[Value, Value]:
    """Of each row the loss, and the target's classes. An element that is ignored is a class below zero, which the
    network refuses."""
    if type(ignore_index) is not int or ignore_index >= 0:
        raise NotANetworkError("a loss ignores a class")
    classes = read.whole_numbers(read.value(target))
    rows = read.add(None, "permute", {"input": [logarithms]}, dims=[0, 1])  # (which refuses all but matrices)
    chosen = read.add(None, "pick", {"places": [classes], "input": [rows]}, wraps=False)
    return read.add(None, "binary", {"input": [chosen]}, function="mul", number=-1.0), classes


def _times_own_logarithm(read: Reader, value: Value) -> Value:
    """x log x, which is 0 for 0. Torch's slope at 0 is 0 / 0. The product of a root with itself has that slope, too."""
    is_zero = read.add(None, "binary", {"input": [value]}, function="eq", number=0.0)
    some = read.add(None, "where", {"condition": [is_zero], "other": [value]}, number=1.0)
    logarithm = read.add(None, "unary", {"input": [some]}, function="log")
    product = read.add(None, "binary", {"input": [value], "other": [logarithm]}, function="mul")
    root = read.add(None, "unary", {"input": [value]}, function="sqrt")
    of_zero = read.add(None, "binary", {"input": [root], "other": [root]}, function="mul")
    return read.add(None, "where", {"condition": [is_zero], "input": [of_zero], "other": [product]})


@row(F.kl_div)
def _kl_div(
    read: Reader, node: Node, x: Any, target: Any, size_average: Any = None, reduce: Any = None,
    reduction: Any = "mean", log_target: bool = False,
) -> None:  # fmt: skip
    """target (log target - x), or 0 where the target is 0; or with the target's logarithm for the target."""
    given, wanted = _pair(read, x, target, None)
    if log_target:
        factors = read.add(None, "activation", {"input": [wanted]}, activation="exp")
        products = read.add(None, "binary", {"input": [factors], "other": [wanted]}, function="mul")
    else:
        factors, products = wanted, _times_own_logarithm(read, wanted)
    of_given = read.add(None, "binary", {"input": [factors], "other": [given]}, function="mul")
    losses = read.add(None, "binary", {"input": [products], "other": [of_given]}, function="sub")
    if reduction != "batchmean":
        return _reduce(read, node, losses, reduction, size_average, reduce)
    # The sum over all other dimensions, in the mean over the first.
    _check_reduction("sum", size_average, reduce)
    total = read.add(None, "mean", {"input": [losses]}, dims=[], sums=True)
    rows = read.add(None, "size", {"like": [given]}, sizes=["0.0"], power=1.0)
    read.add(node, "binary", {"input": [total], "other": [rows]}, function="div")


@module_row(nn.MSELoss)
def _mse_module(read: Reader, node: Node, module: Any, x: Any, target: Any) -> None:
    _mse_loss(read, node, x, target, reduction=module.reduction)
    read.note(module, "reduction")


@module_row(nn.L1Loss)
def _l1_module(read: Reader, node: Node, module: Any, x: Any, target: Any) -> None:
    _l1_loss(read, node, x, target, reduction=module.reduction)
    read.note(module, "reduction")


@module_row(nn.SmoothL1Loss)
def _smooth_l1_module(read: Reader, node: Node, module: Any, x: Any, target: Any) -> None:
    _smooth_l1_loss(read, node, x, target, reduction=module.reduction, beta=module.beta)
    read.note(module, "reduction", "beta")


@module_row(nn.HuberLoss)
def _huber_module(read: Reader, node: Node, module: Any, x: Any, target: Any) -> None:
    _huber_loss(read, node, x, target, reduction=module.reduction, delta=module.delta)
    read.note(module, "reduction", "delta")


@module_row(nn.BCEWithLogitsLoss)
def _bce_module(read: Reader, node: Node, module: Any, x: Any, target: Any) -> None:
    _binary_cross_entropy_with_logits(
        read, node, x, target, weight=module.weight, reduction=module.reduction, pos_weight=module.pos_weight
    )
    read.note(module, "reduction", "weight", "pos_weight")


@module_row(nn.BCELoss)
def _bce_of_probabilities(read: Reader, node: Node, module: Any, x: Any, target: Any) -> None:
    _binary_cross_entropy(read, node, x, target, weight=module.weight, reduction=module.reduction)
    read.note(module, "reduction", "weight")


@module_row(nn.PoissonNLLLoss)
def _poisson_module(read: Reader, node: Node, module: Any, x: Any, target: Any) -> None:
    settings = {name: getattr(module, name) for name in ("log_input", "full", "eps", "reduction")}
    _poisson_nll_loss(read, node, x, target, **settings)
    read.note(module, *settings)


@module_row(nn.CrossEntropyLoss)
def _cross_entropy_module(read: Reader, node: Node, module: Any, x: Any, target: Any) -> None:
    weight, smoothing = read.own(module, "weight"), module.label_smoothing
    _add_cross_entropy(read, node, x, target, weight, module.ignore_index, module.reduction, smoothing)
    read.note(module, "reduction", "weight", "ignore_index", "label_smoothing")


@module_row(nn.KLDivLoss)
def _kl_div_module(read: Reader, node: Node, module: Any, x: Any, target: Any) -> None:
    _kl_div(read, node, x, target, reduction=module.reduction, log_target=module.log_target)
    read.note(module, "reduction", "log_target")


@module_row(nn.NLLLoss)
def _nll_module(read: Reader, node: Node, module: Any, x: Any, target: Any) -> None:
    weight = read.own(module, "weight")
    _add_nll(read, node, read.data(x), target, weight, module.ignore_index, module.reduction)
    read.note(module, "reduction", "weight", "ignore_index")
