"""The layer table that a coupling knows: axes of rows without any, rows for plain pytrees."""

from __future__ import annotations

import dataclasses
from collections import Counter

from purepruning.coupling.coupling import Coupling, check_coupling
from purepruning.coupling.units import Coupled
from purepruning.coupling.value import SINK, SOURCE, STACK, TAP
from purepruning.layers import Layer, Layers, checked_table


def coupled_layers(coupling: Coupling, layers: Layers = ()) -> tuple[Layer, ...]:
    """Returns the layer table, with the axes that the model's own program gives every weight.

    A row without output axes, as an adapter writes it for a module of a class that it does not
    know, gets them: an axis that the program contracts with an input is an input axis, the others
    are output axes but for the taps of kernels and stacked layers. Its type becomes
    ``"Linear"``, ``"Conv2d"`` (by the number of taps) or ``"Embedding"``, its class name stays. A
    parameter that is contracted and in no row gets one, named as :func:`purepruning.make_layer`
    does; ``coupled_layers(coupling)`` is the table of a plain pytree.

    :func:`purepruning.resolve` fills in rows in this way itself when it has a coupling.

    Args:
        coupling: what :func:`purepruning.couple` returned.
        layers: the rows there are; those with output axes come back as they are.

    Raises:
        TypeError: no coupling, or no layer table.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> params = {"hidden": {"w": jnp.ones((3, 8)), "b": jnp.ones(8)}, "head": jnp.ones((8, 2))}
    >>> fn = lambda p, x: (x @ p["hidden"]["w"] + p["hidden"]["b"][None]) @ p["head"]
    >>> table = coupled_layers(pp.couple(fn, params, jnp.ones((1, 3))))
    >>> [(layer.name, layer.type, layer.out_axes, layer.in_axes) for layer in table]
    [('head', 'Linear', (1,), (0,)), ('hidden', 'Linear', (1,), (0,))]
    """
    check_coupling("coupled_layers", coupling)
    table = filled(coupling, checked_table(layers))
    there = {path for layer in table for path in (layer.weight, layer.bias)}
    new = [path for path, leaf in coupling.leaves.items() if path not in there and _contracts(leaf)]
    short = {path: path.rpartition(".")[0] or path for path in new}
    taken = Counter([*short.values(), *(layer.name for layer in table)])
    rows = [
        Layer(
            short[path] if taken[short[path]] == 1 else path, "", path, coupling.leaves[path].shape
        )
        for path in new
    ]
    return (*table, *filled(coupling, tuple(rows)))


def filled(coupling: Coupling, table: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """Returns the rows, those without output axes with what the coupling knows of them."""
    return tuple(_filled(coupling, layer) for layer in table)


def _filled(coupling: Coupling, layer: Layer) -> Layer:
    leaf = coupling.leaves.get(layer.weight)
    if layer.out_axes or leaf is None or leaf.shape != layer.shape or not _contracts(leaf):
        return layer
    by_role = {
        role: tuple(a for a, r in enumerate(leaf.roles) if r == role)
        for role in (SOURCE, SINK, STACK, TAP)
    }
    if not by_role[SINK]:  # tied: used from both sides
        made = [a for a in by_role[SOURCE] if leaf.units[a] is not None] or by_role[SOURCE]
        by_role[SINK] = tuple(a for a in by_role[SOURCE] if a != made[-1])
        by_role[SOURCE] = (made[-1],)
    looked_up = any(
        f.path == layer.weight and f.reason == "looked up by index" for f in coupling.frozen
    )
    kind = f"Conv{len(by_role[TAP])}d" if by_role[TAP] else "Linear"
    return dataclasses.replace(
        layer,
        type="Embedding" if looked_up else kind,
        class_name=layer.class_name or layer.type,
        out_axes=by_role[SOURCE],
        in_axes=by_role[SINK],
        stack_axes=by_role[STACK],
        output_axes=None,
    )


def _contracts(leaf: Coupled) -> bool:
    return SOURCE in leaf.roles and (SINK in leaf.roles or leaf.roles.count(SOURCE) > 1)
