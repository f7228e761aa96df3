"""When to prune and how much: tables against hand calculation and NNI, and the ways to step."""

import json
import math
import pathlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import purepruning as pp
from purepruning import NM, Layer
from purepruning.schedules.schedule import ScheduleState
from tests.messages import raises

GRADUAL = {
    "linear": pp.linear,
    "agp": pp.agp,
    "cosine": pp.cosine,
    "exponential": pp.exponential,
}
gradual = pytest.mark.parametrize("schedule", GRADUAL.values(), ids=GRADUAL)


def layer(name, units=10_000):
    return Layer(name, "Linear", f"{name}.w", (units // 10, 10), (1,), (0,))


def config_of(rule, *names, units=10_000, **options):
    rule = {"op_types": ["Linear"]} | rule
    return pp.resolve([rule], [layer(name, units) for name in names or ("fc",)], **options)


def walk(schedule, state, steps):
    """The events that are due in so many steps: step -> {pool: count}."""
    due = {}
    for t in range(steps):
        state, event = schedule.step(state)
        if event.due:
            mine = {name for name, due in event.due_by_pool.items() if due} or set(event.counts)
            due[t] = {name: int(k) for name, k in event.counts.items() if name in mine}
    return due


# The numbers. Of 10,000 weights the counts are the sparsities to four digits, rounded down.

# AGP of NNI 2.0 and its documents, 0 to 0.8 in ten epochs: 0.8 - 0.8 (1 - e/9)^3.
TEN_EPOCHS = [0, 2381, 4235, 5629, 6628, 7297, 7703, 7912, 7989, 8000]

TABLES = {
    # 0.5 (1 - (1 - i/5)^3), i = 0..5.
    "agp": (pp.agp(end_step=5), [0, 2440, 3920, 4680, 4960, 5000]),
    "linear": (pp.linear(end_step=5), [0, 1000, 2000, 3000, 4000, 5000]),
    # 0.25 (1 - cos(pi i/4)): 0.25 * (1 - 0.70711), 0.25, 0.25 * 1.70711, 0.5.
    "cosine": (pp.cosine(end_step=4), [0, 732, 2500, 4267, 5000]),
    # 1 - 0.5^(i/4): 1 - 0.84090, 1 - 0.70711, 1 - 0.59460.
    "exponential": (pp.exponential(end_step=4), [0, 1591, 2928, 4053, 5000]),
    "initial": (pp.linear(end_step=4, initial_sparsity=0.3), [3000, 3500, 4000, 4500, 5000]),
    # 1 - 0.8 (0.5/0.8)^(i/2): 1 - 0.8 * 0.79057.
    "exponential_initial": (pp.exponential(end_step=2, initial_sparsity=0.2), [2000, 3675, 5000]),
    "at_once": (pp.agp(begin_step=3, end_step=3), [5000]),
    "one_shot": (pp.one_shot(3), [5000]),
}


@pytest.mark.parametrize("name", TABLES)
def test_counts_by_hand(name):
    schedule, expected = TABLES[name]
    state = schedule.init(config_of({"sparsity": 0.5}))
    assert state.counts["fc"].tolist() == [0, *expected]
    first = 3 if name in ("at_once", "one_shot") else 0
    assert state.times.tolist() == list(range(first, first + len(expected)))


def test_the_gradual_keys_of_a_rule_are_epochs_of_which_the_last_is_not_pruned_in():
    rule = {"initial_sparsity": 0, "final_sparsity": 0.8, "start_epoch": 0, "end_epoch": 10}
    config = config_of(rule | {"frequency": 1})
    by_epoch = pp.agp().init(config)
    assert by_epoch.counts["fc"].tolist() == [0, *TEN_EPOCHS]
    assert by_epoch.times.tolist() == list(range(10))
    by_step = pp.agp(steps_per_epoch=50).init(config)
    assert by_step.counts["fc"].tolist() == [0, *TEN_EPOCHS]
    assert by_step.times.tolist() == list(range(0, 500, 50))


@pytest.mark.parametrize(
    ("start", "end", "frequency", "expected"),
    [
        # NNI's span is ((end - start - 1) // frequency) * frequency.
        (0, 10, 2, [0, 2, 4, 6, 8]),
        (1, 8, 3, [1, 4, 7]),
        (1, 9, 3, [1, 4, 7]),
        # Where that is 0, NNI stops with an AssertionError, or prunes at once.
        (0, 4, 5, [0]),
        (3, 3, 1, [3]),
    ],
)
def test_the_spans_of_nni(start, end, frequency, expected):
    rule = {"final_sparsity": 0.8, "start_epoch": start, "end_epoch": end, "frequency": frequency}
    state = pp.agp().init(config_of(rule))
    assert state.times.tolist() == expected
    assert state.counts["fc"][-1] == 8000
    for t, count in zip(expected[:-1], state.counts["fc"][1:-1], strict=True):
        share = 0.8 - 0.8 * (1 - (t - start) / (expected[-1] - start)) ** 3
        assert count == math.floor(10_000 * share + 1e-9)


def test_arguments_hold_for_what_a_rule_does_not_say():
    # The rule says where to begin, the schedule the rest.
    state = pp.linear(begin_step=7, end_step=10, frequency=4).init(
        config_of({"final_sparsity": 0.6, "start_epoch": 2})
    )
    assert state.times.tolist() == [2, 6, 10]
    assert state.counts["fc"].tolist() == [0, 0, 3000, 6000]
    state = pp.linear(end_step=2, initial_sparsity=0.5).init(
        config_of({"final_sparsity": 0.6, "initial_sparsity": 0.2})
    )
    assert state.counts["fc"].tolist() == [0, 2000, 4000, 6000]


GOLDEN = json.loads(
    (pathlib.Path(__file__).parent.parent / "golden" / "schedules.json").read_text()
)
MLP = {"fc1": (13, 29), "fc2": (29, 17), "fc3": (17, 7)}


@pytest.mark.parametrize(
    "case",
    GOLDEN,
    ids=[f"{c['nni']}-{c['kind']}-{c['algorithm']}-{c['total']}-{c['interval']}" for c in GOLDEN],
)
def test_nni_prunes_the_same_numbers_at_the_same_steps(case):
    """NNI's task generators number their tasks; 3.0 prunes after every interval of updates."""
    kinds = {"linear": pp.linear, "agp": pp.agp, "lottery_ticket": pp.exponential}
    every = case["interval"] or 1
    schedule = kinds[case["kind"]](end_step=case["total"] * every, frequency=every)
    table = [Layer(n, "Linear", n, shape, (1,), (0,)) for n, shape in MLP.items()]
    channels = case["algorithm"] == "l1"
    config = pp.resolve(
        [{"sparsity": case["target"], "op_types": ["Linear"]}],
        table,
        granularity="output_channel" if channels else "element",
    )
    state = schedule.init(config)
    # Only NNI 2.10's linear and AGP have a task that prunes nothing.
    first = 0 if case["nni"] == "2.10" and case["kind"] != "lottery_ticket" else 1
    for name, shape in MLP.items():
        units = shape[0] if channels else 1
        pruned = (state.counts[name][1 + first :] * units).tolist()
        assert pruned == case["pruned"][name]
    if case["steps"]:
        assert state.times[1:].tolist() == case["steps"]
    shares = pp.Schedule(schedule.events).events(config.pools[0], case["target"])
    np.testing.assert_allclose([s for _, s in shares][first:], case["sequence"], rtol=1e-12)


def test_agp_is_the_polynomial_schedule_of_optax():
    curve = optax.polynomial_schedule(0.1, 0.9, 3, 60, 20)
    shares = pp.agp(begin_step=20, end_step=80, frequency=7, initial_sparsity=0.1).events(
        config_of({"sparsity": 0.9}).pools[0], 0.9
    )
    for t, share in shares:
        assert float(curve(t)) == pytest.approx(share, abs=1e-6)


@gradual
@hypothesis.given(
    begin=st.integers(0, 50),
    span=st.integers(0, 50),
    frequency=st.integers(1, 60),
    final=st.integers(0, 99),
    initial=st.integers(0, 99),
)
@hypothesis.settings(max_examples=60)
def test_the_final_sparsity_is_reached_at_the_end(schedule, begin, span, frequency, final, initial):
    initial = min(initial, final) / 100
    config = config_of({"sparsity": final / 100})
    state = schedule(
        begin_step=begin, end_step=begin + span, frequency=frequency, initial_sparsity=initial
    ).init(config)
    assert state.times[0] == begin
    assert state.times[-1] == begin + span
    assert (np.diff(state.times) <= frequency).all()
    assert state.counts["fc"][-1] == final * 100
    assert (np.diff(state.counts["fc"]) >= 0).all()
    assert state.counts["fc"][1] == (round(initial * 10_000) if span else final * 100)


@gradual
def test_everything_can_go_where_the_rule_allows_it(schedule):
    config = config_of({"sparsity": 1, "allow_empty": True})
    state = schedule(end_step=4).init(config)
    assert state.counts["fc"][-1] == 10_000
    assert (
        schedule(end_step=4, initial_sparsity=1.0).init(config).counts["fc"].tolist()
        == [0] + [10_000] * 5
    )


# Several pools.


def test_pools_have_times_of_their_own():
    rules = [
        {"op_names": ["a"], "final_sparsity": 0.4, "end_epoch": 5, "frequency": 2},
        {"op_names": ["b"], "final_sparsity": 0.9, "start_epoch": 3, "end_epoch": 4},
        {"op_names": ["c"], "sparsity": 0.5, "initial_sparsity": 0.5, "start_epoch": 4},
    ]
    schedule = pp.linear(end_step=6, frequency=1)
    state = schedule.init(pp.resolve(rules, [layer(name) for name in "abc"]))
    assert walk(schedule, state, 9) == {
        0: {"a": 0},
        2: {"a": 2000},
        3: {"b": 9000},
        4: {"a": 4000, "c": 5000},
        5: {"c": 5000},
        6: {"c": 5000},
    }
    # While it is not due a pool has the count that it had.
    assert state.counts["b"].tolist() == [0, 0, 0, 9000, 9000, 9000, 9000]


def test_global_scope_counts_weights():
    config = config_of({"total_sparsity": 0.75}, "a", "b", scope="global")
    assert pp.linear(end_step=2).init(config).counts["rule 0"].tolist() == [0, 0, 7500, 15_000]


# What the final sparsity is.


def test_counts_that_are_not_the_rules_are_reached_too():
    config = config_of({"sparsity": 0.8}, units=20)
    assert pp.linear(end_step=2).init(config.with_counts({"fc": 7})).counts["fc"].tolist() == [
        0,
        0,
        3,
        7,
    ]
    # 0.39 of 20 is 7 too, and 0.195 of it 3; 0.34 of 20 is 6.
    rows = pp.linear(end_step=2).init(config, sparsity=[0.39, 0.34, 0.8]).counts["fc"]
    assert rows.tolist() == [[0, 0, 3, 7], [0, 0, 3, 6], [0, 0, 8, 16]]


def test_several_sparsities_give_the_rows_of_each():
    config = config_of({"sparsity": 0.8}, "a", "b", units=370)
    shares = [0.0, 0.31, 0.8, 0.99]
    together = pp.agp(end_step=7, frequency=2).init(config, shares)
    mixed = pp.agp(end_step=7, frequency=2).init(config, {"a": shares})
    for i, share in enumerate(shares):
        alone = pp.agp(end_step=7, frequency=2).init(config, share)
        assert together.counts["a"][i].tolist() == alone.counts["a"].tolist()
        assert mixed.counts["a"][i].tolist() == alone.counts["a"].tolist()
        assert together.times.tolist() == alone.times.tolist()
    assert mixed.counts["b"].ndim == 1


# Stepping: the same events in every way.

UNEVEN = [
    {"op_names": ["a"], "final_sparsity": 0.4, "end_epoch": 5, "frequency": 2},
    {"op_names": ["b"], "final_sparsity": 0.9, "start_epoch": 3, "end_epoch": 4},
]
STEPS = 9


def uneven():
    return pp.resolve(UNEVEN, [layer("a"), layer("b")])


def on_host(schedule, state):
    events = []
    for _ in range(STEPS):
        state, event = schedule.step(state)
        events.append(event)
    return jax.tree.map(lambda *x: np.stack(x), *events)


def in_python(schedule, state):
    return on_host(schedule, jax.tree.map(jnp.asarray, state))


def jitted(schedule, state):
    traces, events = [], []

    @jax.jit
    def step(state):
        traces.append(None)
        return schedule.step(state)

    for _ in range(STEPS):
        state, event = step(state)
        events.append(event)
    assert len(traces) == 1
    return jax.tree.map(lambda *x: np.stack(x), *events)


def scanned(schedule, state):
    run = jax.jit(lambda s: jax.lax.scan(lambda s, _: schedule.step(s), s, length=STEPS)[1])
    return run(state)


def mapped(schedule, state):
    """Between the rows of other counts."""
    rows = {name: np.stack([k * 0, k, k // 2]) for name, k in state.counts.items()}
    state = state._replace(counts=rows)
    run = jax.vmap(
        lambda s: jax.lax.scan(lambda s, _: schedule.step(s), s, length=STEPS)[1],
        in_axes=(pp.vmap_axes(state),),
    )
    return jax.tree.map(lambda x: x[1], run(state))


def in_torch(schedule, state):
    state = jax.tree.map(torch.asarray, state)
    events = []
    for _ in range(STEPS):
        state, event = schedule.step(state)
        assert isinstance(state.step, torch.Tensor)
        events.append(event)
    return jax.tree.map(lambda *x: torch.stack(x).numpy(), *events)


def mapped_in_torch(schedule, state):
    def run(counts):
        now, events = jax.tree.map(torch.asarray, state)._replace(counts=counts), []
        for _ in range(STEPS):
            now, event = schedule.step(now)
            events.append(event.counts)
        return {name: torch.stack([e[name] for e in events]) for name in counts}

    rows = {n: torch.asarray(np.stack([k, k * 0])) for n, k in state.counts.items()}
    counts = {name: x[0].numpy() for name, x in torch.func.vmap(run)(rows).items()}
    return on_host(schedule, state)._replace(counts=counts)


WAYS = (in_python, jitted, scanned, mapped, in_torch, mapped_in_torch)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_stepping_gives_the_same_events(way):
    schedule = pp.linear()
    state = schedule.init(uneven())
    expected = on_host(schedule, state)
    assert expected.due.tolist() == [True, False, True, True, True] + [False] * 4
    got = way(schedule, state)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert jax.tree.structure(got) == jax.tree.structure(expected)


def test_states_are_arrays_of_integers():
    state = pp.agp(end_step=3).init(uneven())
    for _ in range(2):
        leaves = jax.tree.leaves(state)
        assert all(isinstance(x, np.ndarray) and x.dtype in (np.int32, bool) for x in leaves)
        state, _ = pp.agp(end_step=3).step(state)


def test_the_counter_stops_before_it_overflows():
    schedule = pp.one_shot(1)
    state = schedule.init(config_of({"sparsity": 0.5}))._replace(
        step=np.asarray(2**31 - 2, np.int32)
    )
    for convert in (lambda x: x, jnp.asarray):
        now = jax.tree.map(convert, state)
        for _ in range(3):
            now, event = schedule.step(now)
            assert not event.due
            assert event.counts["fc"] == 5000
        assert int(now.step) == 2**31 - 1


def test_one_compiled_step_serves_schedules_of_the_same_length():
    config = config_of({"sparsity": 0.5})
    step = jax.jit(pp.Schedule.step, static_argnums=0)
    schedule = pp.agp(end_step=6)
    for other in (
        schedule,
        pp.linear(begin_step=3, end_step=9),
        pp.cosine(end_step=12, frequency=2),
    ):
        step(schedule, other.init(config))
    assert step._cache_size() == 1


def branches(function, *args):
    return str(jax.make_jaxpr(function)(*args)).count("cond[")


def test_a_branch_on_due_stays_a_branch_under_vmap():
    schedule = pp.linear(end_step=3)
    state = schedule.init(config_of({"sparsity": 0.5}), [0.1, 0.5])

    def step(state, x):
        state, event = schedule.step(state)
        return state, jax.lax.cond(event.due, lambda: x * event.counts["fc"], lambda: x)

    axes, x = pp.vmap_axes(state), jnp.arange(2)
    assert branches(jax.vmap(step, in_axes=(axes, 0), out_axes=(axes, 0)), state, x) == 1
    batched = jax.tree.map(
        lambda leaf: jnp.stack([leaf, leaf]), schedule.init(config_of({"sparsity": 0.5}))
    )
    assert branches(jax.vmap(step), batched, x) == 0


# N:M.


def test_nm_is_pruned_once():
    config = pp.resolve([{"op_types": ["Linear"]}], [layer("fc")], granularity=NM(2, 4))
    schedule = pp.one_shot(2)
    state = schedule.init(config)
    assert walk(schedule, state, 4) == {2: {}}
    assert config.with_counts({}) == config
    with raises(ValueError, "NM(keep=2, of=4)", "6 events"):
        pp.agp(end_step=5).init(config)


# Mistakes.


@pytest.mark.parametrize(
    ("make", "error", "parts"),
    [
        (lambda: pp.agp(end_step=-1), ValueError, ("end_step", "at least 0", "-1")),
        (lambda: pp.agp(begin_step=4, end_step=3), ValueError, ("end_step", "at least 4", "3")),
        (
            lambda: pp.linear(begin_step=1.0, end_step=3),
            TypeError,
            ("begin_step", "integer", "1.0"),
        ),
        (lambda: pp.cosine(end_step=3, frequency=0), ValueError, ("frequency", "at least 1", "0")),
        (lambda: pp.exponential(end_step=True), TypeError, ("end_step", "True")),
        (lambda: pp.agp(end_step=2**31), ValueError, ("end_step", "2147483646", str(2**31))),
        (
            lambda: pp.agp(end_step=3, initial_sparsity=1.5),
            ValueError,
            ("initial_sparsity", "[0, 1]", "1.5"),
        ),
        (
            lambda: pp.agp(end_step=3, initial_sparsity="0"),
            TypeError,
            ("initial_sparsity", "number", "'0'"),
        ),
        (lambda: pp.agp(end_step=3, steps_per_epoch=0), ValueError, ("steps_per_epoch", "0")),
        (lambda: pp.agp(end_step=3, steps_per_epoch=None), TypeError, ("steps_per_epoch", "None")),
        (lambda: pp.one_shot(-1), ValueError, ("step", "-1")),
        (lambda: pp.one_shot("1"), TypeError, ("step", "'1'")),
    ],
)
def test_bad_arguments(make, error, parts):
    with raises(error, *parts):
        make()


def test_what_init_refuses():
    config = config_of({"sparsity": 0.5})
    with raises(ValueError, "rule 0", "'fc'", "end_step=...", "'end_epoch'"):
        pp.agp().init(config)
    with raises(ValueError, "rule 0", "'fc'", "0.6", "0.5"):
        pp.agp(end_step=3, initial_sparsity=0.6).init(config)
    with raises(ValueError, "rule 0", "'fc'", "step 5", "step 3"):
        pp.agp(end_step=3).init(config_of({"final_sparsity": 0.5, "start_epoch": 5}))
    with raises(ValueError, "rule 0", "no sparsity", "'fc'", "sparsity=..."):
        pp.agp(end_step=3).init(config_of({}))
    assert pp.agp(end_step=1).init(config_of({}), 0.5).counts["fc"].tolist() == [0, 0, 5000]
    with raises(KeyError, "'f'", "'fc'"):
        pp.agp(end_step=3).init(config, {"f": 0.5})
    with raises(ValueError, "prune every unit", "'fc'"):
        pp.agp(end_step=3).init(config, 1.0)
    with raises(TypeError, "not known"):
        jax.jit(lambda c: pp.agp(end_step=3).init(config.with_counts(c)))({"fc": 3})
    with raises(ValueError, "'fc'", "ascending", "[3, 3]"):
        pp.Schedule(lambda pool, final: [(3, 0.1), (3, final)]).init(config)
    with raises(ValueError, "'fc'", "ascending", "[]"):
        pp.Schedule(lambda pool, final: []).init(config)
    with raises(ValueError, "'fc'", "other steps"):
        pp.Schedule(lambda pool, final: [(int(final * 10), final)]).init(config, [0.1, 0.2])


def test_a_schedule_of_nothing_has_no_events():
    schedule = pp.agp(end_step=3)
    state = schedule.init(pp.resolve([], [layer("fc")]))
    assert walk(schedule, state, 5) == {}


# Resuming.


def test_another_schedule_is_not_resumed():
    three = pp.agp(end_step=3)
    fresh = {"clock": three.init(config_of({"sparsity": 0.5})), "other": np.ones(3)}

    def restored(schedule=three, sparsity=0.5, names=("fc",)):
        state = schedule.init(config_of({"sparsity": sparsity}, *names))
        return {"clock": state._replace(step=np.asarray(2, np.int32)), "other": np.zeros(3)}

    pp.check_resumed(restored(), fresh)
    for old, parts in (
        (restored(pp.agp(end_step=4)), ("times", "[0, 1, 2, 3, 4]", "[0, 1, 2, 3]")),
        (restored(sparsity=0.4), ("counts of 'fc'", "4000", "5000")),
        (restored(pp.linear(end_step=3)), ("counts of 'fc'",)),
        (restored(names=("fc", "fc2")), ("pools", "'fc2'")),
        ({"other": 1}, ("0 schedules", "1")),
    ):
        with raises(ValueError, *parts):
            pp.check_resumed(old, fresh)
    state = pp.linear().init(uneven())
    turned = state._replace(due_by_pool={name: ~due for name, due in state.due_by_pool.items()})
    with raises(ValueError, "different pools"):
        pp.check_resumed(state, turned)
    with raises(TypeError, "jit"):
        jax.jit(lambda s: pp.check_resumed(s, fresh["clock"]))(fresh["clock"])


def test_axes_for_vmap_leave_the_clock_alone():
    plain, several = (
        pp.agp(end_step=2).init(config_of({"sparsity": 0.5}), s) for s in (None, [0.1, 0.2])
    )
    tree = {"w": jnp.ones(3), "clock": plain, "inner": (several, jnp.ones(2))}
    assert pp.vmap_axes(tree) == {
        "w": 0,
        "clock": ScheduleState(None, None, {"fc": None}, {}),
        "inner": (ScheduleState(None, None, {"fc": 0}, {}), 0),
    }
