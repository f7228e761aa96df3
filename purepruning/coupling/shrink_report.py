"""What shrinking returns, in any framework, and checks that coupling and model belong together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from purepruning.coupling.coupling import Coupling
from purepruning.coupling.describe import number
from purepruning.coupling.plan import Plan

Norms = Literal["original", "kept"]


#: What a smaller model is: the model's own class, a graph of its operations, or a function.
Kind = Literal["module", "graph", "function"]

_KINDS = {
    "module": "the model's own class",
    "graph": "a graph of its operations",
    "function": "a function of smaller parameters",
}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ShrinkReport:
    """What a shrunk model lost, and what it is.

    Attributes:
        plan: which positions stay; data that cuts other checkpoints and optimizer states.
        masks: the complete masks: the masked model that equals the shrunk one.
        params, macs: parameters and multiply-adds before and after.
        norms: which meaning of means over shrunk axes was used.
        statistics: how many sums are corrected for removed positions, with ``norms="original"``.
        restored: units that the masks prune and that stay, since not all that makes them agreed.
        extended: units that go although not all that makes them is masked.
        kind: what the result is: ``"module"``, of the model's own class; ``"graph"``, a graph
            module of its operations (torch); ``"function"``.
        reason: why it is not of the model's own class, and, for torch, what it cannot do in
            training mode; empty where there is nothing to say.
        deviation: largest difference of the result from its reference when both were run, relative
            to the largest output; None where there was nothing to compare. NNX and Equinox compare
            the model with the function, on random parameters; torch compares the module with the
            masked one, in float64, or in its own dtypes where that does not run.
        fixed: for torch, the axes of inputs that must keep the size of the example, such as
            ``"x axis 2 = 32"``: a graph refuses other sizes there. All others are open; a graph was
            compared with the masked model at other sizes of them.
        names: for torch, the path of the leaf that every name of the state dict stands for; of
            tied weights there is one.
        replaced: for torch, the norms of a result of the model's own class that divide by as many
            positions as there were, in modules of their own.
        config: for a model of transformers of its own class, which numbers of its config changed,
            so that ``save_pretrained`` and ``from_pretrained`` give it again; or why no config says
            what is left, and :func:`rebuild <purepruning_interop.torch.rebuild>` has to.
        whole: for JAX, axes of parameters that lay over devices which do not divide what is left of
            them, and are whole on each now; all others are laid out as they were. To keep them,
            prune a multiple: ``resolve(..., round_to=...)``.
    """

    plan: Plan
    masks: Any
    params: tuple[int, int]
    macs: tuple[Any, Any]
    norms: str
    statistics: int
    restored: tuple[int, ...]
    extended: tuple[int, ...]
    kind: Kind = "function"
    reason: str = ""
    deviation: float | None = None
    fixed: tuple[str, ...] = ()
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    replaced: tuple[str, ...] = ()
    config: str = ""
    whole: tuple[str, ...] = ()

    @property
    def dynamic(self) -> bool:
        """Whether the batch, the first axis of the inputs, may have any size."""
        return not any(" axis 0 = " in fixed for fixed in self.fixed)

    def __repr__(self) -> str:
        return f"ShrinkReport(params={self.params}, macs={self.macs}, kind={self.kind!r})"

    def __str__(self) -> str:
        (p, q), (m, k) = self.params, self.macs
        lines = [
            f"parameters {p:,} -> {q:,} ({q / max(p, 1):.1%})",
            f"multiply-adds {number(m)} -> {number(k)}"
            + (f" ({k / max(m, 1):.1%})" if isinstance(m, int) else ""),
            f"units removed: {len(self.plan.removed)}",
            f"norms: {self.norms}"
            + (f", {self.statistics} statistics corrected" if self.norms == "original" else ""),
        ]
        if self.restored:
            lines.append(f"units kept although masked, for others need them: {len(self.restored)}")
        if self.extended:
            lines.append(f"units removed although not masked everywhere: {len(self.extended)}")
        if self.whole:
            lines.append(f"whole now, since devices do not divide them: {'; '.join(self.whole)}")
        details = [self.reason] if self.reason else []
        details += [] if self.deviation is None else [f"agrees to {self.deviation:.0e}"]
        details += [f"only for {', '.join(self.fixed)}"] if self.fixed else []
        count = len(self.replaced)
        details += [f"{count} norms keep their divisors"] if count else []
        details += [self.config] if self.config else []
        end = f" ({'; '.join(details)})" if details else ""
        lines.append(f"result: {_KINDS[self.kind]}{end}")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Shrunk:
    """A smaller model: what shrinking returns, for a function or a model of any framework.

    Attributes:
        model: the smaller model. Of the model's own class where ``reason`` is empty; else a graph
            module (torch), or None: then ``fn`` is what there is.
        fn: ``fn(params, *inputs, **kwargs)``, the smaller model as a function; for torch
            :func:`torch.func.functional_call` of ``model``.
        params: the smaller parameters, as ``fn`` takes them: with the statistics in JAX, without
            the buffers in torch.
        report: what was removed, and how.
    """

    model: Any
    fn: Callable[..., Any]
    params: Any
    report: ShrinkReport

    @property
    def reason(self) -> str:
        """Why ``model`` is not of the model's own class; empty where it is."""
        return self.report.reason

    def __repr__(self) -> str:
        model = "None" if self.model is None else type(self.model).__name__
        return f"Shrunk(model={model}, report={self.report!r})"


def check_same(expected: Coupling, found: Coupling) -> None:
    """Raises ValueError if two couplings are not of the same parameters, coupled alike."""
    for path in {*expected.leaves, *found.leaves}:
        one, other = expected.leaves.get(path), found.leaves.get(path)
        same = (
            one is not None
            and other is not None
            and one.shape == other.shape
            and all(
                (a is None) == (b is None) and (a is None or b is None or np.array_equal(a, b))
                for a, b in zip(one.units, other.units, strict=True)
            )
        )
        if not same:
            raise ValueError(
                f"coupling does not belong to this function and these parameters: {path!r} differs"
            )


def check_plan(plan: Any) -> None:
    """Raises TypeError for what is no plan."""
    if not isinstance(plan, Plan):
        raise TypeError(
            "plan must be the plan of a report of shrink(), or what load_plan() returns, got "
            f"{type(plan).__name__}"
        )
