"""Batch norms of an Equinox model that can be folded into the layers in front of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from purepruning.quantize import BatchNorm
from purepruning.trees import flatten
from purepruning_interop._batch_norms import Norm, behind_layers, foldable
from purepruning_interop._table import join
from purepruning_interop.equinox.capture import marked_program
from purepruning_interop.equinox.layers import check, layers, walk

_WHERE = "batch_norms(model, *inputs)"


def batch_norms(
    model: Any,
    /,
    *inputs: Any,
    method: Callable[..., Any] | str | None = None,
    **kwargs: Any,
) -> tuple[BatchNorm, ...]:
    """Returns a row for every batch norm that alone reads what a linear layer or convolution makes.

    For :func:`purepruning.quantize.fold_batch_norms`, whose statistics are then the
    ``eqx.nn.State`` among the inputs; norms may be of either mode. Layers and norms that are called
    several times, are stacked by ``eqx.filter_vmap``, or lie in different jitted parts of the model
    are left out, and so are those that share weights (``eqx.nn.Shared``) or statistics, and layers
    whose weights ``eqx.nn.WeightNorm`` or ``eqx.nn.SpectralNorm`` scales. Nothing is computed, and
    the state stays usable; arguments are those of :func:`capture`.

    Raises:
        TypeError: ``model`` contains no ``eqx.Module``, or there is not one state among the inputs.

    >>> import equinox as eqx, jax, jax.numpy as jnp
    >>> def make():
    ...     norm = eqx.nn.BatchNorm(2, "batch", mode="batch", inference=True)
    ...     return eqx.nn.Sequential([eqx.nn.Linear(3, 2, key=jax.random.key(0)), norm])
    >>> model, state = eqx.nn.make_with_state(make)()
    >>> [(norm.layer.name, norm.name) for norm in batch_norms(model, jnp.ones(3), state)]
    [('layers.0', 'layers.1')]
    """
    check(_WHERE, model)
    modules = {name: module for name, module, _ in walk(model, "")}
    rows = layers(model)
    tied = {name for row in rows if row.aliases for name in (row.name, *row.aliases)}
    scaling = (eqx.nn.WeightNorm, eqx.nn.SpectralNorm)
    scaled = tuple(join(n, "layer") for n, m in modules.items() if isinstance(m, scaling))
    found = {
        name: row
        for name, row in foldable(rows).items()
        if name not in tied
        and not any(name == inside or name.startswith(f"{inside}.") for inside in scaled)
    }
    called = {name: m for name, m in modules.items() if isinstance(m, eqx.nn.BatchNorm)}
    norms = _norms(called, (inputs, kwargs)) if called else {}
    several = Counter(norm.mean for norm in norms.values())
    norms = {n: m for n, m in norms.items() if n not in tied and several[m.mean] == 1}
    sides = dict.fromkeys(found, ("output",)) | dict.fromkeys(norms, ("input",))
    return behind_layers(marked_program(model, inputs, sides, method, kwargs), found, norms)


def _norms(modules: dict[str, eqx.nn.BatchNorm], arguments: Any) -> dict[str, Norm]:
    """Returns the norms whose statistics the state among the arguments of a call holds."""

    def is_state(x: Any) -> bool:
        return isinstance(x, eqx.nn.State)

    states = [x for x in jax.tree.leaves(arguments, is_leaf=is_state) if is_state(x)]
    if len(states) != 1:
        raise TypeError(
            f"{_WHERE}: the model has batch norms, and the inputs hold {len(states)} states; give "
            "the one eqx.nn.State that the model is called with"
        )
    flat = flatten(states[0])
    paths = flat.rebuild({path: path for path in flat.leaves})
    found = {}
    for name, module in modules.items():
        index = module.ema_state_index if module.mode == "ema" else module.batch_state_index
        counter = module.batch_counter
        try:
            mean, variance = paths.get(index)
            updates = None if counter is None else paths.get(counter)
        except KeyError:  # of a part of the model that is not called
            continue
        found[name] = Norm(
            name=name,
            axis=0,
            epsilon=module.eps,
            scale=None if module.weight is None else join(name, "weight"),
            offset=None if module.bias is None else join(name, "bias"),
            mean=mean,
            variance=variance,
            updates=updates,
            decay=0.0 if updates is None else module.momentum,
        )
    return found
