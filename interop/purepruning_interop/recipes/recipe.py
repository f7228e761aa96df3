"""Recipes: what to do to a model, as data that is checked before anything runs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import purepruning as pp
from purepruning.arguments import missing, shown
from purepruning.config.rules import SELECTORS, integer, some_strings
from purepruning.saving.files import file_path, write_whole
from purepruning_interop.recipes.names import (
    COMPRESSORS,
    FOLDERS,
    SHRINK,
    WITHOUT_EFFECT,
    Given,
    Kind,
    Named,
)
from purepruning_interop.recipes.ranges import Range, find_ranges, range_of

#: The version of the native form that this library reads and writes.
VERSION = 1

_FRAMEWORKS = ("torch", "linen", "nnx", "equinox", "keras", "flax", "tensorflow")
_NATIVE = ("purepruning", "framework", "steps")
_STEP = ("use", "rules", "args")
_COMPRESSION = (
    "framework",
    "type",
    "compressor",
    "config_list",
    "args",
    "compression_framework",
    "compression_type",
)


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a recipe.

    Attributes:
        use: auptimizer's name of a compressor, or ``"shrink"``.
        rules: its rules, with every default.
        args: its arguments that are data, with every default.
    """

    use: str
    rules: tuple[Mapping[str, Any], ...]
    args: Mapping[str, Any]

    @property
    def named(self) -> Named:
        """What there is to know of the compressor."""
        return COMPRESSORS[self.use]

    @property
    def kind(self) -> Kind:
        """``"pruning"``, ``"quantization"``, or ``"structure"``, which is shrinking."""
        return self.named.kind


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Steps, in order, each one compressor: what :func:`read_recipe` returns.

    Attributes:
        steps: the steps.
        framework: the framework the recipe names, or None.
        source: the file it came from, for messages.
    """

    steps: tuple[Step, ...]
    framework: str | None = None
    source: str = "recipe"

    def resolved(self) -> dict[str, Any]:
        """Returns the recipe in its native form with every default, as JSON knows it.

        >>> rule = {"sparsity": 0.8, "op_types": ["default"]}
        >>> read_recipe({"purepruning": 1, "steps": [{"use": "fpgm", "rules": [rule]}]}).resolved()
        {'purepruning': 1, 'steps': [{'use': 'fpgm', 'rules': [{'sparsity': 0.8,
          'op_types': ['default']}], 'args': {'dependency_aware': False}}]}
        """
        steps = [
            {"use": s.use, "rules": [dict(r) for r in s.rules], "args": dict(s.args)}
            for s in self.steps
        ]
        named = {} if self.framework is None else {"framework": self.framework}
        return {"purepruning": VERSION, **named, "steps": steps}

    @property
    def ranges(self) -> dict[str, Range]:
        """What is to be searched for, by names such as ``"0.sparsity"``: rule and keys.

        Where there are several steps, the number of the step comes first.
        """
        found = {}
        for number, step in enumerate(self.steps):
            first = f"{number}." if len(self.steps) > 1 else ""
            for place, value in find_ranges(step.rules):
                found[first + ".".join(place)] = range_of(value, first + ".".join(place))
        return found


def read_recipe(source: str | os.PathLike[str] | Mapping[str, Any]) -> Recipe:
    """Returns a recipe, read from a file or a mapping, and checked whole.

    It may be auptimizer's ``"compression"`` object, alone or inside of an experiment, with
    ``framework`` and ``type`` or ``compression_framework`` and ``compression_type``; or the native
    form,

    ``{"purepruning": 1, "steps": [{"use": "agp", "rules": [...], "args": {...}}]}``.

    where a last step ``{"use": "shrink"}`` makes the smaller model of what was pruned before.

    ``args`` holds what a compressor is told besides its rules, as far as it is data. Files are
    JSON, or YAML (``.yaml``, ``.yml``, which needs PyYAML) of the same. Nothing in them is run,
    imported or unpickled.

    An empty ``config_list`` means, to the naive quantizer, the weights of all layers of the default
    types in 8 bits; to others it is an error. Everything that needs no model is checked here, for
    every value that a search range allows; names and types of layers by ``create_compressor``,
    before it begins. Other keys of an experiment are not looked at.

    Args:
        source: a path, or what a file holds.

    Raises:
        ValueError, TypeError, KeyError: a mistake in the recipe. The message gives the file, the
            step, the rule, the key, what was expected and what came, and the nearest valid names.
        OSError: the file cannot be read.

    >>> rule = {"sparsity": 0.8, "op_types": ["default"]}
    >>> read_recipe({"type": "pruning", "compressor": "level", "config_list": [rule]}).steps[0].use
    'level'
    """
    if isinstance(source, Mapping):
        where, path = "recipe", None
    else:
        where, path = str(source), file_path(source, "read_recipe")
    try:
        return _read(source if path is None else _load(path), where)
    except RecursionError:
        raise ValueError(
            f"{where}: it is nested too deeply; write steps, each with a list of rules"
        ) from None


def _read(content: Any, where: str) -> Recipe:
    with within(where):
        if not isinstance(content, Mapping):
            raise TypeError(
                f"a recipe must be an object, got {shown(content)}; write {{'compression': ...}}"
            )
        framework, steps = _native(content) if "purepruning" in content else _seed(content)
        found = []
        for number, raw in enumerate(steps):
            with within(f"step {number} ({raw['use']})"):
                found.append(_checked(raw))
        return Recipe(tuple(found), framework, where)


def write_resolved(path: str | os.PathLike[str], recipe: Recipe) -> None:
    """Writes ``resolved.json``: the recipe in its native form with every default.

    The file appears whole or not at all, and :func:`read_recipe` reads it.

    Raises:
        OSError: the file cannot be written.
    """
    text = json.dumps(recipe.resolved(), indent=2, allow_nan=False) + "\n"
    write_whole(file_path(path, "write_resolved"), text.encode())


@contextlib.contextmanager
def within(where: str) -> Iterator[None]:
    """Puts where it is before the message of a mistake."""
    try:
        yield
    except (ValueError, TypeError, KeyError) as error:
        words = error.args[0] if error.args else ""
        kind = next(k for k in (KeyError, TypeError, ValueError) if isinstance(error, k))
        raise kind(f"{where}: {words}") from None


# Files.
def _load(path: Path) -> Any:
    with within(str(path)):
        if path.suffix in (".yaml", ".yml"):
            return _yaml(path)
        if path.suffix != ".json":
            raise ValueError(
                f"a recipe is a .json, .yaml or .yml file, got {path.suffix or 'no suffix'!r}; "
                "convert it, for nothing is unpickled"
            )
        try:
            return json.loads(
                path.read_bytes(), object_pairs_hook=_once, parse_constant=_no_constant
            )
        except json.JSONDecodeError as error:
            raise ValueError(
                f"line {error.lineno}, column {error.colno}: {error.msg}; mend the JSON there"
            ) from None
        except UnicodeDecodeError as error:
            raise ValueError(f"it is no UTF-8 ({error.reason}); save it as UTF-8") from None


def _yaml(path: Path) -> Any:
    try:
        import yaml
    except ImportError:
        raise ValueError("YAML needs PyYAML; pip install PyYAML, or write JSON") from None
    try:
        content = yaml.safe_load(path.read_bytes())
        return json.loads(
            json.dumps(content, allow_nan=False), object_pairs_hook=_once
        )  # what JSON does not know is no recipe
    except yaml.YAMLError as error:
        raise ValueError(f"{' '.join(str(error).split())}; mend the YAML there") from None
    except TypeError:
        raise ValueError(
            "it holds what JSON does not know, such as a date; put it in quotes"
        ) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object; leave one of them out")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number; write a finite one")


# Forms.
def _native(content: Mapping[str, Any]) -> tuple[str | None, list[dict[str, Any]]]:
    _only(content, _NATIVE, "")
    version = content["purepruning"]
    if isinstance(version, bool) or version != VERSION:
        raise ValueError(
            f"'purepruning' is the version of the recipe, and must be {VERSION}, got "
            f"{shown(version)}; write {VERSION}"
        )
    framework = content.get("framework")
    if framework is not None:
        _choice("framework", framework, _FRAMEWORKS)
    steps = _list(content.get("steps"), "steps", "a list of steps")
    if not steps:
        raise ValueError("'steps' is empty; give it a step such as {'use': 'level', 'rules': ...}")
    for number, step in enumerate(steps):
        with within(f"step {number}"):
            _object(step, "a step")
            _only(step, _STEP, "")
            _choice("use", step.get("use"), tuple(COMPRESSORS))
    return framework, [{"rules": [], "args": {}, **step} for step in steps]


def _seed(content: Mapping[str, Any]) -> tuple[str | None, list[dict[str, Any]]]:
    if "compression" in content:
        content = _object(content["compression"], "'compression'")
    _only(content, _COMPRESSION, "compression: ")
    framework = _either(content, "framework", "compression_framework")
    kind = _either(content, "type", "compression_type")
    if framework is not None:
        _choice("compression: framework", framework, _FRAMEWORKS)
    names = tuple(name for name in COMPRESSORS if name != SHRINK)
    _choice("compression: compressor", content.get("compressor"), names)
    use = content["compressor"]
    if kind is not None:
        _choice("compression: type", kind, ("pruning", "quantization"))
        if kind != COMPRESSORS[use].kind:
            raise ValueError(
                f"compression: {use!r} is of type {COMPRESSORS[use].kind!r}, got {kind!r}; write "
                f"'type': {COMPRESSORS[use].kind!r}"
            )
    if "config_list" not in content:
        raise ValueError("compression: there is no 'config_list'; add it, a list of rules")
    rules, args = content["config_list"], content.get("args", {})
    return framework, [{"use": use, "rules": rules, "args": args}]


def _either(content: Mapping[str, Any], one: str, other: str) -> Any:
    if one in content and other in content:
        raise ValueError(f"compression: {one!r} and {other!r} say the same; leave one of them out")
    return content.get(one, content.get(other))


def _choice(where: str, value: Any, known: Sequence[str]) -> None:
    if value is None:
        raise ValueError(f"there is no {where!r}; write one of {', '.join(map(repr, known))}")
    if not isinstance(value, str):
        raise TypeError(f"{where} must be a string, got {shown(value)}")
    if value not in known:
        raise ValueError(missing(f"{where}: there is no {value!r}", value, known))


def _only(content: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in content:
        if key not in known:
            raise ValueError(missing(f"{where}unknown key {key!r}", str(key), known))


def _object(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{what} must be an object, got {shown(value)}")
    return value


def _list(value: Any, where: str, what: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise TypeError(f"{where!r} must be {what}, got {shown(value)}")
    return list(value)


# One step.
def _checked(raw: Mapping[str, Any]) -> Step:
    """Returns a step with every default, after checks of all that needs no model."""
    use, named = raw["use"], COMPRESSORS[raw["use"]]
    rules = _list(raw["rules"], "rules", "a list of rules")
    if use == SHRINK and rules:
        raise ValueError("it removes what steps before have pruned, by no rules; leave them out")
    if not rules and not named.none and use != SHRINK:
        raise ValueError("there are no rules, so it would do nothing; write one")
    for number, rule in enumerate(rules):
        _check_rule(number, rule, use, named)
    optional = {k: v for k, v in named.keys.items() if v is not ... and v is not None}
    filled = [
        dict(rule)
        if rule.get("exclude")
        else {**rule, **{k: rule.get(k, v) for k, v in optional.items()}}
        for rule in rules or map(dict, named.none)
    ]
    step = Step(use, tuple(filled), named.data() | _arguments(raw["args"], use, named))
    for values in _extremes(filled):
        _rehearse(dataclasses.replace(step, rules=values))
    return step


def _arguments(args: Any, use: str, named: Named) -> dict[str, Any]:
    given, known = dict(_object(args, "'args'")), named.data()
    for name, value in given.items():
        if isinstance(named.arguments.get(name), Given):
            raise ValueError(
                f"args: {name!r} is no data; leave it out, and give it to create_compressor"
            )
        if name not in known:
            raise ValueError(missing(f"args: {use} has no argument {name!r}", name, known))
        check_argument(f"args: {name}", name, value, known[name])
    return given


def check_argument(where: str, name: str, value: Any, default: Any) -> None:
    """Raises where an argument is of another type than its default."""
    if value is None or value == default:
        return
    if name in WITHOUT_EFFECT:
        raise ValueError(
            f"{where} has no effect here, so {shown(value)} would be lost; leave it out"
        )
    expected: tuple[type, ...] = {
        bool: (bool,),
        str: (str,),
        int: (int,),
        float: (int, float),
    }.get(type(default), (int,) if name == "seed" else (str,))
    if not isinstance(value, expected) or (bool not in expected and isinstance(value, bool)):
        words = {bool: "true or false", str: "a string", int: "a whole number", float: "a number"}
        raise TypeError(f"{where} must be {words[expected[-1]]}, got {shown(value)}")
    if name in REFIT and isinstance(value, int) and value < (least := REFIT[name]):
        raise ValueError(f"{where} must be at least {least}, got {value}")


def _check_rule(number: int, rule: Any, use: str, named: Named) -> None:
    if not isinstance(rule, Mapping):
        raise TypeError(f"rule {number} must be an object, got {shown(rule)}")
    known = (*SELECTORS, "exclude", "expand_op_names", *named.keys)
    for key in rule:
        if key not in known:
            raise ValueError(missing(f"rule {number}: {use} has no key {key!r}", str(key), known))
    for key in SELECTORS:
        if key in rule:
            some_strings(number, key, rule[key])
    if not any(key in rule for key in SELECTORS):
        raise ValueError(f"rule {number} selects nothing; give it op_types or op_names")
    for key in ("exclude", "expand_op_names"):
        if not isinstance(rule.get(key, False), bool):
            raise TypeError(f"rule {number}: {key} must be true or false, got {shown(rule[key])}")
    if not rule.get("exclude"):
        for key, default in named.keys.items():
            if default is ... and key not in rule:
                raise ValueError(f"rule {number}: {use} needs {key!r}; add it")
    for place, value in find_ranges([rule]):
        range_of(value, f"rule {number}: {'.'.join(place[1:])}")
    if "prune_iterations" in rule and not isinstance(rule["prune_iterations"], Mapping):
        integer(rule, "prune_iterations", number, 1, 1)


def _extremes(rules: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], ...]]:
    """Gives the rules with every range at its first value, at its last, and at each choice."""
    most = max((len(range_of(v, "").ends()) for _, v in find_ranges(rules)), default=1)
    for i in range(most):

        def end(value: Any, i: int = i) -> Any:
            ends = range_of(value, "").ends()
            return ends[min(i, len(ends) - 1)]

        yield tuple(plain_rule(replace_ranges(rule, end)) for rule in rules)


def plain_rule(rule: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a rule as the library reads it."""
    return {key: value for key, value in rule.items() if key != "expand_op_names"}


def replace_ranges(value: Any, by: Callable[[Any], Any]) -> Any:
    """Returns a rule with each range in it replaced."""
    if not isinstance(value, Mapping):
        return value
    if "type" in value:
        return by(value)
    return {key: replace_ranges(inner, by) for key, inner in value.items()}


def _rehearse(step: Step) -> None:
    """Resolves the rules against a layer for each, so that the library checks all but selectors."""
    rules, table = [], []
    for number, rule in enumerate(step.rules):
        rest = {key: value for key, value in rule.items() if key not in SELECTORS}
        rules.append({**rest, "op_names": [f"layer{number}"]})
        table.append(_layer(f"layer{number}", step.use))
    if step.use == "amc":
        pp.resolve(rules, table, granularity="output_channel")
    else:
        selected = [rule for rule in rules if not rule.get("exclude")]
        if selected:
            pp.from_nni(core_name(step), rules, table, **core_arguments(step))


def _layer(name: str, use: str) -> pp.Layer:
    if use == "slim":
        return pp.Layer(name, "BatchNorm2d", name, (1000,), (0,))
    return pp.Layer(name, "Linear", name, (1000, 1024), (0,), (1,))


def core_name(step: Step) -> str:
    """Returns what :func:`purepruning.from_nni` calls the pruner of a step."""
    # ADMM is a way of training; what it prunes by is a pruner of its own.
    name: str = step.args["base_algo"] if step.use == "admm" else step.use
    return name


def core_arguments(step: Step) -> dict[str, Any]:
    """Returns the arguments of a step that :func:`purepruning.from_nni` takes."""
    known = {
        "agp": ("pruning_algorithm",),
        "net_adapt": ("base_algo", "optimize_mode", "sparsity_per_iteration"),
        "simulated_annealing": (*_TUNED, *_ANNEALING),
        "auto_compress": (*_TUNED, *_ANNEALING, *_SQUEEZED),
        "amc": tuple(n for n in step.args if n not in (*WITHOUT_EFFECT, *FOLDERS, *REFIT, "seed")),
        "sensitivity": ("base_algo", "sparsity_per_iter", "acc_drop_threshold"),
    }.get(step.use, ())
    return {name: step.args[name] for name in known}


#: Arguments of AMC that are of its refit, and their lowest values.
REFIT = {"n_calibration_batches": 0, "n_points_per_layer": 1}
_TUNED = ("base_algo", "optimize_mode")
_ANNEALING = ("start_temperature", "stop_temperature", "cool_down_rate", "perturbation_magnitude")
_SQUEEZED = ("num_iterations", "admm_num_iterations", "admm_training_epochs", "row")
