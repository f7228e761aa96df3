"""The public surface as a table: of every callable a call that is right, and kinds of arguments.

A row gives a callable and its right arguments in the order of its signature. What an argument may
be follows from its name (:func:`_kinds`), unless the row says otherwise.
"""

from __future__ import annotations

import collections
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import safetensors.numpy
import torch
from flax import nnx

import purepruning as pp
from purepruning.trees import flatten
from purepruning_interop import keras as ppk
from tests.explore import kinds, world
from tests.explore.kinds import Kind, Wrong, choice, flag, integer, none, real
from tests.explore.world import Side, coupling, folder, sides

#: Other names of callables and arguments, by the names here: the same table then runs against
#: another version of the library.
NAMES: dict[str, str] = {}


class Made(NamedTuple):
    """A right argument that is made anew for every call, since a call may change it."""

    make: Callable[[], Any]


class Arg(NamedTuple):
    """A right argument, and what kind it is of."""

    good: Any
    kind: Kind

    def value(self) -> Any:
        """Returns the right argument."""
        return self.good.make() if isinstance(self.good, Made) else self.good


class Call(NamedTuple):
    """A callable, and a call of it that is right.

    Attributes:
        name: what is called, for messages.
        function: the callable.
        args: its arguments by name, in order.
        named: which of them are given by name.
        slow: whether a call traces a model.
        changes: whether it may change its arguments.
        works: whether the call is right; in the others a function that was given before is wrong.
    """

    name: str
    function: Callable[..., Any]
    args: dict[str, Arg]
    named: frozenset[str]
    slow: bool = False
    changes: bool = False
    works: bool = True

    def __call__(self, values: dict[str, Any]) -> Any:
        """Calls it with these arguments."""
        given = [x for name, x in values.items() if name not in self.named]
        return self.function(*given, **{n: x for n, x in values.items() if n in self.named})


def find(name: str) -> Any:
    """Returns what has this dotted name in ``purepruning`` or ``purepruning_interop``."""
    parts = NAMES.get(name, name).split(".")
    found: Any = pp
    if parts[0] == "purepruning_interop":
        found, parts = importlib.import_module(".".join(parts[:2])), parts[2:]
    for part in parts:
        found = getattr(found, part)
    return found


def row(
    function: str | Callable[..., Any],
    *good: Any,
    of: dict[str, Kind],
    label: str = "",
    **flags: bool,
) -> Call:
    """Returns a row of the table: right arguments in the order of the signature.

    What adapters take by name comes last, as a dict.
    """
    name = function if isinstance(function, str) else label
    called = find(function) if isinstance(function, str) else function
    parameters = list(inspect.signature(called).parameters.values())
    args, named = {}, set()
    by_name = good[-1] if good and name.startswith("purepruning_interop") else None
    if isinstance(by_name, dict) and {*by_name} <= {p.name for p in parameters}:
        order = [p for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]
        parameters = order[: len(good) - 1] + [p for p in parameters if p.name in by_name]
        good = (*good[:-1], *(by_name[p.name] for p in parameters[len(good) - 1 :]))
    for parameter, value in zip(parameters, good, strict=False):
        plain = NAMES.get(parameter.name, parameter.name)
        args[parameter.name] = Arg(value, of[plain])
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            named.add(parameter.name)
    return Call(
        name + label if isinstance(function, str) else label,
        called,
        args,
        frozenset(named),
        **flags,
    )


def called(name: str, *good: Any) -> Any:
    """Returns what a callable makes of arguments given in the order of its signature."""
    call = row(name, *good, of=collections.defaultdict(lambda: _GOOD))
    return call({argument: arg.value() for argument, arg in call.args.items()})


def surface(*, slow: bool = True) -> tuple[Call, ...]:
    """Returns the whole table; ``slow`` says whether what traces models is part of it."""
    parts = [_pruners, _sparse, _statistics, _of_masks, _schedules, _lottery, _admm, _movement]
    parts += [_files, _quantizers]
    found = [call for part in [*parts, _layers] for side in sides() for call in part(side)]
    some = [_numbers, _rules, _search, _counts, _transforms, _plans]
    some += [structure_calls, _torch, _jax] if slow else []
    return tuple(found + [call for part in some for call in part(sides()[0])])


_POSITIVE = real(0, np.inf, low_in=False, high_in=False)
_GOOD = Kind((), lambda x: "good")
_ANY = kinds.anything("param", "tree")


def _kinds(s: Side, **others: Kind) -> dict[str, Kind]:
    """Returns the kind of every argument by its name."""
    return {
        "params": kinds.params("a.w"),
        "stats": none(),
        "config": _config(s),
        "layers": kinds.layers(),
        "masks": kinds.masks("a.w"),
        "key": kinds.random_key(),
        "coupling": _coupling(),
        "path": kinds.path(),
        "scale": real(0, np.inf, high_in=False),
        "p": _POSITIVE,
        "reduce": choice("sum", "mean", "max", "prod"),
        "normalize": choice("none", "mean", "max", "sum"),
        "roles": _one_of("roles", ["nothing"]),
        "pruner": kinds.function(called=False, words=("pruner",)),
        "norms": choice("original", "kept"),
        "conflicts": choice("refuse", "keep", "remove"),
        "donate": flag(),
        "inputs": _GOOD,  # what a model itself says of a wrong input is not ours to judge
        **others,
    }


def _config(s: Side, *, counts: bool = True, model: bool = True) -> Kind:
    """A config; ``counts`` and ``model`` say whether its counts, and its layers, are looked at."""
    fate = "refuse" if model else "either"
    return kinds.config(
        ("of another model", s.other, fate),
        ("of other shapes", s.bigger, fate),
        ("without sparsity", s.unsaid, "refuse" if counts else "either"),
        ("rules", s.rules, "refuse"),
        ("table", s.layers, "refuse"),
        counts=counts,
        model=model,
    )


def _shapes(path: str = "a.w") -> Kind:
    return kinds.params(path, uses="shapes")


def _coupling() -> Kind:
    other = ("of another", world.other_coupling(), "refuse")
    return kinds.structure(pp.Coupling, other, words=("coupl",), fields=())


def _one_of(word: str, unknown: Any) -> Kind:
    """A collection of a few words, none of which is in the catalogue."""
    return Kind((word,), lambda x: "refuse", lambda good: [Wrong("unknown", unknown, "refuse")])


def _pruners(s: Side) -> Iterator[Call]:
    of, at = _kinds(s), f" [{s.name}]"
    for name, config in [
        ("level", s.config),
        ("l1_norm", s.channels),
        ("l2_norm", s.channels),
        ("fpgm", s.channels),
        ("group_norm", s.coupled),
    ]:
        yield row(name, s.params, None, config, 2, "mean", "mean", ["source"], of=of, label=at)
    yield row("level", s.params, None, s.total, of=of, label=" global" + at)
    yield row("l1_norm", s.params, None, s.coupled, of=of, label=" coupled" + at)
    fixed = _kinds(s, config=_config(s, counts=False))
    yield row("level", s.params, None, s.nm, of=fixed, label=" NM" + at)
    inverted = find("invert_scores")(pp.level)
    yield row(inverted, s.params, None, s.config, of=of, label="invert_scores(level)" + at)
    of = _kinds(s, params=_shapes(), stats=kinds.random_key())
    yield row("random_pruning", s.params, 5, s.config, of=of, label=at)
    of = _kinds(s, params=kinds.params("n.w"), feeds=_feeds())
    yield row("slim", s.params, None, s.of_norms, {"n": s.layers[0]}, of=of, label=at)
    of |= {"layers": kinds.layers(config_too=True)}
    of |= {"params": kinds.arrays("n.w", refuse=tuple(x for x in kinds.VALUES if x != "nan"))}
    yield row("slim_penalty", s.params, s.norms, 1e-4, of=of, label=at)
    of = _kinds(s, criterion=kinds.of_type(pp.Criterion, words=("criterion",)))
    own = pp.Criterion("own", channel=_largest)
    yield row("prune", own, s.params, None, s.channels, of=of, label=at)
    of = _kinds(s, values=kinds.arrays("a.w", refuse=kinds.NEVER, missing="either"))
    yield row("unit_scores", s.params, coupling(), "sum", "none", ["source"], of=of, label=at)
    of = _kinds(s, params=_shapes(), scores=_scores())
    scores = s.array(np.arange(1.0, coupling().n_units + 1))
    yield row("prune_units", scores, s.params, s.coupled, of=of, label=at)
    all_masks = kinds.masks("a.w", missing="refuse", empty="refuse", stray="either")
    of = _kinds(s, masks=all_masks, config=_config(s, counts=False))
    yield row("shuffle_masks", s.masks, s.config, 5, of=of, label=at)
    yield row("shuffle_masks", s.channel_masks, s.channels, 5, of=of, label=" channels" + at)
    numbers = tuple(x for x in kinds.VALUES if x != "int")
    of = _kinds(s, params=_shapes(), scores=kinds.arrays("a.w", refuse=numbers, words=("score",)))
    yield row("prune_scores", s.grads, s.params, s.config, of=of, label=at)
    zeros = find("apply_masks")(s.params, s.masks)
    of = _kinds(s, config=_config(s, counts=False))
    yield row("masks_from_zeros", zeros, s.config, of=of, label=at)
    of = _kinds(s, params=kinds.arrays("a.w", refuse=kinds.NEVER), weighted=flag())
    config = _config(s, counts=False)
    of |= {"params": kinds.arrays("a.w", refuse=kinds.NEVER, missing="either")}
    either = kinds.structure((pp.Coupling, pp.Config), words=("coupl", "config"), fields=())
    of |= {"coupling": Kind(either.words, either.judge, config.more)}
    yield row("group_penalty", s.params, s.coupled, 1e-4, True, ["source"], of=of, label=at)
    yield row("reinitialize", s.params, 5, of=_kinds(s, params=_ANY), label=at)


def _largest(weight: Any, own: Any, g: Any) -> Any:
    from purepruning.pruners.magnitude import l1

    return l1(weight, own, g)


def _fisher_blocks(s: Side, at: str) -> Iterator[Call]:
    module = find("stats.fisher_blocks")
    seen = module.update(module.init(s.params, s.layers, size=4), s.grads, s.layers)
    other = module.init(s.other_params, s.other)
    of_seen = kinds.structure(
        type(seen),
        ("of another model", other, "refuse"),
        words=("statistic", "stats", "layer", "total"),
    )
    of = _kinds(s, params=_shapes(), layers=kinds.layers(config_too=True))
    of |= {"stats": of_seen, "a": of_seen, "b": of_seen, "size": kinds.integer(1, 2**15)}
    of |= {"grads": kinds.arrays("a.w", words=("gradient",))}
    yield row("stats.fisher_blocks.memory", s.layers, 4, of=of, label=at)
    yield row("stats.fisher_blocks.init", s.params, s.layers, 4, of=of, label=at)
    yield row("stats.fisher_blocks.update", seen, s.grads, s.layers, of=of, label=at)
    yield row("stats.fisher_blocks.merge", seen, seen, of=of, label=at)
    of |= {"params": kinds.params("a.w"), "damping": real(0, np.inf, high_in=False)}
    yield row("obert", s.params, seen, s.config, 0.5, of=of, label=at)


def _feeds() -> Kind:
    def judge(x: Any) -> kinds.Fate:
        return "either" if x is None or (isinstance(x, dict) and not x) else "refuse"

    def more(good: Any) -> Iterator[Wrong]:
        layer = next(iter(good.values()))
        yield Wrong("another norm", {"z": layer}, "refuse")
        yield Wrong("a name", {"n": "a"}, "refuse")
        yield Wrong("None", {"n": None}, "refuse")

    return Kind(("feeds",), judge, more)


def _scores() -> Kind:
    def more(good: Any) -> Iterator[Wrong]:
        for label, leaf in kinds.bad_leaves(good).items():
            # Scores may also begin with one of no unit, so that one more is no other shape.
            free = ("float", "int", "list", "shape", "other framework")
            fate: kinds.Fate = "either" if label in free else "refuse"
            yield Wrong(label, leaf, fate)
        yield Wrong("too few", good[:-1], "refuse")

    return Kind(("scores",), lambda x: "refuse", more)


def _statistics(s: Side) -> Iterator[Call]:
    at, words = f" [{s.name}]", ("statistic", "stats", "layer", "total")
    activations, gradients = find("stats.activations"), find("stats.gradients")
    seen = activations.init(s.params, s.layers)
    seen = activations.update(seen, s.outputs, s.layers, activation="relu")
    slopes = gradients.init(s.params, s.channels, keep=["squares", "grouped", "signed"])
    slopes = gradients.update(slopes, s.params, s.grads, s.channels)
    other = activations.init(s.other_params, s.other)
    of_seen = kinds.structure(
        type(seen),
        ("of gradients", slopes, "refuse"),
        ("of another model", other, "refuse"),
        words=words,
    )
    other = gradients.init(s.other_params, s.other)
    of_slopes = kinds.structure(
        type(slopes),
        ("of activations", seen, "refuse"),
        ("of another model", other, "refuse"),
        words=words,
    )
    table = kinds.layers(config_too=True)
    of = _kinds(s, params=_shapes(), layers=table, stats=of_seen, a=of_seen, b=of_seen)
    batch = tuple(x for x in kinds.VALUES if x != "shape")
    of |= {"outputs": kinds.arrays("a", refuse=batch, words=("output",))}
    of |= {"activation": _activation()}
    yield row("stats.activations.init", s.params, s.layers, of=of, label=at)
    yield row("stats.activations.update", seen, s.outputs, s.layers, "relu", of=of, label=at)
    yield row("stats.activations.merge", seen, seen, of=of, label=at)
    for name in ("apoz_rank", "mean_activation_rank"):
        yield row(name, s.params, seen, s.channels, of=of, label=at)
    of |= {"stats": of_slopes, "a": of_slopes, "b": of_slopes, "keep": _one_of("keep", ["cubes"])}
    of |= {"grads": kinds.arrays("a.w", words=("gradient",)), "grouped": flag()}
    yield row("taylor_fo", s.params, slopes, s.channels, False, of=of, label=at)
    single = gradients.init(s.params, s.config)
    single = gradients.update(single, s.params, s.grads, s.config)
    of |= {"damping": real(0, np.inf, high_in=False)}
    yield row("fisher", s.params, single, s.channels, 0.5, of=of, label=at)
    yield from _fisher_blocks(s, at)
    yield row("snip", s.params, slopes, s.channels, of=of, label=at)
    yield row("grasp", s.params, slopes, s.channels, of=of, label=at)
    yield row("synflow", s.params, slopes, s.channels, of=of, label=at)
    yield from _at_initialization(s, at)
    of |= {"config": _config(s, counts=False)}
    yield row("stats.gradients.init", s.params, s.channels, ["squares"], of=of, label=at)
    of |= {"params": kinds.params("a.w")}
    yield row("stats.gradients.update", slopes, s.params, s.grads, s.channels, of=of, label=at)
    yield row("stats.gradients.merge", slopes, slopes, of=of, label=at)
    yield from _inputs(s, at)
    yield from _blocks(s, at)
    yield from _accumulate(s, at)


def _at_initialization(s: Side, at: str) -> Iterator[Call]:
    of = _kinds(s, config=_config(s, counts=False), rescale=flag(), regrow=flag())
    # What a function of the user's makes of parameters is its own matter.
    of |= {"loss": _function("loss"), "params": _GOOD, "outputs": _function("outputs")}
    of |= {"rounds": kinds.integer(1, 2**20), "curve": choice("exponential", "linear")}

    def total(p: Any) -> Any:
        return sum((x * x).sum() for x in (p.values() if s.is_torch else jax.tree.leaves(p)))

    yield row("hessian_gradient", total, s.params, of=of, label=at)
    of |= {"params": kinds.params("a.w", uses="shapes")}
    yield row("synaptic_flow", total, s.params, s.config, False, of=of, label=at)
    of |= {"config": _config(s, model=False)}
    yield row("iterative", pp.level, s.config, 3, "linear", True, of=of, label=at)


def _function(word: str) -> Kind:
    return Kind((word,), lambda x: "good" if callable(x) else "refuse")


def _inputs(s: Side, at: str) -> Iterator[Call]:
    module = find("stats.inputs")
    keep = ["squares", "grams"]
    sizes = {"a": 4, "b": 6}
    batch = {name: s.array(np.arange(3.0 * n).reshape(3, n) % 7) for name, n in sizes.items()}
    seen = module.update(module.init(s.params, s.layers, keep=keep), batch, s.layers)
    other = module.init(s.other_params, s.other, keep=keep)
    of_seen = kinds.structure(
        type(seen),
        ("of another model", other, "refuse"),
        words=("statistic", "stats", "layer", "total"),
    )
    of = _kinds(s, params=_shapes(), layers=kinds.layers(config_too=True))
    of |= {"stats": of_seen, "a": of_seen, "b": of_seen, "keep": _one_of("keep", ["cubes"])}
    values = tuple(x for x in kinds.VALUES if x != "shape")
    of |= {"inputs": kinds.arrays("a", refuse=values, words=("input",))}
    yield row("stats.inputs.memory", s.layers, keep, of=of, label=at)
    yield row("stats.inputs.init", s.params, s.layers, keep, of=of, label=at)
    yield row("stats.inputs.update", seen, batch, s.layers, of=of, label=at)
    yield row("stats.inputs.merge", seen, seen, of=of, label=at)
    yield from _calibrated(s, at, of, seen)


def _calibrated(s: Side, at: str, of: dict[str, Kind], seen: Any) -> Iterator[Call]:
    of |= {"params": kinds.params("a.w")}
    for name in ("wanda", "ria"):
        yield row(name, s.params, seen, s.config, of=of, label=at)
    loose = _config(s, counts=False)
    yield row("wanda_scores", s.params, seen, s.config, of=of | {"config": loose}, label=at)
    of |= {"damping": real(0, np.inf, high_in=False)}
    for name in ("sparse_gpt", "obc", "alps"):
        yield row(name, s.params, seen, s.config, 0.01, of=of, label=at)
    of |= {"config": _config(s, counts=False)}
    yield row("obc_errors", s.params, seen, s.config, 0.01, of=of, label=at)
    yield from _of_readers(s, at, of)


def _of_readers(s: Side, at: str, of: dict[str, Kind]) -> Iterator[Call]:
    """Criteria of coupled units by what the layers that read them are given."""
    module = find("stats.inputs")
    keep, readers = ["sums", "squares", "means"], s.coupled.readers
    given = {"b": s.array(np.arange(18.0).reshape(3, 6) % 7)}
    seen = module.update(module.init(s.params, readers, keep=keep), given, readers)
    of |= {"params": _shapes(), "config": _config(s), "compensate": flag()}
    yield row("minitron", s.params, seen, s.coupled, of=of, label=at)
    of |= {"params": kinds.params("b.w")}
    yield row("flap", s.params, seen, s.coupled, True, of=of, label=at)


def _blocks(s: Side, at: str) -> Iterator[Call]:
    """Statistics of blocks, what is dropped by them, and parameters without them."""
    module = find("stats.blocks")
    states = [s.array(np.arange(6.0).reshape(2, 3) % (3 + i)) for i in range(4)]
    seen = module.update(module.init(s.params, 3), states)
    of_seen = kinds.structure(type(seen), words=("statistic", "stats", "total"))
    of = _kinds(s, stats=of_seen, a=of_seen, b=of_seen, states=_some("state", "the stream"))
    of |= {"n_blocks": kinds.integer(1, module.MOST), "drop": kinds.integer(0, 2)}
    of |= {"loss": kinds.function(words=("loss",)), "dropped": _some("dropped"), "at": kinds.text()}
    of |= {"params": Kind(("param", "tree"), lambda x: "either")}
    yield row("stats.blocks.init", s.params, 3, of=of, label=at)
    yield row("stats.blocks.update", seen, states, of=of, label=at)
    yield row("stats.blocks.merge", seen, seen, of=of, label=at)
    yield row("block_influence", seen, of=of, label=at)
    yield row("short_gpt", seen, 1, of=of, label=at)
    yield row("sleb", lambda kept: float(len(kept)), 3, 1, of=of, label=at)
    of |= {"params": Kind(("drop_blocks: at", "blocks"), lambda x: "refuse")}
    yield row("drop_blocks", {"blocks": states}, [1], "blocks.{}", of=of, label=at)


def _some(*words: str) -> Kind:
    """A collection, whose elements are looked at one by one."""

    def judge(x: Any) -> kinds.Fate:
        if isinstance(x, str | bytes | dict):
            return "refuse"
        try:
            iter(x)
        except TypeError:
            return "refuse"
        return "either"

    return Kind(words, judge)


def _accumulate(s: Side, at: str) -> Iterator[Call]:
    module, words = find("stats.accumulate"), ("total", "count", "sum")
    total = module.CompensatedSum(*(s.array(np.zeros(2, np.float32)) for _ in range(2)))
    n = module.WideCount(*(s.array(np.zeros(2, np.int32)) for _ in range(2)))
    of_sum = kinds.structure(
        module.CompensatedSum, ("a count", n, "refuse"), words=words, fate="either"
    )
    of_count = kinds.structure(
        module.WideCount, ("a sum", total, "refuse"), words=words, fate="either"
    )
    sums = {"total": of_sum, "x": _addend(float), "a": of_sum, "b": of_sum}
    counts = {"total": of_count, "n": _addend(int), "a": of_count, "b": of_count}
    yield row("stats.accumulate.count", n, 3, of=counts, label=at)
    yield row("stats.accumulate.merge_counts", n, n, of=counts, label=at)
    yield row("stats.accumulate.add", total, s.array(np.ones(2, np.float32)), of=sums, label=at)
    yield row("stats.accumulate.merge_sums", total, total, of=sums, label=at)
    both = kinds.structure((module.CompensatedSum, module.WideCount), words=words, fate="either")
    yield row("stats.accumulate.value", total, of={"total": both}, label=at)


def _addend(of: type) -> Kind:
    def judge(x: Any) -> kinds.Fate:
        if hasattr(x, "dtype") and not isinstance(x, np.bool_):
            return "either"
        number = isinstance(x, (int, of)) and not isinstance(x, bool)
        return "either" if number and (of is float or 0 <= x < 2**31) else "refuse"

    return Kind(("total", "count", "sum"), judge)


def _activation() -> Kind:
    def more(good: Any) -> Iterator[Wrong]:
        yield Wrong("returns None", lambda x: None, "refuse")
        yield Wrong("returns 5", lambda x: 5, "refuse")
        yield Wrong("sums", lambda x: x.sum(), "refuse")

    return Kind(("activation",), lambda x: "good" if callable(x) else "refuse", more)


def _of_masks(s: Side) -> Iterator[Call]:
    at = f" [{s.name}]"
    of = _kinds(s, params=_shapes(), tree=_ANY, how=choice("and", "or"))
    yield row("apply_masks", s.params, s.masks, of=of, label=at)
    yield row("expand", s.masks, s.params, of=of, label=at)
    yield row("density", s.masks, s.params, of=of, label=at)
    yield row("summarize", s.params, s.masks, s.layers, of=of, label=at)
    yield row("leaf_paths", s.params, of=of, label=at)
    alone = _kinds(s, masks=_alone())
    yield row("invert", s.masks, of=alone, label=at)
    second = kinds.masks("a.w", stray="either")
    alone |= {"first": _alone(), "second": second, "how": choice("and", "or")}

    def merge(first: Any, second: Any, *, how: Any) -> Any:
        return find("merge_masks")(first, second, how=how)

    yield row(merge, s.masks, s.masks, "and", of=alone, label="merge_masks" + at)


def _alone() -> Kind:
    """Masks without parameters that they could be compared with: of any shapes and paths."""
    kind = kinds.masks("a.w")
    free = (
        "shape",
        "rank",
        "0-d",
        "empty",
        "unknown path",
        "other framework",
        "list",
        "in a tuple",
    )

    def more(good: Any) -> Iterator[Wrong]:
        for wrong in kind.more(good):
            may_be = wrong.label.rpartition(": ")[-1] in free
            yield wrong._replace(fate="either") if may_be else wrong

    def judge(x: Any) -> kinds.Fate:
        return "either" if isinstance(x, np.bool_) else kind.judge(x)

    return Kind(kind.words, judge, more)


def _schedules(s: Side) -> Iterator[Call]:
    at, words = f" [{s.name}]", ("state", "schedule", "checkpoint")
    schedule = called("linear", 0, 4)
    state, other = schedule.init(s.config), schedule.init(s.other)
    of = _kinds(s, config=_config(s, model=False), sparsity=_sparsities())
    yield row(schedule.init, s.config, of=of, label="Schedule.init" + at)
    of |= {"config": _config(s, model=False, counts=False)}
    yield row(schedule.init, s.config, 0.5, of=of, label="Schedule.init of a sparsity" + at)
    of = _kinds(s, state=kinds.structure(type(state), words=words), tree=_ANY)
    yield row(schedule.step, state, of=of, label="Schedule.step" + at)
    yield row("vmap_axes", state, of=of, label=at)
    loose = kinds.structure(type(state), ("of another", other, "refuse"), words=words)
    loose = Kind(loose.words, lambda x: "either", loose.more)
    of = {"restored": loose, "fresh": loose}
    yield row("check_resumed", state, state, of=of, label=at)


def _sparsities() -> Kind:
    number = real(0, 1, high_in=False)

    def judge(x: Any) -> kinds.Fate:
        if x is None or isinstance(x, list | tuple | range) or hasattr(x, "shape"):
            return "either"
        if isinstance(x, dict):
            return "refuse" if x else "either"
        return number.judge(x)

    def more(good: Any) -> Iterator[Wrong]:
        for wrong in ([0.5, 2], [0.5, "1"], {"a": "x"}, {"a": np.nan}, {"nothing": 0.5}, 1.0):
            yield Wrong(repr(wrong), wrong, "refuse")

    return Kind(("sparsity",), judge, more)


def _bad_pruners() -> list[tuple[str, Any]]:
    return [
        ("returns None", lambda params, stats, config: None),
        ("returns 5", lambda params, stats, config: 5),
        ("returns params", lambda params, stats, config: params),
        ("returns {}", lambda params, stats, config: {}),
        ("returns text", lambda params, stats, config: "text"),
    ]


def _broken(*words: str) -> Kind:
    """An argument that is right; but what was made before is wrong, and the call must say so."""
    return Kind(words, lambda x: "good", lambda good: [Wrong("as it is", good, "refuse")])


def _lottery(s: Side) -> Iterator[Call]:
    at, rewind = f" [{s.name}]", Kind(("rewind",), lambda x: "refuse")
    # Which names there are is known when rounds begin.
    listed = (list, tuple, set, np.ndarray)
    empty = Kind(rewind.words, lambda x: "either" if isinstance(x, listed) else "refuse")
    of = _kinds(s, config=_config(s, model=False, counts=False), rewind=empty)
    of |= {"rounds": integer(1, 10**6)}
    yield row("lottery", pp.level, s.config, 3, ["params"], of=of, label=at)
    lottery, run = find("lottery"), {"params": s.params}
    tickets, other = lottery(pp.level, s.config, rounds=3), lottery(pp.level, s.other, rounds=3)
    state = tickets.init(run)
    stranger = ("of another", other.init({"params": s.other_params}), "refuse")
    words = ("state", "lottery", "run", "mask", "param")
    of_state = kinds.structure(
        type(state), stranger, words=words, fields=("schedule",), nested=False
    )
    of = _kinds(s, run=_run(), state=of_state)
    yield row(tickets.init, run, of=of, label="lottery.init" + at)
    yield row(tickets.step, state, run, None, of=of, label="lottery.step" + at)
    for label, pruner in _bad_pruners():
        step = lottery(pruner, s.config, rounds=3).step
        of = {"state": _GOOD, "run": _broken("pruner", "mask")}
        yield row(step, state, run, of=of, label=f"lottery.step, pruner {label}{at}", works=False)


def _is_empty(x: Any) -> bool:
    return x is None or (isinstance(x, list | tuple | dict | set) and not x)


def _run() -> Kind:
    inner = kinds.params("a.w")

    def more(good: Any) -> Iterator[Wrong]:
        for label, value in kinds.junk().items():
            yield Wrong(f"params = {label}", {**good, "params": value}, "refuse")
        for wrong in inner.more(good["params"]):
            # Where a run begins, the values of its weights do not matter.
            at_step = wrong.label.rpartition(": ")[-1] in ("nan", "meta", "abstract")
            fate: kinds.Fate = "either" if at_step else wrong.fate
            yield Wrong(f"params: {wrong.label}", {**good, "params": wrong.value}, fate)

    return Kind(("run", "param", "lottery", *inner.words), lambda x: "refuse", more)


def _admm(s: Side) -> Iterator[Call]:
    at, state = f" [{s.name}]", find("admm").init(s.params, s.config)
    fixed = _config(s, counts=False)
    of = _kinds(s, state=kinds.structure(type(state), words=("state",)), config=fixed, rho=_rho())
    yield row("admm.init", s.params, s.config, of=of, label=at)
    seen = tuple(x for x in kinds.VALUES if x != "nan")
    grad = of | {"params": kinds.arrays("a.w", refuse=seen)}
    yield row("admm.penalty", s.params, state, s.config, 0.1, of=grad, label=at)
    of |= {"config": _config(s)}
    of |= {"pruner": kinds.function(*_bad_pruners(), words=("pruner", "mask"))}
    yield row("admm.step", s.params, state, s.config, 0.1, pp.level, None, of=of, label=at)
    of |= {"pruner": kinds.function(words=("pruner", "mask"))}
    yield row("admm.masks", s.params, state, s.config, pp.level, None, of=of, label=at)


def _rho() -> Kind:
    def more(good: Any) -> Iterator[Wrong]:
        for wrong in ({"a": 1.0}, {"a": None, "b": 1.0}, {"a": -1.0, "b": 1.0}):
            yield Wrong(repr(wrong), wrong, "refuse")

    return Kind(("rho",), _POSITIVE.judge, more)


def _movement(s: Side) -> Iterator[Call]:
    at = f" [{s.name}]"
    scores = {"a": s.array(values := world.values()["a.w"]), "b": s.array(values.T)}
    of = _kinds(s, params=_shapes(), scores=kinds.arrays("a", words=("score",)))
    fixed = of | {"config": _config(s, counts=False)}
    yield row("movement.init", s.params, s.config, of=fixed, label=at)
    hard = of | {"threshold": _ANY}
    soft = fixed | {"threshold": real(0, 1, high_in=False, optional=True)}
    for name in ("movement.masks", "movement.apply"):
        yield row(name, s.params, scores, s.config, None, of=hard, label=" hard" + at)
        yield row(name, s.params, scores, s.config, 0.5, of=soft, label=" soft" + at)
    refuse = ("text", "object", "numpy objects", "other framework")
    alone = kinds.arrays("a", refuse=refuse, missing="either", words=("score",))
    yield row("movement.penalty", scores, of={"scores": alone}, label=at)
    if s.is_torch:
        return
    of = _kinds(s, config=_config(s, model=False), configs=_config(s, model=False))
    of |= {"steps": integer(5, 10**8), "begin_step": integer(0, 4), "end_step": integer(2, 6)}
    of |= {"step": integer(0, 10**500)}
    yield row("movement.ramp", 6, 1, 5, of=of)
    yield row("movement.schedule", s.config, 6, 1, 5, of=of)
    yield row("movement.at", called("movement.schedule", s.config, 6, 1, 5), 1, of=of)


def _files(s: Side) -> Iterator[Call]:
    at, state = f" [{s.name}]", {"p": s.params}
    read, written = (folder() / f"{n}_{s.name}.safetensors" for n in ("read", "written"))
    run = folder() / f"run_{s.name}.safetensors"
    find("save_masks")(read, s.masks, s.params)
    find("save_state")(run, state, config=s.config)
    of = _kinds(s, params=_shapes(), state=_ANY, like=_like())
    yield row("save_masks", written, s.masks, s.params, of=of, label=at)
    yield row("load_masks", read, s.params, of=of, label=at)
    pruned = folder() / f"sparse_{s.name}.safetensors"
    find("save_sparse")(pruned, s.params, s.masks)
    yield row("save_sparse", written, s.params, s.masks, of=of, label=at)
    yield row("load_sparse", pruned, s.params, of=of, label=at)
    of |= {"config": _optional(_config(s, counts=False, model=False))}
    yield row("save_state", written, state, s.config, of=of, label=at)
    yield row(
        "load_state", run, state, s.config, of=of | {"config": _config(s, counts=False)}, label=at
    )
    rule = {"quant_types": ["weight"], "quant_bits": 8, "op_types": ["Linear"]}
    config = pp.resolve_quantization(rule, s.layers)
    quantised, levels = (f(s.params, *more, config) for f, *more in _PTQ)
    weights = pp.quantize.integers.of(quantised, levels, config)
    model = folder() / f"quantized_{s.name}.safetensors"
    find("save_quantized")(model, quantised, weights, {}, config)
    of |= {"config": kinds.of_type(pp.quantize.QuantizationConfig, words=("config",))}
    mapping = Kind(("weight", "integers"), lambda x: "refuse")
    of |= {"weights": mapping, "ranges": Kind(("range",), lambda x: "either")}
    yield row("save_quantized", written, quantised, weights, {}, config, of=of, label=at)
    yield row("load_quantized", model, s.params, of=of, label=at)
    if s.is_torch:
        return
    yield row("to_bcoo", s.params, s.masks, of=_kinds(s, params=_shapes()), label=at)
    weights = {name: np.asarray(x) for name, x in flatten(s.params).leaves.items()}
    safetensors.numpy.save_file(weights, folder() / "weights.safetensors")
    pruner = kinds.function(words=("pruner",))
    of |= {"source": kinds.path(), "target": _optional(kinds.path()), "pruner": pruner}
    of |= {"stats": _ANY}
    of |= {"config": _config(s, model=False)}
    files = (folder() / "weights.safetensors", folder() / "pruned")
    yield row("prune_files", find("level"), *files, s.config, None, of=of)


_PTQ = ((pp.quantize.ptq.weights, None), (pp.quantize.ptq.levels,))


def _quantizers(s: Side) -> Iterator[Call]:
    """Quantizers, their scales and states, and what they are made of."""
    at, q = f" [{s.name}]", pp.quantize
    rule = {"quant_types": ["weight", "input"], "quant_bits": 4, "op_types": ["Linear"]}
    config, signs = (pp.resolve_quantization(rule | {"quant_bits": n}, s.layers) for n in (4, 1))
    other = pp.resolve_quantization(rule, [pp.Layer("z", "Linear", "z.w", (4, 6), (1,), (0,))])
    sites = [t.site for t in config.activations]
    x = s.array(np.arange(6.0).reshape(2, 3) - 2)
    more = [Wrong("of another model", other, "refuse"), Wrong("rules", [rule], "refuse")]
    of_config = kinds.of_type(q.QuantizationConfig, words=("config", "layer", "rule"), more=more)
    # NaN stays NaN, and a list is a node of a tree.
    weights = kinds.arrays("a.w", refuse=tuple(v for v in kinds.VALUES if v not in ("nan", "none")))
    of = _kinds(s, config=of_config, params=weights, quantised=weights, x=_floats(), g=_floats())
    of |= {"scale": _scale_of(), "offset": _scale_of(optional=True), "zero_point": _GOOD}
    of |= {"low": integer(-(2**31), 0), "high": integer(1, 2**31 - 1), "size": integer(1, 10**500)}
    of |= {"smallest": _GOOD, "largest": _GOOD, "rounding": choice("nearest", "truncate")}
    of |= {"bits": integer(1, 24), "training": flag(), "name": _GOOD, "coverage": real(0, 1)}
    of |= {"kind": choice("min_max", "moving_average", "histogram")}
    of |= {"gradient_bits": integer(1, 24), "key": kinds.random_key()}
    own = of | {"key": _optional(kinds.random_key())}
    whole = of | {"low": integer(-(2**31), 6), "high": integer(-(2**31) + 1)}
    one = s.array(np.float32(0.5))
    yield row("quantize.fake_quantize", x, one, one * 0, -8, 7, of=whole, label=at)
    for name in ("affine", "symmetric"):
        yield row(f"quantize.{name}", -one, one, -8, 7, of=whole, label=at)
    yield row("quantize.dorefa.activation", x, 2, of=of, label=at)
    yield row("quantize.dorefa.gradient", x, 5, 2, of=of, label=at)
    yield row("quantize.bnn.activation", x, 5, of=own, label=at)
    yield row("quantize.lsq.quantize", x, one, -8, 7, 6, of=of, label=at)
    yield row("quantize.lsq_plus.quantize", x, one, -one, -8, 7, 6, of=of, label=at)
    plain = of | {"state": _GOOD}
    for name, some in (("naive", config), ("ptq", config), ("dorefa", config), ("bnn", signs)):
        yield row(f"quantize.{name}.weights", s.params, None, some, of=plain, label=at)
    yield row("quantize.bnn.clip", s.params, signs, of=of, label=at)
    free = of | {"config": kinds.of_type(q.QuantizationConfig, words=("config",))}
    yield row("quantize.bnn.levels", signs, of=free, label=at)
    yield row("quantize.bnn.activations", signs, 5, of=free | own, label=at)
    yield row("quantize.dorefa.levels", config, of=free, label=at)
    yield row("quantize.dorefa.activations", config, 5, 2, of=free, label=at)
    for name in ("naive", "ptq", "qat"):
        yield row(f"quantize.{name}.levels", s.params, config, of=of, label=at)
    seen = {site: q.observers.Range(one * 0, one) for site in sites}
    state = q.qat.update(q.qat.init(s.params, config), seen, config)
    of |= {"state": kinds.structure(type(state), words=("state", "average"), nested=True)}
    of |= {"ranges": _by_site(), "seen": _by_site(), "scales": _by_site()}
    of |= {"levels": _by_site(site="a:weight")}
    weight_scales = of | {"scales": _by_site(site="a:weight")}
    any_params = of | {"params": Kind(("param",), lambda x: "either" if _has_leaf(x) else "refuse")}
    any_params |= {"config": free["config"]}
    yield row("quantize.qat.init", s.params, config, of=any_params, label=at)
    stepped = kinds.structure(type(state), words=("state",), fields=("step",))
    yield row("quantize.qat.weights", s.params, state, config, of=of | {"state": stepped}, label=at)
    yield row("quantize.qat.activations", state, config, True, of=of, label=at)
    yield row("quantize.qat.update", state, seen, config, of=of, label=at)
    ranges = q.observers.ranges(state.averages)
    for name in ("activations", "activation_levels"):
        yield row(f"quantize.ptq.{name}", ranges, config, of=of, label=at)
    yield from _observers(s, at, any_params, config, seen)
    yield row("quantize.lsq.watch", config, of=free, label=at)
    for name, found in (("lsq", dict.fromkeys(sites, one)), ("lsq_plus", ranges)):
        scales = getattr(q, name).init(s.params, config, found)
        yield row(f"quantize.{name}.init", s.params, config, found, of=of, label=at)
        given = (s.params, scales, config)
        yield row(f"quantize.{name}.weights", *given, of=weight_scales, label=at)
        yield row(f"quantize.{name}.levels", scales, config, of=weight_scales, label=at)
        for function in ("activations", "activation_levels"):
            yield row(f"quantize.{name}.{function}", scales, config, of=of, label=at)
    yield row("quantize.lsq_plus.round_offsets", scales, config, of=of, label=at)
    quantised, levels = q.ptq.weights(s.params, None, config), q.ptq.levels(s.params, config)
    yield row("quantize.integers.of", quantised, levels, config, of=of, label=at)
    weight = q.integers.of(quantised, levels, config)["a:weight"]
    of |= {"weight": kinds.of_type(q.integers.IntegerWeight, words=("weight",))}
    yield row("quantize.integers.pack", weight, of=of, label=at)
    yield from _folding(s, at)


def _observers(
    s: Side, at: str, of: dict[str, Kind], config: Any, seen: dict[str, Any]
) -> Iterator[Call]:
    module = find("quantize.observers")
    state = module.update(module.init(s.params, config), seen, config)
    of = of | {name: _by_site() for name in ("state", "a", "b")}
    yield row("quantize.observers.init", s.params, config, "min_max", of=of, label=at)
    yield row("quantize.observers.watch", state, config, of=of, label=at)
    yield row("quantize.observers.update", state, seen, config, of=of, label=at)
    yield row("quantize.observers.merge", state, state, of=of, label=at)
    loose = of | {"state": _by_site(missing="either")}
    yield row("quantize.observers.ranges", state, 1.0, of=loose, label=at)


def _folding(s: Side, at: str) -> Iterator[Call]:
    arrays = {n: s.array(np.ones(6, np.float32)) for n in ("scale", "offset", "mean", "variance")}
    weight = s.array(np.ones((4, 6), np.float32))
    of = {n: _floats() for n in ("weight", *arrays)} | {"bias": _floats(optional=True)}
    of |= {"out_axis": integer(-2, 1), "epsilon": real(0, np.inf, high_in=False)}
    given = (weight, None, *arrays.values(), 1, 1e-5)
    yield row("quantize.fold_batch_norm", *given, of=of, label=at)
    statistics = s.of({"n.mean": np.zeros(6), "n.var": np.ones(6)})
    norm = pp.quantize.BatchNorm("n", s.layers[0], "n.w", "n.b", "n.mean", "n.var", 1e-5)
    refuse = tuple(v for v in kinds.VALUES if v not in ("nan", "none", "shape"))
    of = {"params": kinds.arrays("a.w", refuse=refuse, words=("norm",))}
    of |= {"statistics": kinds.arrays("n.mean", refuse=refuse, words=("statistic", "norm"))}
    rows = [Wrong("a name", ["n"], "refuse"), Wrong("alone", norm, "refuse")]
    of |= {
        "norms": Kind(("norm",), lambda x: "either" if _no_rows(x) else "refuse", lambda x: rows)
    }
    yield row("quantize.fold_batch_norms", s.params, statistics, [norm], of=of, label=at)


def _no_rows(x: Any) -> bool:
    return (_is_empty(x) and x is not None) or getattr(x, "shape", None) == (0,)


def _has_leaf(x: Any) -> bool:
    return inspect.isgenerator(x) or bool(jax.tree.leaves(x))


def _floats(*, optional: bool = False) -> Kind:
    """An array of floats, of any shape."""

    def judge(x: Any) -> kinds.Fate:
        if x is None:
            return "either" if optional else "refuse"
        return "either" if "float" in str(getattr(x, "dtype", "")) else "refuse"

    return Kind(("array", "float", "shape"), judge)


def _scale_of(*, optional: bool = False) -> Kind:
    """A scale: a number or an array of them."""
    arrays = _floats(optional=optional)

    def judge(x: Any) -> kinds.Fate:
        return "either" if _is_number(x) else arrays.judge(x)

    return Kind(("scale", "offset"), judge)


def _is_number(x: Any) -> bool:
    kinds = ("int", "float")
    known = isinstance(x, int | float) or any(k in str(getattr(x, "dtype", "")) for k in kinds)
    return known and not isinstance(x, bool)


def _by_site(*, missing: kinds.Fate = "refuse", site: str = "a:input") -> Kind:
    """A mapping by site, of which what is at ``site`` is used."""

    def more(good: Any) -> Iterator[Wrong]:
        yield Wrong("missing", {k: v for k, v in good.items() if k != site}, missing)
        for label, value in {"None": None, "text": "text", "5": 5, "{}": {}}.items():
            yield Wrong(f"{site}: {label}", {**good, site: value}, "refuse")

    def judge(x: Any) -> kinds.Fate:
        return missing if isinstance(x, dict) and not x else "refuse"

    return Kind(("site", "range", "scale", "state", "level", "seen", "observer"), judge, more)


def _optional(kind: Kind) -> Kind:
    return Kind(kind.words, lambda x: "either" if x is None else kind.judge(x), kind.more)


def _like() -> Kind:
    refuse = ("text", "number", "object", "numpy objects", "bool", "int", "complex")
    inner = kinds.arrays("a.w", refuse=(*refuse, "shape", "rank", "0-d", "empty"))

    def more(good: Any) -> Iterator[Wrong]:
        for wrong in inner.more(good["p"]):
            yield wrong._replace(value={"p": wrong.value})

    def judge(x: Any) -> kinds.Fate:
        # An empty dict takes all that the file has.
        return "either" if isinstance(x, dict) and not x else "refuse"

    return Kind(("run", "state", "leaf"), judge, more)


def _layers(s: Side) -> Iterator[Call]:
    at, axes = f" [{s.name}]", _axes()
    of = _kinds(s, params=kinds.arrays("a.w", refuse=("text", "number", "list", "object", "0-d")))
    of |= {"weight": _known(), "type": kinds.text(), "name": kinds.text(optional=True)}
    of |= {"out_axes": axes, "in_axes": axes, "stack_axes": axes, "output_axes": _optional(axes)}
    of |= {"groups": integer(1), "grouped": choice("in", "out"), "bias": _optional(_known())}
    good = ("a.w", "Linear", "a", 1, 0, (), 1, "in", "a.b", (-1,))
    yield row("make_layer", s.params, *good, of=of, label=at)


def _known() -> Kind:
    return Kind(("path", "param", "bias", "weight"), lambda x: "refuse")


def _axes(*, number: bool = True) -> Kind:
    """Axes of a matrix, a number too if ``number``; one that does not fit is a clear error."""

    def judge(x: Any) -> kinds.Fate:
        if isinstance(x, range | int | np.integer) and not isinstance(x, bool):
            return "either" if number or isinstance(x, range) else "refuse"
        scalar = getattr(x, "shape", None) == () and "int" in str(getattr(x, "dtype", ""))
        if number and scalar:
            return "either"
        return "either" if _whole(x) else "refuse"

    def more(good: Any) -> Iterator[Wrong]:
        for wrong in ((0.5,), (True,), ("0",), (None,), (0, 0)):
            yield Wrong(repr(wrong), wrong, "refuse")
        yield Wrong("(5,)", (5,), "either")  # the output may have more axes than the weight

    return Kind(("ax",), judge, more)


def _numbers(s: Side) -> Iterator[Call]:
    optional = functools.partial(integer, optional=True)
    of = {"begin_step": optional(0, 9), "end_step": optional(1), "frequency": optional(1)}
    of |= {"initial_sparsity": real(0, 1, optional=True), "steps_per_epoch": integer(1)}
    of |= {"step": integer(0)}
    # A table holds its events: of many it takes long, and too many are refused.
    last = Kind(("step", "events"), integer(0, 10**6 - 1).judge)
    ending = {"last": last, "frequency": optional(1)}
    for name in ("linear", "agp", "cosine", "exponential"):
        yield row(name, 1, 9, 2, 0.1, 1, of=of)

        def begun(last: Any, frequency: Any, name: str = name) -> Any:
            return called(name, 0, last, frequency).init(s.config)

        yield row(begun, 9, 2, of=ending, label=f"{name}(...).init")
    yield row("one_shot", 0, of=of)
    of = {"events": kinds.function(called=False, words=("events",))}
    yield row("Schedule", lambda pool, final: [(0, final)], of=of)
    yield from _bad_events(s)
    yield row("count_of", 0.5, 10, of={"sparsity": real(0, 1), "n": integer(0, 10**30)})
    yield row("NM", 2, 4, of={"keep": integer(1, 3), "of": integer(3, 10**500)})
    yield row("Block", (2, 2), of={"shape": _sizes(least=1)})
    yield row("invert_scores", pp.level, of=_kinds(s))


def _bad_events(s: Side) -> Iterator[Call]:
    for label, events in {
        "none": [],
        "None": None,
        "5": 5,
        "fractional steps": [(0.5, 0.1), (1.9, 0.5)],
        "descending": [(2, 0.1), (1, 0.5)],
        "step '1'": [("1", 0.5)],
        "step True": [(True, 0.5)],
        "step 2**31": [(2**31, 0.5)],
        "step -1": [(-1, 0.5)],
        "step nan": [(np.nan, 0.5)],
        "step None": [(None, 0.5)],
        "sparsity 'x'": [(1, "x")],
        "sparsity 2": [(1, 2.0)],
        "sparsity nan": [(1, np.nan)],
        "sparsity None": [(1, None)],
        "no pairs": [1, 2],
        "triples": [(1, 2, 3)],
        "names": ["ab"],
    }.items():
        init = find("Schedule")(lambda pool, final, events=events: events).init
        of = {"config": _broken("event", "step", "sparsity")}
        yield row(init, s.config, of=of, label=f"Schedule(events {label}).init", works=False)


def _sizes(*, least: int) -> Kind:
    def judge(x: Any) -> kinds.Fate:
        return "either" if _whole(x, least) else "refuse"

    def more(good: Any) -> Iterator[Wrong]:
        for wrong in ((True, 6), (4.0, 6), (-4, 6), ("4", 6), (None, 6)):
            yield Wrong(repr(wrong), wrong, "refuse")

    return Kind(("shape", "block", "axes"), judge, more)


def _rules(s: Side) -> Iterator[Call]:
    axes = _axes(number=False)
    strings = Kind(("alias",), lambda x: "either" if _is_empty(x) and x is not None else "refuse")
    of = dict.fromkeys(("name", "type", "weight", "class_name"), kinds.text())
    of |= {"shape": _sizes(least=0), "bias": kinds.text(optional=True), "aliases": strings}
    of |= {"out_axes": axes, "in_axes": axes, "stack_axes": axes, "output_axes": _optional(axes)}
    of |= {"groups": integer(1), "grouped": choice("in", "out")}
    good = ("a", "Linear", "a.w", (4, 6), (1,), (0,), (), 1, "in", None, "Linear", (), (-1,))
    yield row("Layer", *good, of=of)
    of = _kinds(
        s, rules=_rule_list(), scope=choice("layer", "global"), bias=choice("follow", "keep")
    )
    of |= {"granularity": Kind(("granularity",), lambda x: "either" if x is None else "refuse")}
    of |= {"coupling": Kind(("coupl",), lambda x: "good" if x is None else "refuse")}
    yield row("resolve", s.rules, s.layers, "layer", "element", "follow", None, of=of)
    of |= {"coupling": _optional(_coupling()), "extra": choice("own", "none", None)}
    of |= {"cost": choice(None), "per_cost": flag(), "round_to": integer(1, 3)}
    of |= {"min_channels": integer(1, 6)}
    good = ("layer", None, "follow", coupling(), "own", None, False, 1, 1)
    yield row("resolve", s.coupled_rules, s.layers, *good, of=of, label=" coupled")
    name = Kind(("name",), lambda x: "refuse")
    of = _kinds(s, name=name, config_list=_rule_list(), steps_per_epoch=integer(1))
    of |= {"pruning_algorithm": Kind(("algorithm",), lambda x: "refuse")}
    of |= {"total_iteration": integer(0, optional=True), "mode": choice(None, "normal")}
    yield row("from_nni", "agp", s.rules, s.layers, "l1", 3, 1, None, of=of)
    rule = {"quant_types": ["weight", "input"], "quant_bits": 8, "op_types": ["Linear"]}
    # Nothing selects nothing, with a warning, which the tests take for an error.
    of = {"rules": Kind(("rule",), lambda x: "either" if _is_empty(x) else "refuse")}
    of |= {"layers": kinds.layers(), "activations": kinds.layers()}
    yield row("resolve_quantization", [rule], s.layers, [], of=of)


def _rule_list() -> Kind:
    def judge(x: Any) -> kinds.Fate:
        number = isinstance(x, int | float) and not isinstance(x, bool)
        if number or getattr(x, "shape", None) in ((), (0,)):
            return "either"  # a sparsity alone may be a rule, and no rules are rules
        return "either" if _is_empty(x) and x is not None else "refuse"

    def more(good: Any) -> Iterator[Wrong]:
        rule = dict(good[0])
        selector = next(key for key in rule if key.startswith("op_"))
        for label, value in kinds.junk().items():
            if label == "generator":
                continue
            fates = {
                "sparsity": real(0, 1, high_in=False).judge(value),
                selector: "refuse",
                "start_epoch": integer(0).judge(value),
                "max_sparsity_per_layer": "refuse",
                "prune_iterations": integer(1).judge(value),
                "units": "refuse",
                "nonsense": "refuse",
            }
            for key, fate in fates.items():
                yield Wrong(f"{key} {label}", [{**rule, key: value}], fate)
            fate = "either" if isinstance(value, bool) else "refuse"
            alone = [{selector: rule[selector], "exclude": value}]
            yield Wrong(f"exclude {label}", alone, fate)
        yield Wrong("a rule alone", rule, "either")
        yield Wrong("key 5", [{**rule, 5: 1}], "refuse")
        yield Wrong("key None", [{**rule, None: 1}], "refuse")

    return Kind(("rule", "sparsity", "op_types", "config_list"), judge, more)


def _search(s: Side) -> Iterator[Call]:
    of = _kinds(s, config=_config(s, model=False), optimize_mode=choice("maximize", "minimize"))
    of |= {"start_temperature": real(20, np.inf, high_in=False)}
    of |= {"stop_temperature": real(0, 100, low_in=False)}
    of |= {"cool_down_rate": real(0, 1, low_in=False, high_in=False)}
    of |= {"perturbation_magnitude": _POSITIVE}
    of |= {"scale": real(0, np.inf, low_in=False, high_in=False, optional=True)}
    of |= {"max_proposals": integer(1, 2**31), "problem": of["config"]}
    yield row("search.annealing", s.config, "maximize", 100.0, 20.0, 0.9, 0.35, None, 1000, of=of)
    search = find("search.annealing")(s.config)
    state, _ = search.propose(search.init(jax.random.key(0)))
    of_score = real(-3e38, 3e38)
    of = {"key": kinds.typed_key()}
    of |= {"state": kinds.structure(type(state), words=("state", "annealing"))}
    of["scores"] = Kind((), lambda x: "either" if isinstance(x, float) else of_score.judge(x))
    yield row(search.init, jax.random.key(0), of=of, label="annealing.init")
    yield row(search.accept, state, 0.5, of=of, label="annealing.accept")
    yield row(search.accept, state, np.float32(0.5), of=of, label="annealing.accept array")
    for name in ("propose", "best", "done"):
        yield row(getattr(search, name), state, of=of, label=f"annealing.{name}")


def _counts(s: Side) -> Iterator[Call]:
    def more(good: Any) -> Iterator[Wrong]:
        for label, value in kinds.junk().items():
            array = "int" in str(getattr(value, "dtype", ""))
            fate: kinds.Fate = "either" if array else integer(0, 12, optional=True).judge(value)
            yield Wrong(f"'a': {label}", {**good, "a": value}, fate)
        yield Wrong("unknown", {**good, "z": 1}, "refuse")
        yield Wrong("missing", {"a": 1}, "refuse")

    of = {"counts": Kind(("count", "pool"), lambda x: "refuse", more), "masks": _alone()}
    of |= {"sparsity": _sparsities()}
    yield row(s.config.with_counts, {"a": 1, "b": 1}, of=of, label="Config.with_counts")
    yield row(s.config.with_sparsity, 0.5, of=of, label="Config.with_sparsity")
    yield row(s.config.with_masks, s.masks, of=of, label="Config.with_masks")


def _transforms(s: Side) -> Iterator[Call]:
    keep_pruned, on_schedule = find("keep_pruned"), find("prune_on_schedule")
    no_optimizer = Kind(("inner", "optimizer", "transf"), lambda x: "refuse")
    of = _kinds(s, masks=_alone(), inner=_optional(no_optimizer))
    of |= {"config": _config(s, model=False, counts=False)}
    of |= {"schedule": kinds.of_type(pp.Schedule, words=("schedule",))}
    yield row("keep_pruned", s.masks, optax.sgd(0.1), of=of)
    schedule = called("linear", 0, 4)
    yield row("prune_on_schedule", pp.level, schedule, s.config, None, s.masks, of=of)
    used = (*kinds.NEVER, "none")
    arrays = {"params": kinds.arrays("a.w", refuse=used, words=("param",))}
    arrays |= {"updates": kinds.arrays("a.w", refuse=used, words=("update",))}
    other = keep_pruned({"x": jnp.ones((1,), bool)}).init({"x": jnp.ones(1)})
    for label, tx in {
        "keep_pruned": keep_pruned(s.masks),
        "keep_pruned(sgd)": keep_pruned(s.masks, optax.sgd(0.1, momentum=0.9)),
        "prune_on_schedule": on_schedule(pp.level, schedule, s.config),
    }.items():
        state, words = tx.init(s.params), ("state", "keep_pruned", "prune_on_schedule", "schedule")
        fate: kinds.Fate = "either" if label == "keep_pruned" else "refuse"
        stranger = ("of another", other, fate)
        # What is inside of the other optimizer's state is its own matter.
        fields = [field for field in state._fields if field != "inner"]
        of_state = kinds.structure(type(state), stranger, words=words, fields=fields, nested=False)
        begun = kinds.params("a.w", uses="shapes")
        # Optax asks for states of no parameters.
        begun = Kind(begun.words, lambda x: "either" if _holds_nothing(x) else "refuse", begun.more)
        yield row(tx.init, s.params, of={"params": begun}, label=f"{label}.init")
        of = arrays | {"state": of_state}
        yield row(tx.update, s.grads, state, s.params, of=of, label=f"{label}.update")
    for label, pruner in _bad_pruners():
        tx = on_schedule(pruner, pp.one_shot(), s.config)
        of = {"updates": _broken("pruner", "mask"), "state": _GOOD, "params": _GOOD}
        given, name = (s.grads, tx.init(s.params), s.params), f"prune_on_schedule, {label}"
        if label != "returns {}":
            yield row(tx.update, *given, of=of, label=name, works=False)
    of = _options_of_sparse_training(s) | {"inner": no_optimizer}
    options = (s.config, optax.sgd(0.1), s.masks, "random", 9, 0, 2, 0.3, "linear", 5)
    yield row("sparse_training", *options, of=of)
    state = optax.chain(optax.sgd(0.1), keep_pruned(s.masks)).init(s.params)
    of = _kinds(s, opt_state=Kind(("state",), lambda x: "refuse"))
    yield row("get_masks", state, s.params, of=of | {"params": kinds.arrays("a.w", refuse=())})
    yield row("set_masks", state, s.masks, of=of)


def _sparse(s: Side) -> Iterator[Call]:
    at = f" [{s.name}]"
    moves = Kind(("moves",), lambda x: "refuse", lambda good: [Wrong("empty", {}, "refuse")])
    of = _kinds(s, moves=moves, masks=kinds.masks("a.w", missing="either", empty="either"))
    slopes = kinds.arrays("a.w", words=("gradient",), refuse=kinds.NEVER)
    # Without gradients, connections grow at random.
    of |= {"grads": Kind(slopes.words, lambda x: "either" if x is None else "refuse", slopes.more)}
    given = (s.params, s.grads, s.masks, s.config, {"a": 2, "b": 1}, 0)
    yield row("rewire", *given, of=of, label=at)
    of |= {"decay": real(0, np.inf, high_in=False)}
    yield row("sr_ste", s.grads, s.params, s.masks, of=of, label=at)
    of |= {"config": _config(s, counts=False)}
    yield row("transposable", s.params, None, s.nm, of=of, label=at)


def _options_of_sparse_training(s: Side) -> dict[str, Kind]:
    return _kinds(
        s,
        config=_config(s, model=False),
        grow=choice("gradient", "random", "none"),
        decay=choice("cosine", "linear", "constant"),
        begin_step=integer(0, 2**31 - 1),
        end_step=integer(0, 2**31 - 1),
        every=integer(1, 2**31 - 1),
        drop_fraction=real(0, 1),
        masks=_GOOD,  # looked at by init
    )


def _holds_nothing(x: Any) -> bool:
    return _is_empty(x) or (isinstance(x, list) and x == [None])


def _plans(s: Side) -> Iterator[Call]:
    c, file = coupling(), folder() / "plan.safetensors"
    x = jnp.ones((2, 4))
    plan = find("shrink")(world.apply, s.params, s.unit_masks, c, x).report.plan
    find("save_plan")(file, plan)
    fit = ("shape", "rank", "0-d", "empty")
    arrays = kinds.arrays("a.w", refuse=fit, missing="either", words=("tree", "array"))
    of = {"tree": arrays, "path": Kind(("path", "param"), lambda x: "refuse")}
    some = Kind(arrays.words, lambda x: "either" if kinds.is_numeric(x) else "refuse", arrays.more)
    yield row(plan.apply, s.params, of=of | {"tree": some}, label="Plan.apply")
    yield row(plan.shape, "a.w", of=of, label="Plan.shape")
    of |= {"path": kinds.path(), "plan": kinds.of_type(pp.Plan, words=("plan",))}
    yield row("save_plan", folder() / "written", plan, of=of)
    yield row("load_plan", file, of=of)
    units = Kind(("unit",), lambda x: "either" if _whole(x) or isinstance(x, set) else "refuse")
    of = _kinds(s, pruned=units, params=_shapes(), sparsity=real(0, 1), scores=_scores())
    for side in sides():
        at = f" [{side.name}]"
        yield row(c.masks, [1], side.params, of=of, label="Coupling.masks" + at)
        good = (side.unit_masks, side.params, "keep")
        yield row(c.complete, *good, of=of, label="Coupling.complete" + at)
    yield row(c.removed, [1], of=of, label="Coupling.removed")
    yield row(c.cost, [1], of=of, label="Coupling.cost")
    yield row(c.lowest, np.arange(1.0, c.n_units + 1), 0.5, of=of, label="Coupling.lowest")


def _whole(x: Any, least: float = -np.inf) -> bool:
    """Whether ``x`` holds whole numbers; one that is used up by looking may do so."""
    if inspect.isgenerator(x):
        return True
    some = isinstance(x, list | tuple | range | set | dict | np.ndarray) and np.ndim(x)
    return bool(some) and all(type(n) is int and n >= least for n in x)


def structure_calls(s: Side) -> Iterator[Call]:
    x, good = jnp.ones((2, 4)), (world.apply, s.params)
    fn = Kind(("fn", "function"), lambda x: "either" if callable(x) else "refuse")
    of = _kinds(s, fn=fn, params=kinds.arrays("a.w", refuse=("other framework",)))
    of |= {"outputs": Kind(("outputs",), lambda x: "either" if isinstance(x, bool) else "refuse")}
    of |= {"plan": kinds.of_type(pp.Plan, words=("plan",))}
    yield row("count", *good, x, of=of, slow=True)
    yield row("couple", *good, x, True, of=of, slow=True)
    of |= {"params": _shapes()}
    given = (s.unit_masks, coupling(), x, "original", "keep")
    yield row("shrink", *good, *given, of=of, slow=True)
    any_coupling = {"coupling": kinds.of_type(pp.Coupling, words=("coupl",))}
    yield row("draw_coupling", coupling(), of=any_coupling, slow=True)
    yield row("coupled_layers", coupling(), s.layers, of=of | any_coupling)
    yield row("dependency_sets", coupling(), s.layers, of=of)
    small = find("shrink")(*good, s.unit_masks, coupling(), x)
    yield row("rebuild", *good, small.report.plan, x, True, "original", of=of, slow=True)
    yield row(small.fn, small.params, x, of=of, label="shrunk.fn", slow=True)


def _module(cls: type) -> Kind:
    """A module; that of another framework must be refused."""

    def more(good: Any) -> Iterator[Wrong]:
        yield Wrong("its class", type(good), "refuse")
        if isinstance(good, torch.nn.Module):
            yield Wrong("its parameters", dict(good.named_parameters()), "refuse")

    return Kind(("model", "module"), lambda x: "good" if isinstance(x, cls) else "refuse", more)


def _torch(s: Side) -> Iterator[Call]:
    where, fresh = "purepruning_interop.torch", Made(world.torch_model)
    model, x = world.torch_model(), torch.ones(2, 4)
    params, table = dict(model.named_parameters()), find(f"{where}.layers")(model)
    c = find(f"{where}.couple")(model, x)
    config = pp.resolve([{"sparsity": 0.5, "op_names": ["0"]}], table, coupling=c)
    masks = pp.l1_norm(params, None, config)
    report = find(f"{where}.shrink")(model, masks, c, x).report
    of = _kinds(s, model=_module(torch.nn.Module), masks=kinds.masks("0.weight"))
    of |= {"layers": kinds.layers(names=True), "mutable": flag(), "zero_moments": flag()}
    of |= {"params": _torch_params(params), "plan": kinds.of_type(pp.Plan, words=("plan",))}
    of |= {"outputs": Kind(("outputs",), lambda x: "either" if isinstance(x, bool) else "refuse")}
    of |= {"args": _GOOD, "optimizer": Kind(("optimizer",), lambda x: "refuse")}
    yield row(f"{where}.layers", fresh, of=of)
    yield row(f"{where}.couple", fresh, x, True, of=of, slow=True)
    yield row(f"{where}.count", fresh, x, of=of, slow=True)
    yield row(f"{where}.capture", fresh, x, ["0"], None, False, of=of)
    yield row(f"{where}.activations", fresh, of=of)
    yield row(f"{where}.batch_norms", fresh, x, of=of, slow=True)
    yield row(f"{where}.replace", fresh, x, {"0:input": _looks}, None, False, of=of | {"at": _AT})
    yield row(f"{where}.apply_", fresh, masks, of=of, changes=True)
    yield row(f"{where}.masked_call", fresh, masks, x, None, of=of)
    sgd = Made(lambda: torch.optim.SGD(model.parameters(), lr=0.1))
    yield row(f"{where}.keep_pruned", model, masks, sgd, False, of=of, changes=True)
    plain = pp.resolve(0.5, table)
    options = {"grow": "random", "end_step": 9, "every": 2, "key": 5}
    options["masks"] = pp.random_pruning(params, 5, plain)
    moved = {**_options_of_sparse_training(s), **{n: of[n] for n in ("model", "optimizer")}}
    # Its layers are those of the model: of another's the masks have none.
    moved["config"] = _config(s)
    moved["model"] = Kind(("model", "module"), of["model"].judge)  # or its parameters
    given = (model, plain, sgd, options)
    yield row(f"{where}.sparse_training", *given, of=moved, changes=True)
    yield row(f"{where}.shrink", fresh, masks, c, x, "original", "keep", of=of, slow=True)
    yield row(f"{where}.rebuild", fresh, report.plan, x, "original", of=of, slow=True)
    none = pp.quantize.QuantizationConfig()
    of_none = {"weights": _ANY_MAPPING, "levels": _ANY_MAPPING, "path": _GOOD, "inputs": _GOOD}
    of_none |= {"config": kinds.of_type(pp.quantize.QuantizationConfig, words=("config",))}
    file = folder() / "model.onnx"
    yield row(f"{where}.export_onnx", fresh, file, {}, {}, none, x, of=of | of_none, slow=True)
    of_blocks = of | {"dropped": _some("dropped"), "at": kinds.text()}
    two = Made(lambda: torch.nn.Sequential(world.torch_model()))
    yield row(f"{where}.drop_blocks", two, [1], "0", of=of_blocks)
    of_blocks |= {"batches": _GOOD}
    chain = Made(lambda: torch.nn.Sequential(world.torch_model()))
    yield row(f"{where}.blocks_in_turn", chain, [x], "0", of=of_blocks)
    pruned = Made(world.torch_model_of_torch_prune)
    either = {"model": Kind(("model", "module"), lambda x: "either" if _is_empty(x) else "refuse")}
    yield row(f"{where}.masks_from_torch_prune", pruned, of=either)
    wide = {"w": torch.ones(32, 64, dtype=torch.bfloat16)}
    some = {"w": (torch.arange(64) % 4 < 2).expand(32, 64)}
    of_wide = {
        "params": Kind(("params", "masks"), lambda x: "either" if _is_empty(x) else "refuse"),
        "masks": Kind(("mask",), lambda x: "either" if _is_empty(x) else "refuse"),
        "device": Kind(("device",), lambda x: "either"),
    }
    yield row(f"{where}.to_semi_structured", wide, some, {"device": "cpu"}, of=of_wide)


def _looks(value: Any) -> Any:
    return value, None


def _bad_sites(good: Any) -> Iterator[Wrong]:
    (site,) = good
    yield Wrong("no function", {site: 3}, "refuse")
    yield Wrong("a function of no pair", {site: lambda x: x}, "refuse")
    yield Wrong("no side", {site.partition(":")[0]: _looks}, "refuse")
    yield Wrong("no layer", {"zz:input": _looks}, "refuse")
    yield Wrong("no string", {5: _looks}, "refuse")


#: Of which nothing is used.
_ANY_MAPPING = Kind(("weight", "level"), lambda x: "either")


#: Functions by site.
_AT = Kind(("at", "site", "layer"), lambda x: "either" if _is_empty(x) else "refuse", _bad_sites)


def _torch_params(params: Any) -> Kind:
    refuse = ("text", "number", "list", "object", "numpy objects", "other framework", "none")
    refuse = (*refuse, "abstract")
    inner = kinds.arrays("0.weight", refuse=refuse, missing="either", words=("param",))

    def more(good: Any) -> Iterator[Wrong]:
        for wrong in inner.more(params):
            # That a tensor does not fit is for the module itself to say.
            if wrong.label.rpartition(": ")[-1] in refuse:
                yield wrong

    return Kind(inner.words, lambda x: "either" if _is_empty(x) else "refuse", more)


def _jax(s: Side) -> Iterator[Call]:
    x, words = jnp.ones((2, 4)), ("param", "variables", "collection", "tree")
    of = _kinds(s, layers=kinds.layers(names=True), rngs=_GOOD, method=_GOOD, mutable=_GOOD)
    of |= {"variables": Kind(words, lambda x: "refuse", _bad_trees), "rng": _GOOD}
    of |= {"outputs": Kind(("outputs",), lambda x: "either" if isinstance(x, bool) else "refuse")}
    of |= {"plan": kinds.of_type(pp.Plan, words=("plan",))}
    masks = Kind(("mask",), lambda x: "either" if _holds_nothing(x) else "refuse")
    of |= {"masks": masks}
    key = jax.random.key(0)
    linen, transformed = world.Linen(), hk.transform(_haiku)
    nnx_model, keras_model = world.NNX(), world.keras_model()
    mlp = eqx.nn.MLP(4, 4, width_size=6, depth=1, key=key)
    for name, model, kind, state, inputs, layer in [
        ("linen", linen, _module(nn.Module), linen.init(key, x), x, "a"),
        ("haiku", transformed, _transformed(), transformed.init(key, x), x, "a"),
        ("nnx", nnx_model, _module(nnx.Module), nnx.state(nnx_model, nnx.Param), x, "a"),
        ("keras", keras_model, _module(keras.layers.Layer), ppk.params(keras_model), x, "a"),
        ("equinox", mlp, _module(eqx.Module), eqx.filter(mlp, eqx.is_array), x[0], "layers.0"),
    ]:
        given = (model, state) if name in ("linen", "haiku") else (model,)
        yield from _adapter(
            f"purepruning_interop.{name}", given, state, inputs, layer, of | {"model": kind}
        )
    params = Kind(words, lambda x: "either" if _holds_nothing(x) else "refuse", _bad_trees)
    of |= {"model": _module(keras.layers.Layer), "params": params}
    yield row("purepruning_interop.keras.params", keras_model, of=of)
    yield row("purepruning_interop.keras.load", keras_model, ppk.params(keras_model), of=of)
    trained = world.keras_model()
    trained.compile(ppk.KeepPruned(keras.optimizers.SGD()))
    made = {"a/kernel": np.eye(4, 6) > 0}
    yield row("purepruning_interop.keras.get_masks", trained, of=of)
    yield row("purepruning_interop.keras.set_masks", trained, made, of=of)
    shares = {name: real(0, 1) for name in ("target_sparsity", "initial_sparsity")}
    steps = {name: integer(0) for name in ("begin_step", "end_step")}
    of = shares | steps | {"final_sparsity": _GOOD, "power": _GOOD, "frequency": integer(1, np.inf)}
    yield row(
        "purepruning_interop.keras.ConstantSparsity", 0.5, 0, 8, 1, of=of | {"end_step": _GOOD}
    )
    yield row("purepruning_interop.keras.PolynomialDecay", 0.0, 0.5, 0, 8, 3.0, 1, of=of)


def _transformed() -> Kind:
    return Kind(("transform", "model"), lambda x: "refuse")


def _haiku(x: Any) -> Any:
    return hk.Linear(4, name="b")(jax.nn.relu(hk.Linear(6, name="a")(x)))


def _bad_trees(good: Any) -> Iterator[Wrong]:
    key = next(iter(good))
    for label, value in {"None": None, "text": "text", "{}": {}, "5": 5}.items():
        yield Wrong(f"{key!r}: {label}", {**good, key: value}, "refuse")
    yield Wrong("of another", {"z": good[key]}, "refuse")


def _adapter(
    where: str, model: tuple[Any, ...], params: Any, x: Any, layer: str, of: dict[str, Kind]
) -> Iterator[Call]:
    """Yields the functions that every adapter for JAX has."""
    c = find(f"{where}.couple")(*model, x)
    masks = c.masks([1, 2], params)
    plan = find(f"{where}.shrink")(*model, masks, c, x).report.plan
    yield row(f"{where}.layers", *model, x, of=of, slow=True)
    named = {"layers": [layer]}
    yield row(f"{where}.capture", *model, x, named, of=of, slow=True)
    yield row(f"{where}.activations", *model, x, of=of, slow=True)
    if not where.endswith(".keras"):
        yield row(f"{where}.batch_norms", *model, x, of=of, slow=True)
    at = {"at": {f"{layer}:input": _looks}}
    yield row(f"{where}.replace", *model, x, at, of=of | {"at": _AT}, slow=True)
    yield row(f"{where}.couple", *model, x, {"outputs": True}, of=of, slow=True)
    yield row(f"{where}.count", *model, x, of=of, slow=True)
    # What it returns is called with variables later.
    later = {**of, "variables": Kind(of["variables"].words, lambda x: "either")}
    yield row(f"{where}.function", *model, of=later)
    options = {"norms": "original", "conflicts": "keep"}
    yield row(f"{where}.shrink", *model, masks, c, x, options, of=of, slow=True)
    yield row(f"{where}.rebuild", *model, plan, x, {"norms": "original"}, of=of, slow=True)
