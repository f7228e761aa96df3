"""The coupling of a model as data.

Made by a front end from its atoms, and all that allocation, masks, costs, reports and shrinking
look at. Units are numbered from 1; 0 stands for what is never removed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from purepruning.arguments import collection, instance, is_number, one_of, shown
from purepruning.arrays import (
    array_like,
    has_values,
    is_array,
    is_concrete,
    is_torch,
    jax_array,
    namespace,
)
from purepruning.counts import count_of
from purepruning.coupling.branches import Branch, branches_of
from purepruning.coupling.describe import text
from purepruning.coupling.experts import mixtures_of
from purepruning.coupling.unit_masks import (
    Chosen,
    Conflicts,
    check_removal,
    masks_of,
    repaired,
    units_of,
)
from purepruning.coupling.units import Coupled, Family, FrozenAxis, Product
from purepruning.masks import by_path, merge_masks, to_numpy
from purepruning.trees import flatten


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Coupling:
    """Which slices of which parameters can only be kept or removed together.

    Attributes:
        leaves: every parameter by path.
        families: the units, by family, the largest first.
        groups: how units may be chosen: each group is a tuple of int arrays of equal length, and
            loses equally many units of each. Most groups are one array; grouped convolutions and
            stacked layers make several.
        frozen: axes that stay, wholly or in part, and why; taps of kernels are not listed.
        unknown: operations without a rule, and how often they met something prunable.
        products: the contractions of the program, for counting multiply-adds.
        statistics: how many sums over axes that may shrink are corrected for what is removed.
        outputs: which outputs of the function keep their size, as :func:`couple` was told.
    """

    leaves: Mapping[str, Coupled]
    families: tuple[Family, ...]
    groups: tuple[tuple[np.ndarray, ...], ...]
    frozen: tuple[FrozenAxis, ...]
    unknown: Mapping[str, int]
    products: tuple[Product, ...]
    statistics: int = 0
    outputs: Any = True

    @property
    def n_units(self) -> int:
        """Number of units."""
        return sum(len(f.units) for f in self.families)

    @functools.cached_property
    def family_of(self) -> np.ndarray:
        """For every unit the index of its family; -1 at 0."""
        found = np.full(self.n_units + 1, -1)
        for i, family in enumerate(self.families):
            found[family.units] = i
        return found

    @functools.cached_property
    def branches(self) -> tuple[Branch, ...]:
        """The residual branches, whose units may go all at once: a rule's ``"units": "branch"``.

        >>> import jax, jax.numpy as jnp
        >>> import purepruning as pp
        >>> def fn(params, x):
        ...     h = x @ params["stem"]
        ...     for block in params["blocks"]:
        ...         h = h + jax.nn.relu(h @ block["up"]) @ block["down"]
        ...     return h @ params["head"]
        >>> blocks = [{"up": jnp.ones((4, 8)), "down": jnp.ones((8, 4))} for _ in range(2)]
        >>> params = {"stem": jnp.ones((3, 4)), "blocks": blocks, "head": jnp.ones((4, 2))}
        >>> pp.couple(fn, params, jnp.ones((1, 3))).branches
        (Branch('blocks.0.up[1]', 8 units), Branch('blocks.1.up[1]', 8 units))
        """
        return branches_of(self.leaves, self.families)

    @functools.cached_property
    def mixtures(self) -> dict[str, tuple[int, ...]]:
        """By name, the branches that are the experts of one mixture, by their index.

        Experts that are stacked in one array are families of kind ``"expert"`` instead.
        """
        return mixtures_of(self.branches, self.leaves, self.frozen)

    @functools.cached_property
    def digest(self) -> str:
        """A hash of the structure: couplings of the same units in the same parameters have one."""
        sha = hashlib.sha256()
        rows: list[Any] = [
            self.groups,
            [(f.name, f.kind, f.units, f.axes) for f in self.families],
        ]
        rows += [(path, *dataclasses.astuple(leaf)) for path, leaf in sorted(self.leaves.items())]
        rows += [(p.weights, str(p.constant), p.units) for p in self.products]
        for x in _arrays(rows):
            sha.update(f"{x.shape}{x.dtype}".encode() + x.tobytes() if _is_array(x) else x.encode())
        return sha.hexdigest()

    def removed(self, pruned: Iterable[int]) -> np.ndarray:
        """Returns a boolean by unit number, True where pruned.

        Raises:
            ValueError: a number that is no unit, or a selection that is uneven where it must not be
                or leaves nothing of an axis.
            TypeError: what is given are no whole numbers.
        """
        removed = self.marked(pruned)
        self.check(removed)
        return removed

    def marked(self, pruned: Iterable[int] | np.ndarray) -> np.ndarray:
        """Returns a boolean by unit number, True where pruned, whatever that leaves of the axes.

        Args:
            pruned: numbers of units; such a boolean is returned as it is.

        Raises:
            ValueError: a number that is no unit, or booleans of another shape.
            TypeError: what is given are no whole numbers.
        """
        if isinstance(pruned, np.ndarray) and pruned.dtype == bool:
            if pruned.shape != (self.n_units + 1,):
                raise ValueError(
                    f"pruned must be {self.n_units + 1} booleans by unit number, or unit numbers; "
                    f"got booleans of shape {pruned.shape}"
                )
            return pruned
        some = pruned.reshape(-1).tolist() if isinstance(pruned, np.ndarray) else pruned
        numbers = collection(some, "pruned", "unit numbers, such as [1, 2, 3]")
        for n in numbers:
            if isinstance(n, bool) or not isinstance(n, int | np.integer):
                raise TypeError(
                    f"pruned must hold unit numbers, got {shown(n)} (of booleans by unit number, "
                    "pass np.flatnonzero)"
                )
        if numbers and not (min(numbers) >= 1 and max(numbers) <= self.n_units):
            raise ValueError(
                f"pruned must hold unit numbers from 1 to {self.n_units}, got "
                f"{shown(min(numbers))} to {shown(max(numbers))}"
            )
        removed = np.zeros(self.n_units + 1, bool)
        removed[np.asarray(numbers, np.int64)] = True
        return removed

    def check(self, removed: np.ndarray) -> None:
        """Raises ValueError if removing these units is uneven or empties an axis."""
        check_removal(self.leaves, self.families, self.groups, removed)

    def masks(self, pruned: Iterable[int], params: Any) -> Any:
        """Returns the masks that prune units everywhere: in what makes, scales and reads them.

        With these masks a masked model computes what the shrunk one does. Masks broadcast to their
        parameters; a parameter that loses nothing has none.

        Args:
            pruned: numbers of units.
            params: the parameters, for the tree and the framework of the masks.

        Raises:
            ValueError: see :meth:`removed`; or a parameter has another shape than when coupled.
            KeyError: a parameter is missing.
        """
        return masks_of(self.leaves, self.removed(pruned), params)

    def complete(self, masks: Any, params: Any, *, conflicts: Conflicts = "keep") -> Any:
        """Returns masks with all coupled slices: scales, biases, and what reads the channels.

        ``masks`` are those of any pruner, which cover the layers that it prunes. A model masked by
        the result computes what the one that :func:`purepruning.shrink` makes of it does; and
        training that keeps these masks never touches what would be cut.

        Args:
            masks: the masks.
            params: the parameters.
            conflicts: as in :func:`purepruning.shrink`, where the layers that make a unit disagree.

        Raises:
            ValueError: they disagree, and ``conflicts`` is ``"refuse"``; what is removed is uneven
                or empties an axis. See also :meth:`masks`.

        >>> import jax.numpy as jnp
        >>> import purepruning as pp
        >>> params = {"one": jnp.ones((2, 3)), "bias": jnp.ones(3), "two": jnp.ones((3, 1))}
        >>> fn = lambda p, x: (x @ p["one"] + p["bias"][None]) @ p["two"]
        >>> coupling = pp.couple(fn, params, jnp.ones((1, 2)))
        >>> masks = {"one": jnp.array([[True, False, True]]), "bias": None, "two": None}
        >>> masks = coupling.complete(masks, params)
        >>> masks["bias"].tolist(), masks["two"].tolist()
        ([True, False, True], [[True], [False], [True]])
        """
        chosen = self.chosen(masks, params, conflicts=conflicts)
        return merge_masks(self.masks(np.flatnonzero(chosen.removed), params), masks)

    def chosen(self, masks: Any, params: Any, *, conflicts: Conflicts = "keep") -> Chosen:
        """Returns the units that masks remove, and what was changed to make them agree.

        Args:
            masks: the masks.
            params: the parameters; only their paths and shapes matter.
            conflicts: as in :func:`purepruning.shrink`, where the layers that make a unit disagree.

        Raises:
            ValueError: they disagree, and ``conflicts`` is ``"refuse"``; what is removed is uneven
                or empties an axis.
        """
        one_of("conflicts", conflicts, ("refuse", "keep", "remove"))
        given = by_path(masks, params)
        return units_of(self.leaves, self.families, self.groups, given, conflicts)

    def repair(self, masks: Any, params: Any) -> Any:
        """Returns masks that agree: a channel is pruned where all layers that make it prune it.

        For masks that were loaded, or come from elsewhere: what only some of the coupled layers
        prune is kept again, and of groups that must lose equally many, each loses as many as the
        one that loses least (NNI's mask conflict). Single weights that are masked stay so.

        Args:
            masks: the masks.
            params: the parameters; only their tree and shapes matter.

        >>> import jax.numpy as jnp
        >>> import purepruning as pp
        >>> params = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 3)), "head": jnp.ones((3, 1))}
        >>> fn = lambda p, x: (x @ p["a"] + x @ p["b"]) @ p["head"]
        >>> coupling = pp.couple(fn, params, jnp.ones((1, 2)))
        >>> masks = {"a": jnp.array([[True, False, False]]), "b": jnp.array([[False, False, True]])}
        >>> fixed = coupling.repair(masks, params)
        >>> fixed["a"].all(0).tolist(), fixed["b"].all(0).tolist()
        ([True, False, True], [True, False, True])
        """
        given = by_path(masks, params)
        fixed = repaired(self.leaves, self.families, self.groups, given)
        arrays = {
            path: array_like(given[path], mask) if is_torch(given[path]) else jax_array(mask)
            for path, mask in fixed.items()
        }
        return flatten(params).rebuild(arrays)

    def lowest(self, scores: Any, sparsity: float) -> np.ndarray:
        """Returns the units of lowest score, an equal share of every group.

        Args:
            scores: float array by unit number (``scores[0]`` is ignored), or of shape
                ``(n_units,)`` for units 1, 2, ...
            sparsity: fraction of every group's units, as in :func:`purepruning.count_of`.

        Raises:
            ValueError: scores of another length, or NaN.
        """
        where, n = "Coupling.lowest: scores", self.n_units
        if isinstance(scores, list | tuple) and all(map(is_number, scores)):
            scores = np.asarray(scores, np.float64)
        if not is_array(scores) or not (is_concrete(scores) and has_values(scores)):
            raise TypeError(f"{where} must be {n} known numbers, got {shown(scores)}")
        if tuple(scores.shape) not in ((n,), (n + 1,)):
            raise ValueError(f"{where} must be {n} numbers, one for each unit, got {shown(scores)}")
        if not namespace(scores).isdtype(scores.dtype, ("real floating", "integral")):
            raise TypeError(f"{where} must be real numbers, got {scores.dtype}")
        scores = np.asarray(to_numpy(scores), np.float64)
        if len(scores) == n:
            scores = np.concatenate([[0.0], scores])
        if np.isnan(scores[1:]).any():
            raise ValueError(f"{where} must be {n} numbers, and some are NaN")
        found = []
        for chunks in self.groups:
            n = count_of(sparsity, len(chunks[0]))
            for chunk in chunks:
                found.append(chunk[np.argsort(scores[chunk], kind="stable")[:n]])
        return np.sort(np.concatenate(found)) if found else np.zeros(0, np.int64)

    def cost(self, pruned: Iterable[int] | np.ndarray = ()) -> tuple[int, int]:
        """Returns the number of parameters and of multiply-adds left without these units.

        ``pruned`` is as in :meth:`marked`.
        """
        removed = self.marked(pruned)
        params = 0
        for leaf in self.leaves.values():
            size = 1
            for n, units in zip(leaf.shape, leaf.units, strict=True):
                size *= n if units is None else _left(units, removed)
            params += size
        macs = sum(
            p.constant * math.prod(_left(units, removed) for units in p.units)
            for p in self.products
        )
        return params, macs

    def __repr__(self) -> str:
        return f"Coupling({self.n_units} units in {len(self.families)} families)"

    def __str__(self) -> str:
        return text(self.families, self.frozen, self.unknown, *self.cost())


def _is_array(x: Any) -> bool:
    return isinstance(x, np.ndarray)


def _arrays(x: Any) -> Iterator[Any]:
    """Yields the arrays in nested tuples and lists; other things as text."""
    if isinstance(x, list | tuple):
        yield f"{len(x)}("
        for part in x:
            yield from _arrays(part)
    else:
        yield np.ascontiguousarray(x) if _is_array(x) else repr(x)


def check_coupling(where: str, coupling: Any) -> None:
    """Raises TypeError for what is no coupling; ``where`` names the function in messages."""
    instance(coupling, Coupling, f"{where}: coupling", "what couple returned")


def _left(units: np.ndarray, removed: np.ndarray) -> int:
    keep = ~removed[units].any(-1)
    return int(keep.sum()) if units.ndim == 2 else int(keep[0].sum())
