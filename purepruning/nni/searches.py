"""NNI's searches by its names and arguments: NetAdapt, sensitivity, annealing, AMC and others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from purepruning.arguments import fraction, instance, missing, one_of, whole_number
from purepruning.config.config import Config, Pruner
from purepruning.config.resolve import resolve
from purepruning.config.rules import Rule
from purepruning.coupling.coupling import Coupling
from purepruning.granularity import Granularity
from purepruning.layers import Layer
from purepruning.search.amc import amc
from purepruning.search.annealing import annealing
from purepruning.search.netadapt import netadapt
from purepruning.search.problem import Problem, problem
from purepruning.search.sensitivity import sensitivity_pruning
from purepruning.search.shape import Search


class SearchRecipe(NamedTuple):
    """What :func:`purepruning.from_nni` returns for a search.

    Attributes:
        pruner: ``(params, stats, config) -> masks``, which prunes by a plan.
        search: to be run by :func:`purepruning.search.run_search`.
        problem: what it is closed over.
        config: the resolved rules; ``config.with_counts(plan)`` is what the pruner takes.
        options: what NNI was told that is the caller's here, by the names used here: for
            AutoCompress ``rounds``, ``budget`` and the arguments of annealing for
            :func:`purepruning.search.auto_compress`, ``rho`` and ``admm_steps`` for ADMM.
    """

    pruner: Pruner
    search: Search
    problem: Problem
    config: Config
    options: dict[str, Any]


#: Names without underscores and "pruner" at the end.
NAMES = ("netadapt", "sensitivity", "simulatedannealing", "autocompress", "amc")

_EVALUATE = "is yours to call: evaluate in the function that run_search is given"
_FOLDER = "names files: give run_search folder=..."
_MODEL = "is not needed: give from_nni coupling=pp.couple(fn, params, inputs)"
_TUNE = "trains a model: do it in the function that run_search is given, which gets a stage"

#: Arguments that mean something else here, and what to do instead.
_REFUSED = {
    "evaluator": _EVALUATE,
    "eval_args": _EVALUATE,
    "eval_kwargs": _EVALUATE,
    "val_loader": _EVALUATE,
    "short_term_fine_tuner": _TUNE,
    "finetuner": _TUNE,
    "finetune_args": _TUNE,
    "finetune_kwargs": _TUNE,
    "trainer": _TUNE,
    "criterion": _TUNE,
    "experiment_data_dir": _FOLDER,
    "checkpoint_dir": _FOLDER,
    "output_dir": _FOLDER,
    "log_dir": _FOLDER,
    "suffix": _FOLDER,
    "debug": "prints: give run_search progress=True",
    "keep_intermediate_result": "keeps models: return them as payloads",
    "resume_sensitivity": "reads a table: give run_search the folder of the earlier run",
    "sparsity_proportion_calc": "decides by the curves: run search.sensitivity, and give what it "
    "decides to search.fitted, or the curves to search.allocate",
    "dummy_input": _MODEL,
    "model_type": _MODEL,
    "dataset": "is a name of NNI's folders: leave it out",
    "speedup": "is pp.shrink: call it with the masks of the plan",
    "rbound": "has no effect in NNI: leave it out",
    "epsilon": "has no effect in NNI: leave it out",
    "max_episode_length": "has no effect in NNI: leave it out",
    "window_length": "is 1: leave it out",
    "n_calibration_batches": "is for the refit: take inputs of so many batches, and call "
    "search.refit",
    "n_points_per_layer": "is for the refit: take so many windows, and call search.refit",
    "seed": "is a key: give jax.random.key(seed) to search.init",
    "pruning_params": "are the pruner's: call it with them",
}


class _Given:
    """The arguments of a call, taken one by one; what is left over is an error."""

    def __init__(self, name: str, arguments: Mapping[str, Any]) -> None:
        self.name, self.left, self.known = name, dict(arguments), set[str]()

    def take(self, name: str, default: Any) -> Any:
        """Returns an argument, or the default that NNI has."""
        self.known.add(name)
        return self.left.pop(name, default)

    def check(self) -> None:
        """Raises for what nobody took."""
        for name in self.left:
            if name in _REFUSED:
                raise TypeError(f"{self.name}: {name} {_REFUSED[name]}")
            message = f"{self.name}: there is no argument {name!r}"
            raise TypeError(missing(message, name, self.known))


def search_recipe(
    name: str,
    plain: str,
    rules: Sequence[Rule],
    layers: tuple[Layer, ...],
    *,
    pruner_of: Callable[[str], tuple[Pruner, Granularity]],
    coupling: Coupling | None,
    arguments: Mapping[str, Any],
) -> SearchRecipe:
    """Returns the recipe of a search by NNI's name and arguments.

    Args:
        name, plain: NNI's name, and without underscores and endings.
        rules: a config list, translated.
        layers: the layer table.
        pruner_of: from a name of NNI's to its pruner and what that prunes.
        coupling: of the model, or None.
        arguments: as NNI calls them.

    Raises:
        TypeError: an argument that there is not, or that means something else here.
        ValueError: the rules ask for several sparsities, or for none.
    """
    given = _Given(name, arguments)
    base = given.take("base_algo", None) or given.take("pruning_algorithm", None)
    default = "level" if plain == "simulatedannealing" and base is None else "l1"
    pruner, granularity = pruner_of(base or default)
    if coupling is not None and granularity != "output_channel":
        pruner, granularity = pruner_of("l1")
    named = [
        {k: v for k, v in rule.items() if k not in ("sparsity", "total_sparsity")} for rule in rules
    ]
    round_to = 1
    if plain == "amc":
        round_to = whole_number(given.take("channel_round", 8), f"{name}: channel_round", 1)
        if coupling is None:
            raise ValueError(
                f"{name} counts multiply-adds of layers by inputs and outputs; give from_nni "
                "coupling=pp.couple(fn, params, inputs)"
            )
    config = resolve(
        named,
        layers,
        granularity=granularity,
        coupling=coupling,
        extra=None if coupling is None else "none",
        round_to=round_to,
    )
    make = {
        "netadapt": _netadapt,
        "sensitivity": _sensitivity,
        "simulatedannealing": _annealing,
        "autocompress": _auto_compress,
        "amc": _amc,
    }[plain]
    resource = "weights" if coupling is None else "params"
    search, of, options = make(given, config, rules, resource)
    given.check()
    return SearchRecipe(pruner, search, of, config, options)


_Made = tuple[Search, Problem, dict[str, Any]]


def _netadapt(given: _Given, config: Config, rules: Sequence[Rule], resource: str) -> _Made:
    of = problem(config, {resource: _left(given, rules)})
    step = given.take("sparsity_per_iteration", 0.05)
    mode = given.take("optimize_mode", "maximize")
    return netadapt(of, step=step, decay=1.0, optimize_mode=mode), of, {}


def _sensitivity(given: _Given, config: Config, rules: Sequence[Rule], resource: str) -> _Made:
    of = problem(config, {resource: _left(given, rules)})
    search = sensitivity_pruning(
        of,
        per_iteration=given.take("sparsity_per_iter", 0.1),
        threshold=given.take("acc_drop_threshold", 0.05),
    )
    return search, of, {}


def _annealing(given: _Given, config: Config, rules: Sequence[Rule], resource: str) -> _Made:
    of = problem(config, {resource: _left(given, rules)})
    return annealing(of, **_annealing_options(given)), of, {}


def _auto_compress(given: _Given, config: Config, rules: Sequence[Rule], resource: str) -> _Made:
    left = _left(given, rules)
    of = problem(config, {resource: left})
    nested = dict(given.take("sa_params", {}))
    options = _annealing_options(_Given(f"{given.name}: sa_params", nested) if nested else given)
    admm = dict(given.take("admm_params", {}))
    taken = {
        "rounds": given.take("num_iterations", None) or given.take("total_iteration", 3),
        "budget": {resource: left},
        "rho": given.take("row", admm.get("row", 1e-4)),
        "admm_steps": given.take("admm_num_iterations", admm.get("iterations", 30)),
        "epochs_per_step": given.take(
            "admm_training_epochs",
            given.take("admm_epochs_per_iteration", admm.get("training_epochs", 5)),
        ),
    }
    return annealing(of, **options), of, taken | options


def _annealing_options(given: _Given) -> dict[str, Any]:
    return {
        "optimize_mode": given.take("optimize_mode", "maximize"),
        "start_temperature": given.take("start_temperature", 100.0),
        "stop_temperature": given.take("stop_temperature", 20.0),
        "cool_down_rate": given.take("cool_down_rate", 0.9),
        "perturbation_magnitude": given.take("perturbation_magnitude", 0.35),
    }


def _amc(given: _Given, config: Config, rules: Sequence[Rule], resource: str) -> _Made:
    target = given.take("target", "flops")
    one_of(f"{given.name}: target", target, ("flops", "params"))
    asked = _sparsities(rules)
    ratio = given.take("flops_ratio", None)
    left = fraction(ratio if ratio is not None else 1 - (asked or [0.5])[0], "flops_ratio")
    of = problem(config, {"macs" if target == "flops" else resource: left})
    reward = given.take("reward", "acc_reward")
    rewards = {"acc_reward": "score", "acc_flops_reward": "log_resource"}
    one_of(f"{given.name}: reward", reward, tuple(rewards))
    inner = given.take("ddpg_params", {})
    instance(inner, Mapping, f"{given.name}: ddpg_params", "a mapping")
    agent = _Given(f"{given.name}: ddpg_params", inner) if inner else given
    hidden = agent.take("hidden1", 300)
    if agent.take("hidden2", hidden) != hidden:
        raise ValueError(f"{given.name}: hidden1 and hidden2 must be equal; give one width")
    hyper = {
        "hidden": hidden,
        "memory": agent.take("rmsize", 100) * len(config.pools),
        "batch": agent.take("bsize", 64),
        "critic_rate": agent.take("lr_c", 1e-3),
        "actor_rate": agent.take("lr_a", 1e-4),
        "tau": agent.take("tau", 0.01),
        "discount": agent.take("discount", 1.0),
        "warmup": agent.take("warmup", 100),
        "sigma": agent.take("init_delta", 0.5),
        "sigma_decay": agent.take("delta_decay", 0.99),
    }
    if agent is not given:
        agent.check()
    episodes = given.take("train_episode", None) or given.take("total_episode", 800)
    lower = given.take("lbound", 0.2)
    search = amc(
        of,
        episodes=episodes,
        reward=rewards[reward],  # type: ignore[arg-type]
        lower=lower,
        hyper=hyper,
    )
    return search, of, {}


def _sparsities(rules: Sequence[Rule]) -> list[float]:
    found = [rule.get("total_sparsity", rule.get("sparsity")) for rule in rules]
    return sorted({float(s) for s in found if s is not None})


def _left(given: _Given, rules: Sequence[Rule]) -> float:
    """Returns the fraction that is left at the sparsity of the rules."""
    some = _sparsities(rules)
    if len(some) != 1:
        raise ValueError(
            f"{given.name} takes one sparsity, that of all layers together, and the rules name "
            f"{some or 'none'}; give all rules the same"
        )
    return 1 - fraction(some[0], f"{given.name}: sparsity")
