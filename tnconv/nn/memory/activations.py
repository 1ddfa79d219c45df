"""Activations and dropout that store a bit per entry, or the output, instead of the input.

What is cheapest depends on who else stores what. The layer after a ReLU often stores the ReLU's
output, which it reads; then torch's way costs nothing, and bits would come on top. So an activation
does as torch does, unless it was told who reads its output (`save_memory` does); then it asks them
at every call, since freezing and ``eval()`` change the answer.
"""

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnconv.nn.memory.pointwise import FromOutput, Gate, packed

Plan = Literal["torch", "bits", "output"]
SURE = 20  # thresholds of softplus, torch's own and larger, where y and x are the same up to 2e-9


def stored(readers: "Iterable[nn.Module] | None") -> bool | None:
    """Whether one of the modules stores the input that it reads; None if that is not known."""
    if readers is None:
        return None
    answers = [stores_input(module) for module in readers]
    return True if True in answers else None if None in answers else False


def stores_input(module: nn.Module) -> bool | None:
    """What a module says that was written for this; others might store theirs."""
    ask = getattr(module, "stores_input", None)
    return None if ask is None else ask()


def overwritten(readers: "Iterable[nn.Module] | None") -> bool:
    """Whether one of the modules may change the input that it reads in place."""
    return readers is None or any(map(_overwrites, readers))


def _overwrites(module: nn.Module) -> bool:
    if stores_input(module) is None or getattr(module, "inplace", False):
        return True
    if isinstance(module, Dropout) and not module._drops:
        return overwritten(module.readers)  # it gives back its input
    return False


class Pointwise(nn.Module):
    """Holds the modules that read the output, and whether others hold the input."""

    readers: list[nn.Module] | None = None
    input_held = True
    own_state = ("readers", "input_held")
    inplace: bool = False

    def _given_back(self, input: Tensor, output: Tensor) -> Tensor:
        return input.copy_(output) if self.inplace else output


class _Activation(Pointwise):
    """One of torch's, with a plan for every call."""

    keeps_output = False  # whether torch stores the output
    off = 0.0
    on = 1.0

    def _value(self, x: Tensor) -> Tensor:
        """The result, never in place."""
        raise NotImplementedError

    def _mask(self, x: Tensor) -> Tensor | None:
        """Where the derivative is `on`; elsewhere it is `off`."""
        return None

    def _output_rule(self) -> tuple[str, tuple[float, ...]] | None:
        """The name and the settings of the derivative as a function of the output."""
        return None

    @property
    def plan(self) -> Plan:
        """What to store: never more than torch, as far as is known.

        Bits, if otherwise the output or the input would be stored for this module alone. The
        output, if a reader stores it anyway and none changes it. Else what torch stores.
        """
        held = stored(self.readers)
        if self.keeps_output or self.inplace:
            return "bits" if held is False and self._gated else "torch"
        if held and self._output_rule() is not None and not overwritten(self.readers):
            return "output"
        return "torch" if self.input_held or not self._gated else "bits"

    @property
    def _gated(self) -> bool:
        return type(self)._mask is not _Activation._mask

    def forward(self, input: Tensor) -> Tensor:
        plan = self.plan if input.requires_grad and torch.is_grad_enabled() else "torch"
        if plan == "torch":
            return super().forward(input)  # type: ignore[no-any-return]
        x = input.detach()
        y: Tensor
        if plan == "bits":
            mask = self._mask(x)
            assert mask is not None
            y = Gate.run(input, self._value(x), packed(mask), self.on, self.off)
        else:
            rule = self._output_rule()
            assert rule is not None
            y = FromOutput.run(input, self._value(x), rule[0], *rule[1])
        return self._given_back(input, y)

    def stores_input(self) -> bool | None:
        if self.inplace:
            return stored(self.readers)  # the input's storage is the output's
        return self.plan == "torch" and not self.keeps_output


class ReLU(_Activation, nn.ReLU):
    """``torch.nn.ReLU``: stores bits where nobody stores its output."""

    keeps_output = True

    def _value(self, x: Tensor) -> Tensor:
        return F.relu(x)

    def _mask(self, x: Tensor) -> Tensor:
        return x.le(0).logical_not_()


class Hardtanh(_Activation, nn.Hardtanh):
    """``torch.nn.Hardtanh``: stores bits, unless others hold its input."""

    def _value(self, x: Tensor) -> Tensor:
        return F.hardtanh(x, self.min_val, self.max_val)

    def _mask(self, x: Tensor) -> Tensor:
        return (x.le(self.min_val) | x.ge(self.max_val)).logical_not_()


class ReLU6(Hardtanh, nn.ReLU6):
    """``torch.nn.ReLU6``: stores bits, unless others hold its input."""


class Threshold(_Activation, nn.Threshold):
    """``torch.nn.Threshold``: stores bits, unless others hold its input."""

    def _value(self, x: Tensor) -> Tensor:
        return F.threshold(x, self.threshold, self.value)

    def _mask(self, x: Tensor) -> Tensor:
        return x.le(self.threshold).logical_not_()


class Hardsigmoid(_Activation, nn.Hardsigmoid):
    """``torch.nn.Hardsigmoid``: stores bits, unless others hold its input."""

    on = torch.tensor(1 / 6, dtype=torch.float32).item()  # torch's, in every dtype

    def _value(self, x: Tensor) -> Tensor:
        return F.hardsigmoid(x)

    def _mask(self, x: Tensor) -> Tensor:
        return x.gt(-3) & x.lt(3)


class Hardshrink(_Activation, nn.Hardshrink):
    """``torch.nn.Hardshrink``: stores bits, unless others hold its input."""

    def _value(self, x: Tensor) -> Tensor:
        return F.hardshrink(x, self.lambd)

    def _mask(self, x: Tensor) -> Tensor:
        return (x.ge(-self.lambd) & x.le(self.lambd)).logical_not_()


class Softshrink(_Activation, nn.Softshrink):
    """``torch.nn.Softshrink``: stores bits, unless others hold its input."""

    def _value(self, x: Tensor) -> Tensor:
        return F.softshrink(x, self.lambd)

    def _mask(self, x: Tensor) -> Tensor:
        return (x.ge(-self.lambd) & x.le(self.lambd)).logical_not_()


class LeakyReLU(_Activation, nn.LeakyReLU):
    """``torch.nn.LeakyReLU``: stores the output if a reader does, or bits."""

    @property
    def off(self) -> float:  # type: ignore[override]
        return self.negative_slope

    def _value(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.negative_slope)

    def _mask(self, x: Tensor) -> Tensor:
        return x.gt(0)

    def _output_rule(self) -> tuple[str, tuple[float, ...]] | None:
        """The sign of the output is the input's if the slope is positive."""
        return ("leaky_relu", (self.negative_slope,)) if self.negative_slope > 0 else None


class ELU(_Activation, nn.ELU):
    """``torch.nn.ELU``: stores the output if a reader does."""

    def _value(self, x: Tensor) -> Tensor:
        return F.elu(x, self.alpha)

    def _output_rule(self) -> tuple[str, tuple[float, ...]] | None:
        return ("elu", (self.alpha, 1.0, 1.0)) if self.alpha > 0 else None


class CELU(_Activation, nn.CELU):
    """``torch.nn.CELU``: stores the output if a reader does."""

    def _value(self, x: Tensor) -> Tensor:
        return F.celu(x, self.alpha)

    def _output_rule(self) -> tuple[str, tuple[float, ...]] | None:
        return ("elu", (self.alpha, 1.0, 1 / self.alpha)) if self.alpha > 0 else None


class SELU(_Activation, nn.SELU):
    """``torch.nn.SELU``: stores the output if a reader does."""

    def _value(self, x: Tensor) -> Tensor:
        return F.selu(x)

    def _output_rule(self) -> tuple[str, tuple[float, ...]]:
        return "elu", (1.6732632423543772848170429916717, 1.0507009873554804934193349852946, 1.0)


class Softplus(_Activation, nn.Softplus):
    """``torch.nn.Softplus``: stores the output if a reader does."""

    def _value(self, x: Tensor) -> Tensor:
        return F.softplus(x, self.beta, self.threshold)

    def _output_rule(self) -> tuple[str, tuple[float, ...]] | None:
        """Below the threshold y is log(1 + exp(x)), which for small ones is also an x above it."""
        known = self.beta > 0 and self.threshold >= SURE
        return ("softplus", (self.beta, self.threshold)) if known else None


class Dropout(Pointwise, nn.Dropout):
    """``torch.nn.Dropout`` that stores a bit per entry, with torch's own draws."""

    def forward(self, input: Tensor) -> Tensor:
        if not (self._drops and input.requires_grad and torch.is_grad_enabled()):
            return super().forward(input)
        y, mask = torch.native_dropout(input.detach(), self.p, True)
        y = Gate.run(input, y, packed(mask), 1 / (1 - self.p), 0.0)
        return self._given_back(input, y)

    @property
    def _drops(self) -> bool:
        return self.training and 0 < self.p < 1

    def stores_input(self) -> bool | None:
        """What does not drop gives back its input."""
        return False if self._drops and not self.inplace else stored(self.readers)
