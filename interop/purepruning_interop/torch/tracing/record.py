"""The graph of a module as it is called, on tensors without values.

The module runs once, eagerly, on the meta device, and every ATen operation is written down before
torch takes it apart. That is the level of ``torch.export`` at a fraction of its time. Values cannot
be asked for, so control flow that depends on them is noticed as export notices it. Whatever else is
out of the ordinary is left to export: nothing is guessed.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch._decomp import decomposition_table
from torch.nn.modules import module as hooks
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from purepruning_interop.torch.program import base_name, leaf_names, mutates
from purepruning_interop.torch.results import plain
from purepruning_interop.torch.tracing.fold_constants import LIMIT, NOT_CONSTANT
from purepruning_interop.torch.tracing.questions import Questions
from purepruning_interop.torch.tracing.read_graph import Source, hidden_writes, readable
from purepruning_interop.torch.tracing.shapes import (
    Unusual,
    empty_tensor,
    key_of,
    obvious_shape,
    shape_of,
)
from purepruning_interop.torch.tracing.undo import undone

_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def record(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], known: Collection[str]
) -> Source | None:
    """Returns the graph of ``model(*args, **kwargs)``, or None where that takes ``torch.export``.

    Args:
        model: any module; what its forward assigns to attributes is undone.
        args, kwargs: example inputs.
        known: names of the operators that have rules.
    """
    given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    tensors = [*given, *model.state_dict(keep_vars=True).values()]
    if any(type(x) not in _PLAIN or x.layout is not torch.strided for x in tensors):
        return None
    gradients = torch.is_grad_enabled()  # a module may ask
    recorder = _Recorder(model, known, given[0].device if given else torch.device("cpu"))
    with undone(model) as left:
        try:
            with torch.inference_mode(), torch.set_grad_enabled(gradients), _as_exported():
                args, kwargs = recorder.give((args, kwargs))
                with _scopes(model, recorder), Questions(recorder), recorder:
                    found = model(*args, **kwargs)
        except Exception:  # the model's own code: export says what, if it is an error
            return None
        try:
            recorder.take(found)
        except Unusual:
            return None
        if any(_without_values(x) for x in left()):
            return None
    if recorder.failed or hidden_writes(recorder.graph):
        return None
    return recorder.source()


class _Recorder(TorchDispatchMode):
    """Writes operations into a graph."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled in here, and importing the compiler takes seconds

    def __init__(
        self, model: torch.nn.Module, known: Collection[str], device: torch.device
    ) -> None:
        super().__init__()
        self.known = known
        self.device = device
        self.scope = ""
        self.failed = False  # a module may catch what is raised, and go on
        self.graph = torch.fx.Graph()
        self.nodes: dict[int, Any] = {}
        self.given: list[Any] = []
        self.state: dict[Any, str] = {}
        self.constants: dict[Any, torch.Tensor] = {}
        self.results: list[Any] = []
        self.in_spec: Any = None
        self.out_spec: Any = None
        self.alive: list[Any] = []  # so that no two tensors share an id
        self.empty: dict[int, torch.Tensor] = {}
        self.made: set[int] = set()  # memory of what has values and was made here
        self.forgotten: set[int] = set()  # and of that to which something unknown was written
        self.shapes: dict[Any, tuple[Any, ...]] = {}
        names = leaf_names(model)
        state = model.state_dict(keep_vars=True)
        self.paths = {id(state[name]): path for name, path in names.items()}
        self.memory = {_memory(state[name]) for name in names}
        self.training = model.training
        self.buffers = {id(x) for x in model.buffers()}
        self.counts: dict[int, torch.Tensor] = {}  # what buffers that count would hold

    def give(self, given: Any) -> Any:
        """Returns the arguments without values, and makes placeholders of them."""
        leaves, spec = pytree.tree_flatten(given)
        self.in_spec = spec
        empty = {id(x): empty_tensor(shape_of(x)) for x in leaves if _is_tensor(x)}
        leaves = [empty.get(id(x), x) for x in leaves]
        self.given = [self.placeholder(f"given_{i}", x) for i, x in enumerate(leaves)]
        return pytree.tree_unflatten(leaves, spec)

    def take(self, found: Any) -> None:
        """Makes the results the output."""
        leaves, self.out_spec = pytree.tree_flatten(plain(found))
        self.results = [self.lookup(x) if _is_tensor(x) else x for x in leaves]
        self.graph.output(tuple(self.results))

    def source(self) -> Source:
        """Returns what was recorded."""
        return Source(
            self,
            self.given,
            self.state,
            self.constants,
            list(range(len(self.results))),
            {},
            self.in_spec,
            self.out_spec,
        )

    def placeholder(self, name: str, value: Any) -> Any:
        node = self.graph.placeholder(name)
        node.meta["val"] = value
        if isinstance(value, torch.Tensor):
            self.nodes[id(value)] = node
            self.alive.append(value)
        return node

    def lookup(self, x: Any) -> Any:
        """Returns the node of a tensor, and anything else as it is."""
        if isinstance(x, torch.Tensor):
            return self.nodes.get(id(x)) or self.found(x)
        if isinstance(x, (list, tuple)):
            return [self.lookup(y) for y in x]
        return x

    def found(self, tensor: torch.Tensor) -> Any:
        """Returns a new placeholder of a tensor that is neither argument nor result."""
        path = self.paths.get(id(tensor))
        if path is None and (tensor.is_meta or _memory(tensor) in self.memory):
            raise Unusual("a tensor that no operation returned")
        node = self.placeholder("leaf" if path else "constant", tensor)
        if path is None:
            self.constants[node] = tensor
        else:
            self.state[node] = path
        return node

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls an operation, and records it if it returns tensors."""
        try:
            with torch._C.DisableTorchFunction():  # the questions here are no module's
                return self.record(func, args, kwargs or {})
        except Exception:  # whatever it is, it goes on, and a module may catch it
            self.failed = True
            raise

    def record(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is _aten.detach_.default:  # of what torch.tensor makes
            return args[0]
        if not readable(func, self.known) and (parts := _parts(func)) is not None:
            with self:
                return parts(*args, **kwargs)
        written = _written(func, args, kwargs)
        if written and self.training and all(id(x) in self.buffers for x in written):
            self.count(func, args, kwargs)
            return written[0]  # running statistics, which training does not read
        if not all(self.may_write(x) for x in written):
            raise Unusual(f"{func} writes to a tensor of the model")
        result = self.call(func, args, kwargs)
        values = result if isinstance(result, (list, tuple)) else (result,)
        if not any(isinstance(x, torch.Tensor) for x in values):
            if written:
                raise Unusual(f"{func} returns nothing")
            return result
        self.alive.append(result)
        args, kwargs = _on(self.device, func, args, kwargs)
        node = self.graph.call_function(
            func, tuple(self.lookup(list(args))), {k: self.lookup(x) for k, x in kwargs.items()}
        )
        node.meta["val"] = result
        node.meta["nn_module_stack"] = {"": (self.scope,)}
        for x in written:
            self.nodes[id(x)] = node
        if values is not result:
            self.nodes[id(result)] = node
            return result
        for i, x in enumerate(values):
            if isinstance(x, torch.Tensor):
                part = self.graph.call_function(operator.getitem, (node, i))
                part.meta["val"] = x
                self.nodes[id(x)] = part
        return result

    def count(self, func: Any, args: Any, kwargs: Any) -> None:
        """Notes how far a buffer has counted: averages over all batches divide by that."""
        x = args[0]
        if self.knows(x) and x.numel() == 1 and not x.is_floating_point():
            self.counts[id(x)] = func(self.counts.get(id(x), x).clone(), *args[1:], **kwargs)

    def may_write(self, x: torch.Tensor) -> bool:
        """Whether a tensor that is written to was made here."""
        return id(x) not in self.paths and (x.is_meta or _memory(x) in self.made)

    def knows(self, x: torch.Tensor) -> bool:
        """Whether a tensor has values that depend on constants alone."""
        if x.is_meta or (id(x) in self.paths and x.is_floating_point()):
            return False
        return type(x) in _PLAIN and _memory(x) not in self.forgotten

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Returns the results of an operation on constants, with values, or None.

        What a model keeps for its next call, such as a table of positions, is then right; and it
        may ask for the values.
        """
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        known = base_name(func) not in NOT_CONSTANT and all(self.knows(x) for x in tensors)
        if not known:
            for x in _written(func, args, kwargs):
                if not x.is_meta:
                    self.forgotten.add(_memory(x))
            return None
        if not tensors:  # made from sizes
            args, kwargs = _on(torch.device("meta"), func, args, kwargs)
            empty = func(*args, **kwargs)
            if not isinstance(empty, torch.Tensor) or empty.numel() > LIMIT:
                return None
        elif max(x.numel() for x in tensors) > LIMIT:
            return None
        args, kwargs = _on(self.device, func, args, kwargs)
        if self.counts:
            args, kwargs = pytree.tree_map(lambda x: self.counts.get(id(x), x), (args, kwargs))
        with torch.inference_mode(False):  # as the module would have made them
            result = func(*args, **kwargs)
        old = {_memory(x) for x in tensors}
        for x in pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor) and _memory(x) not in old:
                self.made.add(_memory(x))
        return result

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Returns the results of an operation; what it does to shapes is asked for once."""
        if (known := self.compute(func, args, kwargs)) is not None:
            return known
        key = None
        if func in _RETURN_THE_FIRST and args[0].is_floating_point():
            return args[0]
        if not any(a.alias_info is not None for a in func._schema.arguments):
            with contextlib.suppress(TypeError):  # arguments that have no hash
                key = (func, key_of(args), key_of(tuple(sorted(kwargs.items()))))
                shape = self.shapes.get(key) or obvious_shape(func, args)
                if shape is not None:
                    return empty_tensor(shape)
        args, kwargs = _on(torch.device("meta"), func, args, kwargs)
        result = func(*self.without_values(args), **self.without_values(kwargs))
        if isinstance(result, torch.Tensor):
            if not result.is_meta:
                return self.without_values(result)
            if key is not None:
                self.shapes[key] = shape_of(result)
        return result

    def without_values(self, x: Any) -> Any:
        """Returns arguments with empty tensors for those that have values."""
        if isinstance(x, (list, tuple)):
            return [self.without_values(y) for y in x]
        if isinstance(x, dict):
            return {k: self.without_values(y) for k, y in x.items()}
        if not isinstance(x, torch.Tensor) or x.is_meta:
            return x
        if id(x) not in self.empty:
            with torch.inference_mode(False):  # as parameters are
                self.empty[id(x)] = empty_tensor(shape_of(x))
            self.alive.append(x)
        return self.empty[id(x)]


def _is_tensor(x: Any) -> bool:
    """Whether a leaf of the arguments is a tensor.

    Raises:
        Unusual: it may hold tensors, and nobody knows where.
    """
    if not isinstance(x, (torch.Tensor, *_VALUES)):
        raise Unusual(f"{type(x)} among the arguments")
    return isinstance(x, torch.Tensor)


_VALUES = (
    *(int, float, complex, bool, str, bytes, type(None)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


_aten = torch.ops.aten


_RETURN_THE_FIRST = {
    _aten.dropout_.default,
    _aten.hardswish_.default,
    _aten.hardtanh_.default,
    _aten.relu_.default,
    _aten.relu6_.default,
    _aten.sigmoid_.default,
    _aten.silu_.default,
    _aten.tanh_.default,
}


def _on(device: torch.device, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Returns arguments that make new tensors on a device."""
    arguments = func._schema.arguments
    place = next((i for i, a in enumerate(arguments) if a.name == "device"), None)
    if place is None:
        return args, kwargs
    if place < len(args):
        return (*args[:place], device, *args[place + 1 :]), kwargs
    return args, {**kwargs, "device": device}


def _parts(func: Any) -> Any:
    """Returns what an operation is made of, as a function, or None."""
    if func in decomposition_table:
        return decomposition_table[func]
    if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
        return func.decompose
    return None


def _written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """Returns the tensors that an operation writes to."""
    if not mutates(func):
        return []
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[i] if i < len(args) else kwargs.get(argument.name))
    return [x for x in pytree.tree_leaves(found) if isinstance(x, torch.Tensor)]


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextlib.contextmanager
def _as_exported() -> Iterator[None]:
    """Lets modules that ask know that nothing here has values, as ``torch.export`` does."""
    compiling = torch.compiler._is_compiling_flag
    exporting = torch.compiler._is_exporting_flag
    torch.compiler._is_compiling_flag = torch.compiler._is_exporting_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = compiling
        torch.compiler._is_exporting_flag = exporting


@contextlib.contextmanager
def _scopes(model: torch.nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Tells the recorder which module is being called."""
    paths = {module: name for name, module in model.named_modules()}
    outer: list[str] = []

    def enter(module: Any, *_: Any) -> None:
        outer.append(recorder.scope)
        recorder.scope = paths.get(module, recorder.scope)

    def leave(*_: Any) -> None:
        recorder.scope = outer.pop()

    handles = [
        hooks.register_module_forward_pre_hook(enter),
        hooks.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _without_values(x: Any) -> bool:
    """Whether something holds a tensor that exists only here."""
    return any(isinstance(y, torch.Tensor) and y.is_meta for y in pytree.tree_leaves(x))
