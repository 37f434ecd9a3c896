"""Real models, against which ``fuse``, ``explain``, ``freeze`` and the backend are held."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo import images, rows, sequences


@dataclass(frozen=True)
class Entry:
    """A model at the size in which tests take it, and at which it is measured."""

    small: Callable[[], nn.Module]
    small_inputs: Callable[[], tuple[Any, ...]]
    real: Callable[[], nn.Module]
    real_inputs: Callable[[], tuple[Any, ...]]


def _images(*shape: int) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randn(shape),)


def _text(words: int, *shape: int) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randint(words, shape),)


def _sentences(batch: int, longest: int) -> Callable[[], tuple[Tensor, Tensor]]:
    lengths = torch.tensor([longest - 3 * i % (longest - 1) for i in range(batch)])
    return lambda: (torch.randint(1, 200, (batch, longest)), lengths)


def _rows_and_state(batch: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (torch.randn(batch, 12), torch.randn(batch, 64))


def _same(model: Callable[[], nn.Module], small: Any, real: Any) -> Entry:
    return Entry(model, small, model, real)


ZOO: dict[str, Entry] = {
    "LeNet-5": _same(images.LeNet5, _images(3, 1, 28, 28), _images(32, 1, 28, 28)),
    "CIFAR tutorial": _same(images.CifarNet, _images(4, 3, 32, 32), _images(32, 3, 32, 32)),
    "MNIST example": _same(images.MnistNet, _images(3, 1, 28, 28), _images(32, 1, 28, 28)),
    "AlexNet": Entry(lambda: images.AlexNet(7, 1 / 16), _images(2, 3, 96, 96), images.AlexNet, _images(4, 3, 224, 224)),
    "VGG-11 bn": Entry(lambda: images.Vgg11(7, 1 / 16), _images(3, 3, 64, 64), images.Vgg11, _images(1, 3, 224, 224)),
    "SqueezeNet 1.1": Entry(
        lambda: images.SqueezeNet(9, 1 / 4), _images(2, 3, 65, 65), images.SqueezeNet, _images(1, 3, 224, 224)
    ),
    "ResNet-18": Entry(
        lambda: images.ResNet18(7, 1 / 8), _images(3, 3, 64, 64), images.ResNet18, _images(1, 3, 224, 224)
    ),
    "U-Net": Entry(lambda: images.UNet(1, 2, 4), _images(2, 1, 20, 24), images.UNet, _images(2, 1, 128, 128)),
    "MobileNetV2": Entry(
        lambda: images.MobileNet(7, 1 / 4), _images(3, 3, 64, 64), images.MobileNet, _images(1, 3, 160, 160)
    ),
    "Inception": Entry(lambda: images.Inception(5, 2), _images(3, 3, 12, 12), images.Inception, _images(4, 3, 64, 64)),
    "convolutional autoencoder": Entry(
        lambda: images.ConvAutoencoder(4), _images(3, 1, 12, 12), images.ConvAutoencoder, _images(16, 1, 28, 28)
    ),
    "squeeze and excite": Entry(
        lambda: images.SqueezeExcite(5, 8), _images(3, 3, 12, 12), images.SqueezeExcite, _images(8, 3, 32, 32)
    ),
    "M5": Entry(lambda: images.M5(5, 8), _images(3, 1, 8000), images.M5, _images(16, 1, 8000)),
    "C3D": Entry(lambda: images.C3D(5, 4), _images(2, 3, 8, 16, 16), images.C3D, _images(4, 3, 8, 16, 16)),
    "Char-CNN": Entry(lambda: sequences.CharCnn(10, 12), _images(3, 10, 200), sequences.CharCnn, _images(16, 70, 200)),
    "char-RNN": Entry(lambda: sequences.CharRnn(50, 16), _text(50, 3, 9), sequences.CharRnn, _text(50, 16, 50)),
    "LSTM tagger": _same(sequences.Tagger, _text(100, 7), _text(100, 20)),
    "cell forecaster": Entry(lambda: sequences.Forecaster(11), _images(3, 8), sequences.Forecaster, _images(16, 100)),
    "CRNN": Entry(lambda: sequences.Crnn(9, 4), _images(2, 1, 32, 40), sequences.Crnn, _images(8, 1, 32, 100)),
    "packed sentiment": _same(sequences.Sentiment, _sentences(4, 9), _sentences(32, 40)),
    "TCN": Entry(lambda: sequences.Tcn(1, 8), _images(3, 1, 40), sequences.Tcn, _images(16, 1, 400)),
    "WaveNet": Entry(lambda: sequences.WaveNet(4, 3), _images(3, 1, 20), sequences.WaveNet, _images(4, 1, 1024)),
    "agent": _same(sequences.Agent, _rows_and_state(3), _rows_and_state(1)),
    "VAE": Entry(lambda: rows.Vae(40, 24, 6), _images(5, 1, 5, 8), rows.Vae, _images(128, 1, 28, 28)),
    "denoising autoencoder": _same(rows.DenoisingAutoencoder, _images(6, 128), _images(64, 128)),
    "policy": _same(rows.Policy, _images(5, 8), _images(1, 8)),
    "MLP with batch norm": _same(rows.MlpWithBatchNorm, _images(8, 30), _images(64, 30)),
}
