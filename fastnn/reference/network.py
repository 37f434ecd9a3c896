"""What a network's program computes, layer by layer in plain PyTorch: the specification of csrc/network.

It also says what sizes a program's outputs have, for the operator's fake kernel, which runs it on fake tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnn.activations import parse_one
from fastnn.network_program import TextLine, read
from fastnn.reference.rnn import rnn


def network(
    inputs: Sequence[Tensor], weights: Sequence[Tensor] | Tensor, program: str, layers: Mapping[str, Any] | None = None
) -> list[Tensor]:
    """The outputs of the program for these inputs.

    Args:
        inputs: as the program's lines of inputs have them.
        weights: in the order of the program, or one tensor with all of them, one behind the other.
        program: the text, as csrc/network/program.h describes it.
        layers: what computes layers of some names in another way than :data:`LAYERS` has them.
    """
    known = {**LAYERS, **(layers or {})}
    values: dict[str, Tensor] = {}
    next_input, next_weight, used = 0, 0, 0
    tensors = [*inputs, *([weights] if isinstance(weights, Tensor) else weights)]
    dtype = next((one.dtype for one in tensors if one.is_floating_point()), torch.float32)
    for line in read(program):
        if line.layer == "input":
            values[line.outputs[0]] = inputs[next_input]
            next_input += 1
        elif line.layer == "weight":
            sizes = [int(size) for size in line.attributes.get("sizes", "").split(",") if size]
            if isinstance(weights, Tensor):
                values[line.outputs[0]] = weights[used : used + prod(sizes)].reshape(sizes)
                used += prod(sizes)
            else:
                values[line.outputs[0]] = weights[next_weight]
                next_weight += 1
        elif line.layer == "output":
            return [values[name] for name in line.inputs["input"]]
        else:
            taken = {name: [values[one] for one in names] for name, names in line.inputs.items()}
            results = [result.to(dtype) for result in known[line.layer](line, taken)]
            values.update(zip(line.outputs, results, strict=False))
    raise ValueError("the program has no outputs")


Taken = dict[str, list[Tensor]]


def _one(taken: Taken, name: str) -> Any:
    return taken[name][0] if name in taken else None


def _each(numbers: Sequence[int], dims: int) -> list[int]:
    return [*numbers] * dims if len(numbers) == 1 else [*numbers]


def _conv(line: TextLine, taken: Taken) -> list[Tensor]:
    weight = _one(taken, "weight")
    dims = weight.dim() - 2
    stride, padding, dilation, pool = (_each(line[name], dims) for name in ("stride", "padding", "dilation", "pool"))
    x = _one(taken, "input")
    if line["padding_end"]:
        ends = zip(padding, _each(line["padding_end"], dims), strict=True)
        x, padding = F.pad(x, [one for pair in reversed(list(ends)) for one in pair]), [0] * dims
    y = getattr(F, f"conv{dims}d")(x, weight, _one(taken, "bias"), stride, padding, dilation, line["groups"])
    for dim, crop in enumerate(_each(line["crop"] or [0], dims), start=2):
        y = y.narrow(dim, 0, max(0, y.shape[dim] - crop))
    if "addend" in taken:
        y = y + _one(taken, "addend")
    y = parse_one(line["activation"])(y)
    pool_stride = _each(line["pool_stride"] or pool, dims)
    if all(one == 1 for one in (*pool, *pool_stride)):
        return [y]
    pool_padding, pool_dilation = (_each(line[name], dims) for name in ("pool_padding", "pool_dilation"))
    max_pool = getattr(F, f"max_pool{dims}d")
    return [max_pool(y, pool, pool_stride, pool_padding, pool_dilation, ceil_mode=line["ceil_mode"])]


def _conv_transpose(line: TextLine, taken: Taken) -> list[Tensor]:
    weight = _one(taken, "weight")
    dims = weight.dim() - 2
    settings = [_each(line[name], dims) for name in ("stride", "padding", "output_padding")]
    function = getattr(F, f"conv_transpose{dims}d")
    dilation = _each(line["dilation"], dims)
    y = function(_one(taken, "input"), weight, _one(taken, "bias"), *settings, line["groups"], dilation)
    return [parse_one(line["activation"])(y)]


def _max_pool(line: TextLine, taken: Taken) -> list[Tensor]:
    kernel = line["kernel"]
    stride, padding, dilation = (_each(line[name], len(kernel)) for name in ("stride", "padding", "dilation"))
    pool = getattr(F, f"max_pool{len(kernel)}d")
    return [pool(_one(taken, "input"), kernel, stride or kernel, padding, dilation, ceil_mode=line["ceil_mode"])]


def _avg_pool(line: TextLine, taken: Taken) -> list[Tensor]:
    kernel = line["kernel"]
    stride, padding = line["stride"] or kernel, _each(line["padding"], len(kernel))
    pool = getattr(F, f"avg_pool{len(kernel)}d")
    return [
        pool(
            _one(taken, "input"), kernel, stride, padding, ceil_mode=False, count_include_pad=line["count_include_pad"]
        )
    ]


def _upsample(line: TextLine, taken: Taken) -> list[Tensor]:
    x = _one(taken, "input")
    size = _sizes(line, taken)
    if line["factors"]:
        factors = _each(line["factors"], x.dim() - 2)
        size = [s * f for s, f in zip(x.shape[2:], factors, strict=True)]
    if not line["linear"]:
        return [F.interpolate(x, size)]
    mode = "linear" if len(size) == 1 else "bilinear"
    return [F.interpolate(x, size, mode=mode, align_corners=line["align_corners"])]


def _linear(line: TextLine, taken: Taken) -> list[Tensor]:
    y = F.linear(_one(taken, "input"), _one(taken, "weight"), _one(taken, "bias"))
    return [parse_one(line["activation"])(y)]


def layers_of_rnn(line: TextLine, taken: Taken) -> int:
    each = 2 + 2 * line["bias"] + line["projected"]
    return len(taken["weights"]) // (each * (2 if line["bidirectional"] else 1))


def rnn_layer(line: TextLine, taken: Taken, masks: Tensor | None = None) -> list[Tensor]:
    """masks: what dropout multiplies each layer's output by, as :func:`fastnn.reference.rnn` takes it."""
    (x,), batch_dim = taken["input"], int(not line["batch_first"])
    state = [taken[name][0] for name in ("h", "c") if name in taken]
    is_one = x.dim() == 2  # a sequence by itself, without a batch
    if is_one:
        x, state = x.unsqueeze(batch_dim), [one.unsqueeze(1) for one in state]
    layers, both = layers_of_rnn(line, taken), line["bidirectional"]
    y, states = rnn(x, None, state, taken["weights"], masks, line["mode"], layers, both, line["batch_first"])
    if line["last"]:
        y, batch_dim = y[:, -1] if line["batch_first"] else y[-1], 0
    if is_one:
        y, states = y.squeeze(batch_dim), tuple(one.squeeze(1) for one in states)
    return [y, *states]


def _binary(line: TextLine, taken: Taken) -> list[Tensor]:
    x: Any = _one(taken, "input")
    other: Any = _one(taken, "other") if "other" in taken else torch.full_like(x, line["number"])
    x, other = parse_one(line["input_activation"])(x), parse_one(line["other_activation"])(other)
    first, second = (other, x) if line["reverses"] else (x, other)
    result = getattr(torch, line["function"])(first, second)
    if line["in_place"] and result.shape != x.shape:
        raise RuntimeError(f"output with shape {[*x.shape]} doesn't match the broadcast shape {[*result.shape]}")
    return [parse_one(line["activation"])(result)]


def _where(line: TextLine, taken: Taken) -> list[Tensor]:
    first, second = (_one(taken, name) if name in taken else line["number"] for name in ("input", "other"))
    return [torch.where(_one(taken, "condition") != 0, first, second)]


def _softmax(line: TextLine, taken: Taken) -> list[Tensor]:
    return [(F.log_softmax if line["logarithm"] else F.softmax)(_one(taken, "input"), line["dim"])]


def _layer_norm(line: TextLine, taken: Taken) -> list[Tensor]:
    x, dims = _one(taken, "input"), 1
    while prod(x.shape[x.dim() - dims :]) != line["features"]:
        dims += 1
    sizes = x.shape[x.dim() - dims :]
    weight, bias = (one if one is None else one.reshape(sizes) for one in (_one(taken, "weight"), _one(taken, "bias")))
    return [F.layer_norm(x, sizes, weight, bias, line["epsilon"])]


def attention_layer(line: TextLine, taken: Taken, scales: Tensor | None = None) -> list[Tensor]:
    """scales: what dropout multiplies the weights of the keys by."""
    query, key, value = (_one(taken, name) for name in ("query", "key", "value"))
    scale = float(line["scale"]) if line["scale"] else query.size(-1) ** -0.5
    scores = query @ key.transpose(-2, -1) * scale
    if line["is_causal"]:
        scores = scores + torch.full_like(scores, -torch.inf).triu(1)
    weights = scores.softmax(-1)
    if "mask" in taken:
        scores = scores + _one(taken, "mask")
        sees_none = scores.amax(-1, keepdim=True) == -torch.inf
        weights = torch.where(sees_none, 0.0, scores.masked_fill(sees_none, 0.0).softmax(-1))
    return [(weights if scales is None else weights * scales) @ value]


def _group_norm(line: TextLine, taken: Taken) -> list[Tensor]:
    x = _one(taken, "input")
    groups = line["groups"] or x.shape[1]
    y = F.group_norm(x, groups, _one(taken, "weight"), _one(taken, "bias"), line["epsilon"])
    return [parse_one(line["activation"])(y)]


def _amax(line: TextLine, taken: Taken) -> list[Tensor]:
    x = _one(taken, "input")
    if line["ties"] == "first":
        return [x.max(line["dims"][0], line["keepdim"])[0]]
    return [x.amax(line["dims"], line["keepdim"])]


def _mean(line: TextLine, taken: Taken) -> list[Tensor]:
    x = _one(taken, "input")
    dims = line["dims"] or list(range(x.dim()))
    if not line["sums"] and line["correction"]:
        count = prod(x.shape[d] for d in dims)
        return [x.sum(dims, line["keepdim"]) / max(0.0, count - line["correction"])]
    return [(torch.sum if line["sums"] else torch.mean)(x, dims, line["keepdim"])]


def _unary(line: TextLine, taken: Taken) -> list[Tensor]:
    x = _one(taken, "input")
    if line["function"] == "root":
        return [torch.where(x == 0, x, torch.where(x == 0, 1.0, x).sqrt())]
    return [getattr(torch, line["function"])(x)]


def _embedding(line: TextLine, taken: Taken) -> list[Tensor]:
    numbers = _one(taken, "input")
    if line["selects"]:
        numbers = numbers.select(line["dim"], line["index"])
    padding = line["padding_idx"]
    return [F.embedding(numbers, _one(taken, "weight"), None if padding < 0 else padding)]


def _pick(line: TextLine, taken: Taken) -> list[Tensor]:
    x, places = _one(taken, "input"), _one(taken, "places")
    return [x[taken["rows"][0] if "rows" in taken else torch.arange(len(places)), places]]


def _reshape(line: TextLine, taken: Taken) -> list[Tensor]:
    return [_one(taken, "input").reshape(_sizes(line, taken))]


def _expand(line: TextLine, taken: Taken) -> list[Tensor]:
    return [_one(taken, "input").expand(_sizes(line, taken))]


def _full(line: TextLine, taken: Taken) -> list[Tensor]:
    return [torch.full(_sizes(line, taken), line["value"], dtype=torch.float64)]


def _matmul(line: TextLine, taken: Taken) -> list[Tensor]:
    other = _one(taken, "other")
    return [_one(taken, "input") @ (other.mT if line["turns_other"] else other)]


def _noise(line: TextLine, taken: Taken) -> list[Tensor]:
    sizes = _sizes(line, taken)
    kept = len(sizes) if line["keeps"] < 0 else line["keeps"]
    noise = torch.empty([*sizes[:kept], *[1] * (len(sizes) - kept)], dtype=torch.float64)
    if line["distribution"] == "bernoulli":
        return [noise.bernoulli_(line["p"])]
    return [noise.uniform_() if line["distribution"] == "uniform" else noise.normal_()]


def _windows(line: TextLine, taken: Taken) -> list[Tensor]:
    windows = _one(taken, "input").unfold(line["dim"], line["size"], line["step"])
    dim = line["dim"] % (windows.dim() - 1)
    return [windows.movedim(-1, dim + 1).flatten(dim, dim + 1)]


def _sizes(line: TextLine, taken: Taken) -> list[int]:
    """The sizes that a line asks for: numbers, or products of dimensions of the values `like`; without sizes, those of
    the one value `like`."""
    if not line["sizes"] and len(taken.get("like", ())) == 1:
        return list(taken["like"][0].shape)
    sizes = []
    for size in line["sizes"]:
        if isinstance(size, str):
            factors, _, divisor = size.partition("/")
            size = 1
            for factor in factors.split("*"):
                which, dotted, dim = factor.partition(".")
                size *= taken["like"][int(which)].shape[int(dim)] if dotted else int(factor)
            size //= int(divisor or 1)
        sizes.append(size)
    return sizes


def _slice(line: TextLine, taken: Taken) -> list[Tensor]:
    x, dim = _one(taken, "input"), line["dim"]
    stop = _sizes(line, taken)[0] if line["sizes"] else line["stop"]
    return [torch.ops.aten.slice.Tensor(x, dim, line["start"], stop, line["step"])]


def _batch_norm(line: TextLine, taken: Taken) -> list[Tensor]:
    """With the statistics of the batch; those that run stay as they are."""
    x = _one(taken, "input")
    running = () if line["trains"] else (_one(taken, "mean"), _one(taken, "variance"))
    mean, variance = running or (None, None)
    weight, bias = _one(taken, "weight"), _one(taken, "bias")
    y = F.batch_norm(x, mean, variance, weight, bias, line["trains"], 0.0, line["epsilon"])
    y, dims = parse_one(line["activation"])(y), x.dim() - 2
    pool, stride, padding, dilation = (
        _each(line[name], dims) for name in ("pool", "pool_stride", "pool_padding", "pool_dilation")
    )
    stride = stride or pool
    if all(one == 1 for one in (*pool, *stride)):
        return [y]
    return [getattr(F, f"max_pool{dims}d")(y, pool, stride, padding, dilation, ceil_mode=line["ceil_mode"])]


def _split(line: TextLine, taken: Taken) -> list[Tensor]:
    x, dim = _one(taken, "input"), line["dim"]
    if line["unbind"]:
        return list(x.unbind(dim))
    if line["chunks"]:
        return list(x.chunk(line["chunks"], dim))
    return list(x.split(line["size"] or line["sizes"], dim))


def _adaptive_avg_pool(line: TextLine, taken: Taken) -> list[Tensor]:
    sizes = line["sizes"]
    return [getattr(F, f"adaptive_avg_pool{len(sizes)}d")(_one(taken, "input"), sizes)]


def _fold(line: TextLine, taken: Taken) -> list[Tensor]:
    """A convolution's weight and bias with the batch norm behind it."""
    weight, bias, mean = _one(taken, "conv_weight"), _one(taken, "conv_bias"), _one(taken, "mean")
    scale = torch.rsqrt(_one(taken, "variance") + line["epsilon"])
    if "weight" in taken:
        scale = scale * _one(taken, "weight")
    shift = (-mean if bias is None else bias - mean) * scale
    if "bias" in taken:
        shift = shift + _one(taken, "bias")
    ones = (1,) * (weight.dim() - 2)
    if not line["transposed"]:
        return [weight * scale.reshape(-1, 1, *ones), shift]
    of_groups = weight.reshape(line["groups"], -1, *weight.shape[1:]) * scale.reshape(line["groups"], 1, -1, *ones)
    return [of_groups.reshape(weight.shape), shift]


def _index_select(line: TextLine, taken: Taken) -> list[Tensor]:
    x, count = _one(taken, "input"), len(line["index"]) // line["dims"]
    chosen = torch.tensor(line["index"]).unflatten(0, (line["dims"], count)).unbind()
    return [x[(*[slice(None)] * (line["dim"] % x.dim()), *chosen)]]


def _squeeze(line: TextLine, taken: Taken) -> list[Tensor]:
    x = _one(taken, "input")
    return [x.squeeze() if line["every"] else x.squeeze(line["dim"])]


# A dropout drops nothing here.
LAYERS: dict[str, Callable[[TextLine, Taken], list[Tensor]]] = {
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "fold": _fold,
    "batch_norm": _batch_norm,
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "adaptive_avg_pool": _adaptive_avg_pool,
    "upsample": _upsample,
    "linear": _linear,
    "matmul": _matmul,
    "attention": attention_layer,
    "rnn": rnn_layer,
    "embedding": _embedding,
    "pick": _pick,
    "activation": lambda line, taken: [parse_one(line["activation"])(_one(taken, "input"))],
    "clamp": lambda line, taken: [_one(taken, "input").clamp(line["min"], line["max"])],
    "prelu": lambda line, taken: [F.prelu(_one(taken, "input"), _one(taken, "weight").flatten())],
    "unary": _unary,
    "binary": _binary,
    "where": _where,
    "lerp": lambda line, taken: [torch.lerp(*(_one(taken, name) for name in ("input", "other", "amount")))],
    "binary_cross_entropy": lambda line, taken: [
        F.binary_cross_entropy(_one(taken, "input"), _one(taken, "target"), reduction="none")
    ],
    "cast": lambda line, taken: [_one(taken, "input") * 1.0],
    "dropout": lambda line, taken: [_one(taken, "input") * 1.0],
    "noise": _noise,
    "softmax": _softmax,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "mean": _mean,
    "amax": _amax,
    "reshape": _reshape,
    "expand": _expand,
    "repeat": lambda line, taken: [_one(taken, "input").repeat(_sizes(line, taken))],
    "full": _full,
    "gather_rows": lambda line, taken: [_one(taken, "input")[_one(taken, "places")]],
    "add_rows": lambda line, taken: [_one(taken, "input").index_add(0, _one(taken, "places"), _one(taken, "source"))],
    "size": lambda line, taken: [torch.tensor(float(_sizes(line, taken)[0]) ** line["power"], dtype=torch.float64)],
    "flatten": lambda line, taken: [_one(taken, "input").flatten(line["start_dim"], line["end_dim"])],
    "unflatten": lambda line, taken: [_one(taken, "input").unflatten(line["dim"], line["sizes"])],
    "squeeze": _squeeze,
    "unsqueeze": lambda line, taken: [_one(taken, "input").unsqueeze(line["dim"])],
    "transpose": lambda line, taken: [_one(taken, "input").transpose(line["first"], line["second"])],
    "contiguous": lambda line, taken: [_one(taken, "input").contiguous()],
    "detach": lambda line, taken: [_one(taken, "input").detach()],
    "check_sizes": lambda line, taken: [_one(taken, "input")],
    "select": lambda line, taken: [_one(taken, "input").select(line["dim"], line["index"])],
    "permute": lambda line, taken: [_one(taken, "input").permute(line["dims"])],
    "slice": _slice,
    "split": _split,
    "cat": lambda line, taken: [torch.cat(taken["inputs"], line["dim"])],
    "pad": lambda line, taken: [F.pad(_one(taken, "input"), line["padding"], value=line["value"])],
    "index_select": _index_select,
    "windows": _windows,
    "cumsum": lambda line, taken: [_one(taken, "input").cumsum(line["dim"])],
    "flip": lambda line, taken: [_one(taken, "input").flip(line["dims"])],
    "roll": lambda line, taken: [_one(taken, "input").roll(line["shifts"], line["dims"])],
    "channel_shuffle": lambda line, taken: [F.channel_shuffle(_one(taken, "input"), line["groups"])],
    "border": lambda line, taken: [F.pad(_one(taken, "input"), line["padding"], line["mode"])],
}
