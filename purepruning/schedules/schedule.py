"""A schedule and its state: a table of integers made on the host, and a counter that walks it.

What is decided by fractions is decided once, by :meth:`Schedule.init`, in float64 and through
:func:`purepruning.count_of`. From then on there are only integers: ``step`` compares the counter
with the table. So it runs the same in a Python loop on the host (the state is NumPy), under
``jit``, in ``lax.scan`` and on torch tensors, and is compiled once.

The counter and the times depend on no batch. Under ``vmap`` they stay without a batch axis as long
as nothing gives them one, and then ``lax.cond`` on :attr:`Event.due` stays a branch; a batched one
would run both sides at every step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from purepruning.arguments import collection, fraction, function, instance, shown, whole_number
from purepruning.arrays import by_numpy, is_array, is_concrete, namespace
from purepruning.config.config import Config, Pool, check_config, known_counts
from purepruning.granularity import NM

#: When to prune a pool of a final sparsity, and to which: pairs of a step and a sparsity, in a list
#: or as an array ``(events, 2)``.
Events: TypeAlias = Callable[[Pool, float], Sequence[tuple[int, float]] | np.ndarray]

#: The most events a schedule has: a table holds a row for each.
MOST_EVENTS = 10**6

#: Steps up to which a state counts; the counter then stays.
LAST_STEP = 2**31 - 1


class ScheduleState(NamedTuple):
    """Where a schedule is, and its table: int32 arrays only.

    Attributes:
        step: steps taken so far, ``()``.
        times: steps at which something is pruned, ascending, ``(events,)``.
        counts: by pool name, how many are pruned once so many events have passed,
            ``(events + 1,)``; with a leading axis where there are several sparsities.
        due_by_pool: by pool name, whether an event prunes the pool, ``(events,)``; ``{}`` if every
            event prunes every pool.
    """

    step: Any
    times: Any
    counts: dict[str, Any]
    due_by_pool: dict[str, Any]


class Event(NamedTuple):
    """What is to be done at one step.

    Attributes:
        due: whether to prune now.
        counts: by pool name, the counts that hold from this step on, for
            :meth:`purepruning.Config.with_counts`.
        due_by_pool: by pool name, whether it is pruned now; ``{}`` if all pools are whenever one
            is. A pool that is not due has the count that it had.
    """

    due: Any
    counts: dict[str, Any]
    due_by_pool: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When to prune, and to which sparsity: made by :func:`purepruning.agp` and its like.

    Attributes:
        events: ``(pool, final sparsity) -> [(step, sparsity), ...]``, steps ascending, also as an
            array ``(events, 2)``; the last sparsity should be the final one.

    >>> import purepruning as pp
    >>> layer = pp.Layer("fc", "Linear", "fc.w", (10, 10), out_axes=(1,), in_axes=(0,))
    >>> config = pp.resolve([{"sparsity": 0.8, "op_types": ["Linear"]}], [layer])
    >>> schedule = pp.linear(begin_step=1, end_step=5, frequency=2)
    >>> state = schedule.init(config)
    >>> for _ in range(7):
    ...     state, event = schedule.step(state)
    ...     print(int(event.due), int(event.counts["fc"]))
    0 0
    1 0
    0 0
    1 40
    0 40
    1 80
    0 80
    """

    events: Events

    def __post_init__(self) -> None:
        expected = "a function (pool, final sparsity) -> [(step, sparsity), ...]"
        function(self.events, "Schedule: events", expected)

    def init(self, config: Config, sparsity: Any = None) -> ScheduleState:
        """Returns the state before the first step, as NumPy arrays.

        The final sparsity of a pool is that of its rule, as long as the config has that count,
        and else the config's count.

        Args:
            config: the resolved rules.
            sparsity: other final sparsities, as in :meth:`purepruning.Config.with_sparsity`; a
                sequence of them gives counts ``(sparsities, events + 1)``, to ``vmap`` over.

        Raises:
            TypeError: ``config`` is no config, or its counts are not known, under ``jit``; the
                schedule's events are no pairs of a step and a sparsity.
            ValueError: a pool has no sparsity, or one that its layers do not allow; the steps of
                a pool do not ascend, or are too many for a table; the config is of N:M, whose
                counts are fixed, and there are several events.
        """
        check_config("Schedule.init", config)
        if sparsity is not None:
            config = config.with_sparsity(sparsity)
        own = {pool.name: _table(self.events, pool, config, sparsity) for pool in config.pools}
        times = np.asarray(sorted({t for table in own.values() for t in table.times}), np.int32)
        fixed = isinstance(config.granularity, NM)
        if fixed and len(times) > 1:
            raise ValueError(
                f"the counts of {config.granularity} are fixed, so that it can be pruned once; "
                f"this schedule has {len(times)} events"
            )
        counts, due_by_pool = {}, {}
        for name, table in own.items():
            due_by_pool[name] = np.isin(times, table.times)
            passed = np.concatenate([[0], np.cumsum(due_by_pool[name])])
            if not fixed:
                counts[name] = table.counts[..., passed]
        if all(due.all() for due in due_by_pool.values()):
            due_by_pool = {}
        return ScheduleState(np.zeros((), np.int32), times, counts, due_by_pool)

    def step(self, state: ScheduleState) -> tuple[ScheduleState, Event]:
        """Returns the state one step on, and what is to be done at the step: pure, and traceable.

        The first call is for step 0. Call it once per step, before the step is taken; a step is
        whatever the schedule's times count, an update or an epoch.
        """
        check_state("Schedule.step", state)
        return advance(state), Event(due(state), counts(state), due_by_pool(state))


def advance(state: ScheduleState) -> ScheduleState:
    """Returns the state one step on."""
    return state._replace(step=by_numpy(_next, state.step))


def _next(step: Any) -> Any:
    xp = namespace(step)
    return xp.asarray(xp.clip(step, 0, LAST_STEP - 1) + 1)


def due(state: ScheduleState) -> Any:
    """Returns whether to prune at the state's step."""
    return by_numpy(lambda times, step: (times == step).any(), state.times, state.step)


def counts(state: ScheduleState) -> dict[str, Any]:
    """Returns the counts that hold at the state's step."""
    return by_numpy(_counts, state)


def _counts(state: ScheduleState) -> dict[str, Any]:
    row = (state.times <= state.step).sum()
    return {name: table[..., row] for name, table in state.counts.items()}


def due_by_pool(state: ScheduleState) -> dict[str, Any]:
    """Returns which pools are pruned at the state's step."""
    return by_numpy(_due_by_pool, state)


def _due_by_pool(state: ScheduleState) -> dict[str, Any]:
    here = state.times == state.step
    return {name: (due & here).any() for name, due in state.due_by_pool.items()}


def vmap_axes(tree: Any) -> Any:
    """Returns the axes for ``jax.vmap``: 0 for every leaf, None for the clocks of schedules.

    ``tree`` is a state, such as that of an optimizer with
    :func:`purepruning.prune_on_schedule` in it, of one model (shapes are enough:
    ``jax.eval_shape(tx.init, params)``). Counters and times then have no batch axis, so that a step
    at which nothing is pruned costs nothing. Counts have one if they are of several sparsities.

    >>> import jax, optax
    >>> import purepruning as pp
    >>> layer = pp.Layer("fc", "Linear", "w", (2, 2), out_axes=(1,), in_axes=(0,))
    >>> config = pp.resolve([{"sparsity": 0.5, "op_types": ["Linear"]}], [layer])
    >>> vmap_axes(pp.one_shot().init(config))
    ScheduleState(step=None, times=None, counts={'fc': None}, due_by_pool={})
    """

    def axes(node: Any) -> Any:
        if not isinstance(node, ScheduleState):
            return 0
        counts = {name: 0 if np.ndim(table) > 1 else None for name, table in node.counts.items()}
        return ScheduleState(None, None, counts, dict.fromkeys(node.due_by_pool))

    return jax.tree.map(axes, tree, is_leaf=_is_state)


def check_resumed(restored: Any, fresh: Any) -> None:
    """Raises if a restored state has another schedule than the run that it is to resume.

    For checkpoints that were read by others, such as orbax; :func:`purepruning.load_state` does
    this by itself. The tables of all schedules in the two trees are compared.

    Args:
        restored: what was read.
        fresh: the state that the run would begin with.

    Raises:
        ValueError: pools, times or counts differ, or the trees hold different numbers of schedules.
    """
    pairs = [
        [x for x in jax.tree.leaves(t, is_leaf=_is_state) if _is_state(x)]
        for t in (restored, fresh)
    ]
    if len(pairs[0]) != len(pairs[1]):
        raise ValueError(
            f"the checkpoint has {len(pairs[0])} schedules, and this run {len(pairs[1])}"
        )
    for old, new in zip(*pairs, strict=True):
        for state in (old, new):
            check_state("check_resumed", state)
        _check_same(old, new)


def _check_same(old: ScheduleState, new: ScheduleState) -> None:
    where = "the checkpoint is of another schedule or of other rules:"
    if old.counts.keys() != new.counts.keys():
        raise ValueError(
            f"{where} its pools are {sorted(old.counts)}, this run's are {sorted(new.counts)}"
        )
    for what, a, b in [
        ("times", old.times, new.times),
        *((f"counts of {name!r}", old.counts[name], new.counts[name]) for name in old.counts),
    ]:
        if not is_concrete(a) or not is_concrete(b):
            raise TypeError("check_resumed is not for jit or vmap, where values are not known")
        before, after = np.asarray(a), np.asarray(b)
        if before.shape != after.shape or (before != after).any():
            raise ValueError(
                f"{where} the {what} were {_short(before)}, and are {_short(after)} now"
            )
    if {k: np.asarray(v).tolist() for k, v in old.due_by_pool.items()} != {
        k: np.asarray(v).tolist() for k, v in new.due_by_pool.items()
    }:
        raise ValueError(f"{where} different pools are pruned at its events")


def _short(values: np.ndarray) -> str:
    return np.array2string(values, threshold=8, edgeitems=3, separator=", ")


def _is_state(node: Any) -> bool:
    return isinstance(node, ScheduleState)


class _Table(NamedTuple):
    """One pool's own events: times ``(events,)`` and counts ``(..., events + 1)``."""

    times: np.ndarray
    counts: np.ndarray


def _table(
    events: Events,
    pool: Pool,
    config: Config,
    sparsity: Any,
) -> _Table:
    if isinstance(config.granularity, NM):
        return _Table(_read(pool, events(pool, 0.0))[0], np.zeros(1, np.int32))
    count = config.counts[pool.name]
    if count is None:
        raise ValueError(
            f"Schedule.init: rule {pool.rule} gives no sparsity for {pool.name!r}, so that a "
            "schedule has none to end at; name one in the rule or give init(config, sparsity=...)"
        )
    finals = known_counts("Schedule.init", pool, count).reshape(-1).tolist()
    given = sparsity.get(pool.name) if isinstance(sparsity, Mapping) else sparsity
    several = np.ndim(count) > 0
    if given is None:
        fractions = [_fraction_of(pool, k) for k in finals]
    else:
        fractions = [fraction(s, "sparsity") for s in (given if several else [given])]
    if not fractions:
        raise ValueError("Schedule.init: sparsity holds no fraction; give one or several")
    rows: list[_Table] = []
    for share, final in zip(fractions, finals, strict=True):
        times, shares = _read(pool, events(pool, share))
        # The last count is the config's own, which need not be that of any short fraction.
        counts = np.where(shares == share, final, pool.counts_of(shares))
        rows.append(_Table(times, np.concatenate([[0], counts]).astype(np.int32)))
    if any(not np.array_equal(row.times, rows[0].times) for row in rows):
        raise ValueError(f"the events of {pool.name!r} are at other steps for other sparsities")
    counts = np.stack([row.counts for row in rows])
    return _Table(rows[0].times, counts if several else counts[0])


def _fraction_of(pool: Pool, count: int) -> float:
    """Returns the sparsity that a count stands for: the rule's, if it is the rule's count."""
    if pool.sparsity is not None and pool.count_of(pool.sparsity) == count:
        return pool.sparsity
    return count / pool.size


def _read(pool: Pool, events: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps of events, int64, and their sparsities, float64."""
    where = f"the events of {pool.name!r}"
    expected = "a list of pairs (step, sparsity)"
    rows = events if isinstance(events, np.ndarray) else collection(events, where, expected)
    if len(rows) > MOST_EVENTS:
        raise ValueError(too_many(where, len(rows)))
    if isinstance(rows, np.ndarray):
        if rows.ndim != 2 or rows.shape[1] != 2 or rows.dtype.kind not in "iuf":
            raise TypeError(f"{where} must be an array (events, 2) of numbers, got {shown(rows)}")
        whole = (rows[:, 0] == np.floor(rows[:, 0])) & (rows[:, 0] >= 0) & (rows[:, 0] < LAST_STEP)
        if not whole.all() or not ((rows[:, 1] >= 0) & (rows[:, 1] <= 1)).all():
            raise ValueError(f"{where} must be whole steps from 0 on, and sparsities in [0, 1]")
        steps, shares = rows[:, 0].astype(np.int64), rows[:, 1].astype(np.float64)
    else:
        for row in rows:
            if len(collection(row, f"{where}: every event", "a pair (step, sparsity)")) != 2:
                raise TypeError(f"{where}: every event must be a pair (step, sparsity)")
        pairs = [tuple(row) for row in rows]
        steps = np.asarray([whole_number(t, f"{where}: step", 0, LAST_STEP - 1) for t, _ in pairs])
        shares = np.asarray([fraction(s, f"{where}: sparsity") for _, s in pairs], np.float64)
    if not len(steps) or (np.diff(steps) <= 0).any():
        raise ValueError(f"{where} must be at ascending steps, got {_short(steps)}")
    return steps, shares


def too_many(where: str, events: int) -> str:
    """Returns the message for a table that would be too long."""
    return (
        f"{where} would be {events:,}, and a table has a row for each; at most {MOST_EVENTS:,} "
        "are made: give a larger frequency"
    )


def check_state(where: str, state: Any) -> None:
    """Raises for what is no state of a schedule, as its ``init`` and ``step`` return them.

    Raises:
        TypeError: it is no state, or something in it is no array of integers.
        ValueError: an array has another shape than its place.
    """
    instance(state, ScheduleState, f"{where}: state", "what Schedule.init returned")
    _check_array(f"{where}: state.step", state.step, "integral", 0)
    _check_array(f"{where}: state.times", state.times, "integral", 1)
    events = state.times.shape[0]
    for field, dtype, length in (
        ("counts", "integral", events + 1),
        ("due_by_pool", "bool", events),
    ):
        tables = getattr(state, field)
        instance(tables, Mapping, f"{where}: state.{field}", "a dict by pool name")
        for name, table in tables.items():
            what = f"{where}: state.{field}[{name!r}]"
            _check_array(what, table, dtype, None)
            if not table.ndim or table.shape[-1] != length:
                raise ValueError(
                    f"{what} must have {length} entries for {events} events, got shape "
                    f"{tuple(table.shape)}"
                )


def _check_array(what: str, x: Any, dtype: str, ndim: int | None) -> None:
    if not is_array(x) or not namespace(x).isdtype(x.dtype, dtype):
        kind = {"integral": "integers", "bool": "booleans"}[dtype]
        raise TypeError(f"{what} must be an array of {kind}, got {shown(x)}")
    if ndim is not None and x.ndim != ndim:
        raise ValueError(
            f"{what} must have {ndim} axes, got shape {tuple(x.shape)}; map over states with vmap"
        )
