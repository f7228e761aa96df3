"""A torch module becomes a program: recorded where that can be, else exported."""

from __future__ import annotations

import contextlib
import io
import logging
import random
import sys
import types
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch

from purepruning_interop.torch.program import Program
from purepruning_interop.torch.tracing.export import Open, export
from purepruning_interop.torch.tracing.read_graph import read
from purepruning_interop.torch.tracing.record import record
from purepruning_interop.torch.tracing.undo import cleared_caches, undone

How = Literal["recorded", "exported", "batch", "open"]


def program_of(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    known: Collection[str],
    how: How = "recorded",
) -> Program:
    """Returns the program of ``model(*args, **kwargs)`` in eval mode.

    Args:
        model: any module; its mode comes back as it was.
        args, kwargs: example inputs.
        known: names of the operators that have rules; others are decomposed.
        how: ``"recorded"`` reads the module as fast as can be; the others give a program that can
            be made a module of: ``"exported"`` with these sizes, ``"batch"`` with the first axis of
            the inputs open where they agree on it, ``"open"`` with all axes open that can be.

    Raises:
        Refused: the model cannot be exported; names the line of its source.
    """
    with _in_mode(model, training=False):
        source = record(model, args, kwargs, known) if how == "recorded" else None
        if source is None:
            with undone(model), cleared_caches(), _quiet():
                source = export(model, args, kwargs, known, _OPEN.get(how, "none"))
        return read(source, how in _OPEN)


_OPEN: Mapping[How, Open] = {"batch": "batch", "open": "all"}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No pages of traced code from torch's loggers: what is refused is an error that says it."""
    names = ("torch", "torch.export", "torch.fx", "torch._dynamo")
    handlers = [handler for name in names for handler in logging.getLogger(name).handlers]
    levels = [handler.level for handler in handlers]
    try:
        for handler in handlers:
            handler.setLevel(logging.CRITICAL + 1)
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for handler, level in zip(handlers, levels, strict=True):
            handler.setLevel(level)


def training_program_of(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    known: Collection[str],
) -> Program | None:
    """Returns the program of ``model(*args, **kwargs)`` in training mode, or None.

    It is recorded, or not read: what writes to memory under other names is not exported.
    """
    with _in_mode(model, training=True):
        source = record(model, args, kwargs, known)
        return None if source is None else read(source)


def asks_for_mode(model: torch.nn.Module) -> bool:
    """Whether a model may do something else in training mode.

    That is where its classes, or functions beside them, read an attribute ``training``; torch's own
    layers are known.
    """
    classes = {c for m in model.modules() for c in type(m).__mro__ if not _is_torch(c)}
    places: list[Mapping[str, Any]] = [vars(c) for c in classes]
    places += [vars(m) for m in model.modules() if not _is_torch(type(m))]
    places += [vars(sys.modules[name]) for name in {c.__module__ for c in classes}]
    functions = (x for place in places for x in place.values())
    return any(_reads_mode(x.__code__) for x in functions if isinstance(x, types.FunctionType))


def _is_torch(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in ("torch", "builtins")


def _reads_mode(code: types.CodeType) -> bool:
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return "training" in code.co_names or any(_reads_mode(c) for c in inner)


@contextlib.contextmanager
def _in_mode(model: torch.nn.Module, training: bool) -> Iterator[None]:
    """A mode, no fused kernels that hide what attention does, random numbers as they were."""
    modes = {m: m.training for m in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    drawn = random.getstate()
    drawn_by_numpy = np.random.get_state()  # noqa: NPY002 -- what models draw from
    torch.backends.mha.set_fastpath_enabled(False)
    model.train(training)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # of torch about itself, such as assigned attributes
            yield
    finally:
        random.setstate(drawn)
        np.random.set_state(drawn_by_numpy)  # noqa: NPY002
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in modes.items():
            module.training = training
