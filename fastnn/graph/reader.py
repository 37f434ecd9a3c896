"""Reads a fused graph as the lines of a network, in training and in inference. What each function, method or module is
among a network's layers, the rows say that ``fused_layers.py`` and the files that it imports register here.

A row gets the reader, the node and the node's arguments as torch's function has them, and adds lines; or it raises
NotANetworkError, and torch runs the node.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn.utils.parametrize import is_parametrized

from fastnn._torch import OF_CONVOLUTIONS
from fastnn.graph.guard import Cell, Guard
from fastnn.graph.matcher import Layer, activation_of, computes_only, read_layer, settings_of, why_not_read
from fastnn.graph.order import Order, in_place, is_asked_to_write, unpack, writes_in_place
from fastnn.graph.prologue import DRAW, GIVE_BOOLEANS, Prologue, name_of_target
from fastnn.network_program import VIEWS, Line, TextLine, Value
from fastnn.nn._hooks import has_own_call, layer_forward
from fastnn.ops.conv_relu_max_pool import pad_of_ends, same_padding


class NotANetworkError(Exception):
    """Why a node cannot be a layer of a network, or a model cannot be one network."""


def has_side_effects(line: Line) -> bool:
    """Whether a line does more than give its results: it draws random numbers, or changes statistics."""
    return bool(line.attributes["trains"]) if line.layer == "batch_norm" else draws(line)


def changed_statistics(line: Line) -> list[Value]:
    """The running statistics that a line changes."""
    if line.layer != "batch_norm" or not line.attributes["trains"]:
        return []
    return [*line.inputs.get("mean", []), *line.inputs.get("variance", [])]


def draws(line: Line | TextLine) -> bool:
    """Whether a line draws random numbers."""
    return line.layer in ("dropout", "noise") or float(line.attributes.get("dropout", 0)) > 0


def used_lines(lines: Sequence[Line], results: Sequence[Value]) -> list[Line]:
    """Removes the lines whose results nobody takes. Lines that draw random numbers or change statistics stay."""
    needed, kept = set(results), []
    for line in reversed(lines):
        if has_side_effects(line) or any(value in needed for value in line.outputs):
            needed.update(line.taken())
            kept.append(line)
    return kept[::-1]


# What torch calls functions that are such layers, for booleans too.
_MOVES = frozenset(
    {
        *("getitem", "unsqueeze", "squeeze", "view", "reshape", "flatten", "transpose", "permute", "contiguous"),
    }
)


@dataclass(frozen=True)
class Size:
    """A number that follows from the sizes of values."""

    dimensions: tuple[tuple[Value, int], ...]
    factor: int = 1
    divisor: int = 1


class Reader:
    """Reads nodes in the graph's order. `values`: what each node's result is in the program; `parts`: of a node with
    several results, these, nested as torch gives them; `shapes`: of a node that gives a tensor's sizes, the tensor;
    `tails`: of a node that gives its last sizes, the tensor and the first of these dimensions.
    prologue: which nodes torch computes before. takes_computed: whether torch computes parameters first, as weight_norm
    computes them; `computed` has their names."""

    def __init__(
        self,
        modules: dict[str, nn.Module],
        order: Order,
        inputs: Sequence[Node],
        prologue: Prologue,
        takes_computed: bool = False,
    ) -> None:
        self.modules, self.order, self.prologue, self._takes_computed = modules, order, prologue, takes_computed
        self.computed: dict[Value, str] = {}
        self.values: dict[Node, Value] = {node: Value(()) for node in inputs}
        self.given = list(self.values.values())
        self.integers: set[Value] = set()  # inputs of integers, which embeddings take
        self.floats: set[Value] = set()  # values that must hold floating-point numbers
        self.booleans: set[Value] = set()  # values of a network that are 1 and 0 where torch has True and False
        # Values that are a given one in a form (prologue.py): that one, and the form's name.
        self.forms: dict[Value, tuple[Value, str]] = {}
        # Of a node that chooses one column of an input of integers: the input, the dimension and the place in it.
        self.columns: dict[Node, tuple[Value, int, int]] = {}
        # Of a node that is the numbers from 0 up to a size: the size, and whether it has a dimension of one in front.
        self.ranges: dict[Node, tuple[Any, bool]] = {}
        # Of a node that is many times one number: the inputs and attributes of its line, which each use makes anew.
        self.constants: dict[Node, tuple[dict[str, list[Value]], dict[str, Any]]] = {}
        # Of a node that is a tensor in which nothing is written yet: the inputs and attributes that give its sizes.
        self.empties: dict[Node, tuple[dict[str, list[Value]], dict[str, Any]]] = {}
        self.parts: dict[Node, Any] = {}  # by an index: a list, or a dict of the parts that are taken
        self.shapes: dict[Node, Value] = {}
        self.tails: dict[Node, tuple[Value, int]] = {}
        # Of a node that is a size: the dimensions of values whose product it is, times a number, divided by another.
        self.sizes: dict[Node, Size] = {}
        # Of a node that is a power of a size: the size's node, and the exponent.
        self.powers: dict[Node, tuple[Node, float]] = {}
        # Of nodes that are x.ndim - n, (1,) * (x.ndim - n), and n sizes of x before that: x, and n.
        self.ranks: dict[Node, tuple[Value, int]] = {}
        self.ones: dict[Node, tuple[Value, int]] = {}
        self.first_sizes: dict[Node, tuple[Value, int]] = {}
        self.saved: set[Value] = set()  # results that torch's backward needs, although the line's own does not
        self.tensors: dict[Node, tuple[Any, Any]] = {}  # where nodes that are tensors of the model are found
        self.done: set[Node] = set()  # nodes that were read with one before
        self.lines: list[Line] = []
        self.sources: list[tuple[Any, Any]] = []
        self.guard = Guard()
        self.counters: list[tuple[Any, str]] = []
        self.draws = False
        self._moves = False  # whether the node that is being read only moves elements
        self._weights: dict[int, Value] = {}  # by the tensor's id
        self._normed_weights: dict[tuple[nn.Module, str], Value] = {}

    def read(self, node: Node) -> None:
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            holder = self.modules[owner]
            held = holder._parameters if name in holder._parameters else holder._buffers
            if name in held:
                self.tensors[node] = (held, name)
            else:
                self.values[node] = self._computed(self.modules[owner], name)
            return
        if not node.users and node not in self.order.writes and not self._may_have_effects(node):
            return  # nobody sees what it gives
        self._check_in_place(node)
        args: tuple[Any, ...] = node.args
        kwargs = dict(node.kwargs)
        if "input" in kwargs and node.op == "call_function":
            args = (kwargs.pop("input"), *args)
        module = self.modules[str(node.target)] if node.op == "call_module" else None
        self._moves = name_of_target(node) in _MOVES
        try:
            if self._read_known_layer(node):
                return
            reads: Any = None
            if module is not None:
                if not has_own_call(module) and not why_not_read(module):
                    reads = MODULE_ROWS.get(layer_forward(module))
                if reads is None:
                    reads = next((one for kind, one in ROWS_OF_CLASSES.items() if isinstance(module, kind)), None)
                args = (module, *args)
            else:
                reads = ROWS.get(node.target)
            if reads is None:
                if module is not None and is_parametrized(module):
                    raise NotANetworkError(f"a parameter of '{node.target}' is computed from something else")
                raise NotANetworkError(f"{name_of(node, self.modules)} is no layer of a network")
            reads(self, node, *args, **kwargs)
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            raise NotANetworkError(f"{name_of(node, self.modules)} has arguments that a step does not know") from error

    def _may_have_effects(self, node: Node) -> bool:
        """Whether a node that changes no tensor may still draw random numbers, or compute a parameter anew that changes
        with it, as spectral_norm does."""
        if node.op != "call_module":
            return name_of_target(node) in DRAW or "dropout" in name_of_target(node)
        module = self.modules[str(node.target)]
        has_dropout = any(isinstance(one, _DRAWING) for one in module.modules())
        return has_dropout or any(is_parametrized(one) and not computes_only(one) for one in module.modules())

    def _check_in_place(self, node: Node) -> None:
        """A change of a tensor in place is read as a new tensor, where nothing else takes the old one."""
        if node.op == "call_module":
            writes = bool(getattr(self.modules[str(node.target)], "inplace", False))
            changed: Any = node.args[0] if node.args else None
        else:
            name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
            writes = writes_in_place(name) or is_asked_to_write(node) or node.target is in_place or "out" in node.kwargs
            changed = node.args[1] if node.target is in_place else node.args[0] if node.args else None
        if not writes:
            return
        if not isinstance(changed, Node) or "out" in node.kwargs or not self.order.may_be_new(node, changed):
            raise NotANetworkError(f"{name_of(node, self.modules)} changes a tensor that others see")
        if changed in self.empties or changed in self.constants:
            return
        made = next((line for line in self.lines if self.values.get(changed) in line.outputs), None)
        if (
            made is None
            or made.layer not in _NOT_SAVED
            or made.attributes.get("activation", "identity") != "identity"
            or self.values[changed] in self.saved
        ):  # stock's backward raises
            raise NotANetworkError(f"{name_of(node, self.modules)} changes a tensor that backward may need")

    # ---- values -----------------------------------------------------------------------------------------------------

    def value(self, node: Any) -> Value:
        """The value that a node is: computed, an input, or a tensor of the model."""
        if isinstance(node, Node):
            known = self.values.get(node)
            if known is not None:
                return known
            if node in self.tensors:
                own, name = self.tensors[node]
                if isinstance(own, dict) and isinstance(own.get(name), Tensor) and not own[name].is_floating_point():
                    return self.give(node)
                return self.tensor_of_model(own, name)
            if node in self.constants:
                inputs, attributes = self.constants[node]
                return self.add(None, "full", inputs, **attributes)
        raise NotANetworkError(f"{getattr(node, 'name', 'something')} is computed from something else")

    def data(self, node: Any) -> Value:
        """The value that a node is, which must hold floating-point numbers."""
        value = self.value(node)
        if value in self.integers:
            raise NotANetworkError("an input of integers goes to more than embeddings")
        if self.is_boolean(node):
            if not self._moves:
                raise NotANetworkError("a layer of numbers takes booleans")
            return self.boolean(node)
        self.floats.add(value)
        return value

    def is_boolean(self, node: Any) -> bool:
        """Whether a node is known to hold booleans."""
        return self.value(node) in self.booleans or self._gives_booleans(node)

    def boolean(self, node: Any) -> Value:
        """The value that a node is, which must be known to hold booleans, as 1 and 0."""
        value = self.value(node)
        if value not in self.booleans:
            if not self._gives_booleans(node):
                raise NotANetworkError("an operator of booleans takes what may be numbers")
            value = self.in_form(value, "condition")
            self.booleans.add(value)
        return value

    def operands(self, x: Node, y: Node, takes_booleans: bool) -> list[Value]:
        """Two operands, of which torch converts one that holds booleans or integers to the dtype of the other. Two of
        them it computes as such, which no network does. takes_booleans: whether torch allows booleans here."""
        convertible = [self.may_hold_others(node) for node in (x, y)]
        if all(convertible):
            raise NotANetworkError("torch may compute with booleans or integers here")
        return [
            self._as_number(node, takes_booleans) if converts else self.data(node)
            for node, converts in zip((x, y), convertible, strict=True)
        ]

    def may_hold_others(self, node: Node) -> bool:
        """Whether a node may hold other things than floating-point numbers, and torch may still convert it."""
        value, is_given = self.value(node), node in self.prologue.before or node in self.tensors
        return value in self.booleans or (is_given and value in self.given)

    def _as_number(self, node: Node, takes_booleans: bool) -> Value:
        value = self.value(node)
        if value in self.booleans and not takes_booleans:
            raise NotANetworkError("torch takes no booleans here")
        return value if value in self.booleans else self.in_form(value, "numbers" if takes_booleans else "no booleans")

    def _gives_booleans(self, node: Any) -> bool:
        """Whether what a network is given is known to hold booleans."""
        if node in self.tensors:
            own, name = self.tensors[node]
            held = own.get(name) if isinstance(own, dict) else None
            return isinstance(held, Tensor) and held.dtype is torch.bool
        return node in self.prologue.before and name_of_target(node) in GIVE_BOOLEANS

    def whole_numbers(self, value: Value) -> Value:
        """A value that must be given and hold int64."""
        if value not in self.given or value in self.floats:
            raise NotANetworkError("an index or an embedding takes numbers that follow from no input alone")
        self.integers.add(value)
        return value

    def give(self, node: Node) -> Value:
        """Notes that a network is given what a node is."""
        value = self.values[node] = Value(())
        self.given.append(value)
        return value

    def in_form(self, value: Value, form: str) -> Value:
        """A given value in a form of prologue.py."""
        known = next((one for one, its in self.forms.items() if its == (value, form)), None)
        if known is None:
            known = Value(())
            self.forms[known] = value, form
        return known

    def condition(self, node: Any) -> Value:
        """The value that a node is, which must hold booleans, as 1 and 0."""
        value = self.value(node)
        if value in self.booleans:
            return value
        if value not in self.given or value in self.floats:
            raise NotANetworkError("a mask is computed in a way that no network knows")
        return self.in_form(value, "condition")

    def dtype(self) -> torch.dtype | None:
        """The dtype of the model's parameters; None where it has none of floating point, or of several dtypes."""
        found = {module._parameters[name].dtype for module, name in self._float_parameters()}  # type: ignore[union-attr]
        return found.pop() if len(found) == 1 else None

    def note_dtype(self) -> None:
        """Notes in the guard that the program is right for the dtype of the model's parameters alone."""
        self.guard.note_call(_dtype_of, next(self._float_parameters()), self.dtype())

    def _float_parameters(self) -> Iterator[tuple[nn.Module, str]]:
        for module in self.modules.values():
            for name, held in module._parameters.items():
                if held is not None and held.is_floating_point():
                    yield module, name

    def tensor_of_model(self, container: Any, name: Any) -> Value:
        if not isinstance(container, (dict, Cell)):
            raise NotANetworkError("a tensor is held by something that is no module")
        tensor: Any = container.get(name) if isinstance(container, dict) else container[name]
        if type(tensor) not in (Tensor, nn.Parameter):
            raise NotANetworkError(f"a tensor of the model is a {type(tensor).__name__}")
        if not any(own is container and other == name for own, other in self.sources):
            self.sources.append((container, name))
        known = self._weights.get(id(tensor))
        if known is None:
            known = self._weights[id(tensor)] = Value(tensor.shape, tensor)
        return known

    def own(self, module: nn.Module, name: str) -> list[Value]:
        """A module's tensor of this name; nothing where it has none."""
        if is_parametrized(module, name):
            return [self._computed(module, name)]
        for held in (module._parameters, module._buffers):
            if name in held:
                return [] if held[name] is None else [self.tensor_of_model(held, name)]
        if getattr(module, name, None) is not None:
            raise NotANetworkError(f"a {type(module).__name__}'s {name} is computed from something else")
        return []

    def _computed(self, module: nn.Module, name: str) -> Value:
        if not is_parametrized(module, name) or not computes_only(module):
            raise NotANetworkError(f"a parameter of a {type(module).__name__} is computed from something else")
        if not self._takes_computed:
            return self._normed(module, name)
        path = next(path for path, one in self.modules.items() if one is module)
        target = f"{path}.{name}" if path else name
        known = next((value for value, other in self.computed.items() if other == target), None)
        if known is None:
            known = Value(())
            self.computed[known] = target
        return known

    def _normed(self, module: Any, name: str) -> Value:
        """A parameter that weight_norm computes: v * (g / the norm of v over all dimensions but one)."""
        if (known := self._normed_weights.get((module, name))) is not None:
            return known
        parts = module.parametrizations[name]
        norm = parts[0]
        if len(parts) != 1 or type(norm).__name__ != "_WeightNorm" or norm.dim < -1:
            raise NotANetworkError(f"a parameter of a {type(module).__name__} is computed from something else")
        v, g = (self.tensor_of_model(parts._parameters, f"original{i}") for i in (1, 0))
        for one in (module.parametrizations, parts, norm):
            self.guard.note_layer(one)
            self.guard.note_contents(one._modules)
        self.guard.note_settings(norm, ["dim"])
        dims = [dim for dim in range(len(v.sizes)) if dim != norm.dim]  # (-1 stands for no dimension)
        squares = self.add(None, "binary", {"input": [v], "other": [v]}, function="mul")
        sums = self.add(None, "mean", {"input": [squares]}, dims=dims, keepdim=norm.dim >= 0, sums=True)
        length = self.add(None, "unary", {"input": [sums]}, function="root")
        factor = self.add(None, "binary", {"input": [g], "other": [length]}, function="div")
        weight = self.add(None, "binary", {"input": [v], "other": [factor]}, function="mul")
        self._normed_weights[module, name] = weight
        return weight

    def optional(self, node: Any) -> list[Value]:
        return [] if node is None else [self.value(node)]

    def add(self, node: Node | None, layer: str, inputs: dict[str, list[Value]], /, **attributes: Any) -> Value:
        """Adds a line of one result, which is the node's -> the result."""
        takes_booleans = any(value in self.booleans for values in inputs.values() for value in values)
        if takes_booleans and layer not in VIEWS:
            raise NotANetworkError("a layer of numbers takes booleans")
        result = self.add_of_booleans(node, layer, inputs, **attributes)
        if takes_booleans:
            self.booleans.add(result)
        return result

    def add_of_booleans(
        self, node: Node | None, layer: str, inputs: dict[str, list[Value]], /, **attributes: Any
    ) -> Value:
        """The same for a layer that is right for booleans that are 1 and 0."""
        result = Value(())
        line = Line(layer, {n: v for n, v in inputs.items() if v}, [result], attributes)
        self._check_statistics(changed_statistics(line))
        self.lines.append(line)
        if node is not None:
            self.values[node] = result
        return result

    def _check_statistics(self, changed: Sequence[Value]) -> None:
        """A network writes running statistics when all its layers have run. Norms that write the same tensors add up
        in the order of their calls; but no other may read these tensors, or have views of them."""
        known = {id(value.tensor) for value in changed}
        for value in changed:
            for module, held in self._buffers.get(_memory(value.tensor), ()):
                if id(held) not in known or not module.training:
                    raise NotANetworkError("what a batch norm writes is read by another, or has views")

    @cached_property
    def _buffers(self) -> dict[int, list[tuple[nn.Module, Tensor]]]:
        """The buffers of the model's modules, by where their memory begins."""
        found: dict[int, list[tuple[nn.Module, Tensor]]] = {}
        for module in dict.fromkeys(self.modules.values()):
            for held in module._buffers.values():
                if held is not None:
                    found.setdefault(_memory(held), []).append((module, held))
        found.pop(0, None)  # of those without memory
        return found

    def note(self, module: nn.Module, *names: str) -> None:
        """Notes in the guard that the program depends on the module and on these attributes of it."""
        self.guard.note_layer(module)
        self.guard.note_settings(module, names)

    def note_log_softmax(self, node: Node) -> None:
        if node.op == "call_module":
            self.note(self.modules[str(node.target)], "dim")

    # ---- layers that the matcher knows ------------------------------------------------------------------------------

    def _read_known_layer(self, node: Node) -> bool:
        layer = read_layer(node, self.modules)
        if layer is None:
            return False
        if layer.kind not in ("conv1d", "conv2d", "conv3d", "linear", "batch_norm", "dropout", "identity"):
            if (alone := activation_of(layer)) is not None:
                self._note_settings(layer)
                self.add(node, "activation", {"input": [self.data(layer.input)]}, activation=str(alone))
                return True
            if not layer.kind.startswith("max_pool"):
                return False
        self._note_settings(layer)
        if layer.kind == "identity" or (layer.kind == "dropout" and not layer.settings["training"]):
            self.values[node] = self.data(layer.input)
            return True
        if layer.kind == "dropout":
            kind = nn.Dropout if layer.module is None else type(layer.module)
            if kind is nn.AlphaDropout:
                self.alpha_dropout(node, self.data(layer.input), layer.settings["p"])
                return True
            if kind not in _DROPOUTS:
                raise NotANetworkError(f"{kind.__name__} drops more than single elements")
            self.dropout(node, self.data(layer.input), layer.settings["p"], _DROPOUTS[kind])
            return True
        inputs = {"input": [self.data(layer.input)], **{n: self._tensor(layer, n) for n in ("weight", "bias")}}
        if layer.kind == "linear":
            self.add(node, "linear", inputs)
        elif layer.kind == "batch_norm":
            self._add_norm_alone(node, layer, inputs)
        elif layer.kind.startswith("conv"):
            self._add_convolution(node, layer, inputs)
        else:
            self._add_max_pool(node, layer, inputs["input"])
        return True

    def _add_convolution(self, node: Node, layer: Layer, inputs: dict[str, list[Value]]) -> None:
        settings = layer.settings
        stride, dilation = (each_dimension(settings[name], layer.dims) for name in ("stride", "dilation"))
        padding = settings["padding"]
        mode = settings.get("padding_mode", "zeros")
        if mode != "zeros" and layer.module is not None:  # functions pad by zeros
            (name,) = OF_CONVOLUTIONS
            around = list(getattr(layer.module, name))
            if len(around) != 2 * layer.dims or not all(type(one) is int and one >= 0 for one in around):
                raise NotANetworkError(f"{layer.name}'s padding is {around!r} of {mode}")
            self.note(layer.module, name)
            inputs["input"] = [self.add(None, "border", {"input": inputs["input"]}, padding=around, mode=mode)]
            padding = 0
        if isinstance(padding, str) and layer.module is None:  # no guard notes the kernel's size
            raise NotANetworkError(f"{layer.name}'s padding is {padding!r}")
        inputs["input"], padding = self.padded(inputs["input"][0], padding, inputs["weight"][0], stride, dilation)
        self.add(node, "conv", inputs, stride=stride, padding=padding, dilation=dilation, groups=settings["groups"])

    def padded(
        self, value: Value, padding: Any, weight: Value, stride: Sequence[int], dilation: Sequence[int]
    ) -> tuple[list[Value], list[int]]:
        """A convolution's input and padding. Where "same" pads unevenly, the input has one more row behind it."""
        dims = len(stride)
        if not isinstance(padding, str):
            return [value], each_dimension(padding, dims)
        if padding not in ("same", "valid") or len(weight.sizes) != dims + 2 or (padding == "same" and max(stride) > 1):
            raise NotANetworkError(f"a convolution's padding is {padding!r}")
        if padding == "valid":
            return [value], [0] * dims
        both, ends = same_padding(weight.sizes[2:], dilation)
        if any(ends):
            value = self.add(None, "pad", {"input": [value]}, padding=pad_of_ends(ends), value=0.0)
        return [value], both

    def _note_settings(self, layer: Layer) -> None:
        if layer.module is not None:
            self.note(layer.module, *settings_of(layer.module))

    def _tensor(self, layer: Layer, name: str) -> list[Value]:
        if name not in layer.tensors:
            return []
        if layer.module is not None:
            return self.own(layer.module, name)
        return [self.value(layer.tensors[name])]

    def dropout(self, node: Node, value: Value, p: float, channels_of: int = 0) -> None:
        """channels_of: how many dimensions the images have whose channels are dropped as a whole."""
        if not p:
            self.values[node] = value
            return
        self.add(node, "dropout", {"input": [value]}, p=float(p), channels_of=channels_of)
        self.draws = True

    def alpha_dropout(self, node: Node, value: Value, p: float) -> None:
        """Dropout to the value that SELU has far below zero, which keeps mean and variance. As torch computes it:
        x * (a kept) + alpha * a * (kept - 1) + alpha * a * p, of random ones `kept`."""
        if not 0 < p < 1:
            raise NotANetworkError("an alpha dropout drops nothing, or all")
        alpha = 1.7580993408473766
        a = ((alpha**2 * p + 1) * (1 - p)) ** -0.5
        kept = self.add(None, "noise", {"like": [value]}, distribution="bernoulli", p=1 - p)
        less = self.add(None, "binary", {"input": [kept]}, function="sub", number=1.0)
        less = self.add(None, "binary", {"input": [less]}, function="mul", number=alpha * a)
        shift = self.add(None, "binary", {"input": [less]}, function="add", number=alpha * a * p)
        scale = self.add(None, "binary", {"input": [kept]}, function="mul", number=a)
        scaled = self.add(None, "binary", {"input": [value], "other": [scale]}, function="mul")
        self.add(node, "binary", {"input": [scaled], "other": [shift]}, function="add")
        self.draws = True

    def _add_max_pool(self, node: Node, layer: Layer, input: list[Value]) -> None:
        s = layer.settings
        if s["return_indices"]:
            raise NotANetworkError(f"{layer.name} returns indices")
        kernel, padding, dilation = (
            each_dimension(s[name], layer.dims) for name in ("kernel_size", "padding", "dilation")
        )
        stride = kernel if s["stride"] in (None, (), []) else each_dimension(s["stride"], layer.dims)
        self.add(
            node, "max_pool", {"input": input}, kernel=kernel, stride=stride, padding=padding, dilation=dilation,
            ceil_mode=bool(s["ceil_mode"]),
        )  # fmt: skip

    def _add_norm_alone(self, node: Node, layer: Layer, inputs: dict[str, list[Value]]) -> None:
        """Adds a batch norm that no ReLU and max-pool follow."""
        module: Any = layer.module
        if module is None:
            raise NotANetworkError("a batch norm is called as a function")
        settings = layer.settings
        running = {"mean": self.own(module, "running_mean"), "variance": self.own(module, "running_var")}
        trains = bool(settings["training"]) or not running["mean"]
        tracked = bool(settings["track_running_stats"])
        if trains and not tracked:
            running = {}
        if trains and running.get("mean") and settings["momentum"] is None:
            raise NotANetworkError(f"{layer.name} keeps a cumulative average")
        dims = next(d for d in (1, 2, 3) if isinstance(module, getattr(nn, f"BatchNorm{d}d")))
        self.add(
            node, "batch_norm", {**inputs, **running}, dims=dims, trains=trains,
            momentum=float(settings["momentum"] or 0.0), epsilon=float(settings["eps"]),
        )  # fmt: skip
        if settings["training"] and tracked and module.num_batches_tracked is not None:
            self.counters.append((module._buffers, "num_batches_tracked"))


def _memory(tensor: Tensor | None) -> int:
    """Where a tensor's memory begins; 0 where it has none that could be told."""
    return tensor.untyped_storage().data_ptr() if type(tensor) is Tensor and tensor.layout is torch.strided else 0


def _dtype_of(module: nn.Module, name: str) -> torch.dtype | None:
    parameter = module._parameters.get(name)
    return None if parameter is None else parameter.dtype


_DRAWING = (
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
    *(nn.RReLU, nn.RNNBase, nn.MultiheadAttention),
)
_DROPOUTS: dict[type, int] = {nn.Dropout: 0, nn.Dropout1d: 1, nn.Dropout2d: 2, nn.Dropout3d: 3}


def each_dimension(numbers: Any, dims: int) -> list[int]:
    given = [numbers] * dims if isinstance(numbers, int) else list(numbers)
    if len(given) != dims or not all(type(one) is int for one in given):
        raise NotANetworkError("a layer has settings that are not as many numbers as dimensions")
    return given


def only_user(node: Node) -> Node | None:
    """The one node that takes a node's result, if there is only one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def only_first_is_taken(node: Node) -> bool:
    """Whether only the first of a node's results is read."""
    return all(
        user.op != "output"
        and (
            not user.users
            or (user.target is operator.getitem and user.args[1] == 0)
            or (user.target is getattr and user.args[1] == "values")
            or (user.target is unpack and only_first_is_taken(user))
        )
        for user in node.users
    )


def name_of(node: Node, modules: dict[str, nn.Module]) -> str:
    """What the node does, in the words of a user."""
    if node.op == "call_module":
        return f"{type(modules[str(node.target)]).__name__} '{node.target}'"
    if node.target is operator.getitem:
        return "an index"
    return str(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target))


# ---- rows -----------------------------------------------------------------------------------------------------------

ROWS: dict[Any, Callable[..., None]] = {}
MODULE_ROWS: dict[Any, Callable[..., None]] = {}  # by the class's forward
ROWS_OF_CLASSES: dict[type, Callable[..., None]] = {}  # of other modules, by a class above theirs
# Layers whose results stock does not save for backward, so that they may be changed in place.
_NOT_SAVED = frozenset(
    {
        *("conv", "conv_transpose", "batch_norm", "linear", "embedding", "binary", "layer_norm", "mean", "avg_pool"),
        *("max_pool", "adaptive_avg_pool", "upsample", "matmul", "cat", "pad", "noise", "group_norm", "clamp"),
        *("repeat", "index_select", "flip", "roll", "channel_shuffle", "border"),
    }
)


def row(*targets: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a row for functions, and for methods by their names."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        ROWS.update(dict.fromkeys(targets, function))
        return function

    return register


def module_row(*kinds: type[nn.Module]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a row for modules, which gets the module before the call's own arguments."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        MODULE_ROWS.update({kind.forward: function for kind in kinds})
        return function

    return register


def row_of_class(kind: type[nn.Module]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a row for the modules of a class, and of those below it, that have no row of their own."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        ROWS_OF_CLASSES[kind] = function
        return function

    return register
