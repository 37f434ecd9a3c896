"""Rewrites a program's lines into fewer: what follows a layer becomes part of that layer, where one line can say both.

The lines compute the same before and after, but for the rounding of folded weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from math import inf

import torch
from torch import Tensor

from fastnn.network_program import KINDS, POOL_NAMES, Line, Value

_WEIGHTED = {"conv": 0, "linear": 0, "conv_transpose": 1}  # the dimension of the weight that is the output channels


class _Lines:
    """The lines, and for each value the line that makes it and those that take it."""

    def __init__(self, lines: Sequence[Line], results: Sequence[Value]) -> None:
        self.lines = list(lines)
        self.results = set(results)
        self.uses = Counter(value for line in lines for value in line.taken())
        self.uses.update(results)
        self.maker = {value: line for line in lines for value in line.outputs}

    def before(self, line: Line, name: str = "input") -> Line | None:
        """The line that makes this input, if the input is its only result and no other line takes it."""
        value = line.inputs[name][0]
        maker = self.maker.get(value)
        own_sizes = line.inputs.get("like", []).count(value)  # uses that end when the line is removed
        if maker is None or self.uses[value] - own_sizes != 1 or len(maker.outputs) != 1:
            return None
        return maker

    def merge(self, line: Line, into: Line) -> None:
        """Removes `line`, whose result becomes the result of `into`."""
        into.outputs = line.outputs
        self.maker[line.outputs[0]] = into
        self.lines.remove(line)

    def replace(self, value: Value, by: Value) -> None:
        """Makes all lines take the value `by` in place of `value`."""
        for line in self.lines:
            for values in line.inputs.values():
                values[:] = [by if one is value else one for one in values]
        self.uses[by] += self.uses.pop(value, 0)

    def move_behind(self, line: Line, other: Line) -> None:
        """Moves a line to the place of `other`, where all that both take has been made."""
        self.lines.remove(line)
        self.lines.insert(self.lines.index(other), line)


def rewrite(lines: Sequence[Line], results: Sequence[Value]) -> list[Line]:
    """Rewrites the lines of a frozen model. results: the values that are needed outside."""
    return _apply(_RULES, lines, results)


def rewrite_unpacked(lines: Sequence[Line], results: Sequence[Value], addends: bool) -> list[Line]:
    """Rewrites lines for inference with parameters that may change from call to call: copies of these lines, since a
    training network may have them, too. addends: whether to let convolutions add values, which refuse values of another
    size than the convolution's result."""
    copies = [
        Line(line.layer, {name: list(values) for name, values in line.inputs.items()}, list(line.outputs),
             dict(line.attributes))
        for line in lines
    ]  # fmt: skip
    return _apply(_RULES_UNPACKED if addends else _RULES_WITHOUT_ADDENDS, copies, results)


def _apply(rules: Sequence[_Rule], lines: Sequence[Line], results: Sequence[Value]) -> list[Line]:
    program = _Lines(lines, results)
    for line in list(program.lines):
        for rule in rules:
            if line in program.lines and rule(program, line):
                break
    return _used(program.lines, results)


def _used(lines: Sequence[Line], results: Sequence[Value]) -> list[Line]:
    """Removes the lines whose results nobody takes."""
    needed = set(results)
    kept = []
    for line in reversed(lines):
        if any(value in needed for value in line.outputs):
            needed.update(line.taken())
            kept.append(line)
    return kept[::-1]


# ---- rules: each says whether it has rewritten the line -------------------------------------------------------------


def _drop_contiguous(program: _Lines, line: Line) -> bool:
    """Removes a line that only asks for another order of elements in memory, which is the network's own affair."""
    if line.layer != "contiguous" or line.outputs[0] in program.results:
        return False
    value = line.inputs["input"][0]
    program.lines.remove(line)
    program.uses[value] -= 1
    program.replace(line.outputs[0], value)
    return True


def _drop_copy(program: _Lines, line: Line) -> bool:
    """Removes a reshape to the sizes that its input already has."""
    value = line.inputs["input"][0] if line.layer == "reshape" else None
    if value is None or line.outputs[0] in program.results or line.inputs.get("like") != [value]:
        return False
    if line.attributes["sizes"] != [f"0.{dim}" for dim in range(len(value.sizes))]:
        return False
    program.lines.remove(line)
    program.uses[value] -= 2  # the line took its elements and its sizes
    program.replace(line.outputs[0], value)
    return True


def _fold_arithmetic(program: _Lines, line: Line) -> bool:
    """Folds a factor or an addend for each channel, such as those of a batch norm in eval mode, into the layer's
    weights."""
    if line.layer != "binary" or line.attributes.get("activation", "identity") != "identity":
        return False
    function = line.attributes["function"]
    if function not in ("add", "sub", "mul", "div") or (line.attributes.get("reverses") and function in ("sub", "div")):
        return False
    before = program.before(line)
    if before is None or before.layer not in _WEIGHTED or not _is_plain(before):
        return False
    weight = before.weight("weight")
    assert weight is not None
    dim = _WEIGHTED[before.layer]
    channels = weight.shape[dim] * before.attributes.get("groups", 1) if dim else weight.shape[0]
    number = _of_each_channel(line, before, channels)
    if number is None:
        return False
    bias = before.weight("bias")
    number = number.to(weight)
    if function in ("add", "sub"):
        number = number if function == "add" else -number
        before.set_weight("bias", number.expand(channels).clone() if bias is None else bias + number)
    else:
        factor = number.expand(channels) if function == "mul" else 1 / number.expand(channels)
        if not bool(torch.isfinite(factor).all()):
            return False
        if dim == 0:
            scaled = weight * factor.reshape(-1, *(1,) * (weight.dim() - 1))
        else:  # (in, out / groups, ...), of which each group of inputs has outputs of its own
            groups = before.attributes.get("groups", 1)
            of_groups = factor.reshape(groups, 1, -1, *(1,) * (weight.dim() - 2))
            scaled = (weight.reshape(groups, -1, *weight.shape[1:]) * of_groups).reshape(weight.shape)
        before.set_weight("weight", scaled)
        if bias is not None:
            before.set_weight("bias", bias * factor)
    program.merge(line, before)
    return True


def _of_each_channel(line: Line, layer: Line, channels: int) -> Tensor | None:
    """The second operand, if it is one number, or one number for each of the layer's output channels."""
    if "other" not in line.inputs:
        return torch.tensor(line.attributes["number"], dtype=torch.float64)
    other = line.weight("other")
    if other is None:
        return None
    rank = len(layer.outputs[0].sizes)
    if other.dim() > rank:
        return None
    if other.numel() == 1:
        return other.reshape(())
    sizes = (1,) * (rank - other.dim()) + tuple(other.shape)
    place = rank - 1 if layer.layer == "linear" else 1
    if len(sizes) != rank or sizes[place] != channels or other.numel() != channels:
        return None
    return other.reshape(channels)


def _is_plain(layer: Line) -> bool:
    """Whether the layer ends with its sums, so that what follows may become part of it."""
    attributes = layer.attributes
    return attributes.get("activation", "identity") == "identity" and "addend" not in layer.inputs and not _pools(layer)


def _pools(layer: Line) -> bool:
    return any(size != 1 for name in ("pool", "pool_stride") for size in layer.attributes.get(name, ()))


def _take_padding(program: _Lines, line: Line) -> bool:
    """Lets a convolution pad its input by itself, on one side more than on the other if need be."""
    pad = program.before(line) if line.layer == "conv" else None
    if pad is None or pad.layer != "pad" or pad.attributes["value"] != 0:
        return False
    dims, padding = len(line.attributes["stride"]), list(pad.attributes["padding"])
    if len(padding) > 2 * dims or min(padding, default=0) < 0:
        return False
    padding += [0] * (2 * dims - len(padding))
    own = line.attributes["padding"]
    own_end = line.attributes.get("padding_end", own)
    line.attributes["padding"] = [one + padding[2 * (dims - 1 - d)] for d, one in enumerate(own)]
    line.attributes["padding_end"] = [one + padding[2 * (dims - 1 - d) + 1] for d, one in enumerate(own_end)]
    program.lines.remove(pad)
    line.inputs["input"] = pad.inputs["input"]
    return True


def _crop(program: _Lines, line: Line) -> bool:
    """Lets a convolution leave out the last elements, which the line behind it cuts off, as causal models do."""
    conv = program.before(line) if line.layer == "slice" else None
    if conv is None or conv.layer != "conv" or "addend" in conv.inputs or _pools(conv):
        return False
    dims, stop = len(conv.attributes["stride"]), line.attributes.get("stop", 0)
    dim = line.attributes["dim"] % (dims + 2) - 2
    if dim < 0 or stop >= 0 or line.attributes.get("start", 0) != 0 or line.attributes.get("step", 1) != 1:
        return False
    crop = list(conv.attributes.get("crop", [0] * dims))
    crop[dim] -= stop
    conv.attributes["crop"] = crop
    program.merge(line, conv)
    return True


def _take_activation(program: _Lines, line: Line) -> bool:
    """Makes an activation part of the layer before it."""
    if line.layer == "clamp":
        _as_activation(line)
    if line.layer != "activation":
        return False
    before = program.before(line)
    if before is None or "activation" not in KINDS[before.layer].attributes or before.layer == "activation":
        return False
    if before.attributes.get("activation", "identity") != "identity" or _pools(before):
        return False
    before.attributes["activation"] = line.attributes["activation"]
    program.merge(line, before)
    return True


def _as_activation(line: Line) -> None:
    """Makes a clamp the activation that gives the same. Only their gradients differ, at the bounds."""
    least, most = line.attributes.get("min", -inf), line.attributes.get("max", inf)
    if (least, most) == (0.0, inf):
        line.layer, line.attributes = "activation", {"activation": "relu"}
    elif -inf < least <= most < inf:
        line.layer, line.attributes = "activation", {"activation": f"hardtanh({least!r},{most!r})"}


def _take_addend(program: _Lines, line: Line) -> bool:
    """Makes the addition of a value of the same size part of the convolution that gives the other operand."""
    if line.layer != "binary" or line.attributes["function"] != "add" or "other" not in line.inputs:
        return False
    values = {name: line.inputs[name][0] for name in ("input", "other")}
    if any(value.tensor is not None for value in values.values()):
        return False
    sizes = [tuple(map(str, value.sizes)) for value in values.values()]
    if sizes[0] != sizes[1] or values["input"] is values["other"]:
        return False
    for name, other in (("input", "other"), ("other", "input")):
        before = program.before(line, name)
        if before is None or before.layer != "conv" or not _is_plain(before):
            continue
        before.inputs["addend"] = [values[other]]
        before.attributes["activation"] = line.attributes.get("activation", "identity")
        program.move_behind(before, line)
        program.merge(line, before)
        return True
    return False


def _take_gate(program: _Lines, line: Line) -> bool:
    """Lets a function of two values activate its operands, as a gate does: tanh(x) * sigmoid(y)."""
    if line.layer != "binary" or "other" not in line.inputs:
        return False
    rewritten = False
    for name in ("input", "other"):
        before = program.before(line, name)
        if before is None or before.layer != "activation" or f"{name}_activation" in line.attributes:
            continue
        line.attributes[f"{name}_activation"] = before.attributes["activation"]
        line.inputs[name] = before.inputs["input"]
        program.lines.remove(before)
        rewritten = True
    return rewritten


def _take_pool(program: _Lines, line: Line) -> bool:
    """Makes a max-pool part of the convolution before it, if that has ReLU or no activation."""
    if line.layer != "max_pool":
        return False
    before = program.before(line)
    if before is None or before.layer != "conv" or "addend" in before.inputs or _pools(before):
        return False
    if len(line.attributes["kernel"]) != len(before.attributes["stride"]):  # it pools over other dimensions
        return False
    if before.attributes.get("activation", "identity") not in ("identity", "relu"):
        return False
    before.attributes.update({POOL_NAMES.get(name, name): value for name, value in line.attributes.items()})
    program.merge(line, before)
    return True


def _relu_before_pool(program: _Lines, line: Line) -> bool:
    """Moves ReLU from behind a max-pool to in front of it, where a convolution can take both along. The result is the
    same, unless a window holds nothing but padding: that gives -inf in one order and 0 in the other. torch's sizes
    allow such windows only with `ceil_mode` or a dilation."""
    if line.layer != "activation" or line.attributes["activation"] != "relu":
        return False
    pool = program.before(line)
    if pool is None or pool.layer != "conv" or not _pools(pool):
        return False
    attributes = pool.attributes
    if attributes.get("activation", "identity") != "identity" or attributes.get("ceil_mode"):
        return False
    if any(dilation != 1 for dilation in attributes.get("pool_dilation", ())):
        return False
    attributes["activation"] = "relu"
    program.merge(line, pool)
    return True


def _take_last_step(program: _Lines, line: Line) -> bool:
    """Makes a recurrent layer give only its last step, where nothing else of its output is used. The last step may be
    taken from the output, or, if the layer has one direction, from the final state of its last layer."""
    part = program.before(line) if line.layer == "reshape" else None
    if part is None or part.layer != "slice" or len(line.outputs[0].sizes) != 2:
        return False
    layer = program.maker.get(part.inputs["input"][0])
    if layer is None or layer.layer != "rnn" or layer.attributes.get("last"):
        return False
    attributes = part.attributes
    place = layer.outputs.index(part.inputs["input"][0])
    dim = int(layer.attributes["batch_first"]) if place == 0 else 0
    if (attributes["dim"], attributes["start"], attributes["step"]) != (dim, -1, 1) or attributes["stop"] != 2**63 - 1:
        return False
    sizes = list(part.outputs[0].sizes)
    del sizes[dim]
    if list(map(str, line.outputs[0].sizes)) != list(map(str, sizes)):
        return False
    used = [program.uses[value] for value in layer.outputs]
    if place == 0 and used[0] == 1:
        layer.outputs[0] = line.outputs[0]
    elif place == 1 and used == [0, 1, *[0] * (len(used) - 2)] and not layer.attributes["bidirectional"]:
        layer.outputs = [line.outputs[0]]
    else:
        return False
    layer.attributes["last"] = True
    program.maker[line.outputs[0]] = layer
    program.lines.remove(part)
    program.lines.remove(line)
    return True


def _fold_norm(program: _Lines, line: Line) -> bool:
    """Lets a convolution take over the batch norm behind it, with the ReLU and the max-pool that the norm includes. A
    line in front computes the convolution's weights from the parameters of both."""
    before = program.before(line) if line.layer == "batch_norm" else None
    if before is None or before.layer not in ("conv", "conv_transpose") or not _is_plain(before):
        return False
    transposed = before.layer == "conv_transpose"
    if (transposed and _pools(line)) or line.attributes["dims"] != len(before.attributes["stride"]):
        return False
    norm = {name: values for name, values in line.inputs.items() if name != "input"}
    conv = {f"conv_{name}": before.inputs[name] for name in ("weight", "bias") if name in before.inputs}
    weight, bias = Value(before.inputs["weight"][0].sizes), Value(())
    settings = {"epsilon": line.attributes["epsilon"], "transposed": transposed}
    settings["groups"] = before.attributes.get("groups", 1)
    program.lines.insert(program.lines.index(before), Line("fold", {**conv, **norm}, [weight, bias], settings))
    before.inputs = {**before.inputs, "weight": [weight], "bias": [bias]}
    taken = ("activation",) if transposed else ("activation", "ceil_mode", *POOL_NAMES.values())
    before.attributes.update({name: line.attributes[name] for name in taken if name in line.attributes})
    program.merge(line, before)
    return True


def _split_norm(program: _Lines, line: Line) -> bool:
    """Makes a layer of its own of the max-pool that a batch norm includes."""
    if line.layer != "batch_norm" or not _pools(line):
        return False
    normed = Value(())
    names = {**POOL_NAMES, "ceil_mode": "ceil_mode"}
    settings = {own: line.attributes.pop(name) for own, name in names.items() if name in line.attributes}
    pool = Line("max_pool", {"input": [normed]}, line.outputs, settings)
    line.outputs = [normed]
    program.lines.insert(program.lines.index(line) + 1, pool)
    program.maker[pool.outputs[0]] = pool
    program.maker[normed] = line
    program.uses[normed] = 1
    return True


def _as_mean(program: _Lines, line: Line) -> bool:
    """Makes a mean of an adaptive pool to one pixel."""
    sizes = line.attributes["sizes"] if line.layer == "adaptive_avg_pool" else (0,)
    if any(size != 1 for size in sizes):
        return False
    dims = len(sizes)
    line.layer, line.attributes = "mean", {"dims": list(range(-dims, 0)), "keepdim": True, "rank": dims + 2}
    return True


_Rule = Callable[[_Lines, Line], bool]
_RULES: Sequence[_Rule] = (
    _drop_copy,
    _drop_contiguous,
    _take_padding,
    _crop,
    _fold_arithmetic,
    _take_activation,
    _relu_before_pool,
    _take_addend,
    _take_pool,
    _take_last_step,
    _take_gate,
)
_RULES_WITHOUT_ADDENDS: Sequence[_Rule] = (
    _drop_contiguous,
    _take_padding,
    _crop,
    _fold_norm,
    _split_norm,
    _as_mean,
    _take_activation,
    _relu_before_pool,
    _take_pool,
)
_RULES_UNPACKED: Sequence[_Rule] = (*_RULES_WITHOUT_ADDENDS, _take_addend, _take_gate)
