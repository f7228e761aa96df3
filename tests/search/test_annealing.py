"""Simulated annealing over layer sparsities: proposals, acceptance, chains."""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch

import purepruning as pp
from purepruning import NM, Block, Layer
from tests.fast import jit_once
from tests.messages import raises

pytestmark = pytest.mark.usefixtures("unoptimized")


def full(*values):
    """Values of a parameter that run with ``--full`` only."""
    return [pytest.param(value, marks=pytest.mark.full) for value in values]


def config_of(sparsity, sizes, *, granularity="element", rules=None, **rule):
    """Layers of ``sizes[i]`` x 4 weights, in an order that is not that of their sizes."""
    table = [Layer(f"l{i}", "Linear", f"l{i}", (n, 4), (0,), (1,)) for i, n in enumerate(sizes)]
    rules = rules or [{"sparsity": sparsity, "op_types": ["Linear"]} | rule]
    return pp.resolve(rules, table, granularity=granularity)


def values(counts):
    return np.asarray([int(counts[name]) for name in sorted(counts, key=lambda n: int(n[1:]))])


SIZES = (30, 7, 100, 30, 2)


@functools.cache
def search_of(sparsity, sizes=SIZES, granularity="element", **options):
    """A search, which is compiled once."""
    return pp.search.annealing(config_of(sparsity, sizes, granularity=granularity), **options)


@functools.cache
def chains(sparsity, sizes=SIZES, granularity="element", n=64, steps=3):
    """Counts that many chains propose, in a few steps each: (chains, steps, layers)."""
    search = search_of(sparsity, sizes, granularity)

    def chain(key):
        state = search.init(key)

        def step(state, _):
            state, counts = search.propose(state)
            return search.accept(state, counts["l0"]), counts

        return jax.lax.scan(step, state, length=steps)[1]

    counts = jit_once(jax.vmap(chain))(jax.random.split(jax.random.key(1), n))
    return np.stack([counts[f"l{i}"] for i in range(len(sizes))], axis=-1)


@pytest.mark.parametrize("sparsity", [0.3, 0.8, *full(0.0, 0.01, 0.98)])
def test_proposals_meet_the_total_exactly(sparsity):
    counts = chains(sparsity)
    assert counts.dtype == np.int32
    assert (counts.sum(-1) == pp.count_of(sparsity, 4 * sum(SIZES))).all()
    assert (counts >= 0).all()
    # No layer is emptied.
    assert (counts < 4 * np.asarray(SIZES)).all()
    if 0.2 < sparsity < 0.9:
        assert len(np.unique(counts[:, 0], axis=0)) > 32


@pytest.mark.parametrize("sparsity", [0.3, 0.8])
def test_larger_layers_get_the_higher_sparsity(sparsity):
    shares = chains(sparsity) / (4 * np.asarray(SIZES))
    order = np.argsort(SIZES, kind="stable")
    weights = 4 * np.asarray(SIZES)[order]
    # Whole units aside: half a unit of either layer, and what another's rounding left.
    slack = 1.5 / weights[:-1] + 1.5 / weights[1:]
    assert (np.diff(shares[..., order]) >= -slack).all()
    assert (np.diff(shares[..., order]).max((0, 1)) > 0.01)[[0, 1, 3]].all()


@pytest.mark.parametrize("sparsity", [0.5, *full(0.1, 0.9)])
def test_channels_fill_the_total_as_far_as_they_fit(sparsity):
    table = [
        Layer("l0", "Linear", "l0", (30, 4), (0,), (1,)),
        Layer("l1", "Linear", "l1", (9, 7), (0,), (1,)),
    ]
    config = pp.resolve(
        [{"sparsity": sparsity, "op_types": ["Linear"]}], table, granularity="output_channel"
    )
    search, total = pp.search.annealing(config), pp.count_of(sparsity, 120 + 63)
    for seed in range(5):
        _, counts = search.propose(search.init(jax.random.key(seed)))
        a, b = values(counts)
        assert 0 <= total - (4 * a + 7 * b) < 4 or a == 29
        assert 0 <= a <= 29
        assert 0 <= b <= 8


@pytest.mark.parametrize("sparsity", [0.9, *full(0.35)])
def test_layers_of_millions_meet_the_total_exactly(sparsity):
    sizes = (25_000_000, 3, 1_000_003, 25_000_001, 500, 7_654_321)
    counts = chains(sparsity, sizes, n=4).astype(np.int64)
    assert (counts.sum(-1) == pp.count_of(sparsity, 4 * sum(sizes))).all()
    assert (counts < 4 * np.asarray(sizes)).all()
    assert (counts >= 0).all()


@hypothesis.given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=4),
    percent=st.integers(0, 100),
    seed=st.integers(0, 2**31),
)
@hypothesis.settings(max_examples=3)
def test_any_total_that_the_layers_allow_is_met(sizes, percent, seed):
    """NNI draws until every layer keeps something, for ever where little is to be kept."""
    weights = 4 * sum(sizes)
    possible = weights - len(sizes)
    config = config_of(possible * percent // 100 / weights, sizes)
    search = pp.search.annealing(config)
    counts = values(search.propose(search.init(jax.random.key(seed)))[1])
    assert counts.sum() == possible * percent // 100
    assert (counts < 4 * np.asarray(sizes)).all()


def test_rules_have_totals_of_their_own():
    rules = [
        {"sparsity": 0.9, "op_names": ["l0", "l3"]},
        {"sparsity": 0.2, "op_names": ["l1", "l2", "l4"]},
    ]
    search = pp.search.annealing(config_of(None, SIZES, rules=rules))
    state = search.init(jax.random.key(0))
    for _ in range(4):
        state, counts = search.propose(state)
        counts = values(counts)
        assert counts[[0, 3]].sum() == 216  # 0.9 of 240
        assert counts[[1, 2, 4]].sum() == 87  # 0.2 of 436
        state = search.accept(state, 0.0)


# Acceptance.


def walk(search, key, scores):
    state, states = search.init(key), []
    for score in scores:
        state, _ = search.propose(state)
        state = search.accept(state, score)
        states.append(state)
    return states


def test_the_temperature_falls_after_every_acceptance_but_the_first():
    """NNI 2.10 evaluates 17 points where all are accepted: 100 * 0.9^15 is 20.6, then 18.5."""
    search = search_of(0.5)
    states = walk(search, jax.random.key(0), range(20))
    assert [int(s.coolings) for s in states] == [*range(17), 16, 16, 16]
    assert [bool(search.done(s)) for s in states] == [False] * 16 + [True] * 4
    heat = [float(s.temperature) for s in states[:16]]
    np.testing.assert_allclose(heat, 100 * 0.9 ** np.arange(16), rtol=1e-6)
    assert int(states[-1].common.evaluated) == 17
    # What is done stays as it is.
    for a, b in itertools.pairwise(states[16:]):
        np.testing.assert_array_equal(a.counts, b.counts)
        assert a.common.key == b.common.key
    assert states[-1].common.best_score == 16


@pytest.mark.parametrize("mode", ["maximize", "minimize"])
def test_what_is_better_is_accepted_and_the_best_is_kept(mode):
    sign = 1 if mode == "maximize" else -1
    search = search_of(0.5, optimize_mode=mode, scale=1e-6)
    states = walk(search, jax.random.key(0), [sign * x for x in (1.0, 3.0, 2.0)])
    # Three million times worse than what is usual is not accepted, and nothing cools.
    assert [float(s.score) for s in states] == [1, 3, 3]
    assert [int(s.common.taken) for s in states] == [0, 0, -1]
    assert [int(s.coolings) for s in states] == [0, 1, 1]
    two, three = states[1:]
    np.testing.assert_array_equal(three.sparsity, two.sparsity)
    assert float(three.common.best_score) == 3
    np.testing.assert_array_equal(list(search.best(three).values()), two.counts)
    assert (three.proposed != three.sparsity).any()


@functools.cache
def accepted(scale=None, n=4000):
    """A function from scores to which of many chains accept each of them."""
    search = pp.search.annealing(config_of(0.5, (8, 8)), scale=scale)

    def chain(key, scores):
        def step(state, score):
            state, _ = search.propose(state)
            new = search.accept(state, score)
            return new, new.coolings > state.coolings

        return jax.lax.scan(step, search.init(key), scores)[1]

    keys = jax.random.split(jax.random.key(2), n)
    return jit_once(lambda scores: jax.vmap(chain, in_axes=(0, None))(keys, scores))


def acceptance(scores, scale=None):
    """The share of chains that accept the last of some scores, of which there may be three."""
    padded = jnp.asarray([*scores, *[np.nan] * (3 - len(scores))], jnp.float32)
    return float(accepted(scale)(padded)[:, len(scores) - 1].mean())


@pytest.mark.parametrize("size", [1e-6, *full(1.0, 1e9)])
def test_what_is_usual_is_accepted_with_one_part_in_e_whatever_the_scale(size):
    assert acceptance([0.0, -size]) == pytest.approx(np.exp(-1), abs=0.03)
    # Better by 3, then worse by 1: the mean change is 2, the temperature 0.9.
    expected = np.exp(-1 / (2 * 0.9))
    assert acceptance([0.0, 3 * size, 2 * size]) == pytest.approx(expected, abs=0.03)


def test_the_scale_of_nni_accepts_nearly_everything():
    assert acceptance([0.9, 0.2], scale=100) == pytest.approx(np.exp(-0.7 / 100), abs=0.01)
    assert acceptance([0.0, -50.0], scale=100) == pytest.approx(np.exp(-0.5), abs=0.03)


def test_equal_scores_are_accepted_and_nan_is_not():
    assert acceptance([1.0, 1.0]) == 1
    assert acceptance([1.0, np.nan]) == 0
    assert acceptance([np.nan, 1.0]) == 1
    search = search_of(0.5)
    states = walk(search, jax.random.key(0), [np.nan, 1.0, np.nan])
    assert [float(s.common.best_score) for s in states[1:]] == [1, 1]
    assert float(states[-1].score) == 1


# Chains.


def test_it_finds_a_better_division_than_the_first():
    ideal = jnp.array([10.0, 2.0, 300.0, 26.0, 0.0])
    search = search_of(0.5)

    def chain(key):
        def step(state, _):
            state, counts = search.propose(state)
            x = jnp.stack([counts[f"l{i}"] for i in range(5)]).astype(jnp.float32)
            return search.accept(state, -jnp.sum((x - ideal) ** 2)), state.common.best_score

        return jax.lax.scan(step, search.init(key), length=60)

    states, best = jit_once(jax.vmap(chain))(jax.random.split(jax.random.key(0), 32))
    assert states.common.key.shape == (32,)
    assert (np.diff(np.asarray(best)[:, 1:]) >= 0).all()
    assert float(jnp.median(-best[:, -1])) < 0.5 * float(jnp.median(-best[:, 1]))
    # A row of many chains is the chain alone.
    alone, _ = jit_once(chain)(jax.random.split(jax.random.key(0), 32)[5])
    row = jax.tree.map(lambda x: x[5], states)
    assert alone.common.key == row.common.key
    jax.tree.map(np.testing.assert_array_equal, alone[1:] + alone[0][1:], row[1:] + row[0][1:])


def test_counts_go_into_a_config_in_both_frameworks():
    config, search = config_of(0.5, SIZES), search_of(0.5)
    _, counts = search.propose(search.init(jax.random.key(3)))
    rng = np.random.default_rng(0)
    params = {f"l{i}": rng.normal(size=(n, 4)).astype(np.float32) for i, n in enumerate(SIZES)}
    for convert in (jnp.asarray, torch.asarray):
        given = {name: convert(x) for name, x in params.items()}
        masks = pp.level(given, None, config.with_counts(counts))
        assert sum(int((~mask).sum()) for mask in masks.values()) == 338  # 0.5 of 676


def test_states_are_arrays_and_go_through_orbax(tmp_path):
    search = search_of(0.5)
    state = walk(search, jax.random.key(4), [1.0, 0.5])[-1]
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", search.init(jax.random.key(0)))
    (a, x), (b, y) = (search.propose(s) for s in (state, restored))
    assert a.common.key == b.common.key
    assert x == y


# Mistakes.


def test_mistakes_raise():
    config = config_of(0.5, SIZES)
    for options, error, parts in (
        ({"optimize_mode": "max"}, ValueError, ("optimize_mode", "'maximize'", "'max'")),
        ({"start_temperature": 0}, ValueError, ("start_temperature", "(0, inf)", "0")),
        ({"stop_temperature": "20"}, TypeError, ("stop_temperature", "'20'")),
        ({"stop_temperature": 120}, ValueError, ("stop_temperature", "120", "100")),
        ({"cool_down_rate": 1}, ValueError, ("cool_down_rate", "1")),
        ({"perturbation_magnitude": -1}, ValueError, ("perturbation_magnitude", "-1")),
        ({"scale": 0}, ValueError, ("scale", "0")),
    ):
        with raises(error, *parts):
            pp.search.annealing(config, **options)
    with raises(TypeError, "config", "list"):
        pp.search.annealing([{"sparsity": 0.5}])
    with raises(ValueError, "scope='layer'", "'global'"):
        table = [Layer("l0", "Linear", "l0", (4, 4), (0,), (1,))]
        pp.search.annealing(
            pp.resolve([{"sparsity": 0.5, "op_types": ["Linear"]}], table, scope="global")
        )
    with raises(ValueError, "NM(keep=2, of=4)"):
        pp.search.annealing(config_of(0.5, SIZES, granularity=NM(2, 4)))
    with raises(ValueError, "rule 0", "edge"):
        pp.search.annealing(config_of(0.5, SIZES, granularity=Block((4, 1))))
    with raises(ValueError, "rule 0", "no sparsity"):
        pp.search.annealing(config_of(None, SIZES, rules=[{"op_types": ["Linear"]}]))
    with raises(ValueError, "rule 0", "675", "671"):
        pp.search.annealing(config_of(0.9999, SIZES))
    search = pp.search.annealing(config)
    for key in (0, jax.random.PRNGKey(0), None):
        with raises(TypeError, "jax.random.key(seed)"):
            search.init(key)
    with raises(TypeError, "(3,)", "vmap"):
        search.init(jax.random.split(jax.random.key(0), 3))
    with raises(ValueError, "one number", "(2,)"):
        search.accept(search.init(jax.random.key(0)), jnp.ones(2))
