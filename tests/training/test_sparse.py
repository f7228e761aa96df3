"""Sparse training: one update of masks by its definition, and training by it in both frameworks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import purepruning as pp
from purepruning import NM, Layer
from purepruning.training.sparse import moves_of
from purepruning_interop import torch as interop
from tests import oracle
from tests.messages import raises
from tests.modes import as_jax, as_torch, off_host

pytestmark = pytest.mark.usefixtures("unoptimized")

LAYERS = (
    Layer("a", "Linear", "a", (6, 10), (1,), (0,)),
    Layer("s", "Linear", "s", (5, 2, 7), (2,), (0,), stack_axes=(1,)),
)
CONFIG = pp.resolve(0.6, LAYERS)
MOVES = {"a": 7, "s": 3}


def numbers(seed):
    """Integers of distinct magnitudes."""
    rng = np.random.default_rng(seed)
    found = {}
    for layer in LAYERS:
        n = int(np.prod(layer.shape))
        x = rng.permutation(np.arange(1, n + 1)) * rng.choice([-1, 1], n)
        found[layer.weight] = x.reshape(layer.shape).astype(np.float32)
    return found


def start():
    return {p: np.asarray(m) for p, m in pp.random_pruning(as_jax(numbers(0)), 3, CONFIG).items()}


def rewired(weight, slope, mask, moves):
    """The definition: the lowest of those there are go, the highest of all others grow."""
    there = np.flatnonzero(mask)
    left = mask.copy().reshape(-1)
    left[there[oracle.lowest(np.abs(weight.reshape(-1)[there]), moves)]] = False
    others = np.flatnonzero(~left)
    order = np.argsort(-np.abs(slope.reshape(-1)[others]), kind="stable")
    left[others[order[:moves]]] = True
    return left.reshape(mask.shape)


def expected(weights, slopes, masks, moves):
    found = {}
    for layer in LAYERS:
        parts = [x[layer.weight] for x in (weights, slopes, masks)]
        if not layer.stack_axes:
            found[layer.weight] = rewired(*parts, moves[layer.name])
            continue
        each = zip(*(np.moveaxis(x, 1, 0) for x in parts), strict=True)
        found[layer.weight] = np.stack([rewired(*some, moves[layer.name]) for some in each], 1)
    return found


@pytest.mark.parametrize("framework", [as_jax, as_torch])
@pytest.mark.parametrize("device", ["host", "other"])
def test_small_ones_go_and_those_of_large_gradient_grow(framework, device):
    weights, slopes, masks = numbers(1), numbers(2), start()
    weights = pp.apply_masks(as_jax(weights), as_jax(masks))
    weights = {p: np.asarray(x) for p, x in weights.items()}

    def run():
        return pp.rewire(framework(weights), framework(slopes), framework(masks), CONFIG, MOVES)

    if device == "other":
        with off_host():
            found = run()
    else:
        found = run()
    for path, mask in expected(weights, slopes, masks, MOVES).items():
        np.testing.assert_array_equal(np.asarray(found[path]), mask)
        assert not np.array_equal(mask, masks[path])


def test_as_many_connections_as_before_and_none_moved_where_none_is_to():
    weights, slopes, masks = as_jax(numbers(1)), as_jax(numbers(2)), as_jax(start())
    for key in (None, 5):
        grads = slopes if key is None else None
        same = pp.rewire(weights, grads, masks, CONFIG, {"a": 0, "s": 0}, key or 0)
        new = pp.rewire(weights, grads, masks, CONFIG, MOVES, key or 0)
        for path, mask in masks.items():
            np.testing.assert_array_equal(same[path], mask)
            assert int(new[path].sum()) == int(mask.sum())


def test_what_grows_at_random_depends_on_the_key_alone():
    weights, masks = numbers(1), start()
    found = [
        pp.rewire(framework(weights), None, framework(masks), CONFIG, MOVES, key)
        for framework, key in ((as_jax, 5), (as_torch, 5), (as_jax, 6))
    ]
    one, two, other = ({p: np.asarray(m) for p, m in masks.items()} for masks in found)
    np.testing.assert_equal(one, two)
    assert any(not np.array_equal(one[p], other[p]) for p in one)
    # Over many keys, every place that was free grows equally often.
    grown = np.zeros((6, 10))
    for key in range(200):
        new = pp.rewire(as_jax(weights), None, as_jax(masks), CONFIG, MOVES, key)["a"]
        grown += np.asarray(new) & ~masks["a"]
    free = grown[~masks["a"]]
    mean = free.mean()
    assert mean > 20
    assert np.abs(free - mean).max() < 5 * np.sqrt(mean)


def test_fractions_fall_by_a_cosine():
    table = Layer("w", "Linear", "w", (2000, 1000), (1,), (0,))
    config = pp.resolve(0.5, [table])
    moves = moves_of(config, 0, 25_000, 100, 0.3, "cosine")["w"]
    assert len(moves) == 251
    shares = np.asarray([0.3, 0.29998816, 0.15, 0.0000118, 0])
    got = moves[[0, 1, 125, 249, 250]] / 1e6
    np.testing.assert_allclose(got, shares, atol=1.1e-6)
    assert moves_of(config, 0, 200, 100, 0.3, "linear")["w"].tolist() == [300_000, 150_000, 0]
    assert moves_of(config, 50, 200, 100, 0.25, "constant")["w"].tolist() == [250_000] * 2


_TARGETS = [np.round(x) for x in (np.sin(np.arange(60.0)) * 9, np.cos(np.arange(70.0)) * 9)]
_TARGETS = [x.reshape(y.shape).astype(np.float32) for x, y in zip(_TARGETS, LAYERS, strict=True)]
SETTINGS = {"end_step": 6, "begin_step": 1, "every": 2, "drop_fraction": 0.5}


def slopes(params):
    """Gradients that are exact for some steps, and not zero where weights are."""
    pairs = zip(params.items(), _TARGETS, strict=True)
    return {n: 0.5 * x - as_is(x, t) for (n, x), t in pairs}


def as_is(x, t):
    return torch.from_numpy(t) if isinstance(x, torch.Tensor) else t


def trained_in_jax(grow, steps=8, jit=False, settings=SETTINGS):
    params, masks = as_jax(numbers(4)), as_jax(start())
    params = pp.apply_masks(params, masks)
    inner = optax.sgd(0.25, momentum=0.5)
    tx = pp.sparse_training(CONFIG, inner, masks=masks, grow=grow, key=9, **settings)

    def step(params, state):
        updates, state = tx.update(slopes(params), state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step) if jit else step
    state, seen = tx.init(params), []
    for _ in range(steps):
        params, state = step(params, state)
        seen.append(({n: np.asarray(x) for n, x in params.items()}, pp.get_masks(state, params)))
    return seen, state


def trained_in_torch(grow, steps=8):
    masks = as_torch(start())
    params = {n: torch.nn.Parameter(x) for n, x in as_torch(numbers(4)).items()}
    interop.apply_(params, masks)
    optimizer = torch.optim.SGD(params.values(), lr=0.25, momentum=0.5)
    seen = []
    with interop.sparse_training(
        params, CONFIG, optimizer, masks=masks, grow=grow, key=9, **SETTINGS
    ) as connections:
        for _ in range(steps):
            optimizer.zero_grad()
            with torch.no_grad():
                for n, g in slopes(dict(params)).items():
                    params[n].grad = g.clone()
            optimizer.step()
            seen.append(
                ({n: x.detach().numpy().copy() for n, x in params.items()}, connections.masks)
            )
    return seen, optimizer.state


@pytest.mark.parametrize("grow", ["gradient", "random", "none"])
def test_training_is_the_same_in_optax_compiled_and_in_torch(grow):
    """Weights are exact for some steps: quarters of quarters."""
    (eager, state), (compiled, _) = trained_in_jax(grow), trained_in_jax(grow, jit=True)
    by_torch, _ = trained_in_torch(grow)
    before, moved = start(), []
    for one, two, three in zip(eager, compiled, by_torch, strict=True):
        for n in one[0]:
            np.testing.assert_array_equal(one[1][n], two[1][n])
            np.testing.assert_array_equal(one[1][n], three[1][n])
            np.testing.assert_allclose(one[0][n], two[0][n], rtol=1e-6)
            np.testing.assert_allclose(one[0][n], three[0][n], rtol=1e-6)
            assert np.all(one[0][n][~np.asarray(one[1][n])] == 0)
            assert int(one[1][n].sum()) == int(start()[n].sum())
        moved.append(any(not np.array_equal(one[1][n], before[n]) for n in before))
        before = {n: np.asarray(m) for n, m in one[1].items()}
    # At step 5 the cosine is down to less than one connection.
    due = [False] * 8 if grow == "none" else [t in (1, 3) for t in range(8)]
    assert moved == due
    (trace,) = (x for x in jax.tree.leaves(state.kept.inner, is_leaf=dict_of_arrays) if x)
    for n, mask in eager[-1][1].items():
        assert np.all(np.asarray(trace[n])[~np.asarray(mask)] == 0)


def dict_of_arrays(node):
    return isinstance(node, dict) and bool(node)


def test_new_connections_begin_at_zero_and_so_do_their_moments():
    settings = {**SETTINGS, "every": 1, "begin_step": 0}
    seen, state = trained_in_jax("gradient", steps=1, settings=settings)
    (weights, masks), old = seen[0], start()
    (trace,) = (x for x in jax.tree.leaves(state.kept.inner, is_leaf=dict_of_arrays) if x)
    new = 0
    for n in weights:
        grown = np.asarray(masks[n]) & ~old[n]
        new += int(grown.sum())
        assert np.all(weights[n][grown] == 0)
        assert np.all(np.asarray(trace[n])[grown] == 0)
    assert new > 5


def test_wrong_settings_are_refused():
    masks = as_jax(start())

    def refuses(error, *parts, config=CONFIG, masks=masks, **others):
        settings = {**SETTINGS, **others}
        with raises(error, "sparse_training", *parts):
            tx = pp.sparse_training(config, optax.sgd(1.0), masks=masks, **settings)
            tx.init(as_jax(numbers(0)))

    refuses(ValueError, "grow", "'gradient'", grow="rigl")
    refuses(ValueError, "end_step", end_step=0)
    refuses(ValueError, "pp.search.erk", config=pp.resolve(0.6, LAYERS, scope="global"))
    refuses(ValueError, "layer 'a'", "36", masks={**masks, "a": jnp.ones((6, 10), bool)})
    refuses(KeyError, "layer 's'", masks={"a": masks["a"], "s": None})
    params = {n: torch.nn.Parameter(x) for n, x in as_torch(numbers(4)).items()}
    optimizer = torch.optim.SGD(params.values(), lr=0.25)
    settings = {**SETTINGS, "begin_step": 0}
    with (
        interop.sparse_training(params, CONFIG, optimizer, masks=as_torch(start()), **settings),
        raises(ValueError, "layer 'a'", "no gradient"),
    ):
        optimizer.step()


def test_sr_ste_pulls_what_is_pruned_to_zero():
    layer = Layer("w", "Linear", "w", (4, 3), (1,), (0,))
    config = pp.resolve([{"op_types": ["Linear"]}], [layer], granularity=NM(2, 4))
    weight = np.arange(12.0, dtype=np.float32).reshape(4, 3) - 6
    grads = np.full((4, 3), 0.5, np.float32)
    for framework in (as_jax, as_torch):
        params = framework({"w": weight})
        masks = pp.level(params, None, config)
        got = pp.sr_ste(framework({"w": grads}), params, masks, decay=0.25)["w"]
        expected = grads + 0.25 * np.where(np.asarray(masks["w"]), 0, weight)
        np.testing.assert_array_equal(np.asarray(got), expected)
    assert (expected != 0.5).sum() in (5, 6)  # one weight is zero


@pytest.mark.parametrize("framework", [as_jax, as_torch])
def test_sr_ste_refuses_nan(framework):
    masks = framework({"w": np.array([True, False])})
    for params, grads in (([np.nan, 2], [3, 4]), ([1, 2], [3, np.inf])):
        with raises(ValueError, "sr_ste", "'w'", "NaN"):
            pp.sr_ste(
                framework({"w": np.float32(grads)}), framework({"w": np.float32(params)}), masks
            )


def test_a_decay_of_another_framework():
    """A number of JAX serves tensors; one of torch is refused elsewhere, in words."""
    numbers, mask = {"w": np.float32([4, 1])}, {"w": np.array([True, False])}
    weights, masks = as_torch(numbers), as_torch(mask)
    got = pp.sr_ste(weights, weights, masks, decay=jnp.float32(0.25))
    assert got["w"].tolist() == [4, 1.25]
    weights, masks = as_jax(numbers), as_jax(mask)
    with raises(TypeError, "sr_ste: decay", "another framework"):
        pp.sr_ste(weights, weights, masks, decay=torch.tensor(0.25))
