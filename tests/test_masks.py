"""Functions of masks; every expected value is worked out by hand or in one line of NumPy."""

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import purepruning as pp
from purepruning.masks import apply_masks, density, expand, invert, merge_masks
from purepruning.trees import flatten

LIBS = {
    "jax": lambda tree: {k: None if x is None else jnp.asarray(x) for k, x in tree.items()},
    "torch": lambda tree: {k: torch.as_tensor(x) for k, x in tree.items() if x is not None},
}


@pytest.fixture(params=LIBS)
def lib(request):
    """Makes a flat dict of one framework; in JAX's, None stands where torch's has no entry."""
    return LIBS[request.param]


def numpy(tree):
    return {path: np.asarray(x) for path, x in flatten(tree).leaves.items()}


def assert_same(tree, expected):
    got = numpy(tree)
    assert got.keys() == expected.keys()
    for path, want in expected.items():
        np.testing.assert_array_equal(got[path], np.asarray(want), err_msg=path)


T, F = True, False
WEIGHTS = {
    "w": np.float32([[1, 2, 3], [4, 5, 6]]),
    "v": np.float32([[1, np.nan], [np.inf, 4]]),
    "b": np.float32([7, 8, 9]),
}
MASKS = {"w": [[T], [F]], "v": [[T, F], [F, T]], "b": None}
APPLIED = {"w": [[1, 2, 3], [0, 0, 0]], "v": [[1, 0], [0, 4]], "b": [7, 8, 9]}


# Applying.


def test_pruned_weights_are_zero_even_nan_and_infinity(lib):
    params = lib(WEIGHTS)
    assert_same(apply_masks(params, lib(MASKS)), APPLIED)
    assert_same(params, WEIGHTS)  # undamaged


def test_what_has_no_mask_comes_back_as_it_is(lib):
    params = lib(WEIGHTS)
    assert apply_masks(params, lib(MASKS))["b"] is params["b"]
    for nothing in ({}, {"w": None, "v": None, "b": None}):
        assert all(apply_masks(params, nothing)[path] is x for path, x in params.items())


def test_a_mask_may_have_fewer_axes_than_its_parameter(lib):
    params = lib({"w": np.float32([[1, 2, 3], [4, 5, 6]]), "s": np.float32(5)})
    applied = apply_masks(params, lib({"w": [T, F, T], "s": np.array(F)}))
    assert_same(applied, {"w": [[1, 0, 3], [4, 0, 6]], "s": 0})


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "complex64"])
def test_dtypes_stay(dtype):
    x, mask = torch.ones(2, dtype=getattr(torch, dtype)), torch.tensor([T, F])
    assert apply_masks({"w": x}, {"w": mask})["w"].dtype == x.dtype
    if dtype != "float64":
        x = jnp.ones(2, dtype)
        assert apply_masks({"w": x}, {"w": jnp.array([T, F])})["w"].dtype == x.dtype


def test_jit_and_vmap_agree_with_eager():
    params, masks = LIBS["jax"](WEIGHTS), LIBS["jax"](MASKS)
    assert_same(jax.jit(apply_masks)(params, masks), APPLIED)
    swapped = {"w": ~masks["w"], "v": ~masks["v"], "b": None}
    both = jax.tree.map(lambda x, y: jnp.stack([x, y]), masks, swapped)
    rows = jax.vmap(apply_masks, in_axes=(None, 0))(params, both)
    assert_same({"w": rows["w"][0], "v": rows["v"][0], "b": rows["b"][0]}, APPLIED)
    assert_same({"w": rows["w"][1]}, {"w": [[0, 0, 0], [4, 5, 6]]})


def test_torch_vmap_agrees_with_eager():
    params, masks = LIBS["torch"](WEIGHTS), LIBS["torch"](MASKS)
    both = {path: torch.stack([mask, ~mask]) for path, mask in masks.items()}
    rows = torch.func.vmap(apply_masks, in_dims=(None, 0))(params, both)
    assert_same({path: x[0] for path, x in rows.items()}, APPLIED)
    assert_same({"w": rows["w"][1]}, {"w": [[0, 0, 0], [4, 5, 6]]})


def test_the_gradient_of_a_pruned_weight_is_zero():
    # loss = w0^2 + w1^2 at (3, 5): the gradient would be (6, 10).
    mask = [F, T]
    grad = jax.grad(lambda p: (apply_masks(p, {"w": jnp.array(mask)})["w"] ** 2).sum())
    assert_same(grad({"w": jnp.float32([3, 5])}), {"w": [0, 10]})
    grad = torch.func.grad(lambda p: (apply_masks(p, {"w": torch.tensor(mask)})["w"] ** 2).sum())
    assert_same(grad({"w": torch.tensor([3.0, 5.0])}), {"w": [0, 10]})


# Matching by path.


def test_nested_masks_and_masks_by_path_mean_the_same():
    params = {"a": [jnp.float32([1, 2]), jnp.float32([3, 4])]}
    nested = {"a": [None, jnp.array([T, F])]}
    flat = {"a.1": jnp.array([T, F])}
    for masks in (nested, flat):
        applied = apply_masks(params, masks)
        assert jax.tree.structure(applied) == jax.tree.structure(params)
        assert_same(applied, {"a.0": [1, 2], "a.1": [3, 0]})


def test_nnx_states_gradients_and_pure_dicts_match():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    masks = flatten(state).rebuild({"kernel": jnp.array([[T, F]])})
    kernel = np.asarray(model.kernel[...])
    expected = {"kernel": kernel * [[1, 0]], "bias": [0, 0]}
    pure = [nnx.as_pure(state)] if hasattr(nnx, "as_pure") else []  # Flax 0.12.0 has none
    for params in (state, *pure, nnx.to_pure_dict(state)):
        applied = apply_masks(params, masks)
        assert jax.tree.structure(applied) == jax.tree.structure(params)
        assert_same(applied, expected)
    grads = nnx.grad(lambda model: (model.kernel[...] * 2).sum())(model)
    assert_same(apply_masks(grads, masks), {"kernel": [[2, 0], [2, 0]], "bias": [0, 0]})


def test_leaves_that_are_no_arrays_pass():
    model = eqx.nn.MLP(2, 2, 2, 1, key=jax.random.key(0))
    masks = {"layers.0.weight": jnp.zeros((2, 1), bool)}
    applied = apply_masks(model, masks)
    assert applied.activation is model.activation
    assert not applied.layers[0].weight.any()
    full = expand(masks, model)
    assert jax.tree.structure(full) == jax.tree.structure(model)
    assert full.layers[0].weight.tolist() == [[F, F], [F, F]]
    assert full.activation.shape == ()


# Merging, inverting, expanding.


MERGED = {
    "and": {"w": [[T, F, F], [F, F, F]], "b": [T, F, T]},
    "or": {"w": [[T, T, T], [T, F, F]]},
}


@pytest.mark.parametrize("how", MERGED)
def test_merge(lib, how):
    one = lib({"w": [[T], [F]], "b": None, "c": None})
    two = lib({"w": [[T, F, F]], "b": [T, F, T], "c": None})
    for merged in (merge_masks(one, two, how=how), merge_masks(two, one, how=how)):
        assert_same(merged, MERGED[how])
        if lib is LIBS["jax"]:
            assert merged.keys() == one.keys()  # None where nothing is pruned
        else:
            assert merged.keys() == MERGED[how].keys()


def test_merge_of_one_and_of_three(lib):
    a, b, c = lib({"w": [T, T, F]}), lib({"w": [T, F, T]}), lib({"w": [F, F, F]})
    assert_same(merge_masks(a), {"w": [T, T, F]})
    assert_same(merge_masks(a, b), {"w": [T, F, F]})
    assert_same(merge_masks(a, b, c), {"w": [F, F, F]})
    assert_same(merge_masks(a, b, c, how="or"), {"w": [T, T, T]})


def test_merge_keeps_the_tree_and_finds_masks_in_it_by_path():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    tree = flatten(nnx.state(model, nnx.Param))
    one = tree.rebuild({"kernel": jnp.array([[T, F]])})
    merged = merge_masks(one, {"bias": jnp.array([F, T]), "kernel": jnp.array([[T], [F]])})
    assert jax.tree.structure(merged) == jax.tree.structure(nnx.state(model, nnx.Param))
    assert_same(merged, {"kernel": [[T, F], [F, F]], "bias": [F, T]})


def test_merge_runs_under_jit_and_vmap():
    one, two = {"a": {"w": jnp.array([T, F])}}, {"a": {"w": jnp.array([[T, T], [F, T]])}}
    rows = jax.jit(jax.vmap(merge_masks, in_axes=(None, 0)))(one, two)
    assert_same(rows, {"a.w": [[T, F], [F, F]]})
    rows = torch.func.vmap(merge_masks, in_dims=(None, 0))(
        {"w": torch.tensor([T, F])}, {"w": torch.tensor([[T, T], [F, T]])}
    )
    assert_same(rows, {"w": [[T, F], [F, F]]})


def test_invert(lib):
    assert_same(invert(lib({"w": [[T], [F]], "b": None})), {"w": [[F], [T]]})
    nested = invert({"a": [jnp.array([T]), None]})
    assert nested["a"][0].tolist() == [F]
    assert nested["a"][1] is None


def test_expand_fills_every_leaf(lib):
    params = lib(WEIGHTS)
    full = expand(lib(MASKS), params)
    assert_same(full, {"w": [[T, T, T], [F, F, F]], "v": [[T, F], [F, T]], "b": [T, T, T]})
    assert all(str(x.dtype) in ("bool", "torch.bool") for x in full.values())


def test_expanded_masks_map_over_the_tree_with_params():
    params = {"a": [jnp.ones((2, 3)), None], "n": jnp.zeros(2, int), "key": jax.random.key(0)}
    full = expand({"a": [jnp.array([[T], [F]]), None]}, params)
    shapes = jax.tree.map(lambda p, m: (p.shape, m.shape), params, full)
    assert shapes["a"][0] == ((2, 3), (2, 3))
    assert shapes["n"] == ((2,), (2,))
    assert shapes["key"] == ((), ())


@hypothesis.given(st.integers(0, 2**32 - 1))
def test_merging_obeys_de_morgan(seed):
    rng = np.random.default_rng(seed)
    shapes = [(3, 1), (1, 4), (3, 4), (4,), ()]
    one, two = ({"w": rng.random(shapes[rng.integers(5)]) < 0.5} for _ in range(2))
    left = invert(merge_masks(one, two))
    right = merge_masks(invert(one), invert(two), how="or")
    assert_same(left, numpy(right))
    params = {"w": jnp.zeros((3, 4))}
    assert density(left, params) == pytest.approx(1 - density(merge_masks(one, two), params))


# Density.


def test_density_counts_the_parameters_that_have_a_mask(lib):
    # w keeps 3 of 6, v 2 of 4; b has no mask.
    masks, params = lib(MASKS), lib(WEIGHTS)
    assert density(masks, params) == 5 / 10
    assert isinstance(density(masks, params), float)
    assert density({}, params) == 1


def test_density_under_jit_and_vmap_is_an_array():
    params, masks = LIBS["jax"](WEIGHTS), LIBS["jax"](MASKS)
    got = jax.jit(density)(masks, params)
    assert got.dtype == jnp.float32
    assert got == 0.5
    stack = {"w": jnp.array([[[T], [F]], [[F], [F]]])}
    assert jax.vmap(density, (0, None))(stack, params).tolist() == [0.5, 0.0]
    params, stack = LIBS["torch"](WEIGHTS), {"w": torch.tensor([[[T], [F]], [[F], [F]]])}
    assert torch.func.vmap(density, (0, None))(stack, params).tolist() == [0.5, 0.0]


def test_density_is_exact_beyond_the_integers_of_float32(lib):
    n = 2**24 + 3
    mask = np.ones(n, bool)
    mask[5] = False
    params = lib({"w": np.zeros(n, np.float16)})
    assert density(lib({"w": mask}), params) == (n - 1) / n


def test_density_under_jit_is_exact_beyond_the_integers_of_float32():
    n = 2**24 + 3
    full = jax.jit(lambda m: density({"w": m}, {"w": jax.ShapeDtypeStruct((n,), jnp.float32)}))
    assert full(jnp.ones(n, bool)) == 1.0
    assert 0 < 1 - full(jnp.ones(n, bool).at[0].set(False)) < 3e-7


def test_density_does_not_overflow_int32():
    # 3 * 2**31 weights, of which half are kept.
    params = {"w": jax.ShapeDtypeStruct((3 * 2**20, 2**11), jnp.float32)}
    masks = {"w": jnp.arange(2**11)[None] % 2 == 0}
    assert density(masks, params) == 0.5
    assert jax.jit(lambda m: density(m, params))(masks) == 0.5


# Mistakes.


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ({"dense.kernal": [T, T]}, KeyError, r"'dense.kernal'.*nearest: 'dense.kernel'"),
        ({"dense.kernel": [T, T, T]}, ValueError, r"'dense.kernel'.*\(3, 2\), got \(3,\)"),
        ({"dense.kernel": [[[T]]]}, ValueError, r"'dense.kernel'.*\(3, 2\), got \(1, 1, 1\)"),
        ({"dense.kernel": [[T] * 2] * 2}, ValueError, r"'dense.kernel'.*\(3, 2\), got \(2, 2\)"),
        ({"dense.kernel": np.ones((3, 2), np.int32)}, TypeError, "'dense.kernel'.*boolean.*int32"),
        ({"dense.kernel": np.ones((3, 2), np.float32)}, TypeError, "'dense.kernel'.*float32"),
    ],
)
@pytest.mark.parametrize("function", [lambda p, m: apply_masks(p, m), lambda p, m: expand(m, p)])
def test_masks_that_do_not_fit_raise(lib, masks, error, message, function):
    params = lib(
        {"dense.kernel": np.ones((3, 2), np.float32), "dense.bias": np.ones(2, np.float32)}
    )
    with pytest.raises(error, match=message):
        function(params, lib(masks))
    if lib is LIBS["jax"]:
        with pytest.raises(error, match=message):
            jax.jit(function)(params, lib(masks))


def test_frameworks_do_not_mix():
    with pytest.raises(TypeError, match="'w' is a torch mask for a JAX parameter"):
        apply_masks({"w": jnp.ones(2)}, {"w": torch.tensor([T, F])})
    with pytest.raises(TypeError, match="'w' is a JAX mask for a torch parameter"):
        apply_masks({"w": torch.ones(2)}, {"w": np.array([T, F])})
    with pytest.raises(TypeError, match="'w' has both"):
        merge_masks({"w": torch.tensor([T, F])}, {"w": jnp.array([T, F])})


def test_other_mistakes_raise():
    ok = {"w": jnp.array([T, F])}
    with pytest.raises(TypeError, match="'w' must be a boolean array, got True"):
        apply_masks({"w": jnp.ones(2)}, {"w": True})
    with pytest.raises(ValueError, match="'w' is on device meta"):
        apply_masks({"w": torch.ones(2)}, {"w": torch.ones(2, dtype=torch.bool, device="meta")})
    with pytest.raises(ValueError, match="'xor'"):
        merge_masks(ok, ok, how="xor")
    with pytest.raises(ValueError, match="at least one"):
        merge_masks()
    with pytest.raises(ValueError, match=r"'w' do not broadcast: \(2,\) and \(3,\)"):
        merge_masks(ok, {"w": jnp.ones(3, bool)})
    with pytest.raises(KeyError, match="no place for 'b'"):
        merge_masks({"a": [jnp.array([T])]}, {"b": jnp.array([T])})
    for function in (invert, merge_masks):
        with pytest.raises(TypeError, match="'w' must be boolean, got float32"):
            function({"w": jnp.ones(2)})


def test_masks_of_a_pruner_go_through_all_of_it(lib):
    params = lib({"w": np.float32([[1, -4], [3, 2]])})
    layer = pp.make_layer(params, "w", "Linear", out_axes=1, in_axes=0)
    config = pp.resolve([{"sparsity": 0.5, "op_types": ["Linear"]}], [layer])
    masks = pp.level(params, None, config)
    assert_same(apply_masks(params, masks), {"w": [[0, -4], [3, 0]]})
    assert density(masks, params) == 0.5
