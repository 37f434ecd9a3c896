"""How comparisons, masks, choices between values and conversions are layers of a network. A mask that a network
computes is 1 where torch has True, else 0."""

from __future__ import annotations

import operator
from math import inf, isfinite, isnan
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from fastnn.graph.prologue import name_of_target
from fastnn.graph.reader import NotANetworkError, Reader, module_row, row
from fastnn.network_program import COMPARISONS, Value


@row(*(one for name in COMPARISONS for one in (name, getattr(torch, name), getattr(operator, name))))
def _compare(read: Reader, node: Node, x: Any, y: Any) -> None:
    function = name_of_target(node).partition(".")[0]  # of an operator of ATen, without the overload
    if isinstance(y, Node):
        value = read.add(node, "binary", {"input": [read.data(x)], "other": [read.data(y)]}, function=function)
    elif y in (0, 1) and read.is_boolean(x):  # as in mask[:, :steps] == 0
        inputs = {"input": [read.boolean(x)]}
        value = read.add_of_booleans(node, "binary", inputs, function=function, number=float(y))
    else:
        value = read.add(node, "binary", {"input": [read.data(x)]}, function=function, number=_number(read, y))
    read.booleans.add(value)


@row(operator.invert, torch.logical_not, "logical_not", torch.bitwise_not, "bitwise_not")
def _not(read: Reader, node: Node, x: Any) -> None:
    read.booleans.add(_one_less(read, node, read.boolean(x)))


def _one_less(read: Reader, node: Node | None, mask: Value) -> Value:
    """1 where the mask is 0, and 0 where it is 1."""
    attributes = {"function": "sub", "number": 1.0, "reverses": True}
    return read.add_of_booleans(node, "binary", {"input": [mask]}, **attributes)


@row(operator.and_, torch.logical_and, "logical_and", torch.bitwise_and, "bitwise_and")
def _and(read: Reader, node: Node, x: Any, y: Any) -> None:
    inputs = {"input": [read.boolean(x)], "other": [read.boolean(y)]}
    read.booleans.add(read.add_of_booleans(node, "binary", inputs, function="mul"))


@row(operator.or_, torch.logical_or, "logical_or", torch.bitwise_or, "bitwise_or")
def _or(read: Reader, node: Node, x: Any, y: Any) -> None:
    inputs = {"input": [read.boolean(x)], "other": [read.boolean(y)]}
    total = read.add_of_booleans(None, "binary", inputs, function="add")
    read.booleans.add(read.add(node, "binary", {"input": [total]}, function="gt", number=0.0))


@row("masked_fill", torch.masked_fill)
def _masked_fill(read: Reader, node: Node, x: Any, mask: Any, value: Any) -> None:
    inputs = {"condition": [read.condition(mask)], "other": [read.data(x)]}
    read.add_of_booleans(node, "where", inputs, number=_number(read, value))


@row("masked_fill_")
def _masked_fill_in_place(read: Reader, node: Node, x: Any, mask: Any, value: Any) -> None:
    # In place the mask may not be larger than the tensor; the result's size would be another.
    result = read.data(x)
    inputs = {"condition": [read.condition(mask)], "other": [result]}
    filled = read.add_of_booleans(None, "where", inputs, number=_number(read, value))
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
    read.add_of_booleans(node, "where", inputs, **numbers)


@row("where")
def _where_method(read: Reader, node: Node, x: Any, condition: Any, other: Any) -> None:
    _where(read, node, condition, x, other)


@row(F.threshold)
def _threshold(read: Reader, node: Node, x: Any, threshold: Any, value: Any, inplace: bool = False) -> None:
    given = read.data(x)
    is_below = read.add(None, "binary", {"input": [given]}, function="le", number=_number(read, threshold))
    read.add(node, "where", {"condition": [is_below], "other": [given]}, number=_number(read, value))


@module_row(nn.Threshold)
def _threshold_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    _threshold(read, node, x, module.threshold, module.value)
    read.note(module, "threshold", "value")


@row(F.hardshrink, torch.hardshrink, "hardshrink")
def _hardshrink(read: Reader, node: Node, x: Any, lambd: Any = 0.5) -> None:
    given = read.data(x)
    size = read.add(None, "unary", {"input": [given]}, function="abs")
    if isnan(bound := _number(read, lambd)):
        raise NotANetworkError("a hardshrink's bound is NaN")
    is_small = read.add(None, "binary", {"input": [size]}, function="le", number=bound)
    read.add(node, "where", {"condition": [is_small], "other": [given]}, number=0.0)


@module_row(nn.Hardshrink)
def _hardshrink_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    _hardshrink(read, node, x, module.lambd)
    read.note(module, "lambd")


@row(F.softshrink)
def _softshrink(read: Reader, node: Node, x: Any, lambd: Any = 0.5) -> None:
    given, bound = read.data(x), _number(read, lambd)
    if not 0 <= bound < inf:
        raise NotANetworkError("a softshrink's bound is no size")
    size = read.add(None, "unary", {"input": [given]}, function="abs")
    is_small = read.add(None, "binary", {"input": [size]}, function="le", number=bound)
    within = read.add(None, "clamp", {"input": [given]}, min=-bound, max=bound)
    rest = read.add(None, "binary", {"input": [given], "other": [within]}, function="sub")
    # (Without the choice, an infinite gradient of a small element would be infinity minus infinity.)
    read.add(node, "where", {"condition": [is_small], "other": [rest]}, number=0.0)


@module_row(nn.Softshrink)
def _softshrink_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    _softshrink(read, node, x, module.lambd)
    read.note(module, "lambd")


@row(F.celu, torch.celu)
def _celu(read: Reader, node: Node, x: Any, alpha: Any = 1.0, inplace: bool = False) -> None:
    given, scale = read.data(x), _number(read, alpha)
    if scale == 0:
        raise NotANetworkError("a CELU's alpha is 0")
    # Without the bound, the exponential of a large x would be infinite, and its gradient NaN.
    part = read.add(None, "clamp", {"input": [given]}, max=0.0)
    part = read.add(None, "binary", {"input": [part]}, function="div", number=scale)
    part = read.add(None, "unary", {"input": [part]}, function="expm1")
    below = read.add(None, "binary", {"input": [part]}, function="mul", number=scale)
    is_above = read.add(None, "binary", {"input": [given]}, function="gt", number=0.0)
    read.add(node, "where", {"condition": [is_above], "input": [given], "other": [below]})


@module_row(nn.CELU)
def _celu_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    _celu(read, node, x, module.alpha)
    read.note(module, "alpha")


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
    """A conversion to the network's own dtype: of booleans, or of numbers that the network has computed in that dtype,
    which stay as they are."""
    if not read.is_boolean(x):
        value = read.data(x)
        _check_computed(read, value)
        _check_kind(read, node, kind, takes_inputs=False)
        read.values[node] = value
        return
    value = read.boolean(x)
    _check_kind(read, node, kind, takes_inputs=True)
    read.add_of_booleans(node, "binary", {"input": [value]}, function="mul", number=1.0)


def _check_kind(read: Reader, node: Node, kind: Any, *, takes_inputs: bool) -> None:
    """Raises unless a conversion is to the network's dtype. takes_inputs: whether it may be that of an input, which has
    the network's dtype, or the network refuses it where a layer takes it."""
    kind = {"float": torch.float32, "double": torch.float64}.get(str(node.target), kind)
    if isinstance(kind, Node):
        is_dtype = kind.target is getattr and kind.args[1] == "dtype"
        if node.target != "type_as" and not is_dtype:
            raise NotANetworkError("a tensor is converted to what no network knows")
        like = read.data(kind.args[0] if is_dtype else kind)
        if not takes_inputs:
            _check_computed(read, like)
    elif kind is None or kind is not read.dtype():
        raise NotANetworkError("a tensor is converted to another dtype than the network's")
    else:
        read.note_dtype()


def _check_computed(read: Reader, value: Value) -> None:
    """Raises unless a value is known to have the network's dtype because a layer of the network gives it."""
    if value in read.booleans or not any(value in line.outputs for line in read.lines):
        raise NotANetworkError("a tensor has the dtype of what no network has computed")


def _is_float_buffer(read: Reader, node: Node) -> bool:
    own, name = read.tensors.get(node, (None, ""))
    is_buffer = any(module._buffers is own for module in read.modules.values())
    return is_buffer and own[name] is not None and own[name].is_floating_point()


def attention_mask(read: Reader, node: Any, form: str) -> list[Value]:
    """What an attention adds to its scores. form: "shown" where the mask has True for what is seen; "hidden", or
    "hidden exactly" where torch takes no mask of another dtype than the scores', where True is what is not seen."""
    if node is None:
        return []
    # (A network has no gradient for a mask, so that a buffer is given to it as an input is.)
    value = read.give(node) if node not in read.values and _is_float_buffer(read, node) else read.value(node)
    if value in read.booleans:
        shown = value if form == "shown" else _one_less(read, None, value)
        return [read.add_of_booleans(None, "unary", {"input": [shown]}, function="log")]  # It is 0, or -inf.
    if value not in read.given or value in read.floats:
        raise NotANetworkError("an attention has a mask that is computed in a way that no network knows")
    return [read.in_form(value, form)]
