"""What a removed position holds in the masked model, followed through element-wise functions.

A number is known; :data:`UNIFORM` is computed from what is kept, alike at all removed positions;
:data:`UNKNOWN` may be anything. Products with zero are zero, whatever the other factor is (as long
as it is finite).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

UNIFORM = math.inf


UNKNOWN = math.nan


#: Element-wise functions by name, on numpy arrays of known numbers.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "add_any": np.add,
    "sub": np.subtract,
    "max": np.maximum,
    "min": np.minimum,
    "rem": np.fmod,
    "pow": np.power,
    "atan2": np.arctan2,
    "neg": np.negative,
    "sign": np.sign,
    "floor": np.floor,
    "ceil": np.ceil,
    "round": np.round,
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "log": np.log,
    "log1p": np.log1p,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "cbrt": np.cbrt,
    "square": np.square,
    "abs": np.abs,
    "sin": np.sin,
    "cos": np.cos,
    "tan": np.tan,
    "asin": np.arcsin,
    "atan": np.arctan,
    "sinh": np.sinh,
    "cosh": np.cosh,
    "tanh": np.tanh,
    "asinh": np.arcsinh,
    "atanh": np.arctanh,
    "logistic": lambda x: 1 / (1 + np.exp(-x)),
    "erf": np.vectorize(math.erf, otypes=[float]),
    "erfc": np.vectorize(math.erfc, otypes=[float]),
    "erf_inv": lambda x: np.where(x == 0, 0.0, np.nan),
    "lgamma": np.vectorize(
        lambda x: math.inf if x <= 0 and x == math.floor(x) else math.lgamma(x), otypes=[float]
    ),
    "digamma": lambda x: np.where(x == 0, np.nan, np.inf),
    "positive_pow": lambda x: np.where((x == 0) | (x == 1), x, np.nan),
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    "identity": lambda x: x,
    "eq": lambda a, b: (a == b).astype(float),
    "ne": lambda a, b: (a != b).astype(float),
    "lt": lambda a, b: (a < b).astype(float),
    "le": lambda a, b: (a <= b).astype(float),
    "gt": lambda a, b: (a > b).astype(float),
    "ge": lambda a, b: (a >= b).astype(float),
    "is_finite": lambda a: np.isfinite(a).astype(float),
    "not": lambda a: (a == 0).astype(float),
    "or": lambda a, b: ((a != 0) | (b != 0)).astype(float),
    "mul": np.multiply,
    "div": np.divide,
    "and": lambda a, b: ((a != 0) & (b != 0)).astype(float),
    "select_n": lambda p, *cases: np.select([p == i for i in range(len(cases))], cases, np.nan),
}


Function = Callable[..., float] | None


def evaluate(name: str, operands: Sequence[Any], function: Function = None) -> Any:
    """Returns what a function gives at removed positions, from what its operands hold there."""
    if name == "identity" and len(operands) == 1:
        return operands[0]
    if all(np.ndim(x) == 0 for x in operands):
        return _scalar(name, tuple(float(x) for x in operands), function)
    xs = np.broadcast_arrays(*(np.asarray(x, float) for x in operands))
    rows = [_scalar(name, tuple(float(v) for v in row), function) for row in zip(*xs, strict=True)]
    return rows[0] if all(_same(r, rows[0]) for r in rows) else np.asarray(rows)


def breaks(name: str, operands: Sequence[Any], function: Function = None) -> np.ndarray:
    """Returns where a function of known numbers is no number: what is masked spoils all it meets.

    Infinities count as well, since zero times infinity is no number either.
    """
    if name in _NEVER_BREAK or not operands:
        return np.zeros(1, bool)
    xs = [np.atleast_1d(np.asarray(x, float)) for x in operands]
    if name == "div" and function is None:  # whatever is divided by zero
        return xs[1] == 0.0
    if not all(np.isfinite(x).any() for x in xs):
        return np.zeros(1, bool)
    rows = list(zip(*np.broadcast_arrays(*xs), strict=True))
    return np.asarray([_breaks(name, tuple(float(v) for v in row), function) for row in rows])


_NEVER_BREAK = {
    "identity",
    "add",
    "sub",
    "mul",
    "neg",
    "max",
    "min",
    "select_n",
    "and",
    "or",
    "not",
}


def _breaks(name: str, xs: tuple[float, ...], function: Function) -> bool:
    if not all(math.isfinite(x) for x in xs):
        return False
    key = name, tuple(map(repr, xs)), None if function is None else id(function)
    if key not in _BROKEN:
        found = function or FUNCTIONS.get(name)
        with np.errstate(all="ignore"):
            value = 0.0 if found is None else float(found(*(np.asarray(x) for x in xs)))
        if function is not None:
            return not math.isfinite(value)
        # Where the table says nothing of other numbers than zero, not a number means not known.
        _BROKEN[key] = not math.isfinite(value) and name not in ("erf_inv", "positive_pow")
    return _BROKEN[key]


_MEMORY: dict[tuple[str, tuple[str, ...]], float] = {}


_BROKEN: dict[Any, bool] = {}


def _scalar(name: str, operands: tuple[float, ...], function: Function) -> float:
    if function is not None:
        return _evaluate(name, operands, function)
    key = name, tuple(map(repr, operands))
    if key not in _MEMORY:
        _MEMORY[key] = _evaluate(name, operands, None)
    return _MEMORY[key]


def _evaluate(name: str, xs: tuple[float, ...], function: Function) -> float:
    if name in ("mul", "and") and 0.0 in xs:
        return 0.0
    if name == "div" and xs[0] == 0.0 and xs[1] != 0.0:
        return 0.0
    if name == "select_n" and math.isfinite(xs[0]) and 0 <= xs[0] < len(xs) - 1:
        return xs[1 + int(xs[0])]  # whatever the others are
    if name == "select_n" and all(_same(x, xs[1]) for x in xs[1:]) and math.isfinite(xs[1]):
        return xs[1]
    if any(math.isnan(x) for x in xs):
        return UNKNOWN
    if any(math.isinf(x) for x in xs):
        return UNIFORM
    function = function or FUNCTIONS.get(name)
    if function is None:
        return UNIFORM  # computed alike at all removed positions, if only by the program itself
    with np.errstate(all="ignore"):
        value = float(function(*(np.asarray(x) for x in xs)))
    return value if math.isfinite(value) else UNKNOWN


def meet(values: Sequence[Any]) -> Any:
    """Returns what is known of all of several values: the same number, or nothing."""
    first = values[0]
    if all(np.ndim(x) == 0 for x in values):
        if all(_same(x, first) for x in values) and first != UNIFORM:
            return first
        return UNKNOWN
    xs = np.broadcast_arrays(*(np.asarray(x, float) for x in values))
    same = np.all([x == xs[0] for x in xs], axis=0) & np.isfinite(xs[0])
    return np.where(same, xs[0], UNKNOWN)


def _same(a: float, b: float) -> bool:
    return a == b or (a != a and b != b)
