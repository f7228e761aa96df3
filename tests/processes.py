"""What several processes compute together; started by test_processes.py, once for each process.

Every check makes global arrays from the same numbers, and compares what comes out with what NumPy
makes of them in this process alone.
"""

import functools
import json
import os
import sys
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import purepruning as pp
from purepruning import NM, Layer
from purepruning.stats import activations, inputs
from tests.fast import compiled_quickly
from tests.test_sharding import check_communication

DEVICES, D, HIDDEN, STAGES = 4, 16, 24, 2

#: A block of a transformer, and stacked blocks over the stages of a pipeline. Sizes are laid out as
#: by FSDP along "x", whose devices are of different processes, and as tensors are along "y".
LAYERS = (
    Layer("qkv", "Linear", "qkv", (D, 3 * D), (1,), (0,)),
    Layer("out", "Linear", "out", (D, D), (1,), (0,)),
    Layer("up", "Linear", "up", (D, HIDDEN), (1,), (0,), bias="bias"),
    Layer("down", "Linear", "down", (HIDDEN, D), (1,), (0,)),
    Layer("stages", "Linear", "stages", (STAGES, D, D), (2,), (1,), stack_axes=(0,)),
)
SPECS = {
    "qkv": P("x", "y"),
    "out": P("y", "x"),
    "up": P("x", "y"),
    "bias": P("y"),
    "down": P("y", "x"),
    "stages": P("x", None, "y"),
}
#: What takes part in runs: each layer takes time to compile.
FEW = (LAYERS[2], LAYERS[4])
CONFIG = pp.resolve(0.4, FEW)


def numbers(seed=0, layers=LAYERS):
    rng = np.random.default_rng(seed)
    params = {x.weight: rng.integers(-30, 30, x.shape).astype(np.float32) for x in layers}
    return params | {"bias": np.ones(HIDDEN, np.float32)}


def few(seed=0):
    return numbers(seed, FEW)


def mesh_of(axes):
    return jax.make_mesh((2, 2), ("x", "y"), axis_types=(getattr(AxisType, axes),) * 2)


def spread(x, mesh, spec):
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda i: x[i])


def placed(mesh, tree=None):
    tree = numbers() if tree is None else tree
    return {name: spread(x, mesh, SPECS[name]) for name, x in tree.items()}


def whole(x):
    """Returns a global array in this process, for a comparison."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(jax.jit(lambda x: x, out_shardings=NamedSharding(x.sharding.mesh, P()))(x))


def same(found, want):
    for name, x in want.items():
        if x is None:
            assert found[name] is None
        else:
            spread = np.broadcast_to(whole(found[name]), np.shape(x))
            np.testing.assert_array_equal(spread, np.asarray(x), err_msg=name)


def laid_out_as(found, params, names=None):
    for name in names or found:
        spec, x = params[name].sharding, found[name]
        assert x.sharding.is_equivalent_to(spec, x.ndim), (name, x.sharding)


def selection(axes, scope):
    """Masks of single weights, jitted and not: equal, laid out as weights, and nothing gathered."""
    params, config = placed(mesh_of(axes)), pp.resolve(0.4, LAYERS, scope=scope)
    want = pp.level(numbers(), None, config)
    if scope == "global":
        same(pp.level(params, None, config), want)
    with jax.set_mesh(params["qkv"].sharding.mesh):
        compiled = jax.jit(functools.partial(pp.level, stats=None)).lower(params, config=config)
        compiled = compiled.compile()
        masks = compiled(params, config=config)
    same(masks, want)
    laid_out_as(masks, params, [x.weight for x in LAYERS])
    check_communication(compiled.as_text())


def units(axes):
    """Channels in global scope, groups of N:M, and rows by statistics of a batch in parallel."""
    mesh = mesh_of(axes)
    params = placed(mesh)
    channels = pp.resolve(0.4, LAYERS[:4], scope="global", granularity="output_channel")
    same(pp.l1_norm(params, None, channels), pp.l1_norm(numbers(), None, channels))
    groups = pp.resolve({"op_types": ["Linear"]}, LAYERS[:4], granularity=NM(2, 4))
    same(pp.level(params, None, groups), pp.level(numbers(), None, groups))


def statistics(axes):
    """Of a batch of which every process has a part: those of all of it."""
    mesh = mesh_of(axes)
    params, config = placed(mesh), pp.resolve(0.4, LAYERS[:1])
    batch = np.random.default_rng(1).integers(-3, 4, (8, D)).astype(np.float32)
    seen = spread(batch, mesh, P("x"))
    one, other = (inputs.init(p, config) for p in (params, numbers()))
    one, other = (
        inputs.update(one, {"qkv": seen}, config),
        inputs.update(other, {"qkv": batch}, config),
    )
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(whole(a), b), one, other)
    same(pp.wanda(params, one, config), pp.wanda(numbers(), other, config))
    channels = pp.resolve(0.4, LAYERS[:1], granularity="output_channel")
    of = np.concatenate([batch] * 3, axis=1)
    parts = spread(of, mesh, P("x", "y"))

    def apoz(params, x):
        stats = activations.init(params, channels)
        stats = activations.update(stats, {"qkv": x}, channels, activation="relu")
        return pp.apoz_rank(params, activations.merge(stats, stats), channels)

    same(apoz(params, parts), apoz(numbers(), of))


def counted(axes):
    """What masks keep, in numbers: the same in every process."""
    params, host = placed(mesh_of(axes), few()), few()
    masks, want = pp.level(params, None, CONFIG), pp.level(host, None, CONFIG)
    assert pp.density(masks, params) == pp.density(want, host)
    assert pp.summarize(params, masks, FEW) == pp.summarize(host, want, FEW)
    kept = pp.merge_masks(masks, pp.invert(masks), how="or")
    assert all(whole(kept[x.weight]).all() for x in FEW)
    same(pp.apply_masks(params, masks), pp.apply_masks(host, want))


def optimizer(axes):
    """A step of an optimizer that keeps weights pruned."""
    params, host = placed(mesh_of(axes), few()), few()
    want = pp.level(host, None, CONFIG)
    tx = pp.keep_pruned(pp.level(params, None, CONFIG), optax.sgd(0.5, momentum=0.5))
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), state, params)
    found = jax.jit(optax.apply_updates)(params, updates)
    same(found, pp.apply_masks({n: x - np.float32(0.5) for n, x in host.items()}, want))
    laid_out_as(after.masks, params, [x.weight for x in FEW])
    # Without jit too: on a single process nobody has to jit either.
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    same(optax.apply_updates(params, updates), jax.tree.map(whole, found))


def lottery(axes):
    """Two rounds of tickets, jitted."""
    tickets = pp.lottery(pp.level, CONFIG, rounds=2)
    trained = [few(1), few(2)]

    def masks_of(first, rounds, step):
        state = tickets.init({"params": first})
        for params in rounds:
            state, run = step(state, {"params": params})
        return state.masks, run["params"]

    mesh = mesh_of(axes)
    rounds = [placed(mesh, x) for x in trained]
    found = masks_of(placed(mesh, few()), rounds, jax.jit(tickets.step))
    as_jax = functools.partial(jax.tree.map, jax.device_put)
    want = masks_of(as_jax(few()), map(as_jax, trained), tickets.step)
    for a, b in zip(found, want, strict=True):
        same(a, b)


TX = pp.prune_on_schedule(pp.level, pp.linear(end_step=4), CONFIG, optax.sgd(0.5))


def steps(params, state, update, n):
    for _ in range(n):
        updates, state = update(jax.tree.map(jnp.ones_like, params), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params, state


def begun(params):
    """Returns a state of which every array lies over all processes, counters too."""
    with jax.set_mesh(params["up"].sharding.mesh):
        return jax.jit(TX.init)(params)


def training(axes):
    """A scheduled run, written by Orbax in the middle; the test reads it in another number."""
    params = placed(mesh_of(axes), few())
    state = begun(params)
    params, state = steps(params, state, jax.jit(TX.update), 2)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(os.environ["FOLDER"]) / "middle", {"params": params, "state": state})
        checkpointer.wait_until_finished()
    params, state = steps(params, state, jax.jit(TX.update), 3)
    same(params, unbroken()[0])
    same(state.kept.masks, unbroken()[1].kept.masks)
    laid_out_as(state.kept.masks, params, [x.weight for x in FEW])


def unbroken():
    """Returns the run as one process does it."""
    params = jax.tree.map(jax.device_put, few())
    return steps(params, TX.init(params), TX.update, 5)


def resumed(axes):
    """The run goes on that another number of processes has written."""
    params = placed(mesh_of(axes), few())
    fresh = {"params": params, "state": begun(params)}
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(Path(os.environ["FOLDER"]) / "middle", fresh)
    pp.check_resumed(restored["state"], fresh["state"])
    params, state = steps(restored["params"], restored["state"], jax.jit(TX.update), 3)
    same(params, unbroken()[0])
    same(state.kept.masks, unbroken()[1].kept.masks)


def refused(axes):
    """Files of one process cannot hold what lies on several: said with what to do."""
    params = placed(mesh_of(axes), few())
    masks = pp.level(params, None, CONFIG)
    config = CONFIG.with_masks(masks)
    folder = os.environ["FOLDER"]
    for save, words in (
        (lambda: pp.save_state(f"{folder}/s", {"w": params["up"]}), r"\['w'\]"),
        (lambda: pp.save_state(f"{folder}/s", {"n": 1}, config=config), "mask of 'bias'"),
        (lambda: pp.save_masks(f"{folder}/m", masks, params), "mask of 'bias'"),
    ):
        with pytest.raises(ValueError, match=f"{words}.*Orbax"):
            save()


def mlp(params, x):
    return jax.nn.relu(x @ params["up"] + params["bias"][None, :]) @ params["down"]


def shrunk(axes):
    """A smaller model lies over the devices as the model did, where sizes divide."""
    names, mesh = ("up", "bias", "down"), mesh_of(axes)
    host = {name: numbers()[name] for name in names}
    params, x = {n: spread(v, mesh, SPECS[n]) for n, v in host.items()}, np.ones((4, D), np.float32)
    coupling = pp.couple(mlp, params, x)
    for n_removed, lost in ((8, ()), (9, ("bias axis 0", "down axis 0", "up axis 1"))):
        masks = {n: whole(m) for n, m in coupling.masks(range(1, 1 + n_removed), host).items()}
        if not lost:  # single weights too, as zeros in what stays
            masks["down"] = masks["down"] & (host["down"] > -10)
        over = {n: SPECS[n] if m.shape == host[n].shape else P() for n, m in masks.items()}
        spread_masks = {n: spread(m, mesh, over[n]) for n, m in masks.items()}
        one = pp.shrink(mlp, params, spread_masks, coupling, x)
        other = pp.shrink(mlp, host, masks, coupling, x)
        same(one.params, other.params)
        assert one.params["up"].shape == (D, HIDDEN - n_removed)
        found = sorted(line.split(" of ")[0] for line in one.report.whole)
        assert found == list(lost), one.report.whole
        for name in names:
            spec = one.params[name].sharding.spec
            whole_axes = [int(line.split(" ")[2]) for line in one.report.whole if name in line]
            for axis, names_of_axis in enumerate(SPECS[name]):
                want = None if axis in whole_axes else names_of_axis
                assert (*spec, None, None)[axis] == want, (name, spec)
        if axes == "Auto":
            y = jax.jit(one.fn)(one.params, x)
            np.testing.assert_allclose(whole(y), np.asarray(other.fn(other.params, x)), rtol=1e-5)


CHECKS = {
    **{
        f"selection-{scope}-{axes}": functools.partial(selection, axes, scope)
        for scope in ("layer", "global")
        for axes in ("Auto", "Explicit")
    },
    **{
        f"{check.__name__}-{axes}": functools.partial(check, axes)
        for check in (
            units,
            statistics,
            counted,
            optimizer,
            lottery,
            training,
            resumed,
            refused,
            shrunk,
        )
        for axes in ("Auto", "Explicit")
    },
}


def outcome(check):
    try:
        check()
    except Exception:
        return traceback.format_exc()
    return "passed"


def main(number, n, port, *names):
    jax.config.update("jax_num_cpu_devices", DEVICES // int(n))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", int(n), int(number), initialization_timeout=60)
    assert jax.device_count() == DEVICES
    assert jax.process_count() == int(n)
    with compiled_quickly():
        print(json.dumps({name: outcome(CHECKS[name]) for name in names}), flush=True)


if __name__ == "__main__":
    import tests.conftest  # noqa: F401, its settings

    main(*sys.argv[1:])
