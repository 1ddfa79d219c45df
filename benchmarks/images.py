"""Real images that come with scikit-learn (extra ``demo``): digits, and patches of photographs."""

from functools import cache

import torch
from torch import Tensor


def digits() -> tuple[Tensor, Tensor]:
    """The 1,797 handwritten digits ``(n, 1, 8, 8)`` in [0, 1], and their labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.images / 16, dtype=torch.float32)[:, None], torch.tensor(found.target)


def patches(count: int, size: int, generator: torch.Generator, zoom: int = 1) -> Tensor:
    """Random patches ``(count, 3, size, size)`` of two photographs, standardised.

    Each is the mean of ``zoom`` times as many pixels in both directions.
    """
    images, found = photographs(), []
    for _ in range(count):
        image = images[int(torch.randint(len(images), (), generator=generator))]
        top, left = (
            int(torch.randint(side - zoom * size, (), generator=generator))
            for side in image.shape[:2]
        )
        part = image[top : top + zoom * size, left : left + zoom * size].permute(2, 0, 1)
        found.append(torch.nn.functional.avg_pool2d(part.float(), zoom))
    stacked = torch.stack(found) / 255
    return (stacked - stacked.mean((0, 2, 3), True)) / stacked.std((0, 2, 3), keepdim=True)


@cache
def photographs() -> list[Tensor]:
    """The two, as bytes ``(height, width, 3)``."""
    from sklearn.datasets import load_sample_images

    return [torch.tensor(image) for image in load_sample_images().images]


def rotated(
    count: int, size: int, generator: torch.Generator, zoom: int = 4
) -> tuple[Tensor, Tensor]:
    """Patches, each turned by a random multiple of 90 degrees, and which: labels without people."""
    images = patches(count, size, generator, zoom)
    turns = torch.randint(4, (count,), generator=generator)
    pairs = zip(images, turns.tolist(), strict=True)
    return torch.stack([torch.rot90(image, turn, (1, 2)) for image, turn in pairs]), turns
