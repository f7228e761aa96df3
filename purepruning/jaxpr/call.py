"""One call of a user's function, traced: what is a parameter, what an input, and the program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from purepruning.arguments import adapter_of
from purepruning.arrays import is_torch
from purepruning.jaxpr.program import Program, trace
from purepruning.trees import flatten


class Call(NamedTuple):
    """A traced call ``fn(params, *inputs, **kwargs)``.

    Attributes:
        program: its operations. The inputs are first the parameters, then what else is an array.
        params: shape and dtype of every parameter, by path, in the program's order.
        given: shape and dtype of the other arrays.
        result: shape and dtype of every leaf of the result.
        out_tree: the structure of the result.
    """

    program: Program
    params: dict[str, Any]
    given: list[Any]
    result: list[Any]
    out_tree: Any


def trace_call(
    fn: Callable[..., Any], params: Any, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Call:
    """Returns the call ``fn(params, *inputs, **kwargs)``, traced; what is no array is passed on.

    Raises:
        TypeError: ``fn`` is no function, such as a module, or fails with what it is given; or a
            parameter or an input is of torch.
    """
    check_function(fn)
    tree = flatten(params)
    tensors = [f"params: {path!r}" for path, leaf in tree.leaves.items() if is_torch(leaf)]
    tensors += ["an input" for x in jax.tree.leaves((inputs, dict(kwargs))) if is_torch(x)]
    if tensors:
        raise TypeError(
            f"{tensors[0]} is a tensor of torch, which JAX cannot trace; give the module itself to "
            "the function of this name in purepruning_interop.torch"
        )
    weights = {path: _shape(leaf) for path, leaf in tree.leaves.items() if is_array(leaf)}
    leaves, treedef = jax.tree.flatten((inputs, dict(kwargs)))
    places = [i for i, x in enumerate(leaves) if is_array(x)]
    given = [_shape(leaves[i]) for i in places]

    def flat(weights: list[Any], given: list[Any]) -> Any:
        filled = list(leaves)
        for i, x in zip(places, given, strict=True):
            filled[i] = x
        whole = tree.rebuild({**tree.leaves, **dict(zip(names, weights, strict=True))})
        args, keywords = jax.tree.unflatten(treedef, filled)
        try:
            return fn(whole, *args, **keywords)
        except (TypeError, KeyError, AttributeError, IndexError) as error:
            if isinstance(error, jax.errors.JAXTypeError) or _is_ours(error):
                raise
            raise TypeError(
                "fn failed when it was called with these params and inputs, as the error above "
                "says; give it those that it takes"
            ) from error

    names = list(weights)
    program, result, out_tree = trace(flat, list(weights.values()), given)
    return Call(program, weights, given, result, out_tree)


def _is_ours(error: Exception) -> bool:
    """Whether a function of this library raised an error that came out of a call."""
    step = None if error.__traceback__ is None else error.__traceback__.tb_next
    while step is not None and step.tb_next is not None:
        step = step.tb_next
    name = "" if step is None else step.tb_frame.f_globals.get("__name__", "")
    return str(name).partition(".")[0] in ("purepruning", "purepruning_interop")


def check_function(fn: Any, name: str | None = None) -> None:
    """Raises TypeError for what is no function; of a model, names its adapter's function."""
    adapter = adapter_of(fn)
    # Some functions are modules of Equinox: what its filter_jit returns is.
    if not callable(fn) or adapter not in (None, "equinox"):
        function = f".{name}" if name else ""
        remedy = f"; use purepruning_interop.{adapter}{function} for it" if adapter else ""
        raise TypeError(
            f"fn must be a function of params and inputs, got {type(fn).__name__}{remedy}"
        )


def is_array(x: Any) -> bool:
    """Whether ``x`` is an array, or describes one: what is traced."""
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _shape(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=getattr(x, "weak_type", False))
