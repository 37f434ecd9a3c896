"""What the recurrent layers keep for backward."""

import pytest
import torch
from torch import Tensor

import fastnn.nn


def bytes_saved(layer: torch.nn.Module, x: Tensor) -> int:
    """Of the distinct storages that the graph of a call holds, its parameters aside."""
    storages: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        storages[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        output = layer(x)  # which keeps what is saved, so that no address is used twice
    del output
    for parameter in layer.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storages.values())


@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
def test_no_more_is_saved_than_by_stock(cell: str) -> None:
    x = torch.randn(16, 64, 32, requires_grad=True)
    stock = bytes_saved(getattr(torch.nn, cell)(32, 64, 2, batch_first=True), x)
    ours = bytes_saved(getattr(fastnn.nn, cell)(32, 64, 2, batch_first=True), x)
    assert x.nbytes <= ours <= stock
