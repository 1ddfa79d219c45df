"""Random generators: numbers for one device from a generator of another."""

import torch


def seed_from(generator: torch.Generator | None) -> int:
    """The next number of a generator, or of torch's default one, as a seed."""
    device = torch.device("cpu") if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=device))


def on_device(generator: torch.Generator | None, device: torch.device) -> torch.Generator | None:
    """A generator that can draw on the device.

    That is the generator itself, or one that is seeded with its next number: torch draws only from
    generators of a tensor's own kind of device.
    """
    if generator is None or generator.device.type == device.type:
        return generator
    return torch.Generator(device).manual_seed(seed_from(generator))
