"""A fused graph as one chain of stages, for a whole training step (csrc/ops/training_step.cpp)."""

from __future__ import annotations

import operator
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node
from torch.nn.utils.parametrize import is_parametrized

from fastnn.activations import layers_of, parse
from fastnn.graph.forward import Program
from fastnn.graph.guard import Guard
from fastnn.graph.joining import (
    chooses_last,
    drop_unused_parts,
    flattens,
    kernel_of,
    sizes_of_view,
    write_flattenings,
)
from fastnn.graph.matcher import Layer, activation_of, read_layer, settings_of, why_not_read
from fastnn.nn._hooks import has_own_call
from fastnn.ops.batch_norm import batch_norm_relu_max_pool, conv_batch_norm_relu_max_pool
from fastnn.ops.conv_relu_max_pool import conv_relu_max_pool, flat_geometry
from fastnn.ops.mlp import MOST_LAYERS, mlp_of_parameters, mlp_with_some_biases
from fastnn.ops.training_step import write_program
from fastnn.recurrent_modes import NUMBER_OF

_ANY_DIMS = range(2, 17)  # dimensions; more than sixteen the operators do not take


class ChainError(Exception):
    """Why something is no such chain."""


@dataclass
class Chain:
    """Its stages in words, as the operator reads them, and where each parameter is found, in their order."""

    text: str
    sources: list[tuple[Any, str]]
    dims: range  # of the input, as many as the first layer takes
    log_softmax: int | None  # the dimension of one behind the last stage
    guard: Guard  # of layers that the program calls and the chain does not: their attributes that became numbers
    counters: list[tuple[Any, str]]  # where each batch norm's number of batches is found
    draws: bool  # a step takes numbers from torch's generator

    def describe(self) -> Iterator[str]:
        for stage in self.text.split(";"):
            if stage:
                yield stage.split(" ")[0]


def read_chain(program: Program) -> Chain:
    """The chain that a program is. ChainError where it is none."""
    graph, sources = program.write()
    drop_unused_parts(graph, program.modules)
    write_flattenings(graph)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    inputs = len(program.names)
    if inputs != 1:
        raise ChainError(f"the model takes {inputs} inputs")
    source_of = dict(zip(placeholders[inputs:], _in_order(placeholders[inputs:], sources), strict=True))
    reader = _Reader(source_of, program.modules)
    node = placeholders[0]
    while True:
        if len(node.users) != 1:
            raise ChainError(f"what comes out of {node.name} has {len(node.users)} users")
        follower = next(iter(node.users))
        if follower.op == "output":
            if follower.args[0] is not node:
                raise ChainError("the model returns more than one tensor")
            break
        if not follower.args or follower.args[0] is not node:
            raise ChainError(f"{follower.name} takes more than what comes before it")
        node = reader.add(follower)
    if not reader.stages:
        raise ChainError("there is no layer in the model")
    reader.guard.seal()
    return Chain(
        write_program(reader.stages), reader.sources, reader.dims or _ANY_DIMS, reader.log_softmax, reader.guard,
        reader.counters, reader.draws,
    )  # fmt: skip


def _in_order(placeholders: list[Node], sources: list[tuple[Any, str]]) -> list[tuple[Any, str]]:
    """The sources of inputs that are tensors of the model: `fastnn_tensor_3` is the fourth."""
    return [sources[int(str(node.target).rpartition("_")[2])] for node in placeholders]


class _Reader:
    def __init__(self, source_of: dict[Node, tuple[Any, str]], modules: dict[str, nn.Module]) -> None:
        self.source_of, self.modules = source_of, modules
        self.stages: list[tuple[str, list[int | str]]] = []
        self.sources: list[tuple[Any, str]] = []
        self.dims: range | None = None
        self.has_steps = False  # what the stages give is that of all steps of a recurrent layer
        self.log_softmax: int | None = None
        self.guard = Guard()
        self.counters: list[tuple[Any, str]] = []
        self.draws = False

    def add(self, node: Node) -> Node:
        """Take the operator of this node, and of those that choose a part of its result -> the last of them."""
        if node.target is conv_relu_max_pool:
            dims: Any = node.kwargs["dims"]
            self._begin(dims + 2)
            tensors = [one for one in node.args[1:3] if one is not None]
            self.stages.append(("conv", [len(tensors) - 1, *node.kwargs["geometry"]]))  # type: ignore[misc]
            self._take(tensors)
            return node
        activations: Any = node.kwargs.get("activations")  # of linear layers
        if node.target is mlp_of_parameters:
            tensors = list(node.args[1])  # type: ignore[arg-type]
            layers = layers_of(activations)
            if layers > MOST_LAYERS:
                raise ChainError(f"there are more than {MOST_LAYERS} linear layers in a row")
            self._begin(_ANY_DIMS)
            self.stages.append(("mlp", [layers, int(len(tensors) > layers), activations]))
            self._take(tensors)
            return node
        if node.target is mlp_with_some_biases:
            both: Any = node.args[1]  # weights, then biases or None
            for activation, weight, bias in zip(parse(activations), both, both[len(both) // 2 :], strict=False):
                self._begin(_ANY_DIMS)
                self.stages.append(("mlp", [1, int(bias is not None), str(activation)]))
                self._take([weight] if bias is None else [weight, bias])
            return node
        if node.target is batch_norm_relu_max_pool:
            self._add_norm(node)
            return node
        if flattens(node):
            self._begin(_ANY_DIMS)
            self.stages.append(("flatten", []))
            self.has_steps = False
            return node
        sizes = sizes_of_view(node)
        if len(sizes) == 2 and sizes[0] == -1 and isinstance(sizes[1], int) and sizes[1] > 0:
            self._begin(_ANY_DIMS)
            self.stages.append(("flatten", [sizes[1]]))
            self.has_steps = False
            return node
        if node.op == "call_module" and isinstance(self.modules[str(node.target)], nn.RNNBase):
            return self._add_recurrent(node)
        layer = read_layer(node, self.modules)
        if layer is not None and layer.module is not None:
            self._note(layer.module, *settings_of(layer.module))
        if layer is not None and layer.kind == "dropout" and not _is_of_channels(layer):
            if layer.settings["training"] and layer.settings["p"]:
                self._begin(_ANY_DIMS)
                self.stages.append(("dropout", [_bits(layer.settings["p"])]))
                self.draws = True
            return node
        if layer is not None and layer.kind == "identity":
            return node
        if layer is not None and layer.kind == "linear" and layer.module is not None:
            self._begin(_ANY_DIMS)
            self.stages.append(("mlp", [1, self._take_own(layer), "identity"]))
            return node
        if layer is not None and layer.kind.startswith("conv") and layer.module is not None:
            self._begin(layer.dims + 2)
            self.stages.append(("plain_conv", [layer.dims, self._take_own(layer), *_convolution(layer)]))
            return node
        if layer is not None and layer.kind == "batch_norm" and layer.module is not None:
            self._add_norm_alone(layer)
            return node
        if layer is not None and (alone := activation_of(layer)) is not None:
            self._begin(_ANY_DIMS)
            self.stages.append(("activation", [str(alone)]))
            return node
        if self.has_steps and (_takes_last(node, -1) or _takes_last(node, (slice(None), -1))):
            self.stages.append(("last", [int(not _takes_last(node, -1))]))
            self.has_steps = False
            return node
        average = _adaptive_average(node, self.modules)
        if average is not None:
            self._begin(len(average) + 2)
            if node.op == "call_module":
                self._note(self.modules[str(node.target)], "output_size")
            self.stages.append(("average", [len(average), *average]))
            return node
        self.log_softmax = _dim_of_log_softmax(node, self.modules)
        if self.log_softmax is not None and next(iter(node.users)).op == "output":
            if node.op == "call_module":
                self._note(self.modules[str(node.target)], "dim")
            return node
        if node.target is conv_batch_norm_relu_max_pool or (layer is not None and layer.kind == "batch_norm"):
            raise ChainError("a batch norm is in eval mode")
        if node.op == "call_module" and is_parametrized(self.modules[str(node.target)]):
            raise ChainError(f"a parameter of '{node.target}' is computed from something else")
        raise ChainError(f"{_name(node, self.modules)} is no layer of a chain")

    def _begin(self, dims: int | range) -> None:
        if not self.stages:
            self.dims = dims if isinstance(dims, range) else range(dims, dims + 1)

    def _take(self, tensors: list[Any]) -> None:
        for tensor in tensors:
            source = self.source_of.get(tensor)
            if source is None or not isinstance(source[0], dict):
                raise ChainError(f"{tensor.name} is computed from something else")
            self.sources.append(source)

    def _take_own(self, layer: Layer) -> int:
        """Take the weight and bias of a layer that the program calls -> how many biases these are."""
        assert layer.module is not None
        own = layer.module._parameters
        names = [name for name in ("weight", "bias") if own.get(name) is not None]
        if not names or names[0] != "weight":
            raise ChainError(f"{layer.name}'s weight is computed from something else")
        self.sources += [(own, name) for name in names]
        return len(names) - 1

    def _note(self, module: nn.Module, *names: str) -> None:
        """That the module is looked at before each step, and these attributes of it."""
        self.guard.note_layer(module)
        self.guard.note_settings(module, names)

    def _add_norm(self, node: Node) -> None:
        settings: dict[str, Any] = dict(node.kwargs)
        mean, var, weight, bias, counter = node.args[1:6]
        if not settings["training"]:
            raise ChainError(f"{node.name} is a batch norm in eval mode")
        tensors = [tensor for tensor in (mean, var, weight, bias) if tensor is not None]
        self._begin(settings["dims"] + 2)
        self._take(tensors)
        if not tensors:
            raise ChainError(f"{node.name} has neither weight nor running mean")
        own, name = self.sources[-1]
        kernel, stride, padding, dilation = (
            settings[f"pool_{name}"] for name in ("kernel_size", "stride", "padding", "dilation")
        )
        channels = own[name].shape[0]
        geometry = flat_geometry(
            settings["dims"], 1, 0, 1, channels, kernel, stride, padding, dilation, settings["ceil_mode"]
        )
        if geometry is None:
            raise ChainError(f"{node.name}'s pool has other dimensions")
        self._add_statistics([tensor is not None for tensor in (mean, weight, bias)], settings, geometry)
        if counter is not None:
            self.counters.append(self.source_of[counter])  # type: ignore[index]

    def _add_statistics(self, there: Sequence[bool], settings: dict[str, Any], geometry: Sequence[int]) -> None:
        numbers = [_bits(settings["momentum"] or 0.0), _bits(settings["eps"])]
        self.stages.append(("batch_norm", [*map(int, there), *numbers, *geometry]))

    def _add_norm_alone(self, layer: Layer) -> None:
        """A batch norm that no ReLU and max-pool follow."""
        module: Any = layer.module
        if not layer.settings["training"]:
            raise ChainError(f"{layer.name} is a batch norm in eval mode")
        tracked = bool(layer.settings["track_running_stats"])
        running = tracked and module.running_mean is not None
        if running and layer.settings["momentum"] is None:
            raise ChainError(f"{layer.name} keeps a cumulative average")
        dims = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}
        self._begin(next((dims[kind] for kind in dims if isinstance(module, kind)), range(2, 4)))
        self.sources += [(module._buffers, name) for name in ("running_mean", "running_var") if running]
        own = [name for name in ("weight", "bias") if module._parameters.get(name) is not None]
        if len(own) != sum(getattr(module, name) is not None for name in ("weight", "bias")):
            raise ChainError(f"{layer.name}'s weight is computed from something else")
        self.sources += [(module._parameters, name) for name in own]
        self._add_statistics([running, "weight" in own, "bias" in own], layer.settings, ())
        if tracked and module.num_batches_tracked is not None:
            self.counters.append((module._buffers, "num_batches_tracked"))

    def _add_recurrent(self, node: Node) -> Node:
        layer: Any = kernel_of(self.modules[str(node.target)])
        if layer is None or len(node.args) != 1 or node.kwargs:
            raise ChainError(f"{node.name} has a state, hooks or a forward of its own")
        self._begin(3)
        last = 0
        part = next(iter(node.users))
        if len(node.users) != 1 or part.target is not operator.getitem:
            raise ChainError(f"more than one result of {node.name} is used")
        end = part
        follower = next(iter(part.users)) if len(part.users) == 1 else None
        if part.args[1] not in (0, 1, -1):
            raise ChainError(f"a part of {node.name}'s results is chosen")
        if part.args[1] != 0:
            if layer.mode == "LSTM":
                if follower is None or follower.target is not operator.getitem or follower.args[1] != 0:
                    raise ChainError(f"{node.name} gives its state")
                end = follower
                follower = next(iter(end.users)) if len(end.users) == 1 else None
            if layer.bidirectional or follower is None or not _takes_last(follower, -1):
                raise ChainError(f"{node.name} gives its state")
            last, end = 1, follower
        elif (
            follower is not None
            and not layer.bidirectional
            and _takes_last(follower, (slice(None), -1) if layer.batch_first else -1)
        ):
            last, end = 1, follower
        self.has_steps = not last
        names = layer._flat_weights_names
        numbers = [len(names), NUMBER_OF[layer.mode], layer.num_layers]
        numbers += [int(layer.bidirectional), int(layer.batch_first), last]
        drops = float(layer.dropout) if layer.training else 0.0
        self.stages.append(("rnn", [*numbers, _bits(drops)]))
        self.draws = self.draws or drops > 0
        self.sources += [(layer._parameters, name) for name in names]
        self._note(layer, "dropout", "training", "batch_first", "num_layers", "bidirectional", "mode")
        return end


def _is_of_channels(layer: Layer) -> bool:
    """Whether a dropout drops more than single elements, or does not set them to zero."""
    return layer.module is not None and type(layer.module) is not nn.Dropout


_AVERAGES: dict[Any, int] = {
    **{getattr(nn, f"AdaptiveAvgPool{d}d").forward: d for d in (1, 2, 3)},
    **{getattr(F, f"adaptive_avg_pool{d}d"): d for d in (1, 2, 3)},
}


def _adaptive_average(node: Node, modules: dict[str, nn.Module]) -> list[int] | None:
    """Into how many parts each dimension is averaged, if that is what the node does."""
    if node.op == "call_module":
        module: Any = modules[str(node.target)]
        dims = _AVERAGES.get(type(module).forward)
        size = None if dims is None or why_not_read(module) else module.output_size
    else:
        dims = _AVERAGES.get(node.target)
        size = node.kwargs.get("output_size", *node.args[1:2]) if dims is not None else None
    if dims is None:
        return None
    sizes = [size] * dims if isinstance(size, int) else list(size) if isinstance(size, tuple | list) else []
    return sizes if len(sizes) == dims and all(isinstance(one, int) and one > 0 for one in sizes) else None


def _dim_of_log_softmax(node: Node, modules: dict[str, nn.Module]) -> int | None:
    """Its dimension, if it is one over the classes of rows."""
    dim: Any = None
    if node.op == "call_module":
        module = modules[str(node.target)]
        if type(module) is nn.LogSoftmax and not has_own_call(module):
            dim = module.dim
    elif node.target in (F.log_softmax, torch.log_softmax, "log_softmax"):
        given = {**dict(zip(("dim", "dtype"), node.args[1:], strict=False)), **node.kwargs}
        dim = given.get("dim") if given.get("dtype") is None else None
    return dim if dim in (1, -1) else None


def _bits(number: float) -> int:
    """Of a number that is not negative."""
    (bits,) = struct.unpack("<q", struct.pack("<d", number))
    return int(bits)


def _convolution(layer: Layer) -> list[int]:
    """Stride, padding, dilation and groups of a plain convolution."""
    settings = layer.settings
    if settings["padding_mode"] != "zeros" or isinstance(settings["padding"], str):
        raise ChainError(f"{layer.name}'s padding is {settings['padding']!r} of {settings['padding_mode']}")
    if all(size == 1 for size in layer.module.kernel_size) and any(n > 1 for n in settings["stride"]):  # type: ignore
        raise ChainError(f"{layer.name} is a kernel of one pixel with strides")
    return [*settings["stride"], *settings["padding"], *settings["dilation"], settings["groups"]]


def _takes_last(node: Node, last: Any) -> bool:
    return node.target is operator.getitem and chooses_last(node.args[1], last)


def _name(node: Node, modules: dict[str, nn.Module]) -> str:
    """What the node does, as the user would call it."""
    if node.op == "call_module":
        return f"{type(modules[str(node.target)]).__name__} '{node.target}'"
    if node.target is operator.getitem:
        return "an index"
    return str(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target))
