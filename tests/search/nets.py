"""The networks that searches are tested on, with an evaluator that is a formula."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

import purepruning as pp

SHAPES = {
    "conv1": (3, 3, 3, 8),
    "conv2": (3, 3, 8, 16),
    "conv3": (3, 3, 16, 16),
    "fc": (16, 10),
}


def net(params, x):
    """Three convolutions and a classifier."""
    for name in ("conv1", "conv2", "conv3"):
        dims = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, params[name], (1, 1), "SAME", dimension_numbers=dims)
        x = jnp.maximum(x, 0.0)
    return x.mean((1, 2)) @ params["fc"]


@functools.cache
def weights():
    """NNI's traces were made with the k-th array of RandomState(k), output channels first."""
    found = {}
    for k, (name, shape) in enumerate(SHAPES.items(), 1):
        torch_shape = (shape[-1], shape[-2], *shape[:-2])
        w = np.random.RandomState(k).standard_normal(torch_shape).astype(np.float32)
        found[name] = np.moveaxis(w, (0, 1), (-1, -2))
    return found


def coupled(rules=({"op_types": ["Conv2d"]},), **options):
    """The net's config: a pool for each convolution."""
    params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    coupling = pp.couple(net, params, jnp.ones((1, 8, 8, 3)))
    layers = [
        pp.make_layer(params, name, "Conv2d", name=name, out_axes=3, in_axes=2)
        for name in ("conv1", "conv2", "conv3")
    ]
    return pp.resolve(list(rules), layers, coupling=coupling, **options)


@functools.cache
def curve(name):
    """By count, the share of a layer's L1 norm that stays when its least rows go."""
    norms = np.sort(np.abs(weights()[name]).sum((0, 1, 2), dtype=np.float64))
    return np.concatenate([[1.0], 1 - np.cumsum(norms) / norms.sum()])


def nni_score(counts):
    """The evaluator of the traces: 1 - sum of c (1 - r)^2."""
    parts = {"conv1": 0.5, "conv2": 0.3, "conv3": 0.2}
    return 1 - sum(c * (1 - curve(n)[counts[n]]) ** 2 for n, c in parts.items())


def params_of(counts):
    """What shrinking leaves of the net, by hand."""
    a, b, c = 8 - counts["conv1"], 16 - counts["conv2"], 16 - counts["conv3"]
    return 27 * a + 9 * a * b + 9 * b * c + 10 * c


def table_of(sizes=(10, 10), **options):
    """Layers without a coupling: n channels of 20 weights each."""
    table = [pp.Layer(f"l{i}", "Linear", f"l{i}", (n, 20), (0,), (1,)) for i, n in enumerate(sizes)]
    return pp.resolve([{"op_types": ["Linear"]}], table, granularity="output_channel", **options)


def every_plan(of):
    """All plans of a small problem."""
    for counts in itertools.product(*[x.tolist() for x in of.options]):
        yield dict(zip(of.names, counts, strict=True))
