"""What the tests of all adapters' ``layers`` share: a short way to write an expected row."""

import math

from purepruning.layers import Layer
from purepruning.trees import flatten


def row(type, weight, out=(), in_=(), *, bias=None, stack=(), groups=1, grouped="in", aliases=()):
    """What a layer is expected to be, without its name, shape and class name."""
    return (type, weight, out, in_, bias, stack, groups, grouped, aliases)


def as_row(layer: Layer):
    return row(
        layer.type,
        layer.weight,
        layer.out_axes,
        layer.in_axes,
        bias=layer.bias,
        stack=layer.stack_axes,
        groups=layer.groups,
        grouped=layer.grouped,
        aliases=layer.aliases,
    )


def assert_table(table, params, expected):
    """Compares names, order and rows, and checks every row against the parameters themselves."""
    assert isinstance(table, tuple)
    assert [layer.name for layer in table] == list(expected)
    assert {layer.name: as_row(layer) for layer in table} == expected
    leaves = flatten(params).leaves
    for layer in table:
        assert layer.shape == tuple(leaves[layer.weight].shape)
        if layer.bias is not None:
            stack = math.prod(layer.shape[a] for a in layer.stack_axes)
            assert math.prod(leaves[layer.bias].shape) == stack * layer.out_channels
    weights = [layer.weight for layer in table]
    assert len(set(weights)) == len(weights)
