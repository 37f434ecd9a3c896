"""What each node of a fused graph is among the layers of networks, in training and in inference: a row for each
function, method or module. (Those of attention and of masks are in
``attention_layers.py`` and ``mask_layers.py``.)"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from math import isfinite, isnan, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from fastnn.activations import parse
from fastnn.graph import attention_layers, mask_layers  # noqa: F401 (register their rows)
from fastnn.graph.joining import chooses_last, kernel_of
from fastnn.graph.order import in_place, unpack
from fastnn.graph.reader import (
    MODULE_ROWS,
    NotANetworkError,
    Reader,
    Size,
    each_dimension,
    module_row,
    name_of,
    only_first_is_taken,
    row,
    row_of_class,
)
from fastnn.network_program import POOL_NAMES, UNARY, Line, Value, conv_attributes
from fastnn.nn._hooks import has_own_call, layer_forward
from fastnn.ops.batch_norm import batch_norm_relu_max_pool, conv_batch_norm_relu_max_pool, relu_max_pool
from fastnn.ops.conv_relu_max_pool import conv_relu_max_pool
from fastnn.ops.convolution import convolution
from fastnn.ops.mlp import mlp_of_parameters, mlp_with_some_biases

# ---- what the matcher has made --------------------------------------------------------------------------------------


@row(conv_relu_max_pool)
def _conv_relu_max_pool(read: Reader, node: Node, x: Any, weight: Any, bias: Any, *, geometry: Any, dims: int) -> None:
    inputs = {"input": [read.data(x)], "weight": [read.value(weight)], "bias": read.optional(bias)}
    read.add(node, "conv", inputs, **conv_attributes(geometry, dims), activation="relu")


@row(convolution)
def _convolution_alone(read: Reader, node: Node, x: Any, weight: Any, bias: Any, *, geometry: Any, dims: int) -> None:
    inputs = {"input": [read.data(x)], "weight": [read.value(weight)], "bias": read.optional(bias)}
    read.add(node, "conv", inputs, **conv_attributes(geometry, dims))


@row(mlp_of_parameters)
def _mlp(read: Reader, node: Node, x: Any, parameters: Any, activations: str) -> None:
    layers = parse(activations)
    _add_linears(read, node, x, layers, parameters[: len(layers)], [*parameters[len(layers) :]] or [None] * len(layers))


@row(mlp_with_some_biases)
def _mlp_with_some_biases(read: Reader, node: Node, x: Any, both: Any, activations: str) -> None:
    layers = parse(activations)
    _add_linears(read, node, x, layers, both[: len(layers)], both[len(layers) :])


def _add_linears(
    read: Reader, node: Node, x: Any, activations: Sequence[Any], weights: Sequence[Any], biases: Sequence[Any]
) -> None:
    value = read.data(x)
    for activation, weight, bias in zip(activations, weights, biases, strict=True):
        inputs = {"input": [value], "weight": [read.value(weight)], "bias": read.optional(bias)}
        value = read.add(node, "linear", inputs, activation=str(activation))


def _pool_attributes(settings: dict[str, Any], dims: int) -> dict[str, Any]:
    size = each_dimension(settings["pool_kernel_size"], dims)
    stride = settings.get("pool_stride")
    return {
        "pool": size,
        "pool_stride": size if stride in (None, (), []) else each_dimension(stride, dims),
        "pool_padding": each_dimension(settings.get("pool_padding", 0), dims),
        "pool_dilation": each_dimension(settings.get("pool_dilation", 1), dims),
        "ceil_mode": bool(settings.get("ceil_mode", False)),
        "activation": "relu",
    }


@row(relu_max_pool)
def _relu_max_pool(
    read: Reader, node: Node, x: Any, scale: Any = None, shift: Any = None, *, dims: int, **pool: Any
) -> None:
    if scale is not None or shift is not None:
        raise NotANetworkError("a pool scales its channels")
    value = read.add(None, "activation", {"input": [read.data(x)]}, activation="relu")
    settings = _pool_attributes(pool, dims)
    attributes = {name: settings[given] for name, given in POOL_NAMES.items()}
    read.add(node, "max_pool", {"input": [value]}, **attributes, ceil_mode=settings["ceil_mode"])


@row(batch_norm_relu_max_pool)
def _batch_norm_relu_max_pool(
    read: Reader, node: Node, x: Any, mean: Any, var: Any, weight: Any, bias: Any, counter: Any = None, *, dims: int,
    training: bool, momentum: Any = 0.1, eps: float = 1e-5, **pool: Any
) -> None:  # fmt: skip
    inputs = {
        "input": [read.data(x)],
        "mean": read.optional(mean),
        "variance": read.optional(var),
        "weight": read.optional(weight),
        "bias": read.optional(bias),
    }
    read.add(
        node, "batch_norm", inputs, dims=dims, trains=bool(training), momentum=float(momentum or 0.0),
        epsilon=float(eps), **_pool_attributes(pool, dims),
    )  # fmt: skip
    if counter is not None and training:
        read.counters.append(read.tensors[counter])


@row(conv_batch_norm_relu_max_pool)
def _conv_batch_norm_relu_max_pool(
    read: Reader, node: Node, x: Any, weight: Any, bias: Any, mean: Any, var: Any, gamma: Any, beta: Any, *,
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1, eps: float = 1e-5, **pool: Any
) -> None:  # fmt: skip
    convolved = read.value(weight)
    dims = len(convolved.sizes) - 2
    steps, apart = each_dimension(stride, dims), each_dimension(dilation, dims)
    padded, around = read.padded(read.data(x), padding, convolved, steps, apart)
    value = read.add(
        None, "conv", {"input": padded, "weight": [convolved], "bias": read.optional(bias)},
        stride=steps, padding=around, dilation=apart, groups=groups,
    )  # fmt: skip
    norm = {"mean": mean, "variance": var, "weight": gamma, "bias": beta}
    inputs = {"input": [value], **{name: read.optional(one) for name, one in norm.items()}}
    read.add(node, "batch_norm", inputs, dims=dims, trains=False, epsilon=float(eps), **_pool_attributes(pool, dims))


# ---- recurrent layers -----------------------------------------------------------------------------------------------


def _takes_last(node: Node | None, last: Any) -> bool:
    return node is not None and node.target is operator.getitem and chooses_last(node.args[1], last)


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _last_step(node: Node, layer: Any) -> list[Node] | None:
    """The nodes that take a recurrent layer's last step, in their order, if only that step is used. Else None."""
    part = _only_user(node)
    if layer.bidirectional or part is None or part.target is not operator.getitem:
        return None
    if part.args[1] == 0:
        end = _only_user(part)
        return [part, end] if end and _takes_last(end, (slice(None), -1) if layer.batch_first else -1) else None
    if part.args[1] not in (1, -1):
        return None
    path = [part]
    if layer.mode == "LSTM":
        h = _only_user(part)
        if h is None or h.target is not operator.getitem or h.args[1] != 0:
            return None
        path.append(h)
    end = _only_user(path[-1])
    return [*path, end] if end and _takes_last(end, -1) else None


def _is_zeros(node: Any, features: int) -> bool:
    """Whether a state is made of zeros, which is what a layer begins with anyway."""
    if not isinstance(node, Node) or node.target not in (torch.zeros, "new_zeros"):
        return False
    sizes: Any = node.args if node.target is torch.zeros else node.args[1:]
    sizes = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
    return bool(sizes) and bool(sizes[-1] == features)


def _states(read: Reader, given: Any, features: Sequence[int]) -> list[Value]:
    nodes = list(given) if isinstance(given, (tuple, list)) else [given]
    if given is None or all(_is_zeros(node, size) for node, size in zip(nodes, features, strict=False)):
        return []
    if len(nodes) == 1 and len(features) == 2:  # (h, c) as one value
        parts = read.parts.get(nodes[0])
        if not isinstance(parts, list) or len(parts) != 2:
            raise NotANetworkError("a recurrent layer's state is computed from something else")
        return list(parts)
    return [read.data(node) for node in nodes]


@row_of_class(nn.RNNBase)
def _recurrent(read: Reader, node: Node, module: Any, x: Any, hx: Any = None) -> None:
    layer: Any = kernel_of(module)
    if layer is None:
        raise NotANetworkError(f"{node.name} has hooks or a forward of its own")
    is_lstm = layer.mode == "LSTM"
    features = [layer.proj_size or layer.hidden_size, layer.hidden_size][: 1 + is_lstm]
    states = _states(read, hx, features)
    weights = [value for name in layer._flat_weights_names for value in read.own(layer, name)]
    flat = layer._flat_weights  # stock reads this list, which a user may change by itself
    if len(flat) != len(weights) or any(one.tensor is not other for one, other in zip(weights, flat, strict=True)):
        raise NotANetworkError(f"{node.name} has other weights than its parameters")
    read.sources += [(flat, place) for place in range(len(flat))]
    drops = float(layer.dropout) if layer.training else 0.0
    inputs = {
        "input": [read.data(x)],
        **{name: [state] for name, state in zip("hc", states, strict=False)},
        "weights": weights,
    }
    last = _last_step(node, layer)
    attributes = {
        "mode": layer.mode,
        "bidirectional": bool(layer.bidirectional),
        "batch_first": bool(layer.batch_first),
        "bias": bool(layer.bias),
        "projected": bool(layer.proj_size),
        "last": last is not None,
        "dropout": drops,
    }
    outputs = [Value(()) for _ in range(1 if last else 2 + is_lstm)]
    read.lines.append(Line("rnn", inputs, outputs, attributes))
    if last:
        read.values[last[-1]] = outputs[0]
        read.done.update(last)
    else:
        read.parts[node] = [outputs[0], outputs[1:] if is_lstm else outputs[1]]
    read.draws = read.draws or drops > 0
    names = ("dropout", "training", "batch_first", "num_layers", "bidirectional", "mode", "proj_size", "bias")
    read.note(module, *names, "_flat_weights", "_flat_weights_names")


@row_of_class(nn.RNNCellBase)
def _cell(read: Reader, node: Node, module: Any, x: Any, hx: Any = None) -> None:
    """One step of one layer: a sequence of one."""
    if kernel_of(module) is None:
        raise NotANetworkError(f"{node.name} has hooks or a forward of its own")
    is_lstm = isinstance(module, nn.LSTMCell)
    mode = "LSTM" if is_lstm else "GRU" if isinstance(module, nn.GRUCell) else f"RNN_{module.nonlinearity.upper()}"
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if module.bias else 2]
    states = _states(read, hx, [module.hidden_size] * (1 + is_lstm))
    one, *rest = [read.add(None, "unsqueeze", {"input": [value]}, dim=0) for value in [read.data(x), *states]]
    inputs = {
        "input": [one],
        **{name: [state] for name, state in zip("hc", rest, strict=False)},
        "weights": [value for name in names for value in read.own(module, name)],
    }
    outputs = [Value(()) for _ in range(3 if is_lstm else 1)]
    read.lines.append(Line("rnn", inputs, outputs, {"mode": mode, "bias": bool(module.bias)}))
    taken = [outputs[0], outputs[2]] if is_lstm else outputs
    h, *c = [read.add(None, "squeeze", {"input": [value]}, dim=0) for value in taken]
    if is_lstm:
        read.parts[node] = [h, *c]
    else:
        read.values[node] = h
    read.note(module, *(("nonlinearity",) if isinstance(module, nn.RNNCell) else ()), "bias")


# ---- element by element ---------------------------------------------------------------------------------------------

_BINARY = {
    **{getattr(torch, name): name for name in ("add", "sub", "mul", "div")},
    **{name: name for name in ("add", "sub", "mul", "div")},
    **{f"{name}_": name for name in ("add", "sub", "mul", "div")},
    **{torch.subtract: "sub", torch.multiply: "mul", torch.divide: "div", torch.true_divide: "div"},
    **{operator.add: "add", operator.sub: "sub", operator.mul: "mul", operator.truediv: "div"},
}


@row(*_BINARY)
def _binary(read: Reader, node: Node, x: Any, y: Any, *, alpha: Any = 1) -> None:
    if alpha != 1:
        raise NotANetworkError("a sum has a factor")
    if x in read.sizes or y in read.sizes:
        return _compute_size(read, node, "mul" if _BINARY[node.target] == "mul" else "", x, y)
    _combine(read, node, _BINARY[node.target], x, y)


def _combine(read: Reader, node: Node, function: str, x: Any, y: Any) -> None:
    reverses = not isinstance(x, Node)
    if reverses:
        x, y = y, x
    if isinstance(y, Node):  # an operand broadcasts by itself
        x, y = _without_expand(x, y), _without_expand(y, x)
    if isinstance(y, Node):
        first, second = read.operands(x, y, takes_booleans=function != "sub")
        inputs = {"input": [first], "other": [second]}
        read.add_of_booleans(node, "binary", inputs, function=function)
        return
    inputs = {"input": [read.data(x)]}
    if type(y) in (int, float):
        read.add(node, "binary", inputs, function=function, number=float(y), reverses=reverses)
    else:
        raise NotANetworkError(f"{function} takes a {type(y).__name__}")


def _without_expand(node: Node, other: Node) -> Any:
    """Of a tensor that is expanded to the sizes of the other operand, the tensor."""
    return node.args[0] if node.target == "expand_as" and node.args[1:] == (other,) else node


_IN_PLACE = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div"}


@row(in_place)
def _in_place(read: Reader, node: Node, operation: str, x: Any, y: Any) -> None:
    if operation not in _IN_PLACE:
        raise NotANetworkError(f"{operation} is no layer of a network")
    _combine(read, node, _IN_PLACE[operation], x, y)


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
    read.add(node, "binary", {"input": [parts[0]], "other": [gate]}, function="mul")


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


_UNARY = {**{getattr(torch, name): name for name in UNARY}, **{name: name for name in UNARY}, operator.abs: "abs"}


@row(*_UNARY)
def _unary(read: Reader, node: Node, x: Any) -> None:
    read.add(node, "unary", {"input": [read.data(x)]}, function=_UNARY[node.target])


@row(torch.square, "square")
def _square(read: Reader, node: Node, x: Any) -> None:
    value = read.data(x)
    read.add(node, "binary", {"input": [value], "other": [value]}, function="mul")


@row(operator.pow, torch.pow, "pow")
def _pow(read: Reader, node: Node, x: Any, exponent: Any) -> None:
    if type(exponent) not in (int, float) or exponent not in (0.5, 2, 3) or not isinstance(x, Node):
        raise NotANetworkError("a power is no square, cube or root")
    if exponent == 0.5:
        read.add(node, "unary", {"input": [read.data(x)]}, function="sqrt")
        return
    _square(read, node, x)
    if exponent == 3:
        read.add(node, "binary", {"input": [read.values[node]], "other": [read.data(x)]}, function="mul")


@row(torch.randn_like)
def _noise(read: Reader, node: Node, x: Any) -> None:
    read.add(node, "noise", {"input": [read.data(x)]})
    read.draws = True


@row(torch.softmax, F.softmax, "softmax")
def _softmax(read: Reader, node: Node, x: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> None:
    _add_softmax(read, node, x, dim, dtype, False)


@row(torch.log_softmax, F.log_softmax, "log_softmax")
def _log_softmax(read: Reader, node: Node, x: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> None:
    _add_softmax(read, node, x, dim, dtype, True)


@module_row(nn.Softmax2d)
def _softmax_of_channels(read: Reader, node: Node, module: Any, x: Any) -> None:
    _add_softmax(read, node, x, -3, None, False)


@module_row(nn.Softmax, nn.LogSoftmax)
def _softmax_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    _add_softmax(read, node, x, module.dim, None, isinstance(module, nn.LogSoftmax))
    read.note(module, "dim")


def _add_softmax(read: Reader, node: Node, x: Any, dim: Any, dtype: Any, logarithm: bool) -> None:
    if type(dim) is not int or dtype is not None:
        raise NotANetworkError("a softmax has no dimension, or another dtype")
    read.add(node, "softmax", {"input": [read.data(x)]}, dim=dim, logarithm=logarithm)


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


# ---- embeddings and norms -------------------------------------------------------------------------------------------


@module_row(nn.Embedding)
def _embedding_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        raise NotANetworkError(f"{name_of(node, read.modules)} has max_norm, scale_grad_by_freq or sparse gradients")
    _add_embedding(read, node, x, read.own(module, "weight"), module.padding_idx)
    read.note(module, "padding_idx", "max_norm", "scale_grad_by_freq", "sparse")


@module_row(nn.EmbeddingBag)
def _embedding_bag(read: Reader, node: Node, module: Any, x: Any) -> None:
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse or module.padding_idx is not None:
        raise NotANetworkError(f"{name_of(node, read.modules)} has max_norm, padding_idx or sparse gradients")
    if module.mode not in ("mean", "sum"):
        raise NotANetworkError(f"{name_of(node, read.modules)} takes the largest of its rows")
    rows = _embedded(read, x, read.own(module, "weight"), None)
    read.add(node, "mean", {"input": [rows]}, dims=[-2], sums=module.mode == "sum", rank=3)
    read.note(module, "padding_idx", "max_norm", "scale_grad_by_freq", "sparse", "mode", "include_last_offset")


@row(F.embedding)
def _embedding(read: Reader, node: Node, x: Any, weight: Any, padding_idx: Any = None) -> None:
    _add_embedding(read, node, x, [read.value(weight)], padding_idx)


@row(torch.arange)
def _arange(
    read: Reader, node: Node, start: Any, end: Any = None, step: Any = 1, *, dtype: Any = None, device: Any = None
) -> None:
    size = start if end is None else end
    from_zero = end is None or (type(start) is int and start == 0)
    if step != 1 or not from_zero or not (type(size) is int or size in read.sizes) or dtype not in (None, torch.int64):
        raise NotANetworkError("numbers begin behind 0, have a step, or an end that is no size")
    if not all(_takes_numbers(read, user) or _puts_one_in_front(user) or _picks(user) for user in node.users):
        raise NotANetworkError("numbers in a row go to more than embeddings")
    read.ranges[node] = size, False


def _puts_one_in_front(node: Node) -> bool:
    """Whether a node is `unsqueeze(0)`, or an index of None."""
    if node.target in (torch.unsqueeze, "unsqueeze"):
        return bool(node.args[1:] == (0,) or node.kwargs.get("dim") == 0)
    return node.target is operator.getitem and node.args[1] in (None, (None,), (None, slice(None)))


def _note_range_with_one(read: Reader, node: Node, x: Node) -> None:
    size, has_one_in_front = read.ranges[x]
    if has_one_in_front or not _puts_one_in_front(node) or not all(_takes_numbers(read, user) for user in node.users):
        raise NotANetworkError("numbers in a row go to more than embeddings")
    read.ranges[node] = size, True


def _slice_to_size(read: Reader, value: Value, dim: int, start: int, stop: Any, **attributes: Any) -> Value:
    """The elements of a dimension from `start` up to a size, which is a number or follows from other values'."""
    if type(stop) is int:
        return read.add(None, "slice", {"input": [value]}, dim=dim, start=start, stop=stop, **attributes)
    written, like = _write_sizes(read, (stop,))
    return read.add(None, "slice", {"input": [value], "like": like}, dim=dim, start=start, sizes=written, **attributes)


def _add_embedding(read: Reader, node: Node, x: Any, weight: list[Value], padding: Any) -> None:
    read.values[node] = _embedded(read, x, weight, padding)


def _embedded(read: Reader, x: Any, weight: list[Value], padding: Any) -> Value:
    if x in read.ranges:  # the first rows of the table
        if padding is not None:
            raise NotANetworkError("an embedding of numbers in a row has a padding")
        size, has_one_in_front = read.ranges[x]
        value = _slice_to_size(read, weight[0], 0, 0, size, fits=True)
        if has_one_in_front:
            value = read.add(None, "unsqueeze", {"input": [value]}, dim=0)
        return value
    column: dict[str, Any] = {}
    if x in read.columns:
        numbers, dim, index = read.columns[x]
        column = {"selects": True, "dim": dim, "index": index}
    else:
        numbers = read.value(x)
    if padding is not None and padding < 0:  # torch counts it from the end
        padding += weight[0].sizes[0]
    inputs = {"input": [read.whole_numbers(numbers)], "weight": weight}
    return read.add(None, "embedding", inputs, padding_idx=-1 if padding is None else padding, **column)


def _takes_numbers(read: Reader, node: Node) -> bool:
    """Whether a node is an embedding."""
    if node.op == "call_module":
        return MODULE_ROWS.get(layer_forward(read.modules[str(node.target)])) in (_embedding_module, _embedding_bag)
    return node.target is F.embedding


@module_row(nn.LayerNorm)
def _layer_norm_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    inputs = {"input": [read.data(x)], "weight": read.own(module, "weight"), "bias": read.own(module, "bias")}
    read.add(node, "layer_norm", inputs, features=prod(module.normalized_shape), epsilon=float(module.eps))
    read.note(module, "normalized_shape", "eps")


@module_row(nn.GroupNorm)
def _group_norm_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    inputs = {"input": [read.data(x)], "weight": read.own(module, "weight"), "bias": read.own(module, "bias")}
    read.add(node, "group_norm", inputs, groups=module.num_groups, epsilon=float(module.eps))
    read.note(module, "num_groups", "eps")


@row(F.group_norm)
def _group_norm(
    read: Reader, node: Node, x: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> None:
    inputs = {"input": [read.data(x)], "weight": read.optional(weight), "bias": read.optional(bias)}
    if type(num_groups) is not int or num_groups < 1:
        raise NotANetworkError("a group norm has no number of groups")
    read.add(node, "group_norm", inputs, groups=num_groups, epsilon=float(eps))


@module_row(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def _instance_norm_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    if module.track_running_stats or module.running_mean is not None:
        raise NotANetworkError("an instance norm has running statistics")
    inputs = {"input": [read.data(x)], "weight": read.own(module, "weight"), "bias": read.own(module, "bias")}
    dims = next(d for d in (1, 2, 3) if isinstance(module, getattr(nn, f"InstanceNorm{d}d")))
    read.add(node, "group_norm", inputs, groups=0, dims=dims, epsilon=float(module.eps))
    read.note(module, "track_running_stats", "running_mean", "eps", "num_features")


@row(F.layer_norm)
def _layer_norm(
    read: Reader, node: Node, x: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> None:
    sizes = [normalized_shape] if type(normalized_shape) is int else list(normalized_shape)
    if not all(type(size) is int for size in sizes):
        raise NotANetworkError("a layer norm's sizes depend on the input's")
    inputs = {"input": [read.data(x)], "weight": read.optional(weight), "bias": read.optional(bias)}
    read.add(node, "layer_norm", inputs, features=prod(sizes), epsilon=float(eps))


@row(F.rms_norm, torch.rms_norm)
def _rms_norm(read: Reader, node: Node, x: Any, normalized_shape: Any, weight: Any = None, eps: Any = None) -> None:
    if eps is None:
        raise NotANetworkError("an RMS norm's epsilon follows from the dtype")
    _add_rms_norm(read, node, x, normalized_shape, read.optional(weight), eps)


@module_row(nn.RMSNorm)
def _rms_norm_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    weight, eps = read.own(module, "weight"), module.eps
    if eps is None:
        if not weight or weight[0].tensor is None:
            raise NotANetworkError("an RMS norm's epsilon follows from the dtype")
        eps = _epsilon_of(module)
        read.guard.note_call(_epsilon_of, (module,), eps)
    _add_rms_norm(read, node, x, module.normalized_shape, weight, eps)
    read.note(module, "normalized_shape", "eps")


def _epsilon_of(module: nn.RMSNorm) -> float:
    """The epsilon of a norm that has none of its own."""
    return torch.finfo(module.weight.dtype).eps


def _add_rms_norm(read: Reader, node: Node, x: Any, sizes: Sequence[int], weight: list[Value], eps: float) -> None:
    if len(sizes) != 1:
        raise NotANetworkError("an RMS norm is over several dimensions")
    # (The dimension becomes one of the norm's size: it must have this size.)
    value = read.add(None, "unflatten", {"input": [read.data(x)]}, dim=-1, sizes=list(sizes))
    squares = read.add(None, "binary", {"input": [value], "other": [value]}, function="mul")
    mean = read.add(None, "mean", {"input": [squares]}, dims=[-1], keepdim=True)
    mean = read.add(None, "binary", {"input": [mean]}, function="add", number=float(eps))
    factor = read.add(None, "unary", {"input": [mean]}, function="rsqrt")
    value = read.add(None, "binary", {"input": [value], "other": [factor]}, function="mul")
    if weight:
        value = read.add(None, "binary", {"input": [value], "other": weight}, function="mul")
    read.values[node] = value


# ---- images ---------------------------------------------------------------------------------------------------------


@module_row(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def _conv_transpose(read: Reader, node: Node, module: Any, x: Any) -> None:
    inputs = {"input": [read.data(x)], "weight": read.own(module, "weight"), "bias": read.own(module, "bias")}
    names = ("stride", "padding", "output_padding", "dilation")
    settings = {name: list(getattr(module, name)) for name in names}
    read.add(node, "conv_transpose", inputs, **settings, groups=module.groups)
    read.note(module, *names, "groups", "padding_mode")


_POOLS: dict[Any, tuple[str, int]] = {
    **{getattr(F, f"avg_pool{d}d"): ("avg", d) for d in (1, 2, 3)},
    **{getattr(F, f"adaptive_avg_pool{d}d"): ("adaptive", d) for d in (1, 2, 3)},
}


@row(*(function for function, (kind, _) in _POOLS.items() if kind == "avg"))
def _avg_pool(
    read: Reader, node: Node, x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: Any = None
) -> None:  # fmt: skip
    dims = _POOLS[node.target][1]
    _add_avg_pool(read, node, x, dims, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


@module_row(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
def _avg_pool_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    _add_avg_pool(read, node, x, _dims_of(module), *(getattr(module, name, None) for name in names))
    read.note(module, *(name for name in names if hasattr(module, name)))


def _dims_of(module: nn.Module) -> int:
    kinds = {d: (getattr(nn, f"AvgPool{d}d"), getattr(nn, f"AdaptiveAvgPool{d}d")) for d in (1, 2, 3)}
    return next(dims for dims, both in kinds.items() if isinstance(module, both))


def _add_avg_pool(
    read: Reader, node: Node, x: Any, dims: int, kernel: Any, stride: Any, padding: Any, ceil_mode: Any,
    counts_padding: Any, divisor: Any
) -> None:  # fmt: skip
    if ceil_mode or divisor is not None:
        raise NotANetworkError("an average pool has ceil_mode or a divisor of its own")
    value = read.data(x)
    if _is_whole_image(read, value, dims, kernel, stride, padding):
        read.add(node, "mean", {"input": [value]}, dims=list(range(-dims, 0)), keepdim=True, rank=dims + 2)
        return
    size = each_dimension(kernel, dims)
    steps = size if stride in (None, (), []) else each_dimension(stride, dims)
    read.add(
        node, "avg_pool", {"input": [value]}, kernel=size, stride=steps, padding=each_dimension(padding, dims),
        count_include_pad=bool(counts_padding),
    )  # fmt: skip


_MAX_POOLS = {getattr(F, f"max_pool{d}d"): d for d in (1, 2, 3)}


@row(*_MAX_POOLS)
def _max_pool_of_computed_size(
    read: Reader, node: Node, x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False, return_indices: bool = False
) -> None:  # fmt: skip
    """A max-pool whose settings the matcher does not read, because they are no numbers."""
    dims = _MAX_POOLS[node.target]
    value = read.data(x)
    if return_indices or dilation != 1 or not _is_whole_image(read, value, dims, kernel_size, stride, padding):
        raise NotANetworkError("a max-pool's settings depend on the input's sizes")
    read.values[node] = _largest(read, value, dims, is_batch=True)


def _is_whole_image(read: Reader, value: Value, dims: int, kernel: Any, stride: Any, padding: Any) -> bool:
    """Whether a pool has one window, of the image's own sizes: `F.max_pool2d(x, x.shape[2:])`. That is so for images in
    a batch; without a batch, `x.shape[2:]` means other windows, and the network must refuse them."""
    if stride not in (None, (), []) or padding not in (0, (0,) * dims, [0] * dims):
        return False
    if isinstance(kernel, Node) and kernel in read.tails:
        return read.tails[kernel] in ((value, 2), (value, -dims))
    sizes = kernel if isinstance(kernel, (tuple, list)) else [kernel]
    known = [read.sizes.get(size) if isinstance(size, Node) else None for size in sizes]
    return any(known == [Size(((value, first + dim),)) for dim in range(dims)] for first in (2, -dims))


@row(*(function for function, (kind, _) in _POOLS.items() if kind == "adaptive"))
def _adaptive(read: Reader, node: Node, x: Any, output_size: Any) -> None:
    _add_adaptive(read, node, x, _POOLS[node.target][1], output_size)


@module_row(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
def _adaptive_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    _add_adaptive(read, node, x, _dims_of(module), module.output_size)
    read.note(module, "output_size")


def _add_adaptive(read: Reader, node: Node, x: Any, dims: int, sizes: Any) -> None:
    numbers = each_dimension(sizes, dims)
    if any(one < 1 for one in numbers):
        raise NotANetworkError("an adaptive pool has no size")
    read.add(node, "adaptive_avg_pool", {"input": [read.data(x)]}, sizes=numbers)


@row(F.interpolate)
def _interpolate(
    read: Reader, node: Node, x: Any, size: Any = None, scale_factor: Any = None, mode: str = "nearest",
    align_corners: Any = None, recompute_scale_factor: Any = None, antialias: bool = False
) -> None:  # fmt: skip
    if recompute_scale_factor or antialias:
        raise NotANetworkError("an interpolation recomputes its factors, or smooths")
    _add_upsample(read, node, x, size, scale_factor, mode, align_corners)


@module_row(nn.Upsample)
def _upsample_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    if module.recompute_scale_factor:
        raise NotANetworkError("an interpolation recomputes its factors")
    _add_upsample(read, node, x, module.size, module.scale_factor, module.mode, module.align_corners)
    read.note(module, "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor")


def _add_upsample(read: Reader, node: Node, x: Any, size: Any, factor: Any, mode: str, aligns: Any) -> None:
    dims = {"linear": 1, "bilinear": 2}.get(mode)
    if dims is None and mode != "nearest":
        raise NotANetworkError(f"an interpolation's mode is {mode}")
    inputs = {"input": [read.data(x)]}
    if size is not None:
        asked, inputs["like"] = _write_sizes_of_image(read, size, dims)
        if not 1 <= len(asked) <= 2:
            raise NotANetworkError("an interpolation has more than two dimensions")
        attributes = {"sizes": asked}
    else:
        if not isinstance(factor, (tuple, list)):
            factor = [factor] * (dims or 1)  # of the nearest pixels, one factor stands for all dimensions
        if not all(float(one).is_integer() for one in factor):
            raise NotANetworkError("an interpolation's factors are no whole numbers")
        if len(factor) > 2:
            raise NotANetworkError("an interpolation has more than two dimensions")
        attributes = {"factors": [int(one) for one in factor]}
    read.add(node, "upsample", inputs, **attributes, linear=mode != "nearest", align_corners=bool(aligns))


def _write_sizes_of_image(read: Reader, size: Any, dims: int | None) -> tuple[list[Any], list[Value]]:
    """The sizes of an image's dimensions as a program has them -> these, and the values `like`. dims: how many there
    are, if that is known."""
    if isinstance(size, Node) and size in read.tails:
        value, first = read.tails[size]
        count = -first if first < 0 else dims or 2  # (a network refuses where there are not as many)
        return [f"0.{dim}" for dim in range(first, first + count)], [value]
    if type(size) is int:
        if dims is None:
            raise NotANetworkError("one size stands for all dimensions of an image")
        size = (size,) * dims
    return _write_sizes(read, size if isinstance(size, (tuple, list)) else (size,))


@row(F.pad)
def _pad(read: Reader, node: Node, x: Any, pad: Any, mode: str = "constant", value: Any = None) -> None:
    _add_pad(read, node, x, pad, mode, value)


@module_row(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
def _pad_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    _add_pad(read, node, x, module.padding, "constant", module.value)
    read.note(module, "padding", "value")


@module_row(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d)
def _reflection_pad(read: Reader, node: Node, module: Any, x: Any) -> None:
    _add_border(read, node, module, x, "reflect")


@module_row(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d)
def _replication_pad(read: Reader, node: Node, module: Any, x: Any) -> None:
    _add_border(read, node, module, x, "replicate")


@module_row(nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d)
def _circular_pad(read: Reader, node: Node, module: Any, x: Any) -> None:
    _add_border(read, node, module, x, "circular")


def _add_border(read: Reader, node: Node, module: Any, x: Any, mode: str) -> None:
    _add_pad(read, node, x, module.padding, mode, None)
    read.note(module, "padding")


def _add_pad(read: Reader, node: Node, x: Any, pad: Any, mode: str, value: Any) -> None:
    if not all(type(one) is int and one >= 0 for one in pad):
        raise NotANetworkError("a padding takes elements away, or depends on sizes")
    if mode == "constant":
        read.add(node, "pad", {"input": [read.data(x)]}, padding=list(pad), value=float(value or 0.0))
    elif value:
        raise NotANetworkError(f"a padding of {mode} has a value")
    else:
        read.add(node, "border", {"input": [read.data(x)]}, padding=list(pad), mode=mode)


# ---- other orders of elements ---------------------------------------------------------------------------------------


@row(torch.flip)
def _flip(read: Reader, node: Node, x: Any, dims: Any) -> None:
    read.add(node, "flip", {"input": [read.data(x)]}, dims=_integers(dims))


@row("flip")
def _flip_method(read: Reader, node: Node, x: Any, *given: Any, dims: Any = None) -> None:
    """The method takes numbers one by one, too."""
    if not given and dims is None:
        raise NotANetworkError("flip has no dimensions")
    _flip(read, node, x, dims if not given else given if type(given[0]) is int else given[0])


@row(torch.roll, "roll")
def _roll(read: Reader, node: Node, x: Any, shifts: Any, dims: Any = None) -> None:
    if dims is None or dims == ():
        raise NotANetworkError("a tensor is rotated as if it were flat")
    every = [[one] if type(one) is int else one for one in (shifts, dims)]
    read.add(node, "roll", {"input": [read.data(x)]}, shifts=_integers(every[0]), dims=_integers(every[1]))


def _integers(given: Any) -> list[int]:
    if not all(type(one) is int for one in given):
        raise NotANetworkError("a call's numbers depend on sizes")
    return list(given)


@row(F.channel_shuffle)
def _channel_shuffle(read: Reader, node: Node, x: Any, groups: int) -> None:
    if type(groups) is not int or groups < 1:
        raise NotANetworkError("the groups of a channel shuffle are no number")
    read.add(node, "channel_shuffle", {"input": [read.data(x)]}, groups=groups)


@module_row(nn.ChannelShuffle)
def _channel_shuffle_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    _channel_shuffle(read, node, x, module.groups)
    read.note(module, "groups")


_MOST_INDICES = 4096  # each call compares them with what they were


def indices_held_by(module: nn.Module, name: str) -> tuple[Any, ...] | None:
    """The sizes and the numbers of a buffer of indices; None where it is none, or has too many for a network."""
    held = module._buffers.get(name)
    if type(held) is not Tensor or held.dtype != torch.int64 or held.device.type != "cpu":
        return None
    return (tuple(held.shape), *held.flatten().tolist()) if 0 < held.numel() <= _MOST_INDICES else None


def _indices(read: Reader, given: Any) -> tuple[tuple[int, ...], list[int]]:
    """The sizes of an index and its numbers: a list that the forward gives, or a buffer, which each call compares."""
    if isinstance(given, (list, tuple)) and given:
        return (len(given),), _integers(given)
    if isinstance(given, Node) and given in read.tensors:
        held, name = read.tensors[given]
        module = next((one for one in read.modules.values() if one._buffers is held), None)
        known = None if module is None else indices_held_by(module, name)
        if module is not None and known is not None:
            read.guard.note_call(indices_held_by, (module, name), known)
            return known[0], list(known[1:])
    raise NotANetworkError("an index is computed from something else")


@row(torch.index_select, "index_select")
def _index_select(read: Reader, node: Node, x: Any, dim: Any, index: Any) -> None:
    if type(dim) is not int or not isinstance(index, Node):
        raise NotANetworkError("a dimension depends on sizes, or an index is no tensor")
    sizes, numbers = _indices(read, index)
    if len(sizes) != 1 or min(numbers) < 0:
        raise NotANetworkError("an index is no row of numbers")
    read.add(node, "index_select", {"input": [read.data(x)]}, dim=dim, index=numbers)


def _add_index(read: Reader, value: Value, dim: int, indices: Sequence[Any]) -> tuple[Value, int]:
    """Adds an index of several numbers in each of some neighbouring dimensions -> the value, and how many dimensions
    have come in their place."""
    every = [_indices(read, one) for one in indices]
    sizes = every[0][0]
    if any(other != sizes for other, _ in every):
        raise NotANetworkError("indices are broadcast")
    numbers = [one for _, of_dimension in every for one in of_dimension]
    value = read.add(None, "index_select", {"input": [value]}, dim=dim, dims=len(every), index=numbers)
    if len(sizes) != 1:
        place = dim + len(every) - 1 if dim < 0 else dim
        kind, more = ("unflatten", {"sizes": list(sizes)}) if sizes else ("squeeze", {})
        value = read.add(None, kind, {"input": [value]}, dim=place, **more)
    return value, len(sizes)


# ---- sums and products ----------------------------------------------------------------------------------------------


@row(torch.mean, "mean")
def _mean(read: Reader, node: Node, x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> None:
    _add_mean(read, node, x, dim, keepdim, dtype, False)


@row(torch.sum, "sum")
def _sum(read: Reader, node: Node, x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> None:
    _add_mean(read, node, x, dim, keepdim, dtype, True)


def _add_mean(read: Reader, node: Node, x: Any, dim: Any, keepdim: bool, dtype: Any, sums: bool) -> None:
    if dtype is not None:
        raise NotANetworkError("a mean or a sum has a dtype of its own")
    read.add(node, "mean", {"input": [read.data(x)]}, dims=_dims_given(dim), keepdim=bool(keepdim), sums=sums)


def _dims_given(dim: Any) -> list[int]:
    """The dimensions that a reduction names; none where it goes over all."""
    dims = [] if dim is None else [dim] if type(dim) is int else list(dim)
    if not all(type(one) is int for one in dims):
        raise NotANetworkError("a reduction goes over dimensions that a call gives")
    return dims


@row(torch.norm, "norm")
def _norm(
    read: Reader, node: Node, x: Any, p: Any = "fro", dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> None:
    _check_dtype(dtype)
    dims = _dims_given(dim)
    if p == "fro" and len(dims) > 2:
        raise NotANetworkError("a matrix's norm goes over more than two dimensions")
    _add_norm(read, node, read.data(x), 2.0 if p in ("fro", None) else p, dims, keepdim)


@row(torch.linalg.vector_norm)
def _vector_norm(
    read: Reader, node: Node, x: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> None:
    _check_dtype(dtype)
    _add_norm(read, node, read.data(x), ord, _dims_given(dim), keepdim)


@row(torch.linalg.norm)
def _linalg_norm(
    read: Reader, node: Node, x: Any, ord: Any = None, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> None:
    _check_dtype(dtype)
    if ord is not None and type(dim) is not int:
        raise NotANetworkError("a norm may be a matrix's")
    _add_norm(read, node, read.data(x), 2.0 if ord is None else ord, _dims_given(dim), keepdim)


def _check_dtype(dtype: Any) -> None:
    if dtype is not None:
        raise NotANetworkError("a norm has a dtype of its own")


def _add_norm(read: Reader, node: Node | None, x: Value, p: Any, dims: Sequence[int], keepdim: bool) -> Value:
    """Adds the Euclidean norm, or the sum of the magnitudes (p = 1), over some dimensions."""
    if p not in (1, 2) or isinstance(p, bool):
        raise NotANetworkError(f"a norm is of degree {p}")
    options = {"dims": list(dims), "keepdim": bool(keepdim), "sums": True}
    if p == 1:
        magnitudes = read.add(None, "unary", {"input": [x]}, function="abs")
        return read.add(node, "mean", {"input": [magnitudes]}, **options)
    squares = read.add(None, "binary", {"input": [x], "other": [x]}, function="mul")
    sums = read.add(None, "mean", {"input": [squares]}, **options)
    return read.add(node, "unary", {"input": [sums]}, function="root")


@row(F.normalize)
def _normalize(read: Reader, node: Node, x: Any, p: float = 2.0, dim: Any = 1, eps: float = 1e-12) -> None:
    value = read.data(x)
    norm = read.add(None, "clamp", {"input": [_add_norm(read, None, value, p, _dims_given(dim), True)]}, min=float(eps))
    read.add(node, "binary", {"input": [value], "other": [norm]}, function="div")


@row(torch.var, "var")
def _var(
    read: Reader, node: Node, x: Any, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *,
    correction: Any = None,
) -> None:  # fmt: skip
    _add_variance(read, node, x, dim, unbiased, keepdim, correction)


@row(torch.std, "std")
def _std(
    read: Reader, node: Node, x: Any, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *,
    correction: Any = None,
) -> None:  # fmt: skip
    variance = _add_variance(read, None, x, dim, unbiased, keepdim, correction)
    read.add(node, "unary", {"input": [variance]}, function="root")


def _add_variance(
    read: Reader, node: Node | None, x: Any, dim: Any, unbiased: Any, keepdim: bool, correction: Any
) -> Value:
    if type(dim) is bool and unbiased is None and correction is None and not keepdim:  # x.var(False)
        dim, unbiased = None, dim
    if (unbiased is not None and correction is not None) or type(unbiased) not in (bool, type(None)):
        raise NotANetworkError("a variance has two corrections")
    if type(dim) is bool or (dim is not None and type(dim) is not int and not dim):
        raise NotANetworkError("a variance goes over no dimensions")
    less = float(correction) if correction is not None else 1.0 if unbiased is None else float(unbiased)
    value, dims = read.data(x), _dims_given(dim)
    mean = read.add(None, "mean", {"input": [value]}, dims=dims, keepdim=True)
    rest = read.add(None, "binary", {"input": [value], "other": [mean]}, function="sub")
    squares = read.add(None, "binary", {"input": [rest], "other": [rest]}, function="mul")
    return read.add(node, "mean", {"input": [squares]}, dims=dims, keepdim=bool(keepdim), correction=less)


@row(torch.amax, "amax")
def _amax(read: Reader, node: Node, x: Any, dim: Any = (), keepdim: bool = False) -> None:
    read.add(node, "amax", {"input": [read.data(x)]}, dims=_dims_given(dim), keepdim=bool(keepdim))


@row(torch.logsumexp, "logsumexp")
def _logsumexp(read: Reader, node: Node, x: Any, dim: Any, keepdim: bool = False) -> None:
    value, dims = read.data(x), _dims_given(dim)
    if not dims:
        raise NotANetworkError("a logarithm of a sum goes over no dimension")
    largest = read.add(None, "amax", {"input": [value]}, dims=dims, keepdim=True)
    # An infinite maximum is replaced by a finite one, since infinity minus infinity is NaN.
    if read.dtype() is None:
        raise NotANetworkError("the dtype of a logarithm of a sum is not known")
    most = 3e38 if read.dtype() is not torch.float64 else 1.7e308
    largest = read.add(None, "clamp", {"input": [largest]}, min=-most, max=most)
    rest = read.add(None, "binary", {"input": [value], "other": [largest]}, function="sub")
    powers = read.add(None, "activation", {"input": [rest]}, activation="exp")
    sums = read.add(None, "mean", {"input": [powers]}, dims=dims, keepdim=True, sums=True)
    logarithm = read.add(None, "unary", {"input": [sums]}, function="log")
    value = read.add(None, "binary", {"input": [logarithm], "other": [largest]}, function="add")
    # (The dimensions have one element now, and a mean over them takes them away.)
    read.values[node] = value if keepdim else read.add(None, "mean", {"input": [value]}, dims=dims)


@row(torch.max, "max")
def _max(read: Reader, node: Node, x: Any, dim: Any = None, keepdim: bool = False) -> None:
    """The largest elements of a dimension. Their places, the second result, are no value of a network."""
    if type(dim) is not int:
        raise NotANetworkError("a maximum is of two tensors, or of a whole one")
    if not only_first_is_taken(node):
        raise NotANetworkError("the places of a maximum are read")
    value = read.add(None, "amax", {"input": [read.data(x)]}, dims=[dim], keepdim=bool(keepdim), ties="first")
    read.parts[node] = [value]


_LARGEST = {getattr(F, f"adaptive_max_pool{d}d"): d for d in (1, 2, 3)}


@row(*_LARGEST)
def _adaptive_max(read: Reader, node: Node, x: Any, output_size: Any, return_indices: bool = False) -> None:
    _add_adaptive_max(read, node, x, _LARGEST[node.target], output_size, return_indices)


@module_row(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
def _adaptive_max_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    dims = next(d for d in (1, 2, 3) if isinstance(module, getattr(nn, f"AdaptiveMaxPool{d}d")))
    _add_adaptive_max(read, node, x, dims, module.output_size, module.return_indices)
    read.note(module, "output_size", "return_indices")


def _add_adaptive_max(read: Reader, node: Node, x: Any, dims: int, sizes: Any, indices: bool) -> None:
    if indices or any(one != 1 for one in each_dimension(sizes, dims)):
        raise NotANetworkError("an adaptive max-pool gives more than one element a channel, or places")
    read.values[node] = _largest(read, read.data(x), dims)


def _largest(read: Reader, value: Value, dims: int, is_batch: bool = False) -> Value:
    """The largest element of each channel. Of equal ones the first gets the gradient, as in a pool. is_batch: whether
    the images must be in a batch."""
    if dims > 1:
        value = read.add(None, "flatten", {"input": [value]}, start_dim=-dims)
    rank = {"rank": 3} if is_batch else {}
    value = read.add(None, "amax", {"input": [value]}, dims=[-1], keepdim=True, ties="first", **rank)
    for _ in range(dims - 1):
        value = read.add(None, "unsqueeze", {"input": [value]}, dim=-1)
    return value


_DROPOUTS_OF_CHANNELS = {getattr(F, f"dropout{d}d"): d for d in (1, 2, 3)}


@row(*_DROPOUTS_OF_CHANNELS)
def _dropout_of_channels(
    read: Reader, node: Node, x: Any, p: float = 0.5, training: bool = True, inplace: bool = False
) -> None:
    read.dropout(node, read.data(x), p if training else 0.0, _DROPOUTS_OF_CHANNELS[node.target])


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


@row(operator.matmul, torch.matmul, torch.bmm, torch.mm, "matmul", "bmm", "mm")
def _matmul(read: Reader, node: Node, x: Any, y: Any) -> None:
    operands = [read.data(x), read.data(y)]
    rank = {torch.mm: 2, "mm": 2, torch.bmm: 3, "bmm": 3}.get(node.target)
    if rank:  # others have any number of dimensions
        operands = [_checked(read, one, [-1] * rank) for one in operands]
    read.add(node, "matmul", {"input": operands[:1], "other": operands[1:]})


@row(torch.addmm, torch.baddbmm, "addmm", "baddbmm")
def _addmm(read: Reader, node: Node, x: Any, left: Any, right: Any, *, beta: Any = 1, alpha: Any = 1) -> None:
    if beta != 1 or alpha != 1:
        raise NotANetworkError("a sum has a factor")
    batch = ["0.0"] if node.target in (torch.baddbmm, "baddbmm") else []
    first = _checked(read, read.data(left), [-1, -1, *[-1] * len(batch)])
    second = _checked(read, read.data(right), [*batch, -1, -1], first if batch else None)
    product = read.add(None, "matmul", {"input": [first], "other": [second]})
    total = read.add(None, "binary", {"input": [product], "other": [read.data(x)]}, function="add")
    read.values[node] = _checked(read, total, [f"0.{dim}" for dim in range(2 + len(batch))], product)


@row(F.cosine_similarity)
def _cosine_similarity(read: Reader, node: Node, x1: Any, x2: Any, dim: int = 1, eps: float = 1e-8) -> None:
    if not eps >= 0:
        raise NotANetworkError("a cosine's epsilon is below zero")
    directions = []
    second = read.data(x2)
    # torch takes norms of the tensors that it has expanded. (Where the second is the smaller one, the network refuses.)
    first = read.add(None, "expand", {"input": [read.data(x1)], "like": [second]})
    for value in (first, second):
        norm = _add_norm(read, None, value, 2, [dim], True)
        least = read.add(None, "clamp", {"input": [norm]}, min=float(eps))
        # As in torch, the gradient of a norm below epsilon is that of the norm: what makes it larger is a constant.
        more = read.add(None, "binary", {"input": [least], "other": [norm]}, function="sub")
        more = read.add(None, "detach", {"input": [more]})
        norm = read.add(None, "binary", {"input": [norm], "other": [more]}, function="add")
        directions.append(read.add(None, "binary", {"input": [value], "other": [norm]}, function="div"))
    products = read.add(None, "binary", {"input": directions[:1], "other": directions[1:]}, function="mul")
    read.add(node, "mean", {"input": [products]}, dims=[dim], sums=True)


@module_row(nn.CosineSimilarity)
def _cosine_similarity_module(read: Reader, node: Node, module: Any, x1: Any, x2: Any) -> None:
    _cosine_similarity(read, node, x1, x2, module.dim, module.eps)
    read.note(module, "dim", "eps")


@row("detach", torch.detach)
def _detach(read: Reader, node: Node, x: Any) -> None:
    read.add(node, "detach", {"input": [read.data(x)]})


_EINSUM = re.compile(r"[A-Za-z ]+,[A-Za-z ]+(->[A-Za-z ]*)?")  # of two tensors, without an ellipsis


@row(torch.einsum)
def _einsum(read: Reader, node: Node, equation: Any, *given: Any) -> None:
    operands = given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
    if not isinstance(equation, str) or not _EINSUM.fullmatch(equation) or len(operands) != 2:
        raise NotANetworkError("an einsum is of other than two tensors, or has an ellipsis")
    left, arrow, result = equation.replace(" ", "").partition("->")
    names = left.split(",")
    letters = "".join(names)
    if not arrow:
        result = "".join(sorted(one for one in set(letters) if letters.count(one) == 1))
    if not all(len(set(name)) == len(name) > 0 for name in (*names, result or "a")) or not set(result) <= set(letters):
        raise NotANetworkError("an einsum has a diagonal")
    first, second = map(read.data, operands)
    first = _checked(read, first, [-1] * len(names[0]))
    second = _checked(read, second, [f"0.{names[0].index(one)}" if one in names[0] else -1 for one in names[1]], first)
    kept = [result + name for name in names[::-1]]
    _add_product(read, node, [_summed(read, *one) for one in zip((first, second), names, kept, strict=True)], result)


def _checked(read: Reader, value: Value, sizes: Sequence[Any], like: Value | None = None) -> Value:
    """The value, which must have as many dimensions as there are sizes, and these sizes where they are not -1."""
    inputs = {"input": [value], "like": [like] if like else []}
    return read.add(None, "check_sizes", inputs, sizes=list(sizes))


def _summed(read: Reader, value: Value, name: str, kept: str) -> tuple[Value, str]:
    """Sums over the dimensions of an einsum's operand that nothing else has."""
    alone = [dim for dim, letter in enumerate(name) if letter not in kept]
    if alone:
        value = read.add(None, "mean", {"input": [value]}, dims=alone, sums=True)
    return value, "".join(letter for letter in name if letter in kept)


def _arranged(read: Reader, value: Value, name: str, order: str) -> Value:
    """Brings dimensions into an order, in which "1" is a dimension of one element that is not there yet."""
    letters = [letter for letter in order if letter != "1"]
    if letters != list(name):
        value = read.add(None, "permute", {"input": [value]}, dims=[name.index(letter) for letter in letters])
    for dim, letter in enumerate(order):
        if letter == "1":
            value = read.add(None, "unsqueeze", {"input": [value]}, dim=dim)
    return value


def _add_product(read: Reader, node: Node, values: Sequence[tuple[Value, str]], result: str) -> None:
    """Adds an einsum of two operands: a product of matrices whose rows are dimensions of the first alone and whose
    columns are dimensions of the second alone; or, where one has no such dimension, products and a sum."""
    (first, a), (second, b) = values
    batch = "".join(letter for letter in a if letter in b and letter in result)
    summed = "".join(letter for letter in a if letter in b and letter not in result)
    rows, columns = ("".join(one for one in own if one not in other) for own, other in ((a, b), (b, a)))
    if summed and rows and columns:
        # All but the last of the rows, and of the columns, are dimensions of the batch that the other operand lacks.
        ahead, behind = rows[:-1], columns[:-1]
        lefts = batch + ahead + "1" * len(behind) + rows[-1] + summed
        rights = batch + "1" * len(ahead) + behind + summed + columns[-1]
        left, right = _arranged(read, first, a, lefts), _arranged(read, second, b, rights)
        if len(summed) > 1:
            at = len(rights) - len(summed) - 1
            left = read.add(None, "flatten", {"input": [left]}, start_dim=-len(summed))
            right = read.add(None, "flatten", {"input": [right]}, start_dim=at, end_dim=at + len(summed) - 1)
        value = read.add(None, "matmul", {"input": [left], "other": [right]})
        name = batch + ahead + behind + rows[-1] + columns[-1]
    else:
        name = batch + rows + columns + summed
        left = _arranged(read, first, a, batch + rows + "1" * len(columns) + summed)
        right = _arranged(read, second, b, batch + "1" * len(rows) + columns + summed)
        value = read.add(None, "binary", {"input": [left], "other": [right]}, function="mul")
        if summed:
            value = read.add(None, "mean", {"input": [value]}, dims=[-1 - i for i in range(len(summed))], sums=True)
        name = name[: len(name) - len(summed)]
    read.values[node] = _arranged(read, value, name, result)


# ---- what moves elements --------------------------------------------------------------------------------------------


@row(torch.flatten, "flatten")
def _flatten(read: Reader, node: Node, x: Any, start_dim: int = 0, end_dim: int = -1) -> None:
    read.add(node, "flatten", {"input": [read.data(x)]}, start_dim=start_dim, end_dim=end_dim)


@row(torch.unflatten, "unflatten")
def _unflatten(read: Reader, node: Node, x: Any, dim: int, sizes: Any) -> None:
    read.add(node, "unflatten", {"input": [read.data(x)]}, dim=dim, sizes=each_dimension(sizes, len(sizes)))


@module_row(nn.Unflatten)
def _unflatten_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    sizes = module.unflattened_size
    read.add(node, "unflatten", {"input": [read.data(x)]}, dim=module.dim, sizes=each_dimension(sizes, len(sizes)))
    read.note(module, "dim", "unflattened_size")


@row("view", "reshape", torch.reshape)
def _view(read: Reader, node: Node, x: Any, *sizes: Any, **named: Any) -> None:
    if named or not sizes or any(isinstance(one, torch.dtype) for one in sizes):
        raise NotANetworkError("a view is of another dtype")
    written, like = _write_sizes(read, sizes)
    read.add(node, "reshape", {"input": [read.data(x)], "like": like}, sizes=written)


def _write_sizes(read: Reader, sizes: Sequence[Any]) -> tuple[list[Any], list[Value]]:
    """Sizes that a call gives, one by one or in a tuple, as a program has them -> these, and the values `like`."""
    asked = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
    written: list[Any] = []
    like: list[Value] = []
    for size in asked:
        known = read.sizes.get(size) if isinstance(size, Node) else None
        if known is not None:
            factors = [str(known.factor)] if known.factor != 1 or not known.dimensions else []
            for value_of, dim in known.dimensions:
                if value_of not in like:
                    like.append(value_of)
                factors.append(f"{like.index(value_of)}.{dim}")
            divided = f"/{known.divisor}" if known.divisor != 1 else ""
            written.append("*".join(factors) + divided)
        elif type(size) is int:
            written.append(size)
        else:
            raise NotANetworkError("a tensor's sizes are computed")
    return written, like


@row("view_as", "reshape_as")
def _view_as(read: Reader, node: Node, x: Any, other: Any) -> None:
    read.add(node, "reshape", {"input": [read.data(x)], "like": [read.value(other)]})


@row("expand", "broadcast_to", torch.broadcast_to)
def _expand(read: Reader, node: Node, x: Any, *sizes: Any) -> None:
    written, like = _write_sizes(read, sizes)
    read.add(node, "expand", {"input": [read.data(x)], "like": like}, sizes=written)


@row("expand_as")
def _expand_as(read: Reader, node: Node, x: Any, other: Any) -> None:
    read.add(node, "expand", {"input": [read.data(x)], "like": [read.value(other)]})


@row("repeat")
def _repeat(read: Reader, node: Node, x: Any, *sizes: Any) -> None:
    written, like = _write_sizes(read, sizes)
    read.add(node, "repeat", {"input": [read.data(x)], "like": like}, sizes=written)


@row(torch.zeros)
def _zeros(read: Reader, node: Node, *sizes: Any, **named: Any) -> None:
    _note_constant(read, node, sizes, 0.0, **named)


@row(torch.ones)
def _ones(read: Reader, node: Node, *sizes: Any, **named: Any) -> None:
    _note_constant(read, node, sizes, 1.0, **named)


@row("new_zeros")
def _new_zeros(read: Reader, node: Node, x: Any, *sizes: Any, **named: Any) -> None:
    _note_constant(read, node, sizes, 0.0, read.data(x), **named)


@row("new_ones")
def _new_ones(read: Reader, node: Node, x: Any, *sizes: Any, **named: Any) -> None:
    _note_constant(read, node, sizes, 1.0, read.data(x), **named)


@row("new_full")
def _new_full(read: Reader, node: Node, x: Any, size: Any, fill_value: Any, **named: Any) -> None:
    _note_constant(read, node, size, fill_value, read.data(x), **named)


@row(torch.zeros_like)
def _zeros_like(read: Reader, node: Node, x: Any, **named: Any) -> None:
    _note_constant(read, node, None, 0.0, read.data(x), **named)


@row(torch.ones_like)
def _ones_like(read: Reader, node: Node, x: Any, **named: Any) -> None:
    _note_constant(read, node, None, 1.0, read.data(x), **named)


@row(torch.full_like)
def _full_like(read: Reader, node: Node, x: Any, fill_value: Any, **named: Any) -> None:
    _note_constant(read, node, None, fill_value, read.data(x), **named)


def _note_constant(
    read: Reader, node: Node, sizes: Any, number: Any, like: Value | None = None, /, *, dtype: Any = None,
    device: Any = None, **others: Any
) -> None:  # fmt: skip
    """Notes a tensor of these sizes, or of the sizes of `like`. The dtype is that of `like`, or the model's."""
    if others or type(number) not in (int, float) or not isfinite(number):
        raise NotANetworkError("a constant has settings that no network knows")
    if not (device is None or isinstance(device, Node) or torch.device(device).type == "cpu"):
        raise NotANetworkError(f"a constant lies on {device}")
    if dtype is None and like is None:
        dtype = torch.get_default_dtype()
    if not (dtype is None or isinstance(dtype, Node)) and dtype != read.dtype():
        raise NotANetworkError(f"a constant is of {dtype}")
    if sizes is None:
        read.constants[node] = {"like": [like] if like else []}, {"value": float(number)}
        return
    written, known = _write_sizes(read, sizes)
    read.constants[node] = {"like": known}, {"sizes": written, "value": float(number)}


@row(F.pixel_shuffle, torch.pixel_shuffle)
def _pixel_shuffle(read: Reader, node: Node, x: Any, upscale_factor: int) -> None:
    r = upscale_factor
    apart = ["0.0", f"0.1/{r * r}", r, r, "0.2", "0.3"]
    _move_pixels(read, node, x, apart, [0, 1, 4, 2, 5, 3], ["0.0", f"0.1/{r * r}", f"{r}*0.2", f"{r}*0.3"])


@row(F.pixel_unshuffle, torch.pixel_unshuffle)
def _pixel_unshuffle(read: Reader, node: Node, x: Any, downscale_factor: int) -> None:
    r = downscale_factor
    apart = ["0.0", "0.1", f"0.2/{r}", r, f"0.3/{r}", r]
    _move_pixels(read, node, x, apart, [0, 1, 3, 5, 2, 4], ["0.0", f"{r * r}*0.1", f"0.2/{r}", f"0.3/{r}"])


@module_row(nn.PixelShuffle)
def _pixel_shuffle_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    _pixel_shuffle(read, node, x, module.upscale_factor)
    read.note(module, "upscale_factor")


@module_row(nn.PixelUnshuffle)
def _pixel_unshuffle_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    _pixel_unshuffle(read, node, x, module.downscale_factor)
    read.note(module, "downscale_factor")


def _move_pixels(read: Reader, node: Node, x: Any, apart: list[Any], dims: list[int], joined: list[str]) -> None:
    """Takes dimensions of images apart, permutes them and joins them."""
    value = read.data(x)
    parts = read.add(None, "reshape", {"input": [value], "like": [value]}, sizes=apart)
    moved = read.add(None, "permute", {"input": [parts]}, dims=dims)
    read.add(node, "reshape", {"input": [moved], "like": [value]}, sizes=joined)


@row(torch.squeeze, "squeeze")
def _squeeze(read: Reader, node: Node, x: Any, dim: Any = "every") -> None:
    if dim == "every":
        read.add(node, "squeeze", {"input": [read.data(x)]}, every=True)
        return
    if type(dim) is not int:
        raise NotANetworkError("squeeze takes away several dimensions")
    read.add(node, "squeeze", {"input": [read.data(x)]}, dim=dim)


@row(torch.unsqueeze, "unsqueeze")
def _unsqueeze(read: Reader, node: Node, x: Any, dim: int) -> None:
    if x in read.ranges:
        return _note_range_with_one(read, node, x)
    read.add(node, "unsqueeze", {"input": [read.data(x)]}, dim=dim)


@row(torch.transpose, "transpose", torch.swapaxes, "swapaxes", torch.swapdims, "swapdims")
def _transpose(read: Reader, node: Node, x: Any, first: int, second: int) -> None:
    read.add(node, "transpose", {"input": [read.data(x)]}, first=first, second=second)


@row(torch.t, "t")
def _turn(read: Reader, node: Node, x: Any) -> None:
    read.add(node, "permute", {"input": [read.data(x)]}, dims=[1, 0])  # (which refuses other numbers of dimensions)


@row(torch.permute, "permute")
def _permute(read: Reader, node: Node, x: Any, *dims: Any) -> None:
    given = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    read.add(node, "permute", {"input": [read.data(x)]}, dims=list(given))


@row("contiguous")
def _contiguous(read: Reader, node: Node, x: Any) -> None:
    read.add(node, "contiguous", {"input": [read.data(x)]})


@module_row(nn.Flatten)
def _flatten_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    _flatten(read, node, x, module.start_dim, module.end_dim)
    read.note(module, "start_dim", "end_dim")


@row(torch.cat, torch.concat)
def _cat(read: Reader, node: Node, parts: Any, dim: int = 0) -> None:
    read.add(node, "cat", {"inputs": [read.data(one) for one in parts]}, dim=dim)


@row(torch.stack)
def _stack(read: Reader, node: Node, parts: Any, dim: int = 0) -> None:
    values = [read.add(None, "unsqueeze", {"input": [read.data(one)]}, dim=dim) for one in parts]
    read.add(node, "cat", {"inputs": values}, dim=dim)


@row(torch.chunk, "chunk")
def _chunk(read: Reader, node: Node, x: Any, chunks: int, dim: int = 0) -> None:
    _add_split(read, node, x, dim, chunks=chunks)


@row(torch.split, "split")
def _split(read: Reader, node: Node, x: Any, size: Any, dim: int = 0) -> None:
    if type(size) is int:
        _add_split(read, node, x, dim, size=size)
    else:
        _add_split(read, node, x, dim, sizes=list(size))


@row(torch.unbind, "unbind")
def _unbind(read: Reader, node: Node, x: Any, dim: int = 0) -> None:
    _add_split(read, node, x, dim, unbind=True)


def _add_split(read: Reader, node: Node, x: Any, dim: int, **attributes: Any) -> None:
    """Adds a split. There are as many parts as the model unpacks, or as the call names."""
    count = attributes.get("chunks") or len(attributes.get("sizes", ()))
    unpacked = _only_user(node)
    if unpacked is not None and unpacked.target is unpack:
        count = int(unpacked.args[1])  # type: ignore[arg-type]
    if not count:
        raise NotANetworkError("a tensor is split into parts whose number depends on its sizes")
    parts = [Value(()) for _ in range(count)]
    read.lines.append(Line("split", {"input": [read.data(x)]}, parts, {"dim": dim, **attributes}))
    read.parts[node] = parts


# ---- sizes and parts ------------------------------------------------------------------------------------------------


@row("size")
def _size(read: Reader, node: Node, x: Any, dim: Any = None) -> None:
    if dim is None:
        read.shapes[node] = read.value(x)
    else:
        _add_size(read, node, read.value(x), dim)


@row(getattr)
def _attribute(read: Reader, node: Node, x: Any, name: str) -> None:
    if name == "shape":
        read.shapes[node] = read.value(x)
    elif name == "values" and x.target in (torch.max, "max") and x in read.parts:
        read.values[node] = read.parts[x][0]
    elif name == "mT":
        read.add(node, "transpose", {"input": [read.data(x)]}, first=-2, second=-1)
    elif name not in ("device", "dtype"):
        raise NotANetworkError(f"the model asks a tensor for {name}")


def _add_size(read: Reader, node: Node, value: Value, dim: Any) -> None:
    if type(dim) is not int:
        raise NotANetworkError("the model asks for several sizes at once")
    read.sizes[node] = Size(((value, dim),))


@row(unpack)
def _unpack(read: Reader, node: Node, whole: Any, count: int) -> None:
    if whole in read.shapes:
        read.shapes[node] = read.shapes[whole]
    elif whole in read.parts and (len(read.parts[whole]) == count or only_first_is_taken(node)):
        read.parts[node] = read.parts[whole]
    else:
        raise NotANetworkError("the model unpacks a tensor")


@row(operator.getitem)
def _index(read: Reader, node: Node, whole: Any, index: Any) -> None:
    if whole in read.shapes:
        if isinstance(index, slice) and type(index.start) is int and index.stop is None and index.step is None:
            read.tails[node] = read.shapes[whole], index.start
            return None
        return _add_size(read, node, read.shapes[whole], index)
    if whole in read.ranges:
        return _note_range_with_one(read, node, whole)
    if whole in read.parts:
        part = read.parts[whole][index]
        if isinstance(part, list):
            read.parts[node] = part
        else:
            read.values[node] = part
        return
    steps = list(index) if isinstance(index, tuple) else [index]
    if node.users and all(_takes_numbers(read, user) for user in node.users):  # x[:, 2]
        *before, place = steps
        if type(place) is int and all(one == slice(None) for one in before):
            read.columns[node] = read.value(whole), len(before), place
            return
    value = read.data(whole)
    dim = 0
    if _picks(node) and not any(one in read.tensors for one in steps[:2]):
        return _pick(read, node, value, *steps[:2])
    if steps[0] is Ellipsis:
        del steps[0]
        if not steps or None in steps or (len(steps) > 1 and any(type(one) is int for one in steps)):
            raise NotANetworkError("an index behind an ellipsis is more than one number, or parts")
        dim = -len(steps)
    lists = [i for i, one in enumerate(steps) if isinstance(one, (list, Node))]
    if lists and (any(type(one) is int for one in steps) or lists != list(range(lists[0], lists[-1] + 1))):
        raise NotANetworkError("an index has numbers beside lists, or lists apart from one another")
    for i, one in enumerate(steps):
        if i not in lists:
            value, gone = _choose(read, value, one, dim)
            dim += 0 if gone else 1
        elif i == lists[0]:
            value, dims = _add_index(read, value, dim, [steps[place] for place in lists])
            dim += len(lists) if dim < 0 else dims  # from the end, the dimensions behind have the numbers that they had
    if value is read.data(whole):  # x[:]
        value = read.add(None, "slice", {"input": [value]}, dim=0)
    read.values[node] = value


def _picks(node: Node) -> bool:
    """Whether a node is an index of two tensors, as in y[torch.arange(len(y)), lengths - 1]."""
    if node.target is not operator.getitem or not isinstance(node.args[1], tuple) or len(node.args[1]) < 2:
        return False
    first, second, *rest = node.args[1]
    return isinstance(first, Node) and isinstance(second, Node) and all(one == slice(None) for one in rest)


def _pick(read: Reader, node: Node, value: Value, rows: Node, places: Node) -> None:
    inputs = {"places": [read.whole_numbers(read.value(places))], "input": [value]}
    if rows not in read.ranges:
        inputs["rows"] = [read.whole_numbers(read.value(rows))]
    elif not _is_size_of(read, rows, value):
        raise NotANetworkError("an index counts other rows than the tensor has")
    read.add(node, "pick", inputs)


def _is_size_of(read: Reader, rows: Node, value: Value) -> bool:
    """Whether numbers in a row go up to a value's first size."""
    size, has_one_in_front = read.ranges[rows]
    return not has_one_in_front and isinstance(size, Node) and read.sizes.get(size) == Size(((value, 0),))


def _choose(read: Reader, value: Value, index: Any, dim: int) -> tuple[Value, bool]:
    """Applies one part of an index -> the value, and whether the dimension is gone."""
    if type(index) is int:
        return read.add(None, "select", {"input": [value]}, dim=dim, index=index), True
    if index is None:
        return read.add(None, "unsqueeze", {"input": [value]}, dim=dim), False
    if isinstance(index, slice):
        start, stop, step = index.start, index.stop, index.step
        start_is_number = start is None or type(start) is int
        if isinstance(stop, Node) and stop in read.sizes and start_is_number and step in (None, 1):
            return _slice_to_size(read, value, dim, start or 0, stop), False
        if not all(one is None or type(one) is int for one in (start, stop, step)) or (step or 1) < 1:
            raise NotANetworkError("an index depends on the input's sizes")
        if (start, stop, step) in ((None, None, None), (0, None, None)):
            return value, False
        given = {"start": start or 0, **({} if stop is None else {"stop": stop}), "step": step or 1}
        return read.add(None, "slice", {"input": [value]}, dim=dim, **given), False
    raise NotANetworkError(f"an index is a {type(index).__name__}")
