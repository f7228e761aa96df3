"""Pruned weights stay exactly zero: optimizers x dtypes x wrappers, and the frameworks' loops."""

import functools
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState

from purepruning.masks import apply_masks, expand
from purepruning.training.keep_pruned import keep_pruned
from purepruning.training.masks_in_state import KeepPrunedState, get_masks, set_masks
from purepruning.trees import flatten
from tests.fast import jit_once, some_key
from tests.messages import raises

pytestmark = pytest.mark.usefixtures("unoptimized")

T, F = True, False
rng = np.random.default_rng(0)
W = rng.random((4, 6)) < 0.5
MASKS = {"w": jnp.asarray(W), "v": jnp.array([[T], [F], [T]]), "b": jnp.array([T, F] * 3)}
MASKS |= {"free": None}
SHAPES = {"w": (4, 6), "v": (3, 5), "b": (6,), "free": (2,)}

adamw = functools.partial(optax.adamw, 1e-2, weight_decay=0.1)
LABELS = {"w": "x", "v": "y", "b": "y", "free": "x"}
OPTIMIZERS = {
    "sgd_momentum": lambda: optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(1e-2),
    "adamw": adamw,
    "lion": lambda: optax.lion(1e-2, weight_decay=0.1),
    "rmsprop": lambda: optax.rmsprop(1e-2, momentum=0.9, centered=True),
    "adagrad": lambda: optax.adagrad(1e-2),
    "lamb": lambda: optax.lamb(1e-2, weight_decay=0.1),
    "adafactor": lambda: optax.adafactor(
        1e-2, min_dim_size_to_factor=2, momentum=0.9, weight_decay_rate=0.1
    ),
    "scheduled": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), adamw(), optax.scale_by_schedule(lambda t: 1 / (1 + t))
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(
        learning_rate=optax.linear_schedule(1e-2, 1e-3, 20), weight_decay=0.1
    ),
    "multi_transform": lambda: optax.multi_transform(
        {"x": adamw(), "y": optax.sgd(1e-2, momentum=0.9)}, LABELS
    ),
    "multi_steps": lambda: optax.MultiSteps(adamw(), 3).gradient_transformation(),
}
FORMS = {
    "last": lambda optimizer: optax.chain(optimizer, keep_pruned(MASKS)),
    "inner": lambda optimizer: keep_pruned(MASKS, optimizer),
}
WRAPPERS = {
    "multi_steps": lambda tx: optax.MultiSteps(tx, 3),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda lr: optax.chain(tx))(lr=1e-2),
    "chain": lambda tx: optax.chain(optax.clip(1.0), optax.chain(tx)),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 5),
    "multi_transform": lambda tx: optax.multi_transform({"all": tx}, dict.fromkeys(SHAPES, "all")),
}


def start(dtype=jnp.float32):
    """Parameters that are not zero anywhere."""
    numbers = np.random.default_rng(0)
    return {path: jnp.asarray(numbers.uniform(1, 2, s), dtype) for path, s in SHAPES.items()}


def train(tx, params, steps=50):
    """Returns the parameters after every step of a scanned loop, with dense random gradients."""

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    noise = {
        path: jnp.asarray(np.random.default_rng(1).normal(size=(steps, *SHAPES[path])), x.dtype)
        for path, x in params.items()
    }
    return jit_once(lambda c: jax.lax.scan(step, c, noise))((params, tx.init(params)))[1]


def assert_pruned(history, params, *, after=0):
    """Pruned weights are zero after every step; kept ones moved and are numbers."""
    for path, full in expand(MASKS, params).items():
        x, full = np.asarray(history[path]).astype(np.float64), np.asarray(full)
        assert history[path].dtype == params[path].dtype
        assert (x[after:, ~full] == 0).all(), path
        assert np.isfinite(x).all()
        moved = x[-1, full] != np.asarray(params[path]).astype(np.float64)[full]
        assert moved.mean() > 0.5, path


TABLE = [(name, "float32", form) for name in OPTIMIZERS for form in FORMS]
TABLE += [
    (n, d, f) for n in ("adamw", "sgd_momentum") for d in ("bfloat16", "float16") for f in FORMS
]


@pytest.mark.parametrize(("name", "dtype", "form"), TABLE)
@pytest.mark.usefixtures("standard_promotion")
def test_pruned_weights_are_zero_after_every_step(name, dtype, form):
    params = start(dtype)
    history = train(FORMS[form](OPTIMIZERS[name]()), params)
    # With MultiSteps inside the chain there is an update at every step, of zeros or not.
    assert_pruned(history, params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.usefixtures("standard_promotion")
def test_wrappers_around_change_nothing(wrapper, dtype):
    params = start(dtype)
    tx = WRAPPERS[wrapper](FORMS["last" if dtype == "float32" else "inner"](adamw()))
    history = train(tx, params)
    assert_pruned(history, params, after=2 if wrapper == "multi_steps" else 0)


# Why it is exact.


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_finite_number_goes_to_zero(dtype):
    if dtype == "float32":
        bits = rng.integers(0, 2**32, 2**18, dtype=np.uint32)
        bits[:4] = [1, 2**31 + 1, 0x7F7FFFFF, 0x00800000]  # subnormal, largest, smallest normal
    else:
        bits = np.arange(2**16, dtype=np.uint16)
    weights = bits.view(jnp.dtype(dtype))
    weights = jnp.asarray(weights[np.isfinite(weights.astype(np.float32))])
    tx = keep_pruned({"w": jnp.array(F)})
    for update in (0.1, np.inf, np.nan):
        updates = {"w": jnp.full_like(weights, update)}
        updates, _ = tx.update(updates, tx.init({"w": weights}), {"w": weights})
        assert not optax.apply_updates({"w": weights}, updates)["w"].any()


@pytest.mark.parametrize("weight", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("update", ["float32", "bfloat16", "float16"])
@pytest.mark.usefixtures("standard_promotion")
def test_updates_of_another_dtype_leave_no_rest(weight, update):
    # 1/3 rounds differently in each format.
    params = {"w": jnp.full(2, 1 / 3, weight)}
    tx = keep_pruned({"w": jnp.array([T, F])})
    updates, _ = tx.update({"w": jnp.ones(2, update)}, tx.init(params), params)
    after = optax.apply_updates(params, updates)["w"]
    assert after.dtype == weight
    assert after[1] == 0
    assert float(after[0]) == pytest.approx(4 / 3, rel=1e-2)


def test_kept_weights_get_the_update_they_would_have_had():
    params = {"w": jnp.float32([1, 2]), "free": jnp.float32([3])}
    tx = keep_pruned({"w": jnp.array([T, F])})
    updates, _ = tx.update(
        {"w": jnp.float32([5, 7]), "free": jnp.float32([9])}, tx.init(params), params
    )
    assert updates["w"].tolist() == [5, -2]
    assert updates["free"].tolist() == [9]


# The state.


def test_the_state_holds_boolean_arrays_by_path():
    params = {"a": {"w": jnp.ones((2, 2))}, "b": jnp.ones(2)}
    state = keep_pruned({"a": {"w": jnp.array([[T], [F]])}, "b": None}).init(params)
    assert state.masks.keys() == {"a.w"}
    assert all(isinstance(x, jax.Array) and x.dtype == bool for x in jax.tree.leaves(state))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("standard_promotion")
def test_one_compilation_serves_all_steps_and_all_masks(form):
    tx = FORMS[form](adamw())
    step = jax.jit(tx.update)
    params, state = start(), tx.init(start())
    for masks in (MASKS, {"w": ~MASKS["w"]}, {}):
        for _ in range(2):
            updates, state = step(params, state, params)
            params = optax.apply_updates(params, updates)
        state = set_masks(state, masks)
    assert step._cache_size() == 1


def test_donated_states_take_no_masks_with_them():
    masks = {"w": jnp.array([T, F])}
    params = {"w": jnp.ones(2)}
    tx = keep_pruned(masks)
    one, two = tx.init(params), tx.init(params)
    step = jax.jit(lambda state, p: tx.update(p, state, p)[1], donate_argnums=0)
    three = set_masks(step(one, params), masks)
    step(three, params)
    assert masks["w"].tolist() == [T, F]
    assert two.masks["w"].tolist() == [T, F]


@pytest.mark.usefixtures("standard_promotion")
def test_optax_can_map_over_the_moments_in_the_state():
    params = {"w": jnp.ones(2)}
    for tx in (
        keep_pruned({"w": jnp.array([T, F])}, optax.adam(1e-2)),
        optax.chain(optax.adam(1e-2), keep_pruned({"w": jnp.array([T, F])})),
    ):
        marked = optax.tree_utils.tree_map_params(tx, lambda x: "moment", tx.init(params))
        assert jax.tree.leaves(marked).count("moment") == 2


# Optimizers with state of other forms.


def run_inside(optimizer, masks, steps=6, searching=False):
    """Parameters and state after some steps, of a loss with its minimum at 3."""
    params = {"w": jnp.arange(1.0, 7.0).reshape(2, 3), "a": {"w": jnp.ones((2, 3))}}

    def loss(params):
        return sum(jnp.sum((x - 3) ** 2) for x in jax.tree.leaves(params))

    tx = keep_pruned(masks, optimizer)

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        asked = {"value": value, "grad": grads, "value_fn": loss} if searching else {}
        updates, state = tx.update(grads, state, params, **asked)
        return (optax.apply_updates(params, updates), state), None

    scan = jit_once(lambda carry: jax.lax.scan(step, carry, length=steps)[0])
    return scan((params, tx.init(params)))


@pytest.mark.usefixtures("standard_promotion")
def test_line_searches_and_flat_moments_inside():
    masks = {"w": jnp.array([[T, F, T], [F, T, T]]), "a": None}
    params, _ = run_inside(optax.lbfgs(), masks, searching=True)
    np.testing.assert_allclose(params["w"], jnp.where(masks["w"], 3.0, 0.0), rtol=1e-5)
    np.testing.assert_allclose(params["a"]["w"], 3.0, rtol=1e-5)
    params, state = run_inside(optax.flatten(optax.adam(0.1)), masks)
    assert np.array_equal(params["w"] != 0, masks["w"])
    assert optax.tree_utils.tree_get(state.inner, "mu").shape == (12,)


@pytest.mark.usefixtures("standard_promotion")
def test_weights_that_an_optimizer_holds_itself_are_pruned_inside():
    masks = {"w": jnp.array([[T, F, T], [F, T, T]]), "a": None}
    params, state = run_inside(optax.contrib.schedule_free_sgd(0.1, warmup_steps=2), masks)
    evaluated = optax.contrib.schedule_free_eval_params(state.inner, params)
    for x in (params, evaluated, state.inner.z):
        assert np.array_equal(x["w"] != 0, masks["w"])


@pytest.mark.usefixtures("standard_promotion")
def test_moments_belong_to_the_longest_path():
    masks = {"w": jnp.array([[T, F, T], [F, T, T]]), "a": None}
    _, state = run_inside(optax.adam(0.1), masks, steps=1)
    mu = state.inner[0].mu
    assert np.array_equal(mu["w"] != 0, masks["w"] & (np.arange(1, 7).reshape(2, 3) != 3))
    assert mu["a"]["w"].all()
    _, state = run_inside(optax.adam(0.1), {"w": None, "a": masks}, steps=1)
    assert np.array_equal(state.inner[0].mu["a"]["w"] != 0, masks["w"])


@pytest.mark.usefixtures("standard_promotion")
def test_a_scalar_parameter_keeps_its_step_count():
    tx = keep_pruned(jnp.array(F), optax.adam(0.1))
    _, state = tx.update(jnp.array(1.0), tx.init(jnp.array(2.0)), jnp.array(2.0))
    assert state.inner[0].count == 1
    assert state.inner[0].mu == 0


@pytest.mark.parametrize("around", ["chain", "multi_steps"])
def test_another_transform_may_not_follow(around):
    params = {"w": jnp.ones(2)}
    masks = {"w": jnp.array([T, F])}
    around = {"chain": optax.chain, "multi_steps": lambda tx: optax.MultiSteps(tx, 2)}[around]
    for ours in (keep_pruned(masks), keep_pruned(masks, optax.sgd(0.1))):
        state = around(optax.chain(ours, optax.adam(0.1))).init(params)
        with raises(ValueError, "another transform follows", "put it last"):
            get_masks(state, params)
        with raises(ValueError, "another transform follows", "put it last"):
            set_masks(state, masks)
    right = around(optax.chain(optax.chain(optax.clip(1.0), optax.adam(0.1)), keep_pruned(masks)))
    for state in (right.init(params), (right.init(params), {"w": jnp.ones(2)})):
        assert get_masks(state, params)["w"].tolist() == [T, F]


@pytest.mark.usefixtures("standard_promotion")
def test_checkpoints_hold_the_masks(tmp_path):
    tx = keep_pruned(MASKS, adamw())
    params = start()
    _, state = tx.update(params, tx.init(params), params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        # A target made with other masks: those of the file win.
        other = set_masks(tx.init(params), {})
        restored = checkpointer.restore(tmp_path / "state", other)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert not restored.masks["w"].all()


# Other masks.


def states(tree):
    """Every state of keep_pruned in a tree, those inside of others too."""
    ours = lambda x: isinstance(x, KeepPrunedState)  # noqa: E731
    found = [x for x in jax.tree.leaves(tree, is_leaf=ours) if ours(x)]
    return found + [y for x in found for y in states(x.inner)]


@pytest.mark.parametrize("how", ["chain", "inner", "multi"])
def test_get_masks_is_a_tree_like_the_parameters(how):
    params = {"one": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, "two": [jnp.ones(4)]}
    masks = {
        "one": {"w": jnp.array([[True], [False]]), "b": None},
        "two": [jnp.array([True, False, True, False])],
    }
    tx = {
        "chain": optax.chain(optax.adam(0.1), keep_pruned(masks)),
        "inner": keep_pruned(masks, optax.adam(0.1)),
        "multi": optax.MultiSteps(keep_pruned(masks, optax.adam(0.1)), 2),
    }[how]
    state = tx.init(params)
    for tree in (params, jax.eval_shape(lambda: params)):
        got = get_masks(state, tree)
        assert jax.tree.structure(got) == jax.tree.structure(masks)
        jax.tree.map(np.testing.assert_array_equal, got, masks)
    with raises(KeyError, "get_masks", "'two.0'"):
        get_masks(state, {"one": params["one"]})


def test_set_masks_is_pure_and_reaches_every_wrapper():
    params = {"w": jnp.ones(2), "v": jnp.ones(2)}
    masks = {"w": jnp.array([T, F]), "v": jnp.array([T, F])}
    inner = optax.chain(optax.sgd(0.1, momentum=0.9), keep_pruned(masks))
    for tx in (
        inner,
        optax.MultiSteps(inner, 2),
        optax.inject_hyperparams(lambda lr: inner)(lr=0.1),
        keep_pruned({"w": jnp.array([T, T])}, inner),
        optax.multi_transform(
            {name: keep_pruned({name: masks[name]}) for name in "wv"}, {"w": "w", "v": "v"}
        ),
    ):
        old = tx.init(params)
        before = jax.tree.map(np.asarray, old)
        new = set_masks(old, {"w": jnp.array([F, T])})
        assert jax.tree.structure(new) == jax.tree.structure(old)
        jax.tree.map(np.testing.assert_array_equal, old, before)
        found = states(new)
        assert {path for state in found for path in state.masks} == {"w", "v"}
        for state in found:
            got = {path: mask.tolist() for path, mask in state.masks.items()}
            assert got == {path: {"w": [F, T], "v": [T, T]}[path] for path in got}


def test_set_masks_broadcasts_to_what_it_replaces_and_runs_under_vmap():
    state = keep_pruned({"w": jnp.ones((2, 3), bool)}).init({"w": jnp.ones((2, 3))})
    assert set_masks(state, {"w": jnp.array([[T], [F]])}).masks["w"].tolist() == [[T] * 3, [F] * 3]
    rows = jax.vmap(lambda m: set_masks(state, {"w": m}))(jnp.array([[[T], [F]], [[F], [T]]]))
    assert rows.masks["w"].shape == (2, 2, 3)
    assert rows.masks["w"][:, 1, 0].tolist() == [F, T]


def test_set_masks_refuses_what_has_no_place():
    tx = keep_pruned({"dense": {"kernel": jnp.array([[T], [F]])}})
    state = tx.init({"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}})
    with pytest.raises(KeyError, match=r"no mask for 'dense.bias'; nearest: 'dense.kernel'"):
        set_masks(state, {"dense": {"bias": jnp.ones(3, bool)}})
    with pytest.raises(ValueError, match=r"'dense.kernel'.*\(2, 1\), got \(2, 3\)"):
        set_masks(state, {"dense": {"kernel": jnp.ones((2, 3), bool)}})
    with pytest.raises(TypeError, match=r"'dense.kernel' must be boolean"):
        set_masks(state, {"dense": {"kernel": jnp.ones((2, 1))}})
    with pytest.raises(ValueError, match="no state of keep_pruned"):
        set_masks(optax.sgd(0.1).init({"w": jnp.ones(2)}), {})


# What the optimizer sees.


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.usefixtures("standard_promotion")
def test_moments_of_pruned_weights_are_zero(name):
    params = start()
    tx = keep_pruned(MASKS, OPTIMIZERS[name]())
    state = tx.init(params)
    # Three steps with other masks, so that there are moments to be cleared.
    state = set_masks(state, {})
    update = jax.jit(tx.update)
    for _ in range(3):
        _, state = update(params, state, params)
    _, state = update(params, set_masks(state, MASKS), params)
    full, seen = expand(MASKS, params), 0
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state.inner):
        name = str(getattr(keys[-1], "key", ""))
        if name in SHAPES and leaf.shape == SHAPES[name]:
            assert (np.asarray(leaf)[~np.asarray(full[name])] == 0).all(), keys
            seen += np.asarray(leaf).any()
    assert seen >= 1


@pytest.mark.usefixtures("standard_promotion")
def test_a_weight_that_comes_back_starts_anew():
    b1, g = 0.9, 2.0
    params, grads = {"w": jnp.ones(2)}, {"w": jnp.full(2, g)}
    for form, expected in (("inner", (1 - b1) * g), ("last", (1 - b1**3) * g)):
        masks, optimizer = {"w": jnp.array([T, F])}, optax.adam(1e-2, b1=b1)
        tx = keep_pruned(masks, optimizer)
        if form == "last":
            tx = optax.chain(optimizer, keep_pruned(masks))
        state = tx.init(params)
        for _ in range(2):
            _, state = tx.update(grads, state, params)
        _, state = tx.update(grads, set_masks(state, {}), params)
        mu = optax.tree_utils.tree_get(state, "mu")["w"]
        np.testing.assert_allclose(mu, [(1 - b1**3) * g, expected], rtol=1e-6)


def test_global_norms_leave_pruned_weights_out():
    params, grads = {"w": jnp.float32([1, 1])}, {"w": jnp.float32([3, 4])}
    masks, clip = {"w": jnp.array([T, F])}, optax.clip_by_global_norm(1.0)
    for tx, kept in (
        (keep_pruned(masks, clip), 1.0),  # 3 / |(3, 0)|
        (optax.chain(clip, keep_pruned(masks)), 0.6),  # 3 / |(3, 4)|
    ):
        updates, _ = tx.update(grads, tx.init(params), params)
        np.testing.assert_allclose(updates["w"], [kept, -1], rtol=1e-6)


def scale_by_value():
    def update(updates, state, params=None, *, value, **extra_args):
        return jax.tree.map(lambda u: u * value, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


@pytest.mark.usefixtures("standard_promotion")
def test_extra_arguments_are_passed_on():
    params, masks = {"w": jnp.float32([1, 1])}, {"w": jnp.array([T, F])}
    for tx in (
        keep_pruned(masks, scale_by_value()),
        keep_pruned(masks, optax.chain(optax.identity(), scale_by_value())),
        optax.chain(scale_by_value(), keep_pruned(masks)),
        keep_pruned(masks, optax.MultiSteps(scale_by_value(), 1)),
    ):
        updates, _ = tx.update(params, tx.init(params), params, value=5.0, loss=None)
        assert updates["w"].tolist() == [5, -1]


# Loops of the frameworks.


@pytest.mark.usefixtures("standard_promotion")
def test_stacked_models_with_masks_of_their_own():
    masks = {"w": jnp.stack([MASKS["w"], ~MASKS["w"], jnp.ones((4, 6), bool)])}
    params = {"w": jnp.asarray(rng.uniform(1, 2, (3, 4, 6)), jnp.float32)}

    def run(params, masks):
        return train(keep_pruned(masks, adamw()), params, 10)["w"][-1]

    together = jax.vmap(run)(params, masks)
    assert (np.asarray(together) == 0).tolist() == (~np.asarray(masks["w"])).tolist()
    for i in range(3):
        alone = run({"w": params["w"][i]}, {"w": masks["w"][i]})
        # Batched and single matrices may be fused differently.
        np.testing.assert_allclose(together[i], alone, rtol=1e-5)


@pytest.mark.usefixtures("standard_promotion")
def test_flax_train_state():
    model, x = linen.Dense(3), jnp.ones((4, 5))
    params = model.init(some_key(), x)["params"]
    masks = {"kernel": jnp.array([[T, F, T]]), "bias": jnp.array([T, F, T])}
    state = TrainState.create(
        apply_fn=model.apply, params=params, tx=optax.chain(adamw(), keep_pruned(masks))
    ).replace(step=jnp.array(0))  # Flax begins with a Python int, which compiles twice

    @jax.jit
    def step(state):
        loss = lambda p: ((state.apply_fn({"params": p}, x) - 1) ** 2).sum()  # noqa: E731
        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    for _ in range(50):
        state = step(state)
        assert not state.params["kernel"][:, 1].any()
        assert state.params["bias"][1] == 0
    assert step._cache_size() == 1
    np.testing.assert_allclose(model.apply({"params": state.params}, x)[0, 0], 1, atol=0.1)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.out = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.gelu(self.norm(self.conv(x))).mean((1, 2)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("standard_promotion")
def test_nnx_optimizer(form):
    model = Net(nnx.Rngs(some_key()))
    keep = {"conv.kernel": jnp.array([T, F, T, F]), "out.kernel": jnp.arange(8).reshape(4, 2) > 2}
    masks = flatten(nnx.state(model, nnx.Param)).rebuild(keep)  # a State, with None
    tx = keep_pruned(masks, adamw())
    if form == "last":
        tx = optax.chain(adamw(), keep_pruned(masks))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x = jax.random.normal(some_key(), (8, 6, 6, 1))
    mean = model.norm.mean[...]

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: ((model(x) - 1) ** 2).sum())(model))

    def assert_kept(conv, out):
        assert (np.asarray(model.conv.kernel[...]) != 0).all((0, 1, 2)).tolist() == conv
        assert (np.asarray(model.out.kernel[...]) != 0).tolist() == out

    for _ in range(50):
        step(model, optimizer)
    out = (np.arange(8).reshape(4, 2) > 2).tolist()
    assert_kept([T, F, T, F], out)
    assert (model.norm.mean[...] != mean).any()

    # Other masks: conv channel 1 comes back, 2 goes.
    new = {"conv.kernel": jnp.array([T, T, F, F]), "out.kernel": keep["out.kernel"]}
    optimizer.opt_state = nnx.data(set_masks(optimizer.opt_state, new))
    for _ in range(3):
        step(model, optimizer)
    assert_kept([T, T, F, F], out)
    for where in (optimizer.opt_state, optimizer, nnx.state(optimizer), nnx.split(optimizer)[1]):
        got = flatten(get_masks(where, nnx.state(model, nnx.Param))).leaves
        assert {path: mask.tolist() for path, mask in got.items()} == {
            path: mask.tolist() for path, mask in new.items()
        }
    with pytest.raises(ValueError, match="there is no state of keep_pruned in this opt_state"):
        get_masks(nnx.state(model), nnx.state(model, nnx.Param))

    _, state = nnx.split(optimizer)
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(state)}
    assert any(path.endswith("masks.conv.kernel") for path in paths)


def test_explicit_meshes():
    """A mask that is whole on every device, for a weight that is not."""
    code = """
        import jax, jax.numpy as jnp, optax
        from purepruning.masks import apply_masks, density, expand
        from purepruning.training.keep_pruned import keep_pruned

        mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
        jax.set_mesh(mesh)
        spec = jax.sharding.PartitionSpec("x", None)
        params = {"w": jax.device_put(jnp.ones((8, 2)), jax.NamedSharding(mesh, spec))}
        for mask in ([[True, False]], [[True, False]] * 8):
            masks = {"w": jnp.array(mask)}
            tx = keep_pruned(masks, optax.sgd(0.5, momentum=0.9))
            updates, state = jax.jit(tx.update)(params, tx.init(params), params)
            for tree in (apply_masks(params, masks), jax.jit(apply_masks)(params, masks),
                         expand(masks, params), updates, state.inner[0].trace):
                assert tree["w"].sharding.spec == spec, tree["w"].sharding
            after = optax.apply_updates(params, updates)["w"]
            assert after.tolist() == [[0.5, 0.0]] * 8
            assert density(masks, params) == jax.jit(density)(masks, params) == 0.5
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"},
        check=True,
        timeout=120,
    )


# Mistakes.


def test_mistakes_raise():
    params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    with pytest.raises(KeyError, match=r"'kernel'.*nearest: 'dense.kernel'"):
        keep_pruned({"kernel": jnp.ones((2, 1), bool)}).init(params)
    with pytest.raises(ValueError, match=r"'dense.kernel'.*\(2, 3\), got \(3, 1\)"):
        keep_pruned({"dense": {"kernel": jnp.ones((3, 1), bool)}}).init(params)
    with pytest.raises(TypeError, match=r"'dense.kernel' must be boolean, got float32"):
        keep_pruned({"dense": {"kernel": jnp.ones((2, 1))}}).init(params)
    tx = keep_pruned({"dense": {"kernel": jnp.ones((2, 1), bool)}})
    state = tx.init(params)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, state)
    for updates in ({"dense": {"bias": jnp.ones(3)}}, {"dense": {"kernel": None}}):
        with pytest.raises(KeyError, match=r"no update for 'dense.kernel'"):
            tx.update(updates, state, params)
    with pytest.raises(KeyError, match=r"'dense.kernel'"):
        tx.update(params, state, {"dense": {"bias": jnp.ones(3)}})
    shapes = jax.eval_shape(lambda: params)
    with pytest.raises(TypeError, match=r"params: 'dense.kernel' must be an array of numbers"):
        tx.update(params, state, shapes)
    inside = keep_pruned({"dense": {"kernel": jnp.ones((2, 1), bool)}}, optax.sgd(0.1))
    for path, text in {"bias": "text", "kernel": "text"}.items():
        updates = {"dense": {**params["dense"], path: text}}
        with pytest.raises(TypeError, match=rf"updates: 'dense.{path}' must be an array.*'text'"):
            inside.update(updates, inside.init(params), params)


@pytest.mark.usefixtures("standard_promotion")
def test_weights_that_start_at_zero_stay_there_between_updates():
    """With MultiSteps around, pruned weights wait for the first real update; masks come first."""
    params = apply_masks(start(), MASKS)
    tx = optax.MultiSteps(keep_pruned(MASKS, optax.sgd(0.1)), 4)
    assert_pruned(train(tx, params, 9), params)
