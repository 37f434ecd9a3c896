"""Runs a model to learn something about it, and leaves the model, its inputs and the generators of random numbers as
they were."""

from __future__ import annotations

import copy
import inspect
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastnn._torch import pytree


def copied(model: nn.Module) -> nn.Module:
    """A deep copy of a model. Modules may hold a computed tensor in an attribute, as weight_norm and spectral_norm do,
    which ``copy.deepcopy`` refuses. ValueError where it holds something else that cannot be copied, such as a lock."""
    computed = [t for module in model.modules() for t in module.__dict__.values() if isinstance(t, Tensor)]
    try:
        return copy.deepcopy(model, {id(t): t.detach().clone() for t in computed if not t.is_leaf})
    except TypeError as error:
        raise ValueError(f"the model cannot be copied: {error}") from error


def signature_of(model: nn.Module) -> inspect.Signature | None:
    """The arguments of the model's forward; None where they are not known."""
    try:
        return inspect.signature(model.forward)
    except (TypeError, ValueError):
        return None


def needed_inputs(signature: inspect.Signature | None) -> int:
    """How many inputs a call of such a forward must give by position; 1 where that is not known."""
    if signature is None:
        return 1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in signature.parameters.values())


def cloned(inputs: Any) -> Any:
    """Copies of the inputs, which a forward may change in place."""
    with torch.no_grad():
        return pytree.tree_map_only(Tensor, torch.clone, inputs)


@contextmanager
def leaving_no_trace() -> Iterator[Callable[[], None]]:
    """After the block, restores the generators of torch, Python and NumPy, and the grad mode. The function that it
    yields restores them at once, so that the next run draws the same numbers."""
    records = torch.is_grad_enabled()
    torchs, pythons, numpy = torch.get_rng_state(), random.getstate(), sys.modules.get("numpy")
    numpys = numpy.random.get_state() if numpy else None

    def again() -> None:
        torch.set_rng_state(torchs)
        random.setstate(pythons)
        if numpy:
            numpy.random.set_state(numpys)
        torch.set_grad_enabled(records)

    try:
        yield again
    finally:
        again()
