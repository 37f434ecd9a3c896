"""Networks of text, series and other sequences, on torch.nn alone, in our own words."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class CharCnn(nn.Module):
    """A small one after Zhang et al. 2015: characters as channels, convolutions along the text."""

    def __init__(self, characters: int = 70, width: int = 64, classes: int = 4, length: int = 200) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                nn.Sequential(nn.Conv1d(characters, width, 7), nn.ReLU(), nn.MaxPool1d(3)),
                nn.Sequential(nn.Conv1d(width, width, 7), nn.ReLU(), nn.MaxPool1d(3)),
                nn.Sequential(nn.Conv1d(width, width, 3), nn.ReLU()),
            ]
        )
        after = ((length - 6) // 3 - 6) // 3 - 2
        self.linear = nn.Sequential(nn.Linear(width * after, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, classes))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.linear(x.reshape(x.size(0), -1))


class CharRnn(nn.Module):
    """Text, a character at a time: the state is handed on from call to call."""

    def __init__(self, characters: int = 50, hidden: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, hidden)
        self.rnn = nn.GRU(hidden, hidden, layers, batch_first=True)
        self.decoder = nn.Linear(hidden, characters)

    def forward(self, text: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        output, state = self.rnn(self.embedding(text), state)
        return self.decoder(output), state


class Tagger(nn.Module):
    """PyTorch's part-of-speech tutorial: a tag for each step."""

    def __init__(self, words: int = 100, embedding: int = 32, hidden: int = 48, tags: int = 7) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(words, embedding)
        self.lstm = nn.LSTM(embedding, hidden)
        self.hidden2tag = nn.Linear(hidden, tags)

    def forward(self, sentence: Tensor) -> Tensor:
        output, _ = self.lstm(self.embeddings(sentence))
        return F.log_softmax(self.hidden2tag(output), dim=-1)


class Forecaster(nn.Module):
    """PyTorch's time series example: two cells in a Python loop, and on into the future by their own output."""

    def __init__(self, hidden: int = 51) -> None:
        super().__init__()
        self.hidden = hidden
        self.lstm1, self.lstm2 = nn.LSTMCell(1, hidden), nn.LSTMCell(hidden, hidden)
        self.linear = nn.Linear(hidden, 1)

    def forward(self, input: Tensor, future: int = 0) -> Tensor:
        outputs = []
        h1, c1, h2, c2 = (torch.zeros(input.size(0), self.hidden, dtype=input.dtype) for _ in range(4))
        for step in input.split(1, dim=1):
            h1, c1 = self.lstm1(step, (h1, c1))
            h2, c2 = self.lstm2(h1, (h2, c2))
            outputs.append(self.linear(h2))
        for _ in range(future):
            h1, c1 = self.lstm1(outputs[-1], (h1, c1))
            h2, c2 = self.lstm2(h1, (h2, c2))
            outputs.append(self.linear(h2))
        return torch.cat(outputs, dim=1)


class Crnn(nn.Module):
    """Shi et al. 2015, smaller: convolutions, then a bidirectional LSTM along the width; uneven pools."""

    def __init__(self, classes: int = 37, width: int = 16) -> None:
        super().__init__()
        self.cnn = nn.Sequential(
            *(nn.Conv2d(1, width, 3, 1, 1), nn.ReLU(True), nn.MaxPool2d(2, 2)),
            *(nn.Conv2d(width, 2 * width, 3, 1, 1), nn.ReLU(True), nn.MaxPool2d(2, 2)),
            *(nn.Conv2d(2 * width, 4 * width, 3, 1, 1), nn.BatchNorm2d(4 * width), nn.ReLU(True)),
            *(nn.Conv2d(4 * width, 4 * width, 3, 1, 1), nn.ReLU(True), nn.MaxPool2d((2, 2), (2, 1), (0, 1))),
            *(nn.Conv2d(4 * width, 4 * width, 3, 1, 1), nn.BatchNorm2d(4 * width), nn.ReLU(True)),
            *(nn.Conv2d(4 * width, 4 * width, 3, 1, 1), nn.ReLU(True), nn.MaxPool2d((2, 2), (2, 1), (0, 1))),
            *(nn.Conv2d(4 * width, 4 * width, 2), nn.ReLU(True)),
        )
        self.rnn = nn.LSTM(4 * width, 32, bidirectional=True)
        self.output = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        features = self.cnn(x).squeeze(2).permute(2, 0, 1)
        output, _ = self.rnn(features)
        steps, batch, hidden = output.size()
        return self.output(output.view(steps * batch, hidden)).view(steps, batch, -1)


class Sentiment(nn.Module):
    """Packed sentences of different lengths; the last state of either direction decides."""

    def __init__(self, words: int = 200, embedding: int = 32, hidden: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, embedding, padding_idx=0)
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True, bidirectional=True, dropout=0.3)
        self.dropout = nn.Dropout(0.3)
        self.fc = nn.Linear(2 * hidden, 1)

    def forward(self, text: Tensor, lengths: Tensor) -> Tensor:
        embedded = self.dropout(self.embedding(text))
        packed = pack_padded_sequence(embedded, lengths.cpu(), batch_first=True, enforce_sorted=False)
        output, (hidden, _) = self.lstm(packed)
        pad_packed_sequence(output, batch_first=True)
        return self.fc(self.dropout(torch.cat([hidden[-2], hidden[-1]], dim=1))).squeeze(1)


class TemporalBlock(nn.Module):
    def __init__(self, channels: int, out: int, dilation: int) -> None:
        super().__init__()
        self.padding = 2 * dilation
        self.conv1 = weight_norm(nn.Conv1d(channels, out, 3, padding=self.padding, dilation=dilation))
        self.conv2 = weight_norm(nn.Conv1d(out, out, 3, padding=self.padding, dilation=dilation))
        self.relu, self.dropout = nn.ReLU(), nn.Dropout(0.2)
        self.downsample = nn.Conv1d(channels, out, 1) if channels != out else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.relu(self.conv1(x)[:, :, : -self.padding].contiguous()))
        y = self.dropout(self.relu(self.conv2(y)[:, :, : -self.padding].contiguous()))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class Tcn(nn.Module):
    """Bai et al. 2018: dilated causal convolutions with weight_norm."""

    def __init__(self, channels: int = 1, width: int = 24, classes: int = 10) -> None:
        super().__init__()
        sizes = [channels, width, width, width]
        self.network = nn.Sequential(*(TemporalBlock(sizes[i], sizes[i + 1], 2**i) for i in range(3)))
        self.linear = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.linear(self.network(x)[:, :, -1]), dim=1)


class WaveNet(nn.Module):
    """van den Oord et al. 2016, small: dilated causal convolutions with gates, skips added up on the way."""

    def __init__(self, width: int = 16, blocks: int = 8) -> None:
        super().__init__()
        self.inlet = nn.Conv1d(1, width, 1)
        self.gated = nn.ModuleList(nn.Conv1d(width, 2 * width, 2, dilation=2**i) for i in range(blocks))
        self.mixing = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(blocks))
        self.outlet = nn.Sequential(nn.ReLU(), nn.Conv1d(width, 2 * width, 1), nn.ReLU(), nn.Conv1d(2 * width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.inlet(x), None
        for gated, mixing in zip(self.gated, self.mixing, strict=True):
            value, gate = gated(F.pad(x, (gated.dilation[0], 0))).chunk(2, 1)
            y = mixing(torch.tanh(value) * torch.sigmoid(gate))
            x, skips = x + y, y if skips is None else skips + y
        return self.outlet(skips)


class Agent(nn.Module):
    """A recurrent agent: what it sees and its state go in, actions' logits, the value of the state, and the next state
    come out."""

    def __init__(self, seen: int = 12, actions: int = 4, hidden: int = 64) -> None:
        super().__init__()
        self.inlet, self.cell = nn.Linear(seen, hidden), nn.GRUCell(hidden, hidden)
        self.actor, self.critic = nn.Linear(hidden, actions), nn.Linear(hidden, 1)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state = self.cell(F.relu(self.inlet(x)), state)
        return self.actor(state), self.critic(state).squeeze(-1), state
