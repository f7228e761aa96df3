"""What the layers of a torch module read and put out: seen or replaced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from purepruning.arguments import flag, missing, shown
from purepruning.layers import Activation, Layer
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
    at = _capture.looking(where, layers, of, _looking)
    found = _replace(where, model, inputs, at, params, mutable, kwargs)
    return _capture.captured(found)


def replace(
    model: torch.nn.Module,
    /,
    *inputs: Any,
    at: Mapping[str, Callable[[Any], tuple[Any, Any]]],
    params: Mapping[str, torch.Tensor] | None = None,
    mutable: bool = False,
    **kwargs: Any,
) -> tuple[Any, dict[str, Any]]:
    """Returns ``(model(*inputs), {site: what was found})`` with functions at sites of the model.

    A site is a layer's name with ``":input"`` or ``":output"``; its function is given what the
    layer reads (the first argument of its call) or puts out, and
    returns a pair: what takes its place, of the same shape, and anything that is to be
    found. So quantizers reach activations without a wrapped model. Otherwise as :func:`capture`.

    Modules of activation functions are sites too, by the names that :func:`activations` lists.

    Args:
        model, *inputs, params, mutable, **kwargs: as for :func:`capture`.
        at: the functions, by site.

    Raises:
        TypeError, ValueError: as :func:`capture`; or a function returns no pair, or another shape.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.ReLU(inplace=True))
    >>> params = {"0.weight": torch.tensor([[1.0], [-2.0]]), "0.bias": torch.zeros(2)}
    >>> at = {"0:input": lambda x: (10 * x, tuple(x.shape)), "1:output": lambda y: (-y, None)}
    >>> y, found = replace(model, torch.ones(1, 1), at=at, params=params)
    >>> y.tolist(), found["0:input"]
    ([[-10.0, -0.0]], (1, 1))
    """
    where = "replace(model, *inputs)"
    functions = _capture.sites(where, at)
    return _capture.replaced(_replace(where, model, inputs, functions, params, mutable, kwargs))


def activations(model: torch.nn.Module, /, *inputs: Any, **kwargs: Any) -> tuple[Activation, ...]:
    """Returns a row for every module of ``model`` that is an activation function.

    They are those of ``torch.nn.modules.activation`` without parameters. Nothing is called; inputs
    have no effect, and are here so that the arguments of :func:`capture` can be passed. Functions
    such as ``torch.relu`` are no modules: name the inputs of the layers that read them.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.ReLU6())
    >>> [(row.name, row.type) for row in activations(model)]
    [('1', 'ReLU6')]
    """
    check("activations(model)", model)
    names: dict[torch.nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        of_torch = any(c.__module__ == "torch.nn.modules.activation" for c in type(module).__mro__)
        if of_torch and not any(True for _ in module.parameters()):
            names.setdefault(module, []).append(name)
    return tuple(
        Activation(first, type(module).__name__, type(module).__name__, tuple(aliases))
        for module, (first, *aliases) in names.items()
    )


def _looking(value: Any) -> tuple[Any, Any]:
    # What follows may work in place.
    return value, pytree.tree_map(_copy, value)


def _replace(
    where: str,
    model: torch.nn.Module,
    inputs: tuple[Any, ...],
    at: Mapping[_capture.Site, _capture.Function],
    params: Mapping[str, torch.Tensor] | None,
    mutable: bool,
    kwargs: dict[str, Any],
) -> tuple[Any, dict[_capture.Site, Any]]:
    check(where, model)
    if params is not None and not isinstance(params, Mapping):
        raise TypeError(
            f"{where}: params must map names to tensors, as dict(model.named_parameters()) does, "
            f"or be None; got {type(params).__name__}"
        )
    flag(mutable, f"{where}: mutable")
    modules = _modules(where, model, [site.name for site in at])
    values, buffers = _values(where, model, params or {})
    functions = _capture.joined(at, modules)
    calls: dict[Any, list[Any]] = {key: [] for key in functions}

    def read(module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        def change(x: Any) -> Any:
            x, found = functions[module, "input"](x)
            calls[module, "input"].append(found)
            return x

        return _capture.with_first(args, kwargs, change)

    def put(module: torch.nn.Module, args: Any, output: Any) -> Any:
        output, found = functions[module, "output"](output)
        calls[module, "output"].append(found)
        return output

    with contextlib.ExitStack() as undo:
        for module, side in functions:
            if side == "input":
                undo.callback(module.register_forward_pre_hook(read, with_kwargs=True).remove)
            else:
                undo.callback(module.register_forward_hook(put).remove)
        for module in model.modules():
            if isinstance(module, torch.nn.MultiheadAttention):
                projection = module.out_proj
                if (projection, "output") in functions:
                    hook = _of_projection(
                        functions[projection, "output"], calls[projection, "output"]
                    )
                    undo.callback(module.register_forward_hook(hook).remove)
        # The fused path of attention, in evaluation, calls none of its layers.
        undo.callback(
            torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()
        )
        torch.backends.mha.set_fastpath_enabled(False)
        result = torch.func.functional_call(model, values, inputs, kwargs)
    found = _capture.found_by_site(where, at, modules, calls)
    if mutable:
        result = result, {name: values[name] for name in buffers}
    return result, found


def _of_projection(function: Any, calls: list[Any]) -> Any:
    """Returns a hook for attention, which uses the weight of its projection without calling it.

    The first of what it returns is the projection's output.
    """

    def put(module: torch.nn.Module, args: Any, output: Any) -> Any:
        first, found = function(output[0])
        calls.append(found)
        return (first, *output[1:])

    return put


def _modules(where: str, model: torch.nn.Module, names: list[str]) -> dict[str, torch.nn.Module]:
    """Returns the module that each name asked for stands for."""
    known = dict(model.named_modules(remove_duplicate=False))
    owners = {}
    for path, _ in model.named_parameters(remove_duplicate=False):
        # The parametrizations of a weight are modules too, but not those whose weight it is.
        owner = path.rpartition(".")[0]
        owners[path] = known[f".{owner}".partition(".parametrizations.")[0][1:]]
    return _capture.find(where, names, owners | known)


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
        if not isinstance(params[name], torch.Tensor):
            raise TypeError(
                f"{where}: params: {name!r} must be a tensor, got {shown(params[name])}"
            )
    given = {id(known[name]): name for name in params}
    names = [given.get(id(b), name) for name, b in model.named_buffers()]
    values = {name: buffers[name].clone() for name in names if name not in params}
    values |= {name: x.clone() if name in buffers else x for name, x in params.items()}
    return values, names


def _copy(x: Any) -> Any:
    return x.clone() if isinstance(x, torch.Tensor) else x
