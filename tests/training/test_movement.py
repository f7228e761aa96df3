"""Movement pruning: gradients in closed form, schedules by hand, features that must be found."""

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import purepruning as pp
from purepruning import NM, Block, Layer
from purepruning.training import movement
from tests import oracle
from tests.fast import jit_once
from tests.messages import raises
from tests.modes import as_jax, as_numpy, as_torch

pytestmark = pytest.mark.usefixtures("unoptimized")

LAYERS = (
    Layer("conv", "Conv2d", "conv.w", (2, 2, 2, 4), (3,), (2,), bias="conv.b"),
    Layer("fc", "Linear", "fc.w", (6, 8), (0,), (1,), bias="fc.b"),
    Layer("stack", "Linear", "stack.w", (2, 3, 4), (1,), (2,), stack_axes=(0,)),
)
FC = LAYERS[1]
FRAMEWORKS = {"jax": as_jax, "torch": as_torch}
both = pytest.mark.parametrize("framework", FRAMEWORKS.values(), ids=FRAMEWORKS)
CHANNEL = "output_channel"
GRANULARITIES = ("element", CHANNEL, "input_channel", Block((3, 2)), NM(1, 2))
every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)


def resolve(granularity="element", layers=LAYERS, sparsity=0.5, **kwargs):
    rule = {"op_types": ["default"], **kwargs.pop("rule", {})}
    if not isinstance(granularity, NM) and sparsity is not None:
        rule["sparsity"] = sparsity
    return pp.resolve([rule], layers, granularity=granularity, **kwargs)


def parameters(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {x.weight: x.shape for x in LAYERS} | {"conv.b": (4,), "fc.b": (6,), "free": (3,)}
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


def random_scores(config, seed=1):
    """Distinct scores of integers, by layer."""
    rng = np.random.default_rng(seed)
    zeros = movement.init(as_jax(parameters()), config)
    return {
        name: (rng.permutation(x.size) - x.size // 2).reshape(x.shape).astype(np.float32)
        for name, x in zeros.items()
    }


def equal(a, b):
    a, b = as_numpy(a), as_numpy(b)
    assert a.keys() == b.keys()
    for path, x in a.items():
        np.testing.assert_array_equal(x, b[path])


def in_units(scores, layer, granularity):
    """Scores as ``(stacked, units)``, whatever their shape."""
    if granularity == "element" or isinstance(granularity, NM):
        return oracle.unit_sums(scores, layer, "element")
    return scores


# Masks.


@every_granularity
@both
def test_scores_start_at_zero_for_every_unit(framework, granularity):
    config = resolve(granularity)
    scores = movement.init(framework(parameters()), config)
    for layer in LAYERS:
        single = granularity == "element" or isinstance(granularity, NM)
        shape = oracle.unit_sums(np.ones(layer.shape), layer, granularity).shape
        assert tuple(scores[layer.name].shape) == (layer.shape if single else shape)
        assert "float32" in str(scores[layer.name].dtype)
        assert not np.any(np.asarray(scores[layer.name]))


@both
@pytest.mark.parametrize("granularity", GRANULARITIES[:4], ids=str)
def test_the_hard_form_keeps_exactly_the_highest_scores(framework, granularity):
    for sparsity in (0.0, 0.3, 0.8):
        config = resolve(granularity, sparsity=sparsity)
        scores = random_scores(config)
        found = as_numpy(movement.masks(framework(parameters()), framework(scores), config))
        for layer in LAYERS:
            rows = in_units(scores[layer.name], layer, granularity)
            pruned = [oracle.lowest(row, config.counts[layer.name]) for row in rows]
            mask = np.broadcast_to(found[layer.weight], layer.shape)
            np.testing.assert_array_equal(mask, oracle.spread(pruned, layer, granularity))


@both
@pytest.mark.parametrize(
    ("granularity", "allow_empty"),
    [(g, False) for g in GRANULARITIES[:4]] + [(CHANNEL, True)],
    ids=str,
)
def test_the_soft_form_keeps_what_is_above_the_threshold(framework, granularity, allow_empty):
    config = resolve(granularity, sparsity=None, rule={"allow_empty": allow_empty})
    scores = random_scores(config)
    for threshold in (0.0, 0.2, 0.5, 1 - 1e-4, 1 - 1e-7):
        masks = movement.masks(framework(parameters()), framework(scores), config, threshold)
        found = as_numpy(masks)
        for layer in LAYERS:
            rows = in_units(scores[layer.name], layer, granularity).astype(float)
            keep = 1 / (1 + np.exp(-rows)) > threshold
            if not allow_empty:
                keep[np.arange(len(rows)), rows.argmax(axis=1)] = True
            mask = np.broadcast_to(found[layer.weight], layer.shape)
            np.testing.assert_array_equal(mask, oracle.spread(~keep, layer, granularity))
            if layer.bias is not None and granularity == CHANNEL:
                np.testing.assert_array_equal(found[layer.bias], keep.reshape(-1))


@both
def test_of_equal_scores_the_last_one_is_spared(framework):
    params, config = framework(parameters()), resolve(CHANNEL)
    masks = as_numpy(movement.masks(params, movement.init(params, config), config, 0.5))
    assert masks["fc.w"].reshape(-1).tolist() == [False] * 5 + [True]
    assert masks["stack.w"].reshape(2, 3).tolist() == [[False, False, True]] * 2
    masks = as_numpy(movement.masks(params, movement.init(params, config), config))
    assert masks["fc.w"].reshape(-1).tolist() == [False] * 3 + [True] * 3


def run_modes(function, params, scores, config, values):
    """``function(params, scores, config, value)`` for many values, in every mode, as NumPy."""
    j, t = (as_jax(params), as_jax(scores)), (as_torch(params), as_torch(scores))
    yield [function(*j, config, v.item()) for v in values]
    jitted = jax.jit(function)
    yield [jitted(*j, config, jnp.asarray(v)) for v in values]
    yield [function(*t, config, v.item()) for v in values]
    yield [function(*t, config, torch.as_tensor(v)) for v in values]
    # Mapped over the value, and over models at the same time.
    pair = [{p: np.stack([x] * len(values)) for p, x in tree.items()} for tree in (params, scores)]
    stacked = jax.jit(jax.vmap(function, in_axes=(0, 0, None, 0)))(
        *map(as_jax, pair), config, jnp.asarray(values)
    )
    yield [jax.tree.map(lambda x: x[i], stacked) for i in range(len(values))]  # noqa: B023
    stacked = torch.func.vmap(lambda p, s, v: function(p, s, config, v))(
        *map(as_torch, pair), torch.as_tensor(values)
    )
    yield [{path: x[i] for path, x in stacked.items()} for i in range(len(values))]


def at_step(params, scores, configs, step):
    return movement.apply(params, scores, movement.at(configs, step))


@pytest.mark.parametrize("granularity", ["element", Block((3, 2)), NM(1, 2)], ids=str)
def test_every_run_mode_gives_the_same(granularity):
    params = parameters()
    config = resolve(granularity)
    scores = random_scores(config)
    if isinstance(granularity, NM):
        modes = run_modes(
            lambda p, s, c, _: movement.apply(p, s, c), params, scores, config, np.zeros(1)
        )
    else:
        configs = movement.schedule(config, 10, begin_step=2, end_step=8)
        modes = run_modes(at_step, params, scores, configs, np.asarray([0, 5, 12], np.int32))
    expected = next(modes)
    if not isinstance(granularity, NM):
        equal(expected[0], as_jax(params))
        masks = movement.masks(as_jax(params), as_jax(scores), config)
        equal(expected[2], pp.apply_masks(as_jax(params), masks))
    for mode in modes:
        for got, wanted in zip(mode, expected, strict=True):
            equal(got, wanted)


def test_every_run_mode_gives_the_same_for_a_threshold():
    config = resolve(CHANNEL, sparsity=None)
    params, scores = parameters(), random_scores(config)
    values = np.asarray([0.0, 0.3, 0.9], np.float32)
    modes = run_modes(movement.apply, params, scores, config, values)
    expected = next(modes)
    for mode in modes:
        for got, wanted in zip(mode, expected, strict=True):
            equal(got, wanted)
    masks = movement.masks(as_jax(params), as_jax(scores), config, 0.3)
    equal(expected[1], pp.apply_masks(as_jax(params), masks))


def test_large_layers_are_cut_exactly_in_either_framework():
    """More weights than are sorted: counted in JAX, partitioned in torch, under gradients too."""
    layer = Layer("fc", "Linear", "w", (300, 300), (0,), (1,))
    config = resolve(layers=[layer], sparsity=0.29)
    rng = np.random.default_rng(2)
    params, scores = ({"w": rng.normal(size=(300, 300)).astype(np.float32)} for _ in range(2))
    scores = {"fc": scores["w"]}
    keep = ~oracle.lowest(scores["fc"], 26100)

    def loss(params, scores):
        return (movement.apply(params, scores, config)["w"] ** 2).sum()

    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(as_jax(params), as_jax(scores))
    functional = torch.func.grad(loss, argnums=(0, 1))(as_torch(params), as_torch(scores))
    for by_weight, by_score in (grads, functional):
        np.testing.assert_array_equal(np.asarray(by_weight["w"]) != 0, keep)
        np.testing.assert_array_equal(np.asarray(by_weight["w"])[keep], 2 * params["w"][keep])
        square = np.where(keep, 2 * params["w"] ** 2, 0)
        np.testing.assert_allclose(by_score["fc"], square, rtol=1e-6)


# Gradients.


def expected_gradients(params, scores, config, granularity, slopes, threshold):
    """By hand: slope times mask for weights, slope times weight, summed over units, for scores."""
    masks = as_numpy(movement.masks(as_jax(params), as_jax(scores), config, threshold))
    by_weight = {path: np.where(masks.get(path, True), g, 0) for path, g in slopes.items()}
    by_score = {}
    for layer in LAYERS:
        straight = slopes[layer.weight] * params[layer.weight]
        sums = oracle.unit_sums(straight, layer, granularity)
        single = granularity == "element" or isinstance(granularity, NM)
        by_score[layer.name] = straight if single else sums
    return by_weight, by_score


@both
@pytest.mark.parametrize(
    ("granularity", "threshold"),
    [(g, None) for g in GRANULARITIES] + [(CHANNEL, 0.6)],
    ids=str,
)
def test_gradients_go_straight_through(framework, granularity, threshold):
    config = resolve(granularity)
    params, scores, slopes = parameters(), random_scores(config), parameters(5)
    weights = framework(slopes)

    def loss(params, scores):
        seen = movement.apply(params, scores, config, threshold)
        return sum((seen[path] * w).sum() for path, w in weights.items())

    both = (0, 1)
    grad = jax.jit(jax.grad(loss, both)) if framework is as_jax else torch.func.grad(loss, both)
    got = grad(framework(params), framework(scores))
    wanted = expected_gradients(params, scores, config, granularity, slopes, threshold)
    for mine, theirs in zip(got, wanted, strict=True):
        for path, x in theirs.items():
            np.testing.assert_allclose(mine[path], x, rtol=1e-5, atol=1e-6)
    if framework is as_torch:
        leaves = [
            {path: x.requires_grad_() for path, x in as_torch(tree).items()}
            for tree in (params, scores)
        ]
        loss(*leaves).backward()
        for tree, mine in zip(leaves, got, strict=True):
            equal({path: x.grad for path, x in tree.items()}, mine)


def test_gradients_under_torch_vmap():
    config = resolve(CHANNEL)
    pair = [
        {p: np.stack([x, 2 * x]) for p, x in t.items()}
        for t in (parameters(), random_scores(config))
    ]

    def loss(params, scores):
        return (movement.apply(params, scores, config)["fc.w"] ** 2).sum()

    many = torch.func.vmap(torch.func.grad(loss, argnums=1))(*map(as_torch, pair))
    in_jax = jax.jit(jax.vmap(jax.grad(loss, argnums=1)))(*map(as_jax, pair))
    np.testing.assert_allclose(many["fc"], in_jax["fc"], rtol=1e-5)
    one = torch.func.grad(loss, argnums=1)(
        *({p: x[1] for p, x in as_torch(t).items()} for t in pair)
    )
    np.testing.assert_allclose(many["fc"][1], one["fc"], rtol=1e-5)


@both
def test_block_gradients_of_half_precision_are_summed_in_float32(framework):
    layer = Layer("fc", "Linear", "w", (1, 4096), (0,), (1,))
    config = resolve(CHANNEL, [layer], 0.0)
    ones = {"w": np.asarray(jnp.ones((1, 4096), jnp.bfloat16))}

    def loss(scores):
        return (movement.apply(framework(ones), scores, config)["w"]).sum()

    grad = jax.jit(jax.grad(loss)) if framework is as_jax else torch.func.grad(loss)
    scores = movement.init(framework(ones), config)
    assert float(grad(scores)["fc"][0, 0]) == 4096
    assert "bfloat16" in str(movement.apply(framework(ones), scores, config)["w"].dtype)


@both
def test_infinite_scores_pin_a_unit(framework):
    config = resolve(CHANNEL, [FC], 0.5)
    params = framework({p: x for p, x in parameters().items() if p.startswith("fc")})
    scores = framework({"fc": np.asarray([[-np.inf, np.inf, 1, 2, 3, 4]], np.float32)})

    def loss(scores):
        return (movement.apply(params, scores, config)["fc.w"] ** 2).sum()

    grad = (jax.grad if framework is as_jax else torch.func.grad)(loss)(scores)["fc"]
    assert np.isfinite(np.asarray(grad)).all()
    assert np.asarray(grad)[0, :2].tolist() == [0, 0]
    mask = as_numpy(movement.masks(params, scores, config))["fc.w"]
    assert mask.reshape(-1).tolist() == [False, True, False, False, True, True]


@both
def test_the_penalty_and_its_gradient(framework):
    scores = random_scores(resolve())
    sigmoid = {name: 1 / (1 + np.exp(-s.astype(float))) for name, s in scores.items()}
    value = np.mean([np.mean(s) for s in sigmoid.values()])
    assert float(movement.penalty(framework(scores))) == pytest.approx(value, rel=1e-6)
    grad = (jax.grad if framework is as_jax else torch.func.grad)(movement.penalty)
    for name, slope in grad(framework(scores)).items():
        wanted = sigmoid[name] * (1 - sigmoid[name]) / sigmoid[name].size / len(scores)
        np.testing.assert_allclose(slope, wanted, rtol=1e-4, atol=1e-7)


# The schedule.


def cubic(t, begin_step, end_step):
    """Exactly."""
    if t <= begin_step:
        return Fraction(0)
    left = Fraction(max(end_step - t, 0), end_step - begin_step)
    return 1 - left**3


@pytest.mark.parametrize(("steps", "begin_step", "end_step"), [(20, 3, 13), (10, 0, 10), (7, 5, 6)])
def test_the_ramp_and_its_counts(steps, begin_step, end_step):
    exact = [cubic(t, begin_step, end_step) for t in range(steps)]
    ramp = movement.ramp(steps, begin_step=begin_step, end_step=end_step)
    assert ramp.dtype == np.float32
    assert ramp.tolist() == [float(np.float32(float(x))) for x in exact]
    for sparsity in (0.0, 0.3, 0.7, 0.98):
        config = resolve(sparsity=sparsity)
        configs = movement.schedule(config, steps, begin_step=begin_step, end_step=end_step)
        for name, k in config.counts.items():
            assert configs.counts[name].dtype == np.int32
            assert configs.counts[name].tolist() == [int(k * x) for x in exact]
            for t in (0, steps - 1, steps + 5):
                count = movement.at(configs, t).counts[name]
                assert type(count) is int
                assert count == int(k * exact[min(t, steps - 1)])


def test_a_scan_over_the_schedule_is_a_loop_over_steps():
    config = resolve(CHANNEL)
    configs = movement.schedule(config, 12, begin_step=2, end_step=9)
    params, scores = as_jax(parameters()), as_jax(random_scores(config))

    def kept(carry, now):
        return carry, movement.masks(params, scores, now)

    _, scanned = jax.lax.scan(kept, 0, configs)
    for t in range(12):
        equal(
            {p: x[t] for p, x in as_numpy(scanned).items()},
            movement.masks(params, scores, movement.at(configs, t)),
        )


def test_schedules_of_many_sparsities():
    config = resolve().with_sparsity([0.25, 0.5])
    configs = movement.schedule(config, 12, begin_step=2, end_step=9)
    for i, sparsity in enumerate((0.25, 0.5)):
        one = movement.schedule(resolve(sparsity=sparsity), 12, begin_step=2, end_step=9)
        for name, table in one.counts.items():
            np.testing.assert_array_equal(configs.counts[name][i], table)
            rows = jax.vmap(lambda c: movement.at(c, jnp.int32(5)))(configs).counts
            assert rows[name][i] == table[5]
            assert movement.at(configs, 5).counts[name][i] == table[5]


# Training: of 16 features 4 matter, and they begin as the smallest weights.


def problem(seed=3):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(256, 16)).astype(np.float32)
    important = np.sort(rng.permutation(16)[:4])
    truth = np.zeros((1, 16), np.float32)
    truth[0, important] = [2.0, -1.5, 1.0, -1.2]
    start = np.full((1, 16), 0.5, np.float32)
    start[0, important] = 0.1 * np.sign(truth[0, important])
    return x, x @ truth.T, important, start


LAYER = Layer("fc", "Linear", "w", (1, 16), (0,), (1,))


def test_training_finds_what_matters_and_magnitude_does_not():
    x, y, important, start = problem()
    config = resolve(layers=[LAYER], sparsity=0.75)
    configs = movement.schedule(config, 300, begin_step=30, end_step=200)
    optimizer = optax.sgd(0.02)

    def step(carry, now):
        (params, scores), state = carry

        def loss(params, scores):
            seen = movement.apply(params, scores, now)
            return jnp.mean((x @ seen["w"].T - y) ** 2)

        value, grads = jax.value_and_grad(loss, argnums=(0, 1))(params, scores)
        updates, state = optimizer.update(grads, state, (params, scores))
        return (optax.apply_updates((params, scores), updates), state), value

    params = {"w": jnp.asarray(start)}
    trained = params, movement.init(params, config)
    run = jit_once(lambda carry: jax.lax.scan(step, carry, configs))
    ((params, scores), _), losses = run((trained, optimizer.init(trained)))
    masks = movement.masks(params, scores, config)
    assert np.flatnonzero(masks["w"]).tolist() == important.tolist()
    assert losses[-1] < 1e-3 < losses[0]
    by_magnitude = pp.level({"w": jnp.asarray(start)}, None, config)
    assert not np.any(np.asarray(by_magnitude["w"])[0, important])


def test_soft_training_in_torch_with_functional_call():
    x, y, important, start = problem()
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    model = torch.nn.Linear(16, 1, bias=False)
    layer = Layer("fc", "Linear", "weight", (1, 16), (0,), (1,))
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(start))
    params, config = dict(model.named_parameters()), resolve(layers=[layer], sparsity=None)
    scores = {name: s.requires_grad_() for name, s in movement.init(params, config).items()}
    optimizer = torch.optim.SGD([*params.values(), *scores.values()], 0.02)
    ramp = movement.ramp(400, begin_step=20, end_step=200)
    for share in ramp.tolist():
        optimizer.zero_grad()
        seen = movement.apply(params, scores, config, threshold=0.45 * share)
        loss = ((torch.func.functional_call(model, seen, (x,)) - y) ** 2).mean()
        (loss + 20 * share * movement.penalty(scores)).backward()
        optimizer.step()
    masks = movement.masks(params, scores, config, threshold=0.45)
    assert torch.nonzero(masks["weight"][0])[:, 0].tolist() == important.tolist()
    pruned = pp.apply_masks(params, masks)
    assert ((x @ pruned["weight"].T - y) ** 2).mean() < 1e-2


# Bad input.


@both
@pytest.mark.parametrize("name", ["masks", "apply"])
def test_scores_of_another_model_are_refused(framework, name):
    params, config = framework(parameters()), resolve(CHANNEL)
    scores = movement.init(params, config)
    where, function = f"movement.{name}", getattr(movement, name)
    with raises(TypeError, where, "scores", "by layer name", "list"):
        function(params, list(scores.values()), config)
    without = {name: s for name, s in scores.items() if name != "fc"}
    with raises(KeyError, where, "no layer 'fc'"):
        function(params, without, config)
    if name == "apply":
        with raises(KeyError, where, "'fcc'", "nearest: 'fc'"):
            function(params, {**scores, "fcc": scores["fc"]}, config)
    with raises(ValueError, where, "'fc'", "(6, 1)", "(1, 6)", "granularity"):
        function(params, {**scores, "fc": scores["fc"].reshape(6, 1)}, config)
    integer = framework({"": np.zeros((1, 6), np.int32)})[""]
    with raises(TypeError, where, "'fc'", "floating", "int32"):
        function(params, {**scores, "fc": integer}, config)
    with raises(TypeError, where, "'fc'", "array", "None"):
        function(params, {**scores, "fc": None}, config)
    if framework is as_jax:
        with raises(TypeError, where, "'conv'", "torch", "ArrayImpl"):
            function(params, movement.init(as_torch(parameters()), config), config)
    with raises(KeyError, where, "layer 'fc'", "'fc.w'"):
        function({p: x for p, x in params.items() if p != "fc.w"}, scores, config)
    with raises(ValueError, where, "layer 'fc'", "(8, 6)"):
        function({**params, "fc.w": params["fc.w"].T}, scores, config)
    with raises(ValueError, where, "layer 'fc'", "floating", "int32"):
        function({**params, "fc.w": framework({"": np.ones((6, 8), np.int32)})[""]}, scores, config)
    with raises(TypeError, where, "config", "dict"):
        function(params, scores, {})


@both
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_scores_that_are_nan_are_refused(framework, threshold):
    params, config = framework(parameters()), resolve(CHANNEL)
    scores = random_scores(config)
    for name in ("fc", "stack"):
        scores[name][0, 1] = np.nan
    with raises(ValueError, "movement", "'fc', 'stack'", "NaN"):
        movement.apply(params, framework(scores), config, threshold)
    if framework is as_jax:
        jitted = jax.jit(functools.partial(movement.masks, config=config, threshold=threshold))
        mask = jitted(params, as_jax(scores))["fc.w"]
        assert mask[1, 0]  # stays to be seen


@pytest.mark.parametrize(
    ("threshold", "error", "parts"),
    [
        (1.0, ValueError, ("[0, 1)", "1.0")),
        (-0.1, ValueError, ("[0, 1)", "-0.1")),
        (np.nan, ValueError, ("[0, 1)", "nan")),
        (jnp.float32(2), ValueError, ("[0, 1)", "2")),
        (jnp.zeros(3), ValueError, ("(3,)", "vmap")),
        ("0.5", TypeError, ("number", "'0.5'")),
        (True, TypeError, ("number", "True")),
    ],
    ids=str,
)
def test_a_bad_threshold_is_refused(threshold, error, parts):
    params, config = as_jax(parameters()), resolve()
    with raises(error, "movement.apply", "threshold", *parts):
        movement.apply(params, movement.init(params, config), config, threshold)


def test_a_threshold_where_it_has_no_meaning_is_refused():
    params = as_jax(parameters())
    for config, part in ((resolve(scope="global"), "scope='layer'"), (resolve(NM(1, 2)), "NM(")):
        with raises(ValueError, "movement.masks", "threshold", part):
            movement.masks(params, movement.init(params, config), config, 0.5)


@pytest.mark.parametrize(
    ("change", "error", "parts"),
    [
        ({"begin_step": 11}, ValueError, ("begin_step=11", "end_step=8", "steps=10")),
        ({"begin_step": 8}, ValueError, ("begin_step < end_step", "begin_step=8")),
        ({"end_step": 11}, ValueError, ("end_step <= steps", "end_step=11")),
        ({"begin_step": -1}, ValueError, ("begin_step must be at least 0", "-1")),
        ({"steps": 0}, ValueError, ("steps=0",)),
        ({"begin_step": 1.0}, TypeError, ("begin_step", "integer", "1.0")),
        ({"steps": None}, TypeError, ("steps", "integer", "None")),
        ({"end_step": True}, TypeError, ("end_step", "integer", "True")),
    ],
    ids=str,
)
def test_a_schedule_that_does_not_fit_the_run_is_refused(change, error, parts):
    given = {"steps": 10, "begin_step": 2, "end_step": 8} | change
    with raises(error, "movement.ramp", *parts):
        movement.ramp(**given)
    with raises(error, "movement.schedule", *parts):
        movement.schedule(resolve(), **given)


def test_a_config_without_counts_to_schedule_is_refused():
    run = {"steps": 10, "begin_step": 2, "end_step": 8}
    with raises(TypeError, "movement.schedule", "config", "list"):
        movement.schedule([], **run)
    with raises(ValueError, "movement.schedule", "rule 0", "'conv'", "with_sparsity"):
        movement.schedule(resolve(sparsity=None), **run)
    with raises(ValueError, "movement.schedule", "NM(keep=1, of=2)"):
        movement.schedule(resolve(NM(1, 2)), **run)
    gradual = {"initial_sparsity": 0.0, "final_sparsity": 0.8, "start_epoch": 0, "end_epoch": 5}
    config = resolve(sparsity=None, rule=gradual | {"frequency": 1})
    with raises(ValueError, "movement.schedule", "rule 0", "gradual"):
        movement.schedule(config, **run)
    with raises(TypeError, "movement.schedule", "'conv'", "outside"):
        jax.jit(lambda c: movement.schedule(c, **run))(resolve())


def test_a_bad_step_is_refused():
    configs = movement.schedule(resolve(), 10, begin_step=2, end_step=8)
    with raises(ValueError, "movement.at", "step", "-1"):
        movement.at(configs, -1)
    for step in (1.0, True, jnp.float32(1), None):
        with raises(TypeError, "movement.at", "step", "integer"):
            movement.at(configs, step)
    with raises(ValueError, "movement.at", "'conv'", "schedule"):
        movement.at(resolve(), 1)


def test_a_penalty_of_nothing_is_refused():
    with raises(ValueError, "movement.penalty", "no scores"):
        movement.penalty({})
