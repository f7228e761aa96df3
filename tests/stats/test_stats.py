"""Running statistics: what they count, that they do not drift, and that merging is counting on."""

import functools
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import purepruning as pp
from purepruning import Block, Layer
from purepruning.stats import activations, gradients
from purepruning.stats.accumulate import CompensatedSum, WideCount, value
from tests import oracle
from tests.messages import raises
from tests.modes import as_jax, as_numpy, as_torch

FRAMEWORKS = pytest.mark.parametrize("framework", [as_jax, as_torch], ids=["jax", "torch"])


def number(total):
    """A total in float64."""
    high, low = (np.asarray(x, np.float64) for x in total)
    return high * 2**20 + low if isinstance(total, WideCount) else high + low


def numbers(stats):
    return {
        field: {name: number(total) for name, total in totals.items()}
        for field, totals in stats._asdict().items()
        if field != "steps"
    }


def assert_equal_stats(a, b, rtol=0.0):
    a, b = numbers(a), numbers(b)
    assert a.keys() == b.keys()
    for field in a:
        assert a[field].keys() == b[field].keys()
        for name in a[field]:
            np.testing.assert_allclose(a[field][name], b[field][name], rtol=rtol, atol=0)


# Activations. One layer of every kind, with the shape of its output.

KINDS = {
    "linear": (Layer("x", "Linear", "x.w", (4, 3), (1,), (0,)), (5, 3)),
    "sequence": (Layer("x", "Linear", "x.w", (3, 4), (0,), (1,)), (5, 7, 3)),
    "unbatched": (Layer("x", "Linear", "x.w", (3, 4), (0,), (1,)), (3,)),
    "conv-last": (Layer("x", "Conv2d", "x.w", (2, 2, 4, 3), (3,), (2,)), (5, 6, 4, 3)),
    "conv-first": (Layer("x", "Conv2d", "x.w", (3, 4, 2, 2), (0,), (1,)), (5, 3, 6, 4)),
    "conv1d-first": (Layer("x", "Conv1d", "x.w", (3, 4, 2), (0,), (1,)), (5, 3, 6)),
    "transposed": (
        Layer("x", "ConvTranspose1d", "x.w", (4, 3, 2), (1,), (0,), groups=2, grouped="out"),
        (5, 6, 7),
    ),
    "heads": (Layer("x", "Linear", "x.w", (4, 2, 3), (1, 2), (0,)), (5, 7, 2, 3)),
    "scanned": (Layer("x", "Linear", "x.w", (2, 4, 3), (2,), (1,), (0,)), (2, 5, 7, 3)),
    "moved": (
        Layer("x", "Linear", "x.w", (3, 2, 4), (0, 1), (2,), output_axes=(-1, -3)),
        (5, 2, 7, 3),
    ),
    "norm-first": (Layer("x", "BatchNorm2d", "x.w", (3,), (0,), output_axes=(1,)), (5, 3, 6, 4)),
}
KINDS |= {
    # Large enough to be summed in chunks; the last is smaller.
    "large-linear": (KINDS["linear"][0], (30_011, 3)),
    "large-last": (KINDS["conv-last"][0], (37, 31, 19, 3)),
    "large-first": (KINDS["conv-first"][0], (37, 3, 31, 19)),
    "large-images": (KINDS["conv-first"][0], (2, 3, 131, 121)),
    "large-scanned": (KINDS["scanned"][0], (2, 41, 211, 3)),
    "large-moved": (KINDS["moved"][0], (21, 2, 311, 3)),
}
NAMED = {
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "identity": lambda x: x,
    np.abs: np.abs,
}


def integers(shape, seed=0):
    """Outputs whose sums are exact in float32; some are zero, and some exceed 6."""
    return np.random.default_rng(seed).integers(-9, 10, shape).astype(np.float32)


def params_of(*layers):
    return {layer.weight: np.ones(layer.shape, np.float32) for layer in layers}


def counted(layer, x, act):
    """What the statistics of one output must be, as flat lists over members and channels."""
    axes = layer.output_axes
    y = np.moveaxis(act(x.astype(np.float64)), axes, range(len(axes)))
    y = y.reshape(-1, *y.shape[len(axes) :])  # (members * channels, *positions)
    rest = tuple(range(1, y.ndim))
    return {
        "samples": y.shape[1] if y.ndim > 1 else 1,
        "positions": y[0].size,
        "zeros": np.sum(y == 0, rest),
        "sums": np.sum(y, rest),
        "magnitudes": np.sum(np.abs(y), rest),
        "squares": np.sum(y * y, rest),
    }


@FRAMEWORKS
@pytest.mark.parametrize(
    ("kind", "activation"),
    [*((kind, "relu") for kind in KINDS), *(("conv-last", act) for act in NAMED if act != "relu")],
)
def test_activations_are_counted_per_channel(framework, kind, activation):
    layer, shape = KINDS[kind]
    x = integers(shape)
    act = activation
    if callable(activation):
        act = {as_jax: jnp.abs, as_torch: torch.abs}[framework]
    stats = activations.init(framework(params_of(layer)), [layer])
    stats = activations.update(stats, framework({"x": x}), [layer], activation=act)
    members = int(np.prod([layer.shape[a] for a in layer.stack_axes]))
    for field, expected in counted(layer, x, NAMED[activation]).items():
        got = number(getattr(stats, field)["x"])
        assert got.shape == (
            ()
            if field in ("samples", "positions")
            else (members, 6 // members)
            if np.size(expected) == 6
            else (1, 3)
        )
        np.testing.assert_array_equal(got.reshape(-1), expected)


@FRAMEWORKS
def test_the_activations_of_nni_on_paper(framework):
    layer = Layer("x", "Conv2d", "x.w", (3, 1, 1, 1), (0,), (1,))
    x = [
        [[[1, -1], [2, -2]], [[-1, -1], [-1, 3]], [[0.5, 0.5], [0.5, 0.5]]],
        [[[0, 0], [1, -1]], [[1, 1], [-1, -1]], [[2, -9], [2, 2]]],
    ]
    stats = activations.init(framework(params_of(layer)), [layer])
    outputs = framework({"x": np.asarray(x, np.float32)})
    stats = activations.update(stats, outputs, [layer], activation="relu")
    zeros, positions, sums = (number(t["x"]) for t in (stats.zeros, stats.positions, stats.sums))
    assert (1 - zeros / positions).tolist() == [[0.375, 0.375, 0.875]]
    assert (sums / positions).tolist() == [[0.5, 0.625, 1.0]]
    assert number(stats.samples["x"]) == 2


@FRAMEWORKS
def test_gelu_is_the_exact_one_and_zero_at_zero_only(framework):
    layer = Layer("x", "Linear", "x.w", (4, 8), (1,), (0,))
    x = np.array([[-9.0, -6.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 9.0]], np.float32)
    expected = [[0.5 * v * math.erfc(-v * 0.5**0.5) for v in x[0].tolist()]]
    stats = activations.init(framework(params_of(layer)), [layer])
    stats = activations.update(stats, framework({"x": x}), [layer], activation="gelu")
    np.testing.assert_allclose(number(stats.sums["x"]), expected, rtol=1e-5)
    assert number(stats.zeros["x"]).tolist() == [[0, 0, 0, 0, 1, 0, 0, 0]]


@FRAMEWORKS
def test_a_layer_called_several_times_counts_all_its_outputs(framework):
    layer, _ = KINDS["sequence"]
    first, second = integers((5, 7, 3)), integers((2, 3), 1)
    start = activations.init(framework(params_of(layer)), [layer])
    several = {"x": [*framework({"0": first, "1": second}).values()], "unwatched": "ignored"}
    stats = activations.update(start, several, [layer], activation="relu")
    for x in several["x"]:
        start = activations.update(start, {"x": x}, [layer], activation="relu")
    assert_equal_stats(stats, start)
    assert (number(stats.samples["x"]), number(stats.positions["x"])) == (7, 37)


def test_a_config_stands_for_the_layers_that_it_prunes():
    a, b = (Layer(n, "Linear", f"{n}.w", (4, 3), (1,), (0,)) for n in "ab")
    config = pp.resolve([{"op_names": ["b"], "sparsity": 0.5}], [a, b])
    stats = activations.init(as_jax(params_of(a, b)), config)
    stats = activations.update(stats, {"b": jnp.ones((2, 3))}, config, activation="relu")
    assert set(stats.sums) == {"b"}


# Gradients.

LAYERS = (
    Layer("conv", "Conv2d", "conv.w", (3, 3, 4, 8), (3,), (2,)),
    Layer("grouped", "Conv2d", "grouped.w", (3, 3, 2, 6), (3,), (2,), groups=2),
    Layer("stack", "Linear", "stack.w", (3, 6, 5), (2,), (1,), stack_axes=(0,)),
    Layer("inner", "Linear", "inner.w", (5, 5, 5), (0,), (2,), stack_axes=(1,)),
    Layer("norm", "BatchNorm2d", "norm.w", (7,), (0,)),
)
GRANULARITIES = ["element", "output_channel", Block((3, 2))]


def config_of(layers, granularity="element"):
    rules = [{"op_names": [layer.name for layer in layers]}]
    return pp.resolve(rules, layers, granularity=granularity)


def steps(n=3):
    for i in range(n):
        rng = np.random.default_rng(i)
        yield tuple(
            {x.weight: rng.integers(-9, 10, x.shape).astype(np.float32) for x in LAYERS}
            for _ in "wg"
        )


@FRAMEWORKS
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_gradients_are_summed_per_unit(framework, granularity):
    layers = LAYERS[:-1] if isinstance(granularity, Block) else LAYERS
    config = config_of(layers, granularity)
    expected = {kind: {x.name: 0.0 for x in layers} for kind in gradients.KEPT}
    stats = gradients.init(framework(params_of(*LAYERS)), config, keep=gradients.KEPT)
    for params, grads in steps():
        stats = gradients.update(stats, framework(params), framework(grads), config)
        for x in layers:
            term = params[x.weight].astype(np.float64) * grads[x.weight]
            unit = oracle.unit_sums(term, x, granularity)
            expected["squares"][x.name] += oracle.unit_sums(term**2, x, granularity)
            expected["grouped"][x.name] += unit**2
            expected["signed"][x.name] += unit
    assert number(stats.steps) == 3
    for kind, totals in expected.items():
        for layer in layers:
            got = number(getattr(stats, kind)[layer.name])
            if got.shape == layer.shape:
                got = oracle.unit_sums(got, layer, "element" if got.size > 7 else granularity)
            np.testing.assert_array_equal(got, totals[layer.name])


def test_only_what_is_asked_for_is_kept_and_only_per_unit():
    config = config_of(LAYERS, "output_channel")
    stats = gradients.init(as_jax(params_of(*LAYERS)), config)
    assert (stats.grouped, stats.signed) == ({}, {})
    shapes = {name: total.high.shape for name, total in stats.squares.items()}
    assert shapes == {
        "conv": (1, 8),
        "grouped": (1, 6),
        "stack": (3, 5),
        "inner": (5, 5),
        "norm": (7,),
    }
    ((params, grads),) = steps(1)
    stats = gradients.update(stats, as_jax(params), as_jax(grads), config)
    assert (stats.grouped, stats.signed) == ({}, {})


def test_half_precision_is_multiplied_in_float32():
    config = config_of(LAYERS[:1])
    ((params, grads),) = steps(1)
    half = [
        {p: x.astype(jnp.bfloat16) / jnp.bfloat16(3) for p, x in t.items()} for t in (params, grads)
    ]
    single = [{p: x.astype(np.float32) for p, x in t.items()} for t in half]
    for framework in (as_jax, as_torch):
        got, expected = (
            gradients.update(
                gradients.init(framework(params), config), *map(framework, pair), config
            )
            for pair in (half, single)
        )
        assert_equal_stats(got, expected)


# Nothing drifts.


def test_a_million_updates_count_a_million():
    layer = Layer("x", "Linear", "x.w", (1, 1), (1,), (0,))
    outputs = {"x": jnp.ones((1, 1))}
    start = activations.init(outputs | {"x.w": outputs["x"]}, [layer])

    @functools.partial(jax.jit, static_argnums=1)
    def run(x, n):
        def step(_, stats):
            return activations.update(stats, {"x": x}, [layer], activation="relu")

        return jax.lax.fori_loop(0, n, step, start)

    ones = numbers(run(jnp.ones((1, 1)), 10**6))
    assert {field: float(v["x"].item()) for field, v in ones.items()} == {
        "samples": 1e6, "positions": 1e6, "zeros": 0, "sums": 1e6, "magnitudes": 1e6, "squares": 1e6
    }  # fmt: skip
    tenths = run(jnp.full((1, 1), 0.1), 10**6)
    assert abs(float(value(tenths.sums["x"])[0, 0]) / 1e5 - 1) < 1e-6
    assert abs(float(value(tenths.squares["x"])[0, 0]) / 1e4 - 1) < 1e-6
    # A plain float32 total is off by a percent.
    plain = jax.lax.fori_loop(0, 10**6, lambda _, t: t + jnp.float32(0.1), jnp.float32(0))
    assert abs(float(plain) / 1e5 - 1) > 1e-3


def test_a_million_gradients_count_a_million():
    layer = Layer("x", "Linear", "x", (1, 1), (1,), (0,))
    config = pp.resolve([{"op_types": ["Linear"]}], [layer])
    params, grads = {"x": jnp.full((1, 1), 0.5)}, {"x": jnp.full((1, 1), 0.2)}
    start = gradients.init(params, config, keep=["squares", "signed"])
    stats = jax.lax.fori_loop(
        0, 10**6, lambda _, s: gradients.update(s, params, grads, config), start
    )
    assert number(stats.steps) == 10**6
    assert abs(number(stats.signed["x"])[0, 0] / 1e5 - 1) < 1e-6
    assert abs(number(stats.squares["x"])[0, 0] / 1e4 - 1) < 1e-6


@FRAMEWORKS
def test_counts_are_exact_and_sums_exact_enough_beyond_the_floats(framework):
    layer = Layer("x", "Linear", "x.w", (1, 1), (1,), (0,))
    stats = activations.init(framework(params_of(layer)), [layer])
    much = framework({"x": np.full((1, 1), 2.0**30, np.float32)})
    stats = activations.update(stats, much, [layer], activation="relu")
    for _ in range(8):  # two to the eighth times what there is: 2**38 in all
        stats = activations.merge(stats, stats)
    one = framework({"x": np.zeros((1, 1), np.float32), "y": np.ones((1, 1), np.float32)})
    for _ in range(3):
        stats = activations.update(stats, one, [layer], activation="relu")
        stats = activations.update(stats, {"x": one["y"]}, [layer], activation="relu")
    assert number(stats.sums["x"]).tolist() == [[2.0**38 + 3]]
    assert number(stats.zeros["x"]).tolist() == [[3]]
    assert number(stats.positions["x"]) == 2**8 + 6
    for _ in range(30):
        stats = activations.merge(stats, stats)
    assert number(stats.positions["x"]) == (2**8 + 6) * 2**30
    assert number(stats.zeros["x"]).tolist() == [[3 * 2**30]]


def test_an_infinite_total_stays_infinite_and_nan_stays_nan():
    inf, one = CompensatedSum(jnp.float32(jnp.inf), jnp.float32(0)), jnp.float32(1)
    add = pp.stats.accumulate.add
    assert value(add(inf, one)) == jnp.inf
    assert value(add(CompensatedSum(one, one * 0), jnp.float32(-jnp.inf))) == -jnp.inf
    assert jnp.isnan(value(add(inf, jnp.float32(-jnp.inf))))
    assert jnp.isnan(value(add(CompensatedSum(one, one * 0), jnp.float32(jnp.nan))))


# Merging.


def halves(framework, seed):
    """Statistics of floats over one layer, of parts of a data set."""
    layer, shape = KINDS["conv-last"]
    x = np.random.default_rng(seed).normal(size=(8, *shape[1:])).astype(np.float32)
    start = activations.init(framework(params_of(layer)), [layer])
    parts = [framework({"x": p}) for p in np.split(x, 4)]
    return (
        start,
        [activations.update(start, p, [layer], activation="relu") for p in parts],
        layer,
        x,
    )


@FRAMEWORKS
def test_merging_is_counting_on(framework):
    start, (a, b, c, _), layer, x = halves(framework, 0)
    outputs = framework({"x": x[2:4]})
    assert_equal_stats(
        activations.merge(a, b), activations.update(a, outputs, [layer], activation="relu")
    )
    assert_equal_stats(activations.merge(a, start), a)
    assert_equal_stats(activations.merge(a, b), activations.merge(b, a))
    left = activations.merge(activations.merge(a, b), c)
    right = activations.merge(a, activations.merge(b, c))
    assert_equal_stats(left, right, rtol=1e-13)
    assert numbers(left)["zeros"]["x"].tolist() == numbers(right)["zeros"]["x"].tolist()
    # Leaf by leaf is as good, but for the rounding of float32.
    added = jax.tree.map(lambda x, y: x + y, a, b)
    assert_equal_stats(added, activations.merge(a, b), rtol=2e-7)
    assert (
        numbers(added)["zeros"]["x"].tolist()
        == numbers(activations.merge(a, b))["zeros"]["x"].tolist()
    )


@FRAMEWORKS
def test_merging_gradients_is_counting_on(framework):
    config = config_of(LAYERS, "output_channel")
    start = gradients.init(framework(params_of(*LAYERS)), config, keep=["squares", "signed"])
    parts, whole = [], start
    for params, grads in steps(2):
        parts.append(gradients.update(start, framework(params), framework(grads), config))
        whole = gradients.update(whole, framework(params), framework(grads), config)
    a, b = parts
    assert_equal_stats(gradients.merge(a, b), whole)
    assert_equal_stats(gradients.merge(b, a), whole)
    assert number(gradients.merge(a, b).steps) == 2


DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
import purepruning as pp
from purepruning import Layer
from purepruning.stats import activations, gradients
from purepruning.stats.accumulate import CompensatedSum, WideCount

assert jax.device_count() == 8
mesh = jax.make_mesh((8,), ("data",))
layer = Layer("x", "Linear", "x.w", (4, 3), (1,), (0,))
config = pp.resolve([{"op_types": ["Linear"]}], [layer], granularity="output_channel")
rng = np.random.default_rng(0)
params = {"x.w": jnp.asarray(rng.integers(-5, 6, (4, 3)).astype(np.float32))}
data = jnp.asarray(rng.integers(-5, 6, (64, 10, 4)).astype(np.float32))

def count(data):
    acts, grads = activations.init(params, config), gradients.init(params, config)
    def step(carry, x):
        acts, grads = carry
        acts = activations.update(acts, {"x": x @ params["x.w"]}, config, activation="relu")
        grad = jax.grad(lambda p: jnp.sum((x @ p["x.w"]) ** 2))(params)
        return (acts, gradients.update(grads, params, grad, config)), None
    return jax.lax.scan(step, (acts, grads), data)[0]

@jax.jit
@jax.shard_map(mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=False)
def everywhere(data):
    return jax.lax.psum(count(data), "data")

shards = jax.device_put(data, jax.NamedSharding(mesh, P("data")))
alone, together = jax.jit(count)(data), everywhere(shards)
def same(a, b):
    is_total = lambda x: isinstance(x, (WideCount, CompensatedSum))
    for x, y in zip(*(jax.tree.leaves(t, is_leaf=is_total) for t in (a, b)), strict=True):
        unit = 2**20 if isinstance(x, WideCount) else 1
        x, y = (np.asarray(t[0], float) * unit + t[1] for t in (x, y))
        # Small integers are added exactly; large floats are rounded once by each device.
        np.testing.assert_allclose(x, y, rtol=0 if np.all(y < 2**24) else 8 * 2**-24)

same(together, alone)

# One batch over all devices needs no merging.
start, x = activations.init(params, config), {"x": shards @ params["x.w"]}
update = lambda stats, x: activations.update(stats, x, config, activation="relu")
for run in (update, jax.jit(update)):
    got = run(start, x)
    assert int(got.samples["x"].low) == 64  # axis 0 holds what was 64 steps of 10 samples
    same(got[1:], alone[0][1:])
acts, grads = together
assert int(acts.samples["x"].low) == 640 and int(grads.steps.low) == 64
print("merged")
"""

PROCESSES = """
import sys, numpy as np, torch, torch.distributed as dist
import jax
from purepruning import Layer
from purepruning.stats import activations

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
layer = Layer("x", "Conv2d", "x.w", (3, 4, 2, 2), (0,), (1,))
x = np.random.default_rng(0).integers(-5, 6, (8, 3, 5, 5)).astype(np.float32)
start = activations.init({"x.w": torch.ones(3, 4, 2, 2)}, [layer])

def count(x):
    return activations.update(start, {"x": torch.from_numpy(x)}, [layer], activation="relu")

mine = count(x[rank::2])
for tensor in jax.tree.leaves(mine):
    dist.all_reduce(tensor)
for got, expected in zip(jax.tree.leaves(mine), jax.tree.leaves(count(x)), strict=True):
    assert torch.equal(got, expected), (got, expected)
assert int(mine.samples["x"].low) == 8
dist.destroy_process_group()
print("merged")
"""


def launch(code, *args, **env):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **env},
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.strip() == "merged"


def test_devices_merge_by_psum():
    flags = "--xla_force_host_platform_device_count=8"
    finish(launch(DEVICES, XLA_FLAGS=flags, JAX_PLATFORMS="cpu"))


def test_processes_merge_by_all_reduce(tmp_path):
    env = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    for process in [launch(PROCESSES, rank, tmp_path / "meet", **env) for rank in range(2)]:
        finish(process)


# Run modes.


def seen(xs):
    layer, _ = KINDS["conv-last"]
    stats = activations.init(params_of(layer), [layer])
    return activations.update(stats, {"x": xs}, [layer], activation="relu")


def stepped(params, grads):
    config = config_of(LAYERS, "output_channel")
    stats = gradients.init(params, config, keep=gradients.KEPT)
    return gradients.update(stats, params, grads, config)


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_activations_are_the_same_in_every_run_mode():
    layer, shape = KINDS["conv-last"]
    xs = np.stack([integers(shape, seed) for seed in range(3)])
    eager = [seen(jnp.asarray(x)) for x in xs]
    mapped, jitted = jax.vmap(seen)(jnp.asarray(xs)), jax.jit(seen)
    start = activations.init(as_torch(params_of(layer)), [layer])

    def seen_in_torch(x):
        return activations.update(start, {"x": x}, [layer], activation="relu")

    batched = torch.func.vmap(seen_in_torch)(torch.from_numpy(xs))
    for i, x in enumerate(xs):
        assert_same_bits(jitted(jnp.asarray(x)), eager[i])
        assert_same_bits(jax.tree.map(lambda t, i=i: t[i], mapped), eager[i])
        assert_same_bits(seen_in_torch(torch.from_numpy(x)), eager[i])
        assert_same_bits(jax.tree.map(lambda t, i=i: t[i], batched), eager[i])

    def step(stats, x):
        return activations.update(stats, {"x": x}, [layer], activation="relu"), None

    scanned, _ = jax.lax.scan(step, activations.init(params_of(layer), [layer]), jnp.asarray(xs))
    assert_same_bits(scanned, functools.reduce(activations.merge, eager))


def test_gradients_are_the_same_in_every_run_mode():
    pairs = list(steps(3))
    stack = [{p: np.stack([pair[i][p] for pair in pairs]) for p in pairs[0][i]} for i in range(2)]
    mapped = jax.vmap(stepped)(*map(as_jax, stack))
    batched = torch.func.vmap(stepped)(*map(as_torch, stack))
    for i, pair in enumerate(pairs):
        eager = stepped(*map(as_jax, pair))
        assert_same_bits(jax.jit(stepped)(*map(as_jax, pair)), eager)
        assert_same_bits(stepped(*map(as_torch, pair)), eager)
        assert_same_bits(jax.tree.map(lambda t, i=i: t[i], mapped), eager)
        assert_same_bits(jax.tree.map(lambda t, i=i: t[i], batched), eager)


def test_random_gradients_give_the_same_bits_in_every_framework():
    rng = np.random.default_rng(0)
    pair = [{x.weight: rng.normal(size=x.shape).astype(np.float32) for x in LAYERS} for _ in "wg"]
    # The products are rounded one by one; sums within a unit are exact.
    eager = stepped(*map(as_jax, pair))
    assert_same_bits(jax.jit(stepped)(*map(as_jax, pair)), eager)
    assert_same_bits(stepped(*map(as_torch, pair)), eager)


def test_statistics_can_be_donated():
    layer, shape = KINDS["conv-last"]

    @functools.partial(jax.jit, donate_argnums=0)
    def step(stats, x):
        return activations.update(stats, {"x": x}, [layer], activation="relu")

    stats = activations.init(as_jax(params_of(layer)), [layer])
    stats = step(step(stats, jnp.ones(shape)), jnp.ones(shape))
    assert number(stats.samples["x"]) == 10


def test_no_gradient_flows_and_no_history_is_kept():
    layer, shape = KINDS["sequence"]
    x = torch.ones(shape, requires_grad=True)
    start = activations.init(as_torch(params_of(layer)), [layer])
    stats = activations.update(start, {"x": x * 2}, [layer], activation="relu")
    assert not any(t.requires_grad for t in jax.tree.leaves(stats))
    config = config_of(LAYERS[:1])
    params = {"conv.w": torch.ones(LAYERS[0].shape, requires_grad=True)}
    stats = gradients.update(gradients.init(params, config), params, params, config)
    assert not any(t.requires_grad for t in jax.tree.leaves(stats))

    def loss(x):
        start = activations.init(params_of(layer), [layer])
        return value(
            activations.update(start, {"x": x}, [layer], activation="relu").sums["x"]
        ).sum()

    assert not jax.grad(loss)(jnp.ones(shape)).any()


def test_arguments_are_not_changed():
    layer, shape = KINDS["sequence"]
    start = activations.init(as_torch(params_of(layer)), [layer])
    before = as_numpy(start.sums["x"]._asdict())
    activations.update(start, {"x": torch.ones(shape)}, [layer], activation="relu")
    np.testing.assert_equal(as_numpy(start.sums["x"]._asdict()), before)
    assert number(start.samples["x"]) == 0


# Bad input: an error that names the layer, and the statistics as they were.

A, B = (Layer(n, "Linear", f"{n}.w", (4, 3), (1,), (0,)) for n in "ab")
LSTM = Layer("lstm", "LSTM", "lstm.w", (8, 3), (0,), (1,))


def bad_outputs():
    ok = np.ones((5, 3), np.float32)
    nan, inf, low = ok.copy(), ok.copy(), ok.copy()
    nan[2, 1], inf[0, 0], low[4, 2] = np.nan, np.inf, -np.inf
    return {
        "nan": (nan, ValueError, "NaN or infinite"),
        "inf": (inf, ValueError, "NaN or infinite"),
        "minus-inf": (low, ValueError, "NaN or infinite"),
        "integer": (ok.astype(np.int32), TypeError, "int32"),
        "boolean": (ok > 0, TypeError, "bool"),
        "float16": (ok.astype(np.float16), TypeError, "float16"),
        "missing": (None, KeyError, "may not reach it"),
        "channels": (np.ones((5, 4), np.float32), ValueError, "(5, 4)"),
        "rank": (np.float32(1), ValueError, "()"),
    }


@FRAMEWORKS
@pytest.mark.parametrize("bad", bad_outputs())
def test_bad_outputs_name_the_layer_and_change_nothing(framework, bad):
    x, error, part = bad_outputs()[bad]
    start = activations.init(framework(params_of(A, B)), [A, B])
    first = activations.update(
        start, framework({"a": integers((5, 3)), "b": integers((5, 3))}), [A, B], activation="relu"
    )
    before = numbers(first)
    outputs = {"a": np.ones((5, 3), np.float32)} | ({} if x is None else {"b": x})
    with raises(error, "layer 'b'", part):
        activations.update(first, framework(outputs), [A, B], activation="relu")
    np.testing.assert_equal(numbers(first), before)


@FRAMEWORKS
def test_finite_outputs_whose_sum_is_not_are_no_error(framework):
    layer, _ = KINDS["linear"]
    outputs = framework({"x": np.full((2, 3), 3e38, np.float32)})
    stats = activations.init(framework(params_of(layer)), [layer])
    stats = activations.update(stats, outputs, [layer], activation="relu6")
    assert number(stats.sums["x"]).tolist() == [[12, 12, 12]]


@FRAMEWORKS
def test_batches_without_examples_count_nothing_and_alone_they_rank_nothing(framework):
    config = config_of([A, B], "output_channel").with_sparsity(0.4)
    params = framework(params_of(A, B))
    outputs = framework({"a": integers((5, 3)), "b": np.zeros((0, 3), np.float32)})
    stats = activations.init(params, config)
    stats = activations.update(stats, outputs, config, activation="relu")
    assert (number(stats.samples["b"]), number(stats.positions["b"])) == (0, 0)
    with raises(ValueError, "apoz_rank", "layer 'b'", "empty"):
        pp.apoz_rank(params, stats, config)


def test_bfloat16_and_float64_outputs_are_counted_in_float32():
    layer, shape = KINDS["sequence"]
    x = integers(shape)
    expected = seen_as(layer, torch.from_numpy(x))
    for dtype in (torch.bfloat16, torch.float64):
        assert_same_bits(seen_as(layer, torch.from_numpy(x).to(dtype)), expected)


def seen_as(layer, x):
    start = activations.init({layer.weight: torch.ones(layer.shape)}, [layer])
    return activations.update(start, {"x": x}, [layer], activation="identity")


def test_bad_arguments_of_activation_statistics():
    params = as_jax(params_of(A, B, LSTM))
    stats, outputs = activations.init(params, [A]), {"a": jnp.ones((5, 3)), "b": jnp.ones((5, 3))}
    with raises(ValueError, "'swish'", "'relu'", "'gelu'"):
        activations.update(stats, outputs, [A], activation="swish")
    with raises(KeyError, "layer 'b'"):
        activations.update(stats, outputs, [A, B], activation="relu")
    with raises(ValueError, "layer 'a'", "elementwise", "(5,)"):
        activations.update(stats, outputs, [A], activation=lambda x: x[:, 0])
    with raises(TypeError, "layer 'a'", "tuple"):
        activations.update(stats, {"a": (jnp.ones((5, 3)),)}, [A], activation="relu")
    with raises(TypeError, "every row must be a Layer", "'a'"):
        activations.init(params, ["a"])
    with raises(KeyError, "layer 'a'", "'a.w'"):
        activations.init(as_jax(params_of(B)), [A])
    with raises(ValueError, "layer 'lstm'", "LSTM"):
        activations.init(params, [LSTM])
    other = Layer("a", "Linear", "a.w", (4, 7), (1,), (0,))
    with raises(ValueError, "layer 'a'", "(1, 3)", "(1, 7)", "another model"):
        activations.update(stats, {"a": jnp.ones((5, 7))}, [other], activation="relu")
    wide = activations.init(as_jax(params_of(other)), [other])
    with raises(ValueError, "layer 'a'", "(1, 3)", "(1, 7)"):
        activations.merge(stats, wide)
    with raises(ValueError, "layer 'b'"):
        activations.merge(stats, activations.init(params, [A, B]))


def test_bad_arguments_of_gradient_statistics():
    config = pp.resolve([{"op_types": ["Linear"]}], [A, B])
    params = as_jax(params_of(A, B))
    stats = gradients.init(params, config)
    nan = params | {"b.w": params["b.w"].at[1, 1].set(jnp.nan)}
    inf = params | {"b.w": params["b.w"].at[1, 1].set(jnp.inf)}
    before = numbers(stats)
    for weights, grads in ((params, nan), (params, inf), (nan, params)):
        with raises(ValueError, "layer 'b'", "NaN or infinite"):
            gradients.update(stats, weights, grads, config)
        with raises(ValueError, "layer 'b'", "NaN or infinite"):
            gradients.update(stats, *(as_torch(as_numpy(t)) for t in (weights, grads)), config)
    with raises(KeyError, "layer 'b'", "gradients", "'b.w'"):
        gradients.update(stats, params, {"a.w": params["a.w"]}, config)
    tensors = as_torch(params_of(A, B))
    with raises(KeyError, "layer 'b'", "gradients", "'b.w'"):  # not reached by the loss
        gradients.update(stats, tensors, {**tensors, "b.w": None}, config)
    with raises(TypeError, "layer 'b'", "int32"):
        gradients.update(stats, params, params | {"b.w": jnp.ones((4, 3), jnp.int32)}, config)
    with raises(ValueError, "layer 'b'", "(3, 4)", "(4, 3)"):
        gradients.update(stats, params, params | {"b.w": jnp.ones((3, 4))}, config)
    channels = pp.resolve([{"op_types": ["Linear"]}], [A, B], granularity="output_channel")
    with raises(ValueError, "layer 'a'", "(4, 3)", "(1, 3)", "granularity"):
        gradients.update(stats, params, params, channels)
    one = pp.resolve([{"op_names": ["a"]}], [A, B])
    with raises(KeyError, "layer 'b'"):
        gradients.update(gradients.init(params, one), params, params, config)
    with raises(ValueError, "keep", "'sums'"):
        gradients.init(params, config, keep=["sums"])
    with raises(ValueError, "keep"):
        gradients.init(params, config, keep=[])
    with raises(ValueError, "signed", "layer 'a'"):
        gradients.merge(stats, gradients.init(params, config, keep=["squares", "signed"]))
    np.testing.assert_equal(numbers(stats), before)


def test_nan_under_jit_goes_into_the_totals():
    layer, shape = KINDS["sequence"]
    x = integers(shape)
    x[0, 0, 1] = np.nan

    @jax.jit
    def run(x):
        start = activations.init(params_of(layer), [layer])
        return activations.update(start, {"x": x}, [layer], activation="relu6")

    sums = number(run(jnp.asarray(x)).sums["x"])
    assert np.isnan(sums).tolist() == [[False, True, False]]
