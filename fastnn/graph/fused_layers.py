"""What each node of a fused graph is among the layers of networks, in training and in inference: a row for each
function, method or module. This file has the rows of what the matcher has made, of recurrent layers, embeddings and
norms; the files that it imports to register their rows have the others."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from fastnn.activations import parse
from fastnn.graph import (  # noqa: F401 (register their rows)
    attention_layers,
    elementwise_layers,
    image_layers,
    loss_layers,
    mask_layers,
    random_layers,
    reduction_layers,
)
from fastnn.graph.joining import chooses_last, kernel_of
from fastnn.graph.reader import (
    NotANetworkError,
    Reader,
    each_dimension,
    module_row,
    name_of,
    only_user,
    row,
    row_of_class,
)
from fastnn.graph.shape_layers import slice_to_size
from fastnn.network_program import POOL_NAMES, Line, Value, conv_attributes
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


def _last_step(node: Node, layer: Any) -> list[Node] | None:
    """The nodes that take a recurrent layer's last step, in their order, if only that step is used. Else None."""
    part = only_user(node)
    if layer.bidirectional or part is None or part.target is not operator.getitem:
        return None
    if part.args[1] == 0:
        end = only_user(part)
        return [part, end] if end and _takes_last(end, (slice(None), -1) if layer.batch_first else -1) else None
    if part.args[1] not in (1, -1):
        return None
    path = [part]
    if layer.mode == "LSTM":
        h = only_user(part)
        if h is None or h.target is not operator.getitem or h.args[1] != 0:
            return None
        path.append(h)
    end = only_user(path[-1])
    return [*path, end] if end and _takes_last(end, -1) else None


def _batch_of_zeros(
    read: Reader, node: Any, before: Sequence[int], features: int
) -> tuple[list[Any], list[Value]] | None:
    """For a state of zeros, with which a layer begins anyway: the size of its batch as a program writes it, in a list
    that is empty where there is no batch, and the values `like`. None for any other state.

    before: the sizes in front of the batch."""
    inputs, attributes = read.constants.get(node, ({}, {})) if isinstance(node, Node) else ({}, {})
    sizes, ahead = attributes.get("sizes", []), len(before)
    if attributes.get("value") != 0 or -1 in sizes or len(sizes) - ahead not in (1, 2):
        return None
    is_right = sizes[:ahead] == [*before] and sizes[-1] == features
    return (sizes[ahead:-1], inputs.get("like", [])) if is_right else None


def _input_and_states(
    read: Reader, x: Any, given: Any, features: Sequence[int], before: Sequence[int], rank: int, place: int
) -> tuple[Value, list[Value]]:
    """A recurrent layer's input and its states. States of zeros are left out: then the input must have as many
    sequences as they have.

    before: the sizes of a state in front of its batch. rank, place: of an input with a batch, how many dimensions it
    has, and which of them is the batch."""
    value, nodes = read.data(x), list(given) if isinstance(given, (tuple, list)) else [given]
    if given is None:
        return value, []
    zeros = [_batch_of_zeros(read, node, before, size) for node, size in zip(nodes, features, strict=False)]
    if len(nodes) == len(features) and None not in zeros:
        for batch, like in (one for at, one in enumerate(zeros) if one is not None and one not in zeros[:at]):
            sizes: list[Any] = [-1] * (rank - 1)
            sizes[place:place] = batch
            value = read.add(None, "check_sizes", {"input": [value], "like": like}, sizes=sizes)
        return value, []
    if len(nodes) == 1 and len(features) == 2:  # (h, c) as one value
        parts = read.parts.get(nodes[0])
        if not isinstance(parts, list) or len(parts) != 2:
            raise NotANetworkError("a recurrent layer's state is computed from something else")
        return value, list(parts)
    return value, [read.data(node) for node in nodes]


@row_of_class(nn.RNNBase)
def _recurrent(read: Reader, node: Node, module: Any, x: Any, hx: Any = None) -> None:
    layer: Any = kernel_of(module)
    if layer is None:
        raise NotANetworkError(f"{node.name} has hooks or a forward of its own")
    is_lstm = layer.mode == "LSTM"
    features = [layer.proj_size or layer.hidden_size, layer.hidden_size][: 1 + is_lstm]
    directions = 2 if layer.bidirectional else 1
    place = int(not layer.batch_first)
    value, states = _input_and_states(read, x, hx, features, [layer.num_layers * directions], 3, place)
    weights = [value for name in layer._flat_weights_names for value in read.own(layer, name)]
    flat = layer._flat_weights  # stock reads this list, which a user may change by itself
    if len(flat) != len(weights) or any(one.tensor is not other for one, other in zip(weights, flat, strict=True)):
        raise NotANetworkError(f"{node.name} has other weights than its parameters")
    read.sources += [(flat, place) for place in range(len(flat))]
    drops = float(layer.dropout) if layer.training else 0.0
    inputs = {
        "input": [value],
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
    value, states = _input_and_states(read, x, hx, [module.hidden_size] * (1 + is_lstm), [], 2, 0)
    one, *rest = [read.add(None, "unsqueeze", {"input": [value]}, dim=0) for value in [value, *states]]
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


def _add_embedding(read: Reader, node: Node, x: Any, weight: list[Value], padding: Any) -> None:
    read.values[node] = _embedded(read, x, weight, padding)


def _embedded(read: Reader, x: Any, weight: list[Value], padding: Any) -> Value:
    if x in read.ranges:  # the first rows of the table
        if padding is not None:
            raise NotANetworkError("an embedding of numbers in a row has a padding")
        size, has_one_in_front = read.ranges[x]
        value = slice_to_size(read, weight[0], 0, 0, size, fits=True)
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


@module_row(nn.LayerNorm)
def _layer_norm_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    inputs = {"weight": read.own(module, "weight"), "bias": read.own(module, "bias")}
    _add_layer_norm(read, node, x, module.normalized_shape, inputs, module.eps)
    read.note(module, "normalized_shape", "eps")


def _add_layer_norm(
    read: Reader, node: Node, x: Any, sizes: Sequence[int], inputs: dict[str, list[Value]], eps: float
) -> None:
    inputs = {"input": [_of_last_sizes(read, read.data(x), sizes)], **inputs}
    read.add(node, "layer_norm", inputs, features=prod(sizes), epsilon=float(eps))


def _of_last_sizes(read: Reader, value: Value, sizes: Sequence[int]) -> Value:
    """The value, whose last dimensions must have these sizes: each becomes one dimension of its size."""
    for place, size in enumerate(reversed(sizes), start=1):
        value = read.add(None, "unflatten", {"input": [value]}, dim=-place, sizes=[size])
    return value


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
    _add_layer_norm(read, node, x, sizes, {"weight": read.optional(weight), "bias": read.optional(bias)}, eps)


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
    value = _of_last_sizes(read, read.data(x), sizes)
    squares = read.add(None, "binary", {"input": [value], "other": [value]}, function="mul")
    mean = read.add(None, "mean", {"input": [squares]}, dims=[-1], keepdim=True)
    mean = read.add(None, "binary", {"input": [mean]}, function="add", number=float(eps))
    factor = read.add(None, "unary", {"input": [mean]}, function="rsqrt")
    value = read.add(None, "binary", {"input": [value], "other": [factor]}, function="mul")
    if weight:
        value = read.add(None, "binary", {"input": [value], "other": weight}, function="mul")
    read.values[node] = value
