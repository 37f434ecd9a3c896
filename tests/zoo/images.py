"""Networks of images, volumes and sound, on torch.nn alone, in our own words. `width` scales the channels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LeNet5(nn.Module):
    """LeCun et al. 1998, with ReLU and max-pooling, as tutorials have it: modules, one after another."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.classifier = nn.Sequential(
            nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class CifarNet(nn.Module):
    """The classifier of PyTorch's CIFAR10 tutorial: one pool for both convolutions, functions for ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.conv1, self.conv2):
            x = self.pool(F.relu(conv(x)))
        x = torch.flatten(x, 1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class MnistNet(nn.Module):
    """Of PyTorch's MNIST example: two convolutions before one pool, Dropout, log_softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3)
        self.dropout1, self.dropout2 = nn.Dropout(0.25), nn.Dropout(0.5)
        self.fc1, self.fc2 = nn.Linear(9216, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = torch.flatten(self.dropout1(x), 1)
        x = self.dropout2(F.relu(self.fc1(x)))
        return F.log_softmax(self.fc2(x), dim=1)


class AlexNet(nn.Module):
    """Krizhevsky 2014, "One weird trick", overlapping pools and Dropout before the linear layers."""

    def __init__(self, classes: int = 1000, width: float = 1) -> None:
        super().__init__()
        a, b, c, d = (int(width * channels) for channels in (64, 192, 384, 256))
        hidden = int(width * 4096)
        self.features = nn.Sequential(
            *(nn.Conv2d(3, a, 11, stride=4, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(a, b, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(b, c, 3, padding=1), nn.ReLU(inplace=True)),
            *(nn.Conv2d(c, d, 3, padding=1), nn.ReLU(inplace=True)),
            *(nn.Conv2d(d, d, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        self.classifier = nn.Sequential(
            *(nn.Dropout(), nn.Linear(d * 36, hidden), nn.ReLU(inplace=True)),
            *(nn.Dropout(), nn.Linear(hidden, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, classes)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


class Vgg11(nn.Module):
    """Simonyan and Zisserman 2015, configuration A, with batch norm."""

    def __init__(self, classes: int = 1000, width: float = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for item in (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"):
            if isinstance(item, str):
                layers.append(nn.MaxPool2d(2))
                continue
            out = int(width * item)
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
            channels = out
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        hidden = int(width * 4096)
        self.classifier = nn.Sequential(
            *(nn.Linear(channels * 49, hidden), nn.ReLU(True), nn.Dropout()),
            *(nn.Linear(hidden, hidden), nn.ReLU(True), nn.Dropout(), nn.Linear(hidden, classes)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


class Fire(nn.Module):
    def __init__(self, channels: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.squeeze(x))
        return torch.cat([self.activation(self.expand1x1(x)), self.activation(self.expand3x3(x))], 1)


class SqueezeNet(nn.Module):
    """Iandola et al. 2016, version 1.1: convolutions in parallel, joined, and no linear layer."""

    def __init__(self, classes: int = 1000, width: float = 1) -> None:
        super().__init__()
        s = [int(width * channels) for channels in (16, 32, 48, 64)]
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 64, 3, stride=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, ceil_mode=True)),
            *(Fire(64, s[0], 4 * s[0]), Fire(8 * s[0], s[0], 4 * s[0]), nn.MaxPool2d(3, 2, ceil_mode=True)),
            *(Fire(8 * s[0], s[1], 4 * s[1]), Fire(8 * s[1], s[1], 4 * s[1]), nn.MaxPool2d(3, 2, ceil_mode=True)),
            *(Fire(8 * s[1], s[2], 4 * s[2]), Fire(8 * s[2], s[2], 4 * s[2])),
            *(Fire(8 * s[2], s[3], 4 * s[3]), Fire(8 * s[3], s[3], 4 * s[3])),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(0.5), nn.Conv2d(8 * s[3], classes, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(self.classifier(self.features(x)), 1)


class BasicBlock(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet18(nn.Module):
    """He et al. 2016: a stem with a 3/2/1 pool, then residual blocks."""

    def __init__(self, classes: int = 1000, width: float = 1) -> None:
        super().__init__()
        sizes = [int(width * channels) for channels in (64, 128, 256, 512)]
        self.conv1 = nn.Conv2d(3, sizes[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(sizes[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        blocks: list[nn.Module] = []
        channels = sizes[0]
        for i, out in enumerate(sizes):
            blocks.append(nn.Sequential(BasicBlock(channels, out, 1 if i == 0 else 2), BasicBlock(out, out, 1)))
            channels = out
        self.layers = nn.Sequential(*blocks)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.avgpool(self.layers(x))
        return self.fc(torch.flatten(x, 1))


class UNet(nn.Module):
    """A small one after Ronneberger et al. 2015: each pool's input is used once more, on the way up."""

    def __init__(self, channels: int = 1, classes: int = 2, width: int = 16) -> None:
        super().__init__()

        def double(a: int, b: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.Conv2d(b, b, 3, padding=1), nn.ReLU())

        self.down = nn.ModuleList([double(channels, width), double(width, 2 * width)])
        self.pool = nn.MaxPool2d(2)
        self.middle = double(2 * width, 4 * width)
        self.up = nn.ModuleList(
            [nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), nn.ConvTranspose2d(2 * width, width, 2, 2)]
        )
        self.join = nn.ModuleList([double(4 * width, 2 * width), double(2 * width, width)])
        self.output = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = self.pool(x)
        x = self.middle(x)
        for up, block in zip(self.up, self.join, strict=True):
            x = block(torch.cat([skips.pop(), up(x)], dim=1))
        return self.output(x)


class M5(nn.Module):
    """Dai et al. 2017: raw sound, in one dimension, with batch norm and a stride of 16."""

    def __init__(self, classes: int = 35, width: int = 32) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(1, width, 80, stride=16), nn.BatchNorm1d(width)
        self.conv2, self.bn2 = nn.Conv1d(width, width, 3), nn.BatchNorm1d(width)
        self.conv3, self.bn3 = nn.Conv1d(width, 2 * width, 3), nn.BatchNorm1d(2 * width)
        self.conv4, self.bn4 = nn.Conv1d(2 * width, 2 * width, 3), nn.BatchNorm1d(2 * width)
        self.pool1, self.pool2, self.pool3, self.pool4 = (nn.MaxPool1d(4) for _ in range(4))
        self.fc1 = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(F.relu(self.bn1(self.conv1(x))))
        x = self.pool2(F.relu(self.bn2(self.conv2(x))))
        x = self.pool3(F.relu(self.bn3(self.conv3(x))))
        x = self.pool4(F.relu(self.bn4(self.conv4(x))))
        x = F.avg_pool1d(x, x.shape[-1]).permute(0, 2, 1)
        return F.log_softmax(self.fc1(x), dim=2)


class C3D(nn.Module):
    """A small one after Tran et al. 2015: video."""

    def __init__(self, classes: int = 10, width: int = 16) -> None:
        super().__init__()
        self.conv1, self.pool1 = nn.Conv3d(3, width, 3, padding=1), nn.MaxPool3d((1, 2, 2))
        self.conv2, self.pool2 = nn.Conv3d(width, 2 * width, 3, padding=1), nn.MaxPool3d(2)
        self.conv3a = nn.Conv3d(2 * width, 4 * width, 3, padding="same")
        self.conv3b, self.pool3 = nn.Conv3d(4 * width, 4 * width, 3, padding=1), nn.MaxPool3d(2)
        self.fc1, self.fc2 = nn.Linear(4 * width * 2 * 2 * 2, 64), nn.Linear(64, classes)
        self.relu, self.dropout = nn.ReLU(), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.relu(self.conv1(x)))
        x = self.pool2(self.relu(self.conv2(x)))
        x = self.relu(self.conv3a(x))
        x = self.pool3(self.relu(self.conv3b(x)))
        x = x.view(x.size(0), -1)
        return self.fc2(self.dropout(self.relu(self.fc1(x))))


class MobileNet(nn.Module):
    """Sandler et al. 2018 (MobileNetV2): narrow values between wide depthwise convolutions, with a skip where sizes
    allow it."""

    def __init__(self, classes: int = 100, width: float = 1) -> None:
        super().__init__()

        def norm(inputs: int, outputs: int, kernel: int, **settings: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, kernel, bias=False, **settings), nn.BatchNorm2d(outputs)]

        channels = int(32 * width)
        self.stem = nn.Sequential(*norm(3, channels, 3, stride=2, padding=1), nn.ReLU6())
        blocks = []
        for wider, outputs, count, stride in (
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 2, 2),
            (6, 96, 1, 1),
        ):
            for i in range(count):
                inner, out = wider * channels, int(outputs * width)
                depthwise = norm(inner, inner, 3, stride=stride if i == 0 else 1, padding=1, groups=inner)
                first = [*norm(channels, inner, 1), nn.ReLU6()] if wider > 1 else []
                blocks.append(nn.Sequential(*first, *depthwise, nn.ReLU6(), *norm(inner, out, 1)))
                channels = out
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Sequential(*norm(channels, 4 * channels, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(4 * channels, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            y = block(x)
            x = x + y if x.shape == y.shape else y
        return self.classifier(self.head(x))


class Inception(nn.Module):
    """Szegedy et al. 2014: blocks of four branches, side by side."""

    class Block(nn.Module):
        def __init__(self, inputs: int, width: int) -> None:
            super().__init__()
            self.one = nn.Conv2d(inputs, 4 * width, 1)
            self.reduce3, self.three = nn.Conv2d(inputs, 6 * width, 1), nn.Conv2d(6 * width, 8 * width, 3, padding=1)
            self.reduce5, self.five = nn.Conv2d(inputs, width, 1), nn.Conv2d(width, 2 * width, 5, padding=2)
            self.pooled = nn.Conv2d(inputs, 2 * width, 1)

        def forward(self, x: Tensor) -> Tensor:
            three = F.relu(self.three(F.relu(self.reduce3(x))))
            five = F.relu(self.five(F.relu(self.reduce5(x))))
            pooled = F.relu(self.pooled(F.max_pool2d(x, 3, 1, 1)))
            return torch.cat([F.relu(self.one(x)), three, five, pooled], 1)

    def __init__(self, classes: int = 10, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4 * width, 3, padding=1)
        self.first, self.second = self.Block(4 * width, width), self.Block(16 * width, width)
        self.classifier = nn.Linear(16 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(F.max_pool2d(F.relu(self.stem(x)), 2))
        x = self.second(F.max_pool2d(x, 2))
        return self.classifier(x.mean((2, 3)))


class ConvAutoencoder(nn.Module):
    """Strided convolutions down to a code of maps, and transposed ones up again."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Conv2d(1, width, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU()),
        )
        self.decoder = nn.Sequential(
            *(nn.ConvTranspose2d(2 * width, width, 3, stride=2, padding=1, output_padding=1), nn.ReLU()),
            *(nn.ConvTranspose2d(width, 1, 3, stride=2, padding=1, output_padding=1), nn.Sigmoid()),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class SqueezeExcite(nn.Module):
    """Hu et al. 2017: residual blocks whose maps are weighted by a gate that sees the mean of each."""

    class Block(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
            self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
            self.squeeze, self.excite = nn.Linear(channels, channels // 4), nn.Linear(channels // 4, channels)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
            gate = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3))))))
            return F.relu(x + y * gate[:, :, None, None])

    def __init__(self, classes: int = 10, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(self.Block(width), nn.MaxPool2d(2), self.Block(width))
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(F.relu(self.stem(x))).mean((2, 3)))
