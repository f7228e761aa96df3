"""Rules to a quantization config: what is quantised, in how many bits, and by which scheme.

:func:`resolve_quantization` reads NNI-style rules of all its generations once, against the layer
table; every mistake in them is found then.
"""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

import jax

from purepruning.arguments import collection, instance, missing, shown, whole_number
from purepruning.config.rules import (
    QUANTIZER_KEYS,
    SELECTORS,
    Rule,
    integer,
    satisfying,
    selects_default,
    some_strings,
)
from purepruning.layers import DEFAULT_OP_TYPES, Activation, Layer, Layers, checked_table

What = Literal["weight", "input", "output"]
Scheme = Literal["affine", "symmetric"]
Dtype = Literal["int", "uint"]

#: What one scale is for: a weight, each of its output channels, or so many of its inputs.
Granularity = Literal["tensor", "channel"] | int

#: The widest integers; float32 knows those of 24 bits exactly, so that wider ones are no integers.
MOST_BITS = 24

_TARGETS: dict[str, What] = {
    "weight": "weight",
    "input": "input",
    "output": "output",
    "_input_": "input",  # NNI 3.0's names
    "_output_": "output",
}

_KEYS = (*SELECTORS, *QUANTIZER_KEYS, "granularity", "exclude")

#: NNI 3.0's keys that are no keys here, and what to do instead.
_ELSEWHERE = {
    "fuse_names": "fold the batch norms by pp.quantize.fold_batch_norms",
    "target_settings": "write one rule for each target; those of one layer merge",
    "sub_config": "write a rule for each layer",
    "exclude_op_names": "add a rule {'op_names': ..., 'exclude': True}",
    "exclude_op_names_re": "add a rule {'op_names_re': ..., 'exclude': True}",
    "exclude_op_types": "add a rule {'op_types': ..., 'exclude': True}",
}

_SCHEMES: dict[str, tuple[Scheme, Granularity]] = {
    "affine": ("affine", "tensor"),
    "symmetric": ("symmetric", "tensor"),
    "per_tensor_affine": ("affine", "tensor"),
    "per_tensor_symmetric": ("symmetric", "tensor"),
    "per_channel_affine": ("affine", "channel"),
    "per_channel_symmetric": ("symmetric", "channel"),
}

_GRANULARITIES: dict[str, Granularity] = {
    "tensor": "tensor",
    "channel": "channel",
    "default": "tensor",  # NNI 3.0's names
    "per_tensor": "tensor",
    "out_channel": "channel",
    "per_channel": "channel",
}


@dataclasses.dataclass(frozen=True)
class Target:
    """One thing that is quantised: the weight, the input or the output of one layer.

    Attributes:
        layer: its row, of the layer table or of the table of activations.
        what: ``"weight"``, ``"input"`` or ``"output"``.
        bits: width of the integers.
        scheme: ``"affine"`` or ``"symmetric"``.
        dtype: ``"int"`` or ``"uint"``; None where the rule does not say.
        granularity: ``"tensor"``, ``"channel"``, or how many inputs share a scale.
        start_step: the first step, counted from 1, at which it is quantised.
        rule: number of the rule it comes from.
        is_scheme_given: whether the rule says the scheme.
    """

    layer: Layer | Activation
    what: What
    bits: int
    scheme: Scheme = "affine"
    dtype: Dtype | None = None
    granularity: Granularity = "tensor"
    start_step: int = 0
    rule: int = 0
    is_scheme_given: bool = False

    @property
    def name(self) -> str:
        """Name of the layer."""
        return self.layer.name

    @property
    def owner(self) -> Layer:
        """The layer that owns the weight.

        Raises:
            TypeError: it is an activation function, which has none.
        """
        wanted = "the Layer that owns the weight"
        instance(self.layer, Layer, f"target {self.site!r}: layer", wanted)
        return cast(Layer, self.layer)

    @property
    def site(self) -> str:
        """Where it is, as ``replace`` calls it: ``"conv1:input"``."""
        return f"{self.name}:{self.what}"

    @property
    def is_unsigned(self) -> bool:
        """Whether integers are of dtype ``"uint"``, as in affine schemes unless a rule says."""
        return self.dtype == "uint" or (self.dtype is None and self.scheme == "affine")

    @property
    def range(self) -> tuple[int, int]:
        """Smallest and largest integer.

        Affine and unsigned, all of them; otherwise ``2**bits - 1``, as many below zero as above.
        """
        half: int = 2 ** (self.bits - 1)
        if self.is_unsigned:
            return (0 if self.scheme == "affine" else 1), 2 * half - 1
        return 1 - half, half - 1


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """Rules resolved against a layer table; static, so that compiled functions may take it.

    Attributes:
        targets: what is quantised, in the order of the table.
    """

    targets: tuple[Target, ...] = ()

    @property
    def weights(self) -> tuple[Target, ...]:
        """Those that are weights."""
        return tuple(t for t in self.targets if t.what == "weight")

    @property
    def activations(self) -> tuple[Target, ...]:
        """Those that are inputs or outputs."""
        return tuple(t for t in self.targets if t.what != "weight")

    @property
    def bits(self) -> dict[str, int]:
        """Bits by site; that of a weight is ``"conv1:weight"``."""
        return {t.site: t.bits for t in self.targets}


def resolve_quantization(
    rules: Rule | Iterable[Rule], layers: Layers, activations: Iterable[Activation] = ()
) -> QuantizationConfig:
    """Returns the config that quantization ``rules`` mean for a model.

    A rule is a dictionary as NNI writes them. It selects the rows that satisfy every selector it
    has (``op_types``, ``op_names``, ``op_partial_names``, ``op_names_re``; none: the layers of the
    ``"default"`` types), and says:

    - ``quant_types`` (or NNI 3.0's ``target_names``): of ``"weight"``, ``"input"``, ``"output"``.
    - ``quant_bits``: an integer, or one by type; not needed where ``quant_dtype`` says it.
    - ``quant_start_step``: the first step at which to quantise; 0 unless given.
    - ``quant_scheme``: ``"affine"`` (unless given) or ``"symmetric"``; with ``"per_channel_"``
      before it, with one scale for every output channel of a weight. Or one by type.
    - ``quant_dtype``: ``"int"`` or ``"uint"``, or with the bits, ``"int8"``. Or one by type. Unless
      given, ``"uint"`` where affine and ``"int"`` where symmetric.
    - ``granularity``: ``"tensor"`` (unless given), ``"channel"``, or how many consecutive inputs
      of a weight share a scale.
    - ``exclude``: if True, nothing of the selected rows is quantised, or only not their
      ``quant_types``.

    Rules for one layer merge by type: of several that say how its output is quantised, the last
    counts, and says nothing of its weight. Activations have no weight, and one scale each.

    Args:
        rules: the rules, in order; or one of them. None of them select nothing, with a warning.
        layers: the layer table.
        activations: rows of an adapter's ``activations``, for rules on activation functions.

    Raises:
        ValueError, TypeError: a mistake in a rule. The message gives the rule's number, the key,
            what was expected, what came, and the nearest valid names.

    >>> from purepruning import Layer
    >>> table = [Layer("fc", "Linear", "fc.w", (8, 4), out_axes=(0,), in_axes=(1,))]
    >>> rules = [{"quant_types": ["weight", "input"], "quant_bits": {"weight": 4, "input": 8}}]
    >>> resolve_quantization(rules, table).bits
    {'fc:weight': 4, 'fc:input': 8}
    """
    table: tuple[Layer | Activation, ...] = checked_table(layers)
    rows = collection(activations, "activations", "a table of Activation rows")
    for row in rows:
        instance(row, Activation, "activations: every row", "an Activation")
    table += rows
    listed = (
        [rules] if isinstance(rules, Mapping) else collection(rules, "rules", "a list of rules")
    )
    if not listed:
        warnings.warn(
            "resolve_quantization: there are no rules, so nothing is quantised; write one such as "
            "{'quant_types': ['weight'], 'quant_bits': 8, 'op_types': ['default']}",
            stacklevel=2,
        )
    chosen: dict[tuple[str, What], Target] = {}
    for number, rule in enumerate(listed):
        _check_keys(number, rule)
        whats = _whats(number, rule)
        for row in _selected(number, rule, table):
            for what in whats:
                if rule.get("exclude", False):
                    chosen.pop((row.name, what), None)
                else:
                    chosen[row.name, what] = _target(number, rule, row, what)
    order = [(row.name, what) for row in table for what in ("weight", "input", "output")]
    return QuantizationConfig(
        tuple(chosen[key] for key in cast(list[tuple[str, What]], order) if key in chosen)
    )


def check_quantization(where: str, config: Any) -> None:
    """Raises TypeError for what is no config of quantizers."""
    instance(
        config, QuantizationConfig, f"{where}: config", "what pp.resolve_quantization returned"
    )


def _check_keys(number: int, rule: Any) -> None:
    if not isinstance(rule, Mapping):
        raise TypeError(f"rule {number} must be a dictionary, got {type(rule).__name__}")
    for key in rule:
        if key in _ELSEWHERE:
            raise ValueError(f"rule {number}: {key!r} is a key of NNI 3.0; {_ELSEWHERE[key]}")
        if key not in _KEYS:
            raise ValueError(missing(f"rule {number}: unknown key {key!r}", str(key), _KEYS))
    if not isinstance(rule.get("exclude", False), bool):
        raise TypeError(f"rule {number}: exclude must be True or False, got {rule['exclude']!r}")


def _whats(number: int, rule: Rule) -> tuple[What, ...]:
    """Returns what the rule is about, in the order it says."""
    if "quant_types" in rule and "target_names" in rule:
        raise ValueError(f"rule {number}: 'quant_types' and 'target_names' say the same; give one")
    key = "target_names" if "target_names" in rule else "quant_types"
    if key not in rule:
        if rule.get("exclude", False):
            return ("weight", "input", "output")
        raise ValueError(
            f"rule {number} does not say what to quantise; give it 'quant_types': ['weight']"
        )
    names = some_strings(number, key, rule[key])
    if "bias" in names:
        raise ValueError(
            f"rule {number}: {key}: biases are not quantised, for they are added to sums of "
            "integers as they are; leave 'bias' out"
        )
    for name in names:
        if name not in _TARGETS:
            raise ValueError(
                missing(f"rule {number}: {key}: there is nothing called {name!r}", name, _TARGETS)
            )
    return tuple(dict.fromkeys(_TARGETS[name] for name in names))


def _selected(
    number: int, rule: Rule, table: tuple[Layer | Activation, ...]
) -> list[Layer | Activation]:
    if selects_default(rule):
        return [row for row in table if any(map(row.has_type, DEFAULT_OP_TYPES))]
    try:
        return satisfying(number, rule, table)
    except ValueError as error:
        if _whats(number, rule) == ("weight",):
            raise
        raise ValueError(
            f"{error}; for activation functions give resolve_quantization the adapter's "
            "activations(model, ...); one that they do not list, such as torch.relu(x) or "
            "x / (1 + jnp.exp(-x)), has no name: quantise the 'input' of the layer that reads it"
        ) from None


def _target(number: int, rule: Rule, row: Layer | Activation, what: What) -> Target:
    if what == "weight" and not isinstance(row, Layer):
        raise ValueError(
            f"rule {number}: {row.name!r} is an activation function and has no weight; give its "
            "'output' a rule of its own"
        )
    dtype, bits = _dtype(number, rule, what)
    scheme, granularity = _scheme(number, rule, what)
    target = Target(
        layer=row,
        what=what,
        bits=_bits(number, rule, what, bits),
        scheme=scheme,
        dtype=dtype,
        granularity=granularity,
        start_step=integer(rule, "quant_start_step", number, 0, 0),
        rule=number,
        is_scheme_given=_by_type(number, rule, "quant_scheme", what) is not None,
    )
    _check_granularity(number, target)
    return target


def _by_type(number: int, rule: Rule, key: str, what: What) -> Any:
    """Returns what a rule says at ``key`` of one type; None if it says nothing."""
    value = rule.get(key)
    if not isinstance(value, Mapping):
        return value
    whats = _whats(number, rule)
    for name in value:
        if _TARGETS.get(name) not in whats:
            raise ValueError(
                missing(f"rule {number}: {key}: {name!r} is not in its quant_types", name, whats)
            )
    found = {_TARGETS[name]: x for name, x in value.items()}
    if what not in found and key == "quant_bits":
        raise ValueError(f"rule {number}: quant_bits says nothing of {what!r}; add it")
    return found.get(what)


def _dtype(number: int, rule: Rule, what: What) -> tuple[Dtype | None, int | None]:
    value = _by_type(number, rule, "quant_dtype", what)
    if value is None:
        return None, None
    found = re.fullmatch(r"(u?int)(\d*)", value) if isinstance(value, str) else None
    if not found:
        raise ValueError(
            f"rule {number}: quant_dtype must be 'int', 'uint', or one with its bits such as "
            f"'int8', got {shown(value)}"
        )
    return cast(Dtype, found[1]), int(found[2]) if found[2] else None


def _bits(number: int, rule: Rule, what: What, of_dtype: int | None) -> int:
    value = _by_type(number, rule, "quant_bits", what)
    if value is None and of_dtype is None:
        raise ValueError(f"rule {number} does not say how many bits; write 'quant_bits', such as 8")
    bits = whole_number(
        of_dtype if value is None else value, f"rule {number}: quant_bits", 1, MOST_BITS
    )
    if of_dtype not in (None, bits):
        raise ValueError(
            f"rule {number}: quant_bits is {bits}, but quant_dtype has {of_dtype}; give one"
        )
    return bits


def _scheme(number: int, rule: Rule, what: What) -> tuple[Scheme, Granularity]:
    value = _by_type(number, rule, "quant_scheme", what)
    value = "affine" if value is None else value
    if not isinstance(value, str) or value not in _SCHEMES:
        message = f"rule {number}: quant_scheme: there is no scheme {shown(value)}"
        raise ValueError(missing(message, value, _SCHEMES))
    scheme, granularity = _SCHEMES[value]
    given = _by_type(number, rule, "granularity", what)
    if given is None:
        return scheme, granularity
    if isinstance(given, str) and given in _GRANULARITIES:
        return scheme, _GRANULARITIES[given]
    if isinstance(given, str) or not isinstance(given, int):
        message = f"rule {number}: granularity: there is none called {shown(given)}"
        raise ValueError(missing(message, given, _GRANULARITIES) + ", or a number of inputs")
    return scheme, whole_number(given, f"rule {number}: granularity", 1)


def _check_granularity(number: int, target: Target) -> None:
    """Raises where a target has no such channels or groups, or no such integers."""
    if target.range[0] >= target.range[1]:
        raise ValueError(
            f"rule {number}: {target.bits} bit has no integer beside 0 in a {target.scheme} scheme "
            f"of dtype {target.dtype or 'int'!r}; write 2 bits, or 'quant_scheme': 'affine'"
        )
    if target.granularity == "tensor":
        return
    if not isinstance(target.layer, Layer) or target.what != "weight":
        raise ValueError(
            f"rule {number}: an {target.what} has one scale, since those of its channels cannot be "
            "taken out of the sums of the next layer; write 'quant_scheme' by type, such as "
            "{'weight': 'per_channel_affine', 'output': 'per_tensor_affine'}"
        )
    layer = target.layer
    if target.granularity == "channel" and not layer.out_axes:
        raise ValueError(f"rule {number}: layer {layer.name!r} has no output channels")
    if isinstance(target.granularity, int):
        size = layer.shape[layer.in_axes[-1]] if layer.in_axes else 0
        if not size or size % target.granularity:
            raise ValueError(
                f"rule {number}: groups of {target.granularity} do not divide the {size} inputs of "
                f"layer {layer.name!r}; choose a divisor, or exclude the layer"
            )


def grouped(target: Target) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shape in which a weight is quantised, and the axes that share a scale there.

    Its own shape, but for groups, where the last input axis is split in two. Stacked layers have
    scales of their own.
    """
    layer = target.owner
    shape = layer.shape
    if target.granularity == "tensor":
        apart = layer.stack_axes
    elif target.granularity == "channel":
        apart = (*layer.stack_axes, *layer.out_axes)
    else:
        axis, size = layer.in_axes[-1], target.granularity
        return (*shape[:axis], shape[axis] // size, size, *shape[axis + 1 :]), (axis + 1,)
    return shape, tuple(a for a in range(len(shape)) if a not in apart)


def group_size(target: Target) -> int:
    """Returns how many weights share a scale."""
    shape, axes = grouped(target)
    return math.prod(shape[a] for a in axes)
