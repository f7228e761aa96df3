"""Depth: which blocks of a residual stream go whole, and parameters without them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from purepruning.arguments import collection, function, instance, missing, shown, whole_number
from purepruning.arrays import by_numpy, has_values, int32, is_array, namespace
from purepruning.masks import to_numpy
from purepruning.stats import blocks as statistics
from purepruning.stats.accumulate import value
from purepruning.stats.checks import check_totals, refuse_empty
from purepruning.types import Array, Params


def block_influence(stats: statistics.BlockStats) -> Array:
    r"""Returns how far each block turns what it is given, float32 ``(blocks,)``.

    $$\mathrm{BI}_i = 1 - \frac{1}{T} \sum_t
      \frac{\langle h_{i,t}, h_{i+1,t} \rangle}{\lVert h_{i,t} \rVert \lVert h_{i+1,t} \rVert}$$

    over the positions t that ``stats`` have seen (:mod:`purepruning.stats.blocks`).

    Men et al. 2024, arXiv:2403.03853.

    Raises:
        TypeError: ``stats`` are no statistics of blocks.
        ValueError: they are empty, where values are known.

    >>> import jax.numpy as jnp
    >>> from purepruning.stats import blocks
    >>> states = [jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 2.0]]), jnp.array([[0.0, 3.0]])]
    >>> block_influence(blocks.update(blocks.init(states, 2), states)).tolist()
    [1.0, 0.0]
    """
    where = "block_influence"
    expected = "the statistics of stats.blocks"
    instance(stats, statistics.BlockStats, f"{where}: stats", expected)
    check_totals(where, stats)
    refuse_empty(where, {"blocks": stats.positions})
    found: Array = by_numpy(lambda s: 1.0 - value(s.cosines) / value(s.positions), stats)
    return found


def short_gpt(stats: statistics.BlockStats, drop: int) -> tuple[int, ...]:
    """Returns which blocks to drop: those of lowest :func:`block_influence`, the lowest first.

    All are ranked by the whole model, whatever goes before them; of equal ones the first goes.
    Give the result to :func:`drop_blocks`.

    Men et al. 2024, arXiv:2403.03853 (ShortGPT).

    Raises:
        TypeError: ``stats`` are no statistics of blocks, their values are not known, or ``drop`` is
            no integer.
        ValueError: they are empty, or ``drop`` leaves no block.

    >>> import jax.numpy as jnp
    >>> from purepruning.stats import blocks
    >>> states = [jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 2.0]]), jnp.array([[0.0, 3.0]])]
    >>> short_gpt(blocks.update(blocks.init(states, 2), states), 1)
    (1,)
    """
    influence = to_numpy(block_influence(stats))
    n = whole_number(drop, "short_gpt: drop", 0, len(influence) - 1)
    return tuple(np.argsort(influence, kind="stable")[:n].tolist())


def sleb(loss: Callable[[tuple[int, ...]], Any], n_blocks: int, drop: int) -> tuple[int, ...]:
    """Returns which blocks to drop, one after the other: always the one whose loss is least missed.

    In every round each block that is left is tried, in the model without those that have gone
    already: ``drop`` rounds call ``loss`` for ``n_blocks + (n_blocks - 1) + ...`` models. Of equal
    losses the first block goes. Give the result to :func:`drop_blocks`.

    Song et al. 2024, arXiv:2402.09025 (SLEB), with perplexity on calibration data.

    Args:
        loss: ``kept -> loss``: of the model that runs these blocks alone, ascending numbers.
        n_blocks: how many blocks there are.
        drop: how many go.

    Raises:
        TypeError: a number is no integer, or ``loss`` no function.
        ValueError: ``drop`` leaves no block, there are more than 4,096, or a loss is NaN.

    >>> sleb(lambda kept: -sum([5, 1, 3, 2][i] for i in kept), 4, 2)
    (1, 3)
    """
    function(loss, "sleb: loss", "a function (kept) -> loss")
    n = whole_number(n_blocks, "sleb: n_blocks", 1, statistics.MOST)
    rounds = whole_number(drop, "sleb: drop", 0)
    if rounds >= n:
        raise ValueError(f"sleb: drop must be less than n_blocks, which is {n}, got {rounds}")
    kept, dropped = tuple(range(n)), []
    for _ in range(rounds):
        losses = [_number(loss(_without(kept, i))) for i in kept]
        if np.isnan(losses).any():
            raise ValueError(
                f"sleb: the loss without block {kept[int(np.argmax(np.isnan(losses)))]} is NaN; "
                "see whether the model and the data are finite"
            )
        dropped.append(kept[int(np.argmin(losses))])
        kept = _without(kept, dropped[-1])
    return tuple(dropped)


def _number(loss: Any) -> float:
    try:
        return float(loss)
    except (TypeError, ValueError):
        raise TypeError(f"sleb: loss must return a number, got {shown(loss)}") from None


def _without(kept: tuple[int, ...], block: int) -> tuple[int, ...]:
    return tuple(i for i in kept if i != block)


def drop_blocks(params: Params, dropped: Iterable[int], *, at: str) -> Params:
    """Returns the parameters without some blocks; those behind move up.

    A model whose blocks add to a residual stream computes with them what it computes if the output
    projections of the dropped blocks are zero. It must run as many blocks as there are parameters:
    a loop over them, or a ``scan``.

    Args:
        params: nested mappings, lists and tuples. Flax's, Haiku's and plain ones; of an Equinox
            module give the list of blocks itself, with ``at="{}"``. For torch modules there is
            ``purepruning_interop.torch.drop_blocks``.
        dropped: numbers of blocks from 0 on, as :func:`short_gpt` and :func:`sleb` return them.
        at: where blocks lie, keys joined by dots. With ``{}`` for the number in the last key, such
            as ``"params.layers_{}"``, or ``"blocks.{}"`` of a list; without one, blocks are stacked
            along the first axis of every array below.

    Raises:
        KeyError: there is nothing at ``at``.
        TypeError: what lies there are no blocks, or a number is no integer.
        ValueError: a block that does not exist, or none would be left.

    >>> import jax.numpy as jnp
    >>> params = {"block0": jnp.array(0), "block1": jnp.array(1), "block2": jnp.array(2)}
    >>> {name: int(x) for name, x in drop_blocks(params, [1], at="block{}").items()}
    {'block0': 0, 'block1': 2}
    >>> drop_blocks({"layers": {"w": jnp.arange(4)}}, (0, 3), at="layers")["layers"]["w"].tolist()
    [1, 2]
    """
    instance(at, str, "drop_blocks: at", "keys joined by dots, such as 'layers.{}'")
    numbers = dropped_blocks("drop_blocks", dropped)
    keys = at.split(".")
    if any("{" in key or "}" in key for key in (*keys[:-1], keys[-1].replace("{}", "", 1))):
        raise ValueError(f"drop_blocks: at must hold {{}} once, in its last key, got {at!r}")
    if "{}" in keys[-1]:
        return _changed(params, keys[:-1], at, lambda node: _listed(node, numbers, keys[-1], at))
    return _changed(params, keys if at else [], at, lambda node: _stacked(node, numbers, at))


def dropped_blocks(where: str, dropped: Any) -> list[int]:
    """Returns the numbers of blocks, checked as far as it is not known how many there are."""
    numbers = collection(dropped, f"{where}: dropped", "numbers of blocks, such as [3, 5]")
    return [whole_number(i, f"{where}: dropped", 0) for i in numbers]


def kept_blocks(where: str, n: int, numbers: Sequence[int]) -> list[int]:
    """Returns the blocks of n that stay, ascending.

    Raises:
        ValueError: one does not exist, or none is left.
    """
    kept = [i for i in range(n) if i not in numbers]
    if max(numbers, default=0) >= n or not kept:
        raise ValueError(
            f"{where}: dropped must be some of the blocks from 0 to {n - 1}, and leave one, got "
            f"{shown(list(numbers))}"
        )
    return kept


def _changed(node: Any, keys: Sequence[str], at: str, change: Callable[[Any], Any]) -> Any:
    """Returns a tree with what lies at the keys changed; nothing else is copied."""
    if not keys:
        return change(node)
    key, *rest = keys
    if isinstance(node, Mapping):
        known = {str(name): name for name in node}
        if key not in known:
            raise KeyError(
                missing(f"drop_blocks: at: params have no {key!r} of {at!r}", key, known)
            )
        name = known[key]
        return _like(node, {**node, name: _changed(node[name], rest, at, change)})
    if type(node) in (list, tuple) and key.isdigit() and int(key) < len(node):
        new = list(node)
        new[int(key)] = _changed(node[int(key)], rest, at, change)
        return type(node)(new)
    raise TypeError(
        f"drop_blocks: at {key!r} of {at!r} params are no mapping or list, but {shown(node)}; give "
        "drop_blocks the list of blocks itself, with at='{}'"
    )


def _like(node: Mapping[Any, Any], new: dict[Any, Any]) -> Any:
    return type(node)(new)  # type: ignore[call-arg]


def _listed(node: Any, numbers: Sequence[int], key: str, at: str) -> Any:
    """Returns a list without some elements, or a mapping whose numbered keys move up."""
    if type(node) in (list, tuple) and key == "{}":
        return type(node)(node[i] for i in kept_blocks("drop_blocks", len(node), numbers))
    if not isinstance(node, Mapping):
        raise TypeError(f"drop_blocks: at {at!r}: expected a mapping or a list, got {shown(node)}")
    known = {str(name): name for name in node}
    names: list[Any] = []
    while key.format(len(names)) in known:
        names.append(known[key.format(len(names))])
    if not names:
        message = f"drop_blocks: at: params have no {key.format(0)!r} of {at!r}"
        raise KeyError(missing(message, key.format(0), known))
    kept = kept_blocks("drop_blocks", len(names), numbers)
    moved = {names[i]: node[names[old]] for i, old in enumerate(kept)}
    gone = names[len(kept) :]
    return _like(node, {k: moved.get(k, x) for k, x in node.items() if k not in gone})


def _stacked(node: Any, numbers: Sequence[int], at: str) -> Any:
    """Returns a tree of arrays without some entries of the first axis."""
    leaves = jax.tree.leaves(node)
    if not leaves or not all(is_array(x) and has_values(x) and x.ndim for x in leaves):
        raise TypeError(
            f"drop_blocks: at {at!r}: expected arrays with blocks along their first axis; where "
            "every block has arrays of its own, put {} for its number into at"
        )
    sizes = sorted({int(x.shape[0]) for x in leaves})
    if len(sizes) > 1:
        raise ValueError(
            f"drop_blocks: at {at!r}: first axes have lengths {sizes}, so that they are not those "
            "of blocks; put {} for the number of a block into at"
        )
    kept = kept_blocks("drop_blocks", sizes[0], numbers)

    def cut(x: Any) -> Any:
        xp = namespace(x)
        return xp.take(x, int32(xp, np.asarray(kept), x), axis=0)

    return by_numpy(lambda node: jax.tree.map(cut, node), node)
