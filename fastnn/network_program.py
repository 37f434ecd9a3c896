"""A network's program: layers over values, as Python writes it, changes it and reads it back.

The text is csrc/network/program.h's: a line a layer, which names the values that the layer takes and gives, and its
attributes. Which layers there are, with their inputs, attributes and defaults, the extension says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fastnn._extension import load_extension

_extension = load_extension()


@dataclass(frozen=True)
class Kind:
    """One row of the extension's table of layers.

    inputs: their names, with "?" behind one that may be missing, and "*" behind one that may be any number of values.
    attributes: the kind and the default of each; the default is None where the attribute must be given. infers: whether
    a network has the layer in inference.
    """

    name: str
    inputs: tuple[str, ...]
    attributes: Mapping[str, tuple[str, str | None]]
    infers: bool


KINDS: dict[str, Kind] = {
    name: Kind(name, tuple(inputs), {attribute: (kind, default) for attribute, kind, default in attributes}, infers)
    for name, inputs, attributes, infers in _extension.network_layers()
}


class Value:
    """A value of a program: an input, a weight, or what a layer gives.

    sizes: numbers, or symbols for sizes that depend on the inputs' sizes. tensor: the weight, or None.
    """

    __slots__ = ("sizes", "tensor")

    def __init__(self, sizes: Sequence[Any], tensor: Tensor | None = None) -> None:
        self.sizes, self.tensor = tuple(sizes), tensor


@dataclass(eq=False)
class Line:
    """One layer: the values that it takes, by the names of its inputs, the values that it gives, and its attributes."""

    layer: str
    inputs: dict[str, list[Value]]
    outputs: list[Value]
    attributes: dict[str, Any] = field(default_factory=dict)

    def taken(self) -> Iterator[Value]:
        """The values that are no weights."""
        for values in self.inputs.values():
            yield from (value for value in values if value.tensor is None)

    def weight(self, name: str) -> Tensor | None:
        values = self.inputs.get(name)
        return values[0].tensor if values else None

    def set_weight(self, name: str, tensor: Tensor) -> None:
        self.inputs[name] = [Value(tensor.shape, tensor)]


# The comparisons among the functions of a "binary" line, by torch's names.
COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
# The functions of a "unary" line, by torch's names. (There is one more, "root", which torch has no name for.)
UNARY = ("abs", "sqrt", "rsqrt", "log", "log1p", "expm1", "erf", "atan", "sign", "round", "floor", "ceil")


# Layers that move elements, and whose results may lie in the memory of what they take.
VIEWS = frozenset(
    {
        *("reshape", "flatten", "squeeze", "unsqueeze", "transpose", "permute", "contiguous", "select", "slice"),
        *("split", "unflatten", "detach", "check_sizes"),
    }
)


def write_attribute(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, (list, tuple)):
        return ",".join(map(write_attribute, value))
    return repr(value) if isinstance(value, float) else str(value)


def write(
    inputs: Sequence[tuple[Value, str]],
    lines: Sequence[Line],
    outputs: Sequence[Value],
    dtypes: Sequence[str] = (),
    computed: Mapping[Value, str] | None = None,
) -> tuple[str, list[Any]]:
    """The text of a program, and its weights in the order of the text.

    inputs: each with the text of the sizes that it may have. dtypes: "int64" for an input of integers, "bool" for
    one of booleans, or "".
    computed: values that are weights but no tensors yet, with the text of their sizes; they stand for themselves among
    the weights.
    """
    names: dict[Value, str] = {}
    text: list[str] = [_extension.network_heading]
    weights: list[Any] = []
    computed = computed or {}

    def name_of(value: Value) -> str:
        if value not in names:
            weight: Any = value if value in computed else value.tensor
            if weight is None:
                raise ValueError("a line takes a value that none above gives")
            names[value] = f"w{len(weights)}"
            weights.append(weight)
            sizes = computed[value] if weight is value else write_attribute(weight.shape)
            text.append(f"weight -> {names[value]} sizes={sizes}")
        return names[value]

    for number, (value, sizes) in enumerate(inputs):
        names[value] = f"x{number}"
        dtype = f" dtype={dtypes[number]}" if number < len(dtypes) and dtypes[number] else ""
        text.append(f"input -> x{number} sizes={sizes}{dtype}")
    made = 0
    for line in lines:
        words = [line.layer]
        words += [f"{name}={','.join(map(name_of, values))}" for name, values in line.inputs.items() if values]
        words.append("->")
        for value in line.outputs:
            names[value] = f"v{made}"
            made += 1
            words.append(names[value])
        known = KINDS[line.layer].attributes
        for name, content in line.attributes.items():
            # One number may stand for all dimensions of a convolution.
            if line.layer == "conv" and isinstance(content, (list, tuple)) and len(set(content)) == 1:
                content = content[:1]
            if (written := write_attribute(content)) != known[name][1]:
                words.append(f"{name}={written}")
        text.append(" ".join(words))
    text.append(f"output input={','.join(names[value] for value in outputs)}")
    return "\n".join(text), weights


# What a max-pool's attributes are called in a layer that includes the pool.
POOL_NAMES = {"kernel": "pool", **{name: f"pool_{name}" for name in ("stride", "padding", "dilation")}}


def conv_attributes(geometry: Sequence[int], dims: int) -> dict[str, Any]:
    """The attributes of a "conv" line, from the flat geometry that fastnn::conv_relu_max_pool takes: of each, a number
    for each dimension."""
    names = ("stride", "padding", "dilation", "pool", "pool_stride", "pool_padding", "pool_dilation")
    settings: dict[str, Any] = {name: list(geometry[i * dims : (i + 1) * dims]) for i, name in enumerate(names)}
    if settings["pool_stride"] == settings["pool"]:
        del settings["pool_stride"]
    return {**settings, "groups": geometry[-2], "ceil_mode": bool(geometry[-1])}


# ---- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextLine:
    """A line of a program's text: names of values in place of values, attributes as the text has them."""

    layer: str
    inputs: Mapping[str, Sequence[str]]
    outputs: Sequence[str]
    attributes: Mapping[str, str]

    def __getitem__(self, name: str) -> Any:
        """The value of an attribute, or its default, as a Python object of the attribute's kind."""
        kind, default = KINDS[self.layer].attributes[name]
        text = self.attributes.get(name, default)
        if text is None:
            raise ValueError(f"{self.layer} has no {name}")
        if kind == "int":
            return int(text)
        if kind == "bool":
            return text == "1"
        if kind == "float":
            return float(text)
        if kind == "ints":
            return [int(one) if one.lstrip("-").isdecimal() else one for one in text.split(",")] if text else []
        return text


def read(text: str) -> Iterator[TextLine]:
    """The lines of a program's text, without the heading."""
    for line in text.split("\n")[1:]:
        taken, _, given = line.partition(" -> ")
        layer, *inputs = taken.split(" ")
        words = given.split(" ") if given else []
        outputs = [word for word in words if "=" not in word]
        yield TextLine(
            layer,
            {name: values.split(",") for name, _, values in (word.partition("=") for word in inputs)},
            outputs,
            {name: value for name, _, value in (word.partition("=") for word in words[len(outputs) :])},
        )
