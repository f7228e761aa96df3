"""The network of ``lottery.py``, its training, and what a round does with one ticket.

A round of all tickets is one compiled call; ``many`` makes it of that of one, by ``vmap`` or by
``lax.map``, whichever is faster. CPU seconds of a round of 16 tickets, of 100 steps
each (jax 0.10, two cores):

    ===========  ===
    ``vmap``     2.3
    ``lax.map``  1.6
    ===========  ===

On a CPU a step is bound by arithmetic, and one network stays in the cache where many do not. An
accelerator, which one such network leaves idle, wants ``vmap``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import Array

import purepruning as pp
from purepruning.training.lottery import LotteryState
from purepruning_interop import linen

Run = dict[str, Any]  # params and opt_state

RATE = 1.2e-3  # Adam's, as in the paper
EVERY = 10  # steps from one point of a learning curve to the next


class LeNet(nn.Module):
    """LeNet-300-100 for images of 64 pixels, initialised as in the paper."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dense = functools.partial(nn.Dense, kernel_init=nn.initializers.glorot_normal())
        x = nn.relu(dense(300, name="hidden1")(x))
        x = nn.relu(dense(100, name="hidden2")(x))
        return dense(10, name="classifier")(x)


MODEL = LeNet()


class Ways(NamedTuple):
    """Something for every way to begin a round."""

    rewound: Any
    rewound_late: Any
    reinitialized: Any
    shuffled: Any


class Ticket(NamedTuple):
    """A ticket between two rounds: where its two lotteries are, and what each has trained."""

    lottery: LotteryState
    lottery_late: LotteryState
    trained: Run
    trained_late: Run


class Functions(NamedTuple):
    """What :func:`lottery` returns; both are compiled, and take all tickets at once.

    Attributes:
        begin: ``(seeds, batches) -> (tickets, curves)``: trains the dense networks.
        go: ``(tickets, keys, batches) -> (tickets, curves, density)``: prunes, and trains what is
            left in all :class:`Ways`.
    """

    begin: Callable[..., Any]
    go: Callable[..., Any]


def layers(images: np.ndarray) -> tuple[pp.Layer, ...]:
    params = jax.eval_shape(MODEL.init, jax.random.key(0), images)["params"]
    return linen.layers(MODEL, params, images)


def many(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns ``function`` of a batch: of arguments that all have one more axis in front."""
    if jax.default_backend() == "cpu":
        return lambda *batch: jax.lax.map(lambda one: function(*one), batch)
    return jax.vmap(function)


def lottery(data: Any, config: pp.Config, rounds: int, late: int) -> Functions:
    """Returns the functions of a lottery.

    ``batches (tickets, steps, batch)`` are numbers of images; a learning curve has a point after
    every ``EVERY`` steps.

    Args:
        data: images ``(n, 64)`` and labels to train and to test with.
        config: what is pruned after all rounds.
        rounds: how many there are.
        late: the step to which the second of a ticket's lotteries goes back.
    """
    tickets = pp.lottery(pp.level, config, rounds=rounds)
    data = jax.tree.map(jnp.asarray, data)

    def initialize(seed: Array) -> Run:
        params = MODEL.init(jax.random.key(seed), data.test_images)["params"]
        return {"params": params, "opt_state": optimizer(params).init(params)}

    def optimizer(params: Any) -> optax.GradientTransformationExtraArgs:
        # A place for the mask of every parameter; nothing is pruned yet.
        return optax.chain(optax.adam(RATE), pp.keep_pruned(pp.expand({}, params)))

    def loss(params: Any, batch: Array) -> Array:
        logits = MODEL.apply({"params": params}, data.train_images[batch])
        labels = data.train_labels[batch]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(run: Run, batch: Array) -> tuple[Run, None]:
        params, state = run["params"], run["opt_state"]
        updates, state = optimizer(params).update(jax.grad(loss)(params, batch), state, params)
        return {"params": optax.apply_updates(params, updates), "opt_state": state}, None

    def point(run: Run, batches: Array) -> tuple[Run, Array]:
        run, _ = jax.lax.scan(step, run, batches)
        predicted = MODEL.apply({"params": run["params"]}, data.test_images).argmax(-1)
        return run, jnp.mean(predicted == data.test_labels)

    def train(run: Run, batches: Array) -> tuple[Run, Array]:
        """Returns the run after all batches, and its learning curve."""
        return jax.lax.scan(point, run, batches.reshape(-1, EVERY, batches.shape[-1]))

    def begin(seed: Array, batches: Array) -> tuple[Ticket, Array]:
        run = initialize(seed)
        run_late, first = train(run, batches[:late])
        dense, rest = train(run_late, batches[late:])
        ticket = Ticket(tickets.init(run), tickets.init(run_late), dense, dense)
        return ticket, jnp.concatenate([first, rest])

    def go(ticket: Ticket, key: Array, batches: Array) -> tuple[Ticket, Ways, Array]:
        key, other_key = jax.random.split(key)
        state, run = tickets.step(ticket.lottery, ticket.trained)
        start = state.start["params"]
        runs = (
            _masked(run, run["params"], state.masks),
            _masked(run, pp.reinitialize(start, key), state.masks),
            _masked(run, start, pp.shuffle_masks(state.masks, config, other_key)),
        )
        trained, curves = many(lambda run: train(run, batches))(
            jax.tree.map(lambda *leaves: jnp.stack(leaves), *runs)
        )
        late_state, run = tickets.step(ticket.lottery_late, ticket.trained_late)
        run = _masked(run, run["params"], late_state.masks)
        trained_late, rest = train(run, batches[late:])
        # Up to the step it goes back to there is no curve.
        curve_late = jnp.concatenate([jnp.full(late // EVERY, jnp.nan), rest])
        trained = jax.tree.map(lambda leaf: leaf[0], trained)
        masks = dict(zip(pp.leaf_paths(state.masks), jax.tree.leaves(state.masks), strict=True))
        weights = [masks[layer.weight] for layer in config.layers]
        density = sum(w.sum() for w in weights) / sum(w.size for w in weights)
        ticket = Ticket(state, late_state, trained, trained_late)
        return ticket, Ways(curves[0], curve_late, *curves[1:]), density

    return Functions(jax.jit(many(begin)), jax.jit(many(go)))


def _masked(run: Run, params: Any, masks: Any) -> Run:
    """Returns a run that begins with ``params`` and keeps what ``masks`` prune at zero."""
    opt_state = pp.set_masks(run["opt_state"], masks)
    return {"params": pp.apply_masks(params, masks), "opt_state": opt_state}
