"""AMC: the environment of NNI, the agent, and searches that stay within their budgets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import purepruning as pp
from purepruning.search import ddpg
from purepruning.search.amc import layer_features, refit
from purepruning.search.amc_chain import Chain, chain_episode
from tests.fast import jit_once
from tests.messages import raises
from tests.search import nets

# conv1 3 to 16 of 3 x 3 on 8 x 8, depthwise, 1 x 1 to 32, depthwise of stride 2, 1 x 1 to 64, fc.
COLUMNS = ("index", "type", "in", "out", "stride", "kernel", "weights")
ROWS = [
    (0, 0, 3, 16, 1, 3, 432),
    (1, 0, 16, 32, 1, 1, 512),
    (2, 0, 32, 64, 1, 1, 2048),
    (3, 1, 64, 10, 0, 1, 640),
]
STATES = [
    [0, 0, 0, 0.111111, 1, 1, 0, 0, 0.893962, 1],
    [0.333333, 0, 0.213115, 0.407407, 1, 0, 0.049505, 0.897399, 0.438816, 1],
    [0.666667, 0, 0.47541, 1, 1, 0, 1, 0.776411, 0.134444, 0.5],
    [1, 1, 1, 0, 0, 0, 0.128713, 0.699653, 0.128407, 0.5],
]
TRACES = [  # ratio, round, actions, after the bound, realised, multiply-adds
    (0.5, 8, (1, 0.5, 0.5, 0.5), (1, 0.5, 0.5, 0.5), (1, 0.5, 0.5, 0.5), 37445),
    (0.5, 8, (1, 0.9, 0.9, 0.9), (1, 0.9, 0.383227, 0.2), (1, 1, 0.5, 0.25), 59810.5),
    (0.6, 4, (1, 0.7, 0.7, 0.7), (1, 0.7, 0.7, 0.596956), (1, 0.75, 0.75, 0.625), 65302.25),
    (0.4, 2, (0.3, 0.05, 0.3, 0.9), (1, 0.2, 0.3, 0.9), (1, 0.25, 0.3125, 0.90625), 23085.0625),
]
TOTAL = 107658


def chain():
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in ROWS]
    rows[3]["weights"] = 650 - 10
    features = layer_features(rows, COLUMNS)
    weights = [432, 512, 2048, 650, 144, 288]
    return Chain([3, 16, 32, 64], [27648, 32768, 32768, 650], [0, 9216, 4608, 0], weights, features)


@pytest.mark.parametrize(("ratio", "round_to", "actions", "bounded", "realised", "macs"), TRACES)
def test_the_traces_of_nni(ratio, round_to, actions, bounded, realised, macs):
    found = chain_episode(chain(), actions, ratio=ratio, round_to=round_to, bound="nominal")
    np.testing.assert_allclose(found.bounded, bounded, atol=1e-6)
    np.testing.assert_allclose(found.realised, realised, atol=1e-6)
    assert float(found.macs) == pytest.approx(macs, rel=1e-6)
    # NNI rounds up behind its bound: the second and the third break the budget.
    assert (macs > ratio * TOTAL) == (macs in (59810.5, 65302.25))
    ours = chain_episode(chain(), actions, ratio=ratio, round_to=round_to)
    assert float(ours.macs) <= ratio * TOTAL
    kept = np.asarray(ours.realised) * [3, 16, 32, 64]
    assert (kept[1:] % round_to == 0).all()
    if macs <= ratio * TOTAL:
        np.testing.assert_allclose(ours.realised, realised, atol=1e-6)


def test_the_states_of_nni():
    found = chain_episode(chain(), (1, 0.5, 0.5, 0.5), ratio=0.5, bound="nominal")
    np.testing.assert_allclose(found.observations, STATES, atol=1e-6)


def test_the_noise_has_the_moments_of_a_truncated_normal():
    keys = jax.random.split(jax.random.key(0), 40_000)
    sigma = 0.5 * 0.99**10
    draws = jax.vmap(lambda k: ddpg.truncated_normal(k, 0.9, sigma))(keys)
    assert float(draws.mean()) == pytest.approx(0.63211, abs=5e-3)
    assert float(draws.var()) == pytest.approx(0.061811, abs=2e-3)
    assert (float(draws.min()) >= 0, float(draws.max()) <= 1) == (True, True)


SMALL = ddpg.Hyper(hidden=16, memory=32, batch=16, warmup=0, actor_rate=1e-2, critic_rate=1e-2)


@pytest.mark.full
def test_an_update_is_what_numpy_makes_of_the_formulas():
    """One step of the critic, from a batch that is one transition over and over."""
    hyper = SMALL._replace(memory=2, batch=3)
    agent = ddpg.init(jax.random.key(1), 2, hyper)
    seen = jnp.asarray([[0.1, 0.9], [0.4, 0.2]])
    agent = ddpg.remember(agent, seen, jnp.asarray([0.3, 0.6]), jnp.float32(0.5))
    new = ddpg.learn(agent, jax.random.key(2), hyper)
    assert float(new.baseline) == 0.5

    def through(layer, x):
        return x @ np.asarray(layer["w"]) + np.asarray(layer["b"])

    def relu(x):
        return np.maximum(x, 0)

    def q(critic, s, a):
        x = relu(through(critic["state"], s) + through(critic["action"], np.asarray([a])))
        return through(critic["three"], relu(through(critic["two"], x)))[0]

    def mu(actor, s):
        x = relu(through(actor["two"], relu(through(actor["one"], s))))
        return 1 / (1 + np.exp(-through(actor["three"], x)[0]))

    s0, s1 = np.asarray(seen)
    wanted = 0.5 - 0.5 + q(agent.critic, s1, mu(agent.actor, s1))
    error = q(agent.critic, s0, 0.3) - wanted
    # Adam's first step is the learning rate against the sign; the gradient here is 2 error.
    step = float(new.critic["three"]["b"][0] - agent.critic["three"]["b"][0])
    assert step == pytest.approx(-1e-2 * np.sign(error), rel=1e-3)
    moved = 0.99 * agent.target_critic["three"]["b"] + 0.01 * new.critic["three"]["b"]
    np.testing.assert_allclose(new.target_critic["three"]["b"], moved, rtol=1e-6)


def test_the_memory_is_a_ring():
    agent = ddpg.init(jax.random.key(1), 1, SMALL._replace(memory=5))
    for i in range(3):
        seen = jnp.full((2, 1), float(i))
        agent = ddpg.remember(agent, seen, jnp.full(2, float(i)), jnp.float32(i))
    assert agent.memory["reward"].tolist() == [2, 0, 1, 1, 2]
    assert agent.memory["end"].tolist() == [True, True, False, True, False]
    assert int(agent.written) == 6


@pytest.mark.full
def test_it_learns_a_policy():
    """A reward for keeping all of conv1, half of conv2 and most of conv3."""
    of = pp.search.problem(nets.coupled(), {"params": 0.6})
    hyper = {"hidden": 32, "memory": 512, "batch": 32, "warmup": 30, "sigma_decay": 0.97}
    hyper |= {"actor_rate": 3e-3, "critic_rate": 1e-2}
    search = pp.search.amc(of, episodes=300, hyper=hyper)
    ideal = jnp.asarray([0.0, 8.0, 4.0])

    def score(counts):
        x = jnp.stack([counts[n] for n in of.names]).astype(jnp.float32)
        return -10 * jnp.mean(jnp.square((x - ideal) / 16))

    run = jit_once(lambda key: pp.search.scan_search(search, key, score, 300))
    for seed in range(2):
        state, history = run(jax.random.key(seed))
        plans, scores = np.asarray(history["plans"])[:, 0], np.asarray(history["scores"])[:, 0]
        for plan in np.unique(plans, axis=0):
            left = of.measure(dict(zip(of.names, plan.tolist(), strict=True)))
            assert left["params"] <= of.budgets["params"]
        # Uniform actions score about -0.5; the best there is 0.
        assert scores[:30].mean() < -0.3
        assert scores[-30:].mean() > -0.2
        assert bool(search.done(state))
        assert float(state.common.best_score) == scores.max()
    again, _ = run(jax.random.key(1))
    np.testing.assert_array_equal(again.agent.actor["one"]["w"], state.agent.actor["one"]["w"])


def test_what_reads_pruned_channels_is_refitted():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 6)).astype(np.float32)
    x[:, 5] = x[:, 0] - 2 * x[:, 1]  # what the others say of the last
    w = rng.normal(size=(6, 3)).astype(np.float32)
    kept = np.asarray([True] * 5 + [False])
    found = np.asarray(jit_once(refit)(w, x, x @ w, kept))
    np.testing.assert_allclose(x @ found, x @ w, atol=1e-4)
    assert (found[5] == 0).all()
    y = rng.normal(size=(50, 3)).astype(np.float32)
    expected = np.linalg.lstsq(x[:, :5], y, rcond=None)[0]
    np.testing.assert_allclose(np.asarray(refit(w, x, y, kept))[:5], expected, atol=1e-4)
    with raises(ValueError, "(6, 3)", "(50, 5)"):
        refit(w, x[:, :5], y, kept)


def test_mistakes():
    of = pp.search.problem(nets.coupled(), {"params": 0.3})
    with raises(ValueError, "lower", "0.9"):
        pp.search.amc(of, lower=0.9)
    with raises(ValueError, "hyper", "'layers'", "hidden"):
        pp.search.amc(of, hyper={"layers": 3})
    with raises(ValueError, "order", "'conv1'"):
        pp.search.amc(of, order=["conv1"])
    with raises(ValueError, "log_resource", "maximised"):
        pp.search.amc(of, reward="log_resource", optimize_mode="minimize")
