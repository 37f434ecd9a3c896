"""The matcher: which layers of a model become one operator.

It reads a graph of torch.fx whose nodes are layers: modules, functions of ``torch`` and ``torch.nn.functional``, and
methods of tensors, as ``torch.fx`` traces a model (``fastnn.fuse``) and as Dynamo captures one (``backend="fastnn"``).
``match`` takes the patterns in this order:

1. convolution, batch norm or none, ReLU, max-pool (or max-pool and ReLU, which is the same): ``conv_relu_max_pool``,
2. convolution, batch norm or none, ReLU: the same with windows of one pixel,
3. a convolution of 3x3 kernels alone, of which something else is made: ``convolution``,
4. batch norm or none, ReLU, max-pool of anything else: ``relu_max_pool`` of ``ops/batch_norm.py``,
5. linear layers with activations between them: ``mlp``.

fastnn.nn's own blocks are read as what they compute. What is made of neighbouring operators afterwards is in
``stretches.py`` (stretches of layers) and ``joining.py`` (a recurrent layer with the linear layer of its last step).
Every layer that is part of no pattern gets a reason.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.nn.utils.parametrize import is_parametrized

from fastnn import activations
from fastnn._torch import no_torch_function, pytree
from fastnn.graph.order import Order, in_place
from fastnn.nn._hooks import has_own_call, layer_forward, own_methods
from fastnn.nn.conv_relu_max_pool import ConvReLUMaxPool2d
from fastnn.nn.mlp import LinearReLU
from fastnn.ops.batch_norm import batch_norm_relu_max_pool, conv_batch_norm_relu_max_pool, relu_max_pool
from fastnn.ops.conv_relu_max_pool import (
    conv_relu_max_pool,
    conv_relu_max_pool1d,
    conv_relu_max_pool2d,
    conv_relu_max_pool3d,
    flat_geometry,
    same_padding,
)
from fastnn.ops.convolution import convolution
from fastnn.ops.mlp import mlp_of_parameters, mlp_with_some_biases

# ---- what a node computes, whichever way it is written --------------------------------------------------------------

_CONVS = (conv_relu_max_pool1d, conv_relu_max_pool2d, conv_relu_max_pool3d)
_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_POOL = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_ONE_PIXEL = (1, None, 0, 1, False)  # a pool that changes nothing
_FEW = 8  # channels, with fewer of which Winograd never pays
_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_DEFAULTS: dict[str, dict[str, Any]] = {
    "conv": {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1},
    "max_pool": {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False},
    "batch_norm": {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5},
    "linear": {"bias": None},
    "dropout": {"p": 0.5, "training": True},
}


def _functions() -> Iterator[tuple[Any, str, Sequence[str]]]:
    """Yields a function or the name of a method, the kind of layer that it is, and its arguments' names."""
    for d in (1, 2, 3):
        yield getattr(F, f"conv{d}d"), f"conv{d}d", _CONV
        for pool in (getattr(F, f"max_pool{d}d"), getattr(torch, f"max_pool{d}d")):
            yield pool, f"max_pool{d}d", _POOL
        yield getattr(F, f"avg_pool{d}d"), "other pool", ("input",)
        yield getattr(F, f"max_pool{d}d_with_indices"), "pool with indices", ("input",)
        for kind in ("avg", "max"):
            yield getattr(F, f"adaptive_{kind}_pool{d}d"), "other pool", ("input",)
    yield F.batch_norm, "batch_norm", _BATCH_NORM
    yield F.linear, "linear", ("input", "weight", "bias")
    yield F.dropout, "dropout", ("input", "p", "training", "inplace")
    yield from activations.functions()


_FUNCTIONS = {function: (kind, names) for function, kind, names in _functions()}

# Modules by their forward, which a subclass may have too (layer_class): the kind, its parameters and buffers, and its
# settings.
_MODULES: dict[Any, tuple[str, Sequence[str], Sequence[str]]] = {
    nn.BatchNorm1d.forward: (  # and 2d's and 3d's, which share it
        *("batch_norm", (*_BATCH_NORM[1:5], "num_batches_tracked")),
        ("training", "momentum", "eps", "track_running_stats"),
    ),
    nn.Linear.forward: ("linear", ("weight", "bias"), ()),
    **{
        getattr(nn, name).forward: ("dropout", (), ("p", "training", "inplace"))
        for name in ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout")
    },
    nn.Identity.forward: ("identity", (), ()),
    **{forward: (name, (), settings) for forward, name, settings in activations.modules()},
}
_BLOCK = ("pool_kernel_size", "pool_stride", "pool_padding", "pool_dilation", "ceil_mode")
_MODULES[LinearReLU.forward] = ("linear_relu", ("weight", "bias"), ())
_MODULES[ConvReLUMaxPool2d.forward] = ("block", _CONV[1:3], (*_CONV[3:], *_BLOCK, "padding_mode"))
for _d in (1, 2, 3):
    _conv, _pool = getattr(nn, f"Conv{_d}d"), getattr(nn, f"MaxPool{_d}d")
    _MODULES[_conv.forward] = (f"conv{_d}d", _CONV[1:3], (*_CONV[3:], "padding_mode"))
    _MODULES[_pool.forward] = (f"max_pool{_d}d", (), _POOL[1:])
    for _kind in ("AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool"):
        _MODULES[getattr(nn, f"{_kind}{_d}d").forward] = ("other pool", (), ())
RECURRENT: dict[Any, str] = {
    getattr(nn, name).forward: name for name in ("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell")
}
_IN_PLACE = {"iadd": "+=", "isub": "-=", "imul": "*=", "itruediv": "/="}
_LINEARS = {"linear": "identity", "linear_relu": "relu"}


def settings_of(module: nn.Module) -> Sequence[str]:
    """The attributes that say what a module of `_MODULES` computes, and with what."""
    known = _MODULES.get(layer_forward(module))
    return (*known[1], *known[2]) if known else ()


def kind_of(module: nn.Module) -> str | None:
    """The kind of layer that a module is, if it is one of those that are accounted for."""
    forward = layer_forward(module)
    known = _MODULES.get(forward)
    if known is not None:
        return None if known[0] in ("identity", "dropout", "batch_norm") else known[0]
    return RECURRENT.get(forward)


def why_not_read(module: nn.Module) -> str | None:
    """Why a call of the module must stay as it is, or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "it is lazy: fuse the model after its first call"
    if has_own_call(module):
        return "it has hooks, or a forward of its own"
    if own_methods(module) - {"forward"}:
        return "it has methods of its own"
    return None


@dataclass
class Layer:
    """A node that is a layer. `tensors` are nodes, or for a module the names of its parameters and buffers."""

    node: Node
    kind: str
    input: Node
    tensors: dict[str, Any]
    settings: dict[str, Any]
    module: nn.Module | None = None

    @property
    def name(self) -> str:
        return str(self.node.target) if self.module is not None else self.node.name

    @property
    def dims(self) -> int:
        return int(self.kind[-2])


def read_layer(node: Node, modules: Mapping[str, nn.Module]) -> Layer | None:
    """Reads a node as a layer; None where it is none of the layers above."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        known = _MODULES.get(layer_forward(module))
        if known is None or why_not_read(module) or len(node.args) != 1 or node.kwargs:
            return None
        kind, tensors, settings = known
        own = module.__dict__
        if not isinstance(node.args[0], Node) or not all(name in own for name in settings):
            return None
        if not all(_is_usual_tensor(module, name) for name in tensors):
            return None
        values = {name: own[name] for name in settings}
        if kind.startswith("conv") and isinstance(values["padding"], str):
            values["padding"] = _padding_in_numbers(values["padding"], module) or values["padding"]
        held = {name: name for name in tensors if _has_tensor(module, name)}
        return Layer(node, kind, node.args[0], held, values, module)
    if node.op not in ("call_function", "call_method"):
        return None
    known_function = _FUNCTIONS.get(node.target)
    if known_function is None:
        return None
    kind, names = known_function
    if len(node.args) > len(names) and "pool" not in kind:
        return None
    given = {**_DEFAULTS.get(kind[:-2] if kind[-1] == "d" else kind, {})}
    given.update(zip(names, node.args, strict=False))
    given.update(node.kwargs)
    input = given.pop("input", None)
    if not isinstance(input, Node):
        return None
    is_tensor = ("weight", "bias", "running_mean", "running_var")
    tensors_given = {name: value for name, value in given.items() if name in is_tensor and value is not None}
    settings_given = {name: value for name, value in given.items() if name not in is_tensor}
    if any(isinstance(leaf, Node) for leaf in pytree.tree_leaves(list(settings_given.values()))):
        return None  # a setting is known only during a call
    if kind == "linear":
        weight, bias = (_example(tensors_given.get(name)) for name in ("weight", "bias"))
        if weight is not None and (weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1])):
            return None  # the weight is a vector, or the bias is broadcast
    return Layer(node, kind, input, tensors_given, settings_given)


def _example(node: Any) -> Tensor | None:
    """What Dynamo has found a node to be."""
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    return value if isinstance(value, Tensor) else None


def _is_usual_tensor(module: nn.Module, name: str) -> bool:
    """Whether a layer has a tensor or None by this name where layers have them, and the functions of the tensor are
    torch's own; or whether it computes the tensor by a parametrization without side effects."""
    if is_parametrized(module, name):
        return computes_only(module)
    held = next((held for held in (module._parameters, module._buffers) if name in held), None)
    if held is None or name in module.__dict__:
        return False
    tensor: Any = held[name]
    return tensor is None or type(tensor).__torch_function__ in (Tensor.__torch_function__, no_torch_function)


_PURE_PARAMETRIZATIONS = ("_WeightNorm", "_Orthogonal")


def computes_only(module: nn.Module) -> bool:
    """Whether a layer's parametrizations are those of torch that give the same tensor at every call."""
    parts = [part for some in module.parametrizations.children() for part in some.children()]  # type: ignore[union-attr]
    return all(
        type(part).__module__ == "torch.nn.utils.parametrizations" and type(part).__name__ in _PURE_PARAMETRIZATIONS
        for part in parts
    )


def _has_tensor(module: nn.Module, name: str) -> bool:
    # The tensor of a parametrization is not computed here, which would take time.
    return is_parametrized(module, name) or getattr(module, name) is not None


def kernel_sizes(conv: Any) -> tuple[int, ...]:
    return tuple(conv.weight.shape[2:])


def _padding_in_numbers(name: str, conv: Any) -> tuple[int, ...] | None:
    """The padding in numbers: of "valid", or of "same" where it pads both sides alike. Else None."""
    kernel = kernel_sizes(conv)
    if name == "valid":
        return (0,) * len(kernel)
    both, ends = same_padding(kernel, conv.dilation)
    return tuple(both) if name == "same" and not any(ends) else None


# ---- matches --------------------------------------------------------------------------------------------------------


@dataclass
class Match:
    """Layers that become one call: `function(input, *tensors, **settings)`, or with the tensors in a list."""

    operator: str
    layers: list[Layer]
    function: Callable[..., Any]
    tensors: list[tuple[Layer, str] | None]  # None for one that is missing
    settings: dict[str, Any]
    in_a_list: bool = False

    @property
    def name(self) -> str:
        return ", ".join(layer.name for layer in self.layers)

    def call(self, input: Any, tensors: Sequence[Any]) -> Any:
        """Computes what the layers compute, by the one function."""
        if self.in_a_list:
            return self.function(input, list(tensors), **self.settings)
        return self.function(input, *tensors, **self.settings)

    @property
    def nodes(self) -> list[Node]:
        """The nodes of all layers, in the order in which they run."""
        return [layer.node for layer in self.layers]

    @property
    def modules(self) -> list[nn.Module]:
        return [layer.module for layer in self.layers if layer.module is not None]


@dataclass
class Left:
    """A layer that stays as it is."""

    layer: Layer
    reason: str


@dataclass
class Matches:
    found: list[Match] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)

    def of(self, modules: Mapping[str, Any]) -> Matches:
        """The same matches of a model that has the same graph and these modules."""
        layers: dict[int, Layer] = {}

        def own(layer: Layer) -> Layer:
            if id(layer) not in layers:
                module = modules[str(layer.node.target)] if layer.module is not None else None
                layers[id(layer)] = replace(layer, module=module)
            return layers[id(layer)]

        found = [
            replace(
                one,
                layers=list(map(own, one.layers)),
                tensors=[None if place is None else (own(place[0]), place[1]) for place in one.tensors],
            )
            for one in self.found
        ]
        return Matches(found, [replace(one, layer=own(one.layer)) for one in self.left])


def match(graph: Graph, modules: Mapping[str, nn.Module]) -> Matches:
    """The matches of the graph, no two of which share a node, and why every other layer is in none."""
    layers = {node: layer for node in graph.nodes if (layer := read_layer(node, modules)) is not None}
    used: dict[str, int] = {}
    for layer in layers.values():
        if layer.module is not None:
            used[layer.name] = used.get(layer.name, 0) + 1
    return _Matcher(layers, used, Order(graph, modules)).run()


class _Matcher:
    def __init__(self, layers: dict[Node, Layer], used: dict[str, int], order: Order) -> None:
        self.layers = layers
        self.order = order
        self.used = used  # how often a module is called
        self.taken: set[Node] = set()
        self.result = Matches()

    def run(self) -> Matches:
        for pattern in (self.block, self.convolution, self.convolution_alone, self.rectified_pool, self.chain):
            for layer in self.layers.values():
                if layer.node in self.taken:
                    continue
                found = pattern(layer)
                if isinstance(found, Match) and not all(self.is_ready(one, layer) for one in found.layers):
                    found = "its weights are computed while it runs"
                if isinstance(found, Match) and not self.order.may_be_one(found.nodes):
                    found = "what runs between its layers may change what they read"
                if isinstance(found, Match) and self.order.is_written_after(found.nodes, layer.input):
                    found = "its input is changed in place afterwards"
                if isinstance(found, Match):
                    self.result.found.append(found)
                    self.taken.update(found.nodes)
                    self.result.left = [left for left in self.result.left if left.layer is not layer]
                elif found is not None:
                    self.result.left.append(Left(layer, found))
        explained = {left.layer.node for left in self.result.left}
        for layer in self.layers.values():
            if layer.node not in self.taken and layer.node not in explained:
                reason = self.reason(layer)
                if reason is not None:
                    self.result.left.append(Left(layer, reason))
        return self.result

    def is_ready(self, layer: Layer, first: Layer) -> bool:
        """Whether all that the layer takes is there before `first` runs."""
        return self.order.is_there(layer.tensors.values(), first.node)

    # -- the chain of nodes -------------------------------------------------------------------------------------------

    def next(self, layer: Layer) -> Layer | None:
        """The layer that takes this one's result, if nothing else does."""
        if len(layer.node.users) != 1:
            return None
        follower = self.layers.get(next(iter(layer.node.users)))
        return follower if follower is not None and follower.input is layer.node else None

    def before(self, layer: Layer) -> Layer | None:
        return self.layers.get(layer.input)

    def _norm(self, layer: Layer) -> str | None:
        """Why a batch norm cannot be part of a pattern."""
        if self.used.get(layer.name, 0) > 1:
            return "its batch norm is used twice"
        if not _trains(layer) and not {"running_mean", "running_var"} <= layer.tensors.keys():
            return "its batch norm has no running statistics"
        return None

    def _pool(self, layer: Layer, comes_before_relu: bool) -> str | None:
        """Why a max-pool cannot be part of a pattern."""
        s = layer.settings
        if s["return_indices"]:
            return "its max-pool returns indices"
        if comes_before_relu and _any(s["padding"]) and not _all_ones(s["dilation"]):
            return "a window of its max-pool, which comes before ReLU, may be all padding"
        return None

    # ---- the patterns: a Match, a reason why there is none, or None where there is nothing to say

    def block(self, block: Layer) -> Match | str | None:
        """A layer of ``fastnn.nn`` that is the whole pattern."""
        if block.kind != "block" or block.settings["padding_mode"] != "zeros" or block.module is None:
            return None
        settings = {name: block.settings[name] for name in (*_CONV[3:], *_BLOCK)}
        dims = len(block.module.kernel_size)  # type: ignore[arg-type]
        return _conv_relu_max_pool([block], dims, [_tensor(block, name) for name in _CONV[1:3]], settings)

    def convolution(self, conv: Layer) -> Match | str | None:
        if not conv.kind.startswith("conv"):
            return None
        if conv.settings.get("padding_mode", "zeros") != "zeros":
            return f"its padding mode is {conv.settings['padding_mode']}"
        layers, why = self.epilogue(conv)
        if why:
            return why
        norm, pool = _of(layers, "batch_norm"), _of(layers, "max_pool")
        if pool is not None and pool.dims != conv.dims:
            return "its max-pool has other dimensions"
        if norm is not None and _dims_of_norm(norm) not in (None, conv.dims):
            return "its batch norm has other dimensions"
        if norm is not None and _trains(norm):
            return "its batch norm takes the statistics of all of its output first"
        tensors: list[tuple[Layer, str] | None] = [_tensor(conv, "weight"), _tensor(conv, "bias")]
        settings = {name: conv.settings[name] for name in _CONV[3:]} | _pool_settings(pool)
        if norm is None:
            return _conv_relu_max_pool(layers, conv.dims, tensors, settings)
        tensors += [_tensor(norm, name) for name in _BATCH_NORM[1:5]]
        settings["eps"] = norm.settings["eps"]
        return Match("conv_relu_max_pool", layers, conv_batch_norm_relu_max_pool, tensors, settings)

    def convolution_alone(self, conv: Layer) -> Match | None:
        """A convolution that Winograd may take, by itself: other algorithms are no faster than torch's there."""
        if conv.kind != "conv2d" or conv.module is None or conv.settings["padding_mode"] != "zeros":
            return None
        weight: Any = conv.module.weight
        if is_parametrized(conv.module, "weight") or weight.shape[2:] != (3, 3) or min(weight.shape[:2]) < _FEW:
            return None
        sizes: list[Any] = [*(conv.settings[name] for name in _CONV[3:]), *_ONE_PIXEL]
        geometry = flat_geometry(2, *sizes)
        if geometry is None or conv.settings["stride"] not in (1, (1, 1)):
            return None
        tensors = [_tensor(conv, "weight"), _tensor(conv, "bias")]
        return Match("convolution", [conv], convolution, tensors, {"geometry": geometry, "dims": 2})

    def epilogue(self, first: Layer) -> tuple[list[Layer], str | None]:
        """The layers from a convolution (or batch norm, or ReLU) on to its ReLU and pool, or why they are not fused."""
        layers = [first]
        norm = first if first.kind == "batch_norm" else None
        pool: Layer | None = None
        rectified = first.kind == "relu"
        if norm is not None and (why := self._norm(norm)):
            return [], why
        while True:
            last = layers[-1]
            if rectified and pool is not None:
                return layers, None
            following = self.next(last)
            wanted = None if following is None else following.kind
            if following is not None and _passes_on(following):
                layers.append(following)
            elif wanted == "batch_norm" and norm is None and not rectified and pool is None:
                if why := self._norm(following):  # type: ignore[arg-type]
                    return [], why
                norm = following
                layers.append(following)  # type: ignore[arg-type]
            elif wanted == "relu" and not rectified:
                rectified = True
                layers.append(following)  # type: ignore[arg-type]
            elif wanted is not None and wanted.startswith("max_pool") and pool is None:
                why_pool = self._pool(following, not rectified)  # type: ignore[arg-type]
                if why_pool and not rectified:
                    return [], why_pool
                if why_pool:
                    break
                pool = following
                layers.append(following)  # type: ignore[arg-type]
            else:
                break
        if rectified and pool is None:
            return layers, None
        last = layers[-1]
        names = {"batch_norm": "batch norm", "relu": "ReLU"}
        if pool is not None:
            return [], "there is no ReLU beside its max-pool"
        if len(last.node.users) > 1:
            what = "it" if last is first else f"its {names.get(last.kind, last.kind)}"
            return [], f"what comes out of {what} has {len(last.node.users)} users"
        following_node = next(iter(last.node.users), None)
        what_follows = "nothing" if following_node is None else self.describe(following_node)
        return [], f"no ReLU follows, but {what_follows}"

    def describe(self, node: Node) -> str:
        layer = self.layers.get(node)
        if layer is not None:
            return layer.kind
        if node.op == "output":
            return "the end"
        target = node.target
        if target is in_place:
            return f"{_IN_PLACE.get(str(node.args[0]), node.args[0])}, which changes it in place"
        return str(target if isinstance(target, str) else getattr(target, "__name__", target))

    def rectified_pool(self, first: Layer) -> Match | str | None:
        if first.kind not in ("batch_norm", "relu"):
            return None
        before = self.before(first)
        if before is not None and before.kind == "batch_norm" and len(before.node.users) == 1 and first.kind == "relu":
            return None  # the match begins with the batch norm
        layers, why = self.epilogue(first)
        if why:
            return None if first.kind == "relu" else why
        norm, pool = _of(layers, "batch_norm"), _of(layers, "max_pool")
        if pool is None:
            return None if norm is None else "no max-pool follows its ReLU"
        if norm is None:
            if _is_in_place(first):
                return None  # it changes its input, which others may see
            return Match("relu_max_pool", layers, relu_max_pool, [], _pool_settings(pool) | {"dims": pool.dims})
        if _dims_of_norm(norm) not in (None, pool.dims):
            return "its max-pool has other dimensions"
        names = (*_BATCH_NORM[1:5], "num_batches_tracked")
        if _trains(norm) and not norm.settings.get("track_running_stats", True):  # the statistics may still be there
            names = ("", "", *_BATCH_NORM[3:5], "")
        tensors = [_tensor(norm, name) for name in names]
        settings = _pool_settings(pool) | {"dims": pool.dims}
        settings |= {"training": _trains(norm), "momentum": norm.settings["momentum"], "eps": norm.settings["eps"]}
        if _trains(norm) and norm.module is not None and norm.settings["momentum"] is None:
            return "its batch norm keeps a cumulative average"
        return Match("relu_max_pool", layers, batch_norm_relu_max_pool, tensors, settings)

    def chain(self, first: Layer) -> Match | str | None:
        if first.kind not in _LINEARS:
            return None
        layers, linears, names = [first], [first], [_LINEARS[first.kind]]
        pending: list[Layer] = []  # that are part of the chain only if a linear layer or an activation follows
        last = first
        while (following := self.next(last)) is not None:
            activation = activation_of(following)
            if following.kind in _LINEARS and self.is_ready(following, first):
                layers += [*pending, following]
                pending = []
                linears.append(following)
                names.append(_LINEARS[following.kind])
            elif activation is not None and names[-1] == "identity":
                layers += [*pending, following]
                pending = []
                names[-1] = str(activation)
            elif _passes_on(following):
                pending.append(following)
            else:
                break
            last = following
        if len(names) == 1 and not self.is_worth_it_alone(first):
            return "one linear layer, trained: a call of ours costs as much as stock's"
        weights = [_tensor(linear, "weight") for linear in linears]
        biases = [_tensor(linear, "bias") for linear in linears]
        settings = {"activations": activations.join(names)}
        if any(biases) and not all(biases):
            return Match("mlp", layers, mlp_with_some_biases, [*weights, *biases], settings, in_a_list=True)
        tensors = [*weights, *(biases if all(biases) else [])]
        return Match("mlp", layers, mlp_of_parameters, tensors, settings, in_a_list=True)

    def is_worth_it_alone(self, linear: Layer) -> bool:
        """Whether to fuse a single linear layer, with or without its activation. In inference that always pays. In
        training it pays where the layer may become one call with a recurrent layer whose last step it takes, or with
        the convolutions before a flattening. Elsewhere it saves one of stock's calls, and a call of
        ours in Python takes longer: 0.75 of stock's speed for one row, 0.83 for 32 rows of 20 features, 1.0 from 256
        rows of 128 on."""
        if linear.input.target in (operator.getitem, torch.flatten, "flatten"):
            return True
        return linear.module is not None and not linear.module.training

    def reason(self, layer: Layer) -> str | None:
        if layer.kind.startswith("max_pool"):
            before = self.before(layer)
            if before is not None and before.kind == "relu" and len(before.node.users) > 1:
                return f"what comes out of its ReLU has {len(before.node.users)} users"
            return self._pool(layer, False) or "it does not follow a ReLU"
        if layer.kind == "other pool":
            return "average and adaptive pools are torch's"
        if layer.kind == "pool with indices":
            return "its max-pool returns indices"
        if layer.kind in activations.TORCH_NAMES:
            return "it follows neither a convolution nor a linear layer alone"
        return None


def _conv_relu_max_pool(
    layers: list[Layer], dims: int, tensors: list[tuple[Layer, str] | None], settings: dict[str, Any]
) -> Match:
    name = "conv_relu_max_pool"
    if not isinstance(settings["padding"], str):
        unset = {"pool_stride": None, "pool_padding": 0, "pool_dilation": 1, "ceil_mode": False}
        given = {**unset, **settings}
        geometry = flat_geometry(dims, *(given[setting] for setting in (*_CONV[3:], *_BLOCK)))
        if geometry is not None:
            return Match(name, layers, conv_relu_max_pool, tensors, {"geometry": geometry, "dims": dims})
    return Match(name, layers, _CONVS[dims - 1], tensors, settings)


def _passes_on(layer: Layer) -> bool:
    """Whether the layer's result is its input."""
    return layer.kind == "identity" or (layer.kind == "dropout" and not layer.settings["training"])


def _trains(norm: Layer) -> bool:
    """Whether a batch norm takes the statistics of the batch."""
    return bool(norm.settings["training"])


def _dims_of_norm(norm: Layer) -> int | None:
    """How many dimensions the images of a batch norm have, if that is known."""
    if norm.module is not None:
        return next((d for d in (1, 2, 3) if isinstance(norm.module, getattr(nn, f"BatchNorm{d}d"))), None)
    example = _example(norm.input)
    return None if example is None else example.dim() - 2


def _is_in_place(layer: Layer) -> bool:
    if layer.module is not None:
        return bool(getattr(layer.module, "inplace", False))
    name = layer.node.target if isinstance(layer.node.target, str) else getattr(layer.node.target, "__name__", "")
    return name.endswith("_") or bool(layer.settings.get("inplace"))


def _of(layers: Sequence[Layer], kind: str) -> Layer | None:
    return next((layer for layer in layers if layer.kind.startswith(kind)), None)


def _tensor(layer: Layer, name: str) -> tuple[Layer, str] | None:
    return (layer, name) if name in layer.tensors else None


def _any(sizes: Any) -> bool:
    return any(sizes) if isinstance(sizes, (list, tuple)) else bool(sizes)


def _all_ones(sizes: Any) -> bool:
    return all(size == 1 for size in sizes) if isinstance(sizes, (list, tuple)) else sizes == 1


def _pool_settings(pool: Layer | None) -> dict[str, Any]:
    if pool is None:
        return {"pool_kernel_size": 1}
    given = pool.settings
    return {
        "pool_kernel_size": given["kernel_size"],
        "pool_stride": given["stride"],
        "pool_padding": given["padding"],
        "pool_dilation": given["dilation"],
        "ceil_mode": given["ceil_mode"],
    }


def activation_of(layer: Layer) -> activations.Activation | None:
    """The activation that a layer is, where kernels have it."""
    return activations.from_settings(layer.kind, layer.settings) if layer.kind in activations.TORCH_NAMES else None


# ---- and what the graph becomes -------------------------------------------------------------------------------------


def insert(
    graph: Graph, found: Sequence[Match], copied: dict[Node, Node], lift: Callable[[nn.Module, str], str]
) -> None:
    """Puts the calls of the matches in their layers' places.

    graph: the graph of the matches, or its copy; copied: the nodes of the copy by those of the original, kept up to
    date.
    lift: makes a module's tensor, given by its name, a further input of the graph, and returns that input's name.
    """
    last_input = [None, *(node for node in graph.nodes if node.op == "placeholder")][-1]
    for one in found:
        nodes = [copied[node] for node in one.nodes]
        everything = list(graph.nodes)
        before = set(everything[: everything.index(nodes[0])])
        tensors: list[Node | None] = []
        for place in one.tensors:
            if place is None:
                tensors.append(None)
                continue
            layer, name = place
            value = layer.tensors[name]
            if layer.module is not None and is_parametrized(layer.module, value):
                with graph.inserting_before(nodes[0]):  # the tensor is computed there
                    tensors.append(graph.get_attr(f"{layer.name}.{value}"))
            elif layer.module is not None:
                with graph.inserting_after(last_input):
                    last_input = graph.placeholder(lift(layer.module, value))
                tensors.append(last_input)
            elif value.op == "get_attr" and copied[value] not in before:
                with graph.inserting_before(nodes[0]):
                    tensors.append(graph.get_attr(str(value.target)))
            else:
                tensors.append(copied[value])
        with graph.inserting_before(nodes[0]):
            arguments = (tensors,) if one.in_a_list else tuple(tensors)
            call = graph.call_function(one.function, (copied[one.layers[0].input], *arguments), one.settings)
        nodes[-1].replace_all_uses_with(call)
        copied[one.nodes[-1]] = call
        for node in reversed(nodes):
            graph.erase_node(node)
