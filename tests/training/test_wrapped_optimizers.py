"""Optimizers and wrappers of Optax, behind, inside and around keep_pruned: zero, or refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from purepruning.masks import apply_masks
from purepruning.training.keep_pruned import keep_pruned
from purepruning.training.masks_in_state import get_masks, set_masks
from tests.fast import jit_once
from tests.messages import raises

pytestmark = pytest.mark.usefixtures("standard_promotion")

T, F = True, False
KEPT = np.array([[T, F, T], [F, T, T]])
MASKS = {"w": jnp.asarray(KEPT), "v": None}
WHICH = {"w": T, "v": F}
STEPS = 6

sgd = functools.partial(optax.sgd, 0.1, momentum=0.9)


def start():
    return {"w": jnp.arange(1.0, 7.0).reshape(2, 3), "v": jnp.full(3, 2.0)}


def loss(params, x):
    return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] - 1) ** 2)


def train(tx, params, *, searching=False):
    """Returns the parameters after every step, the last of them, and the state."""
    xs = jnp.asarray(np.random.default_rng(0).normal(size=(STEPS, 5, 2)), jnp.float32)

    def step(carry, x):
        params, state = carry
        fast = params.fast if isinstance(params, optax.LookaheadParams) else params
        value, grads = jax.value_and_grad(loss)(fast, x)
        asked = {"value": value, "grad": grads, "value_fn": lambda p: loss(p, x)}
        updates, state = tx.update(grads, state, params, **(asked if searching else {}))
        params = optax.apply_updates(params, updates)
        return (params, state), params

    scan = jit_once(lambda carry: jax.lax.scan(step, carry, xs))
    (params, state), history = scan((params, tx.init(params)))
    return history, params, state


def assert_kept(history, *, after=0):
    """Pruned weights are zero after every step, the others are numbers that are not."""
    x = np.asarray(history["w"])
    assert (x[after:, ~KEPT] == 0).all()
    assert np.isfinite(x).all()
    assert (x[:, KEPT] != 0).all()


#: Optimizers that are right on both sides: at the chain's beginning, and inside.
OPTIMIZERS = {
    "flatten": lambda: optax.flatten(optax.adam(0.1)),
    "multi_steps": lambda: optax.MultiSteps(sgd(), 2).gradient_transformation(),
    "masked": lambda: optax.masked(sgd(), WHICH),
    "multi_transform": lambda: optax.multi_transform(
        {"x": sgd(), "y": optax.adam(0.1)}, {"w": "x", "v": "y"}
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "apply_if_finite": lambda: optax.apply_if_finite(sgd(), 3),
    "clipping": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)),
    "adaptive clipping": lambda: optax.chain(optax.adaptive_grad_clip(0.1), sgd()),
    "named_chain": lambda: optax.named_chain(("z", sgd()), ("b", optax.clip(1.0))),
    "conditionally_mask": lambda: optax.conditionally_mask(sgd(), lambda step: step % 2 == 0),
    "averaged updates": lambda: optax.chain(sgd(), optax.ema(0.9), optax.apply_every(2)),
    "noise": lambda: optax.noisy_sgd(0.1, key=0),
    "sam": lambda: contrib.sam(sgd(), optax.chain(contrib.normalize(), optax.sgd(0.05))),
    "prodigy": lambda: contrib.prodigy(1.0),
    "dog": lambda: contrib.dog(1.0),
    "muon": lambda: contrib.muon(0.1),
    "mechanize": lambda: contrib.mechanize(sgd()),
    "cocob": lambda: contrib.cocob(),
}
SEARCHES = {
    "lbfgs": lambda: optax.lbfgs(),
    "backtracking": lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10)),
    "polyak_sgd": lambda: optax.polyak_sgd(),
    "momo": lambda: contrib.momo(0.1),
    "reduce_on_plateau": lambda: optax.chain(sgd(), contrib.reduce_on_plateau(0.5, patience=1)),
}


def behind(optimizer):
    return optax.chain(optimizer, keep_pruned(MASKS))


def inside(optimizer):
    return keep_pruned(MASKS, optimizer)


@pytest.mark.parametrize("form", [behind, inside])
@pytest.mark.parametrize("name", [*OPTIMIZERS, *SEARCHES])
def test_any_optimizer(name, form):
    tx = form({**OPTIMIZERS, **SEARCHES}[name]())
    history, params, state = train(tx, start(), searching=name in SEARCHES)
    assert_kept(history)
    np.testing.assert_array_equal(get_masks(state, params)["w"], KEPT)


#: Wrappers around keep_pruned in which pruned weights are zero after every update.
AROUND = {
    "multi_steps": lambda tx: optax.MultiSteps(tx, 2),
    "masked": lambda tx: optax.masked(tx, WHICH),
    "multi_transform": lambda tx: optax.multi_transform(
        {"x": tx, "y": optax.adam(0.1)}, {"w": "x", "v": "y"}
    ),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda lr: tx)(lr=0.1),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "clipping before": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "named_chain": lambda tx: optax.named_chain(("z", optax.clip(1.0)), ("b", tx)),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, lambda step: step % 2 == 0),
}
#: Those that go back to the weights they began with, which must have been pruned.
AROUND_PRUNED = {
    "schedule_free": lambda tx: contrib.schedule_free(tx, 0.1),
    "mechanize": lambda tx: contrib.mechanize(tx),
}


@pytest.mark.parametrize("form", [behind, inside])
@pytest.mark.parametrize("name", [*AROUND, *AROUND_PRUNED])
def test_any_wrapper(name, form):
    tx = {**AROUND, **AROUND_PRUNED}[name](form(sgd()))
    params = start() if name in AROUND else apply_masks(start(), MASKS)
    history, params, state = train(tx, params)
    assert_kept(history, after=1 if name == "multi_steps" else 0)
    np.testing.assert_array_equal(get_masks(state, params)["w"], KEPT)


def test_weights_that_an_optimizer_evaluates_with():
    for tx, params in (
        (inside(contrib.schedule_free_sgd(0.1, warmup_steps=2)), start()),
        (contrib.schedule_free(inside(sgd()), 0.1), apply_masks(start(), MASKS)),
    ):
        _, params, state = train(tx, params)
        own = state.inner if hasattr(state, "inner") else state
        evaluated = contrib.schedule_free_eval_params(own, params)
        np.testing.assert_array_equal(evaluated["w"] != 0, KEPT)


def test_lookahead_prunes_fast_and_slow_weights():
    params = optax.LookaheadParams.init_synced(apply_masks(start(), MASKS))
    for form in (behind, inside):
        history, end, state = train(optax.lookahead(form(sgd()), 2, 0.5), params)
        assert_kept(history.fast)
        assert_kept(history.slow)
        np.testing.assert_array_equal(get_masks(state, end.fast)["w"], KEPT)
    # In a chain, parameters are pairs of weights, and so are masks.
    tx = optax.chain(
        optax.lookahead(sgd(), 2, 0.5), keep_pruned(optax.LookaheadParams(MASKS, MASKS))
    )
    assert_kept(train(tx, params)[0].slow)


# Refused: what would let pruned weights move, or cannot be.


def steps_left_out(tx):
    return optax.conditionally_transform(tx, lambda step: step % 2 == 0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda tx: optax.chain(tx, optax.adam(0.1)), ["follows", "put it last"]),
        (lambda tx: optax.chain(tx, optax.clip(0.5)), ["follows", "put it last"]),
        (lambda tx: optax.chain(optax.chain(tx), optax.adam(0.1)), ["follows", "put it last"]),
        (lambda tx: optax.named_chain(("z", tx), ("a", sgd())), ["follows", "put it last"]),
        (lambda tx: optax.MultiSteps(optax.chain(tx, sgd()), 2), ["follows", "put it last"]),
        (lambda tx: keep_pruned({}, optax.chain(tx, sgd())), ["follows", "put it last"]),
        (
            lambda tx: optax.chain(contrib.schedule_free_adamw(0.1), tx),
            ["schedule_free", "weights of its own", "put it inside"],
        ),
        (
            lambda tx: optax.chain(optax.MultiSteps(contrib.schedule_free_sgd(0.1), 2), tx),
            ["schedule_free", "weights of its own", "put it inside"],
        ),
        (steps_left_out, ["conditionally_transform", "some steps", "put it inside"]),
        (lambda tx: optax.chain(steps_left_out(tx)), ["conditionally_transform", "put it inside"]),
    ],
)
def test_where_pruned_weights_would_move(make, words):
    for ours in (keep_pruned(MASKS), inside(sgd())):
        state = make(ours).init(start())
        for again in (state, jax.tree.map(jnp.asarray, state)):  # in the order of the transforms
            with raises(ValueError, "get_masks", *words):
                get_masks(again, start())
            with raises(ValueError, "set_masks", *words):
                set_masks(again, MASKS)


def test_parameters_that_a_wrapper_does_not_hand_on():
    tx = inside(sgd())
    with raises(KeyError, "'w'", "optax.flatten goes inside"):
        optax.flatten(tx).init(start())
    with raises(KeyError, "'w'", "optax.masked", "put it outside"):
        optax.masked(tx, {"w": F, "v": T}).init(start())
    with raises(KeyError, "'w'", "optax.multi_transform", "put it outside"):
        optax.multi_transform({"x": tx, "y": sgd()}, {"w": "y", "v": "x"}).init(start())
    pairs = optax.LookaheadParams.init_synced(start())
    tx = keep_pruned(optax.LookaheadParams(MASKS, MASKS), optax.lookahead(sgd(), 2, 0.5))
    with raises(KeyError, "'fast.w'", "lookahead(keep_pruned(masks, optimizer)"):
        tx.update(start(), tx.init(pairs), pairs)
    adversary = optax.chain(contrib.normalize(), optax.sgd(0.05))
    tx = contrib.sam(inside(sgd()), adversary)  # states are 0 * new + 1 * old
    state = tx.init(start())
    with raises(TypeError, "int32", "contrib.sam inside", "reset_state=False"):
        for _ in range(3):
            _, state = tx.update(start(), state, start())


def test_states_of_others():
    tx, params = keep_pruned(MASKS), start()
    for wrong in (None, 5, MASKS, optax.adam(0.1).init(params)):
        with raises(TypeError, "keep_pruned: state must be", "returned"):
            tx.update(params, wrong, params)
    state = tx.init(params)
    with raises(TypeError, "state.masks must be a dict"):
        tx.update(params, state._replace(masks=None), params)
    with raises(ValueError, "state is not of these params", "'w'", "(2, 3)"):
        tx.update(params, state._replace(masks={"w": jnp.ones(5, bool)}), params)
    tx = inside(sgd())
    others = [
        (),
        None,
        optax.adam(0.1).init(params),
        sgd().init({"w": jnp.ones(2), "v": jnp.ones(3)}),
    ]
    for inner in others:
        with raises(TypeError, "state.inner", "tx.init(params)"):
            tx.update(params, tx.init(params)._replace(inner=inner), params)


def test_updates_of_other_shapes():
    for tx in (keep_pruned(MASKS), inside(sgd())):
        for shape in ((6,), (3, 2), (2, 3, 1), ()):
            with raises(ValueError, "updates", "'w'", str(shape), "(2, 3)"):
                tx.update({"w": jnp.ones(shape), "v": jnp.ones(3)}, tx.init(start()), start())
        for leaf in ("text", 1.0, jax.ShapeDtypeStruct((2, 3), "float32")):
            with raises(TypeError, "updates", "'w'", "array of numbers"):
                tx.update({"w": leaf, "v": jnp.ones(3)}, tx.init(start()), start())


def test_masks_that_are_none():
    for masks in (5, "text", jnp.ones(3), [1]):
        with raises(TypeError, "masks", "boolean"):
            keep_pruned(masks)
