"""Linear layers fused with their activations."""

from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastnn import activations
from fastnn.nn._hooks import forward_of, has_global_hooks
from fastnn.ops._autograd import is_compiling, is_exporting
from fastnn.ops.mlp import join_parameters, linear_relu, mlp_of_parameters, read_activations


class LinearReLU(nn.Linear):
    """``relu(x W^T + b)`` in one kernel: a ``torch.nn.Linear`` (same arguments, parameters, initial weights and state
    dict) with its ReLU. See :func:`fastnn.functional.linear_relu`."""

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features) -> (..., out_features)."""
        return linear_relu(input, self.weight, self.bias)


class MLP(nn.Sequential):
    """A chain of ``Linear`` layers with an activation between them and none after the last, run in one call.

    It is a ``torch.nn.Sequential`` of the stock modules, ``Linear, activation, Linear, ...``: same children, initial
    weights and state dict. It runs what its children are at the time of the call, and may be sliced and edited as a
    ``Sequential``: linear layers and the activations below go to the kernel; children of any other kind, and those with
    hooks, are called. See :func:`fastnn.functional.mlp`.

    Args:
        sizes: features of the input, then of each layer's output; at least two.
        activation: one for all gaps, or one a layer (the last included), as :func:`fastnn.functional.mlp` takes them:
            ``"relu"``, ``"leaky_relu(0.2)"``.
        bias: whether the layers have one.
        device, dtype: of the parameters.

    Raises:
        TypeError: sizes that are no list, or an activation that is neither a name nor a list of names.
        ValueError: fewer than two sizes, or an activation that there is no kernel for.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: str | Sequence[str] = "relu",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(sizes, Iterable):
            raise TypeError(
                f"MLP: sizes must be a list, the input's features and then each layer's, such as [784, 512, 10], got "
                f"{sizes!r}"
            )
        sizes = list(sizes)
        if len(sizes) < 2:
            raise ValueError(f"MLP: sizes must name the input's features and at least one layer's, got {sizes}")
        each_activation = read_activations(activation, len(sizes) - 1)
        children: list[nn.Module] = []
        for (in_features, out_features), each in zip(pairwise(sizes), each_activation, strict=True):
            children.append(nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype))
            if each.kind.name != "identity":
                children.append(each.module())
        super().__init__(*children)

    def __getitem__(self, index: Any) -> Any:
        """A child; or for a slice, an ``MLP`` of these children."""
        if not isinstance(index, slice):
            return super().__getitem__(index)
        part = MLP.__new__(MLP)
        nn.Module.__init__(part)
        for name, child in list(self._modules.items())[index]:
            part.add_module(name, child)
        return part

    def forward(self, input: Any) -> Any:
        """input (..., sizes[0]) -> (..., sizes[-1])."""
        if has_global_hooks():
            return super().forward(input)
        children: list[Any] = list(self._modules.values())
        kinds: list[type | None] = []
        for child in children:
            own = child.__dict__  # what follows is has_own_call, written out to save a function call
            calls = (
                own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
                or "forward" in own
            )
            kinds.append(None if calls else type(child))
        read = _read if is_compiling() or is_exporting() else _read_once
        steps, settings = read(tuple(kinds))
        if settings:
            steps, _ = read(tuple(kinds), tuple([getattr(children[place], name) for place, name in settings]))
        for step in steps:
            if step.activations and isinstance(input, Tensor):
                linears = [children[place] for place in step.linears]
                input = mlp_of_parameters(input, parameters_of(linears), step.activations)
            else:
                for place in step.children:
                    input = children[place](input)
        return input


class _Part(NamedTuple):
    """Some of a Sequential's children, by their places: a chain that the kernel computes, or, where there are no
    activations, one child that must be called."""

    children: Sequence[int]
    linears: Sequence[int] = ()
    activations: str = ""


# What may run in the kernel, by its forward, which a subclass may have too: linear layers with the activation that they
# apply themselves; activations with torch's name for them and the names of their settings.
_LINEARS: dict[Any, str] = {nn.Linear.forward: "identity", LinearReLU.forward: "relu"}
_ACTIVATIONS: dict[Any, tuple[str, tuple[str, ...]]] = {
    nn.Identity.forward: ("identity", ()),
    **{
        forward: (name, tuple(one for one in settings if one != "inplace"))
        for forward, name, settings in activations.modules()
    },
}


def _read(
    kinds: tuple[type | None, ...], values: tuple[Any, ...] | None = None
) -> tuple[tuple[_Part, ...], tuple[tuple[int, str], ...]]:
    """The steps of a Sequential whose children are of these classes (None for a child that must be called), and its
    settings: the place and the name of each attribute on which the steps depend. Where there are settings, only a call
    with their ``values`` gives the steps."""
    forwards = [None if kind is None else forward_of(kind) for kind in kinds]
    known = [_ACTIVATIONS.get(forward) for forward in forwards]
    settings = tuple([(place, name) for place, one in enumerate(known) if one for name in one[1]])
    if settings and values is None:
        return (), settings
    left = list(values or ())
    steps: list[_Part] = []
    chain: list[int] = []
    linears: list[int] = []
    names: list[str] = []
    for place, forward in enumerate(forwards):
        activation = None
        if (one := known[place]) is not None:
            activation = activations.from_settings(one[0], {name: left.pop(0) for name in one[1]})
        if forward in _LINEARS:
            chain.append(place)
            linears.append(place)
            names.append(_LINEARS[forward])
        elif activation is not None and chain and "identity" in (str(activation), names[-1]):
            chain.append(place)
            if str(activation) != "identity":
                names[-1] = str(activation)
        else:
            if chain:
                steps.append(_Part(chain, linears, activations.join(names)))
                chain, linears, names = [], [], []
            steps.append(_Part([place]))
    if chain:
        steps.append(_Part(chain, linears, activations.join(names)))
    return tuple(steps), settings


_read_once = lru_cache(maxsize=1024)(_read)


def parameters_of(linears: Collection[Any]) -> list[Tensor]:
    """The parameters of ``Linear`` layers in the form that operators take. They are read at each call, because they may
    have been replaced."""
    weights, biases, complete = [], [], True
    for linear in linears:
        try:
            # This takes a third of the time of `linear.weight`, for which nn.Module looks into _parameters last.
            own = linear._parameters
            weight, bias = own["weight"], own["bias"]
        except KeyError:  # the layer is parametrized
            weight, bias = linear.weight, linear.bias
        weights.append(weight)
        biases.append(bias)
        if bias is None:
            complete = False
    if not complete:
        return join_parameters(weights, biases)
    weights += biases
    return weights
