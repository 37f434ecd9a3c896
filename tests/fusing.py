"""What tests of fuse share."""

from typing import Any

from torch import nn

import fastnn
from fastnn.graph.rehearsal import copied


def fused_copy(model: nn.Module, *args: Any, **options: Any) -> nn.Module:
    """A fused copy, beside the stock model that it is held against."""
    return fastnn.fuse(copied(model), *args, **options)
