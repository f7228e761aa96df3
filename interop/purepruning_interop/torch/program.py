"""A torch module as a flat program of ATen operations, by ``torch.export``.

In-place operations become their functional twins, regions without gradients are entered, and what
has no rule is decomposed by torch's own tables.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import linecache
import math
import operator
import traceback
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree


class Var(NamedTuple):
    """A tensor of the program, by number."""

    number: int


class Sym(NamedTuple):
    """A size that is computed when the program runs, by number; ``hint`` is its value here."""

    number: int
    hint: Any


class Size:
    """A size that depends on data: like no other size."""

    def __mul__(self, other: object) -> Size:
        return self if isinstance(other, int) and other == 1 else Size()

    __rmul__ = __mul__


@dataclasses.dataclass(frozen=True)
class Aval:
    """Shape and dtype of a tensor; ``symbolic`` says which sizes depend on the inputs."""

    shape: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device
    symbolic: tuple[bool, ...]


@dataclasses.dataclass
class Op:
    """One operation.

    Attributes:
        name: name of the operator without namespace and overload; a region that is entered leaves
            ``"detach"`` behind.
        target: what is called.
        args: arguments by the names of the schema, with defaults; tensors are :class:`Var`.
        keywords: names of the arguments that are passed by keyword.
        outputs: numbers of the tensors it returns, None for what is no tensor.
        single: whether it returns a tensor rather than a tuple.
        symbol: number of the size it returns, for arithmetic of sizes.
        scope: name of the module it belongs to.
    """

    name: str
    target: Any
    args: dict[str, Any]
    keywords: frozenset[str]
    outputs: tuple[int | None, ...]
    single: bool = True
    symbol: int | None = None
    scope: str = ""

    @property
    def tensors(self) -> list[Var]:
        """All tensors it reads, in order."""
        return [x for x in pytree.tree_leaves(self.args, is_leaf=_is_var) if isinstance(x, Var)]


def _is_var(x: Any) -> bool:
    return isinstance(x, (Var, Sym))


@dataclasses.dataclass
class Program:
    """Operations in order.

    Attributes:
        inputs: numbers of the tensors that are given, in the order of the placeholders; None for
            arguments that are no tensors.
        names: names of the placeholders.
        leaves: path in the state dict of every parameter and buffer, by number.
        constants: tensors the program holds that are not in the state dict, by number.
        outputs: what it returns: :class:`Var`, :class:`Sym` or constants.
        mutations: what a buffer is overwritten with.
        in_spec, out_spec: how arguments and results are packed.
    """

    ops: list[Op]
    avals: list[Aval]
    inputs: list[int | None]
    names: list[str]
    leaves: dict[int, str]
    constants: dict[int, torch.Tensor]
    outputs: list[Any]
    mutations: dict[int, Var]
    in_spec: Any
    out_spec: Any
    dynamic: bool


class Refused(ValueError):
    """``torch.export`` refused a model."""


def leaf_names(model: torch.nn.Module) -> dict[str, str]:
    """Returns for every name in the state dict the first name of that tensor."""
    first: dict[int, str] = {}
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor):
            found[name] = first.setdefault(id(tensor), name)
    return found


def program_of(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    known: Collection[str],
    dynamic: bool = False,
) -> Program:
    """Returns the program of ``model(*args, **kwargs)`` in eval mode.

    Args:
        model: any module; its mode comes back as it was.
        args, kwargs: example inputs.
        known: names of the operators that have rules; others are decomposed.
        dynamic: whether the first axis of the inputs, where they agree on it, stays open.

    Raises:
        Refused: the model cannot be exported; names the line of its source.
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module instance, got {type(model).__name__}")
    with _evaluating(model):
        exported = _export(model, args, kwargs, dynamic)
        if _needs_decomposition(exported, known):
            exported = _decompose(exported, known)
        return _Reader(model, exported, dynamic).program


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Everything in eval mode, and no fused kernels that hide what attention does."""
    modes = {m: m.training for m in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about itself, such as assigned attributes
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in modes.items():
            module.training = training


def _export(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: bool
) -> Any:
    shapes = _open_batch(model, args, kwargs) if dynamic else None
    try:
        return torch.export.export(model, args, kwargs, strict=False, dynamic_shapes=shapes)
    except Exception as error:
        if dynamic:
            raise Refused(f"no dynamic export: {error}") from error
        refused = _refusal(model, error)
    try:  # another tracer, which is as sound: it reads the byte code
        return torch.export.export(model, args, kwargs, strict=True)
    except Exception:
        raise refused from None


def _open_batch(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    first = next((t.shape[0] for t in tensors if t.ndim), None)

    def axis(x: Any) -> Any:
        if isinstance(x, torch.Tensor) and x.ndim and x.shape[0] == first and first > 1:
            return {0: torch.export.Dim.AUTO}
        return None

    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    return pytree.tree_map(axis, dict(given))


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


# In-place operations and decompositions.

#: Operations that may return their argument itself, though their schema does not say so.
_MAY_RETURN_ARGUMENT = {
    "dropout",
    "feature_dropout",
    "alpha_dropout",
    "feature_alpha_dropout",
    "type_as",
    "lift_fresh",
    "pad",
}

#: Views that can be made again, and written through.
VIEWS = {
    "slice", "select", "unsqueeze", "squeeze", "transpose", "permute", "t", "alias", "detach",
    "view",
}  # fmt: skip

#: Regions that only switch something on or off, and the place of the inner graph.
_REGIONS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}


def base_name(target: Any) -> str:
    """Returns the name of an operator without namespace, overload and the mark of in-place."""
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.split("::")[1]
        if name.endswith("_") and not name.startswith("__") and _mutates(target):
            name = name[:-1]
        return name
    if isinstance(target, torch._ops.HigherOrderOperator):
        return target.name()
    return getattr(target, "__name__", str(target))


def _mutates(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _functional(target: Any) -> Any:
    """Returns the operator that computes what an in-place one writes, or None."""
    namespace, _, name = target._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    overload = getattr(packet, target._overloadname, None) if packet is not None else None
    if overload is None or overload._schema.is_mutable:
        return None
    mine, theirs = target._schema.arguments, overload._schema.arguments
    return overload if len(mine) == len(theirs) else None


def _graphs(graph_module: Any) -> list[Any]:
    found = [graph_module]
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and (place := _REGIONS.get(base_name(node.target))):
            found += _graphs(getattr(graph_module, node.args[place].target))
    return found


def _needs_decomposition(exported: Any, known: Collection[str]) -> bool:
    for module in _graphs(exported.graph_module):
        if _hidden_writes(module.graph):
            return True
        for node in module.graph.nodes:
            if node.op == "call_function" and not _readable(node.target, known):
                return True
    return False


def _readable(target: Any, known: Collection[str]) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return base_name(target) in known
    return True  # arithmetic of sizes, regions; other higher-order operators have no decomposition


def _hidden_writes(graph: Any) -> bool:
    """Whether an operation writes to memory that is read under another name later."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    owner: dict[Any, Any] = {}

    def root(node: Any) -> Any:
        while owner.get(node, node) is not node:
            node = owner[node]
        return node

    writes: list[tuple[Any, Any]] = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        name = base_name(node.target)
        if isinstance(node.target, torch._ops.OpOverload):
            schema = node.target._schema
            for argument, value in zip(schema.arguments, node.args, strict=False):
                alias = argument.alias_info
                if alias is None or not isinstance(value, torch.fx.Node):
                    continue
                if alias.is_write:
                    writes.append((node, value))
                    if _functional(node.target) is None:
                        return True
                owner[root(node)] = root(value)
        if name in _MAY_RETURN_ARGUMENT or node.target is operator.getitem:
            owner[root(node)] = root(node.args[0])
    groups: dict[Any, list[Any]] = {}
    for node in order if writes else ():
        groups.setdefault(root(node), []).append(node)
    written = {node for node, _ in writes}
    for node, value in writes:
        group = groups[root(value)]
        if any(n.op == "placeholder" for n in group):
            return True
        # Views that are made before and read after have to be made again: plain ones can be.
        hidden = any(
            order[n] < order[node]
            and n is not value
            and n not in written
            and any(order[user] > order[node] for user in n.users)
            for n in group
        )
        if hidden:
            made = [n for n in group if n not in written and n is not root(n)]
            before = [n for n in made if order[n] < order[node]]
            if any(base_name(n.target) not in VIEWS for n in before):
                return True
    return False


def _decompose(exported: Any, known: Collection[str]) -> Any:
    table = torch.export.default_decompositions()
    for op in list(table.keys()):
        if base_name(op) in known:
            table.pop(op)
    try:
        return exported.run_decompositions(table)
    except Exception:
        return exported.run_decompositions({})


# From nodes to operations.


class _Reader:
    """Reads one exported program."""

    def __init__(self, model: torch.nn.Module, exported: Any, dynamic: bool) -> None:
        self.avals: list[Aval] = []
        self.ops: list[Op] = []
        self.constants: dict[int, torch.Tensor] = {}
        self.symbols = 0
        self.same: dict[Any, Any] = {}  # results of in-place operations, and what they wrote to
        self.views: dict[Any, tuple[Any, Var, Op]] = {}
        signature = exported.graph_signature
        names = leaf_names(model)
        leaves: dict[int, str] = {}
        inputs: list[int | None] = []
        given: list[str] = []
        env: dict[Any, Any] = {}
        by_path: dict[str, Var] = {}
        specs = {spec.arg.name: spec for spec in signature.input_specs}
        constants = exported.constants
        for node in exported.graph.nodes:
            if node.op != "placeholder":
                continue
            spec = specs[node.name]
            kind = spec.kind.name
            if kind == "USER_INPUT":
                given.append(node.name)
                value = node.meta.get("val")
                if isinstance(value, torch.Tensor):
                    env[node] = self.new(value)
                    inputs.append(env[node].number)
                else:
                    env[node] = self._plain(value)
                    inputs.append(None)
                continue
            if kind in ("PARAMETER", "BUFFER") and spec.target in names:
                path = names[spec.target]
                if path not in by_path:
                    by_path[path] = self.new(node.meta["val"])
                    leaves[by_path[path].number] = path
                env[node] = by_path[path]
                continue
            tensor = constants.get(spec.target)
            if kind == "CONSTANT_TENSOR" or kind == "BUFFER" or kind == "PARAMETER":
                if tensor is None:
                    tensor = _attribute(model, spec.target)
                env[node] = self.constant(tensor, node.meta["val"])
            else:
                env[node] = None
        outputs = self.inline(exported.graph_module, env)
        mutations: dict[int, Var] = {}
        results = []
        for spec, value in zip(signature.output_specs, outputs, strict=True):
            if spec.kind.name == "BUFFER_MUTATION":
                written = names.get(spec.target)
                if written is not None and isinstance(value, Var):
                    mutations[by_path[written].number] = value
            elif spec.kind.name == "USER_OUTPUT":
                results.append(value)
        self.program = Program(
            self.ops,
            self.avals,
            inputs,
            given,
            leaves,
            self.constants,
            results,
            mutations,
            exported.call_spec.in_spec,
            exported.call_spec.out_spec,
            dynamic,
        )

    def new(self, value: torch.Tensor) -> Var:
        shape = tuple(_hint(n) for n in value.shape)
        symbolic = tuple(not isinstance(n, int) for n in value.shape)
        self.avals.append(Aval(shape, value.dtype, value.device, symbolic))
        return Var(len(self.avals) - 1)

    def constant(self, tensor: torch.Tensor, value: Any) -> Var:
        found = self.new(value if isinstance(value, torch.Tensor) else tensor)
        self.constants[found.number] = tensor.detach()
        return found

    def _plain(self, value: Any) -> Any:
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            self.symbols += 1
            return Sym(self.symbols, _hint(value))
        return value

    def inline(self, module: Any, env: dict[Any, Any]) -> list[Any]:
        for node in module.graph.nodes:
            if node.op == "get_attr":
                found = _attribute(module, node.target)
                env[node] = (
                    self.constant(found, found) if isinstance(found, torch.Tensor) else found
                )
            elif node.op == "call_function":
                self.call(node, env)
            elif node.op == "output":
                return list(self.lookup(tuple(node.args[0]), env))
        return []

    def call(self, node: Any, env: dict[Any, Any]) -> None:
        target = node.target
        if target is operator.getitem:
            env[node] = env[node.args[0]][node.args[1]]
            return
        name = base_name(target)
        if name in _REGIONS:
            place = _REGIONS[name]
            inner = env[node.args[place]]
            given = [self.lookup(x, env) for x in node.args[place + 1 :]]
            places = [n for n in inner.graph.nodes if n.op == "placeholder"]
            found = self.inline(inner, dict(zip(places, given, strict=True)))
            if name == "wrap_with_set_grad_enabled" and not node.args[0]:
                found = [self.detached(x, node) for x in found]
            env[node] = found
            return
        value = node.meta.get("val")
        args = {k: self.lookup(v, env) for k, v in _named(node).items()}
        if value is None:
            env[node] = None  # an assertion
            return
        keywords = frozenset(node.kwargs)
        written = None
        if isinstance(target, torch._ops.OpOverload):
            schema = target._schema
            keywords = frozenset(a.name for a in schema.arguments if a.kwarg_only)
            if schema.is_mutable:
                written = next(
                    node.args[i]
                    for i, a in enumerate(schema.arguments)
                    if a.alias_info is not None and a.alias_info.is_write
                )
                target = _functional(target)
                renamed = [a.name for a in target._schema.arguments]
                args = dict(zip(renamed, args.values(), strict=True))
                keywords = frozenset(a.name for a in target._schema.arguments if a.kwarg_only)
        values = value if isinstance(value, (tuple, list)) else (value,)
        if not isinstance(values[0], torch.Tensor) and len(values) == 1:
            symbol = self._plain(value)
            env[node] = symbol
            if isinstance(symbol, Sym):
                self.ops.append(
                    Op(name, target, args, keywords, (), True, symbol.number, _scope(node))
                )
            return
        outputs = [self.new(v) if isinstance(v, torch.Tensor) else None for v in values]
        single = not isinstance(value, (tuple, list))
        self.ops.append(
            Op(
                name,
                target,
                args,
                keywords,
                tuple(None if v is None else v.number for v in outputs),
                single,
                None,
                _scope(node),
            )
        )
        env[node] = outputs[0] if single else outputs
        if written is not None:
            owner = self.owner(written)
            self.same[node] = owner
            self.overwrite(owner, env[node], env)
        elif name in VIEWS and single:
            parent = self.owner(next(x for x in node.args if isinstance(x, torch.fx.Node)))
            self.views[node] = (parent, env[parent], self.ops[-1])

    def owner(self, node: Any) -> Any:
        """Returns the node that names the same tensor without in-place operations."""
        while node in self.same:
            node = self.same[node]
        return node

    def overwrite(self, node: Any, value: Var, env: dict[Any, Any]) -> None:
        """Makes a node mean what was written to it, and what it is a view of as well."""
        env[node] = value
        if node in self.views:
            parent, _, op = self.views[node]
            new = self.through(self.read(parent, env), value, op)
            self.overwrite(parent, new, env)
            self.views[node] = (parent, new, op)

    def read(self, node: Any, env: dict[Any, Any]) -> Any:
        """Returns what a node means now; a view of what was written to is made again."""
        node = self.owner(node)
        if node in self.views:
            parent, seen, op = self.views[node]
            now = self.read(parent, env)
            if now != seen:
                first = next(k for k, v in op.args.items() if isinstance(v, Var))
                env[node] = self.again(op, {**op.args, first: now})
                self.views[node] = (parent, now, op)
        return env[node]

    def again(self, op: Op, args: dict[str, Any]) -> Var:
        assert op.outputs[0] is not None
        self.avals.append(self.avals[op.outputs[0]])
        out = Var(len(self.avals) - 1)
        self.ops.append(dataclasses.replace(op, args=args, outputs=(out.number,)))
        return out

    def through(self, parent: Var, value: Var, view: Op) -> Var:
        """Returns the parent of a view after the view was overwritten."""
        aten = torch.ops.aten
        ndim = len(self.avals[parent.number].shape)
        args = view.args
        if view.name == "slice":
            keys = ("dim", "start", "end", "step")
            target, given = aten.slice_scatter.default, {k: args[k] for k in keys}
        elif view.name == "select":
            target = aten.select_scatter.default
            given = {k: args[k] for k in ("dim", "index")}
        elif view.name in ("alias", "detach"):
            return value
        else:
            if view.name == "permute":
                order = [d % ndim for d in args["dims"]]
            elif view.name in ("transpose", "t") and ndim > 1:
                order = list(range(ndim))
                one = args.get("dim0", 0) % ndim
                other = args.get("dim1", 1) % ndim
                order[one], order[other] = other, one
            else:
                return self.made(
                    "reshape_as", aten.reshape_as.default, {"self": value, "other": parent}, parent
                )
            back = [order.index(d) for d in range(ndim)]
            return self.made("permute", aten.permute.default, {"self": value, "dims": back}, parent)
        return self.made(base_name(target), target, {"self": parent, "src": value, **given}, parent)

    def made(self, name: str, target: Any, args: dict[str, Any], like: Var) -> Var:
        self.avals.append(self.avals[like.number])
        out = Var(len(self.avals) - 1)
        self.ops.append(Op(name, target, args, frozenset(), (out.number,)))
        return out

    def lookup(self, x: Any, env: dict[Any, Any]) -> Any:
        """Returns an argument with tensors for nodes."""
        if isinstance(x, torch.fx.Node):
            return self.read(x, env)
        if isinstance(x, (list, tuple)):
            return [self.lookup(y, env) for y in x]
        if isinstance(x, slice):
            return slice(*(self.lookup(y, env) for y in (x.start, x.stop, x.step)))
        return x

    def detached(self, value: Any, node: Any) -> Any:
        if not isinstance(value, Var):
            return value
        out = Var(len(self.avals))
        self.avals.append(self.avals[value.number])
        self.ops.append(
            Op(
                "detach",
                torch.ops.aten.detach.default,
                {"self": value},
                frozenset(),
                (out.number,),
                scope=_scope(node),
            )
        )
        return out


def _named(node: Any) -> dict[str, Any]:
    if not isinstance(node.target, torch._ops.OpOverload):
        return {str(i): a for i, a in enumerate(node.args)} | dict(node.kwargs)
    found = {}
    for i, argument in enumerate(node.target._schema.arguments):
        if i < len(node.args):
            found[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            found[argument.name] = node.kwargs[argument.name]
        else:
            found[argument.name] = argument.default_value
    return found


def _scope(node: Any) -> str:
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""


def _attribute(root: Any, path: str) -> Any:
    for part in path.split("."):
        root = getattr(root, part)
    return root


def _hint(n: Any) -> Any:
    if isinstance(n, (int, float, bool)):
        return n
    hint = getattr(n.node, "hint", None)
    if hint is None:
        return Size()
    return hint if isinstance(hint, (bool, float)) else int(hint)


def numel(shape: Sequence[Any]) -> Any:
    """Returns the number of elements, or None where a size is not known."""
    return math.prod(shape) if all(isinstance(n, int) for n in shape) else None
