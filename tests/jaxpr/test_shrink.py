"""What a shrunk model can do: everything its original can."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

import purepruning as pp
from purepruning.coupling.plan import Cut, Plan
from purepruning.trees import flatten
from tests.coupling.law import distance, half

pytestmark = pytest.mark.usefixtures("unoptimized")


class Net(nn.Module):
    """Convolutions with batch norms and a residual."""

    width: int = 8
    train: bool = False

    @nn.compact
    def __call__(self, x):
        norm = nn.BatchNorm(use_running_average=not self.train, name="norm")
        x = nn.relu(norm(nn.Conv(self.width, (3, 3), name="stem")(x)))
        y = nn.relu(nn.Conv(2 * self.width, (3, 3), name="wide")(x))
        x = x + nn.Conv(self.width, (1, 1), name="back")(y)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def draw(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.5, 1.5, x.shape), x.dtype), tree)


X = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, 6, 3)), jnp.float32)
NET = Net()
VARIABLES = draw(jax.eval_shape(NET.init, jax.random.key(0), X))


@pytest.fixture(scope="module")
def coupling():
    return pp.couple(NET.apply, VARIABLES, X)


@pytest.fixture(scope="module")
def shrunk(coupling):
    masks = coupling.masks(half(coupling), VARIABLES)
    return pp.shrink(NET.apply, VARIABLES, masks, coupling, X)


def masked(shrunk, variables=VARIABLES):
    return pp.apply_masks(variables, shrunk.report.masks)


def family(coupling, name):
    return next(f for f in coupling.families if name in f.name)


def test_units_span_what_makes_scales_and_reads_them(coupling):
    found = {f.name: {(m.path, m.axis, m.role) for m in f.axes} for f in coupling.families}
    residual = found["params.back.kernel[3]"]
    assert residual == {
        ("params.back.kernel", 3, "source"),
        ("params.back.bias", 0, "companion"),
        ("params.stem.kernel", 3, "source"),
        ("params.stem.bias", 0, "companion"),
        ("params.norm.scale", 0, "companion"),
        ("params.norm.bias", 0, "companion"),
        ("batch_stats.norm.mean", 0, "companion"),
        ("batch_stats.norm.var", 0, "companion"),
        ("params.wide.kernel", 2, "sink"),
        ("params.head.kernel", 0, "sink"),
    }
    assert sorted(len(f) for f in coupling.families) == [8, 16]


def test_nothing_is_run_and_shapes_are_enough():
    shapes = jax.eval_shape(lambda: VARIABLES)
    coupling = pp.couple(NET.apply, shapes, jax.ShapeDtypeStruct(X.shape, X.dtype))
    assert coupling.n_units == 24


def test_reprs_are_short_whatever_they_hold(coupling, shrunk):
    assert repr(coupling) == "Coupling(24 units in 2 families)"
    cuts, shapes = shrunk.report.plan.cuts, jax.tree.leaves(VARIABLES)
    words = f"12 units removed, {len(cuts)} of {len(shapes)} parameters cut"
    assert repr(shrunk.report.plan) == f"Plan({words})"
    assert repr(shrunk.report).startswith(f"ShrinkReport(params={shrunk.report.params}, macs=")


@pytest.mark.parametrize("committed", [False, True])
def test_what_is_cut_is_committed_to_a_device_only_if_it_was(coupling, committed):
    """Else a step that mixes the two kinds is compiled twice."""
    # Other tests place arrays; these are known not to be.
    params = jax.tree.map(lambda x: jax.device_put(np.asarray(x)), VARIABLES)
    if committed:
        params = jax.device_put(params, jax.devices()[0])
    masks = coupling.masks(half(coupling), params)
    small = pp.shrink(NET.apply, params, masks, coupling, X)
    cut = [x for path, x in flatten(small.params).leaves.items() if path in small.report.plan.cuts]
    assert [x.committed for x in cut] == [committed] * len(cut)


def test_another_batch_size(shrunk):
    x = jnp.concatenate([X, 2 * X, X[:1]])
    one, other = NET.apply(masked(shrunk), x), shrunk.fn(shrunk.params, x)
    assert one.shape == (5, 3)
    assert distance(one, other) < 1e-5


def test_another_image_size(shrunk):
    x = jnp.concatenate([X, X], 1)
    assert distance(NET.apply(masked(shrunk), x), shrunk.fn(shrunk.params, x)) < 1e-5


def test_export_with_a_symbolic_batch(shrunk):
    (batch,) = export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, *X.shape[1:]), X.dtype)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shrunk.params)
    exported = export.export(jax.jit(shrunk.fn))(params, shape)
    for n in (1, 4):
        x = jnp.concatenate([X] * n)
        assert distance(shrunk.fn(shrunk.params, x), exported.call(shrunk.params, x)) < 1e-6


def test_vmap_over_parameters_and_inputs(shrunk):
    several = jax.tree.map(lambda *x: jnp.stack(x), shrunk.params, draw(shrunk.params, 5))
    found = jax.vmap(shrunk.fn, in_axes=(0, None))(several, X)
    for i in range(2):
        one = jax.tree.map(lambda x: x[i], several)  # noqa: B023
        assert distance(shrunk.fn(one, X), found[i]) < 1e-5
    rows = jax.vmap(shrunk.fn, in_axes=(None, 0))(shrunk.params, X[:, None])
    assert distance(shrunk.fn(shrunk.params, X), rows[:, 0]) < 1e-5


def test_it_can_be_fine_tuned(shrunk, standard_promotion):
    optimizer = optax.adam(1e-2)
    target = jnp.ones((2, 3))

    def loss(params):
        return jnp.mean((shrunk.fn({**shrunk.params, "params": params}, X) - target) ** 2)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    params = shrunk.params["params"]
    before, state = loss(params), optimizer.init(params)
    for _ in range(20):
        params, state = step(params, state)
    assert loss(params) < 0.2 * before


def test_the_plan_cuts_optimizer_states_and_other_checkpoints(shrunk):
    plan = shrunk.report.plan
    state = optax.adam(1e-3).init(VARIABLES["params"])
    small = plan.apply(state)
    shapes = jax.tree.map(jnp.shape, small[0].mu)
    assert shapes == jax.tree.map(jnp.shape, shrunk.params["params"])
    other = draw(VARIABLES, 7)
    masks = shrunk.report.masks
    assert (
        distance(NET.apply(pp.apply_masks(other, masks), X), shrunk.fn(plan.apply(other), X)) < 1e-5
    )


def test_a_saved_plan_makes_the_small_function_again_without_weights(shrunk, tmp_path):
    pp.save_plan(tmp_path / "plan.safetensors", shrunk.report.plan)
    plan = pp.load_plan(tmp_path / "plan.safetensors")
    shapes = jax.eval_shape(NET.init, jax.random.key(0), X)
    again = pp.rebuild(NET.apply, shapes, plan, X)
    assert jax.tree.map(jnp.shape, again.params) == jax.tree.map(jnp.shape, shrunk.params)
    assert {type(x) for x in jax.tree.leaves(again.params)} == {jax.ShapeDtypeStruct}
    np.testing.assert_array_equal(shrunk.fn(shrunk.params, X), again.fn(shrunk.params, X))
    assert (again.report.params, again.report.macs) == (shrunk.report.params, shrunk.report.macs)
    for path, mask in flatten(shrunk.report.masks).leaves.items():
        np.testing.assert_array_equal(mask, flatten(again.report.masks).leaves[path])


@pytest.mark.parametrize("kind", ["head", "head_position"])
def test_a_plan_of_heads_removes_heads_and_of_positions_positions(kind):
    """A position of a fused axis goes with its head or with its place in every head."""

    def fn(params, x):
        q, k, v = ((x @ params[n]).reshape(6, 4, 3) for n in "qkv")
        weights = jax.nn.softmax(jnp.einsum("ihd,jhd->hij", q, k))
        return jnp.einsum("hij,jhd->ihd", weights, v).reshape(6, 12) @ params["o"]

    shapes = {n: jnp.ones((3, 12)) for n in "qkv"} | {"o": jnp.ones((12, 2))}
    params, x = draw(shapes), X[0, 0]
    coupling = pp.couple(fn, params, x)
    units = [f.units[1] for f in coupling.families if f.kind == kind]
    small = pp.shrink(fn, params, coupling.masks(units, params), coupling, x)
    again = pp.rebuild(fn, params, small.report.plan, x)
    assert again.report.params == small.report.params
    assert again.report.plan.removed == small.report.plan.removed
    np.testing.assert_array_equal(small.fn(small.params, x), again.fn(again.params, x))


def test_a_plan_of_abstract_arrays_gives_abstract_arrays():
    plan = Plan({"w": (3, 8)}, {"w": (Cut(1, np.array([0, 5])),)}, (1,))
    tree = {"w": jax.ShapeDtypeStruct((3, 8), jnp.bfloat16), "b": jax.ShapeDtypeStruct((8,), int)}
    found = plan.apply(tree)
    assert (found["w"].shape, found["w"].dtype) == ((3, 2), jnp.bfloat16)
    assert found["b"] is tree["b"]


@pytest.mark.parametrize(
    ("leaf", "words"),
    [
        (2.0, r"'params.*kernel' has shape \(\), but the plan cuts it to"),
        (jnp.ones(3), r"has shape \(3,\), but the plan cuts it to"),
        ("a", r"params: 'params.*kernel' must be an array of numbers, got 'a'.* that shrink"),
        (np.array(["a"], object), "must be an array of numbers"),
        (jax.ShapeDtypeStruct((3,), jnp.float32), "must be an array of numbers"),
    ],
)
def test_leaves_that_are_not_what_a_plan_cut_are_refused(shrunk, leaf, words):
    tree = flatten(shrunk.params)
    path = next(path for path in shrunk.report.plan.cuts if path.endswith("kernel"))
    with pytest.raises((TypeError, ValueError), match=words):
        shrunk.fn(tree.rebuild({**tree.leaves, path: leaf}), X)


def test_a_plan_that_belongs_to_another_model(shrunk):
    other = Net(width=4)
    variables = draw(jax.eval_shape(other.init, jax.random.key(0), X))
    with pytest.raises(ValueError, match=r"has shape \(4,\), and the plan is for shape \(8,\)"):
        pp.rebuild(other.apply, variables, shrunk.report.plan, X)
    less = {"params": VARIABLES["params"]}
    with pytest.raises(ValueError, match="mean' has no such parameter"):
        pp.rebuild(lambda v, x: x, less, shrunk.report.plan, X)
    with pytest.raises(TypeError, match=r"plan must be the plan of a report.*got ShrinkReport"):
        pp.rebuild(NET.apply, VARIABLES, shrunk.report, X)


def test_keywords_are_the_functions_own():
    def fn(params, x, *, scale, mode="plain"):
        h = x @ params["one"] * scale[None]
        return (jnp.sin(h) if mode == "bent" else h) @ params["two"]

    params = draw({"one": jnp.ones((3, 4)), "two": jnp.ones((4, 2))})
    x, scale = X[0, 0], jnp.arange(1.0, 5.0)
    coupling = pp.couple(fn, params, x, scale=jnp.float32(2)[None], mode="bent")
    assert coupling.n_units == 4
    assert pp.couple(fn, params, x, scale=scale).n_units == 0  # an input stays whole
    one = scale[1:2]
    masks = coupling.masks([2], params)
    small = pp.shrink(fn, params, masks, coupling, x, scale=one, mode="bent")
    masked = pp.apply_masks(params, masks)
    for mode in ("bent", "plain"):
        expected = fn(masked, x, scale=one, mode=mode)
        assert distance(expected, small.fn(small.params, x, scale=one, mode=mode)) < 1e-5
    assert pp.count(fn, params, x, scale=one, mode="plain").macs == 6 * (3 * 4 + 4 * 2)


def test_statistics_of_training_are_as_small_as_their_channels(standard_promotion):
    """Coupled in evaluation, where there are none among the outputs."""

    def fn(variables, x, train=False):
        if not train:
            return NET.apply(variables, x)
        logits, updated = Net(train=True).apply(variables, x, mutable=["batch_stats"])
        return logits, updated["batch_stats"]

    coupling = pp.couple(fn, VARIABLES, X)
    masks = coupling.masks(half(coupling), VARIABLES)
    small = pp.shrink(fn, VARIABLES, masks, coupling, X)
    expected, full = fn(pp.apply_masks(VARIABLES, masks), X, train=True)
    logits, stats = jax.jit(small.fn, static_argnames="train")(small.params, X, train=True)
    assert distance(expected, logits) < 1e-5
    assert distance(small.report.plan.apply({"batch_stats": full}), {"batch_stats": stats}) < 1e-5


def test_the_result_says_what_it_is(shrunk):
    assert (shrunk.model, shrunk.reason, shrunk.report.kind) == (
        None,
        "given as a function, not as a model",
        "function",
    )
    assert repr(shrunk).startswith("Shrunk(model=None, report=ShrinkReport(params=(")
    last = str(shrunk.report).splitlines()[-1]
    assert last == "result: a function of smaller parameters (given as a function, not as a model)"


def test_a_file_without_a_plan_is_refused(tmp_path):
    masks = {"w": jnp.array([True, False])}
    pp.save_masks(tmp_path / "masks.safetensors", masks, {"w": jnp.ones(2)})
    with pytest.raises(ValueError, match="cannot be read as plan: format 'masks'"):
        pp.load_plan(tmp_path / "masks.safetensors")


def test_statistics_that_are_returned_may_shrink():
    net = Net(train=True)

    def fn(variables, x):
        return net.apply(variables, x, mutable=["batch_stats"])

    stays = pp.couple(fn, VARIABLES, X)
    assert [len(f) for f in stays.families] == [16]  # the other width is that of an output
    coupling = pp.couple(fn, VARIABLES, X, outputs=(True, False))
    assert [len(f) for f in coupling.families] == [16, 8]
    masks = coupling.masks(half(coupling), VARIABLES)
    small = pp.shrink(fn, VARIABLES, masks, coupling, X)
    logits, updated = small.fn(small.params, X)
    expected, full = fn(pp.apply_masks(VARIABLES, masks), X)
    assert distance(expected, logits) < 1e-5
    stats = updated["batch_stats"]
    assert jax.tree.map(jnp.shape, stats) == jax.tree.map(jnp.shape, small.params["batch_stats"])
    kept = small.report.plan.apply(dict(full))
    assert distance(kept["batch_stats"], stats) < 1e-5


@pytest.mark.parametrize("outputs", [("no",), {"a": True}, 1])
def test_outputs_that_fit_no_result(outputs):
    with pytest.raises((TypeError, ValueError), match="outputs must"):
        pp.couple(NET.apply, VARIABLES, X, outputs=outputs)


# Masks that come from elsewhere.


def channel_masks(**removed):
    """Masks of output channels by layer, as a pruner returns them."""
    masks = jax.tree.map(lambda _: None, VARIABLES)
    for name, channels in removed.items():
        keep = np.ones(VARIABLES["params"][name]["kernel"].shape[-1], bool)
        keep[channels] = False
        masks["params"][name]["kernel"] = jnp.asarray(keep.reshape(1, 1, 1, -1))
    return masks


def test_scales_and_readers_follow_what_makes_a_channel(coupling):
    small = pp.shrink(NET.apply, VARIABLES, channel_masks(stem=[1, 2], back=[1, 2]), coupling, X)
    assert small.params["params"]["norm"]["scale"].shape == (6,)
    assert small.params["params"]["head"]["kernel"].shape == (6, 3)
    assert distance(NET.apply(masked(small), X), small.fn(small.params, X)) < 1e-5


def test_masks_that_disagree_are_refused_with_what_to_do(coupling):
    masks = channel_masks(stem=[1, 2])
    with pytest.raises(ValueError, match=r"disagree on 2 units.*params.back.kernel.*conflicts="):
        pp.shrink(NET.apply, VARIABLES, masks, coupling, X, conflicts="refuse")


def test_masks_of_which_nothing_can_go_are_refused_with_what_to_do(coupling):
    with pytest.raises(ValueError, match=r"nothing can be removed.*back.kernel.*Select all layers"):
        pp.shrink(NET.apply, VARIABLES, channel_masks(stem=[1, 2]), coupling, X)


def test_masks_that_disagree_keep_the_units(coupling):
    masks = channel_masks(stem=[1, 2], back=[2, 3], wide=[0])
    small = pp.shrink(NET.apply, VARIABLES, masks, coupling, X)
    assert small.params["params"]["norm"]["scale"].shape == (7,)
    assert len(small.report.restored) == 2
    # What stays although it is masked stays as zeros.
    assert distance(NET.apply(masked(small), X), small.fn(small.params, X)) < 1e-5
    assert not small.params["params"]["stem"]["kernel"][..., 1].any()


def test_masks_that_disagree_remove_the_units(coupling):
    masks = channel_masks(stem=[1, 2], back=[2, 3])
    small = pp.shrink(NET.apply, VARIABLES, masks, coupling, X, conflicts="remove")
    assert small.params["params"]["norm"]["scale"].shape == (5,)
    assert len(small.report.extended) == 2
    assert distance(NET.apply(masked(small), X), small.fn(small.params, X)) < 1e-5


def test_single_weights_stay_as_zeros(coupling):
    layers_masks = jax.tree.map(
        lambda x: jnp.asarray(np.indices(x.shape).sum(0) % 3 > 0) | (x.ndim == 1), VARIABLES
    )
    small = pp.shrink(NET.apply, VARIABLES, layers_masks, coupling, X)
    assert small.report.params[0] == small.report.params[1]
    assert (
        distance(NET.apply(pp.apply_masks(VARIABLES, layers_masks), X), small.fn(small.params, X))
        < 1e-5
    )


def test_no_masks_remove_nothing(coupling):
    small = pp.shrink(NET.apply, VARIABLES, jax.tree.map(lambda _: None, VARIABLES), coupling, X)
    assert small.report.params[0] == small.report.params[1]
    assert not small.report.plan.cuts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norms": "mine"}, "norms must be 'original' or 'kept', got 'mine'"),
        ({"conflicts": "fight"}, "conflicts must be 'refuse' or 'keep' or 'remove'"),
    ],
)
def test_unknown_options(coupling, change, message):
    with pytest.raises(ValueError, match=message):
        pp.shrink(NET.apply, VARIABLES, channel_masks(), coupling, X, **change)


def test_a_layer_is_never_emptied(coupling):
    with pytest.raises(ValueError, match="leaves nothing of axis"):
        coupling.masks(range(1, coupling.n_units + 1), VARIABLES)
    every = list(range(8))
    with pytest.raises(ValueError, match="leaves nothing of axis"):
        pp.shrink(NET.apply, VARIABLES, channel_masks(stem=every, back=every), coupling, X)


def test_a_residual_branch_may_go_whole(coupling):
    small = pp.shrink(NET.apply, VARIABLES, channel_masks(wide=list(range(16))), coupling, X)
    assert small.params["params"]["wide"]["kernel"].shape[-1] == 0
    assert distance(NET.apply(masked(small), X), small.fn(small.params, X)) < 1e-5


def test_unknown_units(coupling):
    with pytest.raises(ValueError, match="unit numbers from 1 to 24, got 3 to 99"):
        coupling.masks([3, 99], VARIABLES)


def test_a_coupling_of_another_model(coupling):
    other = Net(width=4)
    variables = draw(jax.eval_shape(other.init, jax.random.key(0), X))
    with pytest.raises(ValueError, match="coupling does not belong to this function"):
        pp.shrink(other.apply, variables, jax.tree.map(lambda _: None, variables), coupling, X)
    with pytest.raises(ValueError, match="must be an array of shape"):
        coupling.masks([1], variables)


def test_full_parameters_are_not_taken_for_small_ones(shrunk):
    with pytest.raises(ValueError, match="the plan cuts it to"):
        shrunk.fn(VARIABLES, X)


# What must survive from the original program.


def test_custom_derivatives_survive():
    def fn(params, x):
        return jax.nn.relu(x @ params["one"]) @ params["two"]

    params = {"one": jnp.zeros((3, 4)), "two": jnp.ones((4, 2))}
    x = jnp.ones((2, 3))
    coupling = pp.couple(fn, params, x)
    small = pp.shrink(fn, params, coupling.masks([1], params), coupling, x)
    slope = jax.grad(lambda p: small.fn(p, x).sum())(small.params)
    # The derivative of relu at zero is 0; that of max(x, 0) would be 1/2.
    assert not slope["one"].any()


def test_rematerialisation_survives():
    def fn(params, x):
        body = jax.checkpoint(lambda h: jnp.tanh(h @ params["two"]))
        return body(x @ params["one"]) @ params["three"]

    params = draw({"one": jnp.ones((3, 4)), "two": jnp.ones((4, 4)), "three": jnp.ones((4, 2))})
    coupling = pp.couple(fn, params, X[0, 0])
    small = pp.shrink(fn, params, coupling.masks([1, 5], params), coupling, X[0, 0])
    jaxpr = jax.make_jaxpr(small.fn)(small.params, X[0, 0])
    assert "remat2" in {eqn.primitive.name for eqn in jaxpr.eqns}


def test_layers_of_a_stack_lose_channels_of_their_own():
    def fn(params, x):
        def layer(h, p):
            return h + jax.nn.relu(h @ p["up"]) @ p["down"], None

        return jax.lax.scan(layer, x, params)[0]

    params = draw({"up": jnp.ones((3, 4, 6)), "down": jnp.ones((3, 6, 4))})
    x = jnp.ones((2, 4))
    coupling = pp.couple(fn, params, x)
    assert [[len(c) for c in group] for group in coupling.groups] == [[6, 6, 6]]
    chosen = np.concatenate([c[[i, i + 1]] for i, c in enumerate(coupling.groups[0])])
    masks = coupling.masks(chosen, params)
    small = pp.shrink(fn, params, masks, coupling, x)
    assert small.params["up"].shape == (3, 4, 4)
    assert distance(fn(pp.apply_masks(params, masks), x), small.fn(small.params, x)) < 1e-5
    assert "scan" in {e.primitive.name for e in jax.make_jaxpr(small.fn)(small.params, x).eqns}
    with pytest.raises(ValueError, match="must go evenly from the 3 parts"):
        coupling.masks(coupling.groups[0][0][:2], params)


def test_groups_lose_channels_of_their_own():
    def fn(params, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        h = jax.nn.relu(
            jax.lax.conv_general_dilated(
                x, params["one"], (1, 1), "SAME", dimension_numbers=numbers
            )
        )
        h = jax.nn.relu(
            jax.lax.conv_general_dilated(
                h, params["two"], (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=2
            )
        )
        return h.mean((1, 2)) @ params["three"]

    params = draw(
        {"one": jnp.ones((1, 1, 3, 8)), "two": jnp.ones((3, 3, 4, 8)), "three": jnp.ones((8, 2))}
    )
    coupling = pp.couple(fn, params, X)
    assert [[len(c) for c in group] for group in coupling.groups] == [[4, 4], [4, 4]]
    chosen = [g[0][0] for g in coupling.groups] + [g[1][3] for g in coupling.groups]
    masks = coupling.masks(chosen, params)
    small = pp.shrink(fn, params, masks, coupling, X)
    assert jax.tree.map(jnp.shape, small.params) == {
        "one": (1, 1, 3, 6),
        "two": (3, 3, 3, 6),
        "three": (6, 2),
    }
    assert distance(fn(pp.apply_masks(params, masks), X), small.fn(small.params, X)) < 1e-5


# Means over an axis that shrinks.


class Normed(nn.Module):
    """A layer norm, one- or two-pass, between two layers."""

    width: int
    fast: bool = True
    groups: int = 0

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width, name="one")(x)
        if self.groups:
            x = nn.GroupNorm(self.groups, use_fast_variance=self.fast, name="norm")(x)
        else:
            x = nn.LayerNorm(use_fast_variance=self.fast, name="norm")(x)
        return nn.Dense(3, name="two")(nn.gelu(x))


@pytest.mark.parametrize("groups", [0, 3])
@pytest.mark.parametrize("fast", [True, False])
def test_both_meanings_of_norms(fast, groups):
    net, x = Normed(12, fast, groups), X[0, 0]
    params = draw(jax.eval_shape(net.init, jax.random.key(0), x))
    coupling = pp.couple(net.apply, params, x)
    chosen = coupling.families[0].units[:2]  # positions in a group, or channels
    masks = coupling.masks(chosen, params)
    original = pp.shrink(net.apply, params, masks, coupling, x)
    expected = net.apply(pp.apply_masks(params, masks), x)
    assert distance(expected, original.fn(original.params, x)) < 1e-5
    kept = pp.shrink(net.apply, params, masks, coupling, x, norms="kept")
    native = Normed(kept.params["params"]["one"]["bias"].shape[0], fast, groups)
    assert distance(native.apply(kept.params, x), kept.fn(kept.params, x)) < 1e-5
    assert distance(expected, kept.fn(kept.params, x)) > 1e-3
    assert original.report.norms == "original"
    assert kept.report.norms == "kept"


def test_the_temperature_of_attention_stays():
    net, x = nn.MultiHeadDotProductAttention(2), X[0]
    params = draw(
        jax.eval_shape(net.init, jax.random.key(0), jnp.ones((2, 6, 8)), jnp.ones((2, 6, 8)))
    )
    x = jnp.asarray(np.random.default_rng(3).normal(size=(2, 6, 8)), jnp.float32)
    fn = lambda p, x: net.apply(p, x, x)  # noqa: E731
    coupling = pp.couple(fn, params, x)
    kinds = {f.kind for f in coupling.families}
    assert kinds == {"head", "head_position"}
    chosen = [f.units[0] for f in coupling.families if f.kind == "head_position"]
    masks = coupling.masks(chosen, params)
    small = pp.shrink(fn, params, masks, coupling, x)
    assert distance(fn(pp.apply_masks(params, masks), x), small.fn(small.params, x)) < 1e-5


def test_unknown_operations_keep_what_they_touch():
    def fn(params, x):
        h = x @ params["one"]
        return jnp.linalg.cholesky(h.T @ h + jnp.eye(4)) @ params["two"]

    params = draw({"one": jnp.ones((3, 4)), "two": jnp.ones((4, 2))})
    coupling = pp.couple(fn, params, X[0, 0])
    assert coupling.unknown == {"cholesky": 1}
    assert not coupling.n_units
    assert "no rule for cholesky, met 1 times" in str(coupling)
    assert {p.reason for p in coupling.frozen if p.path == "one" and p.axis == 1} == {
        "operand of cholesky, for which there is no rule"
    }


# What a shrunk function remembers, and what it must not take for something else.


def small_function(fn, params, *inputs):
    coupling = pp.couple(fn, params, *inputs)
    masks = coupling.masks([1], params)
    return pp.apply_masks(params, masks), pp.shrink(fn, params, masks, coupling, *inputs)


def test_numbers_that_are_equal_are_not_one_input():
    def fn(params, x, often):
        y = (x @ params["one"]) @ params["two"]
        return -y if often is True else y

    params = draw({"one": jnp.ones((3, 4)), "two": jnp.ones((4, 2))})
    masked, small = small_function(fn, params, X[0, 0], 1)
    for often in (1, True, 1.0):
        assert distance(fn(masked, X[0, 0], often), small.fn(small.params, X[0, 0], often)) < 1e-5


def test_numbers_among_the_parameters_may_change():
    fn = lambda params, x: (x @ params["one"]) @ params["two"] * params["rate"]  # noqa: E731
    params = draw({"one": jnp.ones((3, 4)), "two": jnp.ones((4, 2))}) | {"rate": 2.0}
    coupling = pp.couple(fn, params, X[0, 0])
    masks = coupling.masks([1], params)
    small = pp.shrink(fn, params, masks, coupling, X[0, 0])
    for rate in (2.0, 3.0):
        found = small.fn(small.params | {"rate": rate}, X[0, 0])
        complete = pp.apply_masks(params, masks) | {"rate": rate}
        assert distance(fn(complete, X[0, 0]), found) < 1e-5


def test_weak_types_promote_as_they_did(standard_promotion):
    fn = lambda params, x, rate: (x @ params["one"] * rate) @ params["two"]  # noqa: E731
    params = draw({"one": jnp.ones((3, 4)), "two": jnp.ones((4, 2))})
    half_precision = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (params, X[0, 0]))
    params, x = half_precision
    _, small = small_function(fn, params, x, jnp.asarray(2.0))
    program = jax.make_jaxpr(small.fn)(small.params, x, jnp.asarray(2.0))
    assert {v.aval.dtype for e in program.eqns for v in e.outvars} == {jnp.dtype(jnp.bfloat16)}


def test_inputs_for_which_nothing_may_go():
    def fn(params, x):
        h = x @ params["one"]
        return (h if len(x) == 6 else jnp.sort(h)) @ params["two"]

    params = draw({"one": jnp.ones((3, 4)), "two": jnp.ones((4, 2))})
    _, small = small_function(fn, params, X[0, 0])
    with pytest.raises(ValueError, match=r"does not fit: it cuts 'one' .*axis 1: a sort"):
        small.fn(small.params, X[0, 0, :5])


def test_counts_of_a_symbolic_batch_are_formulas():
    (batch,) = export.symbolic_shape("b")
    fn = lambda params, x: (x @ params["one"]) @ params["two"]  # noqa: E731
    params = draw({"one": jnp.ones((3, 4)), "two": jnp.ones((4, 2))})
    x = jax.ShapeDtypeStruct((batch, 3), jnp.float32)
    _, small = small_function(fn, params, x)
    assert "20*b multiply-adds" in str(pp.couple(fn, params, x))
    assert "multiply-adds 20*b -> 15*b\n" in str(small.report)
    assert "20*b" in str(pp.count(fn, params, x))


def test_what_stands_behind_a_batch_that_is_not_known_stays():
    (batch,) = export.symbolic_shape("b")
    fn = lambda params, x: jnp.concatenate([x @ params["one"], params["two"]]) @ params["three"]  # noqa: E731
    params = draw({"one": jnp.ones((3, 4)), "two": jnp.ones((2, 4)), "three": jnp.ones((4, 2))})
    coupling = pp.couple(fn, params, jax.ShapeDtypeStruct((batch, 3), jnp.float32))
    assert coupling.n_units == 4
    assert ("two", 0, "behind a size that is not known") in {
        (p.path, p.axis, p.reason) for p in coupling.frozen
    }


@pytest.mark.parametrize("pruned", [[1.5], ["1"], [True, False]])
def test_units_that_are_no_numbers(coupling, pruned):
    with pytest.raises(TypeError, match=r"pruned must hold unit numbers, got .* np\.flatnonzero"):
        coupling.masks(pruned, VARIABLES)


@pytest.mark.parametrize("pruned", [[0], [99], [-1]])
def test_costs_of_units_that_are_not_there(coupling, pruned):
    with pytest.raises(ValueError, match="pruned must hold unit numbers from 1 to"):
        coupling.cost(pruned)
    with pytest.raises(ValueError, match="booleans by unit number, or unit numbers; got"):
        coupling.cost(np.ones(3, bool))
    with pytest.raises(ValueError, match="booleans by unit number, or unit numbers; got"):
        coupling.masks(np.ones(32, bool), VARIABLES)


def test_a_plan_that_is_damaged_is_refused(shrunk, tmp_path):
    pp.save_plan(tmp_path / "plan", shrunk.report.plan)
    data = (tmp_path / "plan").read_bytes()
    for part in (data[: len(data) // 2], b"", data[:-8]):
        (tmp_path / "part").write_bytes(part)
        with pytest.raises(ValueError, match=r"part is no safetensors file, or is damaged"):
            pp.load_plan(tmp_path / "part")


def test_a_derivative_that_moves_positions_is_refused_when_it_is_asked_for():
    """Its program is walked through only then, when the units are known."""

    @jax.custom_jvp
    def bent(x):
        return jnp.sin(x)

    bent.defjvp(lambda x, t: (bent(x[0]), t[0] * jnp.cos(x[0]) + t[0][:, ::-1]))

    def fn(params, x):
        return bent(x @ params["one"]) @ params["two"]

    rng = np.random.default_rng(4)
    params = {"one": jnp.asarray(rng.normal(size=(3, 6)), jnp.float32)}
    params["two"] = jnp.asarray(rng.normal(size=(6, 2)), jnp.float32)
    x = jnp.ones((2, 3))
    coupling = pp.couple(fn, params, x)
    small = pp.shrink(fn, params, coupling.masks([1, 2], params), coupling, x)
    expected = fn(pp.apply_masks(params, small.report.masks), x)
    for _ in range(2):  # nothing is remembered of the first attempt
        with pytest.raises(NotImplementedError, match="derivative that bent defines moves"):
            jax.grad(lambda p: small.fn(p, x).sum())(small.params)
        np.testing.assert_allclose(small.fn(small.params, x), expected, rtol=1e-5)


def test_wrong_arguments_say_what_they_are(shrunk, coupling, tmp_path):
    masks = shrunk.report.masks
    with pytest.raises(TypeError, match="shrink: coupling must be what couple returned, got None"):
        pp.shrink(NET.apply, VARIABLES, masks, None, X)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), VARIABLES)
    with pytest.raises(TypeError, match="is a shape; to be cut it must be an array"):
        pp.shrink(NET.apply, shapes, masks, coupling, X)
    less = {**shrunk.params, "params": {**shrunk.params["params"]}}
    del less["params"]["stem"]
    with pytest.raises(ValueError, match=r"params have no 'params.stem.bias'"):
        shrunk.fn(less, X)


def test_donated_arrays_are_deleted_as_they_are_cut():
    def fn(p, x):
        return jax.nn.relu(x @ p["one"] + x @ p["again"]) @ p["two"] + p["end"][None]

    rng = np.random.default_rng(0)
    one, two = (jax.device_put(rng.normal(size=s).astype("float32")) for s in ((3, 8), (8, 2)))
    params = {"one": one, "again": one, "two": two, "end": jax.device_put(np.ones(2, "float32"))}
    x = np.ones((1, 3), np.float32)
    coupling = pp.couple(fn, params, x)
    masks = coupling.masks([1, 2, 3], params)
    kept = pp.shrink(fn, params, masks, coupling, x)
    assert not any(leaf.is_deleted() for leaf in params.values())
    small = pp.shrink(fn, params, masks, coupling, x, donate=True)
    assert {k: leaf.is_deleted() for k, leaf in params.items()} == {
        "one": True,
        "again": True,
        "two": True,
        "end": False,
    }
    for a, b in zip(jax.tree.leaves(kept.params), jax.tree.leaves(small.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert small.fn(small.params, x).tolist() == kept.fn(kept.params, x).tolist()
    with pytest.raises(TypeError, match="donate"):
        pp.shrink(fn, kept.params, masks, coupling, x, donate="yes")
