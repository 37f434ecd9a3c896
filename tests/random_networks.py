"""Random programs of networks: layers of all kinds over values of images, sequences and rows, with branches."""

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastnn import _C
from fastnn.graph.rewriting import rewrite_unpacked
from fastnn.network_program import COMPARISONS, UNARY, Line, Value, write
from fastnn.recurrent_modes import MODES
from fastnn.reference.network import network
from fastnn.testing import using_threads

ACTIVATIONS = (
    *("identity", "relu", "tanh", "sigmoid", "gelu", "hardtanh(0.0,6.0)", "leaky_relu(0.2)", "silu", "selu", "mish"),
)


@dataclass
class RandomNetwork:
    text: str
    weights: list[Tensor]  # float64
    inputs: list[Tensor]
    rewritten: tuple[str, list[Tensor]]  # a text that should give the same, and its weights


class _Builder:
    def __init__(self, seed: int, trains: bool) -> None:
        self.trains = trains
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.lines: list[Line] = []
        self.inputs: list[tuple[Value, Tensor]] = []
        self.values: list[Value] = []

    def tensor(self, *sizes: int, scale: float = 1.0) -> Tensor:
        return torch.randn(sizes, generator=self.generator, dtype=torch.float64) * scale

    def weight(self, *sizes: int) -> list[Value]:
        fan_in = max(1, torch.Size(sizes[1:]).numel())
        return [Value(sizes, self.tensor(*sizes, scale=fan_in**-0.5))]

    def bias(self, size: int) -> dict[str, list[Value]]:
        return {"bias": self.weight(size)} if self.random.random() < 0.7 else {}

    def norm(self, channels: int) -> dict[str, list[Value]]:
        """What a batch norm with known statistics has, besides its input."""
        rest = {name: self.weight(channels) for name in ("weight", "bias") if self.random.random() < 0.7}
        variance = Value((channels,), self.tensor(channels).abs())
        return {"mean": self.weight(channels), "variance": [variance], **rest}

    def add(self, layer: str, inputs: dict[str, list[Value]], sizes: Sequence[int], /, **attributes: Any) -> Value:
        value = Value(sizes)
        self.lines.append(Line(layer, inputs, [value], attributes))
        self.values.append(value)
        return value

    def pick(self, ranks: Sequence[int]) -> Value | None:
        fitting = [value for value in self.values if len(value.sizes) in ranks]
        # Mostly the last values, so that networks become deep.
        return self.random.choice(fitting[-3:] if self.random.random() < 0.7 else fitting) if fitting else None

    def activation(self) -> str:
        return self.random.choice(ACTIVATIONS)


def _conv(b: _Builder) -> None:
    x = b.pick((3, 4, 5))
    if x is None:
        return
    dims = len(x.sizes) - 2
    channels = x.sizes[1]
    kernel = [b.random.choice((1, 1, 2, 3, 3, 5)) for _ in range(dims)]
    stride = [b.random.choice((1, 1, 1, 2)) for _ in range(dims)]
    dilation = [b.random.choice((1, 1, 1, 2)) for _ in range(dims)]
    padding = [b.random.randint(0, k // 2) for k in kernel]
    groups = b.random.choice([g for g in (1, 1, 2, channels) if channels % g == 0])
    out = groups * b.random.choice((1, 2, 3, 5, 8, 17)) if groups > 1 else b.random.choice((1, 3, 8, 16, 20, 33))
    spans = list(zip(x.sizes[2:], kernel, stride, dilation, padding, strict=True))
    attributes: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    ends, crop = padding, [0] * dims
    if not b.trains and b.random.random() < 0.3:
        attributes["padding_end"] = ends = [b.random.randint(0, k) for k in kernel]
        attributes["crop"] = crop = [b.random.choice((0, 1, 2)) for _ in kernel]
    padded = [size + p + end for (size, *_, p), end in zip(spans, ends, strict=True)]
    if any(size < d * (k - 1) + 1 for size, (_, k, _, d, _) in zip(padded, spans, strict=True)):
        return
    sizes = [(size - d * (k - 1) - 1) // s + 1 for size, (_, k, s, d, _) in zip(padded, spans, strict=True)]
    sizes = [size - less for size, less in zip(sizes, crop, strict=True)]
    if min(sizes) < 1:
        return
    inputs = {"input": [x], "weight": b.weight(out, channels // groups, *kernel), **b.bias(out)}
    fitting = [value for value in b.values if tuple(value.sizes) == (x.sizes[0], out, *sizes)]
    if b.random.random() < 0.3 and min(sizes) >= 2:
        attributes.update(pool=[2] * dims, activation=b.random.choice(("relu", "identity")))
        sizes = [size // 2 for size in sizes]
    else:
        attributes["activation"] = b.activation()
        if fitting and b.random.random() < 0.7:
            inputs["addend"] = [b.random.choice(fitting)]
    b.add("conv", inputs, (x.sizes[0], out, *sizes), **attributes)


def _conv_transpose(b: _Builder) -> None:
    x = b.pick((3, 4, 5))
    if x is None:
        return
    dims, channels = len(x.sizes) - 2, x.sizes[1]
    kernel = [b.random.randint(1, 4) for _ in range(dims)]
    stride = [b.random.randint(1, 3) for _ in range(dims)]
    padding = [b.random.randint(0, (k - 1) // 2) for k in kernel]
    extra = [b.random.randint(0, s - 1) for s in stride]
    groups = b.random.choice([g for g in (1, 2) if channels % g == 0])
    out = b.random.choice((1, 3, 8, 17))
    spans = list(zip(x.sizes[2:], kernel, stride, padding, extra, strict=True))
    sizes = [(size - 1) * s - 2 * p + k + e for size, k, s, p, e in spans]
    if min(sizes) < 1 or max(sizes) > 40:
        return
    attributes: dict[str, Any] = {"stride": stride, "padding": padding, "output_padding": extra, "groups": groups}
    inputs = {"input": [x], "weight": b.weight(channels, out, *kernel), **b.bias(out * groups)}
    b.add("conv_transpose", inputs, (x.sizes[0], out * groups, *sizes), **attributes, activation=b.activation())


def _pool(b: _Builder) -> None:
    x = b.pick((3, 4, 5))
    if x is None:
        return
    dims = len(x.sizes) - 2
    kernel = [b.random.randint(1, 3) for _ in range(dims)]
    stride = [b.random.randint(1, 2) for _ in range(dims)]
    padding = [b.random.randint(0, k // 2) for k in kernel]
    spans = list(zip(x.sizes[2:], kernel, stride, padding, strict=True))
    if any(size < k for size, k, _, _ in spans):
        return
    sizes = [(size + 2 * p - k) // s + 1 for size, k, s, p in spans]
    if min(sizes) < 1:
        return
    attributes: dict[str, Any] = {"kernel": kernel, "stride": stride, "padding": padding}
    layer = b.random.choice(("max_pool", "avg_pool"))
    if layer == "avg_pool":
        attributes["count_include_pad"] = b.random.random() < 0.5
    b.add(layer, {"input": [x]}, (*x.sizes[:2], *sizes), **attributes)


def _upsample(b: _Builder) -> None:
    x = b.pick((3, 4))
    if x is None or max(x.sizes[2:]) > 12:
        return
    linear = b.random.random() < 0.5
    attributes: dict[str, Any] = {"linear": linear, "align_corners": linear and b.random.random() < 0.5}
    if b.random.random() < 0.5:
        factors = [b.random.randint(1, 3) for _ in x.sizes[2:]]
        sizes = [size * factor for size, factor in zip(x.sizes[2:], factors, strict=True)]
        b.add("upsample", {"input": [x]}, (*x.sizes[:2], *sizes), factors=factors, **attributes)
    elif others := [value for value in b.values if len(value.sizes) == len(x.sizes) and max(value.sizes[2:]) <= 24]:
        other = b.random.choice(others)
        written: list[Any] = [f"0.{dim}" for dim in range(2, len(x.sizes))]
        sizes = list(other.sizes[2:])
        if b.random.random() < 0.5:
            written[0] = sizes[0] = b.random.randint(1, 14)
        inputs = {"input": [x], "like": [other]}
        b.add("upsample", inputs, (*x.sizes[:2], *sizes), sizes=written, **attributes)


def _linear(b: _Builder) -> None:
    x = b.pick((1, 2, 3, 4))
    if x is None or x.sizes[-1] < 1:
        return
    out = b.random.choice((1, 3, 8, 16, 33))
    inputs = {"input": [x], "weight": b.weight(out, x.sizes[-1]), **b.bias(out)}
    b.add("linear", inputs, (*x.sizes[:-1], out), activation=b.activation())


def _rnn(b: _Builder) -> None:
    x = b.pick((2, 3, 3, 3))
    if x is None or 0 in x.sizes:
        return
    is_one = len(x.sizes) == 2  # a sequence by itself
    batch_first = b.random.random() < 0.5
    is_long = max(x.sizes[:2]) > 60  # where numbers that nothing bounds would grow beyond float32
    mode = b.random.choice([mode for mode in MODES if not is_long or mode.name != "RNN_RELU"])
    directions, layers, hidden = b.random.randint(1, 2), b.random.randint(1, 2), b.random.choice((1, 5, 8, 17))
    biased = b.random.random() < 0.7
    weights: list[Value] = []
    width = x.sizes[-1]
    for _ in range(layers):
        for _ in range(directions):
            weights += [*b.weight(mode.gates * hidden, width), *b.weight(mode.gates * hidden, hidden)]
            weights += [*b.weight(mode.gates * hidden), *b.weight(mode.gates * hidden)] if biased else []
        width = directions * hidden
    batch = () if is_one else (x.sizes[0 if batch_first else 1],)
    last = b.random.random() < 0.3 and not (is_one and (batch_first or directions == 2))
    outputs = [Value((*batch, width) if last else (*x.sizes[:-1], width))]
    states = b.random.randint(0, mode.states)
    outputs += [Value((layers * directions, *batch, hidden)) for _ in range(states)]
    inputs = {"input": [x], "weights": weights}
    fitting = [one for one in b.values if tuple(one.sizes) == (layers * directions, *batch, hidden)]
    if fitting and b.random.random() < 0.5:
        inputs.update((name, [b.random.choice(fitting)]) for name in "hc"[: mode.states])
    settings = {"mode": mode.name, "bidirectional": directions == 2, "batch_first": batch_first}
    b.lines.append(Line("rnn", inputs, outputs, {**settings, "bias": biased, "last": last}))
    b.values += outputs


def _activation(b: _Builder) -> None:
    x = b.random.choice(b.values)
    b.add("activation", {"input": [x]}, x.sizes, activation=b.activation())


def _binary(b: _Builder) -> None:
    x = b.random.choice(b.values)
    function = b.random.choice(("add", "sub", "mul", "maximum", "minimum"))
    attributes = {"function": function, "activation": b.activation(), "reverses": b.random.random() < 0.3}
    kind = b.random.choice(("number", "weight", "value", "gate"))
    if kind != "number" and not b.trains and b.random.random() < 0.3:
        attributes |= {"input_activation": b.activation(), "other_activation": b.activation()}
    if kind == "number":
        b.add("binary", {"input": [x]}, x.sizes, number=b.random.uniform(-2, 2), **attributes)
    elif kind == "weight":
        sizes = [size if b.random.random() < 0.5 else 1 for size in x.sizes][b.random.randint(0, len(x.sizes)) :]
        b.add("binary", {"input": [x], "other": [Value(sizes, b.tensor(*sizes))]}, x.sizes, **attributes)
    elif kind == "value":
        same = [value for value in b.values if tuple(value.sizes) == tuple(x.sizes)]
        b.add("binary", {"input": [x], "other": [b.random.choice(same)]}, x.sizes, **attributes)
    elif len(x.sizes) >= 3:
        gate = b.add("mean", {"input": [x]}, (*x.sizes[:2], *(1 for _ in x.sizes[2:])),
                     dims=list(range(2, len(x.sizes))), keepdim=True)  # fmt: skip
        b.add("binary", {"input": [x], "other": [gate]}, x.sizes, **attributes)


def _normalize(b: _Builder) -> None:
    x = b.random.choice([value for value in b.values if value.sizes] or [None])  # type: ignore[list-item]
    if x is None or x.sizes[-1] < 2:
        return
    kind = b.random.choice(("softmax", "layer_norm", "batch_norm", "batch_norm"))
    if kind == "softmax":
        dim = b.random.choice((-1, b.random.randrange(len(x.sizes))))
        b.add("softmax", {"input": [x]}, x.sizes, logarithm=b.random.random() < 0.5, dim=dim)
    elif kind == "batch_norm":
        if 2 <= len(x.sizes) <= 5:
            dims = max(1, len(x.sizes) - 2)
            activation = b.random.choice(("relu", "identity"))
            inputs = {"input": [x], **b.norm(x.sizes[1])}
            trains = b.trains and torch.Size(x.sizes).numel() > x.sizes[1] and b.random.random() < 0.6
            if trains:  # by the statistics of the batch
                del inputs["mean"], inputs["variance"]
            settings = {"dims": dims, "trains": trains, "epsilon": 0.1}
            y = b.add("batch_norm", inputs, x.sizes, **settings, activation=activation)
            others = [value for value in b.values if tuple(value.sizes) == tuple(x.sizes) and value is not y]
            if others and b.random.random() < 0.6:  # as in a residual block
                pair = [y, b.random.choice(others)]
                b.random.shuffle(pair)
                y = b.add("binary", {"input": [pair[0]], "other": [pair[1]]}, x.sizes, function="add")
            if b.random.random() < 0.6:
                b.add("activation", {"input": [y]}, x.sizes, activation=b.random.choice(("relu", "hardtanh(-0.5,1.0)")))
    else:
        weight = {"weight": b.weight(x.sizes[-1])} if b.random.random() < 0.5 else {}
        b.add("layer_norm", {"input": [x], **weight}, x.sizes, features=x.sizes[-1], epsilon=0.01)


def _mean(b: _Builder) -> None:
    x = b.random.choice([value for value in b.values if len(value.sizes) >= 2])
    dims = sorted(b.random.sample(range(len(x.sizes)), b.random.randint(1, len(x.sizes))))
    keeps = b.random.random() < 0.5
    sizes = [1 if d in dims else size for d, size in enumerate(x.sizes) if keeps or d not in dims]
    kind = b.random.choice(({}, {"sums": True}, {"correction": 1.0}, {"correction": 0.5}))
    if kind.get("correction") == 1.0 and torch.Size([x.sizes[d] for d in dims]).numel() == 1:
        kind = {}  # torch would divide by 0
    b.add("mean", {"input": [x]}, sizes, dims=dims, keepdim=keeps, **kind)


def _adaptive(b: _Builder) -> None:
    x = b.pick((3, 4, 5))
    if x is not None:
        sizes = [b.random.choice((1, 1, 2, 3)) for _ in x.sizes[2:]]
        b.add("adaptive_avg_pool", {"input": [x]}, (*x.sizes[:2], *sizes), sizes=sizes)


def _view(b: _Builder) -> None:
    x = b.random.choice(b.values)
    rank = len(x.sizes)
    kind = b.random.choice(("flatten", "squeeze", "unsqueeze", "transpose", "contiguous", "select"))
    if not rank or (kind == "unsqueeze" and rank == 5):
        return
    first, second = sorted(b.random.randrange(rank) for _ in range(2))
    given = first - rank if b.random.random() < 0.5 else first
    sizes = list(x.sizes)
    attributes: dict[str, Any] = {"dim": given}
    if kind == "flatten":
        sizes[first : second + 1] = [torch.Size(sizes[first : second + 1]).numel()]
        attributes = {"start_dim": given, "end_dim": second}
    elif kind == "squeeze":
        sizes[first : first + 1] = [size for size in sizes[first : first + 1] if size != 1]
    elif kind == "unsqueeze":
        sizes.insert(first, 1)
        attributes = {"dim": first}
    elif kind == "transpose":
        sizes[first], sizes[second] = sizes[second], sizes[first]
        attributes = {"first": given, "second": second}
    elif kind == "contiguous":
        attributes = {}
    elif not sizes[first]:
        return
    else:
        attributes["index"] = b.random.randint(-sizes[first], sizes[first] - 1)
        del sizes[first]
    b.add(kind, {"input": [x]}, sizes, **attributes)


def _split(b: _Builder) -> None:
    x = b.random.choice(b.values)
    dim = b.random.randrange(len(x.sizes)) if x.sizes else 0
    if not x.sizes or x.sizes[dim] < 2:
        return
    size = x.sizes[dim]
    first = b.random.randint(1, size - 1)
    way: dict[str, Any] = b.random.choice(({"chunks": 2}, {"size": (size + 1) // 2}, {"sizes": [first, size - first]}))
    if size <= 3 and b.random.random() < 0.3:
        way = {"unbind": True}
    parts = torch.empty(x.sizes, device="meta")
    made: Sequence[Tensor]
    if "unbind" in way:
        made = parts.unbind(dim)
    elif "chunks" in way:
        made = parts.chunk(2, dim)
    else:
        made = parts.split(way.get("size") or way["sizes"], dim)
    outputs = [Value(part.shape) for part in made]
    b.lines.append(Line("split", {"input": [x]}, outputs, {"dim": dim, **way}))
    b.values += outputs


def _gate(b: _Builder) -> None:
    """Two parts of a value, each with an activation, are multiplied."""
    x = b.random.choice(b.values)
    dims = [dim for dim, size in enumerate(x.sizes) if size > 1 and size % 2 == 0]
    if not dims:
        return
    dim = 1 if 1 in dims and b.random.random() < 0.7 else b.random.choice(dims)
    half = x.sizes[dim] // 2
    sizes = [*x.sizes[:dim], half, *x.sizes[dim + 1 :]]
    parts = [b.add("slice", {"input": [x]}, sizes, dim=dim, start=i * half, stop=(i + 1) * half) for i in range(2)]
    parts = [b.add("activation", {"input": [part]}, sizes, activation=b.activation()) for part in parts]
    b.add("binary", {"input": [parts[0]], "other": [parts[1]]}, sizes, function="mul")


def _reshape(b: _Builder) -> None:
    x = b.random.choice(b.values)
    if len(x.sizes) < 2:
        return
    at = b.random.randint(0, len(x.sizes) - 2)
    sizes = [*x.sizes[:at], x.sizes[at] * x.sizes[at + 1], *x.sizes[at + 2 :]]
    written: list[Any] = [f"0.{d}" for d in range(at)] + [-1] + list(sizes[at + 1 :])
    b.add("reshape", {"input": [x], "like": [x]}, sizes, sizes=written)


def _permute(b: _Builder) -> None:
    x = b.random.choice(b.values)
    dims = list(range(len(x.sizes)))
    b.random.shuffle(dims)
    if dims:
        b.add("permute", {"input": [x]}, [x.sizes[d] for d in dims], dims=dims)


def _slice(b: _Builder) -> None:
    x = b.random.choice(b.values)
    if not x.sizes:
        return
    dim = b.random.randrange(len(x.sizes))
    size = x.sizes[dim]
    start, stop = sorted((b.random.randint(0, size), b.random.randint(0, size)))
    if start == stop:
        return
    step = b.random.randint(1, 3)
    sizes = [*x.sizes]
    sizes[dim] = len(range(start, stop, step))
    start -= size * (b.random.random() < 0.5)
    b.add("slice", {"input": [x]}, sizes, dim=dim, start=start, stop=stop, step=step)


def _cat(b: _Builder) -> None:
    x = b.random.choice(b.values)
    if not x.sizes:
        return
    dim = b.random.choice((min(1, len(x.sizes) - 1), b.random.randrange(len(x.sizes))))

    def rest(value: Value) -> Any:
        return [size for d, size in enumerate(value.sizes) if d != dim], len(value.sizes)

    parts = (
        [x, *b.random.sample(fitting, min(2, len(fitting)))]
        if (fitting := [v for v in b.values if rest(v) == rest(x)])
        else [x]
    )
    sizes = [*x.sizes]
    sizes[dim] = sum(part.sizes[dim] for part in parts)
    if sizes[dim] < 100:
        b.add("cat", {"inputs": parts}, sizes, dim=dim)


def _pad(b: _Builder) -> None:
    x = b.random.choice(b.values)
    count = b.random.randint(1, min(3, len(x.sizes))) if x.sizes else 0
    padding = [b.random.randint(-1, 2) for _ in range(2 * count)]
    sizes = [*x.sizes]
    for i in range(count):
        sizes[-1 - i] += padding[2 * i] + padding[2 * i + 1]
        # torch refuses to take more away than there is on one side.
        if sizes[-1 - i] < 1 or x.sizes[-1 - i] < 3:
            return
    if count:
        b.add("pad", {"input": [x]}, sizes, padding=padding, value=b.random.uniform(-1, 1))


def _gather(b: _Builder) -> None:
    """Elements in another order, some of them more than once."""
    x = b.pick((2, 3, 4, 5))
    if x is None or min(x.sizes) < 1:
        return
    kinds, rank = ("index_select", "flip", "roll", "border", "channel_shuffle", "windows", "cumsum"), len(x.sizes)
    kind = b.random.choice(kinds)
    dims, sizes = b.random.sample(range(rank), b.random.randint(1, rank)), [*x.sizes]
    if kind == "flip":
        b.add("flip", {"input": [x]}, sizes, dims=[d - rank * b.random.randint(0, 1) for d in dims])
    elif kind == "roll":
        b.add("roll", {"input": [x]}, sizes, shifts=[b.random.randint(-9, 9) for _ in dims], dims=dims)
    elif kind == "cumsum":
        b.add("cumsum", {"input": [x]}, sizes, dim=dims[0] - rank * b.random.randint(0, 1))
    elif kind == "windows":
        size, step = b.random.randint(1, min(3, sizes[dims[0]])), b.random.randint(1, 3)
        sizes[dims[0]] = ((sizes[dims[0]] - size) // step + 1) * size
        b.add("windows", {"input": [x]}, sizes, dim=dims[0] - rank * b.random.randint(0, 1), size=size, step=step)
    elif kind == "channel_shuffle":
        groups = b.random.choice([one for one in range(1, sizes[1] + 1) if sizes[1] % one == 0])
        if rank > 2:
            b.add("channel_shuffle", {"input": [x]}, sizes, groups=groups)
    elif kind == "index_select":
        first = b.random.randrange(rank)
        many, count = b.random.randint(1, min(2, rank - first)), b.random.randint(1, 6)
        index = [b.random.randrange(-size, size) for size in sizes[first : first + many] for _ in range(count)]
        dim = first - rank * b.random.randint(0, 1)
        sizes[first : first + many] = [count]
        b.add("index_select", {"input": [x]}, sizes, dim=dim, dims=many, index=index)
    else:
        # torch pads as many dimensions as images have.
        mode, images = b.random.choice(("reflect", "replicate", "circular")), rank - b.random.choice((1, 2))
        if images < 1 or images > 3:
            return
        padding = []
        for i in range(images):
            size = sizes[-1 - i]
            around = [b.random.randint(0, min(2, size - 1)) for _ in range(2)]
            sizes[-1 - i] += sum(around)
            padding += around
        b.add("border", {"input": [x]}, sizes, padding=padding, mode=mode)


def _repeat(b: _Builder) -> None:
    """A value is expanded or repeated, or there is a constant of its sizes."""
    x = b.random.choice(b.values)
    kind, like = b.random.choice(("expand", "repeat", "full")), {"input": [x], "like": [x]}
    written: list[Any] = [f"0.{dim}" if b.random.random() < 0.5 else size for dim, size in enumerate(x.sizes)]
    if x.sizes and b.random.random() < 0.2:
        power = b.random.choice((1.0, -0.5, -1.0))
        size = b.add("size", {"like": [x]}, (), sizes=[f"0.{b.random.randrange(len(x.sizes))}"], power=power)
        b.add("binary", {"input": [x], "other": [size]}, x.sizes, function="mul")
        return
    if kind == "full":
        attributes: dict[str, Any] = {"sizes": written} if b.random.random() < 0.5 else {}
        b.add("full", {"like": [x]}, x.sizes, value=b.random.uniform(-1, 1), **attributes)
        return
    more = [b.random.randint(1, 3)] if len(x.sizes) < 4 and b.random.random() < 0.5 else []
    if kind == "repeat":
        times = [b.random.choice((1, 1, 2, 3)) for _ in (*more, *x.sizes)]
        sizes = [time * size for time, size in zip(times, (*[1 for _ in more], *x.sizes), strict=True)]
        written = times
    else:
        grown = [b.random.randint(2, 3) if size == 1 else size for size in x.sizes]
        kept = [-1] * len(x.sizes) if b.random.random() < 0.3 else written
        written = [*more, *(k if one == size else one for k, size, one in zip(kept, x.sizes, grown, strict=True))]
        sizes = [*more, *grown]
    if sizes and torch.Size(sizes).numel() < 5000:
        b.add(kind, like, sizes, sizes=written)


def _element(b: _Builder) -> None:
    """Each element by itself: bounds, or a function of a number that it is defined for."""
    x = b.random.choice(b.values)
    if b.random.random() < 0.5:
        least = b.random.uniform(-1, 0.5)
        bounds = b.random.choice(({"min": least}, {"max": least}, {"min": least, "max": least + 1.0}, {"min": 0.0}))
        b.add("clamp", {"input": [x]}, x.sizes, **bounds)
        return
    value = b.add("unary", {"input": [x]}, x.sizes, function="abs")
    # (Where a result jumps, a rounding error would be a fault.)
    function = b.random.choice([one for one in (*UNARY, "root") if one not in ("round", "floor", "ceil")])
    if function != "abs":
        value = b.add("binary", {"input": [value]}, x.sizes, function="add", number=0.5)
        b.add("unary", {"input": [value]}, x.sizes, function=function)


def _prelu(b: _Builder) -> None:
    x = b.random.choice(b.values)
    slopes = b.random.choice((1, x.sizes[1])) if len(x.sizes) > 1 else 1
    b.add("prelu", {"input": [x], "weight": [Value((slopes,), b.tensor(slopes))]}, x.sizes)


def _unflatten(b: _Builder) -> None:
    x = b.random.choice(b.values)
    dims = [dim for dim, size in enumerate(x.sizes) if size % 2 == 0 and size > 0]
    if not dims or len(x.sizes) > 4:
        return
    dim = b.random.choice(dims)
    half = x.sizes[dim] // 2
    sizes = [*x.sizes[:dim], 2, half, *x.sizes[dim + 1 :]]
    b.add("unflatten", {"input": [x]}, sizes, dim=dim, sizes=b.random.choice(([2, half], [-1, half], [2, -1])))


def _attention(b: _Builder) -> None:
    x = b.pick((2, 3, 4))
    if x is None or len(x.sizes) < 2 or min(x.sizes) < 1:
        return
    keys = [value for value in b.values if len(value.sizes) == len(x.sizes)]
    keys = [value for value in keys if [*value.sizes[:-2], value.sizes[-1]] == [*x.sizes[:-2], x.sizes[-1]]]
    key = b.random.choice(keys)
    values = [value for value in b.values if list(value.sizes[:-1]) == list(key.sizes[:-1])]
    value = b.random.choice(values)
    causal, scale = b.random.random() < 0.5, b.random.choice(("", "0.25"))
    inputs = {"query": [x], "key": [key], "value": [value]}
    b.add("attention", inputs, (*x.sizes[:-1], value.sizes[-1]), is_causal=causal, scale=scale)


def _group_norm(b: _Builder) -> None:
    x = b.pick((2, 3, 4, 5))
    if x is None or torch.Size(x.sizes[2:]).numel() < 2:
        return
    channels = x.sizes[1]
    groups = b.random.choice([g for g in (0, 1, 1, 2, 3, channels) if g == 0 or channels % g == 0])
    names = b.random.choice(((), ("weight",), ("weight", "bias")))  # torch's backward fails for a bias alone
    weights = {name: b.weight(channels) for name in names}
    activation = {} if b.trains else {"activation": b.activation()}
    b.add("group_norm", {"input": [x], **weights}, x.sizes, groups=groups, epsilon=0.1, **activation)


def _amax(b: _Builder) -> None:
    x = b.random.choice([value for value in b.values if len(value.sizes) >= 2])
    dims = sorted(b.random.sample(range(len(x.sizes)), b.random.randint(1, len(x.sizes))))
    keeps = b.random.random() < 0.5
    sizes = [1 if d in dims else size for d, size in enumerate(x.sizes) if keeps or d not in dims]
    ties = {"ties": "first"} if len(dims) == 1 and b.random.random() < 0.5 else {}
    b.add("amax", {"input": [x]}, sizes, dims=dims, keepdim=keeps, **ties)


def _matmul(b: _Builder) -> None:
    x = b.pick((2, 3, 4))
    if x is None:
        return
    if b.random.random() < 0.5:
        turned = b.add("transpose", {"input": [x]}, (*x.sizes[:-2], x.sizes[-1], x.sizes[-2]), first=-2, second=-1)
        product = b.add("matmul", {"input": [x], "other": [turned]}, (*x.sizes[:-1], x.sizes[-2]))
        b.add("binary", {"input": [product]}, product.sizes, function="mul", number=0.2)
    else:
        out = b.random.choice((1, 3, 8))
        b.add("matmul", {"input": [x], "other": b.weight(x.sizes[-1], out)}, (*x.sizes[:-1], out))


def _where(b: _Builder) -> None:
    """A choice by an input that is compared, or by a weight of zeros and ones: no rounding changes either."""
    x = b.random.choice(b.values)
    given, _ = b.inputs[0]
    if tuple(given.sizes) == tuple(x.sizes) and b.random.random() < 0.7:
        function = b.random.choice(COMPARISONS)
        condition = b.add("binary", {"input": [given]}, x.sizes, function=function, number=b.random.uniform(-1, 1))
    else:
        sizes = [size if b.random.random() < 0.5 else 1 for size in x.sizes][b.random.randint(0, len(x.sizes)) :]
        condition = Value(sizes, (b.tensor(*sizes) > 0).double())
    same = [value for value in b.values if tuple(value.sizes) == tuple(x.sizes)]
    ways = ({"input": [x]}, {"other": [x]}, {"input": [x], "other": [b.random.choice(same)]})
    b.add("where", {"condition": [condition], **b.random.choice(ways)}, x.sizes, number=b.random.uniform(-1, 1))


_LAYERS: dict[str, tuple[int, Callable[[_Builder], None]]] = {  # how often, and how
    "conv": (6, _conv),
    "conv_transpose": (1, _conv_transpose),
    "pool": (2, _pool),
    "upsample": (1, _upsample),
    "linear": (4, _linear),
    "rnn": (2, _rnn),
    "activation": (1, _activation),
    "binary": (4, _binary),
    "normalize": (2, _normalize),
    "mean": (1, _mean),
    "adaptive": (1, _adaptive),
    "reshape": (2, _reshape),
    "view": (2, _view),
    "repeat": (1, _repeat),
    "element": (1, _element),
    "group_norm": (1, _group_norm),
    "amax": (1, _amax),
    "matmul": (1, _matmul),
    "attention": (1, _attention),
    "prelu": (1, _prelu),
    "unflatten": (1, _unflatten),
    "split": (1, _split),
    "gate": (1, _gate),
    "permute": (1, _permute),
    "slice": (1, _slice),
    "cat": (2, _cat),
    "pad": (1, _pad),
    "gather": (2, _gather),
    "where": (1, _where),
}


def random_network(seed: int, trains: bool = False) -> RandomNetwork:
    """A network of some ten layers, its weights and inputs. trains: only of what layers in training have, too."""
    b = _Builder(seed, trains)
    rank = b.random.choice((2, 3, 3, 4, 4, 4, 4, 5))
    batch = b.random.choice((1, 1, 2, 3, 8, 17))
    most = {2: 0, 3: 24, 4: 16, 5: 7}[rank]
    image = [b.random.randint(3, most) for _ in range(rank - 2)]
    channels = b.random.choice((1, 3, 8, 16, 20, 33))
    for _ in range(b.random.choice((1, 1, 2))):
        while batch * channels * torch.Size(image).numel() > 20_000:
            batch, channels = max(1, batch // 2), max(1, channels - 1)
        value = Value((batch, channels, *image))
        b.inputs.append((value, b.tensor(*value.sizes)))
        b.values.append(value)
    kinds, weights = list(_LAYERS.values()), [often for often, _ in _LAYERS.values()]
    for _ in range(b.random.randint(4, 18)):
        (kind,) = b.random.choices(kinds, weights)
        kind[1](b)
        b.values = [one for one in b.values if torch.Size(one.sizes).numel() < 40_000]
    taken = {value for line in b.lines for value in line.taken()}
    made = [value for line in b.lines for value in line.outputs]
    if not made:
        return random_network(seed + 10**6, trains)
    outputs = [value for value in made if value not in taken] or [made[-1]]
    outputs.append(b.random.choice(made))
    given = [(value, ",".join(b.random.choice((str(size), ":")) for size in value.sizes)) for value, _ in b.inputs]
    text, tensors = write(given, b.lines, outputs)
    rewritten = write(given, rewrite_unpacked(b.lines, outputs, True), outputs)
    return RandomNetwork(text, tensors, [tensor for _, tensor in b.inputs], rewritten)


def trainable_network(seed: int) -> RandomNetwork:
    """The same, of layers that a training step has: activations and addends are lines of their own."""
    net = random_network(seed, trains=True)
    lines: list[str] = []
    values: dict[str, str] = {}
    for line in net.text.split("\n"):
        words = line.split(" ")
        layer, rest = words[0], [word for word in words[1:] if not word.startswith(("activation=", "addend="))]
        activation = next((word.partition("=")[2] for word in words if word.startswith("activation=")), "identity")
        pools = any(word.startswith("pool") for word in words)
        if layer == "conv" and pools and activation == "identity":
            activation = "relu"
        given = next((word.partition("=")[2] for word in words if word.startswith("addend=")), None)
        rest = [_renamed(word, values) for word in rest]
        after = []
        if layer in ("conv", "conv_transpose", "binary", "batch_norm") and (activation != "relu" or given):
            name = rest[rest.index("->") + 1]
            if given:
                after.append(f"binary input={name} other={values.get(given, given)} -> {name}a function=add")
                values[name] = name = f"{name}a"
            if activation != "identity":
                after.append(f"activation input={name} -> {name}b activation={activation}")
                values[name.removesuffix("a")] = f"{name}b"
        elif activation != "identity" or layer == "activation":
            if layer in ("conv_transpose", "binary"):
                name = rest[rest.index("->") + 1]
                after.append(f"activation input={name} -> {name}b activation={activation}")
                values[name] = f"{name}b"
            else:
                rest.append(f"activation={activation}")
        lines += [" ".join([layer, *rest]), *after]
    kept = [line for line in lines if not _has_no_gradient(line)]
    if len(kept) != len(lines):  # what takes its result would be without a value
        return trainable_network(seed + 10**7)
    return RandomNetwork("\n".join(lines), net.weights, net.inputs, net.rewritten)


def _renamed(word: str, values: dict[str, str]) -> str:
    """An input's values under the names that they have now."""
    name, equals, given = word.partition("=")
    if not equals or name in ("sizes", "dims", "padding", "kernel", "stride"):
        return word
    return name + equals + ",".join(values.get(one, one) for one in given.split(","))


def _has_no_gradient(line: str) -> bool:
    if ("function=maximum" in line or "function=minimum" in line) and " other=" not in line:
        return True
    if " trains=0" in line:
        return True
    if line.startswith("pad ") and "=-" in line.replace(",-", "=-"):
        return True
    if line.startswith("rnn ") and "last=1" in line and "bidirectional=1" in line:
        return True
    return line.startswith("max_pool ") and "padding" in line and "dilation" in line


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def check(seed: int) -> None:
    """The operator's results are the reference's in float64, with packed weights and without, with some inputs channels
    last, and rewritten for parameters that may change. The instruction set, the dtype, the number of threads and the
    inputs that are channels last follow from the seed."""
    net = random_network(seed)
    expected = network(net.inputs, net.weights, net.text)
    text, parameters = net.rewritten
    for one, wanted in zip(network(net.inputs, parameters, text), expected, strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-9, atol=1e-9, equal_nan=True, msg=text)
    isas = _C.supported_instruction_sets()
    dtype = torch.float64 if seed % 4 == 3 else torch.float32
    weights = torch.cat([weight.reshape(-1) for weight in net.weights] or [torch.empty(0)]).to(dtype)
    inputs = [tensor.to(dtype) for tensor in net.inputs]
    before = _C.instruction_set()
    _C.use_instruction_set(isas[seed % len(isas)])
    try:
        sizes = [size for tensor in inputs for size in tensor.shape]
        packed = torch.ops.fastnn.pack_network(weights, net.text, sizes)
        last = [number for number, one in enumerate(inputs) if one.dim() > 2 and (seed + number) % 3]
        packed_for_last = torch.ops.fastnn.pack_network(weights, net.text, sizes, last)
        others = [_channels_last(one) if number in last else one for number, one in enumerate(inputs)]
        with using_threads(1 + seed % 2):
            results = [
                torch.ops.fastnn.network(some, weights, weights_packed, net.text)
                for some in ((inputs, others) if last else (inputs,))
                for weights_packed in (packed, packed_for_last, packed[:0])
            ]
            if parameters:
                own = [tensor.to(dtype) for tensor in parameters]
                results.append(torch.ops.fastnn.network_of_parameters(others, own, text))
    finally:
        _C.use_instruction_set(before)
    for *found, wanted in zip(*results, expected, strict=True):
        scale = max(float(wanted.abs().max()), 0.1) if wanted.numel() else 1.0
        limits = {"rtol": 0.0, "atol": (2e-4 if dtype == torch.float32 else 1e-10) * scale, "equal_nan": True}
        for one in found:
            torch.testing.assert_close(one.double(), wanted, **limits, msg=f"{net.text}\n{text}")


def check_training(seed: int) -> None:
    """The gradients of a random program are those of autograd through the reference in float64."""
    net = trainable_network(seed)
    weights = [tensor.clone().requires_grad_() for tensor in net.weights]
    given_inputs = [tensor.clone().requires_grad_() for tensor in net.inputs]
    leaves = [*given_inputs, *weights]
    expected = network(given_inputs, weights, net.text)
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(one.shape, generator=generator, dtype=torch.float64) for one in expected]
    depend = [(one, gradient) for one, gradient in zip(expected, gradients, strict=True) if one.requires_grad]
    of_leaves: Sequence[Tensor | None] = [None] * len(leaves)
    if depend:
        some, of_some = zip(*depend, strict=True)
        of_leaves = torch.autograd.grad(some, leaves, of_some, allow_unused=True)
    wanted = of_leaves[len(given_inputs) :]
    layout = [number for gradient in wanted for number in (-1 if gradient is None else 0, 0)]
    numbers = torch.tensor([0.0, 1, 0, 0, 0, -1, 0.0, *[0] * 5], dtype=torch.float64)  # SGD with a rate of 0
    for dtype, limit in ((torch.float64, 1e-9), (torch.float32, 2e-3)):
        own = [tensor.to(dtype) for tensor in net.weights]
        inputs = [tensor.to(dtype) for tensor in net.inputs]
        with using_threads(1 + seed % 2):
            outputs, kept = torch.ops.fastnn.network_with_pass(inputs, own, net.text)
            given = [gradient.to(dtype) for gradient in gradients]
            both = torch.ops.fastnn.network_backward(given, kept, inputs, own, range(len(leaves)), False)
            found = torch.ops.fastnn.training_step_backward(given, kept, own, [], layout, numbers, True)
        pairs = [(one, other.detach()) for one, other in zip(outputs, expected, strict=True)]
        pairs += [(one, other) for one, other in zip(found, wanted, strict=True) if other is not None]
        for one, other in zip(both, of_leaves, strict=True):
            assert other is not None or not one.numel() or not bool(one.any()), net.text
            pairs += [] if other is None else [(one, other)]
        for one, other in pairs:
            scale = max(float(other.abs().max()), 0.1) if other.numel() else 1.0
            limits = {"rtol": 0.0, "atol": limit * scale, "equal_nan": True}
            torch.testing.assert_close(one.double(), other, **limits, msg=lambda words: f"{words}\n{net.text}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tests/random_networks.py", description=__doc__)
    parser.add_argument("--first", type=int, default=300, help="the first seed (default: %(default)s)")
    parser.add_argument("--count", type=int, default=5000, help="how many networks (default: %(default)s)")
    given = parser.parse_args()
    failed = []
    for seed in range(given.first, given.first + given.count):
        try:
            check(seed)
            check_training(seed)
        except (AssertionError, RuntimeError, IndexError, ValueError) as error:
            failed.append(seed)
            print(f"seed {seed}: {error}", flush=True)
        if (seed + 1 - given.first) % 500 == 0:
            print(f"{seed + 1 - given.first} of {given.count}, {len(failed)} failed", flush=True)
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
