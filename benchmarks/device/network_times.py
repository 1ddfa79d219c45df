"""Steps and quantities of ResNets: times next to a gradient, SGD and other libraries."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import tnconv
from benchmarks.device.sections import Found, Rows
from benchmarks.models import cifar_resnet18, cifar_resnet20, resnet50
from tnconv import quantities as q
from tnconv.optim import KFAC

LOSS = nn.CrossEntropyLoss()
BATCH, LARGE = 128, 64
TAKEN = (
    q.SquaredNorms(),
    q.Variance(),
    q.KFAC("reduce", "mc"),
    q.KFAC("expand", "empirical"),
    q.GGNDiagonal("mc"),
    q.DotProducts(),
    q.PerSampleGradients(),
)


def data(rows: Rows, pixels: int, batch: int, classes: int) -> tuple[Tensor, Tensor]:
    device, samples = rows.setting.device, 2 if rows.setting.tiny else batch
    x = torch.rand(samples, 3, pixels, pixels, device=device)
    return x, torch.randint(classes, (samples,), device=device)


def network_times(rows: Rows) -> None:
    """ResNet-18 at 32 pixels with optimizers and quantities, ResNet-50 at 224 with quantities."""
    small = cifar_resnet20 if rows.setting.tiny else cifar_resnet18
    x, y = data(rows, 32, BATCH, 10)

    def make() -> nn.Module:
        return small(10).to(rows.setting.device)

    rows.attempt("SGD step", lambda: sgd(rows, make(), x, y))
    for flavour in ("reduce", "expand"):
        for inverse in ("cholesky", "eigen")[: 1 if rows.setting.tiny else 2]:
            rows.attempt(
                f"KFAC step, {flavour}, {inverse}",
                lambda f=flavour, i=inverse: kfac(rows, make(), x, y, f, i),
            )
    quantities(rows, "ResNet-18", make().eval(), x, y)
    if rows.setting.tiny:
        return
    x, y = data(rows, 224, LARGE, 1000)
    large = resnet50(1000).eval().to(rows.setting.device)
    quantities(rows, "ResNet-50", large, x, y)


def sgd(rows: Rows, model: nn.Module, x: Tensor, y: Tensor) -> Found:
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)
    taken = step(model, optimizer, x, y)
    return {"ms": rows.setting.milliseconds(taken, 0.3), **rows.setting.device_work(taken)}


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor
) -> Callable[[], None]:
    def taken() -> None:
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        optimizer.step()

    return taken


def kfac(rows: Rows, model: nn.Module, x: Tensor, y: Tensor, flavour: str, inverse: str) -> Found:
    """Milliseconds of a step that preconditions, one that collects factors, one that inverts."""
    due = {"factors": True, "inverses": True}
    optimizer = KFAC(
        model,
        fisher="mc",
        loss_fn=LOSS,
        flavour=flavour,  # type: ignore[arg-type]  # from a list of them
        inverse=inverse,  # type: ignore[arg-type]
        update_factors_every=lambda _: due["factors"],
        update_inverses_every=lambda _: due["inverses"],
    )
    taken = step(model, optimizer, x, y)
    found: dict[str, object] = {"first step s": rows.setting.sample(taken, 1) / 1e3}
    for name, (factors, inverses) in {
        "plain": (False, False),
        "factors": (True, False),
        "inverses": (False, True),
    }.items():
        due.update(factors=factors, inverses=inverses)
        taken()
        found[f"{name} ms"] = rows.setting.milliseconds(taken, 0.3)
        work = rows.setting.device_work(taken)
        found |= {f"{name} {what}": value for what, value in work.items()}
    return found


def quantities(rows: Rows, name: str, model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Each quantity with the gradient, next to the gradient, and what others take for it."""
    setting = rows.setting

    def gradient() -> None:
        model.zero_grad()
        LOSS(model(x), y).backward()

    def plain() -> Found:
        return costs(rows, gradient)

    rows.attempt(f"{name}: gradient", plain)
    for each in TAKEN[: 2 if setting.tiny else None]:
        if name == "ResNet-50" and isinstance(each, q.DotProducts | q.PerSampleGradients):
            continue

        def call(each: q.Quantity = each) -> object:  # type: ignore[type-arg]
            return tnconv.compute(model, LOSS, x, y, [each])

        def row(call: Callable[[], object] = call) -> Found:
            first = setting.sample(call, 1) / 1e3
            return {"first s": first, **costs(rows, call)}

        rows.attempt(f"{name}: {type(each).__name__} {'' if each == q.KFAC else each}"[:60], row)
        if setting.cuda:
            torch.cuda.empty_cache()
    if name == "ResNet-18":
        rows.attempt(f"{name}: vmap(grad)", lambda: vmapped(rows, model, x, y))
        rows.attempt(f"{name}: opacus", lambda: opacus(rows, x, y))
    elif setting.cuda:
        rows.attempt(f"{name}: curvlinops", lambda: curvlinops(rows, model, x, y))


def costs(rows: Rows, call: Callable[[], object]) -> Found:
    """Wall-clock time, the device's part in it, and memory."""
    milliseconds = rows.setting.milliseconds(call, 0.3)
    work, memory = rows.setting.device_work(call), rows.setting.mebibytes(call)
    return {"ms": milliseconds, **work, "MiB": memory}


def compiled_gradients(rows: Rows) -> None:
    """The gradient of ResNet-50 that ``torch.compile`` makes: minutes to compile are possible."""
    if rows.setting.cuda:
        x, y = data(rows, 224, LARGE, 1000)
        model = resnet50(1000).eval().to(rows.setting.device)
        rows.attempt("ResNet-50: compiled gradient", lambda: compiled_gradient(rows, model, x, y))


def compiled_gradient(rows: Rows, model: nn.Module, x: Tensor, y: Tensor) -> Found:
    """The gradient of a loss that ``torch.compile`` made."""
    fast = torch.compile(lambda *given: LOSS(model(given[0]), given[1]))

    def gradient() -> None:
        model.zero_grad()
        fast(x, y).backward()

    return {"ms": rows.setting.milliseconds(gradient, 0.3)}


def vmapped(rows: Rows, model: nn.Module, x: Tensor, y: Tensor) -> Found:
    """Per-sample gradients by ``torch.func``."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        output = torch.func.functional_call(model, (parameters, buffers), (x[None],))
        return LOSS(output, y[None])

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

    def call() -> object:
        return gradients(parameters, x, y)

    return costs(rows, call)


def opacus(rows: Rows, x: Tensor, y: Tensor) -> Found:
    """Per-sample gradients by opacus' hooks; it puts GroupNorm in the place of BatchNorm."""
    from opacus import GradSampleModule
    from opacus.validators import ModuleValidator

    small = cifar_resnet20 if rows.setting.tiny else cifar_resnet18
    fixed = ModuleValidator.fix(small(10)).to(rows.setting.device)
    for module in fixed.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # opacus' hooks refuse in-place changes
    model = GradSampleModule(fixed)

    def call() -> None:
        for parameter in model.parameters():
            parameter.grad_sample = None
        LOSS(model(x), y).backward()

    return costs(rows, call)


def curvlinops(rows: Rows, model: nn.Module, x: Tensor, y: Tensor) -> Found:
    """KFAC-expand factors of the empirical Fisher by curvlinops."""
    from curvlinops import KFACLinearOperator

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    parameters = [p for layer in layers for p in layer.parameters()]

    def call() -> object:
        operator = KFACLinearOperator(
            model,
            LOSS,
            parameters,
            [(x, y)],
            fisher_type="empirical",
            check_deterministic=False,
            num_data=len(x),
            num_per_example_loss_terms=1,
        )
        return operator.compute_kronecker_factors()

    return costs(rows, call)
