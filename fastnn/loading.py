"""A model and its inputs as the commands of ``python -m fastnn`` name them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def load_model(name: str) -> nn.Module:
    """The model that ``package.module:factory`` or ``file.py:factory`` names: a module of torch's, or what a function
    without arguments, or a class, makes. ValueError where the name leads to none."""
    path, found, factory = name.rpartition(":")
    if not found:
        raise ValueError(f"expected package.module:factory or file.py:factory, got {name!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the folder that the command was called in
    try:
        made = _import_file(path) if path.endswith(".py") else importlib.import_module(path)
        for part in factory.split("."):
            made = getattr(made, part)
    except (ImportError, AttributeError, FileNotFoundError) as error:
        raise ValueError(f"there is no {name}: {error}") from error
    model = made if isinstance(made, nn.Module) else made() if callable(made) else made
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name} gives a {type(model).__name__}, not a torch.nn.Module")
    return model


def _import_file(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where copies look for the classes that the file defines
    spec.loader.exec_module(module)
    return module


def random_inputs(descriptions: Sequence[str]) -> list[Tensor]:
    """A tensor for each description: sizes with commas between them, and perhaps ``:dtype`` (``8,20:int64``, and
    ``8,20:int64:100`` for numbers below 100). Floating-point numbers are drawn from a normal distribution."""
    torch.manual_seed(0)
    inputs = []
    for description in descriptions:
        sizes, _, rest = description.partition(":")
        name, _, most = rest.partition(":")
        dtype = getattr(torch, name or "float32", None)
        try:
            shape = [int(size) for size in sizes.split(",")]
            if not isinstance(dtype, torch.dtype) or any(size < 0 for size in shape):
                raise ValueError(description)
            integers = not (dtype.is_floating_point or dtype.is_complex)
            if integers:
                inputs.append(torch.randint(int(most or 2), shape, dtype=dtype))
            else:
                inputs.append(torch.randn(shape, dtype=dtype))
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"expected sizes such as 32,3,32,32, or 8,20:int64:100, got {description!r}") from error
    return inputs
