# Grids are written in array-API style, so NumPy is one more framework here, without compiling.
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from purepruning import NM, Block, Layer
from purepruning.granularity import by_unit, fold, grid, spread
from tests import oracle
from tests.messages import raises

LAYERS = {
    "vector": Layer("vector", "PReLU", "w", (7,), (0,)),
    "dense": Layer("dense", "Linear", "w", (6, 5), (1,), (0,)),
    "linear": Layer("linear", "Linear", "w", (5, 6), (0,), (1,)),
    "hwio": Layer("hwio", "Conv2d", "w", (3, 2, 4, 6), (3,), (2,)),
    "oihw": Layer("oihw", "Conv2d", "w", (6, 4, 3, 2), (0,), (1,)),
    "grouped": Layer("grouped", "Conv2d", "w", (6, 2, 3, 3), (0,), (1,), groups=3),
    "depthwise": Layer("depthwise", "Conv2d", "w", (3, 3, 1, 8), (3,), (2,), groups=8),
    "transposed": Layer("transposed", "ConvTranspose2d", "w", (6, 2, 3), (1,), (0,), (), 2, "out"),
    "heads": Layer("heads", "Linear", "w", (4, 2, 3, 5), (1, 2), (0, 3)),
    "stack": Layer("stack", "Linear", "w", (3, 4, 2, 5), (3,), (1,), stack_axes=(0, 2)),
}
CHANNELS = ("output_channel", "input_channel")
layers = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)


def distinct(layer):
    return np.arange(np.prod(layer.shape), dtype=np.float32).reshape(layer.shape)


def check(layer, granularity):
    """The grid of a layer against the oracle, which numbers the unit of every single weight."""
    g = grid(layer, granularity)
    ids, member = oracle.unit_ids(layer, granularity), oracle.members(layer)
    assert g.n_units == ids.max() + 1
    assert g.n_stacked == member.max() + 1
    sizes = oracle.unit_sums(np.ones(layer.shape), layer, granularity)
    np.testing.assert_array_equal(np.broadcast_to(g.cost, sizes.shape), sizes)
    weight = distinct(layer)
    sums = fold(np, weight, g, lambda x, axes: np.sum(x, axis=axes))
    np.testing.assert_array_equal(sums, oracle.unit_sums(weight, layer, granularity))
    parts = by_unit(np, weight + 1, g)
    assert parts.shape[:2] == (g.n_stacked, g.n_units)
    for m in range(g.n_stacked):
        for u in range(g.n_units):
            inside = (weight + 1)[(ids == u) & (member == m)]
            assert sorted(parts[m, u][parts[m, u] > 0]) == sorted(inside)
    keep = np.random.default_rng(0).random((g.n_stacked, g.n_units)) < 0.5
    mask = spread(np, keep, g)
    assert mask.ndim == len(layer.shape)
    assert all(m in (1, n) for m, n in zip(mask.shape, layer.shape, strict=True))
    expected = ~oracle.spread(keep, layer, granularity)
    np.testing.assert_array_equal(np.broadcast_to(mask, layer.shape), expected)
    return mask


@layers
@pytest.mark.parametrize("granularity", ["element", *CHANNELS])
def test_units_are_those_of_the_oracle(layer, granularity):
    if granularity == "input_channel" and not layer.in_axes:
        with raises(ValueError, "'vector'", "PReLU", "input_channel"):
            grid(layer, granularity)
    else:
        check(layer, granularity)


@st.composite
def blocks(draw):
    layer = draw(st.sampled_from(list(LAYERS.values())))
    axes = len(layer.shape) - len(layer.stack_axes)
    sizes = st.lists(st.sampled_from([-1, 1, 2, 3, 4, 100]), min_size=1, max_size=axes)
    return layer, Block(tuple(draw(sizes)))


@given(blocks())
@settings(max_examples=150)
def test_blocks_are_those_of_the_oracle(case):
    check(*case)


def test_masks_keep_size_1_where_they_do_not_vary():
    for name, granularity, shape in [
        ("dense", "output_channel", (1, 5)),
        ("dense", "input_channel", (6, 1)),
        ("hwio", "output_channel", (1, 1, 1, 6)),
        ("oihw", "input_channel", (1, 4, 1, 1)),
        ("grouped", "input_channel", (6, 2, 1, 1)),
        ("transposed", "output_channel", (6, 2, 1)),
        ("stack", "output_channel", (3, 1, 2, 5)),
        ("linear", Block((2, -1)), (5, 1)),
        ("linear", Block((-1,)), (1, 6)),
        ("linear", "element", (5, 6)),
    ]:
        assert check(LAYERS[name], granularity).shape == shape


def test_channels_count_by_group_first():
    """By hand: 6 outputs in 3 groups of 2, each from 2 inputs of its own."""
    layer = LAYERS["grouped"]
    g = grid(layer, "input_channel")
    assert (g.n_units, g.cost) == (6, 2 * 9)
    keep = np.asarray([[True, False, True, True, False, False]])
    mask = spread(np, keep, g)[:, :, 0, 0].astype(int).tolist()
    assert mask == [[1, 0], [1, 0], [1, 1], [1, 1], [0, 0], [0, 0]]


def test_a_block_has_output_axes_first_in_every_layout():
    """The same block means the same weights in OIHW and in HWIO."""
    hwio, oihw = LAYERS["hwio"], LAYERS["oihw"]
    for block in (Block((2,)), Block((3, 2)), Block((1, 1, 2)), Block((4, 3, 2, 1))):
        keep = np.random.default_rng(1).random((1, grid(oihw, block).n_units)) < 0.5
        a = np.broadcast_to(spread(np, keep, grid(oihw, block)), oihw.shape)
        tiles = [-(-n // s) for n, s in zip(oihw.shape, (*block.shape, 1, 1, 1), strict=False)]
        turned = keep.reshape(tiles).transpose(2, 3, 1, 0).reshape(1, -1)
        b = np.broadcast_to(spread(np, turned, grid(hwio, block)), hwio.shape)
        np.testing.assert_array_equal(a.transpose(2, 3, 1, 0), b)


def test_costs_of_tiles_at_the_edge():
    g = grid(LAYERS["linear"], Block((2, 4)))  # 5 x 6: rows 2, 2, 1 and columns 4, 2
    assert g.cost.tolist() == [8, 4, 8, 4, 4, 2]
    assert grid(LAYERS["linear"], Block((5, 3))).cost == 15


@pytest.mark.parametrize("shape", [(), (0,), (-2,), (2.0,), (True,), ("2",)])
def test_block_sizes_are_positive_integers_or_minus_1(shape):
    with pytest.raises((TypeError, ValueError), match="Block: shape"):
        Block(shape)


@pytest.mark.parametrize(
    ("keep", "of"), [(0, 4), (4, 4), (5, 4), (-1, 4), (2.0, 4), (2, 4.0), (True, 2)]
)
def test_nm_keeps_some_and_prunes_some(keep, of):
    with pytest.raises((TypeError, ValueError), match=r"NM: (keep|of) must be"):
        NM(keep, of)


def test_a_block_with_too_many_sizes():
    with raises(ValueError, "'dense'", "(6, 5)", "3 sizes", "2 axes"):
        grid(LAYERS["dense"], Block((1, 2, 3)))
    with raises(ValueError, "'stack'", "3 sizes", "2 axes"):
        grid(LAYERS["stack"], Block((1, 2, 3)))


def test_blocks_are_hashable_and_equal_by_value():
    assert Block([2, -1]) == Block((2, -1))
    assert hash(Block([2, -1])) == hash(Block((2, -1)))
    assert NM(2, 4) != NM(keep=1, of=4)
