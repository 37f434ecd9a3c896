"""Networks: what csrc/network computes from a program is what the reference computes, layer by layer."""

import pytest
from random_networks import check

from fastnn.graph.program import KINDS
from fastnn.reference.network import LAYERS


def test_the_reference_has_every_layer() -> None:
    assert LAYERS.keys() == KINDS.keys()


@pytest.mark.parametrize("seed", range(300))
def test_random_networks(seed: int) -> None:
    check(seed)
