"""Tells four kinds of signals apart (sine, square, sawtooth and chirp, in noise) by a 1-d convolutional network.

python examples/signals.py [--short] [--threads 1] [--output signals.png]
"""

import argparse
import math

import torch
from common import GREY, OURS, Rows, arguments, draw_losses, figure, predict_both, save, train_both
from torch import Tensor, nn

KINDS = ("sine", "square", "sawtooth", "chirp")
SAMPLES = 128


def signals(count: int) -> tuple[Tensor, Tensor]:
    """So many signals (count, 1, SAMPLES) of random frequency and phase in noise, and their kinds (count)."""
    time = torch.linspace(0, 1, SAMPLES)
    labels = torch.randint(len(KINDS), (count,))
    frequency, phase = 3 + 7 * torch.rand(count, 1), 2 * math.pi * torch.rand(count, 1)
    angle = 2 * math.pi * frequency * time + phase
    shapes = torch.stack(
        [
            torch.sin(angle),
            torch.sign(torch.sin(angle)),
            (angle / math.pi) % 2 - 1,
            torch.sin(2 * math.pi * frequency * time * (0.5 + time) + phase),
        ]
    )
    clean = shapes[labels, torch.arange(count)]
    return (clean + 0.5 * torch.randn_like(clean))[:, None], labels


def network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv1d(1, 16, 9, padding=4), nn.ReLU(), nn.MaxPool1d(2)),
        *(nn.Conv1d(16, 32, 9, padding=4), nn.ReLU(), nn.MaxPool1d(2)),
        *(nn.Conv1d(32, 32, 5, padding=2), nn.ReLU(), nn.MaxPool1d(2)),
        *(nn.Flatten(), nn.Linear(32 * SAMPLES // 8, 32), nn.ReLU(), nn.Linear(32, len(KINDS))),
    )


def main() -> None:
    given = arguments(argparse.ArgumentParser(description=__doc__.splitlines()[0]), "signals.png")
    x, labels = signals(2000)
    unseen, kinds = signals(500)
    epochs = [Rows(x, labels, 50)] * (6 if given.short else 20)
    stock, ours = train_both(network(), nn.CrossEntropyLoss(), epochs, lr=2e-3)
    predicted = predict_both(ours.model, unseen).argmax(1)
    accuracy = float((predicted == kinds).double().mean())
    print(f"accuracy on {len(unseen)} new signals: {accuracy:.1%}")
    assert accuracy > 0.7

    drawing, (left, right) = figure(2)
    draw_losses(left, stock, ours)
    for place, kind in enumerate(KINDS):
        example = int((kinds == place).nonzero()[0])
        right.plot(unseen[example, 0] - 5 * place, color=OURS, linewidth=0.9)
        right.text(0, 2.2 - 5 * place, f"{kind}: called {KINDS[int(predicted[example])]}", color=GREY, fontsize=8)
    right.set(yticks=[], xlabel="sample", title=f"{accuracy:.1%} right")
    save(drawing, given.output)


if __name__ == "__main__":
    main()
