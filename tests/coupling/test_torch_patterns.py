"""The patterns themselves: they run, export, and hold what the tests of coupling rely on."""

import pytest
import torch
from torch.utils import _pytree as pytree

from tests.coupling.torch_patterns import PATTERNS, cast, fill
from tests.coupling.torch_traps import TRAPS


def _id(pattern):
    return pattern.name


def _tensors(outputs):
    return [leaf for leaf in pytree.tree_leaves(outputs) if leaf is not None]


@pytest.mark.parametrize("pattern", PATTERNS + TRAPS, ids=_id)
def test_outputs_of_a_pattern_are_of_unit_size(pattern):
    """A wrong channel shows."""
    model, inputs = cast(*pattern.build(), torch.float64)
    for output in _tensors(fill(model, seed=0)(*inputs)):
        assert output.dtype == torch.float64
        assert output.isfinite().all()
        assert output.abs().max() > 0.1


def test_names_are_unique_and_expectations_are_of_three_kinds():
    assert len({pattern.name for pattern in PATTERNS + TRAPS}) == len(PATTERNS) + len(TRAPS)
    assert len(PATTERNS) == 80
    assert all(p.expect == "exact" or p.expect.startswith("frozen: ") for p in PATTERNS)
    assert all(p.expect.partition(":")[0] in ("exact", "frozen", "lawful") for p in TRAPS)


@pytest.mark.parametrize("pattern", PATTERNS + TRAPS, ids=_id)
def test_filled_values_are_distinct_and_those_of_the_seed(pattern):
    def values(seed):
        model = fill(pattern.build()[0].double(), seed)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    first, again, other = values(0), values(0), values(1)
    assert torch.equal(first, again)
    assert torch.cat([first, other]).unique().numel() == 2 * first.numel()


def test_a_normed_filter_of_zeros_is_no_number():
    """Why the pattern weight_norm is frozen."""
    (pattern,) = (p for p in PATTERNS if p.name == "weight_norm")
    model, inputs = pattern.build()
    with torch.no_grad():
        for parameter in model.a.parameters():
            parameter[3] = 0
    assert model(*inputs).isnan().all()
