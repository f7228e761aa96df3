"""Slim, APoZ, mean activation and Taylor: scores by hand, and what only they can be asked.

What holds for every pruner is in ``test_laws``.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import purepruning as pp
from purepruning import NM, Block, Layer
from purepruning.stats import activations, gradients
from purepruning.stats.accumulate import CompensatedSum, WideCount
from tests.messages import raises
from tests.modes import as_jax, as_numpy, as_torch, moved
from tests.statistics import active, as_total, slopes

pytestmark = pytest.mark.usefixtures("unoptimized")

CHANNEL, INPUTS = "output_channel", "input_channel"
FRAMEWORKS = pytest.mark.parametrize("framework", [as_jax, as_torch], ids=["jax", "torch"])

# Scores by hand.

FC = Layer("fc", "Linear", "fc.w", (2, 4), (1,), (0,))
FC_PARAMS = {"fc.w": np.array([[1, 2, 3, 4], [4, -2, 1, 0.5]], np.float32)}


def config_of(granularity, sparsity, layers=(FC,), **settings):
    rules = [{"sparsity": sparsity, "op_names": [layer.name for layer in layers]}]
    return pp.resolve(rules, layers, granularity=granularity, **settings)


@FRAMEWORKS
def test_activations_rank_channels(framework):
    params, config = framework(FC_PARAMS), config_of(CHANNEL, 0.25)
    outputs = framework(
        {"fc": np.array([[9, -1, 1, 1], [-1, 1, 1, -9], [-1, 1, 1, 2]], np.float32)}
    )
    stats = activations.init(params, config)
    stats = activations.update(stats, outputs, config, activation="relu")
    # Shares of non-zeros 1/3, 2/3, 1, 2/3; means 3, 2/3, 1, 1.
    for sparsity, apoz, mean in (
        (0.25, [0, 1, 1, 1], [1, 0, 1, 1]),
        (0.5, [0, 0, 1, 1], [1, 0, 0, 1]),
        (0.75, [0, 0, 1, 0], [1, 0, 0, 0]),
    ):
        config = config.with_sparsity(sparsity)
        masks = as_numpy(pp.apoz_rank(params, stats, config))
        assert masks["fc.w"].astype(int).tolist() == [apoz]
        masks = as_numpy(pp.mean_activation_rank(params, stats, config))
        assert masks["fc.w"].astype(int).tolist() == [mean]


@FRAMEWORKS
def test_counts_beyond_a_million_are_ranked_exactly(framework):
    count = functools.partial(as_total, WideCount)
    zeros = np.array([[3 * 2**20 + 1, 2**20 - 1, 3 * 2**20, 2**20]])
    nothing = {"fc": as_total(CompensatedSum, np.zeros((1, 4)))}
    positions = {"fc": count(2**22)}
    stats = activations.ActivationStats(
        positions, positions, {"fc": count(zeros)}, nothing, nothing, nothing
    )
    for sparsity, mask in ((0.25, [0, 1, 1, 1]), (0.5, [0, 1, 0, 1]), (0.75, [0, 1, 0, 0])):
        config = config_of(CHANNEL, sparsity)
        masks = as_numpy(pp.apoz_rank(framework(FC_PARAMS), moved(framework, stats), config))
        assert masks["fc.w"].astype(int).tolist() == [mask]


@FRAMEWORKS
def test_the_mean_is_signed(framework):
    params, config = framework(FC_PARAMS), config_of(CHANNEL, 0.25)
    outputs = framework({"fc": np.array([[3, -9, 1, 2]], np.float32)})
    stats = activations.update(
        activations.init(params, config), outputs, config, activation="identity"
    )
    masks = as_numpy(pp.mean_activation_rank(params, stats, config))
    assert masks["fc.w"].astype(int).tolist() == [[1, 0, 1, 1]]


@FRAMEWORKS
def test_taylor_ranks_by_the_squares_and_grouped_by_the_square(framework):
    params = framework(FC_PARAMS)
    grads = framework({"fc.w": np.array([[1, 2, -1, 2], [-1, 2, 2, 1]], np.float32)})
    # g * w is [[1, 4, -3, 8], [-4, -4, 2, 0.5]]: sums of squares 17, 32, 13, 64.25; squares of sums
    # 9, 0, 1, 72.25.
    config = config_of(CHANNEL, 0.25)
    stats = gradients.init(params, config, keep=["squares", "grouped"])
    stats = gradients.update(stats, params, grads, config)
    assert np.asarray(stats.squares["fc"].high).tolist() == [[17, 32, 13, 64.25]]
    assert np.asarray(stats.grouped["fc"].high).tolist() == [[9, 0, 1, 72.25]]
    for sparsity, plain, whole in (
        (0.25, [1, 1, 0, 1], [1, 0, 1, 1]),
        (0.5, [0, 1, 0, 1], [1, 0, 0, 1]),
    ):
        config = config.with_sparsity(sparsity)
        assert as_numpy(pp.taylor_fo(params, stats, config))["fc.w"].tolist() == [
            list(map(bool, plain))
        ]
        masks = as_numpy(pp.taylor_fo(params, stats, config, grouped=True))
        assert masks["fc.w"].tolist() == [list(map(bool, whole))]
    single = config_of("element", 0.5)
    stats = gradients.update(gradients.init(params, single), params, grads, single)
    for config, mask in (
        (single, [[0, 1, 0, 1], [1, 1, 0, 0]]),
        (config_of(CHANNEL, 0.5), [[0, 1, 0, 1]]),
        (config_of(INPUTS, 0.5), [[1], [0]]),
        (config_of(Block((2, 1)), 0.5), [[0, 0, 1, 1], [1, 1, 0, 0]]),
        (
            pp.resolve([{"op_names": "fc"}], [FC], granularity=NM(1, 2)),
            [[0, 0, 1, 1], [1, 1, 0, 0]],
        ),
    ):
        masks = as_numpy(pp.taylor_fo(params, stats, config))
        assert masks["fc.w"].astype(int).tolist() == mask


def test_taylor_is_the_derivative_of_the_loss_along_a_gate():
    """Grouped and summed over one step, it is the squared derivative to a factor of the unit."""
    params = as_jax({p: x / 4 for p, x in FC_PARAMS.items()})
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32))

    def loss(params, gates):
        return jnp.sum(jnp.tanh(x @ (params["fc.w"] * gates)) ** 3)

    gates = jnp.ones((1, 4))
    config = config_of(CHANNEL, 0.5)
    stats = gradients.init(params, config, keep=["grouped"])
    stats = gradients.update(stats, params, jax.grad(loss)(params, gates), config)
    expected = jax.grad(loss, 1)(params, gates) ** 2
    np.testing.assert_allclose(stats.grouped["fc"].high, expected, rtol=1e-5)


# Slim.

BN = Layer("bn", "BatchNorm2d", "bn.w", (4,), (0,), bias="bn.b")
CONV = Layer("conv", "Conv2d", "conv.w", (4, 3, 2, 2), (0,), (1,), bias="conv.b")
SLIM_PARAMS = {
    "bn.w": np.array([0.5, -2, 0.25, -0.125], np.float32),
    "bn.b": np.ones(4, np.float32),
    "conv.w": np.ones((4, 3, 2, 2), np.float32),
    "conv.b": np.ones(4, np.float32),
}


@FRAMEWORKS
@pytest.mark.parametrize("granularity", ["element", CHANNEL])
def test_slim_prunes_the_smallest_scales_with_their_biases(framework, granularity):
    rules = [{"sparsity": 0.5, "op_types": ["BatchNorm2d"]}]
    config = pp.resolve(rules, [BN, CONV], granularity=granularity)
    masks = as_numpy(pp.slim(framework(SLIM_PARAMS), None, config))
    assert {p: m.astype(int).tolist() for p, m in masks.items()} == {
        "bn.w": [1, 1, 0, 0],
        "bn.b": [1, 1, 0, 0],
    }


@FRAMEWORKS
def test_slim_prunes_what_feeds_the_norm_when_asked(framework):
    rules = [{"sparsity": 0.5, "op_types": ["BatchNorm2d"]}]
    config = pp.resolve(rules, [BN, CONV], scope="global")
    masks = as_numpy(pp.slim(framework(SLIM_PARAMS), None, config, feeds={"bn": CONV}))
    assert masks["conv.w"].shape == (4, 1, 1, 1)
    assert {p: m.reshape(-1).astype(int).tolist() for p, m in masks.items()} == {
        path: [1, 1, 0, 0] for path in SLIM_PARAMS
    }
    kept = pp.resolve(rules, [BN, CONV], bias="keep")
    masks = as_numpy(pp.slim(framework(SLIM_PARAMS), None, kept, feeds={"bn": CONV}))
    assert set(masks) == {"bn.w", "conv.w"}


def test_slim_prunes_what_feeds_norms_in_a_stack():
    norm = Layer("bn", "BatchNorm1d", "bn.w", (2, 3), (1,), stack_axes=(0,))
    dense = Layer("fc", "Linear", "fc.w", (4, 3, 2), (1,), (0,), stack_axes=(2,))
    params = {"bn.w": jnp.array([[1.0, 2, 3], [6, 5, 4]]), "fc.w": jnp.ones((4, 3, 2))}
    config = pp.resolve([{"sparsity": 0.4, "op_names": ["bn"]}], [norm, dense])
    masks = as_numpy(jax.jit(lambda p: pp.slim(p, None, config, feeds={"bn": dense}))(params))
    assert masks["fc.w"][0].astype(int).tolist() == [[0, 1], [1, 1], [1, 0]]


@FRAMEWORKS
def test_the_penalty_is_the_sum_of_scales_and_flat_at_zero(framework):
    scales = np.array([0.5, -0.25, 0.0, 2.0], np.float32)
    layers = [BN, dataclasses.replace(BN, name="bn2", weight="bn2.w")]
    params = framework({"bn.w": scales, "bn2.w": scales * 2})
    expected = {"bn.w": [8, -8, 0, 8], "bn2.w": [8, -8, 0, 8]}

    def penalty(params):
        return pp.slim_penalty(params, layers, scale=8.0)

    grad, value = (jax.grad, penalty) if framework is as_jax else (torch.func.grad, penalty)
    assert float(value(params)) == 8 * 2.75 * 3
    assert {p: g.tolist() for p, g in grad(penalty)(params).items()} == expected
    config = pp.resolve([{"op_types": ["BatchNorm2d"]}], layers)
    assert float(pp.slim_penalty(params, config)) == pytest.approx(1e-4 * 2.75 * 3)


def test_the_penalty_makes_scales_small_and_leaves_pruned_ones():
    params = {"bn.w": jnp.array([1.0, -1.0, 0.0])}
    norm = dataclasses.replace(BN, shape=(3,), bias=None)
    for _ in range(5):
        grads = jax.grad(lambda p: pp.slim_penalty(p, [norm], scale=0.1))(params)
        params = jax.tree.map(lambda p, g: p - g, params, grads)
    np.testing.assert_allclose(params["bn.w"], [0.5, -0.5, 0], rtol=1e-6)


# Bad input.


def test_taylor_needs_what_it_asks_for():
    config, single = config_of(CHANNEL, 0.5), config_of("element", 0.5)
    params = as_jax(FC_PARAMS)
    with raises(ValueError, "'grouped'", "keep"):
        stats = slopes(FC_PARAMS, [FC], CHANNEL, ["squares"])
        pp.taylor_fo(params, stats, config, grouped=True)
    with raises(ValueError, "'squares'", "keep"):
        pp.taylor_fo(params, slopes(FC_PARAMS, [FC], CHANNEL, ["grouped"]), config)
    with raises(ValueError, "no layers"):
        pp.taylor_fo(params, slopes(FC_PARAMS, [], CHANNEL), config)
    # The square of a channel's sum is not to be had from single weights, nor these from channels.
    with raises(ValueError, "layer 'fc'", "granularity"):
        pp.taylor_fo(params, slopes(FC_PARAMS, [FC], "element"), config, grouped=True)
    with raises(ValueError, "layer 'fc'", "granularity"):
        pp.taylor_fo(params, slopes(FC_PARAMS, [FC], CHANNEL), single)


def test_pruners_say_what_to_resolve_with():
    for pruner in (pp.l1_norm, pp.l2_norm, pp.fpgm):
        with raises(ValueError, pruner.__name__, "'element'", "granularity='output_channel'"):
            pruner(as_jax(FC_PARAMS), None, config_of("element", 0.5))
    with raises(ValueError, "level", "'output_channel'", "without granularity", "pp.l1_norm"):
        pp.level(as_jax(FC_PARAMS), None, config_of(CHANNEL, 0.5))


def test_slim_takes_norms_only():
    config = pp.resolve([{"sparsity": 0.5, "op_names": ["bn", "conv"]}], [BN, CONV])
    with raises(ValueError, "slim", "layer 'conv'", "Conv2d"):
        pp.slim(as_jax(SLIM_PARAMS), None, config)
    with raises(ValueError, "slim_penalty", "layer 'conv'"):
        pp.slim_penalty(as_jax(SLIM_PARAMS), [BN, CONV])
    with raises(KeyError, "layer 'bn'", "'bn.w'"):
        pp.slim_penalty({"conv.w": jnp.ones(3)}, [BN])


def test_a_norm_without_scale_is_an_error_that_names_it():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 2), torch.nn.BatchNorm2d(4, affine=False), torch.nn.BatchNorm2d(4)
    )
    from purepruning_interop.torch import layers

    table = layers(model)
    with raises(ValueError, "'1'", "op_names"):
        pp.resolve([{"sparsity": 0.5, "op_names": ["1"]}], table)
    config = pp.resolve([{"sparsity": 0.5, "op_types": ["BatchNorm2d"]}], table)
    params = {name: p.detach() for name, p in model.named_parameters()}
    with raises(KeyError, "'1'", "scale", "'2'"):
        pp.slim(params, None, config, feeds={"1": table[0]})
    params.pop("2.weight")
    with raises(KeyError, "layer '2'", "'2.weight'"):
        pp.slim(params, None, config)


def test_bad_feeds_of_slim():
    config = pp.resolve([{"sparsity": 0.5, "op_types": ["BatchNorm2d"]}], [BN, CONV])
    params = as_jax(SLIM_PARAMS)
    with raises(TypeError, "'bn'", "layer table", "'conv'"):
        pp.slim(params, None, config, feeds={"bn": "conv"})
    wide = Layer("conv", "Conv2d", "conv.w", (8, 3, 2, 2), (0,), (1,))
    with raises(ValueError, "layer 'conv'", "8", "4"):
        pp.slim(params | {"conv.w": jnp.ones(wide.shape)}, None, config, feeds={"bn": wide})
    with raises(ValueError, "layer 'conv'", "(8, 3, 2, 2)", "(4, 3, 2, 2)"):
        pp.slim(params, None, config, feeds={"bn": wide})
    with raises(KeyError, "layer 'conv'", "'conv.b'"):
        pp.slim(
            {p: x for p, x in params.items() if p != "conv.b"}, None, config, feeds={"bn": CONV}
        )
    two = [BN, dataclasses.replace(BN, name="bn2", weight="bn2.w", bias=None)]
    config = pp.resolve([{"sparsity": 0.5, "op_types": ["BatchNorm2d"]}], two)
    with raises(ValueError, "layer 'conv'", "two norms"):
        pp.slim(params | {"bn2.w": jnp.ones(4)}, None, config, feeds={"bn": CONV, "bn2": CONV})


# What cannot be seen under a transform.


def test_statistics_alone_can_be_mapped_over_also_where_scores_are_not_copied():
    layer = Layer("fc", "Linear", "fc.w", (300, 300), (0,), (1,))
    config = config_of("element", 0.3, [layer])
    rng = np.random.default_rng(0)
    many = [
        slopes({"fc.w": rng.permutation(90_000).reshape(300, 300)}, [layer], "element")
        for _ in range(2)
    ]
    params = {"fc.w": np.ones((300, 300), np.float32)}
    stacked = jax.tree.map(lambda *x: np.stack(x), *many)
    by_jax, by_torch = as_jax(params), as_torch(params)
    mapped = (
        jax.vmap(lambda s: pp.taylor_fo(by_jax, s, config))(stacked),
        torch.func.vmap(lambda s: pp.taylor_fo(by_torch, s, config))(moved(as_torch, stacked)),
    )
    for i, stats in enumerate(many):
        expected = stats.squares["fc"].high >= np.sort(stats.squares["fc"].high, None)[27_000]
        for masks in mapped:
            np.testing.assert_array_equal(np.asarray(masks["fc.w"][i]), expected)


def test_nan_and_empty_statistics_that_cannot_be_seen_keep_the_channel():
    params, config = as_jax(FC_PARAMS), config_of(CHANNEL, 0.5)
    stats = active(FC_PARAMS, [FC])
    empty = jax.tree.map(np.zeros_like, stats)
    stats.sums["fc"].high[0, 1] = np.nan
    masks = jax.jit(pp.mean_activation_rank)(params, stats, config.with_sparsity(0.75))
    assert masks["fc.w"].tolist() == [[False, True, False, False]]
    masks = jax.jit(pp.apoz_rank)(params, empty, config)
    assert masks["fc.w"].tolist() == [[False, False, True, True]]  # all NaN: the first go first
