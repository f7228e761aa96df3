"""Outputs of the layers of a Linen model, as a pure function."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from flax import linen as nn
from flax.core import meta

from purepruning.layers import Layer
from purepruning.trees import flatten
from purepruning_interop import _capture
from purepruning_interop._marks import marked, marking, run, trace
from purepruning_interop.linen.layers import check, marker


def capture(
    model: nn.Module,
    variables: Mapping[str, Any],
    /,
    *inputs: Any,
    layers: Iterable[str | Layer],
    rngs: Any = None,
    method: Callable[..., Any] | str | None = None,
    mutable: Any = False,
    of: _capture.Of = "outputs",
    **kwargs: Any,
) -> tuple[Any, dict[str, Any]]:
    """Returns ``(model.apply(...), {layer: its output})`` for the layers asked for.

    A pure function of arrays, for ``jax.jit``, ``jax.grad`` (through the outputs too) and
    ``jax.vmap``. The first part is just what ``model.apply`` returns, so with ``mutable`` a pair
    of the result and the updated variables. An output is what the layer's ``__call__`` returned,
    before any activation that follows: that of a layer under ``nn.scan`` is stacked, the steps on a
    new leading axis; under ``nn.vmap`` likewise, after the axes of scans; ``nn.remat`` and
    ``nn.jit`` change nothing. A layer called several times gives the list of its outputs.

    Without ``jax.jit`` around it every call is traced anew. The parts of an
    ``nn.OptimizedLSTMCell`` are never called; the cell is.

    Args:
        model: the Linen module.
        variables: what ``model.init`` returned, or only its ``"params"``.
        *inputs: what a call of the model takes.
        layers: rows of the layer table, or names; the dotted path of any module is a name, that of
            a parameter stands for the module that owns it.
        of: ``"outputs"``, or ``"inputs"``: the first argument of each layer's call instead, for
            :mod:`purepruning.stats.inputs`.
        rngs, method, mutable, **kwargs: as for ``model.apply``.

    Raises:
        TypeError: an argument is of a wrong type, or the inputs do not fit the method.
        ValueError: a layer is unknown, is never called in this forward pass, or is called where
            there is no one output: inside ``nn.cond``, ``nn.switch``, ``nn.while_loop`` or
            ``nn.custom_vjp``.

    >>> import jax.numpy as jnp
    >>> from flax import linen as nn
    >>> model = nn.Sequential([nn.Dense(2), nn.relu])
    >>> params = {"layers_0": {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.zeros(2)}}
    >>> y, outputs = capture(model, params, jnp.ones((1, 1)), layers=["layers_0"])
    >>> y.tolist(), outputs["layers_0"].tolist()
    ([[1.0, 0.0]], [[1.0, -2.0]])
    """
    where = "capture(model, variables, *inputs)"
    check(where, model, variables, inputs, {"method": method, **kwargs})
    _capture.check_of(where, of)
    names = _capture.asked(where, layers)
    if not isinstance(variables.get("params"), Mapping):
        variables = {"params": variables}
    paths = flatten(meta.unbox(variables["params"])).leaves
    owners = {path: path.rpartition(".")[0] for path in paths}
    modules = {name: owners.get(name, name) for name in names}
    wanted = frozenset(modules.values())
    seen: dict[str, None] = {}

    def apply(variables: Any, inputs: Any, rngs: Any, kwargs: Any, *, afresh: bool) -> Any:
        with contextlib.ExitStack() as contexts:

            def renew() -> None:
                if afresh:
                    contexts.enter_context(marking(object()))

            renew()
            contexts.enter_context(nn.intercept_methods(marker(wanted, of, seen, renew)))
            return model.apply(
                variables, *inputs, rngs=rngs, method=method, mutable=mutable, **kwargs
            )

    # nn.jit takes modules that differ in nothing but the name for the same, and traces the first
    # only. Where that may have happened, everything is traced once more, each call for itself.
    arguments = variables, inputs, rngs, kwargs
    program = trace((wanted, of), partial(apply, afresh=False), *arguments)
    found, several = marked(program)
    if several or found != wanted:
        program = trace((wanted, of), partial(apply, afresh=True), *arguments)
    for name, path in modules.items():
        holds = any(f"{owner}.".startswith(f"{path}.") for owner in owners.values())
        if path and path not in seen and not holds:
            raise _capture.unknown(where, name, [*owners.values(), *seen])
    result, calls = run(where, program)
    return result, _capture.outputs(where, modules, calls)
