"""Rules to config: which layers are pruned, in which units, and how many of them.

:func:`resolve` reads NNI-style rules once, against a layer table; every mistake in them is found
then, before any array work (:mod:`purepruning.config.rules` reads the single rule).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np

from purepruning.arguments import collection, is_number, one_of, shown
from purepruning.config.allocate import Matched, Options, allocate
from purepruning.config.config import BiasRule, Config, Pool, check_countable, checked_count
from purepruning.config.coupled_layers import filled
from purepruning.config.rules import (
    Rule,
    Scope,
    check_keys,
    gradual,
    integer,
    maximum,
    selected_layers,
    sparsity_of,
)
from purepruning.counts import count_of
from purepruning.coupling.coupling import Coupling, check_coupling
from purepruning.granularity import NM, Block, Granularity, Grid, grid
from purepruning.layers import Layer, Layers, checked_table

_GRANULARITIES = {
    "element": "element",
    "output_channel": "output_channel",
    "input_channel": "input_channel",
    "out_channel": "output_channel",  # NNI 3.0's names
    "in_channel": "input_channel",
}


def resolve(
    rules: float | Rule | Iterable[Rule],
    layers: Layers,
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

    A number is the sparsity of all kernels and embeddings: ``resolve(0.8, layers)``.

    A rule is a dictionary as NNI writes them. It selects the layers that satisfy every selector it
    has; of several rules that select a layer, the last one counts. A rule without selectors,
    ``{"sparsity": 0.8}``, selects the layers of the ``"default"`` types that have units of the
    granularity:

    - ``op_types``: canonical types (``"Conv2d"`` also selects a Flax ``Conv`` over two dimensions),
      class names, or ``"default"``: kernels and embeddings, the packed projections of attention and
      recurrent layers included, and PReLU as in NNI; no norms, no biases. A string or a list.
    - ``op_names``: layer names; ``op_partial_names``: parts of layer names; ``op_names_re``:
      regular expressions that layer names begin with (``re.match``, as in NNI 3.0).
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
      elsewhere) or ``"block"``, see :class:`purepruning.coupling.units.Family`. Layers without a
      choice lose what they have. ``"branch"``: the residual branches whose layers the rule selects
      (:attr:`Coupling.branches`) are ranked together by the sum of their layers' scores, and the
      lowest go whole, which makes the model less deep; ``sparsity`` is that of branches.
      ``"expert"``: whole experts of a mixture, stacked in one array (families of that kind) or with
      arrays of their own (:attr:`Coupling.mixtures`), each mixture apart; ``sparsity`` is that of
      experts, and the router keeps its rows.

    With a ``coupling`` coupled channels are pruned together (NNI's
    ``dependency_aware`` mode):

    - A unit's score is the sum of the pruner's scores of its channels, in all layers that make
      them. Those layers lose the same units, as many as the *smallest* of their sparsities says;
      where channels lie in groups (of a grouped convolution), equally many of each group.
    - With ``extra="own"`` a layer whose sparsity is higher than that of its set then loses more,
      by its own scores, until it has lost its own share. Such masks no longer agree: what only
      some of the coupled layers prune stays in the shrunk model, as zeros; ``extra="none"``
      leaves it at the common ones, as NNI does from 2.9 on.
    - A layer that makes such channels and that no rule selects, or that one excludes, protects
      them: nothing is pruned in common. :attr:`Config.kept_whole` lists what stays, and why. A
      layer whose channels all stay by themselves (the outputs of a model) is listed there too, and
      is an error if a rule names it.
    - With ``scope="global"`` the units of all layers are ranked together, and the lowest go until
      the whole model's parameters or multiply-adds are at most ``1 - sparsity`` of what they were:
      fewer would not do.

    Args:
        rules: the rules, in order; or one of them; or a sparsity.
        layers: the layer table.
        scope: ``"layer"`` prunes every layer to its own sparsity; ``"global"`` ranks the units of
            all layers of a rule together, each at the cost of its number of weights, and prunes the
            lowest-ranked as long as they fit into the rule's share of the weights.
        granularity: ``"element"`` (unless given), ``"output_channel"``, ``"input_channel"``, a
            :class:`Block` or :class:`NM`. With a coupling it is always ``"output_channel"``.
        bias: whether a bias is pruned where all weights of its output channel are (``"follow"``, as
            in NNI from 2.0 on), or never (``"keep"``). With a coupling, what else would keep a
            pruned channel alive follows too: norms, and readers of what is not zero behind it; a
            model trained under the masks then computes what :func:`purepruning.shrink` makes of it.
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
    table = checked_table(layers)
    if coupling is not None:
        check_coupling("resolve", coupling)
        table = filled(coupling, table)
    one_of("scope", scope, ("layer", "global"))
    if granularity is None:
        granularity = "element" if coupling is None else "output_channel"
    granularity = _granularity(granularity)
    if coupling is not None and granularity != "output_channel":
        raise ValueError(
            f"a coupling is about output channels, so granularity must be 'output_channel' or left "
            f"out, got {granularity!r}"
        )
    options = Options(extra, cost, per_cost, round_to, min_channels)
    options.check(coupling, scope)
    one_of("bias", bias, ("follow", "keep"))
    if isinstance(granularity, NM) and scope == "global":
        raise ValueError(
            f"scope must be 'layer' for {granularity}: every group keeps its own share"
        )
    rules = _as_list(rules)
    chosen: dict[str, int] = {}
    excluded: dict[str, int] = {}
    for number, rule in enumerate(rules):
        check_keys(number, rule)
        for layer in selected_layers(number, rule, table, granularity):
            chosen.pop(layer.name, None)
            excluded.pop(layer.name, None)
            (excluded if rule.get("exclude", False) else chosen)[layer.name] = number
        if coupling is None and "units" in rule:
            raise ValueError(f"rule {number}: units has a meaning with coupling=... only")
    table = _own_biases(table, chosen)
    if coupling is not None:
        matched = Matched(rules, table, chosen, excluded)
        return allocate(matched, coupling, scope, bias, options)
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


def _as_list(rules: Any) -> list[Rule]:
    if isinstance(rules, Mapping):
        return [rules]
    if is_number(rules):
        return [{"sparsity": rules}]
    expected = "a list of dictionaries, one dictionary or a sparsity such as 0.8"
    return list(collection(rules, "rules", expected))


def _granularity(value: Any) -> Granularity:
    if isinstance(value, (Block, NM)):
        return value
    if isinstance(value, str) and value in _GRANULARITIES:
        return _GRANULARITIES[value]  # type: ignore[return-value]
    expected = "'element', 'output_channel', 'input_channel', Block(...) or NM(keep=..., of=...)"
    raise ValueError(f"granularity must be {expected}, got {shown(value)}")


def _own_biases(table: tuple[Layer, ...], chosen: Mapping[str, int]) -> tuple[Layer, ...]:
    """Returns the table; what is pruned has no bias there that a layer which is not shares."""
    spoken_for = {layer.bias for layer in table if layer.name not in chosen}
    return tuple(
        dataclasses.replace(layer, bias=None)
        if layer.name in chosen and layer.bias in spoken_for
        else layer
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
            most = sum(g.n_stacked * _most(g, cap) for g, cap in zip(grids, caps, strict=True))
            pools = [Pool(f"rule {number}", number, tuple(layers), weights, most, caps, *common)]
    for pool in pools:
        if scope == "layer":
            check_countable(f"rule {number}", pool)
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
    if layer.groups > 1 and layer.grouped == "out":
        # All input channels lie along the axis, and an output contracts those of its own group.
        size //= layer.groups
    if size % nm.of:
        raise ValueError(
            f"rule {number}: layer {layer.name!r} contracts {size} weights, which groups of "
            f"{nm.of} do not divide; exclude the layer or choose another NM"
        )


def _most(g: Grid, units: int) -> int:
    """Returns the most weights that ``units`` units can have."""
    if isinstance(g.cost, int):
        return units * g.cost
    return int(np.sort(g.cost)[::-1][:units].sum())
