"""Whether the smaller module computes what the masked one does."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from purepruning.coupling.plan import Plan
from purepruning.masks import apply_masks

#: How far two models of one function may differ in float64, relative to the largest output.
EXACT = 1e-10


#: The same where a model computes parts of it in float32, whatever its dtype.
ROUNDED = 1e-5


#: What is left of one output: axes, and which of their positions.
Cuts = Sequence[tuple[int, np.ndarray]]


# Comparing.
class Reference:
    """The masked model, for some inputs: what a result is compared with.

    In float64, unless the model has operations that are not made for it. Outputs that may shrink
    are cut to what is left of them.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        masks: Any,
        names: Mapping[str, str],
        given: tuple[tuple[Any, ...], dict[str, Any]],
        outputs: Sequence[Cuts] | None = None,
    ) -> None:
        self.model, self.names, self.masks, self.outputs = model, names, masks, outputs
        self.wide = True
        self.inputs = [_double(given), _double(_random(given))]
        try:
            self.masked = self.expected(None)
        except Exception:
            self.wide, self.inputs = False, [given, _random(given)]
            self.masked = self.expected(None)

    def _copy(self, model: torch.nn.Module) -> torch.nn.Module:
        model = copy.deepcopy(model)
        return model.double() if self.wide else model

    def _run(
        self, model: torch.nn.Module, outputs: Sequence[Cuts] | None = None
    ) -> list[list[torch.Tensor]]:
        model = model.eval()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [_floats(model(*args, **kwargs), outputs) for args, kwargs in self.inputs]

    def expected(self, values: Mapping[str, torch.Tensor] | None) -> list[list[torch.Tensor]]:
        """Returns the outputs of the masked model."""
        masked = self._copy(self.model)
        state = masked.state_dict(keep_vars=True)
        with torch.no_grad():
            for path in dict.fromkeys(self.names.values()):
                if values is not None:
                    state[path].copy_(values[path])
                mask = self.masks.get(path)
                if mask is not None:
                    state[path].masked_fill_(~mask, 0)
        return self._run(masked, self.outputs)

    def steady(self) -> bool:
        """Whether the masked model gives the same twice, and numbers."""
        return _distance(self.masked, self.expected(None)) == 0.0

    def compare(
        self, small: torch.nn.Module, plan: Plan, other: torch.nn.Module | None = None
    ) -> tuple[float | None, str]:
        """Returns how far a small model is off, or None and why it is not the same function."""
        try:
            found = self._run(self._copy(small))
        except Exception as error:
            line = str(error).strip().splitlines()
            reason = line[0] if line else type(error).__name__
            return None, f"its forward does not run with smaller layers: {reason}"
        expected = self.masked if other is None else self._run(self._copy(other))
        distance = _distance(expected, found)
        if distance <= EXACT:
            return distance, ""
        if not distance <= ROUNDED:
            return None, f"its forward gives something else ({distance:.0e} off)"
        # Parts in float32, or a model too small to tell: other values, as large as each other.
        values = self._other_values()
        loud = self._copy(small)
        _load(loud, plan.apply(apply_masks(values, self.masks)), self.names)
        if other is None:
            expected = self.expected(values)
        else:
            reference = self._copy(other)
            _load(reference, plan.apply(apply_masks(values, self.masks)), self.names)
            expected = self._run(reference)
        louder = _distance(expected, self._run(loud))
        if louder <= ROUNDED:
            return max(distance, louder), ""
        return None, f"its forward gives something else ({louder:.0e} off)"

    def _other_values(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        state = self.model.state_dict(keep_vars=True)
        found = {}
        for path in dict.fromkeys(self.names.values()):
            x = state[path].detach()
            if isinstance(state[path], torch.nn.Parameter) and x.is_floating_point():
                noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
                size = max(x[0].numel() if x.ndim > 1 else 1, 1) ** 0.5
                x = noise / size if x.ndim > 1 else 0.5 + noise.abs()
            found[path] = x
        return found


def _load(
    model: torch.nn.Module, values: Mapping[str, torch.Tensor], names: Mapping[str, str]
) -> None:
    state = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for path in dict.fromkeys(names.values()):
            state[path].copy_(values[path])


def _double(given: Any) -> Any:
    def double(x: Any) -> Any:
        wide = isinstance(x, torch.Tensor) and x.is_floating_point()
        return x.detach().double() if wide else x

    return pytree.tree_map(double, given)


def _random(given: Any) -> Any:
    generator = torch.Generator().manual_seed(0)

    def random(x: Any) -> Any:
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        return x

    return pytree.tree_map(random, given)


def _floats(outputs: Any, cuts: Sequence[Cuts] | None) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves(outputs)
    found = []
    for x, cut in zip(leaves, cuts or [()] * len(leaves), strict=True):
        if isinstance(x, torch.Tensor) and (x.is_floating_point() or x.dtype == torch.bool):
            for axis, kept in cut:
                x = x.index_select(axis, torch.as_tensor(kept, device=x.device))
            found.append(x.double())
    return found


def _distance(expected: list[list[torch.Tensor]], found: list[list[torch.Tensor]]) -> float:
    """Returns the largest difference of any output, relative to its largest value."""
    worst = 0.0
    for one, other in zip(expected, found, strict=True):
        if [x.shape for x in one] != [x.shape for x in other]:
            return float("inf")
        for x, y in zip(one, other, strict=True):
            if not x.numel():
                continue
            fine = x.isfinite()
            if not bool((fine == y.isfinite()).all()) or not fine.any():
                return float("inf")
            scale = float(x[fine].abs().max())
            off = float((x[fine] - y[fine]).abs().max())
            worst = max(worst, off / scale if scale else off)
    return worst
