"""``fastnn.freeze``: a model for inference alone, its weights packed, run by one operator call."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastnn import nn
from fastnn._exported_chain import read_chain
from fastnn.ops.frozen import frozen_op, frozen_packed, read_program, write_program
from fastnn.ops.mlp import ACTIVATION_NAMES
from fastnn.ops.rnn import MODES

_frozen_call = frozen_op._op  # what calling it comes to, 0.25 us sooner; torch.compile knows only the former
_is_compiling = torch.compiler.is_compiling


def freeze(model: nn.Module, example_input: Tensor) -> "FrozenModel":
    """``model`` as it is now, for inference alone: one operator call that goes through the whole network.

    The model may be any chain of fastnn's layers and functions, ``Linear``, activations and ``flatten`` from one input
    to one output: the three of ``fastnn.models``, for example, or a ``Sequential``. Dropout is left out. The frozen
    model is compared with the model, on the example and on a batch of another size, before it is returned.

    Args:
        model: float32 or float64, on the CPU. It is not changed, and later changes of it do not reach the frozen model.
        example_input: (batch, ...). The frozen model takes any batch size, and is fastest for sizes like these. It
            takes other sizes in further dimensions (lengths, heights) where the model does.

    Raises:
        ValueError: the model does something that a frozen model cannot hold; the message names the layer.
    """
    _check_arguments(model, example_input)
    # The export takes a batch of one for a constant.
    doubled = torch.cat([example_input, example_input]) if example_input.shape[0] == 1 else None
    with _as_in_inference(model):
        expected = model(example_input)
        if not isinstance(expected, Tensor):
            raise ValueError(
                f"freeze: expected a model that returns one tensor, but {type(model).__name__} returns a "
                f"{type(expected).__name__}"
            )
        stages = read_chain(model, example_input if doubled is None else doubled)
        tensors = [tensor.detach() for stage in stages for tensor in stage.tensors]
        if len({tensor.dtype for tensor in tensors}) != 1 or tensors[0].dtype not in (torch.float32, torch.float64):
            found = ", ".join(sorted({str(tensor.dtype) for tensor in tensors})) or "no parameters"
            raise ValueError(f"freeze: expected parameters of one dtype, float32 or float64, got {found}")
        weights = torch.cat([tensor.reshape(-1) for tensor in tensors])
        program = write_program((stage.name, stage.numbers) for stage in stages)
        frozen = FrozenModel(program, weights, tuple(example_input.shape))
        _compare(frozen, example_input, expected)
        # Once more, as nothing that the model does may depend on the batch's size.
        other = example_input[:1] if doubled is None else doubled
        _compare(frozen, other, model(other))
    return frozen


def _check_arguments(model: Any, example_input: Any) -> None:
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"freeze: expected a model that is a torch.nn.Module, got a {type(model).__name__}")
    if not isinstance(example_input, Tensor):
        raise ValueError(
            "freeze: expected example_input to be a Tensor, as a frozen model takes one input, got a "
            f"{type(example_input).__name__}"
        )
    if example_input.dim() < 2 or example_input.numel() == 0 or not example_input.is_cpu:
        raise ValueError(
            "freeze: expected example_input to be on the CPU, of size (batch, ...) and not empty, got size "
            f"{tuple(example_input.shape)} on {example_input.device}"
        )
    signature = inspect.signature(model.forward)
    try:
        signature.bind(example_input)
    except TypeError as error:
        raise ValueError(
            f"freeze: expected a model that takes one input, but {type(model).__name__} takes {signature}: {error}"
        ) from error


def _compare(frozen: "FrozenModel", input: Tensor, expected: Tensor) -> None:
    result = frozen(input)
    if result.shape != expected.shape or not torch.allclose(result, expected, rtol=1e-3, atol=1e-4, equal_nan=True):
        raise ValueError(
            "freeze: the frozen model does not compute what the model does on an input of size "
            f"{tuple(input.shape)}: expected a result of size {tuple(expected.shape)}, got {tuple(result.shape)}"
            + ("" if result.shape != expected.shape else " with other values")
        )


@contextmanager
def _as_in_inference(model: nn.Module) -> Iterator[None]:
    """Has the model be in eval mode, nothing recorded for a gradient, and no dtype changed by autocast."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            yield
    finally:
        for module, training in modes:
            module.training = training


class FrozenModel(nn.Module):
    """What :func:`freeze` returns: immutable, without gradients, safe to call from several threads.

    It can be saved (``torch.save``, pickle), loaded (by ``torch.load`` with ``weights_only=True`` too) on another
    machine, where its weights are packed anew, and exported (``torch.export``). It prints as the layers that it runs;
    ``program`` is what the operator reads, a line a stage. Other ``weights`` of the same size come by
    ``load_state_dict``, which packs them, or for a call by ``torch.func.functional_call``, which uses them as they are,
    and slower. They must not be changed in place.
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
        arguments = self._arguments
        if self._buffers["weights"] is arguments[0] and not _is_compiling():
            return _frozen_call(input, *arguments)
        # Others than those that were packed are used as they are. (An export has both in other guises.)
        others = self.weights is not arguments[0] and self.packed is arguments[1]
        return frozen_op(input, self.weights, self.packed[:0] if others else self.packed, self._program)

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
        weights = self.weights
        super()._apply(fn, recurse)
        try:
            self._pack()
        except RuntimeError:  # a dtype or a device that is not for it
            self.weights = weights
            self._pack()
            raise
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_buffers"] = {"weights": self.weights}
        del state["_arguments"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pack()

    def __repr__(self) -> str:
        return "\n  ".join([f"{type(self).__name__}(", *_describe(self._program)]) + "\n)"


def _describe(program: str) -> Iterator[str]:
    """A line a layer, as the layers themselves print."""
    for name, numbers in read_program(program):
        if name == "input":
            yield f"input size: ({', '.join(map(_describe_range, numbers[::2], numbers[1::2]))})"
        elif name == "mlp":
            widths = numbers[1:2] + numbers[2::2]
            for i, activation in enumerate(numbers[3::2]):
                linear = nn.Linear(widths[i], widths[i + 1], bool(numbers[0]), device="meta")
                yield f"{linear}, {ACTIVATION_NAMES[activation]}" if activation else str(linear)
        elif name == "conv":
            yield _describe_conv(*numbers)
        elif name == "rnn":
            yield _describe_rnn(*numbers)
        else:
            yield name


def _describe_range(least: int, most: int) -> str:
    if least == most:
        return str(least or "any")
    return f"{least} to {most}" if most else f"{least} or more"


def _describe_conv(dims: int, biased: int, out: int, in_each: int, *numbers: int) -> str:
    def part(i: int) -> Any:  # one number, if it is that of all dimensions
        part = numbers[i * dims : (i + 1) * dims]
        return part[0] if len(set(part)) == 1 else part

    groups, ceil_mode = numbers[8 * dims :]
    layer = getattr(nn, f"ConvReLUMaxPool{dims}d")(
        *(in_each * groups, out, part(0), part(1), part(2), part(3), groups, bool(biased)),
        pool_kernel_size=part(4),
        pool_stride=part(5),
        pool_padding=part(6),
        pool_dilation=part(7),
        ceil_mode=bool(ceil_mode),
        device="meta",
    )
    return str(layer)


def _describe_rnn(
    mode: int, num_layers: int, directions: int, batch_first: int, biased: int, last: int, *sizes: int
) -> str:
    features, hidden, projected = sizes
    kind, _, nonlinearity = MODES[mode].partition("_")
    layer = getattr(nn, kind)(
        *(features, hidden, num_layers),
        **({"nonlinearity": nonlinearity.lower()} if nonlinearity else {}),
        **({"proj_size": projected} if projected else {}),
        bias=bool(biased),
        batch_first=bool(batch_first),
        bidirectional=directions == 2,
        device="meta",
    )
    return f"{layer}, last step" if last else str(layer)


torch.serialization.add_safe_globals([FrozenModel])
