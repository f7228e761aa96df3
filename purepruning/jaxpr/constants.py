"""Variables of a jaxpr that depend on constants alone."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from purepruning.jaxpr.internals import bind
from purepruning.jaxpr.program import Program


def concrete(program: Program, number: int, limit: int = 1 << 20) -> np.ndarray | None:
    """Returns the array a variable is, if it depends on constants only and is not large."""
    if number in program.constants:
        return np.asarray(program.constants[number])
    makers = {out: op for op in program.ops for out in op.outputs}
    memory: dict[int, Any] = dict(program.constants)

    def known(n: int) -> bool:
        stack, seen = [n], set()
        while stack:
            n = stack.pop()
            if n in memory or n in seen:
                continue
            seen.add(n)
            if n not in makers or makers[n].inner:
                return False
            shape = program.avals[n].shape
            if not all(isinstance(k, int) for k in shape) or math.prod(shape) > limit:
                return False
            stack += makers[n].inputs
        return True

    def evaluate(n: int) -> Any:
        if n not in memory:
            op = makers[n]
            found = bind(op.primitive, [evaluate(i) for i in op.inputs], op.params)
            for out, value in zip(
                op.outputs, found if op.primitive.multiple_results else [found], strict=True
            ):
                memory[out] = value
        return memory[n]

    if not known(number):
        return None
    with jax.ensure_compile_time_eval():
        try:
            return np.asarray(evaluate(number))
        except Exception:  # a key, or a primitive that cannot run alone: not a constant to us
            return None
