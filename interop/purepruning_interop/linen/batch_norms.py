"""Batch norms of a Linen model that can be folded into the layers in front of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn
from flax.core import meta

from purepruning.quantize import BatchNorm
from purepruning.trees import flatten
from purepruning_interop._batch_norms import Norm, behind_layers, foldable
from purepruning_interop._table import join
from purepruning_interop.linen.capture import marked_program
from purepruning_interop.linen.layers import check, layers


def batch_norms(
    model: nn.Module,
    variables: Mapping[str, Any],
    /,
    *inputs: Any,
    rngs: Any = None,
    method: Callable[..., Any] | str | None = None,
    mutable: Any = False,
    **kwargs: Any,
) -> tuple[BatchNorm, ...]:
    """Returns a row for every batch norm that alone reads what a linear layer or convolution makes.

    For :func:`purepruning.quantize.fold_batch_norms`. Layers and norms that are called several
    times, are stacked by ``nn.scan`` or ``nn.vmap``, or lie in different jitted parts of the model
    are left out, and so are layers whose weights ``nn.WeightNorm`` or ``nn.SpectralNorm`` scales.
    Paths are those of ``variables["params"]`` and of ``variables["batch_stats"]``. Nothing is
    computed.

    Args:
        model, variables, *inputs, rngs, method, mutable, **kwargs: as for :func:`capture`;
            variables with their ``"batch_stats"``.

    Raises:
        TypeError, ValueError: as :func:`capture`.

    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> model = nn.Sequential([nn.Dense(2), nn.BatchNorm(use_running_average=True)])
    >>> variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
    >>> [(norm.layer.name, norm.name) for norm in batch_norms(model, variables, jnp.ones((1, 3)))]
    [('layers_0', 'layers_1')]
    """
    where = "batch_norms(model, variables, *inputs)"
    check(where, model, variables, inputs, {"method": method, **kwargs})
    whole = variables if isinstance(variables.get("params"), Mapping) else {"params": variables}
    statistics = flatten(meta.unbox(whole.get("batch_stats", {}))).leaves
    norms: dict[str, Norm] = {}
    scaled: set[str] = set()

    def look(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module, result = context.module, call(*args, **kwargs)
        if module.scope is not None and context.method_name == "__call__":
            name = ".".join(module.scope.path)
            if isinstance(module, nn.BatchNorm) and join(name, "mean") in statistics:
                norms[name] = _norm(name, module)
            if isinstance(module, nn.WeightNorm | nn.SpectralNorm):
                inside: Any = module.layer_instance.scope
                scaled.add(".".join(inside.path))
        return result

    with nn.intercept_methods(look):
        rows = layers(model, whole["params"], *inputs, rngs=rngs, method=method, **kwargs)
    options = {"rngs": rngs, "method": method, "mutable": mutable}
    found = {name: row for name, row in foldable(rows).items() if name not in scaled}
    wanted = frozenset({(n, "output") for n in found} | {(n, "input") for n in norms})
    program, _ = marked_program(where, model, (whole, inputs, options, kwargs), wanted)
    return behind_layers(program, found, norms)


def _norm(name: str, module: nn.BatchNorm) -> Norm:
    return Norm(
        name=name,
        axis=module.axis,
        epsilon=module.epsilon,
        scale=join(name, "scale") if module.use_scale else None,
        offset=join(name, "bias") if module.use_bias else None,
        mean=join(name, "mean"),
        variance=join(name, "var"),
    )
