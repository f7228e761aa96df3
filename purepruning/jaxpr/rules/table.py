"""The rule of every primitive."""

from __future__ import annotations

from purepruning.jaxpr.rules import (
    contractions,
    control,
    elementwise,
    indexing,
    reductions,
    shapes,
    sources,
)
from purepruning.jaxpr.walk import Rule

RULES: dict[str, Rule] = {
    **contractions.RULES,
    **control.RULES,
    **elementwise.RULES,
    **indexing.RULES,
    **reductions.RULES,
    **shapes.RULES,
    **sources.RULES,
}
