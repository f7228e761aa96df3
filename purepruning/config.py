"""Rules to config: which layers are pruned, in which units, and how many of them.

:func:`resolve` reads NNI-style rules once, against a layer table; every mistake in them is found
then, before any array work (:mod:`purepruning.rules` reads the single rule).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import numpy as np

from purepruning.layers import Layer, missing
from purepruning.masks import named_masks
from purepruning.rules import (
    Gradual,
    Rule,
    Scope,
    check_keys,
    fraction,
    gradual,
    integer,
    maximum,
    selected_layers,
    sparsity_of,
    whole_number,
)
from purepruning.units import NM, Block, Granularity, Grid, grid

if TYPE_CHECKING:
    from purepruning.coupling.allocation import Allocation, KeptWhole
    from purepruning.coupling.structure import Coupling

BiasRule = Literal["follow", "keep"]

_GRANULARITIES = {
    "element": "element",
    "output_channel": "output_channel",
    "input_channel": "input_channel",
    "out_channel": "output_channel",  # NNI 3.0's names
    "in_channel": "input_channel",
}
_UNITS_LIMIT = 2**31


@dataclasses.dataclass(frozen=True)
class Pool:
    """Layers whose units are ranked together and share one count.

    In layer scope a pool is one layer, named after it; its count is a number of units (of each
    stacked layer, where layers are stacked). In global scope a pool is all layers of one rule,
    named ``"rule 0"``; its count is a number of weights, since units of different layers differ in
    size.

    With a coupling a pool is a set of units that go together, and its layers are all that make
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
        if counts:
            self._check_counted()
        if isinstance(self.granularity, NM):
            return self
        names = [pool.name for pool in self.pools]
        for name in counts:
            if name not in names:
                raise KeyError(missing(f"no pool is called {name!r}", name, names))
        for name in names:
            if name not in counts:
                raise KeyError(f"counts have none for pool {name!r}")
        return dataclasses.replace(self, counts={name: counts[name] for name in names})

    def with_masks(self, masks: Any) -> Config:
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

        >>> from purepruning import Layer
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
                raise KeyError(missing(f"no pool is called {name!r}", name, names))
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
        fractions = [fraction(s, where) for s in sparsity]
        counts = [checked_count(pool, s, where) for s in fractions]
        return np.asarray(counts, np.int32)


def count_of(sparsity: float, n: int) -> int:
    """Returns how many of ``n`` units a sparsity prunes: the largest k with ``k / n <= sparsity``.

    The fraction is taken as meant, not as rounded to binary: 0.7 of 10 is 7, 0.29 of 100 is 29, and
    ``1 - 0.9`` of 10 is 1. All counts of the library, in schedules too, come from here.

    >>> count_of(0.7, 10), count_of(0.29, 100), count_of(1 - 0.9, 10), count_of(0.55, 9)
    (7, 29, 1, 4)
    """
    sparsity = fraction(sparsity, "sparsity")
    if not hasattr(n, "__index__") or n < 0:
        raise TypeError(f"n must be a number of units, got {n!r}")
    return int(counts_of(np.float64(sparsity), n))


def counts_of(sparsities: Any, n: Any) -> Any:
    """Returns the same for float64 arrays of fractions and int64 numbers of units, as int64."""
    noise = 8 * np.finfo(np.float64).eps  # a few roundings of a number near 1
    return np.minimum(np.floor(n * (sparsities + noise)).astype(np.int64), n)


def resolve(
    rules: Iterable[Rule],
    layers: Iterable[Layer],
    *,
    scope: Scope = "layer",
    granularity: Granularity | str | None = None,
    bias: BiasRule = "follow",
    coupling: Coupling | None = None,
    extra: Literal["own", "none"] | None = None,
    cost: Literal["params", "macs"] | None = None,
    per_cost: bool = False,
    round_to: int = 1,
    min_channels: int = 1,
) -> Config:
    """Returns the config that ``rules`` mean for the model that ``layers`` describe.

    A rule is a dictionary as NNI writes them. It selects the layers that satisfy every selector it
    has; of several rules that select a layer, the last one counts:

    - ``op_types``: canonical types (``"Conv2d"`` also selects a Flax ``Conv`` over two dimensions),
      class names, or ``"default"`` for all weighted layers but norms. A string or a list.
    - ``op_names``: layer names; ``op_partial_names``: parts of layer names.
    - ``exclude``: if True, the selected layers are not pruned.
    - ``sparsity`` (or ``sparsity_per_layer``): fraction of every layer's units to prune, in [0, 1);
      in global scope ``sparsity`` (or ``total_sparsity``): fraction of the weights of all the
      rule's layers together. A rule without one selects layers whose counts are given later, by
      :meth:`Config.with_sparsity`.
    - ``max_sparsity_per_layer``: in global scope, the largest fraction of a layer's units to prune,
      a number or a mapping from layer name; 0.99 where not given.
    - ``initial_sparsity``, ``final_sparsity``, ``start_epoch``, ``end_epoch``, ``frequency``,
      ``prune_iterations``: kept for schedules; the counts are those of the final sparsity.
    - ``allow_empty``: if True, sparsity 1 is accepted: layers may lose all their units.
    - ``units``: with a coupling, the kind of units where an axis lies in two factors: ``"head"``
      (what is taken of attention unless said), ``"head_position"``, ``"position"`` (what is taken
      elsewhere) or ``"block"``, see :class:`purepruning.Family`. Layers without a choice lose what
      they have.

    With a ``coupling`` channels are pruned together that can only go together (NNI's
    ``dependency_aware`` mode):

    - A unit's score is the sum of the pruner's scores of its channels, in all layers that make
      them. Those layers lose the same units, as many as the *smallest* of their sparsities says;
      where channels lie in groups (of a grouped convolution), equally many of each group.
    - With ``extra="own"`` a layer whose sparsity is higher than that of its set then loses more,
      by its own scores, until it has lost its own share. Such masks no longer agree, so that
      :func:`purepruning.shrink` must be told what to do; ``extra="none"`` leaves it at the common
      ones, as NNI does from 2.9 on.
    - A layer that makes such channels and that no rule selects, or that one excludes, protects
      them: nothing is pruned in common. :attr:`Config.kept_whole` lists what stays, and why. A
      selected layer whose channels all stay by themselves (the outputs of a model) is an error.
    - With ``scope="global"`` the units of all layers are ranked together, and the lowest go until
      the whole model's parameters or multiply-adds are at most ``1 - sparsity`` of what they were:
      fewer would not do.

    Args:
        rules: the rules, in order.
        layers: the layer table.
        scope: ``"layer"`` prunes every layer to its own sparsity; ``"global"`` ranks the units of
            all layers of a rule together, each at the cost of its number of weights, and prunes the
            lowest-ranked as long as they fit into the rule's share of the weights.
        granularity: ``"element"`` (unless given), ``"output_channel"``, ``"input_channel"``, a
            :class:`Block` or :class:`NM`. With a coupling it is always ``"output_channel"``.
        bias: whether a bias is pruned where all weights of its output channel are (``"follow"``, as
            in NNI from 2.0 on), or never (``"keep"``).
        coupling: what :func:`purepruning.couple` returned for the model.
        extra: ``"own"`` (unless given) or ``"none"``, in layer scope with a coupling.
        cost: ``"params"`` (unless given) or ``"macs"``: what the sparsity counts in global scope
            with a coupling.
        per_cost: whether units are then ranked by their score per cost, that of removing the unit
            alone from the whole model.
        round_to: with a coupling, the channels that a set keeps in a layer are a multiple of this,
            or all of them: fewer are pruned, never more. :attr:`Config.lowered` says where.
        min_channels: with a coupling, every set keeps at least so many channels of a layer.

    Raises:
        ValueError, TypeError: a mistake in a rule, or a layer without such units. The message gives
            the rule's number, the key, what was expected, what came, and the nearest valid names.
        KeyError: the coupling has no parameter of that name.

    >>> from purepruning import Layer
    >>> table = [Layer("conv", "Conv2d", "conv.w", (3, 3, 4, 10), out_axes=(3,), in_axes=(2,))]
    >>> rules = [{"sparsity": 0.7, "op_types": ["Conv2d"]}]
    >>> resolve(rules, table, granularity="output_channel").counts
    {'conv': 7}
    """
    if isinstance(layers, Layer) or not isinstance(layers, Iterable):
        raise TypeError(f"layers must be a table of Layer rows, got {type(layers).__name__}")
    table = tuple(layers)
    if coupling is not None and granularity not in (None, "output_channel", "out_channel"):
        raise ValueError(
            f"a coupling is about output channels, so granularity must be 'output_channel' or left "
            f"out, got {granularity!r}"
        )
    options = _Options(extra, cost, per_cost, round_to, min_channels)
    options.check(coupling, scope)
    if granularity is None:
        granularity = "element" if coupling is None else "output_channel"
    granularity = _granularity(granularity)
    _one_of("scope", scope, ("layer", "global"))
    _one_of("bias", bias, ("follow", "keep"))
    if isinstance(granularity, NM) and scope == "global":
        raise ValueError(
            f"scope must be 'layer' for {granularity}: every group keeps its own share"
        )
    _check_table(table)
    if isinstance(rules, Mapping | str) or not isinstance(rules, Iterable):
        raise TypeError(f"rules must be a list of dictionaries, got {type(rules).__name__}")
    rules = list(rules)
    chosen: dict[str, int] = {}
    excluded: dict[str, int] = {}
    for number, rule in enumerate(rules):
        check_keys(number, rule)
        for layer in selected_layers(number, rule, table):
            chosen.pop(layer.name, None)
            excluded.pop(layer.name, None)
            (excluded if rule.get("exclude", False) else chosen)[layer.name] = number
        if coupling is None and "units" in rule:
            raise ValueError(f"rule {number}: units has a meaning with coupling=... only")
    table = _own_biases(table, chosen)
    if coupling is not None:
        from purepruning.coupling.allocation import allocate

        return allocate(rules, table, chosen, excluded, coupling, scope, bias, options)
    pools: list[Pool] = []
    for number, rule in enumerate(rules):
        mine = sorted((x for x in table if chosen.get(x.name) == number), key=lambda x: x.name)
        if not rule.get("exclude", False):
            pools += _pools(number, rule, mine, scope, granularity)
    iterations = {p.prune_iterations for p in pools if p.prune_iterations is not None}
    if len(iterations) > 1:
        raise ValueError(f"prune_iterations must be equal in all rules, got {sorted(iterations)}")
    counts: dict[str, Any] = {}
    for pool in () if isinstance(granularity, NM) else pools:
        where = f"rule {pool.rule}: sparsity"
        given = pool.sparsity
        count = None if given is None else checked_count(pool, given, where)
        counts[pool.name] = count
    return Config(counts, tuple(pools), scope, granularity, bias)


class _Options(NamedTuple):
    """What is asked of a coupled config."""

    extra: str | None
    cost: str | None
    per_cost: bool
    round_to: int
    min_channels: int

    def check(self, coupling: Any, scope: str) -> None:
        """Raises where an option is wrong, or would have no effect."""
        for name in ("round_to", "min_channels"):
            whole_number(getattr(self, name), name, 1)
        if not isinstance(self.per_cost, bool):
            raise TypeError(f"per_cost must be True or False, got {self.per_cost!r}")
        _one_of("extra", self.extra, (None, "own", "none"))
        _one_of("cost", self.cost, (None, "params", "macs"))
        unset = _Options(None, None, False, 1, 1)._asdict()
        given = [n for n, x in self._asdict().items() if x != unset[n]]
        if coupling is None and given:
            raise ValueError(f"{given[0]} has a meaning with coupling=... only")
        wrong = {"extra": "layer", "cost": "global", "per_cost": "global"}
        for name in given:
            if wrong.get(name, scope) != scope:
                raise ValueError(f"{name} has a meaning in scope={wrong[name]!r} only")


def _granularity(value: Any) -> Granularity:
    if isinstance(value, (Block, NM)):
        return value
    if isinstance(value, str) and value in _GRANULARITIES:
        return _GRANULARITIES[value]  # type: ignore[return-value]
    expected = "'element', 'output_channel', 'input_channel', Block(...) or NM(keep=..., of=...)"
    raise ValueError(f"granularity must be {expected}, got {value!r}")


def _one_of(name: str, value: Any, allowed: tuple[str | None, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}")


def _check_table(table: tuple[Layer, ...]) -> None:
    for layer in table:
        if not isinstance(layer, Layer):
            raise TypeError(f"layers must hold Layer rows, got {type(layer).__name__}")
    for what in ("name", "weight"):
        seen: set[str] = set()
        for layer in table:
            value = getattr(layer, what)
            if value in seen:
                raise ValueError(f"two layers have the {what} {value!r}")
            seen.add(value)
    weights = {layer.weight for layer in table}
    for layer in table:
        if layer.bias in weights:
            raise ValueError(f"layer {layer.name!r}: its bias {layer.bias!r} is a layer's weight")


def _own_biases(table: tuple[Layer, ...], chosen: Mapping[str, int]) -> tuple[Layer, ...]:
    """Returns the table without the biases that a layer which is not pruned shares."""
    spoken_for = {layer.bias for layer in table if layer.name not in chosen}
    return tuple(
        dataclasses.replace(layer, bias=None) if layer.bias in spoken_for else layer
        for layer in table
    )


def _pools(
    number: int, rule: Rule, layers: list[Layer], scope: Scope, granularity: Granularity
) -> list[Pool]:
    sparsity = sparsity_of(number, rule, scope, granularity)
    iterations = None
    if "prune_iterations" in rule:
        iterations = integer(rule, "prune_iterations", number, 1, 1)
    largest = maximum(number, rule, layers, scope)
    common = (sparsity, rule.get("allow_empty", False), gradual(number, rule), iterations)
    for layer in layers:
        if 0 in layer.shape:
            raise ValueError(
                f"rule {number}: layer {layer.name!r} has no weights, its shape is {layer.shape}; "
                "exclude it"
            )
    if isinstance(granularity, NM):
        if "max_sparsity_per_layer" in rule:
            raise ValueError(
                f"rule {number}: {granularity} leaves max_sparsity_per_layer no meaning"
            )
        for layer in layers:
            _check_nm(number, layer, granularity)
        return [Pool(x.name, number, (x,), 0, 0, (), *common) for x in layers]
    grids = [_grid(number, layer, granularity) for layer in layers]
    spared = 0 if rule.get("allow_empty", False) else 1
    if scope == "layer":
        pools = [
            Pool(layer.name, number, (layer,), g.n_units, g.n_units - spared, (), *common)
            for layer, g in zip(layers, grids, strict=True)
        ]
    else:
        pools = []
        if layers:
            weights = sum(math.prod(layer.shape) for layer in layers)
            caps = _caps(number, layers, grids, largest, spared)
            most = sum(g.n_members * _most(g, cap) for g, cap in zip(grids, caps, strict=True))
            pools = [Pool(f"rule {number}", number, tuple(layers), weights, most, caps, *common)]
    for pool in pools:
        if pool.size >= _UNITS_LIMIT:
            raise ValueError(
                f"rule {number}: {pool.name!r} has {pool.size} units, more than 2**31 - 1; split it"
            )
    return pools


def _caps(
    number: int, layers: list[Layer], grids: list[Grid], largest: Mapping[str, float], spared: int
) -> tuple[int, ...]:
    """Returns how many units each layer may lose."""
    caps = []
    for layer, g in zip(layers, grids, strict=True):
        cap = count_of(largest[layer.name], g.n_units)
        if cap > g.n_units - spared:
            raise ValueError(
                f"rule {number}: max_sparsity_per_layer {largest[layer.name]:g} would let layer "
                f"{layer.name!r} lose all its {g.n_units} units; if that is meant, give the rule "
                "'allow_empty': True"
            )
        caps.append(cap)
    return tuple(caps)


def _grid(number: int, layer: Layer, granularity: Granularity) -> Grid:
    try:
        return grid(layer, granularity)
    except ValueError as error:
        raise ValueError(f"rule {number}: {error}") from None


def _check_nm(number: int, layer: Layer, nm: NM) -> None:
    if not layer.in_axes:
        raise ValueError(
            f"rule {number}: {nm} groups weights along the input axis, and layer {layer.name!r} of "
            f"type {layer.type!r} has none"
        )
    size = math.prod(layer.shape[a] for a in layer.in_axes)
    if size % nm.of:
        raise ValueError(
            f"rule {number}: layer {layer.name!r} contracts {size} weights, which groups of "
            f"{nm.of} do not divide; exclude the layer or choose another NM"
        )


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


def _most(g: Grid, units: int) -> int:
    """Returns the most weights that ``units`` units can have."""
    if isinstance(g.cost, int):
        return units * g.cost
    return int(np.sort(g.cost)[::-1][:units].sum())
