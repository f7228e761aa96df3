"""The group lasso, against sums over the weights that the masks of single units prune."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import purepruning as pp
from purepruning.coupling.unit_masks import masks_of
from tests.coupling import models
from tests.messages import raises
from tests.modes import as_jax, as_torch

pytestmark = pytest.mark.usefixtures("unoptimized")

MODELS = {
    "added": models.Added,
    "grouped": models.Grouped,
    "resnet": models.ResNet(),
    "attention": models.Attention,
    "fused": models.Fused,
    "stacked": models.Stacked,
}


def coupled(model):
    shapes = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in model.shapes.items()}
    return pp.couple(model.fn, shapes, model.x)


def groups(params, coupling, number):
    """The weights of one unit."""
    # Without the check that groups lose equally many.
    masks = masks_of(coupling.leaves, np.arange(coupling.n_units + 1) == number, as_jax(params))
    full = {k: np.broadcast_to(m, params[k].shape) for k, m in masks.items() if m is not None}
    return np.concatenate([np.float64(params[k])[~m] for k, m in full.items()])


def penalty(params, coupling, units=None, weighted=True):
    total = 0.0
    for number in range(1, coupling.n_units + 1) if units is None else units:
        layer_stats = groups(params, coupling, number)
        total += np.sqrt((layer_stats**2).sum()) * (np.sqrt(layer_stats.size) if weighted else 1)
    return total


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("weighted", [True, False])
def test_the_sum_over_units(name, weighted):
    model = MODELS[name]
    coupling, params = coupled(model), models.weights(model.shapes, 3)
    expected = penalty(params, coupling, weighted=weighted)
    assert expected > 0
    for convert in (as_jax, as_torch):
        found = pp.group_penalty(convert(params), coupling, scale=0.5, weighted=weighted)
        assert float(found) == pytest.approx(0.5 * expected, rel=1e-5)


def test_two_matrices_by_hand():
    params = {"one": jnp.array([[3.0, 1.0]]), "two": jnp.array([[4.0], [0.0]])}
    coupling = pp.couple(lambda p, x: x @ p["one"] @ p["two"], params, jnp.ones((1, 1)))
    assert float(pp.group_penalty(params, coupling, scale=1.0, weighted=False)) == 5 + 1
    assert float(pp.group_penalty(params, coupling, scale=1.0)) == pytest.approx(6 * 2**0.5)
    assert float(pp.group_penalty(params, coupling)) == pytest.approx(6e-4 * 2**0.5)
    source = pp.group_penalty(params, coupling, scale=1.0, roles="source")
    assert float(source) == 3 + 1
    assert float(pp.group_penalty({"two": params["two"]}, coupling, scale=1.0)) == 4


def test_a_config_stands_for_the_units_it_may_prune():
    model = models.Attention
    coupling, params = coupled(model), models.weights(model.shapes, 5)
    config = pp.resolve([{"op_names": ["up"], "sparsity": 0.5}], model.layers, coupling=coupling)
    (units,) = (s.units.reshape(-1).tolist() for s in config.allocation.sets)
    assert len(units) == 24
    found = pp.group_penalty(as_jax(params), config, scale=1.0)
    assert float(found) == pytest.approx(penalty(params, coupling, units), rel=1e-5)
    by_hand = np.sqrt((params["up.w"] ** 2).sum(0) + (params["down.w"] ** 2).sum(1)).sum()
    assert float(found) == pytest.approx(np.sqrt(32) * by_hand, rel=1e-5)


def test_gradients_are_the_same_and_zero_for_units_that_are_zero():
    model = models.Attention
    coupling, params = coupled(model), models.weights(model.shapes, 7)
    config = pp.resolve([{"op_names": ["up"], "sparsity": 0.5}], model.layers, coupling=coupling)
    params["up.w"][:, 2] = 0
    params["down.w"][2] = 0
    grads = jax.jit(jax.grad(lambda p: pp.group_penalty(p, config, scale=1.0)))(as_jax(params))
    tensors = {k: v.requires_grad_() for k, v in as_torch(params).items()}
    pp.group_penalty(tensors, config, scale=1.0).backward()
    norms = np.sqrt((params["up.w"] ** 2).sum(0) + (params["down.w"] ** 2).sum(1))
    expected = np.sqrt(32) * params["up.w"] / np.where(norms > 0, norms, 1)
    np.testing.assert_allclose(grads["up.w"], expected, rtol=1e-5)
    np.testing.assert_allclose(tensors["up.w"].grad, expected, rtol=1e-5)
    assert (np.asarray(grads["up.w"][:, 2]) == 0).all()
    assert (tensors["down.w"].grad[2] == 0).all()
    assert np.isfinite(np.concatenate([np.ravel(g) for g in grads.values()])).all()
    many = jax.vmap(lambda s: pp.group_penalty(as_jax(params), config, scale=s))(jnp.arange(3.0))
    assert many[2] == 2 * many[1]
    half = {k: v.astype(jnp.bfloat16) for k, v in as_jax(params).items()}
    assert pp.group_penalty(half, config).dtype == jnp.float32


def test_descent_drives_whole_units_to_zero():
    """What makes a unit and what reads it vanish together, as a norm of each alone would not."""
    model = models.Attention
    coupling, params = coupled(model), as_jax(models.weights(model.shapes, 9))
    params["up.w"] = params["up.w"].at[:, :12].multiply(1e-3)
    params["down.w"] = params["down.w"].at[:12].multiply(1e-3)
    config = pp.resolve([{"op_names": ["up"], "sparsity": 0.5}], model.layers, coupling=coupling)
    step = jax.jit(
        lambda p: jax.tree.map(
            lambda w, g: jnp.where(jnp.abs(w) <= jnp.abs(g), 0, w - g),
            p,
            jax.grad(lambda q: pp.group_penalty(q, config, scale=1e-3))(p),
        )
    )
    for _ in range(30):
        params = step(params)
    gone = ~np.asarray(params["up.w"]).any(0)
    assert gone.tolist() == [True] * 12 + [False] * 12
    np.testing.assert_array_equal(gone, ~np.asarray(params["down.w"]).any(1))


def test_mistakes():
    model = models.Attention
    coupling, params = coupled(model), as_jax(models.weights(model.shapes))
    with raises(TypeError, "group_penalty", "couple", "tuple"):
        pp.group_penalty(params, model.layers)
    with raises(ValueError, "group_penalty", "coupling=..."):
        pp.group_penalty(params, pp.resolve(0.5, model.layers))
    with raises(ValueError, "'up.w'", "(16, 24)", "(3,)"):
        pp.group_penalty(params | {"up.w": jnp.ones(3)}, coupling)
    with raises(ValueError, "none of the parameters that are coupled", "give it"):
        pp.group_penalty({"w": jnp.ones(3)}, coupling)
    with raises(ValueError, "roles", "'sink'", "'reader'"):
        pp.group_penalty(params, coupling, roles=["reader"])
    assert isinstance(
        pp.group_penalty(as_torch(models.weights(model.shapes)), coupling), torch.Tensor
    )
