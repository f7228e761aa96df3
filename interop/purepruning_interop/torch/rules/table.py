"""The rule of every operator."""

from __future__ import annotations

import functools

from purepruning_interop.torch.rules import (
    contractions,
    elementwise,
    indexing,
    norms,
    recurrent,
    reductions,
    shapes,
    sources,
    windows,
)
from purepruning_interop.torch.walk import Rules

RULES = Rules(
    {
        **contractions.RULES,
        **elementwise.RULES,
        **indexing.RULES,
        **norms.RULES,
        **recurrent.RULES,
        **reductions.RULES,
        **shapes.RULES,
        **sources.RULES,
        **windows.RULES,
    },
    elementwise.RECOMPUTED | shapes.RECOMPUTED,
)


@functools.cache
def known_operators() -> frozenset[str]:
    """Returns the names of all operators that need no decomposition."""
    return frozenset(RULES.by_name) | {
        "sym_size",
        "sym_numel",
        "sym_stride",
        "item",
        "_local_scalar_dense",
        "_assert_tensor_metadata",
        "_assert_async",
        "_assert_scalar",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
        "randint",
    }
