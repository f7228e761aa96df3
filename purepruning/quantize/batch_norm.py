"""Folding batch norms into the layers in front of them.

Integer kernels compute a layer and its batch norm as one, so that it is the folded weight that has
to be quantised. ``batch_norms`` of an adapter says which can be folded, once; inside of the loss::

    folded, statistics = quantize.fold_batch_norms(params, batch_stats, norms)
    weights = qat.weights(folded, state, config)
    variables = {"params": weights, "batch_stats": statistics}
    logits, seen = linen.replace(model, variables, x, at=at, train=False)

The model is the same, and calls its batch norms by the running statistics, which are the identity
then. Jacob et al. 2017, arXiv:1712.05877, section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from purepruning.arguments import collection, floats, instance, missing, scalar, whole_number
from purepruning.arrays import by_numpy, namespace, sqrt
from purepruning.layers import Layer
from purepruning.trees import flatten
from purepruning.types import Array, Params


class BatchNorm(NamedTuple):
    """A batch norm that reads what a layer puts out, which nothing else reads.

    Attributes:
        name: its dotted name.
        layer: the layer's row.
        scale, offset: their paths in the parameters; None where it has none.
        mean, variance: their paths among the running statistics.
        epsilon: what is added to the variance.
        updates: path of the number of updates, where mean and variance began as zero and are
            divided by ``1 - decay ** updates`` when they are read; None where they are not.
        decay: of such an average.
    """

    name: str
    layer: Layer
    scale: str | None
    offset: str | None
    mean: str
    variance: str
    epsilon: float
    updates: str | None = None
    decay: float = 0.0


def fold_batch_norms(
    params: Params, statistics: Params, norms: Iterable[BatchNorm]
) -> tuple[Params, Params]:
    """Returns parameters and running statistics of the model with its batch norms folded.

    Each becomes the identity: of scale 1, offset 0, mean 0 and variance ``1 - epsilon``. The layer
    in front of it computes what both did, see :func:`fold_batch_norm`; where it has no bias, the
    norm adds it: as its offset, or, where it has none, as minus its mean. Called by running
    statistics the model computes the same function, but for rounding. Gradients flow to all
    parameters, and to the statistics.

    Args:
        params: the parameters.
        statistics: the running statistics: of Linen ``variables["batch_stats"]``, of NNX what
            ``nnx.state(model, nnx.BatchStat)`` returns, of Equinox and Haiku the state, of torch
            ``dict(model.named_buffers())``.
        norms: what ``batch_norms`` of the adapter returned; those of the layers that are quantised,
            or all.

    Raises:
        KeyError: there is no array of a name.
        ValueError: a weight has no such output axis, or arrays of a norm other channels.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> params = {"fc": {"w": jnp.array([[3.0]])}, "bn": {"scale": jnp.array([8.0])}}
    >>> layer = pp.make_layer(params, "fc.w", "Linear", out_axes=1, in_axes=0)
    >>> norm = BatchNorm("bn", layer, "bn.scale", None, "bn.mean", "bn.var", 0.0)
    >>> statistics = {"bn": {"mean": jnp.array([5.0]), "var": jnp.array([4.0])}}
    >>> folded, left = fold_batch_norms(params, statistics, [norm])
    >>> folded["fc"]["w"].tolist(), folded["bn"]["scale"].tolist()
    ([[12.0]], [1.0])
    >>> left["bn"]["mean"].tolist(), left["bn"]["var"].tolist()
    ([20.0], [1.0])
    """
    rows: tuple[BatchNorm, ...] = collection(
        norms, "fold_batch_norms: norms", "what batch_norms of an adapter returned"
    )
    trees = flatten(params), flatten(statistics)
    found: dict[str, dict[str, Any]] = {}
    for norm in rows:
        instance(norm, BatchNorm, "fold_batch_norms: every norm", "a BatchNorm")
        instance(
            norm.layer, Layer, f"fold_batch_norms: the layer of {norm.name!r}", "its Layer row"
        )
        found[norm.name] = {
            what: _leaf(norm, what, path, tree.leaves, of)
            for tree, of, paths in zip(trees, ("params", "statistics"), _paths(norm), strict=True)
            for what, path in paths.items()
        }

    def folded(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return {norm.name: _folded(norm, found[norm.name]) for norm in rows}

    new = by_numpy(folded, found)
    values = [dict(tree.leaves) for tree in trees]
    for norm in rows:
        for leaves, paths in zip(values, _paths(norm), strict=True):
            some = new[norm.name]
            leaves.update({path: some[what] for what, path in paths.items() if what in some})
    return trees[0].rebuild(values[0]), trees[1].rebuild(values[1])


def _paths(norm: BatchNorm) -> tuple[dict[str, str], dict[str, str]]:
    """Returns where the arrays of a norm and its layer lie in parameters and in statistics."""
    of_params = {
        "weight": norm.layer.weight,
        "bias": norm.layer.bias,
        "scale": norm.scale,
        "offset": norm.offset,
    }
    of_statistics = {"mean": norm.mean, "variance": norm.variance, "updates": norm.updates}
    given, kept = (
        {what: path for what, path in paths.items() if path is not None}
        for paths in (of_params, of_statistics)
    )
    return given, kept


def _leaf(norm: BatchNorm, what: str, path: str, leaves: Mapping[str, Any], of: str) -> Any:
    if path not in leaves:
        message = f"fold_batch_norms: {of} have no {what} {path!r} of the norm {norm.name!r}"
        raise KeyError(missing(message, path, leaves))
    if what != "updates":
        floats(leaves[path], f"fold_batch_norms: the {what} {path!r} of the norm {norm.name!r}")
    if what == "weight" and tuple(leaves[path].shape) != norm.layer.shape:
        raise ValueError(
            f"fold_batch_norms: the weight {path!r} has shape {tuple(leaves[path].shape)}, but by "
            f"the layer's row {norm.layer.shape}; give the parameters of the same model"
        )
    return leaves[path]


def _folded(norm: BatchNorm, found: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the new arrays of a norm and its layer, each of the dtype that it had."""
    xp = namespace(found["mean"])
    wide = {what: _flat(xp.astype(x, found["variance"].dtype), what) for what, x in found.items()}
    share = _share(norm, wide)
    for what in ("mean", "variance"):
        wide[what] = wide[what] / share
    one, zero = xp.ones_like(wide["mean"]), xp.zeros_like(wide["mean"])
    try:
        weight, bias = fold_batch_norm(
            wide["weight"],
            wide.get("bias"),
            wide.get("scale", one),
            wide.get("offset", zero),
            wide["mean"],
            wide["variance"],
            out_axis=norm.layer.out_axes[0],
            epsilon=norm.epsilon,
        )
    except ValueError as error:
        raise ValueError(f"norm {norm.name!r} behind layer {norm.layer.name!r}: {error}") from None
    new = {"weight": weight, "scale": one, "offset": zero, "variance": one - norm.epsilon}
    if "bias" in found:
        new |= {"bias": bias, "mean": zero}
    elif "offset" in found:
        new |= {"offset": bias, "mean": zero}
    else:
        new["mean"] = -bias
    for what in ("mean", "variance"):
        new[what] = new[what] * share
    return {
        what: xp.reshape(xp.astype(new[what], x.dtype), tuple(x.shape))
        for what, x in found.items()
        if what != "updates"
    }


def _flat(x: Any, what: str) -> Any:
    """Returns what has one number per channel without axes of size 1.

    Haiku's norms have the rank of what they read, and Equinox's convolutions biases of theirs.
    """
    if what == "weight" or x.ndim < 2 or max(x.shape) != math.prod(x.shape):
        return x
    return namespace(x).reshape(x, (-1,))


def _share(norm: BatchNorm, found: Mapping[str, Any]) -> Any:
    """Returns by what stored statistics are divided when they are read."""
    if norm.updates is None:
        return 1
    xp, count = namespace(found["updates"]), found["updates"]
    return xp.where(count == 0, xp.ones_like(count), 1 - norm.decay**count)


def fold_batch_norm(
    weight: Array,
    bias: Array | None,
    scale: Array,
    offset: Array,
    mean: Array,
    variance: Array,
    *,
    out_axis: int,
    epsilon: float,
) -> tuple[Any, Any]:
    r"""Returns weight and bias of the one layer that a layer and a batch norm behind it make.

    $$W' = W \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}, \qquad
      b' = \beta + (b - \mu) \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}$$

    Statistics are the running ones, also in training. Quantise ``W'`` instead of ``W``, and run the
    model with ``W'``, ``b'`` and a batch norm that is the identity: ``scale`` is
    ``sqrt(variance + epsilon)`` and ``offset`` is ``mean``. Gradients flow to all six arrays.
    Of a whole model: :func:`fold_batch_norms`.

    Args:
        weight: of the layer, ``(out, ...)`` or with the outputs along another axis.
        bias: ``(out,)``, or None.
        scale, offset, mean, variance: of the batch norm, ``(out,)``.
        out_axis: the axis of ``weight`` that holds its outputs.
        epsilon: of the batch norm: 1e-5 in PyTorch, Flax NNX and Linen.

    Raises:
        ValueError: the weight has no such axis, or the bias or the batch norm another number of
            channels than it.

    Jacob et al. 2017, arXiv:1712.05877, section 3.2.

    >>> import numpy as np
    >>> one = np.ones(1, np.float32)
    >>> fold_batch_norm(one[:, None], None, 6 * one, one, 0.5 * one, 4 * one, out_axis=0, epsilon=0)
    (array([[3.]], dtype=float32), array([-0.5], dtype=float32))
    """
    given = {"scale": scale, "offset": offset, "mean": mean, "variance": variance}
    given |= {} if bias is None else {"bias": bias}
    for name, x in {"weight": weight, **given}.items():
        floats(x, f"fold_batch_norm: {name}")
    epsilon = scalar(epsilon, "fold_batch_norm: epsilon", zero=True, like=mean)
    whole_number(out_axis, "fold_batch_norm: out_axis", -(2**31))
    if not -weight.ndim <= out_axis < weight.ndim:
        raise ValueError(
            f"fold_batch_norm: out_axis={out_axis} has no place in the weight's shape "
            f"{tuple(weight.shape)}; give the axis of the outputs"
        )
    channels = weight.shape[out_axis]
    for name, x in given.items():
        if tuple(x.shape) != (channels,):
            raise ValueError(
                f"fold_batch_norm: {name} has shape {tuple(x.shape)}, but axis {out_axis} of the "
                f"weight has {channels} outputs; give the axis of the outputs as out_axis"
            )
    xp = namespace(weight)
    factor = scale / sqrt(variance + epsilon)
    shape = [1] * weight.ndim
    shape[out_axis] = channels
    shifted = (xp.zeros_like(mean) if bias is None else bias) - mean
    return weight * xp.reshape(factor, tuple(shape)), offset + shifted * factor
