"""A whole network in one operator: its Python side. (csrc/network/infer.cpp)"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastnn._torch import direct_call
from fastnn.network_program import VIEWS, TextLine, read
from fastnn.ops._autograd import check_same_device
from fastnn.ops._raw_operator import raw_operator
from fastnn.recurrent_modes import MODE_OF
from fastnn.reference.network import Taken, layers_of_rnn, network

network_op = torch.ops.fastnn.network.default
network_of_one = torch.ops.fastnn.network_of_one.default
pack_network = torch.ops.fastnn.pack_network.default
network_of_parameters = torch.ops.fastnn.network_of_parameters.default
_call_of_parameters = direct_call(network_of_parameters)


class InferenceNetwork:
    """A program for inference that reads the parameters anew at every call.

    are_inputs: for each text of sizes that the program lacks ("{0}", "{1}" and so on), whether it is an input's, of
    which only the number of dimensions is written, or that of a parameter that is computed. computed: the places of
    such parameters. texts: the ways to write the program, the best first, each with the places of its parameters among
    those that are given. A way may refuse some sizes.
    """

    records = False  # autograd records none of its runs

    def __init__(
        self, are_inputs: Sequence[bool], computed: Sequence[int], texts: Sequence[tuple[str, Sequence[int]]]
    ) -> None:
        self.inputs = sum(are_inputs)
        self.text = texts[0][0]
        self._reshapes = "\nreshape " in self.text
        self._inputs_reshaped = _reshaped_inputs(self.text)
        self._are_inputs, self._computed, self._texts = are_inputs, computed, texts
        # By the inputs' numbers of dimensions and the sizes of what is computed: the text for them, and the places of
        # its parameters.
        self._known: dict[tuple[Any, ...], tuple[str, Sequence[int]]] = {}

    def takes(self, place: int, input: Tensor) -> bool:
        """Whether the input of this place lies as the results do, or is a part of a tensor that does. (Torch refuses
        some views of such a part, so that then nothing may reshape it.) One without elements is taken where nothing
        reshapes anything: torch refuses a view of it with a size of -1."""
        if self._reshapes and input.numel() == 0:
            return False
        return input.is_contiguous() or (place not in self._inputs_reshaped and _is_in_order(input))

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The outputs. tensors: the inputs, then the parameters. Callers know that the call is plain
        (:func:`is_plain`), that the program takes each input and that nothing wants a gradient.

        Raises RuntimeError where the operator does not take the tensors.
        """
        inputs, parameters = tensors[: self.inputs], tensors[self.inputs :]
        key: tuple[Any, ...] = tuple([one.dim() for one in inputs])
        if self._computed:
            key = (*key, *[parameters[place].shape for place in self._computed])
        known = self._known.get(key)
        if known is not None:
            text, places = known
            return _call_of_parameters(inputs, [parameters[place] for place in places], text)
        of_inputs = iter([",".join([":"] * rank) for rank in key[: self.inputs]])
        of_computed = iter([",".join(map(str, shape)) for shape in key[self.inputs :]])
        sizes = [next(of_inputs if is_input else of_computed) for is_input in self._are_inputs]
        for number, (pattern, places) in enumerate(self._texts, start=1):
            text = pattern.format(*sizes)
            try:
                outputs = _call_of_parameters(inputs, [parameters[place] for place in places], text)
            except RuntimeError:
                if number == len(self._texts):
                    raise
            else:
                self._known[key] = text, places
                break
        return outputs


def _reshaped_inputs(text: str) -> frozenset[int]:
    """The places of the inputs that a line reshapes: themselves, or a view of them."""
    views: dict[str, int] = {}  # of values that may lie in an input's memory, the input's place
    found = set()
    for line in read(text):
        if line.layer == "input":
            views[line.outputs[0]] = len(views)
        elif line.layer in VIEWS and (place := views.get(line.inputs["input"][0])) is not None:
            views.update(dict.fromkeys(line.outputs, place))
            if line.layer == "reshape":
                found.add(place)
    return frozenset(found)


def _is_in_order(input: Tensor) -> bool:
    """Whether the dimensions lie in memory in their order, as those of a part of a contiguous tensor do."""
    strides = [stride for size, stride in zip(input.shape, input.stride(), strict=True) if size != 1]
    return all(first >= second > 0 for first, second in pairwise([*strides, 1]))


def _rnn_sizes(line: TextLine, taken: Taken) -> list[Tensor]:
    """Empty tensors of the sizes of a recurrent layer's results. No step runs, because their number may be unknown."""
    (x,) = taken["input"]
    directions = 2 if line["bidirectional"] else 1
    weights = taken["weights"]
    outputs = weights[1].shape[1]
    hidden = weights[1].shape[0] // MODE_OF[line["mode"]].gates
    batch = [x.shape[0 if line["batch_first"] else 1]] if x.dim() == 3 else []
    sizes = [*(batch if line["last"] else x.shape[:-1]), directions * outputs]
    count = layers_of_rnn(line, taken) * directions
    return [x.new_empty(sizes), x.new_empty(count, *batch, outputs), x.new_empty(count, *batch, hidden)]


def _empty_outputs(inputs: Sequence[Tensor], weights: Any, program: str) -> list[Tensor]:
    results = network(inputs, weights, program, {"rnn": _rnn_sizes})
    return [result.new_empty(result.shape) for result in results]


def _refuse_onnx() -> None:
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            "a frozen model cannot be exported to ONNX, which has none of its operators: export the model that it was "
            "made of"
        )


@raw_operator("network")
def _(inputs: list[Tensor], weights: Tensor, packed: Tensor, program: str) -> list[Tensor]:
    _refuse_onnx()
    check_same_device(*inputs, weights, packed)
    return _empty_outputs(inputs, weights, program)


@raw_operator("network_of_one")
def _(input: Tensor, weights: Tensor, packed: Tensor, program: str) -> Tensor:
    _refuse_onnx()
    check_same_device(input, weights, packed)
    return _empty_outputs([input], weights, program)[0]


@raw_operator("network_of_parameters")
def _(inputs: list[Tensor], parameters: list[Tensor], program: str) -> list[Tensor]:
    check_same_device(*inputs, *parameters)
    return _empty_outputs(inputs, parameters, program)


@raw_operator("pack_network")
def _(weights: Tensor, program: str, sizes: list[int], channels_last: Sequence[int] = ()) -> Tensor:
    return weights.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)
