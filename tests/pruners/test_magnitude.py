"""Norms of channels and blocks: ranked without rounding, ties by position, in every run mode."""

import itertools
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import purepruning as pp
from purepruning import Block, Layer, arrays
from purepruning.pruners import magnitude
from tests.messages import raises
from tests.modes import MODES

RUNS = ("jax_eager", "jax_jit", "torch_eager", "torch_vmap")
runs = pytest.mark.parametrize("run", [MODES[name] for name in RUNS], ids=RUNS)
norms = pytest.mark.parametrize("pruner", [pp.l1_norm, pp.l2_norm])


def pruned(run, pruner, weight, granularity, count):
    weight = np.asarray(weight, np.float32)
    layer = Layer("fc", "Linear", "w", weight.shape, (0,), (1,))
    rules = [{"op_types": ["Linear"], "sparsity": 0.0}]
    config = pp.resolve(rules, [layer], granularity=granularity).with_counts({"fc": count})
    return ~np.broadcast_to(run(pruner, {"w": weight}, None, config)["w"], weight.shape)


@runs
def test_l2_norms_whose_rounded_roots_are_equal(run):
    """Squares 12,227,355 and 12,227,354: float32 has one root for both."""
    weight = [[2633, 2005, 1129], [1141, 2508, 2153]]
    assert pruned(run, pp.l2_norm, weight, "output_channel", 1)[:, 0].tolist() == [False, True]


@runs
def test_l2_norms_are_ranked_over_all_of_float32(run):
    powers = np.float32(2) ** np.arange(-124, 127)
    weight = np.concatenate([powers, powers * np.float32(1.25)])[:, None]
    weight = np.random.default_rng(0).permutation(weight)
    lowest = np.argsort(weight[:, 0])
    for count in (1, 100, 250, 400, 501):
        gone = pruned(run, pp.l2_norm, weight, "output_channel", count)[:, 0]
        assert sorted(np.flatnonzero(gone)) == sorted(lowest[:count])


@pytest.mark.parametrize("asarray", [np.asarray, jnp.asarray, torch.tensor])
def test_ordered_squares_have_the_order_of_the_squares(asarray):
    rng = np.random.default_rng(1)
    squares = np.r_[1 + rng.integers(0, 2**23, 4000) * 2.0**-23].astype(np.float32)
    exponents = rng.integers(-126, 127, 4000)
    squares[::7] *= np.float32(2) ** rng.integers(-20, 20, len(squares[::7]))
    exponents[::2] = rng.integers(-40, 40, 2000)
    unscale = np.ldexp(np.float32(1), exponents).astype(np.float32)
    got = np.asarray(magnitude.ordered_squares(asarray(squares), asarray(unscale)))
    exact = squares.astype(np.float64) * unscale.astype(np.float64) ** 2
    order = np.argsort(exact, kind="stable")
    assert np.all(np.diff(got[order]) >= 0)
    near = (exact >= 2.0**-120) & (exact < 2.0**121)
    np.testing.assert_array_equal(got[near], exact[near])
    # Beyond, 18 bits of every square are kept.
    apart = np.diff(exact[order]) > exact[order][1:] * 2.0**-17
    assert np.all(np.diff(got[order])[apart] > 0)
    special = np.asarray([0, np.inf, np.nan], np.float32)
    got = magnitude.ordered_squares(asarray(special), asarray(np.ones(3, np.float32)))
    np.testing.assert_array_equal(np.asarray(got), special)


@runs
@norms
def test_equal_weights_tie_also_in_blocks_cut_off_at_the_edge(run, pruner):
    for shape, block, value in (
        ((4, 5), (1, 3), 5.0),
        ((3, 7), (2, 3), 0.7),
        ((5, 5), (3, 4), 0.1),
    ):
        tiles = [-(-n // b) for n, b in zip(shape, block, strict=True)]
        order = list(itertools.product(*map(range, tiles)))
        for count in (1, 2, len(order) - 1):
            gone = pruned(run, pruner, np.full(shape, value), Block(block), count)
            expected = np.zeros(shape, bool)
            for i, j in order[:count]:
                rows, columns = (
                    slice(at * b, at * b + b) for at, b in zip((i, j), block, strict=True)
                )
                expected[rows, columns] = True
            np.testing.assert_array_equal(gone, expected)


@norms
def test_blocks_too_large_to_count_terms_are_ranked_by_their_mean(pruner):
    """At the edge 61 of 64 rows and columns: 2**18 terms would count up to 4,096 times each."""
    rng = np.random.default_rng(2)
    means = rng.permutation(np.arange(1, 5)).reshape(2, 2)
    weight = np.kron(means, np.ones((512, 512)))[:1000, :1000]
    for run in (MODES["jax_eager"], MODES["torch_eager"]):
        for count in (1, 2, 3):
            np.testing.assert_array_equal(
                pruned(run, pruner, weight, Block((512, 512)), count), weight <= count
            )


@pytest.mark.parametrize("run", [MODES["jax_eager"], MODES["torch_eager"]])
@pytest.mark.parametrize("shape", [(1, 6), (4, 6)])
def test_fpgm_refuses_nan_in_one_channel_or_several(run, shape):
    weight = np.ones(shape, np.float32)
    weight[0, 3] = np.nan
    with raises(ValueError, "fpgm", "'fc'", "NaN"):
        pruned(run, pp.fpgm, weight, "output_channel", 0)


def test_coupled_norms_are_roots():
    """Of norms 5 + 1 and 4 + 3 the first unit goes, though its squares are 26 and those 25."""
    params = {
        "one": jnp.asarray([[5.0, 4.0], [0.0, 0.0]]),
        "two": jnp.asarray([[1.0, 3.0], [0.0, 0.0]]),
        "out": jnp.ones((2, 2)),
    }

    def model(p, x):
        return (x @ p["one"] + x @ p["two"]) @ p["out"]

    coupling = pp.couple(model, params, jnp.ones((1, 2)))
    layers = [
        pp.make_layer(params, name, "Linear", out_axes=1, in_axes=0) for name in ("one", "two")
    ]
    rules = [{"op_names": ["one", "two"], "sparsity": 0.5}]
    config = pp.resolve(rules, layers, coupling=coupling, granularity="output_channel")
    masks = pp.l2_norm(params, None, config)
    assert masks["one"].tolist() == masks["two"].tolist() == [[False, True]]


def test_roots_of_torch_are_rounded_as_those_of_numpy():
    squares = np.arange(1, 2**20, dtype=np.float32)
    got = arrays.sqrt(torch.from_numpy(squares)).numpy()
    np.testing.assert_array_equal(got, np.sqrt(squares), strict=True)


@norms
@pytest.mark.parametrize(
    ("granularity", "most"),
    [
        ("output_channel", 0.3),
        ("input_channel", 0.3),
        (Block((4, 4)), 0.8),
        (Block((1, 4)), 1.2),
        (Block((3, 3)), 2.3),
    ],
    ids=str,
)
def test_norms_of_large_weights_are_taken_without_a_copy(pruner, granularity, most):
    """Memory by that of the weight; masks of blocks take a quarter, their padding all of it."""
    weight = np.random.default_rng(0).normal(size=(2**11, 2**10)).astype(np.float32)
    layer = Layer("fc", "Linear", "w", weight.shape, (0,), (1,))
    config = pp.resolve(0.5, [layer], granularity=granularity)
    tracemalloc.start()
    pruner({"w": weight}, None, config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < most * weight.nbytes
