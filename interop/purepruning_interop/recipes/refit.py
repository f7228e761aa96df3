"""AMC's refit: what reads pruned channels is brought near to what it returned before."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

import purepruning as pp
from purepruning.arrays import array_like, jax_array
from purepruning.coupling.unit_masks import leaf_mask
from purepruning.masks import to_numpy
from purepruning.matrices import as_matrices, form, from_matrices, has_matrix, input_rows
from purepruning.trees import flatten

#: Rows of inputs that are taken apart at a time.
_ROWS = 65_536


class Refit:
    """Refits linear layers and convolutions of one tap, by inputs of the model before pruning.

    A least-squares problem with inputs X = QR is that with inputs R: of all samples only R is kept,
    as large as the layer.

    Args:
        coupling: of the model.
        layers: its layer table; those are refitted that read channels which the coupling may cut.
        params: before pruning.
        inputs_of: ``(batch, layers) -> {layer name: its inputs}``.
        batches: the data.
        points: of each example, at so many positions inputs are looked at, drawn at random; a
            linear layer's without positions are taken whole.
        seed: draws them.
    """

    def __init__(
        self,
        coupling: pp.Coupling,
        layers: Iterable[pp.Layer],
        params: Any,
        inputs_of: Callable[[Any, tuple[pp.Layer, ...]], Any],
        batches: Iterable[Any],
        *,
        points: int,
        seed: int,
    ) -> None:
        self._coupling = coupling
        self._layers = tuple(x for x in layers if _is_refitted(x, coupling))
        rows: dict[str, list[np.ndarray]] = {x.name: [] for x in self._layers}
        rng = np.random.default_rng(seed)
        for batch in batches if self._layers else ():
            found = inputs_of(batch, self._layers)
            for layer in self._layers:
                rows[layer.name].append(_sampled(found[layer.name], layer, points, rng))
        leaves = flatten(params).leaves
        self._inputs, self._outputs = {}, {}
        for layer in self._layers:
            x = np.concatenate(rows[layer.name]) if rows[layer.name] else np.zeros((0, 1))
            if not len(x):
                raise ValueError("amc: there is no batch to refit by; give one, or 0 batches")
            r: np.ndarray = np.linalg.qr(x.astype(np.float64), "r")  # type: ignore[assignment]
            self._inputs[layer.name] = r.astype(np.float32)
            matrix = _matrix(leaves[layer.weight], layer)
            self._outputs[layer.name] = (r @ matrix.T.astype(np.float64)).astype(np.float32)

    def __call__(self, params: Any, masks: Any) -> Any:
        """Returns pruned params refitted; ``masks`` are the pruner's."""
        removed = self._coupling.chosen(masks, params).removed
        tree = flatten(params)
        leaves = dict(tree.leaves)
        for layer in self._layers:
            mask = leaf_mask(self._coupling.leaves[layer.weight], removed)
            if mask is None:
                continue
            weight, f = leaves[layer.weight], form("amc", layer)
            matrix, kept = (
                _matrix(weight, layer),
                as_matrices(np.broadcast_to(mask, layer.shape), f)[0],
            )
            read = kept.any(axis=0)
            if read.all():
                continue
            x, y = self._inputs[layer.name], self._outputs[layer.name]
            found = np.asarray(pp.search.refit(matrix.T, x, y, read)).T
            whole = from_matrices(np.where(kept, found, 0)[None].astype(np.float32), f)
            leaves[layer.weight] = _like(weight, whole)
        return tree.rebuild(leaves)


def _is_refitted(layer: pp.Layer, coupling: pp.Coupling) -> bool:
    if not has_matrix(layer) or layer.groups > 1 or layer.stack_axes:
        return False
    leaf = coupling.leaves.get(layer.weight)
    if leaf is None:
        return False
    reads = [u is not None and r == "sink" for u, r in zip(leaf.units, leaf.roles, strict=True)]
    return any(reads) and all(layer.shape[a] == 1 for a in layer.spatial_axes)


def _sampled(x: Any, layer: pp.Layer, points: int, rng: np.random.Generator) -> np.ndarray:
    """Returns rows of inputs ``(n, in)``, of several calls those of all."""
    calls = x if isinstance(x, list) else [x]
    found = []
    for call in calls:
        host = to_numpy(call)
        rows = np.concatenate([part[0] for part in input_rows(host, layer, _ROWS)])
        n = min(len(rows), points * max(len(host), 1))
        found.append(rows[np.sort(rng.choice(len(rows), n, replace=False))])
    return np.concatenate(found)


def _matrix(weight: Any, layer: pp.Layer) -> np.ndarray:
    found: np.ndarray = as_matrices(to_numpy(weight).astype(np.float32), form("amc", layer))[0]
    return found


def _like(weight: Any, x: np.ndarray) -> Any:
    """Returns an array in the framework and dtype of a weight."""
    found = array_like(weight, x)
    return found.to(weight.dtype) if found is not x else jax_array(x.astype(weight.dtype))
