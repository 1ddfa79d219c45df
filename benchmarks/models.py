"""The networks of the whole-network benchmark, and batches of their inputs' shapes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Problem:
    """A network, its input's shape without batch, its classes, and the usual batch size."""

    make: Callable[[int], nn.Module]
    input_shape: tuple[int, ...]
    classes: int
    batch: int

    def model(self, device: str = "cpu") -> nn.Module:
        """The network with random weights, in evaluation mode: samples stay apart."""
        torch.manual_seed(0)
        return self.make(self.classes).eval().to(device)

    def data(self, batch: int | None = None, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Random inputs and labels."""
        samples = batch or self.batch
        inputs = torch.rand(samples, *self.input_shape, device=device)
        return inputs, torch.randint(self.classes, (samples,), device=device)


def three_c_three_d(classes: int) -> nn.Sequential:
    """3C3D of DeepOBS: three convolutions, three dense layers."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 5),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=1),
        nn.Conv2d(64, 96, 3),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=1),
        nn.Conv2d(96, 128, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=1),
        nn.Flatten(),
        nn.Linear(1152, 512),
        nn.ReLU(),
        nn.Linear(512, 256),
        nn.ReLU(),
        nn.Linear(256, classes),
    )


def all_cnn_c(classes: int) -> nn.Sequential:
    """All-CNN-C (Springenberg et al. 2015), without dropout."""
    layers: list[nn.Module] = []
    channels = 3
    for width, kernel, stride in (
        *((96, 3, 1), (96, 3, 1), (96, 3, 2)),
        *((192, 3, 1), (192, 3, 1), (192, 3, 2)),
        *((192, 3, 1), (192, 1, 1), (classes, 1, 1)),
    ):
        layers += [nn.Conv2d(channels, width, kernel, stride, kernel // 2), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers[:-1], nn.AvgPool2d(8), nn.Flatten())


class Block(nn.Module):
    """Two convolutions and what skips them (He et al. 2016)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        same = channels == width and stride == 1
        self.skip: nn.Module = nn.Identity()
        if not same:
            conv = nn.Conv2d(channels, width, 1, stride, bias=False)
            self.skip = nn.Sequential(conv, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.path(x) + self.skip(x))


def resnet18(classes: int) -> nn.Sequential:
    """ResNet-18 (He et al. 2016)."""
    stem = (nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    blocks, channels = [], 64
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        blocks += [Block(channels, width, stride), Block(width, width, 1)]
        channels = width
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1), *blocks, *pool, nn.Linear(512, classes))


class Bottleneck(nn.Module):
    """Three convolutions around a narrow middle, and what skips them (He et al. 2016)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        wide = 4 * width
        self.path = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
        )
        self.skip: nn.Module = nn.Identity()
        if channels != wide or stride != 1:
            conv = nn.Conv2d(channels, wide, 1, stride, bias=False)
            self.skip = nn.Sequential(conv, nn.BatchNorm2d(wide))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.path(x) + self.skip(x))


def resnet50(classes: int) -> nn.Sequential:
    """ResNet-50 (He et al. 2016), with the stride in the middle of a block."""
    stem = (nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    blocks, channels = list[nn.Module](), 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for at in range(count):
            blocks.append(Bottleneck(channels, width, 1 if at else stride))
            channels = 4 * width
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1), *blocks, *pool, nn.Linear(2048, classes))


def cifar_resnet20(classes: int) -> nn.Sequential:
    """ResNet-20 for images of 32 pixels (He et al. 2016), with 16, 32 and 64 channels."""
    stem = (nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    blocks, channels = [], 16
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        blocks += [Block(channels, width, stride), Block(width, width, 1), Block(width, width, 1)]
        channels = width
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*stem, *blocks, *pool, nn.Linear(64, classes))


def cifar_resnet18(classes: int) -> nn.Sequential:
    """ResNet-18 with a stem of 3x3 for images of 32 pixels."""
    stem = (nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    return nn.Sequential(*stem, *resnet18(classes)[4:])


def mlp(classes: int) -> nn.Sequential:
    """Two hidden layers of 512: a gradient of a few milliseconds, beside which calls count."""
    layers = nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU()
    return nn.Sequential(*layers, nn.Linear(512, classes))


PROBLEMS = {
    "3c3d": Problem(three_c_three_d, (3, 32, 32), 10, 64),
    "allcnnc": Problem(all_cnn_c, (3, 32, 32), 100, 8),
    "resnet18": Problem(resnet18, (3, 224, 224), 1000, 4),
    "resnet20": Problem(cifar_resnet20, (3, 32, 32), 10, 64),
    "mlp": Problem(mlp, (784,), 10, 32),
}
