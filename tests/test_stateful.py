"""What may have become stale is noticed: every stateful part of the library, every change.

After a change, a part that was used before gives what one gives that is made anew, or says in words
why it does not. Snapshots may also give what they gave. `tests.stateful` has both lists; whatever
is public, keeps state and is not listed there fails `test_all_that_keeps_state_is_listed`.
"""

import copy
import inspect
import re
import sys
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from itertools import product
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

import pytest
import torch
from hypothesis import settings
from torch import nn

from tests.stateful import PARTS, Found, Part, Setting

pytestmark = pytest.mark.usefixtures("float64")
ERRORS = NotImplementedError, RuntimeError, TypeError, ValueError
IN_WORDS = "expected|needs|should be the same"
"""Errors of this library, and torch's own of dtypes, say what would have been right."""


def add_in_place(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.add_(0.5)


def doubled(parameter: nn.Parameter) -> None:
    parameter.data = 2 * parameter.data


def in_single_precision(s: Setting) -> None:
    s.model.float()
    s.x = s.x.float()


def elsewhere(s: Setting) -> None:
    device = "cuda" if torch.cuda.is_available() else "meta"
    s.model.to(device), s.loss_fn.to(device)
    s.x, s.y = s.x.to(device), s.y.to(device)


CHANGES: dict[str, Callable[[Setting], object]] = {
    "evaluation mode": lambda s: s.model.eval(),
    "mode of one module": lambda s: s.model.conv.eval(),
    "a parameter in place": lambda s: add_in_place(s.model.conv.weight),
    "a parameter by its data": lambda s: doubled(s.model.head.weight),
    "a buffer in place": lambda s: add_in_place(s.model.shift),
    "new values": lambda s: s.model.load_state_dict(
        {k: v + 0.25 for k, v in s.model.state_dict().items()}
    ),
    "a frozen layer": lambda s: s.model.conv.requires_grad_(False),
    "the batch in place": lambda s: add_in_place(s.x),
    "labels in place": lambda s: s.y.copy_(s.y.flip(0) + 1).remainder_(3),
    "another batch size": lambda s: (setattr(s, "x", s.x[:3]), setattr(s, "y", s.y[:3])),
    "reduction": lambda s: setattr(s.loss_fn, "reduction", "sum"),
    "weights of classes": lambda s: setattr(s.loss_fn, "weight", torch.tensor([1.0, 2.0, 3.0])),
    "dtype": in_single_precision,
    "device": elsewhere,
}  # fmt: skip


def used(part: Part, made: object, setting: Setting) -> Found:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return part.use(made, setting)


def anew(part: Part, old: object, setting: Setting) -> Found:
    """What a part gives that is made now."""
    twin = setting.twin()
    made = part.make(twin)
    if part.resumes:
        made.load_state_dict(copy.deepcopy(old.state_dict()))
    return used(part, made, twin)


def is_close(found: Found, expected: Found) -> bool:
    if found.keys() != expected.keys():
        return False
    for name, value in expected.items():
        other = found[name]
        if (other.shape, other.device) != (value.shape, value.device):
            return False
        precise = {other.dtype, value.dtype} == {torch.float64}
        how = {"rtol": 1e-9, "atol": 1e-9} if precise else {"rtol": 1e-3, "atol": 1e-3}
        same = value.device.type == "meta" or torch.allclose(
            other.double(), value.double(), **how, equal_nan=True
        )
        if not same:
            return False
    return True


def prepared(name: str) -> tuple[Part, object, Setting, Found]:
    """A part that was used once."""
    part, setting = PARTS[name], Setting.new()
    made = part.make(setting)
    return part, made, setting, used(part, made, setting)


PAIRS = [
    (name, change)
    for name, change in product(PARTS, CHANGES)
    if not (PARTS[name].resumes and change == "device" and not torch.cuda.is_available())
]
"""Without an accelerator the device is meta: there, modules replace their parameters."""
if settings.default is not settings.get_profile("deep"):
    PAIRS = PAIRS[::5]  # of every part some changes, of every change some parts


@pytest.mark.parametrize(("name", "change"), PAIRS)
def test_changes_between_two_uses(name: str, change: str) -> None:
    part, made, setting, before = prepared(name)
    before = {key: value.clone() for key, value in before.items()}
    CHANGES[change](setting)
    try:
        expected: Found | None = anew(part, made, setting)
    except ERRORS:
        expected = None
    try:
        found = used(part, made, setting)
    except ERRORS as error:
        assert expected is None or re.search(IN_WORDS, str(error)), error
        return
    stays = part.snapshot or change in part.unconcerned
    fits = expected is not None and is_close(found, expected)
    assert fits or (stays and is_close(found, before))


STEPPING = [name for name in PARTS if PARTS[name].use.__name__ == "trained"]
STEPPING += ["observe", "observe_low_rank", "Monitor"]
STAGES = "after the forward pass", "after the backward pass"


@pytest.mark.parametrize("name", PARTS)
def test_parts_that_take_steps_are_known(name: str) -> None:
    _, _, setting, _ = prepared(name)
    assert setting.reached == ({*STAGES} if name in STEPPING else set())


@pytest.mark.parametrize("name", STEPPING)
@pytest.mark.parametrize("stage", STAGES)
def test_an_input_that_is_changed_inside_of_a_step(name: str, stage: str) -> None:
    """What was to be read of it is what it was, or the step is refused; a monitor leaves it out."""
    part, made, setting, _ = prepared(name)
    expected = anew(part, made, setting)
    setting.stages[stage] = lambda s: add_in_place(s.x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = part.use(made, setting)
        except RuntimeError as error:
            assert "in place" in str(error) or "inplace" in str(error)
            return
    if name == "Monitor" and any("in place" in str(one.message) for one in caught):
        assert "NormTest" in expected.keys() - found.keys()
        expected = {key: expected[key] for key in found}
    assert is_close(found, expected)


@pytest.mark.parametrize("name", STEPPING)
def test_a_second_backward_pass_leaves_no_trace(name: str) -> None:
    part, made, setting, _ = prepared(name)
    setting.backwards = 2
    try:
        used(part, made, setting)
    except RuntimeError as error:
        assert re.search(IN_WORDS, str(error)), error
    setting.backwards = 1
    expected = anew(part, made, setting)
    assert is_close(used(part, made, setting), expected)


FOLDERS = (
    *("tnconv", "tnconv.geometry", "tnconv.losses", "tnconv.models", "tnconv.monitor"),
    *("tnconv.nn", "tnconv.ntk", "tnconv.operators", "tnconv.optim", "tnconv.quantities"),
    *("tnconv.recursions", "tnconv.simplify", "tnconv.diagrams"),
)
VALUES = (
    *("Expression", "Flow", "Step", "ColumnPlan", "Quantity", "Event", "History", "Seen", "Run"),
    *("BatchNormFold", "BlockDiagonal", "Composition", "Dense", "Diagonal", "DiagonalScale"),
    *("Elementwise", "Euclidean", "Inverted", "Kronecker", "KroneckerAffine", "LowRank"),
    *("KroneckerDamped", "KroneckerEigen", "Permutation", "Pushed", "Reparametrization"),
    *("Scaled", "ShapeOperator", "Summed", "TorchParametrization", "WeightNorm"),
)
MODULES = (
    *("Conv1d", "Conv2d", "Conv3d", "ConvNd", "ConvTranspose1d", "ConvTranspose2d", "FoldNd"),
    *("ConvTranspose3d", "ConvTransposeNd", "UnfoldNd", "A2CLoss", "GaussianNLLLoss"),
    *("PPOLoss", "from_torch", "to_torch", "revert"),
)
WITHOUT_STATE = {
    "values that nothing changes": VALUES,
    "modules with parameters alone": MODULES,
    "a switch": ("tiered_compilation",),
}
CACHES = {
    "tnconv.models.samples._KNOWN": "compute",
    "tnconv.models.capture._ACTIVE": "observe",
}
"""Containers of modules that forget what has vanished, with the part that shows what they do."""


def is_value(kind: type) -> bool:
    parameters = getattr(kind, "__dataclass_params__", None)
    frozen = parameters is not None and parameters.frozen
    known = (
        frozen or issubclass(kind, tuple | BaseException) or not kind.__module__.startswith("tn")
    )
    return known or kind.__name__ in VALUES


def keeps_state(given: object) -> bool:
    """Whether it is, or makes, an object of the library that can change."""
    if inspect.isclass(given):
        return not is_value(given)
    if not inspect.isfunction(given):
        return False
    try:
        kind = typing.get_type_hints(given).get("return")
    except NameError:
        return False
    if typing.get_origin(kind) in (AbstractContextManager, Iterator):
        (kind, *_) = typing.get_args(kind)
    return inspect.isclass(kind) and (issubclass(kind, nn.Module) or not is_value(kind))


def public(folders: Sequence[types.ModuleType]) -> dict[str, object]:
    return {
        name: getattr(folder, name)
        for folder in folders
        for name in folder.__all__
        if not name.startswith("__")
    }


def unlisted(folders: Sequence[types.ModuleType]) -> list[str]:
    """Public names of what keeps state that are in no list."""
    listed = {name for part in PARTS.values() for name in part.covers}
    listed |= {name for names in WITHOUT_STATE.values() for name in names}
    return sorted(n for n, v in public(folders).items() if keeps_state(v) and n not in listed)


def test_all_that_keeps_state_is_listed() -> None:
    folders = [import_module(name) for name in FOLDERS]
    assert not unlisted(folders), "list these in tests/stateful.py, or why they keep no state"
    listed = {name for part in PARTS.values() for name in part.covers}
    assert listed <= public(folders).keys()


def test_a_new_part_is_asked_for() -> None:
    class Forgetful:
        """Keeps something, somewhere."""

    def make() -> Forgetful: ...

    Forgetful.__module__ = "tnconv.optim.forgetful"
    make.__annotations__["return"] = Forgetful
    folder = types.ModuleType("tnconv.new")
    folder.__all__, folder.Forgetful, folder.make = ["Forgetful", "make"], Forgetful, make
    assert unlisted([folder]) == ["Forgetful", "make"]


def test_all_caches_of_models_are_listed() -> None:
    kinds = WeakKeyDictionary, WeakSet, WeakValueDictionary
    found = {
        f"{name}.{key}"
        for name, module in sys.modules.items()
        if name.split(".")[0] == "tnconv"
        for key, value in vars(module).items()
        if isinstance(value, kinds)
    }
    assert found == CACHES.keys()
    assert all(each in PARTS for each in CACHES.values())
