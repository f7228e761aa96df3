"""The config lists of NNI 3.0, translated to rules.

An entry of 3.0 selects the layers of ``op_names`` or ``op_names_re`` that have one of ``op_types``
and are not excluded, by the same entry; the first entry that selects a layer counts. Settings stand
in the entry or, by target, in its ``target_settings``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from purepruning.arguments import collection, fraction, missing
from purepruning.config.config import BiasRule
from purepruning.config.rules import KEYS_OF_NNI_3, Rule, Scope, selected_layers
from purepruning.granularity import Block, Granularity
from purepruning.layers import Layer

_SELECTORS = ("op_names", "op_names_re", "op_types")
_EXCLUDERS = ("exclude_op_names", "exclude_op_names_re", "exclude_op_types")
_TARGETS = ("target_names", "target_settings")
_SETTINGS = (
    "sparse_ratio",
    "max_sparse_ratio",
    "min_sparse_ratio",
    "sparse_threshold",
    "global_group_id",
    "dependency_group_id",
    "granularity",
    "internal_metric_block",
    "apply_method",
    "align",
)
_OURS = ("allow_empty", "units", "prune_iterations")
_KEYS = (*_SELECTORS, *_EXCLUDERS, *_TARGETS, *_SETTINGS, *_OURS)

_CHANNELS: dict[str, Granularity] = {
    "out_channel": "output_channel",
    "in_channel": "input_channel",
    "per_channel": "input_channel",
}
_ALIGNED = {"module_name": None, "target_name": "weight", "dims": [0]}


class Translated(NamedTuple):
    """A config list in this library's terms; what it does not say is None.

    Attributes:
        rules: for :func:`purepruning.resolve`, as are the next three.
        scope: how layers are ranked.
        granularity: what a unit is.
        bias: whether biases are pruned.
        coupled: number of the first entry that asks for coupled channels.
    """

    rules: Any
    scope: Scope | None = None
    granularity: Granularity | None = None
    bias: BiasRule | None = None
    coupled: int | None = None


class _Entry(NamedTuple):
    """One entry: the layers that are its own, and what it says of their weights."""

    number: int
    layers: list[Layer]
    settings: Mapping[str, Any]
    bias: BiasRule


def translate(config_list: Any, table: tuple[Layer, ...]) -> Translated:
    """Returns the rules of a config list; one without keys of NNI 3.0 is a list of rules already.

    Raises:
        ValueError, TypeError: an entry has unknown keys or values, keys of NNI 1 or 2 too, or
            settings that differ between entries where one config has only one of them.
    """
    if not isinstance(config_list, Iterable) or isinstance(config_list, str | Mapping):
        return Translated(config_list)
    entries = list(collection(config_list, "config_list", "a list of dictionaries"))
    new = [i for i, x in enumerate(entries) if isinstance(x, Mapping) and _new_keys(x)]
    if not new:
        return Translated(entries)
    found: list[_Entry] = []
    taken: set[str] = set()
    for number, entry in enumerate(entries):
        _check_keys(number, entry, new[0], entries[new[0]])
        read = _read(number, entry, table, taken)
        taken |= {layer.name for layer in read.layers}
        found.append(read)
    scope: Scope = "layer" if _common(found, "global_group_id", _is_local) else "global"
    asks = ("dependency_group_id", "internal_metric_block")
    coupled = [x.number for x in found if any(x.settings.get(key) is not None for key in asks)]
    return Translated(
        _global_rules(found) if scope == "global" else [_local_rule(x) for x in found],
        scope,
        _common(found, "granularity", _granularity),
        _common(found, "target_names", lambda entry: entry.bias),
        coupled[0] if coupled else None,
    )


def _new_keys(entry: Mapping[Any, Any]) -> list[str]:
    return [key for key in KEYS_OF_NNI_3 if key in entry]


def _check_keys(number: int, entry: Any, first: int, new: Mapping[str, Any]) -> None:
    if not isinstance(entry, Mapping):
        raise TypeError(f"rule {number} must be a dictionary, got {type(entry).__name__}")
    for key in entry:
        if key not in _KEYS:
            message = (
                f"rule {number}: NNI 3.0, of which {_new_keys(new)[0]!r} in rule {first} is a key, "
                f"has no key {key!r}; write all entries as one version has them"
            )
            raise ValueError(missing(message, str(key), _KEYS))


# One entry.
def _read(number: int, entry: Rule, table: tuple[Layer, ...], taken: set[str]) -> _Entry:
    selected = _selected(number, entry, table)
    mine = [layer for layer in selected if layer.name not in taken]
    if selected and not mine:
        raise ValueError(
            f"rule {number}: earlier entries select all of its layers, {selected[0].name!r} first, "
            "and in NNI 3.0 the first entry counts; leave it out, or move it up"
        )
    targets = entry.get("target_names", ["weight", "bias"])
    targets = [targets] if isinstance(targets, str) else list(targets)
    by_target = dict(entry.get("target_settings", {}))
    for target in (*targets, *by_target):
        if target not in ("weight", "bias"):
            raise ValueError(
                f"rule {number}: targets are 'weight' and 'bias', got {target!r}; masks of inputs "
                "and outputs are not pruned here: leave it out"
            )
    if "weight" not in targets:
        raise ValueError(f"rule {number}: target_names lacks 'weight'; biases follow their weights")
    _check_bias(number, by_target.get("bias", {}))
    settings = {key: value for key, value in entry.items() if key in (*_SETTINGS, *_OURS)}
    for key, value in by_target.get("weight", {}).items():
        if key not in _SETTINGS:
            message = f"rule {number}: target_settings['weight']: unknown key {key!r}"
            raise ValueError(missing(message, str(key), _SETTINGS))
        if settings.setdefault(key, value) != value:
            raise ValueError(
                f"rule {number}: {key} is {settings[key]!r} in the entry and {value!r} in its "
                "target_settings; leave one of them out"
            )
    _check_settings(number, settings)
    return _Entry(number, mine, settings, "follow" if "bias" in targets else "keep")


def _selected(number: int, entry: Rule, table: tuple[Layer, ...]) -> list[Layer]:
    def by(key: str, argument: str) -> list[Layer]:
        try:
            return selected_layers(number, {key: entry[argument]}, table, "element")
        except (TypeError, ValueError) as error:
            raise type(error)(f"{argument} of {error}" if key != argument else error) from None

    if not any(key in entry for key in _SELECTORS):
        raise ValueError(f"rule {number} selects nothing; give it one of {', '.join(_SELECTORS)}")
    named = [layer for key in _SELECTORS[:2] if key in entry for layer in by(key, key)]
    if any(key in entry for key in _SELECTORS[:2]):
        table = tuple(layer for layer in table if layer in named)
    kept = by("op_types", "op_types") if "op_types" in entry else list(table)
    out = [x for key in _EXCLUDERS if key in entry for x in by(key.removeprefix("exclude_"), key)]
    return [layer for layer in kept if layer not in out]


def _check_bias(number: int, settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        default = {"align": _ALIGNED, "apply_method": "mul"}.get(key)
        if value is not None and value != default:
            raise ValueError(
                f"rule {number}: target_settings['bias'] has {key}={value!r}, but here biases "
                "follow the output channels of their weights; leave it out"
            )


def _check_settings(number: int, settings: Mapping[str, Any]) -> None:
    if settings.get("sparse_threshold") is not None:
        raise ValueError(
            f"rule {number}: sparse_threshold is for movement pruning, which is pp.movement; give "
            "the entry a sparse_ratio"
        )
    if settings.get("sparse_ratio") is None:
        raise ValueError(f"rule {number} has no sparse_ratio; give it one in [0, 1)")
    if settings.get("apply_method", "mul") != "mul":
        raise ValueError(
            f"rule {number}: apply_method is {settings['apply_method']!r}, but masks only ever set "
            "weights to zero; leave it out"
        )
    if settings.get("align") is not None:
        raise ValueError(f"rule {number}: align is a setting of biases; leave it out")


# From entries to rules.
def _common(entries: list[_Entry], key: str, read: Any) -> Any:
    """Returns what ``read`` makes of every entry, which is one and the same."""
    values = [read(entry) for entry in entries]
    for entry, value in zip(entries, values, strict=True):
        if value != values[0]:
            raise ValueError(
                f"rules {entries[0].number} and {entry.number} differ in {key}, of which a config "
                "has one; call from_nni for each and join the masks with pp.merge_masks"
            )
    return values[0]


def _is_local(entry: _Entry) -> bool:
    return entry.settings.get("global_group_id") is None


def _granularity(entry: _Entry) -> Granularity | None:
    value = entry.settings.get("granularity", "default")
    if value == "default":
        return None
    if isinstance(value, str) and value in _CHANNELS:
        return _CHANNELS[value]
    sizes = isinstance(value, list) and value and all(type(n) is int for n in value)
    if not sizes:
        raise ValueError(
            f"rule {entry.number}: granularity must be 'default', 'out_channel', 'in_channel', "
            f"'per_channel' or a list of block sizes, got {value!r}"
        )
    ranks = {len(layer.shape) - len(layer.stack_axes) for layer in entry.layers}
    if len(ranks) > 1 or len(value) > min(ranks):
        raise ValueError(
            f"rule {entry.number}: granularity {value!r} is of the last axes, and its layers have "
            f"{sorted(ranks)} axes; give layers of equal rank an entry of their own"
        )
    return Block((*(1 for _ in range(min(ranks) - len(value))), *value))


def _ours(entry: _Entry) -> dict[str, Any]:
    return {key: entry.settings[key] for key in _OURS if key in entry.settings}


def _local_rule(entry: _Entry) -> dict[str, Any]:
    return {"op_names_re": _patterns(entry.layers), "sparsity": _bounded(entry)} | _ours(entry)


def _patterns(layers: list[Layer]) -> list[str]:
    # As names they would be an error where a coupling keeps all channels of a layer.
    return [re.escape(layer.name) + "$" for layer in layers]


def _bounded(entry: _Entry) -> float:
    """Returns the sparsity of a layer: that of the entry, between its bounds."""
    low, high = (_ratio(entry, f"{name}_sparse_ratio") for name in ("min", "max"))
    ratio = _ratio(entry, "sparse_ratio") or 0.0
    return min(max(ratio, low or 0.0), 1.0 if high is None else high)


def _ratio(entry: _Entry, key: str) -> float | None:
    value = entry.settings.get(key)
    return None if value is None else fraction(value, f"rule {entry.number}: {key}")


def _global_rules(entries: list[_Entry]) -> list[dict[str, Any]]:
    """Returns one rule for each global group, in the order of their first entries."""
    groups: dict[Any, list[_Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.settings["global_group_id"], []).append(entry)
    return [_global_rule(group) for group in groups.values()]


def _global_rule(group: list[_Entry]) -> dict[str, Any]:
    ratio = _common(group, "sparse_ratio", lambda entry: _ratio(entry, "sparse_ratio"))
    most: dict[str, float] = {}
    for entry in group:
        if entry.settings.get("min_sparse_ratio") is not None:
            raise ValueError(
                f"rule {entry.number}: min_sparse_ratio has no meaning with global_group_id; leave "
                "it out, or prune its layers by themselves"
            )
        high = _ratio(entry, "max_sparse_ratio")
        if high is not None:
            most |= {layer.name: high for layer in entry.layers}
    layers = [layer for entry in group for layer in entry.layers]
    rule = {"op_names_re": _patterns(layers), "sparsity": ratio}
    if most:
        rule["max_sparsity_per_layer"] = most
    return rule | _common(group, "allow_empty, units or prune_iterations", _ours)
