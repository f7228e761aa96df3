"""What rules are resolved to: pools of layers, and how many units each of them loses."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import jax
import numpy as np

from purepruning.arguments import collection, fraction, instance, missing, shown
from purepruning.arrays import has_values, is_array, is_concrete, namespace
from purepruning.config.rules import Gradual, Scope
from purepruning.counts import count_of, counts_of
from purepruning.granularity import NM, Granularity
from purepruning.layers import Layer
from purepruning.masks import named_masks, to_numpy
from purepruning.types import Masks, Params, Stats

if TYPE_CHECKING:
    from purepruning.config.allocation import Allocation, KeptWhole


BiasRule = Literal["follow", "keep"]

#: Pools of fewer units are ranked in memory, with counts in int32.
_COUNTABLE = 2**31


@dataclasses.dataclass(frozen=True)
class Pool:
    """Layers whose units are ranked together and share one count.

    In layer scope a pool is one layer, named after it; its count is a number of units (of each
    stacked layer, where layers are stacked). In global scope a pool is all layers of one rule,
    named ``"rule 0"``; its count is a number of weights, since units of different layers differ in
    size.

    With a coupling a pool is a set of coupled units, and its layers are all that make
    them; its count is a number of units (of each part that must lose equally many). A pool of the
    name of a layer is what that layer loses beyond. In global scope there is one pool,
    ``"model"``, whose count is the cost to remove, in steps of :attr:`step`.

    Attributes:
        name: key of the pool in ``config.counts``.
        rule: number of the rule that selected it.
        layers: in the order of their names.
        size: the number that is pruned at sparsity 1: units, or weights in global scope.
        most: the largest count there is: it leaves every layer a unit, or what caps demand.
        caps: in global scope, how many units each (stacked) layer can lose at most.
        sparsity: the fraction asked for; None if the rule names none.
        allow_empty: whether the rule lets a layer lose all its units.
        gradual: the rule's gradual keys, if it has any.
        prune_iterations: number of rounds the rule asks for, if it does.
        allowed: the counts there are, ascending, where rounding or a least number of channels
            leaves some out; None for all.
        total: in global scope with a coupling, the cost of the whole model; else None.
        step: then the cost that one of a count stands for.
    """

    name: str
    rule: int
    layers: tuple[Layer, ...]
    size: int
    most: int
    caps: tuple[int, ...]
    sparsity: float | None
    allow_empty: bool
    gradual: Gradual | None
    prune_iterations: int | None
    allowed: tuple[int, ...] | None = None
    total: int | None = None
    step: int = 1

    # Pools are hashed at every call of a compiled function.
    @functools.cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, f.name) for f in dataclasses.fields(self)))

    def __hash__(self) -> int:
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        # Hashes of strings differ from process to process.
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @functools.cached_property
    def problem(self) -> Pool:
        """The pool without what its rule says about numbers: what compiled code depends on."""
        return dataclasses.replace(self, sparsity=None, gradual=None, prune_iterations=None)

    def count_of(self, sparsity: float) -> int:
        """Returns the count of a sparsity: see :func:`count_of`, and the nearest allowed below it.

        Where the pool is a whole model's cost, the least count that leaves at most
        ``1 - sparsity`` of it.
        """
        if self.total is not None:
            left = count_of(1 - fraction(sparsity, "sparsity"), self.total)
            return -((left - self.total) // self.step)
        return int(self.allow(count_of(sparsity, self.size)))

    def counts_of(self, sparsities: np.ndarray) -> np.ndarray:
        """Returns the same for a float64 array of sparsities, as int64."""
        if self.total is not None:
            return -((counts_of(1 - sparsities, self.total) - self.total) // self.step)
        return np.asarray(self.allow(counts_of(sparsities, self.size)))

    def allow(self, counts: Any) -> Any:
        """Returns the largest allowed counts that do not exceed ``counts``, as NumPy."""
        if self.allowed is None:
            return counts
        allowed = np.asarray(self.allowed)
        return allowed[np.searchsorted(allowed, counts, side="right") - 1]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["counts", "masks"],
    meta_fields=["pools", "scope", "granularity", "bias", "inverted", "allocation"],
)
@dataclasses.dataclass(frozen=True)
class Config:
    """Rules resolved against a layer table: all that a pruner needs to know besides the numbers.

    A pytree whose only leaves are the counts, and masks where it has any, so that one compiled
    function serves every sparsity, and ``vmap`` over counts gives the masks of many sparsities at
    once. Everything else is static.

    Attributes:
        counts: by pool name, how many units (weights in global scope) to prune; None where the rule
            names no sparsity.
        pools: what is ranked together.
        scope: ``"layer"`` or ``"global"``.
        granularity: what a unit is.
        bias: ``"follow"`` if a bias is pruned where its whole output channel is, else ``"keep"``.
        masks: by parameter path, what is pruned already; see :meth:`with_masks`.
        inverted: whether the units of highest score are pruned, see
            :func:`purepruning.invert_scores`.
        allocation: with a coupling, how units lie in layers; else None.
    """

    counts: dict[str, Any]
    pools: tuple[Pool, ...]
    scope: Scope
    granularity: Granularity
    bias: BiasRule
    masks: dict[str, Any] = dataclasses.field(default_factory=dict)
    inverted: bool = False
    allocation: Allocation | None = None

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every layer that is pruned."""
        found = tuple(layer for pool in self.pools for layer in pool.layers)
        # Coupled, a layer may lie in several pools.
        return found if self.allocation is None else tuple(dict.fromkeys(found))

    @property
    def companions(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters that pruners mask along with coupled units, by path."""
        if self.allocation is None or self.bias != "follow":
            return {}
        leaves = self.allocation.coupling.leaves
        return {path: leaves[path].shape for path, axes in self.allocation.along.items() if axes}

    @property
    def readers(self) -> tuple[Layer, ...]:
        """With a coupling, the layers whose inputs are units that are pruned.

        Those whose statistics of inputs :func:`purepruning.flap` and :func:`purepruning.minitron`
        take: ``inputs.init(params, config.readers, keep=[...])``.
        """
        return () if self.allocation is None else self.allocation.readers

    @property
    def kept_whole(self) -> tuple[KeptWhole, ...]:
        """With a coupling, the sets of units that stay although a rule selects a layer, and why."""
        return () if self.allocation is None else self.allocation.kept_whole

    @property
    def lowered(self) -> dict[str, tuple[int, int]]:
        """By pool, the count its rule's sparsity asks for and the lower one that is allowed."""
        asked = {
            pool.name: (count_of(pool.sparsity, pool.size), pool.count_of(pool.sparsity))
            for pool in self.pools
            if pool.sparsity is not None and pool.allowed is not None
        }
        return {name: pair for name, pair in asked.items() if pair[0] != pair[1]}

    def with_counts(self, counts: Mapping[str, Any]) -> Config:
        """Returns the config with other counts: integers, or integer arrays to ``vmap`` over.

        N:M, whose counts are fixed, has none: ``{}``.

        Raises:
            KeyError: a pool is missing or unknown.
            ValueError: the counts of N:M are fixed.
        """
        instance(counts, Mapping, "with_counts: counts", "a mapping from pool names to counts")
        if counts:
            self._check_counted()
        if isinstance(self.granularity, NM):
            return self
        names = [pool.name for pool in self.pools]
        for name in counts:
            if name not in names:
                raise KeyError(missing(f"with_counts: no pool is called {name!r}", name, names))
        for pool in self.pools:
            if pool.name not in counts:
                raise KeyError(f"with_counts: counts have none for pool {pool.name!r}")
            if counts[pool.name] is not None:  # as in a config whose rules name no sparsity
                check_count("with_counts", pool, counts[pool.name])
        return dataclasses.replace(self, counts={name: counts[name] for name in names})

    def with_masks(self, masks: Masks) -> Config:
        """Returns the config by which what ``masks`` prune is pruned first, whatever its score.

        Counts include it. A pruner's masks are then nested in ``masks``, unless a count, or in
        global scope a layer's cap, is smaller than what they prune. A unit of several weights is
        pruned already if all its weights are. Masks of biases play no part: biases follow their
        weights.

        Raises:
            KeyError, ValueError, TypeError: by the pruner, if the masks do not fit its ``params``.
        """
        return dataclasses.replace(self, masks=named_masks(masks))

    def with_sparsity(self, sparsity: float | Sequence[float] | Mapping[str, Any]) -> Config:
        """Returns the config with the counts of another sparsity; nothing is resolved again.

        Args:
            sparsity: a fraction for all pools; or a sequence of fractions, whose counts come as
                int32 arrays to ``vmap`` over; or a mapping from pool name to either, where pools
                that it does not name keep their counts.

        Raises:
            ValueError: a fraction outside [0, 1], 1 where the rule does not allow an empty layer,
                or one that the caps of global scope do not reach.
            KeyError: a pool is unknown.
            TypeError: something that is no fraction.

        >>> from purepruning import Layer, resolve
        >>> layer = Layer("fc", "Linear", "fc.w", (4, 25), out_axes=(1,), in_axes=(0,))
        >>> config = resolve([{"sparsity": 0.5, "op_types": ["Linear"]}], [layer])
        >>> config.counts, config.with_sparsity(0.29).counts
        ({'fc': 50}, {'fc': 29})
        """
        self._check_counted()
        names = [pool.name for pool in self.pools]
        if not isinstance(sparsity, Mapping):
            sparsity = dict.fromkeys(names, sparsity)
        for name in sparsity:
            if name not in names:
                message = f"with_sparsity: sparsity: no pool is called {name!r}"
                raise KeyError(missing(message, name, names))
        counts = dict(self.counts)
        for pool in self.pools:
            if pool.name in sparsity:
                counts[pool.name] = self._count(pool, sparsity[pool.name])
        return dataclasses.replace(self, counts=counts)

    def _check_counted(self) -> None:
        if isinstance(self.granularity, NM):
            raise ValueError(f"the sparsity of {self.granularity} is fixed by keep and of")

    def _count(self, pool: Pool, sparsity: Any) -> int | np.ndarray:
        where = f"pool {pool.name!r}: sparsity"
        several = isinstance(sparsity, Sequence) and not isinstance(sparsity, str)
        if not several and getattr(sparsity, "ndim", 0) == 0:
            return checked_count(pool, fraction(sparsity, where), where)
        some = collection(sparsity, where, "a fraction, or several of them")
        fractions = [fraction(s, where) for s in some]
        check_countable(where, pool)
        counts = [checked_count(pool, s, where) for s in fractions]
        return np.asarray(counts, np.int32)


#: What prunes: ``(params, stats, config) -> masks``.
Pruner: TypeAlias = Callable[[Params, Stats, Config], Masks]

#: What prunes, and repairs the weights that stay: ``(params, stats, config) -> (params, masks)``.
RepairingPruner: TypeAlias = Callable[[Params, Stats, Config], tuple[Params, Masks]]


def check_config(where: str, config: Any) -> None:
    """Raises for what is no config, or one that was put together wrongly; all entries pass here.

    What its counts are is looked at where they are used, since they may be traced.

    Raises:
        TypeError: it is no config, or its counts or masks are no mappings.
        ValueError: its counts are not those of its pools.
    """
    if not isinstance(config, Config):
        raise TypeError(f"{where}: config must be what resolve returned, got {shown(config)}")
    for field in ("counts", "masks"):
        instance(getattr(config, field), Mapping, f"{where}: config.{field}", "a mapping")
    for path, mask in config.masks.items():
        if not is_array(mask):
            raise TypeError(
                f"{where}: config.masks[{path!r}] must be a boolean array, got {shown(mask)}; "
                "change them by with_masks"
            )
    names = [] if isinstance(config.granularity, NM) else [pool.name for pool in config.pools]
    if config.counts.keys() != set(names):
        raise ValueError(
            f"{where}: config.counts must have one for each pool, {names}, got "
            f"{list(config.counts)}; change them by with_counts"
        )


def check_countable(where: str, pool: Pool) -> None:
    """Raises ValueError for a pool whose counts int32 does not hold, which compiled code needs."""
    if pool.total is None and pool.size >= _COUNTABLE:
        raise ValueError(
            f"{where}: {pool.name!r} has {pool.size} units, and {_COUNTABLE - 1} at most are "
            "ranked together in memory; split the rule, rank larger units, or prune files in "
            "global scope by prune_files"
        )


def check_count(where: str, pool: Pool, count: Any) -> None:
    """Raises unless a count is an integer, or an array of them, that its pool can lose, if known.

    Raises:
        TypeError: it is no integer.
        ValueError: there is none, or it is more than the pool can lose, or not allowed.
    """
    if count is None:
        raise ValueError(
            f"{where}: rule {pool.rule} gives no sparsity for {pool.name!r}; name one in the rule "
            "or call config.with_sparsity(...)"
        )
    whole = isinstance(count, int) and not isinstance(count, bool)
    if not whole and not (is_array(count) and namespace(count).isdtype(count.dtype, "integral")):
        raise TypeError(
            f"{where}: the count of {pool.name!r} must be an integer, got {shown(count)}"
        )
    if not whole and not (is_concrete(count) and has_values(count)):
        return
    known = [count] if whole else to_numpy(count).reshape(-1).tolist()
    for n in known:
        if not 0 <= n <= pool.most:
            capped = pool.caps or pool.total is not None
            why = "max_sparsity_per_layer" if capped else "'allow_empty': True"
            raise ValueError(
                f"{where}: the count of {pool.name!r} must lie in [0, {pool.most}], got "
                f"{shown(n)}; its size is {pool.size}, and how much of it can go depends on the "
                f"rule's {why}"
            )
        if pool.allowed is not None and n not in pool.allowed:
            some = f"{', '.join(map(str, pool.allowed[:8]))}{', ...' * (len(pool.allowed) > 8)}"
            raise ValueError(
                f"{where}: the count of {pool.name!r} must be one that round_to and min_channels "
                f"allow: {some}; got {n}"
            )


def known_counts(where: str, pool: Pool, count: Any) -> np.ndarray:
    """Returns a count, or several of them, as int64 on the host.

    Raises:
        TypeError: it is not known, under ``jit`` or ``vmap``; or as :func:`check_count`.
        ValueError: as :func:`check_count`.
    """
    check_count(where, pool, count)
    check_countable(where, pool)
    if not is_concrete(count) or not has_values(count):
        raise TypeError(
            f"{where}: the count of {pool.name!r} is not known under jit or vmap; make the table "
            "outside of them, and map over it"
        )
    return np.asarray(to_numpy(count) if is_array(count) else count, np.int64)


def single_count(where: str, pool: Pool, count: Any) -> int:
    """Returns one count as an integer.

    Raises:
        TypeError, ValueError: as :func:`known_counts`; or there are several.
    """
    known = known_counts(where, pool, count)
    if known.ndim:
        raise ValueError(
            f"{where}: the count of {pool.name!r} has shape {known.shape}; give one number, and "
            "call this for each"
        )
    return int(known)


def checked_count(pool: Pool, sparsity: float, where: str) -> int:
    """Returns the pool's count; raises if its layers cannot or must not lose that many."""
    count = count_of(sparsity, pool.size) if pool.total is None else pool.count_of(sparsity)
    if count <= pool.most:
        return pool.count_of(sparsity)
    if pool.total is not None:
        raise ValueError(
            f"{where} {sparsity:g} asks for removing {count * pool.step:,} of {pool.total:,}, but "
            f"all units that may go make {pool.most * pool.step:,} (max_sparsity_per_layer is 0.99 "
            "where not given)"
        )
    if pool.caps:
        raise ValueError(
            f"{where} {sparsity:g} asks for {count} of {pool.size} weights, but the layers can "
            f"lose at most {pool.most} under max_sparsity_per_layer (0.99 where not given)"
        )
    raise ValueError(
        f"{where} {sparsity!r} would prune every unit of {pool.name!r}; give its rule "
        "'allow_empty': True if that is meant"
    )
