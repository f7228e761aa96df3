"""Experts as units of a rule, stacked or with arrays of their own: which go, and what is left."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import purepruning as pp

pytestmark = pytest.mark.usefixtures("unoptimized")

EXPERTS, LAYERS, WIDTH, INNER = 4, 2, 6, 5


def draw(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def make(stacked):
    """Two mixtures; of the first the experts 1 and 3 are small, of the second 0 and 2."""
    rng = np.random.default_rng(0)
    layers = []
    for small in ((1, 3), (0, 2)):
        up, gate = draw(rng, EXPERTS, WIDTH, INNER), draw(rng, EXPERTS, WIDTH, INNER)
        up[list(small)] *= 0.1
        down = draw(rng, EXPERTS, INNER, WIDTH)
        moe = {"router": draw(rng, WIDTH, EXPERTS)}
        if stacked:
            moe |= {"up": up, "gate": gate, "down": down}
        else:
            each = zip(up, gate, down, strict=True)
            moe["experts"] = [{"up": u, "gate": g, "down": d} for u, g, d in each]
        layers.append({"mlp": {"up": draw(rng, WIDTH, 7), "down": draw(rng, 7, WIDTH)}, "moe": moe})
    ends = {"stem": draw(rng, 3, WIDTH), "head": draw(rng, WIDTH, 3)}
    return jax.tree.map(jnp.asarray, ends | {"layers": layers})


def mixture(p, x):
    """Two of four experts for each token, by their share of a softmax."""
    share, chosen = jax.lax.top_k(jax.nn.softmax(x @ p["router"]), 2)
    share = (jax.nn.one_hot(chosen, EXPERTS) * share[..., None]).sum(-2)
    if "up" in p:
        up, gate = (jnp.einsum("td,edf->tef", x, p[k]) for k in ("up", "gate"))
        return jnp.einsum("tef,efd,te->td", jax.nn.silu(gate) * up, p["down"], share)
    return sum(
        share[:, i : i + 1] * ((jax.nn.silu(x @ e["gate"]) * (x @ e["up"])) @ e["down"])
        for i, e in enumerate(p["experts"])
    )


def fn(p, x):
    h = x @ p["stem"]
    for layer in p["layers"]:
        h = h + jax.nn.relu(h @ layer["mlp"]["up"]) @ layer["mlp"]["down"]
        h = h + mixture(layer["moe"], h)
    return h @ p["head"]


x = np.random.default_rng(1).normal(size=(7, 3)).astype(np.float32)


@pytest.fixture(scope="module", params=["stacked", "looped"])
def coupled(request):
    params = make(request.param == "stacked")
    coupling = pp.couple(fn, params, x)
    return request.param, params, coupling, pp.coupled_layers(coupling)


def test_experts_are_found_and_other_branches_are_none(coupled):
    kind, _, coupling, _ = coupled
    families = [f for f in coupling.families if f.kind == "expert"]
    if kind == "stacked":
        assert [len(f) for f in families] == [EXPERTS, EXPERTS]
        assert not coupling.mixtures
        return
    assert not families
    # Blocks in depth are alike too, but no router beside them has as many positions.
    assert {n: len(some) for n, some in coupling.mixtures.items()} == {
        f"layers.{i}.moe.experts.*.gate": EXPERTS for i in range(LAYERS)
    }


@pytest.mark.parametrize("select", [{}, {"op_partial_names": ["moe"]}])
def test_the_lowest_experts_of_every_mixture_go(coupled, select):
    kind, params, coupling, table = coupled
    config = pp.resolve([{"sparsity": 0.5, "units": "expert", **select}], table, coupling=coupling)
    assert list(config.counts.values()) == [2, 2]
    masks = pp.l1_norm(params, None, config)
    small = pp.shrink(fn, params, masks, coupling, x)
    # By hand: what the experts that went put out is zero, and routers keep their rows.
    left = make(kind == "stacked")
    for layer, gone in zip(left["layers"], ((1, 3), (0, 2)), strict=True):
        for e in gone:
            if kind == "stacked":
                layer["moe"]["down"] = layer["moe"]["down"].at[e].set(0)
            else:
                layer["moe"]["experts"][e]["down"] *= 0
    for layer, gone in zip(small.params["layers"], ((1, 3), (0, 2)), strict=True):
        moe = layer["moe"]
        assert moe["router"].shape == (WIDTH, EXPERTS)
        assert layer["mlp"]["up"].shape == (WIDTH, 7)
        if kind == "stacked":
            assert moe["up"].shape == moe["gate"].shape == (2, WIDTH, INNER)
            assert moe["down"].shape == (2, INNER, WIDTH)
        else:
            sizes = [e["up"].shape[1] for e in moe["experts"]]
            assert sizes == [0 if e in gone else INNER for e in range(EXPERTS)]
    expected = fn(left, x)
    assert jnp.abs(expected - fn(params, x)).max() > 0.1
    np.testing.assert_allclose(small.fn(small.params, x), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(fn(pp.apply_masks(params, masks), x), expected, rtol=1e-4, atol=1e-4)


def test_stacked_experts_of_a_layer_table_with_stack_axes_go():
    params = make(True)
    coupling = pp.couple(fn, params, x)
    paths = [f"layers.{i}.moe.{n}" for i in range(LAYERS) for n in ("up", "gate", "down")]
    table = [
        pp.make_layer(params, p, "Linear", name=p, out_axes=2, in_axes=1, stack_axes=0)
        for p in paths
    ]
    config = pp.resolve([{"sparsity": 0.5, "units": "expert"}], table, coupling=coupling)
    masks = pp.l1_norm(params, None, config)
    small = pp.shrink(fn, params, masks, coupling, x)
    assert small.params["layers"][1]["moe"]["up"].shape == (2, WIDTH, INNER)
    expected = fn(pp.apply_masks(params, masks), x)
    np.testing.assert_allclose(small.fn(small.params, x), expected, rtol=1e-4, atol=1e-4)


def test_channels_of_experts_go_unless_experts_are_asked_for():
    params = make(True)
    coupling = pp.couple(fn, params, x)
    rules = [{"sparsity": 0.4, "op_partial_names": ["up", "gate"]}]
    config = pp.resolve(rules, pp.coupled_layers(coupling), coupling=coupling)
    small = pp.shrink(fn, params, pp.l1_norm(params, None, config), coupling, x)
    assert small.params["layers"][0]["moe"]["up"].shape == (EXPERTS, WIDTH, 3)


def test_mistakes_are_named(coupled):
    kind, _, coupling, table = coupled
    rules = [{"sparsity": 0.5, "op_partial_names": ["mlp.up"], "units": "expert"}]
    with pytest.raises(ValueError, match="makes no channels inside of an expert"):
        pp.resolve(rules, table, coupling=coupling)
    if kind == "looped":
        rules = [{"sparsity": 0.5, "op_partial_names": ["experts"], "units": "expert"}]
        with pytest.raises(ValueError, match="experts of a mixture are ranked together there"):
            pp.resolve(rules, table, coupling=coupling, scope="global")
