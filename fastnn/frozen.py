"""``fastnn.freeze``: a model for inference alone, its weights packed, run by one operator call."""

import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from fastnn.ops.frozen import conv_numbers, frozen_op, frozen_packed, write_program
from fastnn.ops.mlp import ACTIVATION_NAMES, names_of_code

_frozen_call = frozen_op._op  # what calling it comes to, 0.25 us sooner; torch.compile knows only the former
_is_compiling = torch.compiler.is_compiling
_aten = torch.ops.aten
_ACTIVATIONS: dict[Any, str] = {
    _aten.relu.default: "relu",
    _aten.tanh.default: "tanh",
    _aten.sigmoid.default: "sigmoid",
    _aten.silu.default: "silu",
    _aten.gelu.default: "gelu",
    _aten.leaky_relu.default: "leaky_relu",
}
_RESHAPES = (
    *(_aten.flatten.using_ints, _aten.view.default, _aten.reshape.default, _aten._unsafe_view.default),
    *(_aten.squeeze.dim, _aten.unsqueeze.default),
)
_RNN_BATCH_FIRST, _RNN_LAST = 3, 5  # places among the numbers of an rnn stage


def freeze(model: nn.Module, example_input: Tensor) -> "FrozenModel":
    """``model`` as it is now, for inference alone: one operator call that goes through the whole network.

    The model may be any chain of fastnn's layers and functions, ``Linear``, activations and ``flatten`` from one input
    to one output: the three of ``fastnn.models``, for example, or a ``Sequential``. Dropout is left out. The frozen
    model is compared with the model on the example before it is returned.

    Args:
        model: float32 or float64, on the CPU. It is not changed, and later changes of it do not reach the frozen model.
        example_input: (batch, ...). The frozen model takes any batch size, and is fastest for sizes like these.

    Raises:
        ValueError: the model does something that a frozen model cannot hold; the message names the layer.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            # A batch of one would be taken for a constant.
            batch = torch.cat([example_input, example_input]) if example_input.shape[0] == 1 else example_input
            exported = torch.export.export(model, (batch,), dynamic_shapes=({0: torch.export.Dim.AUTO},), strict=False)
            expected = model(example_input)
    finally:
        for module, training in modes:
            module.training = training
    program, tensors = _Reader(exported).read()
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.float64}:
        raise ValueError(f"freeze: expected parameters of one dtype, float32 or float64, got {dtypes}")
    weights = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    frozen = FrozenModel(program, weights, tuple(example_input.shape))
    result = frozen(example_input)
    if result.shape != expected.shape or not torch.allclose(result, expected, rtol=1e-3, atol=1e-4, equal_nan=True):
        raise ValueError("freeze: the frozen model does not compute what the model does on the example input")
    return frozen


class FrozenModel(nn.Module):
    """What :func:`freeze` returns: immutable, without gradients, safe to call from several threads.

    It can be saved (``torch.save``, pickle), loaded on another machine, where its weights are packed anew, and exported
    (``torch.export``). ``program`` says what it runs, a line a stage.
    """

    weights: Tensor
    packed: Tensor

    def __init__(self, program: str, weights: Tensor, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self._program, self._sizes = program, sizes
        self.register_buffer("weights", weights)
        self._pack()

    def _pack(self) -> None:
        self.register_buffer("packed", frozen_packed(self.weights, self._program, self._sizes), persistent=False)
        self._arguments = (self.weights, self.packed, self._program)

    @property
    def program(self) -> str:
        return self._program.replace(";", "\n").rstrip()

    def forward(self, input: Tensor) -> Tensor:
        """input (batch, ...) as the model's -> what the model returned for it."""
        if _is_compiling():
            return frozen_op(input, self.weights, self.packed, self._program)
        return _frozen_call(input, *self._arguments)

    def __call__(self, input: Tensor) -> Tensor:
        # nn.Module's own takes 0.6 us to look for hooks, a quarter of a small network's time.
        return self.forward(input)

    def _refuse_hook(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a FrozenModel runs no hooks")

    register_forward_hook = register_forward_pre_hook = _refuse_hook
    register_full_backward_hook = register_full_backward_pre_hook = _refuse_hook

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._pack()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "FrozenModel":
        super()._apply(fn, recurse)
        self._pack()
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_buffers"] = {"weights": self.weights}
        del state["_arguments"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pack()

    def extra_repr(self) -> str:
        return self.program


@dataclass
class _Stage:
    name: str
    numbers: list[int]
    tensors: list[Tensor] = field(default_factory=list)


class _Reader:
    """Writes the program of an exported model: the operators between its input and its output, each a stage or part of
    the one before."""

    def __init__(self, exported: torch.export.ExportedProgram) -> None:
        signature = exported.graph_signature
        named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.constants = {name: exported.state_dict[of] for name, of in named.items() if of in exported.state_dict}
        (self.input,) = signature.user_inputs
        (outputs,) = next(node for node in exported.graph.nodes if node.op == "output").args
        if len(outputs) != 1 or not isinstance(outputs[0], Node):
            raise ValueError(f"freeze: expected a model that returns one tensor, got {len(outputs)} results")
        self.output = outputs[0]
        self.stages: list[_Stage] = []

    def read(self) -> tuple[str, list[Tensor]]:
        chain: list[Node] = []
        node = self.output
        while node.name != self.input:
            if node.op != "call_function":
                raise self.refusal(node, "does not depend on the input")
            if node.target is operator.getitem:
                node = self.whose_result(node, chain[-1] if chain else None)
            else:
                chain.append(node)
                node = node.args[0]  # type: ignore[assignment]
        for node in reversed(chain):
            self.add(node)
        program = write_program((stage.name, stage.numbers) for stage in self.stages)
        return program, [tensor for stage in self.stages for tensor in stage.tensors]

    def whose_result(self, node: Any, user: Any) -> Node:
        """The operator whose output this is; or whose last layer's final h, which is its output's last step."""
        source, which = node.args
        if which == 0 and source.target is not operator.getitem:
            return source
        if which == 0 and source.args[1] == 1 and user is not None and user.target is _aten.select.int:
            rnn, bidirectional = source.args[0], source.args[0].args[7]
            if user.args[1:] == (0, -1) and not bidirectional:
                user.args = (user.args[0], int(rnn.args[8]), -1)
                return rnn
        raise self.refusal(source, "has a second result, which a frozen model cannot use in this way")

    def add(self, node: Node) -> None:
        target, arguments = node.target, node.args
        last = self.stages[-1] if self.stages else None
        if target in _ACTIVATIONS:
            self.add_activation(node, last)
        elif target is _aten.linear.default:
            self.add_mlp([self.constant(node, arguments[1])], self.constants_of(node, arguments[2:]), ["identity"])
        elif target is torch.ops.fastnn.mlp.default:
            code: Any = arguments[2]
            names = names_of_code(code)
            parameters = self.constants_of(node, arguments[1])
            self.add_mlp(parameters[: len(names)], parameters[len(names) :], names)
        elif target is torch.ops.fastnn.conv_relu_max_pool.default:
            self.add_conv(node)
        elif target is torch.ops.fastnn.rnn.default:
            self.add_rnn(node)
        elif target is _aten.select.int and last and last.name == "rnn" and not last.numbers[_RNN_LAST]:
            if arguments[1:] != (last.numbers[_RNN_BATCH_FIRST], -1):
                raise self.refusal(node, "does not choose the last step, as it must in a frozen model")
            last.numbers[_RNN_LAST] = 1
        elif self.flattens(node):
            self.stages.append(_Stage("flatten", []))
        elif not self.changes_nothing(node):
            raise self.refusal(node, "cannot be frozen")

    def refusal(self, node: Any, why: str) -> ValueError:
        layers = [layer for layer in (node.meta.get("nn_module_stack") or {}).values() if layer[0]]
        where = f"layer '{layers[-1][0]}' ({layers[-1][1]})" if layers else "the model itself"
        return ValueError(f"freeze: {node.target}, of {where}, {why}")

    def constant(self, node: Node, argument: Any) -> Tensor:
        if not isinstance(argument, Node) or argument.name not in self.constants:
            raise self.refusal(node, "takes something that is neither the input nor a parameter of the model")
        return self.constants[argument.name]

    def constants_of(self, node: Node, arguments: Any) -> list[Tensor]:
        return [self.constant(node, argument) for argument in arguments if argument is not None]

    def add_activation(self, node: Node, last: _Stage | None) -> None:
        name = _ACTIVATIONS[node.target]
        if name == "gelu" and node.kwargs.get("approximate", "none") == "tanh":
            name = "gelu_tanh"
        if name == "leaky_relu" and node.args[1:] not in ((), (0.01,)):
            raise self.refusal(node, "has a slope other than 0.01")
        if last is None or last.name != "mlp" or last.numbers[-1] != 0:
            raise self.refusal(node, "does not follow a Linear layer, as it must in a frozen model")
        last.numbers[-1] = ACTIVATION_NAMES.index(name)

    def add_mlp(self, weights: list[Tensor], biases: list[Tensor], names: list[str]) -> None:
        last = self.stages[-1] if self.stages else None
        if last is None or last.name != "mlp" or last.numbers[0] != bool(biases):
            last = _Stage("mlp", [int(bool(biases)), weights[0].shape[1]])
            self.stages.append(last)
        for i, (weight, name) in enumerate(zip(weights, names, strict=True)):
            last.numbers += [weight.shape[0], ACTIVATION_NAMES.index(name)]
            last.tensors += [weight, biases[i]] if biases else [weight]

    def add_conv(self, node: Node) -> None:
        geometry: Any = node.args[3]
        tensors = self.constants_of(node, node.args[1:3])
        self.stages.append(_Stage("conv", conv_numbers(tensors[0].shape, len(tensors) > 1, geometry), tensors))

    def add_rnn(self, node: Node) -> None:
        arguments: Any = node.args
        _, batch_sizes, state, weights, masks, mode, layers, bidirectional, batch_first = arguments
        is_zero = all(part.target is _aten.new_zeros.default for part in state)  # what fastnn.ops.rnn takes for none
        if batch_sizes is not None or not is_zero or masks is not None:
            raise self.refusal(node, "has packed sequences or a state, which a frozen model cannot take")
        tensors = self.constants_of(node, weights)
        directions = 2 if bidirectional else 1
        each = len(tensors) // (directions * layers)
        in_features, hidden, projected = tensors[0].shape[1], tensors[1].shape[1], 0
        if each % 2:
            projected, hidden = tensors[int(each) - 1].shape
        flags = [int(bool(batch_first)), int(each >= 4), 0]
        numbers = [mode, layers, directions, *flags, in_features, hidden, projected]
        self.stages.append(_Stage("rnn", numbers, tensors))

    @staticmethod
    def flattens(node: Node) -> bool:
        if node.target not in _RESHAPES:
            return False
        before, after = node.args[0].meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
        return len(before) > 2 and len(after) == 2 and bool(before[0] == after[0])

    @staticmethod
    def changes_nothing(node: Node) -> bool:
        if node.target is _aten.slice.Tensor:
            return node.args[2:] == (0, sys.maxsize)
        if node.target is _aten.dropout.default:
            return node.args[2] is False
        if node.target in _RESHAPES:  # layers work on the last dimension, and freeze compares the result's sizes
            before, after = node.args[0].meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
            return bool(before[-1] == after[-1])
        return node.target in (_aten.clone.default, _aten.contiguous.default, _aten.alias.default)
