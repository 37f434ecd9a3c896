"""Takes a torch.nn model of yours: explains it, fuses it, freezes it and trains it, beside stock PyTorch.

    python examples/yours.py model.py:make --input 32,3,32,32 [--short] [--threads 1] [--output yours.png]

``make`` is a function without arguments, a class, or a model. Without a file the example takes a network of its own.
"""

import argparse
import copy

import torch
from common import arguments, draw_losses, figure, predict_both, save, seconds_of, train_both
from torch import nn

import fastnn
from fastnn.loading import load_model, random_inputs


def network() -> nn.Module:
    """A network for images of 3 channels, for those who have none at hand."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 36, 64), nn.Softplus(), nn.Linear(64, 10)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="file.py:name")
    parser.add_argument("--input", default="32,3,32,32", help="the sizes of its input (32,3,32,32)")
    given = arguments(parser, "yours.png")
    model = load_model(given.model) if given.model else network()
    (x,) = random_inputs([given.input])

    print(fastnn.explain(model.eval(), x))
    fused = fastnn.fuse(copy.deepcopy(model))
    with torch.no_grad():
        target = model(x)
        torch.testing.assert_close(fused(x), target, rtol=1e-3, atol=1e-4)
        of_stock, of_fused = seconds_of((model, fused), x)
    print(f"fused, it predicts {of_stock / of_fused:.1f} times as fast")
    predict_both(model, x)

    steps = 40 if given.short else 400
    stock, ours = train_both(model, nn.MSELoss(), [[(x, torch.randn_like(target))] * steps], lr=1e-3)
    drawing, (axes,) = figure(1)
    draw_losses(axes, stock, ours)
    save(drawing, given.output)


if __name__ == "__main__":
    main()
