"""The graph of a module as ``torch.export`` reads it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import linecache
import traceback
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils import _pytree as pytree

from purepruning_interop.torch.program import base_name, leaf_names
from purepruning_interop.torch.results import plain
from purepruning_interop.torch.tracing.read_graph import (
    REGIONS,
    Source,
    attribute,
    hidden_writes,
    readable,
)

Open = Literal["none", "batch", "all"]


class Refused(ValueError):
    """``torch.export`` refused a model."""


def export(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    known: Collection[str],
    opened: Open = "none",
) -> Source:
    """Returns the exported graph of ``model(*args, **kwargs)``.

    Args:
        model, args, kwargs: what to export.
        known: names of the operators that have rules; others are decomposed by torch's own tables.
        opened: which axes of the inputs stay open, as far as the module lets them: ``"all"`` that
            are longer than 1, the first, where they agree on it (``"batch"``), or ``"none"``.

    Raises:
        Refused: the model cannot be exported; names the line of its source.
    """
    exported = _export(model, args, kwargs, opened)
    if _needs_decomposition(exported, known):
        try:
            exported = _decompose(exported, known)
        except Exception as error:  # torch raises errors of any class
            raise _refusal(model, error) from error
    return _source(model, exported)


def _export(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], opened: Open
) -> Any:
    shapes = None if opened == "none" else _open_axes(model, args, kwargs, opened)
    with _plain_results(model):
        try:
            return torch.export.export(model, args, kwargs, strict=False, dynamic_shapes=shapes)
        except Exception as error:  # of the model's own code, or any class of torch's
            if shapes is not None:
                raise Refused(f"no dynamic export: {error}") from error
            refused = _refusal(model, error)
    try:  # another tracer, which is as sound: it reads the byte code
        return torch.export.export(model, args, kwargs, strict=True)
    except Exception:  # what the first tracer refused is the line to show
        raise refused from None


@contextlib.contextmanager
def _plain_results(model: torch.nn.Module) -> Iterator[None]:
    """Lets a module return what torch can flatten, and puts it back as it was."""
    forward, own = model.forward, "forward" in vars(model)

    @functools.wraps(forward)
    def returning(*args: Any, **kwargs: Any) -> Any:
        return plain(forward(*args, **kwargs))

    vars(model)["forward"] = returning
    try:
        yield
    finally:
        if own:
            vars(model)["forward"] = forward
        else:
            del vars(model)["forward"]


def _open_axes(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], opened: Open
) -> Any:
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    first = next((t.shape[0] for t in tensors if t.ndim), None)

    def axes(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return None
        found = [a for a, n in enumerate(x.shape) if n > 1]
        if opened == "batch":
            found = [a for a in found if a == 0 and x.shape[0] == first]
        return dict.fromkeys(found, torch.export.Dim.AUTO) or None

    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    return pytree.tree_map(axes, dict(given))


def _refusal(model: torch.nn.Module, error: Exception) -> Refused:
    """Returns an error that names the line of the user's source the trace stopped at."""
    library = str(Path(torch.__file__).parent)
    here = str(Path(__file__).parent)
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not f.filename.startswith((library, here)) and "contextlib" not in f.filename
    ]
    place = ""
    if frames:
        f = frames[-1]
        line = f.line or linecache.getline(f.filename, f.lineno or 0).strip()
        place = f" at {f.filename}:{f.lineno}, in {f.name}: {line!r}"
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return Refused(
        f"torch.export cannot read {type(model).__name__}{place}: {type(error).__name__}: {reason}"
    )


def _source(model: torch.nn.Module, exported: Any) -> Source:
    signature = exported.graph_signature
    specs = {spec.arg.name: spec for spec in signature.input_specs}
    names = leaf_names(model)
    given: list[Any] = []
    state: dict[Any, str] = {}
    constants: dict[Any, torch.Tensor] = {}
    for node in exported.graph.nodes:
        if node.op != "placeholder":
            continue
        spec = specs[node.name]
        kind = spec.kind.name
        if kind == "USER_INPUT":
            given.append(node)
        elif kind in ("PARAMETER", "BUFFER") and spec.target in names:
            state[node] = names[spec.target]
        elif kind in ("PARAMETER", "BUFFER", "CONSTANT_TENSOR"):
            tensor = exported.constants.get(spec.target)
            constants[node] = attribute(model, spec.target) if tensor is None else tensor
    kinds = [spec.kind.name for spec in signature.output_specs]
    return Source(
        exported.graph_module,
        given,
        state,
        constants,
        [i for i, kind in enumerate(kinds) if kind == "USER_OUTPUT"],
        {
            names[spec.target]: i
            for i, spec in enumerate(signature.output_specs)
            if kinds[i] == "BUFFER_MUTATION" and spec.target in names
        },
        exported.call_spec.in_spec,
        exported.call_spec.out_spec,
    )


def _graphs(graph_module: Any) -> list[Any]:
    found = [graph_module]
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and (place := REGIONS.get(base_name(node.target))):
            found += _graphs(getattr(graph_module, node.args[place].target))
    return found


def _needs_decomposition(exported: Any, known: Collection[str]) -> bool:
    for module in _graphs(exported.graph_module):
        if hidden_writes(module.graph):
            return True
        for node in module.graph.nodes:
            if node.op == "call_function" and not readable(node.target, known):
                return True
    return False


def _decompose(exported: Any, known: Collection[str]) -> Any:
    table = torch.export.default_decompositions()
    for op in list(table.keys()):
        if base_name(op) in known:
            table.pop(op)
    try:
        return exported.run_decompositions(table)
    except Exception:  # torch's, of an operator that cannot stay: all are taken apart
        return exported.run_decompositions({})
