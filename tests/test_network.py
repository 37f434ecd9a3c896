"""Networks: what csrc/network computes from a program is what the reference computes, layer by layer."""

import pytest
import torch
from random_networks import random_network
from torch import Tensor

from fastnn import _C
from fastnn.graph.program import KINDS
from fastnn.reference.network import LAYERS, network
from fastnn.testing import using_threads

run, run_unpacked = torch.ops.fastnn.network, torch.ops.fastnn.network_unpacked


def joined(weights: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([weight.reshape(-1) for weight in weights] or [torch.empty(0)]).to(dtype)


def test_the_reference_has_every_layer() -> None:
    assert LAYERS.keys() == KINDS.keys()


@pytest.mark.parametrize("seed", range(300))
def test_random_networks(seed: int) -> None:
    net = random_network(seed)
    expected = network(net.inputs, net.weights, net.text)
    isas = _C.supported_instruction_sets()
    isa, dtype = isas[seed % len(isas)], (torch.float32, torch.float64)[seed % 4 == 3]
    weights = joined(net.weights, dtype)
    inputs = [tensor.to(dtype) for tensor in net.inputs]
    sizes = [size for tensor in inputs for size in tensor.shape]
    before = _C.instruction_set()
    _C.use_instruction_set(isa)
    try:
        packed = torch.ops.fastnn.network_packed(weights, net.text, sizes)
        with using_threads(1 + seed % 2):
            results = run(inputs, weights, packed, net.text)
            without = run(inputs, weights, packed[:0], net.text)
    finally:
        _C.use_instruction_set(before)
    for found, unpacked, wanted in zip(results, without, expected, strict=True):
        assert found.shape == wanted.shape
        scale = float(wanted.abs().max()) if wanted.numel() else 1.0
        tolerance = (2e-4 if dtype == torch.float32 else 1e-10) * max(scale, 0.1)
        limits = {"rtol": 0.0, "atol": tolerance, "equal_nan": True, "msg": net.text}
        torch.testing.assert_close(found.double(), wanted, **limits)
        torch.testing.assert_close(unpacked.double(), wanted, **limits)
