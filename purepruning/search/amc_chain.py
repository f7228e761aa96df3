"""The environment of AMC in NNI: a chain of layers whose input channels are pruned one by one."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from purepruning.arguments import fraction, instance, one_of, whole_number


class Chain(NamedTuple):
    """Layers one after another; a depthwise one belongs to the layer behind it.

    Attributes:
        channels: input channels of each layer, ``(layers,)``.
        macs: multiply-adds of each.
        buffers: those of the depthwise layers before each, 0 where there are none.
        weights: number of weights of each, and then of the depthwise ones, in order.
        features: what never changes, ``(layers, n)``, each column in [0, 1]; see
            :func:`purepruning.search.layer_features`.
    """

    channels: Any
    macs: Any
    buffers: Any
    weights: Any
    features: Any


class Episode(NamedTuple):
    """What :func:`chain_episode` returns, ``(layers,)`` each.

    Attributes:
        observations: ``(layers, n + 3)``: features, what is gone, what is left behind, last action.
        bounded: the actions after the bound.
        realised: the fractions of input channels that were kept, of whole channels.
        macs: what is left in all.
    """

    observations: Any
    bounded: Any
    realised: Any
    macs: Any


def chain_episode(
    chain: Chain,
    actions: Any,
    *,
    ratio: float,
    lower: float = 0.2,
    round_to: int = 8,
    bound: str = "rounded",
) -> Episode:
    r"""Returns the episode that actions make: each the fraction of a layer's inputs to keep.

    With $c_t$ the fraction of input channels of layer t, $n_t = c_{t+1}$ that of its outputs, f its
    multiply-adds and b those of the depthwise layers before it, what is left is

    $$\sum_t f_t c_t n_t + b_t c_t.$$

    Layers that were not decided on count with ``lower``; the first layer keeps its inputs, the last
    one its outputs. An action is brought to at least ``lower`` and to at most what leaves ``ratio``
    of all. With ``bound="rounded"`` that is the largest multiple of ``round_to`` that does, so that
    the budget holds wherever ``lower`` allows it; with ``"nominal"`` the channels are rounded up
    behind the bound, as NNI does, which breaks it.

    He et al. 2018, arXiv:1802.03494; NNI 2.0's environment.

    Args:
        chain: the layers.
        actions: ``(layers,)``; the first is not looked at. May be traced.
        ratio: the budget, as a fraction of all multiply-adds.
        lower: the smallest fraction.
        round_to: channels that are kept are a multiple of it, or all.
        bound: ``"rounded"`` or ``"nominal"``.

    Raises:
        ValueError, TypeError: an argument is out of range.
    """
    instance(chain, Chain, "chain_episode: chain", "a Chain")
    ratio, lower = fraction(ratio, "chain_episode: ratio"), fraction(lower, "chain_episode: lower")
    whole_number(round_to, "chain_episode: round_to", 1)
    one_of("chain_episode: bound", bound, ("rounded", "nominal"))
    sizes = [int(c) for c in chain.channels]
    f, b = (np.asarray(x, np.float64) for x in (chain.macs, chain.buffers))
    w = np.asarray(chain.weights, np.float64)
    total, last = f.sum() + b.sum(), len(sizes) - 1
    behind = np.concatenate([f, b[b > 0]])
    given = jnp.asarray(actions, jnp.float32)
    c: list[Any] = [jnp.float32(1.0), *(jnp.float32(lower) for _ in sizes[1:]), jnp.float32(1.0)]
    seen, bounded, realised = [], [], []

    def left(t: int) -> tuple[Any, Any]:
        """What hangs on the inputs of a layer, at all of them, and the rest."""
        mine = float(f[t - 1]) * c[t - 1] + float(f[t]) * c[t + 1] + float(b[t])
        rest = [float(f[i]) * c[i] * c[i + 1] for i in range(len(sizes)) if i not in (t, t - 1)]
        rest += [float(b[i]) * c[i] for i in range(len(sizes)) if i != t]
        return mine, sum(rest)

    now: Any = jnp.float32(1.0)
    for t, size in enumerate(sizes):
        gone, after = jnp.float32(0.0), jnp.float32(w[1:].sum() / w.sum())
        if t > 0:
            cost = sum(float(f[i]) * c[i] * c[i + 1] + float(b[i]) * c[i] for i in range(last + 1))
            gone = jnp.float32(1.0) - cost / float(total)
            after = jnp.float32(behind[t + 1 :].sum() / total)
        seen.append(
            jnp.concatenate(
                [jnp.asarray(chain.features, jnp.float32)[t], jnp.stack([gone, after, now])]
            )
        )
        action = jnp.clip(given[t], 0.0, 1.0) if t > 0 else jnp.float32(1.0)
        if t > 0:
            mine, rest = left(t)
            most = (ratio * float(total) - rest) / mine
            action = jnp.maximum(jnp.minimum(action, most), lower)
            if bound == "rounded":
                fits = jnp.floor(most * size / round_to * (1 + 1e-6)) * round_to
                fits = jnp.where(most >= 1, float(size), fits)
        bounded.append(action)
        kept = jnp.minimum(jnp.ceil((size - _pruned(size, action)) / round_to) * round_to, size)
        if t > 0 and bound == "rounded":
            least = min(-(-int(np.ceil(lower * size - 1e-9)) // round_to) * round_to, size)
            kept = jnp.maximum(jnp.minimum(kept, fits), least)
        now = kept / size
        c[t] = now
        realised.append(now)
    macs = sum(float(f[i]) * c[i] * c[i + 1] + float(b[i]) * c[i] for i in range(last + 1))
    return Episode(jnp.stack(seen), jnp.stack(bounded), jnp.stack(realised), macs)


def _pruned(size: int, action: Any) -> Any:
    """Returns how many channels go: rounded down, where float noise costs none."""
    return jnp.floor(size * (1.0 - action) + 1e-5)
