"""How losses that a forward computes itself are layers of a network."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from fastnn.graph.reader import NotANetworkError, Reader, module_row, row
from fastnn.network_program import Value


def _reduce(read: Reader, node: Node, losses: Value, reduction: Any, size_average: Any, reduce: Any) -> None:
    """Adds the mean or the sum of the losses of all elements, or gives the losses themselves."""
    if size_average is not None or reduce is not None or reduction not in ("mean", "sum", "none"):
        raise NotANetworkError("a loss is reduced in a way that no network knows")
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


@row(F.cross_entropy)
def _cross_entropy(
    read: Reader, node: Node, x: Any, target: Any, weight: Any = None, size_average: Any = None,
    ignore_index: int = -100, reduce: Any = None, reduction: Any = "mean", label_smoothing: float = 0.0,
) -> None:  # fmt: skip
    if label_smoothing:
        raise NotANetworkError("the labels of a loss are smoothed")
    logarithms = read.add(None, "softmax", {"input": [read.data(x)]}, dim=-1, logarithm=True)
    _add_nll(read, node, logarithms, target, weight, size_average, ignore_index, reduce, reduction)


@row(F.nll_loss)
def _nll_loss(
    read: Reader, node: Node, x: Any, target: Any, weight: Any = None, size_average: Any = None,
    ignore_index: int = -100, reduce: Any = None, reduction: Any = "mean",
) -> None:  # fmt: skip
    _add_nll(read, node, read.data(x), target, weight, size_average, ignore_index, reduce, reduction)


def _add_nll(
    read: Reader, node: Node, logarithms: Value, target: Any, weight: Any, size_average: Any, ignore_index: Any,
    reduce: Any, reduction: Any,
) -> None:  # fmt: skip
    """Of rows of logarithms, the negative of each row's element of the target's class. An element that is ignored is a
    class below zero, which the network refuses."""
    if weight is not None or type(ignore_index) is not int or ignore_index >= 0:
        raise NotANetworkError("a loss has weights, or ignores a class")
    classes = read.whole_numbers(read.value(target))
    rows = read.add(None, "permute", {"input": [logarithms]}, dims=[0, 1])  # (which refuses all but matrices)
    chosen = read.add(None, "pick", {"places": [classes], "input": [rows]}, wraps=False)
    losses = read.add(None, "binary", {"input": [chosen]}, function="mul", number=-1.0)
    _reduce(read, node, losses, reduction, size_average, reduce)


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


@module_row(nn.CrossEntropyLoss)
def _cross_entropy_module(read: Reader, node: Node, module: Any, x: Any, target: Any) -> None:
    _cross_entropy(
        read, node, x, target, weight=module.weight, ignore_index=module.ignore_index, reduction=module.reduction,
        label_smoothing=module.label_smoothing,
    )  # fmt: skip
    read.note(module, "reduction", "weight", "ignore_index", "label_smoothing")


@module_row(nn.NLLLoss)
def _nll_module(read: Reader, node: Node, module: Any, x: Any, target: Any) -> None:
    _nll_loss(read, node, x, target, weight=module.weight, ignore_index=module.ignore_index, reduction=module.reduction)
    read.note(module, "reduction", "weight", "ignore_index")
