"""Quantities, optimizers, operators and modules against the same in float64 on the processor."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

import tnconv
from benchmarks.device.sections import Found, Rows, error
from tnconv import quantities as q
from tnconv.optim import KFAC

TOLERANCE = 1e-7
QUANTITIES: Sequence[q.Quantity] = (  # type: ignore[type-arg]  # results of many types
    q.Gradient(),
    q.PerSampleGradients(),
    q.SquaredNorms(),
    q.DotProducts(),
    q.Variance(),
    q.GGNDiagonal(),
    q.KFLR(),
    q.HesScale(),
    q.KFAC("expand", "type-2"),
    q.KFAC("reduce", "empirical", joint=True),
)
LOSS = nn.CrossEntropyLoss()


def network(device: torch.device) -> nn.Sequential:
    """A small network with groups, pooling and a smooth activation, in float64."""
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(128, 5),
    )
    return nn.Sequential(*layers).double().to(device)


def batch(device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(6, 3, 8, 8, generator=generator, dtype=torch.float64)
    return x.to(device), torch.randint(5, (6,), generator=generator).to(device)


def tensors(value: object) -> Iterator[Tensor]:
    """All tensors of a result, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors(each)
    elif isinstance(value, Sequence):
        for each in value:
            yield from tensors(each)


def equal(on: Callable[[torch.device], object], device: torch.device) -> Found:
    """The largest error of what the function gives on the device.

    Raises:
        ValueError: it is more than rounding.
    """
    pairs = zip(tensors(on(device)), tensors(on(torch.device("cpu"))), strict=True)
    worst = max(error(value, expected) for value, expected in pairs)
    if not worst < TOLERANCE:
        raise ValueError(f"wrong by {worst:.1e}")
    return {"error": worst}


def synchronisations(call: Callable[[], object]) -> int:
    """How often the host waited for a CUDA device."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchron" in str(each.message) for each in caught)


def model_values(rows: Rows) -> None:
    """Everything of the small network, generators of both kinds, default devices."""
    device, tiny = rows.setting.device, rows.setting.tiny
    for each in QUANTITIES[:4] if tiny else QUANTITIES:

        def computed(at: torch.device, each: q.Quantity = each) -> object:  # type: ignore[type-arg]
            return tnconv.compute(network(at), LOSS, *batch(at), [each])[each]

        rows.attempt(f"{each}"[:60], lambda computed=computed: equal(computed, device))
    if rows.setting.cuda:
        model, data = network(device), batch(device)

        def call() -> object:
            return tnconv.compute(model, LOSS, *data, [q.SquaredNorms(), q.Variance()])

        call()
        rows.attempt("compute", lambda: {"synchronisations": synchronisations(call)})
    for inverse in ("cholesky",) if tiny else ("cholesky", "eigen", "ekfac"):
        for fisher in ("empirical", "type-2", "mc", "forward-only"):
            if (inverse, fisher) == ("ekfac", "forward-only") or (tiny and fisher != "empirical"):
                continue
            name = f"KFAC {inverse} {fisher}"
            rows.attempt(name, lambda i=inverse, f=fisher: kfac_steps(rows, i, f))
    rows.attempt("hessian_diagonal", lambda: equal(diagonal, device))
    for kind in (tnconv.GGNOperator, tnconv.HessianOperator, tnconv.FisherOperator):
        rows.attempt(kind.__name__, lambda kind=kind: equal(lambda at: product(kind, at), device))
    for name in ("convert", "save_memory"):
        rows.attempt(name, lambda name=name: equal(lambda at: changed(name, at), device))
    for at in {"cpu", device.type}:
        rows.attempt(f"generator on {at}", lambda at=at: drawn(device, at))
    rows.attempt("default device", lambda: by_default(device))


def kfac_steps(rows: Rows, inverse: str, fisher: str) -> Found:
    """Parameters after three steps; how often the host waits in a step that does everything."""
    waits = list[int]()

    def trained(device: torch.device) -> object:
        model, (x, y) = network(device), batch(device)
        loss_fn = LOSS if fisher in ("mc", "type-2") else None
        optimizer = KFAC(
            model,
            inverse=inverse,  # type: ignore[arg-type]  # from a list of them
            fisher=fisher,  # type: ignore[arg-type]
            loss_fn=loss_fn,
            update_inverses_every=1,
            flavour="expand",  # else A has a null space, in which EKFAC's basis is arbitrary
        )
        for _ in range(3):
            optimizer.zero_grad()
            LOSS(model(x), y).backward()
            if device.type == "cuda":
                waits.append(synchronisations(optimizer.step))
            else:
                optimizer.step()
        return list(model.parameters())

    device = rows.setting.device
    if fisher == "mc":  # draws differ between devices
        values = [each for each in tensors(trained(device)) if not bool(each.isfinite().all())]
        if values:
            raise ValueError("not finite")
        return {"synchronisations": waits}
    return {**equal(trained, device), "synchronisations": waits}


def diagonal(device: torch.device) -> object:
    return tnconv.hessian_diagonal(network(device), LOSS, *batch(device))


def product(kind: type, device: torch.device) -> Tensor:
    model = network(device)
    count = sum(p.numel() for p in model.parameters())
    vector = torch.linspace(-1, 1, count, dtype=torch.float64, device=device)
    result = kind(model, LOSS, [batch(device)]) @ vector
    assert isinstance(result, Tensor)
    return result


def changed(name: str, device: torch.device) -> list[Tensor]:
    """Gradients of the network with the library's layers."""
    model = network(device)
    model = getattr(tnconv.nn, name)(model) or model
    x, y = batch(device)
    LOSS(model(x), y).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def drawn(device: torch.device, kind: str) -> Found:
    """Monte Carlo factors and tensor dropout with a generator of the host's or the device's."""
    (x, y), generator = batch(device), torch.Generator(kind)
    factors = q.KFAC("expand", "mc", generator=generator)
    tnconv.compute(network(device), LOSS, x, y, [factors])
    model = network(device)
    model = tnconv.nn.tensor_dropout(model, keep=0.5, generator=generator) or model
    LOSS(model(x), y).backward()
    return {"ran": True}


def by_default(device: torch.device) -> Found:
    """Everything that draws, where new tensors lie on the device."""
    before = torch.get_default_device()
    torch.set_default_device(device)
    try:
        x, y = batch(torch.device("cpu"))
        x, y = x.to(device), y.to(device)
        model = network(device)
        model = tnconv.nn.tensor_dropout(model, keep=0.5) or model
        LOSS(model(x), y).backward()
        tnconv.GGNOperator(network(device), LOSS, [(x, y)]).check_deterministic()
    finally:
        torch.set_default_device(before if before.type != "cpu" else "cpu")
    return {"ran": True}
