"""Deep deterministic policy gradient, as pure functions: actor, critic, memory, noise.

All that an agent is lies in one pytree. Actions are one number in [0, 1].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Hyper(NamedTuple):
    """The numbers of the agent; defaults are NNI's and the authors'.

    Attributes:
        hidden: width of both hidden layers.
        memory: how many transitions are kept.
        batch: how many an update draws.
        actor_rate, critic_rate: Adam's learning rates.
        tau: how fast the target networks follow.
        discount: of the reward.
        warmup: episodes that act uniformly.
        sigma: of the noise, at the first episode after that.
        sigma_decay: what every episode multiplies it by.
    """

    hidden: int = 300
    memory: int = 2000
    batch: int = 64
    actor_rate: float = 1e-4
    critic_rate: float = 1e-3
    tau: float = 0.01
    discount: float = 1.0
    warmup: int = 100
    sigma: float = 0.5
    sigma_decay: float = 0.99


class Agent(NamedTuple):
    """An agent: a pytree of arrays.

    Attributes:
        actor, critic, target_actor, target_critic: weights.
        actor_adam, critic_adam: states of their optimizers.
        memory: observations, actions, rewards and ends, rings of ``Hyper.memory`` rows.
        written: how many transitions were remembered, ever.
        baseline: the moving mean of rewards; NaN before the first update.
        episode: how many episodes are over.
    """

    actor: Any
    critic: Any
    target_actor: Any
    target_critic: Any
    actor_adam: Any
    critic_adam: Any
    memory: Any
    written: Any
    baseline: Any
    episode: Any


def init(key: Any, features: int, hyper: Hyper) -> Agent:
    """Returns a new agent; weights are uniform in +-1/sqrt(inputs), as torch's."""
    keys = jax.random.split(key, 7)
    h = hyper.hidden
    actor = {
        "one": _dense(keys[0], features, h),
        "two": _dense(keys[1], h, h),
        "three": _dense(keys[2], h, 1),
    }
    critic = {
        "state": _dense(keys[3], features, h),
        "action": _dense(keys[4], 1, h),
        "two": _dense(keys[5], h, h),
        "three": _dense(keys[6], h, 1),
    }
    actor_adam, critic_adam = _optimizers(hyper)
    rows = hyper.memory
    memory = {
        "observation": jnp.zeros((rows, features)),
        "action": jnp.zeros(rows),
        "reward": jnp.zeros(rows),
        "end": jnp.zeros(rows, bool),
    }
    zero = jnp.zeros((), jnp.int32)
    return Agent(
        actor,
        critic,
        jax.tree.map(jnp.copy, actor),
        jax.tree.map(jnp.copy, critic),
        actor_adam.init(actor),
        critic_adam.init(critic),
        memory,
        zero,
        jnp.full((), jnp.nan),
        zero,
    )


def policy(actor: Any, observation: Any) -> Any:
    """Returns the actor's actions, ``(..., features) -> (...)``, in (0, 1)."""
    x = jax.nn.relu(_through(actor["one"], observation))
    x = jax.nn.relu(_through(actor["two"], x))
    return jax.nn.sigmoid(_through(actor["three"], x))[..., 0]


def value(critic: Any, observation: Any, action: Any) -> Any:
    """Returns the critic's values, ``(..., features), (...) -> (...)``."""
    x = _through(critic["state"], observation) + _through(critic["action"], action[..., None])
    x = jax.nn.relu(_through(critic["two"], jax.nn.relu(x)))
    return _through(critic["three"], x)[..., 0]


def act(agent: Agent, key: Any, observation: Any, hyper: Hyper) -> Any:
    """Returns an action with noise: uniform while it warms up, then a truncated normal."""
    uniform_key, noise_key = jax.random.split(key)
    late = jnp.maximum(agent.episode - hyper.warmup, 0).astype(jnp.float32)
    sigma = hyper.sigma * hyper.sigma_decay**late
    noisy = truncated_normal(noise_key, policy(agent.actor, observation), sigma)
    return jnp.where(agent.episode <= hyper.warmup, jax.random.uniform(uniform_key), noisy)


def truncated_normal(key: Any, mean: Any, sigma: Any) -> Any:
    """Returns a draw of the normal distribution on [0, 1], by the inverse of its distribution."""
    low, high = ((x - mean) / sigma for x in (0.0, 1.0))
    draw = jax.random.truncated_normal(key, low, high)
    return jnp.clip(mean + sigma * draw, 0.0, 1.0)


def remember(agent: Agent, observations: Any, actions: Any, reward: Any) -> Agent:
    """Returns the agent that remembers an episode, whose transitions all have its reward."""
    steps, rows = len(actions), agent.memory["action"].shape[0]
    at = (agent.written + jnp.arange(steps)) % rows
    memory = {
        "observation": agent.memory["observation"].at[at].set(observations),
        "action": agent.memory["action"].at[at].set(actions),
        "reward": agent.memory["reward"].at[at].set(reward),
        "end": agent.memory["end"].at[at].set(jnp.arange(steps) == steps - 1),
    }
    return agent._replace(memory=memory, written=agent.written + steps)


def learn(agent: Agent, key: Any, hyper: Hyper) -> Agent:
    r"""Returns the agent after one update of critic, actor and targets.

    $$y = (r - b) + \gamma\, (1 - \text{end})\, Q'(s', \mu'(s'))$$

    over a batch of remembered transitions; $s'$ is the observation that was remembered next. The
    critic takes a step against the mean squared error, then the actor one up the critic's value.

    Lillicrap et al. 2015, arXiv:1509.02971; He et al. 2018, arXiv:1802.03494, for the baseline b,
    which moves halfway to the mean reward of each batch.
    """
    rows = agent.memory["action"].shape[0]
    known = jnp.minimum(agent.written, rows)
    # The oldest first; the newest has no next observation yet.
    oldest = jnp.where(agent.written > rows, agent.written % rows, 0)
    draws = jax.random.randint(key, (hyper.batch,), 0, jnp.maximum(known - 1, 1))
    at = (oldest + draws) % rows
    batch = jax.tree.map(lambda x: x[at], agent.memory)
    after = agent.memory["observation"][(at + 1) % rows]
    mean = jnp.mean(batch["reward"])
    known_base = jnp.where(jnp.isnan(agent.baseline), mean, agent.baseline)
    baseline = known_base + 0.5 * (mean - known_base)
    next_value = value(agent.target_critic, after, policy(agent.target_actor, after))
    goes_on = jnp.where(batch["end"], 0.0, 1.0)
    wanted = batch["reward"] - baseline + hyper.discount * goes_on * next_value

    def critic_loss(critic: Any) -> Any:
        found = value(critic, batch["observation"], batch["action"])
        return jnp.mean(jnp.square(found - wanted))

    actor_adam, critic_adam = _optimizers(hyper)
    critic, critic_state = _step(
        critic_adam, agent.critic_adam, agent.critic, jax.grad(critic_loss)(agent.critic)
    )

    def actor_loss(actor: Any) -> Any:
        return -jnp.mean(value(critic, batch["observation"], policy(actor, batch["observation"])))

    actor, actor_state = _step(
        actor_adam, agent.actor_adam, agent.actor, jax.grad(actor_loss)(agent.actor)
    )

    def follow(target: Any, source: Any) -> Any:
        return jax.tree.map(lambda t, s: (1 - hyper.tau) * t + hyper.tau * s, target, source)

    return agent._replace(
        actor=actor,
        critic=critic,
        target_actor=follow(agent.target_actor, actor),
        target_critic=follow(agent.target_critic, critic),
        actor_adam=actor_state,
        critic_adam=critic_state,
        baseline=baseline,
    )


def end_episode(
    agent: Agent, key: Any, observations: Any, actions: Any, reward: Any, hyper: Hyper
) -> Agent:
    """Returns the agent that remembers an episode and, once warm, learns once for each step."""
    agent = remember(agent, observations, actions, reward)

    def updates(agent: Agent) -> Agent:
        def step(agent: Agent, key: Any) -> tuple[Agent, None]:
            return learn(agent, key, hyper), None

        return jax.lax.scan(step, agent, jax.random.split(key, len(actions)))[0]

    agent = jax.lax.cond(agent.episode > hyper.warmup, updates, lambda agent: agent, agent)
    return agent._replace(episode=agent.episode + 1)


def _step(optimizer: Any, state: Any, weights: Any, grads: Any) -> tuple[Any, Any]:
    """Returns weights and the optimizer's state after a step."""
    with jax.numpy_dtype_promotion("standard"):  # Optax raises floats to whole powers
        updates, state = optimizer.update(grads, state)
    return optax.apply_updates(weights, updates), state


def _optimizers(hyper: Hyper) -> tuple[Any, Any]:
    return optax.adam(hyper.actor_rate), optax.adam(hyper.critic_rate)


def _dense(key: Any, inputs: int, outputs: int) -> dict[str, Any]:
    reach = inputs**-0.5
    one, two = jax.random.split(key)
    return {
        "w": jax.random.uniform(one, (inputs, outputs), jnp.float32, -reach, reach),
        "b": jax.random.uniform(two, (outputs,), jnp.float32, -reach, reach),
    }


def _through(layer: dict[str, Any], x: Any) -> Any:
    product = x @ layer["w"]
    return product + jnp.broadcast_to(layer["b"], product.shape)
