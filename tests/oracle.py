"""What is right, in a few lines of NumPy each: the expected values of the selection tests.

Nothing here is shared with the library: units are numbered from the coordinates of every weight,
and what is pruned comes from stable sorts.
"""

import math

import numpy as np

from purepruning import NM, Block


def lowest(scores, count):
    """Which of ``scores`` the ``count`` lowest are; of equal ones the first, NaN last."""
    order = np.argsort(np.asarray(scores, np.float32).reshape(-1), kind="stable")
    pruned = np.zeros(order.shape, bool)
    pruned[order[: max(count, 0)]] = True
    return pruned.reshape(np.shape(scores))


def lowest_together(scores, budget, caps, costs=None):
    """Which units of several layers are pruned: lowest first, as long as they fit into the budget.

    Units beyond the cap of their layer do not take part; the first that does not fit ends it.
    """
    costs = costs or [np.ones(np.size(s), int) for s in scores]
    rank = [np.argsort(np.argsort(s.reshape(-1), kind="stable")) for s in scores]
    units = [
        (float(s), i, j, int(costs[i][j]))
        for i, layer in enumerate(scores)
        for j, s in enumerate(layer.reshape(-1))
        if rank[i][j] < caps[i]
    ]
    pruned, spent = [np.zeros(np.size(s), bool) for s in scores], 0
    for _, i, j, cost in sorted(units):
        spent += cost
        if spent > budget:
            break
        pruned[i][j] = True
    return [p.reshape(s.shape) for p, s in zip(pruned, scores, strict=True)]


def unit_ids(layer, granularity):
    """For every weight the number of its unit; units of one stack member are numbered from 0."""
    at, shape = np.indices(layer.shape), layer.shape

    def number(axes, sizes=None):
        sizes = sizes or {}
        tiles = [-(-shape[a] // sizes.get(a, 1)) for a in axes]
        return np.ravel_multi_index([at[a] // sizes.get(a, 1) for a in axes], tiles)

    rest = [a for a in range(len(shape)) if a not in layer.stack_axes]
    if granularity == "element":
        return number(rest)
    if isinstance(granularity, Block):
        order = (*layer.out_axes, *layer.in_axes, *layer.spatial_axes)
        given = {
            a: shape[a] if b == -1 else b for a, b in zip(order, granularity.shape, strict=False)
        }
        return number(rest, given)
    if isinstance(granularity, NM):
        lines = [a for a in rest if a not in layer.in_axes]
        groups = -(-math.prod(shape[a] for a in layer.in_axes) // granularity.of)
        return number(lines) * groups + number(layer.in_axes) // granularity.of
    side, axes, other = "out", layer.out_axes, layer.in_axes
    if granularity == "input_channel":
        side, axes, other = "in", other, axes
    if layer.groups > 1 and layer.grouped == side:
        per_group = math.prod(shape[a] for a in other) // layer.groups
        return number(other) // per_group * math.prod(shape[a] for a in axes) + number(axes)
    return number(axes)


def members(layer):
    """For every weight the number of the stacked layer it belongs to; 0 without a stack."""
    at = np.indices(layer.shape)
    sizes = [layer.shape[a] for a in layer.stack_axes]
    return np.ravel_multi_index([at[a] for a in layer.stack_axes], sizes) if sizes else 0 * at[0]


def unit_sums(values, layer, granularity):
    """Sums of ``values`` over each unit, ``(stacked, units)``, in float64."""
    ids, which = unit_ids(layer, granularity), members(layer)
    n = ids.max() + 1
    sums = np.bincount((which * n + ids).reshape(-1), values.astype(float).reshape(-1))
    return sums.reshape(-1, n)


def spread(pruned, layer, granularity):
    """A mask of the weight's shape from which units are pruned, ``(stacked, units)``."""
    return ~np.asarray(pruned)[members(layer), unit_ids(layer, granularity)]
