"""Residual branches as units of a rule: which there are, which go, and what is left of them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import purepruning as pp

pytestmark = pytest.mark.usefixtures("unoptimized")


def fn(p, x):
    h = p["embed"][x]
    for block in p["blocks"]:
        h = h + attention(block, h)
        h = (
            h
            + jax.nn.gelu(norm(h) @ block["up"] + block["b"][None, None]) @ block["down"]
            + block["c"][None, None]
        )
    return h @ p["head"]


def norm(h):
    return (h - h.mean(-1, keepdims=True)) * jax.lax.rsqrt(h.var(-1, keepdims=True) + 1e-5)


def attention(p, h):
    q, k, v = (
        (norm(h) @ p[name]).reshape(*h.shape[:2], 2, -1).swapaxes(1, 2) for name in ("q", "k", "v")
    )
    mixed = jax.nn.softmax(q @ k.swapaxes(-1, -2) / 2.0, -1) @ v
    return mixed.swapaxes(1, 2).reshape(*h.shape[:2], -1) @ p["o"]


def make(depth=3):
    shapes = {"q": (8, 8), "k": (8, 8), "v": (8, 8), "o": (8, 8)}
    shapes |= {"up": (8, 12), "b": (12,), "down": (12, 8), "c": (8,)}
    rng = np.random.default_rng(0)

    def draw(shape, scale=1.0):
        return jax.device_put(scale * rng.normal(size=shape).astype(np.float32))

    # The second MLP is the smallest, then the first.
    scales = [0.5, 0.1, 1.0]
    blocks = [
        {k: draw(s, scales[i] if k == "up" else 1.0) for k, s in shapes.items()}
        for i in range(depth)
    ]
    return {"embed": draw((11, 8)), "blocks": blocks, "head": draw((8, 5))}


x = np.array([[1, 4, 2, 7]])


@pytest.fixture(scope="module")
def coupled():
    params = make()
    return params, pp.couple(fn, params, x)


def test_attentions_and_mlps_of_a_transformer_are_branches(coupled):
    _, coupling = coupled
    found = {tuple(m.split(".")[2] for m in b.makers): 0 for b in coupling.branches}
    for b in coupling.branches:
        found[tuple(m.split(".")[2] for m in b.makers)] += 1
    assert found == {("k", "q", "v"): 3, ("up",): 3}


def test_a_branch_ends_in_a_stream_that_something_else_begins():
    def plain(p, x):
        return jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]

    shapes = {"a": (3, 4), "b": (4, 5), "c": (5, 2)}
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    assert pp.couple(plain, params, jnp.ones((1, 3))).branches == ()

    def without_shortcut(p, x):  # b makes the stream that c and d add to
        h = x @ p["a"] @ p["b"]
        return (h + h @ p["c"] @ p["d"]) @ p["e"]

    shapes = {"a": (3, 4), "b": (4, 5), "c": (5, 6), "d": (6, 5), "e": (5, 2)}
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    (only,) = pp.couple(without_shortcut, params, jnp.ones((1, 3))).branches
    assert only.makers == ("c",)


def test_the_lowest_branches_go_whole(coupled):
    params, coupling = coupled
    table = pp.coupled_layers(coupling)
    rules = [{"sparsity": 0.7, "op_partial_names": ["up"], "units": "branch"}]
    config = pp.resolve(rules, table, coupling=coupling)
    assert config.counts == {"branches of rule 0": 2}
    masks = pp.l1_norm(params, None, config)
    assert [bool(np.any(masks["blocks"][i]["up"])) for i in range(3)] == [False, False, True]
    assert [bool(np.any(masks["blocks"][i]["b"])) for i in range(3)] == [False, False, True]

    small = pp.shrink(fn, params, masks, coupling, x)
    shapes = [small.params["blocks"][i]["up"].shape for i in range(3)]
    assert shapes == [(8, 0), (8, 0), (8, 12)]
    assert small.params["blocks"][0]["down"].shape == (0, 8)
    # By hand: the MLPs that went leave their last bias.
    left = make()
    for i in (0, 1):
        left["blocks"][i]["down"] = jnp.zeros_like(left["blocks"][i]["down"])
    np.testing.assert_allclose(small.fn(small.params, x), fn(left, x), rtol=1e-4, atol=1e-5)
    # Costs know it, training it works, and the small model is coupled again.
    assert small.report.params[0] - small.report.params[1] == 2 * (8 * 12 + 12 + 12 * 8)
    assert jax.grad(lambda p: small.fn(p, x).sum())(small.params)["head"].shape == (8, 5)
    again = pp.couple(small.fn, small.params, x)
    assert len(again.branches) == 4


def test_whole_attentions_go_with_what_the_rule_selects(coupled):
    params, coupling = coupled
    table = pp.coupled_layers(coupling)
    rules = [{"sparsity": 0.4, "op_names_re": [r"blocks\.\d\.[qkv]"], "units": "branch"}]
    config = pp.resolve(rules, table, coupling=coupling)
    masks = pp.l1_norm(params, None, config)
    small = pp.shrink(fn, params, masks, coupling, x)
    (gone,) = [i for i, b in enumerate(small.params["blocks"]) if b["q"].size == 0]
    assert {k: v.shape for k, v in small.params["blocks"][gone].items() if k in "qkvo"} == {
        "q": (8, 0),
        "k": (8, 0),
        "v": (8, 0),
        "o": (0, 8),
    }
    left = make()
    left["blocks"][gone]["o"] = jnp.zeros((8, 8))
    np.testing.assert_allclose(small.fn(small.params, x), fn(left, x), rtol=1e-4, atol=1e-5)


def test_branches_that_stay_are_listed_and_mistakes_are_named(coupled):
    params, coupling = coupled
    table = pp.coupled_layers(coupling)
    rules = [
        {"sparsity": 0.5, "op_partial_names": ["up", "head"], "units": "branch"},
        {"sparsity": 0.5, "op_partial_names": [".q"], "units": "branch"},
    ]
    config = pp.resolve(rules, table, coupling=coupling)
    reasons = {kept.layers[0]: kept.reason for kept in config.kept_whole}
    assert "makes no channels inside of a residual branch" in reasons["head"] or (
        "output" in reasons["head"]
    )
    assert reasons["blocks.0.q"] == (
        "'blocks.0.k' makes channels inside of it too, and the rule does not select it"
    )
    with pytest.raises(ValueError, match="scope='layer' only; leave scope out"):
        pp.resolve(rules, table, coupling=coupling, scope="global")
    with pytest.raises(ValueError, match="allow_empty"):
        pp.resolve([{**rules[0], "sparsity": 1.0}], table, coupling=coupling)
    with pytest.raises(ValueError, match="a rule has 'units': 'branch'"):
        pp.prune_units(jnp.zeros(coupling.n_units), params, config)
    with pytest.raises(ValueError, match="leaves nothing of axis"):  # half of a branch
        coupling.removed(coupling.families[0].units[:0].tolist() + _positions(coupling))


def _positions(coupling):
    attention = next(b for b in coupling.branches if len(b.makers) == 3)
    heads = [f for f in coupling.families if f.kind == "head" and f.units[0] in attention.units]
    return heads[0].units.tolist()


class Bottleneck(nn.Module):
    """A residual block of convolutions, one of them of channels apart."""

    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.GroupNorm(2)(nn.Conv(6, (1, 1))(x)))
        y = nn.Conv(6, (3, 3), feature_group_count=6)(y)
        return x + nn.Conv(x.shape[-1], (1, 1))(nn.relu(nn.GroupNorm(2)(y)))


class Net(nn.Module):
    """Two such blocks between a stem and a head."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3))(x)
        return nn.Dense(3)(Bottleneck()(Bottleneck()(x)).mean((1, 2)))


def test_branches_of_convolutions_go_too():
    image = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 5, 3)), jnp.float32)
    model = Net()
    params = model.init(jax.random.key(0), image)
    coupling = pp.couple(model.apply, params, image)
    assert len(coupling.branches) == 2
    table = pp.coupled_layers(coupling)
    rules = [{"sparsity": 0.5, "op_types": ["Conv2d"], "units": "branch"}]
    masks = pp.l1_norm(params, None, pp.resolve(rules, table, coupling=coupling))
    small = pp.shrink(model.apply, params, masks, coupling, image)
    sizes = [small.params["params"][f"Bottleneck_{i}"]["Conv_1"]["kernel"].size for i in (0, 1)]
    assert sorted(sizes) == [0, 54]
    expected = model.apply(pp.apply_masks(params, small.report.masks), image)
    np.testing.assert_allclose(small.fn(small.params, image), expected, rtol=1e-4, atol=1e-5)
