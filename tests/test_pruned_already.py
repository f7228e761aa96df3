"""What is pruned already stays pruned, wherever masks meet counts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import purepruning as pp
from purepruning import Layer
from tests.messages import raises

WEIGHTS = np.arange(1, 9, dtype=np.float32).reshape(1, 8)
FC = Layer("fc", "Linear", "w", (1, 8), out_axes=(1,), in_axes=(0,))
RULES = [{"sparsity": 0.75, "op_types": ["Linear"]}]
CONFIG = pp.resolve(RULES, [FC])
#: The four largest weights, of all that would go last.
MASK = np.array([[1, 1, 1, 1, 0, 0, 0, 0]], bool)


def bits(mask):
    return np.asarray(mask).astype(int).tolist()


def scheduled(config, schedule, steps=1, params=None, **settings):
    params = {"w": jnp.asarray(WEIGHTS)} if params is None else params
    tx = pp.prune_on_schedule(pp.level, schedule, config, **settings)
    state = tx.init(params)
    for _ in range(steps):
        _, state = tx.update(optax.tree.zeros_like(params), state, params)
    return pp.get_masks(state, params)


def test_a_schedule_does_not_revive_what_it_was_told_is_pruned():
    # The first counts of the schedule are 0, 1.
    masks = {"w": jnp.asarray(MASK)}
    for steps in (1, 2):
        assert bits(scheduled(CONFIG, pp.linear(end_step=6), steps, masks=masks)["w"]) == bits(MASK)
    # At the end six are gone, four of them from the start.
    end = scheduled(CONFIG, pp.linear(end_step=6), 7, masks=masks)
    assert bits(end["w"]) == [[0, 0, 1, 1, 0, 0, 0, 0]]


@pytest.mark.parametrize("given", ["config", "both"])
def test_schedules_and_tickets_begin_with_the_masks_of_the_config(given):
    config = CONFIG.with_counts({"fc": 4}).with_masks({"w": jnp.asarray(MASK)})
    more = {"w": jnp.asarray(np.array([[0, 1, 1, 1, 1, 1, 1, 1]], bool))}
    settings = {"masks": more} if given == "both" else {}
    expected = [[0, 1, 1, 1, 0, 0, 0, 0]] if given == "both" else bits(MASK)
    assert bits(scheduled(config, pp.one_shot(), **settings)["w"]) == expected
    tickets = pp.lottery(pp.level, CONFIG.with_masks({"w": jnp.asarray(MASK)}), rounds=1)
    run = {"params": {"w": jnp.asarray(WEIGHTS)}}
    state, _ = tickets.step(tickets.init(run), run)
    assert bits(state.masks["w"]) == [[0, 0, 1, 1, 0, 0, 0, 0]]


def test_single_weights_stay_pruned_under_a_channel_pruner():
    layer = Layer("fc", "Linear", "w", (2, 4), out_axes=(1,), in_axes=(0,), bias="b")
    rules = [{"sparsity": 0.5, "op_types": ["Linear"]}]
    config = pp.resolve(rules, [layer], granularity="output_channel")
    params = {"w": jnp.asarray(WEIGHTS.reshape(2, 4)), "b": jnp.ones(4)}
    masks = {"w": jnp.array([[1, 0, 1, 0], [1, 1, 1, 1]], bool), "b": jnp.array([1, 1, 1, 0], bool)}
    tx = pp.prune_on_schedule(pp.l1_norm, pp.one_shot(), config, masks=masks)
    _, state = tx.update(optax.tree.zeros_like(params), tx.init(params), params)
    got = pp.get_masks(state, params)
    assert bits(got["w"]) == [[0, 0, 1, 0], [0, 0, 1, 1]]
    assert bits(got["b"]) == [0, 0, 1, 0]


def test_a_shared_bias_follows_the_last_of_its_layers():
    layers = [
        Layer(name, "Linear", name, (1, 2), out_axes=(1,), in_axes=(0,), bias="b") for name in "ac"
    ]
    config = pp.resolve(
        [
            {"op_names": ["a"], "sparsity": 0.5, "start_epoch": 1, "end_epoch": 2, "frequency": 1},
            {"op_names": ["c"], "sparsity": 0.5, "start_epoch": 0, "end_epoch": 1, "frequency": 1},
        ],
        layers,
        granularity="output_channel",
    )
    params = {name: jnp.array([[1.0, 2.0]]) for name in "ac"} | {"b": jnp.ones(2)}
    tx = pp.prune_on_schedule(pp.l1_norm, pp.agp(), config)
    state = tx.init(params)
    for expected in ([1, 1], [0, 1]):
        _, state = tx.update(optax.tree.zeros_like(params), state, params)
        assert bits(pp.get_masks(state, params)["b"]) == expected


def test_shuffled_masks_keep_the_bias_of_every_channel_that_lives():
    layers = [
        Layer(name, "Linear", name, (1, 4), out_axes=(1,), in_axes=(0,), bias="b") for name in "ac"
    ]
    rules = [{"sparsity": 0.5, "op_types": ["Linear"]}]
    config = pp.resolve(rules, layers, granularity="output_channel")
    params = {name: jnp.array([[1.0, 2.0, 3.0, 4.0]]) for name in "ac"} | {"b": jnp.ones(4)}
    masks = pp.l1_norm(params, None, config)
    for key in range(5):
        new = pp.shuffle_masks(masks, config, key)
        assert bits(new["b"]) == bits((new["a"] | new["c"])[0])


def test_scores_of_minus_infinity_rank_above_what_is_pruned():
    config = CONFIG.with_counts({"fc": 1})
    mask = np.array([[1, 1, 1, 1, 1, 1, 1, 0]], bool)
    scores = np.array([[-np.inf, 1, 2, 3, 4, 5, 6, 7]], np.float32)
    for array in (jnp.asarray, torch.from_numpy):
        now = config.with_masks({"w": array(mask)})
        got = pp.movement.masks({"w": array(WEIGHTS)}, {"fc": array(scores)}, now)
        assert bits(got["w"]) == bits(mask)


def test_a_threshold_prunes_on_and_knows_no_inversion():
    params, mask = {"w": jnp.asarray(WEIGHTS)}, {"w": jnp.asarray(MASK)}
    scores = {"fc": jnp.arange(8.0).reshape(1, 8) - 3.5}
    got = pp.movement.masks(params, scores, CONFIG.with_masks(mask), threshold=0.5)
    # The threshold would keep the other half; the best that is left is kept in its stead.
    assert bits(got["w"]) == [[0, 0, 0, 1, 0, 0, 0, 0]]
    soft = pp.invert_scores(functools.partial(pp.movement.masks, threshold=0.5))
    with raises(ValueError, "threshold", "inverted"):
        soft(params, scores, CONFIG)


def test_the_search_is_for_the_counts_of_the_config():
    for config in (
        CONFIG.with_sparsity(0.25),
        pp.resolve([{"op_types": ["Linear"]}], [FC]).with_sparsity(0.25),
    ):
        search = pp.search.annealing(config)
        _, counts = search.propose(search.init(jax.random.key(0)))[:2]
        assert int(counts["fc"]) == 2
    with raises(ValueError, "rule 0", "no sparsity"):
        pp.search.annealing(pp.resolve([{"op_types": ["Linear"]}], [FC]))


@pytest.mark.parametrize("stack_axis", [0, 1, 2])
def test_random_masks_of_a_stack_do_not_depend_on_the_other_layers(stack_axis):
    shape, rest = (6, 3, 5), [a for a in range(3) if a != stack_axis]
    params = {"s": jnp.ones(shape), "big": jnp.ones((300, 300))}
    stack = pp.make_layer(
        params, "s", "Linear", out_axes=rest[1], in_axes=rest[0], stack_axes=stack_axis
    )
    big = pp.make_layer(params, "big", "Linear", out_axes=1, in_axes=0)
    rules = [{"sparsity": 0.5, "op_types": ["Linear"]}]
    alone = pp.random_pruning(params, 7, pp.resolve(rules, [stack]))["s"]
    both = pp.random_pruning(params, 7, pp.resolve(rules, [stack, big]))["s"]
    np.testing.assert_array_equal(alone, both)


def test_a_state_of_inverted_or_masked_rules_is_another_one(tmp_path):
    path, state = tmp_path / "state.safetensors", {"w": jnp.ones(3)}
    pp.save_state(path, state, config=CONFIG)
    pp.load_state(path, state, config=CONFIG)
    masked = CONFIG.with_masks({"w": jnp.asarray(MASK)})
    for other in (dataclasses.replace(CONFIG, inverted=True), masked):
        with raises(ValueError, "changed"):
            pp.load_state(path, state, config=other)


def test_what_is_no_array_is_not_reinitialized():
    new = pp.reinitialize({"w": jnp.arange(4.0), "n": 3, "f": jax.nn.relu}, 1)
    assert (new["n"], new["f"]) == (3, jax.nn.relu)
    assert sorted(new["w"].tolist()) == [0, 1, 2, 3]
