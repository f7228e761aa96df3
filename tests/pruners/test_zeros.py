"""Masks of parameters that are sparse already."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import purepruning as pp
from purepruning import NM, Block, Layer
from tests.coupling import models
from tests.messages import raises
from tests.modes import as_jax, as_numpy, as_torch

FC = Layer("fc", "Linear", "fc.w", (8, 12), (1,), (0,), bias="fc.b")
CONV = Layer("conv", "Conv2d", "conv.w", (6, 4, 3, 3), (0,), (1,), bias="conv.b")
HEADS = Layer("heads", "Linear", "heads.w", (3, 8, 2, 4), (2, 3), (1,), stack_axes=(0,))
TABLE = (FC, CONV, HEADS)
CHANNEL = "output_channel"
FRAMEWORKS = pytest.mark.parametrize("convert", [as_jax, as_torch])


def parameters(seed=0):
    rng = np.random.default_rng(seed)
    params = {x.weight: rng.normal(size=x.shape) + 5 for x in TABLE}
    params |= {
        "fc.b": rng.normal(size=12) + 5,
        "conv.b": rng.normal(size=6) + 5,
        "free": np.zeros(3),
    }
    return {k: np.float32(v) for k, v in params.items()}


def same(a, b):
    """Whether two trees of masks prune the same, whatever their shapes."""
    a, b = ({k: m for k, m in x.items() if m is not None} for x in (a, b))
    assert a.keys() == b.keys()
    for k in a:
        np.testing.assert_array_equal(*np.broadcast_arrays(a[k], b[k]))


@FRAMEWORKS
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(
    "granularity", ["element", CHANNEL, "input_channel", Block((2, 4)), NM(2, 4)], ids=str
)
def test_what_a_pruner_made_zero_is_found_again(convert, scope, granularity):
    if scope == "global" and isinstance(granularity, NM):
        pytest.skip("N:M has no global scope")
    table = TABLE if not isinstance(granularity, NM) else (FC, HEADS)
    config = pp.resolve(0.5, table, scope=scope, granularity=granularity)
    pruner = pp.level if granularity == "element" or isinstance(granularity, NM) else pp.l2_norm
    params = convert(parameters(1))
    masks = pruner(params, None, config)
    sparse = pp.apply_masks(params, masks)
    same(as_numpy(pp.masks_from_zeros(sparse, config)), as_numpy(masks))
    if not isinstance(granularity, NM):
        any_zeros = pp.resolve([{}], table, scope=scope, granularity=granularity)
        same(as_numpy(pp.masks_from_zeros(sparse, any_zeros)), as_numpy(masks))


@FRAMEWORKS
def test_applying_them_changes_nothing(convert):
    """Also where the bias of a channel that is gone is not zero, as torch.nn.utils leaves it."""
    params = parameters(2)
    params["fc.w"][:, [1, 5]] = 0
    params["fc.b"][5] = -0.0
    params["conv.w"][2] = 0
    params["conv.w"][3, 0] = 0  # not the whole channel
    params["fc.w"][0, 0] = np.nan
    config = pp.resolve([{}], TABLE, granularity=CHANNEL)
    masks = pp.masks_from_zeros(convert(params), config)
    found = as_numpy(masks)
    assert np.flatnonzero(~found["fc.w"]).tolist() == [1, 5]
    assert np.flatnonzero(~found["fc.b"]).tolist() == [5]
    assert np.flatnonzero(~found["conv.w"]).tolist() == [2]
    assert found["conv.b"].all()
    assert found["heads.w"].all()
    np.testing.assert_equal(as_numpy(pp.apply_masks(convert(params), masks)), params)
    kept = pp.resolve([{}], TABLE, granularity=CHANNEL, bias="keep")
    assert as_numpy(pp.masks_from_zeros(convert(params), kept)).get("fc.b") is None


def test_fewer_zeros_than_expected():
    params = parameters(3)
    params["fc.w"].reshape(-1)[:40] = 0
    at_most = pp.resolve([{"op_names": ["fc"], "sparsity": 40 / 96}], TABLE)
    masks = pp.masks_from_zeros(as_jax(params), at_most)
    assert int((~masks["fc.w"]).sum()) == 40
    # More than expected are all pruned.
    fewer = pp.resolve([{"op_names": ["fc"], "sparsity": 0.25}], TABLE)
    assert int((~pp.masks_from_zeros(as_jax(params), fewer)["fc.w"]).sum()) == 40
    more = pp.resolve([{"op_names": ["fc"], "sparsity": 0.5}], TABLE)
    with raises(ValueError, "masks_from_zeros", "'fc'", "40", "48", "leave the sparsity out"):
        pp.masks_from_zeros(as_jax(params), more)
    # Each of stacked layers.
    params["heads.w"][0, :, 0] = 0
    rule = {"op_names": ["heads"], "sparsity": 0.5}
    with raises(ValueError, "'heads'", "0 zeros of 8", "4"):
        pp.masks_from_zeros(as_jax(params), pp.resolve([rule], TABLE, granularity=CHANNEL))
    # The layers of one budget together: 40 and 32 of 96 + 192.
    rule = {"op_names": ["fc", "heads"], "sparsity": 0.25}
    together = pp.resolve([rule], TABLE, scope="global")
    assert int((~pp.masks_from_zeros(as_jax(params), together)["heads.w"]).sum()) == 32
    with raises(ValueError, "'rule 0'", "72 zeros of 288", "86"):
        pp.masks_from_zeros(
            as_jax(params), pp.resolve([rule | {"sparsity": 0.3}], TABLE, scope="global")
        )


def test_a_layer_of_zeros_is_an_error_unless_its_rule_allows_it():
    params = parameters(4)
    params["conv.w"][:] = 0
    rules = [{"op_names": ["conv"]}]
    with raises(ValueError, "'conv'", "zero", "exclude it", "'allow_empty': True"):
        pp.masks_from_zeros(as_jax(params), pp.resolve(rules, TABLE))
    allowed = pp.resolve([rules[0] | {"allow_empty": True}], TABLE)
    assert not pp.masks_from_zeros(as_jax(params), allowed)["conv.w"].any()


def test_groups_of_n_m():
    params = parameters(5)
    config = pp.resolve([{"op_names": ["fc"]}], TABLE, granularity=NM(2, 4))
    keep = np.tile([True, False], 4)[:, None] & np.ones((8, 12), bool)
    params["fc.w"] = np.where(keep, params["fc.w"], 0)
    np.testing.assert_array_equal(pp.masks_from_zeros(as_jax(params), config)["fc.w"], keep)
    params["fc.w"][0, 0] = 0  # one more is still a group of at most two
    masks = pp.masks_from_zeros(as_jax(params), config)
    assert int((~masks["fc.w"]).sum()) == 49
    params["fc.w"][[5, 7], [3, 4]] = 1
    with raises(ValueError, "2 of 24 groups", "'fc'", "2 of 4", "prune it first"):
        pp.masks_from_zeros(as_jax(params), config)


@FRAMEWORKS
@pytest.mark.parametrize("extra", ["none", "own"])
def test_coupled_units_are_zero_in_all_their_layers(convert, extra):
    model = models.Added
    shapes = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in model.shapes.items()}
    coupling = pp.couple(model.fn, shapes, model.x)
    rules = [{"op_names": ["one"], "sparsity": 0.5}, {"op_names": ["two"], "sparsity": 0.3}]
    config = pp.resolve(rules, model.layers, coupling=coupling, extra=extra)
    params = convert(models.weights(model.shapes, 6))
    masks = pp.l1_norm(params, None, config)
    sparse = pp.apply_masks(params, masks)
    same(as_numpy(pp.masks_from_zeros(sparse, config)), as_numpy(masks))
    # A channel that is zero in one of the two alone stays.
    values = models.weights(model.shapes, 6)
    values["one.w"][..., [2, 4, 7]] = 0
    values["two.w"][..., [2, 7]] = 0
    free = pp.resolve([{"op_names": ["one", "two"]}], model.layers, coupling=coupling, extra="none")
    found = as_numpy(pp.masks_from_zeros(convert(values), free))
    for path in ("one.w", "two.w"):
        assert np.flatnonzero(~found[path].reshape(-1)).tolist() == [2, 7]
    with raises(ValueError, "'one + two'", "2 zeros of 10", "3"):
        pp.masks_from_zeros(convert(values), config)


@pytest.mark.parametrize("name", ["Attention", "Grouped", "Stacked", "Fused"])
def test_units_of_heads_and_groups(name):
    model = getattr(models, name)
    shapes = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in model.shapes.items()}
    coupling = pp.couple(model.fn, shapes, model.x)
    config = pp.resolve(0.5, model.layers, coupling=coupling, extra="none")
    params = as_jax(models.weights(model.shapes, 8))
    masks = pp.l1_norm(params, None, config)
    found = pp.masks_from_zeros(pp.apply_masks(params, masks), config)
    masks = {k: m for k, m in as_numpy(masks).items() if found.get(k) is not None}
    same(as_numpy(found), masks)
    jitted = jax.jit(pp.masks_from_zeros)(pp.apply_masks(params, masks), config)
    same(as_numpy(jitted), masks)


def test_under_transforms_values_are_not_checked():
    config = pp.resolve(0.5, [FC])
    params = {k: jnp.stack([jnp.asarray(v)] * 2) for k, v in parameters(7).items()}
    params["fc.w"] = params["fc.w"].at[1, 0].set(0)
    find = functools.partial(pp.masks_from_zeros, config=config)
    masks = jax.jit(jax.vmap(find))(params)
    assert (~masks["fc.w"]).sum((1, 2)).tolist() == [0, 12]
    by_torch = torch.func.vmap(find)(as_torch({k: np.asarray(v) for k, v in params.items()}))
    np.testing.assert_array_equal(by_torch["fc.w"], masks["fc.w"])


def test_mistakes():
    config = pp.resolve(0.5, [FC])
    with raises(KeyError, "masks_from_zeros", "'fc'", "'fc.w'"):
        pp.masks_from_zeros({"w": jnp.ones(3)}, config)
    with raises(TypeError, "masks_from_zeros", "config", "list"):
        pp.masks_from_zeros(as_jax(parameters()), [])
    assert (
        as_numpy(pp.masks_from_zeros(as_jax(parameters()), pp.resolve([], TABLE))).get("fc.w")
        is None
    )
