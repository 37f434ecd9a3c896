"""How random numbers are layers of a network, in training: dropouts by their functions, noise, and what is drawn in
place. (The modules of dropouts the reader itself knows.)"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from fastnn.graph.reader import NotANetworkError, Reader, row
from fastnn.graph.shape_layers import sizes_of_constant
from fastnn.network_program import Value

_DROPOUTS_OF_CHANNELS = {getattr(F, f"dropout{d}d"): d for d in (1, 2, 3)}


@row(*_DROPOUTS_OF_CHANNELS)
def _dropout_of_channels(
    read: Reader, node: Node, x: Any, p: float = 0.5, training: bool = True, inplace: bool = False
) -> None:
    read.dropout(node, read.data(x), p if training else 0.0, _DROPOUTS_OF_CHANNELS[node.target])


@row(F.alpha_dropout)
def _alpha_dropout(
    read: Reader, node: Node, x: Any, p: float = 0.5, training: bool = False, inplace: bool = False
) -> None:
    if training:
        read.alpha_dropout(node, read.data(x), p)
    else:
        read.values[node] = read.data(x)


@row(torch.randn_like)
def _randn_like(read: Reader, node: Node, x: Any, **named: Any) -> None:
    _add_noise(read, node, sizes_of_constant(read, None, read.data(x), **named), "normal")


@row(torch.rand_like)
def _rand_like(read: Reader, node: Node, x: Any, **named: Any) -> None:
    _add_noise(read, node, sizes_of_constant(read, None, read.data(x), **named), "uniform")


@row(torch.randn)
def _randn(read: Reader, node: Node, *sizes: Any, **named: Any) -> None:
    _add_noise(read, node, sizes_of_constant(read, sizes, None, **named), "normal")


@row(torch.rand)
def _rand(read: Reader, node: Node, *sizes: Any, **named: Any) -> None:
    _add_noise(read, node, sizes_of_constant(read, sizes, None, **named), "uniform")


@row(torch.empty)
def _empty(read: Reader, node: Node, *sizes: Any, **named: Any) -> None:
    read.empties[node] = sizes_of_constant(read, sizes, None, **named)


@row("new_empty")
def _new_empty(read: Reader, node: Node, x: Any, *sizes: Any, **named: Any) -> None:
    read.empties[node] = sizes_of_constant(read, sizes, read.data(x), **named)


@row(torch.empty_like)
def _empty_like(read: Reader, node: Node, x: Any, **named: Any) -> None:
    read.empties[node] = sizes_of_constant(read, None, read.data(x), **named)


@row("bernoulli_")
def _bernoulli(read: Reader, node: Node, x: Any, p: Any = 0.5) -> None:
    if type(p) not in (int, float) or not 0 <= p <= 1:
        raise NotANetworkError("the probability of a one is no number from 0 to 1")
    _fill_by_noise(read, node, x, "bernoulli", p=float(p))


@row("uniform_")
def _uniform(read: Reader, node: Node, x: Any) -> None:
    _fill_by_noise(read, node, x, "uniform")


@row("normal_")
def _normal(read: Reader, node: Node, x: Any) -> None:
    _fill_by_noise(read, node, x, "normal")


def _fill_by_noise(read: Reader, node: Node, x: Any, distribution: str, **attributes: Any) -> None:
    if x not in read.empties:
        raise NotANetworkError("random numbers are written to what a network has computed")
    _add_noise(read, node, read.empties[x], distribution, **attributes)


def _add_noise(
    read: Reader, node: Node, sizes: tuple[dict[str, list[Value]], dict[str, Any]], distribution: str, **more: Any
) -> None:
    inputs, attributes = sizes
    read.add(node, "noise", inputs, **attributes, distribution=distribution, **more)
    read.draws = True
