"""Weights laid out over eight devices: the same masks, and no weight leaves its device.

The checks run in a subprocess in which the CPU counts as eight devices, all of them in one, since
starting JAX takes longer than any of them.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import purepruning as pp
from purepruning import NM, Layer, resolve
from purepruning.layers import Window
from purepruning.stats import inputs
from tests import oracle
from tests.covering import covered, covering
from tests.fast import compiled_quickly

ROOT = pathlib.Path(__file__).parent.parent
LAYERS = (
    Layer("a", "Linear", "a.w", (64, 48), (1,), (0,), bias="a.b"),
    Layer("b", "Conv2d", "b.w", (3, 3, 16, 32), (3,), (2,)),
    Layer("c", "Linear", "c.w", (4, 24, 16), (2,), (1,), stack_axes=(0,)),
)
SPECS = {
    "a.w": P("x", "y"),
    "a.b": P("y"),
    "b.w": P(None, None, "y", "x"),
    "c.w": P("x", None, "y"),  # stages of a pipeline
}
SAME = Window((1, 1), "SAME", (1, 1))
RULES = [{"op_types": ["default"], "sparsity": 0.4}]


def weights():
    rng = np.random.default_rng(0)
    params = {x.weight: rng.integers(-30, 30, x.shape).astype(np.float32) for x in LAYERS}
    return params | {"a.b": np.ones(48, np.float32)}


def sharded(axes):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(getattr(AxisType, axes),) * 2)
    layout = {path: NamedSharding(mesh, spec) for path, spec in SPECS.items()}
    return mesh, jax.device_put({p: jnp.asarray(x) for p, x in weights().items()}, layout)


def expected(granularity, scope, config):
    params = weights()
    rows = {x.name: oracle.unit_sums(np.abs(params[x.weight]), x, granularity) for x in LAYERS}
    if scope == "layer":
        pruned = {
            x.name: np.stack([oracle.lowest(r, config.counts[x.name]) for r in rows[x.name]])
            for x in LAYERS
        }
    else:
        every = [r for x in LAYERS for r in rows[x.name]]
        caps = [
            cap for x, cap in zip(LAYERS, config.pools[0].caps, strict=True) for _ in rows[x.name]
        ]
        costs = [
            r.astype(int)
            for x in LAYERS
            for r in oracle.unit_sums(np.ones(x.shape), x, granularity)
        ]
        found = iter(oracle.lowest_together(every, config.counts["rule 0"], caps, costs))
        pruned = {x.name: np.stack([next(found) for _ in rows[x.name]]) for x in LAYERS}
    return {x.weight: oracle.spread(pruned[x.name], x, granularity) for x in LAYERS}


def check_masks(masks, granularity, scope, config):
    want = expected(granularity, scope, config)
    for layer in LAYERS:
        got = np.broadcast_to(np.asarray(masks[layer.weight]), layer.shape)
        np.testing.assert_array_equal(got, want[layer.weight])
    keep = oracle.unit_sums(want["a.w"], LAYERS[0], "output_channel")[0] > 0
    np.testing.assert_array_equal(masks["a.b"], keep)


def check_eager(pruner, granularity, scope, axes):
    mesh, params = sharded(axes)
    config = resolve(RULES, LAYERS, scope=scope, granularity=granularity)
    with jax.set_mesh(mesh):
        check_masks(pruner(params, None, config), granularity, scope, config)


def check_compiled(pruner, granularity, scope, axes):
    mesh, params = sharded(axes)
    config = resolve(RULES, LAYERS, scope=scope, granularity=granularity)
    with jax.set_mesh(mesh):
        compiled = jax.jit(functools.partial(pruner, stats=None)).lower(params, config=config)
        compiled = compiled.compile()
        masks = compiled(params, config=config)
    check_masks(masks, granularity, scope, config)
    if granularity == "element":
        check_communication(compiled.as_text())
        for layer in LAYERS:
            mask, layout = masks[layer.weight], params[layer.weight].sharding
            assert mask.sharding.is_equivalent_to(layout, mask.ndim), mask.sharding


def check_communication(text, optional=False):
    """Only counts travel: no collective is of more than a few numbers."""
    collectives = re.findall(
        r"= (\S.*?) (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", text
    )
    assert collectives or optional, "nothing was distributed"
    for shapes, name in collectives:
        for dims in re.findall(r"\w+\[([\d,]*)\]", shapes):
            elements = math.prod(int(n) for n in dims.split(",") if n)
            # The bias has 48 elements, and its mask is found by summing over the inputs.
            assert elements <= 64, f"{name} of {shapes}"


def check_groups(shape, out_axis, in_axes, spec, nm, axes):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(getattr(AxisType, axes),) * 2)
    weight = np.random.default_rng(0).integers(-30, 30, shape).astype(np.float32)
    layer = Layer("w", "Linear", "w", shape, (out_axis,), in_axes)
    config = resolve([{"op_types": ["Linear"]}], [layer], granularity=nm)
    # Groups along the contracted axes, of which the highest stay, of equal ones the last.
    rows = np.moveaxis(np.abs(weight), in_axes, range(-len(in_axes), 0))
    order = np.argsort(rows.reshape(-1, nm.of), axis=1, kind="stable")
    keep = np.zeros(order.shape, bool)
    np.put_along_axis(keep, order[:, nm.of - nm.keep :], True, axis=1)
    want = np.moveaxis(keep.reshape(rows.shape), range(-len(in_axes), 0), in_axes)
    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(jnp.asarray(weight), NamedSharding(mesh, spec))}
        jitted = jax.jit(functools.partial(pp.level, stats=None))
        for mask in (pp.level(params, None, config), jitted(params, config=config)):
            np.testing.assert_array_equal(mask["w"], want)
            if axes == "Explicit":
                assert mask["w"].sharding.spec == spec
        if weight.shape[0] == 64 and nm.of == 4 and "y" in spec[:2]:
            # Every device has whole groups: there is nothing to send but whether there is a NaN.
            text = jitted.lower(params, config=config).compile().as_text()
            check_communication(text, optional=True)


def check_rows(axes):
    """Wanda ranks within the inputs of each output, wherever these lie."""
    mesh, params = sharded(axes)
    layers = [dataclasses.replace(x, window=SAME) if x.spatial_axes else x for x in LAYERS]
    config = resolve(RULES, layers)
    batches = {x.name: np.ones((2, *(4,) * len(x.spatial_axes), 1), np.float32) for x in layers}
    for x in layers:
        width = x.shape[x.in_axes[0]]
        batches[x.name] = np.tile(np.arange(1, width + 1) % 5, (*batches[x.name].shape[:-1], 1))
    batches["c"] = np.broadcast_to(batches["c"][None, :], (4, *batches["c"].shape))
    batches = {name: x.astype(np.float32) for name, x in batches.items()}
    stats = inputs.update(inputs.init(weights(), layers), batches, layers)
    want = pp.wanda(weights(), stats, config)
    with jax.set_mesh(mesh):
        compiled = jax.jit(pp.wanda).lower(params, stats, config).compile()
        masks = compiled(params, stats, config)
        for path, mask in masks.items():
            np.testing.assert_array_equal(mask, want[path])
        for x in layers:
            assert masks[x.weight].sharding.is_equivalent_to(
                params[x.weight].sharding, len(x.shape)
            )
    check_communication(compiled.as_text())


def check_control(control, run, axes):
    """Weights or masks in random order, as those that are on one device."""
    mesh, params = sharded(axes)
    config = resolve(RULES, LAYERS)
    with jax.set_mesh(mesh):
        if control == "reinitialize":
            function, tree = pp.reinitialize, params
        else:
            function = functools.partial(pp.shuffle_masks, config=config)
            tree = pp.level(params, None, config)
        want = function(jax.tree.map(np.asarray, tree), key=3)
        if run == "compiled":
            function = jax.jit(functools.partial(function, key=3))
            found = function(tree)
        else:
            found = function(tree, key=3)
        for path, x in found.items():
            np.testing.assert_array_equal(x, want[path])


def check_schedule(axes):
    mesh, params = sharded(axes)
    config = resolve(RULES, LAYERS)
    with jax.set_mesh(mesh):
        tx = pp.prune_on_schedule(pp.level, pp.one_shot(step=1), config, optax.sgd(0.0))
        state, zeros = tx.init(params), jax.tree.map(jnp.zeros_like, params)
        update = jax.jit(tx.update)
        for _ in range(2):
            updates, state = update(zeros, state, params)
        masks = {x.weight: state.kept.masks[x.weight] for x in LAYERS}
        masks["a.b"] = state.kept.masks["a.b"]
        check_masks(masks, "element", "layer", config)
        for path, mask in masks.items():
            if axes == "Explicit":
                assert mask.sharding.spec == SPECS[path]
            gone = np.asarray(updates[path])[~np.asarray(mask)]
            np.testing.assert_array_equal(gone, -np.asarray(params[path])[~np.asarray(mask)])


GROUPS = {
    "rows": ((64, 48), 0, (1,), P("x", "y")),
    "split": ((64, 48), 0, (1,), P(None, ("x", "y"))),
    "first": ((8, 48), 1, (0,), P("x", None)),
    "apart": ((16, 8, 6), 1, (0, 2), P("x", "y", None)),
    "merged": ((16, 8, 6), 2, (0, 1), P("x", "y", None)),
    "wide": ((64, 48), 1, (0,), P("x", "y")),
}
CONTROLS = list(
    itertools.product(
        ("reinitialize", "shuffle_masks"), ("compiled", "eager"), ("Explicit", "Auto")
    )
)
COMPILED = list(
    itertools.product(
        ((pp.level, "element"), (pp.l1_norm, "output_channel")),
        ("layer", "global"),
        ("Explicit", "Auto"),
    )
)
CHECKS = (
    {
        f"groups-{name}-{axes}": functools.partial(
            check_groups, *case, NM(2, 32) if name == "wide" else NM(2, 4), axes
        )
        for name, case in GROUPS.items()
        for axes in ("Explicit", "Auto")
    }
    | {
        f"{run}-{control}-{axes}": functools.partial(check_control, control, run, axes)
        for control, run, axes in CONTROLS
    }
    | {f"rows-{axes}": functools.partial(check_rows, axes) for axes in ("Explicit", "Auto")}
    | {f"schedule-{axes}": functools.partial(check_schedule, axes) for axes in ("Explicit", "Auto")}
    | {
        f"compiled-{pruner.__name__}-{scope}-{axes}": functools.partial(
            check_compiled, pruner, granularity, scope, axes
        )
        for (pruner, granularity), scope, axes in COMPILED
    }
    | {
        f"eager-{pruner.__name__}-global-Explicit": functools.partial(
            check_eager, pruner, granularity, "global", "Explicit"
        )
        for (pruner, granularity) in ((pp.level, "element"), (pp.l1_norm, "output_channel"))
    }
)


def outcome(check):
    try:
        check()
    except Exception:
        return traceback.format_exc()
    return "passed"


@pytest.fixture(scope="module")
def outcomes(request):
    names = [
        item.callspec.params["name"]
        for item in request.session.items
        if item.getparent(pytest.Module) is request.node
    ]
    code = "import tests.conftest, tests.test_sharding as t; t.main()"
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *names],
        env=os.environ | {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def main():
    # What is partitioned how is decided before: this only makes every kernel compile faster.
    assert jax.device_count() == 8
    with compiled_quickly():
        print(json.dumps({name: outcome(CHECKS[name]) for name in sys.argv[1:]}))


# Products by pairs; on meshes without explicit axes, groups are what they are on one device.
SOME = {
    *(f"{run}-{control}-{axes}" for control, run, axes in covering(CONTROLS)),
    *(
        f"compiled-{pruner.__name__}-{scope}-{axes}"
        for (pruner, _), scope, axes in covering(COMPILED)
    ),
    *(f"groups-{name}-Explicit" for name in GROUPS),
    *(f"groups-{name}-Auto" for name in ("split", "apart", "wide")),
}


@pytest.mark.parametrize(
    "name",
    covered(
        [(name,) for name in CHECKS],
        [
            (name,)
            for name in CHECKS
            if name in SOME or name.startswith(("rows", "schedule", "eager-l"))
        ],
        CHECKS,
    ),
)
def test_on_eight_devices(outcomes, name):
    assert outcomes[name] == "passed", outcomes[name]
