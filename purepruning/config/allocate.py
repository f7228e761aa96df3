"""Rules to config where channels are coupled: which units are ranked together, and how many go.

All of it is decided on the host from the coupling and the rules: which sets of units layers lie in,
where each unit lies among the channels that pruners score, and which channels go with it.
:mod:`purepruning.selection.coupled` then works on static index arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from purepruning.arguments import flag, one_of, whole_number
from purepruning.config.allocation import Allocation, KeptWhole, UnitSet
from purepruning.config.budget import budget_of, unit_costs
from purepruning.config.channel_units import (
    channel_units,
    choose,
    families_of,
    frozen_reason,
    kinds_of,
    spans_of,
)
from purepruning.config.config import BiasRule, Config, Pool, checked_count
from purepruning.config.rules import (
    BRANCH,
    UNIT_KINDS,
    Rule,
    Scope,
    gradual,
    integer,
    maximum,
    sparsity_of,
)
from purepruning.config.unit_sets import Selected, UnitSets, global_config
from purepruning.coupling.coupling import Coupling
from purepruning.coupling.experts import EXPERT
from purepruning.coupling.value import COMPANION, SINK, SOURCE
from purepruning.layers import Layer
from purepruning.matrices import has_matrix


class Matched(NamedTuple):
    """Rules, and the layers that they were found to name.

    Attributes:
        rules: as they were given.
        table: the layer table.
        chosen: by layer name, the number of the rule that selects it.
        excluded: by layer name, the number of the rule that excludes it.
    """

    rules: Sequence[Rule]
    table: tuple[Layer, ...]
    chosen: Mapping[str, int]
    excluded: Mapping[str, int]


class Options(NamedTuple):
    """What is asked of a coupled config."""

    extra: str | None
    cost: str | None
    per_cost: bool
    round_to: int
    min_channels: int

    def check(self, coupling: Any, scope: str) -> None:
        """Raises where an option is wrong, or would have no effect."""
        for name in ("round_to", "min_channels"):
            whole_number(getattr(self, name), name, 1, 2**31 - 1)
        flag(self.per_cost, "per_cost")
        one_of("extra", self.extra, (None, "own", "none"))
        one_of("cost", self.cost, (None, "params", "macs"))
        unset = Options(None, None, False, 1, 1)._asdict()
        given = [n for n, x in self._asdict().items() if x != unset[n]]
        if coupling is None and given:
            raise ValueError(f"{given[0]} has a meaning with coupling=... only")
        wrong = {"extra": "layer", "cost": "global", "per_cost": "global"}
        for name in given:
            if wrong.get(name, scope) != scope:
                raise ValueError(f"{name} has a meaning in scope={wrong[name]!r} only")


def allocate(
    matched: Matched, coupling: Coupling, scope: Scope, bias: BiasRule, options: Options
) -> Config:
    """Returns the config of rules whose layers were found; see :func:`purepruning.resolve`.

    Raises:
        ValueError, KeyError, TypeError: as it says.
    """
    kept: list[KeptWhole] = []
    selected = _selected(matched, coupling, scope, kept)
    asked = {x.iterations for x in selected if x.iterations is not None}
    if len(asked) > 1:
        raise ValueError(f"prune_iterations must be equal in all rules, got {sorted(asked)}")
    by_group = {
        i: [x for x in selected if i in x.groups]
        for i in sorted({i for x in selected for i in x.groups})
    }
    free = {}
    for i, members in by_group.items():
        reason = _protected(matched, coupling, i, members)
        if reason is None:
            free[i] = members
        else:
            kept.append(_kept_whole(coupling, i, members, reason))
    if scope == "layer" and options.extra == "none":
        # Of the others nothing is pruned.
        selected = [x for x in selected if x.branches or any(i in free for i in x.groups)]
    whole = _branches(matched, coupling, selected, kept)
    builder = UnitSets(coupling, selected, options)
    if scope == "global":
        for i, members in free.items():
            builder.add_capped(i, members)
        config = global_config(builder, selected, options)
    else:
        for i, members in by_group.items():
            if i in free:
                builder.add_common(i, members)
            if options.extra != "none":
                builder.add_extra(i, members, common=i in free)
        for name, some in whole.items():
            builder.add_branches(name, some)
        config = Config({}, tuple(builder.pools), "layer", "output_channel", bias)
    if (selected or kept) and not builder.sets:
        raise ValueError(
            "nothing that the rules select can be pruned: "
            + "; ".join(map(str, kept[:8]))
            + (f"; and {len(kept) - 8} more" if len(kept) > 8 else "")
            + _returned(coupling)
        )
    of_model = options if scope == "global" else None
    allocation = _allocation(builder, selected, kept, matched.table, of_model)
    config = dataclasses.replace(config, bias=bias, allocation=allocation)
    return dataclasses.replace(config, counts=_counts(config.pools))


def _allocation(
    builder: UnitSets,
    selected: Sequence[Selected],
    kept: Sequence[KeptWhole],
    table: Sequence[Layer],
    options: Options | None,
) -> Allocation:
    """Returns where the units of the sets lie; with ``options``, those of global scope."""
    coupling, sets = builder.coupling, tuple(builder.sets)
    budget = costs = None
    if options is not None:
        kind = cast(Literal["params", "macs"], options.cost or "params")
        budget = budget_of(coupling, [s.units for s in sets], kind)
        if options.per_cost:
            order = np.concatenate([s.units.reshape(-1) for s in sets])
            costs = unit_costs(coupling, order, kind)
    names = tuple(x.layer.name for x in selected)
    readers = _readers(coupling, sets, table)
    channels = builder.channels()
    return Allocation(coupling, names, sets, channels, tuple(kept), readers, budget, costs)


def _readers(
    coupling: Coupling, sets: Sequence[UnitSet], table: Sequence[Layer]
) -> tuple[Layer, ...]:
    """Returns the rows of matrices whose inputs are units of the sets."""
    inside = np.zeros(coupling.n_units + 1, bool)
    for s in sets:
        inside[s.units] = True
    found = []
    for layer in table:
        leaf = coupling.leaves.get(layer.weight)
        if leaf is None or not has_matrix(layer):
            continue
        units = [leaf.units[a] for a in layer.in_axes if leaf.roles[a] == SINK]
        if any(inside[u].any() for u in units if u is not None):
            found.append(layer)
    return tuple(found)


def _counts(pools: Sequence[Pool]) -> dict[str, Any]:
    """Returns the count of every pool whose rule gives a sparsity; None for the others."""
    return {
        pool.name: None
        if pool.sparsity is None
        else checked_count(pool, pool.sparsity, f"rule {pool.rule}: sparsity")
        for pool in pools
    }


# Where layers lie.
def _selected(
    matched: Matched, coupling: Coupling, scope: Scope, kept: list[KeptWhole]
) -> list[Selected]:
    """Returns the selected layers with their units; ``kept`` gets those that have none to lose."""
    found = []
    spans = spans_of(coupling)
    for number, rule in enumerate(matched.rules):
        mine = [x for x in matched.table if matched.chosen.get(x.name) == number]
        if rule.get("exclude", False):
            continue
        largest = maximum(number, rule, mine, scope)
        iterations = None
        if "prune_iterations" in rule:
            iterations = integer(rule, "prune_iterations", number, 1, 1)
        sparsity = sparsity_of(number, rule, scope, "output_channel")
        kinds = []
        for layer in mine:
            units = np.zeros((1, 1), np.int64)
            if layer.out_axes:
                stacked = rule.get("units") == EXPERT
                units = channel_units(coupling, layer, f"rule {number}", stacked=stacked)
            if not units.any():
                reason = frozen_reason(coupling, layer)
                if "op_names" in rule:  # asked for by name
                    raise ValueError(
                        f"rule {number}: layer {layer.name!r} has no channel that can go: "
                        f"{reason}; take its name out of op_names"
                    )
                kept.append(KeptWhole(layer.name, layer.out_channels, (layer.name,), reason))
                continue
            inside = frozenset[int]()
            whole = rule.get("units") in (BRANCH, EXPERT) and EXPERT not in kinds_of(
                coupling, units
            )
            if whole:
                _check_branch_scope(number, rule["units"], scope)
                inside = _inside(coupling, units, rule["units"])
                if not inside:
                    reason = _outside(coupling, layer, rule["units"])
                    kept.append(KeptWhole(layer.name, layer.out_channels, (layer.name,), reason))
                    continue
            kinds.append({rule["units"]} if inside else kinds_of(coupling, units))
            found.append(
                Selected(
                    layer,
                    number,
                    units,
                    frozenset() if whole else choose(coupling, units, rule.get("units"), spans),
                    sparsity,
                    rule.get("allow_empty", False),
                    gradual(number, rule),
                    iterations,
                    largest[layer.name],
                    inside,
                )
            )
        if "units" in rule and kinds and not any(rule["units"] in k for k in kinds):
            there = ", ".join(map(repr, sorted(set().union(*kinds))))
            raise ValueError(
                f"rule {number}: no layer has units of kind {rule['units']!r}; there are {there} "
                f"(of {', '.join(map(repr, (*UNIT_KINDS, BRANCH)))})"
            )
    return sorted(found, key=lambda x: x.layer.name)


def _check_branch_scope(number: int, kind: str, scope: Scope) -> None:
    if scope == "global":
        what = "" if kind == BRANCH else ", where every expert has arrays of its own,"
        together = "branches of a rule" if kind == BRANCH else "experts of a mixture"
        raise ValueError(
            f"rule {number}: 'units': {kind!r}{what} has a meaning in scope='layer' only; leave "
            f"scope out: {together} are ranked together there"
        )


def _outside(coupling: Coupling, layer: Layer, kind: str) -> str:
    """Returns why a layer loses no residual branches or experts, as part of a sentence."""
    if kind == BRANCH:
        return "it makes no channels inside of a residual branch"
    stays = (p for p in coupling.frozen if p.path == layer.weight and p.axis in layer.stack_axes)
    axis = next(stays, None)
    if axis is not None:
        return f"its stacked layers stay: {axis.reason}; prune its channels, without 'units'"
    return "it makes no channels inside of an expert"


def _inside(coupling: Coupling, units: np.ndarray, kind: str) -> frozenset[int]:
    """Returns the residual branches, or the experts, that some units are of, by index."""
    there = np.zeros(coupling.n_units + 1, bool)
    there[units] = True
    found = frozenset(i for i, b in enumerate(coupling.branches) if there[b.units].any())
    if kind == EXPERT:
        found &= frozenset(i for some in coupling.mixtures.values() for i in some)
    return found


def _branches(
    matched: Matched, coupling: Coupling, selected: Sequence[Selected], kept: list[KeptWhole]
) -> dict[str, dict[int, list[Selected]]]:
    """Returns the residual branches that may go, with the layers that make each.

    By what is ranked together: branches of a rule, or experts of a mixture.
    """
    found: dict[str, dict[int, list[Selected]]] = {}
    mixture = {i: name for name, some in coupling.mixtures.items() for i in some}
    owners = {layer.weight: layer.name for layer in matched.table}
    for i in sorted({i for x in selected for i in x.branches}):
        branch = coupling.branches[i]
        members = [x for x in selected if i in x.branches]
        mine = {x.layer.weight: x.rule for x in members}
        other = next((p for p in branch.makers if p not in mine), None)
        if other is None and len(set(mine.values())) == 1:
            rule = members[0].rule
            experts = matched.rules[rule]["units"] == EXPERT
            name = f"experts of {mixture[i]}" if experts else f"branches of rule {rule}"
            found.setdefault(name, {})[i] = members
            continue
        reason = "its layers are pruned by different rules; give them one rule"
        if other is not None:
            owner = owners.get(other, other)
            reason = f"{owner!r} makes channels inside of it too, and the rule does not select it"
        names = tuple(x.layer.name for x in members)
        kept.append(KeptWhole(branch.name, len(branch.units), names, reason))
    return found


# What protects units.
def _protected(
    matched: Matched, coupling: Coupling, group: int, members: Sequence[Selected]
) -> str | None:
    """Returns why the units of a group stay; None if they may go."""
    _, table, chosen, excluded = matched
    families = families_of(coupling, group)
    sources = dict.fromkeys(m.path for f in families for m in f.axes if m.role == SOURCE)
    mine = {x.layer.weight for x in members}
    owners = {layer.weight: layer for layer in table}
    numbers = np.concatenate(coupling.groups[group])
    for layer in table:
        if layer.name not in excluded or not _makes(coupling, layer):
            continue
        if np.isin(channel_units(coupling, layer), numbers).any():
            return (
                f"layer {layer.name!r} makes them too, and rule {excluded[layer.name]} excludes it"
            )
    if not mine & sources.keys() and all("Norm" in x.layer.type for x in members):
        return None  # scales alone: what they scale goes along
    for path in sources:
        if path in mine:
            continue
        if path not in owners:
            return f"parameter {path!r} makes them too, and is in no row of the layer table"
        layer = owners[path]
        if layer.name not in chosen:
            return f"layer {layer.name!r} makes them too, and no rule selects it"
        return (
            f"layer {layer.name!r} makes them too, and rule {chosen[layer.name]} prunes it by "
            "units of another kind"
        )
    return None


def _returned(coupling: Coupling) -> str:
    """Returns what to do where statistics that a function returns hold all channels."""
    held = [
        p.path
        for p in coupling.frozen
        if p.reason == "an output" and p.path.startswith(("batch_stats.", "state."))
    ]
    if not held:
        return ""
    return (
        f". {held[0]!r} and all that it belongs to are outputs: if the function returns new "
        "statistics, say which outputs may shrink along, couple(..., outputs=(True, False))"
    )


def _makes(coupling: Coupling, layer: Layer) -> bool:
    """Whether a layer makes channels, and does not only scale them."""
    leaf = coupling.leaves.get(layer.weight)
    return leaf is not None and any(leaf.roles[a] != COMPANION for a in layer.out_axes)


def _kept_whole(
    coupling: Coupling, group: int, members: Sequence[Selected], reason: str
) -> KeptWhole:
    return KeptWhole(
        families_of(coupling, group)[0].name,
        sum(map(len, coupling.groups[group])),
        tuple(x.layer.name for x in members),
        reason,
    )
