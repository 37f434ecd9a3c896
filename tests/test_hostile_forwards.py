"""Forwards that a trace could get wrong: a fused model gives what the stock one gives, in each call of each case."""

import pytest
from hostile_forwards import CASES, outcome, same
from torch import nn

import fastnn


def stock(model: nn.Module) -> nn.Module:
    return model


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", CASES)
def test_same_as_stock(name: str) -> None:
    expected = outcome(CASES[name], stock)
    seen = outcome(CASES[name], fastnn.fuse)
    assert len(seen) == len(expected)
    for step, (one, other) in enumerate(zip(seen, expected, strict=True)):
        assert same(one, other), f"step {step} gave {one}\nand stock {other}"
