"""Weights laid out over eight devices: the same masks, and no weight leaves its device.

The checks run in a subprocess in which the CPU counts as eight devices, all of them in one, since
starting JAX takes longer than any of them.
"""

import functools
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
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import purepruning as pp
from purepruning import Layer, resolve
from tests import oracle

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
    "c.w": P(None, "y", "x"),
}
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


def check_communication(text):
    """Only counts travel: there are no collectives but sums, and those of a few numbers."""
    collectives = re.findall(
        r"= (\S.*?) (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", text
    )
    assert collectives, "nothing was distributed"
    for shapes, name in collectives:
        assert name == "all-reduce", f"{name} of {shapes}"
        for dims in re.findall(r"\w+\[([\d,]*)\]", shapes):
            elements = math.prod(int(n) for n in dims.split(",") if n)
            # The bias has 48 elements, and its mask is found by summing over the inputs.
            assert elements <= 64, f"{name} of {shapes}"


CHECKS = {
    f"{how.__name__[6:]}-{pruner.__name__}-{scope}-{axes}": functools.partial(
        how, pruner, granularity, scope, axes
    )
    for how, scopes, kinds in (
        (check_compiled, ("layer", "global"), ("Explicit", "Auto")),
        (check_eager, ("global",), ("Explicit",)),
    )
    for pruner, granularity in ((pp.level, "element"), (pp.l1_norm, "output_channel"))
    for scope in scopes
    for axes in kinds
}


def outcome(check):
    try:
        check()
    except Exception:
        return traceback.format_exc()
    return "passed"


@pytest.fixture(scope="module")
def outcomes():
    code = "import tests.conftest, tests.test_sharding as t; t.main()"
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def main():
    assert jax.device_count() == 8
    print(json.dumps({name: outcome(check) for name, check in CHECKS.items()}))


@pytest.mark.parametrize("name", CHECKS)
def test_on_eight_devices(outcomes, name):
    assert outcomes[name] == "passed", outcomes[name]
