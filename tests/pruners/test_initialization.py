"""Pruning at initialisation: the scores of network G, and properties that the papers state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import purepruning as pp
from purepruning import Layer
from purepruning.stats import gradients
from purepruning.stats.accumulate import value
from tests.messages import raises
from tests.modes import as_jax, as_torch

pytestmark = pytest.mark.usefixtures("unoptimized")

SHAPES = ((6, 5), (5, 4), (4, 3))
LAYERS = tuple(Layer(f"w{i}", "Linear", f"w{i}", s, (1,), (0,)) for i, s in enumerate(SHAPES))
X = np.random.RandomState(10).standard_normal((8, 6)).astype(np.float32)
Y = np.random.RandomState(11).randint(0, 3, 8)


def network():
    """Network G: three linear layers with ReLU between, no biases, 62 weights."""
    return {
        f"w{i}": np.random.RandomState(i + 1).standard_normal(s).astype(np.float32)
        for i, s in enumerate(SHAPES)
    }


def outputs(params, x):
    xp = torch if isinstance(x, torch.Tensor) else jnp
    for i in range(3):
        x = x @ params[f"w{i}"]
        x = xp.where(x > 0, x, 0.0) if i < 2 else x
    return x


def loss(framework, temperature=1.0):
    """The mean cross-entropy, of logits divided by the temperature."""
    x = framework({"x": X})["x"]
    if framework is as_torch:
        target = torch.from_numpy(Y)
        return lambda p: torch.nn.functional.cross_entropy(outputs(p, x) / temperature, target)
    return lambda p: -jnp.mean(jax.nn.log_softmax(outputs(p, x) / temperature)[np.arange(8), Y])


def grad(framework):
    return torch.func.grad if framework is as_torch else jax.grad


def seen(framework, params, slopes, config):
    stats = gradients.init(params, config, keep=["signed"])
    return gradients.update(stats, params, slopes, config)


def keeping(kept, **options):
    """All weights ranked together, of which so many stay; a layer may lose all of its own."""
    rule = {"op_types": ["Linear"], "max_sparsity_per_layer": 1.0, "allow_empty": True}
    config = pp.resolve([rule], LAYERS, scope="global", **options)
    return config.with_counts({"rule 0": 62 - kept})


def kept(masks):
    return [int(np.asarray(masks[f"w{i}"]).sum()) for i in range(3)]


frameworks = pytest.mark.parametrize("framework", [as_jax, as_torch])


@frameworks
def test_snip(framework):
    params = framework(network())
    stats = seen(framework, params, grad(framework)(loss(framework))(params), keeping(12))
    scores = [np.abs(np.asarray(value(stats.signed[f"w{i}"]), np.float64)) for i in range(3)]
    total = sum(s.sum() for s in scores)
    np.testing.assert_allclose(float(loss(framework)(params)), 2.603092663006767, rtol=1e-6)
    np.testing.assert_allclose(total, 19.81684734612972, rtol=1e-5)
    shares = [s.sum() / total for s in scores]
    np.testing.assert_allclose(shares, [0.68742669, 0.20681782, 0.10575549], rtol=1e-5)
    first = [0.05117052, 0.01744704, 0.01988165, 0.00061194, 0.01244576]
    np.testing.assert_allclose(scores[0][0] / total, first, rtol=1e-4)
    assert kept(pp.snip(params, stats, keeping(12))) == [9, 2, 1]


def test_snip_of_one_batch_is_taylor():
    """And of several it is not: squares are summed, not squared sums."""
    params, config = as_jax(network()), keeping(12)
    slopes = jax.grad(loss(as_jax))(params)
    stats = gradients.init(params, config, keep=["squares", "signed"])
    stats = gradients.update(stats, params, slopes, config)
    for framework in (as_jax, as_torch):
        numbers = jax.tree.map(lambda x, f=framework: f({"": np.array(x)})[""], stats)
        weights = framework(network())
        a, b = (p(weights, numbers, config) for p in (pp.snip, pp.taylor_fo))
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    back = gradients.update(stats, params, jax.tree.map(lambda g: -0.9 * g, slopes), config)
    assert float(value(back.signed["w0"])[0, 0]) != float(value(stats.signed["w0"])[0, 0])
    np.testing.assert_allclose(
        np.asarray(value(back.signed["w0"])), 0.1 * np.asarray(value(stats.signed["w0"])), rtol=1e-3
    )


@frameworks
def test_grasp(framework):
    params = framework(network())
    at = loss(framework, 200.0)
    slopes = grad(framework)(at)(params)
    norm = sum(float((g * g).sum()) for g in slopes.values())
    np.testing.assert_allclose(norm, 1.2829358e-4, rtol=1e-4)
    flow = pp.hessian_gradient(at, params)
    stats = seen(framework, params, flow, keeping(12))
    scores = [-np.asarray(value(stats.signed[f"w{i}"]), np.float64) for i in range(3)]
    np.testing.assert_allclose(sum(s.sum() for s in scores), -2.5636402e-4, rtol=1e-4)
    first = [-2.53344877e-6, 6.04605399e-7, 2.15556204e-6, -6.02209527e-7, -1.67114935e-6]
    np.testing.assert_allclose(scores[0][0], first, rtol=1e-3)
    assert kept(pp.grasp(params, stats, keeping(12))) == [4, 4, 4]


def flow_of(framework, params, config, **options):
    ones = framework({"x": np.ones((1, 6), np.float32)})["x"]
    return pp.synaptic_flow(lambda p: outputs(p, ones), params, config, **options)


@frameworks
def test_synflow(framework):
    """Scores, and the law of conservation: every layer's have the same sum."""
    params, config = framework(network()), keeping(12)
    stats = seen(framework, params, flow_of(framework, params, config), config)
    scores = [np.asarray(value(stats.signed[f"w{i}"]), np.float64) for i in range(3)]
    np.testing.assert_allclose([s.sum() for s in scores], [193.83839808699693] * 3, rtol=1e-5)
    first = [11.54359774, 6.10250134, 5.95437705, 5.24439082, 3.08475306]
    np.testing.assert_allclose(scores[0][0], first, rtol=1e-5)


def by_synflow(framework, density, rounds):
    params = framework(network())
    config = keeping(62 - int((1 - density) * 62))
    steps = pp.iterative(pp.synflow, config, rounds=rounds)
    state = steps.init(params)
    for _ in range(rounds):
        at = steps.masked(state, params)
        stats = seen(framework, at, flow_of(framework, at, config), config)
        state = steps.step(state, params, stats)
    return steps.masks(state, params), params


@pytest.mark.parametrize("framework", [pytest.param(as_jax, marks=pytest.mark.full), as_torch])
def test_a_layer_collapses_in_one_round_and_not_in_a_hundred(framework):
    assert kept(by_synflow(framework, 0.1, 1)[0]) == [0, 3, 4]
    assert kept(by_synflow(framework, 0.2, 1)[0]) == [3, 4, 6]
    assert kept(by_synflow(framework, 0.2, 100)[0]) == [5, 4, 4]
    masks, params = by_synflow(framework, 0.1, 100)
    # The seventh weight that the count leaves leads nowhere: nothing flows through it.
    config = keeping(7)
    at = pp.apply_masks(params, masks)
    flow = flow_of(framework, at, config)
    alive = [int(np.count_nonzero(np.asarray(flow[n] * at[n]))) for n in ("w0", "w1", "w2")]
    assert alive == [2, 2, 2]


@frameworks
def test_layers_rescaled_by_powers_of_two_change_all_scores_by_one_factor(framework):
    """Sixty layers of gain 64, whose flow no float32 holds; and of gain 1.5, which does."""
    depth, width = 60, 8

    def flow(gain, rescale):
        rng = np.random.default_rng(0)
        weights = {
            f"w{i:02}": (gain / width * rng.uniform(0.5, 1.5, (width, width))).astype(np.float32)
            for i in range(depth)
        }
        table = [Layer(n, "Linear", n, (width, width), (1,), (0,)) for n in weights]
        params = framework(weights)
        ones = framework({"x": np.ones((1, width), np.float32)})["x"]

        def run(p):
            return functools.reduce(lambda x, name: x @ p[name], sorted(weights), ones)

        found = pp.synaptic_flow(run, params, pp.resolve(0.5, table), rescale=rescale)
        return {n: np.float64(np.asarray(found[n])) * weights[n] for n in weights}

    plain, scaled = flow(1.5, False), flow(1.5, True)
    factor = scaled["w00"][0, 0] / plain["w00"][0, 0]
    assert abs(np.log2(factor) - round(np.log2(factor))) < 1e-4
    for name in plain:
        np.testing.assert_allclose(scaled[name], factor * plain[name], rtol=1e-4)
    with np.errstate(all="ignore"):
        assert not all(np.isfinite(s).all() for s in flow(64, False).values())
    sums = [s.sum() for s in flow(64, True).values()]
    assert np.isfinite(sums).all()
    np.testing.assert_allclose(sums, sums[0], rtol=1e-4)


def test_rounds_leave_the_densities_of_the_paper():
    """The largest counts that leave 62 * (7 / 62)^(t / 4), and 62 - 55 t / 4 where linear."""
    config = keeping(7)
    assert pp.iterative(pp.snip, config, rounds=4).counts["rule 0"].tolist() == [26, 41, 49, 55]
    linear = pp.iterative(pp.snip, config, rounds=4, curve="linear")
    assert linear.counts["rule 0"].tolist() == [13, 27, 41, 55]


@frameworks
@pytest.mark.parametrize("regrow", [False, True])
def test_what_may_come_back(framework, regrow):
    """FORCE takes the dense weights and may regrow; iterative SNIP never does."""
    params, config = framework(network()), keeping(8)
    steps = pp.iterative(pp.snip, config, rounds=10, regrow=regrow)
    state, came_back = steps.init(params), 0
    for n in steps.counts["rule 0"]:
        at = steps.masked(state, params)
        stats = seen(framework, params, grad(framework)(loss(framework))(at), config)
        new = steps.step(state, params, stats)
        assert sum(kept(new.masks)) == 62 - n
        came_back += sum(int((new.masks[p] & ~state.masks[p]).sum()) for p in new.masks)
        state = new
    assert (came_back > 0) == regrow


def test_rounds_are_one_compiled_loop():
    params, config = as_jax(network()), keeping(8)
    steps = pp.iterative(pp.snip, config, rounds=10)

    def round_(_, state):
        slopes = jax.grad(loss(as_jax))(steps.masked(state, params))
        return steps.step(state, params, seen(as_jax, params, slopes, config))

    compiled = jax.jit(lambda s: jax.lax.fori_loop(0, 10, round_, s))(steps.init(params))
    state = steps.init(params)
    for _ in range(10):
        state = round_(0, state)
    for path in state.masks:
        np.testing.assert_array_equal(compiled.masks[path], state.masks[path])


def test_fisher_is_half_the_mean_of_squares_of_examples():
    """Of single examples, by hand; damping adds as much to the diagonal."""
    params, config = as_jax(network()), keeping(20)
    stats, total = gradients.init(params, config), dict.fromkeys(params, 0.0)
    for x, y in zip(X, Y, strict=True):

        def one(p, x=x, y=y):
            return -jax.nn.log_softmax(outputs(p, jnp.asarray(x)[None])[0])[y]

        slopes = jax.grad(one)(params)
        stats = gradients.update(stats, params, slopes, config)
        total = {n: total[n] + np.float64(slopes[n]) ** 2 for n in total}
    for damping in (0.0, 0.05):
        scores = [0.5 * np.float64(params[n]) ** 2 * (damping + total[n] / 8) for n in total]
        flat = np.concatenate([s.reshape(-1) for s in scores])
        expected = flat >= np.sort(flat)[42]
        masks = pp.fisher(params, stats, config, damping=damping)
        got = np.concatenate([np.asarray(masks[n]).reshape(-1) for n in total])
        np.testing.assert_array_equal(got, expected)


def test_a_damping_of_another_framework():
    """A number of JAX serves tensors; one of torch is refused elsewhere, in words."""
    layer = Layer("fc", "Linear", "w", (1, 2), (0,), (1,))
    weight, slope = {"w": np.float32([[1, -2]])}, {"w": np.float32([[-3, 1]])}
    config = pp.resolve(0.5, [layer])

    def pruned(framework, damping):
        params, grads = framework(weight), framework(slope)
        stats = gradients.update(gradients.init(params, config), params, grads, config)
        return pp.fisher(params, stats, config, damping=damping)["w"].tolist()

    assert pruned(as_torch, jnp.float32(9)) == [[False, True]]
    with raises(TypeError, "fisher: damping", "another framework"):
        pruned(as_jax, torch.tensor(9.0))
