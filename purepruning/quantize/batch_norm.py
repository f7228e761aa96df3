"""Folding a batch norm into the layer in front of it."""

from __future__ import annotations

from typing import Any

from purepruning.arrays import namespace, sqrt
from purepruning.types import Array


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
    Jacob et al. 2017, arXiv:1712.05877, section 3.2.

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
    if not -weight.ndim <= out_axis < weight.ndim:
        raise ValueError(
            f"fold_batch_norm: out_axis={out_axis} has no place in the weight's shape "
            f"{tuple(weight.shape)}; give the axis of the outputs"
        )
    channels = weight.shape[out_axis]
    given = {"scale": scale, "offset": offset, "mean": mean, "variance": variance}
    given |= {} if bias is None else {"bias": bias}
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
