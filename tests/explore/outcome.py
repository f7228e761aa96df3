"""What came of one call: a result, a clear error, an unclear one, a hang, or damaged arguments.

An error is clear if the library itself raised it on purpose (the innermost frame is the library's,
and stands at a ``raise`` statement), as one of the types that the docstrings name, with a message
that speaks of the argument. Everything else that is raised comes from inside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import dis
import re
import resource
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FunctionType, TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np
import torch

#: Seconds after which a call on a handful of numbers hangs.
LIMIT = 5.0

#: Bytes beyond those of the process that wrong calls may take.
MEMORY = 3 * 2**30

#: Characters after which a message repeats its input instead of naming it.
LONGEST = 2500

_OURS = ("/purepruning/", "/purepruning_interop/")
_TYPES = (TypeError, ValueError, KeyError, OSError)
_INSIDE = re.compile(
    r"has no attribute|not subscriptable|unsupported operand|object is not iterable"
    r"|is not callable|positional argument|unexpected keyword|unhashable|not supported between"
    r"|cannot be interpreted|TracerBoolConversion|ConcretizationTypeError|traced array with shape"
    r"|index out of range|of unsized object|bad operand type|truth value of|bug of this library"
)


class Outcome(NamedTuple):
    """What came of a call.

    Attributes:
        kind: ``"returned"``, ``"clear"``, ``"unclear"``, ``"hang"`` or ``"damaged"``.
        text: the error's type and message, and why it is unclear.
        where: the innermost line of the library that took part.
    """

    kind: str
    text: str = ""
    where: str = ""


class Hang(BaseException):
    """Raised into a call that takes too long; no ``except Exception`` stops it."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises :class:`Hang` in the body after so many seconds of the processor.

    In the main thread only. What waits does not hang; on a busy machine it must not seem to.
    """

    def stop(signum: int, frame: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def limit_memory() -> None:
    """From now on this process has little more memory than now; too large arrays are errors."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


def outcome_of(
    call: Callable[[], Any], words: tuple[str, ...], watched: Any, limit: float = LIMIT
) -> Outcome:
    """Returns what came of ``call()``; ``watched`` are arguments that it must not change."""
    before = fingerprint(watched)
    try:
        with warnings.catch_warnings(), limited(limit):
            warnings.simplefilter("ignore")
            call()
        found = Outcome("returned")
    except Hang:
        return Outcome("hang", f"more than {limit:g} s")
    except Exception as error:
        found = _judged(error, words)
    if fingerprint(watched) != before:
        return Outcome("damaged", found.text or "returned", found.where)
    return found


def _judged(error: Exception, words: tuple[str, ...]) -> Outcome:
    message = str(error)
    text, where = f"{type(error).__name__}: {message[:300]}", _innermost(error)
    if not isinstance(error, _TYPES):
        return Outcome("unclear", text, where)
    if not _raised_here(error) and not (isinstance(error, OSError) and error.filename):
        return Outcome("unclear", text, where)
    if _INSIDE.search(message):
        return Outcome("unclear", f"repeats an inner message: {text}", where)
    if len(message) > LONGEST:
        return Outcome("unclear", f"{len(message)} characters: {text}", where)
    if words and not any(word.lower() in message.lower() for word in words):
        return Outcome("unclear", f"names none of {words}: {text}", where)
    return Outcome("clear", text, where)


def _frames(error: BaseException) -> Iterator[TracebackType]:
    step = error.__traceback__
    while step is not None:
        yield step
        step = step.tb_next


def _raised_here(error: BaseException) -> bool:
    """Whether the innermost frame is the library's, at a ``raise`` statement."""
    *_, last = _frames(error)
    code = last.tb_frame.f_code
    ours = any(part in code.co_filename for part in _OURS)
    return ours and dis.opname[code.co_code[last.tb_lasti]] == "RAISE_VARARGS"


def _innermost(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/tests/" not in f.filename]
    mine = [f for f in frames if any(part in f.filename for part in _OURS)]
    if not mine:
        return ""
    frame = mine[-1]
    inside = frame.filename.partition("/purepruning")[2]
    return f"purepruning{inside}:{frame.lineno} {frame.line or ''}"


def fingerprint(x: Any) -> Any:
    """Returns something that is equal for equal contents of arrays, trees, modules and states."""
    if isinstance(x, torch.Tensor):
        try:
            return ("torch", str(x.dtype), tuple(x.shape), repr(x.detach().tolist()))
        except Exception:
            return ("torch", id(x))
    if isinstance(x, torch.nn.Module):
        return (type(x).__name__, fingerprint(dict(x.state_dict())), x.training)
    if isinstance(x, np.ndarray):
        return ("numpy", str(x.dtype), x.shape, repr(x.tolist()))
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
        return ("jax", id(x))  # cannot be written to
    if isinstance(x, Mapping):
        return {repr(k): fingerprint(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [type(x).__name__, *map(fingerprint, x)]
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return [(f.name, fingerprint(getattr(x, f.name, None))) for f in dataclasses.fields(x)]
    return type(x).__name__ if isinstance(x, FunctionType) or callable(x) else repr(type(x))
