"""Pruning while training: in an Optax chain, beside it, and in the loops of the frameworks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState

import purepruning as pp
from purepruning import Layer
from purepruning_interop import nnx as interop_nnx
from tests.fast import jit_once, some_key
from tests.messages import raises

pytestmark = pytest.mark.usefixtures("unoptimized", "standard_promotion")

SHAPES = {"a": (6, 10), "b": (10, 4), "bias": (4,)}
LAYERS = (
    Layer("a", "Linear", "a", (6, 10), (1,), (0,)),
    Layer("b", "Linear", "b", (10, 4), (1,), (0,), bias="bias"),
)
CONFIG = pp.resolve([{"sparsity": 0.8, "op_types": ["Linear"]}], LAYERS)
UNEVEN = [
    {"op_names": ["a"], "final_sparsity": 0.5, "end_epoch": 9, "frequency": 4},
    {"op_names": ["b"], "final_sparsity": 0.9, "start_epoch": 3, "end_epoch": 8, "frequency": 2},
]
SCHEDULE = pp.agp(begin_step=2, end_step=11, frequency=4)  # at 2, 6, 10, 11
STEPS = 14
momentum = functools.partial(optax.sgd, 3e-2, momentum=0.9)


def start(seed=0):
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in SHAPES.items()}


def loss(params, x):
    return jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"] + params["bias"][None] - 1) ** 2)


def batches(steps=STEPS, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(steps, 8, 6)), jnp.float32)


def update(tx, params, state, x, **extra):
    updates, state = tx.update(jax.grad(loss)(params, x), state, params, **extra)
    return optax.apply_updates(params, updates), state


def run(tx, params, state=None, steps=STEPS):
    """Parameters after every step, and the last state: one scan."""

    def step(carry, x):
        carry = update(tx, *carry, x)
        return carry, carry[0]

    carry = (params, tx.init(params) if state is None else state)
    (_, state), history = jax.lax.scan(step, carry, batches(steps))
    return history, state


def zeros(x):
    return int((np.asarray(x) == 0).sum())


def chain(schedule=SCHEDULE, config=CONFIG, pruner=pp.level, **options):
    return optax.chain(momentum(), pp.prune_on_schedule(pruner, schedule, config, **options))


def inside(schedule=SCHEDULE, config=CONFIG, pruner=pp.level, **options):
    return pp.prune_on_schedule(pruner, schedule, config, momentum(), **options)


forms = pytest.mark.parametrize("form", [chain, inside])


@functools.cache
def whole(form):
    """The usual run in one scan, compiled once for all tests that look at it."""
    return jit_once(lambda p: run(form(), p))(start())


# In the chain.


@forms
def test_counts_are_those_of_the_schedule_at_every_step(form):
    history, state = whole(form)
    # 0.8 - 0.8 (1 - u)^3 with u = 0, 4/9, 8/9, 1, of 60 and of 40 weights, rounded down.
    shares = [0] * 6 + [0.8 - 0.8 * (5 / 9) ** 3] * 4 + [0.8 - 0.8 * (1 / 9) ** 3] + [0.8] * 3
    assert [zeros(x) for x in history["a"]] == [int(60 * s + 1e-9) for s in shares]
    assert [zeros(x) for x in history["b"]] == [int(40 * s + 1e-9) for s in shares]
    for before, after in zip(history["a"][:-1], history["a"][1:], strict=True):
        assert (np.asarray(after)[np.asarray(before) == 0] == 0).all()  # nothing comes back
    masks = pp.get_masks(state, start())
    assert masks.keys() == {"a", "b", "bias"}
    np.testing.assert_array_equal(masks["a"], history["a"][-1] != 0)


@functools.cache
def event_by_event():
    """The same, event by event: the step knows masks, and pruning is a function of its own."""
    params = start()
    tx = optax.chain(momentum(), pp.keep_pruned(pp.expand({}, params)))

    @jax.jit
    def prune(params, opt_state, counts):
        now = CONFIG.with_counts(counts).with_masks(pp.get_masks(opt_state, params))
        return pp.set_masks(opt_state, pp.level(params, None, now))

    opt_state, clock = tx.init(params), SCHEDULE.init(CONFIG)
    step, history = jax.jit(functools.partial(update, tx)), []
    for x in batches():
        clock, event = SCHEDULE.step(clock)
        if event.due:
            opt_state = prune(params, opt_state, event.counts)
        params, opt_state = step(params, opt_state, x)
        history.append(params)
    assert step._cache_size() <= 2  # at first the parameters are not yet the result of a step
    return jax.tree.map(lambda *x: np.stack(x), *history)


def test_pruning_beside_the_step_gives_the_same_bits():
    expected = event_by_event()
    tx = chain()
    step, params, state = jax.jit(functools.partial(update, tx)), start(), tx.init(start())
    for t, x in enumerate(batches()):
        params, state = step(params, state, x)
        jax.tree.map(np.testing.assert_array_equal, params, {k: v[t] for k, v in expected.items()})


def test_without_jit_nothing_is_different():
    tx = chain(pp.agp(begin_step=1, end_step=2))
    expected, _ = jit_once(lambda p: run(tx, p, steps=3))(start())
    params, state = start(), tx.init(start())
    for t, x in enumerate(batches(3)):
        params, state = update(tx, params, state, x)
        assert {k: zeros(v) for k, v in params.items()} == {
            k: zeros(v[t]) for k, v in expected.items()
        }


def test_a_pool_keeps_its_masks_until_its_turn():
    config = pp.resolve(UNEVEN, LAYERS)
    # a at 0, 4, 8; b at 3, 5, 7.
    history, state = jit_once(lambda p: run(chain(pp.linear(), config), p))(start())
    assert [zeros(x) for x in history["a"]] == [0] * 4 + [15] * 4 + [30] * 6
    assert [zeros(x) for x in history["b"]] == [0] * 5 + [18] * 2 + [36] * 7
    np.testing.assert_array_equal(pp.get_masks(state, start())["b"], history["b"][-1] != 0)

    # A pruner that prunes others every time, given the chance.
    def restless(params, stats, config):
        order = jax.random.permutation(jax.random.key(0), 60).reshape(6, 10)
        seed = jnp.sum(jnp.abs(params["b"]))
        return {"a": (order + seed.astype(jnp.int32) * 7) % 60 >= config.counts["a"], "b": None}

    history, _ = jit_once(lambda p: run(chain(pp.linear(), config, restless), p))(start())
    kept = np.asarray(history["a"]) != 0
    for t in (1, 2, 3, 5, 6, 7, 9, 10):
        np.testing.assert_array_equal(kept[t], kept[t - 1])


@forms
def test_one_compilation(form):
    tx, traces = form(), []

    @jax.jit
    def step(params, state, x):
        traces.append(None)
        return update(tx, params, state, x)

    params, state = start(), tx.init(start())
    for x in batches():
        params, state = step(params, state, x)
    assert len(traces) == 1


def test_the_optimizer_inside_forgets_what_is_pruned():
    _, state = whole(inside)
    for name in ("a", "b"):
        trace, mask = state.kept.inner[0].trace[name], np.asarray(state.kept.masks[name])
        assert not np.asarray(trace)[~mask].any()
        assert np.asarray(trace)[mask].all()


def test_only_the_steps_of_multi_steps_count():
    """Three micro-batches to a step: the parameters, and what is pruned, change at every third."""
    tx = optax.MultiSteps(chain(pp.linear(end_step=3)), 3)
    history, state = jit_once(lambda p: run(tx, p, steps=14))(start())
    counts = [zeros(x) for x in history["a"]]
    assert counts == [0] * 5 + [16] * 3 + [32] * 3 + [48] * 3
    assert int(state.inner_opt_state[1].schedule.step) == 4

    # Around micro-batches instead, each of them is a step.
    tx = optax.chain(
        optax.MultiSteps(momentum(), 3).gradient_transformation(),
        pp.prune_on_schedule(pp.level, pp.linear(end_step=3), CONFIG),
    )
    history, state = jit_once(lambda p: run(tx, p, steps=6))(start())
    assert [zeros(x) for x in history["a"]] == [0, 16, 32, 48, 48, 48]


def test_masks_to_begin_with():
    begin = {"a": jnp.arange(60).reshape(6, 10) >= 6, "b": None}
    tx = chain(pp.linear(begin_step=3, end_step=4, initial_sparsity=0.5), masks=begin)
    history, _ = jit_once(lambda p: run(tx, p, steps=6))(start())
    assert [zeros(x) for x in history["a"]] == [6, 6, 6, 30, 48, 48]
    assert not np.asarray(history["a"])[:, 0, :6].any()


def test_statistics_are_an_extra_argument():
    tx = optax.chain(
        momentum(), pp.prune_on_schedule(pp.random_pruning, pp.linear(end_step=3), CONFIG)
    )
    params, state, keys = start(), tx.init(start()), jax.random.split(jax.random.key(3), 4)
    step = jax.jit(functools.partial(update, tx))
    before = None
    for t, x in enumerate(batches(4)):
        params, state = step(params, state, x, stats=keys[t])
        config = CONFIG.with_sparsity(0.8 * t / 3)
        expected = pp.random_pruning(
            params, keys[t], config if before is None else config.with_masks(before)
        )
        before = pp.get_masks(state, params)
        np.testing.assert_array_equal(before["a"], expected["a"])
    with raises(TypeError, "random key", "None"):
        tx.update(params, tx.init(params), params)


def test_channels_and_global_scope():
    rules = [{"total_sparsity": 0.5, "op_types": ["Linear"]}]
    config = pp.resolve(rules, LAYERS, scope="global", granularity="output_channel")
    history, state = jit_once(lambda p: run(chain(pp.linear(end_step=4), config, pp.l2_norm), p))(
        start()
    )
    for t, share in enumerate([0, 12, 25, 37, 50]):
        columns = (
            (np.asarray(history["a"][t]) != 0).any(0),
            (np.asarray(history["b"][t]) != 0).any(0),
        )
        pruned = 6 * int((~columns[0]).sum()) + 10 * int((~columns[1]).sum())
        assert share - 10 < pruned <= share
    # The bias goes with its channel.
    masks = pp.get_masks(state, start())
    np.testing.assert_array_equal(masks["bias"], masks["b"].any(0))


# Many at once.


def test_seeds_under_vmap_prune_in_a_branch():
    params = jax.vmap(lambda key: jax.tree.map(lambda x: jax.random.normal(key, x.shape), start()))(
        jax.random.split(some_key(), 3)
    )
    tx = chain()
    axes = pp.vmap_axes(jax.eval_shape(tx.init, start()))
    state = jax.vmap(tx.init, out_axes=axes)(params)
    assert state[1].schedule.step.shape == ()
    step = jax.vmap(functools.partial(update, tx), in_axes=(0, axes, None), out_axes=(0, axes))
    assert str(jax.make_jaxpr(step)(params, state, batches()[0])).count("cond[") >= 1
    batched = jax.vmap(functools.partial(update, tx), in_axes=(0, 0, None))
    everything = jax.vmap(tx.init)(params)
    assert "cond[" not in _outer(jax.make_jaxpr(batched)(params, everything, batches()[0]))
    many, step = params, jax.jit(step)
    for x in batches():
        many, state = step(many, state, x)
    run_alone = jit_once(lambda p: run(tx, p)[0])
    for i in range(3):
        alone = run_alone(jax.tree.map(lambda x, i=i: x[i], params))
        for name in ("a", "b"):
            np.testing.assert_array_equal(many[name][i] != 0, alone[name][-1] != 0)


def _outer(jaxpr):
    """The jaxpr as text, but for what loops of the selection have inside."""
    return "\n".join(str(eqn.primitive) + "[" for eqn in jaxpr.jaxpr.eqns)


def test_many_sparsities_are_one_call():
    shares = [0.25, 0.5, 0.9]
    clock = SCHEDULE.init(CONFIG, shares)

    def train(counts, params):
        return run(chain(clock._replace(counts=counts)), params)[0]

    many = jit_once(jax.vmap(train, in_axes=(0, None)))(clock.counts, start())
    alone_with = jit_once(lambda state, p: run(chain(state), p)[0])
    for i, share in enumerate(shares):
        alone = alone_with(SCHEDULE.init(CONFIG.with_sparsity(share)), start())
        for name, n in (("a", 60), ("b", 40)):
            assert zeros(many[name][i, -1]) == int(n * share + 1e-9)
            np.testing.assert_array_equal(many[name][i] != 0, alone[name] != 0)


# The frameworks' loops.


def test_flax_train_state():
    model, x = linen.Dense(5), jnp.ones((4, 20))
    params = model.init(some_key(), x)["params"]
    layer = pp.make_layer(params, "kernel", "Linear", out_axes=1, in_axes=0, bias="bias")
    config = pp.resolve([{"sparsity": 0.9, "op_types": ["Linear"]}], [layer])
    state = TrainState.create(
        apply_fn=model.apply, params=params, tx=chain(pp.linear(end_step=5), config)
    ).replace(step=jnp.array(0))

    @jax.jit
    def step(state):
        loss = lambda p: ((state.apply_fn({"params": p}, x) - 1) ** 2).sum()  # noqa: E731
        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    for expected in (0, 18, 36, 54, 72, 90, 90):
        state = step(state)
        assert zeros(state.params["kernel"]) == expected
    assert step._cache_size() == 1


@forms
def test_nnx_optimizer(form):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(6, 10, rngs=rngs)
            self.out = nnx.Linear(10, 2, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.tanh(self.hidden(x)))

    model = Net(nnx.Rngs(some_key()))
    x = batches(1)[0]
    config = pp.resolve(
        [{"sparsity": 0.5, "op_names": ["hidden"]}, {"sparsity": 0.75, "op_names": ["out"]}],
        interop_nnx.layers(model),
    )
    optimizer = nnx.Optimizer(model, form(pp.linear(end_step=2), config), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: ((model(x) - 1) ** 2).sum())(model))

    for hidden, out in ((0, 0), (15, 7), (30, 15), (30, 15)):
        step(model, optimizer)
        assert zeros(model.hidden.kernel[...]) == hidden
        assert zeros(model.out.kernel[...]) == out


# Checkpoints.


@forms
def test_orbax_resumes_in_the_middle(form, tmp_path):
    tx = form()
    step = jax.jit(functools.partial(update, tx))
    params, state = start(), tx.init(start())
    for t, x in enumerate(batches()):
        if t == 8:
            with ocp.StandardCheckpointer() as checkpointer:
                tree = {"params": params, "state": state, "key": jax.random.key(7)}
                checkpointer.save(tmp_path / "now", tree)
                checkpointer.wait_until_finished()
                fresh = {"params": start(5), "state": tx.init(start(5)), "key": jax.random.key(0)}
                restored = checkpointer.restore(tmp_path / "now", fresh)
            pp.check_resumed(restored, fresh)
            assert jax.tree.structure(restored) == jax.tree.structure(tree)
            assert restored["key"] == jax.random.key(7)
            params, state = restored["params"], restored["state"]
        params, state = step(params, state, x)
    expected = event_by_event() if form is chain else whole(form)[0]
    for name in ("a", "b"):
        assert zeros(params[name]) == zeros(expected[name][-1])
        if form is chain:
            np.testing.assert_array_equal(params[name], expected[name][-1])
    other = form(pp.linear(end_step=5)).init(start())
    with raises(ValueError, "another schedule", "times"):
        pp.check_resumed(restored["state"], other)


# Mistakes.


def test_mistakes_raise():
    with raises(TypeError, "config", "resolve", "list"):
        pp.prune_on_schedule(pp.level, SCHEDULE, [{"sparsity": 0.5}])
    with raises(TypeError, "schedule", "agp(...)", "function"):
        pp.prune_on_schedule(pp.level, pp.agp, CONFIG)
    tx = pp.prune_on_schedule(pp.level, SCHEDULE, CONFIG)
    with raises(KeyError, "'b'", "nearest"):
        tx.init({"a": start()["a"], "b1": start()["b"], "bias": start()["bias"]})
    with raises(ValueError, "needs the parameters"):
        tx.update(start(), tx.init(start()))
    with raises(ValueError, "'a'", "(6, 10)"):
        pp.prune_on_schedule(pp.level, SCHEDULE, CONFIG, masks={"a": jnp.ones(7, bool)}).init(
            start()
        )
    with raises(ValueError, "end_step=..."):
        pp.prune_on_schedule(pp.level, pp.agp(), CONFIG).init(start())
    with raises(ValueError, "get_masks"):
        pp.get_masks(momentum().init(start()), start())

    def more(params, stats, config):
        return pp.level(params, stats, config) | {"bias": jnp.ones(4, bool)}

    alone = pp.resolve([{"sparsity": 0.5, "op_names": ["a"]}], LAYERS)
    tx = pp.prune_on_schedule(more, pp.one_shot(), alone)
    with raises(KeyError, "'bias'"):
        tx.update(start(), tx.init(start()), start())
    # Named to begin with, it has a place.
    tx = pp.prune_on_schedule(more, pp.one_shot(), alone, masks={"bias": jnp.ones(4, bool)})
    tx.update(start(), tx.init(start()), start())
    free = [dataclasses.replace(layer, bias=None) for layer in LAYERS]
    uneven = pp.resolve(UNEVEN, free)
    tx = pp.prune_on_schedule(more, pp.linear(), uneven, masks={"bias": jnp.ones(4, bool)})
    with raises(ValueError, "'bias'", "no layer of the config"):
        tx.update(start(), tx.init(start()), start())
