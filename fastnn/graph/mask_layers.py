"""How comparisons, masks and conversions are layers of a network. A mask that a network computes is 1 where torch has
True, else 0."""

from __future__ import annotations

import operator
from math import isfinite
from typing import Any

import torch
from torch.fx import Node

from fastnn.graph.reader import NotANetworkError, Reader, row
from fastnn.network_program import Value

_COMPARISONS: dict[Any, str] = {
    **{getattr(module, name): name for module in (torch, operator) for name in ("lt", "le", "gt", "ge", "eq", "ne")},
    **{name: name for name in ("lt", "le", "gt", "ge", "eq", "ne")},
}


@row(*_COMPARISONS)
def _compare(read: Reader, node: Node, x: Any, y: Any) -> None:
    function = _COMPARISONS[node.target]
    inputs = {"input": [read.data(x)]}
    if isinstance(y, Node):
        value = read.add(node, "binary", {**inputs, "other": [read.data(y)]}, function=function)
    else:
        value = read.add(node, "binary", inputs, function=function, number=_number(read, y))
    read.booleans.add(value)


@row(operator.invert, torch.logical_not, "logical_not", torch.bitwise_not, "bitwise_not")
def _not(read: Reader, node: Node, x: Any) -> None:
    inputs = {"input": [_boolean(read, x)]}
    read.booleans.add(read.add(node, "binary", inputs, function="sub", number=1.0, reverses=True))


@row(operator.and_, torch.logical_and, "logical_and", torch.bitwise_and, "bitwise_and")
def _and(read: Reader, node: Node, x: Any, y: Any) -> None:
    inputs = {"input": [_boolean(read, x)], "other": [_boolean(read, y)]}
    read.booleans.add(read.add(node, "binary", inputs, function="mul"))


@row(operator.or_, torch.logical_or, "logical_or", torch.bitwise_or, "bitwise_or")
def _or(read: Reader, node: Node, x: Any, y: Any) -> None:
    inputs = {"input": [_boolean(read, x)], "other": [_boolean(read, y)]}
    total = read.add(None, "binary", inputs, function="add")
    read.booleans.add(read.add(node, "binary", {"input": [total]}, function="gt", number=0.0))


def _boolean(read: Reader, node: Any) -> Value:
    """A value that is known to hold booleans: operators such as ``~`` do something else with numbers."""
    value = read.data(node)
    if value not in read.booleans:
        raise NotANetworkError("an operator of booleans takes numbers")
    return value


@row("masked_fill", torch.masked_fill)
def _masked_fill(read: Reader, node: Node, x: Any, mask: Any, value: Any) -> None:
    inputs = {"condition": [read.condition(mask)], "other": [read.data(x)]}
    read.add(node, "where", inputs, number=_number(read, value))


@row("masked_fill_")
def _masked_fill_in_place(read: Reader, node: Node, x: Any, mask: Any, value: Any) -> None:
    # In place the mask may not be larger than the tensor; the result's size would be another.
    result = read.data(x)
    inputs = {"condition": [read.condition(mask)], "other": [result]}
    filled = read.add(None, "where", inputs, number=_number(read, value))
    read.add(node, "expand", {"input": [filled], "like": [result]})


@row(torch.where)
def _where(read: Reader, node: Node, condition: Any, input: Any, other: Any) -> None:
    inputs = {"condition": [read.condition(condition)]}
    numbers = {}
    for name, given in (("input", input), ("other", other)):
        if isinstance(given, Node):
            inputs[name] = [read.data(given)]
        else:
            numbers["number"] = _number(read, given)
    if len(inputs) == 1:
        raise NotANetworkError("a choice is between two numbers")
    read.add(node, "where", inputs, **numbers)


@row("where")
def _where_method(read: Reader, node: Node, x: Any, condition: Any, other: Any) -> None:
    _where(read, node, condition, x, other)


def _number(read: Reader, given: Any) -> float:
    """A number that the network's dtype can hold."""
    if type(given) not in (int, float, bool):
        raise NotANetworkError(f"a layer with a mask takes a {type(given).__name__}")
    number = float(given)
    if isfinite(number) and abs(number) > torch.finfo(read.dtype() or torch.float32).max:
        raise NotANetworkError(f"{number} is no number of the network's dtype")
    return number


@row("float", "double", "to", "type_as")
def _converted(read: Reader, node: Node, x: Any, kind: Any = None) -> None:
    """A conversion to the network's own dtype. (torch gives a tensor that has the dtype as it is.)"""
    kind = {"float": torch.float32, "double": torch.float64}.get(str(node.target), kind)
    if isinstance(kind, Node):
        own = kind if node.target == "type_as" else kind.args[0] if kind.target is getattr else None
        if node.target != "type_as" and (own is None or kind.args[1] != "dtype"):
            raise NotANetworkError("a tensor is converted to what no network knows")
        if read.data(own) in read.booleans:
            raise NotANetworkError("a tensor is converted to booleans")
    elif kind is not read.dtype():
        raise NotANetworkError("a tensor is converted to another dtype than the network's")
    value = read.data(x)
    if value in read.booleans:  # The result is a number, though it has the same elements.
        value = read.add(None, "detach", {"input": [value]})
        read.booleans.discard(value)
    read.values[node] = value


def attention_mask(read: Reader, node: Any, shown: bool) -> list[Value]:
    """What an attention adds to its scores, where the mask has True for what is `shown`, or else for what is not."""
    if node is None:
        return []
    if node not in read.prologue.constant:
        raise NotANetworkError("an attention has a mask that is computed from parameters")
    value = read.value(node)
    if value in read.booleans:
        if not shown:
            value = read.add(None, "binary", {"input": [value]}, function="sub", number=1.0, reverses=True)
        return [read.add(None, "unary", {"input": [value]}, function="log")]  # 0, or minus infinity
    if value in read.given and value not in read.floats:
        return [read.in_form(value, "shown" if shown else "hidden")]
    return [read.data(node)]
