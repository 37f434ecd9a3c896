"""Forecasts sunspots (11 years) or carbon dioxide in the air (24 months) by a recurrent network that reads windows of
varying length.

python examples/forecast.py [--cell GRU] [--series sunspots] [--short] [--threads 1] [--output forecast.png]
"""

import argparse
from dataclasses import dataclass

import torch
from common import GREY, OURS, arguments, draw_losses, figure, predict_both, save, train_both
from statsmodels.datasets import co2, sunspots
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence


@dataclass
class Series:
    """A series, and how it is shown to a network: windows of two to six seasons, and the steps that follow each.

    ``ends`` are always the places (windows,) of the first step after each window.
    """

    unit: str
    times: Tensor
    values: Tensor
    season: int  # in steps, as is
    horizon: int  # how far a forecast goes
    scale: float  # The network sees (value - level) / scale.
    level: float | None  # None means the mean of a window's last season: what rises gets to where no window has been.

    def levels(self, ends: Tensor) -> Tensor:
        """What the network measures each window and what follows it from: (windows, 1)."""
        if self.level is not None:
            return torch.full((len(ends), 1), self.level)
        return self.values.unfold(0, self.season, 1)[ends - self.season].mean(1, keepdim=True)

    def windows(self, ends: Tensor) -> PackedSequence:
        """Windows of random length, as the network sees them, packed."""
        lengths = [int(torch.randint(2 * self.season, min(end, 6 * self.season) + 1, ())) for end in ends.tolist()]
        levels = self.levels(ends)
        pieces = zip(ends.tolist(), lengths, levels, strict=True)
        windows = [(self.values[end - length : end, None] - level) / self.scale for end, length, level in pieces]
        return pack_sequence([window.float() for window in windows], enforce_sorted=False)

    def follow(self, ends: Tensor) -> Tensor:
        """What follows in truth: (windows, horizon)."""
        return self.values.unfold(0, self.horizon, 1)[ends]

    def naive(self, ends: Tensor) -> Tensor:
        """The forecast that the last season comes again: (windows, horizon)."""
        return self.values[ends[:, None] - self.season + torch.arange(self.horizon) % self.season]


def sunspots_by_year() -> Series:
    data = sunspots.load_pandas().data
    times, values = (torch.tensor(data[name].to_numpy()) for name in ("YEAR", "SUNACTIVITY"))
    return Series("sunspots", times, values, season=11, horizon=11, scale=40, level=50)


def co2_by_month() -> Series:
    data = co2.load_pandas().data["co2"].resample("MS").mean().interpolate()
    times, values = torch.tensor(data.index.year + (data.index.month - 0.5) / 12), torch.tensor(data.to_numpy())
    return Series("CO2, parts per million", times, values, season=12, horizon=24, scale=4, level=None)


SERIES = {"sunspots": sunspots_by_year, "co2": co2_by_month}


class Forecaster(nn.Module):
    """Reads packed windows of one number a step, and forecasts what follows each: (windows, horizon)."""

    def __init__(self, cell: str, horizon: int, hidden: int = 16) -> None:  # More would learn 200 windows by heart.
        super().__init__()
        self.has_two_states = cell == "LSTM"
        self.recurrent = getattr(nn, cell)(1, hidden)
        self.head = nn.Linear(hidden, horizon)

    def forward(self, windows: PackedSequence) -> Tensor:
        _, state = self.recurrent(windows)
        hidden = state[0] if self.has_two_states else state
        return self.head(hidden[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cell", choices=("RNN", "GRU", "LSTM"), default="GRU", help="the recurrent layer (GRU)")
    parser.add_argument("--series", choices=tuple(SERIES), default="sunspots", help="what is forecast (sunspots)")
    given = arguments(parser, "forecast.png")
    series = SERIES[given.series]()
    known = int(0.85 * len(series.values))  # What comes later is for the test.
    train = torch.arange(2 * series.season, known - series.horizon + 1)
    test = torch.arange(known, len(series.values) - series.horizon + 1)

    def batch(ends: Tensor) -> tuple[PackedSequence, Tensor]:
        return series.windows(ends), ((series.follow(ends) - series.levels(ends)) / series.scale).float()

    count = 8 if given.short else 30
    epochs = [[batch(ends) for ends in train[torch.randperm(len(train))].split(32)] for _ in range(count)]
    stock, ours = train_both(Forecaster(given.cell, series.horizon), nn.MSELoss(), epochs, lr=2e-3)

    forecast = series.levels(test) + series.scale * predict_both(ours.model, series.windows(test))
    errors, naive_errors = ((made - series.follow(test)).abs() for made in (forecast, series.naive(test)))
    error, naive = float(errors.mean()), float(naive_errors.mean())
    print(f"mean absolute error on {len(test)} windows not trained on: {error:.2f}, seasonal naive {naive:.2f}")
    assert given.short or error < naive

    drawing, (left, right) = figure(2)
    draw_losses(left, stock, ours)
    end, last, band = int(test[-1]), forecast[-1], errors.quantile(0.8, dim=0)
    shown, ahead = series.times[end - 3 * series.season :], series.times[end:]
    right.plot(shown, series.values[-len(shown) :], color=GREY, label="truth")
    right.plot(ahead, series.naive(test)[-1], ":", color=GREY, label=f"seasonal naive: error {naive:.2f}")
    right.plot(ahead, last, color=OURS, label=f"{given.cell}: error {error:.2f}")
    right.fill_between(ahead, last - band, last + band, color=OURS, alpha=0.25, linewidth=0)
    right.set(xlabel="year", ylabel=series.unit, title="four of five errors are within the band")
    low, high = right.get_ylim()
    right.set_ylim(low, high + 0.4 * (high - low))  # room for the legend
    right.legend(frameon=False, labelcolor=GREY, loc="upper left")
    save(drawing, given.output)


if __name__ == "__main__":
    main()
