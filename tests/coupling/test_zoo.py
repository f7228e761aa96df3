"""Every model of the zoo can be coupled, without an operation that has no rule.

Whether its shrunk form is the same function is measured for all of them by
``benchmarks/population.py``, and for a sample in ``test_law.py``.
"""

import jax
import numpy as np
import pytest

import purepruning as pp
from purepruning.coupling.plan import plan_of
from tests.coupling.law import half
from tests.coupling.test_law import UNDEFINED, WHOLE
from tests.coupling.zoo import MODELS

pytestmark = pytest.mark.usefixtures("unoptimized")


def test_names_are_unique():
    names = [entry.name for entry in MODELS]
    assert len(set(names)) == len(names)
    assert all(entry.name.startswith(entry.framework) for entry in MODELS)
    assert set(names) >= WHOLE.keys() | UNDEFINED


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("entry", MODELS, ids=lambda entry: entry.name)
def test_every_operation_has_a_rule_and_every_model_loses_something(entry):
    fn, params, inputs = entry.build(jax.random.key(0))
    for leaf in jax.tree.leaves(params):  # values that tell a wrong position from a right one
        assert leaf.size == 1 or len(np.unique(leaf)) > 1 or leaf.dtype != np.float32
    coupling = pp.couple(fn, params, *inputs)
    assert list(coupling.unknown) == []
    assert bool(coupling.n_units) == (entry.name not in WHOLE)
    if coupling.n_units:
        removed = coupling.removed(half(coupling))
        plan = plan_of(coupling, removed)
        full, less = (
            sum(np.prod(s) for s in shapes)
            for shapes in (plan.shapes.values(), [plan.shape(path) for path in plan.shapes])
        )
        assert less < full
        assert coupling.cost(removed) < coupling.cost()
