"""Whether the smaller module computes what the masked one does."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from purepruning.coupling.plan import Plan
from purepruning.masks import apply_masks
from purepruning_interop.torch.precision import (
    AS_IT_IS,
    IN_FLOAT32,
    IN_FLOAT64,
    Perturbed,
    Reading,
    Widened,
    plain_kernels,
    widen,
)
from purepruning_interop.torch.results import plain

#: How far two models of one function may always differ in float64, relative to the largest output.
EXACT = 1e-10

#: And how far in any precision, in units of what a change of every last digit does; but never by
#: more than the root of that digit.
ROUNDINGS = 16


#: What is left of one output: axes, and which of their positions.
Cuts = Sequence[tuple[int, np.ndarray]]

#: What a model gives: its outputs.
Outputs = list[torch.Tensor]


class Reference:
    """The masked model: what a result is compared with.

    Two runs in float64 decide: one as the model is given, and one with other values and inputs,
    each as large as the others, so that no zero or small gain hides a difference. Where the code
    asks for dtypes, or cannot run in float64, those runs may differ though the models do not; then
    two runs in the dtypes of the model decide, and what rounding does to them is the tolerance.

    Args:
        model: the module.
        masked: its masked parameters and buffers, by path.
        masks: the masks, by path.
        names: every name of the state dict, and the path of its leaf.
        given: arguments and keywords.
        outputs: outputs that may shrink are cut to what is left of them.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        masked: Mapping[str, torch.Tensor],
        masks: Any,
        names: Mapping[str, str],
        given: tuple[tuple[Any, ...], dict[str, Any]],
        outputs: Sequence[Cuts] | None = None,
    ) -> None:
        self.model, self.state, self.masks = model, masked, masks
        self.names, self.outputs = names, outputs
        self.given: Sequence[Any] = (given, _random(given))
        self._others: dict[str, torch.Tensor] | None = None
        self._known: dict[Any, Outputs | None] = {}

    def _digit(self, reading: Reading) -> float:
        """Returns the last digit of the coarsest parameter, as it is read."""
        dtypes = [x.dtype for x in self.state.values() if x.is_floating_point()]
        return max(
            (torch.finfo(widen(d, reading)).eps for d in dtypes),
            default=torch.finfo(torch.float64).eps,
        )

    def steady(self) -> bool:
        """Whether the masked model gives the same twice, and numbers."""
        model = with_state(self.model, self.state, self.names)
        try:
            first, second = (_run(model, self.given[0], self.outputs, seed=i) for i in (0, 1))
        except Exception:  # the model's own code: no numbers, so none that are steady
            return False
        return distance(first, second) == 0.0

    def training(self, small: torch.nn.Module) -> str:
        """Returns what a small model cannot do in training mode, or an empty string.

        It has to run where the masked model does, and give as much: its numbers are random.
        """
        try:
            model = with_state(self.model, self.state, self.names)
            expected = _run(model, self.given[0], training=True)
        except Exception:  # nor does the model
            return ""
        try:
            found = _run(with_state(small, {}, self.names), self.given[0], training=True)
        except Exception as error:  # code of the model's class, which may raise anything
            return f"does not run in training mode: {_first_line(error)}"
        if self.outputs is None and [x.shape for x in found] != [x.shape for x in expected]:
            return "gives other shapes in training mode"
        return ""

    def agrees(self, small: torch.nn.Module, plan: Plan, given: Any) -> bool | None:
        """Whether a small model is right for other inputs; None where the model does not run."""
        other = copy.copy(self)
        other.given, other._known = (given,), {}
        if _Right(other, plan, None).outputs(AS_IT_IS, drawn=False) is None:
            return None
        return other.compare(small, plan)[0] is not None

    def compare(
        self, small: torch.nn.Module, plan: Plan, other: torch.nn.Module | None = None
    ) -> tuple[float | None, str]:
        """Returns how far a small model is off, or None and why it is not the same function.

        Args:
            small: the small model.
            plan: what stays of every parameter.
            other: a small model to compare it with, in place of the masked one.
        """
        right = _Right(self, plan, other)
        expected = right.outputs(AS_IT_IS, drawn=False)
        if expected is not None:
            try:
                found = _run(with_state(small, {}, self.names), self.given[0])
            except Exception as error:  # code of the model's class, which may raise anything
                return None, f"its forward does not run with smaller layers: {_first_line(error)}"
            off = distance(expected, found)
            if math.isinf(off):
                return None, "its forward gives other shapes, or numbers where there were none"
            if off > self._digit(AS_IT_IS) ** 0.5 and off > self._rounding(right, AS_IT_IS, False):
                return None, f"its forward gives something else ({off:.0e} off) in its own dtype"
        off = math.inf
        for reading in (IN_FLOAT64, IN_FLOAT32, AS_IT_IS):
            judged = self._judge(small, right, reading)
            if judged is None:
                continue
            off, allowed = judged
            if off <= allowed:
                return off, ""
            if reading is IN_FLOAT32 and self._digit(AS_IT_IS) > self._digit(reading):
                break  # half precision cannot tell what this can
        return None, f"its forward gives something else ({off:.0e} off)"

    def _judge(
        self, small: torch.nn.Module, right: _Right, reading: Reading
    ) -> tuple[float, float] | None:
        """Returns how far a small model is off in one precision, and how far it may be.

        None where the reference gives no numbers, or cannot run.
        """
        worst: tuple[float, float] | None = None
        for drawn in (False, True)[: len(self.given)]:
            expected = right.outputs(reading, drawn)
            if expected is None or not all(x.isfinite().any() for x in expected if x.numel()):
                continue
            model = right.small(small, reading, drawn)
            try:
                off = distance(expected, _run(model, self.given[drawn], None, reading))
            except Exception:  # it does not run where the reference does
                off = math.inf
            allowed = EXACT if reading is IN_FLOAT64 else 1e-300
            if allowed < off < math.inf:
                most = self._digit(reading) ** 0.5
                allowed = max(allowed, min(self._rounding(right, reading, drawn), most))
            if worst is None or off / allowed > worst[0] / worst[1]:
                worst = off, allowed
        return worst

    def _rounding(self, right: _Right, reading: Reading, drawn: bool) -> float:
        """Returns how far rounding may move outputs."""
        expected, noisy = (right.outputs(reading, drawn, noisy=n) for n in (False, True))
        if expected is None or noisy is None:
            return 0.0
        return ROUNDINGS * distance(expected, noisy)

    def values(self) -> dict[str, torch.Tensor]:
        """Returns other values for all parameters, such that signals keep their size."""
        if self._others is None:
            generator = torch.Generator().manual_seed(0)
            full = self.model.state_dict(keep_vars=True)
            self._others = {}
            for path in dict.fromkeys(self.names.values()):
                x = full[path].detach()
                if isinstance(full[path], torch.nn.Parameter) and x.is_floating_point():
                    noise = torch.randn(x.shape, generator=generator).to(x)
                    size = max(x[0].numel() if x.ndim > 1 else 1, 1) ** 0.5
                    x = noise / size if x.ndim > 1 else 0.5 + noise.abs()
                self._others[path] = x
            self._others = dict(apply_masks(self._others, self.masks))
        return self._others


class _Right:
    """What is right for a plan: the outputs of the masked model, or of another small one."""

    def __init__(self, reference: Reference, plan: Plan, other: torch.nn.Module | None) -> None:
        self.reference, self.plan, self.other = reference, plan, other

    def outputs(self, reading: Reading, drawn: bool, noisy: bool = False) -> Outputs | None:
        """Returns outputs, or None where the reference cannot run."""
        known, key = self.reference._known, (id(self.other), id(reading), drawn, noisy)
        if key not in known:
            try:
                known[key] = self._run(reading, drawn, noisy)
            except Exception:  # the model's own code, in dtypes that it may not be made for
                known[key] = None
        return known[key]

    def _run(self, reading: Reading, drawn: bool, noisy: bool) -> Outputs:
        r = self.reference

        if self.other is not None:
            return _run(
                self.small(self.other, reading, drawn), r.given[drawn], None, reading, noisy
            )
        model = _widened(r.model, r.values() if drawn else r.state, r.names, reading)
        return _run(model, r.given[drawn], r.outputs, reading, noisy)

    def small(self, small: torch.nn.Module, reading: Reading, drawn: bool) -> torch.nn.Module:
        """Returns a copy of a small model, maybe in another precision, or with other values."""
        r = self.reference
        state = self.plan.apply(r.values()) if drawn else small.state_dict(keep_vars=True)
        return _widened(small, state, r.names, reading)


def _widened(
    model: torch.nn.Module,
    state: Mapping[str, torch.Tensor],
    names: Mapping[str, str],
    reading: Reading,
) -> torch.nn.Module:
    """Returns a copy of a module with other values, in other dtypes."""
    if not reading:
        return with_state(model, state, names)
    wide = {path: widen(x.detach(), reading) for path, x in state.items()}
    return with_state(model, wide, names)._apply(lambda x: widen(x, reading))


def with_state(
    model: torch.nn.Module, state: Mapping[str, torch.Tensor], names: Mapping[str, str]
) -> torch.nn.Module:
    """Returns a copy of a module that holds other parameters and buffers.

    Parameters are shared, so that copies are cheap; what the forward writes to is not.

    Args:
        model: stays as it is.
        state: new tensors by path; parameters become parameters.
        names: every name of the state dict, and the path of its leaf.
    """
    full = model.state_dict(keep_vars=True)
    read = {id(x) for m in model.modules() if not _writes(m) for x in m.parameters(recurse=False)}
    memo: dict[int, Any] = {id(x): x for x in model.parameters() if id(x) in read}
    for module in model.modules():
        for x in vars(module).values():  # of which torch makes no copies: results of operations
            if isinstance(x, torch.Tensor) and not x.is_leaf:
                memo[id(x)] = x.detach().clone()
    for name, path in names.items():
        old, new = full[name], state.get(path)
        if new is None or new is old:
            continue
        if id(old) not in read:
            new = new.detach().clone()
        if isinstance(old, torch.nn.Parameter) and not isinstance(new, torch.nn.Parameter):
            new = torch.nn.Parameter(new.detach(), requires_grad=False)
        memo[id(old)] = new
    return copy.deepcopy(model, memo)


def _writes(module: torch.nn.Module) -> bool:
    """Whether the forward of a module writes to its parameters."""
    return getattr(module, "max_norm", None) is not None


def _run(
    model: torch.nn.Module,
    given: Any,
    cuts: Sequence[Cuts] | None = None,
    reading: Reading = AS_IT_IS,
    noisy: bool = False,
    seed: int = 0,
    training: bool = False,
) -> Outputs:
    """Returns the outputs of a module in one mode; it must be a copy."""
    args, kwargs = pytree.tree_map(lambda x: _given(x, reading), given)
    model.train(training)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(plain_kernels(seed))
        warnings.simplefilter("ignore")
        if noisy:
            stack.enter_context(Perturbed(0))
        if reading:
            stack.enter_context(Widened(reading))
        found = model(*args, **kwargs)
    return _floats(found, cuts)


def _first_line(error: Exception) -> str:
    line = str(error).strip().splitlines()
    return line[0] if line else type(error).__name__


def _given(x: Any, reading: Reading) -> Any:
    return widen(x.detach().clone(), reading) if isinstance(x, torch.Tensor) else x


def _random(given: Any) -> Any:
    generator = torch.Generator().manual_seed(0)

    def random(x: Any) -> Any:
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            return torch.randn(x.shape, generator=generator).to(x)
        return x

    return pytree.tree_map(random, given)


def _floats(outputs: Any, cuts: Sequence[Cuts] | None) -> Outputs:
    leaves = pytree.tree_leaves(plain(outputs))
    found = []
    for x, cut in zip(leaves, cuts or [()] * len(leaves), strict=True):
        if isinstance(x, torch.Tensor) and (x.is_floating_point() or x.dtype == torch.bool):
            for axis, kept in cut:
                x = x.index_select(axis, torch.as_tensor(kept, device=x.device))
            found.append(x.double())
    return found


def distance(expected: Outputs, found: Outputs) -> float:
    """Returns the largest difference of any output, relative to its largest value."""
    worst = 0.0
    if [x.shape for x in expected] != [x.shape for x in found]:
        return math.inf
    for x, y in zip(expected, found, strict=True):
        if not x.numel():
            continue
        fine = x.isfinite()
        if not bool((fine == y.isfinite()).all()) or not fine.any():
            return math.inf
        scale = float(x[fine].abs().max())
        off = float((x[fine] - y[fine]).abs().max())
        worst = max(worst, off / scale if scale else off)
    return worst
