"""NNI's names: what its pruners and schedules are called here."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, overload

from purepruning.arguments import missing, one_of, strings, whole_number
from purepruning.config.config import Config, Pruner
from purepruning.config.resolve import resolve
from purepruning.config.rules import Rule, Scope
from purepruning.coupling.coupling import Coupling
from purepruning.granularity import Granularity
from purepruning.layers import Activation, Layers, checked_table
from purepruning.nni.config_list import translate
from purepruning.nni.searches import NAMES, SearchRecipe, search_recipe
from purepruning.pruners.activation import apoz_rank, mean_activation_rank
from purepruning.pruners.geometric_median import fpgm
from purepruning.pruners.magnitude import l1_norm, l2_norm, level
from purepruning.pruners.slimming import slim
from purepruning.pruners.taylor import taylor_fo
from purepruning.quantize import bnn, dorefa, lsq, lsq_plus, naive, ptq, qat
from purepruning.quantize.config import QuantizationConfig, resolve_quantization
from purepruning.schedules.curves import agp, exponential, linear, one_shot
from purepruning.schedules.schedule import MOST_EVENTS, Schedule
from purepruning.training import admm


class _Base(NamedTuple):
    """A pruner, and what it prunes in NNI."""

    pruner: Pruner
    granularity: Granularity = "output_channel"
    scope: Scope = "layer"

    def consistent(self) -> _Base:
        """Returns what NNI 3.0 does: its Level sums magnitudes over larger units."""
        by_norm = self.pruner is level and self.granularity != "element"
        return self._replace(pruner=l1_norm) if by_norm else self


# By name without underscores, "pruner" and "filter" at the end: NNI's own names in its documents,
# those of its classes in version 1 and 2, and auptimizer's.
_BASES = {
    "level": _Base(level, "element"),
    "l1": _Base(l1_norm),
    "l2": _Base(l2_norm),
    "fpgm": _Base(fpgm),
    "slim": _Base(slim, scope="global"),
    "taylorfo": _Base(taylor_fo),
    "apoz": _Base(apoz_rank),
    "meanactivation": _Base(mean_activation_rank),
    "admm": _Base(functools.partial(admm.masks, pruner=level), "element"),
}


_BASES |= {
    "l1norm": _BASES["l1"],
    "l2norm": _BASES["l2"],
    "taylorfoweight": _BASES["taylorfo"],
    "taylor": _BASES["taylorfo"],
    "activationapozrank": _BASES["apoz"],
    "activationmeanrank": _BASES["meanactivation"],
}


# What NNI calls a pruner and is something else here, or is not here.
_ELSEWHERE = {
    "movement": "is trained like parameters: use pp.movement",
    "transformerhead": "is any pruner of coupled channels: use pp.resolve(..., coupling=...), by "
    "which attention loses whole heads",
}

_QUANTIZERS = {
    "naive": naive,
    "qat": qat,
    "dorefa": dorefa,
    "bnn": bnn,
    "lsq": lsq,
    "lsqplus": lsq_plus,
    "ptq": ptq,
    "observer": ptq,
}

#: NNI's quantizers, as type checkers know them; in any case.
QuantizerName = Literal[
    "naive",
    "qat",
    "dorefa",
    "bnn",
    "lsq",
    "lsq_plus",
    "ptq",
    "observer",
    "NaiveQuantizer",
    "QAT_Quantizer",
    "QATQuantizer",
    "DoReFaQuantizer",
    "BNNQuantizer",
    "LsqQuantizer",
    "LsqPlusQuantizer",
    "PTQQuantizer",
    "ObserverQuantizer",
]


_SCHEDULED = ("linear", "agp", "lotteryticket")


class Recipe(NamedTuple):
    """What :func:`from_nni` returns: all that a training loop needs to prune.

    Attributes:
        pruner: ``(params, stats, config) -> masks``.
        schedule: when to prune and how much.
        config: the resolved rules.
    """

    pruner: Pruner
    schedule: Schedule
    config: Config


class QuantizerRecipe(NamedTuple):
    """What :func:`from_nni` returns for a quantizer.

    Attributes:
        quantizer: its module, such as ``purepruning.quantize.qat``.
        config: the resolved rules.
    """

    quantizer: Any
    config: QuantizationConfig


_Search = Literal["netadapt", "sensitivity", "simulatedannealing", "auto_compress", "amc"]


@overload
def from_nni(  # type: ignore[overload-overlap]
    name: QuantizerName,
    config_list: Iterable[Rule],
    layers: Layers,
    *,
    activations: Iterable[Activation] = (),
) -> QuantizerRecipe: ...


@overload
def from_nni(
    name: _Search, config_list: Iterable[Rule], layers: Layers, **arguments: Any
) -> SearchRecipe: ...


@overload
def from_nni(
    name: str, config_list: Iterable[Rule], layers: Layers, **arguments: Any
) -> Recipe: ...


def from_nni(
    name: str,
    config_list: Iterable[Rule],
    layers: Layers,
    *,
    pruning_algorithm: str | None = None,
    total_iteration: int | None = None,
    steps_per_epoch: int = 1,
    mode: Literal["normal", "dependency_aware", "global"] | None = None,
    coupling: Coupling | None = None,
    extra: Literal["own", "none"] | None = None,
    activations: Iterable[Activation] = (),
    **arguments: Any,
) -> Recipe | SearchRecipe | QuantizerRecipe:
    """Returns pruner, schedule and config for what one of NNI's pruners is told.

    For a quantizer (``"naive"``, ``"qat"``, ``"dorefa"``, ``"bnn"``, ``"lsq"``,
    ``"lsq_plus"``, ``"ptq"`` or ``"observer"``, or the name of its class) it returns its module in
    :mod:`purepruning.quantize`, and the config of :func:`purepruning.resolve_quantization`.

    ``name`` is a pruner as its documents, its classes or auptimizer call it, in any case:

    - ``"level"``, ``"l1"``, ``"L1NormPruner"``, ``"l1_filter"``, ``"fpgm"``, ``"slim"``,
      ``"taylorfo"``, ``"apoz"``, ``"activation_mean_rank_filter"``, ``"admm"``, ...: pruned once,
      at step 0;
    - ``"linear"`` and ``"agp"``: gradually, by ``pruning_algorithm``: as the rules' gradual keys
      say, or in ``total_iteration`` steps;
    - ``"lottery_ticket"``: to step i belongs the count after round i, of ``total_iteration`` or the
      rules' ``prune_iterations``; at step 0 nothing is pruned. :func:`purepruning.lottery` does
      the rounds.

    ``"netadapt"``, ``"sensitivity"``, ``"simulatedannealing"``, ``"auto_compress"`` and ``"amc"``
    are searches. They take NNI's arguments by its names, and those that mean something else here
    are refused with what to do instead; what is returned is a
    :class:`purepruning.nni.searches.SearchRecipe`, whose budget is what is left at the rules'
    sparsity: of the whole model's parameters with a coupling, of the selected weights without.

    Level and ADMM prune single weights, the others output channels; Slim ranks the channels of all
    layers together. Those that need statistics take them as ever, when they prune; ADMM takes what
    :func:`purepruning.training.admm.step` returned last.

    A ``config_list`` may be of any generation. One of NNI 3.0 (``sparse_ratio``,
    ``exclude_op_names``, ``target_settings``, ``global_group_id``, ...) says by itself what a unit
    is, how layers are ranked and whether biases are pruned; of entries that select a layer the
    first counts, as there. Its channels are those of the layer whatever axis they lie on, where NNI
    takes the first (the words of an embedding); Level prunes channels and blocks by their L1 norm.

    Args:
        name: NNI's name.
        config_list: the rules.
        layers: the layer table.
        pruning_algorithm: name of the pruner that a schedule (unless given, ``"level"``) or a
            search prunes by.
        total_iteration: number of steps of a schedule, where the rules do not say.
        steps_per_epoch: as in :func:`purepruning.agp`.
        mode: ``"global"``, of Taylor pruning, ranks the channels of all layers together.
            ``"dependency_aware"`` prunes coupled channels together, for the pruners of output
            channels but Slim; ``"normal"`` does not. Unless given, it does if there is a coupling.
        activations: for quantizers, rows of an adapter's ``activations``.
        coupling, extra: for that mode, as in :func:`purepruning.resolve`. NNI's documents describe
            ``extra="own"``; from 2.9 on its code does ``extra="none"``.

        **arguments: of a search, by NNI's names.

    Raises:
        KeyError: there is no such pruner; the message names what does its work here.
        TypeError: an argument of a search that there is not, or that means something else here.
        ValueError, TypeError: a mistake in the rules, as in :func:`purepruning.resolve`.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> params = {"fc": jnp.arange(8.0).reshape(2, 4)}
    >>> layers = [pp.make_layer(params, "fc", "Linear", name="fc", out_axes=1, in_axes=0)]
    >>> rules = [{"sparsity": 0.5, "op_types": ["Linear"]}]
    >>> pruner, schedule, config = from_nni("L1FilterPruner", rules, layers)
    >>> pruner(params, None, config)["fc"].tolist()
    [[False, False, True, True]]
    """
    plain = _plain("name", name)
    if plain in NAMES:
        return _search(name, plain, config_list, layers, coupling, pruning_algorithm, arguments)
    if arguments:
        raise TypeError(
            f"from_nni: {name!r} takes no argument {next(iter(arguments))!r}; only searches take "
            "NNI's further arguments"
        )
    if plain.removesuffix("quantizer") in _QUANTIZERS:
        quantization = resolve_quantization(config_list, layers, activations)
        return QuantizerRecipe(_QUANTIZERS[plain.removesuffix("quantizer")], quantization)
    if tuple(activations):
        raise ValueError(f"from_nni: activations are for quantizers, and {name!r} is a pruner")
    base = _base("name", name) if plain not in _SCHEDULED else None
    if base is None:
        strings(pruning_algorithm, "from_nni: pruning_algorithm", optional=True)
        told = "level" if pruning_algorithm is None else pruning_algorithm
        base = _base("pruning_algorithm", told)
    one_of("mode", mode, (None, "normal", "dependency_aware", "global"))
    if mode == "global":
        if base.pruner is not taylor_fo or coupling is not None:
            raise ValueError(
                f"mode 'global' is of Taylor pruning without a coupling, and not of {name!r}; for "
                "others give resolve scope='global'"
            )
        base = base._replace(scope="global")
    table = checked_table(layers)
    said = translate(config_list, table)
    base = _Base(
        base.pruner, said.granularity or base.granularity, said.scope or base.scope
    ).consistent()
    if said.coupled is not None and coupling is None:
        raise ValueError(
            f"rule {said.coupled}: dependency_group_id and internal_metric_block are for coupled "
            "channels; give from_nni coupling=pp.couple(fn, params, inputs), which finds the groups"
        )
    aware = coupling is not None if mode is None else mode == "dependency_aware"
    if aware and (base.granularity != "output_channel" or base.scope != "layer"):
        raise ValueError(
            f"{name!r} has no dependency-aware mode: it does not prune the output channels of "
            "single layers"
        )
    if aware and coupling is None:
        raise ValueError(
            "mode 'dependency_aware' needs coupling=pp.couple(fn, params, inputs); NNI asks for a "
            "dummy_input there"
        )
    if not aware and (coupling is not None or extra is not None):
        raise ValueError("coupling and extra have a meaning with mode='dependency_aware' only")
    if total_iteration is not None:
        whole_number(total_iteration, "from_nni: total_iteration", 1, MOST_EVENTS)
    config = resolve(
        said.rules,
        table,
        scope=base.scope,
        granularity=base.granularity,
        bias=said.bias or "follow",
        coupling=coupling,
        extra=extra,
    )
    if plain == "lotteryticket":
        asked = {pool.prune_iterations for pool in config.pools} - {None}
        end = total_iteration if not asked else asked.pop()
        schedule = exponential(end_step=end)
    elif plain in _SCHEDULED:
        kind = {"linear": linear, "agp": agp}[plain]
        schedule = kind(end_step=total_iteration, steps_per_epoch=steps_per_epoch)
    else:
        schedule = one_shot()
    return Recipe(base.pruner, schedule, config)


def _search(
    name: str,
    plain: str,
    config_list: Iterable[Rule],
    layers: Layers,
    coupling: Coupling | None,
    pruning_algorithm: str | None,
    arguments: Mapping[str, Any],
) -> SearchRecipe:
    """Returns the recipe of a search; a ``pruning_algorithm`` is what it prunes by."""
    table = checked_table(layers)
    if pruning_algorithm is not None:
        arguments = {"pruning_algorithm": pruning_algorithm, **arguments}

    def pruner_of(given: str) -> tuple[Pruner, Granularity]:
        base = _base("base_algo", given)
        return base.pruner, base.granularity

    return search_recipe(
        name,
        plain,
        translate(config_list, table).rules,
        table,
        pruner_of=pruner_of,
        coupling=coupling,
        arguments=arguments,
    )


def _base(argument: str, name: str) -> _Base:
    plain = _plain(argument, name)
    if plain.removesuffix("quantizer") in _ELSEWHERE:
        raise KeyError(f"{argument}: {name!r} {_ELSEWHERE[plain.removesuffix('quantizer')]}")
    if plain.removesuffix("quantizer") in _QUANTIZERS:
        raise KeyError(f"{argument}: {name!r} is a quantizer, and prunes nothing; name a pruner")
    if plain not in _BASES:
        message = f"{argument}: there is no pruner {name!r}"
        raise KeyError(missing(message, plain, [*_BASES, *_SCHEDULED, *_QUANTIZERS]))
    return _BASES[plain]


def _plain(argument: str, name: str) -> str:
    if not isinstance(name, str):
        raise TypeError(f"{argument} must be one of NNI's names, got {name!r}")
    return name.lower().replace("_", "").removesuffix("pruner").removesuffix("filter")
