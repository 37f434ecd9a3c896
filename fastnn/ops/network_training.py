"""A network under autograd: all its layers are one function, forward in one call and backward in another.
(csrc/network/train.cpp)"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastnn._extension import load_extension
from fastnn._torch import backward_may_run_again, direct_call
from fastnn.activations import parse_one
from fastnn.network_program import COMPARISONS, TextLine, read
from fastnn.ops._autograd import check_same_device, eager_recorder, gradients_by_reference
from fastnn.ops._raw_operator import raw_operator
from fastnn.reference.network import Taken, attention_layer, layers_of_rnn, network, rnn_layer

network_with_pass = direct_call(torch.ops.fastnn.network_with_pass.default)
network_backward = direct_call(torch.ops.fastnn.network_backward.default)
network_draws = direct_call(torch.ops.fastnn.network_draws.default)
forget_pass = load_extension().forget_pass
_int64 = torch.int64


@dataclass(frozen=True)
class Needs:
    """What backward needs, where some of the inputs and parameters of a network require a gradient.

    outputs: whether each output depends on one of these. read_again: the places of the inputs and parameters whose
    elements backward reads, so that nobody may change them before. rest: the places of the others.
    """

    outputs: Sequence[bool]
    read_again: Sequence[int]
    rest: Sequence[int]


class TrainedNetwork:
    """A program, and what its function of autograd has to know."""

    records = True  # autograd records its runs

    def __init__(self, text: str) -> None:
        self.text = text
        self.inputs = sum(line.layer == "input" for line in read(text))
        self._needs: dict[tuple[bool, ...], Needs] = {}

    def takes(self, place: int, input: Tensor) -> bool:
        """Whether an input lies as the network reads it: in any way."""
        return True

    def run(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs, with their gradients. tensors: the inputs, then the parameters in the program's order. Callers
        know that the call is plain (:func:`is_plain`) and on the CPU, and that a gradient is wanted.

        Raises RuntimeError where the operators do not take the tensors, or autograd does not take the inputs; then
        nothing has changed but torch's generator.
        """
        for tensor in tensors[: self.inputs]:
            # Autograd refuses such a tensor, too, but only after the operator has changed running statistics.
            if tensor.is_inference():
                raise RuntimeError("inference tensors cannot be saved for backward")
        return _record(self, *tensors)

    def needs(self, requires: tuple[bool, ...]) -> Needs:
        """requires: whether each of the inputs, and then of the parameters, requires a gradient."""
        known = self._needs.get(requires)
        if known is None:
            known = self._needs[requires] = self._find_needs(requires)
        return known

    def _find_needs(self, requires: tuple[bool, ...]) -> Needs:
        given: list[str] = []
        depends: dict[str, bool] = {}  # of each value, whether it depends on what requires a gradient
        again: set[str] = set()
        outputs: Sequence[str] = ()
        reached = _values_with_gradients(self.text)
        lines = list(read(self.text))
        for line in lines:
            if line.layer in ("input", "weight"):
                depends[line.outputs[0]] = requires[len(given)]
                given.append(line.outputs[0])
            elif line.layer == "output":
                outputs = line.inputs["input"]
            else:
                if not reached.isdisjoint(line.outputs):
                    again.update(_read_again(line, depends))
                any_input = any(depends[one] for one in _differentiated(line))
                depends.update(dict.fromkeys(line.outputs, any_input))
        for line in reversed(lines):
            if line.layer in _VIEWS and not again.isdisjoint(line.outputs):
                again.update(line.inputs["input"])
        places: tuple[list[int], list[int]] = ([], [])
        for place, name in enumerate(given):
            places[name not in again].append(place)
        return Needs(tuple(depends[name] for name in outputs), *places)


def _differentiated(line: TextLine) -> list[str]:
    """The inputs of a layer on which its outputs depend in a way that has a derivative."""
    is_comparison = line.layer == "binary" and line["function"] in COMPARISONS
    if is_comparison or line.layer in ("noise", "detach"):
        return []
    return [one for name, some in line.inputs.items() if name != "like" for one in some]


def _values_with_gradients(text: str) -> set[str]:
    """The values of a program on which its outputs depend in a way that has a derivative, and the outputs."""
    found: set[str] = set()
    for line in reversed(list(read(text))):
        if line.layer == "output" or not found.isdisjoint(line.outputs):
            found.update(_differentiated(line))
    return found


def weights_with_gradients(text: str) -> list[bool]:
    """Whether the outputs of a program depend on each of its weights in a way that has a derivative."""
    found = _values_with_gradients(text)
    return [line.outputs[0] in found for line in read(text) if line.layer == "weight"]


# Layers that multiply two of their inputs: the gradient of each is made of the other.
_PRODUCTS = {
    **dict.fromkeys(("conv", "conv_transpose", "linear"), ("input", "weight")),
    **dict.fromkeys(("matmul", "binary"), ("input", "other")),
}
# Other layers whose backward reads inputs, as torch's reads them.
_READ_AGAIN: dict[str, Sequence[str]] = {
    **dict.fromkeys(("max_pool", "avg_pool", "adaptive_avg_pool", "amax", "clamp"), ("input",)),
    **dict.fromkeys(("batch_norm", "layer_norm", "group_norm", "prelu"), ("input", "weight")),
    "attention": ("query", "key", "value", "mask"),
    "where": ("condition",),
    "lerp": ("input", "other", "amount"),
    "binary_cross_entropy": ("input", "target"),
    "rnn": ("input", "h", "c", "weights"),
}

# Layers whose results are, or may be, their input's own memory: a layer that reads such a result again reads the input.
_VIEWS = {
    *("reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "permute", "expand", "contiguous"),
    *("select", "slice", "split", "detach", "check_sizes"),
}


def _is_derived_from_input(line: TextLine) -> bool:
    """Whether the layer is a function whose derivative is computed from its input, and not from its result."""
    if line.layer == "activation":
        return parse_one(line["activation"]).kind.derived_from == "input"
    return line.layer == "unary" and line["function"] in ("abs", "atan", "erf", "log", "log1p")


def _read_again(line: TextLine, depends: Mapping[str, bool]) -> list[str]:
    """The values whose elements the layer's backward reads."""
    if not any(depends[one] for some in line.inputs.values() for one in some):
        return []
    names = _READ_AGAIN.get(line.layer, ())
    if line.layer in _PRODUCTS:
        first, second = (list(line.inputs.get(name, ())) for name in _PRODUCTS[line.layer])
        if line.layer == "binary" and line["function"] in ("div", "maximum", "minimum"):
            names = ("input", "other")
        elif line.layer != "binary" or line["function"] == "mul":
            of_both = ((first, second), (second, first))
            return [one for some, others in of_both for one in some if any(depends[other] for other in others)]
    elif line.layer == "batch_norm" and not line["trains"]:
        names = (*names, "mean", "variance")
    elif _is_derived_from_input(line):
        names = ("input",)
    return [value for name in names for value in line.inputs.get(name, ())]


class _Pass(bytearray):
    """A forward pass in C++ that waits for backward, known by a number. Autograd keeps this object alive by a tensor
    over the number, which is saved for backward; when autograd frees that tensor, the pass is forgotten.

    rest: tensors that may change before backward, each with its version.
    """

    rest: Sequence[tuple[Tensor, int]]

    def __del__(self) -> None:
        forget_pass(int.from_bytes(self, "little"))


class Network(torch.autograd.Function):
    """The function that :meth:`TrainedNetwork.run` records for autograd. (It is always called by ``record``: see
    ``eager_recorder`` in ``_autograd.py``.)"""

    @staticmethod
    def record(ctx: Any, program: TrainedNetwork, *tensors: Tensor) -> Any:
        outputs, number = network_with_pass(tensors[: program.inputs], tensors[program.inputs :], program.text)
        own = _Pass(int(number).to_bytes(8, "little"))
        needs = program.needs(tuple([tensor.requires_grad for tensor in tensors]))
        own.rest = [((rest := tensors[i]), rest._version) for i in needs.rest]
        ctx.program, ctx.needs, ctx.own = program, needs, weakref.ref(own)
        ctx.save_for_backward(torch.frombuffer(own, dtype=_int64), *[tensors[i] for i in needs.read_again])
        ctx.set_materialize_grads(False)
        if False in needs.outputs:
            ctx.mark_non_differentiable(*[out for out, does in zip(outputs, needs.outputs, strict=True) if not does])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        program, needs = ctx.program, ctx.needs
        number, *saved = ctx.saved_tensors
        rest = ctx.own().rest
        tensors: list[Any] = [None] * (len(saved) + len(rest))
        for i, tensor in zip(needs.read_again, saved, strict=True):
            tensors[i] = tensor
        for i, (tensor, _) in zip(needs.rest, rest, strict=True):
            tensors[i] = tensor
        if torch.is_grad_enabled():
            return Network._backward_to_differentiate(ctx, grads, number, tensors, rest)
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        inputs, parameters = tensors[: program.inputs], tensors[program.inputs :]
        last = not backward_may_run_again() and not hasattr(ctx, "is_batched")
        found = network_backward(grads, number, inputs, parameters, wanted, last)
        result: list[Tensor | None] = [None] * (1 + len(tensors))
        for i, gradient in zip(wanted, found, strict=True):
            if gradient.numel() or not tensors[i].numel():
                result[1 + i] = gradient
        return tuple(result)

    @staticmethod
    def _backward_to_differentiate(
        ctx: Any, grads: Any, number: Tensor, tensors: Sequence[Tensor], rest: Sequence[tuple[Tensor, int]]
    ) -> tuple[Tensor | None, ...]:
        """The gradients for a second derivative, by the specification and with the numbers that forward has drawn."""
        program: TrainedNetwork = ctx.program
        if any(tensor._version != version for tensor, version in rest):
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation"
            )
        drawn = iter(network_draws(number))

        def dropout(line: TextLine, taken: Taken) -> list[Tensor]:
            return [taken["input"][0] * next(drawn)]

        def noise(line: TextLine, taken: Taken) -> list[Tensor]:
            return [next(drawn)]

        def rnn(line: TextLine, taken: Taken) -> list[Tensor]:
            masks = next(drawn) if line["dropout"] and layers_of_rnn(line, taken) > 1 else None
            return rnn_layer(line, taken, masks)

        def attention(line: TextLine, taken: Taken) -> list[Tensor]:
            return attention_layer(line, taken, next(drawn) if line["dropout"] else None)

        layers = {
            "dropout": dropout,
            "noise": noise,
            "rnn": rnn,
            "attention": attention,
        }

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            return tuple(network(tensors[: program.inputs], tensors[program.inputs :], program.text, layers))

        return (None, *gradients_by_reference(run, tensors, ctx.needs_input_grad[1:], grads))


_record = eager_recorder(Network)


@raw_operator("network_with_pass")
def _(inputs: list[Tensor], parameters: list[Tensor], program: str) -> tuple[list[Tensor], Tensor]:
    check_same_device(*inputs, *parameters)
    outputs = [torch.empty_like(output) for output in network(inputs, parameters, program)]
    return outputs, inputs[0].new_empty(1, dtype=torch.int64)


@raw_operator("network_backward")
def _(
    gradients: list[Tensor | None],
    number: Tensor,
    inputs: list[Tensor],
    parameters: list[Tensor],
    wanted: list[int],
    last: bool,
) -> list[Tensor]:
    check_same_device(*gradients, number, *inputs, *parameters)
    tensors = [*inputs, *parameters]
    return [tensors[i].new_empty(tensors[i].shape) for i in wanted]


@raw_operator("network_draws")
def _(number: Tensor) -> list[Tensor]:
    raise NotImplementedError("what a forward has drawn cannot be told without the forward")
