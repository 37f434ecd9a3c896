"""Accelerate, and the Trainer of transformers, which stands on it."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from beside_stock import MODELS, Train, both, check_training

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "autocast": {"mixed_precision": "bf16"},  # of float32 alone, so that the reference stays in float64
}


@pytest.fixture(autouse=True)
def another_precision() -> Iterator[None]:
    """Have a test choose a precision, which a process that uses accelerate may do once."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def check(name: str, how: str, pair: tuple[Train, Train], **options: Any) -> None:
    ours, stock = (partial(train, **options) for train in pair)
    check_training(name, ours, stock, torch.bfloat16 if how == "autocast" else torch.float32)


@pytest.mark.parametrize("how", OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_accelerate(name: str, how: str) -> None:
    check(name, how, both("Accelerate"), **OPTIONS[how])


@pytest.mark.parametrize("how", OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_trainer(name: str, how: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    options = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "optim": "sgd"} | OPTIONS[how]
    if options.pop("mixed_precision", None):
        options["bf16"] = True
    check(name, how, both("Transformers"), folder=str(tmp_path), **options)
