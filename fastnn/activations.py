"""The activations that kernels have, and what torch calls them.

The names, the parameters with their defaults, and what a derivative is computed from are the extension's
(csrc/simd/activation.h). This file adds what only Python needs: torch's functions, modules, methods and operators.

One layer's activation is written ``name``, or ``name(value, ...)`` where its parameters are not the defaults: ``relu``,
``leaky_relu(0.2)``. Operators take those of several layers with bars between them: ``relu|leaky_relu(0.2)|identity``.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnn._extension import load_extension


@dataclass(frozen=True)
class Kind:
    """One row of the extension's table: its number, the parameters with their defaults, and what backward needs."""

    name: str
    number: int
    parameters: Mapping[str, float]
    derived_from: str  # "nothing", "output" or "input"


KINDS: dict[str, Kind] = {
    name: Kind(name, number, dict(parameters), derived_from)
    for number, (name, parameters, derived_from) in enumerate(load_extension().activations())
}


@dataclass(frozen=True)
class _TorchName:
    """One of torch's names for an activation, under which torch has a function, perhaps a method, and an operator.

    kind: the extension's name for the activation. module: torch's class, or ours where torch has none. chosen_by: the
    settings by which torch's one function is this activation and not another. preset: the parameters that this name
    fixes. is_valid: whether torch accepts these values of the parameters.
    """

    name: str
    module: type[nn.Module]
    kind: str
    chosen_by: Mapping[str, Any] = field(default_factory=dict)
    preset: Mapping[str, float] = field(default_factory=dict)
    is_valid: Callable[..., bool] = lambda *parameters: True

    @property
    def settings(self) -> tuple[str, ...]:
        """The names of torch's arguments after the input, in torch's order, without ``inplace``."""
        return () if self.preset else (*KINDS[self.kind].parameters, *self.chosen_by)


class Exp(nn.Module):
    """``torch.exp`` as a module, which torch does not have."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.exp(input)


class Sin(nn.Module):
    """``torch.sin`` as a module, which torch does not have."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.sin(input)


class Cos(nn.Module):
    """``torch.cos`` as a module, which torch does not have."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.cos(input)


# By the names that fastnn's own functions take.
_NAMES: dict[str, _TorchName] = {
    "identity": _TorchName("identity", nn.Identity, "identity"),
    "relu": _TorchName("relu", nn.ReLU, "relu"),
    "tanh": _TorchName("tanh", nn.Tanh, "tanh"),
    "sigmoid": _TorchName("sigmoid", nn.Sigmoid, "sigmoid"),
    "gelu": _TorchName("gelu", nn.GELU, "gelu", chosen_by={"approximate": "none"}),
    "gelu_tanh": _TorchName("gelu", nn.GELU, "gelu_tanh", chosen_by={"approximate": "tanh"}),
    "silu": _TorchName("silu", nn.SiLU, "silu"),
    "leaky_relu": _TorchName("leaky_relu", nn.LeakyReLU, "leaky_relu"),
    "elu": _TorchName("elu", nn.ELU, "elu"),
    "hardswish": _TorchName("hardswish", nn.Hardswish, "hardswish"),
    "softplus": _TorchName("softplus", nn.Softplus, "softplus"),
    "hardtanh": _TorchName("hardtanh", nn.Hardtanh, "hardtanh", is_valid=operator.le),
    "selu": _TorchName("selu", nn.SELU, "selu"),
    "mish": _TorchName("mish", nn.Mish, "mish"),
    "exp": _TorchName("exp", Exp, "exp"),
    "sin": _TorchName("sin", Sin, "sin"),
    "cos": _TorchName("cos", Cos, "cos"),
    "relu6": _TorchName("relu6", nn.ReLU6, "hardtanh", preset={"min_val": 0.0, "max_val": 6.0}),
}
NAMES = tuple(_NAMES)


@dataclass(frozen=True)
class Activation:
    """An activation with the values of its parameters."""

    kind: Kind
    parameters: tuple[float, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """Computes the activation by torch's function."""
        return _FUNCTIONS[self.kind.name](x, *self.parameters)

    def __str__(self) -> str:
        if self.parameters == tuple(self.kind.parameters.values()):
            return self.kind.name
        return f"{self.kind.name}({','.join(map(repr, self.parameters))})"

    def module(self) -> nn.Module:
        """A module of torch that computes the activation."""
        for preset in _NAMES.values():
            if preset.kind == self.kind.name and tuple(preset.preset.values()) == self.parameters != ():
                return preset.module()
        named = _NAMES[self.kind.name]
        return named.module(**named.chosen_by, **dict(zip(self.kind.parameters, self.parameters, strict=True)))


def _identity(x: Tensor) -> Tensor:
    return x


# What each kind means: torch's function of the input and the parameters.
_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    kind: functools.partial(getattr(F if hasattr(F, named.name) else torch, named.name), **named.chosen_by)
    for kind, named in _NAMES.items()
    if not named.preset and kind != "identity"
}
_FUNCTIONS["identity"] = _identity


# ---- the text ---------------------------------------------------------------------------------------------------

# torch.compile traces these functions, so they use only methods of strings.


def parse(text: str) -> tuple[Activation, ...]:
    """Reads the activations from a text. ValueError where the text does not name activations."""
    found = _parsed.get(text)
    if found is None:
        found = _parsed[text] = tuple([parse_one(one.strip()) for one in text.split("|")])
    return found


_parsed: dict[str, tuple[Activation, ...]] = {}


def parse_one(text: str) -> Activation:
    """Reads one layer's activation from its text. ValueError where no kernel has such an activation."""
    name, opened, values = text.partition("(")
    if name not in _NAMES or (opened and not values.endswith(")")):
        raise ValueError(f"activation must be one of {', '.join(NAMES)}, got {text!r}")
    named = _NAMES[name]
    parameters = {**KINDS[named.kind].parameters, **named.preset}
    given = [value.strip() for value in values[:-1].split(",")] if opened else []
    if len(given) > len(named.settings):
        raise ValueError(f"activation {name} has {len(named.settings)} parameters, got {text!r}")
    for parameter, value in zip(list(parameters), given, strict=False):
        try:
            parameters[parameter] = float(value.removeprefix(f"{parameter}="))
        except ValueError:
            raise ValueError(f"parameters of an activation must be numbers, got {text!r}") from None
        if not math.isfinite(parameters[parameter]):
            raise ValueError(f"parameters of an activation must be finite, got {text!r}")
    if not named.is_valid(*parameters.values()):
        raise ValueError(f"torch refuses these parameters of an activation: {text!r}")
    return Activation(KINDS[named.kind], tuple(parameters.values()))


def layers_of(text: str) -> int:
    """How many layers a text describes."""
    return text.count("|") + 1 if text else 0


def last_of(text: str) -> Kind:
    """The kind of the last activation in a text."""
    return KINDS[text.rpartition("|")[2].partition("(")[0]]


def join(activations: Sequence[Activation | str]) -> str:
    """The text of several layers' activations, as operators take it."""
    return "|".join([str(activation) for activation in activations])


# ---- torch's names ------------------------------------------------------------------------------------------------


def from_settings(torch_name: str, settings: Mapping[str, Any]) -> Activation | None:
    """The activation that torch's function of this name computes with these settings, defaults where one is missing.
    None where no kernel has it: an unknown choice, or a parameter that is no finite number."""
    for named in _BY_TORCH_NAME.get(torch_name, ()):
        kind = KINDS[named.kind]
        if any(settings.get(name, _default(named, name)) != value for name, value in named.chosen_by.items()):
            continue
        parameters = {**kind.parameters, **named.preset}
        parameters.update((name, settings[name]) for name in parameters if name in settings)
        values = tuple(parameters.values())
        are_numbers = all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)
        if are_numbers and named.is_valid(*values):
            return Activation(kind, tuple(map(float, values)))
    return None


def _default(named: _TorchName, choice: str) -> Any:
    """What torch's function takes for an argument that is not given: the value in the first row of that function."""
    return _BY_TORCH_NAME[named.name][0].chosen_by[choice]


_BY_TORCH_NAME: dict[str, list[_TorchName]] = {}
for _named in _NAMES.values():
    _BY_TORCH_NAME.setdefault(_named.name, []).append(_named)
TORCH_NAMES = tuple(name for name in _BY_TORCH_NAME if name != "identity")


def functions() -> Iterator[tuple[Any, str, tuple[str, ...]]]:
    """Yields each of torch's functions, or the name of a method, that computes an activation, with torch's name for the
    activation and the names of the arguments."""
    for name in TORCH_NAMES:
        arguments = ("input", *_BY_TORCH_NAME[name][0].settings, "inplace")
        for variant in (name, f"{name}_"):
            for place in (F, torch):
                if hasattr(place, variant):
                    yield getattr(place, variant), name, arguments
            if hasattr(Tensor, variant):
                yield variant, name, arguments


def modules() -> Iterator[tuple[Any, str, tuple[str, ...]]]:
    """Yields the ``forward`` of each of torch's modules that computes an activation (subclasses may share it), with
    torch's name for the activation and the module's settings."""
    for name in TORCH_NAMES:
        named = _BY_TORCH_NAME[name][0]
        if named.preset:  # its module is one of the general activation's, with these parameters
            continue
        in_place = ("inplace",) if "inplace" in inspect.signature(named.module).parameters else ()
        yield named.module.forward, name, (*named.settings, *in_place)


# For each ATen operator that computes an activation, torch's name for the activation.
OPERATORS: dict[Any, str] = {getattr(torch.ops.aten, name).default: name for name in TORCH_NAMES}


def from_operator(overload: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Activation | None:
    """The activation that an ATen operator computes with these arguments after its input. None where no kernel has
    it."""
    names = [argument.name for argument in overload._schema.arguments[1:]]
    defaults = {argument.name: argument.default_value for argument in overload._schema.arguments[1:]}
    settings = {**defaults, **dict(zip(names, arguments, strict=False)), **keywords}
    name = OPERATORS[overload]
    known = _BY_TORCH_NAME[name][0].settings
    if any(settings[other] != defaults[other] for other in settings if other not in known):
        return None
    return from_settings(name, settings)
