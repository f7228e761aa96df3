"""Observers: what they see, that merging is associative, and data-parallel sums."""

import itertools
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import purepruning as pp
from purepruning.quantize import observers, ptq, qat
from purepruning.quantize.observers import Range
from tests.messages import raises

F = np.float32
PARAMS = {"fc.w": np.zeros((2, 3), F)}
LAYER = pp.make_layer(PARAMS, "fc.w", "Linear", name="fc", out_axes=0, in_axes=1)
CONFIG = pp.resolve_quantization({"quant_types": ["input"], "quant_bits": 8}, [LAYER])
SITE = "fc:input"
RNG = np.random.default_rng(0)
BATCHES = [(RNG.normal(size=50) * 3 ** RNG.normal()).astype(F) for _ in range(6)]
KINDS = ("min_max", "moving_average", "histogram")
FRAMEWORKS = {"numpy": np.asarray, "jax": jnp.asarray, "torch": torch.tensor}
frameworks = pytest.mark.parametrize("framework", FRAMEWORKS)


def observed(kind, batches, as_array=jnp.asarray):
    params = {"fc.w": as_array(PARAMS["fc.w"])}
    state = observers.init(params, CONFIG, kind)
    for x in batches:
        value, seen = observers.watch(state, CONFIG)[SITE](as_array(x))
        np.testing.assert_array_equal(np.asarray(value), x)
        state = observers.update(state, {SITE: seen}, CONFIG)
    return state


def leaves(state):
    return [np.asarray(x) for x in jax.tree.leaves(state)]


@frameworks
def test_min_max(framework):
    state = observed("min_max", BATCHES, FRAMEWORKS[framework])
    whole = np.concatenate(BATCHES)
    assert [float(x) for x in state[SITE]] == [whole.min(), whole.max()]
    found = observers.ranges(state)[SITE]
    assert [float(x) for x in found] == [whole.min(), whole.max()]


@frameworks
def test_moving_average_by_hand(framework):
    state = observed("moving_average", BATCHES, FRAMEWORKS[framework])
    low, high = BATCHES[0].min(), BATCHES[0].max()
    for x in BATCHES[1:]:
        low, high = 0.99 * low + 0.01 * x.min(), 0.99 * high + 0.01 * x.max()
    found = observers.ranges(state)[SITE]
    np.testing.assert_allclose([float(x) for x in found], [low, high], rtol=1e-6)


@frameworks
def test_histogram_counts_on_a_fixed_grid(framework):
    state = observed("histogram", BATCHES, FRAMEWORKS[framework])
    whole = np.sort(np.concatenate(BATCHES))
    low, high = (float(x) for x in observers.ranges(state)[SITE])
    assert whole[0] * (1 + 1 / 32) <= low <= whole[0]
    assert whole[-1] <= high <= whole[-1] * (1 + 1 / 32)
    low, high = (float(x) for x in observers.ranges(state, coverage=0.9)[SITE])
    for bound, number in ((-low, -whole[15]), (high, whole[-16])):  # 5 % of 300 on either side
        assert number <= bound * (1 + 1e-6)
        assert bound <= number * (1 + 2 / 32)


def test_histograms_have_the_same_bins_everywhere():
    """At the edges of bins too, and for numbers beyond the grid."""
    edges = np.float32([0, 2.0**-32, 2.0**-33, 1, 1 + 1 / 32, 2, 2.0**31, 2.0**40])
    x = np.concatenate([edges, -edges, np.nextafter(edges, F(0)), [F(-0.0)]]).astype(F)
    found = [leaves(observed("histogram", [x], as_array)) for as_array in FRAMEWORKS.values()]
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(a, b)
    assert sum(map(np.sum, found[0])) == len(x)


@pytest.mark.parametrize("kind", KINDS)
def test_merge_is_associative_and_commutative(kind):
    a, b, c = (observed(kind, BATCHES[i : i + 2]) for i in (0, 2, 4))
    results = [
        observers.merge(observers.merge(x, y), z) for x, y, z in itertools.permutations((a, b, c))
    ]
    results += [
        observers.merge(a, observers.merge(b, c)),
        observers.merge(c, observers.merge(a, b)),
    ]
    for found in results[1:]:
        for x, y in zip(leaves(results[0]), leaves(found), strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-7)
    if kind != "moving_average":
        for x, y in zip(leaves(results[0]), leaves(observed(kind, BATCHES)), strict=True):
            np.testing.assert_array_equal(x, y)
    empty = observed(kind, [])
    for x, y in zip(leaves(observers.merge(a, empty)), leaves(a), strict=True):
        np.testing.assert_array_equal(x, y)


def test_merged_averages_are_the_mean_of_all_replicas_and_go_on():
    a, b, c = (observed("moving_average", BATCHES[i : i + 2])[SITE] for i in (0, 2, 4))
    merged = observers.merge_one(observers.merge_one(a, b), c)
    assert float(merged.weight) == 3
    found = observers.bounds(merged)
    np.testing.assert_allclose(found.high, (a.high + b.high + c.high) / 3, rtol=1e-6)
    after = observers.bounds(observers.after(merged, Range(F(-2), F(5))))
    np.testing.assert_allclose(after.high, 0.99 * found.high + 0.01 * 5, rtol=1e-6)
    np.testing.assert_allclose(after.low, 0.99 * found.low - 0.01 * 2, rtol=1e-6)


def test_what_was_never_seen_has_no_range():
    for kind in KINDS:
        found = observers.ranges(observed(kind, []))[SITE]
        assert [float(x) for x in found] == [0, 0]


def test_nan_is_not_hidden():
    for kind in ("min_max", "moving_average"):
        found = observers.ranges(observed(kind, [np.array([1, np.nan], F)]))[SITE]
        assert all(np.isnan(float(x)) for x in found)


def test_calls_of_one_layer_and_steps_of_a_loop_are_one_batch():
    state = observed("moving_average", [])
    seen = [
        Range(jnp.float32(-1), jnp.float32(2)),
        Range(jnp.array([-3.0, 0]), jnp.array([1.0, 5])),
    ]
    state = observers.update(state, {SITE: seen}, CONFIG)
    assert [float(x) for x in state[SITE]] == [-3, 5, 1]


def test_mistakes_are_named():
    state = observed("min_max", BATCHES)
    with raises(KeyError, "observers.update", "'fc:input'", "'fd:input'"):
        observers.update(state, {"fd:input": None}, CONFIG)
    with raises(ValueError, "coverage", "kind='histogram'"):
        observers.ranges(state, coverage=0.9)
    with raises(ValueError, "coverage", "[0, 1]"):
        observers.ranges(state, coverage=1.5)
    with raises(ValueError, "observers.merge", "different sites or kinds"):
        observers.merge(state, observed("histogram", []))
    with raises(ValueError, "kind", "'min_max'"):
        observers.init(PARAMS, CONFIG, "max")
    advice = "{'op_names': ['fc'], 'quant_types': ['input'], 'exclude': True} behind rule 0"
    with raises(TypeError, "'fc:input'", "no array of floats", advice):
        observers.watch(state, CONFIG)[SITE](jnp.arange(3))
    with raises(KeyError, "ptq.activations: ranges", "'fc:input'", "give what observers.ranges"):
        ptq.activations({}, CONFIG)
    with raises(TypeError, "ptq.activations: ranges", "a mapping by site", "None"):
        ptq.activations(None, CONFIG)
    for of in (observers.watch, lambda state, config: observers.update(state, {}, config)):
        with raises(KeyError, "state", "'fc:input'", "'fd:input'", "give what observers.init"):
            of({"fd:input": state[SITE]}, CONFIG)
    nothing = qat.init(PARAMS, pp.quantize.QuantizationConfig())
    with raises(KeyError, "qat.activations: state.averages", "'fc:input'", "give what qat.init"):
        qat.activations(nothing, CONFIG)
    for init in (observers.init, qat.init):
        with raises(ValueError, "params hold no array", "an empty dict", "give the model's"):
            init({}, CONFIG)


def test_states_and_ranges_that_are_none_are_named():
    state, averages = observed("min_max", BATCHES), qat.init(PARAMS, CONFIG)
    found = Range(F(-1), F(1))
    for call, parts in [
        (lambda: observers.update(state, {SITE: 3}, CONFIG), ("seen['fc:input']", "give what rep")),
        (lambda: observers.update(state, {SITE: jnp.ones(3)}, CONFIG), ("seen['fc:input']",)),
        (lambda: observers.update({SITE: 3}, {SITE: found}, CONFIG), ("state['fc:input']", "3")),
        (lambda: observers.watch({SITE: 3}, CONFIG), ("watch: state['fc:input']",)),
        (lambda: observers.ranges(None), ("observers.ranges: state", "None")),
        (lambda: observers.ranges(averages), ("observers.ranges: state", "State")),
        (lambda: qat.update(averages, {SITE: "a"}, CONFIG), ("seen['fc:input']", "'a'")),
        (
            lambda: qat.activations(averages._replace(averages=state), CONFIG)[SITE],
            ("averages['fc",),
        ),
        (lambda: ptq.activations({SITE: (F(-1), F(1))}, CONFIG), ("ranges['fc:input']", "Range")),
        (lambda: ptq.activations(averages.averages, CONFIG), ("ranges['fc:input']", "Range")),
        (lambda: ptq.activation_levels({SITE: 3}, CONFIG), ("ptq.activation_levels: ranges",)),
    ]:
        with raises(TypeError, *parts):
            call()


def test_observers_of_sites_that_are_not_asked_for_stay():
    state = {**observed("min_max", BATCHES), "fd:input": Range(F(-1), F(1))}
    found = observers.update(state, {SITE: Range(F(-90), F(90))}, CONFIG)
    assert [float(x) for site in (SITE, "fd:input") for x in found[site]] == [-90, 90, -1, 1]


@frameworks
def test_ptq_uses_the_known_range(framework):
    as_array = FRAMEWORKS[framework]
    ranges = {SITE: Range(as_array(F(-1)), as_array(F(1.55)))}  # a scale of 0.01, zero at 100
    x = np.array([-3, -0.501, 0.014, 0.017, 2], F)
    y, found = ptq.activations(ranges, CONFIG)[SITE](as_array(x))
    np.testing.assert_allclose(np.asarray(y), [-1, -0.5, 0.01, 0.02, 1.55], rtol=1e-5)
    assert found is None


@pytest.mark.parametrize("kind", ["min_max", "moving_average", "histogram"])
def test_states_of_replicas_merge_by_collectives(kind):
    """Under ``vmap`` with a named axis; on devices of their own below, with ``--full``."""
    x = np.random.default_rng(0).normal(size=(3, 40)).astype(F)

    def observe(x):
        state = observers.init(jnp.zeros(1), CONFIG, kind)
        _, seen = observers.watch(state, CONFIG)[SITE](x)
        return observers.update(state, {SITE: seen}, CONFIG)

    def reduced(x):
        state = observe(x)
        if kind == "min_max":
            low, high = state[SITE]
            return {SITE: Range(jax.lax.pmin(low, "d"), jax.lax.pmax(high, "d"))}
        return jax.lax.psum(state, "d")

    merged = jax.jit(jax.vmap(reduced, axis_name="d", out_axes=None))(x)
    low, high = observers.ranges(merged)[SITE]
    wanted = np.array([x.min(1), x.max(1)])
    averaged = kind == "moving_average"  # of the ranges of replicas
    wanted = wanted.mean(1) if averaged else (wanted[0].min(), wanted[1].max())
    np.testing.assert_allclose((low, high), wanted, rtol=1 / 32 if kind == "histogram" else 1e-6)


def test_steps_of_replicas_are_that_of_the_whole_batch():
    x = np.random.default_rng(0).normal(size=(3, 40)).astype(F)
    start = qat.init(jnp.zeros(1), CONFIG)

    def step(state, x):
        _, seen = qat.activations(state, CONFIG)[SITE](x)
        seen = Range(jax.lax.pmin(seen.low, "d"), jax.lax.pmax(seen.high, "d"))
        return qat.update(state, {SITE: seen}, CONFIG)

    replicas = jax.jit(jax.vmap(step, (None, 0), None, axis_name="d"))
    found = replicas(replicas(start, x), 2 * x).averages[SITE]
    # NNI's average of the first batch and one of twice its range.
    np.testing.assert_allclose(
        (found.low, found.high), 1.01 * np.array([x.min(), x.max()]), rtol=1e-5
    )


PARALLEL = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
import purepruning as pp
from purepruning.quantize import observers, qat
params = {"w": jnp.zeros((2, 3))}
layer = pp.make_layer(params, "w", "Linear", name="fc", out_axes=0, in_axes=1)
config = pp.resolve_quantization({"quant_types": ["input"], "quant_bits": 8}, [layer])
x = jax.random.normal(jax.random.key(0), (8, 40))
mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

def one(x, kind):
    state = observers.init(params, config, kind)
    _, seen = observers.watch(state, config)["fc:input"](x)
    return observers.update(state, {"fc:input": seen}, config)

for kind in ("histogram", "moving_average"):
    merged = jax.jit(jax.shard_map(
        lambda x: jax.lax.psum(one(x[0], kind), "d"), mesh=mesh, in_specs=P("d"), out_specs=P(),
        check_vma=False,
    ))(x)
    wanted = one(x[0], kind)
    for row in x[1:]:
        wanted = observers.merge(wanted, one(row, kind))
    for a, b in zip(*(jax.tree.leaves(observers.ranges(s)) for s in (merged, wanted))):
        np.testing.assert_allclose(a, b, rtol=1e-6)

def extremes(x):
    found = one(x[0], "min_max")["fc:input"]
    return jax.lax.pmin(found.low, "d"), jax.lax.pmax(found.high, "d")

def step(state, x):
    at = qat.activations(state, config)
    seen = at["fc:input"](x)[1]
    seen = seen._replace(low=jax.lax.pmin(seen.low, "d"), high=jax.lax.pmax(seen.high, "d"))
    return qat.update(state, {"fc:input": seen}, config)

start = qat.init(params, config)
step = jax.jit(jax.shard_map(
    step, mesh=mesh, in_specs=(P(), P("d")), out_specs=P(), check_vma=False))
found = step(step(start, x), 2 * x)
for scale in (1, 2):
    seen = qat.activations(start, config)["fc:input"](scale * x)[1]
    start = qat.update(start, {"fc:input": seen}, config)
for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(start)):
    np.testing.assert_allclose(a, b, rtol=1e-6)

low, high = jax.jit(jax.shard_map(
    extremes, mesh=mesh, in_specs=P("d"), out_specs=P(), check_vma=False))(x)
assert (float(low), float(high)) == (float(x.min()), float(x.max()))
print("merged")
"""


@pytest.mark.full
def test_states_of_eight_devices_merge_by_psum():
    code = "import os\nos.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'\n"
    found = subprocess.run(
        [sys.executable, "-c", code + textwrap.dedent(PARALLEL)], capture_output=True, text=True
    )
    assert found.stdout == "merged\n", found.stderr


#: Two processes see halves of every batch. Whole states merge once; what was seen, in every step.
PROCESSES = """
import sys
import jax, numpy as np, torch
from torch import distributed
import purepruning as pp
from purepruning.quantize import observers, qat

rank, file = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
params = {"w": torch.zeros(2, 3)}
layer = pp.make_layer(params, "w", "Linear", name="fc", out_axes=0, in_axes=1)
config = pp.resolve_quantization({"quant_types": ["input"], "quant_bits": 8}, [layer])
batches = torch.randn(5, 2, 40, generator=torch.Generator().manual_seed(0))

def seen(at, x):
    return {"fc:input": at["fc:input"](x)[1]}

def observed(kind, parts):
    state = observers.init(params, config, kind)
    for x in parts:
        state = observers.update(state, seen(observers.watch(state, config), x), config)
    return state

def reduced(tree, lowest, highest):
    for name, x in tree["fc:input"]._asdict().items():
        for leaf in jax.tree.leaves(x):
            distributed.all_reduce(leaf, lowest if name == "low" else highest)
    return tree

Op = distributed.ReduceOp
for kind, ops in {
    "min_max": (Op.MIN, Op.MAX), "moving_average": (Op.SUM,) * 2, "histogram": (Op.SUM,) * 2,
}.items():
    merged = reduced(observed(kind, batches[:, rank]), *ops)
    wanted = observers.merge(*(observed(kind, batches[:, r]) for r in (0, 1)))
    for a, b in zip(*(jax.tree.leaves(observers.ranges(s)) for s in (merged, wanted))):
        np.testing.assert_allclose(a, b, rtol=1e-6)

state = whole = qat.init(params, config)
for halves in batches:
    found = reduced(seen(qat.activations(state, config), halves[rank]), Op.MIN, Op.MAX)
    state = qat.update(state, found, config)
    found = seen(qat.activations(whole, config), halves.reshape(-1))
    whole = qat.update(whole, found, config)
assert jax.tree.leaves(state) == jax.tree.leaves(whole)
print("merged", rank)
"""


def test_states_of_two_torch_processes_merge_by_all_reduce(tmp_path):
    command = [sys.executable, "-c", PROCESSES]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for rank, process in enumerate(started):
        out, errors = process.communicate(timeout=300)
        assert out == f"merged {rank}\n", errors
