"""Lottery tickets: rounds, what goes back, the controls; in both frameworks and many at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import torch

import purepruning as pp
from purepruning import NM, Layer
from purepruning.trees import flatten
from tests.fast import jit_once
from tests.messages import raises
from tests.modes import as_jax, as_numpy, as_torch

pytestmark = pytest.mark.usefixtures("unoptimized")

SHAPES = {"a": (6, 10), "b": (10, 4), "bias": (4,), "free": (3,)}
LAYERS = (
    Layer("a", "Linear", "a", (6, 10), (1,), (0,)),
    Layer("b", "Linear", "b", (10, 4), (1,), (0,), bias="bias"),
)
RULES = [{"sparsity": 0.8, "op_types": ["Linear"], "prune_iterations": 5}]
CONFIG = pp.resolve(RULES, LAYERS)

# 1 - 0.2^(i/5) = 0.2752, 0.4747, 0.6193, 0.7241, 0.8: of 60 and of 40, rounded down.
ROUNDS = {"a": [16, 28, 37, 43, 48], "b": [11, 18, 24, 28, 32]}


def numbers(seed=0):
    rng = np.random.default_rng(seed)
    return {n: rng.uniform(0.5, 2, s).astype(np.float32) for n, s in SHAPES.items()}


def train(params, seed):
    """Weights that have moved so far that others are the smallest."""
    moved = numbers(seed)
    return {name: x * moved[name] for name, x in params.items()}


def zeros(x):
    return int((np.asarray(x) == 0).sum())


FRAMEWORKS = pytest.mark.parametrize("convert", [as_jax, as_torch])


@FRAMEWORKS
def test_rounds_prune_the_same_share_of_what_is_left_and_go_back(convert):
    params = convert(numbers())
    tickets = pp.lottery(pp.level, CONFIG)
    state, before = tickets.init({"params": params}), None
    run = {"params": params}
    for i in range(5):
        trained = convert(train(as_numpy(run["params"]), 10 + i))
        state, run = tickets.step(state, {"params": trained})
        kept = {name: np.asarray(run["params"][name]) != 0 for name in SHAPES}
        for name, counts in ROUNDS.items():
            assert (~kept[name]).sum() == counts[i]
            if before is not None:
                assert (kept[name] <= before[name]).all()
            # What is left is as it was at first.
            expected = np.where(kept[name], numbers()[name], 0)
            np.testing.assert_array_equal(np.asarray(run["params"][name]), expected)
            np.testing.assert_array_equal(np.asarray(state.masks[name]), kept[name])
        np.testing.assert_array_equal(np.asarray(run["params"]["free"]), numbers()["free"])
        before = kept
    with raises(ValueError, "all 5 rounds"):
        tickets.step(state, run)


def test_masks_are_a_tree_like_the_parameters():
    params = {"net": [{"w": jnp.arange(1.0, 61).reshape(6, 10)}], "free": jnp.ones(2)}
    layer = Layer("a", "Linear", "net.0.w", (6, 10), out_axes=(1,), in_axes=(0,))
    config = pp.resolve(0.5, [layer])
    tickets = pp.lottery(pp.level, config, rounds=1)
    first = tickets.init({"params": params})
    state, _ = tickets.step(first, {"params": params})
    expected = {"net": [{"w": params["net"][0]["w"] > 30}], "free": None}
    for found in (state.masks, pp.level(params, None, config)):
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        np.testing.assert_array_equal(found["net"][0]["w"], expected["net"][0]["w"])
    assert first.masks["net"][0]["w"].all()
    assert jax.tree.structure(first) == jax.tree.structure(state)


def test_the_masks_are_the_ones_found_by_hand():
    """The smallest of what is left, round by round."""
    tickets = pp.lottery(pp.level, CONFIG, rounds=3)
    state, keep = tickets.init({"params": as_jax(numbers())}), np.ones((6, 10), bool)
    for i, share in enumerate([1 - 0.2 ** (1 / 3), 1 - 0.2 ** (2 / 3), 0.8]):
        trained = numbers(20 + i)
        state, _ = tickets.step(state, {"params": as_jax(trained)})
        size = np.where(keep, trained["a"], -1)
        order = np.argsort(size.reshape(-1), kind="stable")
        keep = np.ones(60, bool)
        keep[order[: int(60 * share + 1e-9)]] = False
        keep = keep.reshape(6, 10)
        np.testing.assert_array_equal(state.masks["a"], keep)


@FRAMEWORKS
def test_what_goes_back_is_what_was_asked_for(convert):
    params, trained = convert(numbers()), convert(numbers(1))
    start = {"params": params, "opt_state": {"mu": convert(numbers(2))}, "step": np.int32(100)}
    end = {"params": trained, "opt_state": {"mu": convert(numbers(3))}, "step": np.int32(900)}

    def go(rewind):
        tickets = pp.lottery(pp.level, CONFIG, rewind=rewind)
        state, run = tickets.step(tickets.init(start), end)
        assert state.start.keys() == set(start if rewind is None else rewind)
        kept = np.asarray(state.masks["a"])
        weights = np.asarray(run["params"]["a"])
        source = {s for s in (0, 1) if np.array_equal(weights, np.where(kept, numbers(s)["a"], 0))}
        (weights,) = source
        (moments,) = {
            s for s in (2, 3) if np.array_equal(run["opt_state"]["mu"]["a"], numbers(s)["a"])
        }
        return weights, moments, int(run["step"])

    assert go(None) == (0, 2, 100)  # weight rewinding
    assert go(["params"]) == (0, 3, 900)
    assert go(["opt_state", "step"]) == (1, 2, 100)  # learning-rate rewinding
    assert go(["step"]) == (1, 3, 100)
    assert go([]) == (1, 3, 900)  # fine-tuning


@pytest.mark.parametrize("rewind", [None, [], ["params"]])
def test_masks_in_the_run_are_those_of_the_round(rewind):
    params = as_jax(numbers())
    tx = optax.MultiSteps(optax.chain(optax.adam(0.1), pp.keep_pruned(pp.expand({}, params))), 1)
    tickets = pp.lottery(pp.level, CONFIG, rounds=2, rewind=rewind)
    run = {"params": params, "opt_state": tx.init(params)}
    state = tickets.init(run)
    for _ in range(2):
        state, run = tickets.step(state, run)
        found = pp.get_masks(run["opt_state"], params)
        for path, mask in flatten(state.masks).leaves.items():
            np.testing.assert_array_equal(found[path], mask)
    few = pp.keep_pruned({"a": jnp.ones((6, 10), bool)}).init(params)
    other = {"params": params, "opt_state": few}
    with raises(KeyError, "no mask for 'b'"):
        tickets.step(tickets.init(other), other)


def loss(params, x):
    return jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"] + params["bias"][None] - 1) ** 2)


def imp(key, rewind_at=0, rounds=3, steps=6, tickets=None):
    """A whole lottery in scans: rounds of training, from iteration k on."""
    tickets = tickets or pp.lottery(pp.level, CONFIG, rounds=rounds)
    keys = dict(zip(SHAPES, jax.random.split(key, len(SHAPES)), strict=True))
    params = {n: jax.random.normal(keys[n], s) for n, s in SHAPES.items()}
    data = jax.random.normal(key, (rewind_at + steps, 8, 6))
    rate = optax.linear_schedule(0.2, 0.0, rewind_at + steps)
    tx = optax.chain(optax.sgd(rate, momentum=0.9), pp.keep_pruned(pp.expand({}, params)))

    def fit(run, x):
        def step(run, x):
            grads = jax.grad(loss)(run["params"], x)
            updates, opt_state = tx.update(grads, run["opt_state"], run["params"])
            params = optax.apply_updates(run["params"], updates)
            return {"params": params, "opt_state": opt_state}, loss(params, x)

        return jax.lax.scan(step, run, x)

    run = {"params": params, "opt_state": tx.init(params)}
    if rewind_at:
        run, _ = fit(run, data[:rewind_at])

    def a_round(carry, _):
        state, run = carry
        run, losses = fit(run, data[rewind_at:])
        state, run = tickets.step(state, run)
        return (state, run), (losses, state.masks)

    (state, run), history = jax.lax.scan(a_round, (tickets.init(run), run), length=rounds)
    return state, fit(run, data[rewind_at:])[0], history


def test_many_tickets_are_one_call():
    keys = jax.random.split(jax.random.key(0), 3)
    many = jit_once(jax.vmap(imp))(keys)
    alone = jit_once(imp)(keys[1])
    for name in ("a", "b"):
        np.testing.assert_array_equal(many[0].masks[name][1], alone[0].masks[name])
        assert (np.asarray(many[1]["params"][name])[~np.asarray(many[0].masks[name])] == 0).all()
        masks = np.asarray(many[2][1][name])
        assert masks.shape[:2] == (3, 3)
        assert (masks[:, 1:] <= masks[:, :-1]).all()
        sizes = (~masks).reshape(3, 3, -1).sum(-1)
        shares = [1 - 0.2 ** (1 / 3), 1 - 0.2 ** (2 / 3), 0.8]
        assert sizes.tolist() == [[int(masks[0, 0].size * s + 1e-9) for s in shares]] * 3
    assert not np.array_equal(many[0].masks["a"][0], many[0].masks["a"][1])


def test_rewinding_to_an_iteration_takes_the_learning_rate_along():
    state, run, _ = jit_once(functools.partial(imp, rewind_at=4, steps=6))(jax.random.key(1))
    # Training begins at step 4 in every round, and ends at step 10.
    assert int(optax.tree_utils.tree_get(state.start["opt_state"], "count")) == 4
    assert int(optax.tree_utils.tree_get(run["opt_state"], "count")) == 10
    went_on = functools.partial(imp, tickets=pp.lottery(pp.level, CONFIG, rounds=3, rewind=[]))
    _, run, _ = jit_once(went_on)(jax.random.key(1))
    assert int(optax.tree_utils.tree_get(run["opt_state"], "count")) == 24


def test_torch_state_dicts_are_parts():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, 1))
    layer = Layer("0", "Linear", "0.weight", (10, 6), (0,), (1,), bias="0.bias")
    config = pp.resolve([{"sparsity": 0.75, "op_types": ["Linear"]}], [layer])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    tickets = pp.lottery(pp.level, config, rounds=2)
    x = torch.randn(8, 6)

    def parts():
        return {
            "params": dict(model.named_parameters()),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
        }

    def fit():
        for _ in range(3):
            optimizer.zero_grad()
            ((model(x) - 1) ** 2).mean().backward()
            optimizer.step()
            scheduler.step()

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = tickets.init(parts())
    for i, count in enumerate((30, 45)):
        fit()
        assert scheduler.last_epoch == 3
        state, run = tickets.step(state, parts())
        model.load_state_dict(run["params"])
        optimizer.load_state_dict(run["optimizer"])
        scheduler.load_state_dict(run["scheduler"])
        assert scheduler.last_epoch == 0
        assert optimizer.param_groups[0]["lr"] == 0.1
        assert not optimizer.state
        assert zeros(model[0].weight.detach()) == count
        kept = state.masks["0.weight"]
        assert torch.equal(model[0].weight.detach(), torch.where(kept, before["0.weight"], 0)), i
        assert torch.equal(model[2].weight.detach(), before["2.weight"])


def test_a_donated_run_takes_nothing_along():
    tickets = pp.lottery(pp.level, CONFIG)
    run = {"params": as_jax(numbers()), "key": jax.random.key(3)}
    state = tickets.init(run)
    spoil = jax.jit(lambda run: run, donate_argnums=0)
    state, run = tickets.step(state, spoil(run))
    spoil(run)
    _, run = tickets.step(state, {"params": as_jax(numbers(1)), "key": jax.random.key(4)})
    assert run["key"] == jax.random.key(3)
    assert zeros(run["params"]["a"]) == ROUNDS["a"][1]


def test_states_go_through_orbax(tmp_path):
    tickets = pp.lottery(pp.level, CONFIG)
    run = {"params": as_jax(numbers()), "key": jax.random.key(3)}
    state, run = tickets.step(tickets.init(run), run)
    assert all(hasattr(x, "dtype") for x in jax.tree.leaves(state))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        fresh = tickets.init({"params": as_jax(numbers(5)), "key": jax.random.key(0)})
        restored = checkpointer.restore(tmp_path / "state", fresh)
    pp.check_resumed(restored, fresh)
    trained = {"params": as_jax(numbers(6)), "key": jax.random.key(9)}
    a, b = tickets.step(state, trained), tickets.step(restored, trained)
    jax.tree.map(np.testing.assert_array_equal, a[0].masks, b[0].masks)
    assert a[1]["key"] == b[1]["key"] == jax.random.key(3)


# The controls. Inverted scores are a law of every pruner (test_laws.py).


def unit_counts(masks):
    return {name: zeros(np.broadcast_to(masks[name], SHAPES[name])) for name in ("a", "b")}


@pytest.mark.parametrize("granularity", ["element", "output_channel"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_shuffled_masks_prune_as_much_of_every_layer(granularity, scope):
    config = pp.resolve(
        [{"sparsity": 0.5, "op_types": ["Linear"]}], LAYERS, scope=scope, granularity=granularity
    )
    pruner = pp.level if granularity == "element" else pp.l1_norm
    results = {}
    for convert in (as_jax, as_torch):
        masks = pruner(convert(numbers()), None, config)
        shuffled = pp.shuffle_masks(masks, config, 3)
        other = pp.shuffle_masks(masks, config, 4)
        assert unit_counts(shuffled) == unit_counts(masks)
        for name in ("a", "b"):
            assert tuple(shuffled[name].shape) == tuple(masks[name].shape)
        assert any((np.asarray(other[n]) != np.asarray(shuffled[n])).any() for n in "ab")
        whole = np.broadcast_to(np.asarray(shuffled["b"]), (10, 4))
        np.testing.assert_array_equal(np.asarray(shuffled["bias"]), whole.any(0))
        results[convert] = as_numpy(shuffled)
    one, two = results.values()
    jax.tree.map(np.testing.assert_array_equal, {n: one[n] for n in two}, two)
    jitted = jax.jit(lambda m, k: pp.shuffle_masks(m, config, k))(
        pruner(as_jax(numbers()), None, config), jax.random.key(3)
    )
    jax.tree.map(np.testing.assert_array_equal, as_numpy(jitted), one)


def test_random_masks_have_the_same_layer_densities():
    masks = pp.random_pruning(as_jax(numbers()), 1, CONFIG)
    assert unit_counts(masks) == unit_counts(pp.level(as_jax(numbers()), None, CONFIG))


def test_shuffled_masks_are_uniform():
    masks = {"a": np.arange(60).reshape(6, 10) >= 15, "b": np.ones((10, 4), bool)}
    keys = jax.random.split(jax.random.key(0), 2000)
    many = jax.jit(jax.vmap(lambda k: pp.shuffle_masks(as_jax(masks), CONFIG, k)["a"]))(keys)
    # A quarter is pruned everywhere: within five standard deviations.
    np.testing.assert_allclose(many.mean(0), 0.75, atol=5 * np.sqrt(0.75 * 0.25 / 2000))


def test_stacked_layers_are_shuffled_each():
    layer = Layer("s", "Linear", "s", (3, 20), (1,), (), stack_axes=(0,))
    config = pp.resolve([{"sparsity": 0.5, "op_types": ["Linear"]}], [layer])
    masks = {"s": jnp.asarray(np.arange(20)[None] >= np.array([[3], [9], [15]]))}
    shuffled = np.asarray(pp.shuffle_masks(masks, config, 0)["s"])
    assert (~shuffled).sum(1).tolist() == [3, 9, 15]
    assert not np.array_equal(shuffled, masks["s"])


def test_reinitialised_weights_are_the_same_values_elsewhere():
    results = []
    for convert in (as_jax, as_torch):
        params = convert(numbers())
        new = pp.reinitialize(params, 7)
        for name, x in numbers().items():
            y = np.asarray(new[name])
            assert (np.sort(y.reshape(-1)) == np.sort(x.reshape(-1))).all()
            if x.size > 10:
                assert (y != x).mean() > 0.8
        results.append(as_numpy(new))
    jax.tree.map(np.testing.assert_array_equal, *results)
    nested = {"net": [{"w": jnp.arange(6.0)}, jnp.arange(6.0)], "n": None}
    new = pp.reinitialize(nested, jax.random.key(1))
    assert jax.tree.structure(new) == jax.tree.structure(nested)
    assert not np.array_equal(new["net"][0]["w"], new["net"][1])


# Mistakes.


def test_mistakes_raise():
    run = {"params": as_jax(numbers())}
    with raises(TypeError, "config", "list"):
        pp.lottery(pp.level, RULES)
    with raises(ValueError, "rounds=...", "'prune_iterations'"):
        pp.lottery(pp.level, pp.resolve([{"sparsity": 0.5, "op_types": ["Linear"]}], LAYERS))
    with raises(ValueError, "rounds", "at least 1", "0"):
        pp.lottery(pp.level, CONFIG, rounds=0)
    with raises(TypeError, "rounds", "2.0"):
        pp.lottery(pp.level, CONFIG, rounds=2.0)
    with raises(TypeError, "rewind", "list of names", "'params'"):
        pp.lottery(pp.level, CONFIG, rewind="params")
    with raises(ValueError, "NM(keep=1, of=2)"):
        pp.lottery(
            pp.level, pp.resolve([{"op_names": ["a"]}], LAYERS, granularity=NM(1, 2)), rounds=2
        )
    with raises(KeyError, "no part 'opt_state'", "'params'"):
        pp.lottery(pp.level, CONFIG, rewind=["opt_state"]).init(run)
    with raises(KeyError, "no part 'params'", "'param'"):
        pp.lottery(pp.level, CONFIG).init({"param": run["params"]})
    with raises(KeyError, "params have no 'b'"):
        pp.lottery(pp.level, CONFIG).init({"params": {"a": run["params"]["a"], "bias": None}})
    tickets = pp.lottery(pp.level, CONFIG)
    state = tickets.init(run | {"step": jnp.array(0)})
    with raises(KeyError, "no part 'step'"):
        tickets.step(state, run)
    with raises(KeyError, "'b'"):
        pp.shuffle_masks({"a": jnp.ones((6, 10), bool)}, CONFIG, 0)
    with raises(ValueError, "'a'", "(7,)", "(6, 10)"):
        pp.shuffle_masks({"a": jnp.ones(7, bool)}, CONFIG, 0)
    with raises(TypeError, "random key", "None"):
        pp.reinitialize(run["params"], None)
