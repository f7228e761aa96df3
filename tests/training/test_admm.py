"""ADMM: projections against all subsets, penalties in closed form, problems of known answer."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax.test_util import check_grads

import purepruning as pp
from purepruning import NM, Block, Layer
from purepruning.training import admm
from tests import oracle
from tests.fast import jit_once
from tests.messages import raises
from tests.modes import as_jax, as_numpy, as_torch
from tests.versions import enable_x64

pytestmark = pytest.mark.usefixtures("unoptimized")

FC = Layer("fc", "Linear", "fc.w", (3, 4), (0,), (1,))
CONV = Layer("conv", "Conv2d", "conv.w", (2, 2, 1, 4), (3,), (2,), bias="conv.b")
STACK = Layer("stack", "Linear", "stack.w", (2, 3, 2), (2,), (1,), stack_axes=(0,))
LAYERS = (FC, CONV, STACK)
FRAMEWORKS = {"jax": as_jax, "torch": as_torch}
both = pytest.mark.parametrize("framework", FRAMEWORKS.values(), ids=FRAMEWORKS)


def resolve(layers=LAYERS, sparsity=0.5, **kwargs):
    rule = {"op_types": ["default"]}
    if not isinstance(kwargs.get("granularity"), NM):
        rule["sparsity"] = sparsity
    return pp.resolve([rule], layers, **kwargs)


def integers(seed=0, layers=LAYERS):
    """Distinct numbers in random order and signs, and biases of one."""
    rng = np.random.default_rng(seed)
    sizes = [np.prod(layer.shape) for layer in layers]
    values = rng.permutation(np.arange(1, sum(sizes) + 1)) * rng.choice([-1, 1], sum(sizes))
    parts = np.split(values.astype(np.float32), np.cumsum(sizes)[:-1])
    params = {x.weight: p.reshape(x.shape) for x, p in zip(layers, parts, strict=True)}
    return params | {"conv.b": np.ones(4, np.float32), "free": np.ones(3, np.float32)}


def state_of(params, framework, seed=1):
    """A state as after a few rounds: Z and U of random integers."""
    parts = [integers(seed + i) for i in range(2)]
    return admm.State(*(framework({x.weight: p[x.weight] for x in LAYERS}) for p in parts))


def equal(a, b):
    a, b = ([np.asarray(x) for x in jax.tree.leaves(t)] for t in (a, b))
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


# The projection, against all subsets of units.


def nearest(target, layer, granularity, count):
    """The smallest distance from ``target`` to a weight without ``count`` of its units."""
    energy = oracle.unit_sums(target.astype(float) ** 2, layer, granularity)
    return sum(
        min(row[list(s)].sum() for s in itertools.combinations(range(len(row)), count))
        for row in energy
    )


@both
@pytest.mark.parametrize(
    ("pruner", "granularity"),
    [
        (pp.level, "element"),
        (pp.l2_norm, "output_channel"),
        (pp.l2_norm, "input_channel"),
        (pp.l2_norm, Block((1, 2))),
    ],
    ids=["element", "output_channel", "input_channel", "block"],
)
def test_the_projection_is_the_nearest_of_all_subsets(pruner, granularity, framework):
    rng = np.random.default_rng(2)
    # A convolution of one input channel; blocks do not divide the stack.
    layers = {"input_channel": (FC, STACK), "element": LAYERS, "output_channel": LAYERS}
    for layer in layers.get(granularity, (FC, CONV)):
        config = resolve([layer], granularity=granularity)
        units = config.pools[0].size
        for count in range(0, units, max(1, units // 4)):
            w, u = rng.normal(size=(2, *layer.shape)).astype(np.float32)
            params = framework({layer.weight: w, "conv.b": np.ones(4, np.float32)})
            state = admm.State(framework({layer.weight: 0 * w}), framework({layer.weight: u}))
            config = config.with_counts({layer.name: count})
            new, _ = admm.step(params, state, config, pruner=pruner)
            left = np.asarray(new.z[layer.weight]).astype(float) - (w + u)
            assert np.sum(left**2) == pytest.approx(nearest(w + u, layer, granularity, count))


@both
def test_the_projection_to_n_of_m_is_the_nearest(framework):
    params = {"fc.w": np.random.default_rng(3).normal(size=(3, 4)).astype(np.float32)}
    config = resolve([FC], granularity=NM(1, 4))
    state = admm.init(framework(params), config)
    new, _ = admm.step(framework(params), state, config, pruner=pp.level)
    for row, z in zip(params["fc.w"], np.asarray(new.z["fc.w"]), strict=True):
        choices = [np.where(np.arange(4) == i, row, 0) for i in range(4)]
        np.testing.assert_array_equal(z, min(choices, key=lambda c: np.sum((row - c) ** 2)))


@both
def test_the_projection_of_elements_is_the_nearest_across_layers(framework):
    """Global scope, in which no layer may lose more than half: all subsets of 12 of 20 and less."""
    one, two = Layer("a", "Linear", "a", (2, 3), (0,), (1,)), Layer("b", "Linear", "b", (2, 2))
    rng = np.random.default_rng(4)
    rule = {"op_types": ["Linear"], "total_sparsity": 0.4, "max_sparsity_per_layer": 0.5}
    config = pp.resolve([rule], [one, two], scope="global")
    for _ in range(5):
        w = {"a": rng.normal(size=(2, 3)) * 0.3, "b": rng.normal(size=(2, 2))}
        w = {name: x.astype(np.float32) for name, x in w.items()}
        params = framework(w)
        new, _ = admm.step(params, admm.init(params, config), config, pruner=pp.level)
        lost = np.concatenate([(x - np.asarray(new.z[name])).reshape(-1) for name, x in w.items()])
        flat = np.concatenate([x.reshape(-1) for x in w.values()]).astype(float)
        allowed = (s for s in itertools.combinations(range(10), 4) if sum(i < 6 for i in s) <= 3)
        best = min(sum(flat[i] ** 2 for i in s) for s in allowed if sum(i >= 6 for i in s) <= 2)
        assert np.sum(lost.astype(float) ** 2) == pytest.approx(best)


# Penalty and residuals in closed form.


@both
@pytest.mark.parametrize(
    "rho", [0.25, np.float32(0.25), {"conv": 0.25, "fc": 2, "stack": 0.5}], ids=str
)
def test_the_penalty_and_its_gradient(framework, rho):
    params, config = integers(), resolve()
    state = state_of(params, framework)
    gaps, value = {}, 0.0
    for layer in LAYERS:
        z, u = (np.asarray(part[layer.weight]) for part in state)
        mine = float(rho[layer.name] if isinstance(rho, dict) else rho)
        gap = params[layer.weight] - z + u
        value += mine / 2 * np.sum(gap.astype(float) ** 2)
        gaps[layer.weight] = mine * gap
    if framework is as_jax:
        penalty = functools.partial(admm.penalty, config=config, rho=rho)
        got, grads = jax.value_and_grad(penalty)(as_jax(params), state)
        by_state = jax.grad(penalty, argnums=1)(as_jax(params), state)
        assert not any(np.any(x) for x in jax.tree.leaves(by_state))
        jitted = jax.jit(jax.grad(penalty))(as_jax(params), state)
        equal(jitted, grads)
    else:
        leaves = {path: x.requires_grad_() for path, x in as_torch(params).items()}
        got = admm.penalty(leaves, state, config, rho)
        got.backward()
        got = got.item()
        grads = {path: np.zeros(3) if x.grad is None else x.grad for path, x in leaves.items()}
        grads["conv.b"] = np.zeros(4)
        functional = torch.func.grad(lambda p: admm.penalty(p, state, config, rho))
        equal({x.weight: functional(as_torch(params))[x.weight] for x in LAYERS}, gaps)
    assert float(got) == pytest.approx(value, rel=1e-6)
    equal(grads, gaps | {"conv.b": np.zeros(4), "free": np.zeros(3)})


def test_the_gradient_is_the_numeric_one():
    with enable_x64(True):
        params = {path: jnp.asarray(x, jnp.float64) for path, x in integers(5).items()}
        config = resolve([FC])
        state, _ = admm.step(params, admm.init(params, config), config, pruner=pp.level)
        assert state.z["fc.w"].dtype == jnp.float64
        moved = {path: x + 0.5 for path, x in params.items()}
        check_grads(lambda p: admm.penalty(p, state, config, 0.1), (moved,), 1, modes=["rev"])


def test_only_the_layers_of_the_config_are_held():
    params = as_jax(integers())
    config = pp.resolve([{"sparsity": 0.5, "op_names": ["fc"]}], LAYERS)
    state, _ = admm.step(params, admm.init(params, config), config, pruner=pp.level)
    assert set(state.z) == set(state.u) == {"fc.w"}
    grads = jax.grad(admm.penalty)(params, state, config, 1.0)
    assert {path for path, g in grads.items() if np.any(g)} == {"fc.w"}
    nothing = pp.resolve([], LAYERS)
    state = admm.init(params, nothing)
    new, residuals = admm.step(params, state, nothing, pruner=pp.level)
    assert new == state == admm.State({}, {})
    assert residuals == admm.Residuals(0.0, 0.0, {}, {})
    assert admm.penalty(params, state, nothing) == 0.0


@both
def test_a_step_by_hand(framework):
    layer = Layer("fc", "Linear", "w", (1, 4), (0,), (1,))
    config = resolve([layer])
    params = framework({"w": np.asarray([[4, -3, 2, 1]], np.float32)})
    state = admm.init(params, config)
    np.testing.assert_array_equal(state.z["w"], [[4, -3, 2, 1]])
    np.testing.assert_array_equal(state.u["w"], [[0, 0, 0, 0]])
    state, residuals = admm.step(params, state, config, 0.5, pruner=pp.level)
    np.testing.assert_array_equal(state.z["w"], [[4, -3, 0, 0]])
    np.testing.assert_array_equal(state.u["w"], [[0, 0, 2, 1]])
    assert float(residuals.primal) == pytest.approx(5**0.5)
    assert float(residuals.dual) == pytest.approx(0.5 * 5**0.5)
    # W stays; in W + U = [4, -3, 4, 2] ties of magnitude 3 and 4 go to the third.
    state, residuals = admm.step(params, state, config, {"fc": 2}, pruner=pp.level)
    np.testing.assert_array_equal(state.z["w"], [[4, 0, 4, 0]])
    np.testing.assert_array_equal(state.u["w"], [[0, -3, 0, 2]])
    assert float(residuals.layer_primal["fc"]) == pytest.approx((9 + 4 + 1) ** 0.5)
    assert float(residuals.layer_dual["fc"]) == pytest.approx(2 * 5)


@both
def test_residuals_of_layers_add_up(framework):
    params, config = integers(), resolve()
    state = state_of(params, framework)
    rho = {"conv": 0.5, "fc": 2.0, "stack": 1.0}
    new, residuals = admm.step(framework(params), state, config, rho, pruner=pp.level)
    for layer in LAYERS:
        z, before = (np.asarray(s.z[layer.weight]).astype(float) for s in (new, state))
        primal = np.linalg.norm(params[layer.weight] - z)
        dual = rho[layer.name] * np.linalg.norm(z - before)
        assert float(residuals.layer_primal[layer.name]) == pytest.approx(primal, rel=1e-6)
        assert float(residuals.layer_dual[layer.name]) == pytest.approx(dual, rel=1e-6)
    for total, parts in (
        (residuals.primal, residuals.layer_primal),
        (residuals.dual, residuals.layer_dual),
    ):
        norm = np.linalg.norm([float(x) for x in parts.values()])
        assert float(total) == pytest.approx(norm, rel=1e-6)


# Every run mode gives the same states and masks.


CASES = {
    "element": (pp.level, {"scope": "global"}),
    "channel": (pp.random_pruning, {"granularity": "output_channel"}),
    "n-of-m": (pp.level, {"granularity": NM(1, 2)}),
}


def two_rounds(pruner, stats, params, moved, config):
    """Everything there is to compute: from ``params``, then ``moved``."""
    state = admm.init(params, config)
    state, _ = admm.step(params, state, config, pruner=pruner, stats=stats)
    state, _ = admm.step(moved, state, config, pruner=pruner, stats=stats)
    return *state, admm.masks(moved, state, config, pruner=pruner, stats=stats)


@pytest.mark.parametrize("case", CASES)
def test_every_run_mode_gives_the_same(case):
    pruner, kwargs = CASES[case]
    stats = 5 if pruner is pp.random_pruning else None
    pairs = Layer("pairs", "Linear", "stack.w", (2, 3, 2), (1,), (2,))
    config = resolve([pairs] if case == "n-of-m" else (FC, CONV), **kwargs)
    run = functools.partial(two_rounds, pruner, stats)
    params, moved = integers(6), integers(7)
    expected = run(as_jax(params), as_jax(moved), config)
    got = run(as_torch(params), as_torch(moved), config)
    assert [as_numpy(tree).keys() for tree in got] == [as_numpy(tree).keys() for tree in expected]
    equal([as_numpy(tree) for tree in got], [as_numpy(tree) for tree in expected])
    equal(jax.jit(run)(as_jax(params), as_jax(moved), config), expected)
    # Two models at once, each with its own count.
    pair = [{path: np.stack([x + 1, x]) for path, x in tree.items()} for tree in (params, moved)]
    counts = {name: np.asarray([0, k], np.int32) for name, k in config.counts.items()}
    both = config.with_counts(counts) if counts else config
    rows = jax.jit(jax.vmap(run))(*map(as_jax, pair), both)
    equal(jax.tree.map(lambda x: x[1], rows), expected)
    rows = torch.func.vmap(lambda p, m: run(p, m, config))(*map(as_torch, pair))
    equal(
        [{path: x[1] for path, x in as_numpy(tree).items()} for tree in rows],
        [as_numpy(tree) for tree in expected],
    )


@both
def test_masks_are_those_of_the_weights(framework):
    config = resolve(granularity="output_channel")
    params, moved = framework(integers()), framework(integers(1))
    state, _ = admm.step(params, admm.init(params, config), config, pruner=pp.l2_norm)
    masks = admm.masks(moved, state, config, pruner=pp.l2_norm)
    equal(as_numpy(masks), as_numpy(pp.l2_norm(moved, None, config)))
    assert set(as_numpy(masks)) == {"fc.w", "conv.w", "conv.b", "stack.w"}
    # Weights that have come to Z are pruned where it is zero.
    masks = as_numpy(admm.masks({**moved, **state.z}, state, config, pruner=pp.l2_norm))
    for layer in LAYERS:
        whole = np.broadcast_to(masks[layer.weight], layer.shape)
        np.testing.assert_array_equal(whole, np.asarray(state.z[layer.weight]) != 0)


# A state is arrays of its own.


def test_a_state_is_arrays_and_nothing_of_it_is_shared():
    params, config = integers(), resolve()
    donated = as_jax(params)
    state = admm.init(donated, config)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    jax.jit(lambda p: {path: x + 1 for path, x in p.items()}, donate_argnums=0)(donated)
    np.testing.assert_array_equal(state.z["fc.w"], params["fc.w"])
    tensors = {path: x.requires_grad_() for path, x in as_torch(params).items()}
    state = admm.init(tensors, config)
    new, _ = admm.step(tensors, state, config, pruner=pp.level)
    before = [x.clone() for x in jax.tree.leaves((state, new))]
    with torch.no_grad():
        for x in tensors.values():
            x.zero_()
    equal((state, new), before)
    assert not any(x.requires_grad for x in jax.tree.leaves((state, new)))


@both
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_has_a_state_of_float32(framework, dtype):
    half = {p: np.asarray(jnp.asarray(x / 64).astype(dtype)) for p, x in integers().items()}
    params, config = framework(half), resolve()
    state = admm.init(params, config)
    small = {path: x + 2.0**-12 for path, x in state.u.items()}
    state, _ = admm.step(params, admm.State(state.z, small), config, pruner=pp.level)
    assert all("float32" in str(x.dtype) for x in jax.tree.leaves(state))
    total = np.asarray(state.z["fc.w"]) + np.asarray(state.u["fc.w"])
    np.testing.assert_array_equal(total, half["fc.w"].astype(np.float32) + np.float32(2.0**-12))
    assert "float32" in str(admm.penalty(params, state, config).dtype)
    if framework is as_jax:
        grads = jax.grad(admm.penalty)(params, state, config, 1.0)
        assert grads["fc.w"].dtype == dtype


# Problems of known answer.


def least_squares(seed, features=8, nonzero=3, samples=40):
    """Data of a sparse linear model, and the best of all subsets of so many features."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, features))
    truth = np.zeros(features)
    truth[rng.permutation(features)[:nonzero]] = rng.choice([-1, 1], nonzero) * [1.0, 0.6, 0.4]
    y = x @ truth + 0.1 * rng.normal(size=samples)

    def error(support):
        w = np.linalg.lstsq(x[:, support], y, rcond=None)[0]
        return np.mean((x[:, support] @ w - y) ** 2)

    subsets = [list(s) for s in itertools.combinations(range(features), nonzero)]
    return x.astype(np.float32), y.astype(np.float32), min(subsets, key=error)


OPTIMIZERS = {
    "sgd": optax.sgd(0.05),
    "adamw": optax.adamw(0.02, weight_decay=1e-4),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.rmsprop(0.01)),
}


def scanned(optimizer, loss, params, config, pruner, rho, rounds, steps):
    """ADMM as two nested scans; returns params, state, and the residuals of every round."""

    def train(carry, _):
        params, opt_state, state = carry
        grads = jax.grad(lambda p: loss(p) + admm.penalty(p, state, config, rho))(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, state), None

    def one_round(carry, _):
        (params, opt_state, state), _ = jax.lax.scan(train, carry, None, steps)
        state, residuals = admm.step(params, state, config, rho, pruner=pruner)
        return (params, opt_state, state), residuals

    start = params, optimizer.init(params), admm.init(params, config)
    (params, _, state), residuals = jax.lax.scan(one_round, start, None, rounds)
    return params, state, residuals


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.usefixtures("standard_promotion")
def test_sparse_least_squares_finds_the_best_of_all_subsets(name):
    x, y, support = least_squares(0)
    config = resolve([Layer("w", "Linear", "w", (1, 8), (0,), (1,))], 0.625)
    params = {"w": jnp.zeros((1, 8)) + 0.1}

    def loss(p):
        return jnp.mean((x @ p["w"][0] - y) ** 2)

    run = jit_once(lambda p: scanned(OPTIMIZERS[name], loss, p, config, pp.level, 0.5, 40, 50))
    params, state, residuals = run(params)
    masks = admm.masks(params, state, config, pruner=pp.level)
    assert np.flatnonzero(masks["w"]).tolist() == np.flatnonzero(state.z["w"]).tolist() == support
    # W has come to Z, and Z to rest.
    first, last = (np.asarray(residuals.primal)[i] for i in (0, -1))
    assert last < 0.005 or last < 0.02 * first
    assert residuals.dual[-1] < 0.02
    assert residuals.layer_primal["w"].shape == (40,)


def test_pruned_channels_of_known_answer_for_many_counts_at_once():
    """Half the squared distance to a matrix: the answer is the matrix, without its small rows."""
    matrix = np.random.default_rng(8).normal(size=(6, 5)).astype(np.float32)
    layer = Layer("fc", "Linear", "w", (6, 5), (0,), (1,))
    config = resolve([layer], granularity="output_channel").with_sparsity([1 / 6, 1 / 2, 5 / 6])

    def loss(p):
        return 0.5 * jnp.sum((p["w"] - matrix) ** 2)

    start = {"w": jnp.zeros((6, 5)) + 1e-3}
    run = jax.vmap(lambda c: scanned(optax.sgd(0.3), loss, start, c, pp.l2_norm, 1.5, 60, 30))
    params, state, residuals = jax.jit(run)(config)
    norms = np.linalg.norm(matrix, axis=1)
    for i, count in enumerate((1, 3, 5)):
        keep = ~oracle.lowest(norms, count)[:, None]
        np.testing.assert_allclose(state.z["w"][i], np.where(keep, matrix, 0), atol=1e-4)
        np.testing.assert_allclose(params["w"][i], np.where(keep, matrix, 0), atol=1e-4)
        assert residuals.primal[i, -1] < 1e-4 < residuals.primal[i, 0]
        # U settles at what holds the pruned rows at zero: minus the loss's gradient over rho.
        np.testing.assert_allclose(state.u["w"][i], np.where(keep, 0, matrix / 1.5), atol=1e-4)


def test_torch_trains_the_same_with_its_own_optimizer():
    x, y, support = least_squares(0)
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    config = resolve([Layer("w", "Linear", "w", (1, 8), (0,), (1,))], 0.625)
    params = {"w": torch.full((1, 8), 0.1, requires_grad=True)}
    optimizer = torch.optim.SGD(params.values(), 0.05)
    state, history = admm.init(params, config), []
    for _ in range(40):
        for _ in range(50):
            optimizer.zero_grad()
            loss = ((x @ params["w"][0] - y) ** 2).mean()
            (loss + admm.penalty(params, state, config, 0.5)).backward()
            optimizer.step()
        state, residuals = admm.step(params, state, config, 0.5, pruner=pp.level)
        history.append(float(residuals.primal))
    masks = admm.masks(params, state, config, pruner=pp.level)
    assert torch.nonzero(masks["w"][0])[:, 0].tolist() == support
    assert history[-1] < 0.02 * history[0]
    x, y = jnp.asarray(x), jnp.asarray(y)

    def loss_in_jax(p):
        return jnp.mean((x @ p["w"][0] - y) ** 2)

    start = {"w": jnp.full((1, 8), 0.1)}
    other, _, residuals = scanned(
        optax.sgd(0.05), loss_in_jax, start, config, pp.level, 0.5, 40, 50
    )
    np.testing.assert_allclose(params["w"].detach(), other["w"], atol=1e-5)
    np.testing.assert_allclose(history, residuals.primal, atol=1e-5)


# Bad input.


def good(framework=as_jax):
    params, config = framework(integers()), resolve()
    return params, admm.init(params, config), config


@both
@pytest.mark.parametrize("function", ["penalty", "step", "masks"])
def test_a_state_of_another_model_is_refused(framework, function):
    params, state, config = good(framework)
    call = getattr(admm, function)
    call = call if function == "penalty" else functools.partial(call, pruner=pp.level)
    where = f"admm.{function}"
    with raises(TypeError, where, "state", "tuple"):
        call(params, tuple(state), config)
    without = {path: x for path, x in state.u.items() if path != "fc.w"}
    with raises(KeyError, where, "layer 'fc'", "state.u", "'fc.w'"):
        call(params, state._replace(u=without), config)
    more = {**state.z, "fc.v": state.z["fc.w"]}
    with raises(KeyError, where, "state.z", "'fc.v'", "nearest: 'fc.w'"):
        call(params, state._replace(z=more), config)
    turned = {**state.z, "fc.w": state.z["fc.w"].T}
    with raises(ValueError, where, "layer 'fc'", "(4, 3)", "(3, 4)", "another model"):
        call(params, state._replace(z=turned), config)
    other = good(as_torch if framework is as_jax else as_jax)[1]
    with raises(TypeError, where, "'conv'", "torch", "JAX"):
        call(params, other, config)
    with raises(KeyError, where, "layer 'fc'", "'fc.w'"):
        call({path: x for path, x in params.items() if path != "fc.w"}, state, config)
    with raises(ValueError, where, "layer 'fc'", "(4, 3)"):
        call({**params, "fc.w": params["fc.w"].T}, state, config)
    with raises(TypeError, where, "config", "dict"):
        call(params, state, {})


@both
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(framework, bad):
    values = integers()
    params, state, config = good(framework)
    values["fc.w"][1, 2] = bad
    broken = framework(values)
    with raises(ValueError, "admm.init", "'fc'", "NaN or infinite"):
        admm.init(broken, config)
    for function in (admm.step, admm.masks):
        with raises(ValueError, f"admm.{function.__name__}", "'fc'", "NaN or infinite"):
            function(broken, state, config, pruner=pp.level)
    nan_u = admm.State(state.z, {path: broken.get(path) for path in state.u})
    with raises(ValueError, "admm.step", "'fc'", "NaN or infinite"):
        admm.step(params, nan_u, config, pruner=pp.level)
    if framework is as_jax:
        step = jax.jit(lambda p, s: admm.step(p, s, config, pruner=pp.level))
        _, residuals = step(broken, state)
        assert not np.isfinite(residuals.primal)
        assert np.isfinite(residuals.layer_primal["conv"])


@both
def test_integer_weights_are_refused(framework):
    params, _, config = good(framework)
    params = {**params, "fc.w": framework({"": np.ones((3, 4), np.int32)})[""]}
    with raises(ValueError, "admm.init", "layer 'fc'", "floating", "int32"):
        admm.init(params, config)


@pytest.mark.parametrize(
    ("rho", "error", "parts"),
    [
        (0, ValueError, ("rho", "(0, inf)", "0")),
        (-1.0, ValueError, ("rho", "(0, inf)", "-1")),
        (np.inf, ValueError, ("rho", "(0, inf)", "inf")),
        (np.nan, ValueError, ("rho", "(0, inf)", "nan")),
        (jnp.float32(-2), ValueError, ("rho", "(0, inf)", "-2")),
        (jnp.ones(2), ValueError, ("rho", "(2,)", "vmap")),
        (True, TypeError, ("rho", "number", "True")),
        ("1e-4", TypeError, ("rho", "number", "'1e-4'")),
        (None, TypeError, ("rho", "number", "None")),
        ({"fc": 1.0, "conv": 1.0}, KeyError, ("rho", "'stack'")),
        ({"fc": 1, "conv": 1, "stack": 1, "fcc": 1}, KeyError, ("'fcc'", "nearest: 'fc'")),
        ({"fc": 1, "conv": 0, "stack": 1}, ValueError, ("rho of layer 'conv'", "(0, inf)", "0")),
    ],
    ids=str,
)
def test_a_bad_rho_is_refused(rho, error, parts):
    params, state, config = good()
    with raises(error, "admm.penalty", *parts):
        admm.penalty(params, state, config, rho)
    with raises(error, "admm.step", *parts):
        admm.step(params, state, config, rho, pruner=pp.level)


def test_a_traced_rho():
    params, state, config = good()
    state = admm.State(state.z, {path: x + 1 for path, x in state.u.items()})
    penalties = jax.vmap(lambda rho: admm.penalty(params, state, config, rho))(
        jnp.array([1.0, 2.0])
    )
    weights = sum(x.size for x in state.z.values())
    np.testing.assert_allclose(penalties, [weights / 2, weights])


def test_a_pruner_that_returns_no_masks_is_refused():
    params, state, config = good()
    with raises(KeyError, "admm.step", "no mask", "'conv'"):
        admm.step(params, state, config, pruner=lambda p, s, c: dict.fromkeys(p))
    with raises(TypeError, "'fc.w'", "boolean"):
        admm.step(params, state, config, pruner=lambda p, s, c: {"fc.w": p["fc.w"]})
    with raises(ValueError, "granularity='element'"):
        admm.step(params, state, config, pruner=pp.l2_norm)
