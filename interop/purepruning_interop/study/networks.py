"""What a study computes: trained networks, their statistics, and what pruning makes of them.

Functions of a task and of numbers, for a block of seeds. Of a task that can be traced a block is
one compiled call, ``vmap`` over its seeds and over all sparsities; of others a loop over both. What
comes back is NumPy's, ``(seeds, sparsities, ...)``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

import purepruning as pp
from purepruning.masks import to_numpy
from purepruning.trees import flatten
from purepruning_interop.study.criteria import CRITERIA, Method
from purepruning_interop.study.statistics import steps_of
from purepruning_interop.tasks import Task


class Outcomes(NamedTuple):
    """What a method makes of the networks of some seeds.

    Attributes:
        pruned, tuned: scores, ``(seeds, sparsities)``: as pruned, and after fine-tuning.
        kept: weights that are left of each layer of the task, ``(seeds, sparsities, layers)``.
    """

    pruned: np.ndarray
    tuned: np.ndarray
    kept: np.ndarray


class Networks(Protocol):
    """How networks of several seeds are made and pruned; the networks are a list of params."""

    def train(self, seeds: Sequence[int]) -> list[Any]:
        """Returns the trained params of each seed."""

    def score(self, networks: Sequence[Any]) -> np.ndarray:
        """Returns the score of each network."""

    def statistics(
        self, networks: Sequence[Any], config: pp.Config, needs: tuple[str, str]
    ) -> list[Any]:
        """Returns the statistics of each network, over the task's batches."""

    def outcomes(
        self,
        method: Method,
        networks: Sequence[Any],
        stats: Sequence[Any],
        seeds: Sequence[int],
        config: pp.Config,
    ) -> Outcomes:
        """Returns what a method makes of networks, at every row of the counts of ``config``.

        Args:
            method: the criterion and its units, which are those of ``config``.
            networks: trained params, one for each seed.
            stats: what the criterion needs of each: statistics, a seed, or None.
            seeds: of fine-tuning.
            config: its counts are arrays, a number for each sparsity.
        """


def networks_of(task: Task, epochs: int) -> Networks:
    """Returns how networks of a task are made, and fine-tuned for so many epochs."""
    return _Traced(task, epochs) if task.traced else _Looped(task, epochs)


class _Traced:
    """Compiled once for a task, and for every criterion; a block of seeds is a call."""

    def __init__(self, task: Task, epochs: int) -> None:
        def tuned(params: Any, masks: Any, seed: Any) -> tuple[Any, Any]:
            return task.evaluate(params), task.evaluate(task.tune(params, masks, seed, epochs))

        self.task = task
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._train = jax.jit(jax.vmap(lambda seed: task.train(task.init(seed), seed)))
        self._score = jax.jit(jax.vmap(task.evaluate))
        self._tune = jax.jit(jax.vmap(jax.vmap(tuned, in_axes=(0, 0, None))))

    def train(self, seeds: Sequence[int]) -> list[Any]:
        return _parts(self._train(jnp.asarray(seeds, jnp.int32)), len(seeds))

    def score(self, networks: Sequence[Any]) -> np.ndarray:
        return np.asarray(self._score(_stacked(networks)))

    def statistics(
        self, networks: Sequence[Any], config: pp.Config, needs: tuple[str, str]
    ) -> list[Any]:
        init, update = steps_of(self.task, config, needs)
        key, params = (needs, config.granularity), _stacked(networks)
        if key not in self._compiled:
            self._compiled[key] = jax.jit(jax.vmap(update, in_axes=(0, 0, None)))
        stats = jax.vmap(init)(params)
        for batch in self.task.batches:
            stats = self._compiled[key](stats, params, batch)
        return _parts(stats, len(networks))

    def outcomes(
        self,
        method: Method,
        networks: Sequence[Any],
        stats: Sequence[Any],
        seeds: Sequence[int],
        config: pp.Config,
    ) -> Outcomes:
        if method not in self._compiled:
            one = jax.vmap(functools.partial(ranked, method), in_axes=(None, None, 0))
            self._compiled[method] = jax.jit(jax.vmap(one, in_axes=(0, 0, None)))
        given = _stacked(jax.tree.map(jnp.asarray, list(stats)))
        params, masks = self._compiled[method](_stacked(networks), given, config)
        pruned, tuned = self._tune(params, masks, jnp.asarray(seeds, jnp.int32))
        return Outcomes(np.asarray(pruned), np.asarray(tuned), kept_weights(self.task, masks, 2))


class _Looped:
    """One network after the other."""

    def __init__(self, task: Task, epochs: int) -> None:
        self.task, self.epochs = task, epochs

    def train(self, seeds: Sequence[int]) -> list[Any]:
        return [self.task.train(self.task.init(seed), seed) for seed in seeds]

    def score(self, networks: Sequence[Any]) -> np.ndarray:
        return np.array([float(self.task.evaluate(params)) for params in networks])

    def statistics(
        self, networks: Sequence[Any], config: pp.Config, needs: tuple[str, str]
    ) -> list[Any]:
        init, update = steps_of(self.task, config, needs)
        found = []
        for params in networks:
            stats = init(params)
            for batch in self.task.batches:
                stats = update(stats, params, batch)
            found.append(stats)
        return found

    def outcomes(
        self,
        method: Method,
        networks: Sequence[Any],
        stats: Sequence[Any],
        seeds: Sequence[int],
        config: pp.Config,
    ) -> Outcomes:
        task, rows = self.task, []
        n = len(next(iter(config.counts.values())))
        for params, given, seed in zip(networks, stats, seeds, strict=True):
            for j in range(n):
                one = config.with_counts({k: int(v[j]) for k, v in config.counts.items()})
                weights, masks = ranked(method, params, given, one)
                tuned = task.tune(weights, masks, seed, self.epochs)
                scores = float(task.evaluate(weights)), float(task.evaluate(tuned))
                rows.append((*scores, kept_weights(task, masks, 0)))
        pruned, after, kept = map(np.array, zip(*rows, strict=True))
        shape = len(networks), n
        return Outcomes(pruned.reshape(shape), after.reshape(shape), kept.reshape(*shape, -1))


def ranked(method: Method, params: Any, stats: Any, config: pp.Config) -> tuple[Any, Any]:
    """Returns pruned params, and a whole mask for every parameter."""
    criterion = CRITERIA[method.criterion]
    found = criterion.pruner(params, stats, config)
    params, masks = found if criterion.repairs else (params, found)
    masks = pp.expand(masks, params)
    return pp.apply_masks(params, masks), masks


def kept_weights(task: Task, masks: Any, leading: int) -> np.ndarray:
    """Returns how many weights are left of each layer, of masks with so many axes before theirs."""
    leaves, found = flatten(masks).leaves, []
    for layer in task.layers:
        mask = to_numpy(leaves[layer.weight])
        found.append(mask.sum(tuple(range(leading, mask.ndim))))
    return np.stack(found, axis=-1)


def _stacked(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _parts(tree: Any, n: int) -> list[Any]:
    def part(i: int) -> Callable[[Any], Any]:
        return lambda x: x[i]

    return [jax.tree.map(part(i), tree) for i in range(n)]
