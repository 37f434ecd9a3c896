"""Recognizes handwritten digits (scikit-learn's, 8x8 pixels) by a convolutional network with batch norm and dropout.

python examples/digits.py [--short] [--threads 1] [--output digits.png]
"""

import argparse

import torch
from common import GREY, Rows, arguments, draw_losses, figure, predict_both, save, train_both
from sklearn.datasets import load_digits
from sklearn.metrics import confusion_matrix
from torch import nn


def network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def main() -> None:
    given = arguments(argparse.ArgumentParser(description=__doc__.splitlines()[0]), "digits.png")
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images))
    train, test = order[:1400], order[1400:]
    epochs = [Rows(images[train], labels[train], 32)] * (5 if given.short else 25)

    stock, ours = train_both(network(), nn.CrossEntropyLoss(), epochs, lr=2e-3)
    predicted = predict_both(ours.model, images[test]).argmax(1)
    accuracy = float((predicted == labels[test]).double().mean())
    print(f"accuracy on {len(test)} digits that were not trained on: {accuracy:.1%}")
    assert accuracy > 0.95

    drawing, (left, right) = figure(2)
    draw_losses(left, stock, ours)
    matrix = confusion_matrix(labels[test], predicted)
    right.imshow(matrix, cmap="Oranges")
    for row, column in zip(*matrix.nonzero(), strict=True):
        color = "white" if matrix[row, column] > matrix.max() / 2 else "black"
        right.text(column, row, str(matrix[row, column]), ha="center", va="center", fontsize=7, color=color)
    right.set(xlabel="predicted", ylabel="true", title=f"{accuracy:.1%} right", xticks=range(10), yticks=range(10))
    right.title.set_color(GREY)
    save(drawing, given.output)


if __name__ == "__main__":
    main()
