"""Batch norms of an NNX model that can be folded into the layers in front of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import nnx

from purepruning.quantize import BatchNorm
from purepruning_interop._batch_norms import Norm, behind_layers, foldable
from purepruning_interop._table import join
from purepruning_interop.nnx.capture import marked_program
from purepruning_interop.nnx.layers import check, layers, walk


def batch_norms(
    model: nnx.Module,
    /,
    *inputs: Any,
    method: Callable[..., Any] | str | None = None,
    **kwargs: Any,
) -> tuple[BatchNorm, ...]:
    """Returns a row for every batch norm that alone reads what a linear layer or convolution makes.

    For :func:`purepruning.quantize.fold_batch_norms`. Layers and norms that are called several
    times, are stacked by ``nnx.vmap``, or lie in different jitted parts of the model are left out,
    and so are layers whose weights ``nnx.WeightNorm`` or ``nnx.SpectralNorm`` scales. Paths are
    those of ``nnx.state(model, nnx.Param)`` and of ``nnx.state(model, nnx.BatchStat)``. Nothing is
    computed; arguments are those of :func:`capture`.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Linear(3, 2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs))
    >>> [(norm.layer.name, norm.name) for norm in batch_norms(model, jnp.ones((1, 3)))]
    [('layers.0', 'layers.1')]
    """
    check("batch_norms(model, *inputs)", model)
    modules = {name: module for name, module, _ in reversed(list(walk(model, "", ())))}
    norms = {name: _norm(name, m) for name, m in modules.items() if isinstance(m, nnx.BatchNorm)}
    kinds = tuple(getattr(nnx, kind) for kind in ("WeightNorm", "SpectralNorm"))
    scaling = [join(name, "layer_instance") for name, m in modules.items() if isinstance(m, kinds)]
    found = {name: row for name, row in foldable(layers(model)).items() if name not in scaling}
    sides = dict.fromkeys(found, ("output",)) | dict.fromkeys(norms, ("input",))
    program = marked_program(model, inputs, sides, method, False, kwargs)
    return behind_layers(program, found, norms)


def _norm(name: str, module: nnx.BatchNorm) -> Norm:
    return Norm(
        name=name,
        axis=module.axis,
        epsilon=module.epsilon,
        scale=None if module.scale is None else join(name, "scale"),
        offset=None if module.bias is None else join(name, "bias"),
        mean=join(name, "mean"),
        variance=join(name, "var"),
    )
