"""How functions that act element by element are layers of a network."""

from __future__ import annotations

import operator
from math import isnan
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from fastnn.graph.order import in_place
from fastnn.graph.reader import NotANetworkError, Reader, Size, module_row, row
from fastnn.graph.shape_layers import size_value
from fastnn.network_program import UNARY, Line, Value
from fastnn.nn._hooks import has_own_call

_NAMES = {
    **{name: name for name in ("add", "sub", "mul", "div")},
    **{"subtract": "sub", "multiply": "mul", "divide": "div", "true_divide": "div"},
}
_BINARY = {
    **{getattr(torch, given): name for given, name in _NAMES.items()},
    **_NAMES,
    **{f"{given}_": name for given, name in _NAMES.items()},
    **{operator.add: "add", operator.sub: "sub", operator.mul: "mul", operator.truediv: "div"},
}


@row(*_BINARY)
def _binary(read: Reader, node: Node, x: Any, y: Any, *, alpha: Any = 1) -> None:
    if "alpha" in node.kwargs:
        return _add_with_factor(read, node, x, y, alpha)
    if _is_of_rank(read, node, x, y):
        return
    if all(one in read.sizes or type(one) is int for one in (x, y)):
        return _compute_size(read, node, "mul" if _BINARY[node.target] == "mul" else "", x, y)
    _combine(read, node, _BINARY[node.target], x, y, in_place=str(node.target).endswith("_"))


def _is_of_rank(read: Reader, node: Node, x: Any, y: Any) -> bool:
    """Notes a part of the sizes (x.shape[0],) + (1,) * (x.ndim - 1), or of such lists -> whether a node is one."""
    function = _BINARY[node.target]
    if isinstance(x, Node) and x in read.ranks and function == "sub" and type(y) is int:
        value, less = read.ranks[x]
        read.ranks[node] = value, less + y
    elif isinstance(y, Node) and y in read.ranks and function == "mul" and x in ((1,), [1]):
        read.ones[node] = read.ranks[y]
    elif isinstance(y, Node) and y in read.ones and function == "add" and isinstance(x, (tuple, list)):
        value, count = read.ones[y]
        if isinstance(x, tuple) != isinstance(y.args[0], tuple) or count < 0:
            raise NotANetworkError("sizes are put together of a tuple and a list, or of more ones than dimensions")
        known = [read.sizes.get(size) if isinstance(size, Node) else None for size in x]
        if known != [Size(((value, dim),)) for dim in range(count)]:
            raise NotANetworkError("sizes are put together of others than a tensor's first ones")
        read.first_sizes[node] = value, count
    else:
        return False
    return True


def _add_with_factor(read: Reader, node: Node, x: Any, y: Any, alpha: Any) -> None:
    function, in_place = _BINARY[node.target], str(node.target).endswith("_")
    is_number = type(alpha) in (int, float) and abs(alpha) < 1e30
    if function not in ("add", "sub") or not is_number or not isinstance(x, Node) or not isinstance(y, Node):
        raise NotANetworkError("a sum has a factor that is no number, or numbers to add")
    product = read.add(None, "binary", {"input": [read.data(y)]}, function="mul", number=float(alpha))
    inputs = {"input": [read.data(x)], "other": [product]}
    read.add(node, "binary", inputs, function=function, **({"in_place": True} if in_place else {}))


def _combine(read: Reader, node: Node, function: str, x: Any, y: Any, *, in_place: bool = False) -> None:
    reverses = not isinstance(x, Node)
    if reverses:
        x, y = y, x
    if isinstance(y, Node):  # what is expanded broadcasts by itself, if the result has the other operand's sizes
        first, second = _without_expand(x, y), _without_expand(y, x)
        reverses = first is not x and not in_place
        in_place = in_place or (first, second) != (x, y)
        x, y = (second, first) if reverses else (first, second)
    if isinstance(y, Node) and (tensors := [one for one in (x, y) if not _is_size(read, one)]) != [x, y]:
        # (With a size torch would compute in another dtype where the tensor may hold integers.)
        if not tensors or read.may_hold_others(tensors[0]):
            raise NotANetworkError("a size goes to what may be no floating-point numbers")
        inputs = {name: [_number_or_data(read, one)] for name, one in (("input", x), ("other", y))}
        read.add(node, "binary", inputs, function=function)
        return
    if isinstance(y, Node):
        operands = read.operands(x, y, takes_booleans=function != "sub")
        inputs = {"input": operands[:1], "other": operands[1:]}
        read.add_of_booleans(node, "binary", inputs, function=function, in_place=in_place, reverses=reverses)
        return
    inputs = {"input": [read.data(x)]}
    if type(y) in (int, float):
        read.add(node, "binary", inputs, function=function, number=float(y), reverses=reverses)
    else:
        raise NotANetworkError(f"{function} takes a {type(y).__name__}")


def _is_size(read: Reader, node: Node) -> bool:
    return node in read.sizes or node in read.powers


def _number_or_data(read: Reader, node: Node) -> Value:
    if node in read.powers:
        return size_value(read, *read.powers[node])
    return size_value(read, node) if node in read.sizes else read.data(node)


def _without_expand(node: Node, other: Node) -> Any:
    """Of a tensor that is expanded to the sizes of the other operand, the tensor."""
    return node.args[0] if node.target == "expand_as" and node.args[1:] == (other,) else node


_IN_PLACE = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div"}


@row(in_place)
def _in_place(read: Reader, node: Node, operation: str, x: Any, y: Any) -> None:
    if operation not in _IN_PLACE:
        raise NotANetworkError(f"{operation} is no layer of a network")
    _combine(read, node, _IN_PLACE[operation], x, y, in_place=True)


@row(operator.floordiv)
def _floordiv(read: Reader, node: Node, x: Any, y: Any) -> None:
    _compute_size(read, node, "div", x, y)


def _compute_size(read: Reader, node: Node, function: str, x: Any, y: Any) -> None:
    """A product of sizes and numbers, or a size divided by a number, as a view may ask for it."""
    sizes = [read.sizes[one] if one in read.sizes else Size((), one) if type(one) is int else None for one in (x, y)]
    first, second = sizes
    if first is None or second is None or first.divisor != 1 or second.divisor != 1:
        raise NotANetworkError("the model computes with a tensor's sizes")
    if function == "mul" and first.factor >= 0 and second.factor >= 0:
        read.sizes[node] = Size((*first.dimensions, *second.dimensions), first.factor * second.factor)
    elif function == "div" and not second.dimensions and second.factor > 0:
        read.sizes[node] = Size(first.dimensions, first.factor, second.factor)
    else:
        raise NotANetworkError("the model computes with a tensor's sizes")


@row(F.logsigmoid)
def _logsigmoid(read: Reader, node: Node, x: Any) -> None:
    # (Beyond 40, softplus gives its argument, which is exact in float64, too.)
    negative = read.add(None, "binary", {"input": [read.data(x)]}, function="mul", number=-1.0)
    value = read.add(None, "activation", {"input": [negative]}, activation="softplus(1.0,40.0)")
    read.add(node, "binary", {"input": [value]}, function="mul", number=-1.0)


@module_row(nn.LogSigmoid)
def _logsigmoid_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    _logsigmoid(read, node, x)


@row(torch.rsub)
def _rsub(read: Reader, node: Node, x: Any, y: Any) -> None:
    read.data(x)  # which is no number, as in torch
    _combine(read, node, "sub", y, x)


@row(F.tanhshrink)
def _tanhshrink(read: Reader, node: Node, x: Any) -> None:
    tanh = read.add(None, "activation", {"input": [read.data(x)]}, activation="tanh")
    read.add(node, "binary", {"input": [read.data(x)], "other": [tanh]}, function="sub")


@module_row(nn.Tanhshrink)
def _tanhshrink_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    _tanhshrink(read, node, x)


@row(operator.neg, torch.neg, "neg")
def _neg(read: Reader, node: Node, x: Any) -> None:
    read.add(node, "binary", {"input": [read.data(x)]}, function="mul", number=-1.0)


@row(F.hardsigmoid)
def _hardsigmoid(read: Reader, node: Node, x: Any, inplace: bool = False) -> None:
    above = read.add(None, "binary", {"input": [read.data(x)]}, function="add", number=3.0)
    within = read.add(None, "activation", {"input": [above]}, activation="hardtanh(0.0,6.0)")
    read.add(node, "binary", {"input": [within]}, function="div", number=6.0)


@module_row(nn.Hardsigmoid)
def _hardsigmoid_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    _hardsigmoid(read, node, x)


@row(F.glu)
def _glu(read: Reader, node: Node, x: Any, dim: int = -1) -> None:
    parts = [Value(()), Value(())]
    read.lines.append(Line("split", {"input": [read.data(x)]}, parts, {"dim": dim, "chunks": 2}))
    gate = read.add(None, "activation", {"input": [parts[1]]}, activation="sigmoid")
    # (Of an odd size the second part has fewer elements, which the product must not broadcast.)
    read.add(node, "binary", {"input": [gate], "other": [parts[0]]}, function="mul", in_place=True)


@module_row(nn.GLU)
def _glu_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    _glu(read, node, x, module.dim)
    read.note(module, "dim")


@row(torch.clamp, "clamp", torch.clip, "clip")
def _clamp(read: Reader, node: Node, x: Any, min: Any = None, max: Any = None) -> None:
    bounds = {name: one for name, one in (("min", min), ("max", max)) if one is not None}
    if not bounds or not all(type(one) in (int, float) for one in bounds.values()):
        raise NotANetworkError("a clamp has no bounds, or they are computed")
    if any(isnan(one) for one in bounds.values()):
        raise NotANetworkError("a bound of a clamp is NaN")
    read.add(node, "clamp", {"input": [read.data(x)]}, **{name: float(one) for name, one in bounds.items()})


@row(torch.clamp_min, "clamp_min")
def _clamp_min(read: Reader, node: Node, x: Any, min: Any) -> None:
    _clamp(read, node, x, min)


@row(torch.clamp_max, "clamp_max")
def _clamp_max(read: Reader, node: Node, x: Any, max: Any) -> None:
    _clamp(read, node, x, None, max)


_UNARY = {
    **{getattr(torch, name): name for name in UNARY},
    **{given: name for name in UNARY for given in (name, f"{name}_")},
    operator.abs: "abs",
}


@row(*_UNARY)
def _unary(read: Reader, node: Node, x: Any) -> None:
    read.add(node, "unary", {"input": [read.data(x)]}, function=_UNARY[node.target])


@row(torch.reciprocal, "reciprocal")
def _reciprocal(read: Reader, node: Node, x: Any) -> None:
    read.saved.add(read.add(node, "binary", {"input": [read.data(x)]}, function="div", number=1.0, reverses=True))


@row(torch.addcmul, "addcmul", torch.addcdiv, "addcdiv")
def _add_combined(read: Reader, node: Node, x: Any, first: Any, second: Any, *, value: Any = 1) -> None:
    """The sum of a tensor and of a product, or a quotient, of two others."""
    if type(value) not in (int, float) or not abs(value) < 1e30:
        raise NotANetworkError("a sum has a factor that is no number")
    function = "mul" if "addcmul" in str(node.target) else "div"
    both = read.add(None, "binary", {"input": [read.data(first)], "other": [read.data(second)]}, function=function)
    if value != 1:
        both = read.add(None, "binary", {"input": [both]}, function="mul", number=float(value))
    read.add(node, "binary", {"input": [read.data(x)], "other": [both]}, function="add")


@row(torch.lerp, "lerp")
def _lerp(read: Reader, node: Node, start: Any, end: Any, weight: Any) -> None:
    """start + weight (end - start); from a weight of one half on from the other end, as in torch, so that a weight of 1
    gives the end itself."""
    first, last = read.data(start), read.data(end)
    if isinstance(weight, Node):
        read.add(node, "lerp", {"input": [first], "other": [last], "amount": [read.data(weight)]})
        return
    if type(weight) not in (int, float) or not abs(weight) < 1e30:
        raise NotANetworkError("a weight between two tensors is no number")
    near = abs(weight) < 0.5
    factor = float(weight) if near else 1 - float(weight)
    part = read.add(None, "binary", {"input": [last], "other": [first]}, function="sub")
    part = read.add(None, "binary", {"input": [part]}, function="mul", number=factor)
    inputs = {"input": [first if near else last], "other": [part]}
    read.add(node, "binary", inputs, function="add" if near else "sub")


@row(torch.square, "square")
def _square(read: Reader, node: Node, x: Any) -> None:
    value = read.data(x)
    read.add(node, "binary", {"input": [value], "other": [value]}, function="mul")


@row(operator.pow, torch.pow, "pow")
def _pow(read: Reader, node: Node, x: Any, exponent: Any) -> None:
    if x in read.sizes and type(exponent) in (int, float) and abs(exponent) <= 4:
        read.powers[node] = x, float(exponent)  # a number of Python's, with which tensors may be multiplied
        return
    if type(exponent) not in (int, float) or exponent not in (-1, 0.5, 2, 3) or not isinstance(x, Node):
        raise NotANetworkError("a power is no square, cube or root")
    if exponent == -1:
        return _reciprocal(read, node, x)
    if exponent == 0.5:
        read.add(node, "unary", {"input": [read.data(x)]}, function="sqrt")
        return
    _square(read, node, x)
    if exponent == 3:
        read.add(node, "binary", {"input": [read.values[node]], "other": [read.data(x)]}, function="mul")


@row(torch.softmax, F.softmax, "softmax")
def _softmax(read: Reader, node: Node, x: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> None:
    _add_softmax(read, node, read.data(x), dim, dtype, False)


@row(torch.log_softmax, F.log_softmax, "log_softmax")
def _log_softmax(read: Reader, node: Node, x: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> None:
    _add_softmax(read, node, read.data(x), dim, dtype, True)


@row(F.softmin)
def _softmin(read: Reader, node: Node, x: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> None:
    negative = read.add(None, "binary", {"input": [read.data(x)]}, function="mul", number=-1.0)
    _add_softmax(read, node, negative, dim, dtype, False)


@module_row(nn.Softmin)
def _softmin_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    _softmin(read, node, x, module.dim)
    read.note(module, "dim")


@module_row(nn.Softmax2d)
def _softmax_of_channels(read: Reader, node: Node, module: Any, x: Any) -> None:
    _add_softmax(read, node, read.data(x), -3, None, False)


@module_row(nn.Softmax, nn.LogSoftmax)
def _softmax_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    _add_softmax(read, node, read.data(x), module.dim, None, isinstance(module, nn.LogSoftmax))
    read.note(module, "dim")


def _add_softmax(read: Reader, node: Node, value: Value, dim: Any, dtype: Any, logarithm: bool) -> None:
    if type(dim) is not int or dtype is not None:
        raise NotANetworkError("a softmax has no dimension, or another dtype")
    read.add(node, "softmax", {"input": [value]}, dim=dim, logarithm=logarithm)


def dim_of_log_softmax(node: Node, modules: dict[str, nn.Module]) -> int | None:
    """The dimension of a log_softmax over the classes; None where the node is no such log_softmax."""
    dim: Any = None
    if node.op == "call_module":
        module = modules[str(node.target)]
        if type(module) is nn.LogSoftmax and not has_own_call(module):
            dim = module.dim
    elif node.target in (F.log_softmax, torch.log_softmax, "log_softmax"):
        given = {**dict(zip(("dim", "dtype"), node.args[1:], strict=False)), **node.kwargs}
        dim = given.get("dim") if given.get("dtype") is None else None
    return dim if dim in (1, -1) and node.args else None


@row(F.prelu, torch.prelu)
def _prelu(read: Reader, node: Node, x: Any, weight: Any) -> None:
    read.add(node, "prelu", {"input": [read.data(x)], "weight": [read.value(weight)]})


@module_row(nn.PReLU)
def _prelu_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    read.add(node, "prelu", {"input": [read.data(x)], "weight": read.own(module, "weight")})
    read.note(module)


@row(F.softsign)
def _softsign(read: Reader, node: Node, x: Any) -> None:
    _add_softsign(read, node, x)


@module_row(nn.Softsign)
def _softsign_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    _add_softsign(read, node, x)
    read.note(module)


def _add_softsign(read: Reader, node: Node, x: Any) -> None:
    value = read.data(x)
    size = read.add(None, "unary", {"input": [value]}, function="abs")
    size = read.add(None, "binary", {"input": [size]}, function="add", number=1.0)
    read.add(node, "binary", {"input": [value], "other": [size]}, function="div")
