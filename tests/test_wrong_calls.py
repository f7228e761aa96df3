"""Wrong calls of every public function end in an error that says what is wrong.

A sample of what ``tests/explore/wrong_calls.py`` runs through, the same in every run.
"""

import importlib
import inspect
import random

import pytest

import purepruning as pp
from tests.explore import surface as table
from tests.explore.outcome import outcome_of
from tests.explore.wrong_calls import pairs, run, singles

SINGLES, SEVERAL = 700, 300

#: What is made by other functions, or written by users as data: no calls to get wrong.
DATA = {"Activation", "Config", "Coupling", "Criterion", "Plan"}
MODULES = [
    "admm",
    "movement",
    *(f"quantize.{name}" for name in ("bnn", "dorefa", "integers", "lsq", "lsq_plus", "naive")),
    *(f"quantize.{name}" for name in ("observers", "ptq", "qat")),
    "stats.accumulate",
    "stats.activations",
    "stats.blocks",
    "stats.fisher_blocks",
    "stats.gradients",
    "stats.inputs",
]
ADAPTERS = ["torch", "linen", "nnx", "equinox", "haiku", "keras"]

# Users run with the promotion that JAX comes with.
pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("wrong"))  # a path may be any string
        yield table.surface(slow=False)


def public():
    """Returns the dotted names of all public functions."""
    found = {name for name in pp.__all__ if callable(getattr(pp, name))} - DATA
    for name in MODULES:
        module = table.find(name)
        found |= {
            f"{name}.{key}"
            for key, value in vars(module).items()
            if inspect.isfunction(value)
            and value.__module__.startswith(module.__name__)
            and not key.startswith("_")
        }
    for name in ADAPTERS:
        module = importlib.import_module(f"purepruning_interop.{name}")
        found |= {
            f"{module.__name__}.{key}"
            for key in module.__all__
            if not inspect.isclass(getattr(module, key))
        }
    return found


#: Called by other functions of the library alone.
INNER = {
    "stats.accumulate.empty_total",
    "stats.activations.channels",
    "stats.fisher_blocks.shape",
    "stats.fisher_blocks.size_of",
    "stats.gradients.shape",
    *(f"quantize.integers.{name}" for name in ("in_steps", "on_host", "unpack", "weight_levels")),
    *(f"quantize.observers.{name}" for name in ("after", "bin_counts", "bounds", "merge_one")),
    *(f"quantize.observers.{name}" for name in ("range_of", "whole_range")),
}


def test_the_table_has_every_public_function():
    named = {call.name.split(" ")[0] for call in table.surface()}
    # Some are called through a function that calls them.
    assert public() - named - INNER - {"merge_masks"} == set()


def test_every_row_is_right_but_for_what_it_gets_wrong(calls):
    for call in calls:
        if call.works:
            call({name: arg.value() for name, arg in call.args.items()})


def bad(cases):
    results = [run(case) for case in cases]
    return {f"{r.bad}: {r.case}": r.outcome.text for r in results if r.bad}


def assert_few(found, n, *, also=()):
    """Fails where one call in a hundred, or more, is bad, or where one is not merely unclear."""
    mild = ("unclear", *also)
    worse = {name: text for name, text in found.items() if not name.startswith(mild)}
    assert not worse
    assert len(found) < n / 100, found


def test_one_wrong_argument(calls):
    rng = random.Random(0)
    every = [case for call in rng.sample(calls, 60) for case in singles((call,))]
    assert_few(bad(rng.sample(every, SINGLES)), SINGLES)


def test_several_wrong_arguments(calls):
    cases = pairs(calls, random.Random(1))
    # Of two wrong arguments a message may be about what the first one made of the second, or one
    # leaves nothing of the other to be looked at: without masks, what parameters are.
    found = bad(next(cases) for _ in range(SEVERAL))
    assert_few(found, 2 * SEVERAL, also=("accepted",))


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda: None, "returned"),
        (lambda: pp.level({}, None, None), "clear"),
        (lambda: pp.level.nothing, "unclear"),
        (lambda: len(5), "unclear"),
        (lambda: (_ for _ in ()).throw(ValueError("config")), "unclear"),
    ],
)
def test_what_is_clear(call, kind):
    assert outcome_of(call, ("config",), {}).kind == kind


def test_what_is_damaged_and_what_hangs():
    watched = {"a": [1]}
    assert outcome_of(lambda: watched["a"].append(2), (), watched).kind == "damaged"

    def forever():
        while True:
            pass

    assert outcome_of(forever, (), {}, limit=0.05).kind == "hang"
