"""Own criteria and own scores: what users write with :mod:`purepruning.criteria`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import purepruning as pp
from purepruning import NM, Block, Layer
from purepruning.criteria import Criterion, namespace, prune, reduce_units
from tests.coupling import models
from tests.messages import raises
from tests.modes import MODES, as_jax, as_numpy, as_torch

FC = Layer("net.fc", "Linear", "net.fc.w", (6, 8), (1,), (0,), bias="net.fc.b")
CONV = Layer("conv", "Conv2d", "conv.w", (8, 4, 3, 3), (0,), (1,), class_name="Conv")
HEADS = Layer("heads", "Linear", "heads.w", (3, 5, 2, 4), (2, 3), (1,), stack_axes=(0,))
TABLE = (FC, CONV, HEADS)
CHANNEL = "output_channel"


def parameters(seed=0):
    rng = np.random.default_rng(seed)
    params = {x.weight: rng.permutation(np.prod(x.shape)).reshape(x.shape) + 1.0 for x in TABLE}
    return {k: np.float32(v) for k, v in params.items()} | {"net.fc.b": np.ones(8, np.float32)}


def lowest(scores, share):
    """Keeps all but the lowest share of every row, ``(stacked, units)``."""
    n = int(share * scores.shape[-1])
    ranks = scores.argsort(-1, kind="stable").argsort(-1, kind="stable")
    return ranks >= n


SCORES = parameters(1)


@pytest.mark.parametrize("run", MODES.values(), ids=MODES)
def test_scores_of_single_weights(run):
    config = pp.resolve(0.5, TABLE)
    masks = run(lambda p, stats, c: pp.prune_scores(stats, p, c), parameters(), SCORES, config)
    for layer in TABLE:
        members = 3 if layer is HEADS else 1
        keep = lowest(SCORES[layer.weight].reshape(members, -1), 0.5)
        found = np.broadcast_to(masks[layer.weight], layer.shape)
        np.testing.assert_array_equal(found, keep.reshape(layer.shape))


def expected_channels():
    fc = SCORES["net.fc.w"].sum(0)[None]
    conv = SCORES["conv.w"].sum((1, 2, 3))[None]
    heads = SCORES["heads.w"].sum(1).reshape(3, 8)
    return {"net.fc": fc, "conv": conv, "heads": heads}


@pytest.mark.parametrize("convert", [as_jax, as_torch])
@pytest.mark.parametrize("how", ["weights", "units", "members", "axes"])
def test_scores_of_channels(convert, how):
    sums = expected_channels()
    given = {
        "weights": SCORES,
        "units": {"net.fc": sums["net.fc"][0], "conv": sums["conv"][0], "heads": sums["heads"]},
        "members": sums,
        "axes": sums | {"heads": sums["heads"].reshape(3, 2, 4), "net.fc": sums["net.fc"][0]},
    }[how]
    config = pp.resolve(0.5, TABLE, granularity=CHANNEL)
    masks = as_numpy(pp.prune_scores(convert(given), convert(parameters()), config))
    keeps = {name: lowest(s, 0.5) for name, s in sums.items()}
    np.testing.assert_array_equal(masks["net.fc.w"], keeps["net.fc"])
    np.testing.assert_array_equal(masks["net.fc.b"], keeps["net.fc"][0])
    np.testing.assert_array_equal(masks["conv.w"].reshape(-1), keeps["conv"][0])
    np.testing.assert_array_equal(masks["heads.w"].reshape(3, 8), keeps["heads"])


def test_scores_of_blocks_and_groups():
    params, scores = as_jax(parameters()), as_jax(SCORES)
    config = pp.resolve(
        0.5, [FC], granularity=Block((4, 3))
    )  # (out, in): tiles (2, 2) of (in, out)
    tiles = SCORES["net.fc.w"].reshape(2, 3, 2, 4).sum((1, 3))
    keep = lowest(tiles.reshape(1, 4), 0.5).reshape(2, 2).repeat(3, 0).repeat(4, 1)
    for given in (scores, {"net.fc": jnp.asarray(tiles)}, {"net.fc": jnp.asarray(tiles.ravel())}):
        np.testing.assert_array_equal(pp.prune_scores(given, params, config)["net.fc.w"], keep)
    config = pp.resolve(0.5, [FC], granularity=NM(1, 2))
    grouped = SCORES["net.fc.w"].reshape(3, 2, 8)
    keep = (grouped == grouped.max(1, keepdims=True)).reshape(6, 8)
    np.testing.assert_array_equal(pp.prune_scores(scores, params, config)["net.fc.w"], keep)


def test_scores_by_tree_path_or_layer_name_and_of_numpy():
    config = pp.resolve(0.25, [FC])
    params = {"net": {"fc": {"w": jnp.asarray(SCORES["net.fc.w"]), "b": jnp.ones(8)}}}
    keep = SCORES["net.fc.w"] > 12
    for scores in (params, {"net.fc": SCORES["net.fc.w"]}, {"net.fc.w": SCORES["net.fc.w"]}):
        found = pp.prune_scores(scores, params, config)["net"]["fc"]
        np.testing.assert_array_equal(found["w"], keep)
    by_torch = pp.prune_scores({"net.fc": SCORES["net.fc.w"]}, as_torch(parameters()), config)
    np.testing.assert_array_equal(by_torch["net.fc.w"], keep)
    integers = {"net.fc": SCORES["net.fc.w"].astype(np.int32)}
    np.testing.assert_array_equal(pp.prune_scores(integers, params, config)["net"]["fc"]["w"], keep)


def test_scores_of_coupled_channels_are_added():
    shapes = models.Added.shapes
    coupling = pp.couple(
        models.Added.fn, {k: jnp.zeros(s) for k, s in shapes.items()}, models.Added.x
    )
    config = pp.resolve(0.3, models.Added.layers, coupling=coupling)
    scores = {"one": jnp.arange(10.0), "two": jnp.array([9.0, 0, 9, 9, 9, 9, 9, 9, 0, 0])}
    params = as_jax(models.weights(shapes))
    masks = pp.prune_scores(scores, params, config)
    gone = np.flatnonzero(~np.asarray(masks["one.w"]).reshape(-1))
    assert gone.tolist() == [0, 1, 8]  # of sums 9, 1, 11, 12, 13, 14, 15, 16, 8, 9
    assert (np.asarray(masks["one.w"]) == np.asarray(masks["two.w"])).all()


@pytest.mark.parametrize(
    ("scores", "granularity", "error", "parts"),
    [
        ({"fc": np.ones((6, 8))}, "element", KeyError, ("'net.fc'", "'net.fc.w'", "'fc'")),
        ({"net.fc": np.ones(8)}, "element", ValueError, ("(6, 8)", "(8,)", "'element'")),
        ({"net.fc": np.ones((8, 6))}, CHANNEL, ValueError, ("(6, 8)", "(8,)", "(1, 8)", "(8, 6)")),
        ({"net.fc": 3.0}, CHANNEL, TypeError, ("'net.fc'", "array", "3.0")),
        ({"net.fc": np.ones((6, 8), bool)}, CHANNEL, TypeError, ("real numbers", "bool")),
        ({"net.fc": torch.ones(8)}, CHANNEL, TypeError, ("torch",)),
        ({"net.fc": np.full(8, np.nan)}, CHANNEL, ValueError, ("'net.fc'", "NaN")),
    ],
)
def test_mistakes_in_scores(scores, granularity, error, parts):
    config = pp.resolve(0.5, [FC], granularity=granularity)
    params = as_jax(parameters())
    with raises(error, "prune_scores", *parts):
        pp.prune_scores(scores, params, config)


# Criteria.


def relative(weight, layer_stats):
    return abs(weight)


def test_a_criterion_of_single_weights_returns_an_array():
    mine = Criterion("mine", element=relative)
    config, params = pp.resolve(0.5, [FC]), parameters(3)
    expected = as_numpy(pp.level(as_jax(params), None, config))
    for convert in (as_jax, as_torch):
        found = as_numpy(prune(mine, convert(params), None, config))
        np.testing.assert_equal(found, expected)
    before = config.with_masks({"net.fc.w": expected["net.fc.w"]}).with_sparsity(0.75)
    found = prune(mine, as_jax(params), None, before)["net.fc.w"]
    assert not (np.asarray(found) & ~expected["net.fc.w"]).any()
    many = jax.vmap(lambda n: prune(mine, as_jax(params), None, config.with_counts({"net.fc": n})))
    assert (~np.asarray(many(jnp.array([3, 40]))["net.fc.w"])).sum((1, 2)).tolist() == [3, 40]


@pytest.mark.parametrize("granularity", [CHANNEL, "input_channel", Block((3, 4))])
def test_reduce_units_adds_exactly(granularity):
    def norm(weight, layer_stats, grid):
        return reduce_units(abs(weight), grid)

    mine = Criterion("mine", channel=norm, block=norm)
    square = Layer("fc", "Linear", "fc", (8, 9), (1,), (0,))
    config = pp.resolve(0.5, [square], granularity=granularity)
    params = {"fc": np.random.default_rng(0).normal(size=(8, 9)).astype(np.float32)}
    expected = as_numpy(pp.l1_norm(as_jax(params), None, config))
    for convert in (as_jax, as_torch):
        np.testing.assert_equal(as_numpy(prune(mine, convert(params), None, config)), expected)


def column_sums(weight, layer_stats, grid):
    return namespace(weight).sum(weight, axis=0)


def first_rows(weight, layer_stats, grid):
    return reduce_units(weight[0], grid)


WRONG = {
    "a vector": (column_sums, ValueError, ("(stacked, units) = (1, 8)", "(8,)")),
    "a number": (lambda w, layer_stats, g: 3.0, TypeError, ("array", "float")),
    "nothing": (lambda w, layer_stats, g: None, TypeError, ("array", "NoneType")),
    "of torch": (lambda w, layer_stats, g: torch.ones(1, 8), TypeError, ("array", "Tensor")),
    "booleans": (lambda w, layer_stats, g: (w > 0)[:1], TypeError, ("real numbers", "bool")),
    "values": (first_rows, ValueError, ("reduce_units", "(6, 8)", "(8,)")),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_mistakes_in_a_criterion(wrong):
    function, error, parts = WRONG[wrong]
    config = pp.resolve(0.5, [FC], granularity=CHANNEL)
    where = () if wrong == "values" else ("mine", "channel must return")
    with raises(error, *where, *parts):
        prune(Criterion("mine", channel=function), as_jax(parameters()), None, config)


def test_mistakes_of_single_weights():
    config, params = pp.resolve(0.5, [FC]), as_jax(parameters())
    with raises(ValueError, "mine", "element must return", "shape of the weight", "(6, 8)", "(8,)"):
        prune(Criterion("mine", element=lambda w, layer_stats: w.sum(0)), params, None, config)
    with raises(ValueError, "mine ranks nothing"):
        prune(Criterion("mine"), params, None, config)
    with raises(TypeError, "prune", "Criterion", "function", "pp.Criterion("):
        prune(relative, params, None, config)


def of_jax(weight, layer_stats, grid):
    return jnp.zeros(weight.shape).at[:].set(jnp.abs(weight)).sum(0)[None]


def of_torch(weight, layer_stats, grid):
    return weight.abs().float().sum(dim=0, keepdim=True)


def spread_in_torch(weight, layer_stats, grid):
    """By torch's own rule, n - 1; NumPy divides by n, and has no ``dim``."""
    return weight.std(dim=0)[None]


def first_of_statistics(weight, layer_stats, grid):
    return torch.abs(layer_stats["seen"])[None] + torch.zeros(1, weight.shape[1])


def test_a_criterion_of_one_framework_only():
    config = pp.resolve(0.5, [FC], granularity=CHANNEL)
    expected = as_numpy(pp.l1_norm(as_jax(parameters()), None, config))
    for function, convert in ((of_jax, as_jax), (of_torch, as_torch)):
        for wrapped in (function, functools.partial(function)):
            mine = Criterion("mine", channel=wrapped)
            found = prune(mine, convert(parameters()), None, config)
            assert isinstance(found["net.fc.w"], jax.Array if convert is as_jax else torch.Tensor)
            np.testing.assert_equal(as_numpy(found), expected)
    jitted = jax.jit(lambda p: prune(Criterion("mine", channel=of_jax), p, None, config))
    np.testing.assert_equal(as_numpy(jitted(as_jax(parameters()))), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_criterion_in_torch_is_given_tensors(dtype):
    config = pp.resolve(0.5, [FC], granularity=CHANNEL)
    params = {name: x.to(dtype) for name, x in as_torch(parameters(4)).items()}
    before = {name: x.clone() for name, x in params.items()}
    seen = []

    def looks(weight, layer_stats, grid):
        seen.append((type(weight), weight.dtype))
        return spread_in_torch(weight.float(), layer_stats, grid)

    masks = prune(Criterion("mine", channel=looks), params, None, config)
    assert seen == [(torch.Tensor, dtype)]
    scores = params["net.fc.w"].float().std(dim=0)
    kept = scores > scores.sort().values[3]
    np.testing.assert_array_equal(masks["net.fc.w"].reshape(-1), kept)
    assert all(torch.equal(params[name], x) for name, x in before.items())
    stats = {"seen": torch.arange(8.0)}
    mine = Criterion("mine", channel=first_of_statistics, of=lambda stats, layer: stats)
    masks = prune(mine, params, stats, config)
    assert masks["net.fc.w"].reshape(-1).tolist() == [False] * 4 + [True] * 4


def test_an_error_inside_says_which_criterion_it_is_in():
    config = pp.resolve(0.5, [FC], granularity=CHANNEL)
    mine = Criterion("mine", channel=functools.partial(lambda w, layer_stats, g: w.nothing))
    with pytest.raises(AttributeError) as caught:
        prune(mine, as_jax(parameters()), None, config)
    (note,) = (x for x in caught.value.__notes__ if "mine" in x)
    assert all(part in note for part in ("channel", "'mine'", "criteria.namespace(weight)"))
