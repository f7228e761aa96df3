"""The outputs of a torch module's layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from purepruning.arguments import missing
from purepruning.layers import Layer
from purepruning_interop import _capture
from purepruning_interop.torch.program import check


def capture(
    model: torch.nn.Module,
    /,
    *inputs: Any,
    layers: Iterable[str | Layer],
    params: Mapping[str, torch.Tensor] | None = None,
    mutable: bool = False,
    of: _capture.Of = "outputs",
    **kwargs: Any,
) -> tuple[Any, dict[str, Any]]:
    """Returns ``(model(*inputs), {layer: its output})`` for the layers asked for.

    The model runs with ``params`` through ``torch.func.functional_call``, so that
    ``torch.func.grad`` and ``vmap`` over them work (gradients flow through the outputs too), and is
    left as it was, also where its forward raises: forward hooks stand on the layers during the call
    only, and what the call does to buffers (running statistics) is done to copies. With ``mutable``
    these come back: ``((result, buffers), outputs)``; otherwise they are dropped. Under ``vmap`` a
    batch norm that updates statistics needs them among ``params``, batched.

    An output is a copy of what the layer returned, before any activation that follows, also where
    that works in place. A layer called several times gives the list of its outputs, under whichever
    of its names. ``nn.MultiheadAttention`` and recurrent layers return tuples; the former uses the
    weight of its ``out_proj`` without calling it, whose output is then the first of the tuple. An
    evaluated ``nn.TransformerEncoder`` does not take its fused path, which calls no layers (and
    gives zeros at masked positions, where the ordinary path gives other numbers).

    The model must not run in another thread meanwhile. Inside ``torch.utils.checkpoint`` with
    ``use_reentrant=True`` outputs have no gradient.

    Args:
        model: the module.
        *inputs, **kwargs: what a call of the model takes. Keywords of its own that have the names
            of our options need a module around it.
        layers: rows of the layer table, or names; the dotted path of any module is a name, that of
            a parameter stands for the module that owns it.
        of: ``"outputs"``, or ``"inputs"``: the first argument of each layer's call instead, for
            :mod:`purepruning.stats.inputs`.
        params: parameters, buffers or both, by name; what is missing is the model's own.
        mutable: whether to return the buffers after the call.

    Raises:
        TypeError: ``model`` is no module, or ``params`` no mapping.
        KeyError: the model has no parameter or buffer of a name in ``params``.
        ValueError: a layer is unknown, or is never called in this forward pass.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.ReLU(inplace=True))
    >>> params = {"0.weight": torch.tensor([[1.0], [-2.0]]), "0.bias": torch.zeros(2)}
    >>> y, outputs = capture(model, torch.ones(1, 1), layers=["0"], params=params)
    >>> y.tolist(), outputs["0"].tolist()
    ([[1.0, 0.0]], [[1.0, -2.0]])
    """
    where = "capture(model, *inputs)"
    check(where, model)
    if params is not None and not isinstance(params, Mapping):
        raise TypeError(
            f"{where}: params must map names to tensors, as dict(model.named_parameters()) does, "
            f"or be None; got {type(params).__name__}"
        )
    _capture.check_of(where, of)
    modules = _modules(where, model, layers)
    values, buffers = _values(where, model, params or {})
    calls: dict[torch.nn.Module, list[Any]] = {module: [] for module in modules.values()}
    attention = {
        module.out_proj: module
        for module in model.modules()
        if isinstance(module, torch.nn.MultiheadAttention) and module.out_proj in calls
        if of == "outputs"
    }
    calls |= {module: [] for module in attention.values()}

    def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
        calls[module].append(pytree.tree_map(_copy, output))

    def keep_input(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        _capture.with_first(
            where, args, kwargs, lambda x: calls[module].append(pytree.tree_map(_copy, x))
        )

    with contextlib.ExitStack() as undo:
        for module in calls:
            if of == "inputs":
                hook = module.register_forward_pre_hook(keep_input, with_kwargs=True)
            else:
                hook = module.register_forward_hook(keep)
            undo.callback(hook.remove)
        # The fused path of attention, in evaluation, calls none of its layers.
        undo.callback(
            torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()
        )
        torch.backends.mha.set_fastpath_enabled(False)
        result = torch.func.functional_call(model, values, inputs, kwargs)
    for projection, module in attention.items():
        calls[projection] = calls[projection] or [output[0] for output in calls[module]]
    outputs = _capture.outputs(where, modules, calls)
    if mutable:
        result = result, {name: values[name] for name in buffers}
    return result, outputs


def _modules(where: str, model: torch.nn.Module, layers: Any) -> dict[str, torch.nn.Module]:
    """Returns the module that each name asked for stands for."""
    known = dict(model.named_modules(remove_duplicate=False))
    owners = {}
    for path, _ in model.named_parameters(remove_duplicate=False):
        # The parametrizations of a weight are modules too, but not those whose weight it is.
        owner = path.rpartition(".")[0]
        owners[path] = known[f".{owner}".partition(".parametrizations.")[0][1:]]
    return _capture.find(where, _capture.asked(where, layers), owners | known)


def _values(
    where: str, model: torch.nn.Module, params: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Returns what the call runs with, copies of all buffers among it, and the buffers' names."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    known = {**dict(model.named_parameters(remove_duplicate=False)), **buffers}
    for name in params:
        if name not in known:
            raise KeyError(
                missing(f"{where}: the model has no parameter or buffer {name!r}", name, known)
            )
    given = {id(known[name]): name for name in params}
    names = [given.get(id(b), name) for name, b in model.named_buffers()]
    values = {name: buffers[name].clone() for name in names if name not in params}
    values |= {name: x.clone() if name in buffers else x for name, x in params.items()}
    return values, names


def _copy(x: Any) -> Any:
    return x.clone() if isinstance(x, torch.Tensor) else x
