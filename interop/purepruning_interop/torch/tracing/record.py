"""The graph of a module as it is called, on tensors without values.

The module runs once, eagerly, on the meta device, and every ATen operation is written down before
torch takes it apart. That is the level of ``torch.export`` at a fraction of its time. Values cannot
be asked for, so control flow that depends on them is noticed as export notices it. Whatever else is
out of the ordinary is left to export: nothing is guessed.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch._decomp import decomposition_table
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from purepruning_interop.torch.program import base_name, leaf_names, mutates
from purepruning_interop.torch.results import plain
from purepruning_interop.torch.tracing.fold_constants import LIMIT, NOT_CONSTANT
from purepruning_interop.torch.tracing.read_graph import Source, hidden_writes, readable
from purepruning_interop.torch.tracing.undo import undone

_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


class _Unusual(Exception):
    """Something that export has to look at."""


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
                with _scopes(model, recorder), _Questions(recorder), recorder:
                    found = model(*args, **kwargs)
            recorder.take(found)
        except Exception:  # whatever it is: export says what, if it is an error
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

    def give(self, given: Any) -> Any:
        """Returns the arguments without values, and makes placeholders of them."""
        leaves, spec = pytree.tree_flatten(given)
        empty = {id(x): _empty(_shape(x)) for x in leaves if _is_tensor(x)}
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
            out_spec=self.out_spec,
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
            raise _Unusual("a tensor that no operation returned")
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
        except Exception:
            self.failed = True
            raise

    def record(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is _aten.detach_.default:  # of what torch.tensor makes
            return args[0]
        if not readable(func, self.known) and (parts := _parts(func)) is not None:
            with self:
                return parts(*args, **kwargs)
        written = _written(func, args, kwargs)
        if not all(self.may_write(x) for x in written):
            raise _Unusual(f"{func} writes to a tensor of the model")
        result = self.call(func, args, kwargs)
        values = result if isinstance(result, (list, tuple)) else (result,)
        if not any(isinstance(x, torch.Tensor) for x in values):
            if written:
                raise _Unusual(f"{func} returns nothing")
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
                key = (func, _key(args), _key(tuple(sorted(kwargs.items()))))
                shape = self.shapes.get(key) or _obvious(func, args)
                if shape is not None:
                    return _empty(shape)
        args, kwargs = _on(torch.device("meta"), func, args, kwargs)
        result = func(*self.without_values(args), **self.without_values(kwargs))
        if isinstance(result, torch.Tensor):
            if not result.is_meta:
                return self.without_values(result)
            if key is not None:
                self.shapes[key] = _shape(result)
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
                self.empty[id(x)] = _empty(_shape(x))
            self.alive.append(x)
        return self.empty[id(x)]


class _Questions(TorchFunctionMode):
    """Answers where tensors are; refuses what is asked or done past the operations."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls a function."""
        recorder = self.recorder
        if func in _ASKS_FOR_VALUES and recorder.knows(args[0]):
            return func(*args, **(kwargs or {}))
        past = func in _PAST_THE_OPERATIONS and not isinstance(_asked(args, kwargs), torch.dtype)
        if past or (func in _OF_GRADIENTS and args[0].is_meta):
            recorder.failed = True
            raise _Unusual(f"{func} is no operation")
        if torch.is_autocast_enabled(recorder.device.type):
            recorder.failed = True
            raise _Unusual("types that depend on the device")
        if func in _PLACES and args[0].is_meta:
            return _PLACES[func](recorder.device)
        if func is _Tensor.type and isinstance(_asked(args, kwargs), torch.dtype):
            return args[0].to(_asked(args, kwargs))
        if func in _INDEXING:
            args = (args[0], _with_values(args[1]), *args[2:])
        return func(*args, **(kwargs or {}))


_Tensor: Any = torch.Tensor  # its attributes are descriptors, which type checkers do not know


_PLACES: dict[Any, Any] = {
    _Tensor.device.__get__: lambda device: device,
    _Tensor.is_cpu.__get__: lambda device: device.type == "cpu",
    _Tensor.is_cuda.__get__: lambda device: device.type == "cuda",
    _Tensor.is_meta.__get__: lambda device: device.type == "meta",
}


def _asked(args: Any, kwargs: Any) -> Any:
    """Returns the second argument of ``Tensor.type``."""
    return args[1] if len(args) > 1 else (kwargs or {}).get("dtype")


_INDEXING = {_Tensor.__getitem__, _Tensor.__setitem__}


def _with_values(index: Any) -> Any:
    """Returns an index with tensors for lists, which torch would make tensors without values of."""
    if isinstance(index, tuple):
        return tuple(_with_values(part) for part in index)
    if isinstance(index, list) and all(isinstance(n, (int, bool)) for n in index):
        with _disable_current_modes():
            return torch.tensor(index)
    return index


_OF_GRADIENTS = {
    _Tensor.requires_grad.__get__,
    _Tensor.grad_fn.__get__,
    _Tensor.is_leaf.__get__,
    _Tensor.is_inference,
}


_ASKS_FOR_VALUES = {_Tensor.tolist, _Tensor.numpy, _Tensor.__array__}


_PAST_THE_OPERATIONS = {
    _Tensor._base.__get__,
    _Tensor._is_view,
    _Tensor.__array__,
    _Tensor.__dlpack__,
    _Tensor.data.__set__,
    _Tensor.data_ptr,
    _Tensor.grad.__set__,
    _Tensor.numpy,
    _Tensor.requires_grad.__set__,
    _Tensor.requires_grad_,
    _Tensor.storage,
    _Tensor.tolist,
    _Tensor.type,
    _Tensor.untyped_storage,
}


def _is_tensor(x: Any) -> bool:
    """Whether a leaf of the arguments is a tensor.

    Raises:
        _Unusual: it may hold tensors, and nobody knows where.
    """
    if not isinstance(x, (torch.Tensor, *_VALUES)):
        raise _Unusual(f"{type(x)} among the arguments")
    return isinstance(x, torch.Tensor)


_VALUES = (
    *(int, float, complex, bool, str, bytes, type(None)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


def _shape(x: torch.Tensor) -> tuple[Any, ...]:
    if x.layout is not torch.strided:
        raise _Unusual("a sparse tensor")
    return tuple(x.shape), x.stride(), x.dtype


def _empty(shape: tuple[Any, ...]) -> torch.Tensor:
    size, stride, dtype = shape
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")


def _obvious(func: Any, args: Any) -> tuple[Any, ...] | None:
    """Returns the shape of a result of the commonest layers.

    Torch knows it as well, but from Python kernels that are slow, and that import its compiler.
    """
    tensors = [x for x in args if isinstance(x, torch.Tensor)]
    if any(x.dtype is not tensors[0].dtype or not x.is_contiguous() for x in tensors):
        return None
    if not tensors or not tensors[0].is_floating_point():
        return None
    if func in _NORMS and not _NORMS[func](*args):
        return None
    if func in _LIKE_THE_FIRST:
        return _shape(tensors[0])
    if func not in _CONVOLUTIONS or tensors[0].ndim != tensors[1].ndim:
        return None
    x, kernel = tensors[0].shape, tensors[1].shape
    defaults: tuple[Any, ...] = (None, None, None, [1], [0], [1], 1)
    strides, paddings, dilations, groups = (*args, *defaults[len(args) :])[3:]
    if x[1] != kernel[1] * groups or kernel[0] % groups:
        return None
    if not _fit(kernel[:1], args[2:3]):
        raise _Unusual("a bias of other channels")  # which torch overlooks without values
    sizes = [x[0], kernel[0]]
    for i, (size, taps) in enumerate(zip(x[2:], kernel[2:], strict=True)):
        stride, padding, dilation = (n[i % len(n)] for n in (strides, paddings, dilations))
        sizes.append((size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1)
    if min(sizes) < 1:
        return None
    steps = tuple(math.prod(sizes[i + 1 :]) for i in range(len(sizes)))
    return tuple(sizes), steps, tensors[0].dtype


def _fit(shape: Any, parameters: Any) -> bool:
    """Whether the parameters that are there have a shape."""
    return all(x is None or x.shape == shape for x in parameters)


def _batch_norm_fits(x: Any, *rest: Any) -> bool:
    return x.ndim > 1 and x.shape[0] > 0 and _fit(x.shape[1:2], rest[:4])


def _layer_norm_fits(x: Any, shape: Any, *rest: Any) -> bool:
    last = x.shape[-len(shape) :]
    return len(shape) > 0 and list(last) == list(shape) and _fit(last, rest[:2])


def _group_norm_fits(x: Any, groups: int, *rest: Any) -> bool:
    return x.ndim > 1 and groups > 0 and x.shape[1] % groups == 0 and _fit(x.shape[1:2], rest[:2])


_aten = torch.ops.aten


_NORMS: dict[Any, Any] = {
    _aten.batch_norm.default: _batch_norm_fits,
    _aten.layer_norm.default: _layer_norm_fits,
    _aten.group_norm.default: _group_norm_fits,
}


_LIKE_THE_FIRST = {
    *_NORMS,
    _aten.dropout.default,
    _aten.gelu.default,
    _aten.hardswish.default,
    _aten.hardtanh.default,
    _aten.relu.default,
    _aten.relu6.default,
    _aten.sigmoid.default,
    _aten.silu.default,
    _aten.tanh.default,
}


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


_CONVOLUTIONS = {_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default}


def _key(x: Any) -> Any:
    """Returns what the shape of a result depends on.

    Raises:
        TypeError: something has no hash.
    """
    if isinstance(x, (list, tuple)):
        return tuple(_key(y) for y in x)
    if isinstance(x, torch.Tensor):
        return _shape(x)
    hash(x)
    return type(x), x


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
    flags = ("_is_compiling_flag", "_is_exporting_flag")
    before = {flag: getattr(torch.compiler, flag) for flag in flags}
    vars(torch.compiler).update(dict.fromkeys(flags, True))
    try:
        yield
    finally:
        vars(torch.compiler).update(before)


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
