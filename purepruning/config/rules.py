"""Reading one rule: its keys, which layers it selects, and its numbers.

Every mistake in a rule is found here. Messages give the rule's number, the key, what was expected,
what came, and the nearest valid names.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from purepruning.arguments import fraction, missing, one_of, whole_number
from purepruning.coupling.experts import EXPERT
from purepruning.granularity import NM, Granularity, has_units
from purepruning.layers import DEFAULT_OP_TYPES, OP_TYPES, Activation, Layer

Rule = Mapping[str, Any]

Row = TypeVar("Row", Layer, Layer | Activation)


Scope = Literal["layer", "global"]


#: No layer loses more than this share of its units in global scope, unless its rule says otherwise.
MAX_SPARSITY_PER_LAYER = 0.99


SELECTORS = ("op_types", "op_names", "op_partial_names", "op_names_re")


_SPARSITIES = ("sparsity", "sparsity_per_layer", "total_sparsity", "final_sparsity")


_GRADUAL = ("initial_sparsity", "final_sparsity", "start_epoch", "end_epoch", "frequency")


#: Keys of rules for quantizers, which :func:`purepruning.resolve_quantization` reads.
QUANTIZER_KEYS = (
    "quant_types",
    "target_names",
    "quant_bits",
    "quant_start_step",
    "quant_scheme",
    "quant_dtype",
)


_KEYS = (
    *SELECTORS,
    *_SPARSITIES,
    *_GRADUAL,
    "max_sparsity_per_layer",
    "exclude",
    "prune_iterations",
    "allow_empty",
    "units",
)


#: The keys of NNI 3.0 that are no keys here, and what to write instead.
KEYS_OF_NNI_3 = {
    "sparse_ratio": "write 'sparsity'",
    "max_sparse_ratio": "write 'max_sparsity_per_layer', with scope='global'",
    "min_sparse_ratio": "give the layers a rule of their own",
    "sparse_threshold": "write 'sparsity', or train scores with pp.movement",
    "target_names": "give resolve bias='keep' to prune weights only",
    "target_settings": "write the settings of 'weight' into the rule",
    "granularity": "give it to resolve",
    "global_group_id": "give resolve scope='global'",
    "dependency_group_id": "give resolve coupling=pp.couple(fn, params, inputs)",
    "internal_metric_block": "give resolve coupling=pp.couple(fn, params, inputs)",
    "apply_method": "leave it out: masks are applied by pp.apply_masks",
    "align": "leave it out: biases follow their weights unless resolve has bias='keep'",
    "exclude_op_names": "add a rule {'op_names': ..., 'exclude': True}",
    "exclude_op_names_re": "add a rule {'op_names_re': ..., 'exclude': True}",
    "exclude_op_types": "add a rule {'op_types': ..., 'exclude': True}",
}


#: Kinds of units that a rule can choose between where an axis lies in two factors.
UNIT_KINDS = ("head", "channel", "position", "block", "head_position", EXPERT)

#: The kind of units that are residual branches: all that is inside of one goes together.
BRANCH = "branch"


@dataclasses.dataclass(frozen=True)
class Gradual:
    """The gradual keys of a rule, for a schedule: sparsities are fractions, times are epochs.

    A key that the rule does not name is None; the schedule says it.
    """

    initial_sparsity: float | None
    final_sparsity: float
    start_epoch: int | None
    end_epoch: int | None
    frequency: int | None


def check_keys(number: int, rule: Any) -> None:
    """Raises where a rule has unknown, missing or contradictory keys."""
    if not isinstance(rule, Mapping):
        raise TypeError(f"rule {number} must be a dictionary, got {type(rule).__name__}")
    for key in rule:
        if key in QUANTIZER_KEYS and key not in KEYS_OF_NNI_3:
            raise ValueError(
                f"rule {number}: {key!r} is a key of rules for quantizers; give these to "
                "pp.resolve_quantization"
            )
        if key in KEYS_OF_NNI_3:
            raise ValueError(
                f"rule {number}: {key!r} is a key of NNI 3.0; {KEYS_OF_NNI_3[key]}, or let "
                "pp.from_nni read the whole list"
            )
        if key not in _KEYS:
            raise ValueError(missing(f"rule {number}: unknown key {key!r}", str(key), _KEYS))
    if rule.get("exclude", False) is True and selects_default(rule):
        raise ValueError(
            f"rule {number} excludes, but names no layers: give it {', '.join(SELECTORS[:-1])} or "
            f"{SELECTORS[-1]}"
        )
    for key in ("exclude", "allow_empty"):
        if not isinstance(rule.get(key, False), bool):
            raise TypeError(f"rule {number}: {key} must be True or False, got {rule[key]!r}")
    one_of(f"rule {number}: units", rule.get("units", "head"), (*UNIT_KINDS, BRANCH))
    given = [key for key in _SPARSITIES if key in rule]
    other = [key for key in rule if key not in (*SELECTORS, "exclude")]
    if rule.get("exclude", False) and other:
        raise ValueError(f"rule {number}: it excludes its layers, so {other[0]!r} has no meaning")
    if len(given) > 1:
        raise ValueError(f"rule {number}: {' and '.join(map(repr, given))} say the same; give one")


def selects_default(rule: Rule) -> bool:
    """Whether a rule names no layers, which stands for those of the default types."""
    return not any(key in rule for key in SELECTORS)


def selected_layers(
    number: int, rule: Rule, table: tuple[Layer, ...], granularity: Granularity
) -> list[Layer]:
    """Returns the layers that satisfy every selector of the rule.

    A rule without one selects the layers of the default types that have units of the granularity.
    """
    if selects_default(rule):
        return _default_layers(number, table, granularity)
    return satisfying(number, rule, table)


def satisfying(number: int, rule: Rule, table: tuple[Row, ...]) -> list[Row]:
    """Returns the rows of a table that satisfy every selector of a rule, which has one.

    Raises:
        ValueError, TypeError: none does, or what one selector says is nowhere in the table.
    """
    selected = list(table)
    for key in SELECTORS:
        if key not in rule:
            continue
        values = some_strings(number, key, rule[key])
        for value in values:
            _check_selector(number, key, value, table)
        selected = [x for x in selected if any(_satisfies(x, key, v) for v in values)]
    if not selected:
        asked = ", ".join(f"{key}={rule[key]!r}" for key in SELECTORS if key in rule)
        raise ValueError(f"rule {number}: no layer satisfies all of {asked}")
    return selected


def _default_layers(number: int, table: tuple[Layer, ...], granularity: Granularity) -> list[Layer]:
    default = [x for x in table if any(map(x.has_type, DEFAULT_OP_TYPES))]
    selected = [x for x in default if has_units(x, granularity)]
    if table and not selected:
        types = ", ".join(sorted({repr(x.type or x.class_name) for x in table}))
        raise ValueError(
            f"rule {number} names no layers, and none of the default types has units of "
            f"granularity {granularity!r}; the model has layers of type {types}; give the rule "
            "op_types or op_names"
        )
    return selected


def _satisfies(layer: Layer | Activation, key: str, value: str) -> bool:
    if key == "op_names":
        return value in layer.names
    if key == "op_partial_names":
        return any(value in name for name in layer.names)
    if key == "op_names_re":
        return any(re.match(value, name) for name in layer.names)
    types = DEFAULT_OP_TYPES if value == "default" else (value,)
    return any(layer.has_type(t) for t in types)


def _check_selector(number: int, key: str, value: str, table: tuple[Row, ...]) -> None:
    if key == "op_names_re":
        _check_pattern(number, value)
    if any(_satisfies(layer, key, value) for layer in table):
        return
    names = [name for layer in table for name in layer.names]
    types = sorted({t for layer in table for t in (layer.type, layer.class_name) if t})
    what = {
        "op_names": "the name",
        "op_partial_names": "the part of a name",
        "op_types": "the type",
        "op_names_re": "a name that begins with the pattern",
    }[key]
    message = f"rule {number}: {key}: no layer has {what} {value!r}"
    if key == "op_names_re":
        inside = [name for name in names if re.search(value, name)]
        if inside:
            raise ValueError(
                f"{message}, but it is inside of {len(inside)} names, such as {inside[0]!r}; put "
                "'.*' before it"
            )
        raise ValueError(missing(message, re.sub(r"\\\w|[^\w.]", "", value), names))
    inside = [name for name in names if name.startswith(value + ".")]
    if key == "op_names" and inside:
        raise ValueError(
            f"{message}, but {value!r} contains {len(inside)} layers, such as {inside[0]!r}; "
            f"op_partial_names selects them all"
        )
    if key == "op_types" and value in OP_TYPES:
        raise ValueError(f"{message}; the model has {', '.join(map(repr, types)) or 'none'}")
    raise ValueError(missing(message, value, types if key == "op_types" else names))


def _check_pattern(number: int, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"rule {number}: op_names_re: {pattern!r} is no regular expression ({error}); write a "
            r"backslash before characters that stand for themselves, as in 'blocks\.\d+\.fc'"
        ) from None


def sparsity_of(number: int, rule: Rule, scope: Scope, granularity: Granularity) -> float | None:
    """Returns the fraction the rule asks for; None if it names none."""
    given = next((key for key in _SPARSITIES if key in rule), None)
    if given is None:
        return None
    where = f"rule {number}: {given}"
    wrong = {"layer": "total_sparsity", "global": "sparsity_per_layer"}[scope]
    if given == wrong:
        other = {"layer": "global", "global": "layer"}[scope]
        raise ValueError(f"{where} has a meaning in scope={other!r}, but scope is {scope!r}")
    sparsity = fraction(rule[given], where)
    if sparsity == 1 and not rule.get("allow_empty", False):
        raise ValueError(
            f"{where} of {rule[given]!r} would empty the layer; it must be less than 1, unless the "
            "rule sets 'allow_empty': True"
        )
    if isinstance(granularity, NM):
        fixed = 1 - granularity.keep / granularity.of
        if not math.isclose(sparsity, fixed):
            raise ValueError(f"{where} is {rule[given]!r}, but {granularity} prunes {fixed:g}")
    return sparsity


def maximum(number: int, rule: Rule, layers: list[Layer], scope: Scope) -> dict[str, float]:
    """Returns the largest fraction of units that each layer may lose, by layer name."""
    names = [layer.name for layer in layers]
    key = "max_sparsity_per_layer"
    if key not in rule:
        return dict.fromkeys(names, MAX_SPARSITY_PER_LAYER)
    if scope != "global":
        raise ValueError(f"rule {number}: {key} has a meaning in scope='global' only")
    value = rule[key]
    if not isinstance(value, Mapping):
        return dict.fromkeys(names, fraction(value, f"rule {number}: {key}"))
    maximum = dict.fromkeys(names, MAX_SPARSITY_PER_LAYER)
    for name, share in value.items():
        layer = next((x for x in layers if name in x.names), None)
        if layer is None:
            raise ValueError(missing(f"rule {number}: {key}: no layer {name!r} in it", name, names))
        maximum[layer.name] = fraction(share, f"rule {number}: {key}[{name!r}]")
    return maximum


def gradual(number: int, rule: Rule) -> Gradual | None:
    """Returns the rule's gradual keys; None if it has none."""
    if not any(key in rule for key in _GRADUAL):
        return None
    final_key = next((key for key in _SPARSITIES if key in rule), None)
    if final_key is None:
        raise ValueError(f"rule {number}: a gradual rule needs 'final_sparsity'")
    final = fraction(rule[final_key], f"rule {number}: {final_key}")
    initial = None
    if "initial_sparsity" in rule:
        initial = fraction(rule["initial_sparsity"], f"rule {number}: initial_sparsity")
        if initial > final:
            raise ValueError(
                f"rule {number}: initial_sparsity {initial:g} exceeds {final_key} {final:g}"
            )
    least = {"start_epoch": 0, "end_epoch": 0, "frequency": 1}
    times = {k: integer(rule, k, number, 0, low) if k in rule else None for k, low in least.items()}
    start, end = times["start_epoch"], times["end_epoch"]
    if end is not None and end < (start or 0):
        raise ValueError(
            f"rule {number}: end_epoch must be at least {start or 0}, where it starts, got {end}"
        )
    return Gradual(initial, final, **times)


def some_strings(number: int, key: str, value: Any) -> list[str]:
    """Returns the strings that a rule gives at ``key``: one, or a list."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)) or not all(isinstance(v, str) for v in values):
        raise TypeError(
            f"rule {number}: {key} must be a string or a list of strings, got {value!r}"
        )
    if not values or "" in values:
        raise ValueError(f"rule {number}: {key} is empty, or holds an empty string")
    return list(values)


def integer(rule: Rule, key: str, number: int, default: int, lowest: int) -> int:
    """Returns the rule's integer at ``key``, at least ``lowest`` and no more than steps can be."""
    return whole_number(rule.get(key, default), f"rule {number}: {key}", lowest, 2**31 - 2)
