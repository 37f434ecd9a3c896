"""What each entry of fastnn makes of a list of models. Every cell of the table is an answer of the code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastnn
from fastnn.graph.matcher import match

# ---- models that no nn.Sequential can be -----------------------------------------------------------------------------


class Residual(nn.Module):
    """A block whose input is added to its output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv2(torch.relu(self.conv1(x))) + x)


class LastStep(nn.Module):
    """A recurrent layer, and a linear layer that takes its last step."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear((1 + layer.bidirectional) * layer.hidden_size, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


class Loop(nn.Module):
    """A cell that is called once a step."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state[0] if isinstance(state, tuple) else state


class Attention(nn.Module):
    """A sequence that attends to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


# ---- the list -------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A model, and the sizes of its input."""

    make: Callable[[], nn.Module]
    sizes: tuple[int, ...]


def _chain(sizes: tuple[int, ...], *layers: Callable[[], nn.Module]) -> Row:
    return Row(lambda: nn.Sequential(*(layer() for layer in layers)), sizes)


def _conv(d: int = 2, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(nn, f"Conv{d}d")(4, 4, 3, **settings)


def _linear(into: int, out: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(into, out)


_IMAGES, _ROWS, _SEQUENCES = (4, 4, 12, 12), (4, 6), (4, 5, 6)
_POOL, _NORM = lambda: nn.MaxPool2d(2), lambda: nn.BatchNorm2d(4)
MODELS: dict[str, Row] = {
    "Conv1d, ReLU, MaxPool1d": _chain((4, 4, 12), _conv(1), nn.ReLU, lambda: nn.MaxPool1d(2)),
    "Conv2d, ReLU, MaxPool2d": _chain(_IMAGES, _conv(), nn.ReLU, _POOL),
    "Conv3d, ReLU, MaxPool3d": _chain((4, 4, 8, 8, 8), _conv(3), nn.ReLU, lambda: nn.MaxPool3d(2)),
    "Conv2d, MaxPool2d, ReLU": _chain(_IMAGES, _conv(), _POOL, nn.ReLU),
    "Conv2d, ReLU": _chain(_IMAGES, _conv(), nn.ReLU),
    "Conv2d, BatchNorm2d, ReLU, MaxPool2d": _chain(_IMAGES, _conv(), _NORM, nn.ReLU, _POOL),
    "Conv2d, BatchNorm2d, ReLU": _chain(_IMAGES, _conv(), _NORM, nn.ReLU),
    "BatchNorm2d, ReLU, MaxPool2d": _chain(_IMAGES, _NORM, nn.ReLU, _POOL),
    "Conv2d alone": _chain(_IMAGES, _conv()),
    "Conv2d, GELU": _chain(_IMAGES, _conv(), nn.GELU),
    "Conv2d, PReLU": _chain(_IMAGES, _conv(), nn.PReLU),
    "Conv2d with reflect padding, ReLU": _chain(_IMAGES, _conv(padding=1, padding_mode="reflect"), nn.ReLU),
    "Conv2d with weight_norm, ReLU": _chain(_IMAGES, lambda: parametrizations.weight_norm(_conv()()), nn.ReLU),
    "Conv2d with spectral_norm, ReLU": _chain(_IMAGES, lambda: parametrizations.spectral_norm(_conv()()), nn.ReLU),
    "Conv2d, ReLU, AvgPool2d": _chain(_IMAGES, _conv(), nn.ReLU, lambda: nn.AvgPool2d(2)),
    "Conv2d, ReLU, AdaptiveAvgPool2d, Flatten, Linear": _chain(
        _IMAGES, _conv(), nn.ReLU, lambda: nn.AdaptiveAvgPool2d(1), nn.Flatten, _linear(4, 2)
    ),
    "ConvTranspose2d, ReLU": _chain(_IMAGES, lambda: nn.ConvTranspose2d(4, 4, 3), nn.ReLU),
    "a residual block of Conv2d and ReLU": Row(Residual, _IMAGES),
    "Linear alone": _chain(_ROWS, _linear(6, 8)),
    "Linear, ReLU, Linear": _chain(_ROWS, _linear(6, 8), nn.ReLU, _linear(8, 2)),
    "Linear, ReLU, Dropout, Linear": _chain(_ROWS, _linear(6, 8), nn.ReLU, nn.Dropout, _linear(8, 2)),
    "Linear, BatchNorm1d, ReLU, Linear": _chain(
        _ROWS, _linear(6, 8), lambda: nn.BatchNorm1d(8), nn.ReLU, _linear(8, 2)
    ),
    "Linear, LayerNorm, ReLU, Linear": _chain(_ROWS, _linear(6, 8), lambda: nn.LayerNorm(8), nn.ReLU, _linear(8, 2)),
    "RNN, Linear on its last step": Row(lambda: LastStep(nn.RNN(6, 8, batch_first=True)), _SEQUENCES),
    "GRU, Linear on its last step": Row(lambda: LastStep(nn.GRU(6, 8, batch_first=True)), _SEQUENCES),
    "LSTM, Linear on its last step": Row(lambda: LastStep(nn.LSTM(6, 8, batch_first=True)), _SEQUENCES),
    "LSTM of two directions, Linear on its last step": Row(
        lambda: LastStep(nn.LSTM(6, 8, batch_first=True, bidirectional=True)), _SEQUENCES
    ),
    "RNNCell in a loop": Row(lambda: Loop(nn.RNNCell(6, 8)), _SEQUENCES),
    "GRUCell in a loop": Row(lambda: Loop(nn.GRUCell(6, 8)), _SEQUENCES),
    "LSTMCell in a loop": Row(lambda: Loop(nn.LSTMCell(6, 8)), _SEQUENCES),
    "MultiheadAttention": Row(Attention, _SEQUENCES),
    "TransformerEncoderLayer, Linear": _chain(
        _SEQUENCES, lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), _linear(6, 2)
    ),
}

# ---- and what becomes of a model ------------------------------------------------------------------------------------

TORCHS = "torch's own"


def fused(row: Row) -> str:
    """The operators that run the fused model's layers, in training and in inference."""
    answers = {}
    for mode in ("training", "inference"):
        found = fastnn.explain(fastnn.fuse(row.make()).train(mode == "training"))
        names = _names([call.operator for call in found.calls])
        is_mixed = names != TORCHS and any(call.is_candidate for call in found.left)
        answers[mode] = f"{names} and {TORCHS}" if is_mixed else names
    training, inference = answers.values()
    return training if training == inference else f"training: {training}; inference: {inference}"


def frozen(row: Row) -> str:
    """In how many calls the frozen model runs."""
    try:
        result = fastnn.freeze(row.make().eval(), torch.randn(row.sizes))
    except ValueError:
        return "refused"
    return "one call" if isinstance(result, fastnn.FrozenModel) else "one call a network"


_WAYS = {"one operator call": "one call", "forward and backward": "the ordinary way"}


def trained(row: Row) -> str:
    """In how many calls a training step runs, with a loss and an optimizer of its tables."""
    model = row.make()
    step = fastnn.training_step(model, nn.functional.mse_loss, torch.optim.Adam(model.parameters()))
    explained = step.explain()
    return next(words for beginning, words in _WAYS.items() if explained.startswith(beginning))


def captured(row: Row) -> str:
    """The operators that the backend puts into what torch.compile captures of the model, in inference."""
    found: list[str] = []

    def capture(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        found.extend(one.operator for one in match(graph.graph, dict(graph.named_modules())).found)
        return graph.forward

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(row.make().eval(), backend=capture)(torch.randn(row.sizes))
    return _names(found)


def _names(operators: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in dict.fromkeys(operators)) or TORCHS


ENTRIES = {
    "`fuse`": fused,
    "`freeze`": frozen,
    "`training_step`": trained,
    '`backend="fastnn"`': captured,
}
